/* SPDX-License-Identifier: Apache-2.0 */
/* safetensors.c: a length, a JSON object that names tensors and their bytes, and those bytes.
 * https://huggingface.co/docs/safetensors */
#include "tools/safetensors.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LENGTH_BYTES = 8, MAX_HEADER = 100000000 }; /* the format's own limit */

typedef struct tensor {
    const char *name;
    json_t *entry;
    int64_t begin, end; /* bytes, from the end of the header */
} tensor;

struct safetensors {
    const file_input *in;
    json_t *root;    /* owns names and entries */
    tensor *tensors; /* [count], in the order of their bytes */
    size_t count;
    size_t start; /* of the tensors' bytes, in the file */
};

bool safetensors_named(const char *path)
{
    const char *end = strrchr(path, '.');
    return end && strcmp(end, ".safetensors") == 0;
}

/* ---- The header ------------------------------------------------------------------------- */

static bool read_json(safetensors *t)
{
    const file_input *in = t->in;
    uint8_t fixed[LENGTH_BYTES];
    if (!input_read(in, 0, LENGTH_BYTES, fixed))
        return false;
    uint64_t length = 0;
    for (int i = LENGTH_BYTES - 1; i >= 0; i--)
        length = length << 8 | fixed[i];
    if (length > MAX_HEADER || length > in->size - LENGTH_BYTES)
        return input_fail(
            in,
            "byte 0: a header of %" PRIu64
            " bytes is longer than %s; check that it is a .safetensors file, and copy it again",
            length, length > MAX_HEADER ? "the format allows" : "the file");
    t->start = LENGTH_BYTES + (size_t)length;
    char *text = malloc(length > 0 ? (size_t)length : 1);
    if (!text)
        return input_fail(in, "no memory for the header; free some");
    const bool ok = input_read(in, LENGTH_BYTES, (size_t)length, text);
    json_error_t wrong = {.text = "a JSON object must begin here"};
    if (ok && length > 0 && text[0] == '{')
        t->root = json_loadb(text, (size_t)length, JSON_REJECT_DUPLICATES, &wrong);
    free(text);
    if (!ok || t->root)
        return ok;
    return input_fail(in, "byte %d: header: %s; write the file again",
                      LENGTH_BYTES + wrong.position, wrong.text);
}

static bool parse_offsets(const safetensors *t, tensor *to)
{
    const json_t *offsets = json_object_get(to->entry, "data_offsets");
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    const size_t have = t->in->size - t->start;
    to->begin = json_integer_value(begin);
    to->end = json_integer_value(end);
    if (json_array_size(offsets) == 2 && json_is_integer(begin) && json_is_integer(end) &&
        to->begin >= 0 && to->begin <= to->end && (uint64_t)to->end <= have)
        return true;
    return input_fail(t->in,
                      "key '%.100s': data_offsets must be two integers, 0 <= begin <= end <= %zu, "
                      "the bytes of data in the file (truncated?); copy or write it again",
                      to->name, have);
}

static int tensor_compare(const void *one, const void *other)
{
    const tensor *a = one, *b = other;
    if (a->begin != b->begin)
        return a->begin < b->begin ? -1 : 1;
    return (a->end > b->end) - (a->end < b->end);
}

/* The tensors must cover the data without overlap or hole, as the format demands. */
static bool check_cover(const safetensors *t)
{
    int64_t covered = 0;
    for (size_t i = 0; i < t->count; covered = t->tensors[i++].end)
        if (t->tensors[i].begin != covered)
            return input_fail(t->in,
                              "key '%.100s': data_offsets begin at %" PRId64 ", %s %" PRId64
                              ", the end of what comes before; write the file again",
                              t->tensors[i].name, t->tensors[i].begin,
                              t->tensors[i].begin < covered ? "overlapping" : "leaving a hole from",
                              covered);
    const size_t end = t->start + (size_t)covered;
    if (end == t->in->size)
        return true;
    return input_fail(
        t->in, "byte %zu: too long: %zu bytes follow the last tensor; copy or write the file again",
        end, t->in->size - end);
}

