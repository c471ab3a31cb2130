/* SPDX-License-Identifier: Apache-2.0 */
/* xattention.c: masks of XAttention made by hand. */
#include <math.h>
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(xattention);

#define LN(x) ((float)log(x))

/* Even queries are (1, 0) and odd ones (0, 1), so that a group of two scores, by antidiagonals,
 * channel 0 of the odd key and channel 1 of the even key, over 2. The other channels are those of
 * the diagonals. Groups weigh 1 1 | 3 3 | 5 0.5: block 1 has most, though group 4 is the largest.
 * By diagonals they would weigh 1 1 | 1 1 | 9 9. */
Test(xattention, antidiagonals)
{
    const double weight[] = {1, 1, 3, 3, 5, 0.5}, diagonal[] = {1, 1, 1, 1, 9, 9};
    float q[12][2] = {{0}}, k[12][2];
    for (int u = 0; u < 6; u++) {
        q[2 * u][0] = q[2 * u + 1][1] = 1.0f;
        k[2 * u][0] = k[2 * u + 1][1] = LN(diagonal[u]);
        k[2 * u][1] = k[2 * u + 1][0] = LN(weight[u]);
    }
    const hand x = hand_make(1, 1, 12, 12, 2, 2, &q[0][0], &k[0][0], &k[0][0]);
    HAS_PAIRS(&x, "xattention", 4, "010 010 010", 0.0, 2, 4);
}

/* Blocks are groups of 2 of 9 tokens with one channel. Queries of head 0 are 1 and those of head 1
 * are -1, which share the keys, so that groups weigh w and 1 / w. The last group has one token: as
 * queries it meets the odd keys alone, and groups weigh the root of w; as keys its one key meets
 * the odd query, and weighs 2, the root of 4; with itself it has no antidiagonal, and weighs 1. */
static hand weights(float q[2][9], float k[9])
{
    const double w[] = {1, 16, 4, 4, 4};
    for (int t = 0; t < 9; t++) {
        q[0][t] = 1.0f;
        q[1][t] = -1.0f;
        k[t] = LN(w[t / 2]);
    }
    return hand_make(2, 1, 9, 9, 1, 1, q[0], k, k);
}

Test(xattention, causal_mass)
{
    float q[2][9], k[9];
    hand x = weights(q, k);
    x.o.causal = SPARGE_CAUSAL_END;
    /* First block and diagonal, whatever tau is. In row 4 of head 0 groups weigh 1 4 2 2 1. */
    HAS_PAIRS(&x, "xattention", 2, "1 11 101 1001 10001 1 11 101 1001 10001", 0.0, 2, 2);
    /* Row 2 of head 0: both have 1 + 4 of 21, more than 0.2: their mass counts. */
    HAS_PAIRS(&x, "xattention", 2, "1 11 101 1101 11001 1 11 101 1001 10001", 0.21, 2, 2);
    /* Head 0, row 2: 5 of 21, the block of 16 crosses 13.65. Row 3: 5 of 25, 16 cross 16.25. Row 4:
     * 2 of 10, 4 make 6 of 6.5, and of the two of 2 the first crosses. Head 1 weighs 16 1 4 4 (16):
     * row 2 has 20 of 21, row 3 20 of 25. Row 4 weighs 1 1/4 1/2 1/2 1, of which both have 2 of
     * 3.25; the first of the halves crosses 2.1125. */
    HAS_PAIRS(&x, "xattention", 2, "1 11 111 1101 11101 1 11 101 1001 10101", 0.65, 2, 2);
    HAS_PAIRS(&x, "xattention", 2, "1 11 111 1111 11111 1 11 111 1111 11111", 1.0, 2, 2);
}

/* Nothing is forced. Head 0, rows 0 to 3: 1 16 4 4 2, of which 16 of 17.55 are not enough and the
 * first of the fours crosses; row 4: 1 4 2 2 1, of which 8 reach 6.5. Head 1: 16 1 4 4 8, of which
 * 24 reach 21.45; row 4: 4 1 2 2 4, of which 8 are below 8.45 and the first of the twos crosses. */
Test(xattention, not_causal)
{
    float q[2][9], k[9];
    const hand x = weights(q, k);
    HAS_PAIRS(&x, "xattention", 2, "0110 0110 0110 0110 0111 10001 10001 10001 10001 10101", 0.65,
              2, 2);
    HAS_PAIRS(&x, "xattention", 2, "01 01 01 01 01 1 1 1 1 1", 0.0, 2, 2);
}

/* 4 queries see keys up to t + 5. The blocks of those keys are the diagonal: 2 3 and 3 4. Row 0
 * weighs 1 16 4 4, of which the forced have 9 of 25; row 1 has 2 for the tail, and 7 of 27. */
Test(xattention, fewer_queries)
{
    float q[2][9], k[9];
    hand x = weights(q, k);
    x.p.heads = 1;
    x.p.q_len = 4;
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "xattention", 2, "1011 11011", 0.3, 2, 2);
    /* From the start: as the first rows of the square. */
    x.o.causal = SPARGE_CAUSAL_START;
    HAS_PAIRS(&x, "xattention", 2, "1 11", 0.3, 2, 2);
}

Test(xattention, products_are_counted)
{
    float q[2][9], k[9];
    hand x = weights(q, k);
    x.o.causal = SPARGE_CAUSAL_END;
    sparge_plan plan = hand_plan(&x, "xattention", (const double[]){0.5, 2, 2}, 3);
    check_equal(plan.multiply_adds, 2.0 * (1 + 2 + 3 + 4 + 5) * 2); /* heads, groups, tokens */
    sparge_plan_free(&plan);
}

Test(xattention, blocks_are_groups)
{
    float q[2][9], k[9];
    const hand x = weights(q, k);
    sparge_plan plan;
    sparge_error error;
    const double param[] = {0.9, 8, 100};
    check_equal(sparge_method_plan(sparge_method_find("xattention"), &x.p, &x.o, NULL, param, &plan,
                                   &error),
                SPARGE_ERR_ARGUMENT);
    check(strcmp(error.text, "block of xattention is 100, it must be a multiple of stride, 8") == 0,
          "%s", error.text);
}
