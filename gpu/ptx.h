/* SPDX-License-Identifier: Apache-2.0 */
/* ptx.h: the instructions around the tensor cores that CUDA C++ has no name for (sm_80 and later).
 * One name is one instruction. Inline assembly stands here and in hopper.h alone, so that every
 * kernel also compiles for the host model of tests/cuda_model, which has the same names.
 *
 * A fragment is spread over the 32 lanes of a warp: lane = 4 g + q, g = 0..7, q = 0..3. */
#ifndef SPARGE_GPU_PTX_H
#define SPARGE_GPU_PTX_H

#include <cuda_runtime.h>
#include <stdint.h>

#ifndef __CUDACC__
#include <cuda_model_ptx.h>
#else

#define SPARGE_DEVICE static __device__ __forceinline__

/* The block's dynamic shared memory, aligned to 1024 bytes. */
SPARGE_DEVICE uint8_t *shared_memory()
{
    extern __shared__ __align__(1024) uint8_t sparge_shared_memory[];
    return sparge_shared_memory;
}

/* Where a pointer to shared memory points, as instructions on shared memory count it. */
SPARGE_DEVICE uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Four 8 x 8 matrices of 16-bit elements, 8 rows of 16 bytes each. Lane l names row l % 8 of matrix
 * l / 8 and receives in r[n] the 4 bytes from 4 q of row g of matrix n. */
SPARGE_DEVICE void ldmatrix(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* The same, each matrix transposed: elements 2 q and 2 q + 1 of column g. */
SPARGE_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* d[16][8] += a[16][32] b[32][8], bytes and int32.
 *   a[n] byte e: row g + 8 (n % 2), k = 16 (n / 2) + 4 q + e
 *   b_n byte e:  column g, k = 16 n + 4 q + e
 *   d[n]:        row g + 8 (n / 2), column 2 q + n % 2 */
SPARGE_DEVICE void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* d[16][8] += a[16][16] b[16][8], binary16 and float.
 *   a[n] half e: row g + 8 (n % 2), k = 8 (n / 2) + 2 q + e
 *   b_n half e:  column g, k = 8 n + 2 q + e
 *   d[n]:        as above */
SPARGE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Copies 16 bytes from global to shared memory, both aligned to 16. Copies since the last commit
 * are a group. wait<N> returns when all but the newest N groups of this thread have landed. */
SPARGE_DEVICE void copy_async(void *shared, const void *global)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
}
SPARGE_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> SPARGE_DEVICE void copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* 2^x within 2 ulp; 0 below -126. */
SPARGE_DEVICE float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Two floats as binary16, a in the low half. */
SPARGE_DEVICE uint32_t pack_f16(float a, float b)
{
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
    return r;
}

#endif
#endif
