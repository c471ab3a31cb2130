/* SPDX-License-Identifier: Apache-2.0 */
/* lm.c: what the commands of sparge-lm have in common. */
#include "experiments/lm/lm.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "experiments/lm/matmul.h"
#include "sparge_inspect.h"
#include "tools/inputs.h"
#include "tools/params.h"

/* ---- The command line ---- */

enum { ATTENTION = 1024, LENGTH, MODEL, CSV, GATE };

static const struct argp_option lm_options[] = {
    {0, 0, 0, 0, "What is run:", 0},
    {"attention", ATTENTION, "WHICH,...", 0,
     "f32 and int8 are dense, sparse is SpargeAttn with the thresholds below, a .json has tuned "
     "ones, a .npy masks [layers or 1,H,q blocks,k blocks], all else is a method as sparge run "
     "--method takes it (f32,sparse)",
     0},
    {"length", LENGTH, "N,...", 0, "tokens from the start of each text (all of it)", 0},
    {"model", MODEL, "NAME", 0, "what the model is called, in thresholds too (what its file says)",
     0},
    {"gate", GATE, "G.safetensors", 0,
     "trained gates of all layers for --attention seer, under the authors' names", 0},
    {"csv", CSV, "FILE", 0, "write the rows as a table too, at the end", 0},
    {0},
};

error_t lm_list(struct argp_state *state, const char *name, const char *text, int64_t low,
                int64_t high, int64_t *to, int *count)
{
    *count = 0;
    for (const char *at = text; at;) {
        char item[64]; /* what is cut off is wrong in any case */
        const size_t length = strcspn(at, ",");
        snprintf(item, sizeof item, "%.*s", (int)(length < sizeof item ? length : sizeof item), at);
        if (*count == LM_LIST)
            return options_wrong(state, "%s has more than %d items", name, LM_LIST);
        const error_t error = options_whole(state, name, item, low, high, &to[*count]);
        if (error)
            return error;
        ++*count;
        at = at[length] ? at + length + 1 : NULL;
    }
    return 0;
}

/* "f32,a.json": each is a choice more. */
static error_t add_choices(struct argp_state *state, lm_args *a, char *text)
{
    for (char *item = text; item;) {
        char *comma = choice_end(item);
        if (comma)
            *comma = '\0';
        if (!*item)
            return options_wrong(state, "--attention has an empty item");
        if (a->choices == LM_LIST)
            return options_wrong(state, "--attention has more than %d items", LM_LIST);
        for (int n = 0; n < a->choices; n++)
            if (strcmp(a->choice[n], item) == 0)
                return options_wrong(state, "--attention has '%.60s' twice", item);
        a->choice[a->choices++] = item;
        item = comma ? comma + 1 : NULL;
    }
    return 0;
}

error_t lm_file(struct argp_state *state, lm_args *a, const char *path)
{
    if (a->attention.files == 0) {
        a->attention.file[a->attention.files++] = path;
        return 0;
    }
    if (a->texts == sizeof a->text / sizeof *a->text)
        return options_wrong(state, "'%.60s' is one text too many", path);
    a->text[a->texts++] = path;
    return 0;
}

error_t lm_check_files(struct argp_state *state, const lm_args *a)
{
    return a->attention.files
               ? 0
               : options_wrong(state, "give a model: a .gguf file, or a folder with config.json");
}

/* Thresholds mean nothing to an attention that keeps everything, or has them from a file, whose
 * cells may be said again; of a mask lambda is left. */
static error_t check_kept(struct argp_state *state, const lm_args *a)
{
    const option_set all = option_bits(OPT_THETA, OPT_CELL), mask = all & ~option_bit(OPT_LAMBDA);
    option_set meant = a->choices ? 0 : all;
    for (int n = 0; n < a->choices; n++)
        meant |= strcmp(a->choice[n], "sparse") == 0 ? all
                 : ends_with(a->choice[n], ".json")  ? option_bit(OPT_CELL)
                 : ends_with(a->choice[n], ".npy")   ? option_bit(OPT_LAMBDA)
                                                     : 0;
    if (!(a->attention.given & all & ~meant))
        return 0;
    return options_wrong(state, "%s for --attention sparse, which is not asked for",
                         a->attention.given & mask & ~meant
                             ? "--theta, --tau, --topk, --min-mass and --cell are"
                             : "--lambda is");
}

