/* SPDX-License-Identifier: Apache-2.0 */
/* gguf.c: libFuzzer target: any bytes give either one line of error and nothing, or a checkpoint
 * whose tensors lie in the bytes. From that come a model that runs and a tokenizer whose numbers
 * are those of tokens; or a line each. */
#include "experiments/lm/model.h"
#include "experiments/lm/tokenizer.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void require_line(const file_error *error)
{
    require(memchr(error->text, '\0', sizeof error->text) != NULL);
    require(error->text[0] && !strpbrk(error->text, "\r\n"));
}

/* What checkpoint_open does, of bytes that are in memory: there an address sanitizer sees where
 * they end. */
static bool open_bytes(const uint8_t *bytes, size_t size, checkpoint *c, file_error *error)
{
    const file_input in = input_memory(bytes, size, "fuzz", error);
    *c = (checkpoint){0};
    exit_code code = gguf_read(&in, c);
    if (!code)
        code = checkpoint_finish(c, "fuzz", error);
    require(code == EXIT_FINE || code == EXIT_FILE || code == EXIT_UNSUPPORTED);
    if (code)
        checkpoint_close(c);
    return code == EXIT_FINE;
}

static void read_tensors(const checkpoint *c, const uint8_t *bytes, size_t size)
{
    for (int64_t n = 0; n < c->tensors; n++) {
        const tensor *t = &c->tensor[n];
        const size_t all = tensor_bytes(t->type, t->rows, t->columns);
        require(t->rows >= 1 && t->columns >= 1 && all > 0 && all <= size);
        require(t->data >= bytes && t->data + all <= bytes + size);
        float *row = malloc((size_t)t->columns * sizeof *row);
        require(row != NULL);
        tensor_read(t, 0, 1, row);
        tensor_read(t, t->rows - 1, 1, row);
        free(row);
        require(checkpoint_find(c, t->name) != NULL);
    }
}

/* Attention that sees nothing. */
static exit_code attend(void *user, int64_t layer, const sparge_problem *problem,
                        const sparge_out *o, file_error *error)
{
    (void)user;
    (void)layer;
    (void)error;
    for (int64_t t = 0; t < problem->q_len; t++)
        for (int64_t h = 0; h < problem->heads; h++)
            memset((float *)o->data + h * o->head + t * o->token, 0,
                   (size_t)problem->dim_v * sizeof(float));
    return EXIT_FINE;
}

static void run(const checkpoint *c)
{
    file_error error;
    model *m;
    memset(&error, 'x', sizeof error);
    const exit_code code = model_open(c, &m, &error);
    require((code == EXIT_FINE) == (m != NULL));
    if (code) {
        require_line(&error);
        return;
    }
    const hyper *h = model_hyper(m);
    const int32_t token[] = {0, (int32_t)(h->vocab - 1)};
    float *hidden = malloc(2 * (size_t)h->dim * sizeof *hidden);
    float *logits = malloc(2 * (size_t)h->vocab * sizeof *logits);
    require(hidden && logits);
    if (model_run(m, token, 2, &(attender){attend, NULL}, hidden, &error) == EXIT_FINE)
        require(model_logits(m, hidden, 2, logits, &error) == EXIT_FINE);
    free(hidden);
    free(logits);
    model_close(m);
}

static void encode(const checkpoint *c)
{
    static const char text[] =
        "It's the 1st  word,\r\n n\xc3\xb6t  the 23rd\xe2\x80\x83\xf0\x9f\x91\x8d\n\n ab ab aaaa";
    file_error error;
    tokenizer *t;
    int32_t *token;
    int64_t tokens;
    memset(&error, 'x', sizeof error);
    exit_code code = tokenizer_open(c, &t, &error);
    require((code == EXIT_FINE) == (t != NULL));
    if (!code) {
        code = tokenizer_encode(t, "fuzz", text, sizeof text - 1, &token, &tokens, &error);
        require(code || (tokens >= 1 && tokens < (int64_t)sizeof text));
        for (int64_t n = 0; n < tokens && !code; n++) {
            require(token[n] >= 0 && token[n] < c->vocabulary.tokens);
            require(tokenizer_spelling(t, token[n]).length > 0);
        }
        if (!code)
            free(token);
    }
    if (code)
        require_line(&error);
    tokenizer_close(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    checkpoint c;
    file_error error;
    memset(&c, 0xff, sizeof c);
    memset(&error, 'x', sizeof error);
    if (!open_bytes(bytes, size, &c, &error)) {
        static const checkpoint none;
        require_line(&error);
        require(memcmp(&c, &none, sizeof c) == 0);
        return 0;
    }
    read_tensors(&c, bytes, size);
    run(&c);
    encode(&c);
    checkpoint_close(&c);
    return 0;
}
