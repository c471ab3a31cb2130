/* SPDX-License-Identifier: Apache-2.0 */
/* test_model.h: what the tests of the model share. */
#ifndef SPARGE_TESTS_CUDA_MODEL_TEST_MODEL_H
#define SPARGE_TESTS_CUDA_MODEL_TEST_MODEL_H

#include "gpu/hopper.h"
#include "tests/cuda_model/cuda_model.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <string>
#include <vector>

/* ---- Checks ------------------------------------------------------------------------------- */

inline int passed, failed;
inline std::string where; /* the test, and the mode it runs in */

__attribute__((format(printf, 2, 3))) inline bool check(bool right, const char *format, ...)
{
    if (right)
        return ++passed, true;
    va_list arguments;
    va_start(arguments, format);
    printf("%s: ", where.c_str());
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    failed++;
    return false;
}

inline void check_error(cudaError_t got, cudaError_t want, const char *what)
{
    check(got == want, "%s: %s, expected %s", what, cudaGetErrorName(got), cudaGetErrorName(want));
}

template <class T>
void check_same(const std::vector<T> &got, const std::vector<T> &want, const char *what)
{
    if (!check(got.size() == want.size(), "%s: %zu values, expected %zu", what, got.size(),
               want.size()))
        return;
    for (size_t n = 0; n < got.size(); n++)
        if (memcmp(&got[n], &want[n], sizeof(T)))
            return (void)check(false, "%s[%zu]: %g, expected %g", what, n, (double)got[n],
                               (double)want[n]);
    passed++;
}

/* ---- Device memory and launches ----------------------------------------------------------- */

template <class T> struct Device {
    T *p = nullptr;
    size_t count;
    explicit Device(size_t n) : count(n)
    {
        check_error(cudaMalloc(&p, n * sizeof(T)), cudaSuccess, "cudaMalloc");
    }
    explicit Device(const std::vector<T> &values) : Device(values.size())
    {
        check_error(cudaMemcpy(p, values.data(), count * sizeof(T), cudaMemcpyHostToDevice),
                    cudaSuccess, "upload");
    }
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;
    ~Device() { cudaFree(p); }
    std::vector<T> values() const
    {
        std::vector<T> all(count);
        check_error(cudaMemcpy(all.data(), p, count * sizeof(T), cudaMemcpyDeviceToHost),
                    cudaSuccess, "download");
        return all;
    }
};

inline cudaLaunchConfig_t config(dim3 grid, dim3 block, size_t shared,
                                 cudaStream_t stream = nullptr)
{
    cudaLaunchConfig_t c = {};
    c.gridDim = grid;
    c.blockDim = block;
    c.dynamicSmemBytes = shared;
    c.stream = stream;
    return c;
}

template <class... Parameters, class... Arguments>
cudaError_t run(dim3 grid, dim3 block, size_t shared, void (*kernel)(Parameters...),
                Arguments... arguments)
{
    const cudaLaunchConfig_t c = config(grid, block, shared);
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);
    error = error ? error : cudaLaunchKernelEx(&c, kernel, arguments...);
    return error ? error : cudaDeviceSynchronize();
}

template <class... All> void run_well(dim3 grid, dim3 block, size_t shared, All... all)
{
    check_error(run(grid, block, shared, all...), cudaSuccess, "launch");
}

inline int rank() { return (int)threadIdx.x; }

struct Test {
    const char *name;
    void (*run)();
};

/* Of test_runtime.cc. */
std::vector<Test> runtime_tests();

#endif
