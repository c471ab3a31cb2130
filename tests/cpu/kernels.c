/* SPDX-License-Identifier: Apache-2.0 */
/* kernels.c: every kernel of one instruction set against plain C that stands here or in ref/ and
 * common/, bit for bit. Without Criterion, files and threads, so that it also runs, linked
 * statically, where little else does: under an emulator of a processor that the machine is not.
 *
 *     test_kernels --isa scalar|avx2|avxvnni|avx512vnni|amx --draws N --seed S
 *
 * A draw has memory twice, full of NaN and -1: the kernel works in one, the judge in the
 * other, and at the end both are the same to the last byte. So inputs that were changed, padding
 * that was written and guards are found by the comparison that finds wrong results. A draw depends
 * on the seed, the kernel and its number alone.
 *
 * Exits 0, 1 at a difference, 2 for wrong arguments, 77 where the processor lacks the instruction
 * set. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <sanitizer/asan_interface.h> /* its macros do nothing in a build without the sanitizer */

#include "common/bf16.h"
#include "common/quant.h"
#include "common/select.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "ref/ref.h"

enum {
    MOST_ROWS = 70,
    MOST_DEPTH = 256,
    MOST_CHANNELS = SPARGE_MAX_DIM + 64, /* of V, which has no limit; rows of A */
    MOST_PANELS = 9,
    MOST_COLUMNS = MOST_PANELS * SPARGE_PANEL
};

/* ---- Numbers that replay: SplitMix64 (Steele, Lea & Flood 2014) ---- */

static uint64_t state;

