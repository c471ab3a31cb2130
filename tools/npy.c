/* SPDX-License-Identifier: Apache-2.0 */
/* npy.c: NumPy's .npy files: a magic number, a version, a header that is a Python dictionary, data.
 * https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html */
#include "tools/npy.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "tools/output.h"

enum { MAX_HEADER = 1 << 20, DATA_AT = 128 }; /* bytes; where we write data: aligned to 64 */

static const char magic[6] = {'\x93', 'N', 'U', 'M', 'P', 'Y'};

/* What follows the byte order in descr; "" where there is no such thing. */
static const char descriptions[][3] = {
    [ARRAY_F16] = "f2", [ARRAY_F32] = "f4",  [ARRAY_F64] = "f8",
    [ARRAY_U8] = "u1",  [ARRAY_BOOL] = "b1", [ARRAY_I8] = "i1",
    [ARRAY_I16] = "i2", [ARRAY_I32] = "i4",  [ARRAY_I64] = "i8",
};

/* ---- The header ------------------------------------------------------------------------- */

typedef struct header {
    const file_input *in;
    size_t start, length; /* of the dictionary, in the file */
    array_type type;
    bool fortran_order;
    int rank;
    int64_t shape[ARRAY_MAX_RANK];
} header;

static bool header_fail(const header *h, int at, const char *wrong)
{
    return input_fail(h->in, "byte %zu: header: %s; save it again with numpy.save",
                      h->start + (size_t)(at > 0 ? at : 0), wrong);
}

/* A Python dictionary becomes a JSON object of as many characters, so that places stay. */
static void to_json(char *text, size_t length)
{
    static const char python[] = "'()TFL\f", json[] = "\"[]tf  ";
    bool quoted = false;
    char *comma = NULL; /* JSON has none before a bracket that closes */
    for (char *c = text; c < text + length; c++) {
        const char *at = *c && (!quoted || *c == '\'') ? strchr(python, *c) : NULL;
        *c = at ? json[at - python] : *c;
        quoted ^= *c == '"';
        if (comma && (*c == ']' || *c == '}'))
            *comma = ' ';
        if (!strchr(" \t\r\n", *c))
            comma = *c == ',' && !quoted ? c : NULL;
    }
}

static bool parse_type(header *h, const json_t *from)
{
    const char *descr = json_string_value(from);
    if (!descr)
        return input_fail(h->in,
                          "byte %zu: descr is a structured dtype; save one field of it: "
                          "numpy.save(f, a['field'])",
                          h->start);
    const char *plain = *descr && strchr("<|=", *descr) ? descr + 1 : descr; /* the byte order */
    for (size_t type = 0; type < sizeof descriptions / sizeof *descriptions; type++)
        if (*plain && strcmp(plain, descriptions[type]) == 0) {
            h->type = (array_type)type;
            return true;
        }
    return input_fail(h->in, "byte %zu: descr '%.30s' %s; convert with a.astype('<f4')", h->start,
                      descr,
                      descr[0] == '>'       ? "is big-endian"
                      : strchr(descr, 'O')  ? "holds Python objects"
                      : strcmp(plain, "V2") ? "is none of f2 f4 f8 u1 b1 i1 i2 i4 i8"
                                            : "may be bf16, which .safetensors can hold");
}

static bool parse_shape(header *h, const json_t *from)
{
    const size_t rank = json_array_size(from);
    if (!json_is_array(from) || rank > ARRAY_MAX_RANK)
        return header_fail(h, 0, "shape must be a tuple of at most 8 integers");
    for (h->rank = 0; h->rank < (int)rank; h->rank++) {
        const json_t *size = json_array_get(from, (size_t)h->rank);
        if (!json_is_integer(size) || json_integer_value(size) < 0)
            return header_fail(h, 0, "shape must be a tuple of integers of 0 or more");
        h->shape[h->rank] = json_integer_value(size);
    }
    return true;
}

static bool parse_header(header *h, char *text)
{
    json_error_t why;
    json_t *descr, *shape;
    int fortran = 0;
    to_json(text, h->length);
    json_t *root = json_loadb(text, h->length, JSON_REJECT_DUPLICATES, &why);
    bool ok = root && json_unpack_ex(root, &why, JSON_STRICT, "{s:o, s:b, s:o}", "descr", &descr,
                                     "fortran_order", &fortran, "shape", &shape) == 0;
    if (!ok)
        header_fail(h, root ? 0 : why.position, why.text);
    h->fortran_order = fortran;
    ok = ok && parse_type(h, descr) && parse_shape(h, shape);
    json_decref(root);
    return ok;
}

