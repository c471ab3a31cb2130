/* SPDX-License-Identifier: Apache-2.0 */
/* sparge.h: SpargeAttn, training-free block-sparse int8 attention (arXiv 2502.18137).
 *
 * One call for those who want one:
 *
 *     sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
 *     sparge_result result = { .o = { o, SPARGE_F32, heads * n * d, n * d, d } };
 *     sparge_error error;
 *     if (sparge_attention(&problem, &options, &result, &error) != SPARGE_OK)
 *         fprintf(stderr, "%s\n", error.text);
 *
 * and its two stages for those who want to look between them: sparge_predict() says which
 * (query block, key block) pairs matter, sparge_attend() computes attention over those pairs.
 *
 * There is no global state: every call may run in any thread, on any backend, beside any other.
 * Rounding modes, flushing of subnormal numbers and floating-point traps that the caller has set
 * are put aside for the time of a call, in each of its threads, and are there again afterwards.
 * Nothing here keeps a pointer after it returns. Sizes and strides are int64_t throughout.
 */
#ifndef SPARGE_H
#define SPARGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#ifdef __GNUC__
#pragma GCC visibility push(default) /* the library hides every other name */
#endif

#define SPARGE_VERSION     "0.1.0"
#define SPARGE_MAX_DIM     256
#define SPARGE_MAX_THREADS 1024

/* ---- What can go wrong ---------------------------------------------------------------- */

typedef enum sparge_status {
    SPARGE_OK = 0,
    SPARGE_ERR_ARGUMENT,    /* a null pointer, or a value out of its range */
    SPARGE_ERR_SHAPE,       /* sizes that do not fit together */
    SPARGE_ERR_MEMORY,      /* an allocation failed; outputs are undefined, nothing leaks */
    SPARGE_ERR_UNSUPPORTED, /* the backend is not built, or cannot run here, or cannot do this */
    SPARGE_ERR_DEVICE,      /* CUDA reported an error */
    SPARGE_ERR_CANCELLED,   /* progress returned false; outputs are undefined, nothing leaks */
} sparge_status;

/* One sentence that names the offending argument and its value; "" after success.
 * Every function below takes NULL for it. */
typedef struct sparge_error {
    char text[256];
} sparge_error;

const char *sparge_status_string(sparge_status status);

/* ---- What runs ------------------------------------------------------------------------ */

/* AUTO is the fastest on the host that can do what is asked; REF is the definition of the right
 * answer. */
typedef enum sparge_backend { SPARGE_AUTO, SPARGE_REF, SPARGE_CPU, SPARGE_CUDA } sparge_backend;

/* The instruction set of the cpu backend. Results agree as far as they must on all of them. */
typedef enum sparge_isa {
    SPARGE_ISA_AUTO,
    SPARGE_ISA_SCALAR,
    SPARGE_ISA_AVX2,
    SPARGE_ISA_AVXVNNI,
    SPARGE_ISA_AVX512VNNI,
} sparge_isa;

const char *sparge_backend_string(sparge_backend backend);
const char *sparge_isa_string(sparge_isa isa);
bool sparge_backend_built(sparge_backend backend);     /* is it in this library? */
bool sparge_backend_available(sparge_backend backend); /* and can it run on this machine? */
bool sparge_isa_available(sparge_isa isa);             /* does this processor have it? */

/* ---- What goes in and out ------------------------------------------------------------- */

/* F32, F16 and BF16 are the types of arrays. Products are computed in INT8, INT12, F32 and, P.V
 * alone, F16 and FP8; FASTEST stands for what the backend does fastest on this machine.
 *
 * INT8 is the paper's. INT12 has 8 to 14 times less error in the same integer arithmetic. F32
 * quantizes nothing, which separates the error of quantization from the error of sparsity. F16 and
 * FP8 are for P.V on tensor cores, defined by the ref backend: P and V are rounded to binary16 (a v
 * beyond 65504 is then not finite), or to e4m3 (P as 256 p, V by one scale for each channel of a
 * head). The cpu backend has neither. FASTEST, of P.V alone, is INT8 on ref and cpu, and FP8 or F16
 * on cuda. */
