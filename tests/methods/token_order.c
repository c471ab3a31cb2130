/* SPDX-License-Identifier: Apache-2.0 */
/* token_order.c: the five orders and the moving of rows, against literals and against what an order
 * has to be: a permutation, and for the Hilbert curve one of neighbours. */
#include "sparge_order.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

/* Lets an allocation that is too large return NULL under the sanitizers too. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

enum { ORDERS = SPARGE_HILBERT + 1 };

static int64_t image_of(const sparge_grid *grid) { return grid->t * grid->h * grid->w; }

/* The caller frees it. */
static int64_t *order_of(sparge_order order, const sparge_grid *grid, uint64_t seed)
{
    const int64_t total = grid->text_before + image_of(grid) + grid->text_after;
    int64_t *index = malloc((size_t)(total + 1) * sizeof *index);
    cr_assert(index);
    memset(index, 0xff, (size_t)(total + 1) * sizeof *index);
    sparge_error error;
    cr_assert_eq(sparge_token_order(order, grid, seed, index, &error), SPARGE_OK, "%s", error.text);
    cr_assert_eq(index[total], -1, "a token too many");
    return index;
}

static bool is_permutation(const int64_t *index, int64_t len)
{
    bool *seen = calloc((size_t)len + 1, 1);
    cr_assert(seen);
    bool good = true;
    for (int64_t p = 0; p < len && good; p++) {
        good = index[p] >= 0 && index[p] < len && !seen[index[p]];
        if (good)
            seen[index[p]] = true;
    }
    free(seen);
    return good;
}

static void expect_order(sparge_order order, sparge_grid grid, uint64_t seed, const int64_t *want)
{
    int64_t *index = order_of(order, &grid, seed);
    const int64_t total = grid.text_before + image_of(&grid) + grid.text_after;
    for (int64_t p = 0; p < total; p++)
        cr_expect_eq(index[p], want[p], "%s: place %lld has %lld, not %lld",
                     sparge_order_string(order), (long long)p, (long long)index[p],
                     (long long)want[p]);
    free(index);
}

/* ---- Names and the plain orders --------------------------------------------------------- */

Test(token_order, names)
{
    cr_expect_str_eq(sparge_order_string(SPARGE_ROW_MAJOR), "row");
    cr_expect_str_eq(sparge_order_string(SPARGE_COLUMN_MAJOR), "column");
    cr_expect_str_eq(sparge_order_string(SPARGE_TIME_MAJOR), "time");
    cr_expect_str_eq(sparge_order_string(SPARGE_RANDOM), "random");
    cr_expect_str_eq(sparge_order_string(SPARGE_HILBERT), "hilbert");
    cr_expect_str_eq(sparge_order_string((sparge_order)5), "unknown");
}

