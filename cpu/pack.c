/* pack.c: one pass over q, k and v: while a block is in cache it is smoothed, pooled, judged, coded
 * and laid out for the matrix products (ref/block.c; Algorithm 1 lines 3 and 4). */
#include "cpu/work.h"

sparge_rows sparge_rows_of(const sparge_in *in, int64_t heads, int64_t head, int64_t first,
                           int64_t rows, int64_t dim)
{
    const int64_t size = in->dtype == SPARGE_F32 ? 4 : 2;
    const int64_t at = head / heads * in->batch + head % heads * in->head + first * in->token;
    return (sparge_rows){(const char *)in->data + at * size, in->dtype, in->token, rows, dim};
}

static sparge_rows key_block(const sparge_work *w, const sparge_in *in, int64_t n, int64_t j,
                             int64_t dim)
{
    const sparge_geometry *g = &w->g;
    return sparge_rows_of(in, w->p->kv_heads, w->first_kv + n, j * g->block_k,
                          sparge_block_rows(g->k_len, g->block_k, j), dim);
}

/* ---- The mean key: f32 sums in a block, f64 over the blocks ---- */

void sparge_pack_sum(const sparge_work *w, sparge_scratch *t, int64_t n, int64_t j)
{
    const sparge_rows rows = key_block(w, &w->p->k, n, j, w->p->dim);
    w->kernels.sum(&rows, w->no_mean, w->k.stride, t->x,
                   w->k_pool + (n * w->g.k_blocks + j) * w->k.stride);
}

void sparge_pack_mean(const sparge_work *w, int64_t n)
{
    float *mean = w->mean + n * w->k.stride;
    double total[SPARGE_MAX_DIM] = {0};
    for (int64_t j = 0; j < w->g.k_blocks; j++)
        for (int64_t c = 0; c < w->p->dim; c++)
            total[c] += (double)w->k_pool[(n * w->g.k_blocks + j) * w->k.stride + c];
    for (int64_t c = 0; c < w->p->dim; c++)
        mean[c] = w->g.k_len ? (float)(total[c] / (double)w->g.k_len) : 0.0f;
    sparge_trace_rows(w->intermediates->k_mean, w->first_kv + n, 1, w->p->dim, mean, w->k.stride,
                      sizeof(float));
}

/* ---- Blocks ---- */

void sparge_pack_key(const sparge_work *w, sparge_scratch *t, int64_t n, int64_t j)
{
    const sparge_operand *k = &w->k;
    const sparge_intermediates *intermediates = w->intermediates;
    const int64_t blocks = w->g.k_blocks, at = n * blocks + j,
                  line = (w->first_kv + n) * blocks + j;
    const sparge_rows rows = key_block(w, &w->p->k, n, j, w->p->dim);
    const bool finite = w->kernels.load(
        &rows, w->o->smooth_k ? w->mean + n * k->stride : w->no_mean, k->stride, t->x);
    w->bad[at] = finite ? 0 : SPARGE_BAD_KEY;
    if (w->predicted) {
        float *pool = w->k_pool + at * k->stride;
        w->k_sim[at] = w->kernels.summarize(t->x, rows.rows, k->stride, pool, t->unit);
        sparge_trace_rows(intermediates->k_pool, line, 1, w->p->dim, pool, k->stride,
                          sizeof(float));
        sparge_trace_rows(intermediates->k_sim, line, 1, 1, &w->k_sim[at], 1, sizeof(float));
    }
    if (!w->result)
        return;
    k->step[at] = 1.0f;
    if (k->qmax) {
        const int64_t first = (w->first_kv + n) * w->g.k_len + j * w->g.block_k;
        k->step[at] = w->kernels.quantize(t->x, rows.rows * k->stride, k->qmax, t->code);
        sparge_trace_rows(intermediates->k_int, first, rows.rows, w->p->dim, t->code, k->stride,
                          sizeof(int16_t));
        sparge_trace_rows(intermediates->k_scale, line, 1, 1, &k->step[at], 1, sizeof(float));
    }
    w->kernels.pack_keys[k->format](k->qmax ? (void *)t->code : t->x, rows.rows, k->stride,
                                    k->data + at * k->block, k->start + at * k->starts);
}

void sparge_pack_value(const sparge_work *w, sparge_scratch *t, int64_t n, int64_t j)
{
    const sparge_operand *v = &w->v;
    const int64_t blocks = w->g.k_blocks, at = n * blocks + j;
    const sparge_rows rows = key_block(w, &w->p->v, n, j, w->p->dim_v);
    if (!w->kernels.load(&rows, w->no_mean, v->stride, t->x))
        w->bad[at] |= SPARGE_BAD_VALUE;
    if (v->qmax) {
        const int64_t first = (w->first_kv + n) * w->g.k_len + j * w->g.block_k;
        float *step = v->step + at * v->steps;
        w->kernels.quantize_channels(t->x, rows.rows, v->stride, v->qmax, step, t->code);
        sparge_trace_rows(w->intermediates->v_int, first, rows.rows, w->p->dim_v, t->code,
                          v->stride, sizeof(int16_t));
        sparge_trace_rows(w->intermediates->v_scale, (w->first_kv + n) * blocks + j, 1, w->p->dim_v,
                          step, v->stride, sizeof(float));
    }
    w->kernels.pack_values[v->format](v->qmax ? (void *)t->code : t->x, rows.rows, v->stride,
                                      v->data + at * v->block, v->start + at * v->starts);
}

void sparge_pack_query(const sparge_work *w, sparge_scratch *t, sparge_task *task)
{
    const sparge_operand *q = &w->q;
    const sparge_intermediates *intermediates = w->intermediates;
    const sparge_geometry *g = &w->g;
    const int64_t at = task->slot, line = task->head * g->q_blocks + task->i,
                  first = task->i * g->block_q;
    const sparge_rows rows =
        sparge_rows_of(&w->p->q, w->p->heads, task->head, first,
                       sparge_block_rows(g->q_len, g->block_q, task->i), w->p->dim);
    task->finite = w->kernels.load(&rows, w->no_mean, q->stride, t->x);
    if (w->predicted) {
        float *pool = w->q_pool + at * q->stride;
        task->sim = w->kernels.summarize(t->x, rows.rows, q->stride, pool, t->unit);
        sparge_trace_rows(intermediates->q_pool, line, 1, w->p->dim, pool, q->stride,
                          sizeof(float));
        sparge_trace_rows(intermediates->q_sim, line, 1, 1, &task->sim, 1, sizeof(float));
    }
    if (!w->result)
        return;
    q->step[at] = 1.0f;
    if (q->qmax) {
        q->step[at] = w->kernels.quantize(t->x, rows.rows * q->stride, q->qmax, t->code);
        sparge_trace_rows(intermediates->q_int, task->head * g->q_len + first, rows.rows, w->p->dim,
                          t->code, q->stride, sizeof(int16_t));
        sparge_trace_rows(intermediates->q_scale, line, 1, 1, &q->step[at], 1, sizeof(float));
    }
    w->kernels.pack_rows[q->format](q->qmax ? (void *)t->code : t->x, rows.rows, q->stride,
                                    q->data + at * q->block, q->start + at * q->starts);
}
