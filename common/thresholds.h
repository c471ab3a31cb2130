/* SPDX-License-Identifier: Apache-2.0 */
/* thresholds.h: the thresholds of one query head. */
#ifndef SPARGE_COMMON_THRESHOLDS_H
#define SPARGE_COMMON_THRESHOLDS_H

#include "common/hd.h"
#include "sparge.h"

SPARGE_HD const sparge_thresholds *sparge_thresholds_of(const sparge_options *o, int64_t head)
{
    return o->per_head ? &o->per_head[head] : &o->thresholds;
}

#endif
