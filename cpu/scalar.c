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
    const uint8_t *a = (const uint8_t *)x->a + r * x->a_stride;
    const int8_t *b = (const int8_t *)x->b + panel * x->depth * SPARGE_PANEL;
    for (int64_t n = 0; n < SPARGE_PANEL; n++) {
        c[n] = x->b_init[panel * SPARGE_PANEL + n];
        for (int64_t e = 0; e < x->depth; e++)
            c[n] += a[e] * b[(e / 4 * SPARGE_PANEL + n) * 4 + e % 4];
    }
}

static void row_words(const sparge_product *x, int64_t r, int64_t panel, int32_t *c)
{
    const int64_t half = x->depth / 2;
    const int16_t *a = (const int16_t *)x->a + r * x->a_stride;
    const int16_t *b = (const int16_t *)x->b + panel * x->depth * SPARGE_PANEL;
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
    const float *b = (const float *)x->b + panel * x->depth * SPARGE_PANEL;
    for (int64_t n = 0; n < SPARGE_PANEL; n++)
        for (int64_t e = 0; e < x->depth; e++)
            c[n] = fmaf(a[e], b[e * SPARGE_PANEL + n], c[n]);
}

/* ---- S = Q K^T ---- */

static void score(const sparge_product *x, float *s, int64_t s_stride,
                  void (*row)(const sparge_product *, int64_t, int64_t, int32_t *))
{
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t panel = 0; panel < x->panels; panel++) {
            int32_t c[SPARGE_PANEL];
            row(x, r, panel, c);
            for (int64_t n = 0; n < SPARGE_PANEL; n++)
                s[r * s_stride + panel * SPARGE_PANEL + n] = (float)c[n];
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
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t panel = 0; panel < x->panels; panel++) {
            float *c = s + r * s_stride + panel * SPARGE_PANEL;
            memset(c, 0, SPARGE_PANEL * sizeof *c);
            row_floats(x, r, panel, c);
        }
}

/* ---- O += P V ---- */

static void accumulate_pv(const sparge_product *x, const sparge_accumulator *to,
                          void (*row)(const sparge_product *, int64_t, int64_t, int32_t *))
{
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t panel = 0; panel < x->panels; panel++) {
            const float *v_scale = to->v_scale + panel * SPARGE_PANEL;
            float *o = to->o + r * to->o_stride + panel * SPARGE_PANEL;
            int32_t c[SPARGE_PANEL];
            row(x, r, panel, c);
            for (int64_t n = 0; n < SPARGE_PANEL; n++)
                o[n] = fmaf(to->weight[r] * v_scale[n], (float)c[n], o[n] * to->shrink[r]);
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
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t panel = 0; panel < x->panels; panel++) {
            float *o = to->o + r * to->o_stride + panel * SPARGE_PANEL;
            for (int64_t n = 0; n < SPARGE_PANEL; n++)
                o[n] *= to->shrink[r];
            row_floats(x, r, panel, o);
        }
}

/* ---- Softmax ---- */

static bool maxima(const sparge_scores *x, float *most, float *local)
{
    bool above = true;
    for (int64_t r = 0; r < x->rows; r++) {
        const float *s = x->s + r * x->stride;
        float lane[16];
        for (int64_t n = 0; n < 16; n++)
            lane[n] = -INFINITY;
        for (int64_t t = 0; t < x->keys; t += 16)
            for (int64_t n = 0; n < 16; n++)
                lane[n] = s[t + n] > lane[n] || s[t + n] != s[t + n] ? s[t + n] : lane[n];
        float max = lane[0];
        for (int64_t n = 1; n < 16; n++)
            max = lane[n] > max || lane[n] != lane[n] ? lane[n] : max;
        most[r] = max;
        local[r] = sparge_row_local(max, x->scale);
        above &= local[r] > -INFINITY;
    }
    return above;
}

static void softmax_bytes(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                          float *sum, int32_t *init)
{
    const int qmax = sparge_pv_qmax(SPARGE_INT8);
    (void)init;
    for (int64_t r = 0; r < x->rows; r++) {
        uint8_t *restrict to = (uint8_t *)p + r * p_stride;
        int32_t codes = 0;
        for (int64_t t = 0; t < x->keys; t++) {
            const int32_t code =
                sparge_weight_code(x->s[r * x->stride + t], top[r], x->scale, qmax);
            to[t] = (uint8_t)code;
            codes += code;
        }
        sum[r] = (float)codes;
    }
}

static void softmax_words(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                          float *sum, int32_t *init)
{
    const int qmax = sparge_pv_qmax(SPARGE_INT12);
    for (int64_t r = 0; r < x->rows; r++) {
        int16_t *restrict to = (int16_t *)p + r * p_stride;
        int32_t codes = 0;
        for (int64_t t = 0; t < x->keys; t++) {
            const int32_t code =
                sparge_weight_code(x->s[r * x->stride + t], top[r], x->scale, qmax);
            to[t] = (int16_t)code;
            codes += code;
        }
        sum[r] = (float)codes;
        init[r] = words_init(to, x->keys);
    }
}

static void softmax_floats(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                           float *sum, int32_t *init)
{
    (void)init;
    for (int64_t r = 0; r < x->rows; r++) {
        float *to = (float *)p + r * p_stride, partial[16] = {0};
        for (int64_t t = 0; t < x->keys; t++)
            to[t] = sparge_weight(x->s[r * x->stride + t], x->scale, top[r]);
        for (int64_t t = 0; t < x->keys; t += 16)
            for (int64_t lane = 0; lane < 16; lane++)
                partial[lane] += to[t + lane];
        sum[r] = sparge_sum_of(partial);
    }
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
    k->begin = k->end = NULL;
    k->int8_scores = SPARGE_WORDS;
    k->maxima = maxima;
    k->softmax[SPARGE_BYTES] = softmax_bytes;
    k->softmax[SPARGE_WORDS] = softmax_words;
    k->softmax[SPARGE_FLOATS] = softmax_floats;
}
