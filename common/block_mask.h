/* SPDX-License-Identifier: Apache-2.0 */
/* block_mask.h: one row of the block mask, one bit per key block, and which pairs of a block are
 * attended. A row of NULL keeps every block: dense attention. */
#ifndef SPARGE_COMMON_BLOCK_MASK_H
#define SPARGE_COMMON_BLOCK_MASK_H

#include "common/num.h"
#include "sparge.h"

SPARGE_HD int64_t sparge_mask_row_words(int64_t blocks) { return sparge_ceil_div(blocks, 32); }

SPARGE_HD void sparge_mask_row_set(uint32_t *row, int64_t block)
{
    row[block >> 5] |= 1u << (block & 31);
}

SPARGE_HD void sparge_mask_row_clear(uint32_t *row, int64_t block)
{
    row[block >> 5] &= ~(1u << (block & 31));
}

SPARGE_HD bool sparge_mask_row_get(const uint32_t *row, int64_t block)
{
    return row[block >> 5] >> (block & 31) & 1u;
}

/* The first set block in [from, blocks), or `blocks`: the loop that every backend runs. */
SPARGE_HD int64_t sparge_mask_row_next(const uint32_t *row, int64_t from, int64_t blocks)
{
    while (row && from < blocks && !sparge_mask_row_get(row, from))
        from = row[from >> 5] >> (from & 31) ? from + 1 : (from | 31) + 1; /* past an empty word */
    return sparge_min(from, blocks);
}

/* How many of the first `blocks` blocks are set. */
SPARGE_HD int64_t sparge_mask_row_count(const uint32_t *row, int64_t blocks)
{
    int64_t count = 0;
    for (int64_t j = sparge_mask_row_next(row, 0, blocks); j < blocks;
         j = sparge_mask_row_next(row, j + 1, blocks))
        count++;
    return count;
}

/* Word `at` of a row, without the bits from `blocks` on. */
SPARGE_HD uint32_t sparge_mask_row_word(const uint32_t *row, int64_t at, int64_t blocks)
{
    const int64_t left = blocks - 32 * at;
    const uint32_t among = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1u;
    return row ? row[at] & among : among;
}

/* ---- Blocks that are attended in part: a row of bits for each query of the block ---- */

/* Of key block j in row `line` of a mask: [block_q][sparge_mask_row_words(block_k)]; NULL: it is
 * attended whole. */
SPARGE_HD const uint32_t *sparge_mask_partial_at(const sparge_mask *mask, int64_t line, int64_t j,
                                                 int64_t block_q, int64_t block_k)
{
    if (!mask || !mask->partial_first)
        return NULL;
    const int64_t end = mask->partial_first[line + 1];
    int64_t low = mask->partial_first[line], high = end;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (mask->partial_block[middle] < j)
            low = middle + 1;
        else
            high = middle;
    }
    return low < end && mask->partial_block[low] == j
               ? mask->partial_bits + low * block_q * sparge_mask_row_words(block_k)
               : NULL;
}

/* 32 bits from bit `at` on of a row of so many words; beyond it they are 0. */
SPARGE_HD uint32_t sparge_mask_row_bits(const uint32_t *row, int64_t at, int64_t words)
{
    const int64_t word = at >> 5, shift = at & 31;
    const uint32_t low = word < words ? row[word] : 0, high = word + 1 < words ? row[word + 1] : 0;
    return shift ? low >> shift | high << (32 - shift) : low;
}

#endif
