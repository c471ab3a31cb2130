/* SPDX-License-Identifier: Apache-2.0 */
/* mask.c: masks of blocks and of single pairs. Everything goes through rows of blocks: a row's
 * pairs are read or set, in bits, and the rest is loops over rows. */
#include "api/api.h"

#include <stdlib.h>
#include <string.h>

#include "common/block_mask.h"
#include "common/counts.h"
#include "common/softmax.h"
#include "sparge_mask.h"

/* ---- Shape and memory ---- */

sparge_status sparge_mask_shape(sparge_mask *mask, const sparge_problem *p, const sparge_options *o,
                                sparge_error *error)
{
    const sparge_geometry g = sparge_geometry_of(p, o);
    const int64_t words = sparge_mask_row_words(g.k_blocks);
    if (!sparge_fits(p->batch, p->heads, g.q_blocks, words, sizeof *mask->bits))
        return sparge_fail(error, SPARGE_ERR_SHAPE, "mask of %lld x %lld blocks a head overflows",
                           (long long)g.q_blocks, (long long)g.k_blocks);
    *mask = (sparge_mask){.batch = p->batch,
                          .heads = p->heads,
                          .q_blocks = g.q_blocks,
                          .k_blocks = g.k_blocks,
                          .words = words};
    return SPARGE_OK;
}

sparge_status sparge_mask_alloc_bits(sparge_mask *mask, sparge_error *error)
{
    const int64_t total = mask->batch * mask->heads * mask->q_blocks * mask->words;
    mask->bits = calloc(total ? (size_t)total : 1, sizeof *mask->bits);
    return mask->bits ? SPARGE_OK : sparge_fail(error, SPARGE_ERR_MEMORY, "out of memory");
}

sparge_status sparge_mask_alloc(sparge_mask *mask, const sparge_problem *problem,
                                const sparge_options *options, sparge_error *error)
{
    if (!mask)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "mask is NULL");
    *mask = (sparge_mask){0};
    sparge_mask shape;
    sparge_status status = sparge_check(problem, options, false, NULL, error);
    if (!status)
        status = sparge_mask_shape(&shape, problem, options, error);
    if (!status)
        status = sparge_mask_alloc_bits(&shape, error);
    if (!status)
        *mask = shape;
    return status;
}

void sparge_mask_free(sparge_mask *mask)
{
    if (mask) {
        free(mask->bits);
        free(mask->partial_first);
        free(mask->partial_block);
        free(mask->partial_bits);
        *mask = (sparge_mask){0};
    }
}

/* ---- Single blocks ---- */

static int64_t line_of(const sparge_mask *mask, int64_t batch, int64_t head, int64_t i)
{
    return (batch * mask->heads + head) * mask->q_blocks + i;
}

static uint32_t *row_of(const sparge_mask *mask, int64_t batch, int64_t head, int64_t i)
{
    return mask->bits + line_of(mask, batch, head, i) * mask->words;
}

bool sparge_mask_get(const sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j)
{
    return sparge_mask_row_get(row_of(mask, batch, head, i), j);
}

void sparge_mask_set(sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j,
                     bool keep)
{
    uint32_t *row = row_of(mask, batch, head, i);
    if (keep)
        sparge_mask_row_set(row, j);
    else
        sparge_mask_row_clear(row, j);
}

const uint32_t *sparge_mask_partial(const sparge_mask *mask, const sparge_options *options,
                                    int64_t batch, int64_t head, int64_t i, int64_t j)
{
    return sparge_mask_partial_at(mask, line_of(mask, batch, head, i), j, options->block_q,
                                  options->block_k);
}

/* ---- Rows of blocks ---- */

/* Key block j and the queries of a row of blocks. */
typedef struct block {
    const sparge_geometry *g;
    int64_t first, queries; /* tokens */
    int64_t j, words;       /* words of one query's keys */
} block;

