/* SPDX-License-Identifier: Apache-2.0 */
/* bench.c: `bench` and `info` of the sparge program alone, for a machine with a GPU that lacks what
 * the other commands need. */
#include "tools/program.h"

int main(int argc, char **argv)
{
    static const program_command commands[] = {
        {"bench", bench_command, "how fast attention is here, beside what the machine can do"},
        {"info", info_command, "what is built, and what can run here"},
    };
    static const program bench = {
        "bench",
        "The sparge program's bench and info.",
        commands,
        sizeof commands / sizeof *commands,
    };
    return program_main(&bench, argc, argv);
}
