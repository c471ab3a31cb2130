/* SPDX-License-Identifier: Apache-2.0 */
/* curve.c: error and sparsity at every place of the grid, from running sums.
 *
 * The masks of a row are nested: with tau (or topk) growing, key blocks join in the order of S. So
 * are those that lambda leaves: with lambda falling, groups of rows join in the order of their
 * gaps, because a block that lambda skips never holds a maximum, and gaps therefore do not depend
 * on lambda. So one pass over the contributions of blocks.c gives the error at every place. Theta
 * changes which blocks are there from the beginning; thetas between which no block changes sides
 * have one walk. */
#include <stdlib.h>

#include "common/block_mask.h"
#include "common/select.h"
#include "tune/tune.h"

sparge_thresholds tune_thresholds(tune_choice at, bool topk)
{
    const float keep = tune_keep(at.keep);
    return (sparge_thresholds){tune_theta(at.theta), topk ? SPARGE_OFF : keep,
                               topk ? keep : SPARGE_OFF, tune_lambda(at.lambda), 0};
}

tune_choice tune_dense(void) { return (tune_choice){0, TUNE_KEEPS - 1, TUNE_LAMBDAS - 1}; }

/* ---- A walk: blocks join, and the error of what has joined is asked for ---- */

typedef struct walk {
    const tune_input *x;
    const tune_blocks *b;
    int64_t r0, r1; /* rows [r0, r1) of the query block */
    float *o;       /* [rows][dim_v] of the blocks that have joined, not yet divided by the sum */
    sparge_row *state; /* [rows] online softmax over blocks: their lse stand for scores */
    bool changed;
    double error; /* when it was last asked for */
} walk;

static void walk_begin(walk *w, int64_t r0, int64_t r1)
{
    const int64_t dim_v = w->x->problem.dim_v;
    w->r0 = r0;
    w->r1 = r1;
    w->changed = true;
    memset(&w->o[r0 * dim_v], 0, (size_t)((r1 - r0) * dim_v) * sizeof *w->o);
    for (int64_t r = r0; r < r1; r++)
        w->state[r] = sparge_row_empty();
}

static void walk_join(walk *w, int64_t j)
{
    const int64_t dim_v = w->x->problem.dim_v;
    const float *from = tune_block_o(w->b, j, dim_v), *lse = tune_block_lse(w->b, j);
    for (int64_t r = w->r0; r < w->r1; r++) {
        const float score = lse[r] * SPARGE_LOG2E;
        if (score == -INFINITY) /* the row sees no key of the block */
            continue;
        const float shrink = sparge_row_update_max(&w->state[r], score);
        const float weight = sparge_exp2(score - w->state[r].max);
        w->state[r].sum += weight;
        for (int64_t c = 0; c < dim_v; c++)
            w->o[r * dim_v + c] = w->o[r * dim_v + c] * shrink + weight * from[r * dim_v + c];
    }
    w->changed = true;
}

/* sum|o * scale - want| */
static float distance(const float *o, float scale, const float *want, int64_t n)
{
    float partial[16] = {0};
    int64_t c = 0;
    for (; c + 16 <= n; c += 16)
        for (int lane = 0; lane < 16; lane++)
            partial[lane] += fabsf(o[c + lane] * scale - want[c + lane]);
    for (int lane = 0; c + lane < n; lane++)
        partial[lane] += fabsf(o[c + lane] * scale - want[c + lane]);
    return sparge_sum_of(partial);
}

static double walk_error(walk *w)
{
    const int64_t dim_v = w->x->problem.dim_v;
    if (!w->changed)
        return w->error;
    w->changed = false;
    w->error = 0.0;
    for (int64_t r = w->r0; r < w->r1; r++) {
        const float norm = sparge_row_norm(&w->state[r]);
        w->error +=
            (double)distance(&w->o[r * dim_v], norm, &w->x->want[(w->b->first + r) * dim_v], dim_v);
    }
    return w->error;
}

/* ---- What both curves hold while they walk ---- */

/* A finite score of S[i,:]. */
typedef struct scored {
    float s;
    int64_t j;
} scored;

/* A block and a group of rows that joins at a step. */
typedef struct entry {
    int64_t j;
    int step;
} entry;

typedef struct walker {
    tune_input *x;
    tune_blocks blocks;
    walk walk;
    bool q_similar, *k_similar; /* [k_blocks] of the query block at hand under one theta */
    scored *order;              /* [finite] the better ones first */
    int64_t finite;
    uint32_t *kept;  /* [words] forced blocks first */
    bool *before;    /* [k_blocks + 1] under the theta before: k_similar, and q_similar */
    tune_point *row; /* [TUNE_KEEPS] of one query block under one theta */
    entry *entry;    /* [k_blocks] */
} walker;

static void walker_free(walker *w)
{
    tune_blocks_free(&w->blocks);
    free(w->walk.o);
    free(w->walk.state);
    free(w->k_similar);
    free(w->order);
    free(w->kept);
    free(w->before);
    free(w->row);
    free(w->entry);
}

