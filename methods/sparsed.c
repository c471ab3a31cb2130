/* SPDX-License-Identifier: Apache-2.0 */
/* sparsed.c: SparseD: Sparse Attention for Diffusion Language Models, arXiv 2509.24014;
 * github.com/INV-WZQ/SparseD at 52155b4.
 *
 * A diffusion language model attends both ways, step after step, to a prompt and to the tokens that
 * it generates. Its first steps are dense. In the last of them the exact attention of each query is
 * summed over blocks. Of each row of blocks the best are kept, a share of all and one more: of
 * these, those of the prompt. The same share and one more of the blocks of generated tokens is kept
 * by a softmax over these alone. A block in which the prompt ends belongs to it; the last block
 * never does. Later steps have the same mask.
 *
 * The code for Dream scales scores as the model does, which is done here; that for LLaDA divides
 * them by the root of the number of heads.
 *
 * Ours: steps are counted by the context, and `skip` is how many are dense (the code: a fifth of
 * all and two). Without dense steps the first call makes the map, and without a state each call
 * does. What is kept from call to call is the map, of which each call takes the share that it is
 * asked for. With a share of 1 all is kept (the code fails). Of equal blocks the earlier comes
 * first. multiply_adds counts the map where it is made, and leaves out softmax and ranking. */
#include <string.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { DENSITY, SKIP, PROMPT, BLOCK };

typedef struct maps {
    float *of_row;   /* [batch][heads][q_blocks][k_blocks + generated], what is kept */
    int64_t first;   /* block of generated tokens */
    bool fresh, all; /* is the map to be made, and is all to be kept? */
} maps;

/* The mass of each block for the queries of row i, and that of the generated ones by themselves. */
static void measure(const sparge_head *head, const maps *x, int64_t i, float *s, double *mass,
                    float *to)
{
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim, from = x->first * g->block_k;
    float *p = s + g->k_len;
    double *own = mass + g->k_blocks;
    memset(mass, 0, (size_t)(2 * g->k_blocks) * sizeof *mass);
    for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++) {
        const float *q = head->q + (i * g->block_q + r) * dim;
        sparge_method_scores(&head->keys, q, head->scale, g->k_len, s);
        memset(p, 0, (size_t)g->k_len * sizeof *p);
        memcpy(p + from, s + from, (size_t)(g->k_len - from) * sizeof *p);
        sparge_method_softmax(s, g->k_len);
        sparge_method_softmax(p + from, g->k_len - from);
        sparge_method_add_blocks(head, s, mass);
        sparge_method_add_blocks(head, p, own);
        *head->multiply_adds += (double)g->k_len * (double)dim;
    }
    for (int64_t j = 0; j < g->k_blocks; j++)
        *to++ = (float)mass[j];
    for (int64_t j = x->first; j < g->k_blocks; j++)
        *to++ = (float)own[j];
}

/* Keeps, of the best of n blocks from one on, those below `end`. */
static void keep_best(const sparge_head *head, int64_t i, const float *mass, int64_t from,
                      int64_t n, int64_t end, sparge_ranked *x)
{
    const int64_t count = sparge_min(n, (int64_t)((double)n * head->param[DENSITY]) + 1);
    for (int64_t e = 0; e < n; e++)
        x[e] = (sparge_ranked){mass[e], from + e};
    sparge_rank_best(x, n, count);
    for (int64_t e = 0; e < count; e++)
        if (x[e].at < end)
            sparge_keep(head, i, x[e].at);
}

static sparge_status keep_blocks(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const maps *x = head->shared;
    const int64_t blocks = g->k_blocks, generated = blocks - x->first;
    float *s = sparge_take(head->scratch, 2 * g->k_len + 1, sizeof *s);
    double *mass = sparge_take(head->scratch, 2 * blocks + 1, sizeof *mass);
    sparge_ranked *ranked = sparge_take(head->scratch, blocks + 1, sizeof *ranked);
    if (!s || !mass || !ranked)
        return SPARGE_ERR_MEMORY;
    for (int64_t i = 0; i < g->q_blocks; i++) {
        float *map = x->of_row + (head->n * g->q_blocks + i) * (blocks + generated);
        if (x->fresh)
            measure(head, x, i, s, mass, map);
        keep_best(head, i, map, 0, blocks, x->first, ranked);
        keep_best(head, i, map + blocks, x->first, generated, blocks, ranked);
        for (int64_t j = 0; j < blocks && x->all; j++)
            sparge_keep(head, i, j);
    }
    return SPARGE_OK;
}

static sparge_status plan_sparsed(sparge_plan *plan, const sparge_context *context,
                                  const double *param, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    const int64_t block = (int64_t)param[BLOCK], skip = (int64_t)param[SKIP],
                  blocks = sparge_ceil_div(p->k_len, block),
                  first = sparge_min(sparge_ceil_div((int64_t)param[PROMPT], block), blocks - 1);
    maps x = {.first = sparge_max(0, first), .all = context->step < skip};
    if (x.all && (!context->state || context->step < skip - 1)) {
        sparge_plan_add(plan);
        return SPARGE_OK;
    }
    const int64_t rows = p->batch * p->heads * sparge_ceil_div(p->q_len, block),
                  bytes = rows * (2 * blocks - x.first) * (int64_t)sizeof *x.of_row;
    void *state;
    sparge_status status = sparge_state(plan, context, "sparsed", bytes, &x.fresh, &state, error);
    if (status)
        return status;
    x.of_row = state;
    sparge_add_blocks(plan, block, block);
    return sparge_each_head(plan, context, param,
                            &(sparge_walk){.visit = keep_blocks, .shared = &x}, error);
}

const sparge_method sparge_method_sparsed = {
    .name = "sparsed",
    .title = "SparseD: the blocks of one step for all later ones",
    .paper = "arXiv 2509.24014",
    .repository = "github.com/INV-WZQ/SparseD",
    .commit = "52155b4",
    .kind = "training-free",
    .evidence = "192649 of 192649 blocks",
    .needs = SPARGE_NEEDS_NOT_CAUSAL,
    .param = {{"density", 0.0, 1.0, 0.3, false, "share of the blocks, to which one is added"},
              {"skip", 0.0, 0x1p24, 0.0, true, "first steps, which are dense"},
              {"prompt", 0.0, 0x1p40, 0.0, true, "first keys that are not generated"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 128.0, true, "tokens of a block"}},
    .plan = plan_sparsed,
};
