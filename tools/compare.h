/* SPDX-License-Identifier: Apache-2.0 */
/* compare.h: how far one array is from another. */
#ifndef SPARGE_TOOLS_COMPARE_H
#define SPARGE_TOOLS_COMPARE_H

#include <jansson.h>

#include "tools/array.h"

/* Elements that are not finite in one alone, or in both but not alike (NaN and NaN, or the same
 * infinity), are apart: then l1 and its like are not finite either. Those that are alike are left
 * out of the sums. A row is the last axis; one without an element in the sums is not judged. */
typedef struct comparison {
    double l1; /* sum|got - want| / sum|want|; of nothing by nothing 0; NaN where no element is in
                  the sums */
    double worst_row_l1; /* the largest of any row; NaN is larger than all */
    double cosine, rmse;
    int64_t worst_row; /* its first element, -1 where no row is judged */
    int64_t nan_got, nan_want, inf_got, inf_want, nonfinite_apart; /* elements */
    int64_t first_nan_got, first_nan_want, first_nan_apart,
        first_nonfinite_apart; /* or -1; NaN in one alone */
    int64_t summed;            /* elements in the sums, apart or finite */
} comparison;

/* Two arrays of one shape, neither f16 nor bf16. */
comparison compare(const array *got, const array *want);
double compare_element(const array *x, int64_t at);

/* Is `got` alike where it is not finite, and the error (l1, or worst_row_l1) of the others within a
 * bound? A bound that is NaN is none. */
bool compare_within(const comparison *c, double error, double bound);

/* The keys that say what is not finite; and all that is known, with places in an array of that
 * shape. NULL: no memory. */
json_t *compare_counts(const comparison *c);
json_t *compare_json(const comparison *c, const array *shaped);
/* A line on stderr, where anything is not finite. */
void compare_warn(const comparison *c, const char *got, const char *want);

/* Element by element: which differ by more than a share of the larger one, and which by most. */
typedef struct difference {
    int64_t elements, different;
    int64_t first; /* -1: none */
    double worst;  /* the largest |got - want| */
    int64_t worst_at;
} difference;

difference compare_elements(const array *got, const array *want, double tolerance);

bool compare_same_shape(const array *a, const array *b);

/* The coordinates of an element; without the last axis, those of its row. null for -1. */
json_t *compare_place(const array *x, int64_t at, bool row);

#endif
