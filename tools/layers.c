/* SPDX-License-Identifier: Apache-2.0 */
/* layers.c: finds captures, sorts them into layers, and reads those of one. */
#include "tools/layers.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

error_t paths_append(paths *to, const char *path)
{
    const char **more = realloc(to->path, (size_t)(to->count + 1) * sizeof *more);
    if (!more)
        return ENOMEM;
    to->path = more;
    to->path[to->count++] = path;
    return 0;
}

static const char *name_of(const capture *c) { return basename(c->path); }

/* ---- Sorting ---- */

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

/* Captures, and the layer of each. What nobody says would be taken for several texts of one layer.
 */
static void find(const attention_args *a, const paths *const list[2], layers *t)
{
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
        if (!json_is_text(name_of(c)))
            fail(EXIT_FILE, c->path, "its name is no UTF-8 text, to be written in JSON; rename it");
    }
}

/* All captures are of one model, whoever says which; and of one file of weights, or of none known.
 */
static void check_model(layers *t, const char *asked, const capture *c)
{
    const char *model = c->model ? c->model : asked;
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

static void group(const char *model, layers *t)
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
            t->count++;
        }
        for (int64_t n = 0; n < to->count; n++)
            if (strcmp(to->capture[n]->sha256, c->sha256) == 0)
                fail(EXIT_FILE, c->path, "holds what %.100s holds; give each capture once",
                     to->capture[n]->path);
        to->capture[to->count++] = c;
        to->held_out += c >= t->capture + t->captures - t->held_out;
        check_model(t, model, c);
    }
    for (const layer *l = t->layer; l < t->layer + t->count; l++)
        if (l->held_out == l->count)
            fail(EXIT_FILE, l->capture[0]->path,
                 "is held out, and nothing else is there of its layer %" PRId64 " to tune on",
                 l->capture[0]->layer);
    qsort(t->layer, (size_t)t->count, sizeof *t->layer, by_layer);
}

void layers_find(const attention_args *args, const paths *tuned, const paths *held,
                 const char *model, layers *out)
{
    const paths *const list[] = {tuned, held};
    *out = (layers){0};
    find(args, list, out);
    group(model, out);
}

void layers_free(layers *l)
{
    for (int64_t n = 0; n < l->count; n++)
        free(l->layer[n].capture);
    free(l->layer);
    capture_free(l->capture, l->captures);
    *l = (layers){0};
}

/* ---- What there is ---- */

void layers_say(const layers *t)
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

json_t *layers_json(const layers *t)
{
    json_t *list = json_array();
    for (int64_t l = 0; l < t->count; l++)
        for (int64_t n = 0; n < t->layer[l].count; n++) {
            const capture *c = t->layer[l].capture[n];
            json_array_append_new(list, json_pack("{s:I, s:s?, s:s, s:s, s:b}", "layer",
                                                  (json_int_t)c->layer, "sample", c->sample, "file",
                                                  name_of(c), "sha256", c->sha256, "held_out",
                                                  n >= t->layer[l].count - t->layer[l].held_out));
        }
    return list;
}

int64_t layers_heads(const layers *t)
{
    int64_t heads = 0;
    for (int64_t l = 0; l < t->count; l++) {
        const json_t *list = t->layer[l].capture[0]->heads;
        heads = list && heads >= 0 ? heads + (int64_t)json_array_size(list) : -1;
    }
    return heads;
}

/* ---- Reading ---- */

void layers_read(const attention_args *args, const capture *c, option_set given,
                 sparge_options *options, inputs *in)
{
    attention_args file = *args;
    file.file[0] = c->path;
    file.files = 1;
    inputs_read(&file, true, in);
    must(capture_obey(c, &in->problem, given, options, &failure));
}

inputs *layer_read(const attention_args *args, const layer *l, bool gradients)
{
    const capture *first = l->capture[0];
    inputs *in = must_alloc((size_t)l->count, sizeof *in, "the captures");
    for (int64_t n = 0; n < l->count; n++) {
        sparge_options same = args->options;
        layers_read(args, l->capture[n], options_all(), &same, &in[n]);
        if (gradients)
            inputs_gradient(l->capture[n]->path, &in[n]);
        const sparge_problem *p = &in[n].problem, *q = &in[0].problem;
        if (p->heads != q->heads || p->kv_heads != q->kv_heads || p->dim != q->dim ||
            p->dim_v != q->dim_v)
            fail(EXIT_FILE, l->capture[n]->path,
                 "has %" PRId64 " heads, %" PRId64 " key heads and %" PRId64
                 " channels, not %" PRId64 ", %" PRId64 " and %" PRId64 " as %.100s",
                 p->heads, p->kv_heads, p->dim, q->heads, q->kv_heads, q->dim, first->path);
    }
    return in;
}

void layer_free(const layer *l, inputs *in)
{
    for (int64_t n = 0; n < l->count; n++)
        inputs_free(&in[n]);
    free(in);
}