/* Frames 0 1 2 / 3 4 5 and 6 7 8 / 9 10 11. */
Test(token_order, plain_orders_of_two_frames)
{
    const sparge_grid grid = {.t = 2, .h = 2, .w = 3};
    const int64_t row[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    const int64_t column[] = {0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11};
    const int64_t time[] = {0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11};
    expect_order(SPARGE_ROW_MAJOR, grid, 0, row);
    expect_order(SPARGE_COLUMN_MAJOR, grid, 0, column);
    expect_order(SPARGE_TIME_MAJOR, grid, 0, time);
}

/* Three sides that differ, and a time side that is the longest. */
Test(token_order, plain_orders_of_three_frames)
{
    const sparge_grid grid = {.t = 3, .h = 2, .w = 1};
    const int64_t row[] = {0, 1, 2, 3, 4, 5};
    const int64_t time[] = {0, 2, 4, 1, 3, 5};
    expect_order(SPARGE_ROW_MAJOR, grid, 0, row);
    expect_order(SPARGE_COLUMN_MAJOR, grid, 0, row);
    expect_order(SPARGE_TIME_MAJOR, grid, 0, time);
}

Test(token_order, text_keeps_its_place)
{
    const sparge_grid grid = {.t = 1, .h = 2, .w = 2, .text_before = 2, .text_after = 3};
    const int64_t column[] = {0, 1, 2, 4, 3, 5, 6, 7, 8};
    expect_order(SPARGE_COLUMN_MAJOR, grid, 0, column);

    /* In every order: the order without text, moved up by the text before it. */
    const sparge_grid bare = {.t = 3, .h = 4, .w = 5};
    const sparge_grid full = {.t = 3, .h = 4, .w = 5, .text_before = 7, .text_after = 11};
    for (int order = 0; order < ORDERS; order++) {
        int64_t *without = order_of((sparge_order)order, &bare, 9);
        int64_t *with = order_of((sparge_order)order, &full, 9);
        for (int64_t p = 0; p < 7 + 60 + 11; p++) {
            const bool text = p < 7 || p >= 7 + 60;
            cr_expect_eq(with[p], text ? p : 7 + without[p - 7], "%s, place %lld",
                         sparge_order_string((sparge_order)order), (long long)p);
        }
        free(without);
        free(with);
    }
}

Test(token_order, empty_grids)
{
    const int64_t text[] = {0, 1, 2, 3, 4};
    for (int order = 0; order < ORDERS; order++) {
        for (int side = 0; side < 3; side++) {
            const sparge_grid grid = {side == 0 ? 0 : 3, side == 1 ? 0 : 4, side == 2 ? 0 : 5, 2,
                                      3};
            expect_order((sparge_order)order, grid, 0, text);
        }
        const sparge_grid nothing = {.t = 0, .h = 0, .w = 0};
        cr_expect_eq(sparge_token_order((sparge_order)order, &nothing, 0, NULL, NULL), SPARGE_OK);
    }
}

/* ---- Random ----------------------------------------------------------------------------- */

/* From a Python program of ten lines: splitmix64, and Fisher-Yates from the last place down. */
Test(token_order, random_is_the_same_everywhere)
{
    const sparge_grid grid = {.t = 2, .h = 2, .w = 3};
    const int64_t seed_0[] = {4, 1, 6, 8, 0, 5, 2, 3, 11, 9, 10, 7};
    const int64_t seed_1[] = {4, 6, 7, 9, 11, 3, 10, 1, 2, 0, 8, 5};
    const int64_t seed_high[] = {3, 11, 7, 10, 5, 4, 8, 9, 2, 1, 6, 0};
    expect_order(SPARGE_RANDOM, grid, 0, seed_0);
    expect_order(SPARGE_RANDOM, grid, 1, seed_1);
    expect_order(SPARGE_RANDOM, grid, (UINT64_C(1) << 63) + 5, seed_high);

    /* Its first draw is 0, one of the 4 that 12 turns down; then it goes on as seed 0 does. */
    expect_order(SPARGE_RANDOM, grid, UINT64_C(0x61c8864680b583eb), seed_0);
}

/* The six orders of three tokens over 60000 seeds: 10000 each, with a deviation of 91. A shuffle
 * that draws among all places every time is off by 1111. */
Test(token_order, random_is_uniform)
{
    const sparge_grid three = {.t = 3, .h = 1, .w = 1};
    int count[3][3] = {{0}};
    for (uint64_t seed = 0; seed < 60000; seed++) {
        int64_t index[3];
        cr_assert_eq(sparge_token_order(SPARGE_RANDOM, &three, seed, index, NULL), SPARGE_OK);
        count[index[0]][index[1]]++;
    }
    for (int first = 0; first < 3; first++)
        for (int second = 0; second < 3; second++)
            if (first != second)
                cr_expect(abs(count[first][second] - 10000) < 400, "%d %d: %d times", first, second,
                          count[first][second]);
}

/* A token of many moves by a third of them on average. */
Test(token_order, random_scatters_large_grids)
{
    const sparge_grid grid = {.t = 13, .h = 30, .w = 45};
    const int64_t n = image_of(&grid);
    int64_t *index = order_of(SPARGE_RANDOM, &grid, 2502);
    cr_expect(is_permutation(index, n));
    double moved = 0.0;
    for (int64_t p = 0; p < n; p++)
        moved += (double)llabs(index[p] - p) / (double)n;
    cr_expect(moved > 0.32 * (double)n && moved < 0.35 * (double)n, "%g", moved / (double)n);
    free(index);
}

/* ---- The Hilbert curve ------------------------------------------------------------------ */

/* Where an arriving number is in its grid. */
static void locate(const sparge_grid *grid, int64_t number, int64_t at[3])
{
    at[0] = number / (grid->h * grid->w);
    at[1] = number / grid->w % grid->h;
    at[2] = number % grid->w;
}

/* What the steps from each token to the next are like. */
typedef struct tour {
    int64_t jumps;    /* steps that are not to a neighbour */
    int64_t longest;  /* the longest step, |dt| + |dh| + |dw| */
    int64_t straight; /* the most steps in a row in one direction */
} tour;

static tour tour_of(const sparge_grid *grid, const int64_t *index)
{
    tour found = {0, 0, 0};
    int64_t last[3] = {0, 0, 0}, run = 0;
    for (int64_t p = 1; p < image_of(grid); p++) {
        int64_t from[3], to[3], step[3], length = 0;
        locate(grid, index[p - 1], from);
        locate(grid, index[p], to);
        for (int c = 0; c < 3; c++) {
            step[c] = to[c] - from[c];
            length += llabs(step[c]);
        }
        run = memcmp(step, last, sizeof step) == 0 ? run + 1 : 1;
        memcpy(last, step, sizeof step);
        found.jumps += length != 1;
        found.longest = length > found.longest ? length : found.longest;
        found.straight = run > found.straight ? run : found.straight;
    }
    return found;
}

/* Asks for unit steps through all of a grid, and a turn after `straight` of them at the latest. */
static void expect_curve(sparge_grid grid, int64_t straight)
{
    int64_t *index = order_of(SPARGE_HILBERT, &grid, 0);
    const int t = (int)grid.t, h = (int)grid.h, w = (int)grid.w;
    cr_assert(is_permutation(index, image_of(&grid)), "%d x %d x %d: no permutation", t, h, w);
    const tour found = tour_of(&grid, index);
    cr_expect_eq(found.jumps, 0, "%d x %d x %d: %d jumps", t, h, w, (int)found.jumps);
    cr_expect_leq(found.longest, 1, "%d x %d x %d: a step of %d", t, h, w, (int)found.longest);
    cr_expect_leq(found.straight, straight, "%d x %d x %d: straight for %d", t, h, w,
                  (int)found.straight);
    free(index);
}

/* The measure of locality: cut an order into runs of `run` tokens, as attention cuts it into
 * blocks, and sum up how far apart two corners of the bounding box of a run can be, |dt| + |dh| +
 * |dw|. */
static int64_t spread(const sparge_grid *grid, const int64_t *index, int64_t run)
{
    int64_t sum = 0;
    for (int64_t first = 0; first + run <= image_of(grid); first += run) {
        int64_t low[3], high[3];
        locate(grid, index[first], low);
        locate(grid, index[first], high);
        for (int64_t p = first + 1; p < first + run; p++) {
            int64_t at[3];
            locate(grid, index[p], at);
            for (int c = 0; c < 3; c++) {
                low[c] = at[c] < low[c] ? at[c] : low[c];
                high[c] = at[c] > high[c] ? at[c] : high[c];
            }
        }
        for (int c = 0; c < 3; c++)
            sum += high[c] - low[c];
    }
    return sum;
}

/* What the curve must not be: row-major order with every other row, and frame, turned round. */
static int64_t *snake_of(const sparge_grid *grid)
{
    int64_t *index = malloc((size_t)image_of(grid) * sizeof *index);
    cr_assert(index);
    for (int64_t p = 0; p < image_of(grid); p++) {
        int64_t at[3];
        locate(grid, p, at);
        const int64_t row = at[0] % 2 == 0 ? at[1] : grid->h - 1 - at[1];
        const int64_t rows_before = at[0] * grid->h + at[1];
        const int64_t column = rows_before % 2 == 0 ? at[2] : grid->w - 1 - at[2];
        index[p] = (at[0] * grid->h + row) * grid->w + column;
    }
    return index;
}

/* The measures on orders whose values are plain to see. */
Test(token_order, measures)
{
    const sparge_grid grid = {.t = 1, .h = 3, .w = 4};
    int64_t *row = order_of(SPARGE_ROW_MAJOR, &grid, 0);
    int64_t *snake = snake_of(&grid);
    const int64_t by_hand[] = {0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11};
    cr_expect_arr_eq(snake, by_hand, sizeof by_hand);

    const tour of_row = tour_of(&grid, row), of_snake = tour_of(&grid, snake);
    cr_expect_eq(of_row.jumps, 2);
    cr_expect_eq(of_row.longest, 4);
    cr_expect_eq(of_row.straight, 3);
    cr_expect_eq(of_snake.jumps, 0);
    cr_expect_eq(of_snake.longest, 1);
    cr_expect_eq(of_snake.straight, 3);
    cr_expect_eq(spread(&grid, row, 4), 3 * 3);
    cr_expect_eq(spread(&grid, row, 6), 2 * (3 + 1));
    free(row);
    free(snake);
}

/* The curve of Hilbert's paper of 1891, from one lower corner to the other:
 *
 *      5  6  9 10
 *      4  7  8 11
 *      3  2 13 12
 *      0  1 14 15                                  (row 0 of the frame is the lowest here) */
Test(token_order, hilbert_is_hilberts)
{
    const sparge_grid grid = {.t = 1, .h = 4, .w = 4};
    const int64_t curve[] = {0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3};
    expect_order(SPARGE_HILBERT, grid, 0, curve);
}

/* Sides of one power of two: every run of 4^k is a square, or every run of 8^k a cube. */
Test(token_order, hilbert_fills_squares_and_cubes)
{
    const sparge_grid square = {.t = 1, .h = 64, .w = 64}, cube = {.t = 32, .h = 32, .w = 32};
    int64_t *flat = order_of(SPARGE_HILBERT, &square, 0);
    int64_t *solid = order_of(SPARGE_HILBERT, &cube, 0);
    for (int64_t side = 2; side <= 32; side *= 2) {
        const int64_t squares = 64 * 64 / (side * side);
        const int64_t cubes = 32 * 32 * 32 / (side * side * side);
        cr_expect_eq(spread(&square, flat, side * side), squares * 2 * (side - 1));
        cr_expect_eq(spread(&cube, solid, side * side * side), cubes * 3 * (side - 1));
    }
    free(flat);
    free(solid);
}

/* Every box up to 9 x 9 x 9, even and odd: 0 steps that are not to a neighbour, the longest step 1,
 * and never more than 6 in one direction. A line can only be straight. */
Test(token_order, hilbert_of_every_small_box)
{
    for (int64_t t = 1; t <= 9; t++)
        for (int64_t h = 1; h <= 9; h++)
            for (int64_t w = 1; w <= 9; w++) {
                const bool line = (t == 1) + (h == 1) + (w == 1) >= 2;
                expect_curve((sparge_grid){.t = t, .h = h, .w = w}, line ? 8 : 6);
            }
}

/* Beyond 9 where every side is even. */
Test(token_order, hilbert_of_even_boxes)
{
    for (int64_t t = 2; t <= 14; t += 2)
        for (int64_t h = 2; h <= 14; h += 2)
            for (int64_t w = 2; w <= 14; w += 2)
                expect_curve((sparge_grid){.t = t, .h = h, .w = w}, 6);
}

/* Images and video as models have them, and the most awkward boxes. */
Test(token_order, hilbert_of_large_boxes)
{
    const sparge_grid grids[] = {
        {.t = 13, .h = 30, .w = 45},  {.t = 14, .h = 30, .w = 53}, {.t = 1, .h = 64, .w = 64},
        {.t = 28, .h = 30, .w = 53},  {.t = 33, .h = 45, .w = 80}, {.t = 64, .h = 1, .w = 64},
        {.t = 101, .h = 2, .w = 1},   {.t = 1, .h = 3, .w = 1000}, {.t = 5, .h = 1001, .w = 5},
        {.t = 2, .h = 99, .w = 101},  {.t = 7, .h = 301, .w = 31}, {.t = 1, .h = 255, .w = 1023},
        {.t = 1, .h = 1023, .w = 511}};
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++)
        expect_curve(grids[i], 6);
}

