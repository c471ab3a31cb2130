/* capture.h: what a file of q, k and v holds: which model, layer, heads and sample. manifest.json in the folder
 * of the file says so (experiments/capture/README.md). */
#ifndef SPARGE_TOOLS_CAPTURE_H
#define SPARGE_TOOLS_CAPTURE_H

#include <limits.h>

#include "tools/program.h"

enum { SHA256_TEXT = 65 };

/* Strings and numbers are of the manifest; where there is none, or it does not say, they are NULL, or -1, or
 * what is noted here. */
typedef struct capture {
    char path[PATH_MAX];
    char sha256[SHA256_TEXT]; /* of the file */
    const char *model, *sample;
    const json_t *heads; /* its query heads in order: numbers; NULL: from 0 on */
    int64_t layer;       /* 0 */
    int causal;          /* 0, 1 */
    double scale;        /* of the scores; 0: not said */
    json_t *manifest;    /* what the above points into */
} capture;

/* A file; or a folder: all the files of its manifest. Appends to *list, which has *count. */
exit_code capture_find(const char *path, capture **list, int64_t *count, file_error *error);
void capture_free(capture *list, int64_t count);

/* Of a file's bytes, in hexadecimal digits; or of several, one after the other. */
exit_code capture_sha256(const char *path, char text[SHA256_TEXT], file_error *error);
exit_code capture_sha256_inputs(const file_input *in, int64_t count, char text[SHA256_TEXT], file_error *error);

/* The number of the h-th query head, in the model. */
int64_t capture_head(const capture *c, int64_t h);

/* Does the file hold so many query heads as its manifest says, and are causality and scale what they were in the model? */
exit_code capture_check(const capture *c, const sparge_problem *p, const sparge_options *o, file_error *error);

#endif
