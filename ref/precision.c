/* SPDX-License-Identifier: Apache-2.0 */
/* precision.c: products that are not in int8: codes of 12 bits, no codes at all, both in bf16 as
 * instructions of x86 do it, and P.V as tensor cores do it in binary16 and in e4m3. */
#include "common/bf16.h"
#include "common/quant.h"
#include "ref/ref.h"

/* ---- qk = f32 ---- */

static void score_f32(sparge_ref_work *w)
{
    sparge_ref_tile *tile = &w->tile;
    tile->scale = sparge_score_scale(1.0f, 1.0f, w->o->softmax_scale);
    for (int64_t r = 0; r < tile->rows; r++)
        for (int64_t t = 0; t < tile->keys; t++) {
            const float *q = &w->q.x[(tile->first_q + r) * w->q.dim];
            const float *k = &w->k.x[(tile->first_k + t) * w->k.dim];
            float sum = 0.0f;
            for (int64_t c = 0; c < w->q.dim; c++)
                sum = fmaf(q[c], k[c], sum);
            tile->s[r * tile->keys + t] = sum;
        }
}

/* ---- qk = bf16 ---- */

static void round_bf16(sparge_ref_tensor *t)
{
    for (int64_t e = 0; e < t->tokens * t->dim; e++) {
        t->nonfinite[e] |= !sparge_value_is_finite(t->x[e], SPARGE_BF16);
        t->bf16[e] = sparge_bf16_of(t->nonfinite[e] ? 0.0f : t->x[e]);
    }
}

static void score_bf16(sparge_ref_work *w)
{
    sparge_ref_tile *tile = &w->tile;
    const sparge_bf16_order order = sparge_bf16_order_of(w->o->isa);
    const int64_t dim = w->q.dim;
    tile->scale = sparge_score_scale(1.0f, 1.0f, w->o->softmax_scale);
    for (int64_t r = 0; r < tile->rows; r++)
        for (int64_t t = 0; t < tile->keys; t++)
            tile->s[r * tile->keys + t] =
                sparge_bf16_dot(0.0f, &w->q.bf16[(tile->first_q + r) * dim],
                                &w->k.bf16[(tile->first_k + t) * dim], 1, dim, order);
}

/* ---- pv = bf16: P against the running maximum, rounded for o and for l ---- */

static void round_v_bf16(sparge_ref_work *w) { round_bf16(&w->v); }

static void accumulate_bf16(sparge_ref_work *w, int64_t r)
{
    sparge_ref_tile *tile = &w->tile;
    const sparge_bf16_order order = sparge_bf16_order_of(w->o->isa);
    const int64_t dim = w->v.dim, keys = tile->visible[r];
    sparge_row *row = &tile->row[r];
    float *o = &tile->o[r * dim], sum[16] = {0};
    const float shrink = sparge_row_update_max(row, tile->local[r]);
    for (int64_t t = 0; t < keys; t++) {
        const float p = sparge_weight(tile->s[r * tile->keys + t], tile->scale, row->max);
        tile->p[t] = sparge_bf16_of(tile->hidden[r * tile->keys + t] ? 0.0f : p);
        sum[t % 16] += sparge_bf16_to_f32(tile->p[t]);
    }
    row->sum += sparge_sum_of(sum);
    for (int64_t c = 0; c < dim; c++)
        o[c] = sparge_bf16_dot(o[c] * shrink, tile->p, &w->v.bf16[tile->first_k * dim + c], dim,
                               keys, order);
}

/* ---- pv = f32, f16, fp8: P against the running maximum ---- */

/* o takes P as `round_to` makes it, l as it is: a GPU sums before it packs. */
static void accumulate(sparge_ref_work *w, int64_t r, float (*round_to)(float))
{
    sparge_ref_tile *tile = &w->tile;
    const int64_t dim = w->v.dim;
    sparge_row *row = &tile->row[r];
    float *o = &tile->o[r * dim], sum[16] = {0};
    const float shrink = sparge_row_update_max(row, tile->local[r]);
    for (int64_t c = 0; c < dim; c++)
        o[c] *= shrink;
    for (int64_t t = 0; t < tile->visible[r]; t++) {
        if (tile->hidden[r * tile->keys + t])
            continue;
        const float p = sparge_weight(tile->s[r * tile->keys + t], tile->scale, row->max);
        const float *v = &w->v.x[(tile->first_k + t) * dim], rounded = round_to(p);
        sum[t % 16] += p;
        for (int64_t c = 0; c < dim; c++)
            o[c] = fmaf(rounded, v[c], o[c]);
    }
    row->sum += sparge_sum_of(sum);
}

static float to_f32(float x) { return x; }
static float to_f16(float x) { return sparge_f16_to_f32(sparge_f32_to_f16(x)); }
static float to_e4m3(float x) { return sparge_e4m3_to_f32(sparge_f32_to_e4m3(x)); }
static float p_to_e4m3(float p) { return to_e4m3(SPARGE_P_FP8_SCALE * p) / SPARGE_P_FP8_SCALE; }

static void accumulate_f32(sparge_ref_work *w, int64_t r) { accumulate(w, r, to_f32); }
static void accumulate_f16(sparge_ref_work *w, int64_t r) { accumulate(w, r, to_f16); }
static void accumulate_fp8(sparge_ref_work *w, int64_t r) { accumulate(w, r, p_to_e4m3); }

static void round_v_f16(sparge_ref_work *w)
{
    for (int64_t e = 0; e < w->v.tokens * w->v.dim; e++) {
        const bool finite = sparge_value_is_finite(w->v.x[e], SPARGE_F16);
        w->v.nonfinite[e] |= !finite;
        w->v.x[e] = finite ? to_f16(w->v.x[e]) : 0.0f;
    }
}

/* One scale for each channel over all tokens, so that it can multiply after the last key. */
static void round_v_fp8(sparge_ref_work *w)
{
    const int64_t dim = w->v.dim, end = w->v.tokens * dim;
    for (int64_t c = 0; c < dim; c++) {
        float max = 0.0f;
        for (int64_t e = c; e < end; e += dim)
            max = fmaxf(max, fabsf(w->v.x[e]));
        w->v_scale[c] = sparge_quant_scale(max, SPARGE_E4M3_MAX);
        for (int64_t e = c; e < end; e += dim)
            w->v.x[e] = to_e4m3(sparge_quant_ratio(w->v.x[e], w->v_scale[c]));
    }
}

void sparge_ref_set_precision(sparge_ref_mode *mode, const sparge_options *o)
{
    if (o->qk_dtype == SPARGE_F32)
        mode->score = score_f32;
    if (o->qk_dtype == SPARGE_BF16) {
        mode->score = score_bf16;
        mode->round_qk = round_bf16;
    }
    if (o->pv_dtype == SPARGE_F32)
        mode->accumulate_pv = accumulate_f32;
    if (o->pv_dtype == SPARGE_BF16) {
        mode->accumulate_pv = accumulate_bf16;
        mode->round_v = round_v_bf16;
    }
    if (o->pv_dtype == SPARGE_F16) {
        mode->accumulate_pv = accumulate_f16;
        mode->round_v = round_v_f16;
    }
    if (o->pv_dtype == SPARGE_FP8) {
        mode->accumulate_pv = accumulate_fp8;
        mode->round_v = round_v_fp8;
    }
}
