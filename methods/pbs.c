/* SPDX-License-Identifier: Apache-2.0 */
/* pbs.c: PBS-Attn: Sparser Block-Sparse Attention via Token Permutation, arXiv 2510.21270;
 * github.com/xinghaow99/pbs-attn at 8ce8e02.
 *
 * Keys are cut into segments. Inside each whole segment, keys and their values are put in the order
 * of the attention that the last `block` queries pay to them, the most first: a softmax over the
 * keys of all whole segments, causal or not. Keys never leave their segment, so every earlier
 * segment stays visible as a whole. Mean queries of blocks and mean keys of permuted blocks give a
 * softmax over the blocks of earlier segments; the best are kept until they have the mass
 * `threshold`, the one that crosses it too. The blocks of the own segment are kept, and there a
 * query attends to the keys that were not after it before the permutation. The block that holds the
 * first key is kept. Means of a short last block count it as a whole one. With at most one segment
 * all is dense.
 *
 * Ours: a threshold that rounding keeps from being reached keeps every block of earlier segments
 * (the code keeps none), so that 1 is dense. Of equal keys the earlier one comes first, of equal
 * blocks too. A query stands where its last visible key does: blocks of queries that lie in two
 * segments have both for their own. Each query head has its own order, as in the code.
 * multiply_adds leaves out softmax, sorting and the moving of keys. */
#include "methods/entries.h"
#include "methods/method.h"

enum { THRESHOLD, SEGMENT, BLOCK };

/* Which key stands at each place of the permuted ones, order[k_len]. */
static sparge_status order_keys(const sparge_head *head, int64_t *order)
{
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim, segment = (int64_t)head->param[SEGMENT],
                  whole = g->k_len / segment * segment;
    float *p = sparge_take(head->scratch, whole + 1, sizeof *p);
    float *sum = sparge_take(head->scratch, g->k_len + 1, sizeof *sum);
    if (!p || !sum)
        return SPARGE_ERR_MEMORY;
    for (int64_t t = sparge_max(0, g->q_len - g->block_q); t < g->q_len; t++) {
        sparge_method_scores(&head->keys, head->q + t * dim, head->scale, whole, p);
        sparge_method_softmax(p, whole);
        for (int64_t key = 0; key < whole; key++)
            sum[key] += p[key];
        *head->multiply_adds += (double)whole * (double)dim;
    }
    return sparge_order_segments(sum, g->k_len, segment, order);
}

/* How many of the first `blocks` blocks a query block keeps; x has them, the best first. */
static int64_t rank_blocks(const sparge_head *head, const float *q, const float *k, int64_t blocks,
                           float *p, sparge_ranked *x)
{
    const double threshold = head->param[THRESHOLD], t = threshold / (double)head->g.k_blocks;
    sparge_method_pooled_row(head, q, k, blocks, p);
    for (int64_t j = 0; j < blocks; j++)
        x[j] = (sparge_ranked){p[j], j};
    sparge_rank(x, blocks);
    if (head->shared) /* the selector of submass */
        return t > 0.0 ? sparge_count_above(x, blocks, t) : blocks;
    return threshold < 1.0
               ? sparge_max(sparge_min(1, blocks), sparge_count_mass(x, blocks, threshold, true))
               : blocks;
}

