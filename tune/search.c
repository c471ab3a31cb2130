/* SPDX-License-Identifier: Apache-2.0 */
/* search.c: chooses thresholds from the curves, judges them by whole calls of attention, and backs
 * off if an input that was held out exceeds l2. */
#include <stdlib.h>

#include "tune/tune.h"

/* A lambda curve that was asked for, over the mask of one (theta, keep). */
typedef struct lambda_curve {
    tune_choice at;
    tune_point point[TUNE_LAMBDAS];
    struct lambda_curve *next;
} lambda_curve;

typedef struct head {
    const tune_task *task;
    const sparge_tune_options *how;
    int64_t count, tuned;  /* of the task */
    tune_input *input;     /* [count] */
    tune_point **mask;     /* [count] curves, made when they are asked for */
    lambda_curve **lambda; /* [count] lists of them */
    sparge_status status;  /* of the first step that failed; the later ones do nothing */
    sparge_error error;
    bool stopped;
} head;

/* Is there time for more? */
static bool tick(void *user, double work)
{
    head *h = user;
    h->stopped |= !h->task->watch.tick(h->task->watch.user, work);
    return !h->stopped;
}

static bool goes_on(const head *h) { return !h->status && !h->stopped; }

static const tune_point *mask_curve(head *h, int64_t n)
{
    if (h->mask[n] || !goes_on(h))
        return h->mask[n];
    tune_point *point = malloc((size_t)TUNE_THETAS * TUNE_KEEPS * sizeof *point);
    const tune_watch watch = {tick, h};
    h->status = point ? tune_mask_curve(&h->input[n], h->how->topk, point, &watch, &h->error)
                      : SPARGE_ERR_MEMORY;
    if (!goes_on(h)) {
        free(point);
        return NULL;
    }
    return h->mask[n] = point;
}

static const lambda_curve *lambda_curve_at(head *h, int64_t n, tune_choice at)
{
    for (lambda_curve *c = h->lambda[n]; c; c = c->next)
        if (c->at.theta == at.theta && c->at.keep == at.keep)
            return c;
    if (!goes_on(h))
        return NULL;
    lambda_curve *c = malloc(sizeof *c);
    const tune_watch watch = {tick, h};
    const sparge_thresholds thresholds = tune_thresholds(at, h->how->topk);
    double kept;
    h->status = c ? tune_lambda_curve(&h->input[n], &thresholds, c->point, &kept, &watch, &h->error)
                  : SPARGE_ERR_MEMORY;
    if (!goes_on(h)) {
        free(c);
        return NULL;
    }
    c->at = at;
    c->next = h->lambda[n];
    return h->lambda[n] = c;
}

static const tune_point *point_at(const head *h, int64_t n, tune_choice at)
{
    return &h->mask[n][at.theta * TUNE_KEEPS + at.keep];
}

/* ---- Folds: what is tuned on what ---- */

/* Tunes on the first `tuned` samples but those in [from, to), which it is judged on. */
typedef struct fold {
    int64_t from, to;
    tune_choice choice;
} fold;

static bool tunes_on(const fold *f, int64_t n) { return n < f->from || n >= f->to; }

/* ---- Choosing ---- */

/* Of a mask on the samples of a fold, lambda being off. */
typedef struct merit {
    double sparsity, error; /* the mean; the error that is bounded */
} merit;

/* The error of some samples that is bounded: of the mean, or of the worst. */
typedef struct bounded {
    bool mean;
    double sum, worst;
    int64_t samples;
} bounded;

static void bounded_add(bounded *b, double error)
{
    b->sum += error;
    b->worst = fmax(b->worst, error);
    b->samples++;
}

static double bounded_error(const bounded *b)
{
    return b->samples == 0 ? 0.0 : b->mean ? b->sum / (double)b->samples : b->worst;
}

