/* SPDX-License-Identifier: Apache-2.0 */
/* input.c: one head of one input, where the backend runs, with what is known of it before any
 * threshold: S, the self-similarity of its blocks, and dense attention in f32, which errors are
 * measured against. */
#include "tune/tune.h"

#include <stdlib.h>

#include "common/block_mask.h"
#include "common/element.h"
#include "sparge_cuda.h"
#include "sparge_inspect.h"

/* ---- Arrays that live twice ---- */

sparge_status tune_array_make(tune_array *x, int64_t bytes, bool device, sparge_error *error)
{
    *x = (tune_array){.bytes = bytes, .host = calloc((size_t)sparge_max(1, bytes), 1)};
    if (!x->host)
        return SPARGE_ERR_MEMORY;
    return device ? sparge_device_alloc(sparge_max(1, bytes), &x->device, error) : SPARGE_OK;
}

sparge_status tune_array_push(const tune_array *x, sparge_error *error)
{
    return x->device ? sparge_device_copy(x->device, x->host, x->bytes, error) : SPARGE_OK;
}

sparge_status tune_array_pull(const tune_array *x, int64_t bytes, sparge_error *error)
{
    return x->device ? sparge_device_copy(x->host, x->device, bytes, error) : SPARGE_OK;
}

void tune_array_free(tune_array *x)
{
    free(x->host);
    sparge_device_free(x->device);
    *x = (tune_array){0};
}

/* ---- Into place ---- */

static sparge_in packed(const tune_array *x, int64_t dim)
{
    return (sparge_in){.data = tune_data(x), .dtype = SPARGE_F32, .token = dim};
}

/* Tokens of one head in f32, and `pad` rows of 0; counts elements that are not finite. */
static sparge_status load(tune_array *x, const sparge_in *in, int64_t batch, int64_t head,
                          int64_t tokens, int64_t dim, int64_t pad, bool device, int64_t *nonfinite,
                          sparge_error *error)
{
    sparge_status status =
        tune_array_make(x, (tokens + pad) * dim * (int64_t)sizeof(float), device, error);
    for (int64_t t = 0; t < tokens && !status; t++)
        for (int64_t c = 0; c < dim; c++) {
            const int64_t at = sparge_in_row(in, batch, head, t) + c;
            const float value = sparge_element_load(in->data, in->dtype, at);
            const bool finite = sparge_finite(value);
            ((float *)x->host)[t * dim + c] = finite ? value : 0.0f;
            *nonfinite += !finite;
        }
    return status ? status : tune_array_push(x, error);
}

/* ---- What comes before any threshold ---- */

/* S for every pair and the similarities: prediction under a theta that nothing fails. And the mean
 * key. */
static sparge_status predict(tune_input *x, tune_array *mean, sparge_error *error)
{
    const sparge_geometry *g = &x->g;
    const bool device = x->q.device;
    sparge_options o = *x->o;
    o.thresholds = tune_thresholds(tune_dense(), false);
    tune_array part[3] = {{0}}, bits = {0}; /* S, q_sim, k_sim */
    const int64_t count[3] = {g->q_blocks * g->k_blocks, g->q_blocks, g->k_blocks};
    const int64_t words = sparge_mask_row_words(g->k_blocks);
    sparge_status status =
        tune_array_make(&bits, g->q_blocks * words * (int64_t)sizeof(uint32_t), device, error);
    for (int n = 0; n < 3 && !status; n++)
        status = tune_array_make(&part[n], count[n] * (int64_t)sizeof(float), device, error);
    if (!status) {
        const sparge_intermediates intermediates = {
            .k_mean = tune_data(mean),
            .s = tune_data(&part[0]),
            .q_sim = tune_data(&part[1]),
            .k_sim = tune_data(&part[2]),
        };
        sparge_mask mask = {.bits = tune_data(&bits), /* nobody reads it */
                            .batch = 1,
                            .heads = 1,
                            .q_blocks = g->q_blocks,
                            .k_blocks = g->k_blocks,
                            .words = words};
        status = sparge_predict(&x->problem, &o, &mask, &intermediates, error);
    }
    float **const to[3] = {&x->s, &x->q_sim, &x->k_sim};
    for (int n = 0; n < 3 && !status; n++) {
        status = tune_array_pull(&part[n], part[n].bytes, error);
        *to[n] = part[n].host;
        part[n].host = NULL; /* it is the input's now */
    }
    if (!status)
        status = tune_array_pull(mean, mean->bytes, error);
    for (int n = 0; n < 3; n++)
        tune_array_free(&part[n]);
    tune_array_free(&bits);
    return status;
}

/* The keys as a call without smoothing has to get them. */
static sparge_status smooth(tune_input *x, const float *mean, sparge_error *error)
{
    const int64_t dim = x->problem.dim;
    const sparge_status status = tune_array_make(&x->smooth, x->k.bytes, x->k.device, error);
    for (int64_t n = 0; n < x->g.k_len * dim && !status; n++)
        ((float *)x->smooth.host)[n] =
            ((const float *)x->k.host)[n] - (x->o->smooth_k ? mean[n % dim] : 0.0f);
    return status ? status : tune_array_push(&x->smooth, error);
}