static uint64_t random_bits(void)
{
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int64_t pick(int64_t first, int64_t last)
{
    return first + (int64_t)(random_bits() % (uint64_t)(last - first + 1));
}
static bool one_in(int64_t n) { return pick(1, n) == 1; }
static float uniform(void) { return (float)(random_bits() >> 40) * 0x1p-23f - 1.0f; } /* [-1, 1) */

/* The small ones more often: they have the tails, and cost little. */
static int64_t size_up_to(int64_t last)
{
    const int64_t limit = one_in(8) ? last : one_in(3) ? (last + 2) / 3 : (last + 7) / 8;
    return pick(1, limit);
}

static int64_t multiple_up_to(int64_t unit, int64_t last) { return unit * size_up_to(last / unit); }
static int64_t panels(void) { return one_in(2) ? pick(1, MOST_PANELS) : size_up_to(MOST_PANELS); }

/* From the end of one thing of so many elements to the next one: most often nothing. */
static int64_t gap(void) { return one_in(2) ? 0 : one_in(2) ? SPARGE_PANEL : pick(1, 20); }

/* ---- Memory, twice ---- */

typedef enum kind { F32, F16, BF16, I8, U8, I16, I32, KINDS } kind;

static const size_t size_of[KINDS] = {4, 2, 2, 1, 1, 2, 4};

typedef struct pair {
    void *got, *want;
} pair;

typedef struct array {
    const char *name;
    kind kind;
    size_t at;
    int64_t count, width; /* elements, elements of a row */
} array;

enum { MEMORY = 1 << 21, GUARD = 128, MOST_ARRAYS = 16 };
static _Alignas(64) uint8_t memory[2][MEMORY];
static array arrays[MOST_ARRAYS];
static int used_arrays;
static const uint32_t unwritten = 0xffedcba9u; /* of floats, a NaN that no kernel makes */
static size_t top;                             /* the first byte that no array and no guard has */
static char shape[160];

static void forget(void)
{
    ASAN_UNPOISON_MEMORY_REGION(memory[0], MEMORY);
    memset(memory[0], 0xFF, top);
    memset(memory[1], 0xFF, top);
    used_arrays = 0;
    top = 0;
    shape[0] = '\0';
}

/* Between guards, and as often as not `beside` bytes from where a vector would like it to be. */
static pair make_beside(const char *name, kind of, int64_t count, int64_t width, size_t beside)
{
    const size_t at = (top + GUARD + 63) / 64 * 64 + (size_t)pick(0, 1) * beside;
    const size_t end = at + (size_t)count * size_of[of];
    if (end + GUARD > MEMORY || used_arrays == MOST_ARRAYS)
        abort();
    ASAN_POISON_MEMORY_REGION(memory[0] + top, at - top);
    ASAN_POISON_MEMORY_REGION(memory[0] + end, GUARD);
    for (int64_t n = 0; n < count && of == F32; n++) {
        memcpy(memory[0] + at + n * 4, &unwritten, 4);
        memcpy(memory[1] + at + n * 4, &unwritten, 4);
    }
    arrays[used_arrays++] = (array){name, of, at, count, width};
    top = end + GUARD;
    return (pair){memory[0] + at, memory[1] + at};
}

static pair make(const char *name, kind of, int64_t count, int64_t width)
{
    return make_beside(name, of, count, width, size_of[of]);
}

/* What is packed has lanes of 32 bits, and so has what is packed from codes. */
static pair make_lanes(const char *name, kind of, int64_t count, int64_t width)
{
    return make_beside(name, of, count, width, 4);
}

/* Everything is filled in: the judge finds what the kernel finds. */
static void settle(void)
{
    for (int n = 0; n < used_arrays; n++)
        memcpy(memory[1] + arrays[n].at, memory[0] + arrays[n].at,
               (size_t)arrays[n].count * size_of[arrays[n].kind]);
}

static float as_float(const array *a, const uint8_t *from, int64_t n)
{
    const uint8_t *at = from + a->at + (size_t)n * size_of[a->kind];
    uint16_t half;
    int16_t word;
    int32_t lane;
    memcpy(&half, at, size_of[a->kind] < 2 ? 1 : 2);
    memcpy(&word, &half, 2);
    memcpy(&lane, at, size_of[a->kind] < 4 ? 1 : 4);
    switch (a->kind) {
    case F32: return sparge_bits_float((uint32_t)lane);
    case F16: return sparge_f16_to_f32(half);
    case BF16: return sparge_bf16_to_f32(half);
    case I8: return (float)(int8_t)*at;
    case U8: return (float)*at;
    case I16: return (float)word;
    default: return (float)lane;
    }
}

/* Any NaN is another's equal, since C does not say which one a sum gives; but one that nobody
 * wrote is not. */
static bool differs(const array *a, int64_t n)
{
    const uint32_t ones = 0xffffffffu, *poison = a->kind == F32 ? &unwritten : &ones;
    const size_t size = size_of[a->kind], at = a->at + (size_t)n * size;
    if (!memcmp(memory[0] + at, memory[1] + at, size))
        return false;
    return a->kind > BF16 || !memcmp(memory[0] + at, poison, size) ||
           !memcmp(memory[1] + at, poison, size) || !isnan(as_float(a, memory[0], n)) ||
           !isnan(as_float(a, memory[1], n));
}

/* Says what differs most, if anything does. */
static bool compare(const char *kernel, int64_t draw, uint64_t seed)
{
    bool same = true;
    ASAN_UNPOISON_MEMORY_REGION(memory[0], MEMORY);
    for (int i = 0; i < used_arrays; i++) {
        const array *a = &arrays[i];
        int64_t wrong = 0, worst = 0;
        float apart = -1.0f;
        if (!memcmp(memory[0] + a->at, memory[1] + a->at, (size_t)a->count * size_of[a->kind]))
            continue;
        for (int64_t n = 0; n < a->count; n++) {
            if (!differs(a, n)) {
                memcpy(memory[0] + a->at + (size_t)n * size_of[a->kind],
                       memory[1] + a->at + (size_t)n * size_of[a->kind], size_of[a->kind]);
                continue;
            }
            const float gap = fabsf(as_float(a, memory[0], n) - as_float(a, memory[1], n));
            const float size = gap <= FLT_MAX ? gap : INFINITY;
            if (size > apart) {
                apart = size;
                worst = n;
            }
            wrong++;
        }
        if (!wrong)
            continue;
        const double got = (double)as_float(a, memory[0], worst),
                     want = (double)as_float(a, memory[1], worst);
        printf("%s: draw %" PRId64 ", seed %" PRIu64 ", %s: %s[%" PRId64 "][%" PRId64
               "] is %.9g (%a), "
               "should be %.9g (%a); %" PRId64 " of %" PRId64 " differ\n",
               kernel, draw, seed, shape, a->name, worst / a->width, worst % a->width, got, got,
               want, want, wrong, a->count);
        same = false;
    }
    if (same && memcmp(memory[0], memory[1], top)) {
        size_t n = 0;
        while (memory[0][n] == memory[1][n])
            n++;
        printf("%s: draw %" PRId64 ", seed %" PRIu64 ", %s: a guard was written, byte %zu\n",
               kernel, draw, seed, shape, n);
        same = false;
    }
    return same;
}

/* ---- What is in them ---- */

/* Signed codes up to `most`, or unsigned ones: at random, all alike, alternating (a saturating sum
 * of two products shows there), or few of them. */
static void codes(int16_t *code, int64_t n, int64_t width, int most, bool is_signed)
{
    const int64_t style = pick(0, 9);
    for (int64_t e = 0; e < n; e++) {
        const int low = is_signed ? -most : 0;
        int x = (int)pick(low, most);
        if (style == 0)
            x = most;
        else if (style == 1)
            x = low;
        else if (style == 2)
            x = e % width % 2 ? low : most;
        else if (style == 3)
            x = e / width % 2 ? low : most;
        else if (style == 4)
            x = one_in(5) ? x : 0;
        else if (style == 5)
            x = one_in(2) ? most : low;
        code[e] = (int16_t)x;
    }
}

typedef enum range { PLAIN, TINY, LARGE, ZEROS, MIXED, RANGES } range;

static float value_of(range r)
{
    const float x = uniform();
    switch (r) {
    case PLAIN: return 4.0f * x;
    case TINY: return x * 0x1p-125f;
    case LARGE: return x * 0x1.8p127f;
    case ZEROS: return one_in(4) ? x : 0.0f;
    default: return ldexpf(x, (int)pick(-140, 126));
    }
}

static range range_of(void) { return one_in(2) ? PLAIN : (range)pick(PLAIN, MIXED); }

/* Finite rows, zero from dim to stride; some are zero as a whole, and some blocks hold whole
 * multiples of 1/8: ties. */
static void block_of_tokens(float *x, int64_t rows, int64_t dim, int64_t stride)
{
    const range r = range_of();
    const bool eighths = one_in(4);
    for (int64_t n = 0; n < rows; n++) {
        const bool zero = one_in(12);
        for (int64_t c = 0; c < stride; c++)
            x[n * stride + c] = c >= dim || zero ? 0.0f
                                : eighths        ? (float)pick(-16, 16) / 8
                                                 : value_of(r);
    }
}

static void values(float *x, int64_t n, range r)
{
    for (int64_t e = 0; e < n; e++)
        x[e] = value_of(r);
}

/* ---- One block of tokens ---- */

/* How a row lies in the caller's memory, forward or backward. */
static void test_load(const sparge_kernels *k, sparge_format f)
{
    static float plain[MOST_ROWS * MOST_DEPTH];
    static bool nonfinite[MOST_ROWS * MOST_DEPTH];
    (void)f;
    const sparge_dtype dtype = (sparge_dtype)pick(SPARGE_F32, SPARGE_BF16);
    const int64_t rows = size_up_to(MOST_ROWS), dim = size_up_to(MOST_DEPTH),
                  stride = sparge_padded(dim);
    const int64_t step = dim + (one_in(2) ? 0 : pick(0, 9)), token = one_in(4) ? -step : step;
    const int64_t all = (rows - 1) * step + dim, first = token < 0 ? (rows - 1) * step : 0;
    const pair in = make("in",
                         dtype == SPARGE_F32   ? F32
                         : dtype == SPARGE_F16 ? F16
                                               : BF16,
                         all, step);
    const pair mean = make("mean", F32, dim, dim), x = make("x", F32, rows * stride, stride);
    const pair finite = make("finite", I32, 1, 1), max = make("max", F32, 1, 1);
    const bool some_nonfinite = one_in(3), smooth = one_in(2);
    const int64_t odds = one_in(8) ? 1 : 40; /* of a non-finite element */
    const range r = range_of();
    snprintf(shape, sizeof shape, "dtype %d, %" PRId64 " rows of %" PRId64 ", %" PRId64 " apart",
             (int)dtype, rows, dim, token);
    values(mean.got, dim, smooth ? r : PLAIN);
    for (int64_t c = 0; c < dim && !smooth; c++)
        ((float *)mean.got)[c] = 0.0f;
    for (int64_t n = 0; n < rows; n++)
        for (int64_t c = 0; c < dim; c++) {
            const float special[] = {INFINITY, -INFINITY, NAN};
            const float value = some_nonfinite && one_in(odds) ? special[pick(0, 2)] : value_of(r);
            if (dtype == SPARGE_F32)
                ((float *)in.got)[n * step + c] = value;
            else if (dtype == SPARGE_F16)
                ((uint16_t *)in.got)[n * step + c] = one_in(2) && some_nonfinite
                                                         ? (uint16_t)random_bits()
                                                         : sparge_f32_to_f16(value);
            else
                ((uint16_t *)in.got)[n * step + c] = sparge_f32_to_bf16(value);
        }
    settle();
    const size_t size = dtype == SPARGE_F32 ? 4 : 2;
    const sparge_rows from = {(char *)in.got + (size_t)first * size, dtype, token, rows, dim};
    *(int32_t *)finite.got = k->load(&from, mean.got, stride, x.got, max.got);

    const sparge_in view = {(char *)in.want + (size_t)first * size, dtype, 0, 0, token};
    bool none = true;
    float largest = 0.0f;
    sparge_ref_load(&view, 0, 0, 0, rows, dim, plain, nonfinite);
    sparge_ref_subtract_mean(plain, nonfinite, rows, dim, mean.want);
    for (int64_t n = 0; n < rows; n++)
        for (int64_t c = 0; c < stride; c++) {
            ((float *)x.want)[n * stride + c] = c < dim ? plain[n * dim + c] : 0.0f;
            none &= c >= dim || !nonfinite[n * dim + c];
            largest = fmaxf(largest, fabsf(((float *)x.want)[n * stride + c]));
        }
    *(int32_t *)finite.want = none;
    *(float *)max.want = largest;
}

/* A block as load leaves it. */
typedef struct block {
    int64_t rows, dim, stride;
    pair x;
} block;

static block make_block(int64_t most_columns)
{
    block b = {.rows = size_up_to(MOST_ROWS), .dim = size_up_to(most_columns)};
    b.stride = sparge_padded(b.dim);
    b.x = make("x", F32, b.rows * b.stride, b.stride);
    block_of_tokens(b.x.got, b.rows, b.dim, b.stride);
    snprintf(shape, sizeof shape, "%" PRId64 " rows of %" PRId64, b.rows, b.dim);
    return b;
}

static void test_sum(const sparge_kernels *k, sparge_format f)
{
    static float zeros[MOST_DEPTH], scratch[MOST_ROWS * MOST_DEPTH];
    (void)f;
    const block b = make_block(MOST_DEPTH);
    const pair sum = make("sum", F32, b.stride, b.stride);
    const int64_t odd = one_in(3) ? pick(0, b.rows * b.dim - 1) : -1; /* counts as 0 */
    if (odd >= 0)
        ((float *)b.x.got)[odd / b.dim * b.stride + odd % b.dim] = one_in(2) ? INFINITY : NAN;
    settle();
    const sparge_rows rows = {b.x.got, SPARGE_F32, b.stride, b.rows, b.dim};
    k->sum(&rows, zeros, b.stride, scratch, sum.got);
    for (int64_t c = 0; c < b.stride; c++) {
        float total = 0.0f;
        for (int64_t r = 0; r < b.rows; r++)
            total += sparge_finite(((float *)b.x.want)[r * b.stride + c])
                         ? ((float *)b.x.want)[r * b.stride + c]
                         : 0.0f;
        ((float *)sum.want)[c] = total;
    }
}

/* In two parts, as a block comes in slices of 8 rows. */
static void test_sum_units(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const block b = make_block(MOST_DEPTH);
    const int64_t first = sparge_min(b.rows, 8 * pick(0, 4));
    const pair pool = make("pool", F32, b.stride, b.stride),
               unit_sum = make("unit_sum", F32, b.stride, b.stride);
    memset(pool.got, 0, (size_t)b.stride * sizeof(float));
    memset(unit_sum.got, 0, (size_t)b.stride * sizeof(float));
    settle();
    const float *x = b.x.got;
    k->sum_units(x, first, b.stride, pool.got, unit_sum.got);
    k->sum_units(x + first * b.stride, b.rows - first, b.stride, pool.got, unit_sum.got);
    for (int64_t r = 0; r < b.rows; r++) {
        const float *row = (float *)b.x.want + r * b.stride;
        const float to_unit = sparge_unit_factor(sparge_dot(row, row, b.stride));
        for (int64_t c = 0; c < b.stride; c++) {
            ((float *)pool.want)[c] += row[c];
            ((float *)unit_sum.want)[c] = fmaf(row[c], to_unit, ((float *)unit_sum.want)[c]);
        }
    }
}

static void test_channel_max(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const block b = make_block(MOST_CHANNELS);
    const pair max = make("max", F32, b.stride, b.stride);
    for (int64_t c = 0; c < b.stride; c++)
        ((float *)max.got)[c] = one_in(2) ? 0.0f : fabsf(value_of(range_of()));
    settle();
    k->channel_max(b.x.got, b.rows, b.stride, max.got);
    for (int64_t r = 0; r < b.rows; r++)
        for (int64_t c = 0; c < b.stride; c++)
            ((float *)max.want)[c] =
                fmaxf(((float *)max.want)[c], fabsf(((float *)b.x.want)[r * b.stride + c]));
}

static void test_cell_means(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const int64_t rows = size_up_to(MOST_ROWS), cell = size_up_to(MOST_ROWS),
                  cells = sparge_ceil_div(rows, cell), stride = multiple_up_to(SPARGE_PANEL, 64);
    const pair pool = make("pool", F32, cells * stride, stride);
    const float size = one_in(3) ? 0x1p60f : 4.0f;
    for (int64_t e = 0; e < cells * stride; e++)
        ((float *)pool.got)[e] = one_in(30) ? -INFINITY : one_in(30) ? INFINITY : size * uniform();
    snprintf(shape, sizeof shape, "%" PRId64 " rows in cells of %" PRId64, rows, cell);
    settle();
    k->cell_means(pool.got, rows, cell, stride);
    for (int64_t n = 0; n < cells; n++)
        for (int64_t c = 0; c < stride; c++) {
            float *const x = (float *)pool.want + n * stride + c;
            *x = fmaxf(-0x1p55f, fminf(0x1p55f, *x / (float)sparge_block_rows(rows, cell, n)));
        }
}

/* ---- Codes ---- */

/* Of PAIRS the bits. */
static const kind kind_of_a[SPARGE_FORMATS] = {I8, I16, F32, I16},
                  kind_of_b[SPARGE_FORMATS] = {U8, I16, F32, I16};

static int some_qmax(sparge_format f)
{
    static const int qmax[] = {127, 2047, 4095};
    return f == SPARGE_BYTES ? 127 : qmax[pick(0, 2)];
}

static void put(void *to, kind of, int64_t at, int code, float value)
{
    if (of == F32)
        ((float *)to)[at] = value;
    else if (of == I16 || of == BF16)
        ((int16_t *)to)[at] = (int16_t)code;
    else
        ((uint8_t *)to)[at] = (uint8_t)code;
}

/* x, `apart` from each other, so near n + 1/2 of their scale that the last bits of the quotient
 * decide: all, or few of them, since a neighbor's doubt must not lend its exactness. The largest
 * one, which makes the scale, is anywhere from what makes it 0 to the largest float. */
static void near_ties(float *x, int64_t n, int64_t apart, int qmax)
{
    const int lowest = FLT_MIN_EXP - 1, bits = ilogbf((float)qmax);
    const int exponent = (int)(one_in(3) ? pick(lowest + bits - 1, 127) : pick(-8, 8));
    const float largest = ldexpf(1.5f + uniform() / 2, exponent);
    const float scale = sparge_quant_scale(largest, qmax);
    const int64_t odds = one_in(3) ? 1 : one_in(2) ? 16 : 100, first = pick(0, n - 1);
    for (int64_t e = 0; e < n; e++) {
        float value = largest * uniform();
        if (one_in(odds)) {
            value = ((float)pick(0, qmax - 1) + 0.5f) * scale;
            for (int64_t steps = pick(-4, 4); steps; steps += steps < 0 ? 1 : -1)
                value = nextafterf(value, steps < 0 ? 0.0f : INFINITY);
            value = one_in(2) ? value : -value;
        }
        x[e * apart] = e == first ? largest : value;
    }
}

static void put_codes(const pair *code, kind of, int64_t n, const int16_t *from)
{
    for (int64_t e = 0; e < n; e++)
        put(code->want, of, e, from[e], 0.0f);
}

static void test_quantize(const sparge_kernels *k, sparge_format f)
{
    static int16_t plain[MOST_ROWS * MOST_DEPTH];
    const block b = make_block(MOST_DEPTH);
    const int64_t n = b.rows * b.stride;
    const int qmax = some_qmax(f);
    const pair code = make("code", kind_of_a[f], n, b.stride);
    if (one_in(2))
        near_ties(b.x.got, n, 1, qmax);
    settle();
    const float scale = sparge_ref_quantize(b.x.want, n, 1, qmax, 0.0f, plain);
    k->quantize[f](b.x.got, n, scale, qmax, code.got);
    put_codes(&code, kind_of_a[f], n, plain);
}

static void test_quantize_channels(const sparge_kernels *k, sparge_format f)
{
    static int16_t plain[MOST_ROWS * MOST_CHANNELS];
    static float scale[MOST_CHANNELS], inverse[MOST_CHANNELS];
    const block b = make_block(MOST_CHANNELS);
    const int qmax = some_qmax(f);
    const pair code = make("code", kind_of_a[f], b.rows * b.stride, b.stride);
    const bool ties = one_in(2);
    for (int64_t c = 0; c < b.dim && ties; c++)
        near_ties((float *)b.x.got + c, b.rows, b.stride, qmax);
    settle();
    for (int64_t c = 0; c < b.stride; c++) {
        scale[c] =
            sparge_ref_quantize((float *)b.x.want + c, b.rows, b.stride, qmax, 0.0f, plain + c);
        inverse[c] = sparge_quant_inverse(scale[c]);
    }
    k->quantize_channels[f](b.x.got, b.rows, b.stride, scale, inverse, qmax, code.got);
    put_codes(&code, kind_of_a[f], b.rows * b.stride, plain);
}

/* To nearest even in 8 bits, of doubles. */
static int bf16_of(float x)
{
    if (fabsf(x) < FLT_MIN || x == 0.0f)
        return signbit(x) ? 0x8000 : 0;
    const int step = ilogbf(x) - 7;
    const double rounded = ldexp(rint(ldexp((double)x, -step)), step);
    if (fabs(rounded) > (double)FLT_MAX)
        return 0;
    return (int)(sparge_float_bits((float)rounded) >> 16);
}

static void test_round_pairs(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const block b = make_block(MOST_DEPTH);
    const int64_t n = b.rows * b.stride;
    const pair to = make("pairs", I16, n, b.stride);
    for (int64_t e = 0; e < n && one_in(2); e++) {
        const float tie = sparge_bits_float((uint32_t)random_bits() << 16 | 0x8000u);
        const float odd[] = {0x1.ffp127f, 0x1.fefffep127f, FLT_MAX, 0x1.fffffep-127f, FLT_MIN, tie};
        const float value = odd[pick(0, 5)];
        ((float *)b.x.got)[e] = !sparge_finite(value) ? -0.0f : one_in(2) ? value : -value;
    }
    settle();
    k->round_pairs(b.x.got, n, to.got);
    for (int64_t e = 0; e < n; e++)
        put(to.want, I16, e, bf16_of(((float *)b.x.want)[e]), 0.0f);
}

/* ---- Packing: the layouts of kernels.h, once more ---- */

/* Where element (e, n) of B stands, its panels `stride` apart. */
static int64_t place(sparge_format f, int64_t stride, int64_t depth, int64_t e, int64_t n)
{
    const int64_t panel = n / 16 * stride, lane = n % 16, half = depth / 2;
    if (f == SPARGE_BYTES) /* [depth / 4][16][4] */
        return panel + e / 4 * 64 + lane * 4 + e % 4;
    if (f == SPARGE_WORDS) { /* [depth / 4][2][16][2] */
        const int64_t second = e >= half, within = second ? e - half : e;
        return panel + within / 2 * 64 + second * 32 + lane * 2 + within % 2;
    }
    if (f == SPARGE_PAIRS) /* [depth / 2][16][2] */
        return panel + e / 2 * 32 + lane * 2 + e % 2;
    return panel + e * 16 + lane;
}

/* Where element (r, n) of S^T or O^T stands. */
static int64_t place_of_c(int64_t stride, int64_t r, int64_t n)
{
    return n / 16 * stride + r * 16 + n % 16;
}

/* Codes or values [rows][stride] on their way into a product. */
typedef struct source {
    sparge_format f;
    int64_t rows, stride;
    pair from;
} source;

/* With memory for `all` rows. */
static source make_source(sparge_format f, int64_t rows, int64_t all, int64_t stride, int qmax)
{
    static int16_t plain[MOST_CHANNELS * MOST_DEPTH];
    source s = {f, rows, stride, make_lanes("from", kind_of_a[f], all * stride, stride)};
    codes(plain, rows * stride, stride, f == SPARGE_BYTES ? 127 : qmax, true);
    for (int64_t e = 0; e < rows * stride; e++)
        put(s.from.got, kind_of_a[f], e, plain[e], 4.0f * uniform());
    snprintf(shape, sizeof shape, "%" PRId64 " rows of %" PRId64, rows, stride);
    return s;
}

/* Element (r, c), and the same of values; 0 beyond the rows. */
static int code_at(const source *s, int64_t r, int64_t c)
{
    const int64_t at = r * s->stride + c;
    return s->f == SPARGE_FLOATS || r >= s->rows ? 0
           : s->f == SPARGE_BYTES                ? ((int8_t *)s->from.want)[at]
                                                 : ((int16_t *)s->from.want)[at];
}

static float value_at(const source *s, int64_t r, int64_t c)
{
    return s->f != SPARGE_FLOATS || r >= s->rows ? 0.0f
                                                 : ((float *)s->from.want)[r * s->stride + c];
}

static void test_pack_rows(const sparge_kernels *k, sparge_format f)
{
    const int64_t rows = size_up_to(MOST_ROWS), all = sparge_padded(rows);
    const source s = make_source(f, rows, all, multiple_up_to(k->depth[f], MOST_DEPTH), 2047);
    const pair init = make("a_init", I32, all, all);
    settle();
    k->pack_rows[f](s.from.got, rows, s.stride, init.got);
    for (int64_t r = 0; r < all; r++) {
        int32_t sum = 0, product = 0;
        for (int64_t c = 0; c < s.stride; c++) {
            const int code = code_at(&s, r, c);
            put(s.from.want, kind_of_a[f], r * s.stride + c, code, value_at(&s, r, c));
            sum += code;
            product += c < s.stride / 2 ? code * code_at(&s, r, s.stride / 2 + c) : 0;
        }
        if (f <= SPARGE_WORDS)
            ((int32_t *)init.want)[r] = f == SPARGE_BYTES ? -128 * sum : -product;
    }
}

static void test_pack_columns(const sparge_kernels *k, sparge_format f)
{
    const int64_t rows = size_up_to(MOST_ROWS), columns = sparge_padded(rows),
                  depth = multiple_up_to(k->depth[f], MOST_DEPTH), panel = depth * SPARGE_PANEL;
    const source s = make_source(f, rows, rows, depth, 2047);
    const pair b = make_lanes("b", kind_of_b[f], columns * depth, panel),
               init = make("b_init", I32, columns, columns);
    settle();
    k->pack_columns[f](s.from.got, rows, depth, b.got, init.got);
    for (int64_t n = 0; n < columns; n++) {
        int32_t product = 0;
        for (int64_t e = 0; e < depth; e++) {
            const int code = code_at(&s, n, e), excess = f == SPARGE_BYTES ? 128 : 0;
            put(b.want, kind_of_b[f], place(f, panel, depth, e, n), code + excess,
                value_at(&s, n, e));
            product += e < depth / 2 ? code * code_at(&s, n, depth / 2 + e) : 0;
        }
        if (f == SPARGE_WORDS)
            ((int32_t *)init.want)[n] = -product;
    }
}

static void test_pack_transposed(const sparge_kernels *k, sparge_format f)
{
    const int64_t depth = multiple_up_to(k->depth[f], f == SPARGE_WORDS ? 128 : MOST_DEPTH),
                  rows = one_in(2) ? depth - pick(0, k->depth[f] - 1) : pick(1, depth),
                  stride = multiple_up_to(SPARGE_PANEL, MOST_CHANNELS),
                  half = sparge_padded(rows) / 2;
    const source s = make_source(f, rows, rows, stride, 4095);
    const pair a = make_lanes("a", kind_of_a[f], stride * depth, depth),
               init = make("a_init", I32, stride, stride);
    settle();
    k->pack_transposed[f](s.from.got, rows, stride, depth, a.got, init.got);
    for (int64_t c = 0; c < stride; c++) {
        int32_t product = 0;
        for (int64_t t = 0; t < depth; t++) {
            put(a.want, kind_of_a[f], c * depth + t, code_at(&s, t, c), value_at(&s, t, c));
            product += t < half ? code_at(&s, t, c) * code_at(&s, half + t, c) : 0;
        }
        if (f == SPARGE_WORDS)
            ((int32_t *)init.want)[c] = -product;
    }
}

/* ---- One row of the prediction ---- */

static void test_score_pools(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const int64_t n = size_up_to(MOST_ROWS), stride = multiple_up_to(SPARGE_PANEL, MOST_DEPTH);
    const float scale = ldexpf(1.0f + uniform() / 2, (int)pick(-4, 2));
    const pair pool = make("pool", F32, stride, stride),
               pools = make("pools", F32, n * stride, stride);
    const pair s = make("s", F32, n, n);
    values(pool.got, stride, range_of());
    values(pools.got, n * stride, range_of());
    snprintf(shape, sizeof shape, "%" PRId64 " rows of %" PRId64, n, stride);
    settle();
    k->score_pools(pool.got, pools.got, n, stride, scale, s.got);
    for (int64_t j = 0; j < n; j++)
        ((float *)s.want)[j] =
            scale * sparge_dot(pool.want, (float *)pools.want + j * stride, stride);
}

static void test_mass(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const int64_t n = size_up_to(300);
    const float spread = ldexpf(1.0f, (int)pick(-3, one_in(4) ? 127 : 7));
    const pair s = make("s", F32, n, n), mass = make("mass", I32, n, n);
    float largest = -INFINITY;
    for (int64_t j = 0; j < n; j++) {
        ((float *)s.got)[j] = one_in(6) && j ? ((float *)s.got)[j - 1] : spread * uniform();
        largest = fmaxf(largest, ((float *)s.got)[j]);
    }
    snprintf(shape, sizeof shape, "%" PRId64 " blocks", n);
    settle();
    k->mass(s.got, n, largest, mass.got);
    for (int64_t j = 0; j < n; j++)
        ((int32_t *)mass.want)[j] = (int32_t)floor(
            (double)sparge_exp2((((float *)s.want)[j] - largest) * SPARGE_LOG2E) * 0x1p30);
}

/* ---- The two products ---- */

/* A and B by their coordinates, and as a kernel takes them. */
typedef struct operands {
    sparge_format f;
    sparge_bf16_order order;
    sparge_product got;
    pair a, b, a_init, b_init;
} operands;

/* A [rows][depth] and B [depth][columns]. */
static int16_t code_a[MOST_CHANNELS * MOST_DEPTH], code_b[MOST_DEPTH * MOST_COLUMNS];
static float value_a[MOST_CHANNELS * MOST_DEPTH], value_b[MOST_DEPTH * MOST_COLUMNS];

/* Sums of products of bf16 that cancel, that are subnormal on the way or in the end, that overflow;
 * operands of any size, zeros and subnormal ones too, as a style has them. */
static void bf16_values(int16_t *to, int64_t n, int64_t style)
{
    static const float few[] = {1.0f, -1.0f, 0x1p20f, -0x1p20f, 0x1.02p-10f, -0x1.02p-10f};
    for (int64_t e = 0; e < n; e++) {
        const float x = uniform();
        float value = style == 0   ? 4.0f * x
                      : style == 1 ? ldexpf(x, (int)pick(-66, -60))
                      : style == 2 ? ldexpf(x, (int)pick(60, 65))
                      : style == 3 ? few[pick(0, 5)]
                      : style == 4 ? ldexpf(x, (int)pick(-20, 20))
                                   : sparge_bits_float((uint32_t)random_bits());
        value = sparge_finite(value) && fabsf(value) < 0x1.fep127f ? value : 0.0f;
        to[e] = (int16_t)(sparge_float_bits(value) >> 16);
    }
}

/* WORDS of K and Q are within 2047, of V and P within 4095 at no more depth than their sums allow.
 * BYTES of P are within 127, where two products of them are added in 16 bits. */
static operands make_operands(const sparge_kernels *k, sparge_format f, bool is_pv)
{
    const int qmax = f == SPARGE_BYTES ? 127 : is_pv || one_in(2) ? 4095 : 2047;
    const int bytes = k->isa == SPARGE_ISA_AVX2 || one_in(4) ? 127 : 255;
    const int64_t depth =
        multiple_up_to(k->depth[f], f == SPARGE_WORDS && qmax == 4095 ? 128 : MOST_DEPTH);
    const int64_t rows = multiple_up_to(SPARGE_PANEL, MOST_CHANNELS),
                  columns = panels() * SPARGE_PANEL;
    const int64_t a_stride = depth + gap(), b_stride = depth * SPARGE_PANEL + 4 * gap();
    operands x = {.f = f, .order = sparge_bf16_order_of(k->isa)};
    x.a = make("a", kind_of_a[f], rows * a_stride, a_stride);
    x.b = make_lanes("b", kind_of_b[f], columns / SPARGE_PANEL * b_stride, b_stride);
    x.a_init = make("a_init", I32, rows, rows);
    x.b_init = make("b_init", I32, columns, columns);
    x.got = (sparge_product){
        .rows = rows,
        .panels = columns / SPARGE_PANEL,
        .depth = depth,
        .a = x.a.got,
        .a_stride = a_stride,
        .a_init = f == SPARGE_WORDS || (f == SPARGE_BYTES && !is_pv) ? x.a_init.got : NULL,
        .b = x.b.got,
        .b_stride = b_stride,
        .b_init = f == SPARGE_WORDS ? x.b_init.got : NULL,
    };
    snprintf(shape, sizeof shape,
             "%" PRId64 " rows of %" PRId64 ", strides %" PRId64 " and %" PRId64 ", %" PRId64
             " panels",
             rows, depth, a_stride, b_stride, x.got.panels);
    codes(code_a, rows * depth, depth, qmax, true);
    codes(code_b, depth * columns, columns, f == SPARGE_BYTES ? bytes : qmax,
          f == SPARGE_WORDS && !is_pv);
    if (f == SPARGE_PAIRS) {
        const int64_t style = pick(0, 5);
        bf16_values(code_a, rows * depth, style);
        bf16_values(code_b, depth * columns, one_in(8) ? pick(0, 5) : style);
    }
    values(value_a, f == SPARGE_FLOATS ? rows * depth : 0, range_of());
    values(value_b, f == SPARGE_FLOATS ? depth * columns : 0, range_of());
    for (int64_t r = 0; r < rows; r++) {
        const int16_t *row = code_a + r * depth;
        int32_t product = 0;
        for (int64_t e = 0; e < depth; e++) {
            put(x.a.got, kind_of_a[f], r * a_stride + e, row[e], value_a[r * depth + e]);
            product += f == SPARGE_WORDS && e < depth / 2 ? row[e] * row[depth / 2 + e] : 0;
        }
        ((int32_t *)x.a_init.got)[r] =
            f == SPARGE_WORDS ? -product : (int32_t)pick(-4000000, 4000000);
    }
    for (int64_t n = 0; n < columns; n++) {
        const int16_t *column = code_b + n;
        int32_t product = 0;
        for (int64_t e = 0; e < depth; e++) {
            put(x.b.got, kind_of_b[f], place(f, b_stride, depth, e, n), column[e * columns],
                value_b[e * columns + n]);
            product += f == SPARGE_WORDS && e < depth / 2
                           ? column[e * columns] * column[(depth / 2 + e) * columns]
                           : 0;
        }
        ((int32_t *)x.b_init.got)[n] = -product;
    }
    return x;
}

/* Element (r, n) of C; without codes added to `from`. */
static float product_at(const operands *x, int64_t r, int64_t n, float from)
{
    const int64_t columns = x->got.panels * SPARGE_PANEL, depth = x->got.depth;
    if (x->f == SPARGE_FLOATS) {
        for (int64_t e = 0; e < depth; e++)
            from = fmaf(value_a[r * depth + e], value_b[e * columns + n], from);
        return from;
    }
    if (x->f == SPARGE_PAIRS)
        return sparge_bf16_dot(from, (const uint16_t *)code_a + r * depth,
                               (const uint16_t *)code_b + n, columns, depth, x->order);
    int64_t sum = x->f == SPARGE_BYTES && x->got.a_init ? ((int32_t *)x->a_init.want)[r] : 0;
    for (int64_t e = 0; e < depth; e++)
        sum += code_a[r * depth + e] * code_b[e * columns + n];
    if (sum != (int32_t)sum)
        abort(); /* a draw that kernels.h does not allow */
    return (float)sum;
}

/* S^T or O^T, their panels some way apart. */
typedef struct panels_of_c {
    pair c;
    int64_t stride;
} panels_of_c;

static panels_of_c make_c(const char *name, int64_t rows, int64_t columns)
{
    const int64_t stride = (rows + (one_in(2) ? 0 : one_in(2) ? 1 : pick(1, 20))) * SPARGE_PANEL;
    return (panels_of_c){make(name, F32, columns / SPARGE_PANEL * stride, SPARGE_PANEL), stride};
}

static void test_score(const sparge_kernels *k, sparge_format f)
{
    const operands x = make_operands(k, f, false);
    const int64_t columns = x.got.panels * SPARGE_PANEL;
    const panels_of_c s = make_c("s", x.got.rows, columns);
    settle();
    k->score[f](&x.got, s.c.got, s.stride);
    for (int64_t r = 0; r < x.got.rows; r++)
        for (int64_t n = 0; n < columns; n++)
            ((float *)s.c.want)[place_of_c(s.stride, r, n)] = product_at(&x, r, n, 0.0f);
}

static void test_accumulate_pv(const sparge_kernels *k, sparge_format f)
{
    const operands x = make_operands(k, f, true);
    const int64_t rows = x.got.rows, columns = x.got.panels * SPARGE_PANEL;
    const panels_of_c o = make_c("o", rows, columns);
    const pair v_scale = make("v_scale", F32, rows, rows);
    const pair shrink = make("shrink", F32, columns, columns),
               weight = make("weight", F32, columns, columns);
    const bool still = one_in(3), floats = f >= SPARGE_FLOATS;
    const range r_of_o = f == SPARGE_PAIRS ? range_of() : PLAIN;
    for (int64_t n = 0; n < columns; n++) {
        ((float *)shrink.got)[n] = still ? 1.0f : one_in(3) ? (float)pick(0, 1) : fabsf(uniform());
        ((float *)weight.got)[n] = one_in(8) ? 0.0f : fabsf(uniform()) / 127;
        for (int64_t r = 0; r < rows; r++)
            ((float *)o.c.got)[place_of_c(o.stride, r, n)] = value_of(r_of_o);
    }
    values(v_scale.got, rows, PLAIN);
    settle();
    const sparge_accumulator into = {
        .shrink = shrink.got,
        .weight = floats ? NULL : weight.got,
        .still = still,
        .v_scale = floats ? NULL : v_scale.got,
        .o = o.c.got,
        .o_stride = o.stride,
    };
    k->accumulate_pv[f](&x.got, &into);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < columns; n++) {
            float *to = (float *)o.c.want + place_of_c(o.stride, r, n);
            const float kept = *to * ((float *)shrink.want)[n];
            const float scale = ((float *)weight.want)[n] * ((float *)v_scale.want)[r];
            *to =
                floats ? product_at(&x, r, n, kept) : fmaf(scale, product_at(&x, r, n, 0.0f), kept);
        }
}

