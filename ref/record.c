/* SPDX-License-Identifier: Apache-2.0 */
/* record.c: what is told beside o: intermediates, rows that met an element that is not finite,
 * counts. */
#include "ref/ref.h"

void sparge_ref_record(void *array, int64_t at, const void *from, int64_t n, size_t size)
{
    if (array && n)
        memcpy((char *)array + (size_t)(at * n) * size, from, (size_t)n * size);
}

void sparge_ref_record_codes(const sparge_ref_tensor *t, int64_t head, int16_t *code, float *scale)
{
    if (!t->qmax)
        return;
    sparge_ref_record(code, head, t->code, t->tokens * t->dim, sizeof *code);
    sparge_ref_record(scale, head, t->scale, sparge_ceil_div(t->tokens, t->block) * t->scales, 4);
}

void sparge_ref_record_rows(const sparge_ref_work *w)
{
    const sparge_ref_tile *tile = &w->tile;
    for (int64_t r = 0; r < tile->rows; r++) {
        const int64_t line = w->n * w->q.tokens + tile->first_q + r;
        sparge_ref_record(w->intermediates->m, line, &tile->row[r].max, 1, 4);
        sparge_ref_record(w->intermediates->l, line, &tile->row[r].sum, 1, 4);
    }
    sparge_ref_record(w->intermediates->pv_done, w->n * w->g.q_blocks + tile->i, w->pv_done,
                      w->g.k_blocks, 4);
}

static bool any(const bool *flag, int64_t n)
{
    for (int64_t e = 0; e < n; e++)
        if (flag[e])
            return true;
    return false;
}

void sparge_ref_record_queries(sparge_ref_work *w)
{
    const sparge_ref_tile *tile = &w->tile;
    w->tally.pairs += sparge_blocks_visible(&w->g, tile->i);
    for (int64_t r = 0; r < tile->rows; r++) {
        w->row_nonfinite[r] = any(&w->q.nonfinite[(tile->first_q + r) * w->q.dim], w->q.dim);
        w->tally.tokens += sparge_keys_of_query(&w->g, tile->first_q + r);
    }
    for (int64_t j = 0; j < w->g.k_blocks; j++)
        w->pv_done[j] = 0.0f;
}

/* A non-finite key makes NaN of the rows that see it; a non-finite element of V, of its channel of
 * those rows, if they computed P.V. */
static void mark_nonfinite(sparge_ref_work *w)
{
    const sparge_ref_tile *tile = &w->tile;
    for (int64_t t = 0; t < tile->keys; t++) {
        const bool *v = &w->v.nonfinite[(tile->first_k + t) * w->v.dim];
        const bool k = any(&w->k.nonfinite[(tile->first_k + t) * w->k.dim], w->k.dim);
        if (!k && !any(v, w->v.dim))
            continue;
        for (int64_t r = 0; r < tile->rows; r++) {
            if (t >= tile->visible[r] || tile->hidden[r * tile->keys + t])
                continue;
            w->row_nonfinite[r] |= k;
            for (int64_t c = 0; tile->done[r] && c < w->v.dim; c++)
                if (v[c])
                    tile->o[r * w->v.dim + c] = NAN;
        }
    }
}

void sparge_ref_record_tile(sparge_ref_work *w)
{
    const sparge_ref_tile *tile = &w->tile;
    int64_t done = 0;
    for (int64_t r = 0; r < tile->rows; r++) {
        done += tile->done[r];
        sparge_tally_rows(&w->tally, &w->g, tile->i, 1, tile->visible[r], tile->attended[r],
                          tile->done[r]);
    }
    mark_nonfinite(w);
    w->tally.qk_done++;
    w->pv_done[tile->j] = (float)done / (float)tile->rows;
}
