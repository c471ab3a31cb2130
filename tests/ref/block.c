/* SPDX-License-Identifier: Apache-2.0 */
/* block.c: what is done to one block of tokens (Sec 3.3, Algorithm 1 line 3): literal tables, and
 * cosines by the explicit Gram matrix.
 *
 * A sum shows its order where it swallows: beside 2^24 a float loses a 1, beside 2^60 a double
 * does. */
#include "ref/ref.h"

#include "tests/support/check.h"

TestSuite(block);

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

/* ---- load ------------------------------------------------------------------------------------ */

/* Loads into buffers of the exact size; nonfinite is compared with a string of 0 and 1. */
static void loads(const char *what, const sparge_in *in, int64_t batch, int64_t head, int64_t first,
                  int64_t rows, int64_t dim, const float *mean, const float *want,
                  const char *nonfinite)
{
    check_case("load: %s", what);
    float *x = check_alloc((size_t)(rows * dim) * sizeof *x);
    bool *marks = check_alloc((size_t)(rows * dim) * sizeof *marks);
    sparge_ref_load(in, batch, head, first, rows, dim, x, marks);
    if (mean)
        sparge_ref_subtract_mean(x, marks, rows, dim, mean);
    check_same(x, want, rows * dim);
    for (int64_t e = 0; e < rows * dim; e++)
        check(marks[e] == (nonfinite[e] == '1'), "element %lld is marked %d", (long long)e,
              marks[e]);
    check_free(x);
    check_free(marks);
}

/* [2][3][4][2] with room between: the value says where it stands, as 1 + b h t c in digits. */
static float place(int64_t b, int64_t h, int64_t t, int64_t c)
{
    return (float)(10000 + 1000 * b + 100 * h + 10 * t + c);
}

Test(block, load_finds_its_rows_by_strides)
{
    const struct {
        const char *name;
        int64_t origin, batch, head, token;
    } layout[] = {
        {"[b][h][t][c]", 0, 24, 8, 2},      {"[b][t][h][c]", 0, 24, 2, 6},
        {"[t][h][b][c]", 0, 2, 4, 12},      {"padded rows", 0, 60, 20, 5},
        {"tokens backwards", 6, 24, 8, -2}, {"batches and heads backwards", 40, -24, -8, 2},
    };
    for (int64_t n = 0; n < COUNT(layout); n++) {
        float *data = check_alloc(128 * sizeof *data);
        for (int64_t b = 0; b < 2; b++)
            for (int64_t h = 0; h < 3; h++)
                for (int64_t t = 0; t < 4; t++)
                    for (int64_t c = 0; c < 2; c++)
                        data[layout[n].origin + b * layout[n].batch + h * layout[n].head +
                             t * layout[n].token + c] = place(b, h, t, c);
        const sparge_in in = {data + layout[n].origin, SPARGE_F32, layout[n].batch, layout[n].head,
                              layout[n].token};
        const float rows_1_2[] = {11210, 11211, 11220, 11221}, row_0[] = {10100, 10101};
        const float all[] = {11000, 11001, 11010, 11011, 11020, 11021, 11030, 11031};
        loads(layout[n].name, &in, 1, 2, 1, 2, 2, NULL, rows_1_2, "0000");
        loads(layout[n].name, &in, 0, 1, 0, 1, 2, NULL, row_0, "00");
        loads(layout[n].name, &in, 1, 0, 0, 4, 2, NULL, all, "00000000");
        check_free(data);
    }
}

Test(block, load_repeats_a_row_of_stride_0)
{
    const float data[] = {3, 4}, want[] = {3, 4, 3, 4, 3, 4};
    const sparge_in in = {data, SPARGE_F32, 0, 0, 0};
    loads("stride 0", &in, 5, 7, 11, 3, 2, NULL, want, "000000");
}

