/* SPDX-License-Identifier: Apache-2.0 */
/* block_mask.h: one row of the block mask, one bit per key block. A row of NULL keeps every block:
 * dense attention. */
#ifndef SPARGE_COMMON_BLOCK_MASK_H
#define SPARGE_COMMON_BLOCK_MASK_H

#include "common/num.h"

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

#endif
