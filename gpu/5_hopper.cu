/* SPDX-License-Identifier: Apache-2.0 */
/* 5_hopper.cu: kernel 5, sm_90a. One warp does nothing but fetch. It walks the mask and keeps a
 * ring of shared-memory stages full with bulk copies. Two warpgroups of 64 query rows each multiply
 * (wgmma) and take turns, so that the softmax of one runs under the products of the other. Within a
 * warpgroup P.V of one stage runs under the maxima of the next.
 *
 * A stage is two kept key blocks, a and b, gathered from anywhere. Their 128 keys are one product,
 * but lambda's test, the scale of the scores and the running maximum go block by block, in order. A
 * query block with an odd number of blocks has a last stage without b.
 *
 *   stage  k [2][64 keys][pitch]   v [2] tiles   kv_slot: which blocks, and their scales
 *   full   an mbarrier: the bytes have landed
 *   empty  an mbarrier: all eight warps have read them
 *   turn   named barriers 2 and 3: which warpgroup may issue its products
 *
 * P.V in fp8: the tensor core's own sum is narrower than float, so each stage is summed from zero
 * and added to o in float. P is coded as 256 p, because e4m3 has few numbers below 1. In f16 the
 * tensor core adds to o itself. exp2 is the hardware's. README.md says how far o may lie. */
#include "gpu/5_stage.h"

