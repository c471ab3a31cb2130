/* SPDX-License-Identifier: Apache-2.0 */
/* proxyattn.c: ProxyAttn: Guided Sparse Attention via Representative Heads, arXiv 2509.24745. Its
 * code was not to be had: the rule is that of the paper's formulas as others give them.
 *
 * Query heads stand in groups of `group` consecutive ones, and each group has one representative:
 * the mean of its queries and the mean of its keys. Of each `stride` tokens, queries and keys, the
 * first one counts. The softmax of the representative's scores, the largest of each pair of blocks,
 * ranks the key blocks of a row for all heads of the group. How many a head keeps is its own: what
 * its last `block` queries pay is summed over key blocks, and the fewest blocks that have gamma of
 * it, of all that these queries see, are the share of blocks that each row keeps.
 *
 * Ours: a row keeps that share of the blocks that it sees, rounded up (the formula has one number
 * for all rows, which leaves the first rows of a prompt dense). Causal, the first block and the
 * diagonal are kept beside them. A group must hold whole groups of heads that share keys, as the
 * paper says; the last one may be smaller. gamma 1 keeps every visible block. Of equal ones the
 * lower block comes first. The paper's numbers for gamma, group and stride are not known to us.
 * Masks are nested in gamma. multiply_adds leaves softmax, maxima and ranking out. */
#include <math.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { GAMMA, GROUP, STRIDE, BLOCK, T = GAMMA };

/* Representatives, of the tokens that count, and their maps. */
typedef struct proxies {
    const sparge_problem *problem;
    sparge_geometry g;
    float scale;
    int64_t stride, group, groups; /* query heads of a group; groups of a batch */
    int64_t queries, keys;         /* tokens that count */
    float *q;                      /* [batch * groups][queries][dim] */
    sparge_panels *k;              /* [batch * groups] of keys */
    float *map;                    /* [batch * groups][q_blocks][k_blocks] */
} proxies;

/* The mean of heads from one on, over every stride-th token. */
static void add_means(const float *heads, int64_t count, const proxies *x, int64_t tokens,
                      float *to)
{
    const int64_t dim = x->problem->dim;
    for (int64_t h = 0; h < count; h++)
        for (int64_t t = 0; t * x->stride < tokens; t++)
            for (int64_t c = 0; c < dim; c++)
                to[t * dim + c] += heads[(h * tokens + t * x->stride) * dim + c] / (float)count;
}

/* One row of blocks of one group. */
static bool fill_row(int64_t n, const void *user, sparge_piece **scratch)
{
    const proxies *x = user;
    const sparge_geometry *g = &x->g;
    const int64_t proxy = n / g->q_blocks, i = n % g->q_blocks, dim = x->problem->dim;
    const int64_t end = sparge_min(x->queries, (i + 1) * g->block_q / x->stride);
    float *map = x->map + n * g->k_blocks, *p = sparge_take(scratch, x->keys + 1, sizeof *p);
    for (int64_t t = i * g->block_q / x->stride; t < end && p; t++) {
        const int64_t visible = sparge_ceil_div(sparge_keys_of_query(g, t * x->stride), x->stride);
        sparge_method_scores(&x->k[proxy], x->q + (proxy * x->queries + t) * dim, x->scale, visible,
                             p);
        sparge_method_softmax(p, visible);
        for (int64_t key = 0; key < visible; key++) {
            float *to = &map[key * x->stride / g->block_k];
            *to = fmaxf(*to, p[key]);
        }
    }
    return p != NULL;
}

