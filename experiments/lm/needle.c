/* SPDX-License-Identifier: Apache-2.0 */
/* needle.c: sparge-lm needle: a number is hidden in a long text, and asked for at its end. Each
 * place of the grid is one run over text, question and answer; the answer is right when each of its
 * tokens is the likeliest after those before it. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/lm/lm.h"

typedef struct needle_args {
    options_base base;
    lm_args lm;
    int64_t depths, needles, digits, seed;
    const char *needle, *question;
} needle_args;

enum { DEPTHS = 1280, NEEDLES, DIGITS, SEED, NEEDLE, QUESTION };

static const struct argp_option needle_options[] = {
    {"depths", DEPTHS, "N", 0, "places from the start of the text to its end (5)", 0},
    {"needles", NEEDLES, "N", 0, "numbers hidden at each place (4)", 0},
    {"digits", DIGITS, "N", 0, "of a number (5)", 0},
    {"seed", SEED, "N", 0, "of the numbers (1)", 0},
    {"needle", NEEDLE, "TEXT", 0, "what hides the number, as {}", 0},
    {"question", QUESTION, "TEXT", 0, "what is asked; the number follows", 0},
    {0},
};

static error_t needle_parser(int key, char *text, struct argp_state *state)
{
    needle_args *a = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &a->lm; return 0;
    case DEPTHS: return options_whole(state, "--depths", text, 1, 1000, &a->depths);
    case NEEDLES: return options_whole(state, "--needles", text, 1, 1000, &a->needles);
    case DIGITS: return options_whole(state, "--digits", text, 1, 18, &a->digits);
    case SEED: return options_whole(state, "--seed", text, 0, INT64_MAX, &a->seed);
    case NEEDLE: a->needle = text; return 0;
    case QUESTION: a->question = text; return 0;
    case ARGP_KEY_SUCCESS:
        if (a->lm.texts != 1 || a->lm.lengths == 0)
            return options_wrong(state, "give one text to hide needles in, and --length");
        if (!strstr(a->needle, "{}"))
            return options_wrong(state, "--needle has no {}, where the number goes");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {{&lm_argp, 0, NULL, 0}, {0}};
static const struct argp needle_argp = {
    .options = needle_options,
    .parser = needle_parser,
    .args_doc = "MODEL TEXT",
    .doc = "Needles in a haystack: a number is hidden in TEXT at each depth and length, and asked "
           "for at the end. An answer is right when each of its tokens is the likeliest. JSON on "
           "stdout; --csv has the grid.\vWith -o rows are kept as they come, and after an "
           "interruption the same command goes on.",
    .children = children,
};

/* ---- One place of the grid ---- */

