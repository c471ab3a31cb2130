/* SPDX-License-Identifier: Apache-2.0 */
/* tune_heads.c: sparge tune, head by head: sparsity under a bound of the error. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "sparge_inspect.h"
#include "tools/params.h"
#include "tools/tune.h"

typedef struct tune {
    const tune_args *args;
    const layers *of;
    json_t *header, *heads; /* what the file holds; and the list in it */
    /* Of the layer at hand: */
    int64_t at;
    const sparge_tuned *tuned;
    bool left; /* heads are, of this layer or one before it */
    progress watch;
} tune;

/* ---- The file ---- */

static void make_header(tune *t)
{
    const tune_args *a = t->args;
    const sparge_tune_options *how = &a->how;
    const bool bounded = how->sparsity == 0.0;
    t->heads = json_array();
    t->header = json_joined(params_header(t->of->model, t->of->weights, &a->attention.options),
                            json_pack("{s:s, s:s?, s:o, s:o, s:o, s:o, s:o}", "by", tune_bys[a->by],
                                      "bound", bounded ? tune_bounds[how->mean] : NULL, "l1",
                                      json_rounded(bounded ? how->l1 : NAN, 9), "l2",
                                      json_rounded(bounded ? how->l2 : NAN, 9), "sparsity",
                                      json_rounded(bounded ? NAN : how->sparsity, 9), "inputs",
                                      layers_json(t->of), "heads", t->heads));
}

/* What an earlier run left in the file, if it was of the same captures and options. */
static void take_up(tune *t)
{
    json_t *before = tune_file_before(t->args, t->of);
    if (!before)
        return;
    json_t *heads = json_incref(json_object_get(before, "heads"));
    json_object_set_new(before, "heads", json_array());
    tune_file_same(t->args, before, t->header);
    for (size_t n = 0; n < json_array_size(heads); n++)
        tune_file_insert(t->heads, json_incref(json_array_get(heads, n)));
    json_decref(heads);
    json_decref(before);
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
    const capture *c = t->of->layer[t->at].capture[0];
    const sparge_tuned *head = &t->tuned[h];
    const int64_t number = capture_head(c, h);
    tune_file_insert(
        t->heads,
        json_joined(params_line(c->layer, number, head->dense, &head->thresholds),
                    json_pack("{s:b, s:s, s:o, s:o, s:o, s:o, s:o}", "finite", head->finite,
                              "back_off", sparge_back_off_string(head->back_off), "in_sample",
                              errors_json(&head->in_sample), "held_out",
                              errors_json(&head->held_out), "held_out_first",
                              errors_json(&head->held_out_first), "dense_passes",
                              json_rounded(head->dense_passes, 4), "seconds",
                              json_rounded(head->seconds, 4))));
    must(json_save(t->args->attention.output, t->header, &failure));
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
    return progress_tick(&t->watch, ((double)t->at + done) / (double)t->of->count);
}

static void tune_layer(tune *t)
{
    const layer *l = &t->of->layer[t->at];
    const capture *first = l->capture[0];
    const sparge_options *o = &t->args->attention.options;
    inputs *in = layer_read(&t->args->attention, l, false);
    sparge_problem *problem = must_alloc((size_t)l->count, sizeof *problem, "the captures");
    for (int64_t n = 0; n < l->count; n++)
        problem[n] = in[n].problem;
    const int64_t heads = problem->heads;
    sparge_tuned *tuned = must_alloc((size_t)heads, sizeof *tuned, "the heads");
    for (int64_t h = 0; h < heads; h++)
        tuned[h].done = tune_file_find(t->heads, first->layer, capture_head(first, h));
    sparge_tune_options how = t->args->how;
    if (t->args->seconds > 0.0)
        how.seconds = fmax(1e-9, t->args->seconds - (progress_clock() - t->args->start));
    how.held_out = l->held_out;
    how.progress = goes_on;
    how.finished = finished;
    how.user = t;
    t->tuned = tuned;
    must_sparge(sparge_tune(problem, l->count, o, &how, tuned, &library_error));
    for (int64_t h = 0; h < heads; h++)
        t->left |= !tuned[h].done;
    layer_free(l, in);
    free(tuned);
    free(problem);
}

/* ---- The whole ---- */

/* NaN is larger than all. */
static double larger(double a, double b) { return isnan(a) || a > b ? a : b; }

static exit_code report(const tune *t)
{
    const tune_args *a = t->args;
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
        const double error = tune_file_number(line, "in_sample", bound);
        dense += is_dense;
        backed += back && strcmp(back, "none") != 0;
        passes += tune_file_number(line, NULL, "dense_passes");
        if (json_is_true(json_object_get(line, "finite"))) {
            finite++;
            sparsity += tune_file_number(line, "in_sample", "sparsity");
            worst = larger(worst, tune_file_number(line, "in_sample", "worst_l1"));
        }
        if (is_dense && error > l1) {
            noisy++;
            least = fmin(least, error);
            most = fmax(most, error);
        }
        if (json_is_object(json_object_get(line, "held_out"))) {
            judged++;
            out_sparsity += tune_file_number(line, "held_out", "sparsity");
            out_worst = larger(out_worst, tune_file_number(line, "held_out", "worst_l1"));
            first += tune_file_number(line, "held_out_first", bound) <= l2;
            last += tune_file_number(line, "held_out", bound) <= l2;
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
                  json_rounded(progress_clock() - a->start, 4), "noise", noise),
        &failure);
}

exit_code tune_heads(tune_args *args, layers *of)
{
    tune t = {.args = args, .of = of};
    make_header(&t);
    take_up(&t);
    tune_file_probe(args, t.header);
    layers_say(of);
    t.watch = progress_begin("tune"); /* from here on an interrupt is an end like others */
    for (t.at = 0; t.at < of->count && goes_on(&t, 0.0); t.at++)
        tune_layer(&t);
    t.left |= t.at < of->count;
    progress_end(&t.watch);
    if (t.left)
        tune_unfinished(args, of, json_array_size(t.heads), "");
    const exit_code code = report(&t);
    json_decref(t.header);
    return code;
}
