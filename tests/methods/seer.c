/* SPDX-License-Identifier: Apache-2.0 */
/* seer.c: masks of SeerAttention made by hand. */
#include <math.h>
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(seer);

/* ---- Without a gate. Blocks of 2; a query of 1 sees the mean keys ln 8, 0, ln 4, ln 2, 0. ---- */

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
    return x;
}

/* The map is .5 .0625 .25 .125 .0625. */
Test(seer, threshold)
{
    float k[KEYS], q[KEYS];
    const hand x = make(2, SPARGE_CAUSAL_NONE, k, q);
    HAS_PAIRS(&x, "seer", 2, "11111", 0, 2, 0);
    HAS_PAIRS(&x, "seer", 2, "11111", 0.06, 2, 0);
    HAS_PAIRS(&x, "seer", 2, "10110", 0.07, 2, 0);
    HAS_PAIRS(&x, "seer", 2, "10100", 0.2, 2, 0);
    HAS_PAIRS(&x, "seer", 2, "10000", 0.9, 2, 0);
}

/* Of row 1 key block 1 has 1/9, of row 2 1/13, of row 3 1/15, and of the last row the blocks have
 * .5 .0625 .25 .125 .0625. Nothing is forced. */
Test(seer, rows_that_see_some)
{
    float k[KEYS], q[KEYS];
    const hand x = make(KEYS, SPARGE_CAUSAL_END, k, q);
    HAS_PAIRS(&x, "seer", 2, "1 11 101 1011 10110", 0.1, 2, 0);
    HAS_PAIRS(&x, "seer", 2, "1 10 101 1000 10000", 0.28, 2, 0);
}

Test(seer, last_rows_are_dense)
{
    float k[KEYS], q[KEYS];
    const hand x = make(KEYS, SPARGE_CAUSAL_END, k, q);
    HAS_PAIRS(&x, "seer", 2, "1 10 101 1111 11111", 0.28, 2, 2);
    HAS_PAIRS(&x, "seer", 2, "1 11 111 1111 11111", 0.28, 2, 9);
}

/* Three queries in blocks of 2 at the end of the keys: query 0 sees keys up to the 7th, which is
 * the end of block 3, and query 1 block 4. If it alone is above the threshold, query 0 has the best
 * of the others. */
Test(seer, no_query_without_a_key)
{
    float k[KEYS], q[KEYS];
    hand x = make(3, SPARGE_CAUSAL_END, k, q);
    k[8] = k[9] = 9.0f;
    HAS_PAIRS(&x, "seer", 1, "1100000000 1100000011 0000000011", 0.9, 2, 0);
}

/* ---- With one ---- */

/* Six keys of two channels in blocks of 2. Their largest are 3 2 | 1 5 | 2 2, their least 1 -2 |
 * -4 1 | 2 2, their means 2 0 | -1.5 3 | 2 2. Two heads share them, of queries 4 0 and -4 0 on
 * average. */
static const float gated_keys[] = {1, 2, 3, -2, -4, 1, 1, 5, 2, 2, 2, 2},
                   gated_queries[] = {3, 0, 5, 0, -3, 0, -5, 0};

static hand gated(const float *q, const float *k, const sparge_gate *gate)
{
    hand x = hand_make(2, 1, 2, 6, 2, 2, q, k, k);
    x.context.gate = gate;
    return x;
}

/* A product of one channel: that of the queries times one of the six of the keys. */
Test(seer, largest_least_and_mean)
{
    static const float q_gate[] = {1, 0, 1, 0};
    static const char *const want[] = {"100 010", "010 101", "001 010",
                                       "001 100", "101 010", "010 100"};
    for (int channel = 0; channel < 6; channel++) {
        float k_gate[6] = {0};
        const sparge_gate gate = {.hidden = 1, .k_heads = 1, .q = q_gate, .k = k_gate};
        const hand x = gated(gated_queries, gated_keys, &gate);
        k_gate[channel] = 1.0f;
        HAS_PAIRS(&x, "seer", 2, want[channel], 0.3, 2, 0);
    }
}

/* The second head turns its queries round; its keys are those of the first, or its own. Scores are
 * over the root of 2: of 3 1 2 the best has .94 and the last but one .06. */
