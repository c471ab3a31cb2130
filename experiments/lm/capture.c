/* SPDX-License-Identifier: Apache-2.0 */
/* capture.c: sparge-lm capture: q, k and v of layers as attention is given them, in the files that
 * sparge tune and sparge run read (experiments/capture/README.md). */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "experiments/lm/lm.h"
#include "tools/output.h"
#include "tools/safetensors.h"

typedef struct capture_args {
    options_base base;
    lm_args lm;
    int64_t layer[LM_LIST], group[LM_LIST];
    int layers, groups; /* 0: all */
} capture_args;

enum { LAYERS = 1280, GROUPS };

static const struct argp_option capture_options[] = {
    {"layers", LAYERS, "N,...", 0, "which (all)", 0},
    {"groups", GROUPS, "N,...", 0, "which key heads, each with its query heads (all)", 0},
    {0},
};

static error_t capture_parser(int key, char *text, struct argp_state *state)
{
    capture_args *a = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &a->lm; return 0;
    case LAYERS: return lm_list(state, "--layers", text, 0, INT32_MAX, a->layer, &a->layers);
    case GROUPS: return lm_list(state, "--groups", text, 0, INT32_MAX, a->group, &a->groups);
    case ARGP_KEY_SUCCESS:
        if (a->lm.texts != 1 || a->lm.lengths > 1 || a->lm.choices > 1)
            return options_wrong(state, "give one text, one --length and one --attention");
        if (!a->lm.attention.output)
            return options_wrong(state, "-o is missing: the folder to write into");
        if (a->lm.choices == 0 && a->lm.attention.given & option_bits(OPT_THETA, OPT_CELL))
            return options_wrong(state,
                                 "--theta, --tau, --topk, --min-mass, --cell and --lambda are for "
                                 "--attention sparse, which is not asked for");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {{&lm_argp, 0, NULL, 0}, {0}};
static const struct argp capture_argp = {
    .options = capture_options,
    .parser = capture_parser,
    .args_doc = "MODEL TEXT",
    .doc = "Writes q, k and v of layers, after the rotation and before the scale, in float16 "
           "(float32 where that would lose more than 11 bits do), and manifest.json, into the "
           "folder that -o names. The model runs with --attention (f32).",
    .children = children,
};

typedef struct capturing {
    const capture_args *args;
    const lm *m;
    const lm_text *text;
    const char *folder;
    json_t *manifest, *files; /* the files are in the manifest */
    int64_t nonfinite;        /* elements of all files */
} capturing;

/* An empty list holds every number. */
static bool holds(const int64_t *list, int listed, int64_t n)
{
    for (int k = 0; k < listed; k++)
        if (list[k] == n)
            return true;
    return listed == 0;
}

/* The chosen heads of a view, [1][heads][tokens][channels]; their numbers are appended to `list`,
 * unless it is NULL. */
static bool copy_heads(const capturing *x, const sparge_in *from, int64_t heads, int64_t per_group,
                       int64_t tokens, int64_t dim, array *to, json_t *list, file_error *error)
{
    int64_t count = 0;
    for (int64_t h = 0; h < heads; h++)
        count += holds(x->args->group, x->args->groups, h / per_group);
    if (!array_alloc(ARRAY_F32, 4, (const int64_t[]){1, count, tokens, dim}, to, error))
        return false;
    float *at = to->data;
    for (int64_t h = 0; h < heads; h++) {
        if (!holds(x->args->group, x->args->groups, h / per_group))
            continue;
        for (int64_t t = 0; t < tokens; t++, at += dim)
            memcpy(at, (const float *)from->data + h * from->head + t * from->token,
                   (size_t)dim * sizeof *at);
        json_array_append_new(list, json_integer(h));
    }
    return true;
}

static exit_code save(const capturing *x, const char *name, const array qkv[3], file_error *error)
{
    static const char *const names[] = {"q", "k", "v"};
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", x->folder, name);
    output_file *file = output_open(path, error);
    return file && safetensors_write(output_stream(file), path, names, 3, qkv, error) &&
                   outputs_commit(error)
               ? EXIT_FINE
               : EXIT_FILE;
}

static exit_code save_manifest(const capturing *x, file_error *error)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/manifest.json", x->folder);
    return json_save(path, x->manifest, error);
}

/* Adds the file to the manifest, so that what is there is always said to be there. */
static exit_code list_file(capturing *x, const char *name, int64_t layer, json_t *heads,
                           json_t *groups, bool small, int64_t nonfinite, file_error *error)
{
    char path[PATH_MAX], sha256[SHA256_TEXT];
    snprintf(path, sizeof path, "%s/%s", x->folder, name);
    const exit_code code = capture_sha256(path, sha256, error);
    x->nonfinite += nonfinite;
    json_array_append_new(x->files,
                          json_pack("{s:s, s:s, s:I, s:O, s:O, s:s, s:I}", "file", name, "sha256",
                                    sha256, "layer", (json_int_t)layer, "query_heads", heads,
                                    "kv_heads", groups, "dtype", small ? "float16" : "float32",
                                    "nonfinite", (json_int_t)nonfinite));
    return code ? code : save_manifest(x, error);
}

