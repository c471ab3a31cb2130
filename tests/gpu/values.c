/* values.c: the cuda backend's answers where a reader knows them without a reference, and where
 * kernels go wrong: empty rows, elements that must not be read, infinities, the future, schedules.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu.h"

TestSuite(values);

static void set_mask(problem *x, bool (*keep)(int64_t line, int64_t j))
{
    mask_fill(x, 0.0f);
    const int64_t lines = x->mask.batch * x->mask.heads * x->mask.q_blocks;
    for (int64_t line = 0; line < lines; line++)
        for (int64_t j = 0; j < x->mask.k_blocks; j++)
            if (keep(line, j))
                x->mask.bits[line * x->mask.words + j / 32] |= 1u << j % 32;
}

static bool odd_rows(int64_t line, int64_t j) { return line % 2 && j % 2 == 0; }
static bool second_alone(int64_t line, int64_t j) { return line >= 0 && j == 1; }

/* A kernel's own answer over x's mask, in f32. */
static answer answer_of(problem *x, const kernel *r)
{
    use(x, r);
    return attend(x);
}

/* ---- Rows without keys ---- */

/* Outputs are poisoned before, and what lies between the rows of o is looked at (problem.c). */
Test(values, empty_rows_of_the_mask)
{
    fresh_device();
    EACH_RUNG(r)
    for (int layout = PACKED; layout < LAYOUTS; layout += 1 + 2 * plain_quick()) {
        check_case("kernel %d pv %d, layout %d", r->n, (int)r->pv_dtype, layout);
        const shape s = shape_of(2, 2, 1, 300, 200, 24, 20);
        problem x = question(&s, r);
        x.o.causal = layout % 2 ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
        set_mask(&x, odd_rows);
        const terms t = {false, (sparge_dtype)(layout % 3), (tensor_layout)layout, 0};
        verify_with(&x, r, &t);
        answer a = answer_of(&x, r);
        for (int64_t n = 0; n < problem_rows(&x); n++) {
            const int64_t line = n / 300 * 3 + n % 300 / 128;
            if (line % 2)
                continue;
            check(a.lse[n] == -INFINITY, "lse[%lld] of an empty row is %g", (long long)n,
                  (double)a.lse[n]);
            for (int64_t c = 0; c < 20; c++)
                check(a.o.x[n * 20 + c] == 0.0f, "o of the empty row %lld is %g", (long long)n,
                      (double)a.o.x[n * 20 + c]);
        }
        answer_free(&a);
        problem_free(&x);
    }
}

/* Causal at the end with more queries than keys: the first rows see nothing. */
Test(values, rows_before_the_first_key)
{
    fresh_device();
    EACH_RUNG(r)
    for (int64_t keys = 1; keys < 300; keys += 61) {
        check_case("kernel %d pv %d, %lld keys", r->n, (int)r->pv_dtype, (long long)keys);
        const shape s = shape_of(1, 2, 2, 300, keys, 17, 9);
        problem x = question(&s, r);
        x.o.causal = SPARGE_CAUSAL_END;
        x.o.thresholds.lambda = -0.5f;
        verify(&x, r, true);
        verify(&x, r, false);
        problem_free(&x);
    }
}

Test(values, empty_questions)
{
    const struct {
        int64_t batch, q_len, k_len;
    } size[] = {
        {0, 10, 20}, {1, 0, 20}, {1, 10, 0}, {1, 0, 0}, {0, 0, 0}, {2, 1, 1}, {2, 130, 0},
    };
    fresh_device();
    EACH_RUNG(r)
    for (int64_t n = 0; n < COUNT(size); n++)
        for (int causal = 0; causal < 3; causal++) {
            check_case("kernel %d pv %d, batch %lld, %lld queries, %lld keys, causal %d", r->n,
                       (int)r->pv_dtype, (long long)size[n].batch, (long long)size[n].q_len,
                       (long long)size[n].k_len, causal);
            const shape s = shape_of(size[n].batch, 2, 1, size[n].q_len, size[n].k_len, 5, 7);
            problem x = question(&s, r);
            x.o.causal = (sparge_causal)causal;
            x.o.sink = true;
            x.o.thresholds.lambda = causal ? -1.0f : -INFINITY;
            x.o.smooth_k = n % 2;
            verify(&x, r, true);
            verify(&x, r, false);
            problem_free(&x);
        }
}

