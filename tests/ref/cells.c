/* SPDX-License-Identifier: Apache-2.0 */
/* cells.c: masses of cells, and the threshold on mass: masks worked out by hand. masses.c has a
 * predictor in double over random inputs. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "tests/ref/hand.h"

TestSuite(cells);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))
#define LN(x)        ((float)log(x))

static void set(hand *h, float tau, float topk, float min_mass)
{
    h->o.thresholds.tau = tau;
    h->o.thresholds.topk = topk;
    h->o.thresholds.min_mass = min_mass;
}

/* By blocks, by single tokens, and by cells that are the blocks, where the mask is one. */
static void keeps_by_all(const char *what, hand *h, const char *want)
{
    for (h->o.cell = 0; h->o.cell <= 2; h->o.cell++)
        keeps(check_text("%s, cells of %lld", what, (long long)h->o.cell), h, want);
    h->o.cell = 0;
}

/* ---- The threshold on mass ------------------------------------------------------------------- */

/* Shares of 1/5, 1/2 and 3/10, of which an even one is 1/3. */
Test(cells, blocks_above_min_mass_are_kept)
{
    static const struct {
        float min_mass;
        const char *want;
    } table[] = {{0x1p-149f, "111"}, {0.59f, "111"}, {0.61f, "011"}, {0.89f, "011"},
                 {0.91f, "010"},     {1.49f, "010"}, {1.51f, "000"}, {FLT_MAX, "000"}};
    hand h = by_hand(2, 3, (float[]){LN(0.2), LN(0.5), LN(0.3)});
    for (int64_t n = 0; n < COUNT(table); n++) {
        set(&h, SPARGE_OFF, SPARGE_OFF, table[n].min_mass);
        keeps_by_all(check_text("%g", (double)table[n].min_mass), &h, table[n].want);
    }
    drop(&h);
}

Test(cells, an_even_share_is_not_above_itself)
{
    hand h = by_hand(4, 4, (float[]){7, 7, 7, 7});
    set(&h, SPARGE_OFF, SPARGE_OFF, 1);
    keeps_by_all("1", &h, "0000/0000");
    set(&h, SPARGE_OFF, SPARGE_OFF, nextafterf(1, 0));
    keeps_by_all("just below 1", &h, "1111/1111");
    h.o.sink = true;
    set(&h, SPARGE_OFF, SPARGE_OFF, 1);
    keeps_by_all("sink", &h, "1000/1000");
    drop(&h);
}

/* Row i pays as much to each of its i + 1 blocks, and needs more than 0.375. By tokens it pays less
 * to the diagonal: rows pay 0.58 and 0.42, and then 0.37 at the most. */
Test(cells, an_even_share_is_that_of_the_whole_call)
{
    hand h = by_hand(8, 4, (float[]){1, 1, 1, 1});
    set(&h, SPARGE_OFF, SPARGE_OFF, 1.5f);
    h.o.causal = SPARGE_CAUSAL_END;
    keeps_by_all("causal", &h, "1000/1100/0010/0001");
    h.p.q_len = 4; /* rows 2 and 3 */
    keeps_by_all("the last rows", &h, "0010/0001");
    h.o.causal = SPARGE_CAUSAL_START;
    keeps_by_all("the first rows", &h, "1000/1100");
    drop(&h);
}

/* Shares of 3/10, 1/2, 1/10 and 1/10. */
Test(cells, tau_topk_and_min_mass_keep_the_union)
{
    const float x[] = {LN(0.3), LN(0.5), LN(0.1), LN(0.1)};
    hand h = by_hand(2, 4, x);
    for (h.o.cell = 0; h.o.cell <= 2; h.o.cell++) {
        set(&h, 0, SPARGE_OFF, 1);
        keeps_for("min_mass keeps more than tau", &h, (uint8_t[]){MIN_MASS, MASS | MIN_MASS, 0, 0},
                  4);
        set(&h, 0.81f, SPARGE_OFF, 1.9f);
        keeps_for("less than tau", &h, (uint8_t[]){MASS, MASS | MIN_MASS, 0, 0}, 4);
        set(&h, SPARGE_OFF, 0.75f, 1);
        keeps_for("less than topk", &h, (uint8_t[]){TOPK | MIN_MASS, TOPK | MIN_MASS, TOPK, 0}, 4);
        set(&h, SPARGE_OFF, 0, 0.3f);
        keeps_for("more than topk", &h, (uint8_t[]){MIN_MASS, TOPK | MIN_MASS, MIN_MASS, MIN_MASS},
                  4);
        set(&h, 0.81f, 0.75f, 1.5f);
        keeps_for("all three", &h, (uint8_t[]){MASS | TOPK, MASS | TOPK | MIN_MASS, TOPK, 0}, 4);
        set(&h, 0.81f, 0.75f, 0);
        keeps_for("without it", &h, (uint8_t[]){MASS | TOPK, MASS | TOPK, TOPK, 0}, 4);
    }
    drop(&h);
}

