/* SPDX-License-Identifier: Apache-2.0 */
/* values.c: the cuda backend's answers where a reader knows them without a reference: what is not
 * finite, magnitudes, scores and values where kernels go wrong. Where the authors' released kernels
 * do, it is said. */
#include <math.h>
#include <stdlib.h>

#include "tests/gpu/gpu.h"

TestSuite(values);

/* ---- What is not finite (algorithm.md, section 1) ---- */

/* One element of q, k or v at every kind of place; lambda skips some of it. Where NaN stands is
 * ref's, and checked here besides for what ref itself could get wrong: rows that cannot see it. */
Test(values, one_element_that_is_nonfinite)
{
    static const float special[] = {INFINITY, -INFINITY, NAN};
    static const int64_t tokens[] = {0, 63, 128, 199};
    fresh_device();
    EACH_RUNG(r)
    for (int where = 0; where < 3; where++)
        for (int64_t n = 0; n < COUNT(tokens); n += plain_quick() ? 6 : 1) {
            check_case("kernel %d pv %d, tensor %d, token %lld", r->n, (int)r->pv_dtype, where,
                       (long long)tokens[n]);
            problem x = question_of(r, 1, 2, 1, 200, 200, 12, 33);
            x.o.causal = n % 2 ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
            x.o.thresholds =
                (sparge_thresholds){0.0f, 0.6f, SPARGE_OFF, n % 3 ? -INFINITY : -0.5f, 0};
            x.o.skip_rows = n % 2 ? 16 : 128;
            tensor *t = where == 0 ? &x.q : where == 1 ? &x.k : &x.v;
            t->x[tokens[n] * t->channels + t->channels - 1] = special[n % 3];
            problem_write(&x);
            verify(&x, r, true);
            mask_fill(&x, 0.6f);
            answer a = verified(&x, r);
            for (int64_t at = 0; at < tensor_count(&a.o); at++) {
                const int64_t row = at / 33 % 200, c = at % 33;
                const bool may = where == 0   ? row == tokens[n] && at < 200 * 33
                                 : where == 1 ? !x.o.causal || row >= tokens[n]
                                              : c == 32 && (!x.o.causal || row >= tokens[n]);
                check(may || isfinite(a.o.x[at]), "o[%lld] is %g", (long long)at,
                      (double)a.o.x[at]);
            }
            forget_both(&a, &x);
        }
}

/* Beyond binary16, which pv HALF cannot hold; the last value that rounds down, and both signs. */
Test(values, v_beyond_binary16)
{
    static const float v[] = {65504.0f, 65519.0f, 65520.0f, -65520.0f, 1e30f, -65519.996f};
    EACH_CASE(r, n, COUNT(v), 1)
    {
        problem x = question_of(r, 1, 1, 1, 130, 130, 8, 8);
        x.v.x[70 * 8 + 3] = v[n];
        check_answers(&x, r, GIVEN);
    }
}

/* K and V of blocks that no row keeps, and the memory between elements (tensor_make leaves NaN
 * there). Steps of q and k are whole blocks', so nothing of a kept block changes. */
