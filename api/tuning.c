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
static sparge_status check_input(const sparge_problem *inputs, int64_t n, const sparge_options *o,
                                 sparge_error *error)
{
    const sparge_problem *p = &inputs[n], *first = &inputs[0];
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
    if (!status)
        status = sparge_resolve(&inputs[0], &o, NULL, error);
    if (!status)
        status = sparge_tune_heads(inputs, count, &o, how, heads, error);
    return sparge_with_message(status, error);
}
