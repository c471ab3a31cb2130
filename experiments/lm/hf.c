/* SPDX-License-Identifier: Apache-2.0 */
/* hf.c: a model as Hugging Face has it: a folder with config.json, and model.safetensors, or
 * several of them that model.safetensors.index.json lists. */
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "experiments/lm/checkpoint.h"
#include "tools/safetensors.h"

/* ---- JSON: each of these leaves a line and returns false, or goes on ---- */

typedef struct reader {
    const char *name; /* of config.json */
    const json_t *object;
    bool qwen2;
    file_error *error;
} reader;

static bool is_null(const json_t *x) { return !x || json_is_null(x); }

static bool read_whole(const reader *r, const char *key, int64_t *to)
{
    const json_t *x = json_object_get(r->object, key);
    *to = json_integer_value(x);
    return json_is_integer(x) ||
           file_error_set(r->error, r->name, "has no '%s', a whole number", key);
}

static bool read_float(const reader *r, const json_t *from, const char *key, float *to)
{
    const json_t *x = json_object_get(from, key);
    *to = (float)json_number_value(x);
    return json_is_number(x) || file_error_set(r->error, r->name, "has no '%s', a number", key);
}

/* The object in a file of the folder, which is loaded like the weights; NULL after failure. */
static exit_code read_object(checkpoint *c, const char *path, json_t **object, file_error *error)
{
    json_error_t why;
    const char *name = checkpoint_name(c, path, strlen(path));
    exit_code code = EXIT_MACHINE;
    *object = NULL;
    if (name)
        code = checkpoint_load(c, name, error);
    else
        file_error_set(error, path, "no memory to open it");
    if (code)
        return code;
    const file_input *in = &c->file[c->files - 1];
    json_t *found = json_loadb((const char *)in->bytes, in->size, JSON_REJECT_DUPLICATES, &why);
    if (json_is_object(found)) {
        *object = found;
        return EXIT_FINE;
    }
    file_error_set(error, path, "line %d: %s", found ? 1 : why.line,
                   found ? "a JSON object must begin here" : why.text);
    json_decref(found);
    return EXIT_FILE;
}

/* ---- config.json ---- */

/* Llama 3.1: channel pairs that turn slowly are slowed down by `factor`, those that turn fast are
 * left alone, and between them it is in proportion. */
static bool read_llama3(const reader *r, const json_t *scaling, hyper *h)
{
    float factor, low, high, original;
    if (!read_float(r, scaling, "factor", &factor) ||
        !read_float(r, scaling, "low_freq_factor", &low) ||
        !read_float(r, scaling, "high_freq_factor", &high) ||
        !read_float(r, scaling, "original_max_position_embeddings", &original))
        return false;
    if (!(factor >= 1.0f && low > 0.0f && high > low && original >= 1.0f))
        return file_error_set(r->error, r->name, "its rope scaling makes no sense");
    const double pi = 3.14159265358979323846;
    for (int64_t n = 0; n < h->head_dim / 2 && n < SPARGE_MAX_DIM / 2; n++) {
        const double turns =
            (double)original /
            (2.0 * pi * pow((double)h->rope_theta, 2.0 * (double)n / (double)h->head_dim));
        const double fast = fmin(1.0, fmax(0.0, (turns - (double)low) / (double)(high - low)));
        h->rope_divisor[n] = (float)(1.0 / (fast + (1.0 - fast) / (double)factor));
    }
    return true;
}

/* transformers 5 puts theta and scaling into rope_parameters; before, theta stood alone, and beside
 * rope_scaling. */
