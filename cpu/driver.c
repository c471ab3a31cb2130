/* SPDX-License-Identifier: Apache-2.0 */
/* driver.c: memory, threads and the order of it all.
 *
 * Key heads go in batches that fit a budget, and the query blocks of such a batch in batches of
 * their own, so that memory stays in proportion to one of them however many heads there are. For
 * each batch of key heads: the mean key, then K and V packed once for every query head that reads
 * them. For each of its batches of query blocks: Q packed, its rows of the mask, then attention,
 * the rows with most blocks first. A thread owns a query block from first to last, so no bit of the
 * output depends on how many threads there are or who came first. */
#include <pthread.h>
#include <stdatomic.h>
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
#include "common/quant.h"
#include "cpu/cpu.h"
#include "cpu/work.h"

enum {
    KV_BATCH_BYTES = 32 << 20, /* of K and V, unless one head needs more */
    Q_BATCH_BYTES = 2 << 20,   /* of Q, unless the threads need more to share out */
    Q_BATCH_BLOCKS = 32,       /* so many query blocks a thread */
    PACKED_TOGETHER = 4,       /* blocks that a thread packs or judges before it asks for more */
    CELLS_TOGETHER =
        SPARGE_CELL_PANELS * SPARGE_PANEL, /* of query blocks that are weighed together */
    ALIGNED = 64,                          /* bytes: a cache line, and the widest vector */
};

static const size_t size_of[SPARGE_FORMATS] = {1, sizeof(int16_t), sizeof(float), sizeof(uint16_t)};

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

/* A call under way. */
typedef struct driver {
    sparge_work work;
    sparge_scratch *scratch;               /* [threads] */
    sparge_tally *tally;                   /* [batch * heads] */
    int64_t kv_heads, q_blocks;            /* of a batch */
    atomic_llong attended;                 /* query blocks */
    atomic_bool cancelled;                 /* by the caller: what has not begun never does */
    double packing, predicting, attending; /* seconds */
} driver;

static sparge_operand operand(arena *a, sparge_format format, int qmax, int64_t blocks,
                              int64_t stride, int64_t rows, int64_t inits, int64_t scales)
{
    const int64_t block = rows * stride * (int64_t)size_of[format];
    return (sparge_operand){
        .format = format,
        .qmax = qmax,
        .stride = stride,
        .block = block,
        .inits = inits,
        .scales = scales,
        .data = take(a, blocks * block, 1),
        .init = take(a, blocks * inits, sizeof(int32_t)),
        .scale = take(a, blocks * scales, sizeof(float)),
    };
}

/* group: lanes of what goes through a tile together. */
static void lay_out_scratch(arena *a, const sparge_work *w, int64_t group, sparge_scratch *t)
{
    const sparge_geometry *g = &w->g;
    const int64_t k_stride = w->kv.k.stride, v_stride = w->kv.v.stride;
    const int64_t widest = sparge_max(k_stride, v_stride),
                  longest = sparge_max(g->block_q, w->keys);
    const int64_t lanes = w->result ? w->q.operand.inits : 0, some = w->result ? group : 0;
    const int64_t tile = some * (w->keys + 1), selects = w->predicted ? g->k_blocks : 0;
    const int64_t weighs = w->predicted && w->o->cell ? SPARGE_PANEL : 0;
    const sparge_format pv = w->kv.v.format;
    *t = (sparge_scratch){
        .x = take(a, longest * widest, sizeof(float)),
        .code = take(a, longest * widest, sizeof(int16_t)),
        .unit_sum = take(a, widest, sizeof(float)),
        .inverse = take(a, v_stride, sizeof(float)),
        .row = take(a, selects, sizeof(float)),
        .order_key = take(a, selects, sizeof(uint32_t)),
        .mass = take(a, selects, sizeof(uint32_t)),
        .j = take(a, selects, sizeof(uint32_t)),
        .cell_q =
            take(a, weighs ? sparge_padded(w->together * w->cells_q) * k_stride : 0, sizeof(float)),
        .cell_s = take(a, SPARGE_CELL_PANELS * weighs * sparge_padded(g->k_blocks * w->cells_k),
                       sizeof(float)),
        .cell_codes = take(a, weighs * (g->k_blocks + SPARGE_PANEL), sizeof(int32_t)),
        .cell_mass = take(a, weighs ? w->together * g->k_blocks : 0, sizeof(uint32_t)),
        .s = take(a, tile, sizeof(float)),
        .p = take(a, pv == SPARGE_FLOATS ? 0 : tile, size_of[pv]),
        .o = take(a, lanes * v_stride, sizeof(float)),
        .turned = take(a, SPARGE_PANEL * v_stride, sizeof(float)),
        .max = take(a, lanes, sizeof(float)),
        .sum = take(a, lanes, sizeof(float)),
        .most = take(a, some, sizeof(float)),
        .local = take(a, some, sizeof(float)),
        .shrink = take(a, some, sizeof(float)),
        .weight = take(a, some, sizeof(float)),
        .row_sum = take(a, some, sizeof(float)),
        .p_init = take(a, some, sizeof(int32_t)),
        .attended = take(a, some * sparge_mask_row_words(w->keys), sizeof(uint32_t)),
        .attends = take(a, some, sizeof(int32_t)),
        .nonfinite = take(a, lanes, sizeof(bool)),
        .pv_done = take(a, w->result ? g->k_blocks : 0, sizeof(float)),
    };
    if (w->mask && w->mask->partial_first)
        t->partial = take(a, g->k_blocks, sizeof *t->partial);
    if (pv == SPARGE_FLOATS) /* P fits where S stood, and both would not fit L1 */
        t->p = t->s;
}

