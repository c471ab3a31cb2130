/* SPDX-License-Identifier: Apache-2.0 */
/* half.h: IEEE binary16, bfloat16 and e4m3 as bit patterns; widening is exact, narrowing rounds to
 * nearest even, and a NaN stays a NaN. */
#ifndef SPARGE_COMMON_HALF_H
#define SPARGE_COMMON_HALF_H

#include "common/num.h"

SPARGE_HD float sparge_f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest < 0x0400u) /* subnormal: a multiple of 2^-24 */
        return sparge_bits_float(sign | sparge_float_bits((float)rest * 0x1p-24f));
    if (rest >= 0x7c00u)
        return sparge_bits_float(sign | 0x7f800000u | (rest & 0x03ffu) << 13);
    return sparge_bits_float(sign | ((rest << 13) + (112u << 23)));
}

SPARGE_HD uint16_t sparge_f32_to_f16(float x)
{
    const uint32_t bits = sparge_float_bits(x), sign = bits >> 16 & 0x8000u;
    uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (rest >= 0x47800000u) /* 2^16 and more */
        return (uint16_t)(sign | 0x7c00u);
    if (rest < 0x38800000u) /* below 2^-14: 1/2 has the ulp 2^-24, so adding it rounds there */
        return (uint16_t)(sign | (sparge_float_bits(sparge_bits_float(rest) + 0.5f) - 0x3f000000u));
    rest += 0x0fffu + (rest >> 13 & 1u) - (112u << 23);
    return (uint16_t)(sign | rest >> 13);
}

SPARGE_HD float sparge_bf16_to_f32(uint16_t h) { return sparge_bits_float((uint32_t)h << 16); }

SPARGE_HD uint16_t sparge_f32_to_bf16(float x)
{
    const uint32_t bits = sparge_float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x0040u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* e4m3 (Micikevicius et al. 2022): 4 bits of exponent, 3 of fraction, no infinity: 0x7e is 448, and
 * 0x7f and 0xff are NaN. */
SPARGE_HD float sparge_e4m3_to_f32(uint8_t code)
{
    const uint32_t sign = (uint32_t)(code & 0x80u) << 24, rest = code & 0x7fu;
    if (rest < 0x08u) /* subnormal: a multiple of 2^-9 */
        return sparge_bits_float(sign | sparge_float_bits((float)rest * 0x1p-9f));
    if (rest == 0x7fu)
        return sparge_bits_float(sign | 0x7fc00000u);
    return sparge_bits_float(sign | ((rest << 20) + (120u << 23)));
}

/* Saturates at 448, as the conversion of the GPUs does; its one NaN is 0x7f. */
SPARGE_HD uint8_t sparge_f32_to_e4m3(float x)
{
    const uint32_t bits = sparge_float_bits(x), sign = bits >> 24 & 0x80u;
    uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u)
        return 0x7f;
    if (rest >= 0x43e00000u) /* 448 and more */
        return (uint8_t)(sign | 0x7eu);
    if (rest < 0x3c800000u) /* below 2^-6: 2^14 has the ulp 2^-9, so adding it rounds there */
        return (uint8_t)(sign |
                         (sparge_float_bits(sparge_bits_float(rest) + 0x1p14f) - 0x46800000u));
    rest += 0x7ffffu + (rest >> 20 & 1u) - (120u << 23);
    return (uint8_t)(sign | rest >> 20);
}

#endif
