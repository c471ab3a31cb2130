/* predict.c: stage 1, which (query block, key block) pairs are worth computing.
 * Sec 3.3, Algorithm 1 lines 4-6. */
#include "ref/stage.h"

#include <stdlib.h>

#include "common/block_mask.h"

/* Downward by score; equal ones by block, so that the mask is unique. */
static int best_first(const void *a, const void *b)
{
    const sparge_ref_scored *x = a, *y = b;
    if (x->s != y->s)
        return x->s < y->s ? 1 : -1;
    return x->block < y->block ? -1 : 1;
}

bool sparge_ref_similar(const sparge_ref_summary *s, float theta)
{
    return s->finite && s->sim > theta;
}

uint64_t sparge_ref_mass(const sparge_ref_row *row, int64_t place)
{
    const float below = row->order[place].s - row->order[0].s;
    return (uint64_t)(sparge_exp2(below * SPARGE_LOG2E) * 0x1p30f);
}

static void keep(const sparge_ref_row *row, int64_t j, sparge_reason why, uint32_t *kept)
{
    sparge_mask_row_set(kept, j);
    if (row->why)
        row->why[j] |= (uint8_t)why;
}

/* TopCdf: the most probable blocks while their mass stays within tau, and at least so many. */
void sparge_ref_keep_mass(const sparge_ref_row *row, int64_t least, uint32_t *kept)
{
    if (row->thresholds->tau == SPARGE_OFF)
        return;
    uint64_t total = 0, prefix = 0;
    for (int64_t n = 0; n < row->finite; n++)
        total += sparge_ref_mass(row, n);
    const double limit = (double)row->thresholds->tau * (double)total;
    for (int64_t n = 0; n < row->finite; n++) {
        prefix += sparge_ref_mass(row, n);
        if (n >= least && !((double)prefix <= limit))
            break;
        keep(row, row->order[n].block, SPARGE_KEPT_MASS, kept);
    }
}

/* The share `topk` of the visible blocks; the addend makes 0.7f of 10 seven. */
int64_t sparge_ref_topk(const sparge_ref_row *row)
{
    return (int64_t)floor((double)row->thresholds->topk * (double)row->visible + 1e-5);
}

void sparge_ref_keep_best(const sparge_ref_row *row, int64_t count, uint32_t *kept)
{
    if (row->thresholds->topk == SPARGE_OFF)
        return;
    for (int64_t n = 0; n < row->finite && n < sparge_max(1, count); n++)
        keep(row, row->order[n].block, SPARGE_KEPT_TOPK, kept);
}

/* A block whose rows disagree has no meaningful mean: it is computed for everyone. (So is a pair
 * whose score overflows.) */
void sparge_ref_keep_dissimilar(const sparge_ref_row *row, uint32_t *kept)
{
    for (int64_t j = 0; j < row->visible; j++) {
        if (!row->q_similar)
            keep(row, j, SPARGE_KEPT_DISSIMILAR_Q, kept);
        if (!row->k_similar[j])
            keep(row, j, SPARGE_KEPT_DISSIMILAR_K, kept);
        else if (!sparge_finite(row->s[j]))
            keep(row, j, SPARGE_KEPT_OVERFLOW, kept);
    }
}

/* Without its last visible key in reach a causal row might see none at all. */
void sparge_ref_keep_diagonal(const sparge_ref_row *row, uint32_t *kept)
{
    for (int64_t j = row->diagonal; j < row->diagonal_end; j++)
        keep(row, j, SPARGE_KEPT_DIAGONAL, kept);
}

void sparge_ref_keep_sink(const sparge_ref_row *row, uint32_t *kept)
{
    if (row->sink && row->visible)
        keep(row, 0, SPARGE_KEPT_SINK, kept);
}

/* Line 6: M[i,:]. */
void sparge_ref_select(const sparge_ref_row *row, uint32_t *kept)
{
    sparge_ref_keep_mass(row, 1, kept);
    sparge_ref_keep_best(row, sparge_ref_topk(row), kept);
    sparge_ref_keep_dissimilar(row, kept);
    sparge_ref_keep_diagonal(row, kept);
    sparge_ref_keep_sink(row, kept);
}

