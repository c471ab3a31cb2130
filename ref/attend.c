/* SPDX-License-Identifier: Apache-2.0 */
/* attend.c: int8 FlashAttention over the blocks that the mask kept.
 * Algorithm 1 lines 3 and 7-21; the second skip, lambda, is lines 14-16. */
#include "common/block_mask.h"
#include "common/element.h"
#include "common/quant.h"
#include "common/thresholds.h"
#include "ref/ref.h"

/* Line 3: one head in codes. */
void sparge_ref_codes(sparge_ref_tensor *t, float slack)
{
    for (int64_t n = 0; n * t->block < t->tokens; n++) {
        const int64_t at = n * t->block * t->dim,
                      elements = sparge_block_rows(t->tokens, t->block, n) * t->dim / t->scales;
        for (int64_t c = 0; c < t->scales; c++)
            t->scale[n * t->scales + c] = sparge_ref_quantize(&t->x[at + c], elements, t->scales,
                                                              t->qmax, slack, &t->code[at + c]);
    }
}

/* Line 10: S = Q_i K_j^T, exact in int32. */
void sparge_ref_score(sparge_ref_work *w)
{
    sparge_ref_tile *tile = &w->tile;
    tile->scale = sparge_score_scale(w->q.scale[tile->i], w->k.scale[tile->j], w->o->softmax_scale);
    for (int64_t r = 0; r < tile->rows; r++)
        for (int64_t t = 0; t < tile->keys; t++) {
            const int16_t *q = &w->q.code[(tile->first_q + r) * w->q.dim];
            const int16_t *k = &w->k.code[(tile->first_k + t) * w->k.dim];
            int32_t sum = 0;
            for (int64_t c = 0; c < w->q.dim; c++)
                sum += q[c] * k[c];
            tile->s[r * tile->keys + t] = (float)sum;
        }
}

/* Which pairs of the tile are attended. */
static void hide(sparge_ref_work *w)
{
    sparge_ref_tile *tile = &w->tile;
    const sparge_geometry *g = &w->g;
    const int64_t words = sparge_mask_row_words(g->block_k);
    const uint32_t *partial = sparge_mask_partial_at(w->mask, w->n * g->q_blocks + tile->i, tile->j,
                                                     g->block_q, g->block_k);
    for (int64_t r = 0; r < tile->rows; r++) {
        tile->visible[r] = sparge_keys_visible(g, tile->first_q + r, tile->j);
        tile->attended[r] = 0;
        for (int64_t t = 0; t < tile->visible[r]; t++) {
            const bool by_mask = partial && !sparge_mask_row_get(partial + r * words, t);
            const bool by_bias = w->k_bias && sparge_bias_hides(w->k_bias[tile->first_k + t]);
            tile->hidden[r * tile->keys + t] = by_mask || by_bias;
            tile->attended[r] += !by_mask && !by_bias;
        }
    }
}

static void add_bias(sparge_ref_work *w)
{
    sparge_ref_tile *tile = &w->tile;
    if (!w->k_bias)
        return;
    for (int64_t r = 0; r < tile->rows; r++)
        for (int64_t t = 0; t < tile->keys; t++) {
            float *s = &tile->s[r * tile->keys + t];
            *s = sparge_score_biased(*s, tile->scale, w->k_bias[tile->first_k + t]);
        }
    tile->scale = 1.0f;
}

/* Line 11: m_local of every row. */
static void local_maxima(sparge_ref_tile *tile)
{
    for (int64_t r = 0; r < tile->rows; r++) {
        float most = -INFINITY;
        for (int64_t t = 0; t < tile->visible[r]; t++) {
            const float s = tile->s[r * tile->keys + t];
            if (!tile->hidden[r * tile->keys + t])
                most = s > most || s != s ? s : most; /* a NaN stays */
        }
        tile->most[r] = most;
        tile->local[r] = tile->attended[r] ? sparge_row_local(most, tile->scale) : -INFINITY;
    }
}

/* Lines 12, 13 and 16 for one row. P is coded against the row's largest score in this tile, which
 * uses all of the codes; `weight` carries the tile's sums over to the running maximum. l adds the
 * codes that o adds, so V = 1 gives 1. */
