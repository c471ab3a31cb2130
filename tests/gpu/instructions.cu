/* probes.cu: does this device do what ptx.h and hopper.h say? Each instruction by itself, against
 * its plain definition, before any kernel is blamed. One line each: "name: ok", or what differs.
 *
 *   probes                 all of them; exit 1 if one failed
 *   probes wgmma_s8 ...    those whose names begin so
 *   probes --list          their names
 *
 * Products are exact: small whole numbers in small sums. First one-hot operands for every k, which
 * show where an element really lies; then random ones. */
#include "common/half.h"
#include "gpu/hopper.h"
#include "gpu/image.h"
#include "tests/gpu/program.h"

#include <math.h>
#include <stdarg.h>
#include <string>

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER /* elsewhere the kernels that need it are empty */
#endif

namespace {

/* What is wrong; begins with "ok" if nothing is. */
typedef std::string verdict;

__attribute__((format(printf, 1, 2))) verdict say(const char *format, ...)
{
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return text;
}

/* A map of 0 .. n-1 to where each was found (-1: nowhere), in words. */
verdict describe(const std::vector<int> &map)
{
    const int n = (int)map.size();
    const auto all = [&](auto rule) {
        for (int x = 0; x < n; x++)
            if (map[x] != rule(x))
                return false;
        return true;
    };
    if (all([](int x) { return x; }))
        return "in place";
    if (all([&](int) { return map[0]; }))
        return map[0] < 0 ? "nowhere" : say("all at %d", map[0]);
    for (int c = 1; c < 256; c++) {
        if (all([&](int x) { return x ^ c; }))
            return say("x at x ^ %d: a swizzle", c);
        if (all([&](int x) { return x % c; }))
            return say("x at x %% %d: a stride", c);
        if (all([&](int x) { return (x + c) % n; }))
            return say("x at x + %d: an offset", c);
    }
    int first = 0;
    while (map[first] == first)
        first++;
    verdict text = say("from %d on at", first);
    for (int x = first; x < n && x < first + 16; x++)
        text += say(" %d", map[x]);
    return text + (n > first + 16 ? " ..." : "");
}

/* ---- wgmma, int8 ---- */

/* s[case][64][128] = a b^T of images of a [64 rows] and b [128 rows]. */
template <int PITCH>
__global__ void __launch_bounds__(128)
    multiply_s8(const uint8_t *a, const uint8_t *b, int *s, int cases)
{
#ifdef HOPPER
    uint8_t *const tile = shared_memory();
    const int t = (int)threadIdx.x;
    for (int c = 0; c < cases; c++) {
        for (int n = 16 * t; n < 64 * PITCH; n += 16 * 128)
            *(uint4 *)(tile + n) = *(const uint4 *)(a + c * 64 * PITCH + n);
        for (int n = 16 * t; n < 128 * PITCH; n += 16 * 128)
            *(uint4 *)(tile + 64 * PITCH + n) = *(const uint4 *)(b + c * 128 * PITCH + n);
        fence_async();
        __syncthreads();
        int d[64];
#pragma unroll
        for (int n = 0; n < 64; n++)
            d[n] = 0x5ca1ab1e; /* the first product does not add to it */
        const uint64_t x = descriptor_k_major(tile, PITCH),
                       y = descriptor_k_major(tile + 64 * PITCH, PITCH);
        pin(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < PITCH / 32; k++)
            wgmma_s8(d, x + k * DESCRIPTOR_32_BYTES, y + k * DESCRIPTOR_32_BYTES, k > 0);
        wgmma_commit();
        wgmma_wait<0>();
        pin(d);
#pragma unroll
        for (int n = 0; n < 64; n++) {
            const int row = t / 32 * 16 + t % 32 / 4 + 8 * (n / 2 % 2),
                      column = 8 * (n / 4) + 2 * (t % 4) + n % 2;
            s[(c * 64 + row) * 128 + column] = d[n];
        }
        __syncthreads();
    }
#endif
}

/* The products of cases whose elements are a(case, row, k) and b(case, column, k). */
template <int PITCH, class A, class B> std::vector<int> products_s8(int cases, A a, B b)
{
    std::vector<uint8_t> x((size_t)cases * 64 * PITCH), y((size_t)cases * 128 * PITCH);
    for (int c = 0; c < cases; c++)
        for (int k = 0; k < PITCH; k++) {
            for (int r = 0; r < 64; r++)
                x[(size_t)c * 64 * PITCH + image_at(PITCH, r, k)] = (uint8_t)a(c, r, k);
            for (int r = 0; r < 128; r++)
                y[(size_t)c * 128 * PITCH + image_at(PITCH, r, k)] = (uint8_t)b(c, r, k);
        }
    buffer<uint8_t> on_device_x(x), on_device_y(y);
    buffer<int> s(std::vector<int>((size_t)cases * 64 * 128, -1));
    run(multiply_s8<PITCH>, 1, 128, 192 * PITCH, on_device_x.p, on_device_y.p, s.p, cases);
    return s.get();
}

/* Where rows, columns and k lie instead, by operands that carry their own numbers. */
template <int PITCH> verdict explain_s8()
{
    const auto one = [](int, int, int) { return 1; };
    const auto row = [](int, int r, int) { return r; };
    const auto found = [](int x) { return x % PITCH == 0 ? x / PITCH : -1; };
    const std::vector<int> rows = products_s8<PITCH>(1, row, one),
                           columns = products_s8<PITCH>(1, one, row);
    std::vector<int> map(64), other(128), at(PITCH);
    for (int r = 0; r < 64; r++)
        map[r] = found(rows[r * 128]);
    for (int c = 0; c < 128; c++)
        other[c] = found(columns[c]);
    const std::vector<int> ks = products_s8<PITCH>(
        PITCH, [](int c, int, int k) { return k == c; }, [](int, int, int k) { return k; });
    verdict text = "rows " + describe(map) + "; columns " + describe(other);
    for (int place = 0; place < 64 * 128; place += 130) { /* row r, column 2 r */
        for (int k = 0; k < PITCH; k++)
            at[k] = ks[k * 64 * 128 + place];
        if (describe(at) != "in place")
            return text + say("; k of row %d, column %d: ", place / 128, place % 128) +
                   describe(at);
    }
    return text + "; k in place";
}

template <int PITCH>
verdict compare_s8(const char *what, const std::vector<int> &got, const std::vector<int> &want)
{
    for (size_t n = 0; n < want.size(); n++)
        if (got[n] != want[n])
            return say("%s, case %d, row %d, column %d: %d, not %d; ", what, (int)(n / 8192),
                       (int)(n / 128 % 64), (int)(n % 128), got[n], want[n]) +
                   explain_s8<PITCH>();
    return "ok";
}

template <int PITCH> verdict probe_s8()
{
    const auto sign = [](int c) { return c < 64 ? c + 1 : 63 - c; };
    std::vector<int> want((size_t)PITCH * 64 * 128);
    for (size_t n = 0; n < want.size(); n++)
        want[n] = ((int)(n / 128 % 64) + 1) * sign((int)(n % 128));
    const std::vector<int> hot = products_s8<PITCH>(
        PITCH, [](int c, int r, int k) { return k == c ? r + 1 : 0; },
        [&](int c, int r, int k) { return k == c ? sign(r) : 0; });
    const verdict first = compare_s8<PITCH>("one-hot", hot, want);
    if (first != "ok")
        return first;

    enum { CASES = 8 };
    draws draw = {1};
    std::vector<int8_t> a(CASES * 64 * PITCH), b(CASES * 128 * PITCH);
    for (auto *x : {&a, &b})
        for (int8_t &e : *x)
            e = (int8_t)draw.bits();
    for (int n = 0; n < 64 * PITCH; n++)
        a[n] = -128; /* the largest sums there are */
    for (int n = 0; n < 128 * PITCH; n++)
        b[n] = -128;
    want.assign(CASES * 64 * 128, 0);
    for (int n = 0; n < CASES * 64 * 128; n++)
        for (int k = 0; k < PITCH; k++)
            want[n] += a[n / 128 * PITCH + k] * b[(n / 8192 * 128 + n % 128) * PITCH + k];
    return compare_s8<PITCH>("random",
                             products_s8<PITCH>(
                                 CASES,
                                 [&](int c, int r, int k) { return a[(c * 64 + r) * PITCH + k]; },
                                 [&](int c, int r, int k) { return b[(c * 128 + r) * PITCH + k]; }),
                             want);
}

/* ---- wgmma, P.V: P packed from the places that accumulators have, V in its image ---- */

/* o[case][64][N] = p[case][64][64] v[64][N]. */
template <int N, bool HALF>
__global__ void __launch_bounds__(128)
    multiply_pv(const float *p, const uint8_t *v, float *o, int cases)
{
#ifdef HOPPER
    uint8_t *const tile = shared_memory();
    const int t = (int)threadIdx.x, quad = t % 4;
    for (int n = 16 * t; n < v_tile_bytes(N, HALF); n += 16 * 128)
        *(uint4 *)(tile + n) = *(const uint4 *)(v + n);
    fence_async();
    __syncthreads();
    for (int c = 0; c < cases; c++) {
        uint32_t x[HALF ? 32 : 16];
#pragma unroll
        for (int i = 0; i < 8; i += 2) /* as weigh_block of 5_hopper.cu */
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float *const row =
                    p + (c * 64 + t / 32 * 16 + t % 32 / 4 + 8 * h) * 64 + 8 * i + 2 * quad;
                if (HALF) {
                    x[2 * i + h] = pack_f16(row[0], row[1]);
                    x[2 * i + 2 + h] = pack_f16(row[8], row[9]);
                } else {
                    x[i / 4 * 4 + i / 2 % 2 * 2 + h] = pack_e4m3(row[0], row[1], row[8], row[9]);
                }
            }
        float d[N / 2];
#pragma unroll
        for (int n = 0; n < N / 2; n++)
            d[n] = 1e9f;
        const uint64_t b = HALF ? descriptor_n_major(tile, 8192) : descriptor_k_major(tile, 64);
        pin(x);
        pin(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < (HALF ? 4 : 2); k++) {
            const uint32_t a[4] = {x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]};
            if constexpr (HALF)
                wgmma_f16(d, a, b + k * DESCRIPTOR_16_ROWS, k > 0);
            else
                wgmma_e4m3(d, a, b + k * DESCRIPTOR_32_BYTES, k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(d);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            const int row = t / 32 * 16 + t % 32 / 4 + 8 * (n / 2 % 2),
                      column = 8 * (n / 4) + 2 * quad + n % 2;
            o[(c * 64 + row) * N + column] = d[n];
        }
    }
#endif
}

