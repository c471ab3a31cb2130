/* SPDX-License-Identifier: Apache-2.0 */
/* names.c: words for values, the version, and what this library and machine have. */
#include "api/api.h"

#include "cpu/cpu.h"
#include "gpu/gpu.h"
#include "sparge_tune.h"

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
    static const char *const name[] = {"auto", "scalar", "avx2", "avxvnni", "avx512vnni", "amx"};
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

const char *sparge_back_off_string(sparge_back_off back_off)
{
    static const char *const name[] = {"none", "lambda lowered", "tau raised", "left dense"};
    return (unsigned)back_off < sizeof name / sizeof *name ? name[back_off] : "unknown";
}

int sparge_version(void) { return SPARGE_VERSION_NUMBER; }

bool sparge_backend_built(sparge_backend backend)
{
    return backend == SPARGE_CUDA ? sparge_cuda_built() : (unsigned)backend < SPARGE_CUDA;
}

bool sparge_backend_available(sparge_backend backend)
{
    return backend == SPARGE_CUDA ? sparge_cuda_available() : sparge_backend_built(backend);
}

bool sparge_isa_available(sparge_isa isa) { return isa == SPARGE_ISA_AUTO || sparge_cpu_has(isa); }

bool sparge_isa_has_bf16(sparge_isa isa)
{
    return isa == SPARGE_ISA_AUTO ? sparge_cpu_best(true) != SPARGE_ISA_AUTO
                                  : sparge_cpu_has_bf16(isa);
}
