/* SPDX-License-Identifier: Apache-2.0 */
/* hd.h: the one place where C, C++ and CUDA differ. Everything in common/ is written in the subset
 * that the three share: no state, no allocation, no I/O, multiply-adds spelled fmaf. */
#ifndef SPARGE_COMMON_HD_H
#define SPARGE_COMMON_HD_H

#ifdef __CUDACC__
#define SPARGE_HD static __host__ __device__ __forceinline__
#else
#define SPARGE_HD static inline
#endif

#endif