/* ---- What must not be read ---- */

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
            const shape s = shape_of(1, 2, 1, 200, 200, 12, 33);
            problem x = question(&s, r);
            x.o.causal = n % 2 ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
            x.o.thresholds = (sparge_thresholds){0.0f, 0.6f, SPARGE_OFF, n % 3 ? -INFINITY : -0.5f};
            x.o.skip_rows = n % 2 ? 16 : 128;
            tensor *t = where == 0 ? &x.q : where == 1 ? &x.k : &x.v;
            t->x[tokens[n] * t->channels + t->channels - 1] = special[n % 3];
            problem_write(&x);
            verify(&x, r, true);
            mask_fill(&x, 0.6f);
            verify(&x, r, false);
            answer a = answer_of(&x, r);
            for (int64_t at = 0; at < tensor_count(&a.o); at++) {
                const int64_t row = at / 33 % 200, c = at % 33;
                const bool may = where == 0   ? row == tokens[n] && at < 200 * 33
                                 : where == 1 ? !x.o.causal || row >= tokens[n]
                                              : c == 32 && (!x.o.causal || row >= tokens[n]);
                check(may || isfinite(a.o.x[at]), "o[%lld] is %g", (long long)at,
                      (double)a.o.x[at]);
            }
            answer_free(&a);
            problem_free(&x);
        }
}

/* Beyond binary16, which pv HALF cannot hold; the last value that rounds down, and both signs. */
Test(values, v_beyond_binary16)
{
    static const float v[] = {65504.0f, 65519.0f, 65520.0f, -65520.0f, 1e30f, -65519.996f};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t n = 0; n < COUNT(v); n++) {
        check_case("kernel %d pv %d, v %g", r->n, (int)r->pv_dtype, (double)v[n]);
        const shape s = shape_of(1, 1, 1, 130, 130, 8, 8);
        problem x = question(&s, r);
        x.v.x[70 * 8 + 3] = v[n];
        problem_write(&x);
        verify(&x, r, false);
        problem_free(&x);
    }
}

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
            const shape s = shape_of(1, 1, 1, 20, 140, 8, 8);
            problem x = question(&s, r);
            tensor_fill(&x.q, -size[q], size[q]);
            tensor_fill(&x.k, -size[k], size[k]);
            verify(&x, r, true);
            problem_free(&x);
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
            const shape s = shape_of(1, 1, 1, 140, 200, 64, 8);
            problem x = question(&s, r);
            x.o.smooth_k = false;
            tensor_fill(&x.q, top[n], top[n]);
            for (int64_t e = 0; e < tensor_count(&x.k); e++)
                x.k.x[e] = e / 64 == at ? 22500.0f : 0.0f;
            for (int64_t e = 0; e < tensor_count(&x.v); e++)
                x.v.x[e] = e / 8 == at ? 1.0f : 0.0f;
            problem_write(&x);
            verify(&x, r, false);
            answer a = answer_of(&x, r);
            const double logit = 8.0 * (double)top[n] * 22500.0;
            for (int64_t e = 0; e < tensor_count(&a.o); e++)
                check_close(a.o.x[e], 1.0, 1e-6);
            for (int64_t row = 0; row < 140; row++)
                check_close(a.lse[row], logit, 1e-6 * logit);
            answer_free(&a);
            problem_free(&x);
        }
}

/* A block of keys whose scores leave float, before, between and behind two whose scores are 0: of a
 * row that they leave downward they weigh nothing, a row that they leave upward is NaN. */
