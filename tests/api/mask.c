/* SPDX-License-Identifier: Apache-2.0 */
/* mask.c: masks of single pairs against a byte for each pair: made, read, counted, converted,
 * attended over, and refused. Nothing here asks common/ what is visible.
 *
 * Linked with -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=free against a static library.
 */
#include "sparge_mask.h"

#include <math.h>
#include <string.h>

#include "sparge_inspect.h"
#include "tests/support/heap.h"
#include "tests/support/problem.h"

TestSuite(mask);

static sparge_error error;
#define fine(call) check((call) == SPARGE_OK && !error.text[0], "%s", error.text)

/* ---- Questions --------------------------------------------------------------------------------
 */

typedef struct scene {
    problem x;
    uint8_t *pairs; /* [batch][heads][q_len][k_len], invisible ones too */
    float *bias;    /* [batch][kv_heads][k_len] */
} scene;

static int64_t pair_count(const scene *s)
{
    return s->x.p.batch * s->x.p.heads * s->x.p.q_len * s->x.p.k_len;
}

static bool sees(const sparge_problem *p, const sparge_options *o, int64_t t, int64_t key)
{
    return o->causal == SPARGE_CAUSAL_NONE ||
           key <= t + (o->causal == SPARGE_CAUSAL_END ? p->k_len - p->q_len : 0);
}

static void any_blocks(sparge_options *o)
{
    o->block_q = check_int(1, 130);
    o->block_k = check_int(1, 130);
}

/* Rectangles of none, all, few, or half of their pairs. */
static void any_pairs(scene *s)
{
    const sparge_problem *p = &s->x.p;
    const int64_t high = check_int(1, 90), wide = check_int(1, 90);
    float share[64];
    for (int n = 0; n < 64; n++)
        share[n] = (const float[]){0.0f, 1.0f, 0.02f, 0.5f, 0.99f}[check_int(0, 4)];
    for (int64_t n = 0; n < pair_count(s); n++) {
        const int64_t key = n % p->k_len, t = n / p->k_len % p->q_len,
                      head = n / p->k_len / p->q_len;
        const float here = share[(head * 31 + t / high * 7 + key / wide) % 64];
        s->pairs[n] = check_uniform(0, 1) < here ? (uint8_t)check_int(1, 255) : 0;
    }
}

static scene scene_make(int n)
{
    check_case("scene %d", n);
    const int64_t kv = check_int(1, 2);
    shape size = shape_of(check_int(1, 2), kv * check_int(1, 2), kv, check_int(1, 140),
                          check_int(1, 140), 3, 2);
    if (n % 9 == 7)
        *(n % 2 ? &size.q_len : &size.k_len) = 0;
    if (n % 9 == 8)
        size.batch = 0;
    scene s = {.x = problem_make(&size)};
    s.x.o.causal = (sparge_causal)(n % 3);
    any_blocks(&s.x.o);
    s.pairs = check_alloc((size_t)pair_count(&s));
    const int64_t keys = size.batch * size.kv_heads * size.k_len;
    s.bias = check_alloc((size_t)keys * sizeof *s.bias);
    for (int64_t t = 0; t < keys; t++)
        s.bias[t] = check_int(0, 3) ? check_uniform(-2, 2) : -INFINITY;
    any_pairs(&s);
    return s;
}

static void scene_free(scene *s)
{
    problem_free(&s->x);
    check_free(s->pairs);
    check_free(s->bias);
}

/* Is pair (t, key) of a head, by the number of head and batch, attended? */
static bool attends(const scene *s, int64_t n, int64_t t, int64_t key)
{
    const sparge_problem *p = &s->x.p;
    return sees(p, &s->x.o, t, key) && s->pairs[(n * p->q_len + t) * p->k_len + key];
}

static bool hides(const scene *s, int64_t n, int64_t key)
{
    const sparge_problem *p = &s->x.p;
    return p->k_bias && p->k_bias[n / (p->heads / p->kv_heads) * p->k_len + key] == -INFINITY;
}

/* Of block (i, j) of head n. */
typedef struct contents {
    int64_t visible, attended, shown; /* shown: attended, and not hidden by a bias */
} contents;

static contents contents_of(const scene *s, int64_t n, int64_t i, int64_t j)
{
    const sparge_problem *p = &s->x.p;
    const int64_t bq = s->x.o.block_q, bk = s->x.o.block_k;
    contents c = {0};
    for (int64_t t = i * bq; t < (i + 1) * bq && t < p->q_len; t++)
        for (int64_t key = j * bk; key < (j + 1) * bk && key < p->k_len; key++) {
            c.visible += sees(p, &s->x.o, t, key);
            c.attended += attends(s, n, t, key);
            c.shown += attends(s, n, t, key) && !hides(s, n, key);
        }
    return c;
}

