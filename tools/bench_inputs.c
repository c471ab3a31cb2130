/* SPDX-License-Identifier: Apache-2.0 */
/* bench_inputs.c: what sparge bench computes with: tensors like those of a model, and block masks.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/bench.h"
#include "tools/intermediates.h"

/* ---- Random numbers, the same everywhere ---- */

static uint64_t random_bits(uint64_t *state) /* splitmix64 */
{
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static int64_t random_below(uint64_t *state, int64_t n)
{
    return (int64_t)(random_bits(state) % (uint64_t)n);
}

static float random_normal(uint64_t *state) /* Box and Muller's */
{
    static const double tau = 6.283185307179586;
    const double u = ((double)(random_bits(state) >> 11) + 1.0) * 0x1p-53; /* (0, 1] */
    const double turn = (double)(random_bits(state) >> 11) * 0x1p-53;
    return (float)(sqrt(-2.0 * log(u)) * cos(tau * turn));
}

/* ---- Tensors ---- */

/* Tokens of one block stand near one of a few topics, and so do the queries that ask for them: the
 * predictor has something to find. Of the variance 3/4 is the topic's. */
enum { TOPICS = 16, TOPIC_TOKENS = 128 };

static void fill_topics(uint64_t *state, const float *topic, int64_t len, int64_t dim, float *x)
{
    const float common = sqrtf(0.75f), own = 0.5f;
    for (int64_t t = 0, n = 0; t < len; t++) {
        if (t % TOPIC_TOKENS == 0)
            n = random_below(state, TOPICS);
        for (int64_t c = 0; c < dim; c++)
            x[t * dim + c] = fmaf(common, topic[n * dim + c], own * random_normal(state));
    }
}

/* Packed tensors of one batch. */
static void make_views(int64_t heads, int64_t len, int64_t dim, sparge_dtype dtype, inputs *out)
{
    sparge_in view[3];
    for (int n = 0; n < 3; n++)
        view[n] = (sparge_in){out->tensor[n].data, dtype, heads * len * dim, len * dim, dim};
    out->problem = (sparge_problem){.batch = 1,
                                    .heads = heads,
                                    .kv_heads = heads,
                                    .q_len = len,
                                    .k_len = len,
                                    .dim = dim,
                                    .dim_v = dim,
                                    .q = view[0],
                                    .k = view[1],
                                    .v = view[2]};
}

void bench_synthetic(int64_t heads, int64_t len, int64_t dim, inputs *out)
{
    *out = (inputs){.type = ARRAY_F32, .rank = 4};
    const int64_t shape[] = {1, heads, len, dim}, head = len * dim;
    float *topic = must_alloc((size_t)(TOPICS * dim), sizeof *topic, "the inputs");
    for (int n = 0; n < 3; n++)
        must_have(array_alloc(ARRAY_F32, 4, shape, &out->tensor[n], &failure));
    for (int64_t h = 0; h < heads; h++) {
        uint64_t state = (uint64_t)h << 32;
        for (int64_t n = 0; n < TOPICS * dim; n++)
            topic[n] = random_normal(&state);
        fill_topics(&state, topic, len, dim, (float *)out->tensor[0].data + h * head);
        fill_topics(&state, topic, len, dim, (float *)out->tensor[1].data + h * head);
        float *v = (float *)out->tensor[2].data + h * head;
        for (int64_t n = 0; n < head; n++) /* no structure: nothing hides an error of a weight */
            v[n] = random_normal(&state);
    }
    free(topic);
    make_views(heads, len, dim, SPARGE_F32, out);
}

/* A head more costs a copy: normal numbers of 32 heads would take longer than their attention. */
void bench_synthetic_f16(int64_t heads, int64_t len, int64_t dim, inputs *out)
{
    const int64_t made = heads < 2 ? heads : 2, shape[] = {1, heads, len, dim};
    const size_t bytes = (size_t)(len * dim) * sizeof(uint16_t);
    inputs few;
    bench_synthetic(made, len, dim, &few);
    *out = (inputs){.type = ARRAY_F32, .rank = 4};
    for (int n = 0; n < 3; n++) {
        must_have(array_to_f16(&few.tensor[n], &failure));
        must_have(array_alloc(ARRAY_F16, 4, shape, &out->tensor[n], &failure));
        for (int64_t h = 0; h < heads; h++)
            memcpy((char *)out->tensor[n].data + (size_t)h * bytes,
                   (char *)few.tensor[n].data + (size_t)(h % made) * bytes, bytes);
    }
    make_views(heads, len, dim, SPARGE_F16, out);
    inputs_free(&few);
}

void bench_capture(const char *path, inputs *out)
{
    const attention_args args = {.file = {path}, .files = 1};
    inputs_read(&args, true, out);
    if (out->problem.batch == 0 || out->problem.q_len == 0 || out->problem.k_len == 0)
        fail(EXIT_FILE, path, "holds no tokens; there is nothing to time");
}

/* ---- Masks ---- */

void bench_impose(bench_mask kind, double sparsity, const sparge_problem *p,
                  const sparge_options *o, sparge_mask *mask)
{
    const sparge_geometry g = geometry_of(p, o);
    uint64_t state = 1;
    for (int64_t row = 0; row < mask->batch * mask->heads * mask->q_blocks; row++) {
        const int64_t b = row / mask->q_blocks / mask->heads,
                      h = row / mask->q_blocks % mask->heads;
        const int64_t i = row % mask->q_blocks, visible = sparge_blocks_visible(&g, i);
        const int64_t share = llround((1.0 - sparsity) * (double)visible);
        int64_t left = share > 0 ? share : visible > 0;
        /* The key block under the middle of the query block, and as many on either side. */
        const int64_t middle =
            (2 * i + 1) * o->block_q / (2 * o->block_k) +
            (o->causal == SPARGE_CAUSAL_END ? (p->k_len - p->q_len) / o->block_k : 0);
        int64_t first = middle - left / 2;
        first = first > visible - left ? visible - left : first;
        first = first < 0 ? 0 : first;
        for (int64_t j = 0; j < mask->k_blocks; j++) {
            /* Of the blocks that remain, each is as likely as any other to be among those left. */
            const bool keep = j >= visible           ? false
                              : kind == BENCH_BANDED ? j >= first && j < first + left
                                                     : random_below(&state, visible - j) < left;
            sparge_mask_set(mask, b, h, i, j, keep);
            left -= keep && kind != BENCH_BANDED;
        }
    }
}
