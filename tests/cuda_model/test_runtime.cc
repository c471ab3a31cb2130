/* SPDX-License-Identifier: Apache-2.0 */
/* test_runtime.cc: the runtime API of the model: streams, memory, graphs, errors; and what the
 * address sanitizer sees. */
#include "tests/cuda_model/test_model.h"

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

#define SUCCEEDS(call)     check_error(call, cudaSuccess, #call)
#define FAILS(call, error) check_error(call, error, #call)

struct Numbers {
    int of[16];
};

void add(int *p, Numbers n, int64_t i) { *p += n.of[i]; }

uint64_t kernels() { return cuda_model_count().kernels; }

void test_streams()
{
    cudaStream_t a, b, apart;
    int *p, *q, got = 0;
    SUCCEEDS(cudaStreamCreate(&a));
    SUCCEEDS(cudaStreamCreate(&b));
    SUCCEEDS(cudaStreamCreateWithFlags(&apart, cudaStreamNonBlocking));
    SUCCEEDS(cudaMalloc(&p, 4));
    SUCCEEDS(cudaMalloc(&q, 4));
    SUCCEEDS(cudaMemset(p, 0, 4));
    Numbers numbers = {{5, 7}};
    const cudaLaunchConfig_t in_a = config(1, 1, 0, a), in_b = config(1, 1, 0, b),
                             in_null = config(1, 1, 0);
    const cudaLaunchConfig_t in_apart = config(1, 1, 0, apart);
    SUCCEEDS(cudaLaunchKernelEx(&in_a, add, p, numbers, 1)); /* int becomes int64_t */
    numbers.of[1] = 1000;                                    /* too late */
    SUCCEEDS(cudaLaunchKernelEx(&in_b, add, p, numbers, 0));
    SUCCEEDS(cudaLaunchKernelEx(&in_apart, add, q, numbers, 0));
    check(kernels() == 0, "streams are lazy");
    SUCCEEDS(cudaStreamSynchronize(b));
    check(kernels() == 1, "one stream alone");
    SUCCEEDS(cudaMemcpy(&got, p, 4, cudaMemcpyDeviceToHost)); /* waits for a, but not for `apart` */
    check(got == 12 && kernels() == 2, "the NULL stream waits for the others: %d", got);
    SUCCEEDS(cudaLaunchKernelEx(&in_null, add, p, numbers, 0));
    SUCCEEDS(cudaMemcpyAsync(&got, p, 4, cudaMemcpyDeviceToHost, a));
    SUCCEEDS(cudaLaunchKernelEx(&in_null, add, p, numbers, 0)); /* after the copy */
    SUCCEEDS(cudaStreamSynchronize(a));
    check(got == 17 && kernels() == 3, "others wait for the NULL stream: %d", got);
    SUCCEEDS(cudaStreamDestroy(apart));
    FAILS(cudaStreamSynchronize(apart), cudaErrorInvalidResourceHandle);
    SUCCEEDS(cudaDeviceSynchronize());
    check(kernels() == 5, "what a destroyed stream still had to do is done");
    FAILS(cudaStreamDestroy(nullptr), cudaErrorInvalidResourceHandle);
    FAILS(cudaStreamCreateWithFlags(&apart, 7), cudaErrorInvalidValue);

    cudaEvent_t start, end;
    float milliseconds = -1;
    SUCCEEDS(cudaEventCreate(&start));
    SUCCEEDS(cudaEventCreate(&end));
    SUCCEEDS(cudaEventSynchronize(start)); /* never recorded */
    FAILS(cudaEventElapsedTime(&milliseconds, start, end), cudaErrorInvalidResourceHandle);
    SUCCEEDS(cudaEventRecord(start, a));
    SUCCEEDS(cudaLaunchKernelEx(&in_a, add, p, numbers, 0));
    SUCCEEDS(cudaEventRecord(end, a));
    SUCCEEDS(cudaLaunchKernelEx(&in_a, add, p, numbers, 0));
    FAILS(cudaEventElapsedTime(&milliseconds, start, end), cudaErrorNotReady);
    SUCCEEDS(cudaEventSynchronize(end));
    check(kernels() == 6, "an event waits for what stands before it");
    SUCCEEDS(cudaEventElapsedTime(&milliseconds, start, end));
    check(milliseconds >= 0 && milliseconds < 1e4f, "%g ms", (double)milliseconds);
    SUCCEEDS(cudaEventDestroy(start));
    SUCCEEDS(cudaEventDestroy(end));
    SUCCEEDS(cudaStreamDestroy(a));
    SUCCEEDS(cudaStreamDestroy(b));
    SUCCEEDS(cudaFree(p));
    SUCCEEDS(cudaFree(q));
    check(kernels() == 7 && cuda_model_count().handles == 0, "nothing is left");
}

