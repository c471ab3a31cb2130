/* driver.c: what the stages stand in: memory, threads and the order of it all.
 *
 * Key heads go in waves that fit a budget, and the query blocks of a wave in chunks, so that memory stays in
 * proportion to one wave however many heads there are. In a wave: the mean key, then K and V packed once for
 * every query head that reads them; in a chunk: Q packed, its rows of the mask, then attention, the rows with
 * most blocks first. A thread owns a query block from first to last, so no bit of the output depends on how
 * many threads there are or who came first. */
#include <stdatomic.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif

#include "common/block_mask.h"
#include "cpu/cpu.h"
#include "cpu/work.h"
#include "ref/ref.h"

enum {
    WAVE_BYTES = 32 << 20, /* of K and V, unless one head needs more */
    CHUNK_BYTES = 8 << 20, /* of Q, unless the threads need more to share out */
    CHUNK_TASKS = 32,      /* at least so many query blocks a thread */
    GROUP_ROWS = 64,       /* rows of a tile where lambda does not say: Q and S of one stay in L1 */
    ALIGNED = 64,          /* bytes: a cache line, and the widest vector */
};

static const size_t size_of[SPARGE_FORMATS] = { 1, sizeof(int16_t), sizeof(float) };

int sparge_cpu_threads(void) { return omp_get_max_threads(); }

/* ---- Memory: pieces that are given back in one call; after a failure `failed` is true and every take NULL ---- */

typedef struct arena {
    void **piece;
    int64_t pieces, room;
    bool failed;
} arena;

static void *take(arena *a, int64_t count, size_t size)
{
    if (a->failed || a->pieces == a->room || (uint64_t)count >= ((uint64_t)PTRDIFF_MAX - ALIGNED) / size) {
        a->failed = true;
        return NULL;
    }
    char *piece = malloc((size_t)count * size + ALIGNED);
    a->failed = !piece;
    if (!piece)
        return NULL;
    a->piece[a->pieces++] = piece;
    return piece + (ALIGNED - (uintptr_t)piece % ALIGNED);
}

static void *take_zeros(arena *a, int64_t count, size_t size)
{
    void *piece = take(a, count, size);
    if (piece)
        memset(piece, 0, (size_t)count * size);
    return piece;
}

static void release(arena *a)
{
    while (a->pieces)
        free(a->piece[--a->pieces]);
    free(a->piece);
}

/* `depth` elements in each of `columns` columns, as B; or columns rows of depth as A. */
static sparge_operand operand(arena *a, sparge_format format, int levels, int64_t blocks, int64_t stride,
                              int64_t rows, int64_t starts, int64_t steps)
{
    const int64_t block = rows * stride * (int64_t)size_of[format];
    return (sparge_operand){
        .format = format, .levels = levels, .stride = stride, .block = block, .starts = starts, .steps = steps,
        .data = take(a, blocks * block, 1),
        .start = take(a, blocks * starts, sizeof(int32_t)),
        .step = take(a, blocks * steps, sizeof(float)),
    };
}

static sparge_scratch scratch(arena *a, const sparge_work *w)
{
    const sparge_geometry *g = &w->g;
    const int64_t widest = sparge_max(w->k.stride, w->v.stride), longest = sparge_max(g->block_q, w->keys);
    const int64_t rows = sparge_max(w->group, w->o->skip_rows), tile = rows * (w->keys + SPARGE_PANEL);
    sparge_scratch t = {
        .x = take(a, longest * widest, sizeof(float)),
        .code = take(a, longest * widest, sizeof(int16_t)),
    };
    if (w->predicts) {
        t.unit = take(a, widest, sizeof(float));
        t.rank = take(a, g->k_blocks, sizeof(float));
        t.key = take(a, g->k_blocks, sizeof(uint32_t));
        t.mass = take(a, g->k_blocks, sizeof(uint32_t));
        t.place = take(a, g->k_blocks, sizeof(uint32_t));
    }
    if (w->attends) {
        t.s = take(a, tile, sizeof(float));
        t.p = take(a, tile, size_of[w->v.format]);
        t.o = take(a, g->block_q * w->v.stride, sizeof(float));
        t.max = take(a, g->block_q, sizeof(float));
        t.sum = take(a, g->block_q, sizeof(float));
        t.local = take(a, rows, sizeof(float));
        t.shrink = take(a, rows, sizeof(float));
        t.weight = take(a, rows, sizeof(float));
        t.row_sum = take(a, rows, sizeof(float));
        t.p_start = take(a, rows, sizeof(int32_t));
        t.spoilt = take(a, g->block_q, sizeof(bool));
        t.share = take(a, g->k_blocks, sizeof(float));
    }
    return t;
}

