/* SPDX-License-Identifier: Apache-2.0 */
/* bf16.c: sums of products of bfloat16, by hand: each case tells an order, or a flush, from another
 * that it might be. dpbf16.c asks the processor. */
#include "common/bf16.h"
#include "common/quant.h"
#include "tests/support/check.h"

#define COUNT(table) ((int64_t)(sizeof(table) / sizeof *(table)))

Test(bf16, elements)
{
    static const struct {
        float x;
        uint16_t bits;
        bool finite;
    } table[] = {
        {0.0f, 0x0000, true},
        {-0.0f, 0x8000, true},
        {1.0f, 0x3f80, true},
        {0x1.01p0f, 0x3f80, true}, /* ties go to even */
        {0x1.03p0f, 0x3f82, true},
        {0x1.010002p0f, 0x3f81, true},
        {-0x1.02fffep0f, 0xbf81, true},
        {0x1p-126f, 0x0080, true},
        {0x1.fffffcp-127f, 0x0000, true}, /* subnormal: 0, though it is nearest to 2^-126 */
        {-0x1p-149f, 0x8000, true},
        {0x1.fep127f, 0x7f7f, true},
        {0x1.fefffep127f, 0x7f7f, true},
        {0x1.ffp127f, 0x7f80, false},
        {-0x1.ffp127f, 0xff80, false},
        {FLT_MAX, 0x7f80, false},
        {INFINITY, 0x7f80, false},
        {NAN, 0x7fc0, false},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        check_case("%a", (double)table[n].x);
        check_equal(sparge_bf16_of(table[n].x), table[n].bits);
        check_equal(sparge_value_is_finite(table[n].x, SPARGE_BF16), table[n].finite);
        check_equal(sparge_finite(sparge_bf16_to_f32(table[n].bits)), table[n].finite);
    }
}

Test(bf16, order_of)
{
    check_equal((int)sparge_bf16_order_of(SPARGE_ISA_SCALAR), (int)SPARGE_VDPBF16PS);
    check_equal((int)sparge_bf16_order_of(SPARGE_ISA_AVX512VNNI), (int)SPARGE_VDPBF16PS);
    check_equal((int)sparge_bf16_order_of(SPARGE_ISA_AMX), (int)SPARGE_TDPBF16PS);
}

enum { LONGEST = 70 };

typedef struct term {
    int64_t at;
    float a, b;
} term;

/* The sum of `n` products, which are 0 but for a few. */
static float sum_of(float c, int64_t n, const term *terms, int64_t count, int64_t stride,
                    sparge_bf16_order order)
{
    uint16_t a[LONGEST] = {0}, b[3 * LONGEST] = {0};
    for (int64_t t = 0; t < count && terms[t].a != 0.0f; t++) {
        a[terms[t].at] = sparge_f32_to_bf16(terms[t].a);
        b[terms[t].at * stride] = sparge_f32_to_bf16(terms[t].b);
    }
    return sparge_bf16_dot(c, a, b, stride, n, order);
}

