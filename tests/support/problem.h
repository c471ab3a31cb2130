/* SPDX-License-Identifier: Apache-2.0 */
/* problem.h: questions for the library and its answers: tensors of any dtype and layout with NaN
 * wherever no element lies, structured values, every output and intermediates between guards. */
#ifndef SPARGE_TESTS_PROBLEM_H
#define SPARGE_TESTS_PROBLEM_H

#include "sparge_inspect.h"
#include "tests/support/check.h"

typedef enum tensor_layout {
    PACKED,   /* [batch][head][token][channel] */
    PADDED,   /* the same with room after each row, head and batch */
    NHD,      /* [batch][token][head][channel] */
    ODD,      /* prime distances from an odd place: aligned to an element and to no more */
    BACKWARD, /* negative strides */
    LAYOUTS
} tensor_layout;

typedef struct tensor {
    int64_t batch, heads, tokens, channels;
    float *x;     /* [batch][heads][tokens][channels], packed: what the elements are */
    sparge_in in; /* where they lie */
    char *first;  /* that of element [0][0][0][0] */
    char *memory; /* of `bytes`, all 0xFF (a NaN) at first */
    size_t bytes;
    bool *used; /* [elements of memory]: an element of the tensor lies there */
} tensor;

tensor tensor_make(int64_t batch, int64_t heads, int64_t tokens, int64_t channels,
                   sparge_dtype dtype, tensor_layout layout);
void tensor_free(tensor *t);
int64_t tensor_count(const tensor *t);
float *tensor_row(const tensor *t, int64_t b, int64_t h, int64_t token); /* in x */
void tensor_write(tensor *t); /* rounds x to the dtype and writes it to memory */
void tensor_read(tensor *t);  /* memory to x */
sparge_out tensor_out(const tensor *t);
void tensor_fill(tensor *t, float low, float high); /* x uniform, and writes it */

/* The nearest value of the dtype, ties to even; not by common/half.h. */
float round_to(sparge_dtype dtype, float x);

typedef struct shape {
    int64_t batch, heads, kv_heads, q_len, k_len, dim, dim_v;
    sparge_dtype q, k, v;
    tensor_layout layout_q, layout_k, layout_v;
} shape;

/* Values and mask are made by then; whoever changes q.x, k.x or v.x calls problem_write. */
typedef struct problem {
    sparge_problem p;
    sparge_options o;
    tensor q, k, v;
    sparge_mask mask; /* bits NULL: dense */
    float *k_bias;    /* p.k_bias, or NULL */
} problem;

/* One head's rows drift slowly, as in video models, so blocks are alike within and differ among
 * each other; keys share a mean; |scores| stay below 20. v channel 0 stays away from 0, so that a
 * row's L1 does. Everything is float and dense, blocks are 16 x 16, the backend is ref. */
problem problem_make(const shape *s);
shape shape_of(int64_t batch, int64_t heads, int64_t kv_heads, int64_t q_len, int64_t k_len,
               int64_t dim, int64_t dim_v); /* packed f32 */
void problem_free(problem *x);
void problem_write(problem *x);
int64_t problem_rows(const problem *x); /* batch * heads * q_len */

/* At random: a few elements not finite, a run of zeros; thresholds, types. */
void poke(tensor *t);
void zero_some(tensor *t);
sparge_thresholds thresholds_at_random(void);
/* What products are computed in: the first three on every backend, for Q.K^T and P.V; the others
 * for P.V alone. */
extern const sparge_dtype precisions[5];

sparge_dtype dtype_at_random(void);
tensor_layout layout_at_random(void);
/* Options, thresholds (of at most six heads, in `each`) and special values at random, written. */
void vary(problem *x, sparge_thresholds each[6]);
/* Then, for the backends that have them: min_mass, and blocks of at most `longest` tokens with
 * cells that divide them. */
void masses_at_random(problem *x, sparge_thresholds each[6], int64_t longest);
void mask_at_random(problem *x); /* now and then every other row of blocks is empty */

/* Masks of the shape under x->o; each throws away the one before. */
void mask_fill(problem *x, float share); /* each bit with this probability, also meaningless ones */
/* Of the blocks that the mask keeps, this share is attended in part: by bits at random, also
 * meaningless ones; by all; by none of some queries, or of all. */
void mask_fill_partial(problem *x, float share);
void mask_predict(problem *x);
bool mask_has(const problem *x, int64_t b, int64_t h, int64_t i, int64_t j); /* true when dense */
/* Neither the mask nor a bias hides the pair of tokens; causality may. */
bool pair_open(const problem *x, int64_t b, int64_t h, int64_t query, int64_t key);
/* k_bias at random: some keys, and runs of them, are hidden; a wild one has all that f32 has. */
void bias_fill(problem *x, bool wild);
int64_t blocks(int64_t len, int64_t block);

/* What came back; every array is packed and was poisoned before. */
typedef struct answer {
    tensor o;
    float *lse;
    sparge_counts *head;
    sparge_intermediates intermediates;
    sparge_result result;
} answer;

/* The calls succeed, write every element they owe, and neither the inputs nor a byte between the
 * elements of o. For the cuda backend everything travels to the device and back. */
answer attend_to(const problem *x, sparge_dtype dtype, tensor_layout layout);
answer attend(const problem *x);                       /* packed f32 */
answer attention(const problem *x, sparge_mask *mask); /* both stages; mask may be NULL */
answer attention_to(const problem *x, sparge_mask *mask, sparge_dtype dtype, tensor_layout layout);
answer answer_make(const problem *x, sparge_dtype dtype, tensor_layout layout);
void answer_free(answer *a);

/* Copies of host buffers in device memory, between guards. */
typedef struct twins {
    struct {
        void *host, *device;
        size_t bytes;
    } of[32];
    int count;
} twins;

void *twin(twins *t, void *buffer); /* of check_alloc; NULL stays NULL */
void *twin_of(twins *t, void *host, size_t bytes);
sparge_problem twin_problem(twins *t, const problem *x);
sparge_mask twin_mask(twins *t, const sparge_mask *mask);
sparge_intermediates twin_trace(twins *t, const sparge_intermediates *intermediates);
sparge_out twin_out(twins *t, const tensor *o);
void twins_send(const twins *t);  /* host to device */
void twins_fetch(const twins *t); /* device to host; nobody wrote beside them */
void twins_free(twins *t);

void same_counts(const sparge_counts *got, const sparge_counts *want);

/* Every array of the intermediates, bit for bit; what nobody wrote is poison in both. */
void same_traces(const problem *x, const answer *got, const answer *want, bool with_l);

/* o and lse bit for bit. */
void same_answer(const answer *got, const answer *want);

#endif
