/* SPDX-License-Identifier: Apache-2.0 */
/* plain.h: every kernel but the two matrix products and softmax, in plain C that a compiler turns
 * into vectors. Each instruction set's file includes it and so compiles it with its own flags: one
 * text, the same bits.
 *
 * The including file defines the two functions that are declared here, and calls
 * plain_kernels(&table). */
#ifndef SPARGE_CPU_PLAIN_H
#define SPARGE_CPU_PLAIN_H

#include "common/bf16.h"
#include "common/block_mask.h"
#include "common/element.h"
#include "common/quant.h"
#include "common/select.h"
#include "cpu/packing.h"

static float dot(const float *a, const float *b, int64_t n);   /* sparge_dot, n a multiple of 16 */
static void widen(const uint16_t *from, int64_t n, float *to); /* binary16, exact */

/* ---- One block of tokens ---- */

/* Bits without the sign are ordered as the magnitudes are, and compare faster. */
static int32_t magnitude(float x) { return (int32_t)(sparge_float_bits(x) & 0x7fffffffu); }

static float largest(const float *x, int64_t n)
{
    int32_t top = 0;
    for (int64_t e = 0; e < n; e++) {
        const int32_t size = magnitude(x[e]);
        top = size > top ? size : top;
    }
    return sparge_bits_float((uint32_t)top);
}

static bool load(const sparge_rows *in, const float *mean, int64_t stride, float *x, float *max)
{
    int32_t top = 0;
    for (int64_t r = 0; r < in->rows; r++) {
        float *row = x + r * stride;
        const uint16_t *half = (const uint16_t *)in->data + r * in->token;
        const float *from = (const float *)in->data + r * in->token;
        if (in->dtype == SPARGE_F16)
            widen(half, in->dim, row);
        else if (in->dtype == SPARGE_BF16)
            for (int64_t c = 0; c < in->dim; c++)
                row[c] = sparge_bf16_to_f32(half[c]);
        if (in->dtype != SPARGE_F32)
            from = row;
        for (int64_t c = 0; c < in->dim; c++) {
            row[c] = from[c] - mean[c];
            const int32_t size = magnitude(row[c]);
            top = size > top ? size : top;
        }
        for (int64_t c = in->dim; c < stride; c++)
            row[c] = 0.0f;
    }
    const bool finite = top < magnitude(INFINITY);
    for (int64_t n = 0; n < in->rows * stride && !finite; n++)
        x[n] = sparge_finite(x[n]) ? x[n] : 0.0f;
    *max = finite ? sparge_bits_float((uint32_t)top) : largest(x, in->rows * stride);
    return finite;
}

/* Row after row, as they lie in memory; two pages ahead, where a processor does not look by itself.
 */
static void add_rows(const float *x, int64_t rows, int64_t apart, int64_t n, float *restrict sum)
{
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < n; c += 16)
            __builtin_prefetch(x + (r + 16) * apart + c, 0, 3);
        for (int64_t c = 0; c < n; c++)
            sum[c] += x[r * apart + c];
    }
}

static void sum_rows(const sparge_rows *in, const float *no_mean, int64_t stride, float *x,
                     float *sum)
{
    memset(sum, 0, (size_t)stride * sizeof *sum);
    if (in->dtype == SPARGE_F32) { /* as they lie; a non-finite element would show in the sum */
        bool finite = true;
        add_rows(in->data, in->rows, in->token, in->dim, sum);
        for (int64_t c = 0; c < in->dim; c++)
            finite &= sparge_finite(sum[c]);
        if (finite)
            return;
        memset(sum, 0, (size_t)stride * sizeof *sum);
    }
    float max;
    load(in, no_mean, stride, x, &max);
    add_rows(x, in->rows, stride, stride, sum);
}

/* Eight rows at a time, so that their sums stay in registers. */
static void sum_units(const float *x, int64_t rows, int64_t stride, float *restrict pool,
                      float *restrict unit_sum)
{
    for (int64_t r0 = 0; r0 < rows; r0 += 8) {
        const int64_t n = sparge_min(8, rows - r0);
        const float *first = x + r0 * stride;
        float factor[8];
        for (int64_t r = 0; r < n; r++)
            factor[r] = sparge_unit_factor(dot(first + r * stride, first + r * stride, stride));
        for (int64_t c = 0; c < stride && n == 8; c++)
            for (int64_t r = 0; r < 8; r++) {
                pool[c] += first[r * stride + c];
                unit_sum[c] = fmaf(first[r * stride + c], factor[r], unit_sum[c]);
            }
        for (int64_t r = 0; r < n && n < 8; r++)
            for (int64_t c = 0; c < stride; c++) {
                pool[c] += first[r * stride + c];
                unit_sum[c] = fmaf(first[r * stride + c], factor[r], unit_sum[c]);
            }
    }
}

