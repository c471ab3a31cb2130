/* SPDX-License-Identifier: Apache-2.0 */
/* program.c: what the programs have in common: they find the command, say in one line what went
 * wrong, and print JSON. */
#include "tools/program.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/interrupt.h"
#include "tools/options.h"
#include "tools/output.h"

#ifdef __clang__
const char program_compiler[] = __VERSION__;
#else
const char program_compiler[] = "gcc " __VERSION__;
#endif
const char program_flags[] = SPARGE_BUILD_FLAGS;

/* ---- How commands fail ---- */

file_error failure;
sparge_error library_error;
static const char *program_name = "sparge";

/* The end of the program: its exit code, and one line where something is to be said. */
static exit_code finish(exit_code code)
{
    outputs_discard();
    if (code == EXIT_FILE && failure.memory)
        code = EXIT_MACHINE;
    if (code == EXIT_HELPED)
        code = EXIT_FINE;
    if (code <= EXIT_DIFFERENT) {
        const exit_code printed = flush_stdout(&failure);
        code = printed ? printed : code;
    }
    if (code > EXIT_DIFFERENT || (code == EXIT_DIFFERENT && failure.text[0]))
        /* A terminal may show how far something is on the line where the cursor stands. */
        fprintf(stderr, "%s%s: %s\n", isatty(STDERR_FILENO) ? "\r\033[K" : "", program_name,
                failure.text);
    return code;
}

/* Ends the program inside a command. What its callers hold is given back by the system, and is no
 * leak. */
static _Noreturn void end_with(exit_code code)
{
    const exit_code said = finish(code);
    fflush(NULL);
    _exit((int)said);
}

void must(exit_code code)
{
    if (code)
        end_with(code);
}

void must_do(bool ok) { must(ok ? EXIT_FINE : EXIT_FILE); }
void must_have(bool ok) { must(ok ? EXIT_FINE : EXIT_MACHINE); }

void must_sparge(sparge_status s) { must(library_result(s, &library_error, &failure)); }

void *must_alloc(size_t count, size_t size, const char *what)
{
    void *memory = calloc(count + 1, size); /* NULL would be none */
    if (!memory)
        fail(EXIT_MACHINE, NULL, "no memory for %s", what);
    return memory;
}

void fail(exit_code code, const char *name, const char *format, ...)
{
    char text[sizeof failure.text];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    file_error_set(&failure, name, "%s", text);
    end_with(code);
}

exit_code library_result(sparge_status status, const sparge_error *why, file_error *error)
{
    static const exit_code codes[] = {
        [SPARGE_OK] = EXIT_FINE,
        [SPARGE_ERR_ARGUMENT] = EXIT_USAGE,
        [SPARGE_ERR_SHAPE] = EXIT_FILE,
        [SPARGE_ERR_UNSUPPORTED] = EXIT_UNSUPPORTED,
        [SPARGE_ERR_MEMORY] = EXIT_MACHINE,
        [SPARGE_ERR_DEVICE] = EXIT_MACHINE,
        [SPARGE_ERR_CANCELLED] = EXIT_UNFINISHED,
    };
    if (status == SPARGE_ERR_CANCELLED)
        file_error_set(error, NULL, INTERRUPTED);
    else if (status)
        file_error_set(error, NULL, "%s%s", why->text,
                       status == SPARGE_ERR_UNSUPPORTED ? "; 'sparge info' lists what can run here"
                                                        : "");
    return codes[status];
}

/* ---- JSON ---- */

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

static char json_line[128]; /* for stderr */

/* jansson does not survive every allocation that fails, and loses what it has no memory for. */
static void *json_allocate(size_t bytes)
{
    void *memory = malloc(bytes);
    if (!memory)
        program_stop(json_line, EXIT_MACHINE);
    return memory;
}

exit_code print_json(json_t *object, file_error *error)
{
    if (!object) {
        file_error_set(error, NULL, "no memory for the result");
        return EXIT_MACHINE;
    }
    char *text = json_dumps(object, JSON_REAL_PRECISION(9)); /* all of it before any is printed */
    json_decref(object);
    if (!text) {
        file_error_set(error, NULL, "no memory to print the result");
        return EXIT_MACHINE;
    }
    puts(text);
    free(text);
    return flush_stdout(error);
}

json_t *json_text(const char *bytes)
{
    json_t *text = json_string(bytes);
    return text ? text : json_null();
}

bool json_is_text(const char *bytes)
{
    json_t *text = json_string(bytes);
    json_decref(text);
    return text != NULL;
}

json_t *json_rounded(double x, int digits)
{
    char text[40];
    if (!isfinite(x))
        return json_null();
    snprintf(text, sizeof text, "%.*g", digits, x);
    return json_real(strtod(text, NULL));
}

