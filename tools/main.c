/* main.c: the sparge program: finds the command, says in one line what went wrong. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tools/options.h"
#include "tools/output.h"
#include "tools/program.h"

static const struct {
    const char *name;
    exit_code (*run)(int argc, char **argv, file_error *error);
    const char *what;
} commands[] = {
    {"run", run_command, "attention over the files of q, k and v"},
    {"diff", diff_command, "the distance between two outputs, or where two dumps part"},
    {"map", map_command, "a picture of the attention and of the mask that was predicted"},
    {"tune", tune_command, "thresholds for every head, from captures"},
    {"order", order_command, "a token order for images and video"},
    {"bench", bench_command, "how fast attention is here, beside what the machine can do"},
    {"info", info_command, "what is built, and what can run here"},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

exit_code library_result(sparge_status status, const sparge_error *why, file_error *error)
{
    static const exit_code codes[] = {
        [SPARGE_OK] = EXIT_FINE,           [SPARGE_ERR_ARGUMENT] = EXIT_USAGE,
        [SPARGE_ERR_SHAPE] = EXIT_FILE,    [SPARGE_ERR_UNSUPPORTED] = EXIT_UNSUPPORTED,
        [SPARGE_ERR_MEMORY] = EXIT_MACHINE, [SPARGE_ERR_DEVICE] = EXIT_MACHINE,
    };
    if (status)
        file_error_set(error, NULL, "%s%s", why->text, status == SPARGE_ERR_UNSUPPORTED
                       ? "; 'sparge info' lists what can run here" : "");
    return codes[status];
}

json_t *json_number(double x) { return isfinite(x) ? json_real(x) : json_null(); }

exit_code flush_stdout(file_error *error)
{
    errno = 0;
    if (fflush(stdout) == 0 && !ferror(stdout))
        return EXIT_FINE;
    file_error_set(error, NULL, "cannot write to standard output: %s; send it elsewhere",
                   errno ? strerror(errno) : "an earlier write failed");
    return EXIT_FILE;
}

exit_code print_json(json_t *object, file_error *error)
{
    if (!object) {
        file_error_set(error, NULL, "no memory for the result");
        return EXIT_MACHINE;
    }
    if (json_dumpf(object, stdout, JSON_REAL_PRECISION(9)) == 0)
        putchar('\n');
    json_decref(object);
    return flush_stdout(error);
}

static void print_help(void)
{
    puts("Usage: sparge COMMAND [OPTION...]\n"
         "SpargeAttn: training-free block-sparse int8 attention (arXiv 2502.18137).\n");
    for (size_t n = 0; n < COMMANDS; n++)
        printf("  sparge %-6s %s\n", commands[n].name, commands[n].what);
    puts("\n'sparge COMMAND --help' lists the options of a command, --version the version.\n"
         "Exit status: 0 fine, 1 a comparison failed, 2 wrong usage, 3 a file cannot be read or\n"
         "written or does not fit, 4 not supported here, 5 out of memory or a device error,\n"
         "6 interrupted: what is done is kept, and the same command goes on.");
}

static exit_code unknown_command(const char *name, file_error *error)
{
    size_t best = 0;
    for (size_t n = 1; n < COMMANDS; n++)
        if (options_distance(name, commands[n].name) < options_distance(name, commands[best].name))
            best = n;
    file_error_set(error, NULL, "unknown command '%.60s': did you mean '%s'? 'sparge --help' lists "
                   "all", name, commands[best].name);
    return EXIT_USAGE;
}

static exit_code dispatch(int argc, char **argv, file_error *error)
{
    const char *const name = argc > 1 ? argv[1] : "";
    for (size_t n = 0; n < COMMANDS; n++)
        if (strcmp(name, commands[n].name) == 0) {
            char title[32];
            snprintf(title, sizeof title, "sparge %s", name);
            argv[1] = title;
            return commands[n].run(argc - 1, argv + 1, error);
        }
    if (strcmp(name, "--version") == 0)
        puts("sparge " SPARGE_VERSION);
    else if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0)
        print_help();
    else if (*name)
        return unknown_command(name, error);
    else
        file_error_set(error, NULL, "a command is missing; 'sparge --help' lists them");
    return *name ? EXIT_FINE : EXIT_USAGE;
}

int main(int argc, char **argv)
{
    /* A file opened while a standard stream is closed would take its number, and its text. */
    const bool no_stdout = fcntl(STDOUT_FILENO, F_GETFD) < 0;
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            return EXIT_FILE;
    signal(SIGPIPE, SIG_IGN); /* a reader that went away is an error like a full disk */

    file_error error = {""};
    exit_code code = EXIT_FILE;
    if (no_stdout)
        file_error_set(&error, NULL, "standard output is closed; the result would be lost");
    else
        code = dispatch(argc, argv, &error);
    outputs_discard();
    if (code == EXIT_HELPED)
        code = EXIT_FINE;
    if (code <= EXIT_DIFFERENT) {
        const exit_code printed = flush_stdout(&error);
        code = printed ? printed : code;
    }
    if (code > EXIT_DIFFERENT || (code == EXIT_DIFFERENT && error.text[0]))
        fprintf(stderr, "sparge: %s\n", error.text);
    return (int)code;
}
