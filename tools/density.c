/* SPDX-License-Identifier: Apache-2.0 */
/* density.c: bisects tau over all floats of [0, 1]. */
#include "tools/density.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "sparge_mask.h"
#include "tools/device.h"
#include "tools/kept.h"
#include "tools/progress.h"

/* Floats from 0 to 1 are ordered as their bits are. */
static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static double density_at(const sparge_problem *p, sparge_options *o, sparge_mask *mask,
                         sparge_counts *counts, uint32_t tau)
{
    o->thresholds.tau = float_of(tau);
    device_predict(p, o, mask, NULL);
    must_sparge(sparge_mask_count(mask, p, o, counts, &library_error));
    const sparge_counts sum = kept_sum(counts, p->batch * p->heads);
    return sum.tokens ? sparge_density_tokens(&sum) : NAN;
}

void density_find(const sparge_problem *p, sparge_options *o, double wanted)
{
    enum { ONE = 0x3f800000 };
    sparge_mask mask;
    sparge_counts *counts =
        must_alloc((size_t)(p->batch * p->heads), sizeof *counts, "the counters of the heads");
    must_sparge(sparge_mask_alloc(&mask, p, o, &library_error));
    progress watch = progress_begin("density");
    o->progress = progress_goes_on;
    o->user = &watch;
    uint32_t low = 0, high = ONE;
    double below = density_at(p, o, &mask, counts, low);
    double above = density_at(p, o, &mask, counts, high);
    if (isnan(below))
        fail(EXIT_USAGE, NULL, "--density %g cannot be reached: no query sees a key", wanted);
    if (!(wanted >= below && wanted <= above))
        fail(EXIT_USAGE, NULL,
             "--density %g cannot be reached: from tau 0 to 1 it goes from %.6g to %.6g; a lower "
             "--theta or smaller blocks reach further down",
             wanted, below, above);
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        const double density = density_at(p, o, &mask, counts, middle);
        const bool fits = density <= wanted;
        *(fits ? &low : &high) = middle;
        *(fits ? &below : &above) = density;
        if (!progress_tick(&watch, 1.0 - log2((double)(high - low)) / 30.0))
            must_sparge(SPARGE_ERR_CANCELLED);
    }
    o->thresholds.tau = float_of(wanted - below <= above - wanted ? low : high);
    progress_end(&watch);
    sparge_mask_free(&mask);
    free(counts);
}
