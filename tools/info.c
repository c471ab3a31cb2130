/* SPDX-License-Identifier: Apache-2.0 */
/* info.c: sparge info: what is built, and what can run on this machine. */
#include <stdio.h>
#include <unistd.h>

#include "tools/options.h"

#include "sparge_inspect.h"

typedef struct info_args {
    options_base base;
    bool json;
} info_args;

static error_t info_parser(int key, char *text, struct argp_state *state)
{
    info_args *a = state->input;
    switch (key) {
    case 'j': a->json = true; return 0;
    case ARGP_KEY_ARG: return options_wrong(state, "info takes no file, not '%.60s'", text);
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option info_options[] = {{"json", 'j', 0, 0, "as JSON", 0}, {0}};
static const struct argp info_argp = {
    .options = info_options,
    .parser = info_parser,
    .doc = "The version, the backends that are built and can run here, and what the processor has.",
};

static exit_code info_json(long cores, file_error *error)
{
    json_t *backends = json_object(), *isas = json_object(), *bf16 = json_object();
    for (sparge_backend b = SPARGE_REF; b <= SPARGE_CUDA; b++)
        json_object_set_new(backends, sparge_backend_string(b),
                            json_pack("{s:b, s:b}", "built", sparge_backend_built(b), "available",
                                      sparge_backend_available(b)));
    for (sparge_isa isa = SPARGE_ISA_SCALAR; isa < SPARGE_ISAS; isa++) {
        json_object_set_new(isas, sparge_isa_string(isa), json_boolean(sparge_isa_available(isa)));
        json_object_set_new(bf16, sparge_isa_string(isa), json_boolean(sparge_isa_has_bf16(isa)));
    }
    return print_json(json_pack("{s:s, s:s, s:s, s:i, s:o, s:o, s:o}", "version", SPARGE_VERSION,
                                "compiler", program_compiler, "flags", program_flags, "cores",
                                (int)cores, "isa", isas, "bf16", bf16, "backends", backends),
                      error);
}

exit_code info_command(int argc, char **argv, file_error *error)
{
    info_args a = {.base = {error}};
    const exit_code code = options_parse(&info_argp, argc, argv, &a.base);
    if (code)
        return code;
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (a.json)
        return info_json(cores, error);
    printf("sparge %s on %ld cores\n  built by %s, %s\n", SPARGE_VERSION, cores, program_compiler,
           program_flags);
    for (sparge_backend b = SPARGE_REF; b <= SPARGE_CUDA; b++)
        printf("  backend %-12s %s\n", sparge_backend_string(b),
               !sparge_backend_built(b)      ? "not built"
               : sparge_backend_available(b) ? "built, can run here"
                                             : "built, cannot run here");
    for (sparge_isa isa = SPARGE_ISA_SCALAR; isa < SPARGE_ISAS; isa++)
        printf("  isa     %-12s %s\n", sparge_isa_string(isa),
               sparge_isa_has_bf16(isa)    ? "yes, with products of bf16"
               : sparge_isa_available(isa) ? "yes"
                                           : "no");
    return EXIT_FINE;
}
