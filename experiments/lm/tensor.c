/* SPDX-License-Identifier: Apache-2.0 */
/* tensor.c: elements as they stand in files, to floats. Blocks are those of ggml:
 *
 *     Q8_0  step, 32 signed bytes          x = step * code
 *     Q4_0  step, 16 bytes of two codes    x = step * (code - 8)
 *     Q4_1  step, offset, 16 such bytes    x = step * code + offset
 *     Q6_K  256 codes of 6 bits in two arrays, 16 steps of one byte, the step of the steps
 *                                          x = step * steps[n / 16] * (code - 32)
 *
 * where steps and offsets are float16. */
#include <string.h>

#include "experiments/lm/checkpoint.h"

static const struct {
    const char *name;
    int64_t elements; /* of a block */
    size_t bytes;
} layout[] = {
    [TENSOR_F32] = {"F32", 1, 4},
    [TENSOR_F16] = {"F16", 1, 2},
    [TENSOR_BF16] = {"BF16", 1, 2},
    [TENSOR_Q8_0] = {"Q8_0", 32, 2 + 32},
    [TENSOR_Q4_0] = {"Q4_0", 32, 2 + 16},
    [TENSOR_Q4_1] = {"Q4_1", 32, 2 + 2 + 16},
    [TENSOR_Q6_K] = {"Q6_K", 256, 128 + 64 + 16 + 2},
};

const char *tensor_type_string(tensor_type type) { return layout[type].name; }

size_t tensor_bytes(tensor_type type, int64_t rows, int64_t columns)
{
    size_t bytes;
    if (columns % layout[type].elements != 0 ||
        __builtin_mul_overflow((size_t)(columns / layout[type].elements), layout[type].bytes,
                               &bytes) ||
        __builtin_mul_overflow(bytes, (size_t)rows, &bytes))
        return 0;
    return bytes;
}

static uint16_t two_bytes(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static float half(const uint8_t *p) { return f16_to_f32(two_bytes(p)); }

static void read_q8_0(const uint8_t *p, float *to)
{
    const float step = half(p);
    for (int n = 0; n < 32; n++)
        to[n] = step * (float)(int8_t)p[2 + n];
}

/* The low halves of the bytes are the first 16 codes. */
static void read_q4(const uint8_t *codes, float step, float offset, float *to)
{
    for (int n = 0; n < 16; n++) {
        to[n] = step * (float)(codes[n] & 15) + offset;
        to[16 + n] = step * (float)(codes[n] >> 4) + offset;
    }
}

/* Each half of 128 codes has 64 bytes of low bits, of which the low halves are the first 64 codes,
 * and 32 bytes of high bits, of which the lowest two are the first 32 codes. */
static void read_q6_k(const uint8_t *p, float *to)
{
    const uint8_t *low = p, *high = p + 128, *const steps = p + 128 + 64;
    const float step = half(steps + 16);
    for (int n = 0; n < 256; n++) {
        const int part = n / 128, quarter = n % 128 / 32, lane = n % 32;
        const int four = low[64 * part + quarter % 2 * 32 + lane] >> (quarter / 2 * 4) & 15;
        const int two = high[32 * part + lane] >> (2 * quarter) & 3;
        to[n] = step * (float)(int8_t)steps[n / 16] * (float)((two << 4 | four) - 32);
    }
}

static void read_blocks(const tensor *t, const uint8_t *p, int64_t blocks, float *to)
{
    const size_t bytes = layout[t->type].bytes;
    const int64_t elements = layout[t->type].elements;
    for (int64_t n = 0; n < blocks; n++, p += bytes, to += elements)
        switch (t->type) {
        case TENSOR_F32: memcpy(to, p, sizeof *to); break;
        case TENSOR_F16: *to = half(p); break;
        case TENSOR_BF16: *to = bf16_to_f32(two_bytes(p)); break;
        case TENSOR_Q8_0: read_q8_0(p, to); break;
        case TENSOR_Q4_0: read_q4(p + 2, half(p), -8.0f * half(p), to); break;
        case TENSOR_Q4_1: read_q4(p + 4, half(p), half(p + 2), to); break;
        case TENSOR_Q6_K: read_q6_k(p, to); break;
        }
}

void tensor_read(const tensor *t, int64_t first, int64_t rows, float *to)
{
    const size_t row = tensor_bytes(t->type, 1, t->columns);
    const int64_t blocks = t->columns / layout[t->type].elements;
#pragma omp parallel for if (rows > 1)
    for (int64_t r = 0; r < rows; r++)
        read_blocks(t, t->data + (size_t)(first + r) * row, blocks, to + r * t->columns);
}
