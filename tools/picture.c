/* SPDX-License-Identifier: Apache-2.0 */
/* picture.c: heat maps on a logarithmic scale, masks, and the letters around them. */
#include "tools/picture.h"

#include <cairo-pdf.h>
#include <cairo-svg.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { /* pixels */
       SIDE = 288,
       CELL_MAX = 32, /* about a panel, at most a cell */
       MARGIN = 28,
       LEFT = 46,
       BELOW = 58, /* around everything; for the axes of a head */
       CAPTION = 48,
       GAP = 24,
       HEADS = 32, /* above a head; between its panels, and between heads */
       HEADER = 144,
       LOWEST = 96,
       NARROWEST = 768,
};

typedef struct layout {
    int64_t cell_w, cell_h, panel_w, panel_h; /* of one panel */
    int64_t right;                            /* how far the right panel is from the left */
    int64_t head_w, head_h;                   /* of a head, with its letters and the gap */
    int64_t across, down;                     /* heads */
} layout;

static int64_t clamp(int64_t x, int64_t low, int64_t high)
{
    return x < low ? low : x > high ? high : x;
}

static layout layout_of(const picture *p)
{
    layout l = {.cell_w = clamp(SIDE / (p->columns ? p->columns : 1), 1, CELL_MAX)};
    const int64_t least = (CAPTION - 1) / (p->rows ? p->rows : 1) + 1; /* no panel is a mere line */
    l.cell_h = clamp((l.cell_w * p->block_q + p->block_k / 2) / p->block_k, least, 4 * CELL_MAX);
    l.panel_w = l.cell_w * p->columns;
    l.panel_h = l.cell_h * p->rows;
    l.right = clamp(l.panel_w, 3 * LOWEST / 2, INT64_MAX / 4) + GAP;
    l.head_w = LEFT + 2 * l.right - GAP + HEADS;
    l.head_h = CAPTION + clamp(l.panel_h, LOWEST, INT64_MAX / 4) + BELOW;
    /* About 3 wide to 2 high. */
    const double wide = sqrt(1.5 * (double)p->heads * (double)l.head_h / (double)l.head_w);
    l.across = clamp((int64_t)(wide + 0.5), 1, p->heads ? p->heads : 1);
    l.down = (p->heads + l.across - 1) / l.across;
    return l;
}

bool picture_size(const picture *p, int64_t *width, int64_t *height)
{
    *width = *height = INT64_MAX;
    if (p->columns > PICTURE_MAX || p->rows > PICTURE_MAX || p->heads > PICTURE_MAX)
        return false;
    const layout l = layout_of(p);
    *width = clamp(2 * MARGIN - HEADS + l.across * l.head_w, NARROWEST, INT64_MAX);
    *height = MARGIN + HEADER + l.down * l.head_h;
    return *width <= PICTURE_MAX && *height <= PICTURE_MAX;
}

/* ---- Colours ---- */

enum {
    KEPT = 0x33265c,
    DROPPED = 0xf0902e,
    SKIPPED = 0xf6efe6,
    INVISIBLE = 0xd9dbe2,
    NOT_A_NUMBER = 0x18a7a0,
    INK = 0x22222a,
    FAINT = 0x73737e,
    PAPER = 0xffffff,
};

static int mix(int from, int to, double share)
{
    int colour = 0;
    for (int shift = 0; shift <= 16; shift += 8) {
        const int a = from >> shift & 255, b = to >> shift & 255;
        colour |= (int)lround(a + share * (b - a)) << shift;
    }
    return colour;
}

/* Seaborn's rocket (Waskom), dark at 1: equal steps look equal. */
static int heat(double share)
{
    static const int anchor[] = {0xfaebdd, 0xf6b48e, 0xf37651, 0xe13342,
                                 0xad1759, 0x701f57, 0x35193e, 0x03051a};
    enum { LAST = sizeof anchor / sizeof *anchor - 1 };
    const double at = fmin(fmax(share, 0.0), 1.0) * LAST;
    const int n = at < LAST ? (int)at : LAST - 1;
    return mix(anchor[n], anchor[n + 1], at - n);
}

/* Decades below 1 that the scale shows: two below what an even row pays to each block. */
static int decades(const picture *p)
{
    return 2 + (int)ceil(log10((double)(p->columns > 1 ? p->columns : 10)) - 1e-9);
}

static int colour_of_mass(double mass, float done, int scale)
{
    if (isnan(mass))
        return NOT_A_NUMBER;
    if (done == PICTURE_INVISIBLE)
        return INVISIBLE;
    return mass > 0.0 ? heat(1.0 + log10(mass) / scale) : heat(0.0);
}

static int colour_of_mask(float done)
{
    if (done == PICTURE_INVISIBLE)
        return INVISIBLE;
    return done == PICTURE_SKIPPED ? SKIPPED : mix(DROPPED, KEPT, done);
}

