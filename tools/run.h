/* SPDX-License-Identifier: Apache-2.0 */
/* run.h: sparge run: one capture on its way through the steps of run.c, and what run_report.c says
 * of it. */
#ifndef SPARGE_TOOLS_RUN_H
#define SPARGE_TOOLS_RUN_H

#include "tools/compare.h"
#include "tools/inputs.h"
#include "tools/intermediates.h"
#include "tools/judge.h"
#include "tools/kept.h"
#include "tools/plan.h"
#include "tools/settle.h"

typedef struct run_args {
    options_base base;
    attention_args attention;
    const char *mask, *mask_pairs, *mask_out, *pairs_out, *lse_out, *intermediates;
    bool dense, mask_only, check;
} run_args;

enum { RUN_INPUTS = 5 }; /* files of q, k and v, of a mask, and of a gate */

typedef struct run {
    run_args args;
    const capture *capture;
    sparge_options options; /* as resolved; of the first part of the plan */
    char sha256[RUN_INPUTS][SHA256_TEXT];
    inputs in;
    settled settled;
    method_choice found;
    sparge_plan plan; /* predicted after compute */
    bool predicts; /* the mask of its one part is predicted, and not given, dense or a method's */
    intermediate_arrays
        intermediates; /* of the mask, o and the reasons too when there is no --intermediates */
    array lse;
    output_file *o_file, *mask_file, *pairs_file, *lse_file;
    sparge_result result;
    double seconds;              /* of the call */
    comparison real, masked;     /* distance to dense attention, and over the same mask */
    recall recall, *head_recall; /* [heads] */
    json_t *rows;                /* of a folder of captures; NULL: there is but one */
} run;

/* The file of the mask, of blocks or of pairs; NULL: it is not given. */
static inline const char *run_mask(const run_args *a) { return a->mask ? a->mask : a->mask_pairs; }

/* What ran and what came of it; NULL: no memory. */
json_t *run_json(const run *r);

/* What a user should hear beside that, on stderr. */
void run_warn(const run *r);

#endif
