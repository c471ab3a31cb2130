/* SPDX-License-Identifier: Apache-2.0 */
/* masses.c: a straightforward predictor in double beside that of cells and min_mass, over random
 * inputs. It asks every token pair whether it is visible, forms the Gram matrix of every block,
 * takes means in double, exponentiates with exp() and sums probabilities, not integers. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/ref/hand.h"
#include "tests/ref/scene.h"

TestSuite(masses);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

/* ---- What one head should give ----------------------------------------------------------------
 */

typedef struct judged {
    int64_t q_blocks, k_blocks;
    double *q, *k, *mean; /* tokens, k less its mean key; what is not finite is 0 */
    verdict *similar_q, *similar_k;
    /* Of a row, [k_blocks]: */
    bool *visible, *last; /* some query sees it; it holds the last key that some query sees */
    double *mass, *rank;  /* -inf: not visible, or out of the softmax; what it is ordered by */
    verdict *row;         /* whether it is kept */
    int64_t *order;       /* those that have a mass, the best first */
} judged;

static double *centered(const float *x, const double *mean, int64_t tokens, int64_t dim)
{
    double *y = calloc((size_t)(tokens * dim) + 1, sizeof *y);
    for (int64_t e = 0; e < tokens * dim; e++)
        y[e] = isfinite(x[e]) ? (double)x[e] - mean[e % dim] : 0;
    return y;
}

static judged judged_make(const scene *s, int64_t b, int64_t h, float theta)
{
    const sparge_problem *p = &s->p;
    const int64_t dim = p->dim, block_q = s->o.block_q, block_k = s->o.block_k;
    const float *q = tensor_row(&s->q, b, h, 0),
                *k = tensor_row(&s->k, b, h / (p->heads / p->kv_heads), 0);
    judged w = {.q_blocks = blocks(p->q_len, block_q), .k_blocks = blocks(p->k_len, block_k)};
    const size_t n = (size_t)w.k_blocks + 1;
    double sim, pool[SPARGE_MAX_DIM];
    w.mean = calloc((size_t)dim, sizeof *w.mean);
    w.q = centered(q, w.mean, p->q_len, dim);
    for (int64_t e = 0; e < p->k_len * dim && s->o.smooth_k; e++)
        w.mean[e % dim] += isfinite(k[e]) ? (double)k[e] / (double)p->k_len : 0;
    w.k = centered(k, w.mean, p->k_len, dim);
    w.similar_q = calloc((size_t)w.q_blocks + 1, sizeof *w.similar_q);
    w.similar_k = calloc(n, sizeof *w.similar_k);
    for (int64_t i = 0; i < w.q_blocks; i++)
        w.similar_q[i] =
            judge_block(q + i * block_q * dim, NULL, least(block_q, p->q_len - i * block_q), dim,
                        theta, pool, &sim);
    for (int64_t j = 0; j < w.k_blocks; j++)
        w.similar_k[j] =
            judge_block(k + j * block_k * dim, w.mean, least(block_k, p->k_len - j * block_k), dim,
                        theta, pool, &sim);
    w.visible = calloc(n, sizeof *w.visible);
    w.last = calloc(n, sizeof *w.last);
    w.mass = calloc(n, sizeof *w.mass);
    w.rank = calloc(n, sizeof *w.rank);
    w.row = calloc(n, sizeof *w.row);
    w.order = calloc(n, sizeof *w.order);
    return w;
}

static void judged_free(judged *w)
{
    free(w->q), free(w->k), free(w->mean), free(w->similar_q), free(w->similar_k);
    free(w->visible), free(w->last), free(w->mass), free(w->rank), free(w->row), free(w->order);
}

/* ---- Masses -----------------------------------------------------------------------------------
 */

static bool some_pair(const scene *s, int64_t q, int64_t end_q, int64_t k, int64_t end_k)
{
    for (int64_t t = q; t < end_q; t++)
        for (int64_t key = k; key < end_k; key++)
            if (sees(s, t, key))
                return true;
    return false;
}

