/* SPDX-License-Identifier: Apache-2.0 */
/* pack.c: one pass over q, k and v: while a block is in cache it is smoothed, pooled, judged, coded
 * and laid out for the matrix products (ref/block.c; Algorithm 1 lines 3 and 4). */
#include "common/element.h"
#include "common/quant.h"
#include "common/select.h"
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

/* ---- Blocks: read once, slice after slice, then coded slice after slice. While a block is in
 * cache what is read after it comes from memory. ---- */

enum { SLICE = 8 }; /* rows that stay in L1 from kernel to kernel */

/* Where a block stands in the recorded arrays: its first token, and itself. */
typedef struct place {
    int64_t token, block;
} place;

typedef struct block {
    place at;
    sparge_rows rows;
    sparge_rows next; /* what is read after them */
    int64_t ahead;    /* rows of it that each slice of a sweep fetches */
    int64_t fetched;  /* rows of it that are on their way */
    int64_t stride;
    int64_t cell; /* rows of a cell */
    float *x;     /* [rows][stride] */
    float max;    /* the largest magnitude */
    bool finite;  /* every element is */
} block;

/* As many rows as a slice has, but half of them if a second sweep follows, to codes. */
static int64_t rows_ahead(const sparge_work *w, const sparge_operand *to)
{
    return w->result && to->format != SPARGE_FLOATS ? SLICE / 2 : SLICE;
}

static void fetch(block *b)
{
    const int64_t size = sparge_element_size(b->next.dtype);
    const int64_t end = sparge_min(b->next.rows, b->fetched + b->ahead);
    for (; b->fetched < end; b->fetched++) {
        const char *row = (const char *)b->next.data + b->fetched * b->next.token * size;
        for (int64_t byte = 0; byte < b->next.dim * size; byte += 64)
            __builtin_prefetch(row + byte, 0, 2);
    }
}

/* Adds rows [first, first + rows) of the block to the pools of their cells, and to unit_sum. */
static void sum_cells(const sparge_work *w, const block *b, int64_t first, int64_t rows,
                      float *pool, float *unit_sum)
{
    const int64_t end = first + rows;
    for (int64_t r = first, next; r < end; r = next) {
        next = sparge_min(end, (r / b->cell + 1) * b->cell);
        w->kernels.sum_units(b->x + r * b->stride, next - r, b->stride,
                             pool + r / b->cell * b->stride, unit_sum);
    }
}

/* x is the block less the mean. Rows are summed up in pool and unit_sum, and largest magnitudes of
 * channels in `most`, unless these are NULL. */
static void read_block(const sparge_work *w, block *b, const float *mean, float *pool,
                       float *unit_sum, float *most)
{
    const int64_t size = sparge_element_size(b->rows.dtype);
    b->finite = true;
    b->max = 0.0f;
    for (int64_t r = 0; r < b->rows.rows; r += SLICE) {
        float *x = b->x + r * b->stride, max;
        sparge_rows some = b->rows;
        some.data = (const char *)some.data + r * some.token * size;
        some.rows = sparge_min(SLICE, b->rows.rows - r);
        b->finite &= w->kernels.load(&some, mean, b->stride, x, &max);
        b->max = fmaxf(b->max, max);
        if (pool)
            sum_cells(w, b, r, some.rows, pool, unit_sum);
        if (most)
            w->kernels.channel_max(x, some.rows, b->stride, most);
        fetch(b);
    }
}

bool sparge_load_finite(const sparge_work *w, const sparge_rows *rows, const float *mean,
                        int64_t stride, sparge_dtype dtype, float *x)
{
    float max;
    return w->kernels.load(rows, mean, stride, x, &max) && sparge_value_is_finite(max, dtype);
}

