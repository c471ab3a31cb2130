/* SPDX-License-Identifier: Apache-2.0 */
/* method.h: methods by name, as command lines have them: NAME[:PARAM=VALUE,...]. */
#ifndef SPARGE_TOOLS_METHOD_H
#define SPARGE_TOOLS_METHOD_H

#include "sparge_methods.h"
#include "tools/program.h"

typedef struct method_choice {
    const sparge_method *method; /* NULL: none */
    double param[SPARGE_MAX_PARAMS];
    unsigned given; /* bit n: param[n] is not the default */
} method_choice;

int method_params(const sparge_method *method); /* how many it has */

/* What is wrong is a line in *error, and EXIT_USAGE. */
exit_code method_parse(const char *text, method_choice *out, file_error *error);

/* The ends of segments, "100,200,4096", which ascend; to be freed. NULL: *error says what is wrong.
 */
int64_t *method_segments(const char *text, int64_t *count, file_error *error);

/* A value of a parameter, null where JSON has no number for it; and all of them by name. NULL: no
 * memory. */
json_t *method_number(const sparge_param *param, double x);
json_t *method_params_json(const method_choice *choice);
/* method, and params if there is one. */
json_t *method_json(const method_choice *choice);

/* As must_sparge, of what may lack what the method needs. */
void method_must(const sparge_method *method, sparge_status s);

#endif
