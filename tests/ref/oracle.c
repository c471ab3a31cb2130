/* SPDX-License-Identifier: Apache-2.0 */
/* oracle.c: what ref/oracle.c must answer (Sec 3.1, 3.2), worked out by hand: the judge of all
 * backends has no judge but literals.
 *
 * Three tricks recur. With q = 0 all seen keys weigh the same, so o tells which keys were seen.
 * With one key, or one far above the others, lse is its score and so tells its codes. And a row of
 * q that holds 0.25 beside a 127 in its block has code 0, so its lse tells the mean key.
 */
#include "sparge_inspect.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

TestSuite(oracle);

static const float zeros[64];

/* One question and its answer. Packed f32 unless a test changes the views. */
typedef struct ask {
    sparge_problem p;
    sparge_options opt;
    sparge_mask mask;
    uint32_t bits[64];
    double o[64], lse[64], mass[512];
} ask;

static ask question(int64_t q_len, int64_t k_len, int64_t dim, int64_t dim_v, const float *q,
                    const float *k, const float *v)
{
    ask a = {
        .p = {.batch = 1, .heads = 1, .kv_heads = 1, .q_len = q_len, .k_len = k_len},
        .opt =
            {.version = SPARGE_VERSION_NUMBER,
             .backend = SPARGE_REF,
             .block_q = 4,
             .block_k = 4,
             .softmax_scale = 1.0f,
             .qk_dtype = SPARGE_F32,
             .pv_dtype = SPARGE_F32,
             .thresholds = {.theta = 0.6f, .tau = 0.98f, .topk = SPARGE_OFF, .lambda = -INFINITY}},
    };
    a.p.dim = dim;
    a.p.dim_v = dim_v;
    a.p.q = (sparge_in){q, SPARGE_F32, q_len * dim, q_len * dim, dim};
    a.p.k = (sparge_in){k, SPARGE_F32, k_len * dim, k_len * dim, dim};
    a.p.v = (sparge_in){v, SPARGE_F32, k_len * dim_v, k_len * dim_v, dim_v};
    return a;
}

/* Gives the question an empty mask of its shape, one word a row. */
static void mask_on(ask *a)
{
    a->mask = (sparge_mask){.bits = a->bits,
                            .batch = a->p.batch,
                            .heads = a->p.heads,
                            .q_blocks = (a->p.q_len + a->opt.block_q - 1) / a->opt.block_q,
                            .k_blocks = (a->p.k_len + a->opt.block_k - 1) / a->opt.block_k,
                            .words = 1};
}

/* Outputs start as poison: what the oracle leaves unwritten shows. */
static void answer(ask *a, sparge_oracle_mode mode)
{
    for (int n = 0; n < 512; n++)
        a->o[n % 64] = a->mass[n] = a->lse[n % 64] = 777.0;
    sparge_error error = {"poison"};
    const sparge_status status = sparge_oracle(&a->p, &a->opt, a->mask.bits ? &a->mask : NULL, mode,
                                               a->o, a->lse, a->mass, &error);
    cr_assert(status == SPARGE_OK, "%s", error.text);
    cr_assert(error.text[0] == '\0', "text after success: %s", error.text);
}

static void near(const char *what, double got, double want, double tolerance)
{
    cr_expect(got == want || fabs(got - want) <= tolerance, "%s is %.17g, not %.17g", what, got,
              want);
}

static void is_nan(const char *what, double got)
{
    cr_expect(isnan(got), "%s is %.17g, not NaN", what, got);
}

static void codes(ask *a, sparge_dtype qk)
{
    a->opt.qk_dtype = qk;
    answer(a, SPARGE_ORACLE_CODES);
}

/* ---- The formula ------------------------------------------------------------------------ */

Test(oracle, one_key_returns_its_value)
{
    const float q[] = {2, 3}, k[] = {5, -7}, v[] = {11, 13, 17};
    ask a = question(1, 1, 2, 3, q, k, v);
    a.opt.softmax_scale = 0.5f;
    answer(&a, SPARGE_ORACLE_REAL);
    near("o", a.o[0], 11, 0);
    near("o", a.o[1], 13, 0);
    near("o", a.o[2], 17, 0);
    near("lse", a.lse[0], -5.5, 0);
    near("mass", a.mass[0], 1, 0);
    near("what follows o", a.o[3], 777, 0);
}

Test(oracle, two_keys_have_the_weights_of_softmax)
{
    const float q[] = {1, -2}, k[] = {0, 1}, v[] = {1, 0, 0, 1};
    ask a = question(2, 2, 1, 2, q, k, v);
    answer(&a, SPARGE_ORACLE_REAL);
    near("1 / (1 + e)", a.o[0], 0.26894142136999512, 1e-15);
    near("e / (1 + e)", a.o[1], 0.73105857863000488, 1e-15);
    near("1 / (1 + e^-2)", a.o[2], 0.88079707797788244, 1e-15);
    near("1 / (1 + e^2)", a.o[3], 0.11920292202211756, 1e-15);
    near("log(1 + e)", a.lse[0], 1.3132616875182228, 1e-15);
    near("log(1 + e^-2)", a.lse[1], 0.12692801104297250, 1e-15);
}

Test(oracle, the_default_scale_is_a_float)
{
    const float q[] = {1, 2, 3}, k[] = {1, 0, 0}, v[] = {1};
    ask a = question(1, 1, 3, 1, q, k, v);
    a.opt.softmax_scale = 0.0f;
    answer(&a, SPARGE_ORACLE_REAL);
    near("1.0f / sqrtf(3)", a.lse[0], 0.57735025882720947, 0);
}

Test(oracle, scores_beyond_float_are_fine)
{
    const float q[] = {1e30f, 1}, k[] = {1e30f, 1000, -1e30f, 999}, v[] = {3, 5};
    ask a = question(1, 2, 2, 1, q, k, v);
    answer(&a, SPARGE_ORACLE_REAL);
    near("o", a.o[0], 3, 0);
    near("lse / 1e60", a.lse[0] / ((double)1e30f * (double)1e30f), 1, 1e-15);

    const float high[] = {10000, 9999, -10000, -9999};
    for (int at = 0; at < 4; at += 2) {
        a = question(1, 2, 1, 1, q + 1, high + at, v);
        answer(&a, SPARGE_ORACLE_REAL);
        near("o of huge scores", a.o[0], at ? 4.4621171572600098 : 3.5378828427399902, 1e-12);
        near("lse of huge scores", a.lse[0], (at ? -9999 : 10000) + 0.31326168751822286, 1e-11);
    }
}

