/* SPDX-License-Identifier: Apache-2.0 */
/* program.h: what the programs of on_gpu.sh (instructions, ceilings) share: memory, launches,
 * random numbers. They stand beside the library, not in it, and end with a sentence at the first
 * error of CUDA. */
#ifndef SPARGE_TESTS_GPU_PROGRAM_H
#define SPARGE_TESTS_GPU_PROGRAM_H

#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

#ifndef __CUDACC__
enum { ON_MODEL = 1 }; /* threads that take turns on one processor: everything is made small */
#else
enum { ON_MODEL = 0 };
#endif

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER /* elsewhere the kernels that need it are empty */
#endif

static inline void must(cudaError_t e, const char *call)
{
    if (e == cudaSuccess)
        return;
    printf("%s: %s (%s)\n", call, cudaGetErrorString(e), cudaGetErrorName(e));
    exit(3); /* 1 is a difference that was found */
}

static inline int attribute(cudaDeviceAttr name)
{
    int device = 0, value = 0;
    must(cudaGetDevice(&device), "cudaGetDevice");
    must(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

template <class T> struct buffer {
    T *p = NULL;
    size_t count;

    explicit buffer(size_t n) : count(n)
    {
        must(cudaMalloc((void **)&p, n * sizeof(T)), "cudaMalloc");
    }
    explicit buffer(const std::vector<T> &x) : buffer(x.size()) { put(x); }
    buffer(const buffer &) = delete;
    buffer &operator=(const buffer &) = delete;
    ~buffer() { cudaFree(p); }

    void put(const std::vector<T> &x)
    {
        must(cudaMemcpy(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    std::vector<T> get() const
    {
        std::vector<T> x(count);
        must(cudaMemcpy(x.data(), p, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return x;
    }
};

/* Queued; `shared` bytes of dynamic shared memory. */
template <class... Args, class... Given>
static void queue(void (*kernel)(Args...), int blocks, int threads, size_t shared, Given... args)
{
    if (shared > 48 * 1024)
        must(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)shared),
             "cudaFuncSetAttribute");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    must(cudaLaunchKernelEx(&config, kernel, args...), "cudaLaunchKernelEx");
}

/* And done. */
template <class... Args, class... Given>
static void run(void (*kernel)(Args...), int blocks, int threads, size_t shared, Given... args)
{
    queue(kernel, blocks, threads, shared, args...);
    must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

static __global__ void set_on_hopper(int *yes)
{
#ifdef HOPPER
    *yes = 1;
#endif
}

static inline bool has_hopper()
{
    buffer<int> yes(std::vector<int>(1, 0));
    run(set_on_hopper, 1, 1, 0, yes.p);
    return yes.get()[0] == 1;
}

struct draws {
    uint64_t state;
    uint32_t bits() /* splitmix64's upper half */
    {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return (uint32_t)((z ^ z >> 31) >> 32);
    }
    int below(int n) { return (int)((uint64_t)bits() * (uint64_t)n >> 32); }
    float uniform() { return (float)(bits() >> 8) * 0x1p-24f; }
    float normal() /* near enough: twelve uniforms */
    {
        float sum = -6.0f;
        for (int n = 0; n < 12; n++)
            sum += uniform();
        return sum;
    }
};

#endif
