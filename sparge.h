/* SPDX-License-Identifier: Apache-2.0 */
/* sparge.h: SpargeAttn, training-free block-sparse int8 attention (arXiv 2502.18137).
 *
 *     sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
 *     sparge_result result = {.o = {o, SPARGE_F32, heads * n * d, n * d, d}};
 *     sparge_error error;
 *     if (sparge_attention(&problem, &options, &result, &error) != SPARGE_OK)
 *         fprintf(stderr, "%s\n", error.text);
 *
 * Any call may run in any thread beside any other. The library keeps neither state nor pointers
 * between calls. It reads one environment variable: SPARGE_ISA, if options.isa is AUTO. A call runs
 * under the default floating-point environment and puts the caller's back.
 *
 * sparge_methods.h has the other methods of the field, sparge_mask.h masks of single pairs.
 * sparge_inspect.h has names, ranges, intermediates, the oracle and the speed of this machine.
 * sparge_cuda.h has device memory, sparge_tune.h the tuner, sparge_order.h token orders. */
#ifndef SPARGE_H
#define SPARGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sparge_options.h"

SPARGE_BEGIN_DECLS

/* The outputs are undefined after MEMORY, DEVICE and CANCELLED. Nothing leaks. */
typedef enum sparge_status {
    SPARGE_OK = 0,
    SPARGE_ERR_ARGUMENT,    /* a NULL pointer, or a value out of its range */
    SPARGE_ERR_SHAPE,       /* sizes that do not fit together */
    SPARGE_ERR_MEMORY,      /* a failed allocation */
    SPARGE_ERR_UNSUPPORTED, /* a backend or a choice that this library or machine lacks */
    SPARGE_ERR_DEVICE,      /* an error of CUDA */
    SPARGE_ERR_CANCELLED,   /* progress returned false */
} sparge_status;

/* Every function takes NULL for its error. */
typedef struct sparge_error {
    char text[256]; /* one sentence with the argument and its value; "" after success */
} sparge_error;

/* Strided arrays [batch][head][token][channel]. Strides count elements. Channels are contiguous.
 * On the cuda backend all arrays are in device memory: these and those of k_bias, masks, lse,
 * head_counts and intermediates. */
typedef struct sparge_in {
    const void *data;
    sparge_dtype dtype;
    int64_t batch, head, token; /* strides */
} sparge_in;

typedef struct sparge_out {
    void *data;
    sparge_dtype dtype;
    int64_t batch, head, token; /* strides */
} sparge_out;

/* Query head h reads key head h / (heads / kv_heads). */
typedef struct sparge_problem {
    int64_t batch;    /* at least 0 */
    int64_t heads;    /* query heads, a multiple of kv_heads */
    int64_t kv_heads; /* key heads, at least 1 */
    int64_t q_len;    /* queries, at least 0 */
    int64_t k_len;    /* keys, at least 0 */
    int64_t dim;      /* channels of q and k, 1 to 256 */
    int64_t dim_v;    /* channels of v and o, at least 1 */
    sparge_in q;      /* [batch][heads][q_len][dim] */
    sparge_in k;      /* [batch][kv_heads][k_len][dim] */
    sparge_in v;      /* [batch][kv_heads][k_len][dim_v]; sparge_predict ignores it */
    /* [batch][kv_heads][k_len] is added to the scores of a key, in natural log units; or NULL. -inf
     * hides the key, NaN and +inf make every row NaN that sees it. sparge_predict ignores it. */
    const float *k_bias;
} sparge_problem;

/* bits[batch][head][q_block][words]: bit j % 32 of word j / 32 is set if key block j is computed.
 *
 * A computed block may be attended in part. Those of row n = (batch * heads + head) * q_blocks + i
 * stand from partial_first[n] to partial_first[n + 1] - 1 in the other arrays, by ascending key
 * block. Bit t % 32 of word t / 32 of its query r is set if query r of the block attends to key t
 * of the block. Blocks that stand in no row are attended whole. sparge_mask.h makes and reads all
 * of it. */
typedef struct sparge_mask {
    uint32_t *bits;
    int64_t batch, heads, q_blocks, k_blocks;
    int64_t words;          /* of a row, at least ceil(k_blocks / 32) */
    int64_t *partial_first; /* [batch * heads * q_blocks + 1]; NULL: all blocks are whole */
    int32_t *partial_block; /* [partials] */
    uint32_t *partial_bits; /* [partials][block_q][ceil(block_k / 32)] */
} sparge_mask;

/* Allocates a mask in host memory, with no bit set. */
sparge_status sparge_mask_alloc(sparge_mask *mask, const sparge_problem *problem,
                                const sparge_options *options, sparge_error *error);
/* Frees all arrays, which malloc made. NULL and an empty mask are allowed. */
void sparge_mask_free(sparge_mask *mask);
bool sparge_mask_get(const sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j);
void sparge_mask_set(sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j,
                     bool keep);