/* ---- Who sees whom ---------------------------------------------------------------------- */

/* Which prefix of the keys did row r see? With q = 0 and v = 1, 2, 4, ... the average tells. */
static void sees(const ask *a, int64_t r, int64_t keys)
{
    near("o", a->o[r], keys ? (double)((1 << keys) - 1) / (double)keys : 0, 1e-15);
    near("lse", a->lse[r], keys ? log((double)keys) : -INFINITY, 1e-15);
}

static const float powers[] = {1, 2, 4, 8, 16, 32};

Test(oracle, causal_end_aligns_the_last_tokens)
{
    for (int mode = 0; mode < 2; mode++) {
        ask a = question(3, 5, 1, 1, zeros, zeros, powers);
        a.opt.causal = SPARGE_CAUSAL_END;
        a.opt.block_q = a.opt.block_k = 2;
        answer(&a, (sparge_oracle_mode)mode);
        for (int r = 0; r < 3; r++)
            sees(&a, r, r + 3);
        a = question(5, 3, 1, 1, zeros, zeros, powers);
        a.opt.causal = SPARGE_CAUSAL_END;
        a.opt.block_q = a.opt.block_k = 2;
        answer(&a, (sparge_oracle_mode)mode);
        for (int r = 0; r < 5; r++)
            sees(&a, r, r < 2 ? 0 : r - 1);
    }
}

Test(oracle, causal_start_aligns_the_first_tokens)
{
    ask a = question(3, 5, 1, 1, zeros, zeros, powers);
    a.opt.causal = SPARGE_CAUSAL_START;
    answer(&a, SPARGE_ORACLE_REAL);
    for (int r = 0; r < 3; r++)
        sees(&a, r, r + 1);
    a = question(5, 3, 1, 1, zeros, zeros, powers);
    a.opt.causal = SPARGE_CAUSAL_START;
    a.opt.block_q = 2; /* the row's number counts from the first block */
    answer(&a, SPARGE_ORACLE_REAL);
    for (int r = 0; r < 5; r++)
        sees(&a, r, r < 2 ? r + 1 : 3);
}

Test(oracle, without_causal_all_keys_are_seen)
{
    ask a = question(2, 6, 1, 1, zeros, zeros, powers);
    answer(&a, SPARGE_ORACLE_REAL);
    sees(&a, 0, 6);
    sees(&a, 1, 6);
}

Test(oracle, rows_without_keys_are_zero)
{
    const float ones[] = {1, 1, 1, 1, 1, 1, 1, 1}, nan[] = {NAN, NAN};
    for (int mode = 0; mode < 2; mode++) {
        ask a = question(2, 0, 2, 1, ones, NULL, NULL);
        a.opt.smooth_k = true;
        a.opt.qk_dtype = SPARGE_INT8;
        answer(&a, (sparge_oracle_mode)mode);
        sees(&a, 0, 0);
        sees(&a, 1, 0);
        near("mass of no blocks", a.mass[0], 777, 0);

        a = question(2, 2, 2, 1, ones, ones, ones);
        a.opt.smooth_k = true;
        a.opt.qk_dtype = SPARGE_INT8;
        mask_on(&a); /* keeps nothing */
        answer(&a, (sparge_oracle_mode)mode);
        sees(&a, 0, 0);
        near("mass", a.mass[0], 0, 0);

        a = question(2, 1, 2, 1, nan, ones, ones); /* no key, so not even a NaN of its own */
        a.p.q.token = 0;
        a.opt.causal = SPARGE_CAUSAL_END;
        a.opt.smooth_k = true;
        a.opt.qk_dtype = SPARGE_INT8;
        answer(&a, (sparge_oracle_mode)mode);
        sees(&a, 0, 0);
        is_nan("o of the row that has a key", a.o[1]);
    }
}

Test(oracle, empty_sizes_are_fine)
{
    ask a = question(0, 3, 1, 1, zeros, zeros, zeros);
    answer(&a, SPARGE_ORACLE_CODES);
    near("o", a.o[0], 777, 0);
    a = question(2, 3, 1, 1, zeros, zeros, zeros);
    a.p.batch = 0;
    answer(&a, SPARGE_ORACLE_CODES);
    near("o", a.o[0], 777, 0);
}

Test(oracle, the_mask_selects_blocks)
{
    /* 2 x 3 blocks of 2 rows and 2 keys; the last of either is short. Columns: 1 2 | 4 8 | 16 */
    ask a = question(3, 5, 1, 1, zeros, zeros, powers);
    a.opt.block_q = a.opt.block_k = 2;
    mask_on(&a);
    a.bits[0] = 5; /* blocks 0 and 2 */
    a.bits[1] = 2; /* block 1 */
    answer(&a, SPARGE_ORACLE_REAL);
    near("row 0", a.o[0], 19.0 / 3, 1e-15);
    near("row 1", a.o[1], 19.0 / 3, 1e-15);
    near("row 2", a.o[2], 6, 0);
    near("lse 0", a.lse[0], log(3), 1e-15);
    near("lse 2", a.lse[2], log(2), 1e-15);
}

Test(oracle, a_block_is_attended_in_part)
{
    /* Blocks of 2 rows and 34 keys, two words a row; v is 1 at key 0, 2 at key 33, 4 at key 34. */
    float v[40] = {[0] = 1, [33] = 2, [34] = 4};
    ask a = question(3, 40, 1, 1, zeros, zeros, v);
    int64_t first[] = {0, 1, 3};
    int32_t block[] = {1, 0, 1};
    uint32_t bits[] = {1, 8, 0, 0, 1, 2 | 8, 5, 5, 1, 0, 5, 5}; /* key 33 + 2 is beyond the block */
    a.opt.block_q = 2;
    a.opt.block_k = 34;
    mask_on(&a);
    a.bits[0] = a.bits[1] = 3;
    a.mask.partial_first = first;
    a.mask.partial_block = block;
    a.mask.partial_bits = bits;
    answer(&a, SPARGE_ORACLE_REAL);
    near("row 0", a.o[0], 7.0 / 35, 1e-15); /* block 0 and key 34 */
    near("row 1", a.o[1], 3.0 / 34, 1e-15); /* block 0 */
    near("row 2", a.o[2], 7.0 / 3, 1e-15);  /* keys 0, 33 and 34 */
    near("lse 1", a.lse[1], log(34), 1e-14);
    near("lse 2", a.lse[2], log(3), 1e-15);
    bits[4] = bits[5] = bits[8] = 0;
    answer(&a, SPARGE_ORACLE_REAL);
    near("nothing", a.o[2], 0, 0);
    near("lse of nothing", a.lse[2], -INFINITY, 0);
}

