/* each.c: what the questions of values.c, masks.c and schedules.c share. */
#include <math.h>
#include <stdlib.h>

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