/* Fig 5: blocks of four tokens of a 6 x 6 image are all squares. */
Test(token_order, hilbert_of_figure_5)
{
    const sparge_grid grid = {.t = 1, .h = 6, .w = 6};
    int64_t *hilbert = order_of(SPARGE_HILBERT, &grid, 0);
    int64_t *row = order_of(SPARGE_ROW_MAJOR, &grid, 0);
    cr_expect_eq(spread(&grid, hilbert, 4), 9 * 2);
    cr_expect_eq(spread(&grid, row, 4), 6 * 3 + 3 * 6); /* a third of them wrap round */
    free(hilbert);
    free(row);
}

/* At most `hilbert` over runs of 64 tokens, where row-major order and a snake have so much. */
static void expect_locality(sparge_grid grid, int64_t hilbert, int64_t row, int64_t snake)
{
    int64_t *by_hilbert = order_of(SPARGE_HILBERT, &grid, 0);
    int64_t *by_row = order_of(SPARGE_ROW_MAJOR, &grid, 0);
    int64_t *by_snake = snake_of(&grid);
    const int64_t found = spread(&grid, by_hilbert, 64);
    cr_expect_leq(found, hilbert, "%lld where %lld is known", (long long)found, (long long)hilbert);
    cr_expect_eq(spread(&grid, by_row, 64), row);
    cr_expect_eq(spread(&grid, by_snake, 64), snake);
    free(by_hilbert);
    free(by_row);
    free(by_snake);
}

