/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_cells.c: masses of cells, and masks by min_mass, on every instruction set beside the
 * reference, bit for bit. */
#include <float.h>
#include <math.h>

#include "tests/support/agree.h"

TestSuite(cpu_cells);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

static const struct sizes {
    int64_t cell, block_q, block_k;
} sizes[] = {
    {8, 128, 64}, {16, 128, 64}, {4, 24, 100}, {1, 20, 16},  {16, 16, 16},
    {64, 64, 64}, {7, 21, 14},   {2, 2, 128},  {5, 100, 25}, {0, 24, 16},
};
enum { SIZES = COUNT(sizes) };

static void set_sizes(problem *x, const struct sizes *s)
{
    x->o.cell = s->cell;
    x->o.block_q = s->block_q;
    x->o.block_k = s->block_k;
}

/* Alone, beside tau, beside topk, off. */
static sparge_thresholds thresholds(int64_t n)
{
    const sparge_thresholds each[] = {
        {-1.0f, SPARGE_OFF, SPARGE_OFF, -INFINITY, 0.9f},
        {0.3f, 0.7f, SPARGE_OFF, -INFINITY, 1.2f},
        {0.2f, SPARGE_OFF, 0.3f, -1.0f, 0.5f},
        {-1.0f, 0.8f, 0.1f, -INFINITY, 0.0f},
    };
    return each[n % COUNT(each)];
}

/* Short cells, short blocks, remainders of every panel of cells, and a causal edge at every place.
 */
Test(cpu_cells, every_length)
{
    enum { LONGEST = 260 };
    totals sum = {0};
    for (int64_t n = 0; n <= LONGEST; n++) {
        const int64_t keys = n * 37 % (LONGEST + 1);
        const int threads[] = {n % 8 ? 1 : 2, 0};
        check_case("q_len %lld k_len %lld", (long long)n, (long long)keys);
        const shape s = shape_of(1, 2, 1, n, keys, 1 + n % 40, 1 + n % 9);
        problem x = problem_make(&s);
        set_sizes(&x, &sizes[n / 3 % SIZES]);
        x.o.causal = (sparge_causal)(n % 3);
        x.o.smooth_k = n % 5 != 0;
        x.o.sink = n % 4 == 0;
        x.o.thresholds = thresholds(n);
        verify_with(&x, ATTENTION, SPARGE_F32, PACKED, threads, &sum);
        problem_free(&x);
    }
    check(sum.kept < sum.pairs * 9 / 10, "%lld of %lld blocks are kept", (long long)sum.kept,
          (long long)sum.pairs);
}

/* Query blocks whose cells share panels end where heads, batches and threads do. */
Test(cpu_cells, every_number_of_threads)
{
    static const int threads[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 0};
    for (int64_t n = 2; n < SIZES; n += 4) {
        check_case("cells of %lld in %lld x %lld", (long long)sizes[n].cell,
                   (long long)sizes[n].block_q, (long long)sizes[n].block_k);
        const shape s = shape_of(2, 4, 2, 110, 130, 16, 8);
        problem x = problem_make(&s);
        sparge_thresholds each[4];
        for (int h = 0; h < 4; h++)
            each[h] = thresholds(h);
        set_sizes(&x, &sizes[n]);
        x.o.per_head = each;
        x.o.causal = (sparge_causal)(n % 3);
        verify_with(&x, ATTENTION, SPARGE_F32, PACKED, threads, NULL);
        problem_free(&x);
    }
}

/* The largest sums of codes there are, and the longest rows of cells. */
Test(cpu_cells, the_largest_blocks)
{
    static const int threads[] = {1, 0};
    const struct sizes largest[] = {{16, 1024, 1024}, {1024, 1024, 1024}, {1, 1024, 64}};
    for (int64_t n = 0; n < 2 * COUNT(largest); n++) {
        check_case("blocks of 1024, %lld", (long long)n);
        const shape s = shape_of(1, 1, 1, 1030, 2100, 12, 8);
        problem x = problem_make(&s);
        set_sizes(&x, &largest[n / 2]);
        x.o.thresholds = thresholds(n);
        if (n % 2) /* all of a row to the first block, whose cells have the same */
            for (int64_t e = 0; e < tensor_count(&x.k); e++)
                x.k.x[e] = e / 12 < 1024 ? 0.0f : -40.0f;
        tensor_fill(&x.q, 1.0f, 2.0f);
        problem_write(&x);
        verify_with(&x, ATTENTION, SPARGE_F32, PACKED, threads, NULL);
        problem_free(&x);
    }
}

