/* SPDX-License-Identifier: Apache-2.0 */
/* sparge_cuda.h: device memory, for programs that have no CUDA of their own.
 *
 * Without a cuda backend or a device every call fails with SPARGE_ERR_UNSUPPORTED. */
#ifndef SPARGE_CUDA_H
#define SPARGE_CUDA_H

#include "sparge.h"

SPARGE_BEGIN_DECLS

/* The least options.cuda.workspace_bytes for calls of this problem. It ignores the pointers of the
 * problem, but for whether k_bias is NULL. `lse` says if result.lse is wanted. */
sparge_status sparge_workspace_bytes(const sparge_problem *problem, const sparge_options *options,
                                     bool lse, int64_t *bytes, sparge_error *error);

sparge_status sparge_device_alloc(int64_t bytes, void **data, sparge_error *error);
void sparge_device_free(void *data); /* NULL is allowed */

/* Copies between host and device memory in any direction, and waits for the copy. */
sparge_status sparge_device_copy(void *to, const void *from, int64_t bytes, sparge_error *error);

SPARGE_END_DECLS

#endif