namespace sparge {

/* ---- The producer: one warp ---------------------------------------------------------------- */

/* The kept blocks of a row of the mask, found by a warp 32 words at a time. */
struct walk {
    int base;
    uint32_t mine;             /* this lane's word of those from `base` on */
    uint32_t words_left, bits; /* words that are not 0; blocks of the one at hand */
    int word;
};

/* Lane n takes word base + n. */
static __device__ void load_words(walk &k, const query_block &q)
{
    const int at = k.base + (int)threadIdx.x;
    k.mine = 32 * at < q.visible ? kept_word(q, at) : 0;
    k.words_left = __ballot_sync(~0u, k.mine != 0);
}

static __device__ walk walk_from_start(const query_block &q)
{
    walk k = {0, 0, 0, 0, 0};
    load_words(k, q);
    return k;
}

/* The next kept block; there must be one. */
static __device__ int next_block(walk &k, const query_block &q)
{
    while (!k.bits) {
        while (!k.words_left) {
            k.base += 32;
            load_words(k, q);
        }
        const int from = __ffs((int)k.words_left) - 1;
        k.words_left &= k.words_left - 1;
        k.bits = __shfl_sync(~0u, k.mine, from);
        k.word = k.base + from;
    }
    const int block = 32 * k.word + __ffs((int)k.bits) - 1;
    k.bits &= k.bits - 1;
    return block;
}

static __device__ int count_kept(const query_block &q)
{
    int kept = 0;
    for (int64_t n = threadIdx.x; 32 * n < q.visible; n += 32)
        kept += __popc(kept_word(q, n));
    return __reduce_add_sync(~0u, kept);
}

/* Announces a query block and fetches its codes. */
template <int WIDTH, bool F16>
static __device__ void fetch_q(const work &w, const query_block &q, tiles<WIDTH, F16> &t,
                               uint32_t at)
{
    t.q_slots[at] = {q.line, thresholds_of(w, q.h).lambda};
    barrier_arrive_expect(&t.q_full[at], sizeof t.q[at]);
    copy_bulk(t.q[at], w.q_tile + q.line * (int64_t)sizeof t.q[at], sizeof t.q[at], &t.q_full[at]);
}

/* Fills a stage with key block a and, if not negative, b. The arrival at k_full comes last, because
 * it publishes the slot too. */
template <int WIDTH, bool F16>
static __device__ void fetch_stage(const work &w, const query_block &q, tiles<WIDTH, F16> &t,
                                   uint32_t at, int a, int b, bool last)
{
    const uint32_t k_bytes = sizeof t.k[at][0], v_bytes = sizeof t.v[at][0], blocks = b < 0 ? 1 : 2;
    kv_slot &s = t.kv_slots[at];
    s.block[0] = a;
    s.block[1] = b;
    s.first = (int)q.first;
    s.skipped = w.may_skip ? skipped_row(w, q, 0) : NULL;
    s.skips = 0;
    s.flags = (last ? LAST : 0) | (b < 0 ? ONLY_A : 0);
    barrier_arrive_expect(&t.v_full[at], blocks * v_bytes);
    for (uint32_t n = 0; n < blocks; n++) {
        const int64_t block = q.kv * w.g.k_blocks + s.block[n];
        s.dequant_scale[n] = dequant_scale(w, q, s.block[n]);
        if (q.rows < BLOCK_Q || visible_end(w, s.first, s.block[n]) < BLOCK_K)
            s.flags |= EDGE; /* the first row sees least */
        copy_bulk(t.k[at][n], w.k_tile + block * k_bytes, k_bytes, &t.k_full[at]);
        copy_bulk(t.v[at][n], w.v_tile + block * v_bytes, v_bytes, &t.v_full[at]);
    }
    barrier_arrive_expect(&t.k_full[at], blocks * k_bytes);
}

/* Records what the consumers skipped of a stage that they have given back: a lane for each group
 * and block. A group that sees no key of a block has nothing to skip. */
static __device__ void record_skips(const work &w, const kv_slot &s)
{
    const int lane = (int)threadIdx.x, b = lane / 8, group = lane % 8;
    if (lane >= (s.flags & ONLY_A ? 8 : 16) || !(s.skips >> lane & 1u))
        return;
    const int j = s.block[b], first = s.first + group * w.skip_rows;
    const int last = min(first + w.skip_rows, (int)w.g.q_len) - 1;
    if (last >= first && visible_end(w, last, j) > 0)
        atomicOr(&s.skipped[group * (int)sparge_mask_row_words(w.g.k_blocks) + j / 32],
                 1u << j % 32);
}

/* Waits until a stage can be filled. */
template <int WIDTH, bool F16, bool LAMBDA>
static __device__ void take_stage(const work &w, tiles<WIDTH, F16> &t, const cursor<STAGES> &stage)
{
    barrier_wait(&t.k_empty[stage.at()], stage.parity() ^ 1); /* at first, every stage is empty */
    barrier_wait(&t.v_empty[stage.at()], stage.parity() ^ 1);
    if (LAMBDA && stage.n >= STAGES)
        record_skips(w, t.kv_slots[stage.at()]);
    __syncwarp();
}

/* The next query block of the plan; negative: there is none. */
static __device__ int64_t take_ticket(const work &w)
{
    unsigned long long ticket = 0;
    if (threadIdx.x == 0)
        ticket = atomicAdd(w.ticket, 1ull);
    ticket = __shfl_sync(~0u, ticket, 0);
    return (int64_t)ticket < *w.order_len ? w.order[ticket] : -1;
}

template <int WIDTH, bool F16, bool LAMBDA>
static __device__ void produce(const work &w, tiles<WIDTH, F16> &t)
{
    const bool speaks = threadIdx.x == 0;
    cursor<STAGES> stage = {0};
    cursor<Q_STAGES> query = {0};
    for (int64_t line; (line = take_ticket(w)) >= 0; query.n++) {
        const query_block q = query_block_of(w, line);
        barrier_wait(&t.q_empty[query.at()], query.parity() ^ 1);
        if (speaks)
            fetch_q(w, q, t, query.at());
        walk kept = walk_from_start(q);
        for (int left = count_kept(q); left > 0; left -= 2, stage.n++) {
            take_stage<WIDTH, F16, LAMBDA>(w, t, stage);
            const int a = next_block(kept, q), b = left > 1 ? next_block(kept, q) : -1;
            if (speaks)
                fetch_stage(w, q, t, stage.at(), a, b, left <= 2);
            __syncwarp();
        }
    }
    barrier_wait(&t.q_empty[query.at()], query.parity() ^ 1);
    if (speaks) {
        t.q_slots[query.at()].line = -1;
        barrier_arrive(&t.q_full[query.at()]);
    }
    for (int n = 0; LAMBDA && n < STAGES; n++, stage.n++)
        take_stage<WIDTH, F16, LAMBDA>(w, t, stage);
}

/* ---- The consumers: two warpgroups --------------------------------------------------------- */

/* A warp has read what an `empty` barrier guards. */
SPARGE_DEVICE void give_back(uint64_t *empty)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        barrier_arrive(empty);
}

