/* SPDX-License-Identifier: Apache-2.0 */
/* cpu.c: the cpu backend against the reference, bit for bit: masks, intermediates, counters, o and
 * lse, on every instruction set that is here; and which backend and instruction set run at all.
 * What the reference gives is tested elsewhere, what each kernel gives in kernels.c. */
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tests/support/agree.h"

#include "cpu/cpu.h"
#include "sparge_tune.h"

TestSuite(cpu);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

/* In words that do not make CTest skip the whole program. */
Test(cpu, instruction_sets)
{
    for (int isa = FIRST_ISA; isa <= LAST_ISA; isa++)
        cr_log_info("%s is %s", sparge_isa_string((sparge_isa)isa),
                    !sparge_isa_available((sparge_isa)isa) ? "skipped: the processor lacks it"
                    : sparge_cpu_has_bf16((sparge_isa)isa) ? "tested, bf16 too"
                                                           : "tested");
    check(sparge_isa_available(SPARGE_ISA_SCALAR), "scalar is everywhere");
    check(sparge_backend_built(SPARGE_CPU) && sparge_backend_available(SPARGE_CPU),
          "the cpu backend is not here");
}

static void verify(problem *x, way how)
{
    static const int threads[] = {1, 2, 0};
    verify_with(x, how, SPARGE_F32, PACKED, threads, NULL);
}

/* ---- Questions at random ---- */

Test(cpu, questions_at_random)
{
    enum { CASES = 400 };
    totals sum = {0};
    for (int n = 0; n < CASES; n++) {
        check_case("question %d", n);
        const int64_t kv_heads = check_int(1, 2), longest = n % 10 ? 140 : 400;
        const shape s = {
            .batch = check_int(1, 2),
            .heads = kv_heads * check_int(1, 3),
            .kv_heads = kv_heads,
            .q_len = check_int(1, longest),
            .k_len = check_int(1, longest),
            .dim = n % 25 ? channels_at_random() : 256,
            .dim_v = n % 20 ? channels_at_random() : check_int(241, 300),
            .q = dtype_at_random(),
            .k = dtype_at_random(),
            .v = dtype_at_random(),
            .layout_q = layout_at_random(),
            .layout_k = layout_at_random(),
            .layout_v = layout_at_random(),
        };
        problem x = problem_make(&s);
        x.o.block_q = check_int(0, 2) ? check_int(1, 130) : 128;
        x.o.block_k = check_int(0, 2) ? check_int(1, 130) : 64;
        x.o.qk_dtype = cpu_dtypes[check_int(0, 3)];
        x.o.pv_dtype = cpu_dtypes[check_int(0, 3)];
        if (x.o.pv_dtype == SPARGE_INT12 && x.o.block_k > 128)
            x.o.block_k = 128;
        x.o.causal = (sparge_causal)check_int(SPARGE_CAUSAL_NONE, SPARGE_CAUSAL_START);
        x.o.skip_rows = check_int(0, 1) ? 0 : check_int(1, 140);
        sparge_thresholds each[6];
        vary(&x, each);
        if (check_int(0, 1))
            masses_at_random(&x, each, 128);
        const way how = check_int(0, 3) ? ATTENTION : ATTEND;
        const sparge_dtype dtype = how == ATTEND ? dtype_at_random() : SPARGE_F32;
        if (how == ATTEND && check_int(0, 3))
            mask_at_random(&x);
        if (how == ATTEND && check_int(0, 1))
            mask_fill_partial(&x, check_uniform(0.1f, 1.1f));
        if (check_int(0, 3) == 0)
            bias_fill(&x, check_int(0, 1));
        const int threads[] = {(int)check_int(1, 3), 0};
        verify_with(&x, how, dtype, how == ATTEND ? layout_at_random() : PACKED, threads, &sum);
        problem_free(&x);
    }
    cr_log_info("%lld questions, %lld of %lld pairs kept, P.V of %lld skipped",
                (long long)sum.cases, (long long)sum.kept, (long long)sum.pairs,
                (long long)sum.skipped);
    check(sum.kept < sum.pairs * 9 / 10 && sum.skipped > sum.kept / 50,
          "too little was dropped or skipped");
}

/* Short blocks, remainders of every panel and tile, and a causal edge at every place. */
Test(cpu, every_length)
{
    enum { LONGEST = 260 };
    const int64_t block_k[] = {16, 21, 64, 100};
    for (int64_t n = 0; n <= LONGEST; n++) {
        const int64_t keys = n * 37 % (LONGEST + 1);
        check_case("q_len %lld k_len %lld", (long long)n, (long long)keys);
        const shape s = shape_of(1, 2, 1, n, keys, 1 + n % 40, 1 + n * 7 % 40);
        problem x = problem_make(&s);
        x.o.block_q = n % 5 ? 24 : 100;
        x.o.block_k = block_k[n % COUNT(block_k)];
        x.o.causal = (sparge_causal)(n % 3);
        x.o.qk_dtype = cpu_dtypes[n / 3 % 4];
        x.o.pv_dtype = cpu_dtypes[n / 12 % 4];
        x.o.skip_rows = 1 + n % 24;
        x.o.thresholds = (sparge_thresholds){0.2f, 0.8f, SPARGE_OFF, n % 7 ? -1.0f : -INFINITY, 0};
        verify(&x, ATTENTION);
        problem_free(&x);
    }
}

