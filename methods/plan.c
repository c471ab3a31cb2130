/* SPDX-License-Identifier: Apache-2.0 */
/* plan.c: plans are made, run and read. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/arithmetic.h"
#include "common/counts.h"
#include "common/element.h"
#include "common/thresholds.h"
#include "methods/method.h"
#include "sparge_inspect.h"

/* ---- Making ---- */

sparge_part *sparge_plan_add(sparge_plan *plan)
{
    sparge_part *part = &plan->part[plan->parts++];
    *part = (sparge_part){.problem = plan->problem, .options = plan->options};
    part->options.cell = 0;
    return part;
}

sparge_status sparge_part_mask(sparge_part *part, sparge_error *error)
{
    return sparge_mask_alloc(&part->mask, &part->problem, &part->options, error);
}

const double *sparge_param_of(const sparge_context *context, int64_t head, const double *param,
                              double own[SPARGE_MAX_PARAMS])
{
    if (!context->first)
        return param;
    memcpy(own, param, SPARGE_MAX_PARAMS * sizeof *own);
    own[0] = context->first[head];
    return own;
}

sparge_status sparge_set_part(sparge_plan *plan, const sparge_context *context, const double *param,
                              sparge_set_thresholds *set, sparge_error *error)
{
    sparge_part *part = &plan->part[plan->parts - 1];
    sparge_options *o = &part->options;
    const int64_t heads = plan->problem.heads;
    sparge_thresholds *each = sparge_take(&plan->memory, heads, sizeof *each);
    if (!each)
        return SPARGE_ERR_MEMORY;
    for (int64_t h = 0; h < heads; h++) {
        double own[SPARGE_MAX_PARAMS];
        each[h] = *sparge_thresholds_of(&plan->options, h);
        set(&plan->problem, sparge_param_of(context, h, param, own), &each[h]);
    }
    o->thresholds = each[0];
    o->per_head = plan->options.per_head || context->first ? each : NULL;
    sparge_options resolved = *o;
    return sparge_options_resolve(&plan->problem, &resolved, error);
}

sparge_status sparge_predict_part(sparge_plan *plan, const sparge_context *context,
                                  const double *param, sparge_set_thresholds *set,
                                  sparge_error *error)
{
    plan->part[plan->parts - 1].predicted = true;
    return sparge_set_part(plan, context, param, set, error);
}

int64_t sparge_visible_pairs(const sparge_geometry *g)
{
    int64_t pairs = 0;
    for (int64_t i = 0; i < g->q_blocks; i++)
        pairs += sparge_blocks_visible(g, i);
    return pairs;
}

sparge_in sparge_plan_array(sparge_plan *plan, int64_t heads, int64_t tokens, int64_t dim)
{
    const float *data =
        sparge_take(&plan->memory, plan->problem.batch * heads * tokens * dim + 1, sizeof *data);
    return (sparge_in){data, SPARGE_F32, heads * tokens * dim, tokens * dim, dim};
}

void sparge_plan_free(sparge_plan *plan)
{
    if (!plan)
        return;
    for (int n = 0; n < plan->parts; n++)
        sparge_mask_free(&plan->part[n].mask);
    sparge_release(&plan->memory);
    *plan = (sparge_plan){0};
}

/* ---- Running ---- */

static const sparge_executor here = {sparge_predict, sparge_attend, sparge_attention};

static const sparge_mask *mask_of(const sparge_part *part)
{
    return part->mask.bits ? &part->mask : NULL;
}

/* One of several parts, to which each is an equal share of the work. */
typedef struct share {
    const sparge_options *options;
    int part, parts;
} share;

static bool tell(void *user, double done)
{
    const share *s = user;
    return s->options->progress(s->options->user, (s->part + done) / s->parts);
}

static sparge_status run_part(const sparge_plan *plan, int n, const sparge_executor *run,
                              sparge_result *result, sparge_error *error)
{
    const sparge_part *part = &plan->part[n];
    share s = {&part->options, n, plan->parts};
    sparge_options o = part->options;
    if (o.progress) {
        o.progress = tell;
        o.user = &s;
    }
    return part->predicted && !part->mask.bits
               ? run->attention(&part->problem, &o, result, error)
               : run->attend(&part->problem, &o, mask_of(part), result, error);
}

bool sparge_plan_is_plain(const sparge_plan *plan)
{
    return plan->parts == 1 && !plan->q_order && !plan->part[0].place && !plan->part[0].pooled;
}

/* Counts of all parts, of which pairs and tokens are those of the caller's problem. */
static sparge_status sum_counts(const sparge_plan *plan, const sparge_counts *const *part,
                                sparge_counts *heads, sparge_error *error)
{
    sparge_options o = plan->options;
    const int64_t count = plan->problem.batch * plan->problem.heads;
    o.block_q = plan->part[0].options.block_q;
    o.block_k = plan->part[0].options.block_k;
    o.cell = 0;
    const sparge_status status = sparge_mask_count(NULL, &plan->problem, &o, heads, error);
    for (int64_t n = 0; n < count && !status; n++) {
        sparge_counts sum = {0};
        for (int p = 0; p < plan->parts; p++)
            sparge_counts_add(&sum, &part[p][n]);
        sum.pairs = heads[n].pairs;
        sum.tokens = heads[n].tokens;
        heads[n] = sum;
    }
    return status;
}

