/* SPDX-License-Identifier: Apache-2.0 */
/* merge.c: parts of an attention merged by their lse: against one call, against attention in
 * double, and against the formula in double over the parts as they are written.
 *
 * Linked with -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=free against a static library.
 */
#include "sparge_mask.h"

#include <math.h>
#include <string.h>

#include "sparge_inspect.h"
#include "tests/support/heap.h"
#include "tests/support/problem.h"

TestSuite(merge);

enum { MOST = 5 };

static sparge_error error;
#define fine(call) check((call) == SPARGE_OK && !error.text[0], "%s", error.text)

static sparge_partial part_of(const answer *a, float log_count)
{
    return (sparge_partial){a->o.in, a->lse, log_count};
}

static void merge_into(const sparge_problem *p, const sparge_partial *part, int parts, answer *to)
{
    const sparge_out o = tensor_out(&to->o);
    fine(sparge_merge(p, part, parts, &o, to->lse, &error));
    tensor_read(&to->o);
}

/* ---- Splits of keys ---------------------------------------------------------------------------
 */

/* Each key of a row in one of the parts, or now and then all of them in one. */
Test(merge, splits_of_keys)
{
    for (int n = 0; n < 30; n++) {
        check_case("split %d", n);
        const int64_t kv = check_int(1, 2);
        const shape size = shape_of(check_int(1, 2), kv * check_int(1, 2), kv, check_int(1, 60),
                                    check_int(1, 60), check_int(1, 8), check_int(1, 8));
        problem x = problem_make(&size);
        x.o.causal = (sparge_causal)(n % 3);
        x.o.block_q = check_int(1, 40);
        x.o.block_k = check_int(1, 40);
        x.o.thresholds.lambda = -INFINITY;
        const int parts = (int)check_int(2, MOST);
        const int64_t rows = problem_rows(&x), pairs = rows * x.p.k_len;
        uint8_t *own = check_alloc((size_t)pairs), *in_part = check_alloc((size_t)pairs);
        for (int64_t row = 0; row < rows; row++) {
            const int64_t all = check_int(0, 3) ? -1 : check_int(0, parts - 1);
            for (int64_t key = 0; key < x.p.k_len; key++)
                own[row * x.p.k_len + key] = (uint8_t)(all >= 0 ? all : check_int(0, parts - 1));
        }
        const answer dense = attend(&x);
        answer a[MOST], got = answer_make(&x, SPARGE_F32, PADDED);
        sparge_partial part[MOST];
        for (int m = 0; m < parts; m++) {
            for (int64_t at = 0; at < pairs; at++)
                in_part[at] = own[at] == m;
            fine(sparge_mask_from_pairs(&x.mask, &x.p, &x.o, in_part, &error));
            a[m] = attend(&x);
            for (int64_t row = 0; row < rows; row++) /* nobody looks at an o without keys */
                for (int64_t c = 0; a[m].lse[row] == -INFINITY && c < x.p.dim_v; c++)
                    a[m].o.x[row * x.p.dim_v + c] = NAN;
            tensor_write(&a[m].o);
            part[m] = part_of(&a[m], 0.0f);
            sparge_mask_free(&x.mask);
        }
        merge_into(&x.p, part, parts, &got);
        double *o = check_alloc((size_t)(rows * x.p.dim_v) * sizeof *o),
               *lse = check_alloc((size_t)rows * sizeof *lse);
        fine(sparge_oracle(&x.p, &x.o, NULL, SPARGE_ORACLE_REAL, o, lse, NULL, &error));
        for (int64_t row = 0; row < rows; row++) {
            check_close(got.lse[row], dense.lse[row], 4e-6);
            check_close(got.lse[row], lse[row], 4e-6);
            for (int64_t at = row * x.p.dim_v; at < (row + 1) * x.p.dim_v; at++) {
                check_close(got.o.x[at], dense.o.x[at], 4e-6);
                check_close(got.o.x[at], o[at], 4e-6);
            }
        }
        for (int m = 0; m < parts; m++)
            answer_free(&a[m]);
        answer_free((answer *)&dense);
        answer_free(&got);
        check_free(own);
        check_free(in_part);
        check_free(o);
        check_free(lse);
        problem_free(&x);
    }
}

