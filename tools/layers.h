/* SPDX-License-Identifier: Apache-2.0 */
/* layers.h: the captures that sparge tune is given, by the layers of one model. What is wrong ends
 * the program. */
#ifndef SPARGE_TOOLS_LAYERS_H
#define SPARGE_TOOLS_LAYERS_H

#include "tools/capture.h"
#include "tools/inputs.h"

typedef struct paths {
    const char **path;
    int64_t count;
} paths;

error_t paths_append(paths *to, const char *path); /* ENOMEM: no memory */

/* What is tuned together: the captures of the same heads of a layer, those held out last. */
typedef struct layer {
    const capture **capture;
    int64_t count, held_out;
} layer;

typedef struct layers {
    capture *capture; /* those to tune on, then those that are held out */
    int64_t captures, held_out;
    const char *model, *weights; /* of all; NULL: unknown */
    layer *layer;                /* ascending */
    int64_t count;
} layers;

/* model: what the command line says, or NULL. */
void layers_find(const attention_args *args, const paths *tuned, const paths *held,
                 const char *model, layers *out);
void layers_free(layers *l);

/* A line on stderr if names of files say of which layers they are. */
void layers_say(const layers *l);

/* For a file of thresholds: each capture, and whether it is held out. */
json_t *layers_json(const layers *l);

/* How many heads they have, as the manifests say; -1: some do not. */
int64_t layers_heads(const layers *l);

/* Reads a capture; attention over it as its manifest says, or as the options have it. */
void layers_read(const attention_args *args, const capture *c, option_set given,
                 sparge_options *options, inputs *in);

/* All captures of a layer, under attention as settled in args: [count], with g if that is asked
 * for. */
inputs *layer_read(const attention_args *args, const layer *l, bool gradients);
void layer_free(const layer *l, inputs *in);

#endif
