/* SPDX-License-Identifier: Apache-2.0 */
/* bench_args.c: the command line of sparge bench: lists, their defaults, and what does not fit. */
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tools/bench.h"

enum { MAX_TOKENS = 1 << 24, MAX_HEADS = 1024 };

enum {
    SPARSITY = 768,
    Q_LEN,
    DIM,
    HEADS,
    MASK_KIND,
    THREADS,
    ISA,
    QK,
    PV,
    CAUSAL,
    KERNEL,
    CAPTURE,
    REPEAT,
    JSON,
    ALLOW_BUSY,
    BACKEND,
    BLOCK_Q,
    BLOCK_K,
};

static const struct argp_option bench_options_[] = {
    {0, 0, 0, 0, "Lists; every combination is a case:", 1},
    {"q-len", Q_LEN, "N,...", 0,
     "queries, and as many keys (4096,8192; in the paper's Fig 10 22272)", 0},
    {"dim", DIM, "D,...", 0, "channels of q, k and v (64,128)", 0},
    {"heads", HEADS, "H,...", 0, "heads (1)", 0},
    {"sparsity", SPARSITY, "X,...", 0, "of imposed masks (0,0.3,0.5,0.7,0.9); 0 is without a mask",
     0},
    {"mask-kind", MASK_KIND, "HOW,...", 0,
     "random and banded impose one, predicted takes what the predictor gives (random; predicted of "
     "a capture, and where an option says what is predicted)",
     0},
    {"threads", THREADS, "N,...", 0, "1 to 1024, or all (1,all)", 0},
    {"isa", ISA, "NAME,...", 0, "auto, scalar, avx2, avxvnni, avx512vnni or amx (auto)", 0},
    {"qk-dtype", QK, "HOW,...", 0, "Q.K in int8, int12, f32 or bf16 (int8)", 0},
    {"pv-dtype", PV, "HOW,...", 0,
     "P.V in int8, int12, f32 or bf16 (int8); on cuda int8, f32, f16, fp8 or fastest (fastest)", 0},
    {"kernel", KERNEL, "N,...", 0, "of cuda, 1 to 5 (the best that can do it)", 0},
    {"causal", CAUSAL, "WHERE,...", OPTION_ARG_OPTIONAL,
     "none, end or start (none, or as the capture; alone: end)", 0},
    {0, 0, 0, 0, "What is predicted:", 2},
    {"capture", CAPTURE, "QKV.safetensors", 0, "q, k and v of a model instead of synthetic ones",
     0},
    {0, 0, 0, 0, "How:", 3},
    {"block-q", BLOCK_Q, "N", 0, "tokens of a query block (128)", 0},
    {"block-k", BLOCK_K, "N", 0, "tokens of a key block (64)", 0},
    {"backend", BACKEND, "NAME", 0,
     "cpu, or cuda: its times are the device's own, and precisions that a kernel lacks are left "
     "out (cpu)",
     0},
    {"repeat", REPEAT, "N", 0, "rounds, of which the medians are taken (5)", 0},
    {"json", JSON, 0, 0, "an array of objects instead of tables", 0},
    {"allow-busy", ALLOW_BUSY, 0, 0,
     "time with several threads even beside other processes; the figures are marked 'busy'", 0},
    {0},
};

static const char *const masks[] = {"random", "banded", "predicted", NULL};

const char *bench_mask_string(bench_mask mask)
{
    return mask == BENCH_DENSE ? "dense" : mask == BENCH_ONEDNN ? "onednn" : masks[mask];
}

int bench_cores(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                       : (int)sysconf(_SC_NPROCESSORS_ONLN);
}

/* ---- Lists ---- */

/* What an item of a list may be: a whole number, a real one below `high`, or one of the words. */
typedef struct item_kind {
    const char *name;
    const char *const *words; /* NULL: numbers */
    int64_t low, high;        /* high of 0: a share, [0, 1) */
    bool dtype;               /* words that stand for a sparge_dtype */
} item_kind;

static error_t parse_item(struct argp_state *state, const item_kind *kind, const char *text,
                          double *to)
{
    int word = 0;
    int64_t whole = 0;
    error_t error;
    if (kind->words) {
        error = options_word(state, kind->name, text, kind->words, &word);
        *to = kind->dtype && !error ? (int)options_dtype(kind->words[word]) : word;
    } else if (kind->high == 0) {
        error = options_real(state, kind->name, text, 0.0, 1.0, to);
        if (!error && *to == 1.0)
            error = options_wrong(state,
                                  "%s is %.40s, it must be below 1: something has to be computed",
                                  kind->name, text);
    } else if (strcmp(kind->name, "--threads") == 0 && strcmp(text, "all") == 0) {
        error = 0;
        *to = bench_cores();
    } else {
        error = options_whole(state, kind->name, text, kind->low, kind->high, &whole);
        *to = (double)whole;
    }
    return error;
}

