/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/support/problem.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "sparge_cuda.h"

/* ---- Dtypes, by arithmetic ---- */

static size_t size_of(sparge_dtype dtype) { return dtype == SPARGE_F32 ? 4 : 2; }

float round_to(sparge_dtype dtype, float x)
{
    if (dtype == SPARGE_F32 || x == 0.0f || !isfinite(x))
        return x;
    const int digits = dtype == SPARGE_F16 ? 11 : 8, lowest = dtype == SPARGE_F16 ? -14 : -126;
    const int exponent = ilogbf(x) < lowest ? lowest : ilogbf(x);
    const double ulp = ldexp(1.0, exponent - digits + 1), y = rint((double)x / ulp) * ulp;
    if (fabs(y) >= ldexp(1.0, dtype == SPARGE_F16 ? 16 : 128))
        return copysignf(INFINITY, x);
    return y == 0.0 ? copysignf(0.0f, x) : (float)y;
}

static uint16_t encode(sparge_dtype dtype, float x)
{
    const int digits = dtype == SPARGE_F16 ? 11 : 8, bias = dtype == SPARGE_F16 ? 15 : 127;
    const unsigned sign = signbit(x) ? 0x8000u : 0, top = dtype == SPARGE_F16 ? 0x7c00u : 0x7f80u;
    if (isnan(x))
        return (uint16_t)(sign | top | 1u);
    if (isinf(x))
        return (uint16_t)(sign | top);
    const int exponent = x == 0.0f || ilogbf(x) < 1 - bias ? 1 - bias : ilogbf(x);
    const int fraction =
        (int)ldexpf(fabsf(x), digits - 1 - exponent); /* exact: x has the dtype's digits */
    return (uint16_t)(sign | (unsigned)(((exponent + bias - 1) << (digits - 1)) + fraction));
}

static float decode(sparge_dtype dtype, uint16_t bits)
{
    const int digits = dtype == SPARGE_F16 ? 11 : 8, bias = dtype == SPARGE_F16 ? 15 : 127;
    const int exponent = (bits & 0x7fff) >> (digits - 1),
              fraction = bits & ((1 << (digits - 1)) - 1);
    float x = ldexpf((float)(fraction + (1 << (digits - 1))), exponent - bias - digits + 1);
    if (exponent == 0)
        x = ldexpf((float)fraction, 1 - bias - digits + 1);
    else if (exponent == 2 * bias + 1)
        x = fraction ? NAN : INFINITY;
    return bits & 0x8000 ? -x : x;
}

/* ---- Tensors ---- */

int64_t tensor_count(const tensor *t) { return t->batch * t->heads * t->tokens * t->channels; }

tensor tensor_make(int64_t batch, int64_t heads, int64_t tokens, int64_t channels,
                   sparge_dtype dtype, tensor_layout layout)
{
    tensor t = {batch, heads, tokens, channels, .in = {.dtype = dtype}};
    const int64_t pad = layout == PADDED ? 8 : layout == ODD ? 3 : layout == BACKWARD ? 1 : 0;
    int64_t token = channels + pad, head = tokens * token + 2 * pad, base = 0;
    if (layout == NHD) {
        head = channels;
        token = heads * channels;
    }
    const int64_t each = layout == NHD ? tokens * token : heads * head + 3 * pad;
    int64_t elements = batch * each;
    if (layout == ODD) {
        base = 7;
        elements += base;
    }
    t.in.batch = each;
    t.in.head = head;
    t.in.token = token;
    if (layout == BACKWARD) { /* the first element of all lies where the last one's row began */
        base = (batch ? batch - 1 : 0) * each + (heads ? heads - 1 : 0) * head +
               (tokens ? tokens - 1 : 0) * token;
        t.in.batch = -each;
        t.in.head = -head;
        t.in.token = -token;
    }
    t.bytes = (size_t)elements * size_of(dtype);
    t.memory = check_alloc(t.bytes);
    t.in.data = t.first = t.memory + (size_t)(tensor_count(&t) ? base : 0) * size_of(dtype);
    t.x = check_alloc((size_t)tensor_count(&t) * sizeof *t.x);
    t.used = check_alloc((size_t)elements * sizeof *t.used);
    memset(t.used, 0, (size_t)elements * sizeof *t.used);
    for (int64_t line = 0; line < batch * heads * tokens; line++) {
        const int64_t b = line / tokens / heads, h = line / tokens % heads, n = line % tokens;
        const int64_t at = base + b * t.in.batch + h * t.in.head + n * t.in.token;
        memset(t.used + at, 1, (size_t)channels * sizeof *t.used);
    }
    return t;
}

