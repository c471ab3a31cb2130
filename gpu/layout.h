/* SPDX-License-Identifier: Apache-2.0 */
/* layout.h: how the codes of a block lie in memory. prepare.cu writes each tile once, in global
 * memory, as the very bytes that the kernels want in shared memory. Loading a tile is then one
 * contiguous copy. Rows and channels that do not exist are zeros.
 *
 *   q_tile         [128 rows][pitch]                channels of a row, then zeros
 *   k_tile         [64 keys][pitch]
 *   v int8, fp8    [width channels][64 bytes]       V transposed: a byte for each key, in the order
 *                                                   of permute_key
 *   v f16          [panels][64 keys][64 channels]   2 bytes a channel, 64 channels a panel
 *
 * The pitch is 64 bytes for a width of 64 and 128 otherwise. */
#ifndef SPARGE_GPU_LAYOUT_H
#define SPARGE_GPU_LAYOUT_H

#include "common/hd.h"

enum { V_PITCH = 64, V_F16_PITCH = 128, V_F16_PANEL = 64 * V_F16_PITCH };

SPARGE_HD constexpr int pitch_of(int width) { return width == 64 ? 64 : 128; }
SPARGE_HD constexpr int q_tile_bytes(int width) { return 128 * pitch_of(width); }
SPARGE_HD constexpr int k_tile_bytes(int width) { return 64 * pitch_of(width); }
SPARGE_HD constexpr int v_tile_bytes(int width, bool f16)
{
    return f16 ? (width + 63) / 64 * V_F16_PANEL : width * V_PITCH;
}

/* Where byte `at` of row `row` lies in a tile with rows of `pitch` bytes, 128 or 64. The 16-byte
 * piece within a row is xored with the row's number, counted in rows of 128 bytes. Eight rows'
 * pieces at one column then lie in eight different groups of banks. The descriptors of wgmma name
 * the same swizzle. */
SPARGE_HD int swizzle(int pitch, int row, int at)
{
    const int flat = row * pitch + at;
    return flat ^ ((flat >> 7 & (pitch / 16 - 1)) << 4);
}

/* Where channel c of a key lies in a tile of v in f16. */
SPARGE_HD int swizzle_v_f16(int key, int c)
{
    return c / 64 * V_F16_PANEL + swizzle(V_F16_PITCH, key, c % 64 * 2);
}

/* Where key k of 64 stands in a row of V transposed: in each 16 keys the order 0 1 8 9 2 3 10 11 4
 * 5 12 13 6 7 14 15. A thread that holds scores of columns 2 q and 2 q + 1 of neighbouring 8-column
 * tiles then holds four neighbouring bytes of P, so accumulators become an operand without any
 * exchange between threads. */
SPARGE_HD int permute_key(int k)
{
    return (k & ~15) + 4 * (k >> 1 & 3) + 2 * (k >> 3 & 1) + (k & 1);
}

#endif