void test_memory()
{
    uint8_t *p, host[64];
    cudaPointerAttributes attributes;
    cuda_model_settings.memory = 10000;
    SUCCEEDS(cudaMalloc(&p, 100));
    check(cuda_model_count().bytes == 100 && cuda_model_count().allocations == 1,
          "counts of memory");
    SUCCEEDS(cudaMemcpy(host, p + 36, 64, cudaMemcpyDeviceToHost));
    check(host[0] == 0xff && host[63] == 0xff, "memory is full of 0xFF");
    SUCCEEDS(cudaPointerGetAttributes(&attributes, p + 99));
    check(attributes.type == cudaMemoryTypeDevice && attributes.device == 0 &&
              attributes.devicePointer == p + 99,
          "inside");
    SUCCEEDS(cudaPointerGetAttributes(&attributes, p + 100));
    check(attributes.type == cudaMemoryTypeUnregistered, "behind");
    SUCCEEDS(cudaPointerGetAttributes(&attributes, host));
    check(attributes.type == cudaMemoryTypeUnregistered && !attributes.devicePointer, "the host's");
    uint8_t *pinned;
    SUCCEEDS(cudaMallocHost(&pinned, 10));
    SUCCEEDS(cudaPointerGetAttributes(&attributes, pinned + 5));
    check(attributes.type == cudaMemoryTypeHost, "pinned");
    SUCCEEDS(cudaMemcpy(p, pinned, 10, cudaMemcpyHostToDevice));
    FAILS(cudaFree(pinned), cudaErrorInvalidValue);
    SUCCEEDS(cudaFreeHost(pinned));

    void *big = host;
    FAILS(cudaMalloc(&big, 9901), cudaErrorMemoryAllocation);
    check(!big && cudaPeekAtLastError() == cudaErrorMemoryAllocation, "the last error");
    FAILS(cudaGetLastError(), cudaErrorMemoryAllocation);
    SUCCEEDS(cudaGetLastError());
    SUCCEEDS(cudaMalloc(&big, 0));
    SUCCEEDS(cudaFree(big));
    FAILS(cudaMalloc(&big, SIZE_MAX), cudaErrorMemoryAllocation);

    FAILS(cudaMemcpy(p, host, 101, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(p + 90, host, 11, cudaMemcpyDefault), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(host, host, 4, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(host, p, 4, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(host, p, 4, cudaMemcpyHostToHost), cudaErrorInvalidValue);
    FAILS(cudaMemcpy(nullptr, p, 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    SUCCEEDS(cudaMemcpy(host, p, 4, cudaMemcpyDefault));
    SUCCEEDS(cudaMemcpy(nullptr, nullptr, 0, cudaMemcpyDeviceToHost));
    FAILS(cudaMemset(p + 50, 0, 51), cudaErrorInvalidValue);
    FAILS(cudaMemset(host, 0, 4), cudaErrorInvalidValue);
    FAILS(cudaFree(p + 1), cudaErrorInvalidValue);
    FAILS(cudaFree(host), cudaErrorInvalidValue);

    cudaStream_t stream;
    SUCCEEDS(cudaStreamCreate(&stream));
    uint8_t *q;
    SUCCEEDS(cudaMallocAsync(&q, 8, stream));
    SUCCEEDS(cudaMemsetAsync(q, 3, 8, stream));
    SUCCEEDS(cudaMemcpyAsync(p, q, 8, cudaMemcpyDeviceToDevice, stream));
    SUCCEEDS(cudaFreeAsync(q, stream));
    check(cuda_model_count().allocations == 2, "cudaFreeAsync waits for its turn");
    SUCCEEDS(cudaStreamSynchronize(stream));
    SUCCEEDS(cudaMemcpy(host, p, 9, cudaMemcpyDeviceToHost));
    check(host[7] == 3 && host[8] == 0xff && cuda_model_count().allocations == 1, "work in order");
    FAILS(cudaFreeAsync(q, stream), cudaErrorInvalidValue);
    SUCCEEDS(cudaStreamDestroy(stream));
    SUCCEEDS(cudaFree(p));
    check(cuda_model_count().bytes == 0, "all is freed");
}

void nothing(int) {}

void test_launch_limits()
{
    const auto launch = [](dim3 grid, dim3 block, size_t shared) {
        const cudaLaunchConfig_t c = config(grid, block, shared);
        return cudaLaunchKernelEx(&c, nothing, 0);
    };
    FAILS(launch(0, 1, 0), cudaErrorInvalidConfiguration);
    FAILS(launch(dim3(1, 65536), 1, 0), cudaErrorInvalidConfiguration);
    FAILS(launch(1, dim3(1, 0), 0), cudaErrorInvalidConfiguration);
    FAILS(launch(1, 1025, 0), cudaErrorInvalidConfiguration);
    FAILS(launch(1, dim3(32, 33), 0), cudaErrorInvalidConfiguration);
    FAILS(launch(1, dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration);
    SUCCEEDS(launch(dim3(2, 2, 2), dim3(16, 1, 64), 48 << 10));
    FAILS(launch(1, 1, (48 << 10) + 1), cudaErrorInvalidValue);
    SUCCEEDS(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10));
    SUCCEEDS(launch(1, 1, 100 << 10));
    FAILS(launch(1, 1, (100 << 10) + 1), cudaErrorInvalidValue);
    FAILS(
        cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1),
        cudaErrorInvalidValue);
    cudaLaunchConfig_t c = config(1, 1, 0, (cudaStream_t)&c);
    FAILS(cudaLaunchKernelEx(&c, nothing, 0), cudaErrorInvalidResourceHandle);
    SUCCEEDS(cudaDeviceSynchronize());
    check(kernels() == 2 && cuda_model_count().launches == 11, "counts of launches");
}

void test_capture()
{
    cudaStream_t stream, other;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamCaptureStatus status;
    int *p, *scratch, got = 0;
    const Numbers numbers = {{5}};
    SUCCEEDS(cudaStreamCreate(&stream));
    SUCCEEDS(cudaStreamCreate(&other));
    SUCCEEDS(cudaMalloc(&p, 4));
    SUCCEEDS(cudaMemset(p, 0, 4));
    const cudaLaunchConfig_t in = config(1, 1, 0, stream), in_null = config(1, 1, 0);

    SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    SUCCEEDS(cudaLaunchKernelEx(&in, add, p, numbers, 0));
    SUCCEEDS(cudaMallocAsync(&scratch, 4, stream));
    SUCCEEDS(cudaMemcpyAsync(&got, scratch, 4, cudaMemcpyDeviceToHost, stream));
    SUCCEEDS(cudaMemsetAsync(scratch, 0, 4, stream)); /* and -1 again in the next run */
    SUCCEEDS(cudaFreeAsync(scratch, stream));
    SUCCEEDS(cudaStreamIsCapturing(stream, &status));
    check(status == cudaStreamCaptureStatusActive, "capturing");
    SUCCEEDS(cudaStreamEndCapture(stream, &graph));
    SUCCEEDS(cudaStreamIsCapturing(stream, &status));
    check(status == cudaStreamCaptureStatusNone, "not capturing");
    SUCCEEDS(cudaGraphInstantiate(&exec, graph));
    SUCCEEDS(cudaGraphDestroy(graph));
    SUCCEEDS(cudaStreamSynchronize(stream));
    check(kernels() == 0, "a capture runs nothing");
    for (int n = 1; n <= 3; n++) {
        SUCCEEDS(cudaGraphLaunch(exec, n == 2 ? other : stream));
        check(kernels() == (uint64_t)n - 1, "a graph is as lazy as other work");
        SUCCEEDS(cudaDeviceSynchronize());
        check(got == -1 && kernels() == (uint64_t)n, "memory of the graph is filled again");
    }
    SUCCEEDS(cudaMemcpy(&got, p, 4, cudaMemcpyDeviceToHost));
    check(got == 15, "three runs of the graph: %d", got);
    check(cuda_model_count().allocations == 2, "the graph keeps its memory");
    SUCCEEDS(cudaGraphExecDestroy(exec));
    check(cuda_model_count().allocations == 1, "and frees it");

    /* What is not permitted ends the capture. */
    void *memory;
    cudaError_t (*const forbidden[])(int *, cudaStream_t) = {
        [](int *x, cudaStream_t) { return cudaMalloc(&x, 4); },
        [](int *x, cudaStream_t) { return cudaFree(x); },
        [](int *x, cudaStream_t) { return cudaMemcpy(x, x, 4, cudaMemcpyDeviceToDevice); },
        [](int *x, cudaStream_t) { return cudaMemset(x, 0, 4); },
        [](int *, cudaStream_t) { return cudaDeviceSynchronize(); },
        [](int *, cudaStream_t s) { return cudaStreamSynchronize(s); },
        [](int *, cudaStream_t) { return cudaStreamSynchronize(nullptr); },
    };
    for (const auto &call : forbidden) {
        SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        FAILS(call(p, stream), cudaErrorStreamCaptureUnsupported);
        SUCCEEDS(cudaStreamIsCapturing(stream, &status));
        check(status == cudaStreamCaptureStatusInvalidated, "invalidated");
        FAILS(cudaLaunchKernelEx(&in, add, p, numbers, 0), cudaErrorStreamCaptureInvalidated);
        FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
        check(!graph, "no graph");
    }
    SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    SUCCEEDS(cudaMalloc(&memory, 4));
    FAILS(cudaLaunchKernelEx(&in_null, add, p, numbers, 0), cudaErrorStreamCaptureImplicit);
    FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
    SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    FAILS(cudaFreeAsync(memory, stream), cudaErrorInvalidValue);
    FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
    FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorInvalidValue);
    FAILS(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal),
          cudaErrorStreamCaptureUnsupported);

    cudaEvent_t event;
    SUCCEEDS(cudaEventCreate(&event));
    SUCCEEDS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    SUCCEEDS(cudaEventRecord(event, stream));
    FAILS(cudaEventSynchronize(event), cudaErrorCapturedEvent);
    FAILS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
    SUCCEEDS(cudaEventDestroy(event));
    SUCCEEDS(cudaFree(memory));
    SUCCEEDS(cudaFree(p));
    SUCCEEDS(cudaStreamDestroy(stream));
    SUCCEEDS(cudaStreamDestroy(other));
}

void test_planned_failures()
{
    void *p = nullptr, *q = nullptr;
    cuda_model_fail_call(2, cudaErrorUnknown);
    SUCCEEDS(cudaMalloc(&p, 8));
    FAILS(cudaMalloc(&q, 8), cudaErrorUnknown);
    SUCCEEDS(cudaMemset(p, 0, 8));
    check(!q && cuda_model_count().calls == 3, "a call that fails does nothing");
    cuda_model_fail_call(1, cudaErrorLaunchFailure);
    FAILS(cudaFree(p), cudaErrorLaunchFailure);
    check(cuda_model_count().allocations == 0, "but what releases releases");
    cuda_model_fail_launch(2, cudaErrorLaunchOutOfResources);
    const cudaLaunchConfig_t c = config(1, 1, 0);
    SUCCEEDS(cudaLaunchKernelEx(&c, nothing, 0));
    FAILS(cudaLaunchKernelEx(&c, nothing, 0), cudaErrorLaunchOutOfResources);
    SUCCEEDS(cudaLaunchKernelEx(&c, nothing, 0));
    cuda_model_fail_call(1, cudaErrorUnknown);
    cuda_model_fail_call(0, 0);
    SUCCEEDS(cudaDeviceSynchronize());
    check(kernels() == 2, "two of three launches");
}

void wrong() { __syncwarp(1); }

void test_sticky_error()
{
    cudaStream_t stream;
    void *p, *q;
    cuda_model_settings.quiet = true;
    SUCCEEDS(cudaStreamCreate(&stream));
    SUCCEEDS(cudaMalloc(&p, 8));
    SUCCEEDS(cudaMallocAsync(&q, 8, stream));
    const cudaLaunchConfig_t c = config(1, 32, 0, stream);
    SUCCEEDS(cudaLaunchKernelEx(&c, wrong));
    SUCCEEDS(cudaLaunchKernelEx(&c, nothing, 0));
    SUCCEEDS(cudaFreeAsync(q, stream));
    SUCCEEDS(cudaPeekAtLastError());
    FAILS(cudaStreamSynchronize(stream), cudaErrorLaunchFailure);
    check(kernels() == 1, "nothing runs after the error");
    FAILS(cudaLaunchKernelEx(&c, nothing, 0), cudaErrorLaunchFailure);
    FAILS(cudaFree(p), cudaErrorLaunchFailure);
    FAILS(cudaStreamDestroy(stream), cudaErrorLaunchFailure);
    check(cuda_model_count().bytes == 0 && cuda_model_count().handles == 0,
          "what releases releases after it");
}

void test_devices()
{
    int n = -1;
    SUCCEEDS(cudaGetDeviceCount(&n));
    check(n == 1, "one device");
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrComputeCapabilityMajor, 0));
    check(n == 9, "compute capability");
    cuda_model_settings.major = 8;
    cuda_model_settings.minor = 6;
    cuda_model_settings.multiprocessors = 17;
    cuda_model_settings.shared_memory = 99 << 10;
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrComputeCapabilityMajor, 0));
    check(n == 8, "compute capability");
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrComputeCapabilityMinor, 0));
    check(n == 6, "compute capability");
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
    check(n == 17, "multiprocessors");
    SUCCEEDS(cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    check(n == 99 << 10, "shared memory");
    FAILS(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 1), cudaErrorInvalidDevice);
    FAILS(cudaSetDevice(1), cudaErrorInvalidDevice);
    cuda_model_settings.devices = 2;
    SUCCEEDS(cudaSetDevice(1));
    SUCCEEDS(cudaGetDevice(&n));
    check(n == 1, "the current device");
    cuda_model_settings.devices = 0;
    FAILS(cudaGetDeviceCount(&n), cudaErrorNoDevice);
    check(n == 0, "no device");
    check(!strcmp(cudaGetErrorName(cudaErrorNoDevice), "cudaErrorNoDevice") &&
              !strcmp(cudaGetErrorString(cudaErrorInvalidValue), "invalid argument"),
          "names of errors");
}

