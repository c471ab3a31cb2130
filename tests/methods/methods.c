/* SPDX-License-Identifier: Apache-2.0 */
/* methods.c: one loop over the table of methods. Whoever adds a method adds nothing here, but a
 * line in `exceptions` if a rule does not hold for it, with the reason. Truth is attention in
 * double by the textbook, over the pairs that a plan says it attends to. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/methods/hand.h"
#include "tests/support/problem.h"

enum { EMPTY_ROWS = 1, NOT_ABOVE_RANDOM = 2, NOT_BELOW_ORACLE = 4, NOT_DENSE = 8 };

static const struct exception {
    const char *name;
    int what;
    const char *why; /* for the reader */
} exceptions[] = {
    {"radial", NOT_DENSE, "far frames are thinned, however wide their band is"},
    {"spargeattn_paper", EMPTY_ROWS, "as printed, tau 0 keeps nothing"},
    {"spargeattn_upstream", EMPTY_ROWS,
     "the diagonal is not forced: some rows see only what causality hides"},
};

static bool excepted(const sparge_method *m, int what)
{
    for (size_t n = 0; n < sizeof exceptions / sizeof *exceptions; n++)
        if (!strcmp(exceptions[n].name, m->name) && exceptions[n].what & what)
            return true;
    return false;
}

/* ---- Questions ---- */

static const struct setting {
    int64_t batch, heads, kv_heads, q_len, k_len, dim, dim_v, block_q, block_k;
    sparge_causal causal;
    bool bias; /* of each key */
} settings[] = {
    {2, 2, 1, 100, 300, 64, 16, 32, 32, SPARGE_CAUSAL_NONE, false},
    {1, 2, 1, 300, 300, 64, 16, 32, 16, SPARGE_CAUSAL_END, false},
    {1, 2, 1, 190, 190, 24, 8, 32, 32, SPARGE_CAUSAL_NONE, false},
    {1, 1, 1, 512, 512, 17, 8, 64, 64, SPARGE_CAUSAL_END, false},
    {2, 2, 1, 70, 300, 33, 17, 16, 48, SPARGE_CAUSAL_END, true},
    {1, 2, 2, 300, 160, 33, 17, 48, 32, SPARGE_CAUSAL_START, false},
    {1, 1, 1, 300, 300, 33, 17, 64, 64, SPARGE_CAUSAL_NONE, true},
};
enum { SETTINGS = sizeof settings / sizeof *settings, GRID = 2 };

/* The first settings are for all methods but those that need a grid, and GRID is for those. */
static bool fits(const sparge_method *m, int setting)
{
    return setting < GRID || m->needs & SPARGE_NEEDS_GRID;
}

typedef struct question {
    problem x;
    sparge_context context;
    sparge_grid grid;
    int64_t segment_ends[3];
    void *state;
    float *bias;    /* [batch * kv_heads][k_len] or NULL */
    double *weight; /* [batch * heads][q_len][k_len] exp(score - top); 0: not visible */
    double *top;    /* [batch * heads][q_len] of the scores */
} question;

/* Tokens of a few kinds, in runs, that drift slowly; those of one kind, or near each other, pay to
 * each other. */
static void cluster(tensor *t, int64_t first, float offset)
{
    for (int64_t line = 0; line < t->batch * t->heads * t->tokens; line++) {
        const int64_t n = line % t->tokens + first, kind = n / 64 % 4;
        for (int64_t c = 0; c < t->channels; c++)
            t->x[line * t->channels + c] = 0.8f * sinf((float)((kind + 2) * (c + 1)) * 1.7f) +
                                           0.6f * cosf(0.02f * (float)n + (float)(c * c)) +
                                           offset * cosf((float)c) + 0.3f * check_normal();
    }
}

static bool sees(const sparge_problem *p, sparge_causal causal, int64_t t, int64_t key)
{
    return causal == SPARGE_CAUSAL_NONE ||
           key <= t + (causal == SPARGE_CAUSAL_END ? p->k_len - p->q_len : 0);
}

static double score(const sparge_problem *p, const float *q, const float *k)
{
    double sum = 0.0;
    for (int64_t c = 0; c < p->dim; c++)
        sum += (double)q[c] * (double)k[c];
    return sum / sqrt((double)p->dim);
}

static void weigh(question *a)
{
    const sparge_problem *p = &a->x.p;
    const int64_t rows = problem_rows(&a->x);
    a->weight = check_alloc((size_t)(rows * p->k_len) * sizeof *a->weight);
    a->top = check_alloc((size_t)rows * sizeof *a->top);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t t = row % p->q_len, n = row / p->q_len, kv = n / (p->heads / p->kv_heads);
        double *to = a->weight + row * p->k_len, top = -INFINITY;
        for (int64_t key = 0; key < p->k_len; key++) {
            to[key] =
                sees(p, a->x.o.causal, t, key)
                    ? score(p, a->x.q.x + row * p->dim, a->x.k.x + (kv * p->k_len + key) * p->dim)
                    : -INFINITY;
            to[key] += a->bias ? (double)a->bias[kv * p->k_len + key] : 0.0;
            top = fmax(top, to[key]);
        }
        for (int64_t key = 0; key < p->k_len; key++)
            to[key] = to[key] > -INFINITY ? exp(to[key] - top) : 0.0;
        a->top[row] = top;
    }
}

