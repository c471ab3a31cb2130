/* SPDX-License-Identifier: Apache-2.0 */
/* draft.c: masks of DraftAttention made by hand. */
#include <math.h>
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(draft);

enum { N = 14, DIM = 3 };

/* A frame of 2 x 6 between two tokens of text, in patches of 2 x 2. Mean keys of the patches are
 * unit vectors, and mean queries give them 8 1 1, 1 1 16 and 1 1 1 parts of attention: no token is
 * like the mean of its patch. */
static const sparge_grid grid = {1, 2, 6, 1, 1};
static const double parts[DIM][DIM] = {{8, 1, 1}, {1, 1, 16}, {1, 1, 1}};

static hand make(float q[N][DIM], float k[N][DIM])
{
    for (int t = 0; t < N; t++)
        for (int c = 0; c < DIM; c++) {
            const int patch = (t - 1) % 6 / 2, sign = (t - 1) % 2 ? 1 : -1;
            const bool text = t == 0 || t == N - 1;
            q[t][c] = text ? 9.0f : (float)log(parts[patch][c]) + (float)(sign * (c + 1));
            k[t][c] = text ? 9.0f : (float)(patch == c) + (float)(2 * sign * (c + 1));
        }
    hand x = hand_make(1, 1, N, N, DIM, DIM, q[0], k[0], k[0]);
    x.context.grid = &grid;
    return x;
}

#define ALL "11111111111111 "
#define A   "11100001100001 " /* the first patch and the text */
#define C   "10000110000111 "
#define AB  "11111001111001 "

/* Of nine entries 6 are the smallest, and the sixth and what equals it is kept. Text has all, and
 * all have it. */
Test(draft, of_the_head)
{
    float q[N][DIM], k[N][DIM];
    const hand x = make(q, k);
    HAS_PAIRS(&x, "draft", 1, ALL A A C C ALL ALL A A C C ALL ALL ALL, 1.0 / 3.0, 2, 2);
    /* 4 are the smallest */
    HAS_PAIRS(&x, "draft", 1, ALL ALL ALL C C ALL ALL ALL ALL C C ALL ALL ALL, 0.5, 2, 2);
    HAS_PAIRS(&x, "draft", 1, ALL ALL ALL ALL ALL ALL ALL ALL ALL ALL ALL ALL ALL ALL, 1, 2, 2);
}

/* The best entry is in the second row. The first of equal ones is in the third. */
Test(draft, each_row_has_its_best)
{
    float q[N][DIM], k[N][DIM];
    const hand x = make(q, k);
    HAS_PAIRS(&x, "draft", 1, ALL A A C C A A A A C C A A ALL, 0, 2, 2);
}

/* Two frames of 2 x 3: blocks are tokens 0 1 3 4 | 2 5 6 7 | 9 10 8 11. Queries pay to the second,
 * of which tokens 2 and 7 alone are not 0. */
Test(draft, patches_that_do_not_divide)
{
    const sparge_grid odd = {2, 2, 3, 0, 0};
    const float q[12] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const float k[12] = {0, 0, 9, 0, 0, 0, 0, 9, 0, 0, 0, 0};
    hand x = hand_make(1, 1, 12, 12, 1, 1, q, k, k);
    x.context.grid = &odd;
#define B "001001110000 "
    HAS_PAIRS(&x, "draft", 1, B B B B B B B B B B B "001001110000", 0.2, 2, 2);
}

Test(draft, a_patch_is_a_block)
{
    const double param[] = {0.5, 33, 32};
    float q[N][DIM], k[N][DIM];
    const hand x = make(q, k);
    sparge_plan plan;
    sparge_error error = {""};
    check_equal(sparge_method_plan(sparge_method_find("draft"), &x.p, &x.o, &x.context, param,
                                   &plan, &error),
                SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "h x w of draft is 33 x 32"), "%s", error.text);
}
