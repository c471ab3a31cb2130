/* SPDX-License-Identifier: Apache-2.0 */
/* output.h: output files that appear whole: written beside their target, and renamed to it. */
#ifndef SPARGE_TOOLS_OUTPUT_H
#define SPARGE_TOOLS_OUTPUT_H

#include "tools/array.h"

#include <stdio.h>

enum { OUTPUT_MAX = 64 }; /* at a time */
typedef struct output_file output_file;

/* Opens a hidden temporary file in the folder of the target. outputs_commit renames it. A device, a
 * pipe, and a name below /dev and /proc are written directly, at their end. Standard output, which
 * is for JSON, is refused, and so is "-". A link is followed. NULL after failure. The functions
 * below are for one thread. */
output_file *output_open(const char *path, file_error *error);
FILE *output_stream(output_file *output);

/* Makes a folder, unless it is there. outputs_discard removes it if it is new and empty. */
bool output_folder(const char *path, file_error *error);

/* Flushes, checks and closes all open outputs, then renames all. After failure the rest of them is
 * discarded. None is open afterwards. */
bool outputs_commit(file_error *error);
void outputs_discard(void);
void outputs_abandon(void); /* removes the temporary files and no more, as a signal handler may */

#endif
