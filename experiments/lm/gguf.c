/* SPDX-License-Identifier: Apache-2.0 */
/* gguf.c: GGUF files, versions 2 and 3: keys and values, a table of tensors, their data. Nothing in
 * the file is believed before it is looked at.
 * https://github.com/ggml-org/ggml/blob/master/docs/gguf.md */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/lm/checkpoint.h"

enum { KEYS_MAX = 1 << 16, TENSORS_MAX = 1 << 16, NESTED_MAX = 16, SIDE_MAX = 1 << 24 };

/* Types of values, by their numbers in the file. */
enum { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64, TYPES };
static const size_t size_of[TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8}; /* or at least */

/* ---- Bytes, one after the other: after the first that is missing all are 0 ---- */

typedef struct cursor {
    const uint8_t *bytes;
    size_t size, at;
    bool ended, strange; /* strange: by a type that is not known, and not by the end of the file */
} cursor;

static const uint8_t *take(cursor *c, uint64_t n)
{
    c->ended |= n > c->size - c->at;
    if (c->ended)
        return NULL;
    c->at += (size_t)n;
    return c->bytes + c->at - n;
}

static uint64_t number(cursor *c, size_t bytes)
{
    const uint8_t *p = take(c, bytes);
    uint64_t x = 0;
    for (size_t n = 0; p && n < bytes; n++)
        x |= (uint64_t)p[n] << (8 * n);
    return x;
}

static span string(cursor *c)
{
    const uint64_t length = number(c, 8);
    const uint8_t *p = take(c, length);
    return (span){p ? (const char *)p : "", p ? (size_t)length : 0};
}

/* The type of its elements, and how many: no more than there is room for. */
static uint32_t list_head(cursor *c, uint64_t *count)
{
    const uint32_t of = (uint32_t)number(c, 4);
    *count = number(c, 8);
    c->ended |= of<TYPES && * count>(c->size - c->at) / size_of[of];
    return of;
}

static void skip(cursor *c, uint32_t type, int depth)
{
    if (!c->ended)
        c->strange = c->ended = type >= TYPES || depth > NESTED_MAX;
    if (c->ended) {
        return;
    } else if (type == STRING) {
        string(c);
    } else if (type == ARRAY) {
        uint64_t count;
        const uint32_t of = list_head(c, &count);
        if (of < TYPES && of != STRING && of != ARRAY)
            take(c, count * size_of[of]);
        else
            for (uint64_t n = 0; n < count && !c->ended; n++)
                skip(c, of, depth + 1);
    } else {
        take(c, size_of[type]);
    }
}

/* ---- Keys: each of these leaves a line and returns false, or goes on ---- */

typedef struct reader {
    const file_input *file;
    cursor keys; /* at the first of them */
    uint64_t count;
    const char *architecture;
} reader;

static bool equals(span p, const char *text)
{
    return p.length == strlen(text) && memcmp(p.text, text, p.length) == 0;
}

/* A cursor at the value of a key, and its type; TYPES where there is no such key. */
static uint32_t find(const reader *r, const char *key, cursor *at)
{
    *at = r->keys;
    for (uint64_t n = 0; n < r->count; n++) {
        const span name = string(at);
        const uint32_t type = (uint32_t)number(at, 4);
        if (equals(name, key))
            return type;
        skip(at, type, 0);
    }
    return TYPES;
}

static bool has(const reader *r, const char *key)
{
    cursor at;
    return find(r, key, &at) != TYPES;
}

/* Any number or truth value. */
static double read_number(cursor *at, uint32_t type)
{
    const uint64_t x = number(at, size_of[type]);
    const uint32_t low = (uint32_t)x;
    float f32;
    double f64;
    memcpy(&f32, &low, sizeof f32);
    memcpy(&f64, &x, sizeof f64);
    switch (type) {
    case I8: return (int8_t)x;
    case I16: return (int16_t)x;
    case I32: return (int32_t)x;
    case I64: return (double)(int64_t)x;
    case F32: return (double)f32;
    case F64: return f64;
    default: return (double)x;
    }
}

static bool read_whole(const reader *r, const char *key, int64_t *to)
{
    cursor at;
    const uint32_t type = find(r, key, &at);
    if (type == TYPES)
        return input_fail(r->file, "has no key '%s'", key);
    if (type != U8 && type != U16 && type != U32 && type != U64 && type != I32)
        return input_fail(r->file, "key '%s' is no whole number", key);
    const uint64_t x = number(&at, size_of[type]);
    *to = type == I32 ? (int32_t)x : x > INT64_MAX ? INT64_MAX : (int64_t)x;
    return true;
}

