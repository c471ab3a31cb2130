/* SPDX-License-Identifier: Apache-2.0 */
/* params.c: files of tuned thresholds. */
#include "tools/params.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparge_inspect.h"

#include "tools/options.h"
#include "tools/sparge_params.h"

enum { FORMAT = 1 };

/* ---- Reading: each of these leaves a line and returns false, or goes on ---- */

typedef struct reader {
    const char *name; /* of the file */
    file_error *error;
    char where[64]; /* "", or "heads[3]." */
    const json_t *object;
} reader;

static bool wrong(const reader *r, const char *key, const char *must)
{
    return file_error_set(r->error, r->name, "'%s%s' must be %s; is it a file of sparge tune?",
                          r->where, key, must);
}

static bool read_whole(const reader *r, const char *key, int64_t low, int64_t high, int64_t *to)
{
    const json_t *x = json_object_get(r->object, key);
    char must[80];
    *to = json_integer_value(x);
    snprintf(must, sizeof must, "a whole number in [%" PRId64 ", %" PRId64 "]", low, high);
    return (json_is_integer(x) && *to >= low && *to <= high) || wrong(r, key, must);
}

static bool read_bool(const reader *r, const char *key, bool *to)
{
    const json_t *x = json_object_get(r->object, key);
    *to = json_is_true(x);
    return json_is_boolean(x) || wrong(r, key, "true or false");
}

/* In the library's range; null stands for `none`. JSON has no infinity. */
static bool read_float(const reader *r, const char *key, float none, float *to)
{
    const json_t *x = json_object_get(r->object, key);
    char must[80];
    double low = 0.0, high = 0.0;
    sparge_range(key, &low, &high);
    low = fmax(low, -1e30);
    snprintf(must, sizeof must, "a number in [%g, %g], or null", low, high);
    *to = json_is_null(x) ? none : (float)json_number_value(x);
    return json_is_null(x) || (json_is_number(x) && *to >= (float)low && *to <= (float)high) ||
           wrong(r, key, must);
}

/* The place of a word in a list of three that ends with NULL. */
static bool read_word(const reader *r, const char *key, const char *const *words, int *to)
{
    const char *word = json_string_value(json_object_get(r->object, key));
    char must[80];
    for (*to = 0; word && words[*to]; ++*to)
        if (strcmp(word, words[*to]) == 0)
            return true;
    snprintf(must, sizeof must, "%s, %s or %s", words[0], words[1], words[2]);
    return wrong(r, key, must);
}

/* null, or nothing, stands for NULL. */
static bool read_text(const reader *r, const char *key, const char **to)
{
    const json_t *x = json_object_get(r->object, key);
    *to = json_string_value(x);
    return !x || json_is_null(x) || *to || wrong(r, key, "a text, or null");
}

static bool read_head(reader *r, params_head *to)
{
    sparge_thresholds *k = &to->thresholds;
    bool dense;
    return read_whole(r, "layer", 0, INT32_MAX, &to->layer) &&
           read_whole(r, "head", 0, INT32_MAX, &to->head) && read_bool(r, "dense", &dense) &&
           read_float(r, "theta", NAN, &k->theta) && read_float(r, "tau", SPARGE_OFF, &k->tau) &&
           read_float(r, "topk", SPARGE_OFF, &k->topk) &&
           (!json_object_get(r->object, "min_mass") ||
            read_float(r, "min_mass", 0.0f, &k->min_mass)) &&
           read_float(r, "lambda", -INFINITY, &k->lambda) &&
           (!isnan(k->theta) || wrong(r, "theta", "a number")) &&
           (k->tau != SPARGE_OFF || k->topk != SPARGE_OFF || k->min_mass > 0.0f ||
            wrong(r, "tau", "a number where topk and min_mass are null"));
}

static int by_place(const void *a, const void *b)
{
    const params_head *x = a, *y = b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return (x->head > y->head) - (x->head < y->head);
}

