/* SPDX-License-Identifier: Apache-2.0 */
/* attend.c: stage 2 (Algorithm 1 lines 3 and 7-22) against the oracle and against a judge that
 * lives here: section 5 of the definition once more, in double, with lambda, the codes of P and the
 * rules.
 *
 * How far o may lie from the oracle, which does not code P. In one tile a row weighs key t by code
 * / P = p' + e with |e| <= min(1 / 2P, p') (a p' below 1 / 2P becomes 0), so that o - oracle = sum
 * w e (v - oracle) / sum w (p' + e),    w = exp(tile maximum - row maximum), and |o - oracle| <=
 * range(v) * sum w min(1 / 2P, p') / l: the judge adds that sum up ("coding"). Under half and fp8 P
 * has D = 11 or 4 binary digits, 256 p of e4m3 as few below 2^-14 as p of binary16; l adds p
 * itself, so that |o - oracle| <= max|v| * sum w min(p, max(2^-D p, 2^-D-14)) / l. From the judge,
 * which codes P as well, only those codes may part that f32 puts on the other side of a rounding
 * edge: the judge adds up what one code more or less can do there ("edge"). */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/problem.h"

TestSuite(attend);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

enum { LONGEST = 128 }; /* block that the judge takes */

static const double log2e = 1.4426950408889634;
enum { QKS = 3, PVS = 5 }; /* so many of these are for qk and for pv */

static double larger(double a, double b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static void *zeros(int64_t count, size_t size) { return calloc((size_t)count + 1, size); }

static double scale_of(const problem *x)
{
    return x->o.softmax_scale > 0.0f ? (double)x->o.softmax_scale
                                     : (double)(1.0f / sqrtf((float)x->p.dim));
}

static bool sees(const problem *x, int64_t query, int64_t key)
{
    if (x->o.causal == SPARGE_CAUSAL_NONE)
        return true;
    return key <= query + (x->o.causal == SPARGE_CAUSAL_END ? x->p.k_len - x->p.q_len : 0);
}

static double bias_of(const problem *x, int64_t b, int64_t h, int64_t key)
{
    const int64_t kv = b * x->p.kv_heads + h / (x->p.heads / x->p.kv_heads);
    return x->k_bias ? (double)x->k_bias[kv * x->p.k_len + key] : 0.0;
}

/* Keys of block j that a query sees. */
static int64_t visible_of(const problem *x, int64_t query, int64_t j)
{
    int64_t visible = 0;
    for (int64_t t = j * x->o.block_k; t < smaller((j + 1) * x->o.block_k, x->p.k_len); t++)
        visible += sees(x, query, t);
    return visible;
}

static bool pair_visible(const problem *x, int64_t i, int64_t j)
{
    for (int64_t r = i * x->o.block_q; r < smaller((i + 1) * x->o.block_q, x->p.q_len); r++)
        if (visible_of(x, r, j))
            return true;
    return false;
}

/* ---- The judge: codes ---- */

/* One head. */
typedef struct coded {
    int16_t *code; /* [tokens][dim] */
    float *step;   /* [blocks], or [blocks][dim] */
    double *value; /* [tokens][dim] what the codes stand for */
} coded;

static coded code(const float *x, int64_t tokens, int64_t dim, int64_t block, int qmax, float extra,
                  bool by_channel, const float *mean)
{
    const int64_t steps = by_channel ? dim : 1;
    coded to = {zeros(tokens * dim, sizeof(int16_t)),
                zeros(blocks(tokens, block) * steps, sizeof(float)),
                zeros(tokens * dim, sizeof(double))};
    for (int64_t n = 0; n < tokens * dim; n++)
        to.value[n] = (double)(x[n] - (mean ? mean[n % dim] : 0.0f));
    for (int64_t s = 0; qmax && s < blocks(tokens, block) * steps; s++) {
        const int64_t first = s / steps * block, end = smaller(first + block, tokens);
        float top = 0.0f;
        for (int64_t n = first * dim; n < end * dim; n++)
            if (!by_channel || n % dim == s % steps)
                top = fmaxf(top, (float)fabs(to.value[n]));
        const float step = top / (float)qmax + extra;
        to.step[s] = step < FLT_MIN ? 0.0f : step;
        for (int64_t n = first * dim; n < end * dim; n++)
            if (!by_channel || n % dim == s % steps) {
                const float quotient = step < FLT_MIN ? 0.0f : roundf((float)to.value[n] / step);
                to.code[n] = (int16_t)fmaxf((float)-qmax, fminf(quotient, (float)qmax));
                to.value[n] = (double)to.code[n] * (double)to.step[s];
            }
    }
    return to;
}

/* The nearest number of so many binary digits, fewer below 2^lowest; ties to even. */
static double nearest(double x, int digits, int lowest)
{
    const int exponent = x == 0.0 || ilogb(x) < lowest ? lowest : ilogb(x);
    const double ulp = ldexp(1.0, exponent + 1 - digits);
    return rint(x / ulp) * ulp;
}

/* V of one head as half and fp8 take it. */
static coded narrowed(const float *x, int64_t tokens, int64_t dim, sparge_dtype pv)
{
    coded to = code(x, tokens, dim, 1, 0, 0.0f, false, NULL);
    for (int64_t c = 0; c < dim; c++) {
        float top = 0.0f;
        for (int64_t n = c; n < tokens * dim; n += dim)
            top = fmaxf(top, fabsf(x[n]));
        const float step = top / 448.0f;
        for (int64_t n = c; n < tokens * dim; n += dim) {
            const double e4m3 = step < FLT_MIN ? 0.0 : nearest((double)(x[n] / step), 4, -6);
            to.value[n] =
                pv == SPARGE_F16 ? (double)round_to(SPARGE_F16, x[n]) : e4m3 * (double)step;
        }
    }
    return to;
}

static void coded_free(coded *x)
{
    free(x->code);
    free(x->step);
    free(x->value);
}

/* f32 within a block of keys in row order, f64 over the blocks. */
static void mean_key(const problem *x, int64_t b, int64_t kv, float *mean)
{
    for (int64_t c = 0; c < x->p.dim; c++) {
        double total = 0.0;
        for (int64_t first = 0; first < x->p.k_len; first += x->o.block_k) {
            float sum = 0.0f;
            for (int64_t t = first; t < smaller(first + x->o.block_k, x->p.k_len); t++)
                sum += tensor_row(&x->k, b, kv, t)[c];
            total += (double)sum;
        }
        mean[c] = (float)(total / (double)x->p.k_len);
    }
}

/* ---- The judge: online softmax ---- */

typedef struct verdict {
    int qk_qmax, pv_qmax;  /* 0: no codes */
    int p_digits;          /* of half and fp8, or 0 */
    double bias;           /* the largest that does not hide a key */
    float extra;           /* added to the steps of q and k */
    int64_t group, exempt; /* rows that decide lambda together; last kept blocks that ignore it */
    double *o;             /* [rows][dim_v] */
    double *m, *l, *lse;   /* [rows] natural units */
    double *coding, *edge; /* [rows] as above, in units of range */
    double *range; /* [batch][heads][dim_v] of v, in codes; max|v| where l adds P unrounded */
    float *share;  /* [batch][heads][q_blocks][k_blocks] pv_done */
    sparge_counts *head;
    int64_t decided, skipped; /* groups */
    double margin;            /* of the closest decision, in units of what f32 may be wrong by */
    bool codes_equal;         /* those of the intermediates, bit for bit */
} verdict;

typedef struct row {
    double m, l, coding, edge, *o;
} row;

/* Lines 12, 13 and 16 of one row: s [visible] are its scores, -inf where it does not attend, v the
 * keys' values. */
static void accumulate_pv(const verdict *w, row *r, const double *s, int64_t visible, double local,
                          const double *v, int64_t dim_v)
{
    const double m = larger(r->m, local), shrink = exp(r->m - m), P = w->pv_qmax;
    /* A bias adds its own rounding, and that of the sum. */
    const double unit = (w->bias > 0.0 ? 3e-7 : 2e-7) * log2e,
                 extra = w->bias > 0.0 ? fabs(local) + 3.0 * w->bias : 0.0;
    r->m = m;
    r->l *= shrink;
    r->coding *= shrink;
    r->edge *= shrink;
    for (int64_t c = 0; c < dim_v; c++)
        r->o[c] *= shrink;
    for (int64_t t = 0; t < visible; t++) {
        if (s[t] == -INFINITY)
            continue;
        const double p_of_m = exp(s[t] - m);
        double weight = p_of_m;
        if (w->pv_qmax) {
            const double to_m = exp(local - m), p = exp(s[t] - local), at = P * p + 0.5;
            const double off = local - s[t] + fabs(local) + extra;
            const double wrong = w->qk_qmax ? unit * off : 3e-5;
            weight = to_m * floor(at) / P;
            r->coding += to_m * fmin(0.5 / P, p);
            if (fabs(at - round(at)) <= P * p * wrong + 4e-7 * (at + 1.0))
                r->edge += to_m / P;
        }
        if (w->p_digits) {
            const double wrong =
                (w->qk_qmax ? unit * (m - s[t] + 2.0 * fabs(m) + 3.0 * w->bias) : 3e-5) + 4e-7;
            weight = nearest(p_of_m, w->p_digits, -14);
            r->coding += fmin(p_of_m, ldexp(fmax(p_of_m, 0x1p-14), -w->p_digits));
            r->edge += nearest(p_of_m * (1.0 + wrong), w->p_digits, -14) -
                       nearest(p_of_m * (1.0 - wrong), w->p_digits, -14);
        }
        r->l += w->p_digits ? p_of_m : weight;
        for (int64_t c = 0; c < dim_v; c++)
            r->o[c] += weight * v[t * dim_v + c];
    }
}

static void judge_block(const problem *x, int64_t b, int64_t h, int64_t i, const coded *q,
                        const coded *k, const coded *v, const float *mean, verdict *w)
{
    const sparge_problem *p = &x->p;
    const int64_t first = i * x->o.block_q, rows = smaller(x->o.block_q, p->q_len - first);
    const int64_t line = (b * p->heads + h) * p->q_len + first,
                  k_blocks = blocks(p->k_len, x->o.block_k);
    const double scale = scale_of(x), lambda = (double)x->o.thresholds.lambda;
    sparge_counts *head = &w->head[b * p->heads + h];
    static double s[LONGEST][LONGEST];
    row state[LONGEST];
    for (int64_t r = 0; r < rows; r++)
        state[r] = (row){.m = -INFINITY, .o = &w->o[(line + r) * p->dim_v]};
    int64_t left = 0;
    for (int64_t j = 0; j < k_blocks; j++) {
        head->pairs += pair_visible(x, i, j);
        left += mask_has(x, b, h, i, j) && pair_visible(x, i, j);
    }

    for (int64_t j = 0; j < k_blocks; j++) {
        int64_t visible[LONGEST], attended[LONGEST], done = 0;
        double local[LONGEST];
        const bool kept = mask_has(x, b, h, i, j) && pair_visible(x, i, j);
        for (int64_t r = 0; r < rows; r++) {
            visible[r] = visible_of(x, first + r, j);
            attended[r] = 0;
            local[r] = -INFINITY;
            head->tokens += visible[r];
            head->tile_tokens += kept ? visible[r] : 0;
            for (int64_t t = 0; kept && t < visible[r]; t++) {
                const int64_t token = j * x->o.block_k + t;
                const double *key = k->value + token * p->dim;
                s[r][t] = -INFINITY;
                if (!pair_open(x, b, h, first + r, token))
                    continue;
                attended[r]++;
                s[r][t] = 0.0;
                for (int64_t c = 0; c < p->dim; c++)
                    s[r][t] += q->value[(first + r) * p->dim + c] * key[c];
                s[r][t] = s[r][t] * scale + bias_of(x, b, h, token);
                local[r] = larger(local[r], s[r][t]);
            }
            head->qk_tokens += attended[r];
        }
        if (!kept)
            continue;
        for (int64_t r0 = 0; r0 < rows; r0 += w->group) {
            double gap = -INFINITY, unit = w->qk_qmax ? 0.0 : 1e-5;
            bool votes = false;
            for (int64_t r = r0; r < smaller(rows, r0 + w->group); r++)
                if (attended[r]) {
                    votes = true;
                    gap = larger(gap, local[r] - state[r].m);
                    unit = larger(unit, 4e-7 * (1.0 + fabs(local[r]) + fabs(state[r].m)));
                }
            const bool free_to_skip = votes && left > w->exempt,
                       skips = free_to_skip && gap <= lambda;
            if (free_to_skip && gap != lambda && gap < INFINITY)
                w->margin = fmin(w->margin, fabs(gap - lambda) / unit);
            w->decided++;
            w->skipped += skips;
            for (int64_t r = r0; r < smaller(rows, r0 + w->group); r++) {
                if (!skips) {
                    done++;
                    head->pv_tokens += attended[r];
                    if (attended[r])
                        accumulate_pv(w, &state[r], s[r], visible[r], local[r],
                                      v->value + j * x->o.block_k * p->dim_v, p->dim_v);
                } else if (x->o.rules == SPARGE_RULES_PAPER)
                    for (int64_t t = 0; t < visible[r]; t++)
                        state[r].l += exp(s[r][t] - state[r].m);
            }
        }
        head->qk_done++;
        head->pv_done += (double)done / (double)rows;
        w->share[((b * p->heads + h) * blocks(p->q_len, x->o.block_q) + i) * k_blocks + j] =
            (float)done / (float)rows;
        left--;
    }

    for (int64_t r = 0; r < rows; r++) {
        double lost = 0.0; /* what smoothing took from every score */
        for (int64_t c = 0; mean && c < p->dim; c++)
            lost += scale * (double)tensor_row(&x->q, b, h, first + r)[c] * (double)mean[c];
        w->m[line + r] = state[r].m;
        w->l[line + r] = state[r].l;
        w->lse[line + r] = state[r].l > 0.0 ? state[r].m + log(state[r].l) + lost : -INFINITY;
        w->coding[line + r] = state[r].l > 0.0 ? state[r].coding / state[r].l : 0.0;
        w->edge[line + r] = state[r].l > 0.0 ? state[r].edge / state[r].l : 0.0;
        for (int64_t c = 0; state[r].l > 0.0 && c < p->dim_v; c++)
            state[r].o[c] /= state[r].l;
    }
}

static void judge_codes(bool coded_at_all, const char *what, int64_t head, const coded *x,
                        int64_t tokens, int64_t dim, int64_t steps, const int16_t *code,
                        const float *step)
{
    static const unsigned char poison[] = {0xFF, 0xFF, 0xFF, 0xFF};
    if (coded_at_all) {
        check_same_as(check_text("codes of %s", what), code + head * tokens * dim, x->code,
                      tokens * dim);
        check_same_as(check_text("steps of %s", what), step + head * steps, x->step, steps);
    } else if (tokens) /* "left as they were" */
        check(!memcmp(code + head * tokens * dim, poison, 2) &&
                  !memcmp(step + head * steps, poison, 4),
              "codes of %s were written though there are none", what);
}

/* Judges a problem of finite values; its codes are compared with those of the intermediates. */
static verdict judge(const problem *x, const sparge_intermediates *intermediates)
{
    const sparge_problem *p = &x->p;
    const sparge_options *o = &x->o;
    const int64_t rows = problem_rows(x), heads = p->batch * p->heads,
                  group = p->heads / p->kv_heads;
    const int64_t q_blocks = blocks(p->q_len, o->block_q), k_blocks = blocks(p->k_len, o->block_k);
    static const int qk_qmax[] = {[SPARGE_INT8] = 127, [SPARGE_INT12] = 2047};
    static const int pv_qmax[] = {[SPARGE_INT8] = 127, [SPARGE_INT12] = 4095};
    static const int p_digits[SPARGE_FASTEST] = {[SPARGE_F16] = 11, [SPARGE_FP8] = 4};
    verdict w = {
        .qk_qmax = qk_qmax[o->qk_dtype],
        .pv_qmax = pv_qmax[o->pv_dtype],
        .p_digits = p_digits[o->pv_dtype],
        .margin = INFINITY,
        .extra = o->rules == SPARGE_RULES_UPSTREAM && o->qk_dtype == SPARGE_INT8 ? 1e-7f : 0.0f,
        .group = o->skip_rows                       ? o->skip_rows
                 : o->rules == SPARGE_RULES_DEFAULT ? 64
                 : o->rules == SPARGE_RULES_PAPER   ? (o->block_q + 3) / 4
                                                    : o->block_q,
        .exempt = o->rules != SPARGE_RULES_UPSTREAM ? 0
                  : o->block_q > o->block_k         ? 2
                                                    : 1,
        .o = zeros(rows * p->dim_v, sizeof(double)),
        .m = zeros(rows, sizeof(double)),
        .l = zeros(rows, sizeof(double)),
        .lse = zeros(rows, sizeof(double)),
        .coding = zeros(rows, sizeof(double)),
        .edge = zeros(rows, sizeof(double)),
        .range = zeros(heads * p->dim_v, sizeof(double)),
        .head = zeros(heads, sizeof(sparge_counts)),
        .share = zeros(heads * q_blocks * k_blocks, sizeof(float)),
    };
    float *mean = zeros(p->dim, sizeof *mean);
    for (int64_t n = 0; x->k_bias && n < p->batch * p->kv_heads * p->k_len; n++)
        w.bias = larger(w.bias, isfinite(x->k_bias[n]) ? fabs((double)x->k_bias[n]) : 0.0);
    for (int64_t n = 0; n < p->batch * p->kv_heads; n++) {
        const int64_t b = n / p->kv_heads, kv = n % p->kv_heads;
        const float *key = p->k_len ? tensor_row(&x->k, b, kv, 0) : NULL;
        const float *value = p->k_len ? tensor_row(&x->v, b, kv, 0) : NULL;
        mean_key(x, b, kv, mean);
        coded k = code(key, p->k_len, p->dim, o->block_k, w.qk_qmax, w.extra, false,
                       o->smooth_k ? mean : NULL);
        coded v = w.p_digits
                      ? narrowed(value, p->k_len, p->dim_v, o->pv_dtype)
                      : code(value, p->k_len, p->dim_v, o->block_k, w.pv_qmax, 0.0f, true, NULL);
        judge_codes(w.qk_qmax, "k", n, &k, p->k_len, p->dim, k_blocks, intermediates->k_int,
                    intermediates->k_scale);
        judge_codes(w.pv_qmax, "v", n, &v, p->k_len, p->dim_v, k_blocks * p->dim_v,
                    intermediates->v_int, intermediates->v_scale);
        if (o->smooth_k && p->k_len)
            check_same_as("k_mean", intermediates->k_mean + n * p->dim, mean, p->dim);
        for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
            const int64_t at = b * p->heads + h;
            coded q = code(p->q_len ? tensor_row(&x->q, b, h, 0) : NULL, p->q_len, p->dim,
                           o->block_q, w.qk_qmax, w.extra, false, NULL);
            judge_codes(w.qk_qmax, "q", at, &q, p->q_len, p->dim, q_blocks, intermediates->q_int,
                        intermediates->q_scale);
            for (int64_t c = 0; c < p->dim_v; c++) {
                double low = INFINITY, high = -INFINITY;
                for (int64_t t = 0; t < p->k_len; t++) {
                    low = fmin(low, v.value[t * p->dim_v + c]);
                    high = fmax(high, v.value[t * p->dim_v + c]);
                }
                w.range[at * p->dim_v + c] = w.p_digits ? larger(high, -low) : high - low;
            }
            for (int64_t i = 0; i < q_blocks; i++)
                judge_block(x, b, h, i, &q, &k, &v, o->smooth_k ? mean : NULL, &w);
            coded_free(&q);
        }
        coded_free(&k);
        coded_free(&v);
    }
    free(mean);
    return w;
}

