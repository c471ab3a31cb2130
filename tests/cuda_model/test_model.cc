/* test_model.cc: the model against plain definitions, written from the comments of gpu/ptx.h and
 * gpu/hopper.h, and against mistakes that it has to report. Every kernel runs in all late modes and
 * in several orders. */
#include "common/half.h"
#include "gpu/hopper.h"
#include "tests/cuda_model/cuda_model.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace {

/* ---- Checks ------------------------------------------------------------------------------- */

int passed, failed;
std::string where; /* the test, and the mode it runs in */

__attribute__((format(printf, 2, 3))) bool check(bool right, const char *format, ...)
{
    if (right)
        return ++passed, true;
    va_list arguments;
    va_start(arguments, format);
    printf("%s: ", where.c_str());
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    failed++;
    return false;
}

void check_error(cudaError_t got, cudaError_t want, const char *what)
{
    check(got == want, "%s: %s, expected %s", what, cudaGetErrorName(got), cudaGetErrorName(want));
}

template <class T>
void check_same(const std::vector<T> &got, const std::vector<T> &want, const char *what)
{
    if (!check(got.size() == want.size(), "%s: %zu values, expected %zu", what, got.size(),
               want.size()))
        return;
    for (size_t n = 0; n < got.size(); n++)
        if (memcmp(&got[n], &want[n], sizeof(T)))
            return (void)check(false, "%s[%zu]: %g, expected %g", what, n, (double)got[n],
                               (double)want[n]);
    passed++;
}

uint32_t random_state;
uint32_t draw() /* xorshift */
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}

/* ---- Device memory and launches ----------------------------------------------------------- */

template <class T> struct Device {
    T *p = nullptr;
    size_t count;
    explicit Device(size_t n) : count(n)
    {
        check_error(cudaMalloc(&p, n * sizeof(T)), cudaSuccess, "cudaMalloc");
    }
    explicit Device(const std::vector<T> &values) : Device(values.size())
    {
        check_error(cudaMemcpy(p, values.data(), count * sizeof(T), cudaMemcpyHostToDevice),
                    cudaSuccess, "upload");
    }
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;
    ~Device() { cudaFree(p); }
    std::vector<T> values() const
    {
        std::vector<T> all(count);
        check_error(cudaMemcpy(all.data(), p, count * sizeof(T), cudaMemcpyDeviceToHost),
                    cudaSuccess, "download");
        return all;
    }
};

cudaLaunchConfig_t config(dim3 grid, dim3 block, size_t shared, cudaStream_t stream = nullptr)
{
    cudaLaunchConfig_t c = {};
    c.gridDim = grid;
    c.blockDim = block;
    c.dynamicSmemBytes = shared;
    c.stream = stream;
    return c;
}

template <class... Parameters, class... Arguments>
cudaError_t run(dim3 grid, dim3 block, size_t shared, void (*kernel)(Parameters...),
                Arguments... arguments)
{
    const cudaLaunchConfig_t c = config(grid, block, shared);
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);
    error = error ? error : cudaLaunchKernelEx(&c, kernel, arguments...);
    return error ? error : cudaDeviceSynchronize();
}

template <class... All> void run_well(dim3 grid, dim3 block, size_t shared, All... all)
{
    check_error(run(grid, block, shared, all...), cudaSuccess, "launch");
}

int rank() { return (int)threadIdx.x; }

/* ---- Threads and warps -------------------------------------------------------------------- */

