/* SPDX-License-Identifier: Apache-2.0 */
/* tune.c: sparge_tune with the cuda backend: inputs are in host memory, the work is done on the
 * device. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu.h"

#include "sparge_cuda.h"
#include "sparge_tune.h"

TestSuite(tune);

enum { HEADS = 2, INPUTS = 2 };

/* Runs of keys as long as a block around centres of their own, and queries that look at some of
 * them. */
static void cluster(tensor *t, int64_t run, float spread)
{
    float centre[64] = {0}, noise = 0.0f;
    for (int64_t line = 0; line < t->batch * t->heads * t->tokens; line++)
        for (int64_t c = 0; c < t->channels; c++) {
            if (line % t->tokens % run == 0) {
                centre[c] = spread * check_normal();
                noise = check_uniform(0.0f, 1.0f);
            }
            t->x[line * t->channels + c] = centre[c] + spread * noise * check_normal();
        }
    tensor_write(t);
}

typedef struct questions {
    problem x[INPUTS];
    sparge_problem p[INPUTS];
    sparge_options o;
} questions;

static questions ask(const kernel *r, sparge_causal causal)
{
    questions a;
    for (int n = 0; n < INPUTS; n++) {
        const shape s = shape_of(1, HEADS, 1, 130 + 9 * n, 270 + 9 * n, 16, 9);
        a.x[n] = question(&s, r);
        cluster(&a.x[n].q, 128, 0.9f);
        cluster(&a.x[n].k, 64, 0.9f);
        cluster(&a.x[n].v, 64, 1.0f);
        a.x[n].o.causal = causal;
        use(&a.x[n], r);
        a.p[n] = a.x[n].p;
    }
    a.o = a.x[0].o;
    return a;
}

static void forget_all(questions *a)
{
    for (int n = 0; n < INPUTS; n++)
        problem_free(&a->x[n]);
}

/* Relative L1 of a whole call on the device against dense attention in f32 on the device. */
static double whole_call(const problem *x, int64_t h, const sparge_thresholds *thresholds,
                         double *sparsity)
{
    problem one = *x, all = *x;
    one.o.thresholds = *thresholds;
    all.o.qk_dtype = all.o.pv_dtype = SPARGE_F32;
    all.o.cuda.kernel = 0;
    answer got = attention(&one, NULL), want = attend(&all);
    const float *a = tensor_row(&got.o, 0, h, 0), *b = tensor_row(&want.o, 0, h, 0);
    double error = 0.0, size = 0.0;
    for (int64_t n = 0; n < x->p.q_len * x->p.dim_v; n++) {
        error += fabs((double)a[n] - (double)b[n]);
        size += fabs((double)b[n]);
    }
    *sparsity = sparge_sparsity(&got.head[h]);
    answer_free(&got);
    answer_free(&want);
    return error / size;
}

/* Returns how many heads are sparse. */
static int64_t confirm(const questions *a, const sparge_tuned *t, const sparge_tune_options *how)
{
    int64_t sparse = 0;
    for (int h = 0; h < HEADS; h++) {
        check(t[h].done && t[h].finite, "head %d: done %d finite %d", h, t[h].done, t[h].finite);
        const int inputs = INPUTS - (int)how->held_out;
        check_equal(t[h].in_sample.inputs, (int64_t)inputs);
        double worst = 0.0, mean = 0.0, share = 0.0;
        for (int n = 0; n < inputs; n++) {
            double sparsity;
            const double error = whole_call(&a->x[n], h, &t[h].thresholds, &sparsity);
            worst = fmax(worst, error);
            mean += error / inputs;
            share += sparsity / inputs;
        }
        check(t[h].dense || worst <= how->l2, "head %d: relative L1 %g", h, worst);
        check_close(t[h].in_sample.worst, worst, 1e-6 * worst);
        check_close(t[h].in_sample.mean, mean, 1e-6 * mean);
        check_close(t[h].in_sample.sparsity, share, 1e-12);
        sparse += !t[h].dense && share > 0.05;
    }
    return sparse;
}

