/* SPDX-License-Identifier: Apache-2.0 */
/* bench.c: sparge bench: how fast attention is here, as a share of what the machine can do. */
#include "tools/bench.h"

#include <math.h>
#include <stdio.h>

#include "tools/places.h"
#include "tools/settle.h"

enum { MACHINES = BENCH_LIST * BENCH_LIST };

typedef struct bench {
    bench_args args;
    given_captures given;            /* one, or none: synthetic */
    bench_machine machine[MACHINES]; /* [isa][threads] */
    json_t *rows;
    progress watch;
    int groups, done;
    int failed;    /* results that are wrong, groups that others disturbed */
    char why[256]; /* of the first of them */
} bench;

static sparge_options machine_options(const bench *b, int isa, int thread)
{
    sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
    options.backend = b->args.backend;
    options.isa = (sparge_isa)b->args.isa.item[isa];
    options.threads = (int)b->args.threads.item[thread];
    options.thresholds = b->args.attention.options.thresholds;
    options.cell = b->args.attention.options.cell;
    options.block_q = b->args.attention.options.block_q;
    options.block_k = b->args.attention.options.block_k;
    options.sink = b->args.attention.options.sink;
    options.progress = progress_goes_on;
    return options;
}

/* Attention of one token to itself says what will run; the peaks say how fast it could at most. */
static void measure_machine(bench *b, int isa, int thread)
{
    const sparge_options options = machine_options(b, isa, thread);
    const float one = 1.0f;
    float o;
    const sparge_in in = {&one, SPARGE_F32, 1, 1, 1};
    const sparge_problem p = {.batch = 1,
                              .heads = 1,
                              .kv_heads = 1,
                              .q_len = 1,
                              .k_len = 1,
                              .dim = 1,
                              .dim_v = 1,
                              .q = in,
                              .k = in,
                              .v = in};
    sparge_result ran = {.o = {&o, SPARGE_F32, 1, 1, 1}};
    bench_machine *m = &b->machine[isa * BENCH_LIST + thread];
    must_sparge(sparge_attend(&p, &options, NULL, &ran, &library_error));
    *m = (bench_machine){.isa = ran.isa, .threads = options.threads};
    must_sparge(sparge_measure_peaks(options.isa, options.threads, &m->peaks, &library_error));
    must_sparge(sparge_measure_bandwidth(options.isa, options.threads, &m->bytes, &library_error));
}

/* The first reason is the one that is told. */
static void note_failure(bench *b, const char *why)
{
    if (b->failed++ == 0)
        snprintf(b->why, sizeof b->why, "%s", why);
}

/* Once there is something to say of it. */
static void print_machine(const bench *b)
{
    const bench_args *a = &b->args;
    bench_print_machine();
    if (a->backend == SPARGE_CUDA)
        return;
    for (int i = 0; i < a->isa.count; i++)
        for (int t = 0; t < a->threads.count; t++)
            bench_print_peaks(&b->machine[i * BENCH_LIST + t]);
}

static void run_group(bench *b, bench_group *g)
{
    char why[256];
    const double from = (double)b->done / b->groups, to = (double)(b->done + 1) / b->groups;
    const double checked =
        from + (to - from) / (double)(b->args.repeat + 1); /* a check is about a round */
    bench_group_make(g);
    for (int n = 0; n < g->count; n++) {
        bench_check(g, &g->cases[n], why);
        if (g->cases[n].wrong)
            note_failure(b, why);
        progress_tick(&b->watch, from + (checked - from) * (n + 1) / g->count);
    }
    bench_time(g, &b->watch, checked, to);
    if (g->busy && !b->args.allow_busy) {
        if (isnan(g->foreign))
            snprintf(why, sizeof why,
                     "/proc/stat cannot be read, which says whether others use the machine; give "
                     "--threads 1 or --allow-busy");
        else
            snprintf(why, sizeof why,
                     "other processes used up to %.2f of a core while %d threads were timed; wait "
                     "until they end, or give --threads 1 or --allow-busy",
                     g->foreign, g->options.threads);
        note_failure(b, why);
    }
    progress_hide(&b->watch);
    if (b->args.json)
        bench_json_group(g, b->rows);
    else {
        if (b->done == 0)
            print_machine(b);
        bench_print_group(g);
        must(flush_stdout(&failure));
    }
    b->done++;
}

static void run_inputs(bench *b, const inputs *in)
{
    const bench_args *a = &b->args;
    for (int c = 0; c < a->causal.count; c++)
        for (int i = 0; i < a->isa.count; i++)
            for (int t = 0; t < a->threads.count; t++) {
                static bench_group g;
                g = (bench_group){.args = a,
                                  .in = in,
                                  .problem = in->problem,
                                  .options = machine_options(b, i, t),
                                  .machine = b->machine[i * BENCH_LIST + t]};
                g.options.causal = (sparge_causal)a->causal.item[c];
                settled tuned = {0};
                if (a->capture)
                    settle(&a->attention, b->given.list, &in->problem, &g.options, &tuned);
                run_group(b, &g);
                bench_group_free(&g);
                settled_free(&tuned);
            }
}

static void run_shapes(bench *b)
{
    static inputs in;
    const bench_args *a = &b->args;
    for (int h = 0; h < a->heads.count; h++)
        for (int n = 0; n < a->q_len.count; n++)
            for (int d = 0; d < a->dim.count; d++) {
                (a->backend == SPARGE_CUDA ? bench_synthetic_f16 : bench_synthetic)(
                    (int64_t)a->heads.item[h], (int64_t)a->q_len.item[n], (int64_t)a->dim.item[d],
                    &in);
                run_inputs(b, &in);
                inputs_free(&in);
            }
}

static void run_capture(bench *b)
{
    static inputs in;
    bench_capture(b->args.capture, &in);
    run_inputs(b, &in);
    inputs_free(&in);
}

exit_code bench_command(int argc, char **argv, file_error *error)
{
    static bench b;
    bench_args *a = &b.args;
    a->base.error = error;
    bench_parse(argc, argv, a);
    if (a->capture) {
        const attention_args file = {.file = {a->capture},
                                     .ignore_manifest = a->attention.ignore_manifest};
        given_file(&file, &b.given);
    }
    b.rows = json_array();
    for (int i = 0; i < a->isa.count && a->backend == SPARGE_CPU; i++)
        for (int t = 0; t < a->threads.count; t++)
            measure_machine(&b, i, t);
    b.groups = a->causal.count * a->isa.count * a->threads.count;
    b.groups *= a->capture ? 1 : a->heads.count * a->q_len.count * a->dim.count;
    b.watch = progress_begin("bench");
    (a->capture ? run_capture : run_shapes)(&b);
    progress_end(&b.watch);
    given_free(&b.given);
    if (a->json)
        must(print_json(b.rows, error));
    else
        json_decref(b.rows);
    if (b.failed == 0)
        return EXIT_FINE;
    if (b.failed == 1)
        fail(EXIT_DIFFERENT, NULL, "%s", b.why);
    fail(EXIT_DIFFERENT, NULL, "%s; and %d more such failures", b.why, b.failed - 1);
}