/* The score of the mean of queries [q, end_q) and that of keys [k, end_k). */
static double score(const scene *s, const judged *w, int64_t q, int64_t end_q, int64_t k,
                    int64_t end_k)
{
    const int64_t dim = s->p.dim;
    double sum = 0;
    for (int64_t c = 0; c < dim; c++) {
        double mean_q = 0, mean_k = 0;
        for (int64_t t = q; t < end_q; t++)
            mean_q += w->q[t * dim + c] / (double)(end_q - q);
        for (int64_t t = k; t < end_k; t++)
            mean_k += w->k[t * dim + c] / (double)(end_k - k);
        sum += mean_q * mean_k;
    }
    return (double)s->o.softmax_scale * sum;
}

/* Masses are counted in integers, of which there are so many for a query; what is surely less than
 * one is none. */
static const double units = 0x1p20;

/* What queries [q, end_q), which stand for one, pay to the blocks. Without cells only those that
 * are similar are paid. Returns for how many queries. */
static double pay(const scene *s, judged *w, int64_t q, int64_t end_q)
{
    const int64_t cell = s->o.cell ? s->o.cell : s->o.block_k, keys = s->p.k_len,
                  cells = blocks(keys, cell), in_block = s->o.block_k / cell;
    double *x = calloc((size_t)cells + 1, sizeof *x), most = -INFINITY, total = 0;
    for (int64_t n = 0; n < cells; n++) {
        const int64_t k = n * cell, end_k = least(keys, k + cell), j = n / in_block;
        const bool paid =
            some_pair(s, q, end_q, k, end_k) && (s->o.cell || w->similar_k[j] != DROP);
        x[n] = paid ? score(s, w, q, end_q, k, end_k) : -INFINITY;
        w->mass[j] = fmax(w->mass[j], paid ? 0 : -INFINITY);
        w->rank[j] = x[n]; /* without cells */
        most = fmax(most, x[n]);
    }
    for (int64_t n = 0; n < cells; n++)
        total += most > -INFINITY ? exp(x[n] - most) : 0;
    for (int64_t j = 0; j < w->k_blocks && total > 0; j++) {
        double mass = 0;
        for (int64_t n = j * in_block; n < least(cells, (j + 1) * in_block); n++)
            mass += (double)(end_q - q) * exp(x[n] - most) / total;
        w->mass[j] += s->o.cell && mass * units < 0.5 ? 0 : mass;
    }
    free(x);
    return total > 0 ? (double)(end_q - q) : 0;
}

static void weigh(const scene *s, judged *w, int64_t first, int64_t end)
{
    const int64_t cell = s->o.cell ? s->o.cell : s->o.block_q;
    double queries = 0;
    for (int64_t j = 0; j < w->k_blocks; j++)
        w->mass[j] = w->rank[j] = -INFINITY;
    for (int64_t q = first; q < end; q += cell)
        queries += pay(s, w, q, least(end, q + cell));
    for (int64_t j = 0; j < w->k_blocks; j++) {
        w->mass[j] /= queries > 0 ? queries : 1;
        w->rank[j] = s->o.cell ? w->mass[j] : w->rank[j];
    }
}

/* ---- Masks ------------------------------------------------------------------------------------
 */

static double near_mass(const scene *s, const judged *w)
{
    return near_threshold + (s->o.cell ? (double)w->k_blocks / units : 0);
}

static int64_t order(judged *w)
{
    int64_t count = 0;
    for (int64_t j = 0; j < w->k_blocks; j++) {
        if (!(w->mass[j] >= 0))
            continue;
        int64_t place = count++;
        for (; place > 0 && w->rank[w->order[place - 1]] < w->rank[j]; place--)
            w->order[place] = w->order[place - 1];
        w->order[place] = j;
    }
    return count;
}

static void unite(verdict *to, verdict by)
{
    *to = *to == KEEP || by == KEEP ? KEEP : *to == OPEN || by == OPEN ? OPEN : DROP;
}

