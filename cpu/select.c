/* SPDX-License-Identifier: Apache-2.0 */
/* select.c: one row of the block mask (ref/predict.c; Algorithm 1 lines 5 and 6), in time that
 * grows as the row: the reference sorts, this finds the score at which the sorted prefix ends. */
#include "common/select.h"
#include "common/block_mask.h"
#include "cpu/work.h"

/* One row of the mask, and why: bits of sparge_reason for each block, or NULL. */
typedef struct mask_row {
    uint32_t *kept;
    uint8_t *why;
} mask_row;

static void keep(const mask_row *to, int64_t j, uint32_t why)
{
    sparge_mask_row_set(to->kept, j);
    if (to->why)
        to->why[j] |= (uint8_t)why;
}

/* The finite entries of a row of S. */
typedef struct finite_scores {
    int64_t n;
    const uint32_t *order_key;
    const uint32_t *mass; /* NULL: 1 */
    const uint32_t *j;    /* key blocks, ascending */
} finite_scores;

/* In the order of scores downward and blocks upward: the longest prefix of a mass within `limit`,
 * at least one. The key at which it ends is found by radix, eight bits at a time from the top. */
static void keep_prefix(const finite_scores *row, double limit, const mask_row *to, uint32_t why)
{
    uint64_t taken = 0;
    uint32_t end = 0, known = 0; /* the leading bits of that key, and where they stand */
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint64_t mass[256] = {0};
        for (int64_t n = 0; n < row->n; n++)
            if ((row->order_key[n] & known) == end)
                mass[row->order_key[n] >> shift & 255] += row->mass ? row->mass[n] : 1;
        uint32_t digit = 255;
        while (digit > 0 && (double)(taken + mass[digit]) <= limit)
            taken += mass[digit--];
        end |= digit << shift;
        known |= 255u << shift;
    }
    int64_t best = 0;
    for (int64_t n = 0; n < row->n; n++) {
        const uint64_t mass = row->mass ? row->mass[n] : 1;
        const bool ties = row->order_key[n] == end && (double)(taken + mass) <= limit;
        taken += ties ? mass : 0;
        if (row->order_key[n] > end || ties)
            keep(to, row->j[n], why);
        if (row->order_key[n] > row->order_key[best])
            best = n;
    }
    if (row->n)
        keep(to, row->j[best], why);
}

/* Line 5: S[i,:] in t->row, -inf where no row sees the key block or it is not similar; keeps the
 * blocks that are kept whatever their score. */
static void score(const sparge_work *w, sparge_scratch *t, const sparge_q_block *q, float theta,
                  const mask_row *to)
{
    const sparge_geometry *g = &w->g;
    const sparge_kv_batch *kv = &w->kv;
    const int64_t stride = kv->k.stride, line = q->head * g->q_blocks + q->i;
    const int64_t visible = sparge_blocks_visible(g, q->i);
    const int64_t diagonal = sparge_first_diagonal(g, q->i);
    const int64_t first = (sparge_kv_of(w->p, q->head) - kv->first) * g->k_blocks;
    w->kernels.score_pools(w->q.pool + q->index * stride, kv->pool + first * stride, visible,
                           stride, w->o->softmax_scale, t->row);
    for (int64_t j = visible; j < g->k_blocks; j++)
        t->row[j] = -INFINITY;
    sparge_record_rows(w->intermediates->s_all, line, 1, g->k_blocks, t->row, g->k_blocks,
                       sizeof *t->row);
    const bool q_similar = sparge_is_similar(q->finite, q->sim, theta);
    for (int64_t j = 0; j < visible; j++) {
        const bool k_similar = sparge_is_similar(!(kv->nonfinite[first + j] & SPARGE_NONFINITE_K),
                                                 kv->sim[first + j], theta);
        const uint32_t why = sparge_forced(q_similar, k_similar, sparge_finite(t->row[j]),
                                           j >= diagonal, w->o->sink && j == 0);
        if (why)
            keep(to, j, why);
        if (!k_similar)
            t->row[j] = -INFINITY;
    }
    sparge_record_rows(w->intermediates->s, line, 1, g->k_blocks, t->row, g->k_blocks,
                       sizeof *t->row);
}

void sparge_select_row(const sparge_work *w, sparge_scratch *t, int64_t n)
{
    const sparge_geometry *g = &w->g;
    const sparge_q_block *q = &w->q.block[n];
    const sparge_thresholds *thresholds = sparge_thresholds_at(w, q->head);
    const int64_t line = q->head * g->q_blocks + q->i, visible = sparge_blocks_visible(g, q->i);
    const mask_row to = {
        .kept = w->predicted->bits + line * w->predicted->words,
        .why = w->intermediates->why ? w->intermediates->why + line * g->k_blocks : NULL,
    };
    memset(to.kept, 0, (size_t)w->predicted->words * sizeof *to.kept);
    if (to.why)
        memset(to.why, 0, (size_t)g->k_blocks);
    score(w, t, q, thresholds->theta, &to);

    /* Line 6: M[i,:]. */
    finite_scores row = {.order_key = t->order_key, .j = t->j};
    float top = -INFINITY;
    for (int64_t j = 0; j < visible; j++)
        if (sparge_finite(t->row[j])) {
            top = fmaxf(top, t->row[j]);
            t->order_key[row.n] = sparge_order_key(t->row[j]);
            t->j[row.n++] = (uint32_t)j;
        }
    if (thresholds->tau != SPARGE_OFF) {
        uint64_t total = 0;
        for (int64_t e = 0; e < row.n; e++)
            t->row[e] = t->row[t->j[e]];
        w->kernels.mass(t->row, row.n, top, t->mass);
        for (int64_t e = 0; e < row.n; e++)
            total += t->mass[e];
        row.mass = t->mass;
        keep_prefix(&row, sparge_mass_limit(thresholds->tau, total), &to, SPARGE_KEPT_MASS);
    }
    if (thresholds->topk != SPARGE_OFF) {
        row.mass = NULL;
        keep_prefix(&row, (double)sparge_topk_count(thresholds->topk, visible), &to,
                    SPARGE_KEPT_TOPK);
    }
}
