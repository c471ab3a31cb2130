/* SPDX-License-Identifier: Apache-2.0 */
/* params.h: tuned thresholds in a file: a JSON object that says for what they were tuned, and has a
 * line for each head. sparge tune writes it, and experiments/tune/from_pt.py; run, map, check and
 * sparge-lm read it. */
#ifndef SPARGE_TOOLS_PARAMS_H
#define SPARGE_TOOLS_PARAMS_H

#include "tools/options.h"

typedef struct params_head {
    int64_t layer, head;
    sparge_thresholds thresholds;
} params_head;

typedef struct params {
    json_t *json;                /* the whole */
    const char *model, *weights; /* NULL: not said; weights: the SHA-256 of their file */
    sparge_options options;      /* rules to softmax_scale, as options_json has them */
    params_head *head;
    int64_t heads;
} params;

/* After failure *out is all 0. */
exit_code params_read(const char *path, params *out, file_error *error);
exit_code params_read_memory(const char *text, size_t size, const char *name, params *out,
                             file_error *error);
void params_free(params *p);

/* Of a head of a layer; an error where the file lacks it. */
exit_code params_find(const params *p, const char *name, int64_t layer, int64_t head,
                      sparge_thresholds *to, file_error *error);

/* Are these thresholds for a model of this name, or with these weights? NULL: unknown. name: of the
 * file. */
exit_code params_model(const params *p, const char *name, const char *model, const char *weights,
                       file_error *error);

/* Attention as these thresholds were tuned for: rules, blocks, cell, skip-rows, causality,
 * smoothing, sink and scale, where they are not given; an error where they are given and are
 * something else. */
exit_code params_obey(const params *p, const char *name, option_set given, sparge_options *o,
                      file_error *error);

/* What a file says of itself before its heads, for these options; NULL: no memory. */
json_t *params_header(const char *model, const char *weights, const sparge_options *o);

/* A head's line begins so; NULL: no memory. Thresholds are the shortest decimals that are these
 * floats. */
json_t *params_line(int64_t layer, int64_t head, bool dense, const sparge_thresholds *thresholds);

#endif
