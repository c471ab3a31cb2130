/* SPDX-License-Identifier: Apache-2.0 */
/* lanes.h: vectors of LANES lanes of 32 bits, as far as GNU C has them for every instruction set.
 * An instruction set's file includes it after it has said LANES. */
#ifndef SPARGE_CPU_LANES_H
#define SPARGE_CPU_LANES_H

#include "cpu/kernels.h"

#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t uints __attribute__((vector_size(4 * LANES), may_alias));

/* The same in memory, where they begin wherever a lane may. */
typedef floats floats_at __attribute__((aligned(1)));
typedef ints ints_at __attribute__((aligned(1)));

INLINE floats f_load(const float *from) { return *(const floats_at *)from; }
INLINE ints i_load(const void *from) { return *(const ints_at *)from; }
INLINE void f_store(float *to, floats x) { *(floats_at *)to = x; }
INLINE void i_store(void *to, ints x) { *(ints_at *)to = x; }
INLINE floats f_all(float x) { return x - (floats){0}; } /* -0 stays: no sum with 0 */
INLINE ints i_all(int32_t x) { return x - (ints){0}; }
INLINE floats f_of(ints x) { return __builtin_convertvector(x, floats); }
INLINE ints i_add(ints a, ints b) { return (ints)((uints)a + (uints)b); } /* wraps */

/* Four bytes, or two words, in every lane. */
INLINE ints i_lane(const void *x)
{
    int32_t lane;
    memcpy(&lane, x, sizeof lane);
    return i_all(lane);
}

#endif
