/* SPDX-License-Identifier: Apache-2.0 */
/* baseline.c: attention in f32, row by row, rounded where a kernel of half precision rounds. */
#include "tools/baseline.h"

#include <math.h>
#include <stdlib.h>

#include "common/block_mask.h"
#include "common/element.h"
#include "sparge_mask.h"
#include "tools/program.h"

typedef struct work {
    const sparge_problem *problem;
    const sparge_options *options;
    array_type type;
    float *q;        /* [dim] of one row */
    float *k, *v;    /* [k_len][dim], [k_len][dim_v] of one kv head */
    uint32_t *pairs; /* of one query block, as sparge_mask_get_row gives them */
    int64_t *key;    /* [k_len] that one row attends to */
    float *score;    /* [k_len] of the row with each of them */
} work;

static float rounded(float x, array_type type)
{
    switch (type) {
    case ARRAY_F16: return sparge_f16_to_f32(sparge_f32_to_f16(x));
    case ARRAY_BF16: return sparge_bf16_to_f32(sparge_f32_to_bf16(x));
    default: return x;
    }
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
    const uint32_t *row =
        w->pairs + t % w->options->block_q * sparge_mask_row_words(w->problem->k_len);
    int64_t keys = 0;
    for (int64_t s = sparge_mask_row_next(row, 0, p->k_len); s < p->k_len;
         s = sparge_mask_row_next(row, s + 1, p->k_len))
        w->key[keys++] = s;
    load(&p->q, b, h, t, 1, p->dim, w->q);
    const int64_t kv = b * p->kv_heads + h / (p->heads / p->kv_heads);
    float top = -INFINITY, sum = 0.0f;
    for (int64_t n = 0; n < keys; n++) {
        w->score[n] = w->options->softmax_scale * dot(w->q, w->k + w->key[n] * p->dim, p->dim);
        if (p->k_bias)
            w->score[n] += p->k_bias[kv * p->k_len + w->key[n]];
        top = fmaxf(top, w->score[n]);
    }
    for (int64_t c = 0; c < p->dim_v; c++)
        o[c] = 0.0f;
    for (int64_t n = 0; n < keys; n++) {
        const float weight = expf(w->score[n] - top), coded = rounded(weight, w->type);
        sum += weight;
        for (int64_t c = 0; c < p->dim_v; c++)
            o[c] += coded * w->v[w->key[n] * p->dim_v + c];
    }
    for (int64_t c = 0; c < p->dim_v && keys > 0; c++)
        o[c] = rounded(o[c] / sum, w->type);
    return keys > 0 ? top + logf(sum) : -INFINITY;
}

void baseline_attend(const sparge_problem *problem, const sparge_options *options,
                     const sparge_mask *mask, array_type type, float *o, float *lse)
{
    static const char what[] = "the baseline";
    const sparge_problem *p = problem;
    const size_t keys = (size_t)p->k_len, size = sizeof(float);
    work w = {
        .problem = problem,
        .options = options,
        .type = type,
        .q = must_alloc((size_t)p->dim, size, what),
        .k = must_alloc(keys, (size_t)p->dim * size, what),
        .v = must_alloc(keys, (size_t)p->dim_v * size, what),
        .pairs = must_alloc((size_t)(options->block_q * sparge_mask_row_words(p->k_len)),
                            sizeof(uint32_t), what),
        .key = must_alloc(keys, sizeof(int64_t), what),
        .score = must_alloc(keys, size, what),
    };
    const int64_t heads = p->batch * p->heads, gqa = p->heads / p->kv_heads;
    const double rows = (double)(heads * p->q_len);
    for (int64_t n = 0; n < heads; n++) {
        const int64_t b = n / p->heads, h = n % p->heads;
        load(&p->k, b, h / gqa, 0, p->k_len, p->dim, w.k);
        load(&p->v, b, h / gqa, 0, p->k_len, p->dim_v, w.v);
        for (int64_t t = 0; t < p->q_len; t++, o += p->dim_v) {
            if (t % options->block_q == 0)
                sparge_mask_get_row(mask, p, options, b, h, t / options->block_q, w.pairs);
            *lse++ = attend(&w, b, h, t, o);
            if (!options->progress(options->user, (double)(n * p->q_len + t + 1) / rows))
                must_sparge(SPARGE_ERR_CANCELLED);
        }
    }
    free(w.q);
    free(w.k);
    free(w.v);
    free(w.pairs);
    free(w.key);
    free(w.score);
}
