/* bench_group.c: the cases that sparge bench times in turns, and one call of one of them. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tools/bench.h"

/* ---- One call ---- */

sparge_options bench_options(const bench_group *g, const bench_case *c)
{
    sparge_options options = g->options;
    options.qk_dtype = c->qk;
    options.pv_dtype = c->pv;
    options.kernel = c->kernel;
    return options;
}

sparge_out bench_output(const sparge_problem *p, void *data, sparge_dtype dtype)
{
    return (sparge_out){data, dtype, p->heads * p->q_len * p->dim_v, p->q_len * p->dim_v, p->dim_v};
}

/* The device has its own clock for each part. An imposed mask costs no prediction there. */
static sparge_status run_on_device(bench_group *g, bench_case *c, bench_times *times,
                                   sparge_error *why)
{
    const bool predicted = c->kind == BENCH_PREDICTED;
    sparge_options options = bench_options(g, c);
    sparge_mask mask = c->mask;
    sparge_result *r = &c->result;
    options.workspace = g->workspace.device;
    options.workspace_bytes = g->workspace.bytes;
    mask.bits = c->bits.device;
    *r = (sparge_result){.o = bench_output(&g->problem, g->output.device, g->problem.q.dtype)};
    r->mask = predicted ? &mask : NULL;
    const sparge_status status =
        predicted ? sparge_attention(&g->problem, &options, r, why)
                  : sparge_attend(&g->problem, &options, mask.bits ? &mask : NULL, r, why);
    const double predict = predicted ? r->seconds_predict : 0.0;
    r->mask = NULL;
    *times = (bench_times){{predict + r->seconds_quantize + r->seconds_attend,
                            predicted ? predict : NAN, r->seconds_quantize, r->seconds_attend}};
    return status;
}

/* Without a mask nothing is predicted. With an imposed one the predictor runs for its time alone,
 * and sparge_attend cannot share its pass over q and k: the total is more than a predicted mask
 * costs. */
sparge_status bench_run(bench_group *g, bench_case *c, bench_times *times, sparge_error *why)
{
    if (g->options.backend == SPARGE_CUDA)
        return run_on_device(g, c, times, why);
    const sparge_problem *p = &g->problem;
    const sparge_options options = bench_options(g, c);
    const bool imposed = c->kind == BENCH_RANDOM || c->kind == BENCH_BANDED;
    sparge_result *r = &c->result;
    *r = (sparge_result){.o = bench_output(p, g->o.data, SPARGE_F32),
                         .mask = c->kind == BENCH_PREDICTED ? &c->mask : NULL};
    double predict = NAN;
    sparge_status status = SPARGE_OK;
    const double start = progress_clock();
    if (c->kind == BENCH_ONEDNN) {
        snprintf(why->text, sizeof why->text, "oneDNN failed");
        status = bench_onednn(p, g->machine.threads, g->o.data) ? SPARGE_OK
                 : progress_goes_on(NULL, 0.0)                  ? SPARGE_ERR_MEMORY
                                                                : SPARGE_ERR_CANCELLED;
        const double all = progress_clock() - start;
        r->counts = g->cases[0].result.counts;
        r->isa = g->machine.isa;
        r->threads = g->machine.threads;
        *times = (bench_times){{all, NAN, NAN, all}};
        return status;
    }
    if (imposed) {
        status = sparge_predict(p, &options, &g->spare, NULL, why);
        predict = progress_clock() - start;
    }
    if (!status && c->kind == BENCH_PREDICTED) {
        status = sparge_attention(p, &options, r, why);
        predict = r->seconds_predict;
    } else if (!status) {
        status = sparge_attend(p, &options, imposed ? &c->mask : NULL, r, why);
    }
    const double total = progress_clock() - start;
    *times = (bench_times){{total, predict, r->seconds_quantize, r->seconds_attend}};
    return status;
}

