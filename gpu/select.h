/* SPDX-License-Identifier: Apache-2.0 */
/* select.h: which blocks of its row a warp keeps: line 6 of Algorithm 1, for predict.cu and
 * cells.cu. Nothing is sorted: the best blocks are those above a cut, and bisection finds the cut.
 * Masses are integers, so that their sums are the reference's in any order. */
#ifndef SPARGE_GPU_SELECT_H
#define SPARGE_GPU_SELECT_H

#include "gpu/work.h"
#include "sparge_inspect.h"

#include "common/select.h"

namespace sparge {

/* A row, in shared memory: which blocks tau, topk and min_mass choose from, the order of those as
 * keys above 0, and their masses. By scores: */
struct scored_row {
    const float *s; /* [k_blocks] of S[i,:]; -inf if K_j is not similar or not visible */
    float top;      /* the largest finite one, or -inf */
    __device__ __forceinline__ bool ranks_some() const { return top > -INFINITY; }
    __device__ __forceinline__ bool ranks(int64_t j) const { return sparge_finite(s[j]); }
    __device__ __forceinline__ uint32_t key(int64_t j) const { return sparge_order_key(s[j]); }
    __device__ __forceinline__ uint32_t mass(int64_t j) const { return sparge_mass(s[j], top); }
};

/* By the masses of cells, which are far below 2^32: */
struct weighed_row {
    const uint32_t *masses; /* [k_blocks] */
    __device__ __forceinline__ bool ranks_some() const { return true; }
    __device__ __forceinline__ bool ranks(int64_t) const { return true; }
    __device__ __forceinline__ uint32_t key(int64_t j) const { return masses[j] + 1; }
    __device__ __forceinline__ uint32_t mass(int64_t j) const { return masses[j]; }
};

SPARGE_DEVICE bool key_is_similar(const work &w, const query_block &q, float theta, int64_t j)
{
    const int64_t at = q.kv * w.g.k_blocks + j;
    return sparge_is_similar(!w.k_block_nonfinite[at], w.k_sim[at], theta);
}

SPARGE_DEVICE uint64_t sum_of_warp(uint64_t x)
{
    unsigned long long sum = x;
    for (int half = 16; half > 0; half /= 2)
        sum += __shfl_xor_sync(~0u, sum, half);
    return sum;
}

/* The mass of the first `blocks` together. */
template <class Row> SPARGE_DEVICE uint64_t total_of(const Row &row, int64_t blocks)
{
    uint64_t total = 0;
    for (int64_t j = threadIdx.x % 32; j < blocks; j += 32)
        total += row.ranks(j) ? row.mass(j) : 0;
    return sum_of_warp(total);
}

/* The best blocks of a row: those whose key is at least `above`, and the first `ties` of those
 * whose key is one below. */
struct cut {
    uint64_t above;
    uint64_t ties;
};

/* What a block counts towards a limit: its mass, or 1. */
template <class Row> SPARGE_DEVICE uint64_t mass_or_one(const Row &row, int64_t j, bool count)
{
    return count ? 1 : row.mass(j);
}

/* The longest run of best blocks whose mass, or number where `count`, is within `limit`; at least
 * one. */
template <class Row>
static __device__ cut best_within(const Row &row, int64_t blocks, bool count, uint64_t limit)
{
    const int lane = (int)threadIdx.x % 32;
    uint64_t low = 0, high = (uint64_t)1 << 32, within = 0, kept = 0;
    while (high - low > 1) {
        const uint64_t middle = (low + high) / 2;
        uint64_t sum = 0, number = 0;
        for (int64_t j = lane; j < blocks; j += 32) {
            const uint64_t key = row.key(j);
            if (row.ranks(j) && key >= middle && key < high) {
                sum += mass_or_one(row, j, count);
                number++;
            }
        }
        sum = sum_of_warp(sum);
        if (within + sum <= limit) {
            high = middle;
            within += sum;
            kept += sum_of_warp(number);
        } else {
            low = middle;
        }
    }
    /* All blocks of key `low` weigh the same. If everything is within the limit, none has it. */
    uint64_t each = 0;
    for (int64_t j = lane; j < blocks; j += 32)
        if (row.ranks(j) && row.key(j) == low)
            each = mass_or_one(row, j, count);
    for (int half = 16; half > 0; half /= 2) {
        const unsigned long long other = __shfl_xor_sync(~0u, (unsigned long long)each, half);
        each = each > other ? each : other;
    }
    cut c = {high, each ? (limit - within) / each : 0};
    if (kept == 0 && c.ties == 0)
        c.ties = 1;
    return c;
}

/* Does the cut keep block j? `taken` counts the ties of earlier words. */
SPARGE_DEVICE bool keeps(const cut &c, bool ranks, uint64_t key, uint32_t *taken)
{
    const bool tie = ranks && key + 1 == c.above;
    const uint32_t ties = __ballot_sync(~0u, tie), before = ties & ((1u << threadIdx.x % 32) - 1u);
    const bool first = tie && *taken + (uint32_t)__popc(before) < c.ties;
    *taken += (uint32_t)__popc(ties);
    return first || (ranks && key >= c.above);
}

/* Line 6: M[i,:]. */
template <class Row>
static __device__ void select_row(const work &w, const query_block &q,
                                  const sparge_thresholds &thresholds, const Row &row)
{
    const int lane = (int)threadIdx.x % 32;
    const bool some = row.ranks_some(), by_mass = some && thresholds.tau != SPARGE_OFF,
               by_count = some && thresholds.topk != SPARGE_OFF,
               by_share = some && thresholds.min_mass != 0.0f;

    cut heavy = {0, 0}, top = {0, 0};
    double least = 0.0;
    if (by_mass || by_share) {
        const uint64_t total = total_of(row, q.visible);
        if (by_mass)
            heavy = best_within(row, q.visible, false,
                                (uint64_t)sparge_mass_limit(thresholds.tau, total));
        least = sparge_min_mass_limit(thresholds.min_mass, total, w.g.k_blocks);
    }
    if (by_count)
        top = best_within(row, q.visible, true,
                          (uint64_t)sparge_topk_count(thresholds.topk, q.visible));

    const bool q_similar =
        sparge_is_similar(!w.q_block_nonfinite[q.line], w.q_sim[q.line], thresholds.theta);
    const int64_t diagonal = sparge_first_diagonal(&w.g, q.i);
    uint32_t heavy_ties = 0, top_ties = 0;
    for (int64_t word = 0; word < w.words; word++) {
        const int64_t j = 32 * word + lane;
        const bool exists = j < q.visible, ranks = exists && row.ranks(j);
        const uint64_t key = ranks ? row.key(j) : 0;
        uint32_t why = 0;
        if (by_mass && keeps(heavy, ranks, key, &heavy_ties))
            why |= SPARGE_KEPT_MASS;
        if (by_count && keeps(top, ranks, key, &top_ties))
            why |= SPARGE_KEPT_TOPK;
        if (by_share && ranks && (double)row.mass(j) > least)
            why |= SPARGE_KEPT_MIN_MASS;
        if (exists)
            why |= sparge_forced(q_similar, key_is_similar(w, q, thresholds.theta, j), ranks,
                                 j >= diagonal, w.sink && j == 0);
        if (w.why && j < w.g.k_blocks)
            w.why[q.line * w.g.k_blocks + j] = (uint8_t)why;
        const uint32_t bits = __ballot_sync(~0u, why != 0);
        if (lane == 0)
            w.mask[q.line * w.words + word] = bits;
    }
}

} // namespace sparge

#endif