void tensor_free(tensor *t)
{
    check_free(t->x);
    check_free(t->used);
    check_free(t->memory);
    *t = (tensor){0};
}

float *tensor_row(const tensor *t, int64_t b, int64_t h, int64_t token)
{
    return t->x + ((b * t->heads + h) * t->tokens + token) * t->channels;
}

/* Where row `line` of a tensor lies. */
static void *stored_row(const tensor *t, int64_t line)
{
    const int64_t b = line / t->tokens / t->heads, h = line / t->tokens % t->heads,
                  n = line % t->tokens;
    const int64_t at = b * t->in.batch + h * t->in.head + n * t->in.token;
    return t->first + at * (int64_t)size_of(t->in.dtype);
}

void tensor_write(tensor *t)
{
    for (int64_t line = 0; line < t->batch * t->heads * t->tokens; line++) {
        float *x = t->x + line * t->channels;
        void *row = stored_row(t, line);
        for (int64_t c = 0; c < t->channels; c++)
            x[c] = round_to(t->in.dtype, x[c]);
        if (t->in.dtype == SPARGE_F32)
            memcpy(row, x, (size_t)t->channels * sizeof *x);
        else
            for (int64_t c = 0; c < t->channels; c++)
                ((uint16_t *)row)[c] = encode(t->in.dtype, x[c]);
    }
}

void tensor_read(tensor *t)
{
    for (int64_t line = 0; line < t->batch * t->heads * t->tokens; line++) {
        float *x = t->x + line * t->channels;
        const void *row = stored_row(t, line);
        if (t->in.dtype == SPARGE_F32)
            memcpy(x, row, (size_t)t->channels * sizeof *x);
        else
            for (int64_t c = 0; c < t->channels; c++)
                x[c] = decode(t->in.dtype, ((const uint16_t *)row)[c]);
    }
}

sparge_out tensor_out(const tensor *t)
{
    return (sparge_out){t->first, t->in.dtype, t->in.batch, t->in.head, t->in.token};
}

void tensor_fill(tensor *t, float low, float high)
{
    for (int64_t n = 0; n < tensor_count(t); n++)
        t->x[n] = check_uniform(low, high);
    tensor_write(t);
}

/* The first element of memory that is poison where an element of the tensor lies, or is not where
 * none does; -1 when there is none. */
static int64_t badly_written(const tensor *t)
{
    const size_t size = size_of(t->in.dtype);
    for (size_t n = 0; n < t->bytes / size; n++) {
        const char *at = t->memory + n * size;
        bool poison = true;
        for (size_t byte = 0; byte < size; byte++)
            poison &= (unsigned char)at[byte] == 0xFF;
        if (poison == t->used[n])
            return (int64_t)n;
    }
    return -1;
}

/* ---- Problems ---- */

int64_t blocks(int64_t len, int64_t block) { return (len + block - 1) / block; }

shape shape_of(int64_t batch, int64_t heads, int64_t kv_heads, int64_t q_len, int64_t k_len,
               int64_t dim, int64_t dim_v)
{
    return (shape){batch, heads, kv_heads, q_len, k_len, dim, dim_v, .q = SPARGE_F32};
}

/* A slow drift of its own for each head, noise, and a common offset. */
static void drift(tensor *t, float wave, float noise, float offset)
{
    for (int64_t line = 0; line < t->batch * t->heads; line++)
        for (int64_t n = 0; n < t->tokens; n++)
            for (int64_t c = 0; c < t->channels; c++)
                t->x[(line * t->tokens + n) * t->channels + c] =
                    wave * sinf(0.02f * (float)(n * (c % 5 + 1)) + (float)(c * c + line)) +
                    noise * check_uniform(-1, 1) + offset * cosf((float)c);
}