/* The mean spread of a run is 9.0, 10.9, 10.9, 10.7 and 11.9. A cube of 64 tokens has 9.0, which
 * only sides of a power of two allow for every run. */
Test(token_order, hilbert_is_never_a_mere_snake)
{
    expect_locality((sparge_grid){.t = 16, .h = 16, .w = 16}, 576, 1152, 1152);
    expect_locality((sparge_grid){.t = 12, .h = 20, .w = 28}, 1146, 3219, 3057);
    expect_locality((sparge_grid){.t = 13, .h = 30, .w = 45}, 2998, 12779, 11406);
    expect_locality((sparge_grid){.t = 14, .h = 30, .w = 53}, 3723, 18829, 15570);
    expect_locality((sparge_grid){.t = 9, .h = 9, .w = 9}, 131, 181, 156);
}

/* ---- Refusals of sparge_token_order ------------------------------------------------------ */

static void refuse_grid(sparge_order order, const sparge_grid *grid, int64_t *index,
                        const char *sentence)
{
    sparge_error error = {"old"};
    cr_expect_eq(sparge_token_order(order, grid, 0, index, &error), SPARGE_ERR_ARGUMENT, "%s",
                 sentence);
    cr_expect_str_eq(error.text, sentence);
    cr_expect_eq(sparge_token_order(order, grid, 0, index, NULL), SPARGE_ERR_ARGUMENT);
}

