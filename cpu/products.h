/* SPDX-License-Identifier: Apache-2.0 */
/* products.h: the two matrix products in vectors, written once. An instruction set's file includes
 * it after lanes.h and after it has said
 *
 *     f_fma(a, b, c)                  a * b + c, rounded once
 *     i_dot_bytes(c, b, a)            c + the four products of b, unsigned, and a in a lane
 *     WIDTH, HEIGHT                   a tile of integers: vectors across, rows
 *     WIDTH_FLOATS, HEIGHT_FLOATS     a tile of floats
 *
 * and defines the tile of words. A tile is inlined with constant rows and vectors, so that C stays
 * in registers. */
#ifndef SPARGE_CPU_PRODUCTS_H
#define SPARGE_CPU_PRODUCTS_H

#include "cpu/lanes.h"

enum { UNROLL = 2 }; /* steps of depth, which is a multiple of 16 */

/* Where a part of C begins; a column is a vector. */
typedef struct part {
    int64_t row, column;
} part;

/* C = A B, its accumulator initialized. */
INLINE void tile_words(const sparge_product *x, part at, int rows, int vectors,
                       ints c[HEIGHT][WIDTH]);

/* Where a part begins in A, and in B, and how far apart its vectors are there, in bytes. */
INLINE const void *a_of(const sparge_product *x, int64_t row, size_t size)
{
    return (const char *)x->a + (size_t)(row * x->a_stride) * size;
}

INLINE const void *b_of(const sparge_product *x, part at, size_t size)
{
    const int64_t first = at.column * LANES, panel = first / SPARGE_PANEL,
                  lane = first % SPARGE_PANEL;
    return (const char *)x->b + (size_t)(panel * x->b_stride) * size + (size_t)lane * 4;
}

INLINE int64_t b_apart(const sparge_product *x, size_t size)
{
    return (int)LANES < (int)SPARGE_PANEL ? LANES * 4 : x->b_stride * (int64_t)size;
}

/* C = a_init + A B. */
INLINE void tile_bytes(const sparge_product *x, part at, int rows, int vectors,
                       ints c[HEIGHT][WIDTH])
{
    const int8_t *row[HEIGHT];
    const uint8_t *b = b_of(x, at, sizeof *b);
    const int64_t apart = b_apart(x, sizeof *b);
    for (int r = 0; r < rows; r++) {
        row[r] = a_of(x, at.row + r, sizeof **row);
        for (int n = 0; n < vectors; n++)
            c[r][n] = i_all(x->a_init ? x->a_init[at.row + r] : 0);
    }
    for (int64_t e = 0; e < x->depth; e += 4, b += 4 * SPARGE_PANEL)
        for (int r = 0; r < rows; r++) {
            const ints a = i_lane(row[r] + e);
            for (int n = 0; n < vectors; n++)
                c[r][n] = i_dot_bytes(c[r][n], i_load(b + n * apart), a);
        }
}

/* C += A B. */
INLINE void tile_floats(const sparge_product *x, part at, int rows, int vectors,
                        floats c[HEIGHT_FLOATS][WIDTH_FLOATS])
{
    const float *row[HEIGHT_FLOATS], *b = b_of(x, at, sizeof *b);
    const int64_t apart = b_apart(x, sizeof *b) / (int64_t)sizeof *b;
    for (int r = 0; r < rows; r++)
        row[r] = a_of(x, at.row + r, sizeof **row);
    for (const float *end = b + x->depth * SPARGE_PANEL; b < end;)
        for (int u = 0; u < UNROLL; u++, b += SPARGE_PANEL)
            for (int r = 0; r < rows; r++) {
                const floats a = f_all(*row[r]++);
                for (int n = 0; n < vectors; n++)
                    c[r][n] = f_fma(a, f_load(b + n * apart), c[r][n]);
            }
}

/* Where a vector of C [panels][stride] stands. */
INLINE float *c_of(float *c, int64_t stride, part at, int r, int n)
{
    const int64_t lane = (at.column + n) * LANES;
    return c + lane / SPARGE_PANEL * stride + (at.row + r) * SPARGE_PANEL + lane % SPARGE_PANEL;
}