/* ---- Softmax ---- */

/* Scores of queries: whole numbers as sums of codes are, values, what overflowed, and queries that
 * see little or nothing. */
typedef struct scores {
    pair s, top;
    sparge_scores got;
    int64_t queries;
} scores;

static scores make_scores(const sparge_kernels *k, sparge_format f)
{
    const int64_t queries = panels() * SPARGE_PANEL, keys = multiple_up_to(k->depth[f], MOST_DEPTH);
    const bool special = one_in(4), hidden = one_in(2);
    const float size = ldexpf(1.0f, (int)pick(0, one_in(4) ? 120 : 24));
    const panels_of_c s = make_c("s", keys, queries);
    scores x = {s.c, make("top", F32, queries, queries), .queries = queries};
    const float c = ldexpf(1.5f + uniform() / 2, (int)pick(-24, one_in(4) ? 100 : 4));
    x.got = (sparge_scores){s.c.got,  queries / SPARGE_PANEL,     keys,
                            s.stride, one_in(20) ? 0x1p-149f : c, special};
    for (int64_t q = 0; q < queries; q++) {
        const int64_t visible = !hidden ? keys : one_in(8) ? 0 : pick(0, keys);
        for (int64_t t = 0; t < keys; t++) {
            const float odd[] = {INFINITY, -INFINITY, NAN, 3e38f, -3e38f, NAN};
            float score = size * uniform();
            score = special && one_in(10) ? odd[pick(0, 5)]
                    : one_in(8)           ? 0.0f
                                          : rintf(score) + 0.0f;
            ((float *)x.s.got)[place_of_c(s.stride, t, q)] = t < visible ? score : -INFINITY;
        }
    }
    snprintf(shape, sizeof shape,
             "%" PRId64 " queries, %" PRId64 " keys, stride %" PRId64 ", scale %a", queries, keys,
             s.stride, (double)x.got.scale);
    return x;
}

