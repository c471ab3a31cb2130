/* SPDX-License-Identifier: Apache-2.0 */
/* check.c: every argument checked once. */
#include "api/api.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/block_mask.h"
#include "common/geometry.h"
#include "common/select.h"

/* Can a * b * c * d things of this size be counted in bytes? */
bool sparge_fits(int64_t a, int64_t b, int64_t c, int64_t d, size_t size)
{
    int64_t n;
    return !__builtin_mul_overflow(a, b, &n) && !__builtin_mul_overflow(n, c, &n) &&
           !__builtin_mul_overflow(n, d, &n) && !__builtin_mul_overflow(n, (int64_t)size, &n);
}

static const struct range {
    const char *name;
    double low, high;
} ranges[] = {
    {"theta", -1.0, 1.0},
    {"tau", 0.0, 1.0},
    {"topk", 0.0, 1.0},
    {"lambda", -(double)INFINITY, 0.0},
    {"min_mass", 0.0, (double)FLT_MAX},
    {"softmax_scale", (double)FLT_MIN, (double)FLT_MAX},
    {"threads", 0, SPARGE_MAX_THREADS},
    {"block_q", 1, SPARGE_MAX_BLOCK},
    {"block_k", 1, SPARGE_MAX_BLOCK},
    {"cell", 0, SPARGE_MAX_BLOCK},
    {"skip_rows", 0, 0x1p63},
    {"kernel", 0, SPARGE_KERNELS},
    {"dim", 1, SPARGE_MAX_DIM},
};

bool sparge_range(const char *name, double *low, double *high)
{
    for (size_t n = 0; name && n < sizeof ranges / sizeof *ranges; n++)
        if (strcmp(ranges[n].name, name) == 0) {
            *low = ranges[n].low;
            *high = ranges[n].high;
            return true;
        }
    return false;
}

/* head: of per_head, or -1 for the thresholds of all. NaN fails every comparison. */
static sparge_status check_thresholds(const sparge_thresholds *k, int64_t head, sparge_error *error)
{
    const struct {
        const char *name;
        float value;
        bool may_be_off;
    } threshold[] = {
        {"theta", k->theta, false},       {"tau", k->tau, true},
        {"topk", k->topk, true},          {"lambda", k->lambda, false},
        {"min_mass", k->min_mass, false},
    };
    char where[64] = "";
    if (head >= 0)
        snprintf(where, sizeof where, " in per_head[%lld]", (long long)head);
    for (size_t n = 0; n < sizeof threshold / sizeof *threshold; n++) {
        const double x = (double)threshold[n].value;
        double low = 0.0, high = 0.0;
        sparge_range(threshold[n].name, &low, &high);
        if (!(x >= low && x <= high) && !(threshold[n].may_be_off && x == (double)SPARGE_OFF))
            return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is %.9g%s, it must be in [%g, %g]%s",
                               threshold[n].name, x, where, low, high,
                               threshold[n].may_be_off ? " or SPARGE_OFF" : "");
    }
    if (k->tau == SPARGE_OFF && k->topk == SPARGE_OFF && k->min_mass == 0.0f)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "tau, topk and min_mass are all off%s",
                           where);
    return SPARGE_OK;
}