Test(oracle, a_bias_is_of_a_key_and_its_head)
{
    const float two[] = {1, 2, 4, 1, 2, 4};
    float bias[] = {0, 1, -INFINITY, -2, -INFINITY, 0};
    ask a = question(1, 3, 1, 1, zeros, zeros, two);
    a.p.heads = a.p.kv_heads = 2;
    a.p.k_bias = bias;
    answer(&a, SPARGE_ORACLE_CODES);
    const double e = exp(1), f = exp(-2);
    near("head 0", a.o[0], (1 + 2 * e) / (1 + e), 1e-15);
    near("head 1", a.o[1], (f + 4) / (f + 1), 1e-15);
    near("lse 0", a.lse[0], log(1 + e), 1e-15);
    near("lse 1", a.lse[1], log(f + 1), 1e-15);
    bias[0] = NAN;
    bias[3] = INFINITY;
    answer(&a, SPARGE_ORACLE_REAL);
    is_nan("o of NaN", a.o[0]);
    is_nan("lse of +inf", a.lse[1]);
}

Test(oracle, bits_of_invisible_pairs_are_ignored)
{
    ask a = question(4, 4, 1, 1, zeros, zeros, powers);
    a.opt.block_q = a.opt.block_k = 2;
    a.opt.causal = SPARGE_CAUSAL_END;
    mask_on(&a);
    a.bits[0] = 2;          /* row block 0 is given block 1 alone, of which it may see nothing */
    a.bits[1] = 0xffffffff; /* there are but two blocks */
    answer(&a, SPARGE_ORACLE_REAL);
    sees(&a, 0, 0);
    sees(&a, 1, 0);
    sees(&a, 2, 3);
    sees(&a, 3, 4);
}

Test(oracle, the_mask_is_read_by_batch_head_row_and_word)
{
    float v[70];
    for (int t = 0; t < 70; t++)
        v[t] = (float)t;
    ask a = question(2, 70, 1, 1, zeros, zeros, v);
    a.p.batch = 2;
    a.p.heads = 2;
    a.p.k = (sparge_in){zeros, SPARGE_F32, 0, 0, 0};
    a.p.v.batch = a.p.v.head = 0; /* all heads read the same 70 values */
    a.opt.block_q = 1;
    a.opt.block_k = 2;
    a.mask = (sparge_mask){.bits = a.bits,
                           .batch = 2,
                           .heads = 2,
                           .q_blocks = 2,
                           .k_blocks = 35,
                           .words = 3}; /* one word more than it takes */
    memset(a.bits, 0xff, sizeof a.bits);
    for (int row = 0; row < 8; row++) { /* row n keeps key block 27 + n: words 0 and 1 */
        a.bits[3 * row] = row < 5 ? 1u << (27 + row) : 0;
        a.bits[3 * row + 1] = 0xfffffff8u | (row < 5 ? 0 : 1u << (row - 5));
    }
    answer(&a, SPARGE_ORACLE_REAL);
    for (int row = 0; row < 8; row++)
        near("o", a.o[row], 54.5 + 2 * row, 1e-13);
    for (int at = 0; at < 8 * 35; at++)
        near("mass", a.mass[at], at % 35 == 27 + at / 35, 1e-15);
}

Test(oracle, query_heads_share_key_heads)
{
    /* v of key head g in batch b is 10 b + g, its only key 100 b + 10 g + 1. */
    const float q[] = {1, 2, 3, 4, 5, 6, 7, 8}, k[] = {1, 11, 101, 111}, v[] = {0, 1, 10, 11};
    for (int mode = 0; mode < 2; mode++) {
        ask a = question(1, 1, 1, 1, q, k, v);
        a.p.batch = 2;
        a.p.heads = 4;
        a.p.kv_heads = 2;
        a.p.q.batch = 4;
        a.p.k.batch = a.p.v.batch = 2;
        a.opt.smooth_k = true; /* the only key is the mean, so codes lose nothing */
        a.opt.qk_dtype = SPARGE_INT8;
        answer(&a, (sparge_oracle_mode)mode);
        for (int n = 0; n < 8; n++) {
            near("o", a.o[n], 10 * (n / 4) + n % 4 / 2, 0);
            near("lse", a.lse[n], (n + 1) * (100 * (n / 4) + 10 * (n % 4 / 2) + 1), 1e-12);
        }
    }
}

/* ---- Reading the inputs ----------------------------------------------------------------- */

Test(oracle, strides_are_free)
{
    /* q is [token][batch][head][2 + 1], k [head][token][batch][2 + 2], v [batch][token][head]
     * [1 + 1]; the padding is NaN. Row t is shown key t alone, so lse is one dot product. */
    float q[24], k[32], v[16];
    for (int n = 0; n < 32; n++) {
        if (n < 24)
            q[n] = n % 3 < 2 ? (float)(n + 1) : NAN;
        k[n] = n % 4 < 2 ? (float)(100 - n) : NAN;
        if (n < 16)
            v[n] = n % 2 < 1 ? (float)(n + 40) : NAN;
    }
    ask a = question(2, 2, 2, 1, q, k, v);
    a.p.batch = a.p.heads = a.p.kv_heads = 2;
    a.p.q = (sparge_in){q, SPARGE_F32, 6, 3, 12};
    a.p.k = (sparge_in){k, SPARGE_F32, 4, 16, 8};
    a.p.v = (sparge_in){v, SPARGE_F32, 8, 2, 4};
    a.opt.block_q = a.opt.block_k = 1;
    mask_on(&a);
    for (int n = 0; n < 8; n++)
        a.bits[n] = 1u << n % 2;
    answer(&a, SPARGE_ORACLE_REAL);
    const double lse[] = {1 * 100 + 2 * 99,  13 * 92 + 14 * 91, 4 * 84 + 5 * 83,
                          16 * 76 + 17 * 75, 7 * 96 + 8 * 95,   19 * 88 + 20 * 87,
                          10 * 80 + 11 * 79, 22 * 72 + 23 * 71};
    const double o[] = {40, 44, 42, 46, 48, 52, 50, 54};
    for (int n = 0; n < 8; n++) { /* packed, by batch, head and token */
        near("lse", a.lse[n], lse[n], 1e-12);
        near("o", a.o[n], o[n], 0);
    }
}

