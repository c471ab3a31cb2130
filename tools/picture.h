/* SPDX-License-Identifier: Apache-2.0 */
/* picture.h: the picture of sparge map: for every head its attention beside its mask. */
#ifndef SPARGE_TOOLS_PICTURE_H
#define SPARGE_TOOLS_PICTURE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PICTURE_MAX = 16384, HEAD_TITLE = 160 }; /* pixels of a side; bytes */

/* Beside the share of a kept block that was computed, 0 to 1: */
#define PICTURE_SKIPPED   (-1.0f)
#define PICTURE_INVISIBLE (-2.0f) /* no row may see it */

typedef struct picture {
    int64_t heads, rows, columns; /* query blocks, key blocks */
    int64_t block_q, block_k;     /* tokens: cells have their proportions */
    const double *mass;           /* [heads][rows][columns] attention */
    const float *done;            /* [heads][rows][columns] */
    bool lambda;                  /* is there anything to drop? */
    bool partial;                 /* are there blocks that are attended in part? */
    const char *title, *subtitle, *reasons;
    const char (*head_title)[HEAD_TITLE]; /* [heads] */
} picture;

/* In pixels; false where it would be larger than PICTURE_MAX. */
bool picture_size(const picture *p, int64_t *width, int64_t *height);

/* What the end of a name stands for. */
typedef enum picture_format {
    PICTURE_UNKNOWN,
    PICTURE_PNG,
    PICTURE_SVG,
    PICTURE_PDF
} picture_format;
picture_format picture_format_of(const char *path);

/* All bytes of the file, to be freed; NULL: no memory. */
char *picture_draw(const picture *p, picture_format format, size_t *size);

#endif