/* Groups of queries that end within a panel, and blocks that end within a group. */
Test(cpu, groups_of_lambda)
{
    static const int threads[] = {2, 0};
    const int64_t block_q[] = {24, 100, 128}, skip_rows[] = {1, 5, 24, 100};
    totals sum = {0};
    for (int64_t n = 0; n < COUNT(block_q) * COUNT(skip_rows) * 4; n++) {
        const int64_t in_block = block_q[n / 4 % COUNT(block_q)],
                      together = skip_rows[n / 4 / COUNT(block_q)];
        check_case("groups of %lld of %lld, dtype %s", (long long)together, (long long)in_block,
                   sparge_dtype_string(cpu_dtypes[n % 4]));
        const shape s = shape_of(1, 1, 1, 230, 150, 40, 24);
        problem x = problem_make(&s);
        x.o.block_q = in_block;
        x.o.skip_rows = together;
        x.o.causal = (sparge_causal)(n % 3);
        x.o.qk_dtype = x.o.pv_dtype = cpu_dtypes[n % 4];
        x.o.softmax_scale = 0.5f;
        x.o.thresholds = (sparge_thresholds){-1.0f, 0.9f, SPARGE_OFF, -1.0f, 0};
        verify_with(&x, ATTENTION, SPARGE_F32, PACKED, threads, &sum);
        problem_free(&x);
    }
    check(sum.skipped > 0, "nothing was skipped");
}

/* The longest rows of P, and a short block after them. */
Test(cpu, the_largest_blocks)
{
    for (int n = 0; n < 4; n++) {
        check_case("blocks of 1024, %d", n);
        const shape s = shape_of(1, 1, 1, 70, 1100, 20, 12);
        problem x = problem_make(&s);
        x.o.block_q = 1024;
        x.o.block_k = n % 2 ? 1000 : 1024;
        x.o.skip_rows = 1024;
        x.o.causal = n / 2 ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
        x.o.qk_dtype = cpu_dtypes[n];
        x.o.pv_dtype = n == 1 ? SPARGE_F32 : n == 2 ? SPARGE_BF16 : cpu_dtypes[n];
        x.o.thresholds.lambda = -1.0f;
        verify(&x, ATTENTION);
        problem_free(&x);
    }
}

/* Codes that are all 127 or all -127: what saturates, saturates here. */
Test(cpu, extremes)
{
    const float corners[] = {1.0f, -1.0f};
    for (int way_of = 0; way_of < 8; way_of++)
        for (int level = 0; level < 3; level++) {
            check_case("extremes %d, precision %d", way_of, precisions[level]);
            const shape s =
                shape_of(1, 1, 1, 40, 128, precisions[level] == SPARGE_INT8 ? 256 : 128, 40);
            problem x = problem_make(&s);
            x.o.block_q = 32;
            x.o.block_k = 128;
            x.o.smooth_k = false;
            x.o.qk_dtype = x.o.pv_dtype = precisions[level];
            for (int64_t n = 0; n < tensor_count(&x.q); n++)
                x.q.x[n] = way_of & 4 && n % 2 ? -1.0f : 1.0f;
            for (int64_t n = 0; n < tensor_count(&x.k); n++)
                x.k.x[n] = corners[way_of & 1] * (way_of & 4 && n % 2 ? -1.0f : 1.0f);
            for (int64_t n = 0; n < tensor_count(&x.v); n++)
                x.v.x[n] = corners[way_of >> 1 & 1];
            problem_write(&x);
            verify(&x, ATTEND);
            problem_free(&x);
        }
}

/* Scores beyond every float, and steps of 0 or of subnormal codes. */
Test(cpu, magnitudes)
{
    const float size[] = {1e-45f, 1e-38f, 1e-30f, 1e-20f, 1e10f, 1e18f, 1e19f, 3e38f};
    for (int64_t q = 0; q < COUNT(size); q++)
        for (int64_t k = 0; k < COUNT(size); k++)
            for (int level = 0; level < 4; level++) {
                check_case("q of %g, k of %g, precision %d", (double)size[q], (double)size[k],
                           cpu_dtypes[level]);
                const shape s = shape_of(1, 1, 1, 20, 40, 8, 8);
                problem x = problem_make(&s);
                x.o.qk_dtype = x.o.pv_dtype = cpu_dtypes[level];
                tensor_fill(&x.q, -size[q], size[q]);
                tensor_fill(&x.k, -size[k], size[k]);
                verify(&x, ATTENTION);
                problem_free(&x);
            }
}

/* Queries that see scores of -inf alone, from one block or from all. */
Test(cpu, scores_of_minus_infinity)
{
    for (int level = 0; level < 4; level++)
        for (int finite = 0; finite < 3; finite++) {
            check_case("precision %d of P, some keys with finite scores %d", cpu_dtypes[level],
                       finite);
            const shape s = shape_of(1, 1, 1, 40, 50, 8, 8);
            problem x = problem_make(&s);
            x.o.block_q = x.o.block_k = 16;
            x.o.smooth_k = false;
            x.o.qk_dtype = SPARGE_F32;
            x.o.pv_dtype = cpu_dtypes[level];
            x.o.causal = finite == 1 ? SPARGE_CAUSAL_START : SPARGE_CAUSAL_NONE;
            tensor_fill(&x.q, 1e19f, 2e19f);
            tensor_fill(&x.k, -3e20f, -2e20f);
            for (int64_t n = tensor_count(&x.k) / 2; n < tensor_count(&x.k) && finite; n++)
                x.k.x[n] = 1e-20f * (float)(n % 7);
            problem_write(&x);
            verify(&x, ATTEND);
            problem_free(&x);
        }
}

/* TDPBF16PS adds even and odd places apart: of finite elements it makes a NaN. */
Test(cpu, sums_of_both_infinities)
{
    for (int every = 1; every <= 7; every += 3) {
        check_case("one key of %d", every);
        const shape s = shape_of(1, 1, 1, 20, 40, 8, 8);
        problem x = problem_make(&s);
        x.o.smooth_k = false;
        x.o.qk_dtype = x.o.pv_dtype = SPARGE_BF16;
        tensor_fill(&x.q, 1e20f, 2e20f);
        for (int64_t n = 0; n < tensor_count(&x.k); n++)
            x.k.x[n] = n / 8 % every ? 0.0f : n % 2 ? 1e20f : -1e20f;
        problem_write(&x);
        verify(&x, ATTEND);
        problem_free(&x);
    }
}

