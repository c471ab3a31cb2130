/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/ref/hand.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

bool bit(const sparge_mask *mask, int64_t line, int64_t j)
{
    return mask->bits[line * mask->words + j / 32] >> j % 32 & 1;
}

sparge_mask predicted(const sparge_problem *p, const sparge_options *o,
                      const sparge_intermediates *intermediates)
{
    const int64_t q_blocks = blocks(p->q_len, o->block_q), k_blocks = blocks(p->k_len, o->block_k);
    const int64_t words = blocks(k_blocks, 32), lines = p->batch * p->heads * q_blocks;
    sparge_mask mask = {.bits = check_alloc((size_t)(lines * words) * 4),
                        .batch = p->batch,
                        .heads = p->heads,
                        .q_blocks = q_blocks,
                        .k_blocks = k_blocks,
                        .words = words};
    sparge_error error = {"poison"};
    sparge_intermediates whole = intermediates ? *intermediates : (sparge_intermediates){0};
    uint8_t *why = whole.why ? whole.why : check_alloc((size_t)(lines * k_blocks));
    whole.why = why;
    const sparge_status status = sparge_predict(p, o, &mask, &whole, &error);
    check(status == SPARGE_OK && error.text[0] == '\0', "status %d: %s", (int)status, error.text);
    for (int64_t line = 0; k_blocks % 32 && line < lines; line++)
        check(!(mask.bits[(line + 1) * words - 1] >> k_blocks % 32),
              "spare bits of row %lld are set", (long long)line);
    for (int64_t at = 0; at < lines * k_blocks; at++)
        check(bit(&mask, at / k_blocks, at % k_blocks) == (why[at] != 0),
              "block %lld of row %lld is %s for %d", (long long)(at % k_blocks),
              (long long)(at / k_blocks),
              bit(&mask, at / k_blocks, at % k_blocks) ? "kept" : "skipped", why[at]);
    if (!intermediates || !intermediates->why)
        check_free(why);
    return mask;
}

hand by_hand(int64_t q_len, int64_t k_blocks, const float *x)
{
    const int64_t k_len = 2 * k_blocks;
    hand h = {
        .p = {.batch = 1, .heads = 1, .kv_heads = 1, .q_len = q_len, .k_len = k_len, .dim = 2},
        .o = sparge_options_default(SPARGE_RULES_DEFAULT),
        .q = check_alloc((size_t)(2 * q_len) * 4),
        .k = check_alloc((size_t)(2 * k_len) * 4),
    };
    for (int64_t t = 0; t < q_len; t++)
        h.q[2 * t] = 1, h.q[2 * t + 1] = 0;
    for (int64_t t = 0; t < k_len; t++)
        h.k[2 * t] = x[t / 2], h.k[2 * t + 1] = 1;
    h.p.q = (sparge_in){h.q, SPARGE_F32, 0, 0, 2};
    h.p.k = (sparge_in){h.k, SPARGE_F32, 0, 0, 2};
    h.o.backend = SPARGE_REF;
    h.o.block_q = h.o.block_k = 2;
    h.o.softmax_scale = 1;
    h.o.smooth_k = false;
    h.o.thresholds = (sparge_thresholds){0.6f, SPARGE_OFF, SPARGE_OFF, -INFINITY, 0};
    return h;
}

void drop(hand *h)
{
    check_free(h->q);
    check_free(h->k);
}

void disagree(float *x, int64_t block)
{
    float *row = x + 4 * block;
    row[2] = -row[0], row[3] = -row[1];
}

void keeps(const char *what, const hand *h, const char *want)
{
    check_case("%s", what);
    sparge_mask mask = predicted(&h->p, &h->o, NULL);
    const int64_t lines = mask.batch * mask.heads * mask.q_blocks;
    char *got = calloc((size_t)(lines * (mask.k_blocks + 1)) + 2, 1), *end = got;
    for (int64_t line = 0; line < lines; line++) {
        for (int64_t j = 0; j < mask.k_blocks; j++)
            *end++ = bit(&mask, line, j) ? '1' : '0';
        *end++ = '/';
    }
    if (lines)
        end[-1] = '\0';
    check(!strcmp(got, want), "keeps %s, should keep %s", got, want);
    free(got);
    check_free(mask.bits);
}

void keeps_for(const char *what, const hand *h, const uint8_t *want, int64_t count)
{
    check_case("%s", what);
    uint8_t *why = check_alloc((size_t)count);
    sparge_mask mask = predicted(&h->p, &h->o, &(sparge_intermediates){.why = why});
    check_same(why, want, count);
    check_free(why);
    check_free(mask.bits);
}
