/* SPDX-License-Identifier: Apache-2.0 */
/* bench_group.c: the cases that sparge bench times in turns, and one call of one of them. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tools/bench.h"

#include "sparge_cuda.h"

/* ---- One call ---- */

sparge_options bench_options(const bench_group *g, const bench_case *c)
{
    sparge_options options = g->options;
    options.qk_dtype = c->qk;
    options.pv_dtype = c->pv;
    options.cuda.kernel = c->kernel;
    return options;
}

sparge_out bench_output(const sparge_problem *p, void *data, sparge_dtype dtype)
{
    return (sparge_out){data, dtype, p->heads * p->q_len * p->dim_v, p->q_len * p->dim_v, p->dim_v};
}

/* The device has its own clock for each part. An imposed mask costs no prediction there. */
static void run_on_device(bench_group *g, bench_case *c, bench_times *times)
{
    const bool predicted = c->kind == BENCH_PREDICTED;
    const sparge_problem *p = &g->problem;
    sparge_options options = bench_options(g, c);
    sparge_mask mask = c->mask;
    sparge_result *r = &c->result;
    options.cuda.workspace = g->workspace.device;
    options.cuda.workspace_bytes = g->workspace.bytes;
    mask.bits = c->bits.device;
    *r = (sparge_result){.o = bench_output(p, g->output.device, p->q.dtype)};
    r->mask = predicted ? &mask : NULL;
    must_sparge(predicted
                    ? sparge_attention(p, &options, r, &library_error)
                    : sparge_attend(p, &options, mask.bits ? &mask : NULL, r, &library_error));
    const double predict = predicted ? r->seconds_predict : 0.0;
    r->mask = NULL;
    *times = (bench_times){{predict + r->seconds_quantize + r->seconds_attend,
                            predicted ? predict : NAN, r->seconds_quantize, r->seconds_attend}};
}

static void run_onednn(bench_group *g, bench_case *c, bench_times *times)
{
    const double start = progress_clock();
    if (!bench_onednn(&g->problem, g->machine.threads, g->o.data)) {
        if (!progress_goes_on(NULL, 0.0))
            must_sparge(SPARGE_ERR_CANCELLED);
        fail(EXIT_MACHINE, NULL, "oneDNN failed");
    }
    const double all = progress_clock() - start;
    c->result = (sparge_result){
        .counts = g->cases[0].result.counts, .isa = g->machine.isa, .threads = g->machine.threads};
    *times = (bench_times){{all, NAN, NAN, all}};
}

/* Without a mask nothing is predicted. With an imposed one the predictor runs for its time alone,
 * and sparge_attend cannot share its pass over q and k: the total is more than a predicted mask
 * costs. */
static void run_on_cpu(bench_group *g, bench_case *c, bench_times *times)
{
    const sparge_problem *p = &g->problem;
    const sparge_options options = bench_options(g, c);
    const bool imposed = c->kind == BENCH_RANDOM || c->kind == BENCH_BANDED;
    sparge_result *r = &c->result;
    *r = (sparge_result){.o = bench_output(p, g->o.data, SPARGE_F32),
                         .mask = c->kind == BENCH_PREDICTED ? &c->mask : NULL};
    double predict = NAN;
    const double start = progress_clock();
    if (imposed) {
        must_sparge(sparge_predict(p, &options, &g->spare, NULL, &library_error));
        predict = progress_clock() - start;
    }
    if (r->mask) {
        must_sparge(sparge_attention(p, &options, r, &library_error));
        predict = r->seconds_predict;
    } else
        must_sparge(sparge_attend(p, &options, imposed ? &c->mask : NULL, r, &library_error));
    const double total = progress_clock() - start;
    *times = (bench_times){{total, predict, r->seconds_quantize, r->seconds_attend}};
}

void bench_run(bench_group *g, bench_case *c, bench_times *times)
{
    if (g->options.backend == SPARGE_CUDA)
        run_on_device(g, c, times);
    else if (c->kind == BENCH_ONEDNN)
        run_onednn(g, c, times);
    else
        run_on_cpu(g, c, times);
}

