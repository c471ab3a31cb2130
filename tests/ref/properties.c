/* SPDX-License-Identifier: Apache-2.0 */
/* properties.c: what attention keeps when its input is changed, copied, cut or moved; no reference
 * is needed. Sums that change their order agree within rounding, everything else bit for bit. */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS, MAP_NORESERVE */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "tests/support/problem.h"

TestSuite(properties);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

enum { PAIRS = 9 }; /* of a precision of Q.K and one of P.V */

static const char *const precision_names[] = {"int8", "int12", "float"};

/* 2 batches of 4 heads on 2 key heads, 70 queries, 90 keys, smoothed, in pair n of precisions. */
static problem typical(const char *name, int64_t n)
{
    check_case("%s, qk %s pv %s", name, precision_names[n % 3], precision_names[n / 3 % 3]);
    const shape s = shape_of(2, 4, 2, 70, 90, 16, 8);
    problem x = problem_make(&s);
    x.o.qk_dtype = precisions[n % 3];
    x.o.pv_dtype = precisions[n / 3 % 3];
    return x;
}

/* o within share of the largest |o|, lse within share of 1 + |lse|. */
static void near_answer(const answer *got, const answer *want, double share)
{
    double largest = 0.0;
    const int64_t count = tensor_count(&want->o),
                  rows = want->o.batch * want->o.heads * want->o.tokens;
    int64_t o_at = -1, lse_at = -1;
    for (int64_t n = 0; n < count; n++)
        largest = fmax(largest, fabs((double)want->o.x[n]));
    for (int64_t n = 0; n < count; n++)
        if (!(fabs((double)got->o.x[n] - (double)want->o.x[n]) <= share * largest))
            o_at = n;
    for (int64_t n = 0; n < rows; n++)
        if (!(got->lse[n] == want->lse[n] || fabs((double)got->lse[n] - (double)want->lse[n]) <=
                                                 share * (1.0 + fabs((double)want->lse[n]))))
            lse_at = n;
    check(o_at < 0, "o[%lld] is %.9g, should be %.9g within %g", (long long)o_at,
          (double)got->o.x[o_at], (double)want->o.x[o_at], share * largest);
    check(lse_at < 0, "lse[%lld] is %.9g, should be %.9g", (long long)lse_at,
          (double)got->lse[lse_at], (double)want->lse[lse_at]);
}

/* Solves both and compares. */
static void same_problem(const problem *x, const problem *y)
{
    answer a = attend(x), b = attend(y);
    same_answer(&b, &a);
    answer_free(&a);
    answer_free(&b);
}

/* `tokens` rows of one head, from one tensor's x to another's. */
static void copy_rows(const tensor *to, int64_t b, int64_t h, int64_t at, const tensor *from,
                      int64_t b_from, int64_t h_from, int64_t at_from, int64_t tokens)
{
    if (tokens)
        memcpy(tensor_row(to, b, h, at), tensor_row(from, b_from, h_from, at_from),
               (size_t)(tokens * to->channels) * sizeof(float));
}

static void copy_head(const tensor *to, int64_t b, int64_t h, const tensor *from, int64_t b_from,
                      int64_t h_from)
{
    copy_rows(to, b, h, 0, from, b_from, h_from, 0, from->tokens);
}

static void copy_mask_row(problem *to, int64_t b, int64_t h, int64_t i, const problem *from,
                          int64_t b_from, int64_t h_from, int64_t i_from)
{
    for (int64_t j = 0; j < to->mask.k_blocks; j++)
        sparge_mask_set(&to->mask, b, h, i, j, mask_has(from, b_from, h_from, i_from, j));
}

/* The same question for other sizes; the caller fills in what is asked about. */
static problem like(const problem *x, int64_t batch, int64_t heads, int64_t kv_heads, int64_t q_len,
                    int64_t k_len)
{
    const shape s = shape_of(batch, heads, kv_heads, q_len, k_len, x->p.dim, x->p.dim_v);
    problem y = problem_make(&s);
    y.o = x->o;
    if (x->mask.bits)
        mask_fill(&y, 0.0f);
    return y;
}

/* The same question about the same values. */
static problem copy_of(const problem *x)
{
    problem y = like(x, x->p.batch, x->p.heads, x->p.kv_heads, x->p.q_len, x->p.k_len);
    memcpy(y.q.x, x->q.x, (size_t)tensor_count(&x->q) * sizeof(float));
    memcpy(y.k.x, x->k.x, (size_t)tensor_count(&x->k) * sizeof(float));
    memcpy(y.v.x, x->v.x, (size_t)tensor_count(&x->v) * sizeof(float));
    problem_write(&y);
    if (x->mask.bits)
        memcpy(y.mask.bits, x->mask.bits,
               (size_t)(y.mask.batch * y.mask.heads * y.mask.q_blocks * y.mask.words) *
                   sizeof *y.mask.bits);
    return y;
}

/* ---- Values ---- */

Test(properties, ones_in_ones_out)
{
    double skipped = 0.0;
    for (int64_t n = 0; n < 3 * PAIRS; n++) {
        problem x = typical("ones", n);
        x.o.causal = (sparge_causal)(n / PAIRS);
        x.o.thresholds.lambda = -0.2f;
        x.o.skip_rows = 2;
        mask_fill(&x, 0.4f);
        tensor_fill(&x.v, 1.0f, 1.0f);
        answer a = attend(&x);
        int64_t empty = 0, wrong = -1;
        for (int64_t e = 0; e < tensor_count(&a.o); e++) {
            const bool none = a.lse[e / 8] == -INFINITY;
            empty += none;
            if (!(none ? a.o.x[e] == 0.0f : fabsf(a.o.x[e] - 1.0f) <= 1e-5f))
                wrong = e;
        }
        check(wrong < 0, "o[%lld] is %.9g", (long long)wrong, (double)a.o.x[wrong]);
        check(empty < tensor_count(&a.o), "all rows are empty");
        skipped += (double)a.result.counts.qk_done - a.result.counts.pv_done;
        answer_free(&a);
        problem_free(&x);
    }
    check(skipped > 0.0, "lambda skipped nothing");
}

