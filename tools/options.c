/* SPDX-License-Identifier: Apache-2.0 */
/* options.c: values of options, and the options of attention that commands share. */
#include "tools/options.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparge_inspect.h"

/* ---- Values ---- */

error_t options_real(struct argp_state *state, const char *name, const char *text, double low,
                     double high, double *to)
{
    char *end;
    *to = strtod(text, &end);
    if (end == text || *end || strchr(" \t\n\v\f\r", *text))
        return options_wrong(state, "%s is '%.40s', which is not a number", name, text);
    if (!(*to >= low && *to <= high)) /* NaN fails too */
        return options_wrong(state, "%s is %.40s, it must be in [%g, %g]", name, text, low, high);
    return 0;
}

/* The library's range of what an option sets: --block-q is block_q. */
static void range_of(const char *option, double *low, double *high)
{
    char name[32];
    snprintf(name, sizeof name, "%s", option + strlen("--"));
    for (char *c = name; *c; c++)
        *c = *c == '-' ? '_' : *c;
    *low = *high = 0.0;
    sparge_range(name, low, high);
}

error_t options_float(struct argp_state *state, const char *name, const char *text, float *to)
{
    double x, low, high;
    range_of(name, &low, &high);
    const error_t error = options_real(state, name, text, low, high, &x);
    *to = (float)x;
    return error;
}

error_t options_whole(struct argp_state *state, const char *name, const char *text, int64_t low,
                      int64_t high, int64_t *to)
{
    char *end;
    errno = 0;
    *to = strtoll(text, &end, 10);
    if (end == text || *end || strchr(" \t\n\v\f\r", *text))
        return options_wrong(state, "%s is '%.40s', which is not a whole number", name, text);
    if (errno || *to < low || *to > high)
        return options_wrong(state, "%s is %.40s, it must be in [%lld, %lld]", name, text,
                             (long long)low, (long long)high);
    return 0;
}

/* A whole number in the library's range; 0, which stands for a default there, is refused if `least`
 * says so. */
static error_t ranged(struct argp_state *state, const char *name, const char *text, int64_t least,
                      int64_t *to)
{
    double low, high;
    range_of(name, &low, &high);
    const int64_t most = high < 0x1p63 ? (int64_t)high : INT64_MAX;
    return options_whole(state, name, text, (int64_t)fmax(low, (double)least), most, to);
}

error_t options_word(struct argp_state *state, const char *name, const char *text,
                     const char *const *words, int *to)
{
    char all[128] = "";
    for (*to = 0; words[*to]; ++*to) {
        if (strcmp(words[*to], text) == 0)
            return 0;
        const size_t used = strlen(all);
        snprintf(all + used, sizeof all - used, "%s%s", *to ? ", " : "", words[*to]);
    }
    return options_wrong(state, "%s is '%.40s', it must be one of %s", name, text, all);
}

sparge_dtype options_dtype(const char *word)
{
    sparge_dtype dtype = SPARGE_F32;
    while (dtype < SPARGE_FASTEST && strcmp(sparge_dtype_string(dtype), word) != 0)
        dtype++;
    return dtype;
}

int64_t options_skip_rows(const sparge_options *o)
{
    const sparge_problem none = {.heads = 1, .kv_heads = 1, .dim = 1};
    sparge_options whole = sparge_options_default(o->rules);
    whole.backend = SPARGE_REF; /* which has all rules */
    whole.block_q = o->block_q;
    whole.skip_rows = o->skip_rows;
    sparge_options_resolve(&none, &whole, NULL);
    return whole.skip_rows;
}

json_t *options_json(const sparge_options *o)
{
    return json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:s, s:b, s:b, s:o}", "rules",
                     sparge_rules_string(o->rules), "qk_dtype", sparge_dtype_string(o->qk_dtype),
                     "pv_dtype", sparge_dtype_string(o->pv_dtype), "block_q",
                     (json_int_t)o->block_q, "block_k", (json_int_t)o->block_k, "cell",
                     (json_int_t)o->cell, "skip_rows", (json_int_t)options_skip_rows(o), "causal",
                     sparge_causal_string(o->causal), "smooth_k", o->smooth_k, "sink", o->sink,
                     "softmax_scale",
                     o->softmax_scale > 0.0f ? json_float(o->softmax_scale) : json_null());
}

