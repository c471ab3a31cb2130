/* SPDX-License-Identifier: Apache-2.0 */
/* finish.cu: what follows attention on every kernel: rows without keys, lse, NaN, counters.
 * Algorithm 1 lines 20-21; ref/attend.c and ref/record.c.
 *
 * A kernel leaves o, m and l as if every number were finite, and records in `skipped` what lambda
 * left out. The mask says the rest, so no kernel counts anything. */
#include "gpu/rows.h"

namespace sparge {

enum { THREADS = BLOCK_Q };

static __device__ bool skips(const work &w, const query_block &q, int r, int64_t j)
{
    return w.may_skip && sparge_mask_row_get(skipped_row(w, q, r), j);
}

static __device__ void count_block(const work &w, const query_block &q, int64_t j,
                                   sparge_tally *tally)
{
    const int group = w.may_skip ? w.skip_rows : BLOCK_Q, all = (int)q.rows;
    int rows_done = 0;
    tally->qk_done++;
    for (int r0 = 0; r0 < all; r0 += group) {
        const int r1 = (int)sparge_min(all, r0 + group);
        const bool done = !skips(w, q, r0, j);
        const int64_t visible = sparge_pairs_visible(&w.g, q.first + r0, r1 - r0, j);
        sparge_tally_rows(tally, &w.g, q.i, r1 - r0, visible, hides_pairs(w) ? 0 : visible, done);
        rows_done += done ? r1 - r0 : 0;
    }
    if (w.pv_done)
        w.pv_done[q.line * w.g.k_blocks + j] = (float)rows_done / (float)all;
}

/* The tokens that row r attends to, where pairs are hidden. */
static __device__ void count_row(const work &w, const query_block &q, int r, sparge_tally *tally)
{
    for (int64_t j = next_kept(q, 0); j < q.visible; j = next_kept(q, j + 1))
        sparge_tally_rows(tally, &w.g, q.i, 0, 0, __popcll(attended_keys(w, q, r, j)),
                          !skips(w, q, r, j));
}

/* The sum over a warp, added to that of the head. */
static __device__ void add_tally(sparge_tally *to, const sparge_tally &tally)
{
    const int64_t *const word = (const int64_t *)&tally;
#pragma unroll
    for (int n = 0; n < SPARGE_TALLY_WORDS; n++) {
        unsigned long long sum = (unsigned long long)word[n];
        for (int half = 16; half > 0; half /= 2)
            sum += __shfl_xor_sync(~0u, sum, half);
        if (threadIdx.x % 32 == 0 && sum)
            atomicAdd((unsigned long long *)to + n, sum);
    }
}

static __device__ void fill_row(const work &w, const query_block &q, int r, float x)
{
    for (int c = 0; c < w.dim_v; c++)
        store(w.o, out_row(w, q, r) + c, x);
}

/* Writes NaN to the channels of row r for which a nonfinite element of v met its P.V. Returns
 * whether the query or a key that it met is nonfinite, which is for the whole row. */
static __device__ bool meets_nonfinite(const work &w, const query_block &q, int r)
{
    const int64_t token = q.first + r, keys = q.kv * w.g.k_blocks;
    bool row = w.q_nonfinite[q.n * w.g.q_len + token];
    for (int64_t j = next_kept(q, 0); j < q.visible; j = next_kept(q, j + 1)) {
        const bool of_v = w.v_block_nonfinite[keys + j] && !skips(w, q, r, j);
        if (!of_v && !w.k_block_nonfinite[keys + j])
            continue;
        const uint64_t attended = attended_keys(w, q, r, j);
        const int64_t first = j * BLOCK_K, end = first + sparge_keys_visible(&w.g, token, j);
        for (int64_t t = first; t < end; t++) {
            if (!is_among(attended, (int)(t - first)))
                continue;
            row |= w.k_nonfinite[q.kv * w.g.k_len + t];
            for (int c = 0; of_v && c < w.dim_v; c++)
                if (!sparge_value_is_finite(load(w.v, value_row(w, q, t) + c), w.pv))
                    store(w.o, out_row(w, q, r) + c, NAN);
        }
    }
    return row;
}

static __global__ void __launch_bounds__(THREADS) finish_rows(const __grid_constant__ work w)
{
    const query_block q = query_block_of(w, blockIdx.x);
    const int r = (int)threadIdx.x;
    const bool exists = r < q.rows;
    sparge_tally tally = sparge_tally_zero();
    bool nonfinite = w.q_block_nonfinite[q.line];
    for (int64_t word = r; 32 * word < w.g.k_blocks; word += THREADS) {
        const uint32_t bits = kept_word(q, word);
        for (int64_t j = 32 * word; j < sparge_min(32 * word + 32, w.g.k_blocks); j++)
            if (bits >> (j & 31) & 1u) {
                count_block(w, q, j, &tally);
                nonfinite |= w.k_block_nonfinite[q.kv * w.g.k_blocks + j] ||
                             w.v_block_nonfinite[q.kv * w.g.k_blocks + j];
            } else if (w.pv_done) {
                w.pv_done[q.line * w.g.k_blocks + j] = 0.0f;
            }
    }
    const bool some = __syncthreads_or(tally.qk_done != 0);
    nonfinite = __syncthreads_or(nonfinite);

    const int64_t line = q.n * w.g.q_len + q.first + r;
    if (exists) {
        sparge_row state = sparge_row_empty();
        if (some) {
            state.max = w.m[line];
            state.sum = w.l[line];
        } else { /* kernels may leave out query blocks that keep nothing */
            store_state(w, q, r, state);
            fill_row(w, q, r, 0.0f);
        }
        if (nonfinite && !sparge_row_is_empty(&state) && meets_nonfinite(w, q, r)) {
            state = sparge_row_nonfinite(state);
            fill_row(w, q, r, NAN);
        }
        if (w.lse)
            w.lse[line] = sparge_row_lse_smoothed(
                &state, w.q_dot_mean_k ? w.softmax_scale * w.q_dot_mean_k[line] : 0.0f);
        tally.tokens = sparge_keys_of_query(&w.g, q.first + r);
        if (hides_pairs(w))
            count_row(w, q, r, &tally);
    }
    if (r == 0)
        tally.pairs = q.visible;
    add_tally(&w.tally[q.n], tally);
}

static __global__ void __launch_bounds__(THREADS) count_heads(const __grid_constant__ work w)
{
    const int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (n < w.batch * w.heads)
        w.counts[n] = sparge_tally_counts(&w.tally[n], &w.g);
}

cudaError_t finish(const work &w, cudaStream_t stream)
{
    const int64_t heads = w.batch * w.heads;
    cudaError_t error = cudaMemsetAsync(w.tally, 0, (size_t)heads * sizeof *w.tally, stream);
    if (error == cudaSuccess)
        error = launch(finish_rows, heads * w.g.q_blocks, THREADS, 0, stream, w);
    if (error == cudaSuccess)
        error = launch(count_heads, sparge_ceil_div(heads, THREADS), THREADS, 0, stream, w);
    return error;
}

} // namespace sparge
