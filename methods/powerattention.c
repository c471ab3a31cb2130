/* SPDX-License-Identifier: Apache-2.0 */
/* powerattention.c: PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse
 * Attention, arXiv 2503.03588. Its code could not be had: the rule is that of the paper's text, in
 * the block form of its experiments.
 *
 * A row of blocks attends to its own block, to the blocks whose distance from it is a power of two,
 * to those nearer than `window`, and to the first `sink` blocks. Over d layers a token so reaches
 * all keys at a distance below 2^d.
 *
 * Ours: if not causal, the distance counts on both sides. A query stands where its last visible key
 * does; a row whose queries stand in two blocks has what either of them has. Models were trained on
 * with the mask: without that the paper finds much less of what it promises. */
#include "methods/entries.h"
#include "methods/method.h"

enum { WINDOW, SINK, BLOCK };

static bool is_kept(const sparge_head *head, int64_t at, int64_t j)
{
    const int64_t distance = at > j ? at - j : j - at;
    return (distance & (distance - 1)) == 0 || (double)distance < head->param[WINDOW] ||
           (double)j < head->param[SINK];
}

static sparge_status keep_powers(const sparge_head *head, sparge_error *error)
{
    (void)error;
    sparge_keep_by_place(head, is_kept);
    return SPARGE_OK;
}

static sparge_status plan_powerattention(sparge_plan *plan, const sparge_context *context,
                                         const double *param, sparge_error *error)
{
    const int64_t block = (int64_t)param[BLOCK];
    return sparge_each_head(
        plan, context, param,
        &(sparge_walk){.block_q = block, .block_k = block, .blind = true, .visit = keep_powers},
        error);
}

const sparge_method sparge_method_powerattention = {
    .name = "powerattention",
    .title = "PowerAttention: distances that are powers of two",
    .paper = "arXiv 2503.03588",
    .repository = "",
    .commit = "",
    .kind = "static; trained with it, runs without",
    .evidence = "",
    .param = {{"window", 0.0, 0x1p24, 5.0, true,
               "nearest blocks, the own counted; on both sides if not causal"},
              {"sink", 0.0, 0x1p24, 1.0, true, "first blocks"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 256.0, true, "tokens of a block"}},
    .plan = plan_powerattention,
};
