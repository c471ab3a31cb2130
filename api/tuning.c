/* SPDX-License-Identifier: Apache-2.0 */
/* tuning.c: the inputs of the tuner, checked. */
#include "api/api.h"

#include <math.h>

#include "tune/tune.h"

static sparge_status check_tuning(const sparge_tune_options *how, int64_t count,
                                  sparge_error *error)
{
    if (how->sparsity != 0.0 && !(how->sparsity > 0.0 && how->sparsity < 1.0))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "sparsity is %g, it must be in (0, 1), or 0",
                           how->sparsity);
    if (how->sparsity == 0.0 && !(how->l1 > 0.0 && how->l1 < how->l2 && how->l2 < (double)INFINITY))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "l1 is %g and l2 is %g, it must be that 0 < l1 < l2", how->l1, how->l2);
    if (how->held_out < 0 || how->held_out >= count)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "held_out is %lld of %lld inputs, it must leave one to tune on",
                           (long long)how->held_out, (long long)count);
    if (!(how->seconds >= 0.0))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "seconds is %g, it must be at least 0",
                           how->seconds);
    return SPARGE_OK;
}

/* Input n, beside the first one. */
static sparge_status check_shape(const sparge_problem *p, const sparge_problem *first, int64_t n,
                                 sparge_error *error)
{
    if (p->batch == 0 || p->q_len == 0 || p->k_len == 0)
        return sparge_fail(error, SPARGE_ERR_SHAPE,
                           "input %lld is empty: batch %lld, q_len %lld, k_len %lld", (long long)n,
                           (long long)p->batch, (long long)p->q_len, (long long)p->k_len);
    if (p->heads != first->heads || p->kv_heads != first->kv_heads || p->dim != first->dim ||
        p->dim_v != first->dim_v)
        return sparge_fail(
            error, SPARGE_ERR_SHAPE,
            "input %lld has %lld heads, %lld key heads and %lld and %lld channels, input 0 "
            "has %lld, "
            "%lld, %lld and %lld",
            (long long)n, (long long)p->heads, (long long)p->kv_heads, (long long)p->dim,
            (long long)p->dim_v, (long long)first->heads, (long long)first->kv_heads,
            (long long)first->dim, (long long)first->dim_v);
    return SPARGE_OK;
}

static sparge_status check_input(const sparge_problem *inputs, int64_t n, const sparge_options *o,
                                 sparge_error *error)
{
    const sparge_problem *p = &inputs[n];
    const sparge_status status = check_shape(p, inputs, n, error);
    if (status)
        return status;
    if (p->k_bias)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "input %lld has a k_bias, which the tuner does not take", (long long)n);
    if (o->causal == SPARGE_CAUSAL_START && p->q_len > p->k_len)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "input %lld has more queries, %lld, than keys, %lld, under START",
                           (long long)n, (long long)p->q_len, (long long)p->k_len);
    return SPARGE_OK;
}

sparge_status sparge_tune(const sparge_problem *inputs, int64_t count,
                          const sparge_options *options, const sparge_tune_options *how,
                          sparge_tuned *heads, sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    if (!inputs || !options || !how || !heads)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL",
                           !inputs    ? "inputs"
                           : !options ? "options"
                           : !how     ? "how"
                                      : "heads");
    if (count < 1)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "count is %lld, there must be an input",
                           (long long)count);
    sparge_options o = *options;
    o.per_head = NULL;
    o.thresholds = sparge_options_default(SPARGE_RULES_DEFAULT).thresholds;
    sparge_status status = SPARGE_OK;
    for (int64_t n = 0; n < count && !status; n++) {
        status = sparge_check(&inputs[n], &o, true, NULL, error);
        if (!status)
            status = check_input(inputs, n, &o, error);
    }
    if (!status)
        status = check_tuning(how, count, error);
    if (!status && o.rules != SPARGE_RULES_DEFAULT)
        status = sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                             "rules are not the default ones, which alone are tuned");
    if (!status && o.cell)
        status = sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                             "cell is %lld, but theta, tau and topk are tuned without cells",
                             (long long)o.cell);
    if (!status)
        status = sparge_resolve(&inputs[0], &o, NULL, error);
    if (!status)
        status = sparge_tune_heads(inputs, count, &o, how, heads, error);
    return sparge_with_message(status, error);
}

/* ---- By loss ---- */

