/* driver.c: what the stages stand in: memory, threads and the order of it all.
 *
 * Key heads go in waves that fit a budget, and the query blocks of a wave in chunks, so that memory
 * stays in proportion to one wave however many heads there are. In a wave: the mean key, then K and
 * V packed once for every query head that reads them; in a chunk: Q packed, its rows of the mask,
 * then attention, the rows with most blocks first. A thread owns a query block from first to last,
 * so no bit of the output depends on how many threads there are or who came first. */
#include <pthread.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif

#include "common/arithmetic.h"
#include "common/block_mask.h"
#include "common/clock.h"
#include "cpu/cpu.h"
#include "cpu/work.h"

enum {
    WAVE_BYTES = 32 << 20, /* of K and V, unless one head needs more */
    CHUNK_BYTES = 8 << 20, /* of Q, unless the threads need more to share out */
    CHUNK_TASKS = 32,      /* so many query blocks a thread */
    PACKED_TOGETHER = 4,   /* blocks that a thread packs or judges before it asks for more */
    ALIGNED = 64,          /* bytes: a cache line, and the widest vector */
};

static const size_t size_of[SPARGE_FORMATS] = {1, sizeof(int16_t), sizeof(float)};

int sparge_cpu_threads(void) { return omp_get_max_threads(); }

