/* SPDX-License-Identifier: Apache-2.0 */
/* moa.c: MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, arXiv
 * 2406.14909; github.com/thu-nics/MoA at e224fe3.
 *
 * A row of blocks attends to the first block and to the nearest ones, of which each head has its
 * own number: alpha + beta N for N tokens, counted in blocks, alpha rounded down before the sum and
 * the sum after it, and at least one. `context.first` gives each head its own beta. Heads get
 * alpha and beta from a search that is made once: among windows in steps of 1024 tokens and an
 * eighth, those of least loss together under a limit of density.
 *
 * Ours: the tail is a block like the others. A query stands where its last visible key does; a row
 * whose queries stand in two blocks has what either of them has.
 *
 * moa_calibrated makes such a search itself, where they ask for a model: their loss is the change
 * of the model's loss to first order, by its gradients, and ours is the attention that a head
 * drops, summed over the heads. It is measured at the first call, for all queries of the first
 * batch and windows of 0 to 64 sixty-fourths of the sequence, the diagonal block always among them
 * (alpha is 0). That stays in the context's state for later calls of the layer, of any length;
 * without a state each call is measured itself. The budget is the share of the visible pairs, in
 * the mean of all heads. It is spent where it saves most for each pair: along the lower convex hull
 * of each head, of equal gains the lower head first, and what is left on the next head as far as it
 * goes. Where nothing is left no other choice drops less. A head with a density of its own has
 * the window that it gets in a call of that budget. multiply_adds counts the measuring. */
#include <math.h>
#include <string.h>

#include "methods/entries.h"
#include "methods/method.h"

/* ---- moa ---- */

enum { BETA, ALPHA, BLOCK, SINK };

static bool is_in_band(const sparge_head *head, int64_t at, int64_t j)
{
    const double *p = head->param, alpha = floor(p[ALPHA] / p[BLOCK]),
                 blocks = fmax(1.0, floor(alpha + p[BETA] * (double)head->g.k_blocks));
    return (double)(at - j) < blocks || (double)j < p[SINK];
}

static sparge_status keep_band(const sparge_head *head, sparge_error *error)
{
    (void)error;
    sparge_keep_by_place(head, is_in_band);
    return SPARGE_OK;
}

static sparge_status plan_moa(sparge_plan *plan, const sparge_context *context, const double *param,
                              sparge_error *error)
{
    const int64_t block = (int64_t)param[BLOCK];
    return sparge_each_head(
        plan, context, param,
        &(sparge_walk){.block_q = block, .block_k = block, .blind = true, .visit = keep_band},
        error);
}

const sparge_method sparge_method_moa = {
    .name = "moa",
    .title = "MoA: the first block, and a window that grows with the sequence",
    .paper = "arXiv 2406.14909",
    .repository = "github.com/thu-nics/MoA",
    .commit = "e224fe3",
    .kind = "static",
    .evidence = "1622868 of 1622868 blocks",
    .needs = SPARGE_NEEDS_CAUSAL,
    .param = {{"beta", 0.0, 1.0, 0.5, false, "share of the sequence that the window grows by"},
              {"alpha", -0x1p24, 0x1p24, 0.0, true, "tokens that are added to it"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 64.0, true, "tokens of a block"},
              {"sink", 0.0, 0x1p24, 1.0, true, "first blocks"}},
    .plan = plan_moa,
};

/* ---- moa_calibrated ---- */

enum { DENSITY, CALIBRATED_BLOCK, CALIBRATED_SINK };
enum { WINDOWS = 64 }; /* of the whole sequence */

typedef struct calibration {
    sparge_geometry g;
    int64_t sink;
    double (*dropped)[WINDOWS + 1]; /* of each head, by window: kept from call to call */
    int64_t pairs[WINDOWS + 1];     /* that a head keeps */
    int64_t *blocks;                /* of each head's window */
} calibration;

static int64_t blocks_of(const calibration *c, int64_t window)
{
    return sparge_max(1, c->g.k_blocks * window / WINDOWS);
}

/* How many blocks block j lies before the first query of row i. */
static int64_t distance_of(const sparge_geometry *g, int64_t i, int64_t j)
{
    return sparge_max(0, sparge_place_of(g, i * g->block_q) / g->block_k - j);
}

static void count_pairs(calibration *c)
{
    const sparge_geometry *g = &c->g;
    memset(c->pairs, 0, sizeof c->pairs);
    for (int64_t i = 0; i < g->q_blocks; i++)
        for (int64_t j = 0; j < sparge_blocks_visible(g, i); j++) {
            const int64_t first = i * g->block_q, distance = distance_of(g, i, j),
                          pairs = sparge_pairs_visible(
                              g, first, sparge_block_rows(g->q_len, g->block_q, i), j);
            for (int64_t w = WINDOWS; w >= 0 && (j < c->sink || distance < blocks_of(c, w)); w--)
                c->pairs[w] += pairs;
        }
}

