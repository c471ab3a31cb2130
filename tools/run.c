/* run.c: sparge run: attention over files. */
#include <inttypes.h>
#include <stdlib.h>

#include "tools/compare.h"
#include "tools/device.h"
#include "tools/dump.h"
#include "tools/inputs.h"
#include "tools/npy.h"
#include "tools/places.h"
#include "tools/progress.h"
#include "tools/settle.h"

typedef struct run_args {
    options_base base;
    attention_args attention;
    const char *mask, *mask_out, *lse_out, *dump;
    bool dense, check;
} run_args;

enum { MASK = 512, MASK_OUT, LSE_OUT, DUMP, DENSE, CHECK };

static const struct argp_option run_options[] = {
    {"dense", DENSE, 0, 0, "no mask: attention to every block, by the same kernel", 1},
    {"mask", MASK, "M.npy", 0, "this mask instead of a predicted one, [B,H,q blocks,k blocks]", 1},
    {"mask-out", MASK_OUT, "M.npy", 0, "write the mask", 4},
    {"lse-out", LSE_OUT, "L.npy", 0, "write the log-sum-exp, [B,H,N]", 4},
    {"dump", DUMP, "DIR", 0, "write every stage of the algorithm", 4},
    {"check", CHECK, 0, 0, "measure the error by attention in double", 4},
    {0},
};