static merit merit_of(const head *h, const fold *f, tune_choice at)
{
    bounded error = {.mean = h->how->mean};
    double sparsity = 0.0;
    for (int64_t n = 0; n < h->tuned; n++)
        if (tunes_on(f, n)) {
            const tune_point *p = point_at(h, n, at);
            sparsity += 1.0 - p->kept / h->input[n].pairs;
            bounded_add(&error, tune_relative(&h->input[n], p->error));
        }
    return (merit){sparsity / (double)error.samples, bounded_error(&error)};
}

static bool better(const sparge_tune_options *how, merit a, merit than)
{
    if (how->sparsity >
        0.0) { /* the least error of those that are sparse enough, or else the sparsest */
        const double enough = how->sparsity - 1e-9; /* 1 - 28/35 is a little less than 0.2 */
        if ((a.sparsity >= enough) != (than.sparsity >= enough))
            return a.sparsity >= enough;
        return a.sparsity >= enough ? a.error < than.error : a.sparsity > than.sparsity;
    }
    if (!(a.error < how->l1))
        return false;
    return a.sparsity != than.sparsity ? a.sparsity > than.sparsity : a.error < than.error;
}

/* Dense, unless some mask is better than that. */
static void choose_mask(head *h, fold *f)
{
    for (int64_t n = 0; n < h->tuned; n++)
        if (tunes_on(f, n) && !mask_curve(h, n))
            return;
    f->choice = tune_dense();
    merit best = merit_of(h, f, f->choice);
    best.sparsity = 0.0;
    for (int theta = 0; theta < TUNE_THETAS; theta++)
        for (int keep = 0; keep < TUNE_KEEPS; keep++) {
            const tune_choice at = {theta, keep, TUNE_LAMBDAS - 1};
            const merit m = merit_of(h, f, at);
            if (m.sparsity > 0.0 && better(h->how, m, best)) {
                best = m;
                f->choice = at;
            }
        }
}

static bool is_dense(tune_choice at)
{
    return at.keep == TUNE_KEEPS - 1 && at.lambda == TUNE_LAMBDAS - 1;
}

/* Does this lambda skip anything on the samples of the fold? */
static bool skips(head *h, const fold *f, int lambda)
{
    bool skips = false;
    for (int64_t n = 0; n < h->tuned; n++)
        if (tunes_on(f, n)) {
            const tune_point *point = lambda_curve_at(h, n, f->choice)->point;
            skips |= point[lambda].kept < point[TUNE_LAMBDAS - 1].kept;
        }
    return skips;
}

/* The largest lambda that holds l2 on the samples of the fold, if it skips anything. */
static void choose_lambda(head *h, fold *f)
{
    for (int64_t n = 0; n < h->tuned; n++)
        if (tunes_on(f, n) && !lambda_curve_at(h, n, f->choice))
            return;
    for (int lambda = 0; lambda < TUNE_LAMBDAS; lambda++) {
        bounded error = {.mean = h->how->mean};
        for (int64_t n = 0; n < h->tuned; n++)
            if (tunes_on(f, n))
                bounded_add(&error,
                            tune_relative(&h->input[n],
                                          lambda_curve_at(h, n, f->choice)->point[lambda].error));
        if (bounded_error(&error) < h->how->l2) {
            f->choice.lambda = skips(h, f, lambda) ? lambda : TUNE_LAMBDAS - 1;
            return;
        }
    }
}

/* ---- Judging ---- */

static void judge(head *h, const sparge_thresholds *thresholds, int64_t n, sparge_tune_errors *e)
{
    tune_call call;
    if (!goes_on(h) || !tick(h, 0.0))
        return;
    h->status = tune_evaluate(&h->input[n], thresholds, &call, &h->error);
    const double before = (double)e->inputs++;
    e->mean = before > 0.0 ? (e->mean * before + call.l1) / (before + 1.0) : call.l1;
    e->worst = before > 0.0 ? fmax(e->worst, call.l1) : call.l1;
    e->sparsity = (e->sparsity * before + call.sparsity) / (before + 1.0);
    e->nan += call.nan;
    e->inf += call.inf;
}

