/* SPDX-License-Identifier: Apache-2.0 */
/* 1_naive.cu: kernel 1, the algorithm and nothing else. A thread owns a query row and walks the
 * kept key blocks. It reads every element from global memory when it needs it, in float.
 *
 * What it costs: 128 threads read the same keys 128 times, a row of q is read once for every key,
 * and a row of o does not fit into registers. */
#include "gpu/ptx.h"
#include "gpu/rows.h"

namespace sparge {

/* NaN and infinity count as 0 here. finish.cu writes NaN where they matter. */
static __device__ float finite_or_0(float x) { return sparge_finite(x) ? x : 0.0f; }

/* Line 10: q . (k - mean), in the order of channels. */
static __device__ float score(const work &w, const query_block &q, int64_t q_at, int64_t token)
{
    const int64_t k_at = key_row(w, q, token);
    float sum = 0.0f;
    for (int c = 0; c < w.dim; c++) {
        const float mean = w.k_mean ? w.k_mean[q.kv * w.dim + c] : 0.0f;
        sum = fmaf(finite_or_0(load(w.q, q_at + c)), finite_or_0(load(w.k, k_at + c) - mean), sum);
    }
    return sum;
}

template <bool HIDES>
static __global__ void __launch_bounds__(BLOCK_Q) attend_rows(const __grid_constant__ work w)
{
    votes &v = *(votes *)shared_memory();
    const query_block q = query_block_of(w, blockIdx.x);
    const int r = (int)threadIdx.x;
    const int64_t q_at = sparge_in_row(&w.q, q.b, q.h, q.first + r);

    float o[MAX_WIDTH] = {0};
    sparge_row state = sparge_row_empty();
    for (int64_t j = next_kept(q, 0); j < q.visible; j = next_kept(q, j + 1)) {
        const row_keys<HIDES> keys = keys_of_row<HIDES>(w, q, r, j);
        float p[BLOCK_K];
        for (int t = 0; t < end_of(keys); t++)
            if (is_among(keys, t))
                p[t] = score(w, q, q_at, j * BLOCK_K + t);
        const float scale = add_biases(w, q, j, keys, p, w.softmax_scale * SPARGE_LOG2E);
        const float local = sparge_row_local(max_of_row(p, keys), scale);
        if (!used_keys(w, q, v, r, j, state, local, keys))
            continue;
        const float shrink = softmax_row(state, p, keys, scale, local);
        for (int c = 0; c < w.dim_v; c++)
            o[c] *= shrink;
        for (int t = 0; t < end_of(keys); t++) {
            if (!is_among(keys, t))
                continue;
            const int64_t v_at = value_row(w, q, j * BLOCK_K + t);
            for (int c = 0; c < w.dim_v; c++)
                o[c] = fmaf(p[t], finite_or_0(load(w.v, v_at + c)), o[c]);
        }
    }
    if (r >= q.rows)
        return;
    for (int c = 0; c < w.dim_v; c++)
        store(w.o, out_row(w, q, r) + c, o[c] * sparge_row_norm(&state));
    store_state(w, q, r, state);
}

cudaError_t attend_naive(const work &w, cudaStream_t stream)
{
    return launch(hides_pairs(w) ? attend_rows<true> : attend_rows<false>, q_blocks_of_all_heads(w),
                  BLOCK_Q, sizeof(votes), stream, w);
}

} // namespace sparge
