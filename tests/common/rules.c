/* SPDX-License-Identifier: Apache-2.0 */
/* rules.c: truth tables for the rules in common/ that the backends apply in loops of their own:
 * what selects, quantizes, loads, stores and counts. */
#include <float.h>

#include "common/clock.h"
#include "common/counts.h"
#include "common/element.h"
#include "common/quant.h"
#include "common/select.h"
#include "common/softmax.h"
#include "common/thresholds.h"
#include "tests/support/check.h"

#define COUNT(table) (sizeof(table) / sizeof *(table))

/* ---- select.h ---------------------------------------------------------------------------- */

Test(rules, unit_factor_and_mean_cosine)
{
    check_equal(sparge_unit_factor(0.0f), 0.0f);
    check_equal(sparge_unit_factor(4.0f), 0.5f);
    check_equal(sparge_unit_factor(0x1p-140f), 0x1p70f);
    check_equal(sparge_unit_factor(6.0f), 0x1.a20bd6p-2f); /* two roundings */
    check_equal(sparge_unit_factor(INFINITY), 0.0f);
    check_equal(sparge_mean_cosine(0.0f, 5), 0.0f);
    check_equal(sparge_mean_cosine(16.0f, 4), 1.0f);
    check_equal(sparge_mean_cosine(4.0f, 4), 0.25f);
    check_equal(sparge_mean_cosine(16.000002f, 4), 1.0f); /* a sum that rounding made too long */
    check_equal(sparge_mean_cosine(1.0f, 1), 1.0f);
    check_equal(sparge_mean_cosine(2.0f, 3), 0x1.c71c72p-3f);
}

Test(rules, is_similar)
{
    static const struct {
        bool finite;
        float sim, theta;
        bool similar;
    } table[] = {
        {true, 0.7f, 0.6f, true},   {true, 0.6f, 0.6f, false}, {true, 0.5f, 0.6f, false},
        {false, 0.7f, 0.6f, false}, {true, 0.0f, -1.0f, true}, {false, 0.0f, -1.0f, false},
        {true, 1.0f, 1.0f, false},  {true, NAN, -1.0f, false}, {true, 0x1p-149f, 0.0f, true},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(sparge_is_similar(table[i].finite, table[i].sim, table[i].theta),
                    table[i].similar);
    }
}

Test(rules, pool_score)
{
    check_equal(sparge_pool_score(8.0f, 0.125f), 1.0f);
    check_equal(sparge_pool_score(-0.0f, 0.125f), 0.0f);
    check_equal(sparge_pool_score(-0x1p-149f, 0.125f), 0.0f);
    check_equal(sparge_pool_score(-8.0f, 0.125f), -1.0f);
    check_equal(sparge_pool_score(3e38f, 2.0f), INFINITY);
}

/* Upward, with the key of each; -0 is 0. */
Test(rules, order_key)
{
    static const struct {
        float x;
        uint32_t key;
    } table[] = {
        {-INFINITY, 0x007fffff},  {-FLT_MAX, 0x00800000}, {-1.0f, 0x407fffff},
        {-0x1p-149f, 0x7ffffffe}, {-0.0f, 0x80000000},    {0.0f, 0x80000000},
        {0x1p-149f, 0x80000001},  {1.0f, 0xbf800000},     {1.0000001f, 0xbf800001},
        {FLT_MAX, 0xff7fffff},    {INFINITY, 0xff800000},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(sparge_order_key(table[i].x), table[i].key);
    }
}

Test(rules, comes_before)
{
    cr_assert(sparge_comes_before(2.0f, 9, 1.0f, 3));
    cr_assert(!sparge_comes_before(1.0f, 3, 2.0f, 9));
    cr_assert(sparge_comes_before(1.0f, 3, 1.0f, 9));
    cr_assert(!sparge_comes_before(1.0f, 9, 1.0f, 3));
    cr_assert(!sparge_comes_before(1.0f, 3, 1.0f, 3));
    cr_assert(sparge_comes_before(-0.0f, 3, 0.0f, 9) && sparge_comes_before(0.0f, 3, -0.0f, 9));
}

