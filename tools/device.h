/* SPDX-License-Identifier: Apache-2.0 */
/* device.h: the calls of sparge.h for a program whose arrays are all in host memory: under the cuda
 * backend they go to the device before the call and come back after it. */
#ifndef SPARGE_TOOLS_DEVICE_H
#define SPARGE_TOOLS_DEVICE_H

#include "sparge_methods.h"

/* An array of the host, and where the backend finds it: on cuda memory of its own, else the same.
 * put copies it to the device, get back. What fails here and below ends the program. */
typedef struct device_memory {
    void *host, *device;
    int64_t bytes;
} device_memory;

void device_memory_make(sparge_backend backend, void *host, int64_t bytes, device_memory *to);
void device_memory_put(const device_memory *to);
void device_memory_get(const device_memory *from);
void device_memory_free(device_memory *from); /* all zero is fine */

int64_t device_mask_bytes(const sparge_mask *mask);

/* sparge_predict; and sparge_attend, or sparge_attention if it predicts the mask.
 * Arrays have no gaps; their axes may be in any order. They return the seconds of the call itself,
 * without the copies. */
double device_predict(const sparge_problem *problem, const sparge_options *options,
                      sparge_mask *mask, const sparge_intermediates *intermediates);
double device_attend(const sparge_problem *problem, const sparge_options *options,
                     const sparge_mask *mask, bool predicts, sparge_result *result);

/* The same for plans, and the seconds of all its calls so far. */
extern const sparge_executor device_executor;
double device_seconds(void);

#endif
