/* SPDX-License-Identifier: Apache-2.0 */
/* plain.h: as much of Criterion as check.h, check.c and problem.c use, for tests that run in one
 * process: CUDA and fork do not mix, and a machine with a GPU may not have Criterion. plain.c has
 * the main program. */
#ifndef SPARGE_TESTS_PLAIN_H
#define SPARGE_TESTS_PLAIN_H

#include <stdbool.h>

typedef struct plain_test {
    const char *suite, *name;
    void (*run)(void);
    struct plain_test *next;
} plain_test;

void plain_add(plain_test *test);
void plain_fail(const char *file, int line, const char *format, ...)
    __attribute__((noreturn, format(printf, 3, 4))); /* ends the test, and nothing else */
void plain_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool plain_quick(void); /* --quick: a smaller set of cases will do */

/* In the order of a file. */
#define Test(of_suite, of_name)                                                          \
    static void plain_##of_suite##_##of_name(void);                                      \
    __attribute__((constructor)) static void plain_add_##of_suite##_##of_name(void)      \
    {                                                                                    \
        static plain_test test = {#of_suite, #of_name, plain_##of_suite##_##of_name, 0}; \
        plain_add(&test);                                                                \
    }                                                                                    \
    static void plain_##of_suite##_##of_name(void)
#define TestSuite(suite) struct plain_suite_##suite

#define cr_assert(condition, ...) \
    ((condition) ? (void)0 : plain_fail(__FILE__, __LINE__, __VA_ARGS__))
#define cr_log_info(...) plain_log(__VA_ARGS__)

#endif
