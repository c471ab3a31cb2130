/* SPDX-License-Identifier: Apache-2.0 */
/* hopper.h: the instructions of sm_90a: products of a warpgroup (wgmma), barriers that count
 * arrivals and bytes (mbarrier), copies of whole tiles (the bulk copies of TMA). As in ptx.h one
 * name is one instruction, and tests/cuda_model has the same names.
 *
 * A warpgroup is four warps, 128 threads: thread = 32 w + 4 g + q, w = 0..3, g = 0..7, q = 0..3.
 * All its threads make every call of wgmma, with the same descriptors. */
#ifndef SPARGE_GPU_HOPPER_H
#define SPARGE_GPU_HOPPER_H

#include "gpu/ptx.h"

/* ---- Descriptors: how the tensor core finds an operand in shared memory ------------------- */

/* A tile has rows of `pitch` bytes, 128 or 64, swizzled as layout.h says. Bits 0-13 the address,
 * 16-29 the leading and 32-45 the stride byte offset, all in units of 16; 62-63 the swizzle, 1 of
 * 128 bytes, 2 of 64. */
SPARGE_DEVICE uint64_t descriptor(const void *tile, int pitch, int leading, int stride)
{
    return (uint64_t)((shared_address(tile) & 0x3ffffu) >> 4) | (uint64_t)(leading >> 4) << 16 |
           (uint64_t)(stride >> 4) << 32 | (uint64_t)(pitch == 128 ? 1 : 2) << 62;
}

/* Rows along M or N, k along the row: the only layout for bytes. The next eight rows begin 8 *
 * pitch bytes further. For the next 32 bytes along k add DESCRIPTOR_32_BYTES. */
SPARGE_DEVICE uint64_t descriptor_k_major(const void *tile, int pitch)
{
    return descriptor(tile, pitch, 16, 8 * pitch);
}

/* Rows along k, 64 elements of 16 bits along N in each. The next 64 columns begin `panel` bytes
 * further. For the next 16 rows along k add DESCRIPTOR_16_ROWS. */
SPARGE_DEVICE uint64_t descriptor_n_major(const void *tile, int panel)
{
    return descriptor(tile, 128, panel, 1024);
}

enum { DESCRIPTOR_32_BYTES = 32 >> 4, DESCRIPTOR_16_ROWS = 16 * 128 >> 4 };

#ifndef __CUDACC__
#include <cuda_model_hopper.h>
#else

/* ---- wgmma: d[64][N] = a b, or d += a b if `add`; asynchronous ---------------------------- */

/* Between a thread's own writes to registers of d or a and the first product that touches them. */
SPARGE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/* Products issued since the last commit are a group. wait<N> returns when all but the newest N
 * groups are done. */
SPARGE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> SPARGE_DEVICE void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* Keeps the compiler from moving uses of x across this place. wgmma changes registers unseen. */
template <int N> SPARGE_DEVICE void pin(float (&x)[N])
{
#pragma unroll
    for (int n = 0; n < N; n++)
        asm volatile("" : "+f"(x[n])::"memory");
}
template <int N> SPARGE_DEVICE void pin(int (&x)[N])
{
#pragma unroll
    for (int n = 0; n < N; n++)
        asm volatile("" : "+r"(x[n])::"memory");
}
template <int N> SPARGE_DEVICE void pin(uint32_t (&x)[N])
{
#pragma unroll
    for (int n = 0; n < N; n++)
        asm volatile("" : "+r"(x[n])::"memory");
}

/* d[4 i + 2 h + e] of the N / 2 registers of d is row 16 w + g + 8 h, column 8 i + 2 q + e.
 * Assembly wants them one by one: REGISTERS_n lists them in its text, OPERANDS_n as constraints. */
#define OPERANDS_8(type, d, n)                                                                  \
    type(d[n]), type(d[n + 1]), type(d[n + 2]), type(d[n + 3]), type(d[n + 4]), type(d[n + 5]), \
        type(d[n + 6]), type(d[n + 7])
#define OPERANDS_16(type, d, n) OPERANDS_8(type, d, n), OPERANDS_8(type, d, n + 8)
#define OPERANDS_32(type, d)    OPERANDS_16(type, d, 0), OPERANDS_16(type, d, 16)
#define OPERANDS_48(type, d)    OPERANDS_32(type, d), OPERANDS_16(type, d, 32)
#define OPERANDS_64(type, d)    OPERANDS_48(type, d), OPERANDS_16(type, d, 48)
#define REGISTERS_32                                         \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_48 REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define REGISTERS_64 REGISTERS_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

/* int32, both operands bytes in shared memory, k-major; k = 32. */
SPARGE_DEVICE void wgmma_s8(int (&d)[64], uint64_t a, uint64_t b, bool add)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" REGISTERS_64
                 "}, %64, %65, p; }\n"
                 : OPERANDS_64("+r", d)
                 : "l"(a), "l"(b), "r"((int)add));
}

