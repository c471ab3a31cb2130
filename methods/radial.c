/* SPDX-License-Identifier: Apache-2.0 */
/* radial.c: Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
 * Generation, arXiv 2506.19852; github.com/mit-han-lab/radial-attention at 72788d4.
 *
 * Two frames of video of T tokens each attend to each other along a band: query r of one to keys
 * r - w to r + w of the other. Frames that are the same or neighbours do so as a whole. For others
 * w halves where their distance d gets a binary digit more: it is `decay` times a, at least a
 * block, where a = 2^digits(T) / 2^digits(d). If a is less than a block, only one of block / a
 * distances is kept, the multiples of that, rounded down. With `sink` all keys of the first frame
 * are kept. A block of pairs is kept, as far as it belongs to the two frames, if more than three
 * fifths of the columns that the band touches in it have more of it than a third of a block's rows.
 * Rows and columns of text are whole, and so is the last block if it is not of video alone.
 *
 * Ours: the code compares a with 128, which it calls the size of a block, in blocks of 64 too; ours
 * is the size of a block. A frame that begins inside a block may lie in one block more than it has
 * itself: the code leaves that one out, and ours does not. Text may also come before the video. A
 * row that is left without a block, of frames much smaller than one, keeps its own. */
#include <math.h>

#include "methods/entries.h"
#include "methods/method.h"

enum { DECAY, BLOCK, SINK };

static int digits(int64_t x)
{
    int n = 0;
    for (; x > 0; x >>= 1)
        n++;
    return n;
}

/* How far the band of two frames reaches, in tokens of a frame; -1: they do not attend. */
static int64_t width_of(const sparge_head *head, int64_t frame, int64_t distance, bool sink)
{
    const double block = (double)head->g.block_q, a = ldexp(1.0, digits(frame) - digits(distance));
    if (sink)
        return frame;
    if (a < block && distance % (int64_t)(block / a) != 0)
        return -1;
    if (distance <= 1)
        return frame;
    return (int64_t)fmin((double)frame, fmax(block, head->param[DECAY] * a));
}

static int64_t overlap(int64_t a, int64_t a_end, int64_t b, int64_t b_end)
{
    return sparge_max(0, sparge_min(a_end, b_end) - sparge_max(a, b));
}

/* Is a block kept for queries [q, q_end) of one frame and keys [k, k_end) of another? */
static bool is_kept(int64_t q, int64_t q_end, int64_t k, int64_t k_end, int64_t width,
                    int64_t block)
{
    const int64_t third = block / 3, touched = overlap(k, k_end, q - width, q_end + width);
    if (q_end - q <= third || 2 * width + 1 <= third)
        return false;
    return 5 * overlap(k, k_end, q - width + third, q_end + width - third) > 3 * touched;
}

/* Frames that begin at tokens q and k. */
static void keep_frames(const sparge_head *head, int64_t q, int64_t k, int64_t frame, int64_t width)
{
    const int64_t block = head->g.block_q;
    for (int64_t i = q / block; i * block < q + frame; i++)
        for (int64_t j = k / block; j * block < k + frame; j++)
            if (is_kept(sparge_max(0, i * block - q), sparge_min(frame, (i + 1) * block - q),
                        sparge_max(0, j * block - k), sparge_min(frame, (j + 1) * block - k), width,
                        block))
                sparge_keep(head, i, j);
}

static sparge_status keep_radial(const sparge_head *head, sparge_error *error)
{
    (void)error;
    const sparge_geometry *g = &head->g;
    const sparge_grid *grid = head->context->grid;
    const int64_t frame = grid->h * grid->w, before = grid->text_before,
                  text = (before + grid->t * frame) / g->block_q; /* the first block of it */
    for (int64_t f = 0; f < grid->t && frame; f++)
        for (int64_t e = 0; e < grid->t; e++) {
            const int64_t width =
                width_of(head, frame, f > e ? f - e : e - f, e == 0 && head->param[SINK] != 0.0);
            if (width >= 0)
                keep_frames(head, before + f * frame, before + e * frame, frame, width);
        }
    for (int64_t i = 0; i < g->q_blocks; i++) {
        for (int64_t j = 0; j < g->k_blocks; j++)
            if (i >= text || j >= text || sparge_min(i, j) * g->block_q < before)
                sparge_keep(head, i, j);
        if (!sparge_mask_row_count(head->mask->bits + i * head->mask->words, g->k_blocks))
            sparge_keep(head, i, i);
    }
    return SPARGE_OK;
}

static sparge_status plan_radial(sparge_plan *plan, const sparge_context *context,
                                 const double *param, sparge_error *error)
{
    const int64_t block = (int64_t)param[BLOCK];
    return sparge_each_head(
        plan, context, param,
        &(sparge_walk){.block_q = block, .block_k = block, .blind = true, .visit = keep_radial},
        error);
}

const sparge_method sparge_method_radial = {
    .name = "radial",
    .title = "Radial Attention",
    .paper = "arXiv 2506.19852",
    .repository = "github.com/mit-han-lab/radial-attention",
    .commit = "72788d4",
    .kind = "static",
    .evidence = "1336369 of 1352828 blocks",
    .needs = SPARGE_NEEDS_NOT_CAUSAL | SPARGE_NEEDS_GRID,
    .param = {{"decay", 0.0, 0x1p20, 1.0, false, "width of a band, of what frames that far have"},
              {"block", 1.0, SPARGE_MAX_BLOCK, 128.0, true, "tokens of a block"},
              {"sink", 0.0, 1.0, 1.0, true, "all keys of the first frame are kept"}},
    .plan = plan_radial,
};
