/* SPDX-License-Identifier: Apache-2.0 */
/* pack.c: one pass over q, k and v: while a block is in cache it is smoothed, pooled, judged, coded
 * and laid out for the matrix products (ref/block.c; Algorithm 1 lines 3 and 4). */
#include "common/element.h"
#include "common/quant.h"
#include "cpu/work.h"

sparge_rows sparge_rows_of(const sparge_in *in, int64_t heads, int64_t head, int64_t first,
                           int64_t rows, int64_t dim)
{
    const int64_t at = sparge_in_row(in, head / heads, head % heads, first);
    const char *data = (const char *)in->data + at * sparge_element_size(in->dtype);
    return (sparge_rows){data, in->dtype, in->token, rows, dim};
}

/* Key block n of the batch, of K or of V. */
static sparge_rows key_block(const sparge_work *w, const sparge_in *in, int64_t n, int64_t dim)
{
    const sparge_geometry *g = &w->g;
    const int64_t head = w->kv.first + n / g->k_blocks, j = n % g->k_blocks;
    return sparge_rows_of(in, w->p->kv_heads, head, j * g->block_k,
                          sparge_block_rows(g->k_len, g->block_k, j), dim);
}

/* ---- The mean key: f32 sums in a block, f64 over the blocks ---- */

void sparge_sum_keys(const sparge_work *w, sparge_scratch *t, int64_t n)
{
    const int64_t stride = w->kv.k.stride;
    const sparge_rows rows = key_block(w, &w->p->k, n, w->p->dim);
    w->kernels.sum(&rows, w->no_mean, stride, t->x, w->kv.pool + n * stride);
}

void sparge_mean_key(const sparge_work *w, int64_t head)
{
    const int64_t stride = w->kv.k.stride, blocks = w->g.k_blocks, dim = w->p->dim;
    const float *sum = w->kv.pool + head * blocks * stride;
    float *mean = w->kv.mean + head * stride;
    double total[SPARGE_MAX_DIM] = {0};
    for (int64_t j = 0; j < blocks; j++)
        for (int64_t c = 0; c < dim; c++)
            total[c] += (double)sum[j * stride + c];
    for (int64_t c = 0; c < dim; c++)
        mean[c] = sparge_mean(total[c], w->g.k_len);
    sparge_record_rows(w->intermediates->k_mean, w->kv.first + head, 1, dim, mean, stride,
                       sizeof *mean);
}

/* ---- Blocks ---- */

bool sparge_load_finite(const sparge_work *w, const sparge_rows *rows, const float *mean,
                        int64_t stride, sparge_dtype dtype, float *x)
{
    float max;
    return w->kernels.load(rows, mean, stride, x, &max) && sparge_value_is_finite(max, dtype);
}

/* Where a block stands in the recorded arrays: its first token, and itself. */
typedef struct place {
    int64_t token, block;
} place;

/* Line 4: the mean row of the block in x; returns its self-similarity. */
static float summarize(const sparge_work *w, sparge_scratch *t, const float *x, int64_t rows,
                       int64_t stride, float *pool, place at, float *pools, float *sims)
{
    const float sim = w->kernels.summarize(x, rows, stride, pool, t->unit_sum);
    sparge_record_rows(pools, at.block, 1, w->p->dim, pool, stride, sizeof *pool);
    sparge_record_rows(sims, at.block, 1, 1, &sim, 1, sizeof sim);
    return sim;
}

/* Rows of codes of a block, as the recorded array has them. */
static void record_codes(int16_t *codes, int64_t token, int64_t rows, int64_t dim, const void *code,
                         const sparge_operand *from)
{
    for (int64_t r = 0; codes && r < rows; r++)
        for (int64_t c = 0; c < dim; c++)
            codes[(token + r) * dim + c] =
                from->format == SPARGE_BYTES ? (int16_t)((const int8_t *)code)[r * from->stride + c]
                                             : ((const int16_t *)code)[r * from->stride + c];
}

/* Line 3 with one scale for the block in x, whose largest magnitude is `max`, as block n of the
 * operand: what its product takes for `x` in `code`, unless that is x. */
static void quantize(const sparge_work *w, const sparge_rows *rows, const float *x, float max,
                     const sparge_operand *to, int64_t n, place at, void *code, int16_t *codes,
                     float *scales)
{
    const int64_t elements = rows->rows * to->stride;
    float *scale = to->scale + n;
    *scale = to->qmax ? sparge_quant_scale(max, to->qmax) : 1.0f;
    if (to->format == SPARGE_PAIRS)
        w->kernels.round_pairs(x, elements, code);
    if (!to->qmax)
        return;
    w->kernels.quantize[to->format](x, elements, *scale, to->qmax, code);
    record_codes(codes, at.token, rows->rows, rows->dim, code, to);
    sparge_record_rows(scales, at.block, 1, 1, scale, 1, sizeof *scale);
}