Test(bf16, sums)
{
    static const struct {
        const char *what;
        float c;
        int64_t n;
        term terms[3];
        float by_pairs, by_tiles;
    } table[] = {
        {"nothing", 3.0f, 0, {{0}}, 3.0f, 3.0f},
        {"one element", 1.0f, 1, {{0, 2.0f, 3.0f}}, 7.0f, 7.0f},
        {"the third of three", 1.0f, 3, {{2, 2.0f, 3.0f}}, 7.0f, 7.0f},
        {"odd before even", 1.0f, 2, {{1, 1, -1}, {0, 0x1p-15f, 0x1p-15f}}, 0x1p-30f, 0.0f},
        {"even after odd", 1.0f, 2, {{0, 1, -1}, {1, 0x1p-15f, 0x1p-15f}}, 0.0f, 0.0f},
        {"c before both",
         1.0f,
         2,
         {{0, 0x1p-12f, 0x1p-12f}, {1, 0x1p-12f, 0x1p-12f}},
         1.0f,
         0x1.000002p0f},
        {"odd and even apart", 0.0f, 4, {{0, 0x1p24f, 1}, {1, 1, 1}, {2, -0x1p24f, 1}}, 0.0f, 1.0f},
        {"pairs in ascending order",
         0.0f,
         6,
         {{0, 1, 1}, {2, 0x1p24f, 1}, {4, -0x1p24f, 1}},
         0.0f,
         0.0f},
        {"not in descending order",
         0.0f,
         6,
         {{0, 0x1p24f, 1}, {2, -0x1p24f, 1}, {4, 1, 1}},
         1.0f,
         1.0f},
        {"a new tile begins at 0",
         0.0f,
         64,
         {{0, 0x1p24f, 1}, {32, 1, 1}, {34, -0x1p24f, 1}},
         0.0f,
         1.0f},
        {"no tile begins at 16",
         0.0f,
         64,
         {{0, 0x1p24f, 1}, {16, 1, 1}, {18, -0x1p24f, 1}},
         0.0f,
         0.0f},
        {"a third tile", 0.0f, 66, {{32, 0x1p24f, 1}, {64, -0x1p24f, 1}, {65, 1, 1}}, 0.0f, 1.0f},
        {"no product overflows", -0x1.8p127f, 2, {{0, 0x1p64f, 0x1p64f}}, 0x1p126f, INFINITY},
        {"nor is one flushed", 0x1p-126f, 2, {{0, 0x1.8p-64f, 0x1p-63f}}, 0x1.cp-126f, 0x1p-126f},
        {"a sum overflows", FLT_MAX, 2, {{1, 0x1.8p52f, 0x1p52f}}, INFINITY, INFINITY},
        {"infinity stays", INFINITY, 2, {{1, -1, 1}}, INFINITY, INFINITY},
        {"a subnormal c is 0",
         0x1.fffffcp-127f,
         2,
         {{1, 0x1p-63f, 0x1p-63f}},
         0x1p-126f,
         0x1p-126f},
        {"beside nothing too", 0x1p-127f, 2, {{0}}, 0.0f, 0.0f},
        {"a subnormal a is 0", 0.0f, 2, {{1, 0x1p-127f, 0x1p100f}}, 0.0f, 0.0f},
        {"a subnormal b is 0", 0.0f, 2, {{0, 0x1p100f, 0x1.fcp-127f}}, 0.0f, 0.0f},
        {"a subnormal sum is 0", 0.0f, 2, {{1, 0x1p-64f, 0x1p-63f}}, 0.0f, 0.0f},
        {"on the way too",
         0x1.8p-126f,
         2,
         {{1, 0x1p-63f, -0x1p-63f}, {0, 0x1p-63f, 0x1p-62f}},
         0x1p-125f,
         0x1.4p-125f},
        {"with its sign", -0x1.8p-126f, 1, {{0, 0x1p-63f, 0x1p-63f}}, -0.0f, -0.0f},
        {"just below 2^-126 it is", 0x1p-126f, 2, {{0, 0x1.02p-70f, -0x1p-81f}}, 0.0f, 0x1p-126f},
        {"not what 24 bits round up",
         0x1p-126f,
         2,
         {{0, 0x1p-70f, -0x1p-81f}},
         0x1p-126f,
         0x1p-126f},
        {"negative, below", -0x1p-126f, 2, {{0, 0x1.02p-70f, 0x1p-81f}}, -0.0f, -0x1p-126f},
        {"far apart",
         0x1p-126f,
         2,
         {{1, 0x1p100f, 0x1p27f}, {0, -0x1p100f, 0x1p27f}},
         0.0f,
         0x1p-126f},
    };
    for (int64_t n = 0; n < COUNT(table); n++)
        for (int64_t stride = 1; stride <= 3; stride += 2) {
            check_case("%s, stride %d", table[n].what, (int)stride);
            check_equal(sum_of(table[n].c, table[n].n, table[n].terms, 3, stride, SPARGE_VDPBF16PS),
                        table[n].by_pairs);
            check_equal(sum_of(table[n].c, table[n].n, table[n].terms, 3, stride, SPARGE_TDPBF16PS),
                        table[n].by_tiles);
        }
}

/* What fills a pair or a tile up: elements that are 0 on one side, and anything finite on the
 * other. No more than the sign of a zero may change. */
Test(bf16, zeros_at_the_end)
{
    for (int64_t n = 1; n < 66; n++)
        for (int order = 0; order < 2; order++)
            for (int draw = 0; draw < 40; draw++) {
                check_case("%lld elements, order %d, draw %d", (long long)n, order, draw);
                uint16_t a[LONGEST] = {0}, b[LONGEST];
                for (int64_t e = 0; e < LONGEST; e++) {
                    const int low = draw % 2 ? 60 : 120;
                    b[e] = (uint16_t)(check_int(low, low + 8) << 7 | check_int(0, 127) |
                                      check_int(0, 1) << 15);
                    if (e < n)
                        a[e] = (uint16_t)(b[e] ^ check_int(0, 1) << 15 ^ check_int(0, 3));
                }
                const float c = check_uniform(-1, 1) * (draw % 2 ? 0x1p-125f : 1.0f);
                const float want = sparge_bf16_dot(c, a, b, 1, n, (sparge_bf16_order)order);
                const float got = sparge_bf16_dot(c, a, b, 1, LONGEST, (sparge_bf16_order)order);
                check_equal(got + 0.0f, want + 0.0f);
            }
}
