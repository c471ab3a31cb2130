/* SPDX-License-Identifier: Apache-2.0 */
/* options.h: command lines, strictly: every mistake is one line that names it and what would do. */
#ifndef SPARGE_TOOLS_OPTIONS_H
#define SPARGE_TOOLS_OPTIONS_H

#include <argp.h>

#include "tools/method.h"

/* ---- For every command ------------------------------------------------------------------ */

/* What the input of every parser begins with. */
typedef struct options_base {
    file_error *error;
} options_base;

/* Parses by argp, but prints nothing except the help that --help asks for, and never exits. */
exit_code options_parse(const struct argp *argp, int argc, char **argv, options_base *input);

/* For the parsers: each leaves its line in the error of the input, and returns EINVAL. */
__attribute__((format(printf, 2, 3))) error_t options_wrong(struct argp_state *state,
                                                            const char *format, ...);
error_t options_real(struct argp_state *state, const char *name, const char *text, double low,
                     double high, double *to);
/* In the library's range of what the option sets. */
error_t options_float(struct argp_state *state, const char *name, const char *text, float *to);
error_t options_whole(struct argp_state *state, const char *name, const char *text, int64_t low,
                      int64_t high, int64_t *to);
/* The place of a word in a list that ends with NULL. */
error_t options_word(struct argp_state *state, const char *name, const char *text,
                     const char *const *words, int *to);

/* Words in the order of sparge.h; NULL ends them. Of the precisions the cpu backend, and Q.K on
 * any, has the first ones alone. */
extern const char *const options_isas[], *const options_qk_dtypes[];
extern const char *const options_pv_dtypes[], *const options_causals[], *const options_rules[];

int options_distance(const char *a, const char *b); /* edits between two words */

/* The dtype that one of their words names. */
sparge_dtype options_dtype(const char *word);

/* What --skip-rows stands for under the rules. */
int64_t options_skip_rows(const sparge_options *o);

/* rules to scale, as the command line has them; and the thresholds. null stands for what is off, or
 * 1/sqrt(channels). NULL: no memory. */
json_t *options_json(const sparge_options *o);
json_t *thresholds_json(const sparge_thresholds *thresholds);

/* ---- For commands that run attention ---------------------------------------------------- */

/* The keys of attention_argp. */
enum {
    OPT_THETA = 256,
    OPT_TAU,
    OPT_TOPK,
    OPT_MIN_MASS,
    OPT_LAMBDA,
    OPT_CELL,
    OPT_SOFTMAX_SCALE,
    OPT_BLOCK_Q,
    OPT_BLOCK_K,
    OPT_SKIP_ROWS,
    OPT_THREADS,
    OPT_KERNEL,
    OPT_SINK,
    OPT_NO_SMOOTH_K,
    OPT_CAUSAL,
    OPT_RULES,
    OPT_BACKEND,
    OPT_ISA,
    OPT_QK_DTYPE,
    OPT_PV_DTYPE,
    OPT_LAYOUT, /* words */
    OPT_LAYER,
    OPT_IGNORE_MANIFEST,
    OPT_PARAMS, /* of manifest_argp and params_argp */
    OPT_METHOD,
    OPT_DENSITY,
    OPT_GATE,
    OPT_ROPE_BASE,
    OPT_SEGMENTS, /* of method_argp */
    OPT_COMMAND,  /* the first of a command's own */
};

/* A set of them, and -o, has a bit for each. */
typedef uint64_t option_set;
static inline option_set option_bit(int key)
{
    return (option_set)1 << (key == 'o' ? 63 : key - OPT_THETA);
}
static inline option_set option_bits(int first, int last)
{
    return 2 * option_bit(last) - option_bit(first);
}
static inline option_set options_all(void) { return option_bits(OPT_THETA, OPT_LAYOUT); }

typedef struct attention_args {
    options_base base;
    sparge_options options;
    option_set given;    /* which options are on the command line; a command adds its own */
    bool nhd;            /* tokens before heads in the files */
    const char *file[3]; /* q, k, v; or one that holds them all */
    int files;
    const char *output;
    /* Of manifest_options and params_options: */
    const char *params; /* thresholds for every head */
    int64_t layer;      /* -1: not given */
    bool ignore_manifest;
    /* Of method_argp: */
    method_choice method;
    double density;   /* NaN: not asked for */
    const char *gate; /* NULL: none */
    double rope_base; /* 0: not given */
    const char *segments;
    sparge_rules rules; /* while parsing */
} attention_args;

/* Options that contradict each other: `key` beside any of the others, up to a 0, which mean nothing
 * then. */
typedef struct options_conflict {
    int key, others[12];
    const char *why; /* what `key` does: "keeps every block" */
} options_conflict;

/* Refuses the first of them that is given. */
error_t options_refuse(struct argp_state *state, option_set given, const options_conflict *table,
                       size_t count);

/* Of these the input is an attention_args. thresholds_argp: the thresholds, --cell and --sink
 * alone, whose parent sets the input to its defaults. */
extern const struct argp attention_argp, thresholds_argp;

/* Beside them, of the same input: --layer and --ignore-manifest; those with --params; and --method
 * with --density, --gate and --segments. */
extern const struct argp manifest_argp, params_argp, method_argp;

/* As options_parse, where `args` is what attention_argp fills in: --rules counts from the start,
 * wherever it stands. */
exit_code attention_parse(const struct argp *argp, int argc, char **argv, options_base *input,
                          attention_args *args);

#endif
