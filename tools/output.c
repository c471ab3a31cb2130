/* output.c: output files that appear whole or not at all: written beside their target under
 * another name, renamed when all is well, removed when it is not. */
#define _XOPEN_SOURCE 700 /* realpath */
#include "tools/output.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

struct output_file {
    FILE *stream;        /* NULL when closed, and of a folder */
    bool folder;         /* which is made under its own name */
    bool placed;         /* the new file stands under its name, */
    bool fresh;          /* where nothing stood before, */
    bool exchanged;      /* or what did is the temporary file now */
    atomic_bool pending; /* the temporary file may exist */
    char path[PATH_MAX]; /* links resolved, where it exists */
    char temporary[PATH_MAX];
};

/* A fixed table, because a signal handler may not follow pointers that change. */
static output_file outputs[OUTPUT_MAX];
static int count;
static atomic_bool placing; /* by a thread in which signals wait; in another a handler does */

/* ---- Leaving nothing behind ------------------------------------------------------------- */

/* In this order: a signal between the two removes the file once more, which harms nobody. */
static void output_unlink(output_file *output)
{
    if (atomic_load(&output->pending))
        (output->folder ? rmdir : unlink)(output->temporary);
    atomic_store(&output->pending, false);
}

void outputs_abandon(void)
{
    while (atomic_load(&placing))
        sched_yield();
    for (int i = OUTPUT_MAX - 1; i >= 0; i--) /* files before their folder */
        output_unlink(&outputs[i]);
}

static void handle_signal(int number)
{
    outputs_abandon();
    signal(number, SIG_DFL);
    raise(number); /* takes effect when this handler returns */
}

void outputs_discard(void)
{
    for (int i = 0; i < count; i++) {
        if (outputs[i].stream)
            fclose(outputs[i].stream);
        outputs[i].stream = NULL;
    }
    outputs_abandon();
    count = 0;
}

static void block_signals(sigset_t *before)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, before);
}

static void install(void)
{
    static const int signals[] = {SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGTERM, SIGXCPU};
    static bool installed;
    if (installed)
        return;
    installed = true;
    atexit(outputs_discard);
    signal(SIGXFSZ, SIG_IGN);
    struct sigaction old, new = {.sa_handler = handle_signal};
    sigfillset(&new.sa_mask);
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++)
        /* nohup, and shells for background jobs, have signals ignored: leave them so. */
        if (sigaction(signals[i], NULL, &old) == 0 && old.sa_handler == SIG_DFL)
            sigaction(signals[i], &new, NULL);
}

/* ---- Opening ---------------------------------------------------------------------------- */

static bool is_direct(const char *path, mode_t mode)
{
    return !S_ISREG(mode) || strcmp(path, "/dev/stdout") == 0 || strcmp(path, "/dev/stderr") == 0 ||
           strncmp(path, "/dev/fd/", 8) == 0 || strncmp(path, "/proc/self/fd/", 14) == 0;
}

