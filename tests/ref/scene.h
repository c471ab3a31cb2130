/* SPDX-License-Identifier: Apache-2.0 */
/* scene.h: questions at random for the prediction, and what textbook predictors in double share.
 * Nothing of it is of ref/: every token pair is asked whether it is visible, and the similarity of
 * a block is that of its Gram matrix. */
#ifndef SPARGE_TESTS_REF_SCENE_H
#define SPARGE_TESTS_REF_SCENE_H

#include "tests/support/problem.h"

static const double near_threshold = 1e-5;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct scene {
    sparge_problem p;
    sparge_options o;
    sparge_thresholds per_head[16];
    tensor q, k;
} scene;

typedef enum verdict { DROP, KEEP, OPEN } verdict; /* open: within 1e-5 of a threshold */

scene some_scene(void);
void discard(scene *s);
sparge_thresholds some_thresholds(void);
float one_of(const float *list, int64_t count);

bool sees(const scene *s, int64_t t, int64_t key);

/* Mean cosine of all pairs of rows of x less the mean, by the Gram matrix; the pooled row; and
 * whether the block is similar. What is not finite counts as 0, and makes the block dissimilar. */
verdict judge_block(const float *x, const double *mean, int64_t rows, int64_t dim, float theta,
                    double *pool, double *sim);

/* Across a cut through the order, blocks whose scores are as good as equal may change places. Equal
 * ones may not: they go by number. near: in absolute terms, beside a relative one. */
void open_beside(const double *score, const int64_t *order, int64_t count, int64_t cut, double near,
                 verdict *row);

/* Within the bound, absolute below 1 and relative above; *most becomes the largest distance. */
void worst(const char *what, int64_t b, int64_t h, const float *got, const double *want, int64_t n,
           double bound, double *most);

#endif