/* ---- The order of it all ---- */

static int most_first(const void *a, const void *b)
{
    const sparge_task *x = a, *y = b;
    if (x->cost != y->cost)
        return x->cost < y->cost ? 1 : -1;
    return x->slot < y->slot ? -1 : 1;
}

static void pack_wave(sparge_work *w)
{
    const int64_t heads = w->end_kv - w->first_kv, blocks = w->g.k_blocks, all = heads * blocks;
    const int threads = w->o->threads;
    (void)threads;
    if (w->o->smooth_k) {
#pragma omp parallel for num_threads(threads)
        for (int64_t at = 0; at < all; at++)
            sparge_pack_sum(w, &w->scratch[omp_get_thread_num()], at / blocks, at % blocks);
        for (int64_t n = 0; n < heads; n++)
            sparge_pack_mean(w, n);
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t at = 0; at < all; at++) {
        sparge_scratch *t = &w->scratch[omp_get_thread_num()];
        sparge_pack_key(w, t, at / blocks, at % blocks);
        if (w->attends)
            sparge_pack_value(w, t, at / blocks, at % blocks);
    }
}

static void pack_chunk(const sparge_work *w)
{
    const int threads = w->o->threads;
    (void)threads;
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < w->tasks; n++)
        sparge_pack_query(w, &w->scratch[omp_get_thread_num()], &w->task[n]);
}

static void predict_chunk(const sparge_work *w)
{
    const int threads = w->o->threads;
    (void)threads;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t n = 0; n < w->tasks; n++)
        sparge_select_row(w, &w->scratch[omp_get_thread_num()], &w->task[n]);
}

static void attend_chunk(const sparge_work *w, int64_t *finished)
{
    const sparge_geometry *g = &w->g;
    const int64_t blocks = sparge_max(1, w->p->batch * w->p->heads * g->q_blocks);
    const int threads = w->o->threads;
    (void)threads;
    for (int64_t n = 0; n < w->tasks; n++) {
        const int64_t visible = sparge_blocks_seen(g, w->task[n].i);
        const int64_t line = w->task[n].head * g->q_blocks + w->task[n].i;
        w->task[n].cost =
            w->mask ? sparge_mask_row_count(w->mask->bits + line * w->mask->words, visible) : visible;
    }
    qsort(w->task, (size_t)w->tasks, sizeof *w->task, most_first);
    atomic_llong done = *finished;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t n = 0; n < w->tasks; n++) {
        sparge_attend_task(w, &w->scratch[omp_get_thread_num()], &w->task[n]);
        const long long so_far = atomic_fetch_add(&done, 1) + 1;
        if (w->o->progress && omp_get_thread_num() == 0)
            w->o->progress(w->o->user, (double)so_far / (double)blocks);
    }
    *finished = done;
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

/* The levels of a precision's codes, and the format that its product runs in. */
static int levels_of(sparge_precision precision, int int12_levels)
{
    return precision == SPARGE_INT8 ? 127 : precision == SPARGE_INT12 ? int12_levels : 0;
}

static sparge_format format_of(sparge_precision precision, sparge_format int8_format)
{
    return precision == SPARGE_INT8 ? int8_format : precision == SPARGE_INT12 ? SPARGE_WORDS : SPARGE_FLOATS;
}

