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

/* The chunks of query t, the best first; how many it sees. */
static int64_t rank_chunks(const sparge_head *head, int64_t t, const sparge_panels *mean,
                           float *gate, sparge_ranked *x)
{
    const int64_t dim = head->problem->dim, chunk = (int64_t)head->param[CHUNK];
    const int64_t visible = sparge_keys_of_query(&head->g, t),
                  chunks = sparge_ceil_div(visible, chunk);
    sparge_method_scores(mean, head->q + t * dim, 1.0f, chunks, gate);
    for (int64_t c = 0; c < chunks; c++)
        x[c] = (sparge_ranked){gate[c], c};
    if (head->g.causal && chunks) /* its own */
        x[chunks - 1].score = INFINITY;
    *head->multiply_adds += (double)chunks * (double)dim;
    sparge_rank(x, chunks);
    return chunks;
}

static sparge_status keep_chunks(const sparge_head *head, sparge_error *error)
{
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim, topk = (int64_t)head->param[TOPK],
                  chunk = (int64_t)head->param[CHUNK], chunks = sparge_ceil_div(g->k_len, chunk);
    float *mean = sparge_take(head->scratch, chunks * dim + 1, sizeof *mean);
    float *gate = sparge_take(head->scratch, chunks + 1, sizeof *gate);
    sparge_ranked *x = sparge_take(head->scratch, chunks + 1, sizeof *x);
    const sparge_pairs pairs = sparge_pairs_make(head);
    if (!mean || !gate || !x || !pairs.bits)
        return SPARGE_ERR_MEMORY;
    sparge_method_pool(head->k, g->k_len, dim, chunk, false, mean);
    const sparge_panels means = sparge_method_panels(mean, chunks, dim, head->scratch);
    if (!means.x)
        return SPARGE_ERR_MEMORY;
    *head->multiply_adds += (double)g->k_len * (double)dim;
    sparge_status status = SPARGE_OK;
    for (int64_t i = 0; i < g->q_blocks && !status; i++) {
        sparge_pairs_clear(head, &pairs);
        for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++) {
            const int64_t count =
                sparge_min(topk, rank_chunks(head, i * g->block_q + r, &means, gate, x));
            for (int64_t e = 0; e < count; e++)
                sparge_pairs_range(head, &pairs, r, x[e].at * chunk, (x[e].at + 1) * chunk);
        }
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
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