INLINE void store_floats(float *to, int64_t stride, part at, int rows, int vectors,
                         floats c[HEIGHT_FLOATS][WIDTH_FLOATS])
{
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++)
            f_store(c_of(to, stride, at, r, n), c[r][n]);
}

/* ---- S^T = K Q^T ---- */

typedef struct scored {
    float *s;
    int64_t stride;
} scored;

INLINE void score_ints(const scored *to, part at, int rows, int vectors, ints c[HEIGHT][WIDTH])
{
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++)
            f_store(c_of(to->s, to->stride, at, r, n), f_of(c[r][n]));
}

INLINE void score_part_bytes(const sparge_product *x, const void *to, part at, int rows,
                             int vectors)
{
    ints c[HEIGHT][WIDTH];
    tile_bytes(x, at, rows, vectors, c);
    score_ints(to, at, rows, vectors, c);
}

INLINE void score_part_words(const sparge_product *x, const void *to, part at, int rows,
                             int vectors)
{
    ints c[HEIGHT][WIDTH];
    tile_words(x, at, rows, vectors, c);
    score_ints(to, at, rows, vectors, c);
}

INLINE void score_part_floats(const sparge_product *x, const void *into, part at, int rows,
                              int vectors)
{
    const scored *to = into;
    floats c[HEIGHT_FLOATS][WIDTH_FLOATS];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++)
            c[r][n] = f_all(0.0f);
    tile_floats(x, at, rows, vectors, c);
    store_floats(to->s, to->stride, at, rows, vectors, c);
}

/* ---- O^T += V^T P^T ---- */

/* Without the pragmas gcc parks C in memory between the product and this. */
INLINE void fold_ints(const sparge_accumulator *to, bool still, part at, int rows, int vectors,
                      ints c[HEIGHT][WIDTH])
{
    floats shrink[WIDTH], weight[WIDTH];
    for (int n = 0; n < vectors; n++) {
        shrink[n] = f_load(to->shrink + (at.column + n) * LANES);
        weight[n] = f_load(to->weight + (at.column + n) * LANES);
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
    {
        const floats v_scale = f_all(to->v_scale[at.row + r]);
        _Pragma("GCC unroll 8") for (int n = 0; n < vectors; n++)
        {
            float *o = c_of(to->o, to->o_stride, at, r, n);
            floats kept = f_load(o);
            if (!still)
                kept *= shrink[n];
            f_store(o, f_fma(weight[n] * v_scale, f_of(c[r][n]), kept));
        }
    }
}

INLINE void accumulate_ints(const sparge_accumulator *to, part at, int rows, int vectors,
                            ints c[HEIGHT][WIDTH])
{
    if (to->still)
        fold_ints(to, true, at, rows, vectors, c);
    else
        fold_ints(to, false, at, rows, vectors, c);
}

INLINE void pv_part_bytes(const sparge_product *x, const void *to, part at, int rows, int vectors)
{
    ints c[HEIGHT][WIDTH];
    tile_bytes(x, at, rows, vectors, c);
    accumulate_ints(to, at, rows, vectors, c);
}

INLINE void pv_part_words(const sparge_product *x, const void *to, part at, int rows, int vectors)
{
    ints c[HEIGHT][WIDTH];
    tile_words(x, at, rows, vectors, c);
    accumulate_ints(to, at, rows, vectors, c);
}

/* C = O shrunk. */
INLINE void load_floats(const sparge_accumulator *from, part at, int rows, int vectors,
                        floats c[HEIGHT_FLOATS][WIDTH_FLOATS])
{
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++)
            c[r][n] = f_load(c_of(from->o, from->o_stride, at, r, n)) *
                      f_load(from->shrink + (at.column + n) * LANES);
}

INLINE void pv_part_floats(const sparge_product *x, const void *into, part at, int rows,
                           int vectors)
{
    const sparge_accumulator *to = into;
    floats c[HEIGHT_FLOATS][WIDTH_FLOATS];
    load_floats(to, at, rows, vectors, c);
    tile_floats(x, at, rows, vectors, c);
    store_floats(to->o, to->o_stride, at, rows, vectors, c);
}

/* ---- All parts of a product: columns outside, so that their panels stay in L1 while the rows pass
 * ---- */

typedef void part_of_product(const sparge_product *x, const void *to, part at, int rows,
                             int vectors);

