/* SPDX-License-Identifier: Apache-2.0 */
/* choice.h: by which attention the model runs. */
#ifndef SPARGE_LM_CHOICE_H
#define SPARGE_LM_CHOICE_H

#include "experiments/lm/model.h"
#include "tools/capture.h"
#include "tools/gate.h"

/* Does a file's name end so, after something else? */
bool ends_with(const char *name, const char *end);

/* "f32" and "int8" are dense; "sparse" is SpargeAttn with the thresholds of the command line; a
 * .json file has tuned ones for every head; a .npy file is a mask, [layers or 1][heads][query
 * blocks][key blocks]; all else is a method, NAME[:PARAM=VALUE,...]. */
typedef struct choice {
    const char *name;         /* as above; of a file without its folder */
    const char *path;         /* NULL: of no file */
    char sha256[SHA256_TEXT]; /* of the file */
    sparge_options options;
    bool dense;
    sparge_thresholds *thresholds; /* [layers][heads], of a .json */
    array mask;                    /* of a .npy */
    method_choice method;
    void **state; /* [layers]: what a method keeps over the run of one text */
    gate *gate;   /* [layers], or NULL */
    int64_t layers;
} choice;

/* What a run of a model by it took, and what it left out. */
typedef struct measured {
    sparge_counts *layer;    /* [layers] */
    double seconds, prepare; /* of attention without copies to a device; of those, prediction and
                                quantization */
    sparge_isa isa;
    int threads;
} measured;

/* Is it the method that takes a gate? */
bool choice_has_gate(const char *text);

/* The comma behind the first of several, or NULL. Those between the parameters of a method are
 * parts of it: "x:a=1,b=2". */
char *choice_end(char *text);

/* asked: by the command line, and what the model says. name, weights: of the model that thresholds
 * must be for, and the SHA-256 of its weights. */
exit_code choice_open(const char *text, const attention_args *asked, const hyper *h,
                      const char *name, const char *weights, choice *out, file_error *error);
void choice_free(choice *c);

/* Before the run of a text: forgets what was kept over the last. */
void choice_begin(const choice *c);

/* Attention of a layer; adds to `to`. */
exit_code choice_attend(const choice *c, int64_t layer, const sparge_problem *problem,
                        const sparge_out *o, measured *to, file_error *error);

/* The sum over the layers. */
sparge_counts measured_counts(const measured *m, int64_t layers);

#endif
