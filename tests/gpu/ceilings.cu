/* SPDX-License-Identifier: Apache-2.0 */
/* ceilings.cu: what this device can do at most, so that a kernel's speed means something: products
 * of the tensor cores, memory, single instructions; and how exactly e4m3 products add up inside the
 * tensor core.
 *
 * Operands are random as attention's are: zeros would draw less power and run faster than anything
 * real. Medians of repeated launches, by CUDA events. Prints `what,value,unit,expected`: what the
 * design counted on stands beside what is there. */
#include "common/half.h"
#include "gpu/hopper.h"
#include "gpu/layout.h"
#include "tests/gpu/program.h"

#include <algorithm>
#include <math.h>

#ifndef __CUDACC__
static long long clock64() /* on the model time is what it costs to ask for it */
{
    static long long now;
    return now += 1000;
}
#endif

namespace {

enum { REPEAT = ON_MODEL ? 1 : 7 };

void report(const char *what, double value, const char *unit, const char *expected)
{
    printf("%s,%.6g,%s,%s\n", what, value, unit, expected);
}

/* ---- Time ---- */

struct stopwatch {
    cudaEvent_t begin, end;
    stopwatch()
    {
        must(cudaEventCreate(&begin), "cudaEventCreate");
        must(cudaEventCreate(&end), "cudaEventCreate");
    }
    ~stopwatch()
    {
        cudaEventDestroy(begin);
        cudaEventDestroy(end);
    }
    stopwatch(const stopwatch &) = delete;
    stopwatch &operator=(const stopwatch &) = delete;
};

/* Seconds of what `work` queues. */
template <class Work> double seconds_of(Work work)
{
    stopwatch watch;
    float ms = 0;
    must(cudaEventRecord(watch.begin), "cudaEventRecord");
    work();
    must(cudaEventRecord(watch.end), "cudaEventRecord");
    must(cudaEventSynchronize(watch.end), "cudaEventSynchronize");
    must(cudaEventElapsedTime(&ms, watch.begin, watch.end), "cudaEventElapsedTime");
    return 1e-3 * (double)ms;
}

template <class Work> double median_seconds(Work work)
{
    std::vector<double> seconds;
    for (int n = 0; n < REPEAT; n++)
        seconds.push_back(seconds_of(work));
    std::nth_element(seconds.begin(), seconds.begin() + REPEAT / 2, seconds.end());
    return seconds[REPEAT / 2];
}

/* Seconds a turn of a kernel that is told how many to make: as many as take about 60 ms. The clocks
 * of a device under power come down within that time, which is what a real kernel meets. */
template <class Launch> double seconds_per_turn(Launch launch)
{
    if (ON_MODEL)
        return median_seconds([&] { launch(1); });
    int turns = 64;
    while (seconds_of([&] { launch(turns); }) < 0.03 && turns < 1 << 28)
        turns *= 2;
    turns *= 2;
    return median_seconds([&] { launch(turns); }) / turns;
}

/* ---- Tensor cores ---- */

enum kind { S8, E4M3, F16, S8_AND_E4M3 };
enum { TILE_A = 16384, TILE_B = 16384, OPERANDS = TILE_A + 2 * TILE_B, CHAIN = 4 };

/* Every warpgroup multiplies its 64 rows by the same 128 columns, CHAIN products a turn of 128
 * bytes of k (e4m3, f16: 64 keys over and over); the group before is still under way. */
template <int KIND>
__global__ void __launch_bounds__(256)
    multiply_warpgroups(const uint8_t *operands, const uint32_t *weights, int *out, int turns)
{
#ifdef HOPPER
    uint8_t *const tile = shared_memory();
    const int t = (int)threadIdx.x, group = t / 128;
    for (int n = 16 * t; n < OPERANDS; n += 16 * (int)blockDim.x)
        *(uint4 *)(tile + n) = *(const uint4 *)(operands + n);
    fence_async();
    __syncthreads();
    int s[64];
    float o[64];
    uint32_t p[4];
#pragma unroll
    for (int n = 0; n < 64; n++) {
        s[n] = 0;
        o[n] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < 4; n++)
        p[n] = weights[4 * t + n];
    const uint64_t a = descriptor_k_major(tile + group * 8192, 128),
                   b = descriptor_k_major(tile + TILE_A, 128);
    const uint64_t v = KIND == F16 ? descriptor_n_major(tile + TILE_A, 8192)
                                   : descriptor_k_major(tile + TILE_A + TILE_B, 64);
    pin(s);
    pin(o);
    pin(p);
    for (int turn = 0; turn < turns; turn++) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < CHAIN; k++) {
            if constexpr (KIND == S8 || KIND == S8_AND_E4M3)
                wgmma_s8(s, a + k * DESCRIPTOR_32_BYTES, b + k * DESCRIPTOR_32_BYTES, true);
            if constexpr (KIND == E4M3 || KIND == S8_AND_E4M3)
                wgmma_e4m3(o, p, v + k % 2 * DESCRIPTOR_32_BYTES, true);
            if constexpr (KIND == F16)
                wgmma_f16(o, p, v + k * DESCRIPTOR_16_ROWS, true);
        }
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    pin(s);
    pin(o);
    int sum = 0;
#pragma unroll
    for (int n = 0; n < 64; n++)
        sum += s[n] + (o[n] > 0.0f);
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
#endif
}