Test(oracle, half_precision_is_read_exactly)
{
    const uint16_t one = 0x3c00;
    const uint16_t v[] = {0x3c00, 0xc000, 0x0001, 0x83ff, 0x0400, 0x7bff,
                          0x3555, 0x8000, 0x7c00, 0xfc00, 0x7e00};
    const double want[] = {1, -2, 0x1p-24, -0x3ffp-24, 0x1p-14, 65504, 0.333251953125, 0};
    ask a = question(1, 1, 1, 11, NULL, NULL, NULL);
    a.p.q = a.p.k = (sparge_in){&one, SPARGE_F16, 1, 1, 1};
    a.p.v = (sparge_in){v, SPARGE_F16, 11, 11, 11};
    answer(&a, SPARGE_ORACLE_REAL);
    near("lse", a.lse[0], 1, 0);
    for (int c = 0; c < 8; c++)
        near("f16", a.o[c], want[c], 0);
    for (int c = 8; c < 11; c++)
        is_nan("non-finite f16", a.o[c]);
}

Test(oracle, bfloat_is_read_exactly)
{
    const uint16_t one = 0x3f80;
    const uint16_t v[] = {0x3f80, 0xc049, 0x0001, 0x807f, 0x0080, 0x7f7f,
                          0x3eab, 0x8000, 0x7f80, 0xff80, 0x7fc0};
    const double want[] = {1,        -3.140625,  0x1p-133,    -0x7fp-133,
                           0x1p-126, 0x1.fep127, 0.333984375, 0};
    ask a = question(1, 1, 1, 11, NULL, NULL, NULL);
    a.p.q = a.p.k = (sparge_in){&one, SPARGE_BF16, 1, 1, 1};
    a.p.v = (sparge_in){v, SPARGE_BF16, 11, 11, 11};
    answer(&a, SPARGE_ORACLE_REAL);
    near("lse", a.lse[0], 1, 0);
    for (int c = 0; c < 8; c++)
        near("bf16", a.o[c], want[c], 0);
    for (int c = 8; c < 11; c++)
        is_nan("non-finite bf16", a.o[c]);
}

/* ---- Block mass ------------------------------------------------------------------------- */

Test(oracle, block_mass_is_an_average_over_the_rows)
{
    /* Row blocks of 2 and 1, key blocks of 2 and 1; END with one key fewer than rows. */
    ask a = question(4, 3, 1, 1, zeros, zeros, powers);
    a.opt.block_q = 3;
    a.opt.block_k = 2;
    a.opt.causal = SPARGE_CAUSAL_END;
    answer(&a, SPARGE_ORACLE_REAL);
    near("rows 0 (nothing), 1 and 2 pay block 0", a.mass[0], 2.0 / 3, 1e-15);
    near("and nothing to block 1", a.mass[1], 0, 0);
    near("row 3, alone in its block, pays block 0", a.mass[2], 2.0 / 3, 1e-15);
    near("and block 1", a.mass[3], 1.0 / 3, 1e-15);
}

Test(oracle, block_mass_of_a_seeing_row_sums_to_one)
{
    const float q[] = {1, -2, 0.5f, 3, 1, -1}, k[] = {0.5f, 1, -1, 2, 0.25f};
    ask a = question(6, 5, 1, 1, q, k, powers);
    a.opt.block_q = 1;
    a.opt.block_k = 2;
    mask_on(&a);
    for (int r = 0; r < 6; r++)
        a.bits[r] = (uint32_t)(r + 1); /* 1 .. 6: every kind of row but none and all */
    answer(&a, SPARGE_ORACLE_REAL);
    for (int r = 0; r < 6; r++) {
        near("sum", a.mass[3 * r] + a.mass[3 * r + 1] + a.mass[3 * r + 2], 1, 1e-15);
        for (int j = 0; j < 3; j++)
            cr_expect((a.mass[3 * r + j] > 0) == ((r + 1) >> j & 1), "row %d, block %d", r, j);
    }
    /* Row 2 (q = 0.5) keeps blocks 0 and 1: scores 0.25, 0.5 and -0.5, 1. */
    near("mass", a.mass[6], 0.46867262539720606, 1e-15);
}

/* ---- Codes ------------------------------------------------------------------------------ */

/* Rows e_c * 127 read channel c of a single key: lse is 127 times what its code stands for. */
static const float units[] = {127, 0, 0, 0, 0, 127, 0, 0, 0, 0, 127, 0, 0, 0, 0, 127};

Test(oracle, int8_keys_round_half_away_from_zero)
{
    const float k[] = {127, 0.5f, -2.5f, 1.49f}, v[] = {1};
    ask a = question(4, 1, 4, 1, units, k, v);
    codes(&a, SPARGE_INT8);
    near("127", a.lse[0], 127 * 127, 0);
    near("0.5", a.lse[1], 127 * 1, 0);
    near("-2.5", a.lse[2], 127 * -3, 0);
    near("1.49", a.lse[3], 127 * 1, 0);
    answer(&a, SPARGE_ORACLE_REAL);
    near("real -2.5", a.lse[2], 127 * -2.5, 0);
}

Test(oracle, int8_queries_have_a_scale_per_block)
{
    const float q[] = {-127, 0.5f, 254, 3}, k[] = {127}, v[] = {1};
    ask a = question(4, 1, 1, 1, q, k, v);
    a.opt.block_q = 2;
    codes(&a, SPARGE_INT8);
    near("step 1", a.lse[0], -127 * 127, 0);
    near("0.5", a.lse[1], 127 * 1, 0);
    near("step 2", a.lse[2], 127 * 254, 0);
    near("3 / 2", a.lse[3], 127 * 4, 0);
}

Test(oracle, int8_keys_have_a_scale_per_block)
{
    const float q[] = {0, 127}, k[] = {127, 0, 0, 0.5f, 254, 3}, v[] = {1, 2, 4};
    ask a = question(1, 3, 2, 1, q, k, v);
    a.opt.block_k = 2;
    mask_on(&a);
    a.bits[0] = 1;
    codes(&a, SPARGE_INT8);
    near("0.5 beside a 127", a.lse[0], 127, 1e-12);
    a.bits[0] = 2;
    codes(&a, SPARGE_INT8);
    near("3 beside a 254", a.lse[0], 127 * 4, 0);
}