problem problem_make(const shape *s)
{
    problem x = {
        .p = {.batch = s->batch,
              .heads = s->heads,
              .kv_heads = s->kv_heads,
              .q_len = s->q_len,
              .k_len = s->k_len,
              .dim = s->dim,
              .dim_v = s->dim_v},
        .q = tensor_make(s->batch, s->heads, s->q_len, s->dim, s->q, s->layout_q),
        .k = tensor_make(s->batch, s->kv_heads, s->k_len, s->dim, s->k, s->layout_k),
        .v = tensor_make(s->batch, s->kv_heads, s->k_len, s->dim_v, s->v, s->layout_v),
        .o = sparge_options_default(SPARGE_RULES_DEFAULT),
    };
    x.o.backend = SPARGE_REF;
    x.o.block_q = x.o.block_k = 16;
    x.o.qk_dtype = x.o.pv_dtype = SPARGE_F32;
    drift(&x.q, 0.8f, 0.8f, 0.0f);
    drift(&x.k, 0.8f, 0.8f, 0.5f);
    drift(&x.v, 0.7f, 0.5f, 0.0f);
    for (int64_t n = 0; n < tensor_count(&x.v); n += s->dim_v)
        x.v.x[n] += 2.0f;
    problem_write(&x);
    x.p.q = x.q.in;
    x.p.k = x.k.in;
    x.p.v = x.v.in;
    return x;
}

void problem_write(problem *x)
{
    tensor_write(&x->q);
    tensor_write(&x->k);
    tensor_write(&x->v);
}

void problem_free(problem *x)
{
    tensor_free(&x->q);
    tensor_free(&x->k);
    tensor_free(&x->v);
    check_free(x->k_bias);
    sparge_mask_free(&x->mask);
}

int64_t problem_rows(const problem *x) { return x->p.batch * x->p.heads * x->p.q_len; }

static void mask_empty(problem *x)
{
    sparge_error error;
    sparge_mask_free(&x->mask);
    check(sparge_mask_alloc(&x->mask, &x->p, &x->o, &error) == SPARGE_OK, "%s", error.text);
}

void mask_fill(problem *x, float share)
{
    mask_empty(x);
    const sparge_mask *m = &x->mask;
    for (int64_t n = 0; n < m->batch * m->heads * m->q_blocks * m->words * 32; n++)
        if (check_uniform(0, 1) < share)
            m->bits[n / 32] |= 1u << n % 32;
}

void mask_predict(problem *x)
{
    sparge_error error;
    mask_empty(x);
    check(sparge_predict(&x->p, &x->o, &x->mask, NULL, &error) == SPARGE_OK, "%s", error.text);
}

bool mask_has(const problem *x, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const sparge_mask *m = &x->mask;
    const int64_t row = ((b * m->heads + h) * m->q_blocks + i) * m->words;
    return !m->bits || (m->bits[row + j / 32] >> j % 32 & 1);
}

/* A partial block of so many queries, of so many words each. */
static void bits_at_random(uint32_t *bits, int64_t queries, int64_t words)
{
    const int64_t all = check_int(0, 5), sparse = check_int(0, 1);
    for (int64_t r = 0; r < queries; r++) {
        const int64_t style = all < 2 ? all : check_int(0, 7);
        for (int64_t n = 0; n < words; n++) {
            const uint64_t x = check_random();
            bits[r * words + n] = style < 2 ? 0u - (uint32_t)style
                                  : sparse  ? (uint32_t)(x & x >> 32)
                                            : (uint32_t)x;
        }
    }
}

static void *shrunk(void *memory, int64_t bytes)
{
    void *exact = realloc(memory, bytes ? (size_t)bytes : 1); /* the sanitizer sees its end */
    check(exact, "no memory");
    return exact;
}

