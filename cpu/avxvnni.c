/* SPDX-License-Identifier: Apache-2.0 */
/* avxvnni.c: AVX-VNNI (Alder Lake, Zen 5): the dot products of AVX-512 VNNI on vectors of 8 lanes.
 * vpdpbusd adds four products of an unsigned and a signed byte to a lane, vpdpwssd two of signed
 * words, both exactly. What is no product of integers is avx2.c's. */
#include <immintrin.h>

enum { LANES = 8, WIDTH = 2, HEIGHT = 6, WIDTH_FLOATS = 2, HEIGHT_FLOATS = 6 };

#include "cpu/lanes.h"

INLINE floats f_fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }

INLINE ints i_dot_bytes(ints c, ints b, ints a)
{
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)b, (__m256i)a);
}

INLINE ints i_dot_words(ints c, ints b, ints a)
{
    return (ints)_mm256_dpwssd_avx_epi32((__m256i)c, (__m256i)b, (__m256i)a);
}

#include "cpu/vnni.h"

void sparge_avxvnni_kernels(sparge_kernels *k) { vnni_kernels(k, SPARGE_ISA_AVXVNNI); }
