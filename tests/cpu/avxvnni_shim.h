/* SPDX-License-Identifier: Apache-2.0 */
/* avxvnni_shim.h: AVX-VNNI's two intrinsics in AVX2, bit for bit, so that the sanitizers can run
   cpu/avxvnni.c on machines that lack the instructions: gcc -mavx2 -include
   tests/cpu/avxvnni_shim.h cpu/avxvnni.c */
#ifndef SPARGE_TESTS_AVXVNNI_SHIM_H
#define SPARGE_TESTS_AVXVNNI_SHIM_H

#include <immintrin.h>

/* Pairs of products summed to 32 bits, sums that wrap: vpdpwssd is vpmaddwd and vpaddd. */
__attribute__((target("avx2"))) static inline __m256i shim_dpwssd(__m256i sum, __m256i a, __m256i b)
{
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

/* vpmaddubsw would saturate. Widened to 16 bits, even and odd bytes apart, every sum is exact. */
__attribute__((target("avx2"))) static inline __m256i shim_dpbusd(__m256i sum, __m256i u8,
                                                                  __m256i s8)
{
    const __m256i even_u8 = _mm256_and_si256(u8, _mm256_set1_epi16(0xFF));
    const __m256i even_s8 = _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8);
    const __m256i odd_u8 = _mm256_srli_epi16(u8, 8);
    const __m256i odd_s8 = _mm256_srai_epi16(s8, 8);
    return shim_dpwssd(shim_dpwssd(sum, even_u8, even_s8), odd_u8, odd_s8);
}

/* The compiler's own header has come first, and is not read again: from here on its names are ours.
 */
#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_avx_epi32
#define _mm256_dpbusd_avx_epi32 shim_dpbusd
#define _mm256_dpwssd_avx_epi32 shim_dpwssd

#endif