static bool read_table(safetensors *t)
{
    if (!read_json(t))
        return false;
    t->tensors = calloc(json_object_size(t->root) + 1, sizeof *t->tensors);
    if (!t->tensors)
        return input_fail(t->in, "no memory for the header; free some");
    const char *name;
    json_t *entry;
    json_object_foreach(t->root, name, entry)
    {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        tensor *to = &t->tensors[t->count++];
        *to = (tensor){.name = name, .entry = entry};
        if (!parse_offsets(t, to))
            return false;
    }
    qsort(t->tensors, t->count, sizeof *t->tensors, tensor_compare);
    return check_cover(t);
}

/* ---- One tensor ------------------------------------------------------------------------- */

static bool fail_missing(const safetensors *t, const char *name)
{
    char list[256] = "nothing, it holds no tensor";
    size_t used = 0;
    for (size_t i = 0; i < t->count && used < sizeof list; i++)
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", i > 0 ? ", " : "",
                                 t->tensors[i].name);
    if (used >= sizeof list)
        memcpy(list + sizeof list - 4, "...", 4);
    return input_fail(t->in, "key '%.100s': no such tensor; choose from %s", name, list);
}

static const struct {
    const char *name;
    array_type type;
} dtypes[] = {{"F16", ARRAY_F16}, {"BF16", ARRAY_BF16}, {"F32", ARRAY_F32},
              {"U8", ARRAY_U8},   {"BOOL", ARRAY_BOOL}, {"I64", ARRAY_I64}};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

static bool parse_type(const tensor *from, array_type *type)
{
    const char *dtype = json_string_value(json_object_get(from->entry, "dtype"));
    for (size_t i = 0; i < DTYPES && dtype; i++)
        if (strcmp(dtype, dtypes[i].name) == 0) {
            *type = dtypes[i].type;
            return true;
        }
    return false;
}

static bool parse_shape(const tensor *from, int *rank, int64_t shape[ARRAY_MAX_RANK])
{
    const json_t *sizes = json_object_get(from->entry, "shape");
    if (!json_is_array(sizes) || json_array_size(sizes) > ARRAY_MAX_RANK)
        return false;
    *rank = (int)json_array_size(sizes);
    for (int d = 0; d < *rank; d++) {
        const json_t *size = json_array_get(sizes, (size_t)d);
        if (!json_is_integer(size) || json_integer_value(size) < 0)
            return false;
        shape[d] = json_integer_value(size);
    }
    return true;
}

bool safetensors_find(const safetensors *t, const char *name, safetensors_place *out)
{
    const file_input *in = t->in;
    size_t i = 0;
    while (i < t->count && strcmp(t->tensors[i].name, name) != 0)
        i++;
    if (i == t->count)
        return fail_missing(t, name);
    const tensor *from = &t->tensors[i];

    *out = (safetensors_place){.at = t->start + (size_t)from->begin,
                               .bytes = (size_t)(from->end - from->begin)};
    if (!parse_type(from, &out->type))
        return input_fail(in,
                          "key '%.100s': dtype is none of F16, BF16, F32, U8, BOOL and I64; "
                          "convert it with .float(), or whole numbers with .long()",
                          name);
    if (!parse_shape(from, &out->rank, out->shape))
        return input_fail(
            in,
            "key '%.100s': shape must be a list of at most %d integers of 0 or more; reshape it",
            name, ARRAY_MAX_RANK);
    char text[ARRAY_SHAPE_TEXT];
    array_shape_string(out->rank, out->shape, text);
    size_t need;
    if (!array_bytes(out->type, out->rank, out->shape, &need) || need != out->bytes)
        return input_fail(in,
                          "key '%.100s': shape %s of %s does not fit the %zu bytes of its "
                          "data_offsets; write the file again",
                          name, text, array_type_string(out->type), out->bytes);
    return true;
}

