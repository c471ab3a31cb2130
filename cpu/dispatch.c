/* SPDX-License-Identifier: Apache-2.0 */
/* dispatch.c: which instruction sets this processor and this operating system have, and their
 * kernels. */
#include <stdatomic.h>

#include "cpu/cpu.h"
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* Bits of CPUID: Intel's Software Developer's Manual, volume 2, CPUID. */
enum { FMA = 1 << 12, OSXSAVE = 1 << 27, AVX = 1 << 28, F16C = 1 << 29 };          /* leaf 1, ecx */
enum { AVX2 = 1 << 5, AVX512F = 1 << 16, AVX512DQ = 1 << 17, AVX512BW = 1 << 30 }; /* leaf 7, ebx */
enum { AVX512VNNI = 1 << 11 };                                                     /* leaf 7, ecx */
enum { AVXVNNI = 1 << 4 };                 /* leaf 7.1, eax */
enum { YMM = 0x6, ZMM = 0xe6 };            /* XCR0: registers that the operating system saves */
static const unsigned AVX512VL = 1u << 31; /* leaf 7, ebx */

static unsigned saved_registers(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool all(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }

static bool detect(sparge_isa isa)
{
    unsigned eax, ebx, ecx, edx, ecx1, eax71 = 0;
    if (isa == SPARGE_ISA_SCALAR)
        return true;
    if (!__get_cpuid(1, &eax, &ebx, &ecx1, &edx) || !all(ecx1, FMA | OSXSAVE | AVX | F16C) ||
        !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
        return false;
    const unsigned saved = saved_registers(), subleaves = eax, ebx7 = ebx, ecx7 = ecx;
    if (subleaves >= 1)
        __get_cpuid_count(7, 1, &eax71, &ebx, &ecx, &edx);
    const bool avx2 = all(saved, YMM) && all(ebx7, AVX2);
    switch (isa) {
    case SPARGE_ISA_AVX2: return avx2;
    case SPARGE_ISA_AVXVNNI: return avx2 && all(eax71, AVXVNNI);
    case SPARGE_ISA_AVX512VNNI:
        return avx2 && all(saved, ZMM) && all(ecx7, AVX512VNNI) &&
               all(ebx7, AVX512F | AVX512DQ | AVX512BW | AVX512VL);
    default: return false;
    }
}
#else
static bool detect(sparge_isa isa) { return isa == SPARGE_ISA_SCALAR; }
#endif

/* A virtual machine traps CPUID, which then takes a good part of a small call: asked once. */
bool sparge_cpu_has(sparge_isa isa)
{
    static atomic_uint known; /* bit isa, and bit 0 once it is */
    unsigned bits = atomic_load_explicit(&known, memory_order_relaxed);
    if (!bits) {
        bits = 1;
        for (sparge_isa each = SPARGE_ISA_SCALAR; each <= SPARGE_ISA_AVX512VNNI; each++)
            bits |= (unsigned)detect(each) << each;
        atomic_store_explicit(&known, bits, memory_order_relaxed);
    }
    return isa >= SPARGE_ISA_SCALAR && isa <= SPARGE_ISA_AVX512VNNI && bits >> isa & 1;
}

sparge_isa sparge_cpu_best(void)
{
    sparge_isa isa = SPARGE_ISA_AVX512VNNI;
    while (!sparge_cpu_has(isa))
        isa--;
    return isa;
}

sparge_kernels sparge_cpu_kernels(sparge_isa isa)
{
    sparge_kernels k;
    sparge_scalar_kernels(&k);
#if defined(__x86_64__)
    if (isa >= SPARGE_ISA_AVX2)
        sparge_avx2_kernels(&k);
    if (isa == SPARGE_ISA_AVXVNNI)
        sparge_avxvnni_kernels(&k);
    if (isa == SPARGE_ISA_AVX512VNNI)
        sparge_avx512vnni_kernels(&k);
#endif
    return k;
}
