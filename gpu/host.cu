/* SPDX-License-Identifier: Apache-2.0 */
/* host.cu: one call of the cuda backend from the processor's side: memory, the order of the
 * launches, what comes back. Nothing of the algorithm is here.
 *
 * A call queues all of its work on one stream and looks at no result of it, so that it can be
 * captured into a CUDA graph. If the caller named no stream, the call waits for the end and times
 * its steps. */
#include "gpu/host.h"
#include "gpu/layout.h"
#include "sparge_inspect.h"

using namespace sparge;

/* ---- One call ---- */

struct call {
    const sparge_problem *p;
    const sparge_options *o;
    const sparge_mask *mask; /* NULL: dense; its bits are NULL: in the workspace */
    const sparge_intermediates *intermediates;
    sparge_result *result; /* NULL: none is wanted */
    bool predicts, attends, lse;
};

/* Memory in a row. From NULL it only counts. */
struct arena {
    char *base;
    int64_t bytes;
};

template <class T> static T *take(arena &a, int64_t count)
{
    T *const piece = a.base ? (T *)(a.base + a.bytes) : NULL;
    a.bytes += (sparge_max(1, count) * (int64_t)sizeof(T) + 255) / 256 * 256;
    return piece;
}

/* An array that the caller wants to see, or memory of our own. */
template <class T> static T *take_unless(T *wanted, arena &a, int64_t count)
{
    return wanted ? wanted : take<T>(a, count);
}

static void lay_out_prediction(work &w, const call &c, arena &a)
{
    const sparge_intermediates &t = *c.intermediates;
    const int64_t n = w.batch * w.heads, kv = w.batch * w.kv_heads;
    const int64_t lines = q_blocks_of_all_heads(w), blocks = k_blocks_of_all_heads(w);
    if (c.o->smooth_k) {
        w.k_sums = take<float>(a, blocks * w.dim);
        w.k_mean = take_unless(t.k_mean, a, kv * w.dim);
    }
    if (c.predicts) {
        w.q_pool = take_unless(w.cell ? NULL : t.q_pool, a, lines * w.dim);
        w.k_pool = take_unless(w.cell ? NULL : t.k_pool, a, blocks * w.dim);
        if (w.cell) {
            w.q_cell = take<float>(a, lines * w.dim * (BLOCK_Q / w.cell));
            w.k_cell = take<float>(a, kv * w.dim * w.cells.k_blocks);
        }
        w.q_sim = take_unless(t.q_sim, a, lines);
        w.k_sim = take_unless(t.k_sim, a, blocks);
        w.mask = take_unless(c.mask->bits, a, lines * w.words);
        w.s_all = t.s_all;
        w.s = t.s;
        w.why = t.why;
    }
    w.q_nonfinite = take<uint8_t>(a, n * w.g.q_len);
    w.k_nonfinite = take<uint8_t>(a, kv * w.g.k_len);
    w.q_block_nonfinite = take<uint8_t>(a, lines);
    w.k_block_nonfinite = take<uint8_t>(a, blocks);
    if (c.o->per_head)
        w.head_thresholds = take<sparge_thresholds>(a, w.heads);
}

static int64_t skipped_words(const work &w)
{
    return q_blocks_of_all_heads(w) * skip_groups(w) * sparge_mask_row_words(w.g.k_blocks);
}

static void lay_out_attention(work &w, const call &c, arena &a)
{
    const sparge_intermediates &t = *c.intermediates;
    const int64_t n = w.batch * w.heads, kv = w.batch * w.kv_heads;
    const int64_t lines = q_blocks_of_all_heads(w), blocks = k_blocks_of_all_heads(w);
    w.v_block_nonfinite = take<uint8_t>(a, blocks);
    if (c.o->qk_dtype == SPARGE_INT8) {
        w.q_tile = take<int8_t>(a, lines * q_tile_bytes(w.width));
        w.k_tile = take<int8_t>(a, blocks * k_tile_bytes(w.width));
        w.q_scale = take_unless(t.q_scale, a, lines);
        w.k_scale = take_unless(t.k_scale, a, blocks);
        w.q_int = t.q_int;
        w.k_int = t.k_int;
    }
    if (w.pv != SPARGE_F32)
        w.v_tile = take<uint8_t>(a, blocks * v_tile_bytes(w.width, w.pv == SPARGE_F16));
    if (w.pv == SPARGE_INT8) {
        w.v_scale = take<float>(a, blocks * w.width);
        w.v_int = t.v_int;
        w.v_scale_out = t.v_scale;
    }
    if (w.pv == SPARGE_FP8) {
        w.v_scale = take<float>(a, kv * w.width);
        w.v_max = take<float>(a, blocks * w.width);
    }
    if (c.lse && c.o->smooth_k)
        w.q_dot_mean_k = take<float>(a, n * w.g.q_len);
    if (w.k_bias)
        w.k_shown = take<uint32_t>(a, blocks * (BLOCK_K / 32));
    if (w.may_skip)
        w.skipped = take<uint32_t>(a, skipped_words(w));
    w.m = take_unless(t.m, a, n * w.g.q_len);
    w.l = take_unless(t.l, a, n * w.g.q_len);
    if (c.o->cuda.kernel == 5) {
        w.order = take<int64_t>(a, lines);
        w.order_len = take<int64_t>(a, 1);
        w.ticket = take<unsigned long long>(a, 1);
    }
    w.tally = take<sparge_tally>(a, n);
    w.counts = take_unless(c.result ? c.result->head_counts : NULL, a, n);
    w.pv_done = t.pv_done;
    if (c.result) {
        w.o = c.result->o;
        w.lse = c.result->lse;
    }
}

