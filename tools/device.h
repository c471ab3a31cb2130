/* device.h: the calls of sparge.h for a program whose arrays are all in host memory: under the cuda
 * backend they go to the device before the call and come back after it. */
#ifndef SPARGE_TOOLS_DEVICE_H
#define SPARGE_TOOLS_DEVICE_H

#include "sparge.h"

/* An array of the host, and where the backend finds it: on cuda memory of its own, else the same.
 * put copies it to the device, get back. */
typedef struct device_memory {
    void *host, *device;
    int64_t bytes;
} device_memory;

sparge_status device_memory_make(sparge_backend backend, void *host, int64_t bytes,
                                 device_memory *to, sparge_error *error);
sparge_status device_memory_put(const device_memory *to, sparge_error *error);
sparge_status device_memory_get(const device_memory *from, sparge_error *error);
void device_memory_free(device_memory *from); /* all zero is fine */

int64_t device_mask_bytes(const sparge_mask *mask);

/* As the functions of those names. Arrays have no gaps; their axes may be in any order. `seconds`
 * are those of the call itself, without the copies. */
sparge_status device_predict(const sparge_problem *problem, const sparge_options *options,
                             sparge_mask *mask, const sparge_intermediates *intermediates,
                             double *seconds, sparge_error *error);
sparge_status device_attend(const sparge_problem *problem, const sparge_options *options,
                            const sparge_mask *mask, sparge_result *result, double *seconds,
                            sparge_error *error);
sparge_status device_attention(const sparge_problem *problem, const sparge_options *options,
                               sparge_result *result, double *seconds, sparge_error *error);

#endif
