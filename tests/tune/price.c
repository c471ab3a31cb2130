/* SPDX-License-Identifier: Apache-2.0 */
/* price.c: the grid of a parameter; and what is chosen for one price, by hand and beside all
 * combinations. */
#include <math.h>
#include <string.h>

#include "sparge_inspect.h"
#include "sparge_tune.h"
#include "tests/support/check.h"
#include "tests/support/heap.h"

TestSuite(price);

static const sparge_method *method_of(const char *name)
{
    const sparge_method *m = sparge_method_find(name);
    check(m, "%s", name);
    return m;
}

/* ---- The grid ---- */

Test(price, grids_lie_inside_and_by_rising_density)
{
    int count;
    const sparge_method *const *all = sparge_methods(&count);
    for (int n = 0; n < count; n++) {
        const sparge_param *q = &all[n]->param[0];
        check_case("%s", all[n]->name);
        double first[SPARGE_LOSS_POINTS];
        const int points = sparge_loss_grid(all[n], first);
        check(q->name ? points > 3 : points == 0, "%d points", points);
        for (int i = 0; i < points; i++)
            check(
                first[i] >= q->low && first[i] <= q->high && first[i] < (double)INFINITY &&
                    (!q->whole || first[i] == floor(first[i])) &&
                    (i == 0 || (all[n]->falls ? first[i] < first[i - 1] : first[i] > first[i - 1])),
                "point %d is %g", i, first[i]);
    }
    check_equal(sparge_loss_grid(NULL, NULL), 0);
}

/* From e^-3 of the default to e^2.3, as the density goes: of 1 / t, and of tau / (1 - tau). */
Test(price, grids_by_hand)
{
    check_case("by hand");
    double first[SPARGE_LOSS_POINTS];
    check_equal(sparge_loss_grid(method_of("submass"), first), 11);
    check_close(first[0], 0.2 * exp(3.0), 1e-12);
    check_close(first[6], 0.2 * exp(-0.18), 1e-12);
    check_close(first[10], 0.2 * exp(-2.3), 1e-12);
    check_equal(sparge_loss_grid(method_of("spargeattn"), first), 11);
    check_close(first[0] / (1.0 - first[0]), 49.0 * exp(-3.0), 1e-9);
    check_close(first[10] / (1.0 - first[10]), 49.0 * exp(2.3), 1e-9);
    static const double chunks[] = {1, 2, 4, 6, 10, 18, 30};
    check_equal(sparge_loss_grid(method_of("moba"), first), 7);
    for (int n = 0; n < 7; n++)
        check_equal(first[n], chunks[n]);
}

/* ---- Choosing ---- */

/* Of submass, whose t falls from 4 by halves. */
static void curve_of(sparge_loss_point *to, const double *density, const double *loss, int points)
{
    for (int n = 0; n < points; n++)
        to[n] = (sparge_loss_point){4.0 * exp2(-n), density[n], loss[n]};
}

static void choose(const sparge_loss_point *curve, int heads, int points, sparge_loss_goal goal,
                   sparge_loss_point *chosen)
{
    sparge_error error;
    check(sparge_loss_choose(method_of("submass"), curve, heads, points, &goal, chosen, &error) ==
              SPARGE_OK,
          "%s", error.text);
}

/* Losses 4 4^-s and 4^-s, s the density: their means are 2.5 4^-s. Half drawn there, the first is
 * twice the second, so that at one slope the densities are 1/2 apart; undrawn they would be 1. */
Test(price, half_drawn_to_the_mean)
{
    check_case("half drawn");
    static const double density[] = {0.0, 1.0}, high[] = {4.0, 1.0}, low[] = {1.0, 0.25};
    sparge_loss_point curve[4], got[2];
    curve_of(curve, density, high, 2);
    curve_of(curve + 2, density, low, 2);
    choose(curve, 2, 2, (sparge_loss_goal){.density = 0.5}, got);
    check_close(got[0].density, 0.75, 1e-9);
    check_close(got[1].density, 0.25, 1e-9);
    check_close(got[0].loss, sqrt(2.0), 1e-9);
    check_close(got[1].loss, sqrt(0.5), 1e-9);
    check_close(got[0].first, 4.0 * exp2(-0.75), 1e-9);
    check_close(got[1].first, 4.0 * exp2(-0.25), 1e-9);
    sparge_loss_point by_loss[2];
    choose(curve, 2, 2, (sparge_loss_goal){.loss = sqrt(2.0) + sqrt(0.5)}, by_loss);
    check_close(by_loss[0].density, 0.75, 1e-9);
    check_close(by_loss[1].density, 0.25, 1e-9);
}

