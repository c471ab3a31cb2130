/* SPDX-License-Identifier: Apache-2.0 */
/* hand.h: inputs made by hand, and the masks that papers want for them as text; parameters that fit
 * short sequences. */
#ifndef SPARGE_TESTS_METHODS_HAND_H
#define SPARGE_TESTS_METHODS_HAND_H

#include "sparge_methods.h"
#include "tests/support/check.h"

/* One batch of packed f32. Products in f32 on ref, and softmax_scale 1: if a query is a unit
 * vector, its scores are a channel of k. */
typedef struct hand {
    sparge_problem p;
    sparge_options o;
    sparge_context context;
} hand;

hand hand_make(int64_t heads, int64_t kv_heads, int64_t q_len, int64_t k_len, int64_t dim,
               int64_t dim_v, const float *q, const float *k, const float *v);

/* What sparge_plan_pairs says is this, a row of text for each block of queries of each head and a
 * digit for each block of keys, the missing ones 0. Invisible pairs are 0. With blocks of 1 they
 * are the pairs. Parameters end with those given. */
void has_pairs(const hand *x, const char *method, const double *param, int params, int64_t block,
               const char *want);
#define HAS_PAIRS(x, method, block, want, ...)          \
    has_pairs(x, method, (const double[]){__VA_ARGS__}, \
              (int)(sizeof((const double[]){__VA_ARGS__}) / sizeof(double)), block, want)

/* The plan by the first so many parameters; the others have their defaults. */
sparge_plan hand_plan(const hand *x, const char *method, const double *param, int params);

/* The defaults, with sizes in tokens as much shorter as the tests' sequences are. */
void short_defaults(const sparge_method *m, double *param);

/* Between the ends of the first parameter, from where density is least: share 0 to 1. */
double first_param(const sparge_method *m, int64_t k_len, double least_first);

#endif
