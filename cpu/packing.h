/* SPDX-License-Identifier: Apache-2.0 */
/* packing.h: a block of tokens as a product takes it: A in rows, B in panels, and V transposed, in
 * the layouts of kernels.h. A transpose moves lanes of 32 bits, whatever they hold. In plain C, as
 * plain.h, which includes it. */
#ifndef SPARGE_CPU_PACKING_H
#define SPARGE_CPU_PACKING_H

#include "cpu/kernels.h"

/* ---- A in rows ---- */

/* -(first half . second half), what Winograd's product has too much of. */
static int32_t words_init(const int16_t *row, int64_t half)
{
    int32_t sum = 0;
    for (int64_t c = 0; c < half; c++)
        sum += row[c] * row[half + c];
    return -sum;
}

/* Zero rows up to a multiple of 16. */
static void pad_rows(void *a, int64_t rows, int64_t row_bytes)
{
    memset((char *)a + rows * row_bytes, 0, (size_t)((sparge_padded(rows) - rows) * row_bytes));
}

static void pack_rows_bytes(void *a, int64_t rows, int64_t stride, int32_t *a_init)
{
    pad_rows(a, rows, stride);
    for (int64_t r = 0; r < sparge_padded(rows); r++) {
        int32_t sum = 0;
        for (int64_t c = 0; c < stride; c++)
            sum += ((const int8_t *)a)[r * stride + c];
        a_init[r] = -128 * sum;
    }
}

static void pack_rows_words(void *a, int64_t rows, int64_t stride, int32_t *a_init)
{
    pad_rows(a, rows, stride * (int64_t)sizeof(int16_t));
    for (int64_t r = 0; r < sparge_padded(rows); r++)
        a_init[r] = words_init((const int16_t *)a + r * stride, stride / 2);
}

static void pack_rows_pairs(void *a, int64_t rows, int64_t stride, int32_t *a_init)
{
    (void)a_init;
    pad_rows(a, rows, stride * (int64_t)sizeof(uint16_t));
}

static void pack_rows_floats(void *a, int64_t rows, int64_t stride, int32_t *a_init)
{
    (void)a_init;
    pad_rows(a, rows, stride * (int64_t)sizeof(float));
}

/* ---- Lanes of 32 bits, transposed ---- */

/* Of whatever type its memory is. */
typedef uint32_t any_lane __attribute__((may_alias));
typedef uint32_t lanes_8 __attribute__((vector_size(32), may_alias));
typedef lanes_8 lanes_8_at __attribute__((aligned(1)));

