/* SPDX-License-Identifier: Apache-2.0 */
/* rows.h: what every kernel does to a row of scores: which keys it attends to, lambda's vote, the
 * running maximum, P. The rules themselves are those of common/softmax.h. */
#ifndef SPARGE_GPU_ROWS_H
#define SPARGE_GPU_ROWS_H

#include "gpu/work.h"

namespace sparge {

/* The keys of a block that a row attends to: how many, since they are the first ones; where pairs
 * are hidden, a bit for each. 0: none. */
template <bool HIDES> using row_keys = std::conditional_t<HIDES, uint64_t, int>;

template <bool HIDES>
SPARGE_DEVICE row_keys<HIDES> keys_of_row(const work &w, const query_block &q, int r, int64_t j)
{
    if constexpr (HIDES)
        return attended_keys(w, q, r, j);
    else
        return visible_keys(w, q.first + r, j);
}

/* A score that is multiplied out in int8: where pairs are hidden, a bias may come. */
template <bool HIDES> using row_score = std::conditional_t<HIDES, float, int>;

SPARGE_DEVICE bool is_among(int keys, int t) { return t < keys; }
SPARGE_DEVICE bool is_among(uint64_t keys, int t) { return keys >> t & 1; }

/* All of them are below it. */
SPARGE_DEVICE int end_of(int keys) { return keys; }
SPARGE_DEVICE int end_of(uint64_t) { return BLOCK_K; }

/* The biases of the keys from `token` on of those that q reads. */
SPARGE_DEVICE const float *biases(const work &w, const query_block &q, int64_t token)
{
    return w.k_bias + q.kv * w.g.k_len + token;
}

/* Scores of a row with the biases of its keys, if there are any, in place. Returns the scale that
 * is left to apply. */
SPARGE_DEVICE float add_biases(const work &w, const query_block &q, int64_t j, uint64_t keys,
                               float *s, float scale)
{
    if (!w.k_bias)
        return scale;
    for (int t = 0; t < BLOCK_K; t++)
        if (is_among(keys, t))
            s[t] = sparge_score_biased(s[t], scale, *biases(w, q, j * BLOCK_K + t));
    return 1.0f;
}

template <class T>
SPARGE_DEVICE float add_biases(const work &, const query_block &, int64_t, int, T *, float scale)
{
    return scale;
}

/* ---- Lambda (Algorithm 1 lines 14-16): a group of rows skips a block if none comes near ---- */

/* In shared memory. Bit 0: a row of the group sees a key. Bit 1: a row comes near its maximum. */
struct votes {
    uint32_t group[BLOCK_Q];
};

SPARGE_DEVICE void vote(const work &w, const query_block &q, votes &v, int r, float gap)
{
    if (gap > -INFINITY)
        atomicOr(&v.group[r / w.skip_rows],
                 sparge_gap_is_near(gap, thresholds_of(w, q.h).lambda) ? 2u : 1u);
}

/* All threads of the block call this between two of its barriers. */
SPARGE_DEVICE bool voted_to_skip(const work &w, const votes &v, int r)
{
    return v.group[r / w.skip_rows] == 1u;
}

/* The whole vote. Thread r owns row r, and threads from BLOCK_Q on own none. Returns which of its
 * keys the row uses: all or, if its group skips the block, none. */
template <class KEYS>
SPARGE_DEVICE KEYS used_keys(const work &w, const query_block &q, votes &v, int r, int64_t j,
                             const sparge_row &state, float local, KEYS keys)
{
    if (!w.may_skip)
        return keys;
    if (r < BLOCK_Q)
        v.group[r] = 0;
    __syncthreads();
    if (r < BLOCK_Q)
        vote(w, q, v, r, sparge_row_gap(&state, local, keys != 0));
    __syncthreads();
    const bool skips = r < BLOCK_Q && voted_to_skip(w, v, r);
    __syncthreads();
    if (skips && r % w.skip_rows == 0)
        mark_skipped(w, q, r, j);
    return skips ? 0 : keys;
}

/* ---- One row, by one thread ---- */

/* The largest score; a NaN stays. */
template <class T, class KEYS> SPARGE_DEVICE float max_of_row(const T *s, KEYS keys)
{
    float most = -INFINITY;
    for (int t = 0; t < end_of(keys); t++) {
        if (!is_among(keys, t))
            continue;
        const float x = (float)s[t];
        most = x > most || x != x ? x : most;
    }
    return most;
}

/* Lines 12-13 with P in float: scores become P against the running maximum, in place. Returns the
 * factor by which the row of o shrinks. */
template <class KEYS>
SPARGE_DEVICE float softmax_row(sparge_row &state, float *s, KEYS keys, float scale, float local)
{
    float sum[16] = {0};
    const float shrink = sparge_row_update_max(&state, local);
    for (int t = 0; t < end_of(keys); t++)
        if (is_among(keys, t)) {
            s[t] = sparge_weight(s[t], scale, state.max);
            sum[t % 16] += s[t];
        }
    state.sum += sparge_sum_of(sum);
    return shrink;
}

enum { P_QMAX = 127 };

/* A row of P in codes: o = shrink * o + p_scale * (codes of P) (codes of V) * v_scale. */
struct coded_row {
    float p_scale, shrink;
};

/* Lines 12-13 with P in codes, which sum to `codes`. */
SPARGE_DEVICE coded_row update_by_codes(sparge_row &state, float local, int codes)
{
    coded_row c;
    c.shrink = sparge_row_update_max(&state, local);
    c.p_scale = sparge_code_weight(local, state.max, P_QMAX);
    state.sum += c.p_scale * (float)codes;
    return c;
}

/* ---- Kernels 2 and 3: 256 threads as a square of 16 x 16 ---- */

enum { SIDE = 16, SQUARE = SIDE * SIDE };

/* Stores the piece of S that thread (y, x) holds: rows y + 16 a, keys x + 16 b. */
template <class T, class S, int ROWS, int COLUMNS, int PITCH>
SPARGE_DEVICE void store_piece(const T (&piece)[ROWS][COLUMNS], S (*to)[PITCH])
{
    const int y = (int)threadIdx.x / SIDE, x = (int)threadIdx.x % SIDE;
#pragma unroll
    for (int a = 0; a < ROWS; a++)
#pragma unroll
        for (int b = 0; b < COLUMNS; b++)
            to[y + SIDE * a][x + SIDE * b] = (S)piece[a][b];
}

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