/* An element that rounds to infinity is not finite in a product of bf16, and in no other. */
Test(cpu, elements_beyond_bf16)
{
    const float size[] = {FLT_MAX, 0x1.ffp127f, 0x1.fefffep127f};
    for (int n = 0; n < 3 * 3 * 4; n++) {
        check_case("%a in tensor %d, %d of the products in bf16", (double)size[n % 3], n / 3 % 3,
                   n / 9);
        const shape s = shape_of(1, 2, 1, 50, 60, 24, 20);
        problem x = problem_make(&s);
        tensor *const t = n / 3 % 3 == 0 ? &x.q : n / 3 % 3 == 1 ? &x.k : &x.v;
        t->x[check_int(0, tensor_count(t) - 1)] = n % 2 ? size[n % 3] : -size[n % 3];
        problem_write(&x);
        x.o.block_q = 20;
        x.o.block_k = 16;
        x.o.qk_dtype = n / 9 & 1 ? SPARGE_BF16 : SPARGE_F32;
        x.o.pv_dtype = n / 9 & 2 ? SPARGE_BF16 : SPARGE_F32;
        x.o.smooth_k = check_int(0, 1);
        x.o.causal = (sparge_causal)check_int(SPARGE_CAUSAL_NONE, SPARGE_CAUSAL_END);
        verify(&x, ATTEND);
        verify(&x, ATTENTION);
        problem_free(&x);
    }
}

/* ---- Threads and repetition ---- */

Test(cpu, every_number_of_threads)
{
    static const int threads[] = {1, 2, 3, 7, 16, 2, 2, 16, 0};
    for (int level = 0; level < 4; level++) {
        check_case("threads, precision %d", cpu_dtypes[level]);
        const shape s = shape_of(2, 4, 2, 200, 170, 40, 24);
        problem x = problem_make(&s);
        x.o.qk_dtype = x.o.pv_dtype = cpu_dtypes[level];
        x.o.causal = SPARGE_CAUSAL_END;
        x.o.skip_rows = 8;
        x.o.softmax_scale = 0.5f;
        x.o.thresholds = (sparge_thresholds){0.3f, 0.7f, SPARGE_OFF, -1.0f, 0};
        totals sum = {0};
        verify_with(&x, ATTENTION, SPARGE_F32, PACKED, threads, &sum);
        check(sum.skipped > 0, "nothing was skipped");
        problem_free(&x);
    }
}

/* ---- Memory in portions: a batch of key heads, a batch of their query blocks ---- */

/* A key block is padded to 16 keys, so blocks of one key fill the 32 MiB of a batch with few
 * tokens: three heads here, and the last batch is short. 36 query blocks of it are more than the
 * batch of 32 that one thread has. */
Test(cpu, more_than_one_kv_batch)
{
    static const int threads[] = {1, 2, 0};
    for (int level = 0; level < 3; level += 2) {
        check_case("batches of key heads, precision %d", cpu_dtypes[level]);
        const int64_t keys = cpu_dtypes[level] == SPARGE_F32 ? 300 : 700;
        const shape s = shape_of(1, 8 * 12, 8, 5, keys, 256, 250);
        problem x = problem_make(&s);
        x.o.block_q = 1024;
        x.o.block_k = 1;
        x.o.qk_dtype = x.o.pv_dtype = cpu_dtypes[level];
        x.o.thresholds = (sparge_thresholds){-1.0f, 0.5f, SPARGE_OFF, -4.0f, 0};
        x.k.x[tensor_count(&x.k) - 1] = NAN; /* of the last batch, and of no other */
        problem_write(&x);
        verify_with(&x, ATTENTION, SPARGE_F32, PACKED, threads, NULL);
        problem_free(&x);
    }
}

/* 36 query blocks, 3 of each head, and batches of 32. */
Test(cpu, a_q_batch_ends_within_a_head)
{
    static const int threads[] = {1, 3, 0};
    check_case("batches of query blocks");
    const shape s = shape_of(2, 6, 3, 700, 20, 256, 8);
    problem x = problem_make(&s);
    x.o.block_q = 300;
    x.o.qk_dtype = SPARGE_F32;
    x.o.pv_dtype = SPARGE_INT12;
    x.o.causal = SPARGE_CAUSAL_START;
    x.o.thresholds.tau = 0.5f;
    verify_with(&x, ATTENTION, SPARGE_F32, PACKED, threads, NULL);
    mask_fill(&x, 0.5f);
    verify_with(&x, ATTEND, SPARGE_F32, PACKED, threads, NULL);
    problem_free(&x);
}

/* ---- Where the output goes ---- */

Test(cpu, output_in_the_place_of_q)
{
    for (int n = 0; n < 12; n++) {
        check_case("in place %d", n);
        const sparge_dtype dtype = (sparge_dtype)(n % 3);
        shape s = shape_of(1, 4, 2, 100, 90, 48, 48);
        s.q = dtype;
        problem x = problem_make(&s);
        x.o.block_q = 20;
        x.o.backend = SPARGE_CPU;
        x.o.threads = 3;
        x.o.smooth_k = n / 3 % 2;
        x.o.causal = SPARGE_CAUSAL_END;
        x.o.qk_dtype = x.o.pv_dtype = n % 2 ? SPARGE_INT8 : SPARGE_F32;
        if (n >= 6)
            x.q.x[48 * 33 + 5] = NAN;
        problem_write(&x);
        answer beside = attend_to(&x, dtype, PACKED);
        float *lse = check_alloc((size_t)problem_rows(&x) * sizeof *lse);
        sparge_result result = {.o = tensor_out(&x.q), .lse = lse};
        sparge_error error;
        check(sparge_attend(&x.p, &x.o, NULL, &result, &error) == SPARGE_OK, "%s", error.text);
        tensor_read(&x.q);
        check_same(x.q.x, beside.o.x, tensor_count(&x.q));
        check_same(lse, beside.lse, problem_rows(&x));
        check_free(lse);
        answer_free(&beside);
        problem_free(&x);
    }
}

