/* SPDX-License-Identifier: Apache-2.0 */
/* tune.c: what the tuner knows without calling attention against whole calls of it, what it chooses
 * against the whole grid by whole calls, and what becomes of heads whose answer is known
 * beforehand. */
#include "tune/tune.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/heap.h"
#include "tests/support/problem.h"

TestSuite(tune);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

enum { LAST_KEEP = TUNE_KEEPS - 1, LAST_LAMBDA = TUNE_LAMBDAS - 1 };

/* ---- Inputs in which every threshold matters
 * ------------------------------------------------------ */

/* Runs of tokens about as long as a block, each around a centre of its own, some close to it and
 * some far away, at most `noisy`: blocks are similar to every degree. `spread` is how far the
 * centres lie apart. */
static void cluster(tensor *t, int64_t run, float spread, float noisy)
{
    float centre[512];
    float noise = 0.0f;
    for (int64_t line = 0; line < t->batch * t->heads; line++)
        for (int64_t n = 0; n < t->tokens; n++) {
            float *x = &t->x[(line * t->tokens + n) * t->channels];
            for (int64_t c = 0; c < t->channels; c++) {
                if (n % run == 0)
                    centre[c] = spread * check_normal();
                if (n % run == 0 && c == 0)
                    noise = check_uniform(0.0f, noisy);
                x[c] = centre[c] + spread * noise * check_normal();
            }
        }
}

static problem clustered(const shape *s, int64_t run_q, int64_t run_k, float spread)
{
    problem x = problem_make(s);
    cluster(&x.q, run_q, spread,
            0.6f); /* a block of queries that is not similar keeps everything */
    cluster(&x.k, run_k, spread, 2.0f);
    cluster(&x.v, run_k, 1.0f, 1.0f);
    problem_write(&x);
    return x;
}

/* A head of the answer: sum|got - want| and sum|want|. */
typedef struct distance {
    double error, size;
} distance;

static distance distance_of(const answer *got, const answer *want, int64_t b, int64_t h)
{
    distance d = {0.0, 0.0};
    const float *x = tensor_row(&got->o, b, h, 0), *y = tensor_row(&want->o, b, h, 0);
    for (int64_t n = 0; n < got->o.tokens * got->o.channels; n++) {
        d.error += fabs((double)x[n] - (double)y[n]);
        d.size += fabs((double)y[n]);
    }
    return d;
}

static double relative_l1(const answer *got, const answer *want, int64_t b, int64_t h)
{
    const distance d = distance_of(got, want, b, h);
    return d.error == 0.0 ? 0.0 : d.error / d.size;
}

/* Dense attention in f32: what errors are measured against. */
static answer dense(const problem *x)
{
    problem y = *x;
    y.o.qk_dtype = y.o.pv_dtype = SPARGE_F32;
    y.o.thresholds.lambda = -INFINITY;
    y.mask.bits = NULL;
    return attend(&y);
}

static answer whole(const problem *x, sparge_thresholds thresholds)
{
    problem y = *x;
    y.o.thresholds = thresholds;
    return attention(&y, NULL);
}

static sparge_thresholds thresholds_at(int theta, int keep, int lambda, bool topk)
{
    return tune_thresholds((tune_choice){theta, keep, lambda}, topk);
}

/* ---- The grid
 * --------------------------------------------------------------------------------------- */

Test(tune, the_grid)
{
    check_case("the grid");
    check_equal(tune_theta(0), -1.0f);
    check_equal(tune_theta(TUNE_THETAS - 1), 0.9375f);
    check_equal(tune_keep(0), 0.0f);
    check_equal(tune_keep(999), 0.999f);
    check_close(tune_keep(1009), 0.9999, 1e-9 + 3e-8);
    check_close(tune_keep(LAST_KEEP - 1), 1.0 - 1e-6, 3e-8);
    check_equal(tune_keep(LAST_KEEP), 1.0f);
    check_equal(tune_lambda(0), 0.0f);
    check_close((double)tune_lambda(1) * 1.4426950408889634, -0.1, 1e-8);
    check_close((double)tune_lambda(LAST_LAMBDA - 1) * 1.4426950408889634, -50.0, 1e-5);
    check_equal(tune_lambda(LAST_LAMBDA), -INFINITY);
    for (int n = 1; n < TUNE_THETAS; n++)
        check(tune_theta(n) > tune_theta(n - 1), "theta %d", n);
    for (int n = 1; n < TUNE_KEEPS; n++)
        check(tune_keep(n) > tune_keep(n - 1), "keep %d", n);
    for (int n = 1; n < TUNE_LAMBDAS; n++)
        check(tune_lambda(n) < tune_lambda(n - 1), "lambda %d", n);
    const sparge_thresholds by_tau = thresholds_at(3, 500, 7, false),
                            by_topk = thresholds_at(3, 500, 7, true);
    check(by_tau.theta == tune_theta(3) && by_tau.tau == 0.5f && by_tau.topk == SPARGE_OFF &&
              by_tau.lambda == tune_lambda(7),
          "by tau");
    check(by_topk.theta == tune_theta(3) && by_topk.tau == SPARGE_OFF && by_topk.topk == 0.5f &&
              by_topk.lambda == tune_lambda(7),
          "by topk");
}

/* ---- Curves against whole calls
 * --------------------------------------------------------------------- */

static bool goes_on(void *user, double work)
{
    (void)user;
    (void)work;
    return true;
}

/* What the cases of a sweep hit, so that it cannot pass by never moving anything. */
typedef struct seen {
    int64_t places, by_keep, by_theta, by_lambda, masks_alone, edges;
    double far, lambda_far;
} seen;

/* How far a curve may be from a whole call: both add the same products of the same codes in f32, in
 * another order, and the curve goes through lse, whose rounding is 2^-24 of it. `loose`: relative
 * to the output. */
static const double tight = 1e-5, loose = 2e-6;

static void same_error(const char *what, double got, double want, double *far)
{
    check(fabs(got - want) <= tight * want + loose,
          "%s: relative L1 by the curve is %.9g, by a whole call %.9g", what, got, want);
    *far = fmax(*far, fabs(got - want) / (tight * want + loose));
}

/* The options as sparge_tune hands them on. */
static sparge_options resolved(const problem *x)
{
    sparge_options o = x->o;
    if (o.softmax_scale == 0.0f)
        o.softmax_scale = 1.0f / sqrtf((float)x->p.dim);
    o.skip_rows = o.skip_rows ? o.skip_rows : 64;
    o.skip_rows = o.skip_rows < o.block_q ? o.skip_rows : o.block_q;
    o.threads = o.backend == SPARGE_CPU ? 1 : 0;
    return o;
}

/* A keep where something changes under this theta, one before it, or any. */
static int interesting_keep(const tune_point *point, int theta)
{
    const tune_point *row = &point[theta * TUNE_KEEPS];
    int keep = (int)check_int(0, LAST_KEEP);
    if (check_int(0, 3) == 0)
        return keep;
    while (keep < LAST_KEEP && row[keep].kept == row[keep + 1].kept)
        keep++;
    return check_int(0, 1) && keep < LAST_KEEP ? keep + 1 : keep;
}

static int interesting_lambda(const tune_point *point)
{
    int n = (int)check_int(0, 100);
    while (n < LAST_LAMBDA && point[n].kept == point[n + 1].kept)
        n++;
    return check_int(0, 1) && n < LAST_LAMBDA ? n + 1 : n;
}

/* Does this theta keep other blocks than the one before? */
static bool theta_moves(const tune_point *point, int theta)
{
    const tune_point *row = &point[theta * TUNE_KEEPS];
    for (int n = 0; n < TUNE_KEEPS; n++)
        if (row[n].kept != row[n - TUNE_KEEPS].kept)
            return true;
    return false;
}

static int interesting_theta(const tune_point *point)
{
    int theta = (int)check_int(0, TUNE_THETAS - 1);
    if (check_int(0, 4) == 0)
        return theta;
    while (theta < TUNE_THETAS - 1 && !theta_moves(point, theta + 1))
        theta++;
    return check_int(0, 1) && theta < TUNE_THETAS - 1 ? theta + 1 : theta;
}

static void tally(const tune_point *point, seen *s)
{
    for (int theta = 0; theta < TUNE_THETAS; theta++)
        for (int n = 1; n < TUNE_KEEPS; n++)
            s->by_keep +=
                point[theta * TUNE_KEEPS + n].kept != point[theta * TUNE_KEEPS + n - 1].kept;
    for (int theta = 1; theta < TUNE_THETAS; theta++)
        s->by_theta += theta_moves(point, theta);
}

