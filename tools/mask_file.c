/* SPDX-License-Identifier: Apache-2.0 */
/* mask_file.c: masks read, checked and written. */
#include "tools/mask_file.h"

#include <inttypes.h>
#include <string.h>

#include "common/block_mask.h"
#include "sparge_mask.h"
#include "tools/intermediates.h"
#include "tools/npy.h"
#include "tools/safetensors.h"

enum { ARRAYS = 3, MAX_PAIRS = 1 << 30 };
static const char *const names[ARRAYS] = {"blocks", "partial_index", "partial_bits"};

/* ---- The arrays of a file ---- */

static bool is_bytes(const array *x) { return x->type == ARRAY_U8 || x->type == ARRAY_BOOL; }

static bool unfit(const char *path, const char *name, const array *x, const char *must,
                  file_error *error)
{
    char is[ARRAY_SHAPE_TEXT];
    array_shape_string(x->rank, x->shape, is);
    return file_error_set(error, path, "%s is %s %s, it must be %s", name,
                          array_type_string(x->type), is, must);
}

static bool check_entries(const char *path, const mask_arrays *x, file_error *error)
{
    const int64_t *entry = x->partial_index.data, *size = x->blocks.shape;
    int64_t before = -1;
    for (int64_t n = 0; n < x->partial_index.shape[0]; n++, entry += 4) {
        int64_t at = 0;
        bool inside = true;
        for (int d = 0; d < 4 && inside; d++) {
            inside = entry[d] >= 0 && entry[d] < size[d];
            at = at * size[d] + entry[d];
        }
        const char *wrong = !inside ? "is not in blocks"
                            : !((const uint8_t *)x->blocks.data)[at]
                                ? "is of a block that is not kept"
                            : at == before ? "is there twice"
                            : at < before  ? "comes after a later one; sort the entries"
                                           : NULL;
        if (wrong)
            return file_error_set(error, path,
                                  "partial_index[%" PRId64 "], (%" PRId64 ", %" PRId64 ", %" PRId64
                                  ", %" PRId64 "), %s",
                                  n, entry[0], entry[1], entry[2], entry[3], wrong);
        before = at;
    }
    return true;
}

static bool check_arrays(const char *path, const mask_arrays *x, file_error *error)
{
    if (!is_bytes(&x->blocks) || x->blocks.rank != 4)
        return unfit(path, names[0], &x->blocks,
                     "u8 or bool of four axes: batch, heads, blocks of queries, blocks of keys",
                     error);
    if (!x->partial_index.data)
        return true;
    if (x->partial_index.type != ARRAY_I64 || x->partial_index.rank != 2 ||
        x->partial_index.shape[1] != 4)
        return unfit(path, names[1], &x->partial_index,
                     "i64 (n, 4): batch, head, block of queries, block of keys", error);
    if (x->partial_bits.type != ARRAY_U8 || x->partial_bits.rank != 3 ||
        x->partial_bits.shape[0] != x->partial_index.shape[0])
        return unfit(path, names[2], &x->partial_bits,
                     "u8 (n, queries of a block, bytes of the bits of its keys), n as in "
                     "partial_index",
                     error);
    return check_entries(path, x, error);
}

static bool read_tensors(const file_input *in, mask_arrays *x)
{
    array *const to[ARRAYS] = {&x->blocks, &x->partial_index, &x->partial_bits};
    safetensors *t = safetensors_open(in);
    bool ok = t != NULL;
    int wanted = 1;
    for (size_t n = 0; ok && n < safetensors_count(t); n++)
        if (strncmp(safetensors_name(t, n), "partial_", 8) == 0)
            wanted = ARRAYS;
    for (int n = 0; ok && n < wanted; n++)
        ok = safetensors_tensor(t, names[n], to[n]);
    safetensors_close(t);
    return ok;
}

bool mask_arrays_read(const char *path, mask_arrays *out, file_error *error)
{
    file_input in;
    bool ok;
    *out = (mask_arrays){0};
    if (!safetensors_named(path))
        ok = npy_read(path, &out->blocks, error);
    else if ((ok = input_open(path, &in, error))) {
        ok = read_tensors(&in, out) && check_arrays(path, out, error);
        input_close(&in);
    }
    if (!ok)
        mask_arrays_free(out);
    return ok;
}

