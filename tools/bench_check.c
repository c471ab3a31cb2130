/* SPDX-License-Identifier: Apache-2.0 */
/* bench_check.c: what sparge bench knows to be right before it takes the time of it.
 *
 * The oracle costs q_len * k_len * dim in double, so it judges two parts: the first tokens alone,
 * computed by the same kernel with the same precision, kind of mask, instruction set and threads;
 * and one query block of the whole. All of the whole (on cuda all of a head) is compared with the
 * f32 kernel over the same mask, which sees what the two do not share. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/bf16.h"
#include "common/thresholds.h"
#include "tools/bench.h"
#include "tools/compare.h"

enum { SAMPLE_TOKENS = 512, SAMPLE_KV_HEADS = 2 };
enum { ROW_CHANNELS = 16 }; /* from which on single rows are judged */

/* How far a case may be off, as relative L1: of all rows together, and of the worst of them. */
typedef struct allowed {
    double mean, row;
} allowed;

/* Against the oracle on the same codes only those of P err. A code is off by up to half a step,
 * 1/sqrt(12) of one in the mean, and a step is 1/qmax of the largest weight of its tile. With v
 * independent of the weights, n = block_k of them make |o| err by at most sqrt(n) / (sqrt(12)
 * qmax) of itself, because sqrt(sum p^2), to which |o| is proportional, is at least the largest
 * weight. So much is allowed, and twice that in a row. In a model tokens of large weight may have a
 * small v (attention sinks): o is small there and the error is not. Measured on SmolLM2: 2.8 times
 * in the mean and 16 in a row; 5 and 50 are allowed. A weight in f16 or fp8 (10 and 3 bits of
 * mantissa) is off by half a step at most, 1/sqrt(3) of that in the mean, of itself and so of o.
 * What has no codes is rounded to f32, which was seen to cost 2e-6 in a row. o that is stored in 16
 * bits is off by 2^-9 of itself at most. bf16 is judged by the reference, which has its bits. */
static allowed from_oracle(const sparge_options *o, bool captured)
{
    const double stored = o->backend == SPARGE_CUDA ? 0x1p-9 : 0.0;
    const double coding =
        o->pv_dtype == SPARGE_F16 ? 0x1p-11 / sqrt(3.0)
        : o->pv_dtype == SPARGE_FP8
            ? 0x1p-4 / sqrt(3.0)
            : sqrt((double)o->block_k / 12.0) / (o->pv_dtype == SPARGE_INT8 ? 127.0 : 4095.0);
    if (o->pv_dtype == SPARGE_F32 || sparge_uses_bf16(o))
        return (allowed){1e-5 + stored, 1e-4 + stored};
    return captured ? (allowed){5.0 * coding + stored, 50.0 * coding + stored}
                    : (allowed){coding + stored, 2.0 * coding + stored};
}

/* Against f32 the codes of q, k and v err too. Their steps are a/qmax with a = max/rms, 4.3 in a
 * block of normal numbers: a score of q and k of variance 1 is off by sqrt(2) 4.3 / (sqrt(12)
 * qmax), which is 1.8 / qmax, and o by as much of itself; v and P add half of that each, in
 * squares: 2.2 / qmax for all, and twice that is allowed, with the qmax of the coarser. The
 * scores of a model are larger: three times as much (SmolLM2: 4.7 / qmax). In fp8 v and P are off
 * by 2^-4 / sqrt(3) each, and twice that is added. In bf16 it is 2^-8 / sqrt(3), and a score of
 * such q and k is off by sqrt(2) of that: twice that of all four, 4 * 2^-8 / sqrt(3), is added.
 * Single rows may be far off where two keys compete: the mean alone counts. */
static double from_f32(const sparge_options *o, bool captured)
{
    const double qmax = o->qk_dtype == SPARGE_INT8 || o->pv_dtype == SPARGE_INT8 ? 127.0 : 2047.0;
    const double fp8 = o->pv_dtype == SPARGE_FP8 ? 2.0 * sqrt(2.0 / 3.0) * 0x1p-4 : 0.0;
    const double bf16 = sparge_uses_bf16(o) ? 4.0 * 0x1p-8 / sqrt(3.0) : 0.0;
    return (captured ? 13.0 : 4.4) / qmax + fp8 + (captured ? 3.0 : 1.0) * bf16;
}

/* ---- The first tokens against the oracle ---- */

static sparge_problem sample_of(const sparge_problem *whole)
{
    sparge_problem p = *whole;
    const int64_t group = p.heads / p.kv_heads;
    p.batch = 1;
    p.kv_heads = p.kv_heads < SAMPLE_KV_HEADS ? p.kv_heads : SAMPLE_KV_HEADS;
    p.heads = p.kv_heads * group;
    p.q_len = p.q_len < SAMPLE_TOKENS ? p.q_len : SAMPLE_TOKENS;
    p.k_len = p.k_len < SAMPLE_TOKENS ? p.k_len : SAMPLE_TOKENS;
    return p;
}

