/* SPDX-License-Identifier: Apache-2.0 */
/* model.c: Llama, to be read from model_run() upward. Over x [tokens][dim] a layer does
 *
 *     x += W_o attention(rope(W_q h), rope(W_k h), W_v h)      h = rms_norm(x)
 *     x += W_down (silu(W_gate h) * W_up h)                    h = rms_norm(x)
 *
 * and that is all there is, beside an embedding before the first and a norm after the last. Memory
 * holds the activations of one layer. */
#include "experiments/lm/model.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/lm/matmul.h"

typedef struct layer {
    const tensor *norm, *q, *k, *v, *o;
    const tensor *q_bias, *k_bias, *v_bias; /* NULL but for Qwen2 */
    const tensor *ffn_norm, *gate, *up, *down;
} layer;

struct model {
    const checkpoint *c;
    hyper hyper;
    const tensor *embedding, *norm, *output; /* the output may be the embedding */
    layer *layer;
    bool *read; /* [tensors of the checkpoint] is it one of these? */
};

enum { ROWS = 1024 }; /* of the feed-forward at a time */

typedef struct activations {
    int64_t tokens;
    float *memory;
    float *x, *h;         /* [tokens][dim] */
    float *q, *o;         /* [tokens][heads * head_dim] */
    float *k, *v;         /* [tokens][kv_heads * head_dim] */
    float *gate, *up;     /* [ROWS][hidden] */
    float *cosine, *sine; /* [tokens][head_dim / 2] */
    float *weight;        /* [dim] of a norm */
} activations;

/* ---- The parts of a layer ---- */

/* y = x / sqrt(mean(x^2) + eps) * weight, row by row. */
static void rms_norm(const model *m, const activations *a, const float *x, const tensor *weight,
                     float *y)
{
    const int64_t dim = m->hyper.dim;
    tensor_read(weight, 0, 1, a->weight);
#pragma omp parallel for
    for (int64_t t = 0; t < a->tokens; t++) {
        const float *from = x + t * dim;
        double squares = 0.0;
        for (int64_t c = 0; c < dim; c++)
            squares += (double)from[c] * (double)from[c];
        const float shrink = (float)(1.0 / sqrt(squares / (double)dim + (double)m->hyper.rms_eps));
        for (int64_t c = 0; c < dim; c++)
            y[t * dim + c] = from[c] * shrink * a->weight[c];
    }
}

/* Pair i of token t turns by t / theta^(2i / head_dim) / divisor. */
static void set_angles(const hyper *h, const activations *a)
{
    const int64_t pairs = h->head_dim / 2;
#pragma omp parallel for
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t i = 0; i < pairs; i++) {
            const double turns =
                pow((double)h->rope_theta, -(double)i / (double)pairs) / (double)h->rope_divisor[i];
            a->cosine[t * pairs + i] = (float)cos((double)t * turns);
            a->sine[t * pairs + i] = (float)sin((double)t * turns);
        }
}

/* x [tokens][heads][head_dim] turns; pairs that were neighbours are half a head apart afterwards,
 * as all are. */
static void rope(const hyper *h, const activations *a, int64_t heads, float *x)
{
    const int64_t pairs = h->head_dim / 2, stride = h->interleaved ? 2 : 1,
                  apart = h->interleaved ? 1 : pairs;
#pragma omp parallel for
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t n = 0; n < heads; n++) {
            float *head = x + (t * heads + n) * h->head_dim, turned[SPARGE_MAX_DIM];
            for (int64_t i = 0; i < pairs; i++) {
                const float low = head[i * stride], high = head[i * stride + apart];
                const float cosine = a->cosine[t * pairs + i], sine = a->sine[t * pairs + i];
                turned[i] = low * cosine - high * sine;
                turned[i + pairs] = high * cosine + low * sine;
            }
            memcpy(head, turned, (size_t)h->head_dim * sizeof *turned);
        }
}

static void add(const float *h, int64_t count, float *x)
{
    for (int64_t n = 0; n < count; n++)
        x[n] += h[n];
}

static exit_code no_memory(const model *m, file_error *error)
{
    file_error_set(error, m->hyper.name, "no memory for a matrix product");
    return EXIT_MACHINE;
}

static exit_code attention(const model *m, int64_t number, const attender *how, activations *a,
                           file_error *error)
{
    const hyper *h = &m->hyper;
    const layer *l = &m->layer[number];
    const int64_t n = a->tokens, d = h->head_dim, width = h->heads * d, narrow = h->kv_heads * d;
    rms_norm(m, a, a->x, l->norm, a->h);
    if (!matmul(a->h, n, l->q, l->q_bias, a->q) || !matmul(a->h, n, l->k, l->k_bias, a->k) ||
        !matmul(a->h, n, l->v, l->v_bias, a->v))
        return no_memory(m, error);
    rope(h, a, h->heads, a->q);
    rope(h, a, h->kv_heads, a->k);
    const sparge_problem problem = {
        .batch = 1,
        .heads = h->heads,
        .kv_heads = h->kv_heads,
        .q_len = n,
        .k_len = n,
        .dim = d,
        .dim_v = d,
        .q = {a->q, SPARGE_F32, n * width, d, width},
        .k = {a->k, SPARGE_F32, n * narrow, d, narrow},
        .v = {a->v, SPARGE_F32, n * narrow, d, narrow},
    };
    const exit_code code = how->attend(how->user, number, &problem,
                                       &(sparge_out){a->o, SPARGE_F32, n * width, d, width}, error);
    if (code)
        return code;
    if (!matmul(a->o, n, l->o, NULL, a->h))
        return no_memory(m, error);
    add(a->h, n * h->dim, a->x);
    return EXIT_FINE;
}