/* lse, intermediates and head_counts may be missing; o stays the same. */
Test(cpu, only_o_is_wanted)
{
    for (int smooth = 0; smooth < 2; smooth++) {
        check_case("only o, smooth %d", smooth);
        const shape s = shape_of(1, 2, 1, 50, 60, 32, 16);
        problem x = problem_make(&s);
        x.o.backend = SPARGE_CPU;
        x.o.smooth_k = smooth;
        x.o.thresholds.tau = 0.6f;
        answer all = attention(&x, NULL);
        tensor o = tensor_make(1, 2, 50, 16, SPARGE_F32, PACKED);
        sparge_result result = {.o = tensor_out(&o)};
        check(sparge_attention(&x.p, &x.o, &result, NULL) == SPARGE_OK, "call");
        tensor_read(&o);
        check_same(o.x, all.o.x, tensor_count(&o));
        same_counts(&result.counts, &all.result.counts);
        tensor_free(&o);
        answer_free(&all);
        problem_free(&x);
    }
}

/* Keys that take long to pack, then queries. */
Test(cpu, seconds_add_up)
{
    for (int n = 0; n < 2; n++) {
        check_case("seconds, %d", n);
        const shape s = shape_of(1, 1, 1, n ? 4000 : 1, n ? 1 : 4000, 64, 64);
        problem x = problem_make(&s);
        x.o.backend = SPARGE_CPU;
        tensor o = tensor_make(1, 1, s.q_len, 64, SPARGE_F32, PACKED);
        sparge_result r = {.o = tensor_out(&o)};
        struct timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        check(sparge_attention(&x.p, &x.o, &r, NULL) == SPARGE_OK, "call");
        clock_gettime(CLOCK_MONOTONIC, &end);
        const double took =
            (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
        check(r.seconds_predict > 0 && r.seconds_quantize > 0 && r.seconds_attend > 0 &&
                  r.seconds_predict + r.seconds_quantize + r.seconds_attend <= took,
              "%g s, %g s and %g s of %g s", r.seconds_predict, r.seconds_quantize,
              r.seconds_attend, took);
        tensor_free(&o);
        problem_free(&x);
    }
}

/* ---- Selection ---- */

/* 350 key blocks whose scores are few different ones: ties at every place where a row may end. */
Test(cpu, rows_of_the_mask_with_ties)
{
    const float share[] = {SPARGE_OFF, 0.0f, 0.3f, 0.5f, 0.98f, 1.0f};
    for (int values = 1; values <= 50; values += values < 3 ? 1 : 47) {
        const shape s = shape_of(1, 2, 1, 8, 700, 4, 1);
        check_case("ties of %d", values);
        problem x = problem_make(&s);
        x.o.block_q = 4;
        x.o.block_k = 2;
        for (int64_t t = 0; t < 700; t++)
            for (int64_t c = 0; c < 4; c++)
                x.k.x[t * 4 + c] =
                    (float)(t / 2 * 7919 % 350 % values) * 0.25f * (c % 2 ? -1.0f : 1.5f);
        problem_write(&x);
        for (int64_t tau = 0; tau < COUNT(share); tau++)
            for (int64_t topk = tau == 0; topk < COUNT(share); topk++) {
                check_case("ties of %d, tau %g, topk %g", values, (double)share[tau],
                           (double)share[topk]);
                x.o.thresholds = (sparge_thresholds){-1.0f, share[tau], share[topk], -INFINITY, 0};
                x.o.smooth_k = topk % 2;
                x.o.causal = (sparge_causal)(topk % 3);
                x.o.sink = tau % 2;
                verify(&x, ATTENTION);
            }
        problem_free(&x);
    }
}

/* A quarter of the smallest float rounds to 0 or, below it, to -0; neither ranks above the other.
 */
Test(cpu, zeros_of_both_signs_tie)
{
    check_case("zeros");
    const shape s = shape_of(1, 1, 1, 4, 40, 1, 1);
    problem x = problem_make(&s);
    x.o.block_q = 4;
    x.o.block_k = 1;
    x.o.smooth_k = false;
    x.o.softmax_scale = 0.25f;
    for (int64_t n = 0; n < 4; n++)
        x.q.x[n] = 0x1p-100f;
    for (int64_t n = 0; n < 40; n++)
        x.k.x[n] = n % 2 ? 0x1p-49f : -0x1p-49f;
    problem_write(&x);
    x.o.thresholds = (sparge_thresholds){-1.0f, SPARGE_OFF, 0.3f, -INFINITY, 0};
    verify(&x, ATTENTION);
    x.o.thresholds = (sparge_thresholds){-1.0f, 0.5f, SPARGE_OFF, -INFINITY, 0};
    verify(&x, ATTENTION);
    problem_free(&x);
}

/* 1 to 700 key blocks with scores of every size: radix digits of every place. */
Test(cpu, rows_of_the_mask_of_every_length)
{
    for (int64_t n = 1; n <= 700; n += 1 + n / 5) {
        check_case("%lld key blocks", (long long)n);
        const shape s = shape_of(1, 2, 2, 4, n, 3, 1);
        problem x = problem_make(&s);
        x.o.block_q = 2;
        x.o.block_k = 1;
        const float size = ldexpf(1.0f, (int)check_int(-10, 10));
        tensor_fill(&x.q, -size, size);
        tensor_fill(&x.k, -1, 1);
        x.o.thresholds = (sparge_thresholds){-1.0f, check_uniform(0.1f, 0.9f),
                                             check_int(0, 1) ? SPARGE_OFF : 0.25f, -INFINITY, 0};
        verify(&x, ATTENTION);
        x.o.thresholds = (sparge_thresholds){-1.0f, SPARGE_OFF, check_uniform(0, 1), -INFINITY, 0};
        verify(&x, ATTENTION);
        problem_free(&x);
    }
}

/* Bits of blocks that no row of the query block sees, and of words beyond the row, change nothing.
 */
Test(cpu, a_mask_that_names_invisible_blocks)
{
    for (int causal = SPARGE_CAUSAL_END; causal <= SPARGE_CAUSAL_START; causal++) {
        check_case("invisible, causal %d", causal);
        const shape s = shape_of(1, 2, 1, 90, 60, 16, 8);
        problem x = problem_make(&s);
        x.o.causal = (sparge_causal)causal;
        x.o.thresholds.lambda = -1.0f;
        x.mask = wide_mask(&x, 2);
        const sparge_mask own = x.mask;
        verify(&x, ATTEND);
        x.o.backend = SPARGE_CPU;
        answer all = attend(&x);
        x.mask = (sparge_mask){0};
        answer dense = attend(&x);
        same_everything(&x, &all, &dense);
        answer_free(&all);
        answer_free(&dense);
        check_free(own.bits);
        problem_free(&x);
    }
}

/* ---- Single pairs ---- */

/* Blocks that are attended in part by all of their bits, or by none, are like whole ones, or like
 * none, but for what counts blocks. */
Test(cpu, bits_of_all_pairs_and_of_none)
{
    static const int threads[] = {1, 2, 0};
    for (int n = 0; n < 24; n++) {
        check_case("bits of %s, %d", n % 2 ? "all" : "none", n);
        const shape s = shape_of(1, 4, 2, 100, 90, 40, 24);
        problem x = problem_make(&s);
        x.o.block_q = 40;
        x.o.block_k = n % 3 ? 33 : 16;
        x.o.causal = n % 4 < 2 ? SPARGE_CAUSAL_NONE : SPARGE_CAUSAL_END;
        x.o.thresholds.lambda = n % 5 ? -INFINITY : -1.0f;
        x.o.qk_dtype = cpu_dtypes[n / 2 % 3];
        x.o.pv_dtype = cpu_dtypes[n / 6 % 3];
        mask_fill(&x, 0.6f);
        x.o.backend = SPARGE_CPU;
        answer whole = attend(&x);
        mask_fill_partial(&x, 1.1f);
        const size_t lines = (size_t)(4 * x.mask.q_blocks);
        memset(x.mask.partial_bits, n % 2 ? 0xFF : 0,
               (size_t)(x.mask.partial_first[lines] * 40 * blocks(x.o.block_k, 32)) * 4);
        answer got = attend(&x);
        if (n % 2)
            same_everything(&x, &got, &whole);
        for (int64_t e = 0; e < problem_rows(&x) && n % 2 == 0; e++)
            check_equal(got.lse[e], -INFINITY);
        check_equal(got.result.counts.tile_tokens, whole.result.counts.tile_tokens);
        if (n % 2 == 0)
            check_equal(got.result.counts.pv_done, (double)got.result.counts.qk_done);
        answer_free(&whole);
        answer_free(&got);
        verify_with(&x, ATTEND, SPARGE_F32, PACKED, threads, NULL);
        problem_free(&x);
    }
}

/* Keys that none of their queries attends to may be anything. */
Test(cpu, nonfinite_in_hidden_pairs_goes_nowhere)
{
    static const int threads[] = {1, 3, 0};
    int64_t hidden = 0;
    for (int n = 0; n < 24; n++) {
        check_case("hidden, %d", n);
        const shape s = shape_of(1, 4, 2, 70, 80, 24, 20);
        problem x = problem_make(&s);
        x.o.block_q = 30;
        x.o.block_k = 20;
        x.o.causal = (sparge_causal)(n % 3);
        x.o.smooth_k = n / 3 % 2;
        x.o.qk_dtype = cpu_dtypes[n % 4];
        x.o.pv_dtype = cpu_dtypes[n / 4 % 3];
        mask_fill_partial(&x, 1.1f);
        if (n / 3 % 2)
            bias_fill(&x, false);
        for (int64_t e = 0; e < x.mask.partial_first[4 * x.mask.q_blocks] * 30; e++)
            x.mask.partial_bits[e] &= 0xfffbfddbu; /* keys 2, 5, 9 and 18 of a block */
        answer want[2];
        for (int times = 0; times < 2; times++) {
            for (int64_t kv = 0; kv < 2; kv++)
                for (int64_t t = 0; t < 80; t++) {
                    const int64_t in = t % 20;
                    if (in != 2 && in != 5 && in != 9 && in != 18 &&
                        !(x.k_bias && x.k_bias[kv * 80 + t] == -INFINITY))
                        continue;
                    hidden += times;
                    for (int64_t c = 0; c < 24; c++)
                        tensor_row(&x.k, 0, kv, t)[c] = times == 0 ? 0.0f : c % 3 ? NAN : INFINITY;
                    for (int64_t c = 0; c < 20; c++)
                        tensor_row(&x.v, 0, kv, t)[c] = times == 0 ? 0.0f : c % 2 ? NAN : -INFINITY;
                }
            problem_write(&x);
            verify_with(&x, ATTEND, SPARGE_F32, PACKED, threads, NULL);
            x.o.backend = SPARGE_REF;
            x.o.isa = SPARGE_ISA_AUTO;
            want[times] = attend(&x);
        }
        check(isfinite(want[1].lse[0]) || want[1].lse[0] == -INFINITY, "lse is NaN");
        if (!x.o.smooth_k)
            same_answer(&want[1], &want[0]);
        for (int64_t e = 0; e < tensor_count(&want[1].o); e++)
            check(isfinite(want[1].o.x[e]), "o[%lld] is not finite", (long long)e);
        answer_free(&want[0]);
        answer_free(&want[1]);
        problem_free(&x);
    }
    check(hidden > 1000, "%lld hidden keys", (long long)hidden);
}

/* ---- Nothing to do ---- */

Test(cpu, empty_questions)
{
    const struct {
        int64_t batch, q_len, k_len;
    } size[] = {
        {0, 10, 20}, {1, 0, 20}, {1, 10, 0}, {1, 0, 0}, {0, 0, 0}, {2, 1, 1},
    };
    for (int64_t n = 0; n < COUNT(size); n++)
        for (int causal = 0; causal < 3; causal++) {
            check_case("batch %lld, %lld queries, %lld keys, causal %d", (long long)size[n].batch,
                       (long long)size[n].q_len, (long long)size[n].k_len, causal);
            const shape s = shape_of(size[n].batch, 2, 1, size[n].q_len, size[n].k_len, 5, 7);
            problem x = problem_make(&s);
            x.o.causal = (sparge_causal)causal;
            x.o.sink = true;
            verify(&x, ATTENTION);
            verify(&x, ATTEND);
            problem_free(&x);
        }
}

/* ---- Progress ---- */

typedef struct heard {
    pthread_t caller;
    int rises, wrong;
    double last, enough; /* from where on it gives up */
} heard;

static bool listen(void *user, double done)
{
    heard *h = user;
    h->rises += done > h->last;
    h->wrong += !pthread_equal(pthread_self(), h->caller) || !(done >= h->last) || !(done <= 1) ||
                h->last >= h->enough;
    h->last = done;
    return done < h->enough;
}

/* With one thread it hears every query block; with more, what was done whenever the calling one
 * began another. */
Test(cpu, progress_is_heard_in_the_calling_thread)
{
    for (int threads = 1; threads <= 7; threads += 3) {
        check_case("progress, %d threads", threads);
        const shape s = shape_of(1, 4, 2, 200, 60, 16, 8);
        problem x = problem_make(&s);
        heard h = {.caller = pthread_self(), .enough = 2};
        x.o.backend = SPARGE_CPU;
        x.o.threads = threads;
        x.o.progress = listen;
        x.o.user = &h;
        answer a = attention(&x, NULL);
        check(h.wrong == 0, "%d calls in another thread, falling or beyond 1", h.wrong);
        check_equal(h.last, 1.0);
        if (threads == 1)
            check_equal(h.rises, 4 * 13);
        answer_free(&a);
        problem_free(&x);
    }
}

/* Given up at once, nothing is attended; on the way, nobody asks again. */
Test(cpu, progress_cancels_every_thread)
{
    for (int half = 0; half < 2; half++)
        for (int threads = 1; threads <= 7; threads += 3) {
            check_case("cancelled %s, %d threads", half ? "on the way" : "at once", threads);
            const shape s = shape_of(1, 4, 2, 200, 60, 16, 8);
            problem x = problem_make(&s);
            tensor o = tensor_make(1, 4, 200, 8, SPARGE_F32, PACKED);
            heard h = {.caller = pthread_self(), .last = -1, .enough = 0.5 * half};
            x.o.backend = SPARGE_CPU;
            x.o.threads = threads;
            x.o.progress = listen;
            x.o.user = &h;
            sparge_result result = {.o = tensor_out(&o)};
            check_equal(sparge_attention(&x.p, &x.o, &result, NULL), SPARGE_ERR_CANCELLED);
            check(h.wrong == 0, "%d calls in another thread, falling or after giving up", h.wrong);
            for (size_t n = 0; n < o.bytes && !half; n++)
                check((unsigned char)o.memory[n] == 0xFF, "something was computed");
            tensor_free(&o);
            problem_free(&x);
        }
}

/* ---- Processes ---- */

/* The threads of the call before the fork are not in the child, which needs none. */
Test(cpu, one_thread_works_after_a_fork, .timeout = 60)
{
    const shape s = shape_of(1, 4, 2, 200, 60, 16, 8);
    problem x = problem_make(&s);
    x.o.backend = SPARGE_CPU;
    x.o.threads = 4;
    answer a = attention(&x, NULL);
    tensor o = tensor_make(1, 4, 200, 8, SPARGE_F32, PACKED);
    sparge_result result = {.o = tensor_out(&o)};
    x.o.threads = 1;
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0)
        _exit(sparge_attention(&x.p, &x.o, &result, NULL) != SPARGE_OK ||
              memcmp(o.memory, a.o.memory, o.bytes) != 0);
    int status = 0;
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0,
          "the child's status is %x", status);
    tensor_free(&o);
    answer_free(&a);
    problem_free(&x);
}

