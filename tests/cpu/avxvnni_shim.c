/* SPDX-License-Identifier: Apache-2.0 */
/* avxvnni_shim.c: tests/cpu/avxvnni_shim.h against plain arithmetic, from the extremes inwards.
   Built with -mavx2. */
#include "tests/cpu/avxvnni_shim.h"
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

int main(void)
{
    for (int round = 0; round < 100000; round++) {
        union {
            __m256i all;
            uint8_t u8[32];
            int8_t s8[32];
            int16_t s16[16];
            uint32_t u32[8];
        } a, b, sum, bytes, words;
        for (int i = 0; i < 32; i++) {
            a.u8[i] = round < 4 ? 255 : draw_byte();
            b.u8[i] = round < 4 ? (round % 2 ? 127 : 128) : draw_byte();
        }
        for (int i = 0; i < 16 && (round == 2 || round == 3); i++)
            a.s16[i] = b.s16[i] = INT16_MIN;
        for (int i = 0; i < 8; i++)
            sum.u32[i] = round % 3 == 0 ? INT32_MAX : round % 3 == 1 ? (uint32_t)INT32_MIN : draw();
        bytes.all = _mm256_dpbusd_avx_epi32(sum.all, a.all, b.all);
        words.all = _mm256_dpwssd_avx_epi32(sum.all, a.all, b.all);
        for (int i = 0; i < 8; i++) {
            uint32_t from_bytes = sum.u32[i], from_words = sum.u32[i];
            for (int j = 4 * i; j < 4 * i + 4; j++)
                from_bytes += (uint32_t)(a.u8[j] * b.s8[j]);
            for (int j = 2 * i; j < 2 * i + 2; j++)
                from_words += (uint32_t)(a.s16[j] * b.s16[j]);
            if (bytes.u32[i] != from_bytes || words.u32[i] != from_words) {
                printf("avxvnni_shim: differs in round %d, lane %d\n", round, i);
                return 1;
            }
        }
    }
    return 0;
}
