/* SPDX-License-Identifier: Apache-2.0 */
/* heads.c: a parameter of each head's own, and whose options the parts of a plan have: the method's
 * or the caller's. */
#include <math.h>
#include <string.h>

#include "common/thresholds.h"
#include "tests/methods/hand.h"
#include "tests/support/problem.h"

TestSuite(heads);

enum { HEADS = 4, BLOCK = 16, KEYS = 150 };

/* Two batches; two heads read the same keys. A square call, so that every method has its causality,
 * and blocks are ragged at the end. */
static problem question(const sparge_method *m)
{
    const shape s = shape_of(2, HEADS, 2, KEYS, KEYS, 24, 8);
    problem x = problem_make(&s);
    x.o.block_q = x.o.block_k = BLOCK;
    x.o.softmax_scale = 0.6f;
    x.o.causal = m->needs & SPARGE_NEEDS_NOT_CAUSAL ? SPARGE_CAUSAL_NONE : SPARGE_CAUSAL_END;
    return x;
}

static sparge_plan plan_of(const sparge_method *m, const problem *x, const double *first,
                           const double *param)
{
    static const sparge_grid grid = {2, 7, 10, 3, 7};
    static const int64_t ends[] = {40, 90, KEYS};
    const sparge_context context = {
        .grid = &grid, .segment_ends = ends, .segments = 3, .first = first};
    sparge_plan plan;
    sparge_error error;
    sparge_status status = sparge_method_plan(m, &x->p, &x->o, &context, param, &plan, &error);
    if (!status)
        status = sparge_plan_predict(&plan, NULL, &error);
    check(status == SPARGE_OK, "%s: %s", m->name, error.text);
    return plan;
}

static uint8_t *pairs_of(const sparge_plan *plan)
{
    const sparge_problem *p = &plan->problem;
    uint8_t *pairs = check_alloc((size_t)(p->batch * p->heads * p->q_len * p->k_len));
    sparge_error error;
    check(sparge_plan_pairs(plan, pairs, &error) == SPARGE_OK, "%s", error.text);
    return pairs;
}

static answer ran(const problem *x, const sparge_plan *plan)
{
    answer a = answer_make(x, SPARGE_F32, PACKED);
    sparge_error error;
    a.result = (sparge_result){.o = tensor_out(&a.o), .lse = a.lse, .head_counts = a.head};
    check(sparge_plan_run(plan, NULL, &a.result, &error) == SPARGE_OK, "%s", error.text);
    tensor_read(&a.o);
    return a;
}

/* Head h in every batch: pairs, o and counts. */
static void same_head(const problem *x, int64_t h, const sparge_plan *got, const sparge_plan *want)
{
    const int64_t of_head = KEYS * KEYS, values = KEYS * x->p.dim_v;
    uint8_t *a = pairs_of(got), *b = pairs_of(want);
    answer c = ran(x, got), d = ran(x, want);
    for (int64_t n = h; n < x->p.batch * HEADS; n += HEADS) {
        check_same_as("pairs", a + n * of_head, b + n * of_head, of_head);
        check_same_as("o", c.o.x + n * values, d.o.x + n * values, values);
        same_counts(&c.head[n], &d.head[n]);
    }
    answer_free(&c);
    answer_free(&d);
    check_free(a);
    check_free(b);
}

/* Each head is as in a call whose heads all have its parameter. */
Test(heads, each_by_its_own_parameter)
{
    int count, differ = 0;
    const sparge_method *const *all = sparge_methods(&count);
    for (int n = 0; n < count; n++) {
        const sparge_method *m = all[n];
        double first[HEADS], param[SPARGE_MAX_PARAMS];
        if (!strcmp(m->name, "hess")) /* whose heads share a budget */
            continue;
        problem x = question(m);
        check_case("%s", m->name);
        for (int h = 0; h < HEADS; h++)
            first[h] = first_param(m, KEYS / 8, (h + 1) / 6.0);
        short_defaults(m, param);
        sparge_plan got = plan_of(m, &x, first, param);
        uint8_t *pairs = pairs_of(&got);
        differ += memcmp(pairs, pairs + KEYS * KEYS, KEYS * KEYS) != 0;
        for (int h = 0; h < HEADS; h++) {
            check_case("%s, head %d of %g", m->name, h, first[h]);
            param[0] = first[h];
            sparge_plan want = plan_of(m, &x, NULL, param);
            same_head(&x, h, &got, &want);
            sparge_plan_free(&want);
        }
        check_free(pairs);
        sparge_plan_free(&got);
        problem_free(&x);
    }
    check(differ > count / 2, "of %d methods the heads differ in %d", count, differ);
}

