/* SPDX-License-Identifier: Apache-2.0 */
/* softmax.h: softmax of a tile in vectors, written once: the largest score of each row, and P from
 * S. An instruction set's file includes it after products.h and after it has said
 *
 *     f_max(a, b)                   the larger; b where a or b is a NaN
 *     f_flush(x, p)                 p, or 0 where x is below SPARGE_EXP2_LOWEST
 *     f_most(x)                     the largest lane
 *     f_nan(x, y)                   x, or NaN in lanes where y is one
 *     f_any_nan(x)                  is there a NaN in a lane?
 *     i_exponent(x)                 n where an exponent stands, for x = n + SPARGE_EXP2_ROUNDER
 *     i_of(x)                       truncated; of a NaN, the most negative one
 *     i_sum(x)                      the sum of all lanes
 *     store_bytes, store_words      (to, x, vectors): ints as uint8 and int16, negative ones as 0;
 *                                   returns their sums
 *     sum_of(x)                     sparge_sum_of, of 16 lanes */
#ifndef SPARGE_CPU_SOFTMAX_H
#define SPARGE_CPU_SOFTMAX_H

#include "cpu/plain.h"

/* The larger of both; NaN where one is NaN, if `nans` may come. */
INLINE floats f_larger(floats a, floats b, bool nans)
{
    const floats larger = f_max(b, a);
    return nans ? f_nan(larger, b) : larger;
}

/* So many vectors go side by side through a polynomial, as many as two units need to be busy while
 * each waits for itself: a step takes 4 cycles. */
enum { BESIDE = 8, PARTIALS = SPARGE_PANEL / (int)LANES };

INLINE bool maxima_of(const sparge_scores *x, bool nans, float *top, float *local)
{
    bool above = true;
    for (int64_t r = 0; r < x->rows; r++) {
        const float *s = x->s + r * x->stride;
        floats most[PARTIALS];
        for (int n = 0; n < PARTIALS; n++)
            most[n] = f_all(-INFINITY);
        for (int64_t t = 0; t < x->keys; t += SPARGE_PANEL)
            for (int n = 0; n < PARTIALS; n++)
                most[n] = f_larger(most[n], f_load(s + t + n * LANES), nans);
        for (int n = 1; n < PARTIALS; n++)
            most[0] = f_larger(most[0], most[n], nans);
        top[r] = nans && f_any_nan(most[0]) ? NAN : f_most(most[0]);
        local[r] = sparge_row_local(top[r], x->scale);
        above &= local[r] > -INFINITY;
    }
    return above;
}

static bool maxima(const sparge_scores *x, float *top, float *local)
{
    return x->nans ? maxima_of(x, true, top, local) : maxima_of(x, false, top, local);
}

/* One row of P on its way. */
typedef struct probabilities {
    const float *s;
    floats scale, top; /* top of codes: the largest s; of floats: the running maximum */
    void *p;
    ints codes;             /* the sum so far, in lanes */
    floats total[PARTIALS]; /* the same of FLOATS */
} probabilities;

/* sparge_exp2, but for the flush to 0 below SPARGE_EXP2_LOWEST, where p is 2^-126. */
INLINE void exp2_of(const floats x[BESIDE], int vectors, floats p[BESIDE])
{
    static const float coefficient[] = {SPARGE_EXP2_C4, SPARGE_EXP2_C3, SPARGE_EXP2_C2,
                                        SPARGE_EXP2_C1, 1.0f};
    const floats rounder = f_all(SPARGE_EXP2_ROUNDER), lowest = f_all(SPARGE_EXP2_LOWEST);
    floats f[BESIDE];
    ints power[BESIDE];
    for (int n = 0; n < vectors; n++) {
        const floats inside = f_max(lowest, x[n]), shifted = inside + rounder;
        power[n] = i_exponent(shifted);
        f[n] = inside - (shifted - rounder);
    }
    for (int n = 0; n < vectors; n++)
        p[n] = f_fma(f_all(SPARGE_EXP2_C6), f[n], f_all(SPARGE_EXP2_C5));
    for (size_t e = 0; e < sizeof coefficient / sizeof *coefficient; e++)
        for (int n = 0; n < vectors; n++)
            p[n] = f_fma(p[n], f[n], f_all(coefficient[e]));
    for (int n = 0; n < vectors; n++)
        p[n] = (floats)i_add((ints)p[n], power[n]); /* a NaN stays one */
}

