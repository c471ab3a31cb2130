/* SPDX-License-Identifier: Apache-2.0 */
/* run_report.c: what sparge run says: every option as it was resolved, what was counted, timed and
 * measured. */
#include "tools/run.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

enum { SCHEMA = 2 }; /* of the keys in json.md; a new one where a key changes its meaning or goes */

/* ---- What ran, on what ---- */

static json_t *file_json(const char *path, const char *sha256)
{
    return path ? json_pack("{s:o, s:s}", "file", json_text(path), "sha256", sha256) : json_null();
}

static json_t *describe_files(const run *r)
{
    const attention_args *a = &r->args.attention;
    json_t *list = json_array();
    bool ok = list != NULL;
    for (int n = 0; n < a->files && ok; n++)
        ok = json_array_append_new(list, file_json(a->file[n], r->sha256[n])) == 0;
    json_t *json =
        json_pack("{s:i, s:s, s:o, s:o, s:o}", "schema", SCHEMA, "version", SPARGE_VERSION,
                  "inputs", ok ? list : NULL, "mask", file_json(run_mask(&r->args), r->sha256[3]),
                  "gate", file_json(a->gate, r->sha256[4]));
    if (!ok)
        json_decref(list);
    return json_joined(json_joined(json, settled_json(&r->settled)), method_json(&r->found));
}

/* Thresholds that every head has, and that played a part; of those of each head the file tells. */
static json_t *describe_thresholds(const run *r)
{
    json_t *json =
        json_joined(thresholds_json(&r->options.thresholds),
                    json_pack("{s:o}", "density", json_number(r->args.attention.density)));
    static const char *const of_prediction[] = {"theta", "tau", "topk", "min_mass"};
    for (int n = 0; n < 4 && json && (r->options.per_head || !r->predicts); n++)
        json_object_set_new(json, of_prediction[n], json_null());
    if (json && r->options.per_head)
        json_object_set_new(json, "lambda", json_null());
    return json;
}

static json_t *describe_sizes(const run *r)
{
    const sparge_problem *p = &r->in.problem;
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "batch", (json_int_t)p->batch, "heads",
                     (json_int_t)p->heads, "kv_heads", (json_int_t)p->kv_heads, "q_len",
                     (json_int_t)p->q_len, "k_len", (json_int_t)p->k_len, "dim", (json_int_t)p->dim,
                     "dim_v", (json_int_t)p->dim_v);
}

static json_t *describe_run(const run *r)
{
    const sparge_options *o = &r->options;
    const sparge_result *x = &r->result;
    json_t *by =
        json_pack("{s:s, s:s, s:s, s:s, s:i, s:o}", "backend", sparge_backend_string(o->backend),
                  "isa", sparge_isa_string(o->isa), "qk_isa", sparge_isa_string(x->qk_isa),
                  "pv_isa", sparge_isa_string(x->pv_isa), "threads", o->threads, "kernel",
                  o->cuda.kernel ? json_integer(o->cuda.kernel) : json_null());
    return json_joined(json_joined(json_joined(by, options_json(o)), describe_thresholds(r)),
                       describe_sizes(r));
}

/* ---- What came of it ---- */

static double tokens_of(const run *r, int64_t h)
{
    return sparge_density_tokens(&r->result.head_counts[h]);
}
static double blocks_of(const run *r, int64_t h)
{
    return sparge_density_blocks(&r->result.head_counts[h]);
}
static double sparsity_of(const run *r, int64_t h)
{
    return sparge_sparsity(&r->result.head_counts[h]);
}
static double recall_of(const run *r, int64_t h) { return r->head_recall[h].share; }
static double worst_recall_of(const run *r, int64_t h) { return r->head_recall[h].worst_row; }

/* A number of each head; NULL: no memory. */
static json_t *per_head(const run *r, double (*of)(const run *, int64_t))
{
    json_t *list = json_array();
    bool ok = list != NULL;
    for (int64_t h = 0; h < r->in.problem.batch * r->in.problem.heads && ok; h++)
        ok = json_array_append_new(list, json_number(of(r, h))) == 0;
    if (ok)
        return list;
    json_decref(list);
    return NULL;
}

static json_t *describe_recall(const run *r)
{
    return json_joined(recall_json(&r->recall),
                       json_pack("{s:o, s:o}", "recall_per_head", per_head(r, recall_of),
                                 "worst_row_recall_per_head", per_head(r, worst_recall_of)));
}

/* Of what dense attention takes. */
static double predict_multiply_adds(const run *r)
{
    const sparge_problem *p = &r->in.problem;
    return r->found.method ? r->plan.multiply_adds /
                                 ((double)r->result.counts.tokens * (double)(p->dim + p->dim_v))
                           : NAN;
}

