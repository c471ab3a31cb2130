/* SPDX-License-Identifier: Apache-2.0 */
/* schedules.c: who sees and skips what, and that nothing depends on the order of threads: the
 * future, lambda, counts, repeated calls, copies and products as late as a program allows. */
#include <math.h>
#include <string.h>

#include "tests/gpu/gpu.h"

TestSuite(schedules);

/* ---- The future ---- */

/* A row must not know what it cannot see: V of every later key, and K at the edge of a block,
 * changed by 1e3. K of one block shares a step and the mean, so codes are kept equal by changing it
 * only in float. */
Test(schedules, nobody_sees_the_future)
{
    fresh_device();
    EACH_RUNG(r)
    for (int causal = SPARGE_CAUSAL_END; causal <= SPARGE_CAUSAL_START; causal++)
        for (int64_t probe = 0; probe < 200; probe += plain_quick() ? 67 : 21) {
            check_case("kernel %d pv %d, causal %d, token %lld", r->n, (int)r->pv_dtype, causal,
                       (long long)probe);
            const int64_t q_len = 170, k_len = 200,
                          shift = causal == SPARGE_CAUSAL_END ? k_len - q_len : 0;
            problem x = question_of(r, 1, 1, 1, q_len, k_len, 20, 10);
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

/* ---- Lambda and counts ---- */

/* 16 query rows g = 0..7 look along axis g; the keys of block j lie along axis j % 8, further out
 * each time. So a block raises the maxima of 16 rows alone, and those of all others tie with it:
 * lambda 0 skips a tie. */
Test(schedules, every_group_votes_alone)
{
    fresh_device();
    EACH_RUNG(r)
    for (int64_t rows = 16; rows <= 128; rows *= 2) {
        check_case("kernel %d pv %d, %lld rows", r->n, (int)r->pv_dtype, (long long)rows);
        problem x = question_of(r, 1, 1, 1, 256, 64 * 10, 8, 8);
        for (int64_t e = 0; e < tensor_count(&x.q); e++)
            x.q.x[e] = e / 8 / 16 % 8 == e % 8 ? 1.0f : 0.0f;
        for (int64_t e = 0; e < tensor_count(&x.k); e++)
            x.k.x[e] = e / 8 / 64 % 8 == e % 8 ? (float)(1 + e / 8 / 64) : 0.0f;
        problem_write(&x);
        x.o.smooth_k = false;
        x.o.skip_rows = rows;
        x.o.thresholds.lambda = 0.0f;
        answer a = verified(&x, r);
        check_equal(a.result.counts.pv_done, 2 * (1 + 9 * (double)rows / 128));
        forget_both(&a, &x);
    }
}

/* Lambda: never with -inf, with 0 only blocks that raise a maximum; no block is exempt. */
Test(schedules, lambda_from_never_to_always)
{
    static const float lambda[] = {-INFINITY, -50.0f, -1.0f, -0.0f};
    fresh_device();
    EACH_RUNG(r)
    for (int64_t rows = 16; rows <= 128; rows *= 2) {
        check_case("kernel %d pv %d, %lld rows", r->n, (int)r->pv_dtype, (long long)rows);
        problem x = question_of(r, 1, 1, 1, 200, 400, 32, 16);
        x.o.skip_rows = rows;
        double before = 1e9;
        for (int64_t n = 0; n < COUNT(lambda); n += 1 + plain_quick()) {
            x.o.thresholds.lambda = lambda[n];
            answer a = verified(&x, r);
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
Test(schedules, sparsity_is_what_the_mask_says)
{
    EACH_CASE(r, causal, 3, 1)
    {
        problem x = question_of(r, 2, 2, 1, 300, 350, 16, 8);
        x.o.causal = (sparge_causal)causal;
        mask_fill(&x, 0.4f);
        answer a = answer_of(&x, r);
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
                        c.tile_tokens += tokens;
                        c.qk_tokens += tokens;
                        c.pv_tokens += tokens;
                    }
                }
            same_counts(&a.head[h], &c);
        }
        forget_both(&a, &x);
    }
}

/* Issue 98: groups of heads fail in prediction; they are the same heads, repeated. Thresholds
 * differ by head. */
Test(schedules, groups_of_heads_are_repeated_heads)
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
            each[h] = (sparge_thresholds){0.3f, 0.05f * (float)h, SPARGE_OFF,
                                          h % 2 ? -1.0f : -INFINITY, 0};
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

/* ---- Schedules ---- */

/* The same bits every time, whatever the order of threads and however many blocks share the device.
 */
Test(schedules, the_same_bits_every_time)
{
    EACH_KERNEL(r)
    {
        problem x = question_of(r, 1, 3, 1, 150, 330, 16, 60);
        x.o.causal = SPARGE_CAUSAL_END;
        x.o.thresholds = (sparge_thresholds){0.0f, 0.7f, SPARGE_OFF, -1.0f, 0};
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

/* lse, intermediates, counts may be missing, the output may stand in the place of q. */
Test(schedules, only_o_is_wanted)
{
    EACH_CASE(r, n, 2, 1)
    {
        problem x = question_of(r, 1, 2, 1, 140, 200, 32, 32);
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
                problem x = question_of(r, 1, 2, 1, 300, 1300, 60, 40);
                x.o.causal = SPARGE_CAUSAL_END;
                x.o.skip_rows = 16 << seed;
                x.o.thresholds =
                    (sparge_thresholds){-1.0f, 0.9f, SPARGE_OFF, seed ? -3.0f : -INFINITY, 0};
                verify(&x, r, true);
                mask_fill(&x, 0.15f);
                check_answers(&x, r, GIVEN);
            }
    fresh_device();
}

Test(schedules, kernel_4_as_late_as_the_program_allows) { late(3, 5); }
Test(schedules, kernel_5_as_late_as_the_program_allows) { late(5, RUNGS); } /* planted.sh */
#endif