/* Means beyond 2^55, scales that overflow and that flatten everything, subnormals. */
Test(cpu_cells, magnitudes)
{
    static const int threads[] = {1, 0};
    const float size[] = {1e-45f, 1e-30f, 1.0f, 0x1p55f, 1e25f, FLT_MAX},
                scale[] = {0.0f, FLT_MIN, FLT_MAX};
    for (int64_t q = 0; q < COUNT(size); q++)
        for (int64_t k = 0; k < COUNT(size); k++)
            for (int64_t n = 0; n < COUNT(scale); n++) {
                check_case("q of %g, k of %g, scale %g", (double)size[q], (double)size[k],
                           (double)scale[n]);
                const shape s = shape_of(1, 1, 1, 40, 50, 8, 8);
                problem x = problem_make(&s);
                x.o.cell = 4;
                x.o.smooth_k = n == 0;
                x.o.softmax_scale = scale[n];
                x.o.thresholds = thresholds(q + k);
                x.o.thresholds.theta = -1.0f;
                tensor_fill(&x.q, size[q] / -2, size[q]);
                tensor_fill(&x.k, size[k] / -2, size[k]);
                verify_with(&x, ATTENTION, SPARGE_F32, PACKED, threads, NULL);
                problem_free(&x);
            }
}

/* Heads beyond a batch of keys, and query blocks beyond one of queries, as in cpu.c. */
Test(cpu_cells, more_than_one_batch)
{
    static const int threads[] = {2, 0};
    for (int n = 0; n < 2; n++) {
        check_case("batches of %s", n ? "query blocks" : "key heads");
        const shape s =
            n ? shape_of(2, 6, 3, 700, 20, 64, 8) : shape_of(1, 96, 8, 5, 300, 256, 250);
        problem x = problem_make(&s);
        const struct sizes of[] = {{1, 1024, 1}, {20, 100, 20}};
        set_sizes(&x, &of[n]);
        x.o.qk_dtype = x.o.pv_dtype = SPARGE_F32;
        x.o.causal = n ? SPARGE_CAUSAL_START : SPARGE_CAUSAL_NONE;
        x.o.thresholds = thresholds(n);
        verify_with(&x, ATTENTION, SPARGE_F32, PACKED, threads, NULL);
        problem_free(&x);
    }
}

/* Rounding upward and subnormal numbers flushed, as a caller may have set it: the same bits. */
Test(cpu_cells, arithmetic_of_the_caller)
{
    enum { UPWARD = 0x4000, FLUSH = 0x8040 };
    const shape s = shape_of(1, 2, 1, 90, 110, 24, 8);
    problem x = problem_make(&s);
    x.o.cell = 4;
    x.o.thresholds = thresholds(1);
    for (sparge_backend backend = SPARGE_REF; backend <= SPARGE_CPU; backend++) {
        x.o.backend = backend;
        x.o.threads = backend == SPARGE_CPU ? 3 : 1;
        const unsigned before = __builtin_ia32_stmxcsr();
        answer want = attention(&x, NULL);
        __builtin_ia32_ldmxcsr(before | UPWARD | FLUSH);
        answer got = attention(&x, NULL);
        const unsigned after = __builtin_ia32_stmxcsr();
        __builtin_ia32_ldmxcsr(before);
        check((after & ~0x3fu) == ((before | UPWARD | FLUSH) & ~0x3fu), "MXCSR is 0x%x", after);
        same_everything(&x, &got, &want);
        answer_free(&got);
        answer_free(&want);
    }
    problem_free(&x);
}