/* One head of one element of the batch of a problem, at some places of both curves. */
static void curves_are_whole_calls(const problem *x, int64_t b, int64_t h, bool topk, int places,
                                   seen *s)
{
    sparge_error error;
    tune_input input;
    const sparge_options o = resolved(x);
    const tune_watch watch = {goes_on, NULL};
    check(tune_input_open(&input, &x->p, b, h, &o, &error) == SPARGE_OK, "%s", error.text);
    check(input.nonfinite == 0, "a finite input is not");
    tune_point *point = check_alloc(TUNE_THETAS * TUNE_KEEPS * sizeof *point);
    check(tune_mask_curve(&input, topk, point, &watch, &error) == SPARGE_OK, "%s", error.text);
    tally(point, s);
    answer want = dense(x);
    const int64_t at = b * x->p.heads + h;
    check_equal(input.pairs, (double)want.head[at].pairs);
    for (int n = 0; n < places; n++) {
        const int theta = n == 0 ? 0 : interesting_theta(point);
        const int keep = n == 0 ? LAST_KEEP : interesting_keep(point, theta);
        const char *place = check_text("theta %d keep %d of head %lld", theta, keep, (long long)at);
        answer a = whole(x, thresholds_at(theta, keep, LAST_LAMBDA, topk));
        const tune_point *p = &point[theta * TUNE_KEEPS + keep];
        const int64_t kept = a.head[at].qk_done;
        check((int64_t)p->kept == kept && p->kept == a.head[at].pv_done,
              "%s: %.9g pairs are kept by the curve, %lld by a whole call", place, p->kept,
              (long long)kept);
        same_error(place, tune_relative(&input, p->error), relative_l1(&a, &want, b, h), &s->far);
        s->places++;
        answer_free(&a);
        tune_call call;
        sparge_thresholds thresholds = thresholds_at(theta, keep, LAST_LAMBDA, topk);
        tune_point by_lambda[TUNE_LAMBDAS];
        double mask_kept;
        check(tune_lambda_curve(&input, &thresholds, by_lambda, &mask_kept, &watch, &error) ==
                  SPARGE_OK,
              "%s", error.text);
        check_equal(mask_kept, (double)kept);
        check_close(by_lambda[LAST_LAMBDA].kept, mask_kept,
                    1e-9 * mask_kept); /* a sum of parts of rows */
        for (int m = 1; m < TUNE_LAMBDAS; m++)
            s->by_lambda += by_lambda[m].kept != by_lambda[m - 1].kept;
        for (int m = 0; m < 2; m++) {
            const int lambda = n == 1 && m == 1 ? LAST_LAMBDA : interesting_lambda(by_lambda);
            thresholds.lambda = tune_lambda(lambda);
            place = check_text("theta %d keep %d lambda %d of head %lld", theta, keep, lambda,
                               (long long)at);
            a = whole(x, thresholds);
            check_equal(a.head[at].qk_done, kept);
            check(fabs(by_lambda[lambda].kept - a.head[at].pv_done) <= 1e-9 * (1.0 + mask_kept),
                  "%s: %.12g by the curve, %.12g by a whole call", place, by_lambda[lambda].kept,
                  a.head[at].pv_done);
            const double l1_whole = relative_l1(&a, &want, b, h);
            same_error(place, tune_relative(&input, by_lambda[lambda].error), l1_whole,
                       &s->lambda_far);
            check(tune_evaluate(&input, &thresholds, &call, &error) == SPARGE_OK, "%s", error.text);
            check(fabs(call.l1 - l1_whole) <= 1e-12 + 1e-9 * l1_whole,
                  "%s: evaluated as %.12g, is %.12g", place, call.l1, l1_whole);
            check_equal(call.nan + call.inf, 0);
            check_equal(call.sparsity, sparge_sparsity(&a.head[at]));
            s->places++;
            answer_free(&a);
        }
    }
    answer_free(&want);
    check_free(point);
    tune_input_close(&input);
}

/* Shape, options and values at random. */
static problem problem_at_random(int64_t turn)
{
    static const int64_t sides[][2] = {{16, 16}, {128, 64}, {64, 128}, {32, 48}, {1, 16},
                                       {16, 1},  {24, 7},   {7, 24},   {40, 40}};
    const int64_t *side = sides[turn % COUNT(sides)];
    const bool large = side[0] * side[1] > 2000; /* few heads of few channels then */
    const int64_t kv = check_int(1, 2), group = check_int(1, large ? 1 : 3);
    const sparge_causal causal = (sparge_causal)(turn / COUNT(sides) % 3);
    /* A few blocks each way, and now and then less than one of them. */
    const int64_t most_k = check_int(4, 9) * side[1] + 3, most_q = check_int(1, 3) * side[0] + 7;
    int64_t q_len = check_int(0, 6) ? check_int(most_q / 2, most_q) : check_int(1, side[0]);
    int64_t k_len = check_int(0, 6) ? check_int(most_k / 2, most_k) : check_int(1, side[1]);
    if (causal != SPARGE_CAUSAL_NONE && check_int(0, 1))
        q_len = k_len;
    if (causal == SPARGE_CAUSAL_START && q_len > k_len)
        q_len = k_len;
    shape s = shape_of(
        large ? 1 : check_int(1, 2), kv * group, kv, q_len, k_len, check_int(1, large ? 24 : 70),
        large || check_int(0, 5) ? check_int(1, large ? 9 : 40) : check_int(257, 300));
    s.q = dtype_at_random();
    s.k = dtype_at_random();
    s.v = dtype_at_random();
    s.layout_q = layout_at_random();
    s.layout_k = layout_at_random();
    s.layout_v = layout_at_random();
    /* Scores of a few units, so that neither one key nor all of them are everything. */
    const float spread = sqrtf(check_uniform(0.3f, 4.0f) / sqrtf((float)s.dim));
    problem x = clustered(&s, check_int(0, 2) ? side[0] : side[0] + 3,
                          check_int(0, 2) ? side[1] : side[1] + 3,
                          spread * powf((float)s.dim, 0.25f) * 0.9f);
    x.o.block_q = side[0];
    x.o.block_k = side[1];
    x.o.causal = causal;
    x.o.backend = check_int(0, 1) ? SPARGE_CPU : SPARGE_REF;
    x.o.qk_dtype = precisions[check_int(0, 2)];
    x.o.pv_dtype = precisions[check_int(0, 2)];
    x.o.smooth_k = check_int(0, 2) != 0;
    x.o.sink = check_int(0, 2) == 0;
    x.o.softmax_scale = check_int(0, 2) ? 0.0f : check_uniform(0.05f, 0.5f);
    x.o.skip_rows = check_int(0, 1) ? 0 : check_int(1, side[0] < 30 ? side[0] : 30);
    if (check_int(0, 9) == 0) { /* a run of zeros, a head of one value */
        zero_some(check_int(0, 1) ? &x.q : &x.k);
        problem_write(&x);
    }
    return x;
}

static void sweep(const char *name, int64_t from, int64_t end)
{
    seen s = {0};
    for (int64_t turn = from; turn < end; turn++) {
        check_case("%s, %lld", name, (long long)turn);
        problem x = problem_at_random(turn);
        const bool topk = check_int(0, 2) == 0;
        check_case("%s, %lld: %lldx%lld blocks of %lldx%lld, causal %d, qk %d pv %d, %s, topk %d, "
                   "sink %d, "
                   "smooth %d",
                   name, (long long)turn, (long long)x.p.q_len, (long long)x.p.k_len,
                   (long long)x.o.block_q, (long long)x.o.block_k, (int)x.o.causal,
                   (int)x.o.qk_dtype, (int)x.o.pv_dtype, sparge_backend_string(x.o.backend), topk,
                   x.o.sink, x.o.smooth_k);
        curves_are_whole_calls(&x, check_int(0, x.p.batch - 1), check_int(0, x.p.heads - 1), topk,
                               4, &s);
        problem_free(&x);
    }
    cr_log_info("%lld places; %lld steps by keep, %lld by theta, %lld by lambda; %.3g and %.3g of "
                "the bound",
                (long long)s.places, (long long)s.by_keep, (long long)s.by_theta,
                (long long)s.by_lambda, s.far, s.lambda_far);
    const int64_t turns = end - from;
    check(s.by_keep > 40 * turns && s.by_theta > turns && s.by_lambda > 8 * turns,
          "the inputs move too little: %lld, %lld, %lld", (long long)s.by_keep,
          (long long)s.by_theta, (long long)s.by_lambda);
}

Test(tune, curves_are_whole_calls) { sweep("curves", 0, 81); }

/* Blocks may lie so far apart that the best of those that are kept weighs nothing beside one that
 * is not: the error is that of their own softmax. Scores in their hundreds are known to 2^-15
 * alone. */
Test(tune, scores_far_apart)
{
    double worst = 0.0, far = 0.0;
    for (int turn = 0; turn < 8; turn++) {
        check_case("far apart, %d", turn);
        const shape s = shape_of(1, 1, 1, 40, 64, 8, 5);
        problem x = clustered(&s, 8, 8, 1.0f);
        sparge_error error;
        tune_input input;
        x.o.block_q = x.o.block_k = 8;
        x.o.softmax_scale = 30.0f;
        const sparge_options o = resolved(&x);
        const tune_watch watch = {goes_on, NULL};
        check(tune_input_open(&input, &x.p, 0, 0, &o, &error) == SPARGE_OK, "%s", error.text);
        tune_point *point = check_alloc(TUNE_THETAS * TUNE_KEEPS * sizeof *point);
        check(tune_mask_curve(&input, true, point, &watch, &error) == SPARGE_OK, "%s", error.text);
        answer want = dense(&x);
        for (int keep = 0; keep < LAST_KEEP; keep += 125) {
            answer a = whole(&x, thresholds_at(0, keep, LAST_LAMBDA, true));
            const double by_curve = tune_relative(&input, point[keep].error),
                         l1 = relative_l1(&a, &want, 0, 0);
            check(fabs(by_curve - l1) <= 1e-3 * l1 + 1e-5,
                  "keep %d: %.9g by the curve, %.9g by a whole call", keep, by_curve, l1);
            far = fmax(far, fabs(by_curve - l1));
            worst = fmax(worst, l1);
            answer_free(&a);
        }
        answer_free(&want);
        check_free(point);
        tune_input_close(&input);
        problem_free(&x);
    }
    cr_log_info("errors up to %.3g, curves within %.2g", worst, far);
    check(worst > 0.5, "nothing is far apart");
}

/* ---- Against the whole grid by whole calls
 * ---------------------------------------------------------- */

/* One head of some small inputs, each with a batch of 1. */
typedef struct bench {
    problem x[4];
    sparge_problem p[4];
    answer dense[4];
    int64_t count;
    sparge_options o;
} bench;

static void bench_begin(bench *b)
{
    for (int64_t n = 0; n < b->count; n++) {
        b->x[n].o = b->o;
        b->p[n] = b->x[n].p;
        b->dense[n] = dense(&b->x[n]);
    }
}

static void bench_end(bench *b)
{
    for (int64_t n = 0; n < b->count; n++) {
        answer_free(&b->dense[n]);
        problem_free(&b->x[n]);
    }
}

/* By a whole call: the paper's error and sparsity of head h of input n. */
typedef struct worth {
    double error, sparsity;
} worth;

