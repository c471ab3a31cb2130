/* gpu.h: the cuda backend as sparge.c sees it, and all of it that a C compiler sees. Arguments are
 * checked and options resolved by then; pointers are device pointers. gpu/absent.c answers where
 * the library is built without CUDA.
 *
 * Every function that fails for more reasons than memory says which in `error` (or NULL): a CUDA
 * error by the name of the call that caused it. */
#ifndef SPARGE_GPU_GPU_H
#define SPARGE_GPU_GPU_H

#include "sparge.h"

#ifdef __cplusplus
extern "C" {
#endif

bool sparge_cuda_built(void);
bool sparge_cuda_available(void); /* there is a device, and kernel 1 runs on it */

/* Fills in o->kernel and o->pv_dtype where 0 and FASTEST leave the choice; an error where this
 * device or this backend cannot do what is asked. */
sparge_status sparge_cuda_resolve(const sparge_problem *p, sparge_options *o, sparge_error *error);

sparge_status sparge_cuda_workspace(const sparge_problem *p, const sparge_options *o, bool lse,
                                    int64_t *bytes, sparge_error *error);

/* The stages. mask->bits may be NULL in `attention`: the mask then stands in the workspace. A mask
 * of NULL is dense. result->head_counts may be NULL; result->counts is the callee's to fill in. */
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