Test(values, a_block_beyond_float)
{
    enum { DIM = 4, KEYS = 192, ROWS = 140 };
    fresh_device();
    EACH_RUNG(r)
    for (int n = 0; n < 9; n++) {
        check_case("kernel %d pv %d, block %d, lambda %d", r->n, (int)r->pv_dtype, n % 3, n / 3);
        const shape s = shape_of(1, 1, 1, ROWS, KEYS, DIM, DIM);
        problem x = question(&s, r);
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
        problem_write(&x);
        verify(&x, r, false);
        answer a = answer_of(&x, r);
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
        answer_free(&a);
        problem_free(&x);
    }
}

/* All that a row sees in its kept block lies beyond float, downward: it is NaN, and no row without
 * keys. */
Test(values, nothing_but_scores_of_minus_infinity)
{
    fresh_device();
    EACH_RUNG(r)
    for (int n = 0; n < 2; n++) {
        check_case("kernel %d pv %d, lambda %d", r->n, (int)r->pv_dtype, n);
        const shape s = shape_of(1, 1, 1, 200, 130, 4, 4);
        problem x = question(&s, r);
        x.o.smooth_k = false;
        x.o.causal = SPARGE_CAUSAL_START;
        x.o.thresholds.lambda = n ? -1.0f : -INFINITY;
        tensor_fill(&x.q, 1e20f, 1e20f);
        tensor_fill(&x.k, -1e20f, -1e20f);
        set_mask(&x, second_alone);
        verify(&x, r, false);
        answer a = answer_of(&x, r);
        for (int64_t row = 0; row < 200; row++)
            for (int64_t c = 0; c < 4; c++) {
                const float o = a.o.x[row * 4 + c];
                check(row < 64 ? o == 0.0f && a.lse[row] == -INFINITY
                               : isnan(o) && isnan(a.lse[row]),
                      "row %lld is %g, lse %g", (long long)row, (double)o, (double)a.lse[row]);
            }
        answer_free(&a);
        problem_free(&x);
    }
}

/* c is 0, but codes are not: every visible key weighs 1, a hidden one and padding nothing. */
Test(values, scores_whose_unit_is_zero)
{
    fresh_device();
    EACH_RUNG(r)
    for (int causal = 0; causal < 3; causal++) {
        check_case("kernel %d pv %d, causal %d", r->n, (int)r->pv_dtype, causal);
        const shape s = shape_of(1, 1, 1, 150, 170, 16, 1);
        problem x = question(&s, r);
        x.o.causal = (sparge_causal)causal;
        x.o.smooth_k = false;
        tensor_fill(&x.q, -1e-24f, 1e-24f);
        tensor_fill(&x.k, -1e-24f, 1e-24f);
        for (int64_t t = 0; t < 170; t++)
            x.v.x[t] = (float)(t % 2);
        problem_write(&x);
        verify(&x, r, false);
        answer a = answer_of(&x, r);
        for (int64_t row = 0; row < 150; row++) {
            const int64_t seen = causal == SPARGE_CAUSAL_NONE    ? 170
                                 : causal == SPARGE_CAUSAL_START ? row + 1
                                                                 : row + 21;
            check_close(a.o.x[row], (double)(seen / 2) / (double)seen, 1e-6);
            check_close(a.lse[row], log((double)seen), 1e-5);
        }
        answer_free(&a);
        problem_free(&x);
    }
}

/* c itself is not finite: rows are NaN if they see a key. */
Test(values, scores_whose_unit_is_infinite)
{
    fresh_device();
    EACH_RUNG(r)
    for (int n = 0; n < 2; n++) {
        check_case("kernel %d pv %d, lambda %d", r->n, (int)r->pv_dtype, n);
        const shape s = shape_of(1, 1, 1, 150, 100, 8, 8);
        problem x = question(&s, r);
        x.o.causal = SPARGE_CAUSAL_END;
        x.o.smooth_k = false;
        x.o.thresholds.lambda = n ? -1.0f : -INFINITY;
        x.o.softmax_scale = 3e38f;
        tensor_fill(&x.q, -1e3f, 1e3f);
        tensor_fill(&x.k, -1e3f, 1e3f);
        verify(&x, r, false);
        answer a = answer_of(&x, r);
        for (int64_t e = 0; e < tensor_count(&a.o); e++) {
            const float o = a.o.x[e], lse = a.lse[e / 8];
            check(e / 8 < 50 ? o == 0.0f && lse == -INFINITY : isnan(o) && isnan(lse),
                  "row %lld is %g, lse %g", (long long)(e / 8), (double)o, (double)lse);
        }
        answer_free(&a);
        problem_free(&x);
    }
}

