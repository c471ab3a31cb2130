/* SPDX-License-Identifier: Apache-2.0 */
/* bf16_attend.c: products in bf16 through the whole of stage 2: a second definition of it, bit for
 * bit, and what bf16 costs and keeps. The sums themselves are tests/common/bf16.c's. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/quant.h"
#include "common/softmax.h"
#include "tests/support/problem.h"

TestSuite(bf16_attend);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

enum { LONGEST = 256 }; /* of dim, and of keys of a block */

static const sparge_isa orders[] = {SPARGE_ISA_AVX512VNNI, SPARGE_ISA_AMX};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- A second definition ---- */

/* c + a . b, in floats that are not subnormal, nor is any sum of them. */
static float chain(float c, const float *a, const float *b, int64_t stride, int64_t n,
                   sparge_isa isa)
{
    if (isa == SPARGE_ISA_AMX) {
        for (int64_t first = 0; first < n; first += 32) {
            float even = 0.0f, odd = 0.0f;
            for (int64_t e = first; e < smaller(n, first + 32); e += 2)
                even = fmaf(a[e], b[e * stride], even);
            for (int64_t e = first + 1; e < smaller(n, first + 32); e += 2)
                odd = fmaf(a[e], b[e * stride], odd);
            c += even + odd;
        }
        return c;
    }
    for (int64_t e = 0; e < n; e += 2) {
        if (e + 1 < n)
            c = fmaf(a[e + 1], b[(e + 1) * stride], c);
        c = fmaf(a[e], b[e * stride], c);
    }
    return c;
}

/* One row against one block of keys. */
typedef struct replayed {
    float m, l, *o;
} replayed;

static void replay_pv(const problem *x, replayed *row, const float *s, int64_t visible, float scale,
                      const answer *a, int64_t kv, int64_t first)
{
    const int64_t dim = x->p.dim_v, at = (kv * x->p.k_len + first) * dim;
    float p[LONGEST], v[LONGEST], partial[16] = {0}, most = s[0];
    for (int64_t t = 0; t < visible; t++)
        most = fmaxf(most, s[t]);
    const float local = scale * most, m = fmaxf(row->m, local);
    const float shrink = row->m == m ? 1.0f : sparge_exp2(row->m - m);
    const bool first_block = row->m == -INFINITY, codes = x->o.pv_dtype == SPARGE_INT8;
    row->m = m;
    row->l = first_block ? 0.0f : row->l * shrink;
    for (int64_t t = 0; t < visible; t++) {
        const float weight = sparge_exp2(scale * s[t] - m);
        p[t] = codes ? floorf(fmaf(127.0f, sparge_exp2(scale * (s[t] - most)), 0.5f))
               : x->o.pv_dtype == SPARGE_BF16 ? round_to(SPARGE_BF16, weight)
                                              : weight;
        partial[t % 16] += p[t];
    }
    for (int half = 8; half > 0; half /= 2)
        for (int n = 0; n < half; n++)
            partial[n] += partial[n + half];
    const float to_m = sparge_exp2(local - m) / 127.0f;
    row->l += codes ? to_m * partial[0] : partial[0];
    for (int64_t c = 0; c < dim; c++) {
        float *o = &row->o[c], sum = 0.0f;
        for (int64_t t = 0; t < visible; t++) {
            v[t] = ((const float *)x->v.x)[at + t * dim + c];
            if (x->o.pv_dtype == SPARGE_BF16)
                v[t] = round_to(SPARGE_BF16, v[t]);
            if (codes)
                sum += p[t] * (float)a->intermediates.v_int[at + t * dim + c];
        }
        *o *= shrink;
        if (codes) {
            const int64_t block = blocks(x->p.k_len, x->o.block_k) * kv + first / x->o.block_k;
            *o = fmaf(to_m * a->intermediates.v_scale[block * dim + c], sum, *o);
        } else if (x->o.pv_dtype == SPARGE_BF16)
            *o = chain(*o, p, v, 1, visible, x->o.isa);
        else
            for (int64_t t = 0; t < visible; t++)
                *o = fmaf(p[t], v[t], *o);
    }
}

