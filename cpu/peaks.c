/* peaks.c: what this machine can do at most, measured: the ceilings that speeds are divided by. */
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "ref/ref.h"

enum { TRIALS = 9, BUFFER = 64 << 20 /* floats: far more than a cache holds */ };

static const double trial_seconds = 0.02;

/* Operations a second on all threads together: the best of a few trials, as a ceiling should be. */
static double best_rate(int64_t (*peak)(int64_t rounds), int threads)
{
    int64_t rounds = 1000;
    double best = 0.0;
    (void)threads;
    for (int trial = 0; trial < TRIALS;) {
        int64_t operations = 0;
        const double start = sparge_ref_seconds();
#pragma omp parallel num_threads(threads) reduction(+ : operations)
        operations += peak(rounds);
        const double seconds = sparge_ref_seconds() - start;
        if (seconds < trial_seconds) {
            rounds *= 2;
            continue;
        }
        best = fmax(best, (double)operations / seconds);
        trial++;
    }
    return best;
}

static double read_rate(float (*read)(const float *x, int64_t n), const float *x, int threads)
{
    double best = 0.0;
    float sum = 0.0f;
    (void)threads;
    for (int trial = 0; trial < TRIALS; trial++) {
        const double start = sparge_ref_seconds();
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
        for (int64_t part = 0; part < 64; part++)
            sum += read(x + part * (BUFFER / 64), BUFFER / 64);
        const double seconds = sparge_ref_seconds() - start;
        best = fmax(best, (double)BUFFER * sizeof *x / seconds);
    }
    return sum >= 0.0f ? best : 0.0;
}

sparge_status sparge_cpu_peaks(sparge_isa isa, int threads, sparge_peaks *peaks)
{
    const sparge_kernels k = sparge_cpu_kernels(isa);
    float *x = malloc(BUFFER * sizeof *x);
    if (!x)
        return SPARGE_ERR_MEMORY;
    for (int64_t n = 0; n < BUFFER; n++)
        x[n] = 1.0f;
    *peaks = (sparge_peaks){ best_rate(k.peak_floats, threads), best_rate(k.peak_bytes, threads),
                             read_rate(k.peak_read, x, threads) };
    free(x);
    return SPARGE_OK;
}
