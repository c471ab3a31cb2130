/* SPDX-License-Identifier: Apache-2.0 */
/* predict.c: which (query block, key block) pairs are worth computing.
 * Sec 3.3, Algorithm 1 lines 4-6; and, beyond the paper, the masses of cells. */
#include <stdlib.h>

#include "common/block_mask.h"
#include "common/select.h"
#include "common/softmax.h"
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

/* The mean rows of the cells in tokens [first, end); first is that of a cell. */
static void average_cells(const sparge_ref_tensor *t, int64_t first, int64_t end, int64_t cell,
                          float *mean)
{
    const int64_t dim = t->dim;
    for (int64_t at = first; at < end; at += cell, mean += dim) {
        const int64_t rows = sparge_min(cell, end - at);
        for (int64_t c = 0; c < dim; c++) {
            float sum = 0.0f;
            for (int64_t r = at; r < at + rows; r++)
                sum += t->x[r * dim + c];
            mean[c] = sparge_cell_mean(sum, rows);
        }
    }
}

void sparge_ref_summarize_keys(sparge_ref_work *w)
{
    const int64_t blocks = w->g.k_blocks, dim = w->k.dim;
    for (int64_t j = 0; j < blocks; j++) {
        w->k_summary[j] = summarize(&w->k, j, &w->k_pool[j * dim], w->unit_sum);
        sparge_ref_record(w->intermediates->k_sim, w->kv * blocks + j, &w->k_summary[j].sim, 1, 4);
    }
    if (w->o->cell)
        average_cells(&w->k, 0, w->k.tokens, w->o->cell, w->k_cell);
    else
        sparge_ref_record(w->intermediates->k_pool, w->kv, w->k_pool, blocks * dim, 4);
}

bool sparge_ref_similar(const sparge_ref_summary *s, float theta)
{
    return sparge_is_similar(s->finite, s->sim, theta);
}

static int compare(const void *a, const void *b)
{
    const sparge_ref_ranked *x = a, *y = b;
    return x->rank > y->rank || (x->rank == y->rank && x->block < y->block) ? -1 : 1;
}

static void rank(sparge_ref_row *row)
{
    qsort(row->order, (size_t)row->ranked, sizeof *row->order, compare);
}

/* Line 5: S[i,:] in their order, and their masses; `at` is its place in the intermediates. */
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
    row->ranked = 0;
    for (int64_t j = 0; j < row->visible; j++) {
        row->k_similar[j] = w->mode.similar(&w->k_summary[j], row->thresholds->theta);
        row->s[j] = row->k_similar[j] ? row->s[j] : -INFINITY;
        if (sparge_finite(row->s[j]))
            row->order[row->ranked++] =
                (sparge_ref_ranked){.rank = sparge_order_key(row->s[j]), .block = j};
    }
    sparge_ref_record(w->intermediates->s, at, row->s, row->blocks, 4);
    rank(row);
    row->total = 0;
    for (int64_t n = 0; n < row->ranked; n++) {
        sparge_ref_ranked *x = &row->order[n];
        x->mass = sparge_mass(row->s[x->block], row->s[row->order[0].block]);
        row->total += x->mass;
    }
}

/* What row c of cells pays to each block, added to order[block].mass. */
static void add_cells(sparge_ref_work *w, int64_t c, const float *q)
{
    const int64_t dim = w->k.dim, visible = sparge_blocks_visible(&w->cells, c);
    const int64_t per_block = w->g.block_k / w->o->cell;
    const int64_t queries = sparge_block_rows(w->g.q_len, w->o->cell, c);
    const float scale = sparge_cell_scale(w->mode.predict_scale);
    float *s = w->cell_s, most = -INFINITY;
    uint64_t total = 0;
    for (int64_t u = 0; u < visible; u++) {
        s[u] = 0.0f;
        for (int64_t e = 0; e < dim; e++)
            s[u] = fmaf(w->k_cell[u * dim + e], q[e], s[u]);
        most = fmaxf(most, s[u]);
    }
    for (int64_t u = 0; u < visible; u++)
        total += (uint64_t)sparge_weight_code(s[u], most, scale, SPARGE_CELL_QMAX);
    const float worth = sparge_cell_worth(queries, total);
    for (int64_t u = 0; u < visible; u += per_block) {
        int32_t codes = 0;
        for (int64_t e = u; e < sparge_min(visible, u + per_block); e++)
            codes += sparge_weight_code(s[e], most, scale, SPARGE_CELL_QMAX);
        w->row.order[u / per_block].mass += sparge_cell_mass(codes, worth);
    }
}