void test_indices()
{
    Device<int> out(3 * 4 * 2 * 8 * 4 * 2);
    run_well(
        dim3(3, 4, 2), dim3(8, 4, 2), 0,
        +[](int *o) {
            const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
            const unsigned thread =
                (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
            o[block * 64 + thread] = (int)(block * 1000 + thread);
        },
        out.p);
    std::vector<int> want;
    for (int b = 0; b < 24; b++)
        for (int t = 0; t < 64; t++)
            want.push_back(b * 1000 + t);
    check_same(out.values(), want, "indices");
}

void test_shuffles()
{
    enum { cases = 13 };
    Device<int> out(cases * 64);
    run_well(
        1, 64, 0,
        +[](int *o) {
            const int v = 100 + rank();
            const float f = (float)v;
            const unsigned u = (unsigned)v;
            const int got[cases] = {__shfl_sync(~0u, v, 5),
                                    __shfl_sync(~0u, v, rank() + 1),
                                    __shfl_sync(~0u, v, 3, 8),
                                    (int)__shfl_xor_sync(~0u, f, 16),
                                    __shfl_xor_sync(~0u, v, 9, 8),
                                    (int)__shfl_up_sync(~0u, u, 3),
                                    __shfl_up_sync(~0u, v, 2, 4),
                                    (int)__shfl_down_sync(~0u, f, 30),
                                    __shfl_down_sync(~0u, v, 1, 16),
                                    (int)__ballot_sync(~0u, rank() % 3 == 0),
                                    __any_sync(~0u, rank() == 40) +
                                        2 * __all_sync(~0u, rank() < 32),
                                    __reduce_add_sync(~0u, v),
                                    (int)(__shfl_xor_sync(~0u, (long long)v << 40, 4) >> 40)};
            for (int n = 0; n < cases; n++)
                o[n * 64 + rank()] = got[n];
        },
        out.p);
    std::vector<int> want(cases * 64);
    for (int t = 0; t < 64; t++) {
        const int lane = t % 32, base = 100 + t - lane;
        int ballot = 0, sum = 0;
        for (int l = 0; l < 32; l++) {
            ballot |= ((t - lane + l) % 3 == 0) << l;
            sum += base + l;
        }
        const int xor_9 = lane ^ 9; /* in segments of 8: only towards an earlier segment */
        const int all[cases] = {base + 5,
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
        for (int n = 0; n < cases; n++)
            want[(size_t)(n * 64 + t)] = all[n];
    }
    check_same(out.values(), want, "shuffles and votes");
}

void test_reductions()
{
    Device<int> out(4);
    run_well(
        1, 32, 0,
        +[](int *o) {
            const int v = (rank() * 7 + 3) % 32 - 16;
            o[0] = __reduce_max_sync(~0u, v);
            o[1] = __reduce_min_sync(~0u, v);
            o[2] = (int)__reduce_max_sync(~0u, (unsigned)rank());
            o[3] = (int)__reduce_add_sync(~0u, 0x80000000u + (unsigned)rank()); /* wraps */
        },
        out.p);
    check_same(out.values(), {15, -16, 31, 31 * 16}, "reductions");
}

void test_block_barriers()
{
    Device<int> out(4 * 96);
    run_well(
        1, 96, 96 * 4,
        +[](int *o) {
            int *s = (int *)shared_memory(), x = rank();
            for (int round = 0; round < 5; round++) { /* everybody reads its neighbour's */
                s[rank()] = x;
                __syncthreads();
                x = s[(rank() + 1) % 96];
                __syncthreads();
            }
            o[rank()] = x;
            o[96 + rank()] = __syncthreads_count(rank() % 3 == 0);
            o[192 + rank()] = __syncthreads_or(rank() == 50) + 2 * __syncthreads_or(0);
            o[288 + rank()] = __syncthreads_and(rank() < 96) + 2 * __syncthreads_and(rank() != 7);
        },
        out.p);
    std::vector<int> want;
    for (int t = 0; t < 96; t++)
        want.push_back((t + 5) % 96);
    want.resize(192, 32);
    want.resize(384, 1);
    check_same(out.values(), want, "block barriers");
}

void test_returned_threads()
{
    Device<int> out(1);
    run_well(
        1, 64, 0,
        +[](int *o) {
            if (rank() >= 32)
                return; /* before or after the others have arrived, as the order has it */
            o[0] = __syncthreads_count(1);
        },
        out.p);
    check_same(out.values(), {32}, "a barrier of those that are left");
}

void test_arithmetic()
{
    check(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64 && __ffs(0) == 0 && __ffs(12) == 3, "bits");
    check(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0, "__clz");
    check(__dp4a((int)0x80ff7f01, (int)0x80027f03, 5) == 128 * 128 - 2 + 127 * 127 + 3 + 5,
          "__dp4a");
    check(min(-1, 2) == -1 && max(1u, ~0u) == ~0u && max(NAN, 1.0f) == 1.0f &&
              __vimax3_s32(-5, 7, 2) == 7,
          "max");
    check(__float_as_int(-0.0f) == INT32_MIN && __uint_as_float(0x3f800000) == 1, "bits of floats");
    int i = 5;
    unsigned u = 6;
    unsigned long long l = 1ull << 40;
    check(atomicAdd(&i, -7) == 5 && i == -2 && atomicMax(&i, 9) == -2 && i == 9, "atomics of int");
    check(atomicOr(&u, 9) == 6 && u == 15 && atomicAnd(&u, 5) == 15 && u == 5,
          "atomics of unsigned");
    check(atomicAdd(&l, 3) == 1ull << 40 && l == (1ull << 40) + 3, "atomics of unsigned long long");
}

void test_conversions()
{
    for (float x : {-0.0f, -1e-3f, -0.5f, -3.75f, -125.9f, -126.5f, -1000.0f, -INFINITY})
        check(exp2_fast(x) == sparge_exp2(x), "exp2_fast(%g)", (double)x);
    check(exp2_fast(2.5f) == exp2f(2.5f) && isnan(exp2_fast(NAN)), "exp2_fast above 0");
    check(pack_f16(1.0f, -2.0f) == 0xc0003c00, "pack_f16");

    const auto code = [](float x) { return (int)(pack_e4m3(0, x, 0, 0) >> 8); };
    const auto value = [](int c) {
        return c < 8 ? ldexpf((float)c, -9) : ldexpf(1 + (float)(c % 8) / 8, c / 8 - 7);
    };
    bool right = true;
    for (int c = 0; c < 0x7f; c++) {
        right &= code(value(c)) == c && code(-value(c)) == (c | 0x80);
        if (c == 0x7e)
            break;
        const float between = (value(c) + value(c + 1)) / 2; /* exact */
        right &=
            code(between) == (c % 2 ? c + 1 : c) && code(-between) == (c % 2 ? c + 1 : c) + 0x80;
        right &= code(nextafterf(between, 0)) == c && code(nextafterf(between, 1e9f)) == c + 1;
    }
    check(right, "pack_e4m3: values and midpoints");
    check(value(0x7e) == 448 && code(449) == 0x7e && code(464) == 0x7e && code(1e30f) == 0x7e,
          "pack_e4m3 saturates");
    check(code(INFINITY) == 0x7e && code(-INFINITY) == 0xfe && code(NAN) == 0x7f &&
              code(-NAN) == 0x7f,
          "pack_e4m3: inf");
    check(code(-0.0f) == 0x80 && code(1e-40f) == 0, "pack_e4m3: 0");
    check(pack_e4m3(1, 2, -1, 448) == 0x7eb84038, "pack_e4m3: order");
}

/* ---- The tensor core of a warp ------------------------------------------------------------ */

void test_ldmatrix()
{
    std::vector<uint16_t> tile(64 * 8);
    for (uint16_t &x : tile)
        x = (uint16_t)draw();
    Device<uint16_t> in(tile);
    Device<uint32_t> out(2 * 32 * 4);
    run_well(
        1, 32, 64 * 16,
        +[](const uint16_t *t, uint32_t *o) {
            uint16_t *s = (uint16_t *)shared_memory();
            for (int n = rank(); n < 64 * 8; n += 32)
                s[n] = t[n];
            __syncwarp();
            uint32_t r[4];
            ldmatrix(r, s + 8 * (63 - rank())); /* rows from the last to the first */
            for (int n = 0; n < 4; n++)
                o[rank() * 4 + n] = r[n];
            ldmatrix_transposed(r, s + 8 * (2 * rank()));
            for (int n = 0; n < 4; n++)
                o[128 + rank() * 4 + n] = r[n];
        },
        in.p, out.p);
    std::vector<uint32_t> want;
    for (int lane = 0; lane < 32; lane++)
        for (int n = 0; n < 4; n++) {
            const uint16_t *row = &tile[(size_t)(8 * (63 - (8 * n + lane / 4)))];
            want.push_back(row[lane % 4 * 2] | (uint32_t)row[lane % 4 * 2 + 1] << 16);
        }
    for (int lane = 0; lane < 32; lane++)
        for (int n = 0; n < 4; n++) {
            const auto at = [&](int i) { return tile[(size_t)(8 * 2 * (8 * n + i) + lane / 4)]; };
            want.push_back(at(lane % 4 * 2) | (uint32_t)at(lane % 4 * 2 + 1) << 16);
        }
    check_same(out.values(), want, "ldmatrix");
}

void test_mma_s8()
{
    std::vector<int8_t> a(16 * 32), b(32 * 8);
    std::vector<int> want(16 * 8);
    for (int8_t &x : a)
        x = (int8_t)draw();
    for (int8_t &x : b)
        x = (int8_t)draw();
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 8; c++) {
            int sum = 1000 * r + c + (1 << 28); /* more than a float can hold */
            for (int k = 0; k < 32; k++)
                sum += a[(size_t)(r * 32 + k)] * b[(size_t)(k * 8 + c)];
            want[(size_t)(r * 8 + c)] = sum;
        }
    Device<int8_t> da(a), db(b);
    Device<int> out(16 * 8);
    run_well(
        1, 32, 0,
        +[](const int8_t *A, const int8_t *B, int *o) {
            const int g = rank() / 4, q = rank() % 4;
            uint32_t r[4], b0 = 0, b1 = 0;
            int d[4];
            memcpy(&r[0], A + g * 32 + 4 * q, 4);
            memcpy(&r[1], A + (g + 8) * 32 + 4 * q, 4);
            memcpy(&r[2], A + g * 32 + 16 + 4 * q, 4);
            memcpy(&r[3], A + (g + 8) * 32 + 16 + 4 * q, 4);
            for (int e = 3; e >= 0; e--) {
                b0 = b0 << 8 | (uint8_t)B[(4 * q + e) * 8 + g];
                b1 = b1 << 8 | (uint8_t)B[(16 + 4 * q + e) * 8 + g];
            }
            for (int n = 0; n < 4; n++)
                d[n] = 1000 * (g + n / 2 * 8) + 2 * q + n % 2 + (1 << 28);
            mma_s8(d, r, b0, b1);
            for (int n = 0; n < 4; n++)
                o[(g + n / 2 * 8) * 8 + 2 * q + n % 2] = d[n];
        },
        da.p, db.p, out.p);
    check_same(out.values(), want, "mma_s8");
}

float draw_f16()
{
    return sparge_f16_to_f32(sparge_f32_to_f16((float)(int)(draw() % 2001 - 1000) / 1024.0f));
}

void test_mma_f16()
{
    std::vector<float> a(16 * 16), b(16 * 8), want(16 * 8);
    for (float &x : a)
        x = draw_f16();
    for (float &x : b)
        x = draw_f16();
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 8; c++) {
            float sum = 0.1f;
            for (int k = 0; k < 16; k++)
                sum += a[(size_t)(r * 16 + k)] * b[(size_t)(k * 8 + c)];
            want[(size_t)(r * 8 + c)] = sum;
        }
    Device<float> da(a), db(b), out(16 * 8);
    run_well(
        1, 32, 0,
        +[](const float *A, const float *B, float *o) {
            const int g = rank() / 4, q = rank() % 4;
            uint32_t r[4];
            float d[4] = {0.1f, 0.1f, 0.1f, 0.1f};
            for (int n = 0; n < 4; n++) {
                const float *two = A + (g + n % 2 * 8) * 16 + n / 2 * 8 + 2 * q;
                r[n] = pack_f16(two[0], two[1]);
            }
            const float *two = B + 2 * q * 8 + g;
            mma_f16(d, r, pack_f16(two[0], two[8]), pack_f16(two[64], two[72]));
            for (int n = 0; n < 4; n++)
                o[(g + n / 2 * 8) * 8 + 2 * q + n % 2] = d[n];
        },
        da.p, db.p, out.p);
    check_same(out.values(), want, "mma_f16");
}

void test_copy_async()
{
    std::vector<uint32_t> in(3 * 32 * 4);
    for (uint32_t &x : in)
        x = draw();
    Device<uint32_t> din(in), out(5 * 32 * 4);
    run_well(
        1, 32, 3 * 512,
        +[](const uint32_t *x, uint32_t *o) {
            const auto mine = [](int n) {
                return (uint32_t *)shared_memory() + n * 128 + rank() * 4;
            };
            const auto show = [&](int to, int n) {
                memcpy(o + to * 128 + rank() * 4, mine(n), 16);
            };
            for (int n = 0; n < 2; n++) {
                copy_async(mine(n), x + n * 128 + rank() * 4);
                copy_async_commit();
            }
            copy_async_wait<1>();
            show(0, 0);
            show(1, 1); /* too early */
            copy_async_wait<0>();
            show(2, 1);
            copy_async(mine(2), x + 256 + rank() * 4); /* in no group */
            copy_async_wait<0>();
            show(3, 2);
            copy_async_commit();
            copy_async_wait<0>();
            show(4, 2);
        },
        din.p, out.p);
    const std::vector<uint32_t> got = out.values();
    const auto part = [](const std::vector<uint32_t> &v, int n) {
        return std::vector<uint32_t>(v.begin() + n * 128, v.begin() + n * 128 + 128);
    };
    const std::vector<uint32_t> poison(128, 0x7f7f7f7f);
    const bool late = cuda_model_settings.late != 0;
    check_same(part(got, 0), part(in, 0), "the first group");
    check_same(part(got, 1), late ? poison : part(in, 1), "the second group, not waited for");
    check_same(part(got, 2), part(in, 1), "the second group");
    check_same(part(got, 3), late ? poison : part(in, 2), "a copy in no group");
    check_same(part(got, 4), part(in, 2), "the third group");
}

