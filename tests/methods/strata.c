/* SPDX-License-Identifier: Apache-2.0 */
/* strata.c: which blocks strata samples, made by hand, and what its sums are in the mean. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(strata);

enum { Q = 4, K = 18 };

/* Blocks of 4 x 4, the last of two keys, and cells of 2. All queries are 1, and a key is the log of
 * its weight: cells of blocks have 2 2, 1 1, .5 .5, .25 .25 and .5 of 8, and masses of 4, 2, 1, .5
 * and .5 eighths. An even share is a fifth. */
static const float ones[K] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
static const double weight[] = {2, 1, 0.5, 0.25, 0.5};

static hand make(float *k, int64_t q_len)
{
    for (int t = 0; t < K; t++)
        k[t] = (float)log(weight[t / 4]);
    hand x = hand_make(1, 1, q_len, K, 1, 1, ones, k, k);
    x.o.block_q = x.o.block_k = 4;
    return x;
}

static int64_t computed(const hand *x, double t)
{
    sparge_error error;
    sparge_counts count;
    sparge_plan plan = hand_plan(x, "strata", (const double[]){t, 2, 0}, 3);
    check(sparge_plan_count(&plan, &count, &error) == SPARGE_OK, "%s", error.text);
    sparge_plan_free(&plan);
    return count.qk_tokens;
}

/* Shares are 2.5, 1.25, .625 and .3125. A block that has t itself is whole, one that lacks it is
 * one of each 2 or 4; the last two keys are whole. */
Test(strata, mass_of_a_computed_key)
{
    float k[K];
    const hand x = make(k, Q);
    static const struct {
        double t;
        const char *want;
        int64_t keys;
    } table[] = {{0, "11111", 18},    {0.312, "11111", 18}, {0.313, "11121", 16},
                 {0.63, "11221", 13}, {1.251, "12221", 10}, {2.49, "12221", 10},
                 {2.51, "22221", 7},  {1e9, "22221", 6},    {INFINITY, "22221", 6}};
    for (size_t n = 0; n < sizeof table / sizeof *table; n++) {
        HAS_PAIRS(&x, "strata", 4, table[n].want, table[n].t, 2, 0);
        check_case("t %g", table[n].t);
        check_equal(computed(&x, table[n].t), Q * table[n].keys);
    }
}

/* Equal to t is enough. */
Test(strata, even_shares)
{
    const hand all = hand_make(1, 1, Q, 16, 1, 1, ones, ones, ones);
    hand x = all;
    x.o.block_q = x.o.block_k = 4;
    HAS_PAIRS(&x, "strata", 4, "1111", 1.0, 2, 0);
    HAS_PAIRS(&x, "strata", 4, "2222", 1.001, 2, 0);
    check_equal(computed(&x, 2.0), (int64_t)Q * 8);
    check_equal(computed(&x, 2.001), (int64_t)Q * 4);
}

/* Queries 2 to 5 see keys to 14 to 17: their block's diagonal is blocks 3 and 4. */
Test(strata, causal)
{
    float k[K];
    hand x = make(k, Q);
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "strata", 4, "12211", INFINITY, 2, 1);
    x.o.causal = SPARGE_CAUSAL_START;
    HAS_PAIRS(&x, "strata", 4, "1", INFINITY, 2, 1);
    x.p.q_len = 12;
    HAS_PAIRS(&x, "strata", 4, "1 11 121", INFINITY, 2, 1);
}

/* ---- Samples ---- */

