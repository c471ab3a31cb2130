/* SPDX-License-Identifier: Apache-2.0 */
/* sparge.c: the front door: checks every argument, fills in the defaults, hands over to a backend.
 */

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/arithmetic.h"
#include "common/block_mask.h"
#include "common/geometry.h"
#include "cpu/cpu.h"
#include "gpu/gpu.h"
#include "ref/oracle.h"
#include "ref/ref.h"
#include "sparge_cuda.h"
#include "sparge_inspect.h"
#include "sparge_tune.h"
#include "tune/tune.h"

static const sparge_intermediates no_intermediates;

/* ---- Names ---- */

const char *sparge_status_string(sparge_status status)
{
    static const char *const name[] = {
        "ok",           "bad argument", "sizes do not fit", "out of memory", "not supported here",
        "device error", "cancelled"};
    return (unsigned)status < sizeof name / sizeof *name ? name[status] : "unknown status";
}

const char *sparge_backend_string(sparge_backend backend)
{
    static const char *const name[] = {"auto", "ref", "cpu", "cuda"};
    return (unsigned)backend < sizeof name / sizeof *name ? name[backend] : "unknown backend";
}

const char *sparge_isa_string(sparge_isa isa)
{
    static const char *const name[] = {"auto", "scalar", "avx2", "avxvnni", "avx512vnni"};
    return (unsigned)isa < sizeof name / sizeof *name ? name[isa] : "unknown isa";
}

const char *sparge_dtype_string(sparge_dtype dtype)
{
    static const char *const name[] = {"f32", "f16", "bf16", "fp8", "int8", "int12", "fastest"};
    return (unsigned)dtype < sizeof name / sizeof *name ? name[dtype] : "unknown dtype";
}

const char *sparge_causal_string(sparge_causal causal)
{
    static const char *const name[] = {"none", "end", "start"};
    return (unsigned)causal < sizeof name / sizeof *name ? name[causal] : "unknown causal";
}

const char *sparge_rules_string(sparge_rules rules)
{
    static const char *const name[] = {"default", "paper", "upstream"};
    return (unsigned)rules < sizeof name / sizeof *name ? name[rules] : "unknown rules";
}

/* ---- What is here ---- */

int sparge_version(void) { return SPARGE_VERSION_NUMBER; }

/* The stages of a backend on the host, which fail for want of memory or are cancelled (gpu/gpu.h
 * has those of cuda): arguments are checked and options resolved by then, no intermediates is NULL.
 */
static const struct stages {
    sparge_status (*predict)(const sparge_problem *, const sparge_options *, sparge_mask *,
                             const sparge_intermediates *);
    sparge_status (*attend)(const sparge_problem *, const sparge_options *, const sparge_mask *,
                            sparge_result *);
    sparge_status (*attention)(const sparge_problem *, const sparge_options *, sparge_mask *,
                               sparge_result *);
} stages[] = {
    [SPARGE_REF] = {sparge_ref_predict, sparge_ref_attend, sparge_ref_attention},
    [SPARGE_CPU] = {sparge_cpu_predict, sparge_cpu_attend, sparge_cpu_attention},
};

bool sparge_backend_built(sparge_backend backend)
{
    return backend == SPARGE_CUDA ? sparge_cuda_built() : (unsigned)backend < SPARGE_CUDA;
}

bool sparge_backend_available(sparge_backend backend)
{
    return backend == SPARGE_CUDA ? sparge_cuda_available() : sparge_backend_built(backend);
}

bool sparge_isa_available(sparge_isa isa) { return isa == SPARGE_ISA_AUTO || sparge_cpu_has(isa); }

/* ---- Errors: one sentence, the argument and its value ---- */

static sparge_status fail(sparge_error *error, sparge_status status, const char *format, ...)
{
    if (error) {
        va_list args;
        va_start(args, format);
        vsnprintf(error->text, sizeof error->text, format, args);
        va_end(args);
    }
    return status;
}

static sparge_status succeed(sparge_error *error)
{
    if (error)
        error->text[0] = '\0';
    return SPARGE_OK;
}

/* Puts a failure in words where nobody has yet. */
static sparge_status told(sparge_status status, sparge_error *error)
{
    return status && error && !error->text[0]
               ? fail(error, status, "%s", sparge_status_string(status))
               : status;
}

/* Can a * b * c * d things of this size be counted in bytes? */
static bool fits(int64_t a, int64_t b, int64_t c, int64_t d, size_t size)
{
    int64_t n;
    return !__builtin_mul_overflow(a, b, &n) && !__builtin_mul_overflow(n, c, &n) &&
           !__builtin_mul_overflow(n, d, &n) && !__builtin_mul_overflow(n, (int64_t)size, &n);
}

/* NaN fails every one of these comparisons. */
static bool in_range(float x, float low, float high) { return x >= low && x <= high; }

