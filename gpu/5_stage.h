/* SPDX-License-Identifier: Apache-2.0 */
/* 5_stage.h: configuration and shared memory of kernel 5, and what a warpgroup computes on one
 * stage: products, maxima, lambda's vote, P. 5_hopper.cu has the order in which it does so.
 *
 * Thread = 32 warp + 4 g + quad of its warpgroup holds rows 16 warp + g + 8 h. Register 4 i + 2 h +
 * e of an accumulator is column 8 i + 2 quad + e. */
#ifndef SPARGE_GPU_5_STAGE_H
#define SPARGE_GPU_5_STAGE_H

#include "gpu/hopper.h"
#include "gpu/layout.h"
#include "gpu/rows.h"

namespace sparge {

/* ---- Configuration ------------------------------------------------------------------------- */

enum { THREADS = 384, WARPGROUP = 128, CONSUMER_WARPS = 8, STAGES = 4, Q_STAGES = 2 };
enum { PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240 }; /* a thread */

/* Named barriers; 0 is __syncthreads. */
enum { TURN = 2, VOTE_64 = 4, VOTE_128 = 6, VOTE_32 = 8 };

/* ---- Shared memory ------------------------------------------------------------------------- */

/* EDGE: some pair is masked. ONLY_A: the stage has one block. LAST: the last stage of its query
 * block. */
enum { EDGE = 1, ONLY_A = 2, LAST = 4 };

/* What the producer says of a stage, whose blocks are a and b. */
struct kv_slot {
    float dequant_scale[2];
    int block[2];
    uint32_t flags;
    int first;         /* the query block's first token */
    uint32_t *skipped; /* its [skip groups][words] of w.skipped, or NULL */
    uint32_t skips;    /* from the consumers: bit g: group g skips a; bit 8 + g: it skips b */
};

/* What the producer says of a query block. */
struct q_slot {
    int64_t line; /* negative: there is no more work */
    float lambda;
};

template <int WIDTH, bool F16> struct tiles {
    alignas(1024) uint8_t q[Q_STAGES][q_tile_bytes(WIDTH)];
    alignas(1024) uint8_t k[STAGES][2][k_tile_bytes(WIDTH)];
    alignas(1024) uint8_t v[STAGES][2][v_tile_bytes(WIDTH, F16)];
    kv_slot kv_slots[STAGES];
    q_slot q_slots[Q_STAGES];
    alignas(8) uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    uint64_t q_full[Q_STAGES], q_empty[Q_STAGES];
};

/* The nth use of a ring: its stage, and the parity of the stage's barriers. */
template <int LENGTH> struct cursor {
    uint32_t n;
    __device__ __forceinline__ uint32_t at() const { return n % LENGTH; }
    __device__ __forceinline__ uint32_t parity() const { return n / LENGTH % 2; }
};

/* ---- Registers ----------------------------------------------------------------------------- */

/* A thread's share of its warpgroup's 64 rows. */
template <int WIDTH, bool F16> struct fragment {
    int s[64];                 /* S of a stage */
    uint32_t p[F16 ? 32 : 16]; /* P of a stage, packed */
    float o[WIDTH / 2];
    float pv[F16 ? 1 : WIDTH / 2]; /* fp8: P.V of a stage */
    sparge_row row[2];             /* the sum is over this thread's columns */
    float shrink[2];               /* by how much o shrinks before P.V is added */
};

/* What the scores of a stage say. Index b is block a or b, h one of a thread's two rows. */
struct verdict {
    float max[2];  /* [h]: the new running maximum */
    bool keep[2];  /* [b]: the group does not skip the block */
    bool issue[2]; /* [b]: its P.V is issued */
};

SPARGE_DEVICE int thread_of_warpgroup() { return (int)threadIdx.x % WARPGROUP; }
SPARGE_DEVICE int warpgroup() { return (int)threadIdx.x / WARPGROUP - 1; }
SPARGE_DEVICE int row_of(int h)
{
    return 64 * warpgroup() + thread_of_warpgroup() / 32 * 16 + thread_of_warpgroup() % 32 / 4 +
           8 * h;
}

/* Where the keys end that a query sees, counted from key block j on: it sees none of the block if
 * not positive, all if 64 or more. visible_keys would need registers that are not there. */
SPARGE_DEVICE int visible_end(const work &w, int token, int j)
{
    const int64_t end = token < w.g.q_len ? sparge_last_key(&w.g, token) + 1 : 0;
    return (int)end - BLOCK_K * j;
}

template <int WIDTH, bool F16> SPARGE_DEVICE void clear(fragment<WIDTH, F16> &f)
{
#pragma unroll
    for (int n = 0; n < WIDTH / 2; n++)
        f.o[n] = 0.0f;
    f.row[0] = f.row[1] = sparge_row_empty();
    f.shrink[0] = f.shrink[1] = 1.0f;
}

/* ---- Products: issued here, awaited in 5_hopper.cu ----------------------------------------- */

/* Line 10: S of 64 rows and the 128 keys of a stage. */
template <int WIDTH>
SPARGE_DEVICE void multiply_qk(int (&s)[64], const uint8_t *q, const uint8_t *k)
{
    const uint64_t a = descriptor_k_major(q, pitch_of(WIDTH)),
                   b = descriptor_k_major(k, pitch_of(WIDTH));
    pin(s);
    wgmma_fence();
#pragma unroll
    for (unsigned c = 0; c < WIDTH / 32; c++)
        wgmma_s8(s, a + c * DESCRIPTOR_32_BYTES, b + c * DESCRIPTOR_32_BYTES, c > 0);
    wgmma_commit();
}

/* One step of P.V: 32 keys in fp8, 16 in f16. `fresh`: the first step of a sum from zero (fp8). */
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

/* Line 16: P.V of the blocks whose products are issued. The conditions are the same for the whole
 * warpgroup. The compiler has to see that (__any_sync), or it serialises every product. */
template <int N, int P, int V_BYTES>
SPARGE_DEVICE void multiply_pv(float (&acc)[N], uint32_t (&p)[P], const uint8_t (&v)[2][V_BYTES],
                               const bool (&issue)[2])
{
    enum { F16 = P == 32, HALFWAY = P / 8, ALL = P / 4 }; /* steps */
    const uint64_t a =
        F16 ? descriptor_n_major(v[0], V_F16_PANEL) : descriptor_k_major(v[0], V_PITCH);
    const uint64_t b =
        F16 ? descriptor_n_major(v[1], V_F16_PANEL) : descriptor_k_major(v[1], V_PITCH);
    pin(p);
    pin(acc);
    wgmma_fence();
    const bool issue_a = __any_sync(~0u, issue[0]), issue_b = __any_sync(~0u, issue[1]);
    if (issue_a && issue_b)
        pv_steps<0, ALL, 0>(acc, p, a, b);
    else if (issue_a)
        pv_steps<0, HALFWAY, 0>(acc, p, a, b);
    else if (issue_b)
        pv_steps<HALFWAY, ALL, HALFWAY>(acc, p, a, b);
    wgmma_commit();
}

/* ---- Lines 11 and 14-15: maxima and the vote ------------------------------------------------- */

/* How many keys each of a thread's rows sees of block b of a stage, as visible_end counts. */
SPARGE_DEVICE void find_visible(const work &w, const kv_slot &t, int b, int (&visible)[2])
{
    for (int h = 0; h < 2; h++)
        visible[h] = visible_end(w, t.first + row_of(h), t.block[b]);
}

/* The largest score of each of a thread's rows in block B, over its quad. INT32_MIN: no key is
 * visible. */
template <int B, bool EDGE>
SPARGE_DEVICE void max_of_block(const int (&s)[64], const int (&visible)[2], int (&max_of)[2])
{
    const int column = 2 * ((int)threadIdx.x % 4);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int max = INT32_MIN;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int x = s[32 * B + 4 * i + 2 * h], y = s[32 * B + 4 * i + 2 * h + 1];
            if (EDGE) {
                x = 8 * i + column < visible[h] ? x : INT32_MIN;
                y = 8 * i + column + 1 < visible[h] ? y : INT32_MIN;
            }
            max = __vimax3_s32(max, x, y);
        }
        max = ::max(max, __shfl_xor_sync(~0u, max, 1));
        max_of[h] = ::max(max, __shfl_xor_sync(~0u, max, 2));
    }
}

