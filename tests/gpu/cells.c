/* SPDX-License-Identifier: Apache-2.0 */
/* cells.c: masks by min_mass and by cells are ref's, and so are the masses. */
#include <float.h>
#include <math.h>

#include "tests/gpu/gpu.h"

TestSuite(cells);

static const int64_t cells[] = {0, 1, 2, 4, 8, 16, 32, 64};

/* Some of all selectors; shares far above and far below an even one too. */
static sparge_thresholds thresholds_with_min_mass(void)
{
    static const float shares[] = {0.0f, FLT_MIN, 0.01f, 0.2f, 1.0f, 5.0f, 300.0f, FLT_MAX};
    sparge_thresholds t = thresholds_at_random();
    t.min_mass = check_int(0, 3) ? shares[check_int(0, COUNT(shares) - 1)] : check_uniform(0, 2);
    if (t.min_mass > 0.0f && check_int(0, 1))
        t.tau = t.topk = SPARGE_OFF;
    return t;
}

/* The prediction alone. */
static void ask_at_random(int64_t longest)
{
    const int64_t kv_heads = check_int(1, 2);
    const shape s = {
        .batch = check_int(1, 2),
        .heads = kv_heads * check_int(1, 3),
        .kv_heads = kv_heads,
        .q_len = check_int(1, 300),
        .k_len = check_int(1, longest),
        .dim = check_int(0, 3) ? check_int(1, 40) : check_int(1, 128),
        .dim_v = 1,
        .q = dtype_at_random(),
        .k = dtype_at_random(),
        .layout_q = layout_at_random(),
        .layout_k = layout_at_random(),
    };
    problem x = question(&s, &kernels[2]);
    sparge_thresholds each[6];
    x.o.cell = cells[check_int(0, COUNT(cells) - 1)];
    x.o.causal = (sparge_causal)check_int(SPARGE_CAUSAL_NONE, SPARGE_CAUSAL_START);
    vary(&x, each);
    x.o.thresholds = thresholds_with_min_mass();
    for (int h = 0; h < 6; h++)
        each[h] = thresholds_with_min_mass();
    any_schedule();
    verify_prediction(&x, &kernels[2], check_int(0, 2));
    problem_free(&x);
}

Test(cells, questions_at_random)
{
    fresh_device();
    for (int n = 0; n < (plain_quick() ? 20 : 150); n++) {
        check_case("question %d", n);
        ask_at_random(n % 10 ? 400 : 3000);
    }
}

/* Every edge of a cell, a block and causality. */
Test(cells, every_length)
{
    fresh_device();
    for (int64_t n = 0; n <= 200; n += plain_quick() ? 23 : 1)
        for (int turn = 0; turn < 2; turn++) {
            const int64_t other = turn ? n * 37 % 201 : (n * 91 + 13) % 201;
            problem x = question_of(&kernels[2], 1, 2, 1, turn ? other : n, turn ? n : other,
                                    1 + n % 40, 1);
            x.o.cell = cells[1 + (n + turn) % 7];
            x.o.causal = (sparge_causal)(n % 3);
            x.o.sink = n % 2;
            x.o.thresholds =
                (sparge_thresholds){-1.0f, n % 5 ? SPARGE_OFF : 0.7f, SPARGE_OFF, -INFINITY, 0.5f};
            check_case("q_len %lld k_len %lld cell %lld causal %d", (long long)x.p.q_len,
                       (long long)x.p.k_len, (long long)x.o.cell, (int)x.o.causal);
            any_schedule();
            verify_prediction(&x, &kernels[2], 0);
            problem_free(&x);
        }
}

/* Sums and products that f32 does not hold, and scales that make of every difference all or
 * nothing: what is not the best of its row then has no mass, and many blocks tie at 0. */
Test(cells, huge_values)
{
    static const float size[] = {1e-38f, 1e10f, 1e18f, 1e38f}, scale[] = {FLT_MIN, 1.0f, FLT_MAX};
    fresh_device();
    for (int64_t n = 0; n < COUNT(size) * COUNT(scale) * 3; n += 1 + 4 * plain_quick()) {
        check_case("size %g, scale %g", (double)size[n % COUNT(size)], (double)scale[n / 4 % 3]);
        problem x = question_of(&kernels[2], 1, 2, 1, 140, 700, 9, 1);
        tensor *const of[] = {&x.q, &x.k};
        for (int t = 0; t < 2; t++)
            for (int64_t e = 0; e < tensor_count(of[t]); e++)
                of[t]->x[e] *= size[n % COUNT(size)];
        problem_write(&x);
        x.o.cell = cells[1 + n % 7];
        x.o.softmax_scale = scale[n / 4 % 3];
        x.o.smooth_k = n % 2;
        x.o.causal = (sparge_causal)(n % 3);
        x.o.thresholds = (sparge_thresholds){-1.0f, n % 2 ? 1.0f : 0.9f, n % 3 ? SPARGE_OFF : 0.4f,
                                             -INFINITY, n % 5 ? 0.1f : 0.0f};
        verify_prediction(&x, &kernels[2], 0);
        problem_free(&x);
    }
}

