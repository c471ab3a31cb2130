/* SPDX-License-Identifier: Apache-2.0 */
/* intermediates.c: what the intermediate results are called, how large they are, and their files.
 */
#include "tools/intermediates.h"

#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include "common/quant.h"
#include "tools/npy.h"

#define FIELD(field) offsetof(sparge_intermediates, field)

const intermediate intermediate_table[INTERMEDIATE_COUNT] = {
    [INTERMEDIATE_BLOCKS] = {"blocks", "2", ARRAY_I64, ALWAYS, 0}, /* block_q, block_k */
    {"k_mean", "bgd", ARRAY_F32, SMOOTHED, FIELD(k_mean)},
    {"k_pool", "bgjd", ARRAY_F32, POOLED, FIELD(k_pool)},
    {"k_sim", "bgj", ARRAY_F32, PREDICTED, FIELD(k_sim)},
    {"q_pool", "bhid", ARRAY_F32, POOLED, FIELD(q_pool)},
    {"q_sim", "bhi", ARRAY_F32, PREDICTED, FIELD(q_sim)},
    {"S_all", "bhij", ARRAY_F32, PREDICTED, FIELD(s_all)},
    {"S", "bhij", ARRAY_F32, PREDICTED, FIELD(s)},
    [INTERMEDIATE_WHY] = {"why", "bhij", ARRAY_U8, PREDICTED,
                          FIELD(why)}, /* bits of sparge_reason */
    [INTERMEDIATE_MASK] = {"mask", "bhij", ARRAY_U8, ALWAYS, 0},
    {"q_scale", "bhi", ARRAY_F32, QK_CODES, FIELD(q_scale)},
    {"q_int", "bhqd", ARRAY_I16, QK_CODES, FIELD(q_int)},
    {"k_scale", "bgj", ARRAY_F32, QK_CODES, FIELD(k_scale)},
    {"k_int", "bgkd", ARRAY_I16, QK_CODES, FIELD(k_int)},
    {"v_scale", "bgjv", ARRAY_F32, PV_CODES, FIELD(v_scale)},
    {"v_int", "bgkv", ARRAY_I16, PV_CODES, FIELD(v_int)},
    {"pv_done", "bhij", ARRAY_F32, ATTENDED, FIELD(pv_done)},
    {"m", "bhq", ARRAY_F32, ATTENDED, FIELD(m)},
    {"l", "bhq", ARRAY_F32, ATTENDED, FIELD(l)},
    [INTERMEDIATE_O] = {"o", "bhqv", ARRAY_F32, ATTENDED, 0},
};

static int64_t axis_size(char axis, const sparge_problem *p, const sparge_options *o)
{
    switch (axis) {
    case 'b': return p->batch;
    case 'h': return p->heads;
    case 'g': return p->kv_heads;
    case 'q': return p->q_len;
    case 'k': return p->k_len;
    case 'i': return sparge_ceil_div(p->q_len, o->block_q);
    case 'j': return sparge_ceil_div(p->k_len, o->block_k);
    case 'd': return p->dim;
    case 'v': return p->dim_v;
    default: return 2;
    }
}

void intermediates_alloc(const char *axes, array_type type, const sparge_problem *p,
                         const sparge_options *o, array *out)
{
    int64_t shape[ARRAY_MAX_RANK];
    const int rank = (int)strlen(axes);
    for (int d = 0; d < rank; d++)
        shape[d] = axis_size(axes[d], p, o);
    must_have(array_alloc(type, rank, shape, out, &failure));
}

bool intermediate_recorded(int n)
{
    return n != INTERMEDIATE_BLOCKS && n != INTERMEDIATE_MASK && n != INTERMEDIATE_O;
}

int64_t intermediate_bytes(int n, const sparge_problem *p, const sparge_options *o)
{
    int64_t bytes = (int64_t)array_type_size(intermediate_table[n].type);
    for (const char *axis = intermediate_table[n].axes; *axis; axis++)
        bytes *= axis_size(*axis, p, o);
    return bytes;
}

void intermediates_make_one(intermediate_arrays *d, int n, const sparge_problem *p,
                            const sparge_options *o)
{
    intermediates_alloc(intermediate_table[n].axes, intermediate_table[n].type, p, o, &d->array[n]);
    if (intermediate_recorded(n))
        memcpy((char *)&d->intermediates + intermediate_table[n].field, &d->array[n].data,
               sizeof(void *));
}

void intermediates_make(intermediate_arrays *d, const sparge_problem *p, const sparge_options *o,
                        bool predicts, bool attends)
{
    const bool wanted[] = {
        [ALWAYS] = true,
        [PREDICTED] = predicts,
        [POOLED] = predicts && !o->cell,
        [SMOOTHED] = o->smooth_k && (predicts || attends),
        [ATTENDED] = attends,
        [QK_CODES] = attends && sparge_qk_qmax(o->qk_dtype),
        [PV_CODES] = attends && sparge_pv_qmax(o->pv_dtype),
    };
    d->attends = attends;
    for (int n = 0; n < INTERMEDIATE_COUNT; n++)
        if (wanted[intermediate_table[n].when] && n != INTERMEDIATE_MASK && n != INTERMEDIATE_O)
            intermediates_make_one(d, n, p, o);
    memcpy(d->array[INTERMEDIATE_BLOCKS].data, (const int64_t[]){o->block_q, o->block_k}, 16);
}

void intermediates_path(const char *folder, int n, char path[PATH_MAX])
{
    snprintf(path, PATH_MAX, "%s/%s.npy", folder, intermediate_table[n].name);
}

void intermediates_open(intermediate_arrays *d, const char *folder)
{
    d->folder = folder;
    must_do(output_folder(folder, &failure));
    for (int n = 0; n < INTERMEDIATE_COUNT; n++) {
        char path[PATH_MAX];
        intermediates_path(folder, n, path);
        if (d->array[n].data || n == INTERMEDIATE_MASK || (n == INTERMEDIATE_O && d->attends))
            must_do((d->file[n] = output_open(path, &failure)));
    }
}

void intermediates_write(const intermediate_arrays *d)
{
    for (int n = 0; n < INTERMEDIATE_COUNT && d->folder; n++) {
        char path[PATH_MAX];
        intermediates_path(d->folder, n, path);
        must_do(!d->file[n] || npy_write(output_stream(d->file[n]), path, &d->array[n], &failure));
    }
}

void intermediates_tidy(const intermediate_arrays *d)
{
    for (int n = 0; n < INTERMEDIATE_COUNT && d->folder; n++) {
        char path[PATH_MAX];
        intermediates_path(d->folder, n, path);
        if (!d->file[n])
            unlink(path);
    }
}

void intermediates_free(intermediate_arrays *d)
{
    for (int n = 0; n < INTERMEDIATE_COUNT; n++)
        array_free(&d->array[n]);
}

sparge_geometry geometry_of(const sparge_problem *p, const sparge_options *o)
{
    return sparge_geometry_of(p, o);
}

void mask_array(const sparge_mask *mask, const sparge_problem *p, const sparge_options *o,
                array *out)
{
    const sparge_geometry g = geometry_of(p, o);
    intermediates_alloc("bhij", ARRAY_U8, p, o, out);
    uint8_t *keep = out->data;
    for (int64_t b = 0; b < out->shape[0]; b++)
        for (int64_t h = 0; h < out->shape[1]; h++)
            for (int64_t i = 0; i < out->shape[2]; i++)
                for (int64_t j = 0; j < out->shape[3]; j++)
                    *keep++ = j < sparge_blocks_visible(&g, i) &&
                              (!mask || sparge_mask_get(mask, b, h, i, j));
}
