/* SPDX-License-Identifier: Apache-2.0 */
/* spargeattn.c: SpargeAttn itself, under its three rule sets (ref/README.md). The backend predicts,
 * as it does for sparge_attention. */
#include <math.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { TAU, THETA, TOPK, LAMBDA, SINK };

static void set(const sparge_problem *problem, const double *param, sparge_thresholds *to)
{
    (void)problem;
    *to = (sparge_thresholds){
        .theta = (float)param[THETA],
        .tau = (float)param[TAU],
        .topk = (float)param[TOPK],
        .lambda = (float)param[LAMBDA],
    };
}

static sparge_status plan_rules(sparge_plan *plan, const sparge_context *context,
                                const double *param, sparge_rules rules, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    sparge_options *o = &sparge_plan_add(plan)->options;
    o->rules = rules;
    o->sink = param[SINK] != 0.0;
    /* The mean and the unit sum of every block, and a product for each visible pair of blocks. */
    const sparge_geometry g = sparge_geometry_of(p, o);
    plan->multiply_adds =
        (double)p->batch * (double)p->dim *
        ((double)p->heads * (2.0 * (double)p->q_len + (double)sparge_visible_pairs(&g)) +
         (double)p->kv_heads * 2.0 * (double)p->k_len);
    return sparge_predict_part(plan, context, param, set, error);
}

static sparge_status plan_default(sparge_plan *plan, const sparge_context *context,
                                  const double *param, sparge_error *error)
{
    return plan_rules(plan, context, param, SPARGE_RULES_DEFAULT, error);
}

static sparge_status plan_paper(sparge_plan *plan, const sparge_context *context,
                                const double *param, sparge_error *error)
{
    return plan_rules(plan, context, param, SPARGE_RULES_PAPER, error);
}

static sparge_status plan_upstream(sparge_plan *plan, const sparge_context *context,
                                   const double *param, sparge_error *error)
{
    return plan_rules(plan, context, param, SPARGE_RULES_UPSTREAM, error);
}

/* By their order: TAU, THETA, TOPK, LAMBDA, SINK. */
#define THRESHOLDS(lambda)                                                        \
    {"tau", 0.0, 1.0, 0.98, false, "mass of the key blocks to keep"},             \
        {"theta", -1.0, 1.0, 0.6, false, "cosine of a self-similar block"},       \
        {"topk", -1.0, 1.0, -1.0, false, "share of the key blocks; -1: off"},     \
        {"lambda", -INFINITY, 0.0, lambda, false, "P.V is skipped from here on"}, \
    {                                                                             \
        "sink", 0.0, 1.0, 0.0, true, "keep key block 0 always"                    \
    }

#define SPARGEATTN                                                             \
    .paper = "arXiv 2502.18137", .repository = "github.com/thu-ml/SpargeAttn", \
    .commit = "bfd980b", .kind = "training-free"

const sparge_method sparge_method_spargeattn = {
    .name = "spargeattn",
    .title = "SpargeAttn",
    SPARGEATTN,
    .param = {THRESHOLDS(-INFINITY)},
    .evidence = "other rules on purpose: ref/README.md",
    .plan = plan_default,
};

const sparge_method sparge_method_spargeattn_paper = {
    .name = "spargeattn_paper",
    .title = "SpargeAttn, as printed",
    SPARGEATTN,
    .param = {THRESHOLDS(-INFINITY)},
    .evidence = "other rules on purpose: ref/README.md",
    .plan = plan_paper,
};

const sparge_method sparge_method_spargeattn_upstream = {
    .name = "spargeattn_upstream",
    .title = "SpargeAttn, as released",
    SPARGEATTN,
    .param = {THRESHOLDS(-50.0)},
    .evidence = "40287 of 40287 blocks",
    .plan = plan_upstream,
};
