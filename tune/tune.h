/* SPDX-License-Identifier: Apache-2.0 */
/* tune.h: what the parts of the tuner hand to each other. input.c brings one head of one input to
 * where the backend runs, blocks.c takes attention apart into what each key block contributes,
 * curve.c adds the contributions up again in the order in which tau, topk or lambda would, search.c
 * chooses for one head, and heads.c has all heads do so side by side. Of a tuner by loss loss.c
 * measures and price.c chooses.
 *
 * api/ calls it, and the tuner calls attention through the public face,
 * sparge.h, alone: it stands on top of the library as a user does, for any backend.
 *
 * Letters as in ref/ref.h: query block i, key block j, row r, channel c. */
#ifndef SPARGE_TUNE_TUNE_H
#define SPARGE_TUNE_TUNE_H

#include "common/geometry.h"
#include "common/softmax.h"
#include "sparge_tune.h"

/* ---- The grid: as fine as the authors', and finer where tau comes near 1 ------------------- */

enum { TUNE_THETAS = 32, TUNE_KEEPS = 1031, TUNE_LAMBDAS = 502 };

/* A place in the grid. The last keep, of tau or topk, keeps everything; the last lambda never
 * skips. */
typedef struct tune_choice {
    int theta, keep, lambda;
} tune_choice;

static inline float tune_theta(int n) { return -1.0f + (float)n / 16.0f; }

/* tau, or topk: 0.001 apart, then ten for each power of ten nearer to 1, up to 1e-6 below it. */
static inline float tune_keep(int n)
{
    const double keep = n < 1000             ? n / 1000.0
                        : n < TUNE_KEEPS - 1 ? 1.0 - pow(10.0, -3.0 - (n - 999) / 10.0)
                                             : 1.0;
    return (float)keep;
}

/* 0.1 apart in log2 units, down to -50. */
static inline float tune_lambda(int n)
{
    return n < TUNE_LAMBDAS - 1 ? 0.0f - (float)((double)n / 10.0 / (double)SPARGE_LOG2E)
                                : -INFINITY;
}
sparge_thresholds tune_thresholds(tune_choice at, bool topk);
tune_choice tune_dense(void);

/* What a place in the grid costs and keeps, in one input. */
typedef struct tune_point {
    double error; /* sum|o - o'| */
    double kept;  /* block products of one kind: Q.K^T and P.V by the mask, P.V alone by lambda */
} tune_point;

/* ---- input.c: one head of one input ------------------------------------------------------- */

/* An array in host memory and, where the backend is a device, its twin there. */
typedef struct tune_array {
    void *host, *device;
    int64_t bytes;
} tune_array;

static inline void *tune_data(const tune_array *x) { return x->device ? x->device : x->host; }
sparge_status tune_array_make(tune_array *x, int64_t bytes, bool device, sparge_error *error);
sparge_status tune_array_push(const tune_array *x, sparge_error *error); /* host to device */
sparge_status tune_array_pull(const tune_array *x, int64_t bytes,
                              sparge_error *error); /* and back */
void tune_array_free(tune_array *x);

typedef struct tune_input {
    const sparge_options *o; /* without thresholds, without callbacks */
    sparge_geometry g;
    tune_array q, k, v;       /* f32, packed; block_k rows of 0 after q */
    tune_array smooth;        /* k less its mean */
    sparge_problem problem;   /* of q, k and v, for the backend */
    int64_t nonfinite;        /* elements of q, k, v; of `want` if these are finite */
    float *s, *q_sim, *k_sim; /* [q_blocks][k_blocks], [q_blocks], [k_blocks]: S for every pair,
                                 visible or -inf */
    float *want;              /* [q_len][dim_v] dense attention in f32 */
    double want_sum;          /* sum|want| */
    double pairs;             /* visible (query block, key block) pairs */
    double products;          /* of blocks so far; a pair has one of Q.K^T and one of P.V */
} tune_input;

/* Of dense attention in f32 on the same backend. */
sparge_options tune_dense_options(const sparge_options *of);

/* Computes dense attention and S. After failure the input is all 0. */
sparge_status tune_input_open(tune_input *x, const sparge_problem *p, int64_t batch, int64_t head,
                              const sparge_options *o, sparge_error *error);
void tune_input_close(tune_input *x);

/* Relative to the output; what is not a number is larger than any bound. */
double tune_relative(const tune_input *x, double error);

