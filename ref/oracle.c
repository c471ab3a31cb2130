/* SPDX-License-Identifier: Apache-2.0 */
/* oracle.c: attention by the textbook formula, softmax(scale * Q K^T) V (Sec 3.1), in double over
 * the real inputs or over the codes of Sec 3.2, the judge of every backend.
 *
 * It shares no code with what it judges. Only what defines the codes (mean key, k minus that mean,
 * steps, quotients) is f32. Non-finite inputs need no rule of their own: dequantize() makes them
 * NaN, and NaN reaches exactly the results in which a kept and visible element has a part.
 */
#include "ref/oracle.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct rule {
    float largest; /* code; 0: real values, no codes */
    float extra;   /* what upstream adds to a step */
    int digits;    /* 0: codes are whole numbers; else binary digits of a floating code, and */
    int lowest;    /* the exponent below which it loses them */
    bool unscaled; /* the step is 1, and what exceeds the largest code is not finite */
    bool by_head;  /* steps are of all tokens, not of a block's */
} rule;

static const rule int8 = {.largest = 127.0f},
                  int8_of_upstream = {.largest = 127.0f, .extra = 1e-7f};
static const rule int12_of_qk = {.largest = 2047.0f}, int12_of_pv = {.largest = 4095.0f};
static const rule binary16 = {.largest = 65504.0f, .digits = 11, .lowest = -14, .unscaled = true};
static const rule e4m3 = {.largest = 448.0f, .digits = 4, .lowest = -6, .by_head = true};

typedef struct work {
    const sparge_problem *problem;
    const sparge_options *options;
    const sparge_mask *mask; /* NULL: dense */
    rule qk, pv;
    bool smooth; /* are the keys used here k - mean? */
    double softmax_scale;
    int64_t q_blocks, k_blocks;
    float *block;   /* [rows][channels] one block of q, k or v as it came */
    float *mean;    /* [dim] of the keys of one kv head; 0 where they are not smoothed */
    double *q;      /* [block_q][dim] one query block */
    double *k, *v;  /* [k_len][dim], [k_len][dim_v] one kv head */
    int64_t *key;   /* [k_len] the keys that one row attends to, ascending */
    double *weight; /* [k_len] what it pays to each of them */
    int64_t v_rows; /* keys whose v shares steps: a block's, or all */
} work;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static float element(const sparge_in *in, int64_t b, int64_t h, int64_t t, int64_t c)
{
    const int64_t at = b * in->batch + h * in->head + t * in->token + c;
    if (in->dtype == SPARGE_F32)
        return ((const float *)in->data)[at];
    const uint32_t bits = ((const uint16_t *)in->data)[at];
    if (in->dtype == SPARGE_BF16) { /* the upper half of a float */
        const uint32_t wide = bits << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
    const int exponent = (int)(bits >> 10 & 31), fraction = (int)(bits & 1023);
    float size = ldexpf((float)(1024 + fraction), exponent - 25);
    if (exponent == 0)
        size = ldexpf((float)fraction, -24); /* subnormal: no hidden 1 */
    else if (exponent == 31)
        size = fraction ? NAN : INFINITY;
    return bits >> 15 ? -size : size;
}

/* The nearest code to x, not yet cut at the largest. */
static double nearest(double x, rule r)
{
    if (r.digits == 0 || x == 0.0)
        return round(x);
    const int exponent = ilogb(x) > r.lowest ? ilogb(x) : r.lowest;
    const double ulp = ldexp(1.0, exponent + 1 - r.digits);
    return rint(x / ulp) * ulp; /* ties to even */
}

/* What the codes of x[0], x[stride], ... stand for; they share one step (Sec 3.2). */
static void dequantize(double *to, const float *x, int64_t count, int64_t stride, rule r)
{
    float top = 0.0f;
    for (int64_t n = 0; n < count * stride; n += stride)
        top = isfinite(x[n]) ? fmaxf(top, fabsf(x[n])) : top;
    const float step = r.unscaled ? 1.0f : r.largest > 0.0f ? top / r.largest + r.extra : 0.0f;
    for (int64_t n = 0; n < count * stride; n += stride) {
        if (!isfinite(x[n]))
            to[n] = NAN;
        else if (!(r.largest > 0.0f))
            to[n] = x[n];
        else if (step < FLT_MIN) /* a subnormal step has too few digits to divide by */
            to[n] = 0.0;
        else {
            const double code = nearest((double)(x[n] / step), r), largest = (double)r.largest;
            const double beyond = r.unscaled ? NAN : copysign(largest, code);
            to[n] = (fabs(code) <= largest ? code : beyond) * (double)step;
        }
    }
}

/* f32 within a key block in row order, f64 over the blocks: the order is part of the definition. */
static float mean_of_channel(const work *w, int64_t b, int64_t g, int64_t c)
{
    const int64_t k_len = w->problem->k_len;
    double total = 0.0;
    for (int64_t j = 0; j < w->k_blocks; j++) {
        float sum = 0.0f;
        const int64_t end = least((j + 1) * w->options->block_k, k_len);
        for (int64_t t = j * w->options->block_k; t < end; t++) {
            const float value = element(&w->problem->k, b, g, t, c);
            sum += isfinite(value) ? value : 0.0f;
        }
        total += (double)sum;
    }
    return (float)(total / (double)k_len);
}

/* One kv head, as the mode wants it. A block of k has one step, one of v (or all of it) one per
 * channel. */
static void load_keys(const work *w, int64_t b, int64_t g, bool needs_v)
{
    const sparge_problem *p = w->problem;
    for (int64_t c = 0; c < p->dim; c++)
        w->mean[c] = w->smooth ? mean_of_channel(w, b, g, c) : 0.0f;
    for (int64_t j = 0; j < w->k_blocks; j++) {
        const int64_t first = j * w->options->block_k;
        const int64_t rows = least(w->options->block_k, p->k_len - first);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < p->dim; c++)
                w->block[r * p->dim + c] = element(&p->k, b, g, first + r, c) - w->mean[c];
        dequantize(w->k + first * p->dim, w->block, rows * p->dim, 1, w->qk);
    }
    for (int64_t first = 0; needs_v && first < p->k_len; first += w->v_rows) {
        const int64_t rows = least(w->v_rows, p->k_len - first);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < p->dim_v; c++)
                w->block[r * p->dim_v + c] = element(&p->v, b, g, first + r, c);
        for (int64_t c = 0; c < p->dim_v; c++)
            dequantize(w->v + first * p->dim_v + c, w->block + c, rows, p->dim_v, w->pv);
    }
}

