/* SPDX-License-Identifier: Apache-2.0 */
/* cells.c: masses of key blocks by cells (ref/predict.c). Rows of cells are the lanes of panels, as
 * queries are in tile.c, and a panel may hold those of several query blocks: it goes through all
 * mean rows of K, its softmax stays in integers, and what it pays to the cells of a block is the
 * block's. */
#include "common/select.h"
#include "cpu/work.h"

/* Sixteen rows of cells of query blocks that stand behind each other. */
typedef struct panel {
    int64_t first, lanes;          /* counted from the first cell of the first of these blocks */
    int64_t queries[SPARGE_PANEL]; /* 0: there is no such row */
    int64_t visible[SPARGE_PANEL]; /* cells of K */
    int64_t least, most;           /* of these */
} panel;

static panel panel_of(const sparge_work *w, int64_t n, int64_t first, int64_t lanes)
{
    panel p = {.first = first, .lanes = lanes, .least = w->cells.k_blocks};
    for (int64_t e = 0; e < lanes; e++) {
        const int64_t i = w->q.block[n + (first + e) / w->cells_q].i;
        const int64_t cell = i * w->cells_q + (first + e) % w->cells_q;
        if (cell >= w->cells.q_blocks)
            continue;
        p.queries[e] = sparge_block_rows(w->g.q_len, w->cells.block_q, cell);
        p.visible[e] = sparge_blocks_visible(&w->cells, cell);
        p.most = sparge_max(p.most, p.visible[e]);
    }
    for (int e = 0; e < SPARGE_PANEL; e++)
        p.least = sparge_min(p.least, p.visible[e]);
    return p;
}

static void hide(const panel *p, int64_t keys, float *s)
{
    for (int64_t t = p->least; t < keys; t++)
        for (int e = 0; e < SPARGE_PANEL; e++)
            s[t * SPARGE_PANEL + e] = t < p->visible[e] ? s[t * SPARGE_PANEL + e] : -INFINITY;
}

/* Adds what the lanes pay to each block to the masses of their query blocks. */
static void add(const sparge_work *w, const panel *p, int64_t blocks, const int32_t *mass,
                uint32_t *to)
{
    for (int64_t e = 0, end; e < p->lanes; e = end) {
        const int64_t of = (p->first + e) / w->cells_q;
        end = sparge_min(p->lanes, (of + 1) * w->cells_q - p->first);
        for (int64_t j = 0; j < blocks; j++) {
            uint32_t sum = 0;
            for (int64_t lane = e; lane < end; lane++)
                sum += (uint32_t)mass[j * SPARGE_PANEL + lane];
            to[of * w->g.k_blocks + j] += sum;
        }
    }
}

/* Panels that go through K together; keys: more than any of their lanes sees. */
static void weigh_panels(const sparge_work *w, sparge_scratch *t, const panel *p, int64_t panels,
                         int64_t keys, const float *k_pool)
{
    const int64_t s_stride = keys * SPARGE_PANEL, stride = w->kv.k.stride;
    const sparge_product product = {
        .rows = keys,
        .panels = panels,
        .depth = stride,
        .a = k_pool,
        .a_stride = stride,
        .b = t->cell_q + p->first * stride,
        .b_stride = stride * SPARGE_PANEL,
    };
    w->kernels.score[SPARGE_FLOATS](&product, t->cell_s, s_stride);
    for (int64_t n = 0; n < panels; n++, p++) {
        float *s = t->cell_s + n * s_stride, most[SPARGE_PANEL], local[SPARGE_PANEL];
        const int64_t blocks = sparge_ceil_div(p->most, w->cells_k);
        const sparge_scores scores = {
            .s = s,
            .panels = 1,
            .keys = sparge_padded(blocks * w->cells_k),
            .scale = sparge_cell_scale(w->o->softmax_scale),
        };
        hide(p, scores.keys, s);
        w->kernels.maxima(&scores, most, local);
        w->kernels.sum_codes(&scores, most, w->cells_k, t->cell_codes);
        w->kernels.cell_masses(t->cell_codes, blocks, p->queries);
        add(w, p, blocks, t->cell_codes, t->cell_mass);
    }
}

/* Of query blocks [n, end), which read the same keys. */
static void weigh(const sparge_work *w, sparge_scratch *t, int64_t n, int64_t end)
{
    const int64_t stride = w->kv.k.stride, lanes = (end - n) * w->cells_q;
    const int64_t first = (sparge_kv_of(w->p, w->q.block[n].head) - w->kv.first) * w->g.k_blocks;
    memset(t->cell_mass, 0, (size_t)((end - n) * w->g.k_blocks) * sizeof *t->cell_mass);
    w->kernels.pack_columns[SPARGE_FLOATS](w->q.pool + n * w->cells_q * stride, lanes, stride,
                                           t->cell_q, NULL);
    for (int64_t lane = 0; lane < lanes;) {
        panel p[SPARGE_CELL_PANELS];
        int64_t panels = 0, most = 0;
        for (; panels < SPARGE_CELL_PANELS && lane < lanes; lane += SPARGE_PANEL) {
            p[panels] = panel_of(w, n, lane, sparge_min(SPARGE_PANEL, lanes - lane));
            most = sparge_max(most, p[panels++].most);
        }
        const int64_t keys = sparge_padded(sparge_whole(most, w->cells_k));
        if (keys)
            weigh_panels(w, t, p, panels, keys, w->kv.pool + first * w->cells_k * stride);
    }
}

void sparge_select_cells(const sparge_work *w, sparge_scratch *t, int64_t item)
{
    const int64_t last = sparge_min(w->q.count, (item + 1) * w->together);
    const sparge_q_block *block = w->q.block;
    for (int64_t n = item * w->together, end; n < last; n = end) {
        for (end = n + 1; end < last; end++)
            if (sparge_kv_of(w->p, block[end].head) != sparge_kv_of(w->p, block[n].head))
                break;
        weigh(w, t, n, end);
        for (int64_t of = n; of < end; of++)
            sparge_select_masses(w, t, of, t->cell_mass + (of - n) * w->g.k_blocks);
    }
}