/* Head 1 has none. */
Test(cells, each_head_has_its_min_mass)
{
    hand h = by_hand(2, 3, (float[]){LN(0.2), LN(0.5), LN(0.3)});
    const sparge_thresholds each[] = {{0.6f, SPARGE_OFF, SPARGE_OFF, -1, 0.61f},
                                      {0.6f, SPARGE_OFF, 0, -1, 0},
                                      {0.6f, SPARGE_OFF, SPARGE_OFF, -1, 0.01f}};
    h.p.heads = 3;
    h.o.per_head = each;
    h.o.thresholds.min_mass = NAN;
    keeps_by_all("three heads", &h, "011/010/111");
    drop(&h);
}

/* Blocks 0 and 2 have 2/5 and 3/5 where block 1 has no score; with cells it has the mean of its
 * rows, 0, and weighs 1 beside 0.2 and 0.3. */
Test(cells, blocks_that_are_not_similar_have_mass)
{
    hand h = by_hand(2, 3, (float[]){LN(0.2), LN(0.5), LN(0.3)});
    set(&h, SPARGE_OFF, SPARGE_OFF, 1.5f);
    disagree(h.k, 1);
    keeps_for("blocks", &h, (uint8_t[]){0, ODD_K, MIN_MASS}, 3);
    h.o.cell = 2;
    keeps_for("cells", &h, (uint8_t[]){0, ODD_K | MIN_MASS, 0}, 3);
    disagree(h.q, 0);
    keeps_for("queries too", &h, (uint8_t[]){ODD_Q, ODD_Q | ODD_K, ODD_Q}, 3); /* a third each */
    drop(&h);
}

/* ---- Cells ----------------------------------------------------------------------------------- */

/* Blocks of four: cells of 8 and 1, and of 3 and 3. The whole block weighs sqrt(8). */
Test(cells, one_cell_may_speak_for_its_block)
{
    hand h = by_hand(4, 4, (float[]){LN(8), LN(1), LN(3), LN(3)});
    h.o.block_q = h.o.block_k = 4;
    h.o.thresholds.theta = -1;
    set(&h, 0, SPARGE_OFF, 0);
    for (h.o.cell = 0; h.o.cell <= 4; h.o.cell += 1 + (h.o.cell == 2))
        keeps(check_text("cells of %lld", (long long)h.o.cell), &h,
              h.o.cell % 4 == 0 ? "01" : "10");
    drop(&h);
}

/* Masses of row 0 of blocks, of which there are `blocks`. */
static void has_masses(const char *what, const hand *h, const float *want, int64_t count)
{
    check_case("%s", what);
    float *s = check_alloc((size_t)count * sizeof *s), *s_all = check_alloc((size_t)count * 4);
    sparge_mask mask = predicted(&h->p, &h->o, &(sparge_intermediates){.s = s, .s_all = s_all});
    for (int64_t j = 0; j < count; j++)
        check_close(s[j], want[j], 1e-6);
    check_same(s_all, s, count);
    check_free(s);
    check_free(s_all);
    check_free(mask.bits);
}

/* A short cell of keys counts as any other in the softmax, and one of queries by its queries. */
Test(cells, ends_that_are_short)
{
    hand h = by_hand(3, 3, (float[]){0, LN(2), LN(4)});
    set(&h, 1, SPARGE_OFF, 0);
    h.o.block_q = 4;
    h.p.k_len = 5;
    h.q[4] = -1; /* the last query pays 4 2 1 of 7 */
    h.o.cell = 2;
    has_masses(
        "2", &h,
        (float[]){(2.0f / 7 + 4.0f / 7) / 3, (4.0f / 7 + 2.0f / 7) / 3, (8.0f / 7 + 1.0f / 7) / 3},
        3);
    h.o.cell = 1; /* 1 1 2 2 4 of 10, and 1 1 1/2 1/2 1/4 of 3.25 */
    has_masses("1", &h,
               (float[]){(4.0f / 10 + 2 / 3.25f) / 3, (8.0f / 10 + 1 / 3.25f) / 3,
                         (8.0f / 10 + 0.25f / 3.25f) / 3},
               3);
    drop(&h);
}

