/* SPDX-License-Identifier: Apache-2.0 */
/* sparsed.c: masks of SparseD made by hand. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(sparsed);

enum { N = 8 };

/* Keys are unit vectors, so a query is its row of scores: so many parts of attention. The first two
 * queries, the next two, ... have one row. */
static hand make(const double parts[4][N], float q[N][N], float k[N][N])
{
    memset(k, 0, sizeof(float[N][N]));
    for (int t = 0; t < N; t++) {
        k[t][t] = 1.0f;
        for (int c = 0; c < N; c++)
            q[t][c] = (float)log(parts[t / 2][c]);
    }
    return hand_make(1, 1, N, N, N, N, q[0], k[0], k[0]);
}

/* Blocks of two keys, of which the first two are the prompt. */
static const double parts[4][N] = {{9, 9, 1, 1, 8, 8, 2, 2},
                                   {1, 1, 2, 2, 8, 8, 9, 9},
                                   {8, 8, 9, 9, 1, 1, 2, 2},
                                   {1, 9, 8, 1, 2, 2, 2, 1}};

/* Two blocks of all, of which those of the prompt are kept, and one of those that are generated; as
 * many of all if there is no prompt. A quarter of 4 and half of 2 make 2. */
Test(sparsed, prompt_and_generation)
{
    float q[N][N], k[N][N];
    const hand x = make(parts, q, k);
    HAS_PAIRS(&x, "sparsed", 2, "1010 0001 1101 1110", 0.25, 0, 4, 2);
    HAS_PAIRS(&x, "sparsed", 2, "1010 0011 1100 1100", 0.25, 0, 0, 2);
    HAS_PAIRS(&x, "sparsed", 2, "1011 0111 1111 1111", 0.5, 0, 4, 2);
    HAS_PAIRS(&x, "sparsed", 2, "1000 0001 0100 1000", 0, 0, 0, 2);
    HAS_PAIRS(&x, "sparsed", 2, "1111 1111 1111 1111", 1, 0, 4, 2);
    /* a prompt of 3 ends in the second block; the last block is generated */
    HAS_PAIRS(&x, "sparsed", 2, "1010 0001 1101 1110", 0.25, 0, 3, 2);
    HAS_PAIRS(&x, "sparsed", 2, "1011 0011 1101 1101", 0.25, 0, 8, 2);
    HAS_PAIRS(&x, "sparsed", 2, "1011 0011 1101 1101", 0.25, 0, 100, 2);
}

/* The first query pays nearly all to the prompt, and of what is generated prefers block 2 by far;
 * the second pays to what is generated, and prefers block 3 by little. */
Test(sparsed, generation_has_a_softmax_of_its_own)
{
    const double two[2][N] = {{1e6, 1e6, 1, 1, 9, 9, 1, 1}, {1, 1, 2, 2, 9, 9, 11, 11}};
    float q[N][N], k[N][N];
    hand x = make(parts, q, k);
    for (int c = 0; c < N; c++) {
        q[0][c] = (float)log(two[0][c]);
        q[1][c] = (float)log(two[1][c]);
    }
    x.p.q_len = 2;
    HAS_PAIRS(&x, "sparsed", 2, "1010", 0, 0, 4, 2);
}

/* Steps 0 and 1 of skip 2 are dense; step 1 makes the map, and step 2 has it though its own is
 * another. Without a state it has its own. */
Test(sparsed, steps)
{
    void *state = NULL;
    float q[N][N], k[N][N], zero[N][N] = {{0}};
    hand x = make(parts, q, k);
    x.context.state = &state;
    for (int step = 0; step < 2; step++) {
        x.context.step = step;
        HAS_PAIRS(&x, "sparsed", 2, "1111 1111 1111 1111", 0.25, 2, 4, 2);
        check((state != NULL) == (step == 1), "a map is made in step %d", step);
    }
    x.p.q.data = zero;
    x.context.step = 2;
    HAS_PAIRS(&x, "sparsed", 2, "1010 0001 1101 1110", 0.25, 2, 4, 2);
    HAS_PAIRS(&x, "sparsed", 2, "1011 0111 1111 1111", 0.5, 2, 4, 2);
    x.context.state = NULL;
    HAS_PAIRS(&x, "sparsed", 2, "1110 1110 1110 1110", 0.25, 2, 4, 2);
    free(state);
}

/* A map of other blocks is refused. */
Test(sparsed, a_map_that_does_not_fit)
{
    void *state = NULL;
    const double prompts[2][4] = {{0.25, 0, 4, 2}, {0.25, 0, 2, 2}};
    float q[N][N], k[N][N];
    hand x = make(parts, q, k);
    sparge_error error = {""};
    x.context.state = &state;
    sparge_plan plan = hand_plan(&x, "sparsed", prompts[0], 4);
    sparge_plan_free(&plan);
    check_equal(sparge_method_plan(sparge_method_find("sparsed"), &x.p, &x.o, &x.context,
                                   prompts[1], &plan, &error),
                SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "state is of sparsed"), "%s", error.text);
    free(state);
}
