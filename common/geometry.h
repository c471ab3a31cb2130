/* geometry.h: where blocks start, how long they are, and what causality lets them see. */
#ifndef SPARGE_COMMON_GEOMETRY_H
#define SPARGE_COMMON_GEOMETRY_H

#include "common/num.h"

/* Query t sees keys 0 .. min(k_len - 1, t + offset). */
typedef struct sparge_geometry {
    int64_t q_len, k_len;     /* tokens */
    int64_t block_q, block_k; /* tokens in a block; the last one may be short */
    int64_t q_blocks, k_blocks;
    int64_t offset;
} sparge_geometry;

/* causal as in sparge.h: 0 every key, 1 aligned to the end of the keys, 2 to their start. */
SPARGE_HD sparge_geometry sparge_geometry_make(int64_t q_len, int64_t k_len, int64_t block_q,
                                               int64_t block_k, int causal)
{
    sparge_geometry g;
    g.q_len = q_len;
    g.k_len = k_len;
    g.block_q = block_q;
    g.block_k = block_k;
    g.q_blocks = sparge_ceil_div(q_len, block_q);
    g.k_blocks = sparge_ceil_div(k_len, block_k);
    g.offset = causal == 0 ? k_len : causal == 1 ? k_len - q_len : 0;
    return g;
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

/* How many keys of block j query t may see: the first so many of it. */
SPARGE_HD int64_t sparge_keys_visible(const sparge_geometry *g, int64_t t, int64_t j)
{
    const int64_t seen = sparge_last_key(g, t) + 1 - j * g->block_k;
    return sparge_max(0, sparge_min(seen, g->block_k));
}

/* How many key blocks some row of query block i may see: the first so many. */
SPARGE_HD int64_t sparge_blocks_visible(const sparge_geometry *g, int64_t i)
{
    const int64_t last = sparge_last_key(g, sparge_min(g->q_len, (i + 1) * g->block_q) - 1);
    return last < 0 ? 0 : last / g->block_k + 1;
}

#endif
