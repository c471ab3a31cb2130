/* stages.h: every stage but the two matrix products, in plain C that a compiler turns into vectors.
 * Each instruction set's file includes it and so compiles it with its own flags: one text, the same
 * bits.
 *
 * The including file defines the two functions that are declared here, and calls stages(&table). */
#ifndef SPARGE_CPU_STAGES_H
#define SPARGE_CPU_STAGES_H

#include "common/half.h"
#include "cpu/kernels.h"

static float dot(const float *a, const float *b, int64_t n);   /* sparge_dot, n a multiple of 16 */
static void widen(const uint16_t *from, int64_t n, float *to); /* binary16, exact */

/* ---- One block of tokens ---- */

static bool load(const sparge_rows *in, const float *mean, int64_t stride, float *x)
{
    int32_t top = 0; /* of the bits without the sign, which are ordered as the magnitudes are */
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
            const int32_t bits = (int32_t)(sparge_float_bits(row[c]) & 0x7fffffffu);
            top = bits > top ? bits : top;
        }
        for (int64_t c = in->dim; c < stride; c++)
            row[c] = 0.0f;
    }
    if (top < 0x7f800000)
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
                       float *restrict unit)
{
    memset(pool, 0, (size_t)stride * sizeof *pool);
    memset(unit, 0, (size_t)stride * sizeof *unit);
    for (int64_t r0 = 0; r0 < rows; r0 += 8) {
        const int64_t n = sparge_min(8, rows - r0);
        float inverse[8];
        for (int64_t r = 0; r < n; r++) {
            const float *row = x + (r0 + r) * stride, square = dot(row, row, stride);
            inverse[r] = square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
        }
        const float *first = x + r0 * stride;
        for (int64_t c = 0; c < stride && n == 8; c++)
            for (int64_t r = 0; r < 8; r++) {
                pool[c] += first[r * stride + c];
                unit[c] = fmaf(first[r * stride + c], inverse[r], unit[c]);
            }
        for (int64_t r = 0; r < n && n < 8; r++)
            for (int64_t c = 0; c < stride; c++) {
                pool[c] += first[r * stride + c];
                unit[c] = fmaf(first[r * stride + c], inverse[r], unit[c]);
            }
    }
    const float n = (float)rows;
    for (int64_t c = 0; c < stride; c++)
        pool[c] /= n;
    return fminf(1.0f, dot(unit, unit, stride) / (n * n));
}

static float largest(const float *x, int64_t n)
{
    int32_t top = 0;
    for (int64_t e = 0; e < n; e++) {
        const int32_t bits = (int32_t)(sparge_float_bits(x[e]) & 0x7fffffffu);
        top = bits > top ? bits : top;
    }
    return sparge_bits_float((uint32_t)top);
}

static float step_of(float max, int qmax)
{
    const float step = max / (float)qmax;
    return step < FLT_MIN ? 0.0f : step;
}

/* A divisor of infinity gives code 0, as a step of 0 must. */
static int16_t code_of(float x, float divisor, int qmax)
{
    const int32_t code = sparge_round(x / divisor);
    const int32_t above = code < -qmax ? -qmax : code;
    return (int16_t)(above > qmax ? qmax : above);
}

static float quantize(const float *x, int64_t n, int qmax, int16_t *restrict code)
{
    const float step = step_of(largest(x, n), qmax), divisor = step > 0.0f ? step : INFINITY;
    for (int64_t e = 0; e < n; e++)
        code[e] = code_of(x[e], divisor, qmax);
    return step;
}

static void quantize_channels(const float *x, int64_t rows, int64_t stride, int qmax,
                              float *restrict step, int16_t *restrict code)
{
    for (int64_t c = 0; c < stride; c++)
        step[c] = 0.0f;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < stride; c++) {
            const float size = fabsf(x[r * stride + c]);
            step[c] = size > step[c] ? size : step[c];
        }
    for (int64_t c = 0; c < stride; c++)
        step[c] = step_of(step[c], qmax);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < stride; c++)
            code[r * stride + c] =
                code_of(x[r * stride + c], step[c] > 0.0f ? step[c] : INFINITY, qmax);
}

/* ---- Packing ---- */

/* -(first half . second half), what Winograd's product has too much of. */
static int32_t words_start(const int16_t *row, int64_t depth)
{
    int32_t sum = 0;
    for (int64_t c = 0; c < depth / 2; c++)
        sum += row[c] * row[depth / 2 + c];
    return -sum;
}

static void pack_rows_bytes(const void *from, int64_t rows, int64_t stride, void *a, int32_t *start)
{
    const int16_t *code = from;
    uint8_t *restrict to = a;
    (void)start;
    for (int64_t n = 0; n < rows * stride; n++)
        to[n] = (uint8_t)(code[n] + 128);
}

static void pack_rows_words(const void *from, int64_t rows, int64_t stride, void *a, int32_t *start)
{
    memcpy(a, from, (size_t)(rows * stride) * sizeof(int16_t));
    for (int64_t r = 0; r < rows; r++)
        start[r] = words_start((const int16_t *)from + r * stride, stride);
}