Test(block, load_reads_f32_as_it_is)
{
    const float data[] = {0.0f, -0.0f, 1.5f, -FLT_MAX, 0x1p-149f, NAN, INFINITY, -INFINITY, -NAN};
    const float want[] = {0.0f, -0.0f, 1.5f, -FLT_MAX, 0x1p-149f, 0, 0, 0, 0};
    const sparge_in in = {data, SPARGE_F32, 0, 0, 9};
    loads("f32", &in, 0, 0, 0, 1, 9, NULL, want, "000001111");
    loads("f32, a row an element", &(sparge_in){data, SPARGE_F32, 0, 0, 1}, 0, 0, 0, 9, 1, NULL,
          want, "000001111");
}

Test(block, load_widens_f16)
{
    const uint16_t data[] = {0x0000, 0x8000, 0x3c00, 0xc000, 0x3555, 0x0001,
                             0x83ff, 0x0400, 0x7bff, 0x7c00, 0xfc00, 0x7e01};
    const float want[] = {0.0f,        -0.0f,    1.0f,     -2.0f, 0x1.554p-2f, 0x1p-24f,
                          -0x3ffp-24f, 0x1p-14f, 65504.0f, 0,     0,           0};
    loads("f16", &(sparge_in){data, SPARGE_F16, 0, 0, 3}, 0, 0, 0, 4, 3, NULL, want,
          "000000000111");
}

Test(block, load_widens_bf16)
{
    const uint16_t data[] = {0x0000, 0x8000, 0x3f80, 0xc049, 0x0001,
                             0x7f7f, 0x7f80, 0xff80, 0x7f81};
    const float want[] = {0.0f, -0.0f, 1.0f, -3.140625f, 0x1p-133f, 0x1.fep127f, 0, 0, 0};
    loads("bf16", &(sparge_in){data, SPARGE_BF16, 0, 0, 3}, 0, 0, 0, 3, 3, NULL, want, "000000111");
}

/* The mean belongs to a channel; what it makes infinite is marked too. */
Test(block, load_subtracts_the_mean)
{
    const float data[] = {1, 2, 3, 4, NAN, 6, 7, INFINITY, -FLT_MAX, 0x1p24f, 8, 9};
    const float mean[] = {0.5f, -2.0f, FLT_MAX}, down[] = {1, 10, 100};
    const sparge_in in = {data, SPARGE_F32, 0, 0, 3};
    const float want[] = {0.5f, 4, -FLT_MAX, 3.5f, 0, -FLT_MAX, 6.5f, 0, 0, 0x1p24f, 10, -FLT_MAX};
    loads("mean", &in, 0, 0, 0, 4, 3, mean, want, "000010011000");
    const float want_down[] = {3, 0, -94, 6, 0, -FLT_MAX};
    loads("mean of later rows", &in, 0, 0, 1, 2, 3, down, want_down, "010010");
    const float nan[] = {NAN, 0, -INFINITY};
    const float want_nan[] = {0, 2, 0};
    loads("mean that is not finite", &in, 0, 0, 0, 1, 3, nan, want_nan, "101");
    const uint16_t half[] = {0x3c00, 0x4000, 0x4200};
    const float want_half[] = {0.5f, 4, -FLT_MAX};
    loads("mean of f16", &(sparge_in){half, SPARGE_F16, 0, 0, 3}, 0, 0, 0, 1, 3, mean, want_half,
          "000");
}

/* ---- mean ------------------------------------------------------------------------------------ */

/* Of tokens as they are loaded; the arrays have the exact size. */
static void mean_is(const char *what, const float *tokens, int64_t len, int64_t dim,
                    int64_t block_k, const float *want)
{
    check_case("mean: %s", what);
    const sparge_geometry g = sparge_geometry_make(7, len, 3, block_k, SPARGE_CAUSAL_END);
    float *x = check_alloc((size_t)(len * dim) * sizeof *x),
          *mean = check_alloc((size_t)dim * sizeof *mean);
    bool *nonfinite = check_alloc((size_t)(len * dim));
    sparge_ref_load(&(sparge_in){tokens, SPARGE_F32, 0, 0, dim}, 0, 0, 0, len, dim, x, nonfinite);
    sparge_ref_mean(x, &g, dim, mean);
    check_same(mean, want, dim);
    check_free(x);
    check_free(nonfinite);
    check_free(mean);
}

