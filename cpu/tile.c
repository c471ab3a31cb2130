/* SPDX-License-Identifier: Apache-2.0 */
/* tile.c: one query block through its kept key blocks (ref/attend.c; Algorithm 1 lines 7-21), a
 * group of rows at a time: the rows that decide lambda together. */
#include "common/block_mask.h"
#include "common/element.h"
#include "common/quant.h"
#include "cpu/work.h"

/* A group of rows of query block i over key block j. */
typedef struct skip_group {
    int64_t first, rows, i_row; /* first token, how many, first row in the block */
    int64_t j, n;               /* key block of the head, of the kv batch */
    int64_t keys;               /* real ones */
} skip_group;

static int64_t visible_of(const sparge_work *w, const skip_group *x, int64_t r)
{
    return sparge_min(x->keys, sparge_keys_visible(&w->g, x->first + r, x->j));
}

/* What a row must not see scores -inf: keys of the future and the padding of a short block. Returns
 * how many (query, key) pairs are visible. */
static int64_t hide(const sparge_work *w, const skip_group *x, float *s, int64_t columns,
                    int64_t stride)
{
    int64_t pairs = 0;
    for (int64_t r = 0; r < x->rows; r++) {
        const int64_t visible = visible_of(w, x, r);
        for (int64_t t = visible; t < columns; t++)
            s[r * stride + t] = -INFINITY;
        pairs += visible;
    }
    return pairs;
}

/* Rows without a number above -inf: one that sees nothing has no m_local, one that sees scores of
 * -inf alone is not empty any more. */
static void mend_maxima(const sparge_work *w, sparge_scratch *t, const skip_group *x)
{
    for (int64_t r = 0; r < x->rows; r++) {
        sparge_row row = {t->max[x->i_row + r], t->sum[x->i_row + r]};
        if (t->local[r] > -INFINITY)
            continue;
        if (visible_of(w, x, r) == 0)
            t->local[r] = -INFINITY;
        else if (t->local[r] == -INFINITY)
            sparge_row_update_max(&row, -INFINITY);
        t->sum[x->i_row + r] = row.sum;
    }
}

/* Lines 14-16: does no row of the group come near its maximum? */
static bool skips(const sparge_work *w, const sparge_scratch *t, const skip_group *x, float lambda)
{
    float gap = -INFINITY;
    for (int64_t r = 0; r < x->rows && lambda > -INFINITY; r++) {
        const sparge_row row = {t->max[x->i_row + r], t->sum[x->i_row + r]};
        const bool sees = t->local[r] > -INFINITY || visible_of(w, x, r) > 0;
        gap = fmaxf(gap, sparge_row_gap(&row, t->local[r], sees));
    }
    return sparge_group_skips(gap, lambda);
}

/* Line 10 to 16 for a group that sees `pairs` (query, key) pairs of the block, and not none.
 * Returns whether P.V was computed. */