static bool bit(const uint32_t *row, int64_t n) { return row[n / 32] >> n % 32 & 1; }

/* Does the mask let query t of a head attend to the key? */
static bool kept(const work *w, int64_t b, int64_t h, int64_t t, int64_t key)
{
    const sparge_mask *m = w->mask;
    const int64_t block_q = w->options->block_q, block_k = w->options->block_k, j = key / block_k;
    if (!m)
        return true;
    const int64_t line = (b * m->heads + h) * m->q_blocks + t / block_q;
    if (!bit(m->bits + line * m->words, j))
        return false;
    const int64_t words = (block_k + 31) / 32;
    for (int64_t n = m->partial_first ? m->partial_first[line] : 0;
         m->partial_first && n < m->partial_first[line + 1]; n++)
        if (m->partial_block[n] == j)
            return bit(m->partial_bits + (n * block_q + t % block_q) * words, key % block_k);
    return true;
}

/* Query block i of one head. o, lse and mass point at the block's own results, or are NULL. */
static void attend(const work *w, int64_t b, int64_t h, int64_t i, double *o, double *lse,
                   double *mass)
{
    const sparge_problem *p = w->problem;
    const int64_t dim = p->dim, dim_v = p->dim_v, block_k = w->options->block_k;
    const int64_t first = i * w->options->block_q;
    const int64_t rows = least(w->options->block_q, p->q_len - first);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < dim; c++)
            w->block[r * dim + c] = element(&p->q, b, h, first + r, c);
    dequantize(w->q, w->block, rows * dim, 1, w->qk);
    const float *bias = p->k_bias;
    if (bias)
        bias += (b * p->kv_heads + h / (p->heads / p->kv_heads)) * p->k_len;
    for (int64_t j = 0; mass && j < w->k_blocks; j++)
        mass[j] = 0.0;

    for (int64_t r = 0; r < rows; r++) {
        int64_t last = p->k_len - 1; /* the last key that this row may see */
        if (w->options->causal != SPARGE_CAUSAL_NONE)
            last = first + r + (w->options->causal == SPARGE_CAUSAL_END ? p->k_len - p->q_len : 0);
        int64_t keys = 0;
        for (int64_t t = 0; t < p->k_len && t <= last; t++)
            if (kept(w, b, h, first + r, t) && !(bias && bias[t] == -INFINITY))
                w->key[keys++] = t;

        double top = -INFINITY, sum = 0.0, lost = 0.0;
        for (int64_t n = 0; n < keys; n++) {
            double dot = 0.0;
            for (int64_t c = 0; c < dim; c++)
                dot += w->q[r * dim + c] * w->k[w->key[n] * dim + c];
            w->weight[n] = w->softmax_scale * dot + (bias ? (double)bias[w->key[n]] : 0.0);
            top = fmax(top, w->weight[n]);
        }
        for (int64_t n = 0; n < keys; n++)
            sum += w->weight[n] = exp(w->weight[n] - top);
        for (int64_t c = 0; w->smooth && c < dim; c++) /* smoothing took this from every score */
            lost += w->softmax_scale * (double)w->block[r * dim + c] * (double)w->mean[c];
        if (lse)
            lse[r] = keys > 0 ? top + log(sum) + lost : -INFINITY;

        for (int64_t c = 0; o && c < dim_v; c++)
            o[r * dim_v + c] = 0.0;
        for (int64_t n = 0; n < keys; n++) {
            const double share = w->weight[n] / sum;
            for (int64_t c = 0; o && c < dim_v; c++)
                o[r * dim_v + c] += share * w->v[w->key[n] * dim_v + c];
            if (mass)
                mass[w->key[n] / block_k] += share / (double)rows;
        }
    }
}

