/* SPDX-License-Identifier: Apache-2.0 */
/* streams.cc: streams of the model of a GPU for tests/python/test_device.py, beside the package's
 * module. As torch's they do not wait for the NULL stream, nor it for them. */
#include <cuda_runtime.h>

#pragma GCC visibility push(default)
extern "C" {
void *model_stream(void)
{
    cudaStream_t stream;
    return cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) ? NULL : stream;
}

int model_synchronize(void *stream) { return (int)cudaStreamSynchronize((cudaStream_t)stream); }
}
#pragma GCC visibility pop
