/* SPDX-License-Identifier: Apache-2.0 */
/* blockrank.c: masks of BlockRank made by hand. It looks at no query and no key. */
#include "tests/methods/hand.h"

TestSuite(blockrank);

static const float zeros[16];

static hand make(int64_t q_len, sparge_causal causal, const int64_t *ends, int64_t segments)
{
    const int64_t k_len = ends[segments - 1];
    hand x = hand_make(1, 1, q_len, k_len, 1, 1, zeros, zeros, zeros);
    x.o.causal = causal;
    x.context.segment_ends = ends;
    x.context.segments = segments;
    return x;
}

/* An instruction of two tokens, documents of three and two, and a query of two; between them one
 * of none. There is no parameter. */
Test(blockrank, instruction_documents_and_query)
{
    static const int64_t ends[] = {2, 5, 5, 7, 9};
    hand x = make(9, SPARGE_CAUSAL_END, ends, 5);
    HAS_PAIRS(&x, "blockrank", 1, "1 11 111 1111 11111 110001 1100011 11111111 111111111", 0);
    x.o.block_q = 4; /* in which two segments meet */
    x.o.block_k = 3;
    HAS_PAIRS(&x, "blockrank", 1, "1 11 111 1111 11111 110001 1100011 11111111 111111111", 0);
}

/* Queries 4 to 8; then 0 to 2. */
Test(blockrank, fewer_queries)
{
    static const int64_t ends[] = {2, 5, 7, 9};
    const hand end = make(5, SPARGE_CAUSAL_END, ends, 4),
               start = make(3, SPARGE_CAUSAL_START, ends, 4);
    HAS_PAIRS(&end, "blockrank", 1, "11111 110001 1100011 11111111 111111111", 0);
    HAS_PAIRS(&start, "blockrank", 1, "1 11 111", 0);
}

Test(blockrank, two_segments_are_dense)
{
    static const int64_t two[] = {2, 4}, one[] = {3};
    const hand x = make(4, SPARGE_CAUSAL_END, two, 2), y = make(3, SPARGE_CAUSAL_END, one, 1);
    HAS_PAIRS(&x, "blockrank", 1, "1 11 111 1111", 0);
    HAS_PAIRS(&y, "blockrank", 1, "1 11 111", 0);
}