static bool read_float(const reader *r, const char *key, float *to)
{
    cursor at;
    if (find(r, key, &at) != F32)
        return input_fail(r->file, "has no key '%s', a float32", key);
    const uint32_t bits = (uint32_t)number(&at, 4);
    memcpy(to, &bits, sizeof *to);
    return true;
}

/* Empty where there is none. */
static span read_string(const reader *r, const char *key)
{
    cursor at;
    return find(r, key, &at) == STRING ? string(&at) : (span){"", 0};
}

static void copy_string(char *to, size_t size, span from)
{
    checkpoint_text(to, size, from.text, from.length);
}

/* "llama.block_count" and the like. */
static const char *own(const reader *r, const char *key, char text[96])
{
    snprintf(text, 96, "%s.%s", r->architecture, key);
    return text;
}

static bool read_hyper(const reader *r, hyper *h)
{
    char key[96];
    if (!read_whole(r, own(r, "block_count", key), &h->layers) ||
        !read_whole(r, own(r, "embedding_length", key), &h->dim) ||
        !read_whole(r, own(r, "feed_forward_length", key), &h->hidden) ||
        !read_whole(r, own(r, "attention.head_count", key), &h->heads) ||
        !read_whole(r, own(r, "context_length", key), &h->context) ||
        !read_float(r, own(r, "attention.layer_norm_rms_epsilon", key), &h->rms_eps))
        return false;
    h->kv_heads = h->heads;
    if (has(r, own(r, "attention.head_count_kv", key)) && !read_whole(r, key, &h->kv_heads))
        return false;
    h->head_dim = h->heads > 0 ? h->dim / h->heads : 0;
    if (has(r, own(r, "attention.key_length", key)) && !read_whole(r, key, &h->head_dim))
        return false;
    h->rope_theta = 10000.0f;
    if (has(r, own(r, "rope.freq_base", key)) && !read_float(r, key, &h->rope_theta))
        return false;
    for (int n = 0; n < SPARGE_MAX_DIM / 2; n++)
        h->rope_divisor[n] = 1.0f;
    return true;
}

/* Channels that do not turn, or of v alone, are not known here. */
static exit_code check_channels(const reader *r, const hyper *h)
{
    static const char *const keys[] = {"rope.dimension_count", "attention.value_length"};
    char key[96];
    for (int n = 0; n < 2; n++) {
        int64_t channels = h->head_dim;
        if (has(r, own(r, keys[n], key)) && !read_whole(r, key, &channels))
            return EXIT_FILE;
        if (channels != h->head_dim) {
            input_fail(r->file,
                       n ? "has values of %" PRId64 " channels and keys of %" PRId64
                           ", which is not known here"
                         : "turns %" PRId64 " of the %" PRId64
                           " channels of a head, which is not known here",
                       channels, h->head_dim);
            return EXIT_UNSUPPORTED;
        }
    }
    return EXIT_FINE;
}

/* ---- Tokens ---- */

static exit_code read_list(const reader *r, const char *key, span **list, int64_t *size)
{
    cursor at;
    uint64_t count;
    if (find(r, key, &at) != ARRAY || list_head(&at, &count) != STRING)
        return EXIT_FINE;
    span *to = *list = calloc((size_t)count + 1, sizeof *to);
    if (!to) {
        input_fail(r->file, "no memory for '%s'", key);
        return EXIT_MACHINE;
    }
    *size = (int64_t)count;
    for (uint64_t n = 0; n < count; n++)
        to[n] = string(&at);
    return EXIT_FINE;
}

/* Which tokens are kept whole. */
static exit_code read_kept(const reader *r, vocabulary *v)
{
    enum { USER_DEFINED = 4 };
    cursor at;
    uint64_t count;
    if (find(r, "tokenizer.ggml.token_type", &at) != ARRAY)
        return EXIT_FINE;
    const uint32_t of = list_head(&at, &count);
    if (of == STRING || of == ARRAY || (int64_t)count != v->tokens) {
        input_fail(r->file,
                   "'tokenizer.ggml.token_type' is no list of a number for each of %" PRId64
                   " tokens",
                   v->tokens);
        return EXIT_FILE;
    }
    v->kept = calloc((size_t)count + 1, sizeof *v->kept);
    if (!v->kept) {
        input_fail(r->file, "no memory for its %" PRId64 " tokens", v->tokens);
        return EXIT_MACHINE;
    }
    for (uint64_t n = 0; n < count; n++)
        v->kept[n] = read_number(&at, of) == USER_DEFINED;
    return EXIT_FINE;
}

