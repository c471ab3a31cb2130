/* SPDX-License-Identifier: Apache-2.0 */
/* each.c: what the tests share: questions of every kernel, and calls that are made by hand. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu.h"

bool name_case(const kernel *r, int n)
{
    check_case("kernel %d pv %d, case %d", r->n, (int)r->pv_dtype, n);
    return true;
}

problem question_of(const kernel *r, int64_t batch, int64_t heads, int64_t kv_heads, int64_t q_len,
                    int64_t k_len, int64_t dim, int64_t dim_v)
{
    const shape s = shape_of(batch, heads, kv_heads, q_len, k_len, dim, dim_v);
    return question(&s, r);
}

void check_answers(problem *x, const kernel *r, unsigned masks)
{
    problem_write(x);
    if (masks & PREDICTED)
        verify(x, r, true);
    if (masks & GIVEN)
        verify(x, r, false);
    problem_free(x);
}

answer answer_of(problem *x, const kernel *r)
{
    use(x, r);
    return attend(x);
}

answer verified(problem *x, const kernel *r)
{
    problem_write(x);
    verify(x, r, false);
    return answer_of(x, r);
}

void forget_both(answer *a, problem *x)
{
    answer_free(a);
    problem_free(x);
}

void set_mask(problem *x, bool (*keep)(int64_t line, int64_t j))
{
    mask_fill(x, 0.0f);
    const int64_t lines = x->mask.batch * x->mask.heads * x->mask.q_blocks;
    for (int64_t line = 0; line < lines; line++)
        for (int64_t j = 0; j < x->mask.k_blocks; j++)
            if (keep(line, j))
                x->mask.bits[line * x->mask.words + j / 32] |= 1u << j % 32;
}

bool second_alone(int64_t line, int64_t j) { return line >= 0 && j == 1; }

/* How far a row of o may lie from dense attention on the real inputs by codes and rounding alone.
 */
static double quality(const kernel *r)
{
    return r->qk_dtype == SPARGE_F32 ? 1e-4 : r->pv_dtype == SPARGE_FP8 ? 0.12 : 0.06;
}

static double worst_row(const problem *x, const answer *a, const sparge_mask *mask)
{
    double *o = malloc((size_t)tensor_count(&a->o) * sizeof *o), worst = 0;
    check(sparge_oracle(&x->p, &x->o, mask, SPARGE_ORACLE_REAL, o, NULL, NULL, NULL) == SPARGE_OK,
          "oracle");
    for (int64_t row = 0; row < problem_rows(x); row++) {
        double off = 0, size = 0;
        for (int64_t c = row * x->p.dim_v; c < (row + 1) * x->p.dim_v; c++) {
            off += fabs((double)a->o.x[c] - o[c]);
            size += fabs(o[c]);
        }
        const double far = size > 0 ? off / size : off;
        worst = far <= worst ? worst : far;
    }
    free(o);
    return worst;
}

void near_dense(problem *x, const kernel *r, bool predict)
{
    use(x, r);
    answer a = predict ? attention(x, NULL) : attend(x);
    const double far = worst_row(x, &a, NULL);
    check(far <= quality(r), "worst row at %g", far);
    answer_free(&a);
}

/* ---- Calls that are made by hand ---- */

void scene_open(scene *s, problem *x, const kernel *r, bool predict)
{
    use(x, r);
    *s = (scene){.x = x, .o = x->o, .predict = predict, .a = answer_make(x, SPARGE_F32, PACKED)};
    s->p = twin_problem(&s->inputs, x);
    if (!predict && x->mask.bits)
        s->given = twin_mask(&s->inputs, &x->mask);
    s->result = (sparge_result){.o = twin_out(&s->outputs, &s->a.o),
                                .lse = twin(&s->outputs, s->a.lse),
                                .head_counts = twin(&s->outputs, s->a.head)};
    if (predict) {
        s->host_mask = wide_mask(x, 0);
        s->mask = twin_mask(&s->outputs, &s->host_mask);
        s->result.mask = &s->mask;
    }
}

sparge_status scene_call(scene *s)
{
    memset(s->error.text, '?', sizeof s->error.text - 1);
    return s->predict ? sparge_attention(&s->p, &s->o, &s->result, &s->error)
                      : sparge_attend(&s->p, &s->o, s->given.bits ? &s->given : NULL, &s->result,
                                      &s->error);
}

void scene_fetch(scene *s)
{
    twins_fetch(&s->outputs);
    tensor_read(&s->a.o);
}

void scene_poison(scene *s)
{
    for (int n = 0; n < s->outputs.count; n++)
        memset(s->outputs.of[n].host, 0xFF, s->outputs.of[n].bytes);
    twins_send(&s->outputs);
}

bool scene_untouched(scene *s)
{
    twins_fetch(&s->outputs);
    bool same = true;
    for (int n = 0; n < s->outputs.count; n++)
        for (size_t i = 0; i < s->outputs.of[n].bytes; i++)
            same &= ((unsigned char *)s->outputs.of[n].host)[i] == 0xFF;
    return same;
}

void scene_close(scene *s)
{
    twins_free(&s->inputs);
    twins_free(&s->outputs);
    check_free(s->host_mask.bits);
    answer_free(&s->a);
}

problem usual(const kernel *r)
{
    const shape s = shape_of(1, 2, 1, 150, 200, 24, 40);
    problem x = question(&s, r);
    x.o.causal = SPARGE_CAUSAL_END;
    x.o.cell = r->n % 2 ? 0 : 16;
    x.o.thresholds = (sparge_thresholds){0.2f, 0.7f, SPARGE_OFF, -1.0f, 0.5f};
    return x;
}

void same_outputs(const scene *got, const answer *want)
{
    check_same_as("o", got->a.o.x, want->o.x, tensor_count(&want->o));
    check_same_as("lse", got->a.lse, want->lse, problem_rows(got->x));
    for (int64_t h = 0; h < got->x->p.batch * got->x->p.heads; h++)
        same_counts(&got->a.head[h], &want->head[h]);
}