/* Codes that are all 127 or all -127. */
Test(values, extremes)
{
    fresh_device();
    EACH_RUNG(r)
    for (int n = 0; n < 8; n += 1 + 2 * plain_quick()) {
        check_case("kernel %d pv %d, extremes %d", r->n, (int)r->pv_dtype, n);
        const shape s = shape_of(1, 1, 1, 140, 140, 128, 128);
        problem x = question(&s, r);
        x.o.smooth_k = false;
        for (int64_t e = 0; e < tensor_count(&x.q); e++) {
            x.q.x[e] = n & 4 && e % 2 ? -1.0f : 1.0f;
            x.k.x[e] = (n & 1 ? -1.0f : 1.0f) * (n & 4 && e % 2 ? -1.0f : 1.0f);
            x.v.x[e] = n & 2 ? -1.0f : 1.0f;
        }
        problem_write(&x);
        verify(&x, r, false);
        problem_free(&x);
    }
}

/* ---- Answers that are known ---- */

Test(values, a_channel_of_zeros_stays_zero)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(1, 2, 1, 150, 190, 16, 66);
        problem x = question(&s, r);
        for (int64_t n = 0; n < 190; n++)
            x.v.x[n * 66 + 5] = x.v.x[n * 66 + 65] = 0.0f;
        problem_write(&x);
        answer a = answer_of(&x, r);
        for (int64_t n = 0; n < tensor_count(&a.o); n++)
            check(isfinite(a.o.x[n]) && ((n % 66 != 5 && n % 66 != 65) || a.o.x[n] == 0.0f),
                  "o[%lld] is %g", (long long)n, (double)a.o.x[n]);
        answer_free(&a);
        problem_free(&x);
    }
}

/* Weights that are rounded need not sum to what l sums: HALF and FP8 by what a weight is rounded
 * by. */
Test(values, ones_give_one)
{
    fresh_device();
    EACH_RUNG(r)
    for (int n = 0; n < 2; n++) {
        check_case("kernel %d pv %d, %d", r->n, (int)r->pv_dtype, n);
        const shape s = shape_of(1, 2, 1, 150, 290, 16, 97);
        problem x = question(&s, r);
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
        answer_free(&a);
        problem_free(&x);
    }
}

/* One kept block is dense attention over its keys, without anything from beside them. */
Test(values, one_kept_block)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(1, 1, 1, 150, 200, 16, 32),
                    part = shape_of(1, 1, 1, 150, 64, 16, 32);
        problem x = question(&s, r), y = question(&part, r);
        x.o.smooth_k = y.o.smooth_k = false;
        if (r->pv_dtype ==
            SPARGE_FP8) /* one step for a head: the largest of each channel is in both */
            for (int64_t c = 0; c < 32; c++)
                x.v.x[64 * 32 + c] = 4.0f;
        problem_write(&x);
        memcpy(y.q.x, x.q.x, (size_t)tensor_count(&y.q) * sizeof(float));
        memcpy(y.k.x, x.k.x + 64 * 16, (size_t)tensor_count(&y.k) * sizeof(float));
        memcpy(y.v.x, x.v.x + 64 * 32, (size_t)tensor_count(&y.v) * sizeof(float));
        problem_write(&y);
        set_mask(&x, second_alone);
        answer a = answer_of(&x, r), b = answer_of(&y, r);
        same_answer(&a, &b);
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);
    }
}

/* tau = 1, lambda = -inf and everything similar keep what there is: dense, by the same kernel, bit
 * for bit. */
