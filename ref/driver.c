/* driver.c: what the stages stand in: memory, loops over heads and blocks, non-finite rows,
 * counters, intermediates, output. Nothing of the algorithm is here. */
#include <stdlib.h>

#include "common/block_mask.h"
#include "common/clock.h"
#include "common/half.h"
#include "ref/stage.h"

/* Memory that is given back in one call; after a failure `failed` is true and every take is NULL.
 */
typedef struct arena {
    void *piece[32];
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

/* Copies n elements to place `at` of a recorded array, in units of n; nothing where it is not
 * wanted.
 */
void sparge_ref_record(void *array, int64_t at, const void *from, int64_t n, size_t size)
{
    if (array && n)
        memcpy((char *)array + (size_t)(at * n) * size, from, (size_t)n * size);
}

/* Asks the caller, when so much is done of all. */
static bool goes_on(const sparge_options *o, int64_t done, int64_t all)
{
    return !o->progress || o->progress(o->user, (double)done / (double)all);
}

/* ---- Stage 1 ---- */

sparge_status sparge_ref_predict(const sparge_problem *p, const sparge_options *o,
                                 sparge_mask *mask, const sparge_intermediates *intermediates)
{
    const sparge_geometry g =
        sparge_geometry_make(p->q_len, p->k_len, o->block_q, o->block_k, o->causal);
    const int64_t group = p->heads / p->kv_heads, longest = sparge_max(g.block_q, g.block_k);
    arena a = {0};
    const sparge_ref_predictor w = {
        .p = p,
        .o = o,
        .intermediates = intermediates,
        .g = g,
        .mode = sparge_ref_mode_of(p, o),
        .k_pool = take(&a, g.k_blocks * p->dim, sizeof(float)),
        .summary_k = take(&a, g.k_blocks, sizeof(sparge_ref_summary)),
        .similar_k = take(&a, g.k_blocks, sizeof(bool)),
        .x = take(&a, longest * p->dim, sizeof(float)),
        .pool = take(&a, p->dim, sizeof(float)),
        .unit = take(&a, p->dim, sizeof(float)),
        .mean = o->smooth_k ? take(&a, p->dim, sizeof(float)) : NULL,
        .bad = take(&a, longest * p->dim, sizeof(bool)),
        .s = take(&a, g.k_blocks, sizeof(float)),
        .order = take(&a, g.k_blocks, sizeof(sparge_ref_scored)),
    };
    sparge_status status = a.failed ? SPARGE_ERR_MEMORY : SPARGE_OK;
    for (int64_t n = 0; n < p->batch * p->heads && !status; n++) {
        const int64_t b = n / p->heads, h = n % p->heads;
        if (h % group == 0)
            sparge_ref_summarize_keys(&w, b, h / group);
        for (int64_t j = 0; j < g.k_blocks; j++)
            w.similar_k[j] = w.mode.similar(&w.summary_k[j], sparge_thresholds_of(o, h)->theta);
        for (int64_t i = 0; i < g.q_blocks && !status; i++) {
            uint32_t *kept = mask->bits + (n * g.q_blocks + i) * mask->words;
            memset(kept, 0, (size_t)mask->words * sizeof *kept);
            sparge_ref_predict_row(&w, b, h, i, kept);
            if (!goes_on(o, 0, 1))
                status = SPARGE_ERR_CANCELLED;
        }
    }
    release(&a);
    return status;
}

/* ---- Stage 2: beside each tile ---- */

static bool any(const bool *flag, int64_t n)
{
    for (int64_t e = 0; e < n; e++)
        if (flag[e])
            return true;
    return false;
}

/* A non-finite key spoils the rows that see it; a non-finite v element its channel of those rows,
 * where they computed P.V. */
void sparge_ref_spoil(const sparge_ref_attender *w)
{
    const sparge_ref_tile *tile = &w->tile;
    for (int64_t t = 0; t < tile->keys; t++) {
        const bool *v_bad = &w->v.bad[(tile->first_k + t) * w->v.dim];
        const bool k_bad = any(&w->k.bad[(tile->first_k + t) * w->k.dim], w->k.dim);
        if (!k_bad && !any(v_bad, w->v.dim))
            continue;
        for (int64_t r = 0; r < tile->rows; r++) {
            if (t >= tile->seen[r])
                continue;
            w->spoilt[r] |= k_bad;
            for (int64_t c = 0; tile->done[r] && c < w->v.dim; c++)
                if (v_bad[c])
                    tile->o[r * w->v.dim + c] = NAN;
        }
    }
}

void sparge_ref_count(sparge_ref_attender *w, int64_t j)
{
    const sparge_ref_tile *tile = &w->tile;
    int64_t rows = 0;
    for (int64_t r = 0; r < tile->rows; r++) {
        rows += tile->done[r];
        w->counts->qk_tokens += tile->seen[r];
        w->counts->pv_tokens += tile->done[r] ? tile->seen[r] : 0;
    }
    w->counts->qk_done++;
    w->pv_rows[tile->rows < w->g.block_q] += rows;
    w->share[j] = (float)rows / (float)tile->rows;
}

/* ---- Stage 2: around each query block ---- */

static void store(const sparge_out *out, int64_t at, float x)
{
    switch (out->dtype) {
    case SPARGE_F16: ((uint16_t *)out->data)[at] = sparge_f32_to_f16(x); break;
    case SPARGE_BF16: ((uint16_t *)out->data)[at] = sparge_f32_to_bf16(x); break;
    default: ((float *)out->data)[at] = x; break;
    }
}

/* Lines 20-21 for one row: o / l, and lse in natural units with the mean key put back. */
static void finish_row(const sparge_ref_attender *w, int64_t b, int64_t h, int64_t r)
{
    const sparge_problem *p = w->p;
    const sparge_result *result = w->result;
    const sparge_row *state = &w->tile.state[r];
    const int64_t token = w->tile.first_q + r, line = (b * p->heads + h) * p->q_len + token;
    const int64_t at = b * result->o.batch + h * result->o.head + token * result->o.token;
    const bool empty = sparge_row_is_empty(state), spoilt = w->spoilt[r] && !empty;
    if (result->lse) { /* before o, which may stand where q stood */
        result->lse[line] = spoilt ? NAN : sparge_row_lse(state);
        if (w->mean && !empty) {
            sparge_ref_load(&p->q, b, h, token, 1, p->dim, NULL, w->x, &w->q.bad[token * p->dim]);
            result->lse[line] += w->o->softmax_scale * sparge_dot(w->x, w->mean, p->dim);
        }
    }
    const float norm = sparge_row_norm(state);
    for (int64_t c = 0; c < p->dim_v; c++)
        store(&result->o, at + c,
              spoilt ? NAN : w->tile.o[r * p->dim_v + c] * norm * w->tile.unit[c] + 0.0f);
    sparge_ref_record(result->intermediates->m, line, &state->max, 1, 4);
    sparge_ref_record(result->intermediates->l, line, &state->sum, 1, 4);
}

static sparge_status attend_head(sparge_ref_attender *w, int64_t b, int64_t h,
                                 const sparge_mask *mask, const uint32_t *all)
{
    const sparge_geometry *g = &w->g;
    const int64_t n = b * w->p->heads + h, lines = w->p->batch * w->p->heads * g->q_blocks;
    w->pv_rows[0] = w->pv_rows[1] = 0;
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t line = n * g->q_blocks + i, first = i * g->block_q;
        const int64_t rows = sparge_block_rows(g->q_len, g->block_q, i);
        w->counts->pairs += sparge_blocks_visible(g, i);
        for (int64_t r = 0; r < rows; r++) {
            w->spoilt[r] = any(&w->q.bad[(first + r) * w->q.dim], w->q.dim);
            w->counts->tokens += sparge_max(0, sparge_last_key(g, first + r) + 1);
        }
        for (int64_t j = 0; j < g->k_blocks; j++)
            w->share[j] = 0.0f;
        sparge_ref_attend_block(w, i, mask ? mask->bits + line * mask->words : all,
                                sparge_thresholds_of(w->o, h)->lambda);
        for (int64_t r = 0; r < rows; r++)
            finish_row(w, b, h, r);
        sparge_ref_record(w->result->intermediates->pv_done, line, w->share, g->k_blocks, 4);
        if (!goes_on(w->o, line + 1, lines))
            return SPARGE_ERR_CANCELLED;
    }
    const int64_t short_rows = sparge_max(1, g->q_len % g->block_q);
    w->counts->pv_done =
        (double)w->pv_rows[0] / (double)g->block_q + (double)w->pv_rows[1] / (double)short_rows;
    return SPARGE_OK;
}

