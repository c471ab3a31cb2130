/* SPDX-License-Identifier: Apache-2.0 */
/* plain.h: every kernel but the two matrix products and softmax, in plain C that a compiler turns
 * into vectors. Each instruction set's file includes it and so compiles it with its own flags: one
 * text, the same bits.
 *
 * The including file defines the two functions that are declared here, and calls
 * plain_kernels(&table). */
#ifndef SPARGE_CPU_PLAIN_H
#define SPARGE_CPU_PLAIN_H

#include "common/element.h"
#include "common/quant.h"
#include "common/select.h"
#include "cpu/kernels.h"

static float dot(const float *a, const float *b, int64_t n);   /* sparge_dot, n a multiple of 16 */
static void widen(const uint16_t *from, int64_t n, float *to); /* binary16, exact */

/* ---- One block of tokens ---- */

/* Bits without the sign are ordered as the magnitudes are, and compare faster. */
static int32_t magnitude(float x) { return (int32_t)(sparge_float_bits(x) & 0x7fffffffu); }

static bool load(const sparge_rows *in, const float *mean, int64_t stride, float *x)
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
    if (top < magnitude(INFINITY))
        return true;
    for (int64_t n = 0; n < in->rows * stride; n++)
        if (!sparge_finite(x[n]))
            x[n] = 0.0f;
    return false;
}

/* Eight rows at a time, so that their sums stay in registers. */
static void add_rows(const float *x, int64_t rows, int64_t apart, int64_t n, float *restrict sum)
{
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8)
        for (int64_t c = 0; c < n; c++)
            for (int64_t e = 0; e < 8; e++)
                sum[c] += x[(r + e) * apart + c];
    for (; r < rows; r++)
        for (int64_t c = 0; c < n; c++)
            sum[c] += x[r * apart + c];
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
    load(in, no_mean, stride, x);
    add_rows(x, in->rows, stride, stride, sum);
}

static float summarize(const float *x, int64_t rows, int64_t stride, float *restrict pool,
                       float *restrict unit_sum)
{
    memset(pool, 0, (size_t)stride * sizeof *pool);
    memset(unit_sum, 0, (size_t)stride * sizeof *unit_sum);
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
    for (int64_t c = 0; c < stride; c++)
        pool[c] /= (float)rows;
    return sparge_mean_cosine(dot(unit_sum, unit_sum, stride), rows);
}

static float quantize(const float *x, int64_t n, int qmax, int16_t *restrict code)
{
    int32_t top = 0;
    for (int64_t e = 0; e < n; e++) {
        const int32_t size = magnitude(x[e]);
        top = size > top ? size : top;
    }
    const float scale = sparge_quant_scale(sparge_bits_float((uint32_t)top), qmax);
    for (int64_t e = 0; e < n; e++)
        code[e] = (int16_t)sparge_quant_code(x[e], scale, qmax);
    return scale;
}

static void quantize_channels(const float *x, int64_t rows, int64_t stride, int qmax,
                              float *restrict scale, int16_t *restrict code)
{
    for (int64_t c = 0; c < stride; c++)
        scale[c] = 0.0f;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < stride; c++) {
            const float size = fabsf(x[r * stride + c]);
            scale[c] = size > scale[c] ? size : scale[c];
        }
    for (int64_t c = 0; c < stride; c++)
        scale[c] = sparge_quant_scale(scale[c], qmax);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < stride; c++)
            code[r * stride + c] = (int16_t)sparge_quant_code(x[r * stride + c], scale[c], qmax);
}

/* ---- Packing ---- */

/* -(first half . second half), what Winograd's product has too much of. */
static int32_t words_init(const int16_t *row, int64_t depth)
{
    int32_t sum = 0;
    for (int64_t c = 0; c < depth / 2; c++)
        sum += row[c] * row[depth / 2 + c];
    return -sum;
}

