/* SPDX-License-Identifier: Apache-2.0 */
/* places.h: the captures that a command is given, and what it reads and writes beside those of a
 * folder: in folders, by their names. */
#ifndef SPARGE_TOOLS_PLACES_H
#define SPARGE_TOOLS_PLACES_H

#include "tools/capture.h"

typedef struct given_captures {
    capture *list;
    int64_t count;
    bool folder; /* they are of a folder, not one of a file or of several */
} given_captures;

/* What is wrong ends the program. */
void given_find(const attention_args *args, given_captures *out);
void given_file(const attention_args *args, given_captures *out); /* refuses a folder */
void given_free(given_captures *given);

/* Replaces the name of a folder, unless it is NULL, by that of the capture's file in it, which is
 * kept in `path`. Of an output the folders above it are made, and go again if it never comes. */
void place_input(const char **name, const capture *c, const char *ending, char path[PATH_MAX]);
void place_output(const char **name, const capture *c, const char *ending, char path[PATH_MAX]);

#endif
