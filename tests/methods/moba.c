/* SPDX-License-Identifier: Apache-2.0 */
/* moba.c: masks of MoBA made by hand. */
#include "tests/methods/hand.h"

TestSuite(moba);

/* 7 keys in chunks of 2, the last of 1: their means are 1, 2, 1 and 9. A query of 1 likes large
 * means, one of -1 small ones. */
static const float keys[] = {1, 1, 3, 1, 2, 0, 9};

static hand make(const float *q, int64_t heads, int64_t q_len, sparge_causal causal)
{
    hand x = hand_make(heads, 1, q_len, 7, 1, 1, q, keys, keys);
    x.o.causal = causal;
    return x;
}

/* Two chunks a query, its own first. Head 0: query 4 has the chunk of mean 2 beside its own; query
 * 5, of the same block, asks for a small mean and has the earlier of two equal ones; the own chunk
 * of query 6 is the tail. */
Test(moba, own_chunk_and_the_best_earlier_one)
{
    const float q[] = {1, 1, 1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, -1};
    const hand x = make(q, 2, 7, SPARGE_CAUSAL_END);
    HAS_PAIRS(&x, "moba", 1,
              "1 11 111 1111 00111 110011 0011001 "
              "1 11 111 1111 11001 110011 1100001",
              2, 2);
}

Test(moba, own_chunk_alone_and_all_chunks)
{
    const float q[] = {1, 1, 1, 1, 1, 1, 1};
    const hand x = make(q, 1, 7, SPARGE_CAUSAL_END);
    HAS_PAIRS(&x, "moba", 1, "1 11 001 0011 00001 000011 0000001", 1, 2);
    HAS_PAIRS(&x, "moba", 1, "1 11 111 1111 11111 111111 1111111", 4, 2);
    HAS_PAIRS(&x, "moba", 1, "1 11 111 1111 11111 111111 1111111", 1, 100);
}

/* Two queries, of which keys 5 and 6, or 0 and 1, are the last visible ones. */
Test(moba, a_query_stands_where_its_last_key_does)
{
    const float q[] = {1, 1};
    const hand end = make(q, 1, 2, SPARGE_CAUSAL_END), start = make(q, 1, 2, SPARGE_CAUSAL_START);
    HAS_PAIRS(&end, "moba", 1, "001111 0011001", 2, 2);
    HAS_PAIRS(&start, "moba", 1, "1 11", 2, 2);
}

/* As FlashMoBA: the best chunks, whichever they are. The mean of the tail is that of its one key.
 */
Test(moba, no_own_chunk_if_not_causal)
{
    const float q[] = {1, 1, -1, -1};
    const hand x = make(q, 2, 2, SPARGE_CAUSAL_NONE);
    HAS_PAIRS(&x, "moba", 1, "0011001 0011001 110011 110011", 2, 2);
}