/* head: of per_head, or -1 for the thresholds of all. */
static sparge_status check_thresholds(const sparge_thresholds *k, int64_t head, sparge_error *error)
{
    const struct {
        const char *name;
        float value, low, high;
        bool may_be_off;
    } threshold[] = {
        {"theta", k->theta, -1.0f, 1.0f, false},
        {"tau", k->tau, 0.0f, 1.0f, true},
        {"topk", k->topk, 0.0f, 1.0f, true},
        {"lambda", k->lambda, -INFINITY, 0.0f, false},
    };
    char where[64] = "";
    if (head >= 0)
        snprintf(where, sizeof where, " in per_head[%lld]", (long long)head);
    for (size_t n = 0; n < sizeof threshold / sizeof *threshold; n++)
        if (!in_range(threshold[n].value, threshold[n].low, threshold[n].high) &&
            !(threshold[n].may_be_off && threshold[n].value == SPARGE_OFF))
            return fail(error, SPARGE_ERR_ARGUMENT, "%s is %.9g%s, it must be in [%g, %g]%s",
                        threshold[n].name, (double)threshold[n].value, where,
                        (double)threshold[n].low, (double)threshold[n].high,
                        threshold[n].may_be_off ? " or SPARGE_OFF" : "");
    if (k->tau == SPARGE_OFF && k->topk == SPARGE_OFF)
        return fail(error, SPARGE_ERR_ARGUMENT, "tau and topk are both off%s", where);
    return SPARGE_OK;
}

static sparge_status check_view(const char *name, const void *data, sparge_dtype dtype, bool empty,
                                sparge_error *error)
{
    if (!data && !empty)
        return fail(error, SPARGE_ERR_ARGUMENT, "%s.data is NULL", name);
    if ((unsigned)dtype > SPARGE_BF16)
        return fail(error, SPARGE_ERR_ARGUMENT, "%s.dtype is %d, it must be one of sparge_dtype",
                    name, (int)dtype);
    return SPARGE_OK;
}

static sparge_status check_problem(const sparge_problem *p, bool needs_v, sparge_error *error)
{
    const struct {
        const char *name;
        int64_t value, low, high;
    } size[] = {
        {"batch", p->batch, 0, INT64_MAX},
        {"heads", p->heads, 1, INT64_MAX},
        {"kv_heads", p->kv_heads, 1, INT64_MAX},
        {"q_len", p->q_len, 0, INT64_MAX / 4},
        {"k_len", p->k_len, 0, INT64_MAX / 4},
        {"dim", p->dim, 1, SPARGE_MAX_DIM},
        {"dim_v", needs_v ? p->dim_v : 1, 1, INT64_MAX},
    };
    for (size_t n = 0; n < sizeof size / sizeof *size; n++)
        if (size[n].value < size[n].low || size[n].value > size[n].high)
            return fail(error, SPARGE_ERR_ARGUMENT, "%s is %lld, it must be %s %lld", size[n].name,
                        (long long)size[n].value,
                        size[n].value < size[n].low ? "at least" : "at most",
                        (long long)(size[n].value < size[n].low ? size[n].low : size[n].high));
    if (p->heads % p->kv_heads != 0)
        return fail(error, SPARGE_ERR_SHAPE,
                    "heads is %lld, it must be a multiple of kv_heads, %lld", (long long)p->heads,
                    (long long)p->kv_heads);
    const int64_t widest = needs_v && p->dim_v > p->dim ? p->dim_v : p->dim;
    /* What is allocated is for at least one batch and one block, even where there are no tokens. */
    const int64_t batch = sparge_max(1, p->batch);
    if (!fits(batch, p->heads, sparge_max(SPARGE_MAX_BLOCK, p->q_len), widest, 8) ||
        !fits(batch, p->kv_heads, sparge_max(SPARGE_MAX_BLOCK, p->k_len), widest, 8))
        return fail(error, SPARGE_ERR_SHAPE,
                    "batch %lld x heads %lld x tokens %lld and %lld x channels %lld overflows",
                    (long long)p->batch, (long long)p->heads, (long long)p->q_len,
                    (long long)p->k_len, (long long)widest);
    sparge_status status =
        check_view("q", p->q.data, p->q.dtype, p->batch == 0 || p->q_len == 0, error);
    if (!status)
        status = check_view("k", p->k.data, p->k.dtype, p->batch == 0 || p->k_len == 0, error);
    if (!status && needs_v)
        status = check_view("v", p->v.data, p->v.dtype, p->batch == 0 || p->k_len == 0, error);
    return status;
}

