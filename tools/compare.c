/* SPDX-License-Identifier: Apache-2.0 */
/* compare.c: relative L1, worst row, cosine and root mean square of a difference, in double. */
#include "tools/compare.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tools/program.h"

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

static void note(bool is, int64_t at, int64_t *first)
{
    if (is && *first < 0)
        *first = at;
}

static bool same(double g, double w) { return (isnan(g) && isnan(w)) || g == w; }

/* What is not finite in element `at`. */
static void count_element(comparison *c, int64_t at, double g, double w)
{
    const bool apart = !(isfinite(g) && isfinite(w)) && !same(g, w);
    c->nan_got += isnan(g) != 0;
    c->nan_want += isnan(w) != 0;
    c->inf_got += isinf(g) != 0;
    c->inf_want += isinf(w) != 0;
    c->nonfinite_apart += apart;
    note(isnan(g), at, &c->first_nan_got);
    note(isnan(w), at, &c->first_nan_want);
    note(isnan(g) != isnan(w), at, &c->first_nan_apart);
    note(apart, at, &c->first_nonfinite_apart);
}

comparison compare(const array *got, const array *want)
{
    comparison c = {
        .worst_row = -1,
        .first_nan_got = -1,
        .first_nan_want = -1,
        .first_nan_apart = -1,
        .first_nonfinite_apart = -1,
    };
    const int64_t count = array_count(got);
    const int64_t row = got->rank ? got->shape[got->rank - 1] : 1;
    double distance = 0.0, size = 0.0, squares = 0.0, dot = 0.0, norm_got = 0.0, norm_want = 0.0;
    for (int64_t first = 0; first < count; first += row) {
        const int64_t before = c.summed;
        double row_distance = 0.0, row_size = 0.0;
        for (int64_t at = first; at < first + row; at++) {
            const double g = compare_element(got, at), w = compare_element(want, at);
            count_element(&c, at, g, w);
            if (!isfinite(g) && same(g, w))
                continue;
            row_distance += fabs(g - w);
            row_size += fabs(w);
            squares += (g - w) * (g - w);
            dot += g * w;
            norm_got += g * g;
            norm_want += w * w;
            c.summed++;
        }
        distance += row_distance;
        size += row_size;
        const double l1 = relative(row_distance, row_size);
        if (c.summed > before &&
            (c.worst_row < 0 || !(l1 <= c.worst_row_l1 || isnan(c.worst_row_l1)))) {
            c.worst_row = first;
            c.worst_row_l1 = l1;
        }
    }
    const bool nothing = count > 0 && c.summed == 0;
    c.l1 = nothing ? NAN : relative(distance, size);
    c.worst_row_l1 = nothing ? NAN : c.worst_row_l1;
    c.cosine = dot / sqrt(norm_got * norm_want);
    c.rmse = count ? sqrt(squares / (double)c.summed) : 0.0;
    return c;
}

bool compare_within(const comparison *c, double error, double bound)
{
    return c->nonfinite_apart == 0 && (isnan(bound) || c->summed == 0 || error <= bound);
}

json_t *compare_counts(const comparison *c)
{
    return json_pack("{s:I, s:I, s:I, s:I, s:I}", "nan_got", (json_int_t)c->nan_got, "nan_want",
                     (json_int_t)c->nan_want, "inf_got", (json_int_t)c->inf_got, "inf_want",
                     (json_int_t)c->inf_want, "nonfinite_apart", (json_int_t)c->nonfinite_apart);
}

json_t *compare_json(const comparison *c, const array *shaped)
{
    json_t *errors = json_pack("{s:o, s:o, s:o, s:o, s:o}", "l1", json_number(c->l1),
                               "worst_row_l1", json_number(c->worst_row_l1), "worst_row",
                               compare_place(shaped, c->worst_row, true), "cosine",
                               json_number(c->cosine), "rmse", json_number(c->rmse));
    json_t *places = json_pack(
        "{s:o, s:o, s:o, s:o}", "first_nan_got", compare_place(shaped, c->first_nan_got, false),
        "first_nan_want", compare_place(shaped, c->first_nan_want, false), "first_nan_apart",
        compare_place(shaped, c->first_nan_apart, false), "first_nonfinite_apart",
        compare_place(shaped, c->first_nonfinite_apart, false));
    return json_joined(json_joined(errors, compare_counts(c)), places);
}

void compare_warn(const comparison *c, const char *got, const char *want)
{
    if (c->nan_got + c->nan_want + c->inf_got + c->inf_want == 0)
        return;
    fprintf(stderr,
            "sparge: %s has %" PRId64 " NaN and %" PRId64 " infinite elements, %s %" PRId64
            " and %" PRId64 ": ",
            got, c->nan_got, c->inf_got, want, c->nan_want, c->inf_want);
    if (c->nonfinite_apart)
        fprintf(stderr, "%" PRId64 " are apart, so there is no error to give\n",
                c->nonfinite_apart);
    else
        fprintf(stderr, "alike; the error is that of the other %" PRId64 "\n", c->summed);
}

difference compare_elements(const array *got, const array *want, double tolerance)
{
    difference d = {.elements = array_count(got), .first = -1, .worst_at = -1};
    for (int64_t at = 0; at < d.elements; at++) {
        const double g = compare_element(got, at), w = compare_element(want, at);
        if (same(g, w))
            continue;
        const double apart = fabs(g - w);
        if (d.worst_at < 0 || !(apart <= d.worst || isnan(d.worst))) {
            d.worst = apart;
            d.worst_at = at;
        }
        if (isfinite(apart) && apart <= tolerance * fmax(fabs(g), fabs(w)))
            continue;
        d.first = d.different++ ? d.first : at;
    }
    return d;
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
    json_t *place = json_array();
    for (int d = 0; d < x->rank - row; d++)
        json_array_append_new(place, json_integer(axis[d]));
    return place;
}