static float score_at(const scores *x, int64_t t, int64_t q)
{
    return ((float *)x->s.want)[place_of_c(x->got.stride, t, q)];
}

static float most_of(const scores *x, int64_t q)
{
    float most = -INFINITY;
    for (int64_t t = 0; t < x->got.keys; t++) {
        const float score = score_at(x, t, q);
        if (score > most || score != score)
            most = score;
    }
    return most;
}

static void test_maxima(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    scores x = make_scores(k, f);
    const pair local = make("local", F32, x.queries, x.queries), above = make("above", I32, 1, 1);
    x.got.scale = one_in(20) ? 0.0f : one_in(20) ? INFINITY : x.got.scale;
    settle();
    *(int32_t *)above.got = k->maxima(&x.got, x.top.got, local.got);
    *(int32_t *)above.want = 1;
    for (int64_t q = 0; q < x.queries; q++) {
        const float most = most_of(&x, q);
        ((float *)x.top.want)[q] = most;
        ((float *)local.want)[q] = sparge_row_local(most, x.got.scale);
        *(int32_t *)above.want &= ((float *)local.want)[q] > -INFINITY;
    }
}

/* Of the first keys; the others stay. */
static void test_add_bias(const sparge_kernels *k, sparge_format f)
{
    scores x = make_scores(k, f);
    const int64_t keys = pick(0, x.got.keys);
    const pair bias = make("bias", F32, keys, keys);
    x.got.scale = one_in(20) ? 0.0f : one_in(20) ? INFINITY : one_in(20) ? NAN : x.got.scale;
    const float odd[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -0.0f, 0x1p-149f};
    for (int64_t t = 0; t < keys; t++)
        ((float *)bias.got)[t] = one_in(10) ? odd[pick(0, 5)] : 8.0f * uniform();
    settle();
    k->add_bias(&x.got, x.s.got, keys, bias.got);
    for (int64_t q = 0; q < x.queries; q++)
        for (int64_t t = 0; t < keys; t++)
            ((float *)x.s.want)[place_of_c(x.got.stride, t, q)] =
                sparge_score_biased(score_at(&x, t, q), x.got.scale, ((float *)bias.want)[t]);
}