static sparge_status check_options(const sparge_problem *p, const sparge_options *o,
                                   sparge_error *error)
{
    const struct {
        const char *name;
        int64_t value, low, high;
    } number[] = {
        {"backend", (int64_t)o->backend, SPARGE_AUTO, SPARGE_CUDA},
        {"isa", (int64_t)o->isa, SPARGE_ISA_AUTO, SPARGE_ISA_AVX512VNNI},
        {"threads", o->threads, 0, SPARGE_MAX_THREADS},
        {"block_q", o->block_q, 1, SPARGE_MAX_BLOCK},
        {"block_k", o->block_k, 1, SPARGE_MAX_BLOCK},
        {"skip_rows", o->skip_rows, 0, INT64_MAX},
        {"causal", (int64_t)o->causal, SPARGE_CAUSAL_NONE, SPARGE_CAUSAL_START},
        {"rules", (int64_t)o->rules, SPARGE_RULES_DEFAULT, SPARGE_RULES_UPSTREAM},
        {"kernel", o->cuda.kernel, 0, SPARGE_KERNELS},
    };
    for (size_t n = 0; n < sizeof number / sizeof *number; n++)
        if (number[n].value < number[n].low || number[n].value > number[n].high)
            return fail(error, SPARGE_ERR_ARGUMENT, "%s is %lld, it must be in [%lld, %lld]",
                        number[n].name, (long long)number[n].value, (long long)number[n].low,
                        (long long)number[n].high);
    const bool qk =
        o->qk_dtype == SPARGE_INT8 || o->qk_dtype == SPARGE_INT12 || o->qk_dtype == SPARGE_F32;
    if (!qk)
        return fail(error, SPARGE_ERR_ARGUMENT,
                    "qk_dtype is %s (%d), it must be int8, int12 or f32",
                    sparge_dtype_string(o->qk_dtype), (int)o->qk_dtype);
    if ((unsigned)o->pv_dtype > SPARGE_FASTEST || o->pv_dtype == SPARGE_BF16)
        return fail(error, SPARGE_ERR_ARGUMENT,
                    "pv_dtype is %s (%d), it must be int8, int12, f32, f16, fp8 or fastest",
                    sparge_dtype_string(o->pv_dtype), (int)o->pv_dtype);
    if (!(o->softmax_scale >= 0.0f && o->softmax_scale < INFINITY))
        return fail(error, SPARGE_ERR_ARGUMENT,
                    "softmax_scale is %g, it must be finite and positive (or 0 for 1/sqrt(dim))",
                    (double)o->softmax_scale);
    if (o->pv_dtype == SPARGE_INT12 && o->block_k > 128)
        return fail(
            error, SPARGE_ERR_ARGUMENT,
            "block_k is %lld, with pv_dtype int12 it must be at most 128 for sums to fit int32",
            (long long)o->block_k);
    sparge_status status = o->per_head ? SPARGE_OK : check_thresholds(&o->thresholds, -1, error);
    for (int64_t h = 0; o->per_head && h < p->heads && !status; h++)
        status = check_thresholds(&o->per_head[h], h, error);
    return status;
}

static sparge_status check_mask(const sparge_mask *mask, const sparge_problem *p,
                                const sparge_options *o, sparge_error *error)
{
    const sparge_geometry g =
        sparge_geometry_make(p->q_len, p->k_len, o->block_q, o->block_k, SPARGE_CAUSAL_NONE);
    if (mask->batch != p->batch || mask->heads != p->heads || mask->q_blocks != g.q_blocks ||
        mask->k_blocks != g.k_blocks)
        return fail(error, SPARGE_ERR_SHAPE,
                    "mask is [%lld, %lld, %lld, %lld], it must be [%lld, %lld, %lld, %lld]",
                    (long long)mask->batch, (long long)mask->heads, (long long)mask->q_blocks,
                    (long long)mask->k_blocks, (long long)p->batch, (long long)p->heads,
                    (long long)g.q_blocks, (long long)g.k_blocks);
    if (mask->words < sparge_mask_row_words(g.k_blocks))
        return fail(error, SPARGE_ERR_SHAPE, "mask.words is %lld, %lld blocks need at least %lld",
                    (long long)mask->words, (long long)g.k_blocks,
                    (long long)sparge_mask_row_words(g.k_blocks));
    if (!mask->bits)
        return fail(error, SPARGE_ERR_ARGUMENT, "mask.bits is NULL");
    return SPARGE_OK;
}

/* Patch versions leave the structs of sparge*.h as they are. */
static bool same_version(int a, int b) { return a / 100 == b / 100; }

static sparge_status check_version(const sparge_options *o, sparge_error *error)
{
    const int v = o->version;
    return same_version(v, SPARGE_VERSION_NUMBER)
               ? SPARGE_OK
               : fail(error, SPARGE_ERR_ARGUMENT,
                      "options.version is %d (%d.%d.%d), this library is %s: fill options in by "
                      "sparge_options_default, and compile with the sparge.h of this library",
                      v, v / 10000, v / 100 % 100, v % 100, SPARGE_VERSION);
}

