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

Test(order, residues)
{
    const int64_t want[7] = {0, 3, 6, 1, 4, 2, 5};
    int64_t index[7];
    sparge_order_residues(7, 3, index);
    expect(index, want, 7);
}

/* Centers begin at rows 0 and 3, the values 0 and 4; then they are 0 and 10.2, 3 and 19.5, 4.2 and
 * 30. */
Test(order, clusters)
{
    const float x[6] = {0.0f, 3.0f, 5.0f, 4.0f, 9.0f, 30.0f};
    const struct {
        int rounds;
        int64_t size[2];
    } table[] = {{0, {1, 5}}, {1, {4, 2}}, {2, {5, 1}}, {20, {5, 1}}};
    const int64_t want[6] = {0, 1, 2, 3, 4, 5};
    int64_t index[6], size[2];
    for (size_t n = 0; n < sizeof table / sizeof *table; n++) {
        cr_assert_eq(sparge_order_clusters(x, 6, 1, 2, table[n].rounds, index, size), SPARGE_OK);
        cr_expect(size[0] == table[n].size[0] && size[1] == table[n].size[1], "%d rounds: %d, %d",
                  table[n].rounds, (int)size[0], (int)size[1]);
        expect(index, want, 6);
    }
}

/* Rows of the second cluster stand between those of the first. */
Test(order, clusters_gather)
{
    const float x[10] = {1, 1, 2, 1, -1, -2, 1, 2, -2, -2};
    const int64_t want[5] = {0, 1, 3, 2, 4};
    int64_t index[5], size[2];
    cr_assert_eq(sparge_order_clusters(x, 5, 2, 2, 9, index, size), SPARGE_OK);
    cr_expect(size[0] == 3 && size[1] == 2);
    expect(index, want, 5);
}

/* All three centers are 1, and the first takes every row. Then it is 2, and the second takes the
 * ones; the third never has a row. */
Test(order, a_center_without_rows_stays)
{
    const float x[4] = {1.0f, 1.0f, 1.0f, 5.0f};
    const int64_t want[4] = {3, 0, 1, 2};
    int64_t index[4], size[3];
    cr_assert_eq(sparge_order_clusters(x, 4, 1, 3, 5, index, size), SPARGE_OK);
    cr_expect(size[0] == 1 && size[1] == 3 && size[2] == 0);
    expect(index, want, 4);
}

Test(order, segments)
{
    const float score[8] = {1.0f, 3.0f, 2.0f, 5.0f, 5.0f, 4.0f, 7.0f, 9.0f};
    const int64_t want[8] = {1, 2, 0, 3, 4, 5, 6, 7}; /* the last two are no whole segment */
    int64_t index[8];
    cr_assert_eq(sparge_order_segments(score, 8, 3, index), SPARGE_OK);
    expect(index, want, 8);
}
