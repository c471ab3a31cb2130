/* SPDX-License-Identifier: Apache-2.0 */
/* common.c: truth tables for common/. Every backend shares these headers, so that a comparison of
 * backends cannot see a mistake in them: here are literal inputs and literal outputs, or the
 * definition written again in another way. */
#include <float.h>
#include <stdlib.h>

#include "common/block_mask.h"
#include "common/geometry.h"
#include "common/half.h"
#include "common/softmax.h"
#include "tests/support/check.h"

#define COUNT(table) (sizeof(table) / sizeof *(table))

/* How many floats a sweep steps over: it visits all of them when SPARGE_EXHAUSTIVE is set, few
 * under the sanitizers. */
static uint32_t stride(uint32_t usual)
{
#ifdef SPARGE_SANITIZED
    usual = usual * 64 + 1009;
#endif
    return getenv("SPARGE_EXHAUSTIVE") ? 1 : usual;
}

static uint64_t fnv1a(uint64_t hash, uint64_t word) { return (hash ^ word) * 0x100000001b3u; }

/* ---- check.h: what the tests themselves stand on ---------------------------------------- */

Test(check, guards_fire)
{
    for (size_t bytes = 0; bytes < 70; bytes++) {
        uint8_t *buffer = (uint8_t *)check_alloc(bytes);
        for (size_t i = 0; i < bytes; i++)
            check_equal(buffer[i], 0xFF);
        cr_assert_null(check_guards(buffer));
        const ptrdiff_t outside[] = {-1, -256, (ptrdiff_t)bytes, (ptrdiff_t)bytes + 255};
        for (size_t i = 0; i < COUNT(outside); i++) {
            buffer[outside[i]] ^= 1;
            cr_assert_not_null(check_guards(buffer), "a write at %td of %zu", outside[i], bytes);
            buffer[outside[i]] ^= 1;
        }
        check_free(buffer);
    }
}

Test(check, guards_are_nans)
{
    float *buffer = (float *)check_alloc(4);
    cr_assert_null(check_guards(buffer));
    cr_assert(isnan(buffer[-1]) && isnan(buffer[0]) && isnan(buffer[1]));
    const uint16_t *halves = (const uint16_t *)(const void *)buffer;
    cr_assert(isnan(sparge_f16_to_f32(halves[-1])) && isnan(sparge_bf16_to_f32(halves[2])));
    check_free(buffer);
}

Test(check, comparisons)
{
    cr_assert_null(check_distance(1.0, 1.5, 0.5));
    cr_assert_null(check_distance(-INFINITY, -INFINITY, 0.0));
    cr_assert_not_null(check_distance(1.0, 1.5, 0.25));
    cr_assert_not_null(check_distance(INFINITY, -INFINITY, 1.0));
    cr_assert_not_null(check_distance(INFINITY, 1.0, 1.0));
    cr_assert_not_null(check_distance(NAN, NAN, INFINITY));
    cr_assert_not_null(check_distance(1.0, NAN, INFINITY));
    cr_assert_not_null(check_distance(NAN, 1.0, INFINITY));
    cr_assert_not_null(check_distance(1.0, 1.5, NAN));
    const float zeros[] = {1.0f, 0.0f, NAN}, others[] = {1.0f, -0.0f, NAN};
    const int8_t codes[] = {3, -127}, more[] = {3, 127};
    check_same(zeros, zeros, 3);
    cr_assert_str_eq(check_difference(zeros, others, 3, 4, true),
                     "[1] of 3 is 0 (0x0p+0), should be -0 (-0x0p+0)");
    cr_assert_str_eq(check_difference(codes, more, 2, 1, false),
                     "[1] of 2 is -127 (0x81), should be 127 (0x7f)");
    cr_assert_null(check_difference(zeros, others, 1, 4, true));
    cr_assert_null(check_difference(zeros, NULL, 0, 4, true));
}

Test(check, draws)
{
    uint64_t first[8];
    check_case("case %d", 1);
    for (size_t i = 0; i < 8; i++)
        first[i] = check_random();
    check_case("case %d", 2);
    cr_assert_neq(check_random(), first[0]);
    check_case("case %d", 1);
    for (size_t i = 0; i < 8; i++)
        check_equal(check_random(), first[i]);

    double sum = 0.0, squares = 0.0;
    bool low = false, high = false;
    for (int i = 0; i < 100000; i++) {
        const double x = (double)check_normal();
        sum += x;
        squares += x * x;
        const float u = check_uniform(-1.0f, 3.0f);
        cr_assert(u >= -1.0f && u <= 3.0f);
        const int64_t n = check_int(-2, 2);
        cr_assert(n >= -2 && n <= 2);
        low |= n == -2;
        high |= n == 2;
    }
    check_close(sum / 100000, 0.0, 0.02);
    check_close(squares / 100000, 1.0, 0.03);
    cr_assert(low && high);
}

/* ---- num.h ------------------------------------------------------------------------------ */

Test(common, integers)
{
    static const struct {
        int64_t a, b, quotient;
    } ceil_div[] = {
        {0, 1, 0},
        {0, 64, 0},
        {1, 64, 1},
        {63, 64, 1},
        {64, 64, 1},
        {65, 64, 2},
        {7, 1, 7},
        {16, 8, 2},
        {17, 8, 3},
        {127, 128, 1},
        {1048577, 64, 16385},
        {3000000001, 64, 46875001},
        {INT64_MAX, 1, INT64_MAX},
        {INT64_MAX, 64, 144115188075855872},
    };
    for (size_t i = 0; i < COUNT(ceil_div); i++) {
        check_case("%lld / %lld", (long long)ceil_div[i].a, (long long)ceil_div[i].b);
        check_equal(sparge_ceil_div(ceil_div[i].a, ceil_div[i].b), ceil_div[i].quotient);
    }
    check_equal(sparge_min(-1, 3000000000), -1);
    check_equal(sparge_min(3000000001, 3000000000), 3000000000);
    check_equal(sparge_max(-1, 3000000000), 3000000000);
    check_equal(sparge_max(3000000001, 3000000000), 3000000001);
}

Test(common, mean)
{
    check_equal(sparge_mean(6.0, 4), 1.5f);
    check_equal(sparge_mean(1.0, 3), 0x1.555556p-2f);
    check_equal(sparge_mean(0.0, 0), 0.0f);
    check_equal(sparge_mean(NAN, 0), 0.0f);
    check_equal(sparge_mean(3.0 + 0x1p-30, 1), 3.0f);
    check_equal(sparge_mean(0x1p130, 8), 0x1p127f); /* not in f32 before the division */
}

Test(common, float_bits)
{
    static const struct {
        float x;
        uint32_t bits;
        bool finite;
    } table[] = {
        {0.0f, 0x00000000, true},      {-0.0f, 0x80000000, true},
        {1.0f, 0x3f800000, true},      {-2.0f, 0xc0000000, true},
        {0x1p-149f, 0x00000001, true}, {FLT_MIN, 0x00800000, true},
        {FLT_MAX, 0x7f7fffff, true},   {-FLT_MAX, 0xff7fffff, true},
        {INFINITY, 0x7f800000, false}, {-INFINITY, 0xff800000, false},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_equal(sparge_float_bits(table[i].x), table[i].bits);
        check_equal(sparge_bits_float(table[i].bits), table[i].x);
        check_equal(sparge_finite(table[i].x), table[i].finite);
    }
    static const uint32_t nans[] = {0x7fc00000, 0xffc00000, 0x7f800001, 0xff800001, 0x7fffffff};
    for (size_t i = 0; i < COUNT(nans); i++) {
        cr_assert(isnan(sparge_bits_float(nans[i])));
        check_equal(sparge_finite(sparge_bits_float(nans[i])), false);
    }
}

