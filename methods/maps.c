/* SPDX-License-Identifier: Apache-2.0 */
/* maps.c: how much queries pay to keys. */
#include <math.h>
#include <string.h>

#include "methods/method.h"

/* ---- Longer vectors, where the processor has them: the same bits, since no loop here has another
 * order by them, and a product and a sum are one only where fmaf says so. ---- */

#define ALWAYS static inline __attribute__((always_inline))
#ifdef __x86_64__
#define VECTORS(name, parameters, arguments)                                                   \
    static void name##_plain parameters { name arguments; }                                    \
    __attribute__((target("avx2,fma"))) static void name##_avx2 parameters { name arguments; } \
    __attribute__((target("avx512f,avx512dq,fma"))) static void name##_avx512 parameters       \
    {                                                                                          \
        name arguments;                                                                        \
    }                                                                                          \
    static void name##_best parameters                                                         \
    {                                                                                          \
        if (__builtin_cpu_supports("avx512dq"))                                                \
            name##_avx512 arguments;                                                           \
        else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))              \
            name##_avx2 arguments;                                                             \
        else                                                                                   \
            name##_plain arguments;                                                            \
    }
#else
#define VECTORS(name, parameters, arguments) \
    static void name##_best parameters { name arguments; }
#endif

/* ---- Products: in 16 sums over channels, which are added in order at the end. Here a sum has a
 * vector, of 16 rows side by side, so that the bits are the same however long vectors are. ---- */

enum { SUMS = 16, TOGETHER = 4 };

float sparge_method_dot(const float *a, const float *b, int64_t dim)
{
    float part[SUMS] = {0}, sum = 0.0f;
    int64_t c = 0;
    for (; c + SUMS <= dim; c += SUMS)
        for (int n = 0; n < SUMS; n++)
            part[n] += a[c + n] * b[c + n];
    for (int n = 0; n < SUMS; n++)
        sum += part[n];
    for (; c < dim; c++)
        sum += a[c] * b[c];
    return sum == sum ? sum : 0.0f; /* infinities that cancel out */
}

/* Where a channel stands in a panel: those of one sum beside each other. */
static int64_t place_of(int64_t c, int64_t dim)
{
    const int64_t terms = dim / SUMS;
    return c < terms * SUMS ? c % SUMS * terms + c / SUMS : c;
}

sparge_panels sparge_method_panels(const float *x, int64_t rows, int64_t dim, sparge_piece **memory)
{
    const int64_t panels = sparge_ceil_div(rows, SPARGE_LANES);
    float *to = sparge_take(memory, panels * SPARGE_LANES * dim + 1, sizeof *to);
    for (int64_t c = 0; c < dim && to; c++) {
        float *channel = to + place_of(c, dim) * SPARGE_LANES;
        for (int64_t r = 0; r < rows; r++)
            channel[r / SPARGE_LANES * dim * SPARGE_LANES + r % SPARGE_LANES] = x[r * dim + c];
    }
    return (sparge_panels){to, dim};
}

/* A channel of the rows of a panel, which stand anywhere. */
typedef float lanes __attribute__((vector_size(SPARGE_LANES * sizeof(float)), aligned(4)));

/* Of four vectors, that stand behind each other, with the rows of one panel. */
ALWAYS void multiply_panel(const float *q, const lanes *panel, int64_t dim, lanes *product)
{
    const int64_t terms = dim / SUMS;
    const float *q1 = q + dim, *q2 = q1 + dim, *q3 = q2 + dim;
    lanes sum = {0}, sum1 = {0}, sum2 = {0}, sum3 = {0};
    for (int64_t n = 0; n < SUMS; n++) {
        lanes a = {0}, b = {0}, c = {0}, d = {0};
        for (int64_t e = 0; e < terms; e++) {
            const lanes x = panel[n * terms + e];
            a += q[e * SUMS + n] * x;
            b += q1[e * SUMS + n] * x;
            c += q2[e * SUMS + n] * x;
            d += q3[e * SUMS + n] * x;
        }
        sum += a;
        sum1 += b;
        sum2 += c;
        sum3 += d;
    }
    for (int64_t c = terms * SUMS; c < dim; c++) {
        sum += q[c] * panel[c];
        sum1 += q1[c] * panel[c];
        sum2 += q2[c] * panel[c];
        sum3 += q3[c] * panel[c];
    }
    product[0] = sum;
    product[1] = sum1;
    product[2] = sum2;
    product[3] = sum3;
}

/* Of one vector, four sums at a time. */
ALWAYS void multiply_alone(const float *q, const lanes *panel, int64_t dim, lanes *product)
{
    const int64_t terms = dim / SUMS;
    lanes sum = {0};
    for (int64_t n = 0; n < SUMS; n += 4) {
        const lanes *x = panel + n * terms;
        lanes a = {0}, b = {0}, c = {0}, d = {0};
        for (int64_t e = 0; e < terms; e++) {
            a += q[e * SUMS + n] * x[e];
            b += q[e * SUMS + n + 1] * x[terms + e];
            c += q[e * SUMS + n + 2] * x[2 * terms + e];
            d += q[e * SUMS + n + 3] * x[3 * terms + e];
        }
        sum = sum + a + b + c + d;
    }
    for (int64_t c = terms * SUMS; c < dim; c++)
        sum += q[c] * panel[c];
    *product = sum;
}

