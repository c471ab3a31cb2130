/* SPDX-License-Identifier: Apache-2.0 */
/* tune_loss.c: sparge tune --by loss: first the curves of all heads, layer by layer, then one
 * choice, then what it is worth by whole calls. The file keeps curves and heads, and a command that
 * seeks something else begins with the choice. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/device.h"
#include "tools/interrupt.h"
#include "tools/params.h"
#include "tools/plan.h"
#include "tools/tune.h"

typedef struct tune {
    const tune_args *args;
    const layers *of;
    method_choice method;
    double first[SPARGE_LOSS_POINTS]; /* the values that are measured */
    int points;
    json_t *header, *curves, *heads; /* what the file holds; and the lists in it */
    sparge_loss_point *chosen;       /* in the order of `curves` */
    progress watch;
    double done, share; /* of the whole, before the step at hand and by it */
} tune;

/* ---- The file ---- */

static const sparge_param *parameter(const tune *t) { return &t->method.method->param[0]; }

/* A plan for heads with these values, of which the file of thresholds is made. */
static sparge_plan plan_of(const tune *t, const sparge_problem *p, const capture *c,
                           const double *first)
{
    sparge_plan plan;
    sparge_context context = plan_context(c, p);
    context.first = first;
    method_must(t->method.method,
                sparge_method_plan(t->method.method, p, &t->args->attention.options, &context,
                                   t->method.param, &plan, &library_error));
    return plan;
}

/* Attention as the method has it, for whoever runs these thresholds. */
static sparge_options method_options(const tune *t)
{
    const capture *c = t->of->layer[0].capture[0];
    sparge_options o = t->args->attention.options;
    inputs in;
    layers_read(&t->args->attention, c, options_all(), &o, &in);
    sparge_plan plan = plan_of(t, &in.problem, c, NULL);
    if (!sparge_plan_is_plain(&plan) || !plan.part[0].predicted)
        fail(EXIT_UNSUPPORTED, NULL,
             "%s has no thresholds that a file of them could hold, as spargeattn and submass have",
             t->method.method->name);
    const float scale = o.softmax_scale;
    o = plan.part[0].options;
    o.softmax_scale = scale;
    o.per_head = NULL;
    sparge_plan_free(&plan);
    inputs_free(&in);
    return o;
}

static void make_header(tune *t)
{
    const sparge_loss_goal *goal = &t->args->goal;
    const sparge_options o = method_options(t);
    json_t *others = method_params_json(&t->method), *values = json_array();
    json_object_del(others, parameter(t)->name);
    for (int n = 0; n < t->points; n++)
        json_array_append_new(values, json_rounded(t->first[n], 9));
    t->curves = json_array();
    t->heads = json_array();
    t->header = json_joined(
        params_header(t->of->model, t->of->weights, &o),
        json_pack("{s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "by", tune_bys[BY_LOSS],
                  "method", t->method.method->name, "params", others, "density",
                  json_rounded(goal->density > 0.0 ? goal->density : NAN, 9), "loss",
                  json_rounded(goal->loss > 0.0 ? goal->loss : NAN, 9), "inputs",
                  layers_json(t->of), "values", values, "curves", t->curves, "heads", t->heads));
}

/* What an earlier run left in the file: curves, and heads if the same was sought. */
static void take_up(tune *t)
{
    static const char *const goals[] = {"density", "loss"}, *const lists[] = {"curves", "heads"};
    json_t *before = tune_file_before(t->args, t->of), *left[2];
    bool same = true;
    if (!before)
        return;
    for (int n = 0; n < 2; n++) {
        json_t *sought = json_object_get(t->header, goals[n]);
        same &= json_equal(json_object_get(before, goals[n]), sought);
        json_object_set(before, goals[n], sought);
        left[n] = json_incref(json_object_get(before, lists[n]));
        json_object_set_new(before, lists[n], json_array());
    }
    tune_file_same(t->args, before, t->header);
    json_array_extend(t->curves, left[0]);
    if (same)
        json_array_extend(t->heads, left[1]);
    json_decref(left[0]);
    json_decref(left[1]);
    json_decref(before);
}

static void save(const tune *t) { must(json_save(t->args->attention.output, t->header, &failure)); }

/* ---- Measuring ---- */

/* Ends the program where it does not go on. */
static bool goes_on(void *user, double done)
{
    tune *t = user;
    const double seconds = t->args->seconds;
    if (progress_tick(&t->watch, t->done + t->share * done) &&
        !(seconds > 0.0 && progress_clock() - t->args->start > seconds))
        return true;
    progress_hide(&t->watch);
    const bool all = json_array_size(t->heads) > 0;
    tune_unfinished(t->args, t->of, json_array_size(all ? t->heads : t->curves),
                    all ? "" : "curves of ");
}