Test(oracle, codes_are_quotients_in_float)
{
    /* 0.0354330689 / (1 / 127) is 4.5 in float and rounds to 5. In double, by a reciprocal or as
     * x * 127 / 1 it is a little less, and rounds to 4. */
    const float k[] = {1, 0.0354330689f, 0, 0}, v[] = {1};
    ask a = question(4, 1, 4, 1, units, k, v);
    codes(&a, SPARGE_INT8);
    near("5 scales", a.lse[1], 5, 1e-6);
    near("a scale is a float", a.lse[0], 127 * 127 * (double)0.00787401572f, 1e-13);
}

Test(oracle, int12_has_2047_levels)
{
    const float q[] = {2047, 0, 0, 2047}, k[] = {2047, 0.5f}, v[] = {1};
    ask a = question(2, 1, 2, 1, q, k, v);
    codes(&a, SPARGE_INT12);
    near("2047", a.lse[0], 2047.0 * 2047, 0);
    near("0.5", a.lse[1], 2047, 0);
    codes(&a, SPARGE_INT8);
    near("2047 in int8", a.lse[0], 2047.0 * 2047, 1);
    near("0.5 in int8", a.lse[1], 0, 0);
}

Test(oracle, float_scores_have_no_codes)
{
    const float k[] = {127, 0.5f, -2.5f, 1.5f}, v[] = {0.3f};
    ask a = question(4, 1, 4, 1, units, k, v);
    codes(&a, SPARGE_F32);
    near("lse", a.lse[2], 127 * -2.5, 0);
    near("o", a.o[0], (double)0.3f, 0);
}

Test(oracle, values_have_a_scale_per_channel_and_block)
{
    /* Blocks of 2 keys: scales 1 and 2, then 2.5 / 127 and 1 / 127. */
    const float v[] = {127, 254, 0.5f, 3, -2.5f, 1};
    ask a = question(3, 3, 1, 2, zeros, zeros, v);
    a.opt.block_k = 2;
    a.opt.causal = SPARGE_CAUSAL_START;
    a.opt.pv_dtype = SPARGE_INT8;
    answer(&a, SPARGE_ORACLE_CODES);
    near("127", a.o[0], 127, 0);
    near("254", a.o[1], 254, 0);
    near("127, 0.5", a.o[2], (127 + 1) / 2.0, 1e-13);
    near("254, 3", a.o[3], (254 + 4) / 2.0, 1e-13);
    near("and -2.5", a.o[4], (128 - 2.5) / 3.0, 1e-6);
    near("and 1", a.o[5], (258 + 1) / 3.0, 1e-6);
    a.opt.pv_dtype = SPARGE_F32;
    answer(&a, SPARGE_ORACLE_CODES);
    near("real values", a.o[2], 127.5 / 2, 1e-13);
    a.opt.pv_dtype = SPARGE_INT8;
    answer(&a, SPARGE_ORACLE_REAL);
    near("real mode", a.o[2], 127.5 / 2, 1e-13);
}

Test(oracle, int12_values_have_4095_levels)
{
    const float v[] = {4095, -0.5f};
    ask a = question(1, 2, 1, 1, zeros, zeros, v);
    a.opt.pv_dtype = SPARGE_INT12;
    answer(&a, SPARGE_ORACLE_CODES);
    near("o", a.o[0], (4095 - 1) / 2.0, 1e-12);
}

/* Each query sees one key more (causal from the start), so that n * o minus the row before is v. */
static void values_are(ask *a, int n, const double *want)
{
    a->opt.causal = SPARGE_CAUSAL_START;
    answer(a, SPARGE_ORACLE_CODES);
    double before = 0.0;
    for (int t = 0; t < n; t++) {
        near("v", a->o[t] * (t + 1) - before, want[t], 1e-12 * fabs(want[t]) + (t ? 1e-9 : 0.0));
        before += want[t];
    }
}

Test(oracle, half_values_are_rounded_to_binary16)
{
    /* The middles between two neighbours go to the even one: 1 + 2^-11 and 1 + 3 * 2^-11, 2049 and
     * 2051; 1.5 * 2^-24 is a subnormal middle, 2^-25 the smallest. */
    const float v[] = {1 + 0x1p-11f, 1 + 0x3p-11f, 2049, 2051, -0.1f};
    ask a = question(5, 5, 1, 1, zeros, zeros, v);
    a.opt.block_k = 2;
    a.opt.pv_dtype = SPARGE_F16;
    values_are(&a, 5, (const double[]){1, 1 + 0x1p-9, 2048, 2052, -0.0999755859375});
    const float small[] = {0x3p-25f, 0x1p-25f, 0x1.000002p-25f, -0x1p-26f};
    const double to[] = {0x1p-23, 0, 0x1p-24, 0};
    for (int n = 0; n < 4; n++) {
        a = question(1, 1, 1, 1, zeros, zeros, small + n);
        a.opt.pv_dtype = SPARGE_F16;
        answer(&a, SPARGE_ORACLE_CODES);
        near("a small v", a.o[0], to[n], 0);
    }
}

Test(oracle, what_binary16_cannot_hold_is_wild)
{
    const float v[] = {65519, 65520, -1e30f};
    for (int n = 0; n < 3; n++) {
        ask a = question(1, 1, 1, 1, zeros, zeros, v + n);
        a.opt.pv_dtype = SPARGE_F16;
        answer(&a, SPARGE_ORACLE_CODES);
        if (n == 0)
            near("the largest", a.o[0], 65504, 0);
        else
            is_nan("beyond it", a.o[0]);
        answer(&a, SPARGE_ORACLE_REAL);
        near("real", a.o[0], (double)v[n], 0);
        a.opt.pv_dtype = SPARGE_FP8;
        answer(&a, SPARGE_ORACLE_CODES);
        near("e4m3 has a scale", a.o[0] / (double)v[n], 1, 1e-7);
    }
}

