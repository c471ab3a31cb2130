/* rows.h: what every kernel does to a row of scores: lambda's vote, the running maximum, weights.
 */
#ifndef SPARGE_GPU_ROWS_H
#define SPARGE_GPU_ROWS_H

#include "gpu/work.h"

namespace sparge {

/* How many keys of block j row r may see: the first ones. */
SPARGE_DEVICE int keys_of_row(const work &w, const query_block &q, int r, int64_t j)
{
    if (r >= q.rows)
        return 0;
    return (int)sparge_min(sparge_keys_visible(&w.g, q.first + r, j), w.g.k_len - j * BLOCK_K);
}

/* ---- Lambda (Algorithm 1 lines 14-16): a group of rows skips a block that none of them comes near
 * ---- */

/* In shared memory: bit 0 where a row of the group sees a key, bit 1 where one comes near its
 * maximum. */
struct votes {
    uint32_t group[BLOCK_Q];
};

SPARGE_DEVICE void vote(const work &w, votes &v, int r, float gap, float lambda)
{
    if (gap > -INFINITY)
        atomicOr(&v.group[r / w.skip_rows], sparge_group_skips(gap, lambda) ? 1u : 2u);
}

/* Called by all threads of the block between two of its barriers; then each asks for its rows. */
SPARGE_DEVICE bool voted_to_skip(const work &w, const votes &v, int r)
{
    return v.group[r / w.skip_rows] == 1u;
}

/* The whole vote where thread r owns row r (and threads from BLOCK_Q on own none). */
SPARGE_DEVICE bool group_skips(const work &w, const query_block &q, votes &v, int r, int64_t j,
                               float gap, float lambda)
{
    if (!w.may_skip)
        return false;
    if (r < BLOCK_Q)
        v.group[r] = 0;
    __syncthreads();
    if (r < BLOCK_Q)
        vote(w, v, r, gap, lambda);
    __syncthreads();
    const bool skips = r < BLOCK_Q && voted_to_skip(w, v, r);
    __syncthreads();
    if (skips && r % w.skip_rows == 0)
        mark_skipped(w, q, r, j);
    return skips;
}

/* ---- One row, by one thread ---- */

/* The largest score; a NaN stays. */
template <class T> SPARGE_DEVICE float most_of_row(const T *s, int seen)
{
    float most = -INFINITY;
    for (int t = 0; t < seen; t++) {
        const float x = (float)s[t];
        most = x > most || x != x ? x : most;
    }
    return most;
}

/* Lines 12-13 with P in float: scores become weights against the running maximum, in place. Returns
 * the factor by which the row of o shrinks. */
SPARGE_DEVICE float weigh_row(sparge_row &state, float *s, int seen, float unit, float local)
{
    float sum[16] = {0};
    const float shrink = sparge_row_update_max(&state, local);
    for (int t = 0; t < seen; t++) {
        s[t] = sparge_weight(s[t], unit, state.max);
        sum[t % 16] += s[t];
    }
    state.sum += sparge_sum_of(sum);
    return shrink;
}

enum { P_LEVELS = 127 };

/* Lines 12-13 with P in codes that sum to `codes`: l, and what their products with V are multiplied
 * by; o shrinks by `shrink`. */
struct coded {
    float weight, shrink;
};

SPARGE_DEVICE coded fold_codes(sparge_row &state, float local, int codes)
{
    coded c;
    c.shrink = sparge_row_update_max(&state, local);
    c.weight = sparge_code_weight(local, state.max, P_LEVELS);
    state.sum += c.weight * (float)codes;
    return c;
}

/* ---- Kernels 2 and 3: 256 threads as a square of 16 x 16 ---- */

enum { SIDE = 16, SQUARE = SIDE * SIDE };

/* Lines 20-21: thread (y, x) holds rows y + 16 a and channels x + 16 b of o, thread r the state of
 * row r. `norm` is shared memory. */
template <int ROWS, int COLUMNS>
static __device__ void store_square(const work &w, const query_block &q, const sparge_row &state,
                                    const float (&o)[ROWS][COLUMNS], float (&norm)[BLOCK_Q])
{
    const int r = (int)threadIdx.x, y = r / SIDE, x = r % SIDE;
    if (r < BLOCK_Q)
        norm[r] = sparge_row_norm(&state);
    if (r < q.rows)
        store_state(w, q, r, state);
    __syncthreads();
#pragma unroll
    for (int a = 0; a < ROWS; a++)
#pragma unroll
        for (int b = 0; b < COLUMNS; b++)
            if (y + SIDE * a < q.rows && x + SIDE * b < w.dim_v)
                store(w.o, out_row(w, q, y + SIDE * a) + x + SIDE * b,
                      o[a][b] * norm[y + SIDE * a]);
}

} // namespace sparge

#endif
