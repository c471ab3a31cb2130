/* SPDX-License-Identifier: Apache-2.0 */
/* proxyattn.c: masks of ProxyAttn made by hand. */
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(proxyattn);

/* Two heads of one block of two queries, and 8 keys in blocks of 2. The keys of head 0 are 0: it
 * pays the same to all blocks, and needs two for 0.45. Head 1 pays nearly all to one key for its
 * first query, and has a half of its second at most in another block: it needs one. */
static const float keys[] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 2.5f, 2.5f, 5, 0, 1, 1};

static hand make(const float *q) { return hand_make(2, 2, 2, 8, 1, 1, q, keys, keys); }

/* The mean query is 2 and the mean keys are half of those of head 1, whose largest in the blocks
 * are 3, 2.5, 5 and 1. Those of the second block have more together than those of the first. */
Test(proxyattn, one_ranking_and_two_budgets)
{
    const float q[] = {1, 1, 3, 3};
    const hand x = make(q);
    HAS_PAIRS(&x, "proxyattn", 2, "1010 0010", 0.45, 0, 1, 2);
    HAS_PAIRS(&x, "proxyattn", 2, "1110 0010", 0.55, 0, 1, 2);
    HAS_PAIRS(&x, "proxyattn", 2, "1111 1111", 1, 0, 1, 2);
    HAS_PAIRS(&x, "proxyattn", 2, "0010 0010", 0, 0, 1, 2);
}

/* Head 0 alone has no ranking but the order of blocks. */
Test(proxyattn, a_head_for_itself)
{
    const float q[] = {1, 1, 3, 3};
    const hand x = make(q);
    HAS_PAIRS(&x, "proxyattn", 2, "1100 0010", 0.45, 1, 1, 2);
    HAS_PAIRS(&x, "proxyattn", 2, "1010 0010", 0.45, 2, 1, 2);
}

/* Of the first tokens of each two the keys are 0, 2.5, 5 and 1. The second query likes small ones,
 * that of block 0 or 2 best, if it counts. */
Test(proxyattn, first_tokens_count)
{
    const float q[] = {1, -1, 3, -3};
    const hand x = make(q);
    HAS_PAIRS(&x, "proxyattn", 2, "1010 0010", 0.45, 0, 1, 2);
    HAS_PAIRS(&x, "proxyattn", 2, "0110 0010", 0.45, 0, 2, 2);
}

/* Keys that rise slowly: each row ranks its last blocks first. The last two queries pay about an
 * eighth to each of 8 blocks and need three for 0.35, which is one of 2 blocks, two of 3 to 5 and
 * three of 6. The first block comes on top. */
Test(proxyattn, a_share_of_what_is_seen)
{
    float q[16], k[16];
    for (int t = 0; t < 16; t++) {
        q[t] = 1.0f;
        k[t] = 0.01f * (float)t;
    }
    hand x = hand_make(1, 1, 16, 16, 1, 1, q, k, k);
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "proxyattn", 2, "1 11 111 1011 10011 100111 1000111 10000111", 0.35, 0, 1, 2);
    HAS_PAIRS(&x, "proxyattn", 2, "1 11 101 1001 10001 100001 1000001 10000001", 0, 0, 1, 2);
    HAS_PAIRS(&x, "proxyattn", 2, "1 11 111 1111 11111 111111 1111111 11111111", 1, 0, 1, 2);
}

/* One token in the last block: the last two queries are those of two blocks. */
Test(proxyattn, the_last_queries_are_a_whole_block)
{
    const float q[] = {0, 0, 0, 9, 0}, k[] = {0, 0, 1, 0, 0};
    hand x = hand_make(1, 1, 5, 5, 1, 1, q, k, k);
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "proxyattn", 2, "1 11 101", 0.6, 0, 1, 2);
}

Test(proxyattn, wrong_parameters)
{
    static const struct {
        double group, stride, block;
        const char *says;
    } wrong[] = {{0, 2, 3, "block of proxyattn is 3, it must be a multiple of stride, 2"},
                 {3, 1, 2,
                  "group of proxyattn is 3, it must be a multiple of the query heads that "
                  "share keys, 2"}};
    const float q[8] = {0}, k[8] = {0};
    const hand x = hand_make(4, 2, 2, 4, 1, 1, q, k, k);
    for (int n = 0; n < 2; n++) {
        const double param[] = {0.5, wrong[n].group, wrong[n].stride, wrong[n].block};
        sparge_plan plan;
        sparge_error error = {""};
        check(sparge_method_plan(sparge_method_find("proxyattn"), &x.p, &x.o, NULL, param, &plan,
                                 &error) == SPARGE_ERR_ARGUMENT,
              "it is taken");
        check(strcmp(error.text, wrong[n].says) == 0, "%s", error.text);
    }
}
