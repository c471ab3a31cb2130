/* SPDX-License-Identifier: Apache-2.0 */
/* language.cu: threads, warps and blocks: what every kernel takes for granted of CUDA, and the host
 * model has to keep. */
#include "tests/gpu/instructions.h"

namespace {

template <class T>
verdict compare(const std::vector<T> &got, const std::vector<T> &want, const char *what)
{
    for (size_t n = 0; n < want.size(); n++)
        if (got[n] != want[n])
            return say("%s %d: %d, not %d", what, (int)n, (int)got[n], (int)want[n]);
    return "ok";
}

/* ---- A grid ---- */

__global__ void write_indices(int *o)
{
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    o[block * 64 + thread] = (int)(block * 1000 + thread);
}

verdict probe_indices()
{
    std::vector<int> want;
    for (int b = 0; b < 24; b++)
        for (int t = 0; t < 64; t++)
            want.push_back(b * 1000 + t);
    buffer<int> out(std::vector<int>(want.size(), -1));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(3, 4, 2);
    config.blockDim = dim3(8, 4, 2);
    must(cudaLaunchKernelEx(&config, write_indices, out.p), "cudaLaunchKernelEx");
    must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    return compare(out.get(), want, "thread");
}

/* ---- A warp ---- */

enum { SHUFFLES = 13 };

__global__ void shuffle(int *o)
{
    const int t = (int)threadIdx.x, v = 100 + t;
    const float f = (float)v;
    const unsigned u = (unsigned)v;
    const int got[SHUFFLES] = {__shfl_sync(~0u, v, 5),
                               __shfl_sync(~0u, v, t + 1),
                               __shfl_sync(~0u, v, 3, 8),
                               (int)__shfl_xor_sync(~0u, f, 16),
                               __shfl_xor_sync(~0u, v, 9, 8),
                               (int)__shfl_up_sync(~0u, u, 3),
                               __shfl_up_sync(~0u, v, 2, 4),
                               (int)__shfl_down_sync(~0u, f, 30),
                               __shfl_down_sync(~0u, v, 1, 16),
                               (int)__ballot_sync(~0u, t % 3 == 0),
                               __any_sync(~0u, t == 40) + 2 * __all_sync(~0u, t < 32),
                               (int)__reduce_add_sync(~0u, v),
                               (int)(__shfl_xor_sync(~0u, (long long)v << 40, 4) >> 40)};
    for (int n = 0; n < SHUFFLES; n++)
        o[n * 64 + t] = got[n];
}

verdict probe_shuffles()
{
    std::vector<int> want(SHUFFLES * 64);
    for (int t = 0; t < 64; t++) {
        const int lane = t % 32, base = 100 + t - lane;
        int ballot = 0, sum = 0;
        for (int l = 0; l < 32; l++) {
            ballot |= ((t - lane + l) % 3 == 0) << l;
            sum += base + l;
        }
        const int xor_9 = lane ^ 9; /* in segments of 8: only towards an earlier segment */
        const int all[SHUFFLES] = {base + 5,
                                   base + (lane + 1) % 32,
                                   base + lane / 8 * 8 + 3,
                                   base + (lane + 16) % 32,
                                   base + (xor_9 / 8 > lane / 8 ? lane : xor_9),
                                   base + (lane < 3 ? lane : lane - 3),
                                   base + (lane % 4 < 2 ? lane : lane - 2),
                                   base + (lane < 2 ? lane + 30 : lane),
                                   base + (lane % 16 == 15 ? lane : lane + 1),
                                   ballot,
                                   t < 32 ? 2 : 1,
                                   sum,
                                   base + (lane ^ 4)};
        for (int n = 0; n < SHUFFLES; n++)
            want[n * 64 + t] = all[n];
    }
    buffer<int> out(std::vector<int>(want.size(), -1));
    run(shuffle, 1, 64, 0, out.p);
    return compare(out.get(), want, "case * 64 + thread");
}

__global__ void reduce(int *o)
{
    const int t = (int)threadIdx.x, v = (t * 7 + 3) % 32 - 16;
    o[0] = __reduce_max_sync(~0u, v);
    o[1] = __reduce_min_sync(~0u, v);
    o[2] = (int)__reduce_max_sync(~0u, (unsigned)t);
    o[3] = (int)__reduce_add_sync(~0u, 0x80000000u + (unsigned)t); /* wraps */
}

verdict probe_reductions()
{
    buffer<int> out(std::vector<int>(4, -1));
    run(reduce, 1, 32, 0, out.p);
    return compare(out.get(), {15, -16, 31, 31 * 16}, "case");
}

/* ---- A block ---- */

__global__ void pass_to_neighbours(int *o)
{
    int *const s = (int *)shared_memory();
    const int t = (int)threadIdx.x;
    int x = t;
    for (int round = 0; round < 5; round++) { /* everybody reads its neighbour's */
        s[t] = x;
        __syncthreads();
        x = s[(t + 1) % 96];
        __syncthreads();
    }
    o[t] = x;
    o[96 + t] = __syncthreads_count(t % 3 == 0);
    const int some = __syncthreads_or(t == 50), none = __syncthreads_or(0);
    o[192 + t] = (some != 0) + 2 * (none != 0);
    const int all = __syncthreads_and(t < 96), most = __syncthreads_and(t != 7);
    o[288 + t] = (all != 0) + 2 * (most != 0);
}

verdict probe_block_barriers()
{
    std::vector<int> want;
    for (int t = 0; t < 96; t++)
        want.push_back((t + 5) % 96);
    want.resize(192, 32);
    want.resize(384, 1);
    buffer<int> out(std::vector<int>(want.size(), -1));
    run(pass_to_neighbours, 1, 96, 96 * 4, out.p);
    return compare(out.get(), want, "case * 96 + thread");
}

__global__ void count_those_left(int *o)
{
    if (threadIdx.x >= 32)
        return; /* before or after the others have arrived */
    o[0] = __syncthreads_count(1);
}

verdict probe_returned_threads()
{
    buffer<int> out(std::vector<int>(1, -1));
    run(count_those_left, 1, 64, 0, out.p);
    return compare(out.get(), {32}, "case");
}

/* ---- A thread ---- */

__global__ void calculate(int *right, int *i, unsigned *u, unsigned long long *l)
{
    int n = 0;
    right[n++] = __popc(0xf0f0u) == 8 && __popcll(~0ull) == 64 && __ffs(0) == 0 && __ffs(12) == 3;
    right[n++] = __clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0;
    right[n++] = __dp4a((int)0x80ff7f01, (int)0x80027f03, 5) == 128 * 128 - 2 + 127 * 127 + 3 + 5;
    right[n++] = min(-1, 2) == -1 && max(1u, ~0u) == ~0u && max(NAN, 1.0f) == 1.0f;
    right[n++] = __vimax3_s32(-5, 7, 2) == 7;
    right[n++] = __float_as_int(-0.0f) == INT32_MIN && __uint_as_float(0x3f800000) == 1.0f;
    right[n++] = atomicAdd(i, -7) == 5 && *i == -2 && atomicMax(i, 9) == -2 && *i == 9;
    right[n++] = atomicOr(u, 9) == 6 && *u == 15 && atomicAnd(u, 5) == 15 && *u == 5;
    right[n++] = atomicAdd(l, 3) == 1ull << 40 && *l == (1ull << 40) + 3;
}

verdict probe_arithmetic()
{
    buffer<int> right(std::vector<int>(9, 0)), i(std::vector<int>(1, 5));
    buffer<unsigned> u(std::vector<unsigned>(1, 6));
    buffer<unsigned long long> l(std::vector<unsigned long long>(1, 1ull << 40));
    run(calculate, 1, 1, 0, right.p, i.p, u.p, l.p);
    return compare(right.get(), std::vector<int>(9, 1), "line");
}

} // namespace

std::vector<question> language_questions()
{
    return {
        {"indices", false, probe_indices},
        {"shuffles", false, probe_shuffles},
        {"reductions", false, probe_reductions},
        {"block_barriers", false, probe_block_barriers},
        {"returned_threads", false, probe_returned_threads},
        {"arithmetic", false, probe_arithmetic},
    };
}
