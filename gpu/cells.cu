/* SPDX-License-Identifier: Apache-2.0 */
/* cells.cu: the same as predict.cu by cells, which are parts of blocks: mean rows, their products,
 * masses of blocks, selection. Not of the paper; score_cells in ref/predict.c in the reference.
 *
 * The means have a launch of their own. Then a thread block owns a query block and takes its rows
 * of cells in groups. A thread multiplies all rows of a group by a few mean keys. Means lie channel
 * by channel, so that neighbouring threads read neighbours. Products are needed twice: for the
 * largest of each row, then for the codes, of which the sum over a block stays. Where shared memory
 * has no room for those of a group, they are computed twice. */
#include "gpu/select.h"

namespace sparge {

/* ---- Mean rows ---- */

/* Of the cells of a block: channel c of the n-th is mean[c * pitch + n]. A thread owns a channel
 * and adds the rows in their order. */
static __device__ void average(const work &w, const sparge_in &in, int64_t b, int64_t h,
                               int64_t first, int rows, const float *k_mean, float *mean,
                               int64_t pitch)
{
    const int c = (int)threadIdx.x;
    for (int n = 0; c < w.dim && n * w.cell < rows; n++) {
        const int begin = n * w.cell, end = (int)sparge_min(begin + w.cell, rows);
        float sum = 0.0f;
        for (int r = begin; r < end; r++) {
            const float x = load(in, sparge_in_row(&in, b, h, first + r) + c);
            const float less = k_mean ? x - k_mean[c] : x;
            sum += sparge_finite(less) ? less : 0.0f;
        }
        mean[c * pitch + n] = sparge_cell_mean(sum, end - begin);
    }
}

static __global__ void __launch_bounds__(MAX_WIDTH) average_blocks(const __grid_constant__ work w)
{
    const int64_t of_k = k_blocks_of_all_heads(w), line = blockIdx.x;
    if (line < of_k) {
        const int64_t kv = line / w.g.k_blocks, j = line % w.g.k_blocks, pitch = w.cells.k_blocks;
        average(w, w.k, kv / w.kv_heads, kv % w.kv_heads, j * BLOCK_K,
                (int)sparge_block_rows(w.g.k_len, BLOCK_K, j),
                w.k_mean ? w.k_mean + kv * w.dim : NULL,
                w.k_cell + kv * w.dim * pitch + j * (BLOCK_K / w.cell), pitch);
    } else {
        const query_block q = query_block_of(w, line - of_k);
        const int pitch = BLOCK_Q / w.cell;
        average(w, w.q, q.b, q.h, q.first, (int)q.rows, NULL, w.q_cell + q.line * w.dim * pitch,
                pitch);
    }
}

/* ---- Products and masses ---- */

enum { WARPS = 8, THREADS = 32 * WARPS, PRODUCTS = 32 }; /* a thread holds so many products */

template <int ROWS> struct group {
    float q[MAX_WIDTH][ROWS]; /* mean queries; rows that do not exist are zeros */
    float most[WARPS][ROWS];  /* the largest product of each row in a warp; [0]: of all */
    float worth[ROWS];        /* what a code of the row is worth */
    int visible[ROWS];        /* cells of keys: the first ones */
};

/* What follows the group in shared memory. */
struct arrays {
    uint32_t *mass;  /* [k_blocks] of the query block */
    int32_t *codes;  /* [rows][k_blocks] sums */
    float *products; /* [rows][cells of keys]; NULL: no room */
};

/* Rows [first, first + rows) of the cells of a query block. */
template <int ROWS>
static __device__ void load_group(const work &w, const query_block &q, int first, int rows,
                                  group<ROWS> &s)
{
    const int of_block = BLOCK_Q / w.cell, t = (int)threadIdx.x;
    const float *const mean = w.q_cell + q.line * w.dim * of_block + first;
    for (int n = t; n < w.dim * ROWS; n += THREADS) {
        const int c = n / ROWS, r = n % ROWS;
        s.q[c][r] = r < rows ? mean[c * of_block + r] : 0.0f;
    }
    if (t < rows)
        s.visible[t] = (int)sparge_blocks_visible(&w.cells, q.i * of_block + first + t);
    __syncthreads();
}

/* Products of the rows with cells u, u + THREADS, ... of keys, or with the last before `end`. */
template <int ROWS>
static __device__ void multiply(const work &w, const query_block &q, const group<ROWS> &s, int u,
                                int end, float (&x)[PRODUCTS / ROWS][ROWS])
{
    const int64_t pitch = w.cells.k_blocks;
    const float *k[PRODUCTS / ROWS];
    for (int n = 0; n < PRODUCTS / ROWS; n++)
        k[n] = w.k_cell + q.kv * w.dim * pitch + sparge_min(u + THREADS * n, end - 1);
#pragma unroll 4
    for (int c = 0; c < w.dim; c++)
        for (int n = 0; n < PRODUCTS / ROWS; n++)
            for (int r = 0; r < ROWS; r++)
                x[n][r] = fmaf(k[n][c * pitch], s.q[c][r], x[n][r]);
}

/* Calls use(u, x) with the products of all rows for all cells u that the last row of the group
 * sees, and up to THREADS * PRODUCTS / ROWS more. The product is -inf of a row that does not see
 * the cell. */
template <bool AGAIN, int ROWS, class Use>
static __device__ void each_cell(const work &w, const query_block &q, int rows,
                                 const group<ROWS> &s, float *products, const Use &use)
{
    constexpr int cells = PRODUCTS / ROWS;
    const int end = s.visible[rows - 1];
    for (int first = 0; first < end; first += THREADS * cells) {
        float x[cells][ROWS] = {};
        const int u0 = first + (int)threadIdx.x;
        if (!AGAIN || !products)
            multiply(w, q, s, u0, end, x);
#pragma unroll
        for (int n = 0; n < cells; n++) {
            const int u = u0 + THREADS * n;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const bool sees = r < rows && u < s.visible[r];
                const int at = r * (int)w.cells.k_blocks + u;
                if (products && sees && AGAIN)
                    x[n][r] = products[at];
                else if (products && sees)
                    products[at] = x[n][r];
                x[n][r] = sees ? x[n][r] : -INFINITY;
            }
            use(u, x[n]);
        }
    }
}

