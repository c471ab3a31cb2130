/* SPDX-License-Identifier: Apache-2.0 */
/* heads.c: walks over query heads with their q, k and v in f32, several at a time. Each has a mask
 * of its own, which are put together at the end: so it is the same however many threads there are.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/arithmetic.h"
#include "common/element.h"
#include "methods/method.h"
#include "sparge_inspect.h"

/* ---- One head ---- */

static void load(const sparge_in *in, int64_t b, int64_t h, int64_t tokens, int64_t dim, float *to)
{
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < dim; c++) {
            const float x =
                sparge_element_load(in->data, in->dtype, sparge_in_row(in, b, h, t) + c);
            to[t * dim + c] = isfinite(x) ? x : 0.0f;
        }
}

const float *sparge_load_heads(const sparge_in *in, int64_t batch, int64_t heads, int64_t tokens,
                               int64_t dim, sparge_piece **memory)
{
    float *x = sparge_take(memory, batch * heads * tokens * dim + 1, sizeof *x);
    for (int64_t n = 0; n < batch * heads && x; n++)
        load(in, n / heads, n % heads, tokens, dim, x + n * tokens * dim);
    return x;
}

/* What the walk keeps of a head until all are there. */
typedef struct visited {
    sparge_mask mask; /* of one batch and one head */
    double multiply_adds;
} visited;

typedef struct walk {
    const sparge_walk *how;
    const sparge_head *usual; /* what all heads share */
    const double *param;
    visited *of; /* [heads of the walk] */
    int64_t failed;
    sparge_status status; /* of the first head that failed */
    sparge_error error;
} walk;

/* memory: of this thread, q, k and v of one head. */
static sparge_status visit(const walk *w, int64_t n, sparge_head *head, sparge_piece **packed,
                           sparge_piece **scratch, sparge_error *error)
{
    const sparge_problem *p = head->problem;
    const int64_t gqa = p->heads / p->kv_heads;
    double own[SPARGE_MAX_PARAMS];
    head->n = n;
    head->b = n / p->heads;
    head->h = n % p->heads;
    head->kv = n / gqa;
    head->scratch = scratch;
    head->mask = &w->of[n].mask;
    head->multiply_adds = &w->of[n].multiply_adds;
    head->param = sparge_param_of(head->context, head->h, w->param, own);
    if (head->q) {
        load(&p->q, head->b, head->h, p->q_len, p->dim, head->q);
        load(&p->k, head->b, head->h / gqa, p->k_len, p->dim, head->k);
        head->keys = sparge_method_panels(head->k, p->k_len, p->dim, packed);
        if (!head->keys.x)
            return SPARGE_ERR_MEMORY;
    }
    if (head->v)
        load(&p->v, head->b, head->h / gqa, p->k_len, p->dim_v, head->v);
    const sparge_status status =
        sparge_mask_alloc(head->mask, &head->one, &head->part->options, error);
    return status ? status : w->how->visit(head, error);
}

static void visit_and_tell(walk *w, int64_t n, bool is_caller, sparge_head *head)
{
    sparge_error error = {0};
    sparge_piece *packed = NULL, *scratch = NULL;
    sparge_status status;
    bool goes_on;
#pragma omp atomic read
    status = w->status;
    if (status)
        return;
    status = visit(w, n, head, &packed, &scratch, &error);
    sparge_release(&packed);
    sparge_release(&scratch);
    goes_on =
        !head->options->progress || !is_caller || head->options->progress(head->options->user, 0.0);
    if (!status && goes_on)
        return;
#pragma omp critical(sparge_walk)
    if (!w->status || n < w->failed) {
        w->failed = n;
        w->error = error;
#pragma omp atomic write
        w->status = status ? status : SPARGE_ERR_CANCELLED;
    }
}

static void visit_all(walk *w, int64_t heads, int threads)
{
    (void)threads;
#pragma omp parallel num_threads(threads)
    {
        const fenv_t caller = sparge_arithmetic_begin();
        const sparge_problem *p = w->usual->problem;
        sparge_head head = *w->usual;
        sparge_piece *memory = NULL;
        const bool sees = !w->how->blind;
        head.q = sees ? sparge_take(&memory, p->q_len * p->dim + 1, sizeof(float)) : NULL;
        head.k = sees ? sparge_take(&memory, p->k_len * p->dim + 1, sizeof(float)) : NULL;
        head.v =
            w->how->needs_v ? sparge_take(&memory, p->k_len * p->dim_v + 1, sizeof(float)) : NULL;
        const bool made = (!sees || (head.q && head.k)) && (head.v || !w->how->needs_v);
        if (!made)
#pragma omp atomic write
            w->status = SPARGE_ERR_MEMORY;
        bool is_caller = false; /* which alone tells of progress */
#pragma omp master
        is_caller = true;
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < heads; n++)
            if (made)
                visit_and_tell(w, n, is_caller, &head);
        sparge_release(&memory);
        sparge_arithmetic_end(caller);
    }
}

