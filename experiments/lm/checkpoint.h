/* SPDX-License-Identifier: Apache-2.0 */
/* checkpoint.h: the files of a model, in memory: its sizes, its tensors by name, its tokens. What
 * is computed is of the bytes that were read, whatever happens to the files meanwhile. Two kinds
 * are read, a .gguf file (gguf.c), and a folder with config.json and .safetensors files (hf.c);
 * above this header they look the same. */
#ifndef SPARGE_LM_CHECKPOINT_H
#define SPARGE_LM_CHECKPOINT_H

#include <time.h>

#include "tools/program.h"

/* ---- Tensors ---- */

/* How elements stand in a file: one by one, or along a row in blocks of 32 (Q6_K: 256) small
 * integers with a common step. */
typedef enum tensor_type {
    TENSOR_F32,
    TENSOR_F16,
    TENSOR_BF16,
    TENSOR_Q8_0,
    TENSOR_Q4_0,
    TENSOR_Q4_1,
    TENSOR_Q6_K
} tensor_type;

/* [rows][columns]; a vector is one row. */
typedef struct tensor {
    const char *name; /* as GGUF has it: "blk.0.attn_q.weight" */
    tensor_type type;
    int64_t rows, columns;
    const uint8_t *data; /* in a file */
} tensor;

const char *tensor_type_string(tensor_type type);

/* Bytes of so many rows; 0 where columns are no whole blocks, or the product overflows. */
size_t tensor_bytes(tensor_type type, int64_t rows, int64_t columns);

/* Rows [first, first + rows) as floats [rows][columns]. */
void tensor_read(const tensor *t, int64_t first, int64_t rows, float *to);

/* ---- The model ---- */

typedef struct hyper {
    char architecture[16], name[96];
    int64_t layers, dim, hidden; /* hidden: of the feed-forward */
    int64_t heads, kv_heads, head_dim;
    int64_t vocab, context; /* tokens */
    float rope_theta, rms_eps;
    float rope_divisor[SPARGE_MAX_DIM /
                       2]; /* of each channel pair's frequency: 1, but in Llama 3.1 and later */
    bool interleaved; /* rows of q and k are in pairs that turn together, as GGUF has a llama; or in
                         halves */
    bool biases;      /* of q, k and v, as in Qwen2 */
    bool untied;      /* the output has weights of its own */
    bool tied; /* they are the embedding's; neither: it may have its own, or else they are the
                  embedding's */
} hyper;

/* A text in the file, without a zero at its end. */
typedef struct span {
    const char *text;
    size_t length;
} span;

/* Of a byte-level BPE; empty where the files have none. */
typedef struct vocabulary {
    char kind[24]; /* gpt2, GGUF's word for a byte-level BPE; or another */
    char
        splitter[24]; /* how text is cut before pairs are merged: smollm, llama-bpe, qwen2, gpt-2 */
    span *token, *merge;
    bool *kept; /* [tokens]: is it taken whole where its text occurs? or NULL */
    int64_t tokens, merges;
    int64_t bos; /* -1: none is put first */
} vocabulary;

typedef struct checkpoint {
    hyper hyper;
    vocabulary vocabulary;
    tensor *tensor; /* in the order of names */
    int64_t tensors;
    file_input *file;         /* with bytes, and open still; the last one has weights */
    struct timespec *changed; /* [files] when each was, before it was read */
    int64_t files;
    char **owned; /* names that are in no file */
    int64_t owns;
} checkpoint;

/* After failure *out is all 0. EXIT_FILE for what is wrong with a file, EXIT_UNSUPPORTED for a
 * model that is not known here, EXIT_MACHINE where it does not fit memory. */
exit_code checkpoint_open(const char *path, checkpoint *out, file_error *error);
void checkpoint_close(checkpoint *c);

/* EXIT_FILE, and a line, where a file is not as it was when it was read. */
exit_code checkpoint_check(const checkpoint *c);

/* NULL where there is none of that name. */
const tensor *checkpoint_find(const checkpoint *c, const char *name);

/* ---- For the readers ---- */

/* Reads one more file. The path must live as long as the checkpoint. */
exit_code checkpoint_load(checkpoint *c, const char *path, file_error *error);

/* A copy of a name that lives as long as the checkpoint; NULL: no memory. */
const char *checkpoint_name(checkpoint *c, const char *text, size_t length);

/* Text of a file that becomes text of ours: cut between characters where it is too long, '?' for
 * what is no UTF-8. */
void checkpoint_text(char *to, size_t size, const char *from, size_t length);

/* When all is read: do the sizes of the model fit together? Sorts the tensors. */
exit_code checkpoint_finish(checkpoint *c, const char *name, file_error *error);

/* Bytes that the machine can still give; infinite where it does not say. Memory that is promised
 * and not there ends the program without a word. */
double memory_available(void);

/* A GGUF file in memory; pointers go into it. */
exit_code gguf_read(const file_input *file, checkpoint *out);

/* A folder with config.json and .safetensors files. */
exit_code hf_read(const char *folder, checkpoint *out, file_error *error);

#endif
