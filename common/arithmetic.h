/* SPDX-License-Identifier: Apache-2.0 */
/* arithmetic.h: rounding to nearest, subnormal numbers, no traps: what every bit rests on, whatever
 * the caller has set. A thread has its own setting, and one that OpenMP keeps has that of the day
 * it was made: whoever runs arithmetic in a thread brackets it with these. */
#ifndef SPARGE_COMMON_ARITHMETIC_H
#define SPARGE_COMMON_ARITHMETIC_H

#include <errno.h>
#include <fenv.h>

static inline fenv_t sparge_arithmetic_begin(void)
{
    fenv_t caller;
    fegetenv(&caller);
    fesetenv(FE_DFL_ENV);
    return caller;
}

static inline void sparge_arithmetic_end(fenv_t caller) { fesetenv(&caller); }

/* What a public call gives back as it found it. */
typedef struct sparge_caller {
    fenv_t arithmetic;
    int error; /* errno, which a library below may set even where nothing fails */
} sparge_caller;

/* The default floating-point environment until the block ends, however it is left. */
#define SPARGE_OWN_ARITHMETIC                               \
    __attribute__((cleanup(sparge_caller_restore), unused)) \
    sparge_caller caller = {sparge_arithmetic_begin(), errno}

static inline void sparge_caller_restore(sparge_caller *caller)
{
    sparge_arithmetic_end(caller->arithmetic);
    errno = caller->error;
}

#endif