static void pack_rows_floats(const void *from, int64_t rows, int64_t stride, void *a,
                             int32_t *start)
{
    (void)start;
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

static void pack_keys_bytes(const void *from, int64_t rows, int64_t stride, void *b, int32_t *start)
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
            start[t0 + t] = -128 * sum;
        }
    }
}

static void pack_keys_words(const void *from, int64_t rows, int64_t stride, void *b, int32_t *start)
{
    transpose(from, rows, stride / 2, true, b);
    for (int64_t t = 0; t < sparge_padded(rows); t++)
        start[t] = t < rows ? words_start((const int16_t *)from + t * stride, stride) : 0;
}

static void pack_keys_floats(const void *from, int64_t rows, int64_t stride, void *b,
                             int32_t *start)
{
    (void)start;
    transpose(from, rows, stride, false, b);
}

static void pack_values_bytes(const void *from, int64_t rows, int64_t stride, void *b,
                              int32_t *start)
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
    memset(start, 0, (size_t)stride * sizeof *start);
}

static void pack_values_words(const void *from, int64_t rows, int64_t stride, void *b,
                              int32_t *start)
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
    memset(start, 0, (size_t)stride * sizeof *start);
    for (int64_t t = 0; t + half < rows; t++)
        for (int64_t c = 0; c < stride; c++)
            start[c] -= ((const int16_t *)from)[t * stride + c] *
                        ((const int16_t *)from)[(t + half) * stride + c];
}

static void pack_values_floats(const void *from, int64_t rows, int64_t stride, void *b,
                               int32_t *start)
{
    (void)start;
    for (int64_t c0 = 0; c0 < stride; c0 += SPARGE_PANEL)
        for (int64_t t = 0; t < sparge_padded(rows); t++) {
            float *restrict to = (float *)b + c0 * sparge_padded(rows) + t * SPARGE_PANEL;
            for (int64_t c = 0; c < SPARGE_PANEL; c++)
                to[c] = t < rows ? ((const float *)from)[t * stride + c0 + c] : 0.0f;
        }
}

/* ---- One row of the prediction ---- */

static void rank(const float *pool, const float *pools, int64_t n, int64_t stride, float scale,
                 float *s)
{
    for (int64_t j = 0; j < n; j++)
        s[j] = scale * dot(pool, pools + j * stride, stride) + 0.0f;
}

static void mass(const float *s, int64_t n, float top, uint32_t *restrict to)
{
    for (int64_t j = 0; j < n; j++)
        to[j] = (uint32_t)(int32_t)(sparge_exp2((s[j] - top) * SPARGE_LOG2E) * 0x1p30f);
}

/* ---- One tile ---- */

/* sparge_row_update_max and sparge_code_weight for a vector of rows. A row that sees nothing of the
 * tile keeps what it has. P that is not coded is weighed against the running maximum, and needs no
 * weight of its own. */
static void raise_rows(const sparge_group *g, int64_t rows, int qmax)
{
    const float unit = qmax ? (float)qmax : 1.0f, *restrict local = g->local;
    float *restrict max = g->max, *restrict sum = g->sum, *restrict shrink = g->shrink,
                    *restrict weight = g->weight;
    for (int64_t r = 0; r < rows; r++) {
        const float old = max[r], now = local[r];
        const bool stays = now <= old || old != old;
        const float raised = stays ? old : now;
        const float behind = now == -INFINITY ? now : now - raised;
        shrink[r] = sparge_exp2(stays ? 0.0f : old - raised);
        weight[r] = sparge_exp2(qmax ? behind : 0.0f) / unit;
        sum[r] = stays ? sum[r] : old == -INFINITY ? 0.0f : sum[r] * shrink[r];
        max[r] = raised;
    }
}

/* ---- One row of the output ---- */

static void store(const float *o, int64_t n, float norm, sparge_dtype dtype, void *out)
{
    if (dtype == SPARGE_F32)
        for (int64_t c = 0; c < n; c++)
            ((float *)out)[c] = o[c] * norm + 0.0f;
    for (int64_t c = 0; c < n && dtype != SPARGE_F32; c += SPARGE_PANEL) {
        float row[SPARGE_PANEL];
        const int64_t some = sparge_min(SPARGE_PANEL, n - c);
        for (int64_t e = 0; e < some; e++)
            row[e] = o[c + e] * norm + 0.0f;
        for (int64_t e = 0; e < some; e++) /* (vcvtps2ph would keep the payload of a NaN) */
            ((uint16_t *)out)[c + e] =
                dtype == SPARGE_F16 ? sparge_f32_to_f16(row[e]) : sparge_f32_to_bf16(row[e]);
    }
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

static void stages(sparge_kernels *k)
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
    k->rank = rank;
    k->mass = mass;
    k->raise = raise_rows;
    k->dot = dot;
    k->store = store;
}

#endif