exit_code bench_fetch(bench_group *g, bench_case *c, file_error *error)
{
    const array_type type = g->problem.q.dtype == SPARGE_F16    ? ARRAY_F16
                            : g->problem.q.dtype == SPARGE_BF16 ? ARRAY_BF16
                                                                : ARRAY_F32;
    sparge_error why;
    if (g->options.backend != SPARGE_CUDA)
        return EXIT_FINE;
    array o = {0};
    if (!array_alloc(type, g->o.rank, g->o.shape, &o, error))
        return EXIT_MACHINE;
    device_memory output = g->output;
    output.host = o.data;
    sparge_status status = device_memory_get(&output, &why);
    if (!status && c->kind == BENCH_PREDICTED)
        status = device_memory_get(&c->bits, &why);
    if (status || !array_to_f32(&o, error)) {
        array_free(&o);
        return status ? library_result(status, &why, error) : EXIT_MACHINE;
    }
    array_free(&g->o);
    g->o = o;
    return EXIT_FINE;
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

static exit_code add_masked(bench_group *g, bench_mask kind, double imposed, const bench_case *like,
                            int dense, file_error *error)
{
    const sparge_problem *p = &g->problem;
    bench_case *c = add_case(g, kind, imposed, like, dense, true);
    sparge_error why;
    sparge_status status = sparge_mask_alloc(&c->mask, p, &g->options, &why);
    if (!status && kind != BENCH_PREDICTED)
        bench_impose(kind, imposed, p, &g->options, &c->mask);
    if (!status)
        status = device_memory_make(g->options.backend, c->mask.bits, device_mask_bytes(&c->mask),
                                    &c->bits, &why);
    if (!status)
        status = device_memory_put(&c->bits, &why);
    return library_result(status, &why, error);
}

/* Dense attention once, whatever kinds of masks there are: a mask of sparsity 0 is none. */
static exit_code add_precision(bench_group *g, const bench_case *like, file_error *error)
{
    const bench_args *a = g->args;
    const bool baseline =
        !like->kernel && like->qk == SPARGE_F32 && like->pv == SPARGE_F32; /* cases[0] */
    const int dense = baseline ? 0 : g->count;
    if (!baseline)
        add_case(g, BENCH_DENSE, 0.0, like, dense, false);
    exit_code code = EXIT_FINE;
    for (int m = 0; m < a->mask.count && !code; m++) {
        const bench_mask kind = (bench_mask)a->mask.item[m];
        if (kind == BENCH_PREDICTED)
            code = add_masked(g, kind, NAN, like, dense, error);
        for (int s = 0; s < a->sparsity.count && !code && kind != BENCH_PREDICTED; s++)
            if (a->sparsity.item[s] == 0.0)
                g->cases[dense].shown = true;
            else
                code = add_masked(g, kind, a->sparsity.item[s], like, dense, error);
    }
    return code;
}

/* What a kernel computes in; false, and why, if it cannot. */
static bool resolve(const bench_group *g, bench_case *c, sparge_error *why)
{
    const bool either = c->qk == SPARGE_FASTEST;
    sparge_options options = bench_options(g, c);
    if (either)
        options.qk_dtype = SPARGE_INT8;
    sparge_status status = sparge_options_resolve(&g->problem, &options, why);
    if (status && either) {
        options.qk_dtype = SPARGE_F32;
        status = sparge_options_resolve(&g->problem, &options, why);
    }
    c->qk = options.qk_dtype;
    c->pv = options.pv_dtype;
    c->kernel = options.kernel;
    return status == SPARGE_OK;
}

/* Of kernels and precisions those that exist, each once: two kernels may have the same fastest. */
static exit_code add_kernels(bench_group *g, file_error *error)
{
    const bench_args *a = g->args;
    exit_code code = EXIT_FINE;
    sparge_error why = {""};
    for (int n = 0; n < a->kernel.count * a->qk.count * a->pv.count && !code; n++) {
        bench_case like = {.kernel = (int)a->kernel.item[n / a->pv.count / a->qk.count],
                           .qk = (sparge_dtype)a->qk.item[n / a->pv.count % a->qk.count],
                           .pv = (sparge_dtype)a->pv.item[n % a->pv.count]};
        if (resolve(g, &like, &why))
            code = add_precision(g, &like, error);
    }
    if (!code && g->count == 0)
        code = library_result(SPARGE_ERR_UNSUPPORTED, &why, error);
    return code;
}

static exit_code add_precisions(bench_group *g, file_error *error)
{
    const bench_args *a = g->args;
    const bench_case exact = {.qk = SPARGE_F32, .pv = SPARGE_F32};
    exit_code code = EXIT_FINE;
    add_case(g, BENCH_DENSE, 0.0, &exact, 0, false);
    if (bench_onednn_can(g))
        add_case(g, BENCH_ONEDNN, 0.0, &exact, 0, true);
    for (int n = 0; n < a->qk.count * a->pv.count && !code; n++) {
        const bench_case like = {.qk = (sparge_dtype)a->qk.item[n / a->pv.count],
                                 .pv = (sparge_dtype)a->pv.item[n % a->pv.count]};
        code = add_precision(g, &like, error);
    }
    return code;
}

/* ---- Memory ---- */

static sparge_status place_inputs(bench_group *g, sparge_error *why)
{
    sparge_in *const view[] = {&g->problem.q, &g->problem.k, &g->problem.v};
    sparge_status status = SPARGE_OK;
    for (int n = 0; n < 3 && !status; n++) {
        const array *x = &g->in->tensor[n];
        const int64_t bytes = array_count(x) * (int64_t)array_type_size(x->type);
        status = device_memory_make(g->options.backend, x->data, bytes, &g->input[n], why);
        if (!status)
            status = device_memory_put(&g->input[n], why);
        view[n]->data =
            (char *)g->input[n].device + ((const char *)view[n]->data - (const char *)x->data);
    }
    if (!status)
        status = device_memory_make(g->options.backend, g->o.data,
                                    array_count(&g->o) * (g->problem.q.dtype == SPARGE_F32 ? 4 : 2),
                                    &g->output, why);
    return status;
}

/* As much as the greediest case needs. */
static sparge_status place_workspace(bench_group *g, sparge_error *why)
{
    int64_t most = 0;
    sparge_status status = SPARGE_OK;
    for (int n = 0; n < g->count && !status; n++) {
        const sparge_options options = bench_options(g, &g->cases[n]);
        int64_t bytes = 0;
        status = sparge_workspace_bytes(&g->problem, &options, g->cases[n].kind == BENCH_PREDICTED,
                                        &bytes, why);
        most = bytes > most ? bytes : most;
    }
    return status ? status : device_memory_make(g->options.backend, NULL, most, &g->workspace, why);
}

exit_code bench_group_make(bench_group *g, file_error *error)
{
    const bench_args *a = g->args;
    const bool cuda = g->options.backend == SPARGE_CUDA;
    const int most = 2 + a->kernel.count * a->qk.count * a->pv.count *
                             (1 + a->mask.count * (1 + a->sparsity.count));
    const sparge_problem *p = &g->problem;
    const int64_t shape[] = {p->batch, p->heads, p->q_len, p->dim_v};
    const int64_t one_head[] = {1, 1, p->q_len, p->dim_v};
    g->cases = calloc((size_t)most, sizeof *g->cases);
    if (!g->cases) {
        file_error_set(error, NULL, "no memory for %d cases", most);
        return EXIT_MACHINE;
    }
    sparge_error why;
    sparge_status status = cuda ? SPARGE_OK : sparge_mask_alloc(&g->spare, p, &g->options, &why);
    exit_code code = library_result(status, &why, error);
    if (!code && (!array_alloc(ARRAY_F32, 4, shape, &g->o, error) ||
                  !array_alloc(ARRAY_F32, 4, cuda ? one_head : shape, &g->want, error)))
        code = EXIT_MACHINE;
    if (!code)
        code = library_result(place_inputs(g, &why), &why, error);
    if (!code)
        code = cuda ? add_kernels(g, error) : add_precisions(g, error);
    if (!code && cuda)
        code = library_result(place_workspace(g, &why), &why, error);
    return code;
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
