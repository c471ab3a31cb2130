/* SPDX-License-Identifier: Apache-2.0 */
/* pisa.c: masks and sums of PISA in order 0, made by hand. */
#include <math.h>

#include "tests/methods/hand.h"

TestSuite(pisa);

enum { N = 5 };

/* Blocks of 2, the last of one token. Means of k: (2, 3) (2, 3) (1, 4). The mean queries of head 0
 * are (1, 0) (0, 1) (-1, 0), so that blocks score 2 2 1, 3 3 4, -2 -2 -1; those of head 1, which
 * has the same keys, are (0, 1). */
static const float queries[2][N][2] = {{{1, 0}, {1, 0}, {0, 1}, {0, 1}, {-1, 0}},
                                       {{0, 1}, {0, 1}, {0, 1}, {0, 1}, {0, 1}}};
static const float keys[N][2] = {{1, 5}, {3, 1}, {2, 3}, {2, 3}, {1, 4}};
static const float values[N] = {1, -1, 3, 5, 7};

static hand make(void)
{
    return hand_make(2, 1, N, N, 2, 1, &queries[0][0][0], &keys[0][0], values);
}

Test(pisa, exact_and_pooled)
{
    const hand x = make();
    /* 1.98 blocks are one. Of equals the first. */
    HAS_PAIRS(&x, "pisa0", 2, "122 221 221 221 221 221", 0.66, 2, 0);
    HAS_PAIRS(&x, "pisa0", 2, "122 221 221 221 221 221", 0.0, 2, 0);
    HAS_PAIRS(&x, "pisa0", 2, "112 121 121 121 121 121", 0.67, 2, 0);
    HAS_PAIRS(&x, "pisa0", 2, "111 111 111 111 111 111", 1.0, 2, 0);
}

/* Keys of block 0 are (-1, 2) and (1, -2) off their mean, and their values 1 and -1: together
 * (-2, 4), of length 4.47, whose log is 1.5. Those of the others are their means: log 1e-5. */
Test(pisa, norm)
{
    const hand x = make();
    HAS_PAIRS(&x, "pisa0", 2, "122 122 122 122 122 122", 0.34, 2, 1);
    HAS_PAIRS(&x, "pisa0", 2, "112 121 121 121 121 121", 0.67, 2, 1);
}

static void attends(const hand *x, double density, int64_t query, double o, double lse)
{
    float got[2][N], got_lse[2][N];
    sparge_result result = {.o = {got, SPARGE_F32, 2 * N, N, 1}, .lse = got_lse[0]};
    sparge_error error;
    sparge_plan plan = hand_plan(x, "pisa0", (const double[]){density, 2, 0}, 3);
    check(sparge_plan_run(&plan, NULL, &result, &error) == SPARGE_OK, "%s", error.text);
    check_close(got[0][query], o, 1e-5);
    check_close(got_lse[0][query], lse, 1e-5);
    sparge_plan_free(&plan);
}

Test(pisa, sums)
{
    hand x = make();
    check_case("pooled keys count for those in them, the last for one");
    /* Query 0: keys 0 and 1 by themselves, two of score 2 and value 4, one of score 1 and value 7.
     */
    double sum = exp(1) + exp(3) + 2 * exp(2) + exp(1);
    attends(&x, 0.34, 0, (exp(1) - exp(3) + 2 * exp(2) * 4 + exp(1) * 7) / sum, log(sum));
    check_case("query 2: key 4 by itself, two pairs of score 3 and values 0 and 4");
    sum = exp(4) + 4 * exp(3);
    attends(&x, 0.34, 2, (exp(4) * 7 + 2 * exp(3) * 4) / sum, log(sum));

    check_case("a bias weighs keys that are pooled: 2 counts thrice, 3 not at all, NaN or not");
    float k[N][2], v[N];
    for (int t = 0; t < N; t++) {
        v[t] = t == 3 ? (float)NAN : values[t];
        k[t][0] = keys[t][0];
        k[t][1] = t == 3 ? (float)NAN : keys[t][1];
    }
    const float bias[N] = {0, 0, (float)log(3), -INFINITY, 0};
    x.p.k.data = k;
    x.p.v.data = v;
    x.p.k_bias = bias;
    sum = exp(1) + exp(3) + 3 * exp(2) + exp(1);
    attends(&x, 0.34, 0, (exp(1) - exp(3) + 3 * exp(2) * 3 + exp(1) * 7) / sum, log(sum));

    check_case("biases that no exponential holds");
    x.p.v.data = values;
    x.p.k.data = keys;
    for (int far = -1000; far <= 1000; far += 2000) {
        const float all[N] = {(float)far, (float)far, (float)far, (float)far, (float)far};
        x.p.k_bias = all;
        sparge_plan plan = hand_plan(&x, "pisa0", (const double[]){0.34, 2, 0}, 3);
        const sparge_problem *p = &plan.part[1].problem;
        check_close(p->k_bias[0], far + log(2), 1e-4);
        check_close(((const float *)p->k.data)[1], 3, 1e-6);
        check_close(((const float *)p->v.data)[1], 4, 1e-6);
        sparge_plan_free(&plan);
    }
}
