/* SPDX-License-Identifier: Apache-2.0 */
/* parts.c: what methods are made of, piece by piece, and plans made by hand. */
#include <errno.h>
#include <fenv.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "methods/method.h"
#include "tests/support/heap.h"
#include "tests/support/problem.h"

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

/* ---- select.c ---- */

Test(parts, rank_of_equals_is_by_place)
{
    sparge_ranked x[] = {{0.0f, 4}, {1.0f, 9},      {-0.0f, 3}, {INFINITY, 7},
                         {1.0f, 2}, {-INFINITY, 0}, {1.0f, 5},  {INFINITY, 6}};
    const int64_t want[] = {6, 7, 2, 5, 9, 3, 4, 0};
    sparge_rank(x, COUNT(x));
    for (int64_t n = 0; n < COUNT(x); n++)
        check_equal(x[n].at, want[n]);
    sparge_rank(x, 0);
}

/* The best of any number, beside the whole order. */
Test(parts, the_best_stand_first)
{
    sparge_ranked all[40], x[40];
    for (int n = 0; n <= 40; n++)
        for (int count = 0; count <= n; count++) {
            for (int e = 0; e < n; e++)
                all[e] = x[e] = (sparge_ranked){(float)((e * 7 + count) % 5), e};
            sparge_rank(all, n);
            sparge_rank_best(x, n, count);
            uint64_t want = 0, got = 0;
            for (int e = 0; e < count; e++) {
                want |= (uint64_t)1 << all[e].at;
                got |= (uint64_t)1 << x[e].at;
            }
            check(got == want, "%d of %d", count, n);
        }
}

Test(parts, mass_at_its_borders)
{
    static const sparge_ranked x[] = {{0.5f, 0}, {0.25f, 1}, {0.125f, 2}, {0.125f, 3}, {0.0f, 4}};
    static const struct {
        double mass;
        int64_t kept, dropped; /* with the one that crosses, without it */
    } cases[] = {{-1.0, 0, 0}, {0.0, 0, 0},   {0.4999, 1, 0}, {0.5, 1, 1}, {0.5001, 2, 1},
                 {0.75, 2, 2}, {0.876, 4, 3}, {1.0, 4, 5},    {2.0, 5, 5}};
    for (int64_t n = 0; n < COUNT(cases); n++) {
        check_case("mass %g", cases[n].mass);
        check_equal(sparge_count_mass(x, 5, cases[n].mass, true), cases[n].kept);
        check_equal(sparge_count_mass(x, 5, cases[n].mass, false), cases[n].dropped);
    }
    check_equal(sparge_count_mass(x, 0, 1.0, true), (int64_t)0);
    check_equal(sparge_count_above(x, 5, 0.25), (int64_t)1);
    check_equal(sparge_count_above(x, 5, 0.2499), (int64_t)2);
    check_equal(sparge_count_above(x, 5, -1.0), (int64_t)5);
}

/* ---- maps.c ---- */

Test(parts, pools_are_means)
{
    const float x[] = {1, 10, 3, 20, 5, 30, 7, 40, 9, 50};
    float mean[6];
    sparge_method_pool(x, 5, 2, 2, false, mean);
    check_same(mean, ((const float[]){2, 15, 6, 35, 9, 50}), 6);
    sparge_method_pool(x, 5, 2, 2, true, mean);
    check_same(mean, ((const float[]){2, 15, 6, 35, 4.5f, 25}), 6);
    sparge_method_pool(x, 5, 2, 8, true, mean);
    check_same(mean, ((const float[]){25.0f / 8, 150.0f / 8}), 2);
}

Test(parts, dot_of_every_length)
{
    float a[40], b[40], want = 0.0f;
    for (int n = 0; n < 40; n++) {
        check_equal(sparge_method_dot(a, b, n), want);
        a[n] = (float)(n % 7 - 3);
        b[n] = (float)(n % 5 + 1);
        want += a[n] * b[n];
    }
    a[0] = a[1] = 3e38f;
    b[0] = 3e38f;
    check_equal(sparge_method_dot(a, b, 1), INFINITY);
    b[1] = -3e38f;
    check_equal(sparge_method_dot(a, b, 2), 0.0f);
}

Test(parts, softmax_of_scores_that_are_huge)
{
    static const float in[][3] = {{0, 0, -INFINITY},
                                  {FLT_MAX, -FLT_MAX, FLT_MAX},
                                  {INFINITY, 1, 3e38f},
                                  {-INFINITY, -INFINITY, -INFINITY},
                                  {-3e38f, -3e38f, -INFINITY}};
    static const float out[][3] = {{0.5f, 0.5f, 0},
                                   {0.5f, 0, 0.5f},
                                   {1, 0, 0},
                                   {1.0f / 3, 1.0f / 3, 1.0f / 3},
                                   {0.5f, 0.5f, 0}};
    for (int64_t n = 0; n < COUNT(in); n++) {
        float s[3];
        check_case("%g %g %g", (double)in[n][0], (double)in[n][1], (double)in[n][2]);
        memcpy(s, in[n], sizeof s);
        sparge_method_softmax(s, 3);
        check_same(s, out[n], 3);
    }
    float s[] = {logf(1), logf(2), logf(5)};
    sparge_method_softmax(s, 3);
    for (int n = 0; n < 3; n++)
        check_close(s[n], n == 0 ? 0.125 : n == 1 ? 0.25 : 0.625, 1e-6);
    sparge_method_softmax(s, 0);
}

/* ---- memory.c ---- */

Test(parts, pieces_are_zeroed_and_freed_together)
{
    sparge_piece *pieces = NULL;
    heap_arm(-1);
    char *used = sparge_take(&pieces, 100, 3); /* which comes again */
    memset(used, 1, 300);
    sparge_release(&pieces);
    char *bytes = sparge_take(&pieces, 100, 3);
    double *doubles = sparge_take(&pieces, 7, sizeof *doubles);
    const bool aligned = (uintptr_t)doubles % sizeof *doubles == 0;
    const bool none = !sparge_take(&pieces, INT64_MAX / 4, 8) && !sparge_take(&pieces, -1, 8);
    int64_t sum = 0;
    for (int n = 0; n < 300; n++)
        sum += bytes[n];
    memset(bytes, 1, 300);
    memset(doubles, 1, 7 * sizeof *doubles);
    sparge_release(&pieces);
    sparge_release(&pieces);
    heap.armed = false;
    check(aligned && none && sum == 0 && !pieces, "aligned %d, none %d, sum %lld", aligned, none,
          (long long)sum);
    check_equal(heap.live, (int64_t)0);
}

