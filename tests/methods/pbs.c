/* SPDX-License-Identifier: Apache-2.0 */
/* pbs.c: masks of PBS-Attn made by hand. */
#include <math.h>
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(pbs);

/* 9 keys in segments of 4 and blocks of 2; the last key is the tail. Head 0, whose queries are 1,
 * puts them in the order 0 1 3 2 | 6 4 7 5, and head 1, whose queries are -1, in 2 1 3 0 | 5 7 4 6:
 * of the equal keys 1 and 3 the earlier comes first. Means of the blocks are then 3.5 1 | 3.5 0.5
 * in head 0 and 1 3.5 | 0.5 3.5 in head 1. */
static const float keys[] = {4, 3, -1, 3, 2, 0, 5, 1, 7};
static const float queries[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

static hand make(int64_t heads, int64_t q_len, sparge_causal causal)
{
    hand x = hand_make(heads, 1, q_len, 9, 1, 1, queries, keys, keys);
    x.o.causal = causal;
    return x;
}

/* In the own segment causality is that of the keys as they were. Queries 4 to 7 have 0.92 of their
 * mass in the first block of segment 0, which crosses 0.85. It has key 0 in head 0; in head 1 the
 * other one has, and is kept too.
 *
 * The block of query 8 counts as two queries, so its mean is half of it. In head 0 the blocks have
 * .40 .11 .40 .09 of the mass, and the third best crosses. In head 1 they have .35 .10 .45 .10, and
 * of the equal ones the earlier crosses: keys 4 and 6 are not kept. */
Test(pbs, segments)
{
    const hand x = make(2, 9, SPARGE_CAUSAL_END);
    HAS_PAIRS(&x, "pbs", 1,
              "1 11 111 1111 11001 110011 1100111 11001111 111110101 "
              "1 11 111 1111 11111 111111 1111111 11111111 111101011",
              0.85, 4, 2);
}

/* The crossing block is kept at 0 too. */
Test(pbs, all_and_least)
{
    const hand x = make(1, 9, SPARGE_CAUSAL_END);
    HAS_PAIRS(&x, "pbs", 1, "1 11 111 1111 11111 111111 1111111 11111111 111111111", 1, 4, 2);
    HAS_PAIRS(&x, "pbs", 1, "1 11 111 1111 11001 110011 1100111 11001111 110000001", 0, 4, 2);
}

/* Two queries in one block. At the end the first is the last of segment 1, and segment 1 and the
 * tail are their own. At the start both stand in segment 0. */
Test(pbs, a_query_stands_where_its_last_key_does)
{
    const hand end = make(1, 2, SPARGE_CAUSAL_END), start = make(1, 2, SPARGE_CAUSAL_START);
    HAS_PAIRS(&end, "pbs", 1, "11001111 110011111", 0.85, 4, 2);
    HAS_PAIRS(&start, "pbs", 1, "1 11", 0.85, 4, 2);
}

Test(pbs, one_segment_is_dense)
{
    const hand x = make(1, 9, SPARGE_CAUSAL_END);
    const double param[] = {0, 9, 3}, odd[] = {0, 9, 2};
    sparge_plan plan = hand_plan(&x, "pbs", param, 3);
    check(plan.parts == 1 && !plan.part[0].mask.bits && !plan.part[0].place, "it is not dense");
    sparge_plan_free(&plan);
    sparge_error error = {""};
    check_equal(sparge_method_plan(sparge_method_find("pbs"), &x.p, &x.o, NULL, odd, &plan, &error),
                SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "multiple of block"), "%s", error.text);
}

/* Keys, values and biases move together, as the pairs of the plan say. A NaN is 0 where blocks are
 * chosen and stays one in the scores. */
Test(pbs, arrays_of_the_plan)
{
    const double param[] = {0.85, 4, 2};
    float k[9], bias[9], o[2][18], lse[2][18];
    uint8_t pairs[18][9];
    hand x = make(2, 9, SPARGE_CAUSAL_END);
    memcpy(k, keys, sizeof k);
    k[5] = NAN; /* was 0 */
    for (int n = 0; n < 9; n++)
        bias[n] = n == 6 ? -INFINITY : 0.25f * (float)n;
    x.p.k.data = k;
    x.p.k_bias = bias;
    sparge_plan plan = hand_plan(&x, "pbs", param, 3);
    sparge_mask mask;
    check_equal(sparge_plan_pairs(&plan, pairs[0], NULL), SPARGE_OK);
    check_equal(sparge_mask_from_pairs(&mask, &x.p, &x.o, pairs[0], NULL), SPARGE_OK);
    for (int n = 0; n < 2; n++) {
        sparge_result result = {.o = {o[n], SPARGE_F32, 18, 9, 1}, .lse = lse[n]};
        check_equal(n ? sparge_attend(&x.p, &x.o, &mask, &result, NULL)
                      : sparge_plan_run(&plan, NULL, &result, NULL),
                    SPARGE_OK);
    }
    for (int n = 0; n < 18; n++) {
        check_case("query %d of head %d", n % 9, n / 9);
        check(isnan(lse[1][n]) == (pairs[n][5] != 0), "the NaN of key 5 is not in %g", lse[1][n]);
        if (pairs[n][5])
            check(isnan(lse[0][n]) && isnan(o[0][n]), "the NaN is lost: %g", lse[0][n]);
        else {
            check_close(lse[0][n], lse[1][n], 1e-5);
            check_close(o[0][n], o[1][n], 1e-5);
        }
    }
    sparge_mask_free(&mask);
    sparge_plan_free(&plan);
}