Test(seer, matrices_of_heads)
{
    static const float q_gate[] = {1, 0, 0, 0, -1, 0, 0, 0}, /* head, channel of q, product */
        k_gate[] = {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,      /* the largest of channel 0 */
                    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0};     /* the mean of channel 1 */
    sparge_gate gate = {.hidden = 2, .k_heads = 1, .q = q_gate, .k = k_gate};
    const hand x = gated(gated_queries, gated_keys, &gate);
    HAS_PAIRS(&x, "seer", 2, "101 101", 0.03, 2, 0);
    gate.k_heads = 2;
    HAS_PAIRS(&x, "seer", 2, "101 011", 0.03, 2, 0);
    gate.q = NULL;
    HAS_PAIRS(&x, "seer", 2, "101 100", 0.03, 2, 0);
}

static void turn(const float *from, int64_t first, int64_t rows, float *to)
{
    for (int64_t t = 0; t < rows; t++) {
        const float c = cosf((float)(first + t)), s = sinf((float)(first + t));
        to[2 * t] = c * from[2 * t] - s * from[2 * t + 1];
        to[2 * t + 1] = s * from[2 * t] + c * from[2 * t + 1];
    }
}

/* The keys turned by 0 to 5, the queries by 4 and 5, and their blocks by 0, 2 and 4. The queries'
 * product is 4 0; the keys' are their means with channels exchanged, which no rotation is: 0 2, 3
 * -1.5 and 2 2, seen from the queries turned by -4, -2 and 0. That makes scores of -4.3 -7.4 5.7.
 */
Test(seer, rotation)
{
    static const float q_gate[] = {1, 0, 0, 0, 1, 0, 0, 0},
                       k_gate[] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0};
    sparge_gate gate = {.hidden = 2, .k_heads = 1, .rope_base = 1e4, .q = q_gate, .k = k_gate};
    float q[8] = {0}, k[12] = {0};
    hand x = gated(q, k, &gate);
    x.o.causal = SPARGE_CAUSAL_END;
    turn(gated_queries, 4, 2, q);
    turn(gated_queries + 4, 4, 2, q + 4);
    turn(gated_keys, 0, 6, k);
    HAS_PAIRS(&x, "seer", 2, "001 110", 0.01, 2, 0);
    turn(gated_queries, 0, 2, q);
    turn(gated_queries + 4, 0, 2, q + 4);
    x.o.causal = SPARGE_CAUSAL_NONE; /* they stand at 0: 0, 0.3 and 0.6 */
    HAS_PAIRS(&x, "seer", 2, "001 100", 0.4, 2, 0);
}

Test(seer, wrong_gates)
{
    float nan_gate[24] = {0};
    nan_gate[23] = NAN;
    static const float fine[24] = {0};
    const struct {
        sparge_gate gate;
        const char *says;
    } wrong[] = {
        {{0, 1, 0, fine, fine}, "hidden is 0"},
        {{INT64_MAX, 1, 0, fine, fine}, "hidden is 9"},
        {{2, 3, 0, fine, fine}, "k_heads is 3"},
        {{2, 0, 0, fine, fine}, "k_heads is 0"},
        {{4, 1, 0, NULL, fine}, "gate.q is NULL"},
        {{2, 1, 0, fine, NULL}, "gate.k is NULL"},
        {{2, 1, 0.5, fine, fine}, "rope_base is 0.5"},
        {{2, 1, NAN, fine, fine}, "rope_base is nan"},
        {{2, 1, INFINITY, fine, fine}, "rope_base is inf"},
        {{1, 1, 1e4, fine, fine}, "one is odd"},
        {{2, 2, 0, fine, nan_gate}, "not finite"},
        {{4, 1, 0, nan_gate + 8, fine}, "not finite"},
    };
    for (size_t n = 0; n < sizeof wrong / sizeof *wrong; n++) {
        sparge_plan plan;
        sparge_error error = {""};
        const hand x = gated(gated_queries, gated_keys, &wrong[n].gate);
        check_case("%s", wrong[n].says);
        check(sparge_method_plan(sparge_method_find("seer"), &x.p, &x.o, &x.context, NULL, &plan,
                                 &error) == SPARGE_ERR_ARGUMENT,
              "it is taken");
        check(strstr(error.text, wrong[n].says), "%s", error.text);
    }
}
