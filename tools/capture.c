/* SPDX-License-Identifier: Apache-2.0 */
/* capture.c: manifests of captures, and the checksums of their files. */
#include "tools/capture.h"

#include <ctype.h>
#include <dirent.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- Checksums ---- */

exit_code capture_sha256_inputs(const file_input *in, int64_t count, char text[SHA256_TEXT],
                                file_error *error)
{
    enum { PIECE = 1 << 20 };
    exit_code code = EXIT_MACHINE;
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned length = 0;
    EVP_MD_CTX *state = EVP_MD_CTX_new();
    void *piece = malloc(PIECE);
    bool ok = state && piece && EVP_DigestInit_ex(state, EVP_sha256(), NULL);
    if (!ok)
        file_error_set(error, in->name, "no memory for its checksum");
    for (; count > 0 && ok; count--, in++)
        for (size_t at = 0; at < in->size && ok; at += PIECE) {
            const size_t size = in->size - at < PIECE ? in->size - at : PIECE;
            ok = input_read(in, at, size, piece);
            code = ok ? code : EXIT_FILE;
            ok = ok && EVP_DigestUpdate(state, piece, size);
        }
    if (ok && EVP_DigestFinal_ex(state, digest, &length)) {
        for (unsigned n = 0; n < length && 2 * n + 2 < SHA256_TEXT; n++)
            snprintf(text + 2 * n, 3, "%02x", digest[n]);
        code = EXIT_FINE;
    }
    EVP_MD_CTX_free(state);
    free(piece);
    return code;
}

exit_code capture_sha256(const char *path, char text[SHA256_TEXT], file_error *error)
{
    file_input in;
    if (!input_open(path, &in, error))
        return EXIT_FILE;
    const exit_code code = capture_sha256_inputs(&in, 1, text, error);
    input_close(&in);
    return code;
}

/* ---- Manifests ---- */

static const char *name_of(const json_t *entry)
{
    const char *name = json_string_value(json_object_get(entry, "file"));
    return name ? name : "";
}

/* Is this below the folder that lists it, and spelled without detours? */
static bool is_below(const char *name)
{
    bool ok = *name && *name != '/';
    for (const char *part = name; part && ok; part = strchr(part, '/'), part += part != NULL) {
        const size_t length = strcspn(part, "/");
        ok = length > 2 || (length > 0 && strncmp(part, "..", length) != 0);
    }
    return ok;
}

/* Every entry names a file of the folder, each once; *wrong is the name of the first that does not.
 */
static bool are_files(const json_t *files, const char **wrong)
{
    bool ok = true;
    for (size_t n = 0; ok && n < json_array_size(files); n++) {
        *wrong = name_of(json_array_get(files, n));
        ok = is_below(*wrong);
        for (size_t m = 0; ok && m < n; m++)
            ok = strcmp(name_of(json_array_get(files, m)), *wrong) != 0;
    }
    return ok;
}

/* manifest.json in a folder, and its path; *out is NULL where there is none. */
static exit_code read_manifest(const char *folder, char path[PATH_MAX], json_t **out,
                               file_error *error)
{
    const char *name = NULL;
    size_t size;
    struct stat found;
    json_error_t why;
    *out = NULL;
    if (snprintf(path, PATH_MAX, "%s/manifest.json", folder) >= PATH_MAX ||
        lstat(path, &found) != 0)
        return EXIT_FINE;
    char *text = input_text(path, &size, error);
    if (!text)
        return EXIT_FILE;
    *out = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
    free(text);
    const json_t *files = json_object_get(*out, "files");
    if (json_is_array(files) && are_files(files, &name))
        return EXIT_FINE;
    if (name)
        file_error_set(error, path,
                       "lists '%.60s', which is no file in its folder, or there twice; mend it, or "
                       "give --ignore-manifest",
                       name);
    else if (*out)
        file_error_set(error, path,
                       "is no manifest: it must be an object with a list 'files'; mend it, or give "
                       "--ignore-manifest");
    else
        file_error_set(error, path, "line %d: %s; mend it, or give --ignore-manifest", why.line,
                       why.text);
    json_decref(*out);
    *out = NULL;
    return EXIT_FILE;
}

static bool is_number(const json_t *x)
{
    return json_is_integer(x) && json_integer_value(x) >= 0 && json_integer_value(x) <= INT32_MAX;
}

