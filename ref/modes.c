/* modes.c: everything of algorithm.md section 9 and 5 that is not the default: codes of 12 bits, no
 * codes at all, P.V as tensor cores do it in binary16 and in e4m3, and the rules of the paper as
 * printed and of the authors' released kernels. */
#include "common/half.h"
#include "ref/ref.h"

/* ---- qk = float: the same loop, c = scale * log2 e ---- */

static void score_float(const sparge_ref_operand *q, const sparge_ref_operand *k,
                        sparge_ref_tile *tile)
{
    for (int64_t r = 0; r < tile->rows; r++)
        for (int64_t t = 0; t < tile->keys; t++) {
            const float *a = &q->value[(tile->first_q + r) * q->dim];
            const float *b = &k->value[(tile->first_k + t) * k->dim];
            float sum = 0.0f;
            for (int64_t c = 0; c < q->dim; c++)
                sum = fmaf(a[c], b[c], sum);
            tile->s[r * tile->keys + t] = sum;
        }
}

/* ---- pv = float, half, fp8: P against the running maximum ---- */

/* o takes P as `narrow` rounds it, l as it is: a GPU sums before it packs. */
static void weigh_values(const sparge_ref_operand *v, sparge_ref_tile *tile, int64_t r,
                         float (*narrow)(float))
{
    sparge_row *state = &tile->state[r];
    float *o = &tile->o[r * v->dim], sum[16] = {0};
    const float shrink = sparge_row_update_max(state, tile->local[r]);
    for (int64_t c = 0; c < v->dim; c++)
        o[c] *= shrink;
    for (int64_t t = 0; t < tile->seen[r]; t++) {
        const float p = sparge_weight(tile->s[r * tile->keys + t], tile->c, state->max);
        const float *value = &v->value[(tile->first_k + t) * v->dim], rounded = narrow(p);
        sum[t % 16] += p;
        for (int64_t c = 0; c < v->dim; c++)
            o[c] = fmaf(rounded, value[c], o[c]);
    }
    state->sum += sparge_sum_of(sum);
}

static float in_float(float x) { return x; }
static float in_half(float x) { return sparge_f16_to_f32(sparge_f32_to_f16(x)); }
static float in_e4m3(float x) { return sparge_e4m3_to_f32(sparge_f32_to_e4m3(x)); }

/* 256 p stays below 448, and reaches down to weights of 2^-18. */
static float in_256ths(float p) { return in_e4m3(256.0f * p) / 256.0f; }

static void weigh_float(const sparge_ref_operand *v, int p_qmax, sparge_ref_tile *tile, int64_t r)
{
    (void)p_qmax;
    weigh_values(v, tile, r, in_float);
}

static void weigh_half(const sparge_ref_operand *v, int p_qmax, sparge_ref_tile *tile, int64_t r)
{
    (void)p_qmax;
    weigh_values(v, tile, r, in_half);
}

static void weigh_fp8(const sparge_ref_operand *v, int p_qmax, sparge_ref_tile *tile, int64_t r)
{
    (void)p_qmax;
    weigh_values(v, tile, r, in_256ths);
}

/* What binary16 cannot hold is not finite. */
static void narrow_half(const sparge_ref_operand *v, int64_t tokens, float *unit)
{
    (void)unit;
    for (int64_t e = 0; e < tokens * v->dim; e++) {
        const float x = in_half(v->value[e]);
        v->bad[e] |= !sparge_finite(x);
        v->value[e] = sparge_finite(x) ? x : 0.0f;
    }
}

/* One step for each channel over all tokens, so that it can multiply after the last key. */
static void narrow_fp8(const sparge_ref_operand *v, int64_t tokens, float *unit)
{
    for (int64_t c = 0; c < v->dim; c++) {
        float max = 0.0f;
        for (int64_t e = c; e < tokens * v->dim; e += v->dim)
            max = fmaxf(max, fabsf(v->value[e]));
        const float step = max / 448.0f;
        unit[c] = step < FLT_MIN ? 0.0f : step;
        for (int64_t e = c; e < tokens * v->dim; e += v->dim)
            v->value[e] = step < FLT_MIN ? 0.0f : in_e4m3(v->value[e] / step);
    }
}