/* Of captures [from, to) of a layer. */
static double measure(tune *t, const layer *l, const inputs *in, int64_t from, int64_t to,
                      sparge_loss_point *point, int64_t points)
{
    const int64_t count = to - from;
    sparge_loss_input *of = must_alloc((size_t)count, sizeof *of, "the captures");
    sparge_context *context = must_alloc((size_t)count, sizeof *context, "the captures");
    sparge_options o = t->args->attention.options;
    double passes;
    for (int64_t n = 0; n < count; n++) {
        const sparge_problem *p = &in[from + n].problem;
        context[n] = plan_context(l->capture[from + n], p);
        of[n] = (sparge_loss_input){*p,
                                    {in[from + n].g.data, SPARGE_F32,
                                     p->heads * p->q_len * p->dim_v, p->q_len * p->dim_v, p->dim_v},
                                    &context[n]};
    }
    o.progress = goes_on;
    o.user = t;
    method_must(t->method.method,
                sparge_loss_measure(of, count, &o, t->method.method, t->method.param,
                                    &device_executor, point, points, &passes, &library_error));
    free(context);
    free(of);
    return passes;
}

static void curves_of_layer(tune *t, const layer *l, const inputs *in)
{
    const capture *c = l->capture[0];
    const int64_t heads = in->problem.heads;
    sparge_loss_point *point =
        must_alloc((size_t)(heads * t->points), sizeof *point, "the curves of heads");
    for (int64_t n = 0; n < heads * t->points; n++)
        point[n].first = t->first[n % t->points];
    const double start = progress_clock();
    const double passes = measure(t, l, in, 0, l->count - l->held_out, point, t->points);
    const double seconds = (progress_clock() - start) / (double)heads;
    for (int64_t h = 0; h < heads; h++) {
        json_t *density = json_array(), *loss = json_array();
        for (int n = 0; n < t->points; n++) {
            json_array_append_new(density, json_rounded(point[h * t->points + n].density, 9));
            json_array_append_new(loss, json_rounded(point[h * t->points + n].loss, 9));
        }
        tune_file_insert(t->curves,
                         json_pack("{s:I, s:I, s:o, s:o, s:o, s:o}", "layer", (json_int_t)c->layer,
                                   "head", (json_int_t)capture_head(c, h), "density", density,
                                   "loss", loss, "dense_passes", json_rounded(passes, 4), "seconds",
                                   json_rounded(seconds, 4)));
    }
    save(t);
    free(point);
}

/* ---- Choosing ---- */

static void choose(tune *t)
{
    const size_t heads = json_array_size(t->curves), points = (size_t)t->points;
    sparge_loss_point *curve = must_alloc(heads * points, sizeof *curve, "the curves of heads");
    t->chosen = must_alloc(heads, sizeof *t->chosen, "the heads");
    for (size_t h = 0; h < heads; h++) {
        const json_t *line = json_array_get(t->curves, h);
        for (size_t n = 0; n < points; n++) {
            const json_t *loss = json_array_get(json_object_get(line, "loss"), n);
            curve[h * points + n] = (sparge_loss_point){
                t->first[n], json_number_value(json_array_get(json_object_get(line, "density"), n)),
                json_is_number(loss) ? json_number_value(loss) : (double)NAN};
        }
    }
    must_sparge(sparge_loss_choose(t->method.method, curve, (int64_t)heads, (int64_t)points,
                                   &t->args->goal, t->chosen, &library_error));
    free(curve);
}

static const sparge_loss_point *chosen_for(const tune *t, const capture *c, int64_t h)
{
    size_t n = 0;
    while (json_array_get(t->curves, n) != tune_file_find(t->curves, c->layer, capture_head(c, h)))
        n++;
    return &t->chosen[n];
}

/* ---- Judging ---- */

static json_t *errors_json(const sparge_loss_point *of, int64_t count)
{
    return count == 0 ? json_null()
                      : json_pack("{s:I, s:o, s:o}", "inputs", (json_int_t)count, "density",
                                  json_rounded(of->density, 6), "loss", json_rounded(of->loss, 6));
}

/* Elements of batches. */
static int64_t samples(const inputs *in, int64_t from, int64_t to)
{
    int64_t count = 0;
    for (; from < to; from++)
        count += in[from].problem.batch;
    return count;
}

