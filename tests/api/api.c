/* SPDX-License-Identifier: Apache-2.0 */
/* api.c: the front door: what is refused and with which words, defaults, names, masks, counts,
 * failing allocations, threads. What the answers are is tested elsewhere.
 *
 * Linked with -Wl,--wrap=malloc,--wrap=calloc,--wrap=free against a static library. */
#include "sparge_cuda.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cpu/cpu.h"
#include "tests/support/heap.h"
#include "tests/support/problem.h"

TestSuite(api);

/* Lets an allocation that is too large return NULL under the sanitizers too. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

/* ---- The entries, and a question that all of them accept ------------------------------------- */

enum { ALLOC = 1, PREDICT = 2, ATTEND = 4, ATTENTION = 8, ORACLE = 16, BASELINE = 32 };
enum {
    STAGES = PREDICT | ATTEND | ATTENTION,
    JUDGES = ORACLE | BASELINE,
    ALL = ALLOC | STAGES | JUDGES
};

static const char *entry_name(int entry)
{
    return entry == ALLOC       ? "mask_alloc"
           : entry == PREDICT   ? "predict"
           : entry == ATTEND    ? "attend"
           : entry == ATTENTION ? "attention"
           : entry == ORACLE    ? "oracle"
                                : "baseline";
}

/* 2 batches, 4 heads on 2; 3 x 3 blocks of 4 x 4 with short last ones. */
enum {
    BATCH = 2,
    HEADS = 4,
    Q_LEN = 10,
    K_LEN = 11,
    DIM = 8,
    DIM_V = 5,
    Q_BLOCKS = 3,
    K_BLOCKS = 3
};
enum { ROWS = BATCH * HEADS * Q_LEN, LINES = BATCH * HEADS * Q_BLOCKS };

typedef struct asked {
    const sparge_problem *problem; /* &p, or NULL */
    const sparge_options *options; /* &o, or NULL */
    sparge_problem p;
    sparge_options o;
    sparge_mask *mask; /* &m, or NULL */
    sparge_mask m;
    bool no_result;
    sparge_result result;
    sparge_oracle_mode mode;
    double *oracle_o;
} asked;

/* Everything that an answer is written to; all of it poisoned before. */
typedef struct outputs {
    float o[ROWS * DIM_V], lse[ROWS];
    uint32_t bits[LINES];
    sparge_counts head[BATCH * HEADS];
    double oracle_o[ROWS * DIM_V], oracle_lse[ROWS], mass[LINES * K_BLOCKS];
} outputs;

static outputs out;
static problem sound;

static asked question(void)
{
    if (!sound.q.memory) {
        const shape s = shape_of(BATCH, HEADS, HEADS / 2, Q_LEN, K_LEN, DIM, DIM_V);
        sound = problem_make(&s);
        sound.o = sparge_options_default(SPARGE_RULES_DEFAULT);
        sound.o.backend = SPARGE_REF;
        sound.o.block_q = sound.o.block_k = 4;
    }
    memset(&out, 0xFF, sizeof out);
    return (asked){
        .p = sound.p,
        .o = sound.o,
        .m = {.bits = out.bits,
              .batch = BATCH,
              .heads = HEADS,
              .q_blocks = Q_BLOCKS,
              .k_blocks = K_BLOCKS,
              .words = 1},
        .result = {.o = {out.o, SPARGE_F32, HEADS * Q_LEN * DIM_V, Q_LEN * DIM_V, DIM_V},
                   .lse = out.lse,
                   .head_counts = out.head},
        .mode = SPARGE_ORACLE_REAL,
        .oracle_o = out.oracle_o,
    };
}

/* The pointers go in at the last moment, as the structure may have moved. */
static void point(asked *a)
{
    a->problem = &a->p;
    a->options = &a->o;
    a->mask = &a->m;
}

static sparge_status call(int entry, asked *a, sparge_error *error)
{
    sparge_mask fresh;
    sparge_status status = SPARGE_OK;
    sparge_result *result = a->no_result ? NULL : &a->result;
    switch (entry) {
    case ALLOC:
        status = sparge_mask_alloc(a->mask ? &fresh : NULL, a->problem, a->options, error);
        if (a->mask)
            sparge_mask_free(&fresh);
        break;
    case PREDICT: status = sparge_predict(a->problem, a->options, a->mask, NULL, error); break;
    case ATTEND: status = sparge_attend(a->problem, a->options, a->mask, result, error); break;
    case ATTENTION:
        a->result.mask = a->mask;
        status = sparge_attention(a->problem, a->options, result, error);
        break;
    case ORACLE:
        status = sparge_oracle(a->problem, a->options, a->mask, a->mode, a->oracle_o,
                               out.oracle_lse, out.mass, error);
        break;
    case BASELINE:
        status = sparge_baseline(a->problem, a->options, a->mask, a->result.o.dtype,
                                 a->result.o.data, a->result.lse, error);
        break;
    default: break;
    }
    return status;
}

/* Each of these entries refuses it with this status and a sentence that begins so, with and without
 * anyone to read it, and writes nothing. */
static void refused_as_it_stands(int entries, asked *a, sparge_status status, const char *sentence)
{
    outputs untouched;
    memset(&untouched, 0xFF, sizeof untouched);
    for (int entry = 1; entry <= BASELINE; entry *= 2) {
        if (!(entries & entry))
            continue;
        check_case("%s, refused by %s", sentence, entry_name(entry));
        sparge_error error;
        memset(&error, 'x', sizeof error);
        const sparge_status got = call(entry, a, &error);
        check(memchr(error.text, '\0', sizeof error.text), "the sentence has no end");
        check(got == status && error.text[0], "%s (%s)", sparge_status_string(got), error.text);
        check(!strncmp(error.text, sentence, strlen(sentence)), "it says \"%s\"", error.text);
        check(!strchr(error.text, '\n'), "it says \"%s\"", error.text);
        check(call(entry, a, NULL) == status, "without an error to fill in");
        check(!memcmp(&out, &untouched, sizeof out), "outputs were written");
    }
}

static void refused(int entries, asked a, sparge_status status, const char *sentence)
{
    point(&a);
    refused_as_it_stands(entries, &a, status, sentence);
}

static void accepted(int entries, asked a, const char *what)
{
    point(&a);
    for (int entry = 1; entry <= BASELINE; entry *= 2) {
        if (!(entries & entry))
            continue;
        check_case("%s, accepted by %s", what, entry_name(entry));
        memset(out.bits, 0xFF, sizeof out.bits);
        sparge_error error = {"poison"};
        errno = 77;
        const sparge_status status = call(entry, &a, &error);
        check(status == SPARGE_OK, "%s: %s", sparge_status_string(status), error.text);
        check(error.text[0] == '\0', "text after success: %s", error.text);
        check(errno == 77, "errno became %d", errno);
        check(call(entry, &a, NULL) == SPARGE_OK, "without an error to fill in");
    }
}

/* ---- What is refused ------------------------------------------------------------------------- */

Test(api, a_sound_question_is_accepted) { accepted(ALL, question(), "as it is"); }

Test(api, null_arguments)
{
    const sparge_status status = SPARGE_ERR_ARGUMENT;
    asked a = question();
    point(&a);
    a.problem = NULL;
    refused_as_it_stands(ALL, &a, status, "problem is NULL");
    a.options = NULL;
    refused_as_it_stands(ALL, &a, status, "problem is NULL");
    point(&a);
    a.options = NULL;
    refused_as_it_stands(ALL, &a, status, "options is NULL");
    point(&a);
    a.mask = NULL;
    refused_as_it_stands(ALLOC | PREDICT, &a, status, "mask is NULL");
    a = question();
    a.no_result = true;
    refused(ATTEND | ATTENTION, a, status, "result is NULL");
    a = question();
    a.m.bits = NULL;
    refused(STAGES, a, status, "mask.bits is NULL");
    a = question();
    a.p.q.data = NULL;
    refused(ALL, a, status, "q.data is NULL");
    a = question();
    a.p.k.data = NULL;
    refused(ALL, a, status, "k.data is NULL");
    a = question();
    a.p.v.data = NULL;
    refused(ATTEND | JUDGES, a, status, "v.data is NULL");
    accepted(ALLOC | PREDICT, a, "no v");
    a = question();
    a.result.o.data = NULL;
    refused(ATTEND, a, status, "result.o.data is NULL");
    refused(BASELINE, a, status, "o is NULL");
}

/* Found before any work is done: no half of an answer stands in the caller's mask. */
Test(api, attention_checks_everything_before_it_predicts)
{
    asked a = question();
    a.result.o.data = NULL;
    refused(ATTENTION, a, SPARGE_ERR_ARGUMENT, "result.o.data is NULL");
    a = question();
    a.result.o.dtype = SPARGE_FP8;
    refused(ATTENTION, a, SPARGE_ERR_ARGUMENT, "result.o.dtype is 3");
    a = question();
    a.p.v.data = NULL;
    refused(ATTENTION, a, SPARGE_ERR_ARGUMENT, "v.data is NULL");
    a = question();
    a.p.v.dtype = SPARGE_FP8;
    refused(ATTENTION, a, SPARGE_ERR_ARGUMENT, "v.dtype is 3");
    a = question();
    a.p.dim_v = 0;
    refused(ATTENTION, a, SPARGE_ERR_ARGUMENT, "dim_v is 0");
}

Test(api, oracle_refuses_a_mask_without_bits)
{
    asked a = question();
    a.m.bits = NULL;
    refused(JUDGES, a, SPARGE_ERR_ARGUMENT, "mask.bits is NULL");
}

Test(api, oracle_refuses_an_unknown_mode)
{
    asked a = question();
    a.mode = (sparge_oracle_mode)2;
    refused(ORACLE, a, SPARGE_ERR_ARGUMENT, "mode is 2");
    a.mode = SPARGE_ORACLE_CODES;
    accepted(ORACLE, a, "codes");
}

