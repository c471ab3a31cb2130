/* SPDX-License-Identifier: Apache-2.0 */
/* minference.c: masks of MInference made by hand. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(minference);

enum { A_SHAPE = 1, VERTICAL_SLASH, BLOCK_SPARSE };
enum { N = 8, LONG = 64 };

/* Keys are unit vectors, so a query is its row of scores. The last two queries of head 0 pay 8
 * parts to key 2, 8 to the third key before them and 1 to the others: of columns key 2 has most, of
 * diagonals the distance 3. To head 1 all pairs are equal. */
static hand make(float q[2][N][N], float k[N][N], int64_t q_len)
{
    memset(q, 0, sizeof(float[2][N][N]));
    memset(k, 0, sizeof(float[N][N]));
    for (int t = 0; t < N; t++)
        k[t][t] = 1.0f;
    for (int64_t t = 0; t < 2; t++) {
        float *row = q[0][0] + (q_len - 2 + t) * N;
        row[2] = row[N - 2 + t - 3] = logf(8.0f);
    }
    hand x = hand_make(2, 1, q_len, N, N, N, &q[0][0][0], &k[0][0], &k[0][0]);
    x.o.causal = SPARGE_CAUSAL_END;
    return x;
}

/* 2 of 8 diagonals and as many columns. Key 0 and distance 0 are kept always and count; then comes
 * the best, and to head 1 the first. */
Test(minference, vertical_slash)
{
    float q[2][N][N], k[N][N];
    hand x = make(q, k, N);
    HAS_PAIRS(&x, "minference", 1,
              "1 11 101 1011 11101 101001 1011001 10101001 "
              "1 11 111 1111 11011 110011 1100011 11000011",
              0.25, VERTICAL_SLASH, 1, 2, 1, 1);
    /* two of each are kept always, and no columns are asked for */
    HAS_PAIRS(&x, "minference", 1,
              "1 11 111 1111 11011 110011 1100011 11000011 "
              "1 11 111 1111 11011 110011 1100011 11000011",
              0.25, VERTICAL_SLASH, 0, 2, 2, 2);
    x = make(q, k, 2); /* two queries of keys up to 6 and to 7 */
    HAS_PAIRS(&x, "minference", 1, "1011001 10101001 1100011 11000011", 0.25, VERTICAL_SLASH, 1, 2,
              1, 1);
}

/* 3 of 8 diagonals and 0.7 times as many columns. */
Test(minference, a_shape)
{
    float q[2][N][N], k[N][N];
    const hand x = make(q, k, N);
    HAS_PAIRS(&x, "minference", 1,
              "1 11 111 1111 11111 110111 1100111 11000111 "
              "1 11 111 1111 11111 110111 1100111 11000111",
              0.375, A_SHAPE, 0.7, 2, 1, 1);
}

/* Blocks of 2 keys have the means 1, 3, 2 and, since the tail counts as two keys, 1.5. */
Test(minference, block_sparse)
{
    const float k[] = {1, 1, 3, 3, 2, 2, 3};
    const float q[] = {1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1};
    hand x = hand_make(2, 1, 7, 7, 1, 1, q, k, k);
    x.o.causal = SPARGE_CAUSAL_END;
    /* two blocks a row; query 6 is without its own */
    HAS_PAIRS(&x, "minference", 1,
              "1 11 111 1111 00111 001111 001111 "
              "1 11 111 1111 11001 110011 1100001",
              0.5, BLOCK_SPARSE, 1, 2, 1, 1, 2);
}

/* The best block is the last, which the first of two queries does not see. */
Test(minference, no_query_is_without_a_key)
{
    const float k[] = {1, 1, 3, 3, 2, 2, 9}, q[] = {1, 1};
    hand x = hand_make(1, 1, 2, 7, 1, 1, q, k, k);
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "minference", 1, "000011 0000111", 0.25, BLOCK_SPARSE, 1, 2, 1, 1, 2);
}

/* ---- The choice ---- */

typedef struct rows {
    float q[3][LONG][LONG], k[LONG][LONG];
    uint8_t pairs[3][LONG][LONG];
} rows;

/* Head 0 attends to its first three keys and its nearest three, head 1 to key 20 and to the tenth
 * key before, head 2 to one block of 8 keys. */
static hand three_heads(rows *r)
{
    static const int block[] = {0, 0, 1, 0, 3, 2, 5, 1};
    *r = (rows){0};
    for (int t = 0; t < LONG; t++) {
        r->k[t][t] = 1.0f;
        for (int n = 0; n < 3; n++)
            r->q[0][t][n] = r->q[0][t][t < n ? 0 : t - n] = 9.0f;
        r->q[1][t][20] = r->q[1][t][t < 10 ? 0 : t - 10] = 9.0f;
        for (int n = 0; n < 8; n++)
            r->q[2][t][8 * block[t / 8] + n] = 9.0f;
    }
    hand x = hand_make(3, 1, LONG, LONG, LONG, LONG, &r->q[0][0][0], &r->k[0][0], &r->k[0][0]);
    x.o.causal = SPARGE_CAUSAL_END;
    return x;
}

static sparge_status find_pairs(const hand *x, int pattern, void **state,
                                uint8_t pairs[3][LONG][LONG])
{
    const double param[SPARGE_MAX_PARAMS] = {0.1, pattern, 1, 8, 1, 1, 8};
    const sparge_context context = {.state = state};
    sparge_plan plan;
    sparge_status status = sparge_method_plan(sparge_method_find("minference"), &x->p, &x->o,
                                              &context, param, &plan, NULL);
    if (!status)
        status = sparge_plan_pairs(&plan, &pairs[0][0][0], NULL);
    sparge_plan_free(&plan);
    return status;
}

/* Pattern 0 gives each head what this one gives. */
static void has_patterns(const hand *x, void **state, int first, int second, int third)
{
    static rows got, want;
    const int pattern[] = {first, second, third};
    check_equal(find_pairs(x, 0, state, got.pairs), SPARGE_OK);
    for (int h = 0; h < 3; h++) {
        check_case("head %d", h);
        check_equal(find_pairs(x, pattern[h], NULL, want.pairs), SPARGE_OK);
        check_same(&got.pairs[h][0][0], &want.pairs[h][0][0], LONG * LONG);
    }
}

Test(minference, each_head_has_the_pattern_that_keeps_most)
{
    static rows r, other;
    hand x = three_heads(&r);
    void *state = NULL;
    has_patterns(&x, NULL, A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE);
    has_patterns(&x, &state, A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE);
    memset(r.q, 0, sizeof r.q); /* all pairs are equal, and so are the patterns: the first one */
    has_patterns(&x, NULL, A_SHAPE, A_SHAPE, A_SHAPE);
    has_patterns(&x, &state, A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE); /* remembered */
    x.p.heads = 2;
    check_equal(find_pairs(&x, 0, &state, other.pairs), SPARGE_ERR_ARGUMENT);
    free(state);
}