static void round_near(float center)
{
    for (float x = center, y = center, n = 0; n <= 4; n++) {
        check_equal(sparge_round(x), (int32_t)roundf(x));
        check_equal(sparge_round(-x), (int32_t)roundf(-x));
        check_equal(sparge_round(y), (int32_t)roundf(y));
        check_equal(sparge_round(-y), (int32_t)roundf(-y));
        x = nextafterf(x, INFINITY);
        y = nextafterf(y, -INFINITY);
    }
}

Test(common, round_half_away)
{
    static const struct {
        float x;
        int32_t n;
    } table[] = {
        {0.0f, 0},
        {-0.0f, 0},
        {0.49999997f, 0},
        {-0.49999997f, 0},
        {0.5f, 1},
        {-0.5f, -1},
        {0.50000006f, 1},
        {1.4999999f, 1},
        {1.5f, 2},
        {2.5f, 3},
        {-2.5f, -3},
        {2.4999998f, 2},
        {126.49999f, 126},
        {126.5f, 127},
        {-126.5f, -127},
        {2046.4999f, 2046},
        {2046.5f, 2047},
        {4194303.5f, 4194304},
        {-4194303.5f, -4194304},
        {FLT_MIN, 0},
    };
    for (size_t i = 0; i < COUNT(table); i++)
        check_equal(sparge_round(table[i].x), table[i].n);
    for (int n = 0; n <= 4096; n++) {
        check_case("around %d and %d.5", n, n);
        round_near((float)n);
        round_near((float)n + 0.5f);
    }
    check_case("random floats below 2^22");
    for (int i = 0; i < 1000000; i++) {
        const float x = sparge_bits_float((uint32_t)(check_random() % 0x4a800000));
        const float y = -check_uniform(0.0f, 4194304.0f);
        if (sparge_round(x) != (int32_t)roundf(x) || sparge_round(y) != (int32_t)roundf(y))
            cr_assert_fail("round(%a) is %d, round(%a) is %d", (double)x, sparge_round(x),
                           (double)y, sparge_round(y));
    }
}

/* ---- exp2 ------------------------------------------------------------------------------- */

/* The bits, which are not always the nearest float's: -1/2 and -3/2 stand on two sides of a tie. */
Test(common, exp2_values)
{
    static const struct {
        float x, y;
    } table[] = {
        {0.0f, 1.0f},
        {-0.0f, 1.0f},
        {-FLT_MIN, 1.0f},
        {-0x1p-149f, 1.0f},
        {-0x1p-26f, 1.0f},
        {-1.0f, 0.5f},
        {-2.0f, 0.25f},
        {-10.0f, 0x1p-10f},
        {-0.5f, 0x1.6a09e8p-1f},
        {-1.5f, 0x1.6a09e6p-2f},
        {-2.5f, 0x1.6a09e8p-3f},
        {-0.25f, 0x1.ae89fap-1f},
        {-100.25f, 0x1.ae89fap-101f},
        {-126.0f, 0x1p-126f},
        {-0x1.f80002p6f, 0.0f},
        {-127.0f, 0.0f},
        {-149.0f, 0.0f},
        {-150.0f, 0.0f},
        {-1e30f, 0.0f},
        {-FLT_MAX, 0.0f},
        {-INFINITY, 0.0f},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("2^%a", (double)table[i].x);
        check_equal(sparge_exp2(table[i].x), table[i].y);
    }
    for (int n = 0; n <= 126; n++)
        check_equal(sparge_exp2((float)-n), ldexpf(1.0f, -n));
    cr_assert(isnan(sparge_exp2(NAN)) && isnan(sparge_exp2(-NAN)));
}

/* Every step-th float from `first` downward to `last`, against libm in double; returns a hash of
 * the results. Measured over all floats of [-126, 0]: worst error 0.951575 ulp, at -0.496009678;
 * never above 1; not monotone, since 83025 floats give 1 ulp more than their upper neighbour. */
static uint64_t exp2_sweep(float first, float last, uint32_t step)
{
    double worst = 0.0;
    float worst_x = first, before = 1.0f;
    uint32_t rises = 0;
    uint64_t hash = 0xcbf29ce484222325u;
    const uint32_t end = sparge_float_bits(last);
    for (uint32_t bits = sparge_float_bits(first); bits <= end; bits += step) {
        const float x = sparge_bits_float(bits), y = sparge_exp2(x);
        const double exact = exp2((double)x);
        uint64_t ulp_bits;
        double ulp;
        memcpy(&ulp_bits, &exact, sizeof exact);
        ulp_bits = (ulp_bits & 0x7ff0000000000000u) - (23ull << 52);
        memcpy(&ulp, &ulp_bits, sizeof ulp);
        const double error = fabs((double)y - exact) / ulp;
        if (!(error <= 0.9516))
            cr_assert_fail("2^%a is off by %g ulp", (double)x, error);
        if (error > worst) {
            worst = error;
            worst_x = x;
        }
        const uint32_t up = sparge_float_bits(y) - sparge_float_bits(before);
        if (y > before && (++rises, up > 1))
            cr_assert_fail("2^x rises by %u ulp downward to %a", up, (double)x);
        before = y;
        hash = fnv1a(hash, sparge_float_bits(y));
    }
    cr_log_info("exp2 from %g to %g by %u: worst %.6f ulp at %a (%.9g), %u rises of 1 ulp",
                (double)first, (double)last, step, worst, (double)worst_x, (double)worst_x, rises);
    return hash;
}

/* 2^x is 2^f times a power of two, f = x - n exactly, n the nearest integer. Each f that a float
 * below -1.5 leads to is also that of a float in [-1.5, -0.5], for the floats there lie closer, and
 * the power of two changes no bit of the mantissa: below -1.5 a sample checks the exponent. Above
 * -2^-13 the floats lie 1000 and more to an ulp of the result, above -2^-26 all give 1: a sample
 * again. The rest is checked float by float, in two processes. SPARGE_EXHAUSTIVE=1 checks every
 * float there is (1.1e9). The hashes pin every bit: they are the same from each compiler at each
 * level, contraction on or off. */
Test(common, exp2_every_float_to_2_6)
{
    const uint64_t hash = exp2_sweep(-0x1p-6f, -1.5f, stride(1));
    if (stride(1) == 1)
        check_equal(hash, 0x14c86a40bcd45a36u);
}

Test(common, exp2_every_float_to_2_13)
{
    const uint64_t hash = exp2_sweep(-0x1p-13f, -0x1p-6f, stride(1));
    if (stride(1) == 1)
        check_equal(hash, 0x3940a4df674bd2a2u);
}

Test(common, exp2_sample_above) { exp2_sweep(-0.0f, -0x1p-13f, stride(331)); }
Test(common, exp2_sample_below) { exp2_sweep(-1.5f, -126.0f, stride(13)); }

Test(common, exp2_underflow)
{
    const uint32_t step = stride(101), end = sparge_float_bits(-INFINITY);
    for (uint32_t bits = sparge_float_bits(-0x1.f80002p6f); bits <= end; bits += step)
        if (sparge_float_bits(sparge_exp2(sparge_bits_float(bits))) != 0)
            cr_assert_fail("2^%a is not 0", (double)sparge_bits_float(bits));
}

/* A hash of a sample of the whole domain, for the builds where the sweeps have to skip. */
Test(common, exp2_bits)
{
    uint64_t hash = 0xcbf29ce484222325u;
    const uint32_t end = sparge_float_bits(-150.0f);
    for (uint32_t bits = 0x80000000u; bits <= end; bits += 9973)
        hash = fnv1a(hash, sparge_float_bits(sparge_exp2(sparge_bits_float(bits))));
    check_equal(hash, 0xf506d8595416ac32u);
}

/* ---- dot -------------------------------------------------------------------------------- */

/* 2^24 in channel 0 and ones elsewhere, all times one. A single 1 added to 2^24 is lost, two
 * together are not, so that each line tells one order of addition from another. */
