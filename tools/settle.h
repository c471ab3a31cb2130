/* SPDX-License-Identifier: Apache-2.0 */
/* settle.h: how attention runs over a capture: as the command line says, or else the thresholds of
 * --params, or else the manifest beside the file; what contradicts one of them ends the program. */
#ifndef SPARGE_TOOLS_SETTLE_H
#define SPARGE_TOOLS_SETTLE_H

#include "tools/capture.h"

typedef struct settled {
    const capture *capture;
    const char *params;          /* the file of thresholds, or NULL */
    char sha256[SHA256_TEXT];    /* of it */
    int64_t layer;               /* whose thresholds; -1: not asked for */
    const char *layer_from;      /* who says so */
    sparge_thresholds *per_head; /* options->per_head */
} settled;

/* options: of the command line. They are then whole, and point into *out. */
void settle(const attention_args *args, const capture *c, const sparge_problem *p,
            sparge_options *options, settled *out);
void settled_free(settled *s);

/* Refuses an output that would replace a file of the capture's, of its manifest or of thresholds;
 * NULL is not a file. */
void settle_spare(const attention_args *args, const capture *c, const char *output);

/* "manifest" and "params": what they said; null where there are none. NULL: no memory. */
json_t *settled_json(const settled *s);

#endif
