/* SPDX-License-Identifier: Apache-2.0 */
/* scalar.c: every kernel in plain C: what runs where there are no vectors, and what the others
 * overwrite. */
#include "cpu/plain.h"

static float dot(const float *a, const float *b, int64_t n) { return sparge_dot(a, b, n); }

static void widen(const uint16_t *from, int64_t n, float *to)
{
    for (int64_t e = 0; e < n; e++)
        to[e] = sparge_f16_to_f32(from[e]);
}

/* ---- One row of a product: c [16] += a . panel ---- */

static void row_bytes(const sparge_product *x, int64_t r, int64_t panel, int32_t *c)
{
    const int8_t *a = (const int8_t *)x->a + r * x->a_stride;
    const uint8_t *b = (const uint8_t *)x->b + panel * x->b_stride;
    for (int64_t n = 0; n < SPARGE_PANEL; n++) {
        c[n] = x->a_init ? x->a_init[r] : 0;
        for (int64_t e = 0; e < x->depth; e++)
            c[n] += a[e] * b[(e / 4 * SPARGE_PANEL + n) * 4 + e % 4];
    }
}

static void row_words(const sparge_product *x, int64_t r, int64_t panel, int32_t *c)
{
    const int64_t half = x->depth / 2;
    const int16_t *a = (const int16_t *)x->a + r * x->a_stride;
    const int16_t *b = (const int16_t *)x->b + panel * x->b_stride;
    for (int64_t n = 0; n < SPARGE_PANEL; n++) {
        c[n] = 0;
        for (int64_t e = 0; e < x->depth; e++) {
            const int64_t pair = e < half ? e / 2 * 2 : (e - half) / 2 * 2 + 1;
            c[n] += a[e] * b[(pair * SPARGE_PANEL + n) * 2 + e % 2];
        }
    }
}

static void row_floats(const sparge_product *x, int64_t r, int64_t panel, float *c)
{
    const float *a = (const float *)x->a + r * x->a_stride;
    const float *b = (const float *)x->b + panel * x->b_stride;
    for (int64_t n = 0; n < SPARGE_PANEL; n++)
        for (int64_t e = 0; e < x->depth; e++)
            c[n] = fmaf(a[e], b[e * SPARGE_PANEL + n], c[n]);
}

/* ---- S^T = K Q^T ---- */

static void score(const sparge_product *x, float *s, int64_t s_stride,
                  void (*row)(const sparge_product *, int64_t, int64_t, int32_t *))
{
    for (int64_t panel = 0; panel < x->panels; panel++)
        for (int64_t r = 0; r < x->rows; r++) {
            int32_t c[SPARGE_PANEL];
            row(x, r, panel, c);
            for (int64_t n = 0; n < SPARGE_PANEL; n++)
                s[panel * s_stride + r * SPARGE_PANEL + n] = (float)c[n];
        }
}

static void score_bytes(const sparge_product *x, float *s, int64_t s_stride)
{
    score(x, s, s_stride, row_bytes);
}
static void score_words(const sparge_product *x, float *s, int64_t s_stride)
{
    score(x, s, s_stride, row_words);
}

static void score_floats(const sparge_product *x, float *s, int64_t s_stride)
{
    for (int64_t panel = 0; panel < x->panels; panel++)
        for (int64_t r = 0; r < x->rows; r++) {
            float *c = s + panel * s_stride + r * SPARGE_PANEL;
            memset(c, 0, SPARGE_PANEL * sizeof *c);
            row_floats(x, r, panel, c);
        }
}

/* ---- O^T += V^T P^T ---- */

static void accumulate_pv(const sparge_product *x, const sparge_accumulator *to,
                          void (*row)(const sparge_product *, int64_t, int64_t, int32_t *))
{
    for (int64_t panel = 0; panel < x->panels; panel++)
        for (int64_t r = 0; r < x->rows; r++) {
            const float *shrink = to->shrink + panel * SPARGE_PANEL,
                        *weight = to->weight + panel * SPARGE_PANEL;
            float *o = to->o + panel * to->o_stride + r * SPARGE_PANEL;
            int32_t c[SPARGE_PANEL];
            row(x, r, panel, c);
            for (int64_t n = 0; n < SPARGE_PANEL; n++)
                o[n] = fmaf(weight[n] * to->v_scale[r], (float)c[n], o[n] * shrink[n]);
        }
}

static void accumulate_pv_bytes(const sparge_product *x, const sparge_accumulator *to)
{
    accumulate_pv(x, to, row_bytes);
}

static void accumulate_pv_words(const sparge_product *x, const sparge_accumulator *to)
{
    accumulate_pv(x, to, row_words);
}

static void accumulate_pv_floats(const sparge_product *x, const sparge_accumulator *to)
{
    for (int64_t panel = 0; panel < x->panels; panel++)
        for (int64_t r = 0; r < x->rows; r++) {
            float *o = to->o + panel * to->o_stride + r * SPARGE_PANEL;
            for (int64_t n = 0; n < SPARGE_PANEL; n++)
                o[n] *= to->shrink[panel * SPARGE_PANEL + n];
            row_floats(x, r, panel, o);
        }
}