/* ---- Stage 2: around each head ---- */

static sparge_ref_operand operand(arena *a, int64_t tokens, int64_t dim, int64_t block, int qmax,
                                  float slack, bool by_channel)
{
    const int64_t steps = sparge_ceil_div(tokens, block) * (by_channel ? dim : 1);
    return (sparge_ref_operand){
        .dim = dim,
        .block = block,
        .qmax = qmax,
        .slack = slack,
        .by_channel = by_channel,
        .code = qmax ? take(a, tokens * dim, sizeof(int16_t)) : NULL,
        .value = qmax ? NULL : take(a, tokens * dim, sizeof(float)),
        .step = take(a, steps, sizeof(float)),
        .bad = take(a, tokens * dim, sizeof(bool)),
    };
}

static void record_codes(const sparge_ref_operand *x, int64_t head, int64_t tokens, int16_t *codes,
                         float *steps)
{
    if (x->qmax) {
        const int64_t blocks = sparge_ceil_div(tokens, x->block);
        sparge_ref_record(codes, head, x->code, tokens * x->dim, sizeof(int16_t));
        sparge_ref_record(steps, head, x->step, x->by_channel ? blocks * x->dim : blocks, 4);
    }
}

static void quantize_keys(const sparge_ref_attender *w, int64_t b, int64_t kv)
{
    const sparge_problem *p = w->p;
    const sparge_intermediates *intermediates = w->result->intermediates;
    const int64_t at = b * p->kv_heads + kv;
    if (w->mean)
        sparge_ref_mean(&p->k, b, kv, &w->g, p->dim, w->x, w->k.bad, w->mean);
    sparge_ref_codes(w, &p->k, b, kv, p->k_len, w->mean, &w->k);
    sparge_ref_codes(w, &p->v, b, kv, p->k_len, NULL, &w->v);
    if (w->mode.narrow)
        w->mode.narrow(&w->v, p->k_len, w->tile.unit);
    if (w->mean)
        sparge_ref_record(intermediates->k_mean, at, w->mean, p->dim, 4);
    record_codes(&w->k, at, p->k_len, intermediates->k_int, intermediates->k_scale);
    record_codes(&w->v, at, p->k_len, intermediates->v_int, intermediates->v_scale);
}