static void test_hide(const sparge_kernels *k, sparge_format f)
{
    const scores x = make_scores(k, f);
    const int64_t words = sparge_ceil_div(x.got.keys, 32), count = words * x.queries;
    const pair attended = make("attended", I32, count, SPARGE_PANEL);
    const int64_t style = pick(0, 3);
    for (int64_t n = 0; n < count; n++)
        ((uint32_t *)attended.got)[n] = style == 0                 ? 0u
                                        : style == 1 && !one_in(8) ? ~0u
                                                                   : (uint32_t)random_bits();
    settle();
    k->hide(&x.got, x.s.got, attended.got);
    for (int64_t q = 0; q < x.queries; q++)
        for (int64_t t = 0; t < x.got.keys; t++) {
            const int64_t word = q / SPARGE_PANEL * words + t / 32;
            const uint32_t bits =
                ((uint32_t *)attended.want)[word * SPARGE_PANEL + q % SPARGE_PANEL];
            if (!(bits >> t % 32 & 1))
                ((float *)x.s.want)[place_of_c(x.got.stride, t, q)] = -INFINITY;
        }
}

static void test_update_max(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const int64_t rows = panels() * SPARGE_PANEL;
    const int qmax = one_in(3) ? 0 : some_qmax(SPARGE_WORDS);
    const char *const names[] = {"max", "sum", "local", "shrink", "weight"};
    const bool calm = one_in(3); /* no maximum moves, or one */
    pair x[5];
    for (int n = 0; n < 5; n++)
        x[n] = make(names[n], F32, rows, rows);
    const pair still = make("still", I32, 1, 1);
    for (int64_t r = 0; r < rows; r++) {
        const float spread = one_in(6) ? 1e4f : 20.0f, max = spread * uniform();
        const bool first = one_in(4) && !calm;
        const bool lost = one_in(10); /* a row that is NaN whatever comes */
        ((float *)x[0].got)[r] = first ? -INFINITY : lost ? (one_in(2) ? NAN : INFINITY) : max;
        ((float *)x[1].got)[r] = lost ? NAN : first ? 0.0f : 100.0f * fabsf(uniform());
        const float odd = one_in(2) ? NAN : INFINITY;
        const float below = max - 20.0f * fabsf(uniform());
        const float local = one_in(8) && !first ? max
                            : calm              ? below
                            : one_in(20)        ? odd
                                                : spread * uniform();
        ((float *)x[2].got)[r] = one_in(5) ? -INFINITY : local;
    }
    if (calm && one_in(2)) { /* by an ulp, which may shrink nothing, or by more */
        const int64_t r = pick(0, rows - 1);
        const float max = ((float *)x[0].got)[r];
        ((float *)x[2].got)[r] = one_in(2) ? nextafterf(max, INFINITY) : max + 1.0f;
    }
    snprintf(shape, sizeof shape, "%" PRId64 " rows, qmax %d", rows, qmax);
    settle();
    const sparge_softmax_rows all = {x[0].got, x[1].got, x[2].got, x[3].got, x[4].got};
    *(int32_t *)still.got = k->update_max(&all, rows, qmax);
    *(int32_t *)still.want = 1;
    for (int64_t r = 0; r < rows; r++) {
        sparge_row row = {((float *)x[0].want)[r], ((float *)x[1].want)[r]};
        const float local = ((float *)x[2].want)[r];
        const float sum = row.sum, shrink = sparge_row_update_max(&row, local);
        ((float *)x[3].want)[r] = shrink;
        ((float *)x[4].want)[r] = qmax ? sparge_code_weight(local, row.max, qmax) : 1.0f;
        if (local == -INFINITY) /* nothing is visible: what the row had */
            row.sum = sum;
        ((float *)x[0].want)[r] = row.max;
        ((float *)x[1].want)[r] = row.sum;
        *(int32_t *)still.want &= shrink == 1.0f;
    }
}

