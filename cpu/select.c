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

/* Row n, empty. */
static mask_row row_of(const sparge_work *w, int64_t n)
{
    const int64_t line = w->q.block[n].head * w->g.q_blocks + w->q.block[n].i;
    const mask_row to = {
        .kept = w->predicted->bits + line * w->predicted->words,
        .why = w->intermediates->why ? w->intermediates->why + line * w->g.k_blocks : NULL,
    };
    memset(to.kept, 0, (size_t)w->predicted->words * sizeof *to.kept);
    if (to.why)
        memset(to.why, 0, (size_t)w->g.k_blocks);
    return to;
}

static void keep(const mask_row *to, int64_t j, uint32_t why)
{
    sparge_mask_row_set(to->kept, j);
    if (to->why)
        to->why[j] |= (uint8_t)why;
}

/* Blocks that tau, topk and min_mass choose from. */
typedef struct candidates {
    int64_t n;
    const uint32_t *order_key;
    const uint32_t *mass; /* NULL: 1 */
    const uint32_t *j;    /* key blocks, ascending */
} candidates;

/* In the order of scores downward and blocks upward: the longest prefix of a mass within `limit`,
 * at least one. The key at which it ends is found by radix, eight bits at a time from the top. */
static void keep_prefix(const candidates *row, double limit, const mask_row *to, uint32_t why)
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

static void keep_above(const candidates *row, double limit, const mask_row *to)
{
    for (int64_t n = 0; n < row->n; n++)
        if ((double)row->mass[n] > limit)
            keep(to, row->j[n], SPARGE_KEPT_MIN_MASS);
}

/* Line 6: M[i,:]. */
static void choose(const sparge_work *w, candidates row, int64_t visible,
                   const sparge_thresholds *thresholds, const mask_row *to)
{
    uint64_t total = 0;
    for (int64_t e = 0; e < row.n && row.mass; e++)
        total += row.mass[e];
    if (thresholds->tau != SPARGE_OFF)
        keep_prefix(&row, sparge_mass_limit(thresholds->tau, total), to, SPARGE_KEPT_MASS);
    if (thresholds->min_mass > 0.0f)
        keep_above(&row, sparge_min_mass_limit(thresholds->min_mass, total, w->g.k_blocks), to);
    row.mass = NULL;
    if (thresholds->topk != SPARGE_OFF)
        keep_prefix(&row, (double)sparge_topk_count(thresholds->topk, visible), to,
                    SPARGE_KEPT_TOPK);
}

/* Keeps the blocks that are kept whatever their mass. s: scores, of which those of blocks that are
 * not similar become -inf; or NULL. */
static void keep_forced(const sparge_work *w, const sparge_q_block *q, float theta, float *s,
                        const mask_row *to)
{
    const sparge_geometry *g = &w->g;
    const sparge_kv_batch *kv = &w->kv;
    const int64_t diagonal = sparge_first_diagonal(g, q->i);
    const int64_t first = (sparge_kv_of(w->p, q->head) - kv->first) * g->k_blocks;
    const bool q_similar = sparge_is_similar(q->finite, q->sim, theta);
    for (int64_t j = 0; j < sparge_blocks_visible(g, q->i); j++) {
        const bool k_similar = sparge_is_similar(!(kv->nonfinite[first + j] & SPARGE_NONFINITE_K),
                                                 kv->sim[first + j], theta);
        const uint32_t why = sparge_forced(q_similar, k_similar, !s || sparge_finite(s[j]),
                                           j >= diagonal, w->o->sink && j == 0);
        if (why)
            keep(to, j, why);
        if (s && !k_similar)
            s[j] = -INFINITY;
    }
}

/* A row of S, or of masses. */
static void record(const sparge_work *w, const sparge_q_block *q, float *to, const float *row)
{
    sparge_record_rows(to, q->head * w->g.q_blocks + q->i, 1, w->g.k_blocks, row, w->g.k_blocks,
                       sizeof *row);
}

/* Line 5: S[i,:] in t->row, -inf where no row sees the key block or it is not similar. */
static void score(const sparge_work *w, sparge_scratch *t, const sparge_q_block *q, float theta,
                  const mask_row *to)
{
    const sparge_geometry *g = &w->g;
    const int64_t stride = w->kv.k.stride, visible = sparge_blocks_visible(g, q->i);
    const int64_t first = (sparge_kv_of(w->p, q->head) - w->kv.first) * g->k_blocks;
    w->kernels.score_pools(w->q.pool + q->index * stride, w->kv.pool + first * stride, visible,
                           stride, w->o->softmax_scale, t->row);
    for (int64_t j = visible; j < g->k_blocks; j++)
        t->row[j] = -INFINITY;
    record(w, q, w->intermediates->s_all, t->row);
    keep_forced(w, q, theta, t->row, to);
    record(w, q, w->intermediates->s, t->row);
}

void sparge_select_row(const sparge_work *w, sparge_scratch *t, int64_t n)
{
    const sparge_q_block *q = &w->q.block[n];
    const sparge_thresholds *thresholds = sparge_thresholds_at(w, q->head);
    const int64_t visible = sparge_blocks_visible(&w->g, q->i);
    const mask_row to = row_of(w, n);
    score(w, t, q, thresholds->theta, &to);
    candidates row = {.order_key = t->order_key, .j = t->j};
    float top = -INFINITY;
    for (int64_t j = 0; j < visible; j++)
        if (sparge_finite(t->row[j])) {
            top = fmaxf(top, t->row[j]);
            t->order_key[row.n] = sparge_order_key(t->row[j]);
            t->j[row.n++] = (uint32_t)j;
        }
    if (thresholds->tau != SPARGE_OFF || thresholds->min_mass > 0.0f) {
        for (int64_t e = 0; e < row.n; e++)
            t->row[e] = t->row[t->j[e]];
        w->kernels.mass(t->row, row.n, top, t->mass);
        row.mass = t->mass;
    }
    choose(w, row, visible, thresholds, &to);
}

void sparge_select_masses(const sparge_work *w, sparge_scratch *t, int64_t n, const uint32_t *mass)
{
    const sparge_q_block *q = &w->q.block[n];
    const sparge_thresholds *thresholds = sparge_thresholds_at(w, q->head);
    const int64_t visible = sparge_blocks_visible(&w->g, q->i);
    const mask_row to = row_of(w, n);
    uint64_t total = 0;
    for (int64_t j = 0; j < visible; j++) {
        total += mass[j];
        t->j[j] = (uint32_t)j;
    }
    for (int64_t j = 0; j < w->g.k_blocks; j++)
        t->row[j] = j < visible ? sparge_cell_share(mass[j], total) : -INFINITY;
    record(w, q, w->intermediates->s_all, t->row);
    record(w, q, w->intermediates->s, t->row);
    keep_forced(w, q, thresholds->theta, NULL, &to);
    const candidates row = {.n = visible, .order_key = mass, .mass = mass, .j = t->j};
    choose(w, row, visible, thresholds, &to);
}