static sparge_status check_view(const char *name, const void *data, sparge_dtype dtype, bool empty,
                                sparge_error *error)
{
    if (!data && !empty)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s.data is NULL", name);
    if ((unsigned)dtype > SPARGE_BF16)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "%s.dtype is %d, it must be one of sparge_dtype", name, (int)dtype);
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
            return sparge_fail(
                error, SPARGE_ERR_ARGUMENT, "%s is %lld, it must be %s %lld", size[n].name,
                (long long)size[n].value, size[n].value < size[n].low ? "at least" : "at most",
                (long long)(size[n].value < size[n].low ? size[n].low : size[n].high));
    if (p->heads % p->kv_heads != 0)
        return sparge_fail(error, SPARGE_ERR_SHAPE,
                           "heads is %lld, it must be a multiple of kv_heads, %lld",
                           (long long)p->heads, (long long)p->kv_heads);
    const int64_t widest = needs_v && p->dim_v > p->dim ? p->dim_v : p->dim;
    /* What is allocated is for at least one batch and one block, even where there are no tokens. */
    const int64_t batch = sparge_max(1, p->batch);
    if (!sparge_fits(batch, p->heads, sparge_max(SPARGE_MAX_BLOCK, p->q_len), widest, 8) ||
        !sparge_fits(batch, p->kv_heads, sparge_max(SPARGE_MAX_BLOCK, p->k_len), widest, 8))
        return sparge_fail(
            error, SPARGE_ERR_SHAPE,
            "batch %lld x heads %lld x tokens %lld and %lld x channels %lld overflows",
            (long long)p->batch, (long long)p->heads, (long long)p->q_len, (long long)p->k_len,
            (long long)widest);
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
        int64_t value, most; /* of an enum, which has no range by name */
    } number[] = {
        {"backend", (int64_t)o->backend, SPARGE_CUDA},
        {"isa", (int64_t)o->isa, SPARGE_ISAS - 1},
        {"threads", o->threads, 0},
        {"block_q", o->block_q, 0},
        {"block_k", o->block_k, 0},
        {"cell", o->cell, 0},
        {"skip_rows", o->skip_rows, 0},
        {"causal", (int64_t)o->causal, SPARGE_CAUSAL_START},
        {"rules", (int64_t)o->rules, SPARGE_RULES_UPSTREAM},
        {"kernel", o->cuda.kernel, 0},
    };
    for (size_t n = 0; n < sizeof number / sizeof *number; n++) {
        double low = 0.0, high = (double)number[n].most;
        sparge_range(number[n].name, &low, &high);
        if ((double)number[n].value < low || (double)number[n].value > high)
            return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is %lld, it must be in [%.0f, %.0f]",
                               number[n].name, (long long)number[n].value, low, high);
    }
    const bool qk = o->qk_dtype == SPARGE_INT8 || o->qk_dtype == SPARGE_INT12 ||
                    o->qk_dtype == SPARGE_F32 || o->qk_dtype == SPARGE_BF16;
    if (!qk)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "qk_dtype is %s (%d), it must be int8, int12, f32 or bf16",
                           sparge_dtype_string(o->qk_dtype), (int)o->qk_dtype);
    if ((unsigned)o->pv_dtype > SPARGE_FASTEST)
        return sparge_fail(
            error, SPARGE_ERR_ARGUMENT,
            "pv_dtype is %s (%d), it must be int8, int12, f32, bf16, f16, fp8 or fastest",
            sparge_dtype_string(o->pv_dtype), (int)o->pv_dtype);
    double low = 0.0, high = 0.0;
    sparge_range("softmax_scale", &low, &high);
    if (!(o->softmax_scale >= 0.0f && (double)o->softmax_scale <= high))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "softmax_scale is %g, it must be in [%g, %g], or 0 for 1/sqrt(dim)",
                           (double)o->softmax_scale, low, high);
    if (o->pv_dtype == SPARGE_INT12 && o->block_k > 128)
        return sparge_fail(
            error, SPARGE_ERR_ARGUMENT,
            "block_k is %lld, with pv_dtype int12 it must be at most 128 for sums to fit int32",
            (long long)o->block_k);
    if (o->cell && (o->block_q % o->cell || o->block_k % o->cell ||
                    o->block_k / o->cell > SPARGE_CELLS_OF_BLOCK))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "cell is %lld, it must divide block_q, %lld, and block_k, %lld, and be "
                           "at least 1/%d of block_k, or be 0",
                           (long long)o->cell, (long long)o->block_q, (long long)o->block_k,
                           SPARGE_CELLS_OF_BLOCK);
    sparge_status status = o->per_head ? SPARGE_OK : check_thresholds(&o->thresholds, -1, error);
    for (int64_t h = 0; o->per_head && h < p->heads && !status; h++)
        status = check_thresholds(&o->per_head[h], h, error);
    return status;
}

static sparge_status check_mask(const sparge_mask *mask, const sparge_problem *p,
                                const sparge_options *o, sparge_error *error)
{
    const sparge_geometry g = sparge_geometry_of(p, o);
    if (mask->batch != p->batch || mask->heads != p->heads || mask->q_blocks != g.q_blocks ||
        mask->k_blocks != g.k_blocks)
        return sparge_fail(error, SPARGE_ERR_SHAPE,
                           "mask is [%lld, %lld, %lld, %lld], it must be [%lld, %lld, %lld, %lld]",
                           (long long)mask->batch, (long long)mask->heads,
                           (long long)mask->q_blocks, (long long)mask->k_blocks,
                           (long long)p->batch, (long long)p->heads, (long long)g.q_blocks,
                           (long long)g.k_blocks);
    if (mask->words < sparge_mask_row_words(g.k_blocks))
        return sparge_fail(error, SPARGE_ERR_SHAPE,
                           "mask.words is %lld, %lld blocks need at least %lld",
                           (long long)mask->words, (long long)g.k_blocks,
                           (long long)sparge_mask_row_words(g.k_blocks));
    if (!mask->bits)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "mask.bits is NULL");
    if (mask->partial_first && (!mask->partial_block || !mask->partial_bits))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "mask.%s is NULL beside partial_first",
                           mask->partial_block ? "partial_bits" : "partial_block");
    return SPARGE_OK;
}