/* T, H and W; and how many tokens of text stand before the grid, or after it. */
static bool read_grid(const json_t *manifest, sparge_grid *to)
{
    const json_t *grid = json_object_get(manifest, "grid"), *side[3],
                 *text = json_object_get(manifest, "n_text"),
                 *first = json_object_get(manifest, "text_first");
    if (!grid || json_is_null(grid))
        return true;
    for (size_t n = 0; n < 3; n++) {
        side[n] = json_array_get(grid, n);
        if (json_array_size(grid) != 3 || !is_number(side[n]))
            return false;
    }
    if (text && !json_is_null(text) && !is_number(text))
        return false;
    const int64_t words = json_integer_value(text);
    *to = (sparge_grid){json_integer_value(side[0]), json_integer_value(side[1]),
                        json_integer_value(side[2]), json_is_false(first) ? 0 : words,
                        json_is_false(first) ? words : 0};
    return true;
}

/* Numbers, each once. */
static bool are_heads(const json_t *heads)
{
    bool ok = json_array_size(heads) > 0;
    for (size_t n = 0; ok && n < json_array_size(heads); n++) {
        ok = is_number(json_array_get(heads, n));
        for (size_t m = 0; ok && m < n; m++)
            ok = !json_equal(json_array_get(heads, m), json_array_get(heads, n));
    }
    return ok;
}

/* NULL where it is not said. */
static const json_t *said(const json_t *from, const char *key)
{
    const json_t *x = json_object_get(from, key);
    return json_is_null(x) ? NULL : x;
}

/* An entry's own word, or that of the whole manifest. */
static const json_t *either(const json_t *entry, const json_t *manifest, const char *key)
{
    const json_t *own = said(entry, key);
    return own ? own : said(manifest, key);
}

/* What is not said is NULL; false where it is no text. */
static bool read_text(const json_t *from, const char *key, const char **to)
{
    *to = json_string_value(said(from, key));
    return *to || !said(from, key);
}

static bool is_scale(const json_t *x)
{
    return json_is_number(x) && json_number_value(x) >= (double)FLT_MIN &&
           json_number_value(x) <= (double)FLT_MAX;
}

/* NN of the first 'layerNN' in the name of a file that nothing like a word precedes; -1: there is
 * none. */
static int64_t layer_in_name(const char *name)
{
    for (const char *at = name; (at = strstr(at, "layer")); at++) {
        const bool word = at > name && isalnum((unsigned char)at[-1]);
        const long number = !word && isdigit((unsigned char)at[5]) ? strtol(at + 5, NULL, 10) : -1;
        if (number >= 0 && number <= INT32_MAX)
            return number;
    }
    return -1;
}

/* A sparge_causal, or -1. */
static int alignment(const json_t *causal_at)
{
    const char *word = json_string_value(causal_at);
    return word && strcmp(word, "end") == 0     ? SPARGE_CAUSAL_END
           : word && strcmp(word, "start") == 0 ? SPARGE_CAUSAL_START
                                                : -1;
}

/* What the manifest's entry says, or NULL. */
static exit_code describe(capture *c, json_t *manifest, const json_t *entry, file_error *error)
{
    const exit_code code = capture_sha256(c->path, c->sha256, error);
    c->causal = -1;
    c->layer = layer_in_name(basename(c->path));
    c->layer_named = c->layer >= 0;
    if (code || !entry)
        return code;
    const json_t *layer = json_object_get(entry, "layer"),
                 *causal = either(entry, manifest, "causal");
    const json_t *scale = either(entry, manifest, "softmax_scale"),
                 *at = either(entry, manifest, "causal_at");
    const char *sha, *text, *gguf, *wrong = NULL;
    c->manifest = json_incref(manifest);
    c->heads = json_object_get(entry, "query_heads");
    if (!read_text(manifest, "model", &c->model))
        wrong = "'model' in its manifest is no text";
    else if (!read_text(manifest, "weights_sha256", &c->weights))
        wrong = "'weights_sha256' in its manifest is no text";
    else if (!read_text(manifest, "gguf_sha256", &gguf))
        wrong = "'gguf_sha256' in its manifest is no text";
    else if (!read_text(manifest, "sample", &c->sample))
        wrong = "'sample' in its manifest is no text";
    else if (!read_text(manifest, "text", &text))
        wrong = "'text' in its manifest is no text";
    else if (causal && !json_is_boolean(causal))
        wrong = "'causal' in its manifest is neither true nor false";
    else if (at && alignment(at) < 0)
        wrong = "'causal_at' in its manifest is neither end nor start";
    else if (scale && !is_scale(scale))
        wrong = "'softmax_scale' in its manifest is no number above 0";
    else if (either(entry, manifest, "scale"))
        wrong = "'scale' in its manifest is now 'softmax_scale'";
    else if (layer && !is_number(layer))
        wrong = "'layer' in its manifest is no number";
    else if (c->heads && !are_heads(c->heads))
        wrong = "'query_heads' in its manifest is no list of numbers, each once";
    else if (!read_text(entry, "sha256", &sha))
        wrong = "'sha256' in its manifest is no text";
    else if (!read_grid(manifest, &c->grid))
        wrong = "'grid' in its manifest is no T, H and W, or 'n_text' no number";
    if (wrong) {
        file_error_set(error, c->path, "%s", wrong);
        return EXIT_FILE;
    }
    c->sample = c->sample ? c->sample : text;
    c->weights = c->weights ? c->weights : gguf;
    c->aligned = at != NULL;
    if (causal)
        c->causal = json_is_false(causal) ? SPARGE_CAUSAL_NONE
                    : c->aligned          ? alignment(at)
                                          : SPARGE_CAUSAL_END;
    c->softmax_scale = json_number_value(scale);
    const json_t *step = json_object_get(entry, "step");
    c->step = is_number(step) ? json_integer_value(step) : 0;
    if (layer) {
        c->layer = json_integer_value(layer);
        c->layer_named = false;
    }
    if (!sha || strcmp(sha, c->sha256) == 0)
        return EXIT_FINE;
    file_error_set(error, c->path,
                   "is not the file that its manifest lists: its SHA-256 is %.12s..., not %.12s...",
                   c->sha256, sha);
    return EXIT_FILE;
}