static void test_softmax(const sparge_kernels *k, sparge_format f)
{
    static float most[MOST_COLUMNS], local[MOST_COLUMNS];
    const scores x = make_scores(k, f);
    const int64_t queries = x.queries, keys = x.got.keys;
    const bool codes = f <= SPARGE_WORDS, in_place = f == SPARGE_FLOATS && one_in(2);
    const kind of = f == SPARGE_PAIRS ? BF16 : kind_of_b[f];
    const int64_t stride = in_place ? x.got.stride : keys * SPARGE_PANEL + 4 * gap();
    const pair p =
        in_place ? x.s : make_lanes("p", of, queries / SPARGE_PANEL * stride, SPARGE_PANEL);
    const pair sum = make("sum", F32, queries, queries),
               init = make("b_init", I32, queries, queries);
    k->maxima(&x.got, most, local); /* whose NaN is of this instruction set */
    for (int64_t q = 0; q < queries; q++) {
        const float more = 150.0f * fabsf(uniform());
        ((float *)x.top.got)[q] = codes ? most[q] : local[q] + (one_in(2) ? more : 0.0f);
    }
    settle();
    k->softmax[f](&x.got, x.top.got, p.got, stride, sum.got, init.got);
    for (int64_t q = 0; q < queries; q++) {
        const float top_of_q = ((float *)x.top.want)[q];
        float partial[16] = {0};
        int code[MOST_DEPTH];
        int64_t total = 0, product = 0;
        for (int64_t t = 0; t < keys; t++) {
            const float score = score_at(&x, t, q);
            float weight = codes ? 0.0f : sparge_weight(score, x.got.scale, top_of_q);
            code[t] = codes ? sparge_weight_code(score, top_of_q, x.got.scale,
                                                 f == SPARGE_BYTES ? 127 : 4095)
                            : 0;
            if (f == SPARGE_PAIRS) {
                code[t] = sparge_bf16_of(weight);
                weight = sparge_bf16_to_f32((uint16_t)code[t]);
            }
            put(p.want, of, place(f, stride, keys, t, q), code[t], weight);
            partial[t % 16] += weight;
            total += code[t];
        }
        for (int64_t t = 0; t < keys / 2 && f == SPARGE_WORDS; t++)
            product += code[t] * code[keys / 2 + t];
        ((float *)sum.want)[q] = codes ? (float)total : sparge_sum_of(partial);
        if (f == SPARGE_WORDS)
            ((int32_t *)init.want)[q] = (int32_t)-product;
    }
}