ALWAYS void multiply(const sparge_panels *rows, const float *q, int64_t queries, float scale,
                     int64_t n, float *s)
{
    for (int64_t t = 0; t < queries; t += TOGETHER)
        for (int64_t first = 0; first < n; first += SPARGE_LANES) {
            const lanes *panel = (const lanes *)(rows->x + first * rows->dim);
            const int64_t some = sparge_min(SPARGE_LANES, n - first),
                          together = sparge_min(TOGETHER, queries - t);
            lanes product[TOGETHER];
            if (together == TOGETHER)
                multiply_panel(q + t * rows->dim, panel, rows->dim, product);
            for (int64_t e = 0; e < together; e++) {
                if (together < TOGETHER)
                    multiply_alone(q + (t + e) * rows->dim, panel, rows->dim, &product[e]);
                for (int64_t r = 0; r < some; r++) {
                    const float x = product[e][r];
                    s[(t + e) * n + first + r] = scale * (x == x ? x : 0.0f);
                }
            }
        }
}

VECTORS(multiply,
        (const sparge_panels *rows, const float *q, int64_t queries, float scale, int64_t n,
         float *s),
        (rows, q, queries, scale, n, s))

void sparge_method_products(const sparge_panels *rows, const float *q, int64_t queries, float scale,
                            int64_t n, float *s)
{
    multiply_best(rows, q, queries, scale, n, s);
}

void sparge_method_scores(const sparge_panels *rows, const float *q, float scale, int64_t n,
                          float *s)
{
    multiply_best(rows, q, 1, scale, n, s);
}

void sparge_method_pool(const float *x, int64_t rows, int64_t dim, int64_t block, bool padded,
                        float *mean)
{
    for (int64_t n = 0; n * block < rows; n++) {
        const int64_t some = sparge_block_rows(rows, block, n);
        float *to = mean + n * dim;
        memset(to, 0, (size_t)dim * sizeof *to);
        for (int64_t r = 0; r < some; r++)
            for (int64_t c = 0; c < dim; c++)
                to[c] += x[(n * block + r) * dim + c];
        for (int64_t c = 0; c < dim; c++)
            to[c] /= (float)(padded ? block : some);
    }
}

ALWAYS void normalise(float *s, int64_t n)
{
    float top[SPARGE_LANES], most = -FLT_MAX;
    double sum[SPARGE_LANES] = {0.0}, all = 0.0;
    for (int r = 0; r < SPARGE_LANES; r++)
        top[r] = most;
    for (int64_t first = 0; first < n; first += SPARGE_LANES)
        for (int64_t r = 0; r < sparge_min(SPARGE_LANES, n - first); r++) {
            const float x = s[first + r] < FLT_MAX ? s[first + r] : FLT_MAX;
            s[first + r] = x > -FLT_MAX ? x : -FLT_MAX;
            top[r] = s[first + r] > top[r] ? s[first + r] : top[r];
        }
    for (int r = 0; r < SPARGE_LANES; r++)
        most = fmaxf(most, top[r]);
    for (int64_t first = 0; first < n; first += SPARGE_LANES)
        for (int64_t r = 0; r < sparge_min(SPARGE_LANES, n - first); r++) {
            s[first + r] = sparge_exp2((s[first + r] - most) * SPARGE_LOG2E);
            sum[r] += (double)s[first + r];
        }
    for (int r = 0; r < SPARGE_LANES; r++)
        all += sum[r];
    for (int64_t t = 0; t < n; t++)
        s[t] = (float)((double)s[t] / all);
}

VECTORS(normalise, (float *s, int64_t n), (s, n))

void sparge_method_softmax(float *s, int64_t n) { normalise_best(s, n); }

void sparge_method_row(const sparge_head *head, int64_t t, float *p)
{
    const int64_t dim = head->problem->dim, visible = sparge_keys_of_query(&head->g, t);
    memset(p, 0, (size_t)head->g.k_len * sizeof *p);
    sparge_method_scores(&head->keys, head->q + t * dim, head->scale, visible, p);
    sparge_method_softmax(p, visible);
    *head->multiply_adds += (double)visible * (double)dim;
}

void sparge_method_output(const sparge_head *head, const float *s, const int64_t *order,
                          const uint32_t *places, float *p, double *o)
{
    const int64_t keys = head->g.k_len, dim_v = head->problem->dim_v;
    for (int64_t at = 0; at < keys; at++) {
        const int64_t key = order ? order[at] : at;
        p[key] = !places || places[at >> 5] >> (at & 31) & 1u ? s[key] : -INFINITY;
    }
    sparge_method_softmax(p, keys);
    memset(o, 0, (size_t)dim_v * sizeof *o);
    for (int64_t key = 0; key < keys; key++)
        for (int64_t c = 0; c < dim_v && p[key] > 0.0f; c++)
            o[c] += (double)p[key] * (double)head->v[key * dim_v + c];
    *head->multiply_adds += (double)keys * (double)dim_v;
}

void sparge_method_pooled_row(const sparge_head *head, const float *q_mean, const float *k_mean,
                              int64_t blocks, float *p)
{
    const int64_t dim = head->problem->dim;
    for (int64_t j = 0; j < blocks; j++)
        p[j] = head->scale * sparge_method_dot(q_mean, k_mean + j * dim, dim);
    sparge_method_softmax(p, blocks);
    *head->multiply_adds += (double)blocks * (double)dim;
}

void sparge_method_add_blocks(const sparge_head *head, const float *p, double *mass)
{
    const sparge_geometry *g = &head->g;
    for (int64_t j = 0; j < g->k_blocks; j++) {
        double sum[4] = {0.0}; /* or each addition would wait for the last */
        for (int64_t r = 0; r < sparge_block_rows(g->k_len, g->block_k, j); r++)
            sum[r & 3] += (double)p[j * g->block_k + r];
        mass[j] += sum[0] + sum[1] + sum[2] + sum[3];
    }
}
