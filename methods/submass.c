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
 * A cell of 0 tokens is a block: masses are of SpargeAttn's scores (theta off), under this
 * selector.
 *
 * - Rows of cells count by their tokens in the average.
 * - In the softmax a short cell of keys counts as any other, as a short block of SpargeAttn does.
 * - All keys of the call, not those that a row sees: with one t for all rows the loss is lower.
 * - t 0, or what is 0 in f32, keeps every visible block.
 * - Other rules than the default play no part (options.rules): some force no diagonal.
 * The backend predicts (options.cell and min_mass). Masks are nested in t. multiply_adds leaves
 * means, softmax and sums out. */
#include <math.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { T, CELL };

static void set(const sparge_problem *problem, const double *param, sparge_thresholds *to)
{
    (void)problem;
    const float t = (float)fmin(param[T], (double)FLT_MAX);
    *to = (sparge_thresholds){
        .theta = -1.0f,
        .tau = SPARGE_OFF,
        .topk = t > 0.0f ? SPARGE_OFF : 1.0f,
        .lambda = to->lambda,
        .min_mass = t,
    };
}

static sparge_status plan_submass(sparge_plan *plan, const sparge_context *context,
                                  const double *param, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    sparge_options *o = &sparge_plan_add(plan)->options;
    o->rules = SPARGE_RULES_DEFAULT;
    o->cell = (int64_t)param[CELL];
    o->sink = true;
    const sparge_geometry cells =
        sparge_geometry_make(p->q_len, p->k_len, o->cell ? o->cell : o->block_q,
                             o->cell ? o->cell : o->block_k, o->causal);
    plan->multiply_adds =
        (double)(p->batch * p->heads * p->dim) * (double)sparge_visible_pairs(&cells);
    return sparge_predict_part(plan, context, param, set, error);
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
