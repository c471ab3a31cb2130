/* SPDX-License-Identifier: Apache-2.0 */
/* products.cu: the tensor cores' instructions, each against its plain definition. Products are
 * exact: small whole numbers in small sums. First one-hot operands for every k, which show where an
 * element really lies; then random ones. */
#include "gpu/layout.h"
#include "tests/gpu/instructions.h"

namespace {

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

/* s[case][64][128] = a b^T of tiles a [64 rows] and b [128 rows]; two warpgroups take every
 * other case, at their own pace. */
template <int PITCH>
__global__ void __launch_bounds__(256)
    multiply_s8(const uint8_t *a, const uint8_t *b, int *s, int cases)
{
#ifdef HOPPER
    const int t = (int)threadIdx.x % 128, group = (int)threadIdx.x / 128;
    uint8_t *const tile = shared_memory() + group * 192 * PITCH;
    for (int c = group; c < cases; c += 2) {
        for (int n = 16 * t; n < 64 * PITCH; n += 16 * 128)
            *(uint4 *)(tile + n) = *(const uint4 *)(a + c * 64 * PITCH + n);
        for (int n = 16 * t; n < 128 * PITCH; n += 16 * 128)
            *(uint4 *)(tile + 64 * PITCH + n) = *(const uint4 *)(b + c * 128 * PITCH + n);
        fence_async();
        named_sync(1 + group, 128);
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
        named_sync(1 + group, 128);
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
                x[(size_t)c * 64 * PITCH + swizzle(PITCH, r, k)] = (uint8_t)a(c, r, k);
            for (int r = 0; r < 128; r++)
                y[(size_t)c * 128 * PITCH + swizzle(PITCH, r, k)] = (uint8_t)b(c, r, k);
        }
    buffer<uint8_t> on_device_x(x), on_device_y(y);
    buffer<int> s(std::vector<int>((size_t)cases * 64 * 128, -1));
    run(multiply_s8<PITCH>, 1, 256, 2 * 192 * PITCH, on_device_x.p, on_device_y.p, s.p, cases);
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

/* ---- wgmma, P.V: P packed from the places that accumulators have, V in its tile ---- */

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
                memcpy(&tile[(size_t)(c / 64 * 8192 + swizzle(128, k, c % 64 * 2))], &half, 2);
            else
                tile[(size_t)swizzle(64, c, permute_key(k))] = sparge_f32_to_e4m3(v(k, c));
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

/* Every code of e4m3, the NaNs too, at the one key that has weight. */
verdict probe_codes()
{
    for (int half = 0; half < 2; half++) {
        const auto code = [&](int c) { return sparge_e4m3_to_f32((uint8_t)(128 * half + c)); };
        const std::vector<float> got = products_pv<128, false>(
            1, [](int, int, int k) { return k == 0 ? 1.0f : 0.0f; },
            [&](int k, int c) { return k == 0 ? code(c) : 0.0f; });
        for (int n = 0; n < 64 * 128; n++)
            if (isnan(code(n % 128)) ? !isnan(got[n]) : got[n] != code(n % 128))
                return say("code 0x%x, row %d: %g, not %g", 128 * half + n % 128, n / 128, got[n],
                           code(n % 128));
    }
    return "ok";
}

/* ---- Fragments of a warp ---- */

/* d[16][8] += a[16][32] b[32][8] of bytes, or a[16][16] b[16][8] of halves; added twice. Of bytes d
 * is large: more than a float can hold. */
SPARGE_HD int start_of(bool half, int place) { return place + (half ? 0 : 1 << 28); }

template <bool HALF> __global__ void multiply_fragments(const uint8_t *a, const uint8_t *b, int *d)
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
    int whole[4];
    float real[4];
    for (int n = 0; n < 4; n++) {
        whole[n] = start_of(HALF, (g + 8 * (n / 2)) * 8 + 2 * q + n % 2);
        real[n] = (float)whole[n];
    }
    for (int n = 0; n < 2; n++)
        if (HALF)
            mma_f16(real, x, y[0], y[1]);
        else
            mma_s8(whole, x, y[0], y[1]);
    for (int n = 0; n < 4; n++)
        d[(g + 8 * (n / 2)) * 8 + 2 * q + n % 2] = HALF ? (int)real[n] : whole[n];
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
        buffer<int> d(std::vector<int>(128, -1));
        run(multiply_fragments<HALF>, 1, 32, 0, on_device_a.p, on_device_b.p, d.p);
        const std::vector<int> got = d.get();
        for (int n = 0; n < 128; n++) {
            int want = start_of(HALF, n);
            for (int k = 0; k < K; k++)
                want += 2 * x[n / 8 * K + k] * y[k * 8 + n % 8];
            if (got[n] != want)
                return say("row %d, column %d: %d, not %d", n / 8, n % 8, got[n], want);
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

} // namespace

std::vector<question> product_questions()
{
    return {
        {"wgmma_s8_pitch_128", true, probe_s8<128>},
        {"wgmma_s8_pitch_64", true, probe_s8<64>},
        {"wgmma_e4m3_n64", true, probe_pv<64, false>},
        {"wgmma_e4m3_n96", true, probe_pv<96, false>},
        {"wgmma_e4m3_n128", true, probe_pv<128, false>},
        {"wgmma_e4m3_codes", true, probe_codes},
        {"wgmma_f16_n64", true, probe_pv<64, true>},
        {"wgmma_f16_n96", true, probe_pv<96, true>},
        {"wgmma_f16_n128", true, probe_pv<128, true>},
        {"mma_s8", false, probe_mma<false>},
        {"mma_f16", false, probe_mma<true>},
        {"ldmatrix", false, probe_ldmatrix<false>},
        {"ldmatrix_transposed", false, probe_ldmatrix<true>},
    };
}
