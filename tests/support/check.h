/* SPDX-License-Identifier: Apache-2.0 */
/* check.h: inputs that replay, buffers with guards, and comparisons that a NaN fails, on Criterion.
 *
 * Traps: a cr_log_warn in a passing test makes the program exit 1; a program that ran no test exits
 * 0, so CTest fails it; a test that cannot run here says "not on this machine". */
#ifndef SPARGE_TESTS_CHECK_H
#define SPARGE_TESTS_CHECK_H

#include <stddef.h>
#include <stdint.h>
#ifdef SPARGE_PLAIN_TESTS
#include "tests/support/plain.h"
#else
#include <criterion/criterion.h>
#endif

/* Names the case that begins, as printf does, and starts the generator anew from SPARGE_SEED and
 * the name: it draws the same numbers alone as among others. A failing check prints both. */
void check_case(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t check_random(void);
int64_t check_int(int64_t first, int64_t last); /* both included */
float check_uniform(float low, float high);
float check_normal(void); /* mean 0, deviation 1 */

/* Full of 0xFF: a NaN as a float, -1 as an integer. Before the first byte and right after the last
 * stand guards, NaNs too: check_free fails the test when one has changed (check_guards says how, or
 * NULL), and the address sanitizer does not let them be read. */
void *check_alloc(size_t bytes);
void check_free(void *buffer); /* NULL is fine */
const char *check_guards(const void *buffer);
size_t check_size(const void *buffer); /* the bytes that were asked for */

#define check(condition, ...) \
    cr_assert((condition), "%s [%s]", check_text(__VA_ARGS__), check_context())

/* |got - want| <= tolerance, or both the same infinity. */
#define check_close(got, want, tolerance) \
    check_no_difference(#got, check_distance((double)(got), (double)(want), (double)(tolerance)))

/* Arrays of integers or floats, bit for bit (-0 is not 0; a NaN equals any other, but not the one
 * that check_alloc filled in), or one value. */
#define check_same(got, want, count) check_same_as(#got, got, want, count)
#define check_equal(got, want)                                        \
    do {                                                              \
        const __typeof__(got) check_got = (got), check_want = (want); \
        check_same_as(#got, &check_got, &check_want, 1);              \
    } while (0)

#define check_same_as(name, got, want, count) \
    check_no_difference(                      \
        name, check_difference(got, want, (size_t)(count), sizeof *(got), check_is_float(*(got))))
#define check_no_difference(name, difference)           \
    do {                                                \
        const char *check_found = (difference);         \
        check(!check_found, "%s%s", name, check_found); \
    } while (0)
#define check_is_float(x) _Generic((x), float : true, double : true, default : false)
const char *check_distance(double got, double want, double tolerance); /* NULL when near */
const char *check_difference(const void *got, const void *want, size_t count, size_t size,
                             bool is_float);
const char *check_text(const char *format, ...) __attribute__((format(printf, 1, 2)));
const char *check_context(void);

#endif
