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
 *     format   A          B, one panel                         exact while
 *     BYTES    uint8      [depth / 4][16][4] int8              A <= 127 on AVX2, any A elsewhere
 *     WORDS    int16      [depth / 4][2][16][2] int16          |A|, |B| <= 4095 and depth <= 128,
 * or 2047 and 256 FLOATS   float      [depth][16] float                    rounds as fmaf in the
 * order of depth
 *
 * WORDS keeps two pairs side by side: elements 2s and 2s + 1 of the first half of depth, then those
 * of the second half. That is what the inner product of Winograd (1968) needs: with x = A, y = B
 * and ' for the second half,  (x + y')(x' + y) = x y + x' y' + x x' + y y':  one multiplication for
 * two, and sums that depend on A or on B alone, which are subtracted by starting the accumulator at
 * a_start + b_start. A kernel that multiplies directly ignores them. BYTES multiplies unsigned by
 * signed. A query is signed and so stored as q + 128; the excess, 128 times the sum of the key's
 * codes, is subtracted by b_start. P is unsigned by nature and b_start 0. */
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
    int64_t a_stride;       /* elements from row to row */
    const int32_t *a_start; /* [rows] WORDS */
    const void *b;
    const int32_t *b_start; /* [panels * 16] WORDS, BYTES */
} sparge_product;

/* Where O += P V goes: o = o * shrink + weight * step * C, or without weight and step for FLOATS.
 */
typedef struct sparge_fold {
    const float *shrink, *weight; /* [rows] */
    const float *step;            /* [panels * 16] */
    float *o;                     /* [rows][o_stride] */
    int64_t o_stride;
} sparge_fold;

/* A group of rows of S, -inf where a row must not look. */
typedef struct sparge_scores {
    const float *s;             /* [rows][stride] in units of c */
    int64_t rows, keys, stride; /* keys is a multiple of 16 */
    float c;                    /* to log2 units */
    bool nans;                  /* may hold some: sums of floats do, integers never */
} sparge_scores;

/* The rows of a group: m and l of the online softmax, and what the tile at hand does to them. */
typedef struct sparge_group {
    float *max, *sum;       /* m, l */
    const float *local;     /* m_local; -inf where nothing is seen, or nothing but scores of -inf */
    float *shrink, *weight; /* of what was accumulated; of what is added */
} sparge_group;

typedef struct sparge_kernels {
    sparge_isa isa;
    sparge_format int8_scores; /* the format of Q and K in int8; P and V in int8 are BYTES */

    /* ---- One block of tokens (ref/block.c); x is [rows][stride], zero from dim to stride, and
     * stride is dim padded to 16 ---- */
    /* x = rows less mean [dim], non-finite elements 0. Was every element finite? */
    bool (*load)(const sparge_rows *rows, const float *mean, int64_t stride, float *x);
    /* The sum of the rows, in their order; x [rows][stride] is scratch. */
    void (*sum)(const sparge_rows *rows, const float *no_mean, int64_t stride, float *x,
                float *sum);
    /* pool and the sum of unit rows, [stride]; returns the mean cosine. */
    float (*summarize)(const float *x, int64_t rows, int64_t stride, float *pool, float *unit);
    /* Codes in [-qmax, qmax]; one step for the block, or one for each channel. */
    float (*quantize)(const float *x, int64_t n, int qmax, int16_t *code);
    void (*quantize_channels)(const float *x, int64_t rows, int64_t stride, int qmax, float *step,
                              int16_t *code);
    /* Rows of x or code as A; as columns of B [panels(rows)][stride]; with depth running over the
     * rows as B [panels(stride)][depth], zero from rows to depth. from is float for FLOATS, int16
     * codes otherwise. B begins where a lane may. */
    void (*pack_rows[SPARGE_FORMATS])(const void *from, int64_t rows, int64_t stride, void *a,
                                      int32_t *start);
    void (*pack_keys[SPARGE_FORMATS])(const void *from, int64_t rows, int64_t stride, void *b,
                                      int32_t *start);
    void (*pack_values[SPARGE_FORMATS])(const void *from, int64_t rows, int64_t stride, void *b,
                                        int32_t *start);

    /* ---- One row of the prediction (ref/predict.c) ---- */
    void (*rank)(const float *pool, const float *pools, int64_t n, int64_t stride, float scale,
                 float *s);
    void (*mass)(const float *s, int64_t n, float top,
                 uint32_t *mass); /* floor(2^30 exp(s - top)) */

    /* ---- One tile (ref/attend.c) ---- */
    void (*score[SPARGE_FORMATS])(const sparge_product *, float *s, int64_t s_stride);
    /* The largest score of each row, NaN if there is one, and sparge_row_local of it. Is each of
     * these above -inf? */
    bool (*maxima)(const sparge_scores *, float *most, float *local);
    void (*raise)(const sparge_group *, int64_t rows, int qmax); /* qmax 0: P is not coded */
    /* P of each row, with its sum and, for WORDS, a_start. Columns: scores->keys. Codes against the
     * largest score of the row, with c > 0; FLOATS, which may stand where S does, against the
     * running maximum. */
    void (*weigh[SPARGE_FORMATS])(const sparge_scores *, const float *top, void *p,
                                  int64_t p_stride, float *sum, int32_t *start);
    void (*fold[SPARGE_FORMATS])(const sparge_product *, const sparge_fold *);

    /* ---- One row of the output ---- */
    float (*dot)(const float *a, const float *b,
                 int64_t n); /* as sparge_dot; n is a multiple of 16 */
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

#endif
