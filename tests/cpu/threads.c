/* SPDX-License-Identifier: Apache-2.0 */
/* threads.c: the cpu backend and the tuner under the thread sanitizer, whose runtime Criterion does
 * not start under. With
 * --race it plants a race of its own, to see that one would be seen. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparge_tune.h"

enum { BATCH = 1, HEADS = 4, KV_HEADS = 2, TOKENS = 700, DIM = 32 };

static float value(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(int32_t)*state * 0x1p-31f;
}

static float *values(int64_t heads, uint32_t seed)
{
    float *x = malloc((size_t)(heads * TOKENS * DIM) * sizeof *x);
    for (int64_t n = 0; x && n < heads * TOKENS * DIM; n++)
        x[n] = value(&seed) + (float)(n / DIM / 64 % 3);
    return x;
}

/* The same bits on four threads as on one, and no report. */
static int compare(const sparge_problem *p, const sparge_options *options, float *o[2])
{
    for (int n = 0; n < 2; n++) {
        sparge_options now = *options;
        sparge_result result = {.o = {o[n], SPARGE_F32, HEADS * TOKENS * DIM, TOKENS * DIM, DIM}};
        sparge_error error;
        now.threads = n ? 4 : 1;
        if (sparge_attention(p, &now, &result, &error)) {
            fprintf(stderr, "%s\n", error.text);
            return 1;
        }
    }
    if (memcmp(o[0], o[1], HEADS * TOKENS * DIM * sizeof **o) == 0)
        return 0;
    fprintf(stderr, "four threads gave other bits than one\n");
    return 1;
}

static bool tick(void *user, double done)
{
    *(double *)user = done;
    return true;
}

static void count(void *user, int64_t head) { *(double *)user += (double)head; }

/* The same heads on four threads as on one, and no report; callbacks write to one place. */
static int tune(const sparge_problem *whole)
{
    sparge_problem p = *whole;
    sparge_tuned heads[2][HEADS];
    memset(heads, 0, sizeof heads);
    p.q_len = p.k_len = 200;
    for (int n = 0; n < 2; n++) {
        sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
        double user = 0.0;
        const sparge_tune_options how = {
            .l1 = 0.1, .l2 = 0.2, .progress = tick, .finished = count, .user = &user};
        sparge_error error;
        options.backend = SPARGE_CPU;
        options.threads = n ? 4 : 1;
        options.causal = SPARGE_CAUSAL_END;
        if (sparge_tune(&p, 1, &options, &how, heads[n], &error)) {
            fprintf(stderr, "%s\n", error.text);
            return 1;
        }
    }
    for (int h = 0; h < HEADS; h++)
        if (!heads[1][h].done || memcmp(&heads[0][h].thresholds, &heads[1][h].thresholds,
                                        sizeof heads[0][h].thresholds) != 0) {
            fprintf(stderr, "four threads tuned head %d to something else than one\n", h);
            return 1;
        }
    return 0;
}

static int plant_race(void)
{
    int shared = 0;
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < 256; i++) {
        for (volatile int work = 0; work < 20000; work++)
            ;
        shared += i;
    }
    return shared < 0;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--race") == 0)
        return plant_race();
    float *q = values(HEADS, 1), *k = values(KV_HEADS, 2), *v = values(KV_HEADS, 3);
    float *o[2] = {values(HEADS, 4), values(HEADS, 5)};
    int failed = !(q && k && v && o[0] && o[1]);
    const sparge_problem p = {
        .batch = BATCH,
        .heads = HEADS,
        .kv_heads = KV_HEADS,
        .q_len = TOKENS,
        .k_len = TOKENS,
        .dim = DIM,
        .dim_v = DIM,
        .q = {q, SPARGE_F32, HEADS * TOKENS * DIM, TOKENS * DIM, DIM},
        .k = {k, SPARGE_F32, KV_HEADS * TOKENS * DIM, TOKENS * DIM, DIM},
        .v = {v, SPARGE_F32, KV_HEADS * TOKENS * DIM, TOKENS * DIM, DIM},
    };
    for (int n = 0; n < 3 && !failed; n++)
        for (int causal = 0; causal < 2 && !failed; causal++) {
            sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
            options.backend = SPARGE_CPU;
            options.qk_dtype = options.pv_dtype =
                (const sparge_dtype[]){SPARGE_INT8, SPARGE_INT12, SPARGE_F32}[n];
            options.causal = causal ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
            options.thresholds.tau = 0.7f;
            options.thresholds.lambda = -2.0f;
            failed = compare(&p, &options, o);
        }
    failed = failed || tune(&p);
    free(q);
    free(k);
    free(v);
    free(o[0]);
    free(o[1]);
    return failed;
}