/* The same by mma.sync: eight products that do not wait for each other, a turn. */
template <bool HALF>
__global__ void __launch_bounds__(256)
    multiply_warps(const uint32_t *operands, const uint32_t *weights, int *out, int turns)
{
    int s[8][4];
    float o[8][4];
    uint32_t a[4], b[8][2];
    for (int n = 0; n < 4; n++)
        a[n] = weights[4 * threadIdx.x + n];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        b[i][0] = operands[(2 * i) * 256 + threadIdx.x];
        b[i][1] = operands[(2 * i + 1) * 256 + threadIdx.x];
        for (int n = 0; n < 4; n++) {
            s[i][n] = 0;
            o[i][n] = 0.0f;
        }
    }
    for (int turn = 0; turn < turns; turn++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (HALF)
                mma_f16(o[i], a, b[i][0], b[i][1]);
            else
                mma_s8(s[i], a, b[i][0], b[i][1]);
    int sum = 0;
    for (int i = 0; i < 8; i++)
        for (int n = 0; n < 4; n++)
            sum += s[i][n] + (o[i][n] > 0.0f);
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

/* Bytes of codes of normal numbers: int8 with the largest of four sigma at 127, e4m3 at 448, halves
 * as they are. */
std::vector<uint8_t> normal_operands(kind what, size_t bytes)
{
    draws draw = {11};
    std::vector<uint8_t> x(bytes);
    for (size_t n = 0; n < bytes; n++) {
        const float z = draw.normal();
        const uint16_t half = sparge_f32_to_f16(z);
        if (what == S8)
            x[n] = (uint8_t)(int8_t)lrintf(fminf(fmaxf(z * 127 / 4, -127), 127));
        else if (what == E4M3)
            x[n] = sparge_f32_to_e4m3(z * 448 / 4);
        else if (n % 2 == 0)
            memcpy(&x[n], &half, 2);
    }
    return x;
}

/* P: 2^-something below 1 (f16) or 256 (e4m3), in registers. */
std::vector<uint32_t> random_weights(kind what, int words)
{
    draws draw = {12};
    std::vector<uint32_t> x((size_t)words);
    const auto weight = [&] { return exp2f(-8.0f * draw.uniform()); };
    for (uint32_t &w : x) {
        w = 0;
        if (what == F16)
            for (int e = 0; e < 2; e++)
                w |= (uint32_t)sparge_f32_to_f16(weight()) << 16 * e;
        else
            for (int e = 0; e < 4; e++)
                w |=
                    (uint32_t)(what == S8 ? draw.bits() & 0xff : sparge_f32_to_e4m3(256 * weight()))
                    << 8 * e;
    }
    return x;
}

template <int KIND> void measure_warpgroups(const char *what, int groups, const char *expected)
{
    const int sms = attribute(cudaDevAttrMultiProcessorCount);
    std::vector<uint8_t> x = normal_operands(KIND == F16 ? F16 : S8, TILE_A + TILE_B);
    const std::vector<uint8_t> v = normal_operands(E4M3, TILE_B);
    x.insert(x.end(), v.begin(), v.end());
    buffer<uint8_t> operands(x);
    buffer<uint32_t> weights(random_weights(KIND == F16 ? F16 : E4M3, 4 * 256));
    buffer<int> out((size_t)sms * 256);
    const double seconds = seconds_per_turn([&](int turns) {
        queue(multiply_warpgroups<KIND>, sms, 128 * groups, OPERANDS, (const uint8_t *)operands.p,
              (const uint32_t *)weights.p, out.p, turns);
    });
    const double k = KIND == F16 ? 16 : KIND == S8_AND_E4M3 ? 64 : 32;
    report(what, 1e-12 * 2 * 64 * 128 * k * (double)CHAIN * groups * sms / seconds, "TOPS",
           expected);
}

template <bool HALF> void measure_warps(const char *what, const char *expected)
{
    const int sms = attribute(cudaDevAttrMultiProcessorCount), blocks = 2 * sms;
    const std::vector<uint8_t> bytes = normal_operands(HALF ? F16 : S8, 16 * 256 * 4);
    std::vector<uint32_t> words(16 * 256);
    memcpy(words.data(), bytes.data(), bytes.size());
    buffer<uint32_t> operands(words), weights(random_weights(HALF ? F16 : S8, 4 * 256));
    buffer<int> out((size_t)blocks * 256);
    const double seconds = seconds_per_turn([&](int turns) {
        queue(multiply_warps<HALF>, blocks, 256, 0, (const uint32_t *)operands.p,
              (const uint32_t *)weights.p, out.p, turns);
    });
    report(what, 1e-12 * 2 * 16 * 8 * (HALF ? 16 : 32) * 8 * 8 * blocks / seconds, "TOPS",
           expected);
}

/* ---- Memory ---- */

__global__ void fill(uint4 *x, size_t count)
{
    for (size_t n = blockIdx.x * (size_t)blockDim.x + threadIdx.x; n < count;
         n += (size_t)gridDim.x * blockDim.x) {
        const unsigned h = (unsigned)n * 2654435761u;
        x[n] = make_uint4(h, h ^ h >> 15, h * 40503u, ~h);
    }
}

__global__ void copy(uint4 *to, const uint4 *from, size_t count)
{
    for (size_t n = blockIdx.x * (size_t)blockDim.x + threadIdx.x; n < count;
         n += (size_t)gridDim.x * blockDim.x)
        to[n] = from[n];
}

void measure_copy()
{
    const size_t count = ON_MODEL ? 1 << 12 : (size_t)1 << 27; /* 2 GiB: forty times the L2 */
    const int blocks = 16 * attribute(cudaDevAttrMultiProcessorCount);
    buffer<uint4> from(count), to(count);
    run(fill, blocks, 256, 0, from.p, count);
    const double seconds =
        median_seconds([&] { queue(copy, blocks, 512, 0, to.p, (const uint4 *)from.p, count); });
    report("copy", 1e-12 * 2 * sizeof(uint4) * (double)count / seconds, "TB/s",
           "4.3 assumed (4.8 by the data sheet)");
}

/* ---- Single instructions ---- */

enum op { FFMA, DP4A, INT_TO_FLOAT, MAX3, PACK_E4M3, EXP2, EXP2_FFMA };

/* Eight values that do not wait for each other; 64 operations a turn, of each of four warps a
 * scheduler. */
template <int OP>
__global__ void __launch_bounds__(512) repeat_op(float *io, long long *clocks, int turns)
{
#ifdef HOPPER
    float x[8];
    for (int i = 0; i < 8; i++)
        x[i] = io[512 * i + threadIdx.x];
    __syncthreads();
    const long long begin = clock64();
    for (int turn = 0; turn < turns; turn++)
#pragma unroll
        for (int n = 0; n < 64; n++) {
            const int i = n % 8;
            if constexpr (OP == FFMA)
                x[i] = fmaf(x[i], 0.99f, -0.5f);
            if constexpr (OP == DP4A)
                x[i] = __int_as_float(
                    __dp4a(__float_as_int(x[i]), __float_as_int(x[(i + 1) % 8]), turn));
            if constexpr (OP == INT_TO_FLOAT)
                x[i] = (float)__float_as_int(x[i]);
            if constexpr (OP == MAX3)
                x[i] = __int_as_float(
                    __vimax3_s32(__float_as_int(x[i]), __float_as_int(x[(i + 1) % 8]), turn));
            if constexpr (OP == PACK_E4M3)
                x[i] = __uint_as_float(
                    pack_e4m3(x[i], x[(i + 1) % 8], x[(i + 3) % 8], x[(i + 2) % 8]));
            if constexpr (OP == EXP2)
                x[i] = exp2_fast(x[i]);
            if constexpr (OP == EXP2_FFMA)
                x[i] = exp2_fast(fmaf(x[i], 0.99f, -0.5f));
        }
    __syncthreads();
    if (threadIdx.x == 0)
        clocks[blockIdx.x] = clock64() - begin;
    for (int i = 0; i < 8; i++)
        io[512 * i + threadIdx.x] = x[i];
#endif
}

template <int OP> void measure_op(const char *what, const char *expected)
{
    const int blocks = attribute(cudaDevAttrMultiProcessorCount), turns = ON_MODEL ? 1 : 4096;
    draws draw = {13};
    std::vector<float> x(8 * 512);
    for (float &e : x)
        e = -draw.uniform();
    buffer<float> io(x);
    buffer<long long> clocks(std::vector<long long>((size_t)blocks, 0));
    for (int n = 0; n < 2; n++) /* the second time counts */
        run(repeat_op<OP>, blocks, 512, 0, io.p, clocks.p, turns);
    std::vector<long long> got = clocks.get();
    std::nth_element(got.begin(), got.begin() + blocks / 2, got.end());
    report(what, (double)got[(size_t)blocks / 2] / (4.0 * 64 * turns), "clocks a warp", expected);
}

/* What such an instruction comes to on the whole device, where each is `ops` operations a thread.
 */
template <int OP> void measure_throughput(const char *what, int ops, const char *expected)
{
    const int blocks = attribute(cudaDevAttrMultiProcessorCount);
    buffer<float> io(std::vector<float>(8 * 512, 0.5f));
    buffer<long long> clocks((size_t)blocks);
    const double seconds = seconds_per_turn(
        [&](int turns) { queue(repeat_op<OP>, blocks, 512, 0, io.p, clocks.p, turns); });
    report(what, 1e-12 * 64 * 512 * ops * blocks / seconds, "TOPS", expected);
}

/* ---- How exactly e4m3 products add up ---- */

enum { STAGE_KEYS = 128, CHANNELS = 128, V_TILE = CHANNELS * 64 };

/* 64 rows of P times V, 128 keys a stage: added up inside the tensor core all the way, and each
 * stage by itself with the sum in float, as kernel 5 has it. v: tiles of 64 keys. */
__global__ void __launch_bounds__(128) add_up(const uint8_t *p, const uint8_t *v, float *inside,
                                              float *outside, int stages, int row_bytes)
{
#ifdef HOPPER
    uint8_t *const tile = shared_memory();
    const int t = (int)threadIdx.x, row = t / 32 * 16 + t % 32 / 4, quad = t % 4;
    float all[64], stage[64], sum[64];
#pragma unroll
    for (int n = 0; n < 64; n++)
        all[n] = stage[n] = sum[n] = 0.0f;
    for (int s = 0; s < stages; s++) {
        for (int n = 16 * t; n < 2 * V_TILE; n += 16 * 128)
            *(uint4 *)(tile + n) = *(const uint4 *)(v + (size_t)s * 2 * V_TILE + n);
        fence_async();
        __syncthreads();
        uint32_t a[4][4];
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                a[k][n] = *(const uint32_t *)(p + (size_t)(row + 8 * (n % 2)) * row_bytes +
                                              s * STAGE_KEYS + 32 * k + 16 * (n / 2) + 4 * quad);
        const uint64_t b = descriptor_k_major(tile, 64), c = descriptor_k_major(tile + V_TILE, 64);
        pin(all);
        pin(stage);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            wgmma_e4m3(all, a[k], (k < 2 ? b : c) + k % 2 * DESCRIPTOR_32_BYTES, s > 0 || k > 0);
            wgmma_e4m3(stage, a[k], (k < 2 ? b : c) + k % 2 * DESCRIPTOR_32_BYTES, k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(all);
        pin(stage);
#pragma unroll
        for (int n = 0; n < 64; n++)
            sum[n] += stage[n];
        __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < 64; n++) {
        const int at = (row + 8 * (n / 2 % 2)) * CHANNELS + 8 * (n / 4) + 2 * quad + n % 2;
        inside[at] = all[n];
        outside[at] = sum[n];
    }
#endif
}

void measure_sums()
{
    const int most = ON_MODEL ? 4 : 512, keys = most * STAGE_KEYS;
    draws draw = {14};
    std::vector<uint8_t> p((size_t)64 * keys), v((size_t)keys * CHANNELS), image(v.size());
    for (uint8_t &x : p)
        x = sparge_f32_to_e4m3(256 * exp2f(-8.0f * draw.uniform()));
    for (uint8_t &x : v)
        x = sparge_f32_to_e4m3(draw.normal() * 448 / 4);
    for (int k = 0; k < keys; k++)
        for (int c = 0; c < CHANNELS; c++)
            image[(size_t)(k / 64) * V_TILE + (size_t)swizzle(64, c, k % 64)] =
                v[(size_t)k * CHANNELS + c];
    float value[256];
    for (int code = 0; code < 256; code++)
        value[code] = sparge_e4m3_to_f32((uint8_t)code);

    buffer<uint8_t> on_device_p(p), on_device_v(image);
    buffer<float> inside(64 * CHANNELS), outside(64 * CHANNELS);
    std::vector<double> want(64 * CHANNELS, 0.0); /* of every eighth row */
    int done = 0;
    for (int stages = 1; stages <= most; stages *= 2) {
        for (int r = 0; r < 64; r += 8)
            for (int k = done; k < stages * STAGE_KEYS; k++)
                for (int c = 0; c < CHANNELS; c++)
                    want[(size_t)r * CHANNELS + c] += (double)value[p[(size_t)r * keys + k]] *
                                                      (double)value[v[(size_t)k * CHANNELS + c]];
        done = stages * STAGE_KEYS;
        run(add_up, 1, 128, 2 * V_TILE, (const uint8_t *)on_device_p.p,
            (const uint8_t *)on_device_v.p, inside.p, outside.p, stages, keys);
        const auto error = [&](const buffer<float> &x) {
            const std::vector<float> got = x.get();
            double off = 0, size = 0;
            for (size_t n = 0; n < got.size(); n++)
                if (n / CHANNELS % 8 == 0) {
                    off += fabs((double)got[n] - want[n]);
                    size += fabs(want[n]);
                }
            return off / size;
        };
        char what[64];
        snprintf(what, sizeof what, "e4m3_inside_%d", stages);
        report(what, error(inside), "relative L1", "unknown; 14 bits would be 1e-4 and grow");
        snprintf(what, sizeof what, "e4m3_by_stage_%d", stages);
        report(what, error(outside), "relative L1", "as of 1 stage");
    }
}

/* ---- All of it ---- */

} // namespace

int main()
{
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("there is no CUDA device here\n");
        return 77;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("what,value,unit,expected\n");
    const bool hopper = has_hopper();
    if (hopper) {
        measure_warpgroups<S8_AND_E4M3>("wgmma_s8_e4m3", 2,
                                        "1450 under 700 W; 1979 by the data sheet");
        measure_warpgroups<S8>("wgmma_s8", 2, "1450 under 700 W; 1979 by the data sheet");
        measure_warpgroups<S8>("wgmma_s8_1_warpgroup", 1, "as 2 warpgroups");
        measure_warpgroups<E4M3>("wgmma_e4m3", 2, "1450 under 700 W; 1979 by the data sheet");
        measure_warpgroups<F16>("wgmma_f16", 2, "788 measured elsewhere; 989 by the data sheet");
    } else {
        printf("wgmma,,,left out: not on sm_90a\n");
    }
    measure_warps<false>("mma_s8", "half to two thirds of wgmma");
    measure_warps<true>("mma_f16", "half to two thirds of wgmma");
    measure_copy();
    if (hopper) {
        measure_throughput<FFMA>("f32", 2, "67 by the data sheet");
        measure_throughput<DP4A>("dp4a", 8, "134: 64 lanes");
        measure_op<FFMA>("ffma", "1");
        measure_op<INT_TO_FLOAT>("int_to_float", "2 (8 would bring the accumulator seed back)");
        measure_op<MAX3>("max3_s32", "2");
        measure_op<PACK_E4M3>("pack_e4m3", "4: two conversions of 2");
        measure_op<EXP2>("exp2", "8");
        measure_op<EXP2_FFMA>("exp2_and_ffma", "8: one under the other");
        measure_sums();
    }
    return 0;
}
