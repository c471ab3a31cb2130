/* SPDX-License-Identifier: Apache-2.0 */
/* flexprefill.c: masks of FlexPrefill made by hand. */
#include <math.h>
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(flexprefill);

enum { N = 9, D = 3 };

/* Blocks of 2, the last of one token. Channel 0 of k is what query 7 asks for and channel 1 what
 * query 8 does, so that they pay `last`; channel 2 is for means. */
static const double last[2][N] = {{.04, .02, .2, .5, .04, .02, .02, .16, .08},
                                  {.04, .02, .5, .2, .04, .02, .02, .08, .08}};
/* On average, keys:   .04 .02 .35 .35 .04 .02 .02 .12 .04, by blocks .06 .70 .06 .14 .04
 * by offsets 0 to 8:  .12 .05 .02 .03 .27 .20 .26 .03 .02; diagonals of blocks hold the offsets 0,
 * 1 2, 3 4, 5 6 and 7 8, that is .12 .07 .30 .46 .05. */

static hand make(float q[2][N][D], float k[N][D])
{
    const double mean[] = {1, 2, 2, 4, 1};
    memset(q, 0, sizeof(float[2][N][D]));
    for (int t = 0; t < N; t++) {
        q[0][t][2] = 1.0f;
        k[t][0] = (float)log(last[0][t]);
        k[t][1] = (float)log(last[1][t]);
        k[t][2] = (float)log(mean[t / 2]);
    }
    q[0][7][0] = q[0][8][1] = 1.0f;
    q[0][7][2] = q[0][8][2] = 0.0f;
    q[0][6][0] = -1.0f; /* so that the mean of block 3 is (0, 0, 1), as of those before it */
    q[0][6][2] = 2.0f;
    hand x = hand_make(2, 1, N, N, D, D, &q[0][0][0], &k[0][0], &k[0][0]);
    x.o.causal = SPARGE_CAUSAL_END;
    return x;
}

/* The second head asks for nothing: its last queries pay 1/8 and 1/9 to all that they see. */
Test(flexprefill, columns_and_diagonals)
{
    float q[2][N][D], k[N][D];
    const hand x = make(q, k);
    /* Head 0: one key has more than .2, and one offset, so 1 / 2 + 1 column and diagonal: the first
     * block and the main diagonal. Head 1: two keys of .118 have, so 2 columns and diagonals, of
     * equals the first. */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 101 1001 10001 1 11 111 1111 11011", 0.2, 0, 1, 2);
    /* Head 0: still one key, but two offsets, .27 and .26, so the diagonal of .46 as well, which
     * lies 3 blocks off. */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 101 1001 11001 1 11 111 1111 11011", 0.3, 0, 1, 2);
    /* Head 0: two keys, so column 1; three offsets, which are 2 diagonals. Head 1: six of both, so
     * 4. */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1101 11001 1 11 111 1111 11111", 0.6, 0, 1, 2);
    /* Head 0: four offsets, so the diagonal of .30, 2 blocks off. */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1101 11101 1 11 111 1111 11111", 0.75, 0, 1, 2);
    /* 3 tokens are 2 blocks, whatever gamma is. */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1101 11001 1 11 111 1111 11011", 0.0, 0, 3, 2);
    /* 9 tokens are all blocks. */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1111 11111 1 11 111 1111 11111", 0.0, 0, 9, 2);
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1111 11111 1 11 111 1111 11111", 1.0, 0, 1, 2);
}

/* Mean queries of blocks 0 to 3 are (0, 0, 1), so blocks weigh 1 2 2 4 to them. That of block 4 is
 * query 8, and a block weighs the geometric mean of what it pays: .0283 .3162 .0283 .04 .08. By
 * rows of softmax: 1 | .333 .667 | .2 .4 .4 | .111 .222 .222 .444 | .057 .642 .057 .081 .162, and
 * the best of all 5 together: 1 .667 .642 .444 .4 .4 .333 .222 .222 ... */
Test(flexprefill, pairs_of_means)
{
    float q[2][N][D], k[N][D];
    hand x = make(q, k);
    x.p.heads = 1;
    /* 2.85: the first four have 2.753; pair (2, 1) crosses and is dropped. */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 101 1001 11001", 0.57, 1, 1, 2);
    /* 4.2: eight have 4.108, the last of them (3, 1), which is before its equal (3, 2). */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1101 11001", 0.84, 1, 1, 2);
    /* A budget of 2 blocks: columns 0 and 1, diagonals 0 and 3, whatever gamma is. */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1101 11001", 0.0, 1, 4, 2);
}

/* The mean of queries 7 and 8 weighs blocks by the roots of products of geometric means: .0283
 * .3162 .0283 .0476 .08, that is .057 .632 .057 .095 .160. From .06 .70 .06 .14 .04 that has a
 * Jensen-Shannon divergence of 0.0223, the square of .1494. */
Test(flexprefill, divergence)
{
    float q[2][N][D], k[N][D];
    hand x = make(q, k);
    x.p.heads = 1;
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1101 11101", 0.75, 0.148, 1, 2); /* lines */
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1001 11001", 0.75, 0.151, 1, 2); /* means */
    /* Block 1 gets nothing at all: the divergence is NaN, which is not below tau. Of keys .400 .133
     * .133 are 3, so 2 columns, 0 and 3; of offsets .400 .167 .100 are 3, so 2 diagonals, 0 and 1.
     * Means would keep columns and diagonals 0 and the pair (2, 1). */
    k[2][0] = k[2][1] = k[3][0] = k[3][1] = -1000.0f;
    HAS_PAIRS(&x, "flexprefill", 2, "1 11 111 1011 10011", 0.6, 1, 1, 2);
}
