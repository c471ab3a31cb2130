/* SPDX-License-Identifier: Apache-2.0 */
/* memory.c: pieces that are freed together. */
#include <stdlib.h>

#include "methods/method.h"

struct sparge_piece {
    sparge_piece *next;
    max_align_t data[];
};

void *sparge_take(sparge_piece **pieces, int64_t count, size_t size)
{
    if ((uint64_t)count > (uint64_t)PTRDIFF_MAX / 2 / size)
        return NULL;
    sparge_piece *piece = calloc(1, sizeof *piece + (size_t)count * size);
    if (!piece)
        return NULL;
    piece->next = *pieces;
    *pieces = piece;
    return piece->data;
}

void sparge_release(sparge_piece **pieces)
{
    while (*pieces) {
        sparge_piece *piece = *pieces;
        *pieces = piece->next;
        free(piece);
    }
}
