/* SPDX-License-Identifier: Apache-2.0 */
/* absent.c: the functions of gpu.h in a library that was built without CUDA. */
#include "gpu/gpu.h"

#include "common/error.h"

static sparge_status absent(sparge_error *error)
{
    return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                       "backend is cuda, which this library was built without");
}

bool sparge_cuda_built(void) { return false; }
bool sparge_cuda_available(void) { return false; }

sparge_status sparge_cuda_resolve(const sparge_problem *p, sparge_options *o,
                                  const sparge_mask *mask, sparge_error *error)
{
    (void)p, (void)o, (void)mask;
    return absent(error);
}

sparge_status sparge_cuda_workspace(const sparge_problem *p, const sparge_options *o, bool lse,
                                    int64_t *bytes, sparge_error *error)
{
    (void)p, (void)o, (void)lse, (void)bytes;
    return absent(error);
}

sparge_status sparge_cuda_predict(const sparge_problem *p, const sparge_options *o,
                                  sparge_mask *mask, const sparge_intermediates *intermediates,
                                  sparge_error *error)
{
    (void)p, (void)o, (void)mask, (void)intermediates;
    return absent(error);
}

sparge_status sparge_cuda_attend(const sparge_problem *p, const sparge_options *o,
                                 const sparge_mask *mask, sparge_result *result,
                                 sparge_error *error)
{
    (void)p, (void)o, (void)mask, (void)result;
    return absent(error);
}

sparge_status sparge_cuda_attention(const sparge_problem *p, const sparge_options *o,
                                    sparge_mask *mask, sparge_result *result, sparge_error *error)
{
    (void)p, (void)o, (void)mask, (void)result;
    return absent(error);
}

sparge_status sparge_cuda_alloc(int64_t bytes, void **data, sparge_error *error)
{
    (void)bytes, (void)data;
    return absent(error);
}

void sparge_cuda_free(void *data) { (void)data; }

sparge_status sparge_cuda_copy(void *to, const void *from, int64_t bytes, sparge_error *error)
{
    (void)to, (void)from, (void)bytes;
    return absent(error);
}
