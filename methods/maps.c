/* SPDX-License-Identifier: Apache-2.0 */
/* maps.c: how much queries pay to keys. */
#include <math.h>
#include <string.h>

#include "methods/method.h"

/* In 16 sums, which become vectors. */
float sparge_method_dot(const float *a, const float *b, int64_t dim)
{
    float part[16] = {0}, sum = 0.0f;
    int64_t c = 0;
    for (; c + 16 <= dim; c += 16)
        for (int n = 0; n < 16; n++)
            part[n] += a[c + n] * b[c + n];
    for (int n = 0; n < 16; n++)
        sum += part[n];
    for (; c < dim; c++)
        sum += a[c] * b[c];
    return sum == sum ? sum : 0.0f; /* infinities that cancel out */
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

void sparge_method_softmax(float *s, int64_t n)
{
    float top = -INFINITY;
    double sum = 0.0;
    for (int64_t t = 0; t < n; t++) {
        s[t] = fmaxf(-FLT_MAX, fminf(s[t], FLT_MAX));
        top = fmaxf(top, s[t]);
    }
    for (int64_t t = 0; t < n; t++)
        sum += (double)(s[t] = sparge_exp2((s[t] - top) * SPARGE_LOG2E));
    for (int64_t t = 0; t < n; t++)
        s[t] = (float)((double)s[t] / sum);
}

void sparge_method_row(const sparge_head *head, int64_t t, float *p)
{
    const int64_t dim = head->problem->dim, visible = sparge_keys_of_query(&head->g, t);
    memset(p, 0, (size_t)head->g.k_len * sizeof *p);
    for (int64_t key = 0; key < visible; key++)
        p[key] = head->scale * sparge_method_dot(head->q + t * dim, head->k + key * dim, dim);
    sparge_method_softmax(p, visible);
    *head->multiply_adds += (double)visible * (double)dim;
}

void sparge_method_add_blocks(const sparge_head *head, const float *p, double *mass)
{
    for (int64_t key = 0; key < head->g.k_len; key++)
        mass[key / head->g.block_k] += (double)p[key];
}
