/* search.c: what is chosen, from the curves; what it is worth, by whole calls; and what is done where it does
 * not hold on inputs that it was not tuned on. */
#include <stdlib.h>

#include "tune/tune.h"

/* ---- All heads ---- */

/* One element of a batch of one input. */
typedef struct sample {
    const sparge_problem *problem;
    int64_t batch;
} sample;

typedef struct search {
    const sparge_tune_options *how;
    sparge_options o; /* for one head */
    sample *sample;   /* [count]: those to tune on, then those that are held out */
    int64_t count, tuned;
    double start;
    double units, units_done; /* of work, for progress: query blocks of the mask curves of all heads */
    double head_units;
    bool stopped;
    sparge_status status; /* of the first head that failed */
    sparge_error error;
} search;

/* ---- One head ---- */

/* A lambda curve that was asked for, over the mask of one (theta, share). */
typedef struct lambda_curve {
    tune_choice at;
    double mask_kept;
    tune_point point[TUNE_LAMBDAS];
    struct lambda_curve *next;
} lambda_curve;

typedef struct head {
    search *all;
    int64_t number;
    tune_input *input;     /* [count] */
    tune_point **mask;     /* [count] curves, made when they are asked for */
    lambda_curve **lambda; /* [count] lists of them */
    sparge_status status;  /* of the first step that failed; the later ones do nothing */
    sparge_error error;
    double units; /* done */
    bool stopped;
} head;

/* Tells how far it is, unless it is stopped already. For one thread at a time. */
static void tell(search *s)
{
    if (!s->stopped && s->how->progress)
        s->stopped = !s->how->progress(s->how->user, fmin(1.0, s->units_done / s->units));
}

/* Is there time for more? */
static bool tick(void *user)
{
    head *h = user;
    search *s = h->all;
    bool stopped;
#pragma omp critical(sparge_tune)
    {
        s->stopped |= s->how->seconds > 0.0 && sparge_ref_seconds() - s->start > s->how->seconds;
        tell(s);
        stopped = s->stopped;
    }
    h->stopped |= stopped;
    return !h->stopped;
}

static bool tick_unit(void *user)
{
    head *h = user;
    h->units += 1.0;
#pragma omp critical(sparge_tune)
    h->all->units_done += 1.0;
    return tick(user);
}

static bool goes_on(const head *h) { return !h->status && !h->stopped; }

static const tune_point *mask_curve(head *h, int64_t n)
{
    if (h->mask[n] || !goes_on(h))
        return h->mask[n];
    tune_point *point = malloc((size_t)TUNE_THETAS * TUNE_SHARES * sizeof *point);
    const tune_watch watch = { tick_unit, h };
    h->status = point ? tune_mask_curve(&h->input[n], h->all->how->topk, point, &watch, &h->error)
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
        if (c->at.theta == at.theta && c->at.share == at.share)
            return c;
    if (!goes_on(h))
        return NULL;
    lambda_curve *c = malloc(sizeof *c);
    const tune_watch watch = { tick, h };
    const sparge_knobs knobs = tune_knobs(at, h->all->how->topk);
    h->status = c ? tune_lambda_curve(&h->input[n], &knobs, c->point, &c->mask_kept, &watch, &h->error)
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
    return &h->mask[n][at.theta * TUNE_SHARES + at.share];
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
    bounded error = { .mean = h->all->how->mean };
    double sparsity = 0.0;
    for (int64_t n = 0; n < h->all->tuned; n++)
        if (tunes_on(f, n)) {
            const tune_point *p = point_at(h, n, at);
            sparsity += 1.0 - p->kept / h->input[n].pairs;
            bounded_add(&error, tune_relative(&h->input[n], p->error));
        }
    return (merit){ sparsity / (double)error.samples, bounded_error(&error) };
}