/* Without o it reads no v, and its channels are nobody's business. */
Test(api, oracle_without_o_ignores_v)
{
    const int64_t dim_v[] = {0, -1, -DIM, -1000, INT64_MAX, INT64_MIN};
    asked a = question();
    double want[ROWS];
    a.p.v.data = NULL;
    a.p.v.dtype = SPARGE_FP8;
    a.oracle_o = NULL;
    accepted(ORACLE, a, "no v");
    memcpy(want, out.oracle_lse, sizeof want);
    for (int64_t n = 0; n < COUNT(dim_v); n++) {
        memset(out.oracle_lse, 0xFF, sizeof out.oracle_lse);
        a.p.dim_v = dim_v[n];
        accepted(ORACLE, a, check_text("dim_v %lld", (long long)dim_v[n]));
        check_same(out.oracle_lse, want, ROWS);
    }
}

/* A NULL view of nothing is fine. */
Test(api, null_data_of_an_empty_view)
{
    asked a = question();
    a.p.k_len = 0;
    a.p.k.data = a.p.v.data = NULL;
    a.m.k_blocks = a.m.words = 0;
    accepted(ALL, a, "no keys");
    a.p.q_len = 0;
    a.p.q.data = a.result.o.data = NULL;
    a.m.q_blocks = 0;
    accepted(ALL, a, "no keys, no queries");
    a = question();
    a.p.batch = 0;
    a.p.q.data = a.p.k.data = a.p.v.data = a.result.o.data = NULL;
    a.m.batch = 0;
    accepted(ALL, a, "no batch");
}

Test(api, sizes_out_of_range)
{
    static const struct {
        const char *sentence;
        size_t at;
        int64_t value;
        int entries;
    } table[] = {
        {"batch is -1, it must be at least 0", offsetof(sparge_problem, batch), -1, ALL},
        {"heads is 0, it must be at least 1", offsetof(sparge_problem, heads), 0, ALL},
        {"heads is -4", offsetof(sparge_problem, heads), -4, ALL},
        {"kv_heads is 0, it must be at least 1", offsetof(sparge_problem, kv_heads), 0, ALL},
        {"kv_heads is -2", offsetof(sparge_problem, kv_heads), -2, ALL},
        {"q_len is -1, it must be at least 0", offsetof(sparge_problem, q_len), -1, ALL},
        {"q_len is 9223372036854775807, it must be ", offsetof(sparge_problem, q_len), INT64_MAX,
         ALL},
        {"k_len is -1, it must be at least 0", offsetof(sparge_problem, k_len), -1, ALL},
        {"k_len is 9223372036854775807, it must be ", offsetof(sparge_problem, k_len), INT64_MAX,
         ALL},
        {"dim is 0, it must be at least 1", offsetof(sparge_problem, dim), 0, ALL},
        {"dim is -8", offsetof(sparge_problem, dim), -8, ALL},
        {"dim is 257, it must be at most 256", offsetof(sparge_problem, dim), 257, ALL},
        {"dim_v is 0, it must be at least 1", offsetof(sparge_problem, dim_v), 0, ATTEND | JUDGES},
        {"dim_v is -1", offsetof(sparge_problem, dim_v), -1, ATTEND | JUDGES},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        asked a = question();
        memcpy((char *)&a.p + table[n].at, &table[n].value, sizeof table[n].value);
        refused(table[n].entries, a, SPARGE_ERR_ARGUMENT, table[n].sentence);
    }
    asked a = question();
    a.p.dim_v = -1000;
    accepted(ALLOC | PREDICT, a, "dim_v is nothing to stage 1");
}

Test(api, heads_that_do_not_divide)
{
    const struct {
        int64_t heads, kv_heads;
        const char *sentence;
    } table[] = {
        {4, 3, "heads is 4, it must be a multiple of kv_heads, 3"},
        {1, 2, "heads is 1, it must be a multiple of kv_heads, 2"},
        {7, 2, "heads is 7, it must be a multiple of kv_heads, 2"},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        asked a = question();
        a.p.heads = table[n].heads;
        a.p.kv_heads = table[n].kv_heads;
        refused(ALL, a, SPARGE_ERR_SHAPE, table[n].sentence);
    }
}

Test(api, types_out_of_range)
{
    asked a = question();
    a.p.q.dtype = SPARGE_FP8;
    refused(ALL, a, SPARGE_ERR_ARGUMENT, "q.dtype is 3");
    a = question();
    a.p.k.dtype = (sparge_dtype)17;
    refused(ALL, a, SPARGE_ERR_ARGUMENT, "k.dtype is 17");
    a = question();
    a.p.v.dtype = (sparge_dtype)-1;
    refused(ATTEND | JUDGES, a, SPARGE_ERR_ARGUMENT, "v.dtype is -1");
    a = question();
    a.result.o.dtype = SPARGE_FP8;
    refused(ATTEND, a, SPARGE_ERR_ARGUMENT, "result.o.dtype is 3");
}

/* Sizes whose products do not fit, whichever factor is the last straw. */
Test(api, sizes_that_overflow)
{
    const struct {
        int64_t batch, heads, kv_heads, q_len, k_len;
    } table[] = {
        {INT64_C(1) << 40, 4, 2, INT64_C(1) << 20, 11},
        {2, 4, 2, INT64_C(1) << 58, 11},
        {2, 4, 2, 10, INT64_C(1) << 59},
        {2, INT64_C(1) << 60, 2, 10, 11},
        {2, INT64_C(1) << 56, INT64_C(1) << 56, 1, 11},
        {INT64_MAX, 4, 2, 1, 1},
        {1, 1, 1, INT64_C(1) << 58, 11}, /* 2^61 elements: too many bytes */
        {1, 1, 1, 10, INT64_C(1) << 58},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        asked a = question();
        a.p.batch = table[n].batch;
        a.p.heads = table[n].heads;
        a.p.kv_heads = table[n].kv_heads;
        a.p.q_len = table[n].q_len;
        a.p.k_len = table[n].k_len;
        refused(ALL, a, SPARGE_ERR_SHAPE,
                check_text("batch %lld x heads %lld", (long long)table[n].batch,
                           (long long)table[n].heads));
    }
    asked a = question();
    a.p.dim_v = INT64_MAX / 4;
    refused(ATTEND | JUDGES, a, SPARGE_ERR_SHAPE, "batch 2 x heads 4");
    a = question(); /* each tensor fits, the mask of one-token blocks does not */
    a.p.batch = a.p.heads = a.p.kv_heads = a.p.dim = a.o.block_q = a.o.block_k = 1;
    a.p.q_len = a.p.k_len = INT64_C(1) << 58;
    refused(ALLOC, a, SPARGE_ERR_SHAPE, "mask of 288230376151711744 x 288230376151711744 blocks");
}

/* Nothing to do in one direction, more than there can be in another: any answer but a crash. */
Test(api, empty_problems_of_huge_sizes)
{
    const struct {
        int64_t batch, q_len, k_len, dim_v;
    } table[] = {
        {0, INT64_MAX / 4, INT64_MAX / 4, 5},
        {0, 10, INT64_MAX / 4, 5},
        {0, 10, INT64_MAX / 256, 5},
        {0, 10, 11, INT64_MAX},
        {2, 0, 0, INT64_MAX},
        {2, 0, 0, INT64_MAX / 128},
    };
    for (int64_t n = 0; n < COUNT(table); n++)
        for (int block = 1; block <= 1024; block *= 32)
            for (int entry = 1; entry <= BASELINE; entry *= 2) {
                check_case("huge %lld, blocks of %d, %s", (long long)n, block, entry_name(entry));
                asked a = question();
                a.p.batch = a.m.batch = table[n].batch;
                a.p.q_len = table[n].q_len;
                a.p.k_len = table[n].k_len;
                a.p.dim = 256;
                a.p.dim_v = table[n].dim_v;
                a.o.block_q = a.o.block_k = block;
                a.o.softmax_scale = 1;
                a.m.q_blocks = blocks(a.p.q_len, block);
                a.m.k_blocks = blocks(a.p.k_len, block);
                a.m.words = blocks(a.m.k_blocks, 32);
                point(&a);
                sparge_error error = {"poison"};
                const sparge_status status = call(entry, &a, &error);
                check(!status == !error.text[0], "status %d, \"%s\"", (int)status, error.text);
            }
}

/* A caller that was compiled with the sparge.h of another version is told so by its first call, and
 * nothing is written beyond its struct. */
Test(api, options_of_another_version)
{
    cr_expect_eq(sparge_version(), SPARGE_VERSION_NUMBER);
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", SPARGE_VERSION_NUMBER / 10000,
             SPARGE_VERSION_NUMBER / 100 % 100, SPARGE_VERSION_NUMBER % 100);
    cr_expect_str_eq(text, SPARGE_VERSION);
    const int now = SPARGE_VERSION_NUMBER;
    const struct {
        size_t size;
        int version;
        const char *sentence; /* NULL: accepted */
    } table[] = {
        {sizeof(sparge_options), now, NULL},
        {sizeof(sparge_options), now + 1, NULL},
        {sizeof(sparge_options), now + 100,
         "options.version is 200 (0.2.0), this library is 0.1.0"},
        {sizeof(sparge_options), 10000, "options.version is 10000 (1.0.0), "},
        {sizeof(sparge_options), -1, "options.version is -1 "},
        {sizeof(sparge_options) - 8, now + 100, "options.version is 200 "},
        {sizeof(sparge_options) - 8, now, "options.version is 0 "},
        {sizeof(int), now, "options.version is 0 "},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        check_case("size %zu, version %d", table[n].size, table[n].version);
        sparge_options made;
        memset(&made, 0x55, sizeof made);
        sparge_options_init(&made, table[n].size, table[n].version, SPARGE_RULES_DEFAULT);
        for (size_t at = table[n].size; at < sizeof made; at++)
            check(((char *)&made)[at] == 0x55, "byte %zu beyond the struct is written", at);
        asked a = question();
        a.o.version = made.version;
        if (table[n].sentence)
            refused(ALL, a, SPARGE_ERR_ARGUMENT, table[n].sentence);
        else
            accepted(ALL, a, "this version");
    }
}