static sparge_tune_errors nothing_judged(void)
{
    return (sparge_tune_errors){.mean = NAN, .worst = NAN};
}

/* How far a choice is backed off: places of the grid, toward keeping more. */
typedef struct back_off {
    int keep, lambda;
} back_off;

static tune_choice backed_off(tune_choice at, back_off by)
{
    at.keep = (int)sparge_min(TUNE_KEEPS - 1, at.keep + by.keep);
    at.lambda = (int)sparge_min(TUNE_LAMBDAS - 1, at.lambda + by.lambda);
    return at;
}

/* The errors of what is chosen on all samples, and of what each fold chose on those that it did not
 * see, all backed off so far. */
static void judge_all(head *h, const fold *final, const fold *folds, int64_t count, back_off by,
                      sparge_tuned *t)
{
    const sparge_thresholds chosen = tune_thresholds(backed_off(final->choice, by), h->how->topk);
    t->in_sample = t->held_out = nothing_judged();
    for (int64_t n = 0; n < h->tuned; n++)
        judge(h, &chosen, n, &t->in_sample);
    for (const fold *f = folds; f < folds + count; f++) {
        const sparge_thresholds thresholds =
            tune_thresholds(backed_off(f->choice, by), h->how->topk);
        for (int64_t n = f->from; n < f->to; n++)
            judge(h, &thresholds, n, &t->held_out);
    }
}

static bool within(const sparge_tune_options *how, const sparge_tune_errors *e)
{
    return e->inputs == 0 || (how->mean ? e->mean : e->worst) <= how->l2;
}

static bool holds(const sparge_tune_options *how, const sparge_tuned *t)
{
    return how->sparsity > 0.0 || (within(how, &t->in_sample) && within(how, &t->held_out));
}

/* ---- Backing off ---- */

/* What the curves say of a choice; infinity where there is no time for them. */
static double known_error(head *h, int64_t n, tune_choice at)
{
    if (at.lambda == TUNE_LAMBDAS - 1)
        return mask_curve(h, n) ? tune_relative(&h->input[n], point_at(h, n, at)->error)
                                : (double)INFINITY;
    const lambda_curve *c = lambda_curve_at(h, n, at);
    return c ? tune_relative(&h->input[n], c->point[at.lambda].error) : (double)INFINITY;
}

/* Would l2 hold, as far as the curves know? */
static bool would_hold(head *h, const fold *final, const fold *folds, int64_t count, back_off by)
{
    bounded in = {.mean = h->how->mean}, out = in;
    for (int64_t n = 0; n < h->tuned; n++)
        bounded_add(&in, known_error(h, n, backed_off(final->choice, by)));
    for (const fold *f = folds; f < folds + count; f++)
        for (int64_t n = f->from; n < f->to; n++)
            bounded_add(&out, known_error(h, n, backed_off(f->choice, by)));
    return bounded_error(&in) <= h->how->l2 && bounded_error(&out) <= h->how->l2;
}

/* Lambda goes down, place by place, until it is off for all; then the keep goes up. */
static void find_back_off(head *h, fold *final, const fold *folds, int64_t count, sparge_tuned *t)
{
    back_off by = {0, 0};
    while (goes_on(h)) {
        if (by.lambda < TUNE_LAMBDAS - 1)
            by.lambda++;
        else
            by.keep++;
        if (by.keep && final->choice.keep + by.keep >= TUNE_KEEPS - 1)
            break;
        t->back_off = by.keep ? SPARGE_TAU_RAISED : SPARGE_LAMBDA_LOWERED;
        if (!would_hold(h, final, folds, count, by))
            continue;
        judge_all(h, final, folds, count, by, t);
        if (holds(h->how, t)) {
            final->choice = backed_off(final->choice, by);
            return;
        }
    }
    t->back_off = SPARGE_LEFT_DENSE;
    by.keep = TUNE_KEEPS;
    final->choice = tune_dense();
    judge_all(h, final, folds, count, by, t);
}