static worth worth_of(const bench *b, int64_t n, int64_t h, sparge_thresholds thresholds)
{
    answer a = whole(&b->x[n], thresholds);
    const worth w = {relative_l1(&a, &b->dense[n], 0, h), sparge_sparsity(&a.head[h])};
    answer_free(&a);
    return w;
}

/* Of every mask of the grid, in one input: calls whose mask is the one before have its answer. */
static worth *worth_of_masks(const bench *b, int64_t n, bool topk)
{
    worth *w = check_alloc(TUNE_THETAS * TUNE_KEEPS * sizeof *w);
    problem x = b->x[n];
    sparge_mask before = {0};
    sparge_error error;
    check(sparge_mask_alloc(&x.mask, &x.p, &x.o, &error) == SPARGE_OK, "%s", error.text);
    check(sparge_mask_alloc(&before, &x.p, &x.o, &error) == SPARGE_OK, "%s", error.text);
    const size_t bytes = (size_t)(before.q_blocks * before.words) * sizeof *before.bits;
    for (int theta = 0; theta < TUNE_THETAS; theta++)
        for (int keep = 0; keep < TUNE_KEEPS; keep++) {
            worth *at = &w[theta * TUNE_KEEPS + keep];
            x.o.thresholds = thresholds_at(theta, keep, LAST_LAMBDA, topk);
            check(sparge_predict(&x.p, &x.o, &x.mask, NULL, &error) == SPARGE_OK, "%s", error.text);
            if (at > w && !memcmp(x.mask.bits, before.bits, bytes))
                *at = at[-1];
            else
                *at = worth_of(b, n, 0, x.o.thresholds);
            memcpy(before.bits, x.mask.bits, bytes);
        }
    sparge_mask_free(&x.mask);
    sparge_mask_free(&before);
    return w;
}

/* A place that the rounding of a curve may take for another: within this of a bound. */
static const double near = 3e-5;

/* The best place of the grid, as sparge.h has it, over some of the inputs. */
typedef struct best {
    double sparsity, error; /* of the mask, error the worst over the inputs */
    double least, most; /* the sparsities of masks with the bound a bit lower and a bit higher */
    bool none;          /* but dense */
} best;

static double mean_sparsity(worth *const *w, const bool *in, int64_t count, int at)
{
    double sum = 0.0, inputs = 0.0;
    for (int64_t n = 0; n < count; n++)
        if (in[n]) {
            sum += w[n][at].sparsity;
            inputs += 1.0;
        }
    return sum / inputs;
}

static double worst_error(worth *const *w, const bool *in, int64_t count, int at)
{
    double worst = 0.0;
    for (int64_t n = 0; n < count; n++)
        if (in[n] && !(w[n][at].error <= worst))
            worst = w[n][at].error;
    return worst;
}

static best best_mask(worth *const *w, const bool *in, int64_t count,
                      const sparge_tune_options *how)
{
    best b = {0.0, INFINITY, 0.0, 0.0, true};
    for (int at = 0; at < TUNE_THETAS * TUNE_KEEPS; at++) {
        const double sparsity = mean_sparsity(w, in, count, at),
                     error = worst_error(w, in, count, at);
        if (how->sparsity > 0.0) {
            if (sparsity >= how->sparsity && error < b.error)
                b = (best){sparsity, error, 0.0, 0.0, false};
            continue;
        }
        if (sparsity > 0.0 && error < how->l1 &&
            (b.none || sparsity > b.sparsity || (sparsity == b.sparsity && error < b.error))) {
            b.sparsity = sparsity;
            b.error = error;
            b.none = false;
        }
        if (error < how->l1 * (1.0 - near) && sparsity > b.least)
            b.least = sparsity;
        if (error < how->l1 * (1.0 + near) && sparsity > b.most)
            b.most = sparsity;
    }
    return b;
}

/* The largest lambda of the grid that holds l2 everywhere, from below by `slack` of it. */
static int best_lambda(const bench *b, const bool *in, sparge_thresholds thresholds, double l2)
{
    for (int lambda = 0; lambda < TUNE_LAMBDAS; lambda++) {
        bool holds = true;
        thresholds.lambda = tune_lambda(lambda);
        for (int64_t n = 0; n < b->count && holds; n++)
            holds = !in[n] || worth_of(b, n, 0, thresholds).error < l2;
        if (holds)
            return lambda;
    }
    return TUNE_LAMBDAS;
}

static sparge_tuned tuned(const bench *b, const sparge_tune_options *how)
{
    sparge_tuned t[1] = {{0}};
    sparge_error error;
    check(sparge_tune(b->p, b->count, &b->o, how, t, &error) == SPARGE_OK, "%s", error.text);
    check(t->done && t->finite, "done %d, finite %d", t->done, t->finite);
    return *t;
}

/* Errors over inputs, by whole calls. */
static sparge_tune_errors errors_of(const bench *b, const bool *in,
                                    const sparge_thresholds *thresholds)
{
    sparge_tune_errors e = {0};
    for (int64_t n = 0; n < b->count; n++)
        if (in[n]) {
            const worth w = worth_of(b, n, 0, thresholds[n]);
            e.inputs++;
            e.mean += w.error;
            e.worst = w.error > e.worst ? w.error : e.worst;
            e.sparsity += w.sparsity;
        }
    e.mean /= (double)e.inputs;
    e.sparsity /= (double)e.inputs;
    return e;
}

static void same_errors(const char *name, const sparge_tune_errors *got,
                        const sparge_tune_errors *want)
{
    check(got->inputs == want->inputs, "%s: %lld inputs, should be %lld", name,
          (long long)got->inputs, (long long)want->inputs);
    if (want->inputs == 0) {
        check(isnan(got->mean) && isnan(got->worst), "%s: errors of no input", name);
        return;
    }
    check(fabs(got->mean - want->mean) <= 1e-9 * want->mean, "%s: mean %.12g, should be %.12g",
          name, got->mean, want->mean);
    check(fabs(got->worst - want->worst) <= 1e-9 * want->worst, "%s: worst %.12g, should be %.12g",
          name, got->worst, want->worst);
    check(fabs(got->sparsity - want->sparsity) <= 1e-12, "%s: sparsity %.12g, should be %.12g",
          name, got->sparsity, want->sparsity);
}

static int place_of(float x, float (*of)(int), int count)
{
    for (int n = 0; n < count; n++)
        if (of(n) == x)
            return n;
    check(false, "%.9g is not in the grid", (double)x);
    return -1;
}

static float theta_of(int n) { return tune_theta(n); }
static float keep_of(int n) { return tune_keep(n); }
static float lambda_of(int n) { return tune_lambda(n); }

/* Would this lambda skip nothing over a mask? Then it is to be off. */
static bool skips_nothing(const bench *b, const bool *in, sparge_thresholds mask, int lambda)
{
    sparge_thresholds with = mask;
    with.lambda = tune_lambda(lambda);
    bool nothing = true;
    for (int64_t n = 0; n < b->count; n++)
        nothing &= !in[n] || worth_of(b, n, 0, with).sparsity == worth_of(b, n, 0, mask).sparsity;
    return nothing;
}

/* What the tuner chose for the inputs `in`, against the whole grid. */
static void is_best(const bench *b, worth *const *masks, const bool *in,
                    const sparge_tune_options *how, const sparge_thresholds *thresholds)
{
    const best want = best_mask(masks, in, b->count, how);
    const int theta = place_of(thresholds->theta, theta_of, TUNE_THETAS);
    const int keep =
        place_of(how->topk && thresholds->topk != SPARGE_OFF ? thresholds->topk : thresholds->tau,
                 keep_of, TUNE_KEEPS);
    const int lambda = place_of(thresholds->lambda, lambda_of, TUNE_LAMBDAS);
    if (want.none && how->sparsity > 0.0) { /* then the sparsest */
        const int at = theta * TUNE_KEEPS + keep;
        for (int n = 0; n < TUNE_THETAS * TUNE_KEEPS; n++)
            check(mean_sparsity(masks, in, b->count, at) >= mean_sparsity(masks, in, b->count, n),
                  "not the sparsest: %.9g", mean_sparsity(masks, in, b->count, at));
        return;
    }
    if (want.none) { /* dense; then lambda alone may skip something */
        const sparge_thresholds mask = thresholds_at(0, LAST_KEEP, LAST_LAMBDA, false);
        const int at = LAST_KEEP;
        const bool holds = worst_error(masks, in, b->count, at) < how->l1;
        const int most = best_lambda(b, in, mask, how->l2 * (1.0 + near));
        const int least = best_lambda(b, in, mask, how->l2 * (1.0 - near));
        check(theta == 0 && keep == LAST_KEEP, "the mask is not dense");
        check(lambda == LAST_LAMBDA || (holds && lambda >= most && lambda <= least),
              "lambda %d, should be %d", lambda, most);
        check(lambda < LAST_LAMBDA || !holds || skips_nothing(b, in, mask, least),
              "lambda would skip something");
        return;
    }
    check((thresholds->topk == SPARGE_OFF) == !how->topk &&
              (thresholds->tau == SPARGE_OFF) == how->topk,
          "tau or topk");
    const int at = theta * TUNE_KEEPS + keep;
    const double sparsity = mean_sparsity(masks, in, b->count, at),
                 error = worst_error(masks, in, b->count, at);
    if (how->sparsity > 0.0) {
        check(sparsity >= how->sparsity, "sparsity %.9g is not enough", sparsity);
        check(error <= want.error * (1.0 + near) + 1e-6, "error %.9g, there is %.9g", error,
              want.error);
        check_equal(lambda, (int)LAST_LAMBDA);
        return;
    }
    check(error < how->l1 * (1.0 + near), "error %.9g is above l1", error);
    check(sparsity >= want.least - 1e-12 && sparsity <= want.most + 1e-12,
          "sparsity %.9g at theta %d keep %d, the best is %.9g", sparsity, theta, keep,
          want.sparsity);
    if (want.least == want.most) /* of equal ones that of the least error */
        check(error <= want.error * (1.0 + near) + 1e-6,
              "error %.9g at theta %d keep %d, there is %.9g", error, theta, keep, want.error);
    const sparge_thresholds mask = thresholds_at(theta, keep, LAST_LAMBDA, how->topk);
    const int most = best_lambda(b, in, mask, how->l2 * (1.0 + near));
    const int least = best_lambda(b, in, mask, how->l2 * (1.0 - near));
    check(lambda == LAST_LAMBDA
              ? skips_nothing(b, in, mask, least)
              : lambda >= most && lambda <= least && !skips_nothing(b, in, mask, lambda),
          "lambda %d, should be %d or up to %d", lambda, most, least);
}