static void verdict_free(verdict *w)
{
    void *const arrays[] = {w->o,    w->m,     w->l,     w->lse, w->coding,
                            w->edge, w->range, w->share, w->head};
    for (int64_t n = 0; n < COUNT(arrays); n++)
        free(arrays[n]);
}

/* ---- One problem against both ---- */

/* The worst over all problems, as shares of what is allowed; the worst rows' relative L1 by
 * precision. */
typedef struct tally {
    int64_t cases, against_oracle, decided, skipped;
    double o, lse, oracle, row_l1[SPARGE_FASTEST][SPARGE_FASTEST];
} tally;

/* The element of `got` furthest from `want` in units of what is allowed. NaN is further than all
 * else. */
typedef struct worst {
    double excess, got, want, allowed;
    int64_t at;
} worst;

static void compare(worst *w, int64_t at, double got, double want, double allowed)
{
    const double excess = got == want ? 0.0 : fabs(got - want) / allowed;
    if (!(excess <= w->excess))
        *w = (worst){isnan(excess) ? INFINITY : excess, got, want, allowed, at};
}

static double worst_report(const worst *w, const char *what, int64_t row_length, const problem *x)
{
    const int64_t line = w->at / row_length, per_head = x->p.q_len ? x->p.q_len : 1;
    check(w->excess <= 1.0,
          "%s: batch %lld head %lld row %lld channel %lld is %.9g, should be %.9g within %g", what,
          (long long)(line / per_head / x->p.heads), (long long)(line / per_head % x->p.heads),
          (long long)(line % per_head), (long long)(w->at % row_length), w->got, w->want,
          w->allowed);
    return w->excess;
}

