/* SPDX-License-Identifier: Apache-2.0 */
/* plan.h: what a command computes, as a plan: of --method, or one part as the options say. What is
 * wrong ends the program. */
#ifndef SPARGE_TOOLS_PLAN_H
#define SPARGE_TOOLS_PLAN_H

#include "tools/capture.h"
#include "tools/progress.h"

/* What a method is told of a capture beside its tensors. */
sparge_context plan_context(const capture *c, const sparge_problem *p);

/* SpargeAttn with the thresholds of the options. */
method_choice plan_spargeattn(const sparge_options *o);

/* o: settled. They become those of the first part, resolved, but for causality. `found` is the
 * method and its parameters, with the one that --density found; no method without --method. If a
 * part has no mask, that is because it is the only one, which the backend predicts. */
void plan_make(const attention_args *args, const capture *c, const sparge_problem *p,
               sparge_options *o, method_choice *found, sparge_plan *out);

/* On cuda, which has blocks of one size alone, masks are converted to it. */
void plan_fit(sparge_plan *plan);

/* The mask of a part; NULL: dense. */
const sparge_mask *plan_mask(const sparge_part *part);

/* How its pairs are attended, as sparge_plan_pairs says; and the same as a file. mask: of a plan
 * that is one call. */
void plan_pairs(const sparge_plan *plan, array *out);
void plan_write_pairs(FILE *stream, const char *path, const sparge_plan *plan,
                      const sparge_mask *mask);

/* Its parts call progress_tick. */
void plan_watch(sparge_plan *plan, progress *watch);

/* Attention by a plan: by the oracle over q, k and v as they are, or by what computes one part.
 * Arrays of f64, which it allocates: o is [batch][heads][q_len][dim_v], NULL: not wanted; lse
 * [batch][heads][q_len]; kept is the lse over the keys that are attended to themselves, and not
 * pooled. */
typedef void plan_function(const sparge_part *part, void *user, double *o, double *lse);
void plan_sum(const sparge_plan *plan, plan_function *function, void *user, array *o, array *lse,
              array *kept);
void plan_oracle(sparge_plan *plan, const char *what, array *o, array *lse, array *kept);

#endif
