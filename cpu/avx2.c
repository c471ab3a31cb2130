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
enum { LANES = 8, WIDTH = 2, HEIGHT = 4, HEIGHT_FLOATS = 6 };

#include "cpu/lanes.h"

INLINE floats f_fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }

/* The two products of words in a lane. */
INLINE ints i_madd(ints a, ints b) { return (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

/* Exact while a is at most 127. */
INLINE ints i_dot_bytes(ints c, ints a, ints b)
{
    const ints pairs = (ints)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
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
    return _mm256_or_ps(x, _mm256_cmp_ps(y, y, _CMP_UNORD_Q));
}
INLINE bool f_any_nan(floats x)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0;
}
INLINE ints i_of(floats x) { return (ints)_mm256_cvttps_epi32(x); }

/* (As a shift of GNU C gcc 12 moves it about and spills.) */
INLINE ints i_exponent(floats x) { return (ints)_mm256_slli_epi32(_mm256_castps_si256(x), 23); }

INLINE floats f_flush(floats x, floats p)
{
    return _mm256_andnot_ps(_mm256_cmp_ps(x, f_all(SPARGE_EXP2_LOWEST), _CMP_LT_OQ), p);
}

INLINE float f_most(floats x)
{
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

INLINE float sum_of(const floats x[2])
{
    const floats eight = _mm256_add_ps(x[0], x[1]);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

INLINE int32_t i_sum(ints x)
{
    const __m256i all = (__m256i)x;
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

/* Packing works within halves of a register: 32 keys come out as 0-3, 8-11, 16-19, 24-27, then 4-7,
 * ... */
INLINE __m256i pack_words(ints low, ints high)
{
    return _mm256_packus_epi32((__m256i)low, (__m256i)high);
}

INLINE ints store_bytes(uint8_t *to, const ints *code, int vectors)
{
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), zero = {0};
    ints sum = {0};
    for (int n = 0; n < vectors; n += 4) {
        const bool all = n + 4 <= vectors;
        const __m256i low = pack_words(code[n], code[n + 1]);
        const __m256i high = all ? pack_words(code[n + 2], code[n + 3]) : zero;
        const __m256i mixed = _mm256_packus_epi16(low, high),
                      ordered = _mm256_permutevar8x32_epi32(mixed, in_order);
        if (all)
            _mm256_storeu_si256((__m256i *)(to + n * LANES), ordered);
        else
            _mm_storeu_si128((__m128i *)(to + n * LANES), _mm256_castsi256_si128(ordered));
        sum = i_add(sum, (ints)_mm256_sad_epu8(mixed, zero));
    }
    return sum;
}

INLINE ints store_words(int16_t *to, const ints *code, int vectors)
{
    ints sum = {0};
    for (int n = 0; n < vectors; n += 2) {
        const __m256i mixed = pack_words(code[n], code[n + 1]);
        _mm256_storeu_si256((__m256i *)(to + n * LANES), _mm256_permute4x64_epi64(mixed, 0xd8));
        sum = i_add(sum, i_madd((ints)mixed, i_all(0x00010001)));
    }
    return sum;
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
