/* 5_hopper.cu: rung 5, sm_90a. One warp does nothing but fetch: it walks the mask and keeps a ring of
 * shared-memory stages full with bulk copies. Two warpgroups of 64 query rows each multiply (wgmma) and
 * take turns, so that the softmax of one runs under the products of the other; within a warpgroup P.V of
 * one stage runs under the maxima of the next.
 *
 * A stage is two kept key blocks, gathered from anywhere, a and b: their 128 keys are one product, but
 * lambda's test, the unit of the scores and the running maximum go block by block, in order. An odd last
 * block leaves b absent.
 *
 *   stage  k [2][64 keys][pitch]   v [2] tiles   slot: which blocks, and their units
 *   ring   full: the bytes have landed          empty: all eight warps have read them
 *   turn   named barriers 2 and 3: whose products may be issued
 *
 * Thread = 32 warp + 4 g + quad of its warpgroup holds rows 16 warp + g + 8 h; register 4 i + 2 h + e of an
 * accumulator is column 8 i + 2 quad + e.
 *
 * P.V in fp8: the tensor core's own sum is narrower than float, so each stage is summed from zero and added
 * to o in float. P is 256 p (e4m3 has few numbers below 1), exactly 8 in the exponent. In f16 the tensor
 * core adds to o itself. exp2 and the logarithm-free rest are the hardware's; bounds are in README.md. */
#include "gpu/hopper.h"
#include "gpu/image.h"
#include "gpu/rows.h"