static sparge_status walker_make(walker *w, tune_input *x, sparge_error *error)
{
    const size_t rows = (size_t)x->g.block_q, blocks = (size_t)x->g.k_blocks + 1;
    const size_t words = (size_t)sparge_mask_row_words(x->g.k_blocks) + 1;
    *w = (walker){
        .x = x,
        .walk = {.x = x,
                 .o = malloc(rows * (size_t)x->problem.dim_v * sizeof(float)),
                 .state = malloc(rows * sizeof(sparge_row))},
        .k_similar = malloc(blocks * sizeof(bool)),
        .order = malloc(blocks * sizeof(scored)),
        .kept = malloc(words * sizeof(uint32_t)),
        .before = calloc(blocks, sizeof(bool)),
        .row = malloc(TUNE_KEEPS * sizeof(tune_point)),
        .entry = malloc(blocks * sizeof(entry)),
    };
    const bool made = w->walk.o && w->walk.state && w->k_similar && w->order && w->kept &&
                      w->before && w->row && w->entry;
    sparge_status status = made ? tune_blocks_make(&w->blocks, x, error) : SPARGE_ERR_MEMORY;
    w->walk.b = &w->blocks;
    if (status)
        walker_free(w);
    return status;
}

static int best_first(const void *a, const void *b)
{
    const scored *x = a, *y = b;
    return sparge_comes_before(x->s, x->j, y->s, y->j) ? -1 : 1;
}

/* Query block i under one theta: what is similar, what is kept whatever tau or topk, the order of
 * the rest. Returns how many key blocks are visible. */
static int64_t order_row(walker *w, int64_t i, float theta)
{
    const tune_input *x = w->x;
    const sparge_geometry *g = &x->g;
    const int64_t visible = sparge_blocks_visible(g, i), diagonal = sparge_first_diagonal(g, i);
    w->q_similar = sparge_is_similar(true, x->q_sim[i], theta);
    w->finite = 0;
    memset(w->kept, 0, (size_t)sparge_mask_row_words(g->k_blocks) * sizeof *w->kept);
    for (int64_t j = 0; j < visible; j++) {
        const float s = x->s[i * g->k_blocks + j];
        w->k_similar[j] = sparge_is_similar(true, x->k_sim[j], theta);
        if (sparge_forced(w->q_similar, w->k_similar[j], sparge_finite(s), j >= diagonal,
                          x->o->sink && j == 0))
            sparge_mask_row_set(w->kept, j);
        if (w->k_similar[j] && sparge_finite(s))
            w->order[w->finite++] = (scored){s, j};
    }
    qsort(w->order, (size_t)w->finite, sizeof *w->order, best_first);
    return visible;
}

/* ---- By tau, or by topk ---- */

/* How many blocks of a row's order are kept at each place of the grid in turn. */
typedef struct prefix {
    const walker *w;
    int64_t visible;
    uint64_t total, mass; /* mass: of the first `count` and the next */
    int64_t count;
} prefix;

static uint64_t mass_of(const walker *w, int64_t n)
{
    return n < w->finite ? sparge_mass(w->order[n].s, w->order[0].s) : 0;
}

static prefix prefix_begin(const walker *w, int64_t visible)
{
    prefix x = {.w = w, .visible = visible, .mass = mass_of(w, 0)};
    for (int64_t n = 0; n < w->finite; n++)
        x.total += mass_of(w, n);
    return x;
}

/* Thresholds ask for no less than before. */
static int64_t prefix_at(prefix *x, const sparge_thresholds *thresholds)
{
    int64_t count = 0;
    if (thresholds->topk != SPARGE_OFF)
        count = sparge_topk_count(thresholds->topk, x->visible);
    else {
        const double limit = sparge_mass_limit(thresholds->tau, x->total);
        while (x->count < x->w->finite && (double)x->mass <= limit)
            x->mass += mass_of(x->w, ++x->count);
        count = sparge_max(1, x->count);
    }
    return sparge_min(x->w->finite, count);
}

/* w->row: the query block at hand under the theta of its order. */
static void walk_keeps(walker *w, int64_t visible, int theta, bool topk)
{
    walk *all = &w->walk;
    walk_begin(all, 0, w->blocks.rows);
    int64_t kept = 0, placed = 0;
    for (int64_t j = sparge_mask_row_next(w->kept, 0, visible); j < visible;
         j = sparge_mask_row_next(w->kept, j + 1, visible), kept++)
        walk_join(all, j);
    prefix x = prefix_begin(w, visible);
    for (int n = 0; n < TUNE_KEEPS; n++) {
        const sparge_thresholds thresholds = tune_thresholds((tune_choice){theta, n, 0}, topk);
        for (const int64_t count = prefix_at(&x, &thresholds); placed < count; placed++) {
            const int64_t j = w->order[placed].j;
            if (sparge_mask_row_get(w->kept, j))
                continue;
            walk_join(all, j);
            kept++;
        }
        w->row[n] = (tune_point){walk_error(all), (double)kept};
    }
}

