/* SPDX-License-Identifier: Apache-2.0 */
/* gate.c: reads the matrices of a gate. */
#include "tools/gate.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "tools/safetensors.h"

enum { NAME = 96 };

static bool holds(const safetensors *s, const char *name)
{
    size_t n = 0;
    while (n < safetensors_count(s) && strcmp(safetensors_name(s, n), name) != 0)
        n++;
    return n < safetensors_count(s);
}

/* The tensor of k or q: of the file's one gate, or of a layer of it. */
static void name_of(const safetensors *s, char which, int64_t layer, char name[NAME])
{
    if (holds(s, "gate_k") || layer < 0)
        snprintf(name, NAME, "gate_%c", which);
    else
        snprintf(name, NAME, "model.layers.%" PRId64 ".self_attn.attn_gate.mask_linear_%c.weight",
                 layer, which);
}

/* hidden: -1: whatever it is. */
static bool read_matrix(const file_input *in, const safetensors *s, const char *name, int64_t heads,
                        int64_t or_heads, int64_t rows, int64_t hidden, array *out)
{
    char shape[ARRAY_SHAPE_TEXT];
    if (!safetensors_tensor(s, name, out))
        return false;
    array_shape_string(out->rank, out->shape, shape);
    if (out->type != ARRAY_F16 && out->type != ARRAY_BF16 && out->type != ARRAY_F32)
        return input_fail(in, "key '%s': is %s, a gate is F16, BF16 or F32", name,
                          array_type_string(out->type));
    if (out->rank != 3 || (out->shape[0] != heads && out->shape[0] != or_heads) ||
        out->shape[1] != rows || (hidden >= 0 && out->shape[2] != hidden))
        return input_fail(in,
                          "key '%s': has the shape %s; for these heads it must be [%" PRId64
                          "%s, %" PRId64 ", %s]",
                          name, shape, heads, heads == or_heads ? "" : " or as many as of queries",
                          rows, hidden >= 0 ? "that of the keys" : "any");
    if (!array_to_f32(out, in->error))
        return false;
    const int64_t bad = array_nonfinite(out);
    return bad == 0 || input_fail(in, "key '%s': %" PRId64 " numbers are not finite", name, bad);
}

exit_code gate_read(const char *path, int64_t layer, double rope_base, int64_t heads,
                    int64_t kv_heads, int64_t dim, gate *out, file_error *error)
{
    file_input in;
    char k[NAME], q[NAME];
    *out = (gate){0};
    if (!input_open(path, &in, error))
        return EXIT_FILE;
    safetensors *s = safetensors_open(&in);
    bool ok = s != NULL;
    if (ok) {
        name_of(s, 'k', layer, k);
        name_of(s, 'q', layer, q);
        ok = read_matrix(&in, s, k, kv_heads, heads, 3 * dim, -1, &out->k);
    }
    if (ok && holds(s, q))
        ok = read_matrix(&in, s, q, heads, heads, dim, out->k.shape[2], &out->q);
    else if (ok && out->k.shape[2] != dim)
        ok = input_fail(&in,
                        "key '%s': no such tensor; without one of queries the last size of '%s' "
                        "must be %" PRId64,
                        q, k, dim);
    safetensors_close(s);
    input_close(&in);
    if (!ok) {
        gate_free(out);
        return EXIT_FILE;
    }
    out->c = (sparge_gate){.hidden = out->k.shape[2],
                           .k_heads = out->k.shape[0],
                           .rope_base = rope_base,
                           .q = out->q.data,
                           .k = out->k.data};
    return EXIT_FINE;
}

void gate_free(gate *g)
{
    array_free(&g->k);
    array_free(&g->q);
    *g = (gate){0};
}
