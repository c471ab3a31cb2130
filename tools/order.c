/* SPDX-License-Identifier: Apache-2.0 */
/* order.c: sparge order: a token order, and how far its steps are. */
#include <stdlib.h>

#include "sparge_order.h"
#include "tools/npy.h"
#include "tools/options.h"
#include "tools/output.h"

typedef struct order_args {
    options_base base;
    sparge_grid grid;
    sparge_order order;
    int64_t seed;
    const char *output;
    int sides;
} order_args;

enum { ORDER = 256, SEED, TEXT_BEFORE, TEXT_AFTER };

static const struct argp_option order_options[] = {
    {"order", ORDER, "HOW", 0, "row, column, time, random or hilbert (hilbert)", 0},
    {"seed", SEED, "N", 0, "of the random order (0)", 0},
    {"text-before", TEXT_BEFORE, "N", 0, "tokens before the grid, which keep their place", 0},
    {"text-after", TEXT_AFTER, "N", 0, "tokens after it", 0},
    {"output", 'o', "INDEX.npy", 0, "write the order: the arriving number of every place", 0},
    {0},
};
static const char *const order_words[] = {"row", "column", "time", "random", "hilbert", NULL};

static error_t order_parser(int key, char *text, struct argp_state *state)
{
    static const char *const sides[] = {"T", "H", "W"};
    order_args *a = state->input;
    sparge_grid *g = &a->grid;
    int64_t *const side[] = {&g->t, &g->h, &g->w};
    int word = 0;
    error_t error;
    switch (key) {
    case ORDER:
        error = options_word(state, "--order", text, order_words, &word);
        a->order = (sparge_order)word;
        return error;
    case SEED: return options_whole(state, "--seed", text, 0, INT64_MAX, &a->seed);
    case TEXT_BEFORE:
        return options_whole(state, "--text-before", text, 0, INT64_MAX, &g->text_before);
    case TEXT_AFTER:
        return options_whole(state, "--text-after", text, 0, INT64_MAX, &g->text_after);
    case 'o': a->output = text; return 0;
    case ARGP_KEY_ARG:
        if (a->sides == 3)
            return options_wrong(state, "'%.60s' is one side too many", text);
        word = a->sides++;
        return options_whole(state, sides[word], text, 0, INT64_MAX, side[word]);
    case ARGP_KEY_END:
        return a->sides == 3 ? 0 : options_wrong(state, "give T, H and W, the sides of the grid");
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp order_argp = {
    .options = order_options,
    .parser = order_parser,
    .args_doc = "T H W",
    .doc = "An order for the tokens of a T x H x W grid, with its longest step as JSON on stdout.",
};

/* Manhattan distance of two tokens that the grid numbers from 0. */
static int64_t step(const sparge_grid *g, int64_t a, int64_t b)
{
    return llabs(a % g->w - b % g->w) + llabs(a / g->w % g->h - b / g->w % g->h) +
           llabs(a / g->w / g->h - b / g->w / g->h);
}

exit_code order_command(int argc, char **argv, file_error *error)
{
    static array index;
    order_args a = {.base = {error}, .order = SPARGE_HILBERT};
    must(options_parse(&order_argp, argc, argv, &a.base));
    const sparge_grid *g = &a.grid;
    int64_t image, total, longer = 0, longest = 0;
    if (__builtin_mul_overflow(g->t, g->h, &image) || __builtin_mul_overflow(image, g->w, &image) ||
        __builtin_add_overflow(image, g->text_before, &total) ||
        __builtin_add_overflow(total, g->text_after, &total))
        fail(EXIT_USAGE, NULL, "a grid of %lld x %lld x %lld and its text are too many tokens",
             (long long)g->t, (long long)g->h, (long long)g->w);
    output_file *file = a.output ? output_open(a.output, error) : NULL;
    must_do(file || !a.output);
    must_have(array_alloc(ARRAY_I64, 1, &total, &index, error));
    int64_t *place = index.data;
    must_sparge(sparge_token_order(a.order, g, (uint64_t)a.seed, place, &library_error));
    for (int64_t p = g->text_before + 1; p < g->text_before + image; p++) {
        const int64_t far = step(g, place[p] - g->text_before, place[p - 1] - g->text_before);
        longer += far > 1;
        longest = far > longest ? far : longest;
    }
    must_do(!file || npy_write(output_stream(file), a.output, &index, error));
    must(print_json(json_pack("{s:s, s:I, s:I, s:I}", "order", order_words[a.order], "tokens",
                              (json_int_t)total, "longer_steps", (json_int_t)longer, "longest_step",
                              (json_int_t)longest),
                    error));
    must_do(outputs_commit(error));
    array_free(&index);
    return EXIT_FINE;
}