/* Each of the last keys is there `times` times, and in a part of its own once. */
Test(merge, pooled_keys)
{
    for (int n = 0; n < 12; n++) {
        check_case("pool %d", n);
        const int64_t few = check_int(1, 20), times = check_int(2, 30), more = check_int(0, 20);
        const shape whole = shape_of(1, 2, 1, 9, more + few * times, 4, 3),
                    pooled = shape_of(1, 2, 1, 9, few, 4, 3);
        problem x = problem_make(&whole), y = problem_make(&pooled);
        memcpy(y.q.x, x.q.x, (size_t)tensor_count(&x.q) * sizeof(float));
        for (int64_t key = 0; key < few * times; key++) {
            memcpy(tensor_row(&x.k, 0, 0, more + key), tensor_row(&y.k, 0, 0, key / times), 16);
            memcpy(tensor_row(&x.v, 0, 0, more + key), tensor_row(&y.v, 0, 0, key / times), 12);
        }
        problem_write(&x);
        problem_write(&y);
        x.o.thresholds.lambda = y.o.thresholds.lambda = -INFINITY;
        double o[54], lse[18];
        fine(sparge_oracle(&x.p, &x.o, NULL, SPARGE_ORACLE_REAL, o, lse, NULL, &error));
        const answer some = attend(&y);
        answer got = answer_make(&x, SPARGE_F32, PACKED);
        x.p.k_len = more;
        const answer rest = attend(&x);
        const sparge_partial part[] = {part_of(&rest, 0.0f), part_of(&some, logf((float)times))};
        merge_into(&x.p, part, 2, &got);
        for (int64_t at = 0; at < problem_rows(&x); at++)
            check_close(got.lse[at], lse[at], 4e-6);
        for (int64_t at = 0; at < tensor_count(&got.o); at++)
            check_close(got.o.x[at], o[at], 4e-6);
        x.p.k_len = whole.k_len;
        answer_free((answer *)&some);
        answer_free((answer *)&rest);
        answer_free(&got);
        problem_free(&x);
        problem_free(&y);
    }
}

/* ---- The formula ------------------------------------------------------------------------------
 */

/* Parts of any values: lse of up to 300, whose exponentials a float does not hold. */
static void any_part(answer *a)
{
    tensor_fill(&a->o, -4, 4);
    const int64_t rows = a->o.batch * a->o.heads * a->o.tokens;
    for (int64_t row = 0; row < rows; row++)
        a->lse[row] = check_int(0, 5)   ? check_uniform(-3, 3) + 100.0f * (float)(row % 7 - 3)
                      : check_int(0, 1) ? check_uniform(-300, 300)
                                        : -INFINITY;
}

/* One row by the formula; each weight has two roundings of lse + log_count. */
static double row_by_formula(const sparge_partial *part, const answer *a, int parts, int64_t row,
                             double *o, int64_t channels)
{
    double top = -(double)INFINITY, sum = 0.0;
    for (int m = 0; m < parts; m++)
        top = fmax(top, (double)(part[m].lse[row] + part[m].log_count));
    for (int64_t c = 0; c < channels; c++)
        o[c] = 0.0;
    for (int m = 0; m < parts; m++) {
        const double weight = exp((double)(part[m].lse[row] + part[m].log_count) - top);
        if (part[m].lse[row] == -INFINITY)
            continue;
        sum += weight;
        for (int64_t c = 0; c < channels; c++)
            o[c] += weight * (double)a[m].o.x[row * channels + c];
    }
    for (int64_t c = 0; c < channels && sum > 0.0; c++)
        o[c] /= sum;
    return sum > 0.0 ? top + log(sum) : -(double)INFINITY;
}

