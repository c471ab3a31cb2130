/* SPDX-License-Identifier: Apache-2.0 */
/* table.c: all methods, and plans by name. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/arithmetic.h"
#include "common/clock.h"
#include "methods/entries.h"
#include "methods/method.h"
#include "sparge_inspect.h"

#define ADDRESS(name) &sparge_method_##name,
static const sparge_method *const table[] = {SPARGE_METHODS(ADDRESS)};

const sparge_method *const *sparge_methods(int *count)
{
    *count = (int)(sizeof table / sizeof *table);
    return table;
}

const sparge_method *sparge_method_find(const char *name)
{
    for (size_t n = 0; name && n < sizeof table / sizeof *table; n++)
        if (strcmp(table[n]->name, name) == 0)
            return table[n];
    return NULL;
}

static const char *lacking(const sparge_method *m, const sparge_options *o, const sparge_context *c)
{
    return m->needs & SPARGE_NEEDS_CAUSAL && o->causal == SPARGE_CAUSAL_NONE
               ? "causal attention, and this is not causal"
           : m->needs & SPARGE_NEEDS_NOT_CAUSAL && o->causal != SPARGE_CAUSAL_NONE
               ? "attention without causality, and this is causal"
           : m->needs & SPARGE_NEEDS_GRID && !c->grid ? "the grid of the tokens, and there is none"
           : m->needs & SPARGE_NEEDS_SEGMENTS && !c->segment_ends
               ? "the segments of the tokens, and there are none"
           : m->needs & SPARGE_NEEDS_STATE && !c->state
               ? "a state kept between calls, and there is none"
               : NULL;
}

/* Are there as many tokens in the grid, or up to the end of the last segment, as in q and k? */
static sparge_status check_tokens(const sparge_method *m, const sparge_problem *p,
                                  const sparge_context *c, sparge_error *error)
{
    const sparge_grid *grid = m->needs & SPARGE_NEEDS_GRID ? c->grid : NULL;
    int64_t tokens = p->k_len;
    bool bad = false;
    if (grid) {
        bad = grid->t < 0 || grid->h < 0 || grid->w < 0 || grid->text_before < 0 ||
              grid->text_after < 0 || __builtin_mul_overflow(grid->t, grid->h, &tokens) ||
              __builtin_mul_overflow(tokens, grid->w, &tokens) ||
              __builtin_add_overflow(tokens, grid->text_before, &tokens) ||
              __builtin_add_overflow(tokens, grid->text_after, &tokens);
    }
    if (m->needs & SPARGE_NEEDS_SEGMENTS) {
        tokens = c->segments > 0 ? c->segment_ends[c->segments - 1] : 0;
        for (int64_t n = 0; n < c->segments; n++)
            bad |= c->segment_ends[n] < (n ? c->segment_ends[n - 1] : 0);
    }
    if (!bad && tokens == p->k_len && (!grid || p->q_len == p->k_len))
        return SPARGE_OK;
    return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                       "%s of %s: %lld tokens%s; this call has %lld queries and %lld keys",
                       grid ? "the grid" : "the segments", m->name, (long long)tokens,
                       bad ? ", and a length is negative or too large" : "", (long long)p->q_len,
                       (long long)p->k_len);
}

/* head: whose own parameters they are, or -1 for those of all. */
static sparge_status check_params(const sparge_method *m, const double *param, int64_t head,
                                  sparge_error *error)
{
    char where[64] = "";
    if (head >= 0)
        snprintf(where, sizeof where, " in context.first[%lld]", (long long)head);
    for (int n = 0; n < SPARGE_MAX_PARAMS && m->param[n].name; n++) {
        const sparge_param *q = &m->param[n];
        if (!(param[n] >= q->low && param[n] <= q->high))
            return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                               "%s of %s is %.9g%s, it must be in [%g, %g]", q->name, m->name,
                               param[n], where, q->low, q->high);
        if (q->whole && floor(param[n]) != param[n])
            return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                               "%s of %s is %.9g%s, it must be a whole number", q->name, m->name,
                               param[n], where);
    }
    return SPARGE_OK;
}

/* v, and how large the copies may be that a plan makes of a tensor for each query head: what
 * sparge_options_resolve does not ask for. */
static sparge_status check_copies(const sparge_problem *p, sparge_error *error)
{
    if (p->v.data && (unsigned)p->v.dtype > SPARGE_BF16)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "v.dtype is %d, it must be one of sparge_dtype", (int)p->v.dtype);
    if (p->v.data && p->dim_v < 1)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "dim_v is %lld, it must be at least 1",
                           (long long)p->dim_v);
    const int64_t size[] = {p->heads, sparge_max(p->dim, sparge_max(p->q_len, p->k_len)),
                            sparge_max(p->dim, p->v.data ? p->dim_v : 1), sizeof(double)};
    int64_t bytes = sparge_max(1, p->batch);
    for (size_t n = 0; n < sizeof size / sizeof *size; n++)
        if (__builtin_mul_overflow(bytes, sparge_max(1, size[n]), &bytes))
            return sparge_fail(error, SPARGE_ERR_SHAPE,
                               "batch %lld x heads %lld x tokens %lld and %lld x channels %lld and "
                               "%lld overflows",
                               (long long)p->batch, (long long)p->heads, (long long)p->q_len,
                               (long long)p->k_len, (long long)p->dim, (long long)p->dim_v);
    return SPARGE_OK;
}

sparge_status sparge_method_plan(const sparge_method *method, const sparge_problem *problem,
                                 const sparge_options *options, const sparge_context *context,
                                 const double *param, sparge_plan *plan, sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    static const sparge_context nothing;
    if (!plan)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "plan is NULL");
    *plan = (sparge_plan){0};
    if (!method || !problem || !options)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL",
                           !method    ? "method"
                           : !problem ? "problem"
                                      : "options");
    double all[SPARGE_MAX_PARAMS] = {0}; /* the caller's may end with the last name */
    for (int n = 0; n < SPARGE_MAX_PARAMS && method->param[n].name; n++)
        all[n] = param ? param[n] : method->param[n].usual;
    param = all;
    if (!context)
        context = &nothing;
    sparge_options resolved = *options;
    sparge_status status = sparge_options_resolve(problem, &resolved, error);
    if (!status)
        status = check_copies(problem, error);
    if (!status)
        status = check_params(method, param, -1, error);
    for (int64_t h = 0; context->first && h < problem->heads && !status; h++) {
        double own[SPARGE_MAX_PARAMS];
        status = check_params(method, sparge_param_of(context, h, all, own), h, error);
    }
    const char *const needs = lacking(method, options, context);
    if (!status && needs)
        status = sparge_fail(error, SPARGE_ERR_UNSUPPORTED, "%s needs %s", method->name, needs);
    if (!status)
        status = check_tokens(method, problem, context, error);
    if (status)
        return status;
    const double start = sparge_seconds();
    plan->problem = *problem;
    plan->options = *options;
    plan->options.softmax_scale = resolved.softmax_scale;
    const bool fresh = context->state && !*context->state;
    status = method->plan(plan, context, param, error);
    plan->seconds = sparge_seconds() - start;
    if (status && fresh) { /* what a plan that failed has kept is not whole */
        free(*context->state);
        *context->state = NULL;
    }
    if (status)
        sparge_plan_free(plan);
    return sparge_with_message(status, error);
}
