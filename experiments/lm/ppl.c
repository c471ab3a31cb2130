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
    bool kl;
} ppl_args;

enum { LOGITS = 1280, KL, ROWS = 256 }; /* rows whose logits are held at a time */

static const struct argp_option ppl_options[] = {
    {"logits", LOGITS, "FILE.npy", 0,
     "write the logits, [tokens, vocabulary] in float32; of one text, length and attention", 0},
    {"kl", KL, 0, 0,
     "also the KL divergence from dense attention in f32 to each, which is one run more for each "
     "text and length",
     0},
    {0},
};

static error_t ppl_parser(int key, char *text, struct argp_state *state)
{
    ppl_args *a = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &a->lm; return 0;
    case LOGITS: a->logits = text; return 0;
    case KL: a->kl = true; return 0;
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

/* log of the sum of the exponentials. */
static double log_sum(const float *logits, int64_t vocab)
{
    float top = logits[0];
    double sum = 0.0;
    for (int64_t n = 1; n < vocab; n++)
        top = fmaxf(top, logits[n]);
    for (int64_t n = 0; n < vocab; n++)
        sum += exp((double)(logits[n] - top));
    return log(sum) + (double)top;
}

/* Of the distribution that the logits `of` give to that of `to`, whose log_sum is there, in nats.
 */
static double divergence(const float *of, const float *to, double to_sum, int64_t vocab)
{
    const double of_sum = log_sum(of, vocab);
    double sum = 0.0;
    for (int64_t n = 0; n < vocab; n++) {
        const double p = (double)of[n] - of_sum;
        sum += exp(p) * (p - ((double)to[n] - to_sum));
    }
    return sum;
}

/* What is told of a run, and summed over the tokens from the second on. */
typedef struct told {
    double surprise; /* -log of the probability of the token */
    double kl;       /* of what dense attention expects there to what this one does */
} told;

/* Of one piece of the text. of: the logits of dense attention, or NULL. */
static void tell_rows(const float *of, const float *logits, const int32_t *next, int64_t rows,
                      int64_t vocab, told *each)
{
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const float *to = logits + r * vocab;
        const double sum = log_sum(to, vocab);
        each[r] = (told){sum - (double)to[next[r]],
                         of ? divergence(of + r * vocab, to, sum, vocab) : 0.0};
    }
}

/* One job: a text of so many tokens, and hidden states. */
typedef struct run {
    const lm_text *text;
    int64_t tokens;
    const float *hidden, *dense; /* dense: of dense attention in f32, or NULL */
} run;

/* all: NULL, or [tokens][vocab] to be filled in. */
static exit_code tell(lm *m, const run *r, float *all, told *sum)
{
    const int64_t vocab = m->hyper->vocab, dim = m->hyper->dim, last = r->tokens - 1;
    float *piece = all ? NULL : malloc((size_t)(ROWS * vocab) * sizeof *piece);
    float *of = r->dense ? malloc((size_t)(ROWS * vocab) * sizeof *of) : NULL;
    told *each = malloc((size_t)r->tokens * sizeof *each);
    exit_code code = EXIT_FINE;
    if ((!all && !piece) || (r->dense && !of) || !each) {
        file_error_set(m->error, r->text->path, "no memory for the logits of %d tokens", ROWS);
        code = EXIT_MACHINE;
    }
    for (int64_t first = 0; first < r->tokens && !code; first += ROWS) {
        const int64_t rows = r->tokens - first < ROWS ? r->tokens - first : ROWS;
        float *logits = all ? all + first * vocab : piece;
        code = model_logits(m->model, r->hidden + first * dim, rows, logits, m->error);
        if (!code && of)
            code = model_logits(m->model, r->dense + first * dim, rows, of, m->error);
        if (!code)
            tell_rows(of, logits, r->text->token + first + 1, first + rows > last ? rows - 1 : rows,
                      vocab, each + first);
    }
    *sum = (told){0};
    for (int64_t n = 0; n < last && !code; n++) {
        sum->surprise += each[n].surprise;
        sum->kl += each[n].kl;
    }
    free(each);
    free(of);
    free(piece);
    return code;
}

/* Dense attention in f32 over a text; its hidden states are to be freed. */
static exit_code run_dense(lm *m, const lm_text *t, int64_t tokens, float **hidden)
{
    choice dense;
    exit_code code =
        choice_open("f32", &m->args->attention, m->hyper, m->name, m->weights, &dense, m->error);
    *hidden = code ? NULL : lm_hidden(m, tokens);
    if (!*hidden)
        return code ? code : EXIT_MACHINE;
    code = lm_run(m, &dense, t->token, tokens, *hidden);
    choice_free(&dense);
    return code;
}

/* dense: NULL until a row needs it. */
static exit_code run_job(lm *m, const ppl_args *a, const choice *c, const lm_text *t,
                         int64_t tokens, float **dense)
{
    json_t *row = lm_job(c, t, tokens);
    if (lm_has(m, row))
        return EXIT_FINE;
    const int64_t shape[] = {tokens, m->hyper->vocab};
    const double count = (double)(tokens - 1);
    array logits = {0};
    float *hidden = lm_hidden(m, tokens);
    exit_code code = hidden && (!a->logits || array_alloc(ARRAY_F32, 2, shape, &logits, m->error))
                         ? EXIT_FINE
                         : EXIT_MACHINE;
    told sum;
    if (!code && a->kl && !*dense)
        code = run_dense(m, t, tokens, dense);
    if (!code)
        code = lm_run(m, c, t->token, tokens, hidden);
    if (!code)
        code = tell(m, &(run){t, tokens, hidden, *dense}, logits.data, &sum);
    if (!code) {
        json_object_set_new(row, "surprise", json_rounded(sum.surprise, 9));
        json_object_set_new(row, "perplexity", json_rounded(exp(sum.surprise / count), 7));
        if (a->kl)
            json_object_set_new(row, "kl", json_rounded(sum.kl / count, 6));
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

/* All attentions over a text. */
static exit_code run_text(lm *m, const ppl_args *a, const lm_text *t, int64_t tokens)
{
    float *dense = NULL;
    exit_code code = EXIT_FINE;
    for (int c = 0; c < m->choices && !code; c++)
        code = run_job(m, a, &m->choice[c], t, tokens, &dense);
    free(dense);
    return code;
}

/* For each attention and length, over the texts. */
static json_t *summarise(const lm *m, bool kl)
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
        if (kl) /* they have as many tokens each */
            json_object_set_new(
                group, "kl", json_rounded(rows_sum(rows, "kl") / (double)json_array_size(rows), 6));
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
            lm_expect(&m, tokens, m.choices + a.kl);
        }
    if (!code)
        code = lm_begin(&m, "ppl", a.kl ? json_pack("{s:b}", "kl", 1) : NULL);
    for (int k = 0; k < lm_lengths(&m) && !code; k++)
        for (int n = 0; n < m.texts && !code; n++)
            code = run_text(&m, &a, &m.text[n], lm_length(&m, &m.text[n], k));
    if (!code)
        code = lm_finish(&m, summarise(&m, a.kl));
    lm_close(&m);
    return code;
}
