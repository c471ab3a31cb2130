/* SPDX-License-Identifier: Apache-2.0 */
/* submass.c: masks of submass made by hand, and beside the textbook, SpargeAttn and the oracle. */
#include <math.h>
#include <string.h>

#include "common/geometry.h"
#include "sparge_inspect.h"
#include "tests/methods/hand.h"

TestSuite(submass);

#define LN(x) ((float)log(x))

/* Cells of 2 keys weigh w for a query of 1, and 1 / w for one of -1: their tokens are 1 above and
 * below that. Blocks of 4 x 4. */
static hand weights(const double *w, const float *q, int64_t q_len, float *k, int64_t k_len)
{
    for (int64_t t = 0; t < k_len; t++)
        k[t] = LN(w[t / 2]) + (t + 1 == k_len && t % 2 == 0 ? 0.0f : t % 2 ? 1.0f : -1.0f);
    hand x = hand_make(1, 1, q_len, k_len, 1, 1, q, k, k);
    x.o.block_q = x.o.block_k = 4;
    return x;
}

/* The first cell of queries pays 2 2 8 0.5 of 12.5, the second 2 2 0.5 8: .16 .16 .34 .34. The mean
 * of the whole block is 0, to which all keys weigh the same. An even share is .25. */
static const double quarters[] = {1, 1, 1, 1, 4, 4, 0.25, 0.25};
static const float signs[] = {1, 1, -1, -1};

Test(submass, masses_of_cells)
{
    float k[16];
    const hand x = weights(quarters, signs, 4, k, 16);
    HAS_PAIRS(&x, "submass", 4, "1111", 0.6, 2);
    HAS_PAIRS(&x, "submass", 4, "1011", 0.68, 2);
    HAS_PAIRS(&x, "submass", 4, "1011", 1.32, 2);
    HAS_PAIRS(&x, "submass", 4, "1", 1.4, 2);
    HAS_PAIRS(&x, "submass", 4, "1111", 0.96, 0);
    HAS_PAIRS(&x, "submass", 4, "1", 1.04, 0);
}

/* Equal to t is not above it. t 0 keeps also what has no weight at all. */
Test(submass, ends)
{
    static const double flat[] = {1, 1, 1, 1, 1, 1, 1, 1}, steep[] = {1, 1, 1e-20, 1e-20, 1, 1};
    float k[16];
    hand x = weights(flat, signs, 4, k, 16);
    HAS_PAIRS(&x, "submass", 4, "1", 1.0, 2);
    HAS_PAIRS(&x, "submass", 4, "1111", 0.9996, 2);
    x = weights(steep, signs, 2, k, 12);
    HAS_PAIRS(&x, "submass", 4, "101", 1e-30, 2);
    HAS_PAIRS(&x, "submass", 4, "111", 0.0, 2);
}

/* Three queries: cells of 2 and 1, so that the masses of the last blocks are .44 and .24. A key of
 * 0.25 alone in its cell is not halved by one that is not there: 2 2 8 1, with .24. An even share
 * is .25. */
Test(submass, short_cells)
{
    float k[15];
    const double w[] = {1, 1, 1, 1, 4, 4, 0.5, 0.5};
    hand x = weights(quarters, signs, 3, k, 16 - 1);
    HAS_PAIRS(&x, "submass", 4, "1011", 0.92, 2);
    HAS_PAIRS(&x, "submass", 4, "101", 1.0, 2);
    /* One query: 2 2 8 1 of 13, and 1 is .0769, .308 even shares. With half of ln 0.5 it were
     * .0905. */
    x = weights(w, signs, 1, k, 16 - 1);
    HAS_PAIRS(&x, "submass", 4, "1111", 0.304, 2);
    HAS_PAIRS(&x, "submass", 4, "111", 0.312, 2);
}

/* Row 2: its first cell pays 2 2 of 8, its second 2 2 of 32, to blocks 0 and 1: .156, of which an
 * even share is .333. */
