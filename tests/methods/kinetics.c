/* SPDX-License-Identifier: Apache-2.0 */
/* kinetics.c: masks of Kinetics' block top-k made by hand. */
#include "tests/methods/hand.h"

TestSuite(kinetics);

/* 7 keys of two channels in pages of 2, the last of 1: their means are 1 0, 0 2, 1 1 and 9 9. */
static const float keys[] = {1, 0, 1, 0, 0, 3, 0, 1, 2, 0, 0, 2, 9, 9};

/* Two query heads of one key head. Alone they like one channel each: 3 0 and 0 1 mean 1.5 0.5, and
 * pages 0 to 2 score 1.5, 1 and 2. Query 5 stands at the end of page 2, and has it as its own. */
Test(kinetics, pages_of_a_group)
{
    float q[28];
    for (int n = 0; n < 28; n++)
        q[n] = n < 14 ? (n % 2 ? 0.0f : 3.0f) : (n % 2 ? 1.0f : 0.0f);
    hand x = hand_make(2, 1, 7, 7, 2, 2, q, keys, keys);
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "kinetics", 1,
              "1 11 111 1111 11001 110011 0000111 "
              "1 11 111 1111 11001 110011 0000111",
              1, 2);
    HAS_PAIRS(&x, "kinetics", 1,
              "1 11 111 1111 11111 111111 1100111 "
              "1 11 111 1111 11111 111111 1100111",
              2, 2);
}

/* Heads of two key heads choose apart: 3 0 scores 3, 0 and 3, of which the earlier comes first, and
 * 0 1 scores 0, 2 and 1. */
Test(kinetics, groups_choose_apart)
{
    float two[28];
    const float q[] = {3, 0, 0, 1};
    for (int n = 0; n < 28; n++)
        two[n] = keys[n % 14];
    hand x = hand_make(2, 2, 1, 7, 2, 2, q, two, two);
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "kinetics", 1, "1100001 0011001", 1, 2);
    x.o.causal = SPARGE_CAUSAL_NONE; /* no page is its own; the tail scores 27 and 9 */
    HAS_PAIRS(&x, "kinetics", 1, "0000001 0000001", 1, 2);
    HAS_PAIRS(&x, "kinetics", 1, "1100001 0011001", 2, 2);
}