static void compare_counts(const char *what, const sparge_counts *got, const sparge_counts *want)
{
    const struct {
        const char *name;
        int64_t got, want;
    } count[] = {
        {"pairs", got->pairs, want->pairs},
        {"qk_done", got->qk_done, want->qk_done},
        {"tokens", got->tokens, want->tokens},
        {"tile_tokens", got->tile_tokens, want->tile_tokens},
        {"qk_tokens", got->qk_tokens, want->qk_tokens},
        {"pv_tokens", got->pv_tokens, want->pv_tokens},
    };
    for (int64_t n = 0; n < COUNT(count); n++)
        check(count[n].got == count[n].want, "%s of %s is %lld, should be %lld", count[n].name,
              what, (long long)count[n].got, (long long)count[n].want);
    check(fabs(got->pv_done - want->pv_done) <= 1e-12 * want->pv_done,
          "pv_done of %s is %.17g, should be %.17g", what, got->pv_done, want->pv_done);
}

static void counts_agree(const problem *x, const answer *a, const verdict *w)
{
    sparge_counts sum = {0};
    for (int64_t n = 0; n < x->p.batch * x->p.heads; n++) {
        compare_counts(check_text("head %lld", (long long)n), &a->head[n], &w->head[n]);
        sum.pairs += w->head[n].pairs;
        sum.qk_done += w->head[n].qk_done;
        sum.pv_done += w->head[n].pv_done;
        sum.tokens += w->head[n].tokens;
        sum.tile_tokens += w->head[n].tile_tokens;
        sum.qk_tokens += w->head[n].qk_tokens;
        sum.pv_tokens += w->head[n].pv_tokens;
    }
    compare_counts("all heads", &a->result.counts, &sum);
    if (!w->skipped)
        check(a->result.counts.pv_done == (double)sum.qk_done,
              "pv_done is %.17g of %lld, nothing was skipped", a->result.counts.pv_done,
              (long long)sum.qk_done);
}

/* ref with the codes of P against the judge: o, lse, m and l. */
static void judge_agrees(const problem *x, const answer *a, const verdict *w, tally *sum)
{
    const int64_t rows = problem_rows(x), dim_v = x->p.dim_v, lines = x->p.batch * x->p.heads;
    check_same_as("pv_done", a->intermediates.pv_done, w->share,
                  lines * blocks(x->p.q_len, x->o.block_q) * blocks(x->p.k_len, x->o.block_k));
    worst o = {0}, lse = {0}, m = {0}, l = {0};
    for (int64_t n = 0; n < rows; n++) {
        for (int64_t c = 0; c < dim_v; c++) {
            const double range = w->range[n / x->p.q_len * dim_v + c], want = w->o[n * dim_v + c];
            compare(&o, n * dim_v + c, (double)a->o.x[n * dim_v + c], want,
                    range * (w->edge[n] + 2e-5) + 2e-6 * fabs(want) + 1e-30);
        }
        const double edge = w->pv_qmax ? w->edge[n] : 0.0;
        const double score = 1e-6 * (1.0 + fabs(w->m[n])),
                     lost = w->lse[n] - w->m[n] - log(w->l[n]);
        compare(&m, n, (double)a->intermediates.m[n], w->m[n] * log2e, 2.0 * score + 1e-5);
        compare(&l, n, (double)a->intermediates.l[n], w->l[n], w->l[n] * (edge + 3e-5 + score));
        compare(&lse, n, (double)a->lse[n], w->lse[n], edge + 3e-5 + score + 1e-6 * fabs(lost));
    }
    sum->o = larger(sum->o, worst_report(&o, "o against the judge", dim_v, x));
    sum->lse = larger(sum->lse, worst_report(&lse, "lse against the judge", 1, x));
    worst_report(&m, "m", 1, x);
    worst_report(&l, "l", 1, x);
}

/* ref against the oracle on the same codes, where lambda skipped nothing. */
static void oracle_agrees(const problem *x, const answer *a, const verdict *w, tally *sum)
{
    const int64_t rows = problem_rows(x), dim_v = x->p.dim_v;
    double *want = zeros(rows * dim_v, sizeof *want), *want_lse = zeros(rows, sizeof *want_lse);
    sparge_error error;
    check(sparge_oracle(&x->p, &x->o, x->mask.bits ? &x->mask : NULL, SPARGE_ORACLE_CODES, want,
                        want_lse, NULL, &error) == SPARGE_OK,
          "%s", error.text);
    worst o = {0}, lse = {0}, l1 = {0};
    for (int64_t n = 0; n < rows; n++) {
        double off = 0.0, size = 0.0;
        for (int64_t c = 0; c < dim_v; c++) {
            const double range = w->range[n / x->p.q_len * dim_v + c];
            off += fabs((double)a->o.x[n * dim_v + c] - want[n * dim_v + c]);
            size += fabs(want[n * dim_v + c]);
            compare(&o, n * dim_v + c, (double)a->o.x[n * dim_v + c], want[n * dim_v + c],
                    range * (w->coding[n] + w->edge[n] + 2e-5) + 1e-6 * fabs(want[n * dim_v + c]) +
                        1e-30);
        }
        const double of_l = w->pv_qmax ? w->coding[n] + w->edge[n] : 0.0;
        compare(&l1, n, off, 0.0, size);
        compare(&lse, n, (double)a->lse[n], want_lse[n],
                -log1p(-fmin(0.9, of_l)) + 5e-5 + 3e-6 * fabs(want_lse[n]));
    }
    sum->oracle = larger(sum->oracle, worst_report(&o, "o against the oracle", dim_v, x));
    worst_report(&lse, "lse against the oracle", 1, x);
    sum->row_l1[x->o.qk_dtype][x->o.pv_dtype] =
        larger(sum->row_l1[x->o.qk_dtype][x->o.pv_dtype], l1.excess);
    if (x->o.pv_dtype == SPARGE_F32)
        check(l1.excess <= 1e-4, "row %lld is %g of its L1 from the oracle's", (long long)l1.at,
              l1.excess);
    sum->against_oracle++;
    free(want);
    free(want_lse);
}

/* Everything about one problem. Returns how many groups lambda skipped; lambda moves until no
 * decision is near enough to its threshold for f32 to decide otherwise. */
static int64_t verify(problem *x, sparge_dtype dtype, tensor_layout layout, tally *sum)
{
    answer a = attend_to(x, SPARGE_F32, layout);
    verdict w = judge(x, &a.intermediates);
    for (int tries = 0; w.margin < 1.0 && tries < 50; tries++) {
        verdict_free(&w);
        answer_free(&a);
        x->o.thresholds.lambda -= 0.0137f;
        a = attend_to(x, SPARGE_F32, layout);
        w = judge(x, &a.intermediates);
    }
    check(w.margin >= 1.0, "a decision on lambda is too close to its threshold");
    counts_agree(x, &a, &w);
    judge_agrees(x, &a, &w, sum);
    if (!w.skipped)
        oracle_agrees(x, &a, &w, sum);
    if (dtype != SPARGE_F32) {
        answer narrow = attend_to(x, dtype, layout);
        for (int64_t n = 0; n < tensor_count(&a.o); n++)
            a.o.x[n] = round_to(dtype, a.o.x[n]);
        same_answer(&narrow, &a);
        answer_free(&narrow);
    }
    const int64_t skipped = w.skipped;
    sum->cases++;
    sum->decided += w.decided;
    sum->skipped += skipped;
    verdict_free(&w);
    answer_free(&a);
    return skipped;
}

static void tally_log(const tally *sum)
{
    cr_log_info(
        "%lld cases, %lld against the oracle; of what is allowed: o %.2f, lse %.2f, oracle %.2f; "
        "lambda skipped %lld of %lld groups",
        (long long)sum->cases, (long long)sum->against_oracle, sum->o, sum->lse, sum->oracle,
        (long long)sum->skipped, (long long)sum->decided);
    for (int64_t n = 0; n < QKS * PVS; n++)
        cr_log_info("qk %-5s pv %-5s: worst row %.2e", sparge_dtype_string(precisions[n / PVS]),
                    sparge_dtype_string(precisions[n % PVS]),
                    sum->row_l1[precisions[n / PVS]][precisions[n % PVS]]);
}

/* ---- Every pair of qmax of every two factors ---- */

enum {
    Q_LEN,
    K_LEN,
    BLOCKS,
    CAUSAL,
    HEADS,
    BATCH,
    DIM,
    DIM_V,
    TYPE_Q,
    TYPE_K,
    TYPE_V,
    TYPE_O,
    LAYOUT_Q,
    LAYOUT_K,
    LAYOUT_V,
    LAYOUT_O,
    MASK,
    SMOOTH,
    SKIP_ROWS,
    LAMBDA,
    QK,
    PV,
    RULES,
    SCALE,
    BIAS,
    FACTORS
};
enum { DENSE, RANDOM, EMPTY_ROWS, PREDICTED, PARTIAL };
enum { MOST = 15 }; /* qmax */

static const struct {
    const char *name;
    int64_t qmax, level[MOST];
} factor[FACTORS] = {
    [Q_LEN] = {"q_len", 15, {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 200}},
    [K_LEN] = {"k_len", 15, {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 200}},
    [BLOCKS] = {"blocks", 5, {1608, 12864, 64128, 2440, 3305}}, /* 33 x 5: two words a mask row */
    [CAUSAL] = {"causal", 3, {SPARGE_CAUSAL_NONE, SPARGE_CAUSAL_END, SPARGE_CAUSAL_START}},
    [HEADS] = {"heads", 3, {22, 42, 31}}, /* 10 * heads + kv_heads */
    [BATCH] = {"batch", 2, {1, 2}},
    [DIM] = {"dim", 8, {1, 8, 40, 64, 80, 128, 192, 256}},
    [DIM_V] = {"dim_v", 8, {1, 8, 40, 64, 80, 128, 192, 256}},
    [TYPE_Q] = {"q", 3, {SPARGE_F32, SPARGE_F16, SPARGE_BF16}},
    [TYPE_K] = {"k", 3, {SPARGE_F32, SPARGE_F16, SPARGE_BF16}},
    [TYPE_V] = {"v", 3, {SPARGE_F32, SPARGE_F16, SPARGE_BF16}},
    [TYPE_O] = {"o", 3, {SPARGE_F32, SPARGE_F16, SPARGE_BF16}},
    [LAYOUT_Q] = {"at", LAYOUTS, {PACKED, PADDED, NHD, ODD, BACKWARD}},
    [LAYOUT_K] = {"at", LAYOUTS, {PACKED, PADDED, NHD, ODD, BACKWARD}},
    [LAYOUT_V] = {"at", LAYOUTS, {PACKED, PADDED, NHD, ODD, BACKWARD}},
    [LAYOUT_O] = {"at", LAYOUTS, {PACKED, PADDED, NHD, ODD, BACKWARD}},
    [MASK] = {"mask", 5, {DENSE, RANDOM, EMPTY_ROWS, PREDICTED, PARTIAL}},
    [SMOOTH] = {"smooth", 2, {0, 1}},
    [SKIP_ROWS] = {"skip_rows", 5, {0, 1, 16, 48, 1000}},
    [LAMBDA] = {"-10 lambda", 4, {1000, 0, 5, 20}}, /* 1000: never */
    [QK] = {"qk", 3, {SPARGE_INT8, SPARGE_INT12, SPARGE_F32}},
    [PV] = {"pv", PVS, {SPARGE_INT8, SPARGE_INT12, SPARGE_F32, SPARGE_F16, SPARGE_FP8}},
    [RULES] = {"rules", 3, {SPARGE_RULES_DEFAULT, SPARGE_RULES_PAPER, SPARGE_RULES_UPSTREAM}},
    [SCALE] = {"100 scale", 2, {0, 12}},
    [BIAS] = {"bias", 2, {0, 1}},
};

