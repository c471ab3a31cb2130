/* SPDX-License-Identifier: Apache-2.0 */
/* device.c: a problem and its result where the backend wants them: on the device, or where they
 * are. */
#include "tools/device.h"

#include <string.h>

#include "common/block_mask.h"
#include "common/element.h"
#include "sparge_cuda.h"
#include "tools/intermediates.h"
#include "tools/progress.h"

enum { PIECES = 32 }; /* q, k, v, k_bias, o, lse, a mask, counts and the intermediates are less */

/* The structures of sparge.h once more, with pointers that the backend can follow. */
typedef struct device {
    const sparge_options *options;
    sparge_problem problem;
    sparge_mask mask;
    sparge_intermediates intermediates;
    device_memory piece[PIECES];
    bool back[PIECES]; /* does it come back to the host? */
    int pieces;
} device;

void device_memory_make(sparge_backend backend, void *host, int64_t bytes, device_memory *to)
{
    *to = (device_memory){host, host, bytes};
    if (backend == SPARGE_CUDA) /* what is empty has an address too */
        must_sparge(sparge_device_alloc(bytes > 0 ? bytes : 1, &to->device, &library_error));
}

void device_memory_put(const device_memory *to)
{
    if (to->device != to->host)
        must_sparge(sparge_device_copy(to->device, to->host, to->bytes, &library_error));
}

void device_memory_get(const device_memory *from)
{
    if (from->device != from->host)
        must_sparge(sparge_device_copy(from->host, from->device, from->bytes, &library_error));
}

void device_memory_free(device_memory *from)
{
    if (from->device != from->host)
        sparge_device_free(from->device);
    *from = (device_memory){0};
}

int64_t device_mask_bytes(const sparge_mask *m)
{
    return m->batch * m->heads * m->q_blocks * m->words * (int64_t)sizeof *m->bits;
}

/* Where the backend finds an array of the host: it is filled from there, or comes back, or both. */
static void *place(device *d, const void *host, bool fill, bool back, int64_t bytes)
{
    device_memory *const m = &d->piece[d->pieces];
    if (!host)
        return NULL;
    d->back[d->pieces++] = back;
    device_memory_make(d->options->backend, (void *)host, bytes, m);
    if (fill)
        device_memory_put(m);
    return m->device;
}

static const void *place_input(device *d, const sparge_in *in, int64_t elements)
{
    return place(d, in->data, true, false, elements * sparge_element_size(in->dtype));
}

static device begin(const sparge_problem *p, const sparge_options *o)
{
    device d = {.options = o, .problem = *p};
    const int64_t keys = p->batch * p->kv_heads * p->k_len;
    d.problem.q.data = place_input(&d, &p->q, p->batch * p->heads * p->q_len * p->dim);
    d.problem.k.data = place_input(&d, &p->k, keys * p->dim);
    d.problem.v.data = place_input(&d, &p->v, keys * p->dim_v);
    d.problem.k_bias = place(&d, p->k_bias, true, false, keys * (int64_t)sizeof *p->k_bias);
    return d;
}

/* A mask that is an input, or the place of a result. NULL stays. */
static sparge_mask *place_mask(device *d, const sparge_mask *mask, bool is_input)
{
    if (!mask)
        return NULL;
    d->mask = *mask;
    d->mask.bits = place(d, mask->bits, is_input, !is_input, device_mask_bytes(mask));
    if (mask->partial_first) { /* of an input alone */
        const int64_t rows = mask->batch * mask->heads * mask->q_blocks,
                      partials = mask->partial_first[rows];
        d->mask.partial_first =
            place(d, mask->partial_first, true, false, (rows + 1) * (int64_t)sizeof(int64_t));
        d->mask.partial_block =
            place(d, mask->partial_block, true, false, partials * (int64_t)sizeof(int32_t));
        d->mask.partial_bits =
            place(d, mask->partial_bits, true, false,
                  partials * d->options->block_q * sparge_mask_row_words(d->options->block_k) *
                      (int64_t)sizeof(uint32_t));
    }
    return &d->mask;
}

