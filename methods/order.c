/* SPDX-License-Identifier: Apache-2.0 */
/* order.c: orders that bring tokens together which belong together. */
#include <string.h>

#include "methods/method.h"

void sparge_order_patches(const sparge_grid *grid, int64_t t, int64_t h, int64_t w, int64_t *index)
{
    const int64_t before = grid->text_before, tokens = grid->t * grid->h * grid->w;
    int64_t *place = index;
    for (int64_t n = 0; n < before; n++)
        *place++ = n;
    for (int64_t t0 = 0; t0 < grid->t; t0 += t)
        for (int64_t h0 = 0; h0 < grid->h; h0 += h)
            for (int64_t w0 = 0; w0 < grid->w; w0 += w)
                for (int64_t a = t0; a < sparge_min(t0 + t, grid->t); a++)
                    for (int64_t b = h0; b < sparge_min(h0 + h, grid->h); b++)
                        for (int64_t c = w0; c < sparge_min(w0 + w, grid->w); c++)
                            *place++ = before + (a * grid->h + b) * grid->w + c;
    for (int64_t n = 0; n < grid->text_after; n++)
        *place++ = before + tokens + n;
}

void sparge_order_residues(int64_t len, int64_t stride, int64_t *index)
{
    for (int64_t r = 0; r < stride; r++)
        for (int64_t t = r; t < len; t += stride)
            *index++ = t;
}

/* The center that is nearest to x; of equals the first. The squared length of x is the same for
 * all. */
static int64_t nearest(const float *x, const float *center, const float *square, int64_t clusters,
                       int64_t dim)
{
    int64_t best = 0;
    float least = INFINITY;
    for (int64_t n = 0; n < clusters; n++) {
        const float far = square[n] - 2.0f * sparge_method_dot(x, center + n * dim, dim);
        if (far < least) {
            least = far;
            best = n;
        }
    }
    return best;
}

/* Moves each center to the mean of its rows; one without rows stays. */
static void move_centers(const float *x, int64_t len, int64_t dim, const int64_t *label,
                         int64_t clusters, const int64_t *size, float *center)
{
    for (int64_t n = 0; n < clusters; n++)
        if (size[n])
            memset(center + n * dim, 0, (size_t)dim * sizeof *center);
    for (int64_t t = 0; t < len; t++)
        for (int64_t c = 0; c < dim; c++)
            center[label[t] * dim + c] += x[t * dim + c] / (float)size[label[t]];
}

sparge_status sparge_order_clusters(const float *x, int64_t len, int64_t dim, int64_t clusters,
                                    int rounds, int64_t *index, int64_t *size)
{
    sparge_piece *memory = NULL;
    float *center = sparge_take(&memory, clusters * dim, sizeof *center),
          *square = sparge_take(&memory, clusters, sizeof *square);
    int64_t *label = sparge_take(&memory, len + 1, sizeof *label);
    if (!center || !square || !label) {
        sparge_release(&memory);
        return SPARGE_ERR_MEMORY;
    }
    for (int64_t n = 0; n < clusters && len; n++)
        memcpy(center + n * dim, x + n * len / clusters * dim, (size_t)dim * sizeof *x);
    for (int round = 0; round <= rounds; round++) {
        if (round > 0)
            move_centers(x, len, dim, label, clusters, size, center);
        memset(size, 0, (size_t)clusters * sizeof *size);
        for (int64_t n = 0; n < clusters; n++)
            square[n] = sparge_method_dot(center + n * dim, center + n * dim, dim);
        for (int64_t t = 0; t < len; t++) {
            label[t] = nearest(x + t * dim, center, square, clusters, dim);
            size[label[t]]++;
        }
    }
    for (int64_t n = 0; n < clusters; n++)
        for (int64_t t = 0; t < len; t++)
            if (label[t] == n)
                *index++ = t;
    sparge_release(&memory);
    return SPARGE_OK;
}

sparge_status sparge_order_segments(const float *score, int64_t len, int64_t segment,
                                    int64_t *index)
{
    sparge_piece *memory = NULL;
    sparge_ranked *x = sparge_take(&memory, segment + 1, sizeof *x);
    if (!x)
        return SPARGE_ERR_MEMORY;
    for (int64_t first = 0; first < len; first += segment) {
        const int64_t some = sparge_block_rows(len, segment, first / segment);
        for (int64_t n = 0; n < some; n++)
            x[n] = (sparge_ranked){score[first + n], first + n};
        if (some == segment)
            sparge_rank(x, some);
        for (int64_t n = 0; n < some; n++)
            index[first + n] = x[n].at;
    }
    sparge_release(&memory);
    return SPARGE_OK;
}
