/* SPDX-License-Identifier: Apache-2.0 */
/* model.h: the forward pass of a Llama or a Qwen2: prefill alone, no cache. */
#ifndef SPARGE_LM_MODEL_H
#define SPARGE_LM_MODEL_H

#include "experiments/lm/checkpoint.h"

/* Attention of one layer: causal, q [heads][tokens][head_dim] and k, v [kv_heads][tokens][head_dim]
 * as the problem views them, after the rotation and before the scale; o as it views it. Channel c
 * of q and k has turned together with c + head_dim / 2. */
typedef struct attender {
    exit_code (*attend)(void *user, int64_t layer, const sparge_problem *problem,
                        const sparge_out *o, file_error *error);
    void *user;
} attender;

typedef struct model model;

/* The checkpoint must outlive it. EXIT_FILE where a tensor is missing or of another shape,
 * EXIT_UNSUPPORTED where there is one that nothing here reads. */
exit_code model_open(const checkpoint *c, model **out, file_error *error);
void model_close(model *m); /* NULL is fine */

/* Its sizes, with the vocabulary. */
const hyper *model_hyper(const model *m);

/* The hidden states [tokens][dim] after the last norm. Tokens are below vocab. What `how` returns
 * instead of EXIT_FINE ends the run, and is returned. */
exit_code model_run(const model *m, const int32_t *token, int64_t tokens, const attender *how,
                    float *hidden, file_error *error);

/* Logits [rows][vocab] of some of those rows. */
exit_code model_logits(const model *m, const float *hidden, int64_t rows, float *logits,
                       file_error *error);

#endif