/* sparge_weight_code */
INLINE void codes_of(const probabilities *w, int64_t t, int vectors, float qmax, ints code[BESIDE])
{
    floats x[BESIDE], p[BESIDE];
    for (int n = 0; n < vectors; n++)
        x[n] = w->scale * (f_load(w->s + t + n * LANES) - w->top);
    exp2_of(x, vectors, p);
    for (int n = 0; n < vectors; n++)
        code[n] = i_of(f_fma(f_all(qmax), p[n], f_all(0.5f)));
}

INLINE void some_bytes(probabilities *w, int64_t t, int vectors)
{
    ints code[BESIDE];
    codes_of(w, t, vectors, (float)sparge_pv_qmax(SPARGE_INT8), code);
    w->codes = i_add(w->codes, store_bytes((uint8_t *)w->p + t, code, vectors));
}

INLINE void some_words(probabilities *w, int64_t t, int vectors)
{
    ints code[BESIDE];
    codes_of(w, t, vectors, (float)sparge_pv_qmax(SPARGE_INT12), code);
    w->codes = i_add(w->codes, store_words((int16_t *)w->p + t, code, vectors));
}

/* sparge_weight */
INLINE void some_floats(probabilities *w, int64_t t, int vectors)
{
    floats x[BESIDE], p[BESIDE];
    for (int n = 0; n < vectors; n++)
        x[n] = w->scale * f_load(w->s + t + n * LANES) - w->top;
    exp2_of(x, vectors, p);
    for (int n = 0; n < vectors; n++) {
        p[n] = f_flush(x[n], p[n]);
        f_store((float *)w->p + t + n * LANES, p[n]);
        w->total[n % PARTIALS] += p[n];
    }
}

INLINE probabilities softmax_row(const sparge_scores *x, int64_t r, float top, void *p,
                                 void (*some)(probabilities *, int64_t t, int vectors))
{
    probabilities w = {.s = x->s + r * x->stride,
                       .scale = f_all(x->scale),
                       .top = f_all(top),
                       .p = p,
                       .codes = {0}};
    for (int n = 0; n < PARTIALS; n++)
        w.total[n] = f_all(0.0f);
    if (x->keys == BESIDE * LANES) { /* a usual tile: without a loop around it gcc spills less */
        some(&w, 0, BESIDE);
        return w;
    }
    int64_t t = 0;
    for (; t + BESIDE * LANES <= x->keys; t += BESIDE * LANES)
        some(&w, t, BESIDE);
    for (; t < x->keys; t += SPARGE_PANEL)
        some(&w, t, PARTIALS);
    return w;
}

static void softmax_bytes(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                          float *sum, int32_t *init)
{
    (void)init;
    for (int64_t r = 0; r < x->rows; r++)
        sum[r] =
            (float)i_sum(softmax_row(x, r, top[r], (uint8_t *)p + r * p_stride, some_bytes).codes);
}

static void softmax_words(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                          float *sum, int32_t *init)
{
    for (int64_t r = 0; r < x->rows; r++) {
        int16_t *row = (int16_t *)p + r * p_stride;
        sum[r] = (float)i_sum(softmax_row(x, r, top[r], row, some_words).codes);
        init[r] = words_init(row, x->keys);
    }
}

static void softmax_floats(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                           float *sum, int32_t *init)
{
    (void)init;
    for (int64_t r = 0; r < x->rows; r++) {
        float *const row = (float *)p + r * p_stride;
        const probabilities w = softmax_row(x, r, sparge_row_base(top[r]), row, some_floats);
        sum[r] = sum_of(w.total);
    }
}

static void softmax_kernels(sparge_kernels *k)
{
    k->maxima = maxima;
    k->softmax[SPARGE_BYTES] = softmax_bytes;
    k->softmax[SPARGE_WORDS] = softmax_words;
    k->softmax[SPARGE_FLOATS] = softmax_floats;
}

#endif