Test(rules, mass)
{
    static const struct {
        float score, top;
        uint32_t mass;
    } table[] = {
        {3.0f, 3.0f, 1u << 30},
        {-3e38f, -3e38f, 1u << 30},
        {2.0f, 3.0f, 395007542}, /* 2^30 / e = 395007542.4, and 2^6 is an ulp */
        {0.0f, 0.69314718f, 1u << 29},
        {0.0f, 20.0f, 2}, /* 2.21: to the integer below */
        {0.0f, 21.0f, 0}, /* 0.81 */
        {0.0f, 1000.0f, 0},
        {-3e38f, 3e38f, 0},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        const int64_t got = sparge_mass(table[i].score, table[i].top), want = table[i].mass;
        cr_assert(got - want <= 64 && want - got <= (want < 1 << 24 || want == 1 << 30 ? 0 : 64),
                  "%lld, should be %lld", (long long)got, (long long)want);
    }
    check_equal(sparge_mass_limit(0.5f, 3), 1.5);
    check_equal(sparge_mass_limit(1.0f, (1ull << 53) - 1), 9007199254740991.0);
    check_equal(sparge_mass_limit(0.9f, 1u << 30), (double)0.9f * 0x1p30);
}

Test(rules, topk_count)
{
    static const struct {
        float topk;
        int64_t visible, count;
    } table[] = {
        {0.5f, 10, 5},
        {0.7f, 10, 7},
        {0.29f, 100, 29},
        {0.55f, 10, 5},
        {0.59f, 10, 5},
        {0.0f, 10, 1},
        {0.05f, 10, 1},
        {1.0f, 10, 10},
        {1.0f, 0, 1},
        {0.5f, 1, 1},
        {0.5f, 3, 1},
        {0.667f, 3, 2},
        {0.3f, 1000, 300},
        {1.0f, 1ll << 40, 1ll << 40},
        {0.99f, 100, 99},
        {0.1f, 1000000007, 100000002},
        /* in double */ {0.4999995f, 10, 5}, /* 4.999995: the addend reaches so far, */
        {0.499998f, 10, 4},                  /* and no farther */
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(sparge_topk_count(table[i].topk, table[i].visible), table[i].count);
    }
}

/* In double, and of the blocks that are given. */
Test(rules, min_mass_limit)
{
    check_equal(sparge_min_mass_limit(1.0f, 4, 4), 1.0);
    check_equal(sparge_min_mass_limit(1.5f, 4, 8), 0.75);
    check_equal(sparge_min_mass_limit(0.0f, 1u << 30, 3), 0.0);
    check_equal(sparge_min_mass_limit(0.1f, (1u << 30) + 1, 7), (double)0.1f * 1073741825.0 / 7.0);
    check_equal(sparge_min_mass_limit(0x1p-149f, 1, 1), 0x1p-149);
    check_equal(sparge_min_mass_limit(FLT_MAX, 1ull << 60, 1), (double)FLT_MAX * 0x1p60);
}

/* Held at 2^55: 256 products of two are finite. */
Test(rules, cell_mean)
{
    static const struct {
        float sum;
        int64_t rows;
        float mean;
    } table[] = {
        {6.0f, 3, 2.0f},
        {1.0f, 3, 0x1.555556p-2f},
        {5.0f, 49, 0x1.a1f58ep-4f}, /* a quotient, not a product */
        {-7.0f, 1, -7.0f},
        {0x1p-149f, 1, 0x1p-149f},
        {0x1p56f, 2, 0x1p55f},
        {0x1.fffffep55f, 2, 0x1.fffffep54f},
        {-0x1.fffffep55f, 2, -0x1.fffffep54f},
        {0x1.000002p55f, 1, 0x1p55f},
        {-0x1.000002p55f, 1, -0x1p55f},
        {FLT_MAX, 1024, 0x1p55f},
        {INFINITY, 1024, 0x1p55f},
        {-INFINITY, 8, -0x1p55f},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(sparge_cell_mean(table[i].sum, table[i].rows), table[i].mean);
    }
    check(sparge_finite(SPARGE_MAX_DIM * (0x1p55f * 0x1p55f)), "it overflows");
}

