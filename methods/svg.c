/* SPDX-License-Identifier: Apache-2.0 */
/* svg.c: Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity,
 * arXiv 2502.01776; github.com/svg-project/Sparse-VideoGen at 5ce7b01, its code for Wan.
 *
 * A head is spatial or temporal. A spatial one attends to a band of keys about its own token, in
 * the order in which tokens arrive, frame after frame; a temporal one to the same band in an order
 * in which the tokens of one place in all frames lie beside each other. As many first keys of the
 * order as a frame has tokens are kept too. A band of `width` places on both sides has a share of
 * 1 - (1 - width / n)^2 of the pairs, and width is rounded up to whole blocks. For `rows` queries
 * drawn at random the output is found over all keys and over both masks: the smaller mean squared
 * error wins.
 *
 * So both masks are one mask of places, with as many pairs. The first keys are the first frame in a
 * spatial head alone: in a temporal one they are some places of all frames, in the authors' code as
 * here. It measures the error over a band of two frames in blocks, whatever the density; here it is
 * the band that is run. Its dense first layers and steps are left to the caller.
 *
 * Ours: text keeps its place, attends to all, and all attend to it; density counts it (the code
 * subtracts a corner twice). Rows are of all queries, where the code has the first 10000, and are
 * drawn by a hash. Of equal errors spatial wins. multiply_adds leaves softmax out. */
#include <math.h>
#include <string.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { DENSITY, ROWS, SINK, SEED, BLOCK };
enum { SPATIAL, TEMPORAL, KINDS };

/* Sets row r of the pairs for the query at a place. */
static void set_row(const sparge_head *head, const sparge_pairs *pairs, int64_t r, int64_t place)
{
    const sparge_grid *grid = head->context->grid;
    const int64_t first = grid->text_before, block = head->g.block_k;
    const double width = sparge_video_band(head, head->param[DENSITY]) / (double)block;
    sparge_pairs_near(head, pairs, r, place, (int64_t)ceil(width) * block);
    if (head->param[SINK] != 0.0 && grid->t > 0)
        sparge_pairs_range(head, pairs, r, first, first + grid->h * grid->w);
}

/* Adds the squared error of the output of query t. */
static void add_errors(const sparge_head *head, int64_t t, int64_t *const order[KINDS],
                       int64_t *const place[KINDS], const sparge_pairs *pairs, float *s, double *o,
                       double error[KINDS])
{
    const int64_t keys = head->g.k_len, dim = head->problem->dim, dim_v = head->problem->dim_v;
    float *p = s + keys;
    sparge_method_scores(&head->keys, head->q + t * dim, head->scale, keys, s);
    *head->multiply_adds += (double)keys * (double)dim;
    sparge_method_output(head, s, NULL, NULL, p, o);
    for (int kind = 0; kind < KINDS; kind++) {
        memset(pairs->bits, 0, (size_t)pairs->words * sizeof *pairs->bits);
        set_row(head, pairs, 0, place[kind][t]);
        sparge_method_output(head, s, order[kind], pairs->bits, p, o + dim_v);
        for (int64_t c = 0; c < dim_v; c++)
            error[kind] += (o[dim_v + c] - o[c]) * (o[dim_v + c] - o[c]);
    }
}

static sparge_status keep_band(const sparge_head *head, sparge_error *error)
{
    static const sparge_order orders[KINDS] = {SPARGE_ROW_MAJOR, SPARGE_TIME_MAJOR};
    const sparge_geometry *g = &head->g;
    const int64_t n = g->k_len, rows = n ? (int64_t)head->param[ROWS] : 0;
    int64_t *order[KINDS], *place[KINDS];
    double errors[KINDS] = {0.0};
    sparge_status status = SPARGE_OK;
    for (int kind = 0; kind < KINDS && !status; kind++)
        status = sparge_order_grid(head, orders[kind], &order[kind], &place[kind], error);
    float *s = sparge_take(head->scratch, 2 * n + 1, sizeof *s);
    double *o = sparge_take(head->scratch, 2 * head->problem->dim_v + 1, sizeof *o);
    const sparge_pairs pairs = sparge_pairs_make(head);
    if (!s || !o || !pairs.bits || status)
        return status ? status : SPARGE_ERR_MEMORY;
    for (int64_t e = 0; e < rows; e++) {
        const uint64_t any = sparge_hash((uint64_t)head->param[SEED], head->n, e, 0);
        add_errors(head, (int64_t)(any % (uint64_t)n), order, place, &pairs, s, o, errors);
    }
    const int kind = errors[TEMPORAL] < errors[SPATIAL];
    sparge_order_tokens(head, order[kind]);
    for (int64_t i = 0; i < g->q_blocks && !status; i++) {
        sparge_pairs_clear(head, &pairs);
        for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++)
            set_row(head, &pairs, r, i * g->block_q + r);
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}

static sparge_status plan_svg(sparge_plan *plan, const sparge_context *context, const double *param,
                              sparge_error *error)
{
    const int64_t block = (int64_t)param[BLOCK];
    sparge_add_blocks(plan, block, block);
    sparge_status status = sparge_own_tokens(plan);
    if (!status)
        status = sparge_each_head(plan, context, param,
                                  &(sparge_walk){.needs_v = true, .visit = keep_band}, error);
    return status;
}

const sparge_method sparge_method_svg = {
    .name = "svg",
    .title = "Sparse VideoGen: a band, spatial or temporal",
    .paper = "arXiv 2502.01776",
    .repository = "github.com/svg-project/Sparse-VideoGen",
    .commit = "5ce7b01",
    .kind = "training-free",
    .evidence = "140 of 140 heads, 1843483900 of 1843483900 pairs",
    .needs = SPARGE_NEEDS_GRID | SPARGE_NEEDS_NOT_CAUSAL,
    .param = {{"density", 0.0, 1.0, 0.25, false,
               "share of text and the band, before it is rounded; the code's sparsity"},
              {"rows", 1.0, 0x1p24, 32.0, true, "sampled queries of each head"},
              {"sink", 0.0, 1.0, 1.0, true, "the first keys of the order are kept"},
              {"seed", 0.0, 0x1p53, 0.0, true, "of the sample"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 128.0, true, "tokens of a block"}},
    .plan = plan_svg,
};
