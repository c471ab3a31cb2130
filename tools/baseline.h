/* SPDX-License-Identifier: Apache-2.0 */
/* baseline.h: an honest kernel, to measure others by. */
#ifndef SPARGE_TOOLS_BASELINE_H
#define SPARGE_TOOLS_BASELINE_H

#include "tools/program.h"

/* Attention over a mask (NULL: dense) by the textbook formula in f32, with P and o rounded to a
 * type (f16, bf16; f32 and f64: not at all), as FlashAttention's tests have it: what a kernel may
 * lose that keeps P and o so. The scale of the options is not 0. o [batch][heads][q_len][dim_v],
 * lse [batch][heads][q_len]. */
void baseline_attend(const sparge_problem *problem, const sparge_options *options,
                     const sparge_mask *mask, array_type type, float *o, float *lse);

#endif
