/* SPDX-License-Identifier: Apache-2.0 */
/* shares.c: the scores of several methods under one selector, by hand: what is above t even shares
 * of all blocks. */
#include <math.h>

#include "tests/methods/hand.h"

TestSuite(shares);

/* Both queries pay .05, .5, .3 and .15 to the keys: .2, 2, 1.2 and .6 even shares. */
static void of_equal_rows(const char *method, double other)
{
    static const float q[] = {1, 1};
    const float k[] = {logf(.05f), logf(.5f), logf(.3f), logf(.15f)};
    hand x = hand_make(1, 1, 2, 4, 1, 1, q, k, k);
    x.o.block_q = x.o.block_k = 1;
    HAS_PAIRS(&x, method, 1, "1111 1111", 0.0, other, 1);
    HAS_PAIRS(&x, method, 1, "1111 1111", 0.5, other, 1);
    HAS_PAIRS(&x, method, 1, "111 111", 1.1, other, 1);
    HAS_PAIRS(&x, method, 1, "11 11", 1.9, other, 1);
    HAS_PAIRS(&x, method, 1, "1 1", 2.1, other, 1);
    /* The first query sees three keys, of which the second has 2.35 even shares of four. */
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, method, 1, "111 1001", 2.1, other, 1);
    HAS_PAIRS(&x, method, 1, "101 1001", 2.4, other, 1);
}

/* The same of two queries in one block. */
Test(shares, of_rows_together)
{
    static const float q[] = {1, 1};
    const float k[] = {logf(.05f), logf(.5f), logf(.3f), logf(.15f)};
    hand x = hand_make(1, 1, 2, 4, 1, 1, q, k, k);
    x.o.block_q = 2;
    x.o.block_k = 1;
    HAS_PAIRS(&x, "oracle_mass_t", 1, "111 111", 1.1);
    HAS_PAIRS(&x, "oracle_mass_t", 1, "1 1", 2.1);
}

Test(shares, of_the_truth) { of_equal_rows("oracle_mass_t", 0.0); }
Test(shares, of_antidiagonals_of_one) { of_equal_rows("xattention_t", 1.0); }

/* One head, which is its own representative, and each token counts. Maxima are made shares. */
Test(shares, of_representatives)
{
    static const float q[] = {1, 1};
    const float k[] = {logf(.05f), logf(.5f), logf(.3f), logf(.15f)};
    hand x = hand_make(1, 1, 2, 4, 1, 1, q, k, k);
    HAS_PAIRS(&x, "proxyattn_t", 1, "111 111", 1.1, 0, 1, 1);
    HAS_PAIRS(&x, "proxyattn_t", 1, "1 1", 2.1, 0, 1, 1);
    /* The largest of the first two keys are .5, of the last two .3: 1.25 and .75 of two blocks. */
    HAS_PAIRS(&x, "proxyattn_t", 2, "1", 0.8, 0, 1, 2);
    HAS_PAIRS(&x, "proxyattn_t", 2, "11", 0.7, 0, 1, 2);
}

/* Segments of 2. Queries 4 and 5 pay .1, .4, .3 and .2 to the earlier ones, .6, 2.4, 1.8 and 1.2
 * even shares of six; 2 and 3 pay .2 and .8, 1.2 and 4.8. The first key and the own segment are
 * kept. */
Test(shares, of_permuted_segments)
{
    static const float q[] = {1, 1, 1, 1, 1, 1};
    const float k[] = {logf(.1f), logf(.4f), logf(.3f), logf(.2f), 0, 0};
    hand x = hand_make(1, 1, 6, 6, 1, 1, q, k, k);
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "pbs_t", 1, "1 11 111 1111 11101 111011", 1.5, 2, 1);
    HAS_PAIRS(&x, "pbs_t", 1, "1 11 111 1111 11001 110011", 2.0, 2, 1);
    HAS_PAIRS(&x, "pbs_t", 1, "1 11 101 1011 10001 100011", 5.0, 2, 1);
    HAS_PAIRS(&x, "pbs_t", 1, "1 11 111 1111 11111 111111", 0.0, 2, 1);
}
