/* SPDX-License-Identifier: Apache-2.0 */
/* num.h: scalar arithmetic whose result must be the same bits in every backend and compiler. */
#ifndef SPARGE_COMMON_NUM_H
#define SPARGE_COMMON_NUM_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "common/hd.h"

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "float must be computed in float: build with SSE2 arithmetic (-msse2 -mfpmath=sse)"
#endif

#define SPARGE_LOG2E 1.44269504088896340736f

/* Of sparge_exp2, for those who write it again in vectors. */
#define SPARGE_EXP2_LOWEST  (-126.0f)       /* below it 2^x is taken for 0 */
#define SPARGE_EXP2_ROUNDER 12582912.0f     /* 1.5 * 2^23 */
#define SPARGE_EXP2_C6      0x1.41fbbcp-13f /* 2^f = C6 f^6 + .. + C1 f + 1 */
#define SPARGE_EXP2_C5      0x1.5f3e52p-10f
#define SPARGE_EXP2_C4      0x1.3b2d4cp-7f
#define SPARGE_EXP2_C3      0x1.c6aee8p-5f
#define SPARGE_EXP2_C2      0x1.ebfbdcp-3f
#define SPARGE_EXP2_C1      0x1.62e43p-1f

SPARGE_HD int64_t sparge_min(int64_t a, int64_t b) { return a < b ? a : b; }
SPARGE_HD int64_t sparge_max(int64_t a, int64_t b) { return a > b ? a : b; }
SPARGE_HD int64_t sparge_ceil_div(int64_t a, int64_t b)
{
    return a / b + (a % b != 0);
} /* a >= 0 */

SPARGE_HD uint32_t sparge_float_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

SPARGE_HD float sparge_bits_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

SPARGE_HD bool sparge_finite(float x)
{
    return (sparge_float_bits(x) & 0x7f800000u) != 0x7f800000u;
}

/* Half away from zero, as roundf, for |x| < 2^22. The addend is the float below 1/2: with 1/2
 * itself 0.49999997 would round up. */
SPARGE_HD int32_t sparge_round(float x) { return (int32_t)(x + copysignf(0.49999997f, x)); }

/* 2^x for x <= 0, within 1 ulp and never above 1: 1 at 0, 0 below -126 and at -inf, NaN for NaN.
 * 2^n by the exponent field, 2^f for f in [-1/2, 1/2] by a minimax polynomial of relative error
 * 2e-9 whose constant term is held at 1. Adding the rounder rounds x to its nearest integer, which
 * then stands in the low bits. No branch, so that a loop of it becomes vectors. */
SPARGE_HD float sparge_exp2(float x)
{
    const float inside = x < SPARGE_EXP2_LOWEST ? SPARGE_EXP2_LOWEST : x;
    const float shifted = inside + SPARGE_EXP2_ROUNDER;
    const float f = inside - (shifted - SPARGE_EXP2_ROUNDER);
    float p = SPARGE_EXP2_C6;
    p = fmaf(p, f, SPARGE_EXP2_C5);
    p = fmaf(p, f, SPARGE_EXP2_C4);
    p = fmaf(p, f, SPARGE_EXP2_C3);
    p = fmaf(p, f, SPARGE_EXP2_C2);
    p = fmaf(p, f, SPARGE_EXP2_C1);
    p = fmaf(p, f, 1.0f);
    p *= sparge_bits_float((sparge_float_bits(shifted) + 127u) << 23);
    return x < SPARGE_EXP2_LOWEST ? 0.0f : p;
}

/* A sum in f32 has one order everywhere: term n goes to partial n mod 16, then the partials add
 * up as 8 + 8, 4 + 4, 2 + 2, 1 + 1. */
SPARGE_HD float sparge_sum_of(float partial[16])
{
    for (int half = 8; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            partial[lane] += partial[lane + half];
    return partial[0];
}

SPARGE_HD float sparge_dot(const float *a, const float *b, int64_t n)
{
    float partial[16] = {0};
    int64_t c = 0;
    for (; c + 16 <= n; c += 16)
        for (int lane = 0; lane < 16; lane++)
            partial[lane] = fmaf(a[c + lane], b[c + lane], partial[lane]);
    for (int lane = 0; c + lane < n; lane++)
        partial[lane] = fmaf(a[c + lane], b[c + lane], partial[lane]);
    return sparge_sum_of(partial);
}

/* The mean of n values that have this sum; 0 if there are none. */
SPARGE_HD float sparge_mean(double sum, int64_t n) { return n ? (float)(sum / (double)n) : 0.0f; }

#endif