static bool covered[FACTORS][FACTORS][MOST][MOST]; /* [f][g], f < g */

static bool *pair_of(int f, int64_t level_f, int g, int64_t level_g)
{
    return f < g ? &covered[f][g][level_f][level_g] : &covered[g][f][level_g][level_f];
}

/* Greedy: starts from a pair that no case has yet; each other factor, in random order, takes the
 * level that makes the most new pairs with those chosen. */
static bool next_case(int64_t *chosen)
{
    int order[FACTORS], taken = 0;
    for (int f = 0; f < FACTORS && !taken; f++)
        for (int g = f + 1; g < FACTORS && !taken; g++)
            for (int64_t n = 0; n < factor[f].qmax * factor[g].qmax && !taken; n++)
                if (!*pair_of(f, n / factor[g].qmax, g, n % factor[g].qmax)) {
                    chosen[f] = n / factor[g].qmax;
                    chosen[g] = n % factor[g].qmax;
                    order[taken++] = f;
                    order[taken++] = g;
                }
    if (!taken)
        return false;
    for (int f = 0, start = (int)check_int(0, FACTORS - 1); f < FACTORS; f++) {
        const int next = (f * 7 + start) % FACTORS; /* 7 and FACTORS have no common divisor */
        if (next == order[0] || next == order[1])
            continue;
        int64_t best = -1;
        for (int64_t n = 0, turn = check_int(0, MOST); n < factor[next].qmax; n++) {
            const int64_t level = (n + turn) % factor[next].qmax;
            int64_t gain = 0;
            for (int e = 0; e < taken; e++)
                gain += !*pair_of(next, level, order[e], chosen[order[e]]);
            if (gain > best) {
                best = gain;
                chosen[next] = level;
            }
        }
        order[taken++] = next;
    }
    for (int f = 0; f < FACTORS; f++)
        for (int g = f + 1; g < FACTORS; g++)
            *pair_of(f, chosen[f], g, chosen[g]) = true;
    return true;
}

static void verify_case(const int64_t *level, tally *sum)
{
    const shape s = {
        .batch = level[BATCH],
        .heads = level[HEADS] / 10,
        .kv_heads = level[HEADS] % 10,
        .q_len = level[Q_LEN],
        .k_len = level[K_LEN],
        .dim = level[DIM],
        .dim_v = level[DIM_V],
        .q = (sparge_dtype)level[TYPE_Q],
        .k = (sparge_dtype)level[TYPE_K],
        .v = (sparge_dtype)level[TYPE_V],
        .layout_q = (tensor_layout)level[LAYOUT_Q],
        .layout_k = (tensor_layout)level[LAYOUT_K],
        .layout_v = (tensor_layout)level[LAYOUT_V],
    };
    problem x = problem_make(&s);
    x.o.block_q = level[BLOCKS] == 12864 ? 128 : level[BLOCKS] == 64128 ? 64 : level[BLOCKS] / 100;
    x.o.block_k = level[BLOCKS] == 12864 ? 64 : level[BLOCKS] == 64128 ? 128 : level[BLOCKS] % 100;
    x.o.causal = (sparge_causal)level[CAUSAL];
    x.o.smooth_k = level[SMOOTH];
    x.o.skip_rows = level[SKIP_ROWS];
    x.o.thresholds.lambda = level[LAMBDA] == 1000 ? -INFINITY : (float)level[LAMBDA] / -10.0f;
    x.o.qk_dtype = (sparge_dtype)level[QK];
    x.o.pv_dtype = (sparge_dtype)level[PV];
    x.o.rules = (sparge_rules)level[RULES];
    x.o.softmax_scale = (float)level[SCALE] / 100.0f;
    if (level[MASK] == RANDOM)
        mask_fill(&x, 0.5f);
    if (level[MASK] == EMPTY_ROWS) {
        mask_fill(&x, 0.7f);
        for (int64_t line = 0; line < s.batch * s.heads * x.mask.q_blocks; line += 2)
            memset(x.mask.bits + line * x.mask.words, 0,
                   (size_t)x.mask.words * sizeof *x.mask.bits);
    }
    if (level[MASK] == PREDICTED) {
        x.o.thresholds.tau = 0.7f;
        x.o.thresholds.theta = 0.3f;
        mask_predict(&x);
    }
    if (level[MASK] == PARTIAL) {
        mask_fill(&x, 0.8f);
        mask_fill_partial(&x, 0.7f);
    }
    if (level[BIAS])
        bias_fill(&x, false);
    verify(&x, (sparge_dtype)level[TYPE_O], (tensor_layout)level[LAYOUT_O], sum);
    problem_free(&x);
}

Test(attend, every_pair_of_options)
{
    tally sum = {0};
    int64_t chosen[FACTORS], level[FACTORS];
    memset(covered, 0, sizeof covered);
    for (int64_t n = 0;; n++) {
        check_case("pairs %lld", (long long)n);
        if (!next_case(chosen))
            break;
        char text[256] = "";
        for (int f = 0; f < FACTORS; f++) {
            level[f] = factor[f].level[chosen[f]];
            const size_t end = strlen(text);
            snprintf(text + end, sizeof text - end, "%s %lld ", factor[f].name,
                     (long long)level[f]);
        }
        check_case("%s", text);
        verify_case(level, &sum);
    }
    tally_log(&sum);
    check(sum.cases >= 225 && sum.skipped > 0 && sum.against_oracle > sum.cases / 3,
          "too little was covered");
}

/* Every length from 0 to 200, short blocks and a causal edge at every place. */
Test(attend, every_length)
{
    tally sum = {0};
    for (int64_t n = 0; n <= 200; n++) {
        check_case("q_len %lld k_len %lld", (long long)n, (long long)(n * 37 % 201));
        const shape s = shape_of(1, 2, 1, n, n * 37 % 201, 8, 4);
        problem x = problem_make(&s);
        x.o.block_q = 24;
        x.o.block_k = 16;
        x.o.causal = (sparge_causal)(n % 3);
        x.o.qk_dtype = precisions[n / 3 % 3];
        x.o.pv_dtype = precisions[n / 9 % PVS];
        x.o.thresholds.lambda = n % 2 ? -1.0f : -INFINITY;
        x.o.skip_rows = 8;
        verify(&x, SPARGE_F32, PACKED, &sum);
        problem_free(&x);
    }
    tally_log(&sum);
}

Test(attend, no_batch)
{
    check_case("batch 0");
    tally sum = {0};
    const shape s = shape_of(0, 2, 1, 5, 5, 8, 4);
    problem x = problem_make(&s);
    verify(&x, SPARGE_F32, PACKED, &sum);
    problem_free(&x);
}

/* c = ((q_scale * k_scale) * scale) * log2 e, each product rounded: m of a row with one block of
 * keys is c times its largest integer score, bit for bit. */
Test(attend, units_of_the_scores)
{
    for (int64_t n = 0; n < 20; n++) {
        check_case("units %lld", (long long)n);
        const shape s = shape_of(1, 1, 1, 30, 16, 16, 1);
        problem x = problem_make(&s);
        x.o.qk_dtype = precisions[n % 2];
        x.o.softmax_scale = check_uniform(0.05f, 0.5f);
        answer a = attend(&x);
        for (int64_t r = 0; r < 30; r++) {
            int32_t top = INT32_MIN;
            for (int64_t t = 0; t < 16; t++) {
                int32_t score = 0;
                for (int64_t c = 0; c < 16; c++)
                    score += a.intermediates.q_int[r * 16 + c] * a.intermediates.k_int[t * 16 + c];
                top = score > top ? score : top;
            }
            const float unit = a.intermediates.q_scale[r / 16] * a.intermediates.k_scale[0] *
                               x.o.softmax_scale * (float)log2e;
            check_equal(a.intermediates.m[r], unit * (float)top);
        }
        answer_free(&a);
        problem_free(&x);
    }
}

/* ---- Non-finite values ---- */

static const float nonfinite[] = {NAN, INFINITY, -INFINITY};

typedef struct marks {
    bool *q, *k, *v; /* [..][tokens][channels] as the tensors */
} marks;

/* Writes `count` non-finite values into random places of t, or zeros where they were. */
static bool *plant_nonfinite(tensor *t, int64_t count)
{
    bool *marked = zeros(tensor_count(t), sizeof *marked);
    for (int64_t n = 0; n < count; n++) {
        const int64_t at = check_int(0, tensor_count(t) - 1);
        marked[at] = true;
        t->x[at] = nonfinite[n % 3];
    }
    tensor_write(t);
    return marked;
}

static void zero_marked(tensor *t, const bool *marked)
{
    for (int64_t n = 0; n < tensor_count(t); n++)
        if (marked[n])
            t->x[n] = 0.0f;
    tensor_write(t);
}

static bool any(const bool *flag, int64_t n)
{
    for (int64_t e = 0; e < n; e++)
        if (flag[e])
            return true;
    return false;
}

/* How often a marked key row or value element lay in a kept block and was attended to, lay in a
 * kept block and was hidden by causality, bits or bias, or lay in a skipped one. */
typedef struct places {
    int64_t visible, hidden, skipped, empty;
} places;

