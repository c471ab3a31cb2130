/* SPDX-License-Identifier: Apache-2.0 */
/* ref.h: what api/ calls, and the steps of it, which are the contract that every faster
 * version keeps. work.h has the structs. */
#ifndef SPARGE_REF_REF_H
#define SPARGE_REF_REF_H

#include "ref/work.h"

/* ---- driver.c: with checked arguments and resolved options ---- */

sparge_status sparge_ref_predict(const sparge_problem *p, const sparge_options *o,
                                 sparge_mask *mask, const sparge_intermediates *intermediates);
sparge_status sparge_ref_attend(const sparge_problem *p, const sparge_options *o,
                                const sparge_mask *mask, sparge_result *result);
sparge_status sparge_ref_attention(const sparge_problem *p, const sparge_options *o,
                                   sparge_mask *mask, sparge_result *result);

/* ---- block.c ---- */

/* Tokens [first, first + rows) of one head, in f32: x and nonfinite [rows][dim]. A non-finite
 * element becomes 0. */
void sparge_ref_load(const sparge_in *in, int64_t batch, int64_t head, int64_t first, int64_t rows,
                     int64_t dim, float *x, bool *nonfinite);
/* The mean key of one head: f32 sums within a block in row order, f64 over the blocks. */
void sparge_ref_mean(const float *k, const sparge_geometry *g, int64_t dim, float *mean);
void sparge_ref_subtract_mean(float *x, bool *nonfinite, int64_t rows, int64_t dim,
                              const float *mean);
/* unit_sum [dim] is scratch: the sum of the rows, each scaled to length 1. */
sparge_ref_summary sparge_ref_summarize(const float *x, const bool *nonfinite, int64_t rows,
                                        int64_t block, int64_t dim, float *pool, float *unit_sum);
/* n elements, `stride` apart, to codes in [-qmax, qmax] at the same places. Returns the scale,
 * max|x| / qmax + slack. */
float sparge_ref_quantize(const float *x, int64_t n, int64_t stride, int qmax, float slack,
                          int16_t *code);

/* ---- predict.c ---- */

void sparge_ref_summarize_keys(sparge_ref_work *);                         /* line 4 for K */
void sparge_ref_predict_row(sparge_ref_work *, int64_t i, uint32_t *kept); /* lines 4-6 for Q_i */
bool sparge_ref_similar(const sparge_ref_summary *, float theta);
void sparge_ref_select(const sparge_ref_row *, uint32_t *kept); /* in these steps: */
void sparge_ref_keep_mass(const sparge_ref_row *, int64_t least, uint32_t *kept);
void sparge_ref_keep_best(const sparge_ref_row *, int64_t count, uint32_t *kept);
void sparge_ref_keep_above(const sparge_ref_row *, uint32_t *kept);
void sparge_ref_keep_forced(const sparge_ref_row *, uint32_t *kept);

/* ---- attend.c ---- */

void sparge_ref_codes(sparge_ref_tensor *, float slack);     /* line 3 */
void sparge_ref_score(sparge_ref_work *);                    /* line 10 */
void sparge_ref_accumulate_pv(sparge_ref_work *, int64_t r); /* lines 12, 13, 16 */
void sparge_ref_attend_block(sparge_ref_work *, int64_t i);  /* lines 7-21 */

/* ---- record.c: what is told beside o ---- */

/* Copies n elements to place `at` of an array, in units of n, if it is wanted. */
void sparge_ref_record(void *array, int64_t at, const void *from, int64_t n, size_t size);
void sparge_ref_record_codes(const sparge_ref_tensor *, int64_t head, int16_t *code, float *scale);
/* Of query block tile.i: at its beginning, after each key block, at its end. */
void sparge_ref_record_queries(sparge_ref_work *);
void sparge_ref_record_tile(sparge_ref_work *);
void sparge_ref_record_rows(const sparge_ref_work *);

#endif
