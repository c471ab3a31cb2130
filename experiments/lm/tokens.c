/* tokens.c: sparge-lm tokens: the token numbers of texts. */
#include <stdlib.h>
#include <string.h>

#include "experiments/lm/lm.h"
#include "tools/npy.h"

typedef struct tokens_args {
    options_base base;
    lm_args lm;
} tokens_args;

static error_t tokens_parser(int key, char *text, struct argp_state *state)
{
    tokens_args *const a = state->input;
    (void)text;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &a->lm; return 0;
    case ARGP_KEY_SUCCESS:
        if (a->lm.texts == 0)
            return options_wrong(state, "give a text");
        if (a->lm.attention.output && a->lm.texts != 1)
            return options_wrong(state, "-o is for one text");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {{&lm_argp, 0, NULL, 0}, {0}};
static const struct argp tokens_argp = {
    .parser = tokens_parser,
    .args_doc = "MODEL TEXT...",
    .doc = "The token numbers of UTF-8 texts, as lists in JSON; with -o those of one text as a .npy of int32.",
    .children = children,
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

exit_code tokens_command(int argc, char **argv, file_error *error)
{
    tokens_args a = {.base = {error}};
    lm m;
    exit_code code = lm_open(&m, &tokens_argp, argc, argv, &a.base, &a.lm);
    const char *const output = a.lm.attention.output;
    if (!code && output)
        code = write_numbers(m.text, output, error);
    if (!code) {
        json_t *const all = json_array();
        for (int n = 0; n < m.texts; n++) {
            json_t *const numbers = json_array();
            for (int64_t k = 0; k < m.text[n].tokens && !output; k++)
                json_array_append_new(numbers, json_integer(m.text[n].token[k]));
            json_array_append_new(all, json_pack("{s:s, s:I, s:o}", "text", m.text[n].name, "count",
                                                 (json_int_t)m.text[n].tokens, "tokens", numbers));
        }
        code = print_json(json_pack("{s:o}", "texts", all), error);
    }
    lm_close(&m);
    return code;
}