Test(common, dot_order)
{
    static const struct {
        int64_t n;
        int at[4];
        float sum;
    } table[] = {
        {16, {8}, 0x1p24f},            /* 8 + 8: straight onto the 2^24 */
        {16, {4, 12}, 0x1.000002p24f}, /* 8 + 8: first together */
        {16, {2, 10}, 0x1.000002p24f},
        {16, {1, 9}, 0x1.000002p24f},
        {16, {2, 6}, 0x1.000002p24f}, /* 4 + 4 */
        {16, {1, 5}, 0x1.000002p24f},
        {16, {1, 3}, 0x1.000002p24f}, /* 2 + 2 */
        {16, {8, 4, 2, 1}, 0x1p24f},  /* one at each level */
        {16, {1, 2}, 0x1p24f},        /* neighbours never meet early */
        {16, {8, 9}, 0x1p24f},
        {32, {16}, 0x1p24f},           /* channel 16 goes to partial 0 */
        {32, {1, 17}, 0x1.000002p24f}, /* and 17 to partial 1 */
        {32, {8, 24}, 0x1.000002p24f},
        {32, {16, 8}, 0x1p24f},
        {19, {16}, 0x1p24f}, /* also in a tail */
        {19, {2, 18}, 0x1.000002p24f},
        {7, {2, 6}, 0x1.000002p24f},
        {48, {15, 31, 47, 7}, 0x1.000004p24f},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        const size_t bytes = (size_t)table[i].n * sizeof(float);
        float *a = (float *)check_alloc(bytes), *b = (float *)check_alloc(bytes);
        for (int64_t c = 0; c < table[i].n; c++) {
            a[c] = c == 0 ? 0x1p24f : 0.0f;
            b[c] = 1.0f;
        }
        for (size_t k = 0; k < 4 && table[i].at[k]; k++)
            a[table[i].at[k]] = 1.0f;
        check_equal(sparge_dot(a, b, table[i].n), table[i].sum);
        check_equal(sparge_dot(b, a, table[i].n), table[i].sum);
        check_free(a);
        check_free(b);
    }
}

Test(common, dot_fused)
{
    /* (1 + 2^-12)^2 - 1: the last bit of the square survives only in a fused multiply-add. */
    float a[17] = {[0] = -1.0f, [16] = 0x1.001p0f}, b[17] = {[0] = 1.0f, [16] = 0x1.001p0f};
    check_equal(sparge_dot(a, b, 17), 0x1.0008p-11f);
    check_equal(sparge_dot(a, b, 0), 0.0f);
    a[3] = NAN;
    check_equal(sparge_dot(a, b, 3), -1.0f);
    cr_assert(isnan(sparge_dot(a, b, 4)));
}

/* The definition once more, for every length: 16 partials by c mod 16, then the tree. */
Test(common, dot_every_length)
{
    for (int64_t n = 0; n <= 260; n++) {
        check_case("%lld channels", (long long)n);
        float *a = (float *)check_alloc((size_t)n * sizeof *a),
              *b = (float *)check_alloc((size_t)n * sizeof *b);
        float p[16] = {0};
        for (int64_t c = 0; c < n; c++) {
            a[c] = check_normal();
            b[c] = check_normal();
            p[c % 16] = fmaf(a[c], b[c], p[c % 16]);
        }
        const float even = ((p[0] + p[8]) + (p[4] + p[12])) + ((p[2] + p[10]) + (p[6] + p[14]));
        const float odd = ((p[1] + p[9]) + (p[5] + p[13])) + ((p[3] + p[11]) + (p[7] + p[15]));
        check_equal(sparge_dot(a, b, n), even + odd);
        check_free(a);
        check_free(b);
    }
}

/* ---- geometry.h ------------------------------------------------------------------------- */

enum { NONE = SPARGE_CAUSAL_NONE, END = SPARGE_CAUSAL_END, START = SPARGE_CAUSAL_START };

Test(common, blocks)
{
    static const struct {
        int64_t q_len, k_len, block_q, block_k, q_blocks, k_blocks, last_q_rows, last_k_rows;
    } table[] = {
        {256, 128, 128, 64, 2, 2, 128, 64},
        {300, 200, 128, 64, 3, 4, 44, 8},
        {257, 129, 128, 64, 3, 3, 1, 1},
        {255, 127, 128, 64, 2, 2, 127, 63},
        {5, 3, 128, 64, 1, 1, 5, 3},
        {20, 20, 16, 8, 2, 3, 4, 4},
        {3, 3, 1, 1, 3, 3, 1, 1},
        {100, 100, 64, 128, 2, 1, 36, 100},
        {1048576, 1048576, 128, 64, 8192, 16384, 128, 64},
        {3000000001, 3000000007, 128, 64, 23437501, 46875001, 1, 7},
        {1099511627776, 1099511627777, 16, 8, 68719476736, 137438953473, 16, 1},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        const sparge_geometry g = sparge_geometry_make(
            table[i].q_len, table[i].k_len, table[i].block_q, table[i].block_k, SPARGE_CAUSAL_NONE);
        check_equal(g.q_len, table[i].q_len);
        check_equal(g.k_len, table[i].k_len);
        check_equal(g.block_q, table[i].block_q);
        check_equal(g.block_k, table[i].block_k);
        check_equal(g.q_blocks, table[i].q_blocks);
        check_equal(g.k_blocks, table[i].k_blocks);
        check_equal(sparge_block_rows(g.q_len, g.block_q, g.q_blocks - 1), table[i].last_q_rows);
        check_equal(sparge_block_rows(g.k_len, g.block_k, g.k_blocks - 1), table[i].last_k_rows);
        if (g.q_blocks > 1)
            check_equal(sparge_block_rows(g.q_len, g.block_q, 0), g.block_q);
    }
    for (int causal = NONE; causal <= START; causal++) {
        check_equal(sparge_geometry_make(0, 100, 128, 64, (sparge_causal)causal).q_blocks, 0);
        check_equal(sparge_geometry_make(0, 100, 128, 64, (sparge_causal)causal).k_blocks, 2);
        check_equal(sparge_geometry_make(100, 0, 128, 64, (sparge_causal)causal).q_blocks, 1);
        check_equal(sparge_geometry_make(100, 0, 128, 64, (sparge_causal)causal).k_blocks, 0);
    }
}

/* Blocks of 128 x 64 tokens: the last key that query t sees, and how many keys of block j. */
Test(common, keys_visible)
{
    static const struct {
        int64_t q_len, k_len;
        int causal;
        int64_t t, last, j, seen;
    } table[] = {
        {300, 200, NONE, 0, 199, 0, 64},
        {300, 200, NONE, 0, 199, 3, 8},
        {300, 200, NONE, 299, 199, 3, 8},
        {1, 300, NONE, 0, 299, 4, 44},
        {200, 200, END, 0, 0, 0, 1},
        {200, 200, END, 0, 0, 1, 0},
        {200, 200, END, 63, 63, 0, 64},
        {200, 200, END, 64, 64, 1, 1},
        {200, 200, END, 199, 199, 3, 8},
        {200, 200, START, 199, 199, 3, 8},
        {200, 200, START, 64, 64, 1, 1},
        {200, 200, START, 63, 63, 1, 0},
        {200, 300, END, 0, 100, 1, 37},
        {200, 300, END, 0, 100, 0, 64},
        {200, 300, END, 0, 100, 2, 0},
        {200, 300, END, 199, 299, 4, 44},
        {200, 300, END, 198, 298, 4, 43},
        {1, 300, END, 0, 299, 4, 44},
        {200, 300, START, 0, 0, 0, 1},
        {200, 300, START, 199, 199, 3, 8},
        {200, 300, START, 199, 199, 4, 0},
        {300, 200, END, 0, -100, 0, 0},
        {300, 200, END, 99, -1, 0, 0},
        {300, 200, END, 100, 0, 0, 1},
        {300, 200, END, 163, 63, 0, 64},
        {300, 200, END, 163, 63, 1, 0},
        {300, 200, END, 299, 199, 3, 8},
        {300, 200, START, 0, 0, 0, 1},
        {300, 200, START, 199, 199, 3, 8},
        {300, 200, START, 200, 199, 3, 8},
        {300, 200, START, 299, 199, 3, 8},
        {1048576, 1048576, END, 1048575, 1048575, 16383, 64},
        {1048576, 1048576, END, 1000000, 1000000, 15625, 1},
        {3000000001, 3000000001, END, 3000000000, 3000000000, 46875000, 1},
        {3000000001, 3000000001, NONE, 0, 3000000000, 46875000, 1},
        {1, 1099511627776, END, 0, 1099511627775, 17179869183, 64},
        {1099511627776, 64, END, 1099511627775, 63, 0, 64},
        {1099511627776, 64, END, 0, -1099511627712, 0, 0},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        const sparge_geometry g = sparge_geometry_make(table[i].q_len, table[i].k_len, 128, 64,
                                                       (sparge_causal)table[i].causal);
        check_equal(sparge_last_key(&g, table[i].t), table[i].last);
        check_equal(sparge_keys_of_query(&g, table[i].t), sparge_max(0, table[i].last + 1));
        check_equal(sparge_keys_visible(&g, table[i].t, table[i].j), table[i].seen);
    }
}

