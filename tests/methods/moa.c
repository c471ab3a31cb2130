/* SPDX-License-Identifier: Apache-2.0 */
/* moa.c: masks of MoA made by hand, and the windows of moa_calibrated. */
#include <stdlib.h>
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(moa);

static const float zeros[32];

static hand make(int64_t heads, int64_t q_len, int64_t k_len)
{
    hand x = hand_make(heads, 1, q_len, k_len, 1, 1, zeros, zeros, zeros);
    x.o.causal = SPARGE_CAUSAL_END;
    return x;
}

/* Of 8 keys, 3 and a bit by beta; then one more and one less by alpha, and none. */
Test(moa, windows_of_keys)
{
    const hand x = make(1, 8, 8);
    HAS_PAIRS(&x, "moa", 1, "1 11 111 0111 00111 000111 0000111 00000111", 0.45, 0, 1, 0);
    HAS_PAIRS(&x, "moa", 1, "1 11 111 1111 10111 100111 1000111 10000111", 0.45, 0, 1, 1);
    HAS_PAIRS(&x, "moa", 1, "1 11 111 1111 01111 001111 0001111 00001111", 0.45, 1, 1, 0);
    HAS_PAIRS(&x, "moa", 1, "1 11 011 0011 00011 000011 0000011 00000011", 0.45, -1, 1, 0);
    HAS_PAIRS(&x, "moa", 1, "1 01 001 0001 00001 000001 0000001 00000001", 0.45, -9, 1, 0);
}

/* 7 tokens in blocks of 2 are four blocks. Alpha is rounded down to blocks first: -1 token is one
 * block less, and 3 are one more. */
Test(moa, windows_of_blocks)
{
    const hand x = make(1, 7, 7), end = make(1, 2, 7);
    HAS_PAIRS(&x, "moa", 2, "1 11 011 0011", 0.7, 0, 2, 0);
    HAS_PAIRS(&x, "moa", 2, "1 01 001 0001", 0.7, -1, 2, 0);
    HAS_PAIRS(&x, "moa", 2, "1 11 111 0111", 0.6, 3, 2, 0);
    HAS_PAIRS(&end, "moa", 2, "0011", 0.25, 0, 2, 0); /* queries 5 and 6 */
}

/* ---- moa_calibrated ---- */

enum { KEYS = 8, HEADS = 2, PAIRS = KEYS * (KEYS + 1) / 2 };

/* Queries are 1 and keys are scores. Head 0 pays all to key 3, head 1 all to its latest keys,
 * e^8 to one for each next: both beside key 0, a sink that is kept always. */
static const float keys[HEADS * KEYS] = {0, 0, 0, 60, 0, 0, 0, 0, 0, 8, 16, 24, 32, 40, 48, 56};
static const float ones[HEADS * KEYS] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

static hand two_heads(void)
{
    hand x = hand_make(HEADS, HEADS, KEYS, KEYS, 1, 1, ones, keys, keys);
    x.o.causal = SPARGE_CAUSAL_END;
    return x;
}

/* Nearest keys of each head, by the last row of its mask; the first key is kept. */
static void has_windows(const hand *x, const sparge_context *context, double density, int first,
                        int second)
{
    const double param[] = {density, 1, 1};
    const int want[] = {first, second};
    sparge_error error;
    sparge_plan plan;
    const int64_t k_len = x->p.k_len, q_len = x->p.q_len;
    uint8_t *pairs = check_alloc((size_t)(HEADS * q_len * k_len));
    check_case("density %g, %lld keys", density, (long long)k_len);
    check(sparge_method_plan(sparge_method_find("moa_calibrated"), &x->p, &x->o, context, param,
                             &plan, &error) == SPARGE_OK,
          "%s", error.text);
    check(sparge_plan_pairs(&plan, pairs, &error) == SPARGE_OK, "%s", error.text);
    for (int h = 0; h < HEADS; h++) {
        int64_t window = 0;
        while (window < k_len && pairs[((h + 1) * q_len - 1) * k_len + k_len - 1 - window])
            window++;
        check_equal(window, want[h]);
        check_equal(pairs[((h + 1) * q_len - 1) * k_len], 1);
    }
    sparge_plan_free(&plan);
    check_free(pairs);
}

/* A window of one key and the sink are 15 of 36 pairs, and each further key of the window 6, 5, 4,
 * 3, 2 and 1 pairs more. Head 0 has all to gain, at every key up to the fifth: its last query
 * stands four keys behind. */
Test(moa, the_head_with_most_to_gain_goes_first)
{
    const hand x = two_heads();
    has_windows(&x, NULL, 0.0, 1, 1);
    has_windows(&x, NULL, 30.0 / (HEADS * PAIRS), 1, 1);
    has_windows(&x, NULL, 35.9 / (HEADS * PAIRS), 1, 1);
    has_windows(&x, NULL, 36.5 / (HEADS * PAIRS), 2, 1);
    has_windows(&x, NULL, 41.5 / (HEADS * PAIRS), 3, 1);
    has_windows(&x, NULL, 48.5 / (HEADS * PAIRS), 5, 1);
    has_windows(&x, NULL, 54.5 / (HEADS * PAIRS), 5, 2);
    has_windows(&x, NULL, 1.0, 8, 8);
}

/* The last query of head 0 pays all to key 4: two keys more gain nothing, and the third one all. */
Test(moa, a_gain_may_be_far)
{
    float k[HEADS * KEYS];
    memcpy(k, keys, sizeof k);
    k[3] = 0.0f;
    k[4] = 60.0f;
    hand x = hand_make(HEADS, HEADS, 1, KEYS, 1, 1, ones, k, k);
    x.o.causal = SPARGE_CAUSAL_END;
    has_windows(&x, NULL, 5.5 / (HEADS * KEYS), 2, 1);
    has_windows(&x, NULL, 7.5 / (HEADS * KEYS), 4, 1);
    has_windows(&x, NULL, 8.5 / (HEADS * KEYS), 4, 2);
}

/* The state holds shares of the sequence: 5 and 2 of 8 keys are 10 and 4 of 16. What the second
 * call's keys are like does not matter. */
Test(moa, calibrates_once)
{
    const hand x = two_heads();
    hand y = hand_make(HEADS, 1, 2 * KEYS, 2 * KEYS, 1, 1, zeros, zeros, zeros);
    void *state = NULL;
    const sparge_context context = {.state = &state};
    y.o.causal = SPARGE_CAUSAL_END;
    has_windows(&x, &context, 54.5 / (HEADS * PAIRS), 5, 2);
    has_windows(&y, &context, 191.5 / (HEADS * 136), 10, 4);
    free(state);
}

/* A head of its own density has what it has in a call of that. */
Test(moa, own_densities)
{
    const hand x = two_heads();
    const double first[HEADS] = {54.5 / (HEADS * PAIRS), 1.0};
    const sparge_context context = {.first = first};
    has_windows(&x, &context, 0.0, 5, 8);
}