/* The scores of a query and the keys from `first` on; returns what makes log2 units of them. */
static float replay_qk(const problem *x, const answer *a, int64_t n, int64_t kv, int64_t query,
                       int64_t first, int64_t keys, float *s)
{
    const int64_t dim = x->p.dim, q_at = (n * x->p.q_len + query) * dim;
    const float softmax_scale =
        x->o.softmax_scale > 0.0f ? x->o.softmax_scale : 1.0f / sqrtf((float)dim);
    for (int64_t t = 0; t < keys; t++) {
        const int64_t k_at = (kv * x->p.k_len + first + t) * dim;
        float q[LONGEST], k[LONGEST], sum = 0.0f;
        for (int64_t c = 0; c < dim; c++) {
            const float mean = x->o.smooth_k ? a->intermediates.k_mean[kv * dim + c] : 0.0f;
            q[c] = x->q.x[q_at + c];
            k[c] = x->k.x[k_at + c] - mean;
            if (x->o.qk_dtype == SPARGE_BF16) {
                q[c] = round_to(SPARGE_BF16, q[c]);
                k[c] = round_to(SPARGE_BF16, k[c]);
            }
            if (x->o.qk_dtype == SPARGE_INT8)
                sum += (float)(a->intermediates.q_int[q_at + c] * a->intermediates.k_int[k_at + c]);
            else
                sum = fmaf(q[c], k[c], sum);
        }
        s[t] = x->o.qk_dtype == SPARGE_BF16 ? chain(0.0f, q, k, 1, dim, x->o.isa) : sum;
    }
    if (x->o.qk_dtype != SPARGE_INT8)
        return softmax_scale * 0x1.715476p0f;
    const int64_t i = query / x->o.block_q, j = first / x->o.block_k;
    return a->intermediates.q_scale[n * blocks(x->p.q_len, x->o.block_q) + i] *
           a->intermediates.k_scale[kv * blocks(x->p.k_len, x->o.block_k) + j] * softmax_scale *
           0x1.715476p0f;
}

/* m, l and o of every row, bit for bit. lambda decides for single rows. Returns how often it skips.
 */
static int64_t replay(const problem *x)
{
    answer a = attend(x);
    const int64_t group = x->p.heads / x->p.kv_heads;
    const float lambda = x->o.thresholds.lambda;
    int64_t skipped = 0;
    for (int64_t line = 0; line < problem_rows(x); line++) {
        const int64_t n = line / x->p.q_len, query = line % x->p.q_len, kv = n / group;
        float o[LONGEST] = {0};
        replayed row = {-INFINITY, 0.0f, o};
        for (int64_t first = 0; first < x->p.k_len; first += x->o.block_k) {
            int64_t keys = smaller(x->o.block_k, x->p.k_len - first), visible = 0;
            float s[LONGEST];
            if (!mask_has(x, n / x->p.heads, n % x->p.heads, query / x->o.block_q,
                          first / x->o.block_k))
                continue;
            const int64_t last =
                query + (x->o.causal == SPARGE_CAUSAL_END ? x->p.k_len - x->p.q_len : 0);
            while (visible < keys && (x->o.causal == SPARGE_CAUSAL_NONE || first + visible <= last))
                visible++;
            if (!visible)
                continue;
            const float scale = replay_qk(x, &a, n, kv, query, first, visible, s);
            float local = -INFINITY;
            for (int64_t t = 0; t < visible; t++)
                local = fmaxf(local, scale * s[t]);
            if (row.m > -INFINITY && local - row.m <= lambda * 0x1.715476p0f)
                skipped++;
            else
                replay_pv(x, &row, s, visible, scale, &a, kv, first);
        }
        check_equal(a.intermediates.m[line], row.m + 0.0f);
        check_equal(a.intermediates.l[line], row.l);
        for (int64_t c = 0; c < x->p.dim_v; c++)
            check_equal(a.o.x[line * x->p.dim_v + c],
                        (row.m == -INFINITY ? 0.0f : o[c] * (1.0f / row.l)) + 0.0f);
    }
    answer_free(&a);
    return skipped;
}

/* Which of the nine pairs of types: those with bf16. */
static const sparge_dtype pairs[][2] = {{SPARGE_BF16, SPARGE_BF16},
                                        {SPARGE_BF16, SPARGE_F32},
                                        {SPARGE_BF16, SPARGE_INT8},
                                        {SPARGE_F32, SPARGE_BF16},
                                        {SPARGE_INT8, SPARGE_BF16}};