static int64_t partials_of(const sparge_mask *m)
{
    return m->partial_first ? m->partial_first[m->batch * m->heads * m->q_blocks] : 0;
}

/* ---- From pairs and back ----------------------------------------------------------------------
 */

/* Every block and every bit of a mask, and its order. */
static void check_mask(const scene *s, const sparge_mask *m)
{
    const sparge_options *o = &s->x.o;
    const int64_t words = blocks(o->block_k, 32);
    int64_t at = 0;
    for (int64_t row = 0; row < m->batch * m->heads * m->q_blocks; row++) {
        const int64_t n = row / m->q_blocks, i = row % m->q_blocks;
        for (int64_t j = 0; j < m->k_blocks; j++) {
            const contents c = contents_of(s, n, i, j);
            const uint32_t *bits = sparge_mask_partial(m, o, n / m->heads, n % m->heads, i, j);
            check_equal(sparge_mask_get(m, n / m->heads, n % m->heads, i, j), c.attended > 0);
            check(!bits == (c.attended == 0 || c.attended == c.visible),
                  "block %d, %d of head %d: %d of %d", (int)i, (int)j, (int)n, (int)c.attended,
                  (int)c.visible);
            if (!bits)
                continue;
            check_equal(m->partial_first[row] <= at && at < m->partial_first[row + 1], true);
            check_equal((int64_t)m->partial_block[at++], j);
            int64_t set = 0;
            for (int64_t w = 0; w < o->block_q * words; w++)
                set += __builtin_popcount(bits[w]);
            check_equal(set, c.attended); /* invisible ones are not among them */
            for (int64_t t = i * o->block_q; t < (i + 1) * o->block_q && t < s->x.p.q_len; t++)
                for (int64_t k = 0; k < o->block_k && j * o->block_k + k < s->x.p.k_len; k++)
                    check_equal((bool)(bits[t % o->block_q * words + k / 32] >> k % 32 & 1),
                                attends(s, n, t, j * o->block_k + k));
        }
    }
    check_equal(at, partials_of(m));
}

/* Of a mask by three ways: the pairs that it attends to; NULL: dense. */
static void check_pairs(const scene *s, const sparge_mask *m)
{
    const sparge_problem *p = &s->x.p;
    const sparge_options *o = &s->x.o;
    const int64_t words = blocks(p->k_len, 32), q_blocks = blocks(p->q_len, o->block_q);
    uint8_t *got = check_alloc((size_t)pair_count(s));
    fine(sparge_mask_to_pairs(m, p, o, got, &error));
    for (int64_t at = 0; at < pair_count(s); at++) {
        const int64_t key = at % p->k_len, t = at / p->k_len % p->q_len,
                      n = at / p->k_len / p->q_len;
        check_equal(got[at], (uint8_t)(m ? attends(s, n, t, key) : sees(p, o, t, key)));
    }
    uint32_t *row = check_alloc((size_t)(o->block_q * words) * sizeof *row);
    for (int64_t n = 0; n < p->batch * p->heads * q_blocks; n++) {
        const int64_t head = n / q_blocks, i = n % q_blocks;
        sparge_mask_get_row(m, p, o, head / p->heads, head % p->heads, i, row);
        for (int64_t r = 0; r < o->block_q; r++)
            for (int64_t key = 0; key < 32 * words; key++) {
                const int64_t t = i * o->block_q + r;
                const bool inside = t < p->q_len && key < p->k_len;
                check_equal((bool)(row[r * words + key / 32] >> key % 32 & 1),
                            inside && got[(head * p->q_len + t) * p->k_len + key]);
            }
    }
    check_free(row);
    check_free(got);
}

static void same_mask(const sparge_mask *got, const sparge_mask *want, const sparge_options *o)
{
    const int64_t rows = want->batch * want->heads * want->q_blocks, n = partials_of(want);
    check_same(got->bits, want->bits, rows * want->words);
    check_equal(partials_of(got), n);
    if (n == 0)
        return;
    check_same(got->partial_first, want->partial_first, rows + 1);
    check_same(got->partial_block, want->partial_block, n);
    check_same(got->partial_bits, want->partial_bits, n * o->block_q * blocks(o->block_k, 32));
}