Test(token_order, refused_orders)
{
    const sparge_grid grid = {2, 2, 2, 1, 1};
    int64_t index[10];
    refuse_grid(SPARGE_ROW_MAJOR, NULL, index, "grid is NULL");
    refuse_grid(SPARGE_HILBERT, &grid, NULL, "index is NULL for 10 tokens");
    refuse_grid((sparge_order)5, &grid, index, "order is 5, which is none");

    sparge_error error = {"old"};
    cr_expect_eq(sparge_token_order(SPARGE_HILBERT, &grid, 0, index, &error), SPARGE_OK);
    cr_expect_str_eq(error.text, "");
}

Test(token_order, refused_grids)
{
    int64_t index[10];
    const int64_t much = INT64_MAX / 8;
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){-1, 2, 2, 1, 1}, index,
                "grid->t is -1, which is too small");
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){2, -2, 2, 1, 1}, index,
                "grid->h is -2, which is too small");
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){2, 2, INT64_MIN, 1, 1}, index,
                "grid->w is -9223372036854775808, which is too small");
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){2, 2, 2, -3, 1}, index,
                "grid->text_before is -3, which is too small");
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){2, 2, 2, 1, -4}, index,
                "grid->text_after is -4, which is too small");

    /* 2^32 frames of 2^16 x 2^16 are 2^64 tokens: 0, if one is not careful. */
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){4294967296, 65536, 65536, 0, 0}, index,
                "grid->w is 65536, which is too large");
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){much, 2, 1, 0, 0}, index,
                "grid->h is 2, which is too large");
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){much + 1, 1, 1, 0, 0}, index,
                "grid->t is 1152921504606846976, which is too large");
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){1, 1, 1, much, 0}, index,
                "grid->text_before is 1152921504606846975, which is too large");
    refuse_grid(SPARGE_ROW_MAJOR, &(sparge_grid){0, 1, 1, 1, much}, index,
                "grid->text_after is 1152921504606846975, which is too large");
}

