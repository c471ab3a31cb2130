/* SPDX-License-Identifier: Apache-2.0 */
/* prepare.cu: everything that is done once to each block of q, k and v: pooled row,
 * self-similarity, scale, codes. q and v are read once, k twice, because its mean comes first.
 * Sec 3.3 and Algorithm 1 line 3; ref/block.c in the reference.
 *
 * Every sum has the reference's order, so pooled rows, similarities, scales and codes are its bits.
 * A thread owns a channel and adds the rows of a block in their order. A dot product has 16 lanes,
 * one for each partial sum. */
#include "gpu/layout.h"
#include "gpu/ptx.h"
#include "gpu/work.h"

#include "common/select.h"

namespace sparge {

enum { THREADS = 256, LANES = 16, QMAX = 127 };

/* ---- Launches 1 and 2: the mean key; for fp8 the largest |v| of each channel of a head ---- */

/* A block of keys: its sum, and its largest |v|. */
static __global__ void __launch_bounds__(MAX_WIDTH) sum_blocks(const __grid_constant__ work w)
{
    const int64_t line = blockIdx.x, kv = line / w.g.k_blocks, j = line % w.g.k_blocks;
    const int64_t b = kv / w.kv_heads, h = kv % w.kv_heads;
    const int rows = (int)sparge_block_rows(w.g.k_len, BLOCK_K, j), c = (int)threadIdx.x;
    if (w.k_sums && c < w.dim) {
        float sum = 0.0f;
        for (int r = 0; r < rows; r++) {
            const float x = load(w.k, sparge_in_row(&w.k, b, h, j * BLOCK_K + r) + c);
            sum += sparge_finite(x) ? x : 0.0f;
        }
        w.k_sums[line * w.dim + c] = sum;
    }
    if (w.v_max && c < w.width) {
        float max = 0.0f;
        for (int r = 0; r < rows && c < w.dim_v; r++) {
            const float x = load(w.v, sparge_in_row(&w.v, b, h, j * BLOCK_K + r) + c);
            max = fmaxf(max, sparge_finite(x) ? fabsf(x) : 0.0f);
        }
        w.v_max[line * w.width + c] = max;
    }
}

static __global__ void __launch_bounds__(MAX_WIDTH) reduce_blocks(const __grid_constant__ work w)
{
    const int64_t kv = blockIdx.x;
    const int c = (int)threadIdx.x;
    if (w.k_sums && c < w.dim) {
        double sum = 0.0;
        for (int64_t j = 0; j < w.g.k_blocks; j++)
            sum += (double)w.k_sums[(kv * w.g.k_blocks + j) * w.dim + c];
        w.k_mean[kv * w.dim + c] = sparge_mean(sum, w.g.k_len);
    }
    if (w.v_max && c < w.width) {
        float max = 0.0f;
        for (int64_t j = 0; j < w.g.k_blocks; j++)
            max = fmaxf(max, w.v_max[(kv * w.g.k_blocks + j) * w.width + c]);
        w.v_scale[kv * w.width + c] = sparge_quant_scale(max, SPARGE_E4M3_MAX);
    }
}

/* ---- Launch 3: a block of q, k or v, held in shared memory as floats ---- */

template <int WIDTH> struct block {
    float x[BLOCK_Q * WIDTH]; /* [rows][width] */
    float inverse[BLOCK_Q];   /* 1 / the length of a row; 0 for a row of zeros */
    float pool[MAX_WIDTH], unit_sum[MAX_WIDTH], max[MAX_WIDTH]; /* unit_sum: of unit rows */
    uint32_t nonfinite[BLOCK_Q / 32];                           /* rows */
};

struct quad {
    float x[4];
};

/* Channels c .. c + 3 of the row that begins `at`; zeros beyond dim. */
static __device__ quad load_quad(const sparge_in &in, int64_t at, int c, int dim)
{
    quad q = {{0.0f, 0.0f, 0.0f, 0.0f}};
    const int size = (int)sparge_element_size(in.dtype);
    const char *from = (const char *)in.data + (at + c) * size;
    if (c + 4 <= dim && (uintptr_t)from % (4 * (unsigned)size) == 0) {
        if (size == 4) {
            const float4 x = *(const float4 *)from;
            q.x[0] = x.x, q.x[1] = x.y, q.x[2] = x.z, q.x[3] = x.w;
        } else {
            const uint2 x = *(const uint2 *)from;
            const uint32_t half[4] = {x.x & 0xffffu, x.x >> 16, x.y & 0xffffu, x.y >> 16};
            for (int e = 0; e < 4; e++)
                q.x[e] = sparge_widen((uint16_t)half[e], in.dtype);
        }
        return q;
    }
    for (int e = 0; e < 4; e++)
        if (c + e < dim)
            q.x[e] = load(in, at + c + e);
    return q;
}

/* Rows [0, padded) of a block, less `mean` unless NULL. NaN and infinity become 0 and mark their
 * row. */
template <int WIDTH>
static __device__ void load_block(const sparge_in &in, int64_t b, int64_t h, int64_t first,
                                  int rows, int padded, int dim, const float *mean, block<WIDTH> &s)
{
    if (threadIdx.x < BLOCK_Q / 32)
        s.nonfinite[threadIdx.x] = 0;
    __syncthreads();
    const int quads = WIDTH / 4;
    for (int n = (int)threadIdx.x; n < padded * quads; n += THREADS) {
        const int r = n / quads, c = n % quads * 4;
        quad x = {{0.0f, 0.0f, 0.0f, 0.0f}};
        if (r < rows)
            x = load_quad(in, sparge_in_row(&in, b, h, first + r), c, dim);
        for (int e = 0; e < 4; e++) {
            if (mean && r < rows && c + e < dim)
                x.x[e] -= mean[c + e];
            if (!sparge_finite(x.x[e])) {
                x.x[e] = 0.0f;
                atomicOr(&s.nonfinite[r / 32], 1u << (r % 32));
            }
            s.x[r * WIDTH + c + e] = x.x[e];
        }
    }
    __syncthreads();
}

/* sparge_dot by 16 lanes, one for each partial sum; lane 0 has the result. n is a multiple of 16.
 */
static __device__ float dot_of_lanes(const float *a, const float *b, int n)
{
    const int lane = (int)threadIdx.x % LANES;
    float sum = 0.0f;
    for (int c = lane; c < n; c += LANES)
        sum = fmaf(a[c], b[c], sum);
    for (int half = LANES / 2; half > 0; half /= 2)
        sum += __shfl_down_sync(~0u, sum, (unsigned)half, LANES);
    return sum;
}

/* Pooled row and self-similarity; the mean of all n * n cosines is |sum of unit rows|^2 / n^2. */
template <int WIDTH>
static __device__ void summarize(const work &w, block<WIDTH> &s, int rows, float *pool, float *sim)
{
    const int t = (int)threadIdx.x;
    for (int r = t / LANES; r < BLOCK_Q; r += THREADS / LANES) {
        const float *row = &s.x[(r < rows ? r : 0) * WIDTH];
        const float square = dot_of_lanes(row, row, WIDTH);
        if (t % LANES == 0)
            s.inverse[r] = sparge_unit_factor(square);
    }
    __syncthreads();
    const int c = t % MAX_WIDTH;
    float sum = 0.0f;
    if (c < WIDTH) {
        if (t < MAX_WIDTH) {
            for (int r = 0; r < rows; r++)
                sum += s.x[r * WIDTH + c];
            s.pool[c] = sum / (float)rows;
        } else {
            for (int r = 0; r < rows; r++)
                sum = fmaf(s.x[r * WIDTH + c], s.inverse[r], sum);
            s.unit_sum[c] = sum;
        }
    }
    __syncthreads();
    if (t < w.dim)
        pool[t] = s.pool[t];
    const float square = dot_of_lanes(s.unit_sum, s.unit_sum, WIDTH);
    if (t == 0)
        *sim = sparge_mean_cosine(square, rows);
}

/* The largest |x| of a block; every thread has it. */
template <int WIDTH> static __device__ float block_max(block<WIDTH> &s, int rows)
{
    const int t = (int)threadIdx.x;
    float max = 0.0f;
    for (int n = t; n < rows * WIDTH; n += THREADS)
        max = fmaxf(max, fabsf(s.x[n]));
    for (int half = 16; half > 0; half /= 2)
        max = fmaxf(max, __shfl_xor_sync(~0u, max, half));
    if (t % 32 == 0)
        s.max[t / 32] = max;
    __syncthreads();
    for (int n = 0; n < THREADS / 32; n++)
        max = fmaxf(max, s.max[n]);
    __syncthreads();
    return max;
}

/* Codes of all rows, as layout.h says. */
template <int WIDTH>
static __device__ void quantize(block<WIDTH> &s, int rows, int padded, int8_t *tile, float *scale)
{
    constexpr int pitch = pitch_of(WIDTH), quads = WIDTH / 4, tail = (pitch - WIDTH) / 4;
    const float d = sparge_quant_scale(block_max(s, rows), QMAX);
    if (threadIdx.x == 0)
        *scale = d;
    for (int n = (int)threadIdx.x; n < padded * quads; n += THREADS) {
        const int r = n / quads, c = n % quads * 4;
        uint32_t codes = 0;
        for (int e = 0; e < 4; e++)
            codes |= (uint32_t)(uint8_t)sparge_quant_code(s.x[r * WIDTH + c + e], d, QMAX) << 8 * e;
        *(uint32_t *)(tile + swizzle(pitch, r, c)) = codes;
    }
    if constexpr (tail > 0) /* rows end in zeros */
        for (int n = (int)threadIdx.x; n < padded * tail; n += THREADS)
            *(uint32_t *)(tile + swizzle(pitch, n / tail, WIDTH + n % tail * 4)) = 0;
}

template <int WIDTH>
static __device__ void store_nonfinite(const block<WIDTH> &s, int rows, uint8_t *of_row,
                                       uint8_t *of_block)
{
    if ((int)threadIdx.x < rows)
        of_row[threadIdx.x] = s.nonfinite[threadIdx.x / 32] >> (threadIdx.x % 32) & 1u;
    if (threadIdx.x == 0)
        *of_block = (s.nonfinite[0] | s.nonfinite[1] | s.nonfinite[2] | s.nonfinite[3]) != 0;
}

template <int WIDTH> static __device__ void prepare_q(const work &w, int64_t line, block<WIDTH> &s)
{
    const query_block q = query_block_of(w, line);
    const int rows = (int)q.rows;
    load_block(w.q, q.b, q.h, q.first, rows, BLOCK_Q, w.dim, NULL, s);
    store_nonfinite(s, rows, w.q_nonfinite + q.n * w.g.q_len + q.first, &w.q_block_nonfinite[line]);
    if (w.q_pool)
        summarize(w, s, rows, w.q_pool + line * w.dim, &w.q_sim[line]);
    if (w.q_tile)
        quantize(s, rows, BLOCK_Q, w.q_tile + line * q_tile_bytes(WIDTH), &w.q_scale[line]);
    if (w.q_dot_mean_k) {
        __syncthreads();
        if (threadIdx.x < MAX_WIDTH)
            s.pool[threadIdx.x] =
                (int)threadIdx.x < w.dim ? w.k_mean[q.kv * w.dim + threadIdx.x] : 0.0f;
        __syncthreads();
        for (int r = (int)threadIdx.x / LANES; r < BLOCK_Q; r += THREADS / LANES) {
            const float dot = dot_of_lanes(&s.x[r * WIDTH], s.pool, WIDTH);
            if (r < rows && threadIdx.x % LANES == 0)
                w.q_dot_mean_k[q.n * w.g.q_len + q.first + r] = dot;
        }
    }
}

template <int WIDTH> static __device__ void prepare_k(const work &w, int64_t line, block<WIDTH> &s)
{
    const int64_t kv = line / w.g.k_blocks, j = line % w.g.k_blocks;
    const int rows = (int)sparge_block_rows(w.g.k_len, BLOCK_K, j);
    load_block(w.k, kv / w.kv_heads, kv % w.kv_heads, j * BLOCK_K, rows, BLOCK_K, w.dim,
               w.k_mean ? w.k_mean + kv * w.dim : NULL, s);
    store_nonfinite(s, rows, w.k_nonfinite + kv * w.g.k_len + j * BLOCK_K,
                    &w.k_block_nonfinite[line]);
    if (w.k_shown && threadIdx.x < BLOCK_K) {
        const int r = (int)threadIdx.x;
        const uint32_t shown = __ballot_sync(
            ~0u, r < rows && !sparge_bias_hides(w.k_bias[kv * w.g.k_len + j * BLOCK_K + r]));
        if (r % 32 == 0)
            w.k_shown[line * (BLOCK_K / 32) + r / 32] = shown;
    }
    if (w.k_pool)
        summarize(w, s, rows, w.k_pool + line * w.dim, &w.k_sim[line]);
    if (w.k_tile)
        quantize(s, rows, BLOCK_K, w.k_tile + line * k_tile_bytes(WIDTH), &w.k_scale[line]);
}

/* A row of V transposed, 64 keys of a channel as bytes, half of it by each thread. */
template <int WIDTH>
static __device__ void transpose_v(const work &w, int64_t line, int rows, block<WIDTH> &s)
{
    const int c = (int)threadIdx.x % MAX_WIDTH, part = (int)threadIdx.x / MAX_WIDTH;
    if (c >= WIDTH)
        return;
    float scale = 0.0f;
    if (w.pv == SPARGE_INT8) {
        float max = 0.0f;
        for (int r = 0; r < rows; r++)
            max = fmaxf(max, fabsf(s.x[r * WIDTH + c]));
        scale = sparge_quant_scale(max, QMAX);
        w.v_scale[line * WIDTH + c] = scale; /* by both threads */
    } else {
        scale = w.v_scale[line / w.g.k_blocks * WIDTH + c];
    }
    uint8_t *const tile = w.v_tile + line * v_tile_bytes(WIDTH, false);
    for (int k0 = 32 * part; k0 < 32 * part + 32; k0 += 16) {
        uint32_t piece[4] = {0, 0, 0, 0};
        for (int k = k0; k < k0 + 16; k++) {
            const float x = s.x[k * WIDTH + c];
            const uint32_t code = w.pv == SPARGE_INT8
                                      ? (uint8_t)sparge_quant_code(x, scale, QMAX)
                                      : sparge_f32_to_e4m3(sparge_quant_ratio(x, scale));
            piece[permute_key(k) % 16 / 4] |= code << 8 * (permute_key(k) % 4);
        }
        *(uint4 *)(tile + swizzle(V_PITCH, c, k0)) =
            make_uint4(piece[0], piece[1], piece[2], piece[3]);
    }
}

template <int WIDTH> static __device__ void round_v(const work &w, int64_t line, block<WIDTH> &s)
{
    uint8_t *const tile = w.v_tile + line * v_tile_bytes(WIDTH, true);
    const int padded = (WIDTH + 63) / 64 * 64;
    for (int n = (int)threadIdx.x; n < BLOCK_K * padded / 2; n += THREADS) {
        const int r = n / (padded / 2), c = n % (padded / 2) * 2;
        const float *x = &s.x[r * WIDTH + c];
        const uint32_t pair =
            c < WIDTH ? sparge_f32_to_f16(x[0]) | (uint32_t)sparge_f32_to_f16(x[1]) << 16 : 0u;
        *(uint32_t *)(tile + swizzle_v_f16(r, c)) = pair;
    }
}

template <int WIDTH> static __device__ void prepare_v(const work &w, int64_t line, block<WIDTH> &s)
{
    const int64_t kv = line / w.g.k_blocks, j = line % w.g.k_blocks;
    const int rows = (int)sparge_block_rows(w.g.k_len, BLOCK_K, j);
    load_block(w.v, kv / w.kv_heads, kv % w.kv_heads, j * BLOCK_K, rows, BLOCK_K, w.dim_v, NULL, s);
    if (w.pv == SPARGE_F16) {
        for (int n = (int)threadIdx.x; n < rows * WIDTH; n += THREADS)
            if (!sparge_value_is_finite(s.x[n], w.pv)) {
                s.x[n] = 0.0f;
                atomicOr(&s.nonfinite[0], 1u);
            }
        __syncthreads();
    }
    if (threadIdx.x == 0)
        w.v_block_nonfinite[line] = (s.nonfinite[0] | s.nonfinite[1]) != 0;
    if (w.pv == SPARGE_F16)
        round_v(w, line, s);
    else if (w.v_tile)
        transpose_v(w, line, rows, s);
}

template <int WIDTH>
static __global__ void __launch_bounds__(THREADS) prepare_blocks(const __grid_constant__ work w)
{
    block<WIDTH> &s = *(block<WIDTH> *)shared_memory();
    const int64_t of_q = q_blocks_of_all_heads(w), of_k = k_blocks_of_all_heads(w);
    const int64_t line = blockIdx.x;
    if (line < of_k)
        prepare_k(w, line, s);
    else if (line < of_k + of_q)
        prepare_q(w, line - of_k, s);
    else
        prepare_v(w, line - of_k - of_q, s);
}

cudaError_t prepare(const work &w, cudaStream_t stream)
{
    const int64_t of_q = q_blocks_of_all_heads(w), of_k = k_blocks_of_all_heads(w);
    const int64_t blocks = of_k + of_q + (w.v_block_nonfinite ? of_k : 0);
    cudaError_t error = cudaSuccess;
    if (w.k_sums || w.v_max)
        error = launch(sum_blocks, of_k, MAX_WIDTH, 0, stream, w);
    if (error == cudaSuccess && (w.k_sums || w.v_max))
        error = launch(reduce_blocks, w.batch * w.kv_heads, MAX_WIDTH, 0, stream, w);
    if (error != cudaSuccess)
        return error;
    return at_width(w, [&](auto width) {
        return launch(prepare_blocks<width>, blocks, THREADS, sizeof(block<width>), stream, w);
    });
}

} // namespace sparge