Test(values, nan_in_blocks_that_no_row_keeps)
{
    fresh_device();
    EACH_RUNG(r)
    for (int layout = PADDED; layout < LAYOUTS; layout += 2) {
        check_case("kernel %d pv %d, layout %d", r->n, (int)r->pv_dtype, layout);
        shape s = shape_of(1, 2, 1, 200, 400, 40, 72);
        s.layout_q = s.layout_k = s.layout_v = (tensor_layout)layout;
        problem x = question(&s, r);
        x.o.smooth_k = false;
        x.o.thresholds.lambda = layout == ODD ? -1.0f : -INFINITY;
        set_mask(&x, second_alone);
        answer clean = answer_of(&x, r);
        float top[72] = {0}; /* of fp8 one step is a whole head's */
        for (int64_t t = 0; t < 400; t++)
            for (int64_t c = 0; c < 72; c++)
                top[c] = fmaxf(top[c], fabsf(x.v.x[t * 72 + c]));
        for (int64_t t = 0; t < 400; t++) {
            if (t / 64 == 1)
                continue;
            for (int64_t c = 0; c < 40; c++)
                x.k.x[t * 40 + c] = NAN;
            for (int64_t c = 0; c < 72; c++)
                x.v.x[t * 72 + c] = t == 0 && r->pv_dtype == SPARGE_FP8 ? top[c] : NAN;
        }
        problem_write(&x);
        answer a = answer_of(&x, r);
        same_answer(&a, &clean);
        for (int64_t n = 0; n < tensor_count(&a.o); n++)
            check(isfinite(a.o.x[n]), "o[%lld] is %g", (long long)n, (double)a.o.x[n]);
        answer_free(&a);
        answer_free(&clean);
        problem_free(&x);
    }
}

/* ---- Scores ---- */

/* Scores of every size: c of 0, fractions that say nothing, scores beyond float. */
Test(values, magnitudes)
{
    static const float size[] = {1e-38f, 1e-20f, 1.0f, 1e4f, 1e8f, 1e15f, 1e19f, 1e38f};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t q = 0; q < COUNT(size); q += 1 + plain_quick())
        for (int64_t k = 0; k < COUNT(size); k++) {
            check_case("kernel %d pv %d, q of %g, k of %g", r->n, (int)r->pv_dtype, (double)size[q],
                       (double)size[k]);
            if (r->pv_dtype == SPARGE_F32 && size[q] * size[k] < 1e-35f)
                continue; /* of 0 and -0 either is the larger */
            problem x = question_of(r, 1, 1, 1, 20, 140, 8, 8);
            tensor_fill(&x.q, -size[q], size[q]);
            tensor_fill(&x.k, -size[k], size[k]);
            check_answers(&x, r, PREDICTED);
        }
}

/* Logits of 4.5e9 out of q and k that binary16 holds, and far larger ones: all of the weight is the
 * largest score's, and it is 1. */
Test(values, the_weight_of_the_maximum_is_one)
{
    static const float top[] = {25e3f, 1e6f, 1e12f, 1e30f};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t n = 0; n < COUNT(top); n++)
        for (int64_t at = 0; at < 200; at += 66) {
            check_case("kernel %d pv %d, q of %g, key %lld", r->n, (int)r->pv_dtype, (double)top[n],
                       (long long)at);
            problem x = question_of(r, 1, 1, 1, 140, 200, 64, 8);
            x.o.smooth_k = false;
            tensor_fill(&x.q, top[n], top[n]);
            for (int64_t e = 0; e < tensor_count(&x.k); e++)
                x.k.x[e] = e / 64 == at ? 22500.0f : 0.0f;
            for (int64_t e = 0; e < tensor_count(&x.v); e++)
                x.v.x[e] = e / 8 == at ? 1.0f : 0.0f;
            answer a = verified(&x, r);
            const double logit = 8.0 * (double)top[n] * 22500.0;
            for (int64_t e = 0; e < tensor_count(&a.o); e++)
                check_close(a.o.x[e], 1.0, 1e-6);
            for (int64_t row = 0; row < 140; row++)
                check_close(a.lse[row], logit, 1e-6 * logit);
            forget_both(&a, &x);
        }
}

/* A block of keys whose scores leave float, before, between and behind two whose scores are 0: of a
 * row that they leave downward they weigh nothing, a row that they leave upward is NaN. */
