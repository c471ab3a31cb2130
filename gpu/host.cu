/* host.cu: one call of the cuda backend from the processor's side: memory, the order of the
 * launches, what comes back. Nothing of the algorithm is here.
 *
 * A call queues all of its work on one stream and looks at no result of it, so that it can be
 * captured into a CUDA graph; where the caller named no stream it waits for the end, and times the
 * stages. */
#include "gpu/host.h"
#include "gpu/image.h"

using namespace sparge;

/* ---- One call ---- */

struct call {
    const sparge_problem *p;
    const sparge_options *o;
    bool predicts, attends;
    uint32_t *mask; /* NULL: dense, or in the workspace where `predicts` */
    int64_t words;
    const sparge_intermediates *intermediates;
    sparge_result *result; /* NULL unless `attends` */
    bool lse;
};

/* Memory in a row; from NULL it only counts. */
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

/* What the caller wants to see, or memory of our own. */
template <class T> static T *take_unless(T *wanted, arena &a, int64_t count)
{
    return wanted ? wanted : take<T>(a, count);
}

static void lay_out_prediction(work &w, const call &c, arena &a)
{
    const int64_t n = w.batch * w.heads, kv = w.batch * w.kv_heads;
    const int64_t lines = n * w.g.q_blocks, blocks = kv * w.g.k_blocks;
    if (c.o->smooth_k) {
        w.sums = take<float>(a, blocks * w.dim);
        w.mean = take_unless(c.intermediates->k_mean, a, kv * w.dim);
    }
    if (c.predicts) {
        w.q_pool = take_unless(c.intermediates->q_pool, a, lines * w.dim);
        w.k_pool = take_unless(c.intermediates->k_pool, a, blocks * w.dim);
        w.q_sim = take_unless(c.intermediates->q_sim, a, lines);
        w.k_sim = take_unless(c.intermediates->k_sim, a, blocks);
        w.mask = take_unless(c.mask, a, lines * w.words);
        w.s_all = c.intermediates->s_all;
        w.s = c.intermediates->s;
        w.why = c.intermediates->why;
    }
    w.bad_q = take<uint8_t>(a, n * w.g.q_len);
    w.bad_k = take<uint8_t>(a, kv * w.g.k_len);
    w.wild_q = take<uint8_t>(a, lines);
    w.wild_k = take<uint8_t>(a, blocks);
    if (c.o->per_head)
        w.head_thresholds = take<sparge_thresholds>(a, w.heads);
}

static int64_t skipped_words(const work &w)
{
    return w.batch * w.heads * w.g.q_blocks * groups(w) * sparge_mask_row_words(w.g.k_blocks);
}

static void lay_out_attention(work &w, const call &c, arena &a)
{
    const int64_t n = w.batch * w.heads, kv = w.batch * w.kv_heads;
    const int64_t lines = n * w.g.q_blocks, blocks = kv * w.g.k_blocks;
    const bool codes = c.o->qk_dtype == SPARGE_INT8, halves = w.pv == SPARGE_F16;
    w.wild_v = take<uint8_t>(a, blocks);
    if (codes) {
        w.q8 = take<int8_t>(a, lines * q_tile_bytes(w.width));
        w.k8 = take<int8_t>(a, blocks * k_tile_bytes(w.width));
        w.q_scale = take_unless(c.intermediates->q_scale, a, lines);
        w.k_scale = take_unless(c.intermediates->k_scale, a, blocks);
        w.q_int = c.intermediates->q_int;
        w.k_int = c.intermediates->k_int;
    }
    if (w.pv != SPARGE_F32)
        w.v_tile = take<uint8_t>(a, blocks * v_tile_bytes(w.width, halves));
    if (w.pv == SPARGE_INT8) {
        w.v_scale = take<float>(a, blocks * w.width);
        w.v_int = c.intermediates->v_int;
        w.v_scale_out = c.intermediates->v_scale;
    }
    if (w.pv == SPARGE_FP8) {
        w.v_scale = take<float>(a, kv * w.width);
        w.max_v = take<float>(a, blocks * w.width);
    }
    if (c.lse && c.o->smooth_k)
        w.lift = take<float>(a, n * w.g.q_len);
    if (w.may_skip)
        w.skipped = take<uint32_t>(a, skipped_words(w));
    w.m = take_unless(c.intermediates->m, a, n * w.g.q_len);
    w.l = take_unless(c.intermediates->l, a, n * w.g.q_len);
    if (c.o->kernel == 5) {
        w.order = take<int64_t>(a, lines);
        w.order_len = take<int64_t>(a, 1);
        w.ticket = take<unsigned long long>(a, 1);
    }
    w.tally = take<unsigned long long>(a, n * TALLIES);
    w.counts = take_unless(c.result ? c.result->head_counts : NULL, a, n);
    w.pv_done = c.intermediates->pv_done;
    if (c.result) {
        w.o = c.result->o;
        w.lse = c.result->lse;
    }
}

