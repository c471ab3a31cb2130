/* SPDX-License-Identifier: Apache-2.0 */
/* strata.c: a sample of the keys, as dense as their mass. Our own.
 *
 * A mask replaces what it leaves out by what it keeps. Where attention is flat, the blocks of most
 * mass are a biased sample of the values, and lose more than chance does. Here every block is
 * attended, by all of its keys or by one of each 2, 4, 8, ...: by the fewest that leave each of
 * them t even shares of the mass at least. So peaked rows attend to their blocks, and flat ones to
 * a thin sample of all. A key that stands for n has ln n added to its score. Of each cell of n keys
 * any is drawn with the same chance, so that sums over the sample are in the mean those over all
 * keys. It is the same sample for all queries of a head.
 *
 * order: not causal, the queries and keys of a head are first put in the order of a tree of halves,
 * whose blocks and cells are of tokens alike: masses differ more from block to block, and the keys
 * of a cell less.
 *
 * - Masses are those of submass.
 * - Causal, the first block and the diagonal are attended whole. So is a short last block of keys.
 * - t 0 attends to all.
 * PSA (arXiv 2512.04025) has such levels of pooled keys, HyperAttention (arXiv 2310.05869) a
 * uniform sample beside blocks of sorted keys, Sparse VideoGen2 (arXiv 2505.18875) orders by
 * clusters. multiply_adds leaves means, softmax and sums of masses out. */
#include <math.h>

#include "methods/entries.h"
#include "methods/method.h"
#include "sparge_inspect.h"

enum { T, CELL, ORDER, SEED };

/* Part e of the plan has one key of each 2^e: so often can a block be halved. */
static int sample_parts(const sparge_geometry *g)
{
    int e = 0;
    while (g->k_len >= g->block_k && e + 1 < SPARGE_MAX_PARTS && (g->block_k >> e) % 2 == 0)
        e++;
    return e;
}

/* ---- The order of tokens ---- */

/* Puts some key of each cell of 2, 4, 8, ... on its first place. */
static void draw(const sparge_head *head, int64_t *order)
{
    const int64_t last = (int64_t)1 << sample_parts(&head->g);
    for (int64_t cell = 2; cell <= last; cell *= 2)
        for (int64_t at = 0; at + cell <= head->g.k_len; at += cell) {
            const uint64_t chance =
                sparge_hash((uint64_t)head->param[SEED], head->n, cell, at) >> 63;
            for (int64_t e = at; e < at + cell / 2 && chance; e++) { /* its halves change places */
                const int64_t key = order[e];
                order[e] = order[e + cell / 2];
                order[e + cell / 2] = key;
            }
        }
}

static bool is_ordered(const sparge_plan *plan, const double *param)
{
    return param[ORDER] != 0.0 && plan->options.causal == SPARGE_CAUSAL_NONE;
}

static sparge_status order_tokens(const sparge_head *head, int64_t *k_order)
{
    const sparge_problem *p = head->problem;
    double *count = head->multiply_adds;
    int64_t *q_order = sparge_take(head->scratch, p->q_len + 1, sizeof *q_order);
    if (!q_order)
        return SPARGE_ERR_MEMORY;
    sparge_status status = sparge_order_tree(head->q, p->q_len, head->k, p->k_len, p->dim,
                                             head->g.block_q, q_order, count);
    if (!status)
        status = sparge_order_tree(head->k, p->k_len, head->q, p->q_len, p->dim, head->g.block_k,
                                   k_order, count);
    if (!status)
        sparge_order_queries(head, q_order);
    return status;
}

static sparge_status order_head(const sparge_head *head, sparge_error *error)
{
    (void)error;
    int64_t *order = sparge_take(head->scratch, head->g.k_len + 1, sizeof *order);
    sparge_status status = order ? SPARGE_OK : SPARGE_ERR_MEMORY;
    for (int64_t t = 0; t < head->g.k_len && !status; t++)
        order[t] = t;
    if (!status && is_ordered(head->plan, head->param))
        status = order_tokens(head, order);
    if (status)
        return status;
    draw(head, order);
    sparge_order_keys(head, order);
    return SPARGE_OK;
}

/* ---- The parts of samples ---- */

static sparge_status add_sample(sparge_plan *plan, const sparge_part *keys, int e,
                                sparge_error *error)
{
    const sparge_geometry g = sparge_geometry_of(&keys->problem, &keys->options);
    const float *k_bias = keys->problem.k_bias;
    const int64_t heads = keys->problem.batch * keys->problem.heads,
                  len = g.k_len / g.block_k * (g.block_k >> e);
    sparge_part *part = sparge_plan_add(plan);
    sparge_problem *p = &part->problem;
    float *bias = sparge_take(&plan->memory, heads * len + 1, sizeof *bias);
    int64_t *place = sparge_take(&plan->memory, heads * g.k_len + 1, sizeof *place);
    if (!bias || !place)
        return SPARGE_ERR_MEMORY;
    for (int64_t n = 0; n < heads; n++) {
        for (int64_t key = 0; key < len; key++)
            bias[n * len + key] =
                (float)(e * log(2.0)) + (k_bias ? k_bias[n * g.k_len + (key << e)] : 0.0f);
        for (int64_t at = n * g.k_len; at < (n + 1) * g.k_len; at++)
            place[at] = keys->place[at] >> e < len ? keys->place[at] >> e : -1;
    }
    *p = keys->problem;
    p->k_len = len;
    p->k.token <<= e;
    p->v.token <<= e;
    p->k_bias = bias;
    part->place = place;
    part->pooled = true;
    part->options.block_k >>= e;
    part->options.causal = SPARGE_CAUSAL_NONE;
    return sparge_part_mask(part, error);
}

