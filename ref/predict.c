/* SPDX-License-Identifier: Apache-2.0 */
/* predict.c: which (query block, key block) pairs are worth computing.
 * Sec 3.3, Algorithm 1 lines 4-6. */
#include <stdlib.h>

#include "common/block_mask.h"
#include "common/select.h"
#include "common/thresholds.h"
#include "ref/ref.h"

/* Line 4, for block n of q or k. */
static sparge_ref_summary summarize(const sparge_ref_tensor *t, int64_t n, float *pool,
                                    float *unit_sum)
{
    const int64_t first = n * t->block * t->dim, rows = sparge_block_rows(t->tokens, t->block, n);
    return sparge_ref_summarize(&t->x[first], &t->nonfinite[first], rows, t->block, t->dim, pool,
                                unit_sum);
}

void sparge_ref_summarize_keys(sparge_ref_work *w)
{
    const int64_t blocks = w->g.k_blocks, dim = w->k.dim;
    for (int64_t j = 0; j < blocks; j++) {
        w->k_summary[j] = summarize(&w->k, j, &w->k_pool[j * dim], w->unit_sum);
        sparge_ref_record(w->intermediates->k_sim, w->kv * blocks + j, &w->k_summary[j].sim, 1, 4);
    }
    sparge_ref_record(w->intermediates->k_pool, w->kv, w->k_pool, blocks * dim, 4);
}

bool sparge_ref_similar(const sparge_ref_summary *s, float theta)
{
    return sparge_is_similar(s->finite, s->sim, theta);
}

static int compare(const void *a, const void *b)
{
    const sparge_ref_scored *x = a, *y = b;
    return sparge_comes_before(x->s, x->block, y->s, y->block) ? -1 : 1;
}

/* Line 5: S[i,:] in their order; `at` is its place in the intermediates. */
static void score_row(sparge_ref_work *w, int64_t at)
{
    sparge_ref_row *row = &w->row;
    const int64_t dim = w->k.dim;
    for (int64_t j = 0; j < row->blocks; j++)
        row->s[j] = -INFINITY;
    for (int64_t j = 0; j < row->visible; j++)
        row->s[j] = sparge_pool_score(sparge_dot(w->q_pool, &w->k_pool[j * dim], dim),
                                      w->mode.predict_scale);
    sparge_ref_record(w->intermediates->s_all, at, row->s, row->blocks, 4);
    row->finite = 0;
    for (int64_t j = 0; j < row->visible; j++) {
        row->k_similar[j] = w->mode.similar(&w->k_summary[j], row->thresholds->theta);
        row->s[j] = row->k_similar[j] ? row->s[j] : -INFINITY;
        if (sparge_finite(row->s[j]))
            row->order[row->finite++] = (sparge_ref_scored){row->s[j], j};
    }
    sparge_ref_record(w->intermediates->s, at, row->s, row->blocks, 4);
    qsort(row->order, (size_t)row->finite, sizeof *row->order, compare);
}

static void keep(const sparge_ref_row *row, int64_t j, uint32_t why, uint32_t *kept)
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
        total += sparge_mass(row->order[n].s, row->order[0].s);
    const double limit = sparge_mass_limit(row->thresholds->tau, total);
    for (int64_t n = 0; n < row->finite; n++) {
        prefix += sparge_mass(row->order[n].s, row->order[0].s);
        if (n >= least && !((double)prefix <= limit))
            break;
        keep(row, row->order[n].block, SPARGE_KEPT_MASS, kept);
    }
}

void sparge_ref_keep_best(const sparge_ref_row *row, int64_t count, uint32_t *kept)
{
    if (row->thresholds->topk == SPARGE_OFF)
        return;
    for (int64_t n = 0; n < sparge_min(row->finite, count); n++)
        keep(row, row->order[n].block, SPARGE_KEPT_TOPK, kept);
}

void sparge_ref_keep_forced(const sparge_ref_row *row, uint32_t *kept)
{
    for (int64_t j = 0; j < row->visible; j++) {
        const uint32_t why =
            sparge_forced(row->q_similar, row->k_similar[j], sparge_finite(row->s[j]),
                          j >= row->diagonal, row->sink && j == 0);
        if (why)
            keep(row, j, why, kept);
    }
}

/* Line 6: M[i,:]. */
void sparge_ref_select(const sparge_ref_row *row, uint32_t *kept)
{
    sparge_ref_keep_mass(row, 1, kept);
    sparge_ref_keep_best(row, sparge_topk_count(row->thresholds->topk, row->visible), kept);
    sparge_ref_keep_forced(row, kept);
}

/* Lines 4-6 for one query block. */
void sparge_ref_predict_row(sparge_ref_work *w, int64_t i, uint32_t *kept)
{
    const int64_t at = w->n * w->g.q_blocks + i;
    const sparge_ref_summary summary = summarize(&w->q, i, w->q_pool, w->unit_sum);
    sparge_ref_record(w->intermediates->q_pool, at, w->q_pool, w->q.dim, 4);
    sparge_ref_record(w->intermediates->q_sim, at, &summary.sim, 1, 4);

    sparge_ref_row *row = &w->row;
    row->visible = sparge_blocks_visible(&w->g, i);
    row->diagonal = sparge_first_diagonal(&w->g, i);
    row->thresholds = sparge_thresholds_of(w->o, w->h);
    row->q_similar = w->mode.similar(&summary, row->thresholds->theta);
    if (w->intermediates->why)
        row->why = memset(&w->intermediates->why[at * row->blocks], 0, (size_t)row->blocks);
    score_row(w, at);
    w->mode.select(row, kept);
}
