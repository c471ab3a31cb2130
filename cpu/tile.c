/* tile.c: one query block through its kept key blocks (ref/attend.c; Algorithm 1 lines 7-21), a
 * group of rows at a time: the rows that decide lambda together. */
#include <string.h>

#include "common/block_mask.h"
#include "common/thresholds.h"
#include "cpu/work.h"

/* A group of rows of query block i over key block j. */
typedef struct group {
    int64_t first, rows, i_row; /* first token, how many, first row in the block */
    int64_t j, at;              /* key block of the head, of the wave */
    int64_t keys;               /* real ones */
} group;

/* What a row must not see scores -inf: keys of the future and the padding of a short block. */
static int64_t hide(const sparge_work *w, const group *x, float *s, int64_t columns, int64_t stride)
{
    int64_t visible = 0;
    for (int64_t r = 0; r < x->rows; r++) {
        const int64_t seen = sparge_min(x->keys, sparge_keys_visible(&w->g, x->first + r, x->j));
        for (int64_t t = seen; t < columns; t++)
            s[r * stride + t] = -INFINITY;
        visible += seen;
    }
    return visible;
}

static bool sees(const sparge_work *w, const group *x, int64_t r)
{
    return sparge_keys_visible(&w->g, x->first + r, x->j) > 0;
}

/* Rows without a number above -inf: one that sees nothing has no m_local, one that sees scores of
 * -inf alone is not empty any more. */
static void mend_maxima(const sparge_work *w, sparge_scratch *t, const group *x)
{
    for (int64_t r = 0; r < x->rows; r++)
        if (!(t->local[r] > -INFINITY)) {
            if (!sees(w, x, r))
                t->local[r] = -INFINITY;
            else if (t->local[r] == -INFINITY && t->max[x->i_row + r] == -INFINITY)
                t->sum[x->i_row + r] = NAN;
        }
}

/* Lines 14-16: does no row of the group come near its maximum? */
static bool skips(const sparge_work *w, const sparge_scratch *t, const group *x, float lambda)
{
    float gap = -INFINITY;
    for (int64_t r = 0; r < x->rows && lambda > -INFINITY; r++) {
        const sparge_row state = {t->max[x->i_row + r], t->sum[x->i_row + r]};
        gap = fmaxf(gap,
                    sparge_row_gap(&state, t->local[r], t->local[r] > -INFINITY || sees(w, x, r)));
    }
    return sparge_group_skips(gap, lambda);
}

/* Line 10 to 16 for a group that sees some of the keys. Returns whether P.V was computed. */
static bool fold(const sparge_work *w, sparge_scratch *t, const sparge_task *task, const group *x,
                 float lambda, int64_t *visible)
{
    const sparge_kernels *run = &w->kernels;
    const sparge_operand *q = &w->q, *k = &w->k, *v = &w->v;
    const int64_t columns = sparge_padded(x->keys), stride = w->keys + SPARGE_PANEL;
    const int64_t q_row = task->slot * q->starts + x->i_row, size = q->block / q->starts;
    const sparge_product scores = {
        .rows = x->rows,
        .panels = columns / SPARGE_PANEL,
        .depth = q->stride,
        .a = q->data + q_row * size,
        .a_stride = q->stride,
        .a_start = q->start + q_row,
        .b = k->data + x->at * k->block,
        .b_start = k->start + x->at * k->starts,
    };
    run->score[q->format](&scores, t->s, stride);
    *visible = x->rows * x->keys;
    if (sparge_keys_visible(&w->g, x->first, x->j) < columns)
        *visible = hide(w, x, t->s, columns, stride);

    const float c = q->step[task->slot] * k->step[x->at] * w->o->softmax_scale * SPARGE_LOG2E;
    sparge_scores s = {t->s, x->rows, columns, stride, c, q->format == SPARGE_FLOATS};
    if (!run->maxima(&s, t->most, t->local))
        mend_maxima(w, t, x);
    if (skips(w, t, x, lambda))
        return false;

    const sparge_group rows = {t->max + x->i_row, t->sum + x->i_row, t->local, t->shrink,
                               t->weight};
    run->raise(&rows, x->rows, v->qmax);
    /* A step of 0, or two small ones, make c 0; a c that is not 0 keeps -inf what it is. */
    s.c = c == 0.0f ? 0x1p-149f : c;
    run->weigh[v->format](&s, v->qmax ? t->most : rows.max, t->p, stride, t->row_sum, t->p_start);
    for (int64_t r = 0; r < x->rows; r++)
        rows.sum[r] += t->weight[r] * t->row_sum[r];
    const sparge_product products = {
        .rows = x->rows,
        .panels = v->stride / SPARGE_PANEL,
        .depth = columns,
        .a = t->p,
        .a_stride = stride,
        .a_start = t->p_start,
        .b = v->data + x->at * v->block,
        .b_start = v->start + x->at * v->starts,
    };
    const sparge_fold into = {t->shrink, t->weight, v->step + x->at * v->steps,
                              t->o + x->i_row * v->stride, v->stride};
    run->fold[v->format](&products, &into);
    return true;
}

/* A non-finite key spoils the rows that see it; a non-finite v element its channel of those rows,
 * where they computed P.V. Rare, and so it looks the elements up again. */