/* ---- What runs ---- */

static problem small(void)
{
    const shape s = shape_of(1, 1, 1, 20, 20, 8, 8);
    problem x = problem_make(&s);
    x.o.backend = SPARGE_AUTO;
    return x;
}

/* What ran, or what was refused and with which words. */
static void runs(const problem *x, sparge_backend backend, sparge_isa isa)
{
    answer a = attention(x, NULL);
    check_equal(a.result.backend, backend);
    check_equal(a.result.isa, isa);
    answer_free(&a);
}

static void refused(const problem *x, sparge_status status, const char *sentence)
{
    float o[20 * 8];
    sparge_error error = {""};
    sparge_result result = {.o = {o, SPARGE_F32, 160, 160, 8}};
    const sparge_status got = sparge_attention(&x->p, &x->o, &result, &error);
    check(got == status && !strncmp(error.text, sentence, strlen(sentence)), "%s: \"%s\"",
          sparge_status_string(got), error.text);
    sparge_mask mask = wide_mask(x, 0);
    check_equal(sparge_predict(&x->p, &x->o, &mask, NULL, NULL), status);
    check_equal(sparge_attend(&x->p, &x->o, NULL, &result, NULL), status);
    check_free(mask.bits);
}

static sparge_isa best(void)
{
    sparge_isa isa = (sparge_isa)LAST_ISA;
    while (!sparge_isa_available(isa))
        isa--;
    return isa;
}

