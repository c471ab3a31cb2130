/* 5_stage.h: what a warpgroup of kernel 5 does to one stage: products, maxima, lambda's vote,
 * weights. The order in which it does them is 5_hopper.cu's.
 *
 * Thread = 32 warp + 4 g + quad of its warpgroup holds rows 16 warp + g + 8 h; register 4 i + 2 h +
 * e of an accumulator is column 8 i + 2 quad + e. */
#ifndef SPARGE_GPU_5_STAGE_H
#define SPARGE_GPU_5_STAGE_H

#include "gpu/hopper.h"
#include "gpu/image.h"
#include "gpu/rows.h"

namespace sparge {

enum { THREADS = 384, WARPGROUP = 128, CONSUMER_WARPS = 8, STAGES = 4 };
enum { PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240 }; /* a thread */

/* Named barriers; 0 is __syncthreads. */
enum { TURN = 2, VOTE_64 = 4, VOTE_128 = 6, VOTE_32 = 8 };

/* Of a slot: some row does not see all of a or of b; there is no b; it is the last of its query
 * block. */
enum { EDGE = 1, ONLY_A = 2, LAST = 4 };

struct slot {
    float unit[2];
    int block[2];
    uint32_t flags;
    uint32_t skips; /* from the consumers: bit g where group g of rows skipped a, bit 8 + g for b */
    int first;      /* the query block's first token */
    uint32_t *skipped; /* [groups][words] of it, where lambda may skip */
};

struct item {
    int64_t line; /* negative: there is no more work */
    float lambda; /* in log2 units */
};

template <int WIDTH, bool HALF> struct shape {
    static constexpr int PITCH = WIDTH == 64 ? 64 : 128;
    static constexpr int Q_BYTES = BLOCK_Q * PITCH, K_BYTES = BLOCK_K * PITCH;
    static constexpr int V_BYTES = HALF ? (WIDTH + 63) / 64 * 64 * 128 : WIDTH * 64;
    static constexpr int P = HALF ? 32 : 16; /* registers of 64 weights */
};

template <int WIDTH, bool HALF> struct tiles {
    using size = shape<WIDTH, HALF>;
    alignas(1024) uint8_t q[2][size::Q_BYTES];
    alignas(1024) uint8_t k[STAGES][2 * size::K_BYTES];
    alignas(1024) uint8_t v[STAGES][2 * size::V_BYTES];
    slot slots[STAGES];
    item items[2];
    alignas(8) uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    uint64_t q_full[2], q_empty[2];
};

/* The nth use of a ring: its place there, and the parity of the place's barriers. */
template <int LENGTH> struct cursor {
    uint32_t n;
    __device__ __forceinline__ uint32_t at() const { return n % LENGTH; }
    __device__ __forceinline__ uint32_t parity() const { return n / LENGTH % 2; }
};

/* What a thread knows of its two rows. */
struct rows {
    float m[2], l[2], shrink[2]; /* l: of its own columns */
};

/* What comes of looking at the scores of a stage. Its slot stays until the stage is given back. */
struct view {
    float m[2];   /* the new running maxima */
    bool keep[2]; /* of block a, b: some row of the group comes near its maximum */
};

SPARGE_DEVICE int thread_of_warpgroup() { return (int)threadIdx.x % WARPGROUP; }
SPARGE_DEVICE int warpgroup() { return (int)threadIdx.x / WARPGROUP - 1; }
SPARGE_DEVICE int row_of(int h)
{
    return 64 * warpgroup() + thread_of_warpgroup() / 32 * 16 + thread_of_warpgroup() % 32 / 4 +
           8 * h;
}

/* How many keys of block B of a stage each of a thread's rows sees: the first ones; none of them
 * may be negative, all of them more than 64. */
SPARGE_DEVICE int seen_of_row(const work &w, const slot &t, int b, int h)
{
    const int token = t.first + row_of(h);
    const int64_t end = token < w.g.q_len ? sparge_last_key(&w.g, token) + 1 : 0;
    return (int)end - BLOCK_K * t.block[b];
}

template <int WIDTH, bool HALF>
SPARGE_DEVICE void multiply_qk(int (&s)[64], const uint8_t *q, const uint8_t *k)
{
    const uint64_t a = descriptor_k_major(q, shape<WIDTH, HALF>::PITCH),
                   b = descriptor_k_major(k, shape<WIDTH, HALF>::PITCH);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (unsigned c = 0; c < WIDTH / 32; c++)
        wgmma_s8(s, a + c * DESCRIPTOR_32_BYTES, b + c * DESCRIPTOR_32_BYTES, c > 0);
    wgmma_commit();
}

/* One step of P.V: 32 keys in fp8, 16 in f16. `fresh`: the first one of a sum that starts from
 * zero. */
template <int STEP, int N>
SPARGE_DEVICE void pv_step(float (&acc)[N], const uint32_t (&p)[16], uint64_t a, uint64_t b,
                           bool fresh)
{
    const uint32_t x[4] = {p[4 * STEP], p[4 * STEP + 1], p[4 * STEP + 2], p[4 * STEP + 3]};
    wgmma_e4m3(acc, x, (STEP < 2 ? a : b) + STEP % 2 * DESCRIPTOR_32_BYTES, !fresh);
}
template <int STEP, int N>
SPARGE_DEVICE void pv_step(float (&acc)[N], const uint32_t (&p)[32], uint64_t a, uint64_t b, bool)
{
    const uint32_t x[4] = {p[4 * STEP], p[4 * STEP + 1], p[4 * STEP + 2], p[4 * STEP + 3]};
    wgmma_f16(acc, x, (STEP < 4 ? a : b) + STEP % 4 * DESCRIPTOR_16_ROWS, true);
}

template <int FIRST, int END, int STEP, int N, int P>
SPARGE_DEVICE void pv_steps(float (&acc)[N], const uint32_t (&p)[P], uint64_t a, uint64_t b)
{
    if constexpr (STEP == FIRST)
        wgmma_fence();
    if constexpr (STEP < END) {
        pv_step<STEP>(acc, p, a, b, STEP == FIRST);
        pv_steps<FIRST, END, STEP + 1>(acc, p, a, b);
    }
}

/* P.V of the blocks that are kept; their products alone are issued. The conditions are the same for
 * the whole warpgroup, which the compiler has to see (__any_sync), or it serialises every product.
 */
template <int WIDTH, bool HALF, int N, int P>
SPARGE_DEVICE void multiply_pv(float (&acc)[N], uint32_t (&p)[P], const uint8_t *v, bool keep_a,
                               bool keep_b)
{
    enum { HALFWAY = P / 8, ALL = P / 4 }; /* steps */
    const uint8_t *const v_b = v + shape<WIDTH, HALF>::V_BYTES;
    const uint64_t a = HALF ? descriptor_n_major(v, 8192) : descriptor_k_major(v, 64);
    const uint64_t b = HALF ? descriptor_n_major(v_b, 8192) : descriptor_k_major(v_b, 64);
    pin(p);
    pin(acc);
    wgmma_fence();
    keep_a = __any_sync(~0u, keep_a);
    keep_b = __any_sync(~0u, keep_b);
    if (keep_a && keep_b)
        pv_steps<0, ALL, 0>(acc, p, a, b);
    else if (keep_a)
        pv_steps<0, HALFWAY, 0>(acc, p, a, b);
    else if (keep_b)
        pv_steps<HALFWAY, ALL, HALFWAY>(acc, p, a, b);
    wgmma_commit();
}

/* The largest score of each of a thread's rows in block B, over its quad; INT32_MIN: no key is
 * seen. */
template <int B, bool EDGE>
SPARGE_DEVICE void max_of_block(const int (&s)[64], const int (&seen)[2], int (&max_of)[2])
{
    const int column = 2 * ((int)threadIdx.x % 4);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int max = INT32_MIN;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int x = s[32 * B + 4 * i + 2 * h], y = s[32 * B + 4 * i + 2 * h + 1];
            if (EDGE) {
                x = 8 * i + column < seen[h] ? x : INT32_MIN;
                y = 8 * i + column + 1 < seen[h] ? y : INT32_MIN;
            }
            max = __vimax3_s32(max, x, y);
        }
        max = ::max(max, __shfl_xor_sync(~0u, max, 1));
        max_of[h] = ::max(max, __shfl_xor_sync(~0u, max, 2));
    }
}