Test(tune, what_is_chosen_holds_in_whole_calls)
{
    int64_t sparse = 0, asked = 0;
    fresh_device();
    EACH_RUNG(r)
    {
        const int n = (int)(r - kernels);
        check_case("kernel %d pv %d", r->n, (int)r->pv_dtype);
        questions a = ask(r, n % 2 ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE);
        const sparge_tune_options how = {
            .l1 = 0.3, .l2 = 0.4, .topk = n % 3 == 2, .held_out = n % 2};
        sparge_tuned t[HEADS] = {{0}};
        sparge_error error = {"poison"};
        check(sparge_tune(a.p, INPUTS, &a.o, &how, t, &error) == SPARGE_OK, "%s", error.text);
        sparse += confirm(&a, t, &how);
        asked += HEADS;
        forget_all(&a);
    }
    check(asked == 0 || sparse > asked / 4, "%lld of %lld heads are sparse", (long long)sparse,
          (long long)asked);
}

/* Precisions that ref has, too: the same heads. Calls of the tuner wait, whatever stream and
 * workspace the options name for attention. */
Test(tune, the_same_heads_as_ref)
{
    fresh_device();
    const kernel *r = &kernels[2];
    if (!runs_here(r->n))
        return;
    check_case("the same heads as ref");
    questions a = ask(r, SPARGE_CAUSAL_END);
    const sparge_tune_options how = {.l1 = 0.3, .l2 = 0.4};
    sparge_tuned here[HEADS] = {{0}}, there[HEADS] = {{0}};
    sparge_error error;
    check(sparge_tune(a.p, INPUTS, &a.o, &how, there, &error) == SPARGE_OK, "%s", error.text);
    a.o.backend = SPARGE_REF;
    a.o.cuda.kernel = 0;
    check(sparge_tune(a.p, INPUTS, &a.o, &how, here, &error) == SPARGE_OK, "%s", error.text);
    for (int h = 0; h < HEADS; h++) {
        check_same_as("thresholds", &there[h].thresholds.theta, &here[h].thresholds.theta, 4);
        check_close(there[h].in_sample.worst, here[h].in_sample.worst,
                    1e-4 * here[h].in_sample.worst + 1e-6);
        check_equal(there[h].in_sample.sparsity, here[h].in_sample.sparsity);
    }
    forget_all(&a);
}

/* A stream and a workspace are for calls that queue their work: the tuner needs what they leave. */
Test(tune, a_stream_and_a_workspace_in_the_options)
{
    fresh_device();
    const kernel *r = &kernels[2];
    if (!runs_here(r->n))
        return;
    check_case("a stream in the options");
    questions a = ask(r, SPARGE_CAUSAL_NONE);
    const sparge_tune_options how = {.l1 = 0.3, .l2 = 0.4};
    sparge_tuned want[HEADS] = {{0}}, got[HEADS] = {{0}};
    sparge_error error;
    check(sparge_tune(a.p, INPUTS, &a.o, &how, want, &error) == SPARGE_OK, "%s", error.text);
    a.o.cuda.stream = stream_make();
    check(sparge_tune(a.p, INPUTS, &a.o, &how, got, &error) == SPARGE_OK, "%s", error.text);
    for (int h = 0; h < HEADS; h++) {
        check_same_as("thresholds", &got[h].thresholds.theta, &want[h].thresholds.theta, 4);
        check_equal(got[h].in_sample.sparsity, want[h].in_sample.sparsity);
    }
    stream_free(a.o.cuda.stream);
    void *memory;
    check(sparge_device_alloc(1 << 24, &memory, &error) == SPARGE_OK, "%s", error.text);
    a.o.cuda.stream = NULL;
    a.o.cuda.workspace = memory;
    a.o.cuda.workspace_bytes = 1024; /* enough for nothing */
    memset(got, 0, sizeof got);
    check(sparge_tune(a.p, INPUTS, &a.o, &how, got, &error) == SPARGE_OK, "%s", error.text);
    sparge_device_free(memory);
    forget_all(&a);
}