/* The format that a dtype's product runs in. */
static sparge_format format_of(sparge_dtype dtype, sparge_format int8_format)
{
    return dtype == SPARGE_INT8    ? int8_format
           : dtype == SPARGE_INT12 ? SPARGE_WORDS
           : dtype == SPARGE_BF16  ? SPARGE_PAIRS
                                   : SPARGE_FLOATS;
}

static void lay_out(arena *a, driver *d)
{
    sparge_work *w = &d->work;
    const sparge_problem *p = w->p;
    const sparge_options *o = w->o;
    const sparge_geometry *g = &w->g;
    const int64_t dim_v = w->result ? sparge_padded(p->dim_v) : 0;
    const sparge_format qk = format_of(o->qk_dtype, w->kernels.int8_scores),
                        pv = format_of(o->pv_dtype, SPARGE_BYTES);
    const int64_t dim = sparge_whole(p->dim, w->kernels.depth[qk]);
    w->keys = sparge_whole(o->block_k, w->kernels.depth[pv]);
    const int qk_qmax = sparge_qk_qmax(o->qk_dtype), pv_qmax = sparge_pv_qmax(o->pv_dtype);

    const int64_t heads = p->batch * p->heads, kv_heads = p->batch * p->kv_heads;
    const int64_t channels = dim * (int64_t)size_of[qk] + dim_v * (int64_t)size_of[pv];
    const int64_t head_bytes = sparge_max(1, g->k_blocks * w->keys * channels);
    w->q.operand.format = qk;
    w->kv.v.format = pv;
    int64_t lanes = 0, group = 0; /* lanes of a query block, of a group of it */
    for (int64_t h = 0; h < p->heads; h++) {
        const int64_t queries = sparge_group_of(w, h);
        lanes = sparge_max(lanes, sparge_lanes(g->block_q, queries));
        group = sparge_max(group, sparge_padded(queries));
    }
    const int64_t block_bytes = lanes * dim * (int64_t)size_of[qk];
    d->kv_heads = sparge_max(1, sparge_min(kv_heads, KV_BATCH_BYTES / head_bytes));
    d->q_blocks =
        sparge_min(d->kv_heads * (p->heads / p->kv_heads) * g->q_blocks,
                   sparge_max(Q_BATCH_BYTES / block_bytes, Q_BATCH_BLOCKS * (int64_t)o->threads));
    const int64_t k_blocks = d->kv_heads * g->k_blocks;
    const int64_t k_packed = w->result ? k_blocks : 0, q_packed = w->result ? d->q_blocks : 0;

    w->no_mean = take(a, sparge_max(dim, dim_v), sizeof(float));
    d->tally = take(a, heads, sizeof *d->tally);
    w->kv.mean = take(a, d->kv_heads * dim, sizeof(float));
    w->kv.pool = take(a,
                      w->predicted  ? (k_blocks * w->cells_k + SPARGE_PANEL) * dim
                      : o->smooth_k ? k_blocks * dim
                                    : 0,
                      sizeof(float));
    w->kv.sim = take(a, w->predicted ? k_blocks : 0, sizeof(float));
    w->kv.nonfinite = take(a, k_blocks, sizeof(uint8_t));
    w->kv.k = operand(a, qk, qk_qmax, k_packed, dim, w->keys, w->keys, 1);
    w->kv.v = operand(a, pv, pv_qmax, k_packed, dim_v, w->keys, pv == SPARGE_WORDS ? dim_v : 0,
                      pv_qmax ? dim_v : 0);
    w->q.operand = operand(a, qk, qk_qmax, q_packed, dim, lanes, lanes, 1);
    w->q.pool = take(a, w->predicted ? d->q_blocks * w->cells_q * dim : 0, sizeof(float));
    w->q.block = take(a, d->q_blocks, sizeof *w->q.block);
    d->scratch = take(a, o->threads, sizeof *d->scratch);
    for (int n = 0; n < o->threads; n++) {
        sparge_scratch t;
        lay_out_scratch(a, w, group, a->base ? &d->scratch[n] : &t);
    }
    if (a->base) {
        memset(w->no_mean, 0, (size_t)sparge_max(dim, dim_v) * sizeof *w->no_mean);
        memset(w->kv.mean, 0, (size_t)(d->kv_heads * dim) * sizeof *w->kv.mean);
        memset(d->tally, 0, (size_t)heads * sizeof *d->tally);
    }
}