/* ---- Which part has a block ---- */

/* Masses of blocks, [batch][heads][q_blocks][k_blocks]. */
static sparge_status measure(const sparge_plan *plan, int64_t cell, float *mass,
                             sparge_error *error)
{
    const sparge_problem *p = &plan->part[0].problem;
    sparge_options o = plan->part[0].options;
    sparge_mask mask;
    o.rules = SPARGE_RULES_DEFAULT;
    o.cell = cell;
    o.thresholds = (sparge_thresholds){.theta = -1.0f, .tau = SPARGE_OFF, .topk = 1.0f};
    o.per_head = NULL;
    o.progress = NULL;
    if (o.backend == SPARGE_CUDA) /* whose arrays are elsewhere */
        o.backend = SPARGE_AUTO;
    sparge_status status = sparge_mask_alloc(&mask, p, &o, error);
    if (!status)
        status = sparge_predict(p, &o, &mask, &(sparge_intermediates){.s_all = mass}, error);
    sparge_mask_free(&mask);
    return status;
}

static void choose(sparge_plan *plan, const sparge_context *context, const double *param,
                   const float *mass)
{
    const sparge_geometry g = sparge_geometry_of(&plan->problem, &plan->options);
    const int64_t heads = plan->problem.heads;
    for (int64_t row = 0; row < plan->problem.batch * heads * g.q_blocks; row++) {
        const int64_t n = row / g.q_blocks, i = row % g.q_blocks;
        double own[SPARGE_MAX_PARAMS];
        const double t = sparge_param_of(context, n % heads, param, own)[T];
        const int64_t first = g.causal != SPARGE_CAUSAL_NONE, /* of those that may be sampled */
            last = sparge_min(g.k_len / g.block_k, sparge_first_diagonal(&g, i)) - 1;
        for (int64_t j = 0; j < sparge_blocks_visible(&g, i); j++) {
            const double shares = (double)mass[row * g.k_blocks + j] * (double)g.k_blocks;
            int e = 0;
            while (j >= first && j <= last && e + 1 < plan->parts && ldexp(shares, e) < t)
                e++;
            sparge_mask_set(&plan->part[e].mask, n / heads, n % heads, i, j, true);
        }
    }
}

static sparge_status plan_strata(sparge_plan *plan, const sparge_context *context,
                                 const double *param, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    const int64_t cell = (int64_t)param[CELL];
    const sparge_geometry g = sparge_geometry_of(p, &plan->options),
                          cells = sparge_geometry_make(p->q_len, p->k_len, cell, cell, g.causal);
    float *mass =
        sparge_take(&plan->memory, p->batch * p->heads * g.q_blocks * g.k_blocks + 1, sizeof *mass);
    sparge_add_blocks(plan, 0, 0);
    sparge_status status = mass ? sparge_own_keys(plan) : SPARGE_ERR_MEMORY;
    if (!status && is_ordered(plan, param))
        status = sparge_own_queries(plan);
    if (!status)
        status = sparge_each_head(plan, context, param, &(sparge_walk){.visit = order_head}, error);
    const sparge_part keys = plan->part[0];
    if (!status && g.causal != SPARGE_CAUSAL_NONE) { /* whole blocks are the caller's */
        plan->part[0].problem = *p;
        plan->part[0].place = NULL;
    }
    for (int e = 1; e <= sample_parts(&g) && keys.place && !status; e++)
        status = add_sample(plan, &keys, e, error);
    if (!status)
        status = measure(plan, cell, mass, error);
    if (!status)
        choose(plan, context, param, mass);
    plan->multiply_adds +=
        (double)(p->batch * p->heads * p->dim) * (double)sparge_visible_pairs(&cells);
    return status;
}

const sparge_method sparge_method_strata = {
    .name = "strata",
    .title = "A sample of the keys, as dense as their mass",
    .paper = "",
    .repository = "",
    .commit = "",
    .kind = "training-free",
    .evidence = "",
    .falls = true,
    .param = {{"t", 0.0, INFINITY, 2.0, false, "mass of a computed key, at least, in even shares"},
              {"cell", 1.0, SPARGE_MAX_BLOCK, 8.0, true,
               "tokens of a cell whose mean tells its mass, which divide the blocks"},
              {"order", 0.0, 1.0, 1.0, true, "not causal: tokens stand in the order of a tree"},
              {"seed", 0.0, 0x1p53, 0.0, true, "of the sample"}},
    .plan = plan_strata,
};
