/* SPDX-License-Identifier: Apache-2.0 */
/* 4_mma.cu: kernel 4, tensor cores (mma.sync, sm_80 and later). Eight warps, 16 query rows each.
 * Scores never leave the registers: packed, the accumulators of Q.K^T are the operand of P.V. While
 * a block is multiplied, the next one is copied to the other half of shared memory (cp.async).
 *
 * Lane = 4 g + quad holds rows g and g + 8 of its warp's 16, and two of each 8 columns: x[i][2 h +
 * e] is row g + 8 h, column 8 i + 2 quad + e. A row is spread over the four lanes of a quad.
 *
 * P.V in int8 gives the bits of kernel 3, except for exp2, which is the hardware's, within 2 ulp.
 * P.V in f16 is FlashAttention's: P against the running maximum, sums in float. */
#include "gpu/layout.h"
#include "gpu/ptx.h"
#include "gpu/rows.h"

namespace sparge {

enum { THREADS = 256, STAGES = 2 };

template <int WIDTH, bool F16> struct stage {
    alignas(1024) int8_t k[k_tile_bytes(WIDTH)]; /* as layout.h says */
    alignas(1024) uint8_t v[v_tile_bytes(WIDTH, F16)];
};

template <int WIDTH, bool F16> struct tiles {
    alignas(1024) int8_t q[q_tile_bytes(WIDTH)];
    stage<WIDTH, F16> ring[STAGES];
    votes ballot;
};

/* A thread's share of its warp: two rows. */
template <int WIDTH> struct fragment {
    float o[WIDTH / 8][4];
    sparge_row state[2]; /* f16: the sum is over this thread's columns, until the end */
};

SPARGE_DEVICE int lane() { return (int)threadIdx.x % 32; }
SPARGE_DEVICE int row_of(int h) { return (int)threadIdx.x / 32 * 16 + lane() / 4 + 8 * h; }

/* `bytes`, a multiple of 16. */
static __device__ void load(void *to, const void *from, int bytes)
{
    for (int n = (int)threadIdx.x * 16; n < bytes; n += THREADS * 16)
        copy_async((char *)to + n, (const char *)from + n);
}

template <int WIDTH, bool F16>
static __device__ void load_stage(const work &w, const query_block &q, int64_t j,
                                  stage<WIDTH, F16> &s)
{
    const int64_t block = q.kv * w.g.k_blocks + j;
    load(s.k, w.k_tile + block * k_tile_bytes(WIDTH), k_tile_bytes(WIDTH));
    load(s.v, w.v_tile + block * v_tile_bytes(WIDTH, F16), v_tile_bytes(WIDTH, F16));
}

/* Two neighbouring operands b of 8 columns and 32 bytes of k each. A column is a row of the tile.
 */
SPARGE_DEVICE void load_columns(uint32_t (&b)[4], const void *tile, int pitch, int column, int at)
{
    const int matrix = lane() / 8;
    ldmatrix(b, (const char *)tile +
                    swizzle(pitch, column + 8 * (matrix / 2) + lane() % 8, at + 16 * (matrix % 2)));
}

/* Line 10: S of 16 rows. */
template <int WIDTH>
static __device__ void multiply_qk(const int8_t *q, const int8_t *k, int (&s)[8][4])
{
    const int matrix = lane() / 8, r = (int)threadIdx.x / 32 * 16 + lane() % 8 + 8 * (matrix % 2);
#pragma unroll
    for (int i = 0; i < 8; i++)
        s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
#pragma unroll
    for (int c = 0; c < WIDTH; c += 32) {
        uint32_t a[4];
        ldmatrix(a, q + swizzle(pitch_of(WIDTH), r, c + 16 * (matrix / 2)));
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            uint32_t b[4];
            load_columns(b, k, pitch_of(WIDTH), 8 * i, c);
            mma_s8(s[i], a, b[0], b[1]);
            mma_s8(s[i + 1], a, b[2], b[3]);
        }
    }
}

