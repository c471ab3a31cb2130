/* SPDX-License-Identifier: Apache-2.0 */
/* tokenizer.h: text to token numbers by a byte-level BPE, as GPT-2, Llama 3, Qwen2 and SmolLM have
 * it. */
#ifndef SPARGE_LM_TOKENIZER_H
#define SPARGE_LM_TOKENIZER_H

#include "experiments/lm/checkpoint.h"

typedef struct tokenizer tokenizer;

/* The checkpoint must outlive it. EXIT_UNSUPPORTED where the files have no such tokenizer, or one
 * that cuts text in an unknown way. */
exit_code tokenizer_open(const checkpoint *c, tokenizer **out, file_error *error);
void tokenizer_close(tokenizer *t); /* NULL is fine */

/* The tokens of a UTF-8 text, *token to be freed, without one that a model wants first. Tokens that
 * users of a model have added, like <think>, are taken whole; what would be a token that controls
 * it, like <|endoftext|>, is text like all text. The name is for the error. */
exit_code tokenizer_encode(const tokenizer *t, const char *name, const char *text, size_t length,
                           int32_t **token, int64_t *tokens, file_error *error);

/* How the vocabulary spells a token: bytes as GPT-2 shows them; empty of a number that only the
 * embedding has. */
span tokenizer_spelling(const tokenizer *t, int32_t token);

#endif