static block block_at(const sparge_geometry *g, int64_t i, int64_t j)
{
    return (block){g, i * g->block_q, sparge_block_rows(g->q_len, g->block_q, i), j,
                   sparge_mask_row_words(g->block_k)};
}

/* Which of the 32 keys from 32 * word on query r may see. */
static uint32_t visible_word(const block *x, int64_t r, int64_t word)
{
    return sparge_mask_row_word(NULL, word, sparge_keys_visible(x->g, x->first + r, x->j));
}

/* Which of them it attends to; pairs: of the row of blocks, or of the block itself. */
static uint32_t attended_word(const block *x, int64_t r, int64_t word, const uint32_t *pairs,
                              int64_t first_key, int64_t pair_words)
{
    return visible_word(x, r, word) &
           sparge_mask_row_bits(pairs + r * pair_words, first_key + 32 * word, pair_words);
}

/* How many pairs it attends to. `partial` is NULL: it is attended whole; `shown`, a bit for each
 * key that its bias does not hide, is NULL: none is hidden. */
static int64_t count_attended(const block *x, const uint32_t *partial, const uint32_t *shown)
{
    int64_t count = 0;
    if (!partial && !shown)
        return sparge_pairs_visible(x->g, x->first, x->queries, x->j);
    for (int64_t r = 0; r < x->queries; r++)
        for (int64_t word = 0; word < x->words; word++) {
            uint32_t bits = partial ? attended_word(x, r, word, partial, 0, x->words)
                                    : visible_word(x, r, word);
            if (shown)
                bits &= sparge_mask_row_bits(shown, x->j * x->g->block_k + 32 * word,
                                             sparge_mask_row_words(x->g->k_len));
            count += __builtin_popcount(bits);
        }
    return count;
}

enum attended { NOTHING, PARTLY, WHOLE };

static enum attended attended(const block *x, const uint32_t *pairs, int64_t pair_words)
{
    bool some = false, all = true;
    for (int64_t r = 0; r < x->queries; r++)
        for (int64_t word = 0; word < x->words; word++) {
            const uint32_t bits =
                attended_word(x, r, word, pairs, x->j * x->g->block_k, pair_words);
            some = some || bits;
            all = all && bits == visible_word(x, r, word);
        }
    return !some ? NOTHING : all ? WHOLE : PARTLY;
}

/* Room for so many more partly attended blocks in row `line`, the last that has any. */
static bool grow(sparge_mask *mask, const sparge_geometry *g, int64_t line, int64_t more)
{
    const int64_t lines = mask->batch * mask->heads * mask->q_blocks;
    const int64_t words = g->block_q * sparge_mask_row_words(g->block_k);
    if (!mask->partial_first)
        mask->partial_first = calloc((size_t)lines + 1, sizeof *mask->partial_first);
    if (!mask->partial_first)
        return false;
    const int64_t partials = mask->partial_first[lines] + more;
    int32_t *blocks = realloc(mask->partial_block, (size_t)partials * sizeof *blocks);
    if (blocks)
        mask->partial_block = blocks;
    uint32_t *bits = realloc(mask->partial_bits, (size_t)(partials * words) * sizeof *bits);
    if (bits)
        mask->partial_bits = bits;
    for (int64_t n = line + 1; n <= lines && blocks && bits; n++)
        mask->partial_first[n] = partials;
    return blocks && bits;
}

