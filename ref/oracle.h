/* SPDX-License-Identifier: Apache-2.0 */
/* oracle.h: what api/ calls once arguments are checked. Apart from ref.h, so that the oracle
 * sees nothing of what it judges. */
#ifndef SPARGE_REF_ORACLE_H
#define SPARGE_REF_ORACLE_H

#include "sparge_inspect.h"

/* As sparge_oracle in sparge.h. */
sparge_status sparge_ref_oracle(const sparge_problem *problem, const sparge_options *options,
                                const sparge_mask *mask, sparge_oracle_mode mode, double *o,
                                double *lse, double *block_mass);

#endif
