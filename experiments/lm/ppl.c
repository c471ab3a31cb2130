/* SPDX-License-Identifier: Apache-2.0 */
/* ppl.c: sparge-lm ppl: how surprised the model is by a text, under each attention. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/lm/lm.h"
#include "tools/npy.h"

typedef struct ppl_args {
    options_base base;
    lm_args lm;
    const char *logits;
} ppl_args;

enum { LOGITS = 1280, ROWS = 256 }; /* rows whose logits are held at a time */

static const struct argp_option ppl_options[] = {
    {"logits", LOGITS, "FILE.npy", 0,
     "write the logits, [tokens, vocabulary] in float32; of one text, length and attention", 0},
    {0},
};

static error_t ppl_parser(int key, char *text, struct argp_state *state)
{
    ppl_args *a = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &a->lm; return 0;
    case LOGITS: a->logits = text; return 0;
    case ARGP_KEY_SUCCESS:
        if (a->lm.texts == 0)
            return options_wrong(state, "give a text: UTF-8, or a .npy of token numbers");
        if (a->logits && (a->lm.texts != 1 || a->lm.lengths > 1 || a->lm.choices != 1))
            return options_wrong(state,
                                 "--logits is for one text, one --length and one --attention");
        if (a->logits && a->lm.csv && strcmp(a->logits, a->lm.csv) == 0)
            return options_wrong(state, "--logits and --csv are the same file");
        if (a->logits && a->lm.attention.output)
            return options_wrong(
                state, "--logits and -o exclude each other: a row that is there is not run again");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {{&lm_argp, 0, NULL, 0}, {0}};
static const struct argp ppl_argp = {
    .options = ppl_options,
    .parser = ppl_parser,
    .args_doc = "MODEL TEXT...",
    .doc = "Perplexity of texts under several attentions, with their sparsity and their time, as "
           "JSON on stdout.\vMODEL is a .gguf file or a folder with config.json and .safetensors; "
           "TEXT is UTF-8, or a .npy of token numbers. With -o rows are kept as they come, and "
           "after an interruption the same command goes on.",
    .children = children,
};

/* -log of the probability that these logits give to a token. */
static double surprise(const float *logits, int64_t vocab, int32_t token)
{
    float top = logits[0];
    double sum = 0.0;
    for (int64_t n = 1; n < vocab; n++)
        top = fmaxf(top, logits[n]);
    for (int64_t n = 0; n < vocab; n++)
        sum += exp((double)(logits[n] - top));
    return log(sum) + (double)top - (double)logits[token];
}

/* The sum over tokens 1 .. tokens - 1. all: NULL, or [tokens][vocab] to be filled in. */
static exit_code sum_surprise(lm *m, const lm_text *t, int64_t tokens, const float *hidden,
                              float *all, double *sum)
{
    const int64_t vocab = m->hyper->vocab, dim = m->hyper->dim;
    float *piece = all ? NULL : malloc((size_t)(ROWS * vocab) * sizeof *piece);
    double *each = malloc((size_t)tokens * sizeof *each);
    exit_code code = EXIT_FINE;
    if ((!all && !piece) || !each) {
        file_error_set(m->error, t->path, "no memory for the logits of %d tokens", ROWS);
        code = EXIT_MACHINE;
    }
    for (int64_t first = 0; first < tokens && !code; first += ROWS) {
        const int64_t rows = tokens - first < ROWS ? tokens - first : ROWS;
        float *logits = all ? all + first * vocab : piece;
        code = model_logits(m->model, hidden + first * dim, rows, logits, m->error);
#pragma omp parallel for
        for (int64_t r = 0; r < rows; r++)
            if (!code && first + r + 1 < tokens)
                each[first + r] = surprise(logits + r * vocab, vocab, t->token[first + r + 1]);
    }
    *sum = 0.0;
    for (int64_t n = 0; n + 1 < tokens && !code; n++)
        *sum += each[n];
    free(each);
    free(piece);
    return code;
}

static exit_code run_job(lm *m, const ppl_args *a, const choice *c, const lm_text *t,
                         int64_t tokens)
{
    json_t *row = lm_job(c, t, tokens);
    if (lm_has(m, row))
        return EXIT_FINE;
    const int64_t shape[] = {tokens, m->hyper->vocab};
    array logits = {0};
    float *hidden = lm_hidden(m, tokens);
    exit_code code = hidden && (!a->logits || array_alloc(ARRAY_F32, 2, shape, &logits, m->error))
                         ? EXIT_FINE
                         : EXIT_MACHINE;
    double sum;
    if (!code)
        code = lm_run(m, c, t->token, tokens, hidden);
    if (!code)
        code = sum_surprise(m, t, tokens, hidden, logits.data, &sum);
    if (!code) {
        json_object_set_new(row, "surprise", json_rounded(sum, 9));
        json_object_set_new(row, "perplexity", json_rounded(exp(sum / (double)(tokens - 1)), 7));
        lm_describe(m, row);
    }
    if (!code && a->logits && !npy_save(a->logits, &logits, m->error))
        code = EXIT_FILE;
    array_free(&logits);
    free(hidden);
    if (!code)
        return rows_add(&m->rows, row, m->error);
    json_decref(row);
    return code;
}

/* For each attention and length, over the texts. */
static json_t *summarise(const lm *m)
{
    json_t *list = rows_groups(&m->rows);
    size_t n;
    json_t *group;
    json_array_foreach(list, n, group)
    {
        const json_t *rows = json_object_get(group, "rows");
        const double tokens = rows_sum(rows, "tokens") - (double)json_array_size(rows);
        json_object_set_new(group, "perplexity",
                            json_rounded(exp(rows_sum(rows, "surprise") / tokens), 7));
        rows_means(group);
    }
    return list;
}

exit_code ppl_command(int argc, char **argv, file_error *error)
{
    ppl_args a = {.base = {error}};
    lm m;
    exit_code code = lm_open(&m, &ppl_argp, argc, argv, &a.base, &a.lm);
    if (!code)
        code = lm_spare(&m, a.logits);
    for (int n = 0; n < m.texts && !code; n++)
        for (int k = 0; k < lm_lengths(&m) && !code; k++) {
            const int64_t tokens = lm_length(&m, &m.text[n], k);
            code = lm_check_length(&m, &m.text[n], tokens);
            lm_expect(&m, tokens, m.choices);
        }
    if (!code)
        code = lm_begin(&m, "ppl", NULL);
    for (int k = 0; k < lm_lengths(&m) && !code; k++)
        for (int n = 0; n < m.texts && !code; n++)
            for (int c = 0; c < m.choices && !code; c++)
                code = run_job(&m, &a, &m.choice[c], &m.text[n], lm_length(&m, &m.text[n], k));
    if (!code)
        code = lm_finish(&m, summarise(&m));
    lm_close(&m);
    return code;
}
