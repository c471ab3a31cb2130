/* SPDX-License-Identifier: Apache-2.0 */
/* baseline.c: the honest kernel beside the textbook formula in double, where it rounds, and the
 * bounds that follow. api.c asks it what it asks of all calls. */
#include "sparge_inspect.h"

#include <math.h>
#include <string.h>

#include "tests/support/problem.h"

TestSuite(baseline);

static sparge_error error;
#define fine(call) check((call) == SPARGE_OK && !error.text[0], "%s", error.text)

/* ---- The formula ---- */

static bool attends(const problem *x, int64_t b, int64_t h, int64_t t, int64_t key)
{
    const int64_t ahead = x->o.causal == SPARGE_CAUSAL_END ? x->p.k_len - x->p.q_len : 0;
    return pair_open(x, b, h, t, key) && (x->o.causal == SPARGE_CAUSAL_NONE || key <= t + ahead);
}

/* One row: o [dim_v], and its lse. */
static double formula(const problem *x, int64_t b, int64_t h, int64_t t, double *o)
{
    const sparge_problem *p = &x->p;
    const int64_t g = h / (p->heads / p->kv_heads);
    const double scale =
        x->o.softmax_scale > 0 ? (double)x->o.softmax_scale : 1.0 / sqrt((double)p->dim);
    double sum = 0.0;
    for (int64_t c = 0; c < p->dim_v; c++)
        o[c] = 0.0;
    for (int64_t key = 0; key < p->k_len; key++) {
        double score = 0.0;
        for (int64_t c = 0; c < p->dim; c++)
            score +=
                (double)tensor_row(&x->q, b, h, t)[c] * (double)tensor_row(&x->k, b, g, key)[c];
        score *= scale;
        if (p->k_bias)
            score += (double)p->k_bias[(b * p->kv_heads + g) * p->k_len + key];
        const double weight = attends(x, b, h, t, key) ? exp(score) : 0.0;
        sum += weight;
        for (int64_t c = 0; c < p->dim_v && weight > 0.0; c++)
            o[c] += weight * (double)tensor_row(&x->v, b, g, key)[c];
    }
    for (int64_t c = 0; c < p->dim_v && sum > 0.0; c++)
        o[c] /= sum;
    return log(sum);
}

/* Of 40 questions with all kinds of masks, biases, types and layouts. Rounding adds up to half a
 * digit of P to each weight, and as much of o: 2^-11 each in f16, 2^-8 in bf16; f32 loses about
 * 2^-24 for each of 60 keys. Scores stay below 20, values below 8. */
Test(baseline, formula_in_double)
{
    static const double lost[] = {3e-5, 8 * 0x1p-10, 8 * 0x1p-7};
    int64_t without_keys = 0;
    for (int n = 0; n < 40; n++) {
        check_case("question %d", n);
        const int64_t kv = check_int(1, 2);
        shape size = shape_of(check_int(1, 2), kv * check_int(1, 2), kv, check_int(0, 40),
                              check_int(0, 60), check_int(1, 20), check_int(1, 8));
        size.layout_q = size.layout_k = size.layout_v = layout_at_random();
        problem x = problem_make(&size);
        x.o.causal = (sparge_causal)(n % 3);
        x.o.block_q = check_int(1, 20);
        x.o.block_k = check_int(1, 20);
        x.o.softmax_scale = n % 2 ? 0.0f : 0.2f;
        if (n % 4 != 3) {
            mask_fill(&x, 0.6f);
            mask_fill_partial(&x, 0.5f);
        }
        if (n % 5 == 1)
            bias_fill(&x, false);
        const sparge_dtype dtype = (sparge_dtype)(n % 3);
        const int64_t rows = problem_rows(&x), dim_v = x.p.dim_v;
        float *o = check_alloc((size_t)(rows * dim_v) * sizeof *o),
              *lse = check_alloc((size_t)rows * sizeof *lse);
        const sparge_mask *mask = x.mask.bits ? &x.mask : NULL;
        fine(sparge_baseline(&x.p, &x.o, mask, dtype, o, lse, &error));
        for (int64_t row = 0; row < rows; row++) {
            double want[8];
            const double want_lse = formula(&x, row / x.p.q_len / x.p.heads,
                                            row / x.p.q_len % x.p.heads, row % x.p.q_len, want);
            without_keys += isinf(want_lse) != 0;
            check_close(lse[row], want_lse, 3e-5);
            for (int64_t c = 0; c < dim_v; c++)
                check_close(o[row * dim_v + c], want[c],
                            lost[dtype] * (isinf(want_lse) ? 0.0 : 1.0));
        }
        float *again = check_alloc((size_t)(rows * dim_v) * sizeof *again);
        fine(sparge_baseline(&x.p, &x.o, mask, dtype, again, NULL, &error));
        check_same(again, o, rows * dim_v);
        check_free(o);
        check_free(again);
        check_free(lse);
        problem_free(&x);
    }
    check(without_keys > 100, "only %lld rows without a key", (long long)without_keys);
}

/* ---- Where it rounds ---- */

