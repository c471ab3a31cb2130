/* SPDX-License-Identifier: Apache-2.0 */
/* select.h: how the prediction decides which key blocks a query block keeps (Sec 3.3, Algorithm 1
 * lines 4-6). A backend may sort a row, select by radix or bisect; what it asks is here. */
#ifndef SPARGE_COMMON_SELECT_H
#define SPARGE_COMMON_SELECT_H

#include "common/num.h"
#include "sparge_inspect.h"

/* ---- A block ---- */

/* What a row is multiplied by to have length 1, from its squared length; 0 for a row of zeros. */
SPARGE_HD float sparge_unit_factor(float square)
{
    return square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
}

/* The mean cosine of all n * n pairs of rows, from the squared length of the sum of n unit rows:
 * the Gram matrix is never needed. */
SPARGE_HD float sparge_mean_cosine(float square, int64_t n)
{
    const float rows = (float)n;
    return fminf(1.0f, square / (rows * rows));
}

/* Does the mean row of a block stand for it? Never if some element is not finite. */
SPARGE_HD bool sparge_is_similar(bool finite, float sim, float theta)
{
    return finite && sim > theta;
}

/* ---- A row of S ---- */

/* The score of two mean rows. A score of 0 has no sign. */
SPARGE_HD float sparge_pool_score(float dot, float softmax_scale)
{
    return softmax_scale * dot + 0.0f;
}

/* Bits that compare as the floats do, and -0 as 0. Not for NaN. */
SPARGE_HD uint32_t sparge_order_key(float x)
{
    const uint32_t bits = sparge_float_bits(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Does one block come before another? The better score does, and of equal ones the earlier block,
 * so that the mask is unique. */
SPARGE_HD bool sparge_comes_before(float score, int64_t block, float other, int64_t other_block)
{
    return score > other || (score == other && block < other_block);
}

/* The weight of a score in softmax(S[i,:]) beside the largest score of the row, in units of 2^-30.
 * It is an integer, so that a sum has one value in any order. */
SPARGE_HD uint32_t sparge_mass(float score, float top)
{
    return (uint32_t)(int32_t)(sparge_exp2((score - top) * SPARGE_LOG2E) * 0x1p30f);
}

/* TopCdf keeps the best blocks as long as their mass together is at most this. */
SPARGE_HD double sparge_mass_limit(float tau, uint64_t total)
{
    return (double)tau * (double)total;
}

/* A block of more mass than this is kept. An even share is that of one of the call's k_blocks, so
 * that a row which sees few of them needs as much as one that sees all. */
SPARGE_HD double sparge_min_mass_limit(float min_mass, uint64_t total, int64_t k_blocks)
{
    return (double)min_mass * (double)total / (double)k_blocks;
}

/* How many best blocks top-k keeps: a share of the visible ones, but at least one. The addend makes
 * 0.7f of 10 seven. */
SPARGE_HD int64_t sparge_topk_count(float topk, int64_t visible)
{
    return sparge_max(1, (int64_t)floor((double)topk * (double)visible + 1e-5));
}

/* ---- Cells: parts of blocks. Mean rows of cells are scored in place of those of blocks. A row of
 * cells is then a softmax row whose weights are codes (common/softmax.h), and pays a block what it
 * pays to its cells. All sums are of integers. ---- */

enum {
    SPARGE_CELL_QMAX = 1 << 24,  /* the code of the best cell of a row */
    SPARGE_CELLS_OF_BLOCK = 64,  /* at most, of keys: so many codes fit in 31 bits */
    SPARGE_CELL_QUERY = 1 << 20, /* what the masses of a row add up to for each of its queries */
};

/* An element of a cell's mean row, held where no product of two rows overflows. */
SPARGE_HD float sparge_cell_mean(float sum, int64_t rows)
{
    const float mean = sum / (float)rows, least = mean < -0x1p55f ? -0x1p55f : mean;
    return least > 0x1p55f ? 0x1p55f : least;
}

/* From products of mean rows to log2 units. */
SPARGE_HD float sparge_cell_scale(float softmax_scale)
{
    return fminf(softmax_scale * SPARGE_LOG2E, FLT_MAX);
}

/* What a code of a row of cells is worth in mass, where all its codes add up to `total`. */
SPARGE_HD float sparge_cell_worth(int64_t queries, uint64_t total)
{
    return total ? (float)((double)(queries * SPARGE_CELL_QUERY) / (double)total) : 0.0f;
}

/* The mass that a row of cells adds to a block, from the sum of its codes there. */
SPARGE_HD uint32_t sparge_cell_mass(int32_t codes, float worth)
{
    return (uint32_t)(int32_t)((float)codes * worth);
}

/* The same as a share of the row, for those who look at it. */
SPARGE_HD float sparge_cell_share(uint32_t mass, uint64_t total)
{
    return total ? (float)((double)mass / (double)total) : 0.0f;
}

/* ---- Every row ---- */

/* Why a visible block is kept whatever its rank: bits of sparge_reason, 0 if it need not be. A mean
 * row that does not stand for its block, on either side, says nothing of the pair; nor does a score
 * that is not finite. */
SPARGE_HD uint32_t sparge_forced(bool q_similar, bool k_similar, bool score_finite, bool diagonal,
                                 bool sink)
{
    uint32_t why = 0;
    why |= q_similar ? 0u : (uint32_t)SPARGE_KEPT_DISSIMILAR_Q;
    why |= k_similar ? 0u : (uint32_t)SPARGE_KEPT_DISSIMILAR_K;
    why |= !k_similar || score_finite ? 0u : (uint32_t)SPARGE_KEPT_OVERFLOW;
    why |= diagonal ? (uint32_t)SPARGE_KEPT_DIAGONAL : 0u;
    why |= sink ? (uint32_t)SPARGE_KEPT_SINK : 0u;
    return why;
}

#endif
