/* SPDX-License-Identifier: Apache-2.0 */
/* biformer.c: the routing of BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv
 * 2303.08810; github.com/rayleizhu/BiFormer at 1697bbb.
 *
 * A feature map is cut into regions, `regions` on a side. The mean query of a region, of all heads
 * as one long row, is multiplied by the mean keys. The queries of a region attend to the tokens of
 * the `topk` regions with the largest products, in every head the same. The paper's term of values
 * under a convolution is trained and left out.
 *
 * Where regions do not divide the map, a side of a region is rounded down, as in the newer of the
 * authors' two forms (ops/bra_nchw.py): there are more regions, and those at the edges are smaller.
 * The tokens that the code pads them with get attention there, and are not there here.
 *
 * Ours: a frame is a map, and a region is routed to regions of all frames. Text attends to all, and
 * all attend to it; it stands behind the video. Query heads that share keys have those means each.
 * Of equal regions the earlier comes first. multiply_adds leaves out the ranking. */
#include "methods/entries.h"
#include "methods/method.h"

enum { TOPK, REGIONS };

/* The regions one after the other, in the order of their tokens. */
typedef struct routing {
    int64_t h, w, count;    /* of a region; of all */
    int64_t *order, *first; /* first[count]: of the text */
    float *product;         /* [batch][count][count] */
    sparge_piece *memory;
} routing;

static bool cut(const sparge_problem *p, const sparge_grid *grid, int64_t side, routing *x)
{
    const int64_t h = x->h = sparge_max(1, grid->h / side),
                  w = x->w = sparge_max(1, grid->w / side),
                  n = x->count =
                      grid->t * sparge_ceil_div(grid->h, h) * sparge_ceil_div(grid->w, w);
    x->order = sparge_take(&x->memory, p->k_len + 1, sizeof *x->order);
    x->first = sparge_take(&x->memory, n + 1, sizeof *x->first);
    x->product = sparge_take(&x->memory, p->batch * n * n + 1, sizeof *x->product);
    if (!x->order || !x->first || !x->product)
        return false;
    int64_t *last = x->first;
    sparge_order_frames(grid, h, w, x->order);
    for (int64_t t = 0; t < grid->t; t++)
        for (int64_t a = 0; a < grid->h; a += h)
            for (int64_t b = 0; b < grid->w; b += w, last++)
                last[1] = last[0] + sparge_min(h, grid->h - a) * sparge_min(w, grid->w - b);
    return true;
}

/* Means of the regions. */
static void pool(const routing *x, const float *rows, int64_t dim, float *mean)
{
    for (int64_t n = 0; n < x->count; n++) {
        const int64_t from = x->first[n], some = x->first[n + 1] - from;
        sparge_method_pool(rows + from * dim, some, dim, some, false, mean + n * dim);
    }
}

/* The products of the means of all heads. */
static bool multiply(sparge_plan *plan, routing *x)
{
    const sparge_problem *p = &plan->problem;
    const int64_t dim = p->dim, len = p->k_len, n = x->count;
    const float *q = sparge_load_heads(&p->q, p->batch, p->heads, len, dim, &x->memory);
    const float *k = sparge_load_heads(&p->k, p->batch, p->kv_heads, len, dim, &x->memory);
    float *rows = sparge_take(&x->memory, len * dim + 1, sizeof *rows);
    float *q_mean = sparge_take(&x->memory, n * dim + 1, sizeof *q_mean);
    float *k_mean = sparge_take(&x->memory, n * dim + 1, sizeof *k_mean);
    const bool made = q && k && rows && q_mean && k_mean;
    for (int64_t head = 0; made && head < p->batch * p->heads; head++) {
        float *to = x->product + head / p->heads * n * n;
        sparge_order_rows(q + head * len * dim, x->order, len, dim, rows);
        pool(x, rows, dim, q_mean);
        sparge_order_rows(k + head / (p->heads / p->kv_heads) * len * dim, x->order, len, dim,
                          rows);
        pool(x, rows, dim, k_mean);
        for (int64_t e = 0; e < n * n; e++)
            to[e] += sparge_method_dot(q_mean + e / n * dim, k_mean + e % n * dim, dim);
        plan->multiply_adds += (double)(2 * len + n * n) * (double)dim;
    }
    return made;
}

static sparge_status keep_regions(const sparge_head *head, sparge_error *error)
{
    const sparge_geometry *g = &head->g;
    const routing *x = head->shared;
    const int64_t n = x->count, count = sparge_min(n, (int64_t)head->param[TOPK]);
    const float *product = x->product + head->b * n * n;
    sparge_ranked *best = sparge_take(head->scratch, n + 1, sizeof *best);
    const sparge_pairs pairs = sparge_pairs_make(head);
    sparge_status status = best && pairs.bits ? SPARGE_OK : SPARGE_ERR_MEMORY;
    sparge_order_tokens(head, x->order);
    for (int64_t i = 0, at = 0, of = -1; i < g->q_blocks && !status; i++) {
        sparge_pairs_clear(head, &pairs);
        for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++, at++) {
            if (of < n && at == x->first[of + 1]) { /* the next region, or text */
                of++;
                for (int64_t j = 0; j < n && of < n; j++)
                    best[j] = (sparge_ranked){product[of * n + j], j};
                sparge_rank_best(best, n, count);
            }
            sparge_pairs_range(head, &pairs, r, of < n ? x->first[n] : 0, g->k_len);
            for (int64_t e = 0; e < count && of < n; e++)
                sparge_pairs_range(head, &pairs, r, x->first[best[e].at], x->first[best[e].at + 1]);
        }
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}

static sparge_status route(sparge_plan *plan, const sparge_context *context, const double *param,
                           routing *x, sparge_error *error)
{
    if (!cut(&plan->problem, context->grid, (int64_t)param[REGIONS], x) || !multiply(plan, x))
        return SPARGE_ERR_MEMORY;
    const int64_t block = x->h <= SPARGE_MAX_BLOCK / x->w ? x->h * x->w : SPARGE_MAX_BLOCK;
    sparge_add_blocks(plan, block, block);
    sparge_status status = sparge_own_tokens(plan);
    if (!status)
        status = sparge_each_head(plan, context, param,
                                  &(sparge_walk){.visit = keep_regions, .shared = x}, error);
    return status;
}

static sparge_status plan_biformer(sparge_plan *plan, const sparge_context *context,
                                   const double *param, sparge_error *error)
{
    routing x = {0};
    const sparge_status status = route(plan, context, param, &x, error);
    sparge_release(&x.memory);
    return status;
}

const sparge_method sparge_method_biformer = {
    .name = "biformer",
    .title = "BiFormer's regions of a frame",
    .paper = "arXiv 2303.08810",
    .repository = "github.com/rayleizhu/BiFormer",
    .commit = "1697bbb",
    .kind = "trained with it, runs without",
    .evidence = "590032 of 590032 regions",
    .needs = SPARGE_NEEDS_GRID | SPARGE_NEEDS_NOT_CAUSAL,
    .param = {{"topk", 1.0, 0x1p24, 4.0, true, "regions that a region attends to"},
              {"regions", 1.0, 0x1p24, 7.0, true, "regions on a side of a frame"}},
    .plan = plan_biformer,
};
