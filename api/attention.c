/* SPDX-License-Identifier: Apache-2.0 */
/* attention.c: the stages on every backend. */
#include "api/api.h"

#include <stdlib.h>
#include <string.h>

#include "common/counts.h"
#include "cpu/cpu.h"
#include "gpu/gpu.h"
#include "ref/oracle.h"
#include "ref/ref.h"

double sparge_density_tokens(const sparge_counts *c)
{
    return c->tokens ? (double)c->qk_tokens / (double)c->tokens : 0.0;
}

double sparge_density_blocks(const sparge_counts *c)
{
    return c->pairs ? (double)c->qk_done / (double)c->pairs : 0.0;
}

double sparge_sparsity_qk(const sparge_counts *c)
{
    return c->pairs ? 1.0 - (double)c->qk_done / (double)c->pairs : 0.0;
}

double sparge_sparsity_pv(const sparge_counts *c)
{
    return c->pairs ? 1.0 - c->pv_done / (double)c->pairs : 0.0;
}

double sparge_sparsity(const sparge_counts *c)
{
    return (sparge_sparsity_qk(c) + sparge_sparsity_pv(c)) / 2.0;
}

static const sparge_intermediates no_intermediates;

/* The stages of a backend on the host, which fail for want of memory or are cancelled (gpu/gpu.h
 * has those of cuda): arguments are checked and options resolved by then, no intermediates is NULL.
 */
static const struct stages {
    sparge_status (*predict)(const sparge_problem *, const sparge_options *, sparge_mask *,
                             const sparge_intermediates *);
    sparge_status (*attend)(const sparge_problem *, const sparge_options *, const sparge_mask *,
                            sparge_result *);
    sparge_status (*attention)(const sparge_problem *, const sparge_options *, sparge_mask *,
                               sparge_result *);
} stages[] = {
    [SPARGE_REF] = {sparge_ref_predict, sparge_ref_attend, sparge_ref_attention},
    [SPARGE_CPU] = {sparge_cpu_predict, sparge_cpu_attend, sparge_cpu_attention},
};

sparge_status sparge_predict(const sparge_problem *problem, const sparge_options *options,
                             sparge_mask *mask, const sparge_intermediates *intermediates,
                             sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    if (!mask)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "mask is NULL");
    sparge_status status = sparge_check(problem, options, false, mask, error);
    if (status)
        return status;
    if (mask->partial_first)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "mask has partly attended blocks, which a prediction cannot set");
    sparge_problem unbiased = *problem;
    sparge_options o = *options;
    unbiased.k_bias = NULL;
    status = sparge_resolve(&unbiased, &o, NULL, error);
    if (!intermediates)
        intermediates = &no_intermediates;
    if (!status)
        status = o.backend == SPARGE_CUDA
                     ? sparge_cuda_predict(problem, &o, mask, intermediates, error)
                     : stages[o.backend].predict(problem, &o, mask, intermediates);
    return sparge_with_message(status, error);
}

/* On the host every head's counts are there, for their sum. */
static sparge_status run_on_host(const sparge_problem *p, const sparge_options *o,
                                 sparge_mask *predicted, const sparge_mask *mask,
                                 sparge_result *now)
{
    const int64_t heads = p->batch * p->heads;
    sparge_counts *own = NULL;
    if (!now->head_counts)
        now->head_counts = own = malloc(heads ? (size_t)heads * sizeof *own : 1);
    if (!now->head_counts)
        return SPARGE_ERR_MEMORY;
    memset(now->head_counts, 0, (size_t)heads * sizeof *now->head_counts);
    const sparge_status status = predicted ? stages[o->backend].attention(p, o, predicted, now)
                                           : stages[o->backend].attend(p, o, mask, now);
    now->counts = (sparge_counts){0};
    for (int64_t h = 0; h < heads; h++)
        sparge_counts_add(&now->counts, &now->head_counts[h]);
    free(own);
    return status;
}

/* Stage 2 over `mask`, or both stages where there is one to predict. */
static sparge_status run(const sparge_problem *problem, const sparge_options *options,
                         sparge_mask *predicted, const sparge_mask *mask, sparge_result *result,
                         sparge_error *error)
{
    sparge_options o = *options;
    sparge_status status = sparge_resolve(problem, &o, mask, error);
    if (status)
        return status;
    sparge_result now = {
        .o = result->o,
        .lse = result->lse,
        .mask = result->mask,
        .head_counts = result->head_counts,
        .intermediates = result->intermediates ? result->intermediates : &no_intermediates,
        .backend = o.backend,
        .isa = o.isa,
        .qk_isa = o.isa,
        .pv_isa = o.isa,
        .threads = o.threads,
        .kernel = o.cuda.kernel,
        .pv_dtype = o.pv_dtype,
    };
    if (o.backend != SPARGE_CUDA)
        status = run_on_host(problem, &o, predicted, mask, &now);
    else if (predicted)
        status = sparge_cuda_attention(problem, &o, predicted, &now, error);
    else
        status = sparge_cuda_attend(problem, &o, mask, &now, error);
    now.intermediates = result->intermediates;
    now.head_counts = result->head_counts;
    *result = now;
    return sparge_with_message(status, error);
}

sparge_status sparge_attend(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_result *result, sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    sparge_status status = sparge_check(problem, options, true, mask, error);
    if (!status && mask && options->backend != SPARGE_CUDA)
        status = sparge_check_partials(mask, error);
    if (!status)
        status = sparge_check_result(problem, result, error);
    return status ? status : run(problem, options, NULL, mask, result, error);
}

sparge_status sparge_attention(const sparge_problem *problem, const sparge_options *options,
                               sparge_result *result, sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    sparge_status status =
        sparge_check(problem, options, true, result ? result->mask : NULL, error);
    if (!status)
        status = sparge_check_result(problem, result, error);
    if (!status && result->mask && result->mask->partial_first)
        status = sparge_fail(error, SPARGE_ERR_ARGUMENT,
                             "result.mask has partly attended blocks, which a prediction cannot "
                             "set");
    if (status)
        return status;
    sparge_mask own = {0};
    if (!result->mask)
        status = sparge_mask_shape(&own, problem, options, error);
    if (!status && !result->mask && options->backend != SPARGE_CUDA) /* which has a workspace */
        status = sparge_mask_alloc_bits(&own, error);
    if (!status)
        status = run(problem, options, result->mask ? result->mask : &own, NULL, result, error);
    sparge_mask_free(&own);
    return status;
}

sparge_status sparge_oracle(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_oracle_mode mode, double *o,
                            double *lse, double *block_mass, sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    if ((unsigned)mode > SPARGE_ORACLE_CODES)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "mode is %d, it must be one of sparge_oracle_mode", (int)mode);
    sparge_status status = sparge_check(problem, options, o != NULL, mask, error);
    if (!status && mask)
        status = sparge_check_partials(mask, error);
    if (status)
        return status;
    sparge_options real = *options; /* bf16 has no codes */
    if (real.qk_dtype == SPARGE_BF16)
        real.qk_dtype = SPARGE_F32;
    if (real.pv_dtype == SPARGE_BF16)
        real.pv_dtype = SPARGE_F32;
    status = sparge_ref_oracle(problem, &real, mask, mode, o, lse, block_mass);
    return sparge_with_message(status, error);
}
