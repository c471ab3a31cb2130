/* SPDX-License-Identifier: Apache-2.0 */
/* choice.c: by which attention the model runs: reading what was asked for, and one call of the
 * library. */
#include "experiments/lm/choice.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "tools/device.h"
#include "tools/inputs.h"
#include "tools/kept.h"
#include "tools/mask_file.h"
#include "tools/params.h"
#include "tools/plan.h"

bool ends_with(const char *name, const char *end)
{
    const size_t length = strlen(name), ending = strlen(end);
    return length > ending && strcmp(name + length - ending, end) == 0;
}

bool choice_has_gate(const char *text)
{
    return strncmp(text, "seer", 4) == 0 && (!text[4] || text[4] == ':');
}

char *choice_end(char *item)
{
    char *comma = strchr(item, ',');
    const bool method = strchr(item, ':') && (!comma || strchr(item, ':') < comma);
    while (method && comma) {
        const char *next = comma + 1;
        if (strcspn(next, "=") >= strcspn(next, ",:"))
            break;
        comma = strchr(next, ',');
    }
    return comma;
}

static exit_code read_thresholds(choice *c, option_set given, const hyper *h, const char *name,
                                 const char *weights, file_error *error)
{
    params p;
    exit_code code = params_read(c->path, &p, error);
    if (!code)
        code = params_model(&p, c->path, name, weights, error);
    if (!code)
        code = params_obey(&p, c->path, given, &c->options, error);
    c->thresholds = code ? NULL : calloc((size_t)(h->layers * h->heads), sizeof *c->thresholds);
    if (!code && !c->thresholds) {
        file_error_set(error, c->path, "no memory for its thresholds");
        code = EXIT_MACHINE;
    }
    for (int64_t n = 0; n < h->layers * h->heads && !code; n++)
        code = params_find(&p, c->path, n / h->heads, n % h->heads, &c->thresholds[n], error);
    params_free(&p);
    return code;
}

static exit_code read_mask(choice *c, const hyper *h, file_error *error)
{
    const exit_code code = inputs_npy(c->path, &c->mask, error);
    if (code)
        return code;
    const array *m = &c->mask;
    if ((m->type == ARRAY_U8 || m->type == ARRAY_BOOL) && m->rank == 4 && m->shape[1] == h->heads &&
        (m->shape[0] == 1 || m->shape[0] == h->layers))
        return EXIT_FINE;
    char shape[ARRAY_SHAPE_TEXT];
    array_shape_string(m->rank, m->shape, shape);
    file_error_set(error, c->path,
                   "is %s %s; a mask is u8 or bool, [%" PRId64 " layers or 1, %" PRId64
                   " heads, query blocks, key blocks]",
                   array_type_string(m->type), shape, h->layers, h->heads);
    return EXIT_FILE;
}

/* Of every layer, for q and k that have turned as the model has them. */
static exit_code read_gates(choice *c, const hyper *h, file_error *error)
{
    exit_code code = EXIT_FINE;
    for (int64_t n = 0; n < h->head_dim / 2; n++)
        if (h->rope_divisor[n] != 1.0f) {
            file_error_set(error, c->path,
                           "a gate is for rotations of one base, and this model's are scaled");
            return EXIT_UNSUPPORTED;
        }
    c->gate = calloc((size_t)h->layers, sizeof *c->gate);
    if (!c->gate) {
        file_error_set(error, c->path, "no memory for its gates");
        return EXIT_MACHINE;
    }
    for (int64_t layer = 0; layer < h->layers && !code; layer++)
        code = gate_read(c->path, layer, (double)h->rope_theta, h->heads, h->kv_heads, h->head_dim,
                         &c->gate[layer], error);
    return code;
}

static exit_code read_method(choice *c, const char *text, const hyper *h, file_error *error)
{
    file_error why;
    const exit_code code = method_parse(text, &c->method, &why);
    c->layers = h->layers;
    if (code)
        file_error_set(error, NULL,
                       "--attention is f32, int8, sparse, a .json of thresholds, a .npy of masks "
                       "or a method; %s",
                       why.text);
    c->state = code ? NULL : calloc((size_t)h->layers, sizeof *c->state);
    if (code || c->state)
        return code;
    file_error_set(error, NULL, "no memory for the state of '%.60s'", text);
    return EXIT_MACHINE;
}