void mask_fill_partial(problem *x, float share)
{
    if (!x->mask.bits)
        mask_fill(x, 1.1f);
    sparge_mask *m = &x->mask;
    const int64_t lines = m->batch * m->heads * m->q_blocks, most = lines * m->k_blocks,
                  words = blocks(x->o.block_k, 32), size = x->o.block_q * words * 4;
    int64_t n = 0;
    m->partial_first = shrunk(m->partial_first, (lines + 1) * 8);
    m->partial_block = shrunk(m->partial_block, most * 4);
    m->partial_bits = shrunk(m->partial_bits, most * size);
    for (int64_t line = 0; line < lines; line++) {
        m->partial_first[line] = n;
        for (int64_t j = 0; j < m->k_blocks; j++)
            if (m->bits[line * m->words + j / 32] >> j % 32 & 1 && check_uniform(0, 1) < share) {
                m->partial_block[n] = (int32_t)j;
                bits_at_random(m->partial_bits + n++ * size / 4, x->o.block_q, words);
            }
    }
    m->partial_first[lines] = n;
    m->partial_block = shrunk(m->partial_block, n * 4);
    m->partial_bits = shrunk(m->partial_bits, n * size);
}

bool pair_open(const problem *x, int64_t b, int64_t h, int64_t query, int64_t key)
{
    const sparge_mask *m = &x->mask;
    const int64_t i = query / x->o.block_q, j = key / x->o.block_k,
                  line = (b * x->p.heads + h) * blocks(x->p.q_len, x->o.block_q) + i,
                  kv = b * x->p.kv_heads + h / (x->p.heads / x->p.kv_heads),
                  words = blocks(x->o.block_k, 32), r = query % x->o.block_q,
                  t = key % x->o.block_k;
    bool open = mask_has(x, b, h, i, j) &&
                !(x->p.k_bias && x->p.k_bias[kv * x->p.k_len + key] == -INFINITY);
    for (int64_t n = m->partial_first ? m->partial_first[line] : 0;
         m->partial_first && n < m->partial_first[line + 1]; n++)
        if (m->partial_block[n] == j)
            open &= m->partial_bits[(n * x->o.block_q + r) * words + t / 32] >> t % 32 & 1;
    return open;
}

void bias_fill(problem *x, bool wild)
{
    static const float odd[] = {NAN,    INFINITY, FLT_MAX,   -FLT_MAX, 3e37f,
                                -3e38f, 1e20f,    0x1p-149f, -0.0f,    -1e4f};
    const int64_t count = x->p.batch * x->p.kv_heads * x->p.k_len;
    check_free(x->k_bias);
    x->k_bias = check_alloc((size_t)count * sizeof *x->k_bias);
    x->p.k_bias = x->k_bias;
    for (int64_t n = 0, hidden = 0; n < count; n++, hidden--) {
        if (check_int(0, 60) == 0)
            hidden = check_int(1, 3 * x->o.block_k);
        x->k_bias[n] = hidden > 0 || check_int(0, 9) == 0 ? -INFINITY
                       : wild && check_int(0, 5) == 0     ? odd[check_int(0, 9)]
                                                          : check_uniform(-4, 4);
    }
}

/* ---- Answers ---- */

static void *array(int64_t count, size_t size) { return check_alloc((size_t)count * size); }

answer answer_make(const problem *x, sparge_dtype dtype, tensor_layout layout)
{
    const sparge_problem *p = &x->p;
    const int64_t q_heads = p->batch * p->heads, kv_heads = p->batch * p->kv_heads;
    const int64_t q_blocks = blocks(p->q_len, x->o.block_q),
                  k_blocks = blocks(p->k_len, x->o.block_k);
    return (answer){
        .o = tensor_make(p->batch, p->heads, p->q_len, p->dim_v, dtype, layout),
        .lse = array(q_heads * p->q_len, 4),
        .head = array(q_heads, sizeof(sparge_counts)),
        .intermediates =
            {
                .k_mean = array(kv_heads * p->dim, 4),
                .q_pool = array(q_heads * q_blocks * p->dim, 4),
                .k_pool = array(kv_heads * k_blocks * p->dim, 4),
                .q_sim = array(q_heads * q_blocks, 4),
                .k_sim = array(kv_heads * k_blocks, 4),
                .s_all = array(q_heads * q_blocks * k_blocks, 4),
                .s = array(q_heads * q_blocks * k_blocks, 4),
                .why = array(q_heads * q_blocks * k_blocks, 1),
                .q_int = array(q_heads * p->q_len * p->dim, 2),
                .k_int = array(kv_heads * p->k_len * p->dim, 2),
                .v_int = array(kv_heads * p->k_len * p->dim_v, 2),
                .q_scale = array(q_heads * q_blocks, 4),
                .k_scale = array(kv_heads * k_blocks, 4),
                .v_scale = array(kv_heads * k_blocks * p->dim_v, 4),
                .pv_done = array(q_heads * q_blocks * k_blocks, 4),
                .m = array(q_heads * p->q_len, 4),
                .l = array(q_heads * p->q_len, 4),
            },
    };
}

