/* SPDX-License-Identifier: Apache-2.0 */
/* state.h: what the runtime API of the model is made of: memory, streams, graphs, errors. */
#ifndef SPARGE_TESTS_CUDA_MODEL_STATE_H
#define SPARGE_TESTS_CUDA_MODEL_STATE_H

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
extern State *state;

inline const struct cuda_model_settings &settings = ::cuda_model_settings;

/* ---- Memory: model.cc -------------------------------------------------------------------- */

const std::pair<const uintptr_t, Allocation> *find(const void *p);
cudaError_t allocate(void **p, size_t bytes, cudaMemoryType type);
bool is_allocation(const void *p, cudaMemoryType type);
void deallocate(void *p);
bool is_end(const void *p, size_t bytes, bool device, bool any);
bool copy_is_possible(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
void copy(void *to, const void *from, size_t bytes);

/* ---- Streams: model.cc -------------------------------------------------------------------- */

CUstream_st *find_stream(cudaStream_t handle);
bool somebody_captures();
cudaError_t enqueue(CUstream_st *stream, Task task, bool operation_releases = false);
cudaError_t finish(CUstream_st *one, uint64_t end = UINT64_MAX); /* runs one stream, or all */

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

} // namespace cuda_model

#endif