/* ---- rules = paper: the algorithm as printed ---- */

static bool similar_paper(const sparge_ref_summary *s, float theta)
{
    return s->finite && s->sim >= theta;
}

/* TopCdf as printed may keep no block at all. (Top-k is not in the paper: as in the default.) */
static void select_paper(const sparge_ref_row *row, uint32_t *kept)
{
    sparge_ref_keep_mass(row, 0, kept);
    sparge_ref_keep_best(row, sparge_ref_topk(row), kept);
    sparge_ref_keep_dissimilar(row, kept);
    sparge_ref_keep_diagonal(row, kept);
    sparge_ref_keep_sink(row, kept);
}

/* Line 13 stands before the test of line 14: l grows even where P.V is skipped. */
static void skipped_paper(sparge_ref_tile *tile, int64_t r)
{
    for (int64_t t = 0; t < tile->seen[r]; t++)
        tile->state[r].sum +=
            sparge_weight(tile->s[r * tile->keys + t], tile->c, tile->state[r].max);
}

/* ---- rules = upstream: the released kernels ---- */

/* Padding and zero rows make their cosine 0/0, and a NaN is not above theta. */
static bool similar_upstream(const sparge_ref_summary *s, float theta)
{
    return s->full && !s->zero_row && sparge_ref_similar(s, theta);
}

/* Top-k counts all key blocks, visible or not; the diagonal is not forced. */
static void select_upstream(const sparge_ref_row *row, uint32_t *kept)
{
    sparge_ref_keep_mass(row, 1, kept);
    sparge_ref_keep_best(row, (int64_t)(row->thresholds->topk * (float)row->blocks), kept);
    sparge_ref_keep_dissimilar(row, kept);
    sparge_ref_keep_sink(row, kept);
}

sparge_ref_mode sparge_ref_mode_of(const sparge_problem *p, const sparge_options *o)
{
    sparge_ref_mode mode = {
        .similar = sparge_ref_similar,
        .select = sparge_ref_select,
        .score = sparge_ref_score,
        .weigh = sparge_ref_weigh,
        .qk_qmax = 127,
        .p_qmax = 127,
        .v_qmax = 127,
        .predict_scale = o->softmax_scale,
    };
    if (o->qk_dtype == SPARGE_INT12)
        mode.qk_qmax = 2047;
    if (o->qk_dtype == SPARGE_F32) {
        mode.qk_qmax = 0;
        mode.score = score_float;
    }
    if (o->pv_dtype == SPARGE_INT12)
        mode.p_qmax = mode.v_qmax = 4095;
    if (o->pv_dtype == SPARGE_F32 || o->pv_dtype == SPARGE_F16 || o->pv_dtype == SPARGE_FP8) {
        mode.p_qmax = mode.v_qmax = 0;
        mode.weigh = o->pv_dtype == SPARGE_F16   ? weigh_half
                     : o->pv_dtype == SPARGE_FP8 ? weigh_fp8
                                                 : weigh_float;
        mode.narrow = o->pv_dtype == SPARGE_F16   ? narrow_half
                      : o->pv_dtype == SPARGE_FP8 ? narrow_fp8
                                                  : NULL;
    }
    if (o->rules != SPARGE_RULES_DEFAULT)
        mode.predict_scale = 1.0f / sqrtf((float)p->dim);
    if (o->rules == SPARGE_RULES_PAPER) {
        mode.similar = similar_paper;
        mode.select = select_paper;
        mode.skipped = skipped_paper;
    }
    if (o->rules == SPARGE_RULES_UPSTREAM) {
        mode.similar = similar_upstream;
        mode.select = select_upstream;
        mode.slack = o->qk_dtype == SPARGE_INT8 ? 1e-7f : 0.0f;
        mode.never_skip = o->block_q > o->block_k ? 2 : 1;
    }
    return mode;
}