Test(values, a_block_beyond_float)
{
    enum { DIM = 4, KEYS = 192, ROWS = 140 };
    EACH_CASE(r, n, 9, 1)
    {
        problem x = question_of(r, 1, 1, 1, ROWS, KEYS, DIM, DIM);
        x.o.smooth_k = false;
        x.o.skip_rows = 16;
        x.o.thresholds.lambda = n < 3 ? -INFINITY : n < 6 ? -1.0f : 0.0f;
        static const float size[] = {1e20f, 0.0f, -1e20f};
        for (int64_t e = 0; e < ROWS * DIM; e++) /* a third of the groups each */
            x.q.x[e] = size[e / DIM / 16 % 3];
        for (int64_t e = 0; e < KEYS * DIM; e++) {
            x.k.x[e] = e / DIM / 64 == n % 3 ? -1e20f : 0.0f;
            x.v.x[e] = e / DIM / 64 == n % 3 ? 4.0f : 1.0f;
        }
        answer a = verified(&x, r);
        for (int64_t row = 0; row < ROWS; row++)
            for (int64_t c = 0; c < DIM; c++) {
                const float o = a.o.x[row * DIM + c];
                if (row / 16 % 3 == 2) {
                    check(isnan(o) && isnan(a.lse[row]), "row %lld is %g, lse %g", (long long)row,
                          (double)o, (double)a.lse[row]);
                } else if (row / 16 % 3 == 0) {
                    check_close(o, 1.0, 1e-6);
                    check_close(a.lse[row], log(n < 6 ? 128.0 : 64.0), 1e-6);
                } else { /* lambda of 0 skips what is no larger */
                    check_close(o, n < 6 ? 2.0 : n == 6 ? 4.0 : 1.0, 1e-6);
                    check_close(a.lse[row], log(n < 6 ? 192.0 : 64.0), 1e-6);
                }
            }
        forget_both(&a, &x);
    }
}

/* All that a row sees in its kept block lies beyond float, downward: it is NaN, and no row without
 * keys. */
Test(values, nothing_but_scores_of_minus_infinity)
{
    EACH_CASE(r, n, 2, 1)
    {
        problem x = question_of(r, 1, 1, 1, 200, 130, 4, 4);
        x.o.smooth_k = false;
        x.o.causal = SPARGE_CAUSAL_START;
        x.o.thresholds.lambda = n ? -1.0f : -INFINITY;
        tensor_fill(&x.q, 1e20f, 1e20f);
        tensor_fill(&x.k, -1e20f, -1e20f);
        set_mask(&x, second_alone);
        answer a = verified(&x, r);
        for (int64_t row = 0; row < 200; row++)
            for (int64_t c = 0; c < 4; c++) {
                const float o = a.o.x[row * 4 + c];
                check(row < 64 ? o == 0.0f && a.lse[row] == -INFINITY
                               : isnan(o) && isnan(a.lse[row]),
                      "row %lld is %g, lse %g", (long long)row, (double)o, (double)a.lse[row]);
            }
        forget_both(&a, &x);
    }
}

/* c is 0, but codes are not: every visible key weighs 1, a hidden one and padding nothing. */
Test(values, scores_whose_unit_is_zero)
{
    EACH_CASE(r, causal, 3, 1)
    {
        problem x = question_of(r, 1, 1, 1, 150, 170, 16, 1);
        x.o.causal = (sparge_causal)causal;
        x.o.smooth_k = false;
        tensor_fill(&x.q, -1e-24f, 1e-24f);
        tensor_fill(&x.k, -1e-24f, 1e-24f);
        for (int64_t t = 0; t < 170; t++)
            x.v.x[t] = (float)(t % 2);
        answer a = verified(&x, r);
        for (int64_t row = 0; row < 150; row++) {
            const int64_t seen = causal == SPARGE_CAUSAL_NONE    ? 170
                                 : causal == SPARGE_CAUSAL_START ? row + 1
                                                                 : row + 21;
            check_close(a.o.x[row], (double)(seen / 2) / (double)seen, 1e-6);
            check_close(a.lse[row], log((double)seen), 1e-5);
        }
        forget_both(&a, &x);
    }
}

