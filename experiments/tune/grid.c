/* SPDX-License-Identifier: Apache-2.0 */
/* grid.c: what the tuner has to be compared with: the best of an exhaustive grid, and what the
 * authors' search finds, both by whole calls of attention. Takes half an hour of one core for a
 * head of 4096 tokens.
 *
 *     tune_grid q.bin k.bin v.bin TOKENS DIM CAUSAL SINK L1 L2
 *
 * The files are f32 [TOKENS][DIM] of one head. Prints one line of CSV for each of the two searches:
 * search,theta,tau,lambda,mask_sparsity,sparsity,l1,calls,dense_passes */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "sparge.h"

typedef struct grid {
    sparge_problem problem;
    sparge_options options;
    float *o, *want;
    int64_t n; /* of elements of o */
    double calls, dense_passes;
} grid;

typedef struct trial {
    sparge_thresholds thresholds;
    double l1, sparsity;
} trial;

static float *read_all(const char *path, int64_t n)
{
    float *x = malloc((size_t)n * sizeof *x);
    FILE *file = fopen(path, "rb");
    if (!x || !file || fread(x, sizeof *x, (size_t)n, file) != (size_t)n) {
        fprintf(stderr, "tune_grid: cannot read %lld floats from %s\n", (long long)n, path);
        exit(3);
    }
    fclose(file);
    return x;
}

static void require(sparge_status status, const sparge_error *error)
{
    if (!status)
        return;
    fprintf(stderr, "tune_grid: %s\n", error->text);
    exit(5);
}

/* Attention at these thresholds, its error and its sparsity. */
static trial try(grid *g, sparge_thresholds thresholds)
{
    sparge_error error;
    sparge_result result = {.o = {g->o, SPARGE_F32, 0, 0, g->problem.dim_v}};
    sparge_options o = g->options;
    o.thresholds = thresholds;
    require(sparge_attention(&g->problem, &o, &result, &error), &error);
    double wrong = 0.0, all = 0.0;
    for (int64_t n = 0; n < g->n; n++) {
        wrong += fabs((double)g->o[n] - (double)g->want[n]);
        all += fabs((double)g->want[n]);
    }
    const trial t = {thresholds, wrong / all, sparge_sparsity(&result.counts)};
    g->calls += 1.0;
    g->dense_passes += 1.0 - t.sparsity;
    return t;
}

static sparge_thresholds at(float theta, double tau, double log2_gap)
{
    return (sparge_thresholds){theta, (float)tau, SPARGE_OFF,
                               (float)(-log2_gap * 0.69314718055994530942), 0};
}

static float theta_of(int n) { return -1.0f + (float)n / 16.0f; }

/* All 32 x 1001 masks, then all 501 lambdas over the best of them. No similarity is below 0: the
 * thetas that are share their masks, and one of them is enough. */
static void exhaustive(grid *g, double l1, double l2, trial *mask, trial *best)
{
    *mask = try(g, at(-1.0f, 1.0, (double)INFINITY));
    for (int theta = 15; theta < 32; theta++)
        for (int tau = 0; tau <= 1000; tau++) {
            const trial t = try(g, at(theta_of(theta), tau / 1000.0, (double)INFINITY));
            if (t.l1 < l1 && (t.sparsity > mask->sparsity || !(mask->l1 < l1)))
                *mask = t;
        }
    *best = *mask;
    for (int step = 0; step <= 500; step++) {
        const trial t =
            try(g, at(mask->thresholds.theta, (double)mask->thresholds.tau, step / 10.0));
        if (t.l1 < l2 && t.sparsity > best->sparsity)
            *best = t;
    }
}

/* For every theta: tau by bisection, then lambda by bisection; the thetas end where sparsity falls
 * below 0.1. */
static void authors(grid *g, double l1, double l2, trial *mask, trial *best)
{
    *mask = *best = try(g, at(-1.0f, 1.0, (double)INFINITY));
    for (int theta = 0; theta < 32; theta++) {
        double low = 0.0, high = 1.0;
        trial kept = *mask, chosen;
        bool found = false;
        while (high - low > 0.001) {
            const double tau = (low + high) / 2.0;
            const trial t = try(g, at(theta_of(theta), tau, (double)INFINITY));
            if (t.l1 < l1) {
                high = tau;
                kept = t;
                found = true;
            } else
                low = tau;
        }
        if (!found)
            kept = try(g, at(theta_of(theta), 1.0, (double)INFINITY));
        if (kept.sparsity < 0.1)
            break;
        chosen = kept;
        for (double least = 0.0, most = 50.0; most - least > 0.1;) {
            const double gap = (least + most) / 2.0;
            const trial t = try(g, at(theta_of(theta), (double)kept.thresholds.tau, gap));
            if (t.l1 < l2) {
                most = gap;
                chosen = t;
            } else
                least = gap;
        }
        if (chosen.sparsity > best->sparsity) {
            *best = chosen;
            *mask = kept;
        }
    }
}

int main(int argc, char **argv)
{
    if (argc != 10) {
        fprintf(stderr, "usage: tune_grid q.bin k.bin v.bin TOKENS DIM CAUSAL SINK L1 L2\n");
        return 2;
    }
    const int64_t tokens = atoll(argv[4]), dim = atoll(argv[5]), n = tokens * dim;
    const double l1 = atof(argv[8]), l2 = atof(argv[9]);
    const float *q = read_all(argv[1], n), *k = read_all(argv[2], n), *v = read_all(argv[3], n);
    grid g = {
        .problem = {1,
                    1,
                    1,
                    tokens,
                    tokens,
                    dim,
                    dim,
                    {q, SPARGE_F32, 0, 0, dim},
                    {k, SPARGE_F32, 0, 0, dim},
                    {v, SPARGE_F32, 0, 0, dim}},
        .options = sparge_options_default(SPARGE_RULES_DEFAULT),
        .o = read_all(argv[1], n),
        .want = read_all(argv[1], n),
        .n = n,
    };
    g.options.causal = atoi(argv[6]) ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
    g.options.sink = atoi(argv[7]);
    g.options.threads = 1;

    sparge_options dense = g.options;
    sparge_error error;
    sparge_result result = {.o = {g.want, SPARGE_F32, 0, 0, dim}};
    dense.qk_dtype = dense.pv_dtype = SPARGE_F32;
    require(sparge_attend(&g.problem, &dense, NULL, &result, &error), &error);

    static const struct {
        const char *name;
        void (*search)(grid *, double, double, trial *, trial *);
    } searches[] = {{"authors", authors}, {"exhaustive", exhaustive}};
    for (int s = 0; s < 2; s++) {
        trial mask, best;
        g.calls = g.dense_passes = 0.0;
        searches[s].search(&g, l1, l2, &mask, &best);
        printf("%s,%.9g,%.9g,%.9g,%.6f,%.6f,%.6f,%.0f,%.1f\n", searches[s].name,
               (double)best.thresholds.theta, (double)best.thresholds.tau,
               (double)best.thresholds.lambda, mask.sparsity, best.sparsity, best.l1, g.calls,
               g.dense_passes);
        fflush(stdout);
    }
    return 0;
}