/* A parameter of an end: tau between .8 and .98, halfway by tau / (1 - tau), which is 4 and 49. */
Test(price, the_scale_of_a_share)
{
    check_case("a share");
    const sparge_loss_point curve[] = {{0.8, 0.2, 1.0}, {0.98, 0.6, 0.1}};
    sparge_loss_point got;
    const sparge_loss_goal goal = {.density = 0.4};
    check_equal(sparge_loss_choose(method_of("spargeattn"), curve, 1, 2, &goal, &got, NULL),
                SPARGE_OK);
    check_close(got.first / (1.0 - got.first), 14.0, 1e-9);
    check_close(got.loss, sqrt(0.1), 1e-9);
}

Test(price, made_monotone)
{
    check_case("monotone");
    static const double density[] = {0.2, 0.1, 0.5, 0.4, 0.9}, loss[] = {5.0, 7.0, 1.0, 2.0, 0.5},
                        at[] = {0.2, 0.5, 0.9}, want[] = {7.0, 2.0, 0.5};
    sparge_loss_point curve[5], got;
    curve_of(curve, density, loss, 5);
    for (int n = 0; n < 3; n++) {
        choose(curve, 1, 5, (sparge_loss_goal){.density = at[n]}, &got);
        check_close(got.density, at[n], 1e-9);
        check_close(got.loss, want[n], 1e-6);
    }
}

/* Where no price buys a density in between, a head still gets it: from .1 to .9 the loss falls at
 * the end alone. */
Test(price, over_a_leap)
{
    check_case("a leap");
    static const double density[] = {0.1, 0.8, 0.9}, loss[] = {1.0, 0.99, 1e-3};
    sparge_loss_point curve[3], got;
    curve_of(curve, density, loss, 3);
    for (int n = 1; n < 9; n++) {
        choose(curve, 1, 3, (sparge_loss_goal){.density = 0.1 * n + 0.05}, &got);
        check_close(got.density, 0.1 * n + 0.05, 1e-9);
    }
}

/* ---- By brute force ---- */

enum { MARKET = 3, PLACES = 4, STEPS = 40, FINE = (PLACES - 1) * STEPS + 1 };

/* Losses that fall by one factor a step, of densities that rise evenly: what is drawn stays convex,
 * so that one price finds the best of all combinations. */
static void market_at_random(sparge_loss_point curve[MARKET][PLACES])
{
    for (int h = 0; h < MARKET; h++) {
        double loss[PLACES], density[PLACES];
        const double from = (double)check_uniform(0.02f, 0.2f),
                     step = (double)check_uniform(0.1f, 0.25f),
                     size = pow(10.0, (double)check_uniform(-4.0f, 0.0f)),
                     factor = (double)check_uniform(0.1f, 0.7f);
        for (int n = 0; n < PLACES; n++) {
            density[n] = from + step * n;
            loss[n] = size * pow(factor, n);
        }
        curve_of(curve[h], density, loss, PLACES);
    }
}

