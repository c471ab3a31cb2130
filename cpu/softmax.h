/* SPDX-License-Identifier: Apache-2.0 */
/* softmax.h: softmax of a tile in vectors, written once: the largest score of each query, and P^T
 * from S^T. A query is a lane. An instruction set's file includes it after products.h and after it
 * has said
 *
 *     f_max(a, b)          the larger; b where a or b is a NaN
 *     f_flush(x, p)        p, or 0 where x is below SPARGE_EXP2_LOWEST
 *     f_nan(x, y)          x, or y in lanes where that is a NaN
 *     i_of(x)              truncated
 *     i_madd(a, b)         the two products of words in a lane, added */
#ifndef SPARGE_CPU_SOFTMAX_H
#define SPARGE_CPU_SOFTMAX_H

#include "cpu/plain.h"

/* The larger of both; NaN where one is NaN, if `nans` may come. */
INLINE floats f_larger(floats a, floats b, bool nans)
{
    const floats larger = f_max(b, a);
    return nans ? f_nan(larger, b) : larger;
}

/* So many keys go side by side, for the processor to be busy while each waits for itself. */
enum { BESIDE = 4 };

/* The largest of a vector of queries. */
INLINE floats most_of(const sparge_scores *x, const float *s, bool nans)
{
    floats most[BESIDE];
    for (int e = 0; e < BESIDE; e++)
        most[e] = f_all(-INFINITY);
    for (int64_t t = 0; t < x->keys; t += BESIDE)
        for (int e = 0; e < BESIDE; e++)
            most[e] = f_larger(most[e], f_load(s + (t + e) * SPARGE_PANEL), nans);
    return f_larger(f_larger(most[0], most[1], nans), f_larger(most[2], most[3], nans), nans);
}

static bool maxima(const sparge_scores *x, float *most, float *local)
{
    int above = 1;
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q += LANES) {
        const float *s = x->s + q / SPARGE_PANEL * x->stride + q % SPARGE_PANEL;
        f_store(most + q, x->nans ? most_of(x, s, true) : most_of(x, s, false));
    }
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q++) {
        local[q] = sparge_row_local(most[q], x->scale);
        above &= local[q] > -INFINITY;
    }
    return above;
}

/* sparge_exp2, but for the flush to 0 below SPARGE_EXP2_LOWEST, where p is 2^-126. */
INLINE void exp2_of(const floats x[BESIDE], bool nans, floats p[BESIDE])
{
    static const float coefficient[] = {SPARGE_EXP2_C4, SPARGE_EXP2_C3, SPARGE_EXP2_C2,
                                        SPARGE_EXP2_C1, 1.0f};
    const floats rounder = f_all(SPARGE_EXP2_ROUNDER), lowest = f_all(SPARGE_EXP2_LOWEST);
    floats f[BESIDE], shifted[BESIDE];
    for (int e = 0; e < BESIDE; e++) {
        const floats inside = nans ? f_max(lowest, x[e]) : f_max(x[e], lowest);
        shifted[e] = inside + rounder;
        f[e] = inside - (shifted[e] - rounder);
    }
    for (int e = 0; e < BESIDE; e++)
        p[e] = f_fma(f_all(SPARGE_EXP2_C6), f[e], f_all(SPARGE_EXP2_C5));
    for (size_t c = 0; c < sizeof coefficient / sizeof *coefficient; c++)
        for (int e = 0; e < BESIDE; e++)
            p[e] = f_fma(p[e], f[e], f_all(coefficient[c]));
    /* n of 2^n stands in the low bits. They are 0 in the NaN of a processor, which so stays one. */
    for (int e = 0; e < BESIDE; e++)
        p[e] = (floats)i_add((ints)p[e], (ints)shifted[e] << 23);
}

/* A vector of queries through the keys of the tile. */
typedef struct softmax_lanes {
    const float *s;    /* of key 0 */
    floats scale, top; /* top of codes: the largest s; of floats: the running maximum */
} softmax_lanes;

