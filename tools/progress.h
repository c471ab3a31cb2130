/* progress.h: how far something is that takes long, for whoever watches. */
#ifndef SPARGE_TOOLS_PROGRESS_H
#define SPARGE_TOOLS_PROGRESS_H

#include <stdbool.h>

typedef struct progress {
    const char *what;
    double start, last; /* seconds */
    bool watched, shown;
} progress;

double progress_clock(void); /* seconds, of no particular day */

progress progress_begin(const char *what);
/* As sparge_options wants it: user is a progress. Prints on stderr, if that is a terminal, from the
 * third second on. */
void progress_tick(void *user, double done);
void progress_end(progress *p); /* leaves the line empty */

#endif