/* How many blocks of keys query block i sees. */
Test(common, blocks_visible)
{
    static const struct {
        int64_t q_len, k_len, block_q, block_k;
        int causal;
        int64_t i, blocks;
    } table[] = {
        {300, 200, 128, 64, NONE, 0, 4},
        {300, 200, 128, 64, NONE, 2, 4},
        {300, 300, 128, 64, END, 0, 2},
        {300, 300, 128, 64, END, 1, 4},
        {300, 300, 128, 64, END, 2, 5},
        {300, 300, 128, 64, START, 2, 5},
        {200, 300, 128, 64, END, 0, 4},
        {200, 300, 128, 64, END, 1, 5},
        {200, 300, 128, 64, START, 0, 2},
        {200, 300, 128, 64, START, 1, 4},
        {300, 200, 128, 64, END, 0, 1},
        {300, 200, 128, 64, END, 1, 3},
        {300, 200, 128, 64, END, 2, 4},
        {300, 200, 64, 64, END, 0, 0},
        {300, 200, 100, 64, END, 0, 0},
        {300, 200, 101, 64, END, 0, 1},
        {300, 200, 128, 64, START, 0, 2},
        {300, 200, 128, 64, START, 2, 4},
        {20, 20, 16, 8, END, 0, 2},
        {20, 20, 16, 8, END, 1, 3},
        {20, 21, 16, 8, END, 0, 3},
        {20, 20, 64, 128, END, 0, 1},
        {3, 3, 1, 1, END, 0, 1},
        {3, 3, 1, 1, START, 2, 3},
        {100, 0, 128, 64, NONE, 0, 0},
        {100, 0, 128, 64, END, 0, 0},
        {100, 0, 128, 64, START, 0, 0},
        {1, 1, 128, 64, END, 0, 1},
        {1048576, 1048576, 128, 64, END, 0, 2},
        {1048576, 1048576, 128, 64, END, 8191, 16384},
        {3000000001, 3000000001, 128, 64, END, 23437500, 46875001},
        {3000000001, 3000000001, 128, 64, END, 23437499, 46875000},
        {1, 1099511627776, 128, 64, END, 0, 17179869184},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        const sparge_geometry g =
            sparge_geometry_make(table[i].q_len, table[i].k_len, table[i].block_q, table[i].block_k,
                                 (sparge_causal)table[i].causal);
        check_equal(sparge_blocks_visible(&g, table[i].i), table[i].blocks);
    }
}

/* Does query t see key u? The definition, for every pair of short lengths. */
static bool sees(int causal, int64_t q_len, int64_t k_len, int64_t t, int64_t u)
{
    return causal == NONE || (causal == START && u <= t) ||
           (causal == END && q_len - t <= k_len - u);
}

Test(common, geometry_by_definition)
{
    static const int64_t blocks[][2] = {{1, 1}, {4, 3}, {3, 4}, {5, 5}, {16, 8}, {8, 16}};
    for (int64_t q_len = 0; q_len <= 18; q_len++)
        for (int64_t k_len = 0; k_len <= 18; k_len++)
            for (size_t b = 0; b < 3 * COUNT(blocks); b++) {
                const int64_t bq = blocks[b / 3][0], bk = blocks[b / 3][1];
                const int causal = (int)(b % 3);
                check_case("%d x %d in %d x %d, causal %d", (int)q_len, (int)k_len, (int)bq,
                           (int)bk, causal);
                const sparge_geometry g =
                    sparge_geometry_make(q_len, k_len, bq, bk, (sparge_causal)causal);
                int64_t of_block[18] = {0}, diagonal[18], rows = 0;
                for (int i = 0; i < 18; i++)
                    diagonal[i] = 18;
                for (int64_t t = 0; t < q_len; t++) {
                    int64_t keys[18] = {0}, all = 0;
                    for (int64_t u = 0; u < k_len; u++)
                        if (sees(causal, q_len, k_len, t, u)) {
                            all++;
                            keys[u / bk]++;
                            of_block[t / bq] = sparge_max(of_block[t / bq], u / bk + 1);
                        }
                    for (int64_t j = 0; j < g.k_blocks; j++)
                        check_equal(sparge_keys_visible(&g, t, j), keys[j]);
                    check_equal(sparge_keys_of_query(&g, t), all);
                    diagonal[t / bq] = sparge_min(diagonal[t / bq], sparge_max(0, all - 1) / bk);
                }
                for (int64_t i = 0; i < g.q_blocks; i++) {
                    check_equal(sparge_blocks_visible(&g, i), of_block[i]);
                    check_equal(sparge_first_diagonal(&g, i),
                                causal == NONE ? g.k_blocks : diagonal[i]);
                    rows += sparge_block_rows(q_len, bq, i);
                }
                check_equal(rows, q_len);
            }
}

/* ---- block_mask.h ----------------------------------------------------------------------- */

Test(common, mask_words)
{
    static const int64_t table[][2] = {
        {0, 0},  {1, 1},  {31, 1},  {32, 1},      {33, 2},
        {64, 2}, {65, 3}, {100, 4}, {16384, 512}, {137438953473, 4294967297}};
    for (size_t i = 0; i < COUNT(table); i++)
        check_equal(sparge_mask_row_words(table[i][0]), table[i][1]);
}

static void walk(const uint32_t *row, int64_t blocks, const int64_t *set)
{
    for (int64_t from = 0; from <= blocks; from++) {
        while (*set < from)
            set++;
        check_equal(sparge_mask_row_next(row, from, blocks), *set);
        if (from < blocks)
            check_equal(sparge_mask_row_get(row, from), *set == from);
    }
}