void mask_arrays_free(mask_arrays *from)
{
    array_free(&from->blocks);
    array_free(&from->partial_index);
    array_free(&from->partial_bits);
}

/* ---- Reading ---- */

static bool same_shape(const array *x, int rank, const int64_t *shape)
{
    return x->rank == rank && memcmp(x->shape, shape, (size_t)rank * sizeof *shape) == 0;
}

void mask_keep(sparge_mask *to, const uint8_t *keep)
{
    for (int64_t row = 0; row < to->batch * to->heads * to->q_blocks; row++)
        for (int64_t j = 0; j < to->k_blocks; j++)
            if (*keep++)
                sparge_mask_row_set(to->bits + row * to->words, j);
}

static void fill_partials(const mask_arrays *x, const sparge_options *o, sparge_mask *to)
{
    const int64_t count = x->partial_index.shape[0], rows = to->batch * to->heads * to->q_blocks;
    const int64_t words = sparge_mask_row_words(o->block_k), lines = count * o->block_q;
    const size_t bytes = (size_t)x->partial_bits.shape[2];
    const int64_t *entry = x->partial_index.data;
    to->partial_first = must_alloc((size_t)rows + 1, sizeof *to->partial_first, "the mask");
    to->partial_block = must_alloc((size_t)count, sizeof *to->partial_block, "the mask");
    to->partial_bits = must_alloc((size_t)lines, (size_t)words * sizeof(uint32_t), "the mask");
    for (int64_t n = 0; n < count; n++, entry += 4) {
        to->partial_first[(entry[0] * to->heads + entry[1]) * to->q_blocks + entry[2] + 1]++;
        to->partial_block[n] = (int32_t)entry[3];
    }
    for (int64_t row = 0; row < rows; row++)
        to->partial_first[row + 1] += to->partial_first[row];
    for (int64_t line = 0; line < lines; line++) /* both have the lowest bit first */
        memcpy(to->partial_bits + line * words,
               (const uint8_t *)x->partial_bits.data + (size_t)line * bytes, bytes);
}

void mask_read(const char *path, const sparge_problem *p, const sparge_options *o, sparge_mask *out)
{
    mask_arrays x;
    char must[2 * ARRAY_SHAPE_TEXT], expected[ARRAY_SHAPE_TEXT];
    must_do(mask_arrays_read(path, &x, &failure));
    must_sparge(sparge_mask_alloc(out, p, o, &library_error));
    const int64_t shape[] = {out->batch, out->heads, out->q_blocks, out->k_blocks};
    const int64_t partials = x.partial_index.data ? x.partial_index.shape[0] : 0;
    const int64_t bits[] = {partials, o->block_q, sparge_ceil_div(o->block_k, 8)};
    if (!is_bytes(&x.blocks) || !same_shape(&x.blocks, 4, shape)) {
        array_shape_string(4, shape, expected);
        snprintf(must, sizeof must,
                 "u8 or bool %s: batch, heads, blocks of %" PRId64 " queries, blocks of %" PRId64
                 " keys",
                 expected, o->block_q, o->block_k);
        must_do(unfit(path, "the mask", &x.blocks, must, &failure));
    }
    if (x.partial_index.data && !same_shape(&x.partial_bits, 3, bits)) {
        array_shape_string(3, bits, expected);
        snprintf(must, sizeof must, "u8 %s for blocks of %" PRId64 " queries and %" PRId64 " keys",
                 expected, o->block_q, o->block_k);
        must_do(unfit(path, names[2], &x.partial_bits, must, &failure));
    }
    mask_keep(out, x.blocks.data);
    if (partials)
        fill_partials(&x, o, out);
    mask_arrays_free(&x);
}

void mask_read_pairs(const char *path, const sparge_problem *p, const sparge_options *o,
                     sparge_mask *out)
{
    const int64_t shape[] = {p->batch, p->heads, p->q_len, p->k_len};
    array x;
    must_do(npy_read(path, &x, &failure));
    if (!is_bytes(&x) || !same_shape(&x, 4, shape)) {
        char must[2 * ARRAY_SHAPE_TEXT], expected[ARRAY_SHAPE_TEXT];
        array_shape_string(4, shape, expected);
        snprintf(must, sizeof must, "u8 or bool %s: batch, heads, queries, keys", expected);
        must_do(unfit(path, "the mask", &x, must, &failure));
    }
    must_sparge(sparge_mask_from_pairs(out, p, o, x.data, &library_error));
    array_free(&x);
}

