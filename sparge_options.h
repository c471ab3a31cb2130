/* SPDX-License-Identifier: Apache-2.0 */
/* sparge_options.h: how attention is computed. sparge.h includes it.
 *
 * sparge_options_default sets every field to the default that stands here. */
#ifndef SPARGE_OPTIONS_H
#define SPARGE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* C names, and the only ones that the shared library exports. */
#ifdef __cplusplus
#define SPARGE_BEGIN_DECLS \
    extern "C" {           \
    _Pragma("GCC visibility push(default)")
#define SPARGE_END_DECLS          \
    _Pragma("GCC visibility pop") \
    }
#else
#define SPARGE_BEGIN_DECLS _Pragma("GCC visibility push(default)")
#define SPARGE_END_DECLS   _Pragma("GCC visibility pop")
#endif

SPARGE_BEGIN_DECLS

#define SPARGE_VERSION        "0.1.0"
#define SPARGE_VERSION_NUMBER 100 /* 10000 * major + 100 * minor + patch */
#define SPARGE_MAX_DIM        256
#define SPARGE_MAX_BLOCK      1024
#define SPARGE_MAX_THREADS    1024
#define SPARGE_KERNELS        5

int sparge_version(void); /* SPARGE_VERSION_NUMBER of the library */

/* The types of arrays are F32, F16 and BF16. The other words are for options.qk_dtype and
 * pv_dtype. */
typedef enum sparge_dtype {
    SPARGE_F32,
    SPARGE_F16,
    SPARGE_BF16,
    SPARGE_FP8, /* e4m3 */
    SPARGE_INT8,
    SPARGE_INT12,
    SPARGE_FASTEST, /* INT8 on ref and cpu, FP8 or F16 on cuda */
} sparge_dtype;

typedef enum sparge_backend {
    SPARGE_AUTO, /* cpu, or ref if cpu cannot do it; never cuda */
    SPARGE_REF,  /* the definition of the right answer */
    SPARGE_CPU,
    SPARGE_CUDA,
} sparge_backend;

/* Every instruction set gives the same bits, but for products in BF16: AVX512VNNI has them where
 * the processor has AVX512-BF16, AMX where it has AMX-BF16, and these add in different orders (see
 * ref/README.md). ref computes either order on any machine. */
typedef enum sparge_isa {
    SPARGE_ISA_AUTO, /* what SPARGE_ISA in the environment names, or else the best */
    SPARGE_ISA_SCALAR,
    SPARGE_ISA_AVX2,
    SPARGE_ISA_AVXVNNI,
    SPARGE_ISA_AVX512VNNI,
    SPARGE_ISA_AMX,
    SPARGE_ISAS, /* how many these are */
} sparge_isa;

typedef enum sparge_causal {
    SPARGE_CAUSAL_NONE,
    SPARGE_CAUSAL_END,   /* query t sees keys up to t + k_len - q_len (FlashAttention >= 2.1) */
    SPARGE_CAUSAL_START, /* query t sees keys up to t (torch's is_causal) */
} sparge_causal;

/* Whose decisions, if the paper, its kernels and this project differ: see ref/README.md. */
typedef enum sparge_rules {
    SPARGE_RULES_DEFAULT,
    SPARGE_RULES_PAPER,    /* ref alone */
    SPARGE_RULES_UPSTREAM, /* ref alone */
} sparge_rules;

#define SPARGE_OFF (-1.0f) /* for tau or topk */

/* What is tuned for each head (Sec 3.6). A row keeps the union of tau's, topk's and min_mass's
 * blocks. The mass of a key block is its share of a softmax over what the row sees: of mean rows of
 * blocks, or of cells (see options.cell). */
typedef struct sparge_thresholds {
    float theta;    /* mean cosine above which a block is self-similar, -1 to 1; default 0.6 */
    float tau;      /* mass of the key blocks to keep, 0 to 1 or OFF; default 0.98 */
    float topk;     /* share of the visible key blocks to keep, 0 to 1 or OFF; default OFF */
    float lambda;   /* P.V is skipped if max - running max <= lambda (natural log), -inf to 0;
                       default -inf: never */
    float min_mass; /* mass above which a key block is kept, in even shares: 1 is what each block
                       has if all of the call's have the same; at least 0; default 0: off. A row
                       without such a block, sink or diagonal keeps none. It is of this project,
                       not of the paper: ref/README.md, methods/submass.c */
} sparge_thresholds;

typedef struct sparge_cuda_options {
    int kernel;              /* number in gpu/README.md, 1 to 5; default 0: the best */
    void *stream;            /* cudaStream_t to queue on; default NULL: calls wait */
    void *workspace;         /* device memory to work in; default NULL: allocated by the call */
    int64_t workspace_bytes; /* size of workspace; see sparge_workspace_bytes */
} sparge_cuda_options;

typedef struct sparge_options {
    int version;            /* SPARGE_VERSION_NUMBER of the caller's sparge.h */
    sparge_backend backend; /* default AUTO */
    sparge_isa isa;         /* of the cpu backend; default AUTO: of those with BF16, if that is
                               asked for. With BF16 also of ref, whose order of the sum it is:
                               AVX512VNNI, which is its default, or AMX */
    int threads;            /* of the cpu backend, 0 to 1024; default 0: as many as OpenMP takes */
    int64_t block_q;        /* queries of a block, 1 to 1024; default 128 */
    int64_t block_k;        /* keys of a block, 1 to 1024, with INT12 P.V to 128; default 64 */
    int64_t cell;           /* tokens of a cell, whose mean rows are scored in place of the blocks',
                               a divisor of both blocks, and of block_k at least 1/64; default 0:
                               none */
    int64_t skip_rows;      /* rows that share a decision of lambda; default 0: 64, or by rules */
    sparge_causal causal;   /* default NONE */
    sparge_dtype qk_dtype;  /* arithmetic of Q.K^T: INT8, INT12, F32 or BF16; default INT8 */
    sparge_dtype pv_dtype;  /* arithmetic of P.V: also F16, FP8, FASTEST; default INT8 */
    float softmax_scale;    /* factor of the scores, finite, > 0; default 0: 1/sqrt(dim) */
    bool smooth_k;          /* subtract the mean key before quantization; default true */
    bool sink;              /* keep key block 0 always; default false */
    sparge_rules rules;     /* default DEFAULT */
    sparge_thresholds thresholds;              /* for every head */
    const sparge_thresholds *per_head;         /* [heads] instead of thresholds; default NULL */
    bool (*progress)(void *user, double done); /* see sparge_attention; default NULL */
    void *user;                                /* first argument of progress */
    sparge_cuda_options cuda;
} sparge_options;

/* Fills in the defaults of one rule set. `size` and `version` are those of the caller's sparge.h.
 * If the library's differ, every call with these options fails with SPARGE_ERR_ARGUMENT. */
void sparge_options_init(sparge_options *options, size_t size, int version, sparge_rules rules);

static inline sparge_options sparge_options_default(sparge_rules rules)
{
    sparge_options options;
    sparge_options_init(&options, sizeof options, SPARGE_VERSION_NUMBER, rules);
    return options;
}

SPARGE_END_DECLS

#endif