/* ---- The tensor core of a warpgroup ------------------------------------------------------- */

/* Byte c of row r in an image whose 16-byte pieces are swizzled. */
int image_at(int pitch, int r, int c)
{
    const int turn = pitch == 128 ? r % 8 : r / 2 % 4;
    return r * pitch + (c / 16 ^ turn) * 16 + c % 16;
}

float e4m3_value(int code)
{
    const int rest = code & 0x7f;
    const float size =
        rest < 8 ? (float)rest / 512 : ldexpf((float)(8 + rest % 8) / 8, rest / 8 - 7);
    return rest == 0x7f ? NAN : code & 0x80 ? -size : size;
}

/* Where register n of d of a thread of the warpgroup stands. */
int row_of(int t, int n) { return t / 32 * 16 + t % 32 / 4 + n / 2 % 2 * 8; }
int column_of(int t, int n) { return n / 4 * 8 + t % 4 * 2 + n % 2; }

struct Images {
    const uint8_t *a, *b; /* as they stand in shared memory, a first */
    int a_bytes, b_bytes;
    void *d;
    int steps, pitch, chunk;
};

void load_images(const Images &x, uint8_t *s)
{
    for (int n = (int)threadIdx.x; n < x.a_bytes; n += (int)blockDim.x)
        s[n] = x.a[n];
    for (int n = (int)threadIdx.x; n < x.b_bytes; n += (int)blockDim.x)
        s[x.a_bytes + n] = x.b[n];
    fence_async();
    __syncthreads();
}

/* Both warpgroups of the block, each with its own half of a. */
void test_wgmma_s8(int pitch)
{
    const int steps = pitch / 32;
    std::vector<int8_t> a((size_t)(128 * pitch)), b((size_t)(128 * pitch));
    std::vector<uint8_t> a_image(a.size()), b_image(b.size());
    for (int r = 0; r < 128; r++)
        for (int c = 0; c < pitch; c++) {
            const size_t at = (size_t)(r * pitch + c), to = (size_t)image_at(pitch, r, c);
            a_image[to] = (uint8_t)(a[at] = (int8_t)draw());
            b_image[to] = (uint8_t)(b[at] = (int8_t)draw());
        }
    std::vector<int> want(128 * 128);
    for (int r = 0; r < 128; r++)
        for (int c = 0; c < 128; c++)
            for (int k = 0; k < pitch; k++)
                want[(size_t)(r * 128 + c)] +=
                    a[(size_t)(r * pitch + k)] * b[(size_t)(c * pitch + k)];
    Device<uint8_t> da(a_image), db(b_image);
    Device<int> out(128 * 128);
    run_well(
        1, 256, a.size() + b.size(),
        +[](Images x) {
            uint8_t *s = shared_memory();
            load_images(x, s);
            const int group = rank() / 128;
            const uint64_t from = descriptor_k_major(s + group * 64 * x.pitch, x.pitch);
            const uint64_t with = descriptor_k_major(s + x.a_bytes, x.pitch);
            int d[64];
            for (int &v : d)
                v = 77; /* the first product does not add */
            wgmma_fence();
            for (int n = 0; n < x.steps; n++)
                wgmma_s8(d, from + (uint64_t)n * DESCRIPTOR_32_BYTES,
                         with + (uint64_t)n * DESCRIPTOR_32_BYTES, n > 0);
            wgmma_commit();
            wgmma_wait<0>();
            pin(d);
            for (int n = 0; n < 64; n++)
                ((int *)x.d)[(64 * group + row_of(rank() % 128, n)) * 128 +
                             column_of(rank() % 128, n)] = d[n];
        },
        Images{da.p, db.p, (int)a.size(), (int)b.size(), out.p, steps, pitch, 0});
    check_same(out.values(), want, "wgmma_s8");
}