/* p(case, row, key) and v(key, channel) in floats that both formats hold. */
template <int N, bool HALF, class P, class V> std::vector<float> products_pv(int cases, P p, V v)
{
    std::vector<float> x((size_t)cases * 64 * 64);
    for (size_t n = 0; n < x.size(); n++)
        x[n] = p((int)(n / 4096), (int)(n / 64 % 64), (int)(n % 64));
    std::vector<uint8_t> tile((size_t)v_tile_bytes(N, HALF));
    for (int k = 0; k < 64; k++)
        for (int c = 0; c < N; c++) {
            const uint16_t half = sparge_f32_to_f16(v(k, c));
            if (HALF)
                memcpy(&tile[(size_t)(c / 64 * 8192 + image_at(128, k, c % 64 * 2))], &half, 2);
            else
                tile[(size_t)image_at(64, c, key_slot(k))] = sparge_f32_to_e4m3(v(k, c));
        }
    buffer<float> on_device_x(x), o(std::vector<float>((size_t)cases * 64 * N, NAN));
    buffer<uint8_t> on_device_v(tile);
    run(multiply_pv<N, HALF>, 1, 128, tile.size(), on_device_x.p, on_device_v.p, o.p, cases);
    return o.get();
}

/* 128 floats that both formats hold, all different. */
float label(int n) { return sparge_e4m3_to_f32((uint8_t)(0x20 + n % 64 + n / 64 * 0x80)); }
int of_label(float x)
{
    for (int n = 0; n < 128; n++)
        if (label(n) == x)
            return n;
    return -1;
}