Test(cpu, the_environment_names_an_instruction_set)
{
    check_case("SPARGE_ISA");
    problem x = small();
    const char *const no_choice[] = {NULL, "", "auto"};
    for (int n = 0; n < 3; n++) {
        if (no_choice[n])
            setenv("SPARGE_ISA", no_choice[n], 1);
        else
            unsetenv("SPARGE_ISA");
        runs(&x, SPARGE_CPU, best());
    }
    for (int isa = FIRST_ISA; isa <= LAST_ISA; isa++) {
        setenv("SPARGE_ISA", sparge_isa_string((sparge_isa)isa), 1);
        if (sparge_isa_available((sparge_isa)isa)) {
            runs(&x, SPARGE_CPU, (sparge_isa)isa);
            continue;
        }
        char have[128] = "";
        for (int other = FIRST_ISA; other <= LAST_ISA; other++)
            if (sparge_isa_available((sparge_isa)other)) {
                strcat(have, *have ? ", " : "");
                strcat(have, sparge_isa_string((sparge_isa)other));
            }
        const char *lacks = check_text("%s, %s; here are %s", sparge_isa_string((sparge_isa)isa),
                                       sparge_cpu_lacks((sparge_isa)isa), have);
        refused(&x, SPARGE_ERR_UNSUPPORTED, check_text("SPARGE_ISA is %s", lacks));
        x.o.isa = (sparge_isa)isa;
        refused(&x, SPARGE_ERR_UNSUPPORTED, check_text("isa is %s", lacks));
        x.o.isa = SPARGE_ISA_SCALAR; /* options.isa wins */
        runs(&x, SPARGE_CPU, SPARGE_ISA_SCALAR);
        x.o.isa = SPARGE_ISA_AUTO;
    }
    const char *const unknown[] = {"sse9", "SCALAR", "scalar ", "1", "avx"};
    for (int64_t n = 0; n < COUNT(unknown); n++) {
        setenv("SPARGE_ISA", unknown[n], 1);
        refused(&x, SPARGE_ERR_ARGUMENT, check_text("SPARGE_ISA is '%s'", unknown[n]));
    }
    x.o.isa = best();
    runs(&x, SPARGE_CPU, best());
    x.o.isa = SPARGE_ISA_AUTO;
    x.o.backend = SPARGE_REF; /* has none, and does not ask */
    runs(&x, SPARGE_REF, SPARGE_ISA_SCALAR);
    setenv("SPARGE_ISA", "scalar", 1);
    x.o.backend = SPARGE_CPU;
    x.o.isa = best();
    runs(&x, SPARGE_CPU, best());
    problem_free(&x);
}