/* Every key of a cell of 4 stands for it as often as any other, and for ln 4 and its bias. */
Test(strata, any_key_of_a_cell)
{
    enum { SEEDS = 4000 };
    float k[16], bias[16];
    int drawn[16] = {0};
    for (int t = 0; t < 16; t++) {
        k[t] = (float)t;
        bias[t] = t == 5 ? -INFINITY : 0.125f * (float)t;
    }
    const hand made = hand_make(1, 1, 1, 16, 1, 1, ones, k, k);
    hand x = made;
    x.o.block_q = x.o.block_k = 4;
    x.p.k_bias = bias;
    for (int seed = 0; seed < SEEDS; seed++) {
        sparge_plan plan = hand_plan(&x, "strata", (const double[]){INFINITY, 2, 0, seed}, 4);
        const sparge_problem *p = &plan.part[2].problem;
        check_equal(plan.parts, 3);
        check_equal(p->k_len, (int64_t)4);
        for (int cell = 0; cell < 4; cell++) {
            const int t = (int)((const float *)p->k.data)[cell * p->k.token];
            check_equal(t / 4, cell);
            check_close(((const float *)p->v.data)[cell * p->v.token], t, 0.0);
            check(p->k_bias[cell] == bias[t] + (float)log(4.0), "bias %g", p->k_bias[cell]);
            drawn[t]++;
        }
        sparge_plan_free(&plan);
    }
    for (int t = 0; t < 16; t++) /* five standard deviations of 27 */
        check(abs(drawn[t] - SEEDS / 4) < 137, "key %d is drawn %d times", t, drawn[t]);
}

/* Values rise with the place and near keys have a little more mass. The kept half of the blocks is
 * far from o; the sample is not, in the mean. */
Test(strata, flat_rows_are_not_biased)
{
    enum { N = 128, SEEDS = 400 };
    float q[N], k[N], v[N], o[N], lse[N];
    double want = 0.0, all = 0.0, mean = 0.0;
    for (int t = 0; t < N; t++) {
        q[t] = 1.0f;
        k[t] = 0.1f * (float)(t / 16);
        v[t] = (float)t;
        want += exp((double)k[t]) * t;
        all += exp((double)k[t]);
    }
    hand x = hand_make(1, 1, N, N, 1, 1, q, k, v);
    x.o.block_q = x.o.block_k = 16;
    sparge_result result = {.o = {o, SPARGE_F32, N, N, 1}, .lse = lse};
    sparge_error error;
    sparge_plan mass = hand_plan(&x, "oracle_mass", (const double[]){0.5}, 1);
    check(sparge_plan_run(&mass, NULL, &result, &error) == SPARGE_OK, "%s", error.text);
    check(o[0] > want / all + 20.0, "%g beside %g", (double)o[0], want / all);
    sparge_plan_free(&mass);
    for (int seed = 0; seed < SEEDS; seed++) {
        sparge_plan plan = hand_plan(&x, "strata", (const double[]){2.5, 8, 1, seed}, 4);
        check(sparge_plan_run(&plan, NULL, &result, &error) == SPARGE_OK, "%s", error.text);
        check_close(o[0], want / all, 3.0);
        mean += (double)o[0] / SEEDS;
        sparge_plan_free(&plan);
    }
    check_close(mean, want / all, 0.05);
}

/* ---- The order ---- */

/* Keys and queries of two kinds by turns. In the order of the tree a block has one kind, which pays
 * to its own alone. */
Test(strata, blocks_of_one_kind)
{
    static const char *const kinds[2] = {"1212121212121212", "2121212121212121"};
    float x[16];
    for (int t = 0; t < 16; t++)
        x[t] = t % 2 ? -3.0f : 3.0f;
    hand made = hand_make(1, 1, 16, 16, 1, 1, x, x, x);
    made.o.block_q = made.o.block_k = 8;
    char want[16 * 17 + 1];
    for (int t = 0; t < 16; t++)
        snprintf(want + 17 * t, 18, "%s ", kinds[t % 2]);
    want[16 * 17 - 1] = '\0';
    HAS_PAIRS(&made, "strata", 1, want, 1.9, 4, 1);
    memset(want, '1', sizeof want - 2);
    for (int t = 1; t < 16; t++)
        want[17 * t - 1] = ' ';
    HAS_PAIRS(&made, "strata", 1, want, 1.0, 4, 0);
}