/* The first `kept` of the order, beside what is open; `by` is empty afterwards. */
static void keep_first(const scene *s, judged *w, int64_t count, int64_t kept, verdict *by)
{
    for (int64_t n = 0; n < kept; n++)
        by[w->order[n]] = by[w->order[n]] == OPEN ? OPEN : KEEP;
    open_beside(w->rank, w->order, count, kept, s->o.cell ? 2 / units : near_threshold, by);
    for (int64_t j = 0; j < w->k_blocks; j++)
        unite(&w->row[j], by[j]);
    memset(by, 0, (size_t)w->k_blocks * sizeof *by);
}

static void choose(const scene *s, judged *w, const sparge_thresholds *wanted)
{
    const int64_t count = order(w);
    const double tau = (double)wanted->tau, topk = (double)wanted->topk;
    verdict *by = calloc((size_t)w->k_blocks + 1, sizeof *by);
    const double near = near_mass(s, w);
    double mass = 0;
    int64_t kept = 0, visible = 0;
    for (int64_t n = 0; n < count && tau >= 0; n++) {
        mass += w->mass[w->order[n]];
        kept += kept == n && (n == 0 || tau >= 1 || mass <= tau);
        if (n > 0 && tau < 1 && fabs(mass - tau) <= near)
            by[w->order[n]] = OPEN;
    }
    if (tau >= 0)
        keep_first(s, w, count, kept, by);
    for (int64_t j = 0; j < w->k_blocks; j++)
        visible += w->visible[j];
    if (topk >= 0)
        keep_first(s, w, count,
                   least(count, (int64_t)fmax(1, floor(topk * (double)visible + 1e-5))), by);
    for (int64_t n = 0; n < count && wanted->min_mass > 0; n++) {
        const double off = w->mass[w->order[n]] - (double)wanted->min_mass / (double)w->k_blocks;
        unite(&w->row[w->order[n]], fabs(off) <= near ? OPEN : off > 0 ? KEEP : DROP);
    }
    free(by);
}

static void look(const scene *s, judged *w, int64_t first, int64_t end)
{
    memset(w->visible, 0, (size_t)w->k_blocks * sizeof *w->visible);
    memset(w->last, 0, (size_t)w->k_blocks * sizeof *w->last);
    for (int64_t t = first; t < end; t++) {
        int64_t latest = -1;
        for (int64_t key = 0; key < s->p.k_len; key++)
            if (sees(s, t, key))
                w->visible[(latest = key) / s->o.block_k] = true;
        if (latest >= 0 && s->o.causal != SPARGE_CAUSAL_NONE)
            w->last[latest / s->o.block_k] = true;
    }
}

static void judge_row(const scene *s, judged *w, const sparge_thresholds *wanted, int64_t i)
{
    const int64_t first = i * s->o.block_q, end = least(s->p.q_len, first + s->o.block_q);
    bool unsure = w->similar_q[i] == OPEN;
    look(s, w, first, end);
    weigh(s, w, first, end);
    memset(w->row, 0, (size_t)w->k_blocks * sizeof *w->row);
    choose(s, w, wanted);
    for (int64_t j = 0; j < w->k_blocks; j++)
        unsure = unsure || (!s->o.cell && w->visible[j] && w->similar_k[j] == OPEN);
    for (int64_t j = 0; j < w->k_blocks; j++) {
        if (unsure)
            w->row[j] = OPEN;
        unite(&w->row[j], w->similar_k[j] == OPEN ? OPEN : DROP);
        if (w->similar_q[i] == DROP || w->similar_k[j] == DROP || w->last[j] ||
            (s->o.sink && j == 0))
            w->row[j] = KEEP;
        if (!w->visible[j])
            w->row[j] = DROP;
    }
}

/* ---- Beside the reference ---------------------------------------------------------------------
 */

typedef struct tally {
    int64_t decided, open, kept, dropped;
    double mass; /* the largest distance seen */
} tally;