typedef enum sparge_dtype {
    SPARGE_F32,
    SPARGE_F16,
    SPARGE_BF16,
    SPARGE_FP8,
    SPARGE_INT8,
    SPARGE_INT12,
    SPARGE_FASTEST,
} sparge_dtype;

const char *sparge_dtype_string(sparge_dtype dtype);

/* Strided views [batch][head][token][channel]. Strides count elements, not bytes; channels are
 * contiguous. On the cuda backend these pointers, and those of masks, intermediates, lse and
 * head_counts, are device pointers. */
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

/* Query head h reads key head h / (heads / kv_heads). Lengths and batch may be 0. */
typedef struct sparge_problem {
    int64_t batch, heads, kv_heads; /* heads is a multiple of kv_heads */
    int64_t q_len, k_len;           /* tokens */
    int64_t dim, dim_v;             /* channels of q and k, at most 256; channels of v and o */
    sparge_in q;                    /* [batch][heads][q_len][dim] */
    sparge_in k;                    /* [batch][kv_heads][k_len][dim] */
    sparge_in v;                    /* [batch][kv_heads][k_len][dim_v]; sparge_predict ignores it */
} sparge_problem;

/* ---- How ------------------------------------------------------------------------------ */

/* END: query t sees keys up to t + k_len - q_len (FlashAttention >= 2.1).
 * START: query t sees keys up to t (torch's is_causal). */
typedef enum sparge_causal {
    SPARGE_CAUSAL_NONE,
    SPARGE_CAUSAL_END,
    SPARGE_CAUSAL_START
} sparge_causal;

/* Whose decisions where the paper, its released kernels and this project differ: the table in
 * ref/README.md. PAPER and UPSTREAM run on the reference backend alone. */
typedef enum sparge_rules {
    SPARGE_RULES_DEFAULT,
    SPARGE_RULES_PAPER,
    SPARGE_RULES_UPSTREAM,
} sparge_rules;

#define SPARGE_OFF (-1.0f) /* for tau and topk */

/* What the paper tunes for each head (Sec 3.6). With tau and topk both on, a row keeps the union.
 */
typedef struct sparge_thresholds {
    float theta;  /* a block is self-similar when its mean cosine exceeds theta; in [-1, 1] */
    float tau;    /* keep the most probable key blocks up to this mass; in [0, 1], or SPARGE_OFF */
    float topk;   /* keep this share of the visible key blocks; in [0, 1], or SPARGE_OFF */
    float lambda; /* skip P.V where max(local max - running max) <= lambda; natural-log units,
                     in [-inf, 0]; -inf never skips */
} sparge_thresholds;

typedef struct sparge_options {
    sparge_backend backend;
    sparge_isa isa; /* of the cpu backend; AUTO: what SPARGE_ISA in the environment names, or
                       the best */
    /* Of the cpu backend, at most 1024; 0: as many as OpenMP would take. A child that a process
     * forks after a call with several has none of them, and GNU's OpenMP would wait for them for
     * ever: 1 works there. What the system does not let start is SPARGE_ERR_MEMORY, as far as it
     * shows when a thread first asks for so many. */
    int threads;
    int64_t block_q, block_k; /* rows of a query block, keys of a key block; 1 to 1024 */
    int64_t skip_rows;        /* lambda is decided for this many rows at a time; 0: by the rules */
    sparge_causal causal;
    sparge_dtype qk_dtype; /* what Q.K^T is computed in: INT8, INT12 or F32 */
    sparge_dtype pv_dtype; /* what P.V is computed in: INT8, INT12, F32, F16, FP8 or FASTEST */
    float softmax_scale;   /* of the scores, finite and > 0; 0 stands for 1/sqrt(dim) */
    bool smooth_k;         /* subtract the mean key: softmax does not change, int8 error does */
    bool sink;             /* always keep key block 0 */
    sparge_rules rules;
    sparge_thresholds thresholds;      /* for every head, unless: */
    const sparge_thresholds *per_head; /* [heads], or NULL */
    /* Called now and then with 0..1, which never falls, by attention, prediction and the oracle,
     * but not on cuda, from the calling thread; prediction alone stays at 0. false gives up, and is
     * the last call. Or NULL. */
    bool (*progress)(void *user, double done);
    void *user;
    /* Of the cuda backend: */
    int kernel;      /* of the ladder in gpu/README.md, 1 to 5; 0: the best that can do this here */
    void *stream;    /* a cudaStream_t: calls queue their work there and return; NULL: they wait */
    void *workspace; /* device memory to work in, or NULL: allocated and freed in the order of the
                        stream */
    int64_t workspace_bytes; /* of it: at least what sparge_workspace_bytes says */
} sparge_options;

