/* SPDX-License-Identifier: Apache-2.0 */
/* draft.c: DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance, arXiv
 * 2505.14708; github.com/shawnricecake/draft-attention at f3c81d5.
 *
 * Each frame is cut into patches of h x w tokens. Tokens are put in the order of the patches, so
 * that a patch is a block. Mean queries and mean keys of the blocks give a softmax over the blocks
 * of each row: the draft. Of all entries of a head's draft the smallest are left out, as many as
 * density says, but the largest of these and what equals it is kept. Blocks with text are kept, in
 * rows and in columns.
 *
 * Ours: where patches do not divide the frame, those at its edges are smaller, and it is blocks of
 * h * w tokens in the order of patches that are pooled (the code refuses such frames). All text
 * stands behind the video, where the code has it, and a block with any of it is one with text. Each
 * row keeps its best entry, of equals the earlier: by the rule of the head alone it may have none.
 * Each query head has a draft of its own. multiply_adds leaves out softmax and ranking. */
#include <math.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { DENSITY, HEIGHT, WIDTH };

/* The draft, [blocks][blocks], of the first blocks of q and k in an order. */
static bool draw(const sparge_head *head, const int64_t *order, int64_t blocks, float *draft)
{
    const int64_t tokens = head->g.k_len, dim = head->problem->dim, block = head->g.block_k;
    float *rows = sparge_take(head->scratch, tokens * dim + 1, sizeof *rows);
    float *q = sparge_take(head->scratch, head->g.q_blocks * dim + 1, sizeof *q);
    float *k = sparge_take(head->scratch, head->g.k_blocks * dim + 1, sizeof *k);
    if (!rows || !q || !k)
        return false;
    sparge_order_rows(head->q, order, tokens, dim, rows);
    sparge_method_pool(rows, tokens, dim, block, false, q);
    sparge_order_rows(head->k, order, tokens, dim, rows);
    sparge_method_pool(rows, tokens, dim, block, false, k);
    for (int64_t i = 0; i < blocks; i++)
        sparge_method_pooled_row(head, q + i * dim, k, blocks, draft + i * blocks);
    *head->multiply_adds += (double)(2 * tokens) * (double)dim;
    return true;
}

/* The least entry that is kept. */
static float threshold(const sparge_head *head, const float *draft, int64_t n, sparge_ranked *x)
{
    const int64_t smallest = (int64_t)((1.0 - head->param[DENSITY]) * (double)n),
                  count = sparge_min(n, n - smallest + 1);
    float least = INFINITY;
    for (int64_t e = 0; e < n; e++)
        x[e] = (sparge_ranked){draft[e], e};
    sparge_rank_best(x, n, count);
    for (int64_t e = 0; e < count; e++)
        least = fminf(least, x[e].score);
    return least;
}

static sparge_status keep_blocks(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const sparge_grid *grid = head->context->grid;
    const int64_t text = grid->text_before + grid->text_after, /* its blocks are the last */
        blocks = text ? (g->k_len - text) / g->block_k : g->k_blocks, n = blocks * blocks;
    int64_t *order = sparge_take(head->scratch, g->k_len + 1, sizeof *order);
    float *draft = sparge_take(head->scratch, n + 1, sizeof *draft);
    sparge_ranked *x = sparge_take(head->scratch, n + 1, sizeof *x);
    if (!order || !draft || !x)
        return SPARGE_ERR_MEMORY;
    sparge_order_frames(grid, (int64_t)head->param[HEIGHT], (int64_t)head->param[WIDTH], order);
    sparge_order_tokens(head, order);
    if (!draw(head, order, blocks, draft))
        return SPARGE_ERR_MEMORY;
    const float least = threshold(head, draft, n, x);
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const float *row = draft + i * blocks;
        int64_t best = 0;
        for (int64_t j = 1; j < blocks && i < blocks; j++)
            best = row[j] > row[best] ? j : best;
        for (int64_t j = 0; j < g->k_blocks; j++)
            if (i >= blocks || j >= blocks || j == best || row[j] >= least)
                sparge_keep(head, i, j);
    }
    return SPARGE_OK;
}

static sparge_status plan_draft(sparge_plan *plan, const sparge_context *context,
                                const double *param, sparge_error *error)
{
    const int64_t h = (int64_t)param[HEIGHT], w = (int64_t)param[WIDTH];
    if (h * w > SPARGE_MAX_BLOCK)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "h x w of draft is %lld x %lld, it must be at most %d tokens",
                           (long long)h, (long long)w, SPARGE_MAX_BLOCK);
    sparge_add_blocks(plan, h * w, h * w);
    sparge_status status = sparge_own_tokens(plan);
    if (!status)
        status =
            sparge_each_head(plan, context, param, &(sparge_walk){.visit = keep_blocks}, error);
    return status;
}

const sparge_method sparge_method_draft = {
    .name = "draft",
    .title = "DraftAttention: blocks are patches of a frame",
    .paper = "arXiv 2505.14708",
    .repository = "github.com/shawnricecake/draft-attention",
    .commit = "f3c81d5",
    .kind = "training-free",
    .evidence = "509011 of 509054 blocks",
    .needs = SPARGE_NEEDS_GRID | SPARGE_NEEDS_NOT_CAUSAL,
    .param = {{"density", 0.0, 1.0, 0.1, false, "share of the draft, the paper's 1 - sparsity"},
              {"h", 1.0, SPARGE_MAX_BLOCK, 8.0, true, "rows of a patch"},
              {"w", 1.0, SPARGE_MAX_BLOCK, 16.0, true, "tokens of a row of a patch"}},
    .plan = plan_draft,
};