Test(bf16_attend, the_definition_once_more)
{
    static const int64_t block_k[] = {16, 64, 33, 100, 7}, dim[] = {16, 64, 1, 33, 80};
    int64_t skipped = 0;
    for (int64_t n = 0; n < 80; n++) {
        check_case("replay %lld: qk %s pv %s, isa %s", (long long)n,
                   sparge_dtype_string(pairs[n % 5][0]), sparge_dtype_string(pairs[n % 5][1]),
                   sparge_isa_string(orders[n / 5 % 2]));
        shape s = shape_of(1 + n % 2, 4, 2, check_int(1, 90), check_int(1, 220),
                           dim[check_int(0, 4)], check_int(1, 20));
        s.q = s.k = s.v = (sparge_dtype[]){SPARGE_F32, SPARGE_BF16, SPARGE_F16}[n / 10 % 3];
        s.layout_k = s.layout_v = layout_at_random();
        problem x = problem_make(&s);
        x.o.qk_dtype = pairs[n % 5][0];
        x.o.pv_dtype = pairs[n % 5][1];
        x.o.isa = orders[n / 5 % 2];
        x.o.block_k = block_k[check_int(0, 4)];
        x.o.block_q = check_int(1, 40);
        x.o.causal = (sparge_causal)check_int(0, 2);
        x.o.smooth_k = check_int(0, 1);
        x.o.skip_rows = 1;
        x.o.thresholds.lambda = n % 3 ? -INFINITY : -2.0f;
        if (n % 4 == 1)
            mask_fill(&x, 0.6f);
        skipped += replay(&x);
        problem_free(&x);
    }
    check(skipped > 100, "lambda skipped %lld times", (long long)skipped);
}

/* By default the order is that of VDPBF16PS; the result says whose it is. */
Test(bf16_attend, the_order_is_that_of_isa)
{
    for (int64_t n = 0; n < COUNT(pairs); n++) {
        check_case("qk %s pv %s", sparge_dtype_string(pairs[n][0]),
                   sparge_dtype_string(pairs[n][1]));
        const shape s = shape_of(1, 2, 1, 40, 200, 64, 16);
        problem x = problem_make(&s);
        x.o.qk_dtype = pairs[n][0];
        x.o.pv_dtype = pairs[n][1];
        answer by_default = attend(&x);
        x.o.isa = SPARGE_ISA_AVX512VNNI;
        answer by_pairs = attend(&x);
        x.o.isa = SPARGE_ISA_AMX;
        answer by_tiles = attend(&x);
        same_answer(&by_default, &by_pairs);
        check_equal((int)by_default.result.isa, (int)SPARGE_ISA_AVX512VNNI);
        check_equal((int)by_tiles.result.isa, (int)SPARGE_ISA_AMX);
        const size_t bytes = (size_t)tensor_count(&by_pairs.o) * sizeof(float);
        check(memcmp(by_pairs.o.x, by_tiles.o.x, bytes) != 0, "both orders gave the same bits");
        answer_free(&by_default);
        answer_free(&by_pairs);
        answer_free(&by_tiles);
        problem_free(&x);
    }
}

/* ---- By hand ---- */

/* One query and four keys of four channels, not smoothed, softmax_scale 1. */
static problem four(const float q[4], const float k[4], const float v[4])
{
    const shape s = shape_of(1, 1, 1, 1, 4, 4, 1);
    problem x = problem_make(&s);
    x.o.qk_dtype = x.o.pv_dtype = SPARGE_BF16;
    x.o.smooth_k = false;
    x.o.softmax_scale = 1.0f;
    for (int64_t n = 0; n < 16; n++)
        x.k.x[n] = k[n % 4];
    memcpy(x.q.x, q, 4 * sizeof *q);
    memcpy(x.v.x, v, 4 * sizeof *v);
    problem_write(&x);
    return x;
}