/* The work of a call in memory from `base` on. Returns how many bytes of it there are. */
static int64_t lay_out(work &w, const call &c, void *base)
{
    const sparge_problem *p = c.p;
    const sparge_options *o = c.o;
    const int64_t widest = c.attends ? sparge_max(p->dim, p->dim_v) : p->dim;
    arena a = {(char *)base, 0};
    w = work();
    w.g = sparge_geometry_make(p->q_len, p->k_len, BLOCK_Q, BLOCK_K, o->causal);
    w.batch = p->batch;
    w.heads = p->heads;
    w.kv_heads = p->kv_heads;
    w.dim = (int)p->dim;
    w.dim_v = (int)p->dim_v;
    w.width = widest <= 64 ? 64 : widest <= 96 ? 96 : 128;
    w.q = p->q;
    w.k = p->k;
    w.v = p->v;
    w.softmax_scale = o->softmax_scale;
    w.sink = o->sink;
    w.cell = (int)o->cell;
    if (w.cell)
        w.cells = sparge_geometry_make(p->q_len, p->k_len, w.cell, w.cell, o->causal);
    w.pv = o->pv_dtype;
    w.skip_rows = (int)o->skip_rows;
    w.may_skip = c.attends && may_skip(p, o);
    w.thresholds = o->thresholds;
    w.mask = c.mask ? c.mask->bits : NULL;
    w.words = w.mask ? c.mask->words : sparge_mask_row_words(w.g.k_blocks);
    if (c.attends && c.mask)
        w.given = *c.mask;
    w.k_bias = c.attends ? p->k_bias : NULL;
    lay_out_prediction(w, c, a);
    if (c.attends)
        lay_out_attention(w, c, a);
    return a.bytes;
}

static int64_t bytes_of(const call &c)
{
    work w;
    return lay_out(w, c, NULL);
}

/* ---- Pointers ---- */

static sparge_status check_pointer(const char *name, const void *data, sparge_error *error)
{
    cudaPointerAttributes a;
    const cudaError_t e = cudaPointerGetAttributes(&a, data);
    if (e != cudaSuccess)
        return check(e, "cudaPointerGetAttributes", error);
    if (a.type != cudaMemoryTypeDevice && a.type != cudaMemoryTypeManaged)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "%s points to host memory, the cuda backend needs device memory", name);
    return SPARGE_OK;
}

/* Every array that the call may touch is one of the device's. Those that are NULL cost nothing. */
static sparge_status check_pointers(const call &c, sparge_error *error)
{
    const sparge_problem *p = c.p;
    const sparge_intermediates *t = c.intermediates;
    const sparge_result none = {}, *r = c.result ? c.result : &none;
    const struct {
        const char *name;
        const void *data;
    } pointers[] = {
        {"q.data", p->q.data},
        {"k.data", p->k.data},
        {"v.data", c.attends ? p->v.data : NULL},
        {"result.o", r->o.data},
        {"result.lse", r->lse},
        {"result.head_counts", r->head_counts},
        {"k_bias", c.attends ? p->k_bias : NULL},
        {"mask.bits", c.mask ? c.mask->bits : NULL},
        {"mask.partial_first", c.mask ? c.mask->partial_first : NULL},
        {"mask.partial_block", c.mask ? c.mask->partial_block : NULL},
        {"mask.partial_bits", c.mask ? c.mask->partial_bits : NULL},
        {"workspace", c.o->cuda.workspace},
        {"intermediates.k_mean", t->k_mean},
        {"intermediates.q_pool", t->q_pool},
        {"intermediates.k_pool", t->k_pool},
        {"intermediates.q_sim", t->q_sim},
        {"intermediates.k_sim", t->k_sim},
        {"intermediates.s_all", t->s_all},
        {"intermediates.s", t->s},
        {"intermediates.why", t->why},
        {"intermediates.q_int", t->q_int},
        {"intermediates.k_int", t->k_int},
        {"intermediates.v_int", t->v_int},
        {"intermediates.q_scale", t->q_scale},
        {"intermediates.k_scale", t->k_scale},
        {"intermediates.v_scale", t->v_scale},
        {"intermediates.pv_done", t->pv_done},
        {"intermediates.m", t->m},
        {"intermediates.l", t->l},
    };
    sparge_status status = SPARGE_OK;
    for (const auto &x : pointers)
        if (!status && x.data)
            status = check_pointer(x.name, x.data, error);
    return status;
}