Test(submass, causal)
{
    const double w[] = {1, 1, 1, 1, 4, 24};
    float q[12], k[12];
    for (int t = 0; t < 12; t++)
        q[t] = 1.0f;
    hand x = weights(w, q, 12, k, 12);
    x.o.causal = SPARGE_CAUSAL_END;
    HAS_PAIRS(&x, "submass", 4, "1 11 111", 0.45, 2);
    HAS_PAIRS(&x, "submass", 4, "1 11 101", 0.48, 2);
    HAS_PAIRS(&x, "submass", 4, "1 11 101", (double)INFINITY, 2);
    HAS_PAIRS(&x, "submass", 4, "1 11 111", 0.0, 2);
    x.p.q_len = 4; /* those of row 2 */
    HAS_PAIRS(&x, "submass", 4, "111", 0.45, 2);
    HAS_PAIRS(&x, "submass", 4, "101", 0.48, 2);
    x.o.causal = SPARGE_CAUSAL_START;
    HAS_PAIRS(&x, "submass", 4, "1", 0.45, 2);
}

Test(submass, products_are_counted)
{
    float k[15];
    hand x = weights(quarters, signs, 4, k, 15);
    x.o.causal = SPARGE_CAUSAL_END; /* cells of queries see 7 and 8 of keys */
    sparge_plan plan = hand_plan(&x, "submass", (const double[]){0.1, 2}, 2);
    check_equal(plan.multiply_adds, 7 + 8);
    sparge_plan_free(&plan);
}

/* ---- Random inputs ---- */

enum { Q_LEN = 83, K_LEN = 101, DIM = 8, HEADS = 4, KV_HEADS = 2 };

typedef struct input {
    float q[HEADS][Q_LEN][DIM], k[KV_HEADS][K_LEN][DIM];
} input;

/* Sums of tokens that stand near each other are not 0. whole: small whole numbers, whose sums are
 * exact. */
static hand input_make(input *in, bool whole)
{
    float topic[DIM] = {0};
    for (size_t n = 0; n < sizeof *in / sizeof(float); n++) {
        float *to = &((float *)in)[n], *const near = &topic[n % DIM];
        if (n / DIM % 12 == 0)
            *near = check_normal();
        *to = 1.5f * (check_normal() + *near);
        if (whole)
            *to = roundf(*to);
    }
    hand x = hand_make(HEADS, KV_HEADS, Q_LEN, K_LEN, DIM, DIM, &in->q[0][0][0], &in->k[0][0][0],
                       &in->k[0][0][0]);
    x.o.block_q = 24;
    x.o.block_k = 16;
    x.o.softmax_scale = 0.25f;
    return x;
}

/* The mask is what lies above a limit in masses[HEADS][q_blocks][k_blocks], beside the first block
 * and the diagonal. Masses within 1e-5 of it are left out. */
static void has_masses(const hand *x, const double *param, const double *masses)
{
    const sparge_geometry g = sparge_geometry_of(&x->p, &x->o);
    sparge_plan plan = hand_plan(x, "submass", param, 2);
    int chosen = 0, dropped = 0;
    for (int64_t row = 0; row < HEADS * g.q_blocks; row++) {
        const int64_t i = row % g.q_blocks, visible = sparge_blocks_visible(&g, i);
        const double *mass = masses + row * g.k_blocks;
        const double limit = param[0] / (double)g.k_blocks;
        for (int64_t j = 0; j < g.k_blocks; j++) {
            const bool forced = j < visible && (j == 0 || j >= sparge_first_diagonal(&g, i));
            const bool kept = sparge_mask_get(&plan.part[0].mask, 0, row / g.q_blocks, i, j);
            check(fabs(mass[j] - limit) < 1e-5 || kept == (forced || mass[j] > limit),
                  "row %lld, block %lld: %d, with a mass of %g against %g", (long long)row,
                  (long long)j, kept, mass[j], limit);
            chosen += kept && !forced;
            dropped += !kept && j < visible;
        }
    }
    check(chosen > 5 && dropped > 5, "%d and %d blocks", chosen, dropped);
    sparge_plan_free(&plan);
}

static void mean_of(const float *x, int64_t first, int64_t end, double *mean)
{
    for (int64_t c = 0; c < DIM; c++) {
        mean[c] = 0.0;
        for (int64_t t = first; t < end; t++)
            mean[c] += (double)x[t * DIM + c] / (double)(end - first);
    }
}