void bench_fetch(bench_group *g, bench_case *c)
{
    const array_type type = g->problem.q.dtype == SPARGE_F16    ? ARRAY_F16
                            : g->problem.q.dtype == SPARGE_BF16 ? ARRAY_BF16
                                                                : ARRAY_F32;
    if (g->options.backend != SPARGE_CUDA)
        return;
    array o;
    must_have(array_alloc(type, g->o.rank, g->o.shape, &o, &failure));
    device_memory output = g->output;
    output.host = o.data;
    device_memory_get(&output);
    if (c->kind == BENCH_PREDICTED)
        device_memory_get(&c->bits);
    must_have(array_to_f32(&o, &failure));
    array_free(&g->o);
    g->o = o;
}

/* ---- The cases of a group ---- */

/* dtypes and kernel are those of `like`. */
static bench_case *add_case(bench_group *g, bench_mask kind, double imposed, const bench_case *like,
                            int dense, bool shown)
{
    bench_case *c = &g->cases[g->count++];
    *c = (bench_case){.qk = like->qk,
                      .pv = like->pv,
                      .kernel = like->kernel,
                      .kind = kind,
                      .imposed = imposed,
                      .dense = dense,
                      .shown = shown};
    return c;
}

static void add_masked(bench_group *g, bench_mask kind, double imposed, const bench_case *like,
                       int dense)
{
    const sparge_problem *p = &g->problem;
    bench_case *c = add_case(g, kind, imposed, like, dense, true);
    must_sparge(sparge_mask_alloc(&c->mask, p, &g->options, &library_error));
    if (kind != BENCH_PREDICTED)
        bench_impose(kind, imposed, p, &g->options, &c->mask);
    device_memory_make(g->options.backend, c->mask.bits, device_mask_bytes(&c->mask), &c->bits);
    device_memory_put(&c->bits);
}

/* Dense attention once, whatever kinds of masks there are: a mask of sparsity 0 is none. */
static void add_precision(bench_group *g, const bench_case *like)
{
    const bench_args *a = g->args;
    const bool baseline =
        !like->kernel && like->qk == SPARGE_F32 && like->pv == SPARGE_F32; /* cases[0] */
    const int dense = baseline ? 0 : g->count;
    if (!baseline)
        add_case(g, BENCH_DENSE, 0.0, like, dense, false);
    for (int m = 0; m < a->mask.count; m++) {
        const bench_mask kind = (bench_mask)a->mask.item[m];
        if (kind == BENCH_PREDICTED)
            add_masked(g, kind, NAN, like, dense);
        for (int s = 0; s < a->sparsity.count && kind != BENCH_PREDICTED; s++)
            if (a->sparsity.item[s] == 0.0)
                g->cases[dense].shown = true;
            else
                add_masked(g, kind, a->sparsity.item[s], like, dense);
    }
}

/* What a kernel computes in; false, and why, if it cannot. */
static bool resolve(const bench_group *g, bench_case *c)
{
    const bool either = c->qk == SPARGE_FASTEST;
    sparge_options options = bench_options(g, c);
    if (either)
        options.qk_dtype = SPARGE_INT8;
    sparge_status status = sparge_options_resolve(&g->problem, &options, &library_error);
    if (status && either) {
        options.qk_dtype = SPARGE_F32;
        status = sparge_options_resolve(&g->problem, &options, &library_error);
    }
    c->qk = options.qk_dtype;
    c->pv = options.pv_dtype;
    c->kernel = options.cuda.kernel;
    return status == SPARGE_OK;
}

/* Of kernels and precisions those that exist, each once: two kernels may have the same fastest. */
static void add_kernels(bench_group *g)
{
    const bench_args *a = g->args;
    for (int n = 0; n < a->kernel.count * a->qk.count * a->pv.count; n++) {
        bench_case like = {.kernel = (int)a->kernel.item[n / a->pv.count / a->qk.count],
                           .qk = (sparge_dtype)a->qk.item[n / a->pv.count % a->qk.count],
                           .pv = (sparge_dtype)a->pv.item[n % a->pv.count]};
        if (resolve(g, &like))
            add_precision(g, &like);
    }
    if (g->count == 0)
        must_sparge(SPARGE_ERR_UNSUPPORTED);
}

