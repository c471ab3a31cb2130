/* places.c: files in folders, by the names of captures. */
#include "tools/places.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char **made;
static size_t count;

static bool is_folder(const char *path)
{
    struct stat found;
    return stat(path, &found) == 0 && S_ISDIR(found.st_mode);
}

static exit_code make_folder(const char *path, file_error *error)
{
    if (is_folder(path))
        return EXIT_FINE;
    char **more = realloc(made, (count + 1) * sizeof *more);
    made = more ? more : made;
    char *copy = more ? strdup(path) : NULL;
    if (!copy) {
        file_error_set(error, path, "no memory for its name");
        return EXIT_MACHINE;
    }
    if (mkdir(path, 0777) == 0) {
        made[count++] = copy;
        return EXIT_FINE;
    }
    file_error_set(error, path, "cannot create this folder: %s; choose another", strerror(errno));
    free(copy);
    return EXIT_FILE;
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
        code = make_folder(path, error);
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

void given_free(given_captures *given)
{
    capture_free(given->list, given->count);
    while (count > 0) {
        rmdir(made[--count]);
        free(made[count]);
    }
    free(made);
    made = NULL;
}