/* The work of a call in memory from `base` on; returns how many bytes of it there are. */
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
    w.causal = o->causal != SPARGE_CAUSAL_NONE;
    w.sink = o->sink;
    w.pv = o->pv_dtype;
    w.skip_rows = (int)o->skip_rows;
    w.may_skip = c.attends && may_skip(p, o);
    w.thresholds = o->thresholds;
    w.mask = c.mask;
    w.words = c.mask ? c.words : sparge_mask_row_words(w.g.k_blocks);
    lay_out_prediction(w, c, a);
    if (c.attends)
        lay_out_attention(w, c, a);
    return a.bytes;
}

/* ---- Pointers ---- */

static sparge_status check_pointer(const char *name, const void *data, bool needed,
                                   sparge_error *error)
{
    if (!data)
        return needed ? fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL", name) : SPARGE_OK;
    cudaPointerAttributes a;
    const cudaError_t e = cudaPointerGetAttributes(&a, data);
    if (e != cudaSuccess)
        return check(e, "cudaPointerGetAttributes", error);
    if (a.type != cudaMemoryTypeDevice && a.type != cudaMemoryTypeManaged)
        return fail(error, SPARGE_ERR_ARGUMENT,
                    "%s points to host memory, the cuda backend needs device memory", name);
    return SPARGE_OK;
}

static sparge_status check_pointers(const call &c, sparge_error *error)
{
    const sparge_problem *p = c.p;
    const sparge_intermediates *t = c.intermediates;
    const sparge_result none = {}, *r = c.result ? c.result : &none;
    const bool queries = p->batch && p->q_len, keys = p->batch && p->k_len;
    const struct {
        const char *name;
        const void *data;
        bool needed;
    } pointers[] = {
        {"q.data", p->q.data, queries},
        {"k.data", p->k.data, keys},
        {"v.data", c.attends ? p->v.data : NULL, c.attends && keys},
        {"result.o", r->o.data, c.attends && queries},
        {"result.lse", r->lse, false},
        {"result.head_counts", r->head_counts, false},
        {"mask.bits", c.mask, false},
        {"workspace", c.o->workspace, false},
        {"intermediates.k_mean", t->k_mean, false},
        {"intermediates.q_pool", t->q_pool, false},
        {"intermediates.k_pool", t->k_pool, false},
        {"intermediates.q_sim", t->q_sim, false},
        {"intermediates.k_sim", t->k_sim, false},
        {"intermediates.s_all", t->s_all, false},
        {"intermediates.s", t->s, false},
        {"intermediates.why", t->why, false},
        {"intermediates.q_int", t->q_int, false},
        {"intermediates.k_int", t->k_int, false},
        {"intermediates.v_int", t->v_int, false},
        {"intermediates.q_scale", t->q_scale, false},
        {"intermediates.k_scale", t->k_scale, false},
        {"intermediates.v_scale", t->v_scale, false},
        {"intermediates.pv_done", t->pv_done, false},
        {"intermediates.m", t->m, false},
        {"intermediates.l", t->l, false},
    };
    sparge_status status = SPARGE_OK;
    for (const auto &x : pointers)
        if (!status)
            status = check_pointer(x.name, x.data, x.needed, error);
    return status;
}

/* ---- Thresholds travel as arguments: a graph may run when the caller's array is long gone ---- */

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

/* ---- The stages in their order ---- */

/* Between them the device looks at its clock, where somebody waits for the call. */
struct stopwatch {
    enum { MARKS = 4 };
    cudaEvent_t mark[MARKS];
    int made;
};

static cudaError_t queue(const work &w, const call &c, stopwatch &watch, const char **stage)
{
    const cudaStream_t stream = (cudaStream_t)c.o->stream;
    cudaError_t e = cudaSuccess;
    const auto step = [&](const char *name, cudaError_t now) {
        if (e == cudaSuccess && now != cudaSuccess) {
            e = now;
            *stage = name;
        }
        return e == cudaSuccess;
    };
    const auto mark = [&](int n) {
        return watch.made == 0 || step("cudaEventRecord", cudaEventRecord(watch.mark[n], stream));
    };
    bool on = mark(0);
    if (on && w.head_thresholds)
        on = step("the launch of set_thresholds", send_thresholds(w, c.o->per_head, stream));
    on = on && step("the launch of prepare", prepare(w, stream)) && mark(1);
    if (on && c.predicts)
        on = step("the launch of predict", predict(w, stream));
    on = on && mark(2);
    if (on && c.attends) {
        if (w.skipped)
            on = step("cudaMemsetAsync",
                      cudaMemsetAsync(w.skipped, 0, (size_t)skipped_words(w) * sizeof *w.skipped,
                                      stream));
        if (on && w.order)
            on = step("the launch of plan", plan(w, stream));
        on = on && step("the launch of attend", attention_of(c.o->kernel)(w, stream)) &&
             step("the launch of finish", finish(w, stream)) &&
             step("the launch of intermediates", intermediates(w, stream));
    }
    if (on)
        mark(3);
    return e;
}

