/* SPDX-License-Identifier: Apache-2.0 */
/* predict.c: the prediction (Sec 3.3, Algorithm 1 lines 4-6): masks worked out by hand, and a
 * straightforward predictor in double over random inputs.
 *
 * The predictor below shares nothing with ref/: it asks every token pair whether it is visible,
 * forms the Gram matrix of every block, exponentiates with exp() and sums probabilities, not
 * integers. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/ref/hand.h"
#include "tests/ref/scene.h"

TestSuite(predict);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

/* One query block over the scores x. */
static void row_keeps(const char *what, int64_t k_blocks, const float *x, float tau, float topk,
                      const char *want)
{
    hand h = by_hand(2, k_blocks, x);
    h.o.thresholds.tau = tau;
    h.o.thresholds.topk = topk;
    keeps(what, &h, want);
    drop(&h);
}

/* ---- TopCdf ---------------------------------------------------------------------------------- */

Test(predict, tau_0_keeps_one_block)
{
    row_keeps("the best", 3, (float[]){1, 3, 2}, 0, SPARGE_OFF, "010");
    row_keeps("the last is best", 4, (float[]){-9, -8, -7, -6}, 0, SPARGE_OFF, "0001");
    row_keeps("tie: lower block", 3, (float[]){1, 3, 3}, 0, SPARGE_OFF, "010");
    row_keeps("all equal", 4, (float[]){5, 5, 5, 5}, 0, SPARGE_OFF, "1000");
    row_keeps("the only one", 1, (float[]){0}, 0, SPARGE_OFF, "1");
    hand h = by_hand(2, 4, (float[]){4, 3, 2, 1});
    h.o.thresholds.tau = 0;
    disagree(h.k, 0);
    keeps("the best similar one, beside one that is not", &h, "1100");
    drop(&h);
}

Test(predict, tau_1_keeps_every_block)
{
    const float x[] = {0, -5, -500, 40, -1e30f}, theta[] = {-1, 0, 0.6f, 1};
    for (int64_t n = 0; n < COUNT(theta); n++)
        for (int64_t odd = -1; odd < 5; odd++) {
            hand h = by_hand(4, 5, x);
            h.o.thresholds.theta = theta[n];
            h.o.thresholds.tau = 1;
            if (odd >= 0)
                disagree(h.k, odd);
            keeps(check_text("theta %g, block %lld disagrees", (double)theta[n], (long long)odd),
                  &h, "11111/11111");
            drop(&h);
        }
}

/* Shares of 1/2, 3/10 and 2/10; then 9/10 and 1/10. */
Test(predict, the_block_that_crosses_tau_is_dropped)
{
    const float x[] = {logf(0.2f), logf(0.5f), logf(0.3f)}, y[] = {logf(0.1f), logf(0.9f)};
    row_keeps("0.49", 3, x, 0.49f, SPARGE_OFF, "010");
    row_keeps("0.51", 3, x, 0.51f, SPARGE_OFF, "010");
    row_keeps("0.79", 3, x, 0.79f, SPARGE_OFF, "010");
    row_keeps("0.81", 3, x, 0.81f, SPARGE_OFF, "011");
    row_keeps("0.99", 3, x, 0.99f, SPARGE_OFF, "011");
    row_keeps("the first alone crosses: kept", 2, y, 0.5f, SPARGE_OFF, "01");
    row_keeps("0.95", 2, y, 0.95f, SPARGE_OFF, "01");
}

/* Of four equal blocks each has exactly a quarter: mass <= tau, not <. */
Test(predict, a_prefix_of_exactly_tau_is_kept)
{
    const float x[] = {7, 7, 7, 7};
    row_keeps("1/4", 4, x, 0.25f, SPARGE_OFF, "1000");
    row_keeps("1/2", 4, x, 0.5f, SPARGE_OFF, "1100");
    row_keeps("3/4", 4, x, 0.75f, SPARGE_OFF, "1110");
    row_keeps("just below 3/4", 4, x, nextafterf(0.75f, 0), SPARGE_OFF, "1100");
    row_keeps("just below 1", 4, x, nextafterf(1, 0), SPARGE_OFF, "1110");
    row_keeps("in S order, ties to the lower block", 6, (float[]){7, 8, 7, 8, 7, 8}, 0.5f,
              SPARGE_OFF, "010100");
}

/* A thousand blocks have 1.9 * 2^-30 of the best one each, which counts as 1 of 2^30: of the total,
 * 2^30 + 1000, the share 1 - 2^-21 leaves out 512.0005. Unrounded or rounded to 2, another number
 * of them would stay. */
Test(predict, mass_is_counted_in_integers_rounded_down)
{
    enum { BLOCKS = 1001, BEST = 700, TAIL = 487 };
    float x[BLOCKS];
    char want[BLOCKS + 1] = "";
    for (int j = 0; j < BLOCKS; j++) {
        x[j] = j == BEST ? 0.0f : -20.152561f;
        want[j] = j == BEST || j < TAIL ? '1' : '0';
    }
    row_keeps("2^30 and 1000 ones", BLOCKS, x, 1 - 0x1p-21f, SPARGE_OFF, want);
}

/* exp(-150) is 0 beside 1: by P blocks 1 to 3 would be equal, by S they are not. */
Test(predict, blocks_are_ordered_by_score_and_not_by_probability)
{
    const float x[] = {0, -300, -200, -150, -1000};
    row_keeps("topk", 5, x, SPARGE_OFF, 0.4f, "10010");
    row_keeps("topk", 5, x, SPARGE_OFF, 0.6f, "10110");
    row_keeps("nothing but the best has mass", 5, x, 0.999f, SPARGE_OFF, "10000");
    row_keeps("all of them at 1", 5, x, 1, SPARGE_OFF, "11111");
    row_keeps("one ulp apart", 3, (float[]){4, 0x1.000002p2f, 4}, 0, SPARGE_OFF, "010");
    row_keeps("of the size of the largest float", 3, (float[]){-FLT_MAX / 4, FLT_MAX / 4, 0}, 0.9f,
              SPARGE_OFF, "111"); /* beyond sqrt(FLT_MAX) a norm overflows: not similar */
    row_keeps("nothing on the scale of the rest", 3, (float[]){-1e18f, 1e18f, 0}, 0.9f, SPARGE_OFF,
              "010");
}

/* ---- Top-k ----------------------------------------------------------------------------------- */

