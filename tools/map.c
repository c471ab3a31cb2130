/* map.c: sparge map: the attention of every head, averaged over blocks, beside its mask. Fig 2. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/device.h"
#include "tools/inputs.h"
#include "tools/intermediates.h"
#include "tools/judge.h"
#include "tools/kept.h"
#include "tools/npy.h"
#include "tools/picture.h"
#include "tools/places.h"
#include "tools/progress.h"
#include "tools/settle.h"

enum { MAP_OUT = 512 };

static const struct argp_option map_options[] = {
    {"map-out", MAP_OUT, "M.npy", 0, "write its numbers too, float64 [B,H,q blocks,k blocks]", 4},
    {0},
};

typedef struct map_args {
    options_base base;
    attention_args attention;
    const char *numbers;
} map_args;

static error_t map_parser(int key, char *text, struct argp_state *state)
{
    map_args *a = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = state->child_inputs[1] = &a->attention; return 0;
    case MAP_OUT: a->numbers = text; return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp shared = {.options = attention_options, .parser = attention_parser};
static const struct argp_child map_children[] = {
    {&shared, 0, NULL, 0}, {&params_argp, 0, NULL, 0}, {0}};
static const struct argp map_argp = {
    .options = map_options,
    .parser = map_parser,
    .children = map_children,
    .args_doc =
        "-o MAP.png|svg|pdf Q.npy K.npy [V.npy]\n-o MAP.png QKV.safetensors\n-o MAPS FOLDER",
    .doc = "A picture of the attention between blocks and of the mask that is predicted for it; "
           "with V and --lambda also of what lambda drops.\v"
           "Of a folder of captures, as sparge tune takes it, there is a picture of each file, in "
           "a folder too.",
};

/* Of one capture. */
typedef struct map {
    map_args args;
    const capture *capture;
    sparge_options options;
    inputs in;
    settled settled;
    sparge_mask mask;
    sparge_counts *counts;          /* [heads] */
    array mass, keep, why, pv_done; /* [batch][heads][q_blocks][k_blocks] f64, u8, u8, f32 */
    array o;
    char (*titles)[HEAD_TITLE];
    char title[160], subtitle[256], reasons[256];
    picture picture;
} map;

/* ---- The steps, in their order ---- */

/* Is there a lambda to draw? */
static bool asks_lambda(const attention_args *a)
{
    return a->params || a->options.thresholds.lambda !=
                            sparge_options_default(a->options.rules).thresholds.lambda;
}

static exit_code check_args(const attention_args *a, file_error *error)
{
    if (!a->files || !a->output) {
        file_error_set(error, NULL, "map needs %s; see 'sparge map --help'",
                       a->files ? "-o, the name of the picture" : "the files of q and k");
        return EXIT_USAGE;
    }
    if (a->files == 2 && asks_lambda(a)) {
        file_error_set(error, NULL, "%s needs the file of v too, to show what lambda drops",
                       a->params ? "--params" : "--lambda");
        return EXIT_USAGE;
    }
    return EXIT_FINE;
}

static exit_code read_files(map *m, file_error *error)
{
    const attention_args *a = &m->args.attention;
    exit_code code = settle_spare(a, m->capture, a->output, error);
    if (!code)
        code = settle_spare(a, m->capture, m->args.numbers, error);
    if (!code && picture_format_of(a->output) == PICTURE_UNKNOWN) {
        file_error_set(error, a->output,
                       "is of no kind that map draws; let the name end in .png, .svg or .pdf");
        code = EXIT_USAGE;
    }
    if (!code)
        code = inputs_read(a, asks_lambda(a), &m->in, error);
    return code ? code : settle(a, m->capture, &m->in.problem, &m->options, &m->settled, error);
}

static const sparge_thresholds *thresholds_of(const map *m, int64_t head)
{
    return m->options.per_head ? &m->options.per_head[head] : &m->options.thresholds;
}

/* The picture before there is anything on it: does it fit? */
static exit_code plan(map *m, file_error *error)
{
    const sparge_problem *p = &m->in.problem;
    const sparge_options *o = &m->options;
    sparge_error why;
    const exit_code code = library_result(sparge_mask_alloc(&m->mask, p, o, &why), &why, error);
    if (code)
        return code;
    m->picture = (picture){
        .heads = p->batch * p->heads,
        .rows = m->mask.q_blocks,
        .columns = m->mask.k_blocks,
        .block_q = o->block_q,
        .block_k = o->block_k,
    };
    for (int64_t h = 0; h < p->heads && p->v.data; h++)
        m->picture.lambda |= isfinite(thresholds_of(m, h)->lambda);
    int64_t width, height;
    if (picture_size(&m->picture, &width, &height))
        return EXIT_FINE;
    file_error_set(error, m->args.attention.output,
                   "%lld heads of %lld x %lld blocks are larger "
                   "than a picture of %d x %d; take larger --block-q and --block-k, or fewer heads",
                   (long long)m->picture.heads, (long long)m->mask.q_blocks,
                   (long long)m->mask.k_blocks, PICTURE_MAX, PICTURE_MAX);
    return EXIT_USAGE;
}

