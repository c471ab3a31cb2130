/* SPDX-License-Identifier: Apache-2.0 */
/* bench_report.c: what sparge bench found out, as tables and as JSON. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tools/bench.h"
#include "tools/kept.h"
#include "tools/options.h"

/* ---- Figures from times; what has no time is NaN, and so is all that follows from it ---- */

typedef struct figures {
    double seconds_total, seconds_predict, seconds_quantize, seconds_attend;
    double tops,
        tops_executed; /* effective: of all visible pairs, and really done; by the whole time */
    double pct_peak;   /* executed, of the peak of its arithmetic */
    double pct_fma;    /* effective, of the f32 peak */
    double speedup, efficiency;
    double pct_predict, pct_quantize; /* of the dense time of the same precision */
    double baseline_pct_peak;
} figures;

/* Operations of a product over so many (query, key) pairs. */
static double operations(double tokens, int64_t channels)
{
    return 2.0 * tokens * (double)channels;
}

/* 12-bit codes have no peak of their own: instruction sets compute them in different ways. */
static double peak_of(const sparge_peaks *peaks, sparge_dtype precision)
{
    return precision == SPARGE_INT8 ? peaks->int8 : precision == SPARGE_F32 ? peaks->f32 : NAN;
}

static double pct_peak_of(const bench_group *g, const bench_case *c)
{
    const sparge_problem *p = &g->in->problem;
    const sparge_counts *n = &c->result.counts;
    const double at_peak =
        operations((double)n->tile_tokens, p->dim) / peak_of(&g->machine.peaks, c->qk) +
        operations(kept_pv_tiles(n), p->dim_v) / peak_of(&g->machine.peaks, c->pv);
    return 100.0 * at_peak / c->median.figure[BENCH_TOTAL];
}

static figures figures_of(const bench_group *g, const bench_case *c)
{
    const sparge_problem *p = &g->in->problem;
    const sparge_counts *n = &c->result.counts;
    const double *s = c->median.figure, *dense = g->cases[c->dense].median.figure;
    const double all = operations((double)n->tokens, p->dim + p->dim_v);
    const double done =
        operations((double)n->tile_tokens, p->dim) + operations(kept_pv_tiles(n), p->dim_v);
    const bool cuda = g->options.backend == SPARGE_CUDA; /* which has no baseline */
    const double baseline = cuda ? NAN : g->cases[0].median.figure[BENCH_TOTAL];
    return (figures){
        .seconds_total = s[BENCH_TOTAL],
        .seconds_predict = s[BENCH_PREDICT],
        .seconds_quantize = s[BENCH_QUANTIZE],
        .seconds_attend = s[BENCH_ATTEND],
        .tops = 1e-12 * all / s[BENCH_TOTAL],
        .tops_executed = 1e-12 * done / s[BENCH_TOTAL],
        .pct_peak = pct_peak_of(g, c),
        .pct_fma = 100.0 * all / s[BENCH_TOTAL] / g->machine.peaks.f32,
        .speedup = baseline / s[BENCH_TOTAL],
        /* 1 if time were proportional to what is left to do; of dense attention there is nothing to
           say. */
        .efficiency = c->kind == BENCH_DENSE || c->kind == BENCH_ONEDNN
                          ? NAN
                          : (1.0 - sparge_sparsity(n)) * dense[BENCH_ATTEND] / s[BENCH_ATTEND],
        .pct_predict = 100.0 * s[BENCH_PREDICT] / dense[BENCH_TOTAL],
        .pct_quantize = 100.0 * s[BENCH_QUANTIZE] / dense[BENCH_TOTAL],
        .baseline_pct_peak = cuda ? NAN : pct_peak_of(g, &g->cases[0]),
    };
}

/* ---- Words ---- */

void bench_case_name(const bench_group *g, const bench_case *c, char text[64])
{
    static const char *const where[] = {"", " causal", " causal=start"};
    char imposed[16] = "", kernel[24] = "";
    if (c->kernel)
        snprintf(kernel, sizeof kernel, "kernel %d ", c->kernel);
    if (c->kind == BENCH_RANDOM || c->kind == BENCH_BANDED)
        snprintf(imposed, sizeof imposed, " %.6g", c->imposed);
    snprintf(text, 64, "%s%s/%s %s%s%s%s", kernel, sparge_dtype_string(c->qk),
             sparge_dtype_string(c->pv), bench_mask_string(c->kind), imposed,
             where[g->options.causal], g->busy && g->args->allow_busy ? " (busy)" : "");
}

static const char *plural(int64_t n) { return n == 1 ? "" : "s"; }

/* ---- Tables ---- */

void bench_print_machine(void)
{
    char model[128] = "unknown processor", line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            snprintf(model, sizeof model, "%.*s", (int)strcspn(strchr(line, ':') + 2, "\n"),
                     strchr(line, ':') + 2);
            break;
        }
    if (file)
        fclose(file);
    const int cores = bench_cores();
    printf("%s, %d core%s, sparge %s, %s\n", model, cores, plural(cores), SPARGE_VERSION,
           program_compiler);
}

