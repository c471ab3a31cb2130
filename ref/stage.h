/* stage.h: what each stage holds while it works; driver.c fills it, predict.c and attend.c use it.
 */
#ifndef SPARGE_REF_STAGE_H
#define SPARGE_REF_STAGE_H

#include "ref/ref.h"

/* Stage 1: the key blocks of one head, and the query block and row of S at hand. */
typedef struct sparge_ref_predictor {
    const sparge_problem *p;
    const sparge_options *o;
    const sparge_intermediates *intermediates;
    sparge_geometry g;
    sparge_ref_mode mode;
    float *k_pool;                 /* [k_blocks][dim] */
    sparge_ref_summary *summary_k; /* [k_blocks] */
    bool *similar_k;               /* [k_blocks], under the theta of one query head */
    float *x, *pool, *unit, *mean; /* a block; its pooled row and unit sum; the mean key, or NULL */
    bool *bad;
    float *s; /* [k_blocks] S[i,:] */
    sparge_ref_scored *order;
} sparge_ref_predictor;

/* Stage 2: a key head and a query head in codes, and the query block at hand. */
typedef struct sparge_ref_attender {
    const sparge_problem *p;
    const sparge_options *o;
    sparge_geometry g;
    sparge_ref_mode mode;
    sparge_ref_operand q, k, v;
    float *x, *mean; /* a block on its way to codes; the mean key, or NULL */
    sparge_ref_tile tile;
    bool *spoilt;          /* [block_q] rows that met a non-finite query or key */
    float *share;          /* [k_blocks] of the rows of Q_i whose P.V was computed */
    sparge_counts *counts; /* of the head at hand */
    int64_t pv_rows[2];    /* rows of whole and of short query blocks whose P.V was computed */
    sparge_result *result;
} sparge_ref_attender;

/* predict.c */
void sparge_ref_summarize_keys(const sparge_ref_predictor *, int64_t b, int64_t kv);
void sparge_ref_predict_row(const sparge_ref_predictor *, int64_t b, int64_t h, int64_t i,
                            uint32_t *kept);

/* attend.c */
void sparge_ref_codes(const sparge_ref_attender *, const sparge_in *in, int64_t b, int64_t h,
                      int64_t len, const float *mean, const sparge_ref_operand *to);
void sparge_ref_attend_block(sparge_ref_attender *, int64_t i, const uint32_t *kept, float lambda);

/* driver.c: what is kept beside the algorithm */
void sparge_ref_spoil(const sparge_ref_attender *);
void sparge_ref_count(sparge_ref_attender *, int64_t j);
void sparge_ref_record(void *array, int64_t at, const void *from, int64_t n, size_t size);

#endif
