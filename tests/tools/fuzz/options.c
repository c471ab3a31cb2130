/* SPDX-License-Identifier: Apache-2.0 */
/* options.c: libFuzzer target: any command line of run and map gives either one line of error, or
 * options that the library accepts. Arguments end at a zero byte or a line end. */
#include "tools/options.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void check_accepted(const attention_args *a, char *const *argv, int argc)
{
    require(a->files >= 0 && a->files <= 3 && (unsigned)a->rules <= SPARGE_RULES_UPSTREAM);
    for (int n = 0; n < a->files; n++) {
        int found = 1;
        while (found < argc && argv[found] != a->file[n])
            found++;
        require(found < argc);
    }
    const sparge_options *o = &a->options;
    require(o->rules == a->rules &&
            ((o->thresholds.topk == SPARGE_OFF && o->thresholds.min_mass == 0.0f) ||
             (a->given & option_bit(OPT_TAU)) || o->thresholds.tau == SPARGE_OFF));
    const float x = 0.0f;
    const sparge_problem problem = {
        .batch = 1,
        .heads = 1,
        .kv_heads = 1,
        .q_len = 1,
        .k_len = 1,
        .dim = 1,
        .dim_v = 1,
        .q = {.data = &x},
        .k = {.data = &x},
        .v = {.data = &x},
    };
    sparge_mask mask;
    sparge_error why;
    const sparge_status status = sparge_mask_alloc(&mask, &problem, o, &why);
    /* What depends on two of them. */
    require(status == SPARGE_OK || strstr(why.text, "int12") || strncmp(why.text, "cell ", 5) == 0);
    sparge_mask_free(&mask);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    char *text = malloc(size + 1);
    char **argv = malloc((size + 3) * sizeof *argv);
    require(text && argv);
    if (size > 0)
        memcpy(text, bytes, size);
    text[size] = '\0';
    char name[] = "sparge run";
    int argc = 0;
    argv[argc++] = name;
    for (size_t at = 0; at < size; at += strlen(text + at) + 1) {
        text[at + strcspn(text + at, "\n")] = '\0';
        argv[argc++] = text + at;
    }
    argv[argc] = NULL;

    file_error error;
    memset(&error, 'x', sizeof error);
    attention_args args;
    memset(&args, 0xff, sizeof args);
    options_base base = {&error};
    args.base = base;
    const exit_code code = attention_parse(&attention_argp, argc, argv, &args.base, &args);
    if (code == EXIT_FINE) {
        require(error.text[0] == '\0');
        check_accepted(&args, argv, argc);
    } else if (code == EXIT_USAGE) {
        require(memchr(error.text, '\0', sizeof error.text) && !strchr(error.text, '\n'));
        require(strstr(error.text, "; see 'sparge run --help'") != NULL);
    } else {
        require(code == EXIT_HELPED && error.text[0] == '\0');
    }
    free(argv);
    free(text);
    return 0;
}
