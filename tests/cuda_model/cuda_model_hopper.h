/* SPDX-License-Identifier: Apache-2.0 */
/* cuda_model_hopper.h: the names of gpu/hopper.h on the host; what each does stands there. */
#ifndef CUDA_MODEL_HOPPER_H
#define CUDA_MODEL_HOPPER_H

#include <cuda_model_ptx.h>

namespace cuda_model {
enum class Element { s8, e4m3, f16 };
/* d[64][n] from a in registers, or from its descriptor where `registers` is null. */
void wgmma(Element element, int n, void *d, const uint32_t *registers, uint64_t a, uint64_t b,
           bool add);
void wait_for_products(size_t groups_left);
} // namespace cuda_model

/* Fences and pin tell the compiler and the hardware what may not move; here nothing does. */
SPARGE_DEVICE void wgmma_fence() {}
SPARGE_DEVICE void fence_async() {}
SPARGE_DEVICE void barrier_init_fence() {}
template <class T, int N> SPARGE_DEVICE void pin(T (&)[N]) {}
template <int N> SPARGE_DEVICE void registers_grow() {}
template <int N> SPARGE_DEVICE void registers_shrink() {}

void wgmma_commit();
template <int N> SPARGE_DEVICE void wgmma_wait() { cuda_model::wait_for_products(N); }

SPARGE_DEVICE void wgmma_s8(int (&d)[64], uint64_t a, uint64_t b, bool add)
{
    cuda_model::wgmma(cuda_model::Element::s8, 128, d, nullptr, a, b, add);
}
template <int N>
SPARGE_DEVICE void wgmma_e4m3(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool add)
{
    static_assert(N == 32 || N == 48 || N == 64, "the shapes of gpu/hopper.h");
    cuda_model::wgmma(cuda_model::Element::e4m3, 2 * N, d, a, 0, b, add);
}
template <int N>
SPARGE_DEVICE void wgmma_f16(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool add)
{
    static_assert(N == 32 || N == 48 || N == 64, "the shapes of gpu/hopper.h");
    cuda_model::wgmma(cuda_model::Element::f16, 2 * N, d, a, 0, b, add);
}

void barrier_init(uint64_t *b, int arrivals);
void barrier_arrive(uint64_t *b);
void barrier_arrive_expect(uint64_t *b, uint32_t bytes);
void barrier_wait(uint64_t *b, uint32_t parity);
void copy_bulk(void *shared, const void *global, uint32_t bytes, uint64_t *b);

void named_sync(int id, int threads);
void named_arrive(int id, int threads);
bool named_any(int id, int threads, bool yes);

uint32_t pack_e4m3(float a, float b, float c, float d);

#endif