void answer_free(answer *a)
{
    sparge_intermediates *t = &a->intermediates;
    void *const arrays[] = {a->lse,     a->head,    t->k_mean, t->q_pool,  t->k_pool,
                            t->q_sim,   t->k_sim,   t->s_all,  t->s,       t->why,
                            t->q_int,   t->k_int,   t->v_int,  t->q_scale, t->k_scale,
                            t->v_scale, t->pv_done, t->m,      t->l};
    for (size_t n = 0; n < sizeof arrays / sizeof *arrays; n++)
        check_free(arrays[n]);
    tensor_free(&a->o);
}

typedef struct snapshot {
    const tensor *t;
    void *copy;
} snapshot;

static snapshot snapshot_take(const tensor *t)
{
    return (snapshot){t, memcpy(check_alloc(t->bytes), t->memory, t->bytes)};
}

static void snapshot_check(snapshot s, const char *name)
{
    check(!memcmp(s.copy, s.t->memory, s.t->bytes), "%s was written to", name);
    check_free(s.copy);
}

/* The first of n floats that still is poison, or -1. */
static int64_t unwritten(const float *x, int64_t n)
{
    static const unsigned char poison[] = {0xFF, 0xFF, 0xFF, 0xFF};
    for (int64_t e = 0; e < n; e++)
        if (!memcmp(&x[e], poison, sizeof poison))
            return e;
    return -1;
}

/* ---- Device memory ---- */

enum { MARGIN = 256 }; /* bytes of guard before and after; keeps the device's alignment */

static void device_copy(void *to, const void *from, size_t bytes)
{
    sparge_error error;
    check(sparge_device_copy(to, from, (int64_t)bytes, &error) == SPARGE_OK, "%s", error.text);
}

/* The bytes of a twin with its guards, in host memory. */
static char *guarded(const void *host, size_t bytes)
{
    char *all = malloc(bytes + 2 * MARGIN);
    check(all, "no memory");
    memset(all, 0x7F, bytes + 2 * MARGIN);
    if (host)
        memcpy(all + MARGIN, host, bytes);
    return all;
}

void *twin_of(twins *t, void *host, size_t bytes)
{
    sparge_error error;
    void *device;
    check(t->count < (int)(sizeof t->of / sizeof *t->of), "too many twins");
    check(sparge_device_alloc((int64_t)(bytes + 2 * MARGIN), &device, &error) == SPARGE_OK, "%s",
          error.text);
    t->of[t->count].host = host;
    t->of[t->count].device = device;
    t->of[t->count++].bytes = bytes;
    char *all = guarded(host, bytes);
    device_copy(device, all, bytes + 2 * MARGIN);
    free(all);
    return (char *)device + MARGIN;
}

void *twin(twins *t, void *buffer)
{
    return buffer ? twin_of(t, buffer, check_size(buffer)) : NULL;
}

void twins_send(const twins *t)
{
    for (int n = 0; n < t->count; n++)
        device_copy((char *)t->of[n].device + MARGIN, t->of[n].host, t->of[n].bytes);
}

void twins_fetch(const twins *t)
{
    for (int n = 0; n < t->count; n++) {
        const size_t bytes = t->of[n].bytes;
        char *all = guarded(NULL, bytes);
        device_copy(all, t->of[n].device, bytes + 2 * MARGIN);
        bool whole = true;
        for (size_t i = 0; i < MARGIN; i++)
            whole &= all[i] == 0x7F && all[MARGIN + bytes + i] == 0x7F;
        memcpy(t->of[n].host, all + MARGIN, bytes);
        free(all);
        check(whole, "a write beside device buffer %d, of %zu bytes", n, bytes);
    }
}