/* ---- heads.c ---- */

static problem ask_small(sparge_causal causal)
{
    shape s = shape_of(2, 4, 2, 37, 53, 5, 3);
    s.k = SPARGE_F16;
    s.layout_q = NHD;
    s.layout_v = BACKWARD;
    problem x = problem_make(&s);
    x.o.causal = causal;
    return x;
}

static const problem *asked;
static int walked;

static sparge_status look(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const problem *x = asked;
    const int64_t n = walked++;
    check(head->n == n && head->b == n / 4 && head->h == n % 4 && head->kv == n / 2, "head");
    check(head->g.block_q == 8 && head->g.block_k == 16 && head->g.k_blocks == 4, "blocks");
    check(head->context && head->plan && head->part == &head->plan->part[0], "NULL");
    check_equal(head->scale, x->o.softmax_scale > 0.0f ? 0.25f : 1.0f / sqrtf(5.0f));
    float *k = tensor_row(&x->k, head->b, head->h / 2, 0);
    check_same(head->q, tensor_row(&x->q, head->b, head->h, 0), 37 * 5);
    check_same(head->v, tensor_row(&x->v, head->b, head->h / 2, 0), 53 * 3);
    for (int64_t c = 0; c < 53 * 5; c++)
        check_equal(head->k[c], isfinite(k[c]) ? k[c] : 0.0f);
    check(*head->scratch == NULL, "what the head before took");
    const int64_t *mine = sparge_take(head->scratch, 3, sizeof *mine);
    float p[53];
    double mass[4] = {0}, want[4] = {0}, before = *head->multiply_adds;
    for (int64_t t = 0; t < 37 && mine; t++) {
        double weight[53], sum = 0.0;
        const int64_t visible = sparge_keys_of_query(&head->g, t);
        for (int64_t key = 0; key < visible; key++) {
            double score = 0.0;
            for (int64_t c = 0; c < 5; c++)
                score += (double)head->q[t * 5 + c] * (double)head->k[key * 5 + c];
            sum += weight[key] = exp((double)head->scale * score);
        }
        memset(p, 0xFF, sizeof p);
        sparge_method_row(head, t, p);
        for (int64_t key = 0; key < 53; key++) {
            check_close(p[key], key < visible ? weight[key] / sum : 0.0, 1e-6);
            want[key / 16] += (double)p[key];
        }
        check_equal(*head->multiply_adds - before, 5.0 * (double)visible);
        before = *head->multiply_adds;
        sparge_method_add_blocks(head, p, mass);
    }
    check_same(mass, want, 4);
    return SPARGE_OK;
}

/* Many products at once are the single ones, whatever the vectors. */
Test(parts, scores_are_products_to_the_bit)
{
    static const int64_t dims[] = {1, 5, 16, 17, 64, 100};
    for (int e = 0; e < 6; e++)
        for (int64_t rows = 1; rows <= 40; rows += 13) {
            sparge_piece *memory = NULL;
            float x[40 * 100], q[7 * 100], s[41], all[7 * 40 + 1];
            check_case("%lld rows of %lld", (long long)rows, (long long)dims[e]);
            for (int64_t n = 0; n < 40 * 100; n++)
                x[n] = check_normal();
            for (int64_t c = 0; c < 7 * 100; c++)
                q[c] = check_normal();
            if (rows == 14) {
                x[dims[e]] = INFINITY;
                x[2 * dims[e] - 1] = dims[e] > 1 ? -INFINITY : NAN;
                q[0] = q[dims[e] - 1] = 1.0f;
            }
            const sparge_panels panels = sparge_method_panels(x, rows, dims[e], &memory);
            memset(s, 0x7F, sizeof s);
            const float beyond = s[rows];
            sparge_method_scores(&panels, q, 0.25f, rows, s);
            for (int64_t r = 0; r < rows; r++)
                check_equal(s[r], 0.25f * sparge_method_dot(q, x + r * dims[e], dims[e]));
            check_equal(s[rows], beyond);
            for (int64_t queries = 1; queries <= 7; queries += 3) {
                memset(all, 0x7F, sizeof all);
                sparge_method_products(&panels, q, queries, 0.25f, rows, all);
                for (int64_t t = 0; t < queries; t++)
                    for (int64_t r = 0; r < rows; r++)
                        check_equal(
                            all[t * rows + r],
                            0.25f * sparge_method_dot(q + t * dims[e], x + r * dims[e], dims[e]));
                check_equal(all[queries * rows], beyond);
            }
            sparge_release(&memory);
        }
}

/* A method that is what a test says. */
static sparge_status plan_look(sparge_plan *plan, const sparge_context *context,
                               const double *param, sparge_error *error)
{
    walked = 0;
    return sparge_each_head(plan, context, param,
                            &(sparge_walk){.block_q = 8, .needs_v = true, .visit = look}, error);
}

static void plan_by(const sparge_method *m, const problem *x, sparge_plan *plan)
{
    sparge_error error;
    check(sparge_method_plan(m, &x->p, &x->o, NULL, NULL, plan, &error) == SPARGE_OK, "%s",
          error.text);
}

Test(parts, heads_one_after_the_other)
{
    static const sparge_method m = {.name = "look", .plan = plan_look};
    for (int causal = SPARGE_CAUSAL_NONE; causal <= SPARGE_CAUSAL_START; causal++) {
        problem x = ask_small((sparge_causal)causal);
        sparge_plan plan;
        x.o.softmax_scale = causal == SPARGE_CAUSAL_NONE ? 0.0f : 0.25f;
        x.o.block_q = 32; /* not of the part */
        x.o.threads = 1;  /* so that heads come in order */
        x.k.x[3] = NAN;
        x.k.x[99] = -INFINITY;
        problem_write(&x);
        asked = &x;
        plan_by(&m, &x, &plan);
        check_equal(walked, 8);
        check(causal != SPARGE_CAUSAL_NONE || plan.multiply_adds == 8.0 * 37.0 * 53.0 * 5.0,
              "%g multiply-adds", plan.multiply_adds);
        sparge_plan_free(&plan);
        problem_free(&x);
    }
}

