/* SPDX-License-Identifier: Apache-2.0 */
/* density.h: the tau under which masks have a wanted density. */
#ifndef SPARGE_TOOLS_DENSITY_H
#define SPARGE_TOOLS_DENSITY_H

#include "tools/program.h"

/* Sets o->thresholds.tau, one for all heads, to where the share of the visible token pairs in kept
 * blocks is nearest to `wanted`; of two that are as near, to the smaller. Masks grow with tau, so
 * between two floats there is nothing: what lies below what theta, the diagonal and the sink keep
 * ends the program. */
void density_find(const sparge_problem *p, sparge_options *o, double wanted);

#endif