Test(properties, linear_in_v)
{
    for (int64_t n = 6; n < PAIRS; n++) {
        problem x = typical("linear", n), y = copy_of(&x), z = copy_of(&x);
        tensor_fill(&y.v, -1, 1);
        for (int64_t e = 0; e < tensor_count(&x.v); e++)
            z.v.x[e] = 2.5f * x.v.x[e] - 0.5f * y.v.x[e];
        tensor_write(&z.v);
        answer a = attend(&x), b = attend(&y), c = attend(&z);
        for (int64_t e = 0; e < tensor_count(&a.o); e++)
            a.o.x[e] = 2.5f * a.o.x[e] - 0.5f * b.o.x[e];
        near_answer(&c, &a, 2e-6);

        for (int64_t e = 0; e < tensor_count(&x.v); e++) { /* O(V) t = O(V t) */
            const float *row = &x.v.x[e - e % 8];
            z.v.x[e] = e % 8 ? 0.0f : row[0] - 2.0f * row[3] + 0.5f * row[7];
        }
        tensor_write(&z.v);
        answer_free(&a);
        answer_free(&c);
        a = attend(&x);
        c = attend(&z);
        for (int64_t e = 0; e < tensor_count(&a.o); e++) {
            const float *row = &a.o.x[e - e % 8];
            if (e % 8 == 0)
                a.o.x[e] = row[0] - 2.0f * row[3] + 0.5f * row[7];
        }
        for (int64_t e = 0; e < tensor_count(&a.o); e++)
            if (e % 8)
                a.o.x[e] = 0.0f;
        near_answer(&c, &a, 2e-6);
        answer_free(&a);
        answer_free(&b);
        answer_free(&c);
        problem_free(&x);
        problem_free(&y);
        problem_free(&z);
    }
}

/* A power of two goes through every rounding, and so does a sign; channels do not see each other.
 */
Test(properties, v_scaled_negated_or_with_channels_moved)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("v", n), y = copy_of(&x);
        for (int64_t e = 0; e < tensor_count(&x.v); e++)
            y.v.x[e - e % 8 + (e * 3 + 1) % 8] = -4.0f * x.v.x[e];
        tensor_write(&y.v);
        answer a = attend(&x), b = attend(&y);
        for (int64_t e = 0; e < tensor_count(&a.o); e++)
            a.o.x[e] *= -4.0f;
        float row[8];
        for (int64_t e = 0; e < tensor_count(&a.o); e += 8) {
            for (int64_t c = 0; c < 8; c++)
                row[(c * 3 + 1) % 8] = a.o.x[e + c];
            memcpy(&a.o.x[e], row, sizeof row);
        }
        same_answer(&b, &a);
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);
    }
}

Test(properties, scale_moves_between_q_k_and_scale)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("softmax_scale", n), y = copy_of(&x);
        x.o.softmax_scale = 0.3f;
        y.o.softmax_scale = x.o.softmax_scale / 4.0f;
        for (int64_t e = 0; e < tensor_count(&x.q); e++)
            y.q.x[e] *= 2.0f;
        for (int64_t e = 0; e < tensor_count(&x.k); e++)
            y.k.x[e] *= 2.0f;
        problem_write(&y);
        x.o.thresholds = y.o.thresholds = (sparge_thresholds){0.5f, 0.8f, SPARGE_OFF, -2.0f, 0};
        same_problem(&x, &y);
        answer a = attention(&x, NULL), b = attention(&y, NULL);
        same_answer(&b, &a);
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);
    }
}

/* Keys in eighths and 64 of them: their mean is exact, and so is what is left of each key. */
Test(properties, a_vector_added_to_every_key_changes_nothing)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        check_case("shift, pair %lld", (long long)n);
        const shape s = shape_of(1, 2, 1, 40, 64, 8, 4);
        problem x = problem_make(&s);
        x.o.qk_dtype = precisions[n % 3];
        x.o.pv_dtype = precisions[n / 3];
        for (int64_t e = 0; e < tensor_count(&x.k); e++)
            x.k.x[e] = (float)check_int(-16, 16) / 8.0f;
        problem_write(&x);
        problem y = copy_of(&x);
        for (int64_t e = 0; e < tensor_count(&x.k); e++)
            y.k.x[e] += (float)(e % 8 * 30 - 100);
        problem_write(&y);
        answer a = attend(&x), b = attend(&y);
        check_same_as("o", b.o.x, a.o.x, tensor_count(&a.o));
        if (n % 3 < 2)
            check_same_as("codes of k", b.intermediates.k_int, a.intermediates.k_int,
                          tensor_count(&x.k));
        for (int64_t line = 0; line < problem_rows(&x); line++) {
            double shift = 0.0;
            for (int64_t c = 0; c < 8; c++)
                shift += (double)x.q.x[line * 8 + c] * (double)(c * 30 - 100) / sqrt(8);
            check_close(b.lse[line], (double)a.lse[line] + shift, 1e-5 * (1.0 + fabs(shift)));
        }
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);

        problem u = typical("shift of any keys", n), w = copy_of(&u);
        for (int64_t e = 0; e < tensor_count(&u.k); e++)
            w.k.x[e] += (float)(e % 16) - 8.0f;
        problem_write(&w);
        a = attend(&u);
        b = attend(&w);
        memcpy(b.lse, a.lse, (size_t)problem_rows(&u) * sizeof(float));
        near_answer(&b, &a,
                    n % 3 == 0 ? 1e-2 : 1e-3); /* a k that rounds otherwise has another code */
        answer_free(&a);
        answer_free(&b);
        problem_free(&u);
        problem_free(&w);
    }
}

/* ---- Order ---- */

Test(properties, key_blocks_in_any_order)
{
    static const int64_t place[] = {3, 0, 5, 1, 4, 2};
    for (int64_t n = 0; n < PAIRS; n++) {
        check_case("key blocks, pair %lld", (long long)n);
        const shape s = shape_of(1, 2, 1, 40, 96, 16, 8);
        problem x = problem_make(&s);
        x.o.qk_dtype = precisions[n % 3];
        x.o.pv_dtype = precisions[n / 3];
        x.o.smooth_k =
            x.o.qk_dtype == SPARGE_F32; /* a mean may round otherwise, and codes with it */
        mask_fill(&x, 0.6f);
        problem y = copy_of(&x);
        for (int64_t j = 0; j < 6; j++) {
            copy_rows(&y.k, 0, 0, place[j] * 16, &x.k, 0, 0, j * 16, 16);
            copy_rows(&y.v, 0, 0, place[j] * 16, &x.v, 0, 0, j * 16, 16);
            for (int64_t line = 0; line < 6; line++)
                sparge_mask_set(&y.mask, 0, line / 3, line % 3, place[j],
                                mask_has(&x, 0, line / 3, line % 3, j));
        }
        problem_write(&y);
        answer a = attend(&x), b = attend(&y);
        near_answer(&b, &a, 3e-6);
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);
    }
}

