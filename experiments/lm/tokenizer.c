/* SPDX-License-Identifier: Apache-2.0 */
/* tokenizer.c: byte-level BPE. Text is cut into words by regular expressions. A word is a row of
 * bytes; the pair of neighbours that stands first in the list of merges becomes one token, the
 * leftmost of such pairs first, and so on until no pair is in the list. In the vocabulary a byte is
 * shown as a printable character (Radford et al. 2019). */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "experiments/lm/tokenizer.h"

#include <inttypes.h>
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

/* ---- How text is cut ---- */

/* Each cuts what the one before it left; what lies between two matches is a word too. Spaces are
 * those of Unicode, of which PCRE's \s has one more, U+180E. */
#define SPACES \
    "\\t-\\r " \
    "\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define DIGIT "\\p{N}"
#define GPT2                                                                         \
    "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^" SPACES "\\p{L}\\p{N}]+|[" SPACES \
    "]+(?![^" SPACES "])|[" SPACES "]+"
#define LLAMA3_WITH(digits)                                                             \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits "| ?[^" SPACES \
    "\\p{L}\\p{N}]+[\\r\\n]*|[" SPACES "]*[\\r\\n]+|[" SPACES "]+(?![^" SPACES "])|[" SPACES "]+"

enum { CUTS = 2 };

static const struct {
    const char *name;
    const char *pattern[CUTS];
    bool whole_words; /* a word that is a token is one, whatever the merges say */
} splitters[] = {
    {"smollm", {DIGIT, GPT2}, false},
    {"gpt-2", {GPT2}, false},
    {"llama-bpe", {LLAMA3_WITH("\\p{N}{1,3}")}, true},
    {"qwen2", {LLAMA3_WITH("\\p{N}")}, false},
};

/* ---- The tables ---- */

typedef struct merge {
    int32_t left, right, rank, whole;
} merge;

struct tokenizer {
    const vocabulary *v;
    int32_t *by_text; /* [tokens] numbers, in the order of spellings */
    int32_t
        *kept; /* [keeps] tokens that are taken whole where their text occurs, long ones first */
    int64_t keeps;
    merge *merge; /* [merges] in the order of left and right */
    int64_t merges;
    int32_t byte[256]; /* the token of each; -1: none, of what no text held that it was made from */
    char shown[256][3];
    bool whole_words;
    pcre2_code *cut[CUTS];
};

static int compare_pieces(span a, span b)
{
    const size_t shorter = a.length < b.length ? a.length : b.length;
    const int order = memcmp(a.text, b.text, shorter);
    return order ? order : (a.length > b.length) - (a.length < b.length);
}

/* -1 where no token is spelled so. */
static int32_t find_token(const tokenizer *t, span text)
{
    int64_t low = 0, high = t->v->tokens;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        const int order = compare_pieces(t->v->token[t->by_text[middle]], text);
        if (order == 0)
            return t->by_text[middle];
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return -1;
}

static int by_pair(const void *a, const void *b)
{
    const merge *x = a, *y = b;
    return x->left != y->left ? (x->left > y->left) - (x->left < y->left)
                              : (x->right > y->right) - (x->right < y->right);
}

static const merge *find_merge(const tokenizer *t, int32_t left, int32_t right)
{
    const merge wanted = {.left = left, .right = right};
    return bsearch(&wanted, t->merge, (size_t)t->merges, sizeof wanted, by_pair);
}

/* The character that shows a byte: itself where it is printable in Latin-1, or else the next one
 * from U+0100 on. */
static void show_bytes(char text[256][3])
{
    int next = 0x100;
    for (int byte = 0; byte < 256; byte++) {
        const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
        const int character = printable ? byte : next++;
        if (character < 0x80)
            snprintf(text[byte], 3, "%c", character);
        else
            snprintf(text[byte], 3, "%c%c", 0xc0 | character >> 6, 0x80 | (character & 0x3f));
    }
}

static int by_spelling(const void *a, const void *b, void *vocabulary_of)
{
    const vocabulary *v = vocabulary_of;
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    const int order = compare_pieces(v->token[x], v->token[y]);
    return order ? order : (x > y) - (x < y);
}

