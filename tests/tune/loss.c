/* SPDX-License-Identifier: Apache-2.0 */
/* loss.c: what heads cost by the loss, beside a direct loop in double. */
#include <math.h>
#include <string.h>

#include "sparge_tune.h"
#include "tests/support/heap.h"
#include "tests/support/problem.h"

TestSuite(loss);

static const sparge_method *method_of(const char *name)
{
    const sparge_method *m = sparge_method_find(name);
    check(m, "%s", name);
    return m;
}

/* ---- Measuring ---- */

enum { HEADS = 4, INPUTS = 2, POINTS = 3 };

typedef struct asked {
    problem x[INPUTS];
    tensor g[INPUTS];
    sparge_loss_input in[INPUTS], *inputs;
    int64_t count, points;
    sparge_options o, *options;
    const sparge_method *method;
    const double *param;
    sparge_loss_point point[HEADS * POINTS], *to;
    double passes, *dense_passes;
} asked;

/* A batch of two and a batch of one, of other lengths; each head has its own values. */
static void ask_begin(asked *a, const char *method, const double *value)
{
    static const int64_t len[INPUTS][3] = {{2, 70, 70}, {1, 45, 61}};
    *a = (asked){.count = INPUTS, .points = POINTS, .method = method_of(method)};
    for (int n = 0; n < INPUTS; n++) {
        const shape s = shape_of(len[n][0], HEADS, 2, len[n][1], len[n][2], 16, 8);
        a->x[n] = problem_make(&s);
        a->g[n] = tensor_make(len[n][0], HEADS, len[n][1], 8, n ? SPARGE_F32 : SPARGE_BF16,
                              n ? NHD : PADDED);
        tensor_fill(&a->g[n], -1.0f, 1.0f);
        a->in[n] = (sparge_loss_input){a->x[n].p, a->g[n].in, NULL};
    }
    a->o = a->x[0].o;
    a->o.qk_dtype = a->o.pv_dtype = SPARGE_INT8;
    a->o.causal = SPARGE_CAUSAL_END;
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < POINTS; i++)
            a->point[h * POINTS + i].first = value[(h + i) % POINTS];
    static const double spargeattn[] = {0.5, -1.0, -1.0, -(double)INFINITY, 0.0}; /* theta off */
    a->param = strcmp(method, "spargeattn") == 0 ? spargeattn : NULL;
    a->inputs = a->in;
    a->options = &a->o;
    a->to = a->point;
    a->dense_passes = &a->passes;
}

static void ask_end(asked *a)
{
    for (int n = 0; n < INPUTS; n++) {
        problem_free(&a->x[n]);
        tensor_free(&a->g[n]);
    }
}

static sparge_status ask(asked *a, sparge_error *error)
{
    return sparge_loss_measure(a->inputs, a->count, a->options, a->method, a->param, NULL, a->to,
                               a->points, a->dense_passes, error);
}

static void ask_well(asked *a)
{
    sparge_error error = {"x"};
    const sparge_status status = ask(a, &error);
    check(status == SPARGE_OK && !*error.text, "%s", error.text);
}

/* All heads by one value, that no context says. */
static answer answer_at(const asked *a, int n, double value)
{
    double param[SPARGE_MAX_PARAMS] = {0};
    for (int i = 0; i < SPARGE_MAX_PARAMS && a->method->param[i].name; i++)
        param[i] = a->param ? a->param[i] : a->method->param[i].usual;
    param[0] = value;
    problem y = a->x[n];
    y.o = a->o;
    answer r = answer_make(&y, SPARGE_F32, PACKED);
    sparge_plan plan;
    sparge_error error;
    check(sparge_method_plan(a->method, &y.p, &y.o, NULL, param, &plan, &error) == SPARGE_OK, "%s",
          error.text);
    r.result = (sparge_result){.o = tensor_out(&r.o), .head_counts = r.head};
    check(sparge_plan_run(&plan, NULL, &r.result, &error) == SPARGE_OK, "%s", error.text);
    tensor_read(&r.o);
    sparge_plan_free(&plan);
    return r;
}