/* Density and drawn loss of every place in steps, by the definition. */
static void places_of(sparge_loss_point curve[MARKET][PLACES], sparge_loss_point fine[MARKET][FINE])
{
    double drawn[MARKET][PLACES];
    for (int n = 0; n < PLACES; n++) {
        double mean = 0.0;
        for (int h = 0; h < MARKET; h++)
            mean += curve[h][n].loss / MARKET;
        for (int h = 0; h < MARKET; h++)
            drawn[h][n] = sqrt(curve[h][n].loss * mean);
    }
    for (int h = 0; h < MARKET; h++)
        for (int at = 0; at < FINE; at++) {
            const int n = at < FINE - 1 ? at / STEPS : PLACES - 2;
            const double s = (double)(at - n * STEPS) / STEPS;
            fine[h][at] =
                (sparge_loss_point){pow(curve[h][n].first, 1.0 - s) * pow(curve[h][n + 1].first, s),
                                    (1.0 - s) * curve[h][n].density + s * curve[h][n + 1].density,
                                    pow(drawn[h][n], 1.0 - s) * pow(drawn[h][n + 1], s)};
        }
}

/* The least sum of drawn losses of all combinations of at most this sum of densities. */
static double least_of_all(sparge_loss_point fine[MARKET][FINE], double densities)
{
    double least = (double)INFINITY;
    for (int a = 0; a < FINE; a++)
        for (int b = 0; b < FINE; b++)
            for (int c = 0; c < FINE; c++)
                if (fine[0][a].density + fine[1][b].density + fine[2][c].density <= densities)
                    least = fmin(least, fine[0][a].loss + fine[1][b].loss + fine[2][c].loss);
    return least;
}

/* The drawn loss where a head was put, by its density. */
static double drawn_at(const sparge_loss_point *fine, double density)
{
    int n = 0;
    while (n < FINE - 2 && fine[n + 1].density < density)
        n++;
    const double s = (density - fine[n].density) / (fine[n + 1].density - fine[n].density);
    return pow(fine[n].loss, 1.0 - s) * pow(fine[n + 1].loss, s);
}

Test(price, the_best_of_all_combinations)
{
    static sparge_loss_point fine[MARKET][FINE];
    int apart = 0;
    for (int turn = 0; turn < 12; turn++) {
        check_case("combinations %d", turn);
        sparge_loss_point curve[MARKET][PLACES], got[MARKET];
        market_at_random(curve);
        places_of(curve, fine);
        double least = 0.0, most = 0.0, sum = 0.0, loss = 0.0;
        for (int h = 0; h < MARKET; h++) {
            least += fine[h][0].density;
            most += fine[h][FINE - 1].density;
        }
        const double wanted = least + (most - least) * (double)check_uniform(0.1f, 0.9f);
        choose(curve[0], MARKET, PLACES, (sparge_loss_goal){.density = wanted / MARKET}, got);
        for (int h = 0; h < MARKET; h++) {
            sum += got[h].density;
            loss += drawn_at(fine[h], got[h].density);
        }
        check_close(sum, wanted, 1e-9);
        const double best = least_of_all(fine, wanted);
        check(loss <= best * (1.0 + 1e-9) && loss >= best * 0.97, "%.9g, and the best is %.9g",
              loss, best);
        apart += fabs(got[0].density - got[1].density) > 0.1;
    }
    check(apart > 3, "heads are never apart");
}

/* ---- Ends ---- */

static const double ends[] = {0.1, 0.6}, falling[] = {0.5, 0.1};

/* A head whose loss is no number is at its densest point, and moves nothing of the others' mean. */
Test(price, a_head_that_is_not_finite)
{
    check_case("not finite");
    static const double odd[] = {(double)NAN, 0.1};
    sparge_loss_point curve[6], got[3], want[2];
    for (int h = 0; h < 3; h++)
        curve_of(curve + 2 * h, ends, h == 2 ? odd : falling, 2);
    curve[0].loss = 0.7;
    choose(curve, 2, 2, (sparge_loss_goal){.density = 0.3}, want);
    choose(curve, 3, 2, (sparge_loss_goal){.density = 0.4}, got);
    for (int h = 0; h < 2; h++)
        check_close(got[h].density, want[h].density, 1e-9);
    check(got[2].first == 2.0 && got[2].density == 0.6 && isnan(got[2].loss), "at its densest");
}