namespace sparge {

enum { THREADS = 384, WARPGROUP = 128, CONSUMER_WARPS = 8, PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240, STAGES = 4 };

/* Named barriers; 0 is __syncthreads. */
enum { TURN = 2, VOTE_64 = 4, VOTE_128 = 6, VOTE_32 = 8 };

/* Of a slot: some row does not see all of a, or of b, or scores are huge; there is no b; nothing comes after
 * it. */
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

/* ---- The producer: one warp ---------------------------------------------------------------- */

/* Announces a query block and fetches its codes. */
template <int WIDTH, bool HALF>
static __device__ void fetch_q(const work &w, const query_block &q, tiles<WIDTH, HALF> &t, uint32_t at)
{
    using size = shape<WIDTH, HALF>;
    t.items[at] = { q.line, knobs_of(w, q.h).lambda * SPARGE_LOG2E };
    barrier_arrive_expect(&t.q_full[at], size::Q_BYTES);
    copy_bulk(t.q[at], w.q8 + q.line * size::Q_BYTES, size::Q_BYTES, &t.q_full[at]);
}

/* Key block j into half `b` of a stage. The arrival at k_full comes last: it publishes the slot too. */
template <int WIDTH, bool HALF>
static __device__ void fetch_kv(const work &w, const query_block &q, tiles<WIDTH, HALF> &t, uint32_t at, int b, int64_t j,
                                bool last)
{
    using size = shape<WIDTH, HALF>;
    const int64_t block = q.kv * w.g.k_blocks + j;
    slot &s = t.slots[at];
    const float unit = score_unit(w, q, j);
    const bool huge = !(unit * (float)(127 * 127 * WIDTH) < 0x1p20f); /* the rounding of m shows in exponents */
    const bool edge = q.rows < BLOCK_Q || keys_of_row(w, q, 0, j) < BLOCK_K || huge;
    s.first = (int)q.first;
    s.skipped = w.may_skip ? skipped_row(w, q, 0) : NULL;
    s.unit[b] = unit;
    s.block[b] = (int)j;
    s.skips = 0;
    s.flags = (b ? s.flags : 0) | (edge ? EDGE : 0) | (last ? LAST : 0) | (last && b == 0 ? ONLY_A : 0);
    if (b == 0)
        barrier_arrive_expect(&t.v_full[at], last ? size::V_BYTES : 2 * size::V_BYTES);
    copy_bulk(t.k[at] + b * size::K_BYTES, w.k8 + block * size::K_BYTES, size::K_BYTES, &t.k_full[at]);
    copy_bulk(t.v[at] + b * size::V_BYTES, w.v_tile + block * size::V_BYTES, size::V_BYTES, &t.v_full[at]);
    if (b == 1 || last)
        barrier_arrive_expect(&t.k_full[at], (b + 1) * size::K_BYTES);
}

/* What the consumers skipped of a stage, once they are through with it: a lane for each group and block.
 * A group that sees no key of a block has nothing to skip. */
static __device__ void record_skips(const work &w, const slot &s)
{
    const int lane = (int)threadIdx.x, b = lane / 8, group = lane % 8;
    if (lane >= (s.flags & ONLY_A ? 8 : 16) || !(s.skips >> lane & 1u))
        return;
    const int j = s.block[b], words = (int)sparge_mask_row_words(w.g.k_blocks);
    const int last = min(s.first + (group + 1) * w.skip_rows, (int)w.g.q_len) - 1; /* token of the group */
    if (last >= s.first + group * w.skip_rows && last + (int)w.g.offset >= j * BLOCK_K)
        atomicOr(&s.skipped[group * words + j / 32], 1u << j % 32);
}

/* Waits until a stage can be filled anew. */
template <int WIDTH, bool HALF, bool LAMBDA>
static __device__ void take_stage(const work &w, tiles<WIDTH, HALF> &t, const cursor<STAGES> &stage)
{
    barrier_wait(&t.k_empty[stage.at()], stage.parity() ^ 1); /* at first, every place is empty */
    barrier_wait(&t.v_empty[stage.at()], stage.parity() ^ 1);
    if (LAMBDA && stage.n >= STAGES)
        record_skips(w, t.slots[stage.at()]);
    __syncwarp();
}

template <int WIDTH, bool HALF, bool LAMBDA> static __device__ void produce(const work &w, tiles<WIDTH, HALF> &t)
{
    const int lane = (int)threadIdx.x;
    cursor<STAGES> stage = { 0 };
    cursor<2> query = { 0 };
    for (;; query.n++) {
        unsigned long long ticket = 0;
        if (lane == 0)
            ticket = atomicAdd(w.ticket, 1ull);
        ticket = __shfl_sync(~0u, ticket, 0);
        barrier_wait(&t.q_empty[query.at()], query.parity() ^ 1);
        if ((int64_t)ticket >= *w.order_len) {
            if (lane == 0) {
                t.items[query.at()].line = -1;
                barrier_arrive(&t.q_full[query.at()]);
            }
            for (int n = 0; LAMBDA && n < STAGES; n++, stage.n++)
                take_stage<WIDTH, HALF, LAMBDA>(w, t, stage);
            return;
        }
        const query_block q = query_block_of(w, w.order[ticket]);
        const uint32_t *const kept = mask_row(w, q);
        const int words = (int)sparge_mask_row_words(w.g.k_blocks);
        int left = 0;
        for (int n = lane; n < words; n += 32)
            left += __popc(kept_word(kept, n, q.seen));
        left = __reduce_add_sync(~0u, left);
        if (lane == 0)
            fetch_q(w, q, t, query.at());

        int b = 0;
        for (int base = 0; base < words; base += 32) { /* a word for each lane */
            const uint32_t mine = base + lane < words ? kept_word(kept, base + lane, q.seen) : 0;
            for (uint32_t some = __ballot_sync(~0u, mine != 0); some; some &= some - 1) {
                const int from = __ffs((int)some) - 1;
                for (uint32_t bits = __shfl_sync(~0u, mine, from); bits; bits &= bits - 1) {
                    const bool last = --left == 0;
                    if (b == 0)
                        take_stage<WIDTH, HALF, LAMBDA>(w, t, stage);
                    if (lane == 0)
                        fetch_kv(w, q, t, stage.at(), b, (base + from) * 32 + __ffs((int)bits) - 1, last);
                    __syncwarp();
                    b ^= 1;
                    if (b == 0 || last) {
                        b = 0;
                        stage.n++;
                    }
                }
            }
        }
    }
}

/* ---- The consumers: two warpgroups --------------------------------------------------------- */

/* What a thread knows of its two rows. */
struct rows {
    float m[2], l[2], shrink[2]; /* l: of its own columns; 256 times as much with fp8 */
};

/* What comes of looking at the scores of a stage. Its slot stays until the stage is given back. */
struct view {
    float m[2];   /* the new running maxima */
    bool keep[2]; /* of block a, b: some row of the group comes near its maximum */
};

static __device__ __forceinline__ int thread_of_warpgroup() { return (int)threadIdx.x % WARPGROUP; }
static __device__ __forceinline__ int warpgroup() { return (int)threadIdx.x / WARPGROUP - 1; }
static __device__ __forceinline__ int row_of(int h)
{
    return 64 * warpgroup() + thread_of_warpgroup() / 32 * 16 + thread_of_warpgroup() % 32 / 4 + 8 * h;
}

/* How many keys of block B of a stage each of a thread's rows sees: the first ones; none of them may be
 * negative, all of them more than 64. */
static __device__ __forceinline__ int seen_of_row(const work &w, const slot &t, int b, int h)
{
    const int token = t.first + row_of(h);
    const int64_t end = token < w.g.q_len ? sparge_last_key(&w.g, token) + 1 : 0;
    return (int)end - BLOCK_K * t.block[b];
}

template <int WIDTH, bool HALF>
static __device__ __forceinline__ void multiply_qk(int (&s)[64], const uint8_t *q, const uint8_t *k)
{
    const uint64_t a = descriptor_k_major(q, shape<WIDTH, HALF>::PITCH), b = descriptor_k_major(k, shape<WIDTH, HALF>::PITCH);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < WIDTH / 32; c++)
        wgmma_s8(s, a + c * DESCRIPTOR_32_BYTES, b + c * DESCRIPTOR_32_BYTES, c > 0);
    wgmma_commit();
}

