/* SPDX-License-Identifier: Apache-2.0 */
/* judge.h: how good a block mask is: the attention that it keeps, and where it parts from another.
 * Masks are arrays that end in [q_blocks][k_blocks], of a byte each, as mask_array and files have
 * them. */
#ifndef SPARGE_TOOLS_JUDGE_H
#define SPARGE_TOOLS_JUDGE_H

#include <jansson.h>

#include "tools/array.h"

typedef struct recall {
    double
        share; /* in [0, 1]; 1 where nothing is attended to, NaN where no attention is a number */
    int64_t nonfinite; /* blocks whose attention is not a number: left out */
} recall;

/* The share of the attention of all rows that a mask keeps; mass: the oracle's block_mass without a
 * mask, of the same shape. */
recall judge_recall(const array *mass, const array *keep, int64_t q_len, int64_t block_q);

typedef struct mask_difference {
    int64_t missing,
        extra; /* blocks that `want` keeps and `got` does not, and the other way round */
    int64_t first_missing, first_extra; /* elements, or -1 */
} mask_difference;

/* Two masks of one shape. */
mask_difference judge_masks(const array *got, const array *want);

/* missing, extra, first_missing and first_extra; NULL: no memory. */
json_t *judge_json(const array *mask, const mask_difference *d);

#endif