static error_t check_args(struct argp_state *state, const lm_args *a)
{
    const sparge_options *o = &a->attention.options;
    const error_t error = lm_check_files(state, a);
    if (error)
        return error;
    if (o->causal != SPARGE_CAUSAL_NONE || o->softmax_scale != 0.0f || a->attention.nhd)
        return options_wrong(
            state, "--causal, --softmax-scale and --layout are the model's: leave them out");
    if (o->rules != SPARGE_RULES_DEFAULT)
        return options_wrong(state, "--rules other than the default are not for a model");
    if (a->csv && a->attention.output && strcmp(a->csv, a->attention.output) == 0)
        return options_wrong(state, "-o and --csv are the same file");
    bool gated = !a->attention.gate;
    for (int n = 0; n < a->choices && !gated; n++)
        gated = choice_has_gate(a->choice[n]);
    if (!gated)
        return options_wrong(state, "--gate is for --attention seer, which is not asked for");
    return check_kept(state, a);
}

static error_t lm_parser(int key, char *text, struct argp_state *state)
{
    lm_args *a = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &a->attention; return 0;
    case ARGP_KEY_ARG: return lm_file(state, a, text);
    case ATTENTION: return add_choices(state, a, text);
    case LENGTH: return lm_list(state, "--length", text, 2, 1 << 24, a->length, &a->lengths);
    case MODEL: a->name = text; return 0;
    case CSV: a->csv = text; return 0;
    case GATE: a->attention.gate = text; return 0;
    case ARGP_KEY_END: return check_args(state, a);
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child lm_children[] = {{&attention_argp, 0, "", 1},
                                                {0}}; /* its groups stay apart */
const struct argp lm_argp = {.options = lm_options, .parser = lm_parser, .children = lm_children};

/* ---- Opening ---- */

/* Token numbers from a .npy of whole numbers, [N] or [1, N]. */
static exit_code read_numbers(lm_text *t, file_error *error)
{
    array from;
    exit_code code = inputs_npy(t->path, &from, error);
    if (code)
        return code;
    const int64_t count = array_count(&from);
    const bool wide = from.type == ARRAY_I64, whole = wide || from.type == ARRAY_I32;
    if (!whole || from.rank < 1 || from.shape[from.rank - 1] != count) {
        file_error_set(error, t->path,
                       "must hold int32 or int64 of one axis, the numbers of tokens");
        code = EXIT_FILE;
    }
    t->token = code ? NULL : malloc(((size_t)count + 1) * sizeof *t->token);
    if (!code && !t->token) {
        file_error_set(error, t->path, "no memory for its %" PRId64 " tokens", count);
        code = EXIT_MACHINE;
    }
    for (int64_t n = 0; n < count && !code; n++) {
        const int64_t x = wide ? ((const int64_t *)from.data)[n] : ((const int32_t *)from.data)[n];
        t->token[n] = x < 0 || x > INT32_MAX ? -1 : (int32_t)x;
    }
    t->tokens = code ? 0 : count;
    array_free(&from);
    return code;
}

static exit_code check_tokens(const lm *m, const char *name, const int32_t *token, int64_t tokens)
{
    for (int64_t n = 0; n < tokens; n++)
        if (token[n] < 0 || token[n] >= m->hyper->vocab) {
            file_error_set(m->error, name,
                           "token %" PRId64 " is no number from 0 to %" PRId64 ", which %s has", n,
                           m->hyper->vocab - 1, m->name);
            return EXIT_FILE;
        }
    return EXIT_FINE;
}

exit_code lm_encode(lm *m, const char *name, const char *bytes, size_t size, int32_t **token,
                    int64_t *tokens)
{
    exit_code code = m->tokenizer ? EXIT_FINE : tokenizer_open(&m->files, &m->tokenizer, m->error);
    if (!code)
        code = tokenizer_encode(m->tokenizer, name, bytes, size, token, tokens, m->error);
    return code ? code : check_tokens(m, name, *token, *tokens);
}

static exit_code read_text(lm *m, lm_text *t, const char *path)
{
    *t = (lm_text){.path = path, .name = basename(path)};
    size_t size;
    exit_code code = capture_sha256(path, t->sha256, m->error);
    if (code)
        return code;
    if (ends_with(path, ".npy")) {
        code = read_numbers(t, m->error);
    } else {
        char *bytes = input_text(path, &size, m->error);
        code = bytes ? lm_encode(m, path, bytes, size, &t->token, &t->tokens) : EXIT_FILE;
        if (!code && m->files.vocabulary.bos >= 0) { /* there is room for it */
            memmove(t->token + 1, t->token, (size_t)t->tokens++ * sizeof *t->token);
            t->token[0] = (int32_t)m->files.vocabulary.bos;
        }
        free(bytes);
    }
    return code ? code : check_tokens(m, path, t->token, t->tokens);
}

exit_code lm_weights(lm *m)
{
    return *m->weights ? EXIT_FINE
                       : capture_sha256_inputs(m->files.file, m->files.files, m->weights, m->error);
}

static exit_code open_choices(lm *m)
{
    static const char *const usual[] = {"f32", "sparse"};
    const lm_args *a = m->args;
    attention_args asked = a->attention;
    bool thresholds = false;
    asked.given |= option_bit(OPT_CAUSAL) | option_bit(OPT_SOFTMAX_SCALE) |
                   option_bit(OPT_RULES); /* by the model */
    for (int n = 0; n < a->choices; n++)
        thresholds |= ends_with(a->choice[n], ".json");
    exit_code code = thresholds ? lm_weights(m) : EXIT_FINE;
    for (int n = 0; n < (a->choices ? a->choices : 2) && !code; n++) {
        code = choice_open(a->choices ? a->choice[n] : usual[n], &asked, m->hyper, m->name,
                           m->weights, &m->choice[n], m->error);
        m->choices += !code;
    }
    return code;
}

exit_code lm_spare(const lm *m, const char *output)
{
    const lm_args *a = m->args;
    exit_code code = inputs_spare(output, a->attention.file, 1, m->error);
    if (!code)
        code = inputs_spare(output, &a->attention.gate, 1, m->error);
    for (int64_t n = 0; n < m->files.files && !code; n++)
        code = inputs_spare(output, &m->files.file[n].name, 1, m->error);
    if (!code)
        code = inputs_spare(output, a->text, a->texts, m->error);
    return code ? code : inputs_spare(output, a->choice, a->choices, m->error);
}

/* JSON has no other texts. */
static bool is_utf8(const char *name, file_error *error)
{
    json_t *text = json_string(name);
    json_decref(text);
    return text || file_error_set(error, name, "this name is no UTF-8; choose another");
}

static const file_input *weights_of(const lm *m) { return &m->files.file[m->files.files - 1]; }

/* All that a result names. */
static exit_code check_names(const lm *m)
{
    bool ok = is_utf8(m->name, m->error) && is_utf8(basename(weights_of(m)->name), m->error);
    for (int n = 0; n < m->args->texts && ok; n++)
        ok = is_utf8(basename(m->args->text[n]), m->error);
    for (int n = 0; n < m->args->choices && ok; n++)
        ok = is_utf8(basename(m->args->choice[n]), m->error);
    return ok ? EXIT_FINE : EXIT_FILE;
}

/* Can as many threads start as are asked for? A product that they cannot start for ends the
 * program. */
static exit_code check_threads(const lm_args *a, file_error *error)
{
    const sparge_problem none = {.heads = 1, .kv_heads = 1, .dim = 1};
    sparge_options on_cpu = sparge_options_default(SPARGE_RULES_DEFAULT);
    on_cpu.backend = SPARGE_CPU;
    on_cpu.isa = SPARGE_ISA_SCALAR;
    on_cpu.threads = a->attention.options.threads;
    sparge_error why;
    return library_result(sparge_options_resolve(&none, &on_cpu, &why), &why, error);
}

exit_code lm_open(lm *m, const struct argp *argp, int argc, char **argv, options_base *input,
                  lm_args *args)
{
    *m = (lm){.args = args, .error = input->error};
    args->base = *input; /* what is wrong is said in the error of the whole */
    exit_code code = attention_parse(argp, argc, argv, input, &args->attention);
    args->attention.options.causal = SPARGE_CAUSAL_END;
#ifdef _OPENMP
    if (!code && args->attention.options.threads > 0)
        omp_set_num_threads(args->attention.options.threads); /* of the products too */
#endif
    if (!code)
        code = check_threads(args, m->error);
    if (!code)
        code = checkpoint_open(args->attention.file[0], &m->files, m->error);
    if (!code)
        code = model_open(&m->files, &m->model, m->error);
    if (code)
        return code;
    m->hyper = model_hyper(m->model);
    m->name = args->name ? args->name : m->hyper->name;
    code = check_names(m);
    if (!code)
        code = lm_spare(m, args->attention.output);
    if (!code)
        code = lm_spare(m, args->csv);
    if (code)
        return code;
    m->measured.layer = calloc((size_t)m->hyper->layers, sizeof *m->measured.layer);
    m->text = calloc((size_t)args->texts + 1, sizeof *m->text);
    if (!m->measured.layer || !m->text) {
        file_error_set(m->error, NULL, "no memory for %d texts", args->texts);
        return EXIT_MACHINE;
    }
    for (; m->texts < args->texts && !code; m->texts++)
        code = read_text(m, &m->text[m->texts], args->text[m->texts]);
    return code ? code : open_choices(m);
}

void lm_close(lm *m)
{
    progress_end(&m->watch);
    for (int n = 0; n < m->texts; n++)
        free(m->text[n].token);
    for (int n = 0; n < m->choices; n++)
        choice_free(&m->choice[n]);
    free(m->text);
    free(m->measured.layer);
    rows_free(&m->rows);
    tokenizer_close(m->tokenizer);
    model_close(m->model);
    checkpoint_close(&m->files);
}

int lm_lengths(const lm *m) { return m->args->lengths ? m->args->lengths : 1; }

int64_t lm_length(const lm *m, const lm_text *t, int k)
{
    return m->args->lengths ? m->args->length[k] : t->tokens;
}

exit_code lm_check_length(const lm *m, const lm_text *t, int64_t tokens)
{
    if (t->tokens < tokens)
        file_error_set(m->error, t->path, "has %" PRId64 " tokens, and %" PRId64 " are asked for",
                       t->tokens, tokens);
    else if (tokens > m->hyper->context)
        file_error_set(m->error, t->path,
                       "%" PRId64 " tokens are more than the %" PRId64
                       " that %s was made for; give a smaller --length",
                       tokens, m->hyper->context, m->name);
    else if (tokens < 2)
        file_error_set(m->error, t->path, "has %" PRId64 " tokens; there is nothing to predict",
                       tokens);
    else
        return EXIT_FINE;
    return EXIT_FILE;
}

/* ---- Running ---- */

/* Thresholds and block sizes of `sparse` and of masks. */
static json_t *describe_options(const sparge_options *o)
{
    return json_joined(json_joined(options_json(o), thresholds_json(&o->thresholds)),
                       json_pack("{s:s}", "backend", sparge_backend_string(o->backend)));
}

exit_code lm_begin(lm *m, const char *command, json_t *extra)
{
    exit_code code = lm_weights(m);
    json_t *const settings =
        json_pack("{s:s, s:s, s:{s:s, s:s, s:I, s:s}, s:s, s:o}", "command", command, "version",
                  SPARGE_VERSION, "model", "name", m->name, "file", basename(weights_of(m)->name),
                  "bytes", (json_int_t)weights_of(m)->size, "sha256", m->weights, "matmul",
                  matmul_by(), "options", describe_options(&m->args->attention.options));
    if (extra && settings)
        json_object_update(settings, extra);
    json_decref(extra);
    if (code)
        json_decref(settings);
    else
        code = rows_open(&m->rows, m->args->attention.output, settings, m->error);
    m->watch = progress_begin(command);
    return code;
}

json_t *lm_job(const choice *c, const lm_text *t, int64_t tokens)
{
    return json_pack("{s:s, s:s?, s:s, s:s, s:I}", "attention", c->name, "attention_sha256",
                     c->path ? c->sha256 : NULL, "text", t->name, "text_sha256", t->sha256,
                     "tokens", (json_int_t)tokens);
}

/* In some unit: products with weights grow with the tokens, attention with their square. */
static double work_of(int64_t tokens) { return (double)tokens * (1.0 + (double)tokens / 16384.0); }

void lm_expect(lm *m, int64_t tokens, double runs) { m->work += runs * work_of(tokens); }

bool lm_has(lm *m, json_t *job)
{
    const bool found = rows_find(&m->rows, job) != NULL;
    if (!found)
        return false;
    m->work -= work_of(json_integer_value(json_object_get(job, "tokens")));
    json_decref(job);
    return true;
}

float *lm_hidden(const lm *m, int64_t tokens)
{
    float *hidden = malloc((size_t)(tokens * m->hyper->dim) * sizeof *hidden);
    if (!hidden)
        file_error_set(m->error, NULL, "no memory for the activations of %" PRId64 " tokens",
                       tokens);
    return hidden;
}

/* What the model's callback is given. */
typedef struct run {
    lm *m;
    const choice *c;
} run;

static exit_code attend(void *user, int64_t layer, const sparge_problem *problem,
                        const sparge_out *o, file_error *error)
{
    lm *m = ((run *)user)->m;
    const double done =
        m->done + work_of(problem->q_len) * (double)layer / (double)m->hyper->layers;
    if (!progress_tick(&m->watch, done / m->work)) {
        file_error_set(error, m->rows.path,
                       m->rows.path ? "interrupted: it has %zu rows; the same command goes on"
                       : m->visit   ? "interrupted: the folder has what its manifest.json lists"
                                    : "interrupted; with -o FILE rows are kept",
                       json_array_size(rows_list(&m->rows)));
        return EXIT_UNFINISHED;
    }
    exit_code code = checkpoint_check(&m->files);
    if (!code && m->visit)
        code = m->visit(m->user, layer, problem, error);
    return code ? code : choice_attend(((run *)user)->c, layer, problem, o, &m->measured, error);
}

exit_code lm_run(lm *m, const choice *c, const int32_t *token, int64_t tokens, float *hidden)
{
    run r = {m, c};
    const attender how = {attend, &r};
    const double start = progress_clock();
    m->measured.seconds = m->measured.prepare = 0.0;
    choice_begin(c);
    const exit_code code = model_run(m->model, token, tokens, &how, hidden, m->error);
    m->seconds = progress_clock() - start;
    m->done += work_of(tokens);
    return code;
}

/* Of every layer. */
static json_t *list_layers(const lm *m, double (*share)(const sparge_counts *))
{
    json_t *list = json_array();
    for (int64_t n = 0; n < m->hyper->layers; n++)
        json_array_append_new(list, json_rounded(share(&m->measured.layer[n]), 6));
    return list;
}

void lm_describe(const lm *m, json_t *row)
{
    const sparge_counts all = measured_counts(&m->measured, m->hyper->layers);
    json_object_set_new(row, "sparsity", json_rounded(sparge_sparsity(&all), 6));
    json_object_set_new(row, "sparsity_qk", json_rounded(sparge_sparsity_qk(&all), 6));
    json_object_set_new(row, "density_tokens", json_rounded(sparge_density_tokens(&all), 6));
    json_object_set_new(row, "seconds", json_rounded(m->seconds, 4));
    json_object_set_new(row, "seconds_attention", json_rounded(m->measured.seconds, 4));
    json_object_set_new(row, "seconds_prepare", json_rounded(m->measured.prepare, 4));
    json_object_set_new(row, "isa", json_string(sparge_isa_string(m->measured.isa)));
    json_object_set_new(row, "threads", json_integer(m->measured.threads));
    json_object_set_new(row, "layers_sparsity", list_layers(m, sparge_sparsity));
    json_object_set_new(row, "layers_sparsity_qk", list_layers(m, sparge_sparsity_qk));
}

exit_code lm_finish(lm *m, json_t *summary)
{
    progress_end(&m->watch);
    const exit_code code = m->args->csv ? rows_csv(&m->rows, m->args->csv, m->error) : EXIT_FINE;
    if (code) {
        json_decref(summary);
        return code;
    }
    json_object_set_new(m->rows.all, "summary", summary);
    const size_t unknown = rows_unknown(rows_list(&m->rows));
    if (unknown)
        fprintf(stderr,
                "sparge-lm: %s: %zu of %zu results are null, and so are summaries over them: the "
                "model is not finite there\n",
                m->name, unknown, json_array_size(rows_list(&m->rows)));
    return print_json(json_incref(m->rows.all), m->error);
}