static void pack_rows_bytes(const void *from, int64_t rows, int64_t stride, void *a, int32_t *init)
{
    const int16_t *code = from;
    uint8_t *restrict to = a;
    (void)init;
    for (int64_t n = 0; n < rows * stride; n++)
        to[n] = (uint8_t)(code[n] + 128);
}

static void pack_rows_words(const void *from, int64_t rows, int64_t stride, void *a, int32_t *init)
{
    memcpy(a, from, (size_t)(rows * stride) * sizeof(int16_t));
    for (int64_t r = 0; r < rows; r++)
        init[r] = words_init((const int16_t *)from + r * stride, stride);
}

static void pack_rows_floats(const void *from, int64_t rows, int64_t stride, void *a, int32_t *init)
{
    (void)init;
    memcpy(a, from, (size_t)(rows * stride) * sizeof(float));
}

/* Key t becomes column t % 16 of panel t / 16: lane n of a key goes to place n, or, where the two
 * halves of depth stand side by side, to 2n and 2n + 1. */
static void transpose(const uint32_t *from, int64_t rows, int64_t lanes, bool halves,
                      uint32_t *restrict to)
{
    for (int64_t t = 0; t < sparge_padded(rows); t++) {
        uint32_t *column = to + t / SPARGE_PANEL * lanes * SPARGE_PANEL + t % SPARGE_PANEL;
        const int64_t second = halves ? lanes / 2 : lanes,
                      apart = halves ? 2 * SPARGE_PANEL : SPARGE_PANEL;
        for (int64_t n = 0; n < second; n++)
            column[n * apart] = t < rows ? from[t * lanes + n] : 0;
        for (int64_t n = second; n < lanes; n++)
            column[(n - second) * apart + SPARGE_PANEL] = t < rows ? from[t * lanes + n] : 0;
    }
}

static void pack_keys_bytes(const void *from, int64_t rows, int64_t stride, void *b, int32_t *init)
{
    const int16_t *code = from;
    for (int64_t t0 = 0; t0 < rows; t0 += SPARGE_PANEL) {
        const int64_t n = sparge_min(SPARGE_PANEL, rows - t0);
        int8_t byte[SPARGE_PANEL * SPARGE_MAX_DIM];
        for (int64_t e = 0; e < n * stride; e++)
            byte[e] = (int8_t)code[t0 * stride + e];
        uint32_t lane[SPARGE_PANEL * SPARGE_MAX_DIM / 4];
        memcpy(lane, byte, (size_t)(n * stride));
        transpose(lane, n, stride / 4, false, (uint32_t *)b + t0 * stride / 4);
        for (int64_t t = 0; t < SPARGE_PANEL; t++) {
            int32_t sum = 0;
            for (int64_t c = 0; c < stride && t < n; c++)
                sum += byte[t * stride + c];
            init[t0 + t] = -128 * sum;
        }
    }
}

static void pack_keys_words(const void *from, int64_t rows, int64_t stride, void *b, int32_t *init)
{
    transpose(from, rows, stride / 2, true, b);
    for (int64_t t = 0; t < sparge_padded(rows); t++)
        init[t] = t < rows ? words_init((const int16_t *)from + t * stride, stride) : 0;
}

static void pack_keys_floats(const void *from, int64_t rows, int64_t stride, void *b, int32_t *init)
{
    (void)init;
    transpose(from, rows, stride, false, b);
}

static void pack_values_bytes(const void *from, int64_t rows, int64_t stride, void *b,
                              int32_t *init)
{
    const int64_t depth = sparge_padded(rows);
    for (int64_t c0 = 0; c0 < stride; c0 += SPARGE_PANEL)
        for (int64_t t = 0; t < depth; t += 4) {
            uint32_t *restrict lane = (uint32_t *)b + (c0 * depth + t * SPARGE_PANEL) / 4;
            memset(lane, 0, SPARGE_PANEL * sizeof *lane);
            for (int64_t k = 0; k < 4 && t + k < rows; k++) {
                const int16_t *code = (const int16_t *)from + (t + k) * stride + c0;
                for (int64_t c = 0; c < SPARGE_PANEL; c++)
                    lane[c] |= (uint32_t)(uint8_t)code[c] << 8 * k;
            }
        }
    memset(init, 0, (size_t)stride * sizeof *init);
}