/* Everything that is common to all entries; a mask of NULL is dense. */
static sparge_status check(const sparge_problem *p, const sparge_options *o, bool needs_v,
                           const sparge_mask *mask, sparge_error *error)
{
    if (!p || !o)
        return fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL", p ? "options" : "problem");
    sparge_status status = check_version(o, error);
    if (!status)
        status = check_problem(p, needs_v, error);
    if (!status)
        status = check_options(p, o, error);
    if (!status && mask)
        status = check_mask(mask, p, o, error);
    return status ? status : succeed(error);
}

static sparge_status check_result(const sparge_problem *p, const sparge_result *result,
                                  sparge_error *error)
{
    if (!result)
        return fail(error, SPARGE_ERR_ARGUMENT, "result is NULL");
    return check_view("result.o", result->o.data, result->o.dtype, p->batch == 0 || p->q_len == 0,
                      error);
}

/* ---- Options ---- */

void sparge_options_init(sparge_options *options, size_t size, int version, sparge_rules rules)
{
    if (size != sizeof *options || !same_version(version, SPARGE_VERSION_NUMBER)) {
        /* The caller's struct is another one, but it begins with the version too. */
        memset(options, 0, size);
        options->version = same_version(version, SPARGE_VERSION_NUMBER) ? 0 : version;
        return;
    }
    *options = (sparge_options){
        .version = version,
        .qk_dtype = SPARGE_INT8,
        .pv_dtype = SPARGE_INT8,
        .block_q = 128,
        .block_k = 64,
        .smooth_k = true,
        .rules = rules,
        .thresholds = {.theta = 0.6f,
                       .tau = 0.98f,
                       .topk = SPARGE_OFF,
                       /* upstream's pvthreshd of 50, in its log2 units */
                       .lambda =
                           rules == SPARGE_RULES_UPSTREAM ? -50.0f / SPARGE_LOG2E : -INFINITY},
    };
}

/* The instruction set that SPARGE_ISA names, or the best one. */
static sparge_status isa_of_environment(sparge_isa *isa, sparge_error *error)
{
    const char *name = getenv("SPARGE_ISA");
    *isa = sparge_cpu_best();
    if (!name || !*name || strcmp(name, sparge_isa_string(SPARGE_ISA_AUTO)) == 0)
        return SPARGE_OK;
    for (*isa = SPARGE_ISA_SCALAR; *isa <= SPARGE_ISA_AVX512VNNI; ++*isa)
        if (strcmp(name, sparge_isa_string(*isa)) == 0)
            return SPARGE_OK;
    return fail(error, SPARGE_ERR_ARGUMENT, "SPARGE_ISA is '%.40s', which is no instruction set",
                name);
}

static sparge_status resolve_cpu(sparge_options *o, sparge_error *error)
{
    if (o->pv_dtype == SPARGE_F16 || o->pv_dtype == SPARGE_FP8)
        return fail(error, SPARGE_ERR_UNSUPPORTED,
                    "pv_dtype is %s, which the cpu backend does not have, but ref has",
                    sparge_dtype_string(o->pv_dtype));
    const bool named = o->isa != SPARGE_ISA_AUTO;
    const sparge_status status = named ? SPARGE_OK : isa_of_environment(&o->isa, error);
    if (status)
        return status;
    if (!sparge_cpu_has(o->isa)) {
        char have[64] = "";
        for (sparge_isa isa = SPARGE_ISA_SCALAR; isa <= SPARGE_ISA_AVX512VNNI; isa++)
            if (sparge_cpu_has(isa))
                snprintf(have + strlen(have), sizeof have - strlen(have), "%s%s", *have ? ", " : "",
                         sparge_isa_string(isa));
        return fail(error, SPARGE_ERR_UNSUPPORTED,
                    "%s is %s, which this processor lacks: it has %s", named ? "isa" : "SPARGE_ISA",
                    sparge_isa_string(o->isa), have);
    }
    if (o->threads == 0)
        o->threads = (int)sparge_min(SPARGE_MAX_THREADS, sparge_cpu_threads());
    if (!sparge_cpu_can_start(o->threads))
        return fail(error, SPARGE_ERR_MEMORY,
                    "threads is %d, more than the system lets this process start", o->threads);
    return SPARGE_OK;
}

/* Fills in what 0 and FASTEST stand for, and names a backend that can do what is asked. AUTO is
 * never cuda: whether a pointer is the host's or the device's, CUDA alone could tell. */