Test(oracle, fp8_values_have_a_scale_per_channel_of_all_keys)
{
    /* Two channels, blocks of 2 keys: scales 1 and 2, set by the last key; 17 and 19 are middles,
     * between 16 and 18 and between 18 and 20, 2^-9 the smallest code and 1.5 of it a middle. */
    const float v[] = {17, 38, 19, -34, 0x3p-10f, 0x1p-8f, 0x1p-10f, 5, -448, 896};
    ask a = question(5, 5, 1, 2, zeros, zeros, v);
    a.opt.block_k = 2;
    a.opt.pv_dtype = SPARGE_FP8;
    a.opt.causal = SPARGE_CAUSAL_START;
    answer(&a, SPARGE_ORACLE_CODES);
    const double want[] = {16, 40, 20, -32, 0x1p-8, 0x1p-8, 0, 5, -448, 896};
    double sum[2] = {0};
    for (int n = 0; n < 10; n++) {
        sum[n % 2] += want[n];
        near("sum of v", a.o[n] * (n / 2 + 1), sum[n % 2], 1e-12);
    }
}

Test(oracle, fp8_codes_are_quotients_in_float)
{
    /* 3.0357144 / (10 / 448) is 136 in float, the middle between 128 and 144, which goes to 128. In
     * double, or as x * 448 / 10, it is a little more, and goes to 144. */
    const float v[] = {10, 0x1.84924ap+1f};
    const float scale = 10.0f / 448.0f;
    ask a = question(2, 2, 1, 1, zeros, zeros, v);
    a.opt.pv_dtype = SPARGE_FP8;
    values_are(&a, 2, (const double[]){448 * (double)scale, 128 * (double)scale});
    const float zero[] = {0, 0, 0x1p-126f, 0x1p-120f};
    for (int n = 0; n < 4; n += 2) {
        a = question(2, 2, 1, 1, zeros, zeros, zero + n);
        a.opt.pv_dtype = SPARGE_FP8;
        values_are(&a, 2, (const double[]){0, 0}); /* no scale, or a subnormal one */
    }
}

Test(oracle, fp8_is_a_matter_of_values_alone)
{
    const float q[] = {1}, k[] = {0.3f}, v[] = {1};
    ask a = question(1, 1, 1, 1, q, k, v);
    a.opt.pv_dtype = SPARGE_FP8;
    answer(&a, SPARGE_ORACLE_CODES);
    near("lse", a.lse[0], (double)0.3f, 1e-15);
    a.opt.pv_dtype = SPARGE_FASTEST;
    const float other[] = {127, 0.4f};
    a = question(1, 2, 1, 1, zeros, zeros, other);
    a.opt.pv_dtype = SPARGE_FASTEST;
    answer(&a, SPARGE_ORACLE_CODES);
    near("fastest is int8", a.o[0], 127 / 2.0, 0);
}

Test(oracle, steps_below_the_smallest_normal_give_zeros)
{
    const float q[] = {0x1p100f}, v[] = {1};
    const float least_normal[] = {127 * 0x1p-126f}, below[] = {126 * 0x1p-126f};
    ask a = question(1, 1, 1, 1, q, least_normal, v);
    codes(&a, SPARGE_INT8);
    near("a scale of 2^-126", a.lse[0] * 0x1p26, 127, 1e-4);
    a = question(1, 1, 1, 1, q, below, v);
    codes(&a, SPARGE_INT8);
    near("a subnormal scale", a.lse[0], 0, 0);
    answer(&a, SPARGE_ORACLE_REAL);
    near("real", a.lse[0] * 0x1p26, 126, 0);
    a = question(1, 1, 1, 1, v, v, below);
    a.opt.pv_dtype = SPARGE_INT8;
    answer(&a, SPARGE_ORACLE_CODES);
    near("in v", a.o[0], 0, 0);
}

Test(oracle, upstream_adds_to_the_int8_scale)
{
    const float q[] = {127}, k[] = {3.81e-5f}, v[] = {3.81e-5f};
    ask a = question(1, 1, 1, 1, q, k, v);
    codes(&a, SPARGE_INT8);
    near("scale 3e-7", a.lse[0], 4.83869971e-3, 1e-10);
    a.opt.rules = SPARGE_RULES_UPSTREAM;
    a.opt.pv_dtype = SPARGE_INT8;
    codes(&a, SPARGE_INT8);
    near("95 scales of 4e-7", a.lse[0], 4.82600029e-3, 1e-11);
    near("v is not upstream's", a.o[0], 3.81e-5, 1e-10);
    codes(&a, SPARGE_INT12);
    near("nor is int12", a.lse[0], 4.8387e-3, 1e-8);
    a.opt.rules = SPARGE_RULES_PAPER;
    codes(&a, SPARGE_INT8);
    near("the paper's", a.lse[0], 4.83869971e-3, 1e-10);
}

/* ---- Smoothing -------------------------------------------------------------------------- */

Test(oracle, smoothing_takes_the_mean_from_the_keys)
{
    /* The mean is (1000, 5, 7), so k' is +-(127, 0.5, 0) and its scale 1. Row 1 reads 0.5 as 1. */
    const float q[] = {127, 0, 0, 0, 127, 0, 0, 0, 127};
    const float k[] = {1127, 5.5f, 7, 873, 4.5f, 7}, v[] = {1, 0};
    ask a = question(3, 2, 3, 1, q, k, v);
    a.opt.smooth_k = true;
    codes(&a, SPARGE_INT8);
    near("lse 0", a.lse[0], 127 * 127 + 127 * 1000, 1e-9);
    near("lse 1", a.lse[1], 127 * 1 + 127 * 5, 1e-12);
    near("lse 2", a.lse[2], 127 * 7 + 0.69314718055994531, 1e-12);
    near("o 1", a.o[1], 1, 1e-15);
    near("o 2", a.o[2], 0.5, 1e-15);
    a.opt.softmax_scale = 0.5f;
    codes(&a, SPARGE_INT8);
    near("scaled lse 1", a.lse[1], 63.5 + 63.5 * 5, 1e-12);
    a.opt.smooth_k = false;
    codes(&a, SPARGE_INT8); /* the scale is 1127 / 127, where 5.5 is one and 4.5 is one */
    near("not smoothed", a.lse[1], 63.5 * 1127 / 127 + 0.69314718055994531, 1e-4);
    a.opt.smooth_k = true;
    answer(&a, SPARGE_ORACLE_REAL);
    near("real", a.lse[1], 63.5 * 5.5, 1e-12);
}

