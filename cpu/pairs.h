/* SPDX-License-Identifier: Apache-2.0 */
/* pairs.h: products of bf16 by AVX512-BF16. These functions alone hold its instruction, and run
 * where options ask for bf16, which the processor has then. */
#ifndef SPARGE_CPU_PAIRS_H
#define SPARGE_CPU_PAIRS_H

#include "cpu/products.h"

#define BF16 __attribute__((target("avx512bf16")))

/* C += A B. */
INLINE BF16 void tile_pairs(const sparge_product *x, part at, int rows, int vectors,
                            floats c[HEIGHT_FLOATS][WIDTH_FLOATS])
{
    const uint16_t *row[HEIGHT_FLOATS], *b = b_of(x, at, sizeof *b);
    const int64_t apart = b_apart(x, sizeof *b) / (int64_t)sizeof *b;
    for (int r = 0; r < rows; r++)
        row[r] = a_of(x, at.row + r, sizeof **row);
    for (int64_t e = 0; e < x->depth; e += 2, b += 2 * SPARGE_PANEL)
        for (int r = 0; r < rows; r++) {
            const ints a = i_lane(row[r] + e);
            for (int n = 0; n < vectors; n++)
                c[r][n] = _mm512_dpbf16_ps(c[r][n], (__m512bh)i_load(b + n * apart), (__m512bh)a);
        }
}

INLINE BF16 void score_part_pairs(const sparge_product *x, const void *into, part at, int rows,
                                  int vectors)
{
    const scored *to = into;
    floats c[HEIGHT_FLOATS][WIDTH_FLOATS];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++)
            c[r][n] = f_all(0.0f);
    tile_pairs(x, at, rows, vectors, c);
    store_floats(to->s, to->stride, at, rows, vectors, c);
}

INLINE BF16 void pv_part_pairs(const sparge_product *x, const void *into, part at, int rows,
                               int vectors)
{
    const sparge_accumulator *to = into;
    floats c[HEIGHT_FLOATS][WIDTH_FLOATS];
    load_floats(to, at, rows, vectors, c);
    tile_pairs(x, at, rows, vectors, c);
    store_floats(to->o, to->o_stride, at, rows, vectors, c);
}

static BF16 void score_pairs(const sparge_product *x, float *s, int64_t s_stride)
{
    product(x, &(scored){s, s_stride}, score_part_pairs, HEIGHT_FLOATS, WIDTH_FLOATS);
}

static BF16 void accumulate_pv_pairs(const sparge_product *x, const sparge_accumulator *f)
{
    product(x, f, pv_part_pairs, HEIGHT_FLOATS, WIDTH_FLOATS);
}

static void pair_kernels(sparge_kernels *k)
{
    k->score[SPARGE_PAIRS] = score_pairs;
    k->accumulate_pv[SPARGE_PAIRS] = accumulate_pv_pairs;
}

#endif
