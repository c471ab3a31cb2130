/* model.cc: the runtime API. Device memory is host memory that is known here; a stream is a queue
 * of work that runs when somebody waits for it and not earlier, so that a missing wait shows. */
#include "tests/cuda_model/cuda_model.h"
#include "tests/cuda_model/threads.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <stdlib.h>

namespace cuda_model {

using Task = std::function<void()>;

/* A piece of work in a queue. Numbers ascend over all streams. */
struct Operation {
    uint64_t number;
    bool releases; /* is done even after an error */
    Task task;
};

/* What was captured. A graph and what was instantiated from it share it: memory that was allocated
 * in the capture lives as long as either. */
struct Captured {
    bool invalid = false;
    cudaStreamCaptureMode mode;
    std::vector<Task> tasks;
    std::vector<void *> memory;
    ~Captured();
};

using Clock = std::chrono::steady_clock;

} // namespace cuda_model

struct CUgraph_st {
    std::shared_ptr<cuda_model::Captured> captured;
};
struct CUgraphExec_st {
    std::shared_ptr<cuda_model::Captured> captured;
};
struct CUstream_st {
    bool blocking; /* takes turns with the NULL stream */
    bool destroyed = false;
    std::deque<cuda_model::Operation> queue = {};
    std::shared_ptr<cuda_model::Captured> capture = nullptr;
};
struct CUevent_st {
    std::shared_ptr<cuda_model::Clock::time_point>
        happened; /* null: never recorded; the epoch: not yet */
    CUstream_st *stream = nullptr;
    uint64_t number = 0;
    bool captured = false;
};