/* ---- What the address sanitizer sees ------------------------------------------------------ */

/* True when a child that does this ends with an error. */
bool dies(void (*body)())
{
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr))
            _exit(0);
        body();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status != 0;
}

void test_sanitizer()
{
#if defined(__SANITIZE_ADDRESS__)
    const bool sanitizer = true;
#elif defined(__has_feature)
    const bool sanitizer = __has_feature(address_sanitizer);
#else
    const bool sanitizer = false;
#endif
    if (!sanitizer)
        return;
    typedef void (*Kernel)(uint8_t *);
    const Kernel last_byte = [](uint8_t *) { shared_memory()[99] = 1; };
    const Kernel behind_shared = [](uint8_t *) { shared_memory()[100] = 1; };
    const Kernel behind_global = [](uint8_t *x) { x[5] = 1; };
    static Kernel kernel;
    const auto kernel_dies = [&](Kernel k) {
        kernel = k;
        return dies([] {
            Device<uint8_t> x(5);
            run(1, 32, 100, kernel, x.p);
        });
    };
    check(!kernel_dies(last_byte), "the last byte of shared memory is there");
    check(kernel_dies(behind_shared), "a byte behind shared memory");
    check(kernel_dies(behind_global), "a byte behind device memory");
    const bool host_dies = dies([] {
        Device<uint8_t> x(5);
        x.p[0] = 1;
    });
    check(host_dies, "the host writes to device memory");
    const bool late_dies = dies([] {
        int *p;
        cudaStream_t stream;
        const Numbers numbers = {};
        cudaStreamCreate(&stream);
        cudaMalloc(&p, 4);
        cudaFreeAsync(p, stream);
        const cudaLaunchConfig_t c = config(1, 1, 0, stream);
        cudaLaunchKernelEx(&c, add, p, numbers, 0);
        cudaStreamSynchronize(stream);
    });
    check(late_dies, "a kernel after cudaFreeAsync");
}

} // namespace

std::vector<Test> runtime_tests()
{
    return {
        {"streams", test_streams},
        {"memory", test_memory},
        {"launch limits", test_launch_limits},
        {"capture", test_capture},
        {"planned failures", test_planned_failures},
        {"sticky error", test_sticky_error},
        {"devices", test_devices},
        {"sanitizer", test_sanitizer},
    };
}
