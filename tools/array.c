/* SPDX-License-Identifier: Apache-2.0 */
/* array.c: packed arrays, their conversion to f32, error lines, and reading bytes from a file. */
#include "tools/array.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/half.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "both file formats are little-endian");

/* ---- Errors ----------------------------------------------------------------------------- */

static void set_text(file_error *error, const char *name, const char *format, va_list arguments)
{
    enum { SHOWN = 160 };
    if (!error)
        return;
    error->memory = errno == ENOMEM;
    int used = 0;
    if (name) {
        const size_t length = strlen(name);
        used = snprintf(error->text, sizeof error->text, "%s%s: ", length > SHOWN ? "..." : "",
                        length > SHOWN ? name + length - SHOWN : name);
    }
    vsnprintf(error->text + used, sizeof error->text - (size_t)used, format, arguments);
    for (char *c = error->text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127)
            *c = '?';
}

bool file_error_set(file_error *error, const char *name, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    set_text(error, name, format, arguments);
    va_end(arguments);
    return false;
}

bool input_fail(const file_input *from, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    set_text(from->error, from->name, format, arguments);
    va_end(arguments);
    return false;
}

void file_error_clear(file_error *error)
{
    if (error)
        *error = (file_error){.memory = false};
}

/* ---- Arrays ----------------------------------------------------------------------------- */

size_t array_type_size(array_type type)
{
    static const size_t sizes[] = {2, 2, 4, 8, 1, 1, 1, 2, 4, 8};
    return sizes[type];
}

const char *array_type_string(array_type type)
{
    static const char names[][5] = {"f16",  "bf16", "f32", "f64", "u8",
                                    "bool", "i8",   "i16", "i32", "i64"};
    return names[type];
}

int64_t array_count(const array *from)
{
    int64_t count = 1;
    for (int d = 0; d < from->rank; d++)
        count *= from->shape[d];
    return count;
}

void array_shape_string(int rank, const int64_t *shape, char text[ARRAY_SHAPE_TEXT])
{
    int used = snprintf(text, ARRAY_SHAPE_TEXT, "(");
    for (int d = 0; d < rank; d++)
        used += snprintf(text + used, (size_t)(ARRAY_SHAPE_TEXT - used), "%s%" PRId64,
                         d > 0 ? ", " : "", shape[d]);
    snprintf(text + used, (size_t)(ARRAY_SHAPE_TEXT - used), rank == 1 ? ",)" : ")");
}

enum { LARGEST_ELEMENT = 8 };

bool array_bytes(array_type type, int rank, const int64_t *shape, size_t *bytes)
{
    if (rank < 0 || rank > ARRAY_MAX_RANK)
        return false;
    bool empty = false;
    for (int d = 0; d < rank; d++)
        empty = empty || shape[d] == 0;
    size_t product = empty ? LARGEST_ELEMENT
                           : array_type_size(type); /* what is empty can become any other type */
    for (int d = 0; d < rank; d++) {
        /* Zeros do not excuse the other sizes: strides and counts multiply them in any order. */
        const uint64_t size = shape[d] == 0 ? 1 : (uint64_t)shape[d];
        if (size > PTRDIFF_MAX / product) /* negative ones too: they are huge here */
            return false;
        product *= (size_t)size;
    }
    *bytes = empty ? 0 : product;
    return true;
}

bool array_alloc(array_type type, int rank, const int64_t *shape, array *out, file_error *error)
{
    *out = (array){0};
    file_error_clear(error);
    size_t bytes;
    if (!array_bytes(type, rank, shape, &bytes))
        return file_error_set(error, NULL,
                              "no array has this shape; give at most %d sizes of 0 or more whose "
                              "product fits in memory",
                              ARRAY_MAX_RANK);
    void *data = malloc(bytes > 0 ? bytes : 1);
    if (!data)
        return file_error_set(error, NULL, "no memory for an array of %zu bytes; use a smaller one",
                              bytes);
    *out = (array){.type = type, .rank = rank, .data = data};
    for (int d = 0; d < rank; d++)
        out->shape[d] = shape[d];
    return true;
}

void array_free(array *from)
{
    if (!from)
        return;
    free(from->data);
    *from = (array){0};
}

array array_part(const array *from, int axes, int64_t n)
{
    array part = {.type = from->type, .rank = axes};
    for (int d = 0; d < axes; d++)
        part.shape[d] = from->shape[from->rank - axes + d];
    part.data = (char *)from->data + n * array_count(&part) * (int64_t)array_type_size(from->type);
    return part;
}

float f16_to_f32(uint16_t half) { return sparge_f16_to_f32(half); }
float bf16_to_f32(uint16_t half) { return sparge_bf16_to_f32(half); }

static float element_f32(array_type type, const void *data, int64_t i)
{
    switch (type) {
    case ARRAY_F16: return f16_to_f32(((const uint16_t *)data)[i]);
    case ARRAY_BF16: return bf16_to_f32(((const uint16_t *)data)[i]);
    case ARRAY_F32: return ((const float *)data)[i];
    case ARRAY_F64: return (float)((const double *)data)[i];
    case ARRAY_U8: return ((const uint8_t *)data)[i];
    case ARRAY_BOOL: return ((const uint8_t *)data)[i] != 0;
    case ARRAY_I8: return ((const int8_t *)data)[i];
    case ARRAY_I16: return ((const int16_t *)data)[i];
    case ARRAY_I32: return (float)((const int32_t *)data)[i];
    case ARRAY_I64: return (float)((const int64_t *)data)[i];
    }
    assert(false);
    return 0.0f;
}

