/* SPDX-License-Identifier: Apache-2.0 */
/* differential.c: the reference against the cpu backend on every instruction set that is here, all
 * bits, on questions as wild as they may be: numbers of any size, infinities, NaN, subnormals and
 * zeros of both signs, in any shape, layout (broadcast ones too), dtype, mask and option. For as
 * many seconds as SPARGE_FUZZ_SECONDS says, 5 where it says nothing, from another seed each time
 * unless SPARGE_SEED is set. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "tests/support/agree.h"

TestSuite(differential);

static bool often(int in) { return check_int(0, in - 1) != 0; }

/* 2^n for n in [low, high], times at most 2. */
static float sized(int64_t low, int64_t high)
{
    const float x = ldexpf(check_uniform(1.0f, 2.0f), (int)check_int(low, high));
    return check_int(0, 1) ? x : -x;
}

static float special(void)
{
    static const float odd[] = {0.0f,  1.0f,  FLT_MIN, 0x1p-149f, 0x1p-140f, FLT_MAX,
                                1e38f, 1e20f, 1e19f,   65504.0f,  1e-20f};
    static const float worse[] = {INFINITY, -INFINITY, NAN};
    if (!often(30))
        return worse[check_int(0, 2)];
    const float x = odd[check_int(0, (int64_t)(sizeof odd / sizeof *odd) - 1)];
    return check_int(0, 1) ? x : -x;
}

/* Runs of rows of one kind each, so that some blocks overflow where others do not. */
static void make_wild(tensor *t)
{
    const int64_t lines = t->batch * t->heads * t->tokens;
    const int kind = (int)check_int(0, 5);
    for (int64_t line = 0, end = 0; line < lines && kind < 4; line++) {
        static float size;
        static int64_t low;
        static bool constant;
        if (line == end) {
            end = line + check_int(1, 60);
            size = check_int(0, 2) ? sized(-149, 126) : check_int(0, 1) ? 0.0f : special();
            low = check_int(-149, 120);
            constant = check_int(0, 1);
        }
        const float same = constant ? check_uniform(-1.0f, 1.0f) : 0.0f;
        for (int64_t c = 0; c < t->channels; c++) {
            float *x = &t->x[line * t->channels + c];
            switch (kind) {
            case 0: *x = size * (constant ? 1.0f : check_normal()); break;
            case 1:
                *x = constant ? same * size : sized(low, low + 20 < 127 ? low + 20 : 127);
                break;
            case 2: *x = check_int(0, 3) ? *x : special(); break;
            default: *x = often(40) ? *x * size : special(); break;
            }
        }
    }
}

/* Some axes of length beyond 1 read the same element again and again. */
static void broadcast(sparge_in *in)
{
    int64_t *const stride[] = {&in->batch, &in->head, &in->token};
    for (int n = 0; n < 3; n++)
        if (!often(16))
            *stride[n] = 0;
}

static void ask_wildly(void)
{
    const int64_t kv_heads = check_int(1, 2), longest = check_int(0, 3)   ? 40
                                                        : check_int(0, 3) ? 90
                                                                          : 260;
    const shape s = {
        .batch = check_int(1, 2),
        .heads = kv_heads * check_int(1, 3),
        .kv_heads = kv_heads,
        .q_len = check_int(often(20), longest),
        .k_len = check_int(often(20), longest),
        .dim = channels_at_random(),
        .dim_v = channels_at_random(),
        .q = dtype_at_random(),
        .k = dtype_at_random(),
        .v = dtype_at_random(),
        .layout_q = layout_at_random(),
        .layout_k = layout_at_random(),
        .layout_v = layout_at_random(),
    };
    problem x = problem_make(&s);
    x.o.block_q = check_int(1, check_int(0, 1) ? 16 : 128);
    x.o.block_k = check_int(1, check_int(0, 1) ? 16 : 128);
    x.o.qk_dtype = cpu_dtypes[check_int(0, 3)];
    x.o.pv_dtype = cpu_dtypes[check_int(0, 3)];
    x.o.causal = (sparge_causal)check_int(SPARGE_CAUSAL_NONE, SPARGE_CAUSAL_START);
    x.o.skip_rows = check_int(0, 1) ? 0 : check_int(1, 140);
    make_wild(&x.q);
    make_wild(&x.k);
    make_wild(&x.v);
    sparge_thresholds each[6];
    vary(&x, each);
    if (check_int(0, 1))
        masses_at_random(&x, each, check_int(0, 1) ? 16 : 128);
    if (check_int(0, 2) == 0)
        x.o.softmax_scale = fabsf(sized(-126, 126));
    broadcast(&x.p.q);
    broadcast(&x.p.k);
    broadcast(&x.p.v);
    const way how = check_int(0, 1) ? ATTENTION : ATTEND;
    if (how == ATTEND && check_int(0, 3))
        mask_at_random(&x);
    if (how == ATTEND && check_int(0, 1))
        mask_fill_partial(&x, check_uniform(0.1f, 1.1f));
    if (check_int(0, 2) == 0)
        bias_fill(&x, check_int(0, 1));
    const int threads[] = {(int)check_int(1, 2), 0};
    verify_with(&x, how, how == ATTEND ? dtype_at_random() : SPARGE_F32,
                how == ATTEND ? layout_at_random() : PACKED, threads, NULL);
    problem_free(&x);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

Test(differential, wild_questions)
{
    const char *wanted = getenv("SPARGE_FUZZ_SECONDS");
    const double end = now() + (wanted ? strtod(wanted, NULL) : 5.0);
    char seed[32];
    snprintf(seed, sizeof seed, "%lld", (long long)time(NULL));
    setenv("SPARGE_SEED", seed, 0);
    int64_t n = 0;
    do {
        check_case("question %lld", (long long)n++);
        ask_wildly();
    } while (now() < end);
    cr_log_info("%lld questions", (long long)n);
}
