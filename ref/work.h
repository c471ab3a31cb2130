/* SPDX-License-Identifier: Apache-2.0 */
/* work.h: what the reference holds while it works. The letters are the paper's: query block i, key
 * block j; row r and key t of a block; channel c; batch b and head h. */
#ifndef SPARGE_REF_WORK_H
#define SPARGE_REF_WORK_H

#include "common/counts.h"
#include "common/softmax.h"
#include "ref/mode.h"

/* Q, K or V of one head. */
typedef struct sparge_ref_tensor {
    int64_t tokens, dim, block; /* block: tokens of one */
    float *x;                   /* [tokens][dim]; K less its mean */
    bool *nonfinite;            /* [tokens][dim]: such an element counts as 0 */
    int qmax;                   /* codes are in [-qmax, qmax]; 0: x is multiplied as it is */
    int64_t scales;             /* of a block: 1, or of V one for each channel */
    int16_t *code;              /* [tokens][dim] */
    uint16_t *bf16;             /* [tokens][dim] x as a product in bf16 takes it */
    float *scale;               /* [blocks][scales] */
} sparge_ref_tensor;

/* What the prediction knows of a block beside its pooled row. */
typedef struct sparge_ref_summary {
    float sim;           /* mean cosine of all pairs of rows, self pairs too; in [0, 1] */
    bool finite;         /* no element was infinite or NaN */
    bool zero_row, full; /* some row is all zero; it is as long as a block can be */
} sparge_ref_summary;

/* A key block that tau, topk and min_mass choose from: its score, or its mass by cells, as bits
 * that rank it, and its mass. */
typedef struct sparge_ref_ranked {
    uint32_t rank, mass;
    int64_t block;
} sparge_ref_ranked;

/* One row of S, and what else decides which of its blocks are kept. */
typedef struct sparge_ref_row {
    int64_t visible, blocks;    /* key blocks that some row of Q_i may see: the first ones; all */
    float *s;                   /* [blocks] S[i,:]; -inf where K_j is not similar, or not visible;
                                   with cells the masses, which add up to 1 */
    bool q_similar, *k_similar; /* [visible] */
    int64_t diagonal, ranked;   /* the first block that causality forces; entries of order */
    bool sink;
    const sparge_thresholds *thresholds;
    sparge_ref_ranked *order; /* [ranked] best first */
    uint64_t total;           /* of their masses */
    uint8_t *why;             /* [visible] gathers the bits of sparge_reason, or NULL */
} sparge_ref_row;

/* Query block i over key block j. */
typedef struct sparge_ref_tile {
    int64_t i, j, first_q, first_k; /* first: tokens */
    int64_t rows, keys;             /* real rows of Q_i and of K_j */
    float *s;                       /* [rows][keys] scores */
    float scale;                    /* of s, to log2 units */
    int64_t *visible;    /* [rows] keys of block j that the row may see: the first ones */
    bool *hidden;        /* [rows][keys] of those: by the mask, or by a bias of -inf */
    int64_t *attended;   /* [rows] how many of those are not hidden */
    float *most, *local; /* [rows] the largest attended s; m_local, the same in log2 units */
    bool *done;          /* [rows] P.V of this tile was computed */
    sparge_row *row;     /* [rows] m and l */
    float *o;            /* [rows][dim_v], not yet divided by l */
    int32_t *product;    /* [dim_v] one row of P.V, in codes */
    uint16_t *p;         /* [keys] one row of P, in bf16 */
} sparge_ref_tile;

typedef struct sparge_ref_work {
    const sparge_problem *p;
    const sparge_options *o;
    const sparge_intermediates *intermediates;
    sparge_result *result;   /* NULL: prediction alone */
    const sparge_mask *mask; /* to attend over; NULL: dense */
    sparge_geometry g;
    sparge_ref_mode mode;

    int64_t b, h, n, kv;       /* the query head at hand; it and its key head over the batch */
    sparge_ref_tensor q, k, v; /* of them */
    float *mean;               /* [dim] the mean key, or NULL */
    const float *k_bias;       /* [k_len], or NULL */
    float *v_scale;            /* [dim_v] of o at the end: 1, but under fp8 the scale of V */

    float *k_pool;                 /* [k_blocks][dim] */
    sparge_ref_summary *k_summary; /* [k_blocks] */
    float *q_pool, *unit_sum;      /* [dim] */
    sparge_geometry cells;         /* of cells, if there are any */
    float *k_cell, *q_cell;        /* [k_len / cell][dim], [block_q / cell][dim] their mean rows */
    float *cell_s;                 /* [k_len / cell] one row of products of them */
    sparge_ref_row row;

    sparge_ref_tile tile;
    bool *row_nonfinite; /* [block_q] rows that met a query or a key that is not finite */
    float *pv_done;      /* [k_blocks] share of the rows of Q_i whose P.V was computed */
    sparge_tally tally;  /* of the query head */
} sparge_ref_work;

#endif
