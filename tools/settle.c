/* settle.c: the command line, thresholds and a manifest brought together. */
#include "tools/settle.h"

#include <inttypes.h>
#include <stdlib.h>

#include "tools/inputs.h"
#include "tools/params.h"

/* The layer whose thresholds these heads have. */
static exit_code find_layer(const attention_args *a, const params *p, settled *s, file_error *error)
{
    const capture *c = s->capture;
    const bool several = p->heads > 0 && p->head[0].layer != p->head[p->heads - 1].layer;
    const exit_code code = capture_layer(c, a->layer, &s->layer, error);
    if (code)
        return code;
    s->layer_from = a->layer >= 0    ? "--layer"
                    : c->layer_named ? "name"
                    : c->layer >= 0  ? "manifest"
                                     : "params";
    if (s->layer >= 0)
        return EXIT_FINE;
    s->layer = p->heads > 0 ? p->head[0].layer : 0;
    if (!several)
        return EXIT_FINE;
    file_error_set(
        error, c->path,
        "neither a manifest nor its name says of which layer it is, and %.100s has several; "
        "give --layer",
        a->params);
    return EXIT_FILE;
}

static exit_code find_heads(const attention_args *a, const params *p, int64_t heads, settled *s,
                            file_error *error)
{
    exit_code code = find_layer(a, p, s, error);
    if (code)
        return code;
    s->per_head = malloc((size_t)heads * sizeof *s->per_head);
    if (!s->per_head) {
        file_error_set(error, a->params, "no memory for the thresholds of %" PRId64 " heads",
                       heads);
        return EXIT_MACHINE;
    }
    for (int64_t h = 0; h < heads && !code; h++)
        code = params_find(p, a->params, s->layer, capture_head(s->capture, h), &s->per_head[h],
                           error);
    return code;
}

exit_code settle(const attention_args *a, const capture *c, const sparge_problem *problem,
                 sparge_options *options, settled *out, file_error *error)
{
    params p = {0};
    option_set given = a->given;
    exit_code code = EXIT_FINE;
    *out = (settled){.capture = c, .params = a->params, .layer = -1};
    if (a->params) {
        code = capture_sha256(a->params, out->sha256, error);
        if (!code)
            code = params_read(a->params, &p, error);
        if (!code)
            code = params_model(&p, a->params, c->model, c->weights, error);
        if (!code)
            code = params_obey(&p, a->params, given, options, error);
        if (!code)
            code = find_heads(a, &p, problem->heads, out, error);
        given = options_all();
    }
    params_free(&p);
    options->per_head = out->per_head;
    return code ? code : capture_obey(c, problem, given, options, error);
}

void settled_free(settled *s)
{
    free(s->per_head);
    s->per_head = NULL;
}

exit_code settle_spare(const attention_args *a, const capture *c, const char *output,
                       file_error *error)
{
    const char *const input[] = {a->file[0], a->file[1], a->file[2], a->params, c->from};
    return inputs_spare(output, input, sizeof input / sizeof *input, error);
}

json_t *settled_json(const settled *s)
{
    json_t *thresholds =
        s->params ? json_pack("{s:o, s:s, s:I, s:s}", "file", json_text(s->params), "sha256",
                              s->sha256, "layer", (json_int_t)s->layer, "layer_from", s->layer_from)
                  : json_null();
    return json_pack("{s:o, s:o}", "manifest", capture_json(s->capture), "params", thresholds);
}