static sparge_status keep_blocks(const sparge_head *head, sparge_error *error)
{
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim, block = g->block_k,
                  blocks = (int64_t)head->param[SEGMENT] / block; /* of a segment */
    int64_t *order = sparge_take(head->scratch, g->k_len + 1, sizeof *order);
    float *k = sparge_take(head->scratch, g->k_len * dim + 1, sizeof *k);
    float *q_mean = sparge_take(head->scratch, g->q_blocks * dim + 1, sizeof *q_mean);
    float *k_mean = sparge_take(head->scratch, g->k_blocks * dim + 1, sizeof *k_mean);
    float *p = sparge_take(head->scratch, g->k_blocks + 1, sizeof *p);
    sparge_ranked *x = sparge_take(head->scratch, g->k_blocks + 1, sizeof *x);
    const sparge_pairs pairs = sparge_pairs_make(head);
    if (!order || !k || !q_mean || !k_mean || !p || !x || !pairs.bits)
        return SPARGE_ERR_MEMORY;
    sparge_status status = order_keys(head, order);
    if (status)
        return status;
    sparge_order_keys(head, order);
    sparge_order_rows(head->k, order, g->k_len, dim, k);
    sparge_method_pool(head->q, g->q_len, dim, block, true, q_mean);
    sparge_method_pool(k, g->k_len, dim, block, true, k_mean);
    *head->multiply_adds += (double)(g->q_len + g->k_len) * (double)dim;
    const int64_t first = head->part->place[head->n * g->k_len] / block; /* has the first key */
    for (int64_t i = 0; i < g->q_blocks && !status; i++) {
        const int64_t t = i * block, rows = sparge_block_rows(g->q_len, block, i),
                      last = sparge_last_key(g, t + rows - 1),
                      own = sparge_max(0, sparge_last_key(g, t)) / block / blocks * blocks,
                      end = (last / block / blocks + 1) * blocks;
        if (last < 0)
            continue;
        const int64_t count = rank_blocks(head, q_mean + i * dim, k_mean, own, p, x);
        sparge_pairs_clear(head, &pairs);
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t e = 0; e < count; e++)
                sparge_pairs_range(head, &pairs, r, x[e].at * block, (x[e].at + 1) * block);
            if (own > 0)
                sparge_pairs_range(head, &pairs, r, first * block, (first + 1) * block);
            for (int64_t at = own * block; at < sparge_min(g->k_len, end * block); at++)
                if (order[at] <= sparge_last_key(g, t + r))
                    sparge_mask_row_set(pairs.bits + r * pairs.words, at);
        }
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}

/* name: for the message. shared: not NULL, `threshold` is the t of submass. */
static sparge_status plan_by(const char *name, void *shared, sparge_plan *plan,
                             const sparge_context *context, const double *param,
                             sparge_error *error)
{
    const sparge_problem *problem = &plan->problem;
    const int64_t segment = (int64_t)param[SEGMENT], block = (int64_t)param[BLOCK];
    if (segment % block)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "segment of %s is %lld, it must be a multiple of block, which is %lld",
                           name, (long long)segment, (long long)block);
    if (problem->k_len <= segment) {
        sparge_plan_add(plan);
        return SPARGE_OK;
    }
    sparge_part *part = sparge_add_blocks(plan, block, block);
    const sparge_status status = sparge_own_keys(plan);
    part->options.causal = SPARGE_CAUSAL_NONE; /* which its mask has */
    const sparge_walk walk = {.shared = shared, .visit = keep_blocks};
    return status ? status : sparge_each_head(plan, context, param, &walk, error);
}

static sparge_status plan_pbs(sparge_plan *plan, const sparge_context *context, const double *param,
                              sparge_error *error)
{
    return plan_by("pbs", NULL, plan, context, param, error);
}

static sparge_status plan_pbs_t(sparge_plan *plan, const sparge_context *context,
                                const double *param, sparge_error *error)
{
    return plan_by("pbs_t", plan, plan, context, param, error);
}

#define SEGMENTS                                                                     \
    {"segment", 1.0, 0x1p24, 256.0, true, "keys of a segment, a multiple of block"}, \
    {                                                                                \
        "block", 1.0, SPARGE_MAX_BLOCK, 128.0, true, "tokens of a block"             \
    }

const sparge_method sparge_method_pbs = {
    .name = "pbs",
    .title = "PBS-Attn",
    .paper = "arXiv 2510.21270",
    .repository = "github.com/xinghaow99/pbs-attn",
    .commit = "8ce8e02",
    .kind = "training-free",
    .evidence = "197408520 of 197408520 pairs, 121671 of 121856 blocks, 326704 of 326712 places",
    .needs = SPARGE_NEEDS_CAUSAL,
    .param = {{"threshold", 0.0, 1.0, 0.9, false, "mass of the blocks of earlier segments"},
              SEGMENTS},
    .plan = plan_pbs,
};

const sparge_method sparge_method_pbs_t = {
    .name = "pbs_t",
    .title = "PBS-Attn's scores above a threshold",
    .paper = "arXiv 2510.21270",
    .repository = "",
    .commit = "",
    .kind = "training-free",
    .evidence = "",
    .needs = SPARGE_NEEDS_CAUSAL,
    .falls = true,
    .param = {{"t", 0.0, INFINITY, 0.2, false, "mass above which a block is kept, in even shares"},
              SEGMENTS},
    .plan = plan_pbs_t,
};