Test(block, mean_within_a_block_is_f32_in_row_order)
{
    const float swallowed[] = {0x1p24f, 1, 1, -0x1p24f}, last[] = {1, 1, 0x1p24f, -0x1p24f};
    mean_is("2^24 first", swallowed, 4, 1, 4, (float[]){0});
    mean_is("2^24 later", last, 4, 1, 4, (float[]){0.5f});
    mean_is("the block longer than the keys", swallowed, 4, 1, 64, (float[]){0});
    /* 2^24 | 1 1 | -2^24 in blocks of two: nothing is swallowed but the first 1. */
    mean_is("blocks of 2", swallowed, 4, 1, 2, (float[]){0.25f});
}

Test(block, mean_over_blocks_is_f64_in_ascending_order)
{
    const float fine[] = {0x1p24f, 1, 1, -0x1p24f};
    mean_is("f64 keeps what f32 swallows", fine, 4, 1, 1, (float[]){0.5f});
    const float first[] = {1, 0x1p60f, -0x1p60f, 0}, last[] = {0x1p60f, -0x1p60f, 1, 0};
    mean_is("1 before 2^60", first, 4, 1, 1, (float[]){0});
    mean_is("1 after 2^60", last, 4, 1, 1, (float[]){0.25f});
}

/* 16777217 / 5 in double is nearest to .5; rounded to float before the division it comes to .25. */
Test(block, mean_divides_once_and_in_f64)
{
    const float x[] = {0x1p24f, 1, 0, 0, 0};
    mean_is("one division", x, 5, 1, 1, (float[]){3355443.5f});
    mean_is("a third", (float[]){1, 0, 0}, 3, 1, 2, (float[]){1.0f / 3.0f});
}

Test(block, mean_divides_by_the_token_count)
{
    const float x[] = {1, -10, 2, -20, 3, -30, 4, -40, 5, -50};
    for (int64_t block = 1; block <= 7; block++)
        mean_is("two channels, five tokens", x, 5, 2, block, (float[]){3, -30});
    const float nonfinite[] = {8, NAN, 4, INFINITY, -INFINITY};
    mean_is("a non-finite element counts as 0", nonfinite, 5, 1, 2, (float[]){12.0f / 5.0f});
    mean_is("nothing finite", nonfinite + 3, 2, 1, 2, (float[]){0});
    mean_is("no keys", NULL, 0, 2, 2, (float[]){0, 0});
}

/* The definition spelled out, over lengths around the block size. */
Test(block, mean_by_the_definition)
{
    int64_t differs = 0;
    for (int64_t n = 0; n < 60; n++) {
        const char *name = check_text("random keys %lld", (long long)n);
        check_case("%s", name);
        const int64_t block = check_int(1, 70), dim = check_int(1, 40), len = check_int(1, 200);
        float *x = check_alloc((size_t)(len * dim) * sizeof *x), want[40];
        for (int64_t e = 0; e < len * dim; e++)
            x[e] = check_uniform(-3, 5) * exp2f((float)check_int(0, 19));
        for (int64_t c = 0; c < dim; c++) {
            double total = 0;
            float flat = 0;
            for (int64_t first = 0; first < len; first += block) {
                float sum = 0;
                for (int64_t t = first; t < len && t < first + block; t++)
                    sum += x[t * dim + c];
                total += (double)sum;
            }
            for (int64_t t = 0; t < len; t++)
                flat += x[t * dim + c];
            want[c] = (float)(total / (double)len);
            differs += want[c] != flat / (float)len;
        }
        mean_is(name, x, len, dim, block, want);
        check_free(x);
    }
    check(differs > 100, "only %lld means tell the order of the sum", (long long)differs);
}

/* ---- summarize ------------------------------------------------------------------------------- */

typedef struct summed {
    sparge_ref_summary s;
    float pool[256];
} summed;

