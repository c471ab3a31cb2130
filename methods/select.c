/* SPDX-License-Identifier: Apache-2.0 */
/* select.c: what is kept of what is ranked. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/select.h"
#include "methods/method.h"

static int best_first(const void *a, const void *b)
{
    const sparge_ranked *x = a, *y = b;
    return sparge_comes_before(x->score, x->at, y->score, y->at) ? -1 : x->at != y->at;
}

void sparge_rank(sparge_ranked *x, int64_t n) { qsort(x, (size_t)n, sizeof *x, best_first); }

static void swap(sparge_ranked *a, sparge_ranked *b)
{
    const sparge_ranked x = *a;
    *a = *b;
    *b = x;
}

void sparge_rank_best(sparge_ranked *x, int64_t n, int64_t count)
{
    int64_t from = 0, to = n; /* what lies before is of the best, what lies after is not */
    while (to - from > 1 && from < count && count < to) {
        swap(&x[from + (to - from) / 2], &x[to - 1]);
        int64_t end = from; /* of what comes before the last one */
        for (int64_t e = from; e < to - 1; e++)
            if (best_first(&x[e], &x[to - 1]) < 0)
                swap(&x[e], &x[end++]);
        swap(&x[end], &x[to - 1]);
        if (end < count)
            from = end + 1;
        else
            to = end;
    }
}

int64_t sparge_count_mass(const sparge_ranked *x, int64_t n, double mass, bool crossing)
{
    double sum = 0.0;
    for (int64_t e = 0; e < n; e++) {
        if (crossing && sum >= mass)
            return e;
        sum += (double)x[e].score;
        if (!crossing && sum > mass)
            return e;
    }
    return n;
}

int64_t sparge_count_above(const sparge_ranked *x, int64_t n, double threshold)
{
    int64_t e = 0;
    while (e < n && (double)x[e].score > threshold)
        e++;
    return e;
}

void sparge_keep(const sparge_head *head, int64_t i, int64_t j)
{
    sparge_mask_set(head->mask, 0, 0, i, j, true);
}

bool sparge_kept(const sparge_head *head, int64_t i, int64_t j)
{
    return sparge_mask_get(head->mask, 0, 0, i, j);
}

void sparge_keep_diagonal(const sparge_head *head, int64_t i)
{
    const int64_t visible = sparge_blocks_visible(&head->g, i);
    for (int64_t j = sparge_first_diagonal(&head->g, i); j < visible; j++)
        sparge_keep(head, i, j);
}

int64_t sparge_place_of(const sparge_geometry *g, int64_t t)
{
    const int64_t offset = g->causal == SPARGE_CAUSAL_START ? 0 : g->k_len - g->q_len;
    return sparge_max(0, sparge_min(g->k_len - 1, t + offset));
}

void sparge_keep_by_place(const sparge_head *head, sparge_place_rule *rule)
{
    const sparge_geometry *g = &head->g;
    for (int64_t i = 0; i < g->q_blocks; i++) {
        const int64_t t = i * g->block_q, rows = sparge_block_rows(g->q_len, g->block_q, i),
                      last = sparge_place_of(g, t + rows - 1) / g->block_k;
        for (int64_t at = sparge_place_of(g, t) / g->block_k; at <= last; at++)
            for (int64_t j = 0; j < sparge_blocks_visible(g, i); j++)
                if (rule(head, at, j))
                    sparge_keep(head, i, j);
    }
}

void sparge_keep_shares(const sparge_head *head, int64_t i, const double *mass, double t)
{
    const int64_t visible = sparge_blocks_visible(&head->g, i);
    double all = 0.0;
    for (int64_t j = 0; j < visible; j++)
        all += mass[j];
    for (int64_t j = 0; j < visible; j++)
        if (j == 0 || t <= 0.0 || mass[j] * (double)head->g.k_blocks > t * all)
            sparge_keep(head, i, j);
    sparge_keep_diagonal(head, i);
}

sparge_pairs sparge_pairs_make(const sparge_head *head)
{
    const int64_t words = sparge_mask_row_words(head->g.k_len);
    return (sparge_pairs){
        words, sparge_take(head->scratch, head->g.block_q * words + 1, sizeof(uint32_t))};
}

void sparge_pairs_clear(const sparge_head *head, const sparge_pairs *pairs)
{
    memset(pairs->bits, 0, (size_t)(head->g.block_q * pairs->words) * sizeof *pairs->bits);
}

