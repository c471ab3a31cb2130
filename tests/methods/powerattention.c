/* SPDX-License-Identifier: Apache-2.0 */
/* powerattention.c: masks of PowerAttention made by hand. It looks at no query and no key. */
#include "tests/methods/hand.h"

TestSuite(powerattention);

static const float zeros[16];

static hand make(int64_t q_len, int64_t k_len, sparge_causal causal)
{
    hand x = hand_make(1, 1, q_len, k_len, 1, 1, zeros, zeros, zeros);
    x.o.causal = causal;
    return x;
}

/* Distances of 0, 1, 2, 4 and 8 keys. */
Test(powerattention, powers_of_two)
{
    const hand x = make(10, 10, SPARGE_CAUSAL_END);
    HAS_PAIRS(&x, "powerattention", 1,
              "1 11 111 0111 10111 010111 0010111 00010111 100010111 0100010111", 0, 0, 1);
}

/* The six nearest blocks, and the first one. */
Test(powerattention, window_and_sink)
{
    const hand x = make(10, 10, SPARGE_CAUSAL_END);
    HAS_PAIRS(&x, "powerattention", 1,
              "1 11 111 1111 11111 111111 1111111 10111111 100111111 1100111111", 6, 1, 1);
}

/* 7 tokens in blocks of 2, the last of 1; then queries 5 and 6, which stand in two of them, and 0
 * and 1. */
Test(powerattention, distances_are_of_blocks)
{
    const hand x = make(7, 7, SPARGE_CAUSAL_END), end = make(2, 7, SPARGE_CAUSAL_END),
               start = make(2, 7, SPARGE_CAUSAL_START);
    HAS_PAIRS(&x, "powerattention", 2, "1 11 111 0111", 1, 0, 2);
    HAS_PAIRS(&end, "powerattention", 2, "1111", 1, 0, 2);
    HAS_PAIRS(&start, "powerattention", 2, "1", 1, 0, 2);
}

/* On both sides. Two queries at the end of 9 keys stand at keys 7 and 8. */
Test(powerattention, not_causal)
{
    const hand x = make(5, 5, SPARGE_CAUSAL_NONE), end = make(2, 9, SPARGE_CAUSAL_NONE);
    HAS_PAIRS(&x, "powerattention", 1, "11101 11110 11111 01111 10111", 0, 0, 1);
    HAS_PAIRS(&end, "powerattention", 1, "000101111 100010111", 0, 0, 1);
}
