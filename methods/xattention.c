/* SPDX-License-Identifier: Apache-2.0 */
/* xattention.c: XAttention: Block Sparse Attention with Antidiagonal Scoring (arXiv 2503.16428),
 * github.com/mit-han-lab/x-attention, commit e379887.
 *
 * Tokens stand in groups of `stride`. A group of queries and one of keys score the sum of an
 * antidiagonal: the first query with the last key, the second with the last but one, and so on,
 * over `stride` times what a score is divided by. The softmax of a group of queries over the groups
 * of keys, summed over a block, is the block's mass. Of each row the blocks with most mass are kept
 * until they have tau of it, the one that reaches it among them. Causal: the first block and the
 * diagonal are kept and their mass counts first; a group that a query of its row sees in part is
 * whole.
 *
 * As in the authors' code a group of the tail sums the tokens that it has, and scores no more for
 * it. Their masks differ by slips: if all queries are one chunk, causal, the mark of block 0 is
 * lost and the sum lags by a block, so that each row keeps one block more than tau needs (and block
 * 0, by an index of 0 for what is not kept). Not causal, block 0 is kept by the same index in rows
 * that drop any, and the zeros that pad keys have mass and may be kept in place of keys. Our
 * reading:
 * - not causal, the best block is kept whatever tau is;
 * - tau 1 keeps every visible block, where the authors drop those whose mass is below rounding;
 * - q_len and k_len differ: group u is visible to group t if some query of t sees some key of u;
 * - of equal masses the lower block comes first, and every query head chooses for itself.
 * Masks are nested in tau. multiply_adds leaves softmax, sums and ranking out. */
#include <string.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { TAU, STRIDE, BLOCK, T = TAU };

/* Groups of tokens as long rows, [groups][stride][dim], 0 for tokens that are not there. */
static float *make_groups(const sparge_head *head, const float *x, int64_t tokens, bool backwards)
{
    const int64_t stride = (int64_t)head->param[STRIDE], dim = head->problem->dim;
    const int64_t padded = sparge_ceil_div(tokens, stride) * stride;
    float *to = sparge_take(head->scratch, padded * dim + 1, sizeof *to);
    for (int64_t t = 0; t < tokens && to; t++) {
        const int64_t r = t % stride, place = backwards ? t - r + stride - 1 - r : t;
        memcpy(to + place * dim, x + t * dim, (size_t)dim * sizeof *to);
    }
    return to;
}

static void choose(const sparge_head *head, int64_t i, const double *mass, sparge_ranked *x)
{
    const bool causal = head->g.causal != SPARGE_CAUSAL_NONE;
    const int64_t visible = sparge_blocks_visible(&head->g, i);
    const double tau = head->param[TAU];
    double total = 0.0, forced = 0.0;
    int64_t n = 0;
    if (causal && visible > 0)
        sparge_keep(head, i, 0);
    sparge_keep_diagonal(head, i);
    for (int64_t j = 0; j < visible; j++) {
        const float score = (float)mass[j];
        total += (double)score;
        if (sparge_kept(head, i, j))
            forced += (double)score;
        else
            x[n++] = (sparge_ranked){score, j};
    }
    sparge_rank(x, n);
    int64_t count = tau < 1.0 ? sparge_count_mass(x, n, tau * total - forced, true) : n;
    if (!causal)
        count = sparge_min(n, sparge_max(1, count));
    for (int64_t e = 0; e < count; e++)
        sparge_keep(head, i, x[e].at);
}

