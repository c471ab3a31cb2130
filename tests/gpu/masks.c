/* SPDX-License-Identifier: Apache-2.0 */
/* masks.c: which rows, keys and blocks count: empty rows, what lies beside a mask, what is
 * predicted, groups of heads. Where the authors' released kernels get it wrong, their issue is
 * named. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu.h"

TestSuite(masks);

static bool odd_rows(int64_t line, int64_t j) { return line % 2 && j % 2 == 0; }

/* ---- Rows without keys ---- */

/* Outputs are poisoned before, and what lies between the rows of o is looked at (problem.c). */
Test(masks, empty_rows_of_the_mask)
{
    fresh_device();
    EACH_RUNG(r)
    for (int layout = PACKED; layout < LAYOUTS; layout += 1 + 2 * plain_quick()) {
        check_case("kernel %d pv %d, layout %d", r->n, (int)r->pv_dtype, layout);
        problem x = question_of(r, 2, 2, 1, 300, 200, 24, 20);
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
        forget_both(&a, &x);
    }
}

/* Causal at the end with more queries than keys: the first rows see nothing. */
Test(masks, rows_before_the_first_key)
{
    fresh_device();
    EACH_RUNG(r)
    for (int64_t keys = 1; keys < 300; keys += 61) {
        check_case("kernel %d pv %d, %lld keys", r->n, (int)r->pv_dtype, (long long)keys);
        problem x = question_of(r, 1, 2, 2, 300, keys, 17, 9);
        x.o.causal = SPARGE_CAUSAL_END;
        x.o.thresholds.lambda = -0.5f;
        check_answers(&x, r, PREDICTED | GIVEN);
    }
}

Test(masks, empty_questions)
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
            problem x = question_of(r, size[n].batch, 2, 1, size[n].q_len, size[n].k_len, 5, 7);
            x.o.causal = (sparge_causal)causal;
            x.o.sink = true;
            x.o.thresholds.lambda = causal ? -1.0f : -INFINITY;
            x.o.smooth_k = n % 2;
            check_answers(&x, r, PREDICTED | GIVEN);
        }
}

/* Top-k without a forced diagonal: rows 0 to 63 of a query block see only masked keys, and get the
 * mean of the future. Here the diagonal is forced, and where a given mask has the second block
 * alone such rows are empty. */
Test(masks, only_the_second_diagonal_block)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 1, 1, 1, 256, 256, 16, 16);
        x.o.causal = SPARGE_CAUSAL_START;
        mask_fill(&x, 0.0f);
        sparge_mask_set(&x.mask, 0, 0, 0, 1, true);
        sparge_mask_set(&x.mask, 0, 0, 1, 3, true);
        answer a = verified(&x, r);
        for (int64_t row = 0; row < 256; row++) {
            const bool empty = row % 128 < 64;
            check((a.lse[row] == -INFINITY) == empty && (a.o.x[row * 16] == 0.0f) == empty,
                  "row %lld: lse %g, o %g", (long long)row, (double)a.lse[row],
                  (double)a.o.x[row * 16]);
        }
        answer_free(&a);
        x.o.thresholds = (sparge_thresholds){-1.0f, SPARGE_OFF, 0.0f, -INFINITY, 0};
        verify(&x, r, true);
        use(&x, r);
        a = attention(&x, NULL);
        for (int64_t row = 0; row < 256; row++)
            check(a.lse[row] > -INFINITY, "row %lld sees nothing", (long long)row);
        forget_both(&a, &x);
    }
}

/* Nq >= 128 is asserted there, causal is top-left whatever the lengths, Nk % 128 != 0 breaks. */
Test(masks, few_queries_on_a_long_cache)
{
    static const int64_t queries[] = {1, 2, 63, 65}, keys[] = {1, 63, 65, 191, 257};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t q = 0; q < COUNT(queries); q++)
        for (int64_t k = 0; k < COUNT(keys); k += 1 + 2 * plain_quick()) {
            check_case("kernel %d pv %d, %lld queries, %lld keys", r->n, (int)r->pv_dtype,
                       (long long)queries[q], (long long)keys[k]);
            problem x = question_of(r, 1, 1, 1, queries[q], keys[k], 64, 64);
            x.o.causal = SPARGE_CAUSAL_END;
            verify(&x, r, true);
            near_dense(&x, r, false);
            problem_free(&x);
        }
}

