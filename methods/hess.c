/* SPDX-License-Identifier: Apache-2.0 */
/* hess.c: HeSS: budgets of blocks by the sensitivity of heads; github.com/libary753/HeSS at
 * 7ee2e37, which has no code: the rule is read from what is written of it.
 *
 * The base keeps of each row of blocks, by the softmax of mean queries times mean keys, the best
 * until they have the mass tau, and rho of the visible ones at least. As many blocks as that is
 * over all heads are shared out anew, in proportion to how sensitive the heads are: what is more
 * than a head has goes to the others. Each head keeps its best blocks, of all rows.
 *
 * Ours:
 * - The paper's sensitivity is the Fisher information of the weights of a head for two losses of
 *   its task. Here it is the mean share of the attention that is lost with the best fifth of each
 *   row's blocks. That is a proxy, measured at the first call of a state, or in each call without.
 * - `reversed` gives the most to the least sensitive heads, the control of the paper.
 * - The block that reaches tau is kept. If causal the diagonal is kept, else the best of each row;
 *   and with `sink` the first block, which means of keys do not show.
 * - Heads of one batch share a budget. multiply_adds leaves softmax and ranking out. */
#include <math.h>
#include <string.h>

#include "common/select.h"
#include "methods/entries.h"
#include "methods/method.h"

enum { TAU, RHO, REVERSED, SINK };
static const double measured_at = 0.2; /* of the blocks of each row */

typedef struct heads {
    float *map;          /* [batch * heads][q_blocks][k_blocks], 0: not visible */
    double *budget;      /* [batch * heads] blocks */
    double *sensitivity; /* [heads] */
    bool fresh;          /* is it to be measured? */
} heads;

/* The visible blocks of a row, the best first, and how many the base keeps. */
static int64_t rank_row(const sparge_geometry *g, const float *row, int64_t i, double tau,
                        double rho, sparge_ranked *x)
{
    const int64_t visible = sparge_blocks_visible(g, i);
    for (int64_t j = 0; j < visible; j++)
        x[j] = (sparge_ranked){row[j], j};
    sparge_rank(x, visible);
    const int64_t count = tau < 1.0 ? sparge_count_mass(x, visible, tau, true) : visible;
    return sparge_max(count, sparge_topk_count((float)rho, visible));
}

/* What is lost with a share of each row, the mean over queries. */
static sparge_status measure(const sparge_head *head, const float *map, sparge_ranked *x)
{
    const sparge_geometry *g = &head->g;
    const heads *all = head->shared;
    float *p = sparge_take(head->scratch, g->k_len + 1, sizeof *p);
    double *mass = sparge_take(head->scratch, g->k_blocks + 1, sizeof *mass), lost = 0.0;
    if (!p || !mass)
        return SPARGE_ERR_MEMORY;
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t visible = sparge_blocks_visible(g, i),
                      count = rank_row(g, map + i * g->k_blocks, i, 0.0, measured_at, x);
        memset(mass, 0, (size_t)g->k_blocks * sizeof *mass);
        for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++) {
            sparge_method_row(head, i * g->block_q + r, p);
            sparge_method_add_blocks(head, p, mass);
        }
        for (int64_t e = count; e < visible; e++)
            lost += mass[x[e].at];
    }
    all->sensitivity[head->h] = lost / (double)sparge_max(1, g->q_len);
    return SPARGE_OK;
}

/* The map of a head, and in a first call its sensitivity. */
static sparge_status look(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const heads *all = head->shared;
    const int64_t dim = head->problem->dim;
    float *map = all->map + head->n * g->q_blocks * g->k_blocks,
          *q = sparge_take(head->scratch, g->q_blocks * dim + 1, sizeof *q),
          *k = sparge_take(head->scratch, g->k_blocks * dim + 1, sizeof *k);
    sparge_ranked *x = sparge_take(head->scratch, g->k_blocks + 1, sizeof *x);
    if (!q || !k || !x)
        return SPARGE_ERR_MEMORY;
    sparge_method_pool(head->q, g->q_len, dim, g->block_q, false, q);
    sparge_method_pool(head->k, g->k_len, dim, g->block_k, false, k);
    *head->multiply_adds += (double)(g->q_len + g->k_len) * (double)dim;
    for (int64_t i = 0; i < g->q_blocks; i++)
        sparge_method_pooled_row(head, q + i * dim, k, sparge_blocks_visible(g, i),
                                 map + i * g->k_blocks);
    return all->fresh && head->b == 0 ? measure(head, map, x) : SPARGE_OK;
}

/* Shares of a sum in proportion to weights, of which none is more than `most`: what is too much for
 * one goes to the others. share: negative as long as it is open. */
