/* SPDX-License-Identifier: Apache-2.0 */
/* attention.c: masks, and the stages on every backend. */
#include "api/api.h"

#include <stdlib.h>
#include <string.h>

#include "common/block_mask.h"
#include "common/counts.h"
#include "common/geometry.h"
#include "cpu/cpu.h"
#include "gpu/gpu.h"
#include "ref/oracle.h"
#include "ref/ref.h"

/* A mask of the problem's shape without bits. */
sparge_status sparge_mask_shape(sparge_mask *mask, const sparge_problem *p, const sparge_options *o,
                                sparge_error *error)
{
    const sparge_geometry g =
        sparge_geometry_make(p->q_len, p->k_len, o->block_q, o->block_k, SPARGE_CAUSAL_NONE);
    const int64_t words = sparge_mask_row_words(g.k_blocks);
    if (!sparge_fits(p->batch, p->heads, g.q_blocks, words, sizeof *mask->bits))
        return sparge_fail(error, SPARGE_ERR_SHAPE, "mask of %lld x %lld blocks a head overflows",
                           (long long)g.q_blocks, (long long)g.k_blocks);
    *mask = (sparge_mask){NULL, p->batch, p->heads, g.q_blocks, g.k_blocks, words};
    return SPARGE_OK;
}

static sparge_status alloc_bits(sparge_mask *mask, sparge_error *error)
{
    const int64_t total = mask->batch * mask->heads * mask->q_blocks * mask->words;
    mask->bits = calloc(total ? (size_t)total : 1, sizeof *mask->bits);
    return mask->bits ? SPARGE_OK : sparge_fail(error, SPARGE_ERR_MEMORY, "out of memory");
}

sparge_status sparge_mask_alloc(sparge_mask *mask, const sparge_problem *problem,
                                const sparge_options *options, sparge_error *error)
{
    if (!mask)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "mask is NULL");
    *mask = (sparge_mask){0};
    sparge_mask shape;
    sparge_status status = sparge_check(problem, options, false, NULL, error);
    if (!status)
        status = sparge_mask_shape(&shape, problem, options, error);
    if (!status)
        status = alloc_bits(&shape, error);
    if (!status)
        *mask = shape;
    return status;
}

void sparge_mask_free(sparge_mask *mask)
{
    if (mask) {
        free(mask->bits);
        *mask = (sparge_mask){0};
    }
}

static uint32_t *mask_row(const sparge_mask *mask, int64_t batch, int64_t head, int64_t i)
{
    return mask->bits + ((batch * mask->heads + head) * mask->q_blocks + i) * mask->words;
}

bool sparge_mask_get(const sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j)
{
    return sparge_mask_row_get(mask_row(mask, batch, head, i), j);
}

void sparge_mask_set(sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j,
                     bool keep)
{
    uint32_t *row = mask_row(mask, batch, head, i);
    if (keep)
        sparge_mask_row_set(row, j);
    else
        sparge_mask_row_clear(row, j);
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
    sparge_options o = *options;
    status = sparge_resolve(problem, &o, error);
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
    sparge_status status = sparge_resolve(problem, &o, error);
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
    if (status)
        return status;
    sparge_mask own = {0};
    if (!result->mask)
        status = sparge_mask_shape(&own, problem, options, error);
    if (!status && !result->mask && options->backend != SPARGE_CUDA) /* which has a workspace */
        status = alloc_bits(&own, error);
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
