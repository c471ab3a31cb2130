/* block.c: what is done to one block of tokens: load, mean, pool, self-similarity, int8 codes.
 * Sec 3.3 (pooling and CosSim), Algorithm 1 line 3 (quantization, as SageAttention does it). */
#include "ref/ref.h"

#include "common/half.h"

static float element(const sparge_in *in, int64_t at)
{
    switch (in->dtype) {
    case SPARGE_F16: return sparge_f16_to_f32(((const uint16_t *)in->data)[at]);
    case SPARGE_BF16: return sparge_bf16_to_f32(((const uint16_t *)in->data)[at]);
    default: return ((const float *)in->data)[at];
    }
}

void sparge_ref_load(const sparge_in *in, int64_t batch, int64_t head, int64_t first, int64_t rows,
                     int64_t dim, const float *mean, float *x, bool *bad)
{
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = batch * in->batch + head * in->head + (first + r) * in->token;
        for (int64_t c = 0; c < dim; c++) {
            const float value = element(in, at + c), smooth = mean ? value - mean[c] : value;
            const bool finite = sparge_finite(smooth);
            x[r * dim + c] = finite ? smooth : 0.0f;
            bad[r * dim + c] = !finite;
        }
    }
}

void sparge_ref_mean(const sparge_in *k, int64_t batch, int64_t head, const sparge_geometry *g,
                     int64_t dim, float *x, bool *bad, float *mean)
{
    double total[SPARGE_MAX_DIM] = {0};
    for (int64_t j = 0; j < g->k_blocks; j++) {
        const int64_t rows = sparge_block_rows(g->k_len, g->block_k, j);
        sparge_ref_load(k, batch, head, j * g->block_k, rows, dim, NULL, x, bad);
        for (int64_t c = 0; c < dim; c++) {
            float sum = 0.0f;
            for (int64_t r = 0; r < rows; r++)
                sum += x[r * dim + c];
            total[c] += (double)sum;
        }
    }
    for (int64_t c = 0; c < dim; c++)
        mean[c] = g->k_len ? (float)(total[c] / (double)g->k_len) : 0.0f;
}

sparge_ref_summary sparge_ref_summarize(const float *x, const bool *bad, int64_t rows,
                                        int64_t block, int64_t dim, float *pool, float *unit)
{
    sparge_ref_summary s = {.finite = true, .full = rows == block};
    for (int64_t c = 0; c < dim; c++)
        pool[c] = unit[c] = 0.0f;
    for (int64_t r = 0; r < rows; r++) {
        const float *row = &x[r * dim];
        const float square = sparge_dot(row, row, dim);
        const float inverse = square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
        s.zero_row |= !(square > 0.0f);
        for (int64_t c = 0; c < dim; c++) {
            s.finite &= !bad[r * dim + c];
            pool[c] += row[c];
            unit[c] = fmaf(row[c], inverse, unit[c]);
        }
    }
    const float n = (float)rows;
    for (int64_t c = 0; c < dim; c++)
        pool[c] /= n;
    /* The mean of all n * n cosines is the squared length of the sum of unit rows over n * n: the
     * Gram matrix is never needed. */
    s.sim = fminf(1.0f, sparge_dot(unit, unit, dim) / (n * n));
    return s;
}

float sparge_ref_quantize(const float *x, int64_t n, int64_t stride, int qmax, float slack,
                          int16_t *code)
{
    float max = 0.0f;
    for (int64_t e = 0; e < n; e++)
        max = fmaxf(max, fabsf(x[e * stride]));
    float step = max / (float)qmax + slack;
    if (step < FLT_MIN)
        step = 0.0f;
    for (int64_t e = 0; e < n; e++) {
        const int32_t rounded = step > 0.0f ? sparge_round(x[e * stride] / step) : 0;
        code[e * stride] = (int16_t)sparge_max(-qmax, sparge_min(qmax, rounded));
    }
    return step;
}