Test(merge, every_type_and_layout)
{
    static const double unit[] = {
        [SPARGE_F32] = 0x1p-24, [SPARGE_F16] = 0x1p-11, [SPARGE_BF16] = 0x1p-8};
    for (int n = 0; n < 60; n++) {
        check_case("merge %d", n);
        const shape size = shape_of(n % 20 ? 2 : 0, 3, 3, n % 20 == 1 ? 0 : 21, 1, 1, 5);
        problem x = problem_make(&size);
        const sparge_dtype to = (const sparge_dtype[]){SPARGE_F32, SPARGE_F16, SPARGE_BF16}[n % 3];
        answer a[MOST], got = answer_make(&x, to, layout_at_random());
        sparge_partial part[MOST];
        const int parts = (int)check_int(1, MOST);
        for (int m = 0; m < parts; m++) {
            a[m] = answer_make(&x, dtype_at_random(), layout_at_random());
            any_part(&a[m]);
            part[m] = part_of(&a[m], check_int(0, 1) ? 0.0f : check_uniform(-3, 9));
        }
        merge_into(&x.p, part, parts, &got);
        for (int64_t row = 0; row < problem_rows(&x); row++) {
            double want[5];
            const double lse = row_by_formula(part, a, parts, row, want, 5);
            check_close(got.lse[row], lse, 0x1p-23 * (1.0 + fabs(lse)));
            for (int64_t c = 0; c < 5; c++)
                check_close(got.o.x[row * 5 + c], want[c], unit[to] * fabs(want[c]) + 3e-6);
        }
        /* Without lse, and over o and lse of a part. */
        answer other = answer_make(&x, to, got.o.in.token == 5 ? PADDED : PACKED);
        const sparge_out alone = tensor_out(&other.o);
        fine(sparge_merge(&x.p, part, parts, &alone, NULL, &error));
        tensor_read(&other.o);
        check_same(other.o.x, got.o.x, tensor_count(&got.o));
        const int over = (int)check_int(0, parts - 1);
        if (a[over].o.in.dtype == to) {
            const sparge_out same = tensor_out(&a[over].o);
            fine(sparge_merge(&x.p, part, parts, &same, a[over].lse, &error));
            tensor_read(&a[over].o);
            check_same(a[over].o.x, got.o.x, tensor_count(&got.o));
            check_same(a[over].lse, got.lse, problem_rows(&x));
        }
        for (int m = 0; m < parts; m++)
            answer_free(&a[m]);
        answer_free(&got);
        answer_free(&other);
        problem_free(&x);
    }
}

/* ---- What is not finite -----------------------------------------------------------------------
 */

Test(merge, nonfinite)
{
    enum { ROWS = 8 };
    const float inf = INFINITY;
    const struct {
        float lse[2], o[2];
        float want_lse, want_o;
    } table[ROWS] = {
        {{0.0f, NAN}, {1.0f, 2.0f}, NAN, NAN},        {{NAN, -inf}, {1.0f, 2.0f}, NAN, NAN},
        {{inf, 0.0f}, {1.0f, 2.0f}, NAN, NAN},        {{inf, inf}, {1.0f, 2.0f}, NAN, NAN},
        {{-inf, 3.0f}, {NAN, 2.0f}, 3.0f, 2.0f},      {{-inf, -inf}, {NAN, inf}, -inf, 0.0f},
        {{0.0f, 0.0f}, {1.0f, inf}, logf(2.0f), inf}, {{0.0f, 0.0f}, {NAN, 2.0f}, logf(2.0f), NAN},
    };
    check_case("rows that are not finite");
    float lse[2][ROWS], o[2][ROWS], got_lse[ROWS], got_o[ROWS];
    for (int row = 0; row < ROWS; row++)
        for (int m = 0; m < 2; m++) {
            lse[m][row] = table[row].lse[m];
            o[m][row] = table[row].o[m];
        }
    const sparge_problem p = {.batch = 1, .heads = 1, .kv_heads = 1, .q_len = ROWS, .dim_v = 1};
    for (int turned = 0; turned < 2; turned++) {
        const sparge_partial part[] = {
            {{o[turned], SPARGE_F32, ROWS, ROWS, 1}, lse[turned], 0.0f},
            {{o[!turned], SPARGE_F32, ROWS, ROWS, 1}, lse[!turned], 0.0f}};
        const sparge_out to = {got_o, SPARGE_F32, ROWS, ROWS, 1};
        fine(sparge_merge(&p, part, 2, &to, got_lse, &error));
        for (int row = 0; row < ROWS; row++) {
            check_case("row %d, %s", row, turned ? "turned" : "as it is");
            check_equal(got_lse[row], table[row].want_lse);
            check_equal(got_o[row], table[row].want_o);
        }
    }
}