/* o of the parts, in the plan's order of queries, to where the caller wants it. */
static void put_back(const sparge_plan *plan, const float *o, const float *lse,
                     const sparge_result *to)
{
    const sparge_problem *p = &plan->problem;
    for (int64_t n = 0; n < p->batch * p->heads; n++)
        for (int64_t t = 0; t < p->q_len; t++) {
            const int64_t from = n * p->q_len + t;
            const int64_t token = plan->q_order ? plan->q_order[from] : t;
            const int64_t at = sparge_out_row(&to->o, n / p->heads, n % p->heads, token);
            for (int64_t c = 0; c < p->dim_v; c++)
                sparge_element_store(to->o.data, to->o.dtype, at + c, o[from * p->dim_v + c]);
            if (to->lse)
                to->lse[n * p->q_len + token] = lse[from];
        }
}

static sparge_status run_parts(const sparge_plan *plan, const sparge_executor *run,
                               sparge_result *result, sparge_piece **memory, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    const int64_t heads = p->batch * p->heads, rows = heads * p->q_len;
    const sparge_out packed = {NULL, SPARGE_F32, p->heads * p->q_len * p->dim_v,
                               p->q_len * p->dim_v, p->dim_v};
    sparge_partial done[SPARGE_MAX_PARTS];
    const sparge_counts *counts[SPARGE_MAX_PARTS];
    sparge_result sum = {0};
    for (int n = 0; n < plan->parts; n++) {
        sparge_result now = {.o = packed};
        now.o.data = sparge_take(memory, rows * p->dim_v + 1, sizeof(float));
        now.lse = sparge_take(memory, rows + 1, sizeof(float));
        now.head_counts = sparge_take(memory, heads + 1, sizeof *now.head_counts);
        if (!now.o.data || !now.lse || !now.head_counts)
            return SPARGE_ERR_MEMORY;
        const sparge_status status = run_part(plan, n, run, &now, error);
        if (status)
            return status;
        done[n] = (sparge_partial){
            .o = {now.o.data, SPARGE_F32, packed.batch, packed.head, packed.token}, .lse = now.lse};
        counts[n] = now.head_counts;
        if (n == 0) { /* what ran is told of the first */
            sum = now;
            continue;
        }
        sum.workspace_bytes = sparge_max(sum.workspace_bytes, now.workspace_bytes);
        sum.seconds_predict += now.seconds_predict;
        sum.seconds_quantize += now.seconds_quantize;
        sum.seconds_attend += now.seconds_attend;
    }
    sum.o = result->o;
    sum.lse = result->lse;
    sum.head_counts = result->head_counts;
    float *o = (float *)(uintptr_t)done[0].o.data, *lse = (float *)(uintptr_t)done[0].lse;
    sparge_out to = packed;
    to.data = o;
    sparge_status status = SPARGE_OK;
    if (plan->parts > 1)
        status = sparge_merge(p, done, plan->parts, &to, lse, error);
    sparge_counts *all = sparge_take(memory, heads + 1, sizeof *all);
    if (!status && !all)
        status = SPARGE_ERR_MEMORY;
    if (!status)
        status = sum_counts(plan, counts, all, error);
    if (status)
        return status;
    put_back(plan, o, lse, result);
    sum.counts = (sparge_counts){0};
    for (int64_t n = 0; n < heads; n++) {
        sparge_counts_add(&sum.counts, &all[n]);
        if (sum.head_counts)
            sum.head_counts[n] = all[n];
    }
    *result = sum;
    return SPARGE_OK;
}

sparge_status sparge_plan_run(const sparge_plan *plan, const sparge_executor *executor,
                              sparge_result *result, sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    if (!plan || plan->parts < 1 || !result)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s",
                           !result ? "result is NULL" : "plan is NULL or empty");
    const sparge_executor *run = executor ? executor : &here;
    if (!executor && plan->options.backend == SPARGE_CUDA)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "backend is cuda, whose arrays are in device memory: give an executor "
                           "that copies");
    if (!sparge_plan_is_plain(plan) && (result->mask || result->intermediates))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "result.%s is not NULL, but the plan has other q, k and v than its "
                           "caller, or several parts",
                           result->mask ? "mask" : "intermediates");
    if (!sparge_plan_is_plain(plan) &&
        ((unsigned)result->o.dtype > SPARGE_BF16 ||
         (!result->o.data && plan->problem.batch && plan->problem.q_len)))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "result.o has no data, or its dtype is not f32, f16 or bf16");
    sparge_piece *memory = NULL;
    const sparge_status status = sparge_plan_is_plain(plan)
                                     ? run_part(plan, 0, run, result, error)
                                     : run_parts(plan, run, result, &memory, error);
    sparge_release(&memory);
    result->seconds_predict += status ? 0.0 : plan->seconds;
    return sparge_with_message(status, error);
}

