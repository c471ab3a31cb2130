/* SPDX-License-Identifier: Apache-2.0 */
/* cpu.h: the cpu backend: what api/ calls. Arguments are checked and options resolved by then:
 * rules are the default ones, isa is one that this processor has, threads is at least 1. */
#ifndef SPARGE_CPU_CPU_H
#define SPARGE_CPU_CPU_H

#include "sparge_inspect.h"

bool sparge_cpu_has(sparge_isa isa);
const char *sparge_cpu_lacks(sparge_isa isa); /* NULL, or who lacks it: "which ..." */
/* With products of bf16: AVX512-BF16 beside avx512vnni, AMX-BF16 beside amx. */
bool sparge_cpu_has_bf16(sparge_isa isa);
sparge_isa sparge_cpu_best(bool bf16); /* AUTO: none */
int sparge_cpu_threads(void);          /* as many as OpenMP would take; 1 without it */

/* Can so many work side by side? OpenMP would end the process where it cannot start one. Asked of
 * the system when the calling thread has never had so many. */
bool sparge_cpu_can_start(int threads);

/* Stage 1, stage 2, or both in one pass over q, k and v. intermediates may not be NULL, its arrays
 * may. */
sparge_status sparge_cpu_predict(const sparge_problem *p, const sparge_options *o,
                                 sparge_mask *mask, const sparge_intermediates *intermediates);
sparge_status sparge_cpu_attend(const sparge_problem *p, const sparge_options *o,
                                const sparge_mask *mask, sparge_result *result);
sparge_status sparge_cpu_attention(const sparge_problem *p, const sparge_options *o,
                                   sparge_mask *mask, sparge_result *result);

sparge_peaks sparge_cpu_peaks(sparge_isa isa, int threads);
sparge_status sparge_cpu_bandwidth(sparge_isa isa, int threads, double *bytes);

#endif
