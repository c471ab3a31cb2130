/* SPDX-License-Identifier: Apache-2.0 */
/* partial.c: blocks that are attended in part, and a bias per key, on the kernels that take them.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "sparge_cuda.h"
#include "sparge_mask.h"
#include "tests/gpu/gpu.h"

TestSuite(partial);

#define EACH_THAT_HIDES(r) for (const kernel *r = kernels; r->n <= 4; r++)

/* The mask of these pairs, [batch][heads][q_len][k_len]. */
static void set_pairs(problem *x, const uint8_t *pairs)
{
    sparge_error error;
    sparge_mask_free(&x->mask);
    check(sparge_mask_from_pairs(&x->mask, &x->p, &x->o, pairs, &error) == SPARGE_OK, "%s",
          error.text);
}

static uint8_t *no_pairs(const problem *x)
{
    uint8_t *pairs = calloc((size_t)(problem_rows(x) * x->p.k_len) + 1, 1);
    check(pairs, "no memory");
    return pairs;
}

/* Every third pair. */
static void hide_most(problem *x)
{
    uint8_t *pairs = no_pairs(x);
    for (int64_t n = 0; n < problem_rows(x) * x->p.k_len; n += 3)
        pairs[n] = 1;
    set_pairs(x, pairs);
    free(pairs);
}

/* ---- Beside the reference ---- */

Test(partial, questions_at_random)
{
    fresh_device();
    for (int n = 0; n < (plain_quick() ? 3 : 24); n++)
        EACH_THAT_HIDES(r)
        {
            const int64_t kv = check_int(1, 2), heads = kv * check_int(1, 2);
            const int64_t q_len = check_int(1, 280), k_len = check_int(1, 280);
            check_case("kernel %d pv %d, %d: %lld queries, %lld keys", r->n, (int)r->pv_dtype, n,
                       (long long)q_len, (long long)k_len);
            problem x = question_of(r, check_int(1, 2), heads, kv, q_len, k_len, check_int(1, 40),
                                    check_int(1, 70));
            sparge_thresholds each[6];
            any_schedule();
            vary(&x, each);
            static const int64_t rows[] = {1, 16, 48, 64, 128};
            x.o.skip_rows = rows[check_int(0, 4)];
            x.o.causal = (sparge_causal)check_int(0, 2);
            if (n % 3 != 2) {
                mask_at_random(&x);
                mask_fill_partial(&x, 0.7f);
            }
            if (n % 3 != 0)
                bias_fill(&x, check_int(0, 1));
            verify(&x, r, false);
            if (n % 3 == 2)
                verify(&x, r, true);
            problem_free(&x);
        }
    fresh_device();
}

/* ---- Answers that are known ---- */

/* Queries attend to the keys of their own residue of 3 alone. Key 70 has a NaN in k or in v, or a
 * bias that is one or infinite, and is hidden by a bias of -inf in one case. q of a row that
 * attends to nothing is NaN too. */
Test(partial, what_is_hidden_goes_nowhere)
{
    enum { ROWS = 200, KEYS = 150, DIM = 8 };
    fresh_device();
    EACH_THAT_HIDES(r)
    for (int of = 0; of < 5; of++) {
        static const float of_70[] = {0.25f, 0.25f, -INFINITY, NAN, INFINITY};
        check_case("kernel %d pv %d, %d", r->n, (int)r->pv_dtype, of);
        problem x = question_of(r, 1, 1, 1, ROWS, KEYS, DIM, DIM);
        uint8_t *pairs = no_pairs(&x);
        for (int64_t n = 0; n < (int64_t)ROWS * KEYS; n++)
            pairs[n] = n / KEYS % 3 == n % KEYS % 3 && n / KEYS != 77;
        set_pairs(&x, pairs);
        free(pairs);
        x.q.x[77 * DIM] = NAN;
        if (of < 3)
            (of == 1 ? &x.v : &x.k)->x[70 * DIM + 3] = NAN;
        if (of)
            bias_fill(&x, false);
        for (int64_t t = 0; t < KEYS && of; t++)
            x.k_bias[t] = t == 70 ? of_70[of] : 0.25f;
        answer a = verified(&x, r);
        for (int64_t e = 0; e < (int64_t)ROWS * DIM; e++) {
            const int64_t row = e / DIM;
            const bool nan = row % 3 == 70 % 3 && of != 2 && (of != 1 || e % DIM == 3);
            if (row == 77)
                check(a.o.x[e] == 0.0f && a.lse[row] == -INFINITY, "row 77 is %g, lse %g",
                      (double)a.o.x[e], (double)a.lse[row]);
            else
                check(isnan(a.o.x[e]) == nan, "o[%lld] is %g", (long long)e, (double)a.o.x[e]);
        }
        forget_both(&a, &x);
    }
}