/* Is column 2 quad + e of 8-column tile i one of the first `count` keys? Without EDGE every row has
 * all keys of the block, or none if it skips. */
template <bool EDGE> SPARGE_DEVICE bool attends_to(int i, int e, int count)
{
    return EDGE ? 8 * i + 2 * (lane() % 4) + e < count : count != 0;
}

/* Is it one of `keys`, turned so that bit 0 is column 2 quad? */
template <bool EDGE> SPARGE_DEVICE bool attends_to(int i, int e, uint64_t keys)
{
    return keys >> (8 * i + e) & 1;
}

template <bool HIDES>
SPARGE_DEVICE row_keys<HIDES> keys_of_lane(const work &w, const query_block &q, int r, int64_t j)
{
    const row_keys<HIDES> keys = keys_of_row<HIDES>(w, q, r, j);
    const int turn = 2 * (lane() % 4);
    if constexpr (HIDES)
        return keys >> turn | keys << (64 - turn) % 64;
    else
        return keys;
}

/* The scores of a thread. Where pairs are hidden they are floats, with the biases of their keys if
 * there are any. Returns the scale that is left to apply. */
template <bool HIDES>
static __device__ float scores_of(const work &w, const query_block &q, int64_t j,
                                  const int (&product)[8][4], float scale,
                                  row_score<HIDES> (&s)[8][4])
{
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            s[i][n] = (row_score<HIDES>)product[i][n];
    if constexpr (HIDES)
        if (w.k_bias) {
#pragma unroll
            for (int n = 0; n < 32; n++) {
                const int64_t token = j * BLOCK_K + 8 * (n / 4) + 2 * (lane() % 4) + n % 2;
                const float bias = token < w.g.k_len ? *biases(w, q, token) : 0.0f;
                s[n / 4][n % 4] = sparge_score_biased(s[n / 4][n % 4], scale, bias);
            }
            return 1.0f;
        }
    return scale;
}

SPARGE_DEVICE int least(int) { return INT32_MIN; }
SPARGE_DEVICE float least(float) { return -INFINITY; }
SPARGE_DEVICE int larger(int a, int b) { return b > a ? b : a; }
SPARGE_DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }

/* Line 11: the largest score of each of a thread's two rows; a NaN stays. */
template <bool EDGE, class S, class KEYS>
static __device__ void largest_scores(const S (&s)[8][4], const KEYS (&keys)[2], S (&most)[2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        S max = least(s[0][0]);
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (attends_to<EDGE>(i, e, keys[h]))
                    max = larger(max, s[i][2 * h + e]);
        for (int step = 1; step < 4; step *= 2)
            max = larger(max, __shfl_xor_sync(~0u, max, step));
        most[h] = max;
    }
}

/* Lines 14-16: which of the two rows skip. All threads of the block come here together. */
template <class KEYS>
static __device__ void skipped_rows(const work &w, const query_block &q, votes &v, int64_t j,
                                    const sparge_row (&state)[2], const float (&local)[2],
                                    const KEYS (&keys)[2], bool (&skips)[2])
{
    skips[0] = skips[1] = false;
    if (!w.may_skip)
        return;
    if (threadIdx.x < BLOCK_Q)
        v.group[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (lane() % 4 == 0)
            vote(w, q, v, row_of(h), sparge_row_gap(&state[h], local[h], keys[h] != 0));
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        skips[h] = voted_to_skip(w, v, row_of(h));
        if (skips[h] && lane() % 4 == 0 && row_of(h) % w.skip_rows == 0)
            mark_skipped(w, q, row_of(h), j);
    }
}

/* Lines 12, 13 and 16 with P in codes, against the largest score of the block. `used`: the keys
 * that each row uses. */