static exit_code read_vocabulary(const reader *r, vocabulary *v)
{
    cursor at;
    v->bos = -1;
    copy_string(v->kind, sizeof v->kind, read_string(r, "tokenizer.ggml.model"));
    copy_string(v->splitter, sizeof v->splitter, read_string(r, "tokenizer.ggml.pre"));
    const bool said = find(r, "tokenizer.ggml.add_bos_token", &at) == BOOL;
    /* Files of Llama 3 do not say it, and mean it. */
    const bool add = said ? number(&at, 1) != 0 : strcmp(v->splitter, "llama-bpe") == 0;
    if (add && (said || has(r, "tokenizer.ggml.bos_token_id")) &&
        !read_whole(r, "tokenizer.ggml.bos_token_id", &v->bos))
        return EXIT_FILE;
    if (v->bos > INT32_MAX) {
        input_fail(r->file, "'tokenizer.ggml.bos_token_id' is %" PRId64 ", which no token is",
                   v->bos);
        return EXIT_FILE;
    }
    exit_code code = read_list(r, "tokenizer.ggml.tokens", &v->token, &v->tokens);
    if (!code)
        code = read_list(r, "tokenizer.ggml.merges", &v->merge, &v->merges);
    return code ? code : read_kept(r, v);
}

/* ---- Tensors ---- */

/* Those of ggml by their numbers; what has no name here was withdrawn, or came later. */
static const struct {
    const char *name;
    bool known;
    tensor_type type;
} types[] = {
    {"F32", true, TENSOR_F32},
    {"F16", true, TENSOR_F16},
    {"Q4_0", true, TENSOR_Q4_0},
    {"Q4_1", true, TENSOR_Q4_1},
    [6] = {.name = "Q5_0"},
    {.name = "Q5_1"},
    {"Q8_0", true, TENSOR_Q8_0},
    {.name = "Q8_1"},
    {.name = "Q2_K"},
    {.name = "Q3_K"},
    {.name = "Q4_K"},
    {.name = "Q5_K"},
    {"Q6_K", true, TENSOR_Q6_K},
    {.name = "Q8_K"},
    {.name = "IQ2_XXS"},
    {.name = "IQ2_XS"},
    {.name = "IQ3_XXS"},
    {.name = "IQ1_S"},
    {.name = "IQ4_NL"},
    {.name = "IQ3_S"},
    {.name = "IQ2_S"},
    {.name = "IQ4_XS"},
    {.name = "I8"},
    {.name = "I16"},
    {.name = "I32"},
    {.name = "I64"},
    {.name = "F64"},
    {.name = "IQ1_M"},
    {"BF16", true, TENSOR_BF16},
    [34] = {.name = "TQ1_0"},
    {.name = "TQ2_0"},
    [39] = {.name = "MXFP4"},
    {.name = "NVFP4"},
    {.name = "Q1_0"},
};

static exit_code read_type(const reader *r, uint64_t number, tensor *t)
{
    const bool listed = number < sizeof types / sizeof *types;
    if (listed && types[number].known) {
        t->type = types[number].type;
        return EXIT_FINE;
    }
    input_fail(r->file,
               "tensor '%.80s' is of ggml's type %" PRIu64
               ", %s; F32, F16, BF16, Q8_0, Q4_0, Q4_1 and Q6_K are known: convert it",
               t->name, number,
               listed && types[number].name ? types[number].name : "which has no name here");
    return EXIT_UNSUPPORTED;
}

/* One entry of the table; the data of all begin at `base`. */
static exit_code read_tensor(const reader *r, cursor *at, size_t base, checkpoint *out, tensor *t)
{
    const span name = string(at);
    t->name = checkpoint_name(out, name.text, name.length);
    if (!t->name) {
        input_fail(r->file, "no memory for the names of its tensors");
        return EXIT_MACHINE;
    }
    uint64_t side[4] = {1, 1, 1, 1};
    const uint64_t rank = number(at, 4);
    for (uint64_t k = 0; k < rank; k++)
        side[k] = number(at, 8);
    const uint64_t type = number(at, 4), offset = number(at, 8);
    const exit_code code = read_type(r, type, t);
    if (code)
        return code;
    if (rank > 2 || side[0] < 1 || side[1] < 1 || side[0] > SIDE_MAX || side[1] > SIDE_MAX) {
        input_fail(r->file, "tensor '%.80s' is no vector and no matrix", t->name);
        return EXIT_FILE;
    }
    t->columns = (int64_t)side[0];
    t->rows = (int64_t)side[1];
    const size_t bytes = tensor_bytes(t->type, t->rows, t->columns), size = r->file->size;
    if (bytes == 0 || base > size || offset > size - base || bytes > size - base - offset) {
        input_fail(r->file,
                   bytes ? "tensor '%.80s' lies beyond the end of the file; is it cut short?"
                         : "tensor '%.80s' has rows that are no whole blocks",
                   t->name);
        return EXIT_FILE;
    }
    t->data = r->file->bytes + base + offset;
    return EXIT_FINE;
}

