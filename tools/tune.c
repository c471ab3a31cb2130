/* SPDX-License-Identifier: Apache-2.0 */
/* tune.c: sparge tune: thresholds for every head, found from captures. */
#include <stdlib.h>

#include "tools/tune.h"

enum { L1 = OPT_COMMAND, L2, BOUND, SPARSITY, BY, LOSS, HELD_OUT, SECONDS, MODEL };

static const struct argp_option tune_options[] = {
    {"l1", L1, "X", 0, "relative L1 that theta and tau may cost (0.07)", 0},
    {"l2", L2, "X", 0, "and with lambda (0.08)", 0},
    {"bound", BOUND, "WHAT", 0, "the worst capture, or the mean over them (worst)", 0},
    {"sparsity", SPARSITY, "X", 0,
     "instead: reach this sparsity with the least error, without lambda", 0},
    {"by", BY, "WHAT", 0,
     "choose tau, or topk in its place; or, by loss, the first parameter of the method (tau)", 0},
    {"density", OPT_DENSITY, "X", 0, "by loss: least loss with this mean density of tokens", 0},
    {"loss", LOSS, "X", 0, "by loss: least density with this loss, in nats per token", 0},
    {"method", OPT_METHOD, "NAME[:PARAM=VALUE,...]", 0, "by loss: of this method (spargeattn)", 0},
    {"held-out", HELD_OUT, "CAPTURE", 0,
     "judge on this one and do not tune on it; may be repeated; without one, each capture is left "
     "out in turn, but by loss",
     0},
    {"seconds", SECONDS, "X", 0, "stop after so long; the same command goes on", 0},
    {"model", MODEL, "NAME", 0, "where no manifest says it", 0},
    {0},
};

const char *const tune_bys[] = {"tau", "topk", "loss", NULL};
const char *const tune_bounds[] = {"worst", "mean", NULL};

static error_t check_by_loss(struct argp_state *state, tune_args *a)
{
    static const options_conflict conflicts[] = {
        {BY, {L1, L2, BOUND, SPARSITY}, "loss bounds no error"},
        {OPT_DENSITY, {LOSS}, "is sought instead of a loss"},
        {OPT_METHOD, {OPT_SINK, OPT_CELL}, "has parameters of its own"},
        {BY, {OPT_CELL}, "loss has cells by --method submass"},
    };
    const method_choice *m = &a->attention.method;
    if (a->by != BY_LOSS)
        return a->attention.given &
                       (option_bit(OPT_DENSITY) | option_bit(LOSS) | option_bit(OPT_METHOD))
                   ? options_wrong(state, "--density, --loss and --method are for --by loss")
                   : 0;
    if (options_refuse(state, a->attention.given, conflicts, sizeof conflicts / sizeof *conflicts))
        return EINVAL;
    if (a->goal.density == 0.0 && a->goal.loss == 0.0)
        return options_wrong(state, "--by loss needs what to reach: --density or --loss");
    if (m->method && !m->method->param[0].name)
        return options_wrong(state, "--by loss: %s has no parameter that sets its density",
                             m->method->name);
    if (m->given & 1)
        return options_wrong(state, "--by loss finds %s of %s: leave one of them out",
                             m->method->param[0].name, m->method->name);
    return 0;
}

static error_t check_args(struct argp_state *state, tune_args *a)
{
    static const options_conflict instead = {
        SPARSITY, {L1, L2, BOUND}, "is sought instead of a bound"};
    const sparge_tune_options *how = &a->how;
    if (a->tuned.count == 0)
        return options_wrong(
            state, "give a capture: a .safetensors file of q, k and v, or a folder of them");
    if (!a->attention.output)
        return options_wrong(state, "-o is missing: where to write the thresholds");
    if (options_refuse(state, a->attention.given, &instead, 1) || check_by_loss(state, a))
        return EINVAL;
    if (how->sparsity == 0.0 && !(how->l1 < how->l2))
        return options_wrong(state, "--l1 is %g and --l2 is %g: l1 must be the smaller", how->l1,
                             how->l2);
    if (a->attention.given & option_bits(OPT_THETA, OPT_LAMBDA))
        return options_wrong(state,
                             "--theta, --tau, --topk, --min-mass and --lambda are what is tuned");
    if (!json_is_text(a->attention.output) || (a->model && !json_is_text(a->model)))
        return options_wrong(state, "-o and --model must be UTF-8 text, to be written in JSON");
    return 0;
}