/* c itself is not finite: rows are NaN if they see a key. */
Test(values, scores_whose_unit_is_infinite)
{
    EACH_CASE(r, n, 2, 1)
    {
        problem x = question_of(r, 1, 1, 1, 150, 100, 8, 8);
        x.o.causal = SPARGE_CAUSAL_END;
        x.o.smooth_k = false;
        x.o.thresholds.lambda = n ? -1.0f : -INFINITY;
        x.o.softmax_scale = 3e38f;
        tensor_fill(&x.q, -1e3f, 1e3f);
        tensor_fill(&x.k, -1e3f, 1e3f);
        answer a = verified(&x, r);
        for (int64_t e = 0; e < tensor_count(&a.o); e++) {
            const float o = a.o.x[e], lse = a.lse[e / 8];
            check(e / 8 < 50 ? o == 0.0f && lse == -INFINITY : isnan(o) && isnan(lse),
                  "row %lld is %g, lse %g", (long long)(e / 8), (double)o, (double)lse);
        }
        forget_both(&a, &x);
    }
}

/* Scores of +-1e4 give NaN there (m starts at -5e6 of them). */
Test(values, huge_and_hugely_negative_scores)
{
    static const float size[] = {1e4f, 1e6f, 3e7f};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t n = 0; n < COUNT(size); n++)
        for (int sign = -1; sign <= 1; sign += 2) {
            check_case("kernel %d pv %d, scores of %g", r->n, (int)r->pv_dtype,
                       (double)((float)sign * size[n]));
            problem x = question_of(r, 1, 1, 1, 130, 200, 4, 8);
            for (int64_t e = 0; e < tensor_count(&x.q); e++)
                x.q.x[e] = 1.0f;
            for (int64_t e = 0; e < tensor_count(&x.k); e++)
                x.k.x[e] = (float)sign * size[n] * (1.0f + 0.001f * (float)(e / 4 % 7)) / 2;
            x.o.smooth_k = false;
            answer a = verified(&x, r);
            for (int64_t e = 0; e < tensor_count(&a.o); e++)
                check(isfinite(a.o.x[e]) && fabsf(a.o.x[e]) < 4.0f, "o[%lld] is %g", (long long)e,
                      (double)a.o.x[e]);
            forget_both(&a, &x);
        }
}

/* Pull request 121: smooth_k = False crashes. Softmax does not change; lse gets back what it lost.
 */
Test(values, smoothing_off)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 1, 2, 1, 150, 200, 48, 32);
        use(&x, r);
        answer on = attend(&x);
        x.o.smooth_k = false;
        answer off = attend(&x);
        for (int64_t n = 0; n < problem_rows(&x); n++)
            check_close(on.lse[n], off.lse[n], r->qk_dtype == SPARGE_F32 ? 1e-4 : 0.05);
        near_dense(&x, r, false);
        answer_free(&on);
        answer_free(&off);
        problem_free(&x);
    }
}

/* ---- Values ---- */

/* Codes that are all 127 or all -127. */
Test(values, extremes)
{
    EACH_CASE(r, n, 8, 3)
    {
        problem x = question_of(r, 1, 1, 1, 140, 140, 128, 128);
        x.o.smooth_k = false;
        for (int64_t e = 0; e < tensor_count(&x.q); e++) {
            x.q.x[e] = n & 4 && e % 2 ? -1.0f : 1.0f;
            x.k.x[e] = (n & 1 ? -1.0f : 1.0f) * (n & 4 && e % 2 ? -1.0f : 1.0f);
            x.v.x[e] = n & 2 ? -1.0f : 1.0f;
        }
        check_answers(&x, r, GIVEN);
    }
}

/* 64 products of f16 overflow its sums there from |v| = 1023 on; v of bf16 is turned into f16. */
Test(values, large_values)
{
    static const float size[] = {1e3f, 6e4f, 1e30f};
    EACH_CASE(r, n, COUNT(size), 1)
    {
        if (r->pv_dtype == SPARGE_F16 && size[n] > 65000.0f)
            continue;
        shape s = shape_of(1, 1, 1, 130, 200, 16, 70);
        s.v = SPARGE_BF16;
        problem x = question(&s, r);
        tensor_fill(&x.v, 0.9f * size[n], size[n]);
        verify(&x, r, false);
        near_dense(&x, r, false);
        problem_free(&x);
    }
}

