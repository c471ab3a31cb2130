/* SPDX-License-Identifier: Apache-2.0 */
/* blocks.c: attention of one query block taken apart into what each key block contributes.
 *
 * Attention over a set of key blocks is the mean of attention over each of them, weighted by
 * exp(lse of each): so when o and lse are known for every block alone, any mask is a weighted sum
 * away. Int8 and int12 have no say in this: codes of q, k and v belong to blocks, and those of P
 * are relative to the maximum of their own tile. (P V in f16 and fp8 rounds P against the running
 * maximum, and fp8 has scales of v over all tokens: there the sums are near, not equal.)
 *
 * The backend does it by its public face: the key blocks become a batch, which all read the same
 * queries (stride 0). Blocks that causality cuts, or that are short, are a second batch, which all
 * read the same keys under a mask of one block each: there a row sees what it would see. */
#include "tune/tune.h"

#include "common/block_mask.h"
#include "sparge_inspect.h"

/* ---- Memory ---- */

static sparge_status part_make(tune_part *part, int64_t count, int64_t rows, int64_t dim_v,
                               int64_t words, bool device, sparge_error *error)
{
    const int64_t cell = (int64_t)sizeof(float);
    sparge_status status = tune_array_make(&part->o, count * rows * dim_v * cell, device, error);
    if (!status)
        status = tune_array_make(&part->lse, count * rows * cell, device, error);
    if (!status)
        status = tune_array_make(&part->m, count * rows * cell, device, error);
    if (!status)
        status =
            tune_array_make(&part->bits, count * words * (int64_t)sizeof(uint32_t), device, error);
    return status;
}

static void part_free(tune_part *part)
{
    tune_array_free(&part->o);
    tune_array_free(&part->lse);
    tune_array_free(&part->m);
    tune_array_free(&part->bits);
}

/* Key blocks between the first that causality cuts for some row of a query block and the last that
 * a row of it sees; and the query blocks of as many rows as the edge may have. */
static int64_t most_at_edge(const sparge_geometry *g)
{
    return sparge_min(g->k_blocks, sparge_ceil_div(g->block_q, g->block_k) + 1);
}

static int64_t q_blocks_at_edge(const sparge_geometry *g)
{
    return sparge_ceil_div(g->block_q + g->block_k, g->block_q);
}

sparge_status tune_blocks_make(tune_blocks *b, const tune_input *x, sparge_error *error)
{
    const sparge_geometry *g = &x->g;
    const bool device = x->q.device;
    const int64_t edge = most_at_edge(g), words = q_blocks_at_edge(g) * sparge_mask_row_words(edge);
    const int64_t rows = sparge_min(g->block_q, g->q_len), dim_v = x->problem.dim_v;
    *b = (tune_blocks){0};
    sparge_status status = part_make(&b->whole, g->k_blocks, rows, dim_v, 1, device, error);
    if (!status)
        status = part_make(&b->edge, edge, g->block_q + g->block_k, dim_v, words, device, error);
    if (status)
        tune_blocks_free(b);
    return status;
}

void tune_blocks_free(tune_blocks *b)
{
    part_free(&b->whole);
    part_free(&b->edge);
    *b = (tune_blocks){0};
}

/* ---- Taking apart ---- */

static const float *at(const tune_blocks *b, size_t array, int64_t j, int64_t dim)
{
    const tune_part *part = j < b->edge.first ? &b->whole : &b->edge;
    const tune_array *x = (const tune_array *)((const char *)part + array);
    return (const float *)x->host + (j - part->first) * part->rows * dim;
}

const float *tune_block_o(const tune_blocks *b, int64_t j, int64_t dim_v)
{
    return at(b, offsetof(tune_part, o), j, dim_v);
}

const float *tune_block_m(const tune_blocks *b, int64_t j)
{
    return at(b, offsetof(tune_part, m), j, 1);
}

const float *tune_block_lse(const tune_blocks *b, int64_t j)
{
    return at(b, offsetof(tune_part, lse), j, 1);
}