/* No tokens at all, but more heads than can be counted in memory. */
Test(api, more_heads_than_there_is_memory_for)
{
    const int64_t batch[] = {INT64_C(1) << 60, INT64_C(1) << 61, (INT64_C(1) << 60) + 1};
    for (int64_t n = 0; n < COUNT(batch); n++) {
        check_case("batch %lld", (long long)batch[n]);
        asked a = question();
        a.p.batch = batch[n];
        a.p.heads = a.p.kv_heads = 1;
        a.p.q_len = a.p.k_len = 0;
        a.result.head_counts = NULL;
        sparge_error error;
        const sparge_status status = sparge_attend(&a.p, &a.o, NULL, &a.result, &error);
        check(status == SPARGE_ERR_SHAPE || status == SPARGE_ERR_MEMORY, "%s",
              sparge_status_string(status));
    }
}

Test(api, options_out_of_range)
{
    static const struct {
        const char *sentence;
        size_t at;
        int64_t value;
        size_t size;
    } table[] = {
        {"options.version is 0 (0.0.0), this library is 0.1.0", offsetof(sparge_options, version),
         0, 4},
        {"options.version is 200 (0.2.0), ", offsetof(sparge_options, version), 200, 4},
        {"options.version is 10000 (1.0.0), ", offsetof(sparge_options, version), 10000, 4},
        {"options.version is -1 ", offsetof(sparge_options, version), -1, 4},
        {"backend is 4, ", offsetof(sparge_options, backend), 4, 4},
        {"isa is 6, it must be in [0, 5]", offsetof(sparge_options, isa), SPARGE_ISAS, 4},
        {"threads is -1, ", offsetof(sparge_options, threads), -1, 4},
        {"threads is 1000000, ", offsetof(sparge_options, threads), 1000000, 4},
        {"block_q is 0, it must be in [1, 1024]", offsetof(sparge_options, block_q), 0, 8},
        {"block_q is -64, ", offsetof(sparge_options, block_q), -64, 8},
        {"block_q is 1025, ", offsetof(sparge_options, block_q), 1025, 8},
        {"block_q is 4294967297, ", offsetof(sparge_options, block_q), INT64_C(4294967297), 8},
        {"block_k is 0, it must be in [1, 1024]", offsetof(sparge_options, block_k), 0, 8},
        {"block_k is -1, ", offsetof(sparge_options, block_k), -1, 8},
        {"block_k is 1025, ", offsetof(sparge_options, block_k), 1025, 8},
        {"cell is -1, it must be in [0, 1024]", offsetof(sparge_options, cell), -1, 8},
        {"cell is 1025, ", offsetof(sparge_options, cell), 1025, 8},
        {"skip_rows is -1, ", offsetof(sparge_options, skip_rows), -1, 8},
        {"causal is 3, it must be in [0, 2]", offsetof(sparge_options, causal), 3, 4},
        {"qk_dtype is f16 (1), it must be int8, int12, f32 or bf16",
         offsetof(sparge_options, qk_dtype), SPARGE_F16, 4},
        {"qk_dtype is fp8 (3), ", offsetof(sparge_options, qk_dtype), SPARGE_FP8, 4},
        {"qk_dtype is unknown dtype (7), ", offsetof(sparge_options, qk_dtype), 7, 4},
        {"qk_dtype is fastest (6), ", offsetof(sparge_options, qk_dtype), SPARGE_FASTEST, 4},
        {"pv_dtype is unknown dtype (7), it must be int8, ", offsetof(sparge_options, pv_dtype), 7,
         4},
        {"rules is 3, it must be in [0, 2]", offsetof(sparge_options, rules), 3, 4},
        {"kernel is 6, it must be in [0, 5]", offsetof(sparge_options, cuda.kernel), 6, 4},
        {"kernel is -1, ", offsetof(sparge_options, cuda.kernel), -1, 4},
    };
    cr_assert(sizeof(sparge_backend) == 4 && sizeof(int) == 4);
    for (int64_t n = 0; n < COUNT(table); n++) {
        asked a = question();
        memcpy((char *)&a.o + table[n].at, &table[n].value, table[n].size); /* little-endian */
        refused(ALL, a, SPARGE_ERR_ARGUMENT, table[n].sentence);
    }
    asked a = question();
    a.o.causal = (sparge_causal)-1;
    refused(ALL, a, SPARGE_ERR_ARGUMENT, "causal is ");
    a = question();
    a.o.pv_dtype = SPARGE_INT12;
    a.o.block_k = 129;
    refused(ALL, a, SPARGE_ERR_ARGUMENT, "block_k is 129, with pv_dtype int12");
}

/* A cell is a part of both blocks, and of keys there are 64 of them in a block at most. */
Test(api, cells_that_do_not_fit)
{
    const struct {
        int64_t cell, block_q, block_k;
        bool fits;
    } table[] = {
        {3, 4, 4, false},         {8, 4, 4, false},        {4, 2, 4, false},
        {4, 4, 2, false},         {2, 4, 5, false},        {2, 5, 4, false},
        {1, 4, 65, false},        {15, 1024, 1024, false}, {8, 64, 1024, false},
        {1024, 1024, 512, false}, {1, 7, 5, true},         {2, 4, 4, true},
        {4, 4, 4, true},          {1, 1024, 64, true},     {16, 1024, 1024, true},
        {1024, 1024, 1024, true}, {5, 5, 320, true},       {5, 5, 325, false},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        asked a = question();
        a.o.cell = table[n].cell;
        a.o.block_q = table[n].block_q;
        a.o.block_k = table[n].block_k;
        a.m.q_blocks = blocks(Q_LEN, a.o.block_q);
        a.m.k_blocks = blocks(K_LEN, a.o.block_k);
        if (table[n].fits)
            accepted(ALL, a, check_text("cells of %lld", (long long)a.o.cell));
        else
            refused(ALL, a, SPARGE_ERR_ARGUMENT,
                    check_text("cell is %lld, it must divide block_q, %lld, and block_k, %lld, and "
                               "be at least 1/64 of block_k, or be 0",
                               (long long)a.o.cell, (long long)a.o.block_q,
                               (long long)a.o.block_k));
    }
}

Test(api, scales_that_are_not)
{
    const struct {
        float softmax_scale;
        const char *sentence;
    } table[] = {
        {-1, "softmax_scale is -1, "},
        {NAN, "softmax_scale is "},
        {INFINITY, "softmax_scale is inf, "},
        {-INFINITY, "softmax_scale is -inf, "},
        {-0x1p-149f, "softmax_scale is -1.4013e-45, "},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        asked a = question();
        a.o.softmax_scale = table[n].softmax_scale;
        refused(ALL, a, SPARGE_ERR_ARGUMENT, table[n].sentence);
    }
    asked a = question();
    a.o.softmax_scale = 0x1p-149f;
    accepted(ALL, a, "the smallest scale");
}

Test(api, thresholds_out_of_range)
{
    enum { LAST = HEADS - 1 };
    const sparge_thresholds sound_ones = {0.6f, 0.98f, SPARGE_OFF, -INFINITY, 0};
    const struct {
        sparge_thresholds thresholds;
        const char *name, *value;
    } table[] = {
        {{1.5f, 0.9f, 0.5f, -1, 0}, "theta", "1.5"},
        {{-1.5f, 0.9f, 0.5f, -1, 0}, "theta", "-1.5"},
        {{NAN, 0.9f, 0.5f, -1, 0}, "theta", ""},
        {{INFINITY, 0.9f, 0.5f, -1, 0}, "theta", "inf"},
        {{0.5f, 1.25f, 0.5f, -1, 0}, "tau", "1.25"},
        {{0.5f, -0.5f, 0.5f, -1, 0}, "tau", "-0.5"},
        {{0.5f, -1.5f, 0.5f, -1, 0}, "tau", "-1.5"},
        {{0.5f, NAN, 0.5f, -1, 0}, "tau", ""},
        {{0.5f, 0.9f, 2, -1, 0}, "topk", "2"},
        {{0.5f, 0.9f, -0.25f, -1, 0}, "topk", "-0.25"},
        {{0.5f, 0.9f, NAN, -1, 0}, "topk", ""},
        {{0.5f, 0.9f, -INFINITY, -1, 0}, "topk", "-inf"},
        {{0.5f, 0.9f, 0.5f, 0.25f, 0}, "lambda", "0.25"},
        {{0.5f, 0.9f, 0.5f, INFINITY, 0}, "lambda", "inf"},
        {{0.5f, 0.9f, 0.5f, NAN, 0}, "lambda", ""},
        {{0.5f, 0.9f, 0.5f, -1, -0x1p-149f}, "min_mass", "-1.40129846e-45"},
        {{0.5f, 0.9f, 0.5f, -1, SPARGE_OFF}, "min_mass", "-1"},
        {{0.5f, 0.9f, 0.5f, -1, INFINITY}, "min_mass", "inf"},
        {{0.5f, 0.9f, 0.5f, -1, NAN}, "min_mass", ""},
        {{0.5f, SPARGE_OFF, SPARGE_OFF, -1, 0}, "tau, topk and min_mass", NULL},
        {{0.5f, SPARGE_OFF, SPARGE_OFF, -1, -0.0f}, "tau, topk and min_mass", NULL},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        const char *sentence = table[n].value
                                   ? check_text("%s is %s", table[n].name, table[n].value)
                                   : "tau, topk and min_mass are all off";
        asked a = question();
        a.o.thresholds = table[n].thresholds;
        refused(ALL, a, SPARGE_ERR_ARGUMENT, sentence);
        sparge_thresholds heads[HEADS] = {sound_ones, sound_ones, sound_ones, table[n].thresholds};
        a.o.per_head = heads;
        a.o.thresholds = sound_ones;
        refused(ALL, a, SPARGE_ERR_ARGUMENT, sentence);
        point(&a);
        sparge_error error;
        sparge_predict(&a.p, &a.o, &a.m, NULL, &error);
        check(strstr(error.text, check_text("per_head[%d]", LAST)), "it says \"%s\"", error.text);
        heads[LAST] = sound_ones;
        a.o.thresholds = table[n].thresholds;
        accepted(ALL, a, "the thresholds of all heads are not read when each has its own");
    }
}