void twins_free(twins *t)
{
    while (t->count)
        sparge_device_free(t->of[--t->count].device);
}

static const void *twin_view(twins *t, const tensor *x)
{
    return (char *)twin(t, x->memory) + (x->first - x->memory);
}

sparge_problem twin_problem(twins *t, const problem *x)
{
    sparge_problem p = x->p;
    p.q.data = twin_view(t, &x->q);
    p.k.data = twin_view(t, &x->k);
    p.v.data = twin_view(t, &x->v);
    p.k_bias = twin(t, x->k_bias);
    return p;
}

sparge_out twin_out(twins *t, const tensor *o)
{
    sparge_out out = tensor_out(o);
    out.data = (char *)twin(t, o->memory) + (o->first - o->memory);
    return out;
}

sparge_mask twin_mask(twins *t, const sparge_mask *mask)
{
    sparge_mask m = *mask;
    m.bits =
        twin_of(t, mask->bits, (size_t)(m.batch * m.heads * m.q_blocks * m.words) * sizeof *m.bits);
    if (m.partial_first) { /* blocks are 128 x 64 */
        const size_t lines = (size_t)(m.batch * m.heads * m.q_blocks),
                     parts = (size_t)m.partial_first[lines];
        m.partial_first = twin_of(t, m.partial_first, (lines + 1) * sizeof *m.partial_first);
        m.partial_block = twin_of(t, m.partial_block, parts * sizeof *m.partial_block);
        m.partial_bits = twin_of(t, m.partial_bits, parts * 128 * 2 * sizeof *m.partial_bits);
    }
    return m;
}

sparge_intermediates twin_trace(twins *t, const sparge_intermediates *x)
{
    return (sparge_intermediates){
        .k_mean = twin(t, x->k_mean),
        .q_pool = twin(t, x->q_pool),
        .k_pool = twin(t, x->k_pool),
        .q_sim = twin(t, x->q_sim),
        .k_sim = twin(t, x->k_sim),
        .s_all = twin(t, x->s_all),
        .s = twin(t, x->s),
        .why = twin(t, x->why),
        .q_int = twin(t, x->q_int),
        .k_int = twin(t, x->k_int),
        .v_int = twin(t, x->v_int),
        .q_scale = twin(t, x->q_scale),
        .k_scale = twin(t, x->k_scale),
        .v_scale = twin(t, x->v_scale),
        .pv_done = twin(t, x->pv_done),
        .m = twin(t, x->m),
        .l = twin(t, x->l),
    };
}

/* ---- Calls ---- */

static sparge_status call(const sparge_problem *p, const sparge_options *o, bool predict,
                          const sparge_mask *given, sparge_result *result, sparge_error *error)
{
    return predict ? sparge_attention(p, o, result, error)
                   : sparge_attend(p, o, given->bits ? given : NULL, result, error);
}

/* The same on the device. */
static sparge_status call_there(const problem *x, bool predict, sparge_mask *mask, answer *a,
                                sparge_error *error)
{
    twins t = {.count = 0};
    const sparge_problem p = twin_problem(&t, x);
    const sparge_intermediates intermediates = twin_trace(&t, &a->intermediates);
    sparge_mask given = {0}, predicted = {0};
    if (!predict && x->mask.bits)
        given = twin_mask(&t, &x->mask);
    if (mask)
        predicted = twin_mask(&t, mask);
    sparge_result r = {.o = twin_out(&t, &a->o),
                       .lse = twin(&t, a->lse),
                       .mask = mask ? &predicted : NULL,
                       .intermediates = &intermediates,
                       .head_counts = twin(&t, a->head)};
    const sparge_status status = call(&p, &x->o, predict, &given, &r, error);
    if (status == SPARGE_OK)
        twins_fetch(&t);
    twins_free(&t);
    check(r.intermediates == &intermediates && r.mask == (mask ? &predicted : NULL),
          "the result's own pointers changed");
    r.o = a->result.o;
    r.lse = a->result.lse;
    r.mask = a->result.mask;
    r.intermediates = a->result.intermediates;
    r.head_counts = a->result.head_counts;
    a->result = r;
    return status;
}

