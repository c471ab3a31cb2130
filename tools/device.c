/* device.c: a problem and its result where the backend wants them: on the device, or where they
 * are. */
#include "tools/device.h"

#include <string.h>

#include "tools/intermediates.h"
#include "tools/progress.h"

enum { PIECES = 32 }; /* q, k, v, o, lse, a mask, counts and the intermediates are less */

/* The structures of sparge.h once more, with pointers that the backend can follow. */
typedef struct device {
    sparge_backend backend;
    sparge_problem problem;
    sparge_mask mask;
    sparge_intermediates intermediates;
    sparge_result result;
    device_memory piece[PIECES];
    bool back[PIECES]; /* does it come back to the host? */
    int pieces;
    sparge_status status; /* of the first step that failed; the later ones do nothing */
    sparge_error *error;
} device;

sparge_status device_memory_make(sparge_backend backend, void *host, int64_t bytes,
                                 device_memory *to, sparge_error *error)
{
    *to = (device_memory){host, host, bytes};
    if (backend != SPARGE_CUDA)
        return SPARGE_OK;
    to->device = NULL; /* what is empty has an address too */
    return sparge_device_alloc(bytes > 0 ? bytes : 1, &to->device, error);
}

sparge_status device_memory_put(const device_memory *to, sparge_error *error)
{
    return to->device == to->host ? SPARGE_OK
                                  : sparge_device_copy(to->device, to->host, to->bytes, error);
}

sparge_status device_memory_get(const device_memory *from, sparge_error *error)
{
    return from->device == from->host
               ? SPARGE_OK
               : sparge_device_copy(from->host, from->device, from->bytes, error);
}

void device_memory_free(device_memory *from)
{
    if (from->device != from->host)
        sparge_device_free(from->device);
    *from = (device_memory){0};
}

/* Where the backend finds an array of the host: it is filled from there, or comes back, or both. */
static void *place(device *d, const void *host, bool fill, bool back, int64_t bytes)
{
    if (d->status)
        return NULL;
    device_memory *const m = &d->piece[d->pieces];
    d->back[d->pieces++] = back;
    d->status = device_memory_make(d->backend, (void *)host, bytes, m, d->error);
    if (!d->status && fill)
        d->status = device_memory_put(m, d->error);
    return m->device;
}

static void *place_mask(device *d, const uint32_t *bits, bool fill)
{
    return place(d, bits, fill, !fill, device_mask_bytes(&d->mask));
}

int64_t device_mask_bytes(const sparge_mask *m)
{
    return m->batch * m->heads * m->q_blocks * m->words * (int64_t)sizeof *m->bits;
}

static int64_t size_of(sparge_dtype dtype) { return dtype == SPARGE_F32 ? 4 : 2; }

static void place_input(device *d, sparge_in *in, int64_t heads, int64_t tokens, int64_t channels)
{
    const int64_t elements = d->problem.batch * heads * tokens * channels;
    if (in->data)
        in->data = place(d, in->data, true, false, elements * size_of(in->dtype));
}

static device begin(const sparge_problem *p, const sparge_options *o, sparge_error *error)
{
    device d = {.backend = o->backend, .problem = *p, .error = error};
    place_input(&d, &d.problem.q, p->heads, p->q_len, p->dim);
    place_input(&d, &d.problem.k, p->kv_heads, p->k_len, p->dim);
    place_input(&d, &d.problem.v, p->kv_heads, p->k_len, p->dim_v);
    return d;
}

static const sparge_intermediates *place_trace(device *d, const sparge_options *o,
                                               const sparge_intermediates *intermediates)
{
    for (int n = 0; n < STAGES && intermediates; n++) {
        void *at = NULL;
        if (stage_recorded(n))
            memcpy(&at, (const char *)intermediates + stages[n].field, sizeof at);
        if (!at)
            continue;
        at = place(d, at, true, true,
                   stage_bytes(n, &d->problem, o)); /* some of it may be left as it was */
        memcpy((char *)&d->intermediates + stages[n].field, &at, sizeof at);
    }
    return intermediates ? &d->intermediates : NULL;
}

static void place_result(device *d, const sparge_options *o, const sparge_result *result)
{
    const sparge_problem *p = &d->problem;
    const int64_t heads = p->batch * p->heads, rows = heads * p->q_len;
    sparge_result *r = &d->result;
    *r = *result;
    r->o.data = place(d, r->o.data, false, true, rows * p->dim_v * size_of(r->o.dtype));
    if (r->lse)
        r->lse = place(d, r->lse, false, true, rows * (int64_t)sizeof *r->lse);
    if (r->head_counts)
        r->head_counts =
            place(d, r->head_counts, false, true, heads * (int64_t)sizeof *r->head_counts);
    r->intermediates = place_trace(d, o, result->intermediates);
}

/* Brings everything back, unless something failed. */
static sparge_status finish(device *d)
{
    for (int n = 0; n < d->pieces; n++) {
        if (d->back[n] && !d->status)
            d->status = device_memory_get(&d->piece[n], d->error);
        device_memory_free(&d->piece[n]);
    }
    return d->status;
}

/* What the call has filled in beside the arrays. */
static void fill_in(sparge_result *result, const sparge_result *ran)
{
    const sparge_result host = *result;
    *result = *ran;
    result->o = host.o;
    result->lse = host.lse;
    result->mask = host.mask;
    result->intermediates = host.intermediates;
    result->head_counts = host.head_counts;
}

sparge_status device_predict(const sparge_problem *problem, const sparge_options *options,
                             sparge_mask *mask, const sparge_intermediates *intermediates,
                             double *seconds, sparge_error *error)
{
    device d = begin(problem, options, error);
    d.mask = *mask;
    d.mask.bits = place_mask(&d, mask->bits, false);
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
        d.mask.bits = place_mask(&d, mask->bits, true);
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
        d.mask.bits = place_mask(&d, d.mask.bits, false);
        d.result.mask = &d.mask;
    }
    const double start = progress_clock();
    if (!d.status)
        d.status = sparge_attention(&d.problem, options, &d.result, error);
    *seconds = progress_clock() - start;
    fill_in(result, &d.result);
    return finish(&d);
}