/* By the textbook. */
static void masses_of(const hand *x, const input *in, int64_t cell, double *masses)
{
    const sparge_geometry g = sparge_geometry_of(&x->p, &x->o);
    const int64_t cell_q = cell ? cell : g.block_q, cell_k = cell ? cell : g.block_k;
    memset(masses, 0, (size_t)(HEADS * g.q_blocks * g.k_blocks) * sizeof *masses);
    for (int64_t h = 0; h < HEADS; h++)
        for (int64_t first = 0; first < g.q_len; first += cell_q) {
            double weight[K_LEN], total = 0.0, q[DIM], k[DIM];
            const int64_t i = first / g.block_q, end = sparge_min(g.q_len, first + cell_q);
            mean_of(&in->q[h][0][0], first, end, q);
            for (int64_t key = 0; key < sparge_keys_of_query(&g, end - 1); key += cell_k) {
                double score = 0.0;
                mean_of(&in->k[h / 2][0][0], key, sparge_min(g.k_len, key + cell_k), k);
                for (int64_t c = 0; c < DIM; c++)
                    score += q[c] * k[c] * (double)x->o.softmax_scale;
                total += weight[key / cell_k] = exp(score);
            }
            for (int64_t key = 0; key < sparge_keys_of_query(&g, end - 1); key += cell_k)
                masses[(h * g.q_blocks + i) * g.k_blocks + key / g.block_k] +=
                    weight[key / cell_k] / total * (double)(end - first) /
                    (double)sparge_block_rows(g.q_len, g.block_q, i);
        }
}

/* Ragged ends, heads that share keys, all of causality. */
Test(submass, textbook)
{
    static input in;
    double masses[HEADS * 4 * 7];
    hand x = input_make(&in, false);
    for (int causal = SPARGE_CAUSAL_NONE; causal <= SPARGE_CAUSAL_START; causal++)
        for (int cell = 0; cell <= 8; cell += 4) {
            check_case("causal %d, cell %d", causal, cell);
            x.o.causal = (sparge_causal)causal;
            masses_of(&x, &in, cell, masses);
            has_masses(&x, (const double[]){0.8, cell}, masses);
        }
}

/* A cell of one token is a pair: these are the true masses. */
Test(submass, cells_of_one_token)
{
    static input in;
    double masses[HEADS * 4 * 7];
    sparge_error error;
    hand x = input_make(&in, false);
    x.o.causal = SPARGE_CAUSAL_END;
    check(sparge_oracle(&x.p, &x.o, NULL, SPARGE_ORACLE_REAL, NULL, NULL, masses, &error) ==
              SPARGE_OK,
          "%s", error.text);
    has_masses(&x, (const double[]){0.84, 1}, masses);
}

/* A cell of 0 tokens is a block: masses are the softmax of SpargeAttn's own scores. */
Test(submass, cells_of_0_are_spargeattn)
{
    static input in;
    float s[HEADS * 4 * 7];
    double masses[HEADS * 4 * 7];
    sparge_error error;
    sparge_mask mask;
    hand x = input_make(&in, true);
    const sparge_geometry g = sparge_geometry_of(&x.p, &x.o);
    for (int causal = SPARGE_CAUSAL_NONE; causal <= SPARGE_CAUSAL_END; causal++) {
        sparge_intermediates inside = {.s_all = s};
        x.o.causal = (sparge_causal)causal;
        check(sparge_mask_alloc(&mask, &x.p, &x.o, &error) == SPARGE_OK &&
                  sparge_predict(&x.p, &x.o, &mask, &inside, &error) == SPARGE_OK,
              "%s", error.text);
        sparge_mask_free(&mask);
        for (int64_t row = 0; row < HEADS * g.q_blocks; row++) {
            double total = 0.0;
            for (int64_t e = row * g.k_blocks; e < (row + 1) * g.k_blocks; e++)
                total += exp((double)s[e]); /* invisible: -inf */
            for (int64_t e = row * g.k_blocks; e < (row + 1) * g.k_blocks; e++)
                masses[e] = exp((double)s[e]) / total;
        }
        has_masses(&x, (const double[]){0.98, 0}, masses);
    }
}

Test(submass, cells_divide_blocks)
{
    float k[16];
    hand x = weights(quarters, signs, 4, k, 16);
    sparge_plan plan;
    sparge_error error;
    for (int n = 0; n < 2; n++) {
        *(n ? &x.o.block_q : &x.o.block_k) = 4;
        *(n ? &x.o.block_k : &x.o.block_q) = 8;
        check_equal(sparge_method_plan(sparge_method_find("submass"), &x.p, &x.o, NULL, NULL, &plan,
                                       &error),
                    SPARGE_ERR_ARGUMENT);
        check(strcmp(error.text, check_text("cell is 8, it must divide block_q, %d, and block_k, "
                                            "%d, and be at least 1/64 of block_k, or be 0",
                                            n ? 4 : 8, n ? 8 : 4)) == 0,
              "%s", error.text);
    }
}
