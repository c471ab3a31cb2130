/* SPDX-License-Identifier: Apache-2.0 */
/* formats.c: the program's files. Readers against bytes written out here, byte for byte; every kind
 * of bad file against the line it earns; output files against all the ways to come to an end. */
#include "sparge_inspect.h"
#include "tools/capture.h"
#include "tools/judge.h"
#include "tools/kept.h"
#include "tools/mask_file.h"
#include "tools/npy.h"
#include "tools/output.h"
#include "tools/params.h"
#include "tools/plan.h"
#include "tools/safetensors.h"
#include "tools/sparge_params.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <criterion/criterion.h>

/* Lets an allocation that is too large return NULL under the sanitizers too. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

/* ---- A folder of our own ---------------------------------------------------------------- */

static char folder[256];

static void folder_make(void)
{
    const char *parent = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/sparge-formats-XXXXXX",
             parent && *parent ? parent : "/tmp");
    cr_assert(mkdtemp(folder), "%s: %s", folder, strerror(errno));
    cr_assert_eq(chmod(folder, 0755), 0);
}

/* The path of a name in the folder; good until the eighth call from here. */
static const char *in_folder(const char *name)
{
    static char paths[8][PATH_MAX + 512];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%.255s/%s", folder, name);
    return path;
}

/* Hidden files count. */
static int folder_count(void)
{
    DIR *d = opendir(folder);
    cr_assert(d);
    int count = 0;
    for (const struct dirent *entry; (entry = readdir(d));)
        count += strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0;
    closedir(d);
    return count;
}

static void folder_remove(void)
{
    DIR *d = opendir(folder);
    cr_assert(d);
    for (const struct dirent *entry; (entry = readdir(d));)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            remove(in_folder(entry->d_name));
    closedir(d);
    rmdir(folder);
}

static void file_make(const char *name, const void *bytes, size_t size)
{
    FILE *file = fopen(in_folder(name), "wb");
    cr_assert(file && fwrite(bytes, 1, size, file) == size && fclose(file) == 0);
}

static void expect_file(const char *name, const char *text)
{
    char got[64] = "";
    FILE *file = fopen(in_folder(name), "rb");
    cr_assert(file, "%s: %s", name, strerror(errno));
    got[fread(got, 1, sizeof got - 1, file)] = '\0';
    fclose(file);
    cr_expect_str_eq(got, text, "%s holds '%s', not '%s'", name, got, text);
}

/* One line that holds all of these. */
static void expect_says(const file_error *error, const char *what, const char *const says[],
                        size_t count)
{
    cr_expect(!strchr(error->text, '\n') && strlen(error->text) < 400, "%s: %s", what, error->text);
    for (size_t i = 0; i < count && says[i]; i++)
        cr_expect(strstr(error->text, says[i]), "%s: '%s' does not say '%s'", what, error->text,
                  says[i]);
}

#define BYTES(literal) literal, sizeof(literal) - 1

static void expect_array(const array *got, array_type type, int rank, const int64_t *shape,
                         const void *data)
{
    cr_assert_eq(got->type, type, "%s, not %s", array_type_string(got->type),
                 array_type_string(type));
    cr_assert_eq(got->rank, rank);
    for (int d = 0; d < rank; d++)
        cr_assert_eq(got->shape[d], shape[d]);
    const size_t size = (size_t)array_count(got) * array_type_size(type);
    cr_assert_arr_eq(got->data, data, size);
}

/* ---- Conversions ------------------------------------------------------------------------ */

static float f32_of(array_type type, const void *element)
{
    array x;
    cr_assert(array_alloc(type, 0, NULL, &x, NULL));
    memcpy(x.data, element, array_type_size(type));
    cr_assert(array_to_f32(&x, NULL));
    cr_assert(x.type == ARRAY_F32 && x.rank == 0);
    float f;
    memcpy(&f, x.data, sizeof f);
    array_free(&x);
    return f;
}

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

Test(formats, half_literals)
{
    static const struct {
        uint16_t half;
        uint32_t bits;
    } cases[] = {
        {0x0000, 0x00000000}, {0x8000, 0x80000000}, /* zeros */
        {0x0001, 0x33800000}, {0x8001, 0xb3800000}, /* 2^-24, the smallest */
        {0x03ff, 0x387fc000}, {0x0400, 0x38800000}, /* the largest subnormal, the smallest normal */
        {0x3c00, 0x3f800000}, {0xc000, 0xc0000000}, /* 1, -2 */
        {0x3555, 0x3eaaa000}, {0x7bff, 0x477fe000}, /* a third, 65504 */
        {0x7c00, 0x7f800000}, {0xfc00, 0xff800000}, /* infinities */
        {0x7e00, 0x7fc00000}, {0xfe01, 0xffc02000}, /* NaNs keep sign and payload */
        {0x7c01, 0x7f802000},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const uint32_t got = bits_of(f32_of(ARRAY_F16, &cases[i].half));
        cr_expect_eq(got, cases[i].bits, "f16 %04x gives %08x", cases[i].half, got);
    }
}

Test(formats, half_all)
{
    const int64_t shape[] = {65536};
    array x;
    cr_assert(array_alloc(ARRAY_F16, 1, shape, &x, NULL));
    for (int i = 0; i < 65536; i++)
        ((uint16_t *)x.data)[i] = (uint16_t)i;
    cr_assert(array_to_f32(&x, NULL));
    const float *got = x.data;
    for (int i = 0; i < 65536; i++) {
        const int exponent = i >> 10 & 31, mantissa = i & 1023;
        const double size = exponent == 31  ? (mantissa ? (double)NAN : (double)INFINITY)
                            : exponent == 0 ? ldexp(mantissa, -24)
                                            : ldexp(1024 + mantissa, exponent - 25);
        const double want = i & 0x8000 ? -size : size;
        cr_assert(isnan(want) ? isnan(got[i]) : (double)got[i] == want, "f16 %04x gives %a", i,
                  (double)got[i]);
        cr_assert_eq(!!signbit(got[i]), i >> 15);
    }
    array_free(&x);
}

static array floats_of(const float *x, int64_t count)
{
    array made;
    cr_assert(array_alloc(ARRAY_F32, 1, &count, &made, NULL));
    memcpy(made.data, x, (size_t)count * sizeof *x);
    return made;
}

/* Every half comes back, and so does what is nearer to it than to its neighbour; a tie goes to the
 * even one. */
Test(formats, half_rounding)
{
    enum { LARGEST = 0x7bff };
    for (uint16_t h = 0; h < LARGEST; h++) {
        const float low = f16_to_f32(h), high = f16_to_f32((uint16_t)(h + 1)),
                    middle = (low + high) / 2.0f;
        const float x[] = {low,    nextafterf(middle, low), middle, nextafterf(middle, high), high,
                           -middle};
        const uint16_t up = (uint16_t)(h + 1), even = h % 2 ? up : h,
                       want[] = {h, h, even, up, up, even | 0x8000};
        array a = floats_of(x, 6);
        cr_assert(array_to_f16(&a, NULL) && a.type == ARRAY_F16);
        cr_assert_arr_eq(a.data, want, sizeof want, "around f16 %04x", h);
        array_free(&a);
    }
}

Test(formats, half_range)
{
    static const float fine[] = {65519.0f, -65519.0f, INFINITY, -INFINITY, NAN, 0x1p-26f, -0.0f};
    static const uint16_t want[] = {0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00, 0, 0x8000};
    file_error error;
    array a = floats_of(fine, 7);
    cr_assert(array_to_f16(&a, &error));
    ((uint16_t *)a.data)[4] &= 0x7fff; /* the sign of a NaN is nobody's business */
    cr_expect_arr_eq(a.data, want, sizeof want);
    array_free(&a);
    a = floats_of((const float[]){1.0f, -65520.0f}, 2);
    cr_expect(!array_to_f16(&a, &error) && a.type == ARRAY_F32 &&
              ((const float *)a.data)[1] == -65520.0f);
    cr_expect_str_eq(error.text, "element 1 is -65520, too large for float16");
    array_free(&a);
}

Test(formats, bf16_literals)
{
    static const uint16_t cases[] = {0x0000, 0x8000, 0x0001, 0x007f, 0x0080, 0x3f80,
                                     0xc040, 0x7f7f, 0x7f80, 0xff80, 0x7fc0, 0xff81};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        cr_expect_eq(bits_of(f32_of(ARRAY_BF16, &cases[i])), (uint32_t)cases[i] << 16, "bf16 %04x",
                     cases[i]);
}

