/* SPDX-License-Identifier: Apache-2.0 */
/* matmul.c: activations times weights: by oneDNN or a BLAS where the build found one, or else by
 * the plain loop. */
#include "experiments/lm/matmul.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(LM_ONEDNN)
#include <oneapi/dnnl/dnnl.h>
#elif defined(LM_CBLAS)
#include <cblas.h>
#endif

enum { PIECE = 512 }; /* rows of the weights that are floats at a time */

#if defined(LM_ONEDNN) || defined(LM_CBLAS)

/* These libraries end the program where they have no memory for code and for what each thread
 * packs: is there more than they take? */
static bool has_room(void)
{
    size_t bytes = (size_t)32 << 20;
#ifdef _OPENMP
    bytes += (size_t)omp_get_max_threads() << 24;
#endif
    void *pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return pages != MAP_FAILED && munmap(pages, bytes) == 0;
}

#endif

#if defined(LM_ONEDNN)

const char *matmul_by(void) { return "oneDNN"; }

/* y [rows][width] of rows `stride` apart = x [rows][n] w [width][n]^T */
static bool multiply(const float *x, int64_t rows, int64_t n, const float *w, int64_t width,
                     float *y, int64_t stride)
{
    return has_room() &&
           dnnl_sgemm('N', 'T', rows, width, n, 1.0f, x, n, w, n, 0.0f, y, stride) == dnnl_success;
}

#elif defined(LM_CBLAS)

const char *matmul_by(void) { return "OpenBLAS"; }

static bool multiply(const float *x, int64_t rows, int64_t n, const float *w, int64_t width,
                     float *y, int64_t stride)
{
    if (!has_room())
        return false;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)rows, (int)width, (int)n, 1.0f, x,
                (int)n, w, (int)n, 0.0f, y, (int)stride);
    return true;
}

#else

const char *matmul_by(void) { return "plain"; }

enum { TILE = 4, LANES = 8 };

/* part [TILE][TILE][LANES] += x [rows][n] w [columns][n]^T; of the LANES parts of a sum a compiler
 * makes vectors. */
static inline void accumulate(const float *x, const float *w, int64_t n, int rows, int columns,
                              float part[TILE][TILE][LANES])
{
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES)
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < columns; k++)
                for (int lane = 0; lane < LANES; lane++)
                    part[r][k][lane] += x[r * n + c + lane] * w[k * n + c + lane];
    for (; c < n; c++)
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < columns; k++)
                part[r][k][0] += x[r * n + c] * w[k * n + c];
}

#if defined(__x86_64__)
__attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#endif
static void
tile(const float *x, const float *w, int64_t n, int rows, int columns, float *y, int64_t stride)
{
    float part[TILE][TILE][LANES] = {0};
    if (rows == TILE && columns == TILE)
        accumulate(x, w, n, TILE, TILE, part); /* with bounds that the compiler knows */
    else
        accumulate(x, w, n, rows, columns, part);
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < columns; k++) {
            float sum = 0.0f;
            for (int lane = 0; lane < LANES; lane++)
                sum += part[r][k][lane];
            y[r * stride + k] = sum;
        }
}

static int at_most_a_tile(int64_t x) { return x < TILE ? (int)x : TILE; }

static bool multiply(const float *x, int64_t rows, int64_t n, const float *w, int64_t width,
                     float *y, int64_t stride)
{
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r += TILE)
        for (int64_t k = 0; k < width; k += TILE)
            tile(x + r * n, w + k * n, n, at_most_a_tile(rows - r), at_most_a_tile(width - k),
                 y + r * stride + k, stride);
    return true;
}

#endif

bool matmul(const float *x, int64_t rows, const tensor *w, const tensor *bias, float *y)
{
    const int64_t n = w->columns, width = w->rows;
    float *piece = malloc((size_t)PIECE * (size_t)n * sizeof *piece);
    float *add = malloc((size_t)width * sizeof *add);
    bool ok = piece && add;
    for (int64_t first = 0; first < width && ok; first += PIECE) {
        const int64_t count = width - first < PIECE ? width - first : PIECE;
        tensor_read(w, first, count, piece);
        ok = multiply(x, rows, n, piece, count, y + first, width);
    }
    if (ok && bias) {
        tensor_read(bias, 0, 1, add);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < width; c++)
                y[r * width + c] += add[c];
    }
    free(piece);
    free(add);
    return ok;
}
