/* SPDX-License-Identifier: Apache-2.0 */
/* tile.c: one query block through its kept key blocks (ref/attend.c; Algorithm 1 lines 7-21), a
 * group of queries at a time: those that decide lambda together. A query is a lane. */
#include "common/block_mask.h"
#include "common/element.h"
#include "common/quant.h"
#include "cpu/work.h"

/* K and V of so many bytes go through one group of a query block before the next begins: O of the
 * group stays near, and they in L2. */
enum { CHUNK_BYTES = 256 << 10 };

/* A group of queries of block i over key block j. */
typedef struct tile {
    int64_t first, queries;  /* first token, how many */
    int64_t lane, lanes;     /* first lane in the block; how many with the padding */
    int64_t j, n, next;      /* key block of the head, of the kv batch; the one after it there */
    int64_t keys, depth;     /* real ones, padded */
    const uint32_t *partial; /* bits of the first query; NULL: the mask hides nothing */
    const float *bias;       /* [keys]; NULL: none */
    bool hides;              /* some pair may be hidden: sparge_scratch says which */
} tile;

/* Of query r of the tile. */
static int64_t visible_of(const sparge_work *w, const tile *x, int64_t r)
{
    return sparge_min(x->keys, sparge_keys_visible(&w->g, x->first + r, x->j));
}

/* A loop of it becomes vectors, which one of __builtin_popcount does not on every processor. */
static inline int32_t ones(uint32_t x)
{
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0fu;
    x += x >> 8;
    return (int32_t)((x + (x >> 16)) & 63u);
}

/* Which keys each query attends to: those that causality and the length of the block let it see and
 * that neither the mask nor a bias hides. Returns how many pairs. */
static int64_t look(const sparge_work *w, sparge_scratch *t, const tile *x)
{
    const int64_t words = sparge_mask_row_words(x->depth),
                  row = sparge_mask_row_words(w->g.block_k);
    int64_t pairs = 0;
    memset(t->attends, 0, (size_t)x->lanes * sizeof *t->attends);
    for (int64_t at = 0; at < words; at++) {
        uint32_t open = ~0u;
        for (int64_t key = 32 * at; x->bias && key < sparge_min(x->keys, 32 * at + 32); key++)
            open ^= (uint32_t)sparge_bias_hides(x->bias[key]) << key % 32;
        for (int64_t q0 = 0; q0 < x->lanes; q0 += SPARGE_PANEL) {
            uint32_t *to = t->attended + q0 * words + at * SPARGE_PANEL;
            for (int64_t r = q0; r < q0 + SPARGE_PANEL; r++) {
                const bool by_mask = x->partial && r < x->queries && 32 * at < x->keys;
                to[r - q0] = open & sparge_mask_row_word(by_mask ? x->partial + r * row : NULL, at,
                                                         visible_of(w, x, r));
            }
            for (int64_t n = 0; n < SPARGE_PANEL; n++)
                t->attends[q0 + n] += ones(to[n]);
        }
    }
    for (int64_t r = 0; r < x->queries; r++)
        pairs += t->attends[r];
    return pairs;
}

/* Does query r attend to some key? Where nothing may be hidden, to all. */
static bool sees(const sparge_scratch *t, const tile *x, int64_t r)
{
    return !x->hides || t->attends[r] > 0;
}

/* Queries without a number above -inf: one that sees nothing has no m_local, one that sees scores
 * of -inf alone is not empty any more. */
static void mend_maxima(sparge_scratch *t, const tile *x)
{
    for (int64_t r = 0; r < x->queries; r++) {
        sparge_row row = {t->max[x->lane + r], t->sum[x->lane + r]};
        if (t->local[r] > -INFINITY)
            continue;
        if (!sees(t, x, r))
            t->local[r] = -INFINITY;
        else if (t->local[r] == -INFINITY)
            sparge_row_update_max(&row, -INFINITY);
        t->sum[x->lane + r] = row.sum;
    }
}

/* Lines 14-16: does no query of the group come near its maximum? */
static bool skips(const sparge_scratch *t, const tile *x, float lambda)
{
    float gap = -INFINITY;
    for (int64_t r = 0; r < x->queries && lambda > -INFINITY; r++) {
        const sparge_row row = {t->max[x->lane + r], t->sum[x->lane + r]};
        gap = fmaxf(gap, sparge_row_gap(&row, t->local[r], sees(t, x, r)));
    }
    return sparge_group_skips(gap, lambda);
}

