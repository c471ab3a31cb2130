/* SPDX-License-Identifier: Apache-2.0 */
/* gpu.h: the cuda backend as api/ sees it, and all of it that a C compiler sees. api/ has
 * checked the arguments and resolved the options. Pointers are device pointers. In a library built
 * without CUDA the functions of gpu/absent.c answer.
 *
 * `error` may be NULL. It says why a function failed, for a CUDA error with the call that caused
 * it.
 */
#ifndef SPARGE_GPU_GPU_H
#define SPARGE_GPU_GPU_H

#include "sparge.h"

#ifdef __cplusplus
extern "C" {
#endif

bool sparge_cuda_built(void);
bool sparge_cuda_available(void); /* there is a device that runs kernel 1 */

/* Fills in o->cuda.kernel if 0 and o->pv_dtype if FASTEST. Fails if this device or this backend
 * cannot do what is asked. Of the mask it asks whether it has partly attended blocks; NULL: none.
 */
sparge_status sparge_cuda_resolve(const sparge_problem *p, sparge_options *o,
                                  const sparge_mask *mask, sparge_error *error);

sparge_status sparge_cuda_workspace(const sparge_problem *p, const sparge_options *o, bool lse,
                                    int64_t *bytes, sparge_error *error);

/* Prediction, attention, both. In `attention` mask->bits may be NULL: the mask then stands in the
 * workspace. In `attend` a mask of NULL is dense. Intermediates are never NULL. result->head_counts
 * may be NULL. The callee fills in result->counts. */
sparge_status sparge_cuda_predict(const sparge_problem *p, const sparge_options *o,
                                  sparge_mask *mask, const sparge_intermediates *intermediates,
                                  sparge_error *error);
sparge_status sparge_cuda_attend(const sparge_problem *p, const sparge_options *o,
                                 const sparge_mask *mask, sparge_result *result,
                                 sparge_error *error);
sparge_status sparge_cuda_attention(const sparge_problem *p, const sparge_options *o,
                                    sparge_mask *mask, sparge_result *result, sparge_error *error);

sparge_status sparge_cuda_alloc(int64_t bytes, void **data, sparge_error *error);
void sparge_cuda_free(void *data);
sparge_status sparge_cuda_copy(void *to, const void *from, int64_t bytes, sparge_error *error);

#ifdef __cplusplus
}
#endif
#endif