/* nonfinite: a string of 0 and 1, or NULL for none. */
static summed summarized(const float *x, const char *nonfinite, int64_t rows, int64_t block,
                         int64_t dim)
{
    summed out;
    bool *marks = check_alloc((size_t)(rows * dim));
    float *pool = check_alloc((size_t)dim * sizeof *pool),
          *unit = check_alloc((size_t)dim * sizeof *unit);
    for (int64_t e = 0; e < rows * dim; e++)
        marks[e] = nonfinite && nonfinite[e] == '1';
    out.s = sparge_ref_summarize(x, marks, rows, block, dim, pool, unit);
    memcpy(out.pool, pool, (size_t)dim * sizeof *pool);
    check_free(marks);
    check_free(pool);
    check_free(unit);
    return out;
}

Test(block, similarity_table)
{
    const struct {
        const char *name;
        int64_t rows, block, dim;
        float x[16], sim, pool[4];
        bool zero_row, full;
    } table[] = {
        {"one row", 1, 1, 2, {3, 4}, 1, {3, 4}, false, true},
        {"one row of a long block", 1, 4, 1, {-5}, 1, {-5}, false, false},
        {"identical", 4, 4, 1, {7, 7, 7, 7}, 1, {7}, false, true},
        {"the same direction", 2, 2, 2, {0, 2, 0, 6}, 1, {0, 4}, false, true},
        {"antiparallel", 2, 2, 2, {8, 0, -2, 0}, 0, {3, 0}, false, true},
        {"2 orthogonal", 2, 2, 2, {3, 0, 0, 5}, 0.5f, {1.5f, 2.5f}, false, true},
        {"3 orthogonal",
         3,
         3,
         3,
         {3, 0, 0, 0, 6, 0, 0, 0, -9},
         1.0f / 3.0f,
         {1, 2, -3},
         false,
         true},
        {"4 orthogonal",
         4,
         4,
         4,
         {1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 4, 0, 0, 0, 0, 8},
         0.25f,
         {0.25f, 0.5f, 1, 2},
         false,
         true},
        {"2 and 1 against", 3, 3, 1, {1, 1, -1}, 1.0f / 9.0f, {1.0f / 3.0f}, false, true},
        {"a zero row adds nothing", 2, 2, 2, {0, 4, 0, 0}, 0.25f, {0, 2}, true, true},
        {"zero row first", 2, 2, 2, {0, 0, 0, 4}, 0.25f, {0, 2}, true, true},
        {"zeros", 3, 3, 2, {0}, 0, {0, 0}, true, true},
        {"zeros of both signs", 1, 1, 2, {-0.0f, 0.0f}, 0, {0, 0}, true, true},
        {"short: 3 of 8", 3, 8, 1, {1, 2, 6}, 1, {3}, false, false},
        {"short: 2 orthogonal of 64", 2, 64, 2, {1, 0, 0, 1}, 0.5f, {0.5f, 0.5f}, false, false},
        {"far apart in length",
         2,
         2,
         2,
         {0x1p-40f, 0, 0, 0x1p40f},
         0.5f,
         {0x1p-41f, 0x1p39f},
         false,
         true},
    };
    for (int64_t n = 0; n < COUNT(table); n++) {
        check_case("%s", table[n].name);
        const summed got =
            summarized(table[n].x, NULL, table[n].rows, table[n].block, table[n].dim);
        check_equal(got.s.sim, table[n].sim);
        check_same(got.pool, table[n].pool, table[n].dim);
        check_equal(got.s.zero_row, table[n].zero_row);
        check_equal(got.s.full, table[n].full);
        check_equal(got.s.finite, true);
    }
}

/* One marked element anywhere is enough; a zero without a mark is only a zero. */
Test(block, a_marked_element_makes_the_block_nonfinite)
{
    const float x[6] = {1, 0, 1, 1, 1, 1};
    char nonfinite[] = "000000";
    cr_assert(summarized(x, nonfinite, 3, 3, 2).s.finite);
    for (int64_t e = 0; e < 6; e++) {
        nonfinite[e] = '1';
        cr_assert(!summarized(x, nonfinite, 3, 3, 2).s.finite, "element %lld", (long long)e);
        nonfinite[e] = '0';
    }
}

