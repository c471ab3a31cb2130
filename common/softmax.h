/* softmax.h: one row of online softmax (Milakov & Gimelshein 2018; Algorithm 1 lines 11-13).
 * Scores are in log2 units, s = (q . k) * scale * log2 e, so that every exponential is an exp2. */
#ifndef SPARGE_COMMON_SOFTMAX_H
#define SPARGE_COMMON_SOFTMAX_H

#include "common/num.h"

typedef struct sparge_row {
    float max; /* m: the largest score so far; -inf before the first */
    float sum; /* l: the sum of exp2(score - m) so far */
} sparge_row;

SPARGE_HD sparge_row sparge_row_empty(void)
{
    sparge_row row;
    row.max = -INFINITY;
    row.sum = 0.0f;
    return row;
}

/* How near a block's largest score comes to the row's maximum, for the lambda test: +inf from a row
 * that has no maximum yet, -inf (no vote) where the row sees no key of the block. */
SPARGE_HD float sparge_row_gap(const sparge_row *row, float local)
{
    return local == -INFINITY ? -INFINITY : local - row->max;
}

/* Does a group of rows whose largest gap is this skip the block? Never without any visible key. */
SPARGE_HD bool sparge_group_skips(float gap, float lambda)
{
    return gap > -INFINITY && gap <= lambda * SPARGE_LOG2E;
}

/* Raises the maximum to at least `local` and returns the factor by which everything that was
 * accumulated under the old one shrinks. */
SPARGE_HD float sparge_row_raise(sparge_row *row, float local)
{
    if (!(local > row->max))
        return 1.0f;
    const float shrink = sparge_exp2(row->max - local);
    row->max = local;
    row->sum *= shrink;
    return shrink;
}

/* exp2(scale * score - max): the weight of a score under a maximum that it cannot exceed; only the
 * rounding of the product can, and is cut. NaN for NaN, as fminf would not give. */
SPARGE_HD float sparge_weight(float score, float scale, float max)
{
    const float below = fmaf(score, scale, -max);
    return sparge_exp2(below > 0.0f ? 0.0f : below);
}

/* The state of two disjoint sets of keys together; outputs add as o = a_share * o_a + b_share * o_b
 * (unnormalised). */
SPARGE_HD sparge_row sparge_row_merge(sparge_row a, sparge_row b, float *a_share, float *b_share)
{
    const float max = a.max > b.max ? a.max : b.max;
    const float a_shrink = a.max == -INFINITY ? 0.0f : sparge_exp2(a.max - max);
    const float b_shrink = b.max == -INFINITY ? 0.0f : sparge_exp2(b.max - max);
    sparge_row both;
    both.max = max;
    both.sum = fmaf(a.sum, a_shrink, b.sum * b_shrink);
    *a_share = a_shrink;
    *b_share = b_shrink;
    return both;
}

/* A row that saw no key. (A sum of 0 under a maximum is none: scores overflowed, and o is NaN.) */
SPARGE_HD bool sparge_row_is_empty(const sparge_row *row) { return row->max == -INFINITY; }

/* What the accumulated output is multiplied by; a row that saw no key attends to nothing. */
SPARGE_HD float sparge_row_norm(const sparge_row *row)
{
    return sparge_row_is_empty(row) ? 0.0f : 1.0f / row->sum;
}

/* log of the sum of exp(natural score): -inf for a row that saw no key. */
SPARGE_HD float sparge_row_lse(const sparge_row *row)
{
    if (sparge_row_is_empty(row))
        return -INFINITY;
    return (float)(((double)row->max + log2((double)row->sum)) * 0.69314718055994530942);
}

#endif
