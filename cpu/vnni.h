/* SPDX-License-Identifier: Apache-2.0 */
/* vnni.h: the tile of words by the dot products of VNNI, on vectors of any length. Included after
 *
 *     i_dot_words(c, b, a)            c + the two products of signed words in a lane */
#ifndef SPARGE_CPU_VNNI_H
#define SPARGE_CPU_VNNI_H

#include "cpu/products.h"

/* The direct product has no excess, and so no use for a_init and b_init. */
INLINE void tile_words(const sparge_product *x, part at, int rows, int vectors,
                       ints c[HEIGHT][WIDTH])
{
    const int64_t half = x->depth / 2,
                  apart = b_apart(x, sizeof(int16_t)) / (int64_t)sizeof(int16_t);
    const int16_t *row[HEIGHT], *b = b_of(x, at, sizeof *b);
    for (int r = 0; r < rows; r++) {
        row[r] = a_of(x, at.row + r, sizeof **row);
        for (int n = 0; n < vectors; n++)
            c[r][n] = i_all(0);
    }
    for (int64_t e = 0; e < half; e += 2)
        for (int64_t at_half = e; at_half < x->depth; at_half += half, b += 2 * SPARGE_PANEL)
            for (int r = 0; r < rows; r++)
                for (int n = 0; n < vectors; n++)
                    c[r][n] = i_dot_words(c[r][n], i_load(b + n * apart), i_lane(row[r] + at_half));
}

/* Q and K of 8 bits are bytes too: the product is right for any unsigned B. */
static void vnni_kernels(sparge_kernels *k, sparge_isa isa)
{
    product_kernels(k, isa);
    k->int8_scores = SPARGE_BYTES;
}

#endif
