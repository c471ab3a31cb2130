/* SPDX-License-Identifier: Apache-2.0 */
/* dpbf16.c: the sums of common/bf16.h beside the processor's, bit for bit, over two million random
 * ones of each kind. Exit status 77: this processor does not have it.
 *
 *     test_dpbf16 fma           both orders, by scalar multiply-adds under MXCSR's DAZ and FTZ
 *     test_dpbf16 vdpbf16ps     one order by its instruction
 *     test_dpbf16 tdpbf16ps     the other, likewise
 *     test_dpbf16 vcvtneps2bf16 elements */
#define _DEFAULT_SOURCE /* syscall */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/bf16.h"

enum { SKIPPED = 77, SUMS = 1 << 21, LANES = 16, KINDS = 9 };

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- Numbers ---- */

static uint64_t state = 1;

static uint32_t draw(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static uint32_t below(uint32_t n) { return (uint32_t)((uint64_t)draw() * n >> 32); }

static uint16_t element(int kind)
{
    static const struct {
        uint32_t first, count;
    } exponents[KINDS] = {
        {117, 20}, /* as in a model */
        {126, 2},  /* alike: sums that round */
        {0, 256},  /* any, infinity and NaN too */
        {0, 255},  /* any finite */
        {40, 50},  /* products about 2^-126 */
        {62, 4},   /* the same, closely */
        {180, 20}, /* products about 2^127 */
        {0, 3},    /* subnormal and next to it */
        {51, 3},   /* products about 2^-151, which decide whether 2^-126 is flushed */
    };
    const int of = kind == 7 && draw() % 2 ? 3 : kind;
    const uint32_t exponent = exponents[of].first + below(exponents[of].count);
    const uint32_t digits =
        draw() % 4 ? 0x7f : 0x07; /* few digits: sums that are exact, and ties */
    return (uint16_t)((draw() & 0x8000u) | exponent << 7 | (draw() & digits));
}

static float product(uint16_t a, uint16_t b)
{
    return sparge_bf16_to_f32(a) * sparge_bf16_to_f32(b);
}

/* What the products are added to: often what cancels one of them, but for its last bits. */
static float addend(const uint16_t *a, const uint16_t *b)
{
    const uint32_t which = below(7);
    const float close = -product(a[which % 2], b[which % 2]);
    if (which < 2)
        return sparge_bits_float(sparge_float_bits(close) ^ below(4));
    if (which == 2)
        return ldexpf(close, (int)below(60) - 30);
    if (which == 3)
        return sparge_bits_float(draw() & 0x80ffffffu); /* small */
    if (which == 4)
        return sparge_bits_float((draw() & 0x80000000u) | (0x00800000u + below(3))); /* 2^-126 */
    return which == 5 ? sparge_bits_float(draw()) : 0.0f;
}

/* n elements, now and then pairs that cancel, and what they are added to. */
static float fill(int kind, uint16_t *a, uint16_t *b, int64_t n)
{
    for (int64_t e = 0; e < n; e++) {
        a[e] = element(kind);
        b[e] = element(kind);
        if (e && draw() % 4 == 0) {
            a[e] = a[e - 1] ^ 0x8000u;
            b[e] = (uint16_t)(b[e - 1] ^ draw() % 2);
        }
    }
    return addend(a, b);
}

static bool same(float a, float b)
{
    return sparge_float_bits(a) == sparge_float_bits(b) || (a != a && b != b);
}

static int differs(const char *what, int kind, int64_t n, const uint16_t *a, const uint16_t *b,
                   float c, float got, float want)
{
    printf("%s, kind %d: %a + the sum of", what, kind, (double)c);
    for (int64_t e = 0; e < n; e++)
        printf(" %04x*%04x", a[e], b[e]);
    printf(" is %a (%08x), bf16.h says %a (%08x)\n", (double)got, sparge_float_bits(got),
           (double)want, sparge_float_bits(want));
    return 1;
}

/* ---- Scalar multiply-adds under MXCSR ---- */

static float flushed_fma(float a, float b, float c)
{
    static const uint32_t flush = 0x9fc0, usual = 0x1f80; /* DAZ and FTZ; neither */
    __asm__ volatile("ldmxcsr %3\n\tvfmadd231ss %2, %1, %0\n\tldmxcsr %4"
                     : "+x"(c)
                     : "x"(a), "x"(b), "m"(flush), "m"(usual));
    return c;
}

static float at(const uint16_t *x, int64_t e, int64_t n)
{
    return e < n ? sparge_bf16_to_f32(x[e]) : 0.0f;
}

/* Intel's pseudo code. What is not there is 0. */
static float by_pairs(float c, const uint16_t *a, const uint16_t *b, int64_t n)
{
    for (int64_t i = 0; 2 * i < n; i++) {
        c = flushed_fma(at(a, 2 * i + 1, n), at(b, 2 * i + 1, n), c);
        c = flushed_fma(at(a, 2 * i, n), at(b, 2 * i, n), c);
    }
    return c;
}

static float by_tiles(float c, const uint16_t *a, const uint16_t *b, int64_t n)
{
    for (int64_t first = 0; first < n; first += 32) {
        float temp[2] = {0.0f, 0.0f};
        for (int64_t k = first / 2; k < first / 2 + 16; k++) {
            temp[0] = flushed_fma(at(a, 2 * k, n), at(b, 2 * k, n), temp[0]);
            temp[1] = flushed_fma(at(a, 2 * k + 1, n), at(b, 2 * k + 1, n), temp[1]);
        }
        c = flushed_fma(1.0f, c, flushed_fma(1.0f, temp[0], temp[1]));
    }
    return c;
}

/* A zero has no sign where zeros fill up. */
static int test_fma(void)
{
    if (!__builtin_cpu_supports("fma"))
        return SKIPPED;
    for (int64_t s = 0; s < SUMS / 16; s++) {
        uint16_t a[70], b[70];
        const int kind = (int)(s % KINDS);
        const int64_t n = 1 + below(s % 3 ? 70 : 4);
        const float c = fill(kind, a, b, n);
        const float pairs = sparge_bf16_dot(c, a, b, 1, n, SPARGE_VDPBF16PS);
        const float tiles = sparge_bf16_dot(c, a, b, 1, n, SPARGE_TDPBF16PS);
        const float want_pairs = by_pairs(c, a, b, n), want_tiles = by_tiles(c, a, b, n);
        if (!same(pairs + 0.0f, want_pairs + 0.0f))
            return differs("pairs by fma", kind, n, a, b, c, want_pairs, pairs);
        if (!same(tiles + 0.0f, want_tiles + 0.0f))
            return differs("tiles by fma", kind, n, a, b, c, want_tiles, tiles);
    }
    return 0;
}

/* ---- The instructions ---- */

enum { AVX512_BF16 = 1 << 5, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 }; /* 7.1 eax; 7 edx, edx */

static bool has_avx512_bf16(void)
{
    unsigned eax, ebx, ecx, edx;
    return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
           eax & AVX512_BF16;
}

/* The kernel gives the room for tiles to who asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA). */
static bool has_amx_bf16(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx & AMX_BF16 && edx & AMX_TILE &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

static int test_vdpbf16ps(void)
{
    if (!has_avx512_bf16())
        return SKIPPED;
    for (int64_t s = 0; s < SUMS / LANES; s++) {
        uint16_t a[2 * LANES], b[2 * LANES];
        float c[LANES], got[LANES];
        const int kind = (int)(s % KINDS);
        for (int lane = 0; lane < LANES; lane++)
            c[lane] = fill(kind, a + 2 * lane, b + 2 * lane, 2);
        __asm__ volatile("vmovups (%1), %%zmm0\n\tvmovups (%2), %%zmm1\n\tvmovups (%3), %%zmm2\n\t"
                         "vdpbf16ps %%zmm2, %%zmm1, %%zmm0\n\tvmovups %%zmm0, (%0)\n\tvzeroupper"
                         :
                         : "r"(got), "r"(c), "r"(a), "r"(b)
                         : "xmm0", "xmm1", "xmm2", "memory");
        for (int lane = 0; lane < LANES; lane++) {
            const uint16_t *of_a = a + 2 * lane, *of_b = b + 2 * lane;
            const float want = sparge_bf16_dot(c[lane], of_a, of_b, 1, 2, SPARGE_VDPBF16PS);
            if (!same(got[lane], want))
                return differs("vdpbf16ps", kind, 2, of_a, of_b, c[lane], got[lane], want);
        }
    }
    return 0;
}

/* C [16][16] += A [16][32] B [16 pairs][16][2] */
static int test_tdpbf16ps(void)
{
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1, .row_bytes = {64, 64, 64}, .rows = {16, 16, 16}};
    if (!has_amx_bf16())
        return SKIPPED;
    for (int64_t s = 0; s < SUMS / (LANES * LANES); s++) {
        uint16_t a[LANES][32], b[LANES][LANES][2], of_b[32];
        float c[LANES][LANES], got[LANES][LANES];
        const int kind = (int)(s % KINDS);
        for (int m = 0; m < LANES; m++) {
            fill(kind, a[m], b[m][0], 32);
            for (int n = 0; n < LANES; n++)
                c[m][n] = addend(a[m], b[0][n]);
        }
        memcpy(got, c, sizeof got);
        __asm__ volatile("ldtilecfg %0\n\ttileloadd (%1, %4, 1), %%tmm0\n\t"
                         "tileloadd (%2, %4, 1), %%tmm1\n\ttileloadd (%3, %4, 1), %%tmm2\n\t"
                         "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n\ttilestored %%tmm0, (%1, %4, 1)\n\t"
                         "tilerelease"
                         :
                         : "m"(config), "r"(got), "r"(a), "r"(b), "r"((int64_t)64)
                         : "memory");
        for (int m = 0; m < LANES; m++)
            for (int n = 0; n < LANES; n++) {
                for (int e = 0; e < 32; e++)
                    of_b[e] = b[e / 2][n][e % 2];
                const float want = sparge_bf16_dot(c[m][n], a[m], of_b, 1, 32, SPARGE_TDPBF16PS);
                if (!same(got[m][n], want))
                    return differs("tdpbf16ps", kind, 32, a[m], of_b, c[m][n], got[m][n], want);
            }
    }
    return 0;
}

/* About every place where rounding, infinity or flushing begins, and at random. */
static int test_vcvtneps2bf16(void)
{
    if (!has_avx512_bf16())
        return SKIPPED;
    for (uint32_t s = 0; s < SUMS / LANES; s++) {
        float x[LANES];
        uint16_t got[LANES];
        for (uint32_t lane = 0; lane < LANES; lane++)
            x[lane] = sparge_bits_float(s % 2 ? draw() : (s / 2 << 16) + 0x7ff8u + lane);
        __asm__ volatile("vmovups (%1), %%zmm0\n\tvcvtneps2bf16 %%zmm0, %%ymm1\n\t"
                         "vmovups %%ymm1, (%0)\n\tvzeroupper"
                         :
                         : "r"(got), "r"(x)
                         : "xmm0", "xmm1", "memory");
        for (int lane = 0; lane < LANES; lane++)
            if (got[lane] != sparge_bf16_of(x[lane])) {
                printf("vcvtneps2bf16: %a is %04x, bf16.h says %04x\n", (double)x[lane], got[lane],
                       sparge_bf16_of(x[lane]));
                return 1;
            }
    }
    return 0;
}
#else
static int test_fma(void) { return SKIPPED; }
static int test_vdpbf16ps(void) { return SKIPPED; }
static int test_tdpbf16ps(void) { return SKIPPED; }
static int test_vcvtneps2bf16(void) { return SKIPPED; }
#endif

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(void);
    } tests[] = {{"fma", test_fma},
                 {"vdpbf16ps", test_vdpbf16ps},
                 {"tdpbf16ps", test_tdpbf16ps},
                 {"vcvtneps2bf16", test_vcvtneps2bf16}};
    for (size_t n = 0; argc == 2 && n < sizeof tests / sizeof *tests; n++)
        if (strcmp(argv[1], tests[n].name) == 0) {
            const int status = tests[n].run();
            printf("%s: %s\n", tests[n].name,
                   status == 0         ? "the same bits"
                   : status == SKIPPED ? "not on this machine"
                                       : "FAILED");
            return status;
        }
    fprintf(stderr, "usage: %s fma|vdpbf16ps|tdpbf16ps|vcvtneps2bf16\n", argv[0]);
    return 2;
}
