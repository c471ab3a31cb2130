/* 2_shared.cu: kernel 2, tiles in shared memory. 256 threads load a piece of q, of k or of v
 * together, and each multiplies an 8 x 4 piece of S or an 8 x (width / 16) piece of o out of it, in
 * float: an element is read from global memory once for a whole block, and from shared memory once
 * for 4 to 8 multiply-adds.
 *
 * Thread (y, x), 16 x 16: rows y + 16 a, keys or channels x + 16 b, so that a warp reads 16
 * neighbouring columns and two rows. */
#include "gpu/ptx.h"
#include "gpu/rows.h"

namespace sparge {

enum { THREADS = SQUARE, ROWS = BLOCK_Q / SIDE, KEYS = BLOCK_K / SIDE, CHUNK = 32 };

template <int WIDTH> struct tiles {
    float q[BLOCK_Q][CHUNK + 1], k[BLOCK_K][CHUNK + 1]; /* CHUNK channels */
    float p[BLOCK_Q][BLOCK_K + 1];                      /* scores, then weights */
    float v[CHUNK][WIDTH];                              /* CHUNK keys */
    float shrink[BLOCK_Q];
    votes ballot;
};

/* `rows` of `padded` rows from `first` on, COUNT channels from c0 on; zeros where there is nothing.
 */
template <int COUNT, int PITCH>
static __device__ void load(const sparge_in &in, int64_t b, int64_t h, int64_t first, int64_t rows,
                            int padded, int c0, int dim, const float *mean, float (*to)[PITCH])
{
    for (int n = (int)threadIdx.x; n < padded * COUNT; n += THREADS) {
        const int r = n / COUNT, c = c0 + n % COUNT;
        float x = 0.0f;
        if (r < rows && c < dim)
            x = element(in, place(in, b, h, first + r) + c) - (mean ? mean[c] : 0.0f);
        to[r][n % COUNT] = sparge_finite(x) ? x : 0.0f;
    }
}

/* Line 10: S of a block into t.p. */
template <int WIDTH>
static __device__ void multiply_qk(const work &w, const query_block &q, int64_t j, tiles<WIDTH> &t)
{
    const int y = (int)threadIdx.x / SIDE, x = (int)threadIdx.x % SIDE;
    const float *const mean = w.mean ? w.mean + q.kv * w.dim : NULL;
    float s[ROWS][KEYS] = {{0}};
    for (int c0 = 0; c0 < WIDTH; c0 += CHUNK) {
        load<CHUNK>(w.q, q.b, q.h, q.first, q.rows, BLOCK_Q, c0, w.dim, NULL, t.q);
        load<CHUNK>(w.k, q.b, q.kv % w.kv_heads, j * BLOCK_K, w.g.k_len - j * BLOCK_K, BLOCK_K, c0,
                    w.dim, mean, t.k);
        __syncthreads();
        for (int c = 0; c < CHUNK; c++)
#pragma unroll
            for (int a = 0; a < ROWS; a++)
#pragma unroll
                for (int b = 0; b < KEYS; b++)
                    s[a][b] = fmaf(t.q[y + SIDE * a][c], t.k[x + SIDE * b][c], s[a][b]);
        __syncthreads();
    }
#pragma unroll
    for (int a = 0; a < ROWS; a++)
#pragma unroll
        for (int b = 0; b < KEYS; b++)
            t.p[y + SIDE * a][x + SIDE * b] = s[a][b];
    __syncthreads();
}

/* Lines 11-16: a thread for each row. A row that skips has weights of 0. */
template <int WIDTH>
static __device__ void weigh(const work &w, const query_block &q, int64_t j, float lambda,
                             sparge_row &state, tiles<WIDTH> &t)
{
    const int r = (int)threadIdx.x, seen = r < BLOCK_Q ? keys_of_row(w, q, r, j) : 0;
    const float unit = w.softmax_scale * SPARGE_LOG2E;
    const float local = sparge_row_local(seen ? most_of_row(t.p[r], seen) : -INFINITY, unit);
    const bool skips =
        group_skips(w, q, t.ballot, r, j, sparge_row_gap(&state, local, seen > 0), lambda);
    if (r < BLOCK_Q) {
        const int used = skips ? 0 : seen;
        t.shrink[r] = used ? weigh_row(state, t.p[r], used, unit, local) : 1.0f;
        for (int k = used; k < BLOCK_K; k++)
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
    for (int k0 = 0; k0 < BLOCK_K; k0 += CHUNK) {
        const int64_t first = j * BLOCK_K + k0;
        load<WIDTH>(w.v, q.b, q.kv % w.kv_heads, first, w.g.k_len - first, CHUNK, 0, w.dim_v, NULL,
                    t.v);
        __syncthreads();
        for (int k = 0; k < CHUNK; k++)
#pragma unroll
            for (int a = 0; a < ROWS; a++)
#pragma unroll
                for (int b = 0; b < WIDTH / SIDE; b++)
                    o[a][b] = fmaf(t.p[y + SIDE * a][k0 + k], t.v[k][x + SIDE * b], o[a][b]);
        __syncthreads();
    }
}

template <int WIDTH>
static __global__ void __launch_bounds__(THREADS) attend_tiles(const __grid_constant__ work w)
{
    tiles<WIDTH> &t = *(tiles<WIDTH> *)shared_memory();
    const query_block q = query_block_of(w, blockIdx.x);
    const uint32_t *const kept = mask_row(w, q);
    const float lambda = thresholds_of(w, q.h).lambda;
    sparge_row state = sparge_row_empty(); /* of row threadIdx.x */
    float o[ROWS][WIDTH / SIDE] = {{0}};
    for (int64_t j = next_kept(kept, q, 0); j < q.seen; j = next_kept(kept, q, j + 1)) {
        multiply_qk(w, q, j, t);
        weigh(w, q, j, lambda, state, t);
        multiply_pv(w, q, j, t, o);
    }
    store_square(w, q, state, o, t.shrink);
}

cudaError_t attend_shared(const work &w, cudaStream_t stream)
{
    const int64_t blocks = w.batch * w.heads * w.g.q_blocks;
    switch (w.width) {
    case 64: return launch(attend_tiles<64>, blocks, THREADS, sizeof(tiles<64>), stream, w);
    case 96: return launch(attend_tiles<96>, blocks, THREADS, sizeof(tiles<96>), stream, w);
    default: return launch(attend_tiles<128>, blocks, THREADS, sizeof(tiles<128>), stream, w);
    }
}

} // namespace sparge