void bench_print_peaks(const bench_machine *m)
{
    printf("peaks of %s, %d thread%s: f32 %.1f GFLOP/s, int8 %.1f GOP/s, memory %.1f GB/s\n",
           sparge_isa_string(m->isa), m->threads, plural(m->threads), 1e-9 * m->peaks.f32,
           1e-9 * m->peaks.int8, 1e-9 * m->bytes);
}

/* A cell of a table: a number, or a dash where there is none. */
static void cell(int width, int decimals, double x)
{
    if (isfinite(x))
        printf(" %*.*f", width, decimals, x);
    else
        printf(" %*s", width, "-");
}

static void print_case(const bench_group *g, const bench_case *c)
{
    char name[64];
    bench_case_name(g, c, name);
    const figures f = figures_of(g, c);
    printf("%-30s", name);
    cell(6, 3, sparge_sparsity(&c->result.counts));
    if (c->wrong || !isfinite(f.seconds_total)) {
        printf("  %s\n", c->wrong ? "failed its check, not timed" : "busy machine, not timed");
        return;
    }
    cell(10, 2, 1e3 * f.seconds_total);
    cell(8, 4, f.tops);
    cell(8, 4, f.tops_executed);
    cell(6, 1, f.pct_peak);
    cell(6, 1, f.pct_fma);
    cell(7, 2, f.speedup);
    cell(6, 3, f.efficiency);
    cell(7, 2, f.pct_predict);
    cell(7, 2, f.pct_quantize);
    putchar('\n');
}

void bench_print_group(const bench_group *g)
{
    const sparge_problem *p = &g->in->problem;
    const figures base = figures_of(g, &g->cases[0]);
    const sparge_result *ran = &g->cases[0].result;
    printf("\nq_len %lld, k_len %lld, dim %lld, %lld head%s, %s", (long long)p->q_len,
           (long long)p->k_len, (long long)p->dim, (long long)(p->batch * p->heads),
           plural(p->batch * p->heads), sparge_backend_string(g->options.backend));
    if (g->options.backend == SPARGE_CUDA)
        puts(", the device's own times");
    else
        printf(" %s, %d thread%s; dense f32: ", sparge_isa_string(ran->isa), ran->threads,
               plural(ran->threads));
    if (g->options.backend == SPARGE_CPU && isfinite(base.seconds_total))
        printf("%.2f ms, %.1f %% of the FMA peak\n", 1e3 * base.seconds_total,
               base.baseline_pct_peak);
    else if (g->options.backend == SPARGE_CPU)
        puts("not timed");
    if (g->busy)
        printf("others used up to %.2f of a core meanwhile\n", g->foreign);
    printf("%-30s %6s %10s %8s %8s %6s %6s %7s %6s %7s %7s\n", "case", "sparse", "ms", "TOPS",
           "done", "%peak", "%FMA", "vs f32", "effic.", "%pred.", "%quant.");
    for (int n = 0; n < g->count; n++)
        if (g->cases[n].shown)
            print_case(g, &g->cases[n]);
}

/* ---- JSON ---- */

static json_t *json_case(const bench_group *g, const bench_case *c)
{
    const sparge_problem *p = &g->in->problem;
    const figures f = figures_of(g, c);
    char name[64];
    bench_case_name(g, c, name);
    return json_pack(
        "{s:s, s:s, s:s, s:o, s:s, s:s, s:s, s:i, s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:o, s:o, "
        "s:o, s:o, "
        "s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
        "case", name, "mask", bench_mask_string(c->kind), "backend",
        sparge_backend_string(g->options.backend), "kernel",
        c->kernel ? json_integer(c->kernel) : json_null(), "isa", sparge_isa_string(c->result.isa),
        "qk_isa", sparge_isa_string(c->result.qk_isa), "pv_isa",
        sparge_isa_string(c->result.pv_isa), "threads", c->result.threads, "q_len",
        (json_int_t)p->q_len, "k_len", (json_int_t)p->k_len, "dim", (json_int_t)p->dim, "heads",
        (json_int_t)p->heads, "block_q", (json_int_t)g->options.block_q, "block_k",
        (json_int_t)g->options.block_k, "causal", sparge_causal_string(g->options.causal),
        "softmax_scale",
        g->options.softmax_scale > 0.0f ? json_float(g->options.softmax_scale) : json_null(),
        "sparsity", json_number(sparge_sparsity(&c->result.counts)), "seconds_total",
        json_number(f.seconds_total), "seconds_predict", json_number(f.seconds_predict),
        "seconds_quantize", json_number(f.seconds_quantize), "seconds_attend",
        json_number(f.seconds_attend), "tops", json_number(f.tops), "tops_executed",
        json_number(f.tops_executed), "pct_peak", json_number(f.pct_peak), "speedup_vs_f32",
        json_number(f.speedup), "efficiency", json_number(f.efficiency), "baseline_pct_peak",
        json_number(f.baseline_pct_peak), "read_bytes_per_second",
        json_number(g->options.backend == SPARGE_CUDA ? NAN : g->machine.bytes));
}

void bench_json_group(const bench_group *g, json_t *rows)
{
    for (int n = 0; n < g->count; n++)
        if (g->cases[n].shown)
            json_array_append_new(rows, json_case(g, &g->cases[n]));
}
