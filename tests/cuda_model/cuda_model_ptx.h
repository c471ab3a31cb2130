/* SPDX-License-Identifier: Apache-2.0 */
/* cuda_model_ptx.h: the names of gpu/ptx.h on the host; what each does stands there. */
#ifndef CUDA_MODEL_PTX_H
#define CUDA_MODEL_PTX_H

#include <cuda_runtime.h>

#define SPARGE_DEVICE static inline

uint8_t *shared_memory();
uint32_t shared_address(const void *p);

void ldmatrix(uint32_t (&r)[4], const void *row);
void ldmatrix_transposed(uint32_t (&r)[4], const void *row);
void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

namespace cuda_model {
void wait_for_copies(size_t groups_left);
}
void copy_async(void *shared, const void *global);
void copy_async_commit();
template <int N> SPARGE_DEVICE void copy_async_wait() { cuda_model::wait_for_copies(N); }

float exp2_fast(float x); /* sparge_exp2 for x <= 0, so that results are the reference's bits */
uint32_t pack_f16(float a, float b);

#endif
