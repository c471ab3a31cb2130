/* SPDX-License-Identifier: Apache-2.0 */
/* avx2.c: AVX2, FMA and F16C (Haswell, Zen): vectors of 8 lanes, 16 registers.
 *
 * There is no dot product of signed bytes. vpmaddubsw adds two products of an unsigned and a signed
 * byte in 16 bits with saturation: 2 * 255 * 127 does not fit, 2 * 127 * 127 does. So P, whose
 * codes are 0 .. 127, goes through it, and Q and K are widened to 16 bits when they are packed.
 * There vpmaddwd is limited by the two ports that multiply; Winograd's product trades half of the
 * multiplications for additions. */
#include <immintrin.h>

/* C of 4 x 2 integer vectors leaves 8 registers to words; 6 x 2 of floats leaves 4, and needs 3. */
enum { LANES = 8, WIDTH = 2, HEIGHT = 4, WIDTH_FLOATS = 2, HEIGHT_FLOATS = 6 };

#include "cpu/lanes.h"

INLINE floats f_fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }

/* The two products of words in a lane. */
INLINE ints i_madd(ints a, ints b) { return (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

/* Exact while b is at most 127. */
INLINE ints i_dot_bytes(ints c, ints b, ints a)
{
    const ints pairs = (ints)_mm256_maddubs_epi16((__m256i)b, (__m256i)a);
    return i_add(c, i_madd(pairs, i_all(0x00010001)));
}

#include "cpu/products.h"

INLINE void tile_words(const sparge_product *x, part at, int rows, int vectors,
                       ints c[HEIGHT][WIDTH])
{
    const int64_t half = x->depth / 2;
    const int16_t *a = a_of(x, at.row, sizeof *a), *b = b_of(x, at, sizeof *b);
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++)
            c[r][n] =
                i_add(i_all(x->a_init[at.row + r]), i_load(x->b_init + (at.column + n) * LANES));
    for (int64_t e = 0; e < half; e += 2, b += 4 * SPARGE_PANEL) {
        const ints first[WIDTH] = {i_load(b), i_load(b + 16)},
                   second[WIDTH] = {i_load(b + 32), i_load(b + 48)};
        for (int r = 0; r < rows; r++) {
            const ints a1 = i_lane(a + r * x->a_stride + e),
                       a2 = i_lane(a + r * x->a_stride + half + e);
            for (int n = 0; n < vectors; n++) {
                const __m256i sum1 = _mm256_add_epi16((__m256i)a1, (__m256i)second[n]),
                              sum2 = _mm256_add_epi16((__m256i)a2, (__m256i)first[n]);
                c[r][n] = i_add(c[r][n], i_madd((ints)sum1, (ints)sum2));
            }
        }
    }
}

/* ---- Softmax ---- */

INLINE floats f_max(floats a, floats b) { return _mm256_max_ps(a, b); }
INLINE floats f_nan(floats x, floats y)
{
    return _mm256_blendv_ps(x, y, _mm256_cmp_ps(y, y, _CMP_UNORD_Q));
}
INLINE ints i_of(floats x) { return (ints)_mm256_cvttps_epi32(x); }

INLINE floats f_flush(floats x, floats p)
{
    return _mm256_andnot_ps(_mm256_cmp_ps(x, f_all(SPARGE_EXP2_LOWEST), _CMP_LT_OQ), p);
}

INLINE float sum_of(const floats x[2])
{
    const floats eight = _mm256_add_ps(x[0], x[1]);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

#include "cpu/softmax.h"

/* ---- What plain.h asks for ---- */

static float dot(const float *a, const float *b, int64_t n)
{
    floats sum[2] = {f_all(0.0f), f_all(0.0f)};
    for (int64_t c = 0; c < n; c += SPARGE_PANEL)
        for (int m = 0; m < 2; m++)
            sum[m] = f_fma(f_load(a + c + m * LANES), f_load(b + c + m * LANES), sum[m]);
    return sum_of(sum);
}

static void widen(const uint16_t *from, int64_t n, float *to)
{
    int64_t e = 0;
    for (; e + LANES <= n; e += LANES)
        f_store(to + e, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + e))));
    for (; e < n; e++)
        to[e] = sparge_f16_to_f32(from[e]);
}

void sparge_avx2_kernels(sparge_kernels *k)
{
    plain_kernels(k);
    product_kernels(k, SPARGE_ISA_AVX2);
    softmax_kernels(k);
}
