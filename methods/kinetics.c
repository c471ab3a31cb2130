/* SPDX-License-Identifier: Apache-2.0 */
/* kinetics.c: block top-k of Kinetics: Rethinking Test-Time Scaling Laws, arXiv 2506.05333;
 * github.com/Infini-AI-Lab/Kinetics at af7fa57 (benchmark/blocktopk_decoder.py).
 *
 * Keys are cut into pages. While a model writes, each query scores the pages behind it by the mean,
 * over the query heads that share the keys, of the product of query and mean key, without softmax
 * or scale. All heads of the group attend to the `pages` best ones, and to the page that is being
 * filled, in which the query stands.
 *
 * Ours: the mean of the queries is multiplied in place of the mean of products. A query stands
 * where its last visible key does, so that the queries of a prompt choose like those of a model
 * that writes. If not causal, no page is a query's own. Of equal scores the earlier page comes
 * first. The authors' accuracy study beside it (LiteSys) is blockwise_topk_sparsity: with 0 first
 * tokens and 1 nearest one it is this rule, and with more these are attended to as well.
 * multiply_adds leaves the ranking out. */
#include "methods/entries.h"
#include "methods/method.h"

enum { PAGES, PAGE };

/* Means over the query heads of each key head, [batch * kv_heads][q_len][dim]. */
static float *mean_queries(const sparge_problem *p, sparge_piece **memory)
{
    const int64_t group = p->heads / p->kv_heads, size = p->q_len * p->dim;
    sparge_piece *all = NULL;
    const float *q = sparge_load_heads(&p->q, p->batch, p->heads, p->q_len, p->dim, &all);
    float *to = sparge_take(memory, p->batch * p->kv_heads * size + 1, sizeof *to);
    for (int64_t n = 0; n < p->batch * p->heads && q && to; n++)
        for (int64_t e = 0; e < size; e++)
            to[n / group * size + e] += q[n * size + e] / (float)group;
    sparge_release(&all);
    return q ? to : NULL;
}

static sparge_status keep_pages(const sparge_head *head, sparge_error *error)
{
    const float *q = (const float *)head->shared + head->kv * head->g.q_len * head->problem->dim;
    const int64_t own = head->g.causal != SPARGE_CAUSAL_NONE;
    return sparge_keep_pages(head, q, (int64_t)head->param[PAGE], (int64_t)head->param[PAGES] + own,
                             error);
}

static sparge_status plan_kinetics(sparge_plan *plan, const sparge_context *context,
                                   const double *param, sparge_error *error)
{
    sparge_piece *memory = NULL;
    float *q = mean_queries(&plan->problem, &memory);
    const sparge_status status =
        q ? sparge_each_head(plan, context, param, &(sparge_walk){.shared = q, .visit = keep_pages},
                             error)
          : SPARGE_ERR_MEMORY;
    sparge_release(&memory);
    return status;
}

const sparge_method sparge_method_kinetics = {
    .name = "kinetics",
    .title = "Kinetics: pages of a group of heads",
    .paper = "arXiv 2506.05333",
    .repository = "github.com/Infini-AI-Lab/Kinetics",
    .commit = "af7fa57",
    .kind = "training-free",
    .evidence = "122794136 of 122794136 pages",
    .param = {{"pages", 1.0, 0x1p24, 64.0, true, "pages of a query, its own not counted"},
              {"page", 1.0, 0x1p24, 16.0, true, "keys of a page"}},
    .plan = plan_kinetics,
};