static bool better(const search *s, merit a, merit than)
{
    const sparge_tune_options *how = s->how;
    if (how->sparsity > 0.0) { /* the least error of those that are sparse enough, or else the sparsest */
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
    for (int64_t n = 0; n < h->all->tuned; n++)
        if (tunes_on(f, n) && !mask_curve(h, n))
            return;
    f->choice = tune_dense();
    merit best = merit_of(h, f, f->choice);
    best.sparsity = 0.0;
    for (int theta = 0; theta < TUNE_THETAS; theta++)
        for (int share = 0; share < TUNE_SHARES; share++) {
            const tune_choice at = { theta, share, TUNE_LAMBDAS - 1 };
            const merit m = merit_of(h, f, at);
            if (m.sparsity > 0.0 && better(h->all, m, best)) {
                best = m;
                f->choice = at;
            }
        }
}

static bool is_dense(tune_choice at) { return at.share == TUNE_SHARES - 1 && at.lambda == TUNE_LAMBDAS - 1; }

/* Does this lambda skip anything on the samples of the fold? */
static bool skips(head *h, const fold *f, int lambda)
{
    bool skips = false;
    for (int64_t n = 0; n < h->all->tuned; n++)
        if (tunes_on(f, n)) {
            const tune_point *point = lambda_curve_at(h, n, f->choice)->point;
            skips |= point[lambda].kept < point[TUNE_LAMBDAS - 1].kept;
        }
    return skips;
}

/* The largest lambda that holds l2 on the samples of the fold, if it skips anything. */
static void choose_lambda(head *h, fold *f)
{
    const search *s = h->all;
    for (int64_t n = 0; n < s->tuned; n++)
        if (tunes_on(f, n) && !lambda_curve_at(h, n, f->choice))
            return;
    for (int lambda = 0; lambda < TUNE_LAMBDAS; lambda++) {
        bounded error = { .mean = s->how->mean };
        for (int64_t n = 0; n < s->tuned; n++)
            if (tunes_on(f, n))
                bounded_add(&error, tune_relative(&h->input[n],
                                                  lambda_curve_at(h, n, f->choice)->point[lambda].error));
        if (bounded_error(&error) < s->how->l2) {
            f->choice.lambda = skips(h, f, lambda) ? lambda : TUNE_LAMBDAS - 1;
            return;
        }
    }
}

/* ---- Judging ---- */

static void judge(head *h, const sparge_knobs *knobs, int64_t n, sparge_tune_errors *e)
{
    double l1, sparsity;
    if (!goes_on(h) || !tick(h))
        return;
    h->status = tune_evaluate(&h->input[n], knobs, &l1, &sparsity, &h->error);
    const double before = (double)e->inputs++;
    e->mean = before > 0.0 ? (e->mean * before + l1) / (before + 1.0) : l1;
    e->worst = before > 0.0 ? fmax(e->worst, l1) : l1;
    e->sparsity = (e->sparsity * before + sparsity) / (before + 1.0);
}

static sparge_tune_errors nothing_judged(void) { return (sparge_tune_errors){ 0, NAN, NAN, 0.0 }; }

/* How far a choice is backed off: places of the grid, toward keeping more. */
typedef struct retreat {
    int share, lambda;
} retreat;

static tune_choice retreated(tune_choice at, retreat by)
{
    at.share = (int)sparge_min(TUNE_SHARES - 1, at.share + by.share);
    at.lambda = (int)sparge_min(TUNE_LAMBDAS - 1, at.lambda + by.lambda);
    return at;
}

/* The errors of what is chosen on all samples, and of what each fold chose on those that it did not see, all
 * backed off so far. */
static void judge_all(head *h, const fold *final, const fold *folds, int64_t count, retreat by, sparge_tuned *t)
{
    const search *s = h->all;
    const sparge_knobs chosen = tune_knobs(retreated(final->choice, by), s->how->topk);
    t->in_sample = t->held_out = nothing_judged();
    for (int64_t n = 0; n < s->tuned; n++)
        judge(h, &chosen, n, &t->in_sample);
    for (const fold *f = folds; f < folds + count; f++) {
        const sparge_knobs knobs = tune_knobs(retreated(f->choice, by), s->how->topk);
        for (int64_t n = f->from; n < f->to; n++)
            judge(h, &knobs, n, &t->held_out);
    }
}

static bool within(const search *s, const sparge_tune_errors *e)
{
    return e->inputs == 0 || (s->how->mean ? e->mean : e->worst) <= s->how->l2;
}

static bool holds(const search *s, const sparge_tuned *t)
{
    return s->how->sparsity > 0.0 || (within(s, &t->in_sample) && within(s, &t->held_out));
}

/* ---- Backing off ---- */

/* What the curves say of a choice; infinity where there is no time for them. */
static double known_error(head *h, int64_t n, tune_choice at)
{
    if (at.lambda == TUNE_LAMBDAS - 1)
        return mask_curve(h, n) ? tune_relative(&h->input[n], point_at(h, n, at)->error) : (double)INFINITY;
    const lambda_curve *c = lambda_curve_at(h, n, at);
    return c ? tune_relative(&h->input[n], c->point[at.lambda].error) : (double)INFINITY;
}

/* Would l2 hold, as far as the curves know? */
static bool would_hold(head *h, const fold *final, const fold *folds, int64_t count, retreat by)
{
    const search *s = h->all;
    bounded in = { .mean = s->how->mean }, out = in;
    for (int64_t n = 0; n < s->tuned; n++)
        bounded_add(&in, known_error(h, n, retreated(final->choice, by)));
    for (const fold *f = folds; f < folds + count; f++)
        for (int64_t n = f->from; n < f->to; n++)
            bounded_add(&out, known_error(h, n, retreated(f->choice, by)));
    return bounded_error(&in) <= s->how->l2 && bounded_error(&out) <= s->how->l2;
}

/* Lambda goes down, place by place, until it is off for all; then the share goes up. */
static void back_off(head *h, fold *final, const fold *folds, int64_t count, sparge_tuned *t)
{
    const search *s = h->all;
    retreat by = { 0, 0 };
    while (goes_on(h)) {
        if (by.lambda < TUNE_LAMBDAS - 1)
            by.lambda++;
        else
            by.share++;
        if (by.share && final->choice.share + by.share >= TUNE_SHARES - 1)
            break;
        t->back_off = by.share ? SPARGE_TAU_RAISED : SPARGE_LAMBDA_LOWERED;
        if (!would_hold(h, final, folds, count, by))
            continue;
        judge_all(h, final, folds, count, by, t);
        if (holds(s, t)) {
            final->choice = retreated(final->choice, by);
            return;
        }
    }
    t->back_off = SPARGE_LEFT_DENSE;
    by.share = TUNE_SHARES;
    final->choice = tune_dense();
    judge_all(h, final, folds, count, by, t);
}

/* ---- One head from first to last ---- */

static void open_all(head *h)
{
    const search *s = h->all;
    for (int64_t n = 0; n < s->count && goes_on(h); n++) {
        h->status = tune_input_open(&h->input[n], s->sample[n].problem, s->sample[n].batch, h->number, &s->o,
                                    &h->error);
        tick(h);
    }
}

static bool all_finite(const head *h)
{
    bool finite = true;
    for (int64_t n = 0; n < h->all->count; n++)
        finite &= h->input[n].finite;
    return finite;
}

static void choose(head *h, fold *f)
{
    const sparge_tune_options *how = h->all->how;
    choose_mask(h, f);
    /* Over a dense mask too, but not where that breaks l1. */
    if (!(how->sparsity > 0.0) && goes_on(h) && merit_of(h, f, f->choice).error < how->l1)
        choose_lambda(h, f);
}

/* One fold that the samples held out judge; or each sample judges in turn, if there are two or more. */
static int64_t make_folds(head *h, const fold *final, fold *folds)
{
    const search *s = h->all;
    folds[0] = (fold){ s->tuned, s->count, final->choice };
    if (s->tuned < s->count)
        return 1;
    for (int64_t n = 0; n < s->count && s->count > 1; n++) {
        folds[n] = (fold){ n, n + 1, tune_dense() };
        if (!is_dense(final->choice) && goes_on(h))
            choose(h, &folds[n]);
    }
    return s->count > 1 ? s->count : 0;
}

static void tune(head *h, fold *folds, sparge_tuned *t)
{
    fold final = { -1, -1, tune_dense() };
    choose(h, &final);
    const int64_t count = make_folds(h, &final, folds);
    judge_all(h, &final, folds, count, (retreat){ 0, 0 }, t);
    t->held_out_first = t->held_out;
    if (!holds(h->all, t) && !is_dense(final.choice) && goes_on(h))
        back_off(h, &final, folds, count, t);
    t->dense = is_dense(final.choice);
    t->knobs = tune_knobs(final.choice, h->all->how->topk && !t->dense);
}

static void close_all(head *h, sparge_tuned *t)
{
    double products = 0.0, pairs = 0.0;
    for (int64_t n = 0; n < h->all->count; n++) {
        products += h->input[n].products / 2.0;
        pairs += h->input[n].pairs;
        tune_input_close(&h->input[n]);
        free(h->mask[n]);
        for (lambda_curve *c = h->lambda[n], *next; c; c = next) {
            next = c->next;
            free(c);
        }
    }
    t->equivalents = pairs > 0.0 ? products / pairs : 0.0;
}

static void tune_head(search *s, int64_t number, sparge_tuned *to)
{
    const size_t count = (size_t)s->count;
    const double start = sparge_ref_seconds();
    head h = {
        .all = s,
        .number = number,
        .input = calloc(count, sizeof *h.input),
        .mask = calloc(count, sizeof *h.mask),
        .lambda = calloc(count, sizeof *h.lambda),
    };
    fold *folds = calloc(count, sizeof *folds);
    sparge_tuned t = { .dense = true, .knobs = tune_knobs(tune_dense(), false) };
    t.in_sample = t.held_out = t.held_out_first = nothing_judged();
    if (!h.input || !h.mask || !h.lambda || !folds)
        h.status = SPARGE_ERR_MEMORY;
    else if (tick(&h)) {
        open_all(&h);
        t.finite = all_finite(&h);
        if (t.finite && goes_on(&h))
            tune(&h, folds, &t);
        close_all(&h, &t);
    }
    free(folds);
    free(h.input);
    free(h.mask);
    free(h.lambda);
    t.seconds = sparge_ref_seconds() - start;
#pragma omp critical(sparge_tune)
    {
        if (h.status && !s->status) {
            s->status = h.status;
            s->error = h.error;
        }
        s->stopped |= h.status != SPARGE_OK;
        if (goes_on(&h)) {
            s->units_done += s->head_units - h.units; /* some curves were not asked for */
            tell(s);
            *to = t;
            to->done = true;
            if (s->how->finished)
                s->how->finished(s->how->user, number);
        }
    }
}

sparge_status sparge_tune_heads(const sparge_problem *inputs, int64_t count, const sparge_options *o,
                                const sparge_tune_options *how, sparge_tuned *heads, sparge_error *error)
{
    const int64_t q_heads = inputs[0].heads;
    search s = { .how = how, .o = *o, .start = sparge_ref_seconds() };
    int64_t todo = 0;
    for (int64_t h = 0; h < q_heads; h++)
        todo += !heads[h].done;
    for (int64_t n = 0; n < count; n++)
        s.count += inputs[n].batch;
    s.sample = malloc((size_t)s.count * sizeof *s.sample);
    if (!s.sample)
        return SPARGE_ERR_MEMORY;
    s.count = 0;
    for (int64_t n = 0; n < count; n++)
        for (int64_t b = 0; b < inputs[n].batch; b++) {
            s.sample[s.count++] = (sample){ &inputs[n], b };
            s.tuned += n < count - how->held_out;
            s.head_units += (double)sparge_ceil_div(inputs[n].q_len, o->block_q);
        }
    s.units = (double)todo * s.head_units;
    /* Heads side by side, and the threads that are left over within each. */
    const int threads = o->backend == SPARGE_CPU ? (int)sparge_max(1, sparge_min(o->threads, todo)) : 1;
    s.o.threads = o->backend == SPARGE_CPU ? (int)sparge_max(1, o->threads / threads) : 0;
    s.o.per_head = NULL;
    s.o.progress = NULL;
    s.o.stream = s.o.workspace = NULL; /* outputs are read as soon as they are there */
    s.o.workspace_bytes = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t h = 0; h < q_heads; h++)
        if (!heads[h].done)
            tune_head(&s, h, &heads[h]);
    free(s.sample);
    if (s.status && error)
        *error = s.error;
    return s.status;
}
