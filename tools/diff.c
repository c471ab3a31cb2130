/* SPDX-License-Identifier: Apache-2.0 */
/* diff.c: sparge diff: how far two arrays are apart, or where two folders of intermediates part. */
#include <errno.h>
#include <math.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tools/compare.h"
#include "tools/intermediates.h"
#include "tools/judge.h"
#include "tools/mask_file.h"
#include "tools/npy.h"
#include "tools/options.h"
#include "tools/safetensors.h"

typedef struct diff_args {
    options_base base;
    const char *file[2]; /* got, want */
    int files;
    double max_l1, max_worst, tolerance; /* NaN: not given */
} diff_args;

enum { MAX_L1 = 256, MAX_WORST, TOLERANCE };

static const struct argp_option diff_options[] = {
    {"max-l1", MAX_L1, "X", 0, "fail above this relative L1", 0},
    {"max-worst", MAX_WORST, "X", 0, "fail where a row is above this relative L1", 0},
    {"tolerance", TOLERANCE, "X", 0, "of two folders: floats may differ by this share (0)", 0},
    {0},
};

static error_t diff_parser(int key, char *text, struct argp_state *state)
{
    diff_args *a = state->input;
    switch (key) {
    case MAX_L1: return options_real(state, "--max-l1", text, 0.0, INFINITY, &a->max_l1);
    case MAX_WORST: return options_real(state, "--max-worst", text, 0.0, INFINITY, &a->max_worst);
    case TOLERANCE: return options_real(state, "--tolerance", text, 0.0, 1.0, &a->tolerance);
    case ARGP_KEY_ARG:
        if (a->files == 2)
            return options_wrong(state, "'%.60s' is one file too many", text);
        a->file[a->files++] = text;
        return 0;
    case ARGP_KEY_END:
        return a->files == 2 ? 0
                             : options_wrong(state, "give two files, or two intermediates folders");
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp diff_argp = {
    .options = diff_options,
    .parser = diff_parser,
    .args_doc = "GOT.npy WANT.npy\nGOT.safetensors WANT.safetensors\nGOT_FOLDER WANT_FOLDER",
    .doc = "How far GOT is from WANT, as JSON on stdout; exit status 1 above a bound, where only "
           "one of the two is NaN or infinite, and where two folders differ. Of two masks (bool, "
           "or uint8 of four axes, or .safetensors) the blocks that are missing and extra too, and "
           "those of which not the same pairs are kept; without a bound they must be equal.",
};

/* ---- Reading --------------------------------------------------------------------------- */

_Noreturn static void unfit(const char *got, const char *want, const array *one, const array *other)
{
    char is[ARRAY_SHAPE_TEXT], expected[ARRAY_SHAPE_TEXT];
    array_shape_string(one->rank, one->shape, is);
    array_shape_string(other->rank, other->shape, expected);
    fail(EXIT_FILE, got, "is %s and %.160s is %s: only equal shapes can be compared", is, want,
         expected);
}

/* An array that is no mask of a .safetensors is in `blocks` alone. */
static void read_pair(const char *got, const char *want, mask_arrays pair[2])
{
    const char *const path[] = {got, want};
    const array *const one = &pair[0].blocks, *const other = &pair[1].blocks;
    const array *const bits = &pair[0].partial_bits, *const other_bits = &pair[1].partial_bits;
    for (int side = 0; side < 2; side++) {
        pair[side] = (mask_arrays){0};
        must_do(safetensors_named(path[side]) ? mask_arrays_read(path[side], &pair[side], &failure)
                                              : npy_read(path[side], &pair[side].blocks, &failure));
        must_do(pair[side].blocks.type != ARRAY_F16 || array_to_f32(&pair[side].blocks, &failure));
    }
    if (!compare_same_shape(one, other))
        unfit(got, want, one, other);
    if (bits->data && other_bits->data &&
        memcmp(bits->shape + 1, other_bits->shape + 1, 2 * sizeof *bits->shape) != 0)
        unfit(got, want, bits, other_bits);
}

/* ---- Two arrays ------------------------------------------------------------------------ */

/* As run --mask takes them: 0 is skipped, all else is kept. */
static bool is_mask(const array *x)
{
    return x->type == ARRAY_BOOL || (x->type == ARRAY_U8 && x->rank == 4);
}

/* The block of an entry, as an element of the blocks; past the last entry none. */
static int64_t block_of(const mask_arrays *x, int64_t n)
{
    if (!x->partial_index.data || n >= x->partial_index.shape[0])
        return INT64_MAX;
    int64_t at = 0;
    for (int d = 0; d < 4; d++)
        at = at * x->blocks.shape[d] + ((const int64_t *)x->partial_index.data)[4 * n + d];
    return at;
}

/* Blocks that both masks keep, but not with the same pairs. */
static json_t *diff_partials(const mask_arrays mask[2], int64_t *apart)
{
    const array *one = &mask[0].partial_bits, *other = &mask[1].partial_bits;
    const size_t size = (size_t)(one->shape[1] * one->shape[2]);
    int64_t n = 0, m = 0, first = -1;
    *apart = 0;
    for (;;) {
        const int64_t here = block_of(&mask[0], n), there = block_of(&mask[1], m);
        const int64_t at = here < there ? here : there;
        if (at == INT64_MAX)
            break;
        const bool same =
            here == there && memcmp((const uint8_t *)one->data + (size_t)n * size,
                                    (const uint8_t *)other->data + (size_t)m * size, size) == 0;
        if (!same && ((const uint8_t *)mask[0].blocks.data)[at] &&
            ((const uint8_t *)mask[1].blocks.data)[at]) {
            first = *apart ? first : at;
            ++*apart;
        }
        n += here == at;
        m += there == at;
    }
    return json_pack("{s:I, s:o}", "partial_apart", (json_int_t)*apart, "first_partial_apart",
                     compare_place(&mask[0].blocks, first, false));
}

static exit_code diff_files(const diff_args *a)
{
    static mask_arrays pair[2];
    const array *const got = &pair[0].blocks, *const want = &pair[1].blocks;
    const bool bounded = !isnan(a->max_l1) || !isnan(a->max_worst);
    read_pair(a->file[0], a->file[1], pair);
    const int masks = is_mask(got) + is_mask(want), other = is_mask(got);
    if (masks == 1 && !bounded)
        fail(EXIT_FILE, a->file[other],
             "is of %s and %.160s is a mask: without a bound they are not compared; save both as "
             "bool or uint8",
             array_type_string(pair[other].blocks.type), a->file[1 - other]);
    const comparison c = compare(got, want);
    bool ok =
        compare_within(&c, c.l1, a->max_l1) && compare_within(&c, c.worst_row_l1, a->max_worst);
    json_t *json = compare_json(&c, got);
    if (masks == 2) {
        const mask_difference d = judge_masks(got, want);
        int64_t apart;
        json = json_joined(json, json_joined(judge_json(got, &d), diff_partials(pair, &apart)));
        ok = ok && (bounded || d.missing + d.extra + apart == 0);
    }
    must(print_json(json_joined(json, json_pack("{s:b}", "ok", ok)), &failure));
    mask_arrays_free(&pair[0]);
    mask_arrays_free(&pair[1]);
    return ok ? EXIT_FINE : EXIT_DIFFERENT;
}

/* ---- Two folders of intermediates ------------------------------------------------------ */

/* What the axes of an array are called, and for tokens the block they are in. */
static json_t *place_of(const intermediate *s, const array *x, int64_t at, const int64_t block[2])
{
    static const char letters[] = "bhgqkijdv2";
    static const char *const words[] = {"batch",   "head",    "kv_head", "query",   "key",
                                        "q_block", "k_block", "channel", "channel", "index"};
    if (at < 0)
        return json_null();
    json_t *numbers = compare_place(x, at, false), *place = json_object();
    for (int d = 0; d < x->rank; d++) {
        const json_int_t n = json_integer_value(json_array_get(numbers, (size_t)d));
        json_object_set_new(place, words[strchr(letters, s->axes[d]) - letters], json_integer(n));
        if (s->axes[d] == 'q' && block[0] > 0)
            json_object_set_new(place, "q_block", json_integer(n / block[0]));
        if (s->axes[d] == 'k' && block[1] > 0)
            json_object_set_new(place, "k_block", json_integer(n / block[1]));
    }
    json_decref(numbers);
    return place;
}

/* The n-th array as a row of the report; NULL: it is in neither folder. */
static json_t *diff_one(const diff_args *a, int n, int64_t block[2])
{
    static mask_arrays pair[2];
    const array *const got = &pair[0].blocks, *const want = &pair[1].blocks;
    const intermediate *s = &intermediate_table[n];
    char path[2][PATH_MAX];
    bool found[2];
    for (int side = 0; side < 2; side++) {
        intermediates_path(a->file[side], n, path[side]);
        found[side] = access(path[side], F_OK) == 0;
    }
    if (!found[0] && !found[1])
        return NULL;
    if (!found[0] || !found[1])
        return json_pack("{s:s, s:b, s:s}", "array", s->name, "differs", true, "missing",
                         a->file[found[0]]);
    read_pair(path[0], path[1], pair);
    if (got->rank != (int)strlen(s->axes))
        fail(EXIT_FILE, path[0], "got %d axes, expected %zu for %s; write the intermediates again",
             got->rank, strlen(s->axes), s->name);
    if (n == INTERMEDIATE_BLOCKS && array_count(got) == 2 && got->type == ARRAY_I64)
        memcpy(block, got->data, 2 * sizeof *block);
    const double tolerance = s->type == ARRAY_F32 && !isnan(a->tolerance) ? a->tolerance : 0.0;
    const difference d = compare_elements(got, want, tolerance);
    json_t *row =
        json_pack("{s:s, s:b, s:I, s:I, s:o, s:o, s:o}", "array", s->name, "differs", d.first >= 0,
                  "elements", (json_int_t)d.elements, "different", (json_int_t)d.different, "first",
                  place_of(s, got, d.first, block), "worst", json_number(d.worst), "worst_at",
                  place_of(s, got, d.worst_at, block));
    mask_arrays_free(&pair[0]);
    mask_arrays_free(&pair[1]);
    return row;
}

static exit_code diff_folders(const diff_args *a)
{
    json_t *rows = json_array();
    const json_t *first = NULL;
    int64_t block[2] = {0};
    for (int n = 0; n < INTERMEDIATE_COUNT; n++) {
        json_t *row = diff_one(a, n, block);
        if (!first && json_is_true(json_object_get(row, "differs")))
            first = row;
        if (row)
            json_array_append_new(rows, row);
    }
    if (json_array_size(rows) == 0)
        fail(EXIT_FILE, a->file[0],
             "holds no intermediates; 'sparge run --intermediates DIR' writes them");
    must(print_json(json_pack("{s:O?, s:O?, s:o}", "first_array", json_object_get(first, "array"),
                              "first", json_object_get(first, "first"), "arrays", rows),
                    &failure));
    return first ? EXIT_DIFFERENT : EXIT_FINE;
}

exit_code diff_command(int argc, char **argv, file_error *error)
{
    diff_args a = {.base = {error}, .max_l1 = NAN, .max_worst = NAN, .tolerance = NAN};
    must(options_parse(&diff_argp, argc, argv, &a.base));
    int folders = 0;
    for (int side = 0; side < 2; side++) {
        struct stat status;
        if (stat(a.file[side], &status) != 0)
            fail(EXIT_FILE, a.file[side], "cannot open: %s; check the path", strerror(errno));
        folders += S_ISDIR(status.st_mode) ? 1 : 0;
    }
    if (folders == 2 && !(isnan(a.max_l1) && isnan(a.max_worst)))
        fail(EXIT_USAGE, NULL,
             "--max-l1 and --max-worst are for two arrays; for two folders give --tolerance");
    if (folders < 2 && !isnan(a.tolerance))
        fail(EXIT_USAGE, NULL,
             "--tolerance is for two folders; for two arrays give --max-l1 and --max-worst");
    /* Where only one is a folder, reading it will say so. */
    return folders == 2 ? diff_folders(&a) : diff_files(&a);
}