Test(rules, cell_scale)
{
    check_equal(sparge_cell_scale(1.0f), 0x1.715476p+0f);
    check_equal(sparge_cell_scale(0.125f), 0x1.715476p-3f);
    check_equal(sparge_cell_scale(FLT_MAX), FLT_MAX);
    check_equal(sparge_cell_scale(FLT_MAX / 2), 0x1.715474p+127f);
}

/* Codes of a row: 2^24 at the best cell, half at each unit below it, 0 from 2^-25 on. */
Test(rules, cell_codes)
{
    static const struct {
        float score, most, scale;
        int32_t code;
    } table[] = {
        {3.0f, 3.0f, 1.0f, 1 << 24}, {0x1p118f, 0x1p118f, FLT_MAX, 1 << 24},
        {2.0f, 3.0f, 1.0f, 1 << 23}, {2.0f, 3.0f, 2.0f, 1 << 22},
        {0.0f, 24.0f, 1.0f, 1},      {0.0f, 25.0f, 1.0f, 1},
        {0.0f, 26.0f, 1.0f, 0},      {-0x1p118f, 0x1p118f, FLT_MAX, 0},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(
            sparge_weight_code(table[i].score, table[i].most, table[i].scale, SPARGE_CELL_QMAX),
            table[i].code);
    }
}

Test(rules, cell_worth_and_mass)
{
    check_equal(sparge_cell_worth(8, 0), 0.0f);
    check_equal(sparge_cell_worth(1, 1 << 24), 0x1p-4f);
    check_equal(sparge_cell_worth(1024, 1 << 24), 64.0f);
    check_equal(sparge_cell_worth(3, 7), 0x1.b6db6ep+18f);
    check_equal(sparge_cell_worth(1, (1 << 24) + 1), 0x1.fffffep-5f); /* one rounding, the last */
    check_equal(sparge_cell_worth(1, 1ull << 50), 0x1p-30f);

    static const struct {
        int32_t codes;
        float worth;
        uint32_t mass;
    } table[] = {
        {0, 64.0f, 0},
        {1 << 24, 64.0f, 1 << 30}, /* one cell has all of 1024 queries */
        {1 << 30, 1.0f, 1 << 30},  /* and so have 64 together */
        {3, 0.4f, 1},              /* 1.2: to the integer below */
        {7, 0.25f, 1},
        {16777217, 1.0f, 16777216}, /* as a float */
        {1 << 24, 0x1p-25f, 0},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(sparge_cell_mass(table[i].codes, table[i].worth), table[i].mass);
    }
}

Test(rules, cell_share)
{
    check_equal(sparge_cell_share(0, 0), 0.0f);
    check_equal(sparge_cell_share(0, 5), 0.0f);
    check_equal(sparge_cell_share(1, 3), 0x1.555556p-2f);
    check_equal(sparge_cell_share(1u << 30, 1u << 30), 1.0f);
    check_equal(sparge_cell_share(3u << 30, 3ull << 32), 0.25f);
}

/* The masses of a row are for each query 2^20 together, less what is cut off. */
Test(rules, masses_of_a_row_of_cells)
{
    for (int n = 0; n < 1000; n++) {
        check_case("row %d", n);
        const int64_t blocks = check_int(1, 100), queries = check_int(1, SPARGE_MAX_BLOCK);
        const int64_t most = check_int(0, 1) ? 1 << 30 : 1 << 12;
        int32_t codes[100];
        int64_t total = 0, mass = 0;
        for (int64_t j = 0; j < blocks; j++)
            total += codes[j] = (int32_t)check_int(j ? 0 : 1, most);
        const float worth = sparge_cell_worth(queries, (uint64_t)total);
        for (int64_t j = 0; j < blocks; j++)
            mass += sparge_cell_mass(codes[j], worth);
        const int64_t all = queries * SPARGE_CELL_QUERY, rounded = all / (1 << 22) + 1;
        check(mass <= all + rounded && mass >= all - rounded - blocks, "%lld of %lld",
              (long long)mass, (long long)all);
    }
}

