/* SPDX-License-Identifier: Apache-2.0 */
/* sparge_tune.h: chooses the thresholds of every head on sample inputs (Sec 3.6).
 *
 * The grid has 32 thetas, 1031 taus (or topks) and 502 lambdas. The tuner first takes the (theta,
 * tau) of most sparsity whose error is below l1 on every input, then the lambda of most sparsity
 * whose error is below l2. The error is the relative L1, sum|o - o'| / sum|o'|, against dense
 * attention in f32 on the same backend. */
#ifndef SPARGE_TUNE_H
#define SPARGE_TUNE_H

#include "sparge.h"

SPARGE_BEGIN_DECLS

/* Zero is the default of all but l1 and l2. */
typedef struct sparge_tune_options {
    double l1, l2;    /* bounds of the error, 0 < l1 < l2 */
    bool mean;        /* bound the mean over the inputs, not every input */
    double sparsity;  /* in (0, 1): least error that has this sparsity, without l1, l2, lambda */
    bool topk;        /* choose topk, and leave tau off */
    int64_t held_out; /* last inputs to judge on, not tune on; 0: each in turn */
    double seconds;   /* time after which unfinished heads are given up; 0: never */
    /* Called with 0 to 1 by one thread at a time. If it returns false unfinished heads are given
     * up. */
    bool (*progress)(void *user, double done);
    /* Called by one thread at a time after each head. */
    void (*finished)(void *user, int64_t head);
    void *user; /* first argument of both */
} sparge_tune_options;

/* Errors of whole calls of sparge_attention over some inputs. */
typedef struct sparge_tune_errors {
    int64_t inputs;
    double mean, worst; /* relative L1; NaN without inputs, infinite if o is not finite */
    double sparsity;    /* mean over the inputs */
    int64_t nan, inf;   /* elements of o */
} sparge_tune_errors;

/* What the tuner did about an error above l2. Each step includes those before it. */
typedef enum sparge_back_off {
    SPARGE_AS_CHOSEN,      /* nothing */
    SPARGE_LAMBDA_LOWERED, /* lambda was lowered, down to -inf */
    SPARGE_TAU_RAISED,     /* tau or topk was raised */
    SPARGE_LEFT_DENSE      /* theta -1, tau 1, lambda -inf */
} sparge_back_off;

const char *sparge_back_off_string(sparge_back_off back_off); /* the word of JSON */

typedef struct sparge_tuned {
    bool done;         /* set on entry: the head is skipped; on return: it is finished */
    bool finite;       /* false: an input or its dense output has NaN or infinity; left dense */
    int64_t nonfinite; /* their elements that are NaN or infinite */
    bool dense;        /* theta -1, tau 1, lambda -inf */
    sparge_thresholds thresholds;
    sparge_back_off back_off;
    sparge_tune_errors in_sample;      /* of these thresholds, on the inputs tuned on */
    sparge_tune_errors held_out;       /* on inputs not tuned on */
    sparge_tune_errors held_out_first; /* the same, before backing off */
    double dense_passes;               /* products of blocks, in dense passes over the inputs */
    double seconds;
} sparge_tuned;

/* Tunes heads [heads] on options.threads threads. The heads do not depend on the threads.
 *
 * The inputs have the same heads, key heads and channels. Lengths and batches may differ. Every
 * element of a batch is an input. q, k and v are in host memory on every backend. The call ignores
 * thresholds, per_head, progress, and cuda.stream and workspace of the options. If each input is
 * held out in turn, `held_out` judges thresholds that were chosen without it, or dense ones if the
 * head is dense. The callbacks may not call this function. */
sparge_status sparge_tune(const sparge_problem *inputs, int64_t count,
                          const sparge_options *options, const sparge_tune_options *how,
                          sparge_tuned *heads, sparge_error *error);

SPARGE_END_DECLS

#endif
