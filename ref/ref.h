/* ref.h: the stages of the reference, and so the contract that every faster version of them keeps.
 *
 * The order to read in: block.c (what is done to one block), predict.c (stage 1), attend.c (stage
 * 2). Beside them stand modes.c (everything that is not the default) and driver.c (memory, loops
 * over heads, counters, intermediates: nothing of the algorithm). The letters are the paper's:
 * query block i, key block j; row r and key t of a block; channel c; batch b and head h. */
#ifndef SPARGE_REF_REF_H
#define SPARGE_REF_REF_H

#include "common/geometry.h"
#include "common/softmax.h"
#include "common/thresholds.h"
#include "sparge.h"

/* ---- The backend: what sparge.c calls. Arguments are checked and options resolved by then. ----
 */

sparge_status sparge_ref_predict(const sparge_problem *p, const sparge_options *o,
                                 sparge_mask *mask, const sparge_intermediates *intermediates);
sparge_status sparge_ref_attend(const sparge_problem *p, const sparge_options *o,
                                const sparge_mask *mask, sparge_result *result);
sparge_status sparge_ref_attention(const sparge_problem *p, const sparge_options *o,
                                   sparge_mask *mask,
                                   sparge_result *result); /* the one, then the other */

/* ---- block.c: one block ------------------------------------------------------------------- */

/* Tokens [first, first + rows) of one head, in f32: x [rows][dim], less `mean` [dim] unless NULL.
 * A non-finite element becomes 0 and is marked in bad [rows][dim]. */
void sparge_ref_load(const sparge_in *in, int64_t batch, int64_t head, int64_t first, int64_t rows,
                     int64_t dim, const float *mean, float *x, bool *bad);

/* The mean key of one head: f32 sums within a block in row order, f64 over the blocks. x and bad
 * are scratch for one block. */
void sparge_ref_mean(const sparge_in *k, int64_t batch, int64_t head, const sparge_geometry *g,
                     int64_t dim, float *x, bool *bad, float *mean);

/* What stage 1 knows of a block beside its pooled row. */
typedef struct sparge_ref_summary {
    float sim;     /* mean cosine of all pairs of rows, self pairs too; in [0, 1] */
    bool finite;   /* no element was infinite or NaN */
    bool zero_row; /* some row is all zero */
    bool full;     /* as long as a block can be */
} sparge_ref_summary;

/* unit [dim] is scratch: the sum of the rows, each scaled to length 1. */
sparge_ref_summary sparge_ref_summarize(const float *x, const bool *bad, int64_t rows,
                                        int64_t block, int64_t dim, float *pool, float *unit);

/* n elements, `stride` apart, to codes in [-qmax, qmax] at the same places; returns the step,
 * max|x| / qmax + slack. */
float sparge_ref_quantize(const float *x, int64_t n, int64_t stride, int qmax, float slack,
                          int16_t *code);

/* ---- What modes.c may replace -------------------------------------------------------------- */

/* A finite entry of S[i,:]. */
typedef struct sparge_ref_scored {
    float s;
    int64_t block;
} sparge_ref_scored;

/* One row of S and what else decides which of its blocks are kept. */
typedef struct sparge_ref_row {
    const float *s;          /* [visible] S[i,:]; -inf where K_j is not similar */
    int64_t visible, blocks; /* key blocks that some row of Q_i may see: the first ones; all */
    const bool *k_similar;   /* [visible] */
    bool q_similar;
    int64_t diagonal, diagonal_end; /* blocks of the last visible keys: [diagonal, diagonal_end) */
    const sparge_thresholds *thresholds;
    bool sink;
    sparge_ref_scored *order; /* [finite] best first; equal ones by block */
    int64_t finite;
    uint8_t *why; /* [visible] gathers the bits of sparge_reason, or NULL */
} sparge_ref_row;

/* Q, K or V of one head as stage 2 reads it: codes and steps, or values where nothing is quantized.
 */
