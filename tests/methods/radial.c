/* SPDX-License-Identifier: Apache-2.0 */
/* radial.c: masks of Radial Attention made by hand. It looks at no query and no key. */
#include "tests/methods/hand.h"

TestSuite(radial);

static const float zeros[64];

/* Parameters are decay, block and sink. */
static hand make(const sparge_grid *grid)
{
    const int64_t tokens = grid->t * grid->h * grid->w + grid->text_before + grid->text_after;
    hand x = hand_make(1, 1, tokens, tokens, 1, 1, zeros, zeros, zeros);
    x.context.grid = grid;
    return x;
}

/* Three frames of 4 tokens. From the first to the third, 2 frames away, a is 8 / 4. */
Test(radial, bands)
{
    const sparge_grid grid = {.t = 3, .h = 2, .w = 2};
    const hand x = make(&grid);
    HAS_PAIRS(&x, "radial", 1,
              "111111111100 111111111110 111111110111 111111110011 "
              "111111111111 111111111111 111111111111 111111111111 "
              "110011111111 111011111111 011111111111 001111111111",
              0.4, 1, 0);
    HAS_PAIRS(&x, "radial", 1,
              "111111111110 111111111111 111111111111 111111110111 "
              "111111111111 111111111111 111111111111 111111111111 "
              "111011111111 111111111111 111111111111 011111111111",
              1, 1, 0);
    HAS_PAIRS(&x, "radial", 1,
              "111111111100 111111111110 111111110111 111111110011 "
              "111111111111 111111111111 111111111111 111111111111 "
              "111111111111 111111111111 111111111111 111111111111",
              0.9, 1, 1);
}

/* Eight frames of a token, where a is 2, 1, 1 / 2 and 1 / 4 at distances of 0, 1, 2 and 4: from 2
 * on each second one is kept, from 4 on each fourth one. */
Test(radial, far_frames_are_thinned)
{
    const sparge_grid grid = {.t = 8, .h = 1, .w = 1};
    const hand x = make(&grid);
    HAS_PAIRS(&x, "radial", 1,
              "11101000 11110100 11111010 01111101 10111110 01011111 00101111 00010111", 100, 1, 0);
    HAS_PAIRS(&x, "radial", 1,
              "11101000 11110100 11111010 11111101 10111110 11011111 10101111 10010111", 0, 1, 1);
}

Test(radial, text_is_whole)
{
    const sparge_grid grid = {.t = 5, .h = 1, .w = 1, .text_before = 1, .text_after = 1};
    const hand x = make(&grid);
    HAS_PAIRS(&x, "radial", 1, "1111111 1111011 1111101 1111111 1011111 1101111 1111111", 1, 1, 0);
}

/* Frames of three blocks of 6, and a band of 11 or 12 between the first and the third: of a block
 * two blocks off the diagonal it touches 5 columns, in 5 to 1 of their tokens, and counts 3, which
 * are three fifths; or 6, and counts 4. */
Test(radial, blocks_with_most_of_a_band)
{
    const sparge_grid grid = {.t = 3, .h = 3, .w = 6};
    const hand x = make(&grid);
    HAS_PAIRS(&x, "radial", 6,
              "111111110 111111111 111111011 111111111 111111111 111111111 110111111 111111111 "
              "011111111",
              1.375, 6, 0);
    HAS_PAIRS(&x, "radial", 6,
              "111111111 111111111 111111111 111111111 111111111 111111111 111111111 111111111 "
              "111111111",
              1.5, 6, 0);
}

/* Frames of 17 tokens in blocks of 6: the second one has a token in block 2 and four in block 5,
 * which it keeps; the last block is short, and whole. The band is of 6 tokens: of block 7 it
 * touches four columns of the first row, and counts two. */
Test(radial, frames_begin_inside_blocks)
{
    const sparge_grid grid = {.t = 3, .h = 1, .w = 17};
    const hand x = make(&grid);
    HAS_PAIRS(&x, "radial", 6,
              "111111101 111111111 111111011 111111111 111111111 111111111 111111111 011111111 "
              "111111111",
              0, 6, 0);
}

/* Of a frame of one token no column has more than a third of a block of 6. */
Test(radial, no_row_is_empty)
{
    const sparge_grid grid = {.t = 12, .h = 1, .w = 1};
    const hand x = make(&grid);
    HAS_PAIRS(&x, "radial", 6, "1 01", 100, 6, 1);
}