Test(formats, double_literals)
{
    static const struct {
        double from;
        float to;
    } cases[] = {
        {0.1, 0x1.99999ap-4f},
        {0x1.000001p0, 1.0f},                 /* half way: to even, below */
        {0x1.000003p0, 0x1.000004p0f},        /* half way: to even, above */
        {0x1.0000010000001p0, 0x1.000002p0f}, /* past half way */
        {0x1.fffffep127, 0x1.fffffep127f},
        {0x1.ffffffp127, INFINITY},
        {-1e300, -INFINITY},
        {0x1p-149, 0x1p-149f},
        {0x1.8p-149, 0x1p-148f},
        {0x1p-150, 0.0f},
        {-0.0, -0.0f},
        {INFINITY, INFINITY},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        cr_expect_eq(bits_of(f32_of(ARRAY_F64, &cases[i].from)), bits_of(cases[i].to), "f64 %a",
                     cases[i].from);
    const double nan = (double)NAN;
    cr_expect(isnan(f32_of(ARRAY_F64, &nan)));
}

Test(formats, integer_literals)
{
    cr_expect_eq(f32_of(ARRAY_U8, &(uint8_t){255}), 255.0f);
    cr_expect_eq(f32_of(ARRAY_BOOL, &(uint8_t){1}), 1.0f);
    cr_expect_eq(f32_of(ARRAY_BOOL, &(uint8_t){7}), 1.0f);
    cr_expect_eq(f32_of(ARRAY_BOOL, &(uint8_t){0}), 0.0f);
    cr_expect_eq(f32_of(ARRAY_I8, &(int8_t){-128}), -128.0f);
    cr_expect_eq(f32_of(ARRAY_I16, &(int16_t){-32768}), -32768.0f);
    cr_expect_eq(f32_of(ARRAY_I32, &(int32_t){16777217}), 16777216.0f);
    cr_expect_eq(f32_of(ARRAY_I32, &(int32_t){INT32_MIN}), -0x1p31f);
    cr_expect_eq(f32_of(ARRAY_I64, &(int64_t){INT64_MAX}), 0x1p63f);
    cr_expect_eq(f32_of(ARRAY_I64, &(int64_t){-3}), -3.0f);
}

Test(formats, array_shapes)
{
    array x;
    file_error error;
    static const int64_t empty[] = {0, 5}, negative[] = {-1}, large[] = {1 << 30, 1 << 30, 8},
                         hidden[] = {0, INT64_MAX, INT64_MAX};
    cr_assert(array_alloc(ARRAY_F16, 2, empty, &x, &error));
    cr_expect(array_count(&x) == 0 && x.data && array_to_f32(&x, &error) && x.data);
    array_free(&x);
    cr_expect(!x.data);
    array_free(&x);
    array_free(NULL);
    cr_assert(array_alloc(ARRAY_I64, 0, NULL, &x, &error));
    cr_expect_eq(array_count(&x), 1);
    array_free(&x);

    cr_expect(!array_alloc(ARRAY_F32, 1, negative, &x, &error) && !x.data && error.text[0]);
    cr_expect(!array_alloc(ARRAY_F64, 3, large, &x, &error) && !x.data && error.text[0]);
    cr_expect(!array_alloc(ARRAY_F32, 3, hidden, &x, NULL));
    cr_expect(!array_alloc(ARRAY_U8, 9, (int64_t[9]){1, 1, 1, 1, 1, 1, 1, 1, 1}, &x, NULL));
    size_t bytes;
    cr_expect(array_bytes(ARRAY_U8, 1, (int64_t[]){PTRDIFF_MAX}, &bytes) && bytes == PTRDIFF_MAX);
    cr_expect(!array_bytes(ARRAY_F16, 1, (int64_t[]){PTRDIFF_MAX / 2 + 1}, &bytes));

    uint8_t one = 1;
    array whole = {.type = ARRAY_U8, .rank = 1, .shape = {PTRDIFF_MAX}, .data = &one};
    cr_expect(!array_to_f32(&whole, &error) && error.text[0]);
    cr_expect(whole.type == ARRAY_U8 && whole.data == &one, "changed, though it failed");

    char text[ARRAY_SHAPE_TEXT];
    array_shape_string(0, NULL, text);
    cr_expect_str_eq(text, "()");
    array_shape_string(1, (int64_t[]){3}, text);
    cr_expect_str_eq(text, "(3,)");
    array_shape_string(3, (int64_t[]){2, 0, 4}, text);
    cr_expect_str_eq(text, "(2, 0, 4)");
    static const int64_t longest[8] = {INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX,
                                       INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX};
    array_shape_string(8, longest, text);
    cr_expect_str_eq(text + strlen(text) - 4, "807)");
}

Test(formats, error_line)
{
    file_error error;
    char name[600];
    memset(name, 'a', sizeof name);
    memcpy(name + sizeof name - 7, "/q.npy", 7);
    cr_expect(!file_error_set(&error, name, "byte %d: bad", 3));
    cr_expect(strncmp(error.text, "...aaa", 6) == 0 && strstr(error.text, "/q.npy: byte 3: bad"));
    file_error_set(&error, "a\nb\x1b", "%s", "x\ty\x7f");
    cr_expect_str_eq(error.text, "a?b?: x?y?");
    file_error_set(&error, NULL, "%s", name);
    cr_expect_eq(strlen(error.text), sizeof error.text - 1);
    cr_expect(!file_error_set(NULL, "a", "b"));
    file_error_clear(&error);
    cr_expect_str_eq(error.text, "");
    file_error_clear(NULL);
}

/* ---- .npy ------------------------------------------------------------------------------- */

/* What is read from bytes[0 .. size) as a.npy. */
static array npy_of(const char *bytes, size_t size)
{
    array x;
    file_error error;
    cr_assert(npy_read_memory((const uint8_t *)bytes, size, "a.npy", &x, &error), "%s", error.text);
    cr_assert_str_eq(error.text, "");
    return x;
}

Test(formats, npy_versions)
{
    static const struct {
        const char *bytes;
        size_t size;
    } cases[] = {
        {BYTES(
            "\x93NUMPY\x01\x00\x3a\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"
            "\x00\x00\x80\x3f\x00\x00\x00\xc0")},
        {BYTES("\x93NUMPY\x02\x00\x3a\x00\x00\x00"
               "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"
               "\x00\x00\x80\x3f\x00\x00\x00\xc0")},
        {BYTES("\x93NUMPY\x03\x00\x3a\x00\x00\x00"
               "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"
               "\x00\x00\x80\x3f\x00\x00\x00\xc0")},
    };
    for (size_t i = 0; i < 3; i++) {
        array x = npy_of(cases[i].bytes, cases[i].size);
        expect_array(&x, ARRAY_F32, 1, (int64_t[]){2}, (float[]){1.0f, -2.0f});
        array_free(&x);
    }
}

/* A version 1.0 file around a dictionary; *size is the file's. */
static const char *npy_file(const char *dictionary, const char *data, size_t bytes, size_t *size)
{
    static char file[2048];
    const size_t length = strlen(dictionary);
    cr_assert(10 + length + bytes <= sizeof file);
    memcpy(file, "\x93NUMPY\x01\x00", 8);
    file[8] = (char)(length & 255);
    file[9] = (char)(length >> 8);
    memcpy(file + 10, dictionary, length);
    if (bytes > 0)
        memcpy(file + 10 + length, data, bytes);
    *size = 10 + length + bytes;
    return file;
}

Test(formats, npy_types)
{
    static const struct {
        const char *descr;
        array_type type;
        const char *data; /* 1 and 2 */
        size_t bytes;
    } cases[] = {
        {"<f2", ARRAY_F16, BYTES("\x00\x3c\x00\x40")},
        {"<f4", ARRAY_F32, BYTES("\x00\x00\x80\x3f\x00\x00\x00\x40")},
        {"<f8", ARRAY_F64, BYTES("\0\0\0\0\0\0\xf0\x3f\0\0\0\0\0\0\0\x40")},
        {"|u1", ARRAY_U8, BYTES("\x01\x02")},
        {"|i1", ARRAY_I8, BYTES("\x01\x02")},
        {"<i2", ARRAY_I16, BYTES("\x01\x00\x02\x00")},
        {"<i4", ARRAY_I32, BYTES("\x01\0\0\0\x02\0\0\0")},
        {"<i8", ARRAY_I64, BYTES("\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0")},
        {"=f4", ARRAY_F32, BYTES("\x00\x00\x80\x3f\x00\x00\x00\x40")},
        {"<u1", ARRAY_U8, BYTES("\x01\x02")},
        {"f4", ARRAY_F32, BYTES("\x00\x00\x80\x3f\x00\x00\x00\x40")},
        {"u1", ARRAY_U8, BYTES("\x01\x02")},
        {"<i2", ARRAY_I16, BYTES("\x01\x00\x02\x00\x93NUMPY")}, /* and the next array */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char dictionary[128];
        snprintf(dictionary, sizeof dictionary,
                 "{'descr': '%s', 'fortran_order': False, 'shape': (2,)}\n", cases[i].descr);
        size_t size;
        const char *file = npy_file(dictionary, cases[i].data, cases[i].bytes, &size);
        array x = npy_of(file, size);
        expect_array(&x, cases[i].type, 1, (int64_t[]){2}, cases[i].data);
        cr_assert(array_to_f32(&x, NULL));
        expect_array(&x, ARRAY_F32, 1, (int64_t[]){2}, (float[]){1.0f, 2.0f});
        array_free(&x);
    }
    size_t size;
    const char *file = npy_file("{'descr': '|b1', 'fortran_order': False, 'shape': (3,)}",
                                BYTES("\x01\x00\x01"), &size);
    array x = npy_of(file, size);
    expect_array(&x, ARRAY_BOOL, 1, (int64_t[]){3}, "\x01\x00\x01");
    array_free(&x);
}

Test(formats, npy_spelling)
{
    static const struct {
        const char *dictionary;
        int rank;
        int64_t shape[8];
    } cases[] = {
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2), }      \n", 2, {1, 2}},
        {"{\"shape\":(1,2,),\"fortran_order\":True,\"descr\":\"|u1\"}", 2, {1, 2}},
        {" \t{ 'fortran_order' :\nFalse , 'shape' : ( 2 , ) , 'descr' : '|u1' , } \r\n ", 1, {2}},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (2L, 1L), }", 2, {2, 1}},
        {"{'descr':'|u1','fortran_order':False,'shape':(1,1,1,2,1,1,1,1)}",
         8,
         {1, 1, 1, 2, 1, 1, 1, 1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t size;
        const char *file = npy_file(cases[i].dictionary, BYTES("\x05\x06"), &size);
        array x = npy_of(file, size);
        expect_array(&x, ARRAY_U8, cases[i].rank, cases[i].shape, "\x05\x06");
        array_free(&x);
    }
}

Test(formats, npy_sizes)
{
    size_t size;
    const char *file =
        npy_file("{'descr': '<i2', 'fortran_order': True, 'shape': ()}", BYTES("\x05\x00"), &size);
    array x = npy_of(file, size);
    expect_array(&x, ARRAY_I16, 0, NULL, "\x05\x00");
    array_free(&x);
    for (int fortran = 0; fortran < 2; fortran++) {
        file = npy_file(fortran ? "{'descr': '<f4', 'fortran_order': True, 'shape': (3, 0, 2)}"
                                : "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 0, 2)}",
                        NULL, 0, &size);
        x = npy_of(file, size);
        expect_array(&x, ARRAY_F32, 3, (int64_t[]){3, 0, 2}, "");
        array_free(&x);
    }
}

Test(formats, npy_fortran)
{
    size_t size;
    const char *file = npy_file("{'descr': '|u1', 'fortran_order': True, 'shape': (2, 3)}",
                                BYTES("\x01\x04\x02\x05\x03\x06"), &size);
    array x = npy_of(file, size);
    expect_array(&x, ARRAY_U8, 2, (int64_t[]){2, 3}, "\x01\x02\x03\x04\x05\x06");
    array_free(&x);

    /* Element [a][b][c] of (2, 3, 2) is abc; it lies at a + 2 b + 6 c. */
    static const int16_t lies[] = {0, 100, 10, 110, 20, 120, 1, 101, 11, 111, 21, 121};
    static const int16_t reads[] = {0, 1, 10, 11, 20, 21, 100, 101, 110, 111, 120, 121};
    file = npy_file("{'descr': '<i2', 'fortran_order': True, 'shape': (2, 3, 2)}",
                    (const char *)lies, sizeof lies, &size);
    x = npy_of(file, size);
    expect_array(&x, ARRAY_I16, 3, (int64_t[]){2, 3, 2}, reads);
    array_free(&x);

    file =
        npy_file("{'descr': '|u1', 'fortran_order': True, 'shape': (3,)}", BYTES("\1\2\3"), &size);
    x = npy_of(file, size);
    expect_array(&x, ARRAY_U8, 1, (int64_t[]){3}, "\1\2\3");
    array_free(&x);
}

static void expect_npy_refused(const char *bytes, size_t size, const char *what,
                               const char *const says[], size_t count)
{
    array x;
    file_error error;
    memset(&x, 0xff, sizeof x);
    cr_expect(!npy_read_memory((const uint8_t *)bytes, size, "a.npy", &x, &error), "%s", what);
    cr_expect(!x.data && x.rank == 0, "%s", what);
    cr_expect(strncmp(error.text, "a.npy: byte ", 12) == 0, "%s: %s", what, error.text);
    expect_says(&error, what, says, count);
}