/* ---- The order of it all ---- */

static int most_first(const void *a, const void *b)
{
    const sparge_q_block *x = a, *y = b;
    if (x->cost != y->cost)
        return x->cost < y->cost ? 1 : -1;
    return x->index < y->index ? -1 : 1;
}

/* The calling thread asks whether to go on. */
static bool goes_on(driver *d)
{
    const sparge_options *o = d->work.o;
    const sparge_problem *p = d->work.p;
    const int64_t blocks = sparge_max(1, p->batch * p->heads * d->work.g.q_blocks);
    if (o->progress && omp_get_thread_num() == 0 && !d->cancelled)
        d->cancelled = !o->progress(o->user, (double)d->attended / (double)blocks);
    return !d->cancelled;
}

/* Runs a step on each of so many items, `together` of them a turn of a thread, and before each
 * asks. (The calling thread may get none of them.) No more threads than find something to do. */
static void on_each(driver *d, int64_t items, int64_t together, sparge_step *step)
{
    const int64_t most = goes_on(d) ? sparge_min(d->work.o->threads, items) : 1;
    const int threads = (int)sparge_max(1, most);
    const sparge_kernels *k = &d->work.kernels;
    (void)threads;
#pragma omp parallel num_threads(threads)
    {
        const fenv_t caller = sparge_arithmetic_begin();
#pragma omp for schedule(dynamic, together)
        for (int64_t n = 0; n < items; n++)
            if (goes_on(d)) { /* which may be the caller's code, in these registers too */
                if (k->begin)
                    k->begin();
                step(&d->work, &d->scratch[omp_get_thread_num()], n);
                if (k->end)
                    k->end();
                d->attended += step == sparge_attend_q_block;
            }
        sparge_arithmetic_end(caller);
    }
}

static void pack_kv_batch(driver *d)
{
    const sparge_work *w = &d->work;
    const int64_t heads = w->kv.end - w->kv.first, blocks = heads * w->g.k_blocks;
    const double start = sparge_seconds();
    if (w->o->smooth_k) {
        on_each(d, blocks, PACKED_TOGETHER, sparge_sum_keys);
        for (int64_t n = 0; n < heads && !d->cancelled; n++)
            sparge_mean_key(w, n);
    }
    on_each(d, blocks, PACKED_TOGETHER, sparge_pack_kv);
    d->packing += sparge_seconds() - start;
}

static void attend(driver *d)
{
    const sparge_work *w = &d->work;
    const sparge_geometry *g = &w->g;
    sparge_q_block *block = w->q.block;
    for (int64_t n = 0; n < w->q.count; n++) {
        const int64_t line = block[n].head * g->q_blocks + block[n].i;
        const uint32_t *kept = w->mask ? w->mask->bits + line * w->mask->words : NULL;
        block[n].cost = sparge_mask_row_count(kept, sparge_blocks_visible(g, block[n].i));
    }
    qsort(block, (size_t)w->q.count, sizeof *block, most_first);
    on_each(d, w->q.count, 1, sparge_attend_q_block);
    for (int64_t n = 0; n < w->q.count; n++)
        sparge_tally_add(&d->tally[block[n].head], &block[n].tally);
}