/* What a row's NaNs must be: all of its o and lse, or channels of o. */
static bool expect(const problem *x, const marks *marked, int64_t b, int64_t h, int64_t t,
                   bool *channel, places *met)
{
    const int64_t kv = h / (x->p.heads / x->p.kv_heads), dim = x->p.dim, dim_v = x->p.dim_v;
    bool all = false, keys = false;
    memset(channel, 0, (size_t)dim_v * sizeof *channel);
    for (int64_t key = 0; key < x->p.k_len; key++) {
        const int64_t at = (b * x->p.kv_heads + kv) * x->p.k_len + key;
        const bool k_bad = any(marked->k + at * dim, dim),
                   v_bad = any(marked->v + at * dim_v, dim_v);
        const bool kept = mask_has(x, b, h, t / x->o.block_q, key / x->o.block_k),
                   visible = sees(x, t, key) && pair_open(x, b, h, t, key);
        if (k_bad || v_bad)
            ++*(kept && visible ? &met->visible : kept ? &met->hidden : &met->skipped);
        keys |= kept && visible;
        all |= kept && visible && k_bad;
        for (int64_t c = 0; kept && visible && c < dim_v; c++)
            channel[c] |= marked->v[at * dim_v + c];
    }
    met->empty += !keys;
    return all || (keys && any(marked->q + ((b * x->p.heads + h) * x->p.q_len + t) * dim, dim));
}

/* What is NaN is what must be; the rest has the bits that it has when the marked elements are 0. */
static void nonfinite_as_expected(problem *x, marks *marked, places *met)
{
    answer got = attend(x);
    zero_marked(&x->q, marked->q);
    zero_marked(&x->k, marked->k);
    zero_marked(&x->v, marked->v);
    answer want = attend(x);
    bool channel[16];
    for (int64_t line = 0; line < problem_rows(x); line++) {
        const int64_t b = line / x->p.q_len / x->p.heads, h = line / x->p.q_len % x->p.heads;
        const bool all = expect(x, marked, b, h, line % x->p.q_len, channel, met);
        for (int64_t c = 0; c < x->p.dim_v; c++)
            if (all || channel[c])
                want.o.x[line * x->p.dim_v + c] = NAN;
        if (all)
            want.lse[line] = NAN;
        for (int64_t c = 0; c <= x->p.dim_v; c++) { /* all NaNs are one */
            float *x_got = c < x->p.dim_v ? &got.o.x[line * x->p.dim_v + c] : &got.lse[line];
            *x_got = isnan(*x_got) ? NAN : *x_got;
        }
    }
    same_answer(&got, &want);
    check_same_as("pv_done", got.intermediates.pv_done, want.intermediates.pv_done,
                  x->p.batch * x->p.heads * blocks(x->p.q_len, x->o.block_q) *
                      blocks(x->p.k_len, x->o.block_k));
    answer_free(&got);
    answer_free(&want);
}

Test(attend, non_finite_values_reach_their_rows_alone)
{
    places met = {0};
    for (int64_t n = 0; n < 180; n++) {
        check_case("non-finite %lld", (long long)n);
        shape s = shape_of(2, 4, 2, 70, n % 4 ? 75 : 50, 8, 5);
        s.q = s.k = s.v = n % 5 == 4 ? SPARGE_BF16 : n % 5 == 3 ? SPARGE_F16 : SPARGE_F32;
        s.layout_q = s.layout_k = s.layout_v = n % 2 ? ODD : PACKED;
        problem x = problem_make(&s);
        x.o.block_k = 8;
        x.o.causal = (sparge_causal)(n % 3);
        x.o.qk_dtype = precisions[n / 3 % 3];
        x.o.pv_dtype = precisions[n / 9 % PVS];
        x.o.smooth_k = n / 45 % 2;
        for (int64_t e = 0; e < tensor_count(&x.k);
             e += 64) /* so that no step is that of 0 - mean */
            x.k.x[e] = x.k.x[e + 1] = e % 128 ? 4.0f : -4.0f;
        if (n / 90 == 0)
            mask_fill(&x, 0.3f);
        if (n % 5 < 2)
            mask_fill_partial(&x, 0.5f);
        if (n % 7 < 2)
            bias_fill(&x, false);
        const int64_t q_count = check_int(0, 3), k_count = check_int(0, 2),
                      v_count = check_int(0, 3);
        marks marked = {plant_nonfinite(&x.q, q_count), plant_nonfinite(&x.k, k_count),
                        plant_nonfinite(&x.v, v_count)};
        nonfinite_as_expected(&x, &marked, &met);
        free(marked.q);
        free(marked.k);
        free(marked.v);
        problem_free(&x);
    }
    cr_log_info(
        "marked keys and values: %lld visible, %lld hidden, %lld skipped; %lld rows without keys",
        (long long)met.visible, (long long)met.hidden, (long long)met.skipped,
        (long long)met.empty);
    check(met.visible > 0 && met.hidden > 0 && met.skipped > 0 && met.empty > 0,
          "a place was never met");
}

/* Whole rows, and all that a mask skips: nothing of it may be read. */
Test(attend, everything_non_finite_or_skipped)
{
    for (int64_t n = 0; n < QKS * PVS; n++) {
        check_case("all marked, qk %s pv %s", sparge_dtype_string(precisions[n / PVS]),
                   sparge_dtype_string(precisions[n % PVS]));
        const shape s = shape_of(1, 2, 1, 40, 40, 8, 5);
        problem x = problem_make(&s);
        x.o.qk_dtype = precisions[n / PVS];
        x.o.pv_dtype = precisions[n % PVS];
        places met = {0};
        marks marked = {zeros(tensor_count(&x.q), 1), zeros(tensor_count(&x.k), 1),
                        zeros(tensor_count(&x.v), 1)};
        const int64_t all = n % 2 ? tensor_count(&x.k) : 16 * 8; /* every key, or the first block */
        for (int64_t e = 0; e < all; e++) {
            x.k.x[e] = nonfinite[e % 3];
            marked.k[e] = true;
        }
        for (int64_t e = 0; e < tensor_count(&x.v) / 2; e++) {
            x.v.x[e] = nonfinite[e % 3];
            marked.v[e] = true;
        }
        problem_write(&x);
        mask_fill(&x, 0.0f);
        sparge_mask_set(&x.mask, 0, 0, 0, 2,
                        true); /* head 0: one row of blocks reads what is good, */
        sparge_mask_set(&x.mask, 0, 1, 1, 0,
                        true); /* head 1: one what is marked, the others nothing */
        nonfinite_as_expected(&x, &marked, &met);
        free(marked.q);
        free(marked.k);
        free(marked.v);
        problem_free(&x);
    }
}

/* ---- Lambda, by hand ---- */

/* One channel, q = 1 in every row unless changed, scale 1: the scores are the keys; v is 1, 2, 4,
 * ... */
static problem by_hand(int64_t q_len, const float *scores, int64_t k_len, int64_t block_q,
                       int64_t block_k, float lambda)
{
    const shape s = shape_of(1, 1, 1, q_len, k_len, 1, 1);
    problem x = problem_make(&s);
    for (int64_t n = 0; n < q_len; n++)
        x.q.x[n] = 1.0f;
    for (int64_t n = 0; n < k_len; n++) {
        x.k.x[n] = scores[n];
        x.v.x[n] = ldexpf(1.0f, (int)n);
    }
    problem_write(&x);
    x.o.block_q = block_q;
    x.o.block_k = block_k;
    x.o.softmax_scale = 1.0f;
    x.o.smooth_k = false;
    x.o.thresholds.lambda = lambda;
    return x;
}

/* The shares of P.V that each pair of blocks computed. */
static void shares_are(const problem *x, const float *want)
{
    answer a = attend(x);
    check_same_as("pv_done", a.intermediates.pv_done, want,
                  blocks(x->p.q_len, x->o.block_q) * blocks(x->p.k_len, x->o.block_k));
    answer_free(&a);
}

/* Shares, and o of row 0 as the softmax over `computed` keys with the row sum over `summed` ones.
 */
static void computes(problem *x, const float *shares, const bool *computed, const bool *summed)
{
    double o = 0.0, l = 0.0;
    for (int64_t n = 0; n < x->p.k_len; n++) {
        const double p = exp((double)(x->q.x[0] * x->k.x[n]));
        o += computed[n] ? p * ldexp(1.0, (int)n) : 0.0;
        l += summed[n] ? p : 0.0;
    }
    shares_are(x, shares);
    answer a = attend(x);
    check_close(a.o.x[0], o / l, 1e-5 * o / l);
    check_close(a.lse[0], log(l), 1e-5);
    answer_free(&a);
    problem_free(x);
}

static const float five[] = {0.0f, -3.0f, 2.0f, -1.0f, 1.9f};

Test(attend, lambda_skips_what_stays_below_the_maximum_before_it)
{
    check_case("lambda -2");
    problem x = by_hand(1, five, 5, 1, 1, -2.0f);
    computes(&x, (float[]){1, 0, 1, 0, 1}, (bool[]){1, 0, 1, 0, 1}, (bool[]){1, 0, 1, 0, 1});
    check_case("lambda -inf");
    x = by_hand(1, (float[]){0.0f, -1e30f, 2.0f, -80.0f, 1.9f}, 5, 1, 1, -INFINITY);
    computes(&x, (float[]){1, 1, 1, 1, 1}, (bool[]){1, 1, 1, 1, 1}, (bool[]){1, 1, 1, 1, 1});
    check_case("lambda 0");
    x = by_hand(1, (float[]){0.0f, -3.0f, 2.0f, 2.0f, 1.9f, 2.5f}, 6, 1, 1, 0.0f);
    computes(&x, (float[]){1, 0, 1, 0, 0, 1}, (bool[]){1, 0, 1, 0, 0, 1},
             (bool[]){1, 0, 1, 0, 0, 1});
    check_case("the first block is computed however low it is");
    x = by_hand(1, (float[]){-50.0f, -50.0f, -51.0f, -60.0f}, 4, 1, 1, 0.0f);
    computes(&x, (float[]){1, 0, 0, 0}, (bool[]){1, 0, 0, 0}, (bool[]){1, 0, 0, 0});
}

Test(attend, lambda_is_in_natural_units_and_at_it_is_skipped)
{
    for (int n = 0; n < 2; n++) { /* -2 * log2 e is the same float on both sides */
        check_case("score %d ulp above lambda", n);
        problem x = by_hand(1, (float[]){0.0f, n ? -0x1.fffffep0f : -2.0f}, 2, 1, 1, -2.0f);
        shares_are(&x, (float[]){1, (float)n});
        problem_free(&x);
    }
    check_case("between -2 / log2 e and -2 * log2 e");
    problem x = by_hand(1, (float[]){0.0f, -1.7f, -2.3f}, 3, 1, 1, -2.0f);
    shares_are(&x, (float[]){1, 1, 0});
    problem_free(&x);
    check_case("the scale belongs to the score");
    x = by_hand(1, (float[]){0.0f, -1.7f, -2.3f}, 3, 1, 1, -2.0f);
    x.o.softmax_scale = 0.5f;
    shares_are(&x, (float[]){1, 1, 1});
    x.o.softmax_scale = 2.0f;
    shares_are(&x, (float[]){1, 0, 0});
    problem_free(&x);
}

