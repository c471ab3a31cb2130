/* SPDX-License-Identifier: Apache-2.0 */
/* flexprefill.c: FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
 * Long-Sequence Inference (arXiv 2502.20766), github.com/ByteDance-Seed/FlexPrefill, commit
 * a24b27b.
 *
 * What the last `block` queries pay, on average, is summed over each key and along each diagonal.
 * If n keys together are the fewest that get more than gamma, n / block + 1 key blocks are chosen,
 * those that get most, and diagonals of blocks alike; of both at least min_budget, the first block
 * and the main diagonal among them. Blocks of chosen columns and on chosen diagonals are kept.
 * A head is aware of its queries if means foretell this: if the square root of the Jensen-Shannon
 * divergence between what the key blocks get and the softmax of the mean of these queries over the
 * means of the key blocks is below tau. Such a head chooses min_budget of both. It also keeps the
 * best of all its pairs of blocks by the causal softmax of mean queries over mean keys, as long as
 * they have gamma of it together; the one that crosses it is left out.
 * k_len of at most 2 blocks or min_budget is dense.
 *
 * As in the authors' code: a short last block has its true mean; a diagonal of blocks holds the
 * offsets k_len - 1 - x with x in one block; a divergence that is NaN, since some block gets
 * exactly nothing, is not below tau. They write 128 for block in n / block.
 * Our reading:
 * - gamma 1 keeps every visible block, which the authors' sums reach but for rounding;
 * - q_len and k_len differ: the offset of a key is that from the query's last visible key, and
 *   diagonal e of a row lies e blocks before its last visible block. The blocks that hold the last
 *   visible key of some query are kept too, so that none is without a key;
 * - of equals the lower block, diagonal or pair comes first; every query head chooses for itself.
 * There is no official form that is not causal. Masks are nested in gamma. multiply_adds leaves
 * sums over diagonals, softmax and ranking out. */
#include <math.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { GAMMA, TAU, MIN_BUDGET, BLOCK };

typedef struct room {
    float *p, *vertical, *slash; /* [k_len]: by key, by offset */
    float *columns, *diagonals;  /* their sums over blocks */
    float *q_mean, *k_mean, *estimate;
    sparge_ranked *x;
} room;

static int64_t last_rows(const sparge_geometry *g) { return sparge_min(g->block_q, g->q_len); }

static void last_queries(const sparge_head *head, const room *m)
{
    const sparge_geometry *g = &head->g;
    const int64_t rows = last_rows(g);
    for (int64_t t = g->q_len - rows; t < g->q_len; t++) {
        const int64_t visible = sparge_keys_of_query(g, t);
        sparge_method_row(head, t, m->p);
        for (int64_t key = 0; key < visible; key++) {
            m->vertical[key] += m->p[key] / (float)rows;
            m->slash[visible - 1 - key] += m->p[key] / (float)rows;
        }
    }
    for (int64_t x = 0; x < g->k_len; x++) {
        m->columns[x / g->block_k] += m->vertical[x];
        m->diagonals[g->k_blocks - 1 - x / g->block_k] += m->slash[g->k_len - 1 - x];
    }
}

static void rank_all(sparge_ranked *x, const float *score, int64_t n)
{
    for (int64_t e = 0; e < n; e++)
        x[e] = (sparge_ranked){score[e], e};
    sparge_rank(x, n);
}

/* The blocks that more than gamma of the scores of single keys needs. */
static int64_t blocks_needed(const sparge_head *head, const float *score, sparge_ranked *x)
{
    rank_all(x, score, head->g.k_len);
    const int64_t n = sparge_count_mass(x, head->g.k_len, head->param[GAMMA], false) + 1;
    return n / head->g.block_k + 1;
}

static bool is_query_aware(const sparge_head *head, const room *m)
{
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim, rows = last_rows(g);
    const int64_t visible = sparge_blocks_visible(g, g->q_blocks - 1);
    sparge_method_pool(head->q + (g->q_len - rows) * dim, rows, dim, rows, false, m->q_mean);
    sparge_method_pooled_row(head, m->q_mean, m->k_mean, visible, m->estimate);
    double divergence = 0.0;
    for (int64_t j = 0; j < visible; j++) {
        const double a = (double)m->estimate[j], b = (double)m->columns[j], mean = (a + b) / 2.0;
        divergence += (a * log(a / mean) + b * log(b / mean)) / 2.0;
    }
    const double tau = head->param[TAU];
    return tau > 0.0 && divergence < tau * tau;
}