Test(bf16_attend, by_hand)
{
    static const struct {
        const char *what;
        float q[4], k[4], v[4], m[2], o[2]; /* by pairs, by tiles; m is without log2 e */
    } table[] = {
        {"scores",
         {0x1p12f, 1, -0x1p12f, 1},
         {0x1p12f, 1, 0x1p12f, 1},
         {1, 2, 3, 4},
         {0, 2},
         {2.5f, 2.5f}},
        {"values", {1}, {1}, {0x1p24f, 1, -0x1p24f, 1}, {1, 1}, {0, 0.5f}},
        {"q and k are rounded",
         {0x1.01p0f, 0x1.03p0f},
         {1, 1},
         {1, 1, 1, 1},
         {2.015625f, 2.015625f},
         {1, 1}},
        {"v is rounded",
         {1},
         {1},
         {0x1.01p0f, 0x1.03p0f, 0, 0},
         {1, 1},
         {0.50390625f, 0.50390625f}},
        {"a subnormal v is 0",
         {1},
         {1},
         {0x1.8p-127f, 0x1p-126f, 0, 0},
         {1, 1},
         {0x1p-128f, 0x1p-128f}},
        {"so is one that rounds to 2^-126",
         {1},
         {1},
         {0x1.fffffcp-127f, 0x1p-126f, 0, 0},
         {1, 1},
         {0x1p-128f, 0x1p-128f}},
        {"a subnormal sum is 0", {0x1p-70f}, {0x1p-57f}, {1, 1, 1, 1}, {0, 0}, {1, 1}},
        {"the smallest is not",
         {0x1p-70f},
         {0x1p-56f},
         {1, 1, 1, 1},
         {0x1p-126f, 0x1p-126f},
         {1, 1}},
        {"a subnormal q is 0", {0x1p-127f}, {0x1p10f}, {1, 1, 1, 1}, {0, 0}, {1, 1}},
        {"of values too", {1}, {1}, {0x1.8p-126f, -0x1p-126f, 1, 1}, {1, 1}, {0.5f, 0.5f}},
    };
    for (int64_t n = 0; n < COUNT(table); n++)
        for (int64_t order = 0; order < 2; order++) {
            check_case("%s, isa %s", table[n].what, sparge_isa_string(orders[order]));
            problem x = four(table[n].q, table[n].k, table[n].v);
            x.o.isa = orders[order];
            answer a = attend(&x);
            check_equal(a.intermediates.m[0], table[n].m[order] * 0x1.715476p0f);
            check_equal(a.intermediates.l[0], 4.0f);
            check_equal(a.o.x[0], table[n].o[order]);
            answer_free(&a);
            problem_free(&x);
        }
}

/* As in f32: -inf weighs 0, a row with +inf or NaN, or with -inf alone, is NaN. */
Test(bf16_attend, scores_beyond_f32)
{
    for (int64_t order = 0; order < 2; order++)
        for (int64_t n = 0; n < 4; n++) {
            check_case("scores %lld, isa %s", (long long)n, sparge_isa_string(orders[order]));
            const float k = n == 1 ? 0x1p64f : n == 3 ? 0.0f : -0x1p64f;
            problem x = four((float[4]){0x1p64f, 0x1p64f}, (float[4]){k}, (float[4]){1, 2, 3, 4});
            x.o.isa = orders[order];
            if (n == 0)
                x.k.x[8] = 0.0f; /* a finite score beside -inf */
            if (n == 3) {        /* inf - inf by tiles, -inf by pairs */
                x.k.x[12] = 0x1p64f;
                x.k.x[13] = -0x1p64f;
            }
            problem_write(&x);
            answer a = attend(&x);
            const bool nan = n == 1 || n == 2 || (n == 3 && order == 1);
            check(isnan(a.o.x[0]) == nan && isnan(a.lse[0]) == nan, "o is %g, lse %g",
                  (double)a.o.x[0], (double)a.lse[0]);
            if (!nan)
                check_equal(a.o.x[0], n == 0 ? 3.0f : 6.0f * (1.0f / 3.0f));
            answer_free(&a);
            problem_free(&x);
        }
}