Test(formats, npy_bad_bytes)
{
    static const struct {
        const char *bytes;
        size_t size;
        const char *says[3]; /* place, problem, remedy */
    } cases[] = {
        {BYTES(""), {"byte 0:", "empty", "save it again"}},
        {BYTES("\x93NUMPY"), {"byte 6:", "truncated", "copy or save"}},
        {BYTES("\x93NUMPY\x01\x00\x10"), {"byte 9:", "truncated", "copy or save"}},
        {BYTES("\x93NUMPY\x02\x00\x10\x00\x00"), {"byte 11:", "truncated", "copy or save"}},
        {BYTES("0.5 0.25 0.125 1.0"), {"byte 0:", "not a .npy file", "numpy.save"}},
        {BYTES("PK\x03\x04\x14\x00\x00\x00\x00\x00"), {"byte 0:", ".npz", "numpy.save"}},
        {BYTES("\x93NUMPY\x00\x00\x02\x00{}"), {"byte 6:", "version 0.0", "numpy.save"}},
        {BYTES("\x93NUMPY\x04\x00\x02\x00{}"), {"byte 6:", "version 4.0", "numpy.save"}},
        {BYTES("\x93NUMPY\x01\x01\x02\x00{}"), {"byte 6:", "version 1.1", "numpy.save"}},
        {BYTES("\x93NUMPY\x01\x00\x03\x00{}"),
         {"byte 8:", "3 bytes is longer than the file", "copy"}},
        {BYTES("\x93NUMPY\x02\x00\xff\xff\xff\xff{}"), {"byte 8:", "4294967295 bytes", "copy"}},
        {BYTES("\x93NUMPY\x01\x00\x00\x00"), {"byte 10:", "'{' expected", "numpy.save"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        expect_npy_refused(cases[i].bytes, cases[i].size, cases[i].says[1], cases[i].says, 3);
}

Test(formats, npy_bad_header)
{
    static const char again[] = "save it again with numpy.save";
    static const struct {
        const char *dictionary; /* from byte 10 on */
        const char *says[3];    /* place, problem, remedy */
    } cases[] = {
        {"['descr']", {"byte 10:", "Expected object", again}},
        {"{'descr': '<f4'", {"byte 25:", "'}' expected", again}},
        {"{'descr': '<f4' 'shape': (2,)}", {"byte 33:", "'}' expected", again}},
        {"{'descr': '<f4', ", {"byte 27:", "string or '}' expected", again}},
        {"{,}", {"byte 10:", "not found: descr", again}},
        {"{descr: '<f4'}", {"byte 16:", "string or '}' expected near 'descr'", again}},
        {"{'descr': <f4}", {"byte 21:", "invalid token near '<'", again}},
        {"{'descr", {"byte 17:", "premature end", again}},
        {"{'de\\x73cr': 1}", {"byte 16:", "invalid escape", again}},
        {"{'descr' '<f4'}", {"byte 24:", "':' expected", again}},
        {"{'descr': '<f4', 'descr': '<f4'}", {"byte 34:", "duplicate object key", again}},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (), 'order': 'C'}",
         {"byte 10:", "unpacked: order", again}},
        {"{}", {"byte 10:", "not found: descr", again}},
        {"{'descr': '<f4', 'shape': (2,)}", {"byte 10:", "not found: fortran_order", again}},
        {"{'descr': '<f4', 'fortran_order': False}", {"byte 10:", "not found: shape", again}},
        {"{'descr': '<f4', 'fortran_order': 0, 'shape': ()}", {"byte 10:", "true or false", again}},
        {"{'fortran_order': Fals", {"byte 32:", "invalid token near 'fals'", again}},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': 3}", {"byte 10:", "a tuple", again}},
        {"{'shape': (2,,3)}", {"byte 24:", "unexpected token near ','", again}},
        {"{'shape': (2 3)}", {"byte 24:", "']' expected", again}},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2.5, 3)}",
         {"byte 10:", "a tuple of integers", again}},
        {"{'shape': (2, 3", {"byte 25:", "']' expected", again}},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, -3)}",
         {"byte 10:", "integers of 0 or more", again}},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,1)}",
         {"byte 10:", "at most 8", again}},
        {"{'shape': (9223372036854775808,)}", {"byte 40:", "too big integer", again}},
        {"{'descr': '>f4', 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "'>f4' is big-endian", "astype"}},
        {"{'descr': '|O', 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "Python objects", "astype"}},
        {"{'descr': 'f5', 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "'f5' is none of", "astype"}},
        {"{'descr': '<', 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "'<' is none of", "astype"}},
        {"{'descr': '', 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "'' is none of", "astype"}},
        {"{'descr': '<u4', 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "'<u4' is none of f2 f4 f8 u1 b1 i1 i2 i4 i8", "astype"}},
        {"{'descr': '<c8', 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "'<c8' is none of", "astype"}},
        {"{'descr': '|V2', 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "bf16", ".safetensors"}},
        {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "structured", "save one field"}},
        {"{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': ()}",
         {"byte 10:", "structured", "save one field"}},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': ()} x",
         {"byte 65:", "end of file expected", again}},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 4)}",
         {"byte 10:", "(4611686018427387904, 4) of f64 overflows", "smaller"}},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (0, 4611686018427387904, 4)}",
         {"byte 10:", "overflows", "smaller"}},
        {"{'descr': '<i1', 'fortran_order': False, 'shape': (0, 0, 4611686018427387904)}", /* as
                                                                                              f32,
                                                                                              too */
         {"byte 10:", "overflows", "smaller"}},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}",
         {"byte 65:", "truncated: shape (2,) of f32 is 8 bytes from byte 65 on, not 0", "copy"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t size;
        const char *file = npy_file(cases[i].dictionary, NULL, 0, &size);
        expect_npy_refused(file, size, cases[i].dictionary, cases[i].says, 3);
    }
    size_t size;
    const char *file = npy_file("{'descr': '<i2', 'fortran_order': True, 'shape': (2, 2)}",
                                BYTES("1234567"), &size);
    static const char *const says[] = {"byte 73:", "truncated", "8 bytes from byte 66 on, not 7",
                                       "again"};
    expect_npy_refused(file, size, "truncated", says, 4);
}

/* Every prefix of a good file is a bad one. */
Test(formats, npy_prefixes)
{
    size_t size;
    const char *file = npy_file("{'descr': '<i2', 'fortran_order': True, 'shape': (2, 2)}",
                                BYTES("12345678"), &size);
    array x = npy_of(file, size);
    array_free(&x);
    for (size_t n = 0; n < size; n++) {
        uint8_t *exact = malloc(n > 0 ? n : 1); /* for the address sanitizer */
        cr_assert(exact);
        memcpy(exact, file, n);
        cr_expect(!npy_read_memory(exact, n, "a.npy", &x, NULL) && !x.data);
        free(exact);
    }
}

Test(formats, npy_write_bytes)
{
    static const char want[] =
        "\x93NUMPY\x01\x00\x76\x00{'descr': '<f2', 'fortran_order': False, 'shape': (1, 3), }"
        "                                                          \n"
        "\x00\x3c\x00\x40\x00\x42";
    array x;
    cr_assert(array_alloc(ARRAY_F16, 2, (int64_t[]){1, 3}, &x, NULL));
    memcpy(x.data, want + 128, 6);
    char *got = NULL;
    size_t size;
    FILE *stream = open_memstream(&got, &size);
    file_error error;
    cr_assert(npy_write(stream, "a.npy", &x, &error) && fclose(stream) == 0);
    cr_expect_str_eq(error.text, "");
    cr_expect_eq(size, sizeof want - 1);
    cr_expect_arr_eq(got, want, sizeof want - 1);
    free(got);
    array_free(&x);
}

Test(formats, npy_round_trip)
{
    static const int64_t shapes[][8] = {{0}, {7}, {2, 3}, {2, 0, 3}, {1, 2, 1, 2, 1, 2, 1, 2}};
    static const int ranks[] = {0, 1, 2, 3, 8};
    for (int type = ARRAY_F16; type <= ARRAY_I64; type++)
        for (size_t i = 0; type != ARRAY_BF16 && i < sizeof ranks / sizeof ranks[0]; i++) {
            array want;
            cr_assert(array_alloc((array_type)type, ranks[i], shapes[i], &want, NULL));
            const size_t bytes = (size_t)array_count(&want) * array_type_size((array_type)type);
            for (size_t n = 0; n < bytes; n++)
                ((uint8_t *)want.data)[n] = (uint8_t)(n * 37 + 11);
            char *text = NULL;
            size_t size;
            FILE *stream = open_memstream(&text, &size);
            cr_assert(npy_write(stream, "a.npy", &want, NULL) && fclose(stream) == 0);
            cr_expect_eq((size - bytes) % 64, 0, "the data begin at byte %zu", size - bytes);
            cr_expect_eq(text[21], array_type_size(want.type) == 1 ? '|' : '<');
            array got = npy_of(text, size);
            expect_array(&got, want.type, want.rank, want.shape, want.data);
            array_free(&got);
            array_free(&want);
            free(text);
        }
}

Test(formats, npy_write_refused)
{
    array x;
    file_error error;
    cr_assert(array_alloc(ARRAY_BF16, 0, NULL, &x, NULL));
    memset(x.data, 0, 2);
    FILE *full = fopen("/dev/full", "r+b"); /* never creates */
    cr_assert(full && setvbuf(full, NULL, _IONBF, 0) == 0);
    cr_expect(!npy_write(full, "a.npy", &x, &error));
    expect_says(&error, "bf16", (const char *[]){"a.npy: ", "bf16", "convert to f32"}, 3);
    cr_assert(array_to_f32(&x, NULL));
    cr_expect(!npy_write(full, "a.npy", &x, &error));
    expect_says(&error, "full", (const char *[]){"a.npy: ", "No space left", "free some space"}, 3);
    fclose(full);
    array_free(&x);
}

/* ---- Files to read ---------------------------------------------------------------------- */

static void expect_unreadable(const char *path, const char *const says[], size_t count)
{
    array x[1];
    file_error error;
    memset(x, 0xff, sizeof x);
    cr_expect(!npy_read(path, x, &error) && !x->data, "%s", path);
    cr_expect(strncmp(error.text, path, strlen(path)) == 0, "%s", error.text);
    expect_says(&error, path, says, count);
    memset(x, 0xff, sizeof x);
    cr_expect(!safetensors_read(path, (const char *[]){"q"}, 1, x, &error) && !x->data, "%s", path);
    cr_expect(strncmp(error.text, path, strlen(path)) == 0, "%s", error.text);
    expect_says(&error, path, says, count);
}

Test(formats, files, .init = folder_make, .fini = folder_remove)
{
    size_t size;
    const char *file = npy_file("{'descr': '<i2', 'fortran_order': True, 'shape': (2, 2)}",
                                BYTES("\x01\0\x02\0\x03\0\x04\0"), &size);
    file_make("a.npy", file, size);
    array x;
    file_error error;
    cr_assert(npy_read(in_folder("a.npy"), &x, &error), "%s", error.text);
    expect_array(&x, ARRAY_I16, 2, (int64_t[]){2, 2}, (int16_t[]){1, 3, 2, 4});
    array_free(&x);

    expect_unreadable(in_folder("none"), (const char *[]){"No such file", "check the path"}, 2);
    expect_unreadable(folder, (const char *[]){"is a directory", "name a file"}, 2);
    expect_unreadable("/dev/zero", (const char *[]){"no regular file", "save it"}, 2);
    file_make("empty", "", 0);
    expect_unreadable(in_folder("empty"), (const char *[]){"byte 0: the file is empty", "save"}, 2);
    cr_assert_eq(mkfifo(in_folder("pipe"), 0600), 0);
    expect_unreadable(in_folder("pipe"), (const char *[]){"no regular file", "save it"}, 2);
    expect_unreadable(in_folder("a.npy/b"), (const char *[]){"Not a directory", "check"}, 2);
}

/* Runs in a child that is nobody, where we are root; its exit status is the number of failures. */
static int status_as_nobody(int (*run)(void))
{
    fflush(NULL);
    const pid_t child = fork();
    cr_assert(child >= 0);
    if (child == 0) {
        if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0))
            _exit(99);
        _exit(run());
    }
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status), "status %x", (unsigned)status);
    return WEXITSTATUS(status);
}

static int read_forbidden(void)
{
    array x;
    file_error error;
    const bool read = npy_read(in_folder("a.npy"), &x, &error);
    return read || !strstr(error.text, "a.npy: cannot open: Permission denied; allow reading it");
}

Test(formats, file_forbidden, .init = folder_make, .fini = folder_remove)
{
    file_make("a.npy", "x", 1);
    cr_assert_eq(chmod(in_folder("a.npy"), 0), 0);
    cr_expect_eq(status_as_nobody(read_forbidden), 0);
}

/* A file around a header; *size is the file's. */
static const uint8_t *tensors_file(const char *header, const char *data, size_t bytes, size_t *size)
{
    static uint8_t file[4096];
    const size_t length = strlen(header);
    cr_assert(8 + length + bytes <= sizeof file);
    memset(file, 0, 8);
    file[0] = (uint8_t)(length & 255);
    file[1] = (uint8_t)(length >> 8);
    memcpy(file + 8, header, length);
    if (bytes > 0)
        memcpy(file + 8 + length, data, bytes);
    *size = 8 + length + bytes;
    return file;
}

static const char *const qkv[] = {"q", "k", "v"};

/* A file of 2 TiB, nearly all a hole: honest, and more than memory holds. */
Test(formats, file_larger_than_memory, .init = folder_make, .fini = folder_remove)
{
    size_t size;
    const char *file = npy_file(
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2199023255552,)}", NULL, 0, &size);
    file_make("a.npy", file, size);
    if (truncate(in_folder("a.npy"), (off_t)((INT64_C(1) << 41) + (int64_t)size)) != 0)
        cr_skip_test("this disk takes no file of 2 TiB");
    void *volatile much = malloc((size_t)1 << 41); /* the address sanitizer refuses it by itself */
    const struct rlimit limit = {1 << 30, 1 << 30};
    cr_assert(!much || setrlimit(RLIMIT_AS, &limit) == 0);
    free(much);
    array x;
    file_error error;
    errno = 0;
    cr_assert(!npy_read(in_folder("a.npy"), &x, &error));
    cr_expect_eq(errno, ENOMEM);
    expect_says(&error, "memory", (const char *[]){"a.npy: no memory for 2199023255552", "use a"},
                2);

    const uint8_t *const tensors =
        tensors_file("{\"q\":{\"dtype\":\"F16\",\"shape\":[1099511627776],"
                     "\"data_offsets\":[0,2199023255552]}}",
                     NULL, 0, &size);
    file_make("a.st", tensors, size);
    cr_assert_eq(truncate(in_folder("a.st"), (off_t)((INT64_C(1) << 41) + (int64_t)size)), 0);
    errno = 0;
    cr_assert(!safetensors_read(in_folder("a.st"), qkv, 1, &x, &error));
    cr_expect_eq(errno, ENOMEM);
    expect_says(&error, "memory", (const char *[]){"key 'q': no memory for 2199023255552"}, 1);
}