/* ---- One head from first to last ---- */

static void open_all(head *h)
{
    const tune_task *task = h->task;
    for (int64_t n = 0; n < h->count && goes_on(h); n++) {
        const tune_sample *sample = &task->sample[n];
        h->status = tune_input_open(&h->input[n], sample->problem, sample->batch, task->head,
                                    task->o, &h->error);
        tick(h, 0.0);
    }
}

static int64_t count_nonfinite(const head *h)
{
    int64_t count = 0;
    for (int64_t n = 0; n < h->count; n++)
        count += h->input[n].nonfinite;
    return count;
}

static void choose(head *h, fold *f)
{
    const sparge_tune_options *how = h->how;
    choose_mask(h, f);
    /* Over a dense mask too, but not where that breaks l1. */
    if (!(how->sparsity > 0.0) && goes_on(h) && merit_of(h, f, f->choice).error < how->l1)
        choose_lambda(h, f);
}

/* One fold that the samples held out judge; or each sample judges in turn, if there are two or
 * more. */
static int64_t make_folds(head *h, const fold *final, fold *folds)
{
    folds[0] = (fold){h->tuned, h->count, final->choice};
    if (h->tuned < h->count)
        return 1;
    for (int64_t n = 0; n < h->count && h->count > 1; n++) {
        folds[n] = (fold){n, n + 1, tune_dense()};
        if (!is_dense(final->choice) && goes_on(h))
            choose(h, &folds[n]);
    }
    return h->count > 1 ? h->count : 0;
}

static void tune(head *h, fold *folds, sparge_tuned *t)
{
    fold final = {-1, -1, tune_dense()};
    choose(h, &final);
    const int64_t count = make_folds(h, &final, folds);
    judge_all(h, &final, folds, count, (back_off){0, 0}, t);
    t->held_out_first = t->held_out;
    if (!holds(h->how, t) && !is_dense(final.choice) && goes_on(h))
        find_back_off(h, &final, folds, count, t);
    t->dense = is_dense(final.choice);
    t->thresholds = tune_thresholds(final.choice, h->how->topk && !t->dense);
}

static void close_all(head *h, sparge_tuned *t)
{
    double products = 0.0, pairs = 0.0;
    for (int64_t n = 0; n < h->count; n++) {
        products += h->input[n].products / 2.0;
        pairs += h->input[n].pairs;
        tune_input_close(&h->input[n]);
        free(h->mask[n]);
        for (lambda_curve *c = h->lambda[n], *next; c; c = next) {
            next = c->next;
            free(c);
        }
    }
    t->dense_passes = pairs > 0.0 ? products / pairs : 0.0;
}

sparge_status tune_head(const tune_task *task, sparge_tuned *t, sparge_error *error)
{
    const size_t count = (size_t)task->count;
    head h = {
        .task = task,
        .how = task->how,
        .count = task->count,
        .tuned = task->tuned,
        .input = calloc(count, sizeof *h.input),
        .mask = calloc(count, sizeof *h.mask),
        .lambda = calloc(count, sizeof *h.lambda),
    };
    fold *folds = calloc(count, sizeof *folds);
    *t = (sparge_tuned){.dense = true, .thresholds = tune_thresholds(tune_dense(), false)};
    t->in_sample = t->held_out = t->held_out_first = nothing_judged();
    if (!h.input || !h.mask || !h.lambda || !folds)
        h.status = SPARGE_ERR_MEMORY;
    else {
        open_all(&h);
        t->nonfinite = count_nonfinite(&h);
        t->finite = t->nonfinite == 0;
        if (t->finite && goes_on(&h))
            tune(&h, folds, t);
        close_all(&h, t);
    }
    t->done = goes_on(&h);
    free(folds);
    free(h.input);
    free(h.mask);
    free(h.lambda);
    if (h.status && error)
        *error = h.error;
    return h.status;
}