/* Block 0 has the large scores, and all rows would skip block 1; those that attend to nothing of
 * it, or of either, keep nobody from it. In group 1 they are all the rows, which skip nothing. */
Test(partial, rows_without_keys_cast_no_vote)
{
    enum { ROWS = 48, KEYS = 128 };
    fresh_device();
    EACH_THAT_HIDES(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        problem x = question_of(r, 1, 1, 1, ROWS, KEYS, 1, 1);
        x.o.smooth_k = false;
        x.o.skip_rows = 16;
        x.o.thresholds.lambda = -2.0f;
        tensor_fill(&x.q, 8.0f, 8.0f);
        for (int64_t t = 0; t < KEYS; t++)
            x.k.x[t] = t < 64 ? 2.0f : 1.0f;
        uint8_t *pairs = no_pairs(&x);
        int64_t tokens[2] = {0, 0}; /* attended, of each block */
        for (int64_t row = 0; row < ROWS; row++)
            for (int64_t t = 0; t < KEYS; t++) {
                const bool in_0 = row % 16 != 3, in_1 = row % 16 != 3 && row % 16 != 5;
                pairs[row * KEYS + t] = t % 2 && (t < 64 ? in_0 : in_1 && row / 16 != 1);
                tokens[t / 64] += pairs[row * KEYS + t];
            }
        set_pairs(&x, pairs);
        free(pairs);
        answer a = verified(&x, r);
        check_equal(a.result.counts.tokens, (int64_t)ROWS * KEYS);
        check_equal(a.result.counts.tile_tokens, (int64_t)ROWS * KEYS);
        check_equal(a.result.counts.qk_tokens, tokens[0] + tokens[1]);
        check_equal(a.result.counts.pv_tokens, tokens[0]);
        check_equal(a.result.counts.pv_done, 1.0 + 16.0 / 48.0);
        for (int64_t row = 0; row < ROWS; row++)
            check((a.lse[row] == -INFINITY) == (row % 16 == 3), "lse[%lld] is %g", (long long)row,
                  (double)a.lse[row]);
        forget_both(&a, &x);
    }
}

/* One pair a row: o is the value of its key, and lse its score, with a bias or without one. */
Test(partial, one_key_of_each_row)
{
    enum { ROWS = 150, KEYS = 200, DIM = 16 };
    fresh_device();
    EACH_THAT_HIDES(r)
    for (int biased = 0; biased < 2; biased++) {
        check_case("kernel %d pv %d, biased %d", r->n, (int)r->pv_dtype, biased);
        problem x = question_of(r, 1, 1, 1, ROWS, KEYS, DIM, 1);
        x.o.smooth_k = false;
        uint8_t *pairs = no_pairs(&x);
        if (biased)
            bias_fill(&x, false);
        for (int64_t t = 0; t < KEYS; t++) {
            x.v.x[t] = 1.0f + (float)(t % 64) / 64.0f;
            if (biased)
                x.k_bias[t] = (float)(t % 7) - 3.0f;
        }
        for (int64_t row = 0; row < ROWS; row++)
            pairs[row * KEYS + row * 37 % KEYS] = 1;
        set_pairs(&x, pairs);
        free(pairs);
        answer a = verified(&x, r);
        for (int64_t row = 0; row < ROWS; row++) {
            const int64_t key = row * 37 % KEYS;
            double score = biased ? (double)x.k_bias[key] : 0.0;
            for (int64_t c = 0; c < DIM; c++)
                score += (double)x.q.x[row * DIM + c] * (double)x.k.x[key * DIM + c] / 4.0;
            check_close(a.o.x[row], x.v.x[key], 0.02);
            check_close(a.lse[row], score, 0.1);
        }
        forget_both(&a, &x);
    }
}