static exit_code read_tensors(const reader *r, cursor table, uint64_t count, uint64_t alignment,
                              checkpoint *out)
{
    cursor at = table;
    for (uint64_t n = 0; n < count && !at.ended; n++) {
        string(&at);
        const uint64_t rank = number(&at, 4);
        at.ended |= rank > 4;
        take(&at, at.ended ? 0 : 8 * rank + 4 + 8);
    }
    if (at.ended) {
        input_fail(r->file, "ends within its table of tensors; is it cut short?");
        return EXIT_FILE;
    }
    const size_t base = (at.at + alignment - 1) / alignment * alignment;
    out->tensor = calloc((size_t)count + 1, sizeof *out->tensor);
    if (!out->tensor) {
        input_fail(r->file, "no memory for its table of tensors");
        return EXIT_MACHINE;
    }
    exit_code code = EXIT_FINE;
    for (; out->tensors < (int64_t)count && !code; out->tensors++)
        code = read_tensor(r, &table, base, out, &out->tensor[out->tensors]);
    return code;
}

/* What Llama 3.1 and later divide the frequencies of the rotation by. */
static bool read_divisors(const reader *r, const checkpoint *c, hyper *h)
{
    for (int64_t n = 0; n < c->tensors; n++) {
        const tensor *t = &c->tensor[n];
        if (strcmp(t->name, "rope_freqs.weight") != 0)
            continue;
        if (t->rows != 1 || t->columns != h->head_dim / 2 || t->columns > SPARGE_MAX_DIM / 2)
            return input_fail(r->file, "'%s' does not have %" PRId64 " elements", t->name,
                              h->head_dim / 2);
        tensor_read(t, 0, 1, h->rope_divisor);
    }
    return true;
}

/* ---- The file ---- */

/* Is this key of the architecture one that the forward pass obeys, or one that changes nothing? */
static bool is_obeyed(span key, cursor at, uint32_t type)
{
    static const char *const known[] = {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
        "tensor_data_layout",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length", /* tell */
    };
    static const struct {
        const char *key;
        double value;
    } idle[] = {
        {"rope.scale_linear", 1.0}, {"rope.scaling.factor", 1.0}, {"rope.scaling.attn_factor", 1.0},
        {"attention.causal", 1.0},  {"expert_count", 0.0},        {"expert_used_count", 0.0},
    };
    for (size_t n = 0; n < sizeof known / sizeof *known; n++)
        if (equals(key, known[n]))
            return true;
    for (size_t n = 0; n < sizeof idle / sizeof *idle; n++)
        if (equals(key, idle[n].key) && type != STRING && type != ARRAY)
            return read_number(&at, type) == idle[n].value;
    return equals(key, "rope.scaling.type") && type == STRING && equals(string(&at), "none");
}

/* Sees that there is no other key of the architecture: positions or scores might be scaled by it.
 */
static bool check_own_keys(const reader *r)
{
    const size_t prefix = strlen(r->architecture);
    cursor at = r->keys;
    for (uint64_t n = 0; n < r->count; n++) {
        const span name = string(&at);
        const uint32_t type = (uint32_t)number(&at, 4);
        const cursor value = at;
        skip(&at, type, 0);
        if (name.length <= prefix || memcmp(name.text, r->architecture, prefix) != 0 ||
            name.text[prefix] != '.' ||
            is_obeyed((span){name.text + prefix + 1, name.length - prefix - 1}, value, type))
            continue;
        char text[64] = "", shown[96];
        cursor what = value;
        if (type == STRING)
            copy_string(text, sizeof text, string(&what));
        else if (type != ARRAY)
            snprintf(text, sizeof text, "%.9g", read_number(&what, type));
        copy_string(shown, sizeof shown, name);
        return input_fail(r->file, "has the key '%s'%s%s, which is not computed here", shown,
                          *text ? " = " : "", text);
    }
    return true;
}