/* The largest product of each row, in s.most[0]. */
template <int ROWS>
static __device__ void find_most(const work &w, const query_block &q, int rows, group<ROWS> &s,
                                 const arrays &to)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    float most[ROWS];
    for (int r = 0; r < ROWS; r++)
        most[r] = -INFINITY;
    each_cell<false>(w, q, rows, s, to.products, [&](int, const float(&x)[ROWS]) {
        for (int r = 0; r < ROWS; r++)
            most[r] = fmaxf(most[r], x[r]);
    });
    for (int r = 0; r < ROWS; r++) {
        for (int half = 16; half > 0; half /= 2)
            most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], half));
        if (lane == 0)
            s.most[warp][r] = most[r];
    }
    __syncthreads();
    if (threadIdx.x < ROWS)
        for (int n = 1; n < WARPS; n++)
            s.most[0][threadIdx.x] = fmaxf(s.most[0][threadIdx.x], s.most[n][threadIdx.x]);
    __syncthreads();
}

/* The codes of each row, added up by blocks, which begin as zeros. */
template <int ROWS>
static __device__ void add_codes(const work &w, const query_block &q, int rows,
                                 const group<ROWS> &s, const arrays &to)
{
    const int per_block = BLOCK_K / w.cell, lanes = per_block < 32 ? per_block : 32;
    const bool leads = threadIdx.x % (unsigned)lanes == 0; /* the lanes of a block */
    const float scale = sparge_cell_scale(w.softmax_scale);
    each_cell<true>(w, q, rows, s, to.products, [&](int u, const float(&x)[ROWS]) {
        int32_t *codes = to.codes + u / per_block;
#pragma unroll
        for (int r = 0; r < ROWS; r++, codes += w.g.k_blocks) {
            int sum = sparge_weight_code(x[r], s.most[0][r], scale, SPARGE_CELL_QMAX);
            for (int half = lanes / 2; half > 0; half /= 2)
                sum += __shfl_xor_sync(~0u, sum, half);
            if (leads && sum)
                atomicAdd(codes, sum);
        }
    });
    __syncthreads();
}