/* The defaults of one rule set. For DEFAULT: 128 x 64 blocks, int8 and int8, smoothed keys,
 * theta 0.6, tau 0.98, no topk, lambda -inf, not causal, no sink. */
sparge_options sparge_options_default(sparge_rules rules);

/* Puts in the place of AUTO, 0 and FASTEST what they stand for, as every call does for itself:
 * backend, isa, threads, kernel, skip_rows, softmax_scale and pv_dtype. v is not looked at. After
 * failure the options are as they were. */
sparge_status sparge_options_resolve(const sparge_problem *problem, sparge_options *options,
                                     sparge_error *error);

/* ---- The block mask ------------------------------------------------------------------- */

/* bits[batch][head][q_block][words], bit j % 32 of word j / 32 is key block j; set = compute. A row
 * may be longer than its blocks need. */
typedef struct sparge_mask {
    uint32_t *bits;
    int64_t batch, heads, q_blocks, k_blocks, words;
} sparge_mask;

/* Allocates an empty mask of the problem's shape under the options' block sizes, in host memory. */
sparge_status sparge_mask_alloc(sparge_mask *mask, const sparge_problem *problem,
                                const sparge_options *options, sparge_error *error);
void sparge_mask_free(sparge_mask *mask); /* NULL and an empty mask are fine */
bool sparge_mask_get(const sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j);
void sparge_mask_set(sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j,
                     bool keep);

/* ---- What comes back beside the output ------------------------------------------------- */

/* Exact counts. A pair is a (query block, key block) where some row may see some key; it costs two
 * matrix products. Tokens are (query, key) pairs: the operations are 2 * dim of them for a score
 * and 2 * dim_v for its weight. */
typedef struct sparge_counts {
    int64_t pairs;     /* visible pairs */
    int64_t qk_done;   /* of those, Q.K^T computed */
    double pv_done;    /* of those, P.V computed; a skipped group counts as its share of the rows */
    int64_t tokens;    /* visible token pairs */
    int64_t qk_tokens; /* of those, in computed Q.K^T */
    int64_t pv_tokens; /* of those, in computed P.V */
} sparge_counts;

double sparge_sparsity_qk(const sparge_counts *counts); /* Q.K^T not done / pairs */
double sparge_sparsity_pv(const sparge_counts *counts); /* P.V not done / pairs */
double sparge_sparsity(const sparge_counts *counts); /* the mean of both: the paper's (Sec 4.1) */

/* Why the prediction keeps a block; one may have several reasons. */
typedef enum sparge_reason {
    SPARGE_KEPT_MASS = 1,         /* among the most probable ones, up to tau */
    SPARGE_KEPT_TOPK = 2,         /* among the best ones, up to topk */
    SPARGE_KEPT_DISSIMILAR_Q = 4, /* its queries are not self-similar under theta, or not finite */
    SPARGE_KEPT_DISSIMILAR_K = 8, /* its keys are not, or not finite */
    SPARGE_KEPT_OVERFLOW = 16,    /* both are, but their score is not finite */
    SPARGE_KEPT_DIAGONAL = 32,    /* it holds the last key that a row sees, under causality */
    SPARGE_KEPT_SINK = 64,
} sparge_reason;