/* Waits, reads the clock and the counters. */
static sparge_status conclude(const work &w, const call &c, const stopwatch &watch,
                              sparge_error *error)
{
    sparge_status status =
        check(cudaStreamSynchronize((cudaStream_t)c.o->stream), "cudaStreamSynchronize", error);
    float ms[stopwatch::MARKS - 1] = {0};
    for (int n = 0; n + 1 < stopwatch::MARKS && !status; n++)
        status = check(cudaEventElapsedTime(&ms[n], watch.mark[n], watch.mark[n + 1]),
                       "cudaEventElapsedTime", error);
    if (status || !c.result)
        return status;
    c.result->seconds_quantize = 1e-3 * (double)ms[0];
    c.result->seconds_predict = 1e-3 * (double)ms[1];
    c.result->seconds_attend = 1e-3 * (double)ms[2];
    enum { PART = 64 };
    sparge_counts head[PART], &sum = c.result->counts;
    for (int64_t first = 0; first < w.batch * w.heads && !status; first += PART) {
        const int64_t count = sparge_min(PART, w.batch * w.heads - first);
        const size_t bytes = (size_t)count * sizeof *head;
        status = check(cudaMemcpy(head, w.counts + first, bytes, cudaMemcpyDeviceToHost),
                       "cudaMemcpy", error);
        for (int64_t n = 0; n < count && !status; n++) {
            sum.pairs += head[n].pairs;
            sum.qk_done += head[n].qk_done;
            sum.pv_done += head[n].pv_done;
            sum.tokens += head[n].tokens;
            sum.qk_tokens += head[n].qk_tokens;
            sum.pv_tokens += head[n].pv_tokens;
        }
    }
    return status;
}

static sparge_status run(const call &c, sparge_error *error)
{
    const cudaStream_t stream = (cudaStream_t)c.o->stream;
    const bool waits = stream == NULL;
    device d;
    work w;
    sparge_status status = find_device(&d, error);
    if (!status)
        status = check_pointers(c, error);
    if (status)
        return status;
    const int64_t bytes = lay_out(w, c, NULL);
    if (c.o->workspace && (c.o->workspace_bytes < bytes || (uintptr_t)c.o->workspace % 256 != 0))
        return fail(error, SPARGE_ERR_ARGUMENT,
                    "workspace has %lld bytes at %p, it needs %lld at a multiple of 256",
                    (long long)c.o->workspace_bytes, c.o->workspace, (long long)bytes);

    void *memory = c.o->workspace;
    stopwatch watch = {};
    for (; waits && !status && watch.made < stopwatch::MARKS; watch.made += !status)
        status = check(cudaEventCreate(&watch.mark[watch.made]), "cudaEventCreate", error);
    if (!status && !memory)
        status = check(cudaMallocAsync(&memory, (size_t)bytes, stream), "cudaMallocAsync", error);
    if (!status) {
        lay_out(w, c, memory);
        w.shared_limit = d.shared_limit;
        w.multiprocessors = d.multiprocessors;
        const char *stage = "";
        const cudaError_t e = queue(w, c, watch, &stage);
        status = check(e, stage, error);
    }
    if (!status && waits)
        status = conclude(w, c, watch, error);
    if (memory && !c.o->workspace) {
        const sparge_status freed =
            check(cudaFreeAsync(memory, stream), "cudaFreeAsync", status ? NULL : error);
        status = status ? status : freed;
    }
    while (watch.made > 0)
        cudaEventDestroy(watch.mark[--watch.made]);
    if (c.result)
        c.result->workspace = bytes;
    return status;
}

/* ---- The entries ---- */

static const sparge_intermediates no_intermediates = {};

sparge_status sparge_cuda_predict(const sparge_problem *p, const sparge_options *o,
                                  sparge_mask *mask, const sparge_intermediates *intermediates,
                                  sparge_error *error)
{
    const call c = {p, o, true, false, mask->bits, mask->words, intermediates, NULL, false};
    return run(c, error);
}

sparge_status sparge_cuda_attend(const sparge_problem *p, const sparge_options *o,
                                 const sparge_mask *mask, sparge_result *result,
                                 sparge_error *error)
{
    const call c = {p,
                    o,
                    false,
                    true,
                    mask ? mask->bits : NULL,
                    mask ? mask->words : 0,
                    result->intermediates ? result->intermediates : &no_intermediates,
                    result,
                    result->lse != NULL};
    return run(c, error);
}

sparge_status sparge_cuda_attention(const sparge_problem *p, const sparge_options *o,
                                    sparge_mask *mask, sparge_result *result, sparge_error *error)
{
    const call c = {p,
                    o,
                    true,
                    true,
                    mask->bits,
                    mask->words,
                    result->intermediates ? result->intermediates : &no_intermediates,
                    result,
                    result->lse != NULL};
    return run(c, error);
}

sparge_status sparge_cuda_workspace(const sparge_problem *p, const sparge_options *o, bool lse,
                                    int64_t *bytes, sparge_error *)
{
    const call c = {p, o, true, true, NULL, 0, &no_intermediates, NULL, lse};
    work w;
    *bytes = lay_out(w, c, NULL);
    return SPARGE_OK;
}