sparge_status sparge_ref_attend(const sparge_problem *p, const sparge_options *o,
                                const sparge_mask *mask, sparge_result *result)
{
    const double start = sparge_seconds();
    const sparge_ref_mode mode = sparge_ref_mode_of(p, o);
    const sparge_geometry g =
        sparge_geometry_make(p->q_len, p->k_len, o->block_q, o->block_k, o->causal);
    const int64_t longest = sparge_max(g.block_q, g.block_k), widest = sparge_max(p->dim, p->dim_v);
    const int64_t group = p->heads / p->kv_heads, words = sparge_mask_row_words(g.k_blocks);
    arena a = {0};
    sparge_ref_attender w = {
        .p = p,
        .o = o,
        .g = g,
        .mode = mode,
        .result = result,
        .q = operand(&a, p->q_len, p->dim, g.block_q, mode.qk_qmax, mode.slack, false),
        .k = operand(&a, p->k_len, p->dim, g.block_k, mode.qk_qmax, mode.slack, false),
        .v = operand(&a, p->k_len, p->dim_v, g.block_k, mode.v_qmax, 0.0f, true),
        .x = take(&a, longest * widest, sizeof(float)),
        .mean = o->smooth_k ? take(&a, p->dim, sizeof(float)) : NULL,
        .tile =
            {
                .s = take(&a, g.block_q * g.block_k, sizeof(float)),
                .seen = take(&a, g.block_q, sizeof(int64_t)),
                .most = take(&a, g.block_q, sizeof(float)),
                .local = take(&a, g.block_q, sizeof(float)),
                .done = take(&a, g.block_q, sizeof(bool)),
                .state = take(&a, g.block_q, sizeof(sparge_row)),
                .o = take(&a, g.block_q * p->dim_v, sizeof(float)),
                .unit = take(&a, p->dim_v, sizeof(float)),
                .product = take(&a, p->dim_v, sizeof(int32_t)),
            },
        .spoilt = take(&a, g.block_q, sizeof(bool)),
        .share = take(&a, g.k_blocks, sizeof(float)),
    };
    uint32_t *all =
        take(&a, words, sizeof *all); /* a row that keeps every block: dense attention */
    if (all)
        memset(all, 0xff, (size_t)words * sizeof *all);
    for (int64_t c = 0; c < p->dim_v && !a.failed; c++)
        w.tile.unit[c] = 1.0f;
    double quantizing = 0.0;
    sparge_status status = a.failed ? SPARGE_ERR_MEMORY : SPARGE_OK;
    for (int64_t n = 0; n < p->batch * p->heads && !status; n++) {
        const int64_t b = n / p->heads, h = n % p->heads;
        const double before = sparge_seconds();
        if (h % group == 0)
            quantize_keys(&w, b, h / group);
        sparge_ref_codes(&w, &p->q, b, h, p->q_len, NULL, &w.q);
        record_codes(&w.q, n, p->q_len, result->intermediates->q_int,
                     result->intermediates->q_scale);
        quantizing += sparge_seconds() - before;
        w.counts = &result->head_counts[n];
        status = attend_head(&w, b, h, mask, all);
    }
    release(&a);
    result->seconds_quantize = quantizing;
    result->seconds_attend = sparge_seconds() - start - quantizing;
    return status;
}

sparge_status sparge_ref_attention(const sparge_problem *p, const sparge_options *o,
                                   sparge_mask *mask, sparge_result *result)
{
    const double start = sparge_seconds();
    const sparge_status status = sparge_ref_predict(p, o, mask, result->intermediates);
    result->seconds_predict = sparge_seconds() - start;
    return status ? status : sparge_ref_attend(p, o, mask, result);
}
