/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/ref/scene.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

verdict judge_block(const float *x, const double *mean, int64_t rows, int64_t dim, float theta,
                    double *pool, double *sim)
{
    double *unit = malloc((size_t)(rows * dim) * sizeof *unit), sum = 0;
    bool clean = true;
    memset(pool, 0, (size_t)dim * sizeof *pool);
    for (int64_t r = 0; r < rows; r++) {
        double square = 0;
        for (int64_t c = 0; c < dim; c++) {
            const double value = (double)x[r * dim + c];
            clean = clean && isfinite(value);
            unit[r * dim + c] = isfinite(value) ? value - (mean ? mean[c] : 0) : 0;
            square += unit[r * dim + c] * unit[r * dim + c];
            pool[c] += unit[r * dim + c] / (double)rows;
        }
        for (int64_t c = 0; square > 0 && c < dim; c++)
            unit[r * dim + c] /= sqrt(square);
    }
    for (int64_t a = 0; a < rows; a++)
        for (int64_t b = 0; b < rows; b++)
            for (int64_t c = 0; c < dim; c++)
                sum += unit[a * dim + c] * unit[b * dim + c];
    free(unit);
    *sim = fmin(1, sum / ((double)rows * (double)rows));
    if (!clean || theta >= 1)
        return DROP;
    if (theta >= 0 && fabs(*sim - (double)theta) <= near_threshold)
        return OPEN;
    return *sim > (double)theta ? KEEP : DROP;
}

bool sees(const scene *s, int64_t t, int64_t key)
{
    const int64_t shift = s->o.causal == SPARGE_CAUSAL_END ? s->p.k_len - s->p.q_len : 0;
    return s->o.causal == SPARGE_CAUSAL_NONE || key <= t + shift;
}

void open_beside(const double *score, const int64_t *order, int64_t count, int64_t cut, double near,
                 verdict *row)
{
    for (int64_t before = 0; before < cut; before++)
        for (int64_t after = cut; after < count; after++) {
            const double a = score[order[before]], b = score[order[after]];
            if (a != b && fabs(a - b) <= near + near_threshold * fabs(a))
                row[order[before]] = row[order[after]] = OPEN;
        }
}

/* Tokens that drift slowly, so that most blocks agree with themselves; here and there a block of
 * noise, a block that repeats the one before (ties), a zero row, and where asked for something not
 * finite. */
static tensor tokens_of(int64_t batch, int64_t heads, int64_t len, int64_t dim, int64_t block,
                        float offset, bool nonfinite)
{
    tensor x = tensor_make(batch, heads, len, dim, (sparge_dtype)check_int(0, 2),
                           (tensor_layout)check_int(0, LAYOUTS - 1));
    const float noise = check_uniform(0, 1), odd[] = {NAN, INFINITY, -INFINITY};
    for (int64_t h = 0; h < batch * heads; h++) {
        float *head = x.x + h * len * dim;
        const float speed = check_uniform(0.2f, 1.5f) / (float)block;
        for (int64_t first = 0; first < len; first += block) {
            const int64_t kind = check_int(0, 11), end = least(len, first + block);
            for (int64_t t = first; t < end; t++)
                for (int64_t c = 0; c < dim; c++) {
                    const float wave =
                        1.5f * sinf((float)t * speed * (float)(c % 5 + 1) + (float)c);
                    head[t * dim + c] = offset * cosf((float)(3 * c)) +
                                        (kind ? wave + noise * check_normal() : check_normal());
                }
            if (kind == 1 && first > 0 && end - first == block)
                memcpy(head + first * dim, head + (first - block) * dim,
                       (size_t)(block * dim) * sizeof *head);
            if (kind == 2)
                memset(head + check_int(first, end - 1) * dim, 0, (size_t)dim * sizeof *head);
        }
    }
    for (int64_t n = nonfinite && len ? check_int(0, 2) : 0; n > 0; n--)
        x.x[check_int(0, tensor_count(&x) - 1)] = odd[check_int(0, 2)];
    tensor_write(&x);
    return x;
}

float one_of(const float *list, int64_t count) { return list[check_int(0, count - 1)]; }

