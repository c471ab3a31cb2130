/* SPDX-License-Identifier: Apache-2.0 */
/* progress.h: how far something is that takes long, for whoever watches; and whether it goes on. */
#ifndef SPARGE_TOOLS_PROGRESS_H
#define SPARGE_TOOLS_PROGRESS_H

#include <stdbool.h>

#include "sparge.h"

typedef struct progress {
    const char *what;
    double start, last; /* seconds */
    bool watched, shown;
} progress;

double progress_clock(void); /* seconds, of no particular day */

progress progress_begin(const char *what); /* from here on an interrupt waits to be asked for */
/* As sparge_options wants it: user is a progress. Prints on stderr, if that is a terminal, from the
 * third second on. false after an interrupt. */
bool progress_tick(void *user, double done);
void progress_watch(progress *p, sparge_options *o); /* o calls progress_tick */
bool progress_goes_on(void *user, double done); /* the same in silence, of one step among many */
void progress_hide(progress *p);                /* leaves the line empty */
void progress_end(progress *p);                 /* the same, for good */

#endif
