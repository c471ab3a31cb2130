/* SPDX-License-Identifier: Apache-2.0 */
/* heap.h: allocations that fail: for programs that are linked with
 * --wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=free. */
#ifndef SPARGE_TESTS_HEAP_H
#define SPARGE_TESTS_HEAP_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* While armed, allocation number `fails` (from 0) returns NULL. Other code does not run then, and
 * other threads do not allocate: `stray` counts those that do. */
struct heap {
    bool armed;
    int64_t fails, calls, live;
    pthread_t caller;
    int stray;
};
extern struct heap heap;

void heap_arm(int64_t fails); /* -1: none fails, all are counted */

#endif
