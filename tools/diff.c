/* diff.c: sparge diff: how far two arrays are apart, or where two dumps part. */
#include <errno.h>
#include <math.h>
#include <string.h>
#include <sys/stat.h>

#include "tools/compare.h"
#include "tools/intermediates.h"
#include "tools/judge.h"
#include "tools/npy.h"
#include "tools/options.h"

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
    {"tolerance", TOLERANCE, "X", 0, "of two dumps: floats may differ by this share (0)", 0},
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
    .args_doc = "GOT.npy WANT.npy\nGOT_DUMP WANT_DUMP",
    .doc =
        "How far GOT is from WANT, as JSON on stdout; exit status 1 above a bound, where only "
        "one of the two is NaN or infinite, and where two dumps differ. Of two masks (bool, or "
        "uint8 of "
        "four axes) the blocks that are missing and extra too; without a bound they must be equal.",
};

/* ---- Reading --------------------------------------------------------------------------- */

static exit_code read_array(const char *path, array *out, file_error *error)
{
    const bool half = npy_read(path, out, error) && out->type == ARRAY_F16;
    if (out->data && (!half || array_to_f32(out, error)))
        return EXIT_FINE;
    return EXIT_FILE;
}

static exit_code read_pair(const char *const path[2], array pair[2], file_error *error)
{
    exit_code code = read_array(path[0], &pair[0], error);
    if (!code)
        code = read_array(path[1], &pair[1], error);
    if (!code && !compare_same_shape(&pair[0], &pair[1])) {
        char one[ARRAY_SHAPE_TEXT], other[ARRAY_SHAPE_TEXT];
        array_shape_string(pair[0].rank, pair[0].shape, one);
        array_shape_string(pair[1].rank, pair[1].shape, other);
        file_error_set(error, path[0], "is %s and %.160s is %s: only equal shapes can be compared",
                       one, path[1], other);
        code = EXIT_FILE;
    }
    return code;
}

/* ---- Two arrays ------------------------------------------------------------------------ */

/* As run --mask takes them: 0 is skipped, all else is kept. */
static bool is_mask(const array *x)
{
    return x->type == ARRAY_BOOL || (x->type == ARRAY_U8 && x->rank == 4);
}

static exit_code diff_files(const diff_args *a, file_error *error)
{
    array pair[2] = {{0}};
    const bool bounded = !isnan(a->max_l1) || !isnan(a->max_worst);
    exit_code code = read_pair(a->file, pair, error);
    const int masks = code ? 0 : is_mask(&pair[0]) + is_mask(&pair[1]);
    if (masks == 1 && !bounded) {
        const int other = is_mask(&pair[0]);
        file_error_set(error, a->file[other],
                       "is of %s and %.160s is a mask: without a bound they are not compared; "
                       "save both as bool or uint8",
                       array_type_string(pair[other].type), a->file[1 - other]);
        code = EXIT_FILE;
    }
    if (!code) {
        const comparison c = compare(&pair[0], &pair[1]);
        bool ok =
            compare_within(&c, c.l1, a->max_l1) && compare_within(&c, c.worst_row_l1, a->max_worst);
        json_t *json = compare_json(&c, &pair[0]);
        if (masks == 2) {
            const mask_difference d = judge_masks(&pair[0], &pair[1]);
            ok = ok && (bounded || d.missing + d.extra == 0);
            json = json_joined(json, judge_json(&pair[0], &d));
        }
        code = print_json(json_joined(json, json_pack("{s:b}", "ok", ok)), error);
        code = code || ok ? code : EXIT_DIFFERENT;
    }
    array_free(&pair[0]);
    array_free(&pair[1]);
    return code;
}

/* ---- Two dumps ------------------------------------------------------------------------- */

/* What the axes of a stage are called, and for tokens the block they are in. */
static json_t *place_of(const stage *s, const array *x, int64_t at, const int64_t block[2])
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