static bool read_heads(reader *r, params *out)
{
    const json_t *heads = json_object_get(out->json, "heads");
    if (!json_is_array(heads))
        return wrong(r, "heads", "a list");
    out->head = calloc(json_array_size(heads) + 1, sizeof *out->head);
    if (!out->head)
        return file_error_set(r->error, r->name, "no memory for its heads");
    for (size_t n = 0; n < json_array_size(heads); n++) {
        r->object = json_array_get(heads, n);
        snprintf(r->where, sizeof r->where, "heads[%zu].", n);
        if (!read_head(r, &out->head[out->heads++]))
            return false;
    }
    qsort(out->head, (size_t)out->heads, sizeof *out->head, by_place);
    for (int64_t n = 1; n < out->heads; n++)
        if (by_place(&out->head[n - 1], &out->head[n]) == 0)
            return file_error_set(r->error, r->name, "has layer %" PRId64 " head %" PRId64 " twice",
                                  out->head[n].layer, out->head[n].head);
    return true;
}

static bool read_all(reader *r, params *out)
{
    const json_t *model = json_object_get(out->json, "model");
    sparge_options *o = &out->options;
    int64_t format;
    int causal = 0, rules = SPARGE_RULES_DEFAULT;
    r->object = out->json;
    out->model = json_string_value(model);
    const bool ok =
        read_whole(r, "sparge_params", FORMAT, FORMAT, &format) &&
        (json_is_string(model) || json_is_null(model) || wrong(r, "model", "a name, or null")) &&
        read_text(r, "weights_sha256", &out->weights) &&
        (!json_object_get(out->json, "rules") || read_word(r, "rules", options_rules, &rules)) &&
        read_whole(r, "block_q", 1, SPARGE_MAX_BLOCK, &o->block_q) &&
        read_whole(r, "block_k", 1, SPARGE_MAX_BLOCK, &o->block_k) &&
        (!json_object_get(out->json, "cell") ||
         read_whole(r, "cell", 0, SPARGE_MAX_BLOCK, &o->cell)) &&
        read_whole(r, "skip_rows", 1, SPARGE_MAX_BLOCK, &o->skip_rows) &&
        read_word(r, "causal", options_causals, &causal) &&
        read_bool(r, "smooth_k", &o->smooth_k) && read_bool(r, "sink", &o->sink) &&
        read_float(r, "softmax_scale", 0.0f, &o->softmax_scale) && read_heads(r, out);
    o->causal = (sparge_causal)causal;
    o->rules = (sparge_rules)rules;
    return ok;
}

exit_code params_read_memory(const char *text, size_t size, const char *name, params *out,
                             file_error *error)
{
    json_error_t why;
    reader r = {.name = name, .error = error};
    file_error_clear(error);
    *out = (params){.json = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why)};
    if (!out->json)
        file_error_set(error, name, "line %d: %s; is it cut short?", why.line, why.text);
    else if (!json_is_object(out->json))
        file_error_set(error, name, "is no JSON object");
    else if (read_all(&r, out))
        return EXIT_FINE;
    params_free(out);
    return EXIT_FILE;
}

exit_code params_read(const char *path, params *out, file_error *error)
{
    size_t size;
    char *text = input_text(path, &size, error);
    *out = (params){0};
    const exit_code code = text ? params_read_memory(text, size, path, out, error) : EXIT_FILE;
    free(text);
    return code;
}

void params_free(params *p)
{
    json_decref(p->json);
    free(p->head);
    *p = (params){0};
}

/* ---- Using ---- */

exit_code params_find(const params *p, const char *name, int64_t layer, int64_t head,
                      sparge_thresholds *to, file_error *error)
{
    const params_head wanted = {.layer = layer, .head = head};
    const params_head *const found =
        p->heads ? bsearch(&wanted, p->head, (size_t)p->heads, sizeof wanted, by_place) : NULL;
    if (found)
        *to = found->thresholds;
    else
        file_error_set(error, name, "has no thresholds for layer %" PRId64 " head %" PRId64, layer,
                       head);
    return found ? EXIT_FINE : EXIT_FILE;
}