/* ---- Moving rows ------------------------------------------------------------------------ */

typedef sparge_status mover(const sparge_in *from, const sparge_out *to, int64_t batch,
                            int64_t heads, int64_t len, int64_t dim, const int64_t *index,
                            sparge_error *error);
static mover *const movers[] = {sparge_permute, sparge_unpermute};

Test(token_order, rows_move_as_the_index_says)
{
    const float from[] = {10, 11, 20, 21, 30, 31};
    const int64_t index[] = {2, 0, 1};
    const float permuted[] = {30, 31, 10, 11, 20, 21}, unpermuted[] = {20, 21, 30, 31, 10, 11};
    float to[6];
    const sparge_in in = {from, SPARGE_F32, 6, 6, 2};
    const sparge_out out = {to, SPARGE_F32, 6, 6, 2};
    sparge_error error = {"old"};
    cr_expect_eq(sparge_permute(&in, &out, 1, 1, 3, 2, index, &error), SPARGE_OK);
    cr_expect_arr_eq(to, permuted, sizeof to);
    cr_expect_str_eq(error.text, "");
    cr_expect_eq(sparge_unpermute(&in, &out, 1, 1, 3, 2, index, NULL), SPARGE_OK);
    cr_expect_arr_eq(to, unpermuted, sizeof to);

    const sparge_in upside_down = {from + 4, SPARGE_F32, 6, 6, -2};
    const float turned[] = {10, 11, 30, 31, 20, 21};
    cr_expect_eq(sparge_permute(&upside_down, &out, 1, 1, 3, 2, index, NULL), SPARGE_OK);
    cr_expect_arr_eq(to, turned, sizeof to);
}

enum { BATCH = 2, HEADS = 3, LEN = 7, DIM = 5, ROOM = 512 };

/* ROOM elements of two or four bytes, each with bits of its own: as floats, some of them NaN. */
static void fill(unsigned char *bytes, size_t size, uint32_t first)
{
    for (uint32_t i = 0; i < ROOM; i++) {
        const uint32_t twice = (first + 97 * i) % 65536 * 65537;
        memcpy(bytes + i * size, &twice, size);
    }
}

/* Heads before tokens and tokens before heads, with places to spare that must stay as they are. */
Test(token_order, rows_of_every_type_and_stride)
{
    const int64_t index[LEN] = {3, 6, 0, 5, 1, 4, 2};
    for (int dtype = SPARGE_F32; dtype <= SPARGE_BF16; dtype++) {
        const size_t size = dtype == SPARGE_F32 ? 4 : 2;
        unsigned char first[ROOM * 4], there[ROOM * 4], back[ROOM * 4], want[ROOM * 4];
        fill(first, size, 1);
        fill(there, size, 20000);
        fill(want, size, 20000);
        fill(back, size, 1);

        const sparge_in in = {first, (sparge_dtype)dtype, 211, 61, 7};
        const sparge_out out = {there, (sparge_dtype)dtype, 137, 6, 19};
        for (int64_t b = 0; b < BATCH; b++)
            for (int64_t h = 0; h < HEADS; h++)
                for (int64_t p = 0; p < LEN; p++) {
                    const int64_t target = 137 * b + 6 * h + 19 * p;
                    const int64_t source = 211 * b + 61 * h + 7 * index[p];
                    memcpy(want + (size_t)target * size, first + (size_t)source * size, DIM * size);
                    memset(back + (size_t)source * size, 0, DIM * size);
                }
        cr_expect_eq(sparge_permute(&in, &out, BATCH, HEADS, LEN, DIM, index, NULL), SPARGE_OK);
        cr_expect_arr_eq(there, want, ROOM * size, "permuted, dtype %d", dtype);

        const sparge_in again = {there, (sparge_dtype)dtype, 137, 6, 19};
        const sparge_out home = {back, (sparge_dtype)dtype, 211, 61, 7};
        cr_expect_eq(sparge_unpermute(&again, &home, BATCH, HEADS, LEN, DIM, index, NULL),
                     SPARGE_OK);
        cr_expect_arr_eq(back, first, ROOM * size, "round trip, dtype %d", dtype);
    }
}