/* Its mask, on the host and where the backend finds it; none if it is dense. */
static void sample_mask(const bench_case *c, const sparge_problem *p, const sparge_options *o,
                        sparge_mask *mask, device_memory *bits)
{
    if (c->kind == BENCH_DENSE)
        return;
    must_sparge(sparge_mask_alloc(mask, p, o, &library_error));
    device_memory_make(o->backend, mask->bits, device_mask_bytes(mask), bits);
    if (c->kind == BENCH_PREDICTED) {
        sparge_mask predicted = *mask;
        predicted.bits = bits->device;
        must_sparge(sparge_predict(p, o, &predicted, NULL, &library_error));
        device_memory_get(bits);
    } else {
        bench_impose(c->kind, c->imposed, p, o, mask);
        device_memory_put(bits);
    }
}

/* Attention where the backend finds its arrays, packed into `got` on the host. */
static void attend_into(const sparge_problem *p, const sparge_options *options,
                        const sparge_mask *mask, const device_memory *bits, array *got)
{
    device_memory o;
    sparge_mask kept = {0};
    if (mask) {
        kept = *mask;
        kept.bits = bits->device;
    }
    device_memory_make(options->backend, got->data, array_count(got) * (int64_t)sizeof(float), &o);
    sparge_result result = {.o = bench_output(p, o.device, SPARGE_F32)};
    must_sparge(sparge_attend(p, options, mask ? &kept : NULL, &result, &library_error));
    device_memory_get(&o);
    device_memory_free(&o);
}

static void rows_alloc(const sparge_problem *p, array_type type, array *out)
{
    const int64_t shape[] = {1, p->heads, p->q_len, p->dim_v};
    must_have(array_alloc(type, 4, shape, out, &failure));
}

/* Does some head drop what lambda says? */
static bool has_lambda(const sparge_options *o, int64_t heads)
{
    bool any = false;
    for (int64_t h = 0; h < heads; h++)
        any |= sparge_thresholds_of(o, h)->lambda > -INFINITY;
    return any;
}

/* How far `got` lies from what the oracle says. It knows no lambda and no bf16: where there is one
 * the reference judges, over the same mask and in the same order. */
static comparison distance(const sparge_problem *p, const sparge_options *options,
                           const sparge_mask *mask, const array *got)
{
    const bool exact = !has_lambda(options, p->heads) && !sparge_uses_bf16(options);
    sparge_options reference = *options;
    if (sparge_uses_bf16(options))
        must_sparge(sparge_options_resolve(p, &reference, &library_error));
    else
        reference.isa = SPARGE_ISA_AUTO;
    reference.backend = SPARGE_REF;
    reference.cuda.kernel = 0;
    array want;
    rows_alloc(p, exact ? ARRAY_F64 : ARRAY_F32, &want);
    sparge_result result = {.o = bench_output(p, want.data, SPARGE_F32)};
    must_sparge(exact ? sparge_oracle(p, &reference, mask, SPARGE_ORACLE_CODES, want.data, NULL,
                                      NULL, &library_error)
                      : sparge_attend(p, &reference, mask, &result, &library_error));
    const comparison c = compare(got, &want);
    array_free(&want);
    return c;
}

static comparison check_sample(const bench_group *g, const bench_case *c)
{
    const sparge_problem p = sample_of(&g->problem), host = sample_of(&g->in->problem);
    const sparge_options options = bench_options(g, c);
    sparge_mask mask = {0};
    device_memory bits = {0};
    array got;
    rows_alloc(&p, ARRAY_F32, &got);
    sample_mask(c, &p, &options, &mask, &bits);
    const sparge_mask *kept = mask.bits ? &mask : NULL;
    attend_into(&p, &options, kept, &bits, &got);
    const comparison to = distance(&host, &options, kept, &got);
    array_free(&got);
    device_memory_free(&bits);
    sparge_mask_free(&mask);
    return to;
}

/* ---- One query block of the whole against the oracle ---- */

static sparge_in view_from(const sparge_in *in, int64_t batch, int64_t head, int64_t token)
{
    sparge_in part = *in;
    const int64_t element = batch * in->batch + head * in->head + token * in->token;
    part.data = (const char *)in->data + element * (in->dtype == SPARGE_F32 ? 4 : 2);
    return part;
}

/* The last block of the last head. Where queries count from the start and keys are more or fewer,
 * what the last ones see cannot be said of them alone: there the first block. */