/* What the rows pay to each block, added to the masses. Codes are zeros again. */
template <int ROWS>
static __device__ void add_masses(const work &w, const query_block &q, int first, int rows,
                                  group<ROWS> &s, const arrays &to)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    for (int r = warp; r < rows; r += WARPS) {
        const int64_t c = q.i * (BLOCK_Q / w.cell) + first + r;
        uint64_t total = 0;
        for (int64_t j = lane; j < q.visible; j += 32)
            total += (uint64_t)to.codes[r * w.g.k_blocks + j];
        total = sum_of_warp(total);
        if (lane == 0)
            s.worth[r] = sparge_cell_worth(sparge_block_rows(w.g.q_len, w.cell, c), total);
    }
    __syncthreads();
    for (int64_t j = threadIdx.x; j < q.visible; j += THREADS)
        for (int r = 0; r < rows; r++) {
            int32_t *const codes = &to.codes[r * w.g.k_blocks + j];
            to.mass[j] += sparge_cell_mass(*codes, s.worth[r]);
            *codes = 0;
        }
    __syncthreads();
}

/* One warp. */
static __device__ void store_shares(const work &w, const query_block &q, const weighed_row &row)
{
    const uint64_t total = total_of(row, q.visible);
    for (int64_t j = threadIdx.x % 32; j < w.g.k_blocks; j += 32) {
        const int64_t at = q.line * w.g.k_blocks + j;
        const float share = j < q.visible ? sparge_cell_share(row.masses[j], total) : -INFINITY;
        if (w.s_all)
            w.s_all[at] = share;
        if (w.s)
            w.s[at] = share;
    }
}

template <int ROWS>
static __global__ void __launch_bounds__(THREADS)
    weigh_rows(const __grid_constant__ work w, int most_rows, bool keeps_products)
{
    group<ROWS> &s = *(group<ROWS> *)shared_memory();
    const query_block q = query_block_of(w, blockIdx.x);
    uint32_t *const mass = (uint32_t *)(&s + 1), *const codes = mass + w.g.k_blocks,
                    *const end = codes + most_rows * w.g.k_blocks;
    const arrays to = {mass, (int32_t *)codes, keeps_products ? (float *)end : NULL};
    for (uint32_t *x = mass + threadIdx.x; x < end; x += THREADS)
        *x = 0;
    const int all = (int)sparge_ceil_div(q.rows, w.cell);
    for (int first = 0; first < all; first += most_rows) {
        const int rows = (int)sparge_min(most_rows, all - first);
        load_group(w, q, first, rows, s);
        find_most(w, q, rows, s, to);
        add_codes(w, q, rows, s, to);
        add_masses(w, q, first, rows, s, to);
    }
    if (threadIdx.x >= 32)
        return;
    const weighed_row row = {mass};
    if (w.s_all || w.s)
        store_shares(w, q, row);
    select_row(w, q, thresholds_of(w, q.h), row);
}

/* Words of shared memory behind a group. */
template <int ROWS> static int64_t words_of(int shared_limit)
{
    return (shared_limit - (int64_t)sizeof(group<ROWS>)) / (int64_t)sizeof(uint32_t);
}

/* How many rows of codes fit there beside the masses. */
static int64_t rows_that_fit(int64_t k_blocks, int64_t words)
{
    return words / sparge_max(1, k_blocks) - 1;
}

bool cells_fit(int64_t k_blocks, int shared_limit)
{
    return rows_that_fit(k_blocks, words_of<16>(shared_limit)) > 0;
}

template <int ROWS> static cudaError_t queue(const work &w, cudaStream_t stream)
{
    int shared_limit = 0;
    const cudaError_t error =
        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_limit);
    if (error != cudaSuccess)
        return error;
    const int64_t words = words_of<ROWS>(shared_limit);
    const int rows =
        (int)sparge_min(sparge_min(ROWS, BLOCK_Q / w.cell), rows_that_fit(w.g.k_blocks, words));
    const int64_t sums = (1 + rows) * w.g.k_blocks, all = sums + rows * w.cells.k_blocks;
    const bool keeps = all <= words;
    const size_t shared = sizeof(group<ROWS>) + (size_t)(keeps ? all : sums) * sizeof(uint32_t);
    return launch(weigh_rows<ROWS>, q_blocks_of_all_heads(w), THREADS, shared, stream, w, rows,
                  keeps);
}

cudaError_t predict_cells(const work &w, cudaStream_t stream)
{
    const cudaError_t error =
        launch(average_blocks, k_blocks_of_all_heads(w) + q_blocks_of_all_heads(w), MAX_WIDTH, 0,
               stream, w);
    return error != cudaSuccess    ? error
           : BLOCK_Q / w.cell <= 8 ? queue<8>(w, stream)
                                   : queue<16>(w, stream);
}

} // namespace sparge