/* 8 rows, blocks of 8 x 1, key 0 then one key whose score is far below for q = 1 and high for q =
 * -1. */
Test(attend, one_row_of_a_group_makes_it_compute)
{
    static const struct {
        int64_t rows;
        float share;
    } group[] = {
        {1, 1.0f / 8}, {2, 2.0f / 8}, {3, 3.0f / 8}, {5, 3.0f / 8}, {8, 1}, {0, 1}, {999, 1},
    };
    for (int64_t n = 0; n < COUNT(group); n++) {
        check_case("skip_rows %lld", (long long)group[n].rows);
        problem x = by_hand(8, (float[]){0.0f, -9.0f}, 2, 8, 1, -5.0f);
        x.q.x[5] = -1.0f;
        tensor_write(&x.q);
        x.o.skip_rows = group[n].rows;
        shares_are(&x, (float[]){1, group[n].share});
        problem_free(&x);
    }
}

/* Under causality rows 0 and 1 see key 0 alone, rows 2 and 3 all four. */
Test(attend, rows_without_visible_keys_do_not_vote)
{
    check_case("nobody near the maximum sees the block");
    const float far[] = {0.0f, -9.0f, -9.0f, -9.0f};
    problem x = by_hand(4, far, 4, 4, 1, -5.0f);
    x.o.causal = SPARGE_CAUSAL_END;
    shares_are(&x, (float[]){1, 0, 0, 0});
    problem_free(&x);

    check_case("a group that sees nothing counts as computed");
    x = by_hand(4, far, 4, 4, 1, -5.0f);
    x.o.causal = SPARGE_CAUSAL_END;
    x.o.skip_rows = 1;
    shares_are(&x, (float[]){1, 0.25f, 0.5f, 0.75f});
    answer a = attend(&x);
    check_equal(a.result.counts.tokens, (int64_t)10);
    check_equal(a.result.counts.qk_tokens, (int64_t)10);
    check_equal(a.result.counts.pv_tokens, (int64_t)4);
    check_equal(a.result.counts.pv_done, 2.5);
    answer_free(&a);
    problem_free(&x);

    check_case("the first kept block is computed by the rows that see it");
    x = by_hand(4, far, 4, 4, 1, -5.0f);
    x.o.causal = SPARGE_CAUSAL_END;
    mask_fill(&x, 0.0f);
    for (int64_t j = 1; j < 4; j++) /* row 0 sees none of them, the others begin in block 1 */
        sparge_mask_set(&x.mask, 0, 0, 0, j, true);
    shares_are(&x, (float[]){0, 1, 1, 1});
    x.o.skip_rows = 2;
    x.o.thresholds.lambda = 0.0f;
    shares_are(&x, (float[]){0, 1, 0.5f, 0.5f}); /* rows 0 and 1 see nothing of blocks 2 and 3 */
    problem_free(&x);
}

/* Bits and a bias that hide what causality hides there give the same; what is hidden casts no vote,
 * and a key that a bias of the least float takes to -inf is no hidden one. */
Test(attend, hidden_pairs_do_not_vote)
{
    const float far[] = {0.0f, -9.0f, -9.0f, -9.0f};
    for (int backend = SPARGE_REF; backend <= SPARGE_CPU; backend++) {
        check_case("a triangle of bits, backend %d", backend);
        problem x = by_hand(4, far, 4, 4, 1, -5.0f);
        x.o.backend = (sparge_backend)backend;
        mask_fill(&x, 1.1f);
        mask_fill_partial(&x, 1.1f);
        for (int64_t j = 0; j < 4; j++)
            for (int64_t r = 0; r < 4; r++)
                x.mask.partial_bits[j * 4 + r] = 0xfffffffeu | (j <= r);
        shares_are(&x, (float[]){1, 0, 0, 0});
        x.o.skip_rows = 1;
        shares_are(&x, (float[]){1, 0.25f, 0.5f, 0.75f});
        answer a = attend(&x);
        check_equal(a.result.counts.tokens, (int64_t)16);
        check_equal(a.result.counts.tile_tokens, (int64_t)16);
        check_equal(a.result.counts.qk_tokens, (int64_t)10);
        check_equal(a.result.counts.pv_tokens, (int64_t)4);
        check_equal(a.result.counts.qk_done, (int64_t)4);
        check_equal(a.result.counts.pv_done, 2.5);
        answer_free(&a);
        problem_free(&x);

        check_case("a bias, backend %d", backend);
        x = by_hand(2, far, 4, 2, 1, -5.0f);
        x.o.backend = (sparge_backend)backend;
        bias_fill(&x, false);
        const float bias[] = {-INFINITY, 9.0f, 5.0f, -INFINITY};
        memcpy(x.k_bias, bias, sizeof bias);
        shares_are(&x, (float[]){1, 1, 1, 1}); /* scores 0 and -4; hidden blocks are computed */
        x.o.thresholds.lambda = -3.0f;
        shares_are(&x, (float[]){1, 1, 0, 1});
        x.o.thresholds.lambda = -INFINITY;
        a = attend(&x);
        check_equal(a.result.counts.tile_tokens, (int64_t)8);
        check_equal(a.result.counts.qk_tokens, (int64_t)4);
        check_close(a.o.x[0], (2.0 + 4.0 * exp(-4.0)) / (1.0 + exp(-4.0)), 1e-5);
        check_close(a.lse[1], log(1.0 + exp(-4.0)), 1e-6);
        answer_free(&a);

        const struct {
            float bias;
            double o, lse; /* of the key that has it alone */
        } alone[] = {
            {-INFINITY, 0.0, -INFINITY}, {-FLT_MAX, NAN, NAN}, {NAN, NAN, NAN},
            {INFINITY, NAN, NAN},        {-3.5f, 4.0, -12.5},
        };
        for (int64_t n = 0; n < COUNT(alone); n++) {
            check_case("a bias of %g alone, backend %d", (double)alone[n].bias, backend);
            for (int64_t t = 0; t < 4; t++)
                x.k_bias[t] = t == 2 ? alone[n].bias : -INFINITY;
            a = attend(&x);
            const double o = (double)a.o.x[1], lse = (double)a.lse[1];
            check(isnan(alone[n].o) ? isnan(o) : o == alone[n].o, "o is %g", o);
            check(isnan(alone[n].lse) ? isnan(lse)
                                      : lse == alone[n].lse || fabs(lse - alone[n].lse) < 1e-5,
                  "lse is %g", lse);
            answer_free(&a);
        }
        problem_free(&x);
    }
}

/* x_b = fl(fl(c x) + fl(b log2 e)): three roundings, none less. */
Test(attend, a_bias_is_added_to_rounded_scores)
{
    check_case("roundings of a bias");
    int64_t told = 0;
    for (int64_t n = 0; n < 200; n++) {
        const float score = check_uniform(-9, 9), bias = check_uniform(-9, 9);
        problem x = by_hand(1, &score, 1, 1, 1, -INFINITY);
        bias_fill(&x, false);
        x.k_bias[0] = bias;
        const float c = (float)log2e, scaled = c * score, added = (float)log2e * bias;
        answer a = attend(&x);
        check_equal(a.intermediates.m[0], scaled + added);
        told += fmaf(c, score, added) != scaled + added;
        told += fmaf((float)log2e, bias, scaled) != scaled + added;
        answer_free(&a);
        problem_free(&x);
    }
    check(told > 50, "%lld values tell a fused addition", (long long)told);
}

/* What a key's NaN spoils does not depend on lambda; a value's reaches the rows that computed P.V.
 */
Test(attend, non_finite_in_what_lambda_skips)
{
    check_case("lambda and NaN");
    problem x = by_hand(2, (float[]){0.0f, -9.0f, 1.0f}, 3, 2, 1, -5.0f);
    x.v.x[1] = NAN;
    tensor_write(&x.v);
    shares_are(&x, (float[]){1, 0, 1});
    answer a = attend(&x);
    check_close(a.o.x[0], (1.0 + 4.0 * exp(1.0)) / (1.0 + exp(1.0)), 1e-5);
    answer_free(&a);
    x.o.thresholds.lambda = -INFINITY;
    a = attend(&x);
    check(isnan(a.o.x[0]) && isnan(a.o.x[1]) && isfinite(a.lse[0]), "NaN of v: %g",
          (double)a.o.x[0]);
    answer_free(&a);
    problem_free(&x);

    x = by_hand(2, (float[]){20.0f, NAN, 21.0f}, 3, 2, 1,
                -5.0f); /* the NaN counts as 0, far below */
    shares_are(&x, (float[]){1, 0, 1});
    a = attend(&x);
    check(isnan(a.o.x[0]) && isnan(a.o.x[1]) && isnan(a.lse[0]), "NaN of k: %g", (double)a.o.x[0]);
    answer_free(&a);
    problem_free(&x);
}

/* Random values, every group size, all precisions: the judge replays the decisions. */
Test(attend, lambda_of_random_values)
{
    static const int64_t rows[] = {1, 16, 64, 48, 0, 128};
    static const float lambdas[] = {0.0f, -0.5f, -1.5f, -4.0f};
    tally sum = {0};
    for (int64_t n = 0; n < COUNT(rows) * COUNT(lambdas) * 3; n++) {
        const float lambda = lambdas[n / COUNT(rows) % COUNT(lambdas)];
        check_case("lambda %g skip_rows %lld rules %lld", (double)lambda,
                   (long long)rows[n % COUNT(rows)], (long long)(n / COUNT(rows) / COUNT(lambdas)));
        const shape s = shape_of(1, 2, 1, 200, 230, 16, 8);
        problem x = problem_make(&s);
        for (int64_t e = 0; e < tensor_count(&x.q);
             e++) /* longer queries: scores far enough apart */
            x.q.x[e] *= 3.0f;
        tensor_write(&x.q);
        x.o.block_q = 128;
        x.o.rules = (sparge_rules)(n / COUNT(rows) / COUNT(lambdas));
        x.o.skip_rows = rows[n % COUNT(rows)];
        x.o.thresholds.lambda = lambda;
        x.o.causal = (sparge_causal)(n % 2);
        x.o.qk_dtype = precisions[n % 5 % 3];
        x.o.pv_dtype = precisions[n % 7 % PVS];
        verify(&x, SPARGE_F32, PACKED, &sum);
        problem_free(&x);
    }
    tally_log(&sum);
    check(sum.skipped > sum.decided / 20 && sum.skipped < sum.decided * 19 / 20,
          "lambda hardly mattered");
}

/* ---- Rules, by hand: cases that tell each from the default ---- */

Test(attend, paper_adds_the_row_sum_of_what_it_skips)
{
    const bool computed[] = {1, 0, 1, 0, 1}, all[] = {1, 1, 1, 1, 1};
    check_case("paper");
    problem x = by_hand(1, five, 5, 1, 1, -2.0f);
    x.o.rules = SPARGE_RULES_PAPER;
    computes(&x, (float[]){1, 0, 1, 0, 1}, computed, all);
}