/* Case c gives row r all of its weight at key (r + c) % 64. */
float one_hot(int c, int r, int k) { return k == (r + c) % 64 ? 1.0f : 0.0f; }

template <int N, bool HALF> verdict explain_pv()
{
    const std::vector<float> key =
        products_pv<N, HALF>(64, one_hot, [](int k, int) { return label(k); });
    const std::vector<float> channel =
        products_pv<N, HALF>(1, one_hot, [](int, int c) { return label(c); });
    std::vector<int> columns(N), keys(64);
    for (int c = 0; c < N; c++)
        columns[c] = of_label(channel[7 * N + c]);
    for (int place = 0; place < 64; place++) {
        for (int k = 0; k < 64; k++)
            keys[k] = of_label(key[(((k - place + 64) % 64) * 64 + place) * N + place % N]);
        if (describe(keys) != "in place")
            return say("keys in row %d, channel %d: ", place, place % N) + describe(keys) +
                   "; channels " + describe(columns);
    }
    return "keys in place; channels " + describe(columns);
}

template <int N, bool HALF> verdict probe_pv()
{
    draws draw = {2};
    std::vector<float> v(64 * N), p(8 * 64 * 64);
    const auto value = [&](int k, int c) { return v[k * N + c]; };
    for (float &x : v)
        x = label(draw.below(128));
    const std::vector<float> hot = products_pv<N, HALF>(64, one_hot, value);
    for (size_t n = 0; n < hot.size(); n++) {
        const int c = (int)n / N / 64, r = (int)n / N % 64, channel = (int)n % N;
        if (!(hot[n] == value((r + c) % 64, channel)))
            return say("o[%d][%d] of key %d alone: %g, not %g; ", r, channel, (r + c) % 64, hot[n],
                       value((r + c) % 64, channel)) +
                   explain_pv<N, HALF>();
    }

    for (float &x : v) /* sums below 2^10, exact in any accumulator */
        x = (float)(draw.below(7) - 3);
    for (float &x : p)
        x = (float)draw.below(4);
    const std::vector<float> got = products_pv<N, HALF>(
        8, [&](int c, int r, int k) { return p[(c * 64 + r) * 64 + k]; }, value);
    for (size_t n = 0; n < got.size(); n++) {
        float want = 0;
        for (int k = 0; k < 64; k++)
            want += p[n / N * 64 + k] * value(k, (int)n % N);
        if (!(got[n] == want))
            return say("random, row %d, channel %d: %g, not %g; ", (int)n / N, (int)n % N, got[n],
                       want) +
                   explain_pv<N, HALF>();
    }
    return "ok";
}

