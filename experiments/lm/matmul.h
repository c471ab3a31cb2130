/* SPDX-License-Identifier: Apache-2.0 */
/* matmul.h: activations times weights. */
#ifndef SPARGE_LM_MATMUL_H
#define SPARGE_LM_MATMUL_H

#include "experiments/lm/checkpoint.h"

/* y [rows][w->rows] = x [rows][w->columns] w^T, plus `bias` [w->rows] in every row unless it is
 * NULL. Weights become floats a few rows at a time. False: no memory. */
bool matmul(const float *x, int64_t rows, const tensor *w, const tensor *bias, float *y);

/* What computes it: "oneDNN", "OpenBLAS" or "plain". */
const char *matmul_by(void);

#endif