static answer ask(const problem *x, sparge_dtype dtype, tensor_layout layout, bool predict,
                  sparge_mask *mask)
{
    answer a = answer_make(x, dtype, layout);
    a.result = (sparge_result){.o = tensor_out(&a.o),
                               .lse = a.lse,
                               .mask = mask,
                               .intermediates = &a.intermediates,
                               .head_counts = a.head};
    const snapshot q = snapshot_take(&x->q), k = snapshot_take(&x->k), v = snapshot_take(&x->v);
    sparge_error error = {"poison"};
    const sparge_status status = x->o.backend == SPARGE_CUDA
                                     ? call_there(x, predict, mask, &a, &error)
                                     : call(&x->p, &x->o, predict, &x->mask, &a.result, &error);
    check(status == SPARGE_OK, "%s", error.text);
    check(error.text[0] == '\0', "text after success: %s", error.text);
    snapshot_check(q, "q");
    snapshot_check(k, "k");
    snapshot_check(v, "v");
    const int64_t wrong = badly_written(&a.o), rows = problem_rows(x);
    check(wrong < 0, "element %lld of the memory of o was %s", (long long)wrong,
          a.o.used[wrong < 0 ? 0 : wrong] ? "not written" : "written, which lies between rows");
    check(unwritten(a.lse, rows) < 0, "lse[%lld] was not written",
          (long long)unwritten(a.lse, rows));
    check(unwritten(a.intermediates.m, rows) < 0 && unwritten(a.intermediates.l, rows) < 0,
          "m or l was not written");
    tensor_read(&a.o);
    return a;
}

answer attend_to(const problem *x, sparge_dtype dtype, tensor_layout layout)
{
    return ask(x, dtype, layout, false, NULL);
}

answer attend(const problem *x) { return ask(x, SPARGE_F32, PACKED, false, NULL); }

answer attention(const problem *x, sparge_mask *mask)
{
    return ask(x, SPARGE_F32, PACKED, true, mask);
}

answer attention_to(const problem *x, sparge_mask *mask, sparge_dtype dtype, tensor_layout layout)
{
    return ask(x, dtype, layout, true, mask);
}

void same_answer(const answer *got, const answer *want)
{
    check_same_as("o", got->o.x, want->o.x, tensor_count(&want->o));
    check_same_as("lse", got->lse, want->lse, want->o.batch * want->o.heads * want->o.tokens);
}

void same_counts(const sparge_counts *got, const sparge_counts *want)
{
    check_equal(got->pairs, want->pairs);
    check_equal(got->qk_done, want->qk_done);
    check_equal(got->pv_done, want->pv_done);
    check_equal(got->tokens, want->tokens);
    check_equal(got->tile_tokens, want->tile_tokens);
    check_equal(got->qk_tokens, want->qk_tokens);
    check_equal(got->pv_tokens, want->pv_tokens);
}

void same_traces(const problem *x, const answer *got, const answer *want, bool with_l)
{
    const sparge_problem *p = &x->p;
    const sparge_intermediates *a = &got->intermediates, *b = &want->intermediates;
    const int64_t heads = p->batch * p->heads, kv = p->batch * p->kv_heads;
    const int64_t lines = heads * blocks(p->q_len, x->o.block_q),
                  columns = blocks(p->k_len, x->o.block_k);
    check_same(a->k_mean, b->k_mean, kv * p->dim);
    check_same(a->q_pool, b->q_pool, lines * p->dim);
    check_same(a->k_pool, b->k_pool, kv * columns * p->dim);
    check_same(a->q_sim, b->q_sim, lines);
    check_same(a->k_sim, b->k_sim, kv * columns);
    check_same(a->s_all, b->s_all, lines * columns);
    check_same(a->s, b->s, lines * columns);
    check_same(a->why, b->why, lines * columns);
    check_same(a->q_int, b->q_int, heads * p->q_len * p->dim);
    check_same(a->k_int, b->k_int, kv * p->k_len * p->dim);
    check_same(a->v_int, b->v_int, kv * p->k_len * p->dim_v);
    check_same(a->q_scale, b->q_scale, lines);
    check_same(a->k_scale, b->k_scale, kv * columns);
    check_same(a->v_scale, b->v_scale, kv * columns * p->dim_v);
    check_same(a->pv_done, b->pv_done, lines * columns);
    check_same(a->m, b->m, heads * p->q_len);
    if (with_l)
        check_same(a->l, b->l, heads * p->q_len);
}