static void in_all(bool in[4], int64_t count)
{
    for (int64_t n = 0; n < 4; n++)
        in[n] = n < count;
}

static void disturb(tensor *t, const tensor *from, float by)
{
    for (int64_t n = 0; n < tensor_count(t); n++)
        t->x[n] = from->x[n] + by * check_normal();
}

/* Queries that look at some clusters of keys more than at others; inputs after the first differ
 * from it by so much noise. */
static bench bench_at_random(int64_t count, float noise)
{
    bench b = {.count = count, .o = sparge_options_default(SPARGE_RULES_DEFAULT)};
    b.o.backend = check_int(0, 1) ? SPARGE_CPU : SPARGE_REF;
    b.o.threads = 1;
    b.o.block_q = b.o.block_k = 8;
    b.o.skip_rows = check_int(0, 1) ? 4 : 0;
    b.o.causal = (sparge_causal)check_int(0, 2);
    b.o.sink = check_int(0, 1);
    b.o.qk_dtype = check_int(0, 1) ? SPARGE_INT8 : SPARGE_F32;
    b.o.pv_dtype = check_int(0, 1) ? SPARGE_INT8 : SPARGE_INT12;
    const int64_t len = check_int(40, 58), k_len = len + check_int(0, 9);
    for (int64_t n = 0; n < count; n++) {
        const shape s = shape_of(1, 1, 1, len, k_len, 8, 4);
        b.x[n] = clustered(&s, 8, 8, check_uniform(0.9f, 1.4f));
        if (n > 0) {
            disturb(&b.x[n].q, &b.x[0].q, noise);
            disturb(&b.x[n].k, &b.x[0].k, noise);
            disturb(&b.x[n].v, &b.x[0].v, noise);
            problem_write(&b.x[n]);
        }
    }
    bench_begin(&b);
    return b;
}

static void against_the_grid(const char *name, int64_t count, bool topk, int turns)
{
    static const double bounds[][2] = {{0.02, 0.03}, {0.1, 0.2}, {0.3, 0.35}};
    static const double sparsities[] = {0.2137, 0.6137}; /* no quotient of counts */
    int64_t sparse = 0, skipping = 0;
    for (int turn = 0; turn < turns; turn++) {
        check_case("%s of %lld inputs, topk %d, turn %d", name, (long long)count, topk, turn);
        bench b = bench_at_random(count, 0.03f);
        worth *masks[4];
        bool in[4];
        for (int64_t n = 0; n < count; n++)
            masks[n] = worth_of_masks(&b, n, topk);
        in_all(in, count);
        for (int64_t n = 0; n < COUNT(bounds) + COUNT(sparsities); n++) {
            sparge_tune_options how = {.topk = topk};
            if (n < COUNT(bounds)) {
                how.l1 = bounds[n][0];
                how.l2 = bounds[n][1];
            } else
                how.sparsity = sparsities[n - COUNT(bounds)];
            check_case("%s of %lld inputs, topk %d, turn %d, l1 %g l2 %g or sparsity %g", name,
                       (long long)count, topk, turn, how.l1, how.l2, how.sparsity);
            const sparge_tuned t = tuned(&b, &how);
            if (t.back_off == SPARGE_AS_CHOSEN)
                is_best(&b, masks, in, &how, &t.thresholds);
            sparse += !t.dense;
            skipping += t.thresholds.lambda > -INFINITY;
            const sparge_thresholds same[4] = {t.thresholds, t.thresholds, t.thresholds,
                                               t.thresholds};
            const sparge_tune_errors e = errors_of(&b, in, same);
            same_errors("in_sample", &t.in_sample, &e);
            if (count < 2)
                check(t.held_out.inputs == 0 && isnan(t.held_out.worst) && isnan(t.held_out.mean),
                      "held out of one");
        }
        for (int64_t n = 0; n < count; n++)
            check_free(masks[n]);
        bench_end(&b);
    }
    cr_log_info("%lld sparse, %lld with lambda", (long long)sparse, (long long)skipping);
    check(sparse >= 2 * turns && (count > 1 || skipping >= 1), "%lld sparse, %lld with lambda",
          (long long)sparse, (long long)skipping);
}

Test(tune, the_best_of_the_grid_for_one_input) { against_the_grid("grid", 1, false, 4); }
Test(tune, the_best_of_the_grid_by_topk) { against_the_grid("grid", 1, true, 3); }
Test(tune, the_best_of_the_grid_for_two_inputs) { against_the_grid("grid", 2, false, 2); }
Test(tune, the_best_of_the_grid_for_three_inputs) { against_the_grid("grid", 3, true, 2); }

/* ---- Inputs that are held out
 * -------------------------------------------------------------------------
 */

/* The inputs of a bench in another order: the ones before `last` and those after it, then `last`.
 */
static bench bench_without(const bench *b, int64_t last)
{
    bench other = *b;
    for (int64_t n = last; n + 1 < b->count; n++) {
        other.x[n] = b->x[n + 1];
        other.p[n] = b->p[n + 1];
        other.dense[n] = b->dense[n + 1];
    }
    other.x[b->count - 1] = b->x[last];
    other.p[b->count - 1] = b->p[last];
    other.dense[b->count - 1] = b->dense[last];
    return other;
}

/* Without it (on the others), on it: the same as tuning on the others alone and calling attention
 * by hand.
 */
Test(tune, each_input_is_left_out_in_turn)
{
    int64_t sparse = 0;
    for (int turn = 0; turn < 6; turn++) {
        const int64_t count = 2 + turn % 3;
        check_case("leave one of %lld out, turn %d", (long long)count, turn);
        bench b = bench_at_random(count, turn < 3 ? 0.05f : 0.4f);
        const sparge_tune_options how = {.l1 = 0.15, .l2 = 0.25, .topk = turn == 2};
        sparge_tune_options one = how;
        one.held_out = 1;
        const sparge_tuned t = tuned(&b, &how);
        check_equal(t.in_sample.inputs, count);
        check_equal(t.held_out.inputs, count);
        check_equal(t.held_out_first.inputs, count);
        sparge_tune_errors want = {.inputs = count};
        for (int64_t n = 0; n < count; n++) {
            bench other = bench_without(&b, n);
            const sparge_tuned without = tuned(&other, &one);
            check_equal(without.in_sample.inputs, count - 1);
            check_equal(without.held_out.inputs, (int64_t)1);
            other.count = count - 1; /* nobody else there */
            if (without.back_off == SPARGE_AS_CHOSEN) {
                const worth w = worth_of(&b, n, 0, without.thresholds);
                check_close(without.held_out.mean, w.error, 1e-9 * w.error);
                check_close(without.held_out.sparsity, w.sparsity, 1e-12);
                check_equal(without.held_out_first.mean, without.held_out.mean);
            }
            if (count == 2) { /* what is tuned on the other one alone */
                const sparge_tuned single = tuned(&other, &how);
                const worth w = worth_of(&b, n, 0, single.thresholds);
                check_close(without.held_out_first.mean, w.error, 1e-9 * w.error);
                check_equal(single.held_out.inputs, (int64_t)0);
                check(isnan(single.held_out.mean) && isnan(single.held_out.worst),
                      "errors of no input");
            }
            want.mean += without.held_out_first.mean / (double)count;
            want.worst = fmax(want.worst, without.held_out_first.worst);
            want.sparsity += without.held_out_first.sparsity / (double)count;
        }
        if (!t.dense || t.back_off != SPARGE_AS_CHOSEN) {
            same_errors("held_out_first", &t.held_out_first, &want);
            sparse++;
        }
        bench_end(&b);
    }
    check(sparse >= 4, "%lld heads were more than dense", (long long)sparse);
}

/* ---- Backing off
 * ---------------------------------------------------------------------------------------
 */

/* Does the error hold l2 over all inputs, by whole calls? */
static double worst_of(const bench *b, sparge_thresholds thresholds)
{
    double worst = 0.0;
    for (int64_t n = 0; n < b->count; n++)
        worst = fmax(worst, worth_of(b, n, 0, thresholds).error);
    return worst;
}

/* One input to tune on and others that are held out. The choice is that of the first alone; then,
 * in this order and no further than needed: lambda lowered, the keep raised, dense. */
