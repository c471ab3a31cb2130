/* SPDX-License-Identifier: Apache-2.0 */
/* agree.h: one question to the reference and to the cpu backend, on every instruction set that is
 * here: masks, intermediates, counters, o and lse, bit for bit. For cpu.c and fuzz/differential.c.
 */
#ifndef SPARGE_TESTS_AGREE_H
#define SPARGE_TESTS_AGREE_H

#include "tests/support/problem.h"

enum { FIRST_ISA = SPARGE_ISA_SCALAR, LAST_ISA = SPARGE_ISAS - 1 };

/* Of its products. */
extern const sparge_dtype cpu_dtypes[4];

typedef enum way { ATTEND, ATTENTION } way; /* over x's mask; both stages */

typedef struct reply {
    answer a;
    sparge_mask mask; /* what ATTENTION predicted */
} reply;

/* A mask of the shape of x's, with words to spare and all bits set; the spare ones are to become 0.
 */
sparge_mask wide_mask(const problem *x, int64_t spare);
reply ask(const problem *x, way how, sparge_dtype dtype, tensor_layout layout, int64_t spare);
void forget(reply *r);

void same_everything(const problem *x, const answer *got, const answer *want);
void same_mask(const sparge_mask *got, const sparge_mask *want);

typedef struct totals {
    int64_t cases, pairs, kept, skipped; /* P.V skipped, in tiles */
} totals;

/* On every instruction set, with each of these numbers of threads (a list that ends with 0). Those
 * without bf16 refuse it by name; the others are held to the reference in their order. */
void verify_with(problem *x, way how, sparge_dtype dtype, tensor_layout layout, const int *threads,
                 totals *sum);

int64_t channels_at_random(void);

#endif
