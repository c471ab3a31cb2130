/* SPDX-License-Identifier: Apache-2.0 */
/* run.c: sparge run: attention over files. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/device.h"
#include "tools/mask_file.h"
#include "tools/npy.h"
#include "tools/places.h"
#include "tools/progress.h"
#include "tools/run.h"

enum {
    DENSE = OPT_COMMAND,
    MASK,
    MASK_PAIRS,
    MASK_ONLY,
    MASK_OUT,
    PAIRS_OUT,
    LSE_OUT,
    INTERMEDIATES,
    CHECK,
    RUN_END
};

static const struct argp_option run_options[] = {
    {"dense", DENSE, 0, 0, "no mask: attention to every block, by the same kernel", 1},
    {"mask", MASK, "M", 0,
     "this mask instead of a predicted one: a .npy [B,H,q blocks,k blocks], or a .safetensors "
     "whose "
     "blocks may be attended in part; of --params the lambdas hold",
     1},
    {"mask-pairs", MASK_PAIRS, "P.npy", 0, "the same by pairs of tokens, [B,H,queries,keys]", 1},
    {"mask-only", MASK_ONLY, 0, 0, "no attention: the mask and what it keeps; v is not needed", 1},
    {"mask-out", MASK_OUT, "M", 0, "write the mask, in a form that --mask takes", 4},
    {"pairs-out", PAIRS_OUT, "P.npy", 0, "write which visible pairs of tokens it keeps", 4},
    {"lse-out", LSE_OUT, "L.npy", 0, "write the log-sum-exp, [B,H,N]", 4},
    {"intermediates", INTERMEDIATES, "DIR", 0, "write the intermediate results of the algorithm",
     4},
    {"check", CHECK, 0, 0, "measure the error, and the recall of the mask, by attention in double",
     4},
    {0},
};

static const options_conflict conflicts[] = {
    {DENSE,
     {MASK, MASK_PAIRS, MASK_ONLY, OPT_DENSITY, OPT_PARAMS, OPT_THETA, OPT_TAU, OPT_TOPK,
      OPT_MIN_MASS, OPT_CELL},
     "keeps every block"},
    {MASK,
     {MASK_PAIRS, OPT_DENSITY, OPT_THETA, OPT_TAU, OPT_TOPK, OPT_MIN_MASS, OPT_CELL, OPT_SINK},
     "says what is kept"},
    {MASK_PAIRS,
     {OPT_DENSITY, OPT_THETA, OPT_TAU, OPT_TOPK, OPT_MIN_MASS, OPT_CELL, OPT_SINK},
     "says what is kept"},
    {MASK_ONLY,
     {'o', LSE_OUT, OPT_LAMBDA, OPT_SKIP_ROWS, OPT_QK_DTYPE, OPT_PV_DTYPE, OPT_KERNEL},
     "computes no attention"},
    {OPT_METHOD, {DENSE, MASK, MASK_PAIRS}, "says what is kept"},
};

/* A method may look at v for its mask. */
static bool needs_no_v(const run_args *a) { return a->mask_only && !a->attention.method.method; }

enum { CHILDREN = 3 };