/* ---- At random ---- */

void poke(tensor *t)
{
    const float special[] = {INFINITY, -INFINITY, NAN};
    for (int64_t n = check_int(1, 3); n > 0 && tensor_count(t); n--)
        t->x[check_int(0, tensor_count(t) - 1)] = special[check_int(0, 2)];
}

void zero_some(tensor *t)
{
    const int64_t from = check_int(0, tensor_count(t)), end = check_int(from, tensor_count(t));
    for (int64_t n = from; n < end; n++)
        t->x[n] = 0.0f;
}

sparge_thresholds thresholds_at_random(void)
{
    static const float share[] = {0.0f, 0.1f, 0.5f, 0.7f, 0.95f, 1.0f};
    static const float lambda[] = {-INFINITY, -INFINITY, 0.0f, -0.5f, -2.0f, -6.0f};
    const int which = (int)check_int(1, 3);
    return (sparge_thresholds){.theta = check_int(0, 1) ? -1.0f : check_uniform(0.0f, 0.7f),
                               .tau = which & 1 ? share[check_int(0, 5)] : SPARGE_OFF,
                               .topk = which & 2 ? share[check_int(0, 5)] : SPARGE_OFF,
                               .lambda = lambda[check_int(0, 5)]};
}

static void min_mass_at_random(sparge_thresholds *t)
{
    static const float least[] = {0.0f, 0x1p-149f, 0.2f, 0.9f, 1.0f, 2.5f, FLT_MAX};
    t->min_mass = least[check_int(0, 6)];
    if (t->min_mass > 0.0f && check_int(0, 1))
        t->tau = t->topk = SPARGE_OFF;
}

void masses_at_random(problem *x, sparge_thresholds each[6], int64_t longest)
{
    const int64_t cell = check_int(1, check_int(0, 1) ? 8 : longest);
    x->o.cell = cell;
    x->o.block_q = cell * check_int(1, longest / cell);
    x->o.block_k = cell * check_int(1, longest / cell < 64 ? longest / cell : 64);
    if (check_int(0, 3) == 0)
        x->o.cell = 0;
    min_mass_at_random(&x->o.thresholds);
    for (int h = 0; h < 6; h++)
        min_mass_at_random(&each[h]);
}

const sparge_dtype precisions[5] = {SPARGE_INT8, SPARGE_INT12, SPARGE_F32, SPARGE_F16, SPARGE_FP8};

sparge_dtype dtype_at_random(void) { return (sparge_dtype)check_int(SPARGE_F32, SPARGE_BF16); }
tensor_layout layout_at_random(void) { return (tensor_layout)check_int(PACKED, LAYOUTS - 1); }

void vary(problem *x, sparge_thresholds each[6])
{
    x->o.smooth_k = check_int(0, 3) != 0;
    x->o.sink = check_int(0, 2) == 0;
    x->o.softmax_scale = check_int(0, 1) ? 0.0f : check_uniform(0.01f, 0.6f);
    x->o.thresholds = thresholds_at_random();
    for (int h = 0; h < 6; h++)
        each[h] = thresholds_at_random();
    if (check_int(0, 2) == 0)
        x->o.per_head = each;
    tensor *const tensors[] = {&x->q, &x->k, &x->v};
    for (int t = 0; t < 3; t++) {
        if (check_int(0, 7) == 0)
            poke(tensors[t]);
        if (check_int(0, 9) == 0)
            zero_some(tensors[t]);
    }
    problem_write(x);
}

void mask_at_random(problem *x)
{
    mask_fill(x, check_uniform(0.2f, 0.9f));
    if (check_int(0, 2) == 0)
        for (int64_t line = 0; line < x->p.batch * x->p.heads * x->mask.q_blocks; line += 2)
            memset(x->mask.bits + line * x->mask.words, 0,
                   (size_t)x->mask.words * sizeof *x->mask.bits);
}