/* sparge_weight_code of keys t to t + 3. */
INLINE void codes_of(const softmax_lanes *w, int64_t t, float qmax, ints code[BESIDE])
{
    floats x[BESIDE], p[BESIDE];
    for (int e = 0; e < BESIDE; e++)
        x[e] = w->scale * (f_load(w->s + (t + e) * SPARGE_PANEL) - w->top);
    exp2_of(x, false, p);
    for (int e = 0; e < BESIDE; e++)
        code[e] = i_of(f_fma(f_all(qmax), p[e], f_all(0.5f)));
}

INLINE floats softmax_lanes_bytes(const softmax_lanes *w, int64_t keys, void *p)
{
    ints sum = {0};
    for (int64_t t = 0; t < keys; t += BESIDE) {
        ints code[BESIDE];
        codes_of(w, t, (float)sparge_pv_qmax(SPARGE_INT8), code);
        const ints four = code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24;
        i_store((uint8_t *)p + t * SPARGE_PANEL, four);
        sum = i_dot_bytes(sum, four, i_all(0x01010101));
    }
    return f_of(sum);
}

/* Pairs of the first half of the keys and of the second stand beside each other. */
INLINE floats softmax_lanes_words(const softmax_lanes *w, int64_t keys, void *p)
{
    ints sum = {0};
    for (int64_t t = 0; t < keys; t += BESIDE) {
        const bool second = t >= keys / 2;
        int16_t *to = (int16_t *)p + (second ? 2 * t - keys + 2 : 2 * t) * SPARGE_PANEL;
        ints code[BESIDE];
        codes_of(w, t, (float)sparge_pv_qmax(SPARGE_INT12), code);
        for (int e = 0; e < BESIDE; e += 2) {
            const ints two = code[e] | code[e + 1] << 16;
            i_store(to + 2 * e * SPARGE_PANEL, two);
            sum = i_add(sum, i_madd(two, i_all(0x00010001)));
        }
    }
    return f_of(sum);
}

/* A row of cells: its codes of so many keys at a time, added up. */
INLINE void sum_codes_lanes(const softmax_lanes *w, int64_t keys, int64_t together, int32_t *to)
{
    int64_t added = 0;
    ints sum = {0};
    for (int64_t t = 0; t < keys; t += BESIDE) {
        ints code[BESIDE];
        codes_of(w, t, (float)SPARGE_CELL_QMAX, code);
        for (int e = 0; e < BESIDE; e++) {
            sum = i_add(sum, code[e]);
            if (++added < together)
                continue;
            i_store(to, sum);
            to += SPARGE_PANEL;
            added = 0;
            sum = (ints){0};
        }
    }
}

/* -(first half . second half), what Winograd's product has too much of. */
INLINE ints words_init_of(const int16_t *p, int64_t keys)
{
    ints init = {0};
    for (int64_t t = 0; t < keys / 2; t += 2, p += 4 * SPARGE_PANEL)
        init = (ints)((uints)init - (uints)i_madd(i_load(p), i_load(p + 2 * SPARGE_PANEL)));
    return init;
}

/* sparge_weight of keys t to t + 3. */
INLINE void weights_of(const softmax_lanes *w, int64_t t, floats weight[BESIDE])
{
    floats x[BESIDE];
    for (int e = 0; e < BESIDE; e++)
        x[e] = w->scale * f_load(w->s + (t + e) * SPARGE_PANEL) - w->top;
    exp2_of(x, true, weight);
    for (int e = 0; e < BESIDE; e++)
        weight[e] = f_flush(x[e], weight[e]);
}

/* sparge_sum_of */
INLINE floats sum_of_partials(floats partial[16])
{
    for (int half = 8; half > 0; half /= 2)
        for (int e = 0; e < half; e++)
            partial[e] += partial[e + half];
    return partial[0];
}

INLINE floats softmax_lanes_floats(const softmax_lanes *w, int64_t keys, float *p)
{
    floats partial[16];
    for (int64_t t = 0; t < keys; t += BESIDE) {
        floats weight[BESIDE];
        weights_of(w, t, weight);
        for (int e = 0; e < BESIDE; e++)
            f_store(p + (t + e) * SPARGE_PANEL, weight[e]);
    }
    for (int e = 0; e < 16; e++)
        partial[e] = f_load(p + e * SPARGE_PANEL);
    for (int64_t t = 16; t < keys; t += 16)
        for (int e = 0; e < 16; e++)
            partial[e] += f_load(p + (t + e) * SPARGE_PANEL);
    return sum_of_partials(partial);
}

