/* SPDX-License-Identifier: Apache-2.0 */
/* mode.h: which functions run, where rules and precisions differ. */
#ifndef SPARGE_REF_MODE_H
#define SPARGE_REF_MODE_H

#include "sparge_inspect.h"

struct sparge_ref_summary;
struct sparge_ref_row;
struct sparge_ref_work;
struct sparge_ref_tensor;

/* By default those of predict.c and attend.c, which have the same names. */
typedef struct sparge_ref_mode {
    bool (*similar)(const struct sparge_ref_summary *, float theta);
    void (*select)(const struct sparge_ref_row *, uint32_t *kept); /* kept arrives empty */
    void (*score)(struct sparge_ref_work *);
    void (*accumulate_pv)(struct sparge_ref_work *, int64_t r); /* row r of the tile */
    void (*skipped)(struct sparge_ref_work *, int64_t r);       /* a row that skips, or NULL */
    void (*round_qk)(struct sparge_ref_tensor *);               /* as Q.K^T takes it, or NULL */
    void (*round_v)(struct sparge_ref_work *);                  /* as P.V takes it, or NULL */
    int p_qmax;                                                 /* 0: not quantized */
    float slack;                                                /* added to q_scale and k_scale */
    int64_t never_skip; /* so many last kept blocks ignore lambda */
    float predict_scale;
} sparge_ref_mode;

/* rules.c: of the paper and of the released kernels. */
void sparge_ref_set_rules(sparge_ref_mode *, const sparge_problem *, const sparge_options *);
/* precision.c: what is not in int8. */
void sparge_ref_set_precision(sparge_ref_mode *, const sparge_options *);

#endif