/* Reads the block, and line 4: its mean row, or those of its cells; returns its self-similarity. */
static float summarize(const sparge_work *w, sparge_scratch *t, block *b, const float *mean,
                       float *pool, float *pools, float *sims)
{
    const int64_t cells = sparge_ceil_div(b->rows.rows, b->cell);
    memset(pool, 0, (size_t)(cells * b->stride) * sizeof *pool);
    memset(t->unit_sum, 0, (size_t)b->stride * sizeof *t->unit_sum);
    read_block(w, b, mean, pool, t->unit_sum, NULL);
    if (w->o->cell)
        w->kernels.cell_means(pool, b->rows.rows, b->cell, b->stride);
    for (int64_t c = 0; c < b->stride && !w->o->cell; c++)
        pool[c] /= (float)b->rows.rows;
    const float square = w->kernels.dot(t->unit_sum, t->unit_sum, b->stride);
    const float sim = sparge_mean_cosine(square, b->rows.rows);
    if (!w->o->cell)
        sparge_record_rows(pools, b->at.block, 1, w->p->dim, pool, b->stride, sizeof *pool);
    sparge_record_rows(sims, b->at.block, 1, 1, &sim, 1, sizeof sim);
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

/* Line 3: what the product takes for x, unless that is x: codes under one scale, or under one for
 * each channel, whose inverses are in t. */
static void code_block(const sparge_work *w, sparge_scratch *t, block *b, const sparge_operand *to,
                       const float *scale, void *code, int16_t *codes, float *scales)
{
    const sparge_kernels *k = &w->kernels;
    const bool by_channel = to->scales > 1;
    for (int64_t r = 0; r < b->rows.rows && to->format != SPARGE_FLOATS; r += SLICE) {
        const int64_t rows = sparge_min(SLICE, b->rows.rows - r), n = rows * b->stride;
        const float *x = b->x + r * b->stride;
        void *at = (char *)code + r * b->stride * (to->format == SPARGE_BYTES ? 1 : 2);
        if (to->format == SPARGE_PAIRS)
            k->round_pairs(x, n, at);
        else if (by_channel)
            k->quantize_channels[to->format](x, rows, b->stride, scale, t->inverse, to->qmax, at);
        else
            k->quantize[to->format](x, n, *scale, to->qmax, at);
        fetch(b);
    }
    if (!to->qmax)
        return;
    record_codes(codes, b->at.token, b->rows.rows, b->rows.dim, code, to);
    sparge_record_rows(scales, b->at.block, 1, by_channel ? b->rows.dim : 1, scale, to->scales,
                       sizeof *scale);
}

/* Of the whole block: 1 without codes. */
static float scale_of(const sparge_operand *to, const block *b)
{
    return to->qmax ? sparge_quant_scale(b->max, to->qmax) : 1.0f;
}

static void pack_key(const sparge_work *w, sparge_scratch *t, int64_t n, block b)
{
    const sparge_kv_batch *kv = &w->kv;
    const sparge_operand *k = &kv->k;
    const sparge_intermediates *to = w->intermediates;
    const float *mean = w->o->smooth_k ? kv->mean + n / w->g.k_blocks * k->stride : w->no_mean;
    void *data = k->data + n * k->block;
    b.rows = key_block(w, &w->p->k, n, w->p->dim);
    b.ahead = rows_ahead(w, k);
    b.stride = k->stride;
    b.cell = w->g.block_k / w->cells_k;
    b.x = w->result && k->format == SPARGE_FLOATS ? data : t->x;
    if (w->predicted)
        kv->sim[n] =
            summarize(w, t, &b, mean, kv->pool + n * w->cells_k * k->stride, to->k_pool, to->k_sim);
    else
        read_block(w, &b, mean, NULL, NULL, NULL);
    kv->nonfinite[n] = b.finite ? 0 : SPARGE_NONFINITE_K;
    if (!sparge_value_is_finite(b.max, w->o->qk_dtype))
        kv->nonfinite[n] |= SPARGE_OVERFLOW_K;
    if (!w->result)
        return;
    k->scale[n] = scale_of(k, &b);
    code_block(w, t, &b, k, k->scale + n, data, to->k_int, to->k_scale);
    w->kernels.pack_rows[k->format](data, b.rows.rows, k->stride, k->init + n * k->inits);
}

static void pack_value(const sparge_work *w, sparge_scratch *t, int64_t n, block b)
{
    const sparge_operand *v = &w->kv.v;
    const sparge_intermediates *to = w->intermediates;
    float *scale = v->scale + n * v->scales;
    b.rows = key_block(w, &w->p->v, n, w->p->dim_v);
    b.ahead = rows_ahead(w, v);
    b.stride = v->stride;
    b.x = t->x;
    memset(scale, 0, (size_t)v->scales * sizeof *scale);
    read_block(w, &b, w->no_mean, NULL, NULL, v->qmax ? scale : NULL);
    if (!b.finite || !sparge_value_is_finite(b.max, w->o->pv_dtype))
        w->kv.nonfinite[n] |= SPARGE_NONFINITE_V;
    for (int64_t c = 0; c < v->scales; c++) {
        scale[c] = sparge_quant_scale(scale[c], v->qmax);
        t->inverse[c] = sparge_quant_inverse(scale[c]);
    }
    code_block(w, t, &b, v, scale, t->code, to->v_int, to->v_scale);
    w->kernels.pack_transposed[v->format](v->format == SPARGE_FLOATS ? t->x : t->code, b.rows.rows,
                                          v->stride, w->keys, v->data + n * v->block,
                                          v->init + n * v->inits);
}

void sparge_pack_kv(const sparge_work *w, sparge_scratch *t, int64_t n)
{
    const sparge_geometry *g = &w->g;
    const int64_t head = w->kv.first + n / g->k_blocks, j = n % g->k_blocks;
    const int64_t last = (w->kv.end - w->kv.first) * g->k_blocks - 1;
    block b = {.at = {head * g->k_len + j * g->block_k, head * g->k_blocks + j}};
    const sparge_rows k = key_block(w, &w->p->k, sparge_min(n + 1, last), w->p->dim);
    if (w->result)
        b.next = key_block(w, &w->p->v, n, w->p->dim_v);
    else
        b.next = k;
    pack_key(w, t, n, b);
    b.next = k;
    if (w->result)
        pack_value(w, t, n, b);
}

static sparge_rows query_block(const sparge_work *w, const sparge_q_block *q)
{
    const sparge_geometry *g = &w->g;
    return sparge_rows_of(&w->p->q, w->p->heads, q->head, q->i * g->block_q,
                          sparge_block_rows(g->q_len, g->block_q, q->i), w->p->dim);
}

void sparge_pack_query(const sparge_work *w, sparge_scratch *t, int64_t n)
{
    const sparge_geometry *g = &w->g;
    const sparge_operand *q = &w->q.operand;
    const sparge_intermediates *to = w->intermediates;
    sparge_q_block *block_q = &w->q.block[n];
    const int64_t index = block_q->index, line = block_q->head * g->q_blocks + block_q->i;
    block b = {
        .at = {block_q->head * g->q_len + block_q->i * g->block_q, line},
        .rows = query_block(w, block_q),
        .next = query_block(w, &w->q.block[sparge_min(n + 1, w->q.count - 1)]),
        .ahead = rows_ahead(w, q),
        .stride = q->stride,
        .cell = g->block_q / w->cells_q,
        .x = t->x,
    };
    if (w->predicted)
        block_q->sim = summarize(w, t, &b, w->no_mean, w->q.pool + index * w->cells_q * q->stride,
                                 to->q_pool, to->q_sim);
    else
        read_block(w, &b, w->no_mean, NULL, NULL, NULL);
    block_q->finite = b.finite;
    block_q->fits = b.finite && sparge_value_is_finite(b.max, w->o->qk_dtype);
    if (!w->result)
        return;
    q->scale[index] = scale_of(q, &b);
    code_block(w, t, &b, q, q->scale + index, t->code, to->q_int, to->q_scale);
    const char *from = q->format == SPARGE_FLOATS ? (const char *)t->x : t->code;
    const int64_t group = sparge_group_of(w, block_q->head), row = q->block / q->inits;
    for (int64_t r = 0, lane = 0; r < b.rows.rows; r += group, lane += sparge_padded(group))
        w->kernels.pack_columns[q->format](from + r * row, sparge_min(group, b.rows.rows - r),
                                           q->stride, q->data + index * q->block + lane * row,
                                           q->init + index * q->inits + lane);
}
