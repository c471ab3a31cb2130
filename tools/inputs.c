/* SPDX-License-Identifier: Apache-2.0 */
/* inputs.c: reads q, k and v, and says what does not fit. */
#include "tools/inputs.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <sys/stat.h>

#include "tools/npy.h"
#include "tools/safetensors.h"

static const char *const names[] = {"q", "k", "v"};

exit_code inputs_npy(const char *path, array *out, file_error *error)
{
    return npy_read(path, out, error) ? EXIT_FINE : EXIT_FILE;
}

static void read_tensors(const attention_args *args, int count, array *out)
{
    if (args->files == 1)
        must_do(safetensors_read(args->file[0], names, count, out, &failure));
    for (int n = 0; n < args->files && args->files > 1; n++)
        must_do(npy_read(args->file[n], &out[n], &failure));
}

/* ---- What has to fit ---- */

/* [batch, heads, tokens, channels] of a tensor of rank 2 to 4. */
static void axes_of(const array *x, bool nhd, int64_t axis[4])
{
    axis[0] = x->rank == 4 ? x->shape[0] : 1;
    axis[1] = x->rank == 2 ? 1 : x->shape[x->rank - (nhd ? 2 : 3)];
    axis[2] = x->shape[x->rank - (nhd && x->rank > 2 ? 3 : 2)];
    axis[3] = x->shape[x->rank - 1];
}

_Noreturn static void unfit(const attention_args *args, const array *x, int n, int than,
                            const char *why)
{
    char one[ARRAY_SHAPE_TEXT], other[ARRAY_SHAPE_TEXT] = "";
    array_shape_string(x[n].rank, x[n].shape, one);
    array_shape_string(x[than].rank, x[than].shape, other);
    const char *file = args->file[args->files == 1 ? 0 : n];
    if (n == than)
        fail(EXIT_FILE, file, "%s is %s %s, %s", names[n], array_type_string(x[n].type), one, why);
    fail(EXIT_FILE, file, "%s is %s and %s in %.120s is %s: %s", names[n], one, names[than],
         args->file[args->files == 1 ? 0 : than], other, why);
}

static bool fits_f32(const array *x)
{
    bool fits = true;
    for (int64_t at = 0; x->type == ARRAY_F64 && at < array_count(x) && fits; at++) {
        const double value = ((const double *)x->data)[at];
        fits = !isfinite(value) || fabs(value) <= (double)FLT_MAX;
    }
    return fits;
}

static void check(const attention_args *args, const array *x, int count, int64_t axis[3][4])
{
    const int64_t *q = axis[0], *k = axis[1], *const v = axis[2];
    for (int n = 0; n < count; n++) {
        if (x[n].type > ARRAY_F64)
            unfit(args, x, n, n, "it must be of floats; convert it to f4");
        if (!fits_f32(&x[n]))
            unfit(args, x, n, n, "it has finite elements that f4 cannot hold; scale it");
        if (x[n].rank < 2 || x[n].rank > 4)
            unfit(args, x, n, n, "it must be [N,D], [H,N,D] or [B,H,N,D]; reshape");
        axes_of(&x[n], args->nhd, axis[n]);
        if (axis[n][1] < 1 || axis[n][3] < 1)
            unfit(args, x, n, n, "it needs a head and a channel at least");
        if (n < 2 && axis[n][3] > SPARGE_MAX_DIM)
            unfit(args, x, n, n, "it may have 256 channels at most");
        if (x[n].rank != x[0].rank)
            unfit(args, x, 0, n, "they must have as many axes; reshape one");
        if (axis[n][0] != q[0])
            unfit(args, x, 0, n, "they must have the same batch");
        if (q[1] % axis[n][1] != 0)
            unfit(args, x, 0, n,
                  "the heads of q must be a multiple of those of k and v; is --layout right?");
    }
    if (k[3] != q[3])
        unfit(args, x, 0, 1, "they must have as many channels");
    if (count > 2 && (v[1] != k[1] || v[2] != k[2]))
        unfit(args, x, 1, 2, "they must have the same heads and tokens");
}

/* ---- Q, K, V ---- */

sparge_dtype inputs_dtype(array_type type)
{
    return type == ARRAY_F16 ? SPARGE_F16 : type == ARRAY_BF16 ? SPARGE_BF16 : SPARGE_F32;
}

static sparge_in view_of(const array *x, const int64_t axis[4], bool nhd)
{
    const int64_t heads = axis[1], tokens = axis[2], channels = axis[3];
    return (sparge_in){
        .data = x->data,
        .dtype = inputs_dtype(x->type),
        .batch = heads * tokens * channels,
        .head = nhd ? channels : tokens * channels,
        .token = nhd ? heads * channels : channels,
    };
}

void inputs_read(const attention_args *args, bool needs_v, inputs *out)
{
    *out = (inputs){0};
    const int count = args->files > 1 ? args->files : needs_v ? 3 : 2;
    array *x = out->tensor;
    int64_t axis[3][4] = {{0}};
    read_tensors(args, count, x);
    check(args, x, count, axis);
    out->type = x[0].type;
    for (int n = 0; n < count; n++)
        must_have(x[n].type != ARRAY_F64 || array_to_f32(&x[n], &failure));
    const int64_t *q = axis[0], *k = axis[1], *const v = axis[2];
    out->rank = x[0].rank;
    out->nhd = args->nhd;
    out->problem = (sparge_problem){
        .batch = q[0],
        .heads = q[1],
        .kv_heads = k[1],
        .q_len = q[2],
        .k_len = k[2],
        .dim = q[3],
        .dim_v = v[3],
        .q = view_of(&x[0], q, args->nhd),
        .k = view_of(&x[1], k, args->nhd),
        .v = view_of(&x[2], v, args->nhd),
    };
}