/* ---- Fragments of a warp ---- */

/* d[16][8] = a[16][32] b[32][8] of bytes, or a[16][16] b[16][8] of halves; added twice. */
template <bool HALF>
__global__ void multiply_fragments(const uint8_t *a, const uint8_t *b, float *d)
{
    const int lane = (int)threadIdx.x, g = lane / 4, q = lane % 4;
    const uint16_t *const half_a = (const uint16_t *)a, *const half_b = (const uint16_t *)b;
    uint32_t x[4] = {0}, y[2] = {0};
    for (int n = 0; n < 4; n++)
        for (int e = 0; e < (HALF ? 2 : 4); e++)
            x[n] |= HALF ? (uint32_t)half_a[(g + 8 * (n % 2)) * 16 + 8 * (n / 2) + 2 * q + e]
                               << 16 * e
                         : (uint32_t)a[(g + 8 * (n % 2)) * 32 + 16 * (n / 2) + 4 * q + e] << 8 * e;
    for (int n = 0; n < 2; n++)
        for (int e = 0; e < (HALF ? 2 : 4); e++)
            y[n] |= HALF ? (uint32_t)half_b[(8 * n + 2 * q + e) * 8 + g] << 16 * e
                         : (uint32_t)b[(16 * n + 4 * q + e) * 8 + g] << 8 * e;
    int whole[4] = {0};
    float real[4] = {0};
    for (int n = 0; n < 2; n++)
        if (HALF)
            mma_f16(real, x, y[0], y[1]);
        else
            mma_s8(whole, x, y[0], y[1]);
    for (int n = 0; n < 4; n++)
        d[(g + 8 * (n / 2)) * 8 + 2 * q + n % 2] = HALF ? real[n] : (float)whole[n];
}

template <bool HALF> verdict probe_mma()
{
    enum { K = HALF ? 16 : 32, BYTES = HALF ? 2 : 1 };
    draws draw = {3};
    for (int turn = 0; turn < 100; turn++) {
        std::vector<uint8_t> a(16 * K * BYTES), b(K * 8 * BYTES);
        std::vector<int> x(16 * K), y(K * 8);
        const auto fill = [&](std::vector<uint8_t> &bytes, std::vector<int> &values) {
            for (size_t n = 0; n < values.size(); n++) {
                values[n] = (int8_t)draw.bits();
                const uint16_t half = sparge_f32_to_f16((float)values[n]);
                if (HALF)
                    memcpy(&bytes[2 * n], &half, 2);
                else
                    bytes[n] = (uint8_t)values[n];
            }
        };
        fill(a, x);
        fill(b, y);
        buffer<uint8_t> on_device_a(a), on_device_b(b);
        buffer<float> d(std::vector<float>(128, NAN));
        run(multiply_fragments<HALF>, 1, 32, 0, on_device_a.p, on_device_b.p, d.p);
        const std::vector<float> got = d.get();
        for (int n = 0; n < 128; n++) {
            int want = 0;
            for (int k = 0; k < K; k++)
                want += 2 * x[n / 8 * K + k] * y[k * 8 + n % 8];
            if (!(got[n] == (float)want))
                return say("row %d, column %d: %g, not %d", n / 8, n % 8, got[n], want);
        }
    }
    return "ok";
}

