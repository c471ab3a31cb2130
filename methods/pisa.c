/* SPDX-License-Identifier: Apache-2.0 */
/* pisa.c: PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers (arXiv
 * 2602.01077), github.com/xie-lab-ml/piecewise-sparse-attention, commit 8604494, in order 0:
 * without the one matrix that corrects o for all pooled blocks (order 1).
 *
 * A row keeps floor(density * blocks) key blocks, at least one, and attends to them exactly. Each
 * of the others is one key, its mean, and one value, its mean, that count for the block's n keys:
 * ln n is added to their score. The best blocks are those with the largest score of mean query and
 * mean key plus, with `norm`, the log of how keys and values vary together: ln(1e-5 + Frobenius
 * norm of the sum of (k - mean k) v^T over the block). As released: the function has that off and
 * the FLUX pipeline, whose density is the default here, on.
 *
 * As in the authors' code nothing is forced, and a short last block has its own n and means. Our
 * reading:
 * - the score is ranked itself, not its softmax, in which small ones are equal; of equals the lower
 *   block comes first; every query head chooses for itself;
 * - a caller's k_bias weighs the keys of a pooled block, which are n if there is none;
 * - a key or value that is not finite makes what it is pooled in NaN, as attention does.
 * Masks are nested in density. multiply_adds has means as one a number, and leaves ranking out. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "common/element.h"
#include "methods/entries.h"
#include "methods/method.h"

enum { DENSITY, BLOCK, NORM };

/* ---- Which blocks are exact ---- */

/* The Frobenius norm of how the keys and values of block j vary together; h: [dim][dim_v]. */
static double covariance(const sparge_head *head, int64_t j, const float *mean, float *h)
{
    const int64_t dim = head->problem->dim, dim_v = head->problem->dim_v, block = head->g.block_k;
    double square = 0.0;
    memset(h, 0, (size_t)(dim * dim_v) * sizeof *h);
    for (int64_t t = j * block; t < sparge_min((j + 1) * block, head->g.k_len); t++)
        for (int64_t c = 0; c < dim; c++) {
            const float k = head->k[t * dim + c] - mean[c], *v = head->v + t * dim_v;
            for (int64_t d = 0; d < dim_v; d++)
                h[c * dim_v + d] += k * v[d];
        }
    for (int64_t e = 0; e < dim * dim_v; e++)
        square += (double)h[e] * (double)h[e];
    *head->multiply_adds +=
        (double)sparge_block_rows(head->g.k_len, block, j) * (double)(dim * dim_v);
    return sqrt(square);
}

static sparge_status keep_pisa(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim;
    float *q = sparge_take(head->scratch, g->q_blocks * dim + 1, sizeof *q),
          *k = sparge_take(head->scratch, g->k_blocks * dim + 1, sizeof *k),
          *h = sparge_take(head->scratch, dim * head->problem->dim_v, sizeof *h),
          *bias = sparge_take(head->scratch, g->k_blocks + 1, sizeof *bias);
    sparge_ranked *x = sparge_take(head->scratch, g->k_blocks + 1, sizeof *x);
    if (!q || !k || !h || !bias || !x)
        return SPARGE_ERR_MEMORY;
    sparge_method_pool(head->q, g->q_len, dim, g->block_q, false, q);
    sparge_method_pool(head->k, g->k_len, dim, g->block_k, false, k);
    for (int64_t j = 0; j < g->k_blocks && head->param[NORM] != 0.0; j++)
        bias[j] = (float)log(covariance(head, j, k + j * dim, h) + 1e-5);
    for (int64_t i = 0; i < g->q_blocks; i++) {
        for (int64_t j = 0; j < g->k_blocks; j++)
            x[j] = (sparge_ranked){
                head->scale * sparge_method_dot(q + i * dim, k + j * dim, dim) + bias[j], j};
        sparge_rank(x, g->k_blocks);
        const double share = floor(head->param[DENSITY] * (double)g->k_blocks);
        for (int64_t e = 0; e < g->k_blocks && (e == 0 || (double)e < share); e++)
            sparge_keep(head, i, x[e].at);
    }
    *head->multiply_adds += (double)dim * (double)(g->q_len + g->k_len + g->q_blocks * g->k_blocks);
    return SPARGE_OK;
}

/* ---- The others ---- */

/* Mean rows of a block by these weights, which sum to `total`. A weight of 0 hides its token. */
static void pool_rows(const sparge_in *in, int64_t b, int64_t h, int64_t first, int64_t rows,
                      int64_t dim, const double *weight, double total, float *to)
{
    for (int64_t c = 0; c < dim && total != 0.0; c++) {
        double sum = 0.0;
        for (int64_t r = 0; r < rows; r++)
            if (weight[r] != 0.0)
                sum += weight[r] * (double)sparge_element_load(
                                       in->data, in->dtype, sparge_in_row(in, b, h, first + r) + c);
        to[c] = (float)(sum / total);
    }
}

