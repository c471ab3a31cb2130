/* SPDX-License-Identifier: Apache-2.0 */
/* plain.c: runs the tests that plain.h collected.
 *
 *     test_gpu [--quick] [--first] [--seed N] [--limit SECONDS] [--list] [name ...]
 *
 * A name is a part of suite/name. --first ends with the first test that fails. --limit is for each
 * test: on a GPU nothing else ends a kernel that hangs. */
#include "tests/support/plain.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static plain_test *first, **last = &first;
static const plain_test *running;
static jmp_buf end_of_test;
static bool quick;

void plain_add(plain_test *test)
{
    *last = test;
    last = &test->next;
}

bool plain_quick(void) { return quick; }

void plain_log(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("    ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

void plain_fail(const char *file, int line, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("%s:%d: ", file, line);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    longjmp(end_of_test, 1);
}

static void too_late(int signal)
{
    (void)signal;
    static const char text[] = ": over the time limit\n0 passed, 1 failed\n";
    ssize_t ignored = write(1, running->name, strlen(running->name));
    ignored += write(1, text, sizeof text - 1);
    _exit(ignored ? 1 : 2);
}

static bool chosen(const plain_test *t, char **names, int count)
{
    char full[256];
    snprintf(full, sizeof full, "%s/%s", t->suite, t->name);
    bool any = count == 0;
    for (int n = 0; n < count; n++)
        any |= strstr(full, names[n]) != NULL;
    return any;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool run(const plain_test *t)
{
    running = t;
    const bool passed = setjmp(end_of_test) == 0;
    if (passed)
        t->run();
    return passed;
}

int main(int argc, char **argv)
{
    unsigned limit = 0;
    bool list = false, until_one_fails = false;
    int names = 0;
    for (int n = 1; n < argc; n++) {
        const bool value = n + 1 < argc;
        if (strcmp(argv[n], "--quick") == 0)
            quick = true;
        else if (strcmp(argv[n], "--first") == 0)
            until_one_fails = true;
        else if (strcmp(argv[n], "--list") == 0)
            list = true;
        else if (strcmp(argv[n], "--seed") == 0 && value)
            setenv("SPARGE_SEED", argv[++n], 1);
        else if (strcmp(argv[n], "--limit") == 0 && value)
            limit = (unsigned)strtoul(argv[++n], NULL, 10);
        else if (argv[n][0] != '-')
            argv[names++] = argv[n];
        else
            return fprintf(stderr,
                           "usage: %s [--quick] [--first] [--seed N] "
                           "[--limit SECONDS] [--list] [name ...]\n",
                           argv[0]),
                   2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGALRM, too_late);
    int passed = 0, failed = 0;
    for (const plain_test *t = first; t && !(failed && until_one_fails); t = t->next) {
        if (!chosen(t, argv, names))
            continue;
        if (list) {
            printf("%s/%s\n", t->suite, t->name);
            continue;
        }
        const double start = now();
        alarm(limit);
        const bool good = run(t);
        alarm(0);
        printf("%-7s %6.2f s  %s/%s\n", good ? "passed" : "FAILED", now() - start, t->suite,
               t->name);
        passed += good;
        failed += !good;
    }
    if (list)
        return 0;
    printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed;
}
