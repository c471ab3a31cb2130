/* SPDX-License-Identifier: Apache-2.0 */
/* heads.c: walks over query heads with their q, k and v in f32. */
#include <math.h>

#include "common/element.h"
#include "methods/method.h"

static void load(const sparge_in *in, int64_t b, int64_t h, int64_t tokens, int64_t dim, float *to)
{
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < dim; c++) {
            const float x =
                sparge_element_load(in->data, in->dtype, sparge_in_row(in, b, h, t) + c);
            to[t * dim + c] = isfinite(x) ? x : 0.0f;
        }
}

static sparge_status walk(sparge_head *head, const double *param, bool needs_v,
                          sparge_head_function *function, sparge_piece **memory,
                          sparge_error *error)
{
    const sparge_problem *p = head->problem;
    double own[SPARGE_MAX_PARAMS];
    sparge_status status = SPARGE_OK;
    head->q = sparge_take(memory, p->q_len * p->dim + 1, sizeof(float));
    head->k = sparge_take(memory, p->k_len * p->dim + 1, sizeof(float));
    head->v = needs_v ? sparge_take(memory, p->k_len * p->dim_v + 1, sizeof(float)) : NULL;
    if (!head->q || !head->k || (needs_v && !head->v))
        return SPARGE_ERR_MEMORY;
    const int64_t gqa = p->heads / p->kv_heads;
    for (int64_t n = 0; n < p->batch * p->heads && !status; n++) {
        sparge_piece *scratch = NULL;
        head->n = n;
        head->b = n / p->heads;
        head->h = n % p->heads;
        head->kv = n / gqa;
        head->scratch = &scratch;
        head->param = sparge_param_of(head->context, head->h, param, own);
        load(&p->q, head->b, head->h, p->q_len, p->dim, head->q);
        if (n % gqa == 0) {
            load(&p->k, head->b, head->h / gqa, p->k_len, p->dim, head->k);
            if (needs_v)
                load(&p->v, head->b, head->h / gqa, p->k_len, p->dim_v, head->v);
        }
        status = function(head, error);
        sparge_release(&scratch);
        if (!status && head->options->progress &&
            !head->options->progress(head->options->user, 0.0))
            status = SPARGE_ERR_CANCELLED;
    }
    return status;
}

sparge_status sparge_each_head(sparge_plan *plan, const sparge_context *context,
                               const double *param, int64_t block_q, int64_t block_k, bool needs_v,
                               sparge_head_function *function, sparge_error *error)
{
    if (needs_v && !plan->problem.v.data && plan->problem.batch && plan->problem.k_len)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "v.data is NULL");
    sparge_part *part = sparge_plan_add(plan);
    part->options.block_q = block_q ? block_q : plan->options.block_q;
    part->options.block_k = block_k ? block_k : plan->options.block_k;
    sparge_status status = sparge_part_mask(part, error);
    if (status)
        return status;
    sparge_head head = {
        .problem = &plan->problem,
        .options = &plan->options,
        .context = context,
        .g = sparge_geometry_of(&part->problem, &part->options),
        .scale = plan->options.softmax_scale,
        .plan = plan,
        .part = part,
    };
    sparge_piece *memory = NULL;
    status = walk(&head, param, needs_v, function, &memory, error);
    sparge_release(&memory);
    return status;
}
