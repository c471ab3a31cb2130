/* SPDX-License-Identifier: Apache-2.0 */
/* host.h: what device.cu and host.cu share on the processor's side. */
#ifndef SPARGE_GPU_HOST_H
#define SPARGE_GPU_HOST_H

#include "common/error.h"
#include "gpu/gpu.h"
#include "gpu/work.h"

namespace sparge {

struct device {
    int capability;   /* 90 for 9.0 */
    int shared_limit; /* bytes of shared memory that a thread block may have */
};

/* The current device. Fails if there is none, or one before sm_80. */
sparge_status find_device(device *d, sparge_error *error);

/* The function of kernel 1 to 5. */
typedef cudaError_t (*attention)(const work &, cudaStream_t);
attention attention_of(int kernel);

/* Does some head have a lambda above -inf? */
bool may_skip(const sparge_problem *p, const sparge_options *o);

/* The message begins with `call`. */
sparge_status check(cudaError_t e, const char *call, sparge_error *error);

} // namespace sparge

#endif
