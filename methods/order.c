/* SPDX-License-Identifier: Apache-2.0 */
/* order.c: orders that bring tokens together which belong together, and keys in such an order. */
#include <string.h>

#include "common/element.h"
#include "methods/method.h"

void sparge_order_patches(const sparge_grid *grid, int64_t t, int64_t h, int64_t w, int64_t *index)
{
    const int64_t before = grid->text_before, tokens = grid->t * grid->h * grid->w;
    int64_t *place = index;
    for (int64_t n = 0; n < before; n++)
        *place++ = n;
    for (int64_t t0 = 0; t0 < grid->t; t0 += t)
        for (int64_t h0 = 0; h0 < grid->h; h0 += h)
            for (int64_t w0 = 0; w0 < grid->w; w0 += w)
                for (int64_t a = t0; a < sparge_min(t0 + t, grid->t); a++)
                    for (int64_t b = h0; b < sparge_min(h0 + h, grid->h); b++)
                        for (int64_t c = w0; c < sparge_min(w0 + w, grid->w); c++)
                            *place++ = before + (a * grid->h + b) * grid->w + c;
    for (int64_t n = 0; n < grid->text_after; n++)
        *place++ = before + tokens + n;
}

void sparge_order_frames(const sparge_grid *grid, int64_t h, int64_t w, int64_t *index)
{
    const sparge_grid video = {grid->t, grid->h, grid->w, 0, 0};
    const int64_t before = grid->text_before, tokens = grid->t * grid->h * grid->w;
    sparge_order_patches(&video, 1, h, w, index);
    for (int64_t n = 0; n < tokens; n++)
        index[n] += before;
    for (int64_t n = 0; n < before + grid->text_after; n++)
        index[tokens + n] = n < before ? n : tokens + n;
}

sparge_status sparge_order_grid(const sparge_head *head, sparge_order order, int64_t **index,
                                int64_t **place, sparge_error *error)
{
    const int64_t tokens = head->g.k_len;
    *index = sparge_take(head->scratch, tokens + 1, sizeof **index);
    *place = sparge_take(head->scratch, tokens + 1, sizeof **place);
    if (!*index || !*place)
        return SPARGE_ERR_MEMORY;
    const sparge_status status = sparge_token_order(order, head->context->grid, 0, *index, error);
    for (int64_t at = 0; at < tokens && !status; at++)
        (*place)[(*index)[at]] = at;
    return status;
}

void sparge_order_residues(int64_t len, int64_t stride, int64_t *index)
{
    for (int64_t r = 0; r < stride; r++)
        for (int64_t t = r; t < len; t += stride)
            *index++ = t;
}

/* ---- A tree of halves ---- */

typedef struct tree {
    const float *x;
    int64_t dim, block;
    double *sum, *apart, *weight; /* [dim] */
    double multiply_adds;
} tree;

/* How far rows lie apart in each channel: the sum of squares about their mean. */
static void spread(tree *t, const float *x, const sparge_ranked *row, int64_t n)
{
    memset(t->sum, 0, (size_t)t->dim * sizeof *t->sum);
    memset(t->apart, 0, (size_t)t->dim * sizeof *t->apart);
    for (int64_t e = 0; e < n; e++) {
        const float *from = x + row[e].at * t->dim;
        for (int64_t c = 0; c < t->dim; c++) {
            t->sum[c] += (double)from[c];
            t->apart[c] += (double)from[c] * (double)from[c];
        }
    }
    for (int64_t c = 0; c < t->dim; c++)
        t->apart[c] -= t->sum[c] * t->sum[c] / (double)n;
    t->multiply_adds += (double)n * (double)t->dim;
}

/* The largest power of two below n, or the multiple of a block next to its middle. */
static int64_t cut_of(int64_t n, int64_t block)
{
    int64_t cut = n > block ? (sparge_ceil_div(n, block) + 1) / 2 * block : 1;
    while (n <= block && 2 * cut < n)
        cut *= 2;
    return cut;
}

static void halve(tree *t, sparge_ranked *row, int64_t n)
{
    if (n < 2)
        return;
    const int64_t cut = cut_of(n, t->block);
    int64_t widest = 0;
    spread(t, t->x, row, n);
    for (int64_t c = 1; c < t->dim; c++)
        if (t->apart[c] * t->weight[c] > t->apart[widest] * t->weight[widest])
            widest = c;
    for (int64_t e = 0; e < n; e++)
        row[e].score = t->x[row[e].at * t->dim + widest];
    sparge_rank_best(row, n, cut);
    halve(t, row, cut);
    halve(t, row + cut, n - cut);
}

sparge_status sparge_order_tree(const float *x, int64_t len, const float *y, int64_t y_len,
                                int64_t dim, int64_t block, int64_t *index, double *multiply_adds)
{
    sparge_piece *memory = NULL;
    sparge_ranked *row = sparge_take(&memory, sparge_max(len, y_len) + 1, sizeof *row);
    double *sums = sparge_take(&memory, 3 * dim, sizeof *sums);
    if (!row || !sums) {
        sparge_release(&memory);
        return SPARGE_ERR_MEMORY;
    }
    tree t = {x, dim, block, sums, sums + 2 * dim, sums + dim, *multiply_adds};
    for (int64_t e = 0; e < sparge_max(len, y_len); e++)
        row[e].at = e;
    spread(&t, y, row, y_len);
    t.weight = t.apart;
    t.apart = sums + dim;
    halve(&t, row, len);
    for (int64_t e = 0; e < len; e++)
        index[e] = row[e].at;
    *multiply_adds = t.multiply_adds;
    sparge_release(&memory);
    return SPARGE_OK;
}