/* Codes do not see the order of the rows of a block; integer sums do not either. */
Test(properties, rows_of_a_block_in_any_order)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("rows", n);
        x.o.smooth_k = false;
        mask_fill(&x, 0.6f);
        problem y = copy_of(&x);
        for (int64_t line = 0; line < 4; line++)
            for (int64_t t = 0; t < 80; t++) {
                const int64_t to = t - t % 16 + (t * 5 + 3) % 16;
                copy_rows(&y.k, line / 2, line % 2, to, &x.k, line / 2, line % 2, t, 1);
                copy_rows(&y.v, line / 2, line % 2, to, &x.v, line / 2, line % 2, t, 1);
            }
        problem_write(&y);
        answer a = attend(&x), b = attend(&y);
        if (x.o.pv_dtype == SPARGE_F32)
            near_answer(&b, &a, 3e-6);
        else
            same_answer(&b, &a);
        answer_free(&b);

        for (int64_t line = 0; line < 8; line++)
            for (int64_t t = 0; t < 64; t++)
                copy_rows(&y.q, line / 4, line % 4, t - t % 16 + (t * 5 + 3) % 16, &x.q, line / 4,
                          line % 4, t, 1);
        memcpy(y.k.x, x.k.x, (size_t)tensor_count(&x.k) * sizeof(float));
        memcpy(y.v.x, x.v.x, (size_t)tensor_count(&x.v) * sizeof(float));
        problem_write(&y);
        b = attend(&y);
        for (int64_t line = 0; line < 8; line++)
            for (int64_t t = 0; t < 64; t++) {
                const int64_t to = t - t % 16 + (t * 5 + 3) % 16;
                check(!memcmp(tensor_row(&b.o, line / 4, line % 4, to),
                              tensor_row(&a.o, line / 4, line % 4, t), 32),
                      "row %lld of line %lld is not what row %lld was", (long long)to,
                      (long long)line, (long long)t);
                check_equal(b.lse[line * 70 + to], a.lse[line * 70 + t]);
            }
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);
    }
}

/* Heads, with their key heads, in reverse; batches swapped. */
Test(properties, heads_and_batches_in_any_order)
{
    double done[4] = {0};
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("heads", n);
        x.o.skip_rows = 4;
        mask_fill(&x, 0.6f);
        problem y = copy_of(&x);
        const sparge_thresholds thresholds[] = {{0, 1, SPARGE_OFF, -0.6f, 0},
                                                {0, 1, SPARGE_OFF, -0.3f, 0},
                                                {0, 1, SPARGE_OFF, 0.0f, 0},
                                                {0, 1, SPARGE_OFF, -INFINITY, 0}};
        const sparge_thresholds reversed[] = {thresholds[3], thresholds[2], thresholds[1],
                                              thresholds[0]};
        for (int64_t line = 0; line < 8; line++) {
            const int64_t b = line / 4, h = line % 4;
            copy_head(&y.q, 1 - b, 3 - h, &x.q, b, h);
            for (int64_t i = 0; i < 5; i++)
                copy_mask_row(&y, 1 - b, 3 - h, i, &x, b, h, i);
            if (h < 2) {
                copy_head(&y.k, 1 - b, 1 - h, &x.k, b, h);
                copy_head(&y.v, 1 - b, 1 - h, &x.v, b, h);
            }
        }
        problem_write(&y);
        x.o.per_head = thresholds;
        y.o.per_head = reversed;
        answer a = attend(&x), b = attend(&y);
        for (int64_t line = 0; line < 8; line++) {
            const int64_t to = (1 - line / 4) * 4 + 3 - line % 4;
            check_same_as("o", b.o.x + to * 70 * 8, a.o.x + line * 70 * 8, 70 * 8);
            check_same_as("lse", b.lse + to * 70, a.lse + line * 70, 70);
            check_equal(b.head[to].pv_tokens, a.head[line].pv_tokens);
            check_equal(b.head[to].qk_done, a.head[line].qk_done);
            done[line % 4] += a.head[line].pv_done / (double)a.head[line].qk_done;
        }
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);
    }
    check(done[0] < done[3] && done[1] < done[3] && done[2] < done[3] && done[3] == 2.0 * PAIRS,
          "heads computed %g %g %g %g of P.V", done[0], done[1], done[2], done[3]);
}

/* ---- Parts ---- */

/* Each head of each batch alone, and each of its query blocks alone. */
Test(properties, heads_and_query_blocks_alone)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("alone", n);
        x.o.thresholds.lambda = -1.0f;
        mask_fill(&x, 0.6f);
        answer all = attend(&x);
        for (int64_t line = 0; line < 8; line++) {
            const int64_t b = line / 4, h = line % 4;
            problem one = like(&x, 1, 1, 1, 70, 90);
            copy_head(&one.q, 0, 0, &x.q, b, h);
            copy_head(&one.k, 0, 0, &x.k, b, h / 2);
            copy_head(&one.v, 0, 0, &x.v, b, h / 2);
            problem_write(&one);
            for (int64_t i = 0; i < 5; i++)
                copy_mask_row(&one, 0, 0, i, &x, b, h, i);
            answer a = attend(&one);
            check_same_as("o of a head", a.o.x, all.o.x + line * 70 * 8, 70 * 8);
            check_same_as("lse of a head", a.lse, all.lse + line * 70, 70);
            check_equal(a.result.counts.pv_done, all.head[line].pv_done);
            for (int64_t i = 0; i < 5; i++) {
                const int64_t rows = i < 4 ? 16 : 6;
                problem part = like(&one, 1, 1, 1, rows, 90);
                copy_rows(&part.q, 0, 0, 0, &one.q, 0, 0, i * 16, rows);
                copy_head(&part.k, 0, 0, &one.k, 0, 0);
                copy_head(&part.v, 0, 0, &one.v, 0, 0);
                problem_write(&part);
                copy_mask_row(&part, 0, 0, 0, &one, 0, 0, i);
                answer c = attend(&part);
                check_same_as("o of a query block", c.o.x, a.o.x + i * 16 * 8, rows * 8);
                check_same_as("lse of a query block", c.lse, a.lse + i * 16, rows);
                answer_free(&c);
                problem_free(&part);
            }
            answer_free(&a);
            problem_free(&one);
        }
        answer_free(&all);
        problem_free(&x);
    }
}

