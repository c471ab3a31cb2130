/* SPDX-License-Identifier: Apache-2.0 */
/* dispatch.c: which instruction sets cpu/dispatch.c finds on processors that this machine is not:
 * CPUID, XGETBV and what the kernel permits are ours here. */
#define _DEFAULT_SOURCE 1
#include "tests/support/check.h"

#include <errno.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cpu/cpu.h"
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include "tests/cpu/filter.h"
#include <cpuid.h>

typedef struct processor {
    unsigned leaves, ecx1, subleaves, ebx7, ecx7, edx7, eax71, saved;
} processor;

static processor here;
static int asked;              /* for the tiles */
static bool permits, real_one; /* the kernel's answer; the kernel itself is asked */

static int leaf(unsigned number, unsigned sub, unsigned *eax, unsigned *ebx, unsigned *ecx,
                unsigned *edx)
{
    *eax = number == 1 ? 0 : sub == 1 ? here.eax71 : here.subleaves;
    *ebx = number == 7 && sub == 0 ? here.ebx7 : 0;
    *ecx = number == 1 ? here.ecx1 : sub == 0 ? here.ecx7 : 0;
    *edx = number == 7 && sub == 0 ? here.edx7 : 0;
    return number <= here.leaves;
}

static int leaf_alone(unsigned number, unsigned *eax, unsigned *ebx, unsigned *ecx, unsigned *edx)
{
    return leaf(number, 0, eax, ebx, ecx, edx);
}

static long call(long number, long what, long feature)
{
    asked++;
    if (real_one)
        return syscall(number, what, feature);
    return permits && number == SYS_arch_prctl && what == 0x1023 && feature == 18 ? 0 : -1;
}

#define __get_cpuid       leaf_alone
#define __get_cpuid_count leaf
#define syscall           call
#define __asm__                 \
    low = here.saved, high = 0; \
    if (0)                      \
    __asm__ /* xgetbv */
#endif
#include "cpu/dispatch.c"
#undef __asm__
#undef syscall

void sparge_scalar_kernels(sparge_kernels *k) { *k = (sparge_kernels){.isa = SPARGE_ISA_SCALAR}; }
void sparge_avx2_kernels(sparge_kernels *k) { k->isa = SPARGE_ISA_AVX2; }
void sparge_avxvnni_kernels(sparge_kernels *k) { k->isa = SPARGE_ISA_AVXVNNI; }
void sparge_avx512vnni_kernels(sparge_kernels *k)
{
    k->isa = SPARGE_ISA_AVX512VNNI;
    k->int8_scores = SPARGE_FORMATS;
}
void sparge_amx_kernels(sparge_kernels *k) { k->isa = SPARGE_ISA_AMX; }

#if defined(__x86_64__)
/* Everything, as the manual numbers the bits (volume 2, CPUID; volume 1, XCR0). */
static const processor whole = {
    .leaves = 7,
    .ecx1 = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29, /* FMA OSXSAVE AVX F16C */
    .subleaves = 1,
    .ebx7 = 1u << 5 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, /* AVX2 AVX512F DQ BW VL */
    .ecx7 = 1u << 11,                                            /* AVX512_VNNI */
    .edx7 = 1u << 22 | 1u << 24 | 1u << 25,                      /* AMX-BF16, -TILE, -INT8 */
    .eax71 = 1u << 4 | 1u << 5,                                  /* AVX-VNNI, AVX512_BF16 */
    .saved = 1u << 1 | 1u << 2 | 1u << 5 | 1u << 6 | 1u << 7 |   /* SSE AVX opmask ZMM */
             1u << 17 | 1u << 18,                                /* TILECFG TILEDATA */
};

