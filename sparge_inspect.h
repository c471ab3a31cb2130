/* SPDX-License-Identifier: Apache-2.0 */
/* sparge_inspect.h: for programs that look inside: names and ranges, what is here, what the options
 * stand for, intermediates, the oracle, the judge of other kernels, and the speed of this machine.
 */
#ifndef SPARGE_INSPECT_H
#define SPARGE_INSPECT_H

#include "sparge.h"

SPARGE_BEGIN_DECLS

/* ---- Names and ranges --------------------------------------------------------------------- */

/* The words of the command line and of JSON. A value that is none of the enum gives "unknown ...".
 */
const char *sparge_status_string(sparge_status status);
const char *sparge_dtype_string(sparge_dtype dtype);
const char *sparge_backend_string(sparge_backend backend);
const char *sparge_isa_string(sparge_isa isa);
const char *sparge_causal_string(sparge_causal causal);
const char *sparge_rules_string(sparge_rules rules);

/* The range of a number by its name in the structs, such as "theta" or "block_q". Both ends belong
 * to it. tau and topk may also be SPARGE_OFF. softmax_scale may also be 0, and a call takes numbers
 * between. Returns false if there is no such number. */
bool sparge_range(const char *name, double *low, double *high);

/* ---- What is here ------------------------------------------------------------------------- */

bool sparge_backend_built(sparge_backend backend);     /* is it in this library? */
bool sparge_backend_available(sparge_backend backend); /* can it run on this machine? */
bool sparge_isa_available(sparge_isa isa);             /* can it run in this process? */
bool sparge_isa_has_bf16(sparge_isa isa);              /* products in BF16 too; AUTO: can any? */

/* Replaces AUTO, 0 and FASTEST by what they stand for, as every call does for itself: backend, isa,
 * threads, kernel, skip_rows, softmax_scale and pv_dtype. It ignores v. The options do not change
 * if it fails. */
sparge_status sparge_options_resolve(const sparge_problem *problem, sparge_options *options,
                                     sparge_error *error);

/* ---- Intermediates ------------------------------------------------------------------------ */

/* Why the prediction keeps a block. A block may have several reasons. */
typedef enum sparge_reason {
    SPARGE_KEPT_MASS = 1,         /* one of the most probable blocks, up to tau */
    SPARGE_KEPT_TOPK = 2,         /* one of the best blocks, up to topk */
    SPARGE_KEPT_DISSIMILAR_Q = 4, /* its queries are not self-similar, or not finite */
    SPARGE_KEPT_DISSIMILAR_K = 8, /* its keys are not self-similar, or not finite */
    SPARGE_KEPT_OVERFLOW = 16,    /* both are self-similar, but their score is not finite */
    SPARGE_KEPT_DIAGONAL = 32,    /* it holds the last key that a row sees, if causal */
    SPARGE_KEPT_SINK = 64,        /* key block 0 under options.sink */
    SPARGE_KEPT_MIN_MASS = 128,   /* its mass is above min_mass */
} sparge_reason;

/* Packed arrays of the caller. A NULL array is not written. Nor is an array that does not apply:
 * the mean key without smooth_k, or integers and scales of what is not computed in integers. */
struct sparge_intermediates {
    float *k_mean;  /* [batch][kv_heads][dim] */
    float *q_pool;  /* [batch][heads][q_blocks][dim], without cells */
    float *k_pool;  /* [batch][kv_heads][k_blocks][dim], without cells */
    float *q_sim;   /* [batch][heads][q_blocks], mean cosine */
    float *k_sim;   /* [batch][kv_heads][k_blocks], mean cosine */
    float *s_all;   /* [batch][heads][q_blocks][k_blocks], natural units; invisible: -inf. With
                       cells the masses, which add up to 1, or are all 0 */
    float *s;       /* the same, and without cells -inf if the keys are not self-similar */
    uint8_t *why;   /* [batch][heads][q_blocks][k_blocks], bits of sparge_reason; 0: skipped */
    int16_t *q_int; /* [batch][heads][q_len][dim] */
    int16_t *k_int; /* [batch][kv_heads][k_len][dim] */
    int16_t *v_int; /* [batch][kv_heads][k_len][dim_v] */
    float *q_scale; /* [batch][heads][q_blocks] */
    float *k_scale; /* [batch][kv_heads][k_blocks] */
    float *v_scale; /* [batch][kv_heads][k_blocks][dim_v] */
    float *pv_done; /* [batch][heads][q_blocks][k_blocks], share of the rows */
    float *m;       /* [batch][heads][q_len], row maxima in log2 units */
    float *l;       /* [batch][heads][q_len], row sums; in BF16 of P as it is rounded */
};

/* ---- The oracle --------------------------------------------------------------------------- */

typedef enum sparge_oracle_mode {
    SPARGE_ORACLE_REAL,  /* q, k and v as they are: the distance to it is quality */
    SPARGE_ORACLE_CODES, /* q, k and v as quantized: the distance to it is correctness */
} sparge_oracle_mode;

/* Attention by the textbook formula in double precision. It shares no code with any backend. CODES
 * takes FASTEST for INT8, and BF16, which has no codes, for F32. The thresholds do not matter. Time
 * grows as q_len * k_len.
 * Packed arrays in host memory, each NULL if it is not wanted:
 *   o          [batch][heads][q_len][dim_v]
 *   lse        [batch][heads][q_len], natural log
 *   block_mass [batch][heads][q_blocks][k_blocks]: attention of a query block to a key block, the
 *              mean over its rows. A row that sees no key counts as 0.
 * A mask of NULL is dense. */
sparge_status sparge_oracle(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_oracle_mode mode, double *o,
                            double *lse, double *block_mass, sparge_error *error);

/* ---- The judge of other kernels ----------------------------------------------------------- */

/* Attention over a mask (NULL: dense) by the textbook formula in f32, with P and o rounded to
 * `dtype` (F32: not at all), as FlashAttention's tests have it: what an honest kernel may lose that
 * keeps them so. Of the options it reads the blocks, causality and softmax_scale. Arrays in host
 * memory:
 *   o    [batch][heads][q_len][dim_v]
 *   lse  [batch][heads][q_len], natural log; NULL: not wanted */
sparge_status sparge_baseline(const sparge_problem *problem, const sparge_options *options,
                              const sparge_mask *mask, sparge_dtype dtype, float *o, float *lse,
                              sparge_error *error);

/* The largest error that passes, from that of the baseline beside the same oracle: twice that, and
 * 1e-5. For o it is the relative L1 of the worst row, for lse the largest distance. NaN if no bound
 * follows, as the baseline is itself further off than all that means anything: than 0.5 of a row.
 */
double sparge_bound_o(double baseline);
double sparge_bound_lse(double baseline);

/* ---- The speed of this machine ------------------------------------------------------------ */

/* Operations per second of all threads together: medians of a few trials. A multiply-add is two. */
typedef struct sparge_peaks {
    double f32;  /* multiply-adds of floats in registers */
    double int8; /* dot products of bytes in registers */
} sparge_peaks;

/* Both take isa and threads as in sparge_options. Peaks take a fifth of a second. */
sparge_status sparge_measure_peaks(sparge_isa isa, int threads, sparge_peaks *peaks,
                                   sparge_error *error);

/* Bytes per second that all threads together read from 256 MiB of main memory. */
sparge_status sparge_measure_bandwidth(sparge_isa isa, int threads, double *bytes,
                                       sparge_error *error);

SPARGE_END_DECLS

#endif