static sparge_status set_row(sparge_mask *mask, const sparge_geometry *g, int64_t line, int64_t i,
                             const uint32_t *pairs, sparge_error *error)
{
    const int64_t lines = mask->batch * mask->heads * mask->q_blocks;
    const int64_t visible = sparge_blocks_visible(g, i);
    const int64_t words = sparge_mask_row_words(g->block_k),
                  pair_words = sparge_mask_row_words(g->k_len);
    uint32_t *row = mask->bits + line * mask->words;
    int64_t at = mask->partial_first ? mask->partial_first[line] : 0, partials = 0;
    if (mask->partial_first && at != mask->partial_first[lines])
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "row %lld of the mask is set after a later one, or twice",
                           (long long)line);
    memset(row, 0, (size_t)mask->words * sizeof *row);
    for (int64_t j = 0; j < visible; j++) {
        const block x = block_at(g, i, j);
        const enum attended some = attended(&x, pairs, pair_words);
        partials += some == PARTLY;
        if (some)
            sparge_mask_row_set(row, j);
    }
    if (partials == 0)
        return SPARGE_OK;
    if (!grow(mask, g, line, partials))
        return sparge_fail(error, SPARGE_ERR_MEMORY, "out of memory");
    for (int64_t j = sparge_mask_row_next(row, 0, visible); j < visible;
         j = sparge_mask_row_next(row, j + 1, visible)) {
        const block x = block_at(g, i, j);
        if (attended(&x, pairs, pair_words) != PARTLY)
            continue;
        uint32_t *bits = mask->partial_bits + at * g->block_q * words;
        memset(bits, 0, (size_t)(g->block_q * words) * sizeof *bits);
        for (int64_t r = 0; r < x.queries; r++)
            for (int64_t word = 0; word < words; word++)
                bits[r * words + word] =
                    attended_word(&x, r, word, pairs, j * g->block_k, pair_words);
        mask->partial_block[at++] = (int32_t)j;
    }
    return SPARGE_OK;
}

static void get_row(const sparge_mask *mask, const sparge_geometry *g, int64_t line, int64_t i,
                    uint32_t *pairs)
{
    const int64_t pair_words = sparge_mask_row_words(g->k_len);
    const int64_t visible = sparge_blocks_visible(g, i);
    const uint32_t *row = mask ? mask->bits + line * mask->words : NULL;
    memset(pairs, 0, (size_t)(g->block_q * pair_words) * sizeof *pairs);
    for (int64_t j = sparge_mask_row_next(row, 0, visible); j < visible;
         j = sparge_mask_row_next(row, j + 1, visible)) {
        const block x = block_at(g, i, j);
        const uint32_t *partial = sparge_mask_partial_at(mask, line, j, g->block_q, g->block_k);
        for (int64_t r = 0; r < x.queries; r++)
            for (int64_t word = 0; word < x.words; word++) {
                const int64_t key = j * g->block_k + 32 * word, shift = key & 31;
                const uint32_t bits = partial ? attended_word(&x, r, word, partial, 0, x.words)
                                              : visible_word(&x, r, word);
                uint32_t *to = pairs + r * pair_words + (key >> 5);
                if (bits << shift)
                    to[0] |= bits << shift;
                if (shift && bits >> (32 - shift))
                    to[1] |= bits >> (32 - shift);
            }
    }
}

sparge_status sparge_mask_set_row(sparge_mask *mask, const sparge_problem *problem,
                                  const sparge_options *options, int64_t batch, int64_t head,
                                  int64_t i, const uint32_t *pairs, sparge_error *error)
{
    if (!mask || !pairs)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL", mask ? "pairs" : "mask");
    sparge_status status = sparge_check(problem, options, false, mask, error);
    if (!status && (batch < 0 || batch >= mask->batch || head < 0 || head >= mask->heads || i < 0 ||
                    i >= mask->q_blocks))
        status =
            sparge_fail(error, SPARGE_ERR_ARGUMENT,
                        "row (%lld, %lld, %lld) is not in a mask of [%lld, %lld, %lld]",
                        (long long)batch, (long long)head, (long long)i, (long long)mask->batch,
                        (long long)mask->heads, (long long)mask->q_blocks);
    const sparge_geometry g = status ? (sparge_geometry){0} : sparge_geometry_of(problem, options);
    return status ? status : set_row(mask, &g, line_of(mask, batch, head, i), i, pairs, error);
}