static void question_make(question *a, const struct setting *from)
{
    check_case("%lld x %lld", (long long)from->q_len, (long long)from->k_len);
    const shape s = shape_of(from->batch, from->heads, from->kv_heads, from->q_len, from->k_len,
                             from->dim, from->dim_v);
    *a = (question){.x = problem_make(&s)};
    a->x.o.block_q = from->block_q;
    a->x.o.block_k = from->block_k;
    a->x.o.threads = 1;
    a->x.o.causal = from->causal;
    cluster(&a->x.q, from->causal == SPARGE_CAUSAL_START ? 0 : from->k_len - from->q_len, 0.0f);
    cluster(&a->x.k, 0, 0.4f);
    problem_write(&a->x);
    const int64_t tokens = from->k_len, keys = from->batch * from->kv_heads * tokens;
    a->bias = from->bias ? check_alloc((size_t)keys * sizeof *a->bias) : NULL;
    for (int64_t n = 0; n < keys && a->bias; n++)
        a->bias[n] = check_uniform(-2.0f, 2.0f);
    a->x.p.k_bias = a->bias;
    a->grid = (sparge_grid){tokens / 60, 6, 10, tokens % 60 / 3, tokens % 60 - tokens % 60 / 3};
    a->segment_ends[0] = tokens / 3;
    a->segment_ends[1] = tokens / 2;
    a->segment_ends[2] = tokens;
    a->context = (sparge_context){.grid = from->q_len == tokens ? &a->grid : NULL,
                                  .segment_ends = a->segment_ends,
                                  .segments = 3,
                                  .state = &a->state};
    weigh(a);
}

static void question_free(question *a)
{
    free(a->state);
    check_free(a->bias);
    check_free(a->weight);
    check_free(a->top);
    problem_free(&a->x);
}

/* Did it make a plan? If not, it says what it needs and has not got here. */
static bool plan_of(const sparge_method *m, question *a, const double *param, sparge_plan *plan)
{
    sparge_error error;
    free(a->state);
    a->state = NULL;
    sparge_status status =
        sparge_method_plan(m, &a->x.p, &a->x.o, &a->context, param, plan, &error);
    check(status == SPARGE_OK || (status == SPARGE_ERR_UNSUPPORTED && strstr(error.text, m->name)),
          "%s: %s", sparge_status_string(status), error.text);
    if (status)
        check(!plan->parts && !plan->memory, "a plan that failed is not empty");
    else
        status = sparge_plan_predict(plan, NULL, &error);
    check(status == SPARGE_OK || status == SPARGE_ERR_UNSUPPORTED, "%s", error.text);
    return status == SPARGE_OK;
}

static uint8_t *pairs_of(const sparge_plan *plan)
{
    const sparge_problem *p = &plan->problem;
    sparge_error error;
    uint8_t *pairs = check_alloc((size_t)(p->batch * p->heads * p->q_len * p->k_len));
    check(sparge_plan_pairs(plan, pairs, &error) == SPARGE_OK, "%s", error.text);
    return pairs;
}

static bool is_plain(const sparge_plan *plan)
{
    return plan->parts == 1 && !plan->q_order && !plan->part[0].place && !plan->part[0].pooled;
}

static bool is_partial(const sparge_plan *plan)
{
    for (int n = 0; n < plan->parts; n++)
        if (plan->part[n].mask.partial_first)
            return true;
    return false;
}

/* ---- Truth ---- */

typedef struct row {
    const sparge_part *part;
    int64_t n, at, words;
    uint32_t *bits; /* of the row of blocks */
} row;

/* Whether a query at a place attends to a key of a part; asked in order of places. */
static bool attends(row *x, const sparge_problem *p, int64_t n, int64_t at, int64_t key)
{
    const sparge_options *o = &x->part->options;
    const int64_t i = at / o->block_q, held = x->at < 0 ? -1 : x->at / o->block_q;
    if (n != x->n || i != held)
        sparge_mask_get_row(x->part->mask.bits ? &x->part->mask : NULL, &x->part->problem, o,
                            n / p->heads, n % p->heads, i, x->bits);
    x->n = n;
    x->at = at;
    return x->bits[at % o->block_q * x->words + key / 32] >> key % 32 & 1;
}

static row row_make(const sparge_part *part)
{
    const int64_t words = (part->problem.k_len + 31) / 32;
    return (row){part, -1, -1, words,
                 check_alloc((size_t)(part->options.block_q * words) * sizeof(uint32_t))};
}

/* Keys that stand for others: added to what a row has. */
static double add_pooled(const question *a, row *x, int64_t line, int64_t at, double *o)
{
    const sparge_problem *p = &a->x.p, *pooled = &x->part->problem;
    const int64_t n = line / p->q_len, kv = n % p->heads / (p->heads / pooled->kv_heads);
    double sum = 0.0;
    for (int64_t key = 0; key < pooled->k_len; key++) {
        if (!attends(x, p, n, at, key))
            continue;
        const int64_t b = n / p->heads;
        const float *k = (const float *)pooled->k.data + b * pooled->k.batch + kv * pooled->k.head +
                         key * pooled->k.token;
        const float *v = (const float *)pooled->v.data + b * pooled->v.batch + kv * pooled->v.head +
                         key * pooled->v.token;
        const float bias = pooled->k_bias
                               ? pooled->k_bias[(b * pooled->kv_heads + kv) * pooled->k_len + key]
                               : 0.0f;
        const double w = exp(score(p, a->x.q.x + line * p->dim, k) + (double)bias - a->top[line]);
        sum += w;
        for (int64_t c = 0; c < p->dim_v; c++)
            o[c] += w * (double)v[c];
    }
    return sum;
}

