/* SPDX-License-Identifier: Apache-2.0 */
/* judge.c: what is promised of the cuda backend's answers, and a judge for what is not ref's bits.
 *
 * The judge is section 5 of the definition once more, over the codes of ref's intermediates, with P
 * in binary16 or e4m3 as kernels 4 and 5 round it: against the running maximum after a block (4) or
 * after both blocks of a stage of two kept ones (5). Maxima, lambda's votes and the weights before
 * they are rounded are floats, for they decide; sums are double. On the model a kernel then differs
 * by its sums of floats alone. On a GPU, whose exp2 is within 2 ulp, a weight at the edge of
 * rounding may fall to the other side: two of its half steps. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/half.h"
#include "common/softmax.h"
#include "sparge_cuda.h"
#include "sparge_mask.h"
#include "tests/gpu/gpu.h"

const kernel kernels[RUNGS] = {
    {1, SPARGE_F32, SPARGE_F32},  {2, SPARGE_F32, SPARGE_F32},   {3, SPARGE_INT8, SPARGE_INT8},
    {4, SPARGE_INT8, SPARGE_F16}, {4, SPARGE_INT8, SPARGE_INT8}, {5, SPARGE_INT8, SPARGE_FP8},
    {5, SPARGE_INT8, SPARGE_F16},
};

double worst_ratio[RUNGS];

enum { BLOCK_Q = 128, BLOCK_K = 64 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Bits ---- */

/* ---- The judge ---- */

typedef struct judged {
    double *o,
        *bound; /* [rows][dim_v] of a query block; bound: what rounding to the other side can do */
    double *l;  /* [rows] */
    float *m;
} judged;

typedef struct tile { /* scores of a block, in log2 units */
    int64_t j;
    float s[BLOCK_Q][BLOCK_K];
    bool attends[BLOCK_Q][BLOCK_K];
    float local[BLOCK_Q];
    bool sees[BLOCK_Q], skips[BLOCK_Q]; /* by row */
} tile;

static int64_t keys_seen(const problem *x, int64_t t, int64_t j)
{
    const int64_t offset = x->o.causal == SPARGE_CAUSAL_NONE    ? x->p.k_len
                           : x->o.causal == SPARGE_CAUSAL_START ? 0
                                                                : x->p.k_len - x->p.q_len;
    const int64_t end = smaller(x->p.k_len, t + offset + 1) - j * BLOCK_K;
    return end < 0 ? 0 : smaller(end, BLOCK_K);
}

static void score(const problem *x, const answer *want, const sparge_mask *mask, int64_t n,
                  int64_t kv, int64_t i, tile *t)
{
    const sparge_problem *p = &x->p;
    const int64_t first = i * BLOCK_Q, rows = smaller(BLOCK_Q, p->q_len - first);
    const float scale =
        x->o.softmax_scale > 0.0f ? x->o.softmax_scale : 1.0f / sqrtf((float)p->dim);
    const uint32_t *partial =
        mask ? sparge_mask_partial(mask, &x->o, n / p->heads, n % p->heads, i, t->j) : NULL;
    const float *bias = p->k_bias ? p->k_bias + kv * p->k_len + t->j * BLOCK_K : NULL;
    const float unit = want->intermediates.q_scale[n * blocks(p->q_len, BLOCK_Q) + i] *
                       want->intermediates.k_scale[kv * blocks(p->k_len, BLOCK_K) + t->j] * scale *
                       SPARGE_LOG2E;
    for (int64_t r = 0; r < rows; r++) {
        const int16_t *q = want->intermediates.q_int + (n * p->q_len + first + r) * p->dim;
        const int64_t seen = keys_seen(x, first + r, t->j);
        t->sees[r] = false;
        t->local[r] = isfinite(unit) ? -INFINITY : NAN;
        for (int64_t key = 0; key < BLOCK_K; key++) {
            t->attends[r][key] = key < seen && !(bias && bias[key] == -INFINITY) &&
                                 (!partial || partial[2 * r + key / 32] >> key % 32 & 1);
            if (!t->attends[r][key])
                continue;
            const int16_t *k =
                want->intermediates.k_int + (kv * p->k_len + t->j * BLOCK_K + key) * p->dim;
            int sum = 0;
            for (int64_t c = 0; c < p->dim; c++)
                sum += q[c] * k[c];
            const float z = unit * (float)sum;
            t->s[r][key] = bias ? z + bias[key] * SPARGE_LOG2E : z;
            t->sees[r] = true;
            if (t->s[r][key] > t->local[r] || isnan(t->s[r][key]))
                t->local[r] = t->s[r][key];
        }
    }
}

