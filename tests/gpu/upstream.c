/* upstream.c: what the authors' released kernels get wrong, each by name, on every kernel. Most of
 * it is ref's business too; here stand questions that a GPU kernel is tempted to answer wrongly.
 * Futures, empty rows, zero channels, streams and graphs have their tests in values.c and calls.c.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu.h"

TestSuite(upstream);

/* How far a row of o may lie from dense attention on the real inputs by codes and rounding alone.
 */
static double quality(const kernel *r)
{
    return r->qk_dtype == SPARGE_F32 ? 1e-4 : r->pv_dtype == SPARGE_FP8 ? 0.12 : 0.06;
}

static double worst_row(const problem *x, const answer *a, const sparge_mask *mask)
{
    double *o = malloc((size_t)tensor_count(&a->o) * sizeof *o), worst = 0;
    check(sparge_oracle(&x->p, &x->o, mask, SPARGE_ORACLE_REAL, o, NULL, NULL, NULL) == SPARGE_OK,
          "oracle");
    for (int64_t row = 0; row < problem_rows(x); row++) {
        double off = 0, size = 0;
        for (int64_t c = row * x->p.dim_v; c < (row + 1) * x->p.dim_v; c++) {
            off += fabs((double)a->o.x[c] - o[c]);
            size += fabs(o[c]);
        }
        const double far = size > 0 ? off / size : off;
        worst = far <= worst ? worst : far;
    }
    free(o);
    return worst;
}

static void near_dense(problem *x, const kernel *r, bool predict)
{
    use(x, r);
    answer a = predict ? attention(x, NULL) : attend(x);
    const double far = worst_row(x, &a, NULL);
    check(far <= quality(r), "worst row at %g", far);
    answer_free(&a);
}

/* thu-ml/SpargeAttn issue 47. */
Test(upstream, a_dense_map_is_dense_attention)
{
    fresh_device();
    EACH_RUNG(r)
    for (int causal = 0; causal < 3; causal++) {
        check_case("kernel %d pv %d, causal %d", r->n, (int)r->pv_dtype, causal);
        const shape s = shape_of(1, 2, 1, 200, 260, 64, 64);
        problem x = question(&s, r);
        x.o.causal = (sparge_causal)causal;
        near_dense(&x, r, false);
        x.o.thresholds.tau = 1.0f; /* "tau = 1 is not guaranteed dense" */
        near_dense(&x, r, true);
        mask_fill(&x, 1.0f);
        near_dense(&x, r, false);
        problem_free(&x);
    }
}

/* Pull request 121: smooth_k = False crashes. Softmax does not change; lse gets back what it lost.
 */
Test(upstream, smoothing_off)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(1, 2, 1, 150, 200, 48, 32);
        problem x = question(&s, r);
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

/* Issue 98: groups of heads fail in prediction; they are the same heads, repeated. Thresholds
 * differ by head. */
Test(upstream, groups_of_heads_are_repeated_heads)
{
    fresh_device();
    EACH_RUNG(r)
    for (int64_t group = 2; group <= (plain_quick() ? 2 : 8); group *= 4) {
        check_case("kernel %d pv %d, groups of %lld", r->n, (int)r->pv_dtype, (long long)group);
        const shape s = shape_of(1, group * 2, 2, 130, 200, 16, 16),
                    all = shape_of(1, group * 2, group * 2, 130, 200, 16, 16);
        problem x = question(&s, r), y = question(&all, r);
        sparge_thresholds each[16];
        for (int h = 0; h < 16; h++)
            each[h] =
                (sparge_thresholds){0.3f, 0.05f * (float)h, SPARGE_OFF, h % 2 ? -1.0f : -INFINITY};
        x.o.per_head = y.o.per_head = each;
        memcpy(y.q.x, x.q.x, (size_t)tensor_count(&x.q) * sizeof(float));
        for (int64_t h = 0; h < group * 2; h++) {
            memcpy(tensor_row(&y.k, 0, h, 0), tensor_row(&x.k, 0, h / group, 0),
                   200 * 16 * sizeof(float));
            memcpy(tensor_row(&y.v, 0, h, 0), tensor_row(&x.v, 0, h / group, 0),
                   200 * 16 * sizeof(float));
        }
        problem_write(&y);
        use(&x, r);
        use(&y, r);
        sparge_mask few = wide_mask(&x, 0), many = wide_mask(&y, 0);
        answer a = attention(&x, &few), b = attention(&y, &many);
        check_same_as("mask", few.bits, many.bits,
                      few.batch * few.heads * few.q_blocks * few.words);
        same_answer(&a, &b);
        check_free(few.bits);
        check_free(many.bits);
        answer_free(&a);
        answer_free(&b);
        problem_free(&x);
        problem_free(&y);
    }
}

/* Top-k without a forced diagonal: rows 0 to 63 of a query block see only masked keys, and get the
 * mean of the future. Here the diagonal is forced, and where a given mask has the second block
 * alone such rows are empty. */