/* Does any row of this thread's group say yes? */
SPARGE_DEVICE bool any_of_group(int skip_rows, bool yes)
{
    switch (skip_rows) {
    case 16: return __any_sync(~0u, yes);
    case 32: return named_any(VOTE_32 + 2 * warpgroup() + thread_of_warpgroup() / 64, 64, yes);
    case 64: return named_any(VOTE_64 + warpgroup(), WARPGROUP, yes);
    default: return named_any(VOTE_128, 2 * WARPGROUP, yes);
    }
}

/* Block b is judged against the maximum after block a. */
template <bool LAMBDA>
SPARGE_DEVICE verdict judge(const work &w, const int (&s)[64], const kv_slot &t,
                            sparge_row (&row)[2], float lambda)
{
    const bool only_a = (t.flags & ONLY_A) != 0;
    int max[2][2], visible[2] = {BLOCK_K, BLOCK_K};
    if (t.flags & EDGE) {
        find_visible(w, t, 0, visible);
        max_of_block<0, true>(s, visible, max[0]);
        find_visible(w, t, 1, visible);
        max_of_block<1, true>(s, visible, max[1]);
    } else {
        max_of_block<0, false>(s, visible, max[0]);
        max_of_block<1, false>(s, visible, max[1]);
    }
    verdict x;
    bool near[2] = {false, false};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sparge_row after = row[h];
        bool sees_any = false;
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const bool sees = max[b][h] != INT32_MIN && !(b == 1 && only_a);
            const float local = sparge_row_local((float)max[b][h], t.dequant_scale[b]);
            near[b] |= sparge_gap_is_near(sparge_row_gap(&after, local, sees), lambda);
            after.max = sparge_max_update(after.max, sees ? local : -INFINITY);
            sees_any |= sees;
        }
        x.max[h] = after.max;
        if (sees_any && after.max == -INFINITY)
            row[h].sum = NAN; /* scores of -inf alone, as in sparge_row_update_max */
    }
    /* The products of a group of fewer than 64 rows cannot be left out: its P is 0. */
    const bool whole = !LAMBDA || w.skip_rows >= 64;
    x.keep[0] = LAMBDA ? any_of_group(w.skip_rows, near[0]) : true;
    x.keep[1] = LAMBDA ? any_of_group(w.skip_rows, near[1]) : !only_a;
    x.issue[0] = x.keep[0] || !whole;
    x.issue[1] = whole ? x.keep[1] : !only_a;
    return x;
}