Test(api, thresholds_at_their_limits)
{
    const sparge_thresholds table[] = {
        {-1, 0, 0, 0, 0},
        {1, 1, 1, -INFINITY, 0},
        {0, SPARGE_OFF, 0, -3e38f, 0},
        {-0.0f, -0.0f, SPARGE_OFF, -0.0f, -0.0f},
        {0.5f, SPARGE_OFF, SPARGE_OFF, -1, 0x1p-149f},
        {0.5f, SPARGE_OFF, SPARGE_OFF, -1, 0x1.fffffep127f},
        {0.5f, 1, 1, -1, 1},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        asked a = question();
        a.o.thresholds = table[n];
        accepted(ALL, a, check_text("limits %lld", (long long)n));
    }
}

Test(api, masks_of_another_shape)
{
    for (int field = 0; field < 4; field++)
        for (int64_t step = -1; step <= 1; step += 2) {
            asked a = question();
            int64_t *const size[] = {&a.m.batch, &a.m.heads, &a.m.q_blocks, &a.m.k_blocks};
            *size[field] += step;
            refused(STAGES | JUDGES, a, SPARGE_ERR_SHAPE, "mask is [");
            asked b = question();
            b.m = a.m;
            point(&b);
            sparge_error error;
            sparge_predict(&b.p, &b.o, &b.m, NULL, &error);
            const char *is =
                check_text("[%lld, %lld, %lld, %lld]", (long long)b.m.batch, (long long)b.m.heads,
                           (long long)b.m.q_blocks, (long long)b.m.k_blocks);
            check(strstr(error.text, is) && strstr(error.text, "[2, 4, 3, 3]"), "it says \"%s\"",
                  error.text);
        }
    asked a = question();
    a.m.words = 0;
    refused(STAGES | JUDGES, a, SPARGE_ERR_SHAPE, "mask.words is 0");
    a.m.words = -1;
    refused(STAGES | JUDGES, a, SPARGE_ERR_SHAPE, "mask.words is -1");
    a = question();
    a.o.block_k = 2;
    refused(STAGES | JUDGES, a, SPARGE_ERR_SHAPE, "mask is [");
}

/* ---- Backends and instruction sets ----------------------------------------------------------- */

/* On a machine without a GPU cuda is refused in words, built or not. Where there is one, these
 * questions are not for it: they point to host memory. */
static void refused_by_cuda(asked a)
{
    static const char absent[] = "backend is cuda, which this library was built without";
    a.o.backend = SPARGE_CUDA;
    if (!sparge_backend_available(SPARGE_CUDA))
        refused(STAGES, a, SPARGE_ERR_UNSUPPORTED, sparge_backend_built(SPARGE_CUDA) ? "" : absent);
}

Test(api, cuda_without_a_device)
{
    asked a = question();
    refused_by_cuda(a);
    a.result.head_counts = NULL;
    a.result.lse = NULL;
    refused_by_cuda(a);
    for (int kernel = 1; kernel <= 5; kernel++) {
        a.o.cuda.kernel = kernel;
        refused_by_cuda(a);
    }
    a = question();
    for (int pv = SPARGE_F32; pv <= SPARGE_FASTEST; pv++) {
        a.o.pv_dtype = (sparge_dtype)pv;
        refused_by_cuda(a);
    }
    a = question();
    a.o.backend = SPARGE_CUDA;
    a.o.isa = SPARGE_ISA_AVX2;
    refused(STAGES, a, SPARGE_ERR_ARGUMENT, "isa is avx2, which the cuda backend does not have");
    a = question();
    a.o.backend = SPARGE_CUDA;
    a.o.rules = SPARGE_RULES_UPSTREAM;
    refused(STAGES, a, SPARGE_ERR_UNSUPPORTED,
            sparge_backend_built(SPARGE_CUDA) ? "rules are not" : "backend is cuda");
    a = question();
    a.o.backend = SPARGE_CUDA;
    accepted(ALLOC | JUDGES, a, "masks and the oracle are the host's");
}

static asked question_in_bf16(int which)
{
    asked a = question();
    a.o.qk_dtype = which & 1 ? SPARGE_BF16 : SPARGE_INT8;
    a.o.pv_dtype = which & 2 ? SPARGE_BF16 : SPARGE_FASTEST;
    return a;
}

/* What was chosen, or AUTO for what is refused with these words. */
static void bf16_resolves(int which, sparge_backend asked_of, sparge_isa isa,
                          sparge_backend backend, sparge_isa resolved, sparge_status status,
                          const char *words)
{
    asked a = question_in_bf16(which);
    a.o.backend = asked_of;
    a.o.isa = isa;
    if (resolved == SPARGE_ISA_AUTO) {
        refused(STAGES, a, status, words);
        return;
    }
    accepted(ALL, a,
             check_text("%s, isa %s", sparge_backend_string(asked_of), sparge_isa_string(isa)));
    check(!sparge_options_resolve(&a.p, &a.o, NULL), "not resolved");
    check_equal((int)a.o.backend, (int)backend);
    check_equal((int)a.o.isa, (int)resolved);
    check_equal((int)a.o.pv_dtype, which & 2 ? (int)SPARGE_BF16 : (int)SPARGE_INT8);
}

/* ref takes the isa whose order of the sum it is. */
Test(api, bf16_of_ref)
{
    for (int which = 1; which < 4; which++) {
        for (sparge_isa isa = SPARGE_ISA_AUTO; isa < SPARGE_ISAS; isa++) {
            const bool neither = isa == SPARGE_ISA_AVX2 || isa == SPARGE_ISA_AVXVNNI;
            bf16_resolves(which, SPARGE_REF, isa, SPARGE_REF,
                          neither                 ? SPARGE_ISA_AUTO
                          : isa == SPARGE_ISA_AMX ? SPARGE_ISA_AMX
                                                  : SPARGE_ISA_AVX512VNNI,
                          SPARGE_ERR_ARGUMENT,
                          check_text("isa is %s, which the ref backend does not have",
                                     sparge_isa_string(isa)));
        }
        asked a = question_in_bf16(which);
        a.o.backend = SPARGE_CUDA;
        refused(STAGES, a, SPARGE_ERR_UNSUPPORTED,
                sparge_backend_built(SPARGE_CUDA)
                    ? check_text("%s is bf16, which the cuda backend does not have",
                                 which & 1 ? "qk_dtype" : "pv_dtype")
                    : "backend is cuda");
        accepted(ALLOC | JUDGES, a, "masks and the oracle are of no backend");
    }
    asked a = question();
    a.o.isa = SPARGE_ISA_AVX512VNNI;
    refused(STAGES, a, SPARGE_ERR_ARGUMENT,
            "isa is avx512vnni, which the ref backend does not have");
}

/* cpu has bf16 where one of its instruction sets has, and names that one; AUTO is ref elsewhere. */
Test(api, bf16_of_cpu)
{
    const sparge_isa best = sparge_cpu_best(true);
    const bool here = best != SPARGE_ISA_AUTO;
    const sparge_backend of_auto = here ? SPARGE_CPU : SPARGE_REF;
    const sparge_isa of_ref = here ? best : SPARGE_ISA_AVX512VNNI;
    unsetenv("SPARGE_ISA");
    cr_log_info("bf16 on cpu: %s", here ? sparge_isa_string(best) : "not here");
    for (int which = 1; which < 4; which++) {
        const char *const lacks = check_text("%s is bf16, which the cpu backend does not have here,"
                                             " but ref has",
                                             which & 1 ? "qk_dtype" : "pv_dtype");
        bf16_resolves(which, SPARGE_AUTO, SPARGE_ISA_AUTO, of_auto, of_ref, SPARGE_OK, NULL);
        bf16_resolves(which, SPARGE_CPU, SPARGE_ISA_AUTO, SPARGE_CPU, best, SPARGE_ERR_UNSUPPORTED,
                      lacks);
        for (sparge_isa isa = SPARGE_ISA_SCALAR; isa < SPARGE_ISAS; isa++) {
            const bool has = sparge_cpu_has_bf16(isa);
            const char *const name = sparge_isa_string(isa);
            const char *const words =
                !here                  ? lacks
                : !sparge_cpu_has(isa) ? check_text("isa is %s, which", name)
                                       : check_text("isa is %s, which has no products of bf16 here;"
                                                    " %s has",
                                                    name, sparge_isa_string(best));
            bf16_resolves(which, SPARGE_CPU, isa, SPARGE_CPU, has ? isa : SPARGE_ISA_AUTO,
                          SPARGE_ERR_UNSUPPORTED, words);
            if (here || isa != SPARGE_ISA_SCALAR)
                bf16_resolves(which, SPARGE_AUTO, isa, SPARGE_CPU, has ? isa : SPARGE_ISA_AUTO,
                              SPARGE_ERR_UNSUPPORTED, words);
        }
        setenv("SPARGE_ISA", "scalar", 1);
        bf16_resolves(which, SPARGE_CPU, SPARGE_ISA_AUTO, SPARGE_CPU, SPARGE_ISA_AUTO,
                      SPARGE_ERR_UNSUPPORTED,
                      here ? "SPARGE_ISA is scalar, which has no products of bf16 here" : lacks);
        unsetenv("SPARGE_ISA");
    }
}

Test(api, rungs_are_of_cuda)
{
    static const sparge_backend backend[] = {SPARGE_AUTO, SPARGE_REF, SPARGE_CPU};
    for (int64_t n = 0; n < COUNT(backend); n++) {
        asked a = question();
        a.o.backend = backend[n];
        a.o.cuda.kernel = 1 + (int)n;
        refused(STAGES, a, SPARGE_ERR_ARGUMENT,
                check_text("kernel is %d, which is of the cuda backend: backend is %s",
                           a.o.cuda.kernel, sparge_backend_string(backend[n])));
    }
}