static sparge_status make_maps(sparge_plan *plan, proxies *x, sparge_piece **memory)
{
    const sparge_problem *p = x->problem;
    const int64_t dim = p->dim, gqa = p->heads / p->kv_heads, count = p->batch * x->groups,
                  rows = count * x->g.q_blocks;
    sparge_piece *all = NULL;
    const float *q = sparge_load_heads(&p->q, p->batch, p->heads, p->q_len, dim, &all),
                *k = sparge_load_heads(&p->k, p->batch, p->kv_heads, p->k_len, dim, &all);
    float *mean = sparge_take(&all, count * x->keys * dim + 1, sizeof *mean);
    bool made = q && k && mean;
    x->q = sparge_take(memory, count * x->queries * dim + 1, sizeof *x->q);
    x->k = sparge_take(memory, count + 1, sizeof *x->k);
    x->map = sparge_take(memory, rows * x->g.k_blocks + 1, sizeof *x->map);
    made = made && x->q && x->k && x->map;
    for (int64_t n = 0; n < count && made; n++) {
        const int64_t first = n % x->groups * x->group, b = n / x->groups,
                      heads = sparge_min(x->group, p->heads - first);
        float *k_mean = mean + n * x->keys * dim;
        add_means(q + (b * p->heads + first) * p->q_len * dim, heads, x, p->q_len,
                  x->q + n * x->queries * dim);
        add_means(k + (b * p->kv_heads + first / gqa) * p->k_len * dim, heads / gqa, x, p->k_len,
                  k_mean);
        x->k[n] = sparge_method_panels(k_mean, x->keys, dim, memory);
        made = x->k[n].x != NULL;
    }
    sparge_release(&all);
    for (int64_t t = 0; t < x->queries; t++)
        plan->multiply_adds +=
            (double)(count * dim) *
            (double)sparge_ceil_div(sparge_keys_of_query(&x->g, t * x->stride), x->stride);
    plan->multiply_adds +=
        (double)(p->batch * dim) * (double)(p->heads * x->queries + p->kv_heads * x->keys);
    return made ? sparge_each_step(plan, rows, fill_row, x) : SPARGE_ERR_MEMORY;
}

/* How many of the blocks that the last queries of a head see have gamma of what they pay. */
static int64_t find_budget(const sparge_head *head, int64_t visible, float *p, double *mass,
                           sparge_ranked *x)
{
    const sparge_geometry *g = &head->g;
    double total = 0.0;
    for (int64_t t = sparge_max(0, g->q_len - g->block_q); t < g->q_len; t++) {
        sparge_method_row(head, t, p);
        sparge_method_add_blocks(head, p, mass);
    }
    for (int64_t j = 0; j < visible; j++) {
        x[j] = (sparge_ranked){(float)mass[j], j};
        total += (double)x[j].score;
    }
    sparge_rank(x, visible);
    return head->param[GAMMA] < 1.0
               ? sparge_max(1, sparge_count_mass(x, visible, head->param[GAMMA] * total, true))
               : visible;
}

/* The ranking of a head, a row of key blocks for each row of blocks. */
static const float *map_of(const sparge_head *head)
{
    const proxies *all = head->shared;
    const int64_t proxy = head->b * all->groups + head->h / all->group;
    return all->map + proxy * head->g.q_blocks * head->g.k_blocks;
}

static sparge_status keep_above(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    double *share = sparge_take(head->scratch, g->k_blocks + 1, sizeof *share);
    for (int64_t i = 0; i < g->q_blocks && share; i++) {
        for (int64_t j = 0; j < g->k_blocks; j++)
            share[j] = (double)map_of(head)[i * g->k_blocks + j];
        sparge_keep_shares(head, i, share, head->param[T]);
    }
    return share ? SPARGE_OK : SPARGE_ERR_MEMORY;
}

static sparge_status keep_proxyattn(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const int64_t last = g->q_blocks ? sparge_blocks_visible(g, g->q_blocks - 1) : 0;
    float *p = sparge_take(head->scratch, g->k_len + 1, sizeof *p);
    double *mass = sparge_take(head->scratch, g->k_blocks + 1, sizeof *mass);
    sparge_ranked *x = sparge_take(head->scratch, g->k_blocks + 1, sizeof *x);
    if (!p || !mass || !x)
        return SPARGE_ERR_MEMORY;
    const int64_t budget = last ? find_budget(head, last, p, mass, x) : 0;
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t visible = sparge_blocks_visible(g, i);
        const float *map = map_of(head) + i * g->k_blocks;
        if (visible == 0)
            continue;
        const int64_t count = sparge_ceil_div(budget * visible, last);
        for (int64_t j = 0; j < visible; j++)
            x[j] = (sparge_ranked){map[j], j};
        sparge_rank_best(x, visible, count);
        for (int64_t e = 0; e < count; e++)
            sparge_keep(head, i, x[e].at);
        sparge_keep_diagonal(head, i);
        if (g->causal != SPARGE_CAUSAL_NONE)
            sparge_keep(head, i, 0);
    }
    return SPARGE_OK;
}

