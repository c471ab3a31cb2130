/* SPDX-License-Identifier: Apache-2.0 */
/* tune.c: sparge tune: thresholds for every head, found from captures. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sparge_inspect.h"
#include "sparge_tune.h"
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
     "judge on this one and do not tune on it; may be repeated; without one, each capture is left "
     "out in turn",
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
        return options_wrong(state,
                             "--theta, --tau, --topk, --min-mass and --lambda are what is tuned");
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

/* Their groups stay apart. */
static const struct argp_child tune_children[] = {
    {&attention_argp, 0, "", 1}, {&manifest_argp, 0, "", 1}, {0}};
static const struct argp tune_argp = {
    .options = tune_options,
    .parser = tune_parser,
    .args_doc = "CAPTURE...",
    .doc = "Thresholds for every head: theta and tau of the most sparsity at a relative L1 below "
           "l1, then lambda below l2, on every capture; and what they cost on captures that they "
           "were not tuned on.\vA capture is a .safetensors file of q, k and v, or a folder of "
           "them with a manifest.json, or a folder of such folders. Causality and scale are those "
           "of the manifests. The file that -o names grows head by head; after an interruption the "
           "same command goes on with it.",
    .children = tune_children,
};

/* ---- The captures of a layer ---- */

/* What is tuned together: the captures of the same heads of a layer, those held out last. */
typedef struct layer {
    const capture **capture;
    int64_t count, held_out;
} layer;

typedef struct tune {
    tune_args args;
    capture *capture; /* those to tune on, then those that are held out */
    int64_t captures, held_out;
    const char *model, *weights;
    layer *layer;
    int64_t layers;
    json_t *header, *heads; /* what the file holds; and the list in it */
    /* Of the layer at hand: */
    int64_t at;
    const sparge_tuned *tuned;
    bool left; /* heads are, of this layer or one before it */
    progress watch;
    double start;
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

static int by_layer(const void *a, const void *b)
{
    const capture *x = ((const layer *)a)->capture[0], *y = ((const layer *)b)->capture[0];
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    const int64_t m = capture_head(x, 0), n = capture_head(y, 0);
    return (m > n) - (m < n);
}

static const char *name_of(const capture *c) { return basename(c->path); }

/* Captures, and the layer of each. What nobody says would be taken for several texts of one layer.
 */
static void find(tune *t)
{
    const attention_args *a = &t->args.attention;
    const paths *const list[] = {&t->args.tuned, &t->args.held};
    for (int l = 0; l < 2; l++) {
        const int64_t before = t->captures;
        for (int64_t n = 0; n < list[l]->count; n++)
            must(capture_find(list[l]->path[n], a->ignore_manifest, &t->capture, &t->captures,
                              &failure));
        t->held_out = t->captures - before;
    }
    for (capture *c = t->capture; c < t->capture + t->captures; c++) {
        must(capture_layer(c, a->layer, &c->layer, &failure));
        c->layer_named &= a->layer < 0;
        if (c->layer < 0 && t->captures > 1)
            fail(EXIT_FILE, c->path,
                 "neither a manifest nor its name says of which layer it is; give --layer, if all "
                 "such files are of one");
        c->layer = c->layer < 0 ? 0 : c->layer;
        if (!is_text(name_of(c)))
            fail(EXIT_FILE, c->path, "its name is no UTF-8 text, to be written in JSON; rename it");
    }
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
                " files, so their names do: %s is of layer %" PRId64 "\n",
                count, t->captures, capture_name(first), first->layer);
}

/* All captures are of one model, whoever says which; and of one file of weights, or of none known.
 */
static void check_model(tune *t, const capture *c)
{
    const char *asked = t->args.model, *model = c->model ? c->model : asked;
    const bool first = c == t->capture;
    if (asked && strcmp(model, asked) != 0)
        fail(EXIT_FILE, c->path,
             "is of the model '%.60s', as its manifest says, not of '%.60s'; leave out --model, or "
             "give --ignore-manifest",
             model, asked);
    if (!first && strcmp(model ? model : "", t->model ? t->model : "") != 0)
        fail(EXIT_FILE, c->path, "is of the model '%.60s', and the first capture of '%.60s'",
             model ? model : "unknown", t->model ? t->model : "unknown");
    t->model = model;
    t->weights = c->weights && (first || (t->weights && strcmp(t->weights, c->weights) == 0))
                     ? c->weights
                     : NULL;
}

