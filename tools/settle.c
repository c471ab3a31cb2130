/* SPDX-License-Identifier: Apache-2.0 */
/* settle.c: the command line, thresholds and a manifest brought together. */
#include "tools/settle.h"

#include <inttypes.h>
#include <stdlib.h>

#include "tools/inputs.h"
#include "tools/params.h"

/* The layer whose thresholds these heads have. */
static void find_layer(const attention_args *a, const params *p, settled *s)
{
    const capture *c = s->capture;
    must(capture_layer(c, a->layer, &s->layer, &failure));
    s->layer_from = a->layer >= 0    ? "--layer"
                    : c->layer_named ? "name"
                    : c->layer >= 0  ? "manifest"
                                     : "params";
    if (s->layer >= 0)
        return;
    s->layer = p->heads > 0 ? p->head[0].layer : 0;
    if (p->heads > 0 && p->head[p->heads - 1].layer != s->layer)
        fail(EXIT_FILE, c->path,
             "neither a manifest nor its name says of which layer it is, and %.100s has several; "
             "give --layer",
             a->params);
}

void settle(const attention_args *a, const capture *c, const sparge_problem *problem,
            sparge_options *options, settled *out)
{
    *out = (settled){.capture = c, .params = a->params, .layer = -1};
    if (a->params) {
        params p;
        must(capture_sha256(a->params, out->sha256, &failure));
        must(params_read(a->params, &p, &failure));
        must(params_model(&p, a->params, c->model, c->weights, &failure));
        must(params_obey(&p, a->params, a->given, options, &failure));
        find_layer(a, &p, out);
        out->per_head =
            must_alloc((size_t)problem->heads, sizeof *out->per_head, "the thresholds of heads");
        for (int64_t h = 0; h < problem->heads; h++)
            must(params_find(&p, a->params, out->layer, capture_head(c, h), &out->per_head[h],
                             &failure));
        params_free(&p);
    }
    options->per_head = out->per_head;
    must(capture_obey(c, problem, a->params ? options_all() : a->given, options, &failure));
}

void settled_free(settled *s)
{
    free(s->per_head);
    s->per_head = NULL;
}

void settle_spare(const attention_args *a, const capture *c, const char *output)
{
    const char *const input[] = {a->file[0], a->file[1], a->file[2], a->params, a->gate, c->from};
    must(inputs_spare(output, input, sizeof input / sizeof *input, &failure));
}

json_t *settled_json(const settled *s)
{
    json_t *thresholds =
        s->params ? json_pack("{s:o, s:s, s:I, s:s}", "file", json_text(s->params), "sha256",
                              s->sha256, "layer", (json_int_t)s->layer, "layer_from", s->layer_from)
                  : json_null();
    return json_pack("{s:o, s:o}", "manifest", capture_json(s->capture), "params", thresholds);
}