static error_t tune_parser(int key, char *text, struct argp_state *state)
{
    tune_args *a = state->input;
    sparge_tune_options *how = &a->how;
    int word = 0;
    error_t error;
    if (key >= OPT_METHOD && key <= MODEL)
        a->attention.given |= option_bit(key);
    switch (key) {
    case ARGP_KEY_INIT: /* a second time after --rules */
        state->child_inputs[0] = state->child_inputs[1] = &a->attention;
        a->tuned.count = a->held.count = 0;
        return 0;
    case ARGP_KEY_ARG: return paths_append(&a->tuned, text);
    case L1: return options_real(state, "--l1", text, 1e-9, 1e9, &how->l1);
    case L2: return options_real(state, "--l2", text, 1e-9, 1e9, &how->l2);
    case BOUND:
        error = options_word(state, "--bound", text, tune_bounds, &word);
        how->mean = word == 1;
        return error;
    case SPARSITY: return options_real(state, "--sparsity", text, 1e-6, 0.999999, &how->sparsity);
    case BY:
        error = options_word(state, "--by", text, tune_bys, &a->by);
        how->topk = a->by == BY_TOPK;
        return error;
    case OPT_DENSITY: return options_real(state, "--density", text, 1e-6, 1.0, &a->goal.density);
    case LOSS: return options_real(state, "--loss", text, 1e-30, 1e30, &a->goal.loss);
    case OPT_METHOD: return method_parse(text, &a->attention.method, a->base.error) ? EINVAL : 0;
    case HELD_OUT: return paths_append(&a->held, text);
    case SECONDS: return options_real(state, "--seconds", text, 1e-9, 1e9, &a->seconds);
    case MODEL: a->model = text; return 0;
    case ARGP_KEY_SUCCESS: return check_args(state, a);
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* Their groups stay apart. */
static const struct argp_child tune_children[] = {
    {&attention_argp, 0, "", 1}, {&manifest_argp, 0, "", 1}, {0}};
static const struct argp tune_argp = {
    .options = tune_options,
    .parser = tune_parser,
    .args_doc = "CAPTURE...",
    .doc = "Thresholds for every head: theta and tau of the most sparsity at a relative L1 below "
           "l1, then lambda below l2, on every capture; and what they cost on captures that they "
           "were not tuned on. --by loss weighs the heads of all layers against each other: what "
           "an error of each costs the model is in captures that have g, the gradient of its loss "
           "at the output of each head.\vA capture is a .safetensors file of q, k and v, or a "
           "folder of them with a manifest.json, or a folder of such folders. Causality and scale "
           "are those of the manifests. The file that -o names grows head by head; after an "
           "interruption the same command goes on with it.",
    .children = tune_children,
};

exit_code tune_command(int argc, char **argv, file_error *error)
{
    static tune_args args;
    static layers of;
    inputs in = {0};
    tune_args *a = &args;
    attention_args *attention = &a->attention;
    *a = (tune_args){.base = {error}, .how = {.l1 = 0.07, .l2 = 0.08}, .start = progress_clock()};
    must(attention_parse(&tune_argp, argc, argv, &a->base, attention));
    layers_find(attention, &a->tuned, &a->held, a->model, &of);
    /* Attention as in the model: as the manifest of the first capture says; of the others it must
     * say the same. */
    layers_read(attention, of.layer[0].capture[0], attention->given, &attention->options, &in);
    inputs_free(&in);
    const exit_code code = a->by == BY_LOSS ? tune_loss(a, &of) : tune_heads(a, &of);
    layers_free(&of);
    free(a->tuned.path);
    free(a->held.path);
    return code;
}