static void judge_layer(tune *t, const layer *l, const inputs *in)
{
    const capture *c = l->capture[0];
    const int64_t heads = in->problem.heads, tuned = l->count - l->held_out;
    double *first = must_alloc((size_t)heads, sizeof *first, "the heads");
    sparge_loss_point *seen = must_alloc((size_t)heads, sizeof *seen, "the heads");
    sparge_loss_point *unseen = must_alloc((size_t)heads, sizeof *unseen, "the heads");
    for (int64_t h = 0; h < heads; h++)
        first[h] = seen[h].first = unseen[h].first = chosen_for(t, c, h)->first;
    double passes = measure(t, l, in, 0, tuned, seen, 1);
    if (l->held_out)
        passes += measure(t, l, in, tuned, l->count, unseen, 1);
    sparge_plan plan = plan_of(t, &in->problem, c, first);
    for (int64_t h = 0; h < heads; h++) {
        const bool finite = !isnan(chosen_for(t, c, h)->loss);
        const int64_t number = capture_head(c, h);
        if (!finite)
            fprintf(stderr,
                    "sparge: layer %" PRId64 " head %" PRId64
                    ": its loss is not finite; left at %s %g, the densest\n",
                    c->layer, number, parameter(t)->name, first[h]);
        tune_file_insert(
            t->heads,
            json_joined(params_line(c->layer, number, false, &plan.part[0].options.per_head[h]),
                        json_pack("{s:b, s:o, s:o, s:o}", "finite", finite, "in_sample",
                                  errors_json(&seen[h], samples(in, 0, tuned)), "held_out",
                                  errors_json(&unseen[h], samples(in, tuned, l->count)),
                                  "dense_passes", json_rounded(passes, 4))));
    }
    save(t);
    sparge_plan_free(&plan);
    free(unseen);
    free(seen);
    free(first);
}

/* ---- The whole ---- */

static exit_code report(const tune *t)
{
    const size_t count = json_array_size(t->heads);
    double density = 0.0, loss = 0.0, out_density = 0.0, out_loss = 0.0, passes = 0.0;
    int64_t finite = 0, judged = 0;
    for (size_t n = 0; n < count; n++) {
        const json_t *line = json_array_get(t->heads, n), *curve = json_array_get(t->curves, n);
        passes += tune_file_number(curve, NULL, "dense_passes") +
                  tune_file_number(line, NULL, "dense_passes");
        density += tune_file_number(line, "in_sample", "density");
        if (json_is_true(json_object_get(line, "finite"))) {
            finite++;
            loss += tune_file_number(line, "in_sample", "loss");
        }
        if (json_is_object(json_object_get(line, "held_out"))) {
            judged++;
            out_density += tune_file_number(line, "held_out", "density");
            out_loss += tune_file_number(line, "held_out", "loss");
        }
    }
    const double all = (double)count, out = judged ? (double)judged : NAN;
    return print_json(
        json_pack("{s:s, s:s, s:I, s:I, s:o, s:o, s:I, s:o, s:o, s:o, s:o}", "params",
                  t->args->attention.output, "method", t->method.method->name, "heads",
                  (json_int_t)count, "nonfinite", (json_int_t)((int64_t)count - finite), "density",
                  json_rounded(density / all, 6), "loss", json_rounded(loss, 6), "judged",
                  (json_int_t)judged, "held_out_density", json_rounded(out_density / out, 6),
                  "held_out_loss", json_rounded(judged ? out_loss : NAN, 6), "dense_passes",
                  json_rounded(passes / all, 4), "seconds",
                  json_rounded(progress_clock() - t->args->start, 4)),
        &failure);
}

/* The steps of all layers that are not in these lines yet; they are so much of the whole. */
typedef void step(tune *t, const layer *l, const inputs *in);

static void each_layer(tune *t, const json_t *lines, step *take, double from, double to)
{
    t->share = (to - from) / (double)t->of->count;
    for (int64_t n = 0; n < t->of->count; n++) {
        const layer *l = &t->of->layer[n];
        const capture *c = l->capture[0];
        t->done = from + t->share * (double)n;
        inputs *in = layer_read(&t->args->attention, l, true);
        bool there = true;
        for (int64_t h = 0; h < in->problem.heads; h++)
            there &= tune_file_find(lines, c->layer, capture_head(c, h)) != NULL;
        if (!there && goes_on(t, 0.0))
            take(t, l, in);
        layer_free(l, in);
    }
}

exit_code tune_loss(tune_args *args, layers *of)
{
    static const double curves = 0.8; /* of the time, about */
    tune t = {.args = args, .of = of, .method = args->attention.method};
    if (!t.method.method)
        t.method = plan_spargeattn(&args->attention.options);
    t.method.param[0] = parameter(&t)->usual;
    t.points = sparge_loss_grid(t.method.method, t.first);
    make_header(&t);
    take_up(&t);
    tune_file_probe(args, t.header);
    layers_say(of);
    t.watch = progress_begin("tune");
    each_layer(&t, t.curves, curves_of_layer, 0.0, curves);
    choose(&t);
    each_layer(&t, t.heads, judge_layer, curves, 1.0);
    progress_end(&t.watch);
    const exit_code code = report(&t);
    free(t.chosen);
    json_decref(t.header);
    return code;
}