/* sparge_bf16_of a weight, which is never subnormal, in the upper half of a lane. */
INLINE ints rounded(floats weight)
{
    const uints bits = (uints)weight;
    return (ints)((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

INLINE floats softmax_lanes_pairs(const softmax_lanes *w, int64_t keys, uint16_t *p)
{
    floats partial[16];
    for (int64_t t = 0; t < keys; t += BESIDE) {
        floats weight[BESIDE];
        weights_of(w, t, weight);
        for (int e = 0; e < BESIDE; e += 2)
            i_store(p + (t + e) * SPARGE_PANEL,
                    (ints)((uints)rounded(weight[e]) >> 16) | rounded(weight[e + 1]));
    }
    for (int e = 0; e < 16; e++)
        partial[e] = f_all(0.0f);
    for (int64_t t = 0; t < keys; t += 16)
        for (int e = 0; e < 16; e += 2) {
            const ints pair = i_load(p + (t + e) * SPARGE_PANEL);
            partial[e] += (floats)(pair << 16);
            partial[e + 1] += (floats)(pair & i_all(-65536));
        }
    return sum_of_partials(partial);
}

INLINE softmax_lanes lanes_at(const sparge_scores *x, int64_t q, floats top)
{
    return (softmax_lanes){x->s + q / SPARGE_PANEL * x->stride + q % SPARGE_PANEL, f_all(x->scale),
                           top};
}

/* Where query q begins in P^T. */
INLINE void *p_of(void *p, int64_t p_stride, int64_t q, size_t size)
{
    return (char *)p + (size_t)(q / SPARGE_PANEL * p_stride) * size +
           (size_t)(q % SPARGE_PANEL) * 4;
}

static void softmax_bytes(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                          float *sum, int32_t *b_init)
{
    (void)b_init;
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q += LANES) {
        const softmax_lanes w = lanes_at(x, q, f_load(top + q));
        f_store(sum + q, softmax_lanes_bytes(&w, x->keys, p_of(p, p_stride, q, 1)));
    }
}

static void softmax_words(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                          float *sum, int32_t *b_init)
{
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q += LANES) {
        const softmax_lanes w = lanes_at(x, q, f_load(top + q));
        int16_t *to = p_of(p, p_stride, q, sizeof *to);
        f_store(sum + q, softmax_lanes_words(&w, x->keys, to));
        i_store(b_init + q, words_init_of(to, x->keys));
    }
}

INLINE floats base_of(const float *top)
{
    float base[LANES];
    for (int n = 0; n < LANES; n++)
        base[n] = sparge_row_base(top[n]);
    return f_load(base);
}

static void softmax_floats(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                           float *sum, int32_t *b_init)
{
    (void)b_init;
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q += LANES) {
        const softmax_lanes w = lanes_at(x, q, base_of(top + q));
        f_store(sum + q, softmax_lanes_floats(&w, x->keys, p_of(p, p_stride, q, sizeof(float))));
    }
}

static void softmax_pairs(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                          float *sum, int32_t *b_init)
{
    (void)b_init;
    for (int64_t q = 0; q < x->panels * SPARGE_PANEL; q += LANES) {
        const softmax_lanes w = lanes_at(x, q, base_of(top + q));
        f_store(sum + q, softmax_lanes_pairs(&w, x->keys, p_of(p, p_stride, q, sizeof(uint16_t))));
    }
}

static void sum_codes(const sparge_scores *x, const float *top, int64_t together, int32_t *codes)
{
    for (int64_t q = 0; q < SPARGE_PANEL; q += LANES) {
        const softmax_lanes w = lanes_at(x, q, f_load(top + q));
        sum_codes_lanes(&w, x->keys, together, codes + q);
    }
}

static void softmax_kernels(sparge_kernels *k)
{
    k->sum_codes = sum_codes;
    k->maxima = maxima;
    k->softmax[SPARGE_BYTES] = softmax_bytes;
    k->softmax[SPARGE_WORDS] = softmax_words;
    k->softmax[SPARGE_FLOATS] = softmax_floats;
    k->softmax[SPARGE_PAIRS] = softmax_pairs;
}

#endif
