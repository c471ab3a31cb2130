/* SPDX-License-Identifier: Apache-2.0 */
/* predict.cu: which (query block, key block) pairs are worth computing: scores, selection and the
 * bit mask in one kernel. Sec 3.3, Algorithm 1 lines 4-6; ref/predict.c in the reference.
 *
 * A warp owns a row of S. Up to eight rows of a head share a thread block, so that a pooled key is
 * read once for all of them. Fewer do if so many rows do not fit into shared memory.
 * Nothing is sorted: the best blocks are those above a cut, and bisection finds the cut. Masses are
 * integers, so that their sums are the reference's in any order. */
#include "gpu/ptx.h"
#include "gpu/work.h"
#include "sparge_inspect.h"

#include "common/select.h"

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

static __device__ bool key_is_similar(const work &w, const query_block &q, float theta, int64_t j)
{
    const int64_t at = q.kv * w.g.k_blocks + j;
    return sparge_is_similar(!w.k_block_nonfinite[at], w.k_sim[at], theta);
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

/* ---- Selection: one warp, its row of S in shared memory ---- */

static __device__ uint64_t sum_of_warp(uint64_t x)
{
    unsigned long long sum = x;
    for (int half = 16; half > 0; half /= 2)
        sum += __shfl_xor_sync(~0u, sum, half);
    return sum;
}

/* The best blocks of a row: those whose order key is at least `above`, and the first `ties` of
 * those whose order key is one below. */
struct cut {
    uint64_t above;
    uint64_t ties;
};

/* What a block counts towards a limit: its mass, or 1. */
static __device__ uint64_t mass_or_one(float s, float max, bool count)
{
    return count ? 1 : sparge_mass(s, max);
}

/* The longest run of best blocks whose mass, or number where `count`, is within `limit`; at least
 * one. */
static __device__ cut best_within(const float *row, int64_t blocks, float max, bool count,
                                  uint64_t limit)
{
    const int lane = (int)threadIdx.x % 32;
    uint64_t low = 0, high = (uint64_t)1 << 32, within = 0, kept = 0;
    while (high - low > 1) {
        const uint64_t middle = (low + high) / 2;
        uint64_t sum = 0, number = 0;
        for (int64_t j = lane; j < blocks; j += 32) {
            const uint64_t key = sparge_order_key(row[j]);
            if (sparge_finite(row[j]) && key >= middle && key < high) {
                sum += mass_or_one(row[j], max, count);
                number++;
            }
        }
        sum = sum_of_warp(sum);
        if (within + sum <= limit) {
            high = middle;
            within += sum;
            kept += sum_of_warp(number);
        } else {
            low = middle;
        }
    }
    /* All blocks of order key `low` weigh the same. If everything is within the limit, none has it.
     */
    uint64_t each = 0;
    for (int64_t j = lane; j < blocks; j += 32)
        if (sparge_finite(row[j]) && sparge_order_key(row[j]) == low)
            each = mass_or_one(row[j], max, count);
    for (int half = 16; half > 0; half /= 2) {
        const unsigned long long other = __shfl_xor_sync(~0u, (unsigned long long)each, half);
        each = each > other ? each : other;
    }
    cut c = {high, each ? (limit - within) / each : 0};
    if (kept == 0 && c.ties == 0)
        c.ties = 1;
    return c;
}

/* Does the cut keep block j? `taken` counts the ties of earlier words. */
static __device__ bool keeps(const cut &c, bool finite, uint64_t key, uint32_t *taken)
{
    const bool tie = finite && key + 1 == c.above;
    const uint32_t ties = __ballot_sync(~0u, tie), before = ties & ((1u << threadIdx.x % 32) - 1u);
    const bool first = tie && *taken + (uint32_t)__popc(before) < c.ties;
    *taken += (uint32_t)__popc(ties);
    return first || (finite && key >= c.above);
}

/* Line 6: M[i,:]. */
static __device__ void select_row(const work &w, const query_block &q,
                                  const sparge_thresholds &thresholds, const float *row)
{
    const int lane = (int)threadIdx.x % 32;
    float max = -INFINITY;
    for (int64_t j = lane; j < q.visible; j += 32)
        max = sparge_finite(row[j]) ? fmaxf(max, row[j]) : max;
    for (int half = 16; half > 0; half /= 2)
        max = fmaxf(max, __shfl_xor_sync(~0u, max, half));
    const bool some = max > -INFINITY, by_mass = some && thresholds.tau != SPARGE_OFF,
               by_count = some && thresholds.topk != SPARGE_OFF;

    cut heavy = {0, 0}, top = {0, 0};
    if (by_mass) {
        uint64_t total = 0;
        for (int64_t j = lane; j < q.visible; j += 32)
            total += sparge_finite(row[j]) ? sparge_mass(row[j], max) : 0;
        heavy = best_within(row, q.visible, max, false,
                            (uint64_t)sparge_mass_limit(thresholds.tau, sum_of_warp(total)));
    }
    if (by_count)
        top = best_within(row, q.visible, max, true,
                          (uint64_t)sparge_topk_count(thresholds.topk, q.visible));

    const bool q_similar =
        sparge_is_similar(!w.q_block_nonfinite[q.line], w.q_sim[q.line], thresholds.theta);
    const int64_t diagonal = sparge_first_diagonal(&w.g, q.i);
    uint32_t heavy_ties = 0, top_ties = 0;
    for (int64_t word = 0; word < w.words; word++) {
        const int64_t j = 32 * word + lane;
        const bool exists = j < q.visible, finite = exists && sparge_finite(row[j]);
        const uint64_t key = finite ? sparge_order_key(row[j]) : 0;
        uint32_t why = 0;
        if (by_mass && keeps(heavy, finite, key, &heavy_ties))
            why |= SPARGE_KEPT_MASS;
        if (by_count && keeps(top, finite, key, &top_ties))
            why |= SPARGE_KEPT_TOPK;
        if (exists)
            why |= sparge_forced(q_similar, key_is_similar(w, q, thresholds.theta, j), finite,
                                 j >= diagonal, w.sink && j == 0);
        if (w.why && j < w.g.k_blocks)
            w.why[q.line * w.g.k_blocks + j] = (uint8_t)why;
        const uint32_t bits = __ballot_sync(~0u, why != 0);
        if (lane == 0)
            w.mask[q.line * w.words + word] = bits;
    }
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
    select_row(w, q, thresholds, row);
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