static error_t parse_list(struct argp_state *state, const item_kind *kind, const char *text,
                          bench_list *to)
{
    to->count = 0;
    for (const char *at = text; at; to->count++) {
        char item[64]; /* what is cut off is wrong in any case */
        const size_t length = strcspn(at, ",");
        snprintf(item, sizeof item, "%.*s", (int)(length < sizeof item ? length : sizeof item), at);
        if (length == 0)
            return options_wrong(state, "%s is '%.60s', which has an empty item", kind->name, text);
        if (to->count == BENCH_LIST)
            return options_wrong(state, "%s has more than %d items", kind->name, BENCH_LIST);
        const error_t error = parse_item(state, kind, item, &to->item[to->count]);
        if (error)
            return error;
        at = at[length] ? at + length + 1 : NULL;
    }
    return 0;
}

/* ---- Together ---- */

static bool has(const bench_list *list, double item)
{
    for (int n = 0; n < list->count; n++)
        if (list->item[n] == item)
            return true;
    return false;
}

static void default_to(bench_list *list, int count, const double *item)
{
    if (list->count > 0)
        return;
    memcpy(list->item, item, (size_t)count * sizeof *item);
    list->count = count;
}

static error_t finish(struct argp_state *state, bench_args *a)
{
    static const struct {
        int key;
        const char *name;
    } selecting[] = {{OPT_THETA, "--theta"},       {OPT_TAU, "--tau"},   {OPT_TOPK, "--topk"},
                     {OPT_MIN_MASS, "--min-mass"}, {OPT_CELL, "--cell"}, {OPT_SINK, "--sink"}};
    bool predicts = a->capture;
    for (size_t n = 0; n < sizeof selecting / sizeof *selecting; n++)
        predicts |= (a->attention.given & option_bit(selecting[n].key)) != 0;
    if (a->capture && (a->q_len.count || a->dim.count || a->heads.count))
        return options_wrong(state, "--capture has its own lengths, channels and heads; leave out "
                                    "--q-len, --dim and --heads");
    if ((a->attention.params || a->attention.ignore_manifest) && !a->capture)
        return options_wrong(state, "--%s is of --capture, which is not given",
                             a->attention.params ? "params" : "ignore-manifest");
    default_to(&a->mask, 1, (const double[]){predicts ? BENCH_PREDICTED : BENCH_RANDOM});
    if (a->sparsity.count && !has(&a->mask, BENCH_RANDOM) && !has(&a->mask, BENCH_BANDED))
        return options_wrong(state, "--sparsity is for imposed masks, the predictor finds its own; "
                                    "add random or banded to --mask-kind");
    for (size_t n = 0; n < sizeof selecting / sizeof *selecting && !has(&a->mask, BENCH_PREDICTED);
         n++)
        if (a->attention.given & option_bit(selecting[n].key))
            return options_wrong(state, "%s is of predicted masks; add predicted to --mask-kind",
                                 selecting[n].name);
    const bool cuda = a->backend == SPARGE_CUDA;
    if (cuda && (a->threads.count || a->isa.count || a->allow_busy))
        return options_wrong(
            state, "--threads, --isa and --allow-busy are of the cpu backend; leave them out");
    if (!cuda && a->kernel.count)
        return options_wrong(state, "--kernel is of the cuda backend; add --backend cuda");
    for (int n = 0; n < a->pv.count && !cuda; n++) {
        const sparge_dtype pv = (sparge_dtype)a->pv.item[n];
        if (pv == SPARGE_F16 || pv == SPARGE_FP8 || pv == SPARGE_FASTEST)
            return options_wrong(state,
                                 "--pv-dtype has %s, the cpu backend has int8, int12, f32, bf16",
                                 pv == SPARGE_FASTEST ? "fastest" : sparge_dtype_string(pv));
    }
    const int cores = cuda ? 1 : bench_cores();
    default_to(&a->q_len, 2, (const double[]){4096, 8192});
    default_to(&a->dim, 2, (const double[]){64, 128});
    default_to(&a->heads, 1, (const double[]){1});
    default_to(&a->sparsity, 5, (const double[]){0.0, 0.3, 0.5, 0.7, 0.9});
    default_to(&a->threads, cores > 1 ? 2 : 1, (const double[]){1, cores});
    default_to(&a->isa, 1, (const double[]){SPARGE_ISA_AUTO});
    default_to(&a->qk, 1, (const double[]){cuda ? SPARGE_FASTEST : SPARGE_INT8});
    default_to(&a->pv, 1, (const double[]){cuda ? SPARGE_FASTEST : SPARGE_INT8});
    default_to(&a->kernel, 1, (const double[]){0});
    if (a->causal.count > 0)
        a->attention.given |= option_bit(OPT_CAUSAL);
    default_to(&a->causal, 1, (const double[]){SPARGE_CAUSAL_NONE});
    return 0;
}

