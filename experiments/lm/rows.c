/* SPDX-License-Identifier: Apache-2.0 */
/* rows.c: results that grow row by row in a file. */
#include "experiments/lm/rows.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/output.h"

static exit_code no_memory(file_error *error)
{
    file_error_set(error, NULL, "no memory for the results");
    return EXIT_MACHINE;
}

json_t *rows_list(const row_file *r) { return json_object_get(r->all, "rows"); }

static exit_code save(const row_file *r, file_error *error)
{
    return r->path ? json_save(r->path, r->all, error) : EXIT_FINE;
}

/* What an earlier run left there. */
static exit_code take_up(row_file *r, file_error *error)
{
    size_t size;
    json_error_t why;
    if (!r->path || access(r->path, F_OK) != 0)
        return EXIT_FINE;
    char *text = input_text(r->path, &size, error);
    if (!text)
        return EXIT_FILE;
    json_t *before = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
    free(text);
    json_t *list = json_incref(json_object_get(before, "rows"));
    json_object_set_new(before, "rows", json_array());
    const bool same = json_is_array(list) && json_equal(before, r->all);
    if (same)
        json_object_set(r->all, "rows", list);
    else
        file_error_set(error, r->path,
                       "is there, and of other settings; choose another name, or remove it");
    json_decref(list);
    json_decref(before);
    return same ? EXIT_FINE : EXIT_FILE;
}

exit_code rows_open(row_file *r, const char *path, json_t *settings, file_error *error)
{
    *r = (row_file){.path = path, .all = settings};
    if (!settings || json_object_set_new(settings, "rows", json_array()) != 0)
        return no_memory(error);
    const exit_code code = take_up(r, error);
    return code ? code : save(r, error); /* before the work: can it be written? */
}

void rows_free(row_file *r)
{
    json_decref(r->all);
    *r = (row_file){0};
}

json_t *rows_find(const row_file *r, const json_t *job)
{
    json_t *list = rows_list(r);
    for (size_t n = 0; n < json_array_size(list); n++) {
        json_t *row = json_array_get(list, n);
        const char *key;
        json_t *value;
        bool same = true;
        json_object_foreach((json_t *)job, key, value) same &=
            json_equal(json_object_get(row, key), value);
        if (same)
            return row;
    }
    return NULL;
}

exit_code rows_add(row_file *r, json_t *row, file_error *error)
{
    if (!row || json_array_append_new(rows_list(r), row) != 0)
        return no_memory(error);
    return save(r, error);
}

/* ---- CSV ---- */

/* A text as it is, anything else as JSON; in quotes where that is needed. */
static void print_cell(FILE *to, const json_t *value)
{
    char *const made =
        json_is_string(value)
            ? NULL
            : json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9));
    const char *text = made ? made : json_is_string(value) ? json_string_value(value) : "";
    const bool quoted = strpbrk(text, ",\"\r\n") != NULL;
    if (quoted)
        putc('"', to);
    for (const char *c = text; *c; c++) {
        if (*c == '"')
            putc('"', to);
        putc(*c, to);
    }
    if (quoted)
        putc('"', to);
    free(made);
}

exit_code rows_csv(const row_file *r, const char *path, file_error *error)
{
    output_file *file = output_open(path, error);
    if (!file)
        return EXIT_FILE;
    FILE *to = output_stream(file);
    const json_t *list = rows_list(r);
    json_t *first = json_array_get(list, 0);
    const char *key;
    json_t *value;
    const char *between = "";
    json_object_foreach(first, key, value)
    {
        fprintf(to, "%s%s", between, key);
        between = ",";
    }
    putc('\n', to);
    for (size_t n = 0; n < json_array_size(list); n++) {
        between = "";
        json_object_foreach(first, key, value)
        {
            fputs(between, to);
            print_cell(to, json_object_get(json_array_get(list, n), key));
            between = ",";
        }
        putc('\n', to);
    }
    return outputs_commit(error) ? EXIT_FINE : EXIT_FILE;
}

/* ---- Summaries ---- */

json_t *rows_groups(const row_file *r)
{
    static const char *const keys[] = {"attention", "attention_sha256", "tokens"};
    json_t *groups = json_array();
    const json_t *list = rows_list(r);
    for (size_t n = 0; n < json_array_size(list); n++) {
        json_t *row = json_array_get(list, n);
        json_t *group = NULL;
        for (size_t g = 0; g < json_array_size(groups); g++) {
            json_t *other = json_array_get(groups, g);
            bool same = true;
            for (int k = 0; k < 3; k++)
                same &= json_equal(json_object_get(other, keys[k]), json_object_get(row, keys[k]));
            group = same ? other : group;
        }
        if (!group) {
            group = json_object();
            for (int k = 0; k < 3; k++)
                json_object_set(group, keys[k], json_object_get(row, keys[k]));
            json_object_set_new(group, "rows", json_array());
            json_array_append_new(groups, group);
        }
        json_array_append(json_object_get(group, "rows"), row);
    }
    return groups;
}

double rows_sum(const json_t *rows, const char *key)
{
    double sum = 0.0;
    size_t n;
    json_t *row;
    json_array_foreach(rows, n, row)
    {
        const json_t *x = json_object_get(row, key);
        sum += json_is_number(x) ? json_number_value(x) : NAN;
    }
    return sum;
}

size_t rows_unknown(const json_t *rows)
{
    size_t n, count = 0;
    json_t *row, *value;
    const char *key;
    json_array_foreach(rows, n, row)
    {
        bool unknown = false;
        json_object_foreach(row, key, value) unknown |=
            json_is_null(value) && strcmp(key, "attention_sha256") != 0; /* of what is in no file */
        count += unknown;
    }
    return count;
}

void rows_means(json_t *group)
{
    static const char *const keys[] = {"sparsity", "sparsity_qk", "density_tokens", "seconds",
                                       "seconds_attention"};
    const json_t *rows = json_object_get(group, "rows");
    const size_t count = json_array_size(rows);
    for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
        json_object_set_new(group, keys[k],
                            json_rounded(rows_sum(rows, keys[k]) / (double)count, 6));
    json_object_set_new(group, "count", json_integer((json_int_t)count));
    json_object_del(group, "rows");
}