Test(values, everything_kept_is_dense)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(2, 4, 2, 200, 330, 33, 65);
        problem x = question(&s, r);
        x.o.causal = SPARGE_CAUSAL_START;
        x.o.thresholds.tau = 1.0f;
        use(&x, r);
        answer a = attention(&x, NULL), b = attend(&x);
        same_answer(&a, &b);
        check_equal(a.result.counts.qk_done, a.result.counts.pairs);
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
    }
}

/* ---- The future ---- */

/* A row must not know what it cannot see: V of every later key, and K at the edge of a block,
 * changed by 1e3. K of one block shares a step and the mean, so codes are kept equal by changing it
 * only in float. */
Test(values, nobody_sees_the_future)
{
    fresh_device();
    EACH_RUNG(r)
    for (int causal = SPARGE_CAUSAL_END; causal <= SPARGE_CAUSAL_START; causal++)
        for (int64_t probe = 0; probe < 200; probe += plain_quick() ? 67 : 21) {
            check_case("kernel %d pv %d, causal %d, token %lld", r->n, (int)r->pv_dtype, causal,
                       (long long)probe);
            const int64_t q_len = 170, k_len = 200,
                          shift = causal == SPARGE_CAUSAL_END ? k_len - q_len : 0;
            const shape s = shape_of(1, 1, 1, q_len, k_len, 20, 10);
            problem x = question(&s, r);
            x.o.causal = (sparge_causal)causal;
            x.o.smooth_k = false;
            /* Steps of V are a block's or a head's: its largest are at token 0, before the future.
             * Those of a block with int8 are not: the change then begins with a block. */
            const bool whole = r->pv_dtype == SPARGE_INT8;
            const int64_t from = whole ? blocks(probe + 1, 64) * 64 : probe + 1;
            for (int64_t c = 0; c < 10; c++)
                x.v.x[c] = 1.5e3f;
            problem_write(&x);
            answer before = answer_of(&x, r);
            for (int64_t t = from; t < k_len; t++)
                for (int64_t c = 0; c < 10; c++)
                    x.v.x[t * 10 + c] += t % 2 ? 1e3f : -1e3f;
            const int64_t k_from =
                r->qk_dtype == SPARGE_F32 ? probe + 1 : blocks(probe + 1, 64) * 64;
            for (int64_t t = k_from; t < k_len; t++)
                for (int64_t c = 0; c < 20; c++)
                    x.k.x[t * 20 + c] += 1e3f;
            problem_write(&x);
            answer after = answer_of(&x, r);
            for (int64_t row = 0; row < q_len && row + shift <= probe; row++) {
                check_same_as("o", after.o.x + row * 10, before.o.x + row * 10, 10);
                check_same_as("lse", after.lse + row, before.lse + row, 1);
            }
            answer_free(&before);
            answer_free(&after);
            problem_free(&x);
        }
}

/* 16 query rows g = 0..7 look along axis g; the keys of block j lie along axis j % 8, further out
 * each time. So a block raises the maxima of 16 rows alone, and those of all others tie with it:
 * lambda 0 skips a tie. */
Test(values, every_group_votes_alone)
{
    fresh_device();
    EACH_RUNG(r)
    for (int64_t rows = 16; rows <= 128; rows *= 2) {
        check_case("kernel %d pv %d, %lld rows", r->n, (int)r->pv_dtype, (long long)rows);
        const shape s = shape_of(1, 1, 1, 256, 64 * 10, 8, 8);
        problem x = question(&s, r);
        for (int64_t e = 0; e < tensor_count(&x.q); e++)
            x.q.x[e] = e / 8 / 16 % 8 == e % 8 ? 1.0f : 0.0f;
        for (int64_t e = 0; e < tensor_count(&x.k); e++)
            x.k.x[e] = e / 8 / 64 % 8 == e % 8 ? (float)(1 + e / 8 / 64) : 0.0f;
        problem_write(&x);
        x.o.smooth_k = false;
        x.o.skip_rows = rows;
        x.o.thresholds.lambda = 0.0f;
        verify(&x, r, false);
        use(&x, r);
        answer a = attend(&x);
        check_equal(a.result.counts.pv_done, 2 * (1 + 9 * (double)rows / 128));
        answer_free(&a);
        problem_free(&x);
    }
}

