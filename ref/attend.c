/* attend.c: stage 2, int8 FlashAttention over the blocks that the mask kept.
 * Algorithm 1 lines 3 and 7-22; the second skip, lambda, is lines 14-16. */
#include "common/block_mask.h"
#include "ref/stage.h"

/* Line 3: one head in codes. */
void sparge_ref_codes(const sparge_ref_attender *w, const sparge_in *in, int64_t b, int64_t h,
                      int64_t len, const float *mean, const sparge_ref_operand *to)
{
    for (int64_t n = 0; n * to->block < len; n++) {
        const int64_t first = n * to->block, rows = sparge_block_rows(len, to->block, n);
        float *x = to->qmax ? w->x : &to->value[first * to->dim];
        sparge_ref_load(in, b, h, first, rows, to->dim, mean, x, &to->bad[first * to->dim]);
        int16_t *code = to->qmax ? &to->code[first * to->dim] : NULL;
        if (!code)
            to->step[n] = 1.0f;
        else if (!to->by_channel)
            to->step[n] = sparge_ref_quantize(x, rows * to->dim, 1, to->qmax, to->slack, code);
        else
            for (int64_t c = 0; c < to->dim; c++)
                to->step[n * to->dim + c] =
                    sparge_ref_quantize(x + c, rows, to->dim, to->qmax, to->slack, code + c);
    }
}

/* Line 10: S = Q_i K_j^T, exact in int32. */
void sparge_ref_score(const sparge_ref_operand *q, const sparge_ref_operand *k,
                      sparge_ref_tile *tile)
{
    for (int64_t r = 0; r < tile->rows; r++)
        for (int64_t t = 0; t < tile->keys; t++) {
            const int16_t *a = &q->code[(tile->first_q + r) * q->dim];
            const int16_t *b = &k->code[(tile->first_k + t) * k->dim];
            int32_t sum = 0;
            for (int64_t c = 0; c < q->dim; c++)
                sum += a[c] * b[c];
            tile->s[r * tile->keys + t] = (float)sum;
        }
}

/* Line 11: m_local of every row. */
static void local_maxima(const sparge_geometry *g, int64_t j, sparge_ref_tile *tile)
{
    for (int64_t r = 0; r < tile->rows; r++) {
        tile->seen[r] = sparge_keys_visible(g, tile->first_q + r, j);
        float most = -INFINITY;
        for (int64_t t = 0; t < tile->seen[r]; t++) {
            const float s = tile->s[r * tile->keys + t];
            most = s > most || s != s ? s : most; /* a NaN stays */
        }
        tile->most[r] = most;
        tile->local[r] = tile->seen[r] ? sparge_row_local(most, tile->c) : -INFINITY;
    }
}

/* Lines 12, 13 and 16 for one row. P is coded against the row's largest score in this tile, which
 * uses all of the codes; `weight` carries the tile's sums over to the running maximum. l adds the
 * codes that o adds, so V = 1 gives 1. */
void sparge_ref_weigh(const sparge_ref_operand *v, int p_qmax, sparge_ref_tile *tile, int64_t r)
{
    sparge_row *state = &tile->state[r];
    const float shrink = sparge_row_update_max(state, tile->local[r]);
    const float weight = sparge_code_weight(tile->local[r], state->max, p_qmax);

    int32_t sum = 0;
    memset(tile->product, 0, (size_t)v->dim * sizeof *tile->product);
    for (int64_t t = 0; t < tile->seen[r]; t++) {
        const int32_t code =
            sparge_weight_code(tile->s[r * tile->keys + t], tile->most[r], tile->c, p_qmax);
        const int16_t *v_code = &v->code[(tile->first_k + t) * v->dim];
        sum += code;
        for (int64_t c = 0; c < v->dim; c++)
            tile->product[c] += code * v_code[c];
    }

    float *o = &tile->o[r * v->dim];
    const float *v_step = &v->step[tile->first_k / v->block * v->dim];
    state->sum += weight * (float)sum;
    for (int64_t c = 0; c < v->dim; c++)
        o[c] = fmaf(weight * v_step[c], (float)tile->product[c], o[c] * shrink);
}

/* Lines 14-16: a group of rows skips the tile when none of them comes near its maximum. */
static void fold(const sparge_ref_attender *w, float lambda)
{
    sparge_ref_tile tile = w->tile;
    for (int64_t r0 = 0; r0 < tile.rows; r0 += w->o->skip_rows) {
        const int64_t r1 = sparge_min(tile.rows, r0 + w->o->skip_rows);
        float gap = -INFINITY;
        for (int64_t r = r0; r < r1; r++)
            gap = fmaxf(gap, sparge_row_gap(&tile.state[r], tile.local[r], tile.seen[r] > 0));
        const bool skips = sparge_group_skips(gap, lambda);
        for (int64_t r = r0; r < r1; r++) {
            tile.done[r] = !skips;
            if (tile.seen[r] && !skips)
                w->mode.weigh(&w->v, w->mode.p_qmax, &tile, r);
            else if (tile.seen[r] && w->mode.skipped)
                w->mode.skipped(&tile, r);
        }
    }
}

/* Lines 7-19: one query block through its kept key blocks, in ascending order. */
void sparge_ref_attend_block(sparge_ref_attender *w, int64_t i, const uint32_t *kept, float lambda)
{
    const sparge_geometry *g = &w->g;
    const int64_t visible = sparge_blocks_visible(g, i);
    sparge_ref_tile *tile = &w->tile;
    tile->first_q = i * g->block_q;
    tile->rows = sparge_block_rows(g->q_len, g->block_q, i);
    for (int64_t r = 0; r < tile->rows; r++)
        tile->state[r] = sparge_row_empty();
    memset(tile->o, 0, (size_t)(tile->rows * w->v.dim) * sizeof *tile->o);

    int64_t left = sparge_mask_row_count(kept, visible);
    for (int64_t j = sparge_mask_row_next(kept, 0, visible); j < visible;
         j = sparge_mask_row_next(kept, j + 1, visible), left--) {
        tile->first_k = j * g->block_k;
        tile->keys = sparge_block_rows(g->k_len, g->block_k, j);
        tile->c = w->q.step[i] * w->k.step[j] * w->o->softmax_scale * SPARGE_LOG2E;
        w->mode.score(&w->q, &w->k, tile);
        local_maxima(g, j, tile);
        fold(w, left > w->mode.never_skip ? lambda : -INFINITY);
        sparge_ref_spoil(w);
        sparge_ref_count(w, j);
    }
}