/* o and lse of a run against the pairs of the plan. */
static void judge(const question *a, const sparge_plan *plan, const uint8_t *pairs, const float *o,
                  const float *lse)
{
    const sparge_problem *p = &a->x.p;
    row pooled[SPARGE_MAX_PARTS];
    for (int n = 0; n < plan->parts; n++)
        pooled[n] = row_make(&plan->part[n]);
    for (int64_t place = 0; place < problem_rows(&a->x); place++) {
        const int64_t n = place / p->q_len, kv = n / (p->heads / p->kv_heads);
        const int64_t line = plan->q_order ? n * p->q_len + plan->q_order[place] : place;
        double want[32] = {0}, sum = 0.0, off = 0.0, size = 0.0;
        for (int64_t key = 0; key < p->k_len; key++) {
            const double w = a->weight[line * p->k_len + key];
            if (pairs[line * p->k_len + key] != 1)
                continue;
            sum += w;
            for (int64_t c = 0; c < p->dim_v; c++)
                want[c] += w * (double)a->x.v.x[(kv * p->k_len + key) * p->dim_v + c];
        }
        for (int e = 0; e < plan->parts; e++)
            if (plan->part[e].pooled)
                sum += add_pooled(a, &pooled[e], line, place % p->q_len, want);
        for (int64_t c = 0; c < p->dim_v; c++) {
            const double y = sum > 0.0 ? want[c] / sum : 0.0;
            off += fabs(y - (double)o[line * p->dim_v + c]);
            size += fabs(y);
        }
        check(off <= 1e-5 * size, "row %lld is off by %.3g", (long long)line, off / size);
        const double all = sum > 0.0 ? a->top[line] + log(sum) : -INFINITY;
        check_close(lse[line], all, 1e-5 * (1.0 + fabs(all)));
    }
    for (int n = 0; n < plan->parts; n++)
        check_free(pooled[n].bits);
}

/* Share of a row's attention that goes to keys it attends to themselves; NaN: it sees no key. */
static double recall_of_row(const question *a, const uint8_t *pairs, int64_t line)
{
    const int64_t keys = a->x.p.k_len;
    double kept = 0.0, all = 0.0;
    for (int64_t key = 0; key < keys; key++) {
        all += a->weight[line * keys + key];
        kept += pairs[line * keys + key] == 1 ? a->weight[line * keys + key] : 0.0;
    }
    return kept / all;
}

/* The mean over rows from one on. */
static double recall(const question *a, const uint8_t *pairs, int64_t from, int64_t rows)
{
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t line = from; line < from + rows; line++) {
        const double r = recall_of_row(a, pairs, line);
        sum += isnan(r) ? 0.0 : r;
        count += !isnan(r);
    }
    return sum / (double)count;
}

/* ---- Runs ---- */

typedef struct run {
    float *o, *lse;
    sparge_counts *head;
    sparge_result result;
} run;

static run run_make(const question *a)
{
    const int64_t rows = problem_rows(&a->x), dim_v = a->x.p.dim_v;
    run r = {.o = check_alloc((size_t)(rows * dim_v) * sizeof(float)),
             .lse = check_alloc((size_t)rows * sizeof(float)),
             .head = check_alloc((size_t)(a->x.p.batch * a->x.p.heads) * sizeof *r.head)};
    const int64_t head = a->x.p.q_len * dim_v;
    r.result = (sparge_result){.o = {r.o, SPARGE_F32, a->x.p.heads * head, head, dim_v},
                               .lse = r.lse,
                               .head_counts = r.head};
    return r;
}

static void run_free(run *r)
{
    check_free(r->o);
    check_free(r->lse);
    check_free(r->head);
}

static void same_run(const question *a, const run *got, const run *want)
{
    const int64_t rows = problem_rows(&a->x), heads = a->x.p.batch * a->x.p.heads;
    check_same(got->o, want->o, rows * a->x.p.dim_v);
    check_same(got->lse, want->lse, rows);
    for (int64_t n = 0; n < heads; n++)
        same_counts(&got->head[n], &want->head[n]);
    same_counts(&got->result.counts, &want->result.counts);
}

static void on(sparge_plan *plan, sparge_backend backend, sparge_isa isa, sparge_dtype dtype,
               int threads)
{
    for (int n = 0; n < plan->parts; n++) {
        sparge_options *o = &plan->part[n].options;
        o->backend = backend;
        o->isa = isa;
        o->qk_dtype = o->pv_dtype = dtype;
        o->threads = threads;
    }
}

static run run_on(const question *a, sparge_plan *plan, sparge_backend backend, sparge_isa isa,
                  sparge_dtype dtype, int threads)
{
    sparge_error error;
    run r = run_make(a);
    on(plan, backend, isa, dtype, threads);
    const sparge_status status = sparge_plan_run(plan, NULL, &r.result, &error);
    check(status == SPARGE_OK, "%s, %s, %d threads: %s", sparge_backend_string(backend),
          sparge_isa_string(isa), threads, error.text);
    return r;
}