static sparge_status keep_xattention(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const int64_t stride = (int64_t)head->param[STRIDE], per_block = g->block_k / stride;
    const int64_t length = stride * head->problem->dim;
    const sparge_geometry groups =
        sparge_geometry_make(g->q_len, g->k_len, stride, stride, g->causal);
    const float *q = make_groups(head, head->q, g->q_len, true),
                *k = make_groups(head, head->k, g->k_len, false);
    if (!q || !k)
        return SPARGE_ERR_MEMORY;
    float *a = sparge_take(head->scratch, per_block * groups.k_blocks + 1, sizeof *a);
    const sparge_panels rows = sparge_method_panels(k, groups.k_blocks, length, head->scratch);
    double *mass = sparge_take(head->scratch, g->k_blocks + 1, sizeof *mass);
    sparge_ranked *x = sparge_take(head->scratch, g->k_blocks + 1, sizeof *x);
    if (!rows.x || !a || !mass || !x)
        return SPARGE_ERR_MEMORY;
    for (int64_t i = 0; i < g->q_blocks; i++) {
        memset(mass, 0, (size_t)g->k_blocks * sizeof *mass);
        const int64_t first = i * per_block,
                      count = sparge_min(groups.q_blocks, first + per_block) - first,
                      most = count ? sparge_blocks_visible(&groups, first + count - 1) : 0;
        sparge_method_products(&rows, q + first * length, count, head->scale / (float)stride, most,
                               a);
        for (int64_t t = 0; t < count; t++) {
            const int64_t visible = sparge_blocks_visible(&groups, first + t);
            sparge_method_softmax(a + t * most, visible);
            for (int64_t u = 0; u < visible; u++)
                mass[u / per_block] += (double)a[t * most + u];
            *head->multiply_adds += (double)visible * (double)length;
        }
        if (head->shared)
            sparge_keep_shares(head, i, mass, head->param[T]);
        else
            choose(head, i, mass, x);
    }
    return SPARGE_OK;
}

/* name: for the message. shared: not NULL, the threshold chooses. */
static sparge_status plan_by(const char *name, void *shared, sparge_plan *plan,
                             const sparge_context *context, const double *param,
                             sparge_error *error)
{
    const int64_t stride = (int64_t)param[STRIDE], block = (int64_t)param[BLOCK];
    if (block % stride != 0)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "block of %s is %lld, it must be a multiple of stride, %lld", name,
                           (long long)block, (long long)stride);
    const sparge_walk walk = {
        .block_q = block, .block_k = block, .shared = shared, .visit = keep_xattention};
    return sparge_each_head(plan, context, param, &walk, error);
}

static sparge_status plan_xattention(sparge_plan *plan, const sparge_context *context,
                                     const double *param, sparge_error *error)
{
    return plan_by("xattention", NULL, plan, context, param, error);
}

static sparge_status plan_xattention_t(sparge_plan *plan, const sparge_context *context,
                                       const double *param, sparge_error *error)
{
    return plan_by("xattention_t", plan, plan, context, param, error);
}

#define GROUPS                                                                                 \
    {"stride", 1.0, 64.0, 8.0, true, "tokens of an antidiagonal"},                             \
    {                                                                                          \
        "block", 1.0, SPARGE_MAX_BLOCK, 128.0, true, "tokens of a block, a multiple of stride" \
    }

const sparge_method sparge_method_xattention = {
    .name = "xattention",
    .title = "XAttention: antidiagonal scores",
    .paper = "arXiv 2503.16428",
    .repository = "github.com/mit-han-lab/x-attention",
    .commit = "e379887",
    .kind = "training-free",
    .evidence = "115361 of 118344 blocks",
    .param = {{"tau", 0.0, 1.0, 0.9, false, "mass of the key blocks to keep"}, GROUPS},
    .plan = plan_xattention,
};

const sparge_method sparge_method_xattention_t = {
    .name = "xattention_t",
    .title = "XAttention's scores above a threshold",
    .paper = "arXiv 2503.16428",
    .repository = "",
    .commit = "",
    .kind = "training-free",
    .evidence = "",
    .falls = true,
    .param = {{"t", 0.0, INFINITY, 0.2, false, "mass above which a block is kept, in even shares"},
              GROUPS},
    .plan = plan_xattention_t,
};