/* Lambda's vote in a group of `skip_rows` rows, and whether the products of its warpgroup can be
 * left out where it skips: a group of fewer than 64 rows is only a part of them. */
SPARGE_DEVICE bool any_of_group(int skip_rows, bool near)
{
    switch (skip_rows) {
    case 16: return __any_sync(~0u, near);
    case 32: return named_any(VOTE_32 + 2 * warpgroup() + thread_of_warpgroup() / 64, 64, near);
    case 64: return named_any(VOTE_64 + warpgroup(), WARPGROUP, near);
    default: return named_any(VOTE_128, 2 * WARPGROUP, near);
    }
}

/* A row's maximum after a block whose largest score is `local`; a NaN stays. */
SPARGE_DEVICE float raised(float max, float local)
{
    return local <= max || max != max ? max : local;
}

/* Lines 11 and 14-15 for both blocks of a stage. */
template <bool LAMBDA>
SPARGE_DEVICE view look(const work &w, const int (&s)[64], const slot &t, const rows &r,
                        float lambda)
{
    const bool only_a = (t.flags & ONLY_A) != 0;
    int max_a[2], max_b[2];
    int seen[2] = {BLOCK_K, BLOCK_K};
    if (t.flags & EDGE) {
        for (int h = 0; h < 2; h++)
            seen[h] = seen_of_row(w, t, 0, h);
        max_of_block<0, true>(s, seen, max_a);
        for (int h = 0; h < 2; h++)
            seen[h] = seen_of_row(w, t, 1, h);
        max_of_block<1, true>(s, seen, max_b);
    } else {
        max_of_block<0, false>(s, seen, max_a);
        max_of_block<1, false>(s, seen, max_b);
    }
    view x;
    bool near_a = false, near_b = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const bool sees_a = max_a[h] != INT32_MIN, sees_b = max_b[h] != INT32_MIN && !only_a;
        const float a = sees_a ? sparge_row_local((float)max_a[h], t.unit[0]) : -INFINITY;
        const float b = sees_b ? sparge_row_local((float)max_b[h], t.unit[1]) : -INFINITY;
        const sparge_row first = {r.m[h], 0.0f}, second = {raised(first.max, a), 0.0f};
        near_a |= sparge_row_gap(&first, a, sees_a) > lambda;
        near_b |= sparge_row_gap(&second, b, sees_b) > lambda;
        x.m[h] = raised(second.max, b);
    }
    x.keep[0] = LAMBDA ? any_of_group(w.skip_rows, near_a) : true;
    x.keep[1] = LAMBDA ? any_of_group(w.skip_rows, near_b) : !only_a;
    return x;
}