/* ---- Masks ---- */

/* Bits of blocks that no row sees, of words beyond the row and of spare words change nothing. */
Test(values, a_mask_with_garbage_beyond_its_blocks)
{
    fresh_device();
    EACH_RUNG(r)
    for (int causal = 0; causal < 3; causal++) {
        check_case("kernel %d pv %d, causal %d", r->n, (int)r->pv_dtype, causal);
        const shape s = shape_of(1, 2, 1, 150, 330, 16, 8);
        problem x = question(&s, r);
        x.o.causal = (sparge_causal)causal;
        x.o.thresholds.lambda = -1.0f;
        answer dense = answer_of(&x, r);
        x.mask = wide_mask(&x, 2); /* all bits set */
        const sparge_mask own = x.mask;
        verify(&x, r, false);
        answer all = answer_of(&x, r);
        same_answer(&all, &dense);
        same_counts(&all.result.counts, &dense.result.counts);
        answer_free(&all);
        answer_free(&dense);
        x.mask = (sparge_mask){0};
        check_free(own.bits);
        problem_free(&x);
    }
}

/* Thresholds of more heads than one launch carries, and a mask of more than one word. */
Test(values, thresholds_of_many_heads)
{
    fresh_device();
    static const int64_t heads[] = {128, 129, 260};
    for (int64_t n = plain_quick(); n < COUNT(heads); n += 1 + plain_quick())
        for (int i = 2; i < RUNGS; i += 3) {
            if (!runs_here(kernels[i].n))
                continue;
            check_case("kernel %d pv %d, %lld heads", kernels[i].n, (int)kernels[i].pv_dtype,
                       (long long)heads[n]);
            const shape s = shape_of(1, heads[n], 1, 9, 2200 / heads[n] + 130, 8, 8);
            problem x = question(&s, &kernels[i]);
            sparge_thresholds *each = malloc((size_t)heads[n] * sizeof *each);
            for (int64_t h = 0; h < heads[n]; h++)
                each[h] = (sparge_thresholds){-1.0f, check_uniform(0, 1), SPARGE_OFF,
                                              h % 3 ? -INFINITY : 0.0f};
            x.o.per_head = each;
            verify(&x, &kernels[i], true);
            free(each);
            problem_free(&x);
        }
}

/* 2 to 80 key blocks, so that a row of the mask ends everywhere in its words; sparse ones too,
 * where a stage gathers blocks from several words. */
Test(values, rows_of_the_mask_of_many_lengths)
{
    fresh_device();
    for (int64_t columns = 2, n = 0; columns < 100; columns += plain_quick()  ? 31
                                                               : columns < 60 ? 10
                                                                              : 3,
                 n++) {
        const kernel *r = &kernels[3 + n % 4];
        if (!runs_here(r->n))
            continue;
        check_case("kernel %d pv %d, %lld key blocks", r->n, (int)r->pv_dtype, (long long)columns);
        const shape s = shape_of(1, 1, 1, 140, columns * 64 - 5, 8, 8);
        problem x = question(&s, r);
        x.o.thresholds = (sparge_thresholds){-1.0f, 0.3f, 0.2f, -2.0f};
        x.o.causal = n % 2 ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
        verify(&x, r, true);
        mask_fill(&x, n % 3 ? 0.05f : 0.5f);
        verify(&x, r, false);
        problem_free(&x);
    }
}

/* Cosines of exactly 1, and of 0: neither is above a threshold of the same size. */
Test(values, similarity_at_its_threshold)
{
    fresh_device();
    for (int n = 0; n < 6; n++) {
        check_case("theta %d, %s keys", n % 3 - 1, n < 3 ? "identical" : "antiparallel");
        const shape s = shape_of(1, 1, 1, 300, 640, 16, 4);
        problem x = question(&s, &kernels[2]);
        x.o.smooth_k = false;
        for (int64_t e = 0; e < tensor_count(&x.q); e++)
            x.q.x[e] = e % 16 == 0;
        for (int64_t e = 0; e < tensor_count(&x.k); e++)
            x.k.x[e] = e % 16 == 0 ? (n >= 3 && e / 16 % 2 ? -1.0f : 1.0f) : 0.0f;
        problem_write(&x);
        x.o.thresholds = (sparge_thresholds){(float)(n % 3 - 1), SPARGE_OFF, 0.0f, -INFINITY};
        verify(&x, &kernels[2], true);
        problem_free(&x);
    }
}

