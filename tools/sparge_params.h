/* SPDX-License-Identifier: Apache-2.0 */
/* sparge_params.h: thresholds of sparge tune for programs that use libsparge: link
 * libsparge_params, jansson and libcrypto as well (CMake: sparge::sparge_params).
 *
 *     sparge_thresholds thresholds[9];
 *     if (sparge_params_load("params.json", "SmolLM2-135M-Instruct", layer, 9, &options,
 * thresholds, &error) == SPARGE_OK) options.per_head = thresholds;
 */
#ifndef SPARGE_PARAMS_H
#define SPARGE_PARAMS_H

#include "sparge.h"

#ifdef __cplusplus
extern "C" {
#endif
#ifdef __GNUC__
#pragma GCC visibility push(default)
#endif

/* The thresholds of query heads 0 .. heads - 1 of a layer. SPARGE_ERR_ARGUMENT where the file
 * cannot be read, or is cut short, or lacks a head, or is for another model (NULL: any), or was
 * tuned under other options than these: rules, block sizes, cell, skip_rows, causal, smooth_k,
 * sink, scale. */
sparge_status sparge_params_load(const char *path, const char *model, int64_t layer, int64_t heads,
                                 const sparge_options *options, sparge_thresholds *thresholds,
                                 sparge_error *error);

#ifdef __GNUC__
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