/* D of 96 or 80 is cut or refused there, Dv other than D is not thought of. */
Test(masks, every_width)
{
    fresh_device();
    EACH_RUNG(r)
    for (int64_t dim = 1; dim <= 128; dim += plain_quick() ? 63 : 9) {
        check_case("kernel %d pv %d, dim %lld", r->n, (int)r->pv_dtype, (long long)dim);
        problem x = question_of(r, 1, 1, 1, 70, 100, dim, 1 + dim * 53 % 128);
        check_answers(&x, r, PREDICTED);
    }
}

/* ---- Masks ---- */

/* One kept block is dense attention over its keys, without anything from beside them. */
Test(masks, one_kept_block)
{
    EACH_KERNEL(r)
    {
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
Test(masks, everything_kept_is_dense)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 2, 4, 2, 200, 330, 33, 65);
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

/* thu-ml/SpargeAttn issue 47. */
Test(masks, a_dense_map_is_dense_attention)
{
    EACH_CASE(r, causal, 3, 1)
    {
        problem x = question_of(r, 1, 2, 1, 200, 260, 64, 64);
        x.o.causal = (sparge_causal)causal;
        near_dense(&x, r, false);
        x.o.thresholds.tau = 1.0f; /* "tau = 1 is not guaranteed dense" */
        near_dense(&x, r, true);
        mask_fill(&x, 1.0f);
        near_dense(&x, r, false);
        problem_free(&x);
    }
}

/* Bits of blocks that no row sees, of words beyond the row and of spare words change nothing. */
Test(masks, a_mask_with_garbage_beyond_its_blocks)
{
    EACH_CASE(r, causal, 3, 1)
    {
        problem x = question_of(r, 1, 2, 1, 150, 330, 16, 8);
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

/* Kernel 5's producer reads a word of the mask in each lane: more than 32 words, and blocks kept
 * far apart. */
Test(masks, more_than_1024_key_blocks)
{
    fresh_device();
    for (int i = 3; i < RUNGS && !plain_quick(); i += 2) {
        if (!runs_here(kernels[i].n))
            continue;
        check_case("kernel %d pv %d", kernels[i].n, (int)kernels[i].pv_dtype);
        problem x = question_of(&kernels[i], 1, 1, 1, 70, 64 * 1100, 1, 1);
        mask_fill(&x, 0.005f);
        sparge_mask_set(&x.mask, 0, 0, 0, 1099, true);
        verify(&x, &kernels[i], false);
        problem_free(&x);
    }
}

/* ---- What is predicted ---- */

/* Thresholds of more heads than one launch carries, and a mask of more than one word. */
Test(masks, thresholds_of_many_heads)
{
    fresh_device();
    static const int64_t heads[] = {128, 129, 260};
    for (int64_t n = plain_quick(); n < COUNT(heads); n += 1 + plain_quick())
        for (int i = 2; i < RUNGS; i += 3) {
            if (!runs_here(kernels[i].n))
                continue;
            check_case("kernel %d pv %d, %lld heads", kernels[i].n, (int)kernels[i].pv_dtype,
                       (long long)heads[n]);
            problem x = question_of(&kernels[i], 1, heads[n], 1, 9, 2200 / heads[n] + 130, 8, 8);
            sparge_thresholds *each = malloc((size_t)heads[n] * sizeof *each);
            for (int64_t h = 0; h < heads[n]; h++)
                each[h] = (sparge_thresholds){-1.0f, check_uniform(0, 1), SPARGE_OFF,
                                              h % 3 ? -INFINITY : 0.0f, 0};
            x.o.per_head = each;
            verify(&x, &kernels[i], true);
            free(each);
            problem_free(&x);
        }
}

/* 2 to 80 key blocks, so that a row of the mask ends everywhere in its words; sparse ones too,
 * where a stage gathers blocks from several words. */
Test(masks, rows_of_the_mask_of_many_lengths)
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
        problem x = question_of(r, 1, 1, 1, 140, columns * 64 - 5, 8, 8);
        x.o.thresholds = (sparge_thresholds){-1.0f, 0.3f, 0.2f, -2.0f, 0};
        x.o.causal = n % 2 ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
        verify(&x, r, true);
        mask_fill(&x, n % 3 ? 0.05f : 0.5f);
        check_answers(&x, r, GIVEN);
    }
}

/* Key blocks whose scores are few different ones: ties at every place where a row may end. */
Test(masks, rows_of_the_mask_with_ties)
{
    static const float share[] = {SPARGE_OFF, 0.0f, 0.3f, 0.5f, 0.98f, 1.0f};
    fresh_device();
    for (int values = 1; values <= 50; values += values < 3 ? 1 : 47) {
        const int64_t tokens = 64 * (plain_quick() ? 20 : 40);
        problem x = question_of(&kernels[2], 1, 1, 1, 128 * 3, tokens, 4, 1);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t c = 0; c < 4; c++)
                x.k.x[t * 4 + c] =
                    (float)(t / 64 * 7919 % 40 % values) * 0.25f * (c % 2 ? -1.0f : 1.5f);
        problem_write(&x);
        for (int64_t tau = 0; tau < COUNT(share); tau++)
            for (int64_t topk = tau == 0; topk < COUNT(share); topk += 1 + 2 * plain_quick()) {
                check_case("ties of %d, tau %g, topk %g", values, (double)share[tau],
                           (double)share[topk]);
                x.o.thresholds = (sparge_thresholds){-1.0f, share[tau], share[topk], -INFINITY, 0};
                x.o.smooth_k = topk % 2;
                x.o.causal = (sparge_causal)(topk % 3);
                x.o.sink = tau % 2;
                verify_prediction(&x, &kernels[2], 1);
            }
        problem_free(&x);
    }
}