/* ---- Softmax ---- */

/* A score of key t and query q of the tile, counted over its panels. */
static float score_at(const sparge_scores *x, int64_t t, int64_t q)
{
    return x->s[q / SPARGE_PANEL * x->stride + t * SPARGE_PANEL + q % SPARGE_PANEL];
}

static bool maxima(const sparge_scores *x, float *most, float *local)
{
    bool above = true;
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q++) {
        float max = -INFINITY;
        for (int64_t t = 0; t < x->keys; t++) {
            const float s = score_at(x, t, q);
            max = s > max || s != s ? s : max;
        }
        most[q] = max;
        local[q] = sparge_row_local(max, x->scale);
        above &= local[q] > -INFINITY;
    }
    return above;
}

static void softmax_bytes(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                          float *sum, int32_t *b_init)
{
    const int qmax = sparge_pv_qmax(SPARGE_INT8);
    (void)b_init;
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q++) {
        uint8_t *to = (uint8_t *)p + q / SPARGE_PANEL * p_stride + q % SPARGE_PANEL * 4;
        int32_t codes = 0;
        for (int64_t t = 0; t < x->keys; t++) {
            const int32_t code = sparge_weight_code(score_at(x, t, q), top[q], x->scale, qmax);
            to[t / 4 * 4 * SPARGE_PANEL + t % 4] = (uint8_t)code;
            codes += code;
        }
        sum[q] = (float)codes;
    }
}

static void softmax_words(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                          float *sum, int32_t *b_init)
{
    const int qmax = sparge_pv_qmax(SPARGE_INT12);
    const int64_t half = x->keys / 2;
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q++) {
        int16_t *to = (int16_t *)p + q / SPARGE_PANEL * p_stride + q % SPARGE_PANEL * 2;
        int32_t codes = 0, code[SPARGE_MAX_BLOCK];
        for (int64_t t = 0; t < x->keys; t++) {
            const int64_t pair = t < half ? t / 2 * 2 : (t - half) / 2 * 2 + 1;
            code[t] = sparge_weight_code(score_at(x, t, q), top[q], x->scale, qmax);
            to[pair * 2 * SPARGE_PANEL + t % 2] = (int16_t)code[t];
            codes += code[t];
        }
        sum[q] = (float)codes;
        b_init[q] = 0;
        for (int64_t t = 0; t < half; t++)
            b_init[q] -= code[t] * code[half + t];
    }
}

static void softmax_floats(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                           float *sum, int32_t *b_init)
{
    (void)b_init;
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q++) {
        float *to = (float *)p + q / SPARGE_PANEL * p_stride + q % SPARGE_PANEL, partial[16] = {0};
        for (int64_t t = 0; t < x->keys; t++) {
            const float weight = sparge_weight(score_at(x, t, q), x->scale, top[q]);
            to[t * SPARGE_PANEL] = weight;
            partial[t % 16] += weight;
        }
        sum[q] = sparge_sum_of(partial);
    }
}

static void sum_codes(const sparge_scores *x, const float *top, int64_t together, int32_t *codes)
{
    memset(codes, 0, (size_t)(x->keys / together * SPARGE_PANEL) * sizeof *codes);
    for (int64_t t = 0; t < x->keys / together * together; t++)
        for (int64_t q = 0; q < SPARGE_PANEL; q++)
            codes[t / together * SPARGE_PANEL + q] +=
                sparge_weight_code(score_at(x, t, q), top[q], x->scale, SPARGE_CELL_QMAX);
}

/* ---- Ceilings ---- */

static int64_t peak_floats(int64_t rounds)
{
    float sum[8] = {0};
    for (int64_t r = 0; r < rounds; r++)
        for (int n = 0; n < 8; n++)
            sum[n] = fmaf(sum[n], 0.5f, 1.0f);
    float all = 0.0f;
    for (int n = 0; n < 8; n++)
        all += sum[n];
    return sparge_finite(all) ? rounds * 8 * 2 : 0;
}

static int64_t peak_bytes(int64_t rounds)
{
    uint32_t sum[8] = {0}, all = 0;
    for (int64_t r = 0; r < rounds; r++)
        for (uint32_t n = 0; n < 8; n++)
            sum[n] = sum[n] * 3 + n;
    for (int n = 0; n < 8; n++)
        all += sum[n];
    return all != 1 ? rounds * 8 * 2 : 0; /* which the compiler cannot know */
}

#include "cpu/product_table.h"

void sparge_scalar_kernels(sparge_kernels *k)
{
    plain_kernels(k);
    product_kernels(k, SPARGE_ISA_SCALAR);
    k->int8_scores = SPARGE_WORDS;
    k->maxima = maxima;
    k->sum_codes = sum_codes;
    k->softmax[SPARGE_BYTES] = softmax_bytes;
    k->softmax[SPARGE_WORDS] = softmax_words;
    k->softmax[SPARGE_FLOATS] = softmax_floats;
}