static int by_length(const void *a, const void *b, void *vocabulary_of)
{
    const vocabulary *v = vocabulary_of;
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    const size_t one = v->token[x].length, other = v->token[y].length;
    return one != other ? (one < other) - (one > other) : (x > y) - (x < y);
}

/* "Ġ t": what it merges, and into what; false where one of the three is no token. */
static bool parse_merge(const tokenizer *t, span text, int32_t rank, merge *to)
{
    const char *space = memchr(text.text + (text.length > 0), ' ', text.length - (text.length > 0));
    if (!space)
        return false;
    const size_t left = (size_t)(space - text.text), right = text.length - left - 1;
    char whole[1024];
    if (left + right > sizeof whole)
        return false;
    memcpy(whole, text.text, left);
    memcpy(whole + left, space + 1, right);
    *to = (merge){
        .left = find_token(t, (span){text.text, left}),
        .right = find_token(t, (span){space + 1, right}),
        .rank = rank,
        .whole = find_token(t, (span){whole, left + right}),
    };
    return to->left >= 0 && to->right >= 0 && to->whole >= 0;
}

static exit_code make_tables(tokenizer *t, const char *name, file_error *error)
{
    const vocabulary *v = t->v;
    t->by_text = malloc(((size_t)v->tokens + 1) * sizeof *t->by_text);
    t->merge = malloc(((size_t)v->merges + 1) * sizeof *t->merge);
    t->kept = malloc(((size_t)v->tokens + 1) * sizeof *t->kept);
    if (!t->by_text || !t->merge || !t->kept) {
        file_error_set(error, name, "no memory for its %" PRId64 " tokens", v->tokens);
        return EXIT_MACHINE;
    }
    for (int64_t n = 0; n < v->tokens; n++) {
        t->by_text[n] = (int32_t)n;
        if (v->kept && v->kept[n] && v->token[n].length > 0)
            t->kept[t->keeps++] = (int32_t)n;
    }
    qsort_r(t->by_text, (size_t)v->tokens, sizeof *t->by_text, by_spelling, (void *)v);
    qsort_r(t->kept, (size_t)t->keeps, sizeof *t->kept, by_length, (void *)v);
    for (int64_t n = 0; n < v->merges; n++, t->merges++)
        if (!parse_merge(t, v->merge[n], (int32_t)n, &t->merge[n])) {
            file_error_set(
                error, name, "merge %" PRId64 ", '%.*s', is not of two tokens into a third", n,
                (int)(v->merge[n].length < 80 ? v->merge[n].length : 80), v->merge[n].text);
            return EXIT_FILE;
        }
    qsort(t->merge, (size_t)t->merges, sizeof *t->merge, by_pair);
    show_bytes(t->shown);
    for (int byte = 0; byte < 256; byte++)
        t->byte[byte] = find_token(t, (span){t->shown[byte], strlen(t->shown[byte])});
    return EXIT_FINE;
}

