/* SPDX-License-Identifier: Apache-2.0 */
/* order.c: orders that bring tokens together, against literals. */
#include "methods/method.h"

#include <criterion/criterion.h>

static void expect(const int64_t *index, const int64_t *want, int64_t len)
{
    for (int64_t p = 0; p < len; p++)
        cr_expect_eq(index[p], want[p], "place %d has %d, not %d", (int)p, (int)index[p],
                     (int)want[p]);
}

/* Two frames of 3 x 5 between one token of text before and two after, in patches of 2 x 2 x 2: the
 * last column and the last row of a frame are patches of their own. */
Test(order, patches)
{
    const sparge_grid grid = {2, 3, 5, 1, 2};
    const int64_t want[33] = {0, 1,  2,  6,  7,  16, 17, 21, 22, 3,  4,  8,  9,  18, 19, 23, 24,
                              5, 10, 20, 25, 11, 12, 26, 27, 13, 14, 28, 29, 15, 30, 31, 32};
    int64_t index[33];
    sparge_order_patches(&grid, 2, 2, 2, index);
    expect(index, want, 33);
}

/* The same, frame by frame, and text at the end. */
Test(order, frames)
{
    const sparge_grid grid = {2, 3, 5, 1, 2};
    const int64_t want[33] = {1,  2,  6,  7,  3,  4,  8,  9,  5,  10, 11, 12, 13, 14, 15, 16, 17,
                              21, 22, 18, 19, 23, 24, 20, 25, 26, 27, 28, 29, 30, 0,  31, 32};
    int64_t index[33];
    sparge_order_frames(&grid, 2, 2, index);
    expect(index, want, 33);
}

Test(order, residues)
{
    const int64_t want[7] = {0, 3, 6, 1, 4, 2, 5};
    int64_t index[7];
    sparge_order_residues(7, 3, index);
    expect(index, want, 7);
}

/* Of one channel: the largest first, of equals the first. Three levels of 8 rows, and two of y. */
Test(order, tree_of_one_channel)
{
    const float x[8] = {3, 1, 4, 1, 5, 9, 2, 6}, y[2] = {0, 1};
    const int64_t want[8] = {5, 7, 4, 2, 0, 6, 1, 3};
    int64_t index[8];
    double multiply_adds = 1.0;
    cr_assert_eq(sparge_order_tree(x, 8, y, 2, 1, 2, index, &multiply_adds), SPARGE_OK);
    expect(index, want, 8);
    cr_expect_eq(multiply_adds, 1.0 + 8 * 3 + 2);
}

/* The second channel is wider, but a row of y that is the same everywhere makes nothing of it. */
Test(order, tree_by_what_products_have)
{
    const float x[4][2] = {{0, 10}, {1, 0}, {0, 0}, {1, 10}};
    const struct {
        float y[2][2];
        int64_t want[4];
    } table[] = {{{{0, 5}, {1, 5}}, {1, 3, 0, 2}}, {{{0, 0}, {1, 1}}, {3, 0, 1, 2}}};
    double multiply_adds = 0.0;
    int64_t index[4];
    for (size_t n = 0; n < 2; n++) {
        cr_assert_eq(sparge_order_tree(x[0], 4, table[n].y[0], 2, 2, 4, index, &multiply_adds),
                     SPARGE_OK);
        expect(index, table[n].want, 4);
    }
}

/* In blocks of 4 the rows are cut into 4 and 3, and those into 2, 2, 2 and 1; in blocks of 3 into
 * 6 and 1, then 3 and 3. The first channel weighs nine times as much. */
Test(order, tree_of_whole_blocks)
{
    const float x[7][2] = {{70, 0}, {60, 0}, {50, 100}, {40, 100}, {10, 100}, {30, 90}, {20, 0}},
                y[2][2] = {{0, 0}, {3, 1}};
    const int64_t by_4[7] = {2, 3, 0, 1, 5, 4, 6}, by_3[7] = {2, 0, 1, 3, 5, 6, 4};
    double multiply_adds = 0.0;
    int64_t index[7];
    cr_assert_eq(sparge_order_tree(x[0], 7, y[0], 2, 2, 4, index, &multiply_adds), SPARGE_OK);
    expect(index, by_4, 7);
    cr_assert_eq(sparge_order_tree(x[0], 7, y[0], 2, 2, 3, index, &multiply_adds), SPARGE_OK);
    expect(index, by_3, 7);
}

Test(order, segments)
{
    const float score[8] = {1.0f, 3.0f, 2.0f, 5.0f, 5.0f, 4.0f, 7.0f, 9.0f};
    const int64_t want[8] = {1, 2, 0, 3, 4, 5, 6, 7}; /* the last two are no whole segment */
    int64_t index[8];
    cr_assert_eq(sparge_order_segments(score, 8, 3, index), SPARGE_OK);
    expect(index, want, 8);
}
