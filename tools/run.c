/* run.c: sparge run: attention over files. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/density.h"
#include "tools/device.h"
#include "tools/npy.h"
#include "tools/places.h"
#include "tools/progress.h"
#include "tools/run.h"

enum {
    DENSE = OPT_COMMAND,
    MASK,
    MASK_ONLY,
    DENSITY,
    MASK_OUT,
    LSE_OUT,
    INTERMEDIATES,
    CHECK,
    RUN_END
};

static const struct argp_option run_options[] = {
    {"dense", DENSE, 0, 0, "no mask: attention to every block, by the same kernel", 1},
    {"mask", MASK, "M.npy", 0,
     "this mask instead of a predicted one, [B,H,q blocks,k blocks]; of --params the lambdas "
     "hold",
     1},
    {"density", DENSITY, "X", 0,
     "the tau, one for all heads, that keeps this share of the visible token pairs", 1},
    {"mask-only", MASK_ONLY, 0, 0, "no attention: the mask and what it keeps; v is not needed", 1},
    {"mask-out", MASK_OUT, "M.npy", 0, "write the mask", 4},
    {"lse-out", LSE_OUT, "L.npy", 0, "write the log-sum-exp, [B,H,N]", 4},
    {"intermediates", INTERMEDIATES, "DIR", 0, "write the intermediate results of the algorithm",
     4},
    {"check", CHECK, 0, 0, "measure the error, and the recall of the mask, by attention in double",
     4},
    {0},
};

static const options_conflict conflicts[] = {
    {DENSE,
     {MASK, MASK_ONLY, DENSITY, OPT_PARAMS, OPT_THETA, OPT_TAU, OPT_TOPK},
     "keeps every block"},
    {MASK, {DENSITY, OPT_THETA, OPT_TAU, OPT_TOPK, OPT_SINK}, "says what is kept"},
    {MASK_ONLY,
     {'o', LSE_OUT, OPT_LAMBDA, OPT_SKIP_ROWS, OPT_QK_DTYPE, OPT_PV_DTYPE, OPT_KERNEL},
     "computes no attention"},
    {DENSITY, {OPT_PARAMS, OPT_TAU, OPT_TOPK}, "finds tau"},
};

static error_t run_parser(int key, char *text, struct argp_state *state)
{
    run_args *a = state->input;
    attention_args *shared = &a->attention;
    if (key >= OPT_COMMAND && key < RUN_END)
        shared->given |= option_bit(key);
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = state->child_inputs[1] = shared; return 0;
    case DENSE: a->dense = true; return 0;
    case MASK: a->mask = text; return 0;
    case MASK_ONLY: a->mask_only = true; return 0;
    case DENSITY: return options_real(state, "--density", text, 0.0, 1.0, &a->density);
    case MASK_OUT: a->mask_out = text; return 0;
    case LSE_OUT: a->lse_out = text; return 0;
    case INTERMEDIATES: a->intermediates = text; return 0;
    case CHECK: a->check = true; return 0;
    case ARGP_KEY_END:
        if (shared->files == 0 || (shared->files == 2 && !a->mask_only))
            return options_wrong(
                state, "give the files of q, k and v, or one .safetensors of all, or a folder of "
                       "those");
        return options_refuse(state, shared->given, conflicts,
                              sizeof conflicts / sizeof *conflicts);
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp shared = {.options = attention_options, .parser = attention_parser};
static const struct argp_child run_children[] = {
    {&shared, 0, NULL, 0}, {&params_argp, 0, NULL, 0}, {0}};
static const struct argp run_argp = {
    .options = run_options,
    .parser = run_parser,
    .args_doc = "Q.npy K.npy V.npy\nQKV.safetensors\nFOLDER",
    .doc = "Attention over files of float16, 32 or 64, with its counters as JSON on stdout.\v"
           "Of a folder of captures, as sparge tune takes it, each file is run in turn, and "
           "whatever is read or "
           "written beside them is a folder too, where it has the name of the capture.",
    .children = run_children,
};

static const sparge_mask *mask_of(const run *r) { return r->args.dense ? NULL : &r->mask; }

/* ---- The steps, in their order ---- */

