/* SPDX-License-Identifier: Apache-2.0 */
/* kernels.h: what an instruction set may do better than plain C, as a table of functions, and the
 * layouts that those functions share. driver.c calls the table and nothing else of an instruction
 * set.
 *
 * Attention is two matrix products a tile, S^T = K Q^T and O^T += V^T P^T. Queries are the lanes of
 * vectors: m, l and whatever else a row of S has is a lane, and no step goes across lanes. Each
 * product multiplies rows by panels:
 *
 *     A [rows][depth]            a key of K, or a channel of V
 *     B [panels][depth][16]      a query each: of Q, packed once for each query block; of P
 *     C [panels][rows][16]       S^T, O^T
 *
 * Depth is padded with zeros, so that no product has a tail. A panel has its 16 columns in lanes of
 * 32 bits, and a lane holds as much depth as it can:
 *
 *     format   A          B, one panel                      exact if
 *     BYTES    int8       [depth / 4][16][4] uint8          B <= 127 on AVX2, any B elsewhere
 *     WORDS    int16      [depth / 4][2][16][2] int16       |A|, |B| <= 4095 and depth <= 128, or
 *                                                           |A|, |B| <= 2047 and depth <= 256
 *     FLOATS   float      [depth][16] float                 rounds as fmaf in the order of depth
 *     PAIRS    bf16       [depth / 2][16][2] bf16           as common/bf16.h in the ISA's order
 *
 * WORDS keeps two pairs side by side: elements 2s and 2s + 1 of the first half of depth, then those
 * of the second half. That is what the inner product of Winograd (1968) needs: with x = A, y = B
 * and ' for the second half,  (x + y')(x' + y) = x y + x' y' + x x' + y y':  one multiplication for
 * two, and sums that depend on A or on B alone. They are subtracted by what the accumulator is
 * initialized with, a_init + b_init. A kernel that multiplies directly ignores both.
 *
 * BYTES multiplies signed by unsigned. A query is signed and so stored as q + 128. The excess, 128
 * times the sum of the key's codes, is subtracted by a_init. P is unsigned by nature, and V has no
 * a_init. */
#ifndef SPARGE_CPU_KERNELS_H
#define SPARGE_CPU_KERNELS_H

#include "common/softmax.h"
#include "sparge.h"

enum { SPARGE_PANEL = 16, SPARGE_MOST_DEPTH = 64 /* that depth is a multiple of */ };

static inline int64_t sparge_padded(int64_t n)
{
    return sparge_ceil_div(n, SPARGE_PANEL) * SPARGE_PANEL;
}

typedef enum sparge_format {
    SPARGE_BYTES,
    SPARGE_WORDS,
    SPARGE_FLOATS,
    SPARGE_PAIRS,
    SPARGE_FORMATS
} sparge_format;

/* Rows of one head in the caller's memory. */
typedef struct sparge_rows {
    const void *data;
    sparge_dtype dtype;
    int64_t token; /* elements from row to row */
    int64_t rows, dim;
} sparge_rows;

/* C = A B. */
typedef struct sparge_product {
    int64_t rows, panels, depth; /* rows: a multiple of 16; depth: of what the table says */
    const void *a;
    int64_t a_stride;      /* elements from row to row */
    const int32_t *a_init; /* [rows] WORDS, BYTES of K; NULL: BYTES of V */
    const void *b;
    int64_t b_stride;      /* elements from panel to panel */
    const int32_t *b_init; /* [panels * 16] WORDS */
    const void *next;      /* [next_bytes] what is read after this, fetched meanwhile */
    int64_t next_bytes;
} sparge_product;

/* O^T += V^T P^T: o = o * shrink + weight * v_scale * C; FLOATS and PAIRS have no weight and no
 * v_scale. */
typedef struct sparge_accumulator {
    const float *shrink, *weight; /* [panels * 16] */
    bool still;                   /* every shrink is 1 */
    const float *v_scale;         /* [rows] */
    float *o;                     /* [panels][o_stride], of it [rows][16] */
    int64_t o_stride;
} sparge_accumulator;

/* S^T, -inf where a query must not look. */
typedef struct sparge_scores {
    const float *s;       /* [panels][stride], of it [keys][16], in units of scale */
    int64_t panels, keys; /* keys is a multiple of 16 */
    int64_t stride;
    float scale; /* to log2 units */
    bool nans;   /* may hold some: sums of floats do, integers never */
} sparge_scores;

/* m and l of these queries, and what the tile does to them. */
typedef struct sparge_softmax_rows {
    float *max, *sum;       /* m, l */
    const float *local;     /* m_local; -inf if no key is visible, or no score is above -inf */
    float *shrink, *weight; /* of what was accumulated; of what is added */
} sparge_softmax_rows;

