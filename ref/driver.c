/* SPDX-License-Identifier: Apache-2.0 */
/* driver.c: memory, and the loops over heads and query blocks. Each of q, k and v is decoded once,
 * whether a call predicts, attends or both. */
#include <stdlib.h>

#include "common/clock.h"
#include "common/quant.h"
#include "ref/ref.h"

/* Memory that is given back in one call. After a failure `failed` is true and every take is NULL.
 */
typedef struct arena {
    void *piece[40];
    int pieces;
    bool failed;
} arena;

static void *take(arena *a, int64_t count, size_t size)
{
    void *piece = NULL;
    if (!a->failed && (uint64_t)count < (uint64_t)PTRDIFF_MAX / size)
        piece = malloc(count ? (size_t)count * size : 1);
    if (piece)
        a->piece[a->pieces++] = piece;
    else
        a->failed = true;
    return piece;
}

static void release(arena *a)
{
    while (a->pieces)
        free(a->piece[--a->pieces]);
}

/* Without a product it is loaded, and no more: then dtype is F32. */
static sparge_ref_tensor tensor(arena *a, int64_t tokens, int64_t dim, int64_t block,
                                sparge_dtype dtype, int qmax, int64_t scales)
{
    return (sparge_ref_tensor){
        .tokens = tokens,
        .dim = dim,
        .block = block,
        .x = take(a, tokens * dim, sizeof(float)),
        .nonfinite = take(a, tokens * dim, sizeof(bool)),
        .qmax = qmax,
        .scales = scales,
        .code = take(a, qmax ? tokens * dim : 0, sizeof(int16_t)),
        .bf16 = take(a, dtype == SPARGE_BF16 ? tokens * dim : 0, sizeof(uint16_t)),
        .scale = take(a, qmax ? sparge_ceil_div(tokens, block) * scales : 0, sizeof(float)),
    };
}

static sparge_ref_mode mode_of(const sparge_problem *p, const sparge_options *o)
{
    sparge_ref_mode mode = {
        .similar = sparge_ref_similar,
        .select = sparge_ref_select,
        .score = sparge_ref_score,
        .accumulate_pv = sparge_ref_accumulate_pv,
        .p_qmax = sparge_pv_qmax(o->pv_dtype),
        .predict_scale = o->softmax_scale,
    };
    sparge_ref_set_precision(&mode, o);
    sparge_ref_set_rules(&mode, p, o);
    return mode;
}

static void lay_out(arena *a, sparge_ref_work *w)
{
    const sparge_geometry *g = &w->g;
    const int64_t dim = w->p->dim, dim_v = w->result ? w->p->dim_v : 0;
    const int64_t block_q = w->result ? g->block_q : 0, block_k = g->block_k; /* of tiles */
    const sparge_dtype qk = w->result ? w->o->qk_dtype : SPARGE_F32,
                       pv = w->result ? w->o->pv_dtype : SPARGE_F32;
    w->q = tensor(a, g->q_len, dim, g->block_q, qk, sparge_qk_qmax(qk), 1);
    w->k = tensor(a, g->k_len, dim, g->block_k, qk, sparge_qk_qmax(qk), 1);
    w->v = tensor(a, g->k_len, dim_v, g->block_k, pv, sparge_pv_qmax(pv), dim_v);
    w->mean = w->o->smooth_k ? take(a, dim, sizeof(float)) : NULL;
    w->v_scale = take(a, dim_v, sizeof(float));
    for (int64_t c = 0; c < dim_v && w->v_scale; c++)
        w->v_scale[c] = 1.0f;
    w->k_pool = take(a, g->k_blocks * dim, sizeof(float));
    w->k_summary = take(a, g->k_blocks, sizeof *w->k_summary);
    w->q_pool = take(a, dim, sizeof(float));
    w->unit_sum = take(a, dim, sizeof(float));
    if (w->o->cell) {
        w->cells = sparge_geometry_make(g->q_len, g->k_len, w->o->cell, w->o->cell, g->causal);
        w->k_cell = take(a, w->cells.k_blocks * dim, sizeof(float));
        w->q_cell = take(a, g->block_q / w->o->cell * dim, sizeof(float));
        w->cell_s = take(a, w->cells.k_blocks, sizeof(float));
    }
    w->row = (sparge_ref_row){
        .blocks = g->k_blocks,
        .sink = w->o->sink,
        .s = take(a, g->k_blocks, sizeof(float)),
        .k_similar = take(a, g->k_blocks, sizeof(bool)),
        .order = take(a, g->k_blocks, sizeof(sparge_ref_ranked)),
    };
    w->tile = (sparge_ref_tile){
        .s = take(a, block_q * block_k, sizeof(float)),
        .visible = take(a, block_q, sizeof(int64_t)),
        .hidden = take(a, block_q * block_k, sizeof(bool)),
        .attended = take(a, block_q, sizeof(int64_t)),
        .most = take(a, block_q, sizeof(float)),
        .local = take(a, block_q, sizeof(float)),
        .done = take(a, block_q, sizeof(bool)),
        .row = take(a, block_q, sizeof(sparge_row)),
        .o = take(a, block_q * dim_v, sizeof(float)),
        .product = take(a, dim_v, sizeof(int32_t)),
        .p = take(a, block_k, sizeof(uint16_t)),
    };
    w->row_nonfinite = take(a, block_q, sizeof(bool));
    w->pv_done = take(a, g->k_blocks, sizeof(float));
}

static void load(const sparge_in *in, int64_t b, int64_t h, const sparge_ref_tensor *t)
{
    sparge_ref_load(in, b, h, 0, t->tokens, t->dim, t->x, t->nonfinite);
}