/* Reads everything before the data. */
static bool read_header(header *h)
{
    const file_input *in = h->in;
    uint8_t fixed[12];
    if (!input_read(in, 0, 10, fixed))
        return false;
    if (memcmp(fixed, magic, sizeof magic) != 0)
        return input_fail(in, "byte 0: not a .npy file; %s",
                          memcmp(fixed, "PK", 2) == 0
                              ? "if it is .npz, save each array alone with numpy.save"
                              : "save the array with numpy.save");
    const int version = fixed[6];
    if (version < 1 || version > 3 || fixed[7] != 0)
        return input_fail(
            in,
            "byte 6: format version %d.%d is not 1.0, 2.0 or 3.0; save it again with numpy.save",
            version, fixed[7]);
    h->start = version == 1 ? 10 : 12;
    if (!input_read(in, 0, h->start, fixed))
        return false;
    h->length = fixed[8] | (size_t)fixed[9] << 8;
    if (version > 1)
        h->length |= (size_t)fixed[10] << 16 | (size_t)fixed[11] << 24;
    if (h->length > in->size - h->start || h->length > MAX_HEADER)
        return input_fail(in,
                          "byte 8: a header of %zu bytes is longer than %s; copy or save it again",
                          h->length, h->length > MAX_HEADER ? "any of numpy's" : "the file");
    char *text = malloc(h->length + 1);
    if (!text)
        return input_fail(in, "no memory for the header; free some");
    const bool ok = input_read(in, h->start, h->length, text) && parse_header(h, text);
    free(text);
    return ok;
}

/* ---- The data --------------------------------------------------------------------------- */

/* Rewrites elements that lie with the first index fastest in row-major order. */
static void transpose(const array *to, const uint8_t *from)
{
    const size_t size = array_type_size(to->type);
    int64_t stride[ARRAY_MAX_RANK], index[ARRAY_MAX_RANK] = {0};
    for (int d = 0; d < to->rank; d++)
        stride[d] = d == 0 ? 1 : stride[d - 1] * to->shape[d - 1];
    const int64_t count = array_count(to);
    int64_t at = 0;
    for (int64_t i = 0; i < count; i++) {
        memcpy((uint8_t *)to->data + (size_t)i * size, from + (size_t)at * size, size);
        for (int d = to->rank - 1; d >= 0; d--) {
            at += stride[d];
            if (++index[d] < to->shape[d])
                break;
            at -= stride[d] * to->shape[d];
            index[d] = 0;
        }
    }
}

static bool read_data(const header *h, array *out)
{
    const file_input *in = h->in;
    const char *type = array_type_string(h->type);
    const size_t start = h->start + h->length, have = in->size - start;
    char shape[ARRAY_SHAPE_TEXT];
    array_shape_string(h->rank, h->shape, shape);
    size_t need;
    if (!array_bytes(h->type, h->rank, h->shape, &need))
        return input_fail(in, "byte %zu: header: shape %s of %s overflows; save a smaller array",
                          h->start, shape, type);
    if (need > have) /* what comes after it may be another array: as numpy, we read the first */
        return input_fail(in,
                          "byte %zu: truncated: shape %s of %s is %zu bytes from byte %zu on, not "
                          "%zu; copy it, or save the array, again",
                          in->size, shape, type, need, start, have);
    if (!array_alloc(h->type, h->rank, h->shape, out, NULL))
        return input_fail(in, "no memory for %zu bytes; use a smaller array", need);
    if (!h->fortran_order || h->rank < 2)
        return input_read(in, start, need, out->data);
    uint8_t *scratch = malloc(need > 0 ? need : 1);
    if (!scratch)
        return input_fail(in, "no memory for %zu bytes more; save in C order", need);
    const bool ok = input_read(in, start, need, scratch);
    if (ok)
        transpose(out, scratch);
    free(scratch);
    return ok;
}

static bool read_input(const file_input *in, array *out)
{
    header h = {.in = in};
    *out = (array){0};
    const bool ok = read_header(&h) && read_data(&h, out);
    if (!ok)
        array_free(out);
    return ok;
}

bool npy_read(const char *path, array *out, file_error *error)
{
    file_input in;
    *out = (array){0};
    if (!input_open(path, &in, error))
        return false;
    const bool ok = read_input(&in, out);
    input_close(&in);
    return ok;
}

bool npy_read_memory(const uint8_t *bytes, size_t size, const char *name, array *out,
                     file_error *error)
{
    const file_input in = input_memory(bytes, size, name, error);
    return read_input(&in, out);
}

/* ---- Writing ---------------------------------------------------------------------------- */

bool npy_write(FILE *stream, const char *name, const array *from, file_error *error)
{
    file_error_clear(error);
    if (from->type == ARRAY_BF16)
        return file_error_set(error, name, "a .npy file cannot hold bf16; convert to f32 first");
    const size_t size = array_type_size(from->type), count = (size_t)array_count(from);
    char shape[ARRAY_SHAPE_TEXT], file[DATA_AT + ARRAY_SHAPE_TEXT] = "\x93NUMPY\x01\x00\x76";
    array_shape_string(from->rank, from->shape, shape);
    int used = 10; /* the sizes have 26 digits at most, as their product is below 2^63 */
    used += snprintf(file + used, sizeof file - (size_t)used,
                     "{'descr': '%c%s', 'fortran_order': False, 'shape': %s, }",
                     size == 1 ? '|' : '<', descriptions[from->type], shape);
    memset(file + used, ' ', DATA_AT - 1 - (size_t)used);
    file[DATA_AT - 1] = '\n';
    if (fwrite(file, DATA_AT, 1, stream) == 1 && fwrite(from->data, size, count, stream) == count)
        return true;
    return file_error_set(error, name, "cannot write: %s; free some space or choose another folder",
                          strerror(errno));
}

bool npy_save(const char *path, const array *from, file_error *error)
{
    output_file *file = output_open(path, error);
    return file && npy_write(output_stream(file), path, from, error) && outputs_commit(error);
}