static sparge_status resolve(const sparge_problem *p, sparge_options *o, sparge_error *error)
{
    if (o->softmax_scale == 0.0f)
        o->softmax_scale = 1.0f / sqrtf((float)p->dim);
    if (o->skip_rows == 0)
        o->skip_rows = o->rules == SPARGE_RULES_DEFAULT ? 64
                       : o->rules == SPARGE_RULES_PAPER ? sparge_ceil_div(o->block_q, 4)
                                                        : o->block_q;
    o->skip_rows = sparge_min(o->skip_rows, o->block_q);
    const bool wants_isa = o->isa != SPARGE_ISA_AUTO && o->isa != SPARGE_ISA_SCALAR;
    if (wants_isa && o->backend != SPARGE_AUTO && o->backend != SPARGE_CPU)
        return fail(error, SPARGE_ERR_ARGUMENT, "isa is %s, which the %s backend does not have",
                    sparge_isa_string(o->isa), sparge_backend_string(o->backend));
    if (o->cuda.kernel && o->backend != SPARGE_CUDA)
        return fail(error, SPARGE_ERR_ARGUMENT,
                    "kernel is %d, which is of the cuda backend: backend is %s", o->cuda.kernel,
                    sparge_backend_string(o->backend));
    const bool on_cpu =
        o->rules == SPARGE_RULES_DEFAULT && o->pv_dtype != SPARGE_F16 && o->pv_dtype != SPARGE_FP8;
    if (o->backend == SPARGE_AUTO)
        o->backend = wants_isa || on_cpu ? SPARGE_CPU : SPARGE_REF;
    if (!sparge_backend_built(o->backend))
        return fail(error, SPARGE_ERR_UNSUPPORTED,
                    "backend is %s, which this library was built without",
                    sparge_backend_string(o->backend));
    if (o->rules != SPARGE_RULES_DEFAULT && o->backend != SPARGE_REF)
        return fail(error, SPARGE_ERR_UNSUPPORTED,
                    "rules are not the default ones, which the ref backend alone has");
    if (o->pv_dtype == SPARGE_FASTEST && o->backend != SPARGE_CUDA)
        o->pv_dtype = SPARGE_INT8;
    if (o->backend == SPARGE_CPU)
        return resolve_cpu(o, error);
    o->isa = SPARGE_ISA_SCALAR;
    o->threads = 1;
    return o->backend == SPARGE_CUDA ? told(sparge_cuda_resolve(p, o, error), error) : SPARGE_OK;
}

static sparge_status resolve_all(const sparge_problem *problem, sparge_options *options,
                                 sparge_error *error)
{
    sparge_status status = check(problem, options, false, NULL, error);
    if (status)
        return status;
    sparge_options o = *options;
    status = resolve(problem, &o, error);
    if (!status)
        *options = o;
    return status;
}

/* ---- Masks ---- */

/* A mask of the problem's shape without bits. */
static sparge_status shape_mask(sparge_mask *mask, const sparge_problem *p, const sparge_options *o,
                                sparge_error *error)
{
    const sparge_geometry g =
        sparge_geometry_make(p->q_len, p->k_len, o->block_q, o->block_k, SPARGE_CAUSAL_NONE);
    const int64_t words = sparge_mask_row_words(g.k_blocks);
    if (!fits(p->batch, p->heads, g.q_blocks, words, sizeof *mask->bits))
        return fail(error, SPARGE_ERR_SHAPE, "mask of %lld x %lld blocks a head overflows",
                    (long long)g.q_blocks, (long long)g.k_blocks);
    *mask = (sparge_mask){NULL, p->batch, p->heads, g.q_blocks, g.k_blocks, words};
    return SPARGE_OK;
}

sparge_status sparge_mask_alloc(sparge_mask *mask, const sparge_problem *problem,
                                const sparge_options *options, sparge_error *error)
{
    if (!mask)
        return fail(error, SPARGE_ERR_ARGUMENT, "mask is NULL");
    *mask = (sparge_mask){0};
    sparge_mask shape;
    sparge_status status = check(problem, options, false, NULL, error);
    if (!status)
        status = shape_mask(&shape, problem, options, error);
    if (status)
        return status;
    const int64_t total = shape.batch * shape.heads * shape.q_blocks * shape.words;
    shape.bits = calloc(total ? (size_t)total : 1, sizeof *shape.bits);
    if (!shape.bits)
        return fail(error, SPARGE_ERR_MEMORY, "out of memory");
    *mask = shape;
    return succeed(error);
}

void sparge_mask_free(sparge_mask *mask)
{
    if (mask) {
        free(mask->bits);
        *mask = (sparge_mask){0};
    }
}

static uint32_t *mask_row(const sparge_mask *mask, int64_t batch, int64_t head, int64_t i)
{
    return mask->bits + ((batch * mask->heads + head) * mask->q_blocks + i) * mask->words;
}

bool sparge_mask_get(const sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j)
{
    return sparge_mask_row_get(mask_row(mask, batch, head, i), j);
}

void sparge_mask_set(sparge_mask *mask, int64_t batch, int64_t head, int64_t i, int64_t j,
                     bool keep)
{
    uint32_t *row = mask_row(mask, batch, head, i);
    if (keep)
        sparge_mask_row_set(row, j);
    else
        sparge_mask_row_clear(row, j);
}

/* ---- Counts ---- */

double sparge_sparsity_qk(const sparge_counts *c)
{
    return c->pairs ? 1.0 - (double)c->qk_done / (double)c->pairs : 0.0;
}

