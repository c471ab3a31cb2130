/* work.h: what one call works on, as every kernel gets it: the problem, the options, and where each
 * stage leaves what the next one reads. host.cu fills it in; the letters are those of ref/ref.h.
 *
 * The cuda backend has one block size, 128 x 64, and channels are padded with zeros to a `width` of
 * 64, 96 or 128: the shapes of the tensor cores. n counts query heads over the batch, kv key heads.
 */
#ifndef SPARGE_GPU_WORK_H
#define SPARGE_GPU_WORK_H

#include "gpu/ptx.h"

#include "common/block_mask.h"
#include "common/geometry.h"
#include "common/half.h"
#include "common/softmax.h"
#include "sparge.h"

namespace sparge {

enum { BLOCK_Q = 128, BLOCK_K = 64, MAX_WIDTH = 128 };

struct work {
    sparge_geometry g;
    int64_t batch, heads, kv_heads;
    int dim, dim_v, width;
    sparge_in q, k, v;
    sparge_out o;
    float softmax_scale;
    bool causal, sink;
    sparge_dtype pv;
    int skip_rows;
    bool may_skip;                      /* some head has a lambda above -inf */
    sparge_thresholds thresholds;       /* of all heads, or: */
    sparge_thresholds *head_thresholds; /* [heads]; these, if not NULL */

    /* Stage 1. NULL where nobody asked. */
    float *sums;           /* [kv][k_blocks][dim] of the keys of a block */
    float *mean;           /* [kv][dim]: the mean key; NULL: keys stay as they are */
    float *q_pool, *q_sim; /* [n][q_blocks][dim], [n][q_blocks] */
    float *k_pool, *k_sim; /* [kv][k_blocks][dim], [kv][k_blocks] */
    float *s_all, *s;      /* [n][q_blocks][k_blocks], intermediates */
    uint8_t *why;
    uint32_t *mask; /* [n][q_blocks][words]; NULL: dense */
    int64_t words;

    /* Codes, in the images of image.h. */
    int8_t *q8, *k8;                   /* [n][q_blocks][128 rows], [kv][k_blocks][64 rows] */
    uint8_t *v_tile;                   /* [kv][k_blocks], by pv */
    float *q_scale, *k_scale;          /* [n][q_blocks], [kv][k_blocks] */
    float *v_scale;                    /* int8: [kv][k_blocks][width]; fp8: [kv][width] */
    float *max_v;                      /* fp8: [kv][k_blocks][width] of |v| */
    float *lift;                       /* [n][q_len]: q . mean key, which lse gets back */
    uint8_t *bad_q, *bad_k;            /* [n][q_len], [kv][k_len]: some element is not finite */
    uint8_t *wild_q, *wild_k, *wild_v; /* [n][q_blocks], [kv][k_blocks]: some row is bad */

    /* Stage 2. */
    uint32_t *skipped; /* [n][q_blocks][groups][words]: groups of rows that lambda skipped */
    float *m, *l;      /* [n][q_len], m in log2 units */
    int64_t *order, *order_len; /* the query blocks that keep something, longest first; how many */
    unsigned long long *ticket; /* how many of them are taken */

    /* What comes back beside o. */
    float *lse;                     /* [n][q_len] */
    float *pv_done;                 /* [n][q_blocks][k_blocks], one of the intermediates */
    int16_t *q_int, *k_int, *v_int; /* intermediates, as in sparge.h */
    float *v_scale_out;
    sparge_counts *counts;     /* [n] */
    unsigned long long *tally; /* [n][TALLIES] */