/* ---- All ---- */

/* The masks of heads to that of the part, whose rows are empty. */
static bool join(const visited *of, int64_t heads, const sparge_geometry *g, sparge_mask *to)
{
    const int64_t rows = to->q_blocks, bits = rows * to->words,
                  words = g->block_q * sparge_mask_row_words(g->block_k);
    int64_t partials = 0;
    for (int64_t n = 0; n < heads; n++) {
        memcpy(to->bits + n * bits, of[n].mask.bits, (size_t)bits * sizeof *to->bits);
        partials += of[n].mask.partial_first ? of[n].mask.partial_first[rows] : 0;
    }
    if (partials == 0)
        return true;
    to->partial_first = calloc((size_t)(heads * rows) + 1, sizeof *to->partial_first);
    to->partial_block = malloc((size_t)partials * sizeof *to->partial_block);
    to->partial_bits = malloc((size_t)(partials * words) * sizeof *to->partial_bits);
    if (!to->partial_first || !to->partial_block || !to->partial_bits)
        return false;
    for (int64_t n = 0, first = 0; n < heads; n++) {
        const sparge_mask *m = &of[n].mask;
        const int64_t some = m->partial_first ? m->partial_first[rows] : 0;
        for (int64_t i = 1; i <= rows; i++)
            to->partial_first[n * rows + i] = first + (some ? m->partial_first[i] : 0);
        if (some) {
            memcpy(to->partial_block + first, m->partial_block,
                   (size_t)some * sizeof *to->partial_block);
            memcpy(to->partial_bits + first * words, m->partial_bits,
                   (size_t)(some * words) * sizeof *to->partial_bits);
        }
        first += some;
    }
    return true;
}

/* As many as the options say, but for one head no more than one. */
static int threads_for(const sparge_plan *plan, int64_t heads)
{
    sparge_options o = sparge_options_default(SPARGE_RULES_DEFAULT);
    o.threads = plan->options.threads;
    const sparge_status status = sparge_options_resolve(&plan->problem, &o, NULL);
    return status ? 1 : (int)sparge_max(1, sparge_min(o.threads, heads));
}

sparge_status sparge_each_step(const sparge_plan *plan, int64_t steps,
                               sparge_step_function *function, const void *user)
{
    int failed = 0;
    const int threads = threads_for(plan, steps);
    (void)threads;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        const fenv_t caller = sparge_arithmetic_begin();
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < steps; n++) {
            sparge_piece *scratch = NULL;
            failed |= !function(n, user, &scratch);
            sparge_release(&scratch);
        }
        sparge_arithmetic_end(caller);
    }
    return failed ? SPARGE_ERR_MEMORY : SPARGE_OK;
}

sparge_part *sparge_add_blocks(sparge_plan *plan, int64_t block_q, int64_t block_k)
{
    sparge_part *part = sparge_plan_add(plan);
    part->options.block_q = block_q ? block_q : plan->options.block_q;
    part->options.block_k = block_k ? block_k : plan->options.block_k;
    return part;
}

sparge_status sparge_each_head(sparge_plan *plan, const sparge_context *context,
                               const double *param, const sparge_walk *how, sparge_error *error)
{
    const sparge_problem *p = &plan->problem;
    const int64_t heads = (how->survey ? sparge_min(1, p->batch) : p->batch) * p->heads;
    if (how->needs_v && !p->v.data && p->batch && p->k_len)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "v.data is NULL");
    if (plan->parts == 0)
        sparge_add_blocks(plan, how->block_q, how->block_k);
    sparge_part *part = &plan->part[plan->parts - 1];
    sparge_head usual = {
        .problem = p,
        .options = &plan->options,
        .context = context,
        .shared = how->shared,
        .g = sparge_geometry_make(p->q_len, p->k_len, part->options.block_q, part->options.block_k,
                                  plan->options.causal),
        .scale = plan->options.softmax_scale,
        .plan = plan,
        .part = part,
        .one = part->problem,
    };
    usual.one.batch = usual.one.heads = usual.one.kv_heads = 1;
    sparge_piece *memory = NULL;
    walk w = {.how = how, .usual = &usual, .param = param};
    w.of = sparge_take(&memory, heads + 1, sizeof *w.of);
    if (!w.of)
        return SPARGE_ERR_MEMORY;
    visit_all(&w, heads, threads_for(plan, heads));
    sparge_mask_free(&part->mask);
    if (!w.status)
        w.status = sparge_part_mask(part, &w.error);
    if (!w.status && !how->survey && !join(w.of, heads, &usual.g, &part->mask))
        w.status = SPARGE_ERR_MEMORY;
    for (int64_t n = 0; n < heads; n++) {
        plan->multiply_adds += w.of[n].multiply_adds;
        sparge_mask_free(&w.of[n].mask);
    }
    sparge_release(&memory);
    if (w.status && error)
        *error = w.error;
    return w.status;
}
