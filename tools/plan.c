/* SPDX-License-Identifier: Apache-2.0 */
/* plan.c: makes plans, and sums up what their parts attend to in double precision. */
#include "tools/plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "sparge_inspect.h"
#include "sparge_mask.h"
#include "tools/device.h"
#include "tools/gate.h"
#include "tools/intermediates.h"
#include "tools/mask_file.h"
#include "tools/npy.h"

/* ---- Making ---- */

const sparge_mask *plan_mask(const sparge_part *part)
{
    return part->mask.bits ? &part->mask : NULL;
}

method_choice plan_spargeattn(const sparge_options *o)
{
    static const char *const names[] = {"spargeattn", "spargeattn_paper", "spargeattn_upstream"};
    const sparge_thresholds *t = &o->thresholds;
    return (method_choice){
        .method = sparge_method_find(names[o->rules]),
        .param = {0.0, (double)t->theta, (double)t->topk, (double)t->lambda, o->sink},
    };
}

/* The plan of the density that is wanted. */
static void find(const attention_args *a, const sparge_context *context, const sparge_problem *p,
                 sparge_options o, method_choice *found, sparge_plan *out)
{
    progress watch = progress_begin("density");
    o.progress = progress_goes_on;
    o.user = &watch;
    const sparge_status status =
        sparge_method_plan_at(found->method, p, &o, context, found->param, a->density,
                              &device_executor, out, &library_error);
    progress_end(&watch);
    if (status == SPARGE_ERR_ARGUMENT && strncmp(library_error.text, "density ", 8) == 0)
        fail(EXIT_USAGE, NULL, "--%s%s", library_error.text,
             a->method.method ? "" : "; a lower --theta or smaller blocks reach further down");
    method_must(found->method, status);
}

void plan_fit(sparge_plan *plan)
{
    const sparge_options usual = sparge_options_default(plan->options.rules);
    for (int n = 0; n < plan->parts; n++) {
        sparge_part *part = &plan->part[n];
        sparge_options fit = part->options;
        sparge_mask mask = {0};
        fit.block_q = usual.block_q;
        fit.block_k = usual.block_k;
        if (fit.backend != SPARGE_CUDA || (part->predicted && !part->mask.bits) ||
            (fit.block_q == part->options.block_q && fit.block_k == part->options.block_k))
            continue;
        if (part->mask.bits)
            must_sparge(sparge_mask_convert(&part->mask, &part->problem, &part->options, &fit,
                                            &mask, &library_error));
        sparge_mask_free(&part->mask);
        part->mask = mask;
        part->options = fit;
    }
}

sparge_context plan_context(const capture *c, const sparge_problem *p)
{
    const double tokens = capture_tokens(c);
    if (tokens > 0.0 && (tokens != (double)p->q_len || tokens != (double)p->k_len))
        fail(EXIT_FILE, c->path,
             "has %lld queries and %lld keys, 'grid' and 'n_text' of its manifest have %.0f tokens",
             (long long)p->q_len, (long long)p->k_len, tokens);
    return (sparge_context){
        .grid = tokens > 0.0 ? &c->grid : NULL,
        .layer = c->layer > 0 ? c->layer : 0,
        .step = c->step,
    };
}

/* To be freed; NULL: there are none. */
static int64_t *segment_ends(const attention_args *a, const sparge_problem *p,
                             sparge_context *context)
{
    if (!a->segments)
        return NULL;
    int64_t *const ends = method_segments(a->segments, &context->segments, &failure);
    must_have(ends != NULL); /* the text was read before */
    const int64_t last = ends[context->segments - 1];
    if (last != p->k_len)
        fail(EXIT_USAGE, NULL, "--segments ends at %lld, and there are %lld keys", (long long)last,
             (long long)p->k_len);
    context->segment_ends = ends;
    return ends;
}

