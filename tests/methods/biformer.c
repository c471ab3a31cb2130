/* SPDX-License-Identifier: Apache-2.0 */
/* biformer.c: masks of BiFormer made by hand. */
#include "tests/methods/hand.h"

TestSuite(biformer);

/* A frame of 2 x 4 in 2 x 2 regions, tokens 01 | 23 | 45 | 67; keys of a region are a unit vector.
 * The queries of the first ask for region 1 in head 0, and together for region 3; those of the
 * second for nothing; the third's are 9 and -9 of region 2 and a little of region 3. */
Test(biformer, regions_of_all_heads)
{
    const sparge_grid grid = {1, 2, 4, 0, 0};
    const float q[2][8][4] = {
        {{0, 5, 0, 3}, {0, 5, 0, 3}, {0}, {0}, {0, 0, 9}, {0, 0, -9, 1}, {0, 0, 1}, {0, 0, 1}},
        {{0, -4}, {0, -4}}};
    const float k[8][4] = {{1},       {1},       {0, 1},       {0, 1},
                           {0, 0, 1}, {0, 0, 1}, {0, 0, 0, 1}, {0, 0, 0, 1}};
    hand x = hand_make(2, 1, 8, 8, 4, 4, q[0][0], k[0], k[0]);
    x.context.grid = &grid;
#define TWO "00000011 00000011 11000000 11000000 00000011 00000011 00001100 00001100 "
    HAS_PAIRS(&x, "biformer", 1, TWO TWO, 1, 2);
#undef TWO
#define TWO "00110011 00110011 11110000 11110000 11000011 11000011 11001100 11001100 "
    HAS_PAIRS(&x, "biformer", 1, TWO TWO, 2, 2);
#define ALL "11111111 11111111 11111111 11111111 "
    HAS_PAIRS(&x, "biformer", 1, ALL ALL ALL ALL, 9, 2);
}

/* Two frames of 3 x 1 between two tokens of text. A side of 2 regions is of 1 row, so each token is
 * a region; keys are 1 to 6, and the best is in the other frame. */
Test(biformer, frames_and_text)
{
    const sparge_grid grid = {2, 3, 1, 1, 1};
    const float q[8] = {9, 1, 1, 1, 1, 1, -1, -9}, k[8] = {9, 1, 2, 3, 4, 5, 6, 9};
    hand x = hand_make(1, 1, 8, 8, 1, 1, q, k, k);
    x.context.grid = &grid;
    HAS_PAIRS(&x, "biformer", 1,
              "11111111 10000011 10000011 10000011 10000011 10000011 11000001 11111111", 1, 2);
}

/* 5 x 2 in 2 x 2 regions of 2 x 1, and two of 1 x 1 at the edge: tokens 02 | 13 | 46 | 57 | 8 | 9.
 * Means are 1 2 3 0 1 5. */
Test(biformer, regions_at_the_edge)
{
    const sparge_grid grid = {1, 5, 2, 0, 0};
    const float q[10] = {1, 1, 1, 1, 1, 1, 1, 1, 1, -1}, k[10] = {1, 2, 1, 2, 3, 9, 3, -9, 1, 5};
    hand x = hand_make(1, 1, 10, 10, 1, 1, q, k, k);
    x.context.grid = &grid;
#define ROW "0000101001 "
    HAS_PAIRS(&x, "biformer", 1, ROW ROW ROW ROW ROW ROW ROW ROW ROW "1010010100", 2, 2);
}

/* The better of two regions is another one in the second batch. */
Test(biformer, each_batch)
{
    const sparge_grid grid = {1, 1, 2, 0, 0};
    const float q[4] = {1, 1, 1, 1}, k[4] = {1, 2, 2, 1};
    const double param[] = {1, 2};
    const uint8_t want[8] = {0, 1, 0, 1, 1, 0, 1, 0};
    uint8_t pairs[8];
    hand x = hand_make(1, 1, 2, 2, 1, 1, q, k, k);
    x.p.batch = 2;
    x.context.grid = &grid;
    sparge_plan plan = hand_plan(&x, "biformer", param, 2);
    check_equal(sparge_plan_pairs(&plan, pairs, NULL), SPARGE_OK);
    for (int n = 0; n < 8; n++)
        check_equal(pairs[n], want[n]);
    sparge_plan_free(&plan);
}
