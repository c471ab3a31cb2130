/* SPDX-License-Identifier: Apache-2.0 */
/* copies.cc: asynchronous copies and the mbarriers that they arrive at, as the PTX ISA 9.0
 * describes them. */
#include "tests/cuda_model/cuda_model.h"
#include "tests/cuda_model/threads.h"

#include <algorithm>

namespace cuda_model {
namespace {

/* What has not landed yet: a NaN as e4m3 or binary16. */
const int memory_poison = 0x7f;

/* ---- mbarrier ----------------------------------------------------------------------------- */

/* PTX ISA, mbarrier: the ranges are the hardware's. `bytes` are those announced and not yet landed,
 * below 0 when they landed first. */
struct Mbarrier {
    uint64_t phase : 1, expected : 20, pending : 20, bytes_plus_2_20 : 21;
    uint64_t valid : 2; /* 1: memory full of 0xFF is not a barrier */
    int bytes() const { return (int)bytes_plus_2_20 - (1 << 20); }
};
static_assert(sizeof(Mbarrier) == 8, "as the hardware's");

Mbarrier load_barrier(const char *call, const uint64_t *b)
{
    Mbarrier m;
    shared_range(call, b, sizeof m, sizeof m);
    memcpy(&m, b, sizeof m);
    if (m.valid != 1)
        misuse("%s: no barrier_init at shared memory + %u", call, shared_address(b));
    return m;
}

void count(const char *call, uint64_t *b, int64_t bytes, unsigned arrivals)
{
    Mbarrier m = load_barrier(call, b);
    if (arrivals > m.pending)
        misuse("%s: more arrivals than the barrier at shared memory + %u expects", call,
               shared_address(b));
    const int64_t sum = m.bytes() + bytes;
    if (sum >= 1 << 20 || sum <= -(1 << 20))
        misuse("%s: %lld bytes are outstanding, the barrier counts up to 2^20 - 1", call,
               (long long)sum);
    m.bytes_plus_2_20 = (uint64_t)(sum + (1 << 20)) & 0x1fffff;
    m.pending = (m.pending - arrivals) & 0xfffff;
    const bool over = m.pending == 0 && sum == 0;
    if (over) {
        m.phase = !m.phase;
        m.pending = m.expected;
    }
    memcpy(b, &m, sizeof m);
    if (over)
        wake(b, 0, (unsigned)self().block->threads.size(), 0);
}

void land(const Copy &c) { memcpy(c.to, c.from, c.bytes); }

/* One of the copies that are under way to this barrier; false if there is none. */
bool land_one(uint64_t *b)
{
    std::vector<Copy> &copies = self().block->copies;
    const auto ours =
        std::partition(copies.begin(), copies.end(), [&](const Copy &c) { return c.barrier != b; });
    if (ours == copies.end())
        return false;
    std::swap(*(ours + random_below((size_t)(copies.end() - ours))), copies.back());
    const Copy c = copies.back();
    copies.pop_back();
    land(c);
    count("copy_bulk", b, -(int64_t)c.bytes, 0);
    return true;
}

void check_copy(const char *call, const void *shared, const void *global, uint32_t bytes)
{
    shared_range(call, shared, bytes, 16);
    if ((uintptr_t)global % 16)
        misuse("%s: the source is not aligned to 16", call);
    if (!is_device_memory(global, bytes))
        misuse("%s: %u bytes from %p are not device memory", call, bytes, global);
}

} // namespace

std::string describe_barrier(const void *mbarrier)
{
    Mbarrier m;
    memcpy(&m, mbarrier, sizeof m);
    char line[100];
    snprintf(line, sizeof line, "phase %d lacks %d arrivals and %d bytes", (int)m.phase,
             (int)m.pending, m.bytes());
    return line;
}

void wait_for_copies(size_t groups_left)
{
    auto &groups = self().copy_groups;
    for (; groups.size() > groups_left; groups.pop_front())
        for (const Copy &c : groups.front())
            land(c);
}

} // namespace cuda_model

using namespace cuda_model;

void copy_async(void *shared, const void *global)
{
    check_copy("copy_async", shared, global, 16);
    const Copy c = {shared, global, 16, nullptr};
    if (!late())
        return land(c);
    memset(shared, memory_poison, 16);
    self().copies.push_back(c);
}

void copy_async_commit()
{
    self().copy_groups.push_back(std::move(self().copies));
    self().copies.clear();
}

void barrier_init(uint64_t *b, int arrivals)
{
    shared_range("barrier_init", b, 8, 8);
    if (arrivals < 1 || arrivals >= 1 << 20)
        misuse("barrier_init: %d arrivals, allowed are 1 to 2^20 - 1", arrivals);
    Mbarrier m = {};
    m.expected = m.pending = (unsigned)arrivals & 0xfffff;
    m.bytes_plus_2_20 = 1 << 20;
    m.valid = 1;
    memcpy(b, &m, sizeof m);
}

void barrier_arrive(uint64_t *b) { count("barrier_arrive", b, 0, 1); }
void barrier_arrive_expect(uint64_t *b, uint32_t bytes)
{
    count("barrier_arrive_expect", b, bytes, 1);
}

void barrier_wait(uint64_t *b, uint32_t parity)
{
    if (parity > 1)
        misuse("barrier_wait: the parity is %u", parity);
    while (load_barrier("barrier_wait", b).phase == parity)
        if (!land_one(b))
            wait_on(b, "barrier_wait");
}

void copy_bulk(void *shared, const void *global, uint32_t bytes, uint64_t *b)
{
    if (bytes == 0 || bytes % 16)
        misuse("copy_bulk: %u bytes, not a multiple of 16", bytes);
    check_copy("copy_bulk", shared, global, bytes);
    load_barrier("copy_bulk", b);
    self().block->copies.push_back({shared, global, bytes, b});
    if (!late()) {
        land_one(b);
        return;
    }
    memset(shared, memory_poison, bytes);
    wake(b, 0, (unsigned)self().block->threads.size(),
         0); /* who waits for it already sees it land */
}
