/* checkpoint.c: opens the files of a model, and finds their tensors. */
#include "experiments/lm/checkpoint.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* ---- Files ---- */

exit_code checkpoint_map(checkpoint *c, const char *path, file_error *error)
{
    file_input *const more = realloc(c->file, (size_t)(c->files + 1) * sizeof *more);
    if (!more) {
        file_error_set(error, path, "no memory to open it");
        return EXIT_MACHINE;
    }
    c->file = more;
    file_input in;
    if (!input_open(path, &in, error))
        return EXIT_FILE;
    if (in.size == 0) {
        input_fail(&in, "is empty; copy it again");
        input_close(&in);
        return EXIT_FILE;
    }
    void *const bytes = mmap(NULL, in.size, PROT_READ, MAP_PRIVATE, in.file, 0);
    const int reason = errno;
    input_close(&in);
    if (bytes == MAP_FAILED) {
        input_fail(&in, "its %zu bytes do not fit memory: %s", in.size, strerror(reason));
        return EXIT_MACHINE;
    }
    c->file[c->files++] = input_memory(bytes, in.size, path, error);
    return EXIT_FINE;
}

const char *checkpoint_name(checkpoint *c, const char *text, size_t length)
{
    char **const more = realloc(c->owned, (size_t)(c->owns + 1) * sizeof *more);
    if (!more)
        return NULL;
    c->owned = more;
    char *const copy = malloc(length + 1);
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
    json_t *const text = json_stringn(to, length);
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
        code = checkpoint_map(out, path, error);
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
    for (int64_t n = 0; n < c->files; n++)
        munmap((void *)c->file[n].bytes, c->file[n].size);
    for (int64_t n = 0; n < c->owns; n++)
        free(c->owned[n]);
    free(c->owned);
    free(c->file);
    free(c->tensor);
    free(c->vocabulary.token);
    free(c->vocabulary.merge);
    *c = (checkpoint){0};
}

/* ---- What is in them ---- */

static exit_code check_sizes(const checkpoint *c, const char *name, file_error *error)
{
    const hyper *const h = &c->hyper;
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
            file_error_set(error, name, "has %lld %s, it must be 1 to %lld", (long long)sizes[n].x, sizes[n].what,
                           (long long)sizes[n].high);
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
    return c->tensors ? bsearch(&wanted, c->tensor, (size_t)c->tensors, sizeof wanted, by_name) : NULL;
}
