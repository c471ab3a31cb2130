/* SPDX-License-Identifier: Apache-2.0 */
/* sparge_mask.h: masks of single (query, key) pairs: made, read, counted, and in other block sizes.
 *
 * All arrays are in host memory. Problem and options are those of the mask: they say which pairs
 * are visible and how large a block is. */
#ifndef SPARGE_MASK_H
#define SPARGE_MASK_H

#include "sparge.h"

SPARGE_BEGIN_DECLS

/* Sets the mask's row of blocks i by its pairs, [block_q][ceil(k_len / 32)]: bit t % 32 of word
 * t / 32 of query r of the block is set if it attends to key t. Pairs that are not visible are
 * ignored. A block of which nothing is attended is not computed, and one of which all is attended
 * is attended whole. Rows come in ascending order of (batch, head, i), each at most once. */
sparge_status sparge_mask_set_row(sparge_mask *mask, const sparge_problem *problem,
                                  const sparge_options *options, int64_t batch, int64_t head,
                                  int64_t i, const uint32_t *pairs, sparge_error *error);

/* The visible pairs of a row of blocks that are attended, in the form that sparge_mask_set_row
 * takes. Rows beyond the last query are 0. A mask of NULL is dense. */
void sparge_mask_get_row(const sparge_mask *mask, const sparge_problem *problem,
                         const sparge_options *options, int64_t batch, int64_t head, int64_t i,
                         uint32_t *pairs);

/* Which pairs of a block are attended, [block_q][ceil(block_k / 32)]; NULL: all. */
const uint32_t *sparge_mask_partial(const sparge_mask *mask, const sparge_options *options,
                                    int64_t batch, int64_t head, int64_t i, int64_t j);

/* Allocates a mask and sets it by its pairs, [batch][heads][q_len][k_len]: 0 is not attended. */
sparge_status sparge_mask_from_pairs(sparge_mask *mask, const sparge_problem *problem,
                                     const sparge_options *options, const uint8_t *pairs,
                                     sparge_error *error);

/* Writes 1 for each visible pair that the mask keeps and 0 for the others, whatever k_bias hides. A
 * mask of NULL is dense. */
sparge_status sparge_mask_to_pairs(const sparge_mask *mask, const sparge_problem *problem,
                                   const sparge_options *options, uint8_t *pairs,
                                   sparge_error *error);

/* Allocates another mask of the same pairs in the blocks of other options. NULL is dense. */
sparge_status sparge_mask_convert(const sparge_mask *from, const sparge_problem *problem,
                                  const sparge_options *options, const sparge_options *to_options,
                                  sparge_mask *to, sparge_error *error);

/* What attention over a mask counts if lambda skips nothing, of each of batch * heads. A mask of
 * NULL is dense. */
sparge_status sparge_mask_count(const sparge_mask *mask, const sparge_problem *problem,
                                const sparge_options *options, sparge_counts *head_counts,
                                sparge_error *error);

SPARGE_END_DECLS

#endif
