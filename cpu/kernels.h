/* SPDX-License-Identifier: Apache-2.0 */
/* kernels.h: what an instruction set may do better than plain C, as a table of functions, and the
 * layouts that those functions share. driver.c calls the table and nothing else of an instruction
 * set.
 *
 * Attention is two matrix products a tile, S = Q K^T and O += P V. Each multiplies rows by panels:
 *
 *     A [rows][depth]            row-major, as softmax and a head's queries come: Q, P
 *     B [panels][depth][16]      packed once for each key head: keys of K, channels of V
 *
 * Depth is padded to 16 with zeros, so that no product has a tail. A panel has its 16 columns in
 * lanes of 32 bits, and a lane holds as much depth as it can:
 *
 *     format   A          B, one panel                      exact if
 *     BYTES    uint8      [depth / 4][16][4] int8           A <= 127 on AVX2, any A elsewhere
 *     WORDS    int16      [depth / 4][2][16][2] int16       |A|, |B| <= 4095 and depth <= 128, or
 *                                                           |A|, |B| <= 2047 and depth <= 256
 *     FLOATS   float      [depth][16] float                 rounds as fmaf in the order of depth
 *
 * WORDS keeps two pairs side by side: elements 2s and 2s + 1 of the first half of depth, then those
 * of the second half. That is what the inner product of Winograd (1968) needs: with x = A, y = B
 * and ' for the second half,  (x + y')(x' + y) = x y + x' y' + x x' + y y':  one multiplication for
 * two, and sums that depend on A or on B alone. They are subtracted by what the accumulator is
 * initialized with, a_init + b_init. A kernel that multiplies directly ignores both.
 *
 * BYTES multiplies unsigned by signed. A query is signed and so stored as q + 128. The excess, 128
 * times the sum of the key's codes, is subtracted by b_init. P is unsigned by nature and its b_init
 * 0. */
#ifndef SPARGE_CPU_KERNELS_H
#define SPARGE_CPU_KERNELS_H

#include "common/softmax.h"
#include "sparge.h"

enum { SPARGE_PANEL = 16 };

static inline int64_t sparge_padded(int64_t n)
{
    return sparge_ceil_div(n, SPARGE_PANEL) * SPARGE_PANEL;
}

typedef enum sparge_format {
    SPARGE_BYTES,
    SPARGE_WORDS,
    SPARGE_FLOATS,
    SPARGE_FORMATS
} sparge_format;

/* Rows of one head in the caller's memory. */
typedef struct sparge_rows {
    const void *data;
    sparge_dtype dtype;
    int64_t token; /* elements from row to row */
    int64_t rows, dim;
} sparge_rows;

/* C [rows][panels * 16] = A B. */
typedef struct sparge_product {
    int64_t rows, panels, depth; /* depth is a multiple of 16 */
    const void *a;
    int64_t a_stride;      /* elements from row to row */
    const int32_t *a_init; /* [rows] WORDS */
    const void *b;
    const int32_t *b_init; /* [panels * 16] WORDS, BYTES */
} sparge_product;

/* O += P V: o = o * shrink + weight * v_scale * C; FLOATS have no weight and no v_scale. */
typedef struct sparge_accumulator {
    const float *shrink, *weight; /* [rows] */
    const float *v_scale;         /* [panels * 16] */
    float *o;                     /* [rows][o_stride] */
    int64_t o_stride;
} sparge_accumulator;

/* Rows of S, -inf where a row must not look. */
typedef struct sparge_scores {
    const float *s;             /* [rows][stride] in units of scale */
    int64_t rows, keys, stride; /* keys is a multiple of 16 */
    float scale;                /* to log2 units */
    bool nans;                  /* may hold some: sums of floats do, integers never */
} sparge_scores;

/* m and l of these rows, and what the tile does to them. */
typedef struct sparge_softmax_rows {
    float *max, *sum;       /* m, l */
    const float *local;     /* m_local; -inf if no key is visible, or no score is above -inf */
    float *shrink, *weight; /* of what was accumulated; of what is added */
} sparge_softmax_rows;

/* A block of codes, int16, or for FLOATS of values, [rows][stride], as A or B. init: of the
 * accumulator. */
typedef void sparge_pack(const void *from, int64_t rows, int64_t stride, void *to, int32_t *init);

typedef struct sparge_kernels {
    sparge_isa isa;
    sparge_isa product_isa[SPARGE_FORMATS]; /* what the products below run on */
    sparge_format int8_scores; /* the format of Q and K in int8; P and V in int8 are BYTES */

    /* A thread's first word before any of the functions below, and its last. May be NULL. */
    void (*begin)(void), (*end)(void);

    /* ---- One block of tokens (ref/block.c); x is [rows][stride], zero from dim to stride, and
     * stride is dim padded to 16 ---- */
    /* x = rows less mean [dim], non-finite elements 0. Was every element finite? */
    bool (*load)(const sparge_rows *rows, const float *mean, int64_t stride, float *x);
    /* The sum of the rows, in their order; x [rows][stride] is scratch. */
    void (*sum)(const sparge_rows *rows, const float *no_mean, int64_t stride, float *x,
                float *sum);
    /* The mean row and the sum of unit rows, [stride]; returns the mean cosine. */
    float (*summarize)(const float *x, int64_t rows, int64_t stride, float *pool, float *unit_sum);
    /* Codes in [-qmax, qmax]; one scale for the block, or one for each channel. */
    float (*quantize)(const float *x, int64_t n, int qmax, int16_t *code);
    void (*quantize_channels)(const float *x, int64_t rows, int64_t stride, int qmax, float *scale,
                              int16_t *code);
    sparge_pack *pack_rows[SPARGE_FORMATS];   /* as A */
    sparge_pack *pack_keys[SPARGE_FORMATS];   /* as columns of B [panels(rows)][stride] */
    sparge_pack *pack_values[SPARGE_FORMATS]; /* depth runs over the rows: B [panels(stride)]
                                               * [depth], zero from rows to depth. B begins where
                                               * a lane may. */

    /* ---- One row of the prediction (ref/predict.c) ---- */
    void (*score_pools)(const float *pool, const float *pools, int64_t n, int64_t stride,
                        float softmax_scale, float *s);
    void (*mass)(const float *s, int64_t n, float top, uint32_t *mass); /* sparge_mass */

    /* ---- One tile (ref/attend.c) ---- */
    void (*score[SPARGE_FORMATS])(const sparge_product *, float *s, int64_t s_stride);
    /* The largest score of each row, NaN if there is one, and sparge_row_local of it. Is each of
     * these above -inf? */
    bool (*maxima)(const sparge_scores *, float *most, float *local);
    void (*update_max)(const sparge_softmax_rows *, int64_t rows, int qmax); /* 0: P in floats */
    /* P of each row, with its sum and, for WORDS, a_init. Columns: scores->keys. Codes against the
     * largest score of the row, with a scale above 0. FLOATS against the running maximum; they may
     * stand where S does. */
    void (*softmax[SPARGE_FORMATS])(const sparge_scores *, const float *top, void *p,
                                    int64_t p_stride, float *sum, int32_t *init);
    void (*accumulate_pv[SPARGE_FORMATS])(const sparge_product *, const sparge_accumulator *);

    /* ---- One row of the output ---- */
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