sparge_status sparge_ref_oracle(const sparge_problem *problem, const sparge_options *options,
                                const sparge_mask *mask, sparge_oracle_mode mode, double *o,
                                double *lse, double *block_mass)
{
    const int64_t heads = problem->heads, q_len = problem->q_len, k_len = problem->k_len;
    const int64_t dim = problem->dim, dim_v = o ? problem->dim_v : 0;
    const int64_t block_q = options->block_q, block_k = options->block_k;
    work w = {.problem = problem, .options = options, .mask = mask};
    w.q_blocks = (q_len + block_q - 1) / block_q;
    w.k_blocks = (k_len + block_k - 1) / block_k;
    if (mode == SPARGE_ORACLE_CODES) {
        const bool upstream = options->rules == SPARGE_RULES_UPSTREAM;
        if (options->qk_dtype != SPARGE_F32) /* to real scores smoothing makes no difference */
            w.qk = options->qk_dtype == SPARGE_INT12 ? int12_of_qk
                   : upstream                        ? int8_of_upstream
                                                     : int8;
        switch (options->pv_dtype) {
        case SPARGE_INT8:
        case SPARGE_FASTEST: w.pv = int8; break;
        case SPARGE_INT12: w.pv = int12_of_pv; break;
        case SPARGE_F16: w.pv = binary16; break;
        case SPARGE_FP8: w.pv = e4m3; break;
        default: break;
        }
        w.smooth = options->smooth_k && options->qk_dtype != SPARGE_F32;
    }
    w.v_rows = w.pv.by_head ? k_len : block_k;
    w.softmax_scale =
        (double)(options->softmax_scale > 0.0f ? options->softmax_scale : 1.0f / sqrtf((float)dim));

    sparge_status status = SPARGE_OK;
    const size_t keys = (size_t)k_len + 1; /* one more than needed: calloc(0) may be NULL */
    w.block = calloc((size_t)(block_q + (w.v_rows > block_k ? w.v_rows : block_k)),
                     (size_t)(dim + dim_v) * sizeof(float));
    w.mean = calloc((size_t)dim + 1, sizeof(float));
    w.q = calloc((size_t)block_q, (size_t)(dim + 1) * sizeof(double));
    w.k = calloc(keys, (size_t)(dim + 1) * sizeof(double));
    w.v = calloc(keys, (size_t)(dim_v + 1) * sizeof(double));
    w.key = calloc(keys, sizeof(int64_t));
    w.weight = calloc(keys, sizeof(double));
    if (!w.block || !w.mean || !w.q || !w.k || !w.v || !w.key || !w.weight) {
        status = SPARGE_ERR_MEMORY;
        goto done;
    }

    const int64_t blocks = problem->batch * heads * w.q_blocks;
    for (int64_t at = 0; at < blocks && !status; at++) { /* blocks within heads within batches */
        const int64_t i = at % w.q_blocks, h = at / w.q_blocks % heads;
        const int64_t b = at / w.q_blocks / heads, group = heads / problem->kv_heads;
        if (i == 0 && h % group == 0)
            load_keys(&w, b, h / group, o != NULL);
        const int64_t row = at / w.q_blocks * q_len + i * block_q; /* in the packed outputs */
        attend(&w, b, h, i, o ? o + row * dim_v : NULL, lse ? lse + row : NULL,
               block_mass ? block_mass + at * w.k_blocks : NULL);
        if (options->progress &&
            !options->progress(options->user, (double)(at + 1) / (double)blocks))
            status = SPARGE_ERR_CANCELLED;
    }
done:
    free(w.block);
    free(w.mean);
    free(w.q);
    free(w.k);
    free(w.v);
    free(w.key);
    free(w.weight);
    return status;
}