/* ---- Letters ---- */

static void ink(cairo_t *to, int colour)
{
    cairo_set_source_rgb(to, (colour >> 16 & 255) / 255.0, (colour >> 8 & 255) / 255.0,
                         (colour & 255) / 255.0);
}

/* `anchor` of the text's width lies left of x; y is the base line. Returns where the text ends. */
static double print(cairo_t *to, double x, double y, double anchor, double size, bool bold,
                    int colour, const char *text)
{
    cairo_text_extents_t extents;
    cairo_select_font_face(to, "sans-serif", CAIRO_FONT_SLANT_NORMAL,
                           bold ? CAIRO_FONT_WEIGHT_BOLD : CAIRO_FONT_WEIGHT_NORMAL);
    cairo_set_font_size(to, size);
    cairo_text_extents(to, text, &extents);
    ink(to, colour);
    cairo_move_to(to, round(x - anchor * extents.x_advance), y);
    cairo_show_text(to, text);
    return x + (1.0 - anchor) * extents.x_advance;
}

static void box(cairo_t *to, double x, double y, double w, double h, int fill)
{
    cairo_rectangle(to, x, y, w, h);
    ink(to, fill);
    cairo_fill(to);
}

static void frame(cairo_t *to, double x, double y, double w, double h)
{
    cairo_rectangle(to, x - 0.5, y - 0.5, w + 1, h + 1);
    cairo_set_line_width(to, 1);
    ink(to, FAINT);
    cairo_stroke(to);
}

/* Numbers along one axis: every 1, 2, 5, 10, ... blocks, as there is room. */
static void axis(cairo_t *to, double x, double y, int64_t blocks, int64_t cell, bool vertical)
{
    int64_t every = 1;
    for (int n = 0; every * cell < (vertical ? 26 : 38); n++)
        every = every * (n % 3 == 1 ? 5 : 4) / 2; /* 1 2 5 10 20 50 */
    for (int64_t n = 0; n < blocks; n += every) {
        char text[24];
        snprintf(text, sizeof text, "%lld", (long long)n);
        const double at = ((double)n + 0.5) * (double)cell;
        if (vertical)
            print(to, x - 6, y + at + 3.5, 1.0, 10, false, FAINT, text);
        else
            print(to, x + at, y + 14, 0.5, 10, false, FAINT, text);
    }
    const double middle = (double)(blocks * cell) / 2;
    cairo_save(to);
    cairo_translate(to, vertical ? x - 34 : x + middle, vertical ? y + middle : y + 29);
    if (vertical)
        cairo_rotate(to, -acos(0.0)); /* a quarter turn */
    print(to, 0, 0, 0.5, 11, false, INK, vertical ? "query block" : "key block");
    cairo_restore(to);
}

/* ---- The parts ---- */

static void cells(cairo_t *to, double x, double y, const layout *l, const picture *p, int64_t head,
                  bool mask)
{
    cairo_surface_t *const image =
        cairo_image_surface_create(CAIRO_FORMAT_RGB24, (int)l->panel_w, (int)l->panel_h);
    const int64_t stride = cairo_image_surface_get_stride(image) / 4;
    uint32_t *pixel = (uint32_t *)(void *)cairo_image_surface_get_data(image);
    const int scale = decades(p);
    for (int64_t at = 0; at < p->rows * p->columns && pixel; at++) {
        const int64_t n = head * p->rows * p->columns + at;
        const int colour =
            mask ? colour_of_mask(p->done[n]) : colour_of_mass(p->mass[n], p->done[n], scale);
        const int64_t top = at / p->columns * l->cell_h, left = at % p->columns * l->cell_w;
        for (int64_t r = 0; r < l->cell_h; r++)
            for (int64_t c = 0; c < l->cell_w; c++)
                pixel[(top + r) * stride + left + c] = (uint32_t)colour;
    }
    cairo_surface_mark_dirty(image);
    cairo_set_source_surface(to, image, x, y); /* which may have failed: then so has `to` */
    cairo_paint(to);
    cairo_surface_destroy(image);
}

static void panel(cairo_t *to, int64_t x, int64_t y, const layout *l, const picture *p,
                  int64_t head, bool mask)
{
    const double left = (double)x, top = (double)y, high = (double)l->panel_h;
    cells(to, left, top, l, p, head, mask);
    print(to, left, top - 8, 0, 11, false, FAINT, mask ? "mask" : "attention");
    frame(to, left, top, (double)l->panel_w, high);
    axis(to, left, top + high, p->columns, l->cell_w, false);
    if (!mask) /* both panels share this one */
        axis(to, left, top, p->rows, l->cell_h, true);
}

