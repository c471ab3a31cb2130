/* SPDX-License-Identifier: Apache-2.0 */
/* output.c: output files that appear whole: written beside their target, and renamed to it. */
#include "tools/output.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct output_file {
    FILE *stream;             /* NULL: a folder, or closed */
    char path[PATH_MAX];      /* links resolved; empty: a folder */
    char temporary[PATH_MAX]; /* empty: the target is written directly */
};

/* A fixed table, because a signal handler may run at any moment. Names stand in it before their
 * files are made. To remove what is not there, or a folder that is not empty, does no harm. */
static output_file outputs[OUTPUT_MAX];
static volatile sig_atomic_t count;

void outputs_abandon(void)
{
    for (int i = count - 1; i >= 0; i--) /* files before their folder */
        if (*outputs[i].temporary && unlink(outputs[i].temporary) != 0)
            rmdir(outputs[i].temporary);
}

void outputs_discard(void)
{
    for (int i = 0; i < count; i++)
        if (outputs[i].stream)
            fclose(outputs[i].stream);
    outputs_abandon();
    count = 0;
}

/* The one spelling of a target, whether or not it exists; false where its folder does not. */
static bool resolve(const char *path, char to[PATH_MAX])
{
    char folder[PATH_MAX];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    if (realpath(path, to))
        return true;
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(name - path) : 1, slash ? path : ".");
    if (!realpath(folder, to))
        return false;
    const size_t used = strlen(to);
    if (snprintf(to + used, PATH_MAX - used, "/%s", name) < (int)(PATH_MAX - used))
        return true;
    errno = ENAMETOOLONG;
    return false;
}

/* Does what is written there go where the JSON goes? Of devices only to a terminal. */
static bool is_stdout(const struct stat *to)
{
    struct stat out;
    return fstat(STDOUT_FILENO, &out) == 0 && out.st_dev == to->st_dev &&
           out.st_ino == to->st_ino && (!S_ISCHR(out.st_mode) || isatty(STDOUT_FILENO));
}

/* Why this may not be written, or NULL. */
static const char *refused(const char *path, bool exists, const struct stat *status)
{
    struct stat link;
    const size_t length = strlen(path);
    if (strcmp(path, "-") == 0 || (exists && is_stdout(status)))
        return "is standard output, where JSON goes; name a file";
    if (exists ? S_ISDIR(status->st_mode) : length == 0 || path[length - 1] == '/')
        return "is a directory; name a file in it";
    if (!exists && lstat(path, &link) == 0)
        return "is a link to a file that does not exist; choose another name";
    if (exists && access(path, W_OK) != 0) /* a rename would replace what is protected */
        return "is write-protected; allow it (chmod +w) or choose another name";
    return count == OUTPUT_MAX ? "too many outputs at a time; write fewer" : NULL;
}

/* Names the temporary file beside output->path; "" where the target is written directly. */
static bool name_temporary(output_file *output, bool direct)
{
    const size_t folder = (size_t)(strrchr(output->path, '/') + 1 - output->path);
    memcpy(output->temporary, output->path, folder);
    const int length = snprintf(output->temporary + folder, PATH_MAX - folder, ".sparge-%ld-%d.tmp",
                                (long)getpid(), (int)count);
    if (direct)
        output->temporary[0] = '\0';
    errno = ENAMETOOLONG;
    return length < (int)(PATH_MAX - folder);
}

output_file *output_open(const char *path, file_error *error)
{
    file_error_clear(error);
    struct stat status;
    const bool exists = stat(path, &status) == 0, unknown = !exists && errno != ENOENT;
    const bool direct = exists && (!S_ISREG(status.st_mode) || strncmp(path, "/dev/", 5) == 0 ||
                                   strncmp(path, "/proc/", 6) == 0);
    const char *wrong = unknown ? NULL : refused(path, exists, &status);
    output_file *output = &outputs[count < OUTPUT_MAX ? count : 0];
    const bool resolved = !unknown && !wrong && resolve(path, output->path);
    for (int i = 0; i < count && resolved && !direct && !wrong; i++)
        if (strcmp(outputs[i].path, output->path) == 0)
            wrong = "is already an output; choose another name";
    if (wrong) {
        file_error_set(error, path, "%s", wrong);
        return NULL;
    }
    if (resolved && name_temporary(output, direct)) {
        output->stream = NULL;
        count++;
        unlink(output->temporary); /* of a process that was killed, and had our number */
        output->stream = direct ? fopen(path, "abe") : fopen(output->temporary, "wbxe");
        if (output->stream)
            return output;
        count--;
    }
    file_error_set(error, path, "cannot create: %s; check the folder, or choose another",
                   strerror(errno));
    return NULL;
}

FILE *output_stream(output_file *output) { return output->stream; }

bool output_folder(const char *path, file_error *error)
{
    struct stat found;
    file_error_clear(error);
    if (stat(path, &found) == 0 && S_ISDIR(found.st_mode))
        return true;
    if (count == OUTPUT_MAX || strlen(path) >= PATH_MAX)
        return file_error_set(error, path, "too many outputs, or too long a name; choose another");
    output_file *output = &outputs[count];
    output->stream = NULL;
    output->path[0] = '\0';
    snprintf(output->temporary, PATH_MAX, "%s", path);
    count++;
    if (mkdir(path, 0777) != 0) {
        count--;
        return file_error_set(error, path, "cannot create this folder: %s; choose another",
                              strerror(errno));
    }
    return true;
}

/* Brings to the disk what stdio still holds. */
static bool output_close(output_file *output)
{
    FILE *stream = output->stream;
    output->stream = NULL;
    errno = EIO; /* an earlier write failed */
    const bool ok = !ferror(stream) && fflush(stream) == 0 &&
                    (!*output->temporary || fsync(fileno(stream)) == 0 || errno == EINVAL);
    const int reason = errno;
    if (fclose(stream) != 0)
        return false;
    errno = reason;
    return ok;
}

bool outputs_commit(file_error *error)
{
    file_error_clear(error);
    bool ok = true;
    for (int i = 0; i < count && ok; i++) {
        ok = !outputs[i].stream || output_close(&outputs[i]);
        if (!ok)
            file_error_set(error, outputs[i].path,
                           "cannot write: %s; free some space or choose another folder",
                           strerror(errno));
    }
    for (int i = 0; i < count && ok; i++) {
        const output_file *output = &outputs[i];
        ok = !*output->path || !*output->temporary || rename(output->temporary, output->path) == 0;
        if (!ok)
            file_error_set(error, output->path,
                           "cannot rename a file to this: %s; choose another name",
                           strerror(errno));
    }
    if (ok)
        count = 0; /* new folders stay */
    outputs_discard();
    return ok;
}