/* Of the first panel. */
static void test_sum_codes(const sparge_kernels *k, sparge_format f)
{
    const scores x = make_scores(k, f);
    const int64_t together = pick(1, 20), blocks = x.got.keys / together;
    const pair codes = make("codes", I32, blocks * SPARGE_PANEL, SPARGE_PANEL);
    static float local[MOST_COLUMNS];
    k->maxima(&x.got, x.top.got, local);
    settle();
    k->sum_codes(&x.got, x.top.got, together, codes.got);
    for (int64_t q = 0; q < SPARGE_PANEL; q++)
        for (int64_t j = 0; j < blocks; j++) {
            int32_t sum = 0;
            for (int64_t t = j * together; t < (j + 1) * together; t++)
                sum += sparge_weight_code(score_at(&x, t, q), ((float *)x.top.want)[q], x.got.scale,
                                          1 << 24);
            ((int32_t *)codes.want)[j * SPARGE_PANEL + q] = sum;
        }
}

static void test_cell_masses(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const int64_t blocks = size_up_to(MOST_ROWS);
    const pair codes = make("codes", I32, blocks * SPARGE_PANEL, SPARGE_PANEL);
    const int64_t most = one_in(3) ? 1 << 30 : 1 << 20;
    int64_t queries[SPARGE_PANEL];
    for (int64_t q = 0; q < SPARGE_PANEL; q++)
        queries[q] = one_in(5) ? 0 : pick(1, SPARGE_MAX_BLOCK);
    for (int64_t e = 0; e < blocks * SPARGE_PANEL; e++)
        ((int32_t *)codes.got)[e] = one_in(4) ? 0 : (int32_t)pick(0, most);
    snprintf(shape, sizeof shape, "%" PRId64 " blocks", blocks);
    settle();
    k->cell_masses(codes.got, blocks, queries);
    for (int64_t q = 0; q < SPARGE_PANEL; q++) {
        int64_t total = 0;
        for (int64_t j = 0; j < blocks; j++)
            total += ((int32_t *)codes.want)[j * SPARGE_PANEL + q];
        const double exact = total ? (double)(queries[q] << 20) / (double)total : 0.0;
        const float worth = (float)exact;
        for (int64_t j = 0; j < blocks; j++) {
            int32_t *const x = (int32_t *)codes.want + j * SPARGE_PANEL + q;
            *x = (int32_t)((float)*x * worth);
        }
    }
}

/* ---- One row of the output ---- */

static void test_turn(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const int64_t stride = multiple_up_to(SPARGE_PANEL, MOST_CHANNELS), n = stride * SPARGE_PANEL;
    const pair from = make("from", F32, n, SPARGE_PANEL), o = make("o", F32, n, stride);
    values(from.got, n, range_of());
    snprintf(shape, sizeof shape, "%" PRId64 " channels", stride);
    settle();
    k->turn(from.got, stride, o.got);
    for (int64_t c = 0; c < stride; c++)
        for (int64_t r = 0; r < SPARGE_PANEL; r++)
            ((float *)o.want)[r * stride + c] = ((float *)from.want)[c * SPARGE_PANEL + r];
}

static void test_dot(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const int64_t n = multiple_up_to(SPARGE_PANEL, 4 * MOST_DEPTH);
    const pair a = make("a", F32, n, n), b = make("b", F32, n, n), dot = make("dot", F32, 1, 1);
    values(a.got, n, range_of());
    values(b.got, n, range_of());
    snprintf(shape, sizeof shape, "%" PRId64 " elements", n);
    settle();
    *(float *)dot.got = k->dot(a.got, b.got, n);
    *(float *)dot.want = sparge_dot(a.want, b.want, n);
}