Test(predict, topk_is_a_share_of_the_visible_blocks)
{
    const float up[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
    row_keeps("0: at least one", 10, up, SPARGE_OFF, 0, "0000000001");
    row_keeps("1", 10, up, SPARGE_OFF, 1, "1111111111");
    row_keeps("half of 10", 10, up, SPARGE_OFF, 0.5f, "0000011111");
    row_keeps("half of 5", 5, up, SPARGE_OFF, 0.5f, "00011");
    row_keeps("0.7f is below 0.7", 10, up, SPARGE_OFF, 0.7f, "0001111111");
    row_keeps("0.9f is below 0.9", 10, up, SPARGE_OFF, 0.9f, "0111111111");
    row_keeps("0.3f is above 0.3", 10, up, SPARGE_OFF, 0.3f, "0000000111");
    row_keeps("0.29", 10, up, SPARGE_OFF, 0.29f, "0000000011");
    row_keeps("within 1e-5 of 3", 10, up, SPARGE_OFF, 0.2999995f, "0000000111");
    row_keeps("not within 1e-5 of 3", 10, up, SPARGE_OFF, 0.299998f, "0000000011");
    row_keeps("ties", 4, (float[]){2, 2, 2, 2}, SPARGE_OFF, 0.5f, "1100");
}

/* Under causal each row counts its own blocks: 1 to 8, half of them, and the diagonal. */
Test(predict, topk_counts_what_the_row_may_see)
{
    hand h = by_hand(16, 8, (float[]){8, 7, 6, 5, 4, 3, 2, 1});
    h.o.thresholds.topk = 0.5f;
    h.o.causal = SPARGE_CAUSAL_END;
    keeps("causal", &h, "10000000/11000000/10100000/11010000/11001000/11100100/11100010/11110001");
    drop(&h);
}

/* Half of six, counted with the two that are not similar, which are kept besides. */
Test(predict, topk_takes_similar_blocks)
{
    hand h = by_hand(2, 6, (float[]){9, 8, 5, 4, 3, 2});
    h.o.thresholds.topk = 0.5f;
    disagree(h.k, 0);
    disagree(h.k, 1);
    keeps("half of six", &h, "111110");
    drop(&h);
}

Test(predict, tau_and_topk_keep_the_union)
{
    const float x[] = {logf(0.3f), logf(0.5f), logf(0.1f), logf(0.1f)};
    row_keeps("tau keeps more", 4, x, 0.81f, 0.25f, "1100");
    row_keeps("topk keeps more", 4, x, 0.6f, 0.75f, "1110");
    row_keeps("both the least", 4, x, 0, 0, "0100");
    row_keeps("tau 1", 4, x, 1, 0, "1111");
    row_keeps("topk 1", 4, x, 0, 1, "1111");
}

/* ---- Similarity ------------------------------------------------------------------------------ */

/* Blocks 0 to 3: equal rows (1), orthogonal (1/2), antiparallel (0), one zero row (1/4). */
Test(predict, theta_is_exceeded_strictly)
{
    hand h = by_hand(2, 4, (float[]){1, 1, 1, 1});
    const float k[] = {9, 1, 9, 1, 2, 0, 0, 2, 2, 1, -2, -1, 1, 0, 0, 0};
    memcpy(h.k, k, sizeof k);
    h.o.thresholds.tau = 0;
    const struct {
        float theta;
        const char *want;
    } table[] = {
        {-1, "1000"},    {-0.5f, "1000"}, {0, "1010"},    {0.24f, "1010"},
        {0.25f, "1011"}, {0.49f, "1011"}, {0.5f, "1111"}, {0.9f, "1111"},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        h.o.thresholds.theta = table[n].theta;
        keeps(check_text("theta %g", (double)table[n].theta), &h, table[n].want);
    }
    h.o.thresholds.theta = -0x1p-149f;
    keeps("theta below 0", &h, "1000");
    drop(&h);
}

/* Nothing exceeds 1, so the row of Q and every column is kept. */
Test(predict, theta_1_keeps_everything)
{
    hand h = by_hand(6, 3, (float[]){1, 2, 3});
    h.o.thresholds = (sparge_thresholds){1, 0, SPARGE_OFF, -INFINITY, 0};
    keeps("theta 1", &h, "111/111/111");
    drop(&h);
}

Test(predict, a_key_block_that_is_not_similar_is_kept_for_every_row)
{
    hand h = by_hand(6, 4, (float[]){1, 2, 3, 4});
    h.o.thresholds.tau = 0;
    disagree(h.k, 1);
    keeps("one column", &h, "0101/0101/0101");
    disagree(h.k, 3);
    keeps("two columns: they have no part in the softmax", &h, "0111/0111/0111");
    disagree(h.k, 0);
    disagree(h.k, 2);
    keeps("every column: nothing is left to select", &h, "1111/1111/1111");
    h.o.thresholds = (sparge_thresholds){0.6f, 0.5f, 0.1f, -INFINITY, 0};
    keeps("every column, tau and topk", &h, "1111/1111/1111");
    drop(&h);
}

Test(predict, a_query_block_that_is_not_similar_keeps_its_row)
{
    hand h = by_hand(8, 3, (float[]){1, 2, 3});
    h.o.thresholds.tau = 0;
    disagree(h.q, 1);
    keeps("row 1", &h, "001/111/001/001");
    h.o.causal = SPARGE_CAUSAL_START;
    keeps("row 1, as far as it sees", &h, "100/110/001/001");
    h.o.causal = SPARGE_CAUSAL_NONE;
    memset(h.q + 12, 0, 16);
    keeps("a block of zero queries agrees on nothing", &h, "001/111/001/111");
    h.o.thresholds.theta = -1;
    keeps("theta -1: similar, with all scores 0", &h, "001/100/001/100");
    drop(&h);
}

/* A short block is judged by its real rows: one of them agrees with itself. */
Test(predict, a_short_block_is_a_block)
{
    hand h = by_hand(3, 3, (float[]){1, 5, 3});
    h.o.thresholds.tau = 0;
    h.p.k_len = 5;
    keeps("short and similar", &h, "010/010");
    h.k[8] = 6;
    keeps("short and best", &h, "001/001");
    h.k[8] = h.k[9] = 0;
    keeps("short and zero", &h, "011/011");
    drop(&h);
}

/* ---- Causality ------------------------------------------------------------------------------- */

Test(predict, the_blocks_of_last_visible_keys_are_forced)
{
    hand h = by_hand(8, 4, (float[]){4, 3, 2, 1});
    h.o.thresholds.tau = 0;
    h.o.causal = SPARGE_CAUSAL_END;
    keeps("2 x 2", &h, "1000/1100/1010/1001");
    h.o.block_q = 4;
    keeps("4 x 2: two diagonal blocks", &h, "1100/1011");
    h.o.block_q = 8;
    keeps("8 x 2", &h, "1111");
    h.o.block_q = 1;
    keeps("1 x 2", &h, "1000/1000/1100/1100/1010/1010/1001/1001");
    h.o.block_q = 3;
    keeps("3 x 2: blocks that straddle", &h, "1100/1110/1001");
    drop(&h);

    h = by_hand(8, 4, (float[]){1, 2, 3, 4});
    h.o.thresholds.tau = 0;
    h.o.causal = SPARGE_CAUSAL_END;
    h.o.block_q = 4;
    keeps("only the second of two diagonal blocks is selected", &h, "1100/0011");
    h.o.causal = SPARGE_CAUSAL_NONE;
    keeps("not causal: nothing is forced", &h, "0001/0001");
    drop(&h);

    h = by_hand(8, 4, (float[]){2, 2, 1, 1});
    h.o.thresholds.tau = 0;
    h.o.causal = SPARGE_CAUSAL_END;
    h.o.block_k = 4;
    keeps("2 x 4", &h, "10/10/11/11");
    drop(&h);
}

Test(predict, causal_aligns_to_the_end_or_to_the_start)
{
    hand h = by_hand(4, 4, (float[]){4, 3, 2, 1});
    h.o.thresholds.tau = 0;
    h.o.causal = SPARGE_CAUSAL_END;
    keeps("end, more keys", &h, "1010/1001");
    h.o.causal = SPARGE_CAUSAL_START;
    keeps("start, more keys", &h, "1000/1100");
    h.o.thresholds.tau = 1;
    keeps("start, more keys, tau 1", &h, "1000/1100");
    h.o.causal = SPARGE_CAUSAL_END;
    keeps("end, more keys, tau 1", &h, "1110/1111");
    drop(&h);

    h = by_hand(10, 2, (float[]){2, 1});
    h.o.thresholds.tau = 0;
    h.o.causal = SPARGE_CAUSAL_END;
    keeps("end, more queries: three blocks see nothing", &h, "00/00/00/10/11");
    h.o.block_q = 4;
    keeps("end, a block of which half sees something", &h, "00/10/11");
    h.o.block_q = 7;
    keeps("end, a block of which one row sees one key", &h, "10/11");
    h.o.block_q = 2;
    h.o.causal = SPARGE_CAUSAL_START;
    keeps("start, more queries: the last key is the last", &h, "10/11/11/11/11");
    h.p.k_len = 3;
    keeps("start, a short last block", &h, "10/11/11/11/11");
    h.o.causal = SPARGE_CAUSAL_END;
    keeps("end, a short last block", &h, "00/00/00/10/11");
    h.p.q_len = 9;
    keeps("end, both short", &h, "00/00/00/10/11");
    drop(&h);
}

/* Whatever wants a block on, one that no row may see stays off. */
Test(predict, what_no_row_may_see_is_never_on)
{
    hand h = by_hand(8, 2, (float[]){2, 1});
    h.o.causal = SPARGE_CAUSAL_END;
    h.o.sink = true;
    h.o.thresholds = (sparge_thresholds){1, 1, 1, -INFINITY, 0};
    keeps("end", &h, "00/00/10/11");
    h.o.causal = SPARGE_CAUSAL_START;
    keeps("start", &h, "10/11/11/11");
    h.q[0] = h.k[7] = NAN;
    keeps("start, NaN", &h, "10/11/11/11");
    h.o.causal = SPARGE_CAUSAL_END;
    keeps("end, NaN", &h, "00/00/10/11");
    drop(&h);
}

Test(predict, sink_keeps_block_0)
{
    hand h = by_hand(6, 3, (float[]){1, 2, 3});
    h.o.thresholds.tau = 0;
    keeps("no sink", &h, "001/001/001");
    h.o.sink = true;
    keeps("sink", &h, "101/101/101");
    h.o.causal = SPARGE_CAUSAL_END;
    keeps("sink, causal", &h, "100/110/101");
    drop(&h);
}

/* ---- Sizes ----------------------------------------------------------------------------------- */

Test(predict, nothing_in_nothing_out)
{
    hand h = by_hand(4, 2, (float[]){1, 2});
    h.o.thresholds = (sparge_thresholds){0.6f, 0.5f, 0.5f, -INFINITY, 0};
    h.o.sink = true;
    const sparge_causal causal[] = {SPARGE_CAUSAL_NONE, SPARGE_CAUSAL_END, SPARGE_CAUSAL_START};
    for (int n = 0; n < 6; n++) {
        h.o.causal = causal[n % 3];
        h.o.smooth_k = n > 2;
        h.p.k_len = 0;
        h.p.k.data = NULL;
        keeps("no keys", &h, "/");
        h.p.q_len = 0;
        h.p.q.data = NULL;
        keeps("no keys, no queries", &h, "");
        h.p.k_len = 4;
        h.p.k.data = h.k;
        keeps("no queries", &h, "");
        h.p.q_len = 4;
        h.p.batch = 0;
        h.p.k.data = NULL;
        keeps("no batch", &h, "");
        h.p.batch = 1;
        h.p.q.data = h.q;
        h.p.k.data = h.k;
    }
    drop(&h);
}

/* 31 to 33 and 95 to 97 blocks: words that are full, nearly full and just begun. */
Test(predict, more_blocks_than_a_word_has_bits)
{
    for (int64_t blocks = 31; blocks <= 97; blocks += blocks == 33 ? 62 : 1) {
        float x[97];
        char best[98] = "", half[98] = "", all[98] = "";
        for (int64_t j = 0; j < blocks; j++) {
            x[j] = (float)(j % 2) - (float)j / 1000;
            best[j] = j == 1 ? '1' : '0';
            half[j] = j % 2 ? '1' : '0';
            all[j] = '1';
        }
        row_keeps(check_text("tau 0 of %lld", (long long)blocks), blocks, x, 0, SPARGE_OFF, best);
        row_keeps(check_text("odd ones of %lld", (long long)blocks), blocks, x, SPARGE_OFF, 0.5f,
                  half);
        row_keeps(check_text("tau 1 of %lld", (long long)blocks), blocks, x, 1, SPARGE_OFF, all);
    }
}

/* ---- Heads and batches ----------------------------------------------------------------------- */

/* Batch b, kv head g prefers block 2 b + g. Query heads 0 and 1 read kv head 0. */
Test(predict, heads_and_batches_read_their_own)
{
    hand h = by_hand(2, 16, (float[16]){0});
    h.o.thresholds.tau = 0;
    for (int64_t n = 0; n < 4; n++)
        h.k[2 * (8 * n + 2 * n)] = h.k[2 * (8 * n + 2 * n + 1)] = 5;
    float q[] = {1, 0, 1, 0, -1, 0, -1, 0};
    h.p = (sparge_problem){.batch = 2,
                           .heads = 4,
                           .kv_heads = 2,
                           .q_len = 2,
                           .k_len = 8,
                           .dim = 2,
                           .q = {q, SPARGE_F32, 0, 0, 2},
                           .k = {h.k, SPARGE_F32, 32, 16, 2}};
    keeps("the same query everywhere", &h, "1000/1000/0100/0100/0010/0010/0001/0001");
    h.p.q.head = -4;
    h.p.q.data = q + 4;
    h.p.heads = 2;
    h.p.kv_heads = 1;
    h.p.k.head = 0;
    keeps("the second head dislikes what the first likes", &h, "0100/1000/1000/0010");
    drop(&h);
}

/* One kv head: its blocks are similar for one query head and not for the next. */
Test(predict, thresholds_by_head)
{
    hand h = by_hand(4, 3, (float[]){1, 5, 3});
    const float orthogonal[] = {2, 0, 0, 2};
    memcpy(h.k + 8, orthogonal, sizeof orthogonal);
    const sparge_thresholds thresholds[] = {
        {0.4f, 0, SPARGE_OFF, -INFINITY, 0},
        {0.6f, 0, SPARGE_OFF, -INFINITY, 0},
        {0.4f, SPARGE_OFF, 0.7f, -1, 0},
        {0.4f, 1, SPARGE_OFF, 0, 0},
    };
    h.p.heads = 4;
    h.o.per_head = thresholds;
    h.o.thresholds = (sparge_thresholds){NAN, NAN, NAN, NAN, 0};
    keeps("four heads", &h, "010/010/011/011/110/110/111/111");
    drop(&h);
}

/* ---- Scale and smoothing --------------------------------------------------------------------- */

/* Scores 0, 1, 2 by the scale: nearly equal, as they are, one far above. */
Test(predict, the_scale_of_the_user_is_the_scale_of_the_scores)
{
    hand h = by_hand(2, 3, (float[]){0, 1, 2});
    h.o.thresholds.tau = 0.68f;
    const struct {
        float scale;
        const char *want;
    } table[] = {
        {1e-3f, "011"},
        {0.5f, "001"},
        {1, "001"},
        {100, "001"},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        h.o.softmax_scale = table[n].scale;
        keeps(check_text("scale %g", (double)table[n].scale), &h, table[n].want);
    }
    h.o.thresholds.tau = 0.92f;
    h.o.softmax_scale = 1;
    keeps("scale 1: 0.665 + 0.245", &h, "011");
    h.o.softmax_scale = 0;
    keeps("scale 0 is 1/sqrt(2): 0.576 + 0.284", &h, "011");
    h.o.thresholds.tau = 0.88f;
    keeps("scale 0 at 0.88", &h, "011");
    h.o.softmax_scale = 1;
    keeps("scale 1 at 0.88", &h, "001");
    h.o.softmax_scale = sqrtf(0.5f);
    keeps("scale 1/sqrt(2) at 0.88", &h, "011");
    drop(&h);
}

/* Integer keys, a power of two of them: every sum and the mean are exact, and so is an integer
 * added to each channel. Not one bit of the prediction may notice it. */
Test(predict, a_vector_added_to_every_key_changes_no_bit)
{
    enum { K_LEN = 64, Q_LEN = 24, DIM = 4, K_BLOCKS = 8, Q_BLOCKS = 3 };
    const int offset[DIM] = {1000, -37, 5, 64};
    float q[Q_LEN * DIM], k[K_LEN * DIM], moved[K_LEN * DIM];
    sparge_problem p = {.batch = 1,
                        .heads = 1,
                        .kv_heads = 1,
                        .q_len = Q_LEN,
                        .k_len = K_LEN,
                        .dim = DIM,
                        .q = {q, SPARGE_F32, 0, 0, DIM},
                        .k = {k, SPARGE_F32, 0, 0, DIM}};
    sparge_options o = sparge_options_default(SPARGE_RULES_DEFAULT);
    o.backend = SPARGE_REF;
    o.block_q = o.block_k = 8;
    int64_t noticed = 0;
    for (int n = 0; n < 20; n++) {
        check_case("keys %d", n);
        o.thresholds =
            (sparge_thresholds){0.4f, check_uniform(0.2f, 0.9f), SPARGE_OFF, -INFINITY, 0};
        for (int64_t e = 0; e < K_LEN * DIM; e++) {
            const int64_t block = e / DIM / 8, noise = block % 3 ? 2 : 20;
            k[e] = (float)(check_int(-noise, noise) + (block * 7 + e % DIM * 5) % 17 - 8);
            moved[e] = k[e] + (float)offset[e % DIM];
        }
        for (int64_t e = 0; e < Q_LEN * DIM; e++)
            q[e] = check_uniform(0, 1) + (float)(e % DIM);
        float *s[3];
        sparge_mask mask[3];
        for (int way = 0; way < 3; way++) { /* as they are; moved; moved, not smoothed */
            p.k.data = way ? moved : k;
            o.smooth_k = way < 2;
            s[way] = check_alloc(Q_BLOCKS * K_BLOCKS * sizeof(float));
            mask[way] = predicted(&p, &o, &(sparge_intermediates){.s = s[way]});
        }
        check_same(s[1], s[0], Q_BLOCKS * K_BLOCKS);
        check_same(mask[1].bits, mask[0].bits, Q_BLOCKS);
        noticed += memcmp(mask[2].bits, mask[0].bits, Q_BLOCKS * 4) != 0;
        for (int way = 0; way < 3; way++) {
            check_free(s[way]);
            check_free(mask[way].bits);
        }
    }
    check(noticed >= 15, "smoothing made a difference to %lld of 20 masks", (long long)noticed);
}

/* ---- What is not finite ---------------------------------------------------------------------- */

Test(predict, a_block_that_is_nonfinite_is_kept_and_nothing_else_changes)
{
    const float odd[] = {NAN, INFINITY, -INFINITY};
    const float theta[] = {-1, 0.6f};
    for (int n = 0; n < 6; n++)
        for (int channel = 0; channel < 2; channel++) {
            hand h = by_hand(8, 4, (float[]){1, 2, 4, 3});
            h.o.thresholds = (sparge_thresholds){theta[n / 3], 0, SPARGE_OFF, -INFINITY, 0};
            h.k[4 + channel] = odd[n % 3];
            keeps("first row of key block 1", &h, "0110/0110/0110/0110");
            h.k[8 + channel] = odd[n % 3];
            keeps("the best block too: another is best", &h, "0111/0111/0111/0111");
            h.k[4 + channel] = h.k[8 + channel] = 1;
            h.k[4] = h.k[6];
            h.k[8] = h.k[10];
            h.q[6 + channel] = odd[n % 3];
            keeps("second row of query block 1", &h, "0010/1111/0010/0010");
            h.k[14 + channel] = odd[n % 3];
            keeps("query block 1 and key block 3", &h, "0011/1111/0011/0011");
            drop(&h);
        }
}

/* Head 1 of K is full of NaN, and so is batch 1: the heads that read others see none of it. */
Test(predict, nonfinite_stays_in_its_head_and_batch)
{
    hand h = by_hand(2, 12, (float[]){1, 5, 2, 0, 0, 0, 0, 0, 0, 4, 2, 1});
    h.o.thresholds.tau = 0;
    h.o.smooth_k = true;
    for (int e = 12; e < 36; e++)
        h.k[e] = NAN;
    h.p = (sparge_problem){.batch = 2,
                           .heads = 4,
                           .kv_heads = 2,
                           .q_len = 2,
                           .k_len = 6,
                           .dim = 2,
                           .q = h.p.q,
                           .k = {h.k, SPARGE_F32, 24, 12, 2}};
    keeps("clean, NaN, NaN, clean", &h, "010/010/111/111/111/111/100/100");
    drop(&h);
}

/* A non-finite element counts as 0 in the mean: here the mean of channel 0 is (0 + 1 + 8 * 2 + 7) /
 * 12, and without its block's 1 the order of the rest is what it was. */
Test(predict, the_mean_leaves_out_what_is_nonfinite)
{
    hand h = by_hand(2, 6, (float[]){1, 2, 2, 2, 2, 3.5f});
    float mean[2];
    h.o.smooth_k = true;
    h.o.thresholds.tau = 0;
    h.k[0] = INFINITY;
    h.k[3] = NAN;
    sparge_mask mask = predicted(&h.p, &h.o, &(sparge_intermediates){.k_mean = mean});
    check_equal(mean[0], 2.0f);
    check_equal(mean[1], 11.0f / 12.0f);
    check_free(mask.bits);
    drop(&h);
}

/* A score that overflows, either way or to NaN, says nothing: the pair is kept. */
Test(predict, a_score_that_overflows_is_kept)
{
    hand h = by_hand(2, 4, (float[]){1e15f, -1e15f, 2, 1});
    h.o.thresholds.tau = 0;
    h.q[0] = h.q[2] = 1e15f;
    h.o.softmax_scale = 1e10f;
    keeps("+inf, -inf and two finite ones", &h, "1110");
    h.o.softmax_scale = 1;
    keeps("in range", &h, "1000");
    drop(&h);

    h = by_hand(2, 3, (float[]){1, 2, 3});
    h.o.thresholds = (sparge_thresholds){-1, 0, SPARGE_OFF, -INFINITY, 0};
    h.q[0] = h.q[1] = h.q[2] = h.q[3] = 1e30f;
    for (int t = 0; t < 2; t++)
        h.k[2 * t] = 1e30f, h.k[2 * t + 1] = -1e30f;
    h.k[5] = h.k[7] = h.k[9] = h.k[11] = 1;
    keeps("inf - inf", &h, "101");
    drop(&h);
}

/* ---- Modes: each case beside the default's answer -------------------------------------------- */

static void mode_keeps(const char *what, const hand *h, sparge_rules rules, const char *defaults,
                       const char *want)
{
    hand other = *h;
    keeps(check_text("%s, default", what), h, defaults);
    other.o.rules = rules;
    keeps(what, &other, want);
}

Test(predict, rules_of_the_paper)
{
    const sparge_rules paper = SPARGE_RULES_PAPER;
    hand h = by_hand(4, 3, (float[]){1, 2, 3});
    h.o.thresholds.tau = 0;
    mode_keeps("nothing within tau", &h, paper, "001/001", "000/000");
    h.o.thresholds.tau = 0.55f; /* shares of 0.576, 0.284, 0.140 at the scale 1/sqrt(2) */
    mode_keeps("the first block alone above tau", &h, paper, "001/001", "000/000");
    h.o.thresholds.tau = 0.6f;
    mode_keeps("within tau", &h, paper, "001/001", "001/001");
    h.o.thresholds.tau = 0;
    h.o.sink = true;
    mode_keeps("sink", &h, paper, "101/101", "100/100");
    h.o.sink = false;
    disagree(h.k, 1);
    disagree(h.q, 1);
    mode_keeps("columns and rows are forced", &h, paper, "011/111", "010/111");
    h.k[1] = NAN;
    mode_keeps("NaN", &h, paper, "111/111", "110/111");
    drop(&h);

    h = by_hand(2, 3, (float[]){1, 2, 3});
    h.o.thresholds = (sparge_thresholds){0.5f, 0.6f, SPARGE_OFF, -INFINITY, 0};
    const float orthogonal[] = {2, 0, 0, 2};
    memcpy(h.k, orthogonal, sizeof orthogonal);
    mode_keeps("sim = theta is similar", &h, paper, "101", "001");
    drop(&h);

    h = by_hand(2, 3, (float[]){1, 2, 3});
    h.o.softmax_scale = 0.01f;
    h.o.thresholds.tau = 0.6f;
    mode_keeps("the scale of the prediction is 1/sqrt(2)", &h, paper, "001", "001");
    h.o.thresholds.tau = 0.7f; /* a third each, or 0.576 + 0.284 */
    mode_keeps("the scale of the prediction is 1/sqrt(2)", &h, paper, "011", "001");
    drop(&h);
}

/* ref/README.md: a share of the visible blocks, as by default. */
Test(predict, rules_of_the_paper_know_topk)
{
    hand h = by_hand(2, 4, (float[]){1, 2, 3, 4});
    h.o.thresholds.topk = 0.5f;
    mode_keeps("topk", &h, SPARGE_RULES_PAPER, "0011", "0011");
    drop(&h);
}

Test(predict, rules_of_the_released_kernels)
{
    const sparge_rules upstream = SPARGE_RULES_UPSTREAM;
    hand h = by_hand(3, 3, (float[]){1, 2, 3});
    h.o.thresholds.tau = 0;
    mode_keeps("a short query block is not similar", &h, upstream, "001/001", "001/111");
    h.p.q_len = 2;
    h.p.k_len = 5;
    mode_keeps("a short key block is not similar", &h, upstream, "001", "011");
    h.o.thresholds.theta = -1;
    mode_keeps("whatever theta says", &h, upstream, "001", "011");
    h.p.k_len = 6;
    h.k[0] = h.k[1] = 0;
    mode_keeps("nor is one with a zero row", &h, upstream, "001", "101");
    h.k[0] = h.k[1] = 1;
    h.q[2] = h.q[3] = 0;
    mode_keeps("of queries too", &h, upstream, "001", "111");
    drop(&h);

    h = by_hand(4, 3, (float[]){1, 2, 3});
    h.o.thresholds.tau = 0;
    mode_keeps("at least one", &h, upstream, "001/001", "001/001");
    h.o.thresholds.theta = 0.5f;
    const float orthogonal[] = {2, 0, 0, 2};
    memcpy(h.k, orthogonal, sizeof orthogonal);
    mode_keeps("sim = theta is not similar", &h, upstream, "101/101", "101/101");
    h.o.sink = true;
    h.o.thresholds.theta = 0.4f;
    mode_keeps("sink", &h, upstream, "101/101", "101/101");
    h.k[4] = NAN;
    mode_keeps("NaN", &h, upstream, "111/111", "111/111");
    drop(&h);

    h = by_hand(16, 8, (float[]){8, 7, 6, 5, 4, 3, 2, 1});
    h.o.causal = SPARGE_CAUSAL_START;
    h.o.thresholds.topk = 0.5f;
    mode_keeps("topk counts all blocks; the diagonal is not forced", &h, upstream,
               "10000000/11000000/10100000/11010000/11001000/11100100/11100010/11110001",
               "10000000/11000000/11100000/11110000/11110000/11110000/11110000/11110000");
    h.o.thresholds.topk = 0;
    mode_keeps("topk of none is one", &h, upstream,
               "10000000/11000000/10100000/10010000/10001000/10000100/10000010/10000001",
               "10000000/10000000/10000000/10000000/10000000/10000000/10000000/10000000");
    h.o.thresholds.topk = 0.49f;
    h.o.causal = SPARGE_CAUSAL_NONE;
    h.o.block_q = 16;
    mode_keeps("3.92 of 8 is 3", &h, upstream, "11100000", "11100000");
    drop(&h);

    h = by_hand(2, 3, (float[]){1, 2, 3});
    h.o.softmax_scale = 0.01f;
    h.o.thresholds.tau = 0.7f;
    mode_keeps("the scale of the prediction is 1/sqrt(2)", &h, upstream, "011", "001");
    drop(&h);
}

/* ---- Intermediates --------------------------------------------------------------------------- */

/* Two kv heads of S 1, 2 and 4, 3; the mean of the keys is (1.5, 1) and (3.5, 1). */
Test(predict, intermediates_hold_every_step)
{
    hand h = by_hand(4, 4, (float[]){1, 2, 4, 3});
    h.p = (sparge_problem){.batch = 1,
                           .heads = 2,
                           .kv_heads = 2,
                           .q_len = 3,
                           .k_len = 4,
                           .dim = 2,
                           .q = {h.q, SPARGE_F32, 8, 2, 2},
                           .k = {h.k, SPARGE_F32, 16, 8, 2}};
    h.o.thresholds.tau = 0;
    h.q[2] = 3;
    h.q[6] = -4;
    /* Queries (1,0) (3,0) | (1,0) and (3,0) (1,0) | (-4,0): blocks of two, the second one short. */
    const float q_pool[] = {2, 0, 1, 0, 2, 0, -4, 0}, q_sim[] = {1, 1, 1, 1};
    const float k_mean[] = {1.5f, 1, 3.5f, 1};
    const float k_pool[] = {-0.5f, 0, 0.5f, 0, 0.5f, 0, -0.5f, 0}, k_sim[] = {1, 1, 1, 1};
    const float s[] = {-1, 1, -0.5f, 0.5f, 1, -1, -2, 2};
    const struct {
        const char *name;
        size_t at;
        const float *want;
        int64_t count;
    } array[] = {
        {"k_mean", offsetof(sparge_intermediates, k_mean), k_mean, COUNT(k_mean)},
        {"q_pool", offsetof(sparge_intermediates, q_pool), q_pool, COUNT(q_pool)},
        {"k_pool", offsetof(sparge_intermediates, k_pool), k_pool, COUNT(k_pool)},
        {"q_sim", offsetof(sparge_intermediates, q_sim), q_sim, COUNT(q_sim)},
        {"k_sim", offsetof(sparge_intermediates, k_sim), k_sim, COUNT(k_sim)},
        {"s", offsetof(sparge_intermediates, s), s, COUNT(s)},
    };
    h.o.smooth_k = true;
    h.o.causal = SPARGE_CAUSAL_NONE;
    keeps("mask", &h, "01/01/10/01");
    for (int64_t n = 0; n < COUNT(array); n++) {
        check_case("%s alone", array[n].name);
        float *buffer = check_alloc((size_t)array[n].count * sizeof *buffer);
        sparge_intermediates intermediates = {0};
        memcpy((char *)&intermediates + array[n].at, &buffer, sizeof buffer);
        sparge_mask mask = predicted(&h.p, &h.o, &intermediates);
        check_same(buffer, array[n].want, array[n].count);
        const uint32_t bits[] = {2, 2, 1, 2};
        check_same(mask.bits, bits, 4);
        check_free(mask.bits);
        check_free(buffer);
    }
    drop(&h);
}

/* What the prediction does not make stays as it was; so does the mean key where keys are not
 * smoothed. */
Test(predict, intermediates_of_attention_are_left_alone)
{
    hand h = by_hand(2, 2, (float[]){1, 2});
    h.o.thresholds.tau = 0;
    int16_t codes[3][16];
    float arrays[7][16], mean[2] = {77, 78};
    memset(codes, 0x5a, sizeof codes);
    memset(arrays, 0x5a, sizeof arrays);
    const sparge_intermediates intermediates = {
        .k_mean = mean,
        .q_int = codes[0],
        .k_int = codes[1],
        .v_int = codes[2],
        .q_scale = arrays[0],
        .k_scale = arrays[1],
        .v_scale = arrays[2],
        .pv_done = arrays[3],
        .m = arrays[4],
        .l = arrays[5],
    };
    sparge_mask mask = predicted(&h.p, &h.o, &intermediates);
    check(mean[0] == 77 && mean[1] == 78, "the mean key was written");
    for (size_t e = 0; e < sizeof codes; e++)
        check(((char *)codes)[e] == 0x5a, "codes were written");
    for (size_t e = 0; e < sizeof arrays; e++)
        check(((char *)arrays)[e] == 0x5a, "scales, pv_done, m or l were written");
    check_free(mask.bits);
    drop(&h);
}

/* What is not visible or not similar is -inf in S, for every head by its own theta. */
Test(predict, trace_of_s_is_minus_infinity_where_nothing_is_scored)
{
    hand h = by_hand(4, 2, (float[]){1, 2});
    h.o.causal = SPARGE_CAUSAL_END;
    const float orthogonal[] = {2, 0, 0, 2};
    memcpy(h.k, orthogonal, sizeof orthogonal);
    const sparge_thresholds thresholds[] = {{0.6f, 1, SPARGE_OFF, 0, 0},
                                            {0.4f, 1, SPARGE_OFF, 0, 0}};
    h.p.heads = 2;
    h.o.per_head = thresholds;
    float s[8], s_all[8];
    const float want[] = {-INFINITY, -INFINITY, -INFINITY, 2, 1, -INFINITY, 1, 2};
    const float all[] = {1, -INFINITY, 1, 2, 1, -INFINITY, 1, 2};
    sparge_mask mask = predicted(&h.p, &h.o, &(sparge_intermediates){.s = s, .s_all = s_all});
    check_same(s, want, 8);
    check_same(s_all, all, 8);
    check_free(mask.bits);
    drop(&h);
}

/* ---- Why ------------------------------------------------------------------------------------- */

/* Four blocks, the third the best, under one thing after another. */
Test(predict, every_reason_is_told)
{
    const sparge_backend backends[] = {SPARGE_REF, SPARGE_CPU};
    for (int64_t n = 0; n < COUNT(backends); n++) {
        hand h = by_hand(4, 4, (float[]){1, 2, 4, 3});
        h.o.backend = backends[n];
        h.o.thresholds.tau = 0;
        keeps_for("tau", &h, (uint8_t[]){0, 0, MASS, 0, 0, 0, MASS, 0}, 8);
        h.o.thresholds.topk = 0.5f;
        keeps_for("topk too", &h, (uint8_t[]){0, 0, MASS | TOPK, TOPK, 0, 0, MASS | TOPK, TOPK}, 8);
        h.o.thresholds.topk = SPARGE_OFF;
        h.o.sink = true;
        keeps_for("sink", &h, (uint8_t[]){SINK, 0, MASS, 0, SINK, 0, MASS, 0}, 8);
        h.o.sink = false;
        h.o.causal = SPARGE_CAUSAL_END; /* rows of keys 0..5 and 0..7 */
        keeps_for("diagonal", &h, (uint8_t[]){0, 0, MASS | DIAGONAL, 0, 0, 0, MASS, DIAGONAL}, 8);
        h.o.causal = SPARGE_CAUSAL_NONE;
        disagree(h.k, 0);
        keeps_for("keys", &h, (uint8_t[]){ODD_K, 0, MASS, 0, ODD_K, 0, MASS, 0}, 8);
        disagree(h.q, 1);
        keeps_for("queries", &h,
                  (uint8_t[]){ODD_K, 0, MASS, 0, ODD_K | ODD_Q, ODD_Q | MASS, ODD_Q, ODD_Q},
                  8); /* all 0 */
        h.k[4] = NAN;
        keeps_for(
            "what is not finite is not similar", &h,
            (uint8_t[]){ODD_K, ODD_K, MASS, 0, ODD_K | ODD_Q, ODD_K | ODD_Q, ODD_Q | MASS, ODD_Q},
            8);
        drop(&h);
        h = by_hand(2, 3, (float[]){1, 1e18f, 2});
        h.o.backend = backends[n];
        h.o.thresholds.tau = 0;
        h.o.softmax_scale = 3e38f;
        keeps_for("overflow", &h, (uint8_t[]){MASS, OVERFLOW_, OVERFLOW_}, 3);
        drop(&h);
    }
}

/* What one intermediates holds gives S under any other theta. */
Test(predict, one_trace_serves_every_theta)
{
    enum { BLOCKS = 12, DIM = 8, ROWS = 4 };
    float q[ROWS * DIM], k[BLOCKS * ROWS * DIM], s_all[BLOCKS], s[BLOCKS], sim[BLOCKS];
    for (int64_t e = 0; e < ROWS * DIM; e++)
        q[e] = check_uniform(-1, 1) + 2;
    for (int64_t e = 0; e < BLOCKS * ROWS * DIM; e++)
        k[e] = check_uniform(-2, 2) + (float)(e / ROWS / DIM % 3);
    const sparge_problem p = {.batch = 1,
                              .heads = 1,
                              .kv_heads = 1,
                              .q_len = ROWS,
                              .k_len = BLOCKS * ROWS,
                              .dim = DIM,
                              .q = {q, SPARGE_F32, 0, 0, DIM},
                              .k = {k, SPARGE_F32, 0, 0, DIM}};
    sparge_options o = sparge_options_default(SPARGE_RULES_DEFAULT);
    o.backend = SPARGE_REF;
    o.block_q = o.block_k = ROWS;
    o.thresholds.theta = 1; /* hides every column */
    sparge_mask mask = predicted(&p, &o, &(sparge_intermediates){.s_all = s_all, .k_sim = sim});
    check_free(mask.bits);
    int64_t hidden = 0;
    for (o.thresholds.theta = 0; o.thresholds.theta < 0.9f; o.thresholds.theta += 0.1f) {
        mask = predicted(&p, &o, &(sparge_intermediates){.s = s});
        check_free(mask.bits);
        float want[BLOCKS];
        for (int64_t j = 0; j < BLOCKS; j++) {
            want[j] = sim[j] > o.thresholds.theta ? s_all[j] : -INFINITY;
            hidden += want[j] < -FLT_MAX;
        }
        check_same(s, want, BLOCKS);
    }
    check(hidden > 0 && hidden < 9 * BLOCKS, "theta hides %lld", (long long)hidden);
}

/* ---- In double ------------------------------------------------------------------------------- */

/* What one head should give. */
typedef struct judged {
    double *mean, *q_pool, *k_pool, *q_sim, *k_sim,
        *s; /* shapes of sparge_intermediates, for one head */
    verdict *similar_q, *similar_k;
    verdict *mask; /* [q_blocks][k_blocks] */
} judged;

/* Row i: S, its order, TopCdf, top-k, and what is forced. */
static void judge_row(const scene *s, const judged *w, const sparge_thresholds *thresholds,
                      int64_t i)
{
    const int64_t k_blocks = blocks(s->p.k_len, s->o.block_k), dim = s->p.dim;
    const int64_t first = i * s->o.block_q, end = least(s->p.q_len, first + s->o.block_q);
    double *score = &w->s[i * k_blocks], total = 0, mass = 0;
    verdict *row = &w->mask[i * k_blocks];
    bool *visible = calloc((size_t)k_blocks + 1, sizeof *visible),
         *last = calloc((size_t)k_blocks + 1, 1);
    verdict *by_tau = calloc((size_t)k_blocks + 1, sizeof *by_tau);
    verdict *by_topk = calloc((size_t)k_blocks + 1, sizeof *by_topk);
    int64_t *order = malloc((size_t)(k_blocks + 1) * sizeof *order), count = 0, in_view = 0;
    bool unsure = false;
    for (int64_t t = first; t < end; t++) {
        int64_t latest = -1;
        for (int64_t key = 0; key < s->p.k_len; key++)
            if (sees(s, t, key)) {
                visible[key / s->o.block_k] = true;
                latest = key;
            }
        if (latest >= 0 && s->o.causal != SPARGE_CAUSAL_NONE)
            last[latest / s->o.block_k] = true;
    }
    for (int64_t j = 0; j < k_blocks; j++) {
        in_view += visible[j];
        unsure = unsure || (visible[j] && w->similar_k[j] == OPEN);
        score[j] = -INFINITY;
        if (!visible[j] || w->similar_k[j] == DROP)
            continue;
        score[j] = 0;
        for (int64_t c = 0; c < dim; c++)
            score[j] +=
                (double)s->o.softmax_scale * w->q_pool[i * dim + c] * w->k_pool[j * dim + c];
        int64_t place = count++;
        for (; place > 0 && score[order[place - 1]] < score[j]; place--)
            order[place] = order[place - 1];
        order[place] = j;
    }
    for (int64_t n = 0; n < count; n++)
        total += exp(score[order[n]] - score[order[0]]);
    int64_t kept = 0;
    for (int64_t n = 0; n < count && thresholds->tau >= 0; n++) {
        mass += exp(score[order[n]] - score[order[0]]) / total;
        const bool within = thresholds->tau >= 1 || mass <= (double)thresholds->tau;
        if (n == 0 || (within && kept == n)) {
            by_tau[order[n]] = KEEP;
            kept = n + 1;
        }
        if (n > 0 && thresholds->tau < 1 && fabs(mass - (double)thresholds->tau) <= near_threshold)
            by_tau[order[n]] = OPEN;
    }
    if (thresholds->tau >= 0)
        open_beside(score, order, count, kept, near_threshold, by_tau);
    if (thresholds->topk >= 0) {
        const int64_t share = (int64_t)floor((double)thresholds->topk * (double)in_view + 1e-5);
        kept = least(count, share > 1 ? share : 1);
        for (int64_t n = 0; n < kept; n++)
            by_topk[order[n]] = KEEP;
        open_beside(score, order, count, kept, near_threshold, by_topk);
    }
    for (int64_t j = 0; j < k_blocks; j++) {
        row[j] = by_tau[j] == KEEP || by_topk[j] == KEEP   ? KEEP
                 : by_tau[j] == OPEN || by_topk[j] == OPEN ? OPEN
                                                           : DROP;
        if (unsure || w->similar_q[i] == OPEN)
            row[j] = OPEN;
        if (w->similar_q[i] == DROP || w->similar_k[j] == DROP || last[j] || (s->o.sink && j == 0))
            row[j] = KEEP;
        if (!visible[j])
            row[j] = DROP;
    }
    free(visible);
    free(last);
    free(by_tau);
    free(by_topk);
    free(order);
}

static double *doubles(int64_t n) { return calloc((size_t)n + 1, sizeof(double)); }

/* Stage 1 of query head h; released by forget(). */
static judged judge_head(const scene *s, int64_t b, int64_t h)
{
    const sparge_problem *p = &s->p;
    const int64_t dim = p->dim, q_blocks = blocks(p->q_len, s->o.block_q);
    const int64_t k_blocks = blocks(p->k_len, s->o.block_k), kv = h / (p->heads / p->kv_heads);
    const sparge_thresholds *thresholds = s->o.per_head ? &s->o.per_head[h] : &s->o.thresholds;
    const float *q = tensor_row(&s->q, b, h, 0), *k = tensor_row(&s->k, b, kv, 0);
    judged w = {doubles(dim),
                doubles(q_blocks * dim),
                doubles(k_blocks * dim),
                doubles(q_blocks),
                doubles(k_blocks),
                doubles(q_blocks * k_blocks),
                calloc((size_t)q_blocks + 1, sizeof(verdict)),
                calloc((size_t)k_blocks + 1, sizeof(verdict)),
                calloc((size_t)(q_blocks * k_blocks) + 1, sizeof(verdict))};
    for (int64_t e = 0; e < p->k_len * dim; e++)
        w.mean[e % dim] += isfinite(k[e]) ? (double)k[e] / (double)p->k_len : 0;
    for (int64_t j = 0; j < k_blocks; j++) {
        const int64_t first = j * s->o.block_k, rows = least(s->o.block_k, p->k_len - first);
        w.similar_k[j] = judge_block(k + first * dim, s->o.smooth_k ? w.mean : NULL, rows, dim,
                                     thresholds->theta, w.k_pool + j * dim, &w.k_sim[j]);
    }
    for (int64_t i = 0; i < q_blocks; i++) {
        const int64_t first = i * s->o.block_q, rows = least(s->o.block_q, p->q_len - first);
        w.similar_q[i] = judge_block(q + first * dim, NULL, rows, dim, thresholds->theta,
                                     w.q_pool + i * dim, &w.q_sim[i]);
        judge_row(s, &w, thresholds, i);
    }
    return w;
}

static void forget(judged *w)
{
    free(w->mean), free(w->q_pool), free(w->k_pool), free(w->q_sim), free(w->k_sim), free(w->s);
    free(w->similar_q), free(w->similar_k), free(w->mask);
}

/* The largest distances seen, and how many decisions were compared. */
typedef struct tally {
    double mean, pool, sim, s;
    int64_t decided, open, kept, dropped;
} tally;

static void compare(const scene *s, tally *sum)
{
    const sparge_problem *p = &s->p;
    const int64_t q_blocks = blocks(p->q_len, s->o.block_q),
                  k_blocks = blocks(p->k_len, s->o.block_k);
    const int64_t lines = p->batch * p->heads, kv_lines = p->batch * p->kv_heads;
    const sparge_intermediates intermediates = {
        .k_mean = check_alloc((size_t)(kv_lines * p->dim) * 4),
        .q_pool = check_alloc((size_t)(lines * q_blocks * p->dim) * 4),
        .k_pool = check_alloc((size_t)(kv_lines * k_blocks * p->dim) * 4),
        .q_sim = check_alloc((size_t)(lines * q_blocks) * 4),
        .k_sim = check_alloc((size_t)(kv_lines * k_blocks) * 4),
        .s = check_alloc((size_t)(lines * q_blocks * k_blocks) * 4),
    };
    sparge_mask mask = predicted(p, &s->o, &intermediates);
    for (int64_t n = 0; n < lines; n++) {
        const int64_t b = n / p->heads, h = n % p->heads,
                      kv = b * p->kv_heads + h / (p->heads / p->kv_heads);
        judged want = judge_head(s, b, h);
        const float *k_mean = intermediates.k_mean + kv * p->dim,
                    *q_sim = intermediates.q_sim + n * q_blocks;
        const float *q_pool = intermediates.q_pool + n * q_blocks * p->dim,
                    *k_sim = intermediates.k_sim + kv * k_blocks;
        const float *k_pool = intermediates.k_pool + kv * k_blocks * p->dim;
        const float *scores = intermediates.s + n * q_blocks * k_blocks;
        if (s->o.smooth_k)
            worst("k_mean", b, h, k_mean, want.mean, p->dim, 1e-6, &sum->mean);
        worst("q_pool", b, h, q_pool, want.q_pool, q_blocks * p->dim, 1e-5, &sum->pool);
        worst("k_pool", b, h, k_pool, want.k_pool, k_blocks * p->dim, 1e-5, &sum->pool);
        worst("q_sim", b, h, q_sim, want.q_sim, q_blocks, 4e-6, &sum->sim);
        worst("k_sim", b, h, k_sim, want.k_sim, k_blocks, 4e-6, &sum->sim);
        for (int64_t e = 0; e < q_blocks * k_blocks; e++) {
            const int64_t i = e / k_blocks, j = e % k_blocks;
            const bool got = bit(&mask, n * q_blocks + i, j);
            if (want.similar_k[j] != OPEN)
                worst("S", b, h, scores + e, &want.s[e], 1, 1e-5, &sum->s);
            check(want.mask[e] == OPEN || got == (want.mask[e] == KEEP),
                  "batch %lld, head %lld, query block %lld, key block %lld is %s; blocks %lld x "
                  "%lld, "
                  "lengths %lld and %lld, dim %lld, causal %d, S = %.9g, sims %.9g and %.9g",
                  (long long)b, (long long)h, (long long)i, (long long)j, got ? "kept" : "dropped",
                  (long long)s->o.block_q, (long long)s->o.block_k, (long long)p->q_len,
                  (long long)p->k_len, (long long)p->dim, (int)s->o.causal, want.s[e],
                  want.q_sim[i], want.k_sim[j]);
            sum->open += want.mask[e] == OPEN;
            sum->decided += want.mask[e] != OPEN;
            sum->kept += got;
            sum->dropped += !got;
        }
        forget(&want);
    }
    check_free(intermediates.k_mean), check_free(intermediates.q_pool),
        check_free(intermediates.k_pool);
    check_free(intermediates.q_sim), check_free(intermediates.k_sim), check_free(intermediates.s),
        check_free(mask.bits);
}

/* Class B: equal but for decisions within 1e-5 of their threshold, of which there are few. */
static void sweep(const char *what, int64_t cases)
{
    tally sum = {0};
    for (int64_t n = 0; n < cases; n++) {
        check_case("%s %lld", what, (long long)n);
        scene s = some_scene();
        s.o.per_head = check_int(0, 2) ? NULL : s.per_head;
        compare(&s, &sum);
        discard(&s);
    }
    cr_log_info("%s: %lld decisions, %lld too near to call; mean %.2g, pool %.2g, sim %.2g, S %.2g",
                what, (long long)sum.decided, (long long)sum.open, sum.mean, sum.pool, sum.sim,
                sum.s);
    check(sum.open * 100 <= sum.decided, "%lld of %lld decisions are open", (long long)sum.open,
          (long long)sum.decided);
    check(sum.kept > cases && sum.dropped > cases,
          "%lld kept, %lld dropped: the cases test nothing", (long long)sum.kept,
          (long long)sum.dropped);
}

Test(predict, agrees_with_a_predictor_in_double) { sweep("random", 300); }
Test(predict, agrees_with_a_predictor_in_double_again) { sweep("more", 300); }

/* More mass, more blocks, and never one less. */
Test(predict, masks_grow_with_tau)
{
    const float tau[] = {0, 0.1f, 0.3f, 0.5f, 0.7f, 0.8f, 0.9f, 0.95f, 0.99f, 1};
    for (int64_t n = 0; n < 25; n++) {
        check_case("growing %lld", (long long)n);
        scene s = some_scene();
        uint32_t *before = NULL;
        s.o.thresholds.topk = SPARGE_OFF;
        for (int64_t step = 0; step < COUNT(tau); step++) {
            s.o.thresholds.tau = tau[step];
            sparge_mask mask = predicted(&s.p, &s.o, NULL);
            const int64_t words = mask.batch * mask.heads * mask.q_blocks * mask.words;
            for (int64_t e = 0; before && e < words; e++)
                check(!(before[e] & ~mask.bits[e]), "tau %g drops a block that %g keeps: word %lld",
                      (double)tau[step], (double)tau[step - 1], (long long)e);
            check_free(before);
            before = mask.bits;
        }
        check_free(before);
        discard(&s);
    }
}