static sparge_back_off backs_off_rightly(const bench *b, const sparge_tune_options *how)
{
    bench first = *b;
    first.count = 1;
    sparge_tune_options alone = *how;
    alone.held_out = 0;
    const sparge_tuned chosen = tuned(&first, &alone), t = tuned(b, how);
    check_equal(t.in_sample.inputs, (int64_t)1);
    check_equal(t.held_out.inputs, b->count - 1);
    sparge_thresholds thresholds[4] = {chosen.thresholds, chosen.thresholds, chosen.thresholds,
                                       chosen.thresholds};
    bool in[4], out[4];
    for (int n = 0; n < 4; n++) {
        in[n] = n == 0;
        out[n] = n > 0 && n < b->count;
    }
    sparge_tune_errors e = errors_of(b, out, thresholds);
    same_errors("held_out_first", &t.held_out_first, &e);
    for (int n = 0; n < 4; n++)
        thresholds[n] = t.thresholds;
    e = errors_of(b, out, thresholds);
    same_errors("held_out", &t.held_out, &e);
    e = errors_of(b, in, thresholds);
    same_errors("in_sample", &t.in_sample, &e);

    sparge_thresholds off = chosen.thresholds;
    off.lambda = -INFINITY;
    if ((how->topk ? off.topk : off.tau) == 1.0f) /* the mask was dense */
        off = thresholds_at(0, LAST_KEEP, LAST_LAMBDA, false);
    if (chosen.dense || !(worst_of(b, chosen.thresholds) > how->l2)) {
        check(t.back_off == SPARGE_AS_CHOSEN &&
                  !memcmp(&t.thresholds, &chosen.thresholds, sizeof t.thresholds),
              "backs off");
        return t.back_off;
    }
    check(t.held_out_first.worst > how->l2, "held_out_first is %.9g", t.held_out_first.worst);
    for (int n = 0; n < TUNE_LAMBDAS; n++) {
        sparge_thresholds lowered = n < LAST_LAMBDA ? chosen.thresholds : off;
        lowered.lambda = tune_lambda(n);
        if (lowered.lambda >= chosen.thresholds.lambda)
            continue;
        if (!memcmp(&t.thresholds, &lowered, sizeof lowered)) {
            check_equal((int)t.back_off, (int)SPARGE_LAMBDA_LOWERED);
            check(worst_of(b, lowered) <= how->l2, "lowered, but the error is %.9g",
                  worst_of(b, lowered));
            return t.back_off;
        }
        check(worst_of(b, lowered) > how->l2 * (1.0 - near), "lambda %d would do: %.9g", n,
              worst_of(b, lowered));
    }
    const int keep = place_of(how->topk ? off.topk : off.tau, keep_of, TUNE_KEEPS);
    for (int n = keep + 1; n < LAST_KEEP; n++) {
        sparge_thresholds raised = off;
        *(how->topk ? &raised.topk : &raised.tau) = tune_keep(n);
        if (!memcmp(&t.thresholds, &raised, sizeof raised)) {
            check_equal((int)t.back_off, (int)SPARGE_TAU_RAISED);
            check(worst_of(b, raised) <= how->l2, "raised, but the error is %.9g",
                  worst_of(b, raised));
            return t.back_off;
        }
        check(worst_of(b, raised) > how->l2 * (1.0 - near), "keep %d would do: %.9g", n,
              worst_of(b, raised));
    }
    check_equal((int)t.back_off, (int)SPARGE_LEFT_DENSE);
    check(t.dense && t.thresholds.theta == -1.0f && t.thresholds.tau == 1.0f &&
              t.thresholds.topk == SPARGE_OFF && t.thresholds.lambda == -INFINITY,
          "not dense");
    return t.back_off;
}

Test(tune, backs_off_no_further_than_needed)
{
    static const double bounds[][2] = {{0.03, 0.25}, {0.2, 0.21}, {0.1, 0.13}};
    int64_t times[4] = {0};
    for (int turn = 0; turn < 24; turn++) {
        check_case("back off, turn %d", turn);
        bench b = bench_at_random(2 + turn % 2, check_uniform(0.05f, 0.3f));
        const sparge_tune_options how = {.l1 = bounds[turn % 3][0],
                                         .l2 = bounds[turn % 3][1],
                                         .held_out = b.count - 1,
                                         .topk = turn % 5 == 4};
        times[backs_off_rightly(&b, &how)]++;
        bench_end(&b);
    }
    cr_log_info("as chosen %lld, lambda lowered %lld, raised %lld, dense %lld", (long long)times[0],
                (long long)times[1], (long long)times[2], (long long)times[3]);
    check(times[SPARGE_AS_CHOSEN] && times[SPARGE_LAMBDA_LOWERED] && times[SPARGE_TAU_RAISED],
          "not every stage");
}

/* ---- Heads whose answer is known
 * ------------------------------------------------------------------------
 */

enum { SIDE = 8, DIM = 16 };

/* A bit of noise in q and k, to which directions are added; block n of v is 1 in channel n % 8. No
 * mean is taken off, and a score is q . k. */
static bench bench_of(int64_t q_blocks, int64_t k_blocks)
{
    bench b = {.count = 1, .o = sparge_options_default(SPARGE_RULES_DEFAULT)};
    b.o.backend = SPARGE_REF;
    b.o.block_q = b.o.block_k = SIDE;
    b.o.smooth_k = false;
    b.o.softmax_scale = 1.0f;
    const shape s = shape_of(1, 1, 1, q_blocks * SIDE, k_blocks * SIDE, DIM, 8);
    b.x[0] = clustered(&s, SIDE, SIDE, 1.0f);
    for (int64_t n = 0; n < tensor_count(&b.x[0].q); n++)
        b.x[0].q.x[n] = 0.01f * check_normal();
    for (int64_t n = 0; n < tensor_count(&b.x[0].k); n++)
        b.x[0].k.x[n] = 0.01f * check_normal();
    for (int64_t n = 0; n < tensor_count(&b.x[0].v); n++)
        b.x[0].v.x[n] = (n / 8 / SIDE % 8 == n % 8 ? 1.0f : 0.0f) + 0.01f * check_normal();
    return b;
}

static void along(tensor *t, int64_t block, int64_t axis, float by)
{
    for (int64_t n = 0; n < SIDE; n++)
        t->x[(block * SIDE + n) * t->channels + axis] += by;
}

static void along_one(tensor *t, int64_t token, int64_t axis, float by)
{
    t->x[token * t->channels + axis] += by;
}

/* Tunes and sees that so many pairs of all are computed, by a whole call. */
static sparge_tuned keeps(bench *b, double l1, double l2, int64_t pairs)
{
    problem_write(&b->x[0]);
    bench_begin(b);
    const sparge_tune_options how = {.l1 = l1, .l2 = l2};
    const sparge_tuned t = tuned(b, &how);
    answer a = whole(&b->x[0], t.thresholds);
    check(a.head->qk_done == pairs, "keeps %lld of %lld pairs, should be %lld; theta %g tau %g",
          (long long)a.head->qk_done, (long long)a.head->pairs, (long long)pairs,
          (double)t.thresholds.theta, (double)t.thresholds.tau);
    const double l1_whole = relative_l1(&a, &b->dense[0], 0, 0);
    check(l1_whole <= l2, "relative L1 %.9g", l1_whole);
    check(t.dense == (pairs == a.head->pairs && a.head->pv_done == (double)pairs), "dense is %d",
          t.dense);
    answer_free(&a);
    return t;
}

/* Every block of queries looks at one cluster of keys. */
Test(tune, one_cluster_each)
{
    for (int turn = 0; turn < 3; turn++) {
        check_case("one cluster each, %d", turn);
        bench b = bench_of(5, 7);
        for (int64_t j = 0; j < 7; j++)
            along(&b.x[0].k, j, j, 4.0f);
        for (int64_t i = 0; i < 5; i++)
            along(&b.x[0].q, i, check_int(0, 6), 4.0f);
        keeps(&b, 0.05, 0.06, 5);
        bench_end(&b);
    }
}

/* Everybody looks at the first keys: those and the diagonal, which is forced. */
Test(tune, a_sink)
{
    for (int causal = 0; causal < 2; causal++) {
        check_case("sink, causal %d", causal);
        bench b = bench_of(6, 6);
        b.o.causal = causal ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE;
        along(&b.x[0].k, 0, 0, 5.0f);
        for (int64_t i = 0; i < 6; i++)
            along(&b.x[0].q, i, 0, 4.0f);
        keeps(&b, 0.05, 0.06, causal ? 11 : 6);
        bench_end(&b);
    }
}

/* Everybody looks at its own block and a bit less at the one before; all that is older hardly
 * matters. TopCdf keeps the two, but in the second row, where they are all the mass there is and
 * the older one goes.
 */
Test(tune, a_local_window)
{
    check_case("local window");
    bench b = bench_of(6, 6);
    b.o.causal = SPARGE_CAUSAL_END;
    for (int64_t i = 0; i < 6; i++) {
        along(&b.x[0].k, i, i, 3.0f);
        for (int64_t j = 0; j < i; j++)
            along(&b.x[0].q, i, j, j == i - 1 ? -1.0f / 3.0f : -1.0f - (float)(i - j));
    }
    keeps(&b, 0.25, 0.3, 10);
    bench_end(&b);
}

/* All keys count alike, and values differ from block to block. */
Test(tune, a_uniform_head_stays_dense)
{
    check_case("uniform");
    bench b = bench_of(4, 5);
    for (int64_t i = 0; i < 4; i++)
        along(&b.x[0].q, i, 0, 1.0f);
    const sparge_tuned t = keeps(&b, 0.02, 0.03, 20);
    check(t.dense && t.thresholds.theta == -1.0f && t.thresholds.tau == 1.0f &&
              t.thresholds.lambda == -INFINITY,
          "not dense");
    bench_end(&b);
}

/* One key that everybody looks at hides among keys that point away: only where its block does not
 * count as similar is it kept, and then little else is needed. Of its cosines 36 of 64 agree. */
Test(tune, a_hidden_key_asks_for_theta)
{
    check_case("hidden key");
    bench b = bench_of(4, 6);
    for (int64_t i = 0; i < 4; i++)
        along(&b.x[0].q, i, 0, 4.0f);
    for (int64_t j = 0; j < 6; j++) /* the others: S falls with j, none of them matters */
        along(&b.x[0].k, j, 0, j == 4 ? -2.0f : -0.1f * (float)(j + 1));
    along_one(&b.x[0].k, 4 * SIDE + 3, 0, 12.0f);
    const sparge_tuned t = keeps(&b, 0.01, 0.02, 8);
    check(t.thresholds.theta >= 0.5625f, "theta is %g", (double)t.thresholds.theta);
    bench_end(&b);
}