/* Each is there, or `by` stands in its way. */
static void only(const char *there, lack by, const char *of)
{
    static const char *const name[] = {"", "scalar", "avx2", "avxvnni", "avx512vnni", "amx"};
    for (sparge_isa isa = SPARGE_ISA_AVX2; isa < SPARGE_ISAS; isa++) {
        const lack got = detect(isa);
        check(got == (strstr(there, name[isa]) ? NOTHING : by), "%s: %s is %d", of, name[isa], got);
    }
    check_equal(detect(SPARGE_ISA_SCALAR), NOTHING);
}

static void without(unsigned *part, int bit, lack by, const char *there)
{
    const unsigned before = *part;
    *part &= ~(1u << bit);
    only(there, by, check_text("without bit %d", bit));
    *part = before;
}

#define EACH(bit, ...) (const int *bit = (const int[]){__VA_ARGS__, -1}; *bit >= 0; bit++)

TestSuite(dispatch);

Test(dispatch, every_bit_is_needed)
{
    here = whole;
    permits = true;
    without(&here.ecx1, 0, NOTHING, ""); /* one that nobody asks for */
    for
        EACH(bit, 12, 28, 29)
    without(&here.ecx1, *bit, PROCESSOR, "");
    without(&here.ecx1, 27, SYSTEM, "");
    without(&here.ebx7, 5, PROCESSOR, "");
    for
        EACH(bit, 16, 17, 30, 31)
    without(&here.ebx7, *bit, PROCESSOR, "avx2 avxvnni");
    without(&here.ecx7, 11, PROCESSOR, "avx2 avxvnni");
    for
        EACH(bit, 24, 25)
    without(&here.edx7, *bit, PROCESSOR, "avx2 avxvnni avx512vnni");
    without(&here.eax71, 4, PROCESSOR, "avx2 avx512vnni amx");
    for
        EACH(bit, 1, 2)
    without(&here.saved, *bit, SYSTEM, "");
    for
        EACH(bit, 5, 6, 7)
    without(&here.saved, *bit, SYSTEM, "avx2 avxvnni");
    for
        EACH(bit, 17, 18)
    without(&here.saved, *bit, SYSTEM, "avx2 avxvnni avx512vnni");
}

Test(dispatch, leaves_that_are_not_there)
{
    here = whole;
    permits = true;
    here.subleaves = 0;
    only("avx2 avx512vnni amx", PROCESSOR, "without leaf 7.1");
    here.leaves = 1;
    only("", PROCESSOR, "without leaf 7");
    here.leaves = 0;
    only("", PROCESSOR, "without leaf 1");
}

/* Nobody asks for what cannot be, or for another instruction set. */
Test(dispatch, permission)
{
    here = whole;
    asked = 0;
    permits = false;
    only("avx2 avxvnni avx512vnni", PERMISSION, "refused");
    check_equal(asked, 1);
    permits = true;
    only("avx2 avxvnni avx512vnni amx", NOTHING, "permitted");
    check_equal(asked, 2);
    without(&here.saved, 18, SYSTEM, "avx2 avxvnni avx512vnni");
    without(&here.edx7, 24, PROCESSOR, "avx2 avxvnni avx512vnni");
    check_equal(asked, 2);
}

/* ---- What is asked once and remembered: in a child each time ---- */

/* Such products are of these instruction sets, and the best of them is that one. */
static bool bf16_is_of(bool avx512vnni, bool amx)
{
    bool right = true;
    for (sparge_isa isa = SPARGE_ISA_AUTO; isa <= SPARGE_ISAS; isa++)
        right &= sparge_cpu_has_bf16(isa) ==
                 (isa == SPARGE_ISA_AVX512VNNI ? avx512vnni : isa == SPARGE_ISA_AMX && amx);
    return right && sparge_cpu_best(true) == (amx          ? SPARGE_ISA_AMX
                                              : avx512vnni ? SPARGE_ISA_AVX512VNNI
                                                           : SPARGE_ISA_AUTO);
}