static exit_code visit(void *user, int64_t layer, const sparge_problem *p, file_error *error)
{
    capturing *x = user;
    if (!holds(x->args->layer, x->args->layers, layer))
        return EXIT_FINE;
    array qkv[3] = {{0}};
    json_t *heads = json_array(), *groups = json_array();
    bool ok = copy_heads(x, &p->q, p->heads, p->heads / p->kv_heads, p->q_len, p->dim, &qkv[0],
                         heads, error) &&
              copy_heads(x, &p->k, p->kv_heads, 1, p->k_len, p->dim, &qkv[1], groups, error) &&
              copy_heads(x, &p->v, p->kv_heads, 1, p->k_len, p->dim_v, &qkv[2], NULL, error);
    const bool small =
        ok && array_fits_f16(&qkv[0]) && array_fits_f16(&qkv[1]) && array_fits_f16(&qkv[2]);
    int64_t nonfinite = 0;
    for (int n = 0; n < 3 && ok; n++) {
        nonfinite += array_nonfinite(&qkv[n]);
        ok = !small || array_to_f16(&qkv[n], error);
    }
    char name[32];
    snprintf(name, sizeof name, "layer%02" PRId64 ".safetensors", layer);
    exit_code code = ok ? save(x, name, qkv, error) : EXIT_MACHINE;
    if (!code)
        code = list_file(x, name, layer, heads, groups, small, nonfinite, error);
    for (int n = 0; n < 3; n++)
        array_free(&qkv[n]);
    json_decref(heads);
    json_decref(groups);
    return code;
}

static exit_code check_numbers(const capture_args *a, const hyper *h, file_error *error)
{
    for (int n = 0; n < a->layers; n++)
        if (a->layer[n] >= h->layers) {
            file_error_set(error, NULL,
                           "--layers has %" PRId64 ", the model has %" PRId64 " layers",
                           a->layer[n], h->layers);
            return EXIT_USAGE;
        }
    for (int n = 0; n < a->groups; n++)
        if (a->group[n] >= h->kv_heads) {
            file_error_set(error, NULL,
                           "--groups has %" PRId64 ", the model has %" PRId64 " key heads",
                           a->group[n], h->kv_heads);
            return EXIT_USAGE;
        }
    return EXIT_FINE;
}

static exit_code open_folder(capturing *x, int64_t tokens, file_error *error)
{
    const hyper *h = x->m->hyper;
    if (strlen(x->folder) > PATH_MAX - 64) {
        file_error_set(error, x->folder, "the name is too long; choose another");
        return EXIT_FILE;
    }
    if (mkdir(x->folder, 0777) != 0 && errno != EEXIST) {
        file_error_set(error, x->folder, "cannot create this folder: %s; choose another",
                       strerror(errno));
        return EXIT_FILE;
    }
    x->files = json_array();
    x->manifest = json_pack(
        "{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:s, s:s, s:s, s:I, s:s, s:s, s:s, s:o, s:b, s:o}",
        "model", x->m->name, "weights_sha256", x->m->weights, "attention", x->m->choice[0].name,
        "n_layers", (json_int_t)h->layers, "n_heads", (json_int_t)h->heads, "n_kv_heads",
        (json_int_t)h->kv_heads, "head_dim", (json_int_t)h->head_dim, "sample", x->text->name,
        "text", x->text->name, "text_sha256", x->text->sha256, "tokens", (json_int_t)tokens,
        "layout", "BHND", "hook_point", "after RoPE, before the softmax scale", "channel_order",
        "half-split: channel i is rotated with i + head_dim / 2, as in Hugging Face", "rope_theta",
        json_float(h->rope_theta), "causal", true, "files", x->files);
    if (x->manifest)
        return save_manifest(x, error);
    file_error_set(error, x->folder, "no memory for its manifest, or a name in it is no UTF-8");
    return EXIT_FILE;
}

exit_code capture_command(int argc, char **argv, file_error *error)
{
    capture_args a = {.base = {error}};
    lm m;
    exit_code code = lm_open(&m, &capture_argp, argc, argv, &a.base, &a.lm);
    if (!code)
        code = check_numbers(&a, m.hyper, error);
    const int64_t tokens = code ? 0 : lm_length(&m, m.text, 0);
    if (!code)
        code = lm_check_length(&m, m.text, tokens);
    capturing x = {.args = &a, .m = &m, .text = m.text, .folder = a.lm.attention.output};
    if (!code)
        code = lm_weights(&m);
    if (!code)
        code = open_folder(&x, tokens, error);
    float *hidden = code ? NULL : lm_hidden(&m, tokens);
    if (!code && !hidden)
        code = EXIT_MACHINE;
    a.lm.attention.output = NULL; /* no rows */
    if (!code)
        code = lm_begin(&m, "capture", NULL);
    if (!code) {
        m.visit = visit;
        m.user = &x;
        lm_expect(&m, tokens, 1.0);
        code = lm_run(&m, &m.choice[0], m.text->token, tokens, hidden);
    }
    progress_end(&m.watch);
    if (!code && x.nonfinite)
        fprintf(stderr,
                "sparge-lm: %s: %" PRId64
                " elements of what was written are not finite, as its manifest.json says of each "
                "file; attention over them is not either\n",
                x.folder, x.nonfinite);
    if (!code)
        code = print_json(json_pack("{s:s, s:I, s:I, s:I}", "folder", x.folder, "files",
                                    (json_int_t)json_array_size(x.files), "tokens",
                                    (json_int_t)tokens, "nonfinite", (json_int_t)x.nonfinite),
                          error);
    free(hidden);
    json_decref(x.manifest);
    lm_close(&m);
    return code;
}