Test(mask, from_pairs_and_back)
{
    for (int n = 0; n < 54; n++) {
        scene s = scene_make(n);
        sparge_mask m, other, back, want;
        fine(sparge_mask_from_pairs(&m, &s.x.p, &s.x.o, s.pairs, &error));
        check_mask(&s, &m);
        check_pairs(&s, &m);
        check_pairs(&s, NULL);
        sparge_options to = s.x.o;
        any_blocks(&to);
        if (n % 4 == 3)
            to.block_q = s.x.o.block_q;
        fine(sparge_mask_convert(&m, &s.x.p, &s.x.o, &to, &other, &error));
        fine(sparge_mask_from_pairs(&want, &s.x.p, &to, s.pairs, &error));
        same_mask(&other, &want, &to);
        fine(sparge_mask_convert(&other, &s.x.p, &to, &s.x.o, &back, &error));
        same_mask(&back, &m, &s.x.o);
        sparge_mask_free(&other);
        sparge_mask_free(&back);
        sparge_mask_free(&want);
        /* Dense is all that is visible. */
        memset(s.pairs, 1, (size_t)pair_count(&s));
        fine(sparge_mask_convert(NULL, &s.x.p, &s.x.o, &s.x.o, &other, &error));
        check_mask(&s, &other);
        sparge_mask_free(&other);
        sparge_mask_free(&m);
        scene_free(&s);
    }
}

/* Whole blocks, also where no row sees them, and bits of pairs that causality hides. */
Test(mask, invisible_pairs_are_ignored)
{
    for (int n = 0; n < 12; n++) {
        scene s = scene_make(n);
        const sparge_problem *p = &s.x.p;
        const sparge_options *o = &s.x.o;
        mask_fill(&s.x, 0.5f);
        sparge_mask *m = &s.x.mask, part;
        for (int64_t at = 0; at < pair_count(&s); at++)
            s.pairs[at] = mask_has(
                &s.x, at / p->k_len / p->q_len / p->heads, at / p->k_len / p->q_len % p->heads,
                at / p->k_len % p->q_len / o->block_q, at % p->k_len / o->block_k);
        check_pairs(&s, m);
        any_pairs(&s);
        fine(sparge_mask_from_pairs(&part, p, o, s.pairs, &error));
        const int64_t words = blocks(o->block_k, 32);
        for (int64_t row = 0, at = 0; row < part.batch * part.heads * part.q_blocks; row++)
            for (; part.partial_first && at < part.partial_first[row + 1]; at++)
                for (int64_t r = 0; r < o->block_q; r++)
                    for (int64_t k = 0; k < 32 * words; k++) {
                        const int64_t t = row % part.q_blocks * o->block_q + r,
                                      key = part.partial_block[at] * o->block_k + k;
                        if (t >= p->q_len || k >= o->block_k || key >= p->k_len ||
                            !sees(p, o, t, key))
                            part.partial_bits[(at * o->block_q + r) * words + k / 32] |= UINT32_C(1)
                                                                                         << k % 32;
                    }
        check_pairs(&s, &part);
        sparge_mask_free(&part);
        scene_free(&s);
    }
}

/* ---- Counts, and attention --------------------------------------------------------------------
 */

static void check_counts(const scene *s, const sparge_mask *m, const sparge_counts *got)
{
    const sparge_problem *p = &s->x.p;
    for (int64_t n = 0; n < p->batch * p->heads; n++) {
        sparge_counts want = {0};
        for (int64_t i = 0; i < blocks(p->q_len, s->x.o.block_q); i++)
            for (int64_t j = 0; j < blocks(p->k_len, s->x.o.block_k); j++) {
                const contents c = contents_of(s, n, i, j);
                const bool done =
                    c.visible && (!m || sparge_mask_get(m, n / p->heads, n % p->heads, i, j));
                want.pairs += c.visible > 0;
                want.tokens += c.visible;
                want.qk_done += done;
                want.tile_tokens += done ? c.visible : 0;
                want.qk_tokens += c.shown;
            }
        want.pv_done = (double)want.qk_done;
        want.pv_tokens = want.qk_tokens;
        check(got[n].pv_done > want.pv_done - 1e-9 && got[n].pv_done < want.pv_done + 1e-9, "%g",
              got[n].pv_done);
        want.pv_done = got[n].pv_done;
        same_counts(&got[n], &want);
        check_equal(sparge_density_tokens(&want),
                    want.tokens ? (double)want.qk_tokens / (double)want.tokens : 0.0);
        check_equal(sparge_density_blocks(&want),
                    want.pairs ? (double)want.qk_done / (double)want.pairs : 0.0);
    }
}