/* The reference, and every instruction set that is here. */
static void same_bits_everywhere(const question *a, sparge_plan *plan, int turn)
{
    if (plan->part[0].options.rules != SPARGE_RULES_DEFAULT) /* which are of ref alone */
        return;
    for (int e = 0; e < 2; e++) {
        const sparge_dtype dtype = e ? SPARGE_INT8 : SPARGE_F32;
        run want = run_on(a, plan, SPARGE_REF, SPARGE_ISA_AUTO, dtype, 0);
        for (int isa = SPARGE_ISA_SCALAR; isa < SPARGE_ISAS; isa++) {
            if (!sparge_isa_available((sparge_isa)isa))
                continue;
            const int threads = (isa + e + turn) % 2 ? 3 : 1;
            run got = run_on(a, plan, SPARGE_CPU, (sparge_isa)isa, dtype, threads);
            same_run(a, &got, &want);
            run_free(&got);
        }
        run_free(&want);
    }
}

/* ---- Counts ---- */

static void count_line(const question *a, row *x, int64_t n, int64_t i, sparge_counts *c)
{
    const sparge_problem *p = &x->part->problem;
    const sparge_options *o = &x->part->options;
    for (int64_t first = 0; first < p->k_len; first += o->block_k) {
        int64_t attended = 0, visible = 0;
        for (int64_t t = i * o->block_q; t < p->q_len && t < (i + 1) * o->block_q; t++)
            for (int64_t key = first; key < p->k_len && key < first + o->block_k; key++) {
                visible += sees(p, o->causal, t, key);
                attended += sees(p, o->causal, t, key) && attends(x, &a->x.p, n, t, key);
            }
        c->qk_done += attended > 0;
        c->pv_done += attended > 0;
        c->tile_tokens += attended > 0 ? visible : 0;
        c->qk_tokens += attended;
        c->pv_tokens += attended;
    }
}

/* Pair by pair, if lambda skips nothing. */
static void check_counts(const question *a, const sparge_plan *plan, const sparge_counts *got)
{
    const sparge_problem *p = &a->x.p;
    const sparge_options *o = &plan->part[0].options;
    for (int64_t n = 0; n < p->batch * p->heads; n++) {
        sparge_counts want = {0};
        for (int e = 0; e < plan->parts; e++) {
            row x = row_make(&plan->part[e]);
            for (int64_t i = 0; i < blocks(p->q_len, x.part->options.block_q); i++)
                count_line(a, &x, n, i, &want);
            check_free(x.bits);
        }
        for (int64_t t = 0; t < p->q_len; t++) {
            int64_t seen = 0;
            for (int64_t key = 0; key < p->k_len; key++)
                seen += sees(p, a->x.o.causal, t, key);
            want.tokens += seen;
            if (t % o->block_q == o->block_q - 1 || t == p->q_len - 1) /* it sees most */
                want.pairs += blocks(seen, o->block_k);
        }
        same_counts(&got[n], &want);
    }
}

/* The counts of a run are those of its plan. */
static double density_of(const question *a, const sparge_plan *plan, const sparge_counts *ran)
{
    const int64_t heads = a->x.p.batch * a->x.p.heads;
    sparge_error error;
    sparge_counts *head = check_alloc((size_t)heads * sizeof *head), sum = {0};
    check(sparge_plan_count(plan, head, &error) == SPARGE_OK, "%s", error.text);
    for (int64_t n = 0; n < heads; n++) {
        if (ran)
            same_counts(&head[n], &ran[n]);
        sum.tokens += head[n].tokens;
        sum.qk_tokens += head[n].qk_tokens;
    }
    check_free(head);
    return sparge_density_tokens(&sum);
}

/* ---- The loop ---- */

/* Calls with every method, and a question of every setting. */
static void each(int settings_from, int settings_to,
                 void (*test)(const sparge_method *m, question *a, int index, int setting))
{
    int count;
    const sparge_method *const *all = sparge_methods(&count);
    for (int s = settings_from; s < settings_to; s++) {
        question a;
        question_make(&a, &settings[s]);
        for (int n = 0; n < count; n++) {
            check_case("%s, setting %d", all[n]->name, s);
            test(all[n], &a, n, s);
        }
        question_free(&a);
    }
}

static void check_rows(const sparge_method *m, const question *a, const uint8_t *pairs)
{
    const sparge_problem *p = &a->x.p;
    for (int64_t line = 0; line < problem_rows(&a->x); line++) {
        int64_t seen = 0, attended = 0;
        for (int64_t key = 0; key < p->k_len; key++) {
            const bool visible = sees(p, a->x.o.causal, line % p->q_len, key);
            const uint8_t pair = pairs[line * p->k_len + key];
            check(pair <= 2 && (visible || !pair), "row %lld, key %lld: %d", (long long)line,
                  (long long)key, pair);
            seen += visible;
            attended += pair != 0;
        }
        check(attended || !seen || excepted(m, EMPTY_ROWS), "row %lld attends to no key",
              (long long)line);
    }
}

/* All is kept: the bits are those of dense attention in the same options, if that is one call. */
static void same_as_dense(const question *a, const sparge_plan *plan, const run *got)
{
    sparge_error error;
    sparge_plan dense;
    if (!is_plain(plan))
        return;
    check(sparge_method_plan(sparge_method_find("dense"), &a->x.p, &plan->part[0].options, NULL,
                             NULL, &dense, &error) == SPARGE_OK,
          "%s", error.text);
    run want = run_on(a, &dense, SPARGE_AUTO, SPARGE_ISA_AUTO, SPARGE_F32, 1);
    same_run(a, got, &want);
    run_free(&want);
    sparge_plan_free(&dense);
}

