/* SPDX-License-Identifier: Apache-2.0 */
/* dispatch.c: which instruction sets this processor, this operating system and this process have,
 * and their kernels. */
#define _DEFAULT_SOURCE 1 /* for syscall */
#include <stdatomic.h>

#include "cpu/cpu.h"
#include "cpu/kernels.h"

/* Who stands in the way of an instruction set. */
typedef enum lack { UNKNOWN, NOTHING, PROCESSOR, SYSTEM, PERMISSION } lack;

#if defined(__x86_64__)
#include <cpuid.h>

/* Bits of CPUID (Intel's Software Developer's Manual, volume 2, CPUID), and of XCR0: registers that
 * the operating system saves. */
typedef struct features {
    unsigned ecx1, ebx7, ecx7, edx7, eax71, saved;
} features;

#define BIT(n)     (1u << (n))
#define OSXSAVE    BIT(27)                                 /* leaf 1, ecx: there is an XCR0 */
#define FLOATS     (BIT(12) | BIT(28) | BIT(29))           /* leaf 1, ecx: FMA, AVX, F16C */
#define AVX2       BIT(5)                                  /* leaf 7, ebx */
#define AVX512     (BIT(16) | BIT(17) | BIT(30) | BIT(31)) /* leaf 7, ebx: F, DQ, BW, VL */
#define AVX512VNNI BIT(11)                                 /* leaf 7, ecx */
#define AMX        (BIT(24) | BIT(25))                     /* leaf 7, edx: TILE, INT8 */
#define AMXBF16    BIT(22)                                 /* leaf 7, edx */
#define AVXVNNI    BIT(4)                                  /* leaf 7.1, eax */
#define AVX512BF16 BIT(5)                                  /* leaf 7.1, eax */
#define YMM        (BIT(1) | BIT(2))
#define ZMM        (YMM | BIT(5) | BIT(6) | BIT(7))
#define TILES      (BIT(17) | BIT(18)) /* configuration, data */

static const features needed[SPARGE_ISAS] = {
    [SPARGE_ISA_AVX2] = {.ecx1 = FLOATS, .ebx7 = AVX2, .saved = YMM},
    [SPARGE_ISA_AVXVNNI] = {.ecx1 = FLOATS, .ebx7 = AVX2, .eax71 = AVXVNNI, .saved = YMM},
    [SPARGE_ISA_AVX512VNNI] = {.ecx1 = FLOATS,
                               .ebx7 = AVX2 | AVX512,
                               .ecx7 = AVX512VNNI,
                               .saved = ZMM},
    [SPARGE_ISA_AMX] = {.ecx1 = FLOATS,
                        .ebx7 = AVX2 | AVX512,
                        .ecx7 = AVX512VNNI,
#ifndef SPARGE_AMX_SHIM /* whose tiles are memory */
                        .edx7 = AMX,
                        .saved = ZMM | TILES},
#else
                        .saved = ZMM},
#endif
};

/* Beside these, where there are products of bf16. */
static const features needed_by_bf16[SPARGE_ISAS] = {
    [SPARGE_ISA_AVX512VNNI] = {.eax71 = AVX512BF16},
#ifndef SPARGE_AMX_SHIM
    [SPARGE_ISA_AMX] = {.edx7 = AMXBF16},
#endif
};

static unsigned saved_registers(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static features found(void)
{
    features x = {0};
    unsigned subleaves = 0, eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx))
        x.ecx1 = ecx;
    if (__get_cpuid_count(7, 0, &subleaves, &ebx, &ecx, &edx)) {
        x.ebx7 = ebx;
        x.ecx7 = ecx;
        x.edx7 = edx;
    }
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx))
        x.eax71 = eax;
    if (x.ecx1 & OSXSAVE)
        x.saved = saved_registers();
    return x;
}

/* Linux gives the data of tiles to a process that asks (Documentation/arch/x86/xstate.rst). It does
 * not where a thread has an alternate signal stack that they would not fit. */