/* Votes, then the maxima after this block. */
static void decide(const problem *x, float lambda, int64_t rows, float *m, tile *t)
{
    const int64_t group = x->o.skip_rows ? smaller(x->o.skip_rows, BLOCK_Q) : 64;
    for (int64_t first = 0; first < rows; first += group) {
        bool sees = false, near = false;
        for (int64_t r = first; r < smaller(rows, first + group); r++)
            if (t->sees[r]) {
                sees = true;
                near |= m[r] == -INFINITY || !(t->local[r] - m[r] <= lambda * SPARGE_LOG2E);
            }
        for (int64_t r = first; r < smaller(rows, first + group); r++)
            t->skips[r] = lambda > -INFINITY && sees && !near;
    }
    for (int64_t r = 0; r < rows; r++)
        if (t->sees[r] && !t->skips[r] && !(t->local[r] <= m[r] || isnan(m[r])))
            m[r] = t->local[r];
}

/* V of a kv head as P.V takes it; what is not finite is 0. */
static double *narrowed(const problem *x, int64_t kv, sparge_dtype pv)
{
    const int64_t n = x->p.k_len * x->p.dim_v;
    const float *v = x->v.x + kv * n;
    double *to = malloc(((size_t)n + 1) * sizeof *to);
    for (int64_t c = 0; c < x->p.dim_v; c++) {
        float max = 0.0f;
        for (int64_t e = c; e < n; e += x->p.dim_v)
            max = fmaxf(max, isfinite(v[e]) ? fabsf(v[e]) : 0.0f);
        const float step = max / 448.0f < FLT_MIN ? 0.0f : max / 448.0f;
        for (int64_t e = c; e < n; e += x->p.dim_v) {
            const float f = isfinite(v[e]) ? v[e] : 0.0f;
            const float half = sparge_f16_to_f32(sparge_f32_to_f16(f));
            const float eighth =
                step > 0.0f ? sparge_e4m3_to_f32(sparge_f32_to_e4m3(f / step)) : 0.0f;
            to[e] = pv == SPARGE_F16 ? (isfinite(half) ? (double)half : 0.0)
                                     : (double)eighth * (double)step;
        }
    }
    return to;
}

static void fold(const problem *x, const kernel *of, const tile *t, const double *v, int64_t r,
                 float m, judged *w)
{
    const bool half = of->pv_dtype == SPARGE_F16;
    for (int64_t key = 0; key < BLOCK_K; key++) {
        if (!t->attends[r][key])
            continue;
        const float z = t->s[r][key], p = z == -INFINITY ? 0.0f : sparge_exp2(z - m);
        const double kept =
            half ? (double)sparge_f16_to_f32(sparge_f32_to_f16(p))
                 : (double)sparge_e4m3_to_f32(sparge_f32_to_e4m3(256.0f * p)) / 256.0;
        const double step =
            half ? fmax(0x1p-10 * (double)p, 0x1p-24) : fmax(0x1p-3 * (double)p, 0x1p-17);
        const double *value = v + (t->j * BLOCK_K + key) * x->p.dim_v;
        w->l[r] += (double)p;
        for (int64_t c = 0; c < x->p.dim_v; c++) {
            w->o[r * x->p.dim_v + c] += kept * value[c];
            const double off = (on_model() ? 0.0 : step) + 6e-7 * kept;
            w->bound[r * x->p.dim_v + c] += off * fabs(value[c]);
        }
    }
}

static void shrink_row(const problem *x, judged *w, int64_t r, double by)
{
    w->l[r] *= by;
    for (int64_t c = 0; c < x->p.dim_v; c++) {
        w->o[r * x->p.dim_v + c] *= by;
        w->bound[r * x->p.dim_v + c] *= by;
    }
}

