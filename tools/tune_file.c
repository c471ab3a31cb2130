/* SPDX-License-Identifier: Apache-2.0 */
/* tune_file.c: the file that sparge tune writes, and goes on with. */
#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "tools/interrupt.h"
#include "tools/output.h"
#include "tools/params.h"
#include "tools/tune.h"

json_t *tune_file_before(const tune_args *a, const layers *of)
{
    const char *path = a->attention.output;
    params before;
    for (int64_t n = 0; n < of->captures; n++) {
        const char *const input[] = {of->capture[n].path, of->capture[n].from};
        must(inputs_spare(path, input, 2, &failure));
    }
    if (access(path, F_OK) != 0)
        return NULL;
    must(params_read(path, &before, &failure));
    json_t *json = json_incref(before.json);
    params_free(&before);
    return json;
}

void tune_file_same(const tune_args *a, const json_t *before, const json_t *header)
{
    if (!json_equal((json_t *)before, (json_t *)header))
        fail(EXIT_FILE, a->attention.output,
             "is of other captures or other options; choose another name, or remove it");
}

void tune_file_probe(const tune_args *a, const json_t *header)
{
    const char *path = a->attention.output;
    output_file *file = output_open(path, &failure);
    must_do(file && json_write_lines(output_stream(file), path, header, &failure));
    outputs_discard();
}

int64_t tune_file_whole(const json_t *line, const char *key)
{
    return json_integer_value(json_object_get(line, key));
}

double tune_file_number(const json_t *line, const char *object, const char *key)
{
    const json_t *x = json_object_get(object ? json_object_get(line, object) : line, key);
    return json_is_number(x) ? json_number_value(x) : NAN;
}

static int64_t apart(const json_t *line, int64_t of_layer, int64_t head)
{
    const int64_t found = tune_file_whole(line, "layer");
    return found == of_layer ? tune_file_whole(line, "head") - head : found - of_layer;
}

void tune_file_insert(json_t *lines, json_t *line)
{
    const int64_t of_layer = tune_file_whole(line, "layer"), head = tune_file_whole(line, "head");
    size_t at = json_array_size(lines);
    while (at > 0 && apart(json_array_get(lines, at - 1), of_layer, head) >= 0)
        at--;
    json_array_insert_new(lines, at, line);
}

const json_t *tune_file_find(const json_t *lines, int64_t of_layer, int64_t head)
{
    for (size_t n = 0; n < json_array_size(lines); n++)
        if (apart(json_array_get(lines, n), of_layer, head) == 0)
            return json_array_get(lines, n);
    return NULL;
}

void tune_unfinished(const tune_args *a, const layers *of, size_t done, const char *what)
{
    const int64_t heads = layers_heads(of);
    char all[32] = "";
    if (heads >= 0)
        snprintf(all, sizeof all, " of %" PRId64, heads);
    fail(EXIT_UNFINISHED, a->attention.output, "%s: it has %s%zu%s heads; the same command goes on",
         interrupt_came() ? "interrupted" : "the time is up", what, done, all);
}