static exit_code read_rope(const reader *r, hyper *h)
{
    const json_t *parameters = json_object_get(r->object, "rope_parameters");
    const json_t *older = json_object_get(r->object, "rope_scaling");
    const json_t *scaling = is_null(parameters) ? older : parameters;
    const json_t *holder =
        is_null(json_object_get(parameters, "rope_theta")) ? r->object : parameters;
    const char *kind = json_string_value(json_object_get(scaling, "rope_type"));
    if (!kind)
        kind = json_string_value(json_object_get(scaling, "type"));
    for (int n = 0; n < SPARGE_MAX_DIM / 2; n++)
        h->rope_divisor[n] = 1.0f;
    h->rope_theta = 10000.0f;
    if (!is_null(json_object_get(holder, "rope_theta")) &&
        !read_float(r, holder, "rope_theta", &h->rope_theta))
        return EXIT_FILE;
    if (!is_null(parameters) && !is_null(older) && !json_equal(parameters, older)) {
        file_error_set(r->error, r->name,
                       "has both 'rope_parameters' and 'rope_scaling', and they differ");
        return EXIT_UNSUPPORTED;
    }
    if (is_null(scaling) || (kind && strcmp(kind, "default") == 0))
        return EXIT_FINE;
    if (kind && strcmp(kind, "llama3") == 0)
        return read_llama3(r, scaling, h) ? EXIT_FINE : EXIT_FILE;
    file_error_set(r->error, r->name, "has rope scaling of the kind '%.40s'; llama3 is known",
                   kind ? kind : "?");
    return EXIT_UNSUPPORTED;
}

/* Does this value leave everything as it is? */
static bool is_idle(const json_t *value)
{
    return json_is_null(value) || json_is_false(value) ||
           (json_is_number(value) && json_number_value(value) == 1.0);
}

/* What scales or bends positions, scores or weights is known by parts of its name, since everybody
 * has other names for it. */
static bool is_obeyed(const reader *r, const char *key, const json_t *value)
{
    static const char *const parts[] = {"rope",       "rotary",  "alibi",  "position", "scal",
                                        "multiplier", "softcap", "window", "norm",     "expert",
                                        "clip",       "bias",    "quant",  "lora"};
    static const char *const known[] = {"rms_norm_eps",
                                        "rope_theta",
                                        "rope_scaling",
                                        "rope_parameters",
                                        "max_position_embeddings",
                                        "original_max_position_embeddings",
                                        "rope_type",
                                        "max_window_layers"};
    const json_t *sliding = json_object_get(r->object, "use_sliding_window");
    bool telling = false;
    for (size_t n = 0; n < sizeof parts / sizeof *parts; n++)
        telling |= strstr(key, parts[n]) != NULL;
    for (size_t n = 0; n < sizeof known / sizeof *known; n++)
        telling &= strcmp(key, known[n]) != 0;
    if (strcmp(key, "sliding_window") == 0) /* how wide it would be */
        return is_null(value) || json_is_false(sliding) || (r->qwen2 && is_null(sliding));
    return !telling || is_idle(value);
}

static exit_code check_keys(const reader *r, const json_t *object)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value)
    {
        const char *method = json_string_value(json_object_get(value, "quant_method"));
        if (is_obeyed(r, key, value))
            continue;
        file_error_set(r->error, r->name, "has '%.60s'%s%.40s, which is not computed here", key,
                       method ? ": " : "", method ? method : "");
        return EXIT_UNSUPPORTED;
    }
    return EXIT_FINE;
}

/* What would be computed wrongly if it were not refused. */
static exit_code check_kind(reader *r, hyper *h)
{
    const char *type = json_string_value(json_object_get(r->object, "model_type"));
    const char *act = json_string_value(json_object_get(r->object, "hidden_act"));
    snprintf(h->architecture, sizeof h->architecture, "%s", type ? type : "");
    h->biases = r->qwen2 = strcmp(h->architecture, "qwen2") == 0;
    if (!h->biases && strcmp(h->architecture, "llama") != 0) {
        file_error_set(r->error, r->name, "is of the model type '%.40s'; llama and qwen2 are known",
                       type ? type : "?");
        return EXIT_UNSUPPORTED;
    }
    if (act && strcmp(act, "silu") != 0) {
        file_error_set(r->error, r->name, "has the activation '%.40s'; silu is known", act);
        return EXIT_UNSUPPORTED;
    }
    const json_t *layers = json_object_get(r->object, "layer_types");
    for (size_t n = 0; n < json_array_size(layers); n++) {
        const char *layer = json_string_value(json_array_get(layers, n));
        if (!layer || strcmp(layer, "full_attention") != 0) {
            file_error_set(r->error, r->name,
                           "has '%.40s' among its layer_types; full_attention is known",
                           layer ? layer : "?");
            return EXIT_UNSUPPORTED;
        }
    }
    exit_code code = check_keys(r, r->object);
    if (!code)
        code = check_keys(r, json_object_get(r->object, "rope_parameters"));
    return code ? code : check_keys(r, json_object_get(r->object, "rope_scaling"));
}

