/* SPDX-License-Identifier: Apache-2.0 */
/* hess.c: budgets of heads, by hand. */
#include <stdlib.h>

#include "tests/methods/hand.h"

TestSuite(hess);

/* Head 0 pays the same to all four keys: the best one of each row leaves 3/4 of it out, and the
 * base keeps all at tau 0.9. Head 1 pays all but 5e-5 to the last key, which is what the base
 * keeps. */
static const float q[] = {0, 10}, keys[] = {0, 1, 2, 3};

static hand make(const float *of)
{
    hand x = hand_make(2, 1, 1, 4, 1, 1, of, keys, keys);
    x.o.block_q = x.o.block_k = 1;
    return x;
}

/* Of 2, 3 and 5 blocks head 0 is to have nearly all, and head 1 what that has no use for. */
Test(hess, the_sensitive_get_the_blocks_of_the_others)
{
    const hand x = make(q);
    HAS_PAIRS(&x, "hess", 1, "11 0001", 0.0);
    HAS_PAIRS(&x, "hess", 1, "111 0001", 0.5);
    HAS_PAIRS(&x, "hess", 1, "1111 0001", 0.9);
    HAS_PAIRS(&x, "hess", 1, "1 1111", 0.9, 0, 1);
    HAS_PAIRS(&x, "hess", 1, "1111 1111", 1.0);
}

/* Of 2 blocks; and the first key beside them. */
Test(hess, the_sink_is_kept)
{
    const hand x = make(q);
    HAS_PAIRS(&x, "hess", 1, "11 1001", 0.0, 0, 0, 1);
}

/* Of 6 blocks. */
Test(hess, the_base_keeps_a_share_at_least)
{
    const hand x = make(q);
    HAS_PAIRS(&x, "hess", 1, "1111 0011", 0.0, 0.75);
}

/* Queries 0 and 1 see one and two keys; the diagonal stays whatever the budget is. */
Test(hess, the_diagonal_is_kept)
{
    static const float two[] = {0, 0, -10, -10};
    hand x = hand_make(2, 1, 2, 2, 1, 1, two, keys, keys);
    x.o.block_q = x.o.block_k = 1;
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "hess", 1, "1 11 1 01", 0.0);
}

Test(hess, sensitivity_is_that_of_the_first_call)
{
    const float other[] = {10, 0};
    const double param[] = {0.9, 0.0, 0.0, 0.0};
    const hand x = make(q), y = make(other);
    void *state = NULL;
    const sparge_context context = {.state = &state};
    for (int n = 0; n < 2; n++) {
        sparge_plan plan;
        uint8_t pairs[2][4];
        const hand *of = n ? &y : &x;
        check(sparge_method_plan(sparge_method_find("hess"), &of->p, &of->o, &context, param, &plan,
                                 NULL) == SPARGE_OK,
              "plan");
        check(sparge_plan_pairs(&plan, pairs[0], NULL) == SPARGE_OK, "pairs");
        for (int key = 0; key < 4; key++) {
            check_equal(pairs[0][key], (uint8_t)1);
            check_equal(pairs[1][key], (uint8_t)(key == (n ? 0 : 3))); /* its best one */
        }
        sparge_plan_free(&plan);
    }
    free(state);
}
