/* select.c: one row of the block mask (ref/predict.c; Algorithm 1 lines 5 and 6), in time that
 * grows as the row: the reference sorts, this finds the score at which the sorted prefix ends. */
#include "common/block_mask.h"
#include "common/thresholds.h"
#include "cpu/work.h"

/* One row of the mask, and why: bits of sparge_reason for each block, or NULL. */
typedef struct mask_row {
    uint32_t *kept;
    uint8_t *why;
} mask_row;

static void keep(const mask_row *to, int64_t j, sparge_reason why)
{
    sparge_mask_row_set(to->kept, j);
    if (to->why)
        to->why[j] |= (uint8_t)why;
}

/* The finite entries of a row of S. */
typedef struct ranked {
    int64_t n;
    const uint32_t *key;   /* ordered as the scores are */
    const uint32_t *mass;  /* what each weighs; NULL: 1 */
    const uint32_t *block; /* ascending */
} ranked;

/* Bits of x that compare as x does; -0 as 0. */
static uint32_t order_of(float x)
{
    const uint32_t bits = sparge_float_bits(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* In the order of scores downward and blocks upward: the longest prefix of a mass within `limit`,
 * at least one. The key at which it ends is found by radix, eight bits at a time from the top. */
static void keep_prefix(const ranked *row, double limit, const mask_row *to, sparge_reason why)
{
    uint64_t taken = 0;
    uint32_t end = 0, known = 0; /* the leading bits of that key, and where they stand */
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint64_t mass[256] = {0};
        for (int64_t n = 0; n < row->n; n++)
            if ((row->key[n] & known) == end)
                mass[row->key[n] >> shift & 255] += row->mass ? row->mass[n] : 1;
        uint32_t digit = 255;
        while (digit > 0 && (double)(taken + mass[digit]) <= limit)
            taken += mass[digit--];
        end |= digit << shift;
        known |= 255u << shift;
    }
    int64_t best = 0;
    for (int64_t n = 0; n < row->n; n++) {
        const uint64_t mass = row->mass ? row->mass[n] : 1;
        const bool ties = row->key[n] == end && (double)(taken + mass) <= limit;
        taken += ties ? mass : 0;
        if (row->key[n] > end || ties)
            keep(to, row->block[n], why);
        if (row->key[n] > row->key[best])
            best = n;
    }
    if (row->n)
        keep(to, row->block[best], why);
}

void sparge_select_row(const sparge_work *w, sparge_scratch *t, const sparge_task *task)
{
    const sparge_geometry *g = &w->g;
    const sparge_thresholds *thresholds = sparge_thresholds_of(w->o, task->head % w->p->heads);
    const int64_t line = task->head * g->q_blocks + task->i,
                  visible = sparge_blocks_visible(g, task->i);
    const int64_t key_blocks = (sparge_kv_of(w->p, task->head) - w->first_kv) * g->k_blocks;
    const mask_row to = {
        .kept = w->predicted->bits + line * w->predicted->words,
        .why = w->intermediates->why ? w->intermediates->why + line * g->k_blocks : NULL,
    };
    memset(to.kept, 0, (size_t)w->predicted->words * sizeof *to.kept);
    if (to.why)
        memset(to.why, 0, (size_t)g->k_blocks);

    /* Line 5: S[i,:]; what cannot be ranked is kept, as is everything for a query block that is not
     * similar. */
    w->kernels.rank(w->q_pool + task->slot * w->q.stride, w->k_pool + key_blocks * w->k.stride,
                    visible, w->k.stride, w->o->softmax_scale, t->rank);
    for (int64_t j = visible; j < g->k_blocks; j++)
        t->rank[j] = -INFINITY;
    sparge_trace_rows(w->intermediates->s_all, line, 1, g->k_blocks, t->rank, g->k_blocks,
                      sizeof *t->rank);
    const bool q_similar = task->finite && task->sim > thresholds->theta;
    int64_t n = 0;
    float top = -INFINITY;
    for (int64_t j = 0; j < visible; j++) {
        const int64_t key = key_blocks + j;
        const bool k_similar = !(w->bad[key] & SPARGE_BAD_KEY) && w->k_sim[key] > thresholds->theta;
        if (!k_similar)
            t->rank[j] = -INFINITY;
        const bool ranks = sparge_finite(t->rank[j]);
        if (!q_similar)
            keep(&to, j, SPARGE_KEPT_DISSIMILAR_Q);
        if (!ranks)
            keep(&to, j, k_similar ? SPARGE_KEPT_OVERFLOW : SPARGE_KEPT_DISSIMILAR_K);
        if (ranks) {
            top = fmaxf(top, t->rank[j]);
            t->key[n] = order_of(t->rank[j]);
            t->place[n++] = (uint32_t)j;
        }
    }
    sparge_trace_rows(w->intermediates->s, line, 1, g->k_blocks, t->rank, g->k_blocks,
                      sizeof *t->rank);

    /* Line 6: M[i,:]. */
    ranked row = {n, t->key, t->mass, t->place};
    if (thresholds->tau != SPARGE_OFF) {
        uint64_t total = 0;
        for (int64_t e = 0; e < n; e++)
            t->rank[e] = t->rank[t->place[e]];
        w->kernels.mass(t->rank, n, top, t->mass);
        for (int64_t e = 0; e < n; e++)
            total += t->mass[e];
        keep_prefix(&row, (double)thresholds->tau * (double)total, &to, SPARGE_KEPT_MASS);
    }
    if (thresholds->topk != SPARGE_OFF) {
        row.mass = NULL;
        keep_prefix(&row, floor((double)thresholds->topk * (double)visible + 1e-5), &to,
                    SPARGE_KEPT_TOPK);
    }
    if (w->o->causal != SPARGE_CAUSAL_NONE)
        for (int64_t j = sparge_max(0, sparge_last_key(g, task->i * g->block_q)) / g->block_k;
             j < visible; j++)
            keep(&to, j, SPARGE_KEPT_DIAGONAL);
    if (w->o->sink && visible)
        keep(&to, 0, SPARGE_KEPT_SINK);
}
