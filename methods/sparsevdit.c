/* SPDX-License-Identifier: Apache-2.0 */
/* sparsevdit.c: Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion
 * Transformers, arXiv 2506.03065. Its code is not public: the rule is read from what is written of
 * it.
 *
 * A head has one of five modes, for all inputs: full attention; none, its output being 0; a window
 * about the diagonal; the same in an order in which the tokens of one place in all frames lie
 * beside each other, which are several diagonals; or a fixed set of keys for all queries, vertical
 * stripes. A mode has a constant sparsity. Modes are chosen once for a layer, on samples: the one
 * whose error plus lambda times the share of attention that it computes is least, and full
 * attention if that sum is above eps for all.
 *
 * Ours: the samples are `rows` queries, spread evenly, of the first call and its first batch, and
 * the choice stays in the context's state, if there is one, for later calls of the layer. The error
 * is the mean square of the difference, over that of the output: without a scale, lambda 0.5 and
 * eps 1, the paper's numbers, cannot be the same for all models. So a head without attention has an
 * error of 1, and is seldom full. It is asked for by `skip`, and then no query of it has a key. The
 * three sparse modes have one density, at which they are compared (`at`), and which the others have
 * here (`density`), so that the choice does not depend on it. Stripes are the keys to which the
 * samples pay most, of equal ones the earlier, one at least. Text keeps its place, attends to all,
 * and all attend to it; density counts it. Of equal modes the first in the order above wins.
 * multiply_adds counts the choice where it is made, and leaves out softmax and ranking. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { DENSITY, AT, LAMBDA, EPS, SKIPS, ROWS, BLOCK };
enum { UNKNOWN, FULL, SKIP, DIAGONAL, MULTI_DIAGONAL, STRIPES, MODES };

/* Of a head, [1 + k_len]: its mode, and what the samples pay to each key. */
static float *kept_of(const sparge_head *head)
{
    return (float *)head->shared + head->h * (1 + head->g.k_len);
}

/* The stripes at a density, as bits of keys. */
static uint32_t *find_stripes(const sparge_head *head, double density)
{
    const sparge_grid *grid = head->context->grid;
    const float *mass = kept_of(head) + 1 + grid->text_before;
    const int64_t n = head->g.k_len - grid->text_before - grid->text_after;
    const double share = sparge_video_share(head, density);
    const int64_t count = sparge_min(n, sparge_max(1, (int64_t)ceil(share * (double)n)));
    sparge_ranked *x = sparge_take(head->scratch, n + 1, sizeof *x);
    uint32_t *bits =
        sparge_take(head->scratch, sparge_mask_row_words(head->g.k_len) + 1, sizeof *bits);
    if (!x || !bits)
        return NULL;
    for (int64_t e = 0; e < n; e++)
        x[e] = (sparge_ranked){mass[e], grid->text_before + e};
    sparge_rank_best(x, n, count);
    for (int64_t e = 0; e < count; e++)
        sparge_mask_row_set(bits, x[e].at);
    return bits;
}

/* Sets row r of the pairs for the query at a place of the mode's order. */
static void set_row(const sparge_head *head, int mode, double density, const uint32_t *stripes,
                    const sparge_pairs *pairs, int64_t r, int64_t place)
{
    const bool band = mode == DIAGONAL || mode == MULTI_DIAGONAL;
    const int64_t width = (int64_t)ceil(sparge_video_band(head, density));
    memset(pairs->bits + r * pairs->words, 0, (size_t)pairs->words * sizeof *pairs->bits);
    if (mode != SKIP)
        sparge_pairs_near(head, pairs, r, place, mode == FULL ? head->g.k_len : band ? width : -1);
    for (int64_t word = 0; word < pairs->words && mode == STRIPES; word++)
        pairs->bits[r * pairs->words + word] |= stripes[word];
}

/* Adds the squared error of query t in each mode, and the squared output. */
static void add_errors(const sparge_head *head, int64_t t, const int64_t *order,
                       const int64_t *place, const uint32_t *stripes, const sparge_pairs *pairs,
                       float *s, double *o, double error[MODES])
{
    const int64_t keys = head->g.k_len, dim = head->problem->dim, dim_v = head->problem->dim_v;
    sparge_method_scores(&head->keys, head->q + t * dim, head->scale, keys, s);
    *head->multiply_adds += (double)keys * (double)dim;
    sparge_method_output(head, s, NULL, NULL, s + keys, o);
    for (int64_t c = 0; c < dim_v; c++)
        error[SKIP] += o[c] * o[c];
    for (int mode = DIAGONAL; mode < MODES; mode++) {
        const bool other = mode == MULTI_DIAGONAL;
        set_row(head, mode, head->param[AT], stripes, pairs, 0, other ? place[t] : t);
        sparge_method_output(head, s, other ? order : NULL, pairs->bits, s + keys, o + dim_v);
        for (int64_t c = 0; c < dim_v; c++)
            error[mode] += (o[dim_v + c] - o[c]) * (o[dim_v + c] - o[c]);
    }
}