void plan_make(const attention_args *a, const capture *c, const sparge_problem *p,
               sparge_options *o, method_choice *found, sparge_plan *out)
{
    sparge_context context = a->method.method ? plan_context(c, p) : (sparge_context){0};
    gate g = {0};
    if (a->gate) {
        must(gate_read(a->gate, a->layer >= 0 ? a->layer : c->layer, a->rope_base, p->heads,
                       p->kv_heads, p->dim, &g, &failure));
        context.gate = &g.c;
    }
    int64_t *const ends = segment_ends(a, p, &context);
    *found = a->method;
    *out = (sparge_plan){.problem = *p, .options = *o, .parts = 1};
    out->part[0] = (sparge_part){.problem = *p, .options = *o, .predicted = true};
    if (!isnan(a->density)) {
        if (!found->method)
            *found = plan_spargeattn(o); /* which --density bisects too */
        find(a, &context, p, *o, found, out);
    } else if (found->method)
        method_must(found->method, sparge_method_plan(found->method, p, o, &context, found->param,
                                                      out, &library_error));
    if (!a->method.method)
        found->method = NULL;
    if (sparge_plan_is_plain(out) && out->part[0].predicted)
        sparge_mask_free(&out->part[0].mask); /* whoever runs it may ask for more than the mask */
    else
        must_sparge(sparge_plan_predict(out, &device_executor, &library_error));
    gate_free(&g);
    free(ends);
    if (found->method)
        plan_fit(out);
    for (int n = 0; n < out->parts; n++) {
        sparge_part *part = &out->part[n];
        part->options.progress = NULL;
        must_sparge(sparge_options_resolve(&part->problem, &part->options, &library_error));
    }
    const sparge_causal causal = o->causal; /* of a part it may be in the mask */
    *o = out->part[0].options;
    o->causal = causal;
}

void plan_pairs(const sparge_plan *plan, array *out)
{
    intermediates_alloc("bhqk", ARRAY_U8, &plan->problem, &plan->options, out);
    must_sparge(sparge_plan_pairs(plan, out->data, &library_error));
}

void plan_write_pairs(FILE *stream, const char *path, const sparge_plan *plan,
                      const sparge_mask *mask)
{
    array pairs;
    if (sparge_plan_is_plain(plan)) {
        mask_write_pairs(stream, path, mask, &plan->problem, &plan->part[0].options);
        return;
    }
    plan_pairs(plan, &pairs);
    must_do(npy_write(stream, path, &pairs, &failure));
    array_free(&pairs);
}

void plan_watch(sparge_plan *plan, progress *watch)
{
    for (int n = 0; n < plan->parts; n++)
        progress_watch(watch, &plan->part[n].options);
}

/* ---- Summing up ---- */

/* Adds a set of keys to what the rows attend to so far; o may be NULL. */
static void add(const sparge_plan *plan, const double *o, const double *lse, double *to_o,
                double *to_lse)
{
    const sparge_problem *p = &plan->problem;
    for (int64_t at = 0; at < p->batch * p->heads * p->q_len; at++) {
        const int64_t row = plan->q_order ? at / p->q_len * p->q_len + plan->q_order[at] : at;
        if (lse[at] == -(double)INFINITY) /* no key */
            continue;
        const double top = fmax(lse[at], to_lse[row]), old = exp(to_lse[row] - top),
                     more = exp(lse[at] - top);
        to_lse[row] = top + log(old + more);
        for (int64_t c = 0; c < p->dim_v && o; c++) {
            double *x = &to_o[row * p->dim_v + c];
            *x = (old * *x + more * o[at * p->dim_v + c]) / (old + more);
        }
    }
}

static void nothing(const sparge_plan *plan, array *lse)
{
    intermediates_alloc("bhq", ARRAY_F64, &plan->problem, &plan->options, lse);
    for (int64_t row = 0; row < array_count(lse); row++)
        ((double *)lse->data)[row] = -(double)INFINITY;
}

void plan_sum(const sparge_plan *plan, plan_function *function, void *user, array *o, array *lse,
              array *kept)
{
    array part_o = {0}, part_lse;
    nothing(plan, lse);
    nothing(plan, kept);
    nothing(plan, &part_lse);
    if (o) {
        intermediates_alloc("bhqv", ARRAY_F64, &plan->problem, &plan->options, o);
        memset(o->data, 0, (size_t)array_count(o) * sizeof(double));
        intermediates_alloc("bhqv", ARRAY_F64, &plan->problem, &plan->options, &part_o);
    }
    for (int n = 0; n < plan->parts; n++) {
        function(&plan->part[n], user, part_o.data, part_lse.data);
        add(plan, part_o.data, part_lse.data, o ? o->data : NULL, lse->data);
        if (!plan->part[n].pooled)
            add(plan, NULL, part_lse.data, NULL, kept->data);
    }
    array_free(&part_o);
    array_free(&part_lse);
}

static void ask(const sparge_part *part, void *user, double *o, double *lse)
{
    (void)user;
    must_sparge(sparge_oracle(&part->problem, &part->options, plan_mask(part), SPARGE_ORACLE_REAL,
                              o, lse, NULL, &library_error));
}

void plan_oracle(sparge_plan *plan, const char *what, array *o, array *lse, array *kept)
{
    progress watch = progress_begin(what);
    plan_watch(plan, &watch);
    plan_sum(plan, ask, NULL, o, lse, kept);
    progress_end(&watch);
}