static bool give_up(void *user, double done)
{
    (void)done;
    return --*(int *)user > 0;
}

Test(parts, progress_may_give_up_between_heads)
{
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    int left = 3;
    sparge_plan plan;
    x.o.threads = 1; /* which tells of every head */
    x.o.progress = give_up;
    x.o.user = &left;
    check_equal(
        sparge_method_plan(sparge_method_find("window"), &x.p, &x.o, NULL, NULL, &plan, NULL),
        SPARGE_ERR_CANCELLED);
    check_equal(left, 0);
    check(!plan.parts && !plan.memory, "not empty");
    problem_free(&x);
}

/* ---- Rows of pairs, blocks of the diagonal ---- */

static sparge_status keep_by_hand(const sparge_head *head, sparge_error *error)
{
    sparge_pairs pairs = sparge_pairs_make(head);
    memset(pairs.bits, 0xFF, (size_t)(16 * pairs.words) * sizeof *pairs.bits);
    sparge_keep_diagonal(head, 1);
    for (int64_t j = 0; j < head->g.k_blocks; j++) /* queries 16 to 31 see keys to 32, to 47 */
        check_equal(sparge_kept(head, 1, j), head->g.causal != SPARGE_CAUSAL_NONE && j == 2);
    check(!sparge_kept(head, 0, 2), "another row");
    sparge_keep(head, 0, 3);
    check(sparge_kept(head, 0, 3) && !sparge_kept(head, 0, 1), "not that block");
    sparge_pairs_clear(head, &pairs);
    sparge_pairs_range(head, &pairs, 0, -9, 2);
    sparge_pairs_range(head, &pairs, 1, 51, 99);
    sparge_pairs_range(head, &pairs, 2, 9, 9);
    check_equal(pairs.words, (int64_t)2);
    check_same(pairs.bits, ((const uint32_t[32]){3, 0, 0, 3u << 19, 0, 0}), 32);
    return sparge_pairs_set(head, &pairs, 2, error);
}

static sparge_status plan_by_hand(sparge_plan *plan, const sparge_context *context,
                                  const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param,
                            &(sparge_walk){.block_q = 16, .block_k = 16, .visit = keep_by_hand},
                            error);
}

/* Heads 1 and 3 attend to one key each; the others to all of block 0. */
static sparge_status keep_one_key(const sparge_head *head, sparge_error *error)
{
    const sparge_pairs pairs = sparge_pairs_make(head);
    sparge_status status = pairs.bits ? SPARGE_OK : SPARGE_ERR_MEMORY;
    for (int64_t i = 0; i < head->g.q_blocks && !status; i++) {
        for (int64_t r = 0; r < 16; r++)
            sparge_pairs_range(head, &pairs, r, head->h % 2 ? head->h : 0,
                               head->h % 2 ? head->h + 1 : 16);
        status = sparge_pairs_set(head, &pairs, i, error);
    }
    return status;
}

static sparge_status plan_one_key(sparge_plan *plan, const sparge_context *context,
                                  const double *param, sparge_error *error)
{
    return sparge_each_head(plan, context, param,
                            &(sparge_walk){.block_q = 16, .block_k = 16, .visit = keep_one_key},
                            error);
}

Test(parts, masks_of_heads_are_put_together)
{
    static const sparge_method m = {.name = "one key", .plan = plan_one_key};
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    sparge_plan plan;
    plan_by(&m, &x, &plan);
    uint8_t *pairs = check_alloc((size_t)(8 * 37 * 53));
    check(sparge_plan_pairs(&plan, pairs, NULL) == SPARGE_OK, "pairs");
    for (int64_t n = 0; n < 8; n++)
        for (int64_t t = 0; t < 37; t++)
            for (int64_t key = 0; key < 53; key++)
                check(pairs[(n * 37 + t) * 53 + key] == (n % 2 ? key == n % 4 : key < 16),
                      "head %lld, query %lld, key %lld", (long long)n, (long long)t,
                      (long long)key);
    check_free(pairs);
    sparge_plan_free(&plan);
    problem_free(&x);
}

Test(parts, pairs_are_clipped_and_the_diagonal_kept)
{
    static const sparge_method m = {.name = "by hand", .plan = plan_by_hand};
    for (int causal = SPARGE_CAUSAL_NONE; causal <= SPARGE_CAUSAL_END; causal++) {
        problem x = ask_small((sparge_causal)causal);
        sparge_plan plan;
        plan_by(&m, &x, &plan);
        uint8_t *pairs = check_alloc((size_t)(8 * 37 * 53));
        check(sparge_plan_pairs(&plan, pairs, NULL) == SPARGE_OK, "pairs");
        const uint8_t *row = pairs + 32 * 53;
        check(row[0] == 1 && row[1] == 1 && row[2] == 0, "row 32");
        check(row[53 + 50] == 0 && row[53 + 49] == 0, "row 33");
        check_equal(row[53 + 51], (uint8_t)(causal == SPARGE_CAUSAL_NONE));
        check_free(pairs);
        sparge_plan_free(&plan);
        sparge_plan_free(&plan);
        problem_free(&x);
    }
    sparge_plan_free(NULL);
}

/* ---- plan.c: plans made by hand ---- */

static answer run_to(const problem *x, const sparge_plan *plan, sparge_dtype dtype,
                     tensor_layout layout)
{
    sparge_error error;
    answer a = answer_make(x, dtype, layout);
    a.result = (sparge_result){.o = tensor_out(&a.o), .lse = a.lse, .head_counts = a.head};
    check(sparge_plan_run(plan, NULL, &a.result, &error) == SPARGE_OK, "%s", error.text);
    tensor_read(&a.o);
    return a;
}

