/* npy.c: NumPy's .npy files: a magic number, a version, a header that is a Python dictionary, data.
 * https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html */
#include "tools/npy.h"

#include <errno.h>
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

/* ---- The dictionary --------------------------------------------------------------------- */

typedef struct header {
    const file_input *in;
    char *text;           /* ends in a NUL that is not counted */
    size_t start, length; /* of the text, in the file */
    size_t at;            /* where we are in the text */
    array_type type;
    bool fortran_order;
    int rank;
    int64_t shape[ARRAY_MAX_RANK];
} header;

static bool header_fail(const header *h, const char *wrong)
{
    return input_fail(h->in, "byte %zu: header: %s; save it again with numpy.save",
                      h->start + h->at, wrong);
}

static char header_peek(header *h)
{
    h->at += strspn(h->text + h->at, " \t\r\n\f");
    return h->text[h->at];
}

static bool header_accept(header *h, char c)
{
    const bool found = header_peek(h) == c;
    h->at += found;
    return found;
}

/* Leaves h->at at the opening quote, for the messages to come; header_skip goes on. */
static bool header_string(header *h, char to[32])
{
    const char quote = header_peek(h);
    if (quote != '\'' && quote != '"')
        return header_fail(h, "a quoted string is expected here");
    const char *from = h->text + h->at + 1;
    const char stop[] = {quote, '\\', '\0'};
    const size_t length = strcspn(from, stop);
    if (from[length] != quote || length >= 32)
        return header_fail(h, "this string does not end, or is none that numpy writes");
    memcpy(to, from, length);
    to[length] = '\0';
    return true;
}

static void header_skip(header *h, const char *string) { h->at += strlen(string) + 2; }

static bool header_descr(header *h)
{
    const char first = header_peek(h);
    if (first == '[' || first == '(' || first == '{')
        return input_fail(h->in,
                          "byte %zu: descr is a structured dtype; save one field of it: "
                          "numpy.save(f, a['field'])",
                          h->start + h->at);
    char descr[32];
    if (!header_string(h, descr))
        return false;
    const char *plain =
        descr[0] && strchr("<|=", descr[0]) ? descr + 1 : descr; /* without a byte order */
    for (size_t type = 0; type < sizeof descriptions / sizeof descriptions[0]; type++)
        if (*plain && strcmp(plain, descriptions[type]) == 0) {
            h->type = (array_type)type;
            header_skip(h, descr);
            return true;
        }
    return input_fail(h->in, "byte %zu: descr '%s' %s; convert with a.astype('<f4')",
                      h->start + h->at, descr,
                      descr[0] == '>'           ? "is big-endian"
                      : strchr(descr, 'O')      ? "holds Python objects"
                      : strcmp(descr + 1, "V2") ? "is none of f2 f4 f8 u1 b1 i1 i2 i4 i8"
                                                : "may be bf16, which .safetensors can hold");
}

static bool header_fortran_order(header *h)
{
    header_peek(h);
    h->fortran_order = strncmp(h->text + h->at, "True", 4) == 0;
    if (!h->fortran_order && strncmp(h->text + h->at, "False", 5) != 0)
        return header_fail(h, "fortran_order must be True or False");
    h->at += h->fortran_order ? 4 : 5;
    return true;
}

static bool header_shape(header *h)
{
    static const char wanted[] = "shape must be a tuple of integers like (2, 3) or (3,)";
    if (!header_accept(h, '('))
        return header_fail(h, wanted);
    bool comma = true;
    while (!header_accept(h, ')')) {
        const char first = header_peek(h);
        if (first == '-')
            return header_fail(h, "shape has a negative size");
        if (!comma || first < '0' || first > '9')
            return header_fail(h, wanted);
        if (h->rank == ARRAY_MAX_RANK)
            return header_fail(h, "shape has more than 8 sizes");
        int64_t size = 0;
        for (; h->text[h->at] >= '0' && h->text[h->at] <= '9'; h->at++) {
            const int digit = h->text[h->at] - '0';
            if (size > (INT64_MAX - digit) / 10)
                return header_fail(h, "shape overflows: this size exceeds 64 bits");
            size = size * 10 + digit;
        }
        header_accept(h, 'L'); /* Python 2 wrote its long integers so */
        h->shape[h->rank++] = size;
        comma = header_accept(h, ',');
    }
    /* Python takes (3) for an integer and (3,) for a tuple. */
    return h->rank != 1 || comma ? true : header_fail(h, wanted);
}

static bool header_parse(header *h)
{
    static const struct {
        const char *key;
        bool (*parse)(header *);
    } fields[] = {
        {"descr", header_descr}, {"fortran_order", header_fortran_order}, {"shape", header_shape}};
    enum { FIELDS = sizeof fields / sizeof fields[0] };

    bool seen[FIELDS] = {false}, comma = true;
    if (!header_accept(h, '{'))
        return header_fail(h, "a dictionary must begin here");
    while (!header_accept(h, '}')) {
        char key[32];
        if (!comma)
            return header_fail(h, "a comma or the closing brace is expected here");
        if (!header_string(h, key))
            return false;
        int f = 0;
        while (f < FIELDS && strcmp(key, fields[f].key) != 0)
            f++;
        if (f == FIELDS || seen[f])
            return header_fail(h, f < FIELDS ? "this key appears twice"
                                             : "the keys must be descr, fortran_order and shape");
        seen[f] = true;
        header_skip(h, key);
        if (!header_accept(h, ':'))
            return header_fail(h, "a colon is expected here");
        if (!fields[f].parse(h))
            return false;
        comma = header_accept(h, ',');
    }
    if (!seen[0] || !seen[1] || !seen[2])
        return header_fail(h, !seen[0]   ? "the key 'descr' is missing"
                              : !seen[1] ? "the key 'fortran_order' is missing"
                                         : "the key 'shape' is missing");
    header_peek(h);
    return h->at == h->length || header_fail(h, "there is text after the dictionary");
}

/* ---- Reading ---------------------------------------------------------------------------- */

/* Reads everything before the data. The text must be freed after failure as well. */
static bool header_read(header *h)
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
    h->text = calloc(h->length + 1, 1);
    if (!h->text)
        return input_fail(in, "no memory for the header; free some");
    return input_read(in, h->start, h->length, h->text) && header_parse(h);
}

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
        return input_fail(
            in,
            "byte %zu: truncated: shape %s of %s is %zu bytes from byte %zu on, not %zu; "
            "copy it, or save the array, again",
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
    const bool ok = header_read(&h) && read_data(&h, out);
    free(h.text);
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