Test(oracle, smoothing_forgives_a_shift_of_all_keys)
{
    const float q[] = {1, -2, 3, 0.5f}, k[] = {1, 2, -3, 0.25f, 2, -2.25f};
    const float shifted[] = {9, 34, 5, 32.25f, 10, 29.75f}, v[] = {1, 2, 4}; /* by (8, 32) */
    ask a = question(2, 3, 2, 1, q, k, v), b = question(2, 3, 2, 1, q, shifted, v);
    a.opt.smooth_k = b.opt.smooth_k = true;
    codes(&a, SPARGE_INT8);
    codes(&b, SPARGE_INT8);
    near("o 0", b.o[0], a.o[0], 0);
    near("o 1", b.o[1], a.o[1], 0);
    near("lse 0", b.lse[0], a.lse[0] + 8 - 64, 1e-12);
    near("lse 1", b.lse[1], a.lse[1] + 24 + 16, 1e-12);
}

/* lse of a row whose codes are 0 and whose q is 0.25, less log(keys): a quarter of the mean. */
static double mean_of(const float *k, int64_t k_len, int64_t block_k)
{
    const float q[] = {127, 0.25f};
    ask a = question(2, k_len, 1, 1, q, k, zeros);
    a.opt.block_k = block_k;
    a.opt.smooth_k = true;
    codes(&a, SPARGE_INT8);
    return 4 * (a.lse[1] - log((double)k_len));
}

Test(oracle, the_mean_is_summed_as_defined)
{
    const float falling[] = {0x1p24f, 1, 1, 0}, rising[] = {1, 1, 0x1p24f, 0}, third[] = {1, 0, 0};
    near("f32 within a block", mean_of(falling, 4, 4), 4194304, 0);
    near("in row order", mean_of(rising, 4, 4), 4194304.5, 0);
    near("f64 over the blocks", mean_of(falling, 4, 1), 4194304.5, 0);
    near("rounded to f32", mean_of(third, 3, 4), (double)0.333333343f, 1e-13);
}

Test(oracle, the_mean_is_taken_off_in_float)
{
    /* 2.5 less a mean of 1e-9 is 2.5 in float, and rounds to 3. */
    const float q[] = {0, 127}, k[] = {127, 2.5f, -127, -2.5f, 0, 3e-9f};
    ask a = question(1, 3, 2, 1, q, k, zeros);
    a.opt.smooth_k = true;
    codes(&a, SPARGE_INT8);
    near("lse", a.lse[0], 127 * 3, 1e-6);
}

Test(oracle, smoothing_makes_no_difference_to_real_scores)
{
    const float q[] = {1, -2, 3, 0.5f}, v[] = {1, 2, 4};
    const float k[] = {9.1f, 34.3f, 5.7f, 32.2f, 0.1f, 2.9f};
    ask a = question(2, 3, 2, 1, q, k, v), b = a;
    b.opt.smooth_k = true;
    answer(&a, SPARGE_ORACLE_REAL);
    codes(&b, SPARGE_F32);
    for (int r = 0; r < 2; r++) {
        near("o", b.o[r], a.o[r], 0);
        near("lse", b.lse[r], a.lse[r], 0);
    }
}

/* ---- What is not finite ----------------------------------------------------------------- */

static const float nonfinite[] = {NAN, INFINITY, -INFINITY};

Test(oracle, a_nonfinite_query_makes_nan_of_its_row)
{
    const float k[] = {127, 127, 0, 127}, v[] = {3, 3};
    for (int n = 0; n < 12; n++) { /* mode, smoothing, kind */
        const float q[] = {127, 0, nonfinite[n % 3], 1, 0, 0.5f};
        ask a = question(3, 2, 2, 1, q, k, v);
        a.opt.smooth_k = n / 6;
        a.opt.qk_dtype = SPARGE_INT8;
        answer(&a, n / 3 % 2 ? SPARGE_ORACLE_CODES : SPARGE_ORACLE_REAL);
        is_nan("o 1", a.o[1]);
        is_nan("lse 1", a.lse[1]);
        near("o 0", a.o[0], 3, 0);
        near("lse 0", a.lse[0], 127 * 127, 1e-9);
        near("o 2", a.o[2], 3, 0);
        near("lse 2", a.lse[2], (n / 3 % 2 && n < 6 ? 127 : 63.5) + 0.69314718055994531, 1e-12);
        is_nan("mass", a.mass[0]);
    }
}

Test(oracle, a_nonfinite_key_makes_nan_of_the_rows_that_see_it)
{
    const float q[] = {127, 0, 0, 127, 1, 1, 0, 1, 0, 1};
    for (int n = 0; n < 12; n++) {
        const float k[] = {127, 0.5f, 0, -2.5f, nonfinite[n % 3], 0, 2, 2, 2, 2};
        const bool coded = n / 3 % 2, smooth = n / 6;
        ask a = question(5, 5, 2, 1, q, k, powers);
        a.opt.causal = SPARGE_CAUSAL_START;
        a.opt.block_q = 1;
        a.opt.block_k = 3;
        a.opt.smooth_k = smooth;
        a.opt.qk_dtype = SPARGE_INT8;
        mask_on(&a);
        for (int r = 0; r < 5; r++)
            a.bits[r] = r == 3 ? 2 : 3; /* row 3 does not keep the block that holds key 2 */
        answer(&a, coded ? SPARGE_ORACLE_CODES : SPARGE_ORACLE_REAL);
        near("o 0", a.o[0], 1, 0);
        near("o 1", a.o[1], 1, 1e-15);
        near("o 3", a.o[3], 8, 0);
        if (!smooth) {
            near("lse 0", a.lse[0], 127 * 127, 0);
            near("lse 1", a.lse[1], coded ? 127 : 63.5, 1e-15);
        }
        near("lse 3", a.lse[3], 2, 0.1); /* smoothed, a scale is 0.19 */
        for (int r = 2; r < 5; r += 2) {
            is_nan("o", a.o[r]);
            is_nan("lse", a.lse[r]);
            is_nan("mass", a.mass[2 * r]);
        }
        near("mass of what row 2 may not see", a.mass[5], 0, 0);
        near("mass of what row 3 does not keep", a.mass[6], 0, 0);
        near("mass of row 3", a.mass[7], 1, 0);
    }
}

