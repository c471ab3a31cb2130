/* SPDX-License-Identifier: Apache-2.0 */
/* bench_time.c: takes the time of the cases of a group in turns, while nobody else uses the
 * machine. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "tools/bench.h"

/* A round of several threads lasts this long at least, in as many passes as it takes: the kernel
 * counts in hundredths of a second, and a twentieth of a core has to be several of them. */
static const double round_seconds = 1.0;
static const double foreign_cores = 0.05; /* of other processes, beside which no time is taken */
enum { ROUNDS_FOR_ONE = 3 };              /* rounds that are tried for each that has to count */

/* ---- Who uses the processors ---- */

typedef struct load {
    double all, own, wall; /* seconds of all cores, of this process, of the clock */
} load;

/* all is NaN where the kernel does not say. Steal is what other guests of the host took. */
static load load_now(void)
{
    load now = {.all = NAN};
    FILE *file = fopen("/proc/stat", "r");
    if (file) {
        unsigned long long user, nice, system, idle, wait, irq, softirq, steal;
        if (fscanf(file, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system,
                   &idle, &wait, &irq, &softirq, &steal) == 8)
            now.all = (double)(user + nice + system + irq + softirq + steal) /
                      (double)sysconf(_SC_CLK_TCK);
        fclose(file);
    }
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    now.own = (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) +
              1e-6 * (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec);
    now.wall = progress_clock();
    return now;
}

/* Cores that others used since then. */
static double foreign_since(const load *then)
{
    const load now = load_now();
    const double cores = (now.all - then->all - (now.own - then->own)) / (now.wall - then->wall);
    return cores < 0.0 ? 0.0 : cores; /* NaN stays */
}

/* ---- Passes and rounds ---- */

static void keep_pass(bench_case *c, const bench_times *times)
{
    if (c->passes == c->capacity) {
        const int capacity = c->capacity ? 2 * c->capacity : 16;
        bench_times *more = realloc(c->pass, (size_t)capacity * sizeof *more);
        if (!more)
            fail(EXIT_MACHINE, NULL, "no memory for the times of %d passes", capacity);
        c->pass = more;
        c->capacity = capacity;
    }
    c->pass[c->passes++] = *times;
}

/* The peaks, and one call of each case. */
static void pass(bench_group *g)
{
    sparge_peaks peaks = {.f32 = NAN, .int8 = NAN}; /* of cuda: what gpu/ceilings measures */
    if (g->options.backend == SPARGE_CPU)
        must_sparge(
            sparge_measure_peaks(g->machine.isa, g->machine.threads, &peaks, &library_error));
    const int first = g->cases[0].passes; /* another case in each pass: what follows a long one may
                                             find a slower clock */
    for (int turn = 0; turn < g->count; turn++) {
        bench_case *c = &g->cases[(first + turn) % g->count];
        if (c->wrong)
            continue;
        bench_times times;
        bench_run(g, c, &times);
        times.figure[BENCH_PEAK_F32] = peaks.f32;
        times.figure[BENCH_PEAK_INT8] = peaks.int8;
        keep_pass(c, &times);
    }
}

static void drop_round(bench_group *g)
{
    for (int n = 0; n < g->count; n++)
        g->cases[n].passes = g->cases[n].kept;
}

static void keep_round(bench_group *g)
{
    for (int n = 0; n < g->count; n++)
        g->cases[n].kept = g->cases[n].passes;
}

/* What others used meanwhile. */
static double round_of_passes(bench_group *g)
{
    const load before = load_now();
    do
        pass(g);
    while (g->options.threads > 1 && progress_clock() - before.wall < round_seconds);
    return foreign_since(&before);
}

/* ---- Medians ---- */

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_of(double *x, int n)
{
    if (n == 0)
        return NAN;
    qsort(x, (size_t)n, sizeof *x, by_size);
    return (x[(n - 1) / 2] + x[n / 2]) / 2.0;
}

static void medians(bench_case *c)
{
    double *x = must_alloc((size_t)c->kept, sizeof *x, "the times of the passes");
    for (int figure = 0; figure < BENCH_FIGURES; figure++) {
        for (int n = 0; n < c->kept; n++)
            x[n] = c->pass[n].figure[figure];
        c->median.figure[figure] = median_of(x, c->kept);
    }
    free(x);
}

void bench_time(bench_group *g, progress *watch, double from, double to)
{
    const bool judged = g->options.threads > 1;
    const int64_t rounds = g->args->repeat, most = ROUNDS_FOR_ONE * rounds;
    int64_t counted = 0, discarded = 0;
    while (counted < rounds && discarded < most) {
        const double foreign = round_of_passes(g);
        const bool busy = judged && !(foreign <= foreign_cores); /* also where it is unknown */
        g->foreign = busy && !(foreign <= g->foreign) ? foreign : g->foreign;
        if (busy && !g->args->allow_busy) {
            drop_round(g);
            discarded++;
        } else {
            g->busy |= busy;
            keep_round(g);
            counted++;
        }
        if (!progress_tick(watch, from + (to - from) * (double)counted / (double)rounds))
            must_sparge(SPARGE_ERR_CANCELLED);
    }
    g->busy |= counted < rounds;
    for (int n = 0; n < g->count; n++) {
        g->cases[n].kept = counted < rounds ? 0 : g->cases[n].kept;
        medians(&g->cases[n]);
    }
    g->machine.peaks.f32 = g->cases[0].median.figure[BENCH_PEAK_F32];
    g->machine.peaks.int8 = g->cases[0].median.figure[BENCH_PEAK_INT8];
}
