/* params.h: tuned thresholds in a file: a JSON object that says for what they were tuned, and has a line for
 * each head. sparge tune writes it, and experiments/tune/from_pt.py; sparge run reads it. */
#ifndef SPARGE_TOOLS_PARAMS_H
#define SPARGE_TOOLS_PARAMS_H

#include "tools/program.h"

typedef struct params_head {
    int64_t layer, head;
    sparge_knobs knobs;
} params_head;

typedef struct params {
    json_t *json; /* the whole */
    const char *model; /* NULL: not said */
    int64_t block_q, block_k, skip_rows;
    sparge_causal causal;
    bool smooth_k, sink;
    float scale; /* 0: 1/sqrt(dim) */
    params_head *head;
    int64_t heads;
} params;

/* After failure *out is all 0. */
exit_code params_read(const char *path, params *out, file_error *error);
exit_code params_read_memory(const char *text, size_t size, const char *name, params *out, file_error *error);
void params_free(params *p);

/* Of a head of a layer; an error where the file lacks it. */
exit_code params_find(const params *p, const char *name, int64_t layer, int64_t head, sparge_knobs *to,
                      file_error *error);

/* Are these thresholds for a model of this name (NULL: unknown) under these options? name: of the file. */
exit_code params_check(const params *p, const char *name, const char *model, const sparge_options *o,
                       file_error *error);

/* What a file says of itself before its heads, for these options; NULL: no memory. */
json_t *params_header(const char *model, const sparge_options *o);

/* A head's line begins so; NULL: no memory. Thresholds are the shortest decimals that are these floats. */
json_t *params_line(int64_t layer, int64_t head, bool dense, const sparge_knobs *knobs);

#endif
