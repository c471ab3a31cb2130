/* SPDX-License-Identifier: Apache-2.0 */
/* amx_shim.h: AMX's tiles in memory and its instructions in plain C, bit for bit, in place of
   cpu/tiles.h, so that cpu/amx.c runs on machines that lack them: gcc -mavx512f ... -include
   tests/cpu/amx_shim.h cpu/amx.c */
#ifndef SPARGE_TESTS_AMX_SHIM_H
#define SPARGE_TESTS_AMX_SHIM_H
#define SPARGE_CPU_TILES_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Of a thread, in every file of a program that includes this. A tile that is not configured ends
   the program, as the processor does. */
struct shim_tiles {
    struct {
        uint8_t palette, none[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config;
    char tile[8][16][64];
};
__attribute__((weak)) _Thread_local struct shim_tiles shim;

static inline void shim_use(int t)
{
    if (shim.config.palette != 1 || !shim.config.rows[t] || !shim.config.row_bytes[t])
        abort();
}

static inline void shim_zero(int t)
{
    shim_use(t);
    memset(shim.tile[t], 0, sizeof shim.tile[t]);
}

static inline void shim_config(const void *from)
{
    memset(&shim, 0, sizeof shim);
    if (from)
        memcpy(&shim.config, from, sizeof shim.config);
}

static inline void shim_load(int t, const char *from, int64_t stride)
{
    shim_zero(t);
    for (int r = 0; r < shim.config.rows[t]; r++)
        memcpy(shim.tile[t][r], from + r * stride, shim.config.row_bytes[t]);
}

static inline void shim_store(int t, char *to, int64_t stride)
{
    shim_use(t);
    for (int r = 0; r < shim.config.rows[t]; r++)
        memcpy(to + r * stride, shim.tile[t][r], shim.config.row_bytes[t]);
}

/* Both products are of the sizes that A, B and C are configured for, which must fit. */
static inline void shim_fit(int c, int a, int b)
{
    shim_use(a), shim_use(b), shim_use(c);
    if (shim.config.rows[a] != shim.config.rows[c] ||
        shim.config.row_bytes[a] != 4 * shim.config.rows[b] ||
        shim.config.row_bytes[b] != shim.config.row_bytes[c])
        abort();
}

static inline void shim_dp_bytes(int c, int a, int b)
{
    shim_fit(c, a, b);
    const int columns = shim.config.row_bytes[c] / 4;
    for (int m = 0; m < shim.config.rows[c]; m++) {
        const int8_t *of_a = (const int8_t *)shim.tile[a][m];
        uint32_t sum[16];
        memcpy(sum, shim.tile[c][m], sizeof sum);
        for (int k = 0; k < shim.config.rows[b]; k++)
            for (int n = 0; n < columns; n++)
                for (int i = 0; i < 4; i++)
                    sum[n] +=
                        (uint32_t)(of_a[4 * k + i] * ((const uint8_t *)shim.tile[b][k])[4 * n + i]);
        memcpy(shim.tile[c][m], sum, sizeof sum);
    }
}

/* As Intel's manual has it (Software Developer's Manual, volume 2, TDPBF16PS): even and odd places
   apart, each by multiply-adds in the order of k, from 0; their sum to C. Every step rounds to
   nearest even and takes and gives 0 for subnormal numbers, which MXCSR's DAZ and FTZ do here. */
__attribute__((noinline)) static void shim_bf16_row(const uint16_t *a, int b, int depth,
                                                    int columns, float *c)
{
    float sum[2][16] = {{0}};
    for (int k = 0; k < depth; k++)
        for (int n = 0; n < columns; n++)
            for (int i = 0; i < 2; i++) {
                const uint32_t bits[2] = {(uint32_t)a[2 * k + i] << 16,
                                          (uint32_t)((const uint16_t *)shim.tile[b][k])[2 * n + i]
                                              << 16};
                float x[2];
                memcpy(x, bits, sizeof x);
                sum[i][n] = fmaf(x[0], x[1], sum[i][n]);
            }
    for (int n = 0; n < columns; n++)
        c[n] += sum[0][n] + sum[1][n];
}

static inline void shim_dp_bf16(int c, int a, int b)
{
    shim_fit(c, a, b);
    const unsigned caller = _mm_getcsr();
    _mm_setcsr(0x9fc0); /* FTZ, no traps, to nearest even, DAZ */
    for (int m = 0; m < shim.config.rows[c]; m++)
        shim_bf16_row((const uint16_t *)shim.tile[a][m], b, shim.config.rows[b],
                      shim.config.row_bytes[c] / 4, (float *)shim.tile[c][m]);
    _mm_setcsr(caller);
}

#define TILE_CONFIG(p)              shim_config(p)
#define TILE_RELEASE()              shim_config(NULL)
#define TILE_ZERO(t)                shim_zero(t)
#define TILE_LOAD(t, base, stride)  shim_load(t, (const char *)(base), stride)
#define TILE_STORE(t, base, stride) shim_store(t, (char *)(base), stride)
#define TILE_DP_BYTES(c, a, b)      shim_dp_bytes(c, a, b)
#define TILE_DP_BF16(c, a, b)       shim_dp_bf16(c, a, b)

#endif
