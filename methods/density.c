/* SPDX-License-Identifier: Apache-2.0 */
/* density.c: the plan of a wanted density, by a search for a method's first parameter. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/counts.h"
#include "common/select.h"
#include "methods/method.h"

/* Floats as they are ordered, or whole numbers, and backwards if the density falls with them: what
 * lies between is bisected, not measured. An end that is no float stays what it is. */
static double value_at(const sparge_method *m, int64_t at)
{
    const sparge_param *q = &m->param[0];
    const int64_t place = m->falls ? -at : at;
    const uint32_t key = (uint32_t)place;
    const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float x;
    memcpy(&x, &bits, sizeof x);
    return q->whole ? (double)place : fmax(q->low, fmin((double)x, q->high));
}

static int64_t place_of(const sparge_method *m, double x)
{
    const int64_t place = m->param[0].whole ? (int64_t)x : (int64_t)sparge_order_key((float)x);
    return m->falls ? -place : place;
}

typedef struct search {
    const sparge_method *method;
    const sparge_problem *problem;
    const sparge_options *options;
    const sparge_context *context;
    const sparge_executor *executor;
    double *param;
} search;

/* The places that the search is between, their densities, and how near those are near enough:
 * where a backend predicts whole blocks, one of them apart. */
typedef struct bracket {
    int64_t low, high;
    double below, above, grain;
} bracket;

/* The next place to try: the default of the parameter; then by turns where a line between the ends
 * has the density, and the middle. */
static int64_t next_place(const sparge_method *m, const bracket *b, double density, int tried)
{
    const double share = tried % 2 ? (density - b->below) / (b->above - b->below) : 0.5;
    const int64_t usual = place_of(m, m->param[0].usual);
    const int64_t line = b->low + (int64_t)(share * (double)(b->high - b->low));
    return sparge_max(b->low + 1, sparge_min(b->high - 1, tried ? line : usual));
}

/* What running a plan counts, summed over heads. */
static sparge_status count_run(const search *s, const sparge_plan *plan, sparge_counts *sum,
                               sparge_error *error)
{
    const sparge_problem *p = s->problem;
    const int64_t head = p->q_len * p->dim_v;
    sparge_piece *memory = NULL;
    sparge_result r = {
        .o = {.dtype = SPARGE_F32, .batch = p->heads * head, .head = head, .token = p->dim_v}};
    r.o.data = sparge_take(&memory, p->batch * p->heads * head + 1, sizeof(float));
    const sparge_status status =
        r.o.data ? sparge_plan_run(plan, s->executor, &r, error) : SPARGE_ERR_MEMORY;
    *sum = r.counts;
    sparge_release(&memory);
    return sparge_with_message(status, error);
}

/* The plan at one value of the parameter and its density; NaN if no query sees a key. */
static sparge_status try_place(const search *s, int64_t place, sparge_plan *plan, double *density,
                               double *grain, sparge_error *error)
{
    const int64_t heads = s->problem->batch * s->problem->heads;
    s->param[0] = value_at(s->method, place);
    sparge_status status =
        sparge_method_plan(s->method, s->problem, s->options, s->context, s->param, plan, error);
    if (!status)
        status = sparge_plan_predict(plan, s->executor, error);
    sparge_counts *head = malloc(((size_t)heads + 1) * sizeof *head), sum = {0};
    if (!status)
        status = head ? sparge_plan_count(plan, head, error)
                      : sparge_fail(error, SPARGE_ERR_MEMORY, "out of memory");
    for (int64_t n = 0; n < heads && !status; n++)
        sparge_counts_add(&sum, &head[n]);
    if (!status && s->method->at_run)
        status = count_run(s, plan, &sum, error);
    const double done = (double)(s->method->at_run ? sum.pv_tokens : sum.qk_tokens);
    *density = sum.tokens ? done / (double)sum.tokens : (double)NAN;
    const sparge_options *o = &plan->part[0].options;
    *grain = !status && plan->part[0].predicted
                 ? (double)(o->block_q * o->block_k) / (double)sum.tokens
                 : 0.0;
    free(head);
    if (status)
        sparge_plan_free(plan);
    return status;
}

sparge_status sparge_method_plan_at(const sparge_method *method, const sparge_problem *problem,
                                    const sparge_options *options, const sparge_context *context,
                                    double *param, double density, const sparge_executor *executor,
                                    sparge_plan *plan, sparge_error *error)
{
    const search s = {method, problem, options, context, executor, param};
    if (!plan)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "plan is NULL");
    *plan = (sparge_plan){0};
    if (!method || !problem || !options || !param)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL",
                           !method    ? "method"
                           : !problem ? "problem"
                           : !options ? "options"
                                      : "param");
    const sparge_param *q = &method->param[0];
    if (context && context->first)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "context.first is not NULL, but a density is sought with one %s for all "
                           "heads",
                           q->name ? q->name : "parameter");
    if (!q->name)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s has no parameter that sets its density",
                           method->name);
    const double most = (double)problem->q_len + (double)problem->k_len; /* whole numbers count */
    const double last = q->whole ? fmax(q->low, fmin(q->high, most)) : q->high;
    bracket b = {.low = place_of(method, method->falls ? last : q->low),
                 .high = place_of(method, method->falls ? q->low : last)};
    sparge_plan lower = {0}, upper = {0};
    sparge_status status = try_place(&s, b.low, &lower, &b.below, &b.grain, error);
    if (!status)
        status = try_place(&s, b.high, &upper, &b.above, &b.grain, error);
    if (!status && !(density >= b.below && density <= b.above))
        status = sparge_fail(error, SPARGE_ERR_ARGUMENT,
                             isnan(b.below) ? "density %g cannot be reached: no query sees a key"
                                            : "density %g cannot be reached: with %s from %g to %g "
                                              "it goes from %.6g to %.6g",
                             density, q->name, value_at(method, b.low), value_at(method, b.high),
                             b.below, b.above);
    for (int n = 0; !status && b.high - b.low > 1 && b.above - b.below > b.grain; n++) {
        const int64_t place = next_place(method, &b, density, n);
        sparge_plan tried;
        double reached;
        status = try_place(&s, place, &tried, &reached, &b.grain, error);
        const bool fits = !status && reached <= density;
        sparge_plan_free(status ? NULL : fits ? &lower : &upper);
        if (!status) {
            *(fits ? &lower : &upper) = tried;
            *(fits ? &b.low : &b.high) = place;
            *(fits ? &b.below : &b.above) = reached;
        }
    }
    if (status) {
        sparge_plan_free(&lower);
        sparge_plan_free(&upper);
        return status;
    }
    const bool lies_lower = density - b.below <= b.above - density;
    param[0] = value_at(method, lies_lower ? b.low : b.high);
    *plan = lies_lower ? lower : upper;
    sparge_plan_free(lies_lower ? &upper : &lower);
    return SPARGE_OK;
}
