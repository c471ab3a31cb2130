/* SPDX-License-Identifier: Apache-2.0 */
/* judge.c: recall of a mask, and two masks block by block. */
#include "tools/judge.h"

#include <math.h>

#include "tools/compare.h"
#include "tools/program.h"

recall judge_recall(const array *masked, const array *dense)
{
    const double *part = masked->data, *all = dense->data;
    recall r = {.worst_row = 1.0};
    int64_t rows = 0;
    double sum = 0.0;
    for (int64_t at = 0; at < array_count(dense); at++) {
        if (all[at] == -(double)INFINITY) /* it sees no key */
            continue;
        if (!isfinite(all[at]) || isnan(part[at])) {
            r.nonfinite++;
            continue;
        }
        const double kept = fmin(1.0, exp(part[at] - all[at]));
        r.worst_row = fmin(r.worst_row, kept);
        sum += kept;
        rows++;
    }
    r.share = rows ? sum / (double)rows : r.nonfinite ? NAN : 1.0;
    r.worst_row = rows ? r.worst_row : r.share;
    return r;
}

json_t *recall_json(const recall *r)
{
    return json_pack("{s:o, s:o, s:I}", "recall", json_number(r->share), "worst_row_recall",
                     json_number(r->worst_row), "rows_nonfinite", (json_int_t)r->nonfinite);
}

static void count_block(int64_t at, int64_t *blocks, int64_t *first)
{
    if ((*blocks)++ == 0)
        *first = at;
}

mask_difference judge_masks(const array *got, const array *want)
{
    mask_difference d = {.first_missing = -1, .first_extra = -1};
    const uint8_t *g = got->data, *w = want->data;
    const int64_t count = array_count(got);
    for (int64_t at = 0; at < count; at++) {
        if (w[at] && !g[at])
            count_block(at, &d.missing, &d.first_missing);
        if (g[at] && !w[at])
            count_block(at, &d.extra, &d.first_extra);
    }
    return d;
}

json_t *judge_json(const array *mask, const mask_difference *d)
{
    return json_pack("{s:I, s:I, s:o, s:o}", "missing", (json_int_t)d->missing, "extra",
                     (json_int_t)d->extra, "first_missing",
                     compare_place(mask, d->first_missing, false), "first_extra",
                     compare_place(mask, d->first_extra, false));
}
