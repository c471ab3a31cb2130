/* SPDX-License-Identifier: Apache-2.0 */
/* yardsticks.c: what a method is measured against: everything, chance, the nearest keys, and the
 * masks that know the true attention. Those of blocks keep the diagonal if causal, as SpargeAttn
 * does, so that no query is without a key. */
#include <math.h>
#include <string.h>

#include "common/select.h"
#include "methods/entries.h"
#include "methods/method.h"

#define OURS .paper = "", .repository = "", .commit = "", .kind = "yardstick", .evidence = ""

/* ---- dense ---- */

static sparge_status plan_dense(sparge_plan *plan, const sparge_context *context,
                                const double *param, sparge_error *error)
{
    (void)context, (void)param, (void)error;
    sparge_plan_add(plan);
    return SPARGE_OK;
}

const sparge_method sparge_method_dense = {
    .name = "dense", .title = "All pairs", OURS, .plan = plan_dense};

/* ---- random ---- */

enum { DENSITY, SEED };

static int64_t kept_of_row(const sparge_head *head, int64_t i)
{
    const sparge_mask *m = head->mask;
    return sparge_mask_row_count(m->bits + i * m->words, m->k_blocks);
}

/* Fills row i up to so many blocks, with the best of those that it lacks. */
static void fill_row(const sparge_head *head, int64_t i, sparge_ranked *x, int64_t visible,
                     int64_t count)
{
    int64_t kept = kept_of_row(head, i);
    sparge_rank(x, visible);
    for (int64_t e = 0; e < visible && kept < count; e++) {
        kept += !sparge_kept(head, i, x[e].at);
        sparge_keep(head, i, x[e].at);
    }
}

static sparge_status keep_random(const sparge_head *head, sparge_error *error)
{
    (void)error;
    sparge_ranked *x = sparge_take(head->scratch, head->g.k_blocks + 1, sizeof *x);
    for (int64_t i = 0; i < head->g.q_blocks && x; i++) {
        const int64_t visible = sparge_blocks_visible(&head->g, i);
        for (int64_t j = 0; j < visible; j++)
            x[j] = (sparge_ranked){
                (float)(sparge_hash((uint64_t)head->param[SEED], head->n, i, j) >> 40), j};
        sparge_keep_diagonal(head, i);
        fill_row(head, i, x, visible, sparge_topk_count((float)head->param[DENSITY], visible));
    }
    return x ? SPARGE_OK : SPARGE_ERR_MEMORY;
}

static sparge_status plan_random(sparge_plan *plan, const sparge_context *context,
                                 const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param,
                            &(sparge_walk){.blind = true, .visit = keep_random}, error);
}

const sparge_method sparge_method_random = {
    .name = "random",
    .title = "Random blocks",
    OURS,
    .param = {{"density", 0.0, 1.0, 0.5, false, "share of the visible key blocks of a row"},
              {"seed", 0.0, 0x1p53, 0.0, true, "of the choice"}},
    .plan = plan_random,
};

/* ---- window ---- */

enum { WINDOW, SINK_TOKENS };

static sparge_status keep_window(const sparge_head *head, sparge_error *error)
{
    const sparge_geometry *g = &head->g;
    const int64_t window = (int64_t)head->param[WINDOW], sink = (int64_t)head->param[SINK_TOKENS];
    const sparge_pairs pairs = sparge_pairs_make(head);
    sparge_status status = pairs.bits ? SPARGE_OK : SPARGE_ERR_MEMORY;
    for (int64_t i = 0; i < g->q_blocks && !status; i++) {
        sparge_pairs_clear(head, &pairs);
        for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++) {
            const int64_t now = sparge_place_of(g, i * g->block_q + r);
            sparge_pairs_range(head, &pairs, r, 0, sink);
            sparge_pairs_range(head, &pairs, r, now - window + 1, now + window);
        }
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}

static sparge_status plan_window(sparge_plan *plan, const sparge_context *context,
                                 const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param,
                            &(sparge_walk){.blind = true, .visit = keep_window}, error);
}

const sparge_method sparge_method_window = {
    .name = "window",
    .title = "First keys and nearest keys (StreamingLLM)",
    .paper = "arXiv 2309.17453",
    .repository = "",
    .commit = "",
    .kind = "yardstick",
    .evidence = "",
    .param = {{"window", 1.0, 0x1p24, 1024.0, true,
               "nearest keys, the query's own counted; on both sides if not causal"},
              {"sink", 0.0, 0x1p24, 4.0, true, "first keys"}},
    .plan = plan_window,
};

/* ---- oracle_mass ---- */

/* What the queries of each row of blocks pay to each key block, [q_blocks][k_blocks]. */
static void true_mass(const sparge_head *head, float *p, double *mass)
{
    const sparge_geometry *g = &head->g;
    for (int64_t t = 0; t < g->q_len; t++) {
        sparge_method_row(head, t, p);
        sparge_method_add_blocks(head, p, mass + t / g->block_q * g->k_blocks);
    }
}