json_t *json_float(float x)
{
    int digits = 1;
    for (char text[40]; digits < 9 && isfinite(x); digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)x);
        if (strtof(text, NULL) == x)
            break;
    }
    return json_rounded((double)x, digits);
}

json_t *json_joined(json_t *to, json_t *more)
{
    const bool ok = to && more && json_object_update(to, more) == 0;
    json_decref(more);
    if (ok)
        return to;
    json_decref(to);
    return NULL;
}

bool json_write_lines(FILE *to, const char *path, const json_t *object, file_error *error)
{
    enum { STYLE = JSON_REAL_PRECISION(9) | JSON_ENCODE_ANY };
    const char *key, *between = "{";
    json_t *value;
    bool ok = true;
    errno = 0;
    json_object_foreach((json_t *)object, key, value)
    {
        fprintf(to, "%s\n \"%s\": ", between, key);
        between = ",";
        if (!json_is_array(value)) {
            ok &= json_dumpf(value, to, STYLE) == 0;
            continue;
        }
        for (size_t n = 0; n < json_array_size(value); n++) {
            fputs(n ? ",\n  " : "[\n  ", to);
            ok &= json_dumpf(json_array_get(value, n), to, STYLE) == 0;
        }
        fputs(json_array_size(value) ? "\n ]" : "[]", to);
    }
    fputs("\n}\n", to);
    if (fflush(to) == 0 && ok && !ferror(to))
        return true;
    return file_error_set(error, path, "cannot write: %s; free some space or choose another folder",
                          strerror(errno ? errno : EIO));
}

exit_code json_save(const char *path, const json_t *object, file_error *error)
{
    output_file *file = output_open(path, error);
    const bool ok =
        file && json_write_lines(output_stream(file), path, object, error) && outputs_commit(error);
    return ok ? EXIT_FINE : EXIT_FILE;
}

/* ---- Commands ---- */

void program_stop(const char *line, exit_code code)
{
    outputs_abandon();
    const ssize_t written = write(STDERR_FILENO, line, strlen(line));
    (void)written;
    _exit((int)code);
}

static void print_help(const program *p)
{
    printf("Usage: %s COMMAND [OPTION...]\n%s\n\n", p->name, p->about);
    for (int n = 0; n < p->count; n++)
        printf("  %s %-7s %s\n", p->name, p->commands[n].name, p->commands[n].what);
    printf("\n'%s COMMAND --help' lists the options of a command, --version the version.\nExit "
           "status: 0 fine, 1 a comparison failed, 2 wrong usage, 3 a file cannot be read "
           "or\nwritten or does not fit, 4 not supported here, 5 out of memory or a device "
           "error,\n6 interrupted, or the time is up: give the same command again, which goes on "
           "where it keeps\nwhat is done.\n",
           p->name);
}

static exit_code unknown_command(const program *p, const char *name, file_error *error)
{
    const char *best = p->commands->name;
    for (int n = 1; n < p->count; n++)
        if (options_distance(name, p->commands[n].name) < options_distance(name, best))
            best = p->commands[n].name;
    file_error_set(error, NULL, "unknown command '%.60s': did you mean '%s'? '%s --help' lists all",
                   name, best, p->name);
    return EXIT_USAGE;
}

static exit_code dispatch(const program *p, int argc, char **argv, file_error *error)
{
    const char *name = argc > 1 ? argv[1] : "";
    for (int n = 0; n < p->count; n++)
        if (strcmp(name, p->commands[n].name) == 0) {
            char title[32];
            snprintf(title, sizeof title, "%s %s", p->name, name);
            argv[1] = title;
            return p->commands[n].run(argc - 1, argv + 1, error);
        }
    if (strcmp(name, "--version") == 0)
        printf("%s " SPARGE_VERSION "\n", p->name);
    else if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0)
        print_help(p);
    else if (*name)
        return unknown_command(p, name, error);
    else
        file_error_set(error, NULL, "a command is missing; '%s --help' lists them", p->name);
    return *name ? EXIT_FINE : EXIT_USAGE;
}

int program_main(const program *p, int argc, char **argv)
{
    /* A file opened while a standard stream is closed would take its number, and its text. */
    const bool no_stdout = fcntl(STDOUT_FILENO, F_GETFD) < 0;
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            return EXIT_FILE;
    signal(SIGPIPE, SIG_IGN); /* a reader that went away is an error like a full disk */
    signal(SIGXFSZ, SIG_IGN); /* and so is a file too large */
    atexit(outputs_discard);
    interrupt_catch(p->name);
    program_name = p->name;
    snprintf(json_line, sizeof json_line, "%s: no memory for JSON; free some\n", p->name);
    json_set_alloc_funcs(json_allocate, free);
    if (no_stdout)
        fail(EXIT_FILE, NULL, "standard output is closed; the result would be lost");
    return (int)finish(dispatch(p, argc, argv, &failure));
}
