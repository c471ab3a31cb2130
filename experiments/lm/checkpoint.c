/* SPDX-License-Identifier: Apache-2.0 */
/* checkpoint.c: opens the files of a model, and finds their tensors. */
#include "experiments/lm/checkpoint.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- Files ---- */

double memory_available(void)
{
    FILE *info = fopen("/proc/meminfo", "r");
    char line[128];
    double kilobytes = INFINITY;
    while (info && fgets(line, sizeof line, info) &&
           sscanf(line, "MemAvailable: %lf kB", &kilobytes) != 1)
        ;
    if (info)
        fclose(info);
    return 1024.0 * kilobytes;
}

static bool is_changed(const file_input *in, const struct timespec *then)
{
    struct stat now;
    return fstat(in->file, &now) != 0 || (size_t)now.st_size != in->size ||
           now.st_mtim.tv_sec != then->tv_sec || now.st_mtim.tv_nsec != then->tv_nsec;
}

exit_code checkpoint_check(const checkpoint *c)
{
    for (int64_t n = 0; n < c->files; n++)
        if (is_changed(&c->file[n], &c->changed[n])) {
            input_fail(&c->file[n],
                       "has changed since it was read; what is computed is of neither: run again");
            return EXIT_FILE;
        }
    return EXIT_FINE;
}

exit_code checkpoint_load(checkpoint *c, const char *path, file_error *error)
{
    file_input *more = realloc(c->file, (size_t)(c->files + 1) * sizeof *more);
    c->file = more ? more : c->file;
    struct timespec *times =
        more ? realloc(c->changed, (size_t)(c->files + 1) * sizeof *times) : NULL;
    c->changed = times ? times : c->changed;
    if (!times) {
        file_error_set(error, path, "no memory to open it");
        return EXIT_MACHINE;
    }
    file_input in;
    struct stat found = {0};
    if (!input_open(path, &in, error))
        return EXIT_FILE;
    fstat(in.file, &found);
    uint8_t *bytes = (double)in.size < memory_available() ? malloc(in.size + 1) : NULL;
    exit_code code = EXIT_FILE;
    if (in.size == 0) {
        input_fail(&in, "is empty; copy it again");
    } else if (!bytes) {
        input_fail(&in, "its %zu bytes do not fit memory", in.size);
        code = EXIT_MACHINE;
    } else if (input_read(&in, 0, in.size, bytes)) {
        in.bytes = bytes;
        c->changed[c->files] = found.st_mtim;
        c->file[c->files++] = in;
        return checkpoint_check(c);
    }
    free(bytes);
    input_close(&in);
    return code;
}

const char *checkpoint_name(checkpoint *c, const char *text, size_t length)
{
    char **more = realloc(c->owned, (size_t)(c->owns + 1) * sizeof *more);
    if (!more)
        return NULL;
    c->owned = more;
    char *copy = malloc(length + 1);
    if (!copy)
        return NULL;
    memcpy(copy, text, length);
    copy[length] = '\0';
    return c->owned[c->owns++] = copy;
}

void checkpoint_text(char *to, size_t size, const char *from, size_t length)
{
    if (length >= size)
        for (length = size - 1; length > 0 && ((uint8_t)from[length] & 0xc0) == 0x80;)
            length--;
    memcpy(to, from, length);
    to[length] = '\0';
    json_t *text = json_stringn(to, length);
    for (size_t n = 0; n < length && !text; n++)
        to[n] = (uint8_t)to[n] < 0x80 ? to[n] : '?';
    json_decref(text);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const tensor *)a)->name, ((const tensor *)b)->name);
}

exit_code checkpoint_open(const char *path, checkpoint *out, file_error *error)
{
    struct stat found;
    *out = (checkpoint){0};
    exit_code code;
    if (stat(path, &found) == 0 && S_ISDIR(found.st_mode)) {
        code = hf_read(path, out, error);
    } else {
        code = checkpoint_load(out, path, error);
        if (!code)
            code = gguf_read(&out->file[0], out);
    }
    if (!code)
        code = checkpoint_finish(out, path, error);
    if (code)
        checkpoint_close(out);
    return code;
}

void checkpoint_close(checkpoint *c)
{
    for (int64_t n = 0; n < c->files; n++) {
        input_close(&c->file[n]);
        free((void *)c->file[n].bytes);
    }
    for (int64_t n = 0; n < c->owns; n++)
        free(c->owned[n]);
    free(c->owned);
    free(c->file);
    free(c->changed);
    free(c->tensor);
    free(c->vocabulary.token);
    free(c->vocabulary.merge);
    free(c->vocabulary.kept);
    *c = (checkpoint){0};
}

/* ---- What is in them ---- */

static exit_code check_sizes(const checkpoint *c, const char *name, file_error *error)
{
    const hyper *h = &c->hyper;
    const struct {
        const char *what;
        int64_t x, high;
    } sizes[] = {
        {"layers", h->layers, 1 << 12},
        {"channels", h->dim, 1 << 17},
        {"hidden channels", h->hidden, 1 << 19},
        {"heads", h->heads, 1 << 12},
        {"key heads", h->kv_heads, 1 << 12},
        {"channels a head", h->head_dim, SPARGE_MAX_DIM},
        {"tokens of context", h->context, 1 << 24},
    };
    const char *wrong = NULL;
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes && !wrong; n++)
        if (sizes[n].x < 1 || sizes[n].x > sizes[n].high) {
            file_error_set(error, name, "has %lld %s, it must be 1 to %lld", (long long)sizes[n].x,
                           sizes[n].what, (long long)sizes[n].high);
            return EXIT_FILE;
        }
    if (h->heads % h->kv_heads)
        wrong = "its heads are no multiple of its key heads";
    else if (h->head_dim % 2)
        wrong = "its channels a head are odd, and cannot turn in pairs";
    else if (!(h->rope_theta >= 1.0f && h->rope_theta <= 1e12f))
        wrong = "its rope theta is not in [1, 1e12]";
    else if (!(h->rms_eps >= 0.0f && h->rms_eps <= 1.0f))
        wrong = "its rms epsilon is not in [0, 1]";
    for (int64_t n = 0; n < h->head_dim / 2 && !wrong; n++)
        if (!(h->rope_divisor[n] > 0.0f && h->rope_divisor[n] < 1e12f))
            wrong = "a divisor of its rope frequencies is not in (0, 1e12)";
    if (wrong)
        file_error_set(error, name, "%s", wrong);
    return wrong ? EXIT_FILE : EXIT_FINE;
}

exit_code checkpoint_finish(checkpoint *c, const char *name, file_error *error)
{
    if (c->tensors)
        qsort(c->tensor, (size_t)c->tensors, sizeof *c->tensor, by_name);
    for (int64_t n = 1; n < c->tensors; n++)
        if (by_name(&c->tensor[n - 1], &c->tensor[n]) == 0) {
            file_error_set(error, name, "has two tensors of the name '%.80s'", c->tensor[n].name);
            return EXIT_FILE;
        }
    return check_sizes(c, name, error);
}

const tensor *checkpoint_find(const checkpoint *c, const char *name)
{
    const tensor wanted = {.name = name};
    return c->tensors ? bsearch(&wanted, c->tensor, (size_t)c->tensors, sizeof wanted, by_name)
                      : NULL;
}