Test(upstream, only_the_second_diagonal_block)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(1, 1, 1, 256, 256, 16, 16);
        problem x = question(&s, r);
        x.o.causal = SPARGE_CAUSAL_START;
        mask_fill(&x, 0.0f);
        sparge_mask_set(&x.mask, 0, 0, 0, 1, true);
        sparge_mask_set(&x.mask, 0, 0, 1, 3, true);
        verify(&x, r, false);
        use(&x, r);
        answer a = attend(&x);
        for (int64_t row = 0; row < 256; row++) {
            const bool empty = row % 128 < 64;
            check((a.lse[row] == -INFINITY) == empty && (a.o.x[row * 16] == 0.0f) == empty,
                  "row %lld: lse %g, o %g", (long long)row, (double)a.lse[row],
                  (double)a.o.x[row * 16]);
        }
        answer_free(&a);
        x.o.thresholds = (sparge_thresholds){-1.0f, SPARGE_OFF, 0.0f, -INFINITY};
        verify(&x, r, true);
        use(&x, r);
        a = attention(&x, NULL);
        for (int64_t row = 0; row < 256; row++)
            check(a.lse[row] > -INFINITY, "row %lld sees nothing", (long long)row);
        answer_free(&a);
        problem_free(&x);
    }
}

/* Padding rows make 0/0 there: a short last block is never similar, whatever theta says; zero rows
 * likewise. */
Test(upstream, short_blocks_and_zero_rows_are_judged_by_their_rows)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(1, 1, 1, 150, 330, 16, 16);
        problem x = question(&s, r);
        for (int64_t n = 0; n < tensor_count(&x.q); n++)
            x.q.x[n] = 1.0f;
        for (int64_t t = 0; t < 330; t++)
            for (int64_t c = 0; c < 16; c++)
                x.k.x[t * 16 + c] = t / 64 == 2 ? 0.0f : 1.0f + 0.01f * (float)(t / 64);
        x.o.smooth_k = false;
        x.o.thresholds = (sparge_thresholds){0.9f, SPARGE_OFF, 0.17f, -INFINITY};
        problem_write(&x);
        verify(&x, r, true);
        use(&x, r);
        sparge_mask mask = wide_mask(&x, 0);
        answer a = attention(&x, &mask);
        /* the block of zeros is not similar and kept; of the others one, the last and largest */
        for (int64_t i = 0; i < 2; i++)
            check_equal(mask.bits[i], 1u << 2 | 1u << 5);
        for (int64_t n = 0; n < tensor_count(&a.o); n++)
            check(isfinite(a.o.x[n]), "o[%lld]", (long long)n);
        check_free(mask.bits);
        answer_free(&a);
        problem_free(&x);
    }
}

/* Nq >= 128 is asserted there, causal is top-left whatever the lengths, Nk % 128 != 0 breaks. */
Test(upstream, few_queries_on_a_long_cache)
{
    static const int64_t queries[] = {1, 2, 63, 65}, keys[] = {1, 63, 65, 191, 257};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t q = 0; q < COUNT(queries); q++)
        for (int64_t k = 0; k < COUNT(keys); k += 1 + 2 * plain_quick()) {
            check_case("kernel %d pv %d, %lld queries, %lld keys", r->n, (int)r->pv_dtype,
                       (long long)queries[q], (long long)keys[k]);
            const shape s = shape_of(1, 1, 1, queries[q], keys[k], 64, 64);
            problem x = question(&s, r);
            x.o.causal = SPARGE_CAUSAL_END;
            verify(&x, r, true);
            near_dense(&x, r, false);
            problem_free(&x);
        }
}

/* Scores of +-1e4 give NaN there (m starts at -5e6 of them). */
Test(upstream, huge_and_hugely_negative_scores)
{
    static const float size[] = {1e4f, 1e6f, 3e7f};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t n = 0; n < COUNT(size); n++)
        for (int sign = -1; sign <= 1; sign += 2) {
            check_case("kernel %d pv %d, scores of %g", r->n, (int)r->pv_dtype,
                       (double)((float)sign * size[n]));
            const shape s = shape_of(1, 1, 1, 130, 200, 4, 8);
            problem x = question(&s, r);
            for (int64_t e = 0; e < tensor_count(&x.q); e++)
                x.q.x[e] = 1.0f;
            for (int64_t e = 0; e < tensor_count(&x.k); e++)
                x.k.x[e] = (float)sign * size[n] * (1.0f + 0.001f * (float)(e / 4 % 7)) / 2;
            x.o.smooth_k = false;
            problem_write(&x);
            verify(&x, r, false);
            use(&x, r);
            answer a = attend(&x);
            for (int64_t e = 0; e < tensor_count(&a.o); e++)
                check(isfinite(a.o.x[e]) && fabsf(a.o.x[e]) < 4.0f, "o[%lld] is %g", (long long)e,
                      (double)a.o.x[e]);
            answer_free(&a);
            problem_free(&x);
        }
}