/* Makes room for one more at the end of the list. */
static capture *append(capture **list, int64_t *count, file_error *error)
{
    capture *more = realloc(*list, (size_t)(*count + 1) * sizeof *more);
    if (!more) {
        file_error_set(error, NULL, "no memory for the list of captures");
        return NULL;
    }
    *list = more;
    memset(&more[*count], 0, sizeof *more);
    return &more[(*count)++];
}

/* A file of a folder, whose name begins after `above` characters of its path. */
static exit_code add(const char *folder, size_t above, const char *name, const char *from,
                     json_t *manifest, const json_t *entry, capture **list, int64_t *count,
                     file_error *error)
{
    capture *c = append(list, count, error);
    if (!c)
        return EXIT_MACHINE;
    if (snprintf(c->path, sizeof c->path, "%s%s%s", folder, *folder ? "/" : "", name) >=
        (int)sizeof c->path) {
        file_error_set(error, name, "its path is too long");
        return EXIT_FILE;
    }
    if (manifest)
        snprintf(c->from, sizeof c->from, "%s", from);
    c->name = above;
    return describe(c, manifest, entry, error);
}

/* *manifests grows by one where the folder has a manifest. */
static exit_code find_listed(const char *folder, size_t above, int *manifests, capture **list,
                             int64_t *count, file_error *error)
{
    json_t *manifest;
    char path[PATH_MAX];
    exit_code code = read_manifest(folder, path, &manifest, error);
    const json_t *files = json_object_get(manifest, "files");
    *manifests += manifest != NULL;
    for (size_t n = 0; n < json_array_size(files) && !code; n++) {
        const json_t *entry = json_array_get(files, n);
        code = add(folder, above, name_of(entry), path, manifest, entry, list, count, error);
    }
    json_decref(manifest);
    return code;
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static exit_code find_folder(const char *path, capture **list, int64_t *count, file_error *error)
{
    const int64_t before = *count;
    const size_t above = strlen(path) + 1;
    int manifests = 0;
    exit_code code = find_listed(path, above, &manifests, list, count, error);
    struct dirent **found = NULL;
    const int entries = code || manifests ? 0 : scandir(path, &found, NULL, by_name);
    for (int n = 0; n < entries; n++) {
        char folder[PATH_MAX];
        const int length = snprintf(folder, sizeof folder, "%s/%s", path, found[n]->d_name);
        if (!code && *found[n]->d_name != '.' && length < PATH_MAX)
            code = find_listed(folder, above, &manifests, list, count, error);
        free(found[n]);
    }
    free(found);
    if (!code && *count == before) {
        file_error_set(error, path, "%s; give the capture's files",
                       manifests ? "its manifest lists no files"
                                 : "has no manifest.json, nor has a folder in it");
        code = EXIT_FILE;
    }
    return code;
}

static exit_code find_file(const char *path, bool alone, capture **list, int64_t *count,
                           file_error *error)
{
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    char folder[PATH_MAX] = ".", from[PATH_MAX];
    if (slash)
        snprintf(folder, sizeof folder, "%.*s", (int)(slash > path ? slash - path : 1), path);
    json_t *manifest = NULL;
    exit_code code = alone ? EXIT_FINE : read_manifest(folder, from, &manifest, error);
    const json_t *files = json_object_get(manifest, "files"), *entry = NULL;
    for (size_t n = 0; n < json_array_size(files) && !entry; n++)
        if (strcmp(name_of(json_array_get(files, n)), name) == 0)
            entry = json_array_get(files, n);
    if (!code)
        code = add("", (size_t)(name - path), path, from, manifest, entry, list, count, error);
    json_decref(manifest);
    return code;
}

exit_code capture_find(const char *path, bool alone, capture **list, int64_t *count,
                       file_error *error)
{
    struct stat found;
    if (stat(path, &found) != 0 || !S_ISDIR(found.st_mode))
        return find_file(path, alone, list, count, error);
    if (!alone)
        return find_folder(path, list, count, error);
    file_error_set(error, path,
                   "is a folder, of which its manifest says what is in it; give its files to "
                   "--ignore-manifest");
    return EXIT_USAGE;
}

void capture_free(capture *list, int64_t count)
{
    for (int64_t n = 0; n < count; n++)
        json_decref(list[n].manifest);
    free(list);
}

const char *capture_name(const capture *c) { return c->path + c->name; }

int64_t capture_head(const capture *c, int64_t h)
{
    return c->heads ? json_integer_value(json_array_get(c->heads, (size_t)h)) : h;
}

exit_code capture_layer(const capture *c, int64_t asked, int64_t *layer, file_error *error)
{
    *layer = asked >= 0 ? asked : c->layer;
    if (*layer == c->layer || c->layer < 0 || c->layer_named)
        return EXIT_FINE;
    file_error_set(error, c->path,
                   "is of layer %" PRId64 ", as its manifest says, not of %" PRId64
                   "; leave out --layer, or give --ignore-manifest",
                   c->layer, asked);
    return EXIT_FILE;
}

/* The same to what a float and a text of some digits can hold. */
static bool near(double a, double b) { return fabs(a / b - 1.0) <= 1e-5; }

exit_code capture_obey(const capture *c, const sparge_problem *p, option_set given,
                       sparge_options *o, file_error *error)
{
    static const char *const ends[] = {"", "end", "start"};
    const double usual = 1.0 / sqrt((double)p->dim);
    if (c->causal >= 0 && !(given & option_bit(OPT_CAUSAL)))
        o->causal = (sparge_causal)c->causal;
    if (c->softmax_scale != 0.0 && !(given & option_bit(OPT_SOFTMAX_SCALE)))
        o->softmax_scale = near(c->softmax_scale, usual) ? 0.0f : (float)c->softmax_scale;
    const double scale = o->softmax_scale != 0.0f ? (double)o->softmax_scale : usual;
    const bool causal = o->causal != SPARGE_CAUSAL_NONE;
    if (c->heads && (int64_t)json_array_size(c->heads) != p->heads)
        file_error_set(error, c->path, "has %" PRId64 " query heads, its manifest lists %zu",
                       p->heads, json_array_size(c->heads));
    else if (c->causal >= 0 && causal != (c->causal != SPARGE_CAUSAL_NONE))
        file_error_set(error, c->path,
                       causal ? "is of a model that is not causal, as its manifest says; leave out "
                                "--causal, or give --ignore-manifest"
                              : "is of a causal model, as its manifest says; give --causal, or "
                                "--ignore-manifest");
    else if (causal && c->aligned && p->q_len != p->k_len && (int)o->causal != c->causal)
        file_error_set(
            error, c->path,
            "is causal from the %s, as its manifest says; give --causal=%s, or --ignore-manifest",
            ends[c->causal], ends[c->causal]);
    else if (c->softmax_scale != 0.0 && !near(c->softmax_scale, scale))
        file_error_set(error, c->path,
                       "is of a model that scales scores by %.9g, as its manifest says, not by "
                       "%.6g; give --softmax-scale %.9g, or --ignore-manifest",
                       c->softmax_scale, scale, c->softmax_scale);
    else
        return EXIT_FINE;
    return EXIT_FILE;
}

double capture_tokens(const capture *c)
{
    const sparge_grid *g = &c->grid;
    return (double)g->t * (double)g->h * (double)g->w + (double)(g->text_before + g->text_after);
}

json_t *capture_json(const capture *c)
{
    if (!c->manifest)
        return json_null();
    return json_pack("{s:s?, s:s?, s:o, s:o, s:o}", "model", c->model, "sample", c->sample, "layer",
                     c->layer >= 0 && !c->layer_named ? json_integer(c->layer) : json_null(),
                     "causal", c->causal >= 0 ? json_boolean(c->causal) : json_null(),
                     "softmax_scale",
                     c->softmax_scale != 0.0 ? json_rounded(c->softmax_scale, 9) : json_null());
}