/* Headers that the file could hold, but that no writer writes. */
Test(formats, file_long_header, .init = folder_make, .fini = folder_remove)
{
    array x;
    file_error error;
    file_make("a.npy", BYTES("\x93NUMPY\x02\x00\x01\x00\x10\x00"));
    cr_assert_eq(truncate(in_folder("a.npy"), 1 << 21), 0);
    cr_expect(!npy_read(in_folder("a.npy"), &x, &error));
    expect_says(&error, "npy", (const char *[]){"byte 8: ", "1048577 bytes", "any of numpy's"}, 3);
    file_make("a.st", BYTES("\x01\xe1\xf5\x05\0\0\0\0"));
    cr_assert_eq(truncate(in_folder("a.st"), 200000000), 0);
    cr_expect(!safetensors_read(in_folder("a.st"), qkv, 1, &x, &error));
    expect_says(&error, "st", (const char *[]){"byte 0: ", "100000001", "the format allows"}, 3);
}

/* A file that shrinks after its size was taken. */
Test(formats, file_shrinks, .init = folder_make, .fini = folder_remove)
{
    file_make("a", "0123456789", 10);
    file_input in;
    file_error error;
    char got[10] = "";
    cr_assert(input_open(in_folder("a"), &in, &error) && in.size == 10);
    cr_expect(input_read(&in, 4, 6, got) && memcmp(got, "456789", 6) == 0);
    cr_expect(!input_read(&in, 4, 7, got) && strstr(error.text, "byte 10: truncated"));
    cr_expect(!input_read(&in, SIZE_MAX, 1, got) && strstr(error.text, "byte 10: truncated"));
    cr_expect(!input_read(&in, 1, SIZE_MAX, got) && strstr(error.text, "byte 10: truncated"));
    cr_assert_eq(truncate(in_folder("a"), 6), 0);
    cr_expect(!input_read(&in, 4, 6, got));
    expect_says(&error, "shrunk", (const char *[]){"byte 6: ", "has shrunk", "nobody writes"}, 3);
    input_close(&in);
    input_close(&in);
}

/* ---- .safetensors ----------------------------------------------------------------------- */

Test(formats, safetensors_literal, .init = folder_make, .fini = folder_remove)
{
    static const char file[] = "\xc2\0\0\0\0\0\0\0"
                               "{\"__metadata__\":{\"format\":\"pt\"},"
                               "\"v\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[6,10]},"
                               "\"k\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[0,2]},"
                               "\"q\":{\"dtype\":\"F16\",\"shape\":[2,1],\"data_offsets\":[2,6]}}"
                               "\x80\xbf\x00\x3c\x00\x40\x00\x00\x80\x3f";
    array x[3];
    file_error error;
    file_make("a.safetensors", file, sizeof file - 1);
    for (int on_disk = 0; on_disk < 2; on_disk++) {
        cr_assert(on_disk ? safetensors_read(in_folder("a.safetensors"), qkv, 3, x, &error)
                          : safetensors_read_memory((const uint8_t *)file, sizeof file - 1, "a",
                                                    qkv, 3, x, &error),
                  "%s", error.text);
        cr_expect_str_eq(error.text, "");
        expect_array(&x[0], ARRAY_F16, 2, (int64_t[]){2, 1}, "\x00\x3c\x00\x40");
        expect_array(&x[1], ARRAY_BF16, 0, NULL, "\x80\xbf");
        expect_array(&x[2], ARRAY_F32, 1, (int64_t[]){1}, (float[]){1.0f});
        for (int i = 0; i < 3; i++) {
            cr_assert(array_to_f32(&x[i], &error));
            cr_expect_eq(*(float *)x[i].data, i == 1 ? -1.0f : 1.0f);
            array_free(&x[i]);
        }
    }
}

Test(formats, safetensors_layouts)
{
    static const struct {
        const char *header;
        size_t bytes;
    } cases[] = {
        /* Empty tensors lie where others begin and end; spaces pad; unwanted tensors of any type.
         */
        {"{\"a\":{\"dtype\":\"F16\",\"shape\":[0],\"data_offsets\":[0,0]},"
         "\"q\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"b\":{\"dtype\":\"F16\",\"shape\":[3,0],\"data_offsets\":[4,4]}}   ",
         4},
        {"{\"q\":{\"data_offsets\":[0,4],\"shape\":[1],\"dtype\":\"F32\",\"more\":null},"
         "\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[1],\"data_offsets\":[4,5]}}",
         5},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t size;
        const uint8_t *const file =
            tensors_file(cases[i].header, "\x00\x00\x00\x40\x09", cases[i].bytes, &size);
        array x;
        file_error error;
        cr_assert(safetensors_read_memory(file, size, "a", qkv, 1, &x, &error), "%s", error.text);
        expect_array(&x, ARRAY_F32, 1, (int64_t[]){1}, (float[]){2.0f});
        array_free(&x);
        cr_expect(safetensors_read_memory(file, size, "a", NULL, 0, NULL, &error));
    }
}

Test(formats, safetensors_write)
{
    static const char want[] =
        "\xa8\0\0\0\0\0\0\0"
        "{\"k\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[0,2]},"
        "\"q\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[2,10]},"
        "\"v\":{\"dtype\":\"F16\",\"shape\":[0],\"data_offsets\":[10,10]}}   "
        "\x80\xbf\x00\x00\x80\x3f\x00\x00\x00\x40";
    static const char *const names[] = {"k", "q", "v"};
    array x[3], got[3];
    file_error error;
    cr_assert(array_alloc(ARRAY_BF16, 0, NULL, &x[0], NULL) &&
              array_alloc(ARRAY_F32, 2, (int64_t[]){1, 2}, &x[1], NULL) &&
              array_alloc(ARRAY_F16, 1, (int64_t[]){0}, &x[2], NULL));
    memcpy(x[0].data, "\x80\xbf", 2);
    memcpy(x[1].data, (float[]){1.0f, 2.0f}, 8);
    char *text = NULL;
    size_t size;
    FILE *stream = open_memstream(&text, &size);
    cr_assert(safetensors_write(stream, "a", names, 3, x, &error) && fclose(stream) == 0);
    cr_assert_eq(size, sizeof want - 1, "%zu bytes: %.*s", size, (int)size - 8, text + 8);
    cr_expect_arr_eq(text, want, size);
    cr_assert(safetensors_read_memory((const uint8_t *)text, size, "a", names, 3, got, &error),
              "%s", error.text);
    for (int i = 0; i < 3; i++) {
        expect_array(&got[i], x[i].type, x[i].rank, x[i].shape, x[i].data);
        array_free(&got[i]);
    }
    free(text);
    stream = fopen("/dev/full", "r+b"); /* never creates */
    cr_assert(stream && setvbuf(stream, NULL, _IONBF, 0) == 0);
    cr_expect(!safetensors_write(stream, "a", names, 3, x, &error));
    expect_says(&error, "full", (const char *[]){"a: ", "No space left", "free some space"}, 3);
    fclose(stream);
    array_free(&x[0]);
    cr_assert(array_alloc(ARRAY_I32, 0, NULL, &x[0], NULL));
    cr_expect(!safetensors_write(stdout, "a", names, 1, x, &error));
    expect_says(&error, "int", (const char *[]){"a: ", "a dtype that is not written"}, 2);
    for (int i = 0; i < 3; i++)
        array_free(&x[i]);
}

static void expect_tensors_refused(const uint8_t *file, size_t size, const char *what,
                                   const char *const says[], size_t count)
{
    array x[3];
    file_error error;
    memset(x, 0xff, sizeof x);
    cr_expect(!safetensors_read_memory(file, size, "a.st", qkv, 3, x, &error), "%s", what);
    cr_expect(!x[0].data && !x[1].data && !x[2].data, "%s", what);
    cr_expect(strncmp(error.text, "a.st: ", 6) == 0, "%s: %s", what, error.text);
    expect_says(&error, what, says, count);
}

