/* SPDX-License-Identifier: Apache-2.0 */
/* token_order.c: orders for the tokens of images and video, and moving rows by them. Sec 3.7. */
#include "sparge_order.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "methods/method.h"

static const int64_t most = INT64_MAX / 8; /* no memory holds more elements of 8 bytes */

/* The product of n sizes. Those that are not 0 must multiply without overflow. */
static sparge_status multiply(int n, const int64_t *sizes, const char *const *names,
                              int64_t *product, sparge_error *error)
{
    int64_t capacity = most;
    *product = 1;
    for (int i = 0; i < n; i++) {
        if (sizes[i] < 0 || sizes[i] > capacity)
            return sparge_fail(error, SPARGE_ERR_ARGUMENT, "%s is %" PRId64 ", which is too %s",
                               names[i], sizes[i], sizes[i] < 0 ? "small" : "large");
        capacity /= sizes[i] > 0 ? sizes[i] : 1;
        *product *= sizes[i];
    }
    return SPARGE_OK;
}

/* ---- The plain orders ------------------------------------------------------------------ */

/* One side of a box of tokens. Neighbours differ by `step` in arriving number, and a negative step
 * runs the side backwards; a corner and three sides make a box. */
typedef struct side {
    int64_t length, step;
} side;

/* Writes a box in three plain loops; returns the place after the last. */
static int64_t *nest(int64_t *place, int64_t start, side slow, side middle, side fast)
{
    for (int64_t i = 0; i < slow.length; i++)
        for (int64_t j = 0; j < middle.length; j++)
            for (int64_t k = 0; k < fast.length; k++)
                *place++ = start + i * slow.step + j * middle.step + k * fast.step;
    return place;
}

/* Uniform in 0 .. bound-1 and the same on every machine: splitmix64. */
static uint64_t random_below(uint64_t bound, uint64_t *state)
{
    const uint64_t surplus = (0 - bound) % bound; /* 2^64 mod bound: remainders one draw too many */
    uint64_t z;
    do {
        z = sparge_mix(*state += 0x9e3779b97f4a7c15);
    } while (z < surplus);
    return z % bound;
}

static void shuffle(int64_t *place, int64_t count, uint64_t seed) /* Fisher and Yates */
{
    for (int64_t i = count - 1; i > 0; i--) {
        const uint64_t j = random_below((uint64_t)i + 1, &seed);
        const int64_t token = place[i];
        place[i] = place[j];
        place[j] = token;
    }
}

/* ---- The Hilbert curve for boxes of any size ------------------------------------------- */

static side part(side s, int64_t length) { return (side){length, s.step}; }
static side back(side s, int64_t length) { return (side){length, -s.step}; }
static bool longer(side s, side than) { return 3 * s.length > 4 * than.length; }
static bool odd(side s) { return s.length % 2 == 1; }

/* About half of a side of 2 or more, and even except for 1 of 2. */
static int64_t half(side s) { return s.length == 2 ? 1 : s.length / 2 + s.length / 2 % 2; }

/* Visits a box in unit steps, from the corner `start` to the corner at the other end of side a;
 * returns the place after the last.
 *
 * A unit step changes the colour of a chessboard in 3-D. So there is such a path only if a is even,
 * or if all three sides are odd (and a > 1, unless the box is one token). Every cut below leaves
 * parts of which that is true again: most of them run along a side that `half` made even, and what
 * is left of odd sides meets odd sides only. No part has more than 2/3 of the box, so the depth is
 * logarithmic. */