/* One value of 1e4 among small ones: a step for a whole head costs the others their digits in int8.
 */
Test(values, an_outlier_among_the_values)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 1, 1, 1, 130, 200, 16, 16);
        x.v.x[77 * 16 + 3] = 1e4f;
        check_answers(&x, r, GIVEN);
    }
}

Test(values, a_channel_of_zeros_stays_zero)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 1, 2, 1, 150, 190, 16, 66);
        for (int64_t n = 0; n < 190; n++)
            x.v.x[n * 66 + 5] = x.v.x[n * 66 + 65] = 0.0f;
        problem_write(&x);
        answer a = answer_of(&x, r);
        for (int64_t n = 0; n < tensor_count(&a.o); n++)
            check(isfinite(a.o.x[n]) && ((n % 66 != 5 && n % 66 != 65) || a.o.x[n] == 0.0f),
                  "o[%lld] is %g", (long long)n, (double)a.o.x[n]);
        forget_both(&a, &x);
    }
}

/* Weights that are rounded need not sum to what l sums: HALF and FP8 by what a weight is rounded
 * by. */
Test(values, ones_give_one)
{
    EACH_CASE(r, n, 2, 1)
    {
        problem x = question_of(r, 1, 2, 1, 150, 290, 16, 97);
        x.o.causal = SPARGE_CAUSAL_END;
        x.o.thresholds.lambda = n ? -0.5f : -INFINITY;
        x.o.skip_rows = n ? 16 : 64;
        tensor_fill(&x.v, 1.0f, 1.0f);
        answer a = answer_of(&x, r);
        const float off = r->pv_dtype == SPARGE_FP8   ? 0x1p-4f
                          : r->pv_dtype == SPARGE_F16 ? 0x1p-11f
                                                      : 1e-5f;
        for (int64_t e = 0; e < tensor_count(&a.o); e++)
            check_close(a.o.x[e], 1.0, off + 1e-5f);
        forget_both(&a, &x);
    }
}

/* Kernel 4 in f16 defines nothing of its own: within twice ref's distance from the oracle over the
 * codes. */
Test(values, distance_from_the_oracle)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 1, 2, 1, 200, 300, 64, 64);
        x.o.causal = SPARGE_CAUSAL_END;
        mask_fill(&x, 0.7f);
        const terms t = {false, SPARGE_F32, PACKED, 0};
        reply want = ask_ref(&x, &t);
        double *o = malloc((size_t)tensor_count(&want.a.o) * sizeof *o), far[2] = {0, 0};
        check(sparge_oracle(&x.p, &x.o, &x.mask, SPARGE_ORACLE_CODES, o, NULL, NULL, NULL) ==
                  SPARGE_OK,
              "oracle");
        reply got = ask_kernel(&x, r, &t);
        for (int64_t row = 0; row < problem_rows(&x); row++) {
            double size = 0, off[2] = {0, 0};
            for (int64_t c = row * 64; c < row * 64 + 64; c++) {
                size += fabs(o[c]);
                off[0] += fabs((double)want.a.o.x[c] - o[c]);
                off[1] += fabs((double)got.a.o.x[c] - o[c]);
            }
            for (int n = 0; n < 2 && size > 0; n++)
                far[n] = fmax(far[n], off[n] / size);
        }
        plain_log("kernel %d pv %d: worst row %.2e from the oracle, ref %.2e", r->n,
                  (int)r->pv_dtype, far[1], far[0]);
        check(far[1] <= 2 * far[0] + 1e-6, "%g from the oracle, ref %g", far[1], far[0]);
        free(o);
        forget(&got);
        forget(&want);
        problem_free(&x);
    }
}