/* Every question, by the sentences of sparge_reason. */
Test(rules, forced)
{
    for (unsigned n = 0; n < 32; n++) {
        const bool q = n & 1, k = n & 2, finite = n & 4, diagonal = n & 8, sink = n & 16;
        unsigned why = 0;
        if (!q)
            why += SPARGE_KEPT_DISSIMILAR_Q;
        if (!k)
            why += SPARGE_KEPT_DISSIMILAR_K;
        if (k && !finite)
            why += SPARGE_KEPT_OVERFLOW;
        if (diagonal)
            why += SPARGE_KEPT_DIAGONAL;
        if (sink)
            why += SPARGE_KEPT_SINK;
        check_case("%u", n);
        check_equal(sparge_forced(q, k, finite, diagonal, sink), why);
    }
    check_equal(sparge_forced(true, true, true, false, false), 0);
    check_equal(sparge_forced(false, false, false, true, true), 4 + 8 + 32 + 64);
    check_equal(sparge_forced(true, true, false, false, false), 16);
}

/* ---- quant.h ----------------------------------------------------------------------------- */

Test(rules, quant_scale)
{
    check_equal(sparge_quant_scale(127.0f, 127), 1.0f);
    check_equal(sparge_quant_scale(1.0f, 127), 0x1.020408p-7f);
    check_equal(sparge_quant_scale(1.0f, 4095), 0x1.001002p-12f);
    check_equal(sparge_quant_scale(224.0f, SPARGE_E4M3_MAX), 0.5f);
    check_equal(sparge_quant_scale(9.0f, 127), 0x1.22448ap-4f); /* not by a reciprocal */
    check_equal(sparge_quant_scale(0.0f, 127), 0.0f);
    check_equal(sparge_quant_scale(127.0f * FLT_MIN, 127), FLT_MIN);
    check_equal(sparge_quant_scale(126.9999f * FLT_MIN, 127), 0.0f);
    check_equal(sparge_quant_scale(FLT_MIN, 127), 0.0f);
}

Test(rules, quant_code)
{
    static const struct {
        float x, scale;
        int qmax;
        int32_t code;
    } table[] = {
        {2.5f, 1.0f, 127, 3},        {-2.5f, 1.0f, 127, -3},        {2.4999998f, 1.0f, 127, 2},
        {3.0f, 2.0f, 127, 2},        {0.0f, 1.0f, 127, 0},          {-0.0f, 1.0f, 127, 0},
        {127.4f, 1.0f, 127, 127},    {127.6f, 1.0f, 127, 127},      {-127.6f, 1.0f, 127, -127},
        {5000.0f, 1.0f, 4095, 4095}, {-5000.0f, 1.0f, 4095, -4095}, {4094.6f, 1.0f, 4095, 4095},
        {3e38f, 0.0f, 127, 0},       {-3e38f, 0.0f, 127, 0},        {0.0f, 0.0f, 127, 0},
        {1.0f, 3.0f, 127, 0},        {1.6f, 3.0f, 127, 1},          {128.0f, 1.0f, 2047, 128},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(sparge_quant_code(table[i].x, table[i].scale, table[i].qmax), table[i].code);
    }
    check_equal(sparge_quant_ratio(3.0f, 2.0f), 1.5f);
    check_equal(sparge_quant_ratio(-1.0f, 3.0f), -0x1.555556p-2f); /* a quotient, not a product */
    check_equal(sparge_quant_ratio(5.0f, 49.0f), 0x1.a1f58ep-4f);
    check_equal(sparge_quant_ratio(3.0f, 0.0f), 0.0f);
}