/* tau or topk. */
static json_t *share_json(float share)
{
    return share == SPARGE_OFF ? json_null() : json_float(share);
}

json_t *thresholds_json(const sparge_thresholds *k)
{
    return json_pack("{s:o, s:o, s:o, s:o, s:o}", "theta", json_float(k->theta), "tau",
                     share_json(k->tau), "topk", share_json(k->topk), "min_mass",
                     k->min_mass > 0.0f ? json_float(k->min_mass) : json_null(), "lambda",
                     json_float(k->lambda));
}

/* ---- Attention ---------------------------------------------------------------------------- */

static const struct argp_option thresholds_options[] = {
    {0, 0, 0, 0, "What is kept:", 1},
    {"theta", OPT_THETA, "X", 0, "a block is self-similar above this mean cosine (0.6)", 0},
    {"tau", OPT_TAU, "X", 0, "keep the most probable key blocks up to this mass (0.98)", 0},
    {"topk", OPT_TOPK, "X", 0,
     "keep this share of the visible key blocks, instead of tau; with --tau too, what either keeps",
     0},
    {"min-mass", OPT_MIN_MASS, "X", 0,
     "keep key blocks of more mass than X even shares, instead of tau; with --tau too, what either "
     "keeps",
     0},
    {"cell", OPT_CELL, "N", 0,
     "masses are of cells of N tokens, which divide both blocks (0: of whole blocks)", 0},
    {"lambda", OPT_LAMBDA, "X", 0, "drop P.V of tiles this far below the maximum (-inf: none)", 0},
    {"sink", OPT_SINK, 0, 0, "always keep key block 0", 0},
    {0},
};

