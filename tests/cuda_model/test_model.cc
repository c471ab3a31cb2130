/* SPDX-License-Identifier: Apache-2.0 */
/* test_model.cc: what only a model has: late modes, orders of threads, reports of deadlocks and of
 * mistakes. What it shares with a device, tests/gpu/instructions.cu asks of both. */
#include "tests/cuda_model/test_model.h"
#include "common/num.h"

namespace {

/* The judge of tests/gpu counts on it. */
void test_exp2()
{
    for (float x : {-0.0f, -1e-3f, -0.5f, -3.75f, -125.9f, -126.5f, -1000.0f, -INFINITY})
        check(exp2_fast(x) == sparge_exp2(x), "exp2_fast(%g)", (double)x);
    check(exp2_fast(2.5f) == exp2f(2.5f) && isnan(exp2_fast(NAN)), "exp2_fast above 0");
}

/* ---- Late modes --------------------------------------------------------------------------- */

void test_copy_async()
{
    std::vector<uint32_t> in(3 * 32 * 4);
    for (size_t n = 0; n < in.size(); n++)
        in[n] = (uint32_t)n * 2654435761u + 1;
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

} // namespace

int main()
{
    const Test in_every_mode[] = {
        {"copy_async", test_copy_async},
        {"late products", test_late_products},
        {"late bulk copy", test_late_bulk_copy},
        {"blocks", test_blocks},
        {"races", test_races_show},
        {"deadlocks", test_deadlocks},
        {"misuse", test_misuse},
    };
    std::vector<Test> once = runtime_tests();
    once.push_back({"exp2", test_exp2});
    once.push_back({"orders", test_orders});
    const auto run_test = [](const Test &test, int late, uint64_t seed) {
        cuda_model_reset();
        cuda_model_settings.late = late;
        cuda_model_settings.seed = seed;
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
