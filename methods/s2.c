/* SPDX-License-Identifier: Apache-2.0 */
/* s2.c: S2-Attention: Hardware-Aware Context Sharding Among Attention Heads, arXiv 2407.17678. The
 * authors' kernel library, github.com/microsoft/dkernel at ce4bea4, has no code; the mask is that
 * of Phi-3-small, which was read in github.com/vllm-project/vllm at 00e3ddc.
 *
 * A row of blocks attends to the `local` nearest blocks, its own counted, and to every `stride`-th
 * block from block stride - 1 on. Each head begins elsewhere, stride / heads blocks earlier than
 * the one before it, rounded down, and at least one: together the heads have all blocks. With
 * `homo` they all begin at the same place.
 *
 * Ours: the number of query heads is that of the call. A query stands where its last visible key
 * does; a row whose queries stand in two blocks has what either of them has. Phi-3-small has dense
 * attention in every second layer, which is the caller's to do. */
#include "methods/entries.h"
#include "methods/method.h"

enum { LOCAL, STRIDE, BLOCK, HOMO };

static bool is_kept(const sparge_head *head, int64_t at, int64_t j)
{
    const int64_t stride = (int64_t)head->param[STRIDE],
                  step =
                      head->param[HOMO] != 0.0 ? 0 : sparge_max(1, stride / head->problem->heads);
    return (double)(at - j) < head->param[LOCAL] || (j + head->h * step + 1) % stride == 0;
}

static sparge_status keep_strides(const sparge_head *head, sparge_error *error)
{
    (void)error;
    sparge_keep_by_place(head, is_kept);
    return SPARGE_OK;
}

static sparge_status plan_s2(sparge_plan *plan, const sparge_context *context, const double *param,
                             sparge_error *error)
{
    const int64_t block = (int64_t)param[BLOCK];
    return sparge_each_head(
        plan, context, param,
        &(sparge_walk){.block_q = block, .block_k = block, .blind = true, .visit = keep_strides},
        error);
}

const sparge_method sparge_method_s2 = {
    .name = "s2",
    .title = "S2-Attention, the mask of Phi-3-small",
    .paper = "arXiv 2407.17678",
    .repository = "github.com/vllm-project/vllm",
    .commit = "00e3ddc",
    .kind = "static; trained with it, runs without",
    .evidence = "1063943 of 1063943 blocks, 210861508 of 211529868 pairs",
    .needs = SPARGE_NEEDS_CAUSAL,
    .param = {{"local", 1.0, 0x1p24, 16.0, true, "nearest blocks, the own counted"},
              {"stride", 1.0, 0x1p24, 8.0, true, "one of so many other blocks is kept"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 64.0, true, "tokens of a block"},
              {"homo", 0.0, 1.0, 0.0, true, "all heads keep the same blocks"}},
    .plan = plan_s2,
};