static error_t thresholds_parser(int key, char *text, struct argp_state *state)
{
    attention_args *a = state->input;
    sparge_thresholds *t = &a->options.thresholds;
    if ((key >= OPT_THETA && key <= OPT_CELL) || key == OPT_SINK)
        a->given |= option_bit(key);
    switch (key) {
    case OPT_THETA: return options_float(state, "--theta", text, &t->theta);
    case OPT_TAU: return options_float(state, "--tau", text, &t->tau);
    case OPT_TOPK: return options_float(state, "--topk", text, &t->topk);
    case OPT_MIN_MASS: return options_float(state, "--min-mass", text, &t->min_mass);
    case OPT_CELL: return ranged(state, "--cell", text, 0, &a->options.cell);
    case OPT_LAMBDA: return options_float(state, "--lambda", text, &t->lambda);
    case OPT_SINK: a->options.sink = true; return 0;
    case ARGP_KEY_END:
        if ((t->topk != SPARGE_OFF || t->min_mass > 0.0f) && !(a->given & option_bit(OPT_TAU)))
            t->tau = SPARGE_OFF;
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

const struct argp thresholds_argp = {.options = thresholds_options, .parser = thresholds_parser};

static const struct argp_option attention_options[] = {
    {"rules", OPT_RULES, "WHOSE", 0, "default, paper or upstream", 1},
    {0, 0, 0, 0, "What is computed:", 2},
    {"causal", OPT_CAUSAL, "WHERE", OPTION_ARG_OPTIONAL, "mask the future, aligned at end or start",
     0},
    {"softmax-scale", OPT_SOFTMAX_SCALE, "X", 0, "factor of the scores (1/sqrt(channels))", 0},
    {"block-q", OPT_BLOCK_Q, "N", 0, "tokens of a query block (128)", 0},
    {"block-k", OPT_BLOCK_K, "N", 0, "tokens of a key block (64)", 0},
    {"skip-rows", OPT_SKIP_ROWS, "N", 0, "decide lambda for N rows at a time (0: by the rules)", 0},
    {"no-smooth-k", OPT_NO_SMOOTH_K, 0, 0, "do not subtract the mean key", 0},
    {"qk-dtype", OPT_QK_DTYPE, "HOW", 0, "Q.K in int8, int12, f32 or bf16", 0},
    {"pv-dtype", OPT_PV_DTYPE, "HOW", 0,
     "P.V in int8, int12, f32, bf16, f16, fp8 or fastest (int8; on cuda fastest)", 0},
    {0, 0, 0, 0, "By what:", 3},
    {"backend", OPT_BACKEND, "NAME", 0, "auto, ref, cpu or cuda", 0},
    {"isa", OPT_ISA, "NAME", 0, "auto, scalar, avx2, avxvnni, avx512vnni or amx", 0},
    {"threads", OPT_THREADS, "N", 0, "of the cpu backend (0: as many as there are cores)", 0},
    {"kernel", OPT_KERNEL, "N", 0, "kernel of the cuda backend, 1 to 5 (the best that can do it)",
     0},
    {0, 0, 0, 0, "Files:", 4},
    {"layout", OPT_LAYOUT, "HOW", 0, "of the axes: hnd ([B,H,N,D], [H,N,D]) or nhd ([B,N,H,D])", 0},
    {"output", 'o', "FILE", 0, "where to write", 0},
    {0},
};

const char *const options_isas[] = {"auto", "scalar", "avx2", "avxvnni", "avx512vnni", "amx", NULL};
const char *const options_pv_dtypes[] = {"int8", "int12", "f32",     "bf16",
                                         "f16",  "fp8",   "fastest", NULL};
const char *const options_qk_dtypes[] = {"int8", "int12", "f32", "bf16", NULL};
const char *const options_causals[] = {"none", "end", "start", NULL};
const char *const options_rules[] = {"default", "paper", "upstream", NULL};
static const char *const backends[] = {"auto", "ref", "cpu", "cuda", NULL};
static const char *const layouts[] = {"hnd", "nhd", NULL};

static const struct choice {
    const char *name;
    const char *const *words;
} choices[] = {
    [OPT_CAUSAL - OPT_CAUSAL] = {"--causal", options_causals},
    [OPT_RULES - OPT_CAUSAL] = {"--rules", options_rules},
    [OPT_BACKEND - OPT_CAUSAL] = {"--backend", backends},
    [OPT_ISA - OPT_CAUSAL] = {"--isa", options_isas},
    [OPT_QK_DTYPE - OPT_CAUSAL] = {"--qk-dtype", options_qk_dtypes},
    [OPT_PV_DTYPE - OPT_CAUSAL] = {"--pv-dtype", options_pv_dtypes},
    [OPT_LAYOUT - OPT_CAUSAL] = {"--layout", layouts},
};

static error_t choose(struct argp_state *state, attention_args *a, int key, const char *text)
{
    const struct choice *c = &choices[key - OPT_CAUSAL];
    int word = a->rules == SPARGE_RULES_UPSTREAM ? SPARGE_CAUSAL_START : SPARGE_CAUSAL_END;
    const error_t error = text ? options_word(state, c->name, text, c->words, &word) : 0;
    if (error)
        return error;
    switch (key) {
    case OPT_CAUSAL: a->options.causal = (sparge_causal)word; break;
    case OPT_RULES: a->rules = (sparge_rules)word; break;
    case OPT_BACKEND: a->options.backend = (sparge_backend)word; break;
    case OPT_ISA: a->options.isa = (sparge_isa)word; break;
    case OPT_QK_DTYPE: a->options.qk_dtype = options_dtype(c->words[word]); break;
    case OPT_PV_DTYPE: a->options.pv_dtype = options_dtype(c->words[word]); break;
    default: a->nhd = word == 1; break;
    }
    return 0;
}

static error_t attention_parser(int key, char *text, struct argp_state *state)
{
    attention_args *a = state->input;
    sparge_options *o = &a->options;
    int64_t whole = 0;
    error_t error;
    if (key >= OPT_THETA && key <= OPT_LAYOUT)
        a->given |= option_bit(key);
    switch (key) {
    case ARGP_KEY_INIT:
        *a = (attention_args){
            .base = a->base,
            .options = sparge_options_default(a->rules),
            .rules = a->rules,
            .layer = -1,
            .density = NAN,
        };
        state->child_inputs[0] = a;
        return 0;
    case ARGP_KEY_ARG:
        if (a->files == 3)
            return options_wrong(state, "'%.60s' is one file too many", text);
        a->file[a->files++] = text;
        return 0;
    case OPT_SOFTMAX_SCALE: return options_float(state, "--softmax-scale", text, &o->softmax_scale);
    case OPT_BLOCK_Q: return ranged(state, "--block-q", text, 1, &o->block_q);
    case OPT_BLOCK_K: return ranged(state, "--block-k", text, 1, &o->block_k);
    case OPT_SKIP_ROWS: return ranged(state, "--skip-rows", text, 0, &o->skip_rows);
    case OPT_THREADS:
        error = ranged(state, "--threads", text, 0, &whole);
        o->threads = (int)whole;
        return error;
    case OPT_KERNEL:
        error = ranged(state, "--kernel", text, 1, &whole);
        o->cuda.kernel = (int)whole;
        return error;
    case OPT_NO_SMOOTH_K: o->smooth_k = false; return 0;
    case 'o':
        a->given |= option_bit(key);
        a->output = text;
        return 0;
    case ARGP_KEY_END:
        if (o->backend == SPARGE_CUDA && !(a->given & option_bit(OPT_PV_DTYPE)))
            o->pv_dtype = SPARGE_FASTEST;
        return 0;
    default:
        return key >= OPT_CAUSAL && key <= OPT_LAYOUT ? choose(state, a, key, text)
                                                      : ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child attention_children[] = {{&thresholds_argp, 0, NULL, 0}, {0}};
const struct argp attention_argp = {
    .options = attention_options, .parser = attention_parser, .children = attention_children};

/* ---- Options that contradict each other ---- */

static const char *name_of(const struct argp *argp, int key)
{
    const char *name = NULL;
    for (const struct argp_option *o = argp->options; o && (o->name || o->doc) && !name; o++)
        name = o->key == key ? o->name : NULL;
    for (const struct argp_child *c = argp->children; c && c->argp && !name; c++)
        name = name_of(c->argp, key);
    return name;
}

error_t options_refuse(struct argp_state *state, option_set given, const options_conflict *table,
                       size_t count)
{
    for (size_t n = 0; n < count; n++)
        for (const int *other = table[n].others; *other && given & option_bit(table[n].key);
             other++)
            if (given & option_bit(*other))
                return options_wrong(state, "--%s %s: leave out --%s",
                                     name_of(state->root_argp, table[n].key), table[n].why,
                                     name_of(state->root_argp, *other));
    return 0;
}

/* ---- Manifests and files of thresholds ---- */

static error_t manifest_parser(int key, char *text, struct argp_state *state)
{
    attention_args *a = state->input;
    switch (key) {
    case OPT_LAYER: return options_whole(state, "--layer", text, 0, INT32_MAX, &a->layer);
    case OPT_IGNORE_MANIFEST: a->ignore_manifest = true; return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static error_t params_parser(int key, char *text, struct argp_state *state)
{
    static const options_conflict twice = {
        OPT_PARAMS,
        {OPT_THETA, OPT_TAU, OPT_TOPK, OPT_MIN_MASS, OPT_LAMBDA},
        "has the thresholds",
    };
    attention_args *a = state->input;
    if (key == OPT_PARAMS)
        a->given |= option_bit(key);
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = a; return 0;
    case OPT_PARAMS: a->params = text; return 0;
    case ARGP_KEY_END:
        if (a->layer >= 0 && !a->params && !a->gate)
            return options_wrong(state, "--layer needs --params or --gate");
        return options_refuse(state, a->given, &twice, 1);
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option manifest_options[] = {
    {"layer", OPT_LAYER, "N", 0,
     "of the files, where neither a manifest nor 'layerN' in their names says it", 1},
    {"ignore-manifest", OPT_IGNORE_MANIFEST, 0, 0,
     "as if there were no manifest.json beside a file", 4},
    {0},
};
const struct argp manifest_argp = {.options = manifest_options, .parser = manifest_parser};

static const struct argp_option params_options[] = {
    {"params", OPT_PARAMS, "P.json", 0,
     "the thresholds that sparge tune found for each head, and the options that they were tuned "
     "with",
     1},
    {0},
};
static const struct argp_child params_children[] = {{&manifest_argp, 0, NULL, 0}, {0}};
const struct argp params_argp = {
    .options = params_options, .parser = params_parser, .children = params_children};

exit_code attention_parse(const struct argp *argp, int argc, char **argv, options_base *input,
                          attention_args *args)
{
    args->base = *input;
    args->rules = SPARGE_RULES_DEFAULT;
    const exit_code code = options_parse(argp, argc, argv, input);
    if (code || args->rules == SPARGE_RULES_DEFAULT)
        return code;
    return options_parse(argp, argc, argv, input); /* with the defaults of those rules */
}