exit_code tokenizer_open(const checkpoint *c, tokenizer **out, file_error *error)
{
    const char *name = c->hyper.name, *splitter = c->vocabulary.splitter;
    size_t kind = 0;
    enum { KINDS = sizeof splitters / sizeof *splitters };
    *out = NULL;
    if (c->vocabulary.kind[0] && strcmp(c->vocabulary.kind, "gpt2") != 0) {
        file_error_set(error, name,
                       "its vocabulary is of the kind '%s'; a byte-level BPE, 'gpt2', is known; "
                       "give a .npy of token numbers in place of text",
                       c->vocabulary.kind);
        return EXIT_UNSUPPORTED;
    }
    if (c->vocabulary.tokens == 0 || c->vocabulary.merges == 0) {
        file_error_set(
            error, name,
            "its files have no byte-level BPE; give a .npy of token numbers in place of text");
        return EXIT_UNSUPPORTED;
    }
    while (kind < KINDS && strcmp(splitters[kind].name, splitter) != 0)
        kind++;
    if (kind == KINDS) {
        file_error_set(error, name,
                       "its tokenizer %s%s; smollm, gpt-2, llama-bpe and qwen2 are known; give a "
                       ".npy of token numbers in place of text",
                       *splitter ? "cuts text like "
                                 : "does not say how it cuts text ('tokenizer.ggml.pre')",
                       splitter);
        return EXIT_UNSUPPORTED;
    }
    tokenizer *t = calloc(1, sizeof *t);
    if (!t) {
        file_error_set(error, name, "no memory for its tokenizer");
        return EXIT_MACHINE;
    }
    t->v = &c->vocabulary;
    t->whole_words = splitters[kind].whole_words;
    exit_code code = make_tables(t, name, error);
    for (int n = 0; n < CUTS && splitters[kind].pattern[n] && !code; n++) {
        int why;
        size_t where;
        t->cut[n] = pcre2_compile((PCRE2_SPTR)splitters[kind].pattern[n], PCRE2_ZERO_TERMINATED,
                                  PCRE2_UTF | PCRE2_UCP, &why, &where, NULL);
        if (!t->cut[n]) {
            file_error_set(error, name, "no memory for its tokenizer");
            code = EXIT_MACHINE;
        } else
            pcre2_jit_compile(t->cut[n],
                              PCRE2_JIT_COMPLETE); /* where it cannot, matching is slower */
    }
    if (code)
        tokenizer_close(t);
    else
        *out = t;
    return code;
}

void tokenizer_close(tokenizer *t)
{
    if (!t)
        return;
    for (int n = 0; n < CUTS; n++)
        pcre2_code_free(t->cut[n]);
    free(t->by_text);
    free(t->merge);
    free(t->kept);
    free(t);
}

span tokenizer_spelling(const tokenizer *t, int32_t token)
{
    return token < t->v->tokens ? t->v->token[token] : (span){"", 0};
}

/* ---- Words to tokens ---- */

/* Of a word, in a list that merges make shorter. */
typedef struct symbol {
    int32_t token;         /* -1: it has become a part of the one before it */
    int32_t before, after; /* -1: none */
} symbol;

/* A merge that may be due: of a symbol and the one after it. */
typedef struct due {
    int32_t rank, at, whole;
} due;

typedef struct encoding {
    const tokenizer *t;
    const char *text, *name;
    int32_t *token; /* one for each byte is enough, and one more is there */
    int64_t tokens;
    symbol *symbol; /* [capacity] */
    due *heap;      /* [3 * capacity], the first to come on top */
    int64_t capacity, dues;
    file_error *error;
} encoding;