/* Waits until the gate is open. */
static void *pass(void *gate)
{
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

bool sparge_cpu_can_start(int threads)
{
    static _Thread_local int most = 1;
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t other[SPARGE_MAX_THREADS];
    int started = 1;
    if (threads <= most)
        return true;
    pthread_mutex_lock(&gate);
    while (started < threads && pthread_create(&other[started], NULL, pass, &gate) == 0)
        started++;
    pthread_mutex_unlock(&gate);
    for (int n = 1; n < started; n++)
        pthread_join(other[n], NULL);
    most = started;
    return started == threads;
}

/* ---- Memory: one piece of it, laid out twice: to see how much, and in place. (The allocator keeps
 * one freed piece for the next call; of many it gives the pages back, and every call would fault
 * them in again.) ---- */

typedef struct arena {
    char *base; /* NULL: only count */
    size_t used;
    bool overflows;
} arena;

static void *take(arena *a, int64_t count, size_t size)
{
    if ((uint64_t)count >= ((uint64_t)PTRDIFF_MAX / 2 - a->used) / size) {
        a->overflows = true;
        return NULL;
    }
    char *piece = a->base ? a->base + a->used : NULL;
    a->used += ((size_t)count * size + ALIGNED - 1) / ALIGNED * ALIGNED;
    return piece;
}

static sparge_operand operand(arena *a, sparge_format format, int qmax, int64_t blocks,
                              int64_t stride, int64_t rows, int64_t starts, int64_t steps)
{
    const int64_t block = rows * stride * (int64_t)size_of[format];
    return (sparge_operand){
        .format = format,
        .qmax = qmax,
        .stride = stride,
        .block = block,
        .starts = starts,
        .steps = steps,
        .data = take(a, blocks * block, 1),
        .start = take(a, blocks * starts, sizeof(int32_t)),
        .step = take(a, blocks * steps, sizeof(float)),
    };
}

static void lay_out_scratch(arena *a, const sparge_work *w, sparge_scratch *t)
{
    const sparge_geometry *g = &w->g;
    const int64_t widest = sparge_max(w->k.stride, w->v.stride),
                  longest = sparge_max(g->block_q, w->keys);
    const int64_t rows = sparge_max(SPARGE_GROUP_ROWS, w->o->skip_rows),
                  tile = rows * (w->keys + SPARGE_PANEL);
    const int64_t ranked = w->predicted ? g->k_blocks : 0, attends = w->result ? 1 : 0;
    *t = (sparge_scratch){
        .x = take(a, longest * widest, sizeof(float)),
        .code = take(a, longest * widest, sizeof(int16_t)),
        .unit = take(a, widest, sizeof(float)),
        .rank = take(a, ranked, sizeof(float)),
        .key = take(a, ranked, sizeof(uint32_t)),
        .mass = take(a, ranked, sizeof(uint32_t)),
        .place = take(a, ranked, sizeof(uint32_t)),
        .s = take(a, attends * tile, sizeof(float)),
        .p = take(a, w->v.format == SPARGE_FLOATS ? 0 : attends * tile, size_of[w->v.format]),
        .o = take(a, attends * g->block_q * w->v.stride, sizeof(float)),
        .max = take(a, attends * g->block_q, sizeof(float)),
        .sum = take(a, attends * g->block_q, sizeof(float)),
        .most = take(a, attends * rows, sizeof(float)),
        .local = take(a, attends * rows, sizeof(float)),
        .shrink = take(a, attends * rows, sizeof(float)),
        .weight = take(a, attends * rows, sizeof(float)),
        .row_sum = take(a, attends * rows, sizeof(float)),
        .p_start = take(a, attends * rows, sizeof(int32_t)),
        .spoilt = take(a, attends * g->block_q, sizeof(bool)),
        .share = take(a, attends * g->k_blocks, sizeof(float)),
    };
    if (w->v.format == SPARGE_FLOATS) /* P fits where S stood, and both would not fit L1 */
        t->p = t->s;
}

/* The qmax of a precision's codes, and the format that its product runs in. */
static int levels_of(sparge_dtype precision, int int12_qmax)
{
    return precision == SPARGE_INT8 ? 127 : precision == SPARGE_INT12 ? int12_qmax : 0;
}

static sparge_format format_of(sparge_dtype precision, sparge_format int8_format)
{
    return precision == SPARGE_INT8    ? int8_format
           : precision == SPARGE_INT12 ? SPARGE_WORDS
                                       : SPARGE_FLOATS;
}

static void lay_out(arena *a, sparge_work *w)
{
    const sparge_problem *p = w->p;
    const sparge_geometry *g = &w->g;
    const int64_t dim = sparge_padded(p->dim), dim_v = w->result ? sparge_padded(p->dim_v) : 0;
    const sparge_format qk = format_of(w->o->qk_dtype, w->kernels.int8_scores),
                        pv = format_of(w->o->pv_dtype, SPARGE_BYTES);
    const int qk_qmax = levels_of(w->o->qk_dtype, 2047), pv_qmax = levels_of(w->o->pv_dtype, 4095);

    const int64_t heads = p->batch * p->kv_heads, group = p->heads / p->kv_heads;
    const int64_t channels = dim * (int64_t)size_of[qk] + dim_v * (int64_t)size_of[pv];
    const int64_t head_bytes = sparge_max(1, g->k_blocks * w->keys * channels);
    const int64_t block_bytes = g->block_q * dim * (int64_t)size_of[qk];
    w->wave = sparge_max(1, sparge_min(heads, WAVE_BYTES / head_bytes));
    w->chunk =
        sparge_min(w->wave * group * g->q_blocks,
                   sparge_max(CHUNK_BYTES / block_bytes, CHUNK_TASKS * (int64_t)w->o->threads));
    const int64_t blocks = w->wave * g->k_blocks, packed = w->result ? blocks : 0;

    w->no_mean = take(a, sparge_max(dim, dim_v), sizeof(float));
    w->mean = take(a, w->wave * dim, sizeof(float));
    w->pv_rows = take(a, p->batch * p->heads, sizeof *w->pv_rows);
    w->k_pool = take(a, w->predicted || w->o->smooth_k ? blocks * dim : 0, sizeof(float));
    w->k_sim = take(a, w->predicted ? blocks : 0, sizeof(float));
    w->bad = take(a, blocks, sizeof(uint8_t));
    w->k = operand(a, qk, qk_qmax, packed, dim, w->keys, w->keys, 1);
    w->v = operand(a, pv, pv_qmax, packed, dim_v, w->keys, dim_v, dim_v);
    w->q = operand(a, qk, qk_qmax, w->result ? w->chunk : 0, dim, g->block_q, g->block_q, 1);
    w->q_pool = take(a, w->predicted ? w->chunk * dim : 0, sizeof(float));
    w->task = take(a, w->chunk, sizeof *w->task);
    w->scratch = take(a, w->o->threads, sizeof *w->scratch);
    for (int n = 0; n < w->o->threads; n++) {
        sparge_scratch t;
        lay_out_scratch(a, w, a->base ? &w->scratch[n] : &t);
    }
    if (a->base) {
        memset(w->no_mean, 0, (size_t)sparge_max(dim, dim_v) * sizeof *w->no_mean);
        memset(w->mean, 0, (size_t)(w->wave * dim) * sizeof *w->mean);
        memset(w->pv_rows, 0, (size_t)(p->batch * p->heads) * sizeof *w->pv_rows);
    }
}

/* ---- The order of it all ---- */

static int most_first(const void *a, const void *b)
{
    const sparge_task *x = a, *y = b;
    if (x->cost != y->cost)
        return x->cost < y->cost ? 1 : -1;
    return x->slot < y->slot ? -1 : 1;
}

/* As many as were asked for, but none that would find nothing to do. */
static int threads_for(const sparge_work *w, int64_t items)
{
    return (int)sparge_max(1, sparge_min(w->o->threads, items));
}

/* The calling thread asks whether to go on. */
static bool goes_on(sparge_work *w)
{
    const int64_t blocks = sparge_max(1, w->p->batch * w->p->heads * w->g.q_blocks);
    if (w->o->progress && omp_get_thread_num() == 0 && !w->cancelled)
        w->cancelled = !w->o->progress(w->o->user, (double)w->attended / (double)blocks);
    return !w->cancelled;
}

/* Runs a step on each of so many items, `together` of them a turn of a thread, and before each
 * asks. (The calling thread may get none of them.) */
static void on_each(sparge_work *w, int64_t items, int64_t together,
                    void (*step)(sparge_work *w, sparge_scratch *t, int64_t item))
{
    const int threads = goes_on(w) ? threads_for(w, items) : 1;
    (void)threads;
#pragma omp parallel num_threads(threads)
    {
        const fenv_t caller = sparge_arithmetic_begin();
#pragma omp for schedule(dynamic, together)
        for (int64_t n = 0; n < items; n++)
            if (goes_on(w))
                step(w, &w->scratch[omp_get_thread_num()], n);
        sparge_arithmetic_end(caller);
    }
}

static void sum_keys(sparge_work *w, sparge_scratch *t, int64_t at)
{
    sparge_pack_sum(w, t, at / w->g.k_blocks, at % w->g.k_blocks);
}

static void pack_keys(sparge_work *w, sparge_scratch *t, int64_t at)
{
    sparge_pack_key(w, t, at / w->g.k_blocks, at % w->g.k_blocks);
    if (w->result)
        sparge_pack_value(w, t, at / w->g.k_blocks, at % w->g.k_blocks);
}

static void pack_queries(sparge_work *w, sparge_scratch *t, int64_t n)
{
    sparge_pack_query(w, t, &w->task[n]);
}

static void select_row(sparge_work *w, sparge_scratch *t, int64_t n)
{
    sparge_select_row(w, t, &w->task[n]);
}

static void attend(sparge_work *w, sparge_scratch *t, int64_t n)
{
    sparge_attend_task(w, t, &w->task[n]);
    w->attended++;
}

static void pack_wave(sparge_work *w)
{
    const int64_t heads = w->end_kv - w->first_kv, all = heads * w->g.k_blocks;
    if (w->o->smooth_k) {
        on_each(w, all, PACKED_TOGETHER, sum_keys);
        for (int64_t n = 0; n < heads && !w->cancelled; n++)
            sparge_pack_mean(w, n);
    }
    on_each(w, all, PACKED_TOGETHER, pack_keys);
}

static void attend_chunk(sparge_work *w)
{
    const sparge_geometry *g = &w->g;
    for (int64_t n = 0; n < w->tasks; n++) {
        const int64_t visible = sparge_blocks_visible(g, w->task[n].i);
        const int64_t line = w->task[n].head * g->q_blocks + w->task[n].i;
        w->task[n].cost =
            w->mask ? sparge_mask_row_count(w->mask->bits + line * w->mask->words, visible)
                    : visible;
    }
    qsort(w->task, (size_t)w->tasks, sizeof *w->task, most_first);
    on_each(w, w->tasks, 1, attend);
    for (int64_t n = 0; n < w->tasks; n++) {
        const sparge_task *task = &w->task[n];
        sparge_counts *head = &w->result->head_counts[task->head];
        head->pairs += task->counts.pairs;
        head->qk_done += task->counts.qk_done;
        w->pv_rows[task->head][(task->i + 1) * g->block_q > g->q_len] += task->pv_rows;
        head->tokens += task->counts.tokens;
        head->qk_tokens += task->counts.qk_tokens;
        head->pv_tokens += task->counts.pv_tokens;
    }
}

static void run_waves(sparge_work *w)
{
    const sparge_geometry *g = &w->g;
    const int64_t heads = w->p->batch * w->p->kv_heads,
                  blocks = w->p->heads / w->p->kv_heads * g->q_blocks;
    for (w->first_kv = 0; w->first_kv < heads && !w->cancelled; w->first_kv += w->wave) {
        w->end_kv = sparge_min(heads, w->first_kv + w->wave);
        const double start = sparge_seconds();
        pack_wave(w);
        w->packing += sparge_seconds() - start;
        for (int64_t first = w->first_kv * blocks; first < w->end_kv * blocks && !w->cancelled;
             first += w->chunk) {
            w->tasks = sparge_min(w->chunk, w->end_kv * blocks - first);
            for (int64_t n = 0; n < w->tasks; n++)
                w->task[n] = (sparge_task){
                    .head = (first + n) / g->q_blocks, .i = (first + n) % g->q_blocks, .slot = n};
            const double begin = sparge_seconds();
            on_each(w, w->tasks, PACKED_TOGETHER, pack_queries);
            const double packed = sparge_seconds();
            if (w->predicted)
                on_each(w, w->tasks, PACKED_TOGETHER, select_row);
            const double predicted = sparge_seconds();
            if (w->result && !w->cancelled)
                attend_chunk(w);
            w->packing += packed - begin;
            w->predicting += predicted - packed;
            w->attending += sparge_seconds() - predicted;
        }
    }
}

static sparge_status run(const sparge_problem *p, const sparge_options *o, sparge_mask *predicted,
                         const sparge_mask *mask, const sparge_intermediates *intermediates,
                         sparge_result *result)
{
    sparge_work w = {
        .p = p,
        .o = o,
        .intermediates = intermediates,
        .kernels = sparge_cpu_kernels(o->isa),
        .g = sparge_geometry_make(p->q_len, p->k_len, o->block_q, o->block_k, o->causal),
        .predicted = predicted,
        .mask = mask,
        .result = result,
        .keys = sparge_padded(o->block_k),
    };
    /* What would overflow the counts below could not be allocated either. */
    const double tokens =
        (double)w.g.k_blocks * (double)w.keys + (double)w.g.q_blocks * (double)o->block_q;
    const double channels = (double)p->dim + (result ? (double)p->dim_v : 0.0) + 2.0 * SPARGE_PANEL;
    if (!(tokens * channels * (double)p->heads < 0x1p58))
        return SPARGE_ERR_MEMORY;
    arena needed = {0};
    lay_out(&needed, &w);
    char *memory = needed.overflows ? NULL : malloc(needed.used + ALIGNED);
    if (!memory)
        return SPARGE_ERR_MEMORY;
    arena a = {.base = memory + (ALIGNED - (uintptr_t)memory % ALIGNED)};
    lay_out(&a, &w);
    run_waves(&w);
    const sparge_status status = goes_on(&w) ? SPARGE_OK : SPARGE_ERR_CANCELLED;
    if (result) {
        const int64_t short_rows = sparge_max(1, p->q_len % o->block_q);
        for (int64_t h = 0; h < p->batch * p->heads; h++)
            result->head_counts[h].pv_done = (double)w.pv_rows[h][0] / (double)o->block_q +
                                             (double)w.pv_rows[h][1] / (double)short_rows;
        result->workspace = (int64_t)needed.used;
        result->seconds_predict = w.predicting;
        result->seconds_quantize = w.packing;
        result->seconds_attend = w.attending;
    }
    free(memory);
    return status;
}

sparge_status sparge_cpu_predict(const sparge_problem *p, const sparge_options *o,
                                 sparge_mask *mask, const sparge_intermediates *intermediates)
{
    return run(p, o, mask, NULL, intermediates, NULL);
}

sparge_status sparge_cpu_attend(const sparge_problem *p, const sparge_options *o,
                                const sparge_mask *mask, sparge_result *result)
{
    return run(p, o, NULL, mask, result->intermediates, result);
}

sparge_status sparge_cpu_attention(const sparge_problem *p, const sparge_options *o,
                                   sparge_mask *mask, sparge_result *result)
{
    return run(p, o, mask, mask, result->intermediates, result);
}