static sparge_status choose(const sparge_head *head, sparge_error *error)
{
    const int64_t n = head->g.k_len, rows = sparge_min(n, (int64_t)head->param[ROWS]);
    float *kept = kept_of(head), *s = sparge_take(head->scratch, 2 * n + 1, sizeof *s);
    double *o = sparge_take(head->scratch, 2 * head->problem->dim_v + 1, sizeof *o);
    const sparge_pairs pairs = sparge_pairs_make(head);
    double off[MODES] = {0.0}, least = INFINITY;
    int64_t *order, *place;
    sparge_status status = s && o && pairs.bits ? SPARGE_OK : SPARGE_ERR_MEMORY;
    if (!status)
        status = sparge_order_grid(head, SPARGE_TIME_MAJOR, &order, &place, error);
    for (int64_t e = 1; e <= rows && !status; e++) {
        sparge_method_row(head, e * n / rows - 1, s);
        for (int64_t key = 0; key < n; key++)
            kept[1 + key] += s[key];
    }
    const uint32_t *stripes = status ? NULL : find_stripes(head, head->param[AT]);
    if (!stripes)
        return status ? status : SPARGE_ERR_MEMORY;
    for (int64_t e = 1; e <= rows; e++)
        add_errors(head, e * n / rows - 1, order, place, stripes, &pairs, s, o, off);
    kept[0] = FULL;
    for (int mode = head->param[SKIPS] != 0.0 ? SKIP : DIAGONAL; mode < MODES; mode++) {
        const double share = mode == SKIP ? 0.0 : head->param[AT],
                     loss = off[mode] / fmax(off[SKIP], DBL_MIN) + head->param[LAMBDA] * share;
        if (loss < least)
            kept[0] = (float)mode;
        least = fmin(least, loss);
    }
    if (!(least <= head->param[EPS]))
        kept[0] = FULL;
    return SPARGE_OK;
}

static sparge_status choose_mode(const sparge_head *head, sparge_error *error)
{
    return kept_of(head)[0] == UNKNOWN ? choose(head, error) : SPARGE_OK;
}

static sparge_status keep_mode(const sparge_head *head, sparge_error *error)
{
    const int mode = (int)kept_of(head)[0];
    const double density = head->param[DENSITY];
    const uint32_t *stripes = find_stripes(head, density);
    const sparge_pairs pairs = sparge_pairs_make(head);
    int64_t *order, *place;
    if (!stripes || !pairs.bits)
        return SPARGE_ERR_MEMORY;
    sparge_status status = sparge_order_grid(
        head, mode == MULTI_DIAGONAL ? SPARGE_TIME_MAJOR : SPARGE_ROW_MAJOR, &order, &place, error);
    if (status)
        return status;
    sparge_order_tokens(head, order);
    for (int64_t i = 0; i < head->g.q_blocks && !status; i++) {
        for (int64_t r = 0; r < sparge_block_rows(head->g.q_len, head->g.block_q, i); r++)
            set_row(head, mode, density, stripes, &pairs, r, i * head->g.block_q + r);
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}

static sparge_status plan_sparsevdit(sparge_plan *plan, const sparge_context *context,
                                     const double *param, sparge_error *error)
{
    const int64_t block = (int64_t)param[BLOCK],
                  kept = plan->problem.heads * (1 + plan->problem.k_len) * (int64_t)sizeof(float);
    sparge_walk walk = {.needs_v = true, .survey = true, .visit = choose_mode};
    sparge_add_blocks(plan, block, block);
    sparge_status status =
        sparge_state(plan, context, "sparsevdit", kept, NULL, &walk.shared, error);
    if (!status)
        status = sparge_own_tokens(plan);
    if (!status)
        status = sparge_each_head(plan, context, param, &walk, error);
    walk.survey = walk.needs_v = false;
    walk.visit = keep_mode;
    return status ? status : sparge_each_head(plan, context, param, &walk, error);
}

const sparge_method sparge_method_sparsevdit = {
    .name = "sparsevdit",
    .title = "Sparse-vDiT: a mode for each head, by calibration",
    .paper = "arXiv 2506.03065",
    .repository = "",
    .commit = "",
    .kind = "training-free",
    .evidence = "",
    .needs = SPARGE_NEEDS_GRID | SPARGE_NEEDS_NOT_CAUSAL,
    .param = {{"density", 0.0, 1.0, 0.25, false, "of heads in a sparse mode"},
              {"at", 0.0, 1.0, 0.25, false, "density at which modes are compared"},
              {"lambda", 0.0, 0x1p24, 0.5, false, "weight of what a mode computes"},
              {"eps", 0.0, INFINITY, 1.0, false, "above it a head has full attention"},
              {"skip", 0.0, 1.0, 0.0, true, "a head may be without attention"},
              {"rows", 1.0, 0x1p24, 64.0, true, "sampled queries of each head"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 128.0, true, "tokens of a block"}},
    .plan = plan_sparsevdit,
};