/* By the parameter and by the place. */
Test(heads, each_is_in_the_range)
{
    static const struct {
        const char *method;
        double bad;
        const char *says;
    } cases[] = {
        {"spargeattn", 1.5, "tau of spargeattn is 1.5 in context.first[2], it must be in [0, 1]"},
        {"submass", (double)NAN, "t of submass is nan in context.first[2], it must be in [0, inf]"},
        {"submass", -1.0, "t of submass is -1 in context.first[2], it must be in [0, inf]"},
        {"moba", 2.5, "topk of moba is 2.5 in context.first[2], it must be a whole number"},
    };
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        const sparge_method *m = sparge_method_find(cases[n].method);
        const double first[HEADS] = {1.0, 1.0, cases[n].bad, 1.0};
        const sparge_context context = {.first = first};
        problem x = question(m);
        sparge_plan plan;
        sparge_error error;
        check_equal(sparge_method_plan(m, &x.p, &x.o, &context, NULL, &plan, &error),
                    SPARGE_ERR_ARGUMENT);
        check(strcmp(error.text, cases[n].says) == 0, "%s", error.text);
        check(!plan.parts && !plan.memory, "not empty");
        problem_free(&x);
    }
}

/* A density is that of one value for all heads. */
Test(heads, density_has_one_parameter)
{
    const sparge_method *m = sparge_method_find("submass");
    const double first[HEADS] = {1.0, 1.0, 1.0, 1.0};
    const sparge_context context = {.first = first};
    double param[SPARGE_MAX_PARAMS] = {0.2, 8.0};
    problem x = question(m);
    sparge_plan plan;
    sparge_error error;
    check_equal(sparge_method_plan_at(m, &x.p, &x.o, &context, param, 0.5, NULL, &plan, &error),
                SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "one t for all heads"), "%s", error.text);
    check(!plan.parts && param[0] == 0.2, "a plan");
    problem_free(&x);
}

/* ---- Options ---- */

static const sparge_thresholds of_caller[HEADS] = {
    {0.9f, 0.1f, 0.2f, -1.0f, 3.0f},
    {0.8f, 0.3f, 0.4f, -2.0f, 0.0f},
    {0.7f, 0.5f, 0.6f, 0.0f, 1.0f},
    {0.6f, 0.7f, 0.8f, -INFINITY, 0.0f},
};

static void has_thresholds(const sparge_options *o, int h, sparge_thresholds want)
{
    check_case("head %d", h);
    const sparge_thresholds got = *sparge_thresholds_of(o, h);
    check_equal(got.theta, want.theta);
    check_equal(got.tau, want.tau);
    check_equal(got.topk, want.topk);
    check_equal(got.lambda, want.lambda);
    check_equal(got.min_mass, want.min_mass);
}

/* Lambda is the caller's, each head's if it has one, and no other threshold is. */
Test(heads, submass_leaves_lambda_to_the_caller)
{
    const sparge_method *m = sparge_method_find("submass");
    const double first[HEADS] = {0.5, 0.0, (double)INFINITY, 1e-60};
    problem x = question(m);
    x.o.thresholds = of_caller[1];
    for (int n = 0; n < 4; n++) { /* n & 1: t of each head; n & 2: thresholds of each head */
        x.o.per_head = n & 2 ? of_caller : NULL;
        sparge_plan plan = plan_of(m, &x, n & 1 ? first : NULL, NULL);
        for (int h = 0; h < HEADS; h++) {
            const float t = n & 1 ? (float)fmin(first[h], 3.40282346638528859812e38) : 0.2f;
            const sparge_thresholds want = {-1.0f, SPARGE_OFF, t > 0.0f ? SPARGE_OFF : 1.0f,
                                            of_caller[n & 2 ? h : 1].lambda, t};
            has_thresholds(&plan.part[0].options, h, want);
        }
        sparge_plan_free(&plan);
    }
    problem_free(&x);
}