/* ---- Lines 12-13: P ---------------------------------------------------------------------------
 */

/* P of block B, packed as the operand of P.V, and its row sums. The 8-column tiles i and i + 1 are
 * four neighbouring bytes (permute_key), or two halves in each of two registers. */
template <int B, bool EDGE, int P>
SPARGE_DEVICE void softmax_visible(const int (&s)[64], uint32_t (&p)[P], float scale,
                                   const int (&visible)[2], sparge_row (&row)[2])
{
    const int column = 2 * ((int)threadIdx.x % 4);
#pragma unroll
    for (int i = 8 * B; i < 8 * B + 8; i += 2)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float e[4]; /* columns 2 quad, 2 quad + 1 of tile i, then of tile i + 1 */
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float x = (float)s[4 * (i + n / 2) + 2 * h + n % 2];
                e[n] = exp2_fast(sparge_weight_log2(x, scale, sparge_row_base(row[h].max)));
                if (EDGE && 8 * (i - 8 * B + n / 2) + column + n % 2 >= visible[h])
                    e[n] = 0.0f;
                row[h].sum += e[n];
            }
            if constexpr (P == 32) {
                p[2 * i + h] = pack_f16(e[0], e[1]);
                p[2 * i + 2 + h] = pack_f16(e[2], e[3]);
            } else {
                p[i / 4 * 4 + i / 2 % 2 * 2 + h] =
                    pack_e4m3(SPARGE_P_FP8_SCALE * e[0], SPARGE_P_FP8_SCALE * e[1],
                              SPARGE_P_FP8_SCALE * e[2], SPARGE_P_FP8_SCALE * e[3]);
            }
        }
}

/* The same, or zeros if the group skips the block. */
template <int B, int P>
SPARGE_DEVICE void softmax_block(const work &w, const int (&s)[64], uint32_t (&p)[P], bool keep,
                                 const kv_slot &t, sparge_row (&row)[2])
{
    int visible[2] = {BLOCK_K, BLOCK_K};
    if (!keep) {
#pragma unroll
        for (int n = B * P / 2; n < (B + 1) * P / 2; n++)
            p[n] = 0;
    } else if (t.flags & EDGE) {
        find_visible(w, t, B, visible);
        softmax_visible<B, true>(s, p, t.dequant_scale[B], visible, row);
    } else {
        softmax_visible<B, false>(s, p, t.dequant_scale[B], visible, row);
    }
}

/* Both blocks of a stage, under the maximum after the second one. */
template <int WIDTH, bool F16>
SPARGE_DEVICE void softmax(const work &w, const kv_slot &t, const verdict &x,
                           fragment<WIDTH, F16> &f)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        f.shrink[h] = exp2_fast(sparge_shrink_log2(f.row[h].max, x.max[h]));
        f.row[h] = sparge_row_shrunk(f.row[h], x.max[h], f.shrink[h]);
    }
    softmax_block<0>(w, f.s, f.p, x.keep[0], t, f.row);
    softmax_block<1>(w, f.s, f.p, x.keep[1], t, f.row);
}

/* ---- Lines 20-21: o / l, m and l of the warpgroup's 64 rows ---------------------------------- */

template <int WIDTH, bool F16>
SPARGE_DEVICE void store_rows(const work &w, const query_block &q, const fragment<WIDTH, F16> &f)
{
    const int column = 2 * ((int)threadIdx.x % 4);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sparge_row state = f.row[h];
        state.sum += __shfl_xor_sync(~0u, state.sum, 1);
        state.sum += __shfl_xor_sync(~0u, state.sum, 2);
        const float norm = sparge_row_norm(&state) * (F16 ? 1.0f : 1.0f / SPARGE_P_FP8_SCALE);
        const int r = row_of(h);
        if (r >= q.rows)
            continue;
#pragma unroll
        for (int i = 0; i < WIDTH / 8; i++) {
            const int c = 8 * i + column;
            float x = f.o[4 * i + 2 * h] * norm, y = f.o[4 * i + 2 * h + 1] * norm;
            if (!F16) {
                x *= w.v_scale[q.kv * WIDTH + c];
                y *= w.v_scale[q.kv * WIDTH + c + 1];
            }
            store_pair(w.o, out_row(w, q, r), c, w.dim_v, x, y);
        }
        if (column == 0)
            store_state(w, q, r, state);
    }
}

} // namespace sparge

#endif
