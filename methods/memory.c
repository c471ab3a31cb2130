/* SPDX-License-Identifier: Apache-2.0 */
/* memory.c: pieces that are freed together, and what is kept from call to call. */
#include <stdlib.h>
#include <string.h>

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

/* ---- State ---- */

/* Before what is kept. */
typedef struct header {
    const char *method;
    int64_t heads, bytes;
} header;

sparge_status sparge_state(sparge_plan *plan, const sparge_context *context, const char *method,
                           int64_t bytes, bool *fresh, void **state, sparge_error *error)
{
    const int64_t heads = plan->problem.heads;
    header *kept = context->state ? *context->state : NULL;
    if (fresh)
        *fresh = !kept;
    if (!kept) {
        const size_t size = sizeof *kept + (size_t)bytes;
        kept = context->state ? calloc(1, size) : sparge_take(&plan->memory, (int64_t)size, 1);
        if (!kept)
            return SPARGE_ERR_MEMORY;
        *kept = (header){method, heads, bytes};
        if (context->state)
            *context->state = kept;
    }
    if (strcmp(kept->method, method) != 0 || kept->heads != heads || kept->bytes != bytes)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "state is of %s with %lld heads and %lld bytes, this call is of %s with "
                           "%lld and %lld",
                           kept->method, (long long)kept->heads, (long long)kept->bytes, method,
                           (long long)heads, (long long)bytes);
    *state = kept + 1;
    return SPARGE_OK;
}