sparge_thresholds some_thresholds(void)
{
    const float theta[] = {-1, -0.5f, 0.03f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f, 0.7f, 0.8f, 0.9f, 1};
    const float tau[] = {SPARGE_OFF, 0, 0.2f, 0.5f, 0.7f, 0.9f, 0.95f, 0.98f, 1};
    const float topk[] = {SPARGE_OFF, SPARGE_OFF, 0, 0.1f, 0.25f, 0.5f, 0.7f, 1};
    sparge_thresholds thresholds = {one_of(theta, COUNT(theta)), one_of(tau, COUNT(tau)),
                                    one_of(topk, COUNT(topk)), -INFINITY, 0};
    if (thresholds.tau == SPARGE_OFF && thresholds.topk == SPARGE_OFF)
        thresholds.tau = 0.9f;
    return thresholds;
}

scene some_scene(void)
{
    static const struct {
        int64_t q, k;
    } block[] = {
        {16, 8}, {128, 64}, {8, 16},  {64, 64}, {64, 128},
        {7, 5},  {1, 1},    {33, 17}, {1, 64},  {13, 1},
    };
    static const int64_t dims[] = {1,  2,  3,  7,  15,  16,  17,  31, 32,
                                   48, 64, 80, 96, 127, 128, 192, 256};
    scene s = {.o = sparge_options_default(SPARGE_RULES_DEFAULT)};
    const int64_t size = check_int(0, COUNT(block) - 1);
    s.o.backend = SPARGE_REF;
    s.o.block_q = block[size].q;
    s.o.block_k = block[size].k;
    s.p.batch = check_int(1, 2);
    s.p.kv_heads = check_int(1, 2);
    s.p.heads = s.p.kv_heads * check_int(1, check_int(1, 4));
    s.p.q_len = check_int(0, 12) ? check_int(1, 4 * s.o.block_q) : check_int(0, 1);
    s.p.k_len = check_int(0, 12) ? check_int(1, (s.o.block_k > 16 ? 10 : 40) * s.o.block_k)
                                 : check_int(0, 1);
    if (check_int(0, 3) == 0)
        s.p.k_len = s.p.q_len;
    s.p.dim = dims[check_int(0, COUNT(dims) - 1)];
    const int64_t gram =
        s.p.batch * s.p.heads * (s.p.q_len * s.o.block_q + s.p.k_len * s.o.block_k);
    while (s.p.dim > 1 && gram * s.p.dim > 8000000) /* what the Gram matrices cost */
        s.p.dim /= 2;
    s.o.causal = (sparge_causal)check_int(0, 2);
    s.o.smooth_k = check_int(0, 2) > 0;
    s.o.sink = check_int(0, 4) == 0;
    s.o.softmax_scale = (check_int(0, 1) ? 1.0f : check_uniform(0.05f, 1)) / sqrtf((float)s.p.dim);
    s.o.thresholds = some_thresholds();
    for (int64_t h = 0; h < s.p.heads; h++)
        s.per_head[h] = some_thresholds();
    const bool nonfinite = check_int(0, 5) == 0;
    s.q = tokens_of(s.p.batch, s.p.heads, s.p.q_len, s.p.dim, s.o.block_q, 0, nonfinite);
    s.k = tokens_of(s.p.batch, s.p.kv_heads, s.p.k_len, s.p.dim, s.o.block_k,
                    check_int(0, 2) ? check_uniform(0, 4) : 0, nonfinite);
    s.p.q = s.q.in;
    s.p.k = s.k.in;
    return s;
}

void discard(scene *s)
{
    tensor_free(&s->q);
    tensor_free(&s->k);
}

void worst(const char *what, int64_t b, int64_t h, const float *got, const double *want, int64_t n,
           double bound, double *most)
{
    for (int64_t e = 0; e < n; e++) {
        const double value = (double)got[e];
        const double off = value == want[e] ? 0 : fabs(value - want[e]) / fmax(1, fabs(want[e]));
        check(off <= bound, "%s of batch %lld, head %lld, element %lld is %.9g, should be %.9g",
              what, (long long)b, (long long)h, (long long)e, value, want[e]);
        *most = fmax(*most, off);
    }
}
