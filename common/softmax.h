/* SPDX-License-Identifier: Apache-2.0 */
/* softmax.h: one row of online softmax (Milakov & Gimelshein 2018; Algorithm 1 lines 11-13).
 * Scores are in log2 units, s = (q . k) * scale * log2 e, so that every exponential is an exp2. */
#ifndef SPARGE_COMMON_SOFTMAX_H
#define SPARGE_COMMON_SOFTMAX_H

#include "common/num.h"

/* A row that has seen no key has the maximum -inf and the sum 0. One that has seen scores of -inf
 * alone has no weights either, but is not empty: its sum is NaN until a finite score comes. A
 * maximum of +inf or NaN stays, and the sum beside it is NaN: o and lse of such a row are NaN. */
typedef struct sparge_row {
    float max; /* m: the largest score so far */
    float sum; /* l: the sum of exp2(score - m) so far */
} sparge_row;

SPARGE_HD sparge_row sparge_row_empty(void)
{
    sparge_row row;
    row.max = -INFINITY;
    row.sum = 0.0f;
    return row;
}

/* A row's largest score in a block, m_local, from the largest visible s: one rounding, as every
 * score has, so that no score is above it. A score of 0 has no sign. NaN if some s is a NaN or the
 * scale is not finite. */
SPARGE_HD float sparge_row_local(float most, float scale)
{
    return sparge_finite(scale) ? scale * most + 0.0f : NAN;
}

/* A score with the bias of its key, in log2 units: from then on its scale is 1. Two roundings. NaN
 * if the scale is not finite. A bias of -inf hides the key instead. */
SPARGE_HD float sparge_score_biased(float s, float scale, float bias)
{
    return sparge_finite(scale) ? scale * s + bias * SPARGE_LOG2E : NAN;
}

SPARGE_HD bool sparge_bias_hides(float bias) { return bias == -INFINITY; }

/* ---- Lambda (lines 14-16) ---- */

/* How near a block's largest score comes to the row's maximum: -inf (no vote) if the row sees no
 * key of the block, +inf from a row that has no maximum yet or meets a NaN. */
SPARGE_HD float sparge_row_gap(const sparge_row *row, float local, bool sees)
{
    const float gap = local - row->max;
    if (!sees)
        return -INFINITY;
    return row->max == -INFINITY || gap != gap ? INFINITY : gap < -FLT_MAX ? -FLT_MAX : gap;
}

/* Does a row of this gap keep its group from skipping the block? Not if it sees no key of it. */
SPARGE_HD bool sparge_gap_is_near(float gap, float lambda) { return gap > lambda * SPARGE_LOG2E; }

/* Does a group of rows whose largest gap is this skip the block? Never without any visible key. */
SPARGE_HD bool sparge_group_skips(float gap, float lambda)
{
    return gap > -INFINITY && !sparge_gap_is_near(gap, lambda);
}

/* ---- The running maximum (line 11). Every exponential is exp2 of a function here that ends in
 * _log2, so that a kernel may take the hardware's instead of sparge_exp2. ---- */

/* Whether `max` stays after a block whose largest score is `local`; a NaN does. */
SPARGE_HD bool sparge_max_stays(float max, float local) { return local <= max || max != max; }

/* The maximum after that block. */
SPARGE_HD float sparge_max_update(float max, float local)
{
    return sparge_max_stays(max, local) ? max : local;
}

/* exp2 of it is the factor by which everything that was accumulated under `max` shrinks then. */
SPARGE_HD float sparge_shrink_log2(float max, float local)
{
    return sparge_max_stays(max, local) ? 0.0f : max - local;
}

/* The row after that block, by that factor. A row that sees no key of the block, with a local of
 * -inf, stays as it is. No branch, so that a loop of it becomes vectors. */
SPARGE_HD sparge_row sparge_row_shrunk(sparge_row row, float local, float shrink)
{
    sparge_row after;
    after.max = sparge_max_update(row.max, local);
    after.sum = row.max == -INFINITY && local != -INFINITY ? 0.0f : row.sum * shrink;
    return after;
}

/* Updates the maximum to at least `local`, the largest score of a block of which the row sees a
 * key, and returns the factor. A row that sees scores of -inf alone is not empty any more. */
SPARGE_HD float sparge_row_update_max(sparge_row *row, float local)
{
    const float shrink = sparge_exp2(sparge_shrink_log2(row->max, local));
    if (local == -INFINITY && row->max == -INFINITY)
        row->sum = NAN;
    *row = sparge_row_shrunk(*row, local, shrink);
    return shrink;
}

/* ---- Weights (lines 12 and 13) ---- */

/* What is subtracted from scores under this maximum: 0 if there is none, so that -inf stays -inf.
 */
SPARGE_HD float sparge_row_base(float max) { return max == -INFINITY ? 0.0f : max; }

/* exp2 of it is the weight of a score, where base is sparge_row_base of the row's maximum: exactly
 * 1 at the maximum, since both are rounded alike, and 0 of a score of -inf. */
SPARGE_HD float sparge_weight_log2(float score, float scale, float base)
{
    return scale * score - base;
}

SPARGE_HD float sparge_weight(float score, float scale, float max)
{
    return sparge_exp2(sparge_weight_log2(score, scale, sparge_row_base(max)));
}

/* The code, 0 .. qmax, of a weight; 0 of a NaN. */
SPARGE_HD int32_t sparge_code(float weight, int qmax)
{
    return weight <= 1.0f ? (int32_t)fmaf((float)qmax, weight, 0.5f) : 0;
}

/* exp2 of it is the weight of a score beside the largest visible one of its tile. Integers are
 * subtracted exactly. */
SPARGE_HD float sparge_code_log2(float score, float most, float scale)
{
    return scale * (score - most);
}

SPARGE_HD int32_t sparge_weight_code(float score, float most, float scale, int qmax)
{
    return sparge_code(sparge_exp2(sparge_code_log2(score, most, scale)), qmax);
}

/* What a code of that tile weighs under the row's maximum: exp2(local - max) / qmax, and 0 if all
 * scores of the tile are -inf. */
SPARGE_HD float sparge_code_weight(float local, float max, int qmax)
{
    return sparge_exp2(local == -INFINITY ? local : local - max) / (float)qmax;
}

/* ---- The end of a row (lines 20 and 21) ---- */

/* It saw no key. */
SPARGE_HD bool sparge_row_is_empty(const sparge_row *row)
{
    return row->max == -INFINITY && row->sum == 0.0f;
}

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

/* The same where smoothing took `mean_score` = softmax_scale * (q . mean key) off every score. */
SPARGE_HD float sparge_row_lse_smoothed(const sparge_row *row, float mean_score)
{
    return sparge_row_is_empty(row) ? -INFINITY : sparge_row_lse(row) + mean_score;
}

/* A row that met a query or a key that is not finite: o and lse are NaN, unless it saw no key. */
SPARGE_HD sparge_row sparge_row_nonfinite(sparge_row row)
{
    if (!sparge_row_is_empty(&row))
        row.sum = NAN;
    return row;
}

#endif
