/* bench.c: sparge bench: how fast attention is here, as a share of what the machine can do. */
#include "tools/bench.h"

#include <math.h>
#include <stdio.h>

#include "tools/places.h"

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
    options.thresholds = b->args.thresholds;
    options.sink = b->args.sink;
    options.progress = progress_goes_on;
    return options;
}

/* Attention of one token to itself says what will run; the peaks say how fast it could at most. */
static exit_code measure_machine(bench *b, int isa, int thread, file_error *error)
{
    const sparge_options options = machine_options(b, isa, thread);
    const float one = 1.0f;
    float o;
    const sparge_in in = {&one, SPARGE_F32, 1, 1, 1};
    const sparge_problem p = {1, 1, 1, 1, 1, 1, 1, in, in, in};
    sparge_result ran = {.o = {&o, SPARGE_F32, 1, 1, 1}};
    sparge_error why;
    bench_machine *m = &b->machine[isa * BENCH_LIST + thread];
    sparge_status status = sparge_attend(&p, &options, NULL, &ran, &why);
    *m = (bench_machine){.isa = ran.isa, .threads = options.threads};
    if (!status)
        status = sparge_measure_peaks(options.isa, options.threads, &m->peaks, &why);
    if (!status)
        status = sparge_measure_bandwidth(options.isa, options.threads, &m->bytes, &why);
    return library_result(status, &why, error);
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

static exit_code run_group(bench *b, bench_group *g, file_error *error)
{
    char why[256];
    exit_code code = bench_group_make(g, error);
    const double from = (double)b->done / b->groups, to = (double)(b->done + 1) / b->groups;
    const double checked =
        from + (to - from) / (double)(b->args.repeat + 1); /* a check is about a round */
    for (int n = 0; n < g->count && !code; n++) {
        code = bench_check(g, &g->cases[n], why, error);
        if (!code && g->cases[n].wrong)
            note_failure(b, why);
        progress_tick(&b->watch, from + (checked - from) * (n + 1) / g->count);
    }
    if (!code)
        code = bench_time(g, &b->watch, checked, to, error);
    if (!code && g->busy && !b->args.allow_busy) {
        if (isnan(g->foreign))
            snprintf(why, sizeof why,
                     "/proc/stat cannot be read, which says whether others use the "
                     "machine; give --threads 1 or --allow-busy");
        else
            snprintf(why, sizeof why,
                     "other processes used up to %.2f of a core while %d threads were "
                     "timed; wait until they end, or give --threads 1 or --allow-busy",
                     g->foreign, g->options.threads);
        note_failure(b, why);
    }
    progress_hide(&b->watch);
    if (!code && !b->args.json) {
        if (b->done == 0)
            print_machine(b);
        bench_print_group(g);
        code = flush_stdout(error);
    } else if (!code && !bench_json_group(g, b->rows)) {
        file_error_set(error, NULL, "no memory for the result");
        code = EXIT_MACHINE;
    }
    b->done++;
    return code;
}

static exit_code run_inputs(bench *b, const inputs *in, file_error *error)
{
    const bench_args *a = &b->args;
    exit_code code = EXIT_FINE;
    for (int c = 0; c < a->causal.count; c++)
        for (int i = 0; i < a->isa.count; i++)
            for (int t = 0; t < a->threads.count && !code; t++) {
                bench_group g = {.args = a,
                                 .in = in,
                                 .problem = in->problem,
                                 .options = machine_options(b, i, t)};
                g.machine = b->machine[i * BENCH_LIST + t];
                g.options.causal = (sparge_causal)a->causal.item[c];
                if (a->capture)
                    code = capture_obey(b->given.list, &in->problem,
                                        a->causal_given ? option_bit(OPT_CAUSAL) : 0, &g.options,
                                        error);
                code = code ? code : run_group(b, &g, error);
                bench_group_free(&g);
            }
    return code;
}

static exit_code run_shapes(bench *b, file_error *error)
{
    const bench_args *a = &b->args;
    exit_code code = EXIT_FINE;
    for (int h = 0; h < a->heads.count; h++)
        for (int n = 0; n < a->q_len.count; n++)
            for (int d = 0; d < a->dim.count && !code; d++) {
                inputs in = {0};
                code = (a->backend == SPARGE_CUDA ? bench_synthetic_f16 : bench_synthetic)(
                    (int64_t)a->heads.item[h], (int64_t)a->q_len.item[n], (int64_t)a->dim.item[d],
                    &in, error);
                if (!code)
                    code = run_inputs(b, &in, error);
                inputs_free(&in);
            }
    return code;
}

static exit_code run_all(bench *b, const inputs *captured, file_error *error)
{
    const bench_args *a = &b->args;
    exit_code code = EXIT_FINE;
    for (int i = 0; i < a->isa.count && a->backend == SPARGE_CPU; i++)
        for (int t = 0; t < a->threads.count && !code; t++)
            code = measure_machine(b, i, t, error);
    if (code)
        return code;
    b->groups = a->causal.count * a->isa.count * a->threads.count;
    b->groups *= a->capture ? 1 : a->heads.count * a->q_len.count * a->dim.count;
    b->watch = progress_begin("bench");
    return a->capture ? run_inputs(b, captured, error) : run_shapes(b, error);
}

exit_code bench_command(int argc, char **argv, file_error *error)
{
    bench b = {.args = {.base = {error}}};
    inputs captured = {0};
    exit_code code = bench_parse(argc, argv, &b.args);
    if (!code && b.args.capture) {
        const attention_args file = {.file = {b.args.capture},
                                     .ignore_manifest = b.args.ignore_manifest};
        code = given_file(&file, &b.given, error);
    }
    if (!code && b.args.capture)
        code = bench_capture(b.args.capture, &captured, error);
    if (!code && b.args.json && !(b.rows = json_array())) {
        file_error_set(error, NULL, "no memory for the result");
        code = EXIT_MACHINE;
    }
    if (!code)
        code = run_all(&b, &captured, error);
    progress_end(&b.watch);
    inputs_free(&captured);
    given_free(&b.given);
    if (!code && b.args.json)
        code = print_json(b.rows, error);
    else
        json_decref(b.rows);
    if (code || b.failed == 0)
        return code;
    if (b.failed == 1)
        file_error_set(error, NULL, "%s", b.why);
    else
        file_error_set(error, NULL, "%s; and %d more such failures", b.why, b.failed - 1);
    return EXIT_DIFFERENT;
}