static error_t bench_parser(int key, char *text, struct argp_state *state)
{
    static const item_kind lists[] = {
        [SPARSITY - SPARSITY] = {"--sparsity", NULL, 0, 0, false},
        [Q_LEN - SPARSITY] = {"--q-len", NULL, 1, MAX_TOKENS, false},
        [DIM - SPARSITY] = {"--dim", NULL, 1, SPARGE_MAX_DIM, false},
        [HEADS - SPARSITY] = {"--heads", NULL, 1, MAX_HEADS, false},
        [MASK_KIND - SPARSITY] = {"--mask-kind", masks, 0, 0, false},
        [THREADS - SPARSITY] = {"--threads", NULL, 1, SPARGE_MAX_THREADS, false},
        [ISA - SPARSITY] = {"--isa", options_isas, 0, 0, false},
        [QK - SPARSITY] = {"--qk-dtype", options_qk_dtypes, 0, 0, true},
        [PV - SPARSITY] = {"--pv-dtype", options_pv_dtypes, 0, 0, true},
        [CAUSAL - SPARSITY] = {"--causal", options_causals, 0, 0, false},
        [KERNEL - SPARSITY] = {"--kernel", NULL, 1, SPARGE_KERNELS, false},
    };
    bench_args *a = state->input;
    sparge_options *o = &a->attention.options;
    bench_list *const to[] = {&a->sparsity, &a->q_len, &a->dim, &a->heads,  &a->mask,  &a->threads,
                              &a->isa,      &a->qk,    &a->pv,  &a->causal, &a->kernel};
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = state->child_inputs[1] = &a->attention; return 0;
    case CAPTURE: a->capture = text; return 0;
    case REPEAT: return options_whole(state, "--repeat", text, 1, 1000, &a->repeat);
    case BLOCK_Q:
        a->attention.given |= option_bit(OPT_BLOCK_Q);
        return options_whole(state, "--block-q", text, 1, SPARGE_MAX_BLOCK, &o->block_q);
    case BLOCK_K:
        a->attention.given |= option_bit(OPT_BLOCK_K);
        return options_whole(state, "--block-k", text, 1, SPARGE_MAX_BLOCK, &o->block_k);
    case JSON: a->json = true; return 0;
    case ALLOW_BUSY: a->allow_busy = true; return 0;
    case BACKEND:
        a->backend = strcmp(text, "cuda") == 0 ? SPARGE_CUDA : SPARGE_CPU;
        return a->backend == SPARGE_CUDA || strcmp(text, "cpu") == 0
                   ? 0
                   : options_wrong(
                         state, "--backend is '%.40s', but bench times cpu and cuda alone", text);
    case ARGP_KEY_ARG:
        return options_wrong(state, "bench takes no file but that of --capture, not '%.60s'", text);
    case ARGP_KEY_END: return finish(state, a);
    default:
        if (key < SPARSITY || key > KERNEL)
            return ARGP_ERR_UNKNOWN;
        return parse_list(state, &lists[key - SPARSITY], text ? text : "end", to[key - SPARSITY]);
    }
}

static const struct argp_child bench_children[] = {
    {&thresholds_argp, 0, "", 2}, {&params_argp, 0, "", 2}, {0}};
static const struct argp bench_argp = {
    .children = bench_children,
    .options = bench_options_,
    .parser = bench_parser,
    .doc =
        "How fast attention is here, beside what this machine can do at most. Every result is "
        "checked before it is timed; what is compared is timed in turns; the medians are printed. "
        "Several threads are not timed while other processes use more than a twentieth of a core.",
};

void bench_parse(int argc, char **argv, bench_args *args)
{
    args->attention.options = sparge_options_default(SPARGE_RULES_DEFAULT);
    args->attention.base = args->base;
    args->attention.layer = -1;
    args->repeat = 5;
    args->backend = SPARGE_CPU;
    must(options_parse(&bench_argp, argc, argv, &args->base));
}
