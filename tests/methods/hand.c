/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/methods/hand.h"

#include <math.h>
#include <string.h>

#include "common/geometry.h"

hand hand_make(int64_t heads, int64_t kv_heads, int64_t q_len, int64_t k_len, int64_t dim,
               int64_t dim_v, const float *q, const float *k, const float *v)
{
    hand x = {
        .p = {.batch = 1,
              .heads = heads,
              .kv_heads = kv_heads,
              .q_len = q_len,
              .k_len = k_len,
              .dim = dim,
              .dim_v = dim_v,
              .q = {q, SPARGE_F32, heads * q_len * dim, q_len * dim, dim},
              .k = {k, SPARGE_F32, kv_heads * k_len * dim, k_len * dim, dim},
              .v = {v, SPARGE_F32, kv_heads * k_len * dim_v, k_len * dim_v, dim_v}},
        .o = sparge_options_default(SPARGE_RULES_DEFAULT),
    };
    x.o.backend = SPARGE_REF;
    x.o.qk_dtype = x.o.pv_dtype = SPARGE_F32;
    x.o.softmax_scale = 1.0f;
    return x;
}

sparge_plan hand_plan(const hand *x, const char *method, const double *param, int params)
{
    const sparge_method *m = sparge_method_find(method);
    check(m, "there is no %s", method);
    double all[SPARGE_MAX_PARAMS];
    for (int n = 0; n < SPARGE_MAX_PARAMS; n++)
        all[n] = n < params ? param[n] : m->param[n].usual;
    sparge_plan plan;
    sparge_error error;
    sparge_status status = sparge_method_plan(m, &x->p, &x->o, &x->context, all, &plan, &error);
    if (!status)
        status = sparge_plan_predict(&plan, NULL, &error);
    check(status == SPARGE_OK, "%s: %s", method, error.text);
    return plan;
}

void has_pairs(const hand *x, const char *method, const double *param, int params, int64_t block,
               const char *want)
{
    check_case("%s:%g, %s", method, param[0], want);
    const int64_t q_len = x->p.q_len, k_len = x->p.k_len;
    const sparge_geometry g = sparge_geometry_of(&x->p, &x->o);
    sparge_plan plan = hand_plan(x, method, param, params);
    uint8_t *pairs = check_alloc((size_t)(x->p.heads * q_len * k_len));
    sparge_error error;
    check(sparge_plan_pairs(&plan, pairs, &error) == SPARGE_OK, "%s", error.text);
    for (int64_t h = 0; h < x->p.heads; h++)
        for (int64_t i = 0; i * block < q_len; i++) {
            const int64_t digits = (int64_t)strspn(want, "012");
            for (int64_t t = i * block; t < sparge_min(q_len, (i + 1) * block); t++)
                for (int64_t key = 0; key < k_len; key++) {
                    const int64_t j = key / block;
                    const int digit =
                        j < digits && key < sparge_keys_of_query(&g, t) ? want[j] : '0';
                    check(pairs[(h * q_len + t) * k_len + key] == digit - '0',
                          "head %lld, query %lld, key %lld: %d, and not %c", (long long)h,
                          (long long)t, (long long)key, pairs[(h * q_len + t) * k_len + key],
                          digit);
                }
            want += digits;
            want += *want == ' ';
        }
    check(*want == '\0', "left of the text: %s", want);
    check_free(pairs);
    sparge_plan_free(&plan);
}

void short_defaults(const sparge_method *m, double *param)
{
    for (int n = 0; n < SPARGE_MAX_PARAMS; n++) {
        const sparge_param *q = &m->param[n];
        param[n] = q->name && q->whole && q->usual >= 16.0 ? fmax(q->low, floor(q->usual / 8.0))
                                                           : q->usual;
    }
}

double first_param(const sparge_method *m, int64_t k_len, double least_first)
{
    const sparge_param *q = &m->param[0];
    const double share = m->falls ? 1.0 - least_first : least_first;
    const double high = q->whole ? fmin(q->high, fmax(q->low, (double)k_len)) : q->high;
    const double low = isinf(q->low) ? fmin(high, 0.0) - 8.0 : q->low;
    const double x = low + share * ((isinf(high) ? low + 16.0 : high) - low);
    return share == 0.0 ? q->low : share == 1.0 ? q->high : q->whole ? floor(x) : x;
}
