/* SPDX-License-Identifier: Apache-2.0 */
/* baseline.c: attention in f32, row by row, rounded where a kernel of half precision rounds: what
 * other kernels are measured by. */
#include "api/api.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "common/block_mask.h"
#include "common/element.h"
#include "sparge_mask.h"

typedef struct work {
    const sparge_problem *problem;
    const sparge_options *options;
    float softmax_scale;
    sparge_dtype dtype;
    float *q;        /* [dim] of one row */
    float *k, *v;    /* [k_len][dim], [k_len][dim_v] of one kv head */
    uint32_t *pairs; /* of one query block, as sparge_mask_get_row gives them */
    int64_t *key;    /* [k_len] that one row attends to */
    float *score;    /* [k_len] of the row with each of them */
} work;

static float rounded(float x, sparge_dtype dtype)
{
    return dtype == SPARGE_F32 ? x : sparge_widen(sparge_narrow(x, dtype), dtype);
}

/* Tokens of one head. What is not finite is NaN in all that it has a part in, as everywhere here.
 */
static void load(const sparge_in *in, int64_t b, int64_t h, int64_t first, int64_t tokens,
                 int64_t dim, float *to)
{
    for (int64_t t = first; t < first + tokens; t++)
        for (int64_t c = 0; c < dim; c++) {
            const float x =
                sparge_element_load(in->data, in->dtype, sparge_in_row(in, b, h, t) + c);
            *to++ = isfinite(x) ? x : NAN;
        }
}

static float dot(const float *a, const float *b, int64_t n)
{
    float partial[8] = {0}, sum = 0.0f;
    int64_t c = 0;
    for (; c + 8 <= n; c += 8)
        for (int lane = 0; lane < 8; lane++)
            partial[lane] += a[c + lane] * b[c + lane];
    for (; c < n; c++)
        sum += a[c] * b[c];
    for (int lane = 0; lane < 8; lane++)
        sum += partial[lane];
    return sum;
}

/* Query t over the keys that it attends to: o [dim_v], and its lse. */
static float attend(const work *w, int64_t b, int64_t h, int64_t t, float *o)
{
    const sparge_problem *p = w->problem;
    const int64_t kv = b * p->kv_heads + h / (p->heads / p->kv_heads);
    const float *bias = p->k_bias ? p->k_bias + kv * p->k_len : NULL;
    const uint32_t *row = w->pairs + t % w->options->block_q * sparge_mask_row_words(p->k_len);
    int64_t keys = 0;
    for (int64_t s = sparge_mask_row_next(row, 0, p->k_len); s < p->k_len;
         s = sparge_mask_row_next(row, s + 1, p->k_len))
        if (!(bias && bias[s] == -INFINITY))
            w->key[keys++] = s;
    load(&p->q, b, h, t, 1, p->dim, w->q);
    float top = -INFINITY, sum = 0.0f;
    for (int64_t n = 0; n < keys; n++) {
        w->score[n] = w->softmax_scale * dot(w->q, w->k + w->key[n] * p->dim, p->dim);
        if (bias)
            w->score[n] += bias[w->key[n]];
        top = fmaxf(top, w->score[n]);
    }
    for (int64_t c = 0; c < p->dim_v; c++)
        o[c] = 0.0f;
    for (int64_t n = 0; n < keys; n++) {
        const float weight = expf(w->score[n] - top), coded = rounded(weight, w->dtype);
        sum += weight;
        for (int64_t c = 0; c < p->dim_v; c++)
            o[c] += coded * w->v[w->key[n] * p->dim_v + c];
    }
    for (int64_t c = 0; c < p->dim_v && keys > 0; c++)
        o[c] = rounded(o[c] / sum, w->dtype);
    return keys > 0 ? top + logf(sum) : -INFINITY;
}

/* All rows; false: cancelled. */
static bool attend_all(const work *w, const sparge_mask *mask, float *o, float *lse)
{
    const sparge_problem *p = w->problem;
    const sparge_options *options = w->options;
    const int64_t heads = p->batch * p->heads, gqa = p->heads / p->kv_heads;
    for (int64_t row = 0; row < heads * p->q_len; row++, o += p->dim_v) {
        const int64_t t = row % p->q_len, n = row / p->q_len, b = n / p->heads, h = n % p->heads;
        if (t == 0 && h % gqa == 0) {
            load(&p->k, b, h / gqa, 0, p->k_len, p->dim, w->k);
            load(&p->v, b, h / gqa, 0, p->k_len, p->dim_v, w->v);
        }
        if (t % options->block_q == 0)
            sparge_mask_get_row(mask, p, options, b, h, t / options->block_q, w->pairs);
        const float own = attend(w, b, h, t, o);
        if (lse)
            lse[row] = own;
        const bool last = (t + 1) % options->block_q == 0 || t + 1 == p->q_len; /* of its block */
        if (last && options->progress &&
            !options->progress(options->user, (double)(row + 1) / (double)(heads * p->q_len)))
            return false;
    }
    return true;
}

static sparge_status check_outputs(const sparge_problem *p, sparge_dtype dtype, const float *o,
                                   sparge_error *error)
{
    if ((unsigned)dtype > SPARGE_BF16)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "dtype is %s (%d), it must be f32, f16 or bf16",
                           sparge_dtype_string(dtype), (int)dtype);
    if (!o && p->batch > 0 && p->q_len > 0)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "o is NULL");
    return SPARGE_OK;
}

sparge_status sparge_baseline(const sparge_problem *problem, const sparge_options *options,
                              const sparge_mask *mask, sparge_dtype dtype, float *o, float *lse,
                              sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    const sparge_problem *p = problem;
    sparge_status status = sparge_check(problem, options, true, mask, error);
    if (!status && mask)
        status = sparge_check_partials(mask, error);
    if (!status)
        status = check_outputs(problem, dtype, o, error);
    if (status)
        return status;
    const size_t keys = (size_t)p->k_len + 1, size = sizeof(float); /* malloc(0) may be NULL */
    work w = {
        .problem = problem,
        .options = options,
        .softmax_scale = sparge_softmax_scale(problem, options),
        .dtype = dtype,
        .q = malloc((size_t)p->dim * size),
        .k = malloc(keys * (size_t)p->dim * size),
        .v = malloc(keys * (size_t)p->dim_v * size),
        .pairs = malloc((size_t)(options->block_q * sparge_mask_row_words(p->k_len) + 1) *
                        sizeof(uint32_t)),
        .key = malloc(keys * sizeof(int64_t)),
        .score = malloc(keys * size),
    };
    if (!w.q || !w.k || !w.v || !w.pairs || !w.key || !w.score)
        status = SPARGE_ERR_MEMORY;
    else if (!attend_all(&w, mask, o, lse))
        status = SPARGE_ERR_CANCELLED;
    free(w.q);
    free(w.k);
    free(w.v);
    free(w.pairs);
    free(w.key);
    free(w.score);
    return sparge_with_message(status, error);
}

/* All would be within a bound that follows from more than `most`. */
static double bound(double baseline, double most)
{
    return baseline <= most ? 2.0 * baseline + 1e-5 : (double)NAN;
}

double sparge_bound_o(double baseline) { return bound(baseline, 0.5); }
double sparge_bound_lse(double baseline) { return bound(baseline, DBL_MAX); }