Test(formats, safetensors_bad_bytes)
{
    static const struct {
        const char *bytes;
        size_t size;
        const char *says[3];
    } cases[] = {
        {BYTES(""), {"byte 0:", "empty", "save it again"}},
        {BYTES("\x02\0\0\0\0\0\0"), {"byte 7:", "truncated", "copy"}},
        {BYTES("\x03\0\0\0\0\0\0\0{}"), {"byte 0:", "3 bytes is longer than the file", "copy"}},
        {BYTES("\x01\xe1\xf5\x05\0\0\0\0{}"), {"byte 0:", "100000001 bytes is longer", "format"}},
        {BYTES("\xff\xff\xff\xff\xff\xff\xff\xff{}"), {"byte 0:", "18446744073709551615", "check"}},
        {BYTES("\x93NUMPY\x01\x00{}"),
         {"byte 0:", "longer than", "check that it is a .safetensors"}},
        {BYTES("\0\0\0\0\0\0\0\0"),
         {"byte 8:", "a JSON object must begin", "write the file again"}},
        {BYTES("\x02\0\0\0\0\0\0\0[]"), {"byte 8:", "a JSON object must begin", "write the file"}},
        {BYTES("\x03\0\0\0\0\0\0\0 {}"), {"byte 8:", "a JSON object must begin", "write the file"}},
        {BYTES("\x02\0\0\0\0\0\0\0{}!"), {"byte 10:", "too long: 1 byte", "copy or write"}},
        {BYTES("\x02\0\0\0\0\0\0\0{}"), {"key 'q'", "no such tensor", "it holds no tensor"}},
        {BYTES("\x02\0\0\0\0\0\0\0{]"), {"byte 10:", "header: string or '}' expected", "write"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        expect_tensors_refused((const uint8_t *)cases[i].bytes, cases[i].size, cases[i].says[1],
                               cases[i].says, 3);
}

Test(formats, safetensors_bad_header)
{
    static const char again[] = "write it again", two[] = "two integers, 0 <= begin <= end <= 8";
    static const struct {
        const char *header; /* 8 bytes of data follow */
        const char *says[3];
    } cases[] = {
        {"{\"q\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"q\":0}",
         {"byte 65:", "duplicate object key", "write the file again"}},
        {"{\"q\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}",
         {"byte 35:", "duplicate object key", "write"}},
        {"{\"q\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}} x",
         {"byte 64:", "end of file expected", "write"}},
        {"{\"q\":7}", {"key 'q'", two, again}},
        {"{\"q\":{\"dtype\":\"F32\",\"shape\":[2]}}", {"key 'q'", two, again}},
        {"{\"q\":{\"data_offsets\":[0,8,9]}}", {"key 'q'", two, again}},
        {"{\"q\":{\"data_offsets\":[0,8.0]}}", {"key 'q'", two, again}},
        {"{\"q\":{\"data_offsets\":[8,0]}}", {"key 'q'", two, again}},
        {"{\"q\":{\"data_offsets\":[-8,0]}}", {"key 'q'", two, again}},
        {"{\"q\":{\"data_offsets\":[0,12]}}", {"key 'q'", two, "truncated"}},
        {"{\"q\":{\"data_offsets\":[0,9223372036854775807]}}", {"key 'q'", two, "truncated"}},
        {"{\"q\":{\"data_offsets\":[0,9223372036854775808]}}",
         {"byte ", "too big integer", "write"}},
        {"{\"q\":{\"data_offsets\":[0,5]},\"k\":{\"data_offsets\":[4,8]}}",
         {"key 'k'", "overlapping 5", "write the file again"}},
        {"{\"q\":{\"data_offsets\":[0,8]},\"k\":{\"data_offsets\":[4,4]}}",
         {"key 'k'", "overlapping 8", "write the file again"}},
        {"{\"q\":{\"data_offsets\":[0,4]},\"k\":{\"data_offsets\":[5,8]}}",
         {"key 'k'", "begin at 5, leaving a hole from 4", "write the file again"}},
        {"{\"q\":{\"data_offsets\":[4,8]}}",
         {"key 'q'", "leaving a hole from 0", "write the file"}},
        {"{\"q\":{\"data_offsets\":[0,4]}}", {"byte 40:", "too long: 4 bytes", "copy or write"}},
        {"{\"x\":{\"data_offsets\":[4,8]},\"y\":{\"data_offsets\":[0,4]}}",
         {"key 'q'", "no such tensor", "choose from y, x"}},
        {"{\"q\":{\"data_offsets\":[0,8]}}", {"key 'q'", "dtype is none of F16, BF16", "convert"}},
        {"{\"q\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[0,8]}}",
         {"key 'q'", "F16, BF16, F32, U8, BOOL and I64", "convert"}},
        {"{\"q\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}",
         {"key 'q'", "shape must be", "reshape"}},
        {"{\"q\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}",
         {"key 'q'", "at most 8", "reshape"}},
        {"{\"q\":{\"dtype\":\"F32\",\"shape\":[-1,-2],\"data_offsets\":[0,8]}}",
         {"key 'q'", "integers of 0 or more", "reshape"}},
        {"{\"q\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}",
         {"key 'q'", "integers of 0 or more", "reshape"}},
        {"{\"q\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[0,8]}}",
         {"key 'q'", "shape (3,) of f16 does not fit the 8 bytes", "write the file again"}},
        {"{\"q\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,8]}}",
         {"key 'q'", "does not fit the 8 bytes", "write the file again"}},
        {"{\"q\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}",
         {"key 'k'", "no such tensor", "choose from q"}}, /* after q has been read */
        {"{\"\\u0000\":{\"data_offsets\":[0,8]}}", {"byte ", "\\u0000", "write the file again"}},
        {"{\"\xff\":{\"data_offsets\":[0,8]}}",
         {"byte ", "decode byte 0xff", "write the file again"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t size;
        const uint8_t *file = tensors_file(cases[i].header, "12345678", 8, &size);
        expect_tensors_refused(file, size, cases[i].header, cases[i].says, 3);
    }
}

Test(formats, safetensors_many_names)
{
    char header[2048] = "{";
    for (int i = 0; i < 40; i++)
        snprintf(header + strlen(header), sizeof header - strlen(header),
                 "%s\"blocks.%d.\\nq\":{\"data_offsets\":[0,0]}", i > 0 ? "," : "", i);
    strcat(header, "}");
    size_t size;
    const uint8_t *file = tensors_file(header, NULL, 0, &size);
    static const char *const says[] = {"choose from blocks.0.?q, blocks.1.?q", "..."};
    expect_tensors_refused(file, size, "many names", says, 2);
}

Test(formats, safetensors_prefixes)
{
    size_t size;
    const uint8_t *file = tensors_file(
        "{\"q\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "12345678", 8, &size);
    array x;
    cr_assert(safetensors_read_memory(file, size, "a", qkv, 1, &x, NULL));
    array_free(&x);
    for (size_t n = 0; n < size; n++) {
        uint8_t *exact = malloc(n > 0 ? n : 1); /* for the address sanitizer */
        cr_assert(exact);
        memcpy(exact, file, n);
        cr_expect(!safetensors_read_memory(exact, n, "a", qkv, 1, &x, NULL) && !x.data);
        free(exact);
    }
}

/* ---- Masks ------------------------------------------------------------------------------ */

/* One head of 2 x 2 blocks; blocks (0, 1) and (1, 0) are attended in part. */
static const char mask_header[] =
    "{\"partial_index\":{\"dtype\":\"I64\",\"shape\":[2,4],\"data_offsets\":[0,64]},"
    "\"blocks\":{\"dtype\":\"U8\",\"shape\":[1,1,2,2],\"data_offsets\":[64,68]},"
    "\"partial_bits\":{\"dtype\":\"U8\",\"shape\":[2,1,2],\"data_offsets\":[68,72]}}";
static const char mask_data[] = "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0"
                                "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
                                "\0\1\1\1\x81\x01\xff\x00";

/* The whole file, every shorter one, and each byte of the integers changed. */
Test(formats, mask_arrays, .init = folder_make, .fini = folder_remove)
{
    size_t size;
    const uint8_t *file = tensors_file(mask_header, mask_data, 72, &size);
    mask_arrays x;
    file_error error;
    file_make("m.safetensors", (const char *)file, size);
    cr_assert(mask_arrays_read(in_folder("m.safetensors"), &x, &error), "%s", error.text);
    expect_array(&x.blocks, ARRAY_U8, 4, (int64_t[]){1, 1, 2, 2}, "\0\1\1\1");
    expect_array(&x.partial_index, ARRAY_I64, 2, (int64_t[]){2, 4}, mask_data);
    expect_array(&x.partial_bits, ARRAY_U8, 3, (int64_t[]){2, 1, 2}, "\x81\x01\xff");
    mask_arrays_free(&x);
    for (size_t n = 0; n < size; n++) {
        file_make("m.safetensors", (const char *)file, n);
        cr_expect(!mask_arrays_read(in_folder("m.safetensors"), &x, &error), "%zu bytes", n);
        cr_expect(!x.blocks.data && !x.partial_index.data && !x.partial_bits.data);
        cr_expect(strstr(error.text, "m.safetensors: byte ") ||
                      strstr(error.text, "m.safetensors: key "),
                  "%s", error.text);
    }
    for (size_t n = 0; n < 64; n++) {
        char other[sizeof mask_data];
        memcpy(other, mask_data, sizeof other);
        other[n] ^= 2; /* no entry has it */
        file = tensors_file(mask_header, other, 72, &size);
        file_make("m.safetensors", (const char *)file, size);
        cr_expect(!mask_arrays_read(in_folder("m.safetensors"), &x, &error), "byte %zu", n);
        cr_expect(strstr(error.text, "is not in blocks") && !x.blocks.data, "%s", error.text);
    }
}

/* ---- Output files ----------------------------------------------------------------------- */

static output_file *output_make(const char *name, const char *text)
{
    file_error error;
    output_file *output = output_open(in_folder(name), &error);
    cr_assert(output, "%s", error.text);
    cr_assert_str_eq(error.text, "");
    fputs(text, output_stream(output));
    return output;
}

static void expect_commit(void)
{
    file_error error;
    cr_expect(outputs_commit(&error), "%s", error.text);
    cr_expect_str_eq(error.text, "");
}

static void expect_not_opened(const char *path, const char *problem, const char *remedy)
{
    file_error error;
    cr_expect_null(output_open(path, &error), "%s", path);
    cr_expect(strncmp(error.text, path, strlen(path)) == 0, "%s", error.text);
    expect_says(&error, path, (const char *[]){problem, remedy}, 2);
}

Test(formats, output_commit, .init = folder_make, .fini = folder_remove)
{
    umask(027);
    file_make("b", "old", 3);
    cr_assert_eq(symlink("b", in_folder("link")), 0);
    output_make("a", "new a");
    output_make("link", "new b");
    output_make("c", "");
    expect_file("b", "old");
    cr_expect(access(in_folder("a"), F_OK) != 0 && access(in_folder("c"), F_OK) != 0);
    cr_expect_eq(folder_count(), 5); /* b, link and the hidden three */
    expect_commit();
    expect_file("a", "new a");
    expect_file("b", "new b");
    expect_file("c", "");
    cr_expect_eq(folder_count(), 4);
    struct stat status;
    cr_assert(stat(in_folder("a"), &status) == 0);
    cr_expect_eq(status.st_mode & 07777, 0640);
    cr_assert(lstat(in_folder("link"), &status) == 0);
    cr_expect(S_ISLNK(status.st_mode), "the link was replaced, not what it points to");

    output_make("a", "newer"); /* the table is free again */
    expect_commit();
    expect_file("a", "newer");
    expect_commit(); /* of nothing */
}

Test(formats, output_discard, .init = folder_make, .fini = folder_remove)
{
    file_make("a", "old", 3);
    output_make("a", "new");
    output_make("b", "new");
    outputs_discard();
    cr_expect_eq(folder_count(), 1);
    expect_file("a", "old");
    outputs_discard();
    expect_commit();
    cr_expect_eq(folder_count(), 1);
}

Test(formats, output_relative, .init = folder_make, .fini = folder_remove)
{
    cr_assert_eq(chdir(folder), 0);
    output_file *output = output_open("a", NULL);
    cr_assert(output);
    fputs("here", output_stream(output));
    cr_expect_eq(folder_count(), 1);
    expect_commit();
    expect_file("a", "here");
    cr_assert_eq(chdir("/"), 0);
}

Test(formats, output_bad_targets, .init = folder_make, .fini = folder_remove)
{
    char name[PATH_MAX + 8];
    memset(name, 'a', sizeof name);
    name[sizeof name - 1] = '\0';
    file_error error;
    cr_expect_null(output_open(name, &error));
    expect_says(&error, "long", (const char *[]){"too long", "choose another"}, 2);
    name[300] = '\0';
    cr_expect_null(output_open(in_folder(name), &error));
    expect_says(&error, "long", (const char *[]){"too long", "choose another"}, 2);

    expect_not_opened(folder, "is a directory", "name a file in it");
    expect_not_opened(in_folder("new/"), "is a directory", "name a file in it");
    expect_not_opened("", "is a directory", "name a file in it");
    expect_not_opened(in_folder("none/a"), "No such file or directory", "check the folder");
    output_make("a", "");
    expect_not_opened(in_folder("a"), "is already an output", "choose another name");
    expect_not_opened(in_folder("./a"), "is already an output", "choose another name");
    outputs_discard();
    for (int i = 0; i < OUTPUT_MAX; i++) {
        snprintf(name, sizeof name, "f%d", i);
        output_make(name, name);
    }
    expect_not_opened(in_folder("one more"), "too many outputs", "write fewer");
    cr_expect_eq(folder_count(), OUTPUT_MAX);
    expect_commit();
    expect_file("f0", "f0");
    expect_file("f15", "f15");
}

static int open_forbidden(void)
{
    file_error error;
    int wrong = output_open(in_folder("new"), &error) != NULL;
    wrong += !strstr(error.text, "new: cannot create: Permission denied; check the folder");
    wrong += output_open(in_folder("old"), &error) != NULL;
    wrong += !strstr(error.text, "old: is write-protected; allow it (chmod +w)");
    return wrong;
}

Test(formats, output_forbidden, .init = folder_make, .fini = folder_remove)
{
    file_make("old", "old", 3);
    cr_assert_eq(chmod(in_folder("old"), 0444), 0);
    cr_assert_eq(chmod(folder, 0555), 0);
    cr_expect_eq(status_as_nobody(open_forbidden), 0);
    cr_assert_eq(chmod(folder, 0755), 0);
    cr_expect_eq(folder_count(), 1);
    expect_file("old", "old");
}

static int write_null(void)
{
    int wrong = 0;
    for (int i = 0; i < 2; i++) { /* twice at a time is fine */
        output_file *output = output_open("/dev/null", NULL);
        wrong += !output || fputs("x", output_stream(output)) < 0;
    }
    wrong += !outputs_commit(NULL);
    struct stat status;
    return wrong + (stat("/dev/null", &status) != 0 || !S_ISCHR(status.st_mode));
}

Test(formats, output_direct, .init = folder_make, .fini = folder_remove)
{
    cr_expect_eq(status_as_nobody(write_null), 0); /* root could replace the device, by mistake */

    cr_assert_eq(mkfifo(in_folder("pipe"), 0600), 0);
    const int reader = open(in_folder("pipe"), O_RDWR);
    output_make("pipe", "through");
    expect_commit();
    char got[8] = "";
    cr_expect(read(reader, got, 7) == 7 && strcmp(got, "through") == 0);
    close(reader);

    /* Standard output in a file: the file stays, and what stands in it. */
    file_error error;
    const int file = open(in_folder("log"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    cr_assert(file >= 0 && write(file, "first ", 6) == 6);
    char name[32];
    snprintf(name, sizeof name, "/dev/fd/%d", file);
    output_file *output = output_open(name, &error);
    cr_assert(output, "%s", error.text);
    fputs("second", output_stream(output));
    expect_commit();
    cr_expect_eq(write(file, " third", 6), 6);
    close(file);
    expect_file("log", "first second third");
    cr_expect_eq(folder_count(), 2);
}

static int write_full(void)
{
    file_error error;
    output_file *whole = output_open(in_folder("a"), NULL);
    output_file *full = output_open("/dev/full", NULL);
    int wrong = !whole || fputs("whole", output_stream(whole)) < 0;
    wrong += !full || fputs("x", output_stream(full)) < 0;
    wrong += outputs_commit(&error);
    wrong += !strstr(error.text, "/dev/full: cannot write: No space left on device; free some");
    wrong += !output_open("/dev/full", NULL); /* the table is free again */
    outputs_discard();
    return wrong;
}

Test(formats, output_full_device, .init = folder_make, .fini = folder_remove)
{
    cr_assert_eq(chmod(folder, 0777), 0);
    cr_expect_eq(status_as_nobody(write_full), 0);
    cr_expect_eq(folder_count(), 0, "a file appeared though another could not");
}

/* The error may strike at the last flush or long before it. */
static void expect_limit(size_t size)
{
    static const char block[4096];
    file_error error;
    file_make("a", "old", 3);
    output_file *output = output_make("a", "");
    output_make("b", "b");
    bool written = true;
    for (size_t n = 0; n < size; n += sizeof block)
        written = fwrite(block, sizeof block, 1, output_stream(output)) == 1 && written;
    cr_expect(!outputs_commit(&error));
    const char *why = written ? "/a: cannot write: File too large" : "/a: cannot write: ";
    expect_says(&error, "limit", (const char *[]){why, "free some"}, 2);
    cr_expect_eq(folder_count(), 1);
    expect_file("a", "old");
}

Test(formats, output_file_too_large, .init = folder_make, .fini = folder_remove)
{
    const struct rlimit limit = {10000, RLIM_INFINITY};
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    signal(SIGXFSZ, SIG_IGN);
    expect_limit(12288);
    expect_limit(1 << 20);
}

/* A rename fails: what is left is discarded, and no name holds half a file. */
Test(formats, output_rename_fails, .init = folder_make, .fini = folder_remove)
{
    file_make("old", "old", 3);
    output_make("b", "b");
    output_make("old", "new");
    cr_assert_eq(mkdir(in_folder("b"), 0700), 0);
    file_error error;
    cr_expect(!outputs_commit(&error));
    expect_says(&error, "rename", (const char *[]){"/b: cannot rename", "directory", "choose"}, 3);
    expect_file("old", "old");
    cr_expect_eq(folder_count(), 2);
}

/* A link to nothing is refused: a rename would replace the link. */
Test(formats, output_dangling_link, .init = folder_make, .fini = folder_remove)
{
    cr_assert_eq(symlink("one", in_folder("link")), 0);
    cr_assert_eq(symlink("circle", in_folder("circle")), 0);
    expect_not_opened(in_folder("link"), "is a link to a file that does not exist", "another name");
    expect_not_opened(in_folder("circle"), "cannot create: Too many levels", "choose another");
    cr_expect_eq(folder_count(), 2);
}

/* A new folder goes when nothing was put in it, and stays with its files. */
Test(formats, output_folders, .init = folder_make, .fini = folder_remove)
{
    char deep[PATH_MAX];
    snprintf(deep, sizeof deep, "%s", in_folder("new/deep"));
    for (int kept = 0; kept < 2; kept++) {
        cr_assert(output_folder(in_folder("new"), NULL) && output_folder(deep, NULL));
        output_make("new/deep/a", "a");
        cr_expect_eq(folder_count(), 1);
        if (kept)
            expect_commit();
        outputs_discard();
        cr_expect_eq(folder_count(), kept);
    }
    expect_file("new/deep/a", "a");
    cr_assert(output_folder(deep, NULL));
    outputs_discard();
    cr_expect_eq(access(deep, F_OK), 0, "it was there before");
    remove(in_folder("new/deep/a"));
    remove(deep);
}

/* The JSON goes there. */
Test(formats, output_standard, .init = folder_make, .fini = folder_remove)
{
    char log[PATH_MAX];
    snprintf(log, sizeof log, "%s", in_folder("log"));
    expect_not_opened("-", "is standard output", "name a file");
    cr_assert(freopen(log, "w", stdout));
    expect_not_opened("/dev/stdout", "is standard output", "name a file");
    expect_not_opened(log, "is standard output", "name a file");
    cr_assert(freopen("/dev/null", "w", stdout));
    output_make("log", "x");
    expect_commit();
}

/* What a signal handler does at any moment: the files go, and no name is lost. */
Test(formats, output_abandoned, .init = folder_make, .fini = folder_remove)
{
    file_make("a", "old", 3);
    cr_assert(output_folder(in_folder("d"), NULL));
    output_make("a", "half");
    output_make("d/b", "half");
    outputs_abandon();
    cr_expect_eq(folder_count(), 1);
    expect_file("a", "old");
    outputs_abandon();
    outputs_discard();
    cr_expect_eq(folder_count(), 1);
}

/* ---- Tuned thresholds ------------------------------------------------------------------- */

#define HEADER                                                                                    \
    "{\"sparge_params\": 1, \"model\": \"m\", \"block_q\": 128, \"block_k\": 64, \"skip_rows\": " \
    "64, "                                                                                        \
    "\"causal\": \"start\", \"smooth_k\": false, \"sink\": true, \"softmax_scale\": 0.125, "      \
    "\"heads\": ["
#define HEAD_OF(layer, head, thresholds) \
    "{\"layer\": " layer ", \"head\": " head ", \"dense\": false, " thresholds "}"
#define THRESHOLDS "\"theta\": 0.5, \"tau\": 0.98, \"topk\": null, \"lambda\": -4"

static exit_code params_of(const char *text, params *out, file_error *error)
{
    memset(out, 0xff, sizeof *out);
    memset(error, 'x', sizeof *error);
    return params_read_memory(text, strlen(text), "p.json", out, error);
}

Test(formats, params_literal)
{
    params p;
    file_error error;
    const char *thresholds = "\"theta\": -1, \"tau\": null, \"topk\": 0.25, \"lambda\": null";
    const char *by_mass = "\"theta\": -1, \"tau\": null, \"topk\": null, \"min_mass\": 0.2, "
                          "\"lambda\": null";
    char text[1000];
    snprintf(text, sizeof text,
             HEADER HEAD_OF("7", "3", THRESHOLDS) ", " HEAD_OF("0", "9", THRESHOLDS) ", " HEAD_OF(
                 "7", "0", "%s") ", " HEAD_OF("8", "0", "%s") "], \"cell\": 8, \"more\": []}",
             thresholds, by_mass);
    cr_assert_eq(params_of(text, &p, &error), EXIT_FINE, "%s", error.text);
    cr_expect_str_empty(error.text);
    cr_expect_str_eq(p.model, "m");
    cr_expect(p.options.block_q == 128 && p.options.block_k == 64 && p.options.cell == 8 &&
              p.options.skip_rows == 64 && p.options.causal == SPARGE_CAUSAL_START);
    cr_expect(!p.options.smooth_k && p.options.sink && p.options.softmax_scale == 0.125f &&
              p.heads == 4);
    sparge_thresholds first, second, third, fourth;
    cr_assert(!params_find(&p, "f", 0, 9, &first, &error) &&
              !params_find(&p, "f", 7, 0, &second, &error) &&
              !params_find(&p, "f", 7, 3, &third, &error) &&
              !params_find(&p, "f", 8, 0, &fourth, &error));
    cr_expect(first.theta == 0.5f && first.tau == 0.98f && first.topk == SPARGE_OFF &&
              first.min_mass == 0.0f && first.lambda == -4.0f);
    cr_expect(fourth.tau == SPARGE_OFF && fourth.topk == SPARGE_OFF && fourth.min_mass == 0.2f);
    cr_expect(memcmp(&third, &first, sizeof third) == 0);
    cr_expect(second.theta == -1.0f && second.tau == SPARGE_OFF && second.topk == 0.25f);
    cr_expect(second.lambda == -INFINITY);
    static const int64_t others[][2] = {{0, 0}, {7, 1},  {7, 4},        {8, 1},
                                        {9, 0}, {-1, 9}, {0, INT64_MAX}};
    for (size_t n = 0; n < sizeof others / sizeof *others; n++)
        cr_expect_eq(params_find(&p, "f", others[n][0], others[n][1], &third, &error), EXIT_FILE,
                     "%zu", n);
    cr_expect_str_eq(error.text, "f: has no thresholds for layer 0 head 9223372036854775807");
    params_free(&p);
    cr_expect(!p.json && !p.head && !p.heads &&
              params_find(&p, "f", 0, 9, &third, NULL) == EXIT_FILE);
}

/* The reader for programs that use the library. */
Test(formats, params_load)
{
    char path[] = "/tmp/sparge-params-XXXXXX";
    const int file = mkstemp(path);
    FILE *stream = fdopen(file, "w");
    fprintf(stream, HEADER HEAD_OF("7", "0", THRESHOLDS) ", " HEAD_OF("7", "1", THRESHOLDS) "]}");
    fclose(stream);
    sparge_options o = sparge_options_default(SPARGE_RULES_DEFAULT);
    o.causal = SPARGE_CAUSAL_START;
    o.smooth_k = false;
    o.sink = true;
    o.softmax_scale = 0.125f;
    sparge_thresholds thresholds[3];
    sparge_error why;
    cr_expect_eq(sparge_params_load(path, "m", 7, 2, &o, thresholds, &why), SPARGE_OK, "%s",
                 why.text);
    cr_expect_str_empty(why.text);
    cr_expect(thresholds[0].tau == 0.98f && thresholds[1].lambda == -4.0f);
    cr_expect_eq(sparge_params_load(path, NULL, 7, 2, &o, thresholds, NULL), SPARGE_OK);
    cr_expect_eq(sparge_params_load(path, "m", 7, 3, &o, thresholds, &why), SPARGE_ERR_ARGUMENT);
    cr_expect(strstr(why.text, "has no thresholds for layer 7 head 2"), "%s", why.text);
    cr_expect_eq(sparge_params_load(path, "n", 7, 2, &o, thresholds, &why), SPARGE_ERR_ARGUMENT);
    cr_expect(strstr(why.text, "for the model 'm', not for 'n'"), "%s", why.text);
    o.block_k = 128;
    cr_expect_eq(sparge_params_load(path, "m", 7, 2, &o, thresholds, &why), SPARGE_ERR_ARGUMENT);
    cr_expect(strstr(why.text, "block_k 64, not 128"), "%s", why.text);
    o.block_k = 64;
    o.cell = 8;
    cr_expect_eq(sparge_params_load(path, "m", 7, 2, &o, thresholds, &why), SPARGE_ERR_ARGUMENT);
    cr_expect(strstr(why.text, "cell 0, not 8"), "%s", why.text);
    remove(path);
    cr_expect_eq(sparge_params_load(path, "m", 7, 2, &o, thresholds, &why), SPARGE_ERR_ARGUMENT);
    cr_expect(strstr(why.text, "cannot open"), "%s", why.text);
}

/* Every number at the end of its range, and next to it. */
Test(formats, params_ranges)
{
    static const struct {
        const char *key, *good[2], *bad[4];
    } cases[] = {
        {"layer", {"0", "2147483647"}, {"-1", "2147483648", "1.0", "null"}},
        {"head", {"0", "2147483647"}, {"-1", "2147483648", "true", "\"1\""}},
        {"dense", {"true", "false"}, {"0", "null", "\"true\"", "[]"}},
        {"theta", {"-1", "1.0"}, {"-1.0000002", "1.0000002", "null", "\"0\""}},
        {"tau", {"0", "1"}, {"-1e-9", "1.0000002", "true", "null"}},
        {"topk", {"null", "1"}, {"-1", "1.0000002", "{}", "\"0.5\""}},
        {"min_mass", {"null", "3.4028235e38"}, {"-1e-9", "3.5e38", "true", "\"0.2\""}},
        {"lambda", {"-0.0", "-1e30"}, {"1e-9", "-1.0001e30", "\"-inf\"", "true"}},
        {"block_q", {"1", "1024"}, {"0", "1025", "128.0", "null"}},
        {"block_k", {"1", "1024"}, {"0", "1025", "64.0", "\"64\""}},
        {"cell", {"0", "1024"}, {"-1", "1025", "8.0", "null"}},
        {"skip_rows", {"1", "1024"}, {"0", "1025", "-64", "null"}},
        {"softmax_scale", {"1.1754944e-38", "3.4028235e38"}, {"0", "1e-39", "3.5e38", "-1"}},
        {"causal", {"\"none\"", "\"end\""}, {"\"middle\"", "null", "1", "\"END\""}},
        {"smooth_k", {"true", "false"}, {"1", "null", "\"\"", "{}"}},
        {"sink", {"true", "false"}, {"1", "null", "\"\"", "{}"}},
        {"model", {"null", "\"\""}, {"1", "true", "[]", "{}"}},
        {"sparge_params", {"1", "1"}, {"0", "2", "1.0", "\"1\""}},
        {"rules", {"\"paper\"", "\"upstream\""}, {"\"theirs\"", "null", "1", "\"\""}},
        {"weights_sha256", {"null", "\"ab12\""}, {"1", "true", "[]", "{}"}},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (int n = 0; n < 6; n++) {
            const char *value = n < 2 ? cases[c].good[n] : cases[c].bad[n - 2];
            json_t *whole = json_loads(HEADER HEAD_OF("0", "0", THRESHOLDS) "]}", 0, NULL);
            json_t *to = c < 8 ? json_array_get(json_object_get(whole, "heads"), 0) : whole;
            json_object_set_new(to, cases[c].key, json_loads(value, JSON_DECODE_ANY, NULL));
            char *text = json_dumps(whole, 0);
            params p;
            file_error error;
            const exit_code code = params_of(text, &p, &error);
            cr_expect_eq(code, n < 2 ? EXIT_FINE : EXIT_FILE, "%s %s: %s", cases[c].key, value,
                         error.text);
            const char *const says[] = {"p.json: '", cases[c].key, "' must be "};
            if (code)
                expect_says(&error, value, says, 3);
            cr_expect(!code || (!p.json && !p.head && !p.heads && !p.options.block_q), "all 0");
            params_free(&p);
            free(text);
            json_decref(whole);
        }
}

Test(formats, params_refused)
{
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"", "line 1: "},
        {"[]", "is no JSON object"},
        {"{}", "'sparge_params' must be"},
        {"{", "line 1: "},
        {HEADER "]", "line 1: "},
        {HEADER "]}}", "line 1: "},
        {HEADER "3]}", "'heads[0].layer' must be"},
        {HEADER HEAD_OF("1", "2", THRESHOLDS) "," HEAD_OF("1", "2", THRESHOLDS) "]}",
         "has layer 1 head 2 twice"},
        {HEADER HEAD_OF("1", "2", THRESHOLDS) "," HEAD_OF("0", "2", THRESHOLDS ", \"tau\": 1") "]}",
         "line 1: duplicate"},
        {HEADER HEAD_OF("1", "2",
                        "\"theta\": 0, \"tau\": null, \"topk\": null, \"lambda\": null") "]}",
         "'heads[0].tau' must be a number where topk and min_mass are null"},
        {HEADER HEAD_OF("1", "2",
                        "\"theta\": 0, \"tau\": null, \"topk\": null, \"min_mass\": 0, "
                        "\"lambda\": null") "]}",
         "'heads[0].tau' must be a number where topk and min_mass are null"},
        {HEADER "], \"sink\": true}", "line 1: duplicate"},
        {HEADER "], \"a\": \"\n\"}", "line 1: "},
    };
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        params p;
        file_error error;
        cr_expect_eq(params_of(cases[n].text, &p, &error), EXIT_FILE, "%s", cases[n].text);
        const char *const says[] = {"p.json: ", cases[n].says};
        expect_says(&error, cases[n].text, says, 2);
        cr_expect(!p.json && !p.head && !p.heads, "%s", cases[n].text);
    }
}

/* How the header of a line writes this float. */
static void text_of_threshold(float x, char text[64])
{
    const sparge_thresholds thresholds = {
        .theta = 0.0f, .tau = 1.0f, .topk = SPARGE_OFF, .lambda = x};
    json_t *line = params_line(0, 0, false, &thresholds);
    char *all = json_dumps(line, JSON_REAL_PRECISION(9));
    const char *at = all ? strstr(all, "\"lambda\": ") : NULL;
    cr_assert(at && sscanf(at, "\"lambda\": %63[^}]", text) == 1);
    free(all);
    json_decref(line);
}

Test(formats, params_shortest_decimals)
{
    static const struct {
        float x;
        const char *text;
    } literals[] = {{-4.0f, "-4.0"},
                    {-0.1f, "-0.1"},
                    {-1.0f / 3.0f, "-0.33333334"},
                    {-16777216.0f, "-16777216.0"},
                    {-1e-10f, "-1e-10"},
                    {-INFINITY, "null"},
                    {0.0f, "0.0"},
                    {0.98f, "0.98"}};
    char text[64], shorter[320];
    for (size_t n = 0; n < sizeof literals / sizeof *literals; n++) {
        text_of_threshold(literals[n].x, text);
        cr_expect_str_eq(text, literals[n].text, "%s, not %s", text, literals[n].text);
    }
    uint64_t state = 1;
    for (int n = 0; n < 200000; n++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const uint32_t bits = (uint32_t)(state >> 32);
        float x;
        memcpy(&x, &bits, sizeof x);
        if (n % 2) /* where thresholds are */
            x = (float)(bits % 100000) / 100000.0f;
        if (!isfinite(x))
            continue;
        text_of_threshold(x, text);
        cr_assert(strtof(text, NULL) == x, "%a is not %s", (double)x, text);
        int digits = 9;
        for (; digits > 1; digits--) {
            snprintf(shorter, sizeof shorter, "%.*g", digits - 1, (double)x);
            if (strtof(shorter, NULL) != x)
                break;
        }
        snprintf(shorter, sizeof shorter, "%.*g", digits, (double)x);
        cr_assert(strtod(text, NULL) == strtod(shorter, NULL), "%s is not the shortest: %s", text,
                  shorter);
    }
}

Test(formats, params_written)
{
    sparge_options o = sparge_options_default(SPARGE_RULES_DEFAULT);
    o.block_q = 32;
    o.cell = 8;
    o.softmax_scale = 0.3f;
    o.causal = SPARGE_CAUSAL_END;
    const sparge_thresholds thresholds[] = {
        {.theta = -0.3f, .tau = SPARGE_OFF, .topk = 0.7f, .lambda = -INFINITY},
        {.tau = SPARGE_OFF, .topk = SPARGE_OFF, .min_mass = 0.2f, .lambda = -4.0f}};
    char *text = NULL;
    size_t size = 0;
    file_error error;
    json_t *header = params_header("a \"b\"\n", "ab12", &o), *heads = json_array();
    for (int64_t h = 0; h < 2; h++)
        json_array_append_new(heads, params_line(3, 4 + h, h == 0, &thresholds[h]));
    json_object_set_new(header, "inputs", json_array());
    json_object_set_new(header, "heads", heads);
    FILE *stream = open_memstream(&text, &size);
    cr_assert(stream && json_write_lines(stream, "p.json", header, &error) && fclose(stream) == 0);
    cr_expect_str_eq(
        text,
        "{\n \"sparge_params\": 1,\n \"version\": \"" SPARGE_VERSION "\",\n"
        " \"model\": \"a \\\"b\\\"\\n\",\n \"weights_sha256\": \"ab12\",\n"
        " \"rules\": \"default\",\n \"qk_dtype\": \"int8\",\n \"pv_dtype\": \"int8\",\n"
        " \"block_q\": 32,\n \"block_k\": 64,\n \"cell\": 8,\n \"skip_rows\": 32,\n"
        " \"causal\": \"end\",\n \"smooth_k\": true,\n \"sink\": false,\n \"softmax_scale\": "
        "0.3,\n \"inputs\": [],\n "
        "\"heads\": "
        "[\n"
        "  {\"layer\": 3, \"head\": 4, \"dense\": true, \"theta\": -0.3, \"tau\": null, "
        "\"topk\": 0.7, \"min_mass\": null, \"lambda\": null},\n"
        "  {\"layer\": 3, \"head\": 5, \"dense\": false, \"theta\": 0.0, \"tau\": null, "
        "\"topk\": null, \"min_mass\": 0.2, \"lambda\": -4.0}\n ]\n}\n",
        "%s", text);
    params p;
    cr_assert_eq(params_of(text, &p, &error), EXIT_FINE, "%s", error.text);
    cr_expect(p.heads == 2 && p.head->layer == 3 && p.head->head == 4 && p.options.cell == 8 &&
              p.options.softmax_scale == o.softmax_scale && p.options.skip_rows == 32);
    for (int h = 0; h < 2; h++) {
        const sparge_thresholds *got = &p.head[h].thresholds;
        cr_expect(got->theta == thresholds[h].theta && got->topk == thresholds[h].topk &&
                  got->min_mass == thresholds[h].min_mass);
    }
    cr_expect_eq(params_obey(&p, "p.json", options_all(), &o, &error), EXIT_FINE, "%s", error.text);
    cr_expect_eq(params_model(&p, "p.json", "a \"b\"\n", NULL, &error), EXIT_FINE, "%s",
                 error.text);
    cr_expect_eq(params_model(&p, "p.json", NULL, NULL, &error), EXIT_FINE, "%s", error.text);
    cr_expect_eq(params_model(&p, "p.json", "c", "ab12", &error), EXIT_FINE, "%s", error.text);
    cr_expect_eq(params_model(&p, "p.json", "c", NULL, &error), EXIT_FILE);
    cr_expect_eq(params_model(&p, "p.json", "c", "ab13", &error), EXIT_FILE);
    params_free(&p);
    free(text);
    FILE *full = fopen("/dev/full", "r+");
    if (full) {
        const char *const says[] = {"p.json: cannot write", "No space left"};
        cr_expect(!json_write_lines(full, "p.json", header, &error), "a device without space");
        expect_says(&error, "/dev/full", says, 2);
        fclose(full);
    }
    json_decref(header);
    json_t *none = json_rounded((double)NAN, 6), *some = json_rounded(0.123456789, 3);
    cr_expect(json_is_null(none) && json_real_value(some) == 0.123);
    json_decref(none);
    json_decref(some);
}

/* ---- Captures --------------------------------------------------------------------------- */

static exit_code check_capture(const capture *c, int64_t heads, sparge_causal causal, float scale,
                               file_error *error)
{
    const sparge_problem problem = {.heads = heads, .dim = 64};
    sparge_options options = {.causal = causal, .softmax_scale = scale};
    return capture_obey(c, &problem, options_all(), &options, error);
}

/* SHA-256 of "abc" and of nothing, as FIPS 180-4 has them. */
#define SHA_ABC  "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
#define SHA_NONE "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

Test(formats, captures, .init = folder_make, .fini = folder_remove)
{
    capture *list = NULL;
    int64_t count = 0;
    file_error error;
    file_make("a.st", BYTES("abc"));
    cr_assert_eq(capture_find(in_folder("a.st"), false, &list, &count, &error), EXIT_FINE, "%s",
                 error.text);
    cr_assert(count == 1 && strcmp(list->path, in_folder("a.st")) == 0);
    cr_expect_str_eq(list->sha256, SHA_ABC);
    cr_expect(!list->model && !list->sample && !list->heads && !list->manifest);
    cr_expect(list->layer == -1 && list->causal == -1 && capture_head(list, 7) == 7);
    cr_expect_eq(check_capture(list, 5, SPARGE_CAUSAL_END, 0.5f, &error), EXIT_FINE);
    cr_expect_eq(check_capture(list, 5, SPARGE_CAUSAL_NONE, 0.0f, &error), EXIT_FINE);

    file_make("b.st", BYTES(""));
    file_make("manifest.json",
              BYTES("{\"model\": \"m\", \"text\": \"t\", \"causal\": true, \"files\": ["
                    "{\"file\": \"b.st\", \"layer\": 2147483647, "
                    "\"query_heads\": [8, 0, 2147483647], \"softmax_scale\": 0.5},"
                    "{\"file\": \"a.st\", \"sha256\": \"" SHA_ABC "\", \"causal\": false}], "
                    "\"softmax_scale\": 0.125}"));
    cr_assert_eq(capture_find(in_folder("a.st"), false, &list, &count, &error), EXIT_FINE, "%s",
                 error.text);
    cr_assert_eq(capture_find(folder, false, &list, &count, &error), EXIT_FINE, "%s", error.text);
    cr_assert_eq(count, 4); /* they are appended */
    const capture *a = &list[1], *b = &list[2];
    cr_expect_str_eq(a->model, "m");
    cr_expect_str_eq(a->sample, "t");
    cr_expect(a->causal == 0 && a->layer == -1 && a->softmax_scale == 0.125 && !a->heads);
    cr_expect_str_eq(a->sha256, list[3].sha256);
    cr_expect_str_eq(b->path, in_folder("b.st"));
    cr_expect_str_eq(b->sha256, SHA_NONE);
    cr_expect(b->layer == INT32_MAX && capture_head(b, 0) == 8 && capture_head(b, 2) == INT32_MAX);
    cr_expect_eq(check_capture(b, 3, SPARGE_CAUSAL_START, 0.5f, &error), EXIT_FINE);
    cr_expect_eq(check_capture(a, 3, SPARGE_CAUSAL_NONE, 0.0f, &error), EXIT_FINE);
    const char *const counted[] = {"b.st", "has 2 query heads", "lists 3"},
                      *const says[] = {"b.st", "give --causal"},
                      *const scaled[] = {"b.st", "by 0.5", "not by 0.125", "--softmax-scale 0.5"};
    cr_expect_eq(check_capture(b, 2, SPARGE_CAUSAL_END, 0.5f, &error), EXIT_FILE);
    expect_says(&error, "heads", counted, 3);
    cr_expect_eq(check_capture(b, 3, SPARGE_CAUSAL_NONE, 0.5f, &error), EXIT_FILE);
    expect_says(&error, "causality", says, 2);
    cr_expect_eq(check_capture(b, 3, SPARGE_CAUSAL_END, 0.0f, &error), EXIT_FILE);
    expect_says(&error, "softmax_scale", scaled, 4);

    file_make("b.st", BYTES("abd"));
    file_make("manifest.json",
              BYTES("{\"files\": [{\"file\": \"b.st\", \"sha256\": \"" SHA_ABC "\"}]}"));
    const char *const other[] = {"b.st", "ba7816bf8f01", "SHA-256"};
    cr_expect_eq(capture_find(in_folder("b.st"), false, &list, &count, &error), EXIT_FILE);
    expect_says(&error, "another file", other, 3);
    cr_expect_eq(capture_find(in_folder("none.st"), false, &list, &count, &error), EXIT_FILE);
    capture_free(list, count); /* what failed too */
    capture_free(NULL, 0);
}

/* A megabyte is read at a time. */
Test(formats, captures_of_many_bytes, .init = folder_make, .fini = folder_remove)
{
    enum { MILLION = 1000000, MORE = (2 << 20) + 1 };
    char *bytes = malloc(MORE);
    cr_assert(bytes);
    memset(bytes, 'a', MORE);
    static const struct {
        size_t size;
        const char *sha;
    } cases[] = {
        {MILLION,
         "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}, /* FIPS 180-4 */
        {1 << 20, "9bc1b2a288b26af7257a36277ae3816a7d4f16e89c1e7e77d0a5c48bad62b360"},
        {(1 << 20) + 1, "4a3f0c0c213adea174f9a3d4c13177315b588bdb2e9c1012d3d0bf0453ca0f6a"},
        {MORE, "16a429a1e5162fcf59e3079724763e9afafcef1e2c7f862571e9267b3d959113"},
    };
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        capture *list = NULL;
        int64_t count = 0;
        file_error error;
        file_make("a.st", bytes, cases[n].size);
        cr_assert_eq(capture_find(in_folder("a.st"), false, &list, &count, &error), EXIT_FINE, "%s",
                     error.text);
        cr_expect_str_eq(list->sha256, cases[n].sha, "%zu bytes", cases[n].size);
        capture_free(list, count);
    }
    free(bytes);
}

/* ---- What masks are worth ----------------------------------------------------------------- */

/* Rows keep all, a half and nothing of their attention; one sees no key. */
Test(formats, judge_recall_by_rows)
{
    const double none = -(double)INFINITY;
    double dense[] = {0.75, 100.0, -3.0, none}, over[] = {0.75, 100.0 - log(2.0), none, none};
    const array all = {ARRAY_F64, 3, {1, 2, 2}, dense}, masked = {ARRAY_F64, 3, {1, 2, 2}, over};
    recall r = judge_recall(&masked, &all);
    cr_expect(fabs(r.share - 0.5) < 1e-13 && r.worst_row == 0.0, "%g %g", r.share, r.worst_row);
    cr_expect(r.nonfinite == 0);
    over[2] = -3.0;
    over[0] = nextafter(0.75, 1.0); /* by rounding */
    r = judge_recall(&masked, &all);
    cr_expect(fabs(r.share - 2.5 / 3) < 1e-13 && fabs(r.worst_row - 0.5) < 1e-13);
    over[1] = dense[1];
    cr_expect(judge_recall(&masked, &all).share == 1.0);
    const array no_rows = {ARRAY_F64, 3, {1, 2, 0}, dense};
    for (int n = 0; n < 4; n++)
        dense[n] = over[n] = none;
    for (int n = 0; n < 2; n++) {
        r = judge_recall(n ? &no_rows : &masked, n ? &no_rows : &all);
        cr_expect(r.share == 1.0 && r.worst_row == 1.0 && r.nonfinite == 0);
    }
}

Test(formats, judge_recall_nonfinite)
{
    double dense[] = {(double)NAN, 1.0, 1.0, (double)INFINITY},
           over[] = {1.0, 1.0, 1.0 - log(2.0), 1.0};
    const array all = {ARRAY_F64, 1, {4}, dense}, masked = {ARRAY_F64, 1, {4}, over};
    const recall half = judge_recall(&masked, &all);
    cr_expect(fabs(half.share - 0.75) < 1e-15 && fabs(half.worst_row - 0.5) < 1e-15, "%g",
              half.share);
    cr_expect(half.nonfinite == 2);
    over[1] = (double)NAN; /* an error of the judge's is no recall either */
    cr_expect(judge_recall(&masked, &all).nonfinite == 3);
    dense[1] = dense[2] = (double)NAN;
    const recall none = judge_recall(&masked, &all);
    cr_expect(isnan(none.share) && isnan(none.worst_row) && none.nonfinite == 4);
    json_t *json = recall_json(&none);
    char *text = json_dumps(json, JSON_COMPACT);
    cr_expect_str_eq(text, "{\"recall\":null,\"worst_row_recall\":null,\"rows_nonfinite\":4}");
    free(text);
    json_decref(json);
}

/* Queries 0 to 2 see the first 3, 4 and 5 keys; the last block of each is short. */
static const sparge_problem three = {.batch = 1, .heads = 1, .kv_heads = 1, .q_len = 3, .k_len = 5};
static const sparge_options causal_pairs = {
    .block_q = 2, .block_k = 2, .causal = SPARGE_CAUSAL_END};

Test(formats, kept_counts)
{
    const sparge_counts c = {.pairs = 5,
                             .qk_done = 3,
                             .pv_done = 2.5,
                             .tokens = 12,
                             .tile_tokens = 8,
                             .qk_tokens = 6,
                             .pv_tokens = 3};
    const sparge_counts two[] = {c, c}, sum = kept_sum(two, 2);
    cr_expect(sum.pairs == 10 && sum.qk_tokens == 12 && sum.pv_done == 5.0 &&
              sum.tile_tokens == 16);
    cr_expect(kept_pv_tiles(&sum) == 8.0);
    cr_expect(kept_pv_tiles(&(sparge_counts){.tile_tokens = 4}) == 0.0); /* nothing is attended */
}

Test(formats, kept_for_reasons)
{
    uint8_t bits[] = {SPARGE_KEPT_MASS | SPARGE_KEPT_DISSIMILAR_Q,
                      SPARGE_KEPT_DISSIMILAR_Q,
                      0,
                      SPARGE_KEPT_SINK | SPARGE_KEPT_MIN_MASS,
                      0,
                      SPARGE_KEPT_DISSIMILAR_K};
    const array why = {ARRAY_U8, 4, {1, 1, 2, 3}, bits};
    const reasons r = reasons_of(&why, &three, &causal_pairs);
    cr_expect(r.pairs == 5);
    json_t *json = json_pack("[o, o]", reasons_json(r.kept), reasons_json(r.alone));
    char *dumped = json_dumps(json, JSON_COMPACT);
    cr_expect_str_eq(dumped,
                     "[{\"mass\":1,\"topk\":0,\"dissimilar_q\":2,\"dissimilar_k\":1,\"overflow\":0,"
                     "\"diagonal\":0,\"sink\":1,\"min_mass\":1},{\"mass\":0,\"topk\":0,"
                     "\"dissimilar_q\":1,\"dissimilar_k\":1,\"overflow\":0,\"diagonal\":0,"
                     "\"sink\":0,\"min_mass\":0}]");
    free(dumped);
    json_decref(json);
    char text[256];
    reasons_text(&r, text);
    cr_expect_str_eq(text, "kept: 20 % by mass, 40 % by dissimilar queries, 20 % by dissimilar "
                           "keys, 20 % by the sink, 20 % by min-mass");
}

Test(formats, floats_as_typed)
{
    const float x[] = {0.6f, 0.1f, 1.0f / 3.0f, 0x1p-149f, 3.40282347e38f, 16777216.0f, -0.0f};
    const double want[] = {0.6, 0.1, 0.33333334, 1e-45, 3.4028235e38, 16777216.0, -0.0};
    for (size_t n = 0; n < sizeof x / sizeof *x; n++) {
        json_t *json = json_float(x[n]);
        cr_expect(json_real_value(json) == want[n] && (float)json_real_value(json) == x[n],
                  "%.9g becomes %.17g", (double)x[n], json_real_value(json));
        json_decref(json);
    }
    cr_expect(json_is_null(json_float(INFINITY)) && json_is_null(json_float(NAN)));
}

Test(formats, judge_two_masks)
{
    uint8_t got_bits[] = {1, 0, 0, 2, 1, 1}, want_bits[] = {1, 1, 0, 1, 0, 0};
    const array got = {ARRAY_U8, 4, {1, 1, 2, 3}, got_bits},
                want = {ARRAY_BOOL, 4, {1, 1, 2, 3}, want_bits};
    const mask_difference d = judge_masks(&got, &want);
    cr_expect(d.missing == 1 && d.extra == 2 && d.first_missing == 1 && d.first_extra == 4);
    json_t *json = judge_json(&got, &d);
    char *text = json_dumps(json, JSON_COMPACT);
    cr_expect_str_eq(
        text, "{\"missing\":1,\"extra\":2,\"first_missing\":[0,0,0,1],\"first_extra\":[0,0,1,1]}");
    free(text);
    json_decref(json);
    const mask_difference same = judge_masks(&got, &got);
    cr_expect(same.missing == 0 && same.extra == 0 && same.first_missing == -1 &&
              same.first_extra == -1);
}

/* o and lse of one part, as its number says. */
static void sum_part(const sparge_part *part, void *user, double *o, double *lse)
{
    const bool first = *(int *)user == 0;
    *(int *)user += 1;
    cr_expect(part->pooled == !first);
    for (int t = 0; t < 3; t++) {
        o[t] = first ? 10.0 * t : 6.0;
        lse[t] = first ? t : t == 2 ? -(double)INFINITY : t + log(3.0);
    }
}

Test(formats, plan_in_another_order)
{
    const int64_t order[] = {2, 0, 1};
    sparge_plan plan = {.parts = 2, .q_order = order};
    plan.problem.batch = plan.problem.heads = plan.problem.kv_heads = 1;
    plan.problem.q_len = 3;
    plan.problem.k_len = plan.problem.dim = plan.problem.dim_v = 1;
    plan.part[1].pooled = true;
    array o, lse, kept;
    int parts = 0;
    plan_sum(&plan, sum_part, &parts, &o, &lse, &kept);
    /* The second part has three times the weight, and no key for the last row, which is query 1. */
    const double want_o[] = {7.0, 20.0, 4.5}, want_kept[] = {1.0, 2.0, 0.0},
                 want_lse[] = {1.0 + log(4.0), 2.0, log(4.0)};
    for (int t = 0; t < 3; t++) {
        cr_expect(fabs(((double *)o.data)[t] - want_o[t]) < 1e-12, "o of %d", t);
        cr_expect(fabs(((double *)lse.data)[t] - want_lse[t]) < 1e-12, "lse of %d", t);
        cr_expect(((double *)kept.data)[t] == want_kept[t], "kept of %d", t);
    }
    array_free(&o);
    array_free(&lse);
    array_free(&kept);
}