static exit_code compute(map *m, file_error *error)
{
    const sparge_problem *p = &m->in.problem;
    sparge_options *o = &m->options;
    const bool attends = m->picture.lambda;
    sparge_error why;
    m->counts = calloc((size_t)m->picture.heads + 1, sizeof *m->counts);
    m->titles = calloc((size_t)m->picture.heads + 1, sizeof *m->titles);
    if (!m->counts || !m->titles ||
        !intermediates_alloc("bhij", ARRAY_F64, p, o, &m->mass, error) ||
        !intermediates_alloc("bhij", ARRAY_U8, p, o, &m->why, error) ||
        !intermediates_alloc("bhij", ARRAY_F32, p, o, &m->pv_done, error) ||
        (attends && !intermediates_alloc("bhqv", ARRAY_F32, p, o, &m->o, error)))
        return EXIT_MACHINE;
    double seconds;
    const sparge_intermediates wanted = {.why = m->why.data};
    progress watch = progress_begin("lambda");
    o->progress = progress_tick;
    o->user = &watch;
    sparge_status status = device_predict(p, o, &m->mask, &wanted, &seconds, &why);
    if (!status && attends) {
        const sparge_intermediates intermediates = {.pv_done = m->pv_done.data};
        sparge_result result = {
            .o = {m->o.data, SPARGE_F32, p->heads * p->q_len * p->dim_v, p->q_len * p->dim_v,
                  p->dim_v},
            .intermediates = &intermediates,
            .head_counts = m->counts,
        };
        status = device_attend(p, o, &m->mask, &result, &seconds, &why);
    }
    progress_end(&watch);
    watch = progress_begin("attention map");
    if (!status)
        status = sparge_oracle(p, o, NULL, SPARGE_ORACLE_REAL, NULL, NULL, m->mass.data, &why);
    progress_end(&watch);
    if (status)
        return library_result(status, &why, error);
    return mask_array(&m->mask, p, o, &m->keep, error) ? EXIT_FINE : EXIT_MACHINE;
}

static void describe_thresholds(const map *m, char text[128])
{
    const sparge_thresholds *k = &m->options.thresholds;
    char tau[32] = "", topk[32] = "", lambda[32] = "";
    if (k->tau != SPARGE_OFF)
        snprintf(tau, sizeof tau, ", τ %g", (double)k->tau);
    if (k->topk != SPARGE_OFF)
        snprintf(topk, sizeof topk, ", topk %g", (double)k->topk);
    if (m->picture.lambda)
        snprintf(lambda, sizeof lambda, ", λ %g", (double)k->lambda);
    if (m->options.per_head)
        snprintf(text, 128, "thresholds tuned for layer %lld", (long long)m->settled.layer);
    else
        snprintf(text, 128, "θ %g%s%s%s", (double)k->theta, tau, topk, lambda);
}