static int plans[64]; /* of each method, in settings */

/* So that a run does all that the plan has. */
static void skip_nothing(sparge_plan *plan)
{
    for (int n = 0; n < plan->parts; n++)
        plan->part[n].options.thresholds.lambda = -INFINITY;
}

static double check_plan(const sparge_method *m, const question *a, sparge_plan *plan, bool bits,
                         int turn)
{
    uint8_t *pairs = pairs_of(plan);
    skip_nothing(plan);
    check_rows(m, a, pairs);
    run r = run_on(a, plan, SPARGE_AUTO, SPARGE_ISA_AUTO, SPARGE_F32, 1);
    judge(a, plan, pairs, r.o, r.lse);
    check_counts(a, plan, r.head);
    const double density = density_of(a, plan, r.head);
    if (density == 1.0)
        same_as_dense(a, plan, &r);
    if (bits)
        same_bits_everywhere(a, plan, turn);
    run_free(&r);
    check_free(pairs);
    return density;
}

/* Many threads make the plan of one. */
static void same_for_threads(const sparge_method *m, question *a, const double *param,
                             const sparge_plan *plan)
{
    sparge_plan other;
    a->x.o.threads = 5;
    check(plan_of(m, a, param, &other), "no plan");
    uint8_t *want = pairs_of(plan), *got = pairs_of(&other);
    check_same(got, want, problem_rows(&a->x) * a->x.p.k_len);
    check_equal(other.multiply_adds, plan->multiply_adds);
    check_free(want);
    check_free(got);
    sparge_plan_free(&other);
    a->x.o.threads = 1;
}

/* The plans of one method in one setting. */
static void right_plans(const sparge_method *m, question *a, int index, int setting)
{
    enum { DEFAULTS, SHORT, LOW, HIGH, ALL_LOW, WAYS };
    for (int way = 0; way < (m->param[0].name ? WAYS : SHORT); way++) {
        double param[SPARGE_MAX_PARAMS];
        sparge_plan plan;
        check_case("%s, setting %d, plan %d", m->name, setting, way);
        short_defaults(m, param);
        if (way == LOW || way == HIGH)
            param[0] = first_param(m, a->x.p.k_len, way == LOW ? 0.0 : 1.0);
        for (int n = 0; n < SPARGE_MAX_PARAMS && m->param[n].name && way == ALL_LOW; n++)
            param[n] = m->param[n].low;
        if (!plan_of(m, a, way == DEFAULTS ? NULL : param, &plan))
            return;
        plans[index] += way == DEFAULTS;
        const bool bits = way == SHORT && (index + setting) % 3 == 0;
        const double density = check_plan(m, a, &plan, bits, index + setting);
        check(way != HIGH || density == 1.0 || excepted(m, NOT_DENSE), "density %g", density);
        if (way == SHORT)
            same_for_threads(m, a, param, &plan);
        sparge_plan_free(&plan);
    }
}

Test(methods, plans_are_right)
{
    int count;
    const sparge_method *const *all = sparge_methods(&count);
    each(0, SETTINGS, right_plans);
    for (int n = 0; n < count; n++)
        check(plans[n] >= 2, "%s made plans in %d settings", all[n]->name, plans[n]);
}

/* None or few tokens, and no values. */
Test(methods, take_the_smallest)
{
    static const int64_t lengths[][2] = {{0, 5}, {5, 0}, {1, 1}, {1, 70}, {70, 1}};
    int count;
    const sparge_method *const *all = sparge_methods(&count);
    for (int n = 0; n < count; n++)
        for (int e = 0; e < 5; e++)
            for (int causal = SPARGE_CAUSAL_NONE; causal <= SPARGE_CAUSAL_START; causal++) {
                const struct setting s = {1, 2,  1,  lengths[e][0],         lengths[e][1], 8,
                                          3, 16, 16, (sparge_causal)causal, n % 2 == 0};
                question a;
                sparge_plan plan;
                question_make(&a, &s);
                check_case("%s, %lld x %lld, %d", all[n]->name, (long long)s.q_len,
                           (long long)s.k_len, causal);
                if (plan_of(all[n], &a, NULL, &plan))
                    check_plan(all[n], &a, &plan, false, 0);
                sparge_plan_free(&plan);
                a.x.p.v = (sparge_in){.dtype = SPARGE_F32};
                sparge_error error = {""};
                const sparge_status status =
                    sparge_method_plan(all[n], &a.x.p, &a.x.o, &a.context, NULL, &plan, &error);
                check(status == SPARGE_OK || status == SPARGE_ERR_UNSUPPORTED ||
                          (status == SPARGE_ERR_ARGUMENT && strstr(error.text, "v.data is NULL")),
                      "%s", error.text);
                sparge_plan_free(&plan);
                question_free(&a);
            }
}

/* ---- Density ---- */

/* Of how many visible keys rows attend to. */
static double share_of(const question *a, const uint8_t *pairs, int64_t from, int64_t rows)
{
    const int64_t keys = a->x.p.k_len;
    int64_t count = 0, visible = 0;
    for (int64_t e = from * keys; e < (from + rows) * keys; e++) {
        count += pairs[e] == 1;
        visible += a->weight[e] > 0.0;
    }
    return visible ? (double)count / (double)visible : 0.0;
}