static sparge_status keep_mass(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const int64_t blocks = g->q_blocks * g->k_blocks;
    float *p = sparge_take(head->scratch, g->k_len + 1, sizeof *p);
    double *mass = sparge_take(head->scratch, blocks + 1, sizeof *mass);
    sparge_ranked *x = sparge_take(head->scratch, blocks + 1, sizeof *x);
    if (!p || !mass || !x)
        return SPARGE_ERR_MEMORY;
    true_mass(head, p, mass);
    int64_t n = 0, kept = 0, all = 0; /* candidates; visible pairs of tokens */
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t visible = sparge_blocks_visible(g, i), first = i * g->block_q,
                      queries = sparge_block_rows(g->q_len, g->block_q, i);
        sparge_keep_diagonal(head, i);
        for (int64_t j = 0; j < visible; j++) {
            const int64_t tokens = sparge_pairs_visible(g, first, queries, j);
            all += tokens;
            if (sparge_kept(head, i, j))
                kept += tokens;
            else
                x[n++] = (sparge_ranked){(float)(mass[i * g->k_blocks + j] / (double)tokens),
                                         i * g->k_blocks + j};
        }
    }
    sparge_rank(x, n);
    for (int64_t e = 0; e < n; e++) {
        const int64_t i = x[e].at / g->k_blocks, j = x[e].at % g->k_blocks;
        kept +=
            sparge_pairs_visible(g, i * g->block_q, sparge_block_rows(g->q_len, g->block_q, i), j);
        if ((double)kept > head->param[DENSITY] * (double)all)
            break;
        sparge_keep(head, i, j);
    }
    for (int64_t e = 0; e < n && g->causal == SPARGE_CAUSAL_NONE; e++) { /* a row keeps its best */
        const int64_t i = x[e].at / g->k_blocks;
        if (kept_of_row(head, i) == 0)
            sparge_keep(head, i, x[e].at % g->k_blocks);
    }
    return SPARGE_OK;
}

static sparge_status plan_oracle_mass(sparge_plan *plan, const sparge_context *context,
                                      const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param, &(sparge_walk){.visit = keep_mass}, error);
}

static sparge_status keep_above(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    float *p = sparge_take(head->scratch, g->k_len + 1, sizeof *p);
    double *mass = sparge_take(head->scratch, g->q_blocks * g->k_blocks + 1, sizeof *mass);
    if (!p || !mass)
        return SPARGE_ERR_MEMORY;
    true_mass(head, p, mass);
    for (int64_t i = 0; i < g->q_blocks; i++)
        sparge_keep_shares(head, i, mass + i * g->k_blocks, head->param[0]);
    return SPARGE_OK;
}

static sparge_status plan_oracle_mass_t(sparge_plan *plan, const sparge_context *context,
                                        const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param, &(sparge_walk){.visit = keep_above}, error);
}

const sparge_method sparge_method_oracle_mass_t = {
    .name = "oracle_mass_t",
    .title = "The blocks whose attention is above a threshold",
    OURS,
    .falls = true,
    .param = {{"t", 0.0, INFINITY, 0.2, false, "mass above which a block is kept, in even shares"}},
    .plan = plan_oracle_mass_t,
};

const sparge_method sparge_method_oracle_mass = {
    .name = "oracle_mass",
    .title = "The blocks of a head with the most attention for each pair",
    OURS,
    .param = {{"density", 0.0, 1.0, 0.5, false, "share of the visible pairs of a head"}},
    .plan = plan_oracle_mass,
};

/* ---- oracle_pairs ---- */

static sparge_status keep_pairs(const sparge_head *head, sparge_error *error)
{
    const sparge_geometry *g = &head->g;
    float *p = sparge_take(head->scratch, g->k_len + 1, sizeof *p);
    sparge_ranked *x = sparge_take(head->scratch, g->k_len + 1, sizeof *x);
    const sparge_pairs pairs = sparge_pairs_make(head);
    sparge_status status = p && x && pairs.bits ? SPARGE_OK : SPARGE_ERR_MEMORY;
    for (int64_t i = 0; i < g->q_blocks && !status; i++) {
        sparge_pairs_clear(head, &pairs);
        for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++) {
            const int64_t t = i * g->block_q + r, visible = sparge_keys_of_query(g, t);
            sparge_method_row(head, t, p);
            for (int64_t key = 0; key < visible; key++)
                x[key] = (sparge_ranked){p[key], key};
            const int64_t count =
                sparge_min(visible, sparge_topk_count((float)head->param[DENSITY], visible));
            sparge_rank_best(x, visible, count);
            for (int64_t e = 0; e < count; e++)
                sparge_mask_row_set(pairs.bits + r * pairs.words, x[e].at);
        }
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}

static sparge_status plan_oracle_pairs(sparge_plan *plan, const sparge_context *context,
                                       const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param, &(sparge_walk){.visit = keep_pairs}, error);
}

const sparge_method sparge_method_oracle_pairs = {
    .name = "oracle_pairs",
    .title = "The pairs of a row with the most attention",
    OURS,
    .param = {{"density", 0.0, 1.0, 0.5, false, "share of the visible keys of a query"}},
    .plan = plan_oracle_pairs,
};
