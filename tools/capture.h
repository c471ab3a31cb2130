/* SPDX-License-Identifier: Apache-2.0 */
/* capture.h: what a file of q, k and v holds: which model, layer, heads and sample. manifest.json
 * in the folder of the file says so (experiments/capture/README.md). */
#ifndef SPARGE_TOOLS_CAPTURE_H
#define SPARGE_TOOLS_CAPTURE_H

#include <limits.h>

#include "sparge_order.h"
#include "tools/options.h"

enum { SHA256_TEXT = 65 };

/* Strings and numbers are of the manifest; where there is none, or it does not say, they are NULL,
 * or -1, or what is noted here. */
typedef struct capture {
    char path[PATH_MAX];
    size_t name;              /* where in it its name begins: below the folder that was asked for */
    char sha256[SHA256_TEXT]; /* of the file */
    const char *model, *weights, *sample; /* weights: the SHA-256 of their file */
    const json_t *heads;                  /* its query heads in order: numbers; NULL: from 0 on */
    int64_t layer;
    bool layer_named; /* the layer is what the name of the file says, 'layerNN': no manifest does */
    int causal;       /* a sparge_causal; END where the manifest does not say which */
    bool aligned;     /* it does */
    double softmax_scale; /* of the scores; 0: not said */
    sparge_grid grid;     /* of its tokens; no token: not said */
    int64_t step;         /* of a pipeline; 0: not said */
    json_t *manifest;     /* what the above points into */
    char from[PATH_MAX];  /* its file; empty: there is none beside the capture */
} capture;

/* A file; or a folder: all the files of its manifest, or where it has none of those of the folders
 * in it, by name. Appends to *list, which has *count. alone: of a file, without its manifest. */
exit_code capture_find(const char *path, bool alone, capture **list, int64_t *count,
                       file_error *error);
void capture_free(capture *list, int64_t count);

/* Its name below the folder that was asked for. */
const char *capture_name(const capture *c);

/* Of a file's bytes, in hexadecimal digits; or of several, one after the other. */
exit_code capture_sha256(const char *path, char text[SHA256_TEXT], file_error *error);
exit_code capture_sha256_inputs(const file_input *in, int64_t count, char text[SHA256_TEXT],
                                file_error *error);

/* The number of the h-th query head, in the model. */
int64_t capture_head(const capture *c, int64_t h);

/* The layer, -1: unknown; `asked`, if not -1, is what the command line says. */
exit_code capture_layer(const capture *c, int64_t asked, int64_t *layer, file_error *error);

/* Attention as in the model: causality and scale become what the manifest says, where it says
 * something and they are not given; an error where they are given and are something else, or the
 * file does not hold the heads of the manifest. */
exit_code capture_obey(const capture *c, const sparge_problem *p, option_set given,
                       sparge_options *o, file_error *error);

/* The tokens of its grid, with text; 0: not said. */
double capture_tokens(const capture *c);

/* What the manifest says of attention; null: there is none. */
json_t *capture_json(const capture *c);

#endif
