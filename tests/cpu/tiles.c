/* SPDX-License-Identifier: Apache-2.0 */
/* tiles.c: AMX in a process that is not ours alone: a caller whose tiles are configured otherwise
 * gets the same bits and finds them released; a kernel that refuses the tiles, by a filter or
 * because of a thread's signal stack, is told from a processor that lacks them.
 *
 *     test_tiles caller|filter|stack
 *
 * 77: not on this machine. */
#define _DEFAULT_SOURCE 1
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparge_inspect.h"
#include "tests/cpu/filter.h"

#ifdef SPARGE_SHIMS
#include "tests/cpu/amx_shim.h"
#else
#include "cpu/tiles.h"
#endif

#define MUST(condition)                                                      \
    do {                                                                     \
        if (!(condition)) {                                                  \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, said); \
            exit(1);                                                         \
        }                                                                    \
    } while (0)

static const char *said = "";

enum { TOKENS = 300, DIM = 72 };
static float q[TOKENS * DIM], k[TOKENS * DIM], v[TOKENS * DIM];

typedef struct answer {
    sparge_status status;
    sparge_error error;
    sparge_result result;
    float o[TOKENS * DIM];
} answer;

static void ask(sparge_isa isa, int threads, answer *a)
{
    const sparge_problem problem = {.batch = 1,
                                    .heads = 1,
                                    .kv_heads = 1,
                                    .q_len = TOKENS,
                                    .k_len = TOKENS,
                                    .dim = DIM,
                                    .dim_v = DIM,
                                    .q = {q, SPARGE_F32, 0, 0, DIM},
                                    .k = {k, SPARGE_F32, 0, 0, DIM},
                                    .v = {v, SPARGE_F32, 0, 0, DIM}};
    sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
    options.backend = SPARGE_CPU;
    options.isa = isa;
    options.threads = threads;
    *a = (answer){.result = {.o = {a->o, SPARGE_F32, 0, 0, DIM}}};
    a->status = sparge_attention(&problem, &options, &a->result, &a->error);
    said = a->error.text;
}

/* Does the processor have AMX, whatever the library says? */
static bool processor_has_amx(void)
{
#ifdef SPARGE_SHIMS
    return false;
#else
    char line[8192];
    bool has = false;
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        has |= strstr(line, " amx_tile") && strstr(line, " amx_int8");
    if (f)
        fclose(f);
    return has;
#endif
}

static bool released(void)
{
#ifdef SPARGE_SHIMS
    return shim.config.palette == 0;
#else
    unsigned char config[64];
    __asm__ volatile("sttilecfg %0" : "=m"(config));
    return config[0] == 0;
#endif
}

/* Tiles of one row of four bytes, and numbers in them. */
static int caller(void)
{
    static answer want, got;
    if (!sparge_isa_available(SPARGE_ISA_AMX))
        return 77;
    ask(SPARGE_ISA_SCALAR, 1, &want);
    MUST(want.status == SPARGE_OK);
    for (int threads = 1; threads <= 2; threads++) {
        unsigned char config[64] = {1};
        for (int t = 0; t < 8; t++) {
            config[16 + 2 * t] = 4;
            config[48 + t] = 1;
        }
        TILE_CONFIG(config);
        TILE_LOAD(0, config, 4);
        TILE_LOAD(7, config, 4);
        ask(SPARGE_ISA_AMX, threads, &got);
        MUST(got.status == SPARGE_OK && got.result.isa == SPARGE_ISA_AMX);
        MUST(released());
        MUST(memcmp(got.o, want.o, sizeof got.o) == 0);
    }
    return 0;
}

/* Nobody has asked for the tiles yet: from now on the kernel refuses them. */
static int refused(void)
{
    static answer a, want;
    MUST(!sparge_isa_available(SPARGE_ISA_AMX));
    ask(SPARGE_ISA_AMX, 1, &a);
    MUST(a.status == SPARGE_ERR_UNSUPPORTED);
    const bool has = processor_has_amx();
    MUST(strstr(said, has ? "isa is amx, whose registers this process may not use"
                          : "isa is amx, which this processor lacks"));
    ask(SPARGE_ISA_AUTO, 1, &a);
    MUST(a.status == SPARGE_OK && a.result.isa < SPARGE_ISA_AMX);
    MUST(!has || a.result.isa == SPARGE_ISA_AVX512VNNI);
    ask(SPARGE_ISA_SCALAR, 1, &want);
    MUST(want.status == SPARGE_OK && memcmp(a.o, want.o, sizeof a.o) == 0);
    return has ? 0 : 77;
}

int main(int count, char **word)
{
    for (int n = 0; n < TOKENS * DIM; n++) {
        q[n] = (float)((n * 37 + n / DIM) % 64 - 32) * 0.05f;
        k[n] = (float)((n * 53 + n / DIM) % 64 - 32) * 0.05f;
        v[n] = (float)((n * 71 + n / DIM) % 64 - 32) * 0.05f;
    }
    unsetenv("SPARGE_ISA");
    const char *what = count == 2 ? word[1] : "";
    if (strcmp(what, "caller") == 0)
        return caller();
    if (strcmp(what, "filter") == 0)
        return answer_for_tiles(EPERM) ? refused() : 77;
    if (strcmp(what, "stack") == 0) { /* tiles alone are 8192 bytes */
        static char memory[8192];
        const stack_t small = {.ss_sp = memory, .ss_size = sizeof memory};
        MUST(sigaltstack(&small, NULL) == 0);
        return refused();
    }
    return 2;
}