/* Line 4, for K of one head. */
void sparge_ref_summarize_keys(const sparge_ref_predictor *w, int64_t b, int64_t kv)
{
    const sparge_problem *p = w->p;
    const sparge_geometry *g = &w->g;
    const int64_t at = b * p->kv_heads + kv;
    if (w->mean)
        sparge_ref_mean(&p->k, b, kv, g, p->dim, w->x, w->bad, w->mean);
    for (int64_t j = 0; j < g->k_blocks; j++) {
        const int64_t rows = sparge_block_rows(g->k_len, g->block_k, j);
        sparge_ref_load(&p->k, b, kv, j * g->block_k, rows, p->dim, w->mean, w->x, w->bad);
        w->summary_k[j] = sparge_ref_summarize(w->x, w->bad, rows, g->block_k, p->dim,
                                               &w->k_pool[j * p->dim], w->unit);
        sparge_ref_record(w->intermediates->k_sim, at * g->k_blocks + j, &w->summary_k[j].sim, 1,
                          4);
    }
    sparge_ref_record(w->intermediates->k_pool, at, w->k_pool, g->k_blocks * p->dim, 4);
    if (w->mean)
        sparge_ref_record(w->intermediates->k_mean, at, w->mean, p->dim, 4);
}

sparge_ref_row sparge_ref_row_of(const sparge_geometry *g, const sparge_options *o, int64_t i)
{
    sparge_ref_row row = {
        .visible = sparge_blocks_visible(g, i), .blocks = g->k_blocks, .sink = o->sink};
    if (o->causal != SPARGE_CAUSAL_NONE) {
        row.diagonal = sparge_max(0, sparge_last_key(g, i * g->block_q)) / g->block_k;
        row.diagonal_end = row.visible;
    }
    return row;
}

/* Line 5: S[i,:]; `at` is its place in the intermediates. */
static void score_row(const sparge_ref_predictor *w, int64_t visible, int64_t at)
{
    const int64_t dim = w->p->dim;
    for (int64_t j = 0; j < w->g.k_blocks; j++)
        w->s[j] = j < visible
                      ? w->mode.predict_scale * sparge_dot(w->pool, &w->k_pool[j * dim], dim) + 0.0f
                      : -INFINITY; /* a score of 0 has no sign */
    sparge_ref_record(w->intermediates->s_all, at, w->s, w->g.k_blocks, 4);
    for (int64_t j = 0; j < visible; j++)
        w->s[j] = w->similar_k[j] ? w->s[j] : -INFINITY;
    sparge_ref_record(w->intermediates->s, at, w->s, w->g.k_blocks, 4);
}

void sparge_ref_rank(sparge_ref_row *row)
{
    row->finite = 0;
    for (int64_t j = 0; j < row->visible; j++)
        if (sparge_finite(row->s[j]))
            row->order[row->finite++] = (sparge_ref_scored){row->s[j], j};
    qsort(row->order, (size_t)row->finite, sizeof *row->order, best_first);
}

/* Lines 4-6 for one query block. */
void sparge_ref_predict_row(const sparge_ref_predictor *w, int64_t b, int64_t h, int64_t i,
                            uint32_t *kept)
{
    const sparge_problem *p = w->p;
    const sparge_geometry *g = &w->g;
    const int64_t first = i * g->block_q, rows = sparge_block_rows(g->q_len, g->block_q, i);
    sparge_ref_load(&p->q, b, h, first, rows, p->dim, NULL, w->x, w->bad);
    const sparge_ref_summary q =
        sparge_ref_summarize(w->x, w->bad, rows, g->block_q, p->dim, w->pool, w->unit);

    const sparge_thresholds *thresholds = sparge_thresholds_of(w->o, h);
    sparge_ref_row row = sparge_ref_row_of(g, w->o, i);
    row.s = w->s;
    row.k_similar = w->similar_k;
    row.q_similar = w->mode.similar(&q, thresholds->theta);
    row.thresholds = thresholds;
    row.order = w->order;
    const int64_t at = (b * p->heads + h) * g->q_blocks + i;
    if (w->intermediates->why)
        row.why = memset(w->intermediates->why + at * g->k_blocks, 0, (size_t)g->k_blocks);
    score_row(w, row.visible, at);
    sparge_ref_rank(&row);
    w->mode.select(&row, kept);

    sparge_ref_record(w->intermediates->q_pool, at, w->pool, p->dim, 4);
    sparge_ref_record(w->intermediates->q_sim, at, &q.sim, 1, 4);
}