template <int N> void kernel_e4m3(Images x)
{
    uint8_t *s = shared_memory();
    load_images(x, s);
    const int g = rank() % 32 / 4, q = rank() % 4, top = rank() / 32 * 16;
    float d[N / 2];
    for (float &v : d)
        v = 0.25f;
    for (int step = 0; step < x.steps; step++) {
        uint32_t a[4];
        for (int n = 0; n < 4; n++)
            memcpy(&a[n], x.a + (top + g + n % 2 * 8) * x.pitch + 32 * step + n / 2 * 16 + 4 * q,
                   4);
        wgmma_fence();
        wgmma_e4m3(
            d, a, descriptor_k_major(s + x.a_bytes, x.pitch) + (uint64_t)step * DESCRIPTOR_32_BYTES,
            true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int n = 0; n < N / 2; n++)
        ((float *)x.d)[row_of(rank(), n) * N + column_of(rank(), n)] = d[n];
}

template <int N> void test_wgmma_e4m3(int pitch)
{
    std::vector<uint8_t> a((size_t)(64 * pitch)), b((size_t)(N * pitch)), image(b.size());
    for (uint8_t &x : a)
        while (((x = (uint8_t)draw()) & 0x7f) == 0x7f)
            ;
    for (int r = 0; r < N; r++)
        for (int c = 0; c < pitch; c++) {
            uint8_t &x = b[(size_t)(r * pitch + c)];
            while (((x = (uint8_t)draw()) & 0x7f) == 0x7f)
                ;
            image[(size_t)image_at(pitch, r, c)] = x;
        }
    std::vector<float> want(64 * N, 0.25f);
    for (int r = 0; r < 64; r++)
        for (int c = 0; c < N; c++)
            for (int k = 0; k < pitch; k++)
                want[(size_t)(r * N + c)] +=
                    e4m3_value(a[(size_t)(r * pitch + k)]) * e4m3_value(b[(size_t)(c * pitch + k)]);
    Device<uint8_t> da(a), db(image);
    Device<float> out(64 * N);
    run_well(1, 128, a.size() + b.size(), kernel_e4m3<N>,
             Images{da.p, db.p, (int)a.size(), (int)b.size(), out.p, pitch / 32, pitch, 0});
    check_same(out.values(), want, "wgmma_e4m3");
}

template <int N> void kernel_f16(Images x)
{
    uint8_t *s = shared_memory();
    load_images(x, s);
    const int g = rank() % 32 / 4, q = rank() % 4, top = rank() / 32 * 16;
    float d[N / 2];
    for (int step = 0; step < x.steps; step++) {
        uint32_t a[4];
        for (int n = 0; n < 4; n++)
            memcpy(&a[n],
                   x.a + 2 * ((top + g + n % 2 * 8) * 16 * x.steps + 16 * step + n / 2 * 8 + 2 * q),
                   4);
        wgmma_fence();
        wgmma_f16(d, a,
                  descriptor_n_major(s + x.a_bytes, x.chunk) + (uint64_t)step * DESCRIPTOR_16_ROWS,
                  step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int n = 0; n < N / 2; n++)
        ((float *)x.d)[row_of(rank(), n) * N + column_of(rank(), n)] = d[n];
}

/* `keys` rows of b; each chunk of 64 columns is an image of its own, `gap` bytes after the one
 * before. */
template <int N> void test_wgmma_f16(int keys, int gap)
{
    const int chunk = keys * 128 + gap;
    std::vector<uint16_t> a((size_t)(64 * keys)), b((size_t)(keys * N));
    std::vector<uint8_t> a_bytes(2 * a.size()), image((size_t)(2 * chunk));
    for (uint16_t &x : a)
        x = sparge_f32_to_f16(draw_f16());
    memcpy(a_bytes.data(), a.data(), a_bytes.size());
    a_bytes.resize((a_bytes.size() + 1023) / 1024 * 1024);
    for (int k = 0; k < keys; k++)
        for (int c = 0; c < N; c++) {
            const uint16_t x = b[(size_t)(k * N + c)] = sparge_f32_to_f16(draw_f16());
            memcpy(&image[(size_t)(c / 64 * chunk + image_at(128, k, c % 64 * 2))], &x, 2);
        }
    std::vector<float> want(64 * N);
    for (int r = 0; r < 64; r++)
        for (int c = 0; c < N; c++)
            for (int k = 0; k < keys; k++)
                want[(size_t)(r * N + c)] += sparge_f16_to_f32(a[(size_t)(r * keys + k)]) *
                                             sparge_f16_to_f32(b[(size_t)(k * N + c)]);
    Device<uint8_t> da(a_bytes), db(image);
    Device<float> out(64 * N);
    run_well(
        1, 128, a_bytes.size() + image.size(), kernel_f16<N>,
        Images{da.p, db.p, (int)a_bytes.size(), (int)image.size(), out.p, keys / 16, 128, chunk});
    check_same(out.values(), want, "wgmma_f16");
}

void test_wgmma()
{
    test_wgmma_s8(128);
    test_wgmma_s8(64);
    for (int pitch : {64, 128}) {
        test_wgmma_e4m3<64>(pitch);
        test_wgmma_e4m3<96>(pitch);
        test_wgmma_e4m3<128>(pitch);
    }
    test_wgmma_f16<64>(64, 0);
    test_wgmma_f16<96>(64, 0);
    test_wgmma_f16<128>(64, 1024);
    test_wgmma_f16<128>(16, 0);
}

void test_every_e4m3_code()
{
    for (int half = 0; half < 2; half++) { /* a is 1 at k = 0 alone, b all codes */
        std::vector<uint8_t> a(64 * 64), image(128 * 64);
        std::vector<float> want(64 * 128, 0.25f);
        for (int r = 0; r < 64; r++)
            a[(size_t)(r * 64)] = 0x38;
        for (int c = 0; c < 128; c++)
            image[(size_t)image_at(64, c, 0)] = (uint8_t)(128 * half + c);
        for (int n = 0; n < 64 * 128; n++)
            want[(size_t)n] += e4m3_value(128 * half + n % 128);
        Device<uint8_t> da(a), db(image);
        Device<float> out(64 * 128);
        run_well(1, 128, a.size() + image.size(), kernel_e4m3<128>,
                 Images{da.p, db.p, 64 * 64, 128 * 64, out.p, 2, 64, 0});
        std::vector<float> got = out.values();
        for (size_t n = 0; n < got.size(); n++)
            if (isnan(got[n]) && isnan(want[n]))
                got[n] = want[n];
        check_same(got, want, "codes of e4m3");
    }
}

/* Two groups of products; what registers hold before each wait, and when shared memory is read. */
void test_late_products()
{
    Device<int> out(6);
    run_well(
        1, 128, 16384 + 16384,
        +[](int *o) {
            uint8_t *s = shared_memory();
            for (int n = rank(); n < 32768; n += 128)
                s[n] = 1;
            __syncthreads();
            const uint64_t a = descriptor_k_major(s, 128), b = descriptor_k_major(s + 16384, 128);
            int d[64], e[64];
            for (int n = 0; n < 64; n++)
                d[n] = e[n] = 1000;
            wgmma_fence();
            wgmma_s8(d, a, b, true);
            wgmma_commit();
            wgmma_s8(e, a, b, true);
            wgmma_s8(e, a + DESCRIPTOR_32_BYTES, b + DESCRIPTOR_32_BYTES, true);
            wgmma_commit();
            if (rank() == 77)
                o[0] = d[63];
            wgmma_wait<1>();
            if (rank() == 77)
                o[1] = d[63], o[2] = e[0];
            __syncthreads();
            for (int n = 16384 + rank(); n < 32768; n += 128)
                s[n] = 3; /* too early */
            __syncthreads();
            wgmma_wait<0>();
            if (rank() == 77)
                o[3] = e[0], o[4] = d[63];
            for (int n = 0; n < 3; n++) {
                wgmma_s8(d, a, a, true);
                wgmma_commit();
            }
            wgmma_wait<0>(); /* for several groups */
            if (rank() == 77)
                o[5] = d[0];
        },
        out.p);
    const int mode = cuda_model_settings.late, poison = 0x7fffffff;
    const std::vector<int> want = {mode ? poison : 1032,    1032, mode ? poison : 1064,
                                   mode == 1 ? 1192 : 1064, 1032, 1128};
    check_same(out.values(), want, "products in flight");
}

/* ---- mbarriers, bulk copies, named barriers ----------------------------------------------- */

/* A ring of two stages: thread 0 copies numbered blocks, the second warp sums them. */
void test_ring()
{
    const int blocks = 11;
    std::vector<int> in((size_t)(blocks * 64));
    std::vector<int> want(32);
    for (int n = 0; n < blocks * 64; n++)
        want[(size_t)(n % 32)] += (n / 64 + 1) * (in[(size_t)n] = (int)(draw() % 1000));
    Device<int> din(in), out(32);
    run_well(
        1, 64, 2 * 256 + 32,
        +[](const int *x, int *o) {
            uint8_t *s = shared_memory();
            uint64_t *full = (uint64_t *)(s + 512), *empty = full + 2;
            if (rank() == 0) {
                for (int n = 0; n < 2; n++) {
                    barrier_init(full + n, 1);
                    barrier_init(empty + n, 32);
                }
                barrier_init_fence();
            }
            __syncthreads();
            if (rank() == 0)
                for (int n = 0; n < 11; n++) {
                    barrier_wait(empty + n % 2,
                                 (n / 2 & 1) ^ 1); /* at first nothing has to be emptied */
                    if (n % 3) {
                        barrier_arrive_expect(full + n % 2, 256);
                        copy_bulk(s + n % 2 * 256, x + n * 64, 128, full + n % 2);
                        copy_bulk(s + n % 2 * 256 + 128, x + n * 64 + 32, 128, full + n % 2);
                    } else { /* bytes that come before they are announced */
                        copy_bulk(s + n % 2 * 256, x + n * 64, 256, full + n % 2);
                        barrier_arrive_expect(full + n % 2, 256);
                    }
                }
            if (rank() >= 32) {
                int sum = 0;
                for (int n = 0; n < 11; n++) {
                    barrier_wait(full + n % 2, n / 2 & 1);
                    const int *stage = (const int *)(s + n % 2 * 256);
                    sum += (n + 1) * (stage[rank() - 32] + stage[rank()]);
                    barrier_arrive(empty + n % 2);
                }
                o[rank() - 32] = sum;
            }
        },
        din.p, out.p);
    check_same(out.values(), want, "ring");
}

void test_late_bulk_copy()
{
    Device<uint32_t> in(std::vector<uint32_t>(8, 5)), out(4);
    run_well(
        1, 32, 64,
        +[](const uint32_t *x, uint32_t *o) {
            uint32_t *s = (uint32_t *)shared_memory();
            uint64_t *b = (uint64_t *)(s + 8), *other = b + 1;
            if (rank() == 0) {
                barrier_init(b, 1);
                barrier_init(other, 1);
                barrier_arrive_expect(b, 16);
                barrier_arrive_expect(other, 16);
                copy_bulk(s, x, 16, b);
                copy_bulk(s + 4, x, 16, other);
                o[0] = s[0];
                barrier_wait(other, 0);
                o[1] = s[0];
                o[2] = s[4];
                barrier_wait(b, 0);
                o[3] = s[0];
            }
        },
        in.p, out.p);
    const uint32_t early = cuda_model_settings.late ? 0x7f7f7f7f : 5;
    check_same(out.values(), {early, early, 5, 5}, "bulk copies land for who waits for them");
}

void test_named_barriers()
{
    Device<int> out(3 * 64);
    run_well(
        1, 128, 256,
        +[](int *o) {
            int *s = (int *)shared_memory();
            for (int round = 0; round < 3; round++) { /* warps 0 and 1 write, warps 2 and 3 read */
                if (rank() < 64) {
                    named_sync(2, 128);
                    s[rank()] = 100 * round + rank();
                    named_arrive(1, 128);
                } else {
                    named_arrive(2, 128);
                    named_sync(1, 128);
                    o[round * 64 + rank() - 64] = s[127 - rank()];
                    const bool any =
                        named_any(3, 64, rank() == 64 + round); /* between the readers */
                    o[round * 64 + rank() - 64] += any && !named_any(3, 64, false) ? 1000 : 0;
                }
            }
        },
        out.p);
    std::vector<int> want;
    for (int round = 0; round < 3; round++)
        for (int t = 0; t < 64; t++)
            want.push_back(1000 + 100 * round + 63 - t);
    check_same(out.values(), want, "named barriers");
}

/* ---- Blocks and orders -------------------------------------------------------------------- */

void test_blocks()
{
    Device<int> out(16 * 32);
    run_well(
        16, 32, 128,
        +[](int *o) {
            int *s = (int *)shared_memory();
            const int was = s[rank()]; /* 0xFF, whatever ran here before */
            s[rank()] = (int)blockIdx.x;
            __syncthreads();
            __syncthreads();
            o[blockIdx.x * 32 + threadIdx.x] =
                was == -1 && shared_address(s) == 0 && (uintptr_t)s % 1024 == 0 ? s[31 - rank()]
                                                                                : -1;
        },
        out.p);
    std::vector<int> want;
    for (int n = 0; n < 16 * 32; n++)
        want.push_back(n / 32);
    check_same(out.values(), want, "blocks have shared memory of their own");

    for (unsigned resident :
         {1u, 2u, 3u, 5u}) { /* how many blocks have begun before any has ended */
        cuda_model_settings.resident_blocks = resident;
        Device<unsigned> most(std::vector<unsigned>(2, 0));
        run_well(
            5, 32, 0,
            +[](unsigned *m) {
                if (rank() == 0)
                    m[0]++;
                __syncthreads();
                if (rank() == 0) {
                    m[1] = max(m[1], m[0]);
                    m[0]--;
                }
            },
            most.p);
        const unsigned blocks =
            most.values()[1]; /* another order may end one before the last has begun */
        check(cuda_model_settings.seed ? blocks <= resident : blocks == resident,
              "%u blocks at once", blocks);
    }
    cuda_model_settings.resident_blocks = 2;

    Device<int> flag(std::vector<int>(1, 0));
    run_well(
        2, 32, 0,
        +[](int *f) {
            if (blockIdx.x == 1)
                *f = 1;
            else
                while (!*(volatile int *)f)
                    __nanosleep(100);
        },
        flag.p);
}

/* Each thread reads what the thread before it writes, without a barrier: right in ascending order
 * alone. */
void test_races_show()
{
    Device<int> out(32);
    run_well(
        1, 32, 256,
        +[](int *o) {
            int *s = (int *)shared_memory();
            s[rank()] = rank();
            o[rank()] = s[max(rank() - 1, 0)];
        },
        out.p);
    int wrong = 0;
    for (int n = 0; n < 32; n++)
        wrong += out.values()[(size_t)n] != max(n - 1, 0);
    check((wrong > 0) == (cuda_model_settings.seed > 0), "%d threads saw the race", wrong);
}

void test_orders()
{
    std::vector<std::vector<int>> orders;
    for (uint64_t seed : {0u, 1u, 2u, 2u}) {
        cuda_model_settings.seed = seed;
        Device<int> out(std::vector<int>(33, 0));
        run_well(
            1, 32, 0, +[](int *o) { o[1 + atomicAdd(o, 1)] = rank(); }, out.p);
        orders.push_back(out.values());
    }
    check(orders[0] != orders[1] && orders[1] != orders[2], "each seed has its order");
    check(orders[2] == orders[3], "the same one every time");
}

/* ---- Mistakes ----------------------------------------------------------------------------- */

/* Runs a kernel that must end the launch with a report that contains this. */
template <class... All>
void expect_report(const char *report, dim3 grid, dim3 block, size_t shared, All... all)
{
    const struct cuda_model_settings before = cuda_model_settings;
    cuda_model_settings.quiet = true;
    check_error(run(grid, block, shared, all...), cudaErrorLaunchFailure, report);
    check(strstr(cuda_model_report(), report) != nullptr, "the report is \"%s\", expected \"%s\"",
          cuda_model_report(), report);
    int *p;
    check_error(cudaMalloc(&p, 4), cudaErrorLaunchFailure, "a call after the error");
    check_error(cudaGetLastError(), cudaErrorLaunchFailure, "cudaGetLastError");
    check_error(cudaGetLastError(), cudaErrorLaunchFailure,
                "cudaGetLastError, which cannot clear it");
    cuda_model_reset();
    cuda_model_settings = before;
}

void test_deadlocks()
{
    expect_report(
        "\n  block (0,0,0): 0-31 in named_sync, barrier 4 with 32 of 64 threads", 1, 64, 0, +[] {
            if (rank() < 32)
                named_sync(4, 64);
        });
    expect_report(
        "\n  block (1,0,0): 5 in barrier_wait, shared memory + 8: phase 0 lacks 2 arrivals and 48 "
        "bytes",
        2, 64, 16, +[] {
            uint64_t *b = (uint64_t *)shared_memory() + 1;
            if (rank() == 5 && blockIdx.x == 1) {
                barrier_init(b, 3);
                barrier_arrive_expect(b, 48);
                barrier_wait(b, 0);
            }
        });
    expect_report(
        ": 8-31 in __syncwarp", 1, 32, 16, +[] {
            uint64_t *b = (uint64_t *)shared_memory();
            if (rank() == 7) {
                barrier_init(b, 1);
                barrier_wait(b, 0);
            }
            __syncwarp();
        });
    /* Two blocks, in which 16 threads each wait for something else. */
    expect_report(
        "and 23 more", 16, 32, 512, +[] {
            uint64_t *b = (uint64_t *)shared_memory() + rank();
            if (rank() < 16) {
                barrier_init(b, 1);
                barrier_wait(b, 0);
            }
        });
    /* Bytes that landed and are never announced; in late modes they have not landed when the phase
     * ends. */
    if (cuda_model_settings.late == 0) {
        Device<uint8_t> x(16);
        expect_report(
            "lacks 0 arrivals and -16 bytes", 1, 1, 64,
            +[](const uint8_t *from) {
                uint64_t *b = (uint64_t *)shared_memory();
                barrier_init(b, 1);
                copy_bulk(b + 2, from, 16, b);
                barrier_arrive(b);
                barrier_wait(b, 0);
            },
            x.p);
    }
}

/* Kernels that do one thing wrong; `x` is device memory of 1024 bytes. */
void test_misuse()
{
    const auto expect = [](const char *report, unsigned threads, void (*kernel)(const uint8_t *)) {
        Device<uint8_t> x(1024);
        expect_report(report, 1, threads, 33000, kernel, x.p);
    };
    typedef const uint8_t *X;
    const bool late = cuda_model_settings.late != 0;

    expect("__syncwarp with mask 0000ffff", 32, [](X) { __syncwarp(0xffff); });
    expect("where 24 threads of the warp", 40, [](X) { __syncwarp(); });
    /* Lane 3 has returned, or returns, as the order has it. */
    expect(cuda_model_settings.seed ? "return" : "thread 3: returned while threads of its warp", 32,
           [](X) {
               if (rank() != 3)
                   __syncwarp();
           });
    expect(" of its warp is in __", 32, [](X) {
        if (rank() < 16)
            __syncwarp();
        else
            __ballot_sync(~0u, 1);
    });
    expect("while others wait there for 64 threads or in another kind", 64, [](X) {
        if (rank() == 5)
            __syncthreads_or(1);
        else
            __syncthreads();
    });
    expect("named_sync(2, ", 96, [](X) { named_sync(2, rank() < 32 ? 64 : 96); });
    expect("named_sync(0, 32)", 32, [](X) { named_sync(0, 32); });
    expect("named_sync(16, 32)", 32, [](X) { named_sync(16, 32); });
    expect("named_arrive(1, 40)", 64, [](X) { named_arrive(1, 40); });
    expect("named_any(1, 64)", 32, [](X) { named_any(1, 64, true); });

    expect("shared_address: 1 bytes at shared memory + 33000 of 33000", 32,
           [](X) { shared_address(shared_memory() + 33000); });
    expect("ldmatrix: shared memory + 8 is not aligned to 16", 32, [](X) {
        uint32_t r[4];
        ldmatrix(r, shared_memory() + 8);
    });
    expect("ldmatrix_transposed: 16 bytes at shared memory + 32992", 32, [](X) {
        uint32_t r[4];
        ldmatrix_transposed(r, shared_memory() + 32992);
    });
    expect("copy_async: the source is not aligned", 32,
           [](X x) { copy_async(shared_memory(), x + 4); });
    expect("copy_async: shared memory + 4 is not", 32,
           [](X x) { copy_async(shared_memory() + 4, x); });
    expect("copy_async: 16 bytes from ", 32, [](X x) { copy_async(shared_memory(), x + 1024); });

    /* The barrier of those that follow stands at 0, and expects one arrival. */
    expect("barrier_init: 0 arrivals", 32, [](X) { barrier_init((uint64_t *)shared_memory(), 0); });
    expect("barrier_wait: no barrier_init at shared memory + 8", 32,
           [](X) { barrier_wait((uint64_t *)shared_memory() + 1, 0); });
#define WITH_BARRIER(report, ...)                  \
    expect(report, 1, [](X x) {                    \
        uint64_t *b = (uint64_t *)shared_memory(); \
        barrier_init(b, 1);                        \
        __VA_ARGS__;                               \
        (void)x;                                   \
    })
    WITH_BARRIER("barrier_wait: the parity is 2", barrier_wait(b, 2));
    WITH_BARRIER("barrier_arrive: more arrivals", barrier_arrive_expect(b, 16); barrier_arrive(b));
    WITH_BARRIER("1048576 bytes are outstanding", barrier_arrive_expect(b, 1 << 20));
    WITH_BARRIER("copy_bulk: 24 bytes, not a multiple", copy_bulk(b + 2, x, 24, b));
    WITH_BARRIER("copy_bulk: 0 bytes", copy_bulk(b + 2, x, 0, b));
    WITH_BARRIER("copy_bulk: shared memory + 8 is not aligned", copy_bulk(b + 1, x, 16, b));
    WITH_BARRIER("copy_bulk: the source is not aligned", copy_bulk(b + 2, x + 8, 16, b));
    WITH_BARRIER("copy_bulk: 1040 bytes from", copy_bulk(b + 2, x, 1040, b));
    WITH_BARRIER("copy_bulk: 32 bytes at shared memory + 32976",
                 copy_bulk(shared_memory() + 32976, x, 32, b));
    WITH_BARRIER("copy_bulk: no barrier_init", copy_bulk(b + 2, x, 16, b + 1));
    if (late)
        WITH_BARRIER("1 bulk copies that nobody waited for", copy_bulk(b + 2, x, 16, b));
#undef WITH_BARRIER

#define WITH_PRODUCT(report, ...)                                       \
    expect(report, 128, [](X) {                                         \
        int d[64] = {};                                                 \
        const uint32_t one[4] = {};                                     \
        const uint64_t tile = descriptor_k_major(shared_memory(), 128); \
        __VA_ARGS__;                                                    \
        (void)d, (void)one, (void)tile;                                 \
    })
    WITH_PRODUCT("differ between threads 0 and 64",
                 wgmma_s8(d, tile, tile + (rank() >= 64 ? 2 : 0), true));
    WITH_PRODUCT("differ between threads 0 and 1 ", wgmma_s8(d, tile, tile, rank() == 0));
    WITH_PRODUCT("leads to shared memory + 33", wgmma_s8(d, tile, tile + (17000 >> 4), true);
                 wgmma_commit(); wgmma_wait<0>());
    WITH_PRODUCT("a swizzle that is not", wgmma_s8(d, tile, tile & ~(3ull << 62), true));
    WITH_PRODUCT("or of 64 for 8-bit", float f[32]; wgmma_f16(f, one, tile ^ 3ull << 62, false));
    WITH_PRODUCT("warpgroup 0 returned before wgmma_wait", wgmma_s8(d, tile, tile, true));
    WITH_PRODUCT("warpgroup 0 returned before wgmma_wait", wgmma_s8(d, tile, tile, true);
                 wgmma_commit());
    if (late)
        WITH_PRODUCT("accumulators were written before", wgmma_s8(d, tile, tile, true);
                     wgmma_commit(); d[rank() % 64] = 0; wgmma_wait<0>());
    expect("wgmma_commit where 32 threads of the warpgroup", 96, [](X) { wgmma_commit(); });
#undef WITH_PRODUCT
}

/* ---- The runtime API ---------------------------------------------------------------------- */

#define SUCCEEDS(call)     check_error(call, cudaSuccess, #call)
#define FAILS(call, error) check_error(call, error, #call)

struct Numbers {
    int of[16];
};

void add(int *p, Numbers n, int64_t i) { *p += n.of[i]; }

uint64_t kernels() { return cuda_model_count().kernels; }

void test_streams()
{
    cudaStream_t a, b, apart;
    int *p, *q, got = 0;
    SUCCEEDS(cudaStreamCreate(&a));
    SUCCEEDS(cudaStreamCreate(&b));
    SUCCEEDS(cudaStreamCreateWithFlags(&apart, cudaStreamNonBlocking));
    SUCCEEDS(cudaMalloc(&p, 4));
    SUCCEEDS(cudaMalloc(&q, 4));
    SUCCEEDS(cudaMemset(p, 0, 4));
    Numbers numbers = {{5, 7}};
    const cudaLaunchConfig_t in_a = config(1, 1, 0, a), in_b = config(1, 1, 0, b),
                             in_null = config(1, 1, 0);
    const cudaLaunchConfig_t in_apart = config(1, 1, 0, apart);
    SUCCEEDS(cudaLaunchKernelEx(&in_a, add, p, numbers, 1)); /* int becomes int64_t */
    numbers.of[1] = 1000;                                    /* too late */
    SUCCEEDS(cudaLaunchKernelEx(&in_b, add, p, numbers, 0));
    SUCCEEDS(cudaLaunchKernelEx(&in_apart, add, q, numbers, 0));
    check(kernels() == 0, "streams are lazy");
    SUCCEEDS(cudaStreamSynchronize(b));
    check(kernels() == 1, "one stream alone");
    SUCCEEDS(cudaMemcpy(&got, p, 4, cudaMemcpyDeviceToHost)); /* waits for a, but not for `apart` */
    check(got == 12 && kernels() == 2, "the NULL stream waits for the others: %d", got);
    SUCCEEDS(cudaLaunchKernelEx(&in_null, add, p, numbers, 0));
    SUCCEEDS(cudaMemcpyAsync(&got, p, 4, cudaMemcpyDeviceToHost, a));
    SUCCEEDS(cudaLaunchKernelEx(&in_null, add, p, numbers, 0)); /* after the copy */
    SUCCEEDS(cudaStreamSynchronize(a));
    check(got == 17 && kernels() == 3, "others wait for the NULL stream: %d", got);
    SUCCEEDS(cudaStreamDestroy(apart));
    FAILS(cudaStreamSynchronize(apart), cudaErrorInvalidResourceHandle);
    SUCCEEDS(cudaDeviceSynchronize());
    check(kernels() == 5, "what a destroyed stream still had to do is done");
    FAILS(cudaStreamDestroy(nullptr), cudaErrorInvalidResourceHandle);
    FAILS(cudaStreamCreateWithFlags(&apart, 7), cudaErrorInvalidValue);

    cudaEvent_t start, end;
    float milliseconds = -1;
    SUCCEEDS(cudaEventCreate(&start));
    SUCCEEDS(cudaEventCreate(&end));
    SUCCEEDS(cudaEventSynchronize(start)); /* never recorded */
    FAILS(cudaEventElapsedTime(&milliseconds, start, end), cudaErrorInvalidResourceHandle);
    SUCCEEDS(cudaEventRecord(start, a));
    SUCCEEDS(cudaLaunchKernelEx(&in_a, add, p, numbers, 0));
    SUCCEEDS(cudaEventRecord(end, a));
    SUCCEEDS(cudaLaunchKernelEx(&in_a, add, p, numbers, 0));
    FAILS(cudaEventElapsedTime(&milliseconds, start, end), cudaErrorNotReady);
    SUCCEEDS(cudaEventSynchronize(end));
    check(kernels() == 6, "an event waits for what stands before it");
    SUCCEEDS(cudaEventElapsedTime(&milliseconds, start, end));
    check(milliseconds >= 0 && milliseconds < 1e4f, "%g ms", (double)milliseconds);
    SUCCEEDS(cudaEventDestroy(start));
    SUCCEEDS(cudaEventDestroy(end));
    SUCCEEDS(cudaStreamDestroy(a));
    SUCCEEDS(cudaStreamDestroy(b));
    SUCCEEDS(cudaFree(p));
    SUCCEEDS(cudaFree(q));
    check(kernels() == 7 && cuda_model_count().handles == 0, "nothing is left");
}

void test_memory()
{
    uint8_t *p, host[64];
    cudaPointerAttributes attributes;
    cuda_model_settings.memory = 10000;
    SUCCEEDS(cudaMalloc(&p, 100));
    check(cuda_model_count().bytes == 100 && cuda_model_count().allocations == 1,
          "counts of memory");
    SUCCEEDS(cudaMemcpy(host, p + 36, 64, cudaMemcpyDeviceToHost));
    check(host[0] == 0xff && host[63] == 0xff, "memory is full of 0xFF");
    SUCCEEDS(cudaPointerGetAttributes(&attributes, p + 99));
    check(attributes.type == cudaMemoryTypeDevice && attributes.device == 0 &&
              attributes.devicePointer == p + 99,
          "inside");
    SUCCEEDS(cudaPointerGetAttributes(&attributes, p + 100));
    check(attributes.type == cudaMemoryTypeUnregistered, "behind");
    SUCCEEDS(cudaPointerGetAttributes(&attributes, host));
    check(attributes.type == cudaMemoryTypeUnregistered && !attributes.devicePointer, "the host's");
    uint8_t *pinned;
    SUCCEEDS(cudaMallocHost(&pinned, 10));
    SUCCEEDS(cudaPointerGetAttributes(&attributes, pinned + 5));
    check(attributes.type == cudaMemoryTypeHost, "pinned");
    SUCCEEDS(cudaMemcpy(p, pinned, 10, cudaMemcpyHostToDevice));
    FAILS(cudaFree(pinned), cudaErrorInvalidValue);
    SUCCEEDS(cudaFreeHost(pinned));

    void *big = host;
    FAILS(cudaMalloc(&big, 9901), cudaErrorMemoryAllocation);
    check(!big && cudaPeekAtLastError() == cudaErrorMemoryAllocation, "the last error");
    FAILS(cudaGetLastError(), cudaErrorMemoryAllocation);
    SUCCEEDS(cudaGetLastError());
    SUCCEEDS(cudaMalloc(&big, 0));
    SUCCEEDS(cudaFree(big));
    FAILS(cudaMalloc(&big, SIZE_MAX), cudaErrorMemoryAllocation);

    FAILS(cudaMemcpy(p, host, 101, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(p + 90, host, 11, cudaMemcpyDefault), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(host, host, 4, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(host, p, 4, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(host, p, 4, cudaMemcpyHostToHost), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(nullptr, p, 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    SUCCEEDS(cudaMemcpy(host, p, 4, cudaMemcpyDefault));
    SUCCEEDS(cudaMemcpy(nullptr, nullptr, 0, cudaMemcpyDeviceToHost));
    FAILS(cudaMemset(p + 50, 0, 51), cudaErrorInvalidValue);
    FAILS(cudaMemset(host, 0, 4), cudaErrorInvalidValue);
    FAILS(cudaFree(p + 1), cudaErrorInvalidValue);
    FAILS(cudaFree(host), cudaErrorInvalidValue);

    cudaStream_t stream;
    SUCCEEDS(cudaStreamCreate(&stream));
    uint8_t *q;
    SUCCEEDS(cudaMallocAsync(&q, 8, stream));
    SUCCEEDS(cudaMemsetAsync(q, 3, 8, stream));
    SUCCEEDS(cudaMemcpyAsync(p, q, 8, cudaMemcpyDeviceToDevice, stream));
    SUCCEEDS(cudaFreeAsync(q, stream));
    check(cuda_model_count().allocations == 2, "cudaFreeAsync waits for its turn");
    SUCCEEDS(cudaStreamSynchronize(stream));
    SUCCEEDS(cudaMemcpy(host, p, 9, cudaMemcpyDeviceToHost));
    check(host[7] == 3 && host[8] == 0xff && cuda_model_count().allocations == 1, "work in order");
    FAILS(cudaFreeAsync(q, stream), cudaErrorInvalidValue);
    SUCCEEDS(cudaStreamDestroy(stream));
    SUCCEEDS(cudaFree(p));
    check(cuda_model_count().bytes == 0, "all is freed");
}

void nothing(int) {}

void test_launch_limits()
{
    const auto launch = [](dim3 grid, dim3 block, size_t shared) {
        const cudaLaunchConfig_t c = config(grid, block, shared);
        return cudaLaunchKernelEx(&c, nothing, 0);
    };
    FAILS(launch(0, 1, 0), cudaErrorInvalidConfiguration);
    FAILS(launch(dim3(1, 65536), 1, 0), cudaErrorInvalidConfiguration);
    FAILS(launch(1, dim3(1, 0), 0), cudaErrorInvalidConfiguration);
    FAILS(launch(1, 1025, 0), cudaErrorInvalidConfiguration);
    FAILS(launch(1, dim3(32, 33), 0), cudaErrorInvalidConfiguration);
    FAILS(launch(1, dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration);
    SUCCEEDS(launch(dim3(2, 2, 2), dim3(16, 1, 64), 48 << 10));
    FAILS(launch(1, 1, (48 << 10) + 1), cudaErrorInvalidValue);
    SUCCEEDS(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10));
    SUCCEEDS(launch(1, 1, 100 << 10));
    FAILS(launch(1, 1, (100 << 10) + 1), cudaErrorInvalidValue);
    FAILS(
        cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1),
        cudaErrorInvalidValue);
    cudaLaunchConfig_t c = config(1, 1, 0, (cudaStream_t)&c);
    FAILS(cudaLaunchKernelEx(&c, nothing, 0), cudaErrorInvalidResourceHandle);
    SUCCEEDS(cudaDeviceSynchronize());
    check(kernels() == 2 && cuda_model_count().launches == 11, "counts of launches");
}

void test_capture()
{
    cudaStream_t stream, other;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamCaptureStatus status;
    int *p, *scratch, got = 0;
    const Numbers numbers = {{5}};
    SUCCEEDS(cudaStreamCreate(&stream));
    SUCCEEDS(cudaStreamCreate(&other));
    SUCCEEDS(cudaMalloc(&p, 4));
    SUCCEEDS(cudaMemset(p, 0, 4));
    const cudaLaunchConfig_t in = config(1, 1, 0, stream), in_null = config(1, 1, 0);

    SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    SUCCEEDS(cudaLaunchKernelEx(&in, add, p, numbers, 0));
    SUCCEEDS(cudaMallocAsync(&scratch, 4, stream));
    SUCCEEDS(cudaMemcpyAsync(&got, scratch, 4, cudaMemcpyDeviceToHost, stream));
    SUCCEEDS(cudaMemsetAsync(scratch, 0, 4, stream)); /* and -1 again in the next run */
    SUCCEEDS(cudaFreeAsync(scratch, stream));
    SUCCEEDS(cudaStreamIsCapturing(stream, &status));
    check(status == cudaStreamCaptureStatusActive, "capturing");
    SUCCEEDS(cudaStreamEndCapture(stream, &graph));
    SUCCEEDS(cudaStreamIsCapturing(stream, &status));
    check(status == cudaStreamCaptureStatusNone, "not capturing");
    SUCCEEDS(cudaGraphInstantiate(&exec, graph));
    SUCCEEDS(cudaGraphDestroy(graph));
    SUCCEEDS(cudaStreamSynchronize(stream));
    check(kernels() == 0, "a capture runs nothing");
    for (int n = 1; n <= 3; n++) {
        SUCCEEDS(cudaGraphLaunch(exec, n == 2 ? other : stream));
        check(kernels() == (uint64_t)n - 1, "a graph is as lazy as other work");
        SUCCEEDS(cudaDeviceSynchronize());
        check(got == -1 && kernels() == (uint64_t)n, "memory of the graph is filled again");
    }
    SUCCEEDS(cudaMemcpy(&got, p, 4, cudaMemcpyDeviceToHost));
    check(got == 15, "three runs of the graph: %d", got);
    check(cuda_model_count().allocations == 2, "the graph keeps its memory");
    SUCCEEDS(cudaGraphExecDestroy(exec));
    check(cuda_model_count().allocations == 1, "and frees it");

    /* What is not permitted ends the capture. */
    void *memory;
    cudaError_t (*const forbidden[])(int *, cudaStream_t) = {
        [](int *x, cudaStream_t) { return cudaMalloc(&x, 4); },
        [](int *x, cudaStream_t) { return cudaFree(x); },
        [](int *x, cudaStream_t) { return cudaMemcpy(x, x, 4, cudaMemcpyDeviceToDevice); },
        [](int *x, cudaStream_t) { return cudaMemset(x, 0, 4); },
        [](int *, cudaStream_t) { return cudaDeviceSynchronize(); },
        [](int *, cudaStream_t s) { return cudaStreamSynchronize(s); },
        [](int *, cudaStream_t) { return cudaStreamSynchronize(nullptr); },
    };
    for (const auto &call : forbidden) {
        SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        FAILS(call(p, stream), cudaErrorStreamCaptureUnsupported);
        SUCCEEDS(cudaStreamIsCapturing(stream, &status));
        check(status == cudaStreamCaptureStatusInvalidated, "invalidated");
        FAILS(cudaLaunchKernelEx(&in, add, p, numbers, 0), cudaErrorStreamCaptureInvalidated);
        FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
        check(!graph, "no graph");
    }
    SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    SUCCEEDS(cudaMalloc(&memory, 4));
    FAILS(cudaLaunchKernelEx(&in_null, add, p, numbers, 0), cudaErrorStreamCaptureImplicit);
    FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
    SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    FAILS(cudaFreeAsync(memory, stream), cudaErrorInvalidValue);
    FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
    FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorInvalidValue);
    FAILS(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal),
          cudaErrorStreamCaptureUnsupported);

    cudaEvent_t event;
    SUCCEEDS(cudaEventCreate(&event));
    SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    SUCCEEDS(cudaEventRecord(event, stream));
    FAILS(cudaEventSynchronize(event), cudaErrorCapturedEvent);
    FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
    SUCCEEDS(cudaEventDestroy(event));
    SUCCEEDS(cudaFree(memory));
    SUCCEEDS(cudaFree(p));
    SUCCEEDS(cudaStreamDestroy(stream));
    SUCCEEDS(cudaStreamDestroy(other));
}

void test_planned_failures()
{
    void *p = nullptr, *q = nullptr;
    cuda_model_fail_call(2, cudaErrorUnknown);
    SUCCEEDS(cudaMalloc(&p, 8));
    FAILS(cudaMalloc(&q, 8), cudaErrorUnknown);
    SUCCEEDS(cudaMemset(p, 0, 8));
    check(!q && cuda_model_count().calls == 3, "a call that fails does nothing");
    cuda_model_fail_call(1, cudaErrorLaunchFailure);
    FAILS(cudaFree(p), cudaErrorLaunchFailure);
    check(cuda_model_count().allocations == 0, "but what releases releases");
    cuda_model_fail_launch(2, cudaErrorLaunchOutOfResources);
    const cudaLaunchConfig_t c = config(1, 1, 0);
    SUCCEEDS(cudaLaunchKernelEx(&c, nothing, 0));
    FAILS(cudaLaunchKernelEx(&c, nothing, 0), cudaErrorLaunchOutOfResources);
    SUCCEEDS(cudaLaunchKernelEx(&c, nothing, 0));
    cuda_model_fail_call(1, cudaErrorUnknown);
    cuda_model_fail_call(0, 0);
    SUCCEEDS(cudaDeviceSynchronize());
    check(kernels() == 2, "two of three launches");
}

void wrong() { __syncwarp(1); }

void test_sticky_error()
{
    cudaStream_t stream;
    void *p, *q;
    cuda_model_settings.quiet = true;
    SUCCEEDS(cudaStreamCreate(&stream));
    SUCCEEDS(cudaMalloc(&p, 8));
    SUCCEEDS(cudaMallocAsync(&q, 8, stream));
    const cudaLaunchConfig_t c = config(1, 32, 0, stream);
    SUCCEEDS(cudaLaunchKernelEx(&c, wrong));
    SUCCEEDS(cudaLaunchKernelEx(&c, nothing, 0));
    SUCCEEDS(cudaFreeAsync(q, stream));
    SUCCEEDS(cudaPeekAtLastError());
    FAILS(cudaStreamSynchronize(stream), cudaErrorLaunchFailure);
    check(kernels() == 1, "nothing runs after the error");
    FAILS(cudaLaunchKernelEx(&c, nothing, 0), cudaErrorLaunchFailure);
    FAILS(cudaFree(p), cudaErrorLaunchFailure);
    FAILS(cudaStreamDestroy(stream), cudaErrorLaunchFailure);
    check(cuda_model_count().bytes == 0 && cuda_model_count().handles == 0,
          "what releases releases after it");
}

void test_devices()
{
    int n = -1;
    SUCCEEDS(cudaGetDeviceCount(&n));
    check(n == 1, "one device");
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrComputeCapabilityMajor, 0));
    check(n == 9, "compute capability");
    cuda_model_settings.major = 8;
    cuda_model_settings.minor = 6;
    cuda_model_settings.multiprocessors = 17;
    cuda_model_settings.shared_memory = 99 << 10;
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrComputeCapabilityMajor, 0));
    check(n == 8, "compute capability");
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrComputeCapabilityMinor, 0));
    check(n == 6, "compute capability");
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
    check(n == 17, "multiprocessors");
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    check(n == 99 << 10, "shared memory");
    FAILS(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 1), cudaErrorInvalidDevice);
    FAILS(cudaSetDevice(1), cudaErrorInvalidDevice);
    cuda_model_settings.devices = 2;
    SUCCEEDS(cudaSetDevice(1));
    SUCCEEDS(cudaGetDevice(&n));
    check(n == 1, "the current device");
    cuda_model_settings.devices = 0;
    FAILS(cudaGetDeviceCount(&n), cudaErrorNoDevice);
    check(n == 0, "no device");
    check(!strcmp(cudaGetErrorName(cudaErrorNoDevice), "cudaErrorNoDevice") &&
              !strcmp(cudaGetErrorString(cudaErrorInvalidValue), "invalid argument"),
          "names of errors");
}