Test(block, pool_adds_in_row_order_and_divides)
{
    const float up[] = {0x1p24f, 1, 1, -0x1p24f}, down[] = {1, 1, 0x1p24f, -0x1p24f};
    check_equal(summarized(up, NULL, 4, 4, 1).pool[0], 0.0f);
    check_equal(summarized(down, NULL, 4, 4, 1).pool[0], 0.5f);
    /* 2 * (1 / 49) is not 2 / 49 in float. */
    float x[49] = {2};
    check_equal(summarized(x, NULL, 49, 49, 1).pool[0], 2.0f / 49.0f);
}

/* The mean over all n * n cosines in double, self pairs too. A zero row has the cosine 0. */
static double by_gram_matrix(const float *x, int64_t rows, int64_t dim)
{
    double sum = 0;
    for (int64_t a = 0; a < rows; a++)
        for (int64_t b = 0; b < rows; b++) {
            double ab = 0, aa = 0, bb = 0;
            for (int64_t c = 0; c < dim; c++) {
                ab += (double)x[a * dim + c] * (double)x[b * dim + c];
                aa += (double)x[a * dim + c] * (double)x[a * dim + c];
                bb += (double)x[b * dim + c] * (double)x[b * dim + c];
            }
            sum += aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 0;
        }
    return sum / ((double)rows * (double)rows);
}

/* A unit row is right to 2 ulp and so is each of at most 130 additions of rows: 2e-6 is 30 ulp of
 * 1, where 130 would be the worst case. */
Test(block, similarity_by_the_gram_matrix)
{
    double worst = 0;
    for (int64_t n = 0; n < 150; n++) {
        check_case("random block %lld", (long long)n);
        const int64_t rows = check_int(1, n % 5 ? 24 : 130), dim = n % 7 ? check_int(1, 80) : 256;
        const float drift = check_uniform(0, 4), size = exp2f(check_uniform(-30, 30));
        float *x = check_alloc((size_t)(rows * dim) * sizeof *x), sum[256] = {0};
        for (int64_t e = 0; e < rows * dim; e++)
            x[e] = size * (check_uniform(-1, 1) + drift * sinf((float)(e % dim)));
        if (n % 3 == 0)
            memset(&x[check_int(0, rows - 1) * dim], 0, (size_t)dim * sizeof *x);
        const summed got = summarized(x, NULL, rows, rows + n % 2, dim);
        const double want = by_gram_matrix(x, rows, dim), off = fabs((double)got.s.sim - want);
        check_close(got.s.sim, want, 2e-6);
        check(got.s.sim >= 0 && got.s.sim <= 1, "sim is %.9g", (double)got.s.sim);
        worst = fmax(worst, off);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < dim; c++)
                sum[c] += x[r * dim + c];
        for (int64_t c = 0; c < dim; c++)
            sum[c] /= (float)rows;
        check_same(got.pool, sum, dim);
        check_free(x);
    }
    cr_log_info("sim: worst distance %.3g from the Gram matrix", worst);
}

/* Rounding alone takes the mean cosine of equal rows over 1: in a third of these cases. */
Test(block, similarity_is_at_most_1)
{
    int64_t over = 0;
    for (int64_t n = 0; n < 200; n++) {
        check_case("equal rows %lld", (long long)n);
        const int64_t rows = check_int(1, 40), dim = check_int(1, 20);
        float x[40 * 20], unit[20] = {0};
        for (int64_t c = 0; c < dim; c++)
            x[c] = check_uniform(-1, 1);
        for (int64_t r = 1; r < rows; r++)
            memcpy(&x[r * dim], x, (size_t)dim * sizeof *x);
        const float inverse = 1.0f / sqrtf(sparge_dot(x, x, dim));
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < dim; c++)
                unit[c] = fmaf(x[c], inverse, unit[c]);
        const float free = sparge_dot(unit, unit, dim) / ((float)rows * (float)rows);
        const float got = summarized(x, NULL, rows, rows, dim).s.sim;
        over += free > 1.0f;
        check_equal(got, free > 1.0f ? 1.0f : free);
        check_close(got, 1, 2e-6);
    }
    check(over > 20, "only %lld cases reach the clamp", (long long)over);
}

/* ---- quantize -------------------------------------------------------------------------------- */

