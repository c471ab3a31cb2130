/* SPDX-License-Identifier: Apache-2.0 */
/* methods.c: sparge methods: which methods there are, and what they can be told. */
#include <stdio.h>

#include "tools/options.h"

typedef struct methods_args {
    options_base base;
    bool json;
} methods_args;

static error_t methods_parser(int key, char *text, struct argp_state *state)
{
    methods_args *a = state->input;
    switch (key) {
    case 'j': a->json = true; return 0;
    case ARGP_KEY_ARG: return options_wrong(state, "methods takes no file, not '%.60s'", text);
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option methods_options[] = {{"json", 'j', 0, 0, "as JSON", 0}, {0}};
static const struct argp methods_argp = {
    .options = methods_options,
    .parser = methods_parser,
    .doc = "The methods that --method takes: where each is from, what it needs beside q, k and v, "
           "and its parameters. --density finds the first of them.",
};

static const struct {
    unsigned bit;
    const char *word;
} needs[] = {
    {SPARGE_NEEDS_CAUSAL, "causal"}, {SPARGE_NEEDS_NOT_CAUSAL, "not_causal"},
    {SPARGE_NEEDS_GRID, "grid"},     {SPARGE_NEEDS_SEGMENTS, "segments"},
    {SPARGE_NEEDS_STATE, "state"},
};
enum { NEEDS = sizeof needs / sizeof *needs };

static json_t *describe(const sparge_method *m)
{
    json_t *params = json_array(), *words = json_array();
    for (int n = 0; n < method_params(m); n++) {
        const sparge_param *q = &m->param[n];
        json_array_append_new(params,
                              json_pack("{s:s, s:o, s:o, s:o, s:s}", "name", q->name, "low",
                                        method_number(q, q->low), "high", method_number(q, q->high),
                                        "default", method_number(q, q->usual), "what", q->what));
    }
    for (int n = 0; n < NEEDS; n++)
        if (m->needs & needs[n].bit)
            json_array_append_new(words, json_string(needs[n].word));
    return json_pack("{s:s, s:s, s:s, s:s, s:s, s:s, s:o, s:b, s:b, s:o, s:s}", "name", m->name,
                     "title", m->title, "paper", m->paper, "repository", m->repository, "commit",
                     m->commit, "class", m->kind, "params", params, "falls", (int)m->falls,
                     "at_run", (int)m->at_run, "needs", words, "evidence", m->evidence);
}

static void print(const sparge_method *m)
{
    printf("%s: %s\n  %s%s%s%s%s%s%s", m->name, m->title, m->kind, *m->paper ? ", " : "", m->paper,
           *m->repository ? ", " : "", m->repository, *m->commit ? " " : "", m->commit);
    for (int n = 0, some = 0; n < NEEDS; n++)
        if (m->needs & needs[n].bit)
            printf("%s%s", some++ ? ", " : "\n  needs: ", needs[n].word);
    printf("%s%s\n", *m->evidence ? "\n  equal to the authors' code: " : "", m->evidence);
    for (int n = 0; n < method_params(m); n++) {
        const sparge_param *q = &m->param[n];
        char range[48];
        snprintf(range, sizeof range, "[%g, %g]", q->low, q->high);
        printf("  %12s=%-8g %-18s %s\n", q->name, q->usual, range, q->what);
    }
}

exit_code methods_command(int argc, char **argv, file_error *error)
{
    methods_args a = {.base = {error}};
    const exit_code code = options_parse(&methods_argp, argc, argv, &a.base);
    if (code)
        return code;
    int count;
    const sparge_method *const *all = sparge_methods(&count);
    json_t *list = a.json ? json_array() : NULL;
    for (int n = 0; n < count; n++)
        if (a.json)
            json_array_append_new(list, describe(all[n]));
        else
            print(all[n]);
    return a.json ? print_json(list, error) : EXIT_FINE;
}
