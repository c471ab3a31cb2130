/* SPDX-License-Identifier: Apache-2.0 */
/* svg.c: masks of Sparse VideoGen made by hand. */
#include <string.h>

#include "tests/methods/hand.h"

TestSuite(svg);

/* Three frames of 1 x 2, in token-major order 0 2 4 1 3 5. Keys are unit vectors and values the
 * squares of their numbers. In head 0 a token pays to the other of its frame, in head 1 to the next
 * frame's. */
enum { N = 6 };
static const sparge_grid grid = {3, 1, 2, 0, 0};

static hand make(float q[2][N][N], float k[N][N], float v[N])
{
    static const int to[2][N] = {{1, 0, 3, 2, 5, 4}, {2, 3, 4, 5, 2, 3}};
    memset(q, 0, sizeof(float[2][N][N]));
    memset(k, 0, sizeof(float[N][N]));
    for (int t = 0; t < N; t++) {
        k[t][t] = 1.0f;
        v[t] = (float)(t * t);
        q[0][t][to[0][t]] = q[1][t][to[1][t]] = 9.0f;
    }
    hand x = hand_make(2, 1, N, N, N, 1, q[0][0], k[0], v);
    x.context.grid = &grid;
    return x;
}

/* A band of 0.98 places is one of 1, and the first two places are kept: tokens 0 and 1 in the
 * spatial head, 0 and 2 in the temporal one. */
Test(svg, spatial_and_temporal)
{
    float q[2][N][N], k[N][N], v[N];
    const hand x = make(q, k, v);
    HAS_PAIRS(&x, "svg", 1,
              "110000 111000 111100 111110 110111 110011 "
              "101000 111110 101010 111101 111010 101101",
              0.3, 32, 1, 0, 1);
    HAS_PAIRS(&x, "svg", 1, /* without the first ones */
              "110000 111000 011100 001110 000111 000011 "
              "101000 010110 101010 010101 011010 000101",
              0.3, 32, 0, 0, 1);
    HAS_PAIRS(&x, "svg", 1, /* up to a multiple of 2, where the next frame is near enough */
              "111000 111100 111110 011111 001111 000111 "
              "111000 111100 111110 011111 001111 000111",
              0.3, 32, 0, 0, 2);
}

Test(svg, ends)
{
    float q[2][N][N], k[N][N], v[N];
    const hand x = make(q, k, v);
#define ALL "111111 111111 111111 111111 111111 111111 "
    HAS_PAIRS(&x, "svg", 1, ALL ALL, 1, 32, 0, 0, 1);
#undef ALL
    hand one = hand_make(1, 1, N, N, N, 1, q[0][0], k[0], v);
    one.context.grid = &grid;
    HAS_PAIRS(&one, "svg", 1, "100000 010000 001000 000100 000010 000001", 0, 32, 0, 0, 1);
}

/* Two frames of 1 x 2 between two tokens of text, which have 20 of 36 pairs. With values of 0
 * both errors are 0, and the head is spatial. */
Test(svg, text)
{
    const sparge_grid with_text = {2, 1, 2, 1, 1};
    const float zeros[N] = {0};
    hand x = hand_make(1, 1, N, N, 1, 1, zeros, zeros, zeros);
    x.context.grid = &with_text;
    HAS_PAIRS(&x, "svg", 1, "111111 111001 111101 101111 100111 111111", 0.74, 8, 0, 0, 1);
    HAS_PAIRS(&x, "svg", 1, "111111 110001 101001 100101 100011 111111", 0.5, 8, 0, 0, 1);
    HAS_PAIRS(&x, "svg", 1, "111111 111001 111001 111101 111011 111111", 0.5, 8, 1, 0, 1);
}