bool array_to_f32(array *from, file_error *error)
{
    file_error_clear(error);
    if (from->type == ARRAY_F32)
        return true;
    array to;
    if (!array_alloc(ARRAY_F32, from->rank, from->shape, &to, error))
        return false;
    const int64_t count = array_count(from);
    for (int64_t i = 0; i < count; i++)
        ((float *)to.data)[i] = element_f32(from->type, from->data, i);
    array_free(from);
    *from = to;
    return true;
}

int64_t array_nonfinite(const array *from)
{
    int64_t count = 0;
    for (int64_t n = 0; n < array_count(from); n++)
        count += !isfinite(((const float *)from->data)[n]);
    return count;
}

bool array_fits_f16(const array *from)
{
    const int64_t all = array_count(from),
                  size = from->shape[from->rank - 2] * from->shape[from->rank - 1];
    for (int64_t begin = 0; begin < all; begin += size) {
        double sum = 0.0, lost = 0.0;
        for (int64_t n = begin; n < begin + size; n++) {
            const float x = ((const float *)from->data)[n];
            if (isfinite(x)) {
                sum += fabs((double)x);
                lost += fabs((double)x - (double)f16_to_f32(sparge_f32_to_f16(x)));
            }
        }
        if (!(lost <= 0x1p-11 * sum))
            return false;
    }
    return true;
}

bool array_to_f16(array *from, file_error *error)
{
    array to;
    if (!array_alloc(ARRAY_F16, from->rank, from->shape, &to, error))
        return false;
    const int64_t count = array_count(from);
    for (int64_t i = 0; i < count; i++) {
        const float x = ((const float *)from->data)[i];
        ((uint16_t *)to.data)[i] = sparge_f32_to_f16(x);
        if (isfinite(x) && fabsf(x) >= 65520.0f) { /* half a step above 65504 */
            array_free(&to);
            return file_error_set(error, NULL, "element %" PRId64 " is %g, too large for float16",
                                  i, (double)x);
        }
    }
    array_free(from);
    *from = to;
    return true;
}

/* ---- Bytes to read ---------------------------------------------------------------------- */

bool input_open(const char *path, file_input *out, file_error *error)
{
    *out = (file_input){.name = path, .error = error, .file = -1};
    file_error_clear(error);
    errno = 0; /* what fails from here on may be for want of memory */
    /* Without O_NONBLOCK a named pipe would wait here for its writer. */
    const int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0)
        file_error_set(error, path, "cannot open: %s; %s", strerror(errno),
                       errno == EACCES ? "allow reading it (chmod +r)" : "check the path");
    else if (S_ISDIR(status.st_mode))
        file_error_set(error, path, "is a directory; name a file in it");
    else if (!S_ISREG(status.st_mode))
        file_error_set(error, path, "is no regular file, so its size is unknown; save it to one");
    else {
        out->file = file;
        out->size = (size_t)status.st_size;
        return true;
    }
    if (file >= 0)
        close(file);
    return false;
}

file_input input_memory(const uint8_t *bytes, size_t size, const char *name, file_error *error)
{
    file_error_clear(error);
    return (file_input){.name = name, .error = error, .bytes = bytes, .file = -1, .size = size};
}

bool input_read(const file_input *from, size_t at, size_t size, void *to)
{
    if (from->size == 0)
        return input_fail(from, "byte 0: the file is empty; save it again");
    if (at > from->size || size > from->size - at)
        return input_fail(
            from,
            "byte %zu: truncated: %zu bytes are needed from byte %zu on; copy or save it again",
            from->size, size, at);
    if (from->bytes && size > 0)
        memcpy(to, from->bytes + at, size);
    for (size_t done = 0; !from->bytes && done < size;) {
        const ssize_t n = pread(from->file, (char *)to + done, size - done, (off_t)(at + done));
        if (n > 0)
            done += (size_t)n;
        else if (n == 0 || errno != EINTR)
            return input_fail(
                from,
                "byte %zu: cannot read: %s; check the disk, and that nobody writes to the file",
                at + done, n < 0 ? strerror(errno) : "the file has shrunk");
    }
    return true;
}

void input_close(file_input *from)
{
    if (from->file >= 0)
        close(from->file);
    from->file = -1;
}

char *input_text(const char *path, size_t *size, file_error *error)
{
    enum { LARGEST = 64 << 20 };
    file_input in;
    if (!input_open(path, &in, error))
        return NULL;
    char *text = in.size <= LARGEST ? malloc(in.size + 1) : NULL;
    *size = in.size;
    if (in.size > LARGEST)
        input_fail(&in, "has %zu bytes, too many for JSON; is it the right file?", in.size);
    else if (!text)
        input_fail(&in, "no memory for its %zu bytes; use a smaller one", in.size);
    else if (!input_read(&in, 0, in.size, text)) {
        free(text);
        text = NULL;
    }
    input_close(&in);
    return text;
}