void inputs_free(inputs *in)
{
    for (int n = 0; n < 3; n++)
        array_free(&in->tensor[n]);
    array_free(&in->g);
}

/* ---- Beside them ---- */

/* The axes of o in a file, and its n-th row of [batch][heads][q_len] there. */
static void output_shape(const inputs *in, int64_t shape[4])
{
    const sparge_problem *p = &in->problem;
    const int64_t full[] = {p->batch, in->nhd ? p->q_len : p->heads, in->nhd ? p->heads : p->q_len,
                            p->dim_v};
    const int64_t plain[] = {p->q_len, p->dim_v};
    memcpy(shape, in->rank == 2 ? plain : full + 4 - in->rank, (size_t)in->rank * sizeof *shape);
}

static int64_t output_row(const inputs *in, int64_t n)
{
    const sparge_problem *p = &in->problem;
    const int64_t t = n % p->q_len, h = n / p->q_len % p->heads, b = n / p->q_len / p->heads;
    return in->nhd ? (b * p->q_len + t) * p->heads + h : n;
}

static int64_t output_rows(const inputs *in)
{
    return in->problem.batch * in->problem.heads * in->problem.q_len;
}

void inputs_shape_output(const inputs *in, const array *o, array *out)
{
    const array_type type = in->type == ARRAY_F64 ? ARRAY_F64 : o->type;
    const int64_t dim = in->problem.dim_v, rows = output_rows(in);
    int64_t shape[4];
    output_shape(in, shape);
    must_have(array_alloc(type, in->rank, shape, out, &failure));
    const size_t row = (size_t)dim * array_type_size(o->type);
    for (int64_t from = 0; from < rows; from++) {
        const int64_t to = output_row(in, from);
        if (type == o->type)
            memcpy((char *)out->data + (size_t)to * row, (const char *)o->data + (size_t)from * row,
                   row);
        for (int64_t c = 0; type != o->type && c < dim; c++)
            ((double *)out->data)[to * dim + c] = ((const float *)o->data)[from * dim + c];
    }
}

_Noreturn static void unfit_output(const char *path, const array *x, const char *what, int rank,
                                   const int64_t *shape)
{
    char is[ARRAY_SHAPE_TEXT], expected[ARRAY_SHAPE_TEXT];
    array_shape_string(x->rank, x->shape, is);
    array_shape_string(rank, shape, expected);
    fail(EXIT_FILE, path, "%s is %s %s, it must be of floats and %s, as o is for this q", what,
         array_type_string(x->type), is, expected);
}

/* Packs what has the axes of o in a file, x, which it frees: f64 stays, the rest becomes f32. */
static void pack_output(const char *path, const inputs *in, const char *what, array *x, array *out)
{
    const sparge_problem *p = &in->problem;
    const int64_t axes[] = {p->batch, p->heads, p->q_len, p->dim_v};
    int64_t shape[4];
    output_shape(in, shape);
    if (x->type > ARRAY_F64 || x->rank != in->rank ||
        memcmp(x->shape, shape, (size_t)x->rank * sizeof *shape) != 0)
        unfit_output(path, x, what, in->rank, shape);
    must_have((x->type == ARRAY_F64 || array_to_f32(x, &failure)) &&
              array_alloc(x->type, 4, axes, out, &failure));
    const size_t row = (size_t)p->dim_v * array_type_size(x->type);
    for (int64_t to = 0; to < output_rows(in); to++)
        memcpy((char *)out->data + (size_t)to * row,
               (const char *)x->data + (size_t)output_row(in, to) * row, row);
    array_free(x);
}

void inputs_output(const char *path, const inputs *in, array *out, array_type *type)
{
    static const char *name = "o";
    array x;
    must_do(safetensors_named(path) ? safetensors_read(path, &name, 1, &x, &failure)
                                    : npy_read(path, &x, &failure));
    *type = x.type;
    pack_output(path, in, name, &x, out);
}

void inputs_gradient(const char *path, inputs *in)
{
    static const char *name = "g";
    array x;
    must_do(safetensors_read(path, &name, 1, &x, &failure));
    pack_output(path, in, name, &x, &in->g);
    const int64_t wrong = array_nonfinite(&in->g);
    if (wrong)
        fail(EXIT_FILE, path, "g has %" PRId64 " elements that are not finite; record it again",
             wrong);
}

void inputs_lse(const char *path, const inputs *in, array *out)
{
    const int64_t shape[] = {in->problem.batch, in->problem.heads, in->problem.q_len};
    must_do(npy_read(path, out, &failure));
    const bool fits =
        out->rank >= 1 && out->rank <= 3 && array_count(out) == output_rows(in) &&
        memcmp(out->shape, shape + 3 - out->rank, (size_t)out->rank * sizeof *shape) == 0;
    if (!fits || (out->type != ARRAY_F32 && out->type != ARRAY_F64))
        unfit_output(path, out, "the log-sum-exp", 3, shape);
    out->rank = 3;
    memcpy(out->shape, shape, sizeof shape);
}

exit_code inputs_spare(const char *output, const char *const *input, int n, file_error *error)
{
    struct stat to, from;
    for (int i = 0; output && i < n && stat(output, &to) == 0; i++)
        if (input[i] && stat(input[i], &from) == 0 && from.st_dev == to.st_dev &&
            from.st_ino == to.st_ino && S_ISREG(to.st_mode)) {
            file_error_set(error, output, "is an input; choose another name");
            return EXIT_USAGE;
        }
    return EXIT_FINE;
}
