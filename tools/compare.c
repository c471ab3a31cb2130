/* compare.c: relative L1, worst row, cosine and root mean square of a difference, in double. */
#include "tools/compare.h"

#include <math.h>
#include <string.h>

double compare_element(const array *x, int64_t at)
{
    switch (x->type) {
    case ARRAY_F32: return (double)((const float *)x->data)[at];
    case ARRAY_F64: return ((const double *)x->data)[at];
    case ARRAY_U8: return ((const uint8_t *)x->data)[at];
    case ARRAY_BOOL: return ((const uint8_t *)x->data)[at] != 0;
    case ARRAY_I8: return ((const int8_t *)x->data)[at];
    case ARRAY_I16: return ((const int16_t *)x->data)[at];
    case ARRAY_I32: return ((const int32_t *)x->data)[at];
    case ARRAY_I64: return (double)((const int64_t *)x->data)[at];
    case ARRAY_F16:
    case ARRAY_BF16: break;
    }
    return NAN;
}

static double relative(double distance, double size)
{
    return distance == 0.0 ? 0.0 : distance / size; /* by nothing: infinite */
}

static void note(int64_t at, int64_t *first)
{
    if (*first < 0)
        *first = at;
}

comparison compare(const array *got, const array *want)
{
    comparison c = {
        .worst_row = -1, .first_nan_got = -1, .first_nan_want = -1, .first_nan_apart = -1,
    };
    const int64_t count = array_count(got);
    const int64_t row = got->rank ? got->shape[got->rank - 1] : 1;
    double distance = 0.0, size = 0.0, squares = 0.0, dot = 0.0, norm_got = 0.0, norm_want = 0.0;
    int64_t compared = 0;
    for (int64_t first = 0; first < count; first += row) {
        double row_distance = 0.0, row_size = 0.0;
        for (int64_t at = first; at < first + row; at++) {
            const double g = compare_element(got, at), w = compare_element(want, at);
            if (isnan(g) && ++c.nan_got)
                note(at, &c.first_nan_got);
            if (isnan(w) && ++c.nan_want)
                note(at, &c.first_nan_want);
            if (isnan(g) != isnan(w))
                note(at, &c.first_nan_apart);
            if ((isnan(g) && isnan(w)) || (isinf(g) && g == w))
                continue;
            row_distance += fabs(g - w);
            row_size += fabs(w);
            squares += (g - w) * (g - w);
            dot += g * w;
            norm_got += g * g;
            norm_want += w * w;
            compared++;
        }
        distance += row_distance;
        size += row_size;
        const double l1 = relative(row_distance, row_size);
        if (c.worst_row < 0 || !(l1 <= c.worst_row_l1 || isnan(c.worst_row_l1))) {
            c.worst_row = first;
            c.worst_row_l1 = l1;
        }
    }
    c.l1 = relative(distance, size);
    c.cosine = dot / sqrt(norm_got * norm_want);
    c.rmse = compared ? sqrt(squares / (double)compared) : 0.0;
    return c;
}

bool compare_same_shape(const array *a, const array *b)
{
    return a->rank == b->rank &&
           memcmp(a->shape, b->shape, (size_t)a->rank * sizeof *a->shape) == 0;
}

json_t *compare_place(const array *x, int64_t at, bool row)
{
    if (at < 0)
        return json_null();
    int64_t axis[ARRAY_MAX_RANK];
    for (int d = x->rank - 1; d >= 0; d--) {
        axis[d] = at % x->shape[d];
        at /= x->shape[d];
    }
    json_t *const place = json_array();
    for (int d = 0; d < x->rank - row; d++)
        json_array_append_new(place, json_integer(axis[d]));
    return place;
}
