/* SPDX-License-Identifier: Apache-2.0 */
/* tune.h: what the files of sparge tune share: its command line, and the file that it writes, which
 * grows while it works. tune_heads.c bounds errors head by head, tune_loss.c weighs all heads by
 * the loss. What is wrong ends the program. */
#ifndef SPARGE_TOOLS_TUNE_H
#define SPARGE_TOOLS_TUNE_H

#include "sparge_tune.h"
#include "tools/layers.h"
#include "tools/progress.h"

typedef enum tune_by { BY_TAU, BY_TOPK, BY_LOSS } tune_by;
extern const char *const tune_bys[], *const tune_bounds[]; /* their words */

typedef struct tune_args {
    options_base base;
    attention_args attention; /* settled, as the first capture has it */
    int by;
    sparge_tune_options how; /* seconds, held_out and callbacks are not set */
    sparge_loss_goal goal;   /* by loss */
    double seconds;          /* 0: all that it takes */
    const char *model;
    paths tuned, held; /* captures to tune on, and those that are held out */
    double start;
} tune_args;

/* Each writes the file, prints its report and returns; or ends the program as unfinished. */
exit_code tune_heads(tune_args *args, layers *of);
exit_code tune_loss(tune_args *args, layers *of);

/* ---- tune_file.c ---- */

/* What an earlier run left; NULL: nothing. The file is none of the inputs. */
json_t *tune_file_before(const tune_args *args, const layers *of);
/* Was it of the same captures and options? */
void tune_file_same(const tune_args *args, const json_t *before, const json_t *header);
/* Can it be written? What is there stays. */
void tune_file_probe(const tune_args *args, const json_t *header);
/* Lines in the order of layers and heads, whichever was done first. */
void tune_file_insert(json_t *lines, json_t *line);
int64_t tune_file_whole(const json_t *line, const char *key);
double tune_file_number(const json_t *line, const char *object, const char *key); /* or NaN */
/* The line of a head; NULL: there is none. */
const json_t *tune_file_find(const json_t *lines, int64_t of_layer, int64_t head);

/* Ends the program, with so many of what there is done. */
_Noreturn void tune_unfinished(const tune_args *args, const layers *of, size_t done,
                               const char *what);

#endif