Test(properties, grouped_heads_equal_repeated_heads)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("groups", n), y = like(&x, 2, 4, 4, 70, 90);
        memcpy(y.q.x, x.q.x, (size_t)tensor_count(&x.q) * sizeof(float));
        for (int64_t line = 0; line < 8; line++) {
            copy_head(&y.k, line / 4, line % 4, &x.k, line / 4, line % 4 / 2);
            copy_head(&y.v, line / 4, line % 4, &x.v, line / 4, line % 4 / 2);
        }
        problem_write(&y);
        x.o.thresholds = y.o.thresholds = (sparge_thresholds){0.5f, 0.7f, SPARGE_OFF, -1.0f, 0};
        answer a = attention(&x, NULL), b = attention(&y, NULL);
        same_answer(&b, &a);
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);
    }
}

/* Keys 0 .. cut and the rest, each softmax alone, weighed by exp(lse). */
Test(properties, parts_of_the_keys_merge_by_lse)
{
    for (int64_t n = 0; n < 12; n++) {
        problem x = typical("merge", 6 + n % 3);
        const int64_t cut =
            n % 3 == 2 ? 7 + 20 * (n / 3) : 16 * (1 + n / 3); /* codes: whole blocks alone */
        x.o.smooth_k = n % 3 == 2;
        problem low = like(&x, 2, 4, 2, 70, cut), high = like(&x, 2, 4, 2, 70, 90 - cut);
        memcpy(low.q.x, x.q.x, (size_t)tensor_count(&x.q) * sizeof(float));
        memcpy(high.q.x, x.q.x, (size_t)tensor_count(&x.q) * sizeof(float));
        for (int64_t line = 0; line < 4; line++) {
            copy_rows(&low.k, line / 2, line % 2, 0, &x.k, line / 2, line % 2, 0, cut);
            copy_rows(&low.v, line / 2, line % 2, 0, &x.v, line / 2, line % 2, 0, cut);
            copy_rows(&high.k, line / 2, line % 2, 0, &x.k, line / 2, line % 2, cut, 90 - cut);
            copy_rows(&high.v, line / 2, line % 2, 0, &x.v, line / 2, line % 2, cut, 90 - cut);
        }
        problem_write(&low);
        problem_write(&high);
        answer all = attend(&x), a = attend(&low), b = attend(&high);
        for (int64_t r = 0; r < problem_rows(&x); r++) {
            const double lse = (double)a.lse[r] + log1p(exp((double)b.lse[r] - (double)a.lse[r]));
            for (int64_t c = r * 8; c < r * 8 + 8; c++)
                a.o.x[c] = (float)(exp((double)a.lse[r] - lse) * (double)a.o.x[c] +
                                   exp((double)b.lse[r] - lse) * (double)b.o.x[c]);
            a.lse[r] = (float)lse;
        }
        near_answer(&a, &all, 5e-6);
        answer_free(&all);
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&low);
        problem_free(&high);
    }
}

/* Each key twice: the weights halve, lse grows by ln 2. */
Test(properties, keys_twice)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("twice", n), y = like(&x, 2, 4, 2, 70, 192);
        const problem z =
            like(&x, 2, 4, 2, 70, 96); /* whole blocks, so that the copies' codes are the same */
        memcpy(y.q.x, z.q.x, (size_t)tensor_count(&z.q) * sizeof(float));
        for (int64_t line = 0; line < 8; line++) {
            copy_rows(&y.k, line / 4, line / 2 % 2, line % 2 * 96, &z.k, line / 4, line / 2 % 2, 0,
                      96);
            copy_rows(&y.v, line / 4, line / 2 % 2, line % 2 * 96, &z.v, line / 4, line / 2 % 2, 0,
                      96);
        }
        problem_write(&y);
        problem once = z;
        once.o.smooth_k = y.o.smooth_k = n % 3 == 2;
        answer a = attend(&once), b = attend(&y);
        for (int64_t r = 0; r < problem_rows(&y); r++)
            a.lse[r] += 0.6931472f;
        near_answer(&b, &a, 5e-6);
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);
        problem_free(&once);
    }
}

/* ---- Masks ---- */

/* tau 1 keeps all that is visible, whatever theta says; so does a full mask, and none at all. */
Test(properties, everything_kept_equals_dense)
{
    static const float thetas[] = {-1.0f, 0.3f, 1.0f};
    for (int64_t n = 0; n < 3 * PAIRS; n++) {
        problem x = typical("dense", n);
        x.o.causal = (sparge_causal)(n / PAIRS);
        x.o.thresholds.theta = thetas[n % 5 % 3];
        x.o.thresholds.tau = 1.0f;
        answer dense = attend(&x), predicted = attention(&x, NULL);
        mask_fill(&x, 2.0f);
        answer full = attend(&x);
        same_answer(&predicted, &dense);
        same_answer(&full, &dense);
        check_equal(predicted.result.counts.qk_done, dense.result.counts.pairs);
        check_equal(predicted.result.counts.pv_tokens, dense.result.counts.tokens);
        answer_free(&dense);
        answer_free(&predicted);
        answer_free(&full);
        problem_free(&x);
    }
}

