/* SPDX-License-Identifier: Apache-2.0 */
/* check.c: sparge check: judges what another kernel made of q, k and v: its mask, its o and its
 * log-sum-exp. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "sparge_inspect.h"
#include "sparge_mask.h"
#include "tools/compare.h"
#include "tools/device.h"
#include "tools/inputs.h"
#include "tools/intermediates.h"
#include "tools/judge.h"
#include "tools/kept.h"
#include "tools/mask_file.h"
#include "tools/places.h"
#include "tools/plan.h"
#include "tools/progress.h"
#include "tools/settle.h"

typedef struct check_args {
    options_base base;
    attention_args attention;
    const char *o, *lse, *mask, *mask_pairs;
    double max_worst; /* NaN: what the baseline says */
} check_args;

enum { OUTPUT = 512, LSE, MASK, MASK_PAIRS, MAX_WORST };
enum { CHILDREN = 3 };

static const struct argp_option check_options[] = {
    {"o", OUTPUT, "O", 0, "the kernel's output, with the axes of q: .npy, or 'o' of a .safetensors",
     0},
    {"lse", LSE, "L.npy", 0, "its log-sum-exp, natural, [B,H,N]", 0},
    {"mask", MASK, "M", 0,
     "the mask that it had: a .npy [B,H,q blocks,k blocks], or a .safetensors whose blocks may be "
     "attended in part (none: it was dense)",
     0},
    {"mask-pairs", MASK_PAIRS, "P.npy", 0, "the same by pairs of tokens, [B,H,queries,keys]", 0},
    {"max-worst", MAX_WORST, "X", 0,
     "fail where a row is above this relative L1, or log-sum-exp this far off", 0},
    {0},
};

