/* SPDX-License-Identifier: Apache-2.0 */
/* entries.h: the methods, by name: each is in the file of its name, of which _t, _calibrated, 0 ...
 * are variants, or in yardsticks.c. */
#ifndef SPARGE_METHODS_ENTRIES_H
#define SPARGE_METHODS_ENTRIES_H

#include "sparge_methods.h"

/* In the order of their names, in which they are told. */
/* clang-format off */
#define SPARGE_METHODS(X) \
    X(biformer) X(blasst) X(blockrank) X(dense) X(draft) \
    X(flexprefill) X(hess) X(kinetics) X(minference) X(moa) \
    X(moa_calibrated) X(moba) X(oracle_mass) X(oracle_mass_t) X(oracle_pairs) \
    X(pbs) X(pbs_t) X(pisa0) X(powerattention) X(proxyattn) \
    X(proxyattn_t) X(radial) X(random) X(s2) X(seer) \
    X(spargeattention2) X(spargeattn) X(spargeattn_paper) X(spargeattn_upstream) X(sparsed) \
    X(sparsevdit) X(strata) X(submass) X(svg) X(window) \
    X(xattention) X(xattention_t)
/* clang-format on */

#define SPARGE_DECLARE_METHOD(name) extern const sparge_method sparge_method_##name;
SPARGE_METHODS(SPARGE_DECLARE_METHOD)
#undef SPARGE_DECLARE_METHOD

#endif