/* 100 blocks, with a set one on each side of every end of a word. */
Test(common, mask_bits)
{
    static const int64_t all[] = {0, 31, 32, 63, 64, 95, 99, 100}, fewer[] = {31, 63, 64, 99, 100};
    static const int64_t none[] = {100}, last[] = {99, 100};
    static const uint32_t after_set[] = {0x80000001, 0x80000001, 0x80000001, 0x00000008};
    static const uint32_t after_clear[] = {0x80000000, 0x80000000, 0x00000001, 0x00000008};
    uint32_t *row = (uint32_t *)check_alloc(16);
    memset(row, 0, 16);
    walk(row, 100, none);
    check_equal(sparge_mask_row_count(row, 100), 0);
    for (size_t i = 0; i < 7; i++)
        sparge_mask_row_set(row, all[i]);
    sparge_mask_row_set(row, 31); /* set already */
    check_same(row, after_set, 4);
    walk(row, 100, all);
    check_equal(sparge_mask_row_count(row, 100), 7);
    check_equal(sparge_mask_row_count(row, 99), 6);
    check_equal(sparge_mask_row_count(row, 64), 4);
    check_equal(sparge_mask_row_count(row, 33), 3);
    check_equal(sparge_mask_row_count(row, 0), 0);
    check_equal(sparge_mask_row_next(row, 65, 95), 95); /* what lies past the end is not seen */
    check_equal(sparge_mask_row_next(row, 96, 98), 98);
    check_equal(sparge_mask_row_next(row, 100, 99), 99);
    check_equal(sparge_mask_row_next(row, 0, 0), 0);
    sparge_mask_row_clear(row, 0);
    sparge_mask_row_clear(row, 32);
    sparge_mask_row_clear(row, 95);
    sparge_mask_row_clear(row, 1); /* clear already */
    check_same(row, after_clear, 4);
    walk(row, 100, fewer);
    memset(row, 0, 12);
    walk(row, 100, last); /* over three empty words */
    memset(row, 0, 16);
    walk(row, 128, (const int64_t[]){128});         /* to the end of the last word and not beyond */
    for (int64_t block = 0; block < 128; block++) { /* one alone, in every place of a word */
        sparge_mask_row_set(row, block);
        walk(row, 128, (const int64_t[]){block, 128});
        sparge_mask_row_clear(row, block);
    }
    memset(row, 0xFF, 16);
    check_equal(sparge_mask_row_count(row, 128), 128);
    check_free(row);
    cr_assert_eq(sparge_mask_row_next(NULL, 0, 0), 0);
    cr_assert_eq(sparge_mask_row_count(NULL, 0), 0);
}

/* Dense: every block, up to the last one. */
Test(common, mask_of_null)
{
    check_equal(sparge_mask_row_next(NULL, 3, 100), 3);
    check_equal(sparge_mask_row_next(NULL, 100, 100), 100);
    check_equal(sparge_mask_row_next(NULL, 101, 100), 100);
    check_equal(sparge_mask_row_count(NULL, 100), 100);
}

Test(common, mask_word)
{
    static const uint32_t row[] = {0xffffffff, 0xf000000f, 0x80000001};
    static const struct {
        int64_t at, blocks;
        uint32_t word, dense;
    } table[] = {
        {0, 96, 0xffffffff, 0xffffffff},
        {1, 96, 0xf000000f, 0xffffffff},
        {2, 96, 0x80000001, 0xffffffff},
        {2, 95, 0x00000001, 0x7fffffff},
        {2, 65, 0x00000001, 0x00000001},
        {2, 64, 0, 0},
        {2, 10, 0, 0},
        {1, 62, 0x3000000f, 0x3fffffff},
        {0, 1, 1, 1},
        {0, 0, 0, 0},
        {0, 31, 0x7fffffff, 0x7fffffff},
        {0, 32, 0xffffffff, 0xffffffff},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(sparge_mask_row_word(row, table[i].at, table[i].blocks), table[i].word);
        check_equal(sparge_mask_row_word(NULL, table[i].at, table[i].blocks), table[i].dense);
    }
}

/* More than 2^31 blocks: a quarter of a gigabyte, of which a few pages are touched. */
Test(common, mask_of_billions)
{
    const int64_t blocks = (1ll << 31) + 100;
    uint32_t *row = (uint32_t *)calloc((size_t)sparge_mask_row_words(blocks), sizeof *row);
    cr_assert(row);
    sparge_mask_row_set(row, blocks - 90);
    sparge_mask_row_set(row, blocks - 1);
    cr_assert(sparge_mask_row_get(row, blocks - 90));
    check_equal(row[67108864], 1u << 10);
    check_equal(sparge_mask_row_next(row, blocks - 5000, blocks), blocks - 90);
    check_equal(sparge_mask_row_next(row, blocks - 89, blocks), blocks - 1);
    sparge_mask_row_clear(row, blocks - 1);
    check_equal(sparge_mask_row_next(row, blocks - 89, blocks), blocks);
    free(row);
}

/* ---- half.h ----------------------------------------------------------------------------- */

Test(common, f16_values)
{
    static const struct {
        float x;
        uint16_t h;
    } table[] = {
        {0.0f, 0x0000},
        {-0.0f, 0x8000},
        {1.0f, 0x3c00},
        {-2.0f, 0xc000},
        {0.1f, 0x2e66},
        {0x1.555556p-2f, 0x3555},
        {65504.0f, 0x7bff},
        {65519.996f, 0x7bff},
        {65520.0f, 0x7c00},
        {-65520.0f, 0xfc00},
        {65536.0f, 0x7c00},
        {FLT_MAX, 0x7c00},
        {INFINITY, 0x7c00},
        {-INFINITY, 0xfc00},
        {2049.0f, 0x6800},
        {2050.9998f, 0x6801},
        {2051.0f, 0x6802},
        {2051.0002f, 0x6802},
        {0x1p-14f, 0x0400},
        {0x1.ffcp-15f, 0x0400},
        {0x1.ffbffep-15f, 0x03ff},
        {0x1.ff8p-15f, 0x03ff},
        {0x1p-24f, 0x0001},
        {0x1p-25f, 0x0000},
        {0x1.000002p-25f, 0x0001},
        {-0x1.000002p-25f, 0x8001},
        {0x1.8p-24f, 0x0002},
        {0x1.4p-23f, 0x0002},
        {0x1.cp-23f, 0x0004},
        {-0x1p-25f, 0x8000},
        {FLT_MIN, 0x0000},
        {-0x1p-149f, 0x8000},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("%a", (double)table[i].x);
        check_equal(sparge_f32_to_f16(table[i].x), table[i].h);
    }
    static const struct {
        uint16_t h;
        float x;
    } widened[] = {
        {0x0000, 0.0f},        {0x8000, -0.0f},     {0x3c00, 1.0f},         {0xc000, -2.0f},
        {0x3555, 0x1.554p-2f}, {0x7bff, 65504.0f},  {0x7c00, INFINITY},     {0xfc00, -INFINITY},
        {0x0001, 0x1p-24f},    {0x8001, -0x1p-24f}, {0x03ff, 0x1.ff8p-15f}, {0x0400, 0x1p-14f},
    };
    for (size_t i = 0; i < COUNT(widened); i++)
        check_equal(sparge_f16_to_f32(widened[i].h), widened[i].x);
}

Test(common, bf16_values)
{
    static const struct {
        float x;
        uint16_t h;
    } table[] = {
        {0.0f, 0x0000},           {-0.0f, 0x8000},           {1.0f, 0x3f80},
        {-2.0f, 0xc000},          {0x1.01p0f, 0x3f80},       {0x1.010002p0f, 0x3f81},
        {0x1.02p0f, 0x3f81},      {0x1.03p0f, 0x3f82},       {0x1.02fffep0f, 0x3f81},
        {0x1.fep127f, 0x7f7f},    {0x1.fefffep127f, 0x7f7f}, {0x1.ffp127f, 0x7f80},
        {FLT_MAX, 0x7f80},        {-FLT_MAX, 0xff80},        {INFINITY, 0x7f80},
        {-INFINITY, 0xff80},      {0x1p-149f, 0x0000},       {0x1p-134f, 0x0000},
        {0x1.0002p-134f, 0x0001}, {0x1.8p-133f, 0x0002},     {-0x1p-133f, 0x8001},
        {FLT_MIN, 0x0080},        {3.14159265f, 0x4049},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("%a", (double)table[i].x);
        check_equal(sparge_f32_to_bf16(table[i].x), table[i].h);
    }
    check_equal(sparge_bf16_to_f32(0x4049), 3.140625f);
    check_equal(sparge_bf16_to_f32(0x0001), 0x1p-133f);
    check_equal(sparge_bf16_to_f32(0xff80), -INFINITY);
}