/* What would be computed wrongly if it were not refused. */
static exit_code check_kind(const reader *r, hyper *h)
{
    copy_string(h->architecture, sizeof h->architecture, read_string(r, "general.architecture"));
    copy_string(h->name, sizeof h->name, read_string(r, "general.name"));
    h->interleaved = strcmp(h->architecture, "llama") == 0;
    h->biases = strcmp(h->architecture, "qwen2") == 0;
    const span type = read_string(r, "general.type");
    cursor at;
    const uint32_t split = find(r, "split.count", &at);
    if (split != TYPES && !(split != STRING && split != ARRAY && read_number(&at, split) <= 1.0))
        input_fail(r->file, "is one of several files of a model ('split.count'); join them with "
                            "llama-gguf-split --merge");
    else if (type.length && !equals(type, "model"))
        input_fail(r->file, "is of the type '%.*s' ('general.type'), and no model",
                   (int)(type.length < 40 ? type.length : 40), type.text);
    else if (!h->interleaved && !h->biases)
        input_fail(r->file, "is of the architecture '%s'; llama and qwen2 are known",
                   h->architecture);
    else if (check_own_keys(r))
        return EXIT_FINE;
    return EXIT_UNSUPPORTED;
}

/* The magic, the version, and how many tensors and keys there are. */
static exit_code read_head(const file_input *file, cursor *at, uint64_t *tensors, uint64_t *keys)
{
    const uint8_t *magic = take(at, 4);
    const uint32_t version = (uint32_t)number(at, 4), turned = __builtin_bswap32(version);
    *tensors = number(at, 8);
    *keys = number(at, 8);
    if (!magic || memcmp(magic, "GGUF", 4) != 0) {
        input_fail(file, "is no GGUF file");
    } else if (turned >= 1 && turned <= 3) {
        input_fail(file, "is a big-endian GGUF file; little-endian ones are known: convert it with "
                         "gguf-py's gguf_convert_endian.py");
        return EXIT_UNSUPPORTED;
    } else if (version != 2 && version != 3) {
        input_fail(file, "is of GGUF version %" PRIu32 "; 2 and 3 are known", version);
    } else if (*tensors > TENSORS_MAX || *keys > KEYS_MAX) {
        input_fail(file, "has %" PRIu64 " tensors and %" PRIu64 " keys, too many to be true",
                   *tensors, *keys);
    } else {
        return EXIT_FINE;
    }
    return EXIT_FILE;
}

/* Sees that all keys are there; leaves the cursor behind them. */
static bool pass_keys(const reader *r, cursor *at, int64_t *alignment)
{
    span name = {"", 0};
    for (uint64_t n = 0; n < r->count && !at->ended; n++) {
        name = string(at);
        skip(at, (uint32_t)number(at, 4), 0);
    }
    if (at->strange)
        return input_fail(r->file, "key '%.*s' is of a type that is not known here",
                          (int)(name.length < 80 ? name.length : 80), name.text);
    if (at->ended)
        return input_fail(r->file, "ends within its keys; is it cut short?");
    *alignment = 32;
    if (has(r, "general.alignment") && !read_whole(r, "general.alignment", alignment))
        return false;
    return (*alignment >= 1 && *alignment <= 1 << 16) ||
           input_fail(r->file, "'general.alignment' is %" PRId64 ", it must be 1 to 65536",
                      *alignment);
}

exit_code gguf_read(const file_input *file, checkpoint *out)
{
    cursor at = {.bytes = file->bytes, .size = file->size};
    reader r = {.file = file, .architecture = out->hyper.architecture};
    uint64_t tensors = 0;
    int64_t alignment;
    exit_code code = read_head(file, &at, &tensors, &r.count);
    r.keys = at;
    if (!code && !pass_keys(&r, &at, &alignment))
        code = EXIT_FILE;
    if (!code)
        code = check_kind(&r, &out->hyper);
    if (!code && !read_hyper(&r, &out->hyper))
        code = EXIT_FILE;
    if (!code)
        code = check_channels(&r, &out->hyper);
    if (!code)
        code = read_vocabulary(&r, &out->vocabulary);
    if (!code)
        code = read_tensors(&r, at, tensors, (uint64_t)alignment, out);
    if (!code && !read_divisors(&r, out, &out->hyper))
        code = EXIT_FILE;
    return code;
}