static void cell_means(float *pool, int64_t rows, int64_t cell, int64_t stride)
{
    for (int64_t r = 0; r < rows; r += cell, pool += stride)
        for (int64_t c = 0; c < stride; c++)
            pool[c] = sparge_cell_mean(pool[c], sparge_min(cell, rows - r));
}

static void channel_max(const float *x, int64_t rows, int64_t stride, float *restrict max)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < stride; c++) {
            const float size = fabsf(x[r * stride + c]);
            max[c] = size > max[c] ? size : max[c];
        }
}

/* ---- Codes ---- */

static inline void store_code(void *to, bool bytes, int64_t e, int32_t code)
{
    if (bytes)
        ((int8_t *)to)[e] = (int8_t)code;
    else
        ((int16_t *)to)[e] = (int16_t)code;
}

/* A code by a product with 1 / scale, which is off by less than qmax / 2^21, is the quotient's
 * unless it lies so near a tie. sparge_quant_code decides there. Each value has its own scale
 * (step 1), or all have one (0). */
static inline void codes_of_some(const float *x, int64_t n, const float *scale, int64_t step,
                                 const float *inverse, int qmax, void *to, bool bytes)
{
    const int32_t near = magnitude(0.5f - (float)qmax * 0x1p-21f);
    int32_t furthest = 0;
    for (int64_t e = 0; e < n; e++) {
        const float ratio = x[e] * inverse[e * step], shifted = ratio + SPARGE_EXP2_ROUNDER;
        const int32_t off = magnitude(ratio - (shifted - SPARGE_EXP2_ROUNDER));
        furthest = off > furthest ? off : furthest;
        store_code(to, bytes, e, (int32_t)sparge_float_bits(shifted)); /* its low bits */
    }
    for (int64_t e = 0; e < n && furthest >= near; e++)
        store_code(to, bytes, e, sparge_quant_code(x[e], scale[e * step], qmax));
}

enum { CODES = 64 }; /* so many at most share a look for ties */

static inline void codes_of_all(const float *x, int64_t n, const float *scale, int64_t step,
                                const float *inverse, int qmax, void *to, bool bytes)
{
    const int64_t size = bytes ? 1 : 2;
    for (int64_t e = 0; e < n; e += CODES) {
        const int64_t some = sparge_min(CODES, n - e);
        char *const at = (char *)to + e * size;
        if (some == CODES) /* which the compiler unrolls */
            codes_of_some(x + e, CODES, scale + e * step, step, inverse + e * step, qmax, at,
                          bytes);
        else
            codes_of_some(x + e, some, scale + e * step, step, inverse + e * step, qmax, at, bytes);
    }
}

static void quantize_bytes(const float *x, int64_t n, float scale, int qmax, void *code)
{
    const float inverse = sparge_quant_inverse(scale);
    codes_of_all(x, n, &scale, 0, &inverse, qmax, code, true);
}

static void quantize_words(const float *x, int64_t n, float scale, int qmax, void *code)
{
    const float inverse = sparge_quant_inverse(scale);
    codes_of_all(x, n, &scale, 0, &inverse, qmax, code, false);
}

static void quantize_channels_bytes(const float *x, int64_t rows, int64_t stride,
                                    const float *scale, const float *inverse, int qmax, void *code)
{
    for (int64_t r = 0; r < rows; r++)
        codes_of_all(x + r * stride, stride, scale, 1, inverse, qmax, (int8_t *)code + r * stride,
                     true);
}

static void quantize_channels_words(const float *x, int64_t rows, int64_t stride,
                                    const float *scale, const float *inverse, int qmax, void *code)
{
    for (int64_t r = 0; r < rows; r++)
        codes_of_all(x + r * stride, stride, scale, 1, inverse, qmax, (int16_t *)code + r * stride,
                     false);
}

static void round_pairs(const float *x, int64_t n, void *pairs)
{
    uint16_t *restrict to = pairs;
    for (int64_t e = 0; e < n; e++)
        to[e] = sparge_bf16_of(sparge_value_is_finite(x[e], SPARGE_BF16) ? x[e] : 0.0f);
}

/* ---- One row of the prediction ---- */

static void score_pools(const float *pool, const float *pools, int64_t n, int64_t stride,
                        float softmax_scale, float *s)
{
    for (int64_t j = 0; j < n; j++)
        s[j] = sparge_pool_score(dot(pool, pools + j * stride, stride), softmax_scale);
}

static void mass(const float *s, int64_t n, float top, uint32_t *restrict to)
{
    for (int64_t j = 0; j < n; j++)
        to[j] = sparge_mass(s[j], top);
}

