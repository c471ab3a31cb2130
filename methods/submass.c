/* SPDX-License-Identifier: Apache-2.0 */
/* submass.c: a threshold on the mass of blocks, by means of cells smaller than blocks. Our own.
 *
 * Tokens stand in cells of `cell`. A cell of queries and one of keys score the product of their
 * means, by the tokens that they have. The softmax of a row of cells over the keys' cells, summed
 * over a block of keys and averaged over the queries of a block, is the block's mass. A block is
 * kept if its mass is above t times what each block would have if all keys of the call had the
 * same, whatever its row has kept by then: TopCdf promises every row the same lost mass, so that
 * flat rows keep many blocks that matter little, and peaked rows drop the one that does. The first
 * block and the diagonal are always kept. Causal: a cell is visible to one of queries if some query
 * of it sees some key of it.
 *
 * A cell of 0 tokens is a block: scores are SpargeAttn's (theta off), under this selector.
 *
 * - Rows of cells count by their tokens in the average.
 * - In the softmax a short cell of keys counts as any other, as a short block of SpargeAttn does.
 * - Weights are whole numbers, as TopCdf's are: a sum over cells has one value in any order.
 * - t 0 keeps every visible block, also one whose weights are all below 2^-30 of the largest.
 * - All keys of the call, not those that a row sees: with one t for all rows the loss is lower.
 * Masks are nested in t. multiply_adds leaves means, softmax and sums out. */
#include <math.h>
#include <string.h>

#include "common/select.h"
#include "methods/entries.h"
#include "methods/method.h"

enum { T, CELL };

/* Adds what the queries of a row of cells pay to each block, times their number. s are its scores,
 * per_block cells a block; sum has room for a number for each block. */
static void add_row(float *s, int64_t visible, int64_t per_block, int64_t queries, uint64_t *sum,
                    double *mass)
{
    const int64_t blocks = sparge_ceil_div(visible, per_block);
    float top = -FLT_MAX;
    uint64_t total = 0;
    for (int64_t u = 0; u < visible; u++)
        top = fmaxf(top, s[u] = fmaxf(-FLT_MAX, fminf(s[u], FLT_MAX)));
    memset(sum, 0, (size_t)blocks * sizeof *sum);
    for (int64_t u = 0; u < visible; u++)
        sum[u / per_block] += sparge_mass(s[u], top);
    for (int64_t j = 0; j < blocks; j++)
        total += sum[j];
    for (int64_t j = 0; j < blocks; j++)
        mass[j] += (double)queries * ((double)sum[j] / (double)total);
}

/* mass: times the queries of the row. */
static void choose(const sparge_head *head, int64_t i, const double *mass)
{
    const int64_t visible = sparge_blocks_visible(&head->g, i);
    const double t = head->param[T];
    const double all = (double)sparge_block_rows(head->g.q_len, head->g.block_q, i);
    const double limit = t * all / (double)head->g.k_blocks;
    for (int64_t j = 0; j < visible; j++)
        if (j == 0 || t == 0.0 || mass[j] > limit)
            sparge_keep(head, i, j);
    sparge_keep_diagonal(head, i);
}

static sparge_status keep_submass(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const int64_t cell = (int64_t)head->param[CELL], dim = head->problem->dim;
    const sparge_geometry cells = sparge_geometry_make(g->q_len, g->k_len, cell ? cell : g->block_q,
                                                       cell ? cell : g->block_k, g->causal);
    const int64_t rows = g->block_q / cells.block_q, per_block = g->block_k / cells.block_k;
    float *q = sparge_take(head->scratch, cells.q_blocks * dim + 1, sizeof *q),
          *k = sparge_take(head->scratch, cells.k_blocks * dim + 1, sizeof *k),
          *s = sparge_take(head->scratch, cells.k_blocks + 1, sizeof *s);
    uint64_t *sum = sparge_take(head->scratch, g->k_blocks + 1, sizeof *sum);
    double *mass = sparge_take(head->scratch, g->k_blocks + 1, sizeof *mass);
    if (!q || !k || !s || !sum || !mass)
        return SPARGE_ERR_MEMORY;
    sparge_method_pool(head->q, g->q_len, dim, cells.block_q, false, q);
    sparge_method_pool(head->k, g->k_len, dim, cells.block_k, false, k);
    for (int64_t i = 0; i < g->q_blocks; i++) {
        memset(mass, 0, (size_t)g->k_blocks * sizeof *mass);
        for (int64_t c = i * rows; c < sparge_min(cells.q_blocks, (i + 1) * rows); c++) {
            const int64_t visible = sparge_blocks_visible(&cells, c);
            const int64_t queries = sparge_block_rows(g->q_len, cells.block_q, c);
            for (int64_t u = 0; u < visible; u++)
                s[u] = sparge_pool_score(sparge_method_dot(q + c * dim, k + u * dim, dim),
                                         head->scale);
            add_row(s, visible, per_block, queries, sum, mass);
            head->plan->multiply_adds += (double)visible * (double)dim;
        }
        choose(head, i, mass);
    }
    return SPARGE_OK;
}

static sparge_status plan_submass(sparge_plan *plan, const sparge_context *context,
                                  const double *param, sparge_error *error)
{
    const sparge_options *o = &plan->options;
    const int64_t cell = (int64_t)param[CELL];
    if (cell && (o->block_q % cell || o->block_k % cell))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "cell of submass is %lld, it must divide block_q, %lld, and block_k, "
                           "%lld, or be 0",
                           (long long)cell, (long long)o->block_q, (long long)o->block_k);
    return sparge_each_head(plan, context, param, 0, 0, false, keep_submass, error);
}

const sparge_method sparge_method_submass = {
    .name = "submass",
    .title = "Blocks whose mass, by means of small cells, is above a threshold",
    .paper = "",
    .repository = "",
    .commit = "",
    .kind = "training-free",
    .evidence = "",
    .falls = true,
    .param = {{"t", 0.0, INFINITY, 0.2, false, "mass above which a block is kept, in even shares"},
              {"cell", 0.0, SPARGE_MAX_BLOCK, 8.0, true,
               "tokens of a cell, which divide the blocks; 0: the whole block"}},
    .plan = plan_submass,
};
