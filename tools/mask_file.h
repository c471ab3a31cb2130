/* SPDX-License-Identifier: Apache-2.0 */
/* mask_file.h: masks in files: of blocks, of blocks that may be attended in part, and of pairs. */
#ifndef SPARGE_TOOLS_MASK_FILE_H
#define SPARGE_TOOLS_MASK_FILE_H

#include <stdio.h>

#include "tools/program.h"

/* What a file of blocks holds: a .npy one array, a .safetensors all three by these names. */
typedef struct mask_arrays {
    array blocks; /* uint8 or bool [batch][heads][q_blocks][k_blocks] */
    array
        partial_index;  /* int64 [n][4]: batch, head, q_block, k_block, ascending; of kept blocks */
    array partial_bits; /* uint8 [n][block_q][ceil(block_k / 8)], bit 0 first */
} mask_arrays;

/* The last two are empty if the file lacks both. After failure all are. Of a .npy nothing is
 * checked yet. */
bool mask_arrays_read(const char *path, mask_arrays *out, file_error *error);
void mask_arrays_free(mask_arrays *from);

/* Sets an allocated mask by a byte for each block, [batch][heads][q_blocks][k_blocks]. */
void mask_keep(sparge_mask *to, const uint8_t *keep);

/* What is wrong ends the program, here and below. */
void mask_read(const char *path, const sparge_problem *p, const sparge_options *o,
               sparge_mask *out);
/* By pairs: a .npy of uint8 or bool, [batch][heads][q_len][k_len]. */
void mask_read_pairs(const char *path, const sparge_problem *p, const sparge_options *o,
                     sparge_mask *out);

/* The visible blocks of a mask, in the form that the name's ending says. NULL: all. */
void mask_write(FILE *stream, const char *path, const sparge_mask *mask, const sparge_problem *p,
                const sparge_options *o);
/* 1 for each visible pair that is attended, 0 for the others, as a .npy of uint8. */
void mask_write_pairs(FILE *stream, const char *path, const sparge_mask *mask,
                      const sparge_problem *p, const sparge_options *o);

/* Refuse early what those two would refuse: partly attended blocks in a .npy, and more than 2^30
 * pairs. A path of NULL is no file. */
void mask_writable(const char *path, const sparge_mask *mask);
void mask_pairs_writable(const char *path, const sparge_problem *p);

#endif
