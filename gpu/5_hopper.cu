/* 5_hopper.cu: kernel 5, sm_90a. One warp does nothing but fetch: it walks the mask and keeps a
 * ring of shared-memory stages full with bulk copies. Two warpgroups of 64 query rows each multiply
 * (wgmma) and take turns, so that the softmax of one runs under the products of the other; within a
 * warpgroup P.V of one stage runs under the maxima of the next.
 *
 * A stage is two kept key blocks, gathered from anywhere, a and b: their 128 keys are one product,
 * but lambda's test, the unit of the scores and the running maximum go block by block, in order. An
 * odd last block leaves b absent.
 *
 *   stage  k [2][64 keys][pitch]   v [2] tiles   slot: which blocks, and their units
 *   ring   full: the bytes have landed          empty: all eight warps have read them
 *   turn   named barriers 2 and 3: whose products may be issued
 *
 * P.V in fp8: the tensor core's own sum is narrower than float, so each stage is summed from zero
 * and added to o in float. P is coded as 256 p, for e4m3 has few numbers below 1. In f16 the tensor
 * core adds to o itself. exp2 is the hardware's; README.md says how far o may lie. */
#include "gpu/5_stage.h"

namespace sparge {

/* ---- The producer: one warp ---------------------------------------------------------------- */

/* Announces a query block and fetches its codes. */
template <int WIDTH, bool HALF>
static __device__ void fetch_q(const work &w, const query_block &q, tiles<WIDTH, HALF> &t,
                               uint32_t at)
{
    using size = shape<WIDTH, HALF>;
    t.items[at] = {q.line, thresholds_of(w, q.h).lambda * SPARGE_LOG2E};
    barrier_arrive_expect(&t.q_full[at], size::Q_BYTES);
    copy_bulk(t.q[at], w.q8 + q.line * size::Q_BYTES, size::Q_BYTES, &t.q_full[at]);
}

/* Key block j into half `b` of a stage. The arrival at k_full comes last: it publishes the slot
 * too. */
template <int WIDTH, bool HALF>
static __device__ void fetch_kv(const work &w, const query_block &q, tiles<WIDTH, HALF> &t,
                                uint32_t at, int b, int64_t j, bool last)
{
    using size = shape<WIDTH, HALF>;
    const int64_t block = q.kv * w.g.k_blocks + j;
    slot &s = t.slots[at];
    const bool edge = q.rows < BLOCK_Q || keys_of_row(w, q, 0, j) < BLOCK_K;
    s.first = (int)q.first;
    s.skipped = w.may_skip ? skipped_row(w, q, 0) : NULL;
    s.unit[b] = score_unit(w, q, j);
    s.block[b] = (int)j;
    s.skips = 0;
    s.flags =
        (b ? s.flags : 0) | (edge ? EDGE : 0) | (last ? LAST : 0) | (last && b == 0 ? ONLY_A : 0);
    if (b == 0)
        barrier_arrive_expect(&t.v_full[at], last ? size::V_BYTES : 2 * size::V_BYTES);
    copy_bulk(t.k[at] + b * size::K_BYTES, w.k8 + block * size::K_BYTES, size::K_BYTES,
              &t.k_full[at]);
    copy_bulk(t.v[at] + b * size::V_BYTES, w.v_tile + block * size::V_BYTES, size::V_BYTES,
              &t.v_full[at]);
    if (b == 1 || last)
        barrier_arrive_expect(&t.k_full[at], b ? 2 * size::K_BYTES : size::K_BYTES);
}

/* What the consumers skipped of a stage, once they are through with it: a lane for each group and
 * block. A group that sees no key of a block has nothing to skip. */
static __device__ void record_skips(const work &w, const slot &s)
{
    const int lane = (int)threadIdx.x, b = lane / 8, group = lane % 8;
    if (lane >= (s.flags & ONLY_A ? 8 : 16) || !(s.skips >> lane & 1u))
        return;
    const int j = s.block[b], words = (int)sparge_mask_row_words(w.g.k_blocks);
    const int last =
        min(s.first + (group + 1) * w.skip_rows, (int)w.g.q_len) - 1; /* token of the group */
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

template <int WIDTH, bool HALF, bool LAMBDA>
static __device__ void produce(const work &w, tiles<WIDTH, HALF> &t)
{
    const int lane = (int)threadIdx.x;
    cursor<STAGES> stage = {0};
    cursor<2> query = {0};
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
                        fetch_kv(w, q, t, stage.at(), b, (base + from) * 32 + __ffs((int)bits) - 1,
                                 last);
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

/* Which blocks of a stage have their P.V issued. */
struct choice {
    bool a, b;
};

template <int WIDTH, bool HALF, bool LAMBDA>
static __device__ void consume(const work &w, tiles<WIDTH, HALF> &t)
{
    using size = shape<WIDTH, HALF>;
    const bool speaks = threadIdx.x % 32 == 0; /* for a warp */
    cursor<STAGES> stage = {0};
    cursor<2> query = {0};
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
            multiply_qk<WIDTH, HALF>(s, t.q[query.at()] + warpgroup() * 64 * size::PITCH,
                                     t.k[stage.at()]);
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
        /* P.V of a stage: of the blocks that are kept. A group of fewer rows than 64 cannot leave
         * products out alone: its weights are 0. */
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
        /* They have been added up: the stage is given back, and o takes them in. Where none was
         * issued no maximum had moved either. */
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
static __global__ void __launch_bounds__(THREADS, 1)
    attend_warpgroups(const __grid_constant__ work w)
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

template <int WIDTH, bool HALF, bool LAMBDA>
static cudaError_t attend_with(const work &w, cudaStream_t stream)
{
    const int64_t blocks = sparge_min(w.multiprocessors, w.batch * w.heads * w.g.q_blocks);
    const size_t shared = sizeof(tiles<WIDTH, HALF>);
    return launch(attend_warpgroups<WIDTH, HALF, LAMBDA>, blocks, THREADS, shared, stream, w);
}

template <bool HALF, bool LAMBDA>
static cudaError_t attend_width(const work &w, cudaStream_t stream)
{
    switch (w.width) {
    case 64: return attend_with<64, HALF, LAMBDA>(w, stream);
    case 96: return attend_with<96, HALF, LAMBDA>(w, stream);
    default: return attend_with<128, HALF, LAMBDA>(w, stream);
    }
}

cudaError_t attend_hopper(const work &w, cudaStream_t stream)
{
    if (w.pv == SPARGE_F16)
        return w.may_skip ? attend_width<true, true>(w, stream)
                          : attend_width<true, false>(w, stream);
    return w.may_skip ? attend_width<false, true>(w, stream)
                      : attend_width<false, false>(w, stream);
}

} // namespace sparge