/* Every stage, for looking between them and for finding where two backends part. The arrays are
 * packed and belong to the caller; NULL is not wanted. Codes and steps of what is not in integers
 * (FLOAT; of v also HALF and FP8), and the mean key without smooth_k, are left as they were. */
typedef struct sparge_intermediates {
    float *k_mean;          /* [batch][kv_heads][dim] */
    float *q_pool, *k_pool; /* [batch][heads | kv_heads][q | k_blocks][dim] */
    float *q_sim, *k_sim;   /* [batch][heads | kv_heads][q | k_blocks] */
    /* [batch][heads][q_blocks][k_blocks] each, S in natural units: */
    float *s_all;                   /* of every visible pair, whatever theta is; -inf elsewhere */
    float *s;                       /* S: the same, but -inf where the keys are not self-similar */
    uint8_t *why;                   /* bits of sparge_reason; 0: skipped */
    int16_t *q_int, *k_int, *v_int; /* [batch][heads | kv_heads][tokens][channels] */
    float *q_scale, *k_scale;       /* [batch][heads | kv_heads][q | k_blocks] */
    float *v_scale;                 /* [batch][kv_heads][k_blocks][dim_v] */
    float *pv_done;                 /* [batch][heads][q_blocks][k_blocks], share of the rows */
    float *m, *l;                   /* [batch][heads][q_len], m in log2 units */
} sparge_intermediates;

typedef struct sparge_result {
    sparge_out o;      /* [batch][heads][q_len][dim_v] */
    float *lse;        /* [batch][heads][q_len], natural log, or NULL */
    sparge_mask *mask; /* sparge_attention leaves its mask here; an allocated one, or NULL */
    const sparge_intermediates *intermediates; /* or NULL */
    sparge_counts *head_counts;                /* [batch][heads], or NULL */
    /* Filled in: */
    sparge_counts counts;   /* the sum over all heads; 0 after a call that only queued its work */
    sparge_backend backend; /* what ran */
    sparge_isa isa;
    int threads;
    int kernel;
    sparge_dtype pv_dtype;
    int64_t
        workspace; /* bytes that cpu or cuda worked in, beside inputs and output; 0: not counted */
    /* What cpu and cuda do to q, k and v in one pass counts as quantize. On cuda these are the
     * device's own times, 0 after a call that only queued its work. */
    double seconds_predict, seconds_quantize, seconds_attend;
} sparge_result;

/* ---- Attention ------------------------------------------------------------------------ */

/* Predicts a mask and attends over it. o row = 0 and lse = -inf for a row that may see no key. A
 * non-finite q row or visible k row gives NaN in the rows it touches and nowhere else. The largest
 * key of a row weighs exactly 1 however large its score is; where scores themselves leave the range
 * of f32, one of -inf weighs 0, and a row that meets +inf, or nothing but -inf, is NaN in o and
 * lse. The sum of the values comes before the division, so values near the largest float may give
 * infinity. */
sparge_status sparge_attention(const sparge_problem *problem, const sparge_options *options,
                               sparge_result *result, sparge_error *error);

/* Stage 1 (Sec 3.3, Algorithm 1 lines 4-6): writes every word of an allocated mask. */
sparge_status sparge_predict(const sparge_problem *problem, const sparge_options *options,
                             sparge_mask *mask, const sparge_intermediates *intermediates,
                             sparge_error *error);

/* Stage 2 (Algorithm 1 lines 3, 7-22): attention over the kept pairs. A mask of NULL is dense
 * attention by the same kernel. Bits of pairs that no row may see are ignored. */
sparge_status sparge_attend(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_result *result, sparge_error *error);

/* ---- Devices --------------------------------------------------------------------------- */