/* Fills the part's keys and values, what they count for and where the caller's keys are pooled. */
static void pool(const sparge_problem *p, int64_t block, sparge_problem *to, int64_t *place)
{
    float *k = (float *)(uintptr_t)to->k.data, *v = (float *)(uintptr_t)to->v.data,
          *bias = (float *)(uintptr_t)to->k_bias;
    for (int64_t n = 0; n < p->batch * p->kv_heads; n++)
        for (int64_t j = 0; j < to->k_len; j++) {
            const int64_t first = j * block, rows = sparge_block_rows(p->k_len, block, j),
                          b = n / p->kv_heads, h = n % p->kv_heads, at = n * to->k_len + j;
            const float *b_k = p->k_bias ? p->k_bias + n * p->k_len + first : NULL;
            double weight[SPARGE_MAX_BLOCK], total = 0.0, top = b_k ? -FLT_MAX : 0.0;
            for (int64_t r = 0; r < rows && b_k; r++) /* the largest weighs 1, or all might be 0 */
                top = fmax(top, (double)b_k[r]);
            for (int64_t r = 0; r < rows; r++) {
                place[n * p->k_len + first + r] = j;
                weight[r] = b_k ? exp((double)b_k[r] - top) : 1.0;
                total += weight[r];
            }
            pool_rows(&p->k, b, h, first, rows, p->dim, weight, total, k + at * p->dim);
            pool_rows(&p->v, b, h, first, rows, p->dim_v, weight, total, v + at * p->dim_v);
            bias[at] = (float)(log(total) + top);
        }
}

/* The blocks that the exact part lacks. */
static sparge_status mask_others(const sparge_part *exact, sparge_part *rest, uint32_t *row,
                                 sparge_error *error)
{
    const sparge_mask *m = &exact->mask;
    const int64_t words = sparge_mask_row_words(rest->problem.k_len);
    sparge_status status = sparge_part_mask(rest, error);
    for (int64_t line = 0; line < m->batch * m->heads * m->q_blocks && !status; line++) {
        const int64_t i = line % m->q_blocks, n = line / m->q_blocks;
        memset(row, 0, (size_t)words * sizeof *row);
        for (int64_t j = 0; j < rest->problem.k_len; j++)
            if (!sparge_mask_get(m, n / m->heads, n % m->heads, i, j))
                sparge_mask_row_set(row, j);
        for (int64_t r = 1; r < rest->options.block_q; r++)
            memcpy(row + r * words, row, (size_t)words * sizeof *row);
        status = sparge_mask_set_row(&rest->mask, &rest->problem, &rest->options, n / m->heads,
                                     n % m->heads, i, row, error);
    }
    return status;
}

static sparge_status plan_pisa0(sparge_plan *plan, const sparge_context *context,
                                const double *param, sparge_error *error)
{
    const sparge_problem *problem = &plan->problem;
    const int64_t block = (int64_t)param[BLOCK], blocks = sparge_ceil_div(problem->k_len, block);
    sparge_status status = sparge_each_head(
        plan, context, param,
        &(sparge_walk){.block_q = block, .block_k = block, .needs_v = true, .visit = keep_pisa},
        error);
    if (status)
        return status;
    sparge_part *rest = sparge_plan_add(plan);
    sparge_problem *p = &rest->problem;
    int64_t *place = sparge_take(
        &plan->memory, problem->batch * problem->kv_heads * problem->k_len + 1, sizeof *place);
    uint32_t *row =
        sparge_take(&plan->memory, block * sparge_mask_row_words(blocks) + 1, sizeof *row);
    p->k = sparge_plan_array(plan, problem->kv_heads, blocks, problem->dim);
    p->v = sparge_plan_array(plan, problem->kv_heads, blocks, problem->dim_v);
    p->k_bias = sparge_plan_array(plan, problem->kv_heads, blocks, 1).data;
    if (!place || !row || !p->k.data || !p->v.data || !p->k_bias)
        return SPARGE_ERR_MEMORY;
    p->k_len = blocks;
    pool(problem, block, p, place);
    plan->multiply_adds += (double)problem->batch * (double)problem->kv_heads *
                           (double)problem->k_len * (double)problem->dim_v;
    rest->place = place;
    rest->pooled = true;
    rest->options.block_q = block;
    rest->options.qk_dtype = rest->options.pv_dtype = SPARGE_F32;
    rest->options.smooth_k = false;
    return mask_others(&plan->part[0], rest, row, error);
}

const sparge_method sparge_method_pisa0 = {
    .name = "pisa0",
    .title = "PISA in order 0: other blocks as one key each",
    .paper = "arXiv 2602.01077",
    .repository = "github.com/xie-lab-ml/piecewise-sparse-attention",
    .commit = "8604494",
    .kind = "training-free",
    .evidence = "79240 of 79240 blocks",
    .needs = SPARGE_NEEDS_NOT_CAUSAL,
    .param = {{"density", 0.0, 1.0, 0.15, false, "share of the key blocks that are exact"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 64.0, true, "tokens of a block"},
              {"norm", 0.0, 1.0, 1.0, true, "rank blocks also by how their keys and values vary"}},
    .plan = plan_pisa0,
};