/* The first parameter from end to end. */
static void rising_density(const sparge_method *m, question *a, int index, int setting)
{
    (void)index;
    double param[SPARGE_MAX_PARAMS], before = -1.0, recalled = -1.0;
    uint8_t *last = NULL;
    short_defaults(m, param);
    for (int n = 0; n <= 6 && m->param[0].name && fits(m, setting); n++) {
        sparge_plan plan;
        param[0] = first_param(m, a->x.p.k_len, n / 6.0);
        check_case("%s, %s %g", m->name, m->param[0].name, param[0]);
        if (!plan_of(m, a, param, &plan))
            break;
        const double density = density_of(a, &plan, NULL);
        uint8_t *pairs = pairs_of(&plan);
        const double now = recall(a, pairs, 0, problem_rows(&a->x));
        bool nested = true;
        for (int64_t e = 0; e < problem_rows(&a->x) * a->x.p.k_len; e++)
            nested = nested && !(last && last[e] == 1 && pairs[e] != 1);
        check(density >= before, "density falls from %g to %g", before, density);
        check(now >= recalled || !nested, "recall falls from %g to %g", recalled, now);
        before = density;
        recalled = now;
        check_free(last);
        last = pairs;
        sparge_plan_free(&plan);
    }
    check_free(last);
}

Test(methods, density_never_falls) { each(0, GRID + 1, rising_density); }

/* The pairs of a yardstick of this density, in the blocks of other options. */
static uint8_t *yardstick(const char *name, question *a, const sparge_options *o, double density,
                          double seed)
{
    sparge_options options = a->x.o;
    const double param[SPARGE_MAX_PARAMS] = {fmin(1.0, density), seed};
    sparge_plan plan;
    sparge_error error;
    options.block_q = o->block_q;
    options.block_k = o->block_k;
    check(sparge_method_plan(sparge_method_find(name), &a->x.p, &options, NULL, param, &plan,
                             &error) == SPARGE_OK,
          "%s", error.text);
    uint8_t *pairs = pairs_of(&plan);
    sparge_plan_free(&plan);
    return pairs;
}

/* Recall of chance, and of the blocks with most attention for a pair, at the density of each head.
 * The latter may keep one block more. */
static void of_blocks(question *a, const uint8_t *pairs, const sparge_options *o, double *low,
                      double *high)
{
    enum { SEEDS = 3 };
    const int64_t rows = a->x.p.q_len, heads = a->x.p.batch * a->x.p.heads;
    *low = *high = 0.0;
    for (int64_t n = 0; n < heads; n++) {
        const double share = share_of(a, pairs, n * rows, rows),
                     more = (double)(o->block_q * o->block_k) / (double)(rows * a->x.p.k_len) * 2.0;
        uint8_t *best = yardstick("oracle_mass", a, o, share + more, 0.0);
        *high += recall(a, best, n * rows, rows) / (double)heads;
        check_free(best);
        for (int seed = 0; seed < SEEDS; seed++) {
            uint8_t *chance = yardstick("random", a, o, share, seed + 1.0);
            *low += recall(a, chance, n * rows, rows) / (double)(heads * SEEDS);
            check_free(chance);
        }
    }
}

/* Recall of the best pairs, at the density of each row, and up to one of STEPS more. */
enum { STEPS = 16 };
static uint8_t *best_pairs[STEPS + 1]; /* of the setting at hand */

static double of_pairs(const question *a, const uint8_t *pairs)
{
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t line = 0; line < problem_rows(&a->x); line++) {
        const int step = (int)ceil(STEPS * share_of(a, pairs, line, 1));
        const double r = recall_of_row(a, best_pairs[step], line);
        sum += isnan(r) ? 0.0 : r;
        count += !isnan(r);
    }
    return sum / (double)count;
}

/* Whole blocks are held against the best blocks, others against the best pairs of each row. */
static void between(const sparge_method *m, question *a, int index, int setting)
{
    double param[SPARGE_MAX_PARAMS], low, high;
    sparge_plan plan;
    sparge_error error;
    for (int n = 0; n <= STEPS && index == 0; n++) {
        check_free(best_pairs[n]);
        best_pairs[n] = yardstick("oracle_pairs", a, &a->x.o, (double)n / STEPS, 0.0);
    }
    short_defaults(m, param);
    if (!strcmp(m->name, "random") || !m->param[0].name || !fits(m, setting))
        return;
    free(a->state);
    a->state = NULL;
    if (sparge_method_plan_at(m, &a->x.p, &a->x.o, &a->context, param, 0.3, NULL, &plan, &error)) {
        param[0] = first_param(m, a->x.p.k_len, 0.0); /* the nearest, if it makes plans here */
        if (!plan_of(m, a, param, &plan))
            return;
        check(strstr(error.text, "cannot be reached"), "%s", error.text);
    }
    uint8_t *pairs = pairs_of(&plan);
    const double got = recall(a, pairs, 0, problem_rows(&a->x));
    of_blocks(a, pairs, &plan.part[0].options, &low, &high);
    if (!is_plain(&plan) || is_partial(&plan))
        high = of_pairs(a, pairs);
    check(got >= low || excepted(m, NOT_ABOVE_RANDOM), "recall %g is below chance's, %g", got, low);
    check(got <= high || excepted(m, NOT_BELOW_ORACLE), "recall %g is above the oracle's, %g", got,
          high);
    cr_log_info("%s, setting %d: recall %.4f <= %.4f <= %.4f", m->name, setting, low, got, high);
    check_plan(m, a, &plan, (index + setting) % 2 == 0, index + 1);
    check_free(pairs);
    sparge_plan_free(&plan);
}