void sparge_mask_get_row(const sparge_mask *mask, const sparge_problem *problem,
                         const sparge_options *options, int64_t batch, int64_t head, int64_t i,
                         uint32_t *pairs)
{
    const sparge_geometry g = sparge_geometry_of(problem, options);
    get_row(mask, &g, mask ? line_of(mask, batch, head, i) : 0, i, pairs);
}

/* ---- Whole masks ---- */

/* The pairs of a row of blocks; NULL: no memory. */
static uint32_t *alloc_pairs(const sparge_geometry *g, sparge_error *error)
{
    const int64_t words = g->block_q * sparge_mask_row_words(g->k_len);
    uint32_t *pairs = calloc((size_t)words + 1, sizeof *pairs);
    if (!pairs)
        sparge_fail(error, SPARGE_ERR_MEMORY, "out of memory");
    return pairs;
}

sparge_status sparge_mask_from_pairs(sparge_mask *mask, const sparge_problem *problem,
                                     const sparge_options *options, const uint8_t *pairs,
                                     sparge_error *error)
{
    sparge_status status = sparge_mask_alloc(mask, problem, options, error);
    if (status)
        return status;
    const sparge_geometry g = sparge_geometry_of(problem, options);
    const int64_t words = sparge_mask_row_words(g.k_len);
    uint32_t *row = alloc_pairs(&g, error);
    if (!row)
        status = SPARGE_ERR_MEMORY;
    else if (!pairs && g.q_len && g.k_len && problem->batch)
        status = sparge_fail(error, SPARGE_ERR_ARGUMENT, "pairs is NULL");
    const int64_t lines = mask->batch * mask->heads * mask->q_blocks;
    for (int64_t line = 0; line < lines && !status; line++) {
        const int64_t i = line % g.q_blocks, n = line / g.q_blocks;
        memset(row, 0, (size_t)(g.block_q * words) * sizeof *row);
        for (int64_t r = 0; r < sparge_block_rows(g.q_len, g.block_q, i); r++) {
            const uint8_t *from = pairs + (n * g.q_len + i * g.block_q + r) * g.k_len;
            for (int64_t t = 0; t < g.k_len; t++)
                row[r * words + t / 32] |= (uint32_t)(from[t] != 0) << t % 32;
        }
        status = set_row(mask, &g, line, i, row, error);
    }
    free(row);
    if (status)
        sparge_mask_free(mask);
    return status;
}

/* What the functions that read a mask check. */
static sparge_status check_mask(const sparge_mask *mask, const sparge_problem *p,
                                const sparge_options *o, const void *array, const char *name,
                                sparge_error *error)
{
    sparge_status status = sparge_check(p, o, false, mask, error);
    if (!status && mask)
        status = sparge_check_partials(mask, error);
    if (!status && !array && p->batch && p->q_len)
        status = sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL", name);
    return status;
}

sparge_status sparge_mask_to_pairs(const sparge_mask *mask, const sparge_problem *problem,
                                   const sparge_options *options, uint8_t *pairs,
                                   sparge_error *error)
{
    const sparge_status status = check_mask(mask, problem, options, pairs, "pairs", error);
    if (status)
        return status;
    const sparge_geometry g = sparge_geometry_of(problem, options);
    const int64_t words = sparge_mask_row_words(g.k_len);
    uint32_t *row = alloc_pairs(&g, error);
    for (int64_t line = 0; line < problem->batch * problem->heads * g.q_blocks && row; line++) {
        const int64_t i = line % g.q_blocks, n = line / g.q_blocks;
        get_row(mask, &g, line, i, row);
        for (int64_t r = 0; r < sparge_block_rows(g.q_len, g.block_q, i); r++)
            for (int64_t t = 0; t < g.k_len; t++)
                pairs[(n * g.q_len + i * g.block_q + r) * g.k_len + t] =
                    sparge_mask_row_get(row + r * words, t);
    }
    free(row);
    return row ? SPARGE_OK : SPARGE_ERR_MEMORY;
}