static error_t run_parser(int key, char *text, struct argp_state *state)
{
    run_args *a = state->input;
    attention_args *shared = &a->attention;
    if (key >= OPT_COMMAND && key < RUN_END)
        shared->given |= option_bit(key);
    switch (key) {
    case ARGP_KEY_INIT:
        for (int n = 0; n < CHILDREN; n++)
            state->child_inputs[n] = shared;
        return 0;
    case DENSE: a->dense = true; return 0;
    case MASK: a->mask = text; return 0;
    case MASK_PAIRS: a->mask_pairs = text; return 0;
    case MASK_ONLY: a->mask_only = true; return 0;
    case MASK_OUT: a->mask_out = text; return 0;
    case PAIRS_OUT: a->pairs_out = text; return 0;
    case LSE_OUT: a->lse_out = text; return 0;
    case INTERMEDIATES: a->intermediates = text; return 0;
    case CHECK: a->check = true; return 0;
    case ARGP_KEY_END:
        if (shared->files == 0 || (shared->files == 2 && !needs_no_v(a)))
            return options_wrong(
                state,
                "give the files of q, k and v, or one .safetensors of all, or a folder of those");
        return options_refuse(state, shared->given, conflicts,
                              sizeof conflicts / sizeof *conflicts);
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child run_children[] = {
    {&attention_argp, 0, NULL, 0}, {&params_argp, 0, NULL, 0}, {&method_argp, 0, NULL, 0}, {0}};
static const struct argp run_argp = {
    .options = run_options,
    .parser = run_parser,
    .args_doc = "Q.npy K.npy V.npy\nQKV.safetensors\nFOLDER",
    .doc = "Attention over files of float16, 32 or 64, with its counters as JSON on stdout.\vOf a "
           "folder of captures, as sparge tune takes it, each file is run in turn, and whatever is "
           "read or written beside them is a folder too, where it has the name of the capture.",
    .children = run_children,
};

/* ---- The steps, in their order ---- */

/* Refuses an output that would replace an input. */
static void spare(const run *r, const char *output)
{
    must(inputs_spare(output, (const char *[]){r->args.mask, r->args.mask_pairs}, 2, &failure));
    settle_spare(&r->args.attention, r->capture, output);
}

/* The plan, of which the mask may be given. */
static void plan(run *r)
{
    const run_args *a = &r->args;
    const sparge_problem *p = &r->in.problem;
    plan_make(&a->attention, r->capture, p, &r->options, &r->found, &r->plan);
    sparge_part *part = &r->plan.part[0];
    if (a->mask)
        mask_read(a->mask, p, &r->options, &part->mask);
    if (a->mask_pairs)
        mask_read_pairs(a->mask_pairs, p, &r->options, &part->mask);
    if (a->dense || run_mask(a))
        part->predicted = false;
    r->predicts = sparge_plan_is_plain(&r->plan) && part->predicted;
    if (sparge_plan_is_plain(&r->plan))
        mask_writable(a->mask_out, &part->mask);
    else if (a->mask_out || a->intermediates)
        fail(EXIT_USAGE, NULL,
             "%s: the plan of %s has several parts, or tokens in another order; --pairs-out writes "
             "which pairs it attends to",
             a->mask_out ? "--mask-out" : "--intermediates", r->found.method->name);
}

static void read_files(run *r)
{
    const attention_args *a = &r->args.attention;
    spare(r, a->output);
    spare(r, r->args.mask_out);
    spare(r, r->args.pairs_out);
    spare(r, r->args.lse_out);
    for (int n = 0; n < INTERMEDIATE_COUNT && r->args.intermediates; n++) {
        char path[PATH_MAX];
        intermediates_path(r->args.intermediates, n, path);
        spare(r, path);
    }
    inputs_read(a, !needs_no_v(&r->args), &r->in);
    settle(a, r->capture, &r->in.problem, &r->options, &r->settled);
    plan(r);
    mask_pairs_writable(r->args.pairs_out, &r->in.problem);
    const char *const input[RUN_INPUTS] = {a->file[0], a->file[1], a->file[2], run_mask(&r->args),
                                           a->gate};
    memcpy(r->sha256[0], r->capture->sha256, SHA256_TEXT);
    for (int n = 1; n < RUN_INPUTS; n++)
        if (input[n])
            must(capture_sha256(input[n], r->sha256[n], &failure));
}

static output_file *open_file(const char *path)
{
    output_file *file = path ? output_open(path, &failure) : NULL;
    must_do(file || !path);
    return file;
}

static void open_files(run *r)
{
    const sparge_problem *p = &r->in.problem;
    intermediate_arrays *d = &r->intermediates;
    r->o_file = open_file(r->args.attention.output);
    r->mask_file = open_file(r->args.mask_out);
    r->pairs_file = open_file(r->args.pairs_out);
    r->lse_file = open_file(r->args.lse_out);
    if (r->args.intermediates) {
        intermediates_make(d, p, &r->options, r->predicts, !r->args.mask_only);
        intermediates_open(d, r->args.intermediates);
    } else if (r->predicts)
        intermediates_make_one(d, INTERMEDIATE_WHY, p, &r->options);
}

static void attend(run *r)
{
    const sparge_problem *p = &r->in.problem;
    array *o = &r->intermediates.array[INTERMEDIATE_O];
    const bool half = r->in.type == ARRAY_F16;
    intermediates_alloc("bhqv", half ? ARRAY_F16 : ARRAY_F32, p, &r->options, o);
    intermediates_alloc("bhq", ARRAY_F32, p, &r->options, &r->lse);
    r->result.o = (sparge_out){o->data, half ? SPARGE_F16 : SPARGE_F32,
                               p->heads * p->q_len * p->dim_v, p->q_len * p->dim_v, p->dim_v};
    r->result.lse = r->args.lse_out ? r->lse.data : NULL;
    r->result.intermediates =
        sparge_plan_is_plain(&r->plan) ? &r->intermediates.intermediates : NULL;
    progress watch = progress_begin("attention");
    plan_watch(&r->plan, &watch);
    const double before = device_seconds();
    must_sparge(sparge_plan_run(&r->plan, &device_executor, &r->result, &library_error));
    r->seconds = r->plan.seconds + device_seconds() - before;
    progress_end(&watch);
}

static void predict(run *r)
{
    progress watch = progress_begin("prediction");
    progress_watch(&watch, &r->options);
    if (r->predicts)
        r->seconds = device_predict(&r->in.problem, &r->options, r->result.mask,
                                    &r->intermediates.intermediates);
    progress_end(&watch);
    r->seconds += r->plan.seconds;
    r->result.seconds_predict = r->seconds;
}

/* The masks, and attention unless it is not wanted. */
static void compute(run *r)
{
    const sparge_problem *p = &r->in.problem;
    const int64_t heads = p->batch * p->heads;
    sparge_mask predicted = {0};
    r->result.head_counts =
        must_alloc((size_t)heads, sizeof(sparge_counts), "the counters of the heads");
    if (r->predicts) {
        must_sparge(sparge_mask_alloc(&predicted, p, &r->options, &library_error));
        r->result.mask = &predicted;
    }
    (r->args.mask_only ? predict : attend)(r);
    r->result.mask = NULL;
    if (r->predicts)
        r->plan.part[0].mask = predicted;
    if (r->args.mask_only) {
        must_sparge(sparge_plan_count(&r->plan, r->result.head_counts, &library_error));
        r->result.counts = kept_sum(r->result.head_counts, heads);
    }
}

static void write_file(output_file *file, const char *path, const array *x)
{
    must_do(!file || npy_write(output_stream(file), path, x, &failure));
}

static void write_files(run *r)
{
    const sparge_problem *p = &r->in.problem;
    array *o = &r->intermediates.array[INTERMEDIATE_O];
    if (r->o_file) {
        array shaped;
        inputs_shape_output(&r->in, o, &shaped);
        write_file(r->o_file, r->args.attention.output, &shaped);
        array_free(&shaped);
    }
    must_have(r->args.mask_only || array_to_f32(o, &failure));
    const sparge_mask *mask = plan_mask(&r->plan.part[0]);
    if (r->mask_file)
        mask_write(output_stream(r->mask_file), r->args.mask_out, mask, p, &r->options);
    if (r->args.intermediates)
        mask_array(mask, p, &r->options, &r->intermediates.array[INTERMEDIATE_MASK]);
    if (r->pairs_file)
        plan_write_pairs(output_stream(r->pairs_file), r->args.pairs_out, &r->plan, mask);
    write_file(r->lse_file, r->args.lse_out, &r->lse);
    intermediates_write(&r->intermediates);
}

/* The oracle over a plan: how far o is from it, where there is an o, and the lse over what is kept.
 */
static void measure(const run *r, sparge_plan *over, const char *what, comparison *to, array *kept)
{
    array want = {0}, lse;
    plan_oracle(over, what, r->args.mask_only ? NULL : &want, &lse, kept);
    if (want.data)
        *to = compare(&r->intermediates.array[INTERMEDIATE_O], &want);
    array_free(&want);
    array_free(&lse);
}

static void check(run *r)
{
    const sparge_problem *p = &r->in.problem;
    const int64_t heads = p->batch * p->heads;
    sparge_plan all = {.problem = *p, .options = r->options, .parts = 1};
    array dense, over = {0};
    all.part[0] = (sparge_part){.problem = *p, .options = r->options};
    measure(r, &all, "check", &r->real, &dense);
    r->masked = r->real;
    const bool whole = sparge_plan_is_plain(&r->plan) && !plan_mask(&r->plan.part[0]);
    if (!whole)
        measure(r, &r->plan, "check of the mask", &r->masked, &over);
    const array *kept = whole ? &dense : &over;
    r->recall = judge_recall(kept, &dense);
    r->head_recall = must_alloc((size_t)heads, sizeof *r->head_recall, "the recall of the heads");
    for (int64_t n = 0; n < heads; n++) {
        const array one = array_part(kept, 1, n), every = array_part(&dense, 1, n);
        r->head_recall[n] = judge_recall(&one, &every);
    }
    array_free(&dense);
    array_free(&over);
}

static void report(run *r)
{
    json_t *json = run_json(r);
    if (r->rows)
        json_array_append_new(
            r->rows,
            json_joined(json, json_pack("{s:o}", "file", json_text(capture_name(r->capture)))));
    else
        must(print_json(json, &failure));
    run_warn(r);
}

/* All of it for one capture. */
static void run_capture(const run_args *args, const capture *c, json_t *rows)
{
    static run r;
    r = (run){.args = *args, .capture = c, .options = args->attention.options, .rows = rows};
    read_files(&r);
    open_files(&r);
    compute(&r);
    write_files(&r);
    if (r.args.check)
        check(&r);
    report(&r);
    must_do(outputs_commit(&failure)); /* last: whatever failed before leaves no file */
    intermediates_tidy(&r.intermediates);
    intermediates_free(&r.intermediates);
    array_free(&r.lse);
    sparge_plan_free(&r.plan);
    inputs_free(&r.in);
    free(r.result.head_counts);
    free(r.head_recall);
    settled_free(&r.settled);
}

/* One of a folder: what is beside it is in folders too. A mask that is read in one form is written
 * in it, and one by pairs or of a method in the form that holds them. */
static void run_listed(const run_args *args, const capture *c, json_t *rows)
{
    run_args one = *args;
    char path[7][PATH_MAX];
    one.attention.file[0] = c->path;
    const char *form = ".safetensors";
    place_input(&one.mask, c, form, path[0]);
    if (one.mask ? access(one.mask, F_OK) != 0 : !one.mask_pairs && !one.attention.method.method) {
        form = ".npy";
        one.mask = args->mask;
        place_input(&one.mask, c, form, path[0]);
    }
    place_input(&one.mask_pairs, c, ".npy", path[1]);
    place_output(&one.attention.output, c, ".npy", path[2]);
    place_output(&one.mask_out, c, form, path[3]);
    place_output(&one.pairs_out, c, ".npy", path[4]);
    place_output(&one.lse_out, c, ".npy", path[5]);
    place_output(&one.intermediates, c, "", path[6]);
    run_capture(&one, c, rows);
}

exit_code run_command(int argc, char **argv, file_error *error)
{
    static given_captures given;
    run_args args = {.base = {error}};
    const attention_args *a = &args.attention;
    must(attention_parse(&run_argp, argc, argv, &args.base, &args.attention));
    given_find(a, &given);
    json_t *rows = given.folder ? json_array() : NULL;
    for (int64_t n = 0; n < given.count; n++)
        if (rows)
            run_listed(&args, &given.list[n], rows);
        else
            run_capture(&args, given.list, NULL);
    if (rows)
        must(print_json(json_pack("{s:o, s:o}", "folder", json_text(a->file[0]), "files", rows),
                        error));
    given_free(&given);
    return EXIT_FINE;
}
