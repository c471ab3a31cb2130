/* SPDX-License-Identifier: Apache-2.0 */
/* progress.c: one line on a terminal: what, how far, how long still. */
#include "tools/progress.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "tools/interrupt.h"

double progress_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

progress progress_begin(const char *what)
{
    interrupt_wait(true);
    return (progress){.what = what, .start = progress_clock(), .watched = isatty(STDERR_FILENO)};
}

bool progress_goes_on(void *user, double done)
{
    (void)user, (void)done;
    return !interrupt_came();
}

bool progress_tick(void *user, double done)
{
    progress *p = user;
    const double now = progress_clock(), spent = now - p->start;
    if (!p->watched || spent < 2.0 || now - p->last < 0.2 || !(done > 0.0))
        return !interrupt_came();
    p->last = now;
    p->shown = true;
    fprintf(stderr, "\r%s: %2.0f %%, %.0f s left \033[K", p->what, 100.0 * done,
            spent / done * (1.0 - done));
    return !interrupt_came();
}

void progress_watch(progress *p, sparge_options *o)
{
    o->progress = progress_tick;
    o->user = p;
}

void progress_hide(progress *p)
{
    if (p->shown)
        fputs("\r\033[K", stderr);
    p->shown = false;
}

void progress_end(progress *p)
{
    progress_hide(p);
    interrupt_wait(false);
}