/* p = 2^-0.5 = 0x1.6a09e6p-1 rounds to 0x1.6ap-1, in o and in l. */
Test(bf16_attend, l_adds_what_o_adds)
{
    for (int64_t order = 0; order < 2; order++) {
        check_case("isa %s", sparge_isa_string(orders[order]));
        problem x = four((float[4]){1}, (float[4]){0}, (float[4]){1});
        x.o.softmax_scale = 0x1.62e43p-1f; /* ln 2 */
        x.o.isa = orders[order];
        x.k.x[0] = -0.5f;
        x.k.x[8] = x.k.x[12] = -100.0f;
        problem_write(&x);
        answer a = attend(&x);
        check_close(sparge_exp2(-0.5f), 0x1.6a09e6p-1, 1e-7);
        check_equal(a.intermediates.l[0], 0x1.6ap-1f + 1.0f);
        check_equal(a.o.x[0], 0x1.6ap-1f * (1.0f / (0x1.6ap-1f + 1.0f)));
        answer_free(&a);
        problem_free(&x);
    }
}

/* ---- What it keeps, and what it costs ---- */

Test(bf16_attend, values_of_one)
{
    double worst = 0.0;
    for (int64_t n = 0; n < 20; n++) {
        check_case("v of 1, %lld", (long long)n);
        const shape s = shape_of(1, 2, 1, 30, n % 5 == 4 ? 3000 : check_int(1, 300), 16, 3);
        problem x = problem_make(&s);
        x.o.qk_dtype = n % 2 ? SPARGE_BF16 : SPARGE_INT8;
        x.o.pv_dtype = SPARGE_BF16;
        x.o.block_k = 64;
        x.o.isa = orders[n / 2 % 2];
        x.o.causal = (sparge_causal)(n % 3);
        for (int64_t e = 0; e < tensor_count(&x.v); e++)
            x.v.x[e] = 1.0f;
        problem_write(&x);
        answer a = attend(&x);
        for (int64_t e = 0; e < tensor_count(&a.o); e++)
            if (a.intermediates.l[e / 3] > 0.0f) {
                check_close(a.o.x[e], 1.0, 1e-5);
                worst = fmax(worst, fabs((double)a.o.x[e] - 1.0));
            }
        answer_free(&a);
        problem_free(&x);
    }
    cr_log_info("values of 1 are off by %g at most", worst);
}

/* Relative L1 of o, and the worst distance of lse, from attention in double. */
static double error_of(problem *x, sparge_dtype qk, sparge_dtype pv, double *lse)
{
    sparge_error error;
    x->o.qk_dtype = qk;
    x->o.pv_dtype = pv;
    double *o = calloc((size_t)(problem_rows(x) * x->p.dim_v), sizeof *o);
    double *want_lse = calloc((size_t)problem_rows(x), sizeof *want_lse), off = 0.0, sum = 0.0;
    check(sparge_oracle(&x->p, &x->o, NULL, SPARGE_ORACLE_REAL, o, want_lse, NULL, &error) ==
              SPARGE_OK,
          "%s", error.text);
    answer a = attend(x);
    for (int64_t e = 0; e < tensor_count(&a.o); e++) {
        off += fabs((double)a.o.x[e] - o[e]);
        sum += fabs(o[e]);
    }
    *lse = 0.0;
    for (int64_t r = 0; r < problem_rows(x); r++)
        if (isfinite(want_lse[r]))
            *lse = fmax(*lse, fabs((double)a.lse[r] - want_lse[r]));
    free(o);
    free(want_lse);
    answer_free(&a);
    return off / sum;
}

/* Of normal numbers. An element is off by 2^-7 / sqrt(12) of its power of 2 in the mean
 * square, 1.6e-3 of itself. Scores of q and k of variance 1 are off by sqrt(2) of that, 2.3e-3, and
 * o by as much of itself; p and v add as much again, in squares: 3.2e-3. l adds p as it is rounded,
 * so that lse is off by as much as p of a row that sees few keys. */
