/* SPDX-License-Identifier: Apache-2.0 */
/* blockrank.c: BlockRank: Scalable In-context Ranking with Generative Models, arXiv 2510.05396;
 * github.com/nilesh2797/BlockRank at c6ddbf9.
 *
 * A prompt is an instruction, documents, and a query about them: the first segment, those between,
 * and the last one. A token of a document attends to the instruction and, causally, to its own
 * document; one of the instruction or the query to all that is before it.
 *
 * Ours: segments have lengths of their own, where the code pads them to the longest. A query stands
 * where its last visible key does. With one or two segments all is dense. Which document a middle
 * layer's query tokens attend to most, by which BlockRank ranks, is no mask. */
#include "methods/entries.h"
#include "methods/method.h"

static sparge_status keep_segments(const sparge_head *head, sparge_error *error)
{
    const sparge_geometry *g = &head->g;
    const int64_t *ends = head->context->segment_ends, last = head->context->segments - 1;
    const sparge_pairs pairs = sparge_pairs_make(head);
    sparge_status status = pairs.bits ? SPARGE_OK : SPARGE_ERR_MEMORY;
    int64_t n = 0; /* the segment of the query */
    for (int64_t i = 0; i < g->q_blocks && g->k_len && !status; i++) {
        sparge_pairs_clear(head, &pairs);
        for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++) {
            while (n < last && ends[n] <= sparge_place_of(g, i * g->block_q + r))
                n++;
            sparge_pairs_range(head, &pairs, r, 0, ends[n < last ? 0 : last]);
            sparge_pairs_range(head, &pairs, r, n ? ends[n - 1] : 0, ends[n]);
        }
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}

static sparge_status plan_blockrank(sparge_plan *plan, const sparge_context *context,
                                    const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param,
                            &(sparge_walk){.blind = true, .visit = keep_segments}, error);
}

const sparge_method sparge_method_blockrank = {
    .name = "blockrank",
    .title = "BlockRank: documents do not see each other",
    .paper = "arXiv 2510.05396",
    .repository = "github.com/nilesh2797/BlockRank",
    .commit = "c6ddbf9",
    .kind = "static; trained with it, runs without",
    .evidence = "1795372693 of 1795372693 pairs",
    .needs = SPARGE_NEEDS_CAUSAL | SPARGE_NEEDS_SEGMENTS,
    .plan = plan_blockrank,
};