static void test_store(const sparge_kernels *k, sparge_format f)
{
    (void)f;
    const sparge_dtype dtype = (sparge_dtype)pick(SPARGE_F32, SPARGE_BF16);
    const int64_t n = size_up_to(MOST_CHANNELS);
    const float norm = one_in(10)   ? NAN
                       : one_in(10) ? 0.0f
                       : one_in(10) ? INFINITY
                                    : value_of(range_of());
    const kind of = dtype == SPARGE_F32 ? F32 : dtype == SPARGE_F16 ? F16 : BF16;
    const pair o = make("o", F32, n, n), out = make("out", of, n, n);
    values(o.got, n, range_of());
    for (int64_t c = 0; c < n; c++)
        if (one_in(30))
            ((float *)o.got)[c] = one_in(2) ? NAN : INFINITY;
    snprintf(shape, sizeof shape, "dtype %d, %" PRId64 " elements, norm %a", (int)dtype, n,
             (double)norm);
    settle();
    k->store(o.got, n, norm, dtype, out.got);
    for (int64_t c = 0; c < n; c++) {
        const float x = ((float *)o.want)[c] * norm + 0.0f; /* a zero has no sign */
        if (dtype == SPARGE_F32)
            ((float *)out.want)[c] = x;
        else
            ((uint16_t *)out.want)[c] =
                dtype == SPARGE_F16 ? sparge_f32_to_f16(x) : sparge_f32_to_bf16(x);
    }
}

/* ---- All of them ---- */

static const struct kernel {
    const char *name;
    void (*test)(const sparge_kernels *k, sparge_format f);
    sparge_format f;
} kernels[] = {
    {"load", test_load, 0},
    {"sum", test_sum, 0},
    {"sum_units", test_sum_units, 0},
    {"cell_means", test_cell_means, 0},
    {"channel_max", test_channel_max, 0},
    {"quantize bytes", test_quantize, SPARGE_BYTES},
    {"quantize words", test_quantize, SPARGE_WORDS},
    {"quantize_channels bytes", test_quantize_channels, SPARGE_BYTES},
    {"quantize_channels words", test_quantize_channels, SPARGE_WORDS},
    {"round_pairs", test_round_pairs, SPARGE_PAIRS},
    {"pack_rows bytes", test_pack_rows, SPARGE_BYTES},
    {"pack_rows words", test_pack_rows, SPARGE_WORDS},
    {"pack_rows floats", test_pack_rows, SPARGE_FLOATS},
    {"pack_rows pairs", test_pack_rows, SPARGE_PAIRS},
    {"pack_columns bytes", test_pack_columns, SPARGE_BYTES},
    {"pack_columns words", test_pack_columns, SPARGE_WORDS},
    {"pack_columns floats", test_pack_columns, SPARGE_FLOATS},
    {"pack_columns pairs", test_pack_columns, SPARGE_PAIRS},
    {"pack_transposed bytes", test_pack_transposed, SPARGE_BYTES},
    {"pack_transposed words", test_pack_transposed, SPARGE_WORDS},
    {"pack_transposed floats", test_pack_transposed, SPARGE_FLOATS},
    {"pack_transposed pairs", test_pack_transposed, SPARGE_PAIRS},
    {"score_pools", test_score_pools, 0},
    {"mass", test_mass, 0},
    {"sum_codes", test_sum_codes, SPARGE_BYTES},
    {"cell_masses", test_cell_masses, 0},
    {"score bytes", test_score, SPARGE_BYTES},
    {"score words", test_score, SPARGE_WORDS},
    {"score floats", test_score, SPARGE_FLOATS},
    {"score pairs", test_score, SPARGE_PAIRS},
    {"add_bias", test_add_bias, 0},
    {"hide", test_hide, 0},
    {"maxima", test_maxima, 0},
    {"update_max", test_update_max, 0},
    {"softmax bytes", test_softmax, SPARGE_BYTES},
    {"softmax words", test_softmax, SPARGE_WORDS},
    {"softmax floats", test_softmax, SPARGE_FLOATS},
    {"softmax pairs", test_softmax, SPARGE_PAIRS},
    {"accumulate_pv bytes", test_accumulate_pv, SPARGE_BYTES},
    {"accumulate_pv words", test_accumulate_pv, SPARGE_WORDS},
    {"accumulate_pv floats", test_accumulate_pv, SPARGE_FLOATS},
    {"accumulate_pv pairs", test_accumulate_pv, SPARGE_PAIRS},
    {"turn", test_turn, 0},
    {"dot", test_dot, 0},
    {"store", test_store, 0},
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

static bool passes(const sparge_kernels *table, const struct kernel *kernel, int64_t draws,
                   uint64_t seed)
{
    for (int64_t draw = 0; draw < draws; draw++) {
        state = seed ^ 0xcbf29ce484222325u;
        for (const char *c = kernel->name; *c; c++)
            state = (state ^ (uint64_t)(unsigned char)*c) * 0x100000001b3u; /* FNV-1a */
        state += (uint64_t)draw << 32;
        forget();
        kernel->test(table, kernel->f);
        if (!compare(kernel->name, draw, seed))
            return false;
    }
    return true;
}

static const char *isa_name(sparge_isa isa)
{
    static const char *const name[] = {"auto", "scalar", "avx2", "avxvnni", "avx512vnni", "amx"};
    return name[isa];
}

/* With the shim, AVX-VNNI runs wherever AVX2 does. */
static bool has(sparge_isa isa)
{
#ifdef SPARGE_SHIMS
    if (isa == SPARGE_ISA_AVXVNNI)
        isa = SPARGE_ISA_AVX2;
#endif
    return sparge_cpu_has(isa);
}

int main(int count, char **word)
{
    sparge_isa isa = SPARGE_ISA_AUTO;
    int64_t draws = 1000;
    uint64_t seed = 250218137;
    bool fine = count % 2;
    for (int n = 1; n + 1 < count; n += 2) {
        char *end = word[n + 1];
        if (!strcmp(word[n], "--isa")) {
            for (isa = SPARGE_ISA_SCALAR; isa < SPARGE_ISAS && strcmp(end, isa_name(isa)); isa++)
                ;
            fine &= isa < SPARGE_ISAS;
            continue;
        }
        const uint64_t number = strtoull(word[n + 1], &end, 10);
        fine &= end != word[n + 1] && !*end &&
                (!strcmp(word[n], "--draws") || !strcmp(word[n], "--seed"));
        if (!strcmp(word[n], "--draws"))
            draws = (int64_t)number;
        else
            seed = number;
    }
    if (!fine || isa == SPARGE_ISA_AUTO) {
        fprintf(stderr,
                "test_kernels --isa scalar|avx2|avxvnni|avx512vnni|amx [--draws N] [--seed S]\n");
        return 2;
    }
    const char *name = isa_name(isa);
    if (!has(isa)) {
        printf("%s is not on this machine\n", name);
        return 77;
    }
    printf("kernels %s: seed %" PRIu64 "\n", name, seed);
    const sparge_kernels table = sparge_cpu_kernels(isa);
    int wrong = table.isa != isa;
    if (wrong)
        printf("the table is of %s\n", isa_name(table.isa));
    top = MEMORY;
    if (table.begin)
        table.begin();
    int ran = 0;
    for (int n = 0; n < KERNELS; n++) {
        if (kernels[n].f == SPARGE_PAIRS && !sparge_cpu_has_bf16(isa)) {
            printf("%s: skipped, %s has no products of bf16 here\n", kernels[n].name, name);
            continue;
        }
        wrong += !passes(&table, &kernels[n], draws, seed);
        ran++;
    }
    if (table.end)
        table.end();
    printf("kernels %s: %" PRId64 " draws of %d kernels%s\n", name, draws, ran,
           wrong ? ", FAILED" : "");
    return wrong != 0;
}
