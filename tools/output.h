/* output.h: output files that appear whole or not at all. */
#ifndef SPARGE_TOOLS_OUTPUT_H
#define SPARGE_TOOLS_OUTPUT_H

#include "tools/array.h"

#include <stdio.h>

enum { OUTPUT_MAX = 32 }; /* at a time */
typedef struct output_file output_file;

/* Opens a hidden temporary file beside the target, which outputs_commit renames. Until then exit()
 * and those of SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGTERM and SIGXCPU that nobody handles or ignores
 * remove it; the first call arranges that, and has SIGXFSZ ignored, so that a file too large is an
 * error like others. What is no regular file, and /dev/stderr and its like, is written directly, at
 * its end; standard output, which is for JSON, never is, nor is "-". A link is followed, also to
 * what is not there yet. NULL after failure. The functions below are for one thread. */
output_file *output_open(const char *path, file_error *error);
FILE *output_stream(output_file *output);

/* Makes a folder, unless it is there, for outputs that are opened after it: it goes as they do. */
bool output_folder(const char *path, file_error *error);

/* Flushes, checks and closes all pending outputs, then renames all. After failure all of them are
 * discarded, and what stood there before stands there again, unless the file system cannot exchange
 * two files. None is pending afterwards. */
bool outputs_commit(file_error *error);
void outputs_discard(void);
void outputs_abandon(
    void); /* removes the files and no more, as a signal handler may just before the end */

#endif