static void judge_block(const problem *x, const kernel *of, const answer *got, const answer *want,
                        const sparge_mask *mask, int64_t n, int64_t kv, int64_t i, const double *v)
{
    const sparge_problem *p = &x->p;
    const int64_t first = i * BLOCK_Q, rows = smaller(BLOCK_Q, p->q_len - first),
                  columns = blocks(p->k_len, BLOCK_K);
    const float lambda =
        x->o.per_head ? x->o.per_head[n % p->heads].lambda : x->o.thresholds.lambda;
    static tile stage[2];
    judged w = {calloc((size_t)(rows * p->dim_v), sizeof(double)),
                calloc((size_t)(rows * p->dim_v), sizeof(double)),
                calloc((size_t)rows, sizeof(double)), malloc((size_t)rows * sizeof(float))};
    float before[BLOCK_Q];
    for (int64_t r = 0; r < rows; r++)
        w.m[r] = -INFINITY;
    int held = 0;
    for (int64_t j = 0; j <= columns; j++) {
        bool visible = false;
        for (int64_t r = 0; j < columns && r < rows; r++)
            visible |= keys_seen(x, first + r, j) > 0;
        const bool kept =
            visible && (!mask || sparge_mask_get(mask, n / p->heads, n % p->heads, i, j));
        if (kept) {
            if (held == 0)
                memcpy(before, w.m, (size_t)rows * sizeof *w.m);
            stage[held].j = j;
            score(x, want, mask, n, kv, i, &stage[held]);
            decide(x, lambda, rows, w.m, &stage[held++]);
        }
        if (!held || !(held == (of->n == 5 ? 2 : 1) || j == columns))
            continue;
        for (int64_t r = 0; r < rows; r++) {
            if (w.m[r] != before[r])
                shrink_row(x, &w, r, exp2((double)before[r] - (double)w.m[r]));
            for (int b = 0; b < held; b++)
                if (!stage[b].skips[r])
                    fold(x, of, &stage[b], v, r, w.m[r], &w);
        }
        held = 0;
    }
    double *ratio = &worst_ratio[of - kernels];
    const double coarse = got->o.in.dtype == SPARGE_F32   ? 0.0
                          : got->o.in.dtype == SPARGE_F16 ? 0x1p-11
                                                          : 0x1p-8;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t row = n * p->q_len + first + r;
        const float l = got->intermediates.l[row];
        if (isnan(want->intermediates.l[row])) {
            check(isnan(l), "l of row %lld of head %lld is %g, ref has NaN", (long long)(first + r),
                  (long long)n, (double)l);
            continue;
        }
        check(fabs((double)l - w.l[r]) <= 2e-5 * w.l[r],
              "l of row %lld of head %lld is %.9g, should be %.9g", (long long)(first + r),
              (long long)n, (double)l, w.l[r]);
        for (int64_t c = 0; c < p->dim_v; c++) {
            const float o = got->o.x[row * p->dim_v + c], ref = want->o.x[row * p->dim_v + c];
            if (ref != ref || w.l[r] == 0.0)
                continue;
            const double should = w.o[r * p->dim_v + c] / w.l[r], off = fabs((double)o - should);
            const double may = w.bound[r * p->dim_v + c] / w.l[r] + (4e-6 + coarse) * fabs(should) +
                               (coarse > 0.0 ? 0x1p-25 : 1e-37);
            if (coarse == 0.0)
                *ratio = fmax(*ratio, off / may);
            check(off <= may || (fabs(should) > 6e4 && coarse > 0.0),
                  "o of row %lld channel %lld of head %lld is %.9g, should be %.9g within %g",
                  (long long)(first + r), (long long)c, (long long)n, (double)o, should, may);
        }
    }
    free(w.o);
    free(w.bound);
    free(w.l);
    free(w.m);
}

static void judge(const problem *x, const kernel *of, const answer *got, const answer *want,
                  const sparge_mask *mask)
{
    const sparge_problem *p = &x->p;
    for (int64_t n = 0; n < p->batch * p->heads; n++) {
        const int64_t kv = n / p->heads * p->kv_heads + n % p->heads / (p->heads / p->kv_heads);
        double *v = narrowed(x, kv, of->pv_dtype);
        for (int64_t i = 0; i < blocks(p->q_len, BLOCK_Q); i++)
            judge_block(x, of, got, want, mask, n, kv, i, v);
        free(v);
    }
    for (int64_t n = 0; n < problem_rows(x); n++) {
        const float a = got->lse[n], b = want->lse[n];
        for (int64_t c = n * p->dim_v; c < (n + 1) * p->dim_v; c++)
            check(isnan(got->o.x[c]) == isnan(want->o.x[c]), "o[%lld] is %g, ref has %g",
                  (long long)c, (double)got->o.x[c], (double)want->o.x[c]);
        check(a == b || (isnan(a) && isnan(b)) || fabsf(a - b) <= 1e-5f * fmaxf(1.0f, fabsf(b)),
              "lse[%lld] is %.9g, should be %.9g", (long long)n, (double)a, (double)b);
        if (b == -INFINITY)
            for (int64_t c = 0; c < p->dim_v; c++)
                check(got->o.x[n * p->dim_v + c] == 0.0f, "o of the empty row %lld is %g",
                      (long long)n, (double)got->o.x[n * p->dim_v + c]);
    }
}