/* Refuses an output that would replace an input. */
static exit_code spare(const run *r, const char *output, file_error *error)
{
    const exit_code code = inputs_spare(output, &r->args.mask, 1, error);
    return code ? code : settle_spare(&r->args.attention, r->capture, output, error);
}

static exit_code read_files(run *r, file_error *error)
{
    const attention_args *a = &r->args.attention;
    const char *const output[] = {a->output, r->args.mask_out, r->args.lse_out};
    exit_code code = EXIT_FINE;
    for (int n = 0; n < 3 && !code; n++)
        code = spare(r, output[n], error);
    for (int n = 0; n < STAGES && r->args.intermediates && !code; n++) {
        char path[PATH_MAX];
        intermediates_path(r->args.intermediates, n, path);
        code = spare(r, path, error);
    }
    if (!code)
        code = inputs_read(a, !r->args.mask_only, &r->in, error);
    if (!code)
        code = settle(a, r->capture, &r->in.problem, &r->options, &r->settled, error);
    sparge_error why;
    if (!code)
        code =
            library_result(sparge_options_resolve(&r->in.problem, &r->options, &why), &why, error);
    if (!code && r->args.mask)
        code = inputs_mask(r->args.mask, &r->in, &r->options, &r->mask, error);
    return code;
}

static exit_code hash_files(run *r, file_error *error)
{
    const attention_args *a = &r->args.attention;
    const char *const input[RUN_INPUTS] = {a->file[0], a->file[1], a->file[2], r->args.mask};
    exit_code code = EXIT_FINE;
    memcpy(r->sha256[0], r->capture->sha256, SHA256_TEXT);
    for (int n = 1; n < RUN_INPUTS && !code; n++)
        code = input[n] ? capture_sha256(input[n], r->sha256[n], error) : EXIT_FINE;
    return code;
}

static exit_code find_density(run *r, file_error *error)
{
    return isnan(r->args.density)
               ? EXIT_FINE
               : density_find(&r->in.problem, &r->options, r->args.density, error);
}

static exit_code open_file(const char *path, output_file **file, file_error *error)
{
    return path && !(*file = output_open(path, error)) ? EXIT_FILE : EXIT_FINE;
}

static exit_code open_files(run *r, file_error *error)
{
    const sparge_problem *p = &r->in.problem;
    exit_code code = open_file(r->args.attention.output, &r->o_file, error);
    if (!code)
        code = open_file(r->args.mask_out, &r->mask_file, error);
    if (!code)
        code = open_file(r->args.lse_out, &r->lse_file, error);
    if (code)
        return code;
    const bool predicts = run_predicts(&r->args);
    if (r->args.intermediates ? !intermediates_make(&r->intermediates, p, &r->options, predicts,
                                                    !r->args.mask_only, error)
                              : predicts && !intermediates_make_stage(&r->intermediates, STAGE_WHY,
                                                                      p, &r->options, error))
        return EXIT_MACHINE;
    return r->args.intermediates
               ? intermediates_open(&r->intermediates, r->args.intermediates, error)
               : EXIT_FINE;
}

static exit_code attend(run *r, file_error *error)
{
    const sparge_problem *p = &r->in.problem;
    array *o = &r->intermediates.array[STAGE_O];
    const bool half = r->in.type == ARRAY_F16;
    if (!intermediates_alloc("bhqv", half ? ARRAY_F16 : ARRAY_F32, p, &r->options, o, error) ||
        !intermediates_alloc("bhq", ARRAY_F32, p, &r->options, &r->lse, error))
        return EXIT_MACHINE;
    r->result.o = (sparge_out){o->data, half ? SPARGE_F16 : SPARGE_F32,
                               p->heads * p->q_len * p->dim_v, p->q_len * p->dim_v, p->dim_v};
    r->result.lse = r->args.lse_out ? r->lse.data : NULL;
    r->result.mask = run_predicts(&r->args) ? &r->mask : NULL;
    r->result.intermediates = &r->intermediates.intermediates;
    sparge_error why;
    progress watch = progress_begin("attention");
    r->options.progress = progress_tick;
    r->options.user = &watch;
    const sparge_status status =
        run_predicts(&r->args)
            ? device_attention(p, &r->options, &r->result, &r->seconds, &why)
            : device_attend(p, &r->options, mask_of(r), &r->result, &r->seconds, &why);
    progress_end(&watch);
    return library_result(status, &why, error);
}

