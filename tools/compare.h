/* compare.h: how far one array is from another. */
#ifndef SPARGE_TOOLS_COMPARE_H
#define SPARGE_TOOLS_COMPARE_H

#include <jansson.h>

#include "tools/array.h"

/* Elements that are equal but not finite, and NaNs of both, agree and are left out of the sums. A
 * row is the last axis. */
typedef struct comparison {
    double l1;           /* sum|got - want| / sum|want|; of nothing by nothing 0 */
    double worst_row_l1; /* the largest of any row; NaN is larger than all */
    double cosine, rmse;
    int64_t worst_row;       /* its first element, -1 where there are no rows */
    int64_t nan_got, nan_want;
    int64_t first_nan_got, first_nan_want, first_nan_apart; /* elements, or -1; NaN in one alone */
} comparison;

/* Two arrays of one shape, neither f16 nor bf16. */
comparison compare(const array *got, const array *want);
double compare_element(const array *x, int64_t at);

bool compare_same_shape(const array *a, const array *b);

/* The coordinates of an element; without the last axis, those of its row. null for -1. */
json_t *compare_place(const array *x, int64_t at, bool row);

#endif