void sparge_ref_accumulate_pv(sparge_ref_work *w, int64_t r)
{
    sparge_ref_tile *tile = &w->tile;
    const sparge_ref_tensor *v = &w->v;
    const int qmax = w->mode.p_qmax;
    const float shrink = sparge_row_update_max(&tile->row[r], tile->local[r]);
    const float weight = sparge_code_weight(tile->local[r], tile->row[r].max, qmax);

    int32_t sum = 0;
    memset(tile->product, 0, (size_t)v->dim * sizeof *tile->product);
    for (int64_t t = 0; t < tile->visible[r]; t++) {
        if (tile->hidden[r * tile->keys + t])
            continue;
        const int32_t p =
            sparge_weight_code(tile->s[r * tile->keys + t], tile->most[r], tile->scale, qmax);
        sum += p;
        for (int64_t c = 0; c < v->dim; c++)
            tile->product[c] += p * v->code[(tile->first_k + t) * v->dim + c];
    }

    float *o = &tile->o[r * v->dim];
    const float *v_scale = &v->scale[tile->j * v->dim];
    tile->row[r].sum += weight * (float)sum;
    for (int64_t c = 0; c < v->dim; c++)
        o[c] = fmaf(weight * v_scale[c], (float)tile->product[c], o[c] * shrink);
}

/* Lines 14-16: a group of rows skips the tile when none of them comes near its maximum. */
static void skip_groups(sparge_ref_work *w, float lambda)
{
    sparge_ref_tile *tile = &w->tile;
    for (int64_t r0 = 0; r0 < tile->rows; r0 += w->o->skip_rows) {
        const int64_t r1 = sparge_min(tile->rows, r0 + w->o->skip_rows);
        float gap = -INFINITY;
        for (int64_t r = r0; r < r1; r++)
            gap = fmaxf(gap, sparge_row_gap(&tile->row[r], tile->local[r], tile->attended[r] > 0));
        const bool skips = sparge_group_skips(gap, lambda);
        for (int64_t r = r0; r < r1; r++) {
            tile->done[r] = !skips;
            if (tile->attended[r] && !skips)
                w->mode.accumulate_pv(w, r);
            else if (tile->attended[r] && w->mode.skipped)
                w->mode.skipped(w, r);
        }
    }
}

/* Lines 20-21 for one row: o / l, and lse in natural units with the mean key put back. */
static void finish_row(const sparge_ref_work *w, int64_t r)
{
    const sparge_ref_tile *tile = &w->tile;
    const sparge_out *out = &w->result->o;
    const int64_t token = tile->first_q + r, at = sparge_out_row(out, w->b, w->h, token);
    const float *q = &w->q.x[token * w->q.dim];
    const float q_dot_mean = w->mean ? sparge_dot(q, w->mean, w->q.dim) : 0.0f;
    const sparge_row row = w->row_nonfinite[r] ? sparge_row_nonfinite(tile->row[r]) : tile->row[r];
    const float norm = sparge_row_norm(&row);
    if (w->result->lse)
        w->result->lse[w->n * w->q.tokens + token] =
            sparge_row_lse_smoothed(&row, w->o->softmax_scale * q_dot_mean);
    for (int64_t c = 0; c < w->v.dim; c++)
        sparge_element_store(out->data, out->dtype, at + c,
                             tile->o[r * w->v.dim + c] * norm * w->v_scale[c]);
}

/* Lines 7-21: one query block through its kept key blocks, in ascending order. */
void sparge_ref_attend_block(sparge_ref_work *w, int64_t i)
{
    const uint32_t *kept =
        w->mask ? w->mask->bits + (w->n * w->g.q_blocks + i) * w->mask->words : NULL;
    const int64_t visible = sparge_blocks_visible(&w->g, i);
    const float lambda = sparge_thresholds_of(w->o, w->h)->lambda;
    sparge_ref_tile *tile = &w->tile;
    tile->i = i;
    tile->first_q = i * w->g.block_q;
    tile->rows = sparge_block_rows(w->g.q_len, w->g.block_q, i);
    for (int64_t r = 0; r < tile->rows; r++)
        tile->row[r] = sparge_row_empty();
    memset(tile->o, 0, (size_t)(tile->rows * w->v.dim) * sizeof *tile->o);
    sparge_ref_record_queries(w);

    int64_t left = sparge_mask_row_count(kept, visible);
    for (int64_t j = sparge_mask_row_next(kept, 0, visible); j < visible;
         j = sparge_mask_row_next(kept, j + 1, visible), left--) {
        tile->j = j;
        tile->first_k = j * w->g.block_k;
        tile->keys = sparge_block_rows(w->g.k_len, w->g.block_k, j);
        w->mode.score(w);
        hide(w);
        add_bias(w);
        local_maxima(tile);
        skip_groups(w, left > w->mode.never_skip ? lambda : -INFINITY);
        sparge_ref_record_tile(w);
    }
    for (int64_t r = 0; r < tile->rows; r++)
        finish_row(w, r);
    sparge_ref_record_rows(w);
}