Test(oracle, a_nonfinite_value_makes_nan_of_its_channel)
{
    const float q[] = {1, 1, 1}, k[] = {1, -3000, 1};
    for (int n = 0; n < 9; n++) { /* real; int8; int12. Key 1 weighs less than a double can hold. */
        const float v[] = {127, 127, 0, nonfinite[n % 3], 127, 127};
        ask a = question(3, 3, 1, 2, q, k, v);
        a.opt.causal = SPARGE_CAUSAL_START;
        a.opt.pv_dtype = n < 6 ? SPARGE_INT8 : SPARGE_INT12;
        answer(&a, n < 3 ? SPARGE_ORACLE_REAL : SPARGE_ORACLE_CODES);
        near("row 0", a.o[1], 127, n < 6 ? 0 : 1e-4);
        for (int r = 1; r < 3; r++) {
            near("the other channel", a.o[2 * r], 127, n < 6 ? 1e-12 : 1e-4);
            is_nan("the channel", a.o[2 * r + 1]);
        }
        near("lse", a.lse[2], 1 + 0.69314718055994531, 1e-12);
    }
    const float v[] = {127, INFINITY, 0.5f}; /* the scale is that of the finite values */
    ask a = question(1, 3, 1, 1, zeros, zeros, v);
    a.opt.block_k = 3;
    a.opt.pv_dtype = SPARGE_INT8;
    a.p.v.token = 2; /* values 127 and 0.5; then with the nonfinite one between them */
    a.p.k_len = 2;
    answer(&a, SPARGE_ORACLE_CODES);
    near("without it", a.o[0], 64, 0);
    a.p.v.token = 1;
    a.p.k_len = 3;
    answer(&a, SPARGE_ORACLE_CODES);
    is_nan("with it", a.o[0]);
}

Test(oracle, the_mean_and_scales_pass_over_what_is_nonfinite)
{
    /* Four tokens make the mean, the nonfinite one as a 0: 4 / 4. Row 1 has codes 0 and 3 keys. */
    for (int n = 0; n < 3; n++) {
        const float q[] = {127, 0.25f}, k[] = {4, nonfinite[n], 0, 0};
        ask a = question(2, 4, 1, 1, q, k, powers);
        a.opt.smooth_k = true;
        a.opt.block_k = 1;
        mask_on(&a);
        a.bits[0] = 13;
        codes(&a, SPARGE_INT8);
        near("lse", a.lse[1], log(3) + 0.25, 1e-12);
    }
}

/* ---- The call --------------------------------------------------------------------------- */

Test(oracle, outputs_are_optional)
{
    const float q[] = {1, 2}, k[] = {3}, v[] = {5};
    ask a = question(2, 1, 1, 1, q, k, v);
    sparge_error error;
    cr_expect(sparge_oracle(&a.p, &a.opt, NULL, SPARGE_ORACLE_REAL, NULL, NULL, NULL, NULL) ==
              SPARGE_OK);
    cr_expect(sparge_oracle(&a.p, &a.opt, NULL, SPARGE_ORACLE_REAL, a.o, NULL, NULL, &error) ==
              SPARGE_OK);
    near("o", a.o[1], 5, 0);
    a.p.v.data = NULL; /* nobody asks for o, nobody reads v */
    a.opt.pv_dtype = SPARGE_INT8;
    cr_expect(sparge_oracle(&a.p, &a.opt, NULL, SPARGE_ORACLE_CODES, NULL, a.lse, a.mass, &error) ==
              SPARGE_OK);
    near("lse", a.lse[1], 6, 0);
    near("mass", a.mass[0], 1, 0);
}

static void is_refused(const sparge_problem *p, const sparge_options *opt, const sparge_mask *mask,
                       sparge_status want, const char *word)
{
    double o[8];
    sparge_error error = {""};
    cr_expect(sparge_oracle(p, opt, mask, SPARGE_ORACLE_REAL, o, NULL, NULL, NULL) == want);
    cr_expect(sparge_oracle(p, opt, mask, SPARGE_ORACLE_REAL, o, NULL, NULL, &error) == want);
    cr_expect(strstr(error.text, word), "\"%s\" says nothing of %s", error.text, word);
}

Test(oracle, what_is_wrong_is_refused_in_words)
{
    ask a = question(3, 5, 1, 1, zeros, zeros, zeros);
    a.opt.block_q = a.opt.block_k = 2;
    is_refused(NULL, &a.opt, NULL, SPARGE_ERR_ARGUMENT, "problem");
    is_refused(&a.p, NULL, NULL, SPARGE_ERR_ARGUMENT, "options");
    mask_on(&a);
    for (int n = 0; n < 5; n++) {
        sparge_mask mask = a.mask;
        int64_t *const size[] = {&mask.batch, &mask.heads, &mask.q_blocks, &mask.k_blocks,
                                 &mask.words};
        *size[n] -= 1;
        is_refused(&a.p, &a.opt, &mask, SPARGE_ERR_SHAPE, "mask");
    }
    a.p.heads = 3;
    a.p.kv_heads = 2; /* the front door's business */
    is_refused(&a.p, &a.opt, NULL, SPARGE_ERR_SHAPE, "heads");
}

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifndef __SANITIZE_ADDRESS__ /* which ends the program when asked for this much */
Test(oracle, too_little_memory_is_an_error)
{
    ask a = question(1, 1, 1, 1, zeros, zeros, zeros);
    a.p.k_len = (int64_t)1 << 45; /* 128 TiB of weights alone; the views repeat one token */
    a.p.k = a.p.v = (sparge_in){zeros, SPARGE_F32, 0, 0, 0};
    is_refused(&a.p, &a.opt, NULL, SPARGE_ERR_MEMORY, "memory");
}
#endif

typedef struct heard {
    int calls;
    double last;
} heard;

static bool hear(void *user, double done)
{
    heard *h = user;
    cr_expect(done > h->last, "%g after %g", done, h->last);
    h->last = done;
    h->calls++;
    return true;
}

Test(oracle, progress_is_told_per_query_block)
{
    ask a = question(5, 1, 1, 1, zeros, zeros, zeros);
    a.p.batch = 2;
    a.p.heads = 2;
    a.p.q.batch = a.p.q.head = a.p.k.batch = a.p.v.batch = 0;
    a.opt.block_q = 2;
    heard h = {0, 0};
    a.opt.progress = hear;
    a.opt.user = &h;
    answer(&a, SPARGE_ORACLE_REAL);
    cr_expect(h.calls == 12, "%d calls", h.calls);
    near("the last", h.last, 1, 0);
}
