/* tune.c: sparge tune: thresholds for every head, found from captures. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/capture.h"
#include "tools/inputs.h"
#include "tools/interrupt.h"
#include "tools/output.h"
#include "tools/params.h"
#include "tools/progress.h"

enum { L1 = OPT_COMMAND, L2, BOUND, SPARSITY, BY, HELD_OUT, SECONDS, MODEL };

static const struct argp_option tune_options[] = {
    {"l1", L1, "X", 0, "relative L1 that theta and tau may cost (0.07)", 0},
    {"l2", L2, "X", 0, "and with lambda (0.08)", 0},
    {"bound", BOUND, "WHAT", 0, "the worst capture, or the mean over them (worst)", 0},
    {"sparsity", SPARSITY, "X", 0,
     "instead: reach this sparsity with the least error, without lambda", 0},
    {"by", BY, "WHAT", 0, "choose tau, or topk in its place (tau)", 0},
    {"held-out", HELD_OUT, "CAPTURE", 0,
     "judge on this one and do not tune on it; may be repeated; "
     "without one, each capture is left out in turn",
     0},
    {"seconds", SECONDS, "X", 0, "stop after so long; the same command goes on", 0},
    {"model", MODEL, "NAME", 0, "where no manifest says it", 0},
    {0},
};

typedef struct paths {
    const char **path;
    int64_t count;
} paths;

typedef struct tune_args {
    options_base base;
    attention_args attention;
    sparge_tune_options how;
    const char *model;
    paths tuned, held; /* captures to tune on, and those that are held out */
} tune_args;

static const char *const shares[] = {"tau", "topk", NULL}, *const bounds[] = {"worst", "mean",
                                                                              NULL};

static error_t append(paths *to, const char *path)
{
    const char **more = realloc(to->path, (size_t)(to->count + 1) * sizeof *more);
    if (!more)
        return ENOMEM;
    to->path = more;
    to->path[to->count++] = path;
    return 0;
}

static bool is_text(const char *bytes)
{
    json_t *text = json_string(bytes);
    json_decref(text);
    return text != NULL;
}

static error_t check_args(struct argp_state *state, tune_args *a)
{
    static const options_conflict instead = {
        SPARSITY, {L1, L2, BOUND}, "is sought instead of a bound"};
    const sparge_tune_options *how = &a->how;
    if (a->tuned.count == 0)
        return options_wrong(
            state, "give a capture: a .safetensors file of q, k and v, or a folder of them");
    if (!a->attention.output)
        return options_wrong(state, "-o is missing: where to write the thresholds");
    if (options_refuse(state, a->attention.given, &instead, 1))
        return EINVAL;
    if (how->sparsity == 0.0 && !(how->l1 < how->l2))
        return options_wrong(state, "--l1 is %g and --l2 is %g: l1 must be the smaller", how->l1,
                             how->l2);
    if (a->attention.given & option_bits(OPT_THETA, OPT_LAMBDA))
        return options_wrong(state, "--theta, --tau, --topk and --lambda are what is tuned");
    if (!is_text(a->attention.output) || (a->model && !is_text(a->model)))
        return options_wrong(state, "-o and --model must be UTF-8 text, to be written in JSON");
    return 0;
}