Test(properties, one_block_kept_equals_that_block_alone)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("one block", n);
        x.o.smooth_k = false;
        for (int64_t j = 0; j < 6; j++) {
            const int64_t keys = j < 5 ? 16 : 10;
            mask_fill(&x, 0.0f);
            for (int64_t line = 0; line < 40; line++)
                sparge_mask_set(&x.mask, line / 20, line / 5 % 4, line % 5, j, true);
            answer kept = attend(&x);
            sparge_mask_free(&x.mask);
            problem y = like(&x, 2, 4, 2, 70, keys);
            memcpy(y.q.x, x.q.x, (size_t)tensor_count(&x.q) * sizeof(float));
            for (int64_t line = 0; line < 4; line++) {
                copy_rows(&y.k, line / 2, line % 2, 0, &x.k, line / 2, line % 2, j * 16, keys);
                copy_rows(&y.v, line / 2, line % 2, 0, &x.v, line / 2, line % 2, j * 16, keys);
            }
            problem_write(&y);
            answer alone = attend(&y);
            same_answer(&kept, &alone);
            check_equal(kept.result.counts.qk_tokens, alone.result.counts.tokens);
            answer_free(&kept);
            answer_free(&alone);
            problem_free(&y);
        }
        problem_free(&x);
    }
}

/* All that no row of a query block may touch is NaN; its rows do not change by a bit. */
Test(properties, skipped_blocks_are_not_read)
{
    for (int64_t n = 0; n < 2 * PAIRS; n++) {
        check_case("NaN in skipped blocks, %lld", (long long)n);
        const shape s = shape_of(1, 2, 1, 70, 90, 16, 8);
        problem x = problem_make(&s);
        x.o.qk_dtype = precisions[n % 3];
        x.o.pv_dtype = precisions[n / 3 % 3];
        x.o.smooth_k = n >= PAIRS; /* then a key is read by the mean: v alone is poisoned */
        mask_fill(&x, 0.5f);
        answer clean = attend(&x);
        for (int64_t line = 0; line < 10; line++) {
            const int64_t h = line / 5, i = line % 5, rows = i < 4 ? 16 : 6;
            problem y = copy_of(&x);
            for (int64_t t = 0; t < 90; t++) {
                if (mask_has(&x, 0, h, i, t / 16))
                    continue;
                for (int64_t c = 0; c < 16 && !x.o.smooth_k; c++)
                    tensor_row(&y.k, 0, 0, t)[c] = NAN;
                for (int64_t c = 0; c < 8; c++)
                    tensor_row(&y.v, 0, 0, t)[c] = t % 2 ? NAN : INFINITY;
            }
            problem_write(&y);
            answer a = attend(&y);
            check_same_as("o", tensor_row(&a.o, 0, h, i * 16), tensor_row(&clean.o, 0, h, i * 16),
                          rows * 8);
            check_same_as("lse", a.lse + h * 70 + i * 16, clean.lse + h * 70 + i * 16, rows);
            answer_free(&a);
            problem_free(&y);
        }
        answer_free(&clean);
        problem_free(&x);
    }
}

/* ||o - o_dense|| <= 2 (1 - mass) max|v| in every row, mass = exp(lse - lse_dense) of what is kept.
 */
Test(properties, error_is_bounded_by_the_skipped_mass)
{
    check_case("skipped mass");
    const shape s = shape_of(2, 4, 2, 1280, 256, 16, 8);
    problem x = problem_make(&s);
    const sparge_thresholds thresholds[] = {{-1, 0.3f, SPARGE_OFF, -INFINITY, 0},
                                            {0.2f, 0.6f, SPARGE_OFF, -INFINITY, 0},
                                            {0.2f, 0.99f, SPARGE_OFF, -INFINITY, 0},
                                            {-1, SPARGE_OFF, 0.5f, -INFINITY, 0}};
    x.o.per_head = thresholds;
    answer dense = attend(&x), sparse = attention(&x, NULL);
    double largest = 0.0, tightest = 0.0;
    int64_t wrong = -1, lossy = 0;
    for (int64_t e = 0; e < tensor_count(&x.v); e++)
        largest = fmax(largest, fabs((double)x.v.x[e]));
    for (int64_t e = 0; e < tensor_count(&dense.o); e++) {
        const double lost = 1.0 - exp((double)sparse.lse[e / 8] - (double)dense.lse[e / 8]);
        const double off = fabs((double)sparse.o.x[e] - (double)dense.o.x[e]),
                     bound = 2.0 * lost * largest;
        if (!(off <= bound + 3e-6 * largest && lost > -1e-5))
            wrong = e;
        tightest = lost > 0.01 ? fmax(tightest, off / bound) : tightest;
        lossy += lost > 0.01;
    }
    check(wrong < 0, "row %lld channel %lld: %.9g dense, %.9g sparse", (long long)(wrong / 8),
          (long long)(wrong % 8), (double)dense.o.x[wrong], (double)sparse.o.x[wrong]);
    cr_log_info("%lld rows, %lld lost more than 1 %% of their mass; at most %.2f of the bound",
                (long long)problem_rows(&x), (long long)(lossy / 8), tightest);
    check(problem_rows(&x) >= 10000 && lossy / 8 > 1000, "too few rows lost anything");
    answer_free(&dense);
    answer_free(&sparse);
    problem_free(&x);
}

Test(properties, sparsity_grows_with_tau_and_lambda)
{
    static const float taus[] = {1.0f, 0.98f, 0.9f, 0.7f, 0.5f, 0.3f, 0.1f, 0.0f};
    static const float lambdas[] = {-INFINITY, -8.0f, -4.0f, -2.0f, -1.0f, -0.5f, 0.0f};
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("monotone", n), more = typical("monotone", n);
        x.o.thresholds.theta = more.o.thresholds.theta = -1.0f;
        int64_t kept = INT64_MAX;
        for (int64_t t = 0; t < COUNT(taus); t++) {
            more.o.thresholds.tau = x.o.thresholds.tau;
            mask_predict(&more); /* under the tau before */
            x.o.thresholds.tau = taus[t];
            mask_predict(&x);
            for (int64_t e = 0; t && e < 40; e++)
                for (int64_t j = 0; j < 6; j++)
                    check(!mask_has(&x, e / 20, e / 5 % 4, e % 5, j) ||
                              mask_has(&more, e / 20, e / 5 % 4, e % 5, j),
                          "tau %g keeps block %lld of line %lld, %g does not", (double)taus[t],
                          (long long)j, (long long)e, (double)more.o.thresholds.tau);
            answer a = attend(&x);
            check(a.result.counts.qk_done <= kept, "a smaller tau keeps more");
            kept = a.result.counts.qk_done;
            answer_free(&a);
        }
        check(kept == 40, "tau 0 keeps %lld blocks of 40 rows", (long long)kept);

        sparge_mask_free(&x.mask);
        x.o.skip_rows = 5;
        x.o.thresholds.lambda = -INFINITY;
        answer before = attend(&x);
        double least = 1.0;
        for (int64_t t = 0; t < COUNT(lambdas); t++) {
            x.o.thresholds.lambda = lambdas[t];
            answer a = attend(&x);
            for (int64_t e = 0; e < 40 * 6; e++)
                check(a.intermediates.pv_done[e] <= before.intermediates.pv_done[e],
                      "a larger lambda skips less");
            check_same_as("m", a.intermediates.m, before.intermediates.m,
                          problem_rows(&x)); /* none that raises m is skipped */
            least = fmin(least, a.result.counts.pv_done / (double)a.result.counts.qk_done);
            answer_free(&before);
            before = a;
        }
        check(least < 0.7, "lambda hardly mattered: %g", least);
        answer_free(&before);
        problem_free(&x);
        problem_free(&more);
    }
}

