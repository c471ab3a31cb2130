/* SPDX-License-Identifier: Apache-2.0 */
/* stages.c: what a score costs: each kernel of a tile alone, on 64 keys in L1, the best of many
 * runs, in multiply-adds of float32 that the processor could have done instead. No test: a ruler
 * for cpu/README.md.
 *
 *     cpu_stages --isa avx2|avxvnni|avx512vnni|amx [--dim D] [--qk int8|f32|bf16] */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/clock.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"

enum { KEYS = 64, RUNS = 2000, STRIDE = (KEYS + 1) * SPARGE_PANEL };

/* One tile; every array is as large as any format needs. */
typedef struct stages {
    sparge_kernels k;
    sparge_format qk, pv;
    int64_t lanes;
    sparge_product scores, products;
    sparge_scores s;
    sparge_softmax_rows rows;
    sparge_accumulator to;
    float *most, *local, *sum;
    int32_t *init;
} stages;

static void score(stages *x) { x->k.score[x->qk](&x->scores, (float *)(uintptr_t)x->s.s, STRIDE); }
static void maxima(stages *x) { x->k.maxima(&x->s, x->most, x->local); }
static void update_max(stages *x)
{
    x->to.still = x->k.update_max(&x->rows, x->lanes, x->pv == SPARGE_BYTES ? 127 : 0);
}
static void softmax(stages *x)
{
    x->k.softmax[x->pv](&x->s, x->most, (void *)(uintptr_t)x->products.b, STRIDE, x->sum, x->init);
}
static void accumulate_pv(stages *x) { x->k.accumulate_pv[x->pv](&x->products, &x->to); }
static void peak(stages *x) { x->k.peak_floats(200); }

/* Seconds of the best run; `before` is not timed. */
static double best(stages *x, void (*before)(stages *), void (*run)(stages *))
{
    double least = INFINITY;
    for (int n = 0; n < RUNS; n++) {
        before(x);
        const double start = sparge_seconds();
        for (int m = 0; m < 8; m++)
            run(x);
        least = fmin(least, (sparge_seconds() - start) / 8);
    }
    return least;
}

static void *take(int64_t bytes)
{
    char *memory = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    if (!memory)
        abort();
    for (int64_t n = 0; n < bytes; n++)
        memory[n] = (char)(rand() % 128);
    return memory;
}

static float *take_floats(int64_t n, float scale)
{
    float *x = take(n * (int64_t)sizeof *x);
    for (int64_t e = 0; e < n; e++)
        x[e] = scale * (float)(rand() % 2001 - 1000) / 1000.0f;
    return x;
}

/* Random operands: bytes below 128 are codes in int8, small positive numbers in bf16. */
static void *take_operand(sparge_format f, int64_t n)
{
    return f == SPARGE_FLOATS ? (void *)take_floats(n, 1.0f) : take(2 * n);
}

int main(int count, char **word)
{
    static const char *const name[] = {"score", "maxima", "update_max", "softmax", "accumulate_pv"};
    stages x = {.qk = SPARGE_BYTES};
    sparge_isa isa = SPARGE_ISA_AUTO;
    int64_t dim = 128;
    for (int n = 1; n + 1 < count; n += 2) {
        if (!strcmp(word[n], "--dim"))
            dim = sparge_padded(atoi(word[n + 1]));
        else if (!strcmp(word[n], "--qk"))
            x.qk = *word[n + 1] == 'f'   ? SPARGE_FLOATS
                   : *word[n + 1] == 'b' ? SPARGE_PAIRS
                                         : SPARGE_BYTES;
        else
            for (isa = SPARGE_ISA_AUTO;
                 isa < SPARGE_ISAS && strcmp(word[n + 1], sparge_isa_string(isa));)
                isa++;
    }
    if (isa == SPARGE_ISA_AUTO || isa >= SPARGE_ISAS || dim < 1 || dim > SPARGE_MAX_DIM ||
        !sparge_cpu_has(isa) || (x.qk == SPARGE_PAIRS && !sparge_cpu_has_bf16(isa))) {
        fprintf(stderr, "cpu_stages --isa NAME [--dim D] [--qk int8|f32|bf16]\n");
        return 2;
    }
    x.k = sparge_cpu_kernels(isa);
    x.pv = x.qk;
    x.lanes = x.k.group[x.qk];
    if (x.qk == SPARGE_BYTES)
        x.qk = x.k.int8_scores;
    const int64_t panels = x.lanes / SPARGE_PANEL, depth = x.k.depth[x.qk];
    const int64_t channels = sparge_ceil_div(dim, depth) * depth;
    float *s = take_floats(panels * STRIDE, 1.0f), *one = take_floats(x.lanes, 0.0f);
    for (int64_t q = 0; q < x.lanes; q++)
        one[q] = 1.0f;
    x.most = take_floats(x.lanes, 1.0f);
    x.local = take_floats(x.lanes, 1.0f);
    x.sum = take_floats(x.lanes, 1.0f);
    x.init = take(4 * sparge_max(x.lanes, dim + KEYS));
    void *p = x.pv == SPARGE_FLOATS ? (void *)s : take(4 * panels * STRIDE);
    const void *k = take_operand(x.qk, KEYS * channels), *v = take_operand(x.pv, KEYS * dim);
    x.scores = (sparge_product){KEYS,
                                panels,
                                channels,
                                k,
                                channels,
                                x.init,
                                take_operand(x.qk, x.lanes * channels),
                                channels * SPARGE_PANEL,
                                x.init,
                                k,
                                0};
    x.products = (sparge_product){
        dim, panels, KEYS, v, KEYS, x.pv == SPARGE_WORDS ? x.init : NULL, p, STRIDE, x.init, v, 0};
    const bool codes = x.pv == SPARGE_BYTES;
    x.s = (sparge_scores){s, panels, KEYS, STRIDE, codes ? 1e-5f : 0.3f, !codes};
    x.rows = (sparge_softmax_rows){take_floats(x.lanes, 1.0f), x.sum, x.local,
                                   take_floats(x.lanes, 1.0f), take_floats(x.lanes, 1.0f)};
    x.to = (sparge_accumulator){one,
                                one,
                                true,
                                take_floats(dim, 1e-3f),
                                take_floats(panels * dim * SPARGE_PANEL, 1.0f),
                                dim * SPARGE_PANEL};
    if (x.k.begin)
        x.k.begin();
    void (*const run[])(stages *) = {score, maxima, update_max, softmax, accumulate_pv};
    void (*const before[])(stages *) = {score, score, maxima, score, softmax};
    const double fma = best(&x, score, peak) / (double)x.k.peak_floats(200) * 2.0;
    double sum = 0.0;
    printf("%s, %s, D = %" PRId64 ", %" PRId64 " queries: multiply-adds a score\n",
           sparge_isa_string(isa),
           x.qk == SPARGE_FLOATS  ? "f32"
           : x.qk == SPARGE_PAIRS ? "bf16"
                                  : "int8",
           dim, x.lanes);
    for (int n = 0; n < 5; n++) {
        const double cost = best(&x, before[n], run[n]) / fma / (double)(x.lanes * KEYS);
        printf("  %-14s %6.1f\n", name[n], cost);
        sum += cost;
    }
    printf("  %-14s %6.1f for %" PRId64 "\n", "sum", sum, 2 * dim);
    if (x.k.end)
        x.k.end();
    return 0;
}