Test(methods, between_random_and_oracle)
{
    each(0, GRID + 1, between);
    for (int n = 0; n <= STEPS; n++)
        check_free(best_pairs[n]);
}

/* ---- What is not finite ---- */

enum { POISONED = 41, CHANNEL = 1 };

static bool finite_row(const float *o, int64_t dim_v, int64_t except)
{
    for (int64_t c = 0; c < dim_v; c++)
        if (c != except && !isfinite(o[c]))
            return false;
    return true;
}

/* A query, a key and an element of a value of the first head. */
static void hidden_nan(const sparge_method *m, question *a, int index, int setting)
{
    (void)index, (void)setting;
    static const float poisons[] = {NAN, INFINITY};
    const sparge_problem *p = &a->x.p;
    const int64_t gqa = p->heads / p->kv_heads;
    for (int which = 0; which < 6 && fits(m, setting); which++) { /* of q, k, v */
        problem x = a->x;
        tensor *t = which / 2 == 0 ? &x.q : which / 2 == 1 ? &x.k : &x.v;
        float *bad = tensor_row(t, 0, 0, POISONED) + CHANNEL, was = *bad;
        double param[SPARGE_MAX_PARAMS];
        sparge_plan plan;
        check_case("%s, setting %d, %g in %c", m->name, setting, (double)poisons[which % 2],
                   "qkv"[which / 2]);
        *bad = poisons[which % 2];
        problem_write(&x);
        short_defaults(m, param);
        if (!plan_of(m, a, param, &plan))
            which = 6;
        else {
            uint8_t *pairs = pairs_of(&plan);
            skip_nothing(&plan); /* or what it skips would hide the NaN */
            run r = run_on(a, &plan, SPARGE_AUTO, SPARGE_ISA_AUTO,
                           which % 2 ? SPARGE_INT8 : SPARGE_F32, 1);
            for (int64_t line = 0; line < problem_rows(&a->x); line++) {
                const bool near = which / 2 == 0 ? line == POISONED : line / p->q_len < gqa;
                const uint8_t pair = which / 2 == 0 ? near : pairs[line * p->k_len + POISONED];
                const float *o = r.o + line * p->dim_v;
                const bool all = which / 2 < 2;
                check(near && pair == 1 ? isnan(o[CHANNEL]) || isinf(o[CHANNEL])
                      : near && pair    ? true
                                        : isfinite(o[CHANNEL]),
                      "row %lld has %g", (long long)line, (double)o[CHANNEL]);
                check((near && pair && all) || finite_row(o, p->dim_v, CHANNEL),
                      "row %lld has other channels", (long long)line);
            }
            run_free(&r);
            check_free(pairs);
            sparge_plan_free(&plan);
        }
        *bad = was;
        problem_write(&x);
    }
}

Test(methods, nan_goes_to_whom_it_concerns) { each(0, GRID + 1, hidden_nan); }

/* ---- Refusals ---- */

static void refuse(const sparge_method *m, const question *a, const sparge_options *o,
                   const sparge_context *context, const double *param, sparge_status want,
                   const char *word)
{
    sparge_plan plan;
    sparge_error error = {""};
    memset(&plan, 0xFF, sizeof plan);
    const sparge_status got = sparge_method_plan(m, &a->x.p, o, context, param, &plan, &error);
    check(got == want && strstr(error.text, m->name) && strstr(error.text, word), "%s: %s",
          sparge_status_string(got), error.text);
    check(!plan.parts && !plan.memory, "not empty");
}

static void bad_params(const sparge_method *m, const question *a, const sparge_options *o)
{
    for (int n = 0; n < SPARGE_MAX_PARAMS && m->param[n].name; n++) {
        const sparge_param *q = &m->param[n];
        const double bad[] = {(double)NAN, nextafter(q->low, -INFINITY),
                              nextafter(q->high, INFINITY), q->low + 0.5};
        for (int e = 0; e < (q->whole ? 4 : 3); e++) {
            double param[SPARGE_MAX_PARAMS];
            check_case("%s, %s %g", m->name, q->name, bad[e]);
            short_defaults(m, param);
            check(q->usual >= q->low && q->usual <= q->high && q->low < q->high && q->what[0] &&
                      (!q->whole || floor(q->usual) == q->usual),
                  "default or range");
            param[n] = bad[e];
            if (!(bad[e] >= q->low && bad[e] <= q->high) || e == 3)
                refuse(m, a, o, &a->context, param, SPARGE_ERR_ARGUMENT, q->name);
        }
    }
}

