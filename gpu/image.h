/* image.h: how the codes of a block lie in memory. prepare.cu writes them once, in global memory,
 * as the very bytes that the kernels want in shared memory: loading a block is then one contiguous
 * copy, rows and channels that do not exist are zeros, and no kernel meets a bank conflict.
 *
 *   q8      [128 rows][pitch]           channels of a row, then zeros
 *   k8      [64 keys][pitch]
 *   v int8, [width channels][64 bytes]  V transposed: a byte for each key, in the order of key_slot
 *     fp8
 *   v f16   [width / 64, rounded up][64 keys][64 channels of 2 bytes]
 *
 * pitch is 64 bytes for a width of 64 and 128 otherwise; rows of v have 64 and 128 bytes. */
#ifndef SPARGE_GPU_IMAGE_H
#define SPARGE_GPU_IMAGE_H

#include "common/hd.h"

/* Byte `at` of row `row` in an image with rows of `pitch` bytes, 128 or 64. The 16-byte piece
 * within a row is xored with the row's number (of 128 bytes each), so that eight rows' pieces at
 * one place lie in eight different groups of banks. This is the swizzle that wgmma's descriptors
 * name. */
SPARGE_HD int image_at(int pitch, int row, int at)
{
    const int flat = row * pitch + at;
    return flat ^ ((flat >> 7 & (pitch / 16 - 1)) << 4);
}

/* Where key k of 64 stands in a row of V transposed: in each 16 keys the order 0 1 8 9 2 3 10 11 4
 * 5 12 13 6 7 14 15. A thread that holds scores of columns 2 q, 2 q + 1 of neighbouring 8-column
 * tiles then holds four neighbouring bytes of P: accumulators become an operand without any
 * exchange. */
SPARGE_HD int key_slot(int k) { return (k & ~15) + 4 * (k >> 1 & 3) + 2 * (k >> 3 & 1) + (k & 1); }

SPARGE_HD int pitch_of(int width) { return width == 64 ? 64 : 128; }
SPARGE_HD int q_tile_bytes(int width) { return 128 * pitch_of(width); }
SPARGE_HD int k_tile_bytes(int width) { return 64 * pitch_of(width); }
SPARGE_HD int v_tile_bytes(int width, bool halves)
{
    return halves ? (width + 63) / 64 * 64 * 128 : width * 64;
}

#endif