/* ---- Reading ---- */

sparge_status sparge_plan_predict(sparge_plan *plan, const sparge_executor *executor,
                                  sparge_error *error)
{
    const sparge_executor *run = executor ? executor : &here;
    if (!plan || plan->parts < 1)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "plan is NULL or empty");
    for (int n = 0; n < plan->parts; n++) {
        sparge_part *part = &plan->part[n];
        if (!part->predicted || part->mask.bits)
            continue;
        sparge_status status = sparge_part_mask(part, error);
        if (!status)
            status = run->predict(&part->problem, &part->options, &part->mask, NULL, error);
        if (status)
            return status;
    }
    return SPARGE_OK;
}

static sparge_status check_predicted(const sparge_plan *plan, const void *array, const char *name,
                                     sparge_error *error)
{
    if (!plan || plan->parts < 1 || !array)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL or empty",
                           array ? "plan" : name);
    for (int n = 0; n < plan->parts; n++)
        if (plan->part[n].predicted && !plan->part[n].mask.bits)
            return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                               "the mask of part %d is not predicted: call sparge_plan_predict", n);
    return SPARGE_OK;
}

sparge_status sparge_plan_count(const sparge_plan *plan, sparge_counts *head_counts,
                                sparge_error *error)
{
    sparge_status status = check_predicted(plan, head_counts, "head_counts", error);
    if (status)
        return status;
    sparge_piece *memory = NULL;
    const sparge_counts *counts[SPARGE_MAX_PARTS];
    for (int n = 0; n < plan->parts && !status; n++) {
        const sparge_part *part = &plan->part[n];
        sparge_counts *of_part =
            sparge_take(&memory, plan->problem.batch * plan->problem.heads + 1, sizeof *of_part);
        counts[n] = of_part;
        status = of_part ? sparge_mask_count(mask_of(part), &part->problem, &part->options, of_part,
                                             error)
                         : SPARGE_ERR_MEMORY;
    }
    if (!status)
        status = sum_counts(plan, counts, head_counts, error);
    sparge_release(&memory);
    return sparge_with_message(status, error);
}

/* Row i of a part's blocks to the pairs of the caller. */
static sparge_status add_row(const sparge_plan *plan, int part_n, int64_t n, int64_t i,
                             const uint32_t *row, uint8_t *pairs, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    const sparge_part *part = &plan->part[part_n];
    const sparge_geometry g = sparge_geometry_of(p, &plan->options);
    const int64_t block_q = part->options.block_q,
                  words = sparge_mask_row_words(part->problem.k_len);
    const int64_t kv = n / (p->heads / part->problem.kv_heads);
    for (int64_t r = 0; r < sparge_block_rows(p->q_len, block_q, i); r++) {
        const int64_t at = n * p->q_len + i * block_q + r;
        const int64_t t = plan->q_order ? plan->q_order[at] : i * block_q + r;
        uint8_t *to = pairs + (n * p->q_len + t) * p->k_len;
        for (int64_t key = 0; key < sparge_keys_of_query(&g, t); key++) {
            const int64_t place = part->place ? part->place[kv * p->k_len + key] : key;
            if (place < 0 || !sparge_mask_row_get(row + r * words, place))
                continue;
            if (to[key])
                return sparge_fail(error, SPARGE_ERR_SHAPE,
                                   "query %lld of batch %lld, head %lld attends to key %lld in two "
                                   "parts",
                                   (long long)t, (long long)(n / p->heads),
                                   (long long)(n % p->heads), (long long)key);
            to[key] = part->pooled ? 2 : 1;
        }
    }
    return SPARGE_OK;
}

sparge_status sparge_plan_pairs(const sparge_plan *plan, uint8_t *pairs, sparge_error *error)
{
    sparge_status status = check_predicted(plan, pairs, "pairs", error);
    if (status)
        return status;
    const sparge_problem *p = &plan->problem;
    memset(pairs, 0, (size_t)(p->batch * p->heads * p->q_len * p->k_len));
    for (int part_n = 0; part_n < plan->parts && !status; part_n++) {
        const sparge_part *part = &plan->part[part_n];
        const sparge_geometry g = sparge_geometry_of(&part->problem, &part->options);
        sparge_piece *memory = NULL;
        uint32_t *row =
            sparge_take(&memory, g.block_q * sparge_mask_row_words(g.k_len) + 1, sizeof *row);
        if (!row)
            status = SPARGE_ERR_MEMORY;
        for (int64_t line = 0; line < p->batch * p->heads * g.q_blocks && !status; line++) {
            const int64_t i = line % g.q_blocks, n = line / g.q_blocks;
            sparge_mask_get_row(mask_of(part), &part->problem, &part->options, n / p->heads,
                                n % p->heads, i, row);
            status = add_row(plan, part_n, n, i, row, pairs, error);
        }
        sparge_release(&memory);
    }
    return sparge_with_message(status, error);
}