/* Query t sees keys 0 to t - 3. With cells of 2 that of queries 0 and 1 sees none, that of 2 and 3
 * the first of keys, the next two cells of keys, and query 6 the same. */
Test(cells, rows_that_see_nothing)
{
    hand h = by_hand(7, 2, (float[]){0, LN(3)});
    set(&h, SPARGE_OFF, SPARGE_OFF, 1);
    h.o.causal = SPARGE_CAUSAL_END;
    h.o.block_q = 4;
    h.o.cell = 2;
    has_masses("2", &h, (float[]){1, -INFINITY, 0.25f, 0.75f}, 4);
    keeps_for("2", &h, (uint8_t[]){MIN_MASS | DIAGONAL, 0, DIAGONAL, MIN_MASS | DIAGONAL}, 4);
    h.o.cell = 1; /* query 4 sees two keys, 5 three, of 1 1 3, and 6 four */
    has_masses("1", &h, (float[]){1, -INFINITY, (1 + 0.4f + 0.25f) / 3, (0.6f + 0.75f) / 3}, 4);
    h.o.block_q = 2;
    h.o.cell = 2;
    has_masses("rows of 2", &h,
               (float[]){-INFINITY, -INFINITY, 1, -INFINITY, 0.25f, 0.75f, 0.25f, 0.75f}, 8);
    keeps("rows of 2", &h, "00/10/11/01");
    h.o.causal = SPARGE_CAUSAL_START;
    h.p.k_len = 2;
    keeps("one block", &h, "1/1/1/1");
    drop(&h);
}

/* The mean rows of blocks are not made, and what is not made is not written. */
Test(cells, intermediates_without_pools)
{
    hand h = by_hand(2, 3, (float[]){LN(0.2), LN(0.5), LN(0.3)});
    const float pool[6] = {1, 2, 3, 4, 5, 6};
    float q_pool[6], k_pool[6], q_sim, k_sim[3], k_mean[2];
    memcpy(q_pool, pool, sizeof pool);
    memcpy(k_pool, pool, sizeof pool);
    set(&h, 1, SPARGE_OFF, 0);
    h.o.smooth_k = true;
    h.o.cell = 2;
    sparge_mask mask = predicted(
        &h.p, &h.o,
        &(sparge_intermediates){
            .k_mean = k_mean, .q_pool = q_pool, .k_pool = k_pool, .q_sim = &q_sim, .k_sim = k_sim});
    check_same(q_pool, pool, 6);
    check_same(k_pool, pool, 6);
    for (int j = 0; j < 3; j++)
        check_close(k_sim[j], 1, 1e-6);
    check_equal(q_sim, 1.0f);
    check_equal(k_mean[1], 1.0f);
    check_free(mask.bits);
    has_masses("masses", &h, (float[]){0.2f, 0.5f, 0.3f}, 3);
    drop(&h);
}

Test(cells, nothing_in_nothing_out)
{
    hand h = by_hand(4, 2, (float[]){1, 2});
    h.o.sink = true;
    for (int n = 0; n < 9; n++) {
        h.o.causal = (sparge_causal)(n % 3);
        h.o.cell = n / 3;
        set(&h, 0.5f, 0.5f, 0.5f);
        h.p.k_len = 0;
        keeps("no keys", &h, "/");
        h.p.q_len = 0;
        keeps("no keys, no queries", &h, "");
        h.p.k_len = 4;
        keeps("no queries", &h, "");
        h.p.q_len = 4;
        h.p.batch = 0;
        keeps("no batch", &h, "");
        h.p.batch = 1;
    }
    drop(&h);
}

/* Means are held at 2^55, so that beyond it blocks are equal, and every score is finite. */
Test(cells, scores_stay_finite)
{
    hand h = by_hand(2, 4, (float[]){1e30f, 0x1p55f, 1e16f, -FLT_MAX});
    h.o.thresholds.theta = -1;
    h.o.cell = 2;
    set(&h, SPARGE_OFF, SPARGE_OFF, 1);
    keeps_for("keys", &h, (uint8_t[]){MIN_MASS, MIN_MASS, 0, 0}, 4);
    h.q[0] = h.q[2] = FLT_MAX;
    keeps_for("queries too", &h, (uint8_t[]){MIN_MASS, MIN_MASS, 0, 0}, 4);
    h.o.softmax_scale = FLT_MAX;
    keeps_for("and the scale", &h, (uint8_t[]){MIN_MASS, MIN_MASS, 0, 0}, 4);
    for (int64_t e = 0; e < 4; e++)
        h.q[e] = e % 2 ? 0 : 1;
    h.o.softmax_scale = FLT_MIN;
    h.k[0] = h.k[2] = h.k[4] = h.k[6] = 5;
    h.k[8] = h.k[10] = h.k[12] = h.k[14] = -5;
    keeps_for("the smallest scale: all are equal", &h, (uint8_t[]){0, 0, 0, 0}, 4);
    h.o.softmax_scale = FLT_MAX;
    keeps_for("the largest", &h, (uint8_t[]){MIN_MASS, MIN_MASS, 0, 0}, 4);
    drop(&h);
}

