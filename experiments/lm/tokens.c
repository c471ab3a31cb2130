/* SPDX-License-Identifier: Apache-2.0 */
/* tokens.c: sparge-lm tokens: the token numbers of texts. */
#include <stdlib.h>
#include <string.h>

#include "experiments/lm/lm.h"
#include "tools/npy.h"

typedef struct tokens_args {
    options_base base;
    lm_args lm;
} tokens_args;

static const struct argp_option tokens_options[] = {
    {"output", 'o', "FILE.npy", 0, "write the numbers of one text as int32, in place of the list",
     0},
    {0},
};

static error_t tokens_parser(int key, char *text, struct argp_state *state)
{
    tokens_args *a = state->input;
    switch (key) {
    case ARGP_KEY_ARG: return lm_file(state, &a->lm, text);
    case 'o': a->lm.attention.output = text; return 0;
    case ARGP_KEY_END: return lm_check_files(state, &a->lm);
    case ARGP_KEY_SUCCESS:
        if (a->lm.texts == 0)
            return options_wrong(state, "give a text");
        if (a->lm.attention.output && a->lm.texts != 1)
            return options_wrong(state, "-o is for one text");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp tokens_argp = {
    .options = tokens_options,
    .parser = tokens_parser,
    .args_doc = "MODEL TEXT...",
    .doc = "The token numbers of UTF-8 texts, as lists in JSON.",
};

static exit_code write_numbers(const lm_text *t, const char *path, file_error *error)
{
    array numbers;
    if (!array_alloc(ARRAY_I32, 1, &t->tokens, &numbers, error))
        return EXIT_MACHINE;
    memcpy(numbers.data, t->token, (size_t)t->tokens * sizeof *t->token);
    const bool ok = npy_save(path, &numbers, error);
    array_free(&numbers);
    return ok ? EXIT_FINE : EXIT_FILE;
}

/* NULL, and not *ok: no memory. */
static json_t *list_numbers(const lm_text *t, bool *ok)
{
    json_t *list = json_array();
    for (int64_t k = 0; k < t->tokens && *ok; k++)
        *ok = json_array_append_new(list, json_integer(t->token[k])) == 0;
    *ok &= list != NULL;
    return list;
}

exit_code tokens_command(int argc, char **argv, file_error *error)
{
    tokens_args a = {.base = {error}};
    lm m;
    exit_code code = lm_open(&m, &tokens_argp, argc, argv, &a.base, &a.lm);
    const char *output = a.lm.attention.output;
    if (!code && output)
        code = write_numbers(m.text, output, error);
    if (!code) {
        json_t *all = json_array();
        bool ok = true;
        for (int n = 0; n < m.texts && ok; n++) /* the numbers are in the file, or else here */
            ok = json_array_append_new(
                     all, json_pack("{s:s, s:I, s:o*}", "text", m.text[n].name, "count",
                                    (json_int_t)m.text[n].tokens, "tokens",
                                    output ? NULL : list_numbers(&m.text[n], &ok))) == 0 &&
                 ok;
        code = print_json(ok ? json_pack("{s:O}", "texts", all) : NULL, error);
        json_decref(all);
    }
    lm_close(&m);
    return code;
}