/* Every pattern widens to what its fields say and narrows to itself, and a NaN stays one of its
 * sign. */
Test(common, half_every_pattern)
{
    for (uint32_t i = 0; i <= 0xffff; i++) {
        const uint16_t h = (uint16_t)i;
        const int exponent = (int)(i >> 10 & 31), fraction = (int)(i & 1023);
        const float f = sparge_f16_to_f32(h), b = sparge_bf16_to_f32(h);
        const float size =
            (float)(exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24));
        check_equal(sparge_float_bits(b), i << 16);
        if (exponent == 31 && fraction)
            cr_assert(isnan(f) && isnan(sparge_f16_to_f32(sparge_f32_to_f16(f))), "f16 %04x", i);
        else
            check_equal(f, copysignf(exponent == 31 ? INFINITY : size, i >> 15 ? -1.0f : 1.0f));
        if (isnan(f))
            check_equal(sparge_f32_to_f16(f) >> 15, h >> 15);
        else
            check_equal(sparge_f32_to_f16(f), h);
        if (isnan(b)) {
            cr_assert(isnan(sparge_bf16_to_f32(sparge_f32_to_bf16(b))), "bf16 %04x", i);
            check_equal(sparge_f32_to_bf16(b) >> 15, h >> 15);
        } else
            check_equal(sparge_f32_to_bf16(b), h);
    }
    static const uint32_t nans[] = {0x7f800001, 0xff800001, 0x7f801fff,
                                    0x7f80ffff, 0x7fc00000, 0xffffffff};
    for (size_t i = 0; i < COUNT(nans); i++) {
        const float x = sparge_bits_float(nans[i]);
        cr_assert(isnan(sparge_f16_to_f32(sparge_f32_to_f16(x))), "%08x", nans[i]);
        cr_assert(isnan(sparge_bf16_to_f32(sparge_f32_to_bf16(x))), "%08x", nans[i]);
    }
}

Test(common, e4m3_values)
{
    static const struct {
        float x;
        uint8_t code;
    } table[] = {
        {0.0f, 0x00},    {-0.0f, 0x80},           {1.0f, 0x38},      {-1.0f, 0xb8},
        {1.0625f, 0x38}, {1.1875f, 0x3a},         {0x1p-6f, 0x08},   {0x7p-9f, 0x07},
        {0x1p-9f, 0x01}, {0x1p-10f, 0},           {-0x3p-10f, 0x82}, {0x1p-149f, 0},
        {256.0f, 0x78},  {240.0f, 0x77},          {431.0f, 0x7d},    {432.0f, 0x7e},
        {448.0f, 0x7e},  {464.0f, 0x7e},          {500.0f, 0x7e},    {-1e30f, 0xfe},
        {FLT_MAX, 0x7e}, {INFINITY, 0x7e},        {-INFINITY, 0xfe}, {NAN, 0x7f},
        {-NAN, 0x7f},    {0x1.000002p-10f, 0x01},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("%a", (double)table[i].x);
        check_equal(sparge_f32_to_e4m3(table[i].x), table[i].code);
    }
    check_equal(sparge_e4m3_to_f32(0x3b), 1.375f);
    check_equal(sparge_e4m3_to_f32(0x83), -0x3p-9f);
    check_equal(sparge_f32_to_e4m3(sparge_bits_float(0x7f800001)), (uint8_t)0x7f);
}

/* Every code widens to what its fields say and narrows to itself. Between every two neighbours the
 * middle goes to the even one, and the floats beside it apart. */
Test(common, e4m3_every_code_and_tie)
{
    for (uint32_t i = 0; i <= 0xff; i++) {
        const uint8_t code = (uint8_t)i;
        const int exponent = (int)(i >> 3 & 15), fraction = (int)(i & 7);
        const float x = sparge_e4m3_to_f32(code);
        check_case("code %02x", i);
        if ((i & 0x7f) == 0x7f) {
            cr_assert(isnan(x) && sparge_f32_to_e4m3(x) == 0x7f, "%a", (double)x);
            continue;
        }
        const double size = exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9);
        check_equal(x, copysignf((float)size, i >> 7 ? -1.0f : 1.0f));
        check_equal(sparge_f32_to_e4m3(x), code);
        if ((i & 0x7f) == 0x7e)
            continue;
        const float middle = (x + sparge_e4m3_to_f32((uint8_t)(i + 1))) / 2;
        check_equal(sparge_f32_to_e4m3(middle), (uint8_t)(i + (i & 1)));
        check_equal(sparge_f32_to_e4m3(nextafterf(middle, 0.0f)), code);
        check_equal(sparge_f32_to_e4m3(nextafterf(middle, copysignf(INFINITY, x))),
                    (uint8_t)(i + 1));
    }
}

/* Between every two neighbours: the middle goes to the even one, and the floats beside it apart. */
Test(common, half_every_tie)
{
    for (uint32_t i = 0; i < 0x7c00; i++) {
        const float low = sparge_f16_to_f32((uint16_t)i);
        const float high = i == 0x7bff ? 65536.0f : sparge_f16_to_f32((uint16_t)(i + 1));
        const float middle = low / 2 + high / 2;
        check_equal(sparge_f32_to_f16(middle), (uint16_t)(i + (i & 1)));
        check_equal(sparge_f32_to_f16(nextafterf(middle, 0.0f)), (uint16_t)i);
        check_equal(sparge_f32_to_f16(nextafterf(middle, INFINITY)), (uint16_t)(i + 1));
        check_equal(sparge_f32_to_f16(-nextafterf(middle, INFINITY)), (uint16_t)(0x8000 | (i + 1)));
    }
    for (uint32_t i = 0; i < 0x7f80; i++) {
        const uint32_t middle = i << 16 | 0x8000;
        check_equal(sparge_f32_to_bf16(sparge_bits_float(middle)), (uint16_t)(i + (i & 1)));
        check_equal(sparge_f32_to_bf16(sparge_bits_float(middle - 1)), (uint16_t)i);
        check_equal(sparge_f32_to_bf16(sparge_bits_float(middle + 1)), (uint16_t)(i + 1));
        check_equal(sparge_f32_to_bf16(-sparge_bits_float(middle + 1)),
                    (uint16_t)(0x8000 | (i + 1)));
    }
}

/* x in a format of so many bits of mantissa, smallest exponent and overflow, by rint in double. */
static float rounded(float x, int mantissa, int smallest, double overflow)
{
    if (x == 0.0f || !isfinite(x))
        return x;
    const int exponent = ilogbf(x) < smallest ? smallest : ilogbf(x);
    const double y = ldexp(rint(ldexp((double)x, mantissa - exponent)), exponent - mantissa);
    return fabs(y) >= overflow ? copysignf(INFINITY, x) : (float)y;
}

#ifdef __FLT16_MAX__
__extension__ typedef _Float16 compiler_half;
static float compiler_rounded(float x) { return (float)(compiler_half)x; }
#else
static float compiler_rounded(float x) { return rounded(x, 10, -14, 65536.0); }
#endif

Test(common, half_narrowing)
{
    const uint64_t step = stride(2053);
    for (uint64_t bits = 0; bits <= 0xffffffff; bits += step) {
        const float x = sparge_bits_float((uint32_t)bits);
        if (isnan(x))
            continue;
        const float f = sparge_f16_to_f32(sparge_f32_to_f16(x));
        const float b = sparge_bf16_to_f32(sparge_f32_to_bf16(x));
        const float e = sparge_e4m3_to_f32(sparge_f32_to_e4m3(x));
        if (f != rounded(x, 10, -14, 65536.0) || f != compiler_rounded(x) ||
            signbit(f) != signbit(x))
            cr_assert_fail("%a to f16 is %a", (double)x, (double)f);
        if (b != rounded(x, 7, -126, 0x1p128) || signbit(b) != signbit(x))
            cr_assert_fail("%a to bf16 is %a", (double)x, (double)b);
        if (e != fmaxf(-448.0f, fminf(rounded(x, 3, -6, 0x1p128), 448.0f)) ||
            signbit(e) != signbit(x))
            cr_assert_fail("%a to e4m3 is %a", (double)x, (double)e);
    }
}

