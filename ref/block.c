/* SPDX-License-Identifier: Apache-2.0 */
/* block.c: a block: load, mean, pool, self-similarity (Sec 3.3), codes (line 3, SageAttention) */
#include "common/element.h"
#include "common/quant.h"
#include "common/select.h"
#include "ref/ref.h"

static void set(float *x, bool *nonfinite, float value)
{
    *nonfinite = !sparge_finite(value);
    *x = *nonfinite ? 0.0f : value;
}

void sparge_ref_load(const sparge_in *in, int64_t batch, int64_t head, int64_t first, int64_t rows,
                     int64_t dim, float *x, bool *nonfinite)
{
    for (int64_t e = 0; e < rows * dim; e++) {
        const int64_t at = sparge_in_row(in, batch, head, first + e / dim) + e % dim;
        set(&x[e], &nonfinite[e], sparge_element_load(in->data, in->dtype, at));
    }
}

void sparge_ref_mean(const float *k, const sparge_geometry *g, int64_t dim, float *mean)
{
    for (int64_t c = 0; c < dim; c++) {
        double total = 0.0;
        for (int64_t j = 0; j < g->k_blocks; j++) {
            float sum = 0.0f;
            for (int64_t r = 0; r < sparge_block_rows(g->k_len, g->block_k, j); r++)
                sum += k[(j * g->block_k + r) * dim + c];
            total += (double)sum;
        }
        mean[c] = sparge_mean(total, g->k_len);
    }
}

void sparge_ref_subtract_mean(float *x, bool *nonfinite, int64_t rows, int64_t dim,
                              const float *mean)
{
    for (int64_t e = 0; e < rows * dim; e++)
        if (!nonfinite[e])
            set(&x[e], &nonfinite[e], x[e] - mean[e % dim]);
}

sparge_ref_summary sparge_ref_summarize(const float *x, const bool *nonfinite, int64_t rows,
                                        int64_t block, int64_t dim, float *pool, float *unit_sum)
{
    sparge_ref_summary s = {.finite = true, .full = rows == block};
    for (int64_t c = 0; c < dim; c++)
        pool[c] = unit_sum[c] = 0.0f;
    for (int64_t r = 0; r < rows; r++) {
        const float *row = &x[r * dim], square = sparge_dot(row, row, dim);
        const float to_unit = sparge_unit_factor(square);
        s.zero_row |= !(square > 0.0f);
        for (int64_t c = 0; c < dim; c++) {
            s.finite &= !nonfinite[r * dim + c];
            pool[c] += row[c];
            unit_sum[c] = fmaf(row[c], to_unit, unit_sum[c]);
        }
    }
    for (int64_t c = 0; c < dim; c++)
        pool[c] /= (float)rows;
    s.sim = sparge_mean_cosine(sparge_dot(unit_sum, unit_sum, dim), rows);
    return s;
}

float sparge_ref_quantize(const float *x, int64_t n, int64_t stride, int qmax, float slack,
                          int16_t *code)
{
    float max = 0.0f;
    for (int64_t e = 0; e < n; e++)
        max = fmaxf(max, fabsf(x[e * stride]));
    const float scale = sparge_quant_scale(max, qmax) + slack;
    for (int64_t e = 0; e < n; e++)
        code[e * stride] = (int16_t)sparge_quant_code(x[e * stride], scale, qmax);
    return scale;
}