/* Element n of shared memory is the half n; lane l names the 16 bytes at 8 (5 l % 32). */
template <bool TRANSPOSED> __global__ void load_matrices(uint32_t *r)
{
    uint16_t *const rows = (uint16_t *)shared_memory();
    const int lane = (int)threadIdx.x;
    for (int n = 0; n < 8; n++)
        rows[8 * lane + n] = (uint16_t)(8 * lane + n);
    __syncwarp();
    uint32_t x[4];
    if (TRANSPOSED)
        ldmatrix_transposed(x, rows + 8 * (5 * lane % 32));
    else
        ldmatrix(x, rows + 8 * (5 * lane % 32));
    for (int n = 0; n < 4; n++)
        r[4 * lane + n] = x[n];
}

template <bool TRANSPOSED> verdict probe_ldmatrix()
{
    buffer<uint32_t> r(std::vector<uint32_t>(128, ~0u));
    run(load_matrices<TRANSPOSED>, 1, 32, 512, r.p);
    const std::vector<uint32_t> got = r.get();
    for (int lane = 0; lane < 32; lane++)
        for (int n = 0; n < 4; n++)
            for (int e = 0; e < 2; e++) {
                const int row = TRANSPOSED ? 2 * (lane % 4) + e : lane / 4,
                          column = TRANSPOSED ? lane / 4 : 2 * (lane % 4) + e;
                const int want = 8 * (5 * (8 * n + row) % 32) + column,
                          x = (int)(got[4 * lane + n] >> 16 * e & 0xffff);
                if (x != want)
                    return say("lane %d, matrix %d, element %d: %d, not %d", lane, n, e, x, want);
            }
    return "ok";
}

/* ---- Copies ---- */

enum { PLACES = 4, BLOCK_WORDS = 512, BLOCKS = 1000 };

struct ring {
    alignas(128) uint32_t place[PLACES][BLOCK_WORDS];
    alignas(8) uint64_t full[PLACES], empty[PLACES];
};

SPARGE_HD uint32_t word_of(int block, int n)
{
    return (uint32_t)block * 2654435761u + (uint32_t)n * 40503u;
}

/* One thread fetches, four warps compare; wrong[0] counts words, wrong[1] is the first block with
 * one. */