/* All thresholds are the method's. */
Test(heads, spargeattn_has_its_own)
{
    const sparge_method *m = sparge_method_find("spargeattn");
    const double first[HEADS] = {0.5, 0.0, 1.0, 0.25},
                 param[SPARGE_MAX_PARAMS] = {0.75, 0.5, 0.125, -4.0, 0.0};
    problem x = question(m);
    x.o.thresholds = of_caller[1];
    for (int n = 0; n < 4; n++) {
        x.o.per_head = n & 2 ? of_caller : NULL;
        sparge_plan plan = plan_of(m, &x, n & 1 ? first : NULL, param);
        for (int h = 0; h < HEADS; h++)
            has_thresholds(
                &plan.part[0].options, h,
                (sparge_thresholds){0.5f, n & 1 ? (float)first[h] : 0.75f, 0.125f, -4.0f, 0.0f});
        sparge_plan_free(&plan);
    }
    problem_free(&x);
}

/* Cells of the caller's call need not divide a method's blocks, and change none of its pairs. */
Test(heads, cells_of_the_caller_play_no_part)
{
    int count;
    const sparge_method *const *all = sparge_methods(&count);
    for (int n = 0; n < count; n++) {
        const sparge_method *m = all[n];
        problem x = question(m);
        sparge_error error;
        sparge_counts of[2][2 * HEADS];
        check_case("%s", m->name);
        uint8_t *pairs[2];
        for (int e = 0; e < 2; e++) {
            x.o.block_q = x.o.block_k = 2 * BLOCK; /* those of some methods are BLOCK */
            x.o.cell = e ? 2 * BLOCK : 0;
            double param[SPARGE_MAX_PARAMS];
            short_defaults(m, param);
            sparge_plan plan = plan_of(m, &x, NULL, param);
            pairs[e] = pairs_of(&plan);
            check(sparge_plan_count(&plan, of[e], &error) == SPARGE_OK, "%s", error.text);
            answer a = ran(&x, &plan);
            for (int h = 0; h < 2 * HEADS && !m->at_run; h++)
                same_counts(&a.head[h], &of[e][h]);
            answer_free(&a);
            sparge_plan_free(&plan);
        }
        check_same_as("pairs", pairs[1], pairs[0], 2 * HEADS * KEYS * KEYS);
        for (int h = 0; h < 2 * HEADS; h++)
            same_counts(&of[1][h], &of[0][h]);
        check_free(pairs[0]);
        check_free(pairs[1]);
        problem_free(&x);
    }
}

/* The masses of submass and strata are those of the default rules, and so is the diagonal. */
Test(heads, rules_of_the_caller_play_no_part_in_masses)
{
    static const char *const names[] = {"submass", "strata"};
    for (int n = 0; n < 2; n++) {
        const sparge_method *m = sparge_method_find(names[n]);
        problem x = question(m);
        uint8_t *pairs[3];
        for (int rules = SPARGE_RULES_DEFAULT; rules <= SPARGE_RULES_UPSTREAM; rules++) {
            x.o.rules = (sparge_rules)rules;
            sparge_plan plan = plan_of(m, &x, NULL, (const double[SPARGE_MAX_PARAMS]){1.0, 8.0});
            pairs[rules] = pairs_of(&plan);
            sparge_plan_free(&plan);
            check_same_as(names[n], pairs[rules], pairs[0], 2 * HEADS * KEYS * KEYS);
        }
        for (int rules = 0; rules < 3; rules++)
            check_free(pairs[rules]);
        problem_free(&x);
    }
}
