/* SPDX-License-Identifier: Apache-2.0 */
/* predict.cu: which (query block, key block) pairs are worth computing: scores, selection and the
 * bit mask in one kernel. Sec 3.3, Algorithm 1 lines 4-6; ref/predict.c in the reference.
 *
 * A warp owns a row of S. Up to eight rows of a head share a thread block, so that a pooled key is
 * read once for all of them. Fewer do if so many rows do not fit into shared memory. */
#include "gpu/select.h"

namespace sparge {

enum { MAX_ROWS = 8, THREADS = 32 * MAX_ROWS, KEYS = 32, PITCH = MAX_WIDTH + 1 };

struct scores {
    float q[MAX_ROWS][MAX_WIDTH]; /* pooled queries */
    float k[KEYS * PITCH]; /* pooled keys of a tile; a row has an odd length: no bank conflicts */
};                         /* then [rows][k_blocks] of S */

/* sparge_dot for n a multiple of 16; partial sums in registers. */
static __device__ float dot(const float *a, const float *b, int n)
{
    float partial[16] = {0};
    for (int c = 0; c < n; c += 16)
#pragma unroll
        for (int lane = 0; lane < 16; lane++)
            partial[lane] = fmaf(a[c + lane], b[c + lane], partial[lane]);
    return sparge_sum_of(partial);
}

/* Line 5: S[i,:] of every warp's row. -inf if K_j is not similar or not visible. */
static __device__ void score_rows(const work &w, const query_block &q, bool exists, float theta,
                                  scores &s, float *row)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32,
              padded = (w.dim + 15) / 16 * 16;
    const int64_t keys = q.kv * w.g.k_blocks;
    for (int c = lane; c < padded; c += 32)
        s.q[warp][c] = exists && c < w.dim ? w.q_pool[q.line * w.dim + c] : 0.0f;
    for (int64_t j0 = 0; j0 < w.g.k_blocks; j0 += KEYS) {
        __syncthreads();
        for (int n = (int)threadIdx.x; n < KEYS * padded; n += THREADS) {
            const int t = n / padded, c = n % padded;
            s.k[t * PITCH + c] =
                j0 + t < w.g.k_blocks && c < w.dim ? w.k_pool[(keys + j0 + t) * w.dim + c] : 0.0f;
        }
        __syncthreads();
        const int64_t j = j0 + lane;
        if (exists && j < w.g.k_blocks) {
            const bool similar = key_is_similar(w, q, theta, j),
                       scored = j < q.visible && (similar || w.s_all);
            const float score =
                scored
                    ? sparge_pool_score(dot(s.q[warp], &s.k[lane * PITCH], padded), w.softmax_scale)
                    : -INFINITY;
            if (w.s_all)
                w.s_all[q.line * w.g.k_blocks + j] = score;
            row[j] = similar ? score : -INFINITY;
        }
    }
    __syncwarp();
}

/* The largest finite score. */
static __device__ float top_of(const float *row, int64_t blocks)
{
    float top = -INFINITY;
    for (int64_t j = threadIdx.x % 32; j < blocks; j += 32)
        top = sparge_finite(row[j]) ? fmaxf(top, row[j]) : top;
    for (int half = 16; half > 0; half /= 2)
        top = fmaxf(top, __shfl_xor_sync(~0u, top, half));
    return top;
}

static __global__ void __launch_bounds__(THREADS)
    predict_rows(const __grid_constant__ work w, int rows)
{
    scores &s = *(scores *)shared_memory();
    const int warp = (int)threadIdx.x / 32;
    float *const row = (float *)(&s + 1) + warp * w.g.k_blocks;
    const int64_t parts = sparge_ceil_div(w.g.q_blocks, rows), n = blockIdx.x / parts;
    const int64_t i = blockIdx.x % parts * rows + warp;
    const bool exists = warp < rows && i < w.g.q_blocks;
    const query_block q = query_block_of(w, n * w.g.q_blocks + (exists ? i : 0));
    const sparge_thresholds thresholds = thresholds_of(w, q.h);
    score_rows(w, q, exists, thresholds.theta, s, row);
    if (!exists)
        return;
    if (w.s)
        for (int64_t j = threadIdx.x % 32; j < w.g.k_blocks; j += 32)
            w.s[q.line * w.g.k_blocks + j] = row[j];
    select_row(w, q, thresholds, scored_row{row, top_of(row, q.visible)});
}

/* How many rows of S fit into shared memory together. */
static int rows_that_fit(int64_t k_blocks, int shared_limit)
{
    const int64_t floats = (shared_limit - (int64_t)sizeof(scores)) / (int64_t)sizeof(float);
    return (int)sparge_min(MAX_ROWS, floats / sparge_max(1, k_blocks));
}

bool predict_fits(int64_t k_blocks, int shared_limit)
{
    return rows_that_fit(k_blocks, shared_limit) > 0;
}

cudaError_t predict(const work &w, cudaStream_t stream)
{
    int shared_limit = 0;
    const cudaError_t error =
        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_limit);
    if (error != cudaSuccess)
        return error;
    const int rows = rows_that_fit(w.g.k_blocks, shared_limit);
    const size_t shared = sizeof(scores) + (size_t)(rows * w.g.k_blocks) * sizeof(float);
    return launch(predict_rows, w.batch * w.heads * sparge_ceil_div(w.g.q_blocks, rows), THREADS,
                  shared, stream, w, rows);
}

} // namespace sparge
