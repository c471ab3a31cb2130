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
    return options;
}

/* Without a mask nothing is predicted. With an imposed one the predictor runs for its time alone,
 * and sparge_attend cannot share its pass over q and k: the total is more than a predicted mask
 * costs. */
sparge_status bench_run(bench_group *g, bench_case *c, bench_times *times, sparge_error *why)
{
    const sparge_problem *p = &g->in->problem;
    const sparge_options options = bench_options(g, c);
    const bool imposed = c->kind == BENCH_RANDOM || c->kind == BENCH_BANDED;
    sparge_result *r = &c->result;
    *r = (sparge_result){
        .o = {g->o.data, SPARGE_F32, p->heads * p->q_len * p->dim_v, p->q_len * p->dim_v, p->dim_v},
        .mask = c->kind == BENCH_PREDICTED ? &c->mask : NULL,
    };
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

/* ---- The cases of a group ---- */

static bench_case *add_case(bench_group *g, bench_mask kind, double imposed, sparge_dtype qk,
                            sparge_dtype pv, int dense, bool shown)
{
    bench_case *c = &g->cases[g->count++];
    *c = (bench_case){
        .qk = qk, .pv = pv, .kind = kind, .imposed = imposed, .dense = dense, .shown = shown};
    return c;
}

static exit_code add_masked(bench_group *g, bench_mask kind, double imposed, sparge_dtype qk,
                            sparge_dtype pv, int dense, file_error *error)
{
    const sparge_problem *p = &g->in->problem;
    bench_case *c = add_case(g, kind, imposed, qk, pv, dense, true);
    sparge_error why;
    const sparge_status status = sparge_mask_alloc(&c->mask, p, &g->options, &why);
    if (!status && kind != BENCH_PREDICTED)
        bench_impose(kind, imposed, p, &g->options, &c->mask);
    return library_result(status, &why, error);
}

/* Dense attention once, whatever kinds of masks there are: a mask of sparsity 0 is none. */
static exit_code add_precision(bench_group *g, sparge_dtype qk, sparge_dtype pv, file_error *error)
{
    const bench_args *a = g->args;
    const bool exact = qk == SPARGE_F32 && pv == SPARGE_F32;
    const int dense = exact ? 0 : g->count;
    if (!exact)
        add_case(g, BENCH_DENSE, 0.0, qk, pv, dense, false);
    exit_code code = EXIT_FINE;
    for (int m = 0; m < a->mask.count && !code; m++) {
        const bench_mask kind = (bench_mask)a->mask.item[m];
        if (kind == BENCH_PREDICTED)
            code = add_masked(g, kind, NAN, qk, pv, dense, error);
        for (int s = 0; s < a->sparsity.count && !code && kind != BENCH_PREDICTED; s++)
            if (a->sparsity.item[s] == 0.0)
                g->cases[dense].shown = true;
            else
                code = add_masked(g, kind, a->sparsity.item[s], qk, pv, dense, error);
    }
    return code;
}

exit_code bench_group_make(bench_group *g, file_error *error)
{
    const bench_args *a = g->args;
    const int most = 2 + a->qk.count * a->pv.count * (1 + a->mask.count * (1 + a->sparsity.count));
    const sparge_problem *p = &g->in->problem;
    const int64_t shape[] = {p->batch, p->heads, p->q_len, p->dim_v};
    g->cases = calloc((size_t)most, sizeof *g->cases);
    if (!g->cases) {
        file_error_set(error, NULL, "no memory for %d cases", most);
        return EXIT_MACHINE;
    }
    sparge_error why;
    exit_code code =
        library_result(sparge_mask_alloc(&g->spare, p, &g->options, &why), &why, error);
    if (!code && (!array_alloc(ARRAY_F32, 4, shape, &g->o, error) ||
                  !array_alloc(ARRAY_F32, 4, shape, &g->want, error)))
        code = EXIT_MACHINE;
    add_case(g, BENCH_DENSE, 0.0, SPARGE_F32, SPARGE_F32, 0, false);
    if (bench_onednn_can(g))
        add_case(g, BENCH_ONEDNN, 0.0, SPARGE_F32, SPARGE_F32, 0, true);
    for (int n = 0; n < a->qk.count * a->pv.count && !code; n++)
        code = add_precision(g, options_dtype(options_qk_dtypes[(int)a->qk.item[n / a->pv.count]]),
                             options_dtype(options_qk_dtypes[(int)a->pv.item[n % a->pv.count]]),
                             error);
    return code;
}

void bench_group_free(bench_group *g)
{
    for (int n = 0; n < g->count; n++) {
        sparge_mask_free(&g->cases[n].mask);
        free(g->cases[n].pass);
    }
    free(g->cases);
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
