/* SPDX-License-Identifier: Apache-2.0 */
/* places.c: files in folders, by the names of captures. */
#include "tools/places.h"

#include <string.h>
#include <sys/stat.h>

#include "tools/output.h"

static bool is_folder(const char *path)
{
    struct stat found;
    return stat(path, &found) == 0 && S_ISDIR(found.st_mode);
}

void place_input(const char **name, const capture *c, const char *ending, char path[PATH_MAX])
{
    static const char type[] = ".safetensors";
    const char *own = capture_name(c);
    const size_t length = strlen(own), typed = sizeof type - 1;
    const bool ends = length > typed && strcmp(own + length - typed, type) == 0;
    if (!*name)
        return;
    if (snprintf(path, PATH_MAX, "%s/%.*s%s", *name, (int)(ends ? length - typed : length), own,
                 ending) >= PATH_MAX)
        fail(EXIT_FILE, *name, "the names of its files are too long; choose another");
    *name = path;
}

void place_output(const char **name, const capture *c, const char *ending, char path[PATH_MAX])
{
    const size_t folder = *name ? strlen(*name) : 0;
    place_input(name, c, ending, path);
    for (char *slash = path + folder; *name && slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        must_do(output_folder(path, &failure));
        *slash = '/';
    }
}

void given_find(const attention_args *a, given_captures *out)
{
    *out = (given_captures){.folder = a->files == 1 && is_folder(a->file[0])};
    if (!out->folder)
        given_file(a, out);
    else
        must(capture_find(a->file[0], a->ignore_manifest, &out->list, &out->count, &failure));
}

void given_file(const attention_args *a, given_captures *out)
{
    *out = (given_captures){0};
    if (is_folder(a->file[0]))
        fail(EXIT_FILE, a->file[0], "is a directory; name a file in it");
    must(capture_find(a->file[0], a->ignore_manifest, &out->list, &out->count, &failure));
}

void given_free(given_captures *given) { capture_free(given->list, given->count); }
