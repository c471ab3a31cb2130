/* SPDX-License-Identifier: Apache-2.0 */
/* geometry.h: where blocks start, how long they are, and what causality lets them see. */
#ifndef SPARGE_COMMON_GEOMETRY_H
#define SPARGE_COMMON_GEOMETRY_H

#include "common/num.h"
#include "sparge.h"

/* Query t sees keys 0 .. min(k_len - 1, t + offset). */
typedef struct sparge_geometry {
    int64_t q_len, k_len;     /* tokens */
    int64_t block_q, block_k; /* tokens in a block; the last one may be short */
    int64_t q_blocks, k_blocks;
    int64_t offset;
    sparge_causal causal;
} sparge_geometry;

SPARGE_HD sparge_geometry sparge_geometry_make(int64_t q_len, int64_t k_len, int64_t block_q,
                                               int64_t block_k, sparge_causal causal)
{
    sparge_geometry g;
    g.q_len = q_len;
    g.k_len = k_len;
    g.block_q = block_q;
    g.block_k = block_k;
    g.q_blocks = sparge_ceil_div(q_len, block_q);
    g.k_blocks = sparge_ceil_div(k_len, block_k);
    g.offset = causal == SPARGE_CAUSAL_NONE  ? k_len
               : causal == SPARGE_CAUSAL_END ? k_len - q_len
                                             : 0;
    g.causal = causal;
    return g;
}

SPARGE_HD sparge_geometry sparge_geometry_of(const sparge_problem *p, const sparge_options *o)
{
    return sparge_geometry_make(p->q_len, p->k_len, o->block_q, o->block_k, o->causal);
}

SPARGE_HD int64_t sparge_block_rows(int64_t len, int64_t block, int64_t i)
{
    return sparge_min(block, len - i * block);
}

/* The last key that query t may see; negative when there is none. */
SPARGE_HD int64_t sparge_last_key(const sparge_geometry *g, int64_t t)
{
    return sparge_min(g->k_len - 1, t + g->offset);
}

/* How many keys query t may see: the first ones. */
SPARGE_HD int64_t sparge_keys_of_query(const sparge_geometry *g, int64_t t)
{
    return sparge_max(0, sparge_last_key(g, t) + 1);
}

/* How many keys of block j query t may see: the first ones, and no more than the block has. */
SPARGE_HD int64_t sparge_keys_visible(const sparge_geometry *g, int64_t t, int64_t j)
{
    const int64_t visible = sparge_last_key(g, t) + 1 - j * g->block_k;
    return sparge_max(0, sparge_min(visible, g->block_k));
}

/* How many (query, key) pairs of so many queries and key block j are visible. */
SPARGE_HD int64_t sparge_pairs_visible(const sparge_geometry *g, int64_t first, int64_t queries,
                                       int64_t j)
{
    const int64_t keys = sparge_block_rows(g->k_len, g->block_k, j);
    int64_t pairs = 0;
    if (sparge_keys_visible(g, first, j) == keys) /* the first one sees least */
        return queries * keys;
    for (int64_t t = first; t < first + queries; t++)
        pairs += sparge_keys_visible(g, t, j);
    return pairs;
}

/* How many key blocks some row of query block i may see: the first ones. */
SPARGE_HD int64_t sparge_blocks_visible(const sparge_geometry *g, int64_t i)
{
    const int64_t last = sparge_last_key(g, sparge_min(g->q_len, (i + 1) * g->block_q) - 1);
    return last < 0 ? 0 : last / g->block_k + 1;
}

/* The first block that holds the last visible key of a row of query block i. Under causality the
 * mask keeps the blocks from it on, or a row might see no key. Without causality it is no block. */
SPARGE_HD int64_t sparge_first_diagonal(const sparge_geometry *g, int64_t i)
{
    if (g->causal == SPARGE_CAUSAL_NONE)
        return g->k_blocks;
    return sparge_max(0, sparge_last_key(g, i * g->block_q)) / g->block_k;
}

#endif