/* ---- softmax.h -------------------------------------------------------------------------- */

static sparge_row row_of(float max, float sum) { return (sparge_row){max, sum}; }

/* The bits, but of a NaN no more than that it is one. */
static void check_number(float got, float want)
{
    if (isnan(want))
        cr_assert(isnan(got));
    else
        check_equal(got, want);
}

Test(common, row_empty)
{
    const sparge_row row = sparge_row_empty();
    check_equal(row.max, -INFINITY);
    check_equal(row.sum, 0.0f);
    check_equal(sparge_row_norm(&row), 0.0f);
    check_equal(sparge_row_lse(&row), -INFINITY);
}

Test(common, row_update_max)
{
    static const struct {
        sparge_row row;
        float local, shrink;
        sparge_row after;
    } table[] = {
        {{-INFINITY, 0.0f}, 3.0f, 0.0f, {3.0f, 0.0f}},
        {{-INFINITY, 0.0f}, -INFINITY, 1.0f, {-INFINITY, NAN}}, /* not empty any more */
        {{-INFINITY, NAN}, -INFINITY, 1.0f, {-INFINITY, NAN}},
        {{-INFINITY, NAN}, 3.0f, 0.0f, {3.0f, 0.0f}},
        {{3.0f, 2.0f}, INFINITY, 0.0f, {INFINITY, 0.0f}},
        {{INFINITY, NAN}, 3.0f, 1.0f, {INFINITY, NAN}},
        {{3.0f, 2.0f}, NAN, NAN, {NAN, NAN}},
        {{NAN, NAN}, 3.0f, 1.0f, {NAN, NAN}},
        {{NAN, NAN}, INFINITY, 1.0f, {NAN, NAN}},
        {{3.0f, 2.0f}, 5.0f, 0.25f, {5.0f, 0.5f}},
        {{3.0f, 2.0f}, 3.0f, 1.0f, {3.0f, 2.0f}},
        {{3.0f, 2.0f}, 1.0f, 1.0f, {3.0f, 2.0f}},
        {{3.0f, 2.0f}, -INFINITY, 1.0f, {3.0f, 2.0f}},
        {{-3.0f, 7.0f}, -2.0f, 0.5f, {-2.0f, 3.5f}},
        {{-3.0f, 7.0f}, 200.0f, 0.0f, {200.0f, 0.0f}},
        {{0.0f, 1.0f}, 0.5f, 0x1.6a09e8p-1f, {0.5f, 0x1.6a09e8p-1f}},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        sparge_row row = table[i].row;
        check_number(sparge_row_update_max(&row, table[i].local), table[i].shrink);
        check_number(row.max, table[i].after.max);
        check_number(row.sum, table[i].after.sum);

        /* In parts, as a kernel with an exponential of its own does it. */
        const float old = table[i].row.max, local = table[i].local;
        check_number(sparge_max_update(old, local), table[i].after.max);
        check_equal(sparge_max_stays(old, local), table[i].shrink == 1.0f);
        check_number(sparge_exp2(sparge_shrink_log2(old, local)), table[i].shrink);
        row = sparge_row_shrunk(table[i].row, local, table[i].shrink);
        check_number(row.max, table[i].after.max);
        if (local == -INFINITY) /* for it the row may see no key of the block */
            check_number(row.sum, table[i].row.sum);
        else
            check_number(row.sum, table[i].after.sum);
    }
}

Test(common, row_gap)
{
    static const struct {
        float max, local, gap;
    } table[] = {
        {3.0f, 5.0f, 2.0f},
        {3.0f, 1.0f, -2.0f},
        {3.0f, 3.0f, 0.0f},
        {-INFINITY, 5.0f, INFINITY},
        {-INFINITY, -5e30f, INFINITY},
        {3.0f, -INFINITY, -FLT_MAX},
        {-INFINITY, -INFINITY, INFINITY},
        {3e38f, -3e38f, -FLT_MAX},
        {3.0f, INFINITY, INFINITY},
        {3.0f, NAN, INFINITY},
        {NAN, 3.0f, INFINITY},
        {INFINITY, 3.0f, -FLT_MAX},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        const sparge_row row = row_of(table[i].max, 1.0f);
        check_case("line %zu", i);
        check_equal(sparge_row_gap(&row, table[i].local, true), table[i].gap);
        check_equal(sparge_row_gap(&row, -INFINITY, false), -INFINITY);
    }
}

Test(common, row_local)
{
    static const struct {
        float most, unit, local;
    } table[] = {
        {3.0f, 2.0f, 6.0f},
        {-INFINITY, 2.0f, -INFINITY},
        {INFINITY, 2.0f, INFINITY},
        {3e38f, 2.0f, INFINITY},
        {-3e38f, 2.0f, -INFINITY},
        {NAN, 2.0f, NAN},
        {3.0f, INFINITY, NAN},
        {-3.0f, INFINITY, NAN},
        {3.0f, NAN, NAN},
        {-3.0f, 0.0f, 0.0f},
        {-0.0f, 2.0f, 0.0f},
        {-1.0f, 0x1p-149f, -0x1p-149f},
        {5.0f, 0x1.333334p-1f, 0x1.8p1f}, /* 3.00000006, rounded as a product */
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_number(sparge_row_local(table[i].most, table[i].unit), table[i].local);
    }
}

/* The gap is in log2 units, lambda in natural ones: -5 stands for a gap of -7.2134752. */
Test(common, group_skips)
{
    static const struct {
        float gap, lambda;
        bool skips;
    } table[] = {
        {-8.0f, -5.0f, true},         {-7.2134757f, -5.0f, true},
        {-7.2134752f, -5.0f, true},   {-7.2134743f, -5.0f, false},
        {-6.0f, -5.0f, false},        {0.0f, -5.0f, false},
        {2.0f, -5.0f, false},         {INFINITY, -5.0f, false},
        {-INFINITY, -5.0f, false},    {-1.0f, 0.0f, true},
        {0.0f, 0.0f, true},           {0x1p-149f, 0.0f, false},
        {INFINITY, 0.0f, false},      {-INFINITY, 0.0f, false},
        {-FLT_MAX, -INFINITY, false}, {-INFINITY, -INFINITY, false},
        {INFINITY, -INFINITY, false}, {0.0f, -INFINITY, false},
        {NAN, 0.0f, false},           {-FLT_MAX, -FLT_MAX, false},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("gap %g, lambda %g", (double)table[i].gap, (double)table[i].lambda);
        check_equal(sparge_group_skips(table[i].gap, table[i].lambda), table[i].skips);
        if (!isnan(table[i].gap))
            check_equal(sparge_gap_is_near(table[i].gap, table[i].lambda),
                        table[i].gap > -INFINITY && !table[i].skips);
    }
    cr_assert(!sparge_gap_is_near(-INFINITY, -INFINITY) && !sparge_gap_is_near(-INFINITY, 0.0f));
}

