/* SPDX-License-Identifier: Apache-2.0 */
/* agree.c: the cpu backend against the reference, all bits, on one question. */
#include "tests/support/agree.h"

#include <string.h>

#include "cpu/cpu.h"

const sparge_dtype cpu_dtypes[4] = {SPARGE_INT8, SPARGE_INT12, SPARGE_F32, SPARGE_BF16};

/* ---- Two answers ---- */

void same_everything(const problem *x, const answer *got, const answer *want)
{
    same_traces(x, got, want, true);
    for (int64_t h = 0; h < x->p.batch * x->p.heads; h++)
        same_counts(&got->head[h], &want->head[h]);
    same_counts(&got->result.counts, &want->result.counts);
    same_answer(got, want);
}

void same_mask(const sparge_mask *got, const sparge_mask *want)
{
    check_same_as("mask", got->bits, want->bits,
                  want->batch * want->heads * want->q_blocks * want->words);
}

sparge_mask wide_mask(const problem *x, int64_t spare)
{
    const int64_t lines = x->p.batch * x->p.heads * blocks(x->p.q_len, x->o.block_q);
    const int64_t k_blocks = blocks(x->p.k_len, x->o.block_k), words = blocks(k_blocks, 32) + spare;
    return (sparge_mask){.bits = check_alloc((size_t)(lines * words) * sizeof(uint32_t)),
                         .batch = x->p.batch,
                         .heads = x->p.heads,
                         .q_blocks = blocks(x->p.q_len, x->o.block_q),
                         .k_blocks = k_blocks,
                         .words = words};
}

/* ---- One question on every instruction set ---- */

reply ask(const problem *x, way how, sparge_dtype dtype, tensor_layout layout, int64_t spare)
{
    reply r = {0};
    if (how == ATTEND) {
        r.a = attend_to(x, dtype, layout);
        return r;
    }
    r.mask = wide_mask(x, spare);
    r.a = attention(x, &r.mask);
    return r;
}

void forget(reply *r)
{
    check_free(r->mask.bits);
    answer_free(&r->a);
}

/* AMX has products of bytes and of bf16 alone. */
static sparge_isa product_isa(sparge_isa isa, sparge_dtype dtype)
{
    const bool of_amx = dtype == SPARGE_INT8 || dtype == SPARGE_BF16;
    return isa == SPARGE_ISA_AMX && !of_amx ? SPARGE_ISA_AVX512VNNI : isa;
}

static bool in_bf16(const problem *x)
{
    return x->o.qk_dtype == SPARGE_BF16 || x->o.pv_dtype == SPARGE_BF16;
}

static void refuses_bf16(problem *x, sparge_isa isa)
{
    const char *const says =
        sparge_cpu_best(true) == SPARGE_ISA_AUTO
            ? check_text("%s is bf16, which the cpu backend does not have here",
                         x->o.qk_dtype == SPARGE_BF16 ? "qk_dtype" : "pv_dtype")
            : check_text("isa is %s, which has no products of bf16", sparge_isa_string(isa));
    sparge_mask mask = wide_mask(x, 0);
    sparge_error error;
    x->o.isa = isa;
    const sparge_status status = sparge_predict(&x->p, &x->o, &mask, NULL, &error);
    check(status == SPARGE_ERR_UNSUPPORTED && !strncmp(error.text, says, strlen(says)),
          "%s: status %d, \"%s\"", sparge_isa_string(isa), (int)status, error.text);
    check_free(mask.bits);
}

/* In the order of that instruction set, where it makes a difference. */
static reply ask_reference(problem *x, sparge_isa isa, way how, sparge_dtype dtype,
                           tensor_layout layout, int64_t spare)
{
    x->o.backend = SPARGE_REF;
    x->o.isa = in_bf16(x) ? isa : SPARGE_ISA_AUTO;
    const reply want = ask(x, how, dtype, layout, spare);
    check_equal(want.a.result.backend, SPARGE_REF);
    x->o.backend = SPARGE_CPU;
    return want;
}

static void verify_isa(problem *x, sparge_isa isa, const reply *want, way how, sparge_dtype dtype,
                       tensor_layout layout, int64_t spare, const int *threads)
{
    x->o.isa = isa;
    for (const int *n = threads; *n; n++) {
        x->o.threads = *n;
        reply got = ask(x, how, dtype, layout, spare);
        check_equal(got.a.result.backend, SPARGE_CPU);
        check_equal(got.a.result.isa, isa);
        check_equal(got.a.result.qk_isa, product_isa(isa, x->o.qk_dtype));
        check_equal(got.a.result.pv_isa, product_isa(isa, x->o.pv_dtype));
        check_equal(got.a.result.threads, *n);
        if (how == ATTENTION)
            same_mask(&got.mask, &want->mask);
        same_everything(x, &got.a, &want->a);
        forget(&got);
    }
    if (how == ATTENTION) { /* stage 1 alone gives the same mask */
        sparge_mask alone = wide_mask(x, spare);
        sparge_error error;
        check(sparge_predict(&x->p, &x->o, &alone, NULL, &error) == SPARGE_OK, "%s", error.text);
        same_mask(&alone, &want->mask);
        check_free(alone.bits);
    }
}

void verify_with(problem *x, way how, sparge_dtype dtype, tensor_layout layout, const int *threads,
                 totals *sum)
{
    const int64_t spare = check_int(0, 2);
    reply want = ask_reference(x, SPARGE_ISA_AVX512VNNI, how, dtype, layout, spare);
    for (sparge_isa isa = (sparge_isa)FIRST_ISA; isa <= (sparge_isa)LAST_ISA; isa++) {
        if (!sparge_isa_available(isa))
            continue;
        if (in_bf16(x) && !sparge_cpu_has_bf16(isa)) {
            refuses_bf16(x, isa);
        } else if (in_bf16(x) && isa == SPARGE_ISA_AMX) {
            reply by_tiles = ask_reference(x, isa, how, dtype, layout, spare);
            verify_isa(x, isa, &by_tiles, how, dtype, layout, spare, threads);
            forget(&by_tiles);
        } else
            verify_isa(x, isa, &want, how, dtype, layout, spare, threads);
    }
    const sparge_counts *c = &want.a.result.counts;
    if (sum) {
        sum->cases++;
        sum->pairs += c->pairs;
        sum->kept += c->qk_done;
        sum->skipped += (int64_t)((double)c->qk_done - c->pv_done);
    }
    forget(&want);
}

int64_t channels_at_random(void)
{
    static const int64_t usual[] = {1, 15, 16, 17, 32, 64, 80, 128};
    return check_int(0, 2) ? usual[check_int(0, 7)] : check_int(1, 140);
}
