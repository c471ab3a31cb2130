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

exit_code place_input(const char **name, const capture *c, const char *ending, char path[PATH_MAX],
                      file_error *error)
{
    static const char type[] = ".safetensors";
    const char *own = capture_name(c);
    const size_t length = strlen(own), typed = sizeof type - 1;
    const bool ends = length > typed && strcmp(own + length - typed, type) == 0;
    if (!*name)
        return EXIT_FINE;
    if (snprintf(path, PATH_MAX, "%s/%.*s%s", *name, (int)(ends ? length - typed : length), own,
                 ending) >= PATH_MAX) {
        file_error_set(error, *name, "the names of its files are too long; choose another");
        return EXIT_FILE;
    }
    *name = path;
    return EXIT_FINE;
}

exit_code place_output(const char **name, const capture *c, const char *ending, char path[PATH_MAX],
                       file_error *error)
{
    const size_t folder = *name ? strlen(*name) : 0;
    exit_code code = place_input(name, c, ending, path, error);
    for (char *slash = path + folder; *name && slash && !code; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        code = output_folder(path, error) ? EXIT_FINE : EXIT_FILE;
        *slash = '/';
    }
    return code;
}

exit_code given_find(const attention_args *a, given_captures *out, file_error *error)
{
    *out = (given_captures){.folder = a->files == 1 && is_folder(a->file[0])};
    return out->folder
               ? capture_find(a->file[0], a->ignore_manifest, &out->list, &out->count, error)
               : given_file(a, out, error);
}

exit_code given_file(const attention_args *a, given_captures *out, file_error *error)
{
    *out = (given_captures){0};
    if (!is_folder(a->file[0]))
        return capture_find(a->file[0], a->ignore_manifest, &out->list, &out->count, error);
    file_error_set(error, a->file[0], "is a directory; name a file in it");
    return EXIT_FILE;
}

void given_free(given_captures *given) { capture_free(given->list, given->count); }