double sparge_sparsity_pv(const sparge_counts *c)
{
    return c->pairs ? 1.0 - c->pv_done / (double)c->pairs : 0.0;
}

double sparge_sparsity(const sparge_counts *c)
{
    return (sparge_sparsity_qk(c) + sparge_sparsity_pv(c)) / 2.0;
}

static sparge_counts sum_of(const sparge_counts *head, int64_t n)
{
    sparge_counts sum = {0};
    for (int64_t h = 0; h < n; h++) {
        sum.pairs += head[h].pairs;
        sum.qk_done += head[h].qk_done;
        sum.pv_done += head[h].pv_done;
        sum.tokens += head[h].tokens;
        sum.qk_tokens += head[h].qk_tokens;
        sum.pv_tokens += head[h].pv_tokens;
    }
    return sum;
}

/* ---- The two stages, and both ---- */

static sparge_status predict(const sparge_problem *problem, const sparge_options *options,
                             sparge_mask *mask, const sparge_intermediates *intermediates,
                             sparge_error *error)
{
    if (!mask)
        return fail(error, SPARGE_ERR_ARGUMENT, "mask is NULL");
    sparge_status status = check(problem, options, false, mask, error);
    if (status)
        return status;
    sparge_options o = *options;
    status = resolve(problem, &o, error);
    if (!intermediates)
        intermediates = &no_intermediates;
    if (!status)
        status = o.backend == SPARGE_CUDA
                     ? sparge_cuda_predict(problem, &o, mask, intermediates, error)
                     : stages[o.backend].predict(problem, &o, mask, intermediates);
    return told(status, error);
}

/* On the host every head's counts are there, for their sum. */
static sparge_status run_on_host(const sparge_problem *p, const sparge_options *o,
                                 sparge_mask *predicted, const sparge_mask *mask,
                                 sparge_result *now)
{
    const int64_t heads = p->batch * p->heads;
    sparge_counts *own = NULL;
    if (!now->head_counts)
        now->head_counts = own = malloc(heads ? (size_t)heads * sizeof *own : 1);
    if (!now->head_counts)
        return SPARGE_ERR_MEMORY;
    memset(now->head_counts, 0, (size_t)heads * sizeof *now->head_counts);
    const sparge_status status = predicted ? stages[o->backend].attention(p, o, predicted, now)
                                           : stages[o->backend].attend(p, o, mask, now);
    now->counts = sum_of(now->head_counts, heads);
    free(own);
    return status;
}

/* Stage 2 over `mask`, or both stages where there is one to predict. */
static sparge_status run(const sparge_problem *problem, const sparge_options *options,
                         sparge_mask *predicted, const sparge_mask *mask, sparge_result *result,
                         sparge_error *error)
{
    sparge_options o = *options;
    sparge_status status = resolve(problem, &o, error);
    if (status)
        return status;
    sparge_result now = {
        .o = result->o,
        .lse = result->lse,
        .mask = result->mask,
        .head_counts = result->head_counts,
        .intermediates = result->intermediates ? result->intermediates : &no_intermediates,
        .backend = o.backend,
        .isa = o.isa,
        .threads = o.threads,
        .kernel = o.cuda.kernel,
        .pv_dtype = o.pv_dtype,
    };
    if (o.backend != SPARGE_CUDA)
        status = run_on_host(problem, &o, predicted, mask, &now);
    else if (predicted)
        status = sparge_cuda_attention(problem, &o, predicted, &now, error);
    else
        status = sparge_cuda_attend(problem, &o, mask, &now, error);
    now.intermediates = result->intermediates;
    now.head_counts = result->head_counts;
    *result = now;
    return told(status, error);
}

static sparge_status attend(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_result *result, sparge_error *error)
{
    sparge_status status = check(problem, options, true, mask, error);
    if (!status)
        status = check_result(problem, result, error);
    return status ? status : run(problem, options, NULL, mask, result, error);
}

static sparge_status attention(const sparge_problem *problem, const sparge_options *options,
                               sparge_result *result, sparge_error *error)
{
    sparge_status status = check(problem, options, true, result ? result->mask : NULL, error);
    if (!status)
        status = check_result(problem, result, error);
    if (status)
        return status;
    sparge_mask own = {0};
    if (!result->mask && options->backend == SPARGE_CUDA) /* its bits stand in the workspace */
        status = shape_mask(&own, problem, options, error);
    else if (!result->mask)
        status = sparge_mask_alloc(&own, problem, options, error);
    if (!status)
        status = run(problem, options, result->mask ? result->mask : &own, NULL, result, error);
    sparge_mask_free(&own);
    return status;
}

/* ---- Tuning ---- */

