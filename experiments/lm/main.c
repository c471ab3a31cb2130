/* SPDX-License-Identifier: Apache-2.0 */
/* main.c: sparge-lm: a language model whose attention is sparge.h. */
#include "experiments/lm/lm.h"

int main(int argc, char **argv)
{
    static const program_command commands[] = {
        {"ppl", ppl_command, "perplexity of texts under several attentions"},
        {"needle", needle_command, "needles in a haystack: by depth, length and attention"},
        {"time", time_command, "seconds of a prefill, and attention's share, by length"},
        {"capture", capture_command, "q, k and v of chosen layers, for sparge tune and sparge run"},
        {"tokens", tokens_command, "the token numbers of texts"},
    };
    static const program sparge_lm = {
        "sparge-lm",
        "Prefill of Llama-family models with SpargeAttn (arXiv 2502.18137).",
        commands,
        sizeof commands / sizeof *commands,
    };
    return program_main(&sparge_lm, argc, argv);
}