/* ---- Writing ---- */

/* Entries of a mask's partly attended blocks, also of those that no query sees. */
static int64_t count_partials(const sparge_mask *mask)
{
    return mask && mask->partial_first
               ? mask->partial_first[mask->batch * mask->heads * mask->q_blocks]
               : 0;
}

void mask_writable(const char *path, const sparge_mask *mask)
{
    const int64_t partials = count_partials(mask);
    if (path && partials && !safetensors_named(path))
        fail(EXIT_USAGE, path,
             "the mask has %" PRId64 " partly attended blocks, which a .npy does not hold; let the "
             "name end in .safetensors",
             partials);
}

void mask_pairs_writable(const char *path, const sparge_problem *p)
{
    const double pairs = (double)p->batch * (double)p->heads * (double)p->q_len * (double)p->k_len;
    if (path && pairs > (double)MAX_PAIRS)
        fail(
            EXIT_USAGE, path,
            "would be %.0f bytes, one for each pair; at most 2^30 are written; take fewer heads or "
            "tokens",
            pairs);
}

/* Those of the blocks that the first array has. */
static void describe_partials(const sparge_mask *mask, const sparge_options *o, mask_arrays *x)
{
    const int64_t count = count_partials(mask), bytes = sparge_ceil_div(o->block_k, 8);
    const int64_t words = sparge_mask_row_words(o->block_k);
    must_have(array_alloc(ARRAY_I64, 2, (int64_t[]){count, 4}, &x->partial_index, &failure) &&
              array_alloc(ARRAY_U8, 3, (int64_t[]){count, o->block_q, bytes}, &x->partial_bits,
                          &failure));
    int64_t *entry = x->partial_index.data, row = 0;
    uint8_t *bits = x->partial_bits.data;
    for (int64_t n = 0; n < count; n++) {
        const int64_t j = mask->partial_block[n];
        while (n >= mask->partial_first[row + 1])
            row++;
        if (!((const uint8_t *)x->blocks.data)[row * mask->k_blocks + j])
            continue;
        const int64_t head = row / mask->q_blocks;
        *entry++ = head / mask->heads;
        *entry++ = head % mask->heads;
        *entry++ = row % mask->q_blocks;
        *entry++ = j;
        for (int64_t r = 0; r < o->block_q; r++, bits += bytes)
            memcpy(bits, mask->partial_bits + (n * o->block_q + r) * words, (size_t)bytes);
    }
    x->partial_index.shape[0] = x->partial_bits.shape[0] =
        (entry - (int64_t *)x->partial_index.data) / 4;
}

void mask_write(FILE *stream, const char *path, const sparge_mask *mask, const sparge_problem *p,
                const sparge_options *o)
{
    mask_arrays x = {0};
    mask_writable(path, mask);
    mask_array(mask, p, o, &x.blocks);
    if (safetensors_named(path)) {
        describe_partials(mask, o, &x);
        /* The integers first, so that they lie at a multiple of 8. */
        must_do(safetensors_write(stream, path, (const char *[]){names[1], names[0], names[2]},
                                  ARRAYS, (array[]){x.partial_index, x.blocks, x.partial_bits},
                                  &failure));
    } else
        must_do(npy_write(stream, path, &x.blocks, &failure));
    mask_arrays_free(&x);
}

void mask_write_pairs(FILE *stream, const char *path, const sparge_mask *mask,
                      const sparge_problem *p, const sparge_options *o)
{
    array x;
    mask_pairs_writable(path, p);
    must_have(array_alloc(ARRAY_U8, 4, (int64_t[]){p->batch, p->heads, p->q_len, p->k_len}, &x,
                          &failure));
    must_sparge(sparge_mask_to_pairs(mask, p, o, x.data, &library_error));
    must_do(npy_write(stream, path, &x, &failure));
    array_free(&x);
}
