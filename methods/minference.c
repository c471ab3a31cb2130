/* SPDX-License-Identifier: Apache-2.0 */
/* minference.c: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
 * Attention, arXiv 2407.02490; github.com/microsoft/MInference at fb56c91.
 *
 * Each head has a pattern. A-shape: the first keys, and the nearest ones. Vertical-slash: columns
 * (keys) and diagonals (distances of a key from its query) to which the last queries pay most
 * attention, the first columns and the nearest diagonals always among them. Block-sparse: the
 * blocks of each row whose mean key has the largest product with the mean query, not scaled; a
 * short last block counts as a whole one.
 *
 * The attended pairs of a vertical-slash head are its columns and diagonals, exactly. The released
 * kernel attends to more: for each tile of 64 queries it widens a diagonal to the 64 keys that the
 * whole tile needs of it, and merges those that overlap, 64 keys more at a time, up to 63 too many.
 *
 * Ours: the paper's numbers (1000 columns, 6096 diagonals, 100 blocks) are for contexts of 100
 * thousand tokens. `budget` is the share of all diagonals, or of all blocks for a row, so that 1 is
 * dense; columns go with the diagonals, in an A-shape too. Always kept are `sink` columns and
 * `local` diagonals (with fewer than 100 the code keeps any of the nearest 100). Of equal ones the
 * earlier comes first. With other numbers of keys than of queries, a query stands where
 * causality puts it, and a row of blocks that ends in two blocks keeps the first of them.
 *
 * The choice for each head (pattern 0) is made once, at the paper's budget whatever `budget` is. As
 * in the authors' search, the pattern wins that keeps most attention of sampled queries. Theirs are
 * all beyond the 2500th, and what they compare has different numbers of pairs; here `last` queries
 * are spread evenly, and each has as many keys in every pattern as in the vertical-slash one. The
 * first batch decides. The choice stays in the context's state, if there is one, for later calls of
 * the layer. multiply_adds counts the search where it is made, and leaves out softmax and ranking.
 */
#include <stdlib.h>

#include "common/select.h"
#include "methods/entries.h"
#include "methods/method.h"

enum { BUDGET, PATTERN, COLUMNS, LAST, SINK, LOCAL, BLOCK };
enum { CHOOSE, A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE };

#define PAPER_BUDGET 0.06096 /* 6096 diagonals of 100 thousand */

/* Kept columns; kept diagonals, backwards, so that a query's keys are a stretch of them. */
typedef struct lines {
    int64_t words, distances;
    uint32_t *column, *diagonal;
} lines;

/* Keys [32 * word, 32 * word + 32) of query t. */
static uint32_t line_word(const sparge_head *head, const lines *x, int64_t t, int64_t word)
{
    const int64_t at = x->distances - 1 - (t + head->g.offset) + 32 * word;
    return x->column[word] |
           sparge_mask_row_bits(x->diagonal, at, sparge_mask_row_words(x->distances));
}

/* The attention of the last queries to each column and diagonal. */
static bool add_last_rows(const sparge_head *head, sparge_ranked *column, sparge_ranked *diagonal)
{
    const sparge_geometry *g = &head->g;
    float *p = sparge_take(head->scratch, g->k_len + 1, sizeof *p);
    for (int64_t t = sparge_max(0, g->q_len - (int64_t)head->param[LAST]); t < g->q_len && p; t++) {
        sparge_method_row(head, t, p);
        for (int64_t key = 0; key < sparge_keys_of_query(g, t); key++) {
            column[key].score += p[key];
            diagonal[t + g->offset - key].score += p[key];
        }
    }
    return p;
}

