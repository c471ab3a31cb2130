/* SPDX-License-Identifier: Apache-2.0 */
/* time.c: sparge-lm time: seconds of a prefill, and how many of them are attention. */
#include <math.h>
#include <stdlib.h>

#include "experiments/lm/lm.h"

typedef struct time_args {
    options_base base;
    lm_args lm;
    int64_t repeat;
} time_args;

enum { REPEAT = 1280 };

static const struct argp_option time_options[] = {
    {"repeat", REPEAT, "N", 0, "runs of each, by turns (3)", 0},
    {0},
};

static error_t time_parser(int key, char *text, struct argp_state *state)
{
    time_args *a = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &a->lm; return 0;
    case REPEAT: return options_whole(state, "--repeat", text, 1, 1000, &a->repeat);
    case ARGP_KEY_SUCCESS: return a->lm.texts == 1 ? 0 : options_wrong(state, "give one text");
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {{&lm_argp, 0, NULL, 0}, {0}};
static const struct argp time_argp = {
    .options = time_options,
    .parser = time_parser,
    .args_doc = "MODEL TEXT",
    .doc = "Seconds of a prefill without its logits, and of attention in it, by length and "
           "attention; the attentions take turns, so that what slows the machine down slows all of "
           "them. The summary has the medians.",
    .children = children,
};

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* NaN, which JSON has as null, without memory, or where one of them is unknown. */
static double median(const json_t *rows, const char *key)
{
    const size_t count = json_array_size(rows);
    double *x = isnan(rows_sum(rows, key)) ? NULL : malloc(count * sizeof *x);
    if (!x)
        return NAN;
    for (size_t n = 0; n < count; n++)
        x[n] = json_number_value(json_object_get(json_array_get(rows, n), key));
    qsort(x, count, sizeof *x, by_size);
    const double middle = count % 2 ? x[count / 2] : (x[count / 2 - 1] + x[count / 2]) / 2.0;
    free(x);
    return middle;
}

static json_t *summarise(const lm *m)
{
    json_t *list = rows_groups(&m->rows);
    size_t n;
    json_t *group;
    json_array_foreach(list, n, group)
    {
        const json_t *rows = json_object_get(group, "rows");
        const double seconds = median(rows, "seconds"),
                     attention = median(rows, "seconds_attention");
        rows_means(group);
        json_object_set_new(group, "seconds", json_rounded(seconds, 6));
        json_object_set_new(group, "seconds_attention", json_rounded(attention, 6));
        json_object_set_new(group, "share", json_rounded(attention / seconds, 6));
    }
    return list;
}

static exit_code run_job(lm *m, const choice *c, int64_t tokens, int64_t turn)
{
    json_t *row = lm_job(c, m->text, tokens);
    json_object_set_new(row, "turn", json_integer(turn));
    if (lm_has(m, row))
        return EXIT_FINE;
    float *hidden = lm_hidden(m, tokens);
    exit_code code = hidden ? lm_run(m, c, m->text->token, tokens, hidden) : EXIT_MACHINE;
    free(hidden);
    if (!code) {
        lm_describe(m, row);
        return rows_add(&m->rows, row, m->error);
    }
    json_decref(row);
    return code;
}

exit_code time_command(int argc, char **argv, file_error *error)
{
    time_args a = {.base = {error}, .repeat = 3};
    lm m;
    exit_code code = lm_open(&m, &time_argp, argc, argv, &a.base, &a.lm);
    for (int k = 0; k < lm_lengths(&m) && !code; k++) {
        const int64_t tokens = lm_length(&m, m.text, k);
        code = lm_check_length(&m, m.text, tokens);
        lm_expect(&m, tokens, (double)a.repeat * m.choices);
    }
    if (!code)
        code = lm_begin(&m, "time", NULL);
    for (int k = 0; k < lm_lengths(&m) && !code; k++)
        for (int64_t turn = 0; turn < a.repeat && !code; turn++)
            for (int c = 0; c < m.choices && !code; c++)
                code = run_job(&m, &m.choice[c], lm_length(&m, m.text, k), turn);
    if (!code)
        code = lm_finish(&m, summarise(&m));
    lm_close(&m);
    return code;
}
