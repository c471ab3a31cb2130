/* SPDX-License-Identifier: Apache-2.0 */
/* options.c: the defaults, and what AUTO, 0 and FASTEST stand for. */
#include "api/api.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/bf16.h"
#include "common/geometry.h"
#include "common/num.h"
#include "cpu/cpu.h"
#include "gpu/gpu.h"

void sparge_options_init(sparge_options *options, size_t size, int version, sparge_rules rules)
{
    if (size != sizeof *options || !sparge_same_version(version, SPARGE_VERSION_NUMBER)) {
        /* The caller's struct is another one, but it begins with the version too. */
        memset(options, 0, size);
        options->version = sparge_same_version(version, SPARGE_VERSION_NUMBER) ? 0 : version;
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

/* The instruction set that SPARGE_ISA names, or AUTO. */
static sparge_status isa_of_environment(sparge_isa *isa, sparge_error *error)
{
    const char *name = getenv("SPARGE_ISA");
    *isa = SPARGE_ISA_AUTO;
    if (!name || !*name || strcmp(name, sparge_isa_string(SPARGE_ISA_AUTO)) == 0)
        return SPARGE_OK;
    for (*isa = SPARGE_ISA_SCALAR; *isa < SPARGE_ISAS; ++*isa)
        if (strcmp(name, sparge_isa_string(*isa)) == 0)
            return SPARGE_OK;
    return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                       "SPARGE_ISA is '%.40s', which is no instruction set", name);
}

/* Which of the two types the cpu backend lacks on this processor, or NULL. */
static const char *lacks_on_cpu(const sparge_options *o)
{
    if (sparge_uses_bf16(o) && sparge_cpu_best(true) == SPARGE_ISA_AUTO)
        return o->qk_dtype == SPARGE_BF16 ? "qk_dtype" : "pv_dtype";
    return o->pv_dtype == SPARGE_F16 || o->pv_dtype == SPARGE_FP8 ? "pv_dtype" : NULL;
}

static sparge_status lacks(const char *name, const sparge_options *o, sparge_error *error)
{
    return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                       "%s is %s, which the %s backend does not have here, but ref has", name,
                       sparge_dtype_string(*name == 'q' ? o->qk_dtype : o->pv_dtype),
                       sparge_backend_string(o->backend));
}

sparge_status sparge_resolve_cpu(sparge_options *o, sparge_error *error)
{
    const char *const lacking = lacks_on_cpu(o);
    if (lacking)
        return lacks(lacking, o, error);
    const bool named = o->isa != SPARGE_ISA_AUTO;
    const sparge_status status = named ? SPARGE_OK : isa_of_environment(&o->isa, error);
    if (status)
        return status;
    if (o->isa == SPARGE_ISA_AUTO)
        o->isa = sparge_cpu_best(sparge_uses_bf16(o));
    if (sparge_cpu_has(o->isa) && sparge_uses_bf16(o) && !sparge_cpu_has_bf16(o->isa))
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "%s is %s, which has no products of bf16 here; %s has",
                           named ? "isa" : "SPARGE_ISA", sparge_isa_string(o->isa),
                           sparge_isa_string(sparge_cpu_best(true)));
    if (!sparge_cpu_has(o->isa)) {
        char have[64] = "";
        for (sparge_isa isa = SPARGE_ISA_SCALAR; isa < SPARGE_ISAS; isa++)
            if (sparge_cpu_has(isa))
                snprintf(have + strlen(have), sizeof have - strlen(have), "%s%s", *have ? ", " : "",
                         sparge_isa_string(isa));
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED, "%s is %s, %s; here are %s",
                           named ? "isa" : "SPARGE_ISA", sparge_isa_string(o->isa),
                           sparge_cpu_lacks(o->isa), have);
    }
    if (o->threads == 0)
        o->threads = (int)sparge_min(SPARGE_MAX_THREADS, sparge_cpu_threads());
    if (!sparge_cpu_can_start(o->threads))
        return sparge_fail(error, SPARGE_ERR_MEMORY,
                           "threads is %d, more than the system lets this process start",
                           o->threads);
    return SPARGE_OK;
}

float sparge_softmax_scale(const sparge_problem *p, const sparge_options *o)
{
    return o->softmax_scale > 0.0f ? o->softmax_scale : 1.0f / sqrtf((float)p->dim);
}

/* Fills in what 0 and FASTEST stand for, and names a backend that can do what is asked. AUTO is
 * never cuda: whether a pointer is the host's or the device's, CUDA alone could tell. */
sparge_status sparge_resolve(const sparge_problem *p, sparge_options *o, const sparge_mask *mask,
                             sparge_error *error)
{
    o->softmax_scale = sparge_softmax_scale(p, o);
    if (o->skip_rows == 0)
        o->skip_rows = o->rules == SPARGE_RULES_DEFAULT ? 64
                       : o->rules == SPARGE_RULES_PAPER ? sparge_ceil_div(o->block_q, 4)
                                                        : o->block_q;
    o->skip_rows = sparge_min(o->skip_rows, o->block_q);
    const bool wants_isa = o->isa != SPARGE_ISA_AUTO && o->isa != SPARGE_ISA_SCALAR;
    const bool wants_order = sparge_uses_bf16(o) && o->backend == SPARGE_REF &&
                             (o->isa == SPARGE_ISA_AVX512VNNI || o->isa == SPARGE_ISA_AMX);
    if (wants_isa && !wants_order && o->backend != SPARGE_AUTO && o->backend != SPARGE_CPU)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "isa is %s, which the %s backend does not have",
                           sparge_isa_string(o->isa), sparge_backend_string(o->backend));
    if (o->cuda.kernel && o->backend != SPARGE_CUDA)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "kernel is %d, which is of the cuda backend: backend is %s",
                           o->cuda.kernel, sparge_backend_string(o->backend));
    const bool on_cpu = o->rules == SPARGE_RULES_DEFAULT && !lacks_on_cpu(o);
    if (o->backend == SPARGE_AUTO)
        o->backend = wants_isa || on_cpu ? SPARGE_CPU : SPARGE_REF;
    if (!sparge_backend_built(o->backend))
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "backend is %s, which this library was built without",
                           sparge_backend_string(o->backend));
    if (o->rules != SPARGE_RULES_DEFAULT && o->backend != SPARGE_REF)
        return sparge_fail(error, SPARGE_ERR_UNSUPPORTED,
                           "rules are not the default ones, which the ref backend alone has");
    if (o->pv_dtype == SPARGE_FASTEST && o->backend != SPARGE_CUDA)
        o->pv_dtype = SPARGE_INT8;
    if (o->backend == SPARGE_CPU)
        return sparge_resolve_cpu(o, error);
    if (o->backend == SPARGE_CUDA && sparge_uses_bf16(o))
        return lacks(o->qk_dtype == SPARGE_BF16 ? "qk_dtype" : "pv_dtype", o, error);
    if (!wants_order)
        o->isa = sparge_uses_bf16(o) ? SPARGE_ISA_AVX512VNNI : SPARGE_ISA_SCALAR;
    o->threads = 1;
    return o->backend == SPARGE_CUDA
               ? sparge_with_message(sparge_cuda_resolve(p, o, mask, error), error)
               : SPARGE_OK;
}

sparge_status sparge_options_resolve(const sparge_problem *problem, sparge_options *options,
                                     sparge_error *error)
{
    SPARGE_OWN_ARITHMETIC;
    sparge_status status = sparge_check(problem, options, false, NULL, error);
    if (status)
        return status;
    sparge_options o = *options;
    status = sparge_resolve(problem, &o, NULL, error);
    if (!status)
        *options = o;
    return status;
}