template <int WIDTH, bool EDGE, class S, class KEYS>
static __device__ void accumulate_int8(fragment<WIDTH> &f, const S (&s)[8][4], float scale,
                                       const KEYS (&used)[2], const S (&most)[2],
                                       const float (&local)[2], const uint8_t *v,
                                       const float *v_scale)
{
    uint32_t p[2][4] = {{0}}; /* 32 keys are p[i / 4]; of 16 keys each h has one register */
    coded_row c[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const bool attended = attends_to<EDGE>(i, e, used[h]);
                const float below = sparge_code_log2((float)s[i][2 * h + e], (float)most[h], scale);
                const int code = attended ? sparge_code(exp2_fast(below), P_QMAX) : 0;
                p[i / 4][i / 2 % 2 * 2 + h] |= (uint32_t)code << 8 * (i % 2 * 2 + e);
                sum += code;
            }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        c[h] = {0.0f, 1.0f};
        if (used[h])
            c[h] = update_by_codes(f.state[h], local[h], sum);
    }
#pragma unroll
    for (int i = 0; i < WIDTH / 8; i += 2) {
        int sum[2][4] = {{0}};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint32_t b[4];
            load_columns(b, v, V_PITCH, 8 * i, 32 * k);
            mma_s8(sum[0], p[k], b[0], b[1]);
            mma_s8(sum[1], p[k], b[2], b[3]);
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const int u = n / 4, h = n / 2 % 2, e = n % 2;
            const float d = v_scale[8 * (i + u) + 2 * (lane() % 4) + e];
            f.o[i + u][2 * h + e] = fmaf(c[h].p_scale * d, (float)sum[u][2 * h + e],
                                         f.o[i + u][2 * h + e] * c[h].shrink);
        }
    }
}

/* The same with P in f16, against the running maximum. */
template <int WIDTH, bool EDGE, class S, class KEYS>
static __device__ void accumulate_f16(fragment<WIDTH> &f, const S (&s)[8][4], float scale,
                                      const KEYS (&used)[2], const float (&local)[2],
                                      const uint8_t *v)
{
    float shrink[2], base[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        shrink[h] = used[h] ? sparge_row_update_max(&f.state[h], local[h]) : 1.0f;
        base[h] = sparge_row_base(f.state[h].max);
    }
#pragma unroll
    for (int i = 0; i < WIDTH / 8; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            f.o[i][n] *= shrink[n / 2];
#pragma unroll
    for (int k = 0; k < 4; k++) { /* 16 keys: the 8-column tiles 2 k and 2 k + 1 of S */
        uint32_t p[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int i = 2 * k + n / 2, h = n % 2;
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const bool attended = attends_to<EDGE>(i, e, used[h]);
                const float z = sparge_weight_log2((float)s[i][2 * h + e], scale, base[h]);
                x[e] = attended ? exp2_fast(z) : 0.0f;
                f.state[h].sum += x[e];
            }
            p[n] = pack_f16(x[0], x[1]);
        }
#pragma unroll
        for (int i = 0; i < WIDTH / 8; i += 2) { /* rows of v are keys here: ldmatrix transposes */
            uint32_t b[4];
            const int matrix = lane() / 8, key = 16 * k + lane() % 8 + 8 * (matrix % 2),
                      c = 8 * (i + matrix / 2);
            ldmatrix_transposed(b, v + swizzle_v_f16(key, c));
            mma_f16(f.o[i], p, b[0], b[1]);
            mma_f16(f.o[i + 1], p, b[2], b[3]);
        }
    }
}

template <int WIDTH, bool F16, bool HIDES, bool EDGE>
static __device__ void accumulate(const work &w, const query_block &q, int64_t j,
                                  const int (&product)[8][4], const uint8_t *v, votes &ballot,
                                  fragment<WIDTH> &f)
{
    row_score<HIDES> s[8][4], most[2];
    const float scale = scores_of<HIDES>(w, q, j, product, dequant_scale(w, q, j), s);
    const row_keys<HIDES> keys[2] = {keys_of_lane<HIDES>(w, q, row_of(0), j),
                                     keys_of_lane<HIDES>(w, q, row_of(1), j)};
    bool skips[2];
    largest_scores<EDGE>(s, keys, most);
    const float local[2] = {sparge_row_local((float)most[0], scale),
                            sparge_row_local((float)most[1], scale)};
    skipped_rows(w, q, ballot, j, f.state, local, keys, skips);
    const row_keys<HIDES> used[2] = {skips[0] ? 0 : keys[0], skips[1] ? 0 : keys[1]};
    if (!__any_sync(~0u, used[0] || used[1]))
        return; /* none of the warp's rows */
    if (F16)
        accumulate_f16<WIDTH, EDGE>(f, s, scale, used, local, v);
    else
        accumulate_int8<WIDTH, EDGE>(f, s, scale, used, most, local, v,
                                     w.v_scale + (q.kv * w.g.k_blocks + j) * WIDTH);
}

