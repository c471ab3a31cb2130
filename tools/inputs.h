/* SPDX-License-Identifier: Apache-2.0 */
/* inputs.h: files of q, k and v as the library takes them, and o as the user gave q. */
#ifndef SPARGE_TOOLS_INPUTS_H
#define SPARGE_TOOLS_INPUTS_H

#include "tools/options.h"

typedef struct inputs {
    array tensor[3];        /* q, k, v; what was not wanted is empty */
    array g;                /* of inputs_gradient, which was not asked for where it is empty */
    sparge_problem problem; /* views of them */
    array_type type;        /* of q in its file */
    int rank;               /* of all of them */
    bool nhd;
} inputs;

/* As the library has it: f64 as f32. */
sparge_dtype inputs_dtype(array_type type);

/* Those that return nothing end the program when something is wrong. */

/* Reads q and k, and v too where it is needed or has a file of its own. */
void inputs_read(const attention_args *args, bool needs_v, inputs *out);
void inputs_free(inputs *in);

/* o [batch][heads][q_len][dim_v], in f16 or f32, in the type and with the axes of q. */
void inputs_shape_output(const inputs *in, const array *o, array *out);

/* The other way: a file of o (.npy, or `o` of a .safetensors) with the axes of q, as
 * [batch][heads][q_len][dim_v] of f32, or f64 where the file is; *type is the file's. And one of
 * lse, [batch][heads][q_len] in a .npy of f32 or f64; leading axes of 1 may be missing. */
void inputs_output(const char *path, const inputs *in, array *out, array_type *type);
void inputs_lse(const char *path, const inputs *in, array *out);

/* Reads g too, `g` of the .safetensors that q, k and v are of: the gradient of the model's loss at
 * each head's o. It has the axes of q there, and is f32 [batch][heads][q_len][dim_v] here. */
void inputs_gradient(const char *path, inputs *in);

/* A file of one array. */
exit_code inputs_npy(const char *path, array *out, file_error *error);

/* Refuses an output that would replace one of n inputs; NULL is not a file. */
exit_code inputs_spare(const char *output, const char *const *input, int n, file_error *error);

#endif
