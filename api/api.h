/* SPDX-License-Identifier: Apache-2.0 */
/* api.h: what the files of api/ share. A public call checks its arguments once, resolves the
 * options and hands over to a backend, which asserts nothing again. */
#ifndef SPARGE_API_API_H
#define SPARGE_API_API_H

#include "common/arithmetic.h"
#include "common/error.h"
#include "sparge_inspect.h"

/* ---- check.c ---- */

/* Can a * b * c * d things of this size be counted in bytes? */
bool sparge_fits(int64_t a, int64_t b, int64_t c, int64_t d, size_t size);

bool sparge_same_version(int a, int b);

/* What all calls have in common. A mask of NULL is dense. */
sparge_status sparge_check(const sparge_problem *p, const sparge_options *o, bool needs_v,
                           const sparge_mask *mask, sparge_error *error);
sparge_status sparge_check_partials(const sparge_mask *mask, sparge_error *error);
sparge_status sparge_check_part(const sparge_problem *p, const sparge_partial *part, int n,
                                sparge_error *error);
sparge_status sparge_check_result(const sparge_problem *p, const sparge_result *result,
                                  sparge_error *error);

/* ---- options.c: on checked options ---- */

/* mask: to attend over; NULL: one without partly attended blocks. */
sparge_status sparge_resolve(const sparge_problem *p, sparge_options *o, const sparge_mask *mask,
                             sparge_error *error);
float sparge_softmax_scale(const sparge_problem *p, const sparge_options *o);
sparge_status sparge_resolve_cpu(sparge_options *o, sparge_error *error);

/* ---- mask.c ---- */

/* A mask of the problem's shape without bits, and then bits of 0 for it. */
sparge_status sparge_mask_shape(sparge_mask *mask, const sparge_problem *p, const sparge_options *o,
                                sparge_error *error);
sparge_status sparge_mask_alloc_bits(sparge_mask *mask, sparge_error *error);

#endif
