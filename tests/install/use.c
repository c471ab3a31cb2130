/* SPDX-License-Identifier: Apache-2.0 */
/* use.c: a program on the installed library. Attention over one value is that value. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparge.h"

enum { N = 256, D = 64 };

static float q[N * D], k[N * D], v[N * D], o[N * D];

int main(void)
{
    for (int x = 0; x < N * D; x++) {
        q[x] = (float)rand() / (float)RAND_MAX - 0.5f;
        k[x] = (float)rand() / (float)RAND_MAX - 0.5f;
        v[x] = 0.75f;
    }
    const sparge_problem problem = {.batch = 1,
                                    .heads = 1,
                                    .kv_heads = 1,
                                    .q_len = N,
                                    .k_len = N,
                                    .dim = D,
                                    .dim_v = D,
                                    .q = {q, SPARGE_F32, N * D, N * D, D},
                                    .k = {k, SPARGE_F32, N * D, N * D, D},
                                    .v = {v, SPARGE_F32, N * D, N * D, D}};
    if (strcmp(SPARGE_VERSION, VERSION) != 0)
        return fprintf(stderr, "the header is of %s, not %s\n", SPARGE_VERSION, VERSION), 1;
    const sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
    sparge_result result = {.o = {o, SPARGE_F32, N * D, N * D, D}};
    sparge_error error;
    if (sparge_attention(&problem, &options, &result, &error) != SPARGE_OK)
        return fprintf(stderr, "%s\n", error.text), 1;
    for (int x = 0; x < N * D; x++)
        if (!(fabsf(o[x] - 0.75f) < 0.01f))
            return fprintf(stderr, "o[%d] is %g\n", x, o[x]), 1;
    puts("fine");
    return 0;
}
