/* SPDX-License-Identifier: Apache-2.0 */
/* element.h: the caller's arrays, in F32, F16 or BF16. */
#ifndef SPARGE_COMMON_ELEMENT_H
#define SPARGE_COMMON_ELEMENT_H

#include "common/half.h"
#include "sparge.h"

SPARGE_HD int64_t sparge_element_size(sparge_dtype dtype) { return dtype == SPARGE_F32 ? 4 : 2; }

/* Of a type of 16 bits. */
SPARGE_HD float sparge_widen(uint16_t bits, sparge_dtype dtype)
{
    return dtype == SPARGE_F16 ? sparge_f16_to_f32(bits) : sparge_bf16_to_f32(bits);
}

/* To a type of 16 bits. */
SPARGE_HD uint16_t sparge_narrow(float x, sparge_dtype dtype)
{
    return dtype == SPARGE_F16 ? sparge_f32_to_f16(x) : sparge_f32_to_bf16(x);
}

SPARGE_HD float sparge_element_load(const void *data, sparge_dtype dtype, int64_t at)
{
    return dtype == SPARGE_F32 ? ((const float *)data)[at]
                               : sparge_widen(((const uint16_t *)data)[at], dtype);
}

/* A zero has no sign. */
SPARGE_HD void sparge_element_store(void *data, sparge_dtype dtype, int64_t at, float x)
{
    if (dtype == SPARGE_F32)
        ((float *)data)[at] = x + 0.0f;
    else
        ((uint16_t *)data)[at] = sparge_narrow(x + 0.0f, dtype);
}

/* The place of a row: its first element. */
SPARGE_HD int64_t sparge_in_row(const sparge_in *in, int64_t batch, int64_t head, int64_t token)
{
    return batch * in->batch + head * in->head + token * in->token;
}

SPARGE_HD int64_t sparge_out_row(const sparge_out *out, int64_t batch, int64_t head, int64_t token)
{
    return batch * out->batch + head * out->head + token * out->token;
}

#endif
