/* SPDX-License-Identifier: Apache-2.0 */
/* random.c: every kernel against ref on questions at random and on every length. */
#include <math.h>
#include <string.h>

#include "tests/gpu/gpu.h"

TestSuite(gpu);

static int64_t channels_at_random(void)
{
    static const int64_t usual[] = {1, 16, 33, 64, 65, 80, 96, 97, 128};
    return check_int(0, 3) ? usual[check_int(0, COUNT(usual) - 1)] : check_int(1, 128);
}

static int64_t length_at_random(int64_t longest)
{
    static const int64_t edge[] = {1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 384};
    return check_int(0, 1) ? edge[check_int(0, COUNT(edge) - 1)] : check_int(1, longest);
}

typedef struct totals {
    int64_t pairs, kept;
    double skipped;
} totals;

static void ask_at_random(int64_t n, const kernel *r, totals *sum)
{
    const int64_t kv_heads = check_int(1, 2), longest = n % 10 ? 300 : 900;
    const shape s = {
        .batch = check_int(1, 2),
        .heads = kv_heads * check_int(1, 3),
        .kv_heads = kv_heads,
        .q_len = length_at_random(n % 10 ? 200 : 330),
        .k_len = length_at_random(longest),
        .dim = channels_at_random(),
        .dim_v = channels_at_random(),
        .q = dtype_at_random(),
        .k = dtype_at_random(),
        .v = dtype_at_random(),
        .layout_q = layout_at_random(),
        .layout_k = layout_at_random(),
        .layout_v = layout_at_random(),
    };
    problem x = question(&s, r);
    static const int64_t groups[] = {0, 16, 32, 64, 128, 200};
    x.o.skip_rows = groups[check_int(0, 5)];
    if (r->n < 5 && check_int(0, 2) == 0)
        x.o.skip_rows = check_int(1, 140);
    x.o.causal = (sparge_causal)check_int(SPARGE_CAUSAL_NONE, SPARGE_CAUSAL_START);
    sparge_thresholds each[6];
    vary(&x, each);
    x.o.cell = check_int(0, 1) ? (int64_t)1 << check_int(0, 6) : 0;
    for (int h = 0; h < 6; h++)
        each[h].min_mass = check_int(0, 1) ? check_uniform(0.0f, 2.0f) : 0.0f;
    x.o.thresholds.min_mass = each[0].min_mass;
    const terms t = {check_int(0, 2) != 0, dtype_at_random(), layout_at_random(), check_int(0, 2)};
    if (!t.predict && check_int(0, 3))
        mask_at_random(&x);
    any_schedule();
    reply want = ask_ref(&x, &t), got = ask_kernel(&x, r, &t);
    compare(&x, r, &got, &want);
    const sparge_counts *c = &want.a.result.counts;
    sum->pairs += c->pairs;
    sum->kept += c->qk_done;
    sum->skipped += (double)c->qk_done - c->pv_done;
    if (t.predict) { /* stage 1 alone gives the same mask */
        sparge_mask alone = wide_mask(&x, t.spare);
        twins there = {.count = 0};
        const sparge_problem p = twin_problem(&there, &x);
        sparge_mask m = twin_mask(&there, &alone);
        sparge_error error;
        check(sparge_predict(&p, &x.o, &m, NULL, &error) == SPARGE_OK, "%s", error.text);
        twins_fetch(&there);
        twins_free(&there);
        check_same_as("mask", alone.bits, want.mask.bits,
                      alone.batch * alone.heads * alone.q_blocks * alone.words);
        check_free(alone.bits);
    }
    forget(&want);
    forget(&got);
    problem_free(&x);
}

static void ask_a_kernel(int index)
{
    const kernel *r = &kernels[index];
    const int64_t cases = plain_quick() ? 4 : r->n == 1 ? 15 : r->n <= 3 ? 30 : 70;
    totals sum = {0};
    fresh_device();
    if (!runs_here(r->n)) {
        plain_log("kernel %d does not run here", r->n);
        return;
    }
    for (int64_t n = 0; n < cases; n++) {
        check_case("kernel %d pv %d question %lld", r->n, (int)r->pv_dtype, (long long)n);
        ask_at_random(n, r, &sum);
    }
    plain_log("%lld of %lld pairs kept, P.V of %.0f skipped; worst row at %.2f of its bound",
              (long long)sum.kept, (long long)sum.pairs, sum.skipped, worst_ratio[index]);
    check(plain_quick() || (sum.kept < sum.pairs * 19 / 20 && sum.skipped > (double)sum.kept / 100),
          "too little was dropped or skipped");
}

Test(gpu, questions_1_float) { ask_a_kernel(0); }
Test(gpu, questions_2_float) { ask_a_kernel(1); }
Test(gpu, questions_3_int8) { ask_a_kernel(2); }
Test(gpu, questions_4_half) { ask_a_kernel(3); }
Test(gpu, questions_4_int8) { ask_a_kernel(4); }
Test(gpu, questions_5_fp8) { ask_a_kernel(5); }
Test(gpu, questions_5_half) { ask_a_kernel(6); }

/* Tile edges of queries and keys and a causal edge at every place. */
Test(gpu, every_length)
{
    fresh_device();
    const int64_t step = plain_quick() ? 29 : 1;
    for (int64_t n = 0; n <= 200; n += step)
        for (int turn = 0; turn < 2; turn++) {
            const int64_t other = turn ? n * 37 % 201 : (n * 91 + 13) % 201;
            const kernel *r = &kernels[(n + n / 7 + 3 * turn) % RUNGS];
            check_case("kernel %d pv %d q_len %lld k_len %lld", r->n, (int)r->pv_dtype,
                       (long long)(turn ? other : n), (long long)(turn ? n : other));
            const shape s =
                shape_of(1, 2, 1, turn ? other : n, turn ? n : other, 1 + n % 40, 1 + n * 7 % 40);
            if (!runs_here(r->n))
                continue;
            problem x = question(&s, r);
            static const int64_t groups[] = {16, 32, 64, 128};
            x.o.causal = (sparge_causal)(n % 3);
            x.o.skip_rows = groups[n / 3 % 4];
            x.o.thresholds =
                (sparge_thresholds){0.2f, 0.8f, SPARGE_OFF, n % 4 ? -1.0f : -INFINITY, 0};
            any_schedule();
            verify(&x, r, n % 5 != 0);
            problem_free(&x);
        }
}
