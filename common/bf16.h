/* SPDX-License-Identifier: Apache-2.0 */
/* bf16.h: sums of products of bfloat16 in f32, bit for bit as the instructions of x86 compute them.
 * Both round to nearest even, take a subnormal operand for 0 and flush a subnormal result to 0,
 * whatever MXCSR says; they differ in the order of the sum. ref/README.md has the sources. */
#ifndef SPARGE_COMMON_BF16_H
#define SPARGE_COMMON_BF16_H

#include "common/half.h"
#include "sparge.h"

typedef enum sparge_bf16_order {
    SPARGE_VDPBF16PS, /* AVX512-BF16: pair by pair, the odd element before the even one */
    SPARGE_TDPBF16PS, /* AMX-BF16: tile by tile, odd and even elements apart */
} sparge_bf16_order;

static inline bool sparge_uses_bf16(const sparge_options *o)
{
    return o->qk_dtype == SPARGE_BF16 || o->pv_dtype == SPARGE_BF16;
}

enum { SPARGE_BF16_TILE = 32 }; /* elements of depth of one TDPBF16PS */

SPARGE_HD sparge_bf16_order sparge_bf16_order_of(sparge_isa isa)
{
    return isa == SPARGE_ISA_AMX ? SPARGE_TDPBF16PS : SPARGE_VDPBF16PS;
}

/* A subnormal number is 0 of the same sign. */
SPARGE_HD float sparge_bf16_flush(float x) { return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x; }

/* An element of a product, as VCVTNEPS2BF16 rounds it. */
SPARGE_HD uint16_t sparge_bf16_of(float x) { return sparge_f32_to_bf16(sparge_bf16_flush(x)); }

/* a * b + c of operands that are not subnormal. A result is flushed that 24 bits and an exponent
 * without bounds would leave below FLT_MIN: not yet one that only the coarser steps below FLT_MIN
 * round up to it. Where the second line overflows, the first was 0 or is large. */
SPARGE_HD float sparge_bf16_fma(float a, float b, float c)
{
    const float sum = fmaf(a, b, c);
    if (!(fabsf(sum) <= FLT_MIN))
        return sum;
    const float wide = fmaf(a * 0x1p64f, b, c * 0x1p64f);
    return fabsf(wide) < FLT_MIN * 0x1p64f ? copysignf(0.0f, sum) : sum;
}

/* The same of two elements. */
SPARGE_HD float sparge_bf16_step(uint16_t a, uint16_t b, float c)
{
    return sparge_bf16_fma(sparge_bf16_flush(sparge_bf16_to_f32(a)),
                           sparge_bf16_flush(sparge_bf16_to_f32(b)), c);
}

/* One VDPBF16PS: c plus the products of a pair. Only `left` elements are there, 1 or 2. */
SPARGE_HD float sparge_bf16_pair(float c, const uint16_t *a, const uint16_t *b, int64_t stride,
                                 int64_t left)
{
    const float sum = sparge_bf16_flush(c);
    return sparge_bf16_step(a[0], b[0], left > 1 ? sparge_bf16_step(a[1], b[stride], sum) : sum);
}

/* One TDPBF16PS: c plus the products of a tile. Only `left` elements are there, 1 or more. */
SPARGE_HD float sparge_bf16_tile(float c, const uint16_t *a, const uint16_t *b, int64_t stride,
                                 int64_t left)
{
    float sum[2] = {0.0f, 0.0f}; /* of even and of odd elements */
    for (int64_t e = 0; e < left && e < SPARGE_BF16_TILE; e++)
        sum[e % 2] = sparge_bf16_step(a[e], b[e * stride], sum[e % 2]);
    const float both = sparge_bf16_fma(sum[0], 1.0f, sum[1]);
    return sparge_bf16_fma(sparge_bf16_flush(c), 1.0f, both);
}

/* c + the sum of a[e] * b[e * stride] over n elements. A pair or a tile that is not full may be
 * filled up with zeros: that changes no more than the sign of a zero. */
SPARGE_HD float sparge_bf16_dot(float c, const uint16_t *a, const uint16_t *b, int64_t stride,
                                int64_t n, sparge_bf16_order order)
{
    if (order == SPARGE_VDPBF16PS)
        for (int64_t e = 0; e < n; e += 2)
            c = sparge_bf16_pair(c, a + e, b + e * stride, stride, n - e);
    else
        for (int64_t e = 0; e < n; e += SPARGE_BF16_TILE)
            c = sparge_bf16_tile(c, a + e, b + e * stride, stride, n - e);
    return c;
}

#endif