/* ---- Causality ---- */

/* Keys and values after `cut` change; the rows that see none of them must not, by a bit. */
static void future_is_unseen(problem *x, int64_t cut, bool keys)
{
    problem y = copy_of(x);
    for (int64_t line = 0; line < 4; line++)
        for (int64_t t = cut + 1; t < 90; t++) {
            for (int64_t c = 0; c < 16 && keys; c++)
                tensor_row(&y.k, line / 2, line % 2, t)[c] += 1e3f;
            for (int64_t c = 0; c < 8; c++)
                tensor_row(&y.v, line / 2, line % 2, t)[c] -= 1e3f;
        }
    problem_write(&y);
    answer a = attend(x), b = attend(&y);
    const int64_t last =
        cut - (x->o.causal == SPARGE_CAUSAL_END ? 90 - 70 : 0); /* the last such row */
    const int64_t rows = last < -1 ? 0 : last < 70 ? last + 1 : 70;
    bool changed = false;
    for (int64_t line = 0; line < 8; line++) {
        check_same_as("o before the cut", b.o.x + line * 70 * 8, a.o.x + line * 70 * 8, rows * 8);
        check_same_as("lse before the cut", b.lse + line * 70, a.lse + line * 70, rows);
        changed |=
            rows < 70 && memcmp(b.o.x + (line * 70 + rows) * 8, a.o.x + (line * 70 + rows) * 8, 32);
    }
    check(changed || rows == 70 || x->mask.bits,
          "the first row that sees the change did not change");
    answer_free(&a);
    answer_free(&b);
    problem_free(&y);
}

Test(properties, no_row_sees_its_future)
{
    for (int64_t n = 0; n < 4 * PAIRS; n++) {
        problem x = typical("future", n);
        const bool coded = n % PAIRS != 8;
        x.o.causal = n / PAIRS % 2 ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_START;
        x.o.thresholds.lambda = -1.0f;
        x.o.skip_rows = 1; /* a group decides together */
        if (n >= 2 * PAIRS)
            mask_fill(&x, 0.5f);
        /* A block of keys has one step, so codes of its earlier keys do know its later ones. */
        for (int64_t cut = coded ? 15 : 3; cut < 89; cut += coded ? 16 : 7) {
            x.o.smooth_k = false;
            future_is_unseen(&x, cut, true);
            x.o.smooth_k = true; /* the mean knows all keys, but no values */
            future_is_unseen(&x, cut, false);
        }
        problem_free(&x);
    }
}

/* ---- How it is asked ---- */

Test(properties, layouts_do_not_matter)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("layouts", n);
        answer want = attend(&x);
        for (int64_t at = 0; at < LAYOUTS * 4; at++) {
            shape s = shape_of(2, 4, 2, 70, 90, 16, 8);
            if (at % 4 == 0)
                s.layout_q = (tensor_layout)(at / 4);
            if (at % 4 == 1)
                s.layout_k = (tensor_layout)(at / 4);
            if (at % 4 == 2)
                s.layout_v = (tensor_layout)(at / 4);
            problem y = problem_make(&s);
            memcpy(y.q.x, x.q.x, (size_t)tensor_count(&x.q) * sizeof(float));
            memcpy(y.k.x, x.k.x, (size_t)tensor_count(&x.k) * sizeof(float));
            memcpy(y.v.x, x.v.x, (size_t)tensor_count(&x.v) * sizeof(float));
            problem_write(&y);
            y.o = x.o;
            answer got = attend_to(&y, SPARGE_F32, at % 4 == 3 ? (tensor_layout)(at / 4) : PACKED);
            same_answer(&got, &want);
            answer_free(&got);
            problem_free(&y);
        }
        answer_free(&want);
        problem_free(&x);
    }
}

/* Stride 0: one key for all tokens, one head for all heads, one batch for all. */
Test(properties, strides_of_0_repeat)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("stride 0", n), y = copy_of(&x);
        x.p.q.batch = x.p.k.head = x.p.v.token = 0;
        for (int64_t line = 0; line < 8; line++)
            copy_head(&y.q, line / 4, line % 4, &x.q, 0, line % 4);
        for (int64_t line = 0; line < 4; line++) {
            copy_head(&y.k, line / 2, line % 2, &x.k, line / 2, 0);
            for (int64_t t = 0; t < 90; t++)
                copy_rows(&y.v, line / 2, line % 2, t, &x.v, line / 2, line % 2, 0, 1);
        }
        problem_write(&y);
        same_problem(&x, &y);
        problem_free(&x);
        problem_free(&y);
    }
}

Test(properties, a_wider_dtype_of_the_same_values)
{
    for (int64_t n = 0; n < 2 * PAIRS; n++) {
        shape s = shape_of(2, 4, 2, 70, 90, 16, 8);
        s.q = s.k = s.v = n / PAIRS ? SPARGE_F16 : SPARGE_BF16;
        check_case("dtype %lld", (long long)n);
        problem x = problem_make(&s);
        x.o.qk_dtype = precisions[n % 3];
        x.o.pv_dtype = precisions[n / 3 % 3];
        problem y = copy_of(&x);
        same_problem(&x, &y);
        problem_free(&x);
        problem_free(&y);
    }
}

