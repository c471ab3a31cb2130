/* SPDX-License-Identifier: Apache-2.0 */
/* kept.h: what was counted, over heads; and why a prediction keeps a block. */
#ifndef SPARGE_TOOLS_KEPT_H
#define SPARGE_TOOLS_KEPT_H

#include "tools/program.h"

sparge_counts kept_sum(const sparge_counts *heads, int64_t count);

/* Tokens of the tiles whose P.V was computed, attended or not, as tile_tokens are of Q.K^T: what is
 * counted is those of them that are attended. */
double kept_pv_tiles(const sparge_counts *counts);

enum { REASONS = 8 }; /* of sparge_reason */

typedef struct reasons {
    int64_t pairs;          /* visible */
    int64_t kept[REASONS];  /* of those, kept for this reason; several may hold for one */
    int64_t alone[REASONS]; /* and for no other */
} reasons;

/* why: as sparge_intermediates has it. */
reasons reasons_of(const array *why, const sparge_problem *p, const sparge_options *o);

/* An object with a number for each reason; NULL: no memory. */
json_t *reasons_json(const int64_t count[REASONS]);
/* "kept: 12 % by mass, 90 % by dissimilar keys": the reasons for which some of the visible pairs
 * are kept. */
void reasons_text(const reasons *r, char text[256]);
/* A line on stderr where a reason beside tau, topk and min_mass keeps more than half of the visible
 * pairs; none where each head has thresholds of its own, which were tuned so. */
void reasons_warn(const reasons *r, const sparge_options *o, const char *file);

#endif