exit_code choice_open(const char *text, const attention_args *asked, const hyper *h,
                      const char *name, const char *weights, choice *out, file_error *error)
{
    *out = (choice){.name = basename(text), .options = asked->options};
    exit_code code = EXIT_FINE;
    if (strcmp(text, "f32") == 0 || strcmp(text, "int8") == 0) {
        out->dense = true;
        out->options.qk_dtype = out->options.pv_dtype =
            strcmp(text, "f32") == 0 ? SPARGE_F32 : SPARGE_INT8;
    } else if (ends_with(text, ".json")) {
        out->path = text;
        code = read_thresholds(out, asked->given, h, name, weights, error);
    } else if (ends_with(text, ".npy")) {
        out->path = text;
        code = read_mask(out, h, error);
    } else if (strcmp(text, "sparse") != 0) {
        code = read_method(out, text, h, error);
        if (!code && asked->gate && choice_has_gate(text)) {
            out->path = asked->gate;
            code = read_gates(out, h, error);
        }
    }
    if (!code && out->path)
        code = capture_sha256(out->path, out->sha256, error);
    if (code)
        choice_free(out);
    return code;
}

void choice_begin(const choice *c)
{
    for (int64_t layer = 0; c->state && layer < c->layers; layer++) {
        free(c->state[layer]);
        c->state[layer] = NULL;
    }
}

void choice_free(choice *c)
{
    choice_begin(c);
    for (int64_t layer = 0; c->gate && layer < c->layers; layer++)
        gate_free(&c->gate[layer]);
    free(c->gate);
    free(c->state);
    free(c->thresholds);
    array_free(&c->mask);
    c->state = NULL;
    c->gate = NULL;
    c->thresholds = NULL;
}

/* The mask of one layer, from the file. */
static exit_code take_mask(const choice *c, int64_t layer, sparge_mask *to, file_error *error)
{
    const array *from = &c->mask;
    if (from->shape[2] != to->q_blocks || from->shape[3] != to->k_blocks) {
        file_error_set(error, c->path,
                       "has %" PRId64 " query blocks and %" PRId64
                       " key blocks; this length has %" PRId64 " and %" PRId64,
                       from->shape[2], from->shape[3], to->q_blocks, to->k_blocks);
        return EXIT_FILE;
    }
    const uint8_t *keep = from->data;
    keep += (from->shape[0] > 1 ? layer : 0) * to->heads * to->q_blocks * to->k_blocks;
    mask_keep(to, keep);
    return EXIT_FINE;
}

/* By a plan; making it is a part of the attention, and of its prediction. */
static void run_method(const choice *c, int64_t layer, const sparge_problem *problem,
                       sparge_result *result, measured *to)
{
    const sparge_context context = {
        .layer = layer, .gate = c->gate ? &c->gate[layer].c : NULL, .state = &c->state[layer]};
    const sparge_method *const method = c->method.method;
    const double before = device_seconds();
    sparge_plan plan;
    method_must(method, sparge_method_plan(method, problem, &c->options, &context, c->method.param,
                                           &plan, &library_error));
    plan_fit(&plan);
    must_sparge(sparge_plan_run(&plan, &device_executor, result, &library_error));
    to->seconds += plan.seconds + device_seconds() - before;
    sparge_plan_free(&plan);
}

exit_code choice_attend(const choice *c, int64_t layer, const sparge_problem *problem,
                        const sparge_out *o, measured *to, file_error *error)
{
    sparge_options options = c->options;
    sparge_result result = {.o = *o};
    sparge_mask mask = {0};
    exit_code code = EXIT_FINE;
    if (c->thresholds)
        options.per_head = c->thresholds + layer * problem->heads;
    if (c->mask.data) {
        must_sparge(sparge_mask_alloc(&mask, problem, &options, &library_error));
        code = take_mask(c, layer, &mask, error);
    }
    if (c->method.method)
        run_method(c, layer, problem, &result, to);
    else if (!code)
        to->seconds += device_attend(problem, &options, c->mask.data ? &mask : NULL,
                                     !c->dense && !c->mask.data, &result);
    if (!code) {
        to->layer[layer] = result.counts;
        to->prepare += result.seconds_predict + result.seconds_quantize;
        to->isa = result.isa;
        to->threads = result.threads;
    }
    sparge_mask_free(&mask);
    return code;
}

sparge_counts measured_counts(const measured *m, int64_t layers)
{
    return kept_sum(m->layer, layers);
}