__global__ void __launch_bounds__(160) pass_blocks(const uint32_t *blocks, int *wrong)
{
#ifdef HOPPER
    ring &r = *(ring *)shared_memory();
    const int t = (int)threadIdx.x;
    if (t == 0) {
        for (int n = 0; n < PLACES; n++) {
            barrier_init(&r.full[n], 1);
            barrier_init(&r.empty[n], 4);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (t == 0) {
        for (int n = 0; n < BLOCKS; n++) {
            barrier_wait(&r.empty[n % PLACES], (uint32_t)(n / PLACES + 1) % 2);
            barrier_arrive_expect(&r.full[n % PLACES], BLOCK_WORDS * 4);
            copy_bulk(r.place[n % PLACES], blocks + n * BLOCK_WORDS, BLOCK_WORDS * 4,
                      &r.full[n % PLACES]);
        }
    } else if (t >= 32) {
        for (int n = 0; n < BLOCKS; n++) {
            barrier_wait(&r.full[n % PLACES], (uint32_t)(n / PLACES) % 2);
            for (int i = t - 32; i < BLOCK_WORDS; i += 128)
                if (r.place[n % PLACES][i] != word_of(n, i)) {
                    atomicAdd(&wrong[0], 1);
                    atomicMax(&wrong[1], BLOCKS - n);
                }
            __syncwarp();
            if (t % 32 == 0)
                barrier_arrive(&r.empty[n % PLACES]);
        }
    }
#endif
}

/* The same by the threads' own copies, one block ahead. */
__global__ void __launch_bounds__(128) pass_blocks_async(const uint32_t *blocks, int *wrong)
{
    uint32_t *const place = (uint32_t *)shared_memory();
    const int t = (int)threadIdx.x;
    for (int n = 0; n <= BLOCKS; n++) {
        if (n < BLOCKS)
            copy_async(place + n % 2 * BLOCK_WORDS + 4 * t, blocks + n * BLOCK_WORDS + 4 * t);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        for (int i = t; n > 0 && i < BLOCK_WORDS; i += 128)
            if (place[(n - 1) % 2 * BLOCK_WORDS + i] != word_of(n - 1, i)) {
                atomicAdd(&wrong[0], 1);
                atomicMax(&wrong[1], BLOCKS - (n - 1));
            }
        __syncthreads();
    }
}

verdict probe_blocks(void (*kernel)(const uint32_t *, int *), int threads, size_t shared)
{
    std::vector<uint32_t> words((size_t)BLOCKS * BLOCK_WORDS);
    for (size_t n = 0; n < words.size(); n++)
        words[n] = word_of((int)(n / BLOCK_WORDS), (int)(n % BLOCK_WORDS));
    buffer<uint32_t> blocks(words);
    buffer<int> wrong(std::vector<int>(2, 0));
    run(kernel, 1, threads, shared, (const uint32_t *)blocks.p, wrong.p);
    const std::vector<int> got = wrong.get();
    return got[0] ? say("%d words of %d blocks are wrong, first in block %d", got[0], BLOCKS,
                        BLOCKS - got[1])
                  : "ok";
}

verdict probe_copy_bulk() { return probe_blocks(pass_blocks, 160, sizeof(ring)); }
verdict probe_copy_async() { return probe_blocks(pass_blocks_async, 128, 2 * BLOCK_WORDS * 4); }

/* ---- Numbers ---- */

__global__ void exp2_all(const float *x, float *y, int count)
{
    for (int n = (int)(blockIdx.x * blockDim.x + threadIdx.x); n < count;
         n += (int)(gridDim.x * blockDim.x))
        y[n] = exp2_fast(x[n]);
}

std::vector<float> exp2_of(const std::vector<float> &x)
{
    buffer<float> in(x), out(x.size());
    run(exp2_all, ON_MODEL ? 1 : 256, 256, 0, (const float *)in.p, out.p, (int)x.size());
    return out.get();
}

verdict probe_exp2()
{
    const int fine = ON_MODEL ? 1 << 16 : 1 << 24;
    std::vector<float> x, y;
    for (int n = 0; n <= fine; n++) /* -126 .. 0: P is at most 1 */
        x.push_back((float)(-126.0 * n / fine));
    y = exp2_of(x);
    double worst = 0;
    float where = 0;
    for (size_t n = 0; n < x.size(); n++) {
        const double want = exp2((double)x[n]);
        const double ulp = ldexp(1.0, ilogb(want) - 23), error = fabs((double)y[n] - want) / ulp;
        if (!(error <= worst)) {
            worst = error;
            where = x[n];
        }
    }
    if (!(worst <= 2.0))
        return say("2^%.9g is %.3g ulp from the truth", where, worst);

    x.clear();
    for (int n = 0; n < (ON_MODEL ? 1 << 12 : 1 << 20); n++)
        x.push_back((float)-n * 0x1p-24f); /* half an ulp of the result apart */
    y = exp2_of(x);
    int up = 0;
    for (size_t n = 1; n < x.size(); n++)
        up += !(y[n] <= y[n - 1]);
    if (y[0] != 1.0f)
        return say("2^0 is %.9g", y[0]);
    for (size_t n = 1; n < x.size(); n++)
        if (!(y[n] <= 1.0f))
            return say("2^%.9g is %.9g, above 1", x[n], y[n]);

    const float far[] = {-INFINITY, -1e30f, -1000.0f, -150.0f, -126.5f};
    y = exp2_of(std::vector<float>(far, far + 5));
    for (int n = 0; n < 5; n++)
        if (!(y[n] == 0.0f))
            return say("2^%g is %g, not 0", far[n], y[n]);
    return say("ok: at most %.2f ulp (at %.6g); %d of %d steps towards 0 go down", worst, where, up,
               (int)x.size() - 1);
}

__global__ void pack_all_f16(const float *x, uint32_t *y, int count)
{
    for (int n = (int)threadIdx.x; n < count; n += (int)blockDim.x)
        y[n] = pack_f16(x[n], x[(n + 1) % count]);
}

__global__ void pack_all_e4m3(const float *x, uint32_t *y, int count)
{
#ifdef HOPPER
    for (int n = (int)threadIdx.x; n < count; n += (int)blockDim.x)
        y[n] = pack_e4m3(x[n], x[(n + 1) % count], x[(n + 2) % count], x[(n + 3) % count]);
#endif
}

/* Codes narrow as in common/half.h: every code, the middle to its neighbour, what is next to those.
 */
template <int BITS, class Widen, class Narrow>
verdict probe_pack(void (*kernel)(const float *, uint32_t *, int), Widen widen, Narrow narrow,
                   int nan)
{
    std::vector<float> x;
    for (int code = 0; code < nan; code++) {
        const float low = widen(code), high = code + 1 < nan ? widen(code + 1) : INFINITY;
        const float middle =
            isinf(high) ? (isinf(low) ? low : low + (low - widen(code - 1)) / 2) : (low + high) / 2;
        for (float at : {low, middle})
            for (float next : {nextafterf(at, -INFINITY), at, nextafterf(at, INFINITY)})
                for (float sign : {1.0f, -1.0f})
                    x.push_back(sign * next);
    }
    for (float odd : {INFINITY, -INFINITY, NAN, 1e30f, -1e30f, 1e-30f, -1e-30f, 0.0f, -0.0f})
        x.push_back(odd);
    const int count = (int)x.size(), mask = (1 << BITS) - 1;
    buffer<float> in(x);
    buffer<uint32_t> out(std::vector<uint32_t>(x.size(), 0xdeadbeef));
    run(kernel, 1, 256, 0, (const float *)in.p, out.p, count);
    const std::vector<uint32_t> got = out.get();
    for (int n = 0; n < count; n++)
        for (int e = 0; e < 32 / BITS; e++) {
            const float of = x[(size_t)((n + e) % count)];
            const int code = (int)(got[(size_t)n] >> BITS * e) & mask, want = (int)narrow(of);
            const bool same = isnan(of) ? isnan(widen(code)) : code == want;
            if (!same)
                return say("%.9g in place %d: 0x%x, not 0x%x", of, e, code, want);
        }
    return "ok";
}

verdict probe_pack_f16()
{
    return probe_pack<16>(
        pack_all_f16, [](int c) { return sparge_f16_to_f32((uint16_t)c); }, sparge_f32_to_f16,
        0x7c01);
}
verdict probe_pack_e4m3()
{
    return probe_pack<8>(
        pack_all_e4m3, [](int c) { return sparge_e4m3_to_f32((uint8_t)c); }, sparge_f32_to_e4m3,
        0x7f);
}

/* ---- Roles of warpgroups ---- */

/* As kernel 5: one warpgroup gives registers away, two take them and keep 200 values each. */
__global__ void __launch_bounds__(384, 1) share_registers(const float *x, float *y)
{
#ifdef HOPPER
    const int t = (int)threadIdx.x;
    if (t < 128) {
        registers_shrink<24>();
        if (t == 0)
            y[0] = x[0];
    } else {
        registers_grow<240>();
        float sum[200];
#pragma unroll
        for (int n = 0; n < 200; n++)
            sum[n] = 0.0f;
        for (int turn = 0; turn < 4; turn++)
#pragma unroll
            for (int n = 0; n < 200; n++)
                sum[n] += x[(turn * 200 + n) % 256];
        float all = 0;
#pragma unroll
        for (int n = 0; n < 200; n++)
            all += (float)(n + 1) * sum[n];
        y[t] = all;
    }
#endif
}

verdict probe_setmaxnreg()
{
    std::vector<float> x(256);
    double want = 0;
    for (int n = 0; n < 256; n++)
        x[(size_t)n] = (float)(n % 7);
    for (int n = 0; n < 800; n++)
        want += (n % 200 + 1) * (n % 256 % 7);
    buffer<float> in(x), out(std::vector<float>(384, NAN));
    run(share_registers, 1, 384, 0, (const float *)in.p, out.p);
    const std::vector<float> got = out.get();
    for (int t = 128; t < 384; t++)
        if (!(got[(size_t)t] == (float)want))
            return say("thread %d: %g, not %g", t, got[(size_t)t], want);
    return "ok";
}

/* Warpgroups take turns by named barriers 2 and 3, and vote by 4 and 5. */
__global__ void __launch_bounds__(256) take_turns(int *log, int *votes)
{
#ifdef HOPPER
    const int group = (int)threadIdx.x / 128;
    if (group == 1)
        named_arrive(2, 256);
    for (int turn = 0; turn < 100; turn++) {
        named_sync(2 + group, 256);
        if (threadIdx.x % 128 == 0)
            log[2 * turn + group] = atomicAdd(&votes[200], 1);
        named_arrive(3 - group, 256);
        const bool any =
            named_any(4 + group, 128, (int)threadIdx.x % 128 == turn && turn % 3 != group);
        if (threadIdx.x % 128 == 77)
            votes[2 * turn + group] = any;
    }
    if (group == 0)
        named_sync(2, 256); /* takes the last arrival */
#endif
}

verdict probe_named()
{
    buffer<int> log(std::vector<int>(200, -1)), votes(std::vector<int>(201, 0));
    run(take_turns, 1, 256, 0, log.p, votes.p);
    const std::vector<int> turns = log.get(), yes = votes.get();
    for (int n = 0; n < 200; n++) {
        if (turns[(size_t)n] != n)
            return say("turn %d of warpgroup %d was number %d of all", n / 2, n % 2,
                       turns[(size_t)n]);
        if (yes[(size_t)n] != (n / 2 % 3 != n % 2))
            return say("vote %d of warpgroup %d: %d", n / 2, n % 2, yes[(size_t)n]);
    }
    return "ok";
}

/* ---- All of them ---- */

__global__ void is_hopper(int *yes)
{
#ifdef HOPPER
    *yes = 1;
#endif
}

const struct {
    const char *name;
    bool hopper; /* needs sm_90a */
    verdict (*ask)();
} probes[] = {
    {"wgmma_s8_pitch_128", true, probe_s8<128>},
    {"wgmma_s8_pitch_64", true, probe_s8<64>},
    {"wgmma_e4m3_n64", true, probe_pv<64, false>},
    {"wgmma_e4m3_n96", true, probe_pv<96, false>},
    {"wgmma_e4m3_n128", true, probe_pv<128, false>},
    {"wgmma_f16_n64", true, probe_pv<64, true>},
    {"wgmma_f16_n96", true, probe_pv<96, true>},
    {"wgmma_f16_n128", true, probe_pv<128, true>},
    {"copy_bulk", true, probe_copy_bulk},
    {"named_barriers", true, probe_named},
    {"setmaxnreg", true, probe_setmaxnreg},
    {"pack_e4m3", true, probe_pack_e4m3},
    {"mma_s8", false, probe_mma<false>},
    {"mma_f16", false, probe_mma<true>},
    {"ldmatrix", false, probe_ldmatrix<false>},
    {"ldmatrix_transposed", false, probe_ldmatrix<true>},
    {"copy_async", false, probe_copy_async},
    {"exp2_fast", false, probe_exp2},
    {"pack_f16", false, probe_pack_f16},
};

bool wanted(const char *name, int argc, char **argv)
{
    for (int n = 1; n < argc; n++)
        if (strncmp(name, argv[n], strlen(argv[n])) == 0)
            return true;
    return argc <= 1;
}

} // namespace

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (const auto &p : probes)
            printf("%s\n", p.name);
        return 0;
    }
    int count = 0, failed = 0, asked = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("there is no CUDA device here\n");
        return 77;
    }
    setvbuf(stdout, NULL, _IONBF, 0); /* a probe that hangs or ends all is the one without an end */
    buffer<int> yes(std::vector<int>(1, 0));
    run(is_hopper, 1, 1, 0, yes.p);
    const bool hopper = yes.get()[0] == 1;
    for (const auto &p : probes) {
        if (!wanted(p.name, argc, argv))
            continue;
        asked++;
        printf("%s: ", p.name);
        const verdict v = p.hopper && !hopper ? "skipped: not on sm_90a" : p.ask();
        printf("%s\n", v.c_str());
        failed += v.compare(0, 2, "ok") != 0 && v.compare(0, 7, "skipped") != 0;
    }
    if (asked == 0)
        printf("no probe has such a name\n");
    return failed > 0 || asked == 0;
}