typedef struct sparge_ref_operand {
    int64_t dim, block;
    int qmax;        /* codes are in [-qmax, qmax]; 0: values, not codes */
    float slack;     /* added to every step */
    bool by_channel; /* a step for each channel of a block, as V has, instead of one */
    int16_t *code;   /* [tokens][dim] */
    float *value;    /* [tokens][dim] */
    float *step;     /* [blocks], or [blocks][dim] by channel */
    bool *bad;       /* [tokens][dim]: was not finite, counts as 0 */
} sparge_ref_operand;

/* Query block i on its way through key block j. */
typedef struct sparge_ref_tile {
    int64_t first_q, first_k; /* tokens */
    int64_t rows, keys;       /* real rows of Q_i and of K_j */
    float *s;                 /* [rows][keys] scores in units of c */
    float c;                  /* to log2 units: q_scale * k_scale * scale * log2 e */
    int64_t *seen;            /* [rows] keys of block j that the row may see: the first ones */
    float *most;              /* [rows] the largest visible s; -inf where nothing is seen */
    float *local;             /* [rows] m_local: the same in log2 units */
    bool *done;               /* [rows] P.V of this tile was computed */
    sparge_row *state;        /* [rows] m and l */
    float *o;                 /* [rows][dim_v], not yet divided by l */
    float *unit;              /* [dim_v] what 1 in o stands for: 1, but under fp8 the step of V */
    int32_t *product;         /* [dim_v] one row of P.V, in codes */
} sparge_ref_tile;

typedef struct sparge_ref_mode {
    bool (*similar)(const sparge_ref_summary *, float theta);
    void (*select)(const sparge_ref_row *, uint32_t *kept); /* kept arrives empty */
    void (*score)(const sparge_ref_operand *q, const sparge_ref_operand *k, sparge_ref_tile *);
    /* Folds row r of a tile into m, l and o. p_qmax: codes of P are 0 .. p_qmax. */
    void (*weigh)(const sparge_ref_operand *v, int p_qmax, sparge_ref_tile *, int64_t r);
    void (*skipped)(sparge_ref_tile *, int64_t r); /* what a skipped row still does, or NULL */
    /* Rounds one head of V, in values, as its precision has it, or NULL. */
    void (*narrow)(const sparge_ref_operand *v, int64_t tokens, float *unit);
    int qk_qmax, p_qmax, v_qmax; /* 0: not quantized */
    float slack;                 /* added to the steps of Q and K */
    int64_t never_skip;          /* so many last kept blocks ignore lambda */
    float predict_scale;
} sparge_ref_mode;

sparge_ref_mode sparge_ref_mode_of(const sparge_problem *p, const sparge_options *o);

/* What geometry and options say of the row of query block i; the rest of it is all 0. */
sparge_ref_row sparge_ref_row_of(const sparge_geometry *g, const sparge_options *o, int64_t i);
/* Fills row->order from row->s. */
void sparge_ref_rank(sparge_ref_row *row);
/* The share of softmax(S[i,:]) of row->order[place], as an integer, so that a sum has one value in
 * any order. */
uint64_t sparge_ref_mass(const sparge_ref_row *row, int64_t place);

/* The default of each, and the steps of `select`: which blocks a row keeps, and why. */
bool sparge_ref_similar(const sparge_ref_summary *, float theta);
void sparge_ref_select(const sparge_ref_row *, uint32_t *kept);
void sparge_ref_keep_mass(const sparge_ref_row *, int64_t least,
                          uint32_t *kept); /* TopCdf, if tau */
int64_t sparge_ref_topk(const sparge_ref_row *);
void sparge_ref_keep_best(const sparge_ref_row *, int64_t count,
                          uint32_t *kept); /* top-k, if topk */
void sparge_ref_keep_dissimilar(const sparge_ref_row *, uint32_t *kept);
void sparge_ref_keep_diagonal(const sparge_ref_row *, uint32_t *kept);
void sparge_ref_keep_sink(const sparge_ref_row *, uint32_t *kept);
void sparge_ref_score(const sparge_ref_operand *q, const sparge_ref_operand *k, sparge_ref_tile *);
void sparge_ref_weigh(const sparge_ref_operand *v, int p_qmax, sparge_ref_tile *, int64_t r);

#endif