/* Device memory: what is wrong whatever the machine, then what a machine without a device says. */
Test(api, device_memory)
{
    char here[] = "as it was";
    void *data = here;
    sparge_error error = {"poison"};
    check_equal(sparge_device_alloc(8, NULL, &error), SPARGE_ERR_ARGUMENT);
    cr_assert_str_eq(error.text, "data is NULL");
    check_equal(sparge_device_alloc(-1, &data, &error), SPARGE_ERR_ARGUMENT);
    cr_assert_str_eq(error.text, "bytes is -1, it must be at least 0");
    check(!data, "what was not allocated is safe to free");
    check_equal(sparge_device_copy(here, here, INT64_MIN, &error), SPARGE_ERR_ARGUMENT);
    check(!strncmp(error.text, "bytes is -9223372036854775808, ", 31), "it says \"%s\"",
          error.text);
    check_equal(sparge_device_copy(NULL, here, 1, &error), SPARGE_ERR_ARGUMENT);
    cr_assert_str_eq(error.text, "to is NULL");
    check_equal(sparge_device_copy(here, NULL, 1, &error), SPARGE_ERR_ARGUMENT);
    cr_assert_str_eq(error.text, "from is NULL");
    check_equal(sparge_device_copy(here, NULL, 1, NULL), SPARGE_ERR_ARGUMENT);
    sparge_device_free(NULL);
    const bool available = sparge_backend_available(SPARGE_CUDA);
    const sparge_status sound_one = available ? SPARGE_OK : SPARGE_ERR_UNSUPPORTED;
    check_equal(sparge_device_copy(NULL, NULL, 0, NULL), sound_one);
    for (int64_t bytes = 0; bytes <= 8; bytes += 8) {
        check_case("%lld bytes", (long long)bytes);
        data = here;
        check_equal(sparge_device_alloc(bytes, &data, &error), sound_one);
        check(available == !error.text[0], "it says \"%s\"", error.text);
        check(available || !data, "what was not allocated is safe to free");
        check_equal(sparge_device_copy(here, "12345678", bytes, &error), sound_one);
        check(available == !error.text[0], "it says \"%s\"", error.text);
        check(!memcmp(here, available && bytes ? "12345678" : "as it was", 8), "what was copied");
        sparge_device_free(data);
    }
}

/* The sizes of the workspace are a matter of sizes: no pointer is looked at, and cuda is meant
 * whatever the options say. */
Test(api, workspace_of_a_problem)
{
    asked a = question();
    int64_t bytes = 77;
    sparge_error error = {"poison"};
    check_equal(sparge_workspace_bytes(&a.p, &a.o, true, NULL, &error), SPARGE_ERR_ARGUMENT);
    cr_assert_str_eq(error.text, "bytes is NULL");
    check_equal(sparge_workspace_bytes(NULL, &a.o, true, &bytes, &error), SPARGE_ERR_ARGUMENT);
    cr_assert_str_eq(error.text, "problem is NULL");
    check_equal(sparge_workspace_bytes(&a.p, NULL, true, &bytes, &error), SPARGE_ERR_ARGUMENT);
    cr_assert_str_eq(error.text, "options is NULL");
    a.p.q.data = a.p.k.data = a.p.v.data = NULL;
    const bool available = sparge_backend_available(SPARGE_CUDA);
    for (sparge_backend backend = SPARGE_AUTO; backend <= SPARGE_CUDA; backend++) {
        check_case("the options say %s", sparge_backend_string(backend));
        a.o.backend = backend;
        a.o.cuda.kernel = 1;
        const sparge_status status =
            sparge_workspace_bytes(&a.p, &a.o, backend % 2, &bytes, &error);
        check(status == (available ? SPARGE_OK : SPARGE_ERR_UNSUPPORTED) &&
                  available == !error.text[0],
              "%s, \"%s\"", sparge_status_string(status), error.text);
        check(status ? bytes == 77 : bytes >= 0, "%lld bytes", (long long)bytes);
    }
    bytes = 77;
    a.o.block_k = 0;
    check_equal(sparge_workspace_bytes(&a.p, &a.o, true, &bytes, &error), SPARGE_ERR_ARGUMENT);
    check(!strncmp(error.text, "block_k is 0", 12), "it says \"%s\"", error.text);
    a = question();
    a.p.kv_heads = 3;
    check_equal(sparge_workspace_bytes(&a.p, &a.o, true, &bytes, NULL), SPARGE_ERR_SHAPE);
    a = question(); /* each tensor fits, the mask of one-token blocks does not */
    a.p.batch = a.p.heads = a.p.kv_heads = a.p.dim = a.p.dim_v = a.o.block_q = a.o.block_k = 1;
    a.p.q_len = a.p.k_len = INT64_C(1) << 58;
    check_equal(sparge_workspace_bytes(&a.p, &a.o, true, &bytes, &error), SPARGE_ERR_SHAPE);
    check(!strncmp(error.text, "mask of 288230376151711744", 26), "it says \"%s\"", error.text);
    check_equal(bytes, (int64_t)77);
}

/* ref defines half and fp8, the cpu backend has neither, and what is fastest on both is int8. */
Test(api, precisions_and_the_backends_that_have_them)
{
    float int8[ROWS * DIM_V];
    for (int n = 0; n <= COUNT(precisions); n++)
        for (sparge_backend backend = SPARGE_AUTO; backend <= SPARGE_CPU; backend++) {
            const sparge_dtype pv = n < COUNT(precisions) ? precisions[n] : SPARGE_FASTEST;
            const bool narrow = pv == SPARGE_F16 || pv == SPARGE_FP8;
            asked a = question();
            a.o.pv_dtype = pv;
            a.o.backend = backend;
            if (narrow && backend == SPARGE_CPU) {
                refused(
                    STAGES, a, SPARGE_ERR_UNSUPPORTED,
                    check_text("pv_dtype is %s, which the cpu backend", sparge_dtype_string(pv)));
                continue;
            }
            a.result.pv_dtype = (sparge_dtype)77;
            a.result.kernel = 77;
            check_case("pv %s on %s", sparge_dtype_string(pv), sparge_backend_string(backend));
            check(sparge_attention(&a.p, &a.o, &a.result, NULL) == SPARGE_OK, "refused");
            check_equal(a.result.backend,
                        narrow || backend == SPARGE_REF ? SPARGE_REF : SPARGE_CPU);
            check_equal(a.result.pv_dtype, pv == SPARGE_FASTEST ? SPARGE_INT8 : pv);
            check_equal(a.result.kernel, 0);
            if (pv == SPARGE_INT8)
                memcpy(int8, out.o, sizeof int8);
            check((pv == SPARGE_INT8 || pv == SPARGE_FASTEST) == !memcmp(out.o, int8, sizeof int8),
                  "these have the bits of int8, the others have not");
        }
    asked a = question(); /* AUTO with a named instruction set is the cpu backend */
    a.o.backend = SPARGE_AUTO;
    a.o.isa = SPARGE_ISA_AVX2;
    a.o.pv_dtype = SPARGE_FP8;
    refused(STAGES, a, SPARGE_ERR_UNSUPPORTED, "pv_dtype is fp8, which the cpu backend");
}

Test(api, backends_that_are_not_built)
{
    const sparge_backend backend[] = {SPARGE_CPU, SPARGE_CUDA};
    cr_assert(sparge_backend_built(SPARGE_AUTO) && sparge_backend_built(SPARGE_REF));
    cr_assert(sparge_backend_available(SPARGE_AUTO) && sparge_backend_available(SPARGE_REF));
    cr_assert(!sparge_backend_built((sparge_backend)4) &&
              !sparge_backend_available((sparge_backend)-1));
    for (int64_t n = 0; n < COUNT(backend); n++) {
        asked a = question();
        a.o.backend = backend[n];
        cr_assert(sparge_backend_built(backend[n]) || !sparge_backend_available(backend[n]));
        if (!sparge_backend_built(backend[n]))
            refused(STAGES, a, SPARGE_ERR_UNSUPPORTED,
                    check_text("backend is %s", sparge_backend_string(backend[n])));
        a.o.rules = SPARGE_RULES_PAPER;
        point(&a);
        check(sparge_predict(&a.p, &a.o, &a.m, NULL, NULL) == SPARGE_ERR_UNSUPPORTED,
              "rules of the paper on %s", sparge_backend_string(backend[n]));
    }
}

Test(api, ref_has_no_instruction_sets)
{
    const sparge_isa isa[] = {SPARGE_ISA_AVX2, SPARGE_ISA_AVXVNNI, SPARGE_ISA_AVX512VNNI,
                              SPARGE_ISA_AMX};
    for (int64_t n = 0; n < COUNT(isa); n++) {
        asked a = question();
        a.o.isa = isa[n];
        refused(STAGES, a, SPARGE_ERR_ARGUMENT, check_text("isa is %s", sparge_isa_string(isa[n])));
        if (!sparge_backend_built(SPARGE_CPU)) {
            a.o.backend = SPARGE_AUTO;
            refused(STAGES, a, SPARGE_ERR_UNSUPPORTED, "backend is cpu");
        }
    }
    asked a = question();
    a.o.isa = SPARGE_ISA_SCALAR;
    accepted(ALL, a, "scalar");
    cr_assert(sparge_isa_available(SPARGE_ISA_AUTO) && sparge_isa_available(SPARGE_ISA_SCALAR));
    cr_assert(!sparge_isa_available(SPARGE_ISAS) && !sparge_isa_available((sparge_isa)-1));
    cr_assert(!sparge_isa_has_bf16(SPARGE_ISAS) && !sparge_isa_has_bf16(SPARGE_ISA_SCALAR));
    cr_assert_eq(sparge_isa_has_bf16(SPARGE_ISA_AUTO),
                 sparge_isa_has_bf16(SPARGE_ISA_AVX512VNNI) || sparge_isa_has_bf16(SPARGE_ISA_AMX));
}

