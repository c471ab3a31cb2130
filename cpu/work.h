/* SPDX-License-Identifier: Apache-2.0 */
/* work.h: what the cpu backend holds while it works, by how long it lives: a call, a batch of key
 * heads, a batch of their query blocks; and a thread's scratch. Its steps are pack.c (one pass over
 * q, k and v), select.c (one row of the mask), cells.c (masses for it) and tile.c (one query block
 * through its key blocks). None of them knows an instruction set. driver.c has memory, threads and
 * the order of it all. */
#ifndef SPARGE_CPU_WORK_H
#define SPARGE_CPU_WORK_H

#include "common/counts.h"
#include "common/thresholds.h"
#include "cpu/kernels.h"
#include "sparge_inspect.h"

enum { SPARGE_CELL_PANELS = 2 }; /* of rows of cells that go through K together */

/* Q, K or V in blocks, each as a kernel wants it. */
typedef struct sparge_operand {
    sparge_format format;
    int qmax;              /* codes are in [-qmax, qmax]; 0: values */
    int64_t stride;        /* channels, padded */
    int64_t block;         /* bytes of a block */
    int64_t inits, scales; /* of a block */
    char *data;            /* [blocks][block] */
    int32_t *init;         /* [blocks][inits] of accumulators */
    float *scale;          /* [blocks][scales] */
} sparge_operand;

/* A batch of key heads, [first, end) of batch * kv_heads. "blocks": [end - first][k_blocks] */
typedef struct sparge_kv_batch {
    int64_t first, end;
    float *mean;        /* [end - first][stride] the mean key */
    float *pool;        /* [blocks][stride] sums of K_j until the mean is known, then mean rows:
                           [blocks][cells_k][stride], and a panel of them more */
    float *sim;         /* [blocks] self-similarity of K_j */
    uint8_t *nonfinite; /* [blocks] bits of sparge_nonfinite */
    sparge_operand k, v;
} sparge_kv_batch;

/* K as it is, which the prediction asks; V and K in the type of their product. */
enum sparge_nonfinite { SPARGE_NONFINITE_K = 1, SPARGE_NONFINITE_V = 2, SPARGE_OVERFLOW_K = 4 };

/* A query block of a head. */
typedef struct sparge_q_block {
    int64_t head, i; /* head of batch * heads; query block of it */
    int64_t index;   /* its place in the operand and the pool of the batch */
    int64_t cost;    /* key blocks to compute */
    float sim;       /* self-similarity of Q_i */
    bool finite;     /* as it is */
    bool fits;       /* finite in the type of Q.K^T */
    sparge_tally tally;
} sparge_q_block;

/* A batch of query blocks that read a batch of key heads. */
typedef struct sparge_q_batch {
    sparge_operand operand;
    float *pool;           /* [count][cells_q][stride] mean rows */
    sparge_q_block *block; /* [count] */
    int64_t count;
} sparge_q_batch;

typedef struct sparge_work {
    const sparge_problem *p;
    const sparge_options *o;
    const sparge_intermediates *intermediates;
    sparge_geometry g, cells;
    int64_t cells_q, cells_k; /* of a block; without cells it is one itself */
    int64_t together;         /* query blocks whose cells share panels */
    sparge_kernels kernels;
    int64_t keys;            /* of a key block, padded: the depth of P.V */
    sparge_mask *predicted;  /* NULL: not asked for */
    const sparge_mask *mask; /* NULL: dense */
    sparge_result *result;   /* NULL: attention is not asked for */
    float *no_mean;          /* [stride] zeros */
    sparge_kv_batch kv;
    sparge_q_batch q;
} sparge_work;