/* Lines 12-13 for block B: scores become weights, packed as the operand of P.V. The 8-column tiles
 * i and i + 1 are four neighbouring bytes (key_slot) or two halves in each of two registers. */
template <int B, bool EDGE, bool HALF, int P>
SPARGE_DEVICE void weigh_block(const int (&s)[64], uint32_t (&p)[P], float unit,
                               const float (&base)[2], const int (&seen)[2], float (&l)[2])
{
    const int column = 2 * ((int)threadIdx.x % 4);
#pragma unroll
    for (int i = 8 * B; i < 8 * B + 8; i += 2)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float e[4]; /* columns 2 quad, 2 quad + 1 of tile i, then of tile i + 1 */
#pragma unroll
            for (int n = 0; n < 4; n++) {
                e[n] = exp2_fast((float)s[4 * (i + n / 2) + 2 * h + n % 2] * unit - base[h]);
                if (EDGE && 8 * (i - 8 * B + n / 2) + column + n % 2 >= seen[h])
                    e[n] = 0.0f;
                l[h] += e[n];
            }
            if constexpr (HALF) {
                p[2 * i + h] = pack_f16(e[0], e[1]);
                p[2 * i + 2 + h] = pack_f16(e[2], e[3]);
            } else {
                p[i / 4 * 4 + i / 2 % 2 * 2 + h] =
                    pack_e4m3(256.0f * e[0], 256.0f * e[1], 256.0f * e[2], 256.0f * e[3]);
            }
        }
}

/* The same, or zeros where the group skips it. */
template <int B, bool HALF, int P>
SPARGE_DEVICE void weigh_or_clear(const work &w, const int (&s)[64], uint32_t (&p)[P], bool keep,
                                  const slot &t, const float (&base)[2], rows &r)
{
    int seen[2] = {BLOCK_K, BLOCK_K};
    if (!keep) {
#pragma unroll
        for (int n = B * P / 2; n < (B + 1) * P / 2; n++)
            p[n] = 0;
    } else if (t.flags & EDGE) {
        for (int h = 0; h < 2; h++)
            seen[h] = seen_of_row(w, t, B, h);
        weigh_block<B, true, HALF>(s, p, t.unit[B], base, seen, r.l);
    } else {
        weigh_block<B, false, HALF>(s, p, t.unit[B], base, seen, r.l);
    }
}

template <bool HALF, int P>
SPARGE_DEVICE void weigh(const work &w, const int (&s)[64], uint32_t (&p)[P], const view &x,
                         const slot &t, rows &r)
{
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        base[h] = sparge_row_base(x.m[h]);
        r.shrink[h] = exp2_fast(r.m[h] - base[h]);
        r.l[h] *= r.shrink[h];
        r.m[h] = x.m[h];
    }
    weigh_or_clear<0, HALF>(w, s, p, x.keep[0], t, base, r);
    weigh_or_clear<1, HALF>(w, s, p, x.keep[1], t, base, r);
}

/* A query block's 64 rows of this warpgroup: o / l, m and l. */
template <int WIDTH, bool HALF>
SPARGE_DEVICE void store_rows(const work &w, const query_block &q, const float (&o)[WIDTH / 2],
                              const rows &r)
{
    const int column = 2 * ((int)threadIdx.x % 4);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sparge_row state;
        state.max = r.m[h];
        state.sum = r.l[h] + __shfl_xor_sync(~0u, r.l[h], 1);
        state.sum += __shfl_xor_sync(~0u, state.sum, 2);
        const float norm =
            sparge_row_norm(&state) * (HALF ? 1.0f : 0x1p-8f); /* P is 256 p with fp8 */
        const int row = row_of(h);
        if (row < q.rows) {
            const int64_t at = out_row(w, q, row);
#pragma unroll
            for (int i = 0; i < WIDTH / 8; i++) {
                const int c = 8 * i + column;
                float x = o[4 * i + 2 * h] * norm, y = o[4 * i + 2 * h + 1] * norm;
                if (!HALF) {
                    x *= w.v_scale[q.kv * WIDTH + c];
                    y *= w.v_scale[q.kv * WIDTH + c + 1];
                }
                store_pair(w.o, at, c, w.dim_v, x, y);
            }
            if (column == 0)
                store_state(w, q, row, state);
        }
    }
}

} // namespace sparge

#endif