static bool attend_group(const sparge_work *w, sparge_scratch *t, const sparge_q_block *block,
                         const skip_group *x, float lambda, int64_t *pairs)
{
    const sparge_kernels *run = &w->kernels;
    const sparge_operand *q = &w->q.operand, *k = &w->kv.k, *v = &w->kv.v;
    const int64_t columns = sparge_padded(x->keys), stride = w->keys + SPARGE_PANEL;
    const int64_t q_row = block->index * q->inits + x->i_row, row_size = q->block / q->inits;
    const sparge_product scores = {
        .rows = x->rows,
        .panels = columns / SPARGE_PANEL,
        .depth = q->stride,
        .a = q->data + q_row * row_size,
        .a_stride = q->stride,
        .a_init = q->init + q_row,
        .b = k->data + x->n * k->block,
        .b_init = k->init + x->n * k->inits,
    };
    run->score[q->format](&scores, t->s, stride);
    *pairs = x->rows * x->keys;
    if (sparge_keys_visible(&w->g, x->first, x->j) < columns)
        *pairs = hide(w, x, t->s, columns, stride);

    const float scale =
        sparge_score_scale(q->scale[block->index], k->scale[x->n], w->o->softmax_scale);
    sparge_scores s = {t->s, x->rows, columns, stride, scale, q->format == SPARGE_FLOATS};
    if (!run->maxima(&s, t->most, t->local))
        mend_maxima(w, t, x);
    if (skips(w, t, x, lambda))
        return false;

    const sparge_softmax_rows rows = {t->max + x->i_row, t->sum + x->i_row, t->local, t->shrink,
                                      t->weight};
    run->update_max(&rows, x->rows, v->qmax);
    /* A scale of 0 keeps -inf what it is if it is the least float instead. */
    s.scale = scale == 0.0f ? 0x1p-149f : scale;
    run->softmax[v->format](&s, v->qmax ? t->most : rows.max, t->p, stride, t->row_sum, t->p_init);
    for (int64_t r = 0; r < x->rows; r++)
        rows.sum[r] += t->weight[r] * t->row_sum[r];
    const sparge_product products = {
        .rows = x->rows,
        .panels = v->stride / SPARGE_PANEL,
        .depth = columns,
        .a = t->p,
        .a_stride = stride,
        .a_init = t->p_init,
        .b = v->data + x->n * v->block,
        .b_init = v->init + x->n * v->inits,
    };
    const sparge_accumulator o = {t->shrink, t->weight, v->scale + x->n * v->scales,
                                  t->o + x->i_row * v->stride, v->stride};
    run->accumulate_pv[v->format](&products, &o);
    return true;
}

/* A non-finite key spoils the rows that see it; a non-finite v element its channel of those rows,
 * if they computed P.V. Rare, and so it looks the elements up again. */
static void spread_nonfinite(const sparge_work *w, sparge_scratch *t, const skip_group *x,
                             int64_t kv, bool done)
{
    const sparge_problem *p = w->p;
    const int64_t first = x->j * w->g.block_k, k_stride = w->kv.k.stride;
    const float *mean = w->o->smooth_k ? w->kv.mean + (kv - w->kv.first) * k_stride : w->no_mean;
    for (int64_t key = 0; key < x->keys; key++) {
        const sparge_rows k = sparge_rows_of(&p->k, p->kv_heads, kv, first + key, 1, p->dim);
        sparge_rows v = sparge_rows_of(&p->v, p->kv_heads, kv, first + key, 1, 1);
        const bool k_finite = w->kernels.load(&k, mean, k_stride, t->x);
        for (int64_t r = 0; r < x->rows; r++)
            t->nonfinite[x->i_row + r] |= !k_finite && key < visible_of(w, x, r);
        for (int64_t c = 0; c < p->dim_v && done; c++) {
            if (!w->kernels.load(&v, w->no_mean, 1, t->x))
                for (int64_t r = 0; r < x->rows; r++)
                    if (key < visible_of(w, x, r))
                        t->o[(x->i_row + r) * w->kv.v.stride + c] = NAN;
            v.data = (const char *)v.data + sparge_element_size(v.dtype);
        }
    }
}

/* Lines 20-21 for one row: o / l, and lse in natural units with the mean key put back. q is read
 * before o is written, which may stand in the same place. */