static int64_t *hilbert(int64_t *place, int64_t start, side a, side b, side c)
{
    if (b.length < c.length)
        return hilbert(place, start, a, c, b);
    if (b.length == 1)
        return nest(place, start, c, b, a);

    if (longer(a, b)) {
        const int64_t a1 = half(a);
        place = hilbert(place, start, part(a, a1), b, c);
        return hilbert(place, start + a1 * a.step, part(a, a.length - a1), b, c);
    }

    const bool flat = longer(b, c) || odd(a);
    if (!flat && !odd(b)) { /* if one of b and c is odd, it has to be b; else either will do */
        const side even = b;
        b = c;
        c = even;
    }
    const int64_t a1 = flat || !odd(c) ? half(a) : a.length / 2 | 1, a2 = a.length - a1;
    const int64_t b1 = half(b), b2 = b.length - b1;
    const int64_t a_end = (a.length - 1) * a.step, b1_end = (b1 - 1) * b.step;
    const int64_t b2_start = b1 * b.step, c_end = (c.length - 1) * c.step;

    if (flat) { /* Hilbert's square: out along b, over along a, back along b */
        place = hilbert(place, start, part(b, b1), part(a, a1), c);
        place = hilbert(place, start + b2_start, a, part(b, b2), c);
        return hilbert(place, start + a_end + b1_end, back(b, b1), back(a, a2), c);
    }
    /* Hilbert's cube: out along b, then c, then b again; over along a; back as it came */
    const int64_t c1 = half(c), c2 = c.length - c1;
    place = hilbert(place, start, part(b, b1), part(a, a1), part(c, c1));
    place = hilbert(place, start + b2_start, c, part(a, a1), part(b, b2));
    place = hilbert(place, start + b1_end + c_end, a, back(b, b1), back(c, c2));
    start += a_end;
    place = hilbert(place, start + b2_start + c_end, back(c, c.length), back(a, a2), part(b, b2));
    return hilbert(place, start + b1_end, back(b, b1), back(a, a2), part(c, c1));
}

/* Whether it is better to run along this side than along that: an even one, and a long one. */
static bool leads(side s, side than)
{
    return odd(s) == odd(than) ? s.length > than.length : odd(than);
}

/* The same, but ends at any corner: then a box of any size has a side to run along. */
static int64_t *hilbert_grid(int64_t *place, int64_t start, side a, side b, side c)
{
    if (leads(b, a))
        return hilbert_grid(place, start, b, a, c);
    if (leads(c, a))
        return hilbert_grid(place, start, c, b, a);
    if (b.length < c.length)
        return hilbert_grid(place, start, a, c, b);

    if (odd(b) && longer(b, a)) { /* an even piece of b first: a would run all of b twice */
        const int64_t b1 = (b.length - a.length + 1) / 2 * 2;
        place = hilbert(place, start, part(b, b1), a, c);
        return hilbert_grid(place, start + b1 * b.step, a, part(b, b.length - b1), c);
    }
    return hilbert(place, start, a, b, c);
}

/* ---- What sparge.h promises ------------------------------------------------------------ */

const char *sparge_order_string(sparge_order order)
{
    static const char *const names[] = {"row", "column", "time", "random", "hilbert"};
    return order >= SPARGE_ROW_MAJOR && order <= SPARGE_HILBERT ? names[order] : "unknown";
}

sparge_status sparge_token_order(sparge_order order, const sparge_grid *grid, uint64_t seed,
                                 int64_t *index, sparge_error *error)
{
    if (!grid)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "grid is NULL");
    if (order < SPARGE_ROW_MAJOR || order > SPARGE_HILBERT)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "order is %d, which is none", (int)order);

    int64_t image;
    const sparge_status status =
        multiply(3, (const int64_t[]){grid->t, grid->h, grid->w},
                 (const char *const[]){"grid->t", "grid->h", "grid->w"}, &image, error);
    if (status != SPARGE_OK)
        return status;
    const int64_t text[] = {grid->text_before, grid->text_after};
    int64_t total = image;
    for (int i = 0; i < 2; i++) {
        if (text[i] < 0 || text[i] > most - total)
            return sparge_fail(
                error, SPARGE_ERR_ARGUMENT, "grid->text_%s is %" PRId64 ", which is too %s",
                i == 0 ? "before" : "after", text[i], text[i] < 0 ? "small" : "large");
        total += text[i];
    }
    if (!index && total > 0)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "index is NULL for %" PRId64 " tokens",
                           total);

    for (int64_t p = 0; p < total; p++)
        index[p] = p; /* and so it stays for text and in row-major order */
    if (image == 0)
        return sparge_succeed(error);
    int64_t *const place = index + text[0];
    const side w = {grid->w, 1}, h = {grid->h, grid->w}, t = {grid->t, grid->h * grid->w};
    if (order == SPARGE_COLUMN_MAJOR)
        nest(place, text[0], t, w, h);
    else if (order == SPARGE_TIME_MAJOR)
        nest(place, text[0], h, w, t);
    else if (order == SPARGE_RANDOM)
        shuffle(place, image, seed);
    else if (order == SPARGE_HILBERT)
        hilbert_grid(place, text[0], w, h, t);
    return sparge_succeed(error);
}