static void keep_lines(const sparge_head *head, const room *m, int64_t columns, int64_t diagonals)
{
    const sparge_geometry *g = &head->g;
    sparge_ranked *column = m->x, *diagonal = m->x + g->k_blocks;
    m->columns[0] = m->diagonals[0] = INFINITY;
    rank_all(column, m->columns, g->k_blocks);
    rank_all(diagonal, m->diagonals, g->k_blocks);
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t visible = sparge_blocks_visible(g, i);
        for (int64_t e = 0; e < sparge_min(columns, g->k_blocks); e++)
            if (column[e].at < visible)
                sparge_keep(head, i, column[e].at);
        for (int64_t e = 0; e < sparge_min(diagonals, g->k_blocks); e++)
            if (diagonal[e].at < visible)
                sparge_keep(head, i, visible - 1 - diagonal[e].at);
        sparge_keep_diagonal(head, i);
    }
}

static void keep_best_pairs(const sparge_head *head, const room *m)
{
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim;
    double mass = 0.0;
    int64_t n = 0;
    sparge_method_pool(head->q, g->q_len, dim, g->block_q, false, m->q_mean);
    *head->multiply_adds += (double)g->q_len * (double)dim;
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t visible = sparge_blocks_visible(g, i);
        sparge_method_pooled_row(head, m->q_mean + i * dim, m->k_mean, visible, m->estimate);
        for (int64_t j = 0; j < visible; j++)
            m->x[n++] = (sparge_ranked){m->estimate[j], i * g->k_blocks + j};
        mass += visible > 0;
    }
    sparge_rank(m->x, n);
    const int64_t count = sparge_count_mass(m->x, n, head->param[GAMMA] * mass, false);
    for (int64_t e = 0; e < count; e++)
        sparge_keep(head, m->x[e].at / g->k_blocks, m->x[e].at % g->k_blocks);
}

static sparge_status keep_flexprefill(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim, pairs = g->q_blocks * g->k_blocks;
    const int64_t budget = sparge_ceil_div((int64_t)head->param[MIN_BUDGET], g->block_k);
    if (g->k_blocks <= sparge_max(2, budget) || head->param[GAMMA] >= 1.0) {
        for (int64_t i = 0; i < g->q_blocks; i++)
            for (int64_t j = 0; j < sparge_blocks_visible(g, i); j++)
                sparge_keep(head, i, j);
        return SPARGE_OK;
    }
    float *const f = sparge_take(
        head->scratch, 3 * g->k_len + 3 * g->k_blocks + (g->q_blocks + 1 + g->k_blocks) * dim,
        sizeof *f);
    room m = {.x = sparge_take(head->scratch, sparge_max(pairs, g->k_len) + 2 * g->k_blocks,
                               sizeof *m.x)};
    if (!f || !m.x)
        return SPARGE_ERR_MEMORY;
    m.p = f;
    m.vertical = m.p + g->k_len;
    m.slash = m.vertical + g->k_len;
    m.columns = m.slash + g->k_len;
    m.diagonals = m.columns + g->k_blocks;
    m.estimate = m.diagonals + g->k_blocks;
    m.k_mean = m.estimate + g->k_blocks;
    m.q_mean = m.k_mean + g->k_blocks * dim;
    last_queries(head, &m);
    sparge_method_pool(head->k, g->k_len, dim, g->block_k, false, m.k_mean);
    *head->multiply_adds += (double)(g->k_len + last_rows(g)) * (double)dim;
    if (is_query_aware(head, &m)) {
        keep_lines(head, &m, budget, budget);
        keep_best_pairs(head, &m);
    } else {
        const int64_t columns = blocks_needed(head, m.vertical, m.x),
                      diagonals = blocks_needed(head, m.slash, m.x);
        keep_lines(head, &m, sparge_max(budget, columns), sparge_max(budget, diagonals));
    }
    return SPARGE_OK;
}

static sparge_status plan_flexprefill(sparge_plan *plan, const sparge_context *context,
                                      const double *param, sparge_error *error)
{
    const int64_t block = (int64_t)param[BLOCK];
    return sparge_each_head(
        plan, context, param,
        &(sparge_walk){.block_q = block, .block_k = block, .visit = keep_flexprefill}, error);
}

const sparge_method sparge_method_flexprefill = {
    .name = "flexprefill",
    .title = "FlexPrefill: columns and diagonals, or pairs of mean blocks",
    .paper = "arXiv 2502.20766",
    .repository = "github.com/ByteDance-Seed/FlexPrefill",
    .commit = "a24b27b",
    .kind = "training-free",
    .evidence = "139264 of 139264 blocks",
    .needs = SPARGE_NEEDS_CAUSAL,
    .param = {{"gamma", 0.0, 1.0, 0.9, false, "mass of keys, of diagonals or of pairs to keep"},
              {"tau", 0.0, 1.0, 0.1, false, "divergence below which means are trusted; 0: never"},
              {"min_budget", 1.0, 0x1p24, 1024.0, true, "keys and diagonals kept at the least"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 128.0, true, "tokens of a block"}},
    .plan = plan_flexprefill,
};
