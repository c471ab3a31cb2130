/* SPDX-License-Identifier: Apache-2.0 */
/* lm.h: what the commands of sparge-lm have in common: a model, texts, the attentions to compare,
 * and results that grow in a file. */
#ifndef SPARGE_LM_LM_H
#define SPARGE_LM_LM_H

#include "experiments/lm/choice.h"
#include "experiments/lm/rows.h"
#include "experiments/lm/tokenizer.h"
#include "tools/capture.h"
#include "tools/options.h"
#include "tools/progress.h"

enum { LM_LIST = 16 };

/* ---- What is asked ---- */

typedef struct lm_args {
    options_base base;
    attention_args attention; /* file[0] is the model; output, where results grow */
    const char *text[64];
    int texts;
    const char *choice[LM_LIST];
    int choices;
    int64_t length[LM_LIST]; /* tokens */
    int lengths;             /* 0: all of a text */
    const char *name;        /* of the model; NULL: its own */
    const char *csv;
} lm_args;

extern const struct argp lm_argp; /* a child for the commands' own; its input is an lm_args */

/* For a command that has other options than those: the model, or a text after it; and is there a
 * model? */
error_t lm_file(struct argp_state *state, lm_args *a, const char *path);
error_t lm_check_files(struct argp_state *state, const lm_args *a);

/* A list of whole numbers, like "1024,2048". */
error_t lm_list(struct argp_state *state, const char *name, const char *text, int64_t low,
                int64_t high, int64_t *to, int *count);

/* ---- What is run ---- */

typedef struct lm_text {
    const char *path, *name; /* the name is the file's, without its folder */
    char sha256[SHA256_TEXT];
    int32_t *token;
    int64_t tokens;
} lm_text;

typedef struct lm {
    lm_args *args;
    checkpoint files;
    model *model;
    const hyper *hyper;
    const char *name;          /* of the model */
    char weights[SHA256_TEXT]; /* of all its files: config.json of a folder, its index, its weights;
                                  see lm_weights */
    tokenizer *tokenizer;      /* NULL until a text needs it */
    lm_text *text;
    int texts;
    choice choice[LM_LIST];
    int choices;
    measured measured; /* of the last run */
    double seconds;    /* and all of it */
    row_file rows;
    progress watch;
    double work, done; /* of all runs */
    /* Before attention of each layer, or NULL: */
    exit_code (*visit)(void *user, int64_t layer, const sparge_problem *problem, file_error *error);
    void *user;
    file_error *error;
} lm;

/* Parses, and opens the model and the texts. A line in *error, as every command. */
exit_code lm_open(lm *m, const struct argp *argp, int argc, char **argv, options_base *input,
                  lm_args *args);
void lm_close(lm *m);

/* Knows the weights by content, from the first call on. */
exit_code lm_weights(lm *m);

/* Refuses an output that would replace what is read; NULL is not a file. */
exit_code lm_spare(const lm *m, const char *output);

/* How many lengths of each text are run; and the k-th of them, in tokens. */
int lm_lengths(const lm *m);
int64_t lm_length(const lm *m, const lm_text *t, int k);

/* The first `tokens` of a text; an error where it has fewer, or the model cannot take so many. */
exit_code lm_check_length(const lm *m, const lm_text *t, int64_t tokens);

exit_code lm_encode(lm *m, const char *name, const char *bytes, size_t size, int32_t **token,
                    int64_t *tokens);

/* Opens the results: extra is added to the settings that must be the same when a run goes on. From
 * here on an interrupt is an end like others. */
exit_code lm_begin(lm *m, const char *command, json_t *extra);

/* A job by a choice; and what a row of its result begins with. */
json_t *lm_job(const choice *c, const lm_text *t, int64_t tokens);

/* How much there is to do: so many runs of so many tokens. */
void lm_expect(lm *m, int64_t tokens, double runs);

/* Is its row there already? Then it is freed, and so much less is to do. */
bool lm_has(lm *m, json_t *job);

/* Room for what lm_run returns, to be freed; NULL, and a line in the error: no memory. */
float *lm_hidden(const lm *m, int64_t tokens);

/* Runs the model. hidden [tokens][dim]. */
exit_code lm_run(lm *m, const choice *c, const int32_t *token, int64_t tokens, float *hidden);

/* What every run tells: sparsities over all and for each layer, and seconds. */
void lm_describe(const lm *m, json_t *row);

/* The CSV, if asked for; then settings, rows and a summary on standard output. Steals the summary.
 */
exit_code lm_finish(lm *m, json_t *summary);

/* ---- The commands ---- */

exit_code tokens_command(int argc, char **argv, file_error *error);
exit_code ppl_command(int argc, char **argv, file_error *error);
exit_code needle_command(int argc, char **argv, file_error *error);
exit_code capture_command(int argc, char **argv, file_error *error);
exit_code time_command(int argc, char **argv, file_error *error);

#endif