/* Lines 10 to 16 for a group that attends to some key of the block. Returns whether P.V was
 * computed. */
static bool attend_tile(const sparge_work *w, sparge_scratch *t, const sparge_q_block *block,
                        const tile *x, float lambda)
{
    const sparge_kernels *run = &w->kernels;
    const sparge_operand *q = &w->q.operand, *k = &w->kv.k, *v = &w->kv.v;
    const int64_t panels = x->lanes / SPARGE_PANEL, stride = (w->keys + 1) * SPARGE_PANEL;
    const int64_t q_lane = block->index * q->inits + x->lane;
    const sparge_product scores = {
        .rows = sparge_padded(x->keys),
        .panels = panels,
        .depth = q->stride,
        .a = k->data + x->n * k->block,
        .a_stride = k->stride,
        .a_init = k->init + x->n * k->inits,
        .b = q->data + q_lane * (q->block / q->inits),
        .b_stride = q->stride * SPARGE_PANEL,
        .b_init = q->init + q_lane,
        .next = v->data + x->n * v->block,
        .next_bytes = v->block,
    };
    run->score[q->format](&scores, t->s, stride);
    sparge_scores s = {
        t->s,
        panels,
        x->depth,
        stride,
        sparge_score_scale(q->scale[block->index], k->scale[x->n], w->o->softmax_scale),
        q->format == SPARGE_FLOATS || q->format == SPARGE_PAIRS || x->bias};
    if (x->bias) {
        run->add_bias(&s, t->s, x->keys, x->bias);
        s.scale = 1.0f;
    }
    if (x->hides)
        run->hide(&s, t->s, t->attended);
    if (!run->maxima(&s, t->most, t->local))
        mend_maxima(t, x);
    if (skips(t, x, lambda))
        return false;

    const sparge_softmax_rows rows = {t->max + x->lane, t->sum + x->lane, t->local, t->shrink,
                                      t->weight};
    const bool still = run->update_max(&rows, x->lanes, v->qmax);
    /* A scale of 0 keeps -inf what it is if it is the least float instead. */
    s.scale = s.scale == 0.0f ? 0x1p-149f : s.scale;
    run->softmax[v->format](&s, v->qmax ? t->most : rows.max, t->p, stride, t->row_sum, t->p_init);
    for (int64_t r = 0; r < x->lanes; r++)
        rows.sum[r] += t->weight[r] * t->row_sum[r];
    const sparge_product products = {
        .rows = v->stride,
        .panels = panels,
        .depth = x->depth,
        .a = v->data + x->n * v->block,
        .a_stride = w->keys,
        .a_init = v->inits ? v->init + x->n * v->inits : NULL,
        .b = t->p,
        .b_stride = stride,
        .b_init = t->p_init,
        .next = k->data + x->next * k->block,
        .next_bytes = k->block,
    };
    const sparge_accumulator o = {
        .shrink = t->shrink,
        .weight = t->weight,
        .still = still,
        .v_scale = v->scale + x->n * v->scales,
        .o = t->o + x->lane * v->stride,
        .o_stride = v->stride * SPARGE_PANEL,
    };
    run->accumulate_pv[v->format](&products, &o);
    return true;
}

static float *o_at(const sparge_work *w, sparge_scratch *t, int64_t lane, int64_t channel)
{
    return t->o + lane / SPARGE_PANEL * SPARGE_PANEL * w->kv.v.stride + channel * SPARGE_PANEL +
           lane % SPARGE_PANEL;
}

/* Does query r attend to that key? After look. */
static bool attends(const sparge_scratch *t, const tile *x, int64_t r, int64_t key)
{
    const int64_t panel = r / SPARGE_PANEL * sparge_mask_row_words(x->depth) + key / 32;
    return t->attended[panel * SPARGE_PANEL + r % SPARGE_PANEL] >> key % 32 & 1u;
}

/* A non-finite key spoils the queries that attend to it; a non-finite v element its channel of
 * those, if they computed P.V. Rare, and so it looks the elements up again. */
