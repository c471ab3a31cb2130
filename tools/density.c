/* density.c: bisects tau over all floats of [0, 1]. */
#include "tools/density.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/device.h"
#include "tools/intermediates.h"
#include "tools/kept.h"
#include "tools/progress.h"

typedef struct finder {
    const sparge_problem *p;
    sparge_options *o;
    sparge_mask mask;
    sparge_counts *counts; /* [batch][heads] */
} finder;

/* Floats from 0 to 1 are ordered as their bits are. */
static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static exit_code density_at(finder *f, uint32_t tau, double *density, file_error *error)
{
    double seconds;
    sparge_error why;
    array keep;
    f->o->thresholds.tau = float_of(tau);
    const exit_code code =
        library_result(device_predict(f->p, f->o, &f->mask, NULL, &seconds, &why), &why, error);
    if (code)
        return code;
    if (!mask_array(&f->mask, f->p, f->o, &keep, error))
        return EXIT_MACHINE;
    kept_counts(&keep, f->p, f->o, f->counts);
    const sparge_counts sum = kept_sum(f->counts, f->p->batch * f->p->heads);
    *density = kept_density(&sum);
    array_free(&keep);
    return EXIT_FINE;
}

static exit_code bisect(finder *f, double wanted, file_error *error)
{
    enum { ONE = 0x3f800000 };
    uint32_t low = 0, high = ONE;
    double below, above;
    exit_code code = density_at(f, low, &below, error);
    if (!code)
        code = density_at(f, high, &above, error);
    if (code)
        return code;
    if (isnan(below)) {
        file_error_set(error, NULL, "--density %g cannot be reached: no query sees a key", wanted);
        return EXIT_USAGE;
    }
    if (!(wanted >= below && wanted <= above)) {
        file_error_set(
            error, NULL,
            "--density %g cannot be reached: from tau 0 to 1 it goes from %.6g to %.6g; a "
            "lower --theta or smaller blocks reach further down",
            wanted, below, above);
        return EXIT_USAGE;
    }
    while (high - low > 1 && !code) {
        const uint32_t middle = low + (high - low) / 2;
        double density = 0.0;
        code = density_at(f, middle, &density, error);
        const bool fits = density <= wanted;
        *(fits ? &low : &high) = middle;
        *(fits ? &below : &above) = density;
        if (!progress_tick(f->o->user, 1.0 - log2((double)(high - low)) / 30.0) && !code)
            code = library_result(SPARGE_ERR_CANCELLED, NULL, error);
    }
    f->o->thresholds.tau = float_of(wanted - below <= above - wanted ? low : high);
    return code;
}

exit_code density_find(const sparge_problem *p, sparge_options *o, double wanted, file_error *error)
{
    finder f = {
        .p = p, .o = o, .counts = calloc((size_t)(p->batch * p->heads) + 1, sizeof *f.counts)};
    sparge_error why;
    exit_code code = library_result(sparge_mask_alloc(&f.mask, p, o, &why), &why, error);
    if (!code && !f.counts) {
        file_error_set(error, NULL, "no memory for the counters of %lld heads",
                       (long long)(p->batch * p->heads));
        code = EXIT_MACHINE;
    }
    progress watch = progress_begin("density");
    o->progress = progress_goes_on;
    o->user = &watch;
    if (!code)
        code = bisect(&f, wanted, error);
    progress_end(&watch);
    sparge_mask_free(&f.mask);
    free(f.counts);
    return code;
}