Test(properties, repetition_and_threads_do_not_matter)
{
    static const int threads[] = {1, 2, 3, 7, 16, 0};
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("threads", n);
        x.o.thresholds = (sparge_thresholds){0.5f, 0.7f, SPARGE_OFF, -1.0f, 0};
        answer want = attention(&x, NULL);
        for (int64_t t = 0; t < COUNT(threads); t++) {
            x.o.threads = threads[t];
            answer got = attention(&x, NULL);
            same_answer(&got, &want);
            answer_free(&got);
        }
        answer_free(&want);
        problem_free(&x);
    }
}

Test(properties, one_call_equals_two)
{
    for (int64_t n = 0; n < 2 * PAIRS; n++) {
        problem x = typical("one call", n);
        x.o.causal = n / PAIRS ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
        x.o.thresholds = (sparge_thresholds){0.5f, 0.7f, SPARGE_OFF, -1.0f, 0};
        mask_predict(&x);
        answer two = attend(&x);
        sparge_mask mask = {0};
        check(sparge_mask_alloc(&mask, &x.p, &x.o, NULL) == SPARGE_OK, "no mask");
        memset(mask.bits, 0xFF, (size_t)(2 * 4 * mask.q_blocks * mask.words) * sizeof *mask.bits);
        answer own = attention(&x, NULL), given = attention(&x, &mask);
        same_answer(&own, &two);
        same_answer(&given, &two);
        check_same_as("mask", mask.bits, x.mask.bits, 2 * 4 * mask.q_blocks * mask.words);
        check_equal(own.result.counts.pv_tokens, two.result.counts.pv_tokens);
        check(two.result.counts.qk_done < two.result.counts.pairs, "nothing was skipped");
        answer_free(&own);
        answer_free(&given);
        answer_free(&two);
        sparge_mask_free(&mask);
        problem_free(&x);
    }
}

/* lse, intermediates and counts may be NULL, and nothing else changes. */
Test(properties, what_is_not_asked_for_does_not_matter)
{
    for (int64_t n = 0; n < PAIRS; n++) {
        problem x = typical("NULL", n);
        answer want = attend(&x);
        float *o = check_alloc((size_t)tensor_count(&want.o) * sizeof *o);
        sparge_result result = {.o = {o, SPARGE_F32, 4 * 70 * 8, 70 * 8, 8}};
        check(sparge_attend(&x.p, &x.o, NULL, &result, NULL) == SPARGE_OK, "failed");
        check_same_as("o", o, want.o.x, tensor_count(&want.o));
        check_equal(result.counts.pv_tokens, want.result.counts.pv_tokens);
        check_equal(result.counts.pv_done, want.result.counts.pv_done);
        check_free(o);
        answer_free(&want);
        problem_free(&x);
    }
}

Test(properties, lse_is_that_of_m_and_l)
{
    for (int64_t n = 0; n < 2 * PAIRS; n++) {
        problem x = typical("m and l", n);
        x.o.smooth_k = n >= PAIRS;
        x.o.softmax_scale = 0.2f;
        mask_fill(&x, 0.3f);
        answer a = attend(&x);
        for (int64_t r = 0; r < problem_rows(&x); r++) {
            double want = ((double)a.intermediates.m[r] + log2((double)a.intermediates.l[r])) *
                          0.6931471805599453;
            for (int64_t c = 0; c < 16 && x.o.smooth_k; c++)
                want += (double)x.o.softmax_scale * (double)x.q.x[r * 16 + c] *
                        (double)a.intermediates.k_mean[r / 70 / 4 * 32 + r / 70 % 4 / 2 * 16 + c];
            if (a.intermediates.l[r] == 0.0f)
                want = -INFINITY;
            check_close(a.lse[r], want, 2e-6 * (1.0 + fabs(want)));
            check(a.intermediates.l[r] == 0.0f ? a.intermediates.m[r] == -INFINITY
                                               : a.intermediates.l[r] >= 0.999f,
                  "l[%lld] is %g", (long long)r, (double)a.intermediates.l[r]);
        }
        answer_free(&a);
        problem_free(&x);
    }
}

static bool rises(void *user, double done)
{
    double *last = user;
    *last = done >= *last && done <= 1.0 ? done : NAN;
    return true;
}

Test(properties, progress_rises_to_1)
{
    problem x = typical("progress", 0);
    double last = 0.0;
    x.o.progress = rises;
    x.o.user = &last;
    answer a = attend(&x);
    check_equal(last, 1.0);
    answer_free(&a);
    problem_free(&x);
}

/* ---- Beyond 32 bits ---- */

/* Copies a packed f32 tensor to rows that lie `stride[]` elements apart, in pages that exist only
 * where they are written. NULL where this machine has not the address space. */