/* Where a thread works. */
typedef struct sparge_scratch {
    float *x, *unit_sum; /* a block of tokens on its way to codes; the sum of its unit rows */
    float *inverse;      /* [channels of V] of their scales */
    void *code;
    float *row;                       /* [k_blocks] S[i,:] */
    uint32_t *order_key, *mass, *j;   /* [k_blocks] of what is chosen from, and their key blocks */
    float *cell_q, *cell_s;           /* [panels][stride][16], [panels][cells of K][16] */
    int32_t *cell_codes;              /* [k_blocks + a panel][16] sums of codes, then masses */
    uint32_t *cell_mass;              /* [together][k_blocks] */
    float *s;                         /* [panels of a group][(keys + 1) * 16] */
    void *p;                          /* the same in the format of V */
    float *o;                         /* [panels][channels of V][16] */
    float *max, *sum;                 /* [lanes] m and l */
    float *turned;                    /* [16][channels of V] rows of O */
    bool *nonfinite;                  /* [lanes] queries that met a non-finite query or key */
    float *most, *local;              /* [lanes of a group] the largest s of a query, m_local */
    float *shrink, *weight, *row_sum; /* the same */
    int32_t *p_init;                  /* the same */
    uint32_t *attended;               /* [panels of a group][words of keys][16] bits of keys */
    int32_t *attends;                 /* [lanes of a group] how many of them are set */
    const uint32_t **partial;         /* [k_blocks] bits of those attended in part, or NULL */
    float *pv_done;                   /* [k_blocks] share of the rows whose P.V was computed */
} sparge_scratch;

/* The key head, counted over the batch, that a query head of that kind reads. */
static inline int64_t sparge_kv_of(const sparge_problem *p, int64_t head)
{
    return head / (p->heads / p->kv_heads);
}

/* The thresholds of a query head that is counted over the batch. */
static inline const sparge_thresholds *sparge_thresholds_at(const sparge_work *w, int64_t head)
{
    return sparge_thresholds_of(w->o, head % w->p->heads);
}

/* n up to a multiple. */
static inline int64_t sparge_whole(int64_t n, int64_t multiple)
{
    return sparge_ceil_div(n, multiple) * multiple;
}

/* Queries of the head that go through a tile together: those that decide lambda, or as many as the
 * kernels like best. Each group begins a panel. */
static inline int64_t sparge_group_of(const sparge_work *w, int64_t head)
{
    const int64_t *best = w->kernels.group;
    if (sparge_thresholds_at(w, head)->lambda > -INFINITY)
        return w->o->skip_rows;
    return sparge_min(w->g.block_q, sparge_max(best[w->q.operand.format], best[w->kv.v.format]));
}

/* Lanes of so many queries in groups. */
static inline int64_t sparge_lanes(int64_t queries, int64_t group)
{
    return queries / group * sparge_padded(group) + sparge_padded(queries % group);
}

/* Rows [first, first + rows) of a recorded array [rows][dim], or nothing if it is not wanted; from
 * has padding up to stride. */
static inline void sparge_record_rows(void *array, int64_t first, int64_t rows, int64_t dim,
                                      const void *from, int64_t stride, size_t size)
{
    for (int64_t r = 0; array && r < rows && dim; r++)
        memcpy((char *)array + (size_t)((first + r) * dim) * size,
               (const char *)from + (size_t)(r * stride) * size, (size_t)dim * size);
}

/* Rows [first, first + rows) of a head that is counted over the batch. */
sparge_rows sparge_rows_of(const sparge_in *in, int64_t heads, int64_t head, int64_t first,
                           int64_t rows, int64_t dim);

/* pack.c: x = rows less mean. Is every element finite in a product of this type? */
bool sparge_load_finite(const sparge_work *w, const sparge_rows *rows, const float *mean,
                        int64_t stride, sparge_dtype dtype, float *x);

/* A step on key block n of the kv batch, or on query block n of the q batch. */
typedef void sparge_step(const sparge_work *w, sparge_scratch *t, int64_t n);

sparge_step sparge_sum_keys;       /* pack.c: a summand of the mean key */
sparge_step sparge_pack_kv;        /* pack.c */
sparge_step sparge_pack_query;     /* pack.c */
sparge_step sparge_select_row;     /* select.c */
sparge_step sparge_select_cells;   /* cells.c; n: `together` query blocks */
sparge_step sparge_attend_q_block; /* tile.c */

/* select.c: one row by the masses [visible] of its key blocks. */
void sparge_select_masses(const sparge_work *w, sparge_scratch *t, int64_t n, const uint32_t *mass);

/* pack.c: the mean key of a head of the batch, once the sums of all its blocks are there. */
void sparge_mean_key(const sparge_work *w, int64_t head);

#endif
