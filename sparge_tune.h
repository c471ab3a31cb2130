/* SPDX-License-Identifier: Apache-2.0 */
/* sparge_tune.h: chooses the thresholds of every head on sample inputs (Sec 3.6).
 *
 * The grid has 32 thetas, 1031 taus (or topks) and 502 lambdas. The tuner first takes the (theta,
 * tau) of most sparsity whose error is below l1 on every input, then the lambda of most sparsity
 * whose error is below l2. The error is the relative L1, sum|o - o'| / sum|o'|, against dense
 * attention in f32 on the same backend. */
#ifndef SPARGE_TUNE_H
#define SPARGE_TUNE_H

#include "sparge_methods.h"

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

/* ---- By loss ------------------------------------------------------------------------------
 *
 * Chooses the first parameter of a method for the heads of all layers together, by what the error
 * of a head does to the model's loss:
 *
 *     double first[SPARGE_LOSS_POINTS];
 *     int points = sparge_loss_grid(method, first);
 *     ... for each layer: sparge_loss_measure, of all heads at each of these values
 *     sparge_loss_goal goal = {.density = 0.5};
 *     sparge_status status =
 *         sparge_loss_choose(method, curve, heads_of_all_layers, points, &goal, chosen, &error);
 *
 * g is the gradient, at the output of a head, of the model's loss summed over the tokens, with
 * labels drawn from the model. The loss of a head is the mean over its queries of
 * (g . (o' - o))^2 / 2, with o of dense attention in f32: what its error adds to the KL divergence
 * of the model from itself, in nats per token, to second order. Losses of heads add up. */

typedef struct sparge_loss_input {
    sparge_problem problem;
    sparge_in g;                   /* [batch][heads][q_len][dim_v], in host memory */
    const sparge_context *context; /* for the method, or NULL; without first and state */
} sparge_loss_input;

/* A head under one value of the first parameter. */
typedef struct sparge_loss_point {
    double first;
    double density; /* of tokens, mean over the inputs */
    double loss;    /* mean over the inputs; NaN if some of it is not finite */
} sparge_loss_point;

enum { SPARGE_LOSS_POINTS = 11 };

/* Values of the first parameter to measure, by rising density, and how many; 0: the method has no
 * such parameter. */
int sparge_loss_grid(const sparge_method *method, double first[SPARGE_LOSS_POINTS]);

/* Fills in density and loss of point[heads][points], whose `first` is the caller's. Costs a dense
 * pass over the inputs in f32 and one of its density for each point; *dense_passes is their sum,
 * over the backend's own products of blocks. The inputs are as of sparge_tune, but that they may
 * have a k_bias. param as of sparge_method_plan; param[0] is not used. executor: as of
 * sparge_plan_run. progress of the options gets 0 to 1. */
sparge_status sparge_loss_measure(const sparge_loss_input *inputs, int64_t count,
                                  const sparge_options *options, const sparge_method *method,
                                  const double *param, const sparge_executor *executor,
                                  sparge_loss_point *point, int64_t points, double *dense_passes,
                                  sparge_error *error);

/* What is sought: one of both, the other is 0. */
typedef struct sparge_loss_goal {
    double density; /* mean over the heads */
    double loss;    /* sum over the heads */
} sparge_loss_goal;

/* Chooses for each head of curve[heads][points], by rising density: the value of least loss +
 * price * density, at the one price that meets the goal. The losses are first made monotone and
 * drawn halfway to the heads' mean, in the logarithm: those of single heads are estimates. Between
 * points the losses are exponential, the densities linear, in the logarithm of the parameter (of
 * one in [low, high] that of (first - low) / (high - first)). `chosen` has the density and the
 * monotone loss there; a head with a loss that is NaN gets its last point. SPARGE_ERR_ARGUMENT
 * names the goals that can be reached. */
sparge_status sparge_loss_choose(const sparge_method *method, const sparge_loss_point *curve,
                                 int64_t heads, int64_t points, const sparge_loss_goal *goal,
                                 sparge_loss_point *chosen, sparge_error *error);

SPARGE_END_DECLS

#endif