Test(attend, upstream_never_skips_the_last_kept_blocks)
{
    const float low[] = {0, -9, -9, -9, -9, -9};
    static const struct {
        int64_t block_q, block_k;
        float share[6];
    } size[] = {
        {2, 1, {1, 0, 0, 0, 1, 1}},
        {1, 1, {1, 0, 0, 0, 0, 1}},
        {1, 2, {1, 0, 1}},
        {4, 2, {1, 1, 1}},
    };
    for (int64_t n = 0; n < COUNT(size); n++) {
        check_case("upstream, %lld x %lld", (long long)size[n].block_q, (long long)size[n].block_k);
        problem x = by_hand(1, low, 6, size[n].block_q, size[n].block_k, -5.0f);
        x.o.rules = SPARGE_RULES_UPSTREAM;
        shares_are(&x, size[n].share);
        problem_free(&x);
    }
    check_case("upstream counts kept and visible blocks");
    problem x = by_hand(2, low, 6, 2, 1, -5.0f);
    x.o.rules = SPARGE_RULES_UPSTREAM;
    mask_fill(&x, 0.0f);
    sparge_mask_set(&x.mask, 0, 0, 0, 0, true);
    sparge_mask_set(&x.mask, 0, 0, 0, 1, true);
    sparge_mask_set(&x.mask, 0, 0, 0, 3, true);
    sparge_mask_set(&x.mask, 0, 0, 0, 4, true);
    shares_are(&x, (float[]){1, 0, 0, 1, 1, 0});
    x.o.causal = SPARGE_CAUSAL_START; /* rows see keys 0 and 1 */
    shares_are(&x, (float[]){1, 1, 0, 0, 0, 0});
    problem_free(&x);
}

/* Row 0 alone is near its maximum in block 1 of a 128 x 1 problem. */
Test(attend, rules_choose_the_rows_that_decide)
{
    static const struct {
        sparge_rules rules;
        float share;
    } want[] = {
        {SPARGE_RULES_DEFAULT, 0.5f},
        {SPARGE_RULES_PAPER, 0.25f},
        {SPARGE_RULES_UPSTREAM, 1},
    };
    for (int64_t n = 0; n < COUNT(want); n++) {
        check_case("rows of rules %lld", (long long)n);
        problem x = by_hand(128, (float[]){0, -9, 0, 0}, 4, 128, 1, -5.0f);
        x.q.x[0] = -1.0f;
        tensor_write(&x.q);
        x.o.rules = want[n].rules;
        shares_are(&x, (float[]){1, want[n].share, 1, 1});
        problem_free(&x);
    }
}

Test(attend, upstream_adds_to_the_scales)
{
    check_case("step + 1e-7");
    const shape s = shape_of(1, 1, 1, 16, 16, 8, 4);
    problem x = problem_make(&s);
    for (int64_t n = 0; n < tensor_count(&x.q); n++)
        x.q.x[n] *= 1e-5f;
    problem_write(&x);
    x.o.qk_dtype = SPARGE_INT8;
    answer a = attend(&x);
    x.o.rules = SPARGE_RULES_UPSTREAM;
    answer b = attend(&x);
    check_close(b.intermediates.q_scale[0], (double)a.intermediates.q_scale[0] + 1e-7, 1e-14);
    check_close(b.intermediates.k_scale[0], (double)a.intermediates.k_scale[0] + 1e-7, 1e-9);
    check(memcmp(a.intermediates.q_int, b.intermediates.q_int, 32),
          "the step did not reach the codes");
    answer_free(&a);
    answer_free(&b);
    tally sum = {0};
    verify(&x, SPARGE_F32, PACKED, &sum);
    problem_free(&x);
}

/* ---- Values that break others ---- */

/* For each pair of precisions, with and without smoothing: prepare() changes a fresh problem. */
static void verify_all(const char *what, void (*prepare)(problem *))
{
    tally sum = {0};
    for (int64_t n = 0; n < 2 * QKS * PVS; n++) {
        check_case("%s, qk %s pv %s smooth %lld", what, sparge_dtype_string(precisions[n % QKS]),
                   sparge_dtype_string(precisions[n / QKS % PVS]), (long long)(n / QKS / PVS));
        const shape s = shape_of(1, 2, 1, 70, 90, 16, 8);
        problem x = problem_make(&s);
        x.o.qk_dtype = precisions[n % QKS];
        x.o.pv_dtype = precisions[n / QKS % PVS];
        x.o.smooth_k = n / QKS / PVS;
        prepare(&x);
        problem_write(&x);
        verify(&x, SPARGE_F16, PADDED, &sum);
        problem_free(&x);
    }
}

static void zero_rows(problem *x)
{
    for (int64_t t = 0; t < 70; t += 3)
        memset(tensor_row(&x->q, 0, t % 2, t), 0, 16 * sizeof(float));
    for (int64_t t = 16; t < 32; t++) /* a whole block, so that its step is 0 */
        memset(tensor_row(&x->k, 0, 0, t), 0, 16 * sizeof(float));
    for (int64_t t = 32; t < 48; t++)
        memset(tensor_row(&x->q, 0, 1, t), 0, 16 * sizeof(float));
}
Test(attend, zero_rows) { verify_all("zero rows", zero_rows); }

static void zero_channel(problem *x)
{
    for (int64_t t = 0; t < 90; t++)
        tensor_row(&x->v, 0, 0, t)[3] = 0.0f;
}
Test(attend, zero_channel) { verify_all("zero v channel", zero_channel); }

static void identical_keys(problem *x)
{
    for (int64_t t = 1; t < 90; t++)
        memcpy(tensor_row(&x->k, 0, 0, t), tensor_row(&x->k, 0, 0, 0), 16 * sizeof(float));
}
Test(attend, identical_keys) { verify_all("identical keys", identical_keys); }

static void outlier(problem *x) { tensor_row(&x->v, 0, 0, 37)[2] = 1e4f; }
Test(attend, one_large_value) { verify_all("v outlier", outlier); }

/* Where l adds what o adds, o is 1; half and fp8 may be off by what they round P by. */
static void ones(problem *x)
{
    for (int64_t n = 0; n < tensor_count(&x->v); n++)
        x->v.x[n] = 1.0f;
}
Test(attend, values_of_one)
{
    verify_all("v of 1", ones);
    for (int64_t n = 0; n < QKS * PVS; n++) {
        check_case("v of 1, qk %s pv %s", sparge_dtype_string(precisions[n % QKS]),
                   sparge_dtype_string(precisions[n / QKS]));
        const shape s = shape_of(1, 1, 1, 70, 90, 16, 8);
        problem x = problem_make(&s);
        x.o.qk_dtype = precisions[n % QKS];
        x.o.pv_dtype = precisions[n / QKS];
        ones(&x);
        problem_write(&x);
        answer a = attend(&x);
        const double off = x.o.pv_dtype == SPARGE_F16   ? 0x1p-11 + 90 * 0x1p-25
                           : x.o.pv_dtype == SPARGE_FP8 ? 0x1p-4 + 90 * 0x1p-18
                                                        : 0.0;
        for (int64_t e = 0; e < tensor_count(&a.o); e++)
            check_close(a.o.x[e], 1.0, off + 1e-5);
        answer_free(&a);
        problem_free(&x);
    }
}

/* 65519 rounds to the largest number of binary16; what lies further out spoils its channel as a NaN
 * does. */
Test(attend, values_that_binary16_cannot_hold)
{
    static const float large[] = {65519.0f, 65520.0f, -1e30f, FLT_MAX};
    const shape s = shape_of(1, 1, 1, 40, 48, 8, 5);
    problem x = problem_make(&s);
    x.o.pv_dtype = SPARGE_F16;
    for (int64_t n = 0; n < COUNT(large); n++) {
        check_case("v of %g", (double)large[n]);
        tensor_row(&x.v, 0, 0, 20)[3] = large[n];
        problem_write(&x);
        answer got = attend(&x);
        tensor_row(&x.v, 0, 0, 20)[3] = n ? NAN : 65504.0f;
        problem_write(&x);
        answer want = attend(&x);
        for (int64_t e = 0; e < tensor_count(&got.o); e++) {
            const float o = got.o.x[e];
            check(isnan(o) == (n && e % 5 == 3), "channel %d is %g", (int)(e % 5), (double)o);
            if (!isnan(o))
                check_equal(o, want.o.x[e]);
        }
        answer_free(&got);
        answer_free(&want);
    }
    problem_free(&x);
}

/* Steps of exactly 1 or 1 / 16 (the largest is 127, 2047 / 16, 4095 / 16, 448), and values at and
 * beside the middle between two codes. */
static void ties(problem *x)
{
    static const float middle[] = {0.5f,       0.49999997f, 1.5f,        2.5f,
                                   1.4999999f, 126.5f,      0.50000006f, 0.0f};
    static const float half[] = {0x1.002p0f, 0x1.002002p0f, 0x1.006p0f, 2049.0f,
                                 2051.0f,    0x1p-25f,      0x3p-25f,   0.0f};
    static const float fp8[] = {0x1.1p0f, 0x1.100002p0f, 0x1.3p0f, 17.0f,
                                19.0f,    0x1p-10f,      0x3p-10f, 0};
    const float *v_middle = x->o.pv_dtype == SPARGE_F16   ? half
                            : x->o.pv_dtype == SPARGE_FP8 ? fp8
                                                          : middle;
    const float step = x->o.qk_dtype == SPARGE_INT12 ? 1.0f / 16 : 1.0f,
                top = x->o.qk_dtype == SPARGE_INT12 ? 2047 * step : 127;
    const float v_step = x->o.pv_dtype == SPARGE_INT12 ? 1.0f / 16 : 1.0f;
    const float v_top = x->o.pv_dtype == SPARGE_INT12 ? 4095 * v_step
                        : x->o.pv_dtype == SPARGE_FP8 ? 448
                                                      : 127;
    for (int64_t n = 0; n < tensor_count(&x->q); n++)
        x->q.x[n] = n % 64 == 5 ? top : (n % 3 ? step : -step) * middle[n % 8];
    for (int64_t n = 0; n < tensor_count(&x->k); n++)
        x->k.x[n] = n % 64 == 9 ? -top : (n % 3 ? step : -step) * middle[n * 3 % 8];
    for (int64_t n = 0; n < tensor_count(&x->v); n++)
        x->v.x[n] = n / 8 % 5 == 2 ? v_top : (n % 3 ? v_step : -v_step) * v_middle[(n + n / 8) % 8];
    x->o.softmax_scale = 1e-3f;
}
Test(attend, values_between_codes) { verify_all("ties", ties); }