static void *spread(const tensor *t, const int64_t stride[3], sparge_in *in, size_t *bytes)
{
    *bytes = (size_t)((t->batch - 1) * stride[0] + (t->heads - 1) * stride[1] +
                      (t->tokens - 1) * stride[2] + t->channels) *
             sizeof(float);
    float *memory = mmap(NULL, *bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    *in = (sparge_in){memory, SPARGE_F32, stride[0], stride[1], stride[2]};
    for (int64_t line = 0; line < t->batch * t->heads * t->tokens; line++) {
        const int64_t b = line / t->tokens / t->heads, h = line / t->tokens % t->heads,
                      n = line % t->tokens;
        memcpy(memory + b * stride[0] + h * stride[1] + n * stride[2], t->x + line * t->channels,
               (size_t)t->channels * sizeof(float));
    }
    return memory;
}

/* One of the strides is larger than 2^31 elements, 2^33 bytes; what wraps reads or writes
 * elsewhere. */
Test(properties, strides_beyond_32_bits)
{
    const int64_t far = ((int64_t)1 << 31) + 24;
    const int64_t strides[3][3] = {{4096, 64, far}, {64, far, 128}, {far, 4096, 128}};
    for (int64_t n = 0; n < 3 * 3; n++) {
        check_case("far %s, pair %lld",
                   n % 3 == 0   ? "tokens"
                   : n % 3 == 1 ? "heads"
                                : "batches",
                   (long long)(n / 3));
        const shape s = shape_of(2, 4, 2, 3, 4, 16, 8);
        problem x = problem_make(&s);
        x.o.qk_dtype = precisions[n / 3];
        x.o.pv_dtype = precisions[2 - n / 3];
        x.o.block_q = x.o.block_k = 2;
        x.o.thresholds.tau = 0.5f;
        answer want = attention(&x, NULL), a = attention(&x, NULL);
        problem y = x;
        sparge_in o;
        size_t bytes[4];
        void *const memory[] = {
            spread(&x.q, strides[n % 3], &y.p.q, &bytes[0]),
            spread(&x.k, strides[n % 3], &y.p.k, &bytes[1]),
            spread(&x.v, strides[n % 3], &y.p.v, &bytes[2]),
            spread(&a.o, strides[n % 3], &o, &bytes[3]),
        };
        const bool there = memory[0] && memory[1] && memory[2] && memory[3];
        float *lse = check_alloc((size_t)problem_rows(&x) * sizeof *lse);
        sparge_result result = {.o = {memory[3], SPARGE_F32, o.batch, o.head, o.token}, .lse = lse};
        if (there) {
            sparge_error error;
            check(sparge_attention(&y.p, &y.o, &result, &error) == SPARGE_OK, "%s", error.text);
            check_same_as("lse", lse, want.lse, problem_rows(&x));
            for (int64_t line = 0; line < problem_rows(&x); line++)
                check_same_as("o",
                              (const float *)memory[3] + line / 12 * o.batch +
                                  line / 3 % 4 * o.head + line % 3 * o.token,
                              want.o.x + line * 8, 8);
        }
        for (int m = 0; m < 4; m++)
            if (memory[m])
                munmap(memory[m], bytes[m]);
        check_free(lse);
        answer_free(&want);
        answer_free(&a);
        problem_free(&x);
        if (!there)
            cr_skip("this machine has not the address space for 2^35 bytes four times");
    }
}

static uint16_t *random_halves(int64_t count) /* of size 2^-3 to 2 */
{
    uint16_t *x = check_alloc((size_t)count * sizeof *x);
    for (int64_t n = 0; n < count; n++)
        x[n] = (uint16_t)((check_random() & 0x8fffu) | 0x3000u);
    return x;
}

/* 2^20 tokens, 2^27 pairs of blocks of which two a row are kept: 64 rows against their own blocks
 * alone, bit for bit, and against the oracle. */
Test(properties, a_million_tokens)
{
    check_case("a million tokens");
    enum {
        LEN = 1 << 20,
        D = 4,
        DV = 2,
        BQ = 128,
        BK = 64,
        Q_BLOCKS = LEN / BQ,
        K_BLOCKS = LEN / BK
    };
    uint16_t *q = random_halves((int64_t)LEN * D), *k = random_halves((int64_t)LEN * D);
    uint16_t *v = random_halves((int64_t)LEN * DV);
    float *o = check_alloc((size_t)LEN * DV * sizeof *o),
          *lse = check_alloc((size_t)LEN * sizeof *lse);
    const sparge_problem p = {1,
                              1,
                              1,
                              LEN,
                              LEN,
                              D,
                              DV,
                              .q = {q, SPARGE_F16, 0, 0, D},
                              .k = {k, SPARGE_F16, 0, 0, D},
                              .v = {v, SPARGE_F16, 0, 0, DV}};
    sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
    options.backend = SPARGE_REF;
    options.smooth_k = false;
    options.pv_dtype = SPARGE_F32;
    sparge_mask mask;
    check(sparge_mask_alloc(&mask, &p, &options, NULL) == SPARGE_OK, "no mask");
    for (int64_t i = 0; i < Q_BLOCKS; i++)
        for (int64_t j = 0; j < 2; j++)
            sparge_mask_set(&mask, 0, 0, i, (2 * i + 5000 + j) % K_BLOCKS, true);
    sparge_result result = {.o = {o, SPARGE_F32, 0, 0, DV}, .lse = lse};
    sparge_error error;
    check(sparge_attend(&p, &options, &mask, &result, &error) == SPARGE_OK, "%s", error.text);
    check_equal(result.counts.pairs, (int64_t)Q_BLOCKS * K_BLOCKS);
    check_equal(result.counts.qk_done, (int64_t)Q_BLOCKS * 2);
    check_equal(result.counts.pv_done, Q_BLOCKS * 2.0);
    check_equal(result.counts.tokens, (int64_t)LEN * LEN);
    check_equal(result.counts.qk_tokens, (int64_t)LEN * 2 * BK);
    check_equal(result.counts.pv_tokens, (int64_t)LEN * 2 * BK);
    for (int64_t n = 0; n < 64; n++) {
        const int64_t t = n == 0 ? 0 : n == 1 ? LEN - 1 : check_int(0, LEN - 1), i = t / BQ;
        const int64_t key = (2 * i + 5000) % K_BLOCKS * BK;
        sparge_problem part = p;
        part.q_len = BQ;
        part.k_len = 2 * BK;
        part.q.data = q + i * BQ * D;
        part.k.data = k + key * D;
        part.v.data = v + key * DV;
        float part_o[BQ * DV], part_lse[BQ];
        static double want[BQ * DV], want_lse[BQ];
        sparge_result part_result = {.o = {part_o, SPARGE_F32, 0, 0, DV}, .lse = part_lse};
        check(sparge_attend(&part, &options, NULL, &part_result, NULL) == SPARGE_OK, "failed");
        check_same_as("o", o + i * BQ * DV, part_o, BQ * DV);
        check_same_as("lse", lse + i * BQ, part_lse, BQ);
        check(sparge_oracle(&part, &options, NULL, SPARGE_ORACLE_CODES, want, want_lse, NULL,
                            NULL) == SPARGE_OK,
              "failed");
        for (int64_t c = 0; c < DV; c++)
            check_close(o[t * DV + c], want[t % BQ * DV + c], 1e-5);
        check_close(lse[t], want_lse[t % BQ], 1e-5);
    }
    sparge_mask_free(&mask);
    check_free(q);
    check_free(k);
    check_free(v);
    check_free(o);
    check_free(lse);
}