static sparge_status check_tuning(const sparge_tune_options *how, int64_t count,
                                  sparge_error *error)
{
    if (how->sparsity != 0.0 && !(how->sparsity > 0.0 && how->sparsity < 1.0))
        return fail(error, SPARGE_ERR_ARGUMENT, "sparsity is %g, it must be in (0, 1), or 0",
                    how->sparsity);
    if (how->sparsity == 0.0 && !(how->l1 > 0.0 && how->l1 < how->l2 && how->l2 < (double)INFINITY))
        return fail(error, SPARGE_ERR_ARGUMENT,
                    "l1 is %g and l2 is %g, it must be that 0 < l1 < l2", how->l1, how->l2);
    if (how->held_out < 0 || how->held_out >= count)
        return fail(error, SPARGE_ERR_ARGUMENT,
                    "held_out is %lld of %lld inputs, it must leave one to tune on",
                    (long long)how->held_out, (long long)count);
    if (!(how->seconds >= 0.0))
        return fail(error, SPARGE_ERR_ARGUMENT, "seconds is %g, it must be at least 0",
                    how->seconds);
    return SPARGE_OK;
}

/* Input n, beside the first one. */
static sparge_status check_input(const sparge_problem *inputs, int64_t n, const sparge_options *o,
                                 sparge_error *error)
{
    const sparge_problem *p = &inputs[n], *first = &inputs[0];
    if (p->batch == 0 || p->q_len == 0 || p->k_len == 0)
        return fail(error, SPARGE_ERR_SHAPE,
                    "input %lld is empty: batch %lld, q_len %lld, k_len %lld", (long long)n,
                    (long long)p->batch, (long long)p->q_len, (long long)p->k_len);
    if (p->heads != first->heads || p->kv_heads != first->kv_heads || p->dim != first->dim ||
        p->dim_v != first->dim_v)
        return fail(error, SPARGE_ERR_SHAPE,
                    "input %lld has %lld heads, %lld key heads and %lld and %lld channels, input 0 "
                    "has %lld, "
                    "%lld, %lld and %lld",
                    (long long)n, (long long)p->heads, (long long)p->kv_heads, (long long)p->dim,
                    (long long)p->dim_v, (long long)first->heads, (long long)first->kv_heads,
                    (long long)first->dim, (long long)first->dim_v);
    if (o->causal == SPARGE_CAUSAL_START && p->q_len > p->k_len)
        return fail(error, SPARGE_ERR_UNSUPPORTED,
                    "input %lld has more queries, %lld, than keys, %lld, under START", (long long)n,
                    (long long)p->q_len, (long long)p->k_len);
    return SPARGE_OK;
}

static sparge_status tune(const sparge_problem *inputs, int64_t count,
                          const sparge_options *options, const sparge_tune_options *how,
                          sparge_tuned *heads, sparge_error *error)
{
    if (!inputs || !options || !how || !heads)
        return fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL",
                    !inputs    ? "inputs"
                    : !options ? "options"
                    : !how     ? "how"
                               : "heads");
    if (count < 1)
        return fail(error, SPARGE_ERR_ARGUMENT, "count is %lld, there must be an input",
                    (long long)count);
    sparge_options o = *options;
    o.per_head = NULL;
    o.thresholds = sparge_options_default(SPARGE_RULES_DEFAULT).thresholds;
    sparge_status status = SPARGE_OK;
    for (int64_t n = 0; n < count && !status; n++) {
        status = check(&inputs[n], &o, true, NULL, error);
        if (!status)
            status = check_input(inputs, n, &o, error);
    }
    if (!status)
        status = check_tuning(how, count, error);
    if (!status && o.rules != SPARGE_RULES_DEFAULT)
        status = fail(error, SPARGE_ERR_UNSUPPORTED,
                      "rules are not the default ones, which alone are tuned");
    if (!status)
        status = resolve(&inputs[0], &o, error);
    if (!status)
        status = sparge_tune_heads(inputs, count, &o, how, heads, error);
    return told(status, error);
}

/* ---- Devices ---- */

sparge_status sparge_workspace_bytes(const sparge_problem *problem, const sparge_options *options,
                                     bool lse, int64_t *bytes, sparge_error *error)
{
    if (!bytes)
        return fail(error, SPARGE_ERR_ARGUMENT, "bytes is NULL");
    sparge_problem sized = {0};
    if (problem) { /* sizes alone: any pointer will do */
        sized = *problem;
        sized.q.data = sized.k.data = sized.v.data = &sized;
    }
    sparge_mask shape;
    sparge_status status = check(problem ? &sized : NULL, options, true, NULL, error);
    if (!status)
        status = shape_mask(&shape, problem, options, error);
    if (status)
        return status;
    sparge_options o = *options;
    o.backend = SPARGE_CUDA;
    status = resolve(problem, &o, error);
    if (!status)
        status = sparge_cuda_workspace(problem, &o, lse, bytes, error);
    return told(status, error);
}

