/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/support/check.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sanitizer/asan_interface.h> /* its macros do nothing in a build without the sanitizer */

static char case_name[256] = "no case";
static uint64_t state; /* 0 before the first case */

static uint64_t seed(void)
{
    const char *text = getenv("SPARGE_SEED");
    return text ? strtoull(text, NULL, 0) : 250218137;
}

void check_case(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(case_name, sizeof case_name, format, args);
    va_end(args);
    state = seed() ^ 0xcbf29ce484222325u;
    for (const char *c = case_name; *c; c++)
        state = (state ^ (uint64_t)(unsigned char)*c) * 0x100000001b3u; /* FNV-1a */
}

uint64_t check_random(void) /* SplitMix64: Steele, Lea & Flood 2014 */
{
    if (!state)
        check_case("%s", "no case");
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

int64_t check_int(int64_t first, int64_t last)
{
    return first + (int64_t)(check_random() % (uint64_t)(last - first + 1));
}

float check_uniform(float low, float high)
{
    return low + (high - low) * ((float)(check_random() >> 40) * 0x1p-24f);
}

float check_normal(void) /* Box & Muller 1958; u is never 0 */
{
    const double u = ((double)(check_random() >> 12) + 0.5) * 0x1p-52;
    const double v = (double)(check_random() >> 12) * 0x1p-52;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

/* In memory: the size, padded; a guard; the caller's bytes; a guard. */
enum { HEAD = 64, GUARD = 256 };
static const uint8_t guard[2] = {0xFA, 0x7F}; /* 0x7FFA, 0x7FFA7FFA, ...: a NaN of every width */

void *check_alloc(size_t bytes)
{
    const size_t total = (HEAD + GUARD + bytes + GUARD + 63) / 64 * 64;
    uint8_t *head = (uint8_t *)aligned_alloc(64, total);
    cr_assert(head, "no memory for %zu bytes", bytes);
    uint8_t *buffer = head + HEAD + GUARD, *end = buffer + bytes;
    memcpy(head, &bytes, sizeof bytes);
    memset(buffer, 0xFF, bytes);
    for (size_t i = 0; i < GUARD; i++)
        head[HEAD + i] = end[i] = guard[i % 2];
    ASAN_POISON_MEMORY_REGION(head, HEAD + GUARD);
    ASAN_POISON_MEMORY_REGION(end, GUARD);
    return buffer;
}

const char *check_guards(const void *buffer)
{
    const uint8_t *head = (const uint8_t *)buffer - GUARD - HEAD;
    size_t bytes;
    ASAN_UNPOISON_MEMORY_REGION(head, HEAD + GUARD);
    memcpy(&bytes, head, sizeof bytes);
    const uint8_t *before = head + HEAD, *after = before + GUARD + bytes;
    ASAN_UNPOISON_MEMORY_REGION(after, GUARD);
    for (size_t i = 0; i < GUARD; i++) {
        if (before[GUARD - 1 - i] != guard[(i + 1) % 2])
            return check_text("a write %zu before a buffer of %zu bytes", i + 1, bytes);
        if (after[i] != guard[i % 2])
            return check_text("a write %zu past a buffer of %zu bytes", i, bytes);
    }
    return NULL;
}

size_t check_size(const void *buffer)
{
    const uint8_t *head = (const uint8_t *)buffer - GUARD - HEAD;
    size_t bytes;
    ASAN_UNPOISON_MEMORY_REGION(head, HEAD);
    memcpy(&bytes, head, sizeof bytes);
    ASAN_POISON_MEMORY_REGION(head, HEAD);
    return bytes;
}

void check_free(void *buffer)
{
    if (!buffer)
        return;
    check_no_difference("check_free: ", check_guards(buffer));
    free((uint8_t *)buffer - GUARD - HEAD);
}

const char *check_distance(double got, double want, double tolerance)
{
    const bool near = got == want || fabs(got - want) <= tolerance;
    return near ? NULL : check_text(" is %.9g, should be %.9g within %g", got, want, tolerance);
}

static const char *value_text(const void *at, size_t size, bool is_float)
{
    union {
        float f;
        double d;
        uint64_t bits;
    } value = {.bits = 0};
    memcpy(&value, at, size); /* an integer is in the low bytes: the machine is little-endian */
    const double x = size == sizeof value.f ? (double)value.f : value.d;
    return is_float ? check_text("%.9g (%a)", x, x)
                    : check_text("%" PRId64 " (0x%" PRIx64 ")",
                                 (int64_t)(value.bits << (64 - 8 * size)) >> (64 - 8 * size),
                                 value.bits);
}

static bool is_nan(const uint8_t *at, size_t size)
{
    float f = 0.0f;
    double d = 0.0;
    memcpy(size == sizeof f ? (void *)&f : &d, at, size);
    return isnan(f) || isnan(d);
}

/* Bit for bit, but that one NaN is as good as another, unless it is what check_alloc filled in. */
static bool same_value(const uint8_t *a, const uint8_t *b, size_t size, bool is_float)
{
    static const uint8_t unwritten[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    if (memcmp(a, b, size) == 0)
        return true;
    return is_float && is_nan(a, size) && is_nan(b, size) && memcmp(a, unwritten, size) != 0 &&
           memcmp(b, unwritten, size) != 0;
}

const char *check_difference(const void *got, const void *want, size_t count, size_t size,
                             bool is_float)
{
    const uint8_t *a = (const uint8_t *)got, *b = (const uint8_t *)want;
    for (size_t i = 0; i < count * size; i += size)
        if (!same_value(a + i, b + i, size, is_float))
            return check_text("[%zu] of %zu is %s, should be %s", i / size, count,
                              value_text(a + i, size, is_float), value_text(b + i, size, is_float));
    return NULL;
}

const char *check_text(const char *format, ...)
{
    static char texts[8][512]; /* eight, since one text may be part of another */
    static unsigned next;
    char *text = texts[next++ % 8];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof *texts, format, args);
    va_end(args);
    return text;
}

const char *check_context(void)
{
    return check_text("%s; SPARGE_SEED=%" PRIu64, case_name, seed());
}
