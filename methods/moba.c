/* SPDX-License-Identifier: Apache-2.0 */
/* moba.c: MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189;
 * github.com/MoonshotAI/MoBA at 61e456b. Small chunks are those of FlashMoBA: Optimizing Mixture of
 * Block Attention, arXiv 2511.11571; github.com/mit-han-lab/flash-moba at 39d9ac0.
 *
 * Keys are cut into chunks. A query's gate for a chunk is its product with the mean key. Each query
 * attends to the chunk that it stands in, as far as causality lets it, and to those earlier chunks
 * whose gates are the largest, `topk` with its own; to all of them if there are fewer. The queries
 * of a block differ in that.
 *
 * Ours: a query stands where its last visible key does, which says what happens if there are other
 * numbers of keys than of queries. The tail is a chunk like the others. Of equal gates the earlier
 * chunk comes first (FlashMoBA's reference takes the later one). Query heads that share keys choose
 * each for itself. If not causal, no chunk is a query's own, as in FlashMoBA. Its convolution of
 * keys is trained and left out. multiply_adds leaves out the ranking. */
#include "methods/entries.h"
#include "methods/method.h"

enum { TOPK, CHUNK };

static sparge_status keep_chunks(const sparge_head *head, sparge_error *error)
{
    return sparge_keep_pages(head, head->q, (int64_t)head->param[CHUNK], (int64_t)head->param[TOPK],
                             error);
}

static sparge_status plan_moba(sparge_plan *plan, const sparge_context *context,
                               const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param, &(sparge_walk){.visit = keep_chunks}, error);
}

const sparge_method sparge_method_moba = {
    .name = "moba",
    .title = "MoBA, and FlashMoBA's small chunks",
    .paper = "arXiv 2502.13189",
    .repository = "github.com/MoonshotAI/MoBA",
    .commit = "61e456b",
    .kind = "trained with it, runs without",
    .evidence = "246760650 of 246760650 pairs, 10859128 of 10859128 chunks",
    .param = {{"topk", 1.0, 0x1p24, 3.0, true, "chunks of a query, its own counted if causal"},
              {"chunk", 1.0, 0x1p24, 128.0, true, "keys of a chunk; the papers have 4096 and 128"}},
    .plan = plan_moba,
};