/* n elements `stride` apart; the places between stay as they were, and so does what follows. */
static float quantized(const float *x, int64_t n, int64_t stride, int qmax, float slack,
                       int16_t *code)
{
    const int64_t span = n ? (n - 1) * stride + 1 : 0;
    float *in = check_alloc((size_t)span * sizeof *in);
    int16_t *out = check_alloc((size_t)span * sizeof *out);
    for (int64_t e = 0; e < span; e++)
        in[e] = e % stride ? NAN : x[e / stride];
    const float scale = sparge_ref_quantize(in, n, stride, qmax, slack, out);
    for (int64_t e = 0; e < span; e++) {
        if (e % stride == 0)
            code[e / stride] = out[e];
        else
            check(out[e] == -1, "place %lld, between two elements, became %d", (long long)e,
                  out[e]);
    }
    check_free(in);
    check_free(out);
    return scale;
}

Test(block, quantize_table)
{
    const struct {
        const char *name;
        int qmax;
        float slack;
        int64_t n;
        float x[10], scale;
        int16_t code[10];
    } table[] = {
        {"halves away from zero",
         127,
         0,
         10,
         {127, 0.5f, -0.5f, 1.5f, -1.5f, 2.5f, -2.5f, 126.5f, -126.5f, 0},
         1,
         {127, 1, -1, 2, -2, 3, -3, 127, -127, 0}},
        {"just under a half",
         127,
         0,
         6,
         {-127, 0x1.fffffep-2f, -0x1.fffffep-2f, 0x1.7ffffep0f, -0x1.3ffffep1f, 126.49999f},
         1,
         {-127, 0, 0, 1, -2, 126}},
        {"just over a half", 127, 0, 3, {-127, 0x1.000002p-1f, -0x1.000002p-1f}, 1, {-127, 1, -1}},
        {"2047",
         2047,
         0,
         6,
         {-2047, 2046.5f, 1023.5f, -0.5f, 0.25f, 2046.4f},
         1,
         {-2047, 2047, 1024, -1, 0, 2046}},
        {"4095",
         4095,
         0,
         6,
         {4095, -4094.5f, -2047.5f, 0.5f, -0.25f, 4094.4f},
         1,
         {4095, -4095, -2048, 1, 0, 4094}},
        {"a scale of a half", 127, 0, 4, {63.5f, -63.5f, 0.25f, 0.2f}, 0.5f, {127, -127, 1, 0}},
        {"max / 127, not 128", 127, 0, 2, {1, -1}, 1.0f / 127.0f, {127, -127}},
        {"the largest is negative", 127, 0, 3, {1, -254, 3}, 2, {1, -127, 2}},
        {"zeros", 127, 0, 3, {0, -0.0f, 0}, 0, {0, 0, 0}},
        {"subnormal", 127, 0, 2, {0x1p-140f, -0x1p-149f}, 0, {0, 0}},
        {"a scale below the smallest normal", 127, 0, 2, {126 * 0x1p-126f, 0}, 0, {0, 0}},
        {"a scale of the smallest normal",
         127,
         0,
         2,
         {127 * 0x1p-126f, -0x1p-126f},
         0x1p-126f,
         {127, -1}},
        {"the largest float", 127, 0, 2, {FLT_MAX, -FLT_MAX}, FLT_MAX / 127, {127, -127}},
        {"one element", 127, 0, 1, {-3}, 3.0f / 127.0f, {-127}},
        {"slack", 127, 0.25f, 4, {127, -127, 1.875f, 1.874f}, 1.25f, {102, -102, 2, 1}},
        {"upstream's slack", 127, 1e-7f, 2, {127e-7f, -127e-7f}, 127e-7f / 127 + 1e-7f, {64, -64}},
        {"slack alone", 127, 1e-7f, 2, {0, 0}, 1e-7f, {0, 0}},
        {"clamped", 127, -0.5f, 4, {127, -127, 63.5f, -63.75f}, 0.5f, {127, -127, 127, -127}},
        {"nothing", 127, 0, 0, {0}, 0, {0}},
    };
    for (int64_t n = 0; n < COUNT(table); n++)
        for (int64_t stride = 1; stride <= 3; stride++) {
            check_case("%s, stride %lld", table[n].name, (long long)stride);
            int16_t code[10];
            const float scale =
                quantized(table[n].x, table[n].n, stride, table[n].qmax, table[n].slack, code);
            check_equal(scale, table[n].scale);
            check_same(code, table[n].code, table[n].n);
        }
}