/* One rounding after each product, from the left. */
Test(rules, score_scale)
{
    check_equal(sparge_score_scale(1.0f, 1.0f, 1.0f), 0x1.715476p+0f);
    check_equal(sparge_score_scale(0.5f, 4.0f, 0.125f), 0x1.715476p-2f);
    check_equal(sparge_score_scale(0.9f, 0.7f, 0.088388f), 0x1.490e0ep-4f);
    check_equal(sparge_score_scale(0x1p-100f, 0x1p-100f, 0x1p100f), 0.0f);
}

/* P of 1 is exact in e4m3, and the least P that is not 0 is just above 2^-18. */
Test(rules, p_fp8_scale)
{
    check_equal(sparge_e4m3_to_f32(sparge_f32_to_e4m3(SPARGE_P_FP8_SCALE)), SPARGE_P_FP8_SCALE);
    check_equal(sparge_f32_to_e4m3(SPARGE_P_FP8_SCALE * 0x1.00001p-18f), 1);
    check_equal(sparge_f32_to_e4m3(SPARGE_P_FP8_SCALE * 0x1p-18f), 0);
}

Test(rules, value_is_finite)
{
    static const struct {
        float v;
        bool f16, others;
    } table[] = {
        {0.0f, true, true},      {65504.0f, true, true},   {65519.996f, true, true},
        {65520.0f, false, true}, {-65520.0f, false, true}, {-65519.996f, true, true},
        {FLT_MAX, false, true},  {INFINITY, false, false}, {-INFINITY, false, false},
        {NAN, false, false},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(sparge_value_is_finite(table[i].v, SPARGE_F16), table[i].f16);
        check_equal(sparge_finite(sparge_f16_to_f32(sparge_f32_to_f16(table[i].v))), table[i].f16);
        check_equal(sparge_value_is_finite(table[i].v, SPARGE_FP8), table[i].others);
        check_equal(sparge_value_is_finite(table[i].v, SPARGE_INT8), table[i].others);
    }
}

/* ---- element.h --------------------------------------------------------------------------- */

Test(rules, elements)
{
    check_equal(sparge_element_size(SPARGE_F32), 4);
    check_equal(sparge_element_size(SPARGE_F16), 2);
    check_equal(sparge_element_size(SPARGE_BF16), 2);

    const float f32[] = {0.0f, 1.5f}, f32_after[] = {1.1f, 0.0f};
    const uint16_t halves[] = {0, 0x3e00}; /* 1.5 in binary16, 0.125 + in bfloat16 */
    const uint16_t f16_after[] = {0x3c66, 0}, bf16_after[] = {0x3f8d, 0};
    check_equal(sparge_element_load(f32, SPARGE_F32, 1), 1.5f);
    check_equal(sparge_element_load(halves, SPARGE_F16, 1), 1.5f);
    check_equal(sparge_element_load(halves, SPARGE_BF16, 1), 0.125f);
    check_equal(sparge_widen(0x3e00, SPARGE_F16), 1.5f);
    check_equal(sparge_widen(0x3e00, SPARGE_BF16), 0.125f);
    check_equal(sparge_narrow(1.1f, SPARGE_F16), 0x3c66);
    check_equal(sparge_narrow(1.1f, SPARGE_BF16), 0x3f8d);

    const sparge_dtype dtype[] = {SPARGE_F32, SPARGE_F16, SPARGE_BF16};
    const void *const after[] = {f32_after, f16_after, bf16_after};
    for (int n = 0; n < 3; n++) {
        void *to = check_alloc(2 * (size_t)sparge_element_size(dtype[n]));
        sparge_element_store(to, dtype[n], 0, 1.1f);
        sparge_element_store(to, dtype[n], 1, -0.0f);
        cr_assert_arr_eq(to, after[n], 2 * (size_t)sparge_element_size(dtype[n]), "%d", n);
        check_free(to);
    }
    const sparge_in in = {NULL, SPARGE_F16, 1000, 100, 10};
    const sparge_out out = {NULL, SPARGE_F16, 1000, 100, 10};
    check_equal(sparge_in_row(&in, 3, 2, 7), 3270);
    check_equal(sparge_out_row(&out, 3, 2, 7), 3270);
}

