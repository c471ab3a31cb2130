/* SPDX-License-Identifier: Apache-2.0 */
/* seer.c: SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs, arXiv 2410.13276;
 * github.com/microsoft/SeerAttention at aba03e3, its gate for the prompt (Qavg_Kmaxminavg).
 *
 * A gate is trained for each layer of a model. It sees q and k before their rotation (RoPE), pooled
 * in blocks: queries by their mean, keys by the largest, the least and the mean of each channel,
 * side by side. Each head multiplies them by matrices of its own and rotates what it gets by the
 * position of the block's first token. The softmax of the products, over the root of their length
 * and over the key blocks that a row sees, is the row's map; blocks above `threshold` are kept. The
 * last `dense_rows` rows keep all that they see. The authors' evaluations have thresholds of 2e-3
 * and 5e-4 (their configuration's default is 0). If hidden is dim, as in the gates that they
 * publish, there is no matrix for q, and one for the keys of each query head.
 *
 * Without a gate q and k are pooled by their means as they are, rotated, and scored as attention
 * scores: thresholds on the map of mean blocks.
 *
 * Ours: the inputs have been rotated, so that is undone first, in halves and with angles in f32 as
 * transformers has them. Key n stands at n, a query where its last visible key does, and if not
 * causal at its own number. Scaled frequencies (Llama 3.1, YaRN) have no parameter. Each row keeps
 * the best of the blocks that all its queries see, so that none is without a key; the authors' rows
 * may be empty, which takes 1 / threshold blocks. A threshold of 0 keeps every visible block. A
 * short last block is pooled over the tokens that it has. Masks are nested in the threshold.
 * multiply_adds leaves rotation, softmax, maxima and minima out. */
#include <math.h>
#include <string.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { THRESHOLD, BLOCK, DENSE_ROWS };
enum { MAX_HIDDEN = 1 << 16 };

/* ---- The gate ---- */

/* Of the rotation of rows of so many channels, [dim / 2]; NULL: no memory. */
static float *make_frequencies(const sparge_head *head, int64_t dim)
{
    float *to = sparge_take(head->scratch, dim / 2 + 1, sizeof *to);
    for (int64_t c = 0; c < dim / 2 && to; c++)
        to[c] = 1.0f /
                (float)pow(head->context->gate->rope_base, (double)((float)(2 * c) / (float)dim));
    return to;
}

/* Turns a row to a position, or back (sign -1). */
static void rotate(float *x, int64_t dim, const float *frequency, int64_t position, float sign)
{
    const int64_t half = dim / 2;
    for (int64_t c = 0; c < half; c++) {
        const float angle = (float)position * frequency[c];
        const float cosine = (float)cos((double)angle), sine = sign * (float)sin((double)angle);
        const float a = x[c], b = x[c + half];
        x[c] = a * cosine - b * sine;
        x[c + half] = b * cosine + a * sine;
    }
}

/* The largest, the least and the mean of each channel in block j, [3][dim]. */
static void pool_keys(const float *k, int64_t tokens, int64_t dim, float *to)
{
    sparge_method_pool(k, tokens, dim, tokens, false, to + 2 * dim);
    for (int64_t c = 0; c < dim; c++) {
        to[c] = to[dim + c] = k[c];
        for (int64_t t = 1; t < tokens; t++) {
            to[c] = fmaxf(to[c], k[t * dim + c]);
            to[dim + c] = fminf(to[dim + c], k[t * dim + c]);
        }
    }
}

static void multiply(const float *x, const float *matrix, int64_t dim, int64_t hidden, float *to)
{
    memset(to, 0, (size_t)hidden * sizeof *to);
    for (int64_t c = 0; c < dim; c++)
        for (int64_t e = 0; e < hidden; e++)
            to[e] += x[c] * matrix[c * hidden + e];
}

/* What the gate makes of the head's q and k: [q_blocks][hidden] and [k_blocks][hidden]. Both are
 * turned back where they are: the walk loads them again for the next head. */
static sparge_status make_gates(const sparge_head *head, float *q, float *k)
{
    const sparge_geometry *g = &head->g;
    const sparge_gate *gate = head->context->gate;
    const int64_t dim = head->problem->dim, hidden = gate->hidden, block = g->block_k;
    const int64_t from = g->causal == SPARGE_CAUSAL_END ? g->offset : 0; /* where query 0 stands */
    const int64_t k_head = head->h / (head->problem->heads / gate->k_heads);
    const bool turned = gate->rope_base > 0.0;
    float *mean = sparge_take(head->scratch, g->q_blocks * dim + 1, sizeof *mean),
          *pooled = sparge_take(head->scratch, 3 * dim, sizeof *pooled),
          *given = make_frequencies(head, dim), *made = make_frequencies(head, hidden);
    if (!mean || !pooled || !given || !made)
        return SPARGE_ERR_MEMORY;
    for (int64_t t = 0; t < g->q_len && turned; t++)
        rotate(head->q + t * dim, dim, given, from + t, -1.0f);
    for (int64_t t = 0; t < g->k_len && turned; t++)
        rotate(head->k + t * dim, dim, given, t, -1.0f);
    sparge_method_pool(head->q, g->q_len, dim, block, false, mean);
    for (int64_t i = 0; i < g->q_blocks; i++) {
        if (gate->q)
            multiply(mean + i * dim, gate->q + head->h * dim * hidden, dim, hidden, q + i * hidden);
        else
            memcpy(q + i * hidden, mean + i * dim, (size_t)dim * sizeof *q);
        if (turned)
            rotate(q + i * hidden, hidden, made, from + i * block, 1.0f);
    }
    for (int64_t j = 0; j < g->k_blocks; j++) {
        pool_keys(head->k + j * block * dim, sparge_block_rows(g->k_len, block, j), dim, pooled);
        multiply(pooled, gate->k + k_head * 3 * dim * hidden, 3 * dim, hidden, k + j * hidden);
        if (turned)
            rotate(k + j * hidden, hidden, made, j * block, 1.0f);
    }
    *head->multiply_adds +=
        (double)(dim * hidden) * (double)((gate->q ? g->q_blocks : 0) + 3 * g->k_blocks);
    return SPARGE_OK;
}