/* The softmax of one row, by the book. */
static double row_by_book(const scene *s, int64_t n, int64_t t, double o[2])
{
    const problem *x = &s->x;
    const int64_t b = n / x->p.heads, h = n % x->p.heads, kv = h / (x->p.heads / x->p.kv_heads);
    const float *q = tensor_row(&x->q, b, h, t);
    double sum = 0.0; /* scores are small */
    o[0] = o[1] = 0.0;
    for (int64_t key = 0; key < x->p.k_len; key++) {
        if (!attends(s, n, t, key) || hides(s, n, key))
            continue;
        const float *k = tensor_row(&x->k, b, kv, key), *v = tensor_row(&x->v, b, kv, key);
        double score = 0.0;
        for (int c = 0; c < 3; c++)
            score += (double)q[c] * (double)k[c] * (double)(1.0f / sqrtf(3.0f));
        if (x->p.k_bias)
            score += (double)x->p.k_bias[(b * x->p.kv_heads + kv) * x->p.k_len + key];
        sum += exp(score);
        for (int c = 0; c < 2; c++)
            o[c] += exp(score) * (double)v[c];
    }
    for (int c = 0; c < 2 && sum > 0.0; c++)
        o[c] /= sum;
    return log(sum);
}

Test(mask, counts_and_attention)
{
    for (int n = 0; n < 40; n++) {
        scene s = scene_make(n);
        sparge_problem *p = &s.x.p;
        const int64_t rows = problem_rows(&s.x);
        s.x.o.thresholds.lambda = -INFINITY;
        fine(sparge_mask_from_pairs(&s.x.mask, p, &s.x.o, s.pairs, &error));
        sparge_counts *counts = check_alloc((size_t)(p->batch * p->heads) * sizeof *counts);
        double *o = check_alloc((size_t)(rows * 2) * sizeof *o),
               *lse = check_alloc((size_t)rows * sizeof *lse);
        for (int biased = 0; biased < 2; biased++) {
            p->k_bias = biased ? s.bias : NULL;
            fine(sparge_mask_count(&s.x.mask, p, &s.x.o, counts, &error));
            check_counts(&s, &s.x.mask, counts);
            answer a = attend(&s.x);
            for (int64_t h = 0; h < p->batch * p->heads; h++)
                same_counts(&counts[h], &a.head[h]);
            fine(sparge_oracle(p, &s.x.o, &s.x.mask, SPARGE_ORACLE_REAL, o, lse, NULL, &error));
            for (int64_t row = 0; row < rows; row++) {
                double want[2];
                const double want_lse = row_by_book(&s, row / p->q_len, row % p->q_len, want);
                check_close(lse[row], want_lse, 1e-12);
                check_close(a.lse[row], want_lse, 1e-5);
                for (int c = 0; c < 2; c++) {
                    check_close(o[row * 2 + c], want[c], 1e-12);
                    check_close(a.o.x[row * 2 + c], want[c], 1e-5);
                }
            }
            answer_free(&a);
        }
        /* Dense, with a key that its bias hides; what attention counts as well. */
        sparge_mask_free(&s.x.mask);
        memset(s.pairs, 1, (size_t)pair_count(&s));
        fine(sparge_mask_count(NULL, p, &s.x.o, counts, &error));
        check_counts(&s, NULL, counts);
        answer a = attend(&s.x);
        for (int64_t h = 0; h < p->batch * p->heads; h++)
            same_counts(&counts[h], &a.head[h]);
        answer_free(&a);
        check_free(counts);
        check_free(o);
        check_free(lse);
        scene_free(&s);
    }
}

/* ---- What is refused --------------------------------------------------------------------------
 */

/* 1 batch, 1 head, 3 x 3 blocks of 4 x 4; every block is attended in part. */
static scene small(sparge_mask *m)
{
    check_case("3 x 3 blocks");
    const shape size = shape_of(1, 1, 1, 12, 12, 3, 2);
    scene s = {.x = problem_make(&size)};
    s.x.o.block_q = s.x.o.block_k = 4;
    s.pairs = check_alloc(144);
    s.bias = check_alloc(0);
    for (int n = 0; n < 144; n++)
        s.pairs[n] = n / 12 % 4 != n % 4;
    fine(sparge_mask_from_pairs(m, &s.x.p, &s.x.o, s.pairs, &error));
    check_equal(partials_of(m), (int64_t)9);
    return s;
}

