/* device.c: a problem and its result where the backend wants them: on the device, or where they
 * are. */
#include "tools/device.h"

#include <string.h>

#include "tools/intermediates.h"
#include "tools/progress.h"

enum { PIECES = 32 }; /* q, k, v, o, lse, a mask, counts and the intermediates are less */

typedef struct piece {
    void *there, *home; /* home: where it comes back to, or NULL */
    int64_t bytes;
} piece;

/* The structures of sparge.h once more, with pointers that the backend can follow. */
typedef struct device {
    bool remote; /* is that memory of its own? */
    sparge_problem problem;
    sparge_mask mask;
    sparge_intermediates intermediates;
    sparge_result result;
    piece piece[PIECES];
    int pieces;
    sparge_status status; /* of the first step that failed; the later ones do nothing */
    sparge_error *error;
} device;

/* Memory for an array, filled `from` the host and to come back `home`, each or NULL. */
static void *place(device *d, const void *from, void *home, int64_t bytes)
{
    void *there = NULL;
    if (!d->remote)
        return home ? home : (void *)from;
    if (!d->status) /* what is empty has an address too */
        d->status = sparge_device_alloc(bytes > 0 ? bytes : 1, &there, d->error);
    if (d->status)
        return NULL;
    d->piece[d->pieces++] = (piece){there, home, bytes};
    if (from)
        d->status = sparge_device_copy(there, from, bytes, d->error);
    return there;
}

static void *place_mask(device *d, const uint32_t *from, uint32_t *home)
{
    const sparge_mask *m = &d->mask;
    return place(d, from, home,
                 m->batch * m->heads * m->q_blocks * m->words * (int64_t)sizeof *m->bits);
}

static int64_t size_of(sparge_dtype dtype) { return dtype == SPARGE_F32 ? 4 : 2; }

static void place_input(device *d, sparge_in *in, int64_t heads, int64_t tokens, int64_t channels)
{
    const int64_t elements = d->problem.batch * heads * tokens * channels;
    if (in->data)
        in->data = place(d, in->data, NULL, elements * size_of(in->dtype));
}

static device begin(const sparge_problem *p, const sparge_options *o, sparge_error *error)
{
    device d = {.remote = o->backend == SPARGE_CUDA, .problem = *p, .error = error};
    place_input(&d, &d.problem.q, p->heads, p->q_len, p->dim);
    place_input(&d, &d.problem.k, p->kv_heads, p->k_len, p->dim);
    place_input(&d, &d.problem.v, p->kv_heads, p->k_len, p->dim_v);
    return d;
}

static const sparge_intermediates *place_trace(device *d, const sparge_options *o,
                                               const sparge_intermediates *intermediates)
{
    for (int n = 0; n < STAGES && intermediates; n++) {
        void *home = NULL;
        if (stage_recorded(n))
            memcpy(&home, (const char *)intermediates + stages[n].field, sizeof home);
        if (!home)
            continue;
        home = place(d, home, home,
                     stage_bytes(n, &d->problem, o)); /* some of it may be left as it was */
        memcpy((char *)&d->intermediates + stages[n].field, &home, sizeof home);
    }
    return intermediates ? &d->intermediates : NULL;
}

static void place_result(device *d, const sparge_options *o, const sparge_result *result)
{
    const sparge_problem *p = &d->problem;
    const int64_t heads = p->batch * p->heads, rows = heads * p->q_len;
    sparge_result *r = &d->result;
    *r = *result;
    r->o.data = place(d, NULL, r->o.data, rows * p->dim_v * size_of(r->o.dtype));
    if (r->lse)
        r->lse = place(d, NULL, r->lse, rows * (int64_t)sizeof *r->lse);
    if (r->head_counts)
        r->head_counts = place(d, NULL, r->head_counts, heads * (int64_t)sizeof *r->head_counts);
    r->intermediates = place_trace(d, o, result->intermediates);
}

/* Brings everything home, unless something failed. */
static sparge_status finish(device *d)
{
    for (const piece *p = d->piece; p < d->piece + d->pieces; p++) {
        if (p->home && !d->status)
            d->status = sparge_device_copy(p->home, p->there, p->bytes, d->error);
        sparge_device_free(p->there);
    }
    return d->status;
}

/* What the call has filled in beside the arrays. */
static void fill_in(sparge_result *result, const sparge_result *there)
{
    const sparge_result home = *result;
    *result = *there;
    result->o = home.o;
    result->lse = home.lse;
    result->mask = home.mask;
    result->intermediates = home.intermediates;
    result->head_counts = home.head_counts;
}

sparge_status device_predict(const sparge_problem *problem, const sparge_options *options,
                             sparge_mask *mask, const sparge_intermediates *intermediates,
                             double *seconds, sparge_error *error)
{
    device d = begin(problem, options, error);
    d.mask = *mask;
    d.mask.bits = place_mask(&d, NULL, mask->bits);
    intermediates = place_trace(&d, options, intermediates);
    const double start = progress_clock();
    if (!d.status)
        d.status = sparge_predict(&d.problem, options, &d.mask, intermediates, error);
    *seconds = progress_clock() - start;
    return finish(&d);
}

sparge_status device_attend(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_result *result, double *seconds,
                            sparge_error *error)
{
    device d = begin(problem, options, error);
    place_result(&d, options, result);
    if (mask) {
        d.mask = *mask;
        d.mask.bits = place_mask(&d, mask->bits, NULL);
    }
    const double start = progress_clock();
    if (!d.status)
        d.status = sparge_attend(&d.problem, options, mask ? &d.mask : NULL, &d.result, error);
    *seconds = progress_clock() - start;
    fill_in(result, &d.result);
    return finish(&d);
}

sparge_status device_attention(const sparge_problem *problem, const sparge_options *options,
                               sparge_result *result, double *seconds, sparge_error *error)
{
    device d = begin(problem, options, error);
    place_result(&d, options, result);
    if (result->mask) {
        d.mask = *result->mask;
        d.mask.bits = place_mask(&d, NULL, d.mask.bits);
        d.result.mask = &d.mask;
    }
    const double start = progress_clock();
    if (!d.status)
        d.status = sparge_attention(&d.problem, options, &d.result, error);
    *seconds = progress_clock() - start;
    fill_in(result, &d.result);
    return finish(&d);
}