static void refusals(const sparge_method *m, question *a, int index, int setting)
{
    (void)index, (void)setting;
    sparge_options o = a->x.o;
    const sparge_context none = {0};
    o.causal = m->needs & SPARGE_NEEDS_NOT_CAUSAL ? SPARGE_CAUSAL_NONE : SPARGE_CAUSAL_END;
    bad_params(m, a, &o);
    check_case("%s, needs", m->name);
    if (m->needs & (SPARGE_NEEDS_GRID | SPARGE_NEEDS_SEGMENTS | SPARGE_NEEDS_STATE))
        refuse(m, a, &o, &none, NULL, SPARGE_ERR_UNSUPPORTED, "needs");
    o.causal = m->needs & SPARGE_NEEDS_CAUSAL ? SPARGE_CAUSAL_NONE : SPARGE_CAUSAL_END;
    if (m->needs & (SPARGE_NEEDS_CAUSAL | SPARGE_NEEDS_NOT_CAUSAL))
        refuse(m, a, &o, &a->context, NULL, SPARGE_ERR_UNSUPPORTED, "causal");
}

Test(methods, refuse_in_a_sentence) { each(1, 2, refusals); }

/* Plans refuse what running them would refuse. */
Test(methods, spargeattn_refuses_early)
{
    question a;
    sparge_plan plan;
    sparge_error error;
    double param[SPARGE_MAX_PARAMS];
    question_make(&a, &settings[0]);
    short_defaults(sparge_method_find("spargeattn"), param);
    param[2] = -0.5;
    check_equal(sparge_method_plan(sparge_method_find("spargeattn"), &a.x.p, &a.x.o, NULL, param,
                                   &plan, &error),
                SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "topk is -0.5"), "%s", error.text);
    a.x.o.backend = SPARGE_CPU;
    check_equal(sparge_method_plan(sparge_method_find("spargeattn_paper"), &a.x.p, &a.x.o, NULL,
                                   NULL, &plan, &error),
                SPARGE_ERR_UNSUPPORTED);
    check(strstr(error.text, "rules"), "%s", error.text);
    question_free(&a);
}

/* By name, of which each is there once, in order. */
Test(methods, are_found_by_name)
{
    int count;
    const sparge_method *const *all = sparge_methods(&count);
    for (int n = 0; n < count; n++) {
        check(sparge_method_find(all[n]->name) == all[n], "%s", all[n]->name);
        check(n == 0 || strcmp(all[n - 1]->name, all[n]->name) < 0, "%s", all[n]->name);
        check(all[n]->title && all[n]->paper && all[n]->repository && all[n]->commit &&
                  all[n]->kind && all[n]->evidence,
              "%s is not said", all[n]->name);
    }
    check(!sparge_method_find("xyz") && !sparge_method_find(NULL), "found");
}

/* ---- SpargeAttn is what it was ---- */

static void is_itself(question *a, sparge_rules rules, const char *name, const double *param)
{
    sparge_error error;
    sparge_options o = a->x.o;
    sparge_plan plan;
    const sparge_method *m = sparge_method_find(name);
    a->x.o.backend = rules == SPARGE_RULES_DEFAULT ? SPARGE_AUTO : SPARGE_REF;
    a->x.o.qk_dtype = a->x.o.pv_dtype = SPARGE_INT8;
    a->x.o.skip_rows = 1; /* so that lambda skips in some row */
    check(sparge_method_plan(m, &a->x.p, &a->x.o, NULL, param, &plan, &error) == SPARGE_OK, "%s",
          error.text);
    o = a->x.o;
    o.rules = rules;
    o.thresholds = (sparge_thresholds){.tau = (float)param[0],
                                       .theta = (float)param[1],
                                       .topk = (float)param[2],
                                       .lambda = (float)param[3]};
    o.sink = param[4] != 0.0;
    run want = run_make(a), got = run_make(a), later = run_make(a);
    check(sparge_attention(&a->x.p, &o, &want.result, &error) == SPARGE_OK, "%s", error.text);
    check(sparge_plan_run(&plan, NULL, &got.result, &error) == SPARGE_OK, "%s", error.text);
    same_run(a, &got, &want);
    check_equal(got.result.backend, want.result.backend);
    check(sparge_plan_predict(&plan, NULL, &error) == SPARGE_OK, "%s", error.text);
    check(sparge_plan_run(&plan, NULL, &later.result, &error) == SPARGE_OK, "%s", error.text);
    same_run(a, &later, &want);
    const sparge_counts *c = &want.result.counts;
    check(c->qk_done < c->pairs, "nothing is skipped");
    check(param[3] < -1.0 || c->pv_done < (double)c->qk_done, "lambda skips nothing");
    run_free(&want);
    run_free(&got);
    run_free(&later);
    sparge_plan_free(&plan);
}

Test(methods, spargeattn_is_itself)
{
    static const struct {
        const char *name;
        sparge_rules rules;
    } sets[] = {{"spargeattn", SPARGE_RULES_DEFAULT},
                {"spargeattn_paper", SPARGE_RULES_PAPER},
                {"spargeattn_upstream", SPARGE_RULES_UPSTREAM}};
    question a;
    question_make(&a, &settings[0]);
    for (int n = 0; n < 3; n++)
        for (int e = 0; e < 3; e++) {
            double param[SPARGE_MAX_PARAMS];
            check_case("%s, %d", sets[n].name, e);
            short_defaults(sparge_method_find(sets[n].name), param);
            if (e) {
                const double other[5] = {0.7, 0.4, e == 2 ? 0.2 : -1.0, 0.0, e == 2};
                memcpy(param, other, sizeof other);
            }
            is_itself(&a, sets[n].rules, sets[n].name, param);
        }
    question_free(&a);
}
