/* SPDX-License-Identifier: Apache-2.0 */
/* avx512vnni.c: AVX-512 with VNNI (Ice Lake, Zen 4): vectors of 16 lanes, 32 registers; a vector is
 * a whole panel. */
#include <immintrin.h>

/* C of 6 x 4 vectors, 4 of B and a lane of A: 29 registers. Of floats 12 x 2: two panels of Q, and
 * P, stay in L1. */
enum { LANES = 16, WIDTH = 4, HEIGHT = 6, WIDTH_FLOATS = 2, HEIGHT_FLOATS = 12 };

#include "cpu/lanes.h"

INLINE floats f_fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }

INLINE ints i_dot_bytes(ints c, ints b, ints a)
{
    return (ints)_mm512_dpbusd_epi32((__m512i)c, (__m512i)b, (__m512i)a);
}

INLINE ints i_dot_words(ints c, ints b, ints a)
{
    return (ints)_mm512_dpwssd_epi32((__m512i)c, (__m512i)b, (__m512i)a);
}

#include "cpu/vnni.h"

/* ---- Softmax ---- */

INLINE floats f_max(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE floats f_nan(floats x, floats y)
{
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), y);
}
INLINE ints i_of(floats x) { return (ints)_mm512_cvttps_epi32(x); }
INLINE ints i_madd(ints a, ints b) { return (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
INLINE floats f_flush(floats x, floats p)
{
    return _mm512_maskz_mov_ps(
        (__mmask16)~_mm512_cmp_ps_mask(x, f_all(SPARGE_EXP2_LOWEST), _CMP_LT_OQ), p);
}

/* 8 + 8, 4 + 4, 2 + 2, 1 + 1: the order of sparge_sum_of. */
INLINE float sum_of(const floats *x)
{
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(*x), _mm512_extractf32x8_ps(*x, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

#include "cpu/pairs.h"
#include "cpu/softmax.h"

/* ---- What plain.h asks for ---- */

static float dot(const float *a, const float *b, int64_t n)
{
    floats sum = f_all(0.0f);
    for (int64_t c = 0; c < n; c += LANES)
        sum = f_fma(f_load(a + c), f_load(b + c), sum);
    return sum_of(&sum);
}

static void widen(const uint16_t *from, int64_t n, float *to)
{
    int64_t e = 0;
    for (; e + LANES <= n; e += LANES)
        f_store(to + e, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + e))));
    for (; e < n; e++)
        to[e] = sparge_f16_to_f32(from[e]);
}

void sparge_avx512vnni_kernels(sparge_kernels *k)
{
    plain_kernels(k);
    vnni_kernels(k, SPARGE_ISA_AVX512VNNI);
    softmax_kernels(k);
    pair_kernels(k);
}