static sparge_status check_permutation(const int64_t *index, int64_t len, sparge_error *error)
{
    uint64_t *const seen = calloc((size_t)len / 64 + 1, sizeof *seen); /* a bit for each token */
    if (!seen)
        return sparge_fail(error, SPARGE_ERR_MEMORY,
                           "no memory for the check of %" PRId64 " indices", len);
    sparge_status status = SPARGE_OK;
    for (int64_t p = 0; p < len && status == SPARGE_OK; p++) {
        const int64_t i = index[p];
        const bool token = i >= 0 && i < len;
        if (!token || seen[i / 64] >> i % 64 & 1)
            status =
                sparge_fail(error, SPARGE_ERR_ARGUMENT, "index[%" PRId64 "] is %" PRId64 ", %s", p,
                            i, token ? "as an earlier entry is" : "outside 0 .. len-1");
        else
            seen[i / 64] |= (uint64_t)1 << i % 64;
    }
    free(seen);
    return status;
}

/* Scatters row p to index[p], or gathers row index[p] to p. */
static sparge_status move(bool scatter, const sparge_in *from, const sparge_out *to, int64_t batch,
                          int64_t heads, int64_t len, int64_t dim, const int64_t *index,
                          sparge_error *error)
{
    int64_t total;
    sparge_status status =
        multiply(4, (const int64_t[]){batch, heads, len, dim},
                 (const char *const[]){"batch", "heads", "len", "dim"}, &total, error);
    if (status != SPARGE_OK)
        return status;
    if (!from || (!from->data && total > 0))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "from%s is NULL", from ? "->data" : "");
    if (!to || (!to->data && total > 0))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "to%s is NULL", to ? "->data" : "");
    if (from->dtype < SPARGE_F32 || from->dtype > SPARGE_BF16 || to->dtype != from->dtype)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "to->dtype is %d and from->dtype is %d",
                           (int)to->dtype, (int)from->dtype);
    if (!index && len > 0)
        return sparge_fail(error, SPARGE_ERR_ARGUMENT, "index is NULL for len = %" PRId64, len);
    status = check_permutation(index, len, error);
    if (status != SPARGE_OK)
        return status;

    const int64_t size = from->dtype == SPARGE_F32 ? 4 : 2; /* bytes of an element */
    for (int64_t b = 0; b < batch && total > 0; b++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t p = 0; p < len; p++) {
                const int64_t source = scatter ? p : index[p], target = scatter ? index[p] : p;
                const int64_t read = b * from->batch + h * from->head + source * from->token;
                const int64_t write = b * to->batch + h * to->head + target * to->token;
                memcpy((char *)to->data + write * size, (const char *)from->data + read * size,
                       (size_t)(dim * size));
            }
    return sparge_succeed(error);
}

sparge_status sparge_permute(const sparge_in *from, const sparge_out *to, int64_t batch,
                             int64_t heads, int64_t len, int64_t dim, const int64_t *index,
                             sparge_error *error)
{
    return move(false, from, to, batch, heads, len, dim, index, error);
}

sparge_status sparge_unpermute(const sparge_in *from, const sparge_out *to, int64_t batch,
                               int64_t heads, int64_t len, int64_t dim, const int64_t *index,
                               sparge_error *error)
{
    return move(true, from, to, batch, heads, len, dim, index, error);
}
