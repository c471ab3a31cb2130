/* SPDX-License-Identifier: Apache-2.0 */
/* map.c: sparge map: the attention of every head, averaged over blocks, beside its mask. Fig 2. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/block_mask.h"
#include "sparge_mask.h"
#include "tools/device.h"
#include "tools/inputs.h"
#include "tools/intermediates.h"
#include "tools/judge.h"
#include "tools/kept.h"
#include "tools/mask_file.h"
#include "tools/npy.h"
#include "tools/picture.h"
#include "tools/places.h"
#include "tools/plan.h"
#include "tools/progress.h"
#include "tools/settle.h"

enum { MAP_OUT = 512, PAIRS_OUT };
enum { CHILDREN = 3 };

static const struct argp_option map_options[] = {
    {"map-out", MAP_OUT, "M.npy", 0, "write its numbers too, float64 [B,H,q blocks,k blocks]", 4},
    {"pairs-out", PAIRS_OUT, "P.npy", 0, "write which visible pairs of tokens the mask keeps", 4},
    {0},
};

typedef struct map_args {
    options_base base;
    attention_args attention;
    const char *numbers, *pairs;
} map_args;

static error_t map_parser(int key, char *text, struct argp_state *state)
{
    map_args *a = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        for (int n = 0; n < CHILDREN; n++)
            state->child_inputs[n] = &a->attention;
        return 0;
    case MAP_OUT: a->numbers = text; return 0;
    case PAIRS_OUT: a->pairs = text; return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child map_children[] = {
    {&attention_argp, 0, NULL, 0}, {&params_argp, 0, NULL, 0}, {&method_argp, 0, NULL, 0}, {0}};
static const struct argp map_argp = {
    .options = map_options,
    .parser = map_parser,
    .children = map_children,
    .args_doc =
        "-o MAP.png|svg|pdf Q.npy K.npy [V.npy]\n-o MAP.png QKV.safetensors\n-o MAPS FOLDER",
    .doc = "A picture of the attention between blocks and of the mask that is predicted for it, "
           "or of the pairs that a method attends to, not pooled; "
           "with V and --lambda also of what lambda drops.\vOf a folder of captures, as sparge "
           "tune takes it, there is a picture of each file, in a folder too.",
};

/* Of one capture. */
typedef struct map {
    map_args args;
    const capture *capture;
    sparge_options options;
    inputs in;
    settled settled;
    method_choice found;
    sparge_plan plan;
    sparge_mask mask;      /* of the plan, in the caller's order of tokens, without what it pools */
    sparge_counts *counts; /* [heads] */
    array mass, keep, why, pv_done; /* [batch][heads][q_blocks][k_blocks] f64, u8, u8, f32 */
    array dense, masked;            /* [batch][heads][q_len]: the oracle's lse, and over the mask */
    array o;
    char (*titles)[HEAD_TITLE];
    char title[160], subtitle[256], reasons[256];
    picture picture;
} map;

/* ---- The steps, in their order ---- */

/* Is there a lambda to draw? */
static bool asks_lambda(const attention_args *a)
{
    return a->params || a->method.method ||
           a->options.thresholds.lambda !=
               sparge_options_default(a->options.rules).thresholds.lambda;
}

static void check_args(const attention_args *a)
{
    if (!a->files || !a->output)
        fail(EXIT_USAGE, NULL, "map needs %s; see 'sparge map --help'",
             a->files ? "-o, the name of the picture" : "the files of q and k");
    if (a->files == 2 && asks_lambda(a))
        fail(EXIT_USAGE, NULL, "%s needs the file of v too",
             a->params          ? "--params"
             : a->method.method ? "--method"
                                : "--lambda");
}

static void read_files(map *m)
{
    const attention_args *a = &m->args.attention;
    settle_spare(a, m->capture, a->output);
    settle_spare(a, m->capture, m->args.numbers);
    settle_spare(a, m->capture, m->args.pairs);
    if (picture_format_of(a->output) == PICTURE_UNKNOWN)
        fail(EXIT_USAGE, a->output,
             "is of no kind that map draws; let the name end in .png, .svg or .pdf");
    inputs_read(a, asks_lambda(a), &m->in);
    mask_pairs_writable(m->args.pairs, &m->in.problem);
    settle(a, m->capture, &m->in.problem, &m->options, &m->settled);
    plan_make(a, m->capture, &m->in.problem, &m->options, &m->found, &m->plan);
}

