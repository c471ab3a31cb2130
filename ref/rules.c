/* SPDX-License-Identifier: Apache-2.0 */
/* rules.c: the rules of the paper as printed and of the authors' released kernels, as far as they
 * are not the default: algorithm.md section 9, the table in ref/README.md. */
#include "common/select.h"
#include "ref/ref.h"

/* ---- rules = paper ---- */

static bool similar_paper(const sparge_ref_summary *s, float theta)
{
    return s->finite && s->sim >= theta;
}

/* TopCdf as printed may keep no block at all. (Top-k and min_mass are not in the paper: as
 * in the default.) */
static void select_paper(const sparge_ref_row *row, uint32_t *kept)
{
    sparge_ref_keep_mass(row, 0, kept);
    sparge_ref_keep_best(row, sparge_topk_count(row->thresholds->topk, row->visible), kept);
    sparge_ref_keep_above(row, kept);
    sparge_ref_keep_forced(row, kept);
}

/* Line 13 stands before the test of line 14: l grows even where P.V is skipped. */
static void skipped_paper(sparge_ref_work *w, int64_t r)
{
    sparge_ref_tile *tile = &w->tile;
    for (int64_t t = 0; t < tile->visible[r]; t++)
        if (!tile->hidden[r * tile->keys + t])
            tile->row[r].sum +=
                sparge_weight(tile->s[r * tile->keys + t], tile->scale, tile->row[r].max);
}

/* ---- rules = upstream ---- */

/* Padding and zero rows make their cosine 0/0, and a NaN is not above theta. */
static bool similar_upstream(const sparge_ref_summary *s, float theta)
{
    return s->full && !s->zero_row && sparge_ref_similar(s, theta);
}

/* Top-k counts all key blocks, visible or not; the diagonal is not forced. */
static void select_upstream(const sparge_ref_row *row, uint32_t *kept)
{
    sparge_ref_row without = *row;
    without.diagonal = row->blocks;
    sparge_ref_keep_mass(row, 1, kept);
    sparge_ref_keep_best(row, sparge_max(1, (int64_t)(row->thresholds->topk * (float)row->blocks)),
                         kept);
    sparge_ref_keep_above(row, kept);
    sparge_ref_keep_forced(&without, kept);
}

void sparge_ref_set_rules(sparge_ref_mode *mode, const sparge_problem *p, const sparge_options *o)
{
    if (o->rules != SPARGE_RULES_DEFAULT)
        mode->predict_scale = 1.0f / sqrtf((float)p->dim);
    if (o->rules == SPARGE_RULES_PAPER) {
        mode->similar = similar_paper;
        mode->select = select_paper;
        mode->skipped = skipped_paper;
    }
    if (o->rules == SPARGE_RULES_UPSTREAM) {
        mode->similar = similar_upstream;
        mode->select = select_upstream;
        mode->slack = o->qk_dtype == SPARGE_INT8 ? 1e-7f : 0.0f;
        mode->never_skip = o->block_q > o->block_k ? 2 : 1;
    }
}
