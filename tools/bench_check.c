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
 * bits is off by 2^-9 of itself at most. */
static allowed from_oracle(const sparge_options *o, bool captured)
{
    const double stored = o->backend == SPARGE_CUDA ? 0x1p-9 : 0.0;
    const double coding =
        o->pv_dtype == SPARGE_F16 ? 0x1p-11 / sqrt(3.0)
        : o->pv_dtype == SPARGE_FP8
            ? 0x1p-4 / sqrt(3.0)
            : sqrt((double)o->block_k / 12.0) / (o->pv_dtype == SPARGE_INT8 ? 127.0 : 4095.0);
    if (o->pv_dtype == SPARGE_F32)
        return (allowed){1e-5 + stored, 1e-4 + stored};
    return captured ? (allowed){5.0 * coding + stored, 50.0 * coding + stored}
                    : (allowed){coding + stored, 2.0 * coding + stored};
}

/* Against f32 the codes of q, k and v err too. Their steps are a/qmax with a = max/rms, 4.3 in a
 * block of normal numbers: a score of q and k of variance 1 is off by sqrt(2) 4.3 / (sqrt(12)
 * qmax), which is 1.8 / qmax, and o by as much of itself; v and P add half of that each, in
 * squares: 2.2 / qmax for all, and twice that is allowed, with the qmax of the coarser. The
 * scores of a model are larger: three times as much (SmolLM2: 4.7 / qmax). In fp8 v and P are off
 * by 2^-4 / sqrt(3) each, and twice that is added. Single rows may be far off where two keys
 * compete: the mean alone counts. */