static void spoil(const sparge_work *w, sparge_scratch *t, const group *x, int64_t kv, bool done)
{
    const sparge_problem *p = w->p;
    for (int64_t key = 0; key < x->keys; key++) {
        const sparge_rows k =
            sparge_rows_of(&p->k, p->kv_heads, kv, x->j * w->g.block_k + key, 1, p->dim);
        const sparge_rows v =
            sparge_rows_of(&p->v, p->kv_heads, kv, x->j * w->g.block_k + key, 1, p->dim_v);
        const float *mean =
            w->o->smooth_k ? w->mean + (kv - w->first_kv) * w->k.stride : w->no_mean;
        const bool bad = !w->kernels.load(&k, mean, w->k.stride, t->x);
        for (int64_t r = 0; r < x->rows; r++)
            t->spoilt[x->i_row + r] |= bad && key < sparge_keys_visible(&w->g, x->first + r, x->j);
        for (int64_t c = 0; c < p->dim_v && done; c++) {
            sparge_rows element = v;
            element.data = (const char *)v.data + c * (v.dtype == SPARGE_F32 ? 4 : 2);
            element.dim = 1;
            if (w->kernels.load(&element, w->no_mean, 1, t->x))
                continue;
            for (int64_t r = 0; r < x->rows; r++)
                if (key < sparge_keys_visible(&w->g, x->first + r, x->j))
                    t->o[(x->i_row + r) * w->v.stride + c] = NAN;
        }
    }
}

/* Lines 20-21 for one row: o / l, and lse in natural units with the mean key put back. q is read
 * before o is written, which may stand in the same place. */
static void finish_row(const sparge_work *w, sparge_scratch *t, const sparge_task *task, int64_t r)
{
    const sparge_problem *p = w->p;
    const sparge_out *out = &w->result->o;
    const sparge_row state = {t->max[r], t->sum[r]};
    const int64_t token = task->i * w->g.block_q + r, line = task->head * p->q_len + token;
    const bool empty = sparge_row_is_empty(&state);
    if (!task->finite || (w->result->lse && w->o->smooth_k)) {
        const sparge_rows q = sparge_rows_of(&p->q, p->heads, task->head, token, 1, p->dim);
        t->spoilt[r] |= !w->kernels.load(&q, w->no_mean, w->q.stride, t->x);
    }
    const bool spoilt = t->spoilt[r] && !empty;
    if (w->result->lse) {
        float lse = spoilt ? NAN : sparge_row_lse(&state);
        if (w->o->smooth_k && !empty) {
            const float *mean = w->mean + (sparge_kv_of(p, task->head) - w->first_kv) * w->k.stride;
            lse += w->o->softmax_scale * w->kernels.dot(t->x, mean, w->k.stride);
        }
        w->result->lse[line] = lse;
    }
    const int64_t at =
        task->head / p->heads * out->batch + task->head % p->heads * out->head + token * out->token;
    w->kernels.store(t->o + r * w->v.stride, p->dim_v, spoilt ? NAN : sparge_row_norm(&state),
                     out->dtype, (char *)out->data + at * (out->dtype == SPARGE_F32 ? 4 : 2));
    sparge_trace_rows(w->intermediates->m, line, 1, 1, &state.max, 1, sizeof state.max);
    sparge_trace_rows(w->intermediates->l, line, 1, 1, &state.sum, 1, sizeof state.sum);
}

void sparge_attend_task(const sparge_work *w, sparge_scratch *t, sparge_task *task)
{
    const sparge_geometry *g = &w->g;
    const float lambda = sparge_thresholds_of(w->o, task->head % w->p->heads)->lambda;
    const int64_t kv = sparge_kv_of(w->p, task->head), line = task->head * g->q_blocks + task->i;
    const int64_t first = task->i * g->block_q,
                  rows = sparge_block_rows(g->q_len, g->block_q, task->i);
    const int64_t visible = sparge_blocks_visible(g, task->i);
    const int64_t together =
        lambda > -INFINITY ? w->o->skip_rows : sparge_min(SPARGE_GROUP_ROWS, g->block_q);
    const uint32_t *kept = w->mask ? w->mask->bits + line * w->mask->words : NULL;
    sparge_counts *counts = &task->counts;

    counts->pairs = visible;
    for (int64_t r = 0; r < rows; r++) {
        t->max[r] = -INFINITY;
        t->sum[r] = 0.0f;
        t->spoilt[r] = false;
        counts->tokens += sparge_max(0, sparge_last_key(g, first + r) + 1);
    }
    memset(t->o, 0, (size_t)(rows * w->v.stride) * sizeof *t->o);
    memset(t->share, 0, (size_t)g->k_blocks * sizeof *t->share);

    for (int64_t j = kept ? sparge_mask_row_next(kept, 0, visible) : 0; j < visible;
         j = kept ? sparge_mask_row_next(kept, j + 1, visible) : j + 1) {
        int64_t rows_done = 0;
        const int64_t at = (kv - w->first_kv) * g->k_blocks + j;
        for (int64_t r = 0; r < rows; r += together) {
            const group x = {first + r, sparge_min(together, rows - r),
                             r,         j,
                             at,        sparge_block_rows(g->k_len, g->block_k, j)};
            int64_t seen = 0;
            bool done = true; /* as a group that sees none of the keys counts */
            if (sparge_keys_visible(g, x.first + x.rows - 1, j))
                done = fold(w, t, task, &x, lambda, &seen);
            if (w->bad[at])
                spoil(w, t, &x, kv, done);
            rows_done += done ? x.rows : 0;
            counts->qk_tokens += seen;
            counts->pv_tokens += done ? seen : 0;
        }
        counts->qk_done++;
        task->pv_rows += rows_done;
        t->share[j] = (float)rows_done / (float)rows;
    }
    for (int64_t r = 0; r < rows; r++)
        finish_row(w, t, task, r);
    sparge_trace_rows(w->intermediates->pv_done, line, 1, g->k_blocks, t->share, g->k_blocks,
                      sizeof *t->share);
}
