/* SPDX-License-Identifier: Apache-2.0 */
/* runtime.cc: the runtime API of CUDA, as far as we use it. */
#include "tests/cuda_model/state.h"

using namespace cuda_model;

/* ---- The API: errors and devices ---------------------------------------------------------- */

namespace {
struct Sentence {
    cudaError_t error;
    const char *name, *text;
};
#define SENTENCE(error, text) \
    Sentence { error, #error, text }
const Sentence sentences[] = {
    SENTENCE(cudaSuccess, "no error"),
    SENTENCE(cudaErrorInvalidValue, "invalid argument"),
    SENTENCE(cudaErrorMemoryAllocation, "out of memory"),
    SENTENCE(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    SENTENCE(cudaErrorInsufficientDriver,
             "CUDA driver version is insufficient for CUDA runtime version"),
    SENTENCE(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    SENTENCE(cudaErrorInvalidDevice, "invalid device ordinal"),
    SENTENCE(cudaErrorNoKernelImageForDevice,
             "no kernel image is available for execution on the device"),
    SENTENCE(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    SENTENCE(cudaErrorNotReady, "device not ready"),
    SENTENCE(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    SENTENCE(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    SENTENCE(cudaErrorLaunchFailure, "unspecified launch failure"),
    SENTENCE(cudaErrorNotSupported, "operation not supported"),
    SENTENCE(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    SENTENCE(cudaErrorStreamCaptureInvalidated,
             "operation failed due to a previous error during capture"),
    SENTENCE(cudaErrorStreamCaptureImplicit,
             "operation would make the legacy stream depend on a capturing blocking stream"),
    SENTENCE(cudaErrorCapturedEvent,
             "operation not permitted on an event last recorded in a capturing stream"),
    SENTENCE(cudaErrorUnknown, "unknown error"),
};
#undef SENTENCE

const Sentence &sentence(cudaError_t error)
{
    for (const Sentence &s : sentences)
        if (s.error == error)
            return s;
    static const Sentence none = {cudaErrorUnknown, "unrecognized error code",
                                  "unrecognized error code"};
    return none;
}
} // namespace

const char *cudaGetErrorName(cudaError_t error) { return sentence(error).name; }
const char *cudaGetErrorString(cudaError_t error) { return sentence(error).text; }

cudaError_t cudaPeekAtLastError() { return state->sticky ? state->sticky : state->last; }

cudaError_t cudaGetLastError()
{
    const cudaError_t error = cudaPeekAtLastError();
    state->last = cudaSuccess;
    return error;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = settings.devices;
    return api([] { return cudaSuccess; });
}

cudaError_t cudaGetDevice(int *device)
{
    return api([&] { return *device = state->device, cudaSuccess; });
}

cudaError_t cudaSetDevice(int device)
{
    return api([&] {
        if (device < 0 || device >= settings.devices)
            return cudaErrorInvalidDevice;
        state->device = device;
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    return api([&] {
        if (device < 0 || device >= settings.devices)
            return cudaErrorInvalidDevice;
        switch (attribute) {
        case cudaDevAttrMaxSharedMemoryPerBlock: return *value = 48 << 10, cudaSuccess;
        case cudaDevAttrMultiProcessorCount: return *value = settings.multiprocessors, cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: return *value = settings.major, cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: return *value = settings.minor, cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return *value = (int)settings.shared_memory, cudaSuccess;
        }
        return cudaErrorInvalidValue;
    });
}

cudaError_t cudaDeviceSynchronize()
{
    return api(
        [] { return somebody_captures() ? cudaErrorStreamCaptureUnsupported : finish(nullptr); });
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value)
{
    return api([&] {
        if (!kernel || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
            (size_t)value > settings.shared_memory)
            return cudaErrorInvalidValue;
        state->shared_limit[kernel] = (size_t)value;
        return cudaSuccess;
    });
}

/* ---- The API: memory ---------------------------------------------------------------------- */

namespace {
cudaError_t allocate_now(void **p, size_t bytes, cudaMemoryType type)
{
    return api([&] {
        return somebody_captures() ? cudaErrorStreamCaptureUnsupported : allocate(p, bytes, type);
    });
}

/* cudaFree waits for the device. */
cudaError_t free_now(void *p, cudaMemoryType type)
{
    return api(
        [&] {
            if (somebody_captures())
                return cudaErrorStreamCaptureUnsupported;
            const cudaError_t error = finish(nullptr);
            if (p && !is_allocation(p, type))
                return cudaErrorInvalidValue;
            deallocate(p);
            return error;
        },
        releases);
}
} // namespace

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    return allocate_now(p, bytes, cudaMemoryTypeDevice);
}
cudaError_t cudaMallocHost(void **p, size_t bytes)
{
    return allocate_now(p, bytes, cudaMemoryTypeHost);
}
cudaError_t cudaFree(void *p) { return free_now(p, cudaMemoryTypeDevice); }
cudaError_t cudaFreeHost(void *p) { return free_now(p, cudaMemoryTypeHost); }

/* At once, in a capture too: the memory is the graph's, and full of 0xFF again whenever the graph
 * runs. */
cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t stream)
{
    return api([&] {
        CUstream_st *s = find_stream(stream);
        if (!s)
            return cudaErrorInvalidResourceHandle;
        const cudaError_t error = allocate(p, bytes, cudaMemoryTypeDevice);
        if (error || !bytes || !s->capture)
            return error;
        s->capture->memory.push_back(*p);
        return enqueue(s, [memory = *p, bytes] { memset(memory, 0xff, bytes); });
    });
}

cudaError_t cudaFreeAsync(void *p, cudaStream_t stream)
{
    return api(
        [&] {
            CUstream_st *s = find_stream(stream);
            if (!s)
                return cudaErrorInvalidResourceHandle;
            if (!p)
                return cudaSuccess;
            if (s->capture) { /* the graph keeps its own memory, and cannot free other */
                const auto &own = s->capture->memory;
                if (std::find(own.begin(), own.end(), p) != own.end())
                    return cudaSuccess;
                s->capture->invalid = true;
                return cudaErrorInvalidValue;
            }
            if (!is_allocation(p, cudaMemoryTypeDevice))
                return cudaErrorInvalidValue;
            const auto task = [p] { deallocate(p); };
            return enqueue(s, task, true);
        },
        releases);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    return api([&] {
        if (!copy_is_possible(to, from, bytes, kind))
            return cudaErrorInvalidValue;
        return enqueue(find_stream(stream), [=] { copy(to, from, bytes); });
    });
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    return api([&] {
        if (somebody_captures())
            return cudaErrorStreamCaptureUnsupported;
        if (!copy_is_possible(to, from, bytes, kind))
            return cudaErrorInvalidValue;
        const cudaError_t error = enqueue(find_stream(0), [=] { copy(to, from, bytes); });
        return error ? error : finish(find_stream(0));
    });
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream)
{
    return api([&] {
        if (bytes && !is_device_memory(p, bytes))
            return cudaErrorInvalidValue;
        return enqueue(find_stream(stream), [=] {
            if (bytes)
                memset(p, value, bytes);
        });
    });
}

cudaError_t cudaMemset(void *p, int value, size_t bytes)
{
    if (somebody_captures())
        return api([] { return cudaErrorStreamCaptureUnsupported; });
    return cudaMemsetAsync(p, value, bytes, 0);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p)
{
    return api([&] {
        const auto *a = find(p);
        *attributes = {cudaMemoryTypeUnregistered, -2, nullptr, const_cast<void *>(p)};
        if (a)
            *attributes = {a->second.type, a->second.device, const_cast<void *>(p),
                           a->second.type == cudaMemoryTypeHost ? const_cast<void *>(p) : nullptr};
        return cudaSuccess;
    });
}

/* ---- The API: streams, graphs, events ----------------------------------------------------- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    return api([&] {
        if (flags > cudaStreamNonBlocking)
            return cudaErrorInvalidValue;
        state->streams.emplace_back(new CUstream_st{flags == cudaStreamDefault});
        *stream = state->streams.back().get();
        state->counts.handles++;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

/* What is still in the queue runs when somebody waits for the device. */
cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    return api(
        [&] {
            CUstream_st *s = find_stream(stream);
            if (!s || !stream)
                return cudaErrorInvalidResourceHandle;
            s->capture.reset();
            s->destroyed = true;
            state->counts.handles--;
            return cudaSuccess;
        },
        releases);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    return api([&] {
        CUstream_st *s = find_stream(stream);
        if (!s)
            return cudaErrorInvalidResourceHandle;
        if (s->capture ? (s->capture->invalid = true) : !stream && somebody_captures())
            return cudaErrorStreamCaptureUnsupported;
        return finish(s);
    });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
{
    return api([&] {
        CUstream_st *s = find_stream(stream);
        if (!s)
            return cudaErrorInvalidResourceHandle;
        if (!stream)
            return cudaErrorStreamCaptureUnsupported;
        if (s->capture)
            return cudaErrorInvalidValue;
        s->capture = std::make_shared<Captured>();
        s->capture->mode = mode;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    return api(
        [&] {
            CUstream_st *s = find_stream(stream);
            *graph = nullptr;
            if (!s || !s->capture)
                return cudaErrorInvalidValue;
            const std::shared_ptr<Captured> captured = std::move(s->capture);
            if (captured->invalid)
                return cudaErrorStreamCaptureInvalidated;
            return create(graph, {captured});
        },
        releases);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status)
{
    return api([&] {
        const CUstream_st *s = find_stream(stream);
        if (!s)
            return cudaErrorInvalidResourceHandle;
        *status = !s->capture           ? cudaStreamCaptureStatusNone
                  : s->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                        : cudaStreamCaptureStatusActive;
        return cudaSuccess;
    });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    return api(
        [&] { return graph && !flags ? create(exec, {graph->captured}) : cudaErrorInvalidValue; });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    return api([&] {
        if (!exec)
            return cudaErrorInvalidValue;
        return enqueue(find_stream(stream), [captured = exec->captured] {
            for (const Task &task : captured->tasks)
                if (!state->sticky)
                    task();
        });
    });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return destroy(graph); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return destroy(exec); }

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return api([&] { return create(event, {}); });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) { return destroy(event); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    return api([&] {
        CUstream_st *s = find_stream(stream);
        if (!s || !event)
            return cudaErrorInvalidResourceHandle;
        const auto happened = std::make_shared<Clock::time_point>();
        *event = {happened, s, state->number, s->capture != nullptr};
        return enqueue(s, [happened] { *happened = Clock::now(); });
    });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    return api([&] {
        if (!event)
            return cudaErrorInvalidResourceHandle;
        if (event->captured)
            return somebody_captures(), cudaErrorCapturedEvent;
        return event->happened ? finish(event->stream, event->number + 1) : cudaSuccess;
    });
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    return api([&] {
        if (!start || !end || !start->happened || !end->happened)
            return cudaErrorInvalidResourceHandle;
        const Clock::time_point not_yet;
        if (*start->happened == not_yet || *end->happened == not_yet)
            return cudaErrorNotReady;
        *milliseconds =
            std::chrono::duration<float, std::milli>(*end->happened - *start->happened).count();
        return cudaSuccess;
    });
}