static sparge_status run(const sparge_problem *p, const sparge_options *o, sparge_mask *predicted,
                         const sparge_mask *mask, const sparge_trace *trace, sparge_result *result)
{
    enum { PIECES = 32, SCRATCH_PIECES = 24 };
    const int64_t kv_heads = p->batch * p->kv_heads, group = p->heads / p->kv_heads;
    sparge_work w = {
        .p = p, .o = o, .trace = trace, .kernels = sparge_cpu_kernels(o->isa),
        .g = sparge_geometry_make(p->q_len, p->k_len, o->block_q, o->block_k, (int)o->causal),
        .predicts = predicted, .attends = result, .predicted = predicted, .mask = mask, .result = result,
        .keys = sparge_padded(o->block_k), .group = GROUP_ROWS,
    };
    const sparge_geometry *g = &w.g;
    const int64_t dim = sparge_padded(p->dim), dim_v = w.attends ? sparge_padded(p->dim_v) : 0;
    const sparge_format qk = format_of(o->qk, w.kernels.int8_scores), pv = format_of(o->pv, SPARGE_BYTES);
    const int qk_levels = levels_of(o->qk, 2047), pv_levels = levels_of(o->pv, 4095);

    const int64_t head_bytes = g->k_blocks * w.keys * (dim * (int64_t)size_of[qk] + dim_v * (int64_t)size_of[pv]);
    const int64_t block_bytes = g->block_q * dim * (int64_t)size_of[qk];
    const int64_t wave = sparge_max(1, sparge_min(kv_heads, WAVE_BYTES / sparge_max(1, head_bytes)));
    const int64_t chunk = sparge_min(wave * group * g->q_blocks,
                                     sparge_max(CHUNK_BYTES / block_bytes, CHUNK_TASKS * o->threads));
    const int64_t all = wave * g->k_blocks, packed = w.attends ? all : 0;

    arena a = { .room = PIECES + SCRATCH_PIECES * (int64_t)o->threads };
    a.piece = calloc((size_t)a.room, sizeof *a.piece);
    a.failed = !a.piece;
    w.no_mean = take_zeros(&a, sparge_max(dim, dim_v), sizeof(float));
    w.mean = take_zeros(&a, wave * dim, sizeof(float));
    w.pool_k = take(&a, w.predicts || o->smooth_k ? all * dim : 0, sizeof(float));
    w.sim_k = take(&a, w.predicts ? all : 0, sizeof(float));
    w.bad = take(&a, all, sizeof(uint8_t));
    w.k = operand(&a, qk, qk_levels, packed, dim, w.keys, w.keys, 1);
    w.v = operand(&a, pv, pv_levels, packed, dim_v, w.keys, dim_v, dim_v);
    w.q = operand(&a, qk, qk_levels, w.attends ? chunk : 0, dim, g->block_q, g->block_q, 1);
    w.pool_q = take(&a, w.predicts ? chunk * dim : 0, sizeof(float));
    w.task = take(&a, chunk, sizeof *w.task);
    w.scratch = take(&a, o->threads, sizeof *w.scratch);
    for (int n = 0; n < o->threads && !a.failed; n++)
        w.scratch[n] = scratch(&a, &w);

    w.pv_rows = take_zeros(&a, p->batch * p->heads, sizeof *w.pv_rows);

    double predicting = 0.0, packing = 0.0, attending = 0.0;
    int64_t finished = 0;
    for (w.first_kv = 0; w.first_kv < kv_heads && !a.failed; w.first_kv += wave) {
        const double start = sparge_ref_seconds();
        w.end_kv = sparge_min(kv_heads, w.first_kv + wave);
        pack_wave(&w);
        packing += sparge_ref_seconds() - start;
        const int64_t first = w.first_kv * group * g->q_blocks, end = w.end_kv * group * g->q_blocks;
        for (int64_t block = first; block < end; block += chunk) {
            w.tasks = sparge_min(chunk, end - block);
            for (int64_t n = 0; n < w.tasks; n++)
                w.task[n] = (sparge_task){ .head = (block + n) / g->q_blocks, .i = (block + n) % g->q_blocks,
                                           .slot = n };
            const double begin = sparge_ref_seconds();
            pack_chunk(&w);
            const double packed_at = sparge_ref_seconds();
            if (w.predicts)
                predict_chunk(&w);
            const double predicted_at = sparge_ref_seconds();
            if (w.attends)
                attend_chunk(&w, &finished);
            packing += packed_at - begin;
            predicting += predicted_at - packed_at;
            attending += sparge_ref_seconds() - predicted_at;
        }
    }
    for (int64_t h = 0; h < p->batch * p->heads && w.attends && !a.failed; h++)
        result->head_counts[h].pv_done = (double)w.pv_rows[h][0] / (double)g->block_q +
                                         (double)w.pv_rows[h][1] / (double)sparge_max(1, g->q_len % g->block_q);
    release(&a);
    if (result) {
        result->seconds_predict = predicting;
        result->seconds_quantize = packing;
        result->seconds_attend = attending;
    }
    return a.failed ? SPARGE_ERR_MEMORY : SPARGE_OK;
}

sparge_status sparge_cpu_predict(const sparge_problem *p, const sparge_options *o, sparge_mask *mask,
                                 const sparge_trace *trace)
{
    return run(p, o, mask, NULL, trace, NULL);
}

sparge_status sparge_cpu_attend(const sparge_problem *p, const sparge_options *o, const sparge_mask *mask,
                                sparge_result *result)
{
    return run(p, o, NULL, mask, result->trace, result);
}

sparge_status sparge_cpu_attention(const sparge_problem *p, const sparge_options *o, sparge_mask *mask,
                                   sparge_result *result)
{
    return run(p, o, mask, mask, result->trace, result);
}
