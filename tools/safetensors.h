/* safetensors.h: named tensors from a .safetensors file. */
#ifndef SPARGE_TOOLS_SAFETENSORS_H
#define SPARGE_TOOLS_SAFETENSORS_H

#include "tools/array.h"

/* Reads out[i], an F16, BF16 or F32, by the name names[i]; the layout of the whole file is checked
 * first. After failure every out[i] is all zero. */
bool safetensors_read(const char *path, const char *const *names, int count, array *out,
                      file_error *error);
bool safetensors_read_memory(const uint8_t *bytes, size_t size, const char *name,
                             const char *const *names, int count, array *out, file_error *error);

#endif