Test(cpu, rules_that_the_reference_alone_has)
{
    problem x = small();
    unsetenv("SPARGE_ISA");
    for (int rules = SPARGE_RULES_PAPER; rules <= SPARGE_RULES_UPSTREAM; rules++) {
        check_case("rules %d", rules);
        x.o.rules = (sparge_rules)rules;
        x.o.backend = SPARGE_AUTO;
        runs(&x, SPARGE_REF, SPARGE_ISA_SCALAR);
        x.o.backend = SPARGE_CPU;
        refused(&x, SPARGE_ERR_UNSUPPORTED, "rules are not the default ones");
        x.o.backend = SPARGE_AUTO;
        x.o.isa = best() == SPARGE_ISA_SCALAR ? SPARGE_ISA_AVX2 : best();
        refused(&x, SPARGE_ERR_UNSUPPORTED, "rules are not the default ones");
        x.o.isa = SPARGE_ISA_AUTO;
    }
    problem_free(&x);
}

/* Rounding upward, and subnormal numbers flushed, as of a caller who set that before or after the
 * threads were made: the same bits, and the setting is there afterwards. */
static void under(const problem *x, unsigned control, const answer *want, const double *exact,
                  const sparge_tuned *best)
{
    const unsigned before = __builtin_ia32_stmxcsr();
    sparge_tuned tuned = {0};
    sparge_tune_options how = {.l1 = 0.05, .l2 = 0.06};
    double *o = malloc((size_t)tensor_count(&want->o) * sizeof *o);
    __builtin_ia32_ldmxcsr(before | control);
    answer got = attention(x, NULL);
    const sparge_status judged =
        sparge_oracle(&x->p, &x->o, NULL, SPARGE_ORACLE_REAL, o, NULL, NULL, NULL);
    const sparge_status searched = sparge_tune(&x->p, 1, &x->o, &how, &tuned, NULL);
    const unsigned after = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before);
    check((after & ~0x3fu) == ((before | control) & ~0x3fu), "MXCSR is 0x%x after 0x%x", after,
          before | control);
    same_everything(x, &got, want);
    check(judged == SPARGE_OK && searched == SPARGE_OK, "oracle %d, tune %d", (int)judged,
          (int)searched);
    check_same_as("oracle", o, exact, tensor_count(&want->o));
    check(tuned.in_sample.mean == best->in_sample.mean &&
              tuned.thresholds.tau == best->thresholds.tau,
          "tune: %.17g, %.17g", tuned.in_sample.mean, best->in_sample.mean);
    answer_free(&got);
    free(o);
}