template <int WIDTH, bool F16, bool HIDES>
static __device__ void attend_block(const work &w, const query_block &q, int64_t j,
                                    const int8_t *q_int, const stage<WIDTH, F16> &t, votes &ballot,
                                    fragment<WIDTH> &f)
{
    int s[8][4];
    multiply_qk<WIDTH>(q_int, t.k, s);
    /* The first row sees least. With int8 two copies of the code would spill registers. */
    if (F16 && !HIDES && q.rows == BLOCK_Q && visible_keys(w, q.first, j) == BLOCK_K)
        accumulate<WIDTH, F16, HIDES, false>(w, q, j, s, t.v, ballot, f);
    else
        accumulate<WIDTH, F16, HIDES, true>(w, q, j, s, t.v, ballot, f);
}

template <int WIDTH, bool F16, bool HIDES>
static __global__ void __launch_bounds__(THREADS) attend_warps(const __grid_constant__ work w)
{
    tiles<WIDTH, F16> &t = *(tiles<WIDTH, F16> *)shared_memory();
    const query_block q = query_block_of(w, blockIdx.x);
    int64_t j = next_kept(q, 0);
    if (j >= q.visible)
        return; /* finish.cu writes the rows */

    load(t.q, w.q_tile + q.line * q_tile_bytes(WIDTH), q_tile_bytes(WIDTH));
    load_stage(w, q, j, t.ring[0]);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    fragment<WIDTH> f;
#pragma unroll
    for (int i = 0; i < WIDTH / 8; i++)
        f.o[i][0] = f.o[i][1] = f.o[i][2] = f.o[i][3] = 0.0f;
    f.state[0] = f.state[1] = sparge_row_empty();

    for (int at = 0; j < q.visible; at ^= 1) {
        const int64_t next = next_kept(q, j + 1);
        if (next < q.visible)
            load_stage(w, q, next, t.ring[at ^ 1]);
        copy_async_commit();
        attend_block<WIDTH, F16, HIDES>(w, q, j, t.q, t.ring[at], t.ballot, f);
        copy_async_wait<0>(); /* the next block is here */
        __syncthreads();      /* nobody reads this one any more */
        j = next;
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (F16) {
            f.state[h].sum += __shfl_xor_sync(~0u, f.state[h].sum, 1);
            f.state[h].sum += __shfl_xor_sync(~0u, f.state[h].sum, 2);
        }
        if (row_of(h) >= q.rows)
            continue;
        const float norm = sparge_row_norm(&f.state[h]);
#pragma unroll
        for (int i = 0; i < WIDTH / 8; i++)
            store_pair(w.o, out_row(w, q, row_of(h)), 8 * i + 2 * (lane() % 4), w.dim_v,
                       f.o[i][2 * h] * norm, f.o[i][2 * h + 1] * norm);
        if (lane() % 4 == 0)
            store_state(w, q, row_of(h), f.state[h]);
    }
}

template <bool F16> static cudaError_t attend_pv(const work &w, cudaStream_t stream)
{
    return at_width_and_hides(w, [&](auto width, auto hides) {
        return launch(attend_warps<width, F16, hides>, q_blocks_of_all_heads(w), THREADS,
                      sizeof(tiles<width, F16>), stream, w);
    });
}

cudaError_t attend_mma(const work &w, cudaStream_t stream)
{
    return w.pv == SPARGE_F16 ? attend_pv<true>(w, stream) : attend_pv<false>(w, stream);
}

} // namespace sparge
