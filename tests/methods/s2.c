/* SPDX-License-Identifier: Apache-2.0 */
/* s2.c: masks of S2-Attention made by hand. It looks at no query and no key. */
#include "tests/methods/hand.h"

TestSuite(s2);

static const float zeros[32];

static hand make(int64_t heads, int64_t q_len, int64_t k_len, sparge_causal causal)
{
    hand x = hand_make(heads, 1, q_len, k_len, 1, 1, zeros, zeros, zeros);
    x.o.causal = causal;
    return x;
}

/* Two nearest keys, and each fourth one: head 0 has keys 3 and 7, head 1 keys 1 and 5. */
Test(s2, heads_share_the_keys)
{
    const hand x = make(2, 8, 8, SPARGE_CAUSAL_END);
    HAS_PAIRS(&x, "s2", 1,
              "1 11 011 0011 00011 000111 0001011 00010011 "
              "1 11 011 0111 01011 010011 0100011 01000111",
              2, 4, 1, 0);
    HAS_PAIRS(&x, "s2", 1,
              "1 11 011 0011 00011 000111 0001011 00010011 "
              "1 11 011 0011 00011 000111 0001011 00010011",
              2, 4, 1, 1);
}

/* Three heads of a stride of two: each begins one key before the last one. Of one of four, half a
 * key is none, and then it is one. */
Test(s2, a_step_is_at_least_one)
{
    const hand x = make(3, 1, 6, SPARGE_CAUSAL_END), five = make(5, 1, 6, SPARGE_CAUSAL_END);
    HAS_PAIRS(&x, "s2", 1, "010101 101011 010101", 1, 2, 1, 0);
    HAS_PAIRS(&x, "s2", 1, "000011 000101 001001", 1, 5, 1, 0);
    HAS_PAIRS(&five, "s2", 1, "000101 001001 010001 100011 000101", 1, 4, 1, 0);
}

/* Blocks of 2, the last of 1. Queries 5 and 6 stand in blocks 2 and 3. */
Test(s2, blocks)
{
    const hand x = make(1, 7, 7, SPARGE_CAUSAL_END), end = make(1, 2, 7, SPARGE_CAUSAL_END),
               start = make(1, 2, 7, SPARGE_CAUSAL_START);
    HAS_PAIRS(&x, "s2", 2, "1 01 011 0101", 1, 2, 2, 0);
    HAS_PAIRS(&end, "s2", 2, "0111", 1, 2, 2, 0);
    HAS_PAIRS(&start, "s2", 2, "1", 1, 2, 2, 0);
}