static exit_code feed_forward(const model *m, int64_t number, activations *a, file_error *error)
{
    const hyper *h = &m->hyper;
    const layer *l = &m->layer[number];
    rms_norm(m, a, a->x, l->ffn_norm, a->h);
    for (int64_t first = 0; first < a->tokens; first += ROWS) {
        const int64_t rows = a->tokens - first < ROWS ? a->tokens - first : ROWS;
        float *in_out = a->h + first * h->dim;
        if (!matmul(in_out, rows, l->gate, NULL, a->gate) ||
            !matmul(in_out, rows, l->up, NULL, a->up))
            return no_memory(m, error);
#pragma omp parallel for
        for (int64_t n = 0; n < rows * h->hidden; n++)
            a->up[n] *= a->gate[n] / (1.0f + expf(-a->gate[n]));
        if (!matmul(a->up, rows, l->down, NULL, in_out))
            return no_memory(m, error);
    }
    add(a->h, a->tokens * h->dim, a->x);
    return EXIT_FINE;
}

/* ---- All layers ---- */

static exit_code allocate(const model *m, int64_t tokens, activations *a, file_error *error)
{
    const hyper *h = &m->hyper;
    const int64_t n = tokens, width = h->heads * h->head_dim, narrow = h->kv_heads * h->head_dim;
    const struct {
        float **to;
        int64_t count;
    } parts[] = {
        {&a->x, n * h->dim},
        {&a->h, n * h->dim},
        {&a->q, n * width},
        {&a->o, n * width},
        {&a->k, n * narrow},
        {&a->v, n * narrow},
        {&a->gate, ROWS * h->hidden},
        {&a->up, ROWS * h->hidden},
        {&a->cosine, n * h->head_dim / 2},
        {&a->sine, n * h->head_dim / 2},
        {&a->weight, h->dim},
    };
    enum { PARTS = sizeof parts / sizeof *parts, ALIGN = 16 };
    int64_t total = 0;
    for (int p = 0; p < PARTS; p++)
        total += (parts[p].count + ALIGN - 1) / ALIGN * ALIGN;
    const size_t bytes = (size_t)total * sizeof(float);
    a->tokens = tokens;
    a->memory =
        (double)bytes < memory_available() ? aligned_alloc(ALIGN * sizeof(float), bytes) : NULL;
    if (!a->memory) {
        file_error_set(error, h->name,
                       "%" PRId64 " tokens need %.1f GB of memory; use a shorter text", tokens,
                       1e-9 * (double)bytes);
        return EXIT_MACHINE;
    }
    float *at = a->memory;
    for (int p = 0; p < PARTS; p++) {
        *parts[p].to = at;
        at += (parts[p].count + ALIGN - 1) / ALIGN * ALIGN;
    }
    return EXIT_FINE;
}

exit_code model_run(const model *m, const int32_t *token, int64_t tokens, const attender *how,
                    float *hidden, file_error *error)
{
    activations a;
    exit_code code = allocate(m, tokens, &a, error);
    if (code)
        return code;
    for (int64_t t = 0; t < tokens; t++)
        tensor_read(m->embedding, token[t], 1, a.x + t * m->hyper.dim);
    set_angles(&m->hyper, &a);
    for (int64_t n = 0; n < m->hyper.layers && !code; n++) {
        code = attention(m, n, how, &a, error);
        if (!code)
            code = feed_forward(m, n, &a, error);
    }
    if (!code)
        rms_norm(m, &a, a.x, m->norm, hidden);
    free(a.memory);
    return code;
}

exit_code model_logits(const model *m, const float *hidden, int64_t rows, float *logits,
                       file_error *error)
{
    return matmul(hidden, rows, m->output, NULL, logits) ? EXIT_FINE : no_memory(m, error);
}

/* ---- Where the tensors are ---- */

/* One of this shape, or an error. rows of -1: any number. */
static bool need(const model *m, const char *name, int64_t rows, int64_t columns, const tensor **to,
                 file_error *error)
{
    const tensor *t = *to = checkpoint_find(m->c, name);
    if (!t)
        return file_error_set(error, m->hyper.name, "has no tensor '%s'", name);
    m->read[t - m->c->tensor] = true;
    if ((rows >= 0 && t->rows != rows) || t->columns != columns)
        return file_error_set(error, m->hyper.name,
                              "tensor '%s' is %" PRId64 " x %" PRId64 ", it must be %" PRId64
                              " x %" PRId64,
                              name, t->rows, t->columns, rows < 0 ? t->rows : rows, columns);
    return true;
}