/* ---- Names and defaults ---------------------------------------------------------------------- */

Test(api, names)
{
    const char *const status[] = {
        "ok",           "bad argument", "sizes do not fit", "out of memory", "not supported here",
        "device error", "cancelled"};
    const char *const backend[] = {"auto", "ref", "cpu", "cuda"};
    const char *const isa[] = {"auto", "scalar", "avx2", "avxvnni", "avx512vnni", "amx"};
    check_equal(COUNT(isa), SPARGE_ISAS);
    for (int n = 0; n < COUNT(status); n++)
        cr_assert_str_eq(sparge_status_string((sparge_status)n), status[n]);
    for (int n = 0; n < COUNT(backend); n++)
        cr_assert_str_eq(sparge_backend_string((sparge_backend)n), backend[n]);
    for (int n = 0; n < COUNT(isa); n++)
        cr_assert_str_eq(sparge_isa_string((sparge_isa)n), isa[n]);
    for (int n = -1; n <= 100; n += n < 0 ? 8 : 93) {
        cr_assert_str_eq(sparge_status_string((sparge_status)n), "unknown status");
        cr_assert_str_eq(sparge_backend_string((sparge_backend)n), "unknown backend");
        cr_assert_str_eq(sparge_isa_string((sparge_isa)n), "unknown isa");
    }
    cr_assert_str_eq(sparge_isa_string((sparge_isa)COUNT(isa)), "unknown isa");
    cr_assert_str_eq(sparge_backend_string((sparge_backend)COUNT(backend)), "unknown backend");
}

Test(api, defaults)
{
    for (int rules = SPARGE_RULES_DEFAULT; rules <= SPARGE_RULES_UPSTREAM; rules++) {
        check_case("rules %d", rules);
        const sparge_options o = sparge_options_default((sparge_rules)rules);
        check_equal(o.backend, SPARGE_AUTO);
        check_equal(o.isa, SPARGE_ISA_AUTO);
        check_equal(o.threads, 0);
        check_equal(o.block_q, 128);
        check_equal(o.block_k, 64);
        check_equal(o.cell, 0);
        check_equal(o.skip_rows, 0);
        check_equal(o.causal, SPARGE_CAUSAL_NONE);
        check_equal(o.qk_dtype, SPARGE_INT8);
        check_equal(o.pv_dtype, SPARGE_INT8);
        check_equal(o.softmax_scale, 0.0f);
        check_equal(o.smooth_k, true);
        check_equal(o.sink, false);
        check_equal(o.rules, (sparge_rules)rules);
        check_equal(o.thresholds.theta, 0.6f);
        check_equal(o.thresholds.tau, 0.98f);
        check_equal(o.thresholds.topk, -1.0f);
        check_equal(o.thresholds.min_mass, 0.0f);
        check_equal(o.cuda.kernel, 0);
        check(!o.cuda.stream && !o.cuda.workspace && !o.cuda.workspace_bytes,
              "something of a device is set");
        if (rules == SPARGE_RULES_UPSTREAM) /* 50 in log2 units */
            check_close(o.thresholds.lambda, -50 / 1.4426950408889634, 1e-5);
        else
            check_equal(o.thresholds.lambda, -INFINITY);
        check(!o.per_head && !o.progress && !o.user, "a pointer is set");
    }
    cr_assert_eq(SPARGE_OFF, -1.0f);
    cr_assert_str_eq(SPARGE_VERSION, "0.1.0");
}

/* 0 stands for 1/sqrt(dim) and, by the rules, for 64, block_q / 4 or block_q rows. */
Test(api, zero_stands_for_the_default)
{
    const sparge_rules rules[] = {SPARGE_RULES_DEFAULT, SPARGE_RULES_PAPER, SPARGE_RULES_UPSTREAM};
    const int64_t rows[] = {64, 25, 98};
    const shape s = shape_of(1, 1, 1, 196, 64, 16, 4);
    problem x = problem_make(&s);
    /* The first key block is far above the rest, but for the last row of a query block: its group
     * skips nothing. */
    for (int64_t e = 0; e < tensor_count(&x.q); e++)
        x.q.x[e] = e / 16 % 98 == 97 ? 0 : 1;
    for (int64_t e = 0; e < tensor_count(&x.k); e++)
        x.k.x[e] = e / 16 < 8 ? 4 : 0;
    problem_write(&x);
    x.o.block_q = 98;
    x.o.block_k = 8;
    x.o.thresholds.lambda = -3;
    for (int n = 0; n < 3; n++) {
        check_case("rules %d", (int)rules[n]);
        x.o.rules = rules[n];
        x.o.skip_rows = 0;
        x.o.softmax_scale = 0;
        answer by_default = attend(&x);
        x.o.skip_rows = rows[n];
        x.o.softmax_scale = 0.25f;
        answer spelled = attend(&x);
        same_answer(&by_default, &spelled);
        check_equal(by_default.result.counts.pv_done, spelled.result.counts.pv_done);
        x.o.skip_rows = rows[n] - 1;
        answer other = attend(&x);
        check(by_default.result.counts.pv_done != other.result.counts.pv_done,
              "one row less makes no difference");
        answer_free(&by_default);
        answer_free(&spelled);
        answer_free(&other);
    }
    problem_free(&x);
}

/* What a call would run with; resolved once more it is the same. */
Test(api, options_as_resolved)
{
    const struct {
        sparge_rules rules;
        sparge_backend backend;
        int64_t rows;
    } table[] = {
        {SPARGE_RULES_DEFAULT, SPARGE_CPU, 4},
        {SPARGE_RULES_PAPER, SPARGE_REF, 1},
        {SPARGE_RULES_UPSTREAM, SPARGE_REF, 4},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        check_case("rules %d", (int)table[n].rules);
        asked a = question();
        a.o.backend = SPARGE_AUTO;
        a.o.rules = table[n].rules;
        a.o.pv_dtype = SPARGE_FASTEST;
        sparge_error error = {"poison"};
        check(sparge_options_resolve(&a.p, &a.o, &error) == SPARGE_OK && !error.text[0], "%s",
              error.text);
        cr_assert_eq(sparge_attention(&a.p, &a.o, &a.result, NULL), SPARGE_OK);
        check_equal(a.o.backend, table[n].backend);
        check_equal(a.result.backend, a.o.backend);
        check_equal(a.result.isa, a.o.isa);
        check_equal(a.result.threads, a.o.threads);
        check_equal(a.o.pv_dtype, SPARGE_INT8);
        check_equal(a.o.skip_rows, table[n].rows);
        check_equal(a.o.softmax_scale, 1 / sqrtf(DIM));
        const sparge_options once = a.o;
        cr_assert_eq(sparge_options_resolve(&a.p, &a.o, NULL), SPARGE_OK);
        check(!memcmp(&once, &a.o, sizeof once), "the second time changes something");
    }
    asked a = question();
    a.o.cuda.kernel = 2;
    const sparge_options before = a.o;
    sparge_error error;
    cr_assert_eq(sparge_options_resolve(&a.p, &a.o, &error), SPARGE_ERR_ARGUMENT);
    check(!strncmp(error.text, "kernel is 2", 9), "it says \"%s\"", error.text);
    check(!memcmp(&before, &a.o, sizeof before), "a refusal changes something");
    cr_assert_eq(sparge_options_resolve(NULL, &a.o, NULL), SPARGE_ERR_ARGUMENT);
    cr_assert_eq(sparge_options_resolve(&a.p, NULL, NULL), SPARGE_ERR_ARGUMENT);
}

/* ---- Masks and counts ------------------------------------------------------------------------ */

Test(api, mask_of_a_problem)
{
    const struct {
        int64_t q_len, k_len, q_blocks, k_blocks, words;
    } table[] = {
        {10, 11, 3, 3, 1},  {12, 12, 3, 3, 1}, {13, 128, 4, 32, 1}, {1, 129, 1, 33, 2},
        {0, 300, 0, 75, 3}, {8, 0, 2, 0, 0},   {0, 0, 0, 0, 0},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        check_case("%lld x %lld tokens", (long long)table[n].q_len, (long long)table[n].k_len);
        asked a = question();
        a.p.q_len = table[n].q_len;
        a.p.k_len = table[n].k_len;
        sparge_mask mask;
        memset(&mask, 0xFF, sizeof mask);
        sparge_error error = {"poison"};
        check(sparge_mask_alloc(&mask, &a.p, &a.o, &error) == SPARGE_OK && !error.text[0], "%s",
              error.text);
        check(mask.bits && mask.batch == BATCH && mask.heads == HEADS, "batch, heads");
        check_equal(mask.q_blocks, table[n].q_blocks);
        check_equal(mask.k_blocks, table[n].k_blocks);
        check_equal(mask.words, table[n].words);
        for (int64_t e = 0; e < BATCH * HEADS * mask.q_blocks * mask.words; e++)
            check_equal(mask.bits[e], 0u);
        sparge_mask_free(&mask);
        const sparge_mask empty = {0};
        check(!memcmp(&mask, &empty, sizeof mask), "a freed mask is not empty");
        sparge_mask_free(&mask);
    }
    sparge_mask_free(NULL);
    asked a = question();
    a.o.block_q = 0;
    sparge_mask mask;
    memset(&mask, 0xFF, sizeof mask);
    cr_assert_eq(sparge_mask_alloc(&mask, &a.p, &a.o, NULL), SPARGE_ERR_ARGUMENT);
    cr_assert(!mask.bits && !mask.words, "a refused mask is safe to free");
}