/* The partly attended blocks of a mask in host memory: in order, once, and of kept blocks. */
sparge_status sparge_check_partials(const sparge_mask *mask, sparge_error *error)
{
    const int64_t lines = mask->batch * mask->heads * mask->q_blocks, *first = mask->partial_first;
    if (first && first[0] != 0)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "mask.partial_first[0] is %lld, not 0",
                           (long long)first[0]);
    for (int64_t n = 0; n < lines && first; n++) {
        const int64_t i = n % mask->q_blocks, head = n / mask->q_blocks;
        if (first[n + 1] < first[n])
            return sparge_fail(error, SPARGE_ERR_ARGUMENT, "mask.partial_first falls at %lld",
                               (long long)n);
        for (int64_t at = first[n]; at < first[n + 1]; at++) {
            const int64_t j = mask->partial_block[at];
            const char *wrong = j < 0 || j >= mask->k_blocks ? "is not in the mask"
                                : !sparge_mask_row_get(mask->bits + n * mask->words, j)
                                    ? "is attended in part and not kept"
                                : at > first[n] && j == mask->partial_block[at - 1]
                                    ? "is attended in part twice"
                                : at > first[n] && j < mask->partial_block[at - 1]
                                    ? "is attended in part after a later one"
                                    : NULL;
            if (wrong)
                return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                                   "block (%lld, %lld, %lld, %lld) of the mask %s",
                                   (long long)(head / mask->heads), (long long)(head % mask->heads),
                                   (long long)i, (long long)j, wrong);
        }
    }
    return SPARGE_OK;
}

/* Patch versions leave the structs of sparge*.h as they are. */
bool sparge_same_version(int a, int b) { return a / 100 == b / 100; }

static sparge_status check_version(const sparge_options *o, sparge_error *error)
{
    const int v = o->version;
    return sparge_same_version(v, SPARGE_VERSION_NUMBER)
               ? SPARGE_OK
               : sparge_fail(
                     error, SPARGE_ERR_ARGUMENT,
                     "options.version is %d (%d.%d.%d), this library is %s: fill options in by "
                     "sparge_options_default, and compile with the sparge.h of this library",
                     v, v / 10000, v / 100 % 100, v % 100, SPARGE_VERSION);
}

/* Everything that is common to all entries; a mask of NULL is dense. */
sparge_status sparge_check(const sparge_problem *p, const sparge_options *o, bool needs_v,
                           const sparge_mask *mask, sparge_error *error)
{
    if (!p || !o)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is NULL", p ? "options" : "problem");
    sparge_status status = check_version(o, error);
    if (!status)
        status = check_problem(p, needs_v, error);
    if (!status)
        status = check_options(p, o, error);
    if (!status && mask)
        status = check_mask(mask, p, o, error);
    return status ? status : sparge_succeed(error);
}

/* Part n of those that are merged. */
sparge_status sparge_check_part(const sparge_problem *p, const sparge_partial *part, int n,
                                sparge_error *error)
{
    char name[32];
    const bool empty = p->batch == 0 || p->q_len == 0;
    snprintf(name, sizeof name, "part[%d].o", n);
    if (!part->lse && !empty)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "part[%d].lse is NULL", n);
    if (!(part->log_count >= -FLT_MAX && part->log_count <= FLT_MAX))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "part[%d].log_count is %g, it must be finite", n,
                           (double)part->log_count);
    return check_view(name, part->o.data, part->o.dtype, empty, error);
}

sparge_status sparge_check_result(const sparge_problem *p, const sparge_result *result,
                                  sparge_error *error)
{
    if (!result)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "result is NULL");
    return check_view("result.o", result->o.data, result->o.dtype, p->batch == 0 || p->q_len == 0,
                      error);
}