static void group(tune *t)
{
    t->layer = must_alloc((size_t)t->captures, sizeof *t->layer, "the captures");
    for (const capture *c = t->capture; c < t->capture + t->captures; c++) {
        layer *to = t->layer;
        for (; to->count && !same_heads(to->capture[0], c); to++)
            if (share_heads(to->capture[0], c))
                fail(EXIT_FILE, c->path,
                     "has heads of layer %" PRId64
                     " that %.100s has too, but not the same ones; give captures of the same heads",
                     c->layer, to->capture[0]->path);
        if (!to->count) {
            to->capture = must_alloc((size_t)t->captures, sizeof *to->capture, "the captures");
            t->layers++;
        }
        for (int64_t n = 0; n < to->count; n++)
            if (strcmp(to->capture[n]->sha256, c->sha256) == 0)
                fail(EXIT_FILE, c->path, "holds what %.100s holds; give each capture once",
                     to->capture[n]->path);
        to->capture[to->count++] = c;
        to->held_out += c >= t->capture + t->captures - t->held_out;
        check_model(t, c);
    }
    for (const layer *l = t->layer; l < t->layer + t->layers; l++)
        if (l->held_out == l->count)
            fail(EXIT_FILE, l->capture[0]->path,
                 "is held out, and nothing else is there of its layer %" PRId64 " to tune on",
                 l->capture[0]->layer);
    qsort(t->layer, (size_t)t->layers, sizeof *t->layer, by_layer);
}

/* Reads a capture; attention over it as its manifest says, or as the options have it. */
static void read_capture(const tune *t, const capture *c, option_set given, sparge_options *options,
                         inputs *in)
{
    attention_args file = t->args.attention;
    file.file[0] = c->path;
    file.files = 1;
    inputs_read(&file, true, in);
    must(capture_obey(c, &in->problem, given, options, &failure));
}

/* ---- The file ---- */

static void make_header(tune *t)
{
    const sparge_tune_options *how = &t->args.how;
    const bool bounded = how->sparsity == 0.0;
    json_t *list = json_array();
    for (int64_t l = 0; l < t->layers; l++)
        for (int64_t n = 0; n < t->layer[l].count; n++) {
            const capture *c = t->layer[l].capture[n];
            json_array_append_new(list, json_pack("{s:I, s:s?, s:s, s:s, s:b}", "layer",
                                                  (json_int_t)c->layer, "sample", c->sample, "file",
                                                  name_of(c), "sha256", c->sha256, "held_out",
                                                  n >= t->layer[l].count - t->layer[l].held_out));
        }
    t->heads = json_array();
    t->header =
        json_joined(params_header(t->model, t->weights, &t->args.attention.options),
                    json_pack("{s:s, s:s?, s:o, s:o, s:o, s:o, s:o}", "by", shares[how->topk],
                              "bound", bounded ? bounds[how->mean] : NULL, "l1",
                              json_rounded(bounded ? how->l1 : NAN, 9), "l2",
                              json_rounded(bounded ? how->l2 : NAN, 9), "sparsity",
                              json_rounded(bounded ? NAN : how->sparsity, 9), "inputs", list,
                              "heads", t->heads));
}

static json_int_t whole(const json_t *line, const char *key)
{
    return json_integer_value(json_object_get(line, key));
}

/* In the order of layers and heads, whichever was done first. */
static void insert(json_t *heads, json_t *line)
{
    size_t at = json_array_size(heads);
    for (; at > 0; at--) {
        const json_t *before = json_array_get(heads, at - 1);
        const json_int_t apart = whole(before, "layer") - whole(line, "layer");
        if (apart < 0 || (apart == 0 && whole(before, "head") < whole(line, "head")))
            break;
    }
    json_array_insert_new(heads, at, line);
}

/* What an earlier run left in the file, if it was of the same captures and options. */
static void take_up(tune *t)
{
    const char *path = t->args.attention.output;
    params before;
    for (int64_t n = 0; n < t->captures; n++) {
        const char *const input[] = {t->capture[n].path, t->capture[n].from};
        must(inputs_spare(path, input, 2, &failure));
    }
    if (access(path, F_OK) != 0)
        return;
    must(params_read(path, &before, &failure));
    json_t *heads = json_incref(json_object_get(before.json, "heads"));
    json_object_set_new(before.json, "heads", json_array());
    if (!json_equal(before.json, t->header))
        fail(EXIT_FILE, path,
             "is of other captures or other options; choose another name, or remove it");
    for (size_t n = 0; n < json_array_size(heads); n++)
        insert(t->heads, json_incref(json_array_get(heads, n)));
    json_decref(heads);
    params_free(&before);
}