/* ---- Thresholds of heads ---- */

/* They travel as arguments, because a graph may run when the caller's array is long gone. */

enum { THRESHOLDS = 128 };

struct some_thresholds {
    sparge_thresholds of[THRESHOLDS];
};

static __global__ void set_thresholds(sparge_thresholds *to, int count,
                                      const __grid_constant__ some_thresholds thresholds)
{
    if ((int)threadIdx.x < count)
        to[threadIdx.x] = thresholds.of[threadIdx.x];
}

static cudaError_t send_thresholds(const work &w, const sparge_thresholds *per_head,
                                   cudaStream_t stream)
{
    cudaError_t e = cudaSuccess;
    for (int64_t h = 0; h < w.heads && e == cudaSuccess; h += THRESHOLDS) {
        const int count = (int)sparge_min(THRESHOLDS, w.heads - h);
        some_thresholds part = {};
        memcpy(part.of, per_head + h, (size_t)count * sizeof *part.of);
        e = launch(set_thresholds, 1, THRESHOLDS, 0, stream, w.head_thresholds + h, count, part);
    }
    return e;
}

/* ---- The steps in their order ---- */

static cudaError_t clear_skipped(const work &w, cudaStream_t stream)
{
    return cudaMemsetAsync(w.skipped, 0, (size_t)skipped_words(w) * sizeof *w.skipped, stream);
}

/* Events between the steps, if somebody waits for the call. */
struct stopwatch {
    enum { MARKS = 4 };
    cudaEvent_t mark[MARKS];
    int made, next;
};

static sparge_status start(stopwatch &watch, sparge_error *error)
{
    sparge_status status = SPARGE_OK;
    for (; !status && watch.made < stopwatch::MARKS; watch.made += !status)
        status = check(cudaEventCreate(&watch.mark[watch.made]), "cudaEventCreate", error);
    return status;
}

static sparge_status mark(stopwatch &watch, cudaStream_t stream, sparge_error *error)
{
    if (watch.made == 0)
        return SPARGE_OK;
    return check(cudaEventRecord(watch.mark[watch.next++], stream), "cudaEventRecord", error);
}

static sparge_status queue(const work &w, const call &c, stopwatch &watch, sparge_error *error)
{
    const auto choose = w.cell ? predict_cells : predict;
    const struct {
        const char *name;
        cudaError_t (*queue)(const work &, cudaStream_t); /* NULL: not in this call */
        bool marks;                                       /* the clock is read after it */
    } steps[] = {
        {"the launch of prepare", prepare, true},
        {"the launch of predict", c.predicts ? choose : NULL, true},
        {"cudaMemsetAsync", w.skipped ? clear_skipped : NULL, false},
        {"the launch of plan", w.order ? plan : NULL, false},
        {"the launch of attend", c.attends ? attention_of(c.o->cuda.kernel) : NULL, false},
        {"the launch of finish", c.attends ? finish : NULL, false},
        {"the launch of intermediates", c.attends ? intermediates : NULL, true},
    };
    const cudaStream_t stream = (cudaStream_t)c.o->cuda.stream;
    sparge_status status = mark(watch, stream, error);
    if (!status && w.head_thresholds)
        status =
            check(send_thresholds(w, c.o->per_head, stream), "the launch of set_thresholds", error);
    for (const auto &s : steps) {
        if (!status && s.queue)
            status = check(s.queue(w, stream), s.name, error);
        if (!status && s.marks)
            status = mark(watch, stream, error);
    }
    return status;
}

/* ---- What comes back ---- */