/* The same where no mask may drop anything, but P.V need not be computed. */
Test(tune, lambda_alone)
{
    check_case("lambda alone");
    bench b = bench_of(3, 2);
    for (int64_t i = 0; i < 3; i++)
        along(&b.x[0].q, i, 0, 4.0f);
    along(&b.x[0].k, 0, 0, -2.0f);
    along_one(&b.x[0].k, 3, 0, 12.0f);
    const sparge_tuned t = keeps(&b, 0.01, 0.02, 6);
    check_close(t.in_sample.sparsity, 0.25, 1e-12);
    check_equal(t.thresholds.lambda, 0.0f);
    bench_end(&b);
}

/* Blocks that nobody looks at in the first input, of so little mass that no tau below 1 brings them
 * back; in the second one of them hides the key that takes everything. */
Test(tune, an_input_that_disagrees_leaves_the_head_dense)
{
    for (int topk = 0; topk < 2; topk++) {
        check_case("an input that disagrees, topk %d", topk);
        bench b = bench_of(3, 5), other = bench_of(3, 5);
        b.count = 2;
        b.x[1] = other.x[0];
        for (int n = 0; n < 2; n++) {
            for (int64_t i = 0; i < 3; i++)
                along(&b.x[n].q, i, 0, 4.0f);
            for (int64_t j = 0; j < 5; j++)
                along(&b.x[n].k, j, 0, j == 1 ? 5.0f : j == 3 ? -6.0f : -2.0f);
        }
        along_one(&b.x[1].k, 3 * SIDE + 2, 0, 20.0f);
        problem_write(&b.x[0]);
        problem_write(&b.x[1]);
        bench_begin(&b);
        const sparge_tune_options how = {.l1 = 0.05, .l2 = 0.06, .held_out = 1, .topk = topk};
        /* a topk of almost 1 is all of 5 */
        check_equal((int)backs_off_rightly(&b, &how),
                    (int)(topk ? SPARGE_TAU_RAISED : SPARGE_LEFT_DENSE));
        bench_end(&b);
    }
}

/* ---- Many heads: threads, resuming, giving up
 * ------------------------------------------------------------ */

enum { HEADS = 6, KV_HEADS = 3 };

/* Two inputs of six heads on three key heads, of two lengths and batches; head `spoilt` is not
 * finite. */
typedef struct model {
    problem x[2];
    sparge_problem p[2];
    sparge_options o;
    sparge_tune_options how;
} model;

static model model_make(void)
{
    model m = {.o = sparge_options_default(SPARGE_RULES_DEFAULT), .how = {.l1 = 0.1, .l2 = 0.15}};
    m.o.backend = SPARGE_CPU;
    m.o.block_q = 16;
    m.o.block_k = 8;
    m.o.causal = SPARGE_CAUSAL_END;
    for (int n = 0; n < 2; n++) {
        const shape s = shape_of(2 - n, HEADS, KV_HEADS, 50 + 9 * n, 57 + 9 * n, 12, 10);
        m.x[n] = clustered(&s, 16, 8, 1.1f);
        m.p[n] = m.x[n].p;
    }
    return m;
}

static void model_free(model *m)
{
    problem_free(&m->x[0]);
    problem_free(&m->x[1]);
}

static void model_tune(const model *m, sparge_tuned *t)
{
    sparge_error error = {"poison"};
    check(sparge_tune(m->p, 2, &m->o, &m->how, t, &error) == SPARGE_OK, "%s", error.text);
    check(error.text[0] == '\0', "text after success: %s", error.text);
}

/* Everything but the time that it took. */
static void same_tuned(const sparge_tuned *got, const sparge_tuned *want)
{
    check(got->done == want->done && got->finite == want->finite && got->dense == want->dense &&
              got->back_off == want->back_off,
          "flags");
    check_same_as("thresholds", &got->thresholds.theta, &want->thresholds.theta, 4);
    const sparge_tune_errors *const a[] = {&got->in_sample, &got->held_out, &got->held_out_first};
    const sparge_tune_errors *const b[] = {&want->in_sample, &want->held_out,
                                           &want->held_out_first};
    for (int n = 0; n < 3; n++) {
        check_equal(a[n]->inputs, b[n]->inputs);
        check_same_as("errors", &a[n]->mean, &b[n]->mean, 3);
    }
    check_equal(got->dense_passes, want->dense_passes);
}

static const sparge_tuned untouched = {
    .finite = true, .thresholds = {9, 8, 7, 6, 0}, .dense_passes = 5, .seconds = 4};

static bool is_untouched(const sparge_tuned *t)
{
    return !t->done && t->finite && !t->dense && t->thresholds.theta == 9 &&
           t->thresholds.tau == 8 && t->thresholds.topk == 7 && t->thresholds.lambda == 6 &&
           t->dense_passes == 5 && t->seconds == 4;
}

/* The thresholds of a head do not depend on the threads, on the other heads, or on when they were
 * found. */
Test(tune, every_number_of_threads)
{
    check_case("threads");
    model m = model_make();
    sparge_tuned want[HEADS] = {{0}};
    m.o.threads = 1;
    model_tune(&m, want);
    int64_t sparse = 0;
    for (int h = 0; h < HEADS; h++) {
        check(want[h].done && want[h].finite, "head %d", h);
        check_equal(want[h].in_sample.inputs, (int64_t)3);
        check_equal(want[h].held_out.inputs, (int64_t)3);
        check(want[h].seconds > 0.0 && want[h].dense_passes > 0.0, "head %d took no time", h);
        sparse += !want[h].dense;
    }
    check(sparse >= 1, "%lld sparse heads", (long long)sparse);
    static const int threads[] = {2, 5, 12, 0};
    for (int64_t n = 0; n < COUNT(threads); n++) {
        sparge_tuned got[HEADS] = {{0}};
        m.o.threads = threads[n];
        model_tune(&m, got);
        for (int h = 0; h < HEADS; h++)
            same_tuned(&got[h], &want[h]);
    }
    m.how.held_out = 1; /* the last of two inputs, whose batches are 2 and 1 */
    sparge_tuned out[HEADS] = {{0}};
    model_tune(&m, out);
    for (int h = 0; h < HEADS; h++) {
        check_equal(out[h].in_sample.inputs, (int64_t)2);
        check_equal(out[h].held_out.inputs, (int64_t)1);
    }
    m.how.held_out = 0;
    m.o.threads = 2; /* thresholds play no part */
    m.o.thresholds = (sparge_thresholds){0.5f, 0.1f, 0.2f, -1.0f, 0};
    const sparge_thresholds each[HEADS] = {{0}};
    m.o.per_head = each;
    sparge_tuned got[HEADS] = {{0}};
    model_tune(&m, got);
    for (int h = 0; h < HEADS; h++)
        same_tuned(&got[h], &want[h]);
    model_free(&m);
}

/* The other backend gives the same heads: every bit of what they are made of is the same. */
Test(tune, ref_and_cpu_agree)
{
    check_case("backends");
    model m = model_make();
    sparge_tuned cpu[HEADS] = {{0}}, ref[HEADS] = {{0}};
    model_tune(&m, cpu);
    m.o.backend = SPARGE_REF;
    model_tune(&m, ref);
    for (int h = 0; h < HEADS; h++)
        same_tuned(&cpu[h], &ref[h]);
    model_free(&m);
}

typedef struct witness {
    int64_t calls, stop_after, finished[HEADS], finished_calls;
    double last;
    bool backwards, outside;
    int inside; /* callbacks at once */
    bool together;
} witness;

static bool on_progress(void *user, double done)
{
    witness *w = user;
    w->together |= __atomic_add_fetch(&w->inside, 1, __ATOMIC_SEQ_CST) != 1;
    w->backwards |= !(done >= w->last);
    w->outside |= !(done >= 0.0 && done <= 1.0);
    w->last = done;
    w->calls++;
    __atomic_sub_fetch(&w->inside, 1, __ATOMIC_SEQ_CST);
    return w->stop_after < 0 || w->calls <= w->stop_after;
}

static void on_finished(void *user, int64_t head)
{
    witness *w = user;
    w->together |= __atomic_add_fetch(&w->inside, 1, __ATOMIC_SEQ_CST) != 1;
    w->finished_calls++;
    if (head >= 0 && head < HEADS)
        w->finished[head]++;
    __atomic_sub_fetch(&w->inside, 1, __ATOMIC_SEQ_CST);
}

static witness watch_model(model *m, int64_t stop_after, sparge_tuned *t)
{
    witness w = {.stop_after = stop_after};
    m->how.progress = on_progress;
    m->how.finished = on_finished;
    m->how.user = &w;
    model_tune(m, t);
    check(!w.backwards && !w.outside && !w.together,
          "progress ran backwards, out of 0..1 or in two threads");
    for (int h = 0; h < HEADS; h++)
        check(w.finished[h] <= 1, "head %d finished %lld times", h, (long long)w.finished[h]);
    return w;
}

Test(tune, progress_goes_from_0_to_1_and_every_head_finishes_once)
{
    for (int threads = 1; threads <= 4; threads += 3) {
        check_case("progress, %d threads", threads);
        model m = model_make();
        m.o.threads = threads;
        sparge_tuned t[HEADS] = {{0}};
        const witness w = watch_model(&m, -1, t);
        check(w.calls >= HEADS * 10, "%lld calls", (long long)w.calls);
        check_equal(w.last, 1.0);
        for (int h = 0; h < HEADS; h++)
            check_equal(w.finished[h], (int64_t)1);
        model_free(&m);
    }
}

/* Stopped at any moment: no error, what is done is done as if nothing had been stopped, nothing
 * else is touched, and another call does the rest. */
