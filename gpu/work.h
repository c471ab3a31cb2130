/* SPDX-License-Identifier: Apache-2.0 */
/* work.h: what one call works on, as every launch gets it: the problem, the options, and where each
 * launch leaves what the next one reads. host.cu fills it in. The letters are those of ref/ref.h.
 *
 * The cuda backend has one block size, 128 x 64. Channels are padded with zeros to a `width` of 64,
 * 96 or 128, the shapes of the tensor cores. n counts query heads over the batch, kv key heads. */
#ifndef SPARGE_GPU_WORK_H
#define SPARGE_GPU_WORK_H

#include <type_traits>

#include "gpu/ptx.h"

#include "common/block_mask.h"
#include "common/counts.h"
#include "common/element.h"
#include "common/quant.h"
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
    bool sink;
    sparge_dtype pv;
    int skip_rows;
    bool may_skip;                      /* some head has a lambda above -inf */
    sparge_thresholds thresholds;       /* of all heads, or: */
    sparge_thresholds *head_thresholds; /* [heads], used if not NULL */

    /* Prediction. NULL: not computed, or not asked for. */
    float *k_sums;         /* [kv][k_blocks][dim]: the sum of the keys of a block */
    float *k_mean;         /* [kv][dim]; NULL: smooth_k is off */
    float *q_pool, *q_sim; /* [n][q_blocks][dim], [n][q_blocks] */
    float *k_pool, *k_sim; /* [kv][k_blocks][dim], [kv][k_blocks] */
    int cell;              /* tokens of a cell; 0: by blocks */
    sparge_geometry cells; /* of cells */
    float *q_cell;         /* [n][q_blocks][dim][BLOCK_Q / cell]: their mean rows */
    float *k_cell;         /* [kv][dim][cells of k_len] */
    float *s_all, *s;      /* [n][q_blocks][k_blocks], intermediates */
    uint8_t *why;
    uint32_t *mask; /* [n][q_blocks][words]; NULL: dense */
    int64_t words;

    /* Codes, as layout.h says. */
    int8_t *q_tile, *k_tile;  /* [n][q_blocks], [kv][k_blocks] tiles */
    uint8_t *v_tile;          /* [kv][k_blocks] tiles, by pv */
    float *q_scale, *k_scale; /* [n][q_blocks], [kv][k_blocks] */
    float *v_scale;           /* int8: [kv][k_blocks][width]; fp8: [kv][width] */
    float *v_max;             /* fp8: [kv][k_blocks][width], the largest |v| */
    float *q_dot_mean_k;      /* [n][q_len]: what smooth_k takes from lse, before the scale */

    /* Is some element of a row NaN or infinite? Of a block? */
    uint8_t *q_nonfinite, *k_nonfinite; /* [n][q_len], [kv][k_len] */
    uint8_t *q_block_nonfinite, *k_block_nonfinite, *v_block_nonfinite; /* as q_scale, k_scale */

    /* Attention. */
    uint32_t *skipped; /* [n][q_blocks][skip groups][words]: blocks that lambda skipped */
    float *m, *l;      /* [n][q_len], m in log2 units */
    int64_t *order;    /* kernel 5: the query blocks that keep something, longest first */
    int64_t *order_len;
    unsigned long long *ticket; /* how many of them are taken */

    /* What comes back beside o. */
    float *lse;                     /* [n][q_len] */
    float *pv_done;                 /* [n][q_blocks][k_blocks], one of the intermediates */
    int16_t *q_int, *k_int, *v_int; /* intermediates, as in sparge.h */
    float *v_scale_out;
    sparge_counts *counts; /* [n] */
    sparge_tally *tally;   /* [n] */

    /* What hides visible pairs. NULL, or without partial_first: nothing does. */
    sparge_mask given;   /* the caller's, for its partly attended blocks */
    const float *k_bias; /* [kv][k_len] */
    uint32_t *k_shown;   /* [kv][k_blocks][2]: the keys that k_bias does not hide */
};

