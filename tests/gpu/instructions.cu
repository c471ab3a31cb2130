/* SPDX-License-Identifier: Apache-2.0 */
/* instructions.cu: does this device do what ptx.h and hopper.h say? Each instruction by itself,
 * against its plain definition, before any kernel is blamed. One line each: "name: ok", or what
 * differs.
 *
 *   instructions                 all of them; exit 1 if one failed
 *   instructions wgmma_s8 ...    those whose names begin so
 *   instructions --list          their names
 *
 * Products are in products.cu, the language itself in language.cu; here copies, numbers and roles
 * of warps. The host model of CUDA answers the same questions. */
#include "tests/gpu/instructions.h"

namespace {

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
            const bool early = n % 3 == 0; /* bytes that come before they are announced */
            uint64_t *const full = &r.full[n % PLACES];
            if (!early)
                barrier_arrive_expect(full, BLOCK_WORDS * 4);
            for (int half = 0; half < BLOCK_WORDS; half += BLOCK_WORDS / 2)
                copy_bulk(r.place[n % PLACES] + half, blocks + n * BLOCK_WORDS + half,
                          BLOCK_WORDS * 2, full);
            if (early)
                barrier_arrive_expect(full, BLOCK_WORDS * 4);
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

std::vector<question> questions()
{
    std::vector<question> all = product_questions();
    for (const question &q : language_questions())
        all.push_back(q);
    for (const question &q : std::initializer_list<question>{
             {"copy_bulk", true, probe_copy_bulk},
             {"named_barriers", true, probe_named},
             {"setmaxnreg", true, probe_setmaxnreg},
             {"pack_e4m3", true, probe_pack_e4m3},
             {"copy_async", false, probe_copy_async},
             {"exp2_fast", false, probe_exp2},
             {"pack_f16", false, probe_pack_f16},
         })
        all.push_back(q);
    return all;
}

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
    const std::vector<question> probes = questions();
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (const question &p : probes)
            printf("%s\n", p.name);
        return 0;
    }
    int count = 0, failed = 0, asked = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("there is no CUDA device here\n");
        return 77;
    }
    setvbuf(stdout, NULL, _IONBF, 0); /* a probe that hangs or ends all is the one without an end */
    const bool hopper = has_hopper();
    for (const question &p : probes) {
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