static bool predicts(const map *m)
{
    return sparge_plan_is_plain(&m->plan) && m->plan.part[0].predicted;
}

/* The picture before there is anything on it: does it fit? */
static void lay_out(map *m)
{
    const sparge_problem *p = &m->in.problem;
    const sparge_options *o = &m->options;
    picture *to = &m->picture;
    must_sparge(sparge_mask_alloc(&m->mask, p, o, &library_error));
    *to = (picture){
        .heads = p->batch * p->heads,
        .rows = m->mask.q_blocks,
        .columns = m->mask.k_blocks,
        .block_q = o->block_q,
        .block_k = o->block_k,
    };
    for (int64_t h = 0; h < p->heads && p->v.data && predicts(m); h++)
        to->lambda |= isfinite((o->per_head ? &o->per_head[h] : &o->thresholds)->lambda);
    int64_t width, height;
    if (!picture_size(to, &width, &height))
        fail(EXIT_USAGE, m->args.attention.output,
             "%lld heads of %lld x %lld blocks are larger than a picture of %d x %d; take larger "
             "--block-q and --block-k, or fewer heads",
             (long long)to->heads, (long long)to->rows, (long long)to->columns, PICTURE_MAX,
             PICTURE_MAX);
}

/* The oracle over a mask; mass may be NULL. */
static void ask(map *m, const sparge_mask *mask, const char *what, array *lse, double *mass)
{
    const sparge_problem *p = &m->in.problem;
    intermediates_alloc("bhq", ARRAY_F64, p, &m->options, lse);
    progress watch = progress_begin(what);
    progress_watch(&watch, &m->options);
    const sparge_status status = sparge_oracle(p, &m->options, mask, SPARGE_ORACLE_REAL, NULL,
                                               lse->data, mass, &library_error);
    progress_end(&watch);
    must_sparge(status);
}

/* The mask of a plan that needs no prediction any more. */
static void take_mask(map *m)
{
    const sparge_problem *p = &m->in.problem;
    sparge_part *part = &m->plan.part[0];
    if (sparge_plan_is_plain(&m->plan)) {
        if (!part->mask.bits) /* dense */
            memset(m->mask.bits, 0xff, (size_t)device_mask_bytes(&m->mask));
        else {
            sparge_mask_free(&m->mask);
            m->mask = part->mask;
            part->mask = (sparge_mask){0};
        }
        return;
    }
    array pairs;
    plan_pairs(&m->plan, &pairs);
    for (int64_t n = 0; n < array_count(&pairs); n++)
        ((uint8_t *)pairs.data)[n] &= 1; /* 2 is pooled */
    sparge_mask_free(&m->mask);
    must_sparge(sparge_mask_from_pairs(&m->mask, p, &m->options, pairs.data, &library_error));
    array_free(&pairs);
    must_sparge(sparge_plan_count(&m->plan, m->counts, &library_error));
}

static void compute(map *m)
{
    const sparge_problem *p = &m->in.problem;
    sparge_options *o = &m->options;
    const size_t heads = (size_t)m->picture.heads;
    m->counts = must_alloc(heads, sizeof *m->counts, "the counters of the heads");
    m->titles = must_alloc(heads, sizeof *m->titles, "the titles of the heads");
    intermediates_alloc("bhij", ARRAY_F64, p, o, &m->mass);
    intermediates_alloc("bhij", ARRAY_U8, p, o, &m->why);
    intermediates_alloc("bhij", ARRAY_F32, p, o, &m->pv_done);
    const sparge_intermediates predicted = {.why = m->why.data};
    progress watch = progress_begin("lambda");
    progress_watch(&watch, o);
    if (predicts(m))
        device_predict(p, o, &m->mask, &predicted);
    else
        take_mask(m);
    if (m->picture.lambda) {
        intermediates_alloc("bhqv", ARRAY_F32, p, o, &m->o);
        const sparge_intermediates attended = {.pv_done = m->pv_done.data};
        sparge_result result = {
            .o = {m->o.data, SPARGE_F32, p->heads * p->q_len * p->dim_v, p->q_len * p->dim_v,
                  p->dim_v},
            .intermediates = &attended,
            .head_counts = m->counts,
        };
        device_attend(p, o, &m->mask, false, &result);
    }
    progress_end(&watch);
    ask(m, NULL, "attention map", &m->dense, m->mass.data);
    ask(m, &m->mask, "attention over the mask", &m->masked, NULL);
    mask_array(&m->mask, p, o, &m->keep);
    if (sparge_plan_is_plain(&m->plan) && !m->picture.lambda)
        must_sparge(sparge_mask_count(&m->mask, p, o, m->counts, &library_error));
}

