/* SPDX-License-Identifier: Apache-2.0 */
/* instructions.cc: the products and conversions that gpu/ptx.h and gpu/hopper.h declare, as the PTX
 * ISA 9.0 describes them. A fragment is spread over lanes: lane = 4 g + q. */
#include "common/half.h"
#include "tests/cuda_model/cuda_model.h"
#include "tests/cuda_model/threads.h"

#include <algorithm>
#include <math.h>

/* Loops that the address sanitizer would make ten times as slow; what they read has been checked.
 */
#define UNCHECKED __attribute__((no_sanitize("address", "undefined")))

namespace cuda_model {
namespace {

/* What asynchronous work has not written yet: NaN as a float, and the largest int. */
const uint32_t register_poison = 0x7fffffff;

/* ---- Numbers ------------------------------------------------------------------------------ */

/* e4m3: a sign, 4 bits of exponent of bias 7, 3 of mantissa; no infinity, and NaN is 0x7f or 0xff.
 */
float from_e4m3(uint32_t code)
{
    const uint32_t rest = code & 0x7f;
    float size =
        rest < 8 ? (float)rest * 0x1p-9f : ldexpf((float)(8 + rest % 8), (int)rest / 8 - 10);
    if (rest == 0x7f)
        size = NAN;
    return code & 0x80 ? -size : size;
}

/* PTX ISA, cvt.rn.satfinite: to the nearest, ties to even, never above 448; NaN is 0x7f. */
uint32_t to_e4m3(float x)
{
    const uint32_t bits = sparge_float_bits(x), sign = bits >> 24 & 0x80, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return 0x7f;
    if (rest < 0x3c800000) /* below 2^-6: adding 2^14, whose ulp is 2^-9, rounds there */
        return sign | (sparge_float_bits(sparge_bits_float(rest) + 0x1p14f) - 0x46800000);
    const uint32_t code = ((rest + 0x7ffff + (rest >> 20 & 1)) >> 20) - (120 << 3);
    return sign | std::min(code, 0x7eu);
}

UNCHECKED int bytes_of(Element element) { return element == Element::f16 ? 2 : 1; }

UNCHECKED float value(Element element, uint32_t bits)
{
    static const struct Table {
        float of[256];
        Table()
        {
            for (uint32_t code = 0; code < 256; code++)
                of[code] = from_e4m3(code);
        }
    } e4m3;
    return element == Element::s8     ? (float)(int8_t)bits
           : element == Element::e4m3 ? e4m3.of[bits & 0xff]
                                      : sparge_f16_to_f32((uint16_t)bits);
}

/* ---- Products ----------------------------------------------------------------------------- */

/* d[rows][columns] += a[rows][k] b[k][columns], in ascending k. T is float or int, whose 4 bytes d
 * holds. A product of two bytes is exact as a float. */
template <class T, int columns>
UNCHECKED void multiply(uint32_t *d, const float *a, const float *b, int rows, int k)
{
    for (int r = 0; r < rows; r++, d += columns) {
        T row[columns];
        memcpy(row, d, sizeof row);
        for (int n = 0; n < k; n++)
            for (int c = 0; c < columns; c++)
                row[c] += static_cast<T>(a[r * k + n] * b[n * columns + c]);
        memcpy(d, row, sizeof row);
    }
}

template <int columns>
void multiply(Element element, uint32_t *d, const float *a, const float *b, int rows)
{
    if (element == Element::s8)
        multiply<int, columns>(d, a, b, rows, 32);
    else
        multiply<float, columns>(d, a, b, rows, 32 / bytes_of(element));
}

/* Where register n of a lane stands, in tiles of 16 rows. PTX ISA, matrix fragments of
 * mma.m16n8k32, m16n8k16 and wgmma.m64: d, then element e of a or b (whose n counts the halves of k
 * alone). */
UNCHECKED int d_row(int lane, int n) { return lane / 4 + 8 * (n / 2 % 2); }
UNCHECKED int d_column(int lane, int n) { return 8 * (n / 4) + 2 * (lane % 4) + n % 2; }
UNCHECKED int a_row(int lane, int n) { return lane / 4 + 8 * (n % 2); }
UNCHECKED int a_k(Element element, int lane, int half, int e)
{
    const int in_register = 4 / bytes_of(element);
    return in_register * (4 * half + lane % 4) + e;
}

UNCHECKED void decode_a(Element element, int lane, const uint32_t *registers, float *a)
{
    const int bits = 8 * bytes_of(element), k = 256 / bits;
    for (int n = 0; n < 4; n++)
        for (int e = 0; e < 32 / bits; e++)
            a[a_row(lane, n) * k + a_k(element, lane, n / 2, e)] =
                value(element, registers[n] >> (bits * e));
}

struct Tile {
    void *d;
    const uint32_t *a;
    uint32_t b[2];
};

template <Element element> UNCHECKED void mma(void *const *tiles)
{
    const int bits = 8 * bytes_of(element);
    uint32_t d[16 * 8];
    float a[16 * 32], b[32 * 8];
    for (int lane = 0; lane < 32; lane++) {
        const Tile &t = *(const Tile *)tiles[lane];
        decode_a(element, lane, t.a, a);
        for (int n = 0; n < 2; n++)
            for (int e = 0; e < 32 / bits; e++)
                b[a_k(element, lane, n, e) * 8 + lane / 4] = value(element, t.b[n] >> (bits * e));
        for (int n = 0; n < 4; n++)
            memcpy(&d[d_row(lane, n) * 8 + d_column(lane, n)], (char *)t.d + 4 * n, 4);
    }
    multiply<8>(element, d, a, b, 16);
    for (int lane = 0; lane < 32; lane++)
        for (int n = 0; n < 4; n++)
            memcpy((char *)((Tile *)tiles[lane])->d + 4 * n,
                   &d[d_row(lane, n) * 8 + d_column(lane, n)], 4);
}

/* ---- wgmma -------------------------------------------------------------------------------- */

/* An offset in a descriptor, in bytes: 0 the address, 16 the leading, 32 the stride byte offset. */
int offset(uint64_t descriptor, int bit) { return (int)(descriptor >> bit & 0x3fff) << 4; }
int pitch(uint64_t descriptor) { return 256 >> (descriptor >> 62); }

/* The 16 bytes of an operand that are `at` bytes behind its first by the descriptor's strides; the
 * swizzle depends on the address alone. PTX ISA, asynchronous warpgroup level matrix shared memory
 * layout. */
const uint8_t *piece(uint64_t descriptor, int at)
{
    const Block &block = *self().block;
    at += offset(descriptor, 0);
    at ^= (at >> 7 & (pitch(descriptor) / 16 - 1)) << 4;
    if ((size_t)at + 16 > block.shared_bytes)
        misuse("wgmma: a descriptor leads to shared memory + %d of %zu", at, block.shared_bytes);
    return block.shared + at;
}

/* 8-bit operands are k-major: 32 values of k side by side, the rows (along M or N) `pitch` bytes
 * apart, groups of 8 rows a stride. The value (row, k) goes to values[row * by_row + k * by_k]. */
UNCHECKED void read_k_major(Element element, uint64_t descriptor, int rows, int by_row, int by_k,
                            float *values)
{
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 32; k += 16) {
            const int row = r / 8 * offset(descriptor, 32) + r % 8 * pitch(descriptor);
            const uint8_t *bytes = piece(descriptor, row + k);
            for (int n = 0; n < 16; n++)
                values[r * by_row + (k + n) * by_k] = value(element, bytes[n]);
        }
}

/* Binary16 is n-major: 64 columns side by side, 8 rows of k 128 bytes apart, groups of those a
 * stride, the next 64 columns a leading offset. */
UNCHECKED void read_n_major(uint64_t descriptor, int columns, float *values)
{
    for (int k = 0; k < 16; k++)
        for (int c = 0; c < columns; c += 8) {
            uint16_t halves[8];
            const int row =
                c / 64 * offset(descriptor, 16) + k / 8 * offset(descriptor, 32) + k % 8 * 128;
            memcpy(halves, piece(descriptor, row + c % 64 * 2), sizeof halves);
            for (int n = 0; n < 8; n++)
                values[k * columns + c + n] = value(Element::f16, halves[n]);
        }
}

void read_operands(Product &p)
{
    const int columns = p.d->columns;
    p.b.resize((size_t)(32 * columns));
    if (p.element == Element::f16)
        read_n_major(p.b_descriptor, columns, p.b.data());
    else
        read_k_major(p.element, p.b_descriptor, columns, 1, columns, p.b.data());
    if (!p.a_in_registers)
        read_k_major(p.element, p.a_descriptor, 64, 32, 1, p.a.data());
}

/* Between the registers of 128 threads and the matrix. */
template <class Body> UNCHECKED void for_registers(Accumulators &d, Body body)
{
    uint32_t *const values = d.values.data();
    for (int t = 0; t < 128; t++)
        for (int n = 0; n < d.columns / 2; n++)
            body((char *)d.registers[t] + 4 * n,
                 values + (t / 32 * 16 + d_row(t % 32, n)) * d.columns + d_column(t % 32, n));
}

void complete(Product &p, Products &all)
{
    Accumulators &d = *p.d;
    if (p.b.empty())
        read_operands(p);
    if (!p.add)
        std::fill(d.values.begin(), d.values.end(), 0u);
    const auto product = d.columns == 64   ? multiply<64>
                         : d.columns == 96 ? multiply<96>
                                           : multiply<128>;
    product(p.element, d.values.data(), p.a.data(), p.b.data(), 64);
    if (--d.products)
        return;
    for_registers(d, [](char *r, const uint32_t *v) {
        if (late() && memcmp(r, &register_poison, 4))
            misuse("wgmma: accumulators were written before wgmma_wait for the product that writes "
                   "them");
        memcpy(r, v, 4);
    });
    all.busy.erase(std::find(all.busy.begin(), all.busy.end(), p.d));
}

struct Issue {
    Element element;
    int columns;
    void *d;
    const uint32_t *registers;
    uint64_t a, b;
    bool add;
};

Products &products() { return self().block->products[self().rank / 128]; }

void issue(void *const *issues)
{
    const Issue &first = *(const Issue *)issues[0];
    Products &all = products();
    for (int t = 1; t < 128; t++) {
        const Issue &other = *(const Issue *)issues[t];
        if (other.element != first.element || other.columns != first.columns ||
            other.a != first.a || other.b != first.b || other.add != first.add)
            misuse("wgmma: descriptors or `add` differ between threads 0 and %d of the warpgroup",
                   t);
    }
    for (uint64_t descriptor : {first.registers ? first.b : first.a, first.b})
        if (descriptor >> 62 == 0 || descriptor >> 62 == 3 ||
            (first.element == Element::f16 && descriptor >> 62 != 1))
            misuse("wgmma: a swizzle that is not of 128 bytes, or of 64 for 8-bit operands");

    Product p = {};
    p.element = first.element;
    p.add = first.add;
    p.a_descriptor = first.a;
    p.b_descriptor = first.b;
    p.a_in_registers = first.registers != nullptr;
    const int k = 32 / bytes_of(first.element);
    p.a.resize((size_t)(64 * k));
    for (int t = 0; t < 128 && p.a_in_registers; t++)
        decode_a(p.element, t % 32, ((const Issue *)issues[t])->registers,
                 &p.a[(size_t)(t / 32 * 16 * k)]);

    const auto busy = std::find_if(all.busy.begin(), all.busy.end(),
                                   [&](const auto &d) { return d->registers[0] == first.d; });
    if (busy != all.busy.end()) {
        p.d = *busy;
        if (p.d->columns != first.columns)
            misuse("wgmma: %d columns into accumulators in flight of %d", first.columns,
                   p.d->columns);
    } else {
        p.d = std::make_shared<Accumulators>();
        p.d->columns = first.columns;
        p.d->values.resize((size_t)(64 * first.columns));
        for (int t = 0; t < 128; t++)
            p.d->registers[t] = ((const Issue *)issues[t])->d;
        for_registers(*p.d, [](char *r, uint32_t *v) {
            memcpy(v, r, 4);
            if (late())
                memcpy(r, &register_poison, 4);
        });
        all.busy.push_back(p.d);
    }
    p.d->products++;
    if (cuda_model_settings.late == 2)
        read_operands(p);
    if (!late()) {
        complete(p, all);
        p.done = true;
    }
    all.open.push_back(std::move(p));
}

} // namespace