/* The other warpgroup may issue its products. */
SPARGE_DEVICE void pass_turn() { named_arrive(TURN + 1 - warpgroup(), 2 * WARPGROUP); }

/* Issues S = Q K^T of a stage, when its keys are here and it is this warpgroup's turn. */
template <int WIDTH, bool F16>
SPARGE_DEVICE void issue_qk(tiles<WIDTH, F16> &t, const cursor<STAGES> &stage, const uint8_t *q,
                            fragment<WIDTH, F16> &f)
{
    barrier_wait(&t.k_full[stage.at()], stage.parity());
    named_sync(TURN + warpgroup(), 2 * WARPGROUP);
    multiply_qk<WIDTH>(f.s, q, t.k[stage.at()][0]);
}

/* S is here: gives the keys back, finds the maxima and what lambda skips. */
template <bool LAMBDA, int WIDTH, bool F16>
SPARGE_DEVICE verdict read_scores(const work &w, tiles<WIDTH, F16> &t, uint32_t at, float lambda,
                                  fragment<WIDTH, F16> &f)
{
    pin(f.s);
    give_back(&t.k_empty[at]);
    const verdict x = judge<LAMBDA>(w, f.s, t.kv_slots[at], f.row, lambda);
    const uint32_t skips = (x.keep[0] ? 0u : 1u) | (x.keep[1] ? 0u : 256u);
    if (LAMBDA && threadIdx.x % 32 == 0 && skips) /* all warps of a group say the same */
        atomicOr(&t.kv_slots[at].skips, skips << row_of(0) / w.skip_rows);
    return x;
}

/* Issues P.V of a stage, whose values are here: into o in f16, into a sum of its own in fp8. */
template <int WIDTH, bool F16>
SPARGE_DEVICE void issue_pv(tiles<WIDTH, F16> &t, uint32_t at, const verdict &x,
                            fragment<WIDTH, F16> &f)
{
    if constexpr (F16)
        multiply_pv(f.o, f.p, t.v[at], x.issue);
    else
        multiply_pv(f.pv, f.p, t.v[at], x.issue);
}

/* P.V is here: gives the values back and, in fp8, adds it to o. If none was issued, no maximum has
 * moved either. */
template <bool LAMBDA, int WIDTH, bool F16>
SPARGE_DEVICE void add_pv(tiles<WIDTH, F16> &t, uint32_t at, const verdict &x,
                          fragment<WIDTH, F16> &f)
{
    give_back(&t.v_empty[at]);
    if constexpr (F16) {
        pin(f.o);
    } else {
        pin(f.pv);
        if (!LAMBDA || __any_sync(~0u, x.issue[0] || x.issue[1]))
#pragma unroll
            for (int n = 0; n < WIDTH / 2; n++)
                f.o[n] = fmaf(f.o[n], f.shrink[n / 2 % 2], f.pv[n]);
    }
}

/* In f16 o shrinks before the tensor core adds to it. */
template <int WIDTH, bool F16> SPARGE_DEVICE void rescale_o(fragment<WIDTH, F16> &f)
{
    if (F16 && __any_sync(~0u, f.shrink[0] != 1.0f || f.shrink[1] != 1.0f))
#pragma unroll
        for (int n = 0; n < WIDTH / 2; n++)
            f.o[n] *= f.shrink[n / 2 % 2];
}

