/* SPDX-License-Identifier: Apache-2.0 */
/* cuda_runtime.h: stands in for NVIDIA's header where a .cu file is compiled for the host model.
 * The first half is CUDA C++ inside a kernel, the second the part of the runtime API that the
 * project uses, with NVIDIA's names, values and signatures (CUDA 13). No __shared__: kernels use
 * shared_memory() alone. */
#ifndef CUDA_MODEL_CUDA_RUNTIME_H
#define CUDA_MODEL_CUDA_RUNTIME_H

#include <functional>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
    unsigned x, y;
} __align__(8);
struct uint3 {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
} __align__(16);
struct int2 {
    int x, y;
} __align__(8);
struct int4 {
    int x, y, z, w;
} __align__(16);
struct float2 {
    float x, y;
} __align__(8);
struct float4 {
    float x, y, z, w;
} __align__(16);
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/* Of the thread that runs: the scheduler writes them before it gives a thread its turn. */
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

/* ---- What threads do together ------------------------------------------------------------- */

namespace cuda_model {

/* Every lane of the warp brings 4 bytes and sees those of all: shuffles, votes and reductions are
 * what a lane then makes of them. The call ends the launch with an error if the mask is not full,
 * lanes of this warp have returned, or others of them wait in a different call. */
struct Values {
    uint32_t of[32];
};
const Values &exchange(const char *name, unsigned mask, uint32_t mine);
int lane();
/* The number of threads that said yes, when all threads of the block that have not returned are
 * there. */
int meet_block(const char *name, bool yes);
void give_way();

template <class To, class From> To bits_as(From from)
{
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class T> T shuffle(const char *name, unsigned mask, T mine, int from)
{
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    uint32_t word[sizeof(T) / 4];
    memcpy(word, &mine, sizeof mine);
    for (uint32_t &part : word)
        part = exchange(name, mask, part).of[from & 31];
    memcpy(&mine, word, sizeof mine);
    return mine;
}

} // namespace cuda_model

/* Lanes fall into segments of `width`; what would come from outside the segment is the lane's own
 * value, but for an xor into an earlier segment. */
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32)
{
    const int from = (cuda_model::lane() & -width) | (source & (width - 1));
    return cuda_model::shuffle("__shfl_sync", mask, value, from);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32)
{
    const int lane = cuda_model::lane(), from = lane - (int)delta;
    return cuda_model::shuffle("__shfl_up_sync", mask, value, from < (lane & -width) ? lane : from);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32)
{
    const int lane = cuda_model::lane(), from = lane + (int)delta;
    return cuda_model::shuffle("__shfl_down_sync", mask, value,
                               from > (lane | (width - 1)) ? lane : from);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32)
{
    const int lane = cuda_model::lane(), from = lane ^ bits;
    return cuda_model::shuffle("__shfl_xor_sync", mask, value,
                               from > (lane | (width - 1)) ? lane : from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate)
{
    const cuda_model::Values &all = cuda_model::exchange("__ballot_sync", mask, predicate != 0);
    unsigned ballot = 0;
    for (int n = 0; n < 32; n++)
        ballot |= all.of[n] << n;
    return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate)
{
    return __ballot_sync(mask, predicate) == ~0u;
}
inline void __syncwarp(unsigned mask = ~0u) { cuda_model::exchange("__syncwarp", mask, 0); }

template <class T> T __reduce_add_sync(unsigned mask, T value)
{
    const cuda_model::Values &all =
        cuda_model::exchange("__reduce_add_sync", mask, (uint32_t)value);
    uint32_t sum = 0;
    for (uint32_t other : all.of)
        sum += other;
    return (T)sum;
}
template <class T> T __reduce_max_sync(unsigned mask, T value)
{
    const cuda_model::Values &all =
        cuda_model::exchange("__reduce_max_sync", mask, (uint32_t)value);
    for (uint32_t other : all.of)
        value = (T)other > value ? (T)other : value;
    return value;
}
template <class T> T __reduce_min_sync(unsigned mask, T value)
{
    const cuda_model::Values &all =
        cuda_model::exchange("__reduce_min_sync", mask, (uint32_t)value);
    for (uint32_t other : all.of)
        value = (T)other < value ? (T)other : value;
    return value;
}

inline void __syncthreads() { cuda_model::meet_block("__syncthreads", false); }
inline int __syncthreads_count(int yes)
{
    return cuda_model::meet_block("__syncthreads_count", yes);
}
inline int __syncthreads_or(int yes)
{
    return cuda_model::meet_block("__syncthreads_or", yes) != 0;
}
inline int __syncthreads_and(int yes)
{
    return cuda_model::meet_block("__syncthreads_and", !yes) == 0;
}

/* Threads give way in calls alone, so that what stands between two of them is atomic and in order.
 * A loop that waits for another thread to write must call __nanosleep. */
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { cuda_model::give_way(); }

template <class T> T atomicAdd(T *p, std::common_type_t<T> value)
{
    return std::exchange(*p, *p + value);
}
template <class T> T atomicOr(T *p, std::common_type_t<T> value)
{
    return std::exchange(*p, *p | value);
}
template <class T> T atomicAnd(T *p, std::common_type_t<T> value)
{
    return std::exchange(*p, *p & value);
}
template <class T> T atomicMax(T *p, std::common_type_t<T> value)
{
    return std::exchange(*p, *p < value ? value : *p);
}

/* ---- Arithmetic --------------------------------------------------------------------------- */

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __dp4a(int a, int b, int c)
{
    for (int shift = 0; shift < 32; shift += 8)
        c += (int8_t)(a >> shift) * (int8_t)(b >> shift);
    return c;
}

#define CUDA_MODEL_MIN_MAX(T)                        \
    inline T min(T a, T b) { return b < a ? b : a; } \
    inline T max(T a, T b) { return a < b ? b : a; }
CUDA_MODEL_MIN_MAX(int)
CUDA_MODEL_MIN_MAX(unsigned)
CUDA_MODEL_MIN_MAX(long)
CUDA_MODEL_MIN_MAX(unsigned long)
CUDA_MODEL_MIN_MAX(long long)
CUDA_MODEL_MIN_MAX(unsigned long long)
#undef CUDA_MODEL_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline int __vimax3_s32(int a, int b, int c) { return max(max(a, b), c); }

inline int __float_as_int(float x) { return cuda_model::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_model::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_model::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_model::bits_as<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
template <class T> T __ldg(const T *p) { return *p; }

/* ---- The runtime API ---------------------------------------------------------------------- */

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureImplicit = 906,
    cudaErrorCapturedEvent = 907,
    cudaErrorUnknown = 999
} cudaError_t;

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaMemoryType {
    cudaMemoryTypeUnregistered,
    cudaMemoryTypeHost,
    cudaMemoryTypeDevice,
    cudaMemoryTypeManaged
};
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
    void *devicePointer, *hostPointer;
};
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone,
    cudaStreamCaptureStatusActive,
    cudaStreamCaptureStatusInvalidated
};
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUgraph_st *cudaGraph_t;
typedef struct CUgraphExec_st *cudaGraphExec_t;
typedef struct cudaLaunchAttribute_st cudaLaunchAttribute; /* none is modelled */
typedef struct cudaLaunchConfig_st {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned int numAttrs;
} cudaLaunchConfig_t;