Test(bf16_attend, error_beside_int8)
{
    for (int64_t order = 0; order < 2; order++)
        for (int64_t causal = 0; causal < 3; causal += 2) {
            check_case("isa %s, causal %d", sparge_isa_string(orders[order]), (int)causal);
            const shape s = shape_of(1, 2, 1, 256, 256, 64, 64);
            problem x = problem_make(&s);
            tensor *const of[] = {&x.q, &x.k, &x.v};
            for (int64_t n = 0; n < 3; n++)
                for (int64_t e = 0; e < tensor_count(of[n]); e++)
                    of[n]->x[e] = check_normal();
            problem_write(&x);
            x.o.causal = (sparge_causal)causal;
            x.o.block_q = x.o.block_k = 64;
            double lse[5];
            const double int8 = error_of(&x, SPARGE_INT8, SPARGE_INT8, &lse[0]);
            x.o.isa = orders[order];
            const double both = error_of(&x, SPARGE_BF16, SPARGE_BF16, &lse[1]);
            const double qk = error_of(&x, SPARGE_BF16, SPARGE_F32, &lse[2]);
            const double pv = error_of(&x, SPARGE_F32, SPARGE_BF16, &lse[3]);
            x.o.isa = SPARGE_ISA_AUTO;
            const double f32 = error_of(&x, SPARGE_F32, SPARGE_F32, &lse[4]);
            cr_log_info("relative L1, causal %d, %s: bf16 %.2e (qk alone %.2e, pv alone %.2e), "
                        "int8 %.2e, f32 %.1e; lse: bf16 %.1e, int8 %.1e, f32 %.1e",
                        (int)causal, sparge_isa_string(orders[order]), both, qk, pv, int8, f32,
                        lse[1], lse[0], lse[4]);
            check(both > 2.5e-3 && both < 4e-3 && qk > 1.7e-3 && qk < both && pv > 1.7e-3 &&
                      pv < both,
                  "bf16 is off by %g, qk %g, pv %g", both, qk, pv);
            check(3.0 * both < int8, "bf16 is off by %g, int8 by %g", both, int8);
            check(lse[1] < 0.01 && lse[1] < lse[0] && lse[3] < 0x1p-8,
                  "lse is off by %g, in int8 by %g, by P alone %g", lse[1], lse[0], lse[3]);
            problem_free(&x);
        }
}

/* ---- Beside it ---- */

/* The prediction and what it tells are those of f32. */
Test(bf16_attend, the_prediction_is_in_f32)
{
    for (int64_t n = 0; n < 10; n++) {
        check_case("prediction %lld", (long long)n);
        const shape s = shape_of(1, 4, 2, 150, 170, 16, 8);
        problem x = problem_make(&s);
        x.o.thresholds = (sparge_thresholds){0.3f, 0.7f, SPARGE_OFF, -INFINITY, 0};
        x.o.smooth_k = n >= 5;                         /* a mean would make the key smaller */
        x.q.x[100 * 16] = n % 2 ? 0x1.ff8p127f : 1.0f; /* finite in f32 alone */
        x.k.x[50 * 16 + 3] = n % 3 ? 0x1.ff8p127f : 1.0f;
        problem_write(&x);
        sparge_mask want = {0}, got = {0};
        sparge_error error;
        check(!sparge_mask_alloc(&want, &x.p, &x.o, &error) &&
                  !sparge_mask_alloc(&got, &x.p, &x.o, &error),
              "%s", error.text);
        answer in_f32 = attention(&x, &want);
        x.o.qk_dtype = x.o.pv_dtype = SPARGE_BF16;
        answer in_bf16 = attention(&x, &got);
        check_same(got.bits, want.bits, got.heads * got.q_blocks * got.words);
        const int64_t lines = 4 * got.q_blocks;
        check_same(in_bf16.intermediates.q_pool, in_f32.intermediates.q_pool, lines * 16);
        check_same(in_bf16.intermediates.k_pool, in_f32.intermediates.k_pool,
                   2 * got.k_blocks * 16);
        check_same(in_bf16.intermediates.why, in_f32.intermediates.why, lines * got.k_blocks);
        check_same(in_bf16.intermediates.k_mean, in_f32.intermediates.k_mean,
                   x.o.smooth_k * 2 * 16);

        memcpy(want.bits, got.bits, (size_t)(lines * got.words) * sizeof *got.bits);
        x.mask = want;
        answer apart = attend(&x);
        same_answer(&apart, &in_bf16);
        answer_free(&apart);
        answer_free(&in_f32);
        answer_free(&in_bf16);
        sparge_mask_free(&got);
        problem_free(&x);
    }
}

/* What rounds to infinity is not finite where its product is in bf16: a query spoils its row, a key
 * the rows that see it, a value its channel of them. The rest has the bits that 0 there gives. */
