/* SPDX-License-Identifier: Apache-2.0 */
/* main.c: the sparge program. */
#include "tools/program.h"

int main(int argc, char **argv)
{
    static const program_command commands[] = {
        {"run", run_command, "attention over the files of q, k and v"},
        {"check", check_command, "a verdict on what another kernel made of q, k and v"},
        {"diff", diff_command, "the distance between two outputs, or where two folders part"},
        {"map", map_command, "a picture of the attention and of the mask that was predicted"},
        {"tune", tune_command, "thresholds for every head, from captures"},
        {"order", order_command, "a token order for images and video"},
        {"bench", bench_command, "how fast attention is here, beside what the machine can do"},
        {"methods", methods_command, "the methods that --method takes, and their parameters"},
        {"info", info_command, "what is built, and what can run here"},
    };
    static const program sparge = {
        "sparge",
        "SpargeAttn: training-free block-sparse int8 attention (arXiv 2502.18137). What to try "
        "first: sparge run FILE --method submass --density 0.5",
        commands,
        sizeof commands / sizeof *commands,
    };
    return program_main(&sparge, argc, argv);
}