static void refused(const scene *s, const sparge_mask *m, const char *says)
{
    const sparge_problem *p = &s->x.p;
    const sparge_options *o = &s->x.o;
    float out[24];
    double lse[12];
    uint8_t pairs[144];
    sparge_counts counts;
    sparge_mask to;
    sparge_result result = {.o = {out, SPARGE_F32, 24, 24, 2}};
    for (int call = 0; call < 5; call++) {
        error.text[0] = '\0';
        const sparge_status status =
            call == 0   ? sparge_attend(p, o, m, &result, &error)
            : call == 1 ? sparge_oracle(p, o, m, SPARGE_ORACLE_REAL, NULL, lse, NULL, &error)
            : call == 2 ? sparge_mask_count(m, p, o, &counts, &error)
            : call == 3 ? sparge_mask_to_pairs(m, p, o, pairs, &error)
                        : sparge_mask_convert(m, p, o, o, &to, &error);
        check(status == SPARGE_ERR_ARGUMENT && strcmp(error.text, says) == 0,
              "call %d: %d, \"%s\", not \"%s\"", call, (int)status, error.text, says);
    }
}

Test(mask, partial_blocks_are_checked)
{
    sparge_mask m;
    scene s = small(&m);
    const struct {
        int64_t at; /* of partial_block, or 100 + of partial_first */
        int64_t value;
        const char *says;
    } table[] = {
        {100, 1, "mask.partial_first[0] is 1, not 0"},
        {100, -1, "mask.partial_first[0] is -1, not 0"},
        {101, -1, "mask.partial_first falls at 0"},
        {102, 2, "mask.partial_first falls at 1"},
        {0, -1, "block (0, 0, 0, -1) of the mask is not in the mask"},
        {8, 3, "block (0, 0, 2, 3) of the mask is not in the mask"},
        {4, 0, "block (0, 0, 1, 0) of the mask is attended in part twice"},
        {5, 0, "block (0, 0, 1, 0) of the mask is attended in part after a later one"},
    };
    for (size_t n = 0; n < sizeof table / sizeof *table; n++) {
        int64_t *const first = table[n].at < 100 ? NULL : &m.partial_first[table[n].at - 100];
        int32_t *const block = table[n].at < 100 ? &m.partial_block[table[n].at] : NULL;
        const int64_t before = first ? *first : *block;
        if (first)
            *first = table[n].value;
        else
            *block = (int32_t)table[n].value;
        refused(&s, &m, table[n].says);
        if (first)
            *first = before;
        else
            *block = (int32_t)before;
    }
    sparge_mask_set(&m, 0, 0, 1, 2, false);
    refused(&s, &m, "block (0, 0, 1, 2) of the mask is attended in part and not kept");
    sparge_mask_set(&m, 0, 0, 1, 2, true);
    sparge_mask lacking = m;
    lacking.partial_block = NULL;
    refused(&s, &lacking, "mask.partial_block is NULL beside partial_first");
    lacking.partial_block = m.partial_block;
    lacking.partial_bits = NULL;
    refused(&s, &lacking, "mask.partial_bits is NULL beside partial_first");
    lacking.partial_first = NULL; /* all are whole, and nobody looks at the others */
    float out[24];
    sparge_result result = {.o = {out, SPARGE_F32, 24, 24, 2}};
    fine(sparge_attend(&s.x.p, &s.x.o, &lacking, &result, &error));
    check_equal(result.counts.qk_tokens, (int64_t)144);
    result.mask = &m;
    check_equal(sparge_attention(&s.x.p, &s.x.o, &result, &error), SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "which a prediction cannot set"), "%s", error.text);
    sparge_mask_free(&m);
    const sparge_mask empty = {0};
    check(!memcmp(&m, &empty, sizeof m), "a freed mask is not empty");
    scene_free(&s);
}