static const sparge_intermediates *place_intermediates(device *d, const sparge_intermediates *from)
{
    for (int n = 0; n < INTERMEDIATE_COUNT && from; n++) {
        void *at = NULL;
        if (intermediate_recorded(n))
            memcpy(&at, (const char *)from + intermediate_table[n].field, sizeof at);
        /* Some of it may be left as it was. */
        at = place(d, at, true, true, intermediate_bytes(n, &d->problem, d->options));
        if (at)
            memcpy((char *)&d->intermediates + intermediate_table[n].field, &at, sizeof at);
    }
    return from ? &d->intermediates : NULL;
}

static sparge_result place_result(device *d, const sparge_result *result)
{
    const sparge_problem *p = &d->problem;
    const int64_t heads = p->batch * p->heads, rows = heads * p->q_len;
    sparge_result r = *result;
    r.o.data = place(d, r.o.data, false, true, rows * p->dim_v * sparge_element_size(r.o.dtype));
    r.lse = place(d, r.lse, false, true, rows * (int64_t)sizeof *r.lse);
    r.head_counts = place(d, r.head_counts, false, true, heads * (int64_t)sizeof *r.head_counts);
    r.intermediates = place_intermediates(d, result->intermediates);
    return r;
}

/* Brings everything back. */
static void finish(device *d)
{
    for (int n = 0; n < d->pieces; n++) {
        if (d->back[n])
            device_memory_get(&d->piece[n]);
        device_memory_free(&d->piece[n]);
    }
}

double device_predict(const sparge_problem *problem, const sparge_options *options,
                      sparge_mask *mask, const sparge_intermediates *intermediates)
{
    device d = begin(problem, options);
    sparge_mask *to = place_mask(&d, mask, false);
    intermediates = place_intermediates(&d, intermediates);
    const double start = progress_clock();
    must_sparge(sparge_predict(&d.problem, options, to, intermediates, &library_error));
    const double seconds = progress_clock() - start;
    finish(&d);
    return seconds;
}

double device_attend(const sparge_problem *problem, const sparge_options *options,
                     const sparge_mask *mask, bool predicts, sparge_result *result)
{
    device d = begin(problem, options);
    const sparge_result host = *result;
    sparge_mask *over = place_mask(&d, predicts ? host.mask : mask, !predicts);
    *result = place_result(&d, &host);
    result->mask = predicts ? over : NULL;
    const double start = progress_clock();
    must_sparge(predicts ? sparge_attention(&d.problem, options, result, &library_error)
                         : sparge_attend(&d.problem, options, over, result, &library_error));
    const double seconds = progress_clock() - start;
    finish(&d);
    result->o = host.o;
    result->lse = host.lse;
    result->mask = host.mask;
    result->intermediates = host.intermediates;
    result->head_counts = host.head_counts;
    return seconds;
}

/* ---- Plans ---- */

static double seconds;

double device_seconds(void) { return seconds; }

static sparge_status predict(const sparge_problem *problem, const sparge_options *options,
                             sparge_mask *mask, const sparge_intermediates *intermediates,
                             sparge_error *error)
{
    (void)error; /* what fails ends the program */
    seconds += device_predict(problem, options, mask, intermediates);
    return SPARGE_OK;
}

static sparge_status attend(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_result *result, sparge_error *error)
{
    (void)error;
    seconds += device_attend(problem, options, mask, false, result);
    return SPARGE_OK;
}

static sparge_status attention(const sparge_problem *problem, const sparge_options *options,
                               sparge_result *result, sparge_error *error)
{
    (void)error;
    seconds += device_attend(problem, options, NULL, true, result);
    return SPARGE_OK;
}

const sparge_executor device_executor = {predict, attend, attention};
