/* SPDX-License-Identifier: Apache-2.0 */
/* method.c: reads which method is asked for, and with which parameters. */
#include "tools/method.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/options.h"

int method_params(const sparge_method *method)
{
    int count = 0;
    while (count < SPARGE_MAX_PARAMS && method->param[count].name)
        count++;
    return count;
}

json_t *method_number(const sparge_param *q, double x)
{
    return q->whole                ? json_integer((json_int_t)x)
           : (double)(float)x == x ? json_float((float)x)
                                   : json_number(x);
}

json_t *method_params_json(const method_choice *choice)
{
    json_t *json = json_object();
    bool ok = json != NULL;
    for (int n = 0; n < method_params(choice->method) && ok; n++)
        ok = json_object_set_new(json, choice->method->param[n].name,
                                 method_number(&choice->method->param[n], choice->param[n])) == 0;
    if (ok)
        return json;
    json_decref(json);
    return NULL;
}

json_t *method_json(const method_choice *choice)
{
    return choice->method ? json_pack("{s:s, s:o}", "method", choice->method->name, "params",
                                      method_params_json(choice))
                          : json_pack("{s:n}", "method");
}

void method_must(const sparge_method *method, sparge_status s)
{
    const char *const why = library_error.text;
    if (s == SPARGE_ERR_UNSUPPORTED && strncmp(why, method->name, strlen(method->name)) == 0)
        fail(EXIT_UNSUPPORTED, NULL, "%s; 'sparge methods' lists what each needs", why);
    must_sparge(s);
}

/* ---- Reading ---- */

static bool find_method(const char *name, method_choice *out, file_error *error)
{
    int count;
    const sparge_method *const *all = sparge_methods(&count), *nearest = all[0];
    out->method = sparge_method_find(name);
    for (int n = 1; n < count; n++)
        if (options_distance(name, all[n]->name) < options_distance(name, nearest->name))
            nearest = all[n];
    return out->method ||
           file_error_set(error, NULL,
                          "unknown method '%.60s': did you mean '%s'? 'sparge methods' lists all",
                          name, nearest->name);
}

static bool find_param(const sparge_method *m, const char *name, int *n, file_error *error)
{
    const int count = method_params(m);
    int nearest = 0;
    for (*n = 0; *n < count && strcmp(m->param[*n].name, name) != 0; ++*n)
        if (options_distance(name, m->param[*n].name) <
            options_distance(name, m->param[nearest].name))
            nearest = *n;
    if (*n < count)
        return true;
    return count ? file_error_set(error, NULL, "%s has no parameter '%.60s': did you mean '%s'?",
                                  m->name, name, m->param[nearest].name)
                 : file_error_set(error, NULL, "%s has no parameters: leave out '%.60s'", m->name,
                                  name);
}

/* One of NAME=VALUE. */
static bool read_param(method_choice *out, char *item, file_error *error)
{
    const sparge_method *m = out->method;
    char *value = strchr(item, '='), *end;
    int n;
    if (value)
        *value++ = '\0';
    if (!find_param(m, item, &n, error))
        return false;
    const sparge_param *q = &m->param[n];
    if (!value)
        return file_error_set(error, NULL, "%s of %s has no value: write %s=%g", q->name, m->name,
                              q->name, q->usual);
    if (out->given & 1u << n)
        return file_error_set(error, NULL, "%s of %s is there twice", q->name, m->name);
    out->given |= 1u << n;
    double *to = &out->param[n];
    *to = strtod(value, &end);
    if (end == value || *end || strchr(" \t\n\v\f\r", *value))
        return file_error_set(error, NULL, "%s of %s is '%.40s', which is not a number", q->name,
                              m->name, value);
    if (!(*to >= q->low && *to <= q->high)) /* NaN fails too */
        return file_error_set(error, NULL, "%s of %s is %.40s, it must be in [%g, %g]", q->name,
                              m->name, value, q->low, q->high);
    return !q->whole || floor(*to) == *to ||
           file_error_set(error, NULL, "%s of %s is %.40s, which is not a whole number", q->name,
                          m->name, value);
}

exit_code method_parse(const char *text, method_choice *out, file_error *error)
{
    *out = (method_choice){0};
    char *const copy = strdup(text);
    if (!copy) {
        file_error_set(error, NULL, "no memory for the name of a method");
        return EXIT_MACHINE;
    }
    char *rest = strchr(copy, ':');
    if (rest)
        *rest++ = '\0';
    bool ok = find_method(copy, out, error);
    for (int n = 0; ok && n < SPARGE_MAX_PARAMS; n++)
        out->param[n] = out->method->param[n].usual;
    for (char *item = rest; ok && item; item = rest) {
        rest = strchr(item, ',');
        if (rest)
            *rest++ = '\0';
        ok = read_param(out, item, error);
    }
    free(copy);
    return ok ? EXIT_FINE : EXIT_USAGE;
}

