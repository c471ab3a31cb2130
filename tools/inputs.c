/* inputs.c: reads q, k, v and masks, and says what does not fit. */
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

static exit_code read_named(const char *path, const char *const *name, int count, array *out,
                            file_error *error)
{
    return safetensors_read(path, name, count, out, error) ? EXIT_FINE : EXIT_FILE;
}

static exit_code read_tensors(const attention_args *args, int count, inputs *out, file_error *error)
{
    if (args->files == 1)
        return read_named(args->file[0], names, count, out->tensor, error);
    for (int n = 0; n < args->files; n++) {
        const exit_code code = inputs_npy(args->file[n], &out->tensor[n], error);
        if (code)
            return code;
    }
    return EXIT_FINE;
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

static exit_code unfit(const attention_args *args, const array *x, int n, int than, const char *why,
                       file_error *error)
{
    char one[ARRAY_SHAPE_TEXT], other[ARRAY_SHAPE_TEXT] = "";
    array_shape_string(x[n].rank, x[n].shape, one);
    array_shape_string(x[than].rank, x[than].shape, other);
    const char *file = args->file[args->files == 1 ? 0 : n];
    if (n == than)
        file_error_set(error, file, "%s is %s %s, %s", names[n], array_type_string(x[n].type), one,
                       why);
    else
        file_error_set(error, file, "%s is %s and %s in %.120s is %s: %s", names[n], one,
                       names[than], args->file[args->files == 1 ? 0 : than], other, why);
    return EXIT_FILE;
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

static exit_code check(const attention_args *args, const array *x, int count, int64_t axis[3][4],
                       file_error *error)
{
    const int64_t *q = axis[0], *k = axis[1], *const v = axis[2];
    for (int n = 0; n < count; n++) {
        if (x[n].type > ARRAY_F64)
            return unfit(args, x, n, n, "it must be of floats; convert it to f4", error);
        if (!fits_f32(&x[n]))
            return unfit(args, x, n, n, "it has finite elements that f4 cannot hold; scale it",
                         error);
        if (x[n].rank < 2 || x[n].rank > 4)
            return unfit(args, x, n, n, "it must be [N,D], [H,N,D] or [B,H,N,D]; reshape", error);
        axes_of(&x[n], args->nhd, axis[n]);
        if (axis[n][1] < 1 || axis[n][3] < 1)
            return unfit(args, x, n, n, "it needs a head and a channel at least", error);
        if (n < 2 && axis[n][3] > SPARGE_MAX_DIM)
            return unfit(args, x, n, n, "it may have 256 channels at most", error);
        if (x[n].rank != x[0].rank)
            return unfit(args, x, 0, n, "they must have as many axes; reshape one", error);
        if (axis[n][0] != q[0])
            return unfit(args, x, 0, n, "they must have the same batch", error);
        if (q[1] % axis[n][1] != 0)
            return unfit(args, x, 0, n,
                         "the heads of q must be a multiple of those of k and v; "
                         "is --layout right?",
                         error);
    }
    if (k[3] != q[3])
        return unfit(args, x, 0, 1, "they must have as many channels", error);
    if (count > 2 && (v[1] != k[1] || v[2] != k[2]))
        return unfit(args, x, 1, 2, "they must have the same heads and tokens", error);
    return EXIT_FINE;
}

/* ---- Q, K, V ---- */

static sparge_in view_of(const array *x, const int64_t axis[4], bool nhd)
{
    const int64_t heads = axis[1], tokens = axis[2], channels = axis[3];
    return (sparge_in){
        .data = x->data,
        .dtype = x->type == ARRAY_F16    ? SPARGE_F16
                 : x->type == ARRAY_BF16 ? SPARGE_BF16
                                         : SPARGE_F32,
        .batch = heads * tokens * channels,
        .head = nhd ? channels : tokens * channels,
        .token = nhd ? heads * channels : channels,
    };
}

exit_code inputs_read(const attention_args *args, bool needs_v, inputs *out, file_error *error)
{
    *out = (inputs){0};
    const int count = args->files > 1 ? args->files : needs_v ? 3 : 2;
    array *x = out->tensor;
    int64_t axis[3][4] = {{0}};
    exit_code code = read_tensors(args, count, out, error);
    if (!code)
        code = check(args, x, count, axis, error);
    out->type = x[0].type;
    for (int n = 0; n < count && !code; n++)
        if (x[n].type == ARRAY_F64 && !array_to_f32(&x[n], error))
            code = EXIT_MACHINE;
    if (code) {
        inputs_free(out);
        return code;
    }
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
    return EXIT_FINE;
}

void inputs_free(inputs *in)
{
    for (int n = 0; n < 3; n++)
        array_free(&in->tensor[n]);
}

/* ---- Beside them ---- */

void inputs_fill_mask(sparge_mask *to, const uint8_t *keep)
{
    for (int64_t b = 0; b < to->batch; b++)
        for (int64_t h = 0; h < to->heads; h++)
            for (int64_t i = 0; i < to->q_blocks; i++)
                for (int64_t j = 0; j < to->k_blocks; j++)
                    sparge_mask_set(to, b, h, i, j, *keep++ != 0);
}

exit_code inputs_mask(const char *path, const inputs *in, const sparge_options *options,
                      sparge_mask *out, file_error *error)
{
    sparge_error why;
    array x = {0};
    const sparge_status status = sparge_mask_alloc(out, &in->problem, options, &why);
    exit_code code = library_result(status, &why, error);
    if (!code)
        code = inputs_npy(path, &x, error);
    if (code)
        goto done;
    const int64_t shape[] = {out->batch, out->heads, out->q_blocks, out->k_blocks};
    if ((x.type != ARRAY_U8 && x.type != ARRAY_BOOL) || x.rank != 4 ||
        memcmp(x.shape, shape, sizeof shape) != 0) {
        char is[ARRAY_SHAPE_TEXT], must[ARRAY_SHAPE_TEXT];
        array_shape_string(x.rank, x.shape, is);
        array_shape_string(4, shape, must);
        file_error_set(error, path,
                       "the mask is %s %s, it must be u8 or bool %s: batch, heads, "
                       "blocks of %" PRId64 " queries, blocks of %" PRId64 " keys",
                       array_type_string(x.type), is, must, options->block_q, options->block_k);
        code = EXIT_FILE;
        goto done;
    }
    inputs_fill_mask(out, x.data);
done:
    array_free(&x);
    return code;
}

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

exit_code inputs_shape_output(const inputs *in, const array *o, array *out, file_error *error)
{
    const array_type type = in->type == ARRAY_F64 ? ARRAY_F64 : o->type;
    const int64_t dim = in->problem.dim_v, rows = output_rows(in);
    int64_t shape[4];
    output_shape(in, shape);
    if (!array_alloc(type, in->rank, shape, out, error))
        return EXIT_MACHINE;
    const size_t row = (size_t)dim * array_type_size(o->type);
    for (int64_t from = 0; from < rows; from++) {
        const int64_t to = output_row(in, from);
        if (type == o->type)
            memcpy((char *)out->data + (size_t)to * row, (const char *)o->data + (size_t)from * row,
                   row);
        for (int64_t c = 0; type != o->type && c < dim; c++)
            ((double *)out->data)[to * dim + c] = ((const float *)o->data)[from * dim + c];
    }
    return EXIT_FINE;
}

static exit_code unfit_output(const char *path, const array *x, const char *what, int rank,
                              const int64_t *shape, file_error *error)
{
    char is[ARRAY_SHAPE_TEXT], must[ARRAY_SHAPE_TEXT];
    array_shape_string(x->rank, x->shape, is);
    array_shape_string(rank, shape, must);
    file_error_set(error, path,
                   "%s is %s %s, it must be of floats and %s, as sparge run writes it for this q",
                   what, array_type_string(x->type), is, must);
    return EXIT_FILE;
}

exit_code inputs_output(const char *path, const inputs *in, array *out, array_type *type,
                        file_error *error)
{
    static const char *name = "o";
    const char *end = strrchr(path, '.');
    array x = {0};
    exit_code code = end && strcmp(end, ".safetensors") == 0 ? read_named(path, &name, 1, &x, error)
                                                             : inputs_npy(path, &x, error);
    int64_t shape[4];
    output_shape(in, shape);
    *type = x.type;
    if (!code && (x.type > ARRAY_F64 || x.rank != in->rank ||
                  memcmp(x.shape, shape, (size_t)x.rank * sizeof *shape) != 0))
        code = unfit_output(path, &x, "o", in->rank, shape, error);
    const sparge_problem *p = &in->problem;
    const int64_t axes[] = {p->batch, p->heads, p->q_len, p->dim_v};
    if (!code && ((x.type != ARRAY_F64 && !array_to_f32(&x, error)) ||
                  !array_alloc(x.type, 4, axes, out, error)))
        code = EXIT_MACHINE;
    const size_t row = code ? 0 : (size_t)p->dim_v * array_type_size(x.type);
    for (int64_t to = 0; !code && to < output_rows(in); to++)
        memcpy((char *)out->data + (size_t)to * row,
               (const char *)x.data + (size_t)output_row(in, to) * row, row);
    array_free(&x);
    return code;
}

exit_code inputs_lse(const char *path, const inputs *in, array *out, file_error *error)
{
    const int64_t shape[] = {in->problem.batch, in->problem.heads, in->problem.q_len};
    const exit_code code = inputs_npy(path, out, error);
    if (code)
        return code;
    const bool fits =
        out->rank >= 1 && out->rank <= 3 && array_count(out) == output_rows(in) &&
        memcmp(out->shape, shape + 3 - out->rank, (size_t)out->rank * sizeof *shape) == 0;
    if (!fits || (out->type != ARRAY_F32 && out->type != ARRAY_F64))
        return unfit_output(path, out, "the log-sum-exp", 3, shape, error);
    out->rank = 3;
    memcpy(out->shape, shape, sizeof shape);
    return EXIT_FINE;
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