/* Every bit of [2][3][2][70] alone, against where the header says that it lies. */
Test(api, mask_bits_lie_where_the_header_says)
{
    enum { B = 2, H = 3, I = 2, J = 70, WORDS = 3, TOTAL = B * H * I * WORDS };
    uint32_t *bits = check_alloc(TOTAL * 4), want[TOTAL];
    const sparge_mask mask = {
        .bits = bits, .batch = B, .heads = H, .q_blocks = I, .k_blocks = J, .words = WORDS};
    sparge_mask writable = mask;
    for (int full = 0; full < 2; full++)
        for (int64_t n = 0; n < B * H * I * J; n++) {
            const int64_t j = n % J, i = n / J % I, h = n / J / I % H, b = n / J / I / H;
            check_case("bit %lld of [2][3][2][70]", (long long)n);
            memset(bits, full ? 0xFF : 0, TOTAL * 4);
            memcpy(want, bits, sizeof want);
            sparge_mask_set(&writable, b, h, i, j, full);
            check_same(bits, want, TOTAL);
            sparge_mask_set(&writable, b, h, i, j, !full);
            want[((b * H + h) * I + i) * WORDS + j / 32] ^= UINT32_C(1) << j % 32;
            check_same(bits, want, TOTAL);
            check_equal(sparge_mask_get(&mask, b, h, i, j), !full);
            if (j > 0)
                check_equal(sparge_mask_get(&mask, b, h, i, j - 1), (bool)full);
            if (j < J - 1)
                check_equal(sparge_mask_get(&mask, b, h, i, j + 1), (bool)full);
        }
    check_free(bits);
}

/* Rows may lie further apart than their bits need; stage 1 writes what lies between. */
Test(api, mask_rows_may_be_longer_than_their_bits)
{
    enum { WORDS = 3 };
    uint32_t *wide = check_alloc(LINES * WORDS * 4);
    outputs narrow;
    for (int words = 1; words <= WORDS; words += WORDS - 1) {
        asked a = question();
        point(&a);
        a.o.thresholds = (sparge_thresholds){-1, 0.7f, SPARGE_OFF, -INFINITY, 0};
        a.m.bits = words == 1 ? out.bits : wide;
        a.m.words = words;
        for (int entry = PREDICT; entry <= BASELINE; entry *= 2) {
            check_case("%d words, %s", words, entry_name(entry));
            check(call(entry, &a, NULL) == SPARGE_OK, "refused");
            if (words == 1)
                continue;
            for (int64_t e = 0; e < LINES * WORDS; e++)
                check_equal(wide[e], e % WORDS ? 0u : narrow.bits[e / WORDS]);
        }
        if (words == 1)
            narrow = out;
    }
    check_same(out.o, narrow.o, ROWS * DIM_V);
    check_same(out.oracle_o, narrow.oracle_o, ROWS * DIM_V);
    check_same(out.mass, narrow.mass, LINES * K_BLOCKS);
    check_free(wide);
}

Test(api, sparsity_table)
{
    const struct {
        sparge_counts counts;
        double qk, pv, both;
    } table[] = {
        {{.pairs = 0}, 0, 0, 0},
        {{.pairs = 8, .qk_done = 8, .pv_done = 8}, 0, 0, 0},
        {{.pairs = 8, .qk_done = 6, .pv_done = 3}, 0.25, 0.625, 0.4375},
        {{.pairs = 4, .qk_done = 2, .pv_done = 0.5}, 0.5, 0.875, 0.6875},
        {{.pairs = 5}, 1, 1, 1},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        check_case("row %lld", (long long)n);
        check_equal(sparge_sparsity_qk(&table[n].counts), table[n].qk);
        check_equal(sparge_sparsity_pv(&table[n].counts), table[n].pv);
        check_equal(sparge_sparsity(&table[n].counts), table[n].both);
    }
}

/* ---- What comes back ------------------------------------------------------------------------- */