static answer dense_answer(const asked *a, int n)
{
    problem y = a->x[n];
    y.o = a->o;
    y.o.qk_dtype = y.o.pv_dtype = SPARGE_F32;
    y.mask.bits = NULL;
    return attend(&y);
}

/* Adds input n under the i-th value of every head, by the definition. */
static void add_by_loop(asked *a, int n, int i, const answer *dense, sparge_loss_point *to,
                        double *products)
{
    for (int h = 0; h < HEADS; h++) {
        answer r = answer_at(a, n, a->point[h * POINTS + i].first);
        for (int64_t b = 0; b < r.o.batch; b++) {
            const sparge_counts *c = &r.head[b * HEADS + h];
            double sum = 0.0;
            for (int64_t t = 0; t < r.o.tokens; t++) {
                double dot = 0.0;
                for (int64_t e = 0; e < r.o.channels; e++)
                    dot += (double)tensor_row(&a->g[n], b, h, t)[e] *
                           ((double)tensor_row(&r.o, b, h, t)[e] -
                            (double)tensor_row(&dense->o, b, h, t)[e]);
                sum += dot * dot;
            }
            to[h * POINTS + i].loss += sum / (2.0 * (double)r.o.tokens) / 3.0;
            to[h * POINTS + i].density += (double)c->qk_tokens / (double)c->tokens / 3.0;
            *products += (double)c->qk_done + c->pv_done;
        }
        answer_free(&r);
    }
}

static void measures_by_loop(const char *method, const double *value, sparge_backend backend)
{
    check_case("%s, %s", method, sparge_backend_string(backend));
    asked a;
    ask_begin(&a, method, value);
    a.o.backend = backend;
    a.o.threads = backend == SPARGE_CPU ? 2 : 0;
    sparge_loss_point want[HEADS * POINTS] = {{0}};
    double products = 0.0, dense = 0.0;
    for (int n = 0; n < INPUTS; n++) {
        answer o = dense_answer(&a, n);
        dense += 2.0 * (double)o.result.counts.pairs;
        for (int i = 0; i < POINTS; i++)
            add_by_loop(&a, n, i, &o, want, &products);
        answer_free(&o);
    }
    ask_well(&a);
    double apart = 0.0;
    for (int n = 0; n < HEADS * POINTS; n++) {
        check_close(a.point[n].loss, want[n].loss, 1e-12 * want[n].loss);
        check_close(a.point[n].density, want[n].density, 1e-12);
        check(want[n].loss > 0.0, "no loss at point %d", n);
        apart = fmax(apart, fabs(want[n].density - want[0].density));
    }
    check(apart > 0.2, "all densities are alike: %g", apart);
    check_close(a.passes, 1.0 + products / dense, 1e-12);
    ask_end(&a);
}

static const double of_submass[] = {0.3, 0.8, 1.3}, of_tau[] = {0.3, 0.6, 0.95},
                    of_random[] = {0.2, 0.5, 0.9};

Test(loss, measured_as_by_a_direct_loop)
{
    measures_by_loop("submass", of_submass, SPARGE_REF);
    measures_by_loop("spargeattn", of_tau, SPARGE_REF);
    measures_by_loop("spargeattn", of_tau, SPARGE_CPU);
    measures_by_loop("random", of_random, SPARGE_CPU);
}

/* What is not finite makes the loss of its head not a number, and of no other. */
Test(loss, nonfinite)
{
    check_case("nonfinite");
    asked a;
    ask_begin(&a, "spargeattn", of_tau);
    ask_well(&a);
    sparge_loss_point want[HEADS * POINTS];
    memcpy(want, a.point, sizeof want);
    *tensor_row(&a.g[0], 1, 2, 3) = INFINITY;
    tensor_write(&a.g[0]);
    ask_well(&a);
    for (int n = 0; n < HEADS * POINTS; n++)
        if (n / POINTS == 2)
            check(isnan(a.point[n].loss), "%g", a.point[n].loss);
        else
            check_equal(a.point[n].loss, want[n].loss);
    ask_end(&a);
}