/* One whole call of sparge_attention. */
typedef struct tune_call {
    double l1, sparsity;
    int64_t nan, inf; /* elements of o that are */
} tune_call;

sparge_status tune_evaluate(tune_input *x, const sparge_thresholds *thresholds, tune_call *to,
                            sparge_error *error);

/* ---- blocks.c: what each key block contributes to a query block ---------------------------- */

/* Key blocks [first, first + count) of the query block at hand. */
typedef struct tune_part {
    int64_t first, count, rows; /* rows: of each in the arrays */
    tune_array o, lse, m, bits; /* o [count][rows][dim_v], lse and m [count][rows] */
} tune_part;

/* The query block at hand: attention to each key block alone, in the backend's own arithmetic. */
typedef struct tune_blocks {
    int64_t first, rows, visible; /* its first row; key blocks that some row may see */
    tune_part whole, edge;        /* every row sees all keys of a whole block */
} tune_blocks;

sparge_status tune_blocks_make(tune_blocks *b, const tune_input *x, sparge_error *error);
void tune_blocks_free(tune_blocks *b);

/* Takes query block i apart: for the key blocks that a row of a mask keeps, or for all if it is
 * NULL.
 */
sparge_status tune_blocks_load(tune_blocks *b, tune_input *x, int64_t i, const uint32_t *kept,
                               sparge_error *error);

/* Of the blocks at hand: o [rows][dim_v], lse [rows], and the maximum m [rows] in log2 units. */
const float *tune_block_o(const tune_blocks *b, int64_t j, int64_t dim_v);
const float *tune_block_lse(const tune_blocks *b, int64_t j);
const float *tune_block_m(const tune_blocks *b, int64_t j);

/* ---- curve.c: error and sparsity along the grid -------------------------------------------- */

/* Is called after every query block with the work done: 1 for a query block of a mask curve, else
 * 0. False stops, and the curve is SPARGE_OK but not whole. */
typedef struct tune_watch {
    bool (*tick)(void *user, double work);
    void *user;
} tune_watch;

/* point [TUNE_THETAS][TUNE_KEEPS] */
sparge_status tune_mask_curve(tune_input *x, bool topk, tune_point *point, const tune_watch *watch,
                              sparge_error *error);

/* point [TUNE_LAMBDAS], over the mask of these thresholds; *mask_kept is the pairs that it keeps.
 */
sparge_status tune_lambda_curve(tune_input *x, const sparge_thresholds *thresholds,
                                tune_point *point, double *mask_kept, const tune_watch *watch,
                                sparge_error *error);

/* ---- search.c: one head --------------------------------------------------------------------- */

/* An element of a batch of an input. */
typedef struct tune_sample {
    const sparge_problem *problem;
    int64_t batch;
} tune_sample;

typedef struct tune_task {
    const sparge_tune_options *how;
    const sparge_options *o;   /* without thresholds, without callbacks */
    const tune_sample *sample; /* [count]: `tuned` to tune on, then those that are held out */
    int64_t count, tuned;
    int64_t head;
    tune_watch watch;
} tune_task;

/* SPARGE_OK if the watch stopped it, too: *t is not done then. */
sparge_status tune_head(const tune_task *task, sparge_tuned *t, sparge_error *error);

/* ---- heads.c: what api/ calls ----------------------------------------------------------- */

/* Arguments are checked by then. */
sparge_status sparge_tune_heads(const sparge_problem *inputs, int64_t count,
                                const sparge_options *o, const sparge_tune_options *how,
                                sparge_tuned *heads, sparge_error *error);

/* ---- loss.c, price.c: by loss --------------------------------------------------------------- */

/* What sparge_loss_measure is given, checked. */
typedef struct tune_losses {
    const sparge_loss_input *inputs; /* [count] */
    int64_t count;
    const sparge_options *options;
    sparge_options resolved; /* for dense attention */
    const sparge_method *method;
    const double *param;
    const sparge_executor *executor;
    sparge_loss_point *point; /* [heads][points] */
    int64_t points;
} tune_losses;

sparge_status tune_losses_measure(const tune_losses *of, double *dense_passes, sparge_error *error);

/* As sparge_loss_choose, of whose method it needs this parameter; every step of a curve goes the
 * same way on its scale. */
double tune_scale(const sparge_param *param, double first);
sparge_status tune_choose(const sparge_param *param, const sparge_loss_point *point, int64_t heads,
                          int64_t points, const sparge_loss_goal *goal, sparge_loss_point *chosen,
                          sparge_error *error);

#endif