/* One step of P.V: 32 keys in fp8, 16 in f16. `fresh`: the first one of a sum that starts from zero. */
template <int STEP, int N> static __device__ __forceinline__
void pv_step(float (&acc)[N], const uint32_t (&p)[16], uint64_t a, uint64_t b, bool fresh)
{
    const uint32_t x[4] = { p[4 * STEP], p[4 * STEP + 1], p[4 * STEP + 2], p[4 * STEP + 3] };
    wgmma_e4m3(acc, x, (STEP < 2 ? a : b) + STEP % 2 * DESCRIPTOR_32_BYTES, !fresh);
}
template <int STEP, int N> static __device__ __forceinline__
void pv_step(float (&acc)[N], const uint32_t (&p)[32], uint64_t a, uint64_t b, bool)
{
    const uint32_t x[4] = { p[4 * STEP], p[4 * STEP + 1], p[4 * STEP + 2], p[4 * STEP + 3] };
    wgmma_f16(acc, x, (STEP < 4 ? a : b) + STEP % 4 * DESCRIPTOR_16_ROWS, true);
}

template <int FIRST, int END, int STEP, int N, int P> static __device__ __forceinline__
void pv_steps(float (&acc)[N], const uint32_t (&p)[P], uint64_t a, uint64_t b)
{
    if constexpr (STEP == FIRST)
        wgmma_fence();
    if constexpr (STEP < END) {
        pv_step<STEP>(acc, p, a, b, STEP == FIRST);
        pv_steps<FIRST, END, STEP + 1>(acc, p, a, b);
    }
}

/* P.V of the blocks that are kept; their products alone are issued. The conditions are the same for the
 * whole warpgroup, which the compiler has to see (__any_sync), or it serialises every product. */
template <int WIDTH, bool HALF, int N, int P> static __device__ __forceinline__
void multiply_pv(float (&acc)[N], uint32_t (&p)[P], const uint8_t *v, bool keep_a, bool keep_b)
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

/* The largest score of each of a thread's rows in block B, over its quad; INT32_MIN where no key is seen. */
template <int B, bool EDGE> static __device__ __forceinline__
void max_of_block(const int (&s)[64], const int (&seen)[2], int (&max_of)[2])
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

/* Lambda's vote in a group of `skip_rows` rows, and whether the products of its warpgroup can be left out
 * where it skips: a group of fewer than 64 rows is only a part of them. */
static __device__ __forceinline__ bool any_of_group(int skip_rows, bool near)
{
    switch (skip_rows) {
    case 16: return __any_sync(~0u, near);
    case 32: return named_any(VOTE_32 + 2 * warpgroup() + thread_of_warpgroup() / 64, 64, near);
    case 64: return named_any(VOTE_64 + warpgroup(), WARPGROUP, near);
    default: return named_any(VOTE_128, 2 * WARPGROUP, near);
    }
}