static error_t run_parser(int key, char *text, struct argp_state *state)
{
    run_args *const a = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = state->child_inputs[1] = &a->attention; return 0;
    case MASK: a->mask = text; return 0;
    case MASK_OUT: a->mask_out = text; return 0;
    case LSE_OUT: a->lse_out = text; return 0;
    case DUMP: a->dump = text; return 0;
    case DENSE: a->dense = true; return 0;
    case CHECK: a->check = true; return 0;
    case ARGP_KEY_END:
        if (a->attention.files != 1 && a->attention.files != 3)
            return options_wrong(state, "give the files of q, k and v, or one .safetensors of all, or a folder of those");
        if (a->dense && a->mask)
            return options_wrong(state, "--dense and --mask exclude each other");
        if (a->dense && a->attention.params)
            return options_wrong(state, "--dense and --params exclude each other");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp shared = {.options = attention_options, .parser = attention_parser};
static const struct argp_child run_children[] = {{&shared, 0, NULL, 0}, {&params_argp, 0, NULL, 0}, {0}};
static const struct argp run_argp = {
    .options = run_options,
    .parser = run_parser,
    .args_doc = "Q.npy K.npy V.npy\nQKV.safetensors\nFOLDER",
    .doc = "Attention over files of float16, 32 or 64, with its counters as JSON on stdout.\v"
           "Of a folder of captures, as sparge tune takes it, each file is run in turn, and whatever is read or written "
           "beside them is a folder too, where it has the name of the capture.",
    .children = run_children,
};

/* Of one capture. */
typedef struct run {
    run_args args;
    const capture *capture;
    sparge_options options;
    inputs in;
    settled settled;
    sparge_mask mask; /* no bits when dense */
    dump dump;        /* of the mask and of o too when there is no --dump */
    array lse;
    output_file *o_file, *mask_file, *lse_file;
    sparge_result result;
    double seconds;          /* of the call */
    comparison real, masked; /* distance to dense attention, and over the same mask */
    json_t *rows;            /* of a folder of captures; NULL: there is but one */
} run;

/* ---- The steps, in their order ---- */

static exit_code read_files(run *r, file_error *error)
{
    const attention_args *const a = &r->args.attention;
    const char *const input[] = {a->file[0], a->file[1], a->file[2], r->args.mask};
    const char *const output[] = {a->output, r->args.mask_out, r->args.lse_out};
    exit_code code = EXIT_FINE;
    for (int n = 0; n < 3 && !code; n++)
        code = inputs_spare(output[n], input, 4, error);
    for (int n = 0; n < STAGES && r->args.dump && !code; n++) {
        char path[PATH_MAX];
        dump_path(r->args.dump, n, path);
        code = inputs_spare(path, input, 4, error);
    }
    if (!code)
        code = inputs_read(a, true, &r->in, error);
    if (!code)
        code = settle(a, r->capture, &r->in.problem, &r->options, &r->settled, error);
    if (!code && r->args.mask)
        code = inputs_mask(r->args.mask, &r->in, &r->options, &r->mask, error);
    return code;
}

static exit_code open_file(const char *path, output_file **file, file_error *error)
{
    return path && !(*file = output_open(path, error)) ? EXIT_FILE : EXIT_FINE;
}

static exit_code open_files(run *r, file_error *error)
{
    const sparge_problem *const p = &r->in.problem;
    exit_code code = open_file(r->args.attention.output, &r->o_file, error);
    if (!code)
        code = open_file(r->args.mask_out, &r->mask_file, error);
    if (!code)
        code = open_file(r->args.lse_out, &r->lse_file, error);
    if (code || !r->args.dump)
        return code;
    if (!dump_make(&r->dump, p, &r->options, !r->args.dense && !r->args.mask, error))
        return EXIT_MACHINE;
    return dump_open(&r->dump, r->args.dump, error);
}

static exit_code attend(run *r, file_error *error)
{
    const sparge_problem *const p = &r->in.problem;
    array *const o = &r->dump.array[STAGE_O];
    const bool half = r->in.type == ARRAY_F16;
    if (!dump_alloc("bhqv", half ? ARRAY_F16 : ARRAY_F32, p, &r->options, o, error) ||
        !dump_alloc("bhq", ARRAY_F32, p, &r->options, &r->lse, error))
        return EXIT_MACHINE;
    r->result = (sparge_result){
        .o = {o->data, half ? SPARGE_F16 : SPARGE_F32, p->heads * p->q_len * p->dim_v,
              p->q_len * p->dim_v, p->dim_v},
        .lse = r->args.lse_out ? r->lse.data : NULL,
        .trace = r->args.dump ? &r->dump.trace : NULL,
        .head_counts = calloc((size_t)(p->batch * p->heads) + 1, sizeof(sparge_counts)),
    };
    if (!r->result.head_counts) {
        file_error_set(error, NULL, "no memory for the counters of %lld heads",
                       (long long)(p->batch * p->heads));
        return EXIT_MACHINE;
    }
    sparge_error why;
    sparge_status status = SPARGE_OK;
    progress watch = progress_begin("attention");
    r->options.progress = progress_tick;
    r->options.user = &watch;
    if (r->args.dense || r->args.mask) {
        const sparge_mask *const mask = r->args.mask ? &r->mask : NULL;
        status = device_attend(p, &r->options, mask, &r->result, &r->seconds, &why);
    } else {
        status = sparge_mask_alloc(&r->mask, p, &r->options, &why);
        r->result.mask = &r->mask;
        if (!status)
            status = device_attention(p, &r->options, &r->result, &r->seconds, &why);
    }
    progress_end(&watch);
    return library_result(status, &why, error);
}

static const sparge_mask *mask_of(const run *r) { return r->args.dense ? NULL : &r->mask; }

static exit_code write_files(run *r, file_error *error)
{
    array *const o = &r->dump.array[STAGE_O], *const mask = &r->dump.array[STAGE_MASK];
    array shaped = {0};
    exit_code code = EXIT_FINE;
    if (r->o_file) {
        code = inputs_shape_output(&r->in, o, &shaped, error);
        if (!code && !npy_write(output_stream(r->o_file), r->args.attention.output, &shaped, error))
            code = EXIT_FILE;
        array_free(&shaped);
    }
    if (!code && (!array_to_f32(o, error) ||
                  !mask_array(mask_of(r), &r->in.problem, &r->options, mask, error)))
        code = EXIT_MACHINE;
    if (!code &&
        ((r->mask_file && !npy_write(output_stream(r->mask_file), r->args.mask_out, mask, error)) ||
         (r->lse_file && !npy_write(output_stream(r->lse_file), r->args.lse_out, &r->lse, error)) ||
         !dump_write(&r->dump, error)))
        code = EXIT_FILE;
    return code;
}

static exit_code measure(run *r, const sparge_mask *mask, const char *what, comparison *to,
                         file_error *error)
{
    array want;
    if (!dump_alloc("bhqv", ARRAY_F64, &r->in.problem, &r->options, &want, error))
        return EXIT_MACHINE;
    sparge_error why;
    progress watch = progress_begin(what);
    r->options.user = &watch;
    const sparge_status status = sparge_oracle(&r->in.problem, &r->options, mask,
                                               SPARGE_ORACLE_REAL, want.data, NULL, NULL, &why);
    progress_end(&watch);
    if (!status)
        *to = compare(&r->dump.array[STAGE_O], &want);
    array_free(&want);
    return library_result(status, &why, error);
}

static exit_code check(run *r, file_error *error)
{
    exit_code code = r->args.check ? measure(r, NULL, "check", &r->real, error) : EXIT_FINE;
    r->masked = r->real;
    if (!code && r->args.check && mask_of(r))
        code = measure(r, mask_of(r), "check of the mask", &r->masked, error);
    return code;
}

static exit_code report(run *r, file_error *error)
{
    const sparge_problem *const p = &r->in.problem;
    const sparge_result *const x = &r->result;
    const sparge_counts *const c = &x->counts;
    const double dim = (double)p->dim, dim_v = (double)p->dim_v, tera = 1e12 * r->seconds;
    json_t *const per_head = json_array();
    for (int64_t h = 0; h < p->batch * p->heads; h++)
        json_array_append_new(per_head, json_number(sparge_sparsity(&x->head_counts[h])));
    json_t *json = json_pack(
        "{s:s, s:s, s:i, s:i, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o,"
        " s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
        "backend", sparge_backend_string(x->backend), "isa", sparge_isa_string(x->isa),
        "threads", x->threads, "rung", x->rung, "pv", options_precisions[x->pv],
        "workspace_bytes", (json_int_t)x->workspace,
        "batch", (json_int_t)p->batch, "heads", (json_int_t)p->heads,
        "kv_heads", (json_int_t)p->kv_heads, "q_len", (json_int_t)p->q_len,
        "k_len", (json_int_t)p->k_len, "dim", (json_int_t)p->dim, "dim_v", (json_int_t)p->dim_v,
        "block_q", (json_int_t)r->options.block_q, "block_k", (json_int_t)r->options.block_k,
        "pairs", (json_int_t)c->pairs, "sparsity", json_number(sparge_sparsity(c)),
        "sparsity_qk", json_number(sparge_sparsity_qk(c)),
        "sparsity_pv", json_number(sparge_sparsity_pv(c)), "sparsity_per_head", per_head,
        "seconds_predict", json_number(x->seconds_predict),
        "seconds_quantize", json_number(x->seconds_quantize),
        "seconds_attend", json_number(x->seconds_attend), "seconds_total", json_number(r->seconds),
        "tops", json_number(2.0 * (dim + dim_v) * (double)c->tokens / tera), "tops_executed",
        json_number(2.0 * (dim * (double)c->qk_tokens + dim_v * (double)c->pv_tokens) / tera));
    json = json_joined(json, settled_json(&r->settled));
    if (r->args.check) {
        const comparison *const real = &r->real;
        const char *const what = r->rows ? capture_name(r->capture) : "o";
        json_t *const errors = json_pack(
            "{s:o, s:o, s:o, s:o, s:o}", "l1", json_number(real->l1), "worst_row_l1", json_number(real->worst_row_l1),
            "cosine", json_number(real->cosine), "rmse", json_number(real->rmse), "mask_worst_row_l1",
            json_number(r->masked.worst_row_l1));
        json_t *const masked = json_pack("{s:I}", "mask_not_finite_apart", (json_int_t)r->masked.not_finite_apart);
        json = json_joined(json_joined(json_joined(json, errors), compare_counts(real)), masked);
        compare_warn(real, what, "dense attention");
        if (r->masked.not_finite_apart)
            compare_warn(&r->masked, what, "attention over the mask");
    }
    if (!r->rows)
        return print_json(json, error);
    json = json_joined(json, json_pack("{s:o}", "file", json_text(capture_name(r->capture))));
    if (json && json_array_append_new(r->rows, json) == 0)
        return EXIT_FINE;
    file_error_set(error, NULL, "no memory for the result");
    return EXIT_MACHINE;
}

/* All of it for one capture. */
static exit_code run_capture(const run_args *args, const capture *c, json_t *rows, file_error *error)
{
    static exit_code (*const steps[])(run *, file_error *) = {
        read_files, open_files, attend, write_files, check, report,
    };
    run r = {.args = *args, .capture = c, .options = args->attention.options, .rows = rows};
    exit_code code = EXIT_FINE;
    for (size_t n = 0; n < sizeof steps / sizeof *steps && !code; n++)
        code = steps[n](&r, error);
    if (!code && !outputs_commit(error)) /* last: whatever failed before leaves no file */
        code = EXIT_FILE;
    else if (!code)
        dump_tidy(&r.dump);
    outputs_discard();
    dump_free(&r.dump);
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
        code = place_output(&one.dump, c, "", path[4], error);
    return code ? code : run_capture(&one, c, rows, error);
}

exit_code run_command(int argc, char **argv, file_error *error)
{
    run_args args = {.base = {error}};
    const attention_args *const a = &args.attention;
    given_captures given = {0};
    exit_code code = attention_parse(&run_argp, argc, argv, &args.base, &args.attention);
    if (!code)
        code = given_find(a, &given, error);
    json_t *const rows = given.folder ? json_array() : NULL;
    for (int64_t n = 0; n < given.count && !code; n++)
        code = rows ? run_listed(&args, &given.list[n], rows, error) : run_capture(&args, given.list, NULL, error);
    if (rows && !code)
        code = print_json(json_pack("{s:o, s:O}", "folder", json_text(a->file[0]), "files", rows), error);
    json_decref(rows);
    given_free(&given);
    return code;
}