/* A quarter of the smallest float rounds to 0 or, below it, to -0; neither ranks above the other.
 */
Test(values, zeros_of_both_signs_tie)
{
    fresh_device();
    check_case("zeros");
    const shape s = shape_of(1, 1, 1, 4, 64 * 40, 1, 1);
    problem x = question(&s, &kernels[2]);
    x.o.smooth_k = false;
    x.o.softmax_scale = 0.25f;
    for (int64_t n = 0; n < 4; n++)
        x.q.x[n] = 0x1p-100f;
    for (int64_t n = 0; n < 64 * 40; n++)
        x.k.x[n] = n / 64 % 2 ? 0x1p-49f : -0x1p-49f;
    problem_write(&x);
    x.o.thresholds = (sparge_thresholds){-1.0f, SPARGE_OFF, 0.3f, -INFINITY};
    verify(&x, &kernels[2], true);
    x.o.thresholds = (sparge_thresholds){-1.0f, 0.5f, SPARGE_OFF, -INFINITY};
    verify(&x, &kernels[2], true);
    problem_free(&x);
}

/* Kernel 5's producer reads a word of the mask in each lane: more than 32 words, and blocks kept
 * far apart. */
Test(values, more_than_1024_key_blocks)
{
    fresh_device();
    for (int i = 3; i < RUNGS && !plain_quick(); i += 2) {
        if (!runs_here(kernels[i].n))
            continue;
        check_case("kernel %d pv %d", kernels[i].n, (int)kernels[i].pv_dtype);
        const shape s = shape_of(1, 1, 1, 70, 64 * 1100, 1, 1);
        problem x = question(&s, &kernels[i]);
        mask_fill(&x, 0.005f);
        sparge_mask_set(&x.mask, 0, 0, 0, 1099, true);
        verify(&x, &kernels[i], false);
        problem_free(&x);
    }
}

/* Key blocks whose scores are few different ones: ties at every place where a row may end. */
Test(values, rows_of_the_mask_with_ties)
{
    static const float share[] = {SPARGE_OFF, 0.0f, 0.3f, 0.5f, 0.98f, 1.0f};
    fresh_device();
    for (int values = 1; values <= 50; values += values < 3 ? 1 : 47) {
        const int64_t tokens = 64 * (plain_quick() ? 20 : 40);
        const shape s = shape_of(1, 1, 1, 128 * 3, tokens, 4, 1);
        problem x = question(&s, &kernels[2]);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t c = 0; c < 4; c++)
                x.k.x[t * 4 + c] =
                    (float)(t / 64 * 7919 % 40 % values) * 0.25f * (c % 2 ? -1.0f : 1.5f);
        problem_write(&x);
        for (int64_t tau = 0; tau < COUNT(share); tau++)
            for (int64_t topk = tau == 0; topk < COUNT(share); topk += 1 + 2 * plain_quick()) {
                check_case("ties of %d, tau %g, topk %g", values, (double)share[tau],
                           (double)share[topk]);
                x.o.thresholds = (sparge_thresholds){-1.0f, share[tau], share[topk], -INFINITY};
                x.o.smooth_k = topk % 2;
                x.o.causal = (sparge_causal)(topk % 3);
                x.o.sink = tau % 2;
                verify_prediction(&x, &kernels[2], 1);
            }
        problem_free(&x);
    }
}

/* ---- Schedules ---- */

/* The same bits every time, whatever the order of threads and however many blocks share the device.
 */