static void pack_key(const sparge_work *w, sparge_scratch *t, int64_t n, place at)
{
    const sparge_kv_batch *kv = &w->kv;
    const sparge_intermediates *to = w->intermediates;
    const int64_t stride = kv->k.stride;
    const sparge_rows rows = key_block(w, &w->p->k, n, w->p->dim);
    const float *mean = w->o->smooth_k ? kv->mean + n / w->g.k_blocks * stride : w->no_mean;
    void *data = kv->k.data + n * kv->k.block;
    float *x = w->result && kv->k.format == SPARGE_FLOATS ? data : t->x, max;
    kv->nonfinite[n] = w->kernels.load(&rows, mean, stride, x, &max) ? 0 : SPARGE_NONFINITE_K;
    if (!sparge_value_is_finite(max, w->o->qk_dtype))
        kv->nonfinite[n] |= SPARGE_OVERFLOW_K;
    if (w->predicted)
        kv->sim[n] =
            summarize(w, t, x, rows.rows, stride, kv->pool + n * stride, at, to->k_pool, to->k_sim);
    if (!w->result)
        return;
    quantize(w, &rows, x, max, &kv->k, n, at, data, to->k_int, to->k_scale);
    w->kernels.pack_rows[kv->k.format](data, rows.rows, stride, kv->k.init + n * kv->k.inits);
}

static void pack_value(const sparge_work *w, sparge_scratch *t, int64_t n, place at)
{
    const sparge_operand *v = &w->kv.v;
    const sparge_intermediates *to = w->intermediates;
    const sparge_rows rows = key_block(w, &w->p->v, n, w->p->dim_v);
    float *scale = v->scale + n * v->scales;
    if (!sparge_load_finite(w, &rows, w->no_mean, v->stride, w->o->pv_dtype, t->x))
        w->kv.nonfinite[n] |= SPARGE_NONFINITE_V;
    if (v->format == SPARGE_PAIRS)
        w->kernels.round_pairs(t->x, rows.rows * v->stride, t->code);
    if (v->qmax) {
        w->kernels.quantize_channels[v->format](t->x, rows.rows, v->stride, v->qmax, scale,
                                                t->code);
        record_codes(to->v_int, at.token, rows.rows, rows.dim, t->code, v);
        sparge_record_rows(to->v_scale, at.block, 1, rows.dim, scale, v->scales, sizeof *scale);
    }
    w->kernels.pack_transposed[v->format](v->format == SPARGE_FLOATS ? t->x : t->code, rows.rows,
                                          v->stride, w->keys, v->data + n * v->block,
                                          v->init + n * v->inits);
}

void sparge_pack_kv(const sparge_work *w, sparge_scratch *t, int64_t n)
{
    const sparge_geometry *g = &w->g;
    const int64_t head = w->kv.first + n / g->k_blocks, j = n % g->k_blocks;
    const place at = {head * g->k_len + j * g->block_k, head * g->k_blocks + j};
    pack_key(w, t, n, at);
    if (w->result)
        pack_value(w, t, n, at);
}

void sparge_pack_query(const sparge_work *w, sparge_scratch *t, int64_t n)
{
    const sparge_geometry *g = &w->g;
    const sparge_operand *q = &w->q.operand;
    const sparge_intermediates *to = w->intermediates;
    sparge_q_block *block = &w->q.block[n];
    const int64_t first = block->i * g->block_q;
    const place at = {block->head * g->q_len + first, block->head * g->q_blocks + block->i};
    const sparge_rows rows =
        sparge_rows_of(&w->p->q, w->p->heads, block->head, first,
                       sparge_block_rows(g->q_len, g->block_q, block->i), w->p->dim);
    float max;
    block->finite = w->kernels.load(&rows, w->no_mean, q->stride, t->x, &max);
    block->fits = block->finite && sparge_value_is_finite(max, w->o->qk_dtype);
    if (w->predicted)
        block->sim = summarize(w, t, t->x, rows.rows, q->stride,
                               w->q.pool + block->index * q->stride, at, to->q_pool, to->q_sim);
    if (!w->result)
        return;
    quantize(w, &rows, t->x, max, q, block->index, at, t->code, to->q_int, to->q_scale);
    const char *from = q->format == SPARGE_FLOATS ? (const char *)t->x : t->code;
    const int64_t group = sparge_group_of(w, block->head), row = q->block / q->inits;
    for (int64_t r = 0, lane = 0; r < rows.rows; r += group, lane += sparge_padded(group))
        w->kernels.pack_columns[q->format](from + r * row, sparge_min(group, rows.rows - r),
                                           q->stride,
                                           q->data + block->index * q->block + lane * row,
                                           q->init + block->index * q->inits + lane);
}