static exit_code read_config(reader *r, hyper *h)
{
    const exit_code code = check_kind(r, h);
    if (code)
        return code;
    if (!read_whole(r, "num_hidden_layers", &h->layers) || !read_whole(r, "hidden_size", &h->dim) ||
        !read_whole(r, "intermediate_size", &h->hidden) ||
        !read_whole(r, "num_attention_heads", &h->heads) ||
        !read_whole(r, "max_position_embeddings", &h->context) ||
        !read_float(r, r->object, "rms_norm_eps", &h->rms_eps))
        return EXIT_FILE;
    h->tied = json_is_true(json_object_get(r->object, "tie_word_embeddings"));
    h->untied = !h->tied;
    h->kv_heads = h->heads;
    h->head_dim = h->heads > 0 ? h->dim / h->heads : 0;
    if (!is_null(json_object_get(r->object, "num_key_value_heads")) &&
        !read_whole(r, "num_key_value_heads", &h->kv_heads))
        return EXIT_FILE;
    if (!is_null(json_object_get(r->object, "head_dim")) &&
        !read_whole(r, "head_dim", &h->head_dim))
        return EXIT_FILE;
    return read_rope(r, h);
}

/* ---- Tensors ---- */

static const struct {
    const char *theirs, *ours;
} names[] = {
    {"input_layernorm.weight", "attn_norm.weight"},
    {"self_attn.q_proj.weight", "attn_q.weight"},
    {"self_attn.k_proj.weight", "attn_k.weight"},
    {"self_attn.v_proj.weight", "attn_v.weight"},
    {"self_attn.q_proj.bias", "attn_q.bias"},
    {"self_attn.k_proj.bias", "attn_k.bias"},
    {"self_attn.v_proj.bias", "attn_v.bias"},
    {"self_attn.o_proj.weight", "attn_output.weight"},
    {"post_attention_layernorm.weight", "ffn_norm.weight"},
    {"mlp.gate_proj.weight", "ffn_gate.weight"},
    {"mlp.up_proj.weight", "ffn_up.weight"},
    {"mlp.down_proj.weight", "ffn_down.weight"},
    {"model.embed_tokens.weight", "token_embd.weight"},
    {"model.norm.weight", "output_norm.weight"},
    {"lm_head.weight", "output.weight"},
};

/* As GGUF names it; false for what a forward pass here does not read. */
static bool translate(const char *theirs, char ours[96])
{
    int64_t layer;
    int used = 0;
    const bool inside =
        sscanf(theirs, "model.layers.%4" SCNd64 ".%n", &layer, &used) == 1 && used > 0;
    for (size_t n = 0; n < sizeof names / sizeof *names; n++) {
        if (strcmp(names[n].theirs, theirs + used) != 0)
            continue;
        if (inside)
            snprintf(ours, 96, "blk.%" PRId64 ".%s", layer, names[n].ours);
        else
            snprintf(ours, 96, "%s", names[n].ours);
        return true;
    }
    return false;
}

static tensor_type type_of(array_type type)
{
    return type == ARRAY_F16 ? TENSOR_F16 : type == ARRAY_BF16 ? TENSOR_BF16 : TENSOR_F32;
}