/* name: for messages. */
static sparge_status plan_by(const char *name, sparge_head_function *keep, sparge_plan *plan,
                             const sparge_context *context, const double *param,
                             sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    const int64_t stride = (int64_t)param[STRIDE], block = (int64_t)param[BLOCK],
                  gqa = p->heads / p->kv_heads,
                  group = param[GROUP] > 0.0 ? (int64_t)param[GROUP] : p->heads;
    if (block % stride != 0)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "block of %s is %lld, it must be a multiple of stride, %lld", name,
                           (long long)block, (long long)stride);
    if (group % gqa != 0)
        return sparge_fail(
            error, SPARGE_ERR_ARGUMENT,
            "group of %s is %lld, it must be a multiple of the query heads that share "
            "keys, %lld",
            name, (long long)group, (long long)gqa);
    proxies x = {
        .problem = p,
        .g = sparge_geometry_make(p->q_len, p->k_len, block, block, plan->options.causal),
        .scale = plan->options.softmax_scale,
        .stride = stride,
        .group = group,
        .groups = sparge_ceil_div(p->heads, group),
        .queries = sparge_ceil_div(p->q_len, stride),
        .keys = sparge_ceil_div(p->k_len, stride),
    };
    sparge_piece *memory = NULL;
    sparge_status status = make_maps(plan, &x, &memory);
    if (!status)
        status = sparge_each_head(
            plan, context, param,
            &(sparge_walk){.block_q = block, .block_k = block, .shared = &x, .visit = keep}, error);
    sparge_release(&memory);
    return status;
}

static sparge_status plan_proxyattn(sparge_plan *plan, const sparge_context *context,
                                    const double *param, sparge_error *error)
{
    return plan_by("proxyattn", keep_proxyattn, plan, context, param, error);
}

static sparge_status plan_proxyattn_t(sparge_plan *plan, const sparge_context *context,
                                      const double *param, sparge_error *error)
{
    return plan_by("proxyattn_t", keep_above, plan, context, param, error);
}

#define GROUPS                                                                                 \
    {"group", 0.0, 0x1p24, 0.0, true, "query heads with one ranking; 0: all"},                 \
        {"stride", 1.0, SPARGE_MAX_BLOCK, 4.0, true, "tokens of which the first counts"},      \
    {                                                                                          \
        "block", 1.0, SPARGE_MAX_BLOCK, 128.0, true, "tokens of a block, a multiple of stride" \
    }

const sparge_method sparge_method_proxyattn = {
    .name = "proxyattn",
    .title = "ProxyAttn: the ranking of a mean head, and each head's own budget",
    .paper = "arXiv 2509.24745",
    .repository = "",
    .commit = "",
    .kind = "training-free",
    .evidence = "",
    .param = {{"gamma", 0.0, 1.0, 0.95, false, "mass of the last queries' key blocks to keep"},
              GROUPS},
    .plan = plan_proxyattn,
};

const sparge_method sparge_method_proxyattn_t = {
    .name = "proxyattn_t",
    .title = "ProxyAttn's scores above a threshold",
    .paper = "arXiv 2509.24745",
    .repository = "",
    .commit = "",
    .kind = "training-free",
    .evidence = "",
    .falls = true,
    .param = {{"t", 0.0, INFINITY, 0.2, false, "mass above which a block is kept, in even shares"},
              GROUPS},
    .plan = plan_proxyattn_t,
};
