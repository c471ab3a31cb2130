/* SPDX-License-Identifier: Apache-2.0 */
/* heap.c: malloc, calloc, realloc and free as heap.h says. */
#include "tests/support/heap.h"

#include <errno.h>
#include <stddef.h>

struct heap heap;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *p, size_t size);
void __real_free(void *p);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *p, size_t size);
void __wrap_free(void *p);

void heap_arm(int64_t fails)
{
    heap = (struct heap){.fails = fails, .caller = pthread_self()};
    heap.armed = true;
}

static bool fails_now(void)
{
    if (heap.armed && !pthread_equal(pthread_self(), heap.caller))
        __atomic_fetch_add(&heap.stray, 1, __ATOMIC_RELAXED);
    const bool fails = heap.armed && heap.calls++ == heap.fails;
    if (fails)
        errno = ENOMEM;
    return fails;
}

static void *counted(void *p)
{
    heap.live += heap.armed && p;
    return p;
}

void *__wrap_malloc(size_t size) { return fails_now() ? NULL : counted(__real_malloc(size)); }

void *__wrap_calloc(size_t count, size_t size)
{
    return fails_now() ? NULL : counted(__real_calloc(count, size));
}

void *__wrap_realloc(void *p, size_t size)
{
    if (fails_now())
        return NULL;
    heap.live -= heap.armed && p;
    return counted(__real_realloc(p, size));
}

void __wrap_free(void *p)
{
    heap.live -= heap.armed && p;
    __real_free(p);
}