static void finish_row(const sparge_work *w, sparge_scratch *t, const sparge_q_block *block,
                       int64_t r)
{
    const sparge_problem *p = w->p;
    const sparge_out *out = &w->result->o;
    const int64_t token = block->i * w->g.block_q + r, line = block->head * p->q_len + token;
    const int64_t stride = w->kv.k.stride;
    const bool smoothed = w->result->lse && w->o->smooth_k;
    sparge_row row = {t->max[r], t->sum[r]};
    sparge_record_rows(w->intermediates->m, line, 1, 1, &row.max, 1, sizeof row.max);
    sparge_record_rows(w->intermediates->l, line, 1, 1, &row.sum, 1, sizeof row.sum);
    if (!block->finite || smoothed) {
        const sparge_rows q = sparge_rows_of(&p->q, p->heads, block->head, token, 1, p->dim);
        t->nonfinite[r] |= !w->kernels.load(&q, w->no_mean, stride, t->x);
    }
    if (t->nonfinite[r])
        row = sparge_row_nonfinite(row);
    if (smoothed) {
        const float *mean = w->kv.mean + (sparge_kv_of(p, block->head) - w->kv.first) * stride;
        w->result->lse[line] =
            sparge_row_lse_smoothed(&row, w->o->softmax_scale * w->kernels.dot(t->x, mean, stride));
    } else if (w->result->lse)
        w->result->lse[line] = sparge_row_lse(&row);
    const int64_t at = sparge_out_row(out, block->head / p->heads, block->head % p->heads, token);
    w->kernels.store(t->o + r * w->kv.v.stride, p->dim_v, sparge_row_norm(&row), out->dtype,
                     (char *)out->data + at * sparge_element_size(out->dtype));
}

void sparge_attend_q_block(const sparge_work *w, sparge_scratch *t, int64_t n)
{
    const sparge_geometry *g = &w->g;
    sparge_q_block *block = &w->q.block[n];
    const float lambda = sparge_thresholds_at(w, block->head)->lambda;
    const int64_t kv = sparge_kv_of(w->p, block->head), first = block->i * g->block_q;
    const int64_t line = block->head * g->q_blocks + block->i;
    const int64_t rows = sparge_block_rows(g->q_len, g->block_q, block->i);
    const int64_t visible = sparge_blocks_visible(g, block->i);
    const int64_t group_rows =
        lambda > -INFINITY ? w->o->skip_rows : sparge_min(SPARGE_TILE_ROWS, g->block_q);
    const uint32_t *kept = w->mask ? w->mask->bits + line * w->mask->words : NULL;

    block->tally.pairs = visible;
    for (int64_t r = 0; r < rows; r++) {
        const sparge_row row = sparge_row_empty();
        t->max[r] = row.max;
        t->sum[r] = row.sum;
        t->nonfinite[r] = false;
        block->tally.tokens += sparge_keys_of_query(g, first + r);
    }
    memset(t->o, 0, (size_t)(rows * w->kv.v.stride) * sizeof *t->o);
    memset(t->pv_done, 0, (size_t)g->k_blocks * sizeof *t->pv_done);

    for (int64_t j = sparge_mask_row_next(kept, 0, visible); j < visible;
         j = sparge_mask_row_next(kept, j + 1, visible)) {
        const int64_t at = (kv - w->kv.first) * g->k_blocks + j;
        int64_t rows_done = 0;
        for (int64_t r = 0; r < rows; r += group_rows) {
            const skip_group x = {first + r, sparge_min(group_rows, rows - r),          r, j,
                                  at,        sparge_block_rows(g->k_len, g->block_k, j)};
            int64_t pairs = 0;
            bool done = true; /* as a group that sees none of the keys counts */
            if (visible_of(w, &x, x.rows - 1))
                done = attend_group(w, t, block, &x, lambda, &pairs);
            if (w->kv.nonfinite[at])
                spread_nonfinite(w, t, &x, kv, done);
            rows_done += done ? x.rows : 0;
            sparge_tally_rows(&block->tally, g, block->i, x.rows, pairs, done);
        }
        block->tally.qk_done++;
        t->pv_done[j] = (float)rows_done / (float)rows;
    }
    for (int64_t r = 0; r < rows; r++)
        finish_row(w, t, block, r);
    sparge_record_rows(w->intermediates->pv_done, line, 1, g->k_blocks, t->pv_done, g->k_blocks,
                       sizeof *t->pv_done);
}
