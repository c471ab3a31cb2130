/* SPDX-License-Identifier: Apache-2.0 */
/* bench_onednn.c: dense f32 attention out of oneDNN's matrix product: a baseline that is not ours,
 * and a second opinion on its result. FlashAttention in tiles as large as a GEMM likes them;
 * softmax is left to the compiler. */
#include <math.h>
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdlib.h>
#include <string.h>

#include "tools/bench.h"

enum { ROWS = 256, KEYS = 512 };

/* 2^x for x <= 0 by a polynomial that a compiler makes vectors of; 3e-7 of relative error is plenty
 * here.
 */
static inline float power_of_two(float x)
{
    const float inside = x < -126.0f ? -126.0f : x, shifted = inside + 12582912.0f,
                f = inside - (shifted - 12582912.0f);
    uint32_t exponent;
    memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent + 127u) << 23;
    float power;
    memcpy(&power, &exponent, sizeof power);
    return power * (1.0f + f * (0.69314718f +
                                f * (0.24022651f +
                                     f * (0.05550332f + f * (0.00961843f + f * 0.00133977f)))));
}

#if defined(__x86_64__)
__attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#endif
static void
softmax(float *s, int64_t rows, int64_t keys, float scale, float *max, float *sum, float *o,
        int64_t dim_v)
{
    for (int64_t r = 0; r < rows; r++) {
        float *row = s + r * keys, lane[16], top = max[r], total = 0.0f;
        for (int n = 0; n < 16; n++)
            lane[n] = -INFINITY;
        int64_t t = 0;
        for (; t + 16 <= keys; t += 16)
            for (int n = 0; n < 16; n++)
                lane[n] = row[t + n] > lane[n] ? row[t + n] : lane[n];
        for (; t < keys; t++)
            lane[0] = row[t] > lane[0] ? row[t] : lane[0];
        for (int n = 0; n < 16; n++)
            top = fmaxf(top, scale * lane[n]);
        const float shrink = power_of_two(max[r] - top);
        memset(lane, 0, sizeof lane);
        for (t = 0; t + 16 <= keys; t += 16)
            for (int n = 0; n < 16; n++)
                lane[n] += row[t + n] = power_of_two(scale * row[t + n] - top);
        for (; t < keys; t++)
            lane[0] += row[t] = power_of_two(scale * row[t] - top);
        for (int n = 0; n < 16; n++)
            total += lane[n];
        sum[r] = sum[r] * shrink + total;
        max[r] = top;
        for (int64_t c = 0; c < dim_v; c++)
            o[r * dim_v + c] *= shrink;
    }
}

static bool attend_rows(const sparge_problem *p, float scale, int64_t head, int64_t first, float *s,
                        float *o)
{
    const int64_t kv = head / (p->heads / p->kv_heads),
                  rows = p->q_len - first < ROWS ? p->q_len - first : ROWS;
    const float *q = (const float *)p->q.data + head * p->q.head + first * p->q.token;
    const float *k = (const float *)p->k.data + kv * p->k.head,
                *v = (const float *)p->v.data + kv * p->v.head;
    float max[ROWS], sum[ROWS] = {0};
    bool fine = true;
    for (int64_t r = 0; r < rows; r++)
        max[r] = -INFINITY;
    memset(o, 0, (size_t)(rows * p->dim_v) * sizeof *o);
    for (int64_t t = 0; t < p->k_len; t += KEYS) {
        const int64_t keys = p->k_len - t < KEYS ? p->k_len - t : KEYS;
        fine &= dnnl_sgemm('N', 'T', rows, keys, p->dim, 1.0f, q, p->q.token, k + t * p->k.token,
                           p->k.token, 0.0f, s, keys) == dnnl_success;
        softmax(s, rows, keys, scale, max, sum, o, p->dim_v);
        fine &= dnnl_sgemm('N', 'N', rows, p->dim_v, keys, 1.0f, s, keys, v + t * p->v.token,
                           p->v.token, 1.0f, o, p->dim_v) == dnnl_success;
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < p->dim_v; c++)
            o[r * p->dim_v + c] /= sum[r];
    return fine;
}

bool bench_onednn_can(const bench_group *g)
{
    const sparge_problem *p = &g->in->problem;
    return g->options.causal == SPARGE_CAUSAL_NONE && g->options.softmax_scale == 0.0f &&
           p->batch == 1 && p->q.dtype == SPARGE_F32 && p->k.dtype == SPARGE_F32 &&
           p->v.dtype == SPARGE_F32;
}

bool bench_onednn(const sparge_problem *p, int threads, float *o)
{
    const float scale = 1.4426950408889634f / sqrtf((float)p->dim);
    const int64_t tiles = (p->q_len + ROWS - 1) / ROWS;
    float *s = malloc((size_t)threads * ROWS * KEYS * sizeof *s);
    if (!s)
        return false;
    bool fine = true;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(&& : fine)
    for (int64_t n = 0; n < p->heads * tiles; n++) {
        const int64_t head = n / tiles, first = n % tiles * ROWS;
        float *mine = s + (int64_t)omp_get_thread_num() * ROWS * KEYS;
        omp_set_num_threads(1); /* of a product inside */
        fine = progress_goes_on(NULL, 0.0) &&
               attend_rows(p, scale, head, first, mine, o + (head * p->q_len + first) * p->dim_v) &&
               fine;
    }
    free(s);
    return fine;
}