/* Exact counts. A pair is a query block and a key block that some row of it sees. */
typedef struct sparge_counts {
    int64_t pairs;       /* visible pairs */
    int64_t qk_done;     /* pairs with Q.K^T computed, whole or in part */
    double pv_done;      /* pairs with P.V computed; a pair counts as its share of the rows */
    int64_t tokens;      /* visible (query, key) pairs of tokens */
    int64_t tile_tokens; /* tokens of the pairs with Q.K^T computed, attended or not */
    int64_t qk_tokens;   /* tokens attended, 2 * dim operations each */
    int64_t pv_tokens;   /* tokens attended with P.V computed, 2 * dim_v operations each */
} sparge_counts;

double sparge_density_tokens(const sparge_counts *counts); /* qk_tokens / tokens */
double sparge_density_blocks(const sparge_counts *counts); /* qk_done / pairs */
double sparge_sparsity_qk(const sparge_counts *counts);    /* 1 - qk_done / pairs */
double sparge_sparsity_pv(const sparge_counts *counts);    /* 1 - pv_done / pairs */
double sparge_sparsity(const sparge_counts *counts);       /* their mean: the paper's (Sec 4.1) */

typedef struct sparge_intermediates sparge_intermediates; /* sparge_inspect.h */

typedef struct sparge_result {
    /* Set by the caller: */
    sparge_out o;                              /* [batch][heads][q_len][dim_v] */
    float *lse;                                /* [batch][heads][q_len], natural log; or NULL */
    sparge_mask *mask;                         /* allocated, for the predicted mask; or NULL */
    const sparge_intermediates *intermediates; /* or NULL */
    sparge_counts *head_counts;                /* [batch][heads]; or NULL */
    /* Set by the call. On a cuda stream counts and seconds are 0. */
    sparge_counts counts;    /* sum over all heads */
    sparge_backend backend;  /* what ran */
    sparge_isa isa;          /* what ran; of ref in BF16 whose order of the sum */
    sparge_isa qk_isa;       /* what Q.K^T ran on: isa, or what it builds on where isa has */
    sparge_isa pv_isa;       /* no product in that dtype; and P.V */
    int threads;             /* how many ran */
    int kernel;              /* what ran on cuda, or 0 */
    sparge_dtype pv_dtype;   /* what FASTEST stood for */
    int64_t workspace_bytes; /* memory that cpu or cuda worked in; 0 on ref */
    double seconds_predict;
    double seconds_quantize; /* with all else that reads q, k and v once on cpu and cuda */
    double seconds_attend;
} sparge_result;

/* Predicts a mask and attends over it.
 *
 * A row that sees no key gets o = 0 and lse = -inf. A q row with NaN or infinity makes its own o
 * and lse NaN. A k row with them does so to every row that sees it. If a score leaves the range of
 * f32, -inf weighs 0, and a row with +inf, or with -inf alone, is NaN. A row's sum of values comes
 * before its division, so values near the largest float may give infinity.
 *
 * progress is called from the calling thread with a share that never falls. It is not called on
 * cuda. If it returns false the call fails with SPARGE_ERR_CANCELLED.
 *
 * A child process has none of its parent's OpenMP threads. Set options.threads to 1 there.
 *
 * On AMX a thread's tile registers are lost and released. The process gets Linux's permission to
 * use them when it first asks for amx or for the best instruction set. From then on sigaltstack()
 * refuses signal stacks that they would not fit. */
sparge_status sparge_attention(const sparge_problem *problem, const sparge_options *options,
                               sparge_result *result, sparge_error *error);

/* Writes every word of an allocated mask (Sec 3.3, Algorithm 1 lines 4-6). progress gets 0 alone.
 */
sparge_status sparge_predict(const sparge_problem *problem, const sparge_options *options,
                             sparge_mask *mask, const sparge_intermediates *intermediates,
                             sparge_error *error);

/* Attends over the pairs of a mask (Algorithm 1 lines 3, 7-22). NULL is the dense mask. Bits of
 * invisible pairs are ignored. */
sparge_status sparge_attend(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_result *result, sparge_error *error);

/* What sparge_attend gave for one set of keys. */
typedef struct sparge_partial {
    sparge_in o;      /* [batch][heads][q_len][dim_v], in host memory as lse */
    const float *lse; /* [batch][heads][q_len] */
    float log_count;  /* natural log of how many keys each key stands for; 0: itself */
} sparge_partial;

/* Attention over disjoint sets of keys together: the mean of their o, weighted by
 * exp(lse + log_count). A set without keys for a row, of which lse is -inf, adds nothing. Of the
 * problem it reads batch, heads, q_len and dim_v. lse may be NULL. o and lse may be those of a
 * part. */
sparge_status sparge_merge(const sparge_problem *problem, const sparge_partial *part, int parts,
                           const sparge_out *o, float *lse, sparge_error *error);

SPARGE_END_DECLS

#endif