/* The n-th number of so many digits that a seed gives: splitmix64. */
static void draw_number(const needle_args *a, int64_t n, char text[24])
{
    uint64_t low = 1;
    for (int64_t d = 1; d < a->digits; d++)
        low *= 10;
    uint64_t x = (uint64_t)a->seed * 0xd1342543de82ef95u + ((uint64_t)n + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    snprintf(text, 24, "%" PRIu64, low + (x ^ x >> 31) % (9 * low));
}

/* The needle with its number, to be freed. */
static char *fill_in(const char *needle, const char *number)
{
    const size_t length = strlen(number);
    char *filled = malloc(strlen(needle) * (length + 1) + 1), *to = filled;
    for (const char *c = needle; filled && *c;) {
        const bool hole = strncmp(c, "{}", 2) == 0;
        if (hole)
            memcpy(to, number, length);
        else
            *to = *c;
        to += hole ? length : 1;
        c += hole ? 2 : 1;
    }
    if (filled)
        *to = '\0';
    return filled;
}

typedef struct haystack {
    int32_t *token;         /* [tokens] */
    int64_t tokens, answer; /* the last so many are the answer */
} haystack;

/* Where a line ends, at or shortly before this place. */
static int64_t line_before(const lm *m, const int32_t *token, int64_t place)
{
    for (int64_t n = place; n > 0 && n > place - 128; n--) {
        const span s = tokenizer_spelling(m->tokenizer, token[n - 1]);
        if (s.length >= 2 &&
            memcmp(s.text + s.length - 2, "\xc4\x8a", 2) == 0) /* how a line feed is shown */
            return n;
    }
    return place;
}

/* Text, needle, text, question, answer: `tokens` in all. Needle n of a place begins elsewhere in
 * the text. */
static exit_code make_haystack(lm *m, const needle_args *a, int64_t depth, int64_t n,
                               const char *number, haystack *to)
{
    const lm_text *from = m->text;
    int32_t *part[3] = {0};
    int64_t count[3] = {0};
    char answer[32];
    char *needle = fill_in(a->needle, number);
    snprintf(answer, sizeof answer, " %s", number);
    const char *const texts[] = {needle, a->question, answer};
    exit_code code = needle ? EXIT_FINE : EXIT_MACHINE;
    for (int p = 0; p < 3 && !code; p++)
        code = lm_encode(m, "needle", texts[p], strlen(texts[p]), &part[p], &count[p]);
    const int64_t lead = m->files.vocabulary.bos >= 0 &&
                         from->token[0] == m->files.vocabulary.bos; /* it stays first */
    const int64_t hay = to->tokens - lead - count[0] - count[1] - count[2],
                  available = from->tokens - lead;
    if (!code && (hay < 1 || hay > available)) {
        file_error_set(m->error, from->path,
                       "has %" PRId64 " tokens; %" PRId64 " with needle and question need %" PRId64,
                       available, to->tokens, hay);
        code = EXIT_FILE;
    }
    if (!code) {
        const int64_t start = a->needles > 1 ? (available - hay) * n / a->needles : 0;
        const int32_t *text = from->token + lead + start;
        const int64_t place =
            line_before(m, text, a->depths > 1 ? hay * depth / (a->depths - 1) : hay / 2);
        int32_t *at = to->token;
        if (lead)
            *at++ = from->token[0];
        memcpy(at, text, (size_t)place * sizeof *at);
        at += place;
        memcpy(at, part[0], (size_t)count[0] * sizeof *at);
        at += count[0];
        memcpy(at, text + place, (size_t)(hay - place) * sizeof *at);
        at += hay - place;
        memcpy(at, part[1], (size_t)count[1] * sizeof *at);
        memcpy(at + count[1], part[2], (size_t)count[2] * sizeof *at);
        to->answer = count[2];
    }
    for (int p = 0; p < 3; p++)
        free(part[p]);
    free(needle);
    return code;
}

/* How many tokens of the answer are the likeliest; NaN, if a logit is not finite: then none is. */
static exit_code count_right(lm *m, const haystack *h, const float *hidden, double *right)
{
    const int64_t vocab = m->hyper->vocab, first = h->tokens - h->answer;
    float *logits = malloc((size_t)(h->answer * vocab) * sizeof *logits);
    exit_code code = EXIT_MACHINE;
    if (logits)
        code = model_logits(m->model, hidden + (first - 1) * m->hyper->dim, h->answer, logits,
                            m->error);
    else
        file_error_set(m->error, NULL, "no memory for the logits of an answer");
    *right = 0.0;
    for (int64_t r = 0; r < h->answer && !code; r++) {
        const float *row = logits + r * vocab;
        int64_t best = 0;
        bool finite = true;
        for (int64_t n = 0; n < vocab; n++) {
            best = row[n] > row[best] ? n : best;
            finite &= isfinite(row[n]) != 0;
        }
        *right += finite ? best == h->token[first + r] : NAN;
    }
    free(logits);
    return code;
}

static exit_code run_place(lm *m, const needle_args *a, const choice *c, int64_t tokens,
                           int64_t depth, int64_t n)
{
    char number[24];
    draw_number(a, n, number);
    json_t *row = lm_job(c, m->text, tokens);
    const double at = a->depths > 1 ? (double)depth / (double)(a->depths - 1) : 0.5;
    json_object_set_new(row, "depth", json_rounded(at, 4));
    json_object_set_new(row, "needle", json_integer(n));
    json_object_set_new(row, "number", json_string(number));
    if (lm_has(m, row))
        return EXIT_FINE;
    haystack h = {malloc((size_t)tokens * sizeof *h.token), tokens, 0};
    float *hidden = lm_hidden(m, tokens);
    double right;
    exit_code code = h.token && hidden ? make_haystack(m, a, depth, n, number, &h) : EXIT_MACHINE;
    if (!code)
        code = lm_run(m, c, h.token, tokens, hidden);
    if (!code)
        code = count_right(m, &h, hidden, &right);
    free(h.token);
    free(hidden);
    if (code) {
        json_decref(row);
        return code;
    }
    json_object_set_new(row, "right",
                        isnan(right) ? json_null() : json_integer(right == (double)h.answer));
    json_object_set_new(row, "tokens_right",
                        isnan(right) ? json_null() : json_integer((json_int_t)right));
    json_object_set_new(row, "tokens_of_answer", json_integer(h.answer));
    lm_describe(m, row);
    return rows_add(&m->rows, row, m->error);
}

/* ---- The grid ---- */

/* For each attention and length: the share of answers that are right, and of their tokens. */
static json_t *summarise(const lm *m)
{
    json_t *list = rows_groups(&m->rows);
    size_t n;
    json_t *group;
    json_array_foreach(list, n, group)
    {
        const json_t *all = json_object_get(group, "rows");
        const double right = rows_sum(all, "right") / (double)json_array_size(all);
        const double tokens = rows_sum(all, "tokens_right") / rows_sum(all, "tokens_of_answer");
        rows_means(group);
        json_object_set_new(group, "right", json_rounded(right, 6));
        json_object_set_new(group, "tokens_right", json_rounded(tokens, 6));
    }
    return list;
}

exit_code needle_command(int argc, char **argv, file_error *error)
{
    needle_args a = {
        .base = {error},
        .depths = 5,
        .needles = 4,
        .digits = 5,
        .seed = 1,
        .needle = "\nThe pass key is {}. Remember it. The pass key is {}.\n",
        .question = "\nWhat is the pass key? The pass key is",
    };
    lm m;
    exit_code code = lm_open(&m, &needle_argp, argc, argv, &a.base, &a.lm);
    for (int k = 0; k < a.lm.lengths && !code; k++) {
        code = lm_check_length(&m, m.text, a.lm.length[k]);
        lm_expect(&m, a.lm.length[k], (double)(m.choices * a.depths * a.needles));
    }
    if (!code)
        code = lm_begin(&m, "needle",
                        json_pack("{s:I, s:I, s:I, s:I, s:s, s:s}", "depths", (json_int_t)a.depths,
                                  "needles", (json_int_t)a.needles, "digits", (json_int_t)a.digits,
                                  "seed", (json_int_t)a.seed, "needle", a.needle, "question",
                                  a.question));
    for (int k = 0; k < a.lm.lengths && !code; k++)
        for (int64_t depth = 0; depth < a.depths && !code; depth++)
            for (int64_t n = 0; n < a.needles && !code; n++)
                for (int c = 0; c < m.choices && !code; c++)
                    code = run_place(&m, &a, &m.choice[c], a.lm.length[k], depth, n);
    if (!code)
        code = lm_finish(&m, summarise(&m));
    lm_close(&m);
    return code;
}
