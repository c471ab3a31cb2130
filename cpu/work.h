/* work.h: what the cpu backend holds while it works, and its four steps: pack.c (one pass over q, k
 * and v), select.c (one row of the mask), tile.c (one query block through its key blocks), driver.c
 * (memory, threads, the order of it all). None of them knows an instruction set. */
#ifndef SPARGE_CPU_WORK_H
#define SPARGE_CPU_WORK_H

#include <stdatomic.h>

#include "common/geometry.h"
#include "cpu/kernels.h"

/* Q, K or V in blocks, each as a kernel wants it. */
typedef struct sparge_operand {
    sparge_format format;
    int qmax;              /* codes are in [-qmax, qmax]; 0: values */
    int64_t stride;        /* channels, padded to 16 */
    int64_t block;         /* bytes of a block */
    int64_t starts, steps; /* of a block */
    char *data;            /* [blocks][block] */
    int32_t *start;        /* [blocks][starts] */
    float *step;           /* [blocks][steps] */
} sparge_operand;

/* One query block of one head. */
typedef struct sparge_task {
    int64_t head, i; /* batch * heads + head; query block */
    int64_t slot;    /* its place in Q and q_pool */
    int64_t cost;    /* key blocks to compute */
    float sim;
    bool finite;
    sparge_counts counts; /* but for pv_done: */
    int64_t pv_rows;      /* summed over the tiles: rows whose P.V was computed */
} sparge_task;

/* Where a thread works. */
typedef struct sparge_scratch {
    float *x, *unit; /* a block of tokens on its way to codes */
    int16_t *code;
    float *rank;                      /* [k_blocks] S[i,:] */
    uint32_t *key, *mass, *place;     /* [k_blocks] select.c */
    float *s, *o;                     /* [group][keys + 16], [block_q][stride of V] */
    void *p;                          /* [group][keys + 16] in the format of V */
    float *max, *sum;                 /* [block_q] m and l */
    float *most, *local;              /* [group] the largest s of a row, m_local */
    float *shrink, *weight, *row_sum; /* [group] */
    int32_t *p_start;                 /* [group] */
    bool *spoilt;                     /* [block_q] rows that met a non-finite query or key */
    float *share;                     /* [k_blocks] of the rows whose P.V was computed */
} sparge_scratch;

enum {
    SPARGE_GROUP_ROWS = 64
}; /* of a tile where lambda does not say: Q and S of them stay in L1 */

enum { SPARGE_BAD_KEY = 1, SPARGE_BAD_VALUE = 2 }; /* a block holds a non-finite element */

typedef struct sparge_work {
    const sparge_problem *p;
    const sparge_options *o;
    const sparge_intermediates *intermediates;
    sparge_geometry g;
    sparge_kernels kernels;
    int64_t keys;            /* of a key block, padded to 16 */
    sparge_mask *predicted;  /* NULL: not asked for */
    const sparge_mask *mask; /* NULL: dense */
    sparge_result *result;   /* NULL: attention is not asked for */

    atomic_llong attended;                 /* query blocks */
    atomic_bool cancelled;                 /* by the caller: what has not begun never does */
    int64_t wave, chunk;                   /* so many key heads, so many query blocks at a time */
    double packing, predicting, attending; /* seconds */

    /* Of a wave of key heads, first_kv to end_kv of batch * kv_heads. */
    int64_t first_kv, end_kv;
    float *no_mean; /* [stride] zeros */
    float *mean;    /* [key heads][stride] */
    float *k_pool;  /* [key heads][k_blocks][stride]; sums of blocks before the mean is known */
    float *k_sim;   /* [key heads][k_blocks] */
    uint8_t *bad;   /* [key heads][k_blocks] */
    sparge_operand k, v;

    /* Of a chunk of the wave's query blocks. */
    sparge_operand q;
    float *q_pool; /* [slots][stride] */
    sparge_task *task;
    int64_t tasks;

    int64_t (*pv_rows)[2]; /* [batch * heads] of whole and of short query blocks */

    sparge_scratch *scratch; /* [threads] */
} sparge_work;

/* The key head, counted over the batch, that a query head of that kind reads. */
static inline int64_t sparge_kv_of(const sparge_problem *p, int64_t head)
{
    return head / (p->heads / p->kv_heads);
}

/* Rows [first, first + rows) of a recorded array [rows][dim], where it is wanted; from has padding
 * up to stride. */
static inline void sparge_trace_rows(void *array, int64_t first, int64_t rows, int64_t dim,
                                     const void *from, int64_t stride, size_t size)
{
    for (int64_t r = 0; array && r < rows && dim; r++)
        memcpy((char *)array + (size_t)((first + r) * dim) * size,
               (const char *)from + (size_t)(r * stride) * size, (size_t)dim * size);
}

/* Rows [first, first + rows) of a head that is counted over the batch. */
sparge_rows sparge_rows_of(const sparge_in *in, int64_t heads, int64_t head, int64_t first,
                           int64_t rows, int64_t dim);

/* pack.c; n is a key head of the wave */
void sparge_pack_sum(const sparge_work *w, sparge_scratch *t, int64_t n, int64_t j);
void sparge_pack_mean(const sparge_work *w, int64_t n);
void sparge_pack_key(const sparge_work *w, sparge_scratch *t, int64_t n, int64_t j);
void sparge_pack_value(const sparge_work *w, sparge_scratch *t, int64_t n, int64_t j);
void sparge_pack_query(const sparge_work *w, sparge_scratch *t, sparge_task *task);

/* select.c */
void sparge_select_row(const sparge_work *w, sparge_scratch *t, const sparge_task *task);

/* tile.c */
void sparge_attend_task(const sparge_work *w, sparge_scratch *t, sparge_task *task);

#endif
