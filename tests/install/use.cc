/* SPDX-License-Identifier: Apache-2.0 */
/* use.cc: a C++ program on the installed library. Both stages, and the mask between them. */
#include <cstdio>
#include <vector>

#include "sparge.h"

int main()
{
    constexpr int64_t n = 512, d = 64;
    std::vector<float> x(n * d), o(n * d);
    for (size_t i = 0; i < x.size(); i++)
        x[i] = static_cast<float>(i * 37 % 101) / 101.0f - 0.5f;
    const sparge_in in{x.data(), SPARGE_F32, n * d, n * d, d};
    sparge_problem problem{};
    problem.batch = problem.heads = problem.kv_heads = 1;
    problem.q_len = problem.k_len = n;
    problem.dim = problem.dim_v = d;
    problem.q = problem.k = problem.v = in;
    const sparge_options options = sparge_options_default(SPARGE_RULES_DEFAULT);
    sparge_mask mask{};
    sparge_error error;
    sparge_result result{};
    result.o = {o.data(), SPARGE_F32, n * d, n * d, d};
    if (sparge_mask_alloc(&mask, &problem, &options, &error) != SPARGE_OK ||
        sparge_predict(&problem, &options, &mask, nullptr, &error) != SPARGE_OK ||
        sparge_attend(&problem, &options, &mask, &result, &error) != SPARGE_OK) {
        std::fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    const bool kept = sparge_mask_get(&mask, 0, 0, 0, 0);
    sparge_mask_free(&mask);
    std::puts(kept && o[0] != 0.0f ? "fine" : "the first block is not kept");
    return kept && o[0] != 0.0f ? 0 : 1;
}
