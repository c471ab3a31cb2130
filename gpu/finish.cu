/* finish.cu: what surrounds stage 2 on every kernel: rows that have no key, lse, elements that were
 * not finite, counters. Algorithm 1 lines 20-21; ref/driver.c in the reference.
 *
 * A kernel leaves o, m and l as if every number were finite, and says in `skipped` what lambda left
 * out; the rest can be told from the mask, so no kernel counts anything. */
#include "gpu/work.h"

namespace sparge {

enum { THREADS = BLOCK_Q };

static __device__ bool skips(const work &w, const query_block &q, int r, int64_t j)
{
    return w.may_skip && sparge_mask_row_get(skipped_row(w, q, r), j);
}

/* (query, key) pairs that rows r0 .. r1 - 1 see of block j; the earlier row sees fewer. */
static __device__ int64_t tokens_of(const work &w, const query_block &q, int r0, int r1, int64_t j)
{
    const int64_t keys = sparge_block_rows(w.g.k_len, BLOCK_K, j);
    if (sparge_keys_visible(&w.g, q.first + r0, j) >= keys)
        return (r1 - r0) * keys;
    int64_t sum = 0;
    for (int r = r0; r < r1; r++)
        sum += sparge_min(keys, sparge_keys_visible(&w.g, q.first + r, j));
    return sum;
}

static __device__ void count_block(const work &w, const query_block &q, int64_t j,
                                   unsigned long long *tally)
{
    const int group = w.may_skip ? w.skip_rows : BLOCK_Q, all = (int)q.rows;
    int done = 0;
    tally[TALLY_QK_DONE]++;
    for (int r0 = 0; r0 < all; r0 += group) {
        const int r1 = (int)sparge_min(all, r0 + group);
        const unsigned long long tokens = (unsigned long long)tokens_of(w, q, r0, r1, j);
        tally[TALLY_QK_TOKENS] += tokens;
        if (!skips(w, q, r0, j)) {
            tally[TALLY_PV_TOKENS] += tokens;
            done += r1 - r0;
        }
    }
    tally[all == BLOCK_Q ? TALLY_PV_ROWS : TALLY_PV_ROWS_SHORT] += (unsigned long long)done;
    if (w.pv_done)
        w.pv_done[q.line * w.g.k_blocks + j] = (float)done / (float)all;
}

static __device__ void add_tally(const work &w, const query_block &q,
                                 const unsigned long long *tally)
{
    for (int n = 0; n < TALLIES; n++) {
        unsigned long long sum = tally[n];
        for (int half = 16; half > 0; half /= 2)
            sum += __shfl_xor_sync(~0u, sum, half);
        if (threadIdx.x % 32 == 0 && sum)
            atomicAdd(&w.tally[q.n * TALLIES + n], sum);
    }
}

static __device__ void fill_row(const work &w, const query_block &q, int r, float x)
{
    for (int c = 0; c < w.dim_v; c++)
        store(w.o, out_row(w, q, r) + c, x);
}

/* Of the blocks that its query block keeps, some: the first one tells, as the last keys are hidden.
 */
static __device__ bool sees_a_key(const work &w, const query_block &q, int r, const uint32_t *kept)
{
    return sparge_keys_visible(&w.g, q.first + r, next_kept(kept, q, 0)) > 0;
}

/* Is an element of v one that P.V could not take? */
static __device__ bool spoils(const work &w, float v)
{
    return !sparge_finite(v) || (w.pv == SPARGE_F16 && !(fabsf(v) < 65520.0f));
}

/* NaN where row r met something that was not finite: the whole row for a query or a key, a channel
 * for an element of v whose P.V it computed. */
static __device__ void spoil_row(const work &w, const query_block &q, int r, const uint32_t *kept)
{
    const int64_t token = q.first + r, line = q.n * w.g.q_len + token, at = out_row(w, q, r);
    const int64_t keys = q.kv * w.g.k_blocks;
    bool row = w.bad_q[line];
    for (int64_t j = next_kept(kept, q, 0); j < q.seen; j = next_kept(kept, q, j + 1)) {
        const bool of_v = w.wild_v[keys + j] && !skips(w, q, r, j);
        const int64_t first = j * BLOCK_K, end = first + sparge_keys_visible(&w.g, token, j);
        for (int64_t t = first; t < end && t < w.g.k_len && (of_v || w.wild_k[keys + j]); t++) {
            row |= w.bad_k[q.kv * w.g.k_len + t];
            const int64_t v = place(w.v, q.b, q.kv % w.kv_heads, t);
            for (int c = 0; of_v && c < w.dim_v; c++)
                if (spoils(w, element(w.v, v + c)))
                    store(w.o, at + c, NAN);
        }
    }
    if (!row)
        return;
    fill_row(w, q, r, NAN);
    if (w.lse)
        w.lse[line] = NAN;
}

static __global__ void __launch_bounds__(THREADS) finish_rows(const __grid_constant__ work w)
{
    const query_block q = query_block_of(w, blockIdx.x);
    const uint32_t *const kept = mask_row(w, q);
    const int r = (int)threadIdx.x;
    const bool there = r < q.rows;
    unsigned long long tally[TALLIES] = {0};
    bool wild = w.wild_q[q.line];
    for (int64_t word = r; 32 * word < w.g.k_blocks; word += THREADS) {
        const uint32_t bits = kept_word(kept, word, q.seen);
        for (int64_t j = 32 * word; j < sparge_min(32 * word + 32, w.g.k_blocks); j++)
            if (bits >> (j & 31) & 1u) {
                count_block(w, q, j, tally);
                wild |= w.wild_k[q.kv * w.g.k_blocks + j] || w.wild_v[q.kv * w.g.k_blocks + j];
            } else if (w.pv_done) {
                w.pv_done[q.line * w.g.k_blocks + j] = 0.0f;
            }
    }
    const bool some = __syncthreads_or(tally[TALLY_QK_DONE] != 0);
    wild = __syncthreads_or(wild);

    const int64_t line = q.n * w.g.q_len + q.first + r;
    if (there) {
        sparge_row state = sparge_row_empty();
        if (some) {
            state.max = w.m[line];
            state.sum = w.l[line];
            if (sparge_row_is_empty(&state) &&
                sees_a_key(w, q, r, kept)) { /* kernel 5: only scores of -inf */
                state.sum = NAN;
                store_state(w, q, r, state);
                fill_row(w, q, r, NAN);
            }
        } else { /* no kernel need look at a block that keeps nothing */
            store_state(w, q, r, state);
            fill_row(w, q, r, 0.0f);
        }
        const bool empty = sparge_row_is_empty(&state);
        if (w.lse)
            w.lse[line] =
                sparge_row_lse(&state) + (w.lift && !empty ? w.softmax_scale * w.lift[line] : 0.0f);
        if (wild && !empty)
            spoil_row(w, q, r, kept);
        tally[TALLY_TOKENS] =
            (unsigned long long)sparge_max(0, sparge_last_key(&w.g, q.first + r) + 1);
    }
    if (r == 0)
        tally[TALLY_PAIRS] = (unsigned long long)q.seen;
    if (w.counts)
        add_tally(w, q, tally);
}

static __global__ void count_heads(const __grid_constant__ work w)
{
    const int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (n >= w.batch * w.heads)
        return;
    const unsigned long long *const tally = w.tally + n * TALLIES;
    const double short_rows = (double)sparge_max(1, w.g.q_len % BLOCK_Q);
    sparge_counts c;
    c.pairs = (int64_t)tally[TALLY_PAIRS];
    c.qk_done = (int64_t)tally[TALLY_QK_DONE];
    c.pv_done = (double)tally[TALLY_PV_ROWS] / (double)BLOCK_Q;
    c.pv_done += (double)tally[TALLY_PV_ROWS_SHORT] / short_rows;
    c.tokens = (int64_t)tally[TALLY_TOKENS];
    c.qk_tokens = (int64_t)tally[TALLY_QK_TOKENS];
    c.pv_tokens = (int64_t)tally[TALLY_PV_TOKENS];
    w.counts[n] = c;
}

cudaError_t finish(const work &w, cudaStream_t stream)
{
    const int64_t heads = w.batch * w.heads;
    cudaError_t error = cudaSuccess;
    if (w.counts)
        error = cudaMemsetAsync(w.tally, 0, (size_t)(heads * TALLIES) * sizeof *w.tally, stream);
    if (error == cudaSuccess)
        error = launch(finish_rows, heads * w.g.q_blocks, THREADS, 0, stream, w);
    if (error == cudaSuccess && w.counts)
        error = launch(count_heads, sparge_ceil_div(heads, THREADS), THREADS, 0, stream, w);
    return error;
}

} // namespace sparge