/* One stage, as a row of the report; *differs where it does. */
static exit_code diff_stage(const diff_args *a, int n, int64_t block[2], json_t **row,
                            bool *differs, file_error *error)
{
    const stage *s = &stages[n];
    char paths[2][PATH_MAX];
    const char *const path[] = {paths[0], paths[1]};
    bool there[2];
    struct stat status;
    for (int side = 0; side < 2; side++) {
        intermediates_path(a->file[side], n, paths[side]);
        there[side] = stat(path[side], &status) == 0;
    }
    *differs = there[0] != there[1];
    if (!there[0] || !there[1]) {
        if (*differs)
            *row = json_pack("{s:s, s:b, s:s}", "array", s->name, "differs", true, "missing",
                             a->file[there[0]]);
        return EXIT_FINE;
    }
    array pair[2] = {{0}};
    exit_code code = read_pair(path, pair, error);
    if (!code && pair[0].rank != (int)strlen(s->axes)) {
        file_error_set(error, path[0],
                       "has %d axes, %s of a intermediates has %zu; intermediates it again",
                       pair[0].rank, s->name, strlen(s->axes));
        code = EXIT_FILE;
    }
    if (!code) {
        if (n == STAGE_BLOCKS && array_count(&pair[0]) == 2 && pair[0].type == ARRAY_I64)
            memcpy(block, pair[0].data, 2 * sizeof *block);
        const double tolerance = s->type == ARRAY_F32 && !isnan(a->tolerance) ? a->tolerance : 0.0;
        const difference d = compare_elements(&pair[0], &pair[1], tolerance);
        *differs = d.first >= 0;
        *row =
            json_pack("{s:s, s:b, s:I, s:I, s:o, s:o, s:o}", "array", s->name, "differs", *differs,
                      "elements", (json_int_t)d.elements, "different", (json_int_t)d.different,
                      "first", place_of(s, &pair[0], d.first, block), "worst", json_number(d.worst),
                      "worst_at", place_of(s, &pair[0], d.worst_at, block));
    }
    array_free(&pair[0]);
    array_free(&pair[1]);
    return code;
}

static exit_code diff_dumps(const diff_args *a, file_error *error)
{
    json_t *rows = json_array();
    const char *first = NULL;
    json_t *place = NULL; /* owned by its row */
    int64_t block[2] = {0};
    exit_code code = EXIT_FINE;
    for (int n = 0; n < STAGES && !code; n++) {
        json_t *row = NULL;
        bool differs = false;
        code = diff_stage(a, n, block, &row, &differs, error);
        if (differs && !first) {
            first = stages[n].name;
            place = json_object_get(row, "first");
        }
        if (row)
            json_array_append_new(rows, row);
    }
    if (!code && json_array_size(rows) == 0) {
        file_error_set(error, a->file[0],
                       "holds no intermediates; 'sparge run --intermediates DIR' writes one");
        code = EXIT_FILE;
    }
    if (code) {
        json_decref(rows);
        return code;
    }
    code = print_json(
        json_pack("{s:s?, s:O?, s:o}", "first_array", first, "first", place, "arrays", rows),
        error);
    return code || !first ? code : EXIT_DIFFERENT;
}

exit_code diff_command(int argc, char **argv, file_error *error)
{
    diff_args a = {.base = {error}, .max_l1 = NAN, .max_worst = NAN, .tolerance = NAN};
    const exit_code code = options_parse(&diff_argp, argc, argv, &a.base);
    if (code)
        return code;
    struct stat status;
    int folders = 0;
    for (int side = 0; side < 2; side++) {
        if (stat(a.file[side], &status) != 0) {
            file_error_set(error, a.file[side], "cannot open: %s; check the path", strerror(errno));
            return EXIT_FILE;
        }
        folders += S_ISDIR(status.st_mode) ? 1 : 0;
    }
    if (folders == 2 && !(isnan(a.max_l1) && isnan(a.max_worst))) {
        file_error_set(
            error, NULL,
            "--max-l1 and --max-worst are of two arrays: of two dumps --tolerance bounds each "
            "element");
        return EXIT_USAGE;
    }
    if (folders < 2 && !isnan(a.tolerance)) {
        file_error_set(
            error, NULL,
            "--tolerance is of two dumps: of two arrays --max-l1 and --max-worst are the "
            "bounds");
        return EXIT_USAGE;
    }
    /* Where only one is a folder, reading it will say so. */
    return folders == 2 ? diff_dumps(&a, error) : diff_files(&a, error);
}
