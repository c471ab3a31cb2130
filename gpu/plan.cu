/* SPDX-License-Identifier: Apache-2.0 */
/* plan.cu: the order in which kernel 5 takes its work. Key heads come one after the other, so that
 * all thread blocks read the same keys out of the cache. Within a key head come the query blocks
 * that keep something, those that keep most first (roughly), so that the long ones do not come
 * last. */
#include "gpu/ptx.h"
#include "gpu/work.h"

namespace sparge {

enum { SORT_THREADS = 256, BINS = 256 };

struct bins {
    unsigned int count[BINS], first[BINS];
    unsigned long long base;
};

static __device__ int kept_of(const work &w, int64_t line)
{
    const query_block q = query_block_of(w, line);
    int kept = 0;
    for (int64_t n = 0; 32 * n < q.visible; n++)
        kept += __popc(kept_word(q, n));
    return kept;
}

static __device__ int bin_of(const work &w, int kept)
{
    return BINS - 1 - (int)((int64_t)(kept - 1) * BINS / sparge_max(1, w.g.k_blocks));
}

static __global__ void __launch_bounds__(SORT_THREADS) order_lines(const __grid_constant__ work w)
{
    bins &s = *(bins *)shared_memory();
    const int64_t lines = w.heads / w.kv_heads * w.g.q_blocks, first = blockIdx.x * lines;
    const int t = (int)threadIdx.x;
    s.count[t] = 0;
    __syncthreads();
    for (int64_t n = t; n < lines; n += SORT_THREADS) {
        const int kept = kept_of(w, first + n);
        if (kept)
            atomicAdd(&s.count[bin_of(w, kept)], 1u);
    }
    __syncthreads();
    if (t == 0) {
        unsigned int sum = 0;
        for (int n = 0; n < BINS; n++) {
            s.first[n] = sum;
            sum += s.count[n];
        }
        s.base = atomicAdd((unsigned long long *)w.order_len, (unsigned long long)sum);
    }
    __syncthreads();
    for (int64_t n = t; n < lines; n += SORT_THREADS) {
        const int kept = kept_of(w, first + n);
        if (kept)
            w.order[s.base + atomicAdd(&s.first[bin_of(w, kept)], 1u)] = first + n;
    }
}

cudaError_t plan(const work &w, cudaStream_t stream)
{
    cudaError_t error = cudaMemsetAsync(w.order_len, 0, sizeof *w.order_len, stream);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(w.ticket, 0, sizeof *w.ticket, stream);
    if (error == cudaSuccess)
        error = launch(order_lines, w.batch * w.kv_heads, SORT_THREADS, sizeof(bins), stream, w);
    return error;
}

} // namespace sparge