static void add_precisions(bench_group *g)
{
    const bench_args *a = g->args;
    const bench_case exact = {.qk = SPARGE_F32, .pv = SPARGE_F32};
    add_case(g, BENCH_DENSE, 0.0, &exact, 0, false);
    if (bench_onednn_can(g))
        add_case(g, BENCH_ONEDNN, 0.0, &exact, 0, true);
    for (int n = 0; n < a->qk.count * a->pv.count; n++) {
        const bench_case like = {.qk = (sparge_dtype)a->qk.item[n / a->pv.count],
                                 .pv = (sparge_dtype)a->pv.item[n % a->pv.count]};
        add_precision(g, &like);
    }
}

/* ---- Memory ---- */

static void place_inputs(bench_group *g)
{
    sparge_in *const view[] = {&g->problem.q, &g->problem.k, &g->problem.v};
    for (int n = 0; n < 3; n++) {
        const array *x = &g->in->tensor[n];
        const int64_t bytes = array_count(x) * (int64_t)array_type_size(x->type);
        device_memory_make(g->options.backend, x->data, bytes, &g->input[n]);
        device_memory_put(&g->input[n]);
        view[n]->data =
            (char *)g->input[n].device + ((const char *)view[n]->data - (const char *)x->data);
    }
    device_memory_make(g->options.backend, g->o.data,
                       array_count(&g->o) * (g->problem.q.dtype == SPARGE_F32 ? 4 : 2), &g->output);
}

/* As much as the greediest case needs. */
static void place_workspace(bench_group *g)
{
    int64_t most = 0;
    for (int n = 0; n < g->count; n++) {
        const sparge_options options = bench_options(g, &g->cases[n]);
        int64_t bytes;
        must_sparge(sparge_workspace_bytes(
            &g->problem, &options, g->cases[n].kind == BENCH_PREDICTED, &bytes, &library_error));
        most = bytes > most ? bytes : most;
    }
    device_memory_make(g->options.backend, NULL, most, &g->workspace);
}

void bench_group_make(bench_group *g)
{
    const bench_args *a = g->args;
    const bool cuda = g->options.backend == SPARGE_CUDA;
    const int most = 2 + a->kernel.count * a->qk.count * a->pv.count *
                             (1 + a->mask.count * (1 + a->sparsity.count));
    const sparge_problem *p = &g->problem;
    const int64_t shape[] = {p->batch, p->heads, p->q_len, p->dim_v};
    const int64_t one_head[] = {1, 1, p->q_len, p->dim_v};
    g->cases = must_alloc((size_t)most, sizeof *g->cases, "the cases");
    if (!cuda)
        must_sparge(sparge_mask_alloc(&g->spare, p, &g->options, &library_error));
    must_have(array_alloc(ARRAY_F32, 4, shape, &g->o, &failure));
    must_have(array_alloc(ARRAY_F32, 4, cuda ? one_head : shape, &g->want, &failure));
    place_inputs(g);
    (cuda ? add_kernels : add_precisions)(g);
    if (cuda)
        place_workspace(g);
}

void bench_group_free(bench_group *g)
{
    for (int n = 0; n < g->count; n++) {
        device_memory_free(&g->cases[n].bits);
        sparge_mask_free(&g->cases[n].mask);
        free(g->cases[n].pass);
    }
    free(g->cases);
    for (int n = 0; n < 3; n++)
        device_memory_free(&g->input[n]);
    device_memory_free(&g->output);
    device_memory_free(&g->workspace);
    sparge_mask_free(&g->spare);
    array_free(&g->o);
    array_free(&g->want);
}

#ifndef SPARGE_ONEDNN
bool bench_onednn_can(const bench_group *g)
{
    (void)g;
    return false;
}

bool bench_onednn(const sparge_problem *p, int threads, float *o)
{
    (void)p, (void)threads, (void)o;
    return false;
}
#endif