/* Can it be written? What is there stays. */
static void probe(const tune *t)
{
    const char *path = t->args.attention.output;
    output_file *file = output_open(path, &failure);
    must_do(file && json_write_lines(output_stream(file), path, t->header, &failure));
    outputs_discard();
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
    tune *t = user;
    const capture *c = t->layer[t->at].capture[0];
    const sparge_tuned *head = &t->tuned[h];
    const int64_t number = capture_head(c, h);
    insert(t->heads,
           json_joined(params_line(c->layer, number, head->dense, &head->thresholds),
                       json_pack("{s:b, s:s, s:o, s:o, s:o, s:o, s:o}", "finite", head->finite,
                                 "back_off", sparge_back_off_string(head->back_off), "in_sample",
                                 errors_json(&head->in_sample), "held_out",
                                 errors_json(&head->held_out), "held_out_first",
                                 errors_json(&head->held_out_first), "dense_passes",
                                 json_rounded(head->dense_passes, 4), "seconds",
                                 json_rounded(head->seconds, 4))));
    must(json_save(t->args.attention.output, t->header, &failure));
    if (!head->finite)
        fprintf(
            stderr,
            "sparge: layer %" PRId64 " head %" PRId64 ": %" PRId64
            " elements of its captures, or of attention over them, are not finite; left dense\n",
            c->layer, number, head->nonfinite);
    const sparge_tune_errors *in = &head->in_sample, *out = &head->held_out;
    if (in->nan + in->inf + out->nan + out->inf)
        fprintf(stderr,
                "sparge: layer %" PRId64 " head %" PRId64 ": o has %" PRId64 " NaN and %" PRId64
                " infinite elements under its thresholds; its error is not known\n",
                c->layer, number, in->nan + out->nan, in->inf + out->inf);
}

/* ---- One layer ---- */

static bool goes_on(void *user, double done)
{
    tune *t = user;
    return progress_tick(&t->watch, ((double)t->at + done) / (double)t->layers);
}

static void tune_layer(tune *t)
{
    const layer *l = &t->layer[t->at];
    const capture *first = l->capture[0];
    sparge_problem *problem = must_alloc((size_t)l->count, sizeof *problem, "the captures");
    inputs *in = must_alloc((size_t)l->count, sizeof *in, "the captures");
    for (int64_t n = 0; n < l->count; n++) {
        sparge_options same = t->args.attention.options;
        read_capture(t, l->capture[n], options_all(), &same, &in[n]);
        const sparge_problem *p = &in[n].problem, *q = &in[0].problem;
        if (p->heads != q->heads || p->kv_heads != q->kv_heads || p->dim != q->dim ||
            p->dim_v != q->dim_v)
            fail(EXIT_FILE, l->capture[n]->path,
                 "has %" PRId64 " heads, %" PRId64 " key heads and %" PRId64
                 " channels, not %" PRId64 ", %" PRId64 " and %" PRId64 " as %.100s",
                 p->heads, p->kv_heads, p->dim, q->heads, q->kv_heads, q->dim, first->path);
        problem[n] = *p;
    }
    const int64_t heads = problem->heads;
    sparge_tuned *tuned = must_alloc((size_t)heads, sizeof *tuned, "the heads");
    for (size_t n = 0; n < json_array_size(t->heads); n++)
        for (int64_t h = 0; h < heads; h++)
            tuned[h].done |= whole(json_array_get(t->heads, n), "layer") == first->layer &&
                             whole(json_array_get(t->heads, n), "head") == capture_head(first, h);
    sparge_tune_options how = t->args.how;
    if (how.seconds > 0.0)
        how.seconds = fmax(1e-9, how.seconds - (progress_clock() - t->start));
    how.held_out = l->held_out;
    how.progress = goes_on;
    how.finished = finished;
    how.user = t;
    t->tuned = tuned;
    must_sparge(
        sparge_tune(problem, l->count, &t->args.attention.options, &how, tuned, &library_error));
    for (int64_t h = 0; h < heads; h++)
        t->left |= !tuned[h].done;
    for (int64_t n = 0; n < l->count; n++)
        inputs_free(&in[n]);
    free(in);
    free(tuned);
    free(problem);
}

/* ---- The whole ---- */

static double number(const json_t *line, const char *object, const char *key)
{
    const json_t *x = json_object_get(object ? json_object_get(line, object) : line, key);
    return json_is_number(x) ? json_number_value(x) : NAN;
}

/* NaN is larger than all. */
static double larger(double a, double b) { return isnan(a) || a > b ? a : b; }