void wgmma(Element element, int columns, void *d, const uint32_t *registers, uint64_t a, uint64_t b,
           bool add)
{
    Issue mine = {element, columns, d, registers, a, b, add};
    together(self().block->warpgroups, "wgmma", &mine, issue);
}

void wait_for_products(size_t groups_left)
{
    together(self().block->warpgroups, "wgmma_wait", &groups_left, [](void *const *operands) {
        Products &all = products();
        while (all.groups.size() > *(const size_t *)operands[0]) {
            for (Product &p : all.groups.front())
                if (!p.done)
                    complete(p, all);
            all.groups.pop_front();
        }
    });
}

} // namespace cuda_model

using namespace cuda_model;

/* ---- gpu/ptx.h ---------------------------------------------------------------------------- */

uint32_t shared_address(const void *p) { return shared_range("shared_address", p, 1, 1); }

namespace {
struct Row {
    uint32_t *r;
    const uint8_t *row;
};
} // namespace

void ldmatrix(uint32_t (&r)[4], const void *row)
{
    Row mine = {r, (const uint8_t *)row};
    shared_range("ldmatrix", row, 16, 16);
    together(self().block->warps, "ldmatrix", &mine, [](void *const *rows) {
        for (int lane = 0; lane < 32; lane++)
            for (int n = 0; n < 4; n++)
                memcpy(((Row *)rows[lane])->r + n,
                       ((Row *)rows[8 * n + lane / 4])->row + lane % 4 * 4, 4);
    });
}

