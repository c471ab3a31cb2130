/* SPDX-License-Identifier: Apache-2.0 */
/* intermediates.h: every intermediate result of the algorithm as an array: a folder of .npy files.
 */
#ifndef SPARGE_TOOLS_INTERMEDIATES_H
#define SPARGE_TOOLS_INTERMEDIATES_H

#include <limits.h>

#include "common/geometry.h"
#include "sparge_inspect.h"
#include "tools/output.h"
#include "tools/program.h"

/* When a result exists. */
typedef enum intermediate_when {
    ALWAYS,
    PREDICTED,
    POOLED, /* predicted by mean rows of blocks */
    SMOOTHED,
    ATTENDED,
    QK_CODES,
    PV_CODES
} intermediate_when;

typedef struct intermediate {
    const char *name; /* of its file too, with .npy */
    /* A letter an axis: b batch, h head, g key head, q query, k key, i query block, j key block,
     * d channel of q and k, v channel of v, 2: two numbers. */
    const char *axes;
    array_type type;
    intermediate_when when;
    size_t field; /* of sparge_intermediates; 0 also for what is not in it */
} intermediate;

/* In the order of the algorithm. */
enum {
    INTERMEDIATE_BLOCKS,
    INTERMEDIATE_WHY = 8,
    INTERMEDIATE_MASK,
    INTERMEDIATE_O = 19,
    INTERMEDIATE_COUNT
};
extern const intermediate intermediate_table[INTERMEDIATE_COUNT];

typedef struct intermediate_arrays {
    array array[INTERMEDIATE_COUNT];    /* empty where there is nothing to see */
    sparge_intermediates intermediates; /* points into them */
    output_file *file[INTERMEDIATE_COUNT];
    const char *folder;
    bool attends; /* there is an o */
} intermediate_arrays;

/* An array of axes such as "bhij". What is wrong, here and below, ends the program. */
void intermediates_alloc(const char *axes, array_type type, const sparge_problem *p,
                         const sparge_options *o, array *out);
/* Is n an array of sparge_intermediates, and of how many bytes? */
bool intermediate_recorded(int n);
int64_t intermediate_bytes(int n, const sparge_problem *p, const sparge_options *o);
/* One that is recorded. */
void intermediates_make_one(intermediate_arrays *d, int n, const sparge_problem *p,
                            const sparge_options *o);
/* The arrays of a run that predicts its mask, or does not, and attends, or does not, under options
 * as resolved: all but the mask and o, with the block sizes filled in. */
void intermediates_make(intermediate_arrays *d, const sparge_problem *p, const sparge_options *o,
                        bool predicts, bool attends);
/* The file of number n. */
void intermediates_path(const char *folder, int n, char path[PATH_MAX]);
/* Makes the folder, and opens a file in it for each array, for the mask and for o. */
void intermediates_open(intermediate_arrays *d, const char *folder);
void intermediates_write(const intermediate_arrays *d);
/* After outputs_commit: removes the files of an earlier run that this one does not write. */
void intermediates_tidy(const intermediate_arrays *d);
void intermediates_free(intermediate_arrays *d);

sparge_geometry geometry_of(const sparge_problem *p, const sparge_options *o);
/* uint8 [batch][heads][q_blocks][k_blocks]: 1 for the visible blocks of a mask, also for those that
 * are attended in part; NULL: of all. */
void mask_array(const sparge_mask *mask, const sparge_problem *p, const sparge_options *o,
                array *out);

#endif
