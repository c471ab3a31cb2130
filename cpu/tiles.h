/* SPDX-License-Identifier: Apache-2.0 */
/* tiles.h: AMX's instructions, as the compiler needs no flag for them. t, a, b and c are constants
 * 0 to 7, a stride is in bytes. (A tile is no operand that a compiler knows, and gcc 12's own
 * macros let ordinary stores pass a load of a tile: so each clobbers memory.)
 *
 * tests/cpu/amx_shim.h has the same in plain C, and comes first where it is to be used. */
#ifndef SPARGE_CPU_TILES_H
#define SPARGE_CPU_TILES_H

#include <stdint.h>

#define TILE_ASM(...) __asm__ volatile(__VA_ARGS__ : "memory")

/* p: 64 bytes, the configuration. Every tile becomes zero. */
#define TILE_CONFIG(p) TILE_ASM("ldtilecfg (%0)" : : "r"(p))
#define TILE_RELEASE() TILE_ASM("tilerelease" : :)
#define TILE_ZERO(t)   TILE_ASM("tilezero %%tmm%c0" : : "i"(t))
#define TILE_LOAD(t, base, stride) \
    TILE_ASM("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(base), "r"((int64_t)(stride)), "i"(t))
#define TILE_STORE(t, base, stride) \
    TILE_ASM("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(base), "r"((int64_t)(stride)), "i"(t))

/* C [16][16] of 32 bits += A [16][64 bytes] B [16][16][4 bytes]: signed and unsigned bytes, or
 * pairs of bf16. */
#define TILE_DP_BYTES(c, a, b) \
    TILE_ASM("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b))
#define TILE_DP_BF16(c, a, b) \
    TILE_ASM("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b))

#endif
