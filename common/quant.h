/* SPDX-License-Identifier: Apache-2.0 */
/* quant.h: numbers as codes times a scale (Algorithm 1 line 3; SageAttention). The codes of P are
 * softmax.h's. */
#ifndef SPARGE_COMMON_QUANT_H
#define SPARGE_COMMON_QUANT_H

#include "common/half.h"
#include "sparge.h"

#define SPARGE_E4M3_MAX 448

/* P is e4m3(256 p) / 256: 256 p stays below 448, and reaches down to weights of 2^-18. */
#define SPARGE_P_FP8_SCALE 256.0f

/* Codes are from -qmax to qmax, those of P from 0; 0: there are none. Those of int12 let sums of
 * 256 products of Q and K, and of 128 of P and V, fit in 32 bits. */
SPARGE_HD int sparge_qk_qmax(sparge_dtype dtype)
{
    return dtype == SPARGE_INT8 ? 127 : dtype == SPARGE_INT12 ? 2047 : 0;
}

SPARGE_HD int sparge_pv_qmax(sparge_dtype dtype)
{
    return dtype == SPARGE_INT8 ? 127 : dtype == SPARGE_INT12 ? 4095 : 0;
}

/* What code 1 stands for if `max`, the largest magnitude, gets the code qmax. It is 0, and so is
 * every code, if it would be subnormal. */
SPARGE_HD float sparge_quant_scale(float max, int qmax)
{
    const float scale = max / (float)qmax;
    return scale < FLT_MIN ? 0.0f : scale;
}

/* 1 / scale, by which x / scale is nearly a product; 0 under a scale of 0. */
SPARGE_HD float sparge_quant_inverse(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

/* x / scale; 0 under a scale of 0. No branch, so that a loop of it becomes vectors. */
SPARGE_HD float sparge_quant_ratio(float x, float scale)
{
    return x / (scale > 0.0f ? scale : INFINITY);
}

/* The code of x, from -qmax to qmax. */
SPARGE_HD int32_t sparge_quant_code(float x, float scale, int qmax)
{
    const int32_t code = sparge_round(sparge_quant_ratio(x, scale));
    const int32_t above = code < -qmax ? -qmax : code;
    return above > qmax ? qmax : above;
}

/* What a product of two rows of codes is multiplied by to be a score in log2 units. */
SPARGE_HD float sparge_score_scale(float q_scale, float k_scale, float softmax_scale)
{
    return q_scale * k_scale * softmax_scale * SPARGE_LOG2E;
}

/* Is an element finite in a product of this type? The 16-bit types round to infinity from the
 * middle of their largest number and the next power of 2 on. */
SPARGE_HD bool sparge_value_is_finite(float x, sparge_dtype dtype)
{
    return dtype == SPARGE_F16    ? fabsf(x) < 65520.0f
           : dtype == SPARGE_BF16 ? fabsf(x) < 0x1.ffp127f
                                  : sparge_finite(x);
}

#endif