/* float, a in registers, b in shared memory. `shape` is the instruction's, `more` its last
 * immediates, and a0 .. a3, b_at, add_at number the operands after d's. */
#define WGMMA_FROM_REGISTERS(name, count, shape, a0, a1, a2, a3, b_at, add_at, more)       \
    SPARGE_DEVICE void name(float(&d)[count], const uint32_t(&a)[4], uint64_t b, bool add) \
    {                                                                                      \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add_at ", 0;\n"                   \
                     "wgmma.mma_async.sync.aligned." shape " {" REGISTERS_##count          \
                     "}, "                                                                 \
                     "{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b_at ", p, " more "; }\n" \
                     : OPERANDS_##count("+f", d)                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add)); \
    }

/* a: bytes as mma_s8 has them, of rows 16 w + ..; b k-major; k = 32. */
WGMMA_FROM_REGISTERS(wgmma_e4m3, 32, "m64n64k32.f32.e4m3.e4m3", 32, 33, 34, 35, 36, 37, "1, 1")
WGMMA_FROM_REGISTERS(wgmma_e4m3, 48, "m64n96k32.f32.e4m3.e4m3", 48, 49, 50, 51, 52, 53, "1, 1")
WGMMA_FROM_REGISTERS(wgmma_e4m3, 64, "m64n128k32.f32.e4m3.e4m3", 64, 65, 66, 67, 68, 69, "1, 1")
/* a: halves as mma_f16 has them; b n-major (the last immediate says so); k = 16. */
WGMMA_FROM_REGISTERS(wgmma_f16, 32, "m64n64k16.f32.f16.f16", 32, 33, 34, 35, 36, 37, "1, 1, 1")
WGMMA_FROM_REGISTERS(wgmma_f16, 48, "m64n96k16.f32.f16.f16", 48, 49, 50, 51, 52, 53, "1, 1, 1")
WGMMA_FROM_REGISTERS(wgmma_f16, 64, "m64n128k16.f32.f16.f16", 64, 65, 66, 67, 68, 69, "1, 1, 1")

/* ---- mbarrier -------------------------------------------------------------------------------- */

/* A phase ends when `arrivals` threads have arrived and all announced bytes have landed. */

SPARGE_DEVICE void barrier_init(uint64_t *b, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
                 : "memory");
}
/* After the last init, before the block's threads meet. */
SPARGE_DEVICE void barrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SPARGE_DEVICE void barrier_arrive(uint64_t *b)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
/* Arrives, and announces bytes that copies will bring. */
SPARGE_DEVICE void barrier_arrive_expect(uint64_t *b, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
                 "r"(bytes)
                 : "memory");
}
/* Returns when the phase of this parity has ended: 0 for the first, 1 for the second, and so on. */
SPARGE_DEVICE void barrier_wait(uint64_t *b, uint32_t parity)
{
    asm volatile("{ .reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again; }" ::"r"(shared_address(b)),
                 "r"(parity)
                 : "memory");
}

/* Copies from global to shared memory, both aligned to 16. b counts the bytes, a multiple of 16. */
SPARGE_DEVICE void copy_bulk(void *shared, const void *global, uint32_t bytes, uint64_t *b)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(b))
        : "memory");
}

/* ---- Named barriers, 1 to 15, of `threads` threads ---- */

SPARGE_DEVICE void named_sync(int id, int threads)
{
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* Counts as one of the threads without waiting for the others. */
SPARGE_DEVICE void named_arrive(int id, int threads)
{
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* Waits. Is `yes` true on any of the threads? */
SPARGE_DEVICE bool named_any(int id, int threads, bool yes)
{
    int any;
    asm volatile("{ .reg .pred a, b; setp.ne.b32 a, %3, 0;\n"
                 "barrier.cta.red.or.pred b, %1, %2, a;\n selp.b32 %0, 1, 0, b; }"
                 : "=r"(any)
                 : "r"(id), "r"(threads), "r"((int)yes)
                 : "memory");
    return any;
}

/* ---- The rest ---- */

/* Registers that a thread of this warpgroup may hold from here on. Every warp of it calls. */
template <int N> SPARGE_DEVICE void registers_grow()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> SPARGE_DEVICE void registers_shrink()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* Before the tensor core or a bulk copy reads shared memory that threads have written. */
SPARGE_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Four floats as e4m3, a in the lowest byte. What is above 448 becomes 448. */
SPARGE_DEVICE uint32_t pack_e4m3(float a, float b, float c, float d)
{
    uint32_t r;
    asm("{ .reg .b16 lo, hi;\n cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n mov.b32 %0, {lo, hi}; }"
        : "=r"(r)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
}

#endif
#endif