Test(parts, queries_are_put_back)
{
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    float *q = check_alloc(8 * 37 * 5 * sizeof *q);
    int64_t *order = check_alloc(8 * 37 * sizeof *order);
    for (int64_t line = 0; line < 8 * 37; line++) { /* another order in each head */
        order[line] = (line % 37 * (line / 37 + 2) + 3) % 37;
        memcpy(q + line * 5, x.q.x + (line / 37 * 37 + order[line]) * 5, 5 * sizeof *q);
    }
    sparge_plan plan = {.problem = x.p, .options = x.o, .q_order = order};
    sparge_plan_add(&plan)->problem.q = (sparge_in){q, SPARGE_F32, 4 * 37 * 5, 37 * 5, 5};
    for (int layout = PACKED; layout < LAYOUTS; layout++) {
        const sparge_dtype dtype = layout % 2 ? SPARGE_F16 : SPARGE_F32;
        answer want = attend_to(&x, dtype, (tensor_layout)layout),
               got = run_to(&x, &plan, dtype, (tensor_layout)layout);
        same_answer(&got, &want);
        same_counts(&got.result.counts, &want.result.counts);
        check_equal(got.result.backend, SPARGE_REF);
        check_equal(got.result.o.data, want.result.o.data ? got.o.first : NULL);
        answer_free(&want);
        answer_free(&got);
    }
    uint8_t *pairs = check_alloc(8 * 37 * 53);
    sparge_mask *mask = &plan.part[0].mask;
    check(sparge_part_mask(&plan.part[0], NULL) == SPARGE_OK, "mask");
    sparge_mask_set(mask, 1, 2, 1, 3, true); /* places 16 to 31 of head 6 */
    check(sparge_plan_pairs(&plan, pairs, NULL) == SPARGE_OK, "pairs");
    for (int64_t at = 0; at < 8 * 37; at++)
        for (int64_t key = 0; key < 53; key++)
            check_equal(pairs[(at / 37 * 37 + order[at]) * 53 + key],
                        (uint8_t)(at / 37 == 6 && at % 37 / 16 == 1 && key >= 48));
    sparge_mask_free(mask);
    check_free(pairs);
    check_free(order);
    check_free(q);
    problem_free(&x);
}

/* Keys to `to` - 1 of the caller as the first part, keys from `from` on as the second. */
static sparge_plan halves(const problem *x, int64_t to, int64_t from)
{
    sparge_plan plan = {.problem = x->p, .options = x->o};
    for (int n = 0; n < 2; n++) {
        sparge_part *part = sparge_plan_add(&plan);
        sparge_in *k = &part->problem.k, *v = &part->problem.v;
        const int64_t first = n ? from : 0, end = n ? x->p.k_len : to;
        int64_t *place = sparge_take(&plan.memory, 4 * x->p.k_len, sizeof *place);
        part->problem.k_len = end - first;
        k->data = (const uint16_t *)k->data + first * k->token;
        v->data = (const float *)v->data + first * v->token;
        for (int64_t e = 0; e < 4 * x->p.k_len; e++) {
            const int64_t key = e % x->p.k_len;
            place[e] = key >= first && key < end ? key - first : -1;
        }
        part->place = place;
    }
    return plan;
}

Test(parts, two_parts_are_merged)
{
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    answer want = attend(&x);
    for (int64_t to = 1; to < 53; to += 17) {
        sparge_plan plan = halves(&x, to, to);
        answer got = run_to(&x, &plan, SPARGE_F32, PADDED);
        uint8_t *pairs = check_alloc(8 * 37 * 53);
        sparge_counts head[8];
        for (int64_t n = 0; n < tensor_count(&got.o); n++)
            check_close(got.o.x[n], want.o.x[n], 1e-5);
        for (int64_t n = 0; n < problem_rows(&x); n++)
            check_close(got.lse[n], want.lse[n], 1e-5);
        check(sparge_plan_count(&plan, head, NULL) == SPARGE_OK, "count");
        for (int n = 0; n < 8; n++) {
            same_counts(&head[n], &got.head[n]);
            check_equal(head[n].pairs, (int64_t)12);
            check_equal(head[n].tokens, (int64_t)37 * 53);
            check_equal(head[n].qk_tokens, (int64_t)37 * 53);
            check_equal(head[n].qk_done, 3 * (blocks(to, 16) + blocks(53 - to, 16)));
        }
        check_equal(got.result.counts.tokens, (int64_t)8 * 37 * 53);
        plan.part[1].pooled = true;
        check(sparge_plan_pairs(&plan, pairs, NULL) == SPARGE_OK, "pairs");
        for (int64_t e = 0; e < 8 * 37 * 53; e++)
            check_equal(pairs[e], (uint8_t)(e % 53 < to ? 1 : 2));
        check_free(pairs);
        answer_free(&got);
        sparge_plan_free(&plan);
    }
    answer_free(&want);
    problem_free(&x);
}

/* What progress was told last, and whether it ever fell. */
typedef struct shares {
    double last;
    bool fell;
} shares;

static bool note(void *user, double done)
{
    shares *s = user;
    s->fell |= done < s->last;
    s->last = done;
    return true;
}

Test(parts, progress_goes_through_all_parts)
{
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    shares s = {0.0, false};
    x.o.progress = note;
    x.o.user = &s;
    sparge_plan plan = halves(&x, 20, 20);
    answer got = run_to(&x, &plan, SPARGE_F32, PACKED);
    check(!s.fell && s.last > 0.75 && s.last <= 1.0, "%g", s.last);
    answer_free(&got);
    sparge_plan_free(&plan);
    problem_free(&x);
}

Test(parts, a_pair_in_two_parts_is_an_error)
{
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    sparge_plan plan = halves(&x, 21, 20);
    sparge_error error;
    uint8_t *pairs = check_alloc(8 * 37 * 53);
    check_equal(sparge_plan_pairs(&plan, pairs, &error), SPARGE_ERR_SHAPE);
    check(strstr(error.text, "query 0 of batch 0, head 0 attends to key 20 in two parts"), "%s",
          error.text);
    check_free(pairs);
    sparge_plan_free(&plan);
    problem_free(&x);
}

