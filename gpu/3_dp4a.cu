/* SPDX-License-Identifier: Apache-2.0 */
/* 3_dp4a.cu: kernel 3, the paper's int8 arithmetic. It has the shape of kernel 2, but tiles hold
 * the codes that prepare.cu made. dp4a multiplies four of them at once into int32, exactly, with a
 * quarter of the instructions and of the bytes.
 *
 * P is coded too, against the row's maximum in this block. o then takes one multiply-add a block.
 */
#include "gpu/layout.h"
#include "gpu/ptx.h"
#include "gpu/rows.h"

namespace sparge {

enum { THREADS = SQUARE, ROWS = BLOCK_Q / SIDE, KEYS = BLOCK_K / SIDE, P_PITCH = BLOCK_K / 4 + 1 };

template <int WIDTH, bool HIDES> struct tiles {
    alignas(16) int8_t q[q_tile_bytes(WIDTH)]; /* as layout.h says */
    alignas(16) int8_t k[k_tile_bytes(WIDTH)];
    alignas(16) uint8_t v[v_tile_bytes(WIDTH, false)];
    row_score<HIDES> s[BLOCK_Q][BLOCK_K + 1];
    uint32_t p[BLOCK_Q * P_PITCH]; /* [rows][64 keys in the order of permute_key] */
    float p_scale[BLOCK_Q], shrink[BLOCK_Q];
    votes ballot;
};

/* `bytes`, a multiple of 16, both ends aligned. */
static __device__ void load(void *to, const void *from, int bytes)
{
    for (int n = (int)threadIdx.x; n < bytes / 16; n += THREADS)
        ((uint4 *)to)[n] = ((const uint4 *)from)[n];
}

static __device__ int word(const void *tile, int pitch, int row, int at)
{
    return *(const int *)((const char *)tile + swizzle(pitch, row, at));
}

/* Line 10: S of a block, exact. */
template <int WIDTH, bool HIDES> static __device__ void multiply_qk(tiles<WIDTH, HIDES> &t)
{
    const int y = (int)threadIdx.x / SIDE, x = (int)threadIdx.x % SIDE, pitch = pitch_of(WIDTH);
    int s[ROWS][KEYS] = {{0}};
    for (int c = 0; c < WIDTH; c += 4) {
        int k[KEYS];
#pragma unroll
        for (int b = 0; b < KEYS; b++)
            k[b] = word(t.k, pitch, x + SIDE * b, c);
#pragma unroll
        for (int a = 0; a < ROWS; a++) {
            const int q = word(t.q, pitch, y + SIDE * a, c);
#pragma unroll
            for (int b = 0; b < KEYS; b++)
                s[a][b] = __dp4a(q, k[b], s[a][b]);
        }
    }
    store_piece(s, t.s);
    __syncthreads();
}

/* Lines 11-16: a thread for each row. P is 0 where the row does not attend or skips the block. */
template <int WIDTH, bool HIDES>
static __device__ void softmax(const work &w, const query_block &q, int64_t j, sparge_row &state,
                               tiles<WIDTH, HIDES> &t)
{
    const int r = (int)threadIdx.x;
    row_keys<HIDES> keys = 0;
    float scale = dequant_scale(w, q, j), most = -INFINITY;
    if (r < BLOCK_Q)
        keys = keys_of_row<HIDES>(w, q, r, j);
    if (keys) {
        scale = add_biases(w, q, j, keys, t.s[r], scale);
        most = max_of_row(t.s[r], keys);
    }
    const float local = sparge_row_local(most, scale);
    keys = used_keys(w, q, t.ballot, r, j, state, local, keys);
    if (r < BLOCK_Q) {
        uint32_t p[BLOCK_K / 4] = {0};
        int sum = 0;
#pragma unroll
        for (int k = 0; k < BLOCK_K; k++) {
            const int code =
                is_among(keys, k) ? sparge_weight_code((float)t.s[r][k], most, scale, P_QMAX) : 0;
            p[permute_key(k) / 4] |= (uint32_t)code << 8 * (permute_key(k) % 4);
            sum += code;
        }
#pragma unroll
        for (int n = 0; n < BLOCK_K / 4; n++)
            t.p[r * P_PITCH + n] = p[n];
        coded_row c = {0.0f, 1.0f};
        if (keys)
            c = update_by_codes(state, local, sum);
        t.p_scale[r] = c.p_scale;
        t.shrink[r] = c.shrink;
    }
    __syncthreads();
}

/* Line 16: o = shrink * o + p_scale * v_scale * (codes of P times codes of V). */
template <int WIDTH, bool HIDES>
static __device__ void multiply_pv(const tiles<WIDTH, HIDES> &t, const float *v_scale,
                                   float (&o)[ROWS][WIDTH / SIDE])
{
    const int y = (int)threadIdx.x / SIDE, x = (int)threadIdx.x % SIDE;
    int sum[ROWS][WIDTH / SIDE] = {{0}};
    for (int k = 0; k < BLOCK_K; k += 4) {
        int p[ROWS];
#pragma unroll
        for (int a = 0; a < ROWS; a++)
            p[a] = (int)t.p[(y + SIDE * a) * P_PITCH + k / 4];
#pragma unroll
        for (int b = 0; b < WIDTH / SIDE; b++) {
            const int v = word(t.v, V_PITCH, x + SIDE * b, k);
#pragma unroll
            for (int a = 0; a < ROWS; a++)
                sum[a][b] = __dp4a(p[a], v, sum[a][b]);
        }
    }
#pragma unroll
    for (int a = 0; a < ROWS; a++)
#pragma unroll
        for (int b = 0; b < WIDTH / SIDE; b++)
            o[a][b] = fmaf(t.p_scale[y + SIDE * a] * v_scale[x + SIDE * b], (float)sum[a][b],
                           o[a][b] * t.shrink[y + SIDE * a]);
    __syncthreads();
}

template <int WIDTH, bool HIDES>
static __global__ void __launch_bounds__(THREADS) attend_codes(const __grid_constant__ work w)
{
    tiles<WIDTH, HIDES> &t = *(tiles<WIDTH, HIDES> *)shared_memory();
    const query_block q = query_block_of(w, blockIdx.x);
    sparge_row state = sparge_row_empty(); /* of row threadIdx.x */
    float o[ROWS][WIDTH / SIDE] = {{0}};
    load(t.q, w.q_tile + q.line * q_tile_bytes(WIDTH), q_tile_bytes(WIDTH));
    for (int64_t j = next_kept(q, 0); j < q.visible; j = next_kept(q, j + 1)) {
        const int64_t key_block = q.kv * w.g.k_blocks + j;
        load(t.k, w.k_tile + key_block * k_tile_bytes(WIDTH), k_tile_bytes(WIDTH));
        load(t.v, w.v_tile + key_block * v_tile_bytes(WIDTH, false), v_tile_bytes(WIDTH, false));
        __syncthreads();
        multiply_qk(t);
        softmax(w, q, j, state, t);
        multiply_pv(t, w.v_scale + key_block * WIDTH, o);
    }
    store_square(w, q, state, o, t.shrink);
}

cudaError_t attend_dp4a(const work &w, cudaStream_t stream)
{
    return at_width_and_hides(w, [&](auto width, auto hides) {
        return launch(attend_codes<width, hides>, q_blocks_of_all_heads(w), THREADS,
                      sizeof(tiles<width, hides>), stream, w);
    });
}

} // namespace sparge