/* A GPU's exp2 and log2 are not ref's: weights in codes may differ by one, lse by an ulp. */
static void nearly_same(const problem *x, const answer *got, const answer *want)
{
    for (int64_t n = 0; n < problem_rows(x); n++) {
        double off = 0.0, size = 0.0;
        for (int64_t c = n * x->p.dim_v; c < (n + 1) * x->p.dim_v; c++) {
            check(isnan(got->o.x[c]) == isnan(want->o.x[c]), "o[%lld] is %g, ref has %g",
                  (long long)c, (double)got->o.x[c], (double)want->o.x[c]);
            off += isnan(want->o.x[c]) ? 0.0 : fabs((double)got->o.x[c] - (double)want->o.x[c]);
            size += isnan(want->o.x[c]) ? 0.0 : fabs((double)want->o.x[c]);
        }
        check(off <= 2e-2 * size + 1e-30, "row %lld of o is off by %g of %g", (long long)n, off,
              size);
        check(got->lse[n] == want->lse[n] || isnan(want->lse[n]) ||
                  fabsf(got->lse[n] - want->lse[n]) <= 2e-2f,
              "lse[%lld] is %g, should be %g", (long long)n, (double)got->lse[n],
              (double)want->lse[n]);
    }
}

static void same_lse(const answer *got, const answer *want, int64_t rows)
{
    for (int64_t n = 0; n < rows; n++)
        check(got->lse[n] == want->lse[n] || (isnan(got->lse[n]) && isnan(want->lse[n])) ||
                  (!on_model() &&
                   fabsf(got->lse[n] - want->lse[n]) <= 1.2e-7f * fmaxf(1.0f, fabsf(want->lse[n]))),
              "lse[%lld] is %.9g, should be %.9g", (long long)n, (double)got->lse[n],
              (double)want->lse[n]);
}

void compare(const problem *x, const kernel *r, const reply *got, const reply *want)
{
    const bool codes = r->pv_dtype == SPARGE_F32 || r->pv_dtype == SPARGE_INT8;
    const bool exact = codes && (r->n <= 3 || on_model());
    check_equal(got->a.result.backend, SPARGE_CUDA);
    check_equal(got->a.result.kernel, r->n);
    check_equal(got->a.result.pv_dtype, r->pv_dtype);
    check(got->a.result.workspace_bytes > 0, "no workspace is counted");
    if (want->mask.bits)
        check_same_as("mask", got->mask.bits, want->mask.bits,
                      want->mask.batch * want->mask.heads * want->mask.q_blocks * want->mask.words);
    same_traces(x, &got->a, &want->a, exact);
    for (int64_t h = 0; h < x->p.batch * x->p.heads; h++)
        same_counts(&got->a.head[h], &want->a.head[h]);
    same_counts(&got->a.result.counts, &want->a.result.counts);
    if (exact) {
        check_same_as("o", got->a.o.x, want->a.o.x, tensor_count(&want->a.o));
        same_lse(&got->a, &want->a, problem_rows(x));
    } else if (codes) {
        nearly_same(x, &got->a, &want->a);
    } else {
        judge(x, r, &got->a, &want->a,
              want->mask.bits ? &want->mask
              : x->mask.bits  ? &x->mask
                              : NULL);
    }
}

/* ---- Asking ---- */

sparge_mask wide_mask(const problem *x, int64_t spare)
{
    const int64_t lines = x->p.batch * x->p.heads * blocks(x->p.q_len, x->o.block_q);
    const int64_t k_blocks = blocks(x->p.k_len, x->o.block_k), words = blocks(k_blocks, 32) + spare;
    return (sparge_mask){.bits = check_alloc((size_t)(lines * words) * sizeof(uint32_t)),
                         .batch = x->p.batch,
                         .heads = x->p.heads,
                         .q_blocks = blocks(x->p.q_len, x->o.block_q),
                         .k_blocks = k_blocks,
                         .words = words};
}

bool on_model(void)
{
#ifdef SPARGE_CUDA_MODEL
    return true;
#else
    return false;
#endif
}

void fresh_device(void)
{
#ifdef SPARGE_CUDA_MODEL
    cuda_model_reset();
#endif
}

void any_schedule(void)
{
#ifdef SPARGE_CUDA_MODEL
    cuda_model_settings.late = (int)check_int(0, 2);
    cuda_model_settings.seed = check_int(0, 2) ? check_random() : 0;
    cuda_model_settings.resident_blocks = (unsigned)check_int(1, 3);
    cuda_model_settings.multiprocessors = (int)check_int(1, 4);
#endif
}