static error_t check_parser(int key, char *text, struct argp_state *state)
{
    check_args *a = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        for (int n = 0; n < CHILDREN; n++)
            state->child_inputs[n] = &a->attention;
        return 0;
    case OUTPUT: a->o = text; return 0;
    case LSE: a->lse = text; return 0;
    case MASK: a->mask = text; return 0;
    case MASK_PAIRS: a->mask_pairs = text; return 0;
    case MAX_WORST: return options_real(state, "--max-worst", text, 0.0, INFINITY, &a->max_worst);
    case ARGP_KEY_END:
        if (a->attention.files != 1 && a->attention.files != 3)
            return options_wrong(state, "give the files of q, k and v, or one .safetensors of all");
        if (a->mask && a->mask_pairs)
            return options_wrong(state, "--mask says what is kept; leave out --mask-pairs");
        if ((a->mask || a->mask_pairs) && a->attention.method.method)
            return options_wrong(state, "--method says what is kept: leave out --%s",
                                 a->mask ? "mask" : "mask-pairs");
        if (!isnan(a->attention.density) && !a->mask && !a->mask_pairs &&
            !a->attention.method.method)
            return options_wrong(state, "--density is of --method, or of what is predicted beside "
                                        "--mask: give one of them");
        if (!a->o)
            return options_wrong(state, "give the kernel's output: --o FILE");
        if (a->attention.output)
            return options_wrong(state,
                                 "-o: nothing is written here; the kernel's output is --o FILE");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child check_children[] = {
    {&attention_argp, 0, NULL, 0}, {&params_argp, 0, NULL, 0}, {&method_argp, 0, NULL, 0}, {0}};
static const struct argp check_argp = {
    .options = check_options,
    .parser = check_parser,
    .args_doc = "Q.npy K.npy V.npy --o O\nQKV.safetensors --o O",
    .doc = "Judges another kernel, as JSON on stdout: its o beside attention in double over its "
           "mask and over all keys, and how much attention the mask keeps beside the one that is "
           "predicted here; or beside attention by a method. Exit status 1 where the worst row is "
           "above the bound, or o is not "
           "finite where it should be, or the other way round.\vWithout --max-worst the bound is "
           "twice the worst row of an honest kernel over the same mask (f32, with P and o rounded "
           "to the type of O), and 1e-5; for the log-sum-exp likewise.",
    .children = check_children,
};

/* Attention by one judge. */
typedef struct attended {
    array o, lse; /* [batch][heads][q_len][dim_v], [batch][heads][q_len] */
} attended;

typedef struct check {
    check_args args;
    sparge_options options;
    given_captures given;
    inputs in;
    settled settled;
    array_type type; /* of O in its file */
    attended got;    /* what is judged; its lse may be empty */
    method_choice found;
    sparge_plan over;      /* what O is measured by: the method's, or of the mask, or dense */
    sparge_mask predicted; /* what is predicted beside the mask */
    array kept, chosen;    /* the same as arrays */
    sparge_counts *counts, *predicted_counts; /* of them, [batch][heads] */
    attended dense, masked; /* by the oracle, of all keys and of what O is measured by */
    array recalled;         /* its lse over what of that is not pooled */
    array foreseen;         /* its lse over the predicted mask */
    attended baseline;
} check;

/* What O and the log-sum-exp are measured by: over the mask where there is one. */
static bool has_mask(const check *c) { return c->args.mask || c->args.mask_pairs; }
static bool is_dense(const check *c) { return !has_mask(c) && !c->found.method; }
static const attended *want_of(const check *c) { return is_dense(c) ? &c->dense : &c->masked; }
static const char *want_name(const check *c)
{
    return is_dense(c)   ? "dense attention"
           : has_mask(c) ? "attention over the mask"
                         : "attention by the method";
}

/* ---- The steps, in their order ---- */

static void read_files(check *c)
{
    const attention_args *a = &c->args.attention;
    given_file(a, &c->given);
    inputs_read(a, true, &c->in);
    settle(a, c->given.list, &c->in.problem, &c->options, &c->settled);
    plan_make(a, c->given.list, &c->in.problem, &c->options, &c->found, &c->over);
    inputs_output(c->args.o, &c->in, &c->got.o, &c->type);
    if (c->args.lse)
        inputs_lse(c->args.lse, &c->in, &c->got.lse);
    sparge_part *part = &c->over.part[0];
    if (c->args.mask)
        mask_read(c->args.mask, &c->in.problem, &c->options, &part->mask);
    if (c->args.mask_pairs)
        mask_read_pairs(c->args.mask_pairs, &c->in.problem, &c->options, &part->mask);
    if (!c->found.method)
        part->predicted = false;
    must_sparge(sparge_plan_predict(&c->over, &device_executor, &library_error));
}

/* What is kept, and beside a mask what is predicted. */
static void count(check *c)
{
    const sparge_problem *p = &c->in.problem;
    const size_t heads = (size_t)(p->batch * p->heads);
    static const char what[] = "the counters of the heads";
    c->counts = must_alloc(heads, sizeof *c->counts, what);
    must_sparge(sparge_plan_count(&c->over, c->counts, &library_error));
    if (!has_mask(c))
        return;
    must_sparge(sparge_mask_alloc(&c->predicted, p, &c->options, &library_error));
    device_predict(p, &c->options, &c->predicted, NULL);
    c->predicted_counts = must_alloc(heads, sizeof *c->predicted_counts, what);
    must_sparge(
        sparge_mask_count(&c->predicted, p, &c->options, c->predicted_counts, &library_error));
    mask_array(&c->over.part[0].mask, p, &c->options, &c->kept);
    mask_array(&c->predicted, p, &c->options, &c->chosen);
}

static void attended_alloc(const check *c, array_type type, attended *to)
{
    const sparge_problem *p = &c->in.problem;
    intermediates_alloc("bhqv", type, p, &c->options, &to->o);
    intermediates_alloc("bhq", type, p, &c->options, &to->lse);
}

static void attended_free(attended *a)
{
    array_free(&a->o);
    array_free(&a->lse);
}

/* The oracle over a mask; o may be NULL. */
static void ask(check *c, const sparge_mask *mask, const char *what, double *o, double *lse)
{
    progress watch = progress_begin(what);
    progress_watch(&watch, &c->options);
    const sparge_status status = sparge_oracle(&c->in.problem, &c->options, mask,
                                               SPARGE_ORACLE_REAL, o, lse, NULL, &library_error);
    progress_end(&watch);
    must_sparge(status);
}

/* An honest kernel over a part. */
static void be_honest(const sparge_part *part, void *user, double *o, double *lse)
{
    const check *c = user;
    attended got;
    attended_alloc(c, ARRAY_F32, &got);
    must_sparge(sparge_baseline(&part->problem, &part->options, plan_mask(part),
                                inputs_dtype(c->type), got.o.data, got.lse.data, &library_error));
    for (int64_t n = 0; n < array_count(&got.o); n++)
        o[n] = (double)((const float *)got.o.data)[n];
    for (int64_t n = 0; n < array_count(&got.lse); n++)
        lse[n] = (double)((const float *)got.lse.data)[n];
    attended_free(&got);
}

static void measure(check *c)
{
    array unused;
    attended_alloc(c, ARRAY_F64, &c->dense);
    ask(c, NULL, "dense attention", c->dense.o.data, c->dense.lse.data);
    if (!is_dense(c))
        plan_oracle(&c->over, want_name(c), &c->masked.o, &c->masked.lse, &c->recalled);
    if (has_mask(c)) {
        intermediates_alloc("bhq", ARRAY_F64, &c->in.problem, &c->options, &c->foreseen);
        ask(c, &c->predicted, "attention over the predicted mask", NULL, c->foreseen.data);
    }
    progress watch = progress_begin("baseline");
    plan_watch(&c->over, &watch);
    plan_sum(&c->over, be_honest, c, &c->baseline.o, &c->baseline.lse, &unused);
    array_free(&unused);
    progress_end(&watch);
}

/* ---- The verdict ---- */

/* An error of the kernel's, and what it may be. */
typedef struct verdict {
    comparison c;
    double worst;  /* relative L1 of any row of o, or distance of any lse */
    int64_t at;    /* its element, or -1 */
    double honest; /* the worst of the baseline */
    double bound;  /* NaN: not known */
} verdict;

static bool holds(const verdict *v) { return v->c.nonfinite_apart == 0 && v->worst <= v->bound; }

static double worst_row(const comparison *c) { return c->summed ? c->worst_row_l1 : 0.0; }

/* What --max-worst says, or else what follows from the baseline. */
static double bound_of(const check *c, double of_baseline)
{
    return isnan(c->args.max_worst) ? of_baseline : c->args.max_worst;
}

static verdict judge_o(const check *c)
{
    const array *want = &want_of(c)->o;
    const comparison got = compare(&c->got.o, want), baseline = compare(&c->baseline.o, want);
    const double honest = worst_row(&baseline);
    return (verdict){got, worst_row(&got), got.worst_row, honest,
                     bound_of(c, sparge_bound_o(honest))};
}

static verdict judge_lse(const check *c)
{
    const array *want = &want_of(c)->lse;
    const difference got = compare_elements(&c->got.lse, want, 0.0);
    const difference baseline = compare_elements(&c->baseline.lse, want, 0.0);
    return (verdict){compare(&c->got.lse, want), got.worst, got.worst_at, baseline.worst,
                     bound_of(c, sparge_bound_lse(baseline.worst))};
}

/* Why a verdict does not hold. */
static void explain(const check *c, const verdict *v, const char *file, const array *x, bool row,
                    file_error *error)
{
    const bool apart = v->c.nonfinite_apart > 0;
    json_t *place = compare_place(x, apart ? v->c.first_nonfinite_apart : v->at, row && !apart);
    char *text = json_dumps(place, 0);
    const char *where = text ? text : "", *want = want_name(c);
    if (apart)
        file_error_set(error, file,
                       "%" PRId64 " elements are NaN or infinite where %s is not, or the other way "
                       "round; the first is %s",
                       v->c.nonfinite_apart, want, where);
    else if (isnan(v->bound))
        file_error_set(
            error, file,
            "an honest kernel is itself %.3g from %s, so no bound follows; give --max-worst",
            v->honest, want);
    else
        file_error_set(error, file, "%s %s is %.3g from %s, allowed is %.3g",
                       row ? "row" : "element", where, v->worst, want, v->bound);
    free(text);
    json_decref(place);
}

/* ---- The report ---- */

/* Of head n, or all of it. */
static array view(const array *x, int axes, int64_t n)
{
    return n < 0 || !x->data ? *x : array_part(x, axes, n);
}

/* What is kept, and beside a mask what is predicted: of head n, or of all if it is -1. */
static json_t *describe_mask(const check *c, int64_t n)
{
    const int64_t heads = c->in.problem.batch * c->in.problem.heads;
    const array dense = view(&c->dense.lse, 1, n), recalled = view(&c->recalled, 1, n),
                foreseen = view(&c->foreseen, 1, n), kept = view(&c->kept, 2, n),
                chosen = view(&c->chosen, 2, n);
    const recall given = judge_recall(&recalled, &dense);
    const sparge_counts counts = n < 0 ? kept_sum(c->counts, heads) : c->counts[n];
    json_t *json = json_joined(
        recall_json(&given),
        json_pack("{s:o, s:I, s:I}", "density_tokens", json_number(sparge_density_tokens(&counts)),
                  "pairs", (json_int_t)counts.pairs, "kept_blocks", (json_int_t)counts.qk_done));
    if (!has_mask(c))
        return json;
    const recall predicted = judge_recall(&foreseen, &dense);
    const sparge_counts chosen_counts =
        n < 0 ? kept_sum(c->predicted_counts, heads) : c->predicted_counts[n];
    const mask_difference d = judge_masks(&kept, &chosen);
    json = json_joined(json, json_pack("{s:o, s:o, s:o, s:I}", "predicted_recall",
                                       json_number(predicted.share), "predicted_worst_row_recall",
                                       json_number(predicted.worst_row), "predicted_density_tokens",
                                       json_number(sparge_density_tokens(&chosen_counts)),
                                       "predicted_kept_blocks", (json_int_t)chosen_counts.qk_done));
    return json_joined(json, judge_json(&kept, &d));
}

static json_t *describe_head(const check *c, int64_t n)
{
    const array got = array_part(&c->got.o, 2, n), want = array_part(&want_of(c)->o, 2, n);
    const array honest = array_part(&c->baseline.o, 2, n);
    const comparison o = compare(&got, &want), baseline = compare(&honest, &want);
    const int64_t worst = o.worst_row < 0 ? -1 : n * array_count(&got) + o.worst_row;
    json_t *json = json_pack(
        "{s:I, s:I, s:o, s:o, s:o, s:o}", "batch", (json_int_t)(n / c->in.problem.heads), "head",
        (json_int_t)(n % c->in.problem.heads), "l1", json_number(o.l1), "worst_row_l1",
        json_number(o.worst_row_l1), "worst_row", compare_place(&c->got.o, worst, true),
        "baseline_worst_row_l1", json_number(baseline.worst_row_l1));
    json = json_joined(json, compare_counts(&o));
    if (c->args.lse) {
        const array lse = array_part(&c->got.lse, 1, n),
                    want_lse = array_part(&want_of(c)->lse, 1, n);
        const difference d = compare_elements(&lse, &want_lse, 0.0);
        json = json_joined(json, json_pack("{s:o}", "lse_worst", json_number(d.worst)));
    }
    if (is_dense(c))
        return json;
    const array all = array_part(&c->dense.o, 2, n);
    const comparison dense = compare(&got, &all);
    json = json_joined(json, json_pack("{s:o, s:o}", "dense_l1", json_number(dense.l1),
                                       "dense_worst_row_l1", json_number(dense.worst_row_l1)));
    return json_joined(json, describe_mask(c, n));
}

static json_t *describe_heads(const check *c)
{
    json_t *list = json_array();
    for (int64_t n = 0; n < c->in.problem.batch * c->in.problem.heads; n++)
        json_array_append_new(list, describe_head(c, n));
    return list;
}

static exit_code report(check *c, file_error *error)
{
    const sparge_problem *p = &c->in.problem;
    const verdict o = judge_o(c), lse = c->args.lse ? judge_lse(c) : o;
    const bool ok = holds(&o) && holds(&lse);
    json_t *json = json_pack(
        "{s:b, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:s}", "ok", ok, "over",
        is_dense(c)   ? "dense"
        : has_mask(c) ? "mask"
                      : "method",
        "type", array_type_string(c->type), "batch", (json_int_t)p->batch, "heads",
        (json_int_t)p->heads, "kv_heads", (json_int_t)p->kv_heads, "q_len", (json_int_t)p->q_len,
        "k_len", (json_int_t)p->k_len, "dim", (json_int_t)p->dim, "dim_v", (json_int_t)p->dim_v,
        "block_q", (json_int_t)c->options.block_q, "block_k", (json_int_t)c->options.block_k,
        "causal", sparge_causal_string(c->options.causal));
    json = json_joined(json, settled_json(&c->settled));
    json = json_joined(json, method_json(&c->found));
    json = json_joined(json, compare_json(&o.c, &c->got.o));
    json = json_joined(json, json_pack("{s:o, s:o}", "baseline_worst_row_l1", json_number(o.honest),
                                       "max_worst", json_number(o.bound)));
    if (c->args.lse) {
        json_t *errors =
            json_pack("{s:o, s:o, s:o, s:o}", "worst", json_number(lse.worst), "worst_at",
                      compare_place(&c->got.lse, lse.at, false), "baseline_worst",
                      json_number(lse.honest), "max_worst", json_number(lse.bound));
        json = json_joined(json,
                           json_pack("{s:o}", "lse", json_joined(errors, compare_counts(&lse.c))));
    }
    if (!is_dense(c)) {
        const comparison dense = compare(&c->got.o, &c->dense.o);
        json = json_joined(json, json_pack("{s:o, s:o}", "dense", compare_json(&dense, &c->got.o),
                                           "mask", describe_mask(c, -1)));
    }
    json = json_joined(json, json_pack("{s:o}", "per_head", describe_heads(c)));
    must(print_json(json, error));
    if (o.c.nonfinite_apart == 0)
        compare_warn(&o.c, "o", want_name(c));
    if (!holds(&o))
        explain(c, &o, c->args.o, &c->got.o, true, error);
    else if (!ok)
        explain(c, &lse, c->args.lse, &c->got.lse, false, error);
    return ok ? EXIT_FINE : EXIT_DIFFERENT;
}

exit_code check_command(int argc, char **argv, file_error *error)
{
    static check c;
    c.args = (check_args){.base = {error}, .max_worst = NAN};
    must(attention_parse(&check_argp, argc, argv, &c.args.base, &c.args.attention));
    c.options = c.args.attention.options;
    read_files(&c);
    if (!is_dense(&c))
        count(&c);
    measure(&c);
    const exit_code code = report(&c, error);
    attended_free(&c.got);
    attended_free(&c.dense);
    attended_free(&c.masked);
    attended_free(&c.baseline);
    array_free(&c.kept);
    array_free(&c.chosen);
    free(c.counts);
    free(c.predicted_counts);
    array_free(&c.recalled);
    array_free(&c.foreseen);
    sparge_plan_free(&c.over);
    sparge_mask_free(&c.predicted);
    inputs_free(&c.in);
    settled_free(&c.settled);
    given_free(&c.given);
    return code;
}