static json_t *describe_kept(const run *r)
{
    const sparge_counts *c = &r->result.counts;
    json_t *json = json_pack("{s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "pairs",
                             (json_int_t)c->pairs, "kept_blocks", (json_int_t)c->qk_done,
                             "density_tokens", json_number(sparge_density_tokens(c)),
                             "density_blocks", json_number(sparge_density_blocks(c)),
                             "predict_multiply_adds", json_number(predict_multiply_adds(r)),
                             "sparsity", json_number(sparge_sparsity(c)), "sparsity_qk",
                             json_number(sparge_sparsity_qk(c)), "sparsity_pv",
                             json_number(sparge_sparsity_pv(c)), "density_tokens_per_head",
                             per_head(r, tokens_of), "density_blocks_per_head",
                             per_head(r, blocks_of), "sparsity_per_head", per_head(r, sparsity_of));
    if (!r->predicts)
        return json_joined(json, json_pack("{s:n, s:n}", "kept_by", "kept_by_alone"));
    const reasons why =
        reasons_of(&r->intermediates.array[INTERMEDIATE_WHY], &r->in.problem, &r->options);
    return json_joined(json, json_pack("{s:o, s:o}", "kept_by", reasons_json(why.kept),
                                       "kept_by_alone", reasons_json(why.alone)));
}

static json_t *describe_speed(const run *r)
{
    const sparge_result *x = &r->result;
    const sparge_counts *c = &x->counts;
    const double dim = (double)r->in.problem.dim, dim_v = (double)r->in.problem.dim_v,
                 tera = 1e12 * r->seconds;
    return json_pack(
        "{s:I, s:o, s:o, s:o, s:o, s:o, s:o}", "workspace_bytes", (json_int_t)x->workspace_bytes,
        "seconds_predict", json_number(x->seconds_predict), "seconds_quantize",
        json_number(x->seconds_quantize), "seconds_attend", json_number(x->seconds_attend),
        "seconds_total", json_number(r->seconds), "tops",
        json_number(2.0 * (dim + dim_v) * (double)c->tokens / tera), "tops_executed",
        json_number(2.0 * (dim * (double)c->tile_tokens + dim_v * kept_pv_tiles(c)) / tera));
}

static json_t *describe_errors(const run *r)
{
    const comparison *real = &r->real;
    json_t *errors = json_pack("{s:o, s:o, s:o, s:o, s:o}", "l1", json_number(real->l1),
                               "worst_row_l1", json_number(real->worst_row_l1), "cosine",
                               json_number(real->cosine), "rmse", json_number(real->rmse),
                               "mask_worst_row_l1", json_number(r->masked.worst_row_l1));
    return json_joined(
        json_joined(errors, compare_counts(real)),
        json_pack("{s:I}", "mask_nonfinite_apart", (json_int_t)r->masked.nonfinite_apart));
}

/* What plays no part where there is no attention. */
static void blank(json_t *json)
{
    static const char *const keys[] = {
        "qk_isa",           "pv_isa",         "qk_dtype", "pv_dtype",
        "skip_rows",        "lambda",         "dim_v",    "workspace_bytes",
        "seconds_quantize", "seconds_attend", "tops",     "tops_executed"};
    for (size_t n = 0; n < sizeof keys / sizeof *keys && json; n++)
        json_object_set_new(json, keys[n], json_null());
}

json_t *run_json(const run *r)
{
    json_t *json = json_joined(json_joined(describe_files(r), describe_run(r)), describe_kept(r));
    json = json_joined(json, describe_speed(r));
    if (r->args.mask_only)
        blank(json);
    if (r->args.check)
        json = json_joined(json, describe_recall(r));
    return r->args.check && !r->args.mask_only ? json_joined(json, describe_errors(r)) : json;
}

void run_warn(const run *r)
{
    if (r->predicts) {
        const reasons why =
            reasons_of(&r->intermediates.array[INTERMEDIATE_WHY], &r->in.problem, &r->options);
        reasons_warn(&why, &r->options, r->args.attention.file[0]);
    }
    if (r->args.mask_only)
        return;
    const char *what = r->rows ? capture_name(r->capture) : "o";
    const int64_t nonfinite =
        r->args.check ? 0 : array_nonfinite(&r->intermediates.array[INTERMEDIATE_O]);
    if (nonfinite)
        fprintf(stderr,
                "sparge: %s has %" PRId64 " elements that are NaN or infinite; --check says "
                "whether dense attention has them too\n",
                what, nonfinite);
    if (!r->args.check)
        return;
    compare_warn(&r->real, what, "dense attention");
    if (r->masked.nonfinite_apart)
        compare_warn(&r->masked, what, "attention over the mask");
}
