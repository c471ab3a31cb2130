/* SPDX-License-Identifier: Apache-2.0 */
/* peaks.c: what this machine can do at most, measured: the ceilings that speeds are divided by.
 * Medians, as benchmarks use medians: on a shared machine the best moment of a ceiling would make
 * kernels look slow. */
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/clock.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"

enum { TRIALS = 7, BUFFER = 64 << 20 /* floats: far more than a cache holds */ };

static const double trial_seconds = 0.01;

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double rate[TRIALS])
{
    qsort(rate, TRIALS, sizeof *rate, by_size);
    return rate[TRIALS / 2];
}

/* Operations a second on all threads together. */
static double operation_rate(const sparge_kernels *k, int64_t (*peak)(int64_t rounds), int threads)
{
    int64_t rounds = 1000;
    double rate[TRIALS];
    (void)threads;
    for (int trial = 0; trial < TRIALS;) {
        int64_t operations = 0;
        const double start = sparge_seconds();
#pragma omp parallel num_threads(threads) reduction(+ : operations)
        {
            if (k->begin)
                k->begin();
            operations += peak(rounds);
            if (k->end)
                k->end();
        }
        const double seconds = sparge_seconds() - start;
        if (seconds < trial_seconds && rounds < INT64_C(1) << 40) {
            rounds *= 2;
            continue;
        }
        rate[trial++] = (double)operations / seconds;
    }
    return median(rate);
}

static double read_rate(float (*read)(const float *x, int64_t n), const float *x, int threads)
{
    double rate[TRIALS];
    float sum = 0.0f;
    (void)threads;
    for (int trial = 0; trial < TRIALS; trial++) {
        const double start = sparge_seconds();
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
        for (int64_t part = 0; part < 64; part++)
            sum += read(x + part * (BUFFER / 64), BUFFER / 64);
        const double seconds = sparge_seconds() - start;
        rate[trial] = (double)BUFFER * sizeof *x / seconds;
    }
    return sum >= 0.0f ? median(rate) : 0.0; /* which the compiler cannot know */
}

sparge_peaks sparge_cpu_peaks(sparge_isa isa, int threads)
{
    const sparge_kernels k = sparge_cpu_kernels(isa);
    return (sparge_peaks){operation_rate(&k, k.peak_floats, threads),
                          operation_rate(&k, k.peak_bytes, threads)};
}

sparge_status sparge_cpu_bandwidth(sparge_isa isa, int threads, double *bytes)
{
    float *x = malloc(BUFFER * sizeof *x);
    if (!x)
        return SPARGE_ERR_MEMORY;
    for (int64_t n = 0; n < BUFFER; n++)
        x[n] = 1.0f;
    *bytes = read_rate(sparge_cpu_kernels(isa).peak_read, x, threads);
    free(x);
    return SPARGE_OK;
}