enum { WORDS = 192 }; /* of thresholds */

static void describe_thresholds(const map *m, char text[WORDS])
{
    const sparge_thresholds *k = &m->options.thresholds;
    const sparge_method *method = m->found.method;
    for (int n = method ? snprintf(text, WORDS, "%s", method->name) : 0, q = 0;
         method && q < method_params(method) && n < WORDS; q++)
        n += snprintf(text + n, (size_t)(WORDS - n), ", %s %g", method->param[q].name,
                      m->found.param[q]);
    if (method)
        return;
    char tau[32] = "", topk[32] = "", mass[32] = "", lambda[32] = "";
    if (k->tau != SPARGE_OFF)
        snprintf(tau, sizeof tau, ", τ %g", (double)k->tau);
    if (k->topk != SPARGE_OFF)
        snprintf(topk, sizeof topk, ", topk %g", (double)k->topk);
    if (k->min_mass > 0.0f)
        snprintf(mass, sizeof mass, ", mass > %g", (double)k->min_mass);
    if (m->picture.lambda)
        snprintf(lambda, sizeof lambda, ", λ %g", (double)k->lambda);
    if (m->options.per_head)
        snprintf(text, WORDS, "thresholds tuned for layer %lld", (long long)m->settled.layer);
    else
        snprintf(text, WORDS, "θ %g%s%s%s%s", (double)k->theta, tau, topk, mass, lambda);
}

/* The share of the visible pairs of a kept block that are attended. */
static float attended(const map *m, int64_t n, int64_t i, int64_t j)
{
    const sparge_options *o = &m->options;
    const sparge_geometry g = geometry_of(&m->in.problem, o);
    const int64_t heads = m->mask.heads, words = sparge_mask_row_words(g.block_k);
    const uint32_t *bits = sparge_mask_partial(&m->mask, o, n / heads, n % heads, i, j);
    int64_t pairs = 0, all = 0;
    for (int64_t r = 0; bits && r < sparge_block_rows(g.q_len, g.block_q, i); r++) {
        const int64_t keys = sparge_keys_visible(&g, i * g.block_q + r, j);
        all += keys;
        pairs += sparge_mask_row_count(bits + r * words, keys);
    }
    return bits ? (float)pairs / (float)all : 1.0f;
}

/* What is drawn of each block of head n: pv_done says how much of a kept one was computed. */
static void mark_blocks(map *m, int64_t n)
{
    const int64_t blocks = m->picture.rows * m->picture.columns;
    float *done = (float *)m->pv_done.data + n * blocks;
    const uint8_t *keep = (const uint8_t *)m->keep.data + n * blocks;
    const sparge_geometry g = geometry_of(&m->in.problem, &m->options);
    for (int64_t at = 0; at < blocks; at++) {
        const int64_t i = at / g.k_blocks, j = at % g.k_blocks;
        if (!keep[at])
            done[at] = j < sparge_blocks_visible(&g, i) ? PICTURE_SKIPPED : PICTURE_INVISIBLE;
        else
            done[at] = (m->picture.lambda ? done[at] : 1.0f) * attended(m, n, i, j);
    }
}