typedef struct witness {
    double last;
    int calls, stop_at;
} witness;

static bool on_progress(void *user, double done)
{
    witness *w = user;
    check(done >= w->last && done <= 1.0, "%g after %g", done, w->last);
    w->last = done;
    return ++w->calls != w->stop_at;
}

Test(loss, progress_goes_from_0_to_1_and_stops)
{
    check_case("progress");
    asked a;
    ask_begin(&a, "spargeattn", of_tau);
    witness w = {0};
    a.o.progress = on_progress;
    a.o.user = &w;
    ask_well(&a);
    check_equal(w.last, 1.0);
    const int calls = w.calls;
    for (int stop_at = 1; stop_at <= calls; stop_at += 5) {
        w = (witness){.stop_at = stop_at};
        check_equal(ask(&a, NULL), SPARGE_ERR_CANCELLED);
        check_equal(w.calls, stop_at);
    }
    ask_end(&a);
}

static void refuses(asked *a, sparge_status status, const char *words)
{
    check_case("refuses: %s", words);
    sparge_error error;
    memset(&error, 'x', sizeof error);
    check_equal(ask(a, NULL), status);
    check_equal(ask(a, &error), status);
    check(memchr(error.text, '\0', sizeof error.text) && strstr(error.text, words),
          "it says \"%.90s\"", error.text);
    ask_end(a);
}

#define REFUSES(status, words, ...)          \
    do {                                     \
        asked a;                             \
        ask_begin(&a, "spargeattn", of_tau); \
        __VA_ARGS__;                         \
        refuses(&a, status, words);          \
    } while (0)

Test(loss, refuses_what_cannot_be_measured)
{
    REFUSES(SPARGE_ERR_ARGUMENT, "inputs is NULL", a.inputs = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "options is NULL", a.options = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "method is NULL", a.method = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "point is NULL", a.to = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "dense_passes is NULL", a.dense_passes = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "count is 0, it must be at least 1", a.count = 0);
    REFUSES(SPARGE_ERR_ARGUMENT, "points is -1, it must be at least 1", a.points = -1);
    REFUSES(SPARGE_ERR_ARGUMENT, "g of input 1 is NULL", a.in[1].g.data = NULL);
    REFUSES(SPARGE_ERR_ARGUMENT, "g of input 0 has a dtype that is not f32, f16 or bf16",
            a.in[0].g.dtype = SPARGE_INT8);
    REFUSES(SPARGE_ERR_ARGUMENT, "tau of spargeattn is 1.5", a.point[4].first = 1.5);
    REFUSES(SPARGE_ERR_SHAPE, "input 1 has 2 heads", a.in[1].problem.heads = 2);
    REFUSES(SPARGE_ERR_SHAPE, "input 0 is empty", a.in[0].problem.k_len = 0);
    REFUSES(SPARGE_ERR_ARGUMENT, "dense has no parameter that sets its density",
            a.method = method_of("dense"));
    if (!sparge_backend_built(SPARGE_CUDA))
        REFUSES(SPARGE_ERR_UNSUPPORTED, "backend is cuda", a.o.backend = SPARGE_CUDA);
}

Test(loss, every_allocation_may_fail)
{
    asked a;
    ask_begin(&a, "spargeattn", of_tau);
    a.points = 2;
    for (int64_t n = 0;; n++) {
        check_case("allocation %lld", (long long)n);
        sparge_error error = {""};
        heap_arm(n);
        const sparge_status status = ask(&a, n % 2 ? NULL : &error);
        heap.armed = false;
        check(heap.live == 0, "%lld allocations leak", (long long)heap.live);
        if (heap.calls <= n) {
            check(status == SPARGE_OK && n >= 20, "%s after %lld", sparge_status_string(status),
                  (long long)n);
            break;
        }
        check(status == SPARGE_ERR_MEMORY && (n % 2 || strstr(error.text, "memory")), "%s: %s",
              sparge_status_string(status), error.text);
    }
    ask_end(&a);
}