typedef struct sparge_kernels {
    sparge_isa isa;
    sparge_isa product_isa[SPARGE_FORMATS]; /* what the products below run on */
    sparge_format int8_scores;     /* the format of Q and K in int8; P and V in int8 are BYTES */
    int64_t depth[SPARGE_FORMATS]; /* what depth is a multiple of, itself one of 16 */
    int64_t group[SPARGE_FORMATS]; /* queries that best go through a tile together */

    /* Before some of the functions below, on the same thread, and after them. May be NULL. */
    void (*begin)(void), (*end)(void);

    /* ---- One block of tokens (ref/block.c); x is [rows][stride], zero from dim to stride, and
     * stride is a multiple of 16 ---- */
    /* x = rows less mean [dim], non-finite elements 0; *max: the largest magnitude. Was every
     * element finite? */
    bool (*load)(const sparge_rows *rows, const float *mean, int64_t stride, float *x, float *max);
    /* The sum of the rows, in their order; x [rows][stride] is scratch. */
    void (*sum)(const sparge_rows *rows, const float *no_mean, int64_t stride, float *x,
                float *sum);
    /* pool += rows, and unit_sum += rows of length 1, [stride]. In the order of rows. */
    void (*sum_units)(const float *x, int64_t rows, int64_t stride, float *pool, float *unit_sum);
    /* Mean rows from the sums of cells of so many rows, of which the last may be short. */
    void (*cell_means)(float *pool, int64_t rows, int64_t cell, int64_t stride);
    /* max [stride] is at least the magnitudes of its channel. */
    void (*channel_max)(const float *x, int64_t rows, int64_t stride, float *max);
    /* Codes in [-qmax, qmax], int8 for BYTES and int16 for WORDS: n of them, a multiple of 16,
     * under one scale, or rows under scales [stride] and their inverses. */
    void (*quantize[SPARGE_FLOATS])(const float *x, int64_t n, float scale, int qmax, void *code);
    void (*quantize_channels[SPARGE_FLOATS])(const float *x, int64_t rows, int64_t stride,
                                             const float *scale, const float *inverse, int qmax,
                                             void *code);
    /* n elements in bf16; what rounds to infinity is 0. */
    void (*round_pairs)(const float *x, int64_t n, void *pairs);
    /* Codes, or for FLOATS values, [rows][stride] as A, as columns of B, and transposed as A. */
    /* The rows are in place; zero rows follow up to a multiple of 16. */
    void (*pack_rows[SPARGE_FORMATS])(void *a, int64_t rows, int64_t stride, int32_t *a_init);
    /* B [panels(rows)][stride][16]; B begins where a lane may. */
    void (*pack_columns[SPARGE_FORMATS])(const void *from, int64_t rows, int64_t stride, void *b,
                                         int32_t *b_init);
    /* A [stride][depth], zero from rows on; halves of WORDS are those of rows padded to 16. */
    void (*pack_transposed[SPARGE_FORMATS])(const void *from, int64_t rows, int64_t stride,
                                            int64_t depth, void *a, int32_t *a_init);

    /* ---- One row of the prediction (ref/predict.c) ---- */
    void (*score_pools)(const float *pool, const float *pools, int64_t n, int64_t stride,
                        float softmax_scale, float *s);
    void (*mass)(const float *s, int64_t n, float top, uint32_t *mass); /* sparge_mass */
    /* Of one panel of rows of cells: codes, of SPARGE_CELL_QMAX, of so many keys at a time added
     * up, [keys / together][16]; and those of so many blocks to the masses that the rows add to
     * them, which stand for so many queries. */
    void (*sum_codes)(const sparge_scores *, const float *top, int64_t together, int32_t *codes);
    void (*cell_masses)(int32_t *codes, int64_t blocks, const int64_t *queries);

    /* ---- One tile (ref/attend.c); arrays of queries are [panels * 16] ---- */
    void (*score[SPARGE_FORMATS])(const sparge_product *, float *s, int64_t s_stride);
    /* S^T, of `keys` keys, is sparge_score_biased of scale; from then on the scale is 1. */
    void (*add_bias)(const sparge_scores *, float *s, int64_t keys, const float *bias);
    /* S^T is -inf where attended [panels][words of keys][16] lacks the bit of the key. */
    void (*hide)(const sparge_scores *, float *s, const uint32_t *attended);
    /* The largest score of each query, NaN if there is one, and sparge_row_local of it. Is each of
     * these above -inf? */
    bool (*maxima)(const sparge_scores *, float *most, float *local);
    /* Is every shrink 1? qmax is 0 for P without codes. */
    bool (*update_max)(const sparge_softmax_rows *, int64_t queries, int qmax);
    /* P^T [panels][p_stride], of it B of depth scores->keys, with its sum and, for WORDS, b_init.
     * Codes against the largest score of the query, with a scale above 0. FLOATS and PAIRS against
     * the running maximum; FLOATS may stand where S does. */
    void (*softmax[SPARGE_FORMATS])(const sparge_scores *, const float *top, void *p,
                                    int64_t p_stride, float *sum, int32_t *b_init);
    void (*accumulate_pv[SPARGE_FORMATS])(const sparge_product *, const sparge_accumulator *);

    /* ---- One row of the output ---- */
    /* O [16][stride] from a panel of O^T [stride][16] */
    void (*turn)(const float *from, int64_t stride, float *o);
    float (*dot)(const float *a, const float *b, int64_t n); /* sparge_dot of a multiple of 16 */
    void (*store)(const float *o, int64_t n, float norm, sparge_dtype dtype, void *out);

    /* ---- Ceilings: returns the operations done, a multiply-add being two ---- */
    int64_t (*peak_floats)(int64_t rounds);
    int64_t (*peak_bytes)(int64_t rounds);
    float (*peak_read)(const float *x, int64_t n); /* a sum; n is a multiple of 16 */
} sparge_kernels;

/* The table of one instruction set, which the processor must have. */
sparge_kernels sparge_cpu_kernels(sparge_isa isa);

/* Each overwrites what it does better. */
void sparge_scalar_kernels(sparge_kernels *k);
void sparge_avx2_kernels(sparge_kernels *k);
void sparge_avxvnni_kernels(sparge_kernels *k);
void sparge_avx512vnni_kernels(sparge_kernels *k);
void sparge_amx_kernels(sparge_kernels *k);

#endif