/* Eight rows of eight lanes, `from_apart` lanes from each other. */
static inline void transpose_8(const any_lane *from, int64_t from_apart, any_lane *to,
                               int64_t to_apart)
{
    lanes_8 x[8], y[8];
    for (int r = 0; r < 8; r++)
        x[r] = *(const lanes_8_at *)(from + r * from_apart);
    for (int r = 0; r < 8; r += 2) {
        y[r] = __builtin_shufflevector(x[r], x[r + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[r + 1] = __builtin_shufflevector(x[r], x[r + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int r = 0; r < 8; r++) {
        const lanes_8 low = y[r & ~2], high = y[r | 2];
        x[r] = r & 2 ? __builtin_shufflevector(low, high, 2, 3, 10, 11, 6, 7, 14, 15)
                     : __builtin_shufflevector(low, high, 0, 1, 8, 9, 4, 5, 12, 13);
    }
    for (int r = 0; r < 8; r++) {
        const lanes_8 low = x[r & ~4], high = x[r | 4];
        *(lanes_8_at *)(to + r * to_apart) =
            r & 4 ? __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15)
                  : __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
    }
}

/* Sixteen rows of lanes as columns: lane n of each goes to row n. */
static inline void transpose_16(const any_lane *from, int64_t from_apart, int64_t lanes,
                                any_lane *to, int64_t to_apart)
{
    const int64_t whole = lanes / 8 * 8;
    for (int64_t n = 0; n < whole; n += 8)
        for (int64_t r = 0; r < 16; r += 8)
            transpose_8(from + r * from_apart + n, from_apart, to + n * to_apart + r, to_apart);
    for (int64_t n = whole; n < lanes; n++)
        for (int64_t r = 0; r < 16; r++)
            to[n * to_apart + r] = from[r * from_apart + n];
}

/* Rows t to t + 15, those that are there. */
static inline const any_lane *sixteen_rows(const void *from, int64_t t, int64_t rows, int64_t lanes,
                                           any_lane copy[SPARGE_PANEL * SPARGE_MAX_DIM])
{
    const any_lane *first = (const any_lane *)from + t * lanes;
    if (t + SPARGE_PANEL <= rows)
        return first;
    memset(copy, 0, (size_t)(SPARGE_PANEL * lanes) * sizeof *copy);
    memcpy(copy, first, (size_t)((rows - t) * lanes) * sizeof *copy);
    return copy;
}

/* ---- B in panels ---- */

/* Rows of so many lanes. */
static inline void columns_of_lanes(const void *from, int64_t rows, int64_t lanes, any_lane *to)
{
    any_lane copy[SPARGE_PANEL * SPARGE_MAX_DIM];
    for (int64_t t = 0; t < rows; t += SPARGE_PANEL)
        transpose_16(sixteen_rows(from, t, rows, lanes, copy), lanes, lanes, to + t * lanes,
                     SPARGE_PANEL);
}

static void pack_columns_bytes(const void *from, int64_t rows, int64_t stride, void *b,
                               int32_t *b_init)
{
    any_lane *to = b;
    (void)b_init;
    columns_of_lanes(from, rows, stride / 4, to);
    for (int64_t n = 0; n < sparge_padded(rows) * stride / 4; n++)
        to[n] ^= 0x80808080u; /* q + 128 */
}

static void pack_columns_pairs(const void *from, int64_t rows, int64_t stride, void *b,
                               int32_t *b_init)
{
    (void)b_init;
    columns_of_lanes(from, rows, stride / 2, b);
}

static void pack_columns_words(const void *from, int64_t rows, int64_t stride, void *b,
                               int32_t *b_init)
{
    any_lane copy[SPARGE_PANEL * SPARGE_MAX_DIM];
    for (int64_t t = 0; t < rows; t += SPARGE_PANEL) {
        const any_lane *first = sixteen_rows(from, t, rows, stride / 2, copy);
        any_lane *to = (any_lane *)b + t * stride / 2;
        for (int half = 0; half < 2; half++)
            transpose_16(first + half * stride / 4, stride / 2, stride / 4,
                         to + half * SPARGE_PANEL, 2 * SPARGE_PANEL);
        for (int64_t n = 0; n < SPARGE_PANEL; n++)
            b_init[t + n] = words_init((const int16_t *)(first + n * stride / 2), stride / 2);
    }
}

static void pack_columns_floats(const void *from, int64_t rows, int64_t stride, void *b,
                                int32_t *b_init)
{
    (void)b_init;
    columns_of_lanes(from, rows, stride, b);
}

/* ---- V transposed, sixteen channels at a time ---- */

/* Four bytes of 16 columns, or two words, in lanes; rows from `rows` on are 0. */
static inline void lanes_of_bytes(const int8_t *from, int64_t rows, int64_t stride, any_lane *lane)
{
    static const int8_t zero[SPARGE_PANEL];
    const int8_t *row[4];
    for (int k = 0; k < 4; k++)
        row[k] = k < rows ? from + k * stride : zero;
    for (int c = 0; c < SPARGE_PANEL; c++)
        lane[c] = (uint32_t)(uint8_t)row[0][c] | (uint32_t)(uint8_t)row[1][c] << 8 |
                  (uint32_t)(uint8_t)row[2][c] << 16 | (uint32_t)(uint8_t)row[3][c] << 24;
}

static inline void lanes_of_words(const int16_t *from, int64_t rows, int64_t stride, any_lane *lane)
{
    static const int16_t zero[SPARGE_PANEL];
    const int16_t *first = rows > 0 ? from : zero, *second = rows > 1 ? from + stride : zero;
    for (int c = 0; c < SPARGE_PANEL; c++)
        lane[c] = (uint32_t)(uint16_t)first[c] | (uint32_t)(uint16_t)second[c] << 16;
}

/* Elements of one byte or two: 8 lanes of depth at a time. */
static inline void transpose_elements(const char *from, int64_t rows, int64_t stride, int64_t depth,
                                      char *a, int64_t size)
{
    const int64_t in_lane = 4 / size, step = 8 * in_lane;
    for (int64_t c = 0; c < stride; c += SPARGE_PANEL)
        for (int64_t t = 0; t < depth; t += step) {
            any_lane lane[8][SPARGE_PANEL], to[SPARGE_PANEL][8];
            for (int64_t k = 0; k < 8; k++) {
                const int64_t row = t + k * in_lane;
                const char *first = from + (row * stride + c) * size;
                if (size == 1)
                    lanes_of_bytes((const int8_t *)first, rows - row, stride, lane[k]);
                else
                    lanes_of_words((const int16_t *)first, rows - row, stride, lane[k]);
            }
            for (int64_t n = 0; n < SPARGE_PANEL; n += 8)
                transpose_8(lane[0] + n, SPARGE_PANEL, to[n], 8);
            for (int64_t n = 0; n < SPARGE_PANEL; n++)
                memcpy(a + ((c + n) * depth + t) * size, to[n],
                       (size_t)(sparge_min(step, depth - t) * size));
        }
}

static void pack_transposed_bytes(const void *from, int64_t rows, int64_t stride, int64_t depth,
                                  void *a, int32_t *a_init)
{
    (void)a_init;
    transpose_elements(from, rows, stride, depth, a, 1);
}

static void pack_transposed_pairs(const void *from, int64_t rows, int64_t stride, int64_t depth,
                                  void *a, int32_t *a_init)
{
    (void)a_init;
    transpose_elements(from, rows, stride, depth, a, 2);
}

static void pack_transposed_words(const void *from, int64_t rows, int64_t stride, int64_t depth,
                                  void *a, int32_t *a_init)
{
    transpose_elements(from, rows, stride, depth, a, 2);
    for (int64_t c = 0; c < stride; c++)
        a_init[c] = words_init((const int16_t *)a + c * depth, sparge_padded(rows) / 2);
}

static void pack_transposed_floats(const void *from, int64_t rows, int64_t stride, int64_t depth,
                                   void *a, int32_t *a_init)
{
    (void)a_init;
    for (int64_t t = 0; t < depth; t += SPARGE_PANEL) {
        const int64_t n = sparge_max(0, sparge_min(SPARGE_PANEL, rows - t));
        for (int64_t c = 0; c < stride; c += SPARGE_PANEL) {
            const any_lane *first = (const any_lane *)from + t * stride + c;
            any_lane copy[SPARGE_PANEL][SPARGE_PANEL] = {{0}}, *to = (any_lane *)a + c * depth + t;
            if (n == SPARGE_PANEL) {
                transpose_16(first, stride, SPARGE_PANEL, to, depth);
                continue;
            }
            for (int64_t r = 0; r < n; r++)
                memcpy(copy[r], first + r * stride, sizeof copy[r]);
            transpose_16(copy[0], SPARGE_PANEL, SPARGE_PANEL, to, depth);
        }
    }
}

static void packing_kernels(sparge_kernels *k)
{
    k->pack_rows[SPARGE_BYTES] = pack_rows_bytes;
    k->pack_rows[SPARGE_WORDS] = pack_rows_words;
    k->pack_rows[SPARGE_FLOATS] = pack_rows_floats;
    k->pack_rows[SPARGE_PAIRS] = pack_rows_pairs;
    k->pack_columns[SPARGE_BYTES] = pack_columns_bytes;
    k->pack_columns[SPARGE_WORDS] = pack_columns_words;
    k->pack_columns[SPARGE_FLOATS] = pack_columns_floats;
    k->pack_columns[SPARGE_PAIRS] = pack_columns_pairs;
    k->pack_transposed[SPARGE_BYTES] = pack_transposed_bytes;
    k->pack_transposed[SPARGE_WORDS] = pack_transposed_words;
    k->pack_transposed[SPARGE_FLOATS] = pack_transposed_floats;
    k->pack_transposed[SPARGE_PAIRS] = pack_transposed_pairs;
}

#endif