static void child_finds_bf16(const processor *x, bool avx512vnni, bool amx, sparge_isa best,
                             const char *of)
{
    const pid_t child = fork();
    if (child == 0) {
        here = *x;
        permits = true;
        const bool right = bf16_is_of(avx512vnni, amx);
        _exit(!right || !bf16_is_of(avx512vnni, amx) || sparge_cpu_best(false) != best);
    }
    int status = 1;
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0, "%s", of);
}

Test(dispatch, products_of_bf16)
{
    const unsigned avx512_bf16 = 1u << 5, amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    processor x = whole;
    child_finds_bf16(&x, true, true, SPARGE_ISA_AMX, "all of it");
    x.eax71 &= ~avx512_bf16;
    child_finds_bf16(&x, false, true, SPARGE_ISA_AMX, "AMX-BF16 alone");
    x.edx7 &= ~amx_bf16;
    child_finds_bf16(&x, false, false, SPARGE_ISA_AMX, "neither");
    x.eax71 |= avx512_bf16;
    child_finds_bf16(&x, true, false, SPARGE_ISA_AMX, "AVX512-BF16 alone");
    x = whole;
    x.edx7 &= ~amx_tile;
    child_finds_bf16(&x, true, false, SPARGE_ISA_AVX512VNNI, "AMX-BF16 without tiles");
    x = whole;
    x.saved &= ~(1u << 18);
    child_finds_bf16(&x, true, false, SPARGE_ISA_AVX512VNNI, "tiles are not saved");
    x = whole;
    x.ecx7 = 0;
    child_finds_bf16(&x, false, false, SPARGE_ISA_AVXVNNI, "AVX512-BF16 without VNNI");
    x = whole;
    x.subleaves = 0;
    child_finds_bf16(&x, false, true, SPARGE_ISA_AMX, "without leaf 7.1");
}

/* What a child learns whose kernel answers so: asked once, and remembered. 2: there are no filters.
 */
static int child_learns(unsigned short number)
{
    const pid_t child = fork();
    if (child == 0) {
        if (!answer_for_tiles(number))
            _exit(2);
        here = whole;
        real_one = true;
        asked = 0;
        const bool has = sparge_cpu_has(SPARGE_ISA_AMX);
        const bool same = sparge_cpu_has(SPARGE_ISA_AMX) == has && asked == 1;
        const char *const lacks = sparge_cpu_lacks(SPARGE_ISA_AMX);
        const bool told = has ? !lacks : lacks && strstr(lacks, "arch_prctl") != NULL;
        const bool best = sparge_cpu_best(false) == (has ? SPARGE_ISA_AMX : SPARGE_ISA_AVX512VNNI);
        _exit(!same || !told || !best ? 3 : has ? 0 : 1);
    }
    int status = 0;
    check(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status), "no child");
    return WEXITSTATUS(status);
}

Test(dispatch, the_kernel_answers)
{
    const int yes = child_learns(0), no = child_learns(EPERM);
    if (yes == 2) {
        cr_log_info("the kernel's answer: not tested, it has no filters");
        return;
    }
    check_equal(yes, 0);
    check_equal(no, 1);
}
#endif

Test(dispatch, the_best_that_is_here_and_its_kernels)
{
    check_equal(sparge_cpu_has(SPARGE_ISA_SCALAR), true);
    check_equal(sparge_cpu_has(SPARGE_ISA_AUTO), false);
    check_equal(sparge_cpu_has(SPARGE_ISAS), false);
    check_equal(sparge_cpu_has((sparge_isa)99), false);
    for (sparge_isa isa = SPARGE_ISA_SCALAR; isa < SPARGE_ISAS; isa++)
        check_equal(sparge_cpu_kernels(isa).isa, isa);
    check(sparge_cpu_has(sparge_cpu_best(false)), "the best is none");
#if defined(__x86_64__)
    check_equal(sparge_cpu_kernels(SPARGE_ISA_AMX).int8_scores, SPARGE_FORMATS);
#endif
}