static void quantize(sparge_ref_tensor *t, float slack, int64_t head, int16_t *code, float *scale)
{
    if (t->qmax)
        sparge_ref_codes(t, slack);
    sparge_ref_record_codes(t, head, code, scale);
}

static void load_keys(sparge_ref_work *w, bool predicts)
{
    const sparge_problem *p = w->p;
    const sparge_intermediates *to = w->intermediates;
    const int64_t h = w->kv % p->kv_heads, at = w->kv;
    load(&p->k, w->b, h, &w->k);
    if (w->mean) {
        sparge_ref_mean(w->k.x, &w->g, p->dim, w->mean);
        sparge_ref_subtract_mean(w->k.x, w->k.nonfinite, p->k_len, p->dim, w->mean);
        sparge_ref_record(to->k_mean, at, w->mean, p->dim, 4);
    }
    if (predicts)
        sparge_ref_summarize_keys(w);
    if (!w->result)
        return;
    load(&p->v, w->b, h, &w->v);
    if (w->mode.round_v)
        w->mode.round_v(w);
    if (w->mode.round_qk)
        w->mode.round_qk(&w->k);
    quantize(&w->k, w->mode.slack, at, to->k_int, to->k_scale);
    quantize(&w->v, 0.0f, at, to->v_int, to->v_scale);
}

static void load_queries(sparge_ref_work *w)
{
    load(&w->p->q, w->b, w->h, &w->q);
    if (w->result)
        quantize(&w->q, w->mode.slack, w->n, w->intermediates->q_int, w->intermediates->q_scale);
}

/* Asks the caller, when so many query blocks of all heads are attended. */
static sparge_status go_on(const sparge_ref_work *w, int64_t attended)
{
    const sparge_options *o = w->o;
    const int64_t all = w->p->batch * w->p->heads * w->g.q_blocks;
    return !o->progress || o->progress(o->user, (double)attended / (double)all)
               ? SPARGE_OK
               : SPARGE_ERR_CANCELLED;
}

static sparge_status predict_head(sparge_ref_work *w, sparge_mask *mask)
{
    sparge_status status = SPARGE_OK;
    const int64_t first = w->n * w->g.q_blocks; /* of all heads */
    for (int64_t i = 0; i < w->g.q_blocks && !status; i++) {
        uint32_t *kept = mask->bits + (first + i) * mask->words;
        memset(kept, 0, (size_t)mask->words * sizeof *kept);
        sparge_ref_predict_row(w, i, kept);
        status = go_on(w, w->result ? first : 0);
    }
    return status;
}

static sparge_status attend_head(sparge_ref_work *w)
{
    sparge_status status = SPARGE_OK;
    const int64_t first = w->n * w->g.q_blocks;
    w->tally = sparge_tally_zero();
    if (w->mode.round_qk) /* the prediction takes q as it is */
        w->mode.round_qk(&w->q);
    for (int64_t i = 0; i < w->g.q_blocks && !status; i++) {
        sparge_ref_attend_block(w, i);
        status = go_on(w, first + i + 1);
    }
    w->result->head_counts[w->n] = sparge_tally_counts(&w->tally, &w->g);
    return status;
}

/* Writes a mask, if `predicted`; then attends over `mask`, if there is a result. */
static sparge_status run(const sparge_problem *p, const sparge_options *o, sparge_mask *predicted,
                         const sparge_mask *mask, const sparge_intermediates *intermediates,
                         sparge_result *result)
{
    arena a = {0};
    sparge_ref_work w = {
        .p = p,
        .o = o,
        .intermediates = intermediates,
        .result = result,
        .mask = mask,
        .g = sparge_geometry_of(p, o),
        .mode = mode_of(p, o),
    };
    lay_out(&a, &w);
    double loading = 0.0, predicting = 0.0, attending = 0.0;
    sparge_status status = a.failed ? SPARGE_ERR_MEMORY : SPARGE_OK;
    const int64_t gqa = p->heads / p->kv_heads; /* query heads of a key head */
    for (w.n = 0; w.n < p->batch * p->heads && !status; w.n++) {
        const double begin = sparge_seconds();
        w.b = w.n / p->heads;
        w.h = w.n % p->heads;
        w.kv = w.n / gqa;
        w.k_bias = p->k_bias ? p->k_bias + w.kv * p->k_len : NULL;
        if (w.n % gqa == 0)
            load_keys(&w, predicted);
        load_queries(&w);
        const double loaded = sparge_seconds();
        if (predicted)
            status = predict_head(&w, predicted);
        const double judged = sparge_seconds();
        if (result && !status)
            status = attend_head(&w);
        loading += loaded - begin;
        predicting += judged - loaded;
        attending += sparge_seconds() - judged;
    }
    release(&a);
    if (result) {
        result->seconds_quantize = loading;
        result->seconds_predict = predicting;
        result->seconds_attend = attending;
    }
    return status;
}

sparge_status sparge_ref_predict(const sparge_problem *p, const sparge_options *o,
                                 sparge_mask *mask, const sparge_intermediates *intermediates)
{
    return run(p, o, mask, NULL, intermediates, NULL);
}

sparge_status sparge_ref_attend(const sparge_problem *p, const sparge_options *o,
                                const sparge_mask *mask, sparge_result *result)
{
    return run(p, o, NULL, mask, result->intermediates, result);
}

sparge_status sparge_ref_attention(const sparge_problem *p, const sparge_options *o,
                                   sparge_mask *mask, sparge_result *result)
{
    return run(p, o, mask, mask, result->intermediates, result);
}