sparge_status sparge_mask_convert(const sparge_mask *from, const sparge_problem *problem,
                                  const sparge_options *options, const sparge_options *to_options,
                                  sparge_mask *to, sparge_error *error)
{
    sparge_status status = check_mask(from, problem, options, "", "", error);
    if (!status && to && to == from)
        status = sparge_fail(error, SPARGE_ERR_ARGUMENT, "to is from, it must be another mask");
    if (!status)
        status = sparge_mask_alloc(to, problem, to_options, error);
    if (status)
        return status;
    const sparge_geometry g = sparge_geometry_of(problem, options),
                          t = sparge_geometry_of(problem, to_options);
    const int64_t words = sparge_mask_row_words(g.k_len);
    uint32_t *row = alloc_pairs(&g, error), *to_row = row ? alloc_pairs(&t, error) : NULL;
    int64_t held = -1; /* row of blocks in `row` */
    status = to_row ? SPARGE_OK : SPARGE_ERR_MEMORY;
    for (int64_t line = 0; line < to->batch * to->heads * to->q_blocks && !status; line++) {
        const int64_t i = line % t.q_blocks, n = line / t.q_blocks;
        for (int64_t r = 0; r < sparge_block_rows(t.q_len, t.block_q, i); r++) {
            const int64_t token = i * t.block_q + r, from_i = token / g.block_q;
            if (held != n * g.q_blocks + from_i) {
                held = n * g.q_blocks + from_i;
                get_row(from, &g, held, from_i, row);
            }
            memcpy(to_row + r * words, row + token % g.block_q * words,
                   (size_t)words * sizeof *row);
        }
        status = set_row(to, &t, line, i, to_row, error);
    }
    free(row);
    free(to_row);
    if (status)
        sparge_mask_free(to);
    return status;
}

sparge_status sparge_mask_count(const sparge_mask *mask, const sparge_problem *problem,
                                const sparge_options *options, sparge_counts *head_counts,
                                sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    const sparge_status status =
        check_mask(mask, problem, options, head_counts, "head_counts", error);
    if (status)
        return status;
    const sparge_geometry g = sparge_geometry_of(problem, options);
    const int64_t group = problem->heads / problem->kv_heads;
    uint32_t *shown = problem->k_bias ? alloc_pairs(&g, error) : NULL; /* more than its one row */
    if (problem->k_bias && !shown)
        return SPARGE_ERR_MEMORY;
    for (int64_t n = 0; n < problem->batch * problem->heads; n++) {
        sparge_tally tally = sparge_tally_zero();
        for (int64_t t = 0; t < g.k_len && shown && n % group == 0; t++) {
            if (sparge_bias_hides(problem->k_bias[n / group * g.k_len + t]))
                sparge_mask_row_clear(shown, t);
            else
                sparge_mask_row_set(shown, t);
        }
        for (int64_t i = 0; i < g.q_blocks; i++) {
            const int64_t line = n * g.q_blocks + i, visible = sparge_blocks_visible(&g, i);
            const uint32_t *row = mask ? mask->bits + line * mask->words : NULL;
            tally.pairs += visible;
            for (int64_t j = 0; j < visible; j++) {
                const block x = block_at(&g, i, j);
                const int64_t tokens = count_attended(&x, NULL, NULL);
                tally.tokens += tokens;
                if (row && !sparge_mask_row_get(row, j))
                    continue;
                const uint32_t *partial =
                    sparge_mask_partial_at(mask, line, j, g.block_q, g.block_k);
                tally.qk_done++;
                sparge_tally_rows(&tally, &g, i, x.queries, tokens,
                                  count_attended(&x, partial, shown), true);
            }
        }
        head_counts[n] = sparge_tally_counts(&tally, &g);
    }
    free(shown);
    return SPARGE_OK;
}