/* What the colours mean: the scale of attention, and the words of the mask. */
static void header(cairo_t *to, const picture *p, double width)
{
    enum { BAR = 210, HIGH = 12 };
    static const char *const power[] = {"1",    "10⁻¹", "10⁻²", "10⁻³", "10⁻⁴",
                                        "10⁻⁵", "10⁻⁶", "10⁻⁷", "10⁻⁸"};
    const double y = MARGIN + 92;
    print(to, MARGIN, MARGIN + 14, 0, 19, true, INK, p->title);
    print(to, MARGIN, MARGIN + 37, 0, 12, false, FAINT, p->subtitle);
    print(to, MARGIN, MARGIN + 54, 0, 12, false, FAINT, p->reasons);
    double x = MARGIN;
    print(to, x, y - 7, 0, 11, false, INK, "attention of a query block to a key block");
    const int scale = decades(p);
    for (int n = 0; n < BAR; n++)
        box(to, x + n, y, 1, HIGH, heat((n + 0.5) / BAR));
    frame(to, x, y, BAR, HIGH);
    for (int n = 0; n <= scale; n++)
        print(to, x + BAR * (1.0 - (double)n / scale), y + HIGH + 14, n == scale ? 0 : 0.5, 10,
              false, FAINT, power[n]);
    const struct {
        bool shown;
        int colour;
        const char *text;
    } words[] = {
        {true, KEPT, "kept"},
        {p->lambda, DROPPED, "kept, P·V dropped by λ"},
        {p->lambda || p->partial, mix(DROPPED, KEPT, 0.5), "in part"},
        {true, SKIPPED, "skipped"},
        {true, INVISIBLE, "not visible"},
    };
    x += BAR + 2 * GAP;
    print(to, x, y - 7, 0, 11, false, INK, "mask");
    for (size_t n = 0; n < sizeof words / sizeof *words; n++)
        if (words[n].shown) {
            box(to, x, y, HIGH, HIGH, words[n].colour);
            frame(to, x, y, HIGH, HIGH);
            x = round(print(to, x + HIGH + 6, y + 10, 0, 11, false, INK, words[n].text)) + 16;
        }
    box(to, MARGIN, MARGIN + HEADER - 12, width - 2 * MARGIN, 1, INVISIBLE);
}

static cairo_status_t draw(const picture *p, cairo_surface_t *on, double width)
{
    const layout l = layout_of(p);
    cairo_t *to = cairo_create(on);
    cairo_set_source_rgb(to, 1, 1, 1);
    cairo_paint(to);
    header(to, p, width);
    for (int64_t n = 0; n < p->heads && cairo_status(to) == CAIRO_STATUS_SUCCESS; n++) {
        const int64_t x = MARGIN + LEFT + n % l.across * l.head_w;
        const int64_t y = MARGIN + HEADER + CAPTION + n / l.across * l.head_h;
        print(to, (double)x, (double)y - 26, 0, 13, true, INK, p->head_title[n]);
        panel(to, x, y, &l, p, n, false);
        panel(to, x + l.right, y, &l, p, n, true);
    }
    const cairo_status_t status = cairo_status(to);
    cairo_destroy(to);
    return status;
}

/* ---- The file ---- */

picture_format picture_format_of(const char *path)
{
    static const char *const end[] = {
        [PICTURE_PNG] = ".png", [PICTURE_SVG] = ".svg", [PICTURE_PDF] = ".pdf"};
    const char *dot = strrchr(path, '.');
    for (int n = PICTURE_PNG; n <= PICTURE_PDF && dot; n++)
        if (strcasecmp(dot, end[n]) == 0)
            return (picture_format)n;
    return PICTURE_UNKNOWN;
}

static cairo_status_t keep(void *stream, const unsigned char *bytes, unsigned count)
{
    return fwrite(bytes, 1, count, stream) == count ? CAIRO_STATUS_SUCCESS
                                                    : CAIRO_STATUS_WRITE_ERROR;
}

char *picture_draw(const picture *p, picture_format format, size_t *size)
{
    int64_t width, height;
    char *bytes = NULL;
    FILE *stream = open_memstream(&bytes, size);
    if (!stream)
        return NULL;
    picture_size(p, &width, &height);
    cairo_surface_t *const surface =
        format == PICTURE_SVG
            ? cairo_svg_surface_create_for_stream(keep, stream, (double)width, (double)height)
        : format == PICTURE_PDF
            ? cairo_pdf_surface_create_for_stream(keep, stream, (double)width, (double)height)
            : cairo_image_surface_create(CAIRO_FORMAT_RGB24, (int)width, (int)height);
    cairo_status_t status = draw(p, surface, (double)width);
    if (!status && format == PICTURE_PNG)
        status = cairo_surface_write_to_png_stream(surface, keep, stream);
    cairo_surface_finish(surface);
    if (!status)
        status = cairo_surface_status(surface);
    cairo_surface_destroy(surface);
    if (fclose(stream) == 0 && !status)
        return bytes;
    free(bytes);
    return NULL;
}