static sparge_status check_parameter(const sparge_method *method, sparge_error *error)
{
    return method->param[0].name
               ? SPARGE_OK
               : sparge_fail(error, SPARGE_ERR_ARGUMENT,
                             "%s has no parameter that sets its density", method->name);
}

static sparge_status check_loss_input(const sparge_loss_input *inputs, int64_t n,
                                      const sparge_options *o, sparge_error *error)
{
    const sparge_loss_input *in = &inputs[n];
    sparge_status status = sparge_check(&in->problem, o, true, NULL, error);
    if (!status)
        status = check_shape(&in->problem, &inputs[0].problem, n, error);
    if (!status && (!in->g.data || (unsigned)in->g.dtype > SPARGE_BF16))
        status = sparge_fail(error, SPARGE_ERR_ARGUMENT, "g of input %lld %s", (long long)n,
                             in->g.data ? "has a dtype that is not f32, f16 or bf16" : "is NULL");
    return status;
}

sparge_status sparge_loss_measure(const sparge_loss_input *inputs, int64_t count,
                                  const sparge_options *options, const sparge_method *method,
                                  const double *param, const sparge_executor *executor,
                                  sparge_loss_point *point, int64_t points, double *dense_passes,
                                  sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    if (!inputs || !options || !method || !point || !dense_passes)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL",
                           !inputs    ? "inputs"
                           : !options ? "options"
                           : !method  ? "method"
                           : !point   ? "point"
                                      : "dense_passes");
    sparge_status status = check_parameter(method, error);
    if (status)
        return status;
    if (count < 1 || points < 1)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is %lld, it must be at least 1",
                           count < 1 ? "count" : "points", (long long)(count < 1 ? count : points));
    for (int64_t n = 0; n < count && !status; n++)
        status = check_loss_input(inputs, n, options, error);
    tune_losses of = {inputs, count, options, *options, method, param, executor, point, points};
    if (!status)
        status = sparge_resolve(&inputs[0].problem, &of.resolved, NULL, error);
    if (!status && of.resolved.backend == SPARGE_CUDA && !executor)
        status = sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                             "backend is cuda, whose arrays are in device memory: give an executor "
                             "that copies");
    if (!status)
        status = tune_losses_measure(&of, dense_passes, error);
    return sparge_with_message(status, error);
}

/* Every step of a head's curve goes the same way on the scale of the parameter. */
static sparge_status check_curve(const sparge_method *method, const sparge_loss_point *curve,
                                 int64_t points, int64_t head, sparge_error *error)
{
    const sparge_param *q = &method->param[0];
    for (int64_t n = 0; n < points; n++) {
        const double here = tune_scale(q, curve[n].first);
        const double step = n ? here - tune_scale(q, curve[n - 1].first) : method->falls ? -1 : 1;
        if (!isfinite(here) || !(method->falls ? step < 0.0 : step > 0.0))
            return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                               "point %lld of head %lld has %s %g, it must be inside [%g, %g] and "
                               "%s the one before",
                               (long long)n, (long long)head, q->name, curve[n].first, q->low,
                               q->high, method->falls ? "below" : "above");
        if (!(curve[n].density >= 0.0) || curve[n].loss < 0.0)
            return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                               "point %lld of head %lld has density %g and loss %g, which are no "
                               "such numbers",
                               (long long)n, (long long)head, curve[n].density, curve[n].loss);
    }
    return SPARGE_OK;
}

sparge_status sparge_loss_choose(const sparge_method *method, const sparge_loss_point *curve,
                                 int64_t heads, int64_t points, const sparge_loss_goal *goal,
                                 sparge_loss_point *chosen, sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    if (!method || !curve || !goal || !chosen)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL",
                           !method  ? "method"
                           : !curve ? "curve"
                           : !goal  ? "goal"
                                    : "chosen");
    if (heads < 1 || points < 1)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is %lld, it must be at least 1",
                           heads < 1 ? "heads" : "points", (long long)(heads < 1 ? heads : points));
    if (!(goal->density >= 0.0 && goal->density <= 1.0 && goal->loss >= 0.0 &&
          (goal->density > 0.0) != (goal->loss > 0.0)))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "density is %g and loss is %g, one must be above 0 and the other be 0",
                           goal->density, goal->loss);
    sparge_status status = check_parameter(method, error);
    for (int64_t h = 0; h < heads && !status; h++)
        status = check_curve(method, curve + h * points, points, h, error);
    if (!status)
        status = tune_choose(&method->param[0], curve, heads, points, goal, chosen, error);
    return sparge_with_message(status, error);
}