static error_t tune_parser(int key, char *text, struct argp_state *state)
{
    tune_args *a = state->input;
    sparge_tune_options *how = &a->how;
    int word = 0;
    error_t error;
    if (key >= OPT_COMMAND && key <= MODEL)
        a->attention.given |= option_bit(key);
    switch (key) {
    case ARGP_KEY_INIT: /* a second time after --rules */
        state->child_inputs[0] = state->child_inputs[1] = &a->attention;
        a->tuned.count = a->held.count = 0;
        return 0;
    case ARGP_KEY_ARG: return append(&a->tuned, text);
    case L1: return options_real(state, "--l1", text, 1e-9, 1e9, &how->l1);
    case L2: return options_real(state, "--l2", text, 1e-9, 1e9, &how->l2);
    case BOUND:
        error = options_word(state, "--bound", text, bounds, &word);
        how->mean = word == 1;
        return error;
    case SPARSITY: return options_real(state, "--sparsity", text, 1e-6, 0.999999, &how->sparsity);
    case BY:
        error = options_word(state, "--by", text, shares, &word);
        how->topk = word == 1;
        return error;
    case HELD_OUT: return append(&a->held, text);
    case SECONDS: return options_real(state, "--seconds", text, 1e-9, 1e9, &how->seconds);
    case MODEL: a->model = text; return 0;
    case ARGP_KEY_SUCCESS: return check_args(state, a);
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp shared = {.options = attention_options, .parser = attention_parser};
/* Their groups stay apart. */
static const struct argp_child tune_children[] = {
    {&shared, 0, "", 1}, {&manifest_argp, 0, "", 1}, {0}};
static const struct argp tune_argp = {
    .options = tune_options,
    .parser = tune_parser,
    .args_doc = "CAPTURE...",
    .doc =
        "Thresholds for every head: theta and tau of the most sparsity at a relative L1 below l1, "
        "then lambda "
        "below l2, on every capture; and what they cost on captures that they were not tuned on.\v"
        "A capture is a .safetensors file of q, k and v, or a folder of them with a manifest.json, "
        "or a folder of "
        "such folders. Causality and scale are those of the manifests. The file that -o names "
        "grows head by head; "
        "after an interruption the same command goes on with it.",
    .children = tune_children,
};

/* ---- The work ---- */

/* What is tuned together: the captures of the same layer and heads. */
typedef struct unit {
    const capture **capture;
    int64_t count, held_out;
} unit;

typedef struct tune {
    tune_args args;
    capture *capture; /* those to tune on, then those that are held out */
    int64_t captures, held_out;
    const char *model, *weights;
    unit *unit;
    int64_t units;
    json_t *header; /* with its lists `inputs` and `heads`: what the file holds */
    /* Of the unit at hand: */
    inputs *in;
    sparge_tuned *tuned;
    bool left;      /* heads are, of this unit or one before it */
    exit_code code; /* of writing a head */
    progress watch;
    double start;
    int64_t unit_at;
    file_error *error;
} tune;

static bool same_heads(const capture *a, const capture *b)
{
    return a->layer == b->layer &&
           (a->heads && b->heads ? json_equal((json_t *)a->heads, (json_t *)b->heads)
                                 : a->heads == b->heads);
}

/* Some of the same heads, or who knows? */
static bool share_heads(const capture *a, const capture *b)
{
    bool some = a->layer == b->layer && (!a->heads || !b->heads);
    for (size_t n = 0; a->layer == b->layer && n < json_array_size(a->heads); n++)
        for (size_t m = 0; m < json_array_size(b->heads); m++)
            some |= capture_head(a, (int64_t)n) == capture_head(b, (int64_t)m);
    return some;
}

static const char *name_of(const capture *c) { return basename(c->path); }

/* May it be tuned on beside these of the same heads? */
static exit_code check_capture(const capture *c, const unit *u, file_error *error)
{
    if (!is_text(name_of(c))) {
        file_error_set(error, c->path,
                       "its name is no UTF-8 text, to be written in JSON; rename it");
        return EXIT_FILE;
    }
    for (int64_t n = 0; n < u->count; n++)
        if (strcmp(u->capture[n]->sha256, c->sha256) == 0) {
            file_error_set(error, c->path, "holds what %.100s holds; give each capture once",
                           u->capture[n]->path);
            return EXIT_FILE;
        }
    return EXIT_FINE;
}

static int by_layer(const void *a, const void *b)
{
    const capture *x = ((const unit *)a)->capture[0], *y = ((const unit *)b)->capture[0];
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    const int64_t m = capture_head(x, 0), n = capture_head(y, 0);
    return (m > n) - (m < n);
}

static exit_code no_memory(file_error *error)
{
    file_error_set(error, NULL, "no memory for the captures");
    return EXIT_MACHINE;
}

static exit_code find(tune *t)
{
    const attention_args *a = &t->args.attention;
    const paths *const list[] = {&t->args.tuned, &t->args.held};
    exit_code code = EXIT_FINE;
    for (int l = 0; l < 2; l++) {
        const int64_t before = t->captures;
        for (int64_t n = 0; n < list[l]->count && !code; n++)
            code = capture_find(list[l]->path[n], a->ignore_manifest, &t->capture, &t->captures,
                                t->error);
        t->held_out = t->captures - before;
    }
    return code;
}

/* What nobody says would be taken for several texts of one layer. */
static exit_code find_layers(tune *t)
{
    const int64_t asked = t->args.attention.layer;
    exit_code code = EXIT_FINE;
    for (int64_t n = 0; n < t->captures && !code; n++) {
        capture *c = &t->capture[n];
        code = capture_layer(c, asked, &c->layer, t->error);
        c->layer_named &= asked < 0;
        if (!code && c->layer < 0 && t->captures > 1) {
            file_error_set(t->error, c->path,
                           "neither a manifest nor its name says of which layer it is; give "
                           "--layer, if all such files are of one");
            code = EXIT_FILE;
        }
        c->layer = c->layer < 0 ? 0 : c->layer;
    }
    return code;
}

static void say_layers(const tune *t)
{
    const capture *first = NULL;
    int64_t count = 0;
    for (int64_t n = 0; n < t->captures; n++)
        if (t->capture[n].layer_named && count++ == 0)
            first = &t->capture[n];
    if (first)
        fprintf(stderr,
                "sparge: no manifest says the layer of %" PRId64 " of %" PRId64
                " files, so their names do: %s "
                "is of layer %" PRId64 "\n",
                count, t->captures, capture_name(first), first->layer);
}

static exit_code group(tune *t)
{
    t->unit = calloc((size_t)t->captures + 1, sizeof *t->unit);
    if (!t->unit)
        return no_memory(t->error);
    for (int64_t n = 0; n < t->captures; n++) {
        const capture *c = &t->capture[n];
        int64_t u = 0;
        for (; u < t->units && !same_heads(t->unit[u].capture[0], c); u++)
            if (share_heads(t->unit[u].capture[0], c)) {
                file_error_set(t->error, c->path,
                               "has heads of layer %" PRId64 " that %.100s has too, but not the "
                               "same ones; give captures of the same heads",
                               c->layer, t->unit[u].capture[0]->path);
                return EXIT_FILE;
            }
        unit *to = &t->unit[u];
        if (!to->capture)
            to->capture = calloc((size_t)t->captures + 1, sizeof *to->capture);
        if (!to->capture)
            return no_memory(t->error);
        t->units += u == t->units;
        const exit_code code = check_capture(c, to, t->error);
        if (code)
            return code;
        to->capture[to->count++] = c;
        to->held_out += n >= t->captures - t->held_out;
        const char *model = c->model ? c->model : t->args.model;
        if (t->args.model && strcmp(model, t->args.model) != 0) {
            file_error_set(t->error, c->path,
                           "is of the model '%.60s', as its manifest says, not of '%.60s'; leave "
                           "out --model, or give --ignore-manifest",
                           model, t->args.model);
            return EXIT_FILE;
        }
        if (n > 0 &&
            ((model == NULL) != (t->model == NULL) || (model && strcmp(model, t->model) != 0))) {
            file_error_set(t->error, c->path,
                           "is of the model '%.60s', and the first capture of '%.60s'",
                           model ? model : "unknown", t->model ? t->model : "unknown");
            return EXIT_FILE;
        }
        t->model = model;
        t->weights = c->weights && (n == 0 || (t->weights && strcmp(t->weights, c->weights) == 0))
                         ? c->weights
                         : NULL;
    }
    for (int64_t u = 0; u < t->units; u++)
        if (t->unit[u].held_out == t->unit[u].count) {
            file_error_set(t->error, t->unit[u].capture[0]->path,
                           "is held out, and nothing else is there of its "
                           "layer %" PRId64 " to tune on",
                           t->unit[u].capture[0]->layer);
            return EXIT_FILE;
        }
    qsort(t->unit, (size_t)t->units, sizeof *t->unit, by_layer);
    return EXIT_FINE;
}

/* Attention as in the model: as the manifest of the first capture says; of the others it must say
 * the same. */
static exit_code settle_options(tune *t)
{
    const capture *first = t->unit[0].capture[0];
    attention_args *a = &t->args.attention;
    attention_args file = *a;
    inputs in;
    file.file[0] = first->path;
    file.files = 1;
    exit_code code = inputs_read(&file, true, &in, t->error);
    if (!code)
        code = capture_obey(first, &in.problem, a->given, &a->options, t->error);
    inputs_free(&in);
    return code;
}

/* ---- The file ---- */

static json_t *describe_input(const capture *c, bool held_out)
{
    return json_pack("{s:I, s:s?, s:s, s:s, s:b}", "layer", (json_int_t)c->layer, "sample",
                     c->sample, "file", name_of(c), "sha256", c->sha256, "held_out", held_out);
}

static exit_code make_header(tune *t)
{
    const tune_args *a = &t->args;
    const bool bounded = a->how.sparsity == 0.0;
    t->header = params_header(t->model, t->weights, &a->attention.options);
    json_object_set_new(t->header, "by", json_string(shares[a->how.topk]));
    json_object_set_new(t->header, "bound",
                        bounded ? json_string(bounds[a->how.mean]) : json_null());
    json_object_set_new(t->header, "l1", bounded ? json_rounded(a->how.l1, 9) : json_null());
    json_object_set_new(t->header, "l2", bounded ? json_rounded(a->how.l2, 9) : json_null());
    json_object_set_new(t->header, "sparsity",
                        bounded ? json_null() : json_rounded(a->how.sparsity, 9));
    json_t *list = json_array();
    for (int64_t u = 0; u < t->units; u++)
        for (int64_t n = 0; n < t->unit[u].count; n++)
            json_array_append_new(
                list,
                describe_input(t->unit[u].capture[n], n >= t->unit[u].count - t->unit[u].held_out));
    json_object_set_new(t->header, "inputs", list);
    return json_object_set_new(t->header, "heads", json_array()) ? no_memory(t->error) : EXIT_FINE;
}

/* What an earlier run left in the file, if it was of the same captures and options. */
static exit_code take_up(tune *t)
{
    const char *path = t->args.attention.output;
    params before;
    for (int64_t n = 0; n < t->captures; n++) {
        const char *const input[] = {t->capture[n].path, t->capture[n].from};
        if (inputs_spare(path, input, 2, t->error))
            return EXIT_USAGE;
    }
    if (access(path, F_OK) != 0)
        return EXIT_FINE;
    const exit_code code = params_read(path, &before, t->error);
    if (code)
        return code;
    json_t *heads = json_incref(json_object_get(before.json, "heads"));
    json_object_set_new(before.json, "heads", json_array());
    const bool same = json_equal(before.json, t->header);
    if (same)
        json_object_set(t->header, "heads", heads);
    json_decref(heads);
    params_free(&before);
    if (!same)
        file_error_set(t->error, path,
                       "is of other captures or other options; choose another name, or remove it");
    return same ? EXIT_FINE : EXIT_FILE;
}

static int compare_lines(const void *a, const void *b)
{
    const json_t *const *x = a, *const *y = b;
    const char *const key[] = {"layer", "head"};
    for (int n = 0; n < 2; n++) {
        const json_int_t m = json_integer_value(json_object_get(*x, key[n]));
        const json_int_t k = json_integer_value(json_object_get(*y, key[n]));
        if (m != k)
            return m < k ? -1 : 1;
    }
    return 0;
}

/* In the order of layers and heads, whichever was done first. */
static exit_code sort_heads(tune *t)
{
    json_t *heads = json_object_get(t->header, "heads");
    const size_t count = json_array_size(heads);
    json_t **line = calloc(count + 1, sizeof *line);
    if (!line)
        return no_memory(t->error);
    for (size_t n = 0; n < count; n++)
        line[n] = json_incref(json_array_get(heads, n));
    qsort(line, count, sizeof *line, compare_lines);
    for (size_t n = 0; n < count; n++)
        json_array_set_new(heads, n, line[n]);
    free(line);
    return EXIT_FINE;
}

static exit_code save(tune *t)
{
    const exit_code sorted = sort_heads(t);
    return sorted ? sorted : json_save(t->args.attention.output, t->header, t->error);
}

/* Can it be written? What is there stays. */
static exit_code probe(tune *t)
{
    const char *path = t->args.attention.output;
    output_file *file = output_open(path, t->error);
    const bool ok = file && json_write_lines(output_stream(file), path, t->header, t->error);
    outputs_discard();
    return ok ? EXIT_FINE : EXIT_FILE;
}

static json_t *errors_json(const sparge_tune_errors *e)
{
    if (e->inputs == 0)
        return json_null();
    return json_pack("{s:I, s:o, s:o, s:o, s:I, s:I}", "inputs", (json_int_t)e->inputs, "l1",
                     json_rounded(e->mean, 6), "worst_l1", json_rounded(e->worst, 6), "sparsity",
                     json_rounded(e->sparsity, 6), "nan_got", (json_int_t)e->nan, "inf_got",
                     (json_int_t)e->inf);
}

static void finished(void *user, int64_t h)
{
    static const char *const back_offs[] = {"none", "lambda lowered", "tau raised", "left dense"};
    tune *t = user;
    const capture *c = t->unit[t->unit_at].capture[0];
    const sparge_tuned *head = &t->tuned[h];
    json_t *line = params_line(c->layer, capture_head(c, h), head->dense, &head->thresholds);
    json_object_set_new(line, "finite", json_boolean(head->finite));
    json_object_set_new(line, "back_off", json_string(back_offs[head->back_off]));
    json_object_set_new(line, "in_sample", errors_json(&head->in_sample));
    json_object_set_new(line, "held_out", errors_json(&head->held_out));
    json_object_set_new(line, "held_out_first", errors_json(&head->held_out_first));
    json_object_set_new(line, "dense_passes", json_rounded(head->dense_passes, 4));
    json_object_set_new(line, "seconds", json_rounded(head->seconds, 4));
    if (json_array_append_new(json_object_get(t->header, "heads"), line))
        t->code = no_memory(t->error);
    else if (!t->code)
        t->code = save(t);
    if (!head->finite)
        fprintf(stderr,
                "sparge: layer %" PRId64 " head %" PRId64 ": %" PRId64
                " elements of its captures, or of "
                "attention over them, are not finite; left dense\n",
                c->layer, capture_head(c, h), head->nonfinite);
    const sparge_tune_errors *in = &head->in_sample, *out = &head->held_out;
    if (in->nan + in->inf + out->nan + out->inf)
        fprintf(stderr,
                "sparge: layer %" PRId64 " head %" PRId64 ": o has %" PRId64 " NaN and %" PRId64
                " infinite "
                "elements under its thresholds; its error is not known\n",
                c->layer, capture_head(c, h), in->nan + out->nan, in->inf + out->inf);
}

/* ---- One unit ---- */

static bool goes_on(void *user, double done)
{
    tune *t = user;
    return progress_tick(&t->watch, ((double)t->unit_at + done) / (double)t->units) && !t->code;
}

static exit_code read_inputs(tune *t, const unit *u, sparge_problem *problem)
{
    exit_code code = EXIT_FINE;
    for (int64_t n = 0; n < u->count && !code; n++) {
        attention_args file = t->args.attention;
        file.file[0] = u->capture[n]->path;
        file.files = 1;
        code = inputs_read(&file, true, &t->in[n], t->error);
        problem[n] = t->in[n].problem;
        if (!code)
            code = capture_obey(u->capture[n], &problem[n], options_all(), &file.options, t->error);
        const sparge_problem *p = &problem[n], *first = problem;
        if (!code && (p->heads != first->heads || p->kv_heads != first->kv_heads ||
                      p->dim != first->dim || p->dim_v != first->dim_v)) {
            file_error_set(t->error, u->capture[n]->path,
                           "has %" PRId64 " heads, %" PRId64 " key heads and %" PRId64
                           " channels, not %" PRId64 ", %" PRId64 " and %" PRId64 " as %.100s",
                           p->heads, p->kv_heads, p->dim, first->heads, first->kv_heads, first->dim,
                           u->capture[0]->path);
            code = EXIT_FILE;
        }
    }
    return code;
}

/* Heads that the file has already. */
static void mark_done(const tune *t, const unit *u, int64_t heads)
{
    const json_t *lines = json_object_get(t->header, "heads");
    for (size_t n = 0; n < json_array_size(lines); n++) {
        const json_t *line = json_array_get(lines, n);
        for (int64_t h = 0; h < heads; h++)
            if (json_integer_value(json_object_get(line, "layer")) == u->capture[0]->layer &&
                json_integer_value(json_object_get(line, "head")) == capture_head(u->capture[0], h))
                t->tuned[h].done = true;
    }
}

static exit_code tune_unit(tune *t)
{
    const unit *u = &t->unit[t->unit_at];
    sparge_problem *problem = calloc((size_t)u->count, sizeof *problem);
    t->in = calloc((size_t)u->count, sizeof *t->in);
    exit_code code = problem && t->in ? read_inputs(t, u, problem) : no_memory(t->error);
    t->tuned = code ? NULL : calloc((size_t)problem->heads, sizeof *t->tuned);
    if (!code && !t->tuned)
        code = no_memory(t->error);
    if (!code) {
        sparge_tune_options how = t->args.how;
        sparge_error why;
        if (how.seconds > 0.0)
            how.seconds = fmax(1e-9, how.seconds - (progress_clock() - t->start));
        how.held_out = u->held_out;
        how.progress = goes_on;
        how.finished = finished;
        how.user = t;
        mark_done(t, u, problem->heads);
        code = library_result(
            sparge_tune(problem, u->count, &t->args.attention.options, &how, t->tuned, &why), &why,
            t->error);
        for (int64_t h = 0; h < problem->heads; h++)
            t->left |= !t->tuned[h].done;
    }
    free(problem);
    free(t->tuned);
    for (int64_t n = 0; n < u->count && t->in; n++)
        inputs_free(&t->in[n]);
    free(t->in);
    t->tuned = NULL;
    t->in = NULL;
    return t->code ? t->code : code;
}

/* ---- The whole ---- */

/* 0: unknown. */
static int64_t heads_wanted(const tune *t)
{
    int64_t heads = 0;
    for (int64_t u = 0; u < t->units; u++) {
        const capture *c = t->unit[u].capture[0];
        if (!c->heads)
            return 0;
        heads += (int64_t)json_array_size(c->heads);
    }
    return heads;
}

static double number(const json_t *line, const char *object, const char *key)
{
    const json_t *from = object ? json_object_get(line, object) : line;
    const json_t *x = json_object_get(from, key);
    return json_is_number(x) ? json_number_value(x) : NAN;
}

/* NaN is larger than all. */
static double larger(double a, double b) { return isnan(a) || a > b ? a : b; }

/* Heads whose dense attention is itself further off than l1 allows. */
typedef struct noise {
    int64_t heads;
    double least, most;
} noise;

static noise find_noise(const tune *t)
{
    const json_t *heads = json_object_get(t->header, "heads");
    const double l1 = t->args.how.sparsity > 0.0 ? (double)INFINITY : t->args.how.l1;
    noise found = {0, NAN, NAN};
    for (size_t n = 0; n < json_array_size(heads); n++) {
        const json_t *line = json_array_get(heads, n);
        const double error = number(line, "in_sample", t->args.how.mean ? "l1" : "worst_l1");
        if (!json_is_true(json_object_get(line, "dense")) || !(error > l1))
            continue;
        found.heads++;
        found.least = fmin(found.least, error);
        found.most = fmax(found.most, error);
    }
    return found;
}

/* null: there is none. */
static json_t *noise_json(const noise *found)
{
    return found->heads
               ? json_pack("{s:I, s:o, s:o}", "heads", (json_int_t)found->heads, "least",
                           json_rounded(found->least, 6), "most", json_rounded(found->most, 6))
               : json_null();
}

static void warn_of_noise(const tune *t, const noise *found)
{
    const sparge_options *o = &t->args.attention.options;
    if (found->heads)
        fprintf(stderr,
                "sparge: --l1 %g is below the noise of dense attention in %s and %s, %.4g to %.4g, "
                "in %" PRId64
                " of %zu heads: they stay dense; give a larger --l1, or --qk-dtype and "
                "--pv-dtype with less noise\n",
                t->args.how.l1, sparge_dtype_string(o->qk_dtype), sparge_dtype_string(o->pv_dtype),
                found->least, found->most, found->heads,
                json_array_size(json_object_get(t->header, "heads")));
}

static exit_code report(const tune *t)
{
    const json_t *heads = json_object_get(t->header, "heads");
    const size_t count = json_array_size(heads);
    const double l2 = t->args.how.sparsity > 0.0 ? (double)INFINITY : t->args.how.l2;
    double sum[3] = {0}; /* sparsity, held-out sparsity, dense_passes */
    double worst[2] = {0};
    const char *bound = t->args.how.mean ? "l1" : "worst_l1";
    int64_t finite = 0, dense = 0, backed = 0, judged = 0, first = 0, last = 0;
    for (size_t n = 0; n < count; n++) {
        const json_t *line = json_array_get(heads, n);
        const char *back = json_string_value(json_object_get(line, "back_off"));
        dense += json_is_true(json_object_get(line, "dense"));
        backed += back && strcmp(back, "none") != 0;
        if (json_is_true(json_object_get(line, "finite"))) {
            finite++;
            sum[0] += number(line, "in_sample", "sparsity");
            worst[0] = larger(worst[0], number(line, "in_sample", "worst_l1"));
        }
        sum[2] += number(line, NULL, "dense_passes");
        if (!json_is_object(json_object_get(line, "held_out")))
            continue;
        judged++;
        sum[1] += number(line, "held_out", "sparsity");
        worst[1] = larger(worst[1], number(line, "held_out", "worst_l1"));
        first += number(line, "held_out_first", bound) <= l2;
        last += number(line, "held_out", bound) <= l2;
    }
    const double all = count ? (double)count : NAN, out = judged ? (double)judged : NAN;
    const noise found = find_noise(t);
    warn_of_noise(t, &found);
    return print_json(
        json_pack("{s:s, s:I, s:I, s:I, s:I, s:o, s:o, s:I, s:o, s:o, s:I, s:I, s:o, s:o, s:o}",
                  "params", t->args.attention.output, "heads", (json_int_t)count, "nonfinite",
                  (json_int_t)((int64_t)count - finite), "dense", (json_int_t)dense, "backed_off",
                  (json_int_t)backed, "sparsity", json_rounded(sum[0] / all, 6), "worst_l1",
                  finite ? json_rounded(worst[0], 6) : json_null(), "judged", (json_int_t)judged,
                  "held_out_sparsity", json_rounded(sum[1] / out, 6), "held_out_worst_l1",
                  judged ? json_rounded(worst[1], 6) : json_null(), "held_out_within_l2_first",
                  (json_int_t)first, "held_out_within_l2", (json_int_t)last, "dense_passes",
                  json_rounded(sum[2] / all, 4), "seconds",
                  json_rounded(progress_clock() - t->start, 4), "noise", noise_json(&found)),
        t->error);
}

static exit_code stopped(const tune *t)
{
    const size_t done = json_array_size(json_object_get(t->header, "heads"));
    const int64_t wanted = heads_wanted(t);
    char of[32] = "";
    if (wanted)
        snprintf(of, sizeof of, " of %" PRId64, wanted);
    file_error_set(t->error, t->args.attention.output,
                   "%s: it has %zu%s heads; the same command goes on",
                   interrupt_came() ? "interrupted" : "the time is up", done, of);
    return EXIT_UNFINISHED;
}

exit_code tune_command(int argc, char **argv, file_error *error)
{
    tune t = {
        .args = {.base = {error}, .how = {.l1 = 0.07, .l2 = 0.08}},
        .start = progress_clock(),
        .error = error,
    };
    tune_args *a = &t.args;
    exit_code code = attention_parse(&tune_argp, argc, argv, &a->base, &a->attention);
    if (!code)
        code = find(&t);
    if (!code)
        code = find_layers(&t);
    if (!code)
        code = group(&t);
    if (!code)
        code = settle_options(&t);
    if (!code)
        code = make_header(&t);
    if (!code)
        code = take_up(&t);
    if (!code)
        code = probe(&t); /* And from here on an interrupt is an end like others. */
    if (!code) {
        say_layers(&t);
        t.watch = progress_begin("tune");
        for (t.unit_at = 0; t.unit_at < t.units && !code && goes_on(&t, 0.0); t.unit_at++)
            code = tune_unit(&t);
        t.left |= t.unit_at < t.units;
        progress_end(&t.watch);
    }
    if (!code && t.left)
        code = stopped(&t);
    if (!code)
        code = report(&t);
    json_decref(t.header);
    for (int64_t u = 0; u < t.units; u++)
        free(t.unit[u].capture);
    free(t.unit);
    free(a->tuned.path);
    free(a->held.path);
    capture_free(t.capture, t.captures);
    return code;
}