/* attention = predict, then attend; and the sum of the heads' counts. */
Test(api, attention_is_both_stages)
{
    const sparge_thresholds few = {-1, 0.7f, SPARGE_OFF, -0.1f, 0};
    asked a = question();
    a.o.thresholds = few;
    a.o.skip_rows = 1;
    a.o.causal = SPARGE_CAUSAL_END;
    a.result.mask = &a.m;
    cr_assert_eq(sparge_attention(&a.p, &a.o, &a.result, NULL), SPARGE_OK);
    const outputs both = out;
    const sparge_result from_both = a.result;

    a = question();
    a.o.thresholds = few;
    a.o.skip_rows = 1;
    a.o.causal = SPARGE_CAUSAL_END;
    cr_assert_eq(sparge_predict(&a.p, &a.o, &a.m, NULL, NULL), SPARGE_OK);
    check_same(out.bits, both.bits, LINES);
    cr_assert_eq(sparge_attend(&a.p, &a.o, &a.m, &a.result, NULL), SPARGE_OK);
    check_same(out.o, both.o, ROWS * DIM_V);
    check_same(out.lse, both.lse, ROWS);
    check_same(out.bits, both.bits, LINES);

    a = question(); /* a mask of its own */
    a.o.thresholds = few;
    a.o.skip_rows = 1;
    a.o.causal = SPARGE_CAUSAL_END;
    cr_assert_eq(sparge_attention(&a.p, &a.o, &a.result, NULL), SPARGE_OK);
    check_same(out.o, both.o, ROWS * DIM_V);
    cr_assert(!a.result.mask);

    sparge_counts sum = {0};
    for (int n = 0; n < BATCH * HEADS; n++) {
        const sparge_counts *h = &out.head[n];
        sum.pairs += h->pairs, sum.qk_done += h->qk_done, sum.pv_done += h->pv_done;
        sum.tokens += h->tokens, sum.tile_tokens += h->tile_tokens, sum.qk_tokens += h->qk_tokens,
            sum.pv_tokens += h->pv_tokens;
    }
    const sparge_counts *counts = &a.result.counts, *other = &from_both.counts;
    same_counts(counts, &sum);
    same_counts(counts, other);
    /* Row t sees t + 2 keys: 2 to 11; blocks of 4 x 4 see up to key 4, 8 and 10: 2 + 3 + 3 blocks.
     */
    check_equal(counts->pairs, 8 * BATCH * HEADS);
    check_equal(counts->tokens, (2 + 11) * 5 * BATCH * HEADS);
    check(counts->qk_done < counts->pairs && counts->pv_done < (double)counts->qk_done &&
              counts->qk_tokens < counts->tokens && counts->pv_tokens < counts->qk_tokens,
          "nothing was dropped or skipped: the case tests nothing");

    a = question(); /* head_counts may be NULL, and the sum is the same */
    a.o.thresholds = few;
    a.o.skip_rows = 1;
    a.o.causal = SPARGE_CAUSAL_END;
    a.result.head_counts = NULL;
    a.result.lse = NULL;
    cr_assert_eq(sparge_attention(&a.p, &a.o, &a.result, NULL), SPARGE_OK);
    check_equal(a.result.counts.qk_done, sum.qk_done);
    check_same(out.o, both.o, ROWS * DIM_V);
    cr_assert(!a.result.head_counts);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

Test(api, result_says_what_ran)
{
    asked a = question();
    a.result.backend = SPARGE_CUDA;
    a.result.isa = a.result.qk_isa = a.result.pv_isa = SPARGE_ISA_AVX512VNNI;
    a.result.threads = -5;
    a.result.kernel = -5;
    a.result.pv_dtype = SPARGE_FP8;
    a.result.seconds_predict = a.result.seconds_quantize = a.result.seconds_attend = -1;
    const double start = now();
    cr_assert_eq(sparge_attention(&a.p, &a.o, &a.result, NULL), SPARGE_OK);
    const double took = now() - start;
    check_equal(a.result.backend, SPARGE_REF);
    check_equal(a.result.isa, SPARGE_ISA_SCALAR);
    check_equal(a.result.qk_isa, SPARGE_ISA_SCALAR);
    check_equal(a.result.pv_isa, SPARGE_ISA_SCALAR);
    check_equal(a.result.threads, 1);
    check_equal(a.result.kernel, 0);
    check_equal(a.result.pv_dtype, SPARGE_INT8);
    check(a.result.seconds_predict >= 0 && a.result.seconds_quantize >= 0 &&
              a.result.seconds_attend >= 0 &&
              a.result.seconds_predict + a.result.seconds_quantize + a.result.seconds_attend <=
                  took,
          "seconds");
    check(a.result.o.data == out.o && a.result.lse == out.lse,
          "what the caller filled in has changed");
}

typedef struct heard {
    int calls;
    double last;
} heard;

static bool listen(void *user, double done)
{
    heard *h = user;
    h->calls = done >= h->last && done <= 1 ? h->calls + 1 : -1000;
    h->last = done;
    return true;
}

Test(api, progress_rises_to_1)
{
    const int entries[] = {ATTEND, ATTENTION, ORACLE, BASELINE};
    for (int64_t n = 0; n < COUNT(entries); n++) {
        check_case("%s", entry_name(entries[n]));
        heard h = {0, 0};
        asked a = question();
        point(&a);
        a.o.progress = listen;
        a.o.user = &h;
        check(call(entries[n], &a, NULL) == SPARGE_OK, "call");
        check(h.calls > 0, "never called, or not rising, or beyond 1");
        check_equal(h.last, 1.0);
    }
}

typedef struct patience {
    int64_t left, calls; /* until it gives up; after that */
} patience;

static bool go_on(void *user, double done)
{
    patience *p = user;
    (void)done;
    p->calls += p->left <= 0;
    return p->left-- > 0;
}

/* Gives up at every call of progress in turn; returns how many there are. */
static int64_t gives_up(int entry, asked *a)
{
    for (int64_t n = 0;; n++) {
        check_case("%s of %s, %d threads, given up at call %lld", entry_name(entry),
                   sparge_backend_string(a->o.backend), a->o.threads, (long long)n);
        patience p = {.left = n};
        a->o.progress = go_on;
        a->o.user = &p;
        sparge_error error = {"poison"};
        heap_arm(-1);
        const sparge_status status = call(entry, a, n % 2 ? NULL : &error);
        heap.armed = false;
        check(heap.live == 0, "%lld allocations leak", (long long)heap.live);
        if (p.calls == 0) {
            check(status == SPARGE_OK, "%s", sparge_status_string(status));
            return n;
        }
        check(status == SPARGE_ERR_CANCELLED, "%s", sparge_status_string(status));
        check(p.calls == 1, "called %lld times after giving up", (long long)(p.calls - 1));
        check(n % 2 || !strcmp(error.text, "cancelled"), "it says \"%.40s\"", error.text);
    }
}

Test(api, progress_may_give_up)
{
    const int entries[] = {PREDICT, ATTEND, ATTENTION, ORACLE, BASELINE};
    for (int64_t n = 0; n < COUNT(entries); n++)
        for (sparge_backend backend = SPARGE_REF; backend <= SPARGE_CPU; backend++) {
            asked a = question();
            point(&a);
            a.o.backend = backend;
            a.o.threads = backend == SPARGE_CPU ? 1 : 0;
            for (a.o.cell = 0; a.o.cell <= 2; a.o.cell += 2)
                check(gives_up(entries[n], &a) >= LINES,
                      "called less than once for each query block");
        }
}

/* ---- Allocations that fail ------------------------------------------------------------------- */

/* Makes each allocation of the call fail in turn; returns how many there are. */
static int64_t survives(int entry, asked *a)
{
    for (int64_t n = 0;; n++) {
        check_case("%s of %s, allocation %lld", entry_name(entry),
                   sparge_backend_string(a->o.backend), (long long)n);
        sparge_error error;
        memset(&error, 'x', sizeof error);
        heap_arm(n);
        const sparge_status status = call(entry, a, n % 2 ? NULL : &error);
        heap.armed = false;
        check(heap.live == 0, "%lld allocations leak", (long long)heap.live);
        check(heap.stray == 0, "%d allocations in other threads", heap.stray);
        if (heap.calls <= n) {
            check(status == SPARGE_OK, "%s", sparge_status_string(status));
            return n;
        }
        check(status == SPARGE_ERR_MEMORY, "%s", sparge_status_string(status));
        check(n % 2 ||
                  (memchr(error.text, '\0', sizeof error.text) && strstr(error.text, "memory")),
              "it says \"%.40s\"", error.text);
    }
}

/* `way`: without and with smoothing, with the caller's mask and counts and with those of the call's
 * own, or with cells. */
static void every_allocation_fails(int entry, sparge_backend backend, sparge_dtype precision,
                                   int way)
{
    asked a = question();
    point(&a);
    a.o.backend = backend;
    a.o.threads = backend == SPARGE_CPU ? 3 : 0;
    a.o.qk_dtype = precision == SPARGE_F16 || precision == SPARGE_FP8 ? SPARGE_INT8 : precision;
    a.o.pv_dtype = precision;
    a.o.smooth_k = way % 2;
    a.o.cell = way / 2 == 2 ? 2 : 0;
    if (way / 2 == 1) {
        a.mask = entry == ALLOC || entry == PREDICT ? &a.m : NULL;
        a.result.head_counts = NULL;
    }
    const int64_t allocations = survives(entry, &a);
    check(allocations >= 1, "no allocation was seen: is the library static and --wrap in use?");
    check(entry == ALLOC || backend == SPARGE_CPU || allocations >= 5, "%lld allocations",
          (long long)allocations);
}

Test(api, every_allocation_may_fail)
{
    const int entries[] = {ALLOC, PREDICT, ATTEND, ATTENTION, ORACLE, BASELINE};
    for (int64_t n = 0; n < COUNT(entries); n++)
        for (int precision = 0; precision < 5; precision++)
            for (int way = 0; way < 6; way++)
                for (sparge_backend backend = SPARGE_REF; backend <= SPARGE_CPU; backend++)
                    if (backend == SPARGE_REF || (entries[n] & STAGES && precision < 3))
                        every_allocation_fails(entries[n], backend, precisions[precision], way);
}

/* The mask of a call on cuda that nobody wants stands in its workspace: the host allocates none.
 * (CUDA itself may allocate what it likes.) */
Test(api, cuda_allocates_no_host_mask)
{
    asked a = question();
    a.o.backend = SPARGE_CUDA;
    a.result.head_counts = NULL;
    if (sparge_backend_built(SPARGE_CUDA))
        return;
    heap_arm(-1);
    const sparge_status status = sparge_attention(&a.p, &a.o, &a.result, NULL);
    heap.armed = false;
    check_equal(status, SPARGE_ERR_UNSUPPORTED);
    check_equal(heap.calls, (int64_t)0);
}

/* The outputs that stand in memory of their own are not handed out when they are half made. */
Test(api, a_mask_that_could_not_be_allocated_is_empty)
{
    asked a = question();
    sparge_mask mask;
    memset(&mask, 0xFF, sizeof mask);
    heap_arm(0);
    const sparge_status status = sparge_mask_alloc(&mask, &a.p, &a.o, NULL);
    heap.armed = false;
    check_equal(status, SPARGE_ERR_MEMORY);
    check(!mask.bits && !mask.words && !mask.q_blocks, "not empty");
    sparge_mask_free(&mask);
}

/* ---- Threads --------------------------------------------------------------------------------- */

enum { THREADS = 4, TIMES = 6 };

typedef struct worker {
    problem x;
    answer alone;
    uint32_t *bits;
    pthread_barrier_t *start;
    int64_t wrong; /* calls that failed or gave other bits; Criterion is not for threads */
} worker;

static void *work(void *argument)
{
    worker *w = argument;
    const int64_t elements = tensor_count(&w->alone.o), rows = problem_rows(&w->x);
    const sparge_mask *shape_of_mask = &w->x.mask;
    const size_t words = (size_t)(shape_of_mask->batch * shape_of_mask->heads *
                                  shape_of_mask->q_blocks * shape_of_mask->words);
    float *o = malloc((size_t)elements * sizeof *o), *lse = malloc((size_t)rows * sizeof *lse);
    sparge_mask mask;
    if (!o || !lse || sparge_mask_alloc(&mask, &w->x.p, &w->x.o, NULL) != SPARGE_OK)
        abort();
    pthread_barrier_wait(w->start);
    for (int n = 0; n < TIMES; n++) {
        sparge_result result = {.o = tensor_out(&w->alone.o), .lse = lse, .mask = &mask};
        result.o.data = o;
        memset(o, 0xFF, (size_t)elements * sizeof *o);
        memset(mask.bits, 0xFF, words * sizeof *mask.bits);
        sparge_error error = {"poison"};
        w->wrong += sparge_attention(&w->x.p, &w->x.o, &result, &error) != SPARGE_OK ||
                    error.text[0] || memcmp(o, w->alone.o.x, (size_t)elements * sizeof *o) ||
                    memcmp(lse, w->alone.lse, (size_t)rows * sizeof *lse) ||
                    memcmp(mask.bits, shape_of_mask->bits, words * sizeof *mask.bits) ||
                    result.counts.pv_done != w->alone.result.counts.pv_done;
    }
    sparge_mask_free(&mask);
    free(o);
    free(lse);
    return NULL;
}

Test(api, threads_do_not_disturb_each_other)
{
    check_case("%d threads", THREADS);
    const shape shapes[THREADS] = {
        shape_of(1, 2, 1, 150, 170, 64, 32),
        shape_of(2, 1, 1, 90, 260, 48, 80),
        shape_of(1, 4, 2, 200, 33, 17, 16),
        shape_of(1, 1, 1, 128, 256, 128, 64),
    };
    worker workers[THREADS];
    pthread_t threads[THREADS];
    pthread_barrier_t start;
    cr_assert_eq(pthread_barrier_init(&start, NULL, THREADS), 0);
    for (int n = 0; n < THREADS; n++) {
        worker *w = &workers[n];
        *w = (worker){.x = problem_make(&shapes[n]), .start = &start};
        w->x.o.qk_dtype = n % 2 ? SPARGE_INT8 : SPARGE_INT12;
        w->x.o.pv_dtype = precisions[n % 3];
        w->x.o.causal = (sparge_causal)(n % 3);
        w->x.o.rules = n == 3 ? SPARGE_RULES_UPSTREAM : SPARGE_RULES_DEFAULT;
        w->x.o.thresholds = (sparge_thresholds){0.3f, 0.6f, SPARGE_OFF, -4, 0};
        mask_predict(&w->x);
        w->alone = attention(&w->x, &w->x.mask);
    }
    for (int n = 0; n < THREADS; n++)
        cr_assert_eq(pthread_create(&threads[n], NULL, work, &workers[n]), 0);
    for (int n = 0; n < THREADS; n++)
        cr_assert_eq(pthread_join(threads[n], NULL), 0);
    for (int n = 0; n < THREADS; n++) {
        check(workers[n].wrong == 0, "thread %d: %lld of %d calls gave something else", n,
              (long long)workers[n].wrong, TIMES);
        answer_free(&workers[n].alone);
        problem_free(&workers[n].x);
    }
    pthread_barrier_destroy(&start);
}

Test(api, ranges_by_name)
{
    static const struct {
        const char *name;
        double low, high;
    } table[] = {
        {"theta", -1, 1},
        {"tau", 0, 1},
        {"topk", 0, 1},
        {"lambda", -INFINITY, 0},
        {"min_mass", 0, 0x1.fffffep127},
        {"threads", 0, 1024},
        {"block_q", 1, 1024},
        {"block_k", 1, 1024},
        {"cell", 0, 1024},
        {"skip_rows", 0, 0x1p63},
        {"kernel", 0, 5},
        {"dim", 1, 256},
        {"softmax_scale", 0x1p-126, 0x1.fffffep127},
    };
    double low, high;
    for (int64_t n = 0; n < COUNT(table); n++) {
        check_case("%s", table[n].name);
        check(sparge_range(table[n].name, &low, &high), "no such number");
        check(low == table[n].low && high == table[n].high, "[%g, %g]", low, high);
    }
    check(!sparge_range("thet", &low, &high) && !sparge_range("thetas", &low, &high) &&
              !sparge_range(NULL, &low, &high),
          "what is no name");
}