/* Parts of a column, and before each its share of what is read next on its way to L2: so many bytes
 * for each of its vectors. */
INLINE int64_t some_rows(const sparge_product *x, const void *to, part_of_product *run, part at,
                         int rows, int vectors, int64_t share)
{
    for (; at.row + rows <= x->rows; at.row += rows) {
        const int64_t first = (at.column * x->rows + at.row * vectors) * share;
        const int64_t end = first + rows * vectors * share;
        for (int64_t byte = first; byte < end; byte += 64)
            __builtin_prefetch((const char *)x->next + byte, 0, 2);
        run(x, to, at, rows, vectors);
    }
    return at.row;
}

INLINE void down(const sparge_product *x, const void *to, part_of_product *run, int height,
                 int64_t column, int vectors, int64_t share)
{
    part at = {0, column};
    at.row = some_rows(x, to, run, at, height, vectors, share);
    if (height > 4)
        at.row = some_rows(x, to, run, at, 4, vectors, share);
    some_rows(x, to, run, at, 2, vectors, share); /* rows are a multiple of 16 */
}

INLINE void product(const sparge_product *x, const void *to, part_of_product *run, int height,
                    int width)
{
    const int64_t columns = x->panels * (SPARGE_PANEL / LANES);
    const int64_t share = x->next_bytes / (x->rows * columns);
    int64_t column = 0;
    for (; column + width <= columns; column += width)
        down(x, to, run, height, column, width, share);
    for (; (int)LANES == (int)SPARGE_PANEL && column < columns; column++)
        down(x, to, run, height, column, 1, share);
}

static void score_bytes(const sparge_product *x, float *s, int64_t s_stride)
{
    product(x, &(scored){s, s_stride}, score_part_bytes, HEIGHT, WIDTH);
}

static void score_words(const sparge_product *x, float *s, int64_t s_stride)
{
    product(x, &(scored){s, s_stride}, score_part_words, HEIGHT, WIDTH);
}

static void score_floats(const sparge_product *x, float *s, int64_t s_stride)
{
    product(x, &(scored){s, s_stride}, score_part_floats, HEIGHT_FLOATS, WIDTH_FLOATS);
}

static void accumulate_pv_bytes(const sparge_product *x, const sparge_accumulator *f)
{
    product(x, f, pv_part_bytes, HEIGHT, WIDTH);
}
static void accumulate_pv_words(const sparge_product *x, const sparge_accumulator *f)
{
    product(x, f, pv_part_words, HEIGHT, WIDTH);
}
static void accumulate_pv_floats(const sparge_product *x, const sparge_accumulator *f)
{
    product(x, f, pv_part_floats, HEIGHT_FLOATS, WIDTH_FLOATS);
}

/* ---- What the units can do at most: as many operations as fit, from registers ---- */

enum { CHAINS = 12 }; /* sums side by side: more than a unit's latency, less than the registers */

static int64_t peak_floats(int64_t rounds)
{
    floats sum[CHAINS], half = f_all(0.5f);
    for (int n = 0; n < CHAINS; n++)
        sum[n] = f_all((float)n);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile(""
                         : "+x"(half)); /* another one each time, for all that the compiler knows */
        _Pragma("GCC unroll 12") for (int n = 0; n < CHAINS; n++) sum[n] =
            f_fma(sum[n], half, half);
    }
    for (int n = 0; n < CHAINS; n++)
        __asm__ volatile("" : : "x"(sum[n])); /* and someone wants the result */
    return rounds * CHAINS * LANES * 2;
}

static int64_t peak_bytes(int64_t rounds)
{
    ints sum[CHAINS], a = i_all(0x01020304);
    for (int n = 0; n < CHAINS; n++)
        sum[n] = i_all(n);
    const ints b = a;
    for (int64_t r = 0; r < rounds; r++)
        _Pragma("GCC unroll 12") for (int n = 0; n < CHAINS; n++)
        {
            __asm__ volatile(
                ""
                : "+x"(a)); /* or the product would be the same, and taken out of the loop */
            sum[n] = i_dot_bytes(sum[n], a, b);
        }
    for (int n = 0; n < CHAINS; n++)
        __asm__ volatile("" : : "x"(sum[n]));
    return rounds * CHAINS * LANES * 4 * 2;
}

#include "cpu/product_table.h"

#endif