/* The bytes of workspace that calls of this problem under these options need on the cuda backend.
 * The pointers in the problem are not looked at; `lse` as in the result. */
sparge_status sparge_workspace_bytes(const sparge_problem *problem, const sparge_options *options,
                                     bool lse, int64_t *bytes, sparge_error *error);

/* Device memory for programs that have no CUDA of their own. A copy goes from host or device memory
 * to either, and is done when the call returns. */
sparge_status sparge_device_alloc(int64_t bytes, void **data, sparge_error *error);
void sparge_device_free(void *data); /* NULL is fine */
sparge_status sparge_device_copy(void *to, const void *from, int64_t bytes, sparge_error *error);

/* ---- Ceilings ---------------------------------------------------------------------------- */

/* What this machine can do at most, on all threads together: medians of a few trials. */
typedef struct sparge_peaks {
    double f32;  /* multiply-adds of floats in registers, operations per second (two each) */
    double int8; /* the dot product of bytes of the instruction set, the same way */
} sparge_peaks;

/* Takes a fifth of a second. isa and threads as in sparge_options. */
sparge_status sparge_measure_peaks(sparge_isa isa, int threads, sparge_peaks *peaks,
                                   sparge_error *error);

/* Bytes per second that the threads read from main memory together, over 256 MiB. */
sparge_status sparge_measure_bandwidth(sparge_isa isa, int threads, double *bytes,
                                       sparge_error *error);

/* ---- Tuning (Sec 3.6) -------------------------------------------------------------------- */

/* Per head, over a grid of 32 thetas, 1031 taus (or topks) and 502 lambdas: the (theta, tau) of
 * most sparsity whose relative L1 stays below l1 on every input, then the lambda of most sparsity
 * below l2. The relative L1 is sum|o - o'| / sum|o'| against dense attention in f32 on the same
 * backend. */
typedef struct sparge_tune_options {
    double l1, l2;    /* 0 < l1 < l2 */
    bool mean;        /* they bound the mean over the inputs, and not each */
    double sparsity;  /* instead, where not 0: the (theta, tau) of least error among those that are
                         at least so  sparse, in (0, 1), or else the sparsest; and no lambda. l1 and
                         l2 play no part */
    bool topk;        /* choose topk and leave tau off */
    int64_t held_out; /* the last so many inputs are judged on and never tuned on; 0: each is left
                         out in turn */
    double seconds;   /* give up what is unfinished after so long; 0: never */
    /* Called now and then with 0..1, by one thread at a time; false gives up what is unfinished. Or
     * NULL. */
    bool (*progress)(void *user, double done);
    /* Called when a head is done, by one thread at a time; or NULL. */
    void (*finished)(void *user, int64_t head);
    void *user;
} sparge_tune_options;

/* Of whole calls of sparge_attention over some inputs. */
typedef struct sparge_tune_errors {
    int64_t inputs;
    double mean, worst; /* relative L1; NaN over no inputs, infinite where o is not finite */
    double sparsity;    /* mean */
    int64_t nan, inf;   /* elements of o that are */
} sparge_tune_errors;

/* What was done about an error above l2, on inputs that were tuned on or held out: lambda was
 * lowered, down to -inf; then tau (or topk) was raised as well; then the head was left dense. */
typedef enum sparge_back_off {
    SPARGE_AS_CHOSEN,
    SPARGE_LAMBDA_LOWERED,
    SPARGE_TAU_RAISED,
    SPARGE_LEFT_DENSE
} sparge_back_off;

typedef struct sparge_tuned {
    bool done;   /* where it is set on entry the head is left alone */
    bool finite; /* no: q, k, v or dense attention is not finite in some input, and nothing was
                    tried */
    int64_t nonfinite; /* elements of them that are not */
    bool dense; /* theta -1, tau 1, lambda -inf: nothing sparser held, or nothing was tried */
    sparge_thresholds thresholds;
    sparge_back_off back_off;
    sparge_tune_errors in_sample; /* of these thresholds on the inputs that they were tuned on */
    /* On inputs not tuned on. Where each is left out in turn: what is chosen without it, on it; but
     * of a head that is dense, dense. */
    sparge_tune_errors held_out, held_out_first; /* first: before backing off */
    double
        dense_passes; /* products of blocks that all this took, in dense passes over the inputs */
    double seconds;
} sparge_tuned;