/* Lines 11 and 14-15 for both blocks of a stage. */
template <bool LAMBDA> static __device__ __forceinline__
view look(const work &w, const int (&s)[64], const slot &t, const rows &r, float lambda)
{
    const bool only_a = (t.flags & ONLY_A) != 0;
    int max_a[2], max_b[2];
    int seen[2] = { BLOCK_K, BLOCK_K };
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
        const float a = max_a[h] == INT32_MIN ? -INFINITY : t.unit[0] * (float)max_a[h];
        const float b = max_b[h] == INT32_MIN || only_a ? -INFINITY : t.unit[1] * (float)max_b[h];
        const float m = fmaxf(r.m[h], a);
        near_a |= a > -INFINITY && !(a - r.m[h] <= lambda);
        near_b |= b > -INFINITY && !(b - m <= lambda);
        x.m[h] = fmaxf(m, b);
    }
    x.keep[0] = LAMBDA ? any_of_group(w.skip_rows, near_a) : true;
    x.keep[1] = LAMBDA ? any_of_group(w.skip_rows, near_b) : !only_a;
    return x;
}

/* Lines 12-13 for block B: scores become weights, packed as the operand of P.V. The 8-column tiles i and
 * i + 1 are four neighbouring bytes (key_slot) or two halves in each of two registers. */
template <int B, bool EDGE, bool HALF, int P> static __device__ __forceinline__
void weigh_block(const int (&s)[64], uint32_t (&p)[P], float unit, const float (&base)[2], const int (&seen)[2], float (&l)[2])
{
    const int column = 2 * ((int)threadIdx.x % 4);
#pragma unroll
    for (int i = 8 * B; i < 8 * B + 8; i += 2)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float e[4]; /* columns 2 quad, 2 quad + 1 of tile i, then of tile i + 1 */
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float x = fmaf((float)s[4 * (i + n / 2) + 2 * h + n % 2], unit, base[h]);
                e[n] = exp2_fast(EDGE ? fminf(x, HALF ? 0.0f : 8.0f) : x);
                if (EDGE && 8 * (i - 8 * B + n / 2) + column + n % 2 >= seen[h])
                    e[n] = 0.0f;
                l[h] += e[n];
            }
            if constexpr (HALF) {
                p[2 * i + h] = pack_f16(e[0], e[1]);
                p[2 * i + 2 + h] = pack_f16(e[2], e[3]);
            } else {
                p[i / 4 * 4 + i / 2 % 2 * 2 + h] = pack_e4m3(e[0], e[1], e[2], e[3]);
            }
        }
}

/* The same, or zeros where the group skips it. */
template <int B, bool HALF, int P> static __device__ __forceinline__
void weigh_or_clear(const work &w, const int (&s)[64], uint32_t (&p)[P], bool keep, const slot &t, const float (&base)[2],
                    rows &r)
{
    int seen[2] = { BLOCK_K, BLOCK_K };
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

template <bool HALF, int P> static __device__ __forceinline__
void weigh(const work &w, const int (&s)[64], uint32_t (&p)[P], const view &x, const slot &t, rows &r)
{
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float m = x.m[h] == -INFINITY ? 0.0f : x.m[h]; /* a row that has seen nothing stays empty */
        base[h] = (HALF ? 0.0f : 8.0f) - m;
        r.shrink[h] = exp2_fast(r.m[h] - m);
        r.l[h] *= r.shrink[h];
        r.m[h] = x.m[h];
    }
    weigh_or_clear<0, HALF>(w, s, p, x.keep[0], t, base, r);
    weigh_or_clear<1, HALF>(w, s, p, x.keep[1], t, base, r);
}