sparge_status sparge_device_alloc(int64_t bytes, void **data, sparge_error *error)
{
    if (!data)
        return fail(error, SPARGE_ERR_ARGUMENT, "data is NULL");
    *data = NULL;
    if (bytes < 0)
        return fail(error, SPARGE_ERR_ARGUMENT, "bytes is %lld, it must be at least 0",
                    (long long)bytes);
    succeed(error);
    return told(sparge_cuda_alloc(bytes, data, error), error);
}

void sparge_device_free(void *data)
{
    if (data)
        sparge_cuda_free(data);
}

sparge_status sparge_device_copy(void *to, const void *from, int64_t bytes, sparge_error *error)
{
    if (bytes < 0)
        return fail(error, SPARGE_ERR_ARGUMENT, "bytes is %lld, it must be at least 0",
                    (long long)bytes);
    if (bytes > 0 && (!to || !from))
        return fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL", to ? "from" : "to");
    succeed(error);
    return told(sparge_cuda_copy(to, from, bytes, error), error);
}

/* ---- Ceilings ---- */

/* The instruction set and the threads that a measurement runs with. */
static sparge_status resolve_measurement(sparge_isa isa, int threads, sparge_options *o,
                                         sparge_error *error)
{
    *o = sparge_options_default(SPARGE_RULES_DEFAULT);
    o->isa = isa;
    o->threads = threads;
    const sparge_problem nothing = {.heads = 1, .kv_heads = 1, .dim = 1, .dim_v = 1};
    const sparge_status status = check(&nothing, o, false, NULL, error);
    return status ? status : resolve_cpu(o, error);
}

sparge_status sparge_measure_peaks(sparge_isa isa, int threads, sparge_peaks *peaks,
                                   sparge_error *error)
{
    sparge_options o;
    if (!peaks)
        return fail(error, SPARGE_ERR_ARGUMENT, "peaks is NULL");
    const sparge_status status = resolve_measurement(isa, threads, &o, error);
    if (!status)
        *peaks = sparge_cpu_peaks(o.isa, o.threads);
    return status;
}

sparge_status sparge_measure_bandwidth(sparge_isa isa, int threads, double *bytes,
                                       sparge_error *error)
{
    sparge_options o;
    if (!bytes)
        return fail(error, SPARGE_ERR_ARGUMENT, "bytes is NULL");
    sparge_status status = resolve_measurement(isa, threads, &o, error);
    if (!status)
        status = sparge_cpu_bandwidth(o.isa, o.threads, bytes);
    return told(status, error);
}

static sparge_status oracle(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_oracle_mode mode, double *o,
                            double *lse, double *block_mass, sparge_error *error)
{
    if ((unsigned)mode > SPARGE_ORACLE_CODES)
        return fail(error, SPARGE_ERR_ARGUMENT, "mode is %d, it must be one of sparge_oracle_mode",
                    (int)mode);
    sparge_status status = check(problem, options, o != NULL, mask, error);
    if (!status)
        status = sparge_ref_oracle(problem, options, mask, mode, o, lse, block_mass);
    return told(status, error);
}

/* ---- The calls, in arithmetic of their own ---- */

sparge_status sparge_options_resolve(const sparge_problem *problem, sparge_options *options,
                                     sparge_error *error)
{
    const fenv_t caller = sparge_arithmetic_begin();
    const sparge_status status = resolve_all(problem, options, error);
    sparge_arithmetic_end(caller);
    return status;
}

sparge_status sparge_predict(const sparge_problem *problem, const sparge_options *options,
                             sparge_mask *mask, const sparge_intermediates *intermediates,
                             sparge_error *error)
{
    const fenv_t caller = sparge_arithmetic_begin();
    const sparge_status status = predict(problem, options, mask, intermediates, error);
    sparge_arithmetic_end(caller);
    return status;
}

sparge_status sparge_attend(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_result *result, sparge_error *error)
{
    const fenv_t caller = sparge_arithmetic_begin();
    const sparge_status status = attend(problem, options, mask, result, error);
    sparge_arithmetic_end(caller);
    return status;
}

sparge_status sparge_attention(const sparge_problem *problem, const sparge_options *options,
                               sparge_result *result, sparge_error *error)
{
    const fenv_t caller = sparge_arithmetic_begin();
    const sparge_status status = attention(problem, options, result, error);
    sparge_arithmetic_end(caller);
    return status;
}

sparge_status sparge_tune(const sparge_problem *inputs, int64_t count,
                          const sparge_options *options, const sparge_tune_options *how,
                          sparge_tuned *heads, sparge_error *error)
{
    const fenv_t caller = sparge_arithmetic_begin();
    const sparge_status status = tune(inputs, count, options, how, heads, error);
    sparge_arithmetic_end(caller);
    return status;
}

sparge_status sparge_oracle(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_oracle_mode mode, double *o,
                            double *lse, double *block_mass, sparge_error *error)
{
    const fenv_t caller = sparge_arithmetic_begin();
    const sparge_status status = oracle(problem, options, mask, mode, o, lse, block_mass, error);
    sparge_arithmetic_end(caller);
    return status;
}