static void spread_nonfinite(const sparge_work *w, sparge_scratch *t, const tile *x, int64_t kv,
                             bool done)
{
    const sparge_problem *p = w->p;
    look(w, t, x);
    const int64_t first = x->j * w->g.block_k, k_stride = w->kv.k.stride;
    const float *mean = w->o->smooth_k ? w->kv.mean + (kv - w->kv.first) * k_stride : w->no_mean;
    for (int64_t key = 0; key < x->keys; key++) {
        const sparge_rows k = sparge_rows_of(&p->k, p->kv_heads, kv, first + key, 1, p->dim);
        sparge_rows v = sparge_rows_of(&p->v, p->kv_heads, kv, first + key, 1, 1);
        const bool k_finite = sparge_load_finite(w, &k, mean, k_stride, w->o->qk_dtype, t->x);
        for (int64_t r = 0; r < x->queries; r++)
            t->nonfinite[x->lane + r] |= !k_finite && attends(t, x, r, key);
        for (int64_t c = 0; c < p->dim_v && done; c++) {
            if (!sparge_load_finite(w, &v, w->no_mean, 1, w->o->pv_dtype, t->x))
                for (int64_t r = 0; r < x->queries; r++)
                    if (attends(t, x, r, key))
                        *o_at(w, t, x->lane + r, c) = NAN;
            v.data = (const char *)v.data + sparge_element_size(v.dtype);
        }
    }
}

/* A group through its next kept blocks, from j on, as many as a chunk has; returns the one after
 * them. */
static int64_t attend_chunk(const sparge_work *w, sparge_scratch *t, sparge_q_block *block,
                            const uint32_t *kept, int64_t visible, tile x)
{
    const sparge_geometry *g = &w->g;
    const float lambda = sparge_thresholds_at(w, block->head)->lambda;
    const int64_t kv = sparge_kv_of(w->p, block->head);
    const int64_t first = (kv - w->kv.first) * g->k_blocks;
    const int64_t row = sparge_mask_row_words(g->block_k),
                  in_block = x.first - block->i * g->block_q;
    int64_t left = CHUNK_BYTES / (w->kv.k.block + w->kv.v.block);
    do {
        const int64_t next = sparge_mask_row_next(kept, x.j + 1, visible);
        bool done = true; /* as a group that attends to none of the keys counts */
        x.n = first + x.j;
        x.next = first + sparge_min(next, visible - 1);
        x.keys = sparge_block_rows(g->k_len, g->block_k, x.j);
        x.depth = sparge_whole(x.keys, w->kernels.depth[w->kv.v.format]);
        x.bias = w->p->k_bias ? w->p->k_bias + kv * g->k_len + x.j * g->block_k : NULL;
        x.partial = t->partial && t->partial[x.j] ? t->partial[x.j] + in_block * row : NULL;
        x.hides = x.partial || x.bias || visible_of(w, &x, 0) < x.depth;
        const int64_t seen = sparge_pairs_visible(g, x.first, x.queries, x.j);
        const int64_t pairs = x.hides && seen ? look(w, t, &x) : seen;
        if (pairs)
            done = attend_tile(w, t, block, &x, lambda);
        if (w->kv.nonfinite[x.n])
            spread_nonfinite(w, t, &x, kv, done);
        t->pv_done[x.j] += done ? (float)x.queries : 0.0f;
        sparge_tally_rows(&block->tally, g, block->i, x.queries, seen, pairs, done);
        x.j = next;
    } while (--left > 0 && x.j < visible);
    return x.j;
}

/* Lines 20-21 for one query, whose row of O is `o`: o / l, and lse in natural units with the mean
 * key put back. q is read before o is written, which may stand in the same place. */