/* To so many binary digits, ties to even; of numbers that are normal in the type. */
static double digits(double x, int count)
{
    const double ulp = ldexp(1.0, ilogb(x) + 1 - count);
    return rint(x / ulp) * ulp;
}

/* Two keys with the scores 0 and -x, values 0 and 1: P of the second is rounded where it weighs v
 * and not where it is summed up, and o is rounded again. */
Test(baseline, rounds_p_and_o)
{
    static const int kept[] = {24, 11, 8};
    for (sparge_dtype dtype = SPARGE_F32; dtype <= SPARGE_BF16; dtype++) {
        int64_t differs_without_p = 0;
        for (int n = 0; n < 200; n++) {
            check_case("%s, %d", sparge_dtype_string(dtype), n);
            const shape size = shape_of(1, 1, 1, 1, 2, 1, 1);
            problem x = problem_make(&size);
            const float score = -check_uniform(0.01f, 3.0f);
            x.o.softmax_scale = 1.0f;
            x.q.x[0] = 1.0f;
            x.k.x[0] = x.v.x[0] = 0.0f;
            x.k.x[1] = score;
            x.v.x[1] = 1.0f;
            problem_write(&x);
            float o, lse;
            fine(sparge_baseline(&x.p, &x.o, NULL, dtype, &o, &lse, &error));
            const double weight = (double)expf(score), sum = (double)(1.0f + expf(score));
            if (dtype == SPARGE_F32)
                check_close(o, weight / sum, 0x1p-24);
            else
                check_equal((double)o, digits(digits(weight, kept[dtype]) / sum, kept[dtype]));
            check_close(lse, log(sum), 1e-6);
            differs_without_p += (double)o != digits(weight / sum, kept[dtype]);
            problem_free(&x);
        }
        check(dtype == SPARGE_F32 || differs_without_p > 20, "%s: only %lld show P",
              sparge_dtype_string(dtype), (long long)differs_without_p);
    }
}

/* ---- What is not a number ---- */

/* Infinity in v is as bad as NaN, and stays in its channel of the rows that see it; a key that is
 * hidden by its bias is seen by nobody, whatever it holds. */
Test(baseline, nonfinite)
{
    check_case("3 keys");
    const shape size = shape_of(1, 1, 1, 3, 3, 2, 2);
    problem x = problem_make(&size);
    float bias[3] = {0.0f, 0.0f, 0.0f}, o[6], lse[3];
    x.o.causal = SPARGE_CAUSAL_START;
    tensor_row(&x.v, 0, 0, 1)[1] = INFINITY;
    problem_write(&x);
    x.p.k_bias = bias;
    fine(sparge_baseline(&x.p, &x.o, NULL, SPARGE_F32, o, lse, &error));
    for (int n = 0; n < 6; n++)
        check(n % 2 && n > 1 ? isnan(o[n]) : isfinite(o[n]), "element %d is %g", n, (double)o[n]);
    bias[1] = -INFINITY;
    fine(sparge_baseline(&x.p, &x.o, NULL, SPARGE_F32, o, lse, &error));
    for (int n = 0; n < 6; n++)
        check(isfinite(o[n]), "element %d is %g", n, (double)o[n]);
    bias[0] = -INFINITY;
    fine(sparge_baseline(&x.p, &x.o, NULL, SPARGE_F16, o, lse, &error));
    check(o[0] == 0.0f && o[3] == 0.0f && lse[1] == -INFINITY && isfinite(lse[2]), "no key");
    x.p.k_bias = NULL;
    problem_free(&x);
}

/* ---- What is refused, and the bounds ---- */

Test(baseline, refuses_types_that_arrays_cannot_have)
{
    check_case("types");
    const shape size = shape_of(1, 1, 1, 3, 3, 2, 2);
    problem x = problem_make(&size);
    float o[6];
    const struct {
        sparge_dtype dtype;
        const char *says;
    } table[] = {
        {SPARGE_INT8, "dtype is int8 (4), it must be f32, f16 or bf16"},
        {(sparge_dtype)99, "dtype is unknown dtype (99), it must be f32, f16 or bf16"},
    };
    for (size_t n = 0; n < sizeof table / sizeof *table; n++) {
        check_equal(sparge_baseline(&x.p, &x.o, NULL, table[n].dtype, o, NULL, &error),
                    SPARGE_ERR_ARGUMENT);
        check(!strcmp(error.text, table[n].says), "it says \"%s\"", error.text);
    }
    problem_free(&x);
}

/* An infinite or unknown error of the baseline bounds nothing. */
Test(baseline, bounds)
{
    check_equal(sparge_bound_o(0.0), 1e-5);
    check_equal(sparge_bound_o(0.01), 2.0 * 0.01 + 1e-5);
    check_equal(sparge_bound_o(0.5), 2.0 * 0.5 + 1e-5);
    check(isnan(sparge_bound_o(0.51)) && isnan(sparge_bound_o((double)NAN)), "o");
    check_equal(sparge_bound_lse(0.51), 2.0 * 0.51 + 1e-5);
    check(isnan(sparge_bound_lse((double)INFINITY)) && isnan(sparge_bound_lse((double)NAN)), "lse");
}