/* What costs nothing, and what changes nothing, is as good as any. */
Test(price, flat_curves)
{
    check_case("flat");
    static const double none[] = {0.0, 0.0}, same[] = {0.3, 0.3};
    sparge_loss_point curve[4], got[2];
    curve_of(curve, ends, none, 2);
    curve_of(curve + 2, same, falling, 2);
    for (int n = 0; n < 3; n++) {
        const double wanted = 0.2 + 0.12 * n;
        choose(curve, 2, 2, (sparge_loss_goal){.density = wanted}, got);
        check_close(0.5 * (got[0].density + got[1].density), wanted, 1e-9);
        check(got[0].first > 0.0 && got[1].first > 0.0, "%g and %g", got[0].first, got[1].first);
    }
}

static void refuses_to_choose(const char *words, int field, double value, sparge_loss_goal goal)
{
    check_case("refuses: %s", words);
    sparge_loss_point curve[2], got;
    sparge_error error;
    memset(&error, 'x', sizeof error);
    curve_of(curve, ends, falling, 2);
    double *const of[] = {NULL, &curve[1].first, &curve[1].density, &curve[1].loss};
    if (field)
        *of[field] = value;
    check_equal(sparge_loss_choose(method_of("submass"), curve, 1, 2, &goal, &got, NULL),
                SPARGE_ERR_ARGUMENT);
    check_equal(sparge_loss_choose(method_of("submass"), curve, 1, 2, &goal, &got, &error),
                SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, words), "it says \"%.90s\"", error.text);
}

Test(price, refuses_what_cannot_be_chosen)
{
    const sparge_loss_goal half = {.density = 0.5};
    refuses_to_choose("t 4, it must be inside [0, inf] and below the one before", 1, 4.0, half);
    refuses_to_choose("t 0, it must be inside", 1, 0.0, half);
    refuses_to_choose("has density nan", 2, (double)NAN, half);
    refuses_to_choose("loss -1", 3, -1.0, half);
    refuses_to_choose("density is 0 and loss is 0", 0, 0.0, (sparge_loss_goal){0});
    refuses_to_choose("density is 0.5 and loss is 1", 0, 0.0, (sparge_loss_goal){0.5, 1.0});
    refuses_to_choose("density is 1.5", 0, 0.0, (sparge_loss_goal){.density = 1.5});
    refuses_to_choose("loss is -1", 0, 0.0, (sparge_loss_goal){.loss = -1.0});
    refuses_to_choose("density 0.7 cannot be reached: over the values that were measured it goes "
                      "from 0.1 to 0.6",
                      0, 0.0, (sparge_loss_goal){.density = 0.7});
    refuses_to_choose("density 0.05 cannot be reached", 0, 0.0,
                      (sparge_loss_goal){.density = 0.05});
    refuses_to_choose("loss 0.01 cannot be reached: over the values that were measured it goes "
                      "from 0.1 to 0.5",
                      0, 0.0, (sparge_loss_goal){.loss = 0.01});
    const sparge_loss_goal *const none = NULL;
    sparge_loss_point got;
    check_equal(sparge_loss_choose(method_of("submass"), &got, 1, 1, none, &got, NULL),
                SPARGE_ERR_ARGUMENT);
    check_equal(sparge_loss_choose(method_of("submass"), &got, 0, 1, &half, &got, NULL),
                SPARGE_ERR_ARGUMENT);
    check_equal(sparge_loss_choose(method_of("dense"), &got, 1, 1, &half, &got, NULL),
                SPARGE_ERR_ARGUMENT);
}

Test(price, choosing_without_memory)
{
    sparge_loss_point curve[2], got;
    curve_of(curve, ends, falling, 2);
    for (int64_t n = 0; n < 3; n++) {
        check_case("allocation %lld", (long long)n);
        sparge_error error = {""};
        heap_arm(n);
        const sparge_status status = sparge_loss_choose(
            method_of("submass"), curve, 1, 2, &(sparge_loss_goal){.density = 0.3}, &got, &error);
        heap.armed = false;
        check(heap.live == 0 && status == (n < 2 ? SPARGE_ERR_MEMORY : SPARGE_OK) &&
                  (n == 2 || strstr(error.text, "memory")),
              "%s: %s", sparge_status_string(status), error.text);
    }
}