static sparge_status measure(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const calibration *c = head->shared;
    const sparge_geometry *g = &head->g;
    double *to = c->dropped[head->h];
    double *mass = sparge_take(head->scratch, g->k_blocks + 1, sizeof *mass);
    double *far = sparge_take(head->scratch, g->k_blocks + 2, sizeof *far); /* by distance */
    float *p = sparge_take(head->scratch, g->k_len + 1, sizeof *p);
    if (!mass || !far || !p)
        return SPARGE_ERR_MEMORY;
    for (int64_t t = 0; t < g->q_len; t++) {
        sparge_method_row(head, t, p);
        sparge_method_add_blocks(head, p, mass);
        if ((t + 1) % g->block_q && t + 1 < g->q_len)
            continue;
        for (int64_t j = c->sink; j < g->k_blocks; j++)
            far[distance_of(g, t / g->block_q, j)] += mass[j] / (double)g->q_len;
        memset(mass, 0, (size_t)g->k_blocks * sizeof *mass);
    }
    for (int64_t distance = g->k_blocks - 1; distance > 0; distance--)
        far[distance - 1] += far[distance];
    for (int64_t w = 0; w <= WINDOWS; w++)
        to[w] = far[blocks_of(c, w)];
    return SPARGE_OK;
}

/* A step of a head along its hull. */
typedef struct step {
    int64_t from, to; /* windows; the same: there is none */
    double gain;      /* for each pair */
} step;

static step next_step(const calibration *c, int64_t h, int64_t from)
{
    const double *dropped = c->dropped[h];
    step s = {from, from, -1.0};
    for (int64_t w = from + 1; w <= WINDOWS; w++) {
        const int64_t pairs = c->pairs[w] - c->pairs[from];
        const double gain = pairs ? (dropped[from] - dropped[w]) / (double)pairs : -1.0;
        if (pairs && gain >= s.gain)
            s = (step){from, w, gain};
    }
    return s;
}

/* The windows of all heads for a budget. */
static void spend(const calibration *c, int64_t heads, double density, step *next)
{
    int64_t left =
        (int64_t)(density * (double)heads * (double)c->pairs[WINDOWS]) - heads * c->pairs[0];
    for (int64_t h = 0; h < heads; h++)
        next[h] = next_step(c, h, 0);
    while (left > 0) {
        step *best = &next[0];
        for (int64_t h = 1; h < heads; h++)
            if (next[h].gain > best->gain)
                best = &next[h];
        int64_t to = best->to;
        while (c->pairs[to] - c->pairs[best->from] > left)
            to--;
        const bool whole = to == best->to && to > best->from;
        left = whole ? left - (c->pairs[to] - c->pairs[best->from]) : 0;
        *best = next_step(c, best - next, to);
    }
}

static bool is_in_window(const sparge_head *head, int64_t at, int64_t j)
{
    const calibration *c = head->shared;
    return at - j < c->blocks[head->h] || j < c->sink;
}

static sparge_status keep_window(const sparge_head *head, sparge_error *error)
{
    (void)error;
    sparge_keep_by_place(head, is_in_window);
    return SPARGE_OK;
}

static sparge_status plan_calibrated(sparge_plan *plan, const sparge_context *context,
                                     const double *param, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    const int64_t block = (int64_t)param[CALIBRATED_BLOCK], heads = p->heads;
    calibration c = {
        .g = sparge_geometry_make(p->q_len, p->k_len, block, block, plan->options.causal),
        .sink = (int64_t)param[CALIBRATED_SINK],
        .blocks = sparge_take(&plan->memory, heads + 1, sizeof *c.blocks)};
    step *next = sparge_take(&plan->memory, heads + 1, sizeof *next);
    void *state;
    bool fresh;
    if (!c.blocks || !next)
        return SPARGE_ERR_MEMORY;
    sparge_status status = sparge_state(plan, context, "moa_calibrated",
                                        heads * (int64_t)sizeof *c.dropped, &fresh, &state, error);
    if (status)
        return status;
    c.dropped = state;
    sparge_walk walk = {
        .block_q = block, .block_k = block, .survey = true, .shared = &c, .visit = measure};
    if (fresh)
        status = sparge_each_head(plan, context, param, &walk, error);
    count_pairs(&c);
    for (int64_t h = 0; h < heads && !status; h++) {
        double own[SPARGE_MAX_PARAMS];
        if (h == 0 || context->first)
            spend(&c, heads, sparge_param_of(context, h, param, own)[DENSITY], next);
        c.blocks[h] = blocks_of(&c, next[h].from);
    }
    walk.survey = false;
    walk.visit = keep_window;
    return status ? status : sparge_each_head(plan, context, param, &walk, error);
}

const sparge_method sparge_method_moa_calibrated = {
    .name = "moa_calibrated",
    .title = "MoA with windows for the attention that each head drops",
    .paper = "arXiv 2406.14909",
    .repository = "",
    .commit = "",
    .kind = "static, after a calibration",
    .evidence = "",
    .needs = SPARGE_NEEDS_CAUSAL,
    .param = {{"density", 0.0, 1.0, 0.5, false, "share of the visible pairs, mean of the heads"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 64.0, true, "tokens of a block"},
              {"sink", 0.0, 0x1p24, 1.0, true, "first blocks"}},
    .plan = plan_calibrated,
};