/* Is some block similar that was not under the theta before, or the other way round? (If Q_i is
 * not, before and now, every block is kept whatever it is itself.) Keeps what is for the next
 * theta. */
static bool changes_sides(walker *w, int64_t visible)
{
    const size_t bytes = (size_t)visible * sizeof *w->before;
    const bool changes = w->q_similar != w->before[visible] ||
                         (w->q_similar && memcmp(w->k_similar, w->before, bytes) != 0);
    memcpy(w->before, w->k_similar, bytes);
    w->before[visible] = w->q_similar;
    return changes;
}

sparge_status tune_mask_curve(tune_input *x, bool topk, tune_point *point, const tune_watch *watch,
                              sparge_error *error)
{
    walker w;
    sparge_status status = walker_make(&w, x, error);
    if (status)
        return status;
    memset(point, 0, TUNE_THETAS * TUNE_KEEPS * sizeof *point);
    for (int64_t i = 0; i < x->g.q_blocks && !status; i++) {
        status = tune_blocks_load(&w.blocks, x, i, NULL, error);
        for (int theta = 0; theta < TUNE_THETAS && !status; theta++) {
            const int64_t visible = order_row(&w, i, tune_theta(theta));
            if (changes_sides(&w, visible) || theta == 0)
                walk_keeps(&w, visible, theta, topk);
            for (int n = 0; n < TUNE_KEEPS; n++) {
                point[theta * TUNE_KEEPS + n].error += w.row[n].error;
                point[theta * TUNE_KEEPS + n].kept += w.row[n].kept;
            }
        }
        if (!watch->tick(watch->user, 1.0))
            break;
    }
    walker_free(&w);
    return status;
}

/* ---- By lambda ---- */

static int by_step(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->step != y->step)
        return x->step < y->step ? -1 : 1;
    return x->j < y->j ? -1 : 1;
}

/* The first lambda of the grid, downward, that does not skip a group with this gap. */
static int step_of(float gap)
{
    int low = 0, high = TUNE_LAMBDAS - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (sparge_group_skips(gap, tune_lambda(middle)))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Adds rows [r0, r1) of the query block at hand to the curve. */
static void walk_lambdas(walker *w, const uint32_t *kept, int64_t r0, int64_t r1, tune_point *point)
{
    const tune_blocks *b = &w->blocks;
    const double part = (double)(r1 - r0) / (double)b->rows;
    sparge_row *state = w->walk.state; /* running maxima, before the walk begins */
    int64_t entries = 0;
    for (int64_t r = r0; r < r1; r++)
        state[r] = sparge_row_empty();
    for (int64_t j = sparge_mask_row_next(kept, 0, b->visible); j < b->visible;
         j = sparge_mask_row_next(kept, j + 1, b->visible)) {
        const float *local = tune_block_m(b, j);
        float gap = -INFINITY;
        for (int64_t r = r0; r < r1; r++)
            gap = fmaxf(gap, sparge_row_gap(&state[r], local[r], local[r] > -INFINITY));
        for (int64_t r = r0; r < r1; r++)
            state[r].max = fmaxf(state[r].max, local[r]);
        w->entry[entries++] = (entry){j, step_of(gap)};
    }
    qsort(w->entry, (size_t)entries, sizeof *w->entry, by_step);
    walk_begin(&w->walk, r0, r1);
    int64_t placed = 0;
    for (int n = 0; n < TUNE_LAMBDAS; n++) {
        for (; placed < entries && w->entry[placed].step <= n; placed++)
            walk_join(&w->walk, w->entry[placed].j);
        point[n].error += walk_error(&w->walk);
        point[n].kept += part * (double)placed;
    }
}

sparge_status tune_lambda_curve(tune_input *x, const sparge_thresholds *thresholds,
                                tune_point *point, double *mask_kept, const tune_watch *watch,
                                sparge_error *error)
{
    walker w;
    sparge_status status = walker_make(&w, x, error);
    if (status)
        return status;
    memset(point, 0, TUNE_LAMBDAS * sizeof *point);
    *mask_kept = 0.0;
    for (int64_t i = 0; i < x->g.q_blocks && !status; i++) {
        const int64_t visible = order_row(&w, i, thresholds->theta);
        prefix best = prefix_begin(&w, visible);
        for (int64_t n = prefix_at(&best, thresholds); n > 0; n--)
            sparge_mask_row_set(w.kept, w.order[n - 1].j);
        *mask_kept += (double)sparge_mask_row_count(w.kept, visible);
        status = tune_blocks_load(&w.blocks, x, i, w.kept, error);
        for (int64_t r = 0; r < w.blocks.rows && !status; r += x->o->skip_rows)
            walk_lambdas(&w, w.kept, r, sparge_min(w.blocks.rows, r + x->o->skip_rows), point);
        if (!watch->tick(watch->user, 0.0))
            break;
    }
    walker_free(&w);
    return status;
}