/* Tunes heads [heads] on inputs of one kind: the same heads, key heads and channels; lengths and
 * batches may differ, and an element of a batch is an input. q, k and v are in host memory on every
 * backend. Of the options, thresholds, per_head, progress, stream and workspace play no part. The
 * callbacks may not call this function. Heads run in parallel on options.threads threads. The same
 * heads come out for any number of threads. */
sparge_status sparge_tune(const sparge_problem *inputs, int64_t count,
                          const sparge_options *options, const sparge_tune_options *how,
                          sparge_tuned *heads, sparge_error *error);

/* ---- The oracle ------------------------------------------------------------------------ */

/* Attention by the textbook formula in double precision; shares no code with any backend.
 * REAL takes q, k and v as they are: the distance to it is quality. CODES takes them as the
 * options' precisions define them (dequantized codes; v too unless pv is FLOAT; FASTEST is taken
 * for INT8): the distance to it is correctness. */
typedef enum sparge_oracle_mode { SPARGE_ORACLE_REAL, SPARGE_ORACLE_CODES } sparge_oracle_mode;

/* Packed arrays, each NULL when not wanted. A mask of NULL is dense. Host memory only.
 *   o          [batch][heads][q_len][dim_v]
 *   lse        [batch][heads][q_len], natural log
 *   block_mass [batch][heads][q_blocks][k_blocks]: the attention that the rows of a query block pay
 *              to a key block, averaged over the rows; rows that see no key count as 0.
 * lambda and the thresholds play no part. Time grows as q_len * k_len, memory as k_len. */
sparge_status sparge_oracle(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_oracle_mode mode, double *o,
                            double *lse, double *block_mass, sparge_error *error);

/* ---- Token orders for images and video (Sec 3.7) ---------------------------------------- */

typedef enum sparge_order {
    SPARGE_ROW_MAJOR,    /* W fastest, then H, then T: the order of a packed [t][h][w] array */
    SPARGE_COLUMN_MAJOR, /* H fastest, then W, then T */
    SPARGE_TIME_MAJOR,   /* T fastest, then W, then H */
    SPARGE_RANDOM,
    SPARGE_HILBERT, /* generalised to boxes of any size */
} sparge_order;

/* text_before, then t * h * w tokens in row-major order, then text_after: how a sequence arrives.
 */
typedef struct sparge_grid {
    int64_t t, h, w;
    int64_t text_before, text_after; /* tokens that keep their place */
} sparge_grid;

const char *sparge_order_string(sparge_order order);

/* index[p] is the arriving number of the token that the order puts at place p; a permutation of
 * 0 .. text_before + t*h*w + text_after - 1. The seed matters to SPARGE_RANDOM alone. */
sparge_status sparge_token_order(sparge_order order, const sparge_grid *grid, uint64_t seed,
                                 int64_t *index, sparge_error *error);

/* to[b][h][p][:] = from[b][h][index[p]][:], and its inverse to[b][h][index[p]][:] =
 * from[b][h][p][:]. Both views have the same dtype and must not overlap. index must be a
 * permutation of 0 .. len-1. */
sparge_status sparge_permute(const sparge_in *from, const sparge_out *to, int64_t batch,
                             int64_t heads, int64_t len, int64_t dim, const int64_t *index,
                             sparge_error *error);
sparge_status sparge_unpermute(const sparge_in *from, const sparge_out *to, int64_t batch,
                               int64_t heads, int64_t len, int64_t dim, const int64_t *index,
                               sparge_error *error);

#ifdef __GNUC__
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