/* ---- What the address sanitizer sees ------------------------------------------------------ */

/* True when a child that does this ends with an error. */
bool dies(void (*body)())
{
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr))
            _exit(0);
        body();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status != 0;
}

void test_sanitizer()
{
#if defined(__SANITIZE_ADDRESS__)
    const bool sanitizer = true;
#elif defined(__has_feature)
    const bool sanitizer = __has_feature(address_sanitizer);
#else
    const bool sanitizer = false;
#endif
    if (!sanitizer)
        return;
    typedef void (*Kernel)(uint8_t *);
    const Kernel last_byte = [](uint8_t *) { shared_memory()[99] = 1; };
    const Kernel behind_shared = [](uint8_t *) { shared_memory()[100] = 1; };
    const Kernel behind_global = [](uint8_t *x) { x[5] = 1; };
    static Kernel kernel;
    const auto kernel_dies = [&](Kernel k) {
        kernel = k;
        return dies([] {
            Device<uint8_t> x(5);
            run(1, 32, 100, kernel, x.p);
        });
    };
    check(!kernel_dies(last_byte), "the last byte of shared memory is there");
    check(kernel_dies(behind_shared), "a byte behind shared memory");
    check(kernel_dies(behind_global), "a byte behind device memory");
    const bool host_dies = dies([] {
        Device<uint8_t> x(5);
        x.p[0] = 1;
    });
    check(host_dies, "the host writes to device memory");
    const bool late_dies = dies([] {
        int *p;
        cudaStream_t stream;
        const Numbers numbers = {};
        cudaStreamCreate(&stream);
        cudaMalloc(&p, 4);
        cudaFreeAsync(p, stream);
        const cudaLaunchConfig_t c = config(1, 1, 0, stream);
        cudaLaunchKernelEx(&c, add, p, numbers, 0);
        cudaStreamSynchronize(stream);
    });
    check(late_dies, "a kernel after cudaFreeAsync");
}

} // namespace