static exit_code report(const tune *t)
{
    const tune_args *a = &t->args;
    const sparge_options *o = &a->attention.options;
    const size_t count = json_array_size(t->heads);
    const char *bound = a->how.mean ? "l1" : "worst_l1";
    const bool bounded = a->how.sparsity == 0.0;
    const double l1 = bounded ? a->how.l1 : (double)INFINITY;
    const double l2 = bounded ? a->how.l2 : (double)INFINITY;
    double sparsity = 0.0, out_sparsity = 0.0, passes = 0.0, worst = 0.0, out_worst = 0.0;
    int64_t finite = 0, dense = 0, backed = 0, judged = 0, first = 0, last = 0, noisy = 0;
    double least = NAN, most = NAN; /* errors of heads whose dense attention is above l1 */
    for (size_t n = 0; n < count; n++) {
        const json_t *line = json_array_get(t->heads, n);
        const char *back = json_string_value(json_object_get(line, "back_off"));
        const bool is_dense = json_is_true(json_object_get(line, "dense"));
        const double error = number(line, "in_sample", bound);
        dense += is_dense;
        backed += back && strcmp(back, "none") != 0;
        passes += number(line, NULL, "dense_passes");
        if (json_is_true(json_object_get(line, "finite"))) {
            finite++;
            sparsity += number(line, "in_sample", "sparsity");
            worst = larger(worst, number(line, "in_sample", "worst_l1"));
        }
        if (is_dense && error > l1) {
            noisy++;
            least = fmin(least, error);
            most = fmax(most, error);
        }
        if (json_is_object(json_object_get(line, "held_out"))) {
            judged++;
            out_sparsity += number(line, "held_out", "sparsity");
            out_worst = larger(out_worst, number(line, "held_out", "worst_l1"));
            first += number(line, "held_out_first", bound) <= l2;
            last += number(line, "held_out", bound) <= l2;
        }
    }
    if (noisy)
        fprintf(stderr,
                "sparge: --l1 %g is below the noise of dense attention in %s and %s, %.4g to %.4g, "
                "in %" PRId64 " of %zu heads: they stay dense; give a larger --l1, or --qk-dtype "
                "and --pv-dtype with less noise\n",
                l1, sparge_dtype_string(o->qk_dtype), sparge_dtype_string(o->pv_dtype), least, most,
                noisy, count);
    const double all = count ? (double)count : NAN, out = judged ? (double)judged : NAN;
    json_t *noise = noisy ? json_pack("{s:I, s:o, s:o}", "heads", (json_int_t)noisy, "least",
                                      json_rounded(least, 6), "most", json_rounded(most, 6))
                          : json_null();
    return print_json(
        json_pack("{s:s, s:I, s:I, s:I, s:I, s:o, s:o, s:I, s:o, s:o, s:I, s:I, s:o, s:o, s:o}",
                  "params", a->attention.output, "heads", (json_int_t)count, "nonfinite",
                  (json_int_t)((int64_t)count - finite), "dense", (json_int_t)dense, "backed_off",
                  (json_int_t)backed, "sparsity", json_rounded(sparsity / all, 6), "worst_l1",
                  json_rounded(finite ? worst : NAN, 6), "judged", (json_int_t)judged,
                  "held_out_sparsity", json_rounded(out_sparsity / out, 6), "held_out_worst_l1",
                  json_rounded(judged ? out_worst : NAN, 6), "held_out_within_l2_first",
                  (json_int_t)first, "held_out_within_l2", (json_int_t)last, "dense_passes",
                  json_rounded(passes / all, 4), "seconds",
                  json_rounded(progress_clock() - t->start, 4), "noise", noise),
        &failure);
}

/* Not all heads are done. How many there are, the manifests know, or nobody. */
static void stop(const tune *t)
{
    size_t heads = 0;
    bool known = true;
    for (int64_t l = 0; l < t->layers; l++) {
        known &= t->layer[l].capture[0]->heads != NULL;
        heads += json_array_size(t->layer[l].capture[0]->heads);
    }
    char of[32] = "";
    if (known)
        snprintf(of, sizeof of, " of %zu", heads);
    fail(EXIT_UNFINISHED, t->args.attention.output,
         "%s: it has %zu%s heads; the same command goes on",
         interrupt_came() ? "interrupted" : "the time is up", json_array_size(t->heads), of);
}

exit_code tune_command(int argc, char **argv, file_error *error)
{
    static tune t;
    inputs in = {0};
    tune_args *a = &t.args;
    t.start = progress_clock();
    *a = (tune_args){.base = {error}, .how = {.l1 = 0.07, .l2 = 0.08}};
    must(attention_parse(&tune_argp, argc, argv, &a->base, &a->attention));
    find(&t);
    group(&t);
    /* Attention as in the model: as the manifest of the first capture says; of the others it must
     * say the same. */
    read_capture(&t, t.layer[0].capture[0], a->attention.given, &a->attention.options, &in);
    inputs_free(&in);
    make_header(&t);
    take_up(&t);
    probe(&t);
    say_layers(&t);
    t.watch = progress_begin("tune"); /* from here on an interrupt is an end like others */
    for (t.at = 0; t.at < t.layers && goes_on(&t, 0.0); t.at++)
        tune_layer(&t);
    t.left |= t.at < t.layers;
    progress_end(&t.watch);
    if (t.left)
        stop(&t);
    const exit_code code = report(&t);
    json_decref(t.header);
    for (int64_t l = 0; l < t.layers; l++)
        free(t.layer[l].capture);
    free(t.layer);
    free(a->tuned.path);
    free(a->held.path);
    capture_free(t.capture, t.captures);
    return code;
}