#if defined(SPARGE_AMX_SHIM)
static bool tiles_permitted(void) { return true; }
#elif defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
static bool tiles_permitted(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
static bool tiles_permitted(void) { return false; }
#endif

static bool all(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }

static bool has_all(const features *x, const features *need)
{
    return all(x->ecx1, need->ecx1) && all(x->ebx7, need->ebx7) && all(x->ecx7, need->ecx7) &&
           all(x->edx7, need->edx7) && all(x->eax71, need->eax71);
}

static bool detect_bf16(sparge_isa isa)
{
    const features x = found();
    return isa >= SPARGE_ISA_AVX512VNNI && has_all(&x, &needed_by_bf16[isa]);
}

static lack detect(sparge_isa isa)
{
    const features x = found(), *need = &needed[isa];
    if (!has_all(&x, need))
        return PROCESSOR;
    if (!all(x.saved, need->saved))
        return SYSTEM;
    return isa == SPARGE_ISA_AMX && !tiles_permitted() ? PERMISSION : NOTHING;
}
#else
static lack detect(sparge_isa isa) { return isa == SPARGE_ISA_SCALAR ? NOTHING : PROCESSOR; }
static bool detect_bf16(sparge_isa isa)
{
    (void)isa;
    return false;
}
#endif

/* A virtual machine traps CPUID, which then takes a good part of a small call, and what is
 * permitted cannot be given back: each is asked once, and only when somebody asks for it. */
const char *sparge_cpu_lacks(sparge_isa isa)
{
    static const char *const sentence[] = {
        [NOTHING] = NULL,
        [PROCESSOR] = "which this processor lacks",
        [SYSTEM] = "whose registers this operating system does not save",
        [PERMISSION] = "whose registers this process may not use: arch_prctl refuses them",
    };
    static _Atomic(lack) known[SPARGE_ISAS];
    if (isa < SPARGE_ISA_SCALAR || isa >= SPARGE_ISAS)
        return sentence[PROCESSOR];
    lack answer = atomic_load_explicit(&known[isa], memory_order_relaxed);
    if (answer == UNKNOWN) {
        answer = detect(isa);
        atomic_store_explicit(&known[isa], answer, memory_order_relaxed);
    }
    return sentence[answer];
}

bool sparge_cpu_has(sparge_isa isa) { return !sparge_cpu_lacks(isa); }

bool sparge_cpu_has_bf16(sparge_isa isa)
{
    static _Atomic(lack) known[SPARGE_ISAS];
    if (!sparge_cpu_has(isa))
        return false;
    lack answer = atomic_load_explicit(&known[isa], memory_order_relaxed);
    if (answer == UNKNOWN) {
        answer = detect_bf16(isa) ? NOTHING : PROCESSOR;
        atomic_store_explicit(&known[isa], answer, memory_order_relaxed);
    }
    return answer == NOTHING;
}

sparge_isa sparge_cpu_best(bool bf16)
{
    sparge_isa isa = SPARGE_ISAS - 1;
    while (isa > SPARGE_ISA_AUTO && !(bf16 ? sparge_cpu_has_bf16(isa) : sparge_cpu_has(isa)))
        isa--;
    return isa;
}

sparge_kernels sparge_cpu_kernels(sparge_isa isa)
{
    sparge_kernels k = {0};
    sparge_scalar_kernels(&k);
#if defined(__x86_64__)
    if (isa >= SPARGE_ISA_AVX2)
        sparge_avx2_kernels(&k);
    if (isa == SPARGE_ISA_AVXVNNI)
        sparge_avxvnni_kernels(&k);
    if (isa >= SPARGE_ISA_AVX512VNNI)
        sparge_avx512vnni_kernels(&k);
    if (isa == SPARGE_ISA_AMX)
        sparge_amx_kernels(&k);
#endif
    return k;
}
