/* SPDX-License-Identifier: Apache-2.0 */
/* clock.c: not in the header, as C11 alone has no monotonic clock. */
#include "common/clock.h"

#include <time.h>

double sparge_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