/* ---- What is refused --------------------------------------------------------------------------
 */

Test(merge, refused)
{
    check_case("arguments");
    float o[4] = {0}, lse[4] = {0};
    const sparge_problem p = {.batch = 1, .heads = 2, .kv_heads = 1, .q_len = 2, .dim_v = 1};
    const sparge_in in = {o, SPARGE_F32, 4, 2, 1};
    const sparge_out out = {o, SPARGE_F32, 4, 2, 1};
    const sparge_problem negative = {.batch = 1, .heads = 2, .q_len = -1, .dim_v = 1};
    const sparge_partial sound = {in, lse, 0.0f};
    struct {
        const sparge_problem *p;
        int parts;
        const sparge_out *o;
        sparge_partial part[2]; /* none if the data of the first are NULL, and lse too */
        const char *says;
    } table[] = {
        {NULL, 2, &out, {sound, sound}, "problem is NULL"},
        {&p, 2, &out, {{{NULL, SPARGE_F32, 0, 0, 0}, NULL, 0.0f}, sound}, "part is NULL"},
        {&p, 2, NULL, {sound, sound}, "o is NULL"},
        {&negative, 2, &out, {sound, sound}, "batch 1, heads 2, q_len -1 and dim_v 1 must be"},
        {&p, 0, &out, {sound, sound}, "parts is 0, it must be at least 1"},
        {&p, -1, &out, {sound, sound}, "parts is -1, it must be at least 1"},
        {&p, 2, &out, {sound, {in, NULL, 0.0f}}, "part[1].lse is NULL"},
        {&p, 2, &out, {sound, {in, lse, NAN}}, "part[1].log_count is nan, it must be finite"},
        {&p, 2, &out, {{in, lse, INFINITY}, sound}, "part[0].log_count is inf, it must be finite"},
        {&p, 2, &out, {sound, {{NULL, SPARGE_F32, 4, 2, 1}, lse, 0.0f}}, "part[1].o.data is NULL"},
        {&p,
         2,
         &out,
         {sound, {{o, SPARGE_INT8, 4, 2, 1}, lse, 0.0f}},
         "part[1].o.dtype is 4, it must be one of sparge_dtype"},
    };
    for (size_t n = 0; n < sizeof table / sizeof *table; n++) {
        const sparge_partial *part = table[n].part[0].lse ? table[n].part : NULL;
        check_equal(sparge_merge(table[n].p, part, table[n].parts, table[n].o, lse, &error),
                    SPARGE_ERR_ARGUMENT);
        check(strncmp(error.text, table[n].says, strlen(table[n].says)) == 0,
              "case %zu says \"%s\"", n, error.text);
        check_equal(sparge_merge(table[n].p, part, table[n].parts, table[n].o, lse, NULL),
                    SPARGE_ERR_ARGUMENT);
    }
    const sparge_problem vast = {.batch = 1, .heads = INT64_MAX, .q_len = 2, .dim_v = 1};
    check_equal(sparge_merge(&vast, &sound, 1, &out, lse, &error), SPARGE_ERR_SHAPE);
    const sparge_out none = {NULL, SPARGE_F32, 4, 2, 1};
    check_equal(sparge_merge(&p, &sound, 1, &none, lse, &error), SPARGE_ERR_ARGUMENT);
    check(strstr(error.text, "o.data is NULL"), "%s", error.text);
    heap_arm(0);
    const sparge_status status = sparge_merge(&p, &sound, 1, &out, lse, NULL);
    heap.armed = false;
    check_equal(status, SPARGE_ERR_MEMORY);
}
