/* SPDX-License-Identifier: Apache-2.0 */
/* counts.h: what a head has computed and what it could see, as exact numbers (sparge_counts). */
#ifndef SPARGE_COMMON_COUNTS_H
#define SPARGE_COMMON_COUNTS_H

#include "common/geometry.h"

/* A part of a head, in integers, which have one sum in any order. */
typedef struct sparge_tally {
    int64_t pairs, tokens; /* visible: (query block, key block), (query, key) */
    int64_t qk_done, tile_tokens, qk_tokens, pv_tokens;
    int64_t pv_rows[2]; /* [short query block]: rows whose P.V was computed, once a key block */
} sparge_tally;

enum { SPARGE_TALLY_WORDS = sizeof(sparge_tally) / sizeof(int64_t) };

SPARGE_HD sparge_tally sparge_tally_zero(void)
{
    sparge_tally t;
    memset(&t, 0, sizeof t);
    return t;
}

/* Rows of query block i over a key block whose scores were computed. They see `visible` (query,
 * key) pairs of it and attend to `tokens` of these; done: and their P.V was computed. Whoever calls
 * it adds 1 to qk_done for the block. */
SPARGE_HD void sparge_tally_rows(sparge_tally *t, const sparge_geometry *g, int64_t i, int64_t rows,
                                 int64_t visible, int64_t tokens, bool done)
{
    t->tile_tokens += visible;
    t->qk_tokens += tokens;
    t->pv_tokens += done ? tokens : 0;
    t->pv_rows[sparge_block_rows(g->q_len, g->block_q, i) < g->block_q] += done ? rows : 0;
}

SPARGE_HD void sparge_tally_add(sparge_tally *to, const sparge_tally *t)
{
    to->pairs += t->pairs;
    to->tokens += t->tokens;
    to->qk_done += t->qk_done;
    to->tile_tokens += t->tile_tokens;
    to->qk_tokens += t->qk_tokens;
    to->pv_tokens += t->pv_tokens;
    to->pv_rows[0] += t->pv_rows[0];
    to->pv_rows[1] += t->pv_rows[1];
}

/* Of a whole head. A group of rows that skipped a key block counts as its share of the query block.
 */
SPARGE_HD sparge_counts sparge_tally_counts(const sparge_tally *t, const sparge_geometry *g)
{
    sparge_counts c;
    c.pairs = t->pairs;
    c.qk_done = t->qk_done;
    c.pv_done = (double)t->pv_rows[0] / (double)g->block_q +
                (double)t->pv_rows[1] / (double)sparge_max(1, g->q_len % g->block_q);
    c.tokens = t->tokens;
    c.tile_tokens = t->tile_tokens;
    c.qk_tokens = t->qk_tokens;
    c.pv_tokens = t->pv_tokens;
    return c;
}

/* Over heads, in their order: pv_done is a sum of doubles. */
SPARGE_HD void sparge_counts_add(sparge_counts *to, const sparge_counts *c)
{
    to->pairs += c->pairs;
    to->qk_done += c->qk_done;
    to->pv_done += c->pv_done;
    to->tokens += c->tokens;
    to->tile_tokens += c->tile_tokens;
    to->qk_tokens += c->qk_tokens;
    to->pv_tokens += c->pv_tokens;
}

#endif