/* A query block's 64 rows of this warpgroup: o / l, m and l. */
template <int WIDTH, bool HALF> static __device__ __forceinline__
void store_rows(const work &w, const query_block &q, const float (&o)[WIDTH / 2], const rows &r)
{
    const int column = 2 * ((int)threadIdx.x % 4);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sparge_row state;
        state.max = r.m[h];
        state.sum = r.l[h] + __shfl_xor_sync(~0u, r.l[h], 1);
        state.sum += __shfl_xor_sync(~0u, state.sum, 2);
        const float norm = sparge_row_norm(&state);
        const int row = row_of(h);
        if (row < q.rows) {
            const int64_t at = out_row(w, q, row);
#pragma unroll
            for (int i = 0; i < WIDTH / 8; i++) {
                const int c = 8 * i + column;
                float x = o[4 * i + 2 * h] * norm, y = o[4 * i + 2 * h + 1] * norm;
                if (!HALF) {
                    x *= w.step_v[q.kv * WIDTH + c];
                    y *= w.step_v[q.kv * WIDTH + c + 1];
                }
                store_pair(w.o, at, c, w.dim_v, x, y);
            }
            if (column == 0) {
                state.sum *= HALF ? 1.0f : 0x1p-8f;
                store_state(w, q, row, state);
            }
        }
    }
}

/* Which blocks of a stage have their P.V issued. */
struct choice {
    bool a, b;
};

template <int WIDTH, bool HALF, bool LAMBDA>
static __device__ void consume(const work &w, tiles<WIDTH, HALF> &t)
{
    using size = shape<WIDTH, HALF>;
    const bool speaks = threadIdx.x % 32 == 0; /* for a warp */
    cursor<STAGES> stage = { 0 };
    cursor<2> query = { 0 };
    if (warpgroup() == 1)
        named_arrive(TURN, 2 * WARPGROUP); /* warpgroup 0 begins */
    for (;; query.n++) {
        barrier_wait(&t.q_full[query.at()], query.parity());
        if (t.items[query.at()].line < 0)
            return;
        float o[WIDTH / 2], sum[HALF ? 1 : WIDTH / 2]; /* sum: of one stage, fp8 */
        int s[64];
        uint32_t p[size::P];
        rows r;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            r.m[h] = -INFINITY;
            r.l[h] = r.shrink[h] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < WIDTH / 2; n++)
            o[n] = 0.0f;
        view x;

        /* Scores of the stage at hand; what they are good for; its keys are given back. */
        const auto score = [&]() {
            barrier_wait(&t.k_full[stage.at()], stage.parity());
            named_sync(TURN + warpgroup(), 2 * WARPGROUP);
            multiply_qk<WIDTH, HALF>(s, t.q[query.at()] + warpgroup() * 64 * size::PITCH, t.k[stage.at()]);
        };
        const auto look_at_scores = [&]() {
            pin(s);
            __syncwarp();
            if (speaks)
                barrier_arrive(&t.k_empty[stage.at()]);
            x = look<LAMBDA>(w, s, t.slots[stage.at()], r, t.items[query.at()].lambda);
            const uint32_t skips = (x.keep[0] ? 0u : 1u) | (x.keep[1] ? 0u : 256u);
            if (LAMBDA && speaks && skips) /* warps of one group say the same */
                atomicOr(&t.slots[stage.at()].skips, skips << row_of(0) / w.skip_rows);
        };
        /* P.V of a stage: of the blocks that are kept. A group of fewer rows than 64 cannot leave products
         * out alone: its weights are 0. */
        const auto choose = [&]() {
            const bool whole = !LAMBDA || w.skip_rows >= 64;
            choice c;
            c.a = x.keep[0] || !whole;
            c.b = whole ? x.keep[1] : !(t.slots[stage.at()].flags & ONLY_A);
            return c;
        };
        const auto add_values = [&](uint32_t at, const choice &c) {
            if constexpr (HALF)
                multiply_pv<WIDTH, HALF>(o, p, t.v[at], c.a, c.b);
            else
                multiply_pv<WIDTH, HALF>(sum, p, t.v[at], c.a, c.b);
        };
        /* They have been added up: the stage is given back, and o takes them in. Where none was issued no
         * maximum had moved either. */
        const auto take_in = [&](uint32_t at, bool issued) {
            __syncwarp();
            if (speaks)
                barrier_arrive(&t.v_empty[at]);
            if constexpr (HALF) {
                pin(o);
            } else {
                pin(sum);
                if (!LAMBDA || __any_sync(~0u, issued))
#pragma unroll
                    for (int n = 0; n < WIDTH / 2; n++)
                        o[n] = fmaf(o[n], r.shrink[n / 2 % 2], sum[n]);
            }
        };

        score();
        named_arrive(TURN + 1 - warpgroup(), 2 * WARPGROUP);
        wgmma_wait<0>();
        look_at_scores();
        weigh<HALF>(w, s, p, x, t.slots[stage.at()], r);
        while (!(t.slots[stage.at()].flags & LAST)) {
            const uint32_t before = stage.at();
            const choice c = choose();
            barrier_wait(&t.v_full[before], stage.parity());
            stage.n++;
            score();
            add_values(before, c);
            named_arrive(TURN + 1 - warpgroup(), 2 * WARPGROUP);
            wgmma_wait<1>();
            look_at_scores();
            wgmma_wait<0>();
            take_in(before, c.a || c.b);
            weigh<HALF>(w, s, p, x, t.slots[stage.at()], r);
            if (HALF && __any_sync(~0u, r.shrink[0] != 1.0f || r.shrink[1] != 1.0f))
#pragma unroll
                for (int n = 0; n < WIDTH / 2; n++)
                    o[n] *= r.shrink[n / 2 % 2];
        }
        barrier_wait(&t.v_full[stage.at()], stage.parity());
        const choice c = choose();
        add_values(stage.at(), c);
        wgmma_wait<0>();
        take_in(stage.at(), c.a || c.b);
        stage.n++;
        const int64_t line = t.items[query.at()].line;
        __syncwarp();
        if (speaks)
            barrier_arrive(&t.q_empty[query.at()]);
        store_rows<WIDTH, HALF>(w, query_block_of(w, line), o, r);
    }
}