sparge_status sparge_order_segments(const float *score, int64_t len, int64_t segment,
                                    int64_t *index)
{
    sparge_piece *memory = NULL;
    sparge_ranked *x = sparge_take(&memory, segment + 1, sizeof *x);
    if (!x)
        return SPARGE_ERR_MEMORY;
    for (int64_t first = 0; first < len; first += segment) {
        const int64_t some = sparge_block_rows(len, segment, first / segment);
        for (int64_t n = 0; n < some; n++)
            x[n] = (sparge_ranked){score[first + n], first + n};
        if (some == segment)
            sparge_rank(x, some);
        for (int64_t n = 0; n < some; n++)
            index[first + n] = x[n].at;
    }
    sparge_release(&memory);
    return SPARGE_OK;
}

/* ---- Tensors in an order ---- */

void sparge_order_rows(const float *x, const int64_t *order, int64_t len, int64_t dim, float *to)
{
    for (int64_t at = 0; at < len; at++)
        memcpy(to + at * dim, x + order[at] * dim, (size_t)dim * sizeof *to);
}

void sparge_copy_rows(const sparge_head *head, const sparge_in *from, int64_t h,
                      const int64_t *order, int64_t len, int64_t dim, const sparge_in *to)
{
    float *row = (float *)(uintptr_t)to->data + sparge_in_row(to, head->b, head->h, 0);
    for (int64_t at = 0; at < len; at++)
        for (int64_t c = 0; c < dim; c++)
            *row++ = sparge_element_load(from->data, from->dtype,
                                         sparge_in_row(from, head->b, h, order[at]) + c);
}

sparge_status sparge_own_keys(sparge_plan *plan)
{
    const sparge_problem *p = &plan->problem;
    const int64_t keys = p->batch * p->heads * p->k_len;
    sparge_part *part = &plan->part[plan->parts - 1];
    part->problem.kv_heads = p->heads;
    part->problem.k = sparge_plan_array(plan, p->heads, p->k_len, p->dim);
    if (p->v.data) /* which choosing does not need */
        part->problem.v = sparge_plan_array(plan, p->heads, p->k_len, p->dim_v);
    part->place = sparge_take(&plan->memory, keys + 1, sizeof *part->place);
    if (p->k_bias)
        part->problem.k_bias = sparge_take(&plan->memory, keys + 1, sizeof(float));
    const bool made = part->problem.k.data && part->place && (!p->v.data || part->problem.v.data) &&
                      (!p->k_bias || part->problem.k_bias);
    return made ? SPARGE_OK : SPARGE_ERR_MEMORY;
}

sparge_status sparge_own_queries(sparge_plan *plan)
{
    const sparge_problem *p = &plan->problem;
    sparge_part *part = &plan->part[plan->parts - 1];
    plan->q_order =
        sparge_take(&plan->memory, p->batch * p->heads * p->q_len + 1, sizeof *plan->q_order);
    part->problem.q = sparge_plan_array(plan, p->heads, p->q_len, p->dim);
    return plan->q_order && part->problem.q.data ? SPARGE_OK : SPARGE_ERR_MEMORY;
}

sparge_status sparge_own_tokens(sparge_plan *plan)
{
    const sparge_status status = sparge_own_keys(plan);
    return status ? status : sparge_own_queries(plan);
}

void sparge_order_queries(const sparge_head *head, const int64_t *order)
{
    const sparge_problem *p = head->problem;
    int64_t *to = (int64_t *)(uintptr_t)head->plan->q_order + head->n * p->q_len;
    memcpy(to, order, (size_t)p->q_len * sizeof *to);
    sparge_copy_rows(head, &p->q, head->h, order, p->q_len, p->dim, &head->part->problem.q);
}

void sparge_order_keys(const sparge_head *head, const int64_t *order)
{
    const sparge_problem *p = head->problem, *own = &head->part->problem;
    int64_t *place = (int64_t *)(uintptr_t)head->part->place + head->n * p->k_len;
    float *bias = (float *)(uintptr_t)own->k_bias;
    const int64_t h = head->h / (p->heads / p->kv_heads);
    sparge_copy_rows(head, &p->k, h, order, p->k_len, p->dim, &own->k);
    if (p->v.data)
        sparge_copy_rows(head, &p->v, h, order, p->k_len, p->dim_v, &own->v);
    for (int64_t at = 0; at < p->k_len; at++) {
        place[order[at]] = at;
        if (bias)
            bias[head->n * p->k_len + at] = p->k_bias[head->kv * p->k_len + order[at]];
    }
}

void sparge_order_tokens(const sparge_head *head, const int64_t *order)
{
    sparge_order_queries(head, order);
    sparge_order_keys(head, order);
}