/* Dense over a mask of NULL, or with a predicted mask; the output goes to o. */
static sparge_status attend(tune_input *x, const sparge_options *o, bool dense, tune_array *o_out,
                            sparge_counts *counts, sparge_error *error)
{
    const int64_t dim_v = x->problem.dim_v;
    sparge_status status =
        tune_array_make(o_out, x->g.q_len * dim_v * (int64_t)sizeof(float), x->q.device, error);
    sparge_result result = {.o = {tune_data(o_out), SPARGE_F32, 0, 0, dim_v}};
    if (!status)
        status = dense ? sparge_attend(&x->problem, o, NULL, &result, error)
                       : sparge_attention(&x->problem, o, &result, error);
    if (!status)
        status = tune_array_pull(o_out, o_out->bytes, error);
    *counts = result.counts;
    x->products += (double)result.counts.qk_done + result.counts.pv_done;
    return status;
}

sparge_options tune_dense_options(const sparge_options *of)
{
    sparge_options o = *of;
    o.qk_dtype = o.pv_dtype = SPARGE_F32;
    if (o.backend == SPARGE_REF) /* which takes one with bf16 alone */
        o.isa = SPARGE_ISA_AUTO;
    o.cuda.kernel = 0;
    o.thresholds = tune_thresholds(tune_dense(), false);
    o.per_head = NULL;
    return o;
}

static sparge_status attend_dense(tune_input *x, sparge_error *error)
{
    const sparge_options o = tune_dense_options(x->o);
    tune_array out;
    sparge_counts counts;
    sparge_status status = attend(x, &o, true, &out, &counts, error);
    if (!status) {
        x->want = out.host;
        out.host = NULL;
        x->pairs = (double)counts.pairs;
    }
    tune_array_free(&out);
    for (int64_t n = 0; n < x->g.q_len * x->problem.dim_v && !status; n++) {
        x->nonfinite += !sparge_finite(x->want[n]);
        x->want_sum += (double)fabsf(x->want[n]);
    }
    return status;
}

sparge_status tune_input_open(tune_input *x, const sparge_problem *p, int64_t batch, int64_t head,
                              const sparge_options *o, sparge_error *error)
{
    const bool device = o->backend == SPARGE_CUDA;
    const int64_t kv = head / (p->heads / p->kv_heads);
    *x = (tune_input){
        .o = o,
        .g = sparge_geometry_of(p, o),
    };
    tune_array mean = {0};
    sparge_status status =
        load(&x->q, &p->q, batch, head, p->q_len, p->dim, o->block_k, device, &x->nonfinite, error);
    if (!status)
        status = load(&x->k, &p->k, batch, kv, p->k_len, p->dim, 0, device, &x->nonfinite, error);
    if (!status)
        status = load(&x->v, &p->v, batch, kv, p->k_len, p->dim_v, 0, device, &x->nonfinite, error);
    x->problem = (sparge_problem){.batch = 1,
                                  .heads = 1,
                                  .kv_heads = 1,
                                  .q_len = p->q_len,
                                  .k_len = p->k_len,
                                  .dim = p->dim,
                                  .dim_v = p->dim_v,
                                  .q = packed(&x->q, p->dim),
                                  .k = packed(&x->k, p->dim),
                                  .v = packed(&x->v, p->dim_v)};
    if (!status && x->nonfinite == 0) {
        status = tune_array_make(&mean, p->dim * (int64_t)sizeof(float), device, error);
        if (!status)
            status = predict(x, &mean, error);
        if (!status)
            status = smooth(x, mean.host, error);
        if (!status)
            status = attend_dense(x, error);
    }
    tune_array_free(&mean);
    if (status)
        tune_input_close(x);
    return status;
}

void tune_input_close(tune_input *x)
{
    tune_array_free(&x->q);
    tune_array_free(&x->k);
    tune_array_free(&x->smooth);
    tune_array_free(&x->v);
    free(x->s);
    free(x->q_sim);
    free(x->k_sim);
    free(x->want);
    *x = (tune_input){0};
}

/* ---- A triple, whole ---- */

double tune_relative(const tune_input *x, double error)
{
    return error == 0.0 ? 0.0 : error > 0.0 ? error / x->want_sum : (double)INFINITY;
}

sparge_status tune_evaluate(tune_input *x, const sparge_thresholds *thresholds, tune_call *to,
                            sparge_error *error)
{
    sparge_options o = *x->o;
    o.thresholds = *thresholds;
    tune_array out;
    sparge_counts counts;
    const sparge_status status = attend(x, &o, false, &out, &counts, error);
    double error_sum = 0.0;
    *to = (tune_call){.sparsity = sparge_sparsity(&counts)};
    for (int64_t n = 0; n < x->g.q_len * x->problem.dim_v && !status; n++) {
        const float got = ((const float *)out.host)[n];
        to->nan += isnan(got) != 0;
        to->inf += isinf(got) != 0;
        error_sum += fabs((double)got - (double)x->want[n]);
    }
    to->l1 = tune_relative(x, error_sum);
    tune_array_free(&out);
    return status;
}
