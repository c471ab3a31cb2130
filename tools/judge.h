/* SPDX-License-Identifier: Apache-2.0 */
/* judge.h: how good a mask is: the attention that it keeps, and where its blocks part from
 * another's. Those are arrays that end in [q_blocks][k_blocks], of a byte each, as mask_array and
 * files have them. */
#ifndef SPARGE_TOOLS_JUDGE_H
#define SPARGE_TOOLS_JUDGE_H

#include <jansson.h>

#include "tools/array.h"

/* Over rows that see a key and whose attention is a number. */
typedef struct recall {
    double share, worst_row; /* in [0, 1]: the mean, and the least; 1 where no row sees a key, NaN
                                where there is no such row */
    int64_t nonfinite;       /* rows whose attention is not a number: left out */
} recall;

/* The attention that a mask keeps, from the oracle's lse over it and over all keys: of one shape.
 */
recall judge_recall(const array *masked, const array *dense);

/* recall, worst_row_recall and rows_nonfinite; NULL: no memory. */
json_t *recall_json(const recall *r);

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
