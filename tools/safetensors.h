/* SPDX-License-Identifier: Apache-2.0 */
/* safetensors.h: named tensors in a .safetensors file. */
#ifndef SPARGE_TOOLS_SAFETENSORS_H
#define SPARGE_TOOLS_SAFETENSORS_H

#include <stdio.h>

#include "tools/array.h"

/* Does the name end so? */
bool safetensors_named(const char *path);

/* Reads out[i], an F16, BF16, F32, U8, BOOL or I64, by the name names[i]; the layout of the whole
 * file is checked first. After failure every out[i] is all zero. */
bool safetensors_read(const char *path, const char *const *names, int count, array *out,
                      file_error *error);
bool safetensors_read_memory(const uint8_t *bytes, size_t size, const char *name,
                             const char *const *names, int count, array *out, file_error *error);

/* Writes tensors in this order. The name is for the error. */
bool safetensors_write(FILE *stream, const char *name, const char *const *names, int count,
                       const array *from, file_error *error);

/* ---- The table of a file, for those who read the bytes themselves ---- */

typedef struct safetensors safetensors;

typedef struct safetensors_place {
    array_type type;
    int rank;
    int64_t shape[ARRAY_MAX_RANK];
    size_t at, bytes; /* in the file */
} safetensors_place;

/* Checks the layout of the whole file. The input must outlive the table; NULL after failure. */
safetensors *safetensors_open(const file_input *in);
void safetensors_close(safetensors *s); /* NULL is fine */

size_t safetensors_count(const safetensors *s);
const char *safetensors_name(const safetensors *s, size_t n);
bool safetensors_find(const safetensors *s, const char *name, safetensors_place *out);
/* The array is to be freed after failure too. */
bool safetensors_tensor(const safetensors *s, const char *name, array *out);

#endif