Test(common, weight)
{
    static const struct {
        float score, scale, max, weight;
    } table[] = {
        {3.0f, 2.0f, 6.0f, 1.0f},
        {3.0f, 2.0f, 8.0f, 0.25f},
        {-3.0f, 2.0f, -6.0f, 1.0f},
        {-3.0f, 2.0f, 4.0f, 0x1p-10f},
        {0.0f, 0.0f, 0.0f, 1.0f},
        {3.0f, 2.0f, 1000.0f, 0.0f},
        {16129.0f, 0.0f, 0.5f, 0x1.6a09e8p-1f},
        {5.0f, 0x1.000002p0f, 0x1.400002p2f,
         1.0f}, /* the product, exactly, is above its own rounding */
        {3.0f, 0x1.000002p0f, 4.0f, 0x1.000006p-1f}, /* ...04 from one rounding, an fma */
        {6.0f, 0x1.000002p0f, 7.0f, 0x1.00000cp-1f}, /* ...08 */
        {3.0f, 0x1.555556p60f, 0x1p62f, 1.0f},       /* an fma is 2^38 above here */
        {-3.0f, 0x1.555556p60f, -0x1p62f, 1.0f},     /* and here below: weight 0 */
        {-INFINITY, 2.0f, 3.0f, 0.0f},
        {-INFINITY, 2.0f, -INFINITY, 0.0f},
        {-3e38f, 2.0f, -INFINITY, 0.0f},
        {INFINITY, 2.0f, INFINITY, NAN},
        {NAN, 2.0f, 3.0f, NAN},
        {3.0f, 2.0f, NAN, NAN},
        {3.0f, 2.0f, INFINITY, 0.0f},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_number(sparge_weight(table[i].score, table[i].scale, table[i].max), table[i].weight);
        const float base = sparge_row_base(table[i].max);
        check_number(sparge_exp2(sparge_weight_log2(table[i].score, table[i].scale, base)),
                     table[i].weight);
    }
}

Test(common, weight_code)
{
    static const struct {
        float score, most, unit;
        int qmax, code;
    } table[] = {
        {7.0f, 7.0f, 1e30f, 127, 127},
        {-16129.0f, -16129.0f, 1e30f, 127, 127},
        {6.0f, 7.0f, 1.0f, 127, 64},
        {6.0f, 7.0f, 1.0f, 4095, 2048},
        {0.0f, 7.0f, 1.0f, 127, 1},
        {0.0f, 8.0f, 1.0f, 127, 0},
        {5.0f, 6.0f, 0x1.02dab2p-7f, 127, 126},            /* 126.3 */
        {2064511.0f, 2064512.0f, 0x1.555556p-1f, 127, 80}, /* 80.5; products differ by 0.625 */
        {-9.0f, 7.0f, 0.0f, 127, 127},
        {-INFINITY, 7.0f, 1.0f, 127, 0},
        {-INFINITY, -INFINITY, 1.0f, 127, 0},
        {NAN, 7.0f, 1.0f, 127, 0},
        {7.0f, NAN, 1.0f, 127, 0},
        {7.0f, 7.0f, INFINITY, 127, 0},
        {3e38f, INFINITY, 1.0f, 127, 0},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_equal(sparge_weight_code(table[i].score, table[i].most, table[i].unit, table[i].qmax),
                    table[i].code);
        const float p = sparge_exp2(sparge_code_log2(table[i].score, table[i].most, table[i].unit));
        check_equal(sparge_code(p, table[i].qmax), table[i].code);
    }
    for (int qmax = 127; qmax <= 4095; qmax += 4095 - 127) /* one rounding or two: the same codes */
        for (uint32_t bits = 0; bits <= sparge_float_bits(1.0f); bits += 97) {
            const float p = sparge_bits_float(bits);
            cr_assert_eq((int)fmaf((float)qmax, p, 0.5f), (int)((float)qmax * p + 0.5f), "%a",
                         (double)p);
        }
}

Test(common, code_weight)
{
    static const struct {
        float local, max;
        int qmax;
        float weight;
    } table[] = {
        {3.0f, 3.0f, 127, 0x1.020408p-7f}, {3.0f, 5.0f, 127, 0x1.020408p-9f},
        {-INFINITY, 3.0f, 127, 0.0f},      {-INFINITY, -INFINITY, 127, 0.0f},
        {INFINITY, INFINITY, 127, NAN},    {NAN, NAN, 127, NAN},
        {3.0f, INFINITY, 127, 0.0f},       {3.0f, 3.0f, 4095, 0x1.001002p-12f},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        check_case("line %zu", i);
        check_number(sparge_code_weight(table[i].local, table[i].max, table[i].qmax),
                     table[i].weight);
    }
}

Test(common, row_norm_and_lse)
{
    static const struct {
        float max, sum, norm, lse;
    } table[] = {
        {-INFINITY, 0.0f, 0.0f, -INFINITY},
        {0.0f, 1.0f, 1.0f, 0.0f},
        {2.0f, 4.0f, 0.25f, 2.77258872f},
        {-3.0f, 1.0f, 1.0f, -2.07944154f},
        {10.0f, 3.0f, 0x1.555556p-2f, 8.03008409f},
        {1000.0f, 1048576.0f, 0x1p-20f, 707.010124f},
        {-INFINITY, NAN, NAN, NAN},
        {INFINITY, NAN, NAN, NAN},
        {1.44269502f, 1.0f, 1.0f, 1.0f},
        {1e30f, 1.0f, 1.0f, 6.93147203e29f},
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        const sparge_row row = row_of(table[i].max, table[i].sum);
        check_case("line %zu", i);
        check_number(sparge_row_norm(&row), table[i].norm);
        check_number(sparge_row_lse(&row), table[i].lse);
    }
    const sparge_row bad = row_of(3.0f, NAN), worse = row_of(NAN, 1.0f);
    cr_assert(isnan(sparge_row_norm(&bad)) && isnan(sparge_row_lse(&bad)) &&
              isnan(sparge_row_lse(&worse)));

    const sparge_row empty = sparge_row_empty(), some = row_of(2.0f, 4.0f);
    check_equal(sparge_row_lse_smoothed(&some, 0.0f), sparge_row_lse(&some));
    check_equal(sparge_row_lse_smoothed(&some, -1.5f), sparge_row_lse(&some) - 1.5f);
    check_equal(sparge_row_lse_smoothed(&empty, 3.0f), -INFINITY);
    check_equal(sparge_row_lse_smoothed(&empty, INFINITY), -INFINITY);
    check_equal(sparge_row_lse_smoothed(&empty, NAN), -INFINITY);
    const sparge_row met = sparge_row_nonfinite(some), none = sparge_row_nonfinite(empty);
    cr_assert(met.max == 2.0f && isnan(met.sum) && sparge_row_is_empty(&none));
}

/* 50 scores, eight at a time, against the formula in double. */
Test(common, row_online)
{
    for (int n = 0; n < 200; n++) {
        check_case("row %d", n);
        const float scale = check_uniform(0.001f, 0.2f);
        sparge_row row = sparge_row_empty();
        float o = 0.0f;
        double top = -INFINITY, sum = 0.0, weighted = 0.0, score[50], value[50];
        for (int t = 0; t < 50; t++) {
            score[t] = (double)check_int(-1000, 1000);
            value[t] = (double)check_uniform(0.0f, 1.0f);
            top = fmax(top, score[t] * (double)scale);
        }
        for (int t = 0; t < 50; t++) {
            const double p = exp2(score[t] * (double)scale - top);
            sum += p;
            weighted += p * value[t];
        }
        for (int t0 = 0; t0 < 50; t0 += 8) {
            float local = -INFINITY;
            for (int t = t0; t < 50 && t < t0 + 8; t++)
                local = fmaxf(local, (float)score[t] * scale);
            o *= sparge_row_update_max(&row, local);
            for (int t = t0; t < 50 && t < t0 + 8; t++) {
                const float p = sparge_weight((float)score[t], scale, row.max);
                row.sum += p;
                o += p * (float)value[t];
            }
        }
        check_close(sparge_row_norm(&row) * o, weighted / sum, 2e-6);
        check_close(sparge_row_lse(&row), (top + log2(sum)) * 0.69314718055994530942, 1e-4);
    }
}
