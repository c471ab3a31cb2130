/* SPDX-License-Identifier: Apache-2.0 */
/* program.h: what every command of a program keeps to: its exit codes, and how it speaks. */
#ifndef SPARGE_TOOLS_PROGRAM_H
#define SPARGE_TOOLS_PROGRAM_H

#include <jansson.h>
#include <stdio.h>

#include "sparge.h"
#include "tools/array.h"

typedef enum exit_code {
    EXIT_FINE = 0,
    EXIT_DIFFERENT = 1,   /* a comparison failed */
    EXIT_USAGE = 2,       /* an unknown option, a value out of range */
    EXIT_FILE = 3,        /* a file that cannot be read or written, or does not fit the others */
    EXIT_UNSUPPORTED = 4, /* not on this machine, or not in this build */
    EXIT_MACHINE = 5,     /* out of memory, or a device error */
    EXIT_UNFINISHED =
        6, /* interrupted, or the time is up: what is done is kept, the same command goes on */
    EXIT_HELPED = -1, /* --help was asked for and given: no error, and nothing more to do */
} exit_code;

/* A command leaves one line in *error where it returns more than EXIT_DIFFERENT, and may where it
 * returns that. EXIT_FILE becomes EXIT_MACHINE where that line is about memory. It prints nothing
 * itself but its result. argv[0] is "sparge run" and the like. */
typedef struct program_command {
    const char *name;
    exit_code (*run)(int argc, char **argv, file_error *error);
    const char *what;
} program_command;

typedef struct program {
    const char *name, *about;
    const program_command *commands;
    int count;
} program;

/* All of main: runs the command that is named; what it returns is the exit code. */
int program_main(const program *p, int argc, char **argv);

/* Ends the program here and now with one line, and leaves no half of a file; also from a signal
 * handler. */
_Noreturn void program_stop(const char *line, exit_code code);

/* What compiled the programs, and so the library in the same build. */
extern const char program_compiler[], program_flags[];

/* ---- The commands of sparge ---- */

exit_code run_command(int argc, char **argv, file_error *error);
exit_code check_command(int argc, char **argv, file_error *error);
exit_code diff_command(int argc, char **argv, file_error *error);
exit_code map_command(int argc, char **argv, file_error *error);
exit_code info_command(int argc, char **argv, file_error *error);
exit_code order_command(int argc, char **argv, file_error *error);
exit_code tune_command(int argc, char **argv, file_error *error);
exit_code methods_command(int argc, char **argv, file_error *error);
exit_code bench_command(int argc, char **argv, file_error *error);

/* ---- How they fail: what does not succeed ends the program with one line ---- */

extern file_error failure;         /* the line; commands hand it to what they call */
extern sparge_error library_error; /* what the library answered */

void must(exit_code code);         /* or the program ends with the line in `failure` */
void must_do(bool ok);             /* the same for files */
void must_have(bool ok);           /* the same for memory */
void must_sparge(sparge_status s); /* the same with the line in `library_error` */
void *must_alloc(size_t count, size_t size, const char *what); /* of zeros, to be freed */
__attribute__((format(printf, 3, 4))) _Noreturn void fail(exit_code code, const char *name,
                                                          const char *format, ...);

/* What the library answered, as ours. */
exit_code library_result(sparge_status status, const sparge_error *why, file_error *error);

/* ---- How they speak ---- */

json_t *json_number(double x);              /* null where JSON has no word for it */
json_t *json_text(const char *bytes);       /* the same: they may be no UTF-8 */
bool json_is_text(const char *bytes);       /* are they? */
json_t *json_rounded(double x, int digits); /* the same in so many digits */
json_t *json_float(float x);                /* the same in the fewest digits that are this float */

/* `to` with the keys of `more` after its own; both are taken. NULL, as they may be: no memory. */
json_t *json_joined(json_t *to, json_t *more);

/* Prints one line of JSON, and makes sure that it arrived. Frees the object; NULL is an object for
 * which there was no memory. */
exit_code print_json(json_t *object, file_error *error);

/* An object with a line for each of its keys, and for each element of its lists; json_save: as a
 * file that appears whole. */
bool json_write_lines(FILE *to, const char *path, const json_t *object, file_error *error);
exit_code json_save(const char *path, const json_t *object, file_error *error);

/* Whatever was printed has arrived, or an error. */
exit_code flush_stdout(file_error *error);

#endif