/* All stages of a query block. `stage` moves past them. */
template <bool LAMBDA, int WIDTH, bool F16>
SPARGE_DEVICE void attend_stages(const work &w, tiles<WIDTH, F16> &t, cursor<STAGES> &stage,
                                 const uint8_t *q, const q_slot &query, fragment<WIDTH, F16> &f)
{
    clear(f);
    issue_qk(t, stage, q, f);
    pass_turn();
    wgmma_wait<0>();
    verdict x = read_scores<LAMBDA>(w, t, stage.at(), query.lambda, f);
    softmax(w, t.kv_slots[stage.at()], x, f);
    while (!(t.kv_slots[stage.at()].flags & LAST)) {
        const cursor<STAGES> before = stage;
        barrier_wait(&t.v_full[before.at()], before.parity());
        stage.n++;
        issue_qk(t, stage, q, f);
        issue_pv(t, before.at(), x, f);
        pass_turn();
        wgmma_wait<1>(); /* S is here, P.V is not yet */
        const verdict next = read_scores<LAMBDA>(w, t, stage.at(), query.lambda, f);
        wgmma_wait<0>();
        add_pv<LAMBDA>(t, before.at(), x, f);
        softmax(w, t.kv_slots[stage.at()], next, f);
        rescale_o(f);
        x = next;
    }
    barrier_wait(&t.v_full[stage.at()], stage.parity());
    issue_pv(t, stage.at(), x, f);
    wgmma_wait<0>();
    add_pv<LAMBDA>(t, stage.at(), x, f);
    stage.n++;
}

template <int WIDTH, bool F16, bool LAMBDA>
static __device__ void consume(const work &w, tiles<WIDTH, F16> &t)
{
    cursor<STAGES> stage = {0};
    cursor<Q_STAGES> query = {0};
    if (warpgroup() == 1)
        pass_turn(); /* warpgroup 0 begins */
    for (;; query.n++) {
        barrier_wait(&t.q_full[query.at()], query.parity());
        const int64_t line = t.q_slots[query.at()].line;
        if (line < 0)
            return;
        fragment<WIDTH, F16> f;
        const uint8_t *const q = t.q[query.at()] + warpgroup() * 64 * pitch_of(WIDTH);
        attend_stages<LAMBDA>(w, t, stage, q, t.q_slots[query.at()], f);
        give_back(&t.q_empty[query.at()]);
        store_rows(w, query_block_of(w, line), f);
    }
}

/* ---- The kernel ----------------------------------------------------------------------------- */

template <int WIDTH, bool F16> static __device__ void init_barriers(tiles<WIDTH, F16> &t)
{
    for (int n = 0; n < STAGES; n++) {
        barrier_init(&t.k_full[n], 1);
        barrier_init(&t.v_full[n], 1);
        barrier_init(&t.k_empty[n], CONSUMER_WARPS);
        barrier_init(&t.v_empty[n], CONSUMER_WARPS);
    }
    for (int n = 0; n < Q_STAGES; n++) {
        barrier_init(&t.q_full[n], 1);
        barrier_init(&t.q_empty[n], CONSUMER_WARPS);
    }
    barrier_init_fence();
}

template <int WIDTH, bool F16, bool LAMBDA>
static __global__ void __launch_bounds__(THREADS, 1)
    attend_warpgroups(const __grid_constant__ work w)
{
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    tiles<WIDTH, F16> &t = *(tiles<WIDTH, F16> *)shared_memory();
    if (threadIdx.x == 0)
        init_barriers(t);
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32)
            produce<WIDTH, F16, LAMBDA>(w, t);
    } else {
        registers_grow<CONSUMER_REGISTERS>();
        consume<WIDTH, F16, LAMBDA>(w, t);
    }
#endif
}

template <bool F16, bool LAMBDA> static cudaError_t attend_with(const work &w, cudaStream_t stream)
{
    int multiprocessors = 0;
    const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
    if (error != cudaSuccess)
        return error;
    const int64_t blocks = sparge_min(multiprocessors, q_blocks_of_all_heads(w));
    const auto queue = [&](auto width) {
        return launch(attend_warpgroups<width, F16, LAMBDA>, blocks, THREADS,
                      sizeof(tiles<width, F16>), stream, w);
    };
    return at_width(w, queue);
}

cudaError_t attend_hopper(const work &w, cudaStream_t stream)
{
    if (w.pv == SPARGE_F16)
        return w.may_skip ? attend_with<true, true>(w, stream)
                          : attend_with<true, false>(w, stream);
    return w.may_skip ? attend_with<false, true>(w, stream) : attend_with<false, false>(w, stream);
}

} // namespace sparge