static void pack_values_words(const void *from, int64_t rows, int64_t stride, void *b,
                              int32_t *init)
{
    const int64_t half = sparge_padded(rows) / 2;
    for (int64_t c0 = 0; c0 < stride; c0 += SPARGE_PANEL)
        for (int64_t t = 0; t < 2 * half; t += 2) {
            const int64_t place = t < half ? 2 * t : 2 * (t - half) + 2;
            uint32_t *restrict lane = (uint32_t *)b + c0 * half + place * SPARGE_PANEL / 2;
            memset(lane, 0, SPARGE_PANEL * sizeof *lane);
            for (int64_t k = 0; k < 2 && t + k < rows; k++) {
                const int16_t *code = (const int16_t *)from + (t + k) * stride + c0;
                for (int64_t c = 0; c < SPARGE_PANEL; c++)
                    lane[c] |= (uint32_t)(uint16_t)code[c] << 16 * k;
            }
        }
    memset(init, 0, (size_t)stride * sizeof *init);
    for (int64_t t = 0; t + half < rows; t++)
        for (int64_t c = 0; c < stride; c++)
            init[c] -= ((const int16_t *)from)[t * stride + c] *
                       ((const int16_t *)from)[(t + half) * stride + c];
}

static void pack_values_floats(const void *from, int64_t rows, int64_t stride, void *b,
                               int32_t *init)
{
    (void)init;
    for (int64_t c0 = 0; c0 < stride; c0 += SPARGE_PANEL)
        for (int64_t t = 0; t < sparge_padded(rows); t++) {
            float *restrict to = (float *)b + c0 * sparge_padded(rows) + t * SPARGE_PANEL;
            for (int64_t c = 0; c < SPARGE_PANEL; c++)
                to[c] = t < rows ? ((const float *)from)[t * stride + c0 + c] : 0.0f;
        }
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

/* ---- One tile ---- */

/* A row that sees nothing of the tile keeps what it has. P that is not coded is weighed against the
 * running maximum, and needs no weight of its own. */
static void update_max_rows(const sparge_softmax_rows *x, int64_t rows, int qmax)
{
    const float *restrict local = x->local;
    float *restrict max = x->max, *restrict sum = x->sum, *restrict shrink = x->shrink,
                    *restrict weight = x->weight;
    for (int64_t r = 0; r < rows; r++) {
        const sparge_row row = {max[r], sum[r]};
        shrink[r] = sparge_exp2(sparge_shrink_log2(row.max, local[r]));
        const sparge_row after = sparge_row_shrunk(row, local[r], shrink[r]);
        weight[r] = qmax ? sparge_code_weight(local[r], after.max, qmax) : 1.0f;
        max[r] = after.max;
        sum[r] = after.sum;
    }
}

/* ---- One row of the output ---- */

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
    k->peak_read = peak_read;
    k->load = load;
    k->sum = sum_rows;
    k->summarize = summarize;
    k->quantize = quantize;
    k->quantize_channels = quantize_channels;
    k->pack_rows[SPARGE_BYTES] = pack_rows_bytes;
    k->pack_rows[SPARGE_WORDS] = pack_rows_words;
    k->pack_rows[SPARGE_FLOATS] = pack_rows_floats;
    k->pack_keys[SPARGE_BYTES] = pack_keys_bytes;
    k->pack_keys[SPARGE_WORDS] = pack_keys_words;
    k->pack_keys[SPARGE_FLOATS] = pack_keys_floats;
    k->pack_values[SPARGE_BYTES] = pack_values_bytes;
    k->pack_values[SPARGE_WORDS] = pack_values_words;
    k->pack_values[SPARGE_FLOATS] = pack_values_floats;
    k->score_pools = score_pools;
    k->mass = mass;
    k->update_max = update_max_rows;
    k->dot = dot;
    k->store = store;
}

#endif