static exit_code add_tensor(checkpoint *c, const safetensors *s, const char *theirs,
                            const file_input *in)
{
    char ours[96];
    safetensors_place place;
    if (strstr(
            theirs,
            ".rotary_emb.inv_freq")) /* which old files have; transformers has it from theta, too */
        return EXIT_FINE;
    if (!translate(theirs, ours)) {
        input_fail(in, "has the tensor '%.80s', which no forward pass of a %s reads here", theirs,
                   c->hyper.architecture);
        return EXIT_UNSUPPORTED;
    }
    if (!safetensors_find(s, theirs, &place))
        return EXIT_FILE;
    tensor *more = realloc(c->tensor, (size_t)(c->tensors + 1) * sizeof *more);
    const char *name = more ? checkpoint_name(c, ours, strlen(ours)) : NULL;
    c->tensor = more ? more : c->tensor;
    if (!name) {
        input_fail(in, "no memory for its table of tensors");
        return EXIT_MACHINE;
    }
    if (place.type > ARRAY_F32) {
        input_fail(in, "tensor '%.80s' is of %s, not of floats", theirs,
                   array_type_string(place.type));
        return EXIT_FILE;
    }
    if (place.rank < 1 || place.rank > 2 || place.bytes == 0) {
        input_fail(in, "tensor '%.80s' is no vector and no matrix", theirs);
        return EXIT_FILE;
    }
    c->tensor[c->tensors++] = (tensor){
        .name = name,
        .type = type_of(place.type),
        .rows = place.rank == 2 ? place.shape[0] : 1,
        .columns = place.shape[place.rank - 1],
        .data = in->bytes + place.at,
    };
    return EXIT_FINE;
}

static exit_code add_file(checkpoint *c, const char *folder, const char *file, file_error *error)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    const char *name = checkpoint_name(c, path, strlen(path));
    if (!name) {
        file_error_set(error, path, "no memory to open it");
        return EXIT_MACHINE;
    }
    exit_code code = checkpoint_load(c, name, error);
    if (code)
        return code;
    const file_input in = c->file[c->files - 1];
    safetensors *s = safetensors_open(&in);
    code = s ? EXIT_FINE : EXIT_FILE;
    for (size_t n = 0; !code && n < safetensors_count(s); n++)
        code = add_tensor(c, s, safetensors_name(s, n), &in);
    safetensors_close(s);
    return code;
}

/* Every file that the index names, once. */
static exit_code add_listed(checkpoint *c, const char *folder, const char *path, file_error *error)
{
    json_t *index, *seen = json_object();
    exit_code code = read_object(c, path, &index, error);
    const char *key;
    json_t *value;
    json_t *map = json_object_get(index, "weight_map");
    if (!code && !json_is_object(map)) {
        file_error_set(error, path, "has no object 'weight_map'");
        code = EXIT_FILE;
    }
    json_object_foreach(map, key, value)
    {
        const char *file = json_string_value(value);
        if (code || (file && json_object_get(seen, file)))
            continue;
        if (!file || strchr(file, '/')) {
            file_error_set(error, path, "'%.80s' is in no file of the folder", key);
            code = EXIT_FILE;
            continue;
        }
        json_object_set_new(seen, file, json_true());
        code = add_file(c, folder, file, error);
    }
    json_decref(index);
    json_decref(seen);
    return code;
}

exit_code hf_read(const char *folder, checkpoint *out, file_error *error)
{
    char path[PATH_MAX];
    struct stat found;
    const size_t length = strlen(folder);
    if (length > PATH_MAX - NAME_MAX - 2) {
        file_error_set(error, folder, "the name is too long");
        return EXIT_FILE;
    }
    snprintf(path, sizeof path, "%s/adapter_config.json", folder);
    if (stat(path, &found) == 0) {
        file_error_set(
            error, path,
            "is of an adapter, which is not added to the weights here; merge it into them");
        return EXIT_UNSUPPORTED;
    }
    snprintf(path, sizeof path, "%s/config.json", folder);
    json_t *config;
    exit_code code = read_object(out, path, &config, error);
    reader r = {.name = path, .object = config, .error = error};
    if (!code)
        code = read_config(&r, &out->hyper);
    json_decref(config);
    out->vocabulary.bos = -1;
    if (code)
        return code;
    size_t end = length; /* a slash at the end names nothing */
    while (end > 1 && folder[end - 1] == '/')
        end--;
    size_t begin = end;
    while (begin > 0 && folder[begin - 1] != '/')
        begin--;
    checkpoint_text(out->hyper.name, sizeof out->hyper.name, folder + begin, end - begin);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    if (stat(path, &found) == 0)
        return add_listed(out, folder, path, error);
    return add_file(out, folder, "model.safetensors", error);
}