/* An order of a grid with text, there and back. */
Test(token_order, rows_return_from_every_order)
{
    enum { TOKENS = 3 + 4 * 5 * 6 + 2 };
    const sparge_grid grid = {4, 5, 6, 3, 2};
    float first[TOKENS], there[TOKENS], back[TOKENS];
    for (int p = 0; p < TOKENS; p++)
        first[p] = (float)p;
    const sparge_in in = {first, SPARGE_F32, 0, 0, 1}, again = {there, SPARGE_F32, 0, 0, 1};
    const sparge_out out = {there, SPARGE_F32, 0, 0, 1}, home = {back, SPARGE_F32, 0, 0, 1};
    for (int order = 0; order < ORDERS; order++) {
        int64_t *index = order_of((sparge_order)order, &grid, 1);
        cr_expect_eq(sparge_permute(&in, &out, 1, 1, TOKENS, 1, index, NULL), SPARGE_OK);
        for (int p = 0; p < TOKENS; p++)
            cr_expect_eq((int64_t)there[p], index[p]);
        memset(back, 0xff, sizeof back);
        cr_expect_eq(sparge_unpermute(&again, &home, 1, 1, TOKENS, 1, index, NULL), SPARGE_OK);
        cr_expect_arr_eq(back, first, sizeof first);
        free(index);
    }
}

Test(token_order, nothing_to_move)
{
    const int64_t index[] = {1, 0};
    const sparge_in in = {NULL, SPARGE_F16, 1, 1, 1};
    const sparge_out out = {NULL, SPARGE_F16, 1, 1, 1};
    for (int i = 0; i < 2; i++) {
        cr_expect_eq(movers[i](&in, &out, 0, 1, 2, 1, index, NULL), SPARGE_OK);
        cr_expect_eq(movers[i](&in, &out, 1, 0, 2, 1, index, NULL), SPARGE_OK);
        cr_expect_eq(movers[i](&in, &out, 1, 1, 0, 1, NULL, NULL), SPARGE_OK);
        cr_expect_eq(movers[i](&in, &out, 1, 1, 2, 0, index, NULL), SPARGE_OK);
    }
}

/* ---- Refusals of sparge_permute and sparge_unpermute -------------------------------------- */

/* Sizes and arguments of a call that is right, for one of them to be spoilt. */
typedef struct call {
    const sparge_in *from;
    const sparge_out *to;
    int64_t batch, heads, len, dim;
    const int64_t *index;
} call;

static void refuse_call(call c, sparge_status status, const char *sentence)
{
    for (int i = 0; i < 2; i++) {
        sparge_error error = {"old"};
        cr_expect_eq(movers[i](c.from, c.to, c.batch, c.heads, c.len, c.dim, c.index, &error),
                     status, "%s", sentence);
        cr_expect_str_eq(error.text, sentence);
        cr_expect_eq(movers[i](c.from, c.to, c.batch, c.heads, c.len, c.dim, c.index, NULL),
                     status);
    }
}

