/* SPDX-License-Identifier: Apache-2.0 */
/* amx.c: AMX (Sapphire Rapids): a tile is 16 rows of 64 bytes, and one instruction multiplies two
 * of them. The operands are those of avx512vnni.c, whose kernels do all else: A is 16 keys, or
 * channels of V, of 64 bytes of depth; B is a panel of 16 queries; C is a vector for each row of A.
 *
 * Four tiles of C, one of B and two of A by turns: an instruction waits for its A alone. A group is
 * one panel, so that its S, P and O stay in L1 while K and V pass.
 *
 * A step configures its tiles when it begins and releases them when it ends, whatever it found:
 * they are the callee's to spoil, and a core whose tiles are released may sleep. */
#include <immintrin.h>

enum { LANES = 16 };

#include "cpu/lanes.h"
#include "cpu/tiles.h"

enum {
    TILE_BYTES = 64, /* of a row */
    TILE_SIZE = 16 * TILE_BYTES,
    ABREAST = 64, /* rows of four tiles of C */
};

/* Does something to each of the four tiles of C that has rows. */
#define EACH_TILE(DO)  \
    do {               \
        DO(0);         \
        if (rows > 16) \
            DO(1);     \
        if (rows > 32) \
            DO(2);     \
        if (rows > 48) \
            DO(3);     \
    } while (0)

#define ZERO(n)  TILE_ZERO(n)
#define LOAD(n)  TILE_LOAD(n, c + (n)*TILE_SIZE, TILE_BYTES)
#define STORE(n) TILE_STORE(n, c + (n)*TILE_SIZE, TILE_BYTES)
#define MULTIPLY(n)                                                  \
    do {                                                             \
        TILE_LOAD(5 + (n) % 2, a + 16 * (n)*a_stride + e, a_stride); \
        if (pairs)                                                   \
            TILE_DP_BF16(n, 5 + (n) % 2, 4);                         \
        else                                                         \
            TILE_DP_BYTES(n, 5 + (n) % 2, 4);                        \
    } while (0)

/* Rows r0 to r0 + `rows` of a product over one panel, as C [rows][16], or added to it with `more`:
 * up to 64 rows, a multiple of 16. */
INLINE void some_rows(const sparge_product *x, int64_t r0, int64_t rows, int64_t panel, void *to,
                      bool pairs, bool more)
{
    const int64_t size = pairs ? 2 : 1, a_stride = x->a_stride * size;
    const char *a = (const char *)x->a + r0 * a_stride;
    const char *b = (const char *)x->b + panel * x->b_stride * size;
    char *c = to;
    if (more)
        EACH_TILE(LOAD);
    else
        EACH_TILE(ZERO);
    for (int64_t e = 0; e < x->depth * size; e += TILE_BYTES) {
        TILE_LOAD(4, b + e * LANES, TILE_BYTES);
        EACH_TILE(MULTIPLY);
    }
    EACH_TILE(STORE);
}

/* S^T: the integers where the scores come to stand. */
static void score_bytes(const sparge_product *x, float *s, int64_t s_stride)
{
    for (int64_t panel = 0; panel < x->panels; panel++)
        for (int64_t r0 = 0; r0 < x->rows; r0 += ABREAST) {
            const int64_t rows = sparge_min(ABREAST, x->rows - r0);
            float *to = s + panel * s_stride + r0 * LANES;
            some_rows(x, r0, rows, panel, to, false, false);
            for (int64_t r = 0; r < rows; r++)
                f_store(to + r * LANES,
                        f_of(i_add(i_load(to + r * LANES), i_all(x->a_init[r0 + r]))));
        }
}

static void score_pairs(const sparge_product *x, float *s, int64_t s_stride)
{
    for (int64_t panel = 0; panel < x->panels; panel++)
        for (int64_t r0 = 0; r0 < x->rows; r0 += ABREAST)
            some_rows(x, r0, sparge_min(ABREAST, x->rows - r0), panel,
                      s + panel * s_stride + r0 * LANES, true, false);
}

INLINE void fold(const sparge_accumulator *to, bool still, int64_t panel, int64_t row, int64_t rows,
                 const int32_t *c)
{
    const floats shrink = f_load(to->shrink + panel * LANES),
                 weight = f_load(to->weight + panel * LANES);
    float *o = to->o + panel * to->o_stride + row * LANES;
    for (int64_t r = 0; r < rows; r++, o += LANES, c += LANES) {
        floats kept = f_load(o);
        if (!still)
            kept *= shrink;
        f_store(o, _mm512_fmadd_ps(weight * f_all(to->v_scale[row + r]), f_of(i_load(c)), kept));
    }
}

static void accumulate_pv_bytes(const sparge_product *x, const sparge_accumulator *to)
{
    _Alignas(64) int32_t c[ABREAST * LANES];
    for (int64_t panel = 0; panel < x->panels; panel++)
        for (int64_t r0 = 0; r0 < x->rows; r0 += ABREAST) {
            const int64_t rows = sparge_min(ABREAST, x->rows - r0);
            some_rows(x, r0, rows, panel, c, false, false);
            if (to->still)
                fold(to, true, panel, r0, rows, c);
            else
                fold(to, false, panel, r0, rows, c);
        }
}

/* O is C. */
static void accumulate_pv_pairs(const sparge_product *x, const sparge_accumulator *to)
{
    for (int64_t panel = 0; panel < x->panels; panel++) {
        const floats shrink = f_load(to->shrink + panel * LANES);
        float *o = to->o + panel * to->o_stride;
        for (int64_t r = 0; r < x->rows && !to->still; r++)
            f_store(o + r * LANES, f_load(o + r * LANES) * shrink);
        for (int64_t r0 = 0; r0 < x->rows; r0 += ABREAST)
            some_rows(x, r0, sparge_min(ABREAST, x->rows - r0), panel, o + r0 * LANES, true, true);
    }
}

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

/* As many operations as tiles allow, from registers. */
static int64_t peak_bytes(int64_t rounds)
{
    for (int64_t r = 0; r < rounds; r++) {
        TILE_DP_BYTES(0, 5, 4);
        TILE_DP_BYTES(1, 6, 4);
        TILE_DP_BYTES(2, 5, 4);
        TILE_DP_BYTES(3, 6, 4);
    }
    return rounds * 4 * TILE_SIZE * LANES * 2;
}

void sparge_amx_kernels(sparge_kernels *k)
{
    k->isa = k->product_isa[SPARGE_BYTES] = k->product_isa[SPARGE_PAIRS] = SPARGE_ISA_AMX;
    k->depth[SPARGE_BYTES] = TILE_BYTES;
    k->depth[SPARGE_PAIRS] = TILE_BYTES / 2;
    k->group[SPARGE_BYTES] = k->group[SPARGE_PAIRS] = LANES;
    k->score[SPARGE_PAIRS] = score_pairs;
    k->accumulate_pv[SPARGE_PAIRS] = accumulate_pv_pairs;
    k->score[SPARGE_BYTES] = score_bytes;
    k->accumulate_pv[SPARGE_BYTES] = accumulate_pv_bytes;
    k->peak_bytes = peak_bytes;
    k->begin = begin;
    k->end = end;
}
