/* SPDX-License-Identifier: Apache-2.0 */
/* blasst.c: BLASST: Dynamic Blocked Attention Sparsity via Softmax Thresholding, arXiv 2512.12087;
 * flash_skip_softmax of github.com/NVIDIA/Model-Optimizer at 038da03.
 *
 * Nothing is predicted: Q.K of all pairs is computed, and P.V of a tile is skipped if the maxima of
 * all of its rows lie below their running maxima by the logarithm of a threshold, a / L, where L is
 * the number of keys. That is SpargeAttn's lambda, log(a / L), of whole tiles of `block` tokens,
 * which go from the first key to the last.
 *
 * The authors fit a to a sparsity (a scale of 55 to 1418 for a model of 30B parameters). Our
 * reading: its density is that of P.V, which only a run tells (sparge_method.at_run), and Q.K of
 * all pairs is what the choice takes. lambda is at most 0: from a = L on, a tile is kept only if
 * some row has a new maximum in it. A tile that a row sees in part is judged by what is seen. Their
 * code pads a short last block with queries of no score, whose tiles are never below their maxima,
 * so that it keeps all of that row. */
#include <math.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { A, BLOCK };

static void set(const sparge_problem *problem, const double *param, sparge_thresholds *to)
{
    to->lambda = fminf(0.0f, (float)log(param[A] / (double)sparge_max(1, problem->k_len)));
}

static sparge_status plan_blasst(sparge_plan *plan, const sparge_context *context,
                                 const double *param, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    const int64_t block = (int64_t)param[BLOCK];
    sparge_options *o = &sparge_add_blocks(plan, block, block)->options;
    o->skip_rows = block;
    const sparge_geometry g =
        sparge_geometry_make(p->q_len, p->k_len, block, block, plan->options.causal);
    int64_t pairs = 0;
    for (int64_t t = 0; t < p->q_len; t++)
        pairs += sparge_keys_of_query(&g, t);
    plan->multiply_adds = (double)(p->batch * p->heads * p->dim) * (double)pairs;
    return sparge_set_part(plan, context, param, set, error);
}

const sparge_method sparge_method_blasst = {
    .name = "blasst",
    .title = "BLASST: P.V of tiles far below the running maximum is skipped",
    .paper = "arXiv 2512.12087",
    .repository = "github.com/NVIDIA/Model-Optimizer",
    .commit = "038da03",
    .kind = "training-free",
    .evidence = "34427 of 34536 tiles",
    .falls = true,
    .at_run = true,
    .param = {{"a", 0.0, INFINITY, 334.0, false, "the threshold of a tile, times the keys"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 128.0, true, "tokens of a tile"}},
    .plan = plan_blasst,
};
