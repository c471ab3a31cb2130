/* SPDX-License-Identifier: Apache-2.0 */
/* device.cu: what the device at hand can do: its limits, which kernel runs for a call, its memory
 * for programs that have no CUDA of their own. */
#include "gpu/host.h"

using namespace sparge;

/* ---- Errors ---- */

sparge_status sparge::check(cudaError_t e, const char *call, sparge_error *error)
{
    if (e == cudaSuccess)
        return SPARGE_OK;
    return sparge_fail(error,
                       e == cudaErrorMemoryAllocation ? SPARGE_ERR_MEMORY : SPARGE_ERR_DEVICE,
                       "%s: %s (%s)", call, cudaGetErrorString(e), cudaGetErrorName(e));
}

/* ---- The device and the kernels ---- */

cudaError_t sparge::device_attribute(cudaDeviceAttr name, int *value)
{
    int id = 0;
    const cudaError_t e = cudaGetDevice(&id);
    return e == cudaSuccess ? cudaDeviceGetAttribute(value, name, id) : e;
}

sparge_status sparge::find_device(device *d, sparge_error *error)
{
    int count = 0, major = 0, minor = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess || count == 0)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "backend is cuda, but there is no CUDA device here: %s",
                           cudaGetErrorString(e == cudaSuccess ? cudaErrorNoDevice : e));
    const struct {
        cudaDeviceAttr name;
        int *value;
    } attributes[] = {
        {cudaDevAttrComputeCapabilityMajor, &major},
        {cudaDevAttrComputeCapabilityMinor, &minor},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &d->shared_limit},
    };
    for (const auto &a : attributes)
        if (e == cudaSuccess)
            e = device_attribute(a.name, a.value);
    d->capability = 10 * major + minor;
    if (e == cudaSuccess && d->capability < 80)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "the CUDA device has compute capability %d.%d, it must be at least 8.0",
                           major, minor);
    return check(e, "cudaDeviceGetAttribute", error);
}

enum { F32 = 1u << SPARGE_F32, INT8 = 1u << SPARGE_INT8 };
enum { F16 = 1u << SPARGE_F16, FP8 = 1u << SPARGE_FP8 };

/* What each kernel multiplies with. SPARGE_FASTEST means `fastest`. */
static const struct kernel {
    unsigned qk, pv; /* sets of dtypes */
    sparge_dtype fastest;
    attention attend;
} kernels[] = {
    {0, 0, SPARGE_FASTEST, NULL},
    {F32, F32, SPARGE_F32, attend_naive},
    {F32, F32, SPARGE_F32, attend_shared},
    {INT8, INT8, SPARGE_INT8, attend_dp4a},
    {INT8, INT8 | F16, SPARGE_F16, attend_mma},
    {INT8, F16 | FP8, SPARGE_FP8, attend_hopper},
};
enum { KERNELS = sizeof kernels / sizeof *kernels - 1 };

attention sparge::attention_of(int kernel) { return kernels[kernel].attend; }

bool sparge::may_skip(const sparge_problem *p, const sparge_options *o)
{
    if (!o->per_head)
        return o->thresholds.lambda > -INFINITY;
    for (int64_t h = 0; h < p->heads; h++)
        if (o->per_head[h].lambda > -INFINITY)
            return true;
    return false;
}

/* Why a kernel cannot do this here, as the end of a sentence. NULL: it can. */
static const char *obstacle(int n, const device &d, const sparge_problem *p,
                            const sparge_options *o, const sparge_mask *mask)
{
    const sparge_dtype pv = o->pv_dtype == SPARGE_FASTEST ? kernels[n].fastest : o->pv_dtype;
    const int64_t rows = o->skip_rows;
    if (!(kernels[n].qk >> o->qk_dtype & 1u))
        return n <= 2 ? "computes Q.K^T in float alone" : "computes Q.K^T in int8 alone";
    if (!(kernels[n].pv >> pv & 1u))
        return "does not have this precision of P.V";
    if (n == 5 && d.capability != 90)
        return "needs compute capability 9.0";
    if (n == 5 && may_skip(p, o) && rows != 16 && rows != 32 && rows != 64 && rows != 128)
        return "tests lambda for 16, 32, 64 or 128 rows at a time";
    if (n == 5 && mask && mask->partial_first)
        return "does not take partly attended blocks, but kernels 1 to 4 do";
    if (n == 5 && p->k_bias)
        return "does not take k_bias, but kernels 1 to 4 do";
    return NULL;
}

