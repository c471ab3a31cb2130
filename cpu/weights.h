/* weights.h: softmax of a tile in vectors, written once: the largest score of each row, and P from
 * S. An instruction set's file includes it after products.h and after it has said
 *
 *     f_add, f_sub, f_max             the last gives b where a or b is a NaN
 *     i_power(x)                      n, where an exponent stands, for x = n + 1.5 * 2^23
 *     f_scale(p, i)                   p * 2^n for such an i; a NaN stays one
 *     f_flush(x, p)                   p, or 0 where x < -126
 *     f_most(x)                       the largest lane
 *     f_nan(x, y)                     x, or NaN in lanes where y is one
 *     f_any_nan(x)                    is there a NaN in a lane?
 *     i_zero, i_add, i_sum(x)         of ints; the sum of all lanes
 *     i_of(x)                         truncated; of a NaN, the most negative one
 *     store_bytes, store_words        (to, x, vectors): ints as uint8 and int16, negative ones as
 * 0; returns their sums sum_of(x)                       sparge_sum_of, of 16 lanes */
#ifndef SPARGE_CPU_WEIGHTS_H
#define SPARGE_CPU_WEIGHTS_H

#include "cpu/stages.h"

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
        local[r] = sparge_row_local(top[r], x->c);
        above &= local[r] > -INFINITY;
    }
    return above;
}

static bool maxima(const sparge_scores *x, float *top, float *local)
{
    return x->nans ? maxima_of(x, true, top, local) : maxima_of(x, false, top, local);
}

/* One row of P on its way. */
typedef struct weighing {
    const float *s;
    floats c, top; /* of codes the largest s; of floats the running maximum */
    void *p;
    ints codes;             /* the sum so far, in lanes */
    floats total[PARTIALS]; /* the same of FLOATS */
} weighing;

/* sparge_exp2 of x <= 0, but for the flush to 0 below -126, where p is 2^-126. */
INLINE void powers(const floats x[BESIDE], int vectors, floats p[BESIDE])
{
    static const float coefficient[] = {0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f,
                                        0x1.62e43p-1f, 1.0f};
    const floats magic = f_all(12582912.0f), lowest = f_all(-126.0f);
    floats f[BESIDE];
    ints power[BESIDE];
    for (int n = 0; n < vectors; n++) {
        const floats inside = f_max(lowest, x[n]), shifted = f_add(inside, magic);
        power[n] = i_power(shifted);
        f[n] = f_sub(inside, f_sub(shifted, magic));
    }
    for (int n = 0; n < vectors; n++)
        p[n] = f_fma(f_all(0x1.41fbbcp-13f), f[n], f_all(0x1.5f3e52p-10f));
    for (size_t e = 0; e < sizeof coefficient / sizeof *coefficient; e++)
        for (int n = 0; n < vectors; n++)
            p[n] = f_fma(p[n], f[n], f_all(coefficient[e]));
    for (int n = 0; n < vectors; n++)
        p[n] = f_scale(p[n], power[n]);
}

/* sparge_weight_code */
INLINE void codes_of(const weighing *w, int64_t t, int vectors, float qmax, ints code[BESIDE])
{
    floats x[BESIDE], p[BESIDE];
    for (int n = 0; n < vectors; n++)
        x[n] = f_mul(w->c, f_sub(f_load(w->s + t + n * LANES), w->top));
    powers(x, vectors, p);
    for (int n = 0; n < vectors; n++)
        code[n] = i_of(f_fma(f_all(qmax), p[n], f_all(0.5f)));
}

INLINE void weigh_some_bytes(weighing *w, int64_t t, int vectors)
{
    ints code[BESIDE];
    codes_of(w, t, vectors, 127.0f, code);
    w->codes = i_add(w->codes, store_bytes((uint8_t *)w->p + t, code, vectors));
}

INLINE void weigh_some_words(weighing *w, int64_t t, int vectors)
{
    ints code[BESIDE];
    codes_of(w, t, vectors, 4095.0f, code);
    w->codes = i_add(w->codes, store_words((int16_t *)w->p + t, code, vectors));
}

/* sparge_weight */
INLINE void weigh_some_floats(weighing *w, int64_t t, int vectors)
{
    floats x[BESIDE], p[BESIDE];
    for (int n = 0; n < vectors; n++)
        x[n] = f_sub(f_mul(w->c, f_load(w->s + t + n * LANES)), w->top);
    powers(x, vectors, p);
    for (int n = 0; n < vectors; n++) {
        p[n] = f_flush(x[n], p[n]);
        f_store((float *)w->p + t + n * LANES, p[n]);
        w->total[n % PARTIALS] = f_add(w->total[n % PARTIALS], p[n]);
    }
}

INLINE weighing weigh_row(const sparge_scores *x, int64_t r, float top, void *p,
                          void (*some)(weighing *, int64_t t, int vectors))
{
    weighing w = {
        .s = x->s + r * x->stride, .c = f_all(x->c), .top = f_all(top), .p = p, .codes = i_zero()};
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

static void weigh_bytes(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                        float *sum, int32_t *start)
{
    (void)start;
    for (int64_t r = 0; r < x->rows; r++)
        sum[r] = (float)i_sum(
            weigh_row(x, r, top[r], (uint8_t *)p + r * p_stride, weigh_some_bytes).codes);
}

static void weigh_words(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                        float *sum, int32_t *start)
{
    for (int64_t r = 0; r < x->rows; r++) {
        int16_t *row = (int16_t *)p + r * p_stride;
        sum[r] = (float)i_sum(weigh_row(x, r, top[r], row, weigh_some_words).codes);
        start[r] = words_start(row, x->keys);
    }
}

static void weigh_floats(const sparge_scores *x, const float *top, void *p, int64_t p_stride,
                         float *sum, int32_t *start)
{
    (void)start;
    for (int64_t r = 0; r < x->rows; r++) {
        float *const row = (float *)p + r * p_stride;
        const weighing w = weigh_row(x, r, sparge_row_base(top[r]), row, weigh_some_floats);
        sum[r] = sum_of(w.total);
    }
}

static void weights(sparge_kernels *k)
{
    k->maxima = maxima;
    k->weigh[SPARGE_BYTES] = weigh_bytes;
    k->weigh[SPARGE_WORDS] = weigh_words;
    k->weigh[SPARGE_FLOATS] = weigh_floats;
}

#endif