static void tiny(problem *x)
{
    for (int64_t n = 0; n < tensor_count(&x->k); n++)
        x->k.x[n] *= 1e-38f; /* steps below the smallest normal */
    for (int64_t n = 0; n < tensor_count(&x->v); n++)
        x->v.x[n] *= 1e-30f;
}
Test(attend, tiny_values) { verify_all("tiny", tiny); }

/* Scores of +-1e4: only the largest key of a row weighs anything, and nothing is NaN. */
Test(attend, huge_scores)
{
    for (int64_t n = 0; n < 2 * QKS * PVS; n++) {
        check_case("scores of 1e4, qk %s pv %s", sparge_dtype_string(precisions[n % QKS]),
                   sparge_dtype_string(precisions[n / QKS % PVS]));
        const shape s = shape_of(1, 1, 1, 40, 50, 4, 2);
        problem x = problem_make(&s);
        for (int64_t e = 0; e < tensor_count(&x.q); e++)
            x.q.x[e] = e % 8 < 4 ? 100.0f : -100.0f;
        for (int64_t t = 0; t < 50; t++) /* keys 20 and 30 are the extremes */
            for (int64_t c = 0; c < 4; c++)
                x.k.x[t * 4 + c] = t == 20 ? 50.0f : t == 30 ? -50.0f : (float)(t % 7) - 3.0f;
        problem_write(&x);
        x.o.qk_dtype = precisions[n % QKS];
        x.o.pv_dtype = precisions[n / QKS % PVS];
        x.o.smooth_k = n / QKS / PVS;
        x.o.thresholds.lambda = n % 2 ? -5.0f : -INFINITY;
        answer a = attend(&x);
        worst o = {0}, lse = {0};
        for (int64_t r = 0; r < 40; r++) {
            const int64_t key = r % 2 ? 30 : 20;
            compare(&lse, r, (double)a.lse[r], 1e4, 100.0); /* codes of int8 are 1 % wide */
            for (int64_t c = 0; c < 2; c++) {
                const double v = (double)x.v.x[key * 2 + c];
                const double off = x.o.pv_dtype == SPARGE_FP8 ? fabs(v) / 16 : 0.02;
                compare(&o, r * 2 + c, (double)a.o.x[r * 2 + c], v, off);
            }
        }
        worst_report(&o, "o", 2, &x);
        worst_report(&lse, "lse", 1, &x);
        answer_free(&a);
        problem_free(&x);
    }
}

/* ---- Scores of any size
 * -------------------------------------------------------------------------- */

typedef struct small {
    int64_t keys, dim;
    const float *q, *k, *v; /* [1][dim], [keys][dim], [keys] */
    sparge_dtype dtype;     /* of all three */
    sparge_options o;
} small;

/* On this backend, keys in ascending or in descending order; what cannot run there runs on ref. */
static void ask_small(const small *x, sparge_backend backend, bool backwards, float *o, float *lse)
{
    tensor q = tensor_make(1, 1, 1, x->dim, x->dtype, PACKED),
           k = tensor_make(1, 1, x->keys, x->dim, x->dtype, PACKED),
           v = tensor_make(1, 1, x->keys, 1, x->dtype, PACKED);
    memcpy(q.x, x->q, (size_t)x->dim * sizeof *q.x);
    for (int64_t t = 0; t < x->keys; t++) {
        const int64_t to = backwards ? x->keys - 1 - t : t;
        memcpy(&k.x[to * x->dim], &x->k[t * x->dim], (size_t)x->dim * sizeof *k.x);
        v.x[to] = x->v[t];
    }
    tensor_write(&q);
    tensor_write(&k);
    tensor_write(&v);
    const sparge_problem p = {.batch = 1,
                              .heads = 1,
                              .kv_heads = 1,
                              .q_len = 1,
                              .k_len = x->keys,
                              .dim = x->dim,
                              .dim_v = 1,
                              .q = q.in,
                              .k = k.in,
                              .v = v.in};
    sparge_options options = x->o;
    options.backend =
        x->o.pv_dtype == SPARGE_F16 || x->o.pv_dtype == SPARGE_FP8 ? SPARGE_REF : backend;
    sparge_error error;
    sparge_result r = {.o = {o, SPARGE_F32, 1, 1, 1}, .lse = lse};
    *o = *lse = -7.0f;
    check(sparge_attend(&p, &options, NULL, &r, &error) == SPARGE_OK, "%s", error.text);
    tensor_free(&q);
    tensor_free(&k);
    tensor_free(&v);
}

/* In these precisions of Q.K and every one of P.V, in blocks of one key and in one block, in both
 * orders, by ref and by cpu; NaN stands for NaN. */
static void small_is(small x, int first_qk, int last_qk, double o, double lse)
{
    for (int n = first_qk * PVS; n < (last_qk + 1) * PVS; n++)
        for (int way = 0; way < 8; way++) {
            const sparge_backend backend = way & 1 ? SPARGE_CPU : SPARGE_REF;
            float got[2];
            x.o.qk_dtype = precisions[n / PVS];
            x.o.pv_dtype = precisions[n % PVS];
            x.o.block_k = way & 2 ? 1 : 64;
            ask_small(&x, backend, way & 4, &got[0], &got[1]);
            const double want[] = {o, lse};
            for (int e = 0; e < 2; e++)
                check(isnan(want[e]) ? isnan(got[e])
                                     : fabs((double)got[e] - want[e]) <= 1e-6 * fabs(want[e]),
                      "qk %s, pv %s, %s, way %d: %s is %g, should be %g",
                      sparge_dtype_string(precisions[n / PVS]),
                      sparge_dtype_string(precisions[n % PVS]), sparge_backend_string(backend), way,
                      e ? "lse" : "o", (double)got[e], want[e]);
        }
}

static small small_of(int64_t keys, int64_t dim, const float *q, const float *k, const float *v)
{
    small x = {keys, dim, q, k, v, SPARGE_F32, sparge_options_default(SPARGE_RULES_DEFAULT)};
    x.o.block_q = 1;
    x.o.smooth_k = false;
    return x;
}

/* The largest key weighs exactly 1: an fma of a score less its own rounding is 2^38 off at 2^62. */
Test(attend, the_largest_key_weighs_one)
{
    float q[64], k[128], v[2] = {1.0f, 0.0f};
    for (int c = 0; c < 64; c++) {
        q[c] = 24992.0f;
        k[c] = 22496.0f;
        k[64 + c] = 0.0f;
    }
    check_case("f16, logits of 4.5e9");
    small x = small_of(2, 64, q, k, v);
    x.dtype = SPARGE_F16;
    small_is(x, 0, 2, 1.0, 8.0 * 24992.0 * 22496.0);
    x.o.smooth_k = true;
    small_is(x, 0, 2, 1.0, 8.0 * 24992.0 * 22496.0);
    for (int n = 0; n < 60; n++) {
        check_case("size %d", n);
        const float large = ldexpf(check_uniform(1.0f, 2.0f), n), keys[] = {large, -large, 0.0f};
        const float each[] = {3.0f, -3.0f}, key[] = {check_uniform(1.0f, 2.0f)};
        small_is(small_of(1, 1, key, keys, each), 0, 2, 3.0,
                 (double)large * (double)*key); /* alone in its tile */
        small y = small_of(2, 1, key, keys, each);
        if (n >= 8) /* the other is far below */
            small_is(y, 0, 2, 3.0, (double)large * (double)*key);
    }
}

/* Finite inputs whose scores no float holds. A score of -inf weighs 0; where all are so, or one is
 * +inf, or an f32 dot product makes inf - inf, the row is NaN: it is neither taken for one without
 * keys nor given equal weights. In any order of the keys, in one tile or in several. */
Test(attend, scores_that_overflow)
{
    const float one[] = {1e20f, 1e20f, 1e20f, 1e20f}, v[] = {1.0f, -1.0f, 1.0f};
    const float beside_zero[] = {0, 0, 0, 0, -1e20f, -1e20f, -1e20f, -1e20f};
    check_case("-inf beside 0");
    small_is(small_of(2, 4, one, beside_zero, v), 0, 2, 1.0, 0.0);
    check_case("-inf alone");
    small_is(small_of(1, 4, one, beside_zero + 4, v), 0, 2, NAN, NAN);
    check_case("-inf twice");
    const float twice[] = {-1e20f, -1e20f, -1e20f, -1e20f, -2e20f, -2e20f, -2e20f, -2e20f};
    small_is(small_of(2, 4, one, twice, v), 0, 2, NAN, NAN);
    check_case("+inf among others");
    const float above[] = {0, 0, 0, 0, 1e20f, 1e20f, 1e20f, 1e20f, -1e20f, -1e20f, -1e20f, -1e20f};
    small_is(small_of(3, 4, one, above, v), 0, 2, NAN, NAN);
    check_case("inf - inf, which codes cancel");
    const float cancels[] = {1e20f, -1e20f, 0, 0, 1e-20f, 0, 0, 0, 0, 1e-20f, 0, 0};
    small_is(small_of(3, 4, one, cancels, v), 2, 2, NAN, NAN);
    check_case("a unit that is not finite, whatever the codes are");
    const float largest[] = {3e38f, 0, 0, 0}, key[] = {3e38f, 0, 0, 0, 0, 3e38f, 0, 0};
    small_is(small_of(1, 4, largest, key, v), 0, 2, NAN, NAN);
    small_is(small_of(1, 4, largest, key + 4, v), 0, 1, NAN, NAN);
    small_is(small_of(1, 4, largest, key + 4, v), 2, 2, 1.0, 0.0);
}

/* o may stand where q stood: lse still reads the real q. */
Test(attend, output_over_q)
{
    float q[64 * 8], k[64 * 8], v[64 * 8], o[64 * 8], lse[2][64];
    check_case("in place");
    for (int e = 0; e < 64 * 8; e++) {
        q[e] = check_normal();
        k[e] = check_normal() + 3.0f;
        v[e] = check_normal();
    }
    const sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
    const sparge_problem p = {.batch = 1,
                              .heads = 1,
                              .kv_heads = 1,
                              .q_len = 64,
                              .k_len = 64,
                              .dim = 8,
                              .dim_v = 8,
                              .q = {q, SPARGE_F32, 0, 0, 8},
                              .k = {k, SPARGE_F32, 0, 0, 8},
                              .v = {v, SPARGE_F32, 0, 0, 8}};
    float *const place[] = {o, q};
    for (int n = 0; n < 2; n++) {
        sparge_result r = {.o = {place[n], SPARGE_F32, 0, 0, 8}, .lse = lse[n]};
        cr_assert_eq(sparge_attend(&p, &options, NULL, &r, NULL), SPARGE_OK);
    }
    check_same(q, o, 64 * 8);
    check_same(lse[1], lse[0], 64);
}
