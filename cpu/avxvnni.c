/* SPDX-License-Identifier: Apache-2.0 */
/* avxvnni.c: AVX-VNNI (Alder Lake, Zen 5): the dot products of AVX-512 VNNI on vectors of 8 lanes.
 * vpdpbusd adds four products of an unsigned and a signed byte to a lane, vpdpwssd two of signed
 * words, both exactly. What is no product of integers is avx2.c's. */
#include <immintrin.h>

#include "cpu/kernels.h"

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 8, WIDTH = 2, HEIGHT = 6, HEIGHT_FLOATS = 6 };

typedef __m256 floats;
typedef int32_t ints
    __attribute__((vector_size(32), may_alias)); /* lanes, where __m256i is quadwords */

INLINE floats f_load(const float *x) { return _mm256_loadu_ps(x); }
INLINE void f_store(float *to, floats x) { _mm256_storeu_ps(to, x); }
INLINE floats f_all(float x) { return _mm256_set1_ps(x); }
INLINE floats f_of(ints x) { return _mm256_cvtepi32_ps((__m256i)x); }
INLINE floats f_mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
INLINE floats f_fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE ints i_load(const void *x) { return (ints)_mm256_loadu_si256(x); }
INLINE ints i_zero(void) { return (ints)_mm256_setzero_si256(); }
INLINE ints i_all(int32_t x) { return (ints)_mm256_set1_epi32(x); }

INLINE ints i_dot_bytes(ints c, ints a, ints b)
{
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b);
}

INLINE ints i_dot_words(ints c, ints a, ints b)
{
    return (ints)_mm256_dpwssd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b);
}

#include "cpu/vnni.h"

void sparge_avxvnni_kernels(sparge_kernels *k)
{
    vnni_kernels(k);
    k->isa = SPARGE_ISA_AVXVNNI;
}
