/* SPDX-License-Identifier: Apache-2.0 */
/* array.h: what the program's files hold: packed arrays, the line that says what is wrong with a
 * file, and the bytes that the readers read. */
#ifndef SPARGE_TOOLS_ARRAY_H
#define SPARGE_TOOLS_ARRAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One line: the file, the place in it, what is wrong; what to do. "" after success. Every function
 * of tools/ that takes one takes NULL as well. */
typedef struct file_error {
    char text[512];
    bool memory; /* which was missing: malloc said so in errno */
} file_error;

/* Writes "name: ..." (without "name: " where it is NULL) and returns false, to be returned. Control
 * characters, which names in files may hold, become '?'; of a long name the end is kept. */
__attribute__((format(printf, 3, 4))) bool file_error_set(file_error *error, const char *name,
                                                          const char *format, ...);
void file_error_clear(file_error *error);

/* ---- Arrays ----------------------------------------------------------------------------- */

/* A BOOL is a byte as it stands in the file: 0 is false, all others are true. */
typedef enum array_type {
    ARRAY_F16,
    ARRAY_BF16,
    ARRAY_F32,
    ARRAY_F64,
    ARRAY_U8,
    ARRAY_BOOL,
    ARRAY_I8,
    ARRAY_I16,
    ARRAY_I32,
    ARRAY_I64
} array_type;

enum { ARRAY_MAX_RANK = 8, ARRAY_SHAPE_TEXT = 192 };

/* A packed row-major array that owns its data. Rank 0 is one element; a size of 0 is legal, and
 * data is not NULL even then. */
typedef struct array {
    array_type type;
    int rank;
    int64_t shape[ARRAY_MAX_RANK];
    void *data;
} array;

int64_t array_count(const array *from); /* elements */
size_t array_type_size(array_type type);
const char *array_type_string(array_type type); /* "f16", "bool", ... */

/* The shape as Python spells it: "()", "(3,)", "(2, 3)". */
void array_shape_string(int rank, const int64_t *shape, char text[ARRAY_SHAPE_TEXT]);

/* The bytes of such an array; false where a size is negative, the rank exceeds 8, or the sizes
 * (leaving out those that are 0) multiply to more bytes than memory can ever hold; of any type,
 * where one is 0. */
bool array_bytes(array_type type, int rank, const int64_t *shape, size_t *bytes);

/* Allocates, uninitialised. After failure *out is all zero, and free to be freed. */
bool array_alloc(array_type type, int rank, const int64_t *shape, array *out, file_error *error);
void array_free(array *from); /* NULL and an empty array are fine */

/* The n-th of the arrays that the last axes make, such as a head's matrix with 2 of 4: a view, not
 * to be freed. */
array array_part(const array *from, int axes, int64_t n);

/* In place: exact from f16, bf16 and small integers, rounded to nearest (and to infinity) from the
 * others. After failure the array is as it was. */
bool array_to_f32(array *from, file_error *error);

/* One element; exact. */
float f16_to_f32(uint16_t half);
float bf16_to_f32(uint16_t half);

/* Elements of an F32 that are NaN or infinite. */
int64_t array_nonfinite(const array *from);

/* Of an F32 with 2 axes or more: does each matrix of the last two lose no more in float16 than 11
 * bits of each element cost? It would where it is very large or very small. */
bool array_fits_f16(const array *from);

/* In place, of an F32, rounded to nearest, ties to even. After failure, which a finite number that
 * would become infinite is too, the array is as it was. */
bool array_to_f16(array *from, file_error *error);

/* ---- Bytes to read ---------------------------------------------------------------------- */

/* An open regular file, or bytes in memory that somebody else owns, of a file or not; and where
 * errors go. */
typedef struct file_input {
    const char *name;
    file_error *error;
    const uint8_t *bytes; /* NULL: in the file */
    int file;
    size_t size;
} file_input;

bool input_open(const char *path, file_input *out, file_error *error);
file_input input_memory(const uint8_t *bytes, size_t size, const char *name, file_error *error);
/* Like file_error_set. */
__attribute__((format(printf, 2, 3))) bool input_fail(const file_input *from, const char *format,
                                                      ...);
/* All of the bytes at .. at + size - 1, or an error. */
bool input_read(const file_input *from, size_t at, size_t size, void *to);
void input_close(file_input *from);

/* A whole file of text, at most 64 MiB, to be freed; NULL after failure. */
char *input_text(const char *path, size_t *size, file_error *error);

#endif
