/* SPDX-License-Identifier: Apache-2.0 */
/* npy.h: NumPy's .npy files, format versions 1.0, 2.0 and 3.0. */
#ifndef SPARGE_TOOLS_NPY_H
#define SPARGE_TOOLS_NPY_H

#include "tools/array.h"

#include <stdio.h>

/* Reads f2 f4 f8 u1 b1 i1 i2 i4 i8, little-endian, in C or Fortran order (which it transposes);
 * what comes after the array may be another, and is left alone. After failure *out is all zero. */
bool npy_read(const char *path, array *out, file_error *error);
bool npy_read_memory(const uint8_t *bytes, size_t size, const char *name, array *out,
                     file_error *error);

/* Writes version 1.0, C order, the data aligned to 64 bytes; refuses BF16, which NumPy lacks. The
 * name is for the error. */
bool npy_write(FILE *stream, const char *name, const array *from, file_error *error);

/* The same as a file that appears whole. */
bool npy_save(const char *path, const array *from, file_error *error);

#endif