/* A query block. */
struct query_block {
    int64_t n, b, h, kv, i; /* kv counts over the batch */
    int64_t first, rows;    /* tokens */
    int64_t line;           /* n * q_blocks + i */
    int64_t visible;        /* how many key blocks some row may see: the first ones */
    const uint32_t *mask;   /* its row; NULL: dense */
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
    q.visible = sparge_blocks_visible(&w.g, q.i);
    q.mask = w.mask ? w.mask + line * w.words : NULL;
    return q;
}

SPARGE_DEVICE sparge_thresholds thresholds_of(const work &w, int64_t h)
{
    return w.head_thresholds ? w.head_thresholds[h] : w.thresholds;
}

/* The first kept block in [from, q.visible); q.visible if there is none. */
SPARGE_DEVICE int64_t next_kept(const query_block &q, int64_t from)
{
    return sparge_mask_row_next(q.mask, from, q.visible);
}

/* Word n of the row of the mask. */
SPARGE_DEVICE uint32_t kept_word(const query_block &q, int64_t n)
{
    return sparge_mask_row_word(q.mask, n, q.visible);
}

/* Groups of skip_rows rows in a query block. */
SPARGE_HD int skip_groups(const work &w) { return (BLOCK_Q + w.skip_rows - 1) / w.skip_rows; }

/* The row of `skipped` that belongs to the group of row r of a query block. */
SPARGE_DEVICE uint32_t *skipped_row(const work &w, const query_block &q, int r)
{
    const int64_t words = sparge_mask_row_words(w.g.k_blocks);
    return w.skipped + (q.line * skip_groups(w) + r / w.skip_rows) * words;
}

/* Records that the group of row r skips block j. One thread of the group calls. */
SPARGE_DEVICE void mark_skipped(const work &w, const query_block &q, int r, int64_t j)
{
    atomicOr(&skipped_row(w, q, r)[j >> 5], 1u << (j & 31));
}

/* ---- Which pairs are attended ---- */

/* How many keys of block j a query sees: the first ones. A token past the end sees none. */
SPARGE_DEVICE int visible_keys(const work &w, int64_t token, int64_t j)
{
    return token < w.g.q_len ? (int)sparge_keys_visible(&w.g, token, j) : 0;
}

/* Are there pairs that the mask or a bias hides? Kernels are compiled for both answers. */
SPARGE_HD bool hides_pairs(const work &w) { return w.given.partial_first || w.k_bias; }

SPARGE_DEVICE uint64_t two_words(const uint32_t *at) { return at[0] | (uint64_t)at[1] << 32; }

/* The keys of block j that row r, below BLOCK_Q, attends to: bit t is key t of the block. */
SPARGE_DEVICE uint64_t attended_keys(const work &w, const query_block &q, int r, int64_t j)
{
    const int visible = visible_keys(w, q.first + r, j);
    uint64_t keys = visible == BLOCK_K ? ~(uint64_t)0 : ((uint64_t)1 << visible) - 1;
    const uint32_t *const partial = sparge_mask_partial_at(&w.given, q.line, j, BLOCK_Q, BLOCK_K);
    if (partial)
        keys &= two_words(partial + r * (BLOCK_K / 32));
    if (w.k_shown)
        keys &= two_words(w.k_shown + (q.kv * w.g.k_blocks + j) * (BLOCK_K / 32));
    return keys;
}

/* What an integer score of the pair of blocks is multiplied by: to log2 units. */
SPARGE_DEVICE float dequant_scale(const work &w, const query_block &q, int64_t j)
{
    return sparge_score_scale(w.q_scale[q.line], w.k_scale[q.kv * w.g.k_blocks + j],
                              w.softmax_scale);
}

/* ---- Rows of the caller's tensors ---- */

SPARGE_DEVICE float load(const sparge_in &in, int64_t at)
{
    return sparge_element_load(in.data, in.dtype, at);
}

SPARGE_DEVICE void store(const sparge_out &out, int64_t at, float x)
{
    sparge_element_store(out.data, out.dtype, at, x);
}

/* Channels c and c + 1 of a row that begins `at`, those below dim. One access if both exist and
 * memory is aligned. */
