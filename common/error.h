/* SPDX-License-Identifier: Apache-2.0 */
/* error.h: a status and one sentence, with the argument and its value. */
#ifndef SPARGE_COMMON_ERROR_H
#define SPARGE_COMMON_ERROR_H

#include "sparge.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Returns the status. `error` may be NULL. */
__attribute__((format(printf, 3, 4))) sparge_status sparge_fail(sparge_error *error,
                                                                sparge_status status,
                                                                const char *format, ...);
sparge_status sparge_succeed(sparge_error *error);

/* Puts a failure in words if nobody has yet. */
sparge_status sparge_with_message(sparge_status status, sparge_error *error);

#ifdef __cplusplus
}
#endif

#endif