static bool comes_before(const due *a, const due *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void push(encoding *e, due x)
{
    int64_t n = e->dues++;
    for (; n > 0 && comes_before(&x, &e->heap[(n - 1) / 2]); n = (n - 1) / 2)
        e->heap[n] = e->heap[(n - 1) / 2];
    e->heap[n] = x;
}

static due pop(encoding *e)
{
    const due top = e->heap[0], last = e->heap[--e->dues];
    int64_t n = 0;
    for (int64_t child = 1; child < e->dues; child = 2 * n + 1) {
        child += child + 1 < e->dues && comes_before(&e->heap[child + 1], &e->heap[child]);
        if (!comes_before(&e->heap[child], &last))
            break;
        e->heap[n] = e->heap[child];
        n = child;
    }
    e->heap[n] = last;
    return top;
}

/* The merge of a symbol and the one after it; NULL: none, or there are no two. */
static const merge *merge_at(const encoding *e, int32_t at)
{
    const symbol *s = e->symbol;
    if (at < 0 || s[at].token < 0 || s[at].after < 0)
        return NULL;
    return find_merge(e->t, s[at].token, s[s[at].after].token);
}

static void push_merge(encoding *e, int32_t at)
{
    const merge *m = merge_at(e, at);
    if (m)
        push(e, (due){m->rank, at, m->whole});
}

/* The first of these symbols becomes as few as the merges make of them. */
static void merge_word(encoding *e, int64_t count)
{
    symbol *s = e->symbol;
    for (int64_t n = 0; n + 1 < count; n++)
        push_merge(e, (int32_t)n);
    while (e->dues > 0) {
        const due next = pop(e);
        const merge *m = merge_at(e, next.at);
        if (!m || m->whole != next.whole) /* other merges have come before it */
            continue;
        symbol *left = &s[next.at], *right = &s[left->after];
        left->token = m->whole;
        left->after = right->after;
        right->token = -1;
        if (left->after >= 0)
            s[left->after].before = next.at;
        push_merge(e, left->before);
        push_merge(e, next.at);
    }
}

/* Symbols for so many bytes; each merge leaves one less, and may bring two more on the heap. */
static bool make_room(encoding *e, int64_t count)
{
    if (count <= e->capacity)
        return true;
    symbol *symbols = realloc(e->symbol, (size_t)count * sizeof *symbols);
    e->symbol = symbols ? symbols : e->symbol;
    due *heap = symbols ? realloc(e->heap, 3 * (size_t)count * sizeof *heap) : NULL;
    e->heap = heap ? heap : e->heap;
    e->capacity = heap ? count : e->capacity;
    return heap != NULL;
}

/* -1 where no token is this word. */
static int32_t find_word(const tokenizer *t, const char *word, size_t length)
{
    char text[1024];
    size_t used = 0;
    for (size_t n = 0; n < length && used < sizeof text - 3; n++)
        used += (size_t)snprintf(text + used, 3, "%s", t->shown[(uint8_t)word[n]]);
    return used < sizeof text - 3 ? find_token(t, (span){text, used}) : -1;
}

static exit_code encode_word(encoding *e, size_t begin, size_t end)
{
    const int64_t count = (int64_t)(end - begin);
    const int32_t whole = e->t->whole_words ? find_word(e->t, e->text + begin, end - begin) : -1;
    if (whole >= 0) {
        e->token[e->tokens++] = whole;
        return EXIT_FINE;
    }
    if (!make_room(e, count)) {
        file_error_set(e->error, e->name, "no memory for a word of %" PRId64 " bytes", count);
        return EXIT_MACHINE;
    }
    for (int32_t n = 0; n < count; n++) {
        const uint8_t byte = (uint8_t)e->text[begin + (size_t)n];
        e->symbol[n] = (symbol){e->t->byte[byte], n - 1, n + 1 < count ? n + 1 : -1};
        if (e->symbol[n].token < 0) {
            file_error_set(e->error, e->name,
                           "byte %zu: 0x%02x has no token in this vocabulary; take it out",
                           begin + (size_t)n, byte);
            return EXIT_FILE;
        }
    }
    merge_word(e, count);
    for (int32_t n = 0; n >= 0; n = e->symbol[n].after)
        e->token[e->tokens++] = e->symbol[n].token;
    return EXIT_FINE;
}

/* ---- Text to words ---- */

/* Words of text [begin, end) by pattern `level` and those after it. */
static exit_code cut(encoding *e, int level, size_t begin, size_t end)
{
    if (level == CUTS || !e->t->cut[level])
        return begin < end ? encode_word(e, begin, end) : EXIT_FINE;
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    exit_code code = match ? EXIT_FINE : EXIT_MACHINE;
    if (code)
        file_error_set(e->error, e->name, "no memory to cut it into words");
    while (begin < end && !code) {
        /* Looking ahead sees what this level was given, and no more. */
        const int found = pcre2_match(e->t->cut[level], (PCRE2_SPTR)e->text, end, begin,
                                      PCRE2_NO_UTF_CHECK, match, NULL);
        const size_t *at = pcre2_get_ovector_pointer(match);
        const size_t from = found > 0 ? at[0] : end, to = found > 0 ? at[1] : end;
        if (found < 0 && found != PCRE2_ERROR_NOMATCH) {
            const bool memory = found == PCRE2_ERROR_NOMEMORY;
            file_error_set(e->error, e->name, "byte %zu: %s", begin,
                           memory ? "no memory to cut it" : "too long a word");
            code = memory ? EXIT_MACHINE : EXIT_FILE;
        }
        if (!code)
            code = cut(e, level + 1, begin, from);
        if (!code)
            code = cut(e, level + 1, from, to);
        begin = to;
    }
    pcre2_match_data_free(match);
    return code;
}

/* A first match looks at all bytes. */
static exit_code check_utf8(const encoding *e, size_t length)
{
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    const int found =
        match ? pcre2_match(e->t->cut[0], (PCRE2_SPTR)e->text, length, 0, 0, match, NULL) : 0;
    const bool utf8 = found > PCRE2_ERROR_UTF8_ERR1 || found < PCRE2_ERROR_UTF8_ERR21;
    if (!match)
        file_error_set(e->error, e->name, "no memory to cut it into words");
    else if (!utf8)
        file_error_set(e->error, e->name, "byte %zu: is no UTF-8; convert it with iconv",
                       pcre2_get_startchar(match));
    pcre2_match_data_free(match);
    return !match ? EXIT_MACHINE : utf8 ? EXIT_FINE : EXIT_FILE;
}

enum { FREE = -1, TAKEN = -2 };

static bool begins_character(char byte) { return ((uint8_t)byte & 0xc0) != 0x80; }

/* Is the text [at, at + size) whole characters, which no token has? */
static bool is_free(const encoding *e, const int32_t *owner, size_t at, size_t size, size_t length)
{
    bool open = begins_character(e->text[at]) &&
                (at + size == length || begins_character(e->text[at + size]));
    for (size_t n = 0; n < size && open; n++)
        open = owner[at + n] == FREE;
    return open;
}

/* Gives bytes of the text to tokens that are kept whole, the longest first, as llama.cpp does.
 * owner [length]: at the first byte of a token its number. */
static void give_whole(const encoding *e, size_t length, int32_t *owner)
{
    for (size_t n = 0; n < length; n++)
        owner[n] = FREE;
    for (int64_t k = 0; k < e->t->keeps; k++) {
        const span s = e->t->v->token[e->t->kept[k]];
        const char *found = e->text;
        while ((found = memmem(found, length - (size_t)(found - e->text), s.text, s.length))) {
            const size_t at = (size_t)(found - e->text);
            const bool open = is_free(e, owner, at, s.length, length);
            for (size_t n = 0; n < s.length && open; n++)
                owner[at + n] = n ? TAKEN : e->t->kept[k];
            found += open ? s.length : 1;
        }
    }
}

/* Tokens that are kept whole, and what lies between them. */
static exit_code encode_text(encoding *e, size_t length)
{
    if (e->t->keeps == 0)
        return cut(e, 0, 0, length);
    int32_t *owner = malloc((length + 1) * sizeof *owner);
    if (!owner) {
        file_error_set(e->error, e->name, "no memory for its tokens");
        return EXIT_MACHINE;
    }
    give_whole(e, length, owner);
    exit_code code = EXIT_FINE;
    size_t end = 0;
    for (size_t begin = 0; begin < length && !code; begin = end) {
        const int32_t whole = owner[begin];
        for (end = begin + 1; end < length && owner[end] == (whole == FREE ? FREE : TAKEN);)
            end++;
        if (whole == FREE)
            code = cut(e, 0, begin, end);
        else
            e->token[e->tokens++] = whole;
    }
    free(owner);
    return code;
}

exit_code tokenizer_encode(const tokenizer *t, const char *name, const char *text, size_t length,
                           int32_t **token, int64_t *tokens, file_error *error)
{
    encoding e = {.t = t, .text = text, .name = name, .error = error};
    *token = NULL;
    *tokens = 0;
    e.token = malloc((length + 1) * sizeof *e.token);
    exit_code code = e.token ? check_utf8(&e, length) : EXIT_MACHINE;
    if (!e.token)
        file_error_set(error, name, "no memory for its tokens");
    if (!code)
        code = encode_text(&e, length);
    free(e.symbol);
    free(e.heap);
    if (code) {
        free(e.token);
        return code;
    }
    *token = e.token;
    *tokens = e.tokens;
    return EXIT_FINE;
}
