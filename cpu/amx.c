/* SPDX-License-Identifier: Apache-2.0 */
/* amx.c: AMX (Sapphire Rapids): tiles of 16 rows of 64 bytes, on top of avx512vnni.c.
 *
 * A thread configures its tiles when it begins and releases them when it ends, whatever it found:
 * they are the callee's to spoil, and a core whose tiles are released may sleep. */
#include <stdint.h>

#include "cpu/kernels.h"
#include "cpu/tiles.h"

static void begin(void)
{
    static const struct {
        uint8_t palette, start_row, none[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {16, 16, 16, 16, 16, 16, 16, 16},
    };
    _Static_assert(sizeof config == 64, "what ldtilecfg reads");
    TILE_CONFIG(&config);
}

static void end(void) { TILE_RELEASE(); }

void sparge_amx_kernels(sparge_kernels *k)
{
    k->isa = SPARGE_ISA_AMX;
    k->begin = begin;
    k->end = end;
}