static void cell_masses(int32_t *restrict codes, int64_t blocks, const int64_t *queries)
{
    uint64_t total[SPARGE_PANEL] = {0};
    float worth[SPARGE_PANEL];
    for (int64_t j = 0; j < blocks; j++)
        for (int n = 0; n < SPARGE_PANEL; n++)
            total[n] += (uint32_t)codes[j * SPARGE_PANEL + n];
    for (int n = 0; n < SPARGE_PANEL; n++)
        worth[n] = sparge_cell_worth(queries[n], total[n]);
    for (int64_t j = 0; j < blocks; j++)
        for (int n = 0; n < SPARGE_PANEL; n++)
            codes[j * SPARGE_PANEL + n] =
                (int32_t)sparge_cell_mass(codes[j * SPARGE_PANEL + n], worth[n]);
}

/* ---- One tile ---- */

static void add_bias(const sparge_scores *x, float *restrict s, int64_t keys,
                     const float *restrict bias)
{
    for (int64_t panel = 0; panel < x->panels; panel++)
        for (int64_t t = 0; t < keys; t++) {
            const float scale = x->scale, of_key = bias[t];
            float *const to = s + panel * x->stride + t * SPARGE_PANEL;
            _Pragma("GCC unroll 1") for (int64_t n = 0; n < SPARGE_PANEL; n++) /* or gcc shuffles */
                to[n] = sparge_score_biased(to[n], scale, of_key);
        }
}

static void hide(const sparge_scores *x, float *restrict s, const uint32_t *restrict attended)
{
    const int64_t words = sparge_mask_row_words(x->keys);
    for (int64_t panel = 0; panel < x->panels; panel++)
        for (int64_t t = 0; t < x->keys; t++) {
            const uint32_t *const word = attended + (panel * words + t / 32) * SPARGE_PANEL;
            float *const to = s + panel * x->stride + t * SPARGE_PANEL;
            for (int64_t n = 0; n < SPARGE_PANEL; n++)
                to[n] = word[n] >> t % 32 & 1u ? to[n] : -INFINITY;
        }
}

/* A query that sees nothing of the tile keeps what it has. P that is not coded is weighed against
 * the running maximum, and needs no weight of its own. */
static bool update_max_lanes(const sparge_softmax_rows *x, int64_t queries, int qmax)
{
    const float *restrict local = x->local;
    float *restrict max = x->max, *restrict sum = x->sum, *restrict shrink = x->shrink,
                    *restrict weight = x->weight;
    int still = 1;
    for (int64_t q = 0; q < queries; q++) {
        const sparge_row row = {max[q], sum[q]};
        shrink[q] = sparge_exp2(sparge_shrink_log2(row.max, local[q]));
        const sparge_row after = sparge_row_shrunk(row, local[q], shrink[q]);
        weight[q] = qmax ? sparge_code_weight(local[q], after.max, qmax) : 1.0f;
        max[q] = after.max;
        sum[q] = after.sum;
        still &= shrink[q] == 1.0f;
    }
    return still;
}

/* ---- One row of the output ---- */

static void turn(const float *from, int64_t stride, float *o)
{
    for (int64_t c = 0; c < stride; c += 8)
        for (int64_t r = 0; r < SPARGE_PANEL; r += 8)
            transpose_8((const uint32_t *)from + c * SPARGE_PANEL + r, SPARGE_PANEL,
                        (uint32_t *)o + r * stride + c, stride);
}

static void store(const float *o, int64_t n, float norm, sparge_dtype dtype, void *out)
{
    for (int64_t c = 0; c < n; c++)
        sparge_element_store(out, dtype, c, o[c] * norm);
}

static float peak_read(const float *x, int64_t n)
{
    float sum[64] = {0};
    for (int64_t e = 0; e + 64 <= n; e += 64)
        for (int64_t lane = 0; lane < 64; lane++)
            sum[lane] += x[e + lane];
    float all = 0.0f;
    for (int64_t lane = 0; lane < 64; lane++)
        all += sum[lane];
    return all;
}

static void plain_kernels(sparge_kernels *k)
{
    packing_kernels(k);
    k->peak_read = peak_read;
    k->load = load;
    k->sum = sum_rows;
    k->sum_units = sum_units;
    k->cell_means = cell_means;
    k->channel_max = channel_max;
    for (int f = 0; f < SPARGE_FORMATS; f++) {
        k->depth[f] = SPARGE_PANEL;
        k->group[f] = 4 * SPARGE_PANEL;
    }
    k->quantize[SPARGE_BYTES] = quantize_bytes;
    k->quantize[SPARGE_WORDS] = quantize_words;
    k->quantize_channels[SPARGE_BYTES] = quantize_channels_bytes;
    k->quantize_channels[SPARGE_WORDS] = quantize_channels_words;
    k->round_pairs = round_pairs;
    k->score_pools = score_pools;
    k->mass = mass;
    k->cell_masses = cell_masses;
    k->add_bias = add_bias;
    k->hide = hide;
    k->update_max = update_max_lanes;
    k->dot = dot;
    k->turn = turn;
    k->store = store;
}

#endif