/* Of each block what is drawn, of each head its title. */
static exit_code describe(map *m, file_error *error)
{
    (void)error;
    const sparge_problem *p = &m->in.problem;
    const sparge_options *o = &m->options;
    const int64_t blocks = m->picture.rows * m->picture.columns;
    double sum = 0.0;
    int64_t nonfinite = 0;
    if (!m->picture.lambda)
        kept_counts(&m->keep, p, o, m->counts);
    for (int64_t n = 0; n < m->picture.heads; n++) {
        const sparge_counts *c = &m->counts[n];
        for (int64_t at = n * blocks; at < (n + 1) * blocks; at++) {
            const int64_t i = at / m->picture.columns % m->picture.rows;
            const int64_t j = at % m->picture.columns;
            const bool seen = block_visible(p, o, i, j), keep = ((uint8_t *)m->keep.data)[at];
            float *done = (float *)m->pv_done.data + at;
            if (!keep)
                *done = seen ? PICTURE_SKIPPED : PICTURE_UNSEEN;
            else if (!m->picture.lambda)
                *done = 1.0f;
        }
        const array mass = array_part(&m->mass, 2, n), kept = array_part(&m->keep, 2, n);
        const recall r = judge_recall(&mass, &kept, p->q_len, o->block_q);
        nonfinite += r.nonfinite;
        sum += sparge_sparsity(c);
        char batch[32] = "";
        if (p->batch > 1)
            snprintf(batch, sizeof batch, "batch %lld, ", (long long)(n / p->heads));
        char keeps[48] = "its attention is not a number";
        if (!isnan(r.share))
            snprintf(keeps, sizeof keeps, "keeps %.1f %% of the attention", 100.0 * r.share);
        snprintf(m->titles[n], HEAD_TITLE, "%shead %lld: sparsity %.3f, %s", batch,
                 (long long)capture_head(m->capture, n % p->heads), sparge_sparsity(c), keeps);
    }
    if (nonfinite)
        fprintf(
            stderr,
            "sparge: %lld of %lld blocks have attention that is not a number: q or k is not finite "
            "there; what is kept is measured over the others\n",
            (long long)nonfinite, (long long)(blocks * m->picture.heads));
    snprintf(m->title, sizeof m->title, "%lld × %lld tokens, sparsity %.3f", (long long)p->q_len,
             (long long)p->k_len, m->picture.heads ? sum / (double)m->picture.heads : 0.0);
    static const char *const causal[] = {"", "causal, ", "causal from the start, "};
    char thresholds[128];
    describe_thresholds(m, thresholds);
    snprintf(m->subtitle, sizeof m->subtitle, "%sblocks of %lld queries × %lld keys, %s%s",
             causal[o->causal], (long long)o->block_q, (long long)o->block_k, thresholds,
             o->sink ? ", sink" : "");
    const reasons why = reasons_of(&m->why, p, o);
    reasons_text(&why, m->reasons);
    reasons_warn(&why, o, m->args.attention.file[0]);
    m->picture.mass = m->mass.data;
    m->picture.done = m->pv_done.data;
    m->picture.title = m->title;
    m->picture.subtitle = m->subtitle;
    m->picture.reasons = m->reasons;
    m->picture.head_title = (const char(*)[HEAD_TITLE])m->titles;
    return EXIT_FINE;
}

static exit_code write_picture(const map *m, const char *bytes, size_t size, file_error *error)
{
    const char *path = m->args.attention.output;
    output_file *numbers = m->args.numbers ? output_open(m->args.numbers, error) : NULL;
    if (m->args.numbers &&
        (!numbers || !npy_write(output_stream(numbers), m->args.numbers, &m->mass, error)))
        return EXIT_FILE;
    output_file *file = output_open(path, error);
    if (!file)
        return EXIT_FILE;
    if (fwrite(bytes, 1, size, output_stream(file)) == size)
        return outputs_commit(error) ? EXIT_FINE : EXIT_FILE;
    file_error_set(error, path, "cannot write: %s; choose another place", strerror(errno));
    return EXIT_FILE;
}

/* Drawn before a file is opened: libraries of letters do not survive every want of memory. */
static exit_code write_files(map *m, file_error *error)
{
    const char *path = m->args.attention.output;
    size_t size;
    char *bytes = picture_draw(&m->picture, picture_format_of(path), &size);
    if (!bytes) {
        file_error_set(error, path, "no memory for the picture");
        return EXIT_MACHINE;
    }
    const exit_code code = write_picture(m, bytes, size, error);
    free(bytes);
    return code;
}

static exit_code map_capture(const map_args *args, const capture *c, file_error *error)
{
    static exit_code (*const steps[])(map *, file_error *) = {
        read_files, plan, compute, describe, write_files,
    };
    map m = {.args = *args, .capture = c, .options = args->attention.options};
    exit_code code = EXIT_FINE;
    for (size_t n = 0; n < sizeof steps / sizeof *steps && !code; n++)
        code = steps[n](&m, error);
    outputs_discard();
    free(m.counts);
    free(m.titles);
    array_free(&m.mass);
    array_free(&m.keep);
    array_free(&m.why);
    array_free(&m.pv_done);
    array_free(&m.o);
    sparge_mask_free(&m.mask);
    inputs_free(&m.in);
    settled_free(&m.settled);
    return code;
}

static exit_code map_listed(const map_args *args, const capture *c, file_error *error)
{
    map_args one = *args;
    char drawing[PATH_MAX], numbers[PATH_MAX];
    one.attention.file[0] = c->path;
    exit_code code = place_output(&one.attention.output, c, ".png", drawing, error);
    if (!code)
        code = place_output(&one.numbers, c, ".npy", numbers, error);
    return code ? code : map_capture(&one, c, error);
}

exit_code map_command(int argc, char **argv, file_error *error)
{
    map_args args = {.base = {error}};
    given_captures given = {0};
    exit_code code = attention_parse(&map_argp, argc, argv, &args.base, &args.attention);
    if (!code)
        code = check_args(&args.attention, error);
    if (!code)
        code = given_find(&args.attention, &given, error);
    for (int64_t n = 0; n < given.count && !code; n++)
        code = given.folder ? map_listed(&args, &given.list[n], error)
                            : map_capture(&args, given.list, error);
    given_free(&given);
    return code;
}
