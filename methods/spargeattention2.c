/* SPDX-License-Identifier: Apache-2.0 */
/* spargeattention2.c: the mask of SpargeAttention2: Trainable Sparse Attention via Hybrid
 * Top-k+Top-p Masking and Distillation Fine-Tuning, arXiv 2602.13515. No code of it was to be had:
 * the rule is that of the paper's description.
 *
 * A row's map is the softmax of its mean query over the mean keys of the blocks that it sees. It
 * keeps the best blocks, as many as are `topk` of those that it sees, or as have the mass `topp`
 * together, the one that reaches it among them: whichever are more. Top-k alone keeps too few of a
 * flat row, top-p too few of one whose mass is in a sink.
 *
 * Ours: at least one block of the ranking is kept, and topp 1 keeps every visible block. Causal,
 * the diagonal is kept beside them, as SpargeAttn does (the paper's models are not causal), and
 * block 0 is if `sink` is 1. A short last block has its own mean. Of equals the lower block comes
 * first; every query head chooses for itself. The defaults, 0.2 and 5 %, are those with which arXiv
 * 2610.05416 uses the rule. What trains a model to the mask is left out. Masks are nested in topp.
 * multiply_adds leaves softmax and ranking out. */
#include "common/select.h"
#include "methods/entries.h"
#include "methods/method.h"

enum { TOPP, TOPK, SINK };

static sparge_status keep_best(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim;
    const double topp = head->param[TOPP];
    float *q = sparge_take(head->scratch, g->q_blocks * dim + 1, sizeof *q),
          *k = sparge_take(head->scratch, g->k_blocks * dim + 1, sizeof *k),
          *p = sparge_take(head->scratch, g->k_blocks + 1, sizeof *p);
    sparge_ranked *x = sparge_take(head->scratch, g->k_blocks + 1, sizeof *x);
    if (!q || !k || !p || !x)
        return SPARGE_ERR_MEMORY;
    sparge_method_pool(head->q, g->q_len, dim, g->block_q, false, q);
    sparge_method_pool(head->k, g->k_len, dim, g->block_k, false, k);
    *head->multiply_adds += (double)(g->q_len + g->k_len) * (double)dim;
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t visible = sparge_blocks_visible(g, i);
        if (visible == 0)
            continue;
        sparge_method_pooled_row(head, q + i * dim, k, visible, p);
        for (int64_t j = 0; j < visible; j++)
            x[j] = (sparge_ranked){p[j], j};
        sparge_rank(x, visible);
        const int64_t by_mass = topp < 1.0 ? sparge_count_mass(x, visible, topp, true) : visible,
                      count =
                          sparge_max(by_mass, sparge_topk_count((float)head->param[TOPK], visible));
        for (int64_t e = 0; e < count; e++)
            sparge_keep(head, i, x[e].at);
        sparge_keep_diagonal(head, i);
        if (head->param[SINK] != 0.0)
            sparge_keep(head, i, 0);
    }
    return SPARGE_OK;
}

static sparge_status plan_spargeattention2(sparge_plan *plan, const sparge_context *context,
                                           const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param, &(sparge_walk){.visit = keep_best}, error);
}

const sparge_method sparge_method_spargeattention2 = {
    .name = "spargeattention2",
    .title = "SpargeAttention2: top-k or top-p of mean blocks, whichever is more",
    .paper = "arXiv 2602.13515",
    .repository = "",
    .commit = "",
    .kind = "trained with it, runs without",
    .evidence = "",
    .param = {{"topp", 0.0, 1.0, 0.2, false, "mass of the key blocks to keep"},
              {"topk", 0.0, 1.0, 0.05, false, "share of the visible key blocks to keep at least"},
              {"sink", 0.0, 1.0, 0.0, true, "keep key block 0 always"}},
    .plan = plan_spargeattention2,
};
