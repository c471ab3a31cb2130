/* SPDX-License-Identifier: Apache-2.0 */
/* heads.c: all heads side by side, and what they share: time, progress, the caller's functions. */
#include <pthread.h>
#include <stdlib.h>

#include "common/arithmetic.h"
#include "common/clock.h"
#include "tune/tune.h"

typedef struct heads {
    const sparge_tune_options *how;
    sparge_options o; /* for one head */
    tune_sample *sample;
    int64_t count, tuned;
    double start;
    double work, work_done; /* for progress: query blocks of the mask curves of all heads */
    bool stopped;
    sparge_status status; /* of the first head that failed */
    sparge_error error;
    pthread_mutex_t lock; /* not omp critical, whose name is global */
} heads;

/* One of them, at work. */
typedef struct worker {
    heads *all;
    double work; /* done */
} worker;

/* Tells how far it is, unless it is stopped already. For one thread at a time. */
static void tell(heads *all)
{
    if (!all->stopped && all->how->progress)
        all->stopped = !all->how->progress(all->how->user, fmin(1.0, all->work_done / all->work));
}

/* Is there time for more? */
static bool tick(void *user, double work)
{
    worker *w = user;
    heads *all = w->all;
    w->work += work;
    pthread_mutex_lock(&all->lock);
    all->work_done += work;
    all->stopped |= all->how->seconds > 0.0 && sparge_seconds() - all->start > all->how->seconds;
    tell(all);
    const bool goes_on = !all->stopped;
    pthread_mutex_unlock(&all->lock);
    return goes_on;
}

static void run_head(heads *all, int64_t head, double work, sparge_tuned *to)
{
    worker w = {all, 0.0};
    const tune_task task = {all->how,   &all->o, all->sample, all->count,
                            all->tuned, head,    {tick, &w}};
    const double start = sparge_seconds();
    sparge_tuned t = {0};
    sparge_error error = {""};
    const sparge_status status = tick(&w, 0.0) ? tune_head(&task, &t, &error) : SPARGE_OK;
    t.seconds = sparge_seconds() - start;
    pthread_mutex_lock(&all->lock);
    if (status && !all->status) {
        all->status = status;
        all->error = error;
    }
    all->stopped |= status != SPARGE_OK;
    if (t.done) {
        all->work_done += work - w.work; /* some curves were not asked for */
        tell(all);
        *to = t;
        if (all->how->finished)
            all->how->finished(all->how->user, head);
    }
    pthread_mutex_unlock(&all->lock);
}

sparge_status sparge_tune_heads(const sparge_problem *inputs, int64_t count,
                                const sparge_options *o, const sparge_tune_options *how,
                                sparge_tuned *tuned, sparge_error *error)
{
    const int64_t q_heads = inputs[0].heads;
    heads all = {.how = how, .o = *o, .start = sparge_seconds(), .lock = PTHREAD_MUTEX_INITIALIZER};
    double work = 0.0; /* of one head */
    int64_t todo = 0;
    for (int64_t h = 0; h < q_heads; h++)
        todo += !tuned[h].done;
    for (int64_t n = 0; n < count; n++)
        all.count += inputs[n].batch;
    all.sample = malloc((size_t)all.count * sizeof *all.sample);
    if (!all.sample)
        return SPARGE_ERR_MEMORY;
    all.count = 0;
    for (int64_t n = 0; n < count; n++)
        for (int64_t b = 0; b < inputs[n].batch; b++) {
            all.sample[all.count++] = (tune_sample){&inputs[n], b};
            all.tuned += n < count - how->held_out;
            work += (double)sparge_ceil_div(inputs[n].q_len, o->block_q);
        }
    all.work = (double)todo * work;
    /* Heads side by side, and the threads that are left over within each. */
    const int threads =
        o->backend == SPARGE_CPU ? (int)sparge_max(1, sparge_min(o->threads, todo)) : 1;
    all.o.threads = o->backend == SPARGE_CPU ? (int)sparge_max(1, o->threads / threads) : 0;
    all.o.per_head = NULL;
    all.o.progress = NULL;
    all.o.cuda.stream = all.o.cuda.workspace =
        NULL; /* outputs are read as soon as they are there */
    all.o.cuda.workspace_bytes = 0;
#pragma omp parallel num_threads(threads)
    {
        const fenv_t caller = sparge_arithmetic_begin();
#pragma omp for schedule(dynamic, 1)
        for (int64_t h = 0; h < q_heads; h++)
            if (!tuned[h].done)
                run_head(&all, h, work, &tuned[h]);
        sparge_arithmetic_end(caller);
    }
    pthread_mutex_destroy(&all.lock);
    free(all.sample);
    if (all.status && error)
        *error = all.error;
    return all.status;
}