Test(tune, stops_and_resumes)
{
    check_case("stop and resume");
    model m = model_make();
    sparge_tuned want[HEADS] = {{0}};
    m.o.threads = 1;
    const int64_t calls = watch_model(&m, -1, want).calls;
    int64_t parts = 0;
    for (int threads = 1; threads <= 3; threads += 2)
        for (int turn = 0; turn < 10; turn++) {
            const int64_t after = turn ? check_int(0, calls) : 0;
            check_case("stop after %lld of %lld calls, %d threads", (long long)after,
                       (long long)calls, threads);
            m.o.threads = threads;
            sparge_tuned t[HEADS];
            for (int h = 0; h < HEADS; h++)
                t[h] = untouched;
            const witness w = watch_model(&m, after, t);
            check(after == calls || w.calls == after + 1 || w.calls == calls,
                  "%lld calls after it was stopped", (long long)w.calls);
            int64_t done = 0;
            for (int h = 0; h < HEADS; h++) {
                check_equal((int)t[h].done, (int)w.finished[h]);
                if (t[h].done)
                    same_tuned(&t[h], &want[h]);
                else
                    check(is_untouched(&t[h]), "head %d is half done", h);
                done += t[h].done;
            }
            check(turn || done == 0, "%lld heads done before anything", (long long)done);
            parts += done > 0 && done < HEADS;
            const witness rest = watch_model(&m, -1, t);
            check_equal(rest.finished_calls, HEADS - done);
            for (int h = 0; h < HEADS; h++)
                same_tuned(&t[h], &want[h]);
        }
    check(parts >= 4, "%lld of the stops came midway", (long long)parts);
    model_free(&m);
}

Test(tune, heads_that_are_done_are_left_alone)
{
    check_case("done");
    model m = model_make();
    sparge_tuned want[HEADS] = {{0}}, t[HEADS], all[HEADS];
    model_tune(&m, want);
    for (int h = 0; h < HEADS; h++) {
        t[h] = all[h] = untouched;
        t[h].done = h % 2;
        all[h].done = true;
    }
    const witness w = watch_model(&m, -1, t);
    check_equal(w.finished_calls, (int64_t)HEADS / 2);
    check_equal(w.last, 1.0);
    for (int h = 0; h < HEADS; h++) {
        if (h % 2 == 0)
            same_tuned(&t[h], &want[h]);
        else
            check(t[h].done && t[h].thresholds.theta == 9 && t[h].seconds == 4 &&
                      t[h].dense_passes == 5,
                  "head %d", h);
    }
    const witness none = watch_model(&m, -1, all);
    check_equal(none.finished_calls, (int64_t)0);
    model_free(&m);
}

Test(tune, time_runs_out)
{
    check_case("seconds");
    model m = model_make();
    for (int threads = 1; threads <= 3; threads++) {
        sparge_tuned t[HEADS];
        for (int h = 0; h < HEADS; h++)
            t[h] = untouched;
        m.o.threads = threads;
        m.how.seconds = 1e-9;
        const witness w = watch_model(&m, -1, t);
        check_equal(w.finished_calls, (int64_t)0);
        for (int h = 0; h < HEADS; h++)
            check(is_untouched(&t[h]), "head %d", h);
    }
    sparge_tuned t[HEADS] = {{0}};
    m.how.seconds = 1e9;
    check_equal(watch_model(&m, -1, t).finished_calls, (int64_t)HEADS);
    model_free(&m);
}

/* ---- What is not finite, and what is 0
 * ------------------------------------------------------------------- */

Test(tune, a_head_that_is_nonfinite_is_left_dense)
{
    for (int what = 0; what < 4; what++) {
        check_case("not finite, %d", what);
        model m = model_make();
        m.how.held_out = what == 3;
        sparge_tuned want[HEADS] = {{0}}, got[HEADS] = {{0}};
        model_tune(&m, want);
        problem *x = &m.x[what == 3]; /* also where it is held out */
        tensor *t = what == 0 ? &x->q : what == 1 ? &x->k : &x->v;
        tensor_row(t, 0, 2, 3)[1] = what == 2 ? INFINITY : NAN;
        problem_write(x);
        const witness w = watch_model(&m, -1, got);
        check_equal(w.finished_calls, (int64_t)HEADS);
        for (int h = 0; h < HEADS; h++) {
            const bool hit = what == 0 ? h == 2 : h / (HEADS / KV_HEADS) == 2;
            if (!hit) {
                same_tuned(&got[h], &want[h]);
                continue;
            }
            const sparge_tuned *g = &got[h];
            check(g->done && !g->finite && g->dense && g->back_off == SPARGE_AS_CHOSEN,
                  "head %d: %d %d %d", h, g->done, g->finite, g->dense);
            check(g->thresholds.theta == -1.0f && g->thresholds.tau == 1.0f &&
                      g->thresholds.topk == SPARGE_OFF && g->thresholds.lambda == -INFINITY,
                  "thresholds of head %d", h);
            check(g->in_sample.inputs == 0 && isnan(g->in_sample.worst) &&
                      g->held_out.inputs == 0 && isnan(g->held_out.mean) &&
                      g->held_out_first.inputs == 0,
                  "errors of head %d", h);
        }
        model_free(&m);
    }
}

/* Scores that overflow: q, k and v are finite, attention is not. */
Test(tune, attention_that_is_nonfinite)
{
    check_case("overflow");
    bench b = bench_of(2, 3);
    for (int64_t n = 0; n < tensor_count(&b.x[0].q); n++)
        b.x[0].q.x[n] = 1e30f * (n % 3 ? 1.0f : -1.0f);
    for (int64_t n = 0; n < tensor_count(&b.x[0].k); n++)
        b.x[0].k.x[n] = 1e30f * (n % 2 ? 1.0f : -1.0f);
    problem_write(&b.x[0]);
    bench_begin(&b);
    sparge_tuned t = {0};
    const sparge_tune_options how = {.l1 = 0.1, .l2 = 0.2};
    check_equal(sparge_tune(b.p, 1, &b.o, &how, &t, NULL), SPARGE_OK);
    bool finite = true;
    for (int64_t n = 0; n < tensor_count(&b.dense[0].o); n++)
        finite &= isfinite(b.dense[0].o.x[n]);
    check(!finite, "this was to overflow");
    check(t.done && !t.finite && t.dense, "done %d finite %d dense %d", t.done, t.finite, t.dense);
    bench_end(&b);
}

/* Values of 0 give an output of 0, whatever is left out: the sparsest place has no error. */
Test(tune, values_of_zero)
{
    check_case("zero v");
    bench b = bench_at_random(2, 0.1f);
    for (int n = 0; n < 2; n++) {
        memset(b.x[n].v.x, 0, (size_t)tensor_count(&b.x[n].v) * sizeof(float));
        problem_write(&b.x[n]);
    }
    const sparge_tune_options how = {.l1 = 0.01, .l2 = 0.02};
    const sparge_tuned t = tuned(&b, &how);
    check(!t.dense && t.in_sample.worst == 0.0 && t.held_out.worst == 0.0, "errors %g and %g",
          t.in_sample.worst, t.held_out.worst);
    check_equal(t.thresholds.lambda, 0.0f);
    check(t.in_sample.sparsity > 0.3, "sparsity %g", t.in_sample.sparsity);
    bench_end(&b);
}

/* ---- Refusals
 * ---------------------------------------------------------------------------------------------- */

/* Two small inputs, to be spoilt. */
typedef struct asked {
    problem x[2];
    sparge_problem p[2];
    const sparge_problem *inputs;
    int64_t count;
    sparge_options o;
    const sparge_options *options;
    sparge_tune_options how;
    const sparge_tune_options *terms;
    sparge_tuned t[2], *heads;
} asked;

static void ask_begin(asked *a)
{
    *a = (asked){.count = 2, .how = {.l1 = 0.05, .l2 = 0.06}};
    for (int n = 0; n < 2; n++) {
        const shape s = shape_of(1, 2, 1, 9, 11, 4, 3);
        a->x[n] = problem_make(&s);
        a->p[n] = a->x[n].p;
    }
    a->o = a->x[0].o;
    a->inputs = a->p;
    a->options = &a->o;
    a->terms = &a->how;
    a->heads = a->t;
    a->t[0] = a->t[1] = untouched;
}

static void refuses(asked *a, sparge_status status, const char *words)
{
    check_case("refuses: %s", words);
    sparge_error error;
    memset(&error, 'x', sizeof error);
    for (int told = 0; told < 2; told++)
        check_equal(
            sparge_tune(a->inputs, a->count, a->options, a->terms, a->heads, told ? &error : NULL),
            status);
    check(memchr(error.text, '\0', sizeof error.text) && strstr(error.text, words),
          "it says \"%.80s\"", error.text);
    check(is_untouched(&a->t[0]) && is_untouched(&a->t[1]), "a head was touched");
    problem_free(&a->x[0]);
    problem_free(&a->x[1]);
}

#define REFUSES(status, words, ...) \
    do {                            \
        asked a;                    \
        ask_begin(&a);              \
        __VA_ARGS__;                \
        refuses(&a, status, words); \
    } while (0)

Test(tune, refuses_bad_arguments)
{
    REFUSES(SPARGE_ERR_ARGUMENT, "inputs is NULL", a.inputs = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "options is NULL", a.options = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "how is NULL", a.terms = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "heads is NULL", a.heads = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "count is 0, there must be an input", a.count = 0);
    REFUSES(SPARGE_ERR_ARGUMENT, "count is -1, there must be an input", a.count = -1);
    REFUSES(SPARGE_ERR_ARGUMENT, "l1 is 0.06 and l2 is 0.06, it must be that 0 < l1 < l2",
            a.how.l1 = 0.06);
    REFUSES(SPARGE_ERR_ARGUMENT, "l1 is 0.07 and l2 is 0.06", a.how.l1 = 0.07);
    REFUSES(SPARGE_ERR_ARGUMENT, "l1 is 0 and", a.how.l1 = 0.0);
    REFUSES(SPARGE_ERR_ARGUMENT, "l1 is -0.05 and", a.how.l1 = -0.05);
    REFUSES(SPARGE_ERR_ARGUMENT, "l1 is nan", a.how.l1 = (double)NAN);
    REFUSES(SPARGE_ERR_ARGUMENT, "l2 is nan", a.how.l2 = (double)NAN);
    REFUSES(SPARGE_ERR_ARGUMENT, "l2 is inf", a.how.l2 = (double)INFINITY);
    REFUSES(SPARGE_ERR_ARGUMENT, "sparsity is 1, it must be in (0, 1), or 0", a.how.sparsity = 1.0);
    REFUSES(SPARGE_ERR_ARGUMENT, "sparsity is -0.5", a.how.sparsity = -0.5);
    REFUSES(SPARGE_ERR_ARGUMENT, "sparsity is nan", a.how.sparsity = (double)NAN);
    REFUSES(SPARGE_ERR_ARGUMENT, "held_out is 2 of 2 inputs, it must leave one to tune on",
            a.how.held_out = 2);
    REFUSES(SPARGE_ERR_ARGUMENT, "held_out is -1 of 2 inputs", a.how.held_out = -1);
    REFUSES(SPARGE_ERR_ARGUMENT, "seconds is -1, it must be at least 0", a.how.seconds = -1.0);
    REFUSES(SPARGE_ERR_ARGUMENT, "seconds is nan", a.how.seconds = (double)NAN);
    REFUSES(SPARGE_ERR_ARGUMENT, "block_q is 0", a.o.block_q = 0);
    REFUSES(SPARGE_ERR_ARGUMENT, "v", a.p[1].v.data = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "threads", a.o.threads = -1);
}

