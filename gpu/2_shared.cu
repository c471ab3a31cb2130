/* SPDX-License-Identifier: Apache-2.0 */
/* 2_shared.cu: kernel 2, tiles in shared memory. 256 threads load a piece of q, of k or of v
 * together. Each multiplies an 8 x 4 piece of S or an 8 x (width / 16) piece of o out of it, in
 * float. An element is read from global memory once for a whole block, and from shared memory once
 * for 4 to 8 multiply-adds.
 *
 * Thread (y, x) of 16 x 16 has rows y + 16 a and keys or channels x + 16 b. A warp then reads 16
 * neighbouring columns and two rows. */
#include "gpu/ptx.h"
#include "gpu/rows.h"

namespace sparge {

enum { THREADS = SQUARE, ROWS = BLOCK_Q / SIDE, KEYS = BLOCK_K / SIDE, PIECE = 32 };

template <int WIDTH> struct tiles {
    float q[BLOCK_Q][PIECE + 1], k[BLOCK_K][PIECE + 1]; /* PIECE channels */
    float p[BLOCK_Q][BLOCK_K + 1];                      /* S, then P */
    float v[PIECE][WIDTH];                              /* PIECE keys */
    float shrink[BLOCK_Q];
    votes ballot;
};

/* `rows` of `padded` rows from `first` on, COUNT channels from c0 on. The rest is zeros. */
template <int COUNT, int PITCH>
static __device__ void load_tile(const sparge_in &in, int64_t b, int64_t h, int64_t first,
                                 int64_t rows, int padded, int c0, int dim, const float *mean,
                                 float (*to)[PITCH])
{
    for (int n = (int)threadIdx.x; n < padded * COUNT; n += THREADS) {
        const int r = n / COUNT, c = c0 + n % COUNT;
        float x = 0.0f;
        if (r < rows && c < dim)
            x = load(in, sparge_in_row(&in, b, h, first + r) + c) - (mean ? mean[c] : 0.0f);
        to[r][n % COUNT] = sparge_finite(x) ? x : 0.0f;
    }
}

/* Line 10: S of a block into t.p. */
template <int WIDTH>
static __device__ void multiply_qk(const work &w, const query_block &q, int64_t j, tiles<WIDTH> &t)
{
    const int y = (int)threadIdx.x / SIDE, x = (int)threadIdx.x % SIDE;
    const float *const mean = w.k_mean ? w.k_mean + q.kv * w.dim : NULL;
    float s[ROWS][KEYS] = {{0}};
    for (int c0 = 0; c0 < WIDTH; c0 += PIECE) {
        load_tile<PIECE>(w.q, q.b, q.h, q.first, q.rows, BLOCK_Q, c0, w.dim, NULL, t.q);
        load_tile<PIECE>(w.k, q.b, q.kv % w.kv_heads, j * BLOCK_K, w.g.k_len - j * BLOCK_K, BLOCK_K,
                         c0, w.dim, mean, t.k);
        __syncthreads();
        for (int c = 0; c < PIECE; c++)
#pragma unroll
            for (int a = 0; a < ROWS; a++)
#pragma unroll
                for (int b = 0; b < KEYS; b++)
                    s[a][b] = fmaf(t.q[y + SIDE * a][c], t.k[x + SIDE * b][c], s[a][b]);
        __syncthreads();
    }
    store_piece(s, t.p);
    __syncthreads();
}

/* Lines 11-16: a thread for each row. P is 0 where the row does not attend or skips the block. */
template <bool HIDES, int WIDTH>
static __device__ void softmax(const work &w, const query_block &q, int64_t j, sparge_row &state,
                               tiles<WIDTH> &t)
{
    const int r = (int)threadIdx.x;
    row_keys<HIDES> keys = 0;
    float scale = w.softmax_scale * SPARGE_LOG2E, most = -INFINITY;
    if (r < BLOCK_Q)
        keys = keys_of_row<HIDES>(w, q, r, j);
    if (keys) {
        scale = add_biases(w, q, j, keys, t.p[r], scale);
        most = max_of_row(t.p[r], keys);
    }
    const float local = sparge_row_local(most, scale);
    keys = used_keys(w, q, t.ballot, r, j, state, local, keys);
    if (r < BLOCK_Q) {
        t.shrink[r] = keys ? softmax_row(state, t.p[r], keys, scale, local) : 1.0f;
        for (int k = 0; k < BLOCK_K; k++)
            if (!is_among(keys, k))
                t.p[r][k] = 0.0f;
    }
    __syncthreads();
}

/* Line 16: o = shrink * o + P V. */
template <int WIDTH>
static __device__ void multiply_pv(const work &w, const query_block &q, int64_t j, tiles<WIDTH> &t,
                                   float (&o)[ROWS][WIDTH / SIDE])
{
    const int y = (int)threadIdx.x / SIDE, x = (int)threadIdx.x % SIDE;
#pragma unroll
    for (int a = 0; a < ROWS; a++)
#pragma unroll
        for (int b = 0; b < WIDTH / SIDE; b++)
            o[a][b] *= t.shrink[y + SIDE * a];
    for (int k0 = 0; k0 < BLOCK_K; k0 += PIECE) {
        const int64_t first = j * BLOCK_K + k0;
        load_tile<WIDTH>(w.v, q.b, q.kv % w.kv_heads, first, w.g.k_len - first, PIECE, 0, w.dim_v,
                         NULL, t.v);
        __syncthreads();
        for (int k = 0; k < PIECE; k++)
#pragma unroll
            for (int a = 0; a < ROWS; a++)
#pragma unroll
                for (int b = 0; b < WIDTH / SIDE; b++)
                    o[a][b] = fmaf(t.p[y + SIDE * a][k0 + k], t.v[k][x + SIDE * b], o[a][b]);
        __syncthreads();
    }
}

template <int WIDTH, bool HIDES>
static __global__ void __launch_bounds__(THREADS) attend_tiles(const __grid_constant__ work w)
{
    tiles<WIDTH> &t = *(tiles<WIDTH> *)shared_memory();
    const query_block q = query_block_of(w, blockIdx.x);
    sparge_row state = sparge_row_empty(); /* of row threadIdx.x */
    float o[ROWS][WIDTH / SIDE] = {{0}};
    for (int64_t j = next_kept(q, 0); j < q.visible; j = next_kept(q, j + 1)) {
        multiply_qk(w, q, j, t);
        softmax<HIDES>(w, q, j, state, t);
        multiply_pv(w, q, j, t, o);
    }
    store_square(w, q, state, o, t.shrink);
}

cudaError_t attend_shared(const work &w, cudaStream_t stream)
{
    return at_width_and_hides(w, [&](auto width, auto hides) {
        return launch(attend_tiles<width, hides>, q_blocks_of_all_heads(w), THREADS,
                      sizeof(tiles<width>), stream, w);
    });
}

} // namespace sparge