void sparge_pairs_range(const sparge_head *head, const sparge_pairs *pairs, int64_t r, int64_t from,
                        int64_t to)
{
    uint32_t *row = pairs->bits + r * pairs->words;
    const int64_t end = sparge_min(to, head->g.k_len);
    for (int64_t t = sparge_max(0, from); t < end; t = (t | 31) + 1) /* a word at a time */
        row[t >> 5] |= sparge_mask_row_word(NULL, 0, end - t) << (t & 31);
}

double sparge_video_share(const sparge_head *head, double density)
{
    const sparge_grid *grid = head->context->grid;
    const double all = (double)head->g.k_len,
                 video = all - (double)(grid->text_before + grid->text_after);
    return video > 0.0 ? fmax(0.0, 1.0 - (1.0 - density) * (all / video) * (all / video)) : 1.0;
}

double sparge_video_band(const sparge_head *head, double density)
{
    const sparge_grid *grid = head->context->grid;
    const int64_t video = head->g.k_len - grid->text_before - grid->text_after;
    return (double)video * (1.0 - sqrt(1.0 - sparge_video_share(head, density)));
}

void sparge_pairs_near(const sparge_head *head, const sparge_pairs *pairs, int64_t r, int64_t place,
                       int64_t width)
{
    const sparge_grid *grid = head->context->grid;
    const int64_t first = grid->text_before, end = head->g.k_len - grid->text_after;
    const bool text = place < first || place >= end;
    sparge_pairs_range(head, pairs, r, 0, text ? end : first);
    sparge_pairs_range(head, pairs, r, sparge_max(first, place - width),
                       sparge_min(end, place + width + 1));
    sparge_pairs_range(head, pairs, r, end, head->g.k_len);
}

sparge_status sparge_pairs_set(const sparge_head *head, const sparge_pairs *pairs, int64_t i,
                               sparge_error *error)
{
    return sparge_mask_set_row(head->mask, &head->one, &head->part->options, 0, 0, i, pairs->bits,
                               error);
}

/* ---- Pages of keys for each query ---- */

/* The best so many of those that query t sees, in any order; how many there are. */
static int64_t best_pages(const sparge_head *head, const float *q, int64_t t, int64_t size,
                          int64_t count, const sparge_panels *mean, float *score, sparge_ranked *x)
{
    const int64_t dim = head->problem->dim,
                  pages = sparge_ceil_div(sparge_keys_of_query(&head->g, t), size);
    sparge_method_scores(mean, q + t * dim, 1.0f, pages, score);
    for (int64_t n = 0; n < pages; n++)
        x[n] = (sparge_ranked){score[n], n};
    if (head->g.causal && pages) /* its own */
        x[pages - 1].score = INFINITY;
    *head->multiply_adds += (double)pages * (double)dim;
    count = sparge_min(count, pages);
    sparge_rank_best(x, pages, count);
    return count;
}

sparge_status sparge_keep_pages(const sparge_head *head, const float *q, int64_t size,
                                int64_t count, sparge_error *error)
{
    const sparge_geometry *g = &head->g;
    const int64_t dim = head->problem->dim, pages = sparge_ceil_div(g->k_len, size);
    float *mean = sparge_take(head->scratch, pages * dim + 1, sizeof *mean);
    float *score = sparge_take(head->scratch, pages + 1, sizeof *score);
    sparge_ranked *x = sparge_take(head->scratch, pages + 1, sizeof *x);
    const sparge_pairs pairs = sparge_pairs_make(head);
    if (!mean || !score || !x || !pairs.bits)
        return SPARGE_ERR_MEMORY;
    sparge_method_pool(head->k, g->k_len, dim, size, false, mean);
    const sparge_panels means = sparge_method_panels(mean, pages, dim, head->scratch);
    if (!means.x)
        return SPARGE_ERR_MEMORY;
    *head->multiply_adds += (double)g->k_len * (double)dim;
    sparge_status status = SPARGE_OK;
    for (int64_t i = 0; i < g->q_blocks && !status; i++) {
        sparge_pairs_clear(head, &pairs);
        for (int64_t r = 0; r < sparge_block_rows(g->q_len, g->block_q, i); r++) {
            const int64_t some =
                best_pages(head, q, i * g->block_q + r, size, count, &means, score, x);
            for (int64_t e = 0; e < some; e++)
                sparge_pairs_range(head, &pairs, r, x[e].at * size, (x[e].at + 1) * size);
        }
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}
