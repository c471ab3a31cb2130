/* SPDX-License-Identifier: Apache-2.0 */
/* rows.h: results that grow row by row in a file, so that what was interrupted goes on where it
 * stopped. */
#ifndef SPARGE_LM_ROWS_H
#define SPARGE_LM_ROWS_H

#include "tools/program.h"

typedef struct row_file {
    const char *path; /* a JSON file; NULL: in memory alone */
    json_t *all;      /* the settings, and "rows", a list of objects */
} row_file;

/* Takes over what is in the file, if it is of the same settings, or makes it. Steals the settings;
 * NULL is no memory for them. */
exit_code rows_open(row_file *r, const char *path, json_t *settings, file_error *error);
void rows_free(row_file *r);

json_t *rows_list(const row_file *r);

/* The row of a job: the one that has all that the job has; NULL: none yet. */
json_t *rows_find(const row_file *r, const json_t *job);

/* One more, written at once. Steals the row. */
exit_code rows_add(row_file *r, json_t *row, file_error *error);

/* A table of all of them: a line for each, a column for each key of the first. */
exit_code rows_csv(const row_file *r, const char *path, file_error *error);

/* ---- Summaries ---- */

/* A list of objects, one for each attention and length among the rows: "attention", "tokens", and
 * "rows", its own. */
json_t *rows_groups(const row_file *r);

/* The sum of a number over rows; NaN, which JSON has as null, where it is unknown in one of them.
 */
double rows_sum(const json_t *rows, const char *key);

/* How many of them have a result that is unknown, since something was not finite. */
size_t rows_unknown(const json_t *rows);

/* Puts the means of the numbers that every run tells into such an object, and takes its rows out.
 */
void rows_means(json_t *group);

#endif
