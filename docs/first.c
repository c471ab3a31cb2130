/* SPDX-License-Identifier: Apache-2.0 */
/* first.c: attention over a capture of this project; README.md says how to compile it. */
#include <sparge.h>
#include <stdio.h>

enum { H = 3, N = 4096, D = 64 }; /* query heads of one key head, tokens, channels */

static uint16_t k[N * D], q[H * N * D], v[N * D]; /* float16 */
static float o[H * N * D];

int main(void)
{
    FILE *f = fopen("experiments/capture/smollm2-135m/layer12_group1.safetensors", "rb");
    if (!f || fseek(f, 8 + 224, SEEK_SET) || !fread(k, sizeof k, 1, f) ||
        !fread(q, sizeof q, 1, f) || !fread(v, sizeof v, 1, f))
        return 1;
    fclose(f);
    sparge_problem problem = {
        .batch = 1,
        .heads = H,
        .kv_heads = 1,
        .q_len = N,
        .k_len = N,
        .dim = D,
        .dim_v = D,
        .q = {q, SPARGE_F16, H * N * D, N * D, D},
        .k = {k, SPARGE_F16, N * D, N * D, D},
        .v = {v, SPARGE_F16, N * D, N * D, D},
    };
    sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
    sparge_result result = {.o = {o, SPARGE_F32, H * N * D, N * D, D}};
    sparge_error error;
    options.causal = SPARGE_CAUSAL_END;
    if (sparge_attention(&problem, &options, &result, &error))
        return puts(error.text), 1;
    printf("sparsity %.3f, %.3f s\n", sparge_sparsity(&result.counts), result.seconds_attend);
}