namespace cuda_model {
namespace {

struct Allocation {
    size_t bytes;
    cudaMemoryType type;
    int device;
};

/* Never destroyed: programs may call from their own last destructors. */
struct State {
    std::map<uintptr_t, Allocation> memory;
    std::vector<std::unique_ptr<CUstream_st>> streams; /* the first is the NULL stream */
    std::map<const void *, size_t> shared_limit;       /* of kernels that opted in */
    uint64_t number = 0, fail_call = 0, fail_launch = 0;
    int fail_call_error = 0, fail_launch_error = 0;
    int device = 0;
    cudaError_t last = cudaSuccess, sticky = cudaSuccess;
    ::cuda_model_counts counts = {};
    State() { streams.emplace_back(new CUstream_st{true}); }
};
State *state = new State;

const struct cuda_model_settings &settings = ::cuda_model_settings;

/* ---- Memory ------------------------------------------------------------------------------- */

/* Under the address sanitizer device memory may be touched while the device works, and by nobody
 * else. */
void set_visible(uintptr_t p, const Allocation &a, bool visible)
{
    (void)p, (void)a, (void)visible;
#ifdef CUDA_MODEL_ASAN
    if (a.type == cudaMemoryTypeDevice) {
        if (visible)
            __asan_unpoison_memory_region((void *)p, a.bytes);
        else
            __asan_poison_memory_region((void *)p, a.bytes);
    }
#endif
}

const std::pair<const uintptr_t, Allocation> *find(const void *p)
{
    auto next = state->memory.upper_bound((uintptr_t)p);
    if (next == state->memory.begin() || (uintptr_t)p >= (--next)->first + next->second.bytes)
        return nullptr;
    return &*next;
}

cudaError_t allocate(void **p, size_t bytes, cudaMemoryType type)
{
    *p = nullptr;
    if (bytes == 0)
        return cudaSuccess;
    if (bytes > settings.memory || state->counts.bytes > settings.memory - bytes ||
        posix_memalign(p, 256, bytes))
        return cudaErrorMemoryAllocation;
    memset(*p, 0xff, bytes);
    state->counts.bytes += bytes;
    state->counts.allocations++;
    const Allocation &a = state->memory[(uintptr_t)*p] = {bytes, type, state->device};
    set_visible((uintptr_t)*p, a, false);
    return cudaSuccess;
}

/* False when p is not the beginning of an allocation of this type. */
bool is_allocation(const void *p, cudaMemoryType type)
{
    const auto *a = find(p);
    return a && a->first == (uintptr_t)p && a->second.type == type;
}

void deallocate(void *p)
{
    const auto a = state->memory.find((uintptr_t)p);
    if (a == state->memory.end())
        return;
    set_visible(a->first, a->second, true);
    state->counts.bytes -= a->second.bytes;
    state->counts.allocations--;
    state->memory.erase(a);
    free(p);
}

/* One end of a copy: on the side that the kind says, and in memory as far as the model knows it. */
bool is_end(const void *p, size_t bytes, bool device, bool any)
{
    const auto *a = find(p);
    return a && a->second.type == cudaMemoryTypeDevice
               ? (device || any) && is_device_memory(p, bytes)
               : !device && p;
}

bool copy_is_possible(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    const bool any = kind == cudaMemcpyDefault;
    return !bytes ||
           (is_end(to, bytes, kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice,
                   any) &&
            is_end(from, bytes, kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice,
                   any));
}

void copy(void *to, const void *from, size_t bytes)
{
    if (bytes) /* 0 bytes may have null pointers */
        memmove(to, from, bytes);
}

/* ---- Calls -------------------------------------------------------------------------------- */

enum Purpose { works, releases };

/* Every function of the API runs in this: counts, planned failures, errors that stick or are
 * remembered. */
template <class Body> cudaError_t api(Body body, Purpose purpose = works)
{
    State &s = *state;
    s.counts.calls++;
    cudaError_t error = s.sticky;
    if (s.fail_call && --s.fail_call == 0)
        error = (cudaError_t)s.fail_call_error;
    else if (settings.devices < 1)
        error = cudaErrorNoDevice;
    if (!error || purpose == releases) {
        const cudaError_t own = body();
        error = error ? error : s.sticky ? s.sticky : own;
    }
    if (error && error != cudaErrorNotReady)
        s.last = error;
    return error;
}

/* Handles of events and graphs are pointers: one that is used after its end is found by the address
 * sanitizer, one that is never destroyed by its leak check and by counts.handles. */
template <class T> cudaError_t create(T **handle, T value)
{
    *handle = new T(std::move(value));
    state->counts.handles++;
    return cudaSuccess;
}

template <class T> cudaError_t destroy(T *handle)
{
    return api(
        [&] {
            if (!handle)
                return cudaErrorInvalidResourceHandle;
            delete handle;
            state->counts.handles--;
            return cudaSuccess;
        },
        releases);
}

CUstream_st *find_stream(cudaStream_t handle)
{
    for (const auto &s : state->streams)
        if (s.get() == (handle ? handle : state->streams[0].get()) && !s->destroyed)
            return s.get();
    return nullptr;
}

/* CUDA C++ Programming Guide, stream capture: what waits or allocates is not permitted while a
 * stream captures, unless it does so in relaxed mode, and ends that capture. */
bool somebody_captures()
{
    bool any = false;
    for (const auto &s : state->streams)
        if (s->capture && s->capture->mode != cudaStreamCaptureModeRelaxed)
            any = s->capture->invalid = true;
    return any;
}

/* ---- Streams ------------------------------------------------------------------------------ */

cudaError_t enqueue(CUstream_st *stream, Task task, bool operation_releases = false)
{
    if (!stream)
        return cudaErrorInvalidResourceHandle;
    if (state->sticky && operation_releases)
        return task(), cudaSuccess;
    if (stream->capture) {
        if (stream->capture->invalid)
            return cudaErrorStreamCaptureInvalidated;
        stream->capture->tasks.push_back(std::move(task));
        return cudaSuccess;
    }
    if (stream == state->streams[0].get())
        for (const auto &s : state->streams)
            if (s->capture && s->blocking) {
                s->capture->invalid = true;
                return cudaErrorStreamCaptureImplicit;
            }
    stream->queue.push_back({state->number++, operation_releases, std::move(task)});
    return cudaSuccess;
}

/* Runs what is in the stream and older than `end`. The NULL stream and the blocking streams wait
 * for each other's older work. */
void run_stream(CUstream_st &stream, uint64_t end)
{
    CUstream_st *const null_stream = state->streams[0].get();
    while (!stream.queue.empty() && stream.queue.front().number < end) {
        const Operation o = std::move(stream.queue.front());
        stream.queue.pop_front();
        for (const auto &other : state->streams)
            if (other.get() != &stream && stream.blocking && other->blocking &&
                (&stream == null_stream || other.get() == null_stream))
                run_stream(*other, o.number);
        if (!state->sticky || o.releases)
            o.task();
    }
}

/* Runs one stream, or all of them. */
cudaError_t finish(CUstream_st *one, uint64_t end = UINT64_MAX)
{
    for (const auto &a : state->memory)
        set_visible(a.first, a.second, true);
    for (const auto &s : state->streams)
        if (!one || s.get() == one)
            run_stream(*s, end);
    for (const auto &s : state->streams)
        if (state->sticky)
            run_stream(*s, UINT64_MAX); /* what releases is still done */
    for (const auto &a : state->memory)
        set_visible(a.first, a.second, false);
    auto &all = state->streams;
    all.erase(std::remove_if(all.begin(), all.end(),
                             [](const auto &s) { return s->destroyed && s->queue.empty(); }),
              all.end());
    return state->sticky;
}

struct cuda_model_settings defaults()
{
    const char *late = getenv("CUDA_MODEL_LATE"), *seed = getenv("CUDA_MODEL_SEED");
    struct cuda_model_settings s = {};
    s.late = late ? atoi(late) : 0;
    s.seed = seed ? strtoull(seed, nullptr, 0) : 0;
    s.resident_blocks = 2;
    s.devices = 1;
    s.major = 9;
    s.multiprocessors = 4;
    s.shared_memory = 227 << 10;
    s.memory = 1 << 30;
    return s;
}

} // namespace

bool is_device_memory(const void *p, size_t bytes)
{
    const auto *a = find(p);
    return a && a->second.type == cudaMemoryTypeDevice &&
           bytes <= a->first + a->second.bytes - (uintptr_t)p;
}

cudaError_t launch(const cudaLaunchConfig_t &config, const void *kernel,
                   std::function<void()> thread)
{
    return api([&] {
        State &s = *state;
        const dim3 &g = config.gridDim, &b = config.blockDim;
        s.counts.launches++;
        if (s.fail_launch && --s.fail_launch == 0)
            return (cudaError_t)s.fail_launch_error;
        if (!kernel || config.numAttrs)
            return cudaErrorInvalidValue;
        if (!g.x || !g.y || !g.z || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535 || !b.x ||
            !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64 ||
            (uint64_t)b.x * b.y * b.z > 1024)
            return cudaErrorInvalidConfiguration;
        const auto limit = s.shared_limit.find(kernel);
        if (config.dynamicSmemBytes > (limit == s.shared_limit.end() ? 48 << 10 : limit->second))
            return cudaErrorInvalidValue;
        const Grid grid = {g, b, config.dynamicSmemBytes, std::move(thread)};
        return enqueue(find_stream(config.stream), [grid] {
            state->counts.kernels++;
            if (!run(grid))
                state->sticky = cudaErrorLaunchFailure;
        });
    });
}

} // namespace cuda_model

using namespace cuda_model;

Captured::~Captured()
{
    for (void *p : memory)
        deallocate(p);
}

/* ---- What a test says and asks ------------------------------------------------------------ */

struct cuda_model_settings cuda_model_settings = defaults();

void cuda_model_reset()
{
    for (auto &s : state->streams)
        s->queue.clear();
    for (auto &s : state->streams)
        s->capture.reset();
    while (!state->memory.empty())
        deallocate((void *)state->memory.begin()->first);
    delete state;
    state = new State;
    report.clear();
    ::cuda_model_settings = defaults();
}

void cuda_model_fail_call(uint64_t n, int error)
{
    state->fail_call = n, state->fail_call_error = error;
}
void cuda_model_fail_launch(uint64_t n, int error)
{
    state->fail_launch = n, state->fail_launch_error = error;
}
struct cuda_model_counts cuda_model_count() { return state->counts; }
const char *cuda_model_report() { return report.c_str(); }

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