/* 64 products of f16 overflow its sums there from |v| = 1023 on; v of bf16 is turned into f16. */
Test(upstream, large_values)
{
    static const float size[] = {1e3f, 6e4f, 1e30f};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t n = 0; n < COUNT(size); n++) {
        check_case("kernel %d pv %d, v of %g", r->n, (int)r->pv_dtype, (double)size[n]);
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
Test(upstream, an_outlier_among_the_values)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(1, 1, 1, 130, 200, 16, 16);
        problem x = question(&s, r);
        x.v.x[77 * 16 + 3] = 1e4f;
        problem_write(&x);
        verify(&x, r, false);
        problem_free(&x);
    }
}

/* There the prediction always takes D^-0.5. A tenth of the scale flattens P, so more blocks share
 * its mass. */
Test(upstream, the_scale_reaches_the_prediction)
{
    fresh_device();
    EACH_RUNG(r)
    {
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        const shape s = shape_of(1, 2, 1, 256, 1280, 16, 8);
        problem x = question(&s, r);
        x.o.thresholds = (sparge_thresholds){-1.0f, 0.6f, SPARGE_OFF, -INFINITY};
        int64_t kept[2];
        for (int n = 0; n < 2; n++) {
            x.o.softmax_scale = n ? 0.02f : 2.0f;
            verify(&x, r, true);
            use(&x, r);
            answer a = attention(&x, NULL);
            kept[n] = a.result.counts.qk_done;
            answer_free(&a);
        }
        check(kept[0] < kept[1], "%lld of scale 2, %lld of 0.02", (long long)kept[0],
              (long long)kept[1]);
        problem_free(&x);
    }
}

/* Lambda: never with -inf, with 0 only blocks that raise a maximum; no block is exempt. */
Test(upstream, lambda_from_never_to_always)
{
    static const float lambda[] = {-INFINITY, -50.0f, -1.0f, -0.0f};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t rows = 16; rows <= 128; rows *= 2) {
        check_case("kernel %d pv %d, %lld rows", r->n, (int)r->pv_dtype, (long long)rows);
        const shape s = shape_of(1, 1, 1, 200, 400, 32, 16);
        problem x = question(&s, r);
        x.o.skip_rows = rows;
        double before = 1e9;
        for (int64_t n = 0; n < COUNT(lambda); n += 1 + plain_quick()) {
            x.o.thresholds.lambda = lambda[n];
            verify(&x, r, false);
            use(&x, r);
            answer a = attend(&x);
            const sparge_counts *c = &a.result.counts;
            check(c->pv_done <= before && c->qk_done == c->pairs, "pv_done %g after %g", c->pv_done,
                  before);
            check(n > 0 || c->pv_done == (double)c->qk_done, "lambda -inf skipped");
            before = c->pv_done;
            answer_free(&a);
        }
        problem_free(&x);
    }
}

/* Sums of blocks against what is reported, of every head; theirs is wrong under causal. */
Test(upstream, sparsity_is_what_the_mask_says)
{
    fresh_device();
    EACH_RUNG(r)
    for (int causal = 0; causal < 3; causal++) {
        check_case("kernel %d pv %d, causal %d", r->n, (int)r->pv_dtype, causal);
        const shape s = shape_of(2, 2, 1, 300, 350, 16, 8);
        problem x = question(&s, r);
        x.o.causal = (sparge_causal)causal;
        mask_fill(&x, 0.4f);
        use(&x, r);
        answer a = attend(&x);
        for (int64_t h = 0; h < 4; h++) {
            sparge_counts c = {0};
            for (int64_t i = 0; i < 3; i++)
                for (int64_t j = 0; j < 6; j++) {
                    int64_t tokens = 0;
                    for (int64_t t = i * 128; t < i * 128 + 128 && t < 300; t++)
                        for (int64_t k = j * 64; k < j * 64 + 64 && k < 350; k++)
                            tokens += causal == 0 || k <= t + (causal == 1 ? 50 : 0);
                    c.pairs += tokens > 0;
                    c.tokens += tokens;
                    if (tokens && mask_has(&x, h / 2, h % 2, i, j)) {
                        c.qk_done++;
                        c.pv_done += 1;
                        c.qk_tokens += tokens;
                        c.pv_tokens += tokens;
                    }
                }
            same_counts(&a.head[h], &c);
        }
        answer_free(&a);
        problem_free(&x);
    }
}

/* D of 96 or 80 is cut or refused there, Dv other than D is not thought of. */
Test(upstream, every_width)
{
    fresh_device();
    EACH_RUNG(r)
    for (int64_t dim = 1; dim <= 128; dim += plain_quick() ? 63 : 9) {
        check_case("kernel %d pv %d, dim %lld", r->n, (int)r->pv_dtype, (long long)dim);
        const shape s = shape_of(1, 1, 1, 70, 100, dim, 1 + dim * 53 % 128);
        problem x = question(&s, r);
        verify(&x, r, true);
        problem_free(&x);
    }
}
