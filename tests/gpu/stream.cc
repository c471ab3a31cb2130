/* SPDX-License-Identifier: Apache-2.0 */
/* stream.cu: the CUDA runtime's streams and graphs for tests in C: the model has its functions in
 * C++ alone. */
#include <cuda_runtime.h>

extern "C" {

static cudaError_t first = cudaSuccess;

static void note(cudaError_t e)
{
    if (first == cudaSuccess)
        first = e;
}

const char *stream_error(void)
{
    const char *const name = first == cudaSuccess ? NULL : cudaGetErrorName(first);
    first = cudaSuccess;
    return name;
}

void *stream_make(void)
{
    cudaStream_t s = NULL;
    note(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    return s;
}
void stream_wait(void *s) { note(cudaStreamSynchronize((cudaStream_t)s)); }
void stream_free(void *s) { note(cudaStreamDestroy((cudaStream_t)s)); }

void capture_begin(void *s)
{
    note(cudaStreamBeginCapture((cudaStream_t)s, cudaStreamCaptureModeThreadLocal));
}

void *capture_end(void *s)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    note(cudaStreamEndCapture((cudaStream_t)s, &graph));
    if (graph) {
        note(cudaGraphInstantiate(&exec, graph, 0));
        note(cudaGraphDestroy(graph));
    }
    return exec;
}

void graph_launch(void *graph, void *s)
{
    note(cudaGraphLaunch((cudaGraphExec_t)graph, (cudaStream_t)s));
}
void graph_free(void *graph) { note(cudaGraphExecDestroy((cudaGraphExec_t)graph)); }

void *pinned_alloc(size_t bytes)
{
    void *p = NULL;
    note(cudaMallocHost(&p, bytes));
    return p;
}
void pinned_free(void *p) { note(cudaFreeHost(p)); }
}