static void finish_row(const sparge_work *w, sparge_scratch *t, const sparge_q_block *block,
                       int64_t r, int64_t lane, const float *o)
{
    const sparge_problem *p = w->p;
    const sparge_out *out = &w->result->o;
    const int64_t token = block->i * w->g.block_q + r, line = block->head * p->q_len + token;
    const int64_t stride = w->kv.k.stride;
    const bool smoothed = w->result->lse && w->o->smooth_k;
    sparge_row row = {t->max[lane], t->sum[lane]};
    sparge_record_rows(w->intermediates->m, line, 1, 1, &row.max, 1, sizeof row.max);
    sparge_record_rows(w->intermediates->l, line, 1, 1, &row.sum, 1, sizeof row.sum);
    if (!block->fits || smoothed) {
        const sparge_rows q = sparge_rows_of(&p->q, p->heads, block->head, token, 1, p->dim);
        t->nonfinite[lane] |= !sparge_load_finite(w, &q, w->no_mean, stride, w->o->qk_dtype, t->x);
    }
    if (t->nonfinite[lane])
        row = sparge_row_nonfinite(row);
    if (smoothed) {
        const float *mean = w->kv.mean + (sparge_kv_of(p, block->head) - w->kv.first) * stride;
        w->result->lse[line] =
            sparge_row_lse_smoothed(&row, w->o->softmax_scale * w->kernels.dot(t->x, mean, stride));
    } else if (w->result->lse)
        w->result->lse[line] = sparge_row_lse(&row);
    const int64_t at = sparge_out_row(out, block->head / p->heads, block->head % p->heads, token);
    w->kernels.store(o, p->dim_v, sparge_row_norm(&row), out->dtype,
                     (char *)out->data + at * sparge_element_size(out->dtype));
}

/* The blocks of a row of the mask that are attended in part. */
static void find_partial(const sparge_work *w, sparge_scratch *t, int64_t line)
{
    const sparge_mask *m = w->mask;
    const int64_t words = w->g.block_q * sparge_mask_row_words(w->g.block_k);
    if (!t->partial)
        return;
    memset(t->partial, 0, (size_t)w->g.k_blocks * sizeof *t->partial);
    for (int64_t n = m->partial_first[line]; n < m->partial_first[line + 1]; n++)
        t->partial[m->partial_block[n]] = m->partial_bits + n * words;
}

void sparge_attend_q_block(const sparge_work *w, sparge_scratch *t, int64_t n)
{
    const sparge_geometry *g = &w->g;
    sparge_q_block *block = &w->q.block[n];
    const int64_t first = block->i * g->block_q, line = block->head * g->q_blocks + block->i;
    const int64_t queries = sparge_block_rows(g->q_len, g->block_q, block->i);
    const int64_t visible = sparge_blocks_visible(g, block->i), v_stride = w->kv.v.stride;
    const int64_t group = sparge_group_of(w, block->head), lanes = sparge_lanes(queries, group);
    const uint32_t *kept = w->mask ? w->mask->bits + line * w->mask->words : NULL;

    block->tally.pairs = visible;
    block->tally.qk_done = block->cost;
    for (int64_t r = 0; r < queries; r++)
        block->tally.tokens += sparge_keys_of_query(g, first + r);
    for (int64_t lane = 0; lane < lanes; lane++) {
        const sparge_row row = sparge_row_empty();
        t->max[lane] = row.max;
        t->sum[lane] = row.sum;
        t->nonfinite[lane] = false;
    }
    memset(t->o, 0, (size_t)(lanes * v_stride) * sizeof *t->o);
    memset(t->pv_done, 0, (size_t)g->k_blocks * sizeof *t->pv_done);
    find_partial(w, t, line);

    int64_t next = sparge_mask_row_next(kept, 0, visible);
    for (int64_t j = next; j < visible; j = next)
        for (int64_t r = 0, lane = 0; r < queries; r += group, lane += sparge_padded(group)) {
            const int64_t some = sparge_min(group, queries - r);
            const tile x = {first + r, some, lane, sparge_padded(some), .j = j};
            next = attend_chunk(w, t, block, kept, visible, x);
        }

    for (int64_t r = 0; r < queries; r++) {
        const int64_t lane = r / group * sparge_padded(group) + r % group, in = lane % SPARGE_PANEL;
        if (in == 0)
            w->kernels.turn(t->o + lane * v_stride, v_stride, t->turned);
        finish_row(w, t, block, r, lane, t->turned + in * v_stride);
    }
    for (int64_t j = 0; j < g->k_blocks; j++)
        t->pv_done[j] /= (float)queries;
    sparge_record_rows(w->intermediates->pv_done, line, 1, g->k_blocks, t->pv_done, g->k_blocks,
                       sizeof *t->pv_done);
}