static exit_code predict(run *r, file_error *error)
{
    const sparge_problem *p = &r->in.problem;
    sparge_error why;
    progress watch = progress_begin("prediction");
    r->options.progress = progress_tick;
    r->options.user = &watch;
    const sparge_status status =
        r->args.mask ? SPARGE_OK
                     : device_predict(p, &r->options, &r->mask, &r->intermediates.intermediates,
                                      &r->seconds, &why);
    progress_end(&watch);
    r->result.seconds_predict = r->seconds;
    return library_result(status, &why, error);
}

/* The mask, and attention unless it is not wanted. */
static exit_code compute(run *r, file_error *error)
{
    const sparge_problem *p = &r->in.problem;
    array *mask = &r->intermediates.array[STAGE_MASK];
    const int64_t heads = p->batch * p->heads;
    sparge_error why;
    r->result.head_counts = calloc((size_t)heads + 1, sizeof(sparge_counts));
    if (!r->result.head_counts) {
        file_error_set(error, NULL, "no memory for the counters of %lld heads", (long long)heads);
        return EXIT_MACHINE;
    }
    exit_code code = EXIT_FINE;
    if (run_predicts(&r->args))
        code = library_result(sparge_mask_alloc(&r->mask, p, &r->options, &why), &why, error);
    if (!code)
        code = r->args.mask_only ? predict(r, error) : attend(r, error);
    if (!code && !mask_array(mask_of(r), p, &r->options, mask, error))
        code = EXIT_MACHINE;
    if (!code && r->args.mask_only) {
        kept_counts(mask, p, &r->options, r->result.head_counts);
        r->result.counts = kept_sum(r->result.head_counts, heads);
    }
    return code;
}

static exit_code write_files(run *r, file_error *error)
{
    array *o = &r->intermediates.array[STAGE_O], *mask = &r->intermediates.array[STAGE_MASK];
    array shaped = {0};
    exit_code code = EXIT_FINE;
    if (r->o_file) {
        code = inputs_shape_output(&r->in, o, &shaped, error);
        if (!code && !npy_write(output_stream(r->o_file), r->args.attention.output, &shaped, error))
            code = EXIT_FILE;
        array_free(&shaped);
    }
    if (!code && !r->args.mask_only && !array_to_f32(o, error))
        code = EXIT_MACHINE;
    if (!code &&
        ((r->mask_file && !npy_write(output_stream(r->mask_file), r->args.mask_out, mask, error)) ||
         (r->lse_file && !npy_write(output_stream(r->lse_file), r->args.lse_out, &r->lse, error)) ||
         !intermediates_write(&r->intermediates, error)))
        code = EXIT_FILE;
    return code;
}

/* The oracle over a mask: how far o is from it, where there is an o; and how much it pays to each
 * block. */
static exit_code measure(run *r, const sparge_mask *mask, const char *what, comparison *to,
                         double *mass, file_error *error)
{
    array want = {0};
    if (!r->args.mask_only &&
        !intermediates_alloc("bhqv", ARRAY_F64, &r->in.problem, &r->options, &want, error))
        return EXIT_MACHINE;
    sparge_error why;
    progress watch = progress_begin(what);
    r->options.progress = progress_tick;
    r->options.user = &watch;
    const sparge_status status = sparge_oracle(&r->in.problem, &r->options, mask,
                                               SPARGE_ORACLE_REAL, want.data, NULL, mass, &why);
    progress_end(&watch);
    if (!status && want.data)
        *to = compare(&r->intermediates.array[STAGE_O], &want);
    array_free(&want);
    return library_result(status, &why, error);
}