Test(cpu, arithmetic_of_the_caller)
{
    enum { UPWARD = 0x4000, FLUSH = 0x8040 };
    for (int64_t dim = 1; dim <= 64; dim++) {
        check_case("scale of %lld channels", (long long)dim);
        const sparge_problem p = {.heads = 1, .kv_heads = 1, .dim = dim, .dim_v = 1};
        sparge_options o = sparge_options_default(SPARGE_RULES_DEFAULT);
        __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | UPWARD);
        const sparge_status status = sparge_options_resolve(&p, &o, NULL);
        __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() & ~(unsigned)UPWARD);
        check(status == SPARGE_OK, "status %d", (int)status);
        check_equal(o.softmax_scale, 1.0f / sqrtf((float)dim));
    }
    const shape s = shape_of(1, 1, 1, 150, 200, 40, 24);
    problem x = problem_make(&s);
    for (int64_t n = 0; n < tensor_count(&x.v); n += 3)
        x.v.x[n] *= 1e-39f;
    problem_write(&x);
    x.o.thresholds = (sparge_thresholds){0.2f, 0.7f, SPARGE_OFF, -6.0f, 0};
    const sparge_backend each[] = {SPARGE_REF, SPARGE_CPU, SPARGE_CPU, SPARGE_CPU};
    for (int n = 0; n < COUNT(each); n++)
        for (int level = 0; level < 4; level += level ? 1 : 2) {
            if (cpu_dtypes[level] == SPARGE_BF16 && each[n] == SPARGE_CPU && !sparge_cpu_best(true))
                continue;
            check_case("backend %d, precision %d", n, cpu_dtypes[level]);
            x.o.backend = each[n];
            x.o.qk_dtype = x.o.pv_dtype = cpu_dtypes[level];
            x.o.threads = n ? 2 * n - 1 : 1; /* 1, 3 and 5: some are made under another setting */
            __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | FLUSH | UPWARD);
            answer made = attention(&x, NULL);
            __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() & ~(unsigned)(FLUSH | UPWARD));
            answer want = attention(&x, NULL);
            same_everything(&x, &made, &want);
            double *exact = malloc((size_t)tensor_count(&want.o) * sizeof *exact);
            sparge_tuned best = {0};
            sparge_error why = {""};
            sparge_tune_options how = {.l1 = 0.05, .l2 = 0.06};
            check(sparge_oracle(&x.p, &x.o, NULL, SPARGE_ORACLE_REAL, exact, NULL, NULL, NULL) ==
                          SPARGE_OK &&
                      sparge_tune(&x.p, 1, &x.o, &how, &best, &why) == SPARGE_OK,
                  "oracle or tune failed: %s", why.text);
            under(&x, UPWARD, &want, exact, &best);
            under(&x, FLUSH, &want, exact, &best);
            free(exact);
            answer_free(&made);
            answer_free(&want);
        }
    problem_free(&x);
}

Test(cpu, numbers_of_threads)
{
    check_case("threads");
    problem x = small();
    x.o.threads = 1025;
    refused(&x, SPARGE_ERR_ARGUMENT, "threads is 1025, it must be in [0, 1024]");
    x.o.threads = -1;
    refused(&x, SPARGE_ERR_ARGUMENT, "threads is -1");
    x.o.threads = 0;
    answer a = attention(&x, NULL);
    check(a.result.threads >= 1 && a.result.threads <= 1024, "%d threads", a.result.threads);
    answer_free(&a);
    x.o.threads = 1024;
    a = attention(&x, NULL);
    check_equal(a.result.threads, 1024);
    answer_free(&a);
    problem_free(&x);
}

/* Of the reference's own NaN no backend may make a number. */
Test(cpu, scores_that_all_overflow_give_nan)
{
    const float q[2] = {1e20f, 1e20f};
    float k[64], v[32];
    for (int n = 0; n < 64; n++)
        k[n] = -1e20f;
    for (int n = 0; n < 32; n++)
        v[n] = (float)n;
    const sparge_problem p = {.batch = 1,
                              .heads = 1,
                              .kv_heads = 1,
                              .q_len = 1,
                              .k_len = 32,
                              .dim = 2,
                              .dim_v = 1,
                              .q = {q, SPARGE_F32, 2, 2, 2},
                              .k = {k, SPARGE_F32, 64, 64, 2},
                              .v = {v, SPARGE_F32, 32, 32, 1}};
    for (sparge_dtype pv = SPARGE_INT8; pv <= SPARGE_F32; pv++) {
        float o[2], lse[2];
        for (int n = 0; n < 2; n++) {
            sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
            options.backend = n ? SPARGE_CPU : SPARGE_REF;
            options.qk_dtype = SPARGE_F32;
            options.pv_dtype = pv;
            options.smooth_k = false;
            sparge_result result = {.o = {&o[n], SPARGE_F32, 1, 1, 1}, .lse = &lse[n]};
            check(sparge_attend(&p, &options, NULL, &result, NULL) == SPARGE_OK, "pv %d", (int)pv);
        }
        check(o[0] != o[0] && o[1] != o[1], "pv %d: o is %g and %g", (int)pv, (double)o[0],
              (double)o[1]);
        check_same(&lse[1], &lse[0], 1);
    }
}