/* Cosines of exactly 1, and of 0: neither is above a threshold of the same size. */
Test(masks, similarity_at_its_threshold)
{
    fresh_device();
    for (int n = 0; n < 6; n++) {
        check_case("theta %d, %s keys", n % 3 - 1, n < 3 ? "identical" : "antiparallel");
        problem x = question_of(&kernels[2], 1, 1, 1, 300, 640, 16, 4);
        x.o.smooth_k = false;
        for (int64_t e = 0; e < tensor_count(&x.q); e++)
            x.q.x[e] = e % 16 == 0;
        for (int64_t e = 0; e < tensor_count(&x.k); e++)
            x.k.x[e] = e % 16 == 0 ? (n >= 3 && e / 16 % 2 ? -1.0f : 1.0f) : 0.0f;
        problem_write(&x);
        x.o.thresholds = (sparge_thresholds){(float)(n % 3 - 1), SPARGE_OFF, 0.0f, -INFINITY, 0};
        verify(&x, &kernels[2], true);
        problem_free(&x);
    }
}

/* Padding rows make 0/0 there: a short last block is never similar, whatever theta says; zero rows
 * likewise. */
Test(masks, short_blocks_and_zero_rows_are_judged_by_their_rows)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 1, 1, 1, 150, 330, 16, 16);
        for (int64_t n = 0; n < tensor_count(&x.q); n++)
            x.q.x[n] = 1.0f;
        for (int64_t t = 0; t < 330; t++)
            for (int64_t c = 0; c < 16; c++)
                x.k.x[t * 16 + c] = t / 64 == 2 ? 0.0f : 1.0f + 0.01f * (float)(t / 64);
        x.o.smooth_k = false;
        x.o.thresholds = (sparge_thresholds){0.9f, SPARGE_OFF, 0.17f, -INFINITY, 0};
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
        forget_both(&a, &x);
    }
}

/* A quarter of the smallest float rounds to 0 or, below it, to -0; neither ranks above the other.
 */
Test(masks, zeros_of_both_signs_tie)
{
    fresh_device();
    check_case("zeros");
    problem x = question_of(&kernels[2], 1, 1, 1, 4, 64 * 40, 1, 1);
    x.o.smooth_k = false;
    x.o.softmax_scale = 0.25f;
    for (int64_t n = 0; n < 4; n++)
        x.q.x[n] = 0x1p-100f;
    for (int64_t n = 0; n < 64 * 40; n++)
        x.k.x[n] = n / 64 % 2 ? 0x1p-49f : -0x1p-49f;
    problem_write(&x);
    x.o.thresholds = (sparge_thresholds){-1.0f, SPARGE_OFF, 0.3f, -INFINITY, 0};
    verify(&x, &kernels[2], true);
    x.o.thresholds = (sparge_thresholds){-1.0f, 0.5f, SPARGE_OFF, -INFINITY, 0};
    verify(&x, &kernels[2], true);
    problem_free(&x);
}

/* There the prediction always takes D^-0.5. A tenth of the scale flattens P, so more blocks share
 * its mass. */
Test(masks, the_scale_reaches_the_prediction)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 1, 2, 1, 256, 1280, 16, 8);
        x.o.thresholds = (sparge_thresholds){-1.0f, 0.6f, SPARGE_OFF, -INFINITY, 0};
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
