/* SPDX-License-Identifier: Apache-2.0 */
/* dispatch.c: which instruction sets cpu/dispatch.c finds on processors that this machine is not:
 * CPUID and XGETBV are ours here. */
#include "tests/support/check.h"

#include "cpu/cpu.h"
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

typedef struct processor {
    unsigned leaves, ecx1, subleaves, ebx7, ecx7, eax71, saved;
} processor;

static processor here;

static int leaf(unsigned number, unsigned sub, unsigned *eax, unsigned *ebx, unsigned *ecx,
                unsigned *edx)
{
    *eax = number == 1 ? 0 : sub == 1 ? here.eax71 : here.subleaves;
    *ebx = number == 7 && sub == 0 ? here.ebx7 : 0;
    *ecx = number == 1 ? here.ecx1 : sub == 0 ? here.ecx7 : 0;
    *edx = 0;
    return number <= here.leaves;
}

static int leaf_alone(unsigned number, unsigned *eax, unsigned *ebx, unsigned *ecx, unsigned *edx)
{
    return leaf(number, 0, eax, ebx, ecx, edx);
}

#define __get_cpuid       leaf_alone
#define __get_cpuid_count leaf
#define __asm__                 \
    low = here.saved, high = 0; \
    if (0)                      \
    __asm__ /* xgetbv */
#endif
#include "cpu/dispatch.c"
#undef __asm__

void sparge_scalar_kernels(sparge_kernels *k) { k->isa = SPARGE_ISA_SCALAR; }
void sparge_avx2_kernels(sparge_kernels *k) { k->isa = SPARGE_ISA_AVX2; }
void sparge_avxvnni_kernels(sparge_kernels *k) { k->isa = SPARGE_ISA_AVXVNNI; }
void sparge_avx512vnni_kernels(sparge_kernels *k) { k->isa = SPARGE_ISA_AVX512VNNI; }

#if defined(__x86_64__)
/* Everything, as the manual numbers the bits (volume 2, CPUID; volume 1, XCR0). */
static const processor whole = {
    .leaves = 7,
    .ecx1 = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29, /* FMA OSXSAVE AVX F16C */
    .subleaves = 1,
    .ebx7 = 1u << 5 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, /* AVX2 AVX512F DQ BW VL */
    .ecx7 = 1u << 11,                                            /* AVX512_VNNI */
    .eax71 = 1u << 4,                                            /* AVX-VNNI */
    .saved = 1u << 1 | 1u << 2 | 1u << 5 | 1u << 6 | 1u << 7,    /* SSE AVX opmask ZMM */
};

/* Without the bit of *part, this processor has these of AVX2, AVX-VNNI and AVX-512 VNNI. */
static void without(unsigned *part, int bit, bool avx2, bool avxvnni, bool avx512vnni)
{
    const unsigned before = *part;
    *part &= ~(1u << bit);
    check_equal(detect(SPARGE_ISA_SCALAR), true);
    check(detect(SPARGE_ISA_AVX2) == avx2, "AVX2 without bit %d", bit);
    check(detect(SPARGE_ISA_AVXVNNI) == avxvnni, "AVX-VNNI without bit %d", bit);
    check(detect(SPARGE_ISA_AVX512VNNI) == avx512vnni, "AVX-512 VNNI without bit %d", bit);
    *part = before;
}

TestSuite(dispatch);

Test(dispatch, every_bit_is_needed)
{
    here = whole;
    without(&here.ecx1, 0, true, true, true); /* one that nobody asks for */
    for (const int *bit = (const int[]){12, 27, 28, 29, -1}; *bit >= 0; bit++)
        without(&here.ecx1, *bit, false, false, false);
    without(&here.ebx7, 5, false, false, false);
    for (const int *bit = (const int[]){16, 17, 30, 31, -1}; *bit >= 0; bit++)
        without(&here.ebx7, *bit, true, true, false);
    without(&here.ecx7, 11, true, true, false);
    without(&here.eax71, 4, true, false, true);
    without(&here.saved, 1, false, false, false);
    without(&here.saved, 2, false, false, false);
    for (int bit = 5; bit <= 7; bit++)
        without(&here.saved, bit, true, true, false);
}

Test(dispatch, leaves_that_are_not_there)
{
    here = whole;
    here.subleaves = 0;
    without(&here.ecx1, 0, true, false, true);
    here.leaves = 1;
    without(&here.ecx1, 0, false, false, false);
    here.leaves = 0;
    without(&here.ecx1, 0, false, false, false);
}
#endif

Test(dispatch, the_best_that_is_here_and_its_kernels)
{
    check_equal(sparge_cpu_has(SPARGE_ISA_SCALAR), true);
    check_equal(sparge_cpu_has((sparge_isa)99), false);
    for (sparge_isa isa = SPARGE_ISA_SCALAR; isa <= SPARGE_ISA_AVX512VNNI; isa++)
        check_equal(sparge_cpu_kernels(isa).isa, isa);
    check(sparge_cpu_has(sparge_cpu_best()), "the best is none");
}