Test(bf16_attend, what_bf16_cannot_hold)
{
    static const float large[] = {0x1.ffp127f, -FLT_MAX, INFINITY, NAN, 0x1.fefffep127f};
    for (int64_t n = 0; n < 5 * COUNT(large) * 3; n++) {
        const int64_t of = n / 5 % 3; /* q, k or v */
        const float value = large[n / 15];
        check_case("%c of %a, qk %s pv %s", "qkv"[of], (double)value,
                   sparge_dtype_string(pairs[n % 5][0]), sparge_dtype_string(pairs[n % 5][1]));
        const shape s = shape_of(1, 1, 1, 40, 48, 8, 5);
        problem x = problem_make(&s);
        tensor *const t = of == 0 ? &x.q : of == 1 ? &x.k : &x.v;
        x.o.causal = SPARGE_CAUSAL_START;
        x.o.smooth_k = false;
        x.o.qk_dtype = pairs[n % 5][0];
        x.o.pv_dtype = pairs[n % 5][1];
        const bool rounds = (of == 2 ? x.o.pv_dtype : x.o.qk_dtype) == SPARGE_BF16;
        const bool spoils = !isfinite(value) || (rounds && fabsf(value) >= 0x1.ffp127f);
        if (!spoils && of < 2) { /* then scores leave the range of f32 */
            problem_free(&x);
            continue;
        }
        float *const at = tensor_row(t, 0, 0, 20) + 3;
        *at = value;
        problem_write(&x);
        answer got = attend(&x);
        *at = spoils ? 0.0f : 0x1.fep127f;
        problem_write(&x);
        answer want = attend(&x);
        int64_t nans = 0;
        for (int64_t e = 0; e < tensor_count(&got.o); e++) {
            const int64_t row = e / 5, c = e % 5;
            const bool nan = spoils && (of == 0   ? row == 20
                                        : of == 1 ? row >= 20
                                                  : row >= 20 && c == 3);
            check(isnan(got.o.x[e]) == nan, "row %d channel %d is %g", (int)row, (int)c,
                  (double)got.o.x[e]);
            nans += nan;
            if (!nan && (of != 2 || rounds || spoils || c != 3))
                check_equal(got.o.x[e], want.o.x[e]);
            check(isnan(got.lse[row]) == (nan && of < 2), "lse of row %d is %g", (int)row,
                  (double)got.lse[row]);
        }
        check(nans == (!spoils ? 0 : of == 0 ? 5 : of == 1 ? 100 : 20), "%d NaNs", (int)nans);
        answer_free(&got);
        answer_free(&want);
        problem_free(&x);
    }
}

/* It has no codes: they are left as they were, and the oracle of codes is that of real values. */
Test(bf16_attend, there_are_no_codes)
{
    for (int64_t n = 0; n < COUNT(pairs); n++) {
        check_case("qk %s pv %s", sparge_dtype_string(pairs[n][0]),
                   sparge_dtype_string(pairs[n][1]));
        const shape s = shape_of(1, 1, 1, 20, 30, 8, 5);
        problem x = problem_make(&s);
        x.o.qk_dtype = pairs[n][0];
        x.o.pv_dtype = pairs[n][1];
        answer a = attend(&x);
        check((a.intermediates.q_int[0] == -1 && a.intermediates.k_int[7] == -1) ==
                  (x.o.qk_dtype != SPARGE_INT8),
              "codes of q and k");
        check((a.intermediates.v_int[0] == -1) == (x.o.pv_dtype != SPARGE_INT8), "codes of v");
        double got[100], want[100];
        sparge_error error;
        check(!sparge_oracle(&x.p, &x.o, NULL, SPARGE_ORACLE_CODES, got, NULL, NULL, &error), "%s",
              error.text);
        x.o.qk_dtype = x.o.qk_dtype == SPARGE_INT8 ? SPARGE_INT8 : SPARGE_F32;
        x.o.pv_dtype = x.o.pv_dtype == SPARGE_INT8 ? SPARGE_INT8 : SPARGE_F32;
        check(!sparge_oracle(&x.p, &x.o, NULL, SPARGE_ORACLE_CODES, want, NULL, NULL, &error), "%s",
              error.text);
        check_same(got, want, 100);
        answer_free(&a);
        problem_free(&x);
    }
}
