/* SPDX-License-Identifier: Apache-2.0 */
/* sparge_order.h: orders for the tokens of images and video (Sec 3.7), and moving rows by them. */
#ifndef SPARGE_ORDER_H
#define SPARGE_ORDER_H

#include "sparge.h"

SPARGE_BEGIN_DECLS

typedef enum sparge_order {
    SPARGE_ROW_MAJOR,    /* W fastest, then H, then T: a packed [t][h][w] array */
    SPARGE_COLUMN_MAJOR, /* H fastest, then W, then T */
    SPARGE_TIME_MAJOR,   /* T fastest, then W, then H */
    SPARGE_RANDOM,
    SPARGE_HILBERT, /* for boxes of any size */
} sparge_order;

/* A sequence as it arrives: text, t * h * w tokens in row-major order, text. */
typedef struct sparge_grid {
    int64_t t, h, w;                 /* sides, at least 0 */
    int64_t text_before, text_after; /* tokens that keep their place, at least 0 */
} sparge_grid;

const char *sparge_order_string(sparge_order order); /* the word of the command line */

/* Writes a permutation of 0 .. text_before + t * h * w + text_after - 1. index[p] is the arriving
 * number of the token at place p. Only SPARGE_RANDOM depends on the seed. */
sparge_status sparge_token_order(sparge_order order, const sparge_grid *grid, uint64_t seed,
                                 int64_t *index, sparge_error *error);

/* to[b][h][p][:] = from[b][h][index[p]][:]. Both views have the same dtype and do not overlap.
 * index is a permutation of 0 .. len - 1. */
sparge_status sparge_permute(const sparge_in *from, const sparge_out *to, int64_t batch,
                             int64_t heads, int64_t len, int64_t dim, const int64_t *index,
                             sparge_error *error);

/* The inverse: to[b][h][index[p]][:] = from[b][h][p][:]. */
sparge_status sparge_unpermute(const sparge_in *from, const sparge_out *to, int64_t batch,
                               int64_t heads, int64_t len, int64_t dim, const int64_t *index,
                               sparge_error *error);

SPARGE_END_DECLS

#endif