/* ---- counts.h ---------------------------------------------------------------------------- */

/* 200 queries in blocks of 128 and 72. */
Test(rules, tally)
{
    const sparge_geometry g = sparge_geometry_make(200, 64, 128, 64, SPARGE_CAUSAL_NONE);
    sparge_tally t = sparge_tally_zero(), more = sparge_tally_zero();
    for (int n = 0; n < SPARGE_TALLY_WORDS; n++)
        check_equal(((const int64_t *)(const void *)&t)[n], 0);
    sparge_tally_rows(&t, &g, 0, 64, 1001, 1000, true);
    sparge_tally_rows(&t, &g, 0, 64, 502, 500, false);
    sparge_tally_rows(&t, &g, 1, 64, 34, 30, true);
    sparge_tally_rows(&t, &g, 1, 8, 10, 2, false);
    check_equal(t.tile_tokens, 1547);
    check_equal(t.qk_tokens, 1532);
    check_equal(t.pv_tokens, 1030);
    check_equal(t.pv_rows[0], 64);
    check_equal(t.pv_rows[1], 64);
    check_equal(t.qk_done + t.pairs + t.tokens, 0);
    more = (sparge_tally){1, 20, 3, 500, 400, 50, {6, 7}};
    sparge_tally_add(&more, &t);
    sparge_tally_add(&more, &more);
    const sparge_tally sum = {2, 40, 6, 4094, 3864, 2160, {140, 142}};
    cr_assert_arr_eq(&more, &sum, sizeof sum);

    const sparge_counts c = sparge_tally_counts(&more, &g);
    check_equal(c.pairs, 2);
    check_equal(c.tokens, 40);
    check_equal(c.qk_done, 6);
    check_equal(c.tile_tokens, 4094);
    check_equal(c.qk_tokens, 3864);
    check_equal(c.pv_tokens, 2160);
    check_equal(c.pv_done, 140.0 / 128.0 + 142.0 / 72.0);
    const sparge_geometry whole = sparge_geometry_make(256, 64, 128, 64, SPARGE_CAUSAL_NONE);
    sparge_tally_rows(&t, &whole, 1, 8, 2, 2, true); /* its last block is not short */
    check_equal(t.pv_rows[0], 72);
    check_equal(sparge_tally_counts(&(sparge_tally){.pv_rows = {96, 0}}, &whole).pv_done, 0.75);

    sparge_counts total = {1, 2, 0.5, 4, 7, 5, 6};
    sparge_counts_add(&total, &(sparge_counts){10, 20, 0.25, 40, 70, 50, 60});
    check_equal(total.pairs, 11);
    check_equal(total.qk_done, 22);
    check_equal(total.pv_done, 0.75);
    check_equal(total.tokens, 44);
    check_equal(total.tile_tokens, 77);
    check_equal(total.qk_tokens, 55);
    check_equal(total.pv_tokens, 66);
}

/* ---- thresholds.h, clock.h --------------------------------------------------------------- */

Test(rules, thresholds)
{
    const sparge_thresholds two[] = {{.theta = 0.1f}, {.theta = 0.2f}};
    sparge_options o = {.thresholds = {.theta = 0.3f}};
    cr_assert_eq(sparge_thresholds_of(&o, 1), &o.thresholds);
    o.per_head = two;
    cr_assert_eq(sparge_thresholds_of(&o, 0), &two[0]);
    cr_assert_eq(sparge_thresholds_of(&o, 1), &two[1]);
}

Test(rules, clock)
{
    const double start = sparge_seconds();
    double now = start;
    while (now - start < 0.01) {
        const double next = sparge_seconds();
        cr_assert(next >= now);
        now = next;
    }
}