static bool all_finite(const float *x, int64_t n)
{
    while (n > 0 && isfinite(x[n - 1]))
        n--;
    return n == 0;
}

static sparge_status check_gate(const sparge_gate *gate, const sparge_problem *p,
                                sparge_error *error)
{
    const double base = gate->rope_base;
    if (gate->hidden < 1 || gate->hidden > MAX_HIDDEN)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "gate.hidden is %lld, it must be in [1, %d]",
                           (long long)gate->hidden, MAX_HIDDEN);
    if (gate->k_heads != p->kv_heads && gate->k_heads != p->heads)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "gate.k_heads is %lld, it must be kv_heads, %lld, or heads, %lld",
                           (long long)gate->k_heads, (long long)p->kv_heads, (long long)p->heads);
    if (!gate->q && gate->hidden != p->dim)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "gate.q is NULL, so that gate.hidden, %lld, must be dim, %lld",
                           (long long)gate->hidden, (long long)p->dim);
    if (!gate->k)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "gate.k is NULL");
    if (!(base == 0.0 || (base >= 1.0 && base <= DBL_MAX)))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "gate.rope_base is %g, it must be 0 or at least 1", base);
    if (base > 0.0 && (gate->hidden % 2 || p->dim % 2))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "gate.rope_base is %g, and of dim %lld and gate.hidden %lld one is odd",
                           base, (long long)p->dim, (long long)gate->hidden);
    const int64_t matrix = p->dim * gate->hidden;
    if ((gate->q && !all_finite(gate->q, p->heads * matrix)) ||
        !all_finite(gate->k, gate->k_heads * 3 * matrix))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "gate holds a number that is not finite");
    return SPARGE_OK;
}

/* ---- The mask ---- */

static void choose(const sparge_head *head, int64_t i, int64_t visible, const float *p)
{
    const sparge_geometry *g = &head->g;
    const int64_t dense = (int64_t)head->param[DENSE_ROWS];
    const double threshold = head->param[THRESHOLD];
    const int64_t all = sparge_min(visible, sparge_first_diagonal(g, i) + 1); /* its queries see */
    int64_t best = 0;
    for (int64_t j = 0; j < visible; j++) {
        if (threshold <= 0.0 || (double)p[j] > threshold || i >= g->q_blocks - dense)
            sparge_keep(head, i, j);
        if (j < all && p[j] > p[best])
            best = j;
    }
    sparge_keep(head, i, best);
}

static sparge_status keep_seer(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const sparge_gate *gate = head->context->gate;
    const int64_t dim = head->problem->dim, hidden = gate ? gate->hidden : dim;
    float *q = sparge_take(head->scratch, g->q_blocks * hidden + 1, sizeof *q),
          *k = sparge_take(head->scratch, g->k_blocks * hidden + 1, sizeof *k),
          *p = sparge_take(head->scratch, g->k_blocks + 1, sizeof *p);
    sparge_status status = q && k && p ? SPARGE_OK : SPARGE_ERR_MEMORY;
    if (status)
        return status;
    if (gate) {
        status = make_gates(head, q, k);
    } else {
        sparge_method_pool(head->q, g->q_len, dim, g->block_q, false, q);
        sparge_method_pool(head->k, g->k_len, dim, g->block_k, false, k);
    }
    const sparge_panels keys = sparge_method_panels(k, g->k_blocks, hidden, head->scratch);
    if (!keys.x)
        status = SPARGE_ERR_MEMORY;
    const float scale = gate ? 1.0f / sqrtf((float)hidden) : head->scale;
    *head->multiply_adds += (double)(g->q_len + g->k_len) * (double)dim;
    for (int64_t i = 0; i < g->q_blocks && !status; i++) {
        const int64_t visible = sparge_blocks_visible(g, i);
        sparge_method_scores(&keys, q + i * hidden, scale, visible, p);
        sparge_method_softmax(p, visible);
        *head->multiply_adds += (double)visible * (double)hidden;
        if (visible)
            choose(head, i, visible, p);
    }
    return status;
}

static sparge_status plan_seer(sparge_plan *plan, const sparge_context *context,
                               const double *param, sparge_error *error)
{
    const int64_t block = (int64_t)param[BLOCK];
    const sparge_status status =
        context->gate ? check_gate(context->gate, &plan->problem, error) : SPARGE_OK;
    return status
               ? status
               : sparge_each_head(
                     plan, context, param,
                     &(sparge_walk){.block_q = block, .block_k = block, .visit = keep_seer}, error);
}

const sparge_method sparge_method_seer = {
    .name = "seer",
    .title = "SeerAttention: blocks above a threshold by a trained gate, or by their means",
    .paper = "arXiv 2410.13276",
    .repository = "github.com/microsoft/SeerAttention",
    .commit = "aba03e3",
    .kind = "trained gate, runs without",
    .evidence = "755204 of 755204 blocks",
    .falls = true,
    .param = {{"threshold", 0.0, 1.0, 0.002, false, "share of a row's map above which it is kept"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 64.0, true, "tokens of a block"},
              {"dense_rows", 0.0, 0x1p24, 2.0, true, "last rows of blocks that are dense"}},
    .plan = plan_seer,
};