/* The title of each head, and of all. */
static void describe(map *m)
{
    const sparge_problem *p = &m->in.problem;
    const sparge_options *o = &m->options;
    picture *to = &m->picture;
    double sum = 0.0;
    int64_t nonfinite = 0;
    for (int64_t n = 0; n < to->heads; n++) {
        mark_blocks(m, n);
        const array masked = array_part(&m->masked, 1, n), dense = array_part(&m->dense, 1, n);
        const recall r = judge_recall(&masked, &dense);
        const double sparsity = sparge_sparsity(&m->counts[n]);
        nonfinite += r.nonfinite;
        sum += sparsity;
        char batch[32] = "", keeps[48] = "its attention is not a number";
        if (p->batch > 1)
            snprintf(batch, sizeof batch, "batch %lld, ", (long long)(n / p->heads));
        if (!isnan(r.share))
            snprintf(keeps, sizeof keeps, "keeps %.1f %% of the attention", 100.0 * r.share);
        snprintf(m->titles[n], HEAD_TITLE, "%shead %lld: sparsity %.3f, %s", batch,
                 (long long)capture_head(m->capture, n % p->heads), sparsity, keeps);
    }
    if (nonfinite)
        fprintf(stderr,
                "sparge: %lld of %lld rows have attention that is not a number: q or k is not "
                "finite there; what is kept is measured over the others\n",
                (long long)nonfinite, (long long)array_count(&m->dense));
    snprintf(m->title, sizeof m->title, "%lld × %lld tokens, sparsity %.3f", (long long)p->q_len,
             (long long)p->k_len, to->heads ? sum / (double)to->heads : 0.0);
    static const char *const causal[] = {"", "causal, ", "causal from the start, "};
    char thresholds[WORDS];
    describe_thresholds(m, thresholds);
    snprintf(m->subtitle, sizeof m->subtitle, "%sblocks of %lld queries × %lld keys, %s%s",
             causal[o->causal], (long long)o->block_q, (long long)o->block_k, thresholds,
             o->sink ? ", sink" : "");
    if (predicts(m)) {
        const reasons why = reasons_of(&m->why, p, o);
        reasons_text(&why, m->reasons);
        reasons_warn(&why, o, m->args.attention.file[0]);
    }
    to->partial = m->mask.partial_first != NULL;
    to->mass = m->mass.data;
    to->done = m->pv_done.data;
    to->title = m->title;
    to->subtitle = m->subtitle;
    to->reasons = m->reasons;
    to->head_title = (const char(*)[HEAD_TITLE])m->titles;
}

/* Drawn before a file is opened: libraries of letters do not survive every want of memory. */
static void write_files(const map *m)
{
    const char *path = m->args.attention.output, *numbers = m->args.numbers;
    size_t size;
    char *bytes = picture_draw(&m->picture, picture_format_of(path), &size);
    if (!bytes)
        fail(EXIT_MACHINE, path, "no memory for the picture");
    output_file *file = numbers ? output_open(numbers, &failure) : NULL;
    must_do(!numbers || (file && npy_write(output_stream(file), numbers, &m->mass, &failure)));
    file = m->args.pairs ? output_open(m->args.pairs, &failure) : NULL;
    must_do(!m->args.pairs || file);
    if (file)
        plan_write_pairs(output_stream(file), m->args.pairs, &m->plan, &m->mask);
    file = output_open(path, &failure);
    must_do(file);
    if (fwrite(bytes, 1, size, output_stream(file)) != size)
        fail(EXIT_FILE, path, "cannot write: %s; choose another place", strerror(errno));
    must_do(outputs_commit(&failure));
    free(bytes);
}

static void map_capture(const map_args *args, const capture *c)
{
    static map m;
    m = (map){.args = *args, .capture = c, .options = args->attention.options};
    read_files(&m);
    lay_out(&m);
    compute(&m);
    describe(&m);
    write_files(&m);
    free(m.counts);
    free(m.titles);
    array_free(&m.mass);
    array_free(&m.keep);
    array_free(&m.why);
    array_free(&m.pv_done);
    array_free(&m.dense);
    array_free(&m.masked);
    array_free(&m.o);
    sparge_mask_free(&m.mask);
    sparge_plan_free(&m.plan);
    inputs_free(&m.in);
    settled_free(&m.settled);
}

exit_code map_command(int argc, char **argv, file_error *error)
{
    static given_captures given;
    map_args args = {.base = {error}};
    must(attention_parse(&map_argp, argc, argv, &args.base, &args.attention));
    check_args(&args.attention);
    given_find(&args.attention, &given);
    for (const capture *c = given.list; c < given.list + given.count; c++) {
        map_args one = args;
        char drawing[PATH_MAX], numbers[PATH_MAX], pairs[PATH_MAX];
        if (given.folder) {
            one.attention.file[0] = c->path;
            place_output(&one.attention.output, c, ".png", drawing);
            place_output(&one.numbers, c, ".npy", numbers);
            place_output(&one.pairs, c, ".npy", pairs);
        }
        map_capture(&one, c);
    }
    given_free(&given);
    return EXIT_FINE;
}