static sparge_status read_clock(const stopwatch &watch, sparge_result *result, sparge_error *error)
{
    double *const seconds[] = {&result->seconds_quantize, &result->seconds_predict,
                               &result->seconds_attend};
    sparge_status status = SPARGE_OK;
    for (int n = 0; n + 1 < stopwatch::MARKS && !status; n++) {
        float ms = 0.0f;
        status = check(cudaEventElapsedTime(&ms, watch.mark[n], watch.mark[n + 1]),
                       "cudaEventElapsedTime", error);
        *seconds[n] = 1e-3 * (double)ms;
    }
    return status;
}

static sparge_status read_counts(const work &w, sparge_counts *sum, sparge_error *error)
{
    enum { PART = 64 };
    sparge_counts head[PART];
    sparge_status status = SPARGE_OK;
    for (int64_t first = 0; first < w.batch * w.heads && !status; first += PART) {
        const int64_t count = sparge_min(PART, w.batch * w.heads - first);
        const size_t bytes = (size_t)count * sizeof *head;
        status = check(cudaMemcpy(head, w.counts + first, bytes, cudaMemcpyDeviceToHost),
                       "cudaMemcpy", error);
        for (int64_t n = 0; n < count && !status; n++)
            sparge_counts_add(sum, &head[n]);
    }
    return status;
}

/* ---- The call ---- */

/* Waits, and reads the clock and the counters. */
static sparge_status conclude(const work &w, const call &c, const stopwatch &watch,
                              sparge_error *error)
{
    sparge_status status = check(cudaStreamSynchronize((cudaStream_t)c.o->cuda.stream),
                                 "cudaStreamSynchronize", error);
    if (!status && c.result)
        status = read_clock(watch, c.result, error);
    if (!status && c.result)
        status = read_counts(w, &c.result->counts, error);
    return status;
}

/* Queues the call in `bytes` of memory, the caller's or its own. */
static sparge_status run_in_memory(const call &c, int64_t bytes, stopwatch &watch,
                                   sparge_error *error)
{
    const cudaStream_t stream = (cudaStream_t)c.o->cuda.stream;
    void *memory = c.o->cuda.workspace;
    if (!memory) {
        const sparge_status status =
            check(cudaMallocAsync(&memory, (size_t)bytes, stream), "cudaMallocAsync", error);
        if (status)
            return status;
    }
    work w;
    lay_out(w, c, memory);
    sparge_status status = queue(w, c, watch, error);
    if (!status && !stream)
        status = conclude(w, c, watch, error);
    if (!c.o->cuda.workspace) {
        const sparge_status freed =
            check(cudaFreeAsync(memory, stream), "cudaFreeAsync", status ? NULL : error);
        status = status ? status : freed;
    }
    return status;
}

static sparge_status run(const call &c, sparge_error *error)
{
    sparge_status status = check_pointers(c, error);
    if (status)
        return status;
    const int64_t bytes = bytes_of(c);
    if (c.o->cuda.workspace &&
        (c.o->cuda.workspace_bytes < bytes || (uintptr_t)c.o->cuda.workspace % 256 != 0))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "workspace has %lld bytes at %p, it needs %lld at a multiple of 256",
                           (long long)c.o->cuda.workspace_bytes, c.o->cuda.workspace,
                           (long long)bytes);
    stopwatch watch = {};
    if (!c.o->cuda.stream)
        status = start(watch, error);
    if (!status)
        status = run_in_memory(c, bytes, watch, error);
    while (watch.made > 0)
        cudaEventDestroy(watch.mark[--watch.made]);
    if (c.result)
        c.result->workspace_bytes = bytes;
    return status;
}

/* ---- The entries ---- */

sparge_status sparge_cuda_predict(const sparge_problem *p, const sparge_options *o,
                                  sparge_mask *mask, const sparge_intermediates *intermediates,
                                  sparge_error *error)
{
    const call c = {p, o, mask, intermediates, NULL, true, false, false};
    return run(c, error);
}

sparge_status sparge_cuda_attend(const sparge_problem *p, const sparge_options *o,
                                 const sparge_mask *mask, sparge_result *result,
                                 sparge_error *error)
{
    const call c = {p, o, mask, result->intermediates, result, false, true, result->lse != NULL};
    return run(c, error);
}

sparge_status sparge_cuda_attention(const sparge_problem *p, const sparge_options *o,
                                    sparge_mask *mask, sparge_result *result, sparge_error *error)
{
    const call c = {p, o, mask, result->intermediates, result, true, true, result->lse != NULL};
    return run(c, error);
}

sparge_status sparge_cuda_workspace(const sparge_problem *p, const sparge_options *o, bool lse,
                                    int64_t *bytes, sparge_error *)
{
    const sparge_mask in_workspace = {};
    const sparge_intermediates none = {};
    *bytes = bytes_of({p, o, &in_workspace, &none, NULL, true, true, lse});
    return SPARGE_OK;
}