const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();

cudaError_t cudaMalloc(void **p, size_t bytes);
cudaError_t cudaMallocHost(void **p, size_t bytes);
cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t stream);
cudaError_t cudaFree(void *p);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = 0);
cudaError_t cudaMemset(void *p, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream = 0);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p);

cudaError_t cudaStreamCreate(cudaStream_t *stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                 unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = 0);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end);
cudaError_t cudaEventDestroy(cudaEvent_t event);

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);

template <class T> cudaError_t cudaMalloc(T **p, size_t bytes)
{
    return cudaMalloc((void **)(void *)p, bytes);
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t bytes)
{
    return cudaMallocHost((void **)(void *)p, bytes);
}
template <class T> cudaError_t cudaMallocAsync(T **p, size_t bytes, cudaStream_t stream)
{
    return cudaMallocAsync((void **)(void *)p, bytes, stream);
}
template <class T>
cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attribute, int value)
{
    return cudaFuncSetAttribute((const void *)kernel, attribute, value);
}

namespace cuda_model {
cudaError_t launch(const cudaLaunchConfig_t &config, const void *kernel,
                   std::function<void()> thread);
}

/* As NVIDIA's: the arguments become the parameters' types here, and the launch keeps these copies.
 */
template <class... ExpTypes, class... ActTypes>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(ExpTypes...),
                               ActTypes &&...args)
{
    return [&](ExpTypes... copies) {
        const std::tuple<ExpTypes...> all(copies...);
        const auto thread = [kernel, all] { std::apply(kernel, all); };
        return cuda_model::launch(*config, (const void *)kernel, thread);
    }(std::forward<ActTypes>(args)...);
}

#endif
