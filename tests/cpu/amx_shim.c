/* SPDX-License-Identifier: Apache-2.0 */
/* amx_shim.c: tests/cpu/amx_shim.h against plain arithmetic: tiles of any size, bytes from the
   extremes inwards, sums that wrap, and pairs of bf16 around the smallest normal number. */
#include "tests/cpu/amx_shim.h"
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

static uint64_t state = 1;

static uint32_t draw(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

/* Half of them at the ends, where products that saturate, or signs that are mistaken, show. */
static uint8_t draw_byte(void)
{
    static const uint8_t ends[] = {0, 1, 127, 128, 129, 255};
    const uint32_t word = draw();
    return word & 1 ? ends[(word >> 1) % sizeof ends] : (uint8_t)(word >> 8);
}

/* Around 2^-63, so that products lie around 2^-126; one in eight is subnormal, or 2^-7 to 1. */
static uint16_t draw_bf16(void)
{
    const uint32_t word = draw(), sign = word & 0x8000, digits = word & 0x7f;
    const uint32_t exponent = word >> 28 == 0   ? 0
                              : word >> 28 == 1 ? 120 + (word >> 16 & 7)
                                                : 62 + (word >> 16 & 3);
    return (uint16_t)(sign | exponent << 7 | digits);
}

static double of_bf16(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return (x & 0x7f80) == 0 ? copysign(0.0, (double)f) : (double)f;
}

/* x, which is exact, to 24 digits, and 0 of its sign if that is below 2^-126. */
static float rounded(long double x)
{
    const float far = (float)ldexpl(x, 64); /* far from the subnormal numbers */
    return fabsf(far) < 0x1p-62f ? copysignf(0.0f, far) : ldexpf(far, -64);
}

enum { PITCH = 80, MARGIN = 5 };
typedef union memory {
    uint8_t byte[16 * PITCH + MARGIN];
    uint32_t word[4];
} memory;

/* Of three tiles, t with so many rows and bytes a row; the palette is 1. */
static void configure(const int rows[3], const int bytes[3])
{
    uint8_t config[64] = {1};
    for (int t = 0; t < 3; t++) {
        config[16 + 2 * t] = (uint8_t)bytes[t];
        config[48 + t] = (uint8_t)rows[t];
    }
    TILE_CONFIG(config);
}

static uint32_t c_plain_bytes(uint32_t c, const uint8_t *a, const uint8_t *b, int depth)
{
    for (int k = 0; k < depth; k++)
        for (int i = 0; i < 4; i++)
            c += (uint32_t)((int8_t)a[4 * k + i] * b[k * PITCH + i]);
    return c;
}

static float c_plain_bf16(float c, const uint8_t *a, const uint8_t *b, int depth)
{
    float sum[2] = {0};
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < depth; k++) {
            uint16_t x, y;
            memcpy(&x, a + 4 * k + 2 * i, 2);
            memcpy(&y, b + k * PITCH + 2 * i, 2);
            sum[i] = rounded((long double)(of_bf16(x) * of_bf16(y)) + (long double)sum[i]);
        }
    const float both = rounded((long double)sum[0] + (long double)sum[1]);
    const float from = fabsf(c) < 0x1p-126f ? copysignf(0.0f, c) : c;
    return rounded((long double)from + (long double)both);
}

static void fill(memory *m, bool bf16)
{
    for (size_t n = 0; n + 1 < sizeof m->byte; n += 2) {
        const uint16_t pair = draw_bf16();
        if (bf16)
            memcpy(m->byte + n, &pair, 2);
        else
            m->byte[n] = draw_byte(), m->byte[n + 1] = draw_byte();
    }
}

/* C += A B in tiles 2, 0, 1, or is 0, and is stored over other bytes. */
static bool round_is_right(int round)
{
    static memory a, b, c, got;
    const bool bf16 = round % 2;
    const int m = 1 + (int)(draw() % 16), n = 1 + (int)(draw() % 16), k = 1 + (int)(draw() % 16);
    fill(&a, bf16);
    fill(&b, bf16);
    fill(&c, bf16);
    for (size_t at = 0; bf16 && at + 4 <= sizeof c.byte; at += 4) { /* a float around 2^-126 */
        const uint32_t word = draw(), bits = (word & 0x807fffff) | (word >> 23 & 3) << 23;
        memcpy(c.byte + at, &bits, 4);
    }
    configure((const int[]){m, k, m}, (const int[]){4 * k, 4 * n, 4 * n});
    TILE_LOAD(0, a.byte, PITCH);
    TILE_LOAD(1, b.byte, PITCH);
    TILE_LOAD(2, c.byte, PITCH);
    if (round % 16 == 0)
        TILE_ZERO(2);
    if (bf16)
        TILE_DP_BF16(2, 0, 1);
    else
        TILE_DP_BYTES(2, 0, 1);
    memset(&got, 0x5a, sizeof got);
    TILE_STORE(2, got.byte, PITCH);
    for (int r = 0; r < 16; r++)
        for (int e = 0; e < PITCH / 4; e++) {
            uint32_t want = 0x5a5a5a5a, is;
            float was;
            memcpy(&was, c.byte + r * PITCH + 4 * e, 4);
            if (r < m && e < n && bf16) {
                was = c_plain_bf16(was, a.byte + r * PITCH, b.byte + 4 * e, k);
                memcpy(&want, &was, 4);
            } else if (r < m && e < n) {
                memcpy(&want, &was, 4);
                want = c_plain_bytes(round % 16 ? want : 0, a.byte + r * PITCH, b.byte + 4 * e, k);
            }
            memcpy(&is, got.byte + r * PITCH + 4 * e, 4);
            if (is != want) {
                printf("amx_shim: differs in round %d, row %d, column %d: %08x, not %08x\n", round,
                       r, e, is, want);
                return false;
            }
        }
    return true;
}

int main(void)
{
    for (int round = 0; round < 20000; round++)
        if (!round_is_right(round))
            return 1;
    TILE_RELEASE();
    if (shim.config.palette || shim.config.rows[0]) {
        printf("amx_shim: not released\n");
        return 1;
    }
    return 0;
}