static exit_code check(run *r, file_error *error)
{
    array mass;
    if (!r->args.check)
        return EXIT_FINE;
    if (!intermediates_alloc("bhij", ARRAY_F64, &r->in.problem, &r->options, &mass, error))
        return EXIT_MACHINE;
    exit_code code = measure(r, NULL, "check", &r->real, mass.data, error);
    if (!code)
        r->recall = judge_recall(&mass, &r->intermediates.array[STAGE_MASK], r->in.problem.q_len,
                                 r->options.block_q);
    r->masked = r->real;
    if (!code && mask_of(r) && !r->args.mask_only)
        code = measure(r, mask_of(r), "check of the mask", &r->masked, NULL, error);
    array_free(&mass);
    return code;
}

static exit_code add_row(run *r, json_t *json, file_error *error)
{
    json_t *row =
        json_joined(json, json_pack("{s:o}", "file", json_text(capture_name(r->capture))));
    if (row && json_array_append_new(r->rows, row) == 0)
        return EXIT_FINE;
    file_error_set(error, NULL, "no memory for the result");
    return EXIT_MACHINE;
}

static exit_code report(run *r, file_error *error)
{
    json_t *json = run_json(r);
    const exit_code code = r->rows ? add_row(r, json, error) : print_json(json, error);
    if (!code)
        run_warn(r);
    return code;
}

/* All of it for one capture. */
static exit_code run_capture(const run_args *args, const capture *c, json_t *rows,
                             file_error *error)
{
    static exit_code (*const steps[])(run *, file_error *) = {
        read_files, hash_files, find_density, open_files, compute, write_files, check, report,
    };
    run r = {.args = *args, .capture = c, .options = args->attention.options, .rows = rows};
    exit_code code = EXIT_FINE;
    for (size_t n = 0; n < sizeof steps / sizeof *steps && !code; n++)
        code = steps[n](&r, error);
    if (!code && !outputs_commit(error)) /* last: whatever failed before leaves no file */
        code = EXIT_FILE;
    else if (!code)
        intermediates_tidy(&r.intermediates);
    outputs_discard();
    intermediates_free(&r.intermediates);
    array_free(&r.lse);
    sparge_mask_free(&r.mask);
    inputs_free(&r.in);
    free(r.result.head_counts);
    settled_free(&r.settled);
    return code;
}

/* One of a folder: what is beside it is in folders too. */
static exit_code run_listed(const run_args *args, const capture *c, json_t *rows, file_error *error)
{
    run_args one = *args;
    char path[5][PATH_MAX];
    one.attention.file[0] = c->path;
    exit_code code = place_input(&one.mask, c, ".npy", path[0], error);
    if (!code)
        code = place_output(&one.attention.output, c, ".npy", path[1], error);
    if (!code)
        code = place_output(&one.mask_out, c, ".npy", path[2], error);
    if (!code)
        code = place_output(&one.lse_out, c, ".npy", path[3], error);
    if (!code)
        code = place_output(&one.intermediates, c, "", path[4], error);
    return code ? code : run_capture(&one, c, rows, error);
}

exit_code run_command(int argc, char **argv, file_error *error)
{
    run_args args = {.base = {error}, .density = NAN};
    const attention_args *a = &args.attention;
    given_captures given = {0};
    exit_code code = attention_parse(&run_argp, argc, argv, &args.base, &args.attention);
    if (!code)
        code = given_find(a, &given, error);
    json_t *rows = given.folder ? json_array() : NULL;
    for (int64_t n = 0; n < given.count && !code; n++)
        code = rows ? run_listed(&args, &given.list[n], rows, error)
                    : run_capture(&args, given.list, NULL, error);
    if (rows && !code)
        code = print_json(json_pack("{s:o, s:O}", "folder", json_text(a->file[0]), "files", rows),
                          error);
    json_decref(rows);
    given_free(&given);
    return code;
}