static double from_f32(const sparge_options *o, bool captured)
{
    const double qmax = o->qk_dtype == SPARGE_INT8 || o->pv_dtype == SPARGE_INT8 ? 127.0 : 2047.0;
    const double fp8 = o->pv_dtype == SPARGE_FP8 ? 2.0 * sqrt(2.0 / 3.0) * 0x1p-4 : 0.0;
    return (captured ? 13.0 : 4.4) / qmax + fp8;
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
static sparge_status sample_mask(const bench_case *c, const sparge_problem *p,
                                 const sparge_options *o, sparge_mask *mask, device_memory *bits,
                                 sparge_error *why)
{
    if (c->kind == BENCH_DENSE)
        return SPARGE_OK;
    sparge_status status = sparge_mask_alloc(mask, p, o, why);
    if (!status)
        status = device_memory_make(o->backend, mask->bits, device_mask_bytes(mask), bits, why);
    if (!status && c->kind == BENCH_PREDICTED) {
        sparge_mask predicted = *mask;
        predicted.bits = bits->device;
        status = sparge_predict(p, o, &predicted, NULL, why);
        return status ? status : device_memory_get(bits, why);
    }
    if (!status) {
        bench_impose(c->kind, c->imposed, p, o, mask);
        status = device_memory_put(bits, why);
    }
    return status;
}

/* Attention where the backend finds its arrays, packed into `got` on the host. */
static sparge_status attend_into(const sparge_problem *p, const sparge_options *options,
                                 const sparge_mask *mask, const device_memory *bits, array *got,
                                 sparge_error *why)
{
    device_memory o = {0};
    sparge_mask kept = {0};
    if (mask) {
        kept = *mask;
        kept.bits = bits->device;
    }
    sparge_status status = device_memory_make(options->backend, got->data,
                                              array_count(got) * (int64_t)sizeof(float), &o, why);
    sparge_result result = {.o = bench_output(p, o.device, SPARGE_F32)};
    if (!status)
        status = sparge_attend(p, options, mask ? &kept : NULL, &result, why);
    if (!status)
        status = device_memory_get(&o, why);
    device_memory_free(&o);
    return status;
}

/* The oracle knows no lambda: where there is one the reference judges, over the same mask. */
static sparge_status judge(const sparge_problem *p, const sparge_options *options,
                           const sparge_mask *mask, array *want, sparge_error *why)
{
    sparge_options reference = *options;
    reference.backend = SPARGE_REF;
    reference.isa = SPARGE_ISA_AUTO;
    reference.kernel = 0;
    if (options->thresholds.lambda == -INFINITY)
        return sparge_oracle(p, &reference, mask, SPARGE_ORACLE_CODES, want->data, NULL, NULL, why);
    sparge_result result = {.o = bench_output(p, want->data, SPARGE_F32)};
    return sparge_attend(p, &reference, mask, &result, why);
}

/* How far `got` lies from what the judge says. */
static exit_code distance(const sparge_problem *p, const sparge_options *options,
                          const sparge_mask *mask, const array *got, comparison *to,
                          file_error *error)
{
    const int64_t shape[] = {1, p->heads, p->q_len, p->dim_v};
    const array_type type = options->thresholds.lambda == -INFINITY ? ARRAY_F64 : ARRAY_F32;
    array want = {0};
    if (!array_alloc(type, 4, shape, &want, error))
        return EXIT_MACHINE;
    sparge_error why;
    const sparge_status status = judge(p, options, mask, &want, &why);
    if (!status)
        *to = compare(got, &want);
    array_free(&want);
    return library_result(status, &why, error);
}

static exit_code check_sample(const bench_group *g, const bench_case *c, comparison *to,
                              file_error *error)
{
    const sparge_problem p = sample_of(&g->problem), host = sample_of(&g->in->problem);
    const sparge_options options = bench_options(g, c);
    const int64_t shape[] = {1, p.heads, p.q_len, p.dim_v};
    sparge_mask mask = {0};
    device_memory bits = {0};
    array got = {0};
    if (!array_alloc(ARRAY_F32, 4, shape, &got, error))
        return EXIT_MACHINE;
    sparge_error why;
    sparge_status status = sample_mask(c, &p, &options, &mask, &bits, &why);
    const sparge_mask *kept = mask.bits ? &mask : NULL;
    if (!status)
        status = attend_into(&p, &options, kept, &bits, &got, &why);
    exit_code code = library_result(status, &why, error);
    if (!code)
        code = distance(&host, &options, kept, &got, to, error);
    array_free(&got);
    device_memory_free(&bits);
    sparge_mask_free(&mask);
    return code;
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
static exit_code check_block(const bench_group *g, const bench_case *c, comparison *to,
                             file_error *error)
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

    const int64_t shape[] = {1, 1, p.q_len, p.dim_v};
    sparge_mask mask = {0};
    array got = {0};
    if (!array_alloc(ARRAY_F32, 4, shape, &got, error))
        return EXIT_MACHINE;
    memcpy(got.data,
           (const float *)g->o.data + ((b * whole->heads + h) * whole->q_len + first) * p.dim_v,
           (size_t)(p.q_len * p.dim_v) * sizeof(float));
    sparge_error why;
    const sparge_status status =
        c->mask.bits ? sparge_mask_alloc(&mask, &p, &options, &why) : SPARGE_OK;
    for (int64_t j = 0; j < mask.k_blocks && !status; j++)
        sparge_mask_set(&mask, 0, 0, 0, j, sparge_mask_get(&c->mask, b, h, i, j));
    exit_code code = library_result(status, &why, error);
    if (!code)
        code = distance(&p, &options, mask.bits ? &mask : NULL, &got, to, error);
    array_free(&got);
    sparge_mask_free(&mask);
    return code;
}

/* ---- The whole against f32 ---- */

/* On cuda the last head alone: the f32 of kernel 2 is slow. */
static exit_code compare_with_f32(bench_group *g, bench_case *c, comparison *to, file_error *error)
{
    const bool cuda = g->options.backend == SPARGE_CUDA;
    sparge_options exact = bench_options(g, c);
    sparge_problem p = g->problem;
    sparge_mask mask = c->mask;
    device_memory bits = c->bits;
    array got = g->o;
    exact.qk_dtype = exact.pv_dtype = SPARGE_F32;
    if (cuda) {
        exact.kernel = 2;
        p.q = view_from(&p.q, p.batch - 1, p.heads - 1, 0);
        p.k = view_from(&p.k, p.batch - 1, p.kv_heads - 1, 0);
        p.v = view_from(&p.v, p.batch - 1, p.kv_heads - 1, 0);
        bits.device =
            (uint32_t *)bits.device + (p.batch * p.heads - 1) * mask.q_blocks * mask.words;
        got = array_part(&g->o, 2, p.batch * p.heads - 1);
        p.batch = p.heads = p.kv_heads = mask.batch = mask.heads = 1;
    }
    sparge_error why;
    const sparge_status status =
        attend_into(&p, &exact, mask.bits ? &mask : NULL, &bits, &g->want, &why);
    if (!status) {
        const array want = cuda ? array_part(&g->want, 2, 0) : g->want;
        *to = compare(&got, &want);
    }
    return library_result(status, &why, error);
}

static exit_code check_whole(bench_group *g, bench_case *c, int64_t *wrong, comparison *to,
                             file_error *error)
{
    sparge_error why;
    bench_times times;
    exit_code code = library_result(bench_run(g, c, &times, &why), &why, error);
    if (!code)
        code = bench_fetch(g, c, error);
    if (code)
        return code;
    *wrong = array_nonfinite(&g->o);
    if (c->kind == BENCH_ONEDNN || c->kernel || c->qk != SPARGE_F32 || c->pv != SPARGE_F32)
        return compare_with_f32(g, c, to, error);
    *to = compare(&g->o, &g->o); /* it is that kernel */
    return EXIT_FINE;
}

static int64_t nonfinite(const comparison *c) { return c->nan_got + c->inf_got; }

/* What is not finite on both sides is no agreement here. lambda decides for 64 rows at a time:
 * a decision within rounding moves single rows. Of few channels |o| may happen to be next to
 * nothing. */
static bool near(const comparison *c, const allowed *most, bool rows)
{
    return nonfinite(c) == 0 && c->l1 <= most->mean && (!rows || c->worst_row_l1 <= most->row);
}

exit_code bench_check(bench_group *g, bench_case *c, char text[256], file_error *error)
{
    const sparge_options options = bench_options(g, c);
    const bool rows =
        options.thresholds.lambda == -INFINITY && g->in->problem.dim_v >= ROW_CHANNELS;
    const allowed coding = from_oracle(&options, g->args->capture);
    const double rounding = from_f32(&options, g->args->capture);
    comparison sample = {.l1 = NAN}, block = {.l1 = NAN}, whole = {.l1 = NAN};
    int64_t wrong = 0;
    exit_code code = check_whole(g, c, &wrong, &whole, error);
    if (!code)
        code = check_block(g, c, &block, error);
    if (!code && c->kind != BENCH_ONEDNN) /* which has no smaller problem of its own */
        code = check_sample(g, c, &sample, error);
    else
        sample = block;
    if (code)
        return code;
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
        snprintf(text, 256,
                 "%s is %.2g (worst row %.2g) from the oracle, allowed are %.2g (%.2g); it is "
                 "not timed",
                 name, worst->l1, worst->worst_row_l1, coding.mean, coding.row);
    else if (c->wrong)
        snprintf(text, 256,
                 "%s is %.2g from f32 over the same mask, allowed is %.2g; it is not timed", name,
                 whole.l1, rounding);
    return EXIT_FINE;
}
