/* SPDX-License-Identifier: Apache-2.0 */
/* judge.c: recall of a mask, and two masks block by block. */
#include "tools/judge.h"

#include <math.h>

#include "tools/compare.h"

recall judge_recall(const array *mass, const array *keep, int64_t q_len, int64_t block_q)
{
    const int64_t count = array_count(mass);
    const int64_t rows = mass->shape[mass->rank - 2], columns = mass->shape[mass->rank - 1];
    recall r = {0};
    double all = 0.0, kept = 0.0;
    for (int64_t at = 0; at < count; at++) {
        const double mean = ((const double *)mass->data)[at]; /* over the rows of the block */
        const int64_t left = q_len - at / columns % rows * block_q;
        const double paid = mean * (double)(left < block_q ? left : block_q);
        if (!isfinite(paid)) {
            r.nonfinite++;
            continue;
        }
        all += paid;
        kept += ((const uint8_t *)keep->data)[at] ? paid : 0.0;
    }
    r.share = all > 0.0 ? kept / all : r.nonfinite ? NAN : 1.0;
    return r;
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