static void fill(double sum, double most, const double *weight, int64_t n, double *share)
{
    double weights = 0.0;
    bool goes_on = true;
    for (int64_t h = 0; h < n; h++) {
        share[h] = -1.0;
        weights += weight[h];
    }
    while (goes_on) {
        const double left = sum, open = weights;
        goes_on = false;
        for (int64_t h = 0; h < n; h++)
            if (share[h] < 0.0 && left * weight[h] >= most * open) {
                share[h] = most;
                sum -= most;
                weights -= weight[h];
                goes_on = true;
            }
    }
    for (int64_t h = 0; h < n; h++)
        if (share[h] < 0.0)
            share[h] = fmax(0.0, sum) * weight[h] / weights;
}

/* The blocks of each head. */
static sparge_status share_out(const sparge_plan *plan, const sparge_context *context,
                               const sparge_geometry *g, const double *param, const heads *all,
                               sparge_piece **memory)
{
    const int64_t n = plan->problem.heads;
    double *weight = sparge_take(memory, n, sizeof *weight);
    sparge_ranked *x = sparge_take(memory, g->k_blocks + 1, sizeof *x);
    if (!weight || !x)
        return SPARGE_ERR_MEMORY;
    for (int64_t h = 0; h < n; h++) {
        const double s = fmax(all->sensitivity[h], 1e-6); /* so that no head has nothing */
        weight[h] = param[REVERSED] != 0.0 ? 1.0 / s : s;
    }
    for (int64_t b = 0; b < plan->problem.batch; b++) {
        double sum = 0.0;
        for (int64_t h = 0; h < n; h++)
            for (int64_t i = 0; i < g->q_blocks; i++) {
                double own[SPARGE_MAX_PARAMS];
                const double *of = sparge_param_of(context, h, param, own);
                sum += (double)rank_row(g, all->map + ((b * n + h) * g->q_blocks + i) * g->k_blocks,
                                        i, of[TAU], of[RHO], x);
            }
        fill(sum, (double)sparge_visible_pairs(g), weight, n, all->budget + b * n);
    }
    return SPARGE_OK;
}

static sparge_status keep_best(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const heads *all = head->shared;
    const float *map = all->map + head->n * g->q_blocks * g->k_blocks;
    sparge_ranked *x = sparge_take(head->scratch, g->q_blocks * g->k_blocks + 1, sizeof *x);
    int64_t n = 0;
    if (!x)
        return SPARGE_ERR_MEMORY;
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t visible = sparge_blocks_visible(g, i);
        if (g->causal == SPARGE_CAUSAL_NONE && visible) {
            rank_row(g, map + i * g->k_blocks, i, 1.0, 0.0, x + n);
            sparge_keep(head, i, x[n].at);
        }
        sparge_keep_diagonal(head, i);
        if (head->param[SINK] != 0.0 && visible)
            sparge_keep(head, i, 0);
        for (int64_t j = 0; j < visible; j++)
            x[n + j] = (sparge_ranked){map[i * g->k_blocks + j], i * g->k_blocks + j};
        n += visible;
    }
    sparge_rank(x, n);
    const int64_t count = sparge_min(n, (int64_t)llround(all->budget[head->n]));
    for (int64_t e = 0; e < count; e++)
        sparge_keep(head, x[e].at / g->k_blocks, x[e].at % g->k_blocks);
    return SPARGE_OK;
}

static sparge_status plan_hess(sparge_plan *plan, const sparge_context *context,
                               const double *param, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    const sparge_geometry g = sparge_geometry_of(p, &plan->options);
    const int64_t count = p->batch * p->heads;
    sparge_piece *memory = NULL;
    heads all = {.map = sparge_take(&memory, count * g.q_blocks * g.k_blocks + 1, sizeof(float)),
                 .budget = sparge_take(&memory, count + 1, sizeof(double))};
    void *kept = NULL;
    sparge_status status = all.map && all.budget ? sparge_state(plan, context, "hess",
                                                                p->heads * (int64_t)sizeof(double),
                                                                &all.fresh, &kept, error)
                                                 : SPARGE_ERR_MEMORY;
    all.sensitivity = kept;
    if (!status)
        status = sparge_each_head(plan, context, param,
                                  &(sparge_walk){.shared = &all, .visit = look}, error);
    if (!status)
        status = share_out(plan, context, &g, param, &all, &memory);
    if (!status)
        status = sparge_each_head(plan, context, param,
                                  &(sparge_walk){.shared = &all, .visit = keep_best}, error);
    sparge_release(&memory);
    return status;
}

const sparge_method sparge_method_hess = {
    .name = "hess",
    .title = "HeSS: budgets by the sensitivity of heads",
    .paper = "",
    .repository = "github.com/libary753/HeSS",
    .commit = "7ee2e37",
    .kind = "training-free",
    .evidence = "",
    .param = {{"tau", 0.0, 1.0, 0.9, false, "mass of the key blocks that the base keeps"},
              {"rho", 0.0, 1.0, 0.0, false, "share of the key blocks that it keeps at least"},
              {"reversed", 0.0, 1.0, 0.0, true, "the most for the least sensitive heads"},
              {"sink", 0.0, 1.0, 0.0, true, "keep key block 0 always"}},
    .plan = plan_hess,
};