void ldmatrix_transposed(uint32_t (&r)[4], const void *row)
{
    Row mine = {r, (const uint8_t *)row};
    shared_range("ldmatrix_transposed", row, 16, 16);
    together(self().block->warps, "ldmatrix_transposed", &mine, [](void *const *rows) {
        for (int lane = 0; lane < 32; lane++)
            for (int n = 0; n < 4; n++)
                for (int e = 0; e < 2; e++)
                    memcpy((char *)(((Row *)rows[lane])->r + n) + 2 * e,
                           ((Row *)rows[8 * n + 2 * (lane % 4) + e])->row + 2 * (lane / 4), 2);
    });
}

void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    Tile mine = {d, a, {b0, b1}};
    together(self().block->warps, "mma_s8", &mine, mma<Element::s8>);
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    Tile mine = {d, a, {b0, b1}};
    together(self().block->warps, "mma_f16", &mine, mma<Element::f16>);
}

float exp2_fast(float x) { return x > 0 ? exp2f(x) : sparge_exp2(x); }
uint32_t pack_f16(float a, float b)
{
    return sparge_f32_to_f16(a) | (uint32_t)sparge_f32_to_f16(b) << 16;
}

/* ---- gpu/hopper.h ------------------------------------------------------------------------- */

void wgmma_commit()
{
    together(self().block->warpgroups, "wgmma_commit", nullptr, [](void *const *) {
        Products &all = products();
        all.groups.push_back(std::move(all.open));
        all.open.clear();
    });
}

uint32_t pack_e4m3(float a, float b, float c, float d)
{
    return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24;
}
