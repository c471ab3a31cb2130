/* SPDX-License-Identifier: Apache-2.0 */
/* error.c: not in the header, as a function of varying arguments cannot be inline. */
#include "common/error.h"

#include <stdarg.h>
#include <stdio.h>

#include "sparge_inspect.h"

sparge_status sparge_fail(sparge_error *error, sparge_status status, const char *format, ...)
{
    if (error) {
        va_list args;
        va_start(args, format);
        vsnprintf(error->text, sizeof error->text, format, args);
        va_end(args);
    }
    return status;
}

sparge_status sparge_succeed(sparge_error *error)
{
    if (error)
        error->text[0] = '\0';
    return SPARGE_OK;
}

sparge_status sparge_with_message(sparge_status status, sparge_error *error)
{
    return status && error && !error->text[0]
               ? sparge_fail(error, status, "%s", sparge_status_string(status))
               : status;
}