/* Blocks of few different masses: ties at every place where a row may end. */
Test(cells, ties)
{
    static const float share[] = {SPARGE_OFF, 0.0f, 0.3f, 0.5f, 0.98f, 1.0f};
    fresh_device();
    for (int values = 1; values <= 3; values++) {
        const int64_t tokens = 64 * (plain_quick() ? 20 : 40);
        problem x = question_of(&kernels[2], 1, 1, 1, 128 * 2, tokens, 4, 1);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t c = 0; c < 4; c++)
                x.k.x[t * 4 + c] = (float)(t / 64 * 7919 % 40 % values) * 0.25f;
        problem_write(&x);
        for (int64_t tau = 0; tau < COUNT(share); tau++)
            for (int64_t topk = tau == 0; topk < COUNT(share); topk += 1 + 2 * plain_quick()) {
                check_case("ties of %d, tau %g, topk %g", values, (double)share[tau],
                           (double)share[topk]);
                x.o.cell = cells[(tau + topk) % COUNT(cells)];
                x.o.thresholds = (sparge_thresholds){-1.0f, share[tau], share[topk], -INFINITY,
                                                     topk % 2 ? 0.0f : 1.0f};
                x.o.causal = (sparge_causal)(topk % 3);
                verify_prediction(&x, &kernels[2], 1);
            }
        problem_free(&x);
    }
}

static int64_t kept_by(problem *x, float min_mass)
{
    x->o.thresholds = (sparge_thresholds){-1.0f, SPARGE_OFF, SPARGE_OFF, -INFINITY, min_mass};
    answer a = attention(x, NULL);
    const int64_t kept = a.result.counts.qk_done;
    answer_free(&a);
    return kept;
}

/* Known without a reference: keys that are all the same share alike, and one share is not above
 * itself. */
Test(cells, keys_that_are_all_the_same_have_one_share_each)
{
    EACH_CASE(r, n, COUNT(cells), 3)
    {
        problem x = question_of(r, 1, 1, 1, 250, 64 * 5, 6, 1);
        for (int64_t e = 0; e < tensor_count(&x.k); e++)
            x.k.x[e] = (float)(e % 6);
        problem_write(&x);
        use(&x, r);
        x.o.smooth_k = false;
        x.o.cell = cells[n];
        check_equal(kept_by(&x, 0.999f), (int64_t)10);
        check_equal(kept_by(&x, 1.0f), (int64_t)0);
        problem_free(&x);
    }
}

/* A key that is unlike its block shows in the mean of its cell alone. */
Test(cells, one_key_that_a_block_hides)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 1, 1, 1, 128, 64 * 10, 2, 1);
        for (int64_t t = 0; t < x.p.q_len; t++)
            x.q.x[2 * t] = 1.0f, x.q.x[2 * t + 1] = 0.0f;
        for (int64_t t = 0; t < x.p.k_len; t++)
            x.k.x[2 * t] = t == 64 * 7 + 20 ? 100.0f : t / 64 == 7 ? -1.0f : 0.0f;
        problem_write(&x);
        use(&x, r);
        x.o.smooth_k = false;
        x.o.softmax_scale = 1.0f;
        x.o.cell = 4;
        check_equal(kept_by(&x, 5.0f), (int64_t)1);
        x.o.cell = 64;
        check_equal(kept_by(&x, 5.0f), (int64_t)0);
        problem_free(&x);
    }
}

#ifdef SPARGE_CUDA_MODEL
/* Where shared memory has no room for the products of a group they are computed twice, and where it
 * has none for the codes of all rows, those come in several groups. */
Test(cells, little_shared_memory)
{
    static const struct {
        int64_t blocks, cell;
    } of[] = {{20, 1}, {40, 2}, {500, 4}, {1200, 8}, {3700, 16}};
    /* rows at once: 16 of 128, of 64, 15 of 32, 5 of 16, 1 of 8 */
    for (int64_t n = 0; n < COUNT(of); n++) {
        fresh_device();
        cuda_model_settings.shared_memory = 40 << 10;
        check_case("%lld key blocks, cells of %lld", (long long)of[n].blocks,
                   (long long)of[n].cell);
        problem x = question_of(&kernels[2], 1, 1, 1, 150, 64 * of[n].blocks - 5, 1, 1);
        x.o.cell = of[n].cell;
        x.o.causal = (sparge_causal)(n % 3);
        x.o.thresholds = (sparge_thresholds){-1.0f, SPARGE_OFF, SPARGE_OFF, -INFINITY, 0.9f};
        verify_prediction(&x, &kernels[2], 0);
        problem_free(&x);
    }
    fresh_device();
}
#endif