SPARGE_DEVICE void store_pair(const sparge_out &out, int64_t at, int c, int dim, float x, float y)
{
    at += c;
    if (out.dtype != SPARGE_F32 && c + 1 < dim &&
        ((uintptr_t)((uint16_t *)out.data + at) & 3) == 0) {
        const uint32_t low = sparge_narrow(x + 0.0f, out.dtype);
        const uint32_t high = sparge_narrow(y + 0.0f, out.dtype);
        *(uint32_t *)((uint16_t *)out.data + at) = low | high << 16;
        return;
    }
    if (c < dim)
        store(out, at, x);
    if (c + 1 < dim)
        store(out, at + 1, y);
}

/* The rows of a token in k and v that the heads of q read. */
SPARGE_DEVICE int64_t key_row(const work &w, const query_block &q, int64_t token)
{
    return sparge_in_row(&w.k, q.b, q.kv % w.kv_heads, token);
}

SPARGE_DEVICE int64_t value_row(const work &w, const query_block &q, int64_t token)
{
    return sparge_in_row(&w.v, q.b, q.kv % w.kv_heads, token);
}

SPARGE_DEVICE int64_t out_row(const work &w, const query_block &q, int r)
{
    return sparge_out_row(&w.o, q.b, q.h, q.first + r);
}

/* m and l of a row, from which finish.cu computes lse. */
SPARGE_DEVICE void store_state(const work &w, const query_block &q, int r, const sparge_row &state)
{
    w.m[q.n * w.g.q_len + q.first + r] = state.max;
    w.l[q.n * w.g.q_len + q.first + r] = state.sum;
}

/* ---- The functions that queue a launch ---- */

/* The mean key, pooled rows, codes: at most 3 launches. */
cudaError_t prepare(const work &w, cudaStream_t stream);
/* The mask by blocks, or by cells: 1 launch, or 2. */
cudaError_t predict(const work &w, cudaStream_t stream);
cudaError_t predict_cells(const work &w, cudaStream_t stream);
/* Does a row of blocks fit into shared memory? */
bool predict_fits(int64_t k_blocks, int shared_limit);
bool cells_fit(int64_t k_blocks, int shared_limit);
/* The order of kernel 5: 1 launch. */
cudaError_t plan(const work &w, cudaStream_t stream);
/* lse, counters, NaN, rows without keys: 2 launches. */
cudaError_t finish(const work &w, cudaStream_t stream);
/* Codes out of their tiles, if asked for: 1 launch. */
cudaError_t intermediates(const work &w, cudaStream_t stream);

/* The numbered kernels (README.md): o, m and l. */
cudaError_t attend_naive(const work &w, cudaStream_t stream);
cudaError_t attend_shared(const work &w, cudaStream_t stream);
cudaError_t attend_dp4a(const work &w, cudaStream_t stream);
cudaError_t attend_mma(const work &w, cudaStream_t stream);
cudaError_t attend_hopper(const work &w, cudaStream_t stream);

/* A launch in the order of the stream, with `shared` bytes of dynamic shared memory. */
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

/* An attribute of the current device. */
cudaError_t device_attribute(cudaDeviceAttr name, int *value);

/* Calls `queue` with the width as a constant. */
template <class Queue> cudaError_t at_width(const work &w, const Queue &queue)
{
    switch (w.width) {
    case 64: return queue(std::integral_constant<int, 64>());
    case 96: return queue(std::integral_constant<int, 96>());
    default: return queue(std::integral_constant<int, 128>());
    }
}

/* The same, and whether pairs are hidden. */
template <class Queue> cudaError_t at_width_and_hides(const work &w, const Queue &queue)
{
    return at_width(w, [&](auto width) {
        return hides_pairs(w) ? queue(width, std::true_type()) : queue(width, std::false_type());
    });
}

SPARGE_HD int64_t q_blocks_of_all_heads(const work &w) { return w.batch * w.heads * w.g.q_blocks; }
SPARGE_HD int64_t k_blocks_of_all_heads(const work &w)
{
    return w.batch * w.kv_heads * w.g.k_blocks;
}

} // namespace sparge

#endif