int main()
{
    struct Test {
        const char *name;
        void (*run)();
    };
    const Test in_every_mode[] = {
        {"indices", test_indices},
        {"shuffles", test_shuffles},
        {"reductions", test_reductions},
        {"block barriers", test_block_barriers},
        {"returned threads", test_returned_threads},
        {"ldmatrix", test_ldmatrix},
        {"mma_s8", test_mma_s8},
        {"mma_f16", test_mma_f16},
        {"copy_async", test_copy_async},
        {"wgmma", test_wgmma},
        {"e4m3 codes", test_every_e4m3_code},
        {"late products", test_late_products},
        {"ring", test_ring},
        {"late bulk copy", test_late_bulk_copy},
        {"named barriers", test_named_barriers},
        {"blocks", test_blocks},
        {"races", test_races_show},
        {"deadlocks", test_deadlocks},
        {"misuse", test_misuse},
    };
    const Test once[] = {
        {"arithmetic", test_arithmetic},
        {"conversions", test_conversions},
        {"orders", test_orders},
        {"streams", test_streams},
        {"memory", test_memory},
        {"launch limits", test_launch_limits},
        {"capture", test_capture},
        {"planned failures", test_planned_failures},
        {"sticky error", test_sticky_error},
        {"devices", test_devices},
        {"sanitizer", test_sanitizer},
    };
    const auto run_test = [](const Test &test, int late, uint64_t seed) {
        cuda_model_reset();
        cuda_model_settings.late = late;
        cuda_model_settings.seed = seed;
        random_state = 1;
        where = std::string(test.name) + ", late " + std::to_string(late) + ", seed " +
                std::to_string(seed);
        test.run();
    };
    for (int late = 0; late < 3; late++)
        for (unsigned seed : {0u, 1u, 2u, 3u})
            for (const Test &test : in_every_mode)
                run_test(test, late, seed);
    for (const Test &test : once)
        run_test(test, 0, 0);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