/* ---- Which kernels do it ---- */

static sparge_status attend_by(scene *s, int n, sparge_dtype qk, sparge_dtype pv)
{
    s->o.cuda.kernel = n;
    s->o.qk_dtype = qk;
    s->o.pv_dtype = pv;
    return scene_call(s);
}

Test(partial, kernel_5_refuses_and_another_is_found)
{
    fresh_device();
    for (int biased = 0; biased < 2; biased++) {
        check_case("biased %d", biased);
        problem x = question_of(&kernels[3], 1, 2, 1, 150, 200, 24, 40);
        if (biased)
            bias_fill(&x, false);
        else
            hide_most(&x);
        scene s;
        scene_open(&s, &x, &kernels[3], false);
        if (runs_here(5)) {
            check_equal(attend_by(&s, 5, SPARGE_INT8, SPARGE_FP8), SPARGE_ERR_UNSUPPORTED);
            check(strstr(s.error.text, biased ? "kernel is 5, which does not take k_bias"
                                              : "kernel is 5, which does not take partly attended"),
                  "%s", s.error.text);
        }
        check(attend_by(&s, 0, SPARGE_INT8, SPARGE_FASTEST) == SPARGE_OK, "%s", s.error.text);
        check_equal(s.result.kernel, 4);
        check_equal(s.result.pv_dtype, SPARGE_F16);
        const int64_t needed = s.result.workspace_bytes;
        int64_t bytes;
        check(sparge_workspace_bytes(&s.p, &s.o, true, &bytes, &s.error) == SPARGE_OK, "%s",
              s.error.text);
        check(bytes >= needed, "%lld bytes, said %lld", (long long)needed, (long long)bytes);
        check(attend_by(&s, 0, SPARGE_F32, SPARGE_FASTEST) == SPARGE_OK, "%s", s.error.text);
        check_equal(s.result.kernel, 2);
        check_equal(attend_by(&s, 0, SPARGE_INT8, SPARGE_FP8), SPARGE_ERR_UNSUPPORTED);
        if (biased && runs_here(5)) { /* which a prediction ignores */
            s.o.cuda.kernel = 5;
            sparge_mask mask = wide_mask(&x, 0), there = twin_mask(&s.outputs, &mask);
            check(sparge_predict(&s.p, &s.o, &there, NULL, &s.error) == SPARGE_OK, "%s",
                  s.error.text);
            check_free(mask.bits);
        }
        scene_close(&s);
        problem_free(&x);
    }
}

Test(partial, arrays_in_host_memory)
{
    static const char *const names[] = {"mask.partial_first", "mask.partial_block",
                                        "mask.partial_bits", "k_bias"};
    fresh_device();
    for (int n = 0; n < COUNT(names); n++) {
        check_case("%s", names[n]);
        problem x = question_of(&kernels[3], 1, 1, 1, 150, 200, 24, 40);
        hide_most(&x);
        bias_fill(&x, false);
        scene s;
        scene_open(&s, &x, &kernels[3], false);
        switch (n) {
        case 0: s.given.partial_first = x.mask.partial_first; break;
        case 1: s.given.partial_block = x.mask.partial_block; break;
        case 2: s.given.partial_bits = x.mask.partial_bits; break;
        default: s.p.k_bias = x.p.k_bias;
        }
        scene_poison(&s);
        check_equal(scene_call(&s), SPARGE_ERR_ARGUMENT);
        check(strstr(s.error.text, names[n]) && strstr(s.error.text, "host memory"), "%s",
              s.error.text);
        check(scene_untouched(&s), "written after an error");
        scene_close(&s);
        problem_free(&x);
    }
}