/* Attention of the part's batch: p has its views, its lengths and its causality. */
static sparge_status attend_part(tune_part *part, tune_input *x, sparge_problem p,
                                 sparge_causal causal, const sparge_mask *mask, sparge_error *error)
{
    const int64_t cells = part->count * part->rows, dim_v = x->problem.dim_v;
    sparge_options o = *x->o;
    o.causal = causal;
    o.smooth_k = false; /* the keys are smooth already */
    p.batch = part->count;
    p.heads = p.kv_heads = 1;
    p.q_len = part->rows;
    p.dim = x->problem.dim;
    p.dim_v = dim_v;
    const sparge_intermediates intermediates = {.m = tune_data(&part->m)};
    sparge_result result = {
        .o = {tune_data(&part->o), SPARGE_F32, part->rows * dim_v, 0, dim_v},
        .lse = tune_data(&part->lse),
        .intermediates = &intermediates,
    };
    sparge_status status = mask ? tune_array_push(&part->bits, error) : SPARGE_OK;
    if (!status)
        status = sparge_attend(&p, &o, mask, &result, error);
    x->products += (double)result.counts.qk_done + result.counts.pv_done;
    if (!status)
        status = tune_array_pull(&part->o, cells * dim_v * (int64_t)sizeof(float), error);
    if (!status)
        status = tune_array_pull(&part->lse, cells * (int64_t)sizeof(float), error);
    if (!status)
        status = tune_array_pull(&part->m, cells * (int64_t)sizeof(float), error);
    return status;
}

/* The view of one head from token `first` on; `batch` elements from one key block to the next. */
static sparge_in view(const tune_array *x, int64_t first, int64_t dim, int64_t batch)
{
    return (sparge_in){(float *)tune_data(x) + first * dim, SPARGE_F32, batch, 0, dim};
}

static sparge_status load_whole(tune_blocks *b, tune_input *x, const uint32_t *kept,
                                sparge_error *error)
{
    tune_part *part = &b->whole;
    const int64_t dim = x->problem.dim, dim_v = x->problem.dim_v, keys = x->g.block_k;
    const sparge_problem p = {
        .k_len = keys,
        .q = view(&x->q, b->first, dim, 0),
        .k = view(&x->smooth, 0, dim, keys * dim),
        .v = view(&x->v, 0, dim_v, keys * dim_v),
    };
    const sparge_mask mask = {.bits = tune_data(&part->bits),
                              .batch = part->count,
                              .heads = 1,
                              .q_blocks = 1,
                              .k_blocks = 1,
                              .words = 1};
    for (int64_t j = 0; j < part->count && kept; j++)
        ((uint32_t *)part->bits.host)[j] = sparge_mask_row_get(kept, j);
    part->first = 0;
    part->rows = b->rows;
    return part->count ? attend_part(part, x, p, SPARGE_CAUSAL_NONE, kept ? &mask : NULL, error)
                       : SPARGE_OK;
}

/* Causality is aligned to the end here: so many rows more are looked at that the last of them sees
 * the last key. They are those of the next query block, or of 0 beyond the last. What
 * they give is not read. */
static sparge_status load_edge(tune_blocks *b, tune_input *x, const uint32_t *kept,
                               sparge_error *error)
{
    tune_part *part = &b->edge;
    const sparge_geometry *g = &x->g;
    const int64_t dim = x->problem.dim, dim_v = x->problem.dim_v, first = part->first * g->block_k;
    const int64_t keys = sparge_min(b->visible * g->block_k, g->k_len) - first;
    const bool causal = x->o->causal != SPARGE_CAUSAL_NONE;
    part->rows = causal ? keys - (b->first + g->offset - first) : b->rows;
    const sparge_problem p = {
        .k_len = keys,
        .q = view(&x->q, b->first, dim, 0),
        .k = view(&x->smooth, first, dim, 0),
        .v = view(&x->v, first, dim_v, 0),
    };
    const sparge_mask mask = {
        .bits = tune_data(&part->bits),
        .batch = part->count,
        .heads = 1,
        .q_blocks = sparge_ceil_div(part->rows, g->block_q),
        .k_blocks = part->count,
        .words = sparge_mask_row_words(part->count),
    };
    const int64_t words = mask.q_blocks * mask.words;
    uint32_t *bits = part->bits.host;
    memset(bits, 0, (size_t)(part->count * words) * sizeof *bits);
    for (int64_t n = 0; n < part->count; n++)
        if (!kept || sparge_mask_row_get(kept, part->first + n))
            sparge_mask_row_set(&bits[n * words], n);
    return part->count ? attend_part(part, x, p, causal ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE,
                                     &mask, error)
                       : SPARGE_OK;
}

sparge_status tune_blocks_load(tune_blocks *b, tune_input *x, int64_t i, const uint32_t *kept,
                               sparge_error *error)
{
    const sparge_geometry *g = &x->g;
    b->first = i * g->block_q;
    b->rows = sparge_block_rows(g->q_len, g->block_q, i);
    b->visible = sparge_blocks_visible(g, i);
    b->edge.first =
        x->o->causal == SPARGE_CAUSAL_NONE ? g->k_len / g->block_k : sparge_first_diagonal(g, i);
    b->edge.first = sparge_min(b->edge.first, b->visible);
    b->whole.count = b->edge.first;
    b->edge.count = b->visible - b->edge.first;
    sparge_status status = load_whole(b, x, kept, error);
    return status ? status : load_edge(b, x, kept, error);
}