/* What is not finite is 0 in the mean of its cell: key 2 of x = ln 4 leaves sqrt(4) beside it. */
Test(cells, what_is_nonfinite_counts_as_0)
{
    const float odd[] = {NAN, INFINITY, -INFINITY};
    hand h = by_hand(2, 2, (float[]){LN(3), LN(4)});
    set(&h, SPARGE_OFF, SPARGE_OFF, 1);
    h.o.cell = 2;
    h.o.thresholds.theta = -1;
    for (int64_t n = 0; n < COUNT(odd); n++) {
        h.k[4] = odd[n];
        has_masses("a key", &h, (float[]){0.6f, 0.4f}, 2);
        keeps_for("a key", &h, (uint8_t[]){MIN_MASS, ODD_K}, 2);
    }
    drop(&h);
}

/* Block 1 gets nothing that counts, unless the scale makes all keys equal. Queries 0 and 1 see two
 * blocks, and the third one, a short block of its own, all. */
Test(cells, rules)
{
    hand h = by_hand(3, 3, (float[]){30, 0, 30});
    h.o.causal = SPARGE_CAUSAL_END;
    h.p.k_len = 5;
    h.o.cell = 1;
    set(&h, SPARGE_OFF, SPARGE_OFF, 1);
    const uint8_t forced[] = {MIN_MASS, DIAGONAL, 0, MIN_MASS, 0, DIAGONAL};
    keeps_for("default", &h, forced, 6);
    h.o.rules = SPARGE_RULES_PAPER;
    keeps_for("paper", &h, forced, 6);
    h.o.softmax_scale = 1e-6f;
    keeps_for("paper has a scale of its own", &h, forced, 6);
    h.o.rules = SPARGE_RULES_UPSTREAM;
    keeps_for("upstream too; it forces what is short, and no diagonal", &h,
              (uint8_t[]){MIN_MASS, 0, 0, ODD_Q | MIN_MASS, ODD_Q, ODD_Q | ODD_K}, 6);
    h.o.rules = SPARGE_RULES_DEFAULT;
    keeps_for("the default has the user's", &h,
              (uint8_t[]){MIN_MASS, MIN_MASS | DIAGONAL, 0, MIN_MASS, MIN_MASS, DIAGONAL}, 6);
    drop(&h);
}

/* Sixty-four cells of a block with all of the mass, for 1024 queries, are 2^30 of it. */
Test(cells, the_largest_blocks)
{
    enum { TOKENS = 2048 };
    float *q = check_alloc(TOKENS * 4), *k = check_alloc(TOKENS * 4);
    hand h = by_hand(2, 1, (float[]){0});
    h.p = (sparge_problem){.batch = 1,
                           .heads = 1,
                           .kv_heads = 1,
                           .q_len = TOKENS,
                           .k_len = TOKENS,
                           .dim = 1,
                           .q = {q, SPARGE_F32, 0, 0, 1},
                           .k = {k, SPARGE_F32, 0, 0, 1}};
    h.o.block_q = h.o.block_k = 1024;
    h.o.cell = 16;
    h.o.thresholds.theta = -1;
    for (int t = 0; t < TOKENS; t++) {
        q[t] = 1;
        k[t] = t < 1024 ? 0 : -1000;
    }
    set(&h, 1 - 0x1p-23f, SPARGE_OFF, nextafterf(2, 0));
    has_masses("one block", &h, (float[]){1, 0, 1, 0}, 4);
    keeps_for("one block", &h, (uint8_t[]){MASS | MIN_MASS, 0, MASS | MIN_MASS, 0}, 4);
    h.o.thresholds.min_mass = 2;
    keeps_for("not above 2", &h, (uint8_t[]){MASS, 0, MASS, 0}, 4);
    for (int t = 1024; t < TOKENS; t++)
        k[t] = 0;
    h.o.thresholds.min_mass = 1;
    has_masses("two", &h, (float[]){0.5f, 0.5f, 0.5f, 0.5f}, 4);
    keeps_for("two", &h, (uint8_t[]){MASS, 0, MASS, 0}, 4);
    check_free(q);
    check_free(k);
    drop(&h);
}