Test(parts, what_has_no_answer_is_refused)
{
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    sparge_plan plan = halves(&x, 20, 20), none = {.problem = x.p};
    sparge_error error;
    sparge_counts head[8];
    uint8_t pair;
    answer a = answer_make(&x, SPARGE_F32, PACKED);
    const sparge_result result = {.o = tensor_out(&a.o)};
    sparge_result r = result;
    r.intermediates = &a.intermediates;
    check_equal(sparge_plan_run(&plan, NULL, &r, &error), SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "result.intermediates"), "%s", error.text);
    r = result;
    r.mask = &x.mask;
    check_equal(sparge_plan_run(&plan, NULL, &r, &error), SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "result.mask"), "%s", error.text);
    check_equal(sparge_plan_run(NULL, NULL, &r, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_plan_run(&none, NULL, &r, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_plan_run(&plan, NULL, NULL, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_plan_predict(&none, NULL, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_plan_count(&none, head, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_plan_count(&plan, NULL, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_plan_pairs(NULL, &pair, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_plan_pairs(&plan, NULL, NULL), SPARGE_ERR_ARGUMENT);
    plan.options.backend = SPARGE_CUDA;
    r = result;
    check_equal(sparge_plan_run(&plan, NULL, &r, &error), SPARGE_ERR_UNSUPPORTED);
    check(strstr(error.text, "executor"), "%s", error.text);
    plan.part[1].predicted = true;
    check_equal(sparge_plan_count(&plan, head, &error), SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "part 1 is not predicted"), "%s", error.text);
    check_equal(sparge_plan_pairs(&plan, &pair, NULL), SPARGE_ERR_ARGUMENT);
    answer_free(&a);
    sparge_plan_free(&plan);
    problem_free(&x);
}

/* An executor that is here, counts its calls, and fails at one of them. */
static int predicts, attends, attentions, refuses;

static sparge_status fails(int *calls, sparge_error *error)
{
    ++*calls;
    return predicts + attends + attentions == refuses
               ? sparge_fail(error, SPARGE_ERR_DEVICE, "as the test says")
               : SPARGE_OK;
}

static sparge_status my_predict(const sparge_problem *p, const sparge_options *o, sparge_mask *mask,
                                const sparge_intermediates *trace, sparge_error *error)
{
    const sparge_status status = fails(&predicts, error);
    return status ? status : sparge_predict(p, o, mask, trace, error);
}

static sparge_status my_attend(const sparge_problem *p, const sparge_options *o,
                               const sparge_mask *mask, sparge_result *result, sparge_error *error)
{
    const sparge_status status = fails(&attends, error);
    return status ? status : sparge_attend(p, o, mask, result, error);
}

static sparge_status my_attention(const sparge_problem *p, const sparge_options *o,
                                  sparge_result *result, sparge_error *error)
{
    const sparge_status status = fails(&attentions, error);
    return status ? status : sparge_attention(p, o, result, error);
}

static const sparge_executor mine = {my_predict, my_attend, my_attention};

Test(parts, executors_run_all)
{
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    answer a = answer_make(&x, SPARGE_F32, PACKED);
    for (int which = 0; which < 2; which++) { /* one part; and one that is merged with another */
        sparge_plan plan = halves(&x, 20, 20);
        plan.options.backend = SPARGE_CUDA; /* of the caller; the parts are run on ref */
        if (!which) {
            plan.part[0].place = NULL;
            plan.parts = 1;
        }
        plan.part[0].predicted = true;
        plan.seconds = 1000.0;
        for (refuses = 1; refuses <= 4 + 2 * which; refuses++) {
            sparge_error error = {""};
            sparge_result r = {.o = tensor_out(&a.o)};
            predicts = attends = attentions = 0;
            sparge_mask_free(&plan.part[0].mask);
            sparge_status status = sparge_plan_run(&plan, &mine, &r, &error);
            check(status || (attends == which && attentions == 1), "not run");
            check(status || r.seconds_predict >= plan.seconds, "what the plan took is lost");
            if (!status)
                status = sparge_plan_predict(&plan, &mine, &error);
            check(status || predicts == 1, "not predicted");
            if (!status)
                status = sparge_plan_predict(&plan, &mine, &error);
            if (!status)
                status = sparge_plan_run(&plan, &mine, &r, &error);
            const int calls = 3 + 2 * which;
            check_equal(status, refuses <= calls ? SPARGE_ERR_DEVICE : SPARGE_OK);
            check_equal(predicts + attends + attentions, refuses <= calls ? refuses : calls);
            check(!status || strstr(error.text, "test says"), "%s", error.text);
        }
        sparge_plan_free(&plan);
    }
    refuses = 0;
    answer_free(&a);
    problem_free(&x);
}

/* ---- density.c ---- */

static double density_of(const sparge_plan *plan)
{
    sparge_counts head[8], sum = {0};
    check(sparge_plan_count(plan, head, NULL) == SPARGE_OK, "count");
    for (int n = 0; n < 8; n++) {
        sum.tokens += head[n].tokens;
        sum.qk_tokens += head[n].qk_tokens;
    }
    return sparge_density_tokens(&sum);
}

static sparge_status plan_at(const sparge_method *m, const problem *x, double *param,
                             double density, sparge_plan *plan, sparge_error *error)
{
    return sparge_method_plan_at(m, &x->p, &x->o, NULL, param, density, &mine, plan, error);
}

enum { MOST = 37 + 53 }; /* the widest window */

Test(parts, the_nearest_density)
{
    problem x = ask_small(SPARGE_CAUSAL_END);
    const sparge_method *m = sparge_method_find("window");
    double there[MOST + 1];
    sparge_plan plan;
    sparge_error error;
    for (int w = 1; w <= MOST; w++) {
        const double param[] = {w, 2.0};
        check(!sparge_method_plan(m, &x.p, &x.o, NULL, param, &plan, NULL), "window");
        there[w] = density_of(&plan);
        sparge_plan_free(&plan);
    }
    check(there[1] < 0.1 && there[MOST] == 1.0, "%g to %g", there[1], there[MOST]);
    for (double want = 0.1; want <= 1.0; want += 0.045) {
        double param[] = {-7.0, 2.0};
        check_case("%g", want);
        check(plan_at(m, &x, param, want, &plan, &error) == SPARGE_OK, "%s", error.text);
        for (int w = 1; w <= MOST; w++)
            check(fabs(density_of(&plan) - want) <= fabs(there[w] - want), "%d is nearer", w);
        check_equal(density_of(&plan), there[(int)param[0]]);
        check_equal(param[1], 2.0);
        sparge_plan_free(&plan);
    }
    double param[] = {0.0, 2.0};
    check_equal(plan_at(m, &x, param, 1.0, &plan, NULL), SPARGE_OK);
    check_equal(density_of(&plan), 1.0);
    sparge_plan_free(&plan);
    const double beyond[] = {there[1] * 0.99, -1.0, 1.001, (double)NAN};
    for (int n = 0; n < 4; n++) {
        check_equal(plan_at(m, &x, param, beyond[n], &plan, &error), SPARGE_ERR_ARGUMENT);
        check(strstr(error.text,
                     check_text("with window from 1 to 90 it goes from %.6g to 1", there[1])),
              "%s", error.text);
        check(!plan.parts && !plan.memory, "not empty");
    }
    problem_free(&x);
}

/* A window of 1 + MOST - w: density falls with its first parameter. */
static sparge_status plan_backwards(sparge_plan *plan, const sparge_context *context,
                                    const double *param, sparge_error *error)
{
    return sparge_method_find("window")->plan(
        plan, context, (const double[]){1 + MOST - param[0], param[1]}, error);
}

Test(parts, the_nearest_density_that_falls)
{
    problem x = ask_small(SPARGE_CAUSAL_END);
    const sparge_method *m = sparge_method_find("window");
    sparge_method falls = *m;
    falls.param[0].high = MOST;
    falls.plan = plan_backwards;
    falls.falls = true;
    for (double want = 0.1; want <= 1.0; want += 0.1) {
        double param[] = {0.0, 2.0}, param_falls[] = {0.0, 2.0};
        sparge_plan plan;
        check_case("%g", want);
        check_equal(plan_at(m, &x, param, want, &plan, NULL), SPARGE_OK);
        sparge_plan_free(&plan);
        check_equal(plan_at(&falls, &x, param_falls, want, &plan, NULL), SPARGE_OK);
        sparge_plan_free(&plan);
        check_equal(param_falls[0], 1 + MOST - param[0]);
    }
    problem_free(&x);
}

/* An end that is no float is in the range, and so is a density that only it has. */
Test(parts, ends_that_are_no_floats)
{
    sparge_method m = *sparge_method_find("random");
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    for (int n = 0; n < 2; n++) { /* floats nearest to them: below, above */
        double param[] = {0.0, 5.0};
        sparge_plan plan;
        sparge_error error;
        m.param[0].low = n ? 0.1 : 0.7;
        m.param[0].high = n ? 0.6 : 0.9;
        m.param[0].usual = m.param[0].low;
        check(plan_at(&m, &x, param, n ? 0.4 : 0.6, &plan, &error) == SPARGE_OK, "%s", error.text);
        sparge_plan_free(&plan);
    }
    problem_free(&x);
}

Test(parts, densities_that_nobody_has)
{
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    double param[SPARGE_MAX_PARAMS] = {0};
    sparge_plan plan;
    sparge_error error;
    const sparge_method *m = sparge_method_find("random");
    check_equal(plan_at(sparge_method_find("dense"), &x, param, 1.0, &plan, &error),
                SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "dense has no parameter"), "%s", error.text);
    check_equal(plan_at(m, &x, NULL, 1.0, &plan, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(plan_at(NULL, &x, param, 1.0, &plan, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(plan_at(m, &x, param, 1.0, NULL, NULL), SPARGE_ERR_ARGUMENT);
    param[1] = -1.0; /* a parameter that it leaves alone */
    check_equal(plan_at(m, &x, param, 0.5, &plan, &error), SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "seed of random is -1"), "%s", error.text);
    param[1] = 0.0;
    x.p.k_len = 0;
    check_equal(plan_at(m, &x, param, 1.0, &plan, &error), SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "no query sees a key"), "%s", error.text);
    x.p.k_len = 53;
    double tau[] = {0.0, 0.6, -1.0, -INFINITY, 0.0};
    predicts = 0;
    check_equal(plan_at(sparge_method_find("spargeattn"), &x, tau, 1.0, &plan, &error), SPARGE_OK);
    check(predicts >= 2 && plan.part[0].mask.bits, "the executor did not predict");
    sparge_plan_free(&plan);
    problem_free(&x);
}

/* ---- table.c ---- */

static bool has_context;

static sparge_status plan_whatever(sparge_plan *plan, const sparge_context *context,
                                   const double *param, sparge_error *error)
{
    (void)error;
    has_context = context && param[0] == 0.5 && plan->options.block_q == 16;
    sparge_plan_add(plan);
    return has_context ? SPARGE_OK : SPARGE_ERR_MEMORY;
}

Test(parts, needs_are_asked_for)
{
    static const sparge_grid grid = {1, 1, 37, 0, 0};
    static const int64_t ends[] = {37};
    void *state = NULL;
    const sparge_context all = {
        .grid = &grid, .segment_ends = ends, .segments = 1, .state = &state};
    static const struct {
        unsigned needs;
        const char *word;
    } needs[] = {{SPARGE_NEEDS_CAUSAL, "causal attention"},
                 {SPARGE_NEEDS_NOT_CAUSAL, "without causality"},
                 {SPARGE_NEEDS_GRID, "grid"},
                 {SPARGE_NEEDS_SEGMENTS, "segments"},
                 {SPARGE_NEEDS_STATE, "state"}};
    for (int n = 0; n < 5; n++) {
        const sparge_method m = {.name = "whatever",
                                 .needs = needs[n].needs,
                                 .param = {{"share", 0.0, 1.0, 0.5, false, "of"}},
                                 .plan = plan_whatever};
        problem x = ask_small(n == 0 ? SPARGE_CAUSAL_END : SPARGE_CAUSAL_NONE);
        x.p.k_len = x.p.q_len; /* of 37 */
        sparge_context lacking = all;
        sparge_plan plan;
        sparge_error error;
        const sparge_status granted = sparge_method_plan(&m, &x.p, &x.o, &all, NULL, &plan, &error);
        check(granted == SPARGE_OK && plan.parts == 1, "%s", error.text);
        sparge_plan_free(&plan);
        if (n < 2)
            x.o.causal = n == 0 ? SPARGE_CAUSAL_NONE : SPARGE_CAUSAL_START;
        lacking.grid = n == 2 ? NULL : lacking.grid;
        lacking.segment_ends = n == 3 ? NULL : lacking.segment_ends;
        lacking.state = n == 4 ? NULL : lacking.state;
        for (int e = 0; e < 2; e++) {
            const sparge_context *context = e || n < 2 ? &lacking : NULL;
            check_equal(sparge_method_plan(&m, &x.p, &x.o, context, NULL, &plan, &error),
                        SPARGE_ERR_UNSUPPORTED);
            check(strstr(error.text, "whatever needs") && strstr(error.text, needs[n].word), "%s",
                  error.text);
            check(!plan.parts, "not empty");
        }
        problem_free(&x);
    }
}

Test(parts, tokens_fit_their_grid_and_their_segments)
{
    static const sparge_grid grids[] = {
        {1, 6, 6, 0, 0},         {1, 6, 6, -1, 2},        {-1, -37, 1, 0, 0}, {2, 9, 2, 1, 1},
        {INT64_MAX, 2, 1, 0, 0}, {1, 6, 6, INT64_MAX, 2}, {1, 6, 6, 0, 1}};
    static const int64_t ends[][2] = {{20, 36}, {38, 37}, {-1, 37}, {37, 38}, {0, 37}};
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    x.p.k_len = x.p.q_len;
    for (size_t n = 0; n < 12; n++) {
        const bool has_grid = n < 7;
        const sparge_method m = {.name = "whatever",
                                 .needs = has_grid ? SPARGE_NEEDS_GRID : SPARGE_NEEDS_SEGMENTS,
                                 .param = {{"share", 0.0, 1.0, 0.5, false, "of"}},
                                 .plan = plan_whatever};
        const sparge_context context = {.grid = has_grid ? &grids[n] : NULL,
                                        .segment_ends = has_grid ? NULL : ends[n - 7],
                                        .segments = 2};
        const bool fits = n == 6 || n == 11;
        sparge_plan plan;
        sparge_error error;
        check_case("%zu", n);
        check_equal(sparge_method_plan(&m, &x.p, &x.o, &context, NULL, &plan, &error),
                    fits ? SPARGE_OK : SPARGE_ERR_ARGUMENT);
        check(fits || (strstr(error.text,
                              has_grid ? "the grid of whatever" : "the segments of whatever") &&
                       strstr(error.text, "37 keys")),
              "%s", error.text);
        sparge_plan_free(&plan);
    }
    problem_free(&x);
}

static sparge_status plan_keeping(sparge_plan *plan, const sparge_context *context,
                                  const double *param, sparge_error *error)
{
    bool fresh;
    void *kept = NULL;
    const sparge_status status = sparge_state(plan, context, "keeping", 16, &fresh, &kept, error);
    if (status)
        return status;
    check_equal(*(double *)kept, fresh ? 0.0 : 0.25);
    *(double *)kept = 0.25;
    sparge_plan_add(plan);
    return param[0] < 0.0 ? SPARGE_ERR_MEMORY : SPARGE_OK;
}

/* It is of one method and of calls of one size, and of plans that came to an end. */
Test(parts, state_is_kept)
{
    static const sparge_method m = {
        .name = "keeping", .param = {{"x", -1.0, 1.0, 0.5, false, "of"}}, .plan = plan_keeping};
    void *state = NULL;
    const sparge_context context = {.state = &state};
    const double bad[1] = {-1.0};
    sparge_plan plan;
    sparge_error error;
    problem x = ask_small(SPARGE_CAUSAL_END);
    check_equal(sparge_method_plan(&m, &x.p, &x.o, &context, bad, &plan, &error),
                SPARGE_ERR_MEMORY);
    check(!state, "what failed was kept");
    for (int n = 0; n < 2; n++) {
        check_equal(sparge_method_plan(&m, &x.p, &x.o, &context, NULL, &plan, &error), SPARGE_OK);
        sparge_plan_free(&plan);
        check_equal(sparge_method_plan(&m, &x.p, &x.o, NULL, NULL, &plan, &error), SPARGE_OK);
        sparge_plan_free(&plan);
    }
    check_equal(sparge_method_plan(&m, &x.p, &x.o, &context, bad, &plan, &error),
                SPARGE_ERR_MEMORY);
    check(state != NULL, "what was kept is gone");
    const double chooses[] = {0.1, 0.0, 0.1, 4.0, 1.0, 1.0, 16.0};
    check_equal(sparge_method_plan(sparge_method_find("minference"), &x.p, &x.o, &context, chooses,
                                   &plan, &error),
                SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "state is of keeping") && strstr(error.text, "call is of minference"),
          "%s", error.text);
    x.p.heads = 2;
    check_equal(sparge_method_plan(&m, &x.p, &x.o, &context, NULL, &plan, &error),
                SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "state is of keeping with 4 heads"), "%s", error.text);
    free(state);
    problem_free(&x);
}

Test(parts, bad_calls_of_a_method)
{
    static const sparge_method m = {.name = "whatever", .plan = plan_whatever};
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    sparge_plan plan;
    sparge_error error;
    check_equal(sparge_method_plan(NULL, &x.p, &x.o, NULL, NULL, &plan, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_method_plan(&m, NULL, &x.o, NULL, NULL, &plan, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_method_plan(&m, &x.p, NULL, NULL, NULL, &plan, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_method_plan(&m, &x.p, &x.o, NULL, NULL, NULL, NULL), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_method_plan(&m, &x.p, &x.o, NULL, NULL, &plan, &error), SPARGE_ERR_MEMORY);
    check(strstr(error.text, "memory") && !plan.parts, "%s", error.text); /* it has no parameter */
    x.p.dim = 0;
    check(sparge_method_plan(&m, &x.p, &x.o, NULL, NULL, &plan, &error) != SPARGE_OK &&
              strstr(error.text, "dim"),
          "%s", error.text);
    problem_free(&x);
}

Test(parts, copies_of_v_and_o_without_data)
{
    const sparge_method *const m = sparge_method_find("pisa0");
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    sparge_plan plan;
    sparge_error error;
    sparge_result nowhere = {.o = {NULL, SPARGE_F32, 0, 0, 0}};
    check_equal(sparge_method_plan(m, &x.p, &x.o, NULL, NULL, &plan, &error), SPARGE_OK);
    check_equal(sparge_plan_run(&plan, NULL, &nowhere, &error), SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "result.o"), "%s", error.text);
    sparge_plan_free(&plan);
    const struct {
        int64_t dim_v;
        sparge_dtype dtype;
        sparge_status status;
        const char *says;
    } table[] = {
        {0, SPARGE_F32, SPARGE_ERR_ARGUMENT, "dim_v is 0, it must be at least 1"},
        {INT64_MAX, SPARGE_F32, SPARGE_ERR_SHAPE, "overflows"},
        {5, SPARGE_INT8, SPARGE_ERR_ARGUMENT, "v.dtype is 4, it must be one of sparge_dtype"},
    };
    for (size_t n = 0; n < sizeof table / sizeof *table; n++) {
        x.p.dim_v = table[n].dim_v;
        x.p.v.dtype = table[n].dtype;
        check_equal(sparge_method_plan(m, &x.p, &x.o, NULL, NULL, &plan, &error), table[n].status);
        check(strstr(error.text, table[n].says) && !plan.parts, "%s", error.text);
    }
    problem_free(&x);
}

/* A plan is the same whatever rounding the caller has, who gets it back, and errno too. */
Test(parts, arithmetic_of_the_caller)
{
    problem x = ask_small(SPARGE_CAUSAL_NONE);
    sparge_plan plan[2];
    for (int n = 0; n < 2; n++) {
        fesetround(n ? FE_UPWARD : FE_TONEAREST);
        errno = 77;
        const sparge_status status =
            sparge_method_plan(sparge_method_find("pisa0"), &x.p, &x.o, NULL, NULL, &plan[n], NULL);
        const int rounding = fegetround(), number = errno;
        fesetround(FE_TONEAREST);
        check_equal(status, SPARGE_OK);
        check_equal(rounding, n ? FE_UPWARD : FE_TONEAREST);
        check_equal(number, 77);
    }
    const sparge_problem *a = &plan[0].part[1].problem, *b = &plan[1].part[1].problem;
    check(!memcmp(a->k.data, b->k.data,
                  (size_t)(a->batch * a->kv_heads * a->k_len * a->dim) * sizeof(float)),
          "mean keys depend on the caller's rounding");
    sparge_plan_free(&plan[0]);
    sparge_plan_free(&plan[1]);
    problem_free(&x);
}

/* ---- Allocations that fail ---- */

/* All that is done with a plan. */
static sparge_status live(const sparge_method *m, const problem *x, const sparge_context *context,
                          sparge_result *result, uint8_t *pairs, sparge_counts *head, bool at,
                          sparge_error *error)
{
    double param[SPARGE_MAX_PARAMS];
    sparge_plan plan;
    for (int n = 0; n < SPARGE_MAX_PARAMS; n++) /* as short as the sequence */
        param[n] = m->param[n].whole ? fmax(m->param[n].low, floor(m->param[n].usual / 16.0))
                                     : m->param[n].usual;
    sparge_status status =
        at ? sparge_method_plan_at(m, &x->p, &x->o, context, param, 0.5, NULL, &plan, error)
           : sparge_method_plan(m, &x->p, &x->o, context, param, &plan, error);
    if (!status)
        status = sparge_plan_run(&plan, NULL, result, error);
    if (!status)
        status = sparge_plan_predict(&plan, NULL, error);
    if (!status)
        status = sparge_plan_run(&plan, NULL, result, error);
    if (!status)
        status = sparge_plan_count(&plan, head, error);
    if (!status)
        status = sparge_plan_pairs(&plan, pairs, error);
    sparge_plan_free(&plan);
    return status;
}

static void survives(const sparge_method *m, sparge_causal causal, bool at)
{
    shape s = shape_of(1, 2, 1, 16, 16, 4, 3);
    problem x = problem_make(&s);
    static const sparge_grid grid = {1, 4, 4, 0, 0};
    static const int64_t ends[] = {5, 16};
    x.o.causal = causal;
    x.o.block_q = x.o.block_k = 4;
    x.o.threads = 1;
    for (int64_t n = 0;; n++) {
        answer a = answer_make(&x, SPARGE_F32, PACKED);
        uint8_t pairs[2 * 16 * 16];
        sparge_result r = {.o = tensor_out(&a.o), .lse = a.lse};
        sparge_error error = {""};
        void *state = NULL;
        const sparge_context context = {
            .grid = &grid, .segment_ends = ends, .segments = 2, .state = &state};
        check_case("%s, causal %d, allocation %lld", m->name, causal, (long long)n);
        heap_arm(n);
        const sparge_status status = live(m, &x, &context, &r, pairs, a.head, at, &error);
        free(state);
        heap.armed = false;
        check(heap.live == 0, "%lld allocations leak", (long long)heap.live);
        check(heap.stray == 0, "%d allocations in other threads", heap.stray);
        answer_free(&a);
        if (heap.calls <= n) {
            check(status == SPARGE_OK || status == SPARGE_ERR_UNSUPPORTED, "%s", error.text);
            check(status || n >= 5, "%lld allocations", (long long)n);
            break;
        }
        check(status == SPARGE_ERR_MEMORY && strstr(error.text, "memory"), "%s: %s",
              sparge_status_string(status), error.text);
    }
    problem_free(&x);
}

Test(parts, every_allocation_may_fail)
{
    int count;
    const sparge_method *const *all = sparge_methods(&count);
    for (int n = 0; n < count; n++)
        for (int causal = SPARGE_CAUSAL_NONE; causal <= SPARGE_CAUSAL_END; causal++)
            survives(all[n], (sparge_causal)causal, false);
    survives(sparge_method_find("window"), SPARGE_CAUSAL_NONE, true);
}
