/* SPDX-License-Identifier: Apache-2.0 */
/* hand.h: inputs of the prediction made by hand, and the masks and reasons that they have as text.
 */
#ifndef SPARGE_TESTS_REF_HAND_H
#define SPARGE_TESTS_REF_HAND_H

#include "tests/support/problem.h"

bool bit(const sparge_mask *mask, int64_t line, int64_t j);

/* Into a mask of the exact size between guards, full of ones before: every word must be written,
 * and no bit beyond the last block be set. What is kept has a reason, and nothing else has. The
 * caller frees it. */
sparge_mask predicted(const sparge_problem *p, const sparge_options *o,
                      const sparge_intermediates *intermediates);

/* Blocks of two rows. The keys of block j are (x_j, 1), every query is (1, 0) and the scale is 1:
 * so S[i,j] = x_j and every block is similar. Both stages of selection are off until a test sets
 * one. */
typedef struct hand {
    sparge_problem p;
    sparge_options o;
    float *q, *k; /* [q_len][2], [k_len][2] */
} hand;

hand by_hand(int64_t q_len, int64_t k_blocks, const float *x);
void drop(hand *h);

/* The second of two rows against the first: the mean cosine is 0. */
void disagree(float *x, int64_t block);

/* want: a 0 or 1 for each key block, rows between slashes, heads and batches as further rows. */
void keeps(const char *what, const hand *h, const char *want);

enum {
    MASS = SPARGE_KEPT_MASS,
    TOPK = SPARGE_KEPT_TOPK,
    ODD_Q = SPARGE_KEPT_DISSIMILAR_Q,
    ODD_K = SPARGE_KEPT_DISSIMILAR_K,
    OVERFLOW_ = SPARGE_KEPT_OVERFLOW,
    DIAGONAL = SPARGE_KEPT_DIAGONAL,
    SINK = SPARGE_KEPT_SINK,
    MIN_MASS = SPARGE_KEPT_MIN_MASS,
};

void keeps_for(const char *what, const hand *h, const uint8_t *want, int64_t count);

#endif
