/* SPDX-License-Identifier: Apache-2.0 */
/* spargeattention2.c: masks of SpargeAttention2 made by hand. */
#include <math.h>

#include "tests/methods/hand.h"

TestSuite(spargeattention2);

/* Blocks of 2; a query of 1 sees the mean keys themselves. The map of the 5 mean keys ln 8, 0, ln
 * 4, ln 2, 0 is .5 .0625 .25 .125 .0625. */
enum { KEYS = 10 };

static hand make(int64_t q_len, sparge_causal causal, float *k, float *q)
{
    static const float mean[] = {8, 1, 4, 2, 1};
    for (int t = 0; t < KEYS; t++) {
        k[t] = logf(mean[t / 2]) + (t % 2 ? 0.5f : -0.5f);
        q[t] = t % 2 ? 1.5f : 0.5f;
    }
    hand x = hand_make(1, 1, q_len, KEYS, 1, 1, q, k, k);
    x.o.causal = causal;
    x.o.block_q = x.o.block_k = 2;
    return x;
}

/* The block that reaches topp is kept. */
Test(spargeattention2, top_p)
{
    float k[KEYS], q[KEYS];
    const hand x = make(2, SPARGE_CAUSAL_NONE, k, q);
    HAS_PAIRS(&x, "spargeattention2", 2, "10000", 0, 0);
    HAS_PAIRS(&x, "spargeattention2", 2, "10000", 0.49, 0);
    HAS_PAIRS(&x, "spargeattention2", 2, "10100", 0.51, 0);
    HAS_PAIRS(&x, "spargeattention2", 2, "10110", 0.8, 0);
    HAS_PAIRS(&x, "spargeattention2", 2, "11110", 0.93, 0);
    HAS_PAIRS(&x, "spargeattention2", 2, "11111", 1, 0);
}

/* Of two counts along one ranking the larger one. */
Test(spargeattention2, top_k_or_top_p)
{
    float k[KEYS], q[KEYS];
    const hand x = make(2, SPARGE_CAUSAL_NONE, k, q);
    HAS_PAIRS(&x, "spargeattention2", 2, "10100", 0.2, 0.4);
    HAS_PAIRS(&x, "spargeattention2", 2, "10110", 0.8, 0.4);
    HAS_PAIRS(&x, "spargeattention2", 2, "10110", 0.2, 0.79);
    HAS_PAIRS(&x, "spargeattention2", 2, "11111", 0.2, 1);
}

/* topk is of the blocks that a row sees: of 1, 2, 3, 4 and 5. The diagonal comes on top. */
Test(spargeattention2, diagonal)
{
    float k[KEYS], q[KEYS];
    const hand x = make(KEYS, SPARGE_CAUSAL_END, k, q);
    HAS_PAIRS(&x, "spargeattention2", 2, "1 11 101 1011 10101", 0, 0.5);
    HAS_PAIRS(&x, "spargeattention2", 2, "1 11 101 1011 11111", 0, 0.8);
    HAS_PAIRS(&x, "spargeattention2", 2, "1 11 111 1111 11111", 1, 0);
}

/* Queries of -1 like the smallest mean. */
Test(spargeattention2, sink)
{
    float k[KEYS], q[KEYS];
    const hand x = make(2, SPARGE_CAUSAL_NONE, k, q);
    q[0] = -0.5f;
    q[1] = -1.5f;
    HAS_PAIRS(&x, "spargeattention2", 2, "01000", 0, 0, 0);
    HAS_PAIRS(&x, "spargeattention2", 2, "11000", 0, 0, 1);
}

/* The tail's one key is its mean, and not half of it. */
Test(spargeattention2, tail)
{
    const float q[] = {1}, k[] = {1, 1, 1, 2, 2};
    hand x = hand_make(1, 1, 1, 5, 1, 1, q, k, k);
    x.o.block_q = x.o.block_k = 2;
    HAS_PAIRS(&x, "spargeattention2", 2, "001", 0, 0);
}