static bool find_layer(const model *m, int64_t number, layer *l, file_error *error)
{
    const hyper *h = &m->hyper;
    const int64_t width = h->heads * h->head_dim, narrow = h->kv_heads * h->head_dim;
    const struct {
        const char *name;
        int64_t rows, columns;
        const tensor **to;
        bool wanted;
    } all[] = {
        {"attn_norm.weight", 1, h->dim, &l->norm, true},
        {"attn_q.weight", width, h->dim, &l->q, true},
        {"attn_k.weight", narrow, h->dim, &l->k, true},
        {"attn_v.weight", narrow, h->dim, &l->v, true},
        {"attn_q.bias", 1, width, &l->q_bias, h->biases},
        {"attn_k.bias", 1, narrow, &l->k_bias, h->biases},
        {"attn_v.bias", 1, narrow, &l->v_bias, h->biases},
        {"attn_output.weight", h->dim, width, &l->o, true},
        {"ffn_norm.weight", 1, h->dim, &l->ffn_norm, true},
        {"ffn_gate.weight", h->hidden, h->dim, &l->gate, true},
        {"ffn_up.weight", h->hidden, h->dim, &l->up, true},
        {"ffn_down.weight", h->dim, h->hidden, &l->down, true},
    };
    for (size_t n = 0; n < sizeof all / sizeof *all; n++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%" PRId64 ".%s", number, all[n].name);
        if (all[n].wanted && !need(m, name, all[n].rows, all[n].columns, all[n].to, error))
            return false;
    }
    return true;
}

static bool is_same(const tensor *a, const tensor *b)
{
    return a->type == b->type && a->rows == b->rows && a->columns == b->columns &&
           memcmp(a->data, b->data, tensor_bytes(a->type, a->rows, a->columns)) == 0;
}

/* The output's own, or the embedding. */
static exit_code find_output(model *m, file_error *error)
{
    static const char name[] = "output.weight";
    const hyper *h = &m->hyper;
    m->output = m->embedding;
    if (!checkpoint_find(m->c, name)) {
        if (h->untied)
            file_error_set(error, h->name,
                           "has no tensor '%s' (lm_head.weight), and its config.json does not say "
                           "tie_word_embeddings",
                           name);
        return h->untied ? EXIT_FILE : EXIT_FINE;
    }
    if (!need(m, name, h->vocab, h->dim, &m->output, error))
        return EXIT_FILE;
    if (!h->tied || is_same(m->output, m->embedding))
        return EXIT_FINE;
    file_error_set(error, h->name,
                   "its config.json says tie_word_embeddings, and its '%s' (lm_head.weight) is "
                   "another than its embedding",
                   name);
    return EXIT_UNSUPPORTED;
}

/* What is left out would be missed in the result. */
static exit_code check_all_read(const model *m, file_error *error)
{
    for (int64_t n = 0; n < m->c->tensors; n++) {
        const char *name = m->c->tensor[n].name;
        if (m->read[n] || strcmp(name, "rope_freqs.weight") == 0) /* which are among the sizes */
            continue;
        file_error_set(error, m->hyper.name,
                       "has the tensor '%.80s', which no forward pass of a %s reads here", name,
                       m->hyper.architecture);
        return EXIT_UNSUPPORTED;
    }
    return EXIT_FINE;
}

static exit_code find_all(model *m, file_error *error)
{
    if (!need(m, "token_embd.weight", -1, m->hyper.dim, &m->embedding, error) ||
        !need(m, "output_norm.weight", 1, m->hyper.dim, &m->norm, error))
        return EXIT_FILE;
    m->hyper.vocab = m->embedding->rows;
    const exit_code code = find_output(m, error);
    if (code)
        return code;
    for (int64_t n = 0; n < m->hyper.layers; n++)
        if (!find_layer(m, n, &m->layer[n], error))
            return EXIT_FILE;
    return check_all_read(m, error);
}

exit_code model_open(const checkpoint *c, model **out, file_error *error)
{
    exit_code code = EXIT_MACHINE;
    model *m = *out = calloc(1, sizeof *m);
    if (m) {
        m->c = c;
        m->hyper = c->hyper;
        m->layer = calloc((size_t)c->hyper.layers, sizeof *m->layer);
        m->read = calloc((size_t)c->tensors + 1, sizeof *m->read);
    }
    if (m && m->layer && m->read)
        code = find_all(m, error);
    else
        file_error_set(error, c->hyper.name, "no memory for its layers");
    if (code) {
        model_close(m);
        *out = NULL;
    }
    return code;
}

const hyper *model_hyper(const model *m) { return &m->hyper; }

void model_close(model *m)
{
    if (m) {
        free(m->layer);
        free(m->read);
    }
    free(m);
}