/* Query blocks [first, first + count) of batch * heads * q_blocks. */
static void run_q_batch(driver *d, int64_t first, int64_t count)
{
    sparge_work *w = &d->work;
    w->q.count = count;
    for (int64_t n = 0; n < count; n++)
        w->q.block[n] = (sparge_q_block){
            .head = (first + n) / w->g.q_blocks, .i = (first + n) % w->g.q_blocks, .index = n};
    const double start = sparge_seconds();
    on_each(d, count, PACKED_TOGETHER, sparge_pack_query);
    const double packed = sparge_seconds();
    if (w->predicted && w->o->cell)
        on_each(d, sparge_ceil_div(count, w->together), 1, sparge_select_cells);
    else if (w->predicted)
        on_each(d, count, PACKED_TOGETHER, sparge_select_row);
    const double predicted = sparge_seconds();
    if (w->result && !d->cancelled)
        attend(d);
    d->packing += packed - start;
    d->predicting += predicted - packed;
    d->attending += sparge_seconds() - predicted;
}

static void run_all(driver *d)
{
    sparge_work *w = &d->work;
    const int64_t heads = w->p->batch * w->p->kv_heads,
                  blocks = w->p->heads / w->p->kv_heads * w->g.q_blocks;
    for (int64_t head = 0; head < heads && !d->cancelled; head = w->kv.end) {
        w->kv.first = head;
        w->kv.end = sparge_min(heads, head + d->kv_heads);
        pack_kv_batch(d);
        const int64_t end = w->kv.end * blocks;
        for (int64_t n = head * blocks; n < end && !d->cancelled; n += d->q_blocks)
            run_q_batch(d, n, sparge_min(d->q_blocks, end - n));
    }
}

static sparge_status run(const sparge_problem *p, const sparge_options *o, sparge_mask *predicted,
                         const sparge_mask *mask, const sparge_intermediates *intermediates,
                         sparge_result *result)
{
    driver d = {
        .work =
            {
                .p = p,
                .o = o,
                .intermediates = intermediates,
                .kernels = sparge_cpu_kernels(o->isa),
                .g = sparge_geometry_of(p, o),
                .predicted = predicted,
                .mask = mask,
                .result = result,
            },
    };
    const sparge_geometry *g = &d.work.g;
    const int64_t cell = o->cell;
    d.work.cells = sparge_geometry_make(p->q_len, p->k_len, cell ? cell : o->block_q,
                                        cell ? cell : o->block_k, o->causal);
    d.work.cells_q = o->block_q / d.work.cells.block_q;
    d.work.cells_k = o->block_k / d.work.cells.block_k;
    d.work.together = sparge_max(1, CELLS_TOGETHER / d.work.cells_q);
    /* What would overflow the counts below could not be allocated either. */
    const double tokens = (double)g->k_blocks * ((double)o->block_k + SPARGE_MOST_DEPTH) +
                          (double)g->q_blocks * (double)o->block_q;
    const double channels =
        (double)p->dim + (result ? (double)p->dim_v : 0.0) + 2.0 * SPARGE_MOST_DEPTH;
    if (!(tokens * channels * (double)p->heads < 0x1p58))
        return SPARGE_ERR_MEMORY;
    arena needed = {0};
    lay_out(&needed, &d);
    char *memory = needed.overflows ? NULL : malloc(needed.used + ALIGNED);
    if (!memory)
        return SPARGE_ERR_MEMORY;
    arena a = {.base = memory + (ALIGNED - (uintptr_t)memory % ALIGNED)};
    lay_out(&a, &d);
    run_all(&d);
    const sparge_status status = goes_on(&d) ? SPARGE_OK : SPARGE_ERR_CANCELLED;
    if (result) {
        for (int64_t h = 0; h < p->batch * p->heads; h++)
            result->head_counts[h] = sparge_tally_counts(&d.tally[h], g);
        result->qk_isa = d.work.kernels.product_isa[d.work.q.operand.format];
        result->pv_isa = d.work.kernels.product_isa[d.work.kv.v.format];
        result->workspace_bytes = (int64_t)needed.used;
        result->seconds_predict = d.predicting;
        result->seconds_quantize = d.packing;
        result->seconds_attend = d.attending;
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
