/* SPDX-License-Identifier: Apache-2.0 */
/* interrupt.c: what SIGINT, SIGTERM and SIGHUP do. */
#include "tools/interrupt.h"

#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include "tools/program.h"

static volatile sig_atomic_t waiting, came, asked;
static char line[128];

static void handle(int number)
{
    if (!waiting || came)
        program_stop(line, EXIT_UNFINISHED);
    came = number;
}

void interrupt_catch(const char *name)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction old, new = {.sa_handler = handle, .sa_flags = SA_RESTART};
    sigfillset(&new.sa_mask);
    /* A terminal may show how far something is on the line where the cursor stands. */
    snprintf(line, sizeof line, "%s%s: " INTERRUPTED "\n", isatty(STDERR_FILENO) ? "\r\033[K" : "",
             name);
    for (size_t n = 0; n < sizeof signals / sizeof *signals; n++)
        if (sigaction(signals[n], NULL, &old) == 0 && old.sa_handler != SIG_IGN)
            sigaction(signals[n], &new, NULL);
}

void interrupt_wait(bool waits)
{
    waiting = waits;
    if (!waits && came && !asked)
        program_stop(line, EXIT_UNFINISHED);
}

bool interrupt_came(void)
{
    if (came)
        asked = true;
    return came;
}