Test(tune, refuses_shapes_that_do_not_fit)
{
    REFUSES(SPARGE_ERR_SHAPE, "input 1 is empty: batch 0, q_len 9, k_len 11", a.p[1].batch = 0);
    REFUSES(SPARGE_ERR_SHAPE, "input 0 is empty: batch 1, q_len 0, k_len 11", a.p[0].q_len = 0);
    REFUSES(SPARGE_ERR_SHAPE, "input 0 is empty: batch 1, q_len 9, k_len 0", a.p[0].k_len = 0);
    REFUSES(SPARGE_ERR_SHAPE,
            "input 1 has 1 heads, 1 key heads and 4 and 3 channels, input 0 has 2, 1, 4 and 3",
            a.p[1].heads = 1);
    REFUSES(SPARGE_ERR_SHAPE, "input 1 has 2 heads, 2 key heads", a.p[1].kv_heads = 2);
    REFUSES(SPARGE_ERR_SHAPE, "input 1 has 2 heads, 1 key heads and 3 and 3", a.p[1].dim = 3);
    REFUSES(SPARGE_ERR_SHAPE, "input 1 has 2 heads, 1 key heads and 4 and 2", a.p[1].dim_v = 2);
}

Test(tune, refuses_what_it_cannot)
{
    REFUSES(SPARGE_ERR_UNSUPPORTED, "input 1 has more queries, 9, than keys, 8, under START",
            a.o.causal = SPARGE_CAUSAL_START;
            a.p[1].k_len = 8);
    REFUSES(SPARGE_ERR_UNSUPPORTED, "rules are not the default ones, which alone are tuned",
            a.o.rules = SPARGE_RULES_PAPER);
    REFUSES(SPARGE_ERR_UNSUPPORTED, "rules are not the default ones",
            a.o.rules = SPARGE_RULES_UPSTREAM);
    REFUSES(SPARGE_ERR_UNSUPPORTED, "cell is 1, but theta, tau and topk are tuned without cells",
            a.o.cell = 1);
    REFUSES(SPARGE_ERR_ARGUMENT, "kernel is 3", a.o.cuda.kernel = 3);
    if (!sparge_backend_built(SPARGE_CUDA))
        REFUSES(SPARGE_ERR_UNSUPPORTED, "backend is cuda", a.o.backend = SPARGE_CUDA);
}

/* With a sparsity the bounds play no part, and the other way around. */
Test(tune, bounds_that_play_no_part)
{
    asked a;
    ask_begin(&a);
    check_case("no part");
    a.how = (sparge_tune_options){.l1 = (double)NAN, .l2 = -1.0, .sparsity = 0.1};
    check_equal(sparge_tune(a.p, 2, &a.o, &a.how, a.t, NULL), SPARGE_OK);
    problem_free(&a.x[0]);
    problem_free(&a.x[1]);
}

/* ---- What it takes
 * ------------------------------------------------------------------------------------------ */

/* Four blocks of queries and of keys, everything whole, one input that stays dense or not: dense
 * attention (1), the blocks one by one (1), whole calls. Lambda and folds none. */
Test(tune, dense_passes_by_hand)
{
    check_case("dense_passes");
    bench b = bench_of(4, 5);
    for (int64_t i = 0; i < 4; i++)
        along(&b.x[0].q, i, 0, 1.0f);
    problem_write(&b.x[0]);
    bench_begin(&b);
    sparge_tune_options how = {.sparsity = 0.55};
    const sparge_tuned t = tuned(&b, &how);
    answer a = whole(&b.x[0], t.thresholds);
    /* of 20 pairs: dense, the curve, and the choice */
    check_equal(t.dense_passes, (20.0 + 20.0 + (double)a.head->qk_done) / 20.0);
    answer_free(&a);
    how = (sparge_tune_options){.l1 = 1.0, .l2 = 1.5};
    const sparge_tuned skipping = tuned(&b, &how);
    a = whole(&b.x[0], skipping.thresholds);
    const double kept = (double)a.head->qk_done, done = (kept + a.head->pv_done) / 2.0;
    check(!skipping.dense && kept < 20.0, "kept %g", kept);
    check_close(skipping.dense_passes, (20.0 + 20.0 + kept + done) / 20.0,
                1e-12); /* and the curve of lambda */
    answer_free(&a);
    bench_end(&b);
}

/* The shapes of the real capture, if not its values: few passes over the inputs are enough. */
Test(tune, dense_passes_of_a_real_shape)
{
    check_case("dense_passes of a real shape");
    const shape s = shape_of(1, 1, 1, 1024, 1024, 64, 64);
    problem x[2];
    sparge_problem p[2];
    for (int n = 0; n < 2; n++) {
        x[n] = clustered(&s, 128, 64, 0.9f);
        if (n) { /* much like the first */
            disturb(&x[1].q, &x[0].q, 0.05f);
            disturb(&x[1].k, &x[0].k, 0.05f);
            disturb(&x[1].v, &x[0].v, 0.05f);
            problem_write(&x[1]);
        }
        p[n] = x[n].p;
    }
    sparge_options o = sparge_options_default(SPARGE_RULES_DEFAULT);
    o.causal = SPARGE_CAUSAL_END;
    const sparge_tune_options how = {.l1 = 0.05, .l2 = 0.06};
    sparge_tuned t = {0};
    check_equal(sparge_tune(p, 2, &o, &how, &t, NULL), SPARGE_OK);
    cr_log_info("%.2f dense passes, sparsity %.2f, back off %d", t.dense_passes,
                t.in_sample.sparsity, (int)t.back_off);
    check(t.dense_passes > 2.0 && t.dense_passes <= 10.0, "%g dense passes", t.dense_passes);
    problem_free(&x[0]);
    problem_free(&x[1]);
}

/* ---- Allocations that fail
 * ------------------------------------------------------------------------------------ */

static void survives(asked *a)
{
    for (int64_t n = 0;; n++) {
        check_case("%s, allocation %lld", sparge_backend_string(a->o.backend), (long long)n);
        sparge_error error;
        memset(&error, 'x', sizeof error);
        a->t[0] = untouched;
        a->t[1].done = true;
        heap_arm(n);
        const sparge_status status =
            sparge_tune(a->p, 2, &a->o, &a->how, a->t, n % 2 ? NULL : &error);
        heap.armed = false;
        check(heap.live == 0, "%lld allocations leak", (long long)heap.live);
        if (heap.calls <= n) {
            check(status == SPARGE_OK && a->t[0].done, "%s", sparge_status_string(status));
            check(n >= 60, "%lld allocations: is the library static and --wrap in use?",
                  (long long)n);
            return;
        }
        check(status == SPARGE_ERR_MEMORY, "%s", sparge_status_string(status));
        check(is_untouched(&a->t[0]), "a head is half done");
        check(n % 2 ||
                  (memchr(error.text, '\0', sizeof error.text) && strstr(error.text, "memory")),
              "it says \"%.40s\"", error.text);
    }
}

/* The dense answer that thresholds are held to is in f32, which no isa of ref is for. */
Test(tune, bf16_of_ref_and_of_auto)
{
    static const sparge_isa isa[] = {SPARGE_ISA_AUTO, SPARGE_ISA_AVX512VNNI, SPARGE_ISA_AMX};
    for (int n = 0; n <= 3; n++) {
        asked a;
        ask_begin(&a);
        a.o.backend = n < 3 ? SPARGE_REF : SPARGE_AUTO;
        a.o.isa = isa[n % 3];
        a.o.qk_dtype = a.o.pv_dtype = SPARGE_BF16;
        a.how = (sparge_tune_options){.l1 = 0.3, .l2 = 0.31};
        sparge_error error = {""};
        check(sparge_tune(a.p, 2, &a.o, &a.how, a.t, &error) == SPARGE_OK && a.t[0].done, "%d: %s",
              n, error.text);
        problem_free(&a.x[0]);
        problem_free(&a.x[1]);
    }
}

/* Of two inputs, one of which is held out and disagrees: with every stage of backing off. */
Test(tune, every_allocation_may_fail)
{
    for (sparge_backend backend = SPARGE_REF; backend <= SPARGE_CPU; backend++) {
        asked a;
        ask_begin(&a);
        a.o.backend = backend;
        a.o.threads = 1;
        a.o.block_q = 8;
        a.o.block_k = 4;
        a.how = (sparge_tune_options){.l1 = 0.3, .l2 = 0.31, .held_out = 1};
        for (int64_t n = 0; n < tensor_count(&a.x[1].v); n++)
            a.x[1].v.x[n] *= n % 2 ? 9.0f : -9.0f;
        problem_write(&a.x[1]);
        survives(&a);
        problem_free(&a.x[0]);
        problem_free(&a.x[1]);
    }
}