/* The columns and diagonals of a pattern. An A-shape has no scores: the earliest are the best. */
static bool find_lines(const sparge_head *head, int pattern, double budget, lines *x)
{
    const int64_t keys = head->g.k_len, distances = sparge_max(0, head->g.q_len + head->g.offset),
                  sink = (int64_t)head->param[SINK], local = (int64_t)head->param[LOCAL],
                  some = sparge_topk_count((float)budget, distances);
    sparge_ranked *column = sparge_take(head->scratch, keys + 1, sizeof *column);
    sparge_ranked *diagonal = sparge_take(head->scratch, distances + 1, sizeof *diagonal);
    *x =
        (lines){sparge_mask_row_words(keys), distances,
                sparge_take(head->scratch, sparge_mask_row_words(keys) + 1, sizeof(uint32_t)),
                sparge_take(head->scratch, sparge_mask_row_words(distances) + 1, sizeof(uint32_t))};
    if (!column || !diagonal || !x->column || !x->diagonal)
        return false;
    for (int64_t e = 0; e < keys; e++)
        column[e] = (sparge_ranked){e < sink ? INFINITY : 0.0f, e};
    for (int64_t e = 0; e < distances; e++)
        diagonal[e] = (sparge_ranked){e < local ? INFINITY : 0.0f, e};
    if (pattern == VERTICAL_SLASH && !add_last_rows(head, column, diagonal))
        return false;
    sparge_rank(column, keys);
    sparge_rank(diagonal, distances);
    const int64_t columns = (int64_t)((double)some * head->param[COLUMNS]);
    for (int64_t e = 0; e < sparge_min(keys, sparge_max(sink, columns)); e++)
        sparge_mask_row_set(x->column, column[e].at);
    for (int64_t e = 0; e < sparge_min(distances, sparge_max(local, some)); e++)
        sparge_mask_row_set(x->diagonal, distances - 1 - diagonal[e].at);
    return true;
}

static sparge_status keep_lines(const sparge_head *head, const lines *x, sparge_error *error)
{
    const sparge_geometry *g = &head->g;
    const sparge_pairs pairs = sparge_pairs_make(head);
    sparge_status status = pairs.bits ? SPARGE_OK : SPARGE_ERR_MEMORY;
    for (int64_t i = 0; i < g->q_blocks && !status; i++) {
        for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++)
            for (int64_t word = 0; word < x->words; word++)
                pairs.bits[r * pairs.words + word] = line_word(head, x, i * g->block_q + r, word);
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}

/* Means of q and of k. */
typedef struct means {
    float *q, *k;
    sparge_ranked *x; /* of a row of blocks */
} means;

static bool find_means(const sparge_head *head, means *m)
{
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim;
    m->q = sparge_take(head->scratch, g->q_blocks * dim + 1, sizeof *m->q);
    m->k = sparge_take(head->scratch, g->k_blocks * dim + 1, sizeof *m->k);
    m->x = sparge_take(head->scratch, g->k_blocks + 1, sizeof *m->x);
    if (!m->q || !m->k || !m->x)
        return false;
    sparge_method_pool(head->q, g->q_len, dim, g->block_q, true, m->q);
    sparge_method_pool(head->k, g->k_len, dim, g->block_k, true, m->k);
    *head->multiply_adds += (double)(g->q_len + g->k_len) * (double)dim;
    return true;
}

/* The visible blocks of row i, the best first; how many there are. */
static int64_t rank_blocks(const sparge_head *head, const means *m, int64_t i)
{
    const int64_t dim = head->problem->dim, visible = sparge_blocks_visible(&head->g, i);
    for (int64_t j = 0; j < visible; j++)
        m->x[j] = (sparge_ranked){sparge_method_dot(m->q + i * dim, m->k + j * dim, dim), j};
    sparge_rank(m->x, visible);
    *head->multiply_adds += (double)visible * (double)dim;
    return visible;
}

static sparge_status keep_blocks(const sparge_head *head, const means *m)
{
    const sparge_geometry *g = &head->g;
    const int64_t count = sparge_topk_count((float)head->param[BUDGET], g->k_blocks);
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t visible = rank_blocks(head, m, i), diagonal = sparge_first_diagonal(g, i);
        for (int64_t e = 0; e < sparge_min(count, visible); e++)
            sparge_keep(head, i, m->x[e].at);
        if (diagonal + 1 < visible)
            sparge_keep(head, i, diagonal);
    }
    return SPARGE_OK;
}

/* Adds what query t keeps in each pattern with the same number of keys. */
static void weigh(const sparge_head *head, const lines *x, const means *m, int64_t t, float *p,
                  double kept[BLOCK_SPARSE + 1])
{
    const int64_t keys = sparge_keys_of_query(&head->g, t), block = head->g.block_k;
    int64_t count = 0;
    sparge_method_row(head, t, p);
    for (int64_t key = 0; key < keys; key++)
        if (line_word(head, x, t, key >> 5) >> (key & 31) & 1u) {
            kept[VERTICAL_SLASH] += (double)p[key];
            count++;
        }
    const int64_t near = (int64_t)((double)count / (1.0 + head->param[COLUMNS]));
    for (int64_t key = 0; key < keys; key++)
        if (key < count - near || key >= keys - near)
            kept[A_SHAPE] += (double)p[key];
    const int64_t visible = rank_blocks(head, m, t / head->g.block_q);
    for (int64_t e = 0; e < visible && count > 0; e++) {
        const int64_t from = m->x[e].at * block, some = sparge_min(block, keys - from);
        double mass = 0.0;
        for (int64_t key = from; key < from + some; key++)
            mass += (double)p[key];
        if (some > 0) /* of the last block, its share */
            kept[BLOCK_SPARSE] += mass * fmin(1.0, (double)count / (double)some);
        count -= sparge_max(0, some);
    }
}

