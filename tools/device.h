/* device.h: the calls of sparge.h for a program whose arrays are all in host memory: under the cuda
 * backend they go to the device before the call and come back after it. */
#ifndef SPARGE_TOOLS_DEVICE_H
#define SPARGE_TOOLS_DEVICE_H

#include "sparge.h"

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