bool safetensors_tensor(const safetensors *t, const char *name, array *out)
{
    safetensors_place from;
    if (!safetensors_find(t, name, &from))
        return false;
    if (!array_alloc(from.type, from.rank, from.shape, out, NULL))
        return input_fail(t->in, "key '%.100s': no memory for %zu bytes; use a smaller tensor",
                          name, from.bytes);
    return input_read(t->in, from.at, from.bytes, out->data);
}

/* ---- The file --------------------------------------------------------------------------- */

safetensors *safetensors_open(const file_input *in)
{
    safetensors *t = calloc(1, sizeof *t);
    if (!t) {
        input_fail(in, "no memory for the header; free some");
        return NULL;
    }
    t->in = in;
    if (read_table(t))
        return t;
    safetensors_close(t);
    return NULL;
}

void safetensors_close(safetensors *t)
{
    if (!t)
        return;
    free(t->tensors);
    json_decref(t->root);
    free(t);
}

size_t safetensors_count(const safetensors *t) { return t->count; }
const char *safetensors_name(const safetensors *t, size_t n) { return t->tensors[n].name; }

static bool read_input(const file_input *in, const char *const *names, int count, array *out)
{
    for (int i = 0; i < count; i++)
        out[i] = (array){0};
    safetensors *t = safetensors_open(in);
    bool ok = t != NULL;
    for (int i = 0; i < count && ok; i++)
        ok = safetensors_tensor(t, names[i], &out[i]);
    for (int i = 0; i < count && !ok; i++)
        array_free(&out[i]);
    safetensors_close(t);
    return ok;
}

bool safetensors_read(const char *path, const char *const *names, int count, array *out,
                      file_error *error)
{
    file_input in;
    for (int i = 0; i < count; i++)
        out[i] = (array){0};
    if (!input_open(path, &in, error))
        return false;
    const bool ok = read_input(&in, names, count, out);
    input_close(&in);
    return ok;
}

bool safetensors_read_memory(const uint8_t *bytes, size_t size, const char *name,
                             const char *const *names, int count, array *out, file_error *error)
{
    const file_input in = input_memory(bytes, size, name, error);
    return read_input(&in, names, count, out);
}

/* ---- Writing ---- */

static json_t *describe(const array *from, int64_t begin, int64_t end)
{
    const char *name = NULL;
    for (size_t i = 0; i < DTYPES; i++)
        if (dtypes[i].type == from->type)
            name = dtypes[i].name;
    json_t *shape = json_array();
    bool ok = shape != NULL;
    for (int d = 0; d < from->rank && ok; d++)
        ok = json_array_append_new(shape, json_integer(from->shape[d])) == 0;
    if (!ok) {
        json_decref(shape);
        return NULL;
    }
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", name, "shape", shape, "data_offsets",
                     (json_int_t)begin, (json_int_t)end);
}

bool safetensors_write(FILE *stream, const char *name, const char *const *names, int count,
                       const array *from, file_error *error)
{
    json_t *root = json_object();
    int64_t end = 0;
    bool ok = true;
    for (int i = 0; i < count; i++) {
        const int64_t begin = end;
        end += array_count(&from[i]) * (int64_t)array_type_size(from[i].type);
        ok &= json_object_set_new(root, names[i], describe(&from[i], begin, end)) == 0;
    }
    char *text = ok ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    if (!text)
        return file_error_set(error, name,
                              "no memory for its header, or of a dtype that is not written");
    const size_t length = strlen(text),
                 padded = (length + 7) / 8 * 8; /* data begin at a multiple of 8 */
    uint8_t fixed[LENGTH_BYTES];
    for (int i = 0; i < LENGTH_BYTES; i++)
        fixed[i] = (uint8_t)(padded >> (8 * i));
    errno = 0;
    fwrite(fixed, 1, LENGTH_BYTES, stream);
    fprintf(stream, "%-*s", (int)padded, text);
    free(text);
    for (int i = 0; i < count; i++)
        fwrite(from[i].data, array_type_size(from[i].type), (size_t)array_count(&from[i]), stream);
    return !ferror(stream) ||
           file_error_set(error, name, "cannot write: %s; free some space or choose another folder",
                          strerror(errno ? errno : EIO));
}
