/* SPDX-License-Identifier: Apache-2.0 */
/* devices.c: device memory, and the speed of this machine. */
#include "api/api.h"

#include "common/num.h"
#include "cpu/cpu.h"
#include "gpu/gpu.h"
#include "sparge_cuda.h"

sparge_status sparge_workspace_bytes(const sparge_problem *problem, const sparge_options *options,
                                     bool lse, int64_t *bytes, sparge_error *error)
{
    if (!bytes)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "bytes is NULL");
    sparge_problem sized = {0};
    if (problem) { /* sizes alone: any pointer will do */
        sized = *problem;
        sized.q.data = sized.k.data = sized.v.data = &sized;
    }
    sparge_mask shape;
    sparge_status status = sparge_check(problem ? &sized : NULL, options, true, NULL, error);
    if (!status)
        status = sparge_mask_shape(&shape, problem, options, error);
    if (status)
        return status;
    sparge_options o = *options;
    o.backend = SPARGE_CUDA;
    sparge_options in_part = o; /* where no kernel is named, partly attended blocks may choose it */
    shape.partial_first = &shape.words;
    status = sparge_resolve(problem, &o, NULL, error);
    if (!status)
        status = sparge_cuda_workspace(problem, &o, lse, bytes, error);
    int64_t more = 0;
    if (!status && !sparge_resolve(problem, &in_part, &shape, NULL) &&
        !sparge_cuda_workspace(problem, &in_part, lse, &more, NULL))
        *bytes = sparge_max(*bytes, more);
    return sparge_with_message(status, error);
}

sparge_status sparge_device_alloc(int64_t bytes, void **data, sparge_error *error)
{
    if (!data)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "data is NULL");
    *data = NULL;
    if (bytes < 0)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "bytes is %lld, it must be at least 0",
                           (long long)bytes);
    sparge_succeed(error);
    return sparge_with_message(sparge_cuda_alloc(bytes, data, error), error);
}

void sparge_device_free(void *data)
{
    if (data)
        sparge_cuda_free(data);
}

sparge_status sparge_device_copy(void *to, const void *from, int64_t bytes, sparge_error *error)
{
    if (bytes < 0)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "bytes is %lld, it must be at least 0",
                           (long long)bytes);
    if (bytes > 0 && (!to || !from))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL", to ? "from" : "to");
    sparge_succeed(error);
    return sparge_with_message(sparge_cuda_copy(to, from, bytes, error), error);
}

/* The instruction set and the threads that a measurement runs with. */
static sparge_status resolve_measurement(sparge_isa isa, int threads, sparge_options *o,
                                         sparge_error *error)
{
    *o = sparge_options_default(SPARGE_RULES_DEFAULT);
    o->isa = isa;
    o->threads = threads;
    const sparge_problem nothing = {.heads = 1, .kv_heads = 1, .dim = 1, .dim_v = 1};
    const sparge_status status = sparge_check(&nothing, o, false, NULL, error);
    return status ? status : sparge_resolve_cpu(o, error);
}

sparge_status sparge_measure_peaks(sparge_isa isa, int threads, sparge_peaks *peaks,
                                   sparge_error *error)
{
    sparge_options o;
    if (!peaks)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "peaks is NULL");
    const sparge_status status = resolve_measurement(isa, threads, &o, error);
    if (!status)
        *peaks = sparge_cpu_peaks(o.isa, o.threads);
    return status;
}

sparge_status sparge_measure_bandwidth(sparge_isa isa, int threads, double *bytes,
                                       sparge_error *error)
{
    sparge_options o;
    if (!bytes)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "bytes is NULL");
    sparge_status status = resolve_measurement(isa, threads, &o, error);
    if (!status)
        status = sparge_cpu_bandwidth(o.isa, o.threads, bytes);
    return sparge_with_message(status, error);
}
