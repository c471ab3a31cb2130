/* SPDX-License-Identifier: Apache-2.0 */
/* entries.h: the methods, each in the file of its name. */
#ifndef SPARGE_METHODS_ENTRIES_H
#define SPARGE_METHODS_ENTRIES_H

#include "sparge_methods.h"

/* yardsticks.c */
extern const sparge_method sparge_method_dense, sparge_method_random, sparge_method_window,
    sparge_method_oracle_mass, sparge_method_oracle_mass_t, sparge_method_oracle_pairs;
/* spargeattn.c */
extern const sparge_method sparge_method_spargeattn, sparge_method_spargeattn_paper,
    sparge_method_spargeattn_upstream;
/* Each in the file of its name. */
extern const sparge_method sparge_method_blasst, sparge_method_flexprefill, sparge_method_hess,
    sparge_method_minference, sparge_method_moa, sparge_method_moa_calibrated, sparge_method_moba,
    sparge_method_pbs, sparge_method_pbs_t, sparge_method_pisa0, sparge_method_powerattention,
    sparge_method_radial, sparge_method_s2, sparge_method_strata, sparge_method_submass,
    sparge_method_xattention, sparge_method_xattention_t;
extern const sparge_method sparge_method_kinetics, sparge_method_proxyattn, sparge_method_seer,
    sparge_method_spargeattention2;
/* Of video and diffusion, the same. */
extern const sparge_method sparge_method_biformer, sparge_method_draft, sparge_method_svg,
    sparge_method_sparsed, sparge_method_sparsevdit;

#endif