exit_code params_model(const params *p, const char *name, const char *model, const char *weights,
                       file_error *error)
{
    const bool same = p->weights && weights && strcmp(p->weights, weights) == 0;
    if (same || !p->model || !model || strcmp(p->model, model) == 0)
        return EXIT_FINE;
    file_error_set(error, name, "is for the model '%.60s', not for '%.60s'", p->model, model);
    return EXIT_FILE;
}

/* What is not given. */
static void take(const sparge_options *tuned, option_set given, sparge_options *o)
{
    if (!(given & option_bit(OPT_RULES)))
        o->rules = tuned->rules;
    if (!(given & option_bit(OPT_BLOCK_Q)))
        o->block_q = tuned->block_q;
    if (!(given & option_bit(OPT_BLOCK_K)))
        o->block_k = tuned->block_k;
    if (!(given & option_bit(OPT_CELL)))
        o->cell = tuned->cell;
    if (!(given & option_bit(OPT_SKIP_ROWS)))
        o->skip_rows = tuned->skip_rows;
    if (!(given & option_bit(OPT_CAUSAL)))
        o->causal = tuned->causal;
    if (!(given & option_bit(OPT_NO_SMOOTH_K)))
        o->smooth_k = tuned->smooth_k;
    if (!(given & option_bit(OPT_SINK)))
        o->sink = tuned->sink;
    if (!(given & option_bit(OPT_SOFTMAX_SCALE)))
        o->softmax_scale = tuned->softmax_scale;
}

exit_code params_obey(const params *p, const char *name, option_set given, sparge_options *o,
                      file_error *error)
{
    static const char *const keys[] = {"rules",  "block_q", "block_k",  "cell",         "skip_rows",
                                       "causal", "sink",    "smooth_k", "softmax_scale"};
    enum { DIGITS = JSON_ENCODE_ANY | JSON_REAL_PRECISION(9) };
    take(&p->options, given, o);
    json_t *tuned = options_json(&p->options), *asked = options_json(o);
    exit_code code = EXIT_FINE;
    for (size_t n = 0; n < sizeof keys / sizeof *keys && !code; n++) {
        const json_t *was = json_object_get(tuned, keys[n]), *is = json_object_get(asked, keys[n]);
        if (json_equal(was, is))
            continue;
        char *expected = json_dumps(was, DIGITS), *got = json_dumps(is, DIGITS);
        file_error_set(error, name, "was tuned with %s %s, not %s; run so too", keys[n],
                       expected ? expected : "", got ? got : "");
        free(expected);
        free(got);
        code = EXIT_FILE;
    }
    json_decref(tuned);
    json_decref(asked);
    return code;
}

sparge_status sparge_params_load(const char *path, const char *model, int64_t layer, int64_t heads,
                                 const sparge_options *options, sparge_thresholds *thresholds,
                                 sparge_error *error)
{
    params p;
    file_error why;
    sparge_options same = *options;
    exit_code code = params_read(path, &p, &why);
    if (!code)
        code = params_model(&p, path, model, NULL, &why);
    if (!code)
        code = params_obey(&p, path, options_all(), &same, &why);
    for (int64_t h = 0; h < heads && !code; h++)
        code = params_find(&p, path, layer, h, &thresholds[h], &why);
    params_free(&p);
    if (error)
        snprintf(error->text, sizeof error->text, "%.*s", (int)sizeof error->text - 1,
                 code ? why.text : "");
    return code == EXIT_FINE ? SPARGE_OK : why.memory ? SPARGE_ERR_MEMORY : SPARGE_ERR_ARGUMENT;
}

/* ---- Writing ---- */

json_t *params_header(const char *model, const char *weights, const sparge_options *o)
{
    return json_joined(json_pack("{s:i, s:s, s:s?, s:s?}", "sparge_params", FORMAT, "version",
                                 SPARGE_VERSION, "model", model, "weights_sha256", weights),
                       options_json(o));
}

json_t *params_line(int64_t layer, int64_t head, bool dense, const sparge_thresholds *thresholds)
{
    return json_joined(json_pack("{s:I, s:I, s:b}", "layer", (json_int_t)layer, "head",
                                 (json_int_t)head, "dense", dense),
                       thresholds_json(thresholds));
}
