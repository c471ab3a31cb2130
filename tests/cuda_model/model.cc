/* SPDX-License-Identifier: Apache-2.0 */
/* model.cc: device memory is host memory that is known here; a stream is a queue of work that runs
 * when somebody waits for it and not earlier, so that a missing wait shows. */
#include "tests/cuda_model/state.h"

namespace cuda_model {

State *state = new State;

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

cudaError_t enqueue(CUstream_st *stream, Task task, bool operation_releases)
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
cudaError_t finish(CUstream_st *one, uint64_t end)
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

static struct cuda_model_settings defaults()
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