int64_t *method_segments(const char *text, int64_t *count, file_error *error)
{
    int64_t *ends = calloc(strlen(text) / 2 + 1, sizeof *ends), before = 0;
    bool ok = ends || file_error_set(error, NULL, "no memory for --segments");
    *count = 0;
    for (const char *at = text; ok && at; ++*count) {
        char *end;
        const int64_t x = strtoll(at, &end, 10);
        if (end == at || (*end && *end != ',') || strchr(" \t\n\v\f\r", *at))
            ok = file_error_set(
                error, NULL, "--segments is '%.40s': write the ends of segments, as 100,200,4096",
                text);
        else if (x <= before)
            ok = file_error_set(error, NULL, "--segments has %lld after %lld, but its ends ascend",
                                (long long)x, (long long)before);
        else
            ends[*count] = before = x;
        at = *end ? end + 1 : NULL;
    }
    if (ok)
        return ends;
    free(ends);
    return NULL;
}

/* ---- As options ---- */

static error_t read_segments(const char *text, attention_args *a)
{
    int64_t count, *const ends = method_segments(text, &count, a->base.error);
    free(ends); /* they are read again where the keys are known */
    a->segments = text;
    return ends ? 0 : EINVAL;
}

static error_t check_segments(struct argp_state *state, const attention_args *a)
{
    const sparge_method *m = a->method.method;
    if (a->segments && !m)
        return options_wrong(state, "--segments is for a method: give --method too");
    if (a->segments && !(m->needs & SPARGE_NEEDS_SEGMENTS))
        return options_wrong(state, "%s looks at no segments: leave out --segments", m->name);
    return 0;
}

static error_t method_parser(int key, char *text, struct argp_state *state)
{
    static const options_conflict conflicts[] = {
        {OPT_METHOD,
         {OPT_PARAMS, OPT_THETA, OPT_TAU, OPT_TOPK, OPT_MIN_MASS, OPT_CELL, OPT_LAMBDA, OPT_SINK},
         "has parameters of its own"},
        {OPT_DENSITY, {OPT_PARAMS, OPT_TAU, OPT_TOPK, OPT_MIN_MASS, OPT_CELL}, "finds tau"},
    };
    attention_args *a = state->input;
    if (key >= OPT_METHOD && key <= OPT_ROPE_BASE)
        a->given |= option_bit(key);
    switch (key) {
    case OPT_METHOD: return method_parse(text, &a->method, a->base.error) ? EINVAL : 0;
    case OPT_DENSITY: return options_real(state, "--density", text, 0.0, 1.0, &a->density);
    case OPT_GATE: a->gate = text; return 0;
    case OPT_ROPE_BASE: return options_real(state, "--rope-base", text, 1.0, 1e12, &a->rope_base);
    case OPT_SEGMENTS: return read_segments(text, a);
    case ARGP_KEY_END:
        if (check_segments(state, a))
            return EINVAL;
        if (a->gate && (!a->method.method || strcmp(a->method.method->name, "seer") != 0))
            return options_wrong(state, "--gate is for --method seer, which is not asked for");
        if (a->rope_base > 0.0 && !a->gate)
            return options_wrong(state, "--rope-base is for --gate, which is not given");
        if (a->method.method && a->given & option_bit(OPT_DENSITY)) {
            const sparge_method *m = a->method.method;
            if (!m->param[0].name)
                return options_wrong(state, "--density: %s has no parameter that sets its density",
                                     m->name);
            if (a->method.given & 1)
                return options_wrong(state, "--density finds %s of %s: leave one of them out",
                                     m->param[0].name, m->name);
        }
        return options_refuse(state, a->given, conflicts, sizeof conflicts / sizeof *conflicts);
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option method_options[] = {
    {"method", OPT_METHOD, "NAME[:PARAM=VALUE,...]", 0,
     "another method than SpargeAttn; 'sparge methods' lists all", 1},
    {"density", OPT_DENSITY, "X", 0,
     "the first parameter of the method (tau), one for all heads, that keeps this share of the "
     "visible token pairs",
     1},
    {"gate", OPT_GATE, "G.safetensors", 0,
     "a trained gate for --method seer: gate_k and gate_q, or what the authors call them in a "
     "layer",
     1},
    {"rope-base", OPT_ROPE_BASE, "X", 0,
     "rope_theta of the rotation that q and k have had, which a gate does not see (none)", 1},
    {"segments", OPT_SEGMENTS, "END,...", 0,
     "where the segments of the keys end, for a method that needs them: 100,200,4096", 1},
    {0},
};
const struct argp method_argp = {.options = method_options, .parser = method_parser};