/* Rows in ascending order; what is refused changes nothing. */
Test(mask, rows_are_set_in_order)
{
    sparge_mask m, before;
    scene s = small(&m);
    const sparge_problem *p = &s.x.p;
    uint32_t row[3][4], all[4] = {0xFFF, 0xFFF, 0xFFF, 0xFFF};
    for (int64_t i = 0; i < 3; i++)
        sparge_mask_get_row(&m, p, &s.x.o, 0, 0, i, row[i]);
    fine(sparge_mask_alloc(&before, p, &s.x.o, &error));
    for (int64_t i = 0; i < 3; i++)
        fine(sparge_mask_set_row(&before, p, &s.x.o, 0, 0, i, row[i], &error));
    same_mask(&before, &m, &s.x.o);
    for (int64_t i = 0; i < 2; i++) {
        check_equal(sparge_mask_set_row(&m, p, &s.x.o, 0, 0, i, all, &error), SPARGE_ERR_ARGUMENT);
        check(strstr(error.text, "is set after a later one, or twice"), "%s", error.text);
        same_mask(&m, &before, &s.x.o);
    }
    const struct {
        int64_t b, h, i;
        bool mask, pairs;
        const char *says;
    } table[] = {
        {1, 0, 0, true, true, "row (1, 0, 0) is not in a mask of [1, 1, 3]"},
        {0, -1, 0, true, true, "row (0, -1, 0) is not in a mask of [1, 1, 3]"},
        {0, 0, 3, true, true, "row (0, 0, 3) is not in a mask of [1, 1, 3]"},
        {0, 0, 0, false, true, "mask is NULL"},
        {0, 0, 0, true, false, "pairs is NULL"},
    };
    for (size_t n = 0; n < sizeof table / sizeof *table; n++) {
        check_equal(sparge_mask_set_row(table[n].mask ? &m : NULL, p, &s.x.o, table[n].b,
                                        table[n].h, table[n].i, table[n].pairs ? all : NULL,
                                        &error),
                    SPARGE_ERR_ARGUMENT);
        check(strcmp(error.text, table[n].says) == 0, "\"%s\"", error.text);
    }
    same_mask(&m, &before, &s.x.o);
    sparge_mask_free(&before);
    sparge_options larger = s.x.o;
    larger.block_q = 5;
    larger.block_k = 6;
    check_equal(sparge_mask_set_row(&m, p, &larger, 0, 0, 0, all, &error), SPARGE_ERR_SHAPE);
    check_equal(sparge_mask_convert(&m, p, &larger, &s.x.o, &before, &error), SPARGE_ERR_SHAPE);
    check_equal(sparge_mask_convert(&m, p, &s.x.o, &s.x.o, &m, &error), SPARGE_ERR_ARGUMENT);
    check(strcmp(error.text, "to is from, it must be another mask") == 0, "%s", error.text);
    check_equal(sparge_mask_to_pairs(NULL, p, &s.x.o, NULL, &error), SPARGE_ERR_ARGUMENT);
    check(strcmp(error.text, "pairs is NULL") == 0, "%s", error.text);
    check_equal(sparge_mask_count(NULL, p, &s.x.o, NULL, &error), SPARGE_ERR_ARGUMENT);
    check(strcmp(error.text, "head_counts is NULL") == 0, "%s", error.text);
    check_equal(sparge_mask_from_pairs(&before, p, &s.x.o, NULL, &error), SPARGE_ERR_ARGUMENT);
    check(strcmp(error.text, "pairs is NULL") == 0 && !before.bits, "%s", error.text);
    sparge_mask_free(&m);
    scene_free(&s);
}

/* Each allocation fails in turn: no memory, and nothing is left. */
Test(mask, starved)
{
    sparge_mask m, to;
    scene s = small(&m);
    uint8_t pairs[144];
    float bias[12] = {0};
    sparge_counts counts;
    sparge_problem p = s.x.p;
    p.k_bias = bias;
    for (int call = 0; call < 4; call++) {
        sparge_status status = SPARGE_ERR_MEMORY;
        int64_t n = 0;
        for (; status == SPARGE_ERR_MEMORY; n++) {
            check_case("call %d, allocation %d", call, (int)n);
            to = (sparge_mask){0};
            heap_arm(n);
            status = call == 0   ? sparge_mask_from_pairs(&to, &p, &s.x.o, s.pairs, NULL)
                     : call == 1 ? sparge_mask_convert(&m, &p, &s.x.o, &s.x.o, &to, NULL)
                     : call == 2 ? sparge_mask_to_pairs(&m, &p, &s.x.o, pairs, NULL)
                                 : sparge_mask_count(&m, &p, &s.x.o, &counts, NULL);
            if (status)
                check_equal(heap.live, (int64_t)0);
            heap.armed = false;
            sparge_mask_free(&to);
        }
        check(status == SPARGE_OK && n > 1, "%d after %d", (int)status, (int)n);
    }
    sparge_mask_free(&m);
    scene_free(&s);
}
