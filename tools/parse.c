/* SPDX-License-Identifier: Apache-2.0 */
/* parse.c: command lines by argp, without its exits and its prints. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "tools/options.h"

error_t options_wrong(struct argp_state *state, const char *format, ...)
{
    char text[256];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    const options_base *base = state->input;
    file_error_set(base->error, NULL, "%s; see '%s --help'", text, state->argv[0]);
    return EINVAL;
}

int options_distance(const char *a, const char *b)
{
    enum { LONGEST = 32 };
    int row[LONGEST + 1]; /* edits from the part of a so far to every start of b */
    const int length = (int)strnlen(b, LONGEST);
    for (int j = 0; j <= length; j++)
        row[j] = j;
    for (int i = 0; a[i] && i < LONGEST; i++) {
        int diagonal = row[0];
        row[0] = i + 1;
        for (int j = 0; j < length; j++) {
            const int change = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            const int edit = (row[j] < diagonal ? row[j] : diagonal) + 1;
            row[j + 1] = change < edit ? change : edit;
        }
    }
    return row[length];
}

/* Among the options of a command those that a word may stand for, and the one that is nearest. */
typedef struct search {
    const char *word;
    size_t length;
    int matches; /* 1 where one is the whole word */
    bool whole;
    const struct argp_option *match, *nearest;
} search;

static void search_options(const struct argp *argp, search *s)
{
    for (const struct argp_child *c = argp->children; c && c->argp; c++)
        search_options(c->argp, s);
    for (const struct argp_option *o = argp->options; o && (o->name || o->doc); o++) {
        if (!o->name || s->whole)
            continue;
        if (strncmp(o->name, s->word, s->length) == 0) {
            s->whole = strlen(o->name) == s->length;
            s->matches = s->whole ? 1 : s->matches + 1;
            s->match = o;
        }
        if (!s->nearest ||
            options_distance(s->word, o->name) < options_distance(s->word, s->nearest->name))
            s->nearest = o;
    }
}

/* getopt says only that it failed; this says why. */
static error_t explain(struct argp_state *state)
{
    const char *text = state->argv[state->next > 1 ? state->next - 1 : 0];
    if (strncmp(text, "--", 2) != 0) {
        if (strcmp(text, "-o") == 0)
            return options_wrong(state, "-o needs a value");
        return options_wrong(state, "an unknown option at or after '%.60s'", text);
    }
    char word[64];
    snprintf(word, sizeof word, "%.*s", (int)strcspn(text + 2, "="), text + 2);
    search s = {.word = word, .length = strlen(word)};
    search_options(state->root_argp, &s);
    if (s.matches == 0)
        return options_wrong(state, "unknown option --%s: did you mean --%s?", word,
                             s.nearest->name);
    if (s.matches > 1)
        return options_wrong(state, "--%s may be several options", word);
    return options_wrong(state, "--%s %s", s.match->name,
                         s.match->arg ? "needs a value" : "takes no value");
}

typedef struct parse {
    options_base base;
    options_base *input; /* of the parser of a command */
    bool help;
} parse;

static error_t root_parser(int key, char *text, struct argp_state *state)
{
    (void)text;
    parse *p = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = p->input; return 0;
    case 'h': p->help = true; return ECANCELED;
    case ARGP_KEY_ERROR: return p->help || p->base.error->text[0] ? 0 : explain(state);
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* Words of an earlier version, which abbreviations would otherwise take for the new ones. */
static const char *const renamed[][2] = {
    {"qk", "qk-dtype"},         {"pv", "pv-dtype"},        {"rung", "kernel"},
    {"scale", "softmax-scale"}, {"dump", "intermediates"},
};

/* Refuses the first of them whose new name is an option of the command. */
static bool refuse_renamed(const struct argp *argp, int argc, char **argv, file_error *error)
{
    for (int n = 1; n < argc && strcmp(argv[n], "--") != 0; n++)
        for (size_t w = 0; w < sizeof renamed / sizeof *renamed; w++) {
            const char *old = renamed[w][0], *now = renamed[w][1];
            const size_t length = strlen(old);
            search s = {.word = now, .length = strlen(now)};
            search_options(argp, &s);
            if (s.whole && strncmp(argv[n], "--", 2) == 0 &&
                strncmp(argv[n] + 2, old, length) == 0 && strchr("=", argv[n][2 + length]))
                return file_error_set(error, NULL, "--%s is now --%s; see '%s --help'", old, now,
                                      argv[0]);
        }
    return true;
}

exit_code options_parse(const struct argp *argp, int argc, char **argv, options_base *input)
{
    static const struct argp_option help[] = {{"help", 'h', 0, 0, "show this", -1}, {0}};
    const struct argp_child children[] = {{argp, 0, NULL, 0}, {0}};
    const struct argp root = {.options = help, .parser = root_parser, .children = children};
    parse p = {*input, input, false};
    file_error_clear(input->error);
    if (!refuse_renamed(argp, argc, argv, input->error))
        return EXIT_USAGE;
    const error_t failed =
        argp_parse(&root, argc, argv, ARGP_NO_EXIT | ARGP_NO_ERRS | ARGP_NO_HELP, NULL, &p);
    if (failed == ENOMEM) {
        file_error_set(input->error, NULL, "no memory for the command line");
        return EXIT_MACHINE;
    }
    if (p.help)
        argp_help(&root, stdout, ARGP_HELP_SHORT_USAGE | ARGP_HELP_LONG | ARGP_HELP_DOC, argv[0]);
    return p.help ? EXIT_HELPED : failed ? EXIT_USAGE : EXIT_FINE;
}