static comparison check_block(const bench_group *g, const bench_case *c)
{
    const sparge_problem *whole = &g->in->problem;
    sparge_options options = bench_options(g, c);
    const bool start = options.causal == SPARGE_CAUSAL_START;
    const int64_t i =
        start && whole->q_len != whole->k_len ? 0 : (whole->q_len - 1) / options.block_q;
    if (start && whole->q_len == whole->k_len) /* then both alignments are one */
        options.causal = SPARGE_CAUSAL_END;
    const int64_t b = whole->batch - 1, h = whole->heads - 1, kv = whole->kv_heads - 1;
    const int64_t first = i * options.block_q, left = whole->q_len - first;
    sparge_problem p = *whole;
    p.batch = p.heads = p.kv_heads = 1;
    p.q_len = left < options.block_q ? left : options.block_q;
    p.q = view_from(&whole->q, b, h, first);
    p.k = view_from(&whole->k, b, kv, 0);
    p.v = view_from(&whole->v, b, kv, 0);
    if (options.per_head)
        options.per_head += h;

    sparge_mask mask = {0};
    array got;
    rows_alloc(&p, ARRAY_F32, &got);
    memcpy(got.data,
           (const float *)g->o.data + ((b * whole->heads + h) * whole->q_len + first) * p.dim_v,
           (size_t)(p.q_len * p.dim_v) * sizeof(float));
    if (c->mask.bits)
        must_sparge(sparge_mask_alloc(&mask, &p, &options, &library_error));
    for (int64_t j = 0; j < mask.k_blocks; j++)
        sparge_mask_set(&mask, 0, 0, 0, j, sparge_mask_get(&c->mask, b, h, i, j));
    const comparison to = distance(&p, &options, mask.bits ? &mask : NULL, &got);
    array_free(&got);
    sparge_mask_free(&mask);
    return to;
}

/* ---- The whole against f32 ---- */

/* On cuda the last head alone: the f32 of kernel 2 is slow. */
static comparison compare_with_f32(bench_group *g, bench_case *c)
{
    const bool cuda = g->options.backend == SPARGE_CUDA;
    sparge_options exact = bench_options(g, c);
    sparge_problem p = g->problem;
    sparge_mask mask = c->mask;
    device_memory bits = c->bits;
    array got = g->o;
    exact.qk_dtype = exact.pv_dtype = SPARGE_F32;
    if (cuda) {
        exact.cuda.kernel = 2;
        if (exact.per_head)
            exact.per_head += p.heads - 1;
        p.q = view_from(&p.q, p.batch - 1, p.heads - 1, 0);
        p.k = view_from(&p.k, p.batch - 1, p.kv_heads - 1, 0);
        p.v = view_from(&p.v, p.batch - 1, p.kv_heads - 1, 0);
        bits.device =
            (uint32_t *)bits.device + (p.batch * p.heads - 1) * mask.q_blocks * mask.words;
        got = array_part(&g->o, 2, p.batch * p.heads - 1);
        p.batch = p.heads = p.kv_heads = mask.batch = mask.heads = 1;
    }
    attend_into(&p, &exact, mask.bits ? &mask : NULL, &bits, &g->want);
    const array want = cuda ? array_part(&g->want, 2, 0) : g->want;
    return compare(&got, &want);
}

static int64_t nonfinite(const comparison *c) { return c->nan_got + c->inf_got; }

/* What is not finite on both sides is no agreement here. lambda decides for 64 rows at a time:
 * a decision within rounding moves single rows. Of few channels |o| may happen to be next to
 * nothing. */
static bool near(const comparison *c, const allowed *most, bool rows)
{
    return nonfinite(c) == 0 && c->l1 <= most->mean && (!rows || c->worst_row_l1 <= most->row);
}

void bench_check(bench_group *g, bench_case *c, char text[256])
{
    const sparge_options options = bench_options(g, c);
    const bool rows =
        !has_lambda(&options, g->problem.heads) && g->in->problem.dim_v >= ROW_CHANNELS;
    const allowed coding = from_oracle(&options, g->args->capture);
    const double rounding = from_f32(&options, g->args->capture);
    bench_times times;
    bench_run(g, c, &times);
    bench_fetch(g, c);
    int64_t wrong = array_nonfinite(&g->o);
    const bool is_f32 = c->kind != BENCH_ONEDNN && !c->kernel && c->qk == SPARGE_F32 &&
                        c->pv == SPARGE_F32; /* then it is that kernel */
    const comparison whole = is_f32 ? compare(&g->o, &g->o) : compare_with_f32(g, c);
    const comparison block = check_block(g, c);
    const comparison sample =
        c->kind == BENCH_ONEDNN ? block : check_sample(g, c); /* it has no smaller problem */
    const bool sample_near = near(&sample, &coding, rows);
    const bool oracle_near = sample_near && near(&block, &coding, rows);
    const comparison *worst = sample_near ? &block : &sample;
    wrong = wrong ? wrong : nonfinite(&sample);
    c->wrong = !(wrong == 0 && oracle_near && whole.l1 <= rounding);
    char name[64];
    bench_case_name(g, c, name);
    if (wrong)
        snprintf(text, 256,
                 "%s gives %" PRId64 " elements that are NaN or infinite, so it is not timed", name,
                 wrong);
    else if (!oracle_near)
        snprintf(
            text, 256,
            "%s is %.2g (worst row %.2g) from the oracle, allowed are %.2g (%.2g); it is not timed",
            name, worst->l1, worst->worst_row_l1, coding.mean, coding.row);
    else if (c->wrong)
        snprintf(text, 256,
                 "%s is %.2g from f32 over the same mask, allowed is %.2g; it is not timed", name,
                 whole.l1, rounding);
}
