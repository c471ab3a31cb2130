/* SPDX-License-Identifier: Apache-2.0 */
/* merge.c: attention over disjoint sets of keys together. */
#include "api/api.h"

#include <math.h>
#include <stdlib.h>

#include "common/element.h"

/* The weight of each part for one row; returns the lse of all. */
static float weigh(const sparge_partial *part, int parts, int64_t row, float *weight)
{
    float top = -INFINITY, sum = 0.0f;
    for (int n = 0; n < parts; n++) {
        weight[n] = part[n].lse[row] + part[n].log_count;
        top = weight[n] > top || isnan(weight[n]) ? weight[n] : top; /* a NaN stays */
    }
    if (top == -INFINITY) {
        for (int n = 0; n < parts; n++)
            weight[n] = 0.0f;
        return -INFINITY;
    }
    for (int n = 0; n < parts; n++)
        sum += weight[n] =
            weight[n] == -INFINITY ? 0.0f : sparge_exp2((weight[n] - top) * SPARGE_LOG2E);
    for (int n = 0; n < parts; n++)
        weight[n] /= sum;
    return (float)((double)top + log((double)sum));
}

static void merge_row(const sparge_problem *p, const sparge_partial *part, int parts, int64_t row,
                      const sparge_out *o, float *lse, float *weight)
{
    const int64_t t = row % p->q_len, h = row / p->q_len % p->heads, b = row / p->q_len / p->heads;
    const float all = weigh(part, parts, row, weight);
    const int64_t to = sparge_out_row(o, b, h, t);
    for (int64_t c = 0; c < p->dim_v; c++) {
        float sum = isnan(all) ? NAN : 0.0f;
        for (int n = 0; n < parts; n++) {
            const sparge_in *from = &part[n].o;
            if (part[n].lse[row] != -INFINITY)
                sum = fmaf(
                    weight[n],
                    sparge_element_load(from->data, from->dtype, sparge_in_row(from, b, h, t) + c),
                    sum);
        }
        sparge_element_store(o->data, o->dtype, to + c, sum);
    }
    if (lse)
        lse[row] = all;
}

sparge_status sparge_merge(const sparge_problem *problem, const sparge_partial *part, int parts,
                           const sparge_out *o, float *lse, sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    if (!problem || !part || !o)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL",
                           !problem ? "problem"
                           : !part  ? "part"
                                    : "o");
    if (parts < 1)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "parts is %d, it must be at least 1", parts);
    if (problem->batch < 0 || problem->heads < 1 || problem->q_len < 0 || problem->dim_v < 1)
        return sparge_fail(
            error, SPARGE_ERR_ARGUMENT,
            "batch %lld, heads %lld, q_len %lld and dim_v %lld must be at least 0, 1, "
            "0 and 1",
            (long long)problem->batch, (long long)problem->heads, (long long)problem->q_len,
            (long long)problem->dim_v);
    if (!sparge_fits(sparge_max(1, problem->batch), problem->heads, sparge_max(1, problem->q_len),
                     problem->dim_v, 8))
        return sparge_fail(error, SPARGE_ERR_SHAPE,
                           "batch %lld x heads %lld x tokens %lld x channels %lld overflows",
                           (long long)problem->batch, (long long)problem->heads,
                           (long long)problem->q_len, (long long)problem->dim_v);
    sparge_status status = sparge_check_result(problem, &(sparge_result){.o = *o}, error);
    for (int n = 0; n < parts && !status; n++)
        status = sparge_check_part(problem, &part[n], n, error);
    if (status)
        return status;
    float *weight = malloc((size_t)parts * sizeof *weight);
    if (!weight)
        return sparge_fail(error, SPARGE_ERR_MEMORY, "out of memory");
    for (int64_t row = 0; row < problem->batch * problem->heads * problem->q_len; row++)
        merge_row(problem, part, parts, row, o, lse, weight);
    free(weight);
    return sparge_succeed(error);
}