/* Creates a file beside output->path under a name that nobody has. Returns -1 after failure. */
static int create_temporary(output_file *output)
{
    static int serial;
    const char *slash = strrchr(output->path, '/');
    const size_t folder = slash ? (size_t)(slash + 1 - output->path) : 0;
    int file;
    do {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        char name[80];
        const int length = snprintf(name, sizeof name, ".sparge-%ld-%ld-%d.tmp", (long)getpid(),
                                    now.tv_nsec, serial++);
        if (folder + (size_t)length >= PATH_MAX) {
            errno = ENAMETOOLONG;
            return -1;
        }
        memcpy(output->temporary, output->path, folder);
        memcpy(output->temporary + folder, name, (size_t)length + 1);
        /* Before the file exists: a signal right after open must find it. */
        atomic_store(&output->pending, true);
        file = open(output->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (file < 0)
            atomic_store(&output->pending, false);
    } while (file < 0 && errno == EEXIST);
    return file;
}

/* The one spelling of a target, whether or not it exists; as it is where its folder does not. */
static void resolve(const char *path, char to[PATH_MAX])
{
    char folder[PATH_MAX], link[PATH_MAX], target[2 * PATH_MAX];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    const size_t length = (size_t)(name - path);
    memcpy(folder, length ? path : "./", length ? length : 2);
    folder[length ? length : 2] = '\0';
    if (realpath(path, to))
        return;
    const ssize_t bytes = readlink(path, link, sizeof link - 1);
    if (bytes > 0) { /* to what is not there yet */
        link[bytes] = '\0';
        snprintf(target, sizeof target, "%s%s", link[0] == '/' ? "" : folder, link);
        if (strlen(target) < PATH_MAX) {
            resolve(target, to);
            return;
        }
    }
    if (!realpath(folder, to) || strlen(to) + 1 + strlen(name) >= PATH_MAX) {
        memcpy(to, path, strlen(path) + 1);
        return;
    }
    strcat(to, "/");
    strcat(to, name);
}

/* Does what is written there go where the JSON goes? Of devices only to a terminal. */
static bool is_stdout(const struct stat *status)
{
    struct stat out;
    return fstat(STDOUT_FILENO, &out) == 0 && out.st_dev == status->st_dev &&
           out.st_ino == status->st_ino && (!S_ISCHR(out.st_mode) || isatty(STDOUT_FILENO));
}

output_file *output_open(const char *path, file_error *error)
{
    file_error_clear(error);
    install();
    output_file *output = &outputs[count < OUTPUT_MAX ? count : 0];
    struct stat status;
    const bool exists = stat(path, &status) == 0, circle = !exists && errno == ELOOP;
    const bool direct = exists && is_direct(path, status.st_mode);
    const size_t length = strlen(path);
    const char *wrong = NULL;
    if (count == OUTPUT_MAX)
        wrong = "too many outputs at a time; write fewer";
    else if (strcmp(path, "-") == 0 || (exists && is_stdout(&status)))
        wrong = "is standard output, where JSON goes; name a file";
    else if (circle)
        wrong = "is a link that leads to itself; choose another name";
    else if (exists ? S_ISDIR(status.st_mode) : length == 0 || path[length - 1] == '/')
        wrong = "is a directory; name a file in it";
    else if (length >= PATH_MAX || (!exists && errno == ENAMETOOLONG))
        wrong = "the name is too long; choose another";
    else if (exists && access(path, W_OK) != 0) /* a rename would replace what is protected */
        wrong = "is write-protected; allow it (chmod +w) or choose another name";
    else if (direct)
        memcpy(output->path, path, length + 1);
    else
        resolve(path, output->path);
    for (int i = 0; i < count && !direct && !wrong; i++)
        if (strcmp(outputs[i].path, output->path) == 0)
            wrong = "is already an output; choose another name";
    if (wrong) {
        file_error_set(error, path, "%s", wrong);
        return NULL;
    }

    output->folder = output->placed = output->exchanged = false;
    const int file =
        direct ? open(path, O_WRONLY | O_APPEND | O_CLOEXEC) : create_temporary(output);
    output->stream = file < 0 ? NULL : fdopen(file, "wb");
    if (!output->stream) {
        file_error_set(error, path, "cannot create: %s; check the folder, or choose another",
                       strerror(errno));
        if (file >= 0)
            close(file);
        output_unlink(output);
        return NULL;
    }
    count++;
    return output;
}

FILE *output_stream(output_file *output) { return output->stream; }

bool output_folder(const char *path, file_error *error)
{
    file_error_clear(error);
    install();
    if (count == OUTPUT_MAX || strlen(path) >= PATH_MAX)
        return file_error_set(error, path, "too many outputs, or too long a name; choose another");
    output_file *output = &outputs[count];
    memcpy(output->temporary, path, strlen(path) + 1);
    output->folder = true;
    output->placed = output->exchanged = false;
    sigset_t before;
    block_signals(&before); /* what was there is not ours to remove */
    const bool made = mkdir(path, 0777) == 0;
    const int reason = errno;
    atomic_store(&output->pending, made);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    count += made;
    return made || reason == EEXIST ||
           file_error_set(error, path, "cannot create this folder: %s; choose another",
                          strerror(reason));
}

/* ---- Finishing -------------------------------------------------------------------------- */

/* Brings to the disk what stdio still holds, and to light the first error that anyone met. */
static bool output_close(output_file *output, file_error *error)
{
    static const char probe[1 << 16];
    const int file = fileno(output->stream);
    const bool temporary = atomic_load(&output->pending), failed = ferror(output->stream);
    errno = 0;
    bool ok = fflush(output->stream) == 0 && !failed;
    /* The reason of an earlier failure is lost. So is the file: write on, to meet it again. */
    for (int i = 0; i < 4 && !ok && errno == 0 && temporary; i++)
        if (write(file, probe, sizeof probe) > 0)
            fsync(file);
    /* Some file systems cannot sync, and say so by EINVAL. */
    if (ok && temporary)
        ok = fsync(file) == 0 || errno == EINVAL;
    const int reason = errno;
    const bool closed = fclose(output->stream) == 0;
    output->stream = NULL;
    if (ok && closed)
        return true;
    return file_error_set(error, output->path,
                          "cannot write: %s; free some space or choose another folder",
                          strerror(!ok ? reason ? reason : EIO : errno));
}

/* Gives the new file its name, and keeps what had it before, where the file system can exchange
 * two. */
static bool place(output_file *output)
{
    struct stat there;
    const bool exists = lstat(output->path, &there) == 0;
    if (exists && S_ISDIR(there.st_mode)) {
        errno = EISDIR;
        return false;
    }
    output->exchanged = exists && renameat2(AT_FDCWD, output->temporary, AT_FDCWD, output->path,
                                            RENAME_EXCHANGE) == 0;
    output->placed = output->exchanged || rename(output->temporary, output->path) == 0;
    if (output->placed)
        atomic_store(&output->pending, output->exchanged);
    output->fresh = !exists;
    return output->placed;
}

static void take_back(output_file *output)
{
    if (output->exchanged)
        renameat2(AT_FDCWD, output->temporary, AT_FDCWD, output->path, RENAME_EXCHANGE);
    else if (output->placed && output->fresh)
        unlink(output->path);
}

bool outputs_commit(file_error *error)
{
    file_error_clear(error);
    bool ok = true;
    for (int i = 0; i < count && ok; i++)
        ok = outputs[i].folder || output_close(&outputs[i], error);

    /* All renames, or none: signals wait. */
    sigset_t before;
    block_signals(&before);
    atomic_store(&placing, true);
    for (int i = 0; i < count && ok; i++) {
        if (!atomic_load(&outputs[i].pending))
            continue;
        ok = outputs[i].folder || place(&outputs[i]);
        if (!ok)
            file_error_set(error, outputs[i].path,
                           "cannot rename a file to this: %s; choose another name",
                           strerror(errno));
    }
    for (int i = 0; i < count; i++)
        if (!ok)
            take_back(&outputs[i]);
        else if (outputs[i].folder) /* it stays */
            atomic_store(&outputs[i].pending, false);
    atomic_store(&placing, false);
    outputs_discard();
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ok;
}