/* The same by cells. */
static void score_cells(sparge_ref_work *w, int64_t i, int64_t at)
{
    sparge_ref_row *row = &w->row;
    const int64_t cell = w->o->cell, first = i * w->g.block_q,
                  end = sparge_min(w->g.q_len, first + w->g.block_q);
    row->ranked = row->visible;
    for (int64_t j = 0; j < row->visible; j++)
        row->order[j] = (sparge_ref_ranked){.block = j};
    average_cells(&w->q, first, end, cell, w->q_cell);
    for (int64_t t = first; t < end; t += cell)
        add_cells(w, t / cell, &w->q_cell[(t - first) / cell * w->q.dim]);
    row->total = 0;
    for (int64_t j = 0; j < row->visible; j++) {
        row->k_similar[j] = w->mode.similar(&w->k_summary[j], row->thresholds->theta);
        row->order[j].rank = row->order[j].mass;
        row->total += row->order[j].mass;
    }
    for (int64_t j = 0; j < row->blocks; j++)
        row->s[j] =
            j < row->visible ? sparge_cell_share(row->order[j].mass, row->total) : -INFINITY;
    sparge_ref_record(w->intermediates->s_all, at, row->s, row->blocks, 4);
    sparge_ref_record(w->intermediates->s, at, row->s, row->blocks, 4);
    rank(row);
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
    uint64_t prefix = 0;
    const double limit = sparge_mass_limit(row->thresholds->tau, row->total);
    for (int64_t n = 0; n < row->ranked; n++) {
        prefix += row->order[n].mass;
        if (n >= least && !((double)prefix <= limit))
            break;
        keep(row, row->order[n].block, SPARGE_KEPT_MASS, kept);
    }
}

void sparge_ref_keep_best(const sparge_ref_row *row, int64_t count, uint32_t *kept)
{
    if (row->thresholds->topk == SPARGE_OFF)
        return;
    for (int64_t n = 0; n < sparge_min(row->ranked, count); n++)
        keep(row, row->order[n].block, SPARGE_KEPT_TOPK, kept);
}

/* Not of the paper: every block of more than so much mass. */
void sparge_ref_keep_above(const sparge_ref_row *row, uint32_t *kept)
{
    if (row->thresholds->min_mass == 0.0f)
        return;
    const double limit = sparge_min_mass_limit(row->thresholds->min_mass, row->total, row->blocks);
    for (int64_t n = 0; n < row->ranked; n++)
        if ((double)row->order[n].mass > limit)
            keep(row, row->order[n].block, SPARGE_KEPT_MIN_MASS, kept);
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
    sparge_ref_keep_above(row, kept);
    sparge_ref_keep_forced(row, kept);
}

/* Lines 4-6 for one query block. */
void sparge_ref_predict_row(sparge_ref_work *w, int64_t i, uint32_t *kept)
{
    const int64_t at = w->n * w->g.q_blocks + i;
    const sparge_ref_summary summary = summarize(&w->q, i, w->q_pool, w->unit_sum);
    if (!w->o->cell)
        sparge_ref_record(w->intermediates->q_pool, at, w->q_pool, w->q.dim, 4);
    sparge_ref_record(w->intermediates->q_sim, at, &summary.sim, 1, 4);

    sparge_ref_row *row = &w->row;
    row->visible = sparge_blocks_visible(&w->g, i);
    row->diagonal = sparge_first_diagonal(&w->g, i);
    row->thresholds = sparge_thresholds_of(w->o, w->h);
    row->q_similar = w->mode.similar(&summary, row->thresholds->theta);
    if (w->intermediates->why)
        row->why = memset(&w->intermediates->why[at * row->blocks], 0, (size_t)row->blocks);
    if (w->o->cell)
        score_cells(w, i, at);
    else
        score_row(w, at);
    w->mode.select(row, kept);
}