Test(values, the_same_bits_every_time)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(1, 3, 1, 150, 330, 16, 60);
        problem x = question(&s, r);
        x.o.causal = SPARGE_CAUSAL_END;
        x.o.thresholds = (sparge_thresholds){0.0f, 0.7f, SPARGE_OFF, -1.0f};
        use(&x, r);
        answer first = attention(&x, NULL);
        for (int n = 0; n < (plain_quick() ? 3 : on_model() ? 20 : 100); n++) {
            any_schedule();
            answer again = attention(&x, NULL);
            same_answer(&again, &first);
            same_counts(&again.result.counts, &first.result.counts);
            check_same(again.intermediates.l, first.intermediates.l, problem_rows(&x));
            answer_free(&again);
        }
        fresh_device();
        answer_free(&first);
        problem_free(&x);
    }
}

#ifdef SPARGE_CUDA_MODEL
/* Copies and products as late as the program allows, several orders of threads and numbers of
 * resident blocks: long rows, so that every ring goes round more than twice, and short ones that
 * leave it half empty. */
static void late(int first, int end)
{
    for (int i = first; i < end; i++)
        for (int mode = plain_quick(); mode < 3; mode++)
            for (int seed = 0; seed < (plain_quick() ? 1 : 3); seed++) {
                const kernel *r = &kernels[i];
                check_case("kernel %d pv %d, late %d, seed %d", r->n, (int)r->pv_dtype, mode, seed);
                fresh_device();
                cuda_model_settings.late = mode;
                cuda_model_settings.seed = (uint64_t)seed;
                cuda_model_settings.resident_blocks = 1 + (unsigned)seed;
                cuda_model_settings.multiprocessors = 2;
                const shape s = shape_of(1, 2, 1, 300, 1300, 60, 40);
                problem x = question(&s, r);
                x.o.causal = SPARGE_CAUSAL_END;
                x.o.skip_rows = 16 << seed;
                x.o.thresholds =
                    (sparge_thresholds){-1.0f, 0.9f, SPARGE_OFF, seed ? -3.0f : -INFINITY};
                verify(&x, r, true);
                mask_fill(&x, 0.15f);
                verify(&x, r, false);
                problem_free(&x);
            }
    fresh_device();
}

Test(values, kernel_4_as_late_as_the_program_allows) { late(3, 5); }
Test(values, kernel_5_as_late_as_the_program_allows) { late(5, RUNGS); } /* planted.sh */
#endif

/* ---- Correctness by the oracle ---- */

/* Kernel 4 in f16 defines nothing of its own: within twice ref's distance from the oracle over the
 * codes. */
Test(values, distance_from_the_oracle)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(1, 2, 1, 200, 300, 64, 64);
        problem x = question(&s, r);
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

/* lse, intermediates, counts may be missing, the output may stand in the place of q. */
Test(values, only_o_is_wanted)
{
    fresh_device();
    EACH_RUNG(r)
    for (int n = 0; n < 2; n++) {
        check_case("kernel %d pv %d, predict %d", r->n, (int)r->pv_dtype, n);
        const shape s = shape_of(1, 2, 1, 140, 200, 32, 32);
        problem x = question(&s, r);
        x.o.thresholds.tau = 0.6f;
        use(&x, r);
        answer all = n ? attention(&x, NULL) : attend(&x);
        scene z;
        scene_open(&z, &x, r, n);
        z.result.lse = NULL;
        z.result.head_counts = NULL;
        z.result.mask = NULL;
        check(scene_call(&z) == SPARGE_OK, "%s", z.error.text);
        scene_fetch(&z);
        check_same_as("o", z.a.o.x, all.o.x, tensor_count(&all.o));
        same_counts(&z.result.counts, &all.result.counts);
        z.result.o =
            (sparge_out){(void *)z.p.q.data, SPARGE_F32, z.p.q.batch, z.p.q.head, z.p.q.token};
        check(scene_call(&z) == SPARGE_OK, "%s", z.error.text);
        twins_fetch(&z.inputs);
        tensor_read(&x.q);
        check_same_as("o in the place of q", x.q.x, all.o.x, tensor_count(&all.o));
        scene_close(&z);
        answer_free(&all);
        problem_free(&x);
    }
}