void use(problem *x, const kernel *r)
{
    x->o.backend = SPARGE_CUDA;
    x->o.cuda.kernel = r->n;
    x->o.qk_dtype = r->qk_dtype;
    x->o.pv_dtype = r->pv_dtype;
}

bool runs_here(int n)
{
    const float one = 1.0f;
    const sparge_problem p = {.batch = 1,
                              .heads = 1,
                              .kv_heads = 1,
                              .q_len = 1,
                              .k_len = 1,
                              .dim = 1,
                              .dim_v = 1,
                              .q = {&one, SPARGE_F32, 1, 1, 1},
                              .k = {&one, SPARGE_F32, 1, 1, 1},
                              .v = {&one, SPARGE_F32, 1, 1, 1}};
    sparge_options o = sparge_options_default(SPARGE_RULES_DEFAULT);
    o.backend = SPARGE_CUDA;
    o.cuda.kernel = n;
    o.qk_dtype = n <= 2 ? SPARGE_F32 : SPARGE_INT8;
    o.pv_dtype = SPARGE_FASTEST;
    int64_t bytes;
    return sparge_workspace_bytes(&p, &o, true, &bytes, NULL) == SPARGE_OK;
}

problem question(const shape *s, const kernel *r)
{
    problem x = problem_make(s);
    x.o.block_q = BLOCK_Q;
    x.o.block_k = BLOCK_K;
    x.o.qk_dtype = r->qk_dtype;
    x.o.pv_dtype = r->pv_dtype;
    return x;
}

/* A GPU's NaN has other bits than a processor's. */
static void one_nan(float *x, int64_t count)
{
    for (int64_t n = 0; n < count; n++)
        if (isnan(x[n]))
            x[n] = NAN;
}

static reply ask(const problem *x, const terms *t)
{
    reply r = {.mask = {0}};
    if (t->predict) {
        r.mask = wide_mask(x, t->spare);
        r.a = attention_to(x, &r.mask, t->dtype, t->layout);
    } else {
        r.a = attend_to(x, t->dtype, t->layout);
    }
    one_nan(r.a.o.x, tensor_count(&r.a.o));
    one_nan(r.a.intermediates.m, problem_rows(x));
    one_nan(r.a.intermediates.l, problem_rows(x));
    return r;
}

reply ask_ref(problem *x, const terms *t)
{
    x->o.backend = SPARGE_REF;
    x->o.cuda.kernel = 0;
    return ask(x, t);
}

reply ask_kernel(problem *x, const kernel *r, const terms *t)
{
    use(x, r);
    return ask(x, t);
}

void forget(reply *r)
{
    check_free(r->mask.bits);
    answer_free(&r->a);
}

void verify_with(problem *x, const kernel *r, const terms *t)
{
    x->o.qk_dtype = r->qk_dtype;
    x->o.pv_dtype = r->pv_dtype;
    reply want = ask_ref(x, t), got = ask_kernel(x, r, t);
    compare(x, r, &got, &want);
    forget(&got);
    forget(&want);
}

void verify(problem *x, const kernel *r, bool predict)
{
    const terms t = {predict, SPARGE_F32, PACKED, 0};
    verify_with(x, r, &t);
}

void verify_prediction(problem *x, const kernel *r, int64_t spare)
{
    sparge_mask want = wide_mask(x, spare), got = wide_mask(x, spare);
    answer a = answer_make(x, SPARGE_F32, PACKED), b = answer_make(x, SPARGE_F32, PACKED);
    sparge_error error;
    x->o.backend = SPARGE_REF;
    x->o.cuda.kernel = 0;
    check(sparge_predict(&x->p, &x->o, &want, &a.intermediates, &error) == SPARGE_OK, "%s",
          error.text);
    use(x, r);
    twins there = {.count = 0};
    const sparge_problem p = twin_problem(&there, x);
    const sparge_intermediates t = twin_trace(&there, &b.intermediates);
    sparge_mask m = twin_mask(&there, &got);
    check(sparge_predict(&p, &x->o, &m, &t, &error) == SPARGE_OK, "%s", error.text);
    twins_fetch(&there);
    twins_free(&there);
    same_traces(x, &b, &a, true);
    check_same_as("mask", got.bits, want.bits,
                  want.batch * want.heads * want.q_blocks * want.words);
    check_free(got.bits);
    check_free(want.bits);
    answer_free(&a);
    answer_free(&b);
}
