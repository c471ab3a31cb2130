/* SPDX-License-Identifier: Apache-2.0 */
/* loss.c: what the first parameter of a method costs the model's loss, head by head: one pass of
 * dense attention in f32, then a whole call of the method for each value, which all heads share. */
#include <stdlib.h>

#include "common/element.h"
#include "tune/tune.h"

/* A measurement, and one input of it. */
typedef struct measure {
    const tune_losses *of;
    const sparge_loss_input *in;
    float *want, *got;   /* [batch][heads][q_len][dim_v]: dense, and of the method */
    double *first;       /* [heads] */
    sparge_counts *head; /* [batch][heads] */
    int64_t calls, done;
    double products, dense; /* of blocks: computed, and of a dense pass */
} measure;

static bool tell(void *user, double done)
{
    const measure *m = user;
    const sparge_options *o = m->of->options;
    return o->progress(o->user, fmin(1.0, ((double)m->done + done) / (double)m->calls));
}

/* Whole calls tell how far all of them are. */
static void watch(measure *m, sparge_options *o)
{
    if (!o->progress)
        return;
    o->progress = tell;
    o->user = m;
}

static sparge_result result_in(const measure *m, float *o)
{
    const sparge_problem *p = &m->in->problem;
    return (sparge_result){
        .o = {o, SPARGE_F32, p->heads * p->q_len * p->dim_v, p->q_len * p->dim_v, p->dim_v},
        .head_counts = m->head};
}

static void count(measure *m, const sparge_counts *c)
{
    m->products += (double)c->qk_done + c->pv_done;
    m->done++;
}

static sparge_status attend_dense(measure *m, sparge_error *error)
{
    sparge_options o = tune_dense_options(&m->of->resolved);
    sparge_result result = result_in(m, m->want);
    watch(m, &o);
    const sparge_status status =
        m->of->executor ? m->of->executor->attend(&m->in->problem, &o, NULL, &result, error)
                        : sparge_attend(&m->in->problem, &o, NULL, &result, error);
    m->dense += 2.0 * (double)result.counts.pairs;
    count(m, &result.counts);
    return status;
}

/* Attention of all heads, each with its n-th value. */
static sparge_status attend_point(measure *m, int64_t n, sparge_error *error)
{
    const tune_losses *of = m->of;
    const sparge_problem *p = &m->in->problem;
    sparge_context context = m->in->context ? *m->in->context : (sparge_context){0};
    sparge_options o = *of->options;
    for (int64_t h = 0; h < p->heads; h++)
        m->first[h] = of->point[h * of->points + n].first;
    context.first = m->first;
    context.state = NULL;
    watch(m, &o);
    sparge_plan plan;
    sparge_result result = result_in(m, m->got);
    sparge_status status = sparge_method_plan(of->method, p, &o, &context, of->param, &plan, error);
    if (!status)
        status = sparge_plan_run(&plan, of->executor, &result, error);
    sparge_plan_free(&plan);
    count(m, &result.counts);
    return status;
}

/* Mean over the queries of (g . (o' - o))^2 / 2. */
static double loss_of(const measure *m, int64_t batch, int64_t head)
{
    const sparge_problem *p = &m->in->problem;
    const sparge_in *g = &m->in->g;
    double sum = 0.0;
    for (int64_t t = 0; t < p->q_len; t++) {
        const int64_t at = ((batch * p->heads + head) * p->q_len + t) * p->dim_v;
        const int64_t from = sparge_in_row(g, batch, head, t);
        double change = 0.0;
        for (int64_t c = 0; c < p->dim_v; c++)
            change += (double)sparge_element_load(g->data, g->dtype, from + c) *
                      ((double)m->got[at + c] - (double)m->want[at + c]);
        sum += change * change / 2.0;
    }
    return sum / (double)p->q_len;
}

/* Adds the n-th point of one input, an element of a batch after the other. */
static void add_point(measure *m, int64_t n)
{
    const sparge_problem *p = &m->in->problem;
    for (int64_t b = 0; b < p->batch; b++)
        for (int64_t h = 0; h < p->heads; h++) {
            sparge_loss_point *to = &m->of->point[h * m->of->points + n];
            to->density += sparge_density_tokens(&m->head[b * p->heads + h]);
            to->loss += loss_of(m, b, h);
        }
}

static sparge_status measure_input(measure *m, sparge_error *error)
{
    const sparge_problem *p = &m->in->problem;
    const size_t size = (size_t)(p->batch * p->heads * p->q_len * p->dim_v);
    m->want = malloc(size * sizeof *m->want);
    m->got = malloc(size * sizeof *m->got);
    m->first = malloc((size_t)p->heads * sizeof *m->first);
    m->head = malloc((size_t)(p->batch * p->heads) * sizeof *m->head);
    sparge_status status =
        m->want && m->got && m->first && m->head ? attend_dense(m, error) : SPARGE_ERR_MEMORY;
    for (int64_t n = 0; n < m->of->points && !status; n++) {
        status = attend_point(m, n, error);
        if (!status)
            add_point(m, n);
    }
    free(m->want);
    free(m->got);
    free(m->first);
    free(m->head);
    return status;
}

sparge_status tune_losses_measure(const tune_losses *of, double *dense_passes, sparge_error *error)
{
    measure m = {.of = of, .calls = of->count * (of->points + 1)};
    const int64_t all = of->inputs[0].problem.heads * of->points;
    int64_t samples = 0;
    for (int64_t n = 0; n < all; n++)
        of->point[n].density = of->point[n].loss = 0.0;
    sparge_status status = SPARGE_OK;
    for (int64_t n = 0; n < of->count && !status; n++) {
        m.in = &of->inputs[n];
        samples += m.in->problem.batch;
        status = measure_input(&m, error);
    }
    for (int64_t n = 0; n < all; n++) {
        of->point[n].density /= (double)samples;
        of->point[n].loss /= (double)samples;
        if (!(of->point[n].loss < (double)INFINITY))
            of->point[n].loss = (double)NAN;
    }
    *dense_passes = m.products / m.dense;
    return status;
}
