/* SPDX-License-Identifier: Apache-2.0 */
/* blasst.c: tiles that BLASST skips, by hand. */
#include <math.h>

#include "sparge_inspect.h"
#include "tests/methods/hand.h"

TestSuite(blasst);

/* 8 keys in tiles of 2, whose scores for the one query of each head are the keys: 0 0 | 3 1 | 1 1 |
 * 2 0 and 9 0 | 3 1 | 1 1 | 2 0. Running maxima are 0 3 3 3 and 9 9 9 9, so that tiles lie 0, 0, -2
 * and -1, or 0, -6, -8 and -7 below them. */
static const float keys[2][8] = {{0, 0, 3, 1, 1, 1, 2, 0}, {9, 0, 3, 1, 1, 1, 2, 0}};

static double density(const double *param, int heads)
{
    static const float q[] = {1, 1};
    float o[2];
    hand x = hand_make(heads, heads, 1, 8, 1, 1, q, keys[0], keys[0]);
    sparge_plan plan = hand_plan(&x, "blasst", param, 2);
    sparge_result r = {.o = {o, SPARGE_F32, heads, 1, 1}};
    check(sparge_plan_run(&plan, NULL, &r, NULL) == SPARGE_OK, "run");
    check_equal(r.counts.qk_tokens, (int64_t)8 * heads);
    sparge_plan_free(&plan);
    return (double)r.counts.pv_tokens / (double)r.counts.tokens;
}

/* a / 8 is exp(-2.5), exp(-1.5), exp(-0.5), and from 1 on there is no more to skip. */
Test(blasst, tiles_far_below_the_maximum)
{
    static const double share[] = {1.0, 0.75, 0.5, 0.5};
    static const double a[] = {0.65668, 1.78504, 4.85225, 1000.0};
    for (int n = 0; n < 4; n++) {
        check_case("a %g", a[n]);
        check_close(density((const double[]){a[n], 2}, 1), share[n], 1e-9);
    }
    check_close(density((const double[]){4.85225, 2}, 2), 0.375, 1e-9);
    check_close(density((const double[]){0.0, 2}, 2), 1.0, 1e-9);
}

/* A row whose tile is near keeps the tile for the other rows of its block. */
Test(blasst, rows_of_a_tile_go_together)
{
    static const float q[] = {1, -1};
    float o[2];
    hand x = hand_make(1, 1, 2, 8, 1, 1, q, keys[0], keys[0]);
    const double param[] = {4.85225, 2};
    sparge_plan plan = hand_plan(&x, "blasst", param, 2);
    sparge_result r = {.o = {o, SPARGE_F32, 2, 2, 1}};
    check(sparge_plan_run(&plan, NULL, &r, NULL) == SPARGE_OK, "run");
    /* Query 1: maxima 0 0 0 0, tiles 0 -1 -1 0. Tile 2 alone is far for both. */
    check_equal(r.counts.pv_tokens, (int64_t)12);
    sparge_plan_free(&plan);
}

/* The density that is sought is that of P.V. */
Test(blasst, density_is_found_by_runs)
{
    static const float q[] = {1, 1};
    hand x = hand_make(2, 2, 1, 8, 1, 1, q, keys[0], keys[0]);
    double param[] = {1.0, 2};
    sparge_plan plan;
    sparge_error error;
    check(sparge_method_plan_at(sparge_method_find("blasst"), &x.p, &x.o, NULL, param, 0.625, NULL,
                                &plan, &error) == SPARGE_OK,
          "%s", error.text);
    check_close(density(param, 2), 0.625, 1e-9);
    check(param[0] >= 7.999 * exp(-6.0) && param[0] < 8.0 * exp(-2.0), "a %g", param[0]);
    sparge_plan_free(&plan);
}