    int shared_limit,
        multiprocessors; /* of the device: bytes of shared memory for a thread block */
};

/* What is counted of a head, as integers, which have one sum in any order. */
enum {
    TALLY_PAIRS,
    TALLY_TOKENS,
    TALLY_QK_DONE,
    TALLY_QK_TOKENS,
    TALLY_PV_TOKENS,
    TALLY_PV_ROWS,       /* of whole query blocks, a row for each key block */
    TALLY_PV_ROWS_SHORT, /* of the short one */
    TALLIES
};

/* A query block. */
struct query_block {
    int64_t n, b, h, kv, i; /* kv counts over the batch */
    int64_t first, rows;    /* tokens */
    int64_t line;           /* n * q_blocks + i */
    int64_t seen;           /* key blocks that some row may see: the first ones */
};

SPARGE_DEVICE query_block query_block_of(const work &w, int64_t line)
{
    query_block q;
    q.line = line;
    q.n = line / w.g.q_blocks;
    q.i = line % w.g.q_blocks;
    q.b = q.n / w.heads;
    q.h = q.n % w.heads;
    q.kv = q.b * w.kv_heads + q.h / (w.heads / w.kv_heads);
    q.first = q.i * BLOCK_Q;
    q.rows = sparge_block_rows(w.g.q_len, BLOCK_Q, q.i);
    q.seen = sparge_blocks_visible(&w.g, q.i);
    return q;
}

SPARGE_DEVICE const sparge_thresholds &thresholds_of(const work &w, int64_t h)
{
    return w.head_thresholds ? w.head_thresholds[h] : w.thresholds;
}

SPARGE_DEVICE const uint32_t *mask_row(const work &w, const query_block &q)
{
    return w.mask ? w.mask + q.line * w.words : NULL;
}

/* The first kept block in [from, q.seen), or q.seen. */
SPARGE_DEVICE int64_t next_kept(const uint32_t *row, const query_block &q, int64_t from)
{
    return row ? sparge_mask_row_next(row, from, q.seen) : sparge_min(from, q.seen);
}

/* Word `at` of a row, of blocks that some row may see. */
SPARGE_DEVICE uint32_t kept_word(const uint32_t *row, int64_t at, int64_t seen)
{
    const int64_t left = seen - 32 * at;
    const uint32_t visible = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1u;
    return row ? row[at] & visible : visible;
}

SPARGE_HD int groups(const work &w) { return (BLOCK_Q + w.skip_rows - 1) / w.skip_rows; }

/* The row of `skipped` that belongs to the group of row r of a query block. */
SPARGE_DEVICE uint32_t *skipped_row(const work &w, const query_block &q, int r)
{
    const int64_t words = sparge_mask_row_words(w.g.k_blocks);
    return w.skipped + (q.line * groups(w) + r / w.skip_rows) * words;
}

/* One thread of a group that skips block j says so; nothing is said of those that never do. */
SPARGE_DEVICE void mark_skipped(const work &w, const query_block &q, int r, int64_t j)
{
    atomicOr(&skipped_row(w, q, r)[j >> 5], 1u << (j & 31));
}

/* To log2 units: what an integer score of the pair is multiplied by. */
SPARGE_DEVICE float score_unit(const work &w, const query_block &q, int64_t j)
{
    return w.q_scale[q.line] * w.k_scale[q.kv * w.g.k_blocks + j] * w.softmax_scale * SPARGE_LOG2E;
}

/* ---- Elements of the caller's tensors ---- */

SPARGE_DEVICE float element(const sparge_in &in, int64_t at)
{
    switch (in.dtype) {
    case SPARGE_F16: return sparge_f16_to_f32(((const uint16_t *)in.data)[at]);
    case SPARGE_BF16: return sparge_bf16_to_f32(((const uint16_t *)in.data)[at]);
    default: return ((const float *)in.data)[at];
    }
}

SPARGE_DEVICE int64_t place(const sparge_in &in, int64_t b, int64_t h, int64_t token)
{
    return b * in.batch + h * in.head + token * in.token;
}

/* A zero of o has no sign. */
SPARGE_DEVICE void store(const sparge_out &out, int64_t at, float x)
{
    x += 0.0f;
    switch (out.dtype) {
    case SPARGE_F16: ((uint16_t *)out.data)[at] = sparge_f32_to_f16(x); break;
    case SPARGE_BF16: ((uint16_t *)out.data)[at] = sparge_f32_to_bf16(x); break;
    default: ((float *)out.data)[at] = x; break;
    }
}

/* Channels c and c + 1 of a row that begins `at`, as far as they are there: in one access where
 * both are and memory is aligned. */
SPARGE_DEVICE void store_pair(const sparge_out &out, int64_t at, int c, int dim, float x, float y)
{
    at += c;
    x += 0.0f;
    y += 0.0f;
    if (out.dtype != SPARGE_F32 && c + 1 < dim &&
        ((uintptr_t)((uint16_t *)out.data + at) & 3) == 0) {
        const bool f16 = out.dtype == SPARGE_F16;
        const uint32_t low = f16 ? sparge_f32_to_f16(x) : sparge_f32_to_bf16(x);
        const uint32_t high = f16 ? sparge_f32_to_f16(y) : sparge_f32_to_bf16(y);
        *(uint32_t *)((uint16_t *)out.data + at) = low | high << 16;
        return;
    }
    if (c < dim)
        store(out, at, x);
    if (c + 1 < dim)
        store(out, at + 1, y);
}

SPARGE_DEVICE int64_t out_row(const work &w, const query_block &q, int r)
{
    return q.b * w.o.batch + q.h * w.o.head + (q.first + r) * w.o.token;
}

/* m and l of a row: finish.cu makes lse and counters of them. */
SPARGE_DEVICE void store_state(const work &w, const query_block &q, int r, const sparge_row &state)
{
    w.m[q.n * w.g.q_len + q.first + r] = state.max;
    w.l[q.n * w.g.q_len + q.first + r] = state.sum;
}

/* ---- The kernels, each behind a function that queues it ---- */

cudaError_t prepare(const work &w,
                    cudaStream_t stream); /* sums, mean, pooled rows, codes: at most 3 launches */
cudaError_t predict(const work &w, cudaStream_t stream); /* the mask: 1 launch */
bool predict_fits(int64_t k_blocks, int shared_limit);   /* into shared memory */
cudaError_t plan(const work &w, cudaStream_t stream);    /* the order of kernel 5: 1 launch */
cudaError_t finish(const work &w,
                   cudaStream_t stream); /* lse, counters, NaN, rows without keys: 2 launches */
cudaError_t intermediates(
    const work &w, cudaStream_t stream); /* codes out of their images, where asked: 1 launch */

/* The ladder (README.md): stage 2 up to m and l. */
cudaError_t attend_naive(const work &w, cudaStream_t stream);
cudaError_t attend_shared(const work &w, cudaStream_t stream);
cudaError_t attend_dp4a(const work &w, cudaStream_t stream);
cudaError_t attend_mma(const work &w, cudaStream_t stream);
cudaError_t attend_hopper(const work &w, cudaStream_t stream);

/* A launch in the order of the stream; `shared` bytes of dynamic shared memory. */
template <class... Args, class... Given>
cudaError_t launch(void (*kernel)(Args...), int64_t blocks, int threads, size_t shared,
                   cudaStream_t stream, Given... args)
{
    if (blocks == 0)
        return cudaSuccess;
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024)
        error = cudaFuncSetAttribute((const void *)kernel,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return error != cudaSuccess ? error : cudaLaunchKernelEx(&config, kernel, args...);
}

} // namespace sparge

#endif