template <int WIDTH, bool HALF, bool LAMBDA>
static __global__ void __launch_bounds__(THREADS, 1) attend_warpgroups(const __grid_constant__ work w)
{
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    tiles<WIDTH, HALF> &t = *(tiles<WIDTH, HALF> *)shared_memory();
    if (threadIdx.x == 0) {
        for (int n = 0; n < STAGES; n++) {
            barrier_init(&t.k_full[n], 1);
            barrier_init(&t.v_full[n], 1);
            barrier_init(&t.k_empty[n], CONSUMER_WARPS);
            barrier_init(&t.v_empty[n], CONSUMER_WARPS);
        }
        for (int n = 0; n < 2; n++) {
            barrier_init(&t.q_full[n], 1);
            barrier_init(&t.q_empty[n], CONSUMER_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32)
            produce<WIDTH, HALF, LAMBDA>(w, t);
    } else {
        registers_grow<CONSUMER_REGISTERS>();
        consume<WIDTH, HALF, LAMBDA>(w, t);
    }
#endif
}

/* ---- The order of the work ----------------------------------------------------------------- */

/* One thread block for each key head: its query blocks that keep something, in about descending order of
 * what they keep, so that the long ones do not come last; heads one after the other, so that those who are
 * at work read the same keys. */
enum { SORT_THREADS = 256, BINS = 256 };

struct bins {
    unsigned int count[BINS], first[BINS];
    unsigned long long base;
};

static __device__ int kept_of(const work &w, int64_t line)
{
    const query_block q = query_block_of(w, line);
    const uint32_t *const row = mask_row(w, q);
    int kept = 0;
    for (int64_t n = 0; 32 * n < q.seen; n++)
        kept += __popc(kept_word(row, n, q.seen));
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

template <bool HALF, bool LAMBDA> static cudaError_t attend_width(const work &w, int64_t blocks, cudaStream_t stream)
{
    switch (w.width) {
    case 64: return launch(attend_warpgroups<64, HALF, LAMBDA>, blocks, THREADS, sizeof(tiles<64, HALF>), stream, w);
    case 96: return launch(attend_warpgroups<96, HALF, LAMBDA>, blocks, THREADS, sizeof(tiles<96, HALF>), stream, w);
    default: return launch(attend_warpgroups<128, HALF, LAMBDA>, blocks, THREADS, sizeof(tiles<128, HALF>), stream, w);
    }
}

cudaError_t attend_hopper(const work &w, cudaStream_t stream)
{
    const int64_t blocks = sparge_min(w.multiprocessors, w.batch * w.heads * w.g.q_blocks);
    if (w.pv == SPARGE_HALF)
        return w.may_skip ? attend_width<true, true>(w, blocks, stream) : attend_width<true, false>(w, blocks, stream);
    return w.may_skip ? attend_width<false, true>(w, blocks, stream) : attend_width<false, false>(w, blocks, stream);
}

} // namespace sparge