/* IEEE division and roundf, at every level count; the largest element takes the outermost code. */
Test(block, quantize_by_the_definition)
{
    const int qmax[] = {127, 2047, 4095};
    int64_t differs = 0;
    for (int64_t n = 0; n < 600; n++) {
        check_case("random block %lld", (long long)n);
        const int64_t count = check_int(1, 600);
        const int top = qmax[n % 3];
        const float size = exp2f(check_uniform(-100, 100));
        float x[600], max = 0;
        int16_t code[600], want[600];
        int outermost = 0;
        for (int64_t e = 0; e < count; e++) {
            x[e] = size * check_uniform(-1, 1);
            max = fabsf(x[e]) > max ? fabsf(x[e]) : max;
        }
        const float scale = max / (float)top;
        for (int64_t e = 0; e < count; e++) {
            want[e] = (int16_t)roundf(x[e] / scale);
            differs += want[e] != (int16_t)roundf(x[e] * ((float)top / max));
        }
        const float got = quantized(x, count, 1 + n % 2, top, 0, code);
        check_equal(got, scale);
        check_same(code, want, count);
        for (int64_t e = 0; e < count; e++)
            outermost = abs(code[e]) > outermost ? abs(code[e]) : outermost;
        check_equal(outermost, top);
    }
    cr_log_info("%lld codes tell a quotient from a product", (long long)differs);
}

/* Every half and its neighbours, for the scale 1: where two ways to round part. */
Test(block, quantize_rounds_as_roundf_at_every_half)
{
    const int qmax[] = {127, 2047, 4095};
    for (int n = 0; n < 3; n++)
        for (int half = 0; half < qmax[n]; half++)
            for (int side = -1; side <= 1; side++) {
                check_case("qmax %d, %d and a half, side %d", qmax[n], half, side);
                const float middle = (float)half + 0.5f;
                const float x = side ? nextafterf(middle, side < 0 ? 0.0f : 1e9f) : middle;
                const float block[] = {(float)qmax[n], x, -x};
                const int16_t want[] = {(int16_t)qmax[n], (int16_t)roundf(x), (int16_t)-roundf(x)};
                int16_t code[3];
                sparge_ref_quantize(block, 3, 1, qmax[n], 0, code);
                check_same(code, want, 3);
            }
}

/* As v is coded: a scale for every channel of a row-major block. */
Test(block, quantize_by_channel)
{
    const float x[] = {127, 1, 0, -254, -1, 0, 63.5f, 0.5f, 0};
    const int16_t want[] = {64, 127, 0, -127, -127, 0, 32, 64, 0};
    const float scales[] = {2, 1.0f / 127.0f, 0};
    int16_t *code = check_alloc(sizeof want);
    for (int64_t c = 0; c < 3; c++) {
        const float scale = sparge_ref_quantize(x + c, 3, 3, 127, 0, code + c);
        check_equal(scale, scales[c]);
    }
    check_same(code, want, 9);
    check_free(code);
}

/* ---- record ---------------------------------------------------------------------------------- */

Test(block, record_copies_to_its_place)
{
    const float two[] = {7, 8}, want[] = {1, 2, 3, 4, 7, 8, 6};
    float all[] = {1, 2, 3, 4, 5, 5, 6};
    sparge_ref_record(all, 2, two, 2, sizeof *two);
    check_same(all, want, 7);
    int16_t codes[] = {1, 2, 3};
    const int16_t want_codes[] = {1, 9, 3};
    sparge_ref_record(codes, 1, &(int16_t){9}, 1, sizeof *codes);
    check_same(codes, want_codes, 3);
    sparge_ref_record(NULL, 3, two, 2, sizeof *two);
    sparge_ref_record(all, 9, NULL, 0, sizeof *all);
    check_same(all, want, 7);
}