Test(token_order, refused_indices)
{
    /* 70 of them, for the check to need more than one word of bits. */
    enum { MANY = 70 };
    float from[MANY] = {0}, to[MANY];
    int64_t index[MANY];
    for (int p = 0; p < MANY; p++) {
        index[p] = MANY - 1 - p;
        to[p] = 0.1f;
    }
    const sparge_in in = {from, SPARGE_F32, MANY, MANY, 1};
    const sparge_out out = {to, SPARGE_F32, MANY, MANY, 1};
    const call good = {&in, &out, 1, 1, MANY, 1, index};

    index[3] = 70;
    refuse_call(good, SPARGE_ERR_ARGUMENT, "index[3] is 70, outside 0 .. len-1");
    index[3] = -1;
    refuse_call(good, SPARGE_ERR_ARGUMENT, "index[3] is -1, outside 0 .. len-1");
    index[3] = INT64_MIN;
    refuse_call(good, SPARGE_ERR_ARGUMENT, "index[3] is -9223372036854775808, outside 0 .. len-1");
    index[3] = 69;
    refuse_call(good, SPARGE_ERR_ARGUMENT, "index[3] is 69, as an earlier entry is");
    index[3] = 66;
    index[69] = 1;
    refuse_call(good, SPARGE_ERR_ARGUMENT, "index[69] is 1, as an earlier entry is");
    for (int p = 0; p < MANY; p++)
        cr_expect_eq(to[p], 0.1f, "a refused call wrote row %d", p);

    index[69] = 0;
    cr_expect_eq(sparge_permute(&in, &out, 1, 1, MANY, 1, index, NULL), SPARGE_OK);
    cr_expect_eq(to[0], 0.0f);
}

Test(token_order, refused_views)
{
    float from[2] = {0}, to[2];
    const int64_t index[2] = {1, 0};
    const sparge_in in = {from, SPARGE_F32, 2, 2, 1}, nowhere = {NULL, SPARGE_F32, 2, 2, 1};
    const sparge_in half = {from, SPARGE_F16, 2, 2, 1}, odd = {from, SPARGE_FP8, 2, 2, 1};
    const sparge_out out = {to, SPARGE_F32, 2, 2, 1}, lost = {NULL, SPARGE_F32, 2, 2, 1};
    const sparge_out half_out = {to, SPARGE_BF16, 2, 2, 1}, odd_out = {to, SPARGE_FP8, 2, 2, 1};
    const sparge_status bad = SPARGE_ERR_ARGUMENT;
    refuse_call((call){NULL, &out, 1, 1, 2, 1, index}, bad, "from is NULL");
    refuse_call((call){&in, NULL, 1, 1, 2, 1, index}, bad, "to is NULL");
    refuse_call((call){&nowhere, &out, 1, 1, 2, 1, index}, bad, "from->data is NULL");
    refuse_call((call){&in, &lost, 1, 1, 2, 1, index}, bad, "to->data is NULL");
    refuse_call((call){&in, &out, 1, 1, 2, 1, NULL}, bad, "index is NULL for len = 2");
    refuse_call((call){&half, &out, 1, 1, 2, 1, index}, bad, "to->dtype is 0 and from->dtype is 1");
    refuse_call((call){&half, &half_out, 1, 1, 2, 1, index}, bad,
                "to->dtype is 2 and from->dtype is 1");
    refuse_call((call){&odd, &odd_out, 1, 1, 2, 1, index}, bad,
                "to->dtype is 3 and from->dtype is 3");

    refuse_call((call){&in, &out, -1, 1, 2, 1, index}, bad, "batch is -1, which is too small");
    refuse_call((call){&in, &out, 1, -2, 2, 1, index}, bad, "heads is -2, which is too small");
    refuse_call((call){&in, &out, 1, 1, -3, 1, index}, bad, "len is -3, which is too small");
    refuse_call((call){&in, &out, 1, 1, 2, -4, index}, bad, "dim is -4, which is too small");
    refuse_call((call){&in, &out, INT64_C(1) << 32, INT64_C(1) << 32, 2, 1, index}, bad,
                "heads is 4294967296, which is too large");
}

/* The bits for the check of 2^59 indices do not fit any memory; no index is read before. */
Test(token_order, refused_for_memory)
{
    float from[1] = {0}, to[1];
    const int64_t index[1] = {0};
    const sparge_in in = {from, SPARGE_F32, 1, 1, 1};
    const sparge_out out = {to, SPARGE_F32, 1, 1, 1};
    refuse_call((call){&in, &out, 1, 1, INT64_C(1) << 59, 1, index}, SPARGE_ERR_MEMORY,
                "no memory for the check of 576460752303423488 indices");
}