static void compare(const scene *s, tally *sum)
{
    const sparge_problem *p = &s->p;
    const int64_t q_blocks = blocks(p->q_len, s->o.block_q),
                  k_blocks = blocks(p->k_len, s->o.block_k), lines = p->batch * p->heads;
    float *masses = check_alloc((size_t)(lines * q_blocks * k_blocks) * sizeof *masses);
    sparge_mask mask = predicted(p, &s->o, &(sparge_intermediates){.s = masses});
    for (int64_t line = 0; line < lines * q_blocks; line++) {
        const int64_t n = line / q_blocks, b = n / p->heads, h = n % p->heads;
        const sparge_thresholds *wanted = s->o.per_head ? &s->o.per_head[h] : &s->o.thresholds;
        judged w = judged_make(s, b, h, wanted->theta);
        judge_row(s, &w, wanted, line % q_blocks);
        if (s->o.cell)
            worst("mass", b, h, masses + line * k_blocks, w.mass, k_blocks, near_mass(s, &w),
                  &sum->mass);
        for (int64_t j = 0; j < k_blocks; j++) {
            const bool got = bit(&mask, line, j);
            check(w.row[j] == OPEN || got == (w.row[j] == KEEP),
                  "row %lld, key block %lld is %s; blocks %lld x %lld, cells of %lld, causal %d, "
                  "mass %.9g",
                  (long long)line, (long long)j, got ? "kept" : "dropped", (long long)s->o.block_q,
                  (long long)s->o.block_k, (long long)s->o.cell, (int)s->o.causal, w.mass[j]);
            sum->open += w.row[j] == OPEN;
            sum->decided += w.row[j] != OPEN;
            sum->kept += got;
            sum->dropped += !got;
        }
        judged_free(&w);
    }
    check_free(masses);
    check_free(mask.bits);
}

/* A min_mass more often than not, and a tau and a topk beside it less often than in predict.c. */
static sparge_thresholds with_min_mass(sparge_thresholds t)
{
    const float min_mass[] = {0.05f, 0.2f, 0.5f, 0.9f, 1, 1.5f, 4};
    t.min_mass = check_int(0, 3) ? one_of(min_mass, COUNT(min_mass)) : 0;
    if (t.min_mass > 0 && check_int(0, 2)) {
        t.tau = check_int(0, 3) ? SPARGE_OFF : t.tau;
        t.topk = check_int(0, 3) ? SPARGE_OFF : t.topk;
    }
    return t;
}

/* A divisor of both blocks, or 0. */
static int64_t some_cell(const sparge_options *o)
{
    int64_t cell = check_int(0, 4) ? check_int(1, least(o->block_q, o->block_k)) : 0;
    while (cell && (o->block_q % cell || o->block_k % cell || o->block_k / cell > 64))
        cell = cell < o->block_q ? cell + 1 : 1;
    return cell;
}

static void sweep(const char *what, int64_t cases)
{
    tally sum = {0};
    for (int64_t n = 0; n < cases; n++) {
        check_case("%s %lld", what, (long long)n);
        scene s = some_scene();
        s.o.cell = some_cell(&s.o);
        if (s.o.cell) /* few masses are so small that integers hardly tell them apart */
            s.o.softmax_scale *= check_uniform(0.1f, 0.5f);
        s.o.thresholds = with_min_mass(s.o.thresholds);
        for (int64_t h = 0; h < s.p.heads; h++)
            s.per_head[h] = with_min_mass(s.per_head[h]);
        s.o.per_head = check_int(0, 2) ? NULL : s.per_head;
        compare(&s, &sum);
        discard(&s);
    }
    cr_log_info("%s: %lld decisions, %lld too near to call; mass %.2g", what,
                (long long)sum.decided, (long long)sum.open, sum.mass);
    check(sum.open * 100 <= sum.decided, "%lld of %lld decisions are open", (long long)sum.open,
          (long long)sum.decided);
    check(sum.kept > cases && sum.dropped > cases,
          "%lld kept, %lld dropped: the cases test nothing", (long long)sum.kept,
          (long long)sum.dropped);
}

Test(masses, agree_with_a_predictor_in_double) { sweep("random", 150); }
Test(masses, agree_with_a_predictor_in_double_again) { sweep("more", 150); }