static int choose(const sparge_head *head)
{
    const int64_t q_len = head->g.q_len, samples = sparge_min(q_len, (int64_t)head->param[LAST]);
    double kept[BLOCK_SPARSE + 1] = {0};
    lines x;
    means m;
    float *p = sparge_take(head->scratch, head->g.k_len + 1, sizeof *p);
    if (!p || !find_means(head, &m) || !find_lines(head, VERTICAL_SLASH, PAPER_BUDGET, &x))
        return CHOOSE;
    for (int64_t e = 1; e <= samples; e++)
        weigh(head, &x, &m, e * q_len / samples - 1, p, kept);
    int best = A_SHAPE;
    for (int pattern = VERTICAL_SLASH; pattern <= BLOCK_SPARSE; pattern++)
        if (kept[pattern] > kept[best])
            best = pattern;
    return best;
}

static sparge_status choose_pattern(const sparge_head *head, sparge_error *error)
{
    (void)error;
    int *pattern = (int *)head->shared + head->h; /* what is kept between calls */
    if (*pattern == CHOOSE)
        *pattern = choose(head);
    return *pattern == CHOOSE ? SPARGE_ERR_MEMORY : SPARGE_OK;
}

static sparge_status keep_pattern(const sparge_head *head, sparge_error *error)
{
    const int *chosen = head->shared,
              pattern = chosen ? chosen[head->h] : (int)head->param[PATTERN];
    lines x;
    means m;
    if (pattern == BLOCK_SPARSE)
        return find_means(head, &m) ? keep_blocks(head, &m) : SPARGE_ERR_MEMORY;
    return find_lines(head, pattern, head->param[BUDGET], &x) ? keep_lines(head, &x, error)
                                                              : SPARGE_ERR_MEMORY;
}

static sparge_status plan_minference(sparge_plan *plan, const sparge_context *context,
                                     const double *param, sparge_error *error)
{
    const int64_t block = (int64_t)param[BLOCK], heads = plan->problem.heads;
    sparge_walk walk = {
        .block_q = block, .block_k = block, .survey = true, .visit = choose_pattern};
    sparge_status status = SPARGE_OK;
    if (param[PATTERN] == CHOOSE)
        status = sparge_state(plan, context, "minference", heads * (int64_t)sizeof(int), NULL,
                              &walk.shared, error);
    if (!status && walk.shared)
        status = sparge_each_head(plan, context, param, &walk, error);
    walk.survey = false;
    walk.visit = keep_pattern;
    return status ? status : sparge_each_head(plan, context, param, &walk, error);
}

const sparge_method sparge_method_minference = {
    .name = "minference",
    .title = "MInference 1.0",
    .paper = "arXiv 2407.02490",
    .repository = "github.com/microsoft/MInference",
    .commit = "fb56c91",
    .kind = "training-free",
    .evidence = "1149317225 of 1149317225 pairs, 208896 of 208896 blocks",
    .needs = SPARGE_NEEDS_CAUSAL,
    .param = {{"budget", 0.0, 1.0, PAPER_BUDGET, false, "share of the diagonals, or of the blocks"},
              {"pattern", 0.0, 3.0, 2.0, true,
               "1 A-shape, 2 vertical-slash, 3 block-sparse, 0 what is best for each head"},
              {"columns", 0.0, 1e4, 1000.0 / 6096.0, false, "columns for each diagonal"},
              {"last", 1.0, 0x1p24, 64.0, true, "last queries, or sampled ones, that estimate"},
              {"sink", 1.0, 0x1p24, 30.0, true, "first columns that are kept always"},
              {"local", 1.0, 0x1p24, 100.0, true, "nearest diagonals that are kept always"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 64.0, true, "tokens of a block"}},
    .plan = plan_minference,
};