static sparge_status find_kernel(const device &d, const sparge_problem *p, sparge_options *o,
                                 const sparge_mask *mask, sparge_error *error)
{
    const char *why = NULL;
    int n = o->cuda.kernel;
    if (n)
        why = obstacle(n, d, p, o, mask);
    else
        for (n = KERNELS; n > 0 && (why = obstacle(n, d, p, o, mask)); n--)
            ;
    if (n == 0)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "no kernel of the cuda backend has these precisions of Q.K^T and P.V");
    if (why)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED, "kernel is %d, which %s", n, why);
    o->cuda.kernel = n;
    o->pv_dtype = o->pv_dtype == SPARGE_FASTEST ? kernels[n].fastest : o->pv_dtype;
    return SPARGE_OK;
}

bool sparge_cuda_built(void) { return true; }

bool sparge_cuda_available(void)
{
    device d;
    return find_device(&d, NULL) == SPARGE_OK;
}

sparge_status sparge_cuda_resolve(const sparge_problem *p, sparge_options *o,
                                  const sparge_mask *mask, sparge_error *error)
{
    device d;
    sparge_status status = find_device(&d, error);
    if (status)
        return status;
    if (o->block_q != BLOCK_Q || o->block_k != BLOCK_K)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "blocks are %lld x %lld, the cuda backend has 128 x 64 alone",
                           (long long)o->block_q, (long long)o->block_k);
    if (p->dim > MAX_WIDTH || p->dim_v > MAX_WIDTH)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "dim is %lld and dim_v %lld, the cuda backend has at most 128",
                           (long long)p->dim, (long long)p->dim_v);
    const int64_t most = (int64_t)1 << 30,
                  lines = p->batch * p->heads * sparge_ceil_div(p->q_len, BLOCK_Q);
    const int64_t columns = p->batch * p->kv_heads * sparge_ceil_div(p->k_len, BLOCK_K);
    if (p->q_len > most || p->k_len > most || lines > most || columns > most / 2)
        return sparge_fail(
            error, SPARGE_ERR_UNSUPPORTED,
            "q_len %lld, k_len %lld, batch %lld and heads %lld are too much for one launch",
            (long long)p->q_len, (long long)p->k_len, (long long)p->batch, (long long)p->heads);
    const auto fits = o->cell ? cells_fit : predict_fits;
    if (!fits(sparge_ceil_div(p->k_len, BLOCK_K), d.shared_limit))
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "k_len is %lld, a row of its blocks does not fit into shared memory",
                           (long long)p->k_len);
    return find_kernel(d, p, o, mask, error);
}

/* ---- Memory ---- */

/* If a call failed because there is no device to use, the message says that. */
static sparge_status check_memory(cudaError_t e, const char *call, sparge_error *error)
{
    device d;
    const sparge_status status = check(e, call, error);
    return status == SPARGE_ERR_DEVICE && find_device(&d, NULL) ? find_device(&d, error) : status;
}

sparge_status sparge_cuda_alloc(int64_t bytes, void **data, sparge_error *error)
{
    return check_memory(cudaMalloc(data, (size_t)sparge_max(1, bytes)), "cudaMalloc", error);
}

void sparge_cuda_free(void *data) { cudaFree(data); }

sparge_status sparge_cuda_copy(void *to, const void *from, int64_t bytes, sparge_error *error)
{
    device d;
    if (bytes == 0)
        return find_device(&d, error);
    return check_memory(cudaMemcpy(to, from, (size_t)bytes, cudaMemcpyDefault), "cudaMemcpy",
                        error);
}
