/* SPDX-License-Identifier: Apache-2.0 */
/* threads.cc: the scheduler. Each thread of a block is a fiber, a stack that is left where the
 * thread has to wait and taken up again when what it waits for is there. One fiber runs at a time,
 * so nothing here needs a lock, and a kernel can be stepped through in a debugger. */
#include "tests/cuda_model/threads.h"
#include "tests/cuda_model/cuda_model.h"

#include <algorithm>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_model {

std::string report;

namespace {

std::vector<Block> resident;
std::deque<Thread *> ready; /* in the order of their turns */
const std::function<void()> *thread_body;
Context scheduler;
Thread *current; /* null while the scheduler runs */
uint64_t random_state;
bool failed;
struct Misuse {}; /* thrown where a kernel goes wrong: `catch throw` in gdb stops there */

__attribute__((no_sanitize("address"))) void thread_main();

/* ---- Messages ----------------------------------------------------------------------------- */

std::string text(const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

std::string name(const Block &b)
{
    return text("block (%u,%u,%u)", b.index.x, b.index.y, b.index.z);
}

void fail(const std::string &what)
{
    failed = true;
    report = what;
    if (!cuda_model_settings.quiet)
        fprintf(stderr, "cuda_model: %s\n", what.c_str());
}

std::string describe(const Thread &t)
{
    const Block &b = *t.block;
    for (const Barrier &barrier : b.barriers)
        if (t.waits_on == &barrier)
            return text("%s, barrier %d with %u of %u threads", t.waits_for,
                        (int)(&barrier - b.barriers), barrier.arrived, barrier.expected);
    const uintptr_t at = (uintptr_t)t.waits_on - (uintptr_t)b.shared;
    if (at < b.shared_bytes)
        return text("%s, shared memory + %d: ", t.waits_for, (int)at) +
               describe_barrier(t.waits_on);
    return t.waits_for;
}

/* A line for each run of threads of a block that wait for the same. */
std::string waiting_threads(size_t most)
{
    std::string all;
    size_t lines = 0;
    for (const Block &b : resident)
        for (size_t first = 0, last; first < b.threads.size(); first = last + 1) {
            const Thread &t = b.threads[first];
            const auto waits_too = [&](const Thread &other) {
                return other.state == Thread::waiting && other.waits_on == t.waits_on &&
                       !strcmp(other.waits_for, t.waits_for);
            };
            for (last = first; last + 1 < b.threads.size() && waits_too(b.threads[last + 1]);)
                last++;
            const std::string to = last > first ? text("-%zu", last) : "";
            if (t.state == Thread::waiting && ++lines <= most)
                all += "\n  " + name(b) + text(": %zu%s in ", first, to.c_str()) + describe(t);
        }
    return lines > most ? all + text("\n  and %zu more", lines - most) : all;
}

/* ---- Blocks ------------------------------------------------------------------------------- */

void start(Block &b, const Grid &grid, uint64_t n)
{
    const dim3 &size = grid.threads;
    b.index = {(unsigned)(n % grid.blocks.x), (unsigned)(n / grid.blocks.x % grid.blocks.y),
               (unsigned)(n / grid.blocks.x / grid.blocks.y)};
    b.alive = (unsigned)b.threads.size();
    b.copies.clear();
    memset(b.barriers, 0, sizeof b.barriers);
    memset(b.shared, 0xff, b.shared_bytes);
    const auto form = [&](std::vector<Team> &teams, unsigned of) {
        teams.clear();
        for (unsigned first = 0; first < b.alive; first += of)
            teams.push_back({first, of, 0, first + of > b.alive ? first + of - b.alive : 0, {}});
    };
    form(b.warps, 32);
    form(b.warpgroups, 128);
    b.products.assign(b.warpgroups.size(), {});
    for (unsigned rank = 0; rank < b.alive; rank++) {
        Thread &t = b.threads[rank];
        t.block = &b;
        t.rank = rank;
        t.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
        t.state = Thread::ready;
        t.copies.clear();
        t.copy_groups.clear();
        prepare(t.context, thread_main);
        ready.push_back(&t);
    }
}

Thread &next_turn()
{
    if (cuda_model_settings.seed)
        std::swap(ready.front(), ready[random_below(ready.size())]);
    Thread &t = *ready.front();
    ready.pop_front();
    return t;
}

void become(Thread &t)
{
    current = &t;
    threadIdx = t.index;
    blockIdx = t.block->index;
}

/* From the scheduler: threads hand over to each other until none is ready or one has returned, and
 * that is the one which comes back. */
Thread &take_turn(Thread &t)
{
    become(t);
    switch_stack(scheduler, t.context, false);
    Thread &back = *current;
    current = nullptr;
    return back;
}

/* After a mistake a thread is taken up once more, to unwind its stack. */
void leave()
{
    Thread &from = *current;
    if (failed || ready.empty()) {
        switch_stack(from.context, scheduler, false);
    } else {
        Thread &to = next_turn();
        become(to);
        if (&to != &from)
            switch_stack(from.context, to.context, false);
    }
    if (failed)
        throw Misuse();
}

void complete(Barrier &b, Block &block)
{
    const unsigned yes = b.yes;
    b.arrived = b.yes = 0;
    wake(&b, 0, (unsigned)block.threads.size(), yes);
}

/* Barrier 0 waits for the threads that are left. */
void say_goodbye()
{
    Block &b = *current->block;
    for (Team *team : {&b.warps[current->rank / 32], &b.warpgroups[current->rank / 128]})
        if (team->gone++, team->arrived)
            misuse("returned while threads of its %s wait for it",
                   team->size == 32 ? "warp" : "warpgroup");
    b.alive--;
    if (b.barriers[0].arrived && b.barriers[0].arrived == b.alive)
        complete(b.barriers[0], b);
}

void thread_main()
{
#ifdef CUDA_MODEL_ASAN
    const void *stack; /* of whom this thread follows: the first one follows the scheduler */
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    if (!scheduler.stack) {
        scheduler.stack = stack;
        scheduler.size = size;
    }
#endif
    try {
        if (!failed) {
            (*thread_body)();
            say_goodbye();
        }
    } catch (const Misuse &) {
    }
    current->state = Thread::returned;
    switch_stack(current->context, scheduler, true);
}

/* PTX ISA, wgmma and cp.async.bulk: what is in flight must be waited for before the thread exits.
 */
void check_nothing_in_flight(const Block &b)
{
    for (const Products &p : b.products) {
        bool any = !p.open.empty();
        for (const std::vector<Product> &group : p.groups)
            any = any || !group.empty();
        if (any)
            return fail(name(b) + text(": warpgroup %d", (int)(&p - &b.products[0])) +
                        " returned before wgmma_wait for its products");
    }
    if (!b.copies.empty())
        fail(name(b) +
             text(": returned with %zu bulk copies that nobody waited for", b.copies.size()));
}

} // namespace

Thread &self() { return *current; }

void misuse(const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    fail(name(*current->block) + text(", thread %u: ", current->rank) + line);
    throw Misuse();
}

uint32_t random_below(size_t n) /* splitmix64 */
{
    uint64_t x = random_state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((x ^ x >> 31) % n);
}

bool run(const Grid &grid)
{
    const uint64_t blocks = (uint64_t)grid.blocks.x * grid.blocks.y * grid.blocks.z;
    const unsigned threads = grid.threads.x * grid.threads.y * grid.threads.z;
    failed = false;
    random_state = cuda_model_settings.seed; /* the same order in every launch: one replays alone */
    thread_body = &grid.thread;
    blockDim = grid.threads;
    gridDim = grid.blocks;
    resident.resize(
        (size_t)std::min<uint64_t>(blocks, std::max(1u, cuda_model_settings.resident_blocks)));
    for (Block &b : resident) {
        void *shared = nullptr;
        if (posix_memalign(&shared, 1024, grid.shared_bytes))
            abort();
        b.shared = (uint8_t *)shared;
        b.shared_bytes = grid.shared_bytes;
        b.threads.resize(threads);
        for (Thread &t : b.threads) {
            take_stack(t.context);
        }
    }
    uint64_t next = 0;
    for (Block &b : resident)
        start(b, grid, next++);
    while (!failed && !ready.empty()) {
        Thread &t = take_turn(next_turn());
        if (t.state != Thread::returned)
            continue;
        release(t.context);
        if (t.block->alive == 0) {
            check_nothing_in_flight(*t.block);
            if (next < blocks)
                start(*t.block, grid, next++);
        }
    }
    const std::string stuck = failed ? "" : waiting_threads(9);
    if (!stuck.empty())
        fail("no thread can go on:" + stuck);
    ready.clear();
    for (Block &b : resident) {
        for (Thread &t : b.threads) {
            if (t.state != Thread::returned) {
                take_turn(t);
                release(t.context);
            }
            give_stack(t.context);
        }
        free(b.shared);
    }
    resident.clear();
    return !failed;
}

/* ---- Waiting ------------------------------------------------------------------------------ */

namespace {
void mark(const void *thing, const char *call)
{
    current->state = Thread::waiting;
    current->waits_on = thing;
    current->waits_for = call;
}
} // namespace

void wait_on(const void *thing, const char *call)
{
    mark(thing, call);
    leave();
}

void wake(const void *thing, unsigned first, unsigned count, unsigned result)
{
    for (unsigned rank = first; rank < first + count; rank++) {
        Thread &t = current->block->threads[rank];
        if (t.state == Thread::waiting && t.waits_on == thing) {
            t.state = Thread::ready;
            t.result = result;
            ready.push_back(&t);
        }
    }
}

void give_way()
{
    ready.push_back(current);
    leave();
}

void together(std::vector<Team> &teams, const char *call, void *operand, Work work)
{
    Thread &t = *current;
    Team &team = teams[t.rank / teams[0].size];
    const char *kind = team.size == 32 ? "warp" : "warpgroup";
    if (team.gone)
        misuse("%s where %u threads of the %s have returned or never were", call, team.gone, kind);
    t.operand = operand;
    mark(&team, call);
    if (++team.arrived == team.size) {
        void *operands[128];
        for (unsigned n = 0; n < team.size; n++) {
            const Thread &other = t.block->threads[team.first + n];
            if (other.waits_for != call && strcmp(other.waits_for, call))
                misuse("%s while thread %u of its %s is in %s", call, other.rank, kind,
                       other.waits_for);
            operands[n] = other.operand;
        }
        work(operands);
        team.arrived = 0;
        wake(&team, team.first, team.size,
             0); /* itself too, so that turns stay in ascending order */
    }
    leave();
}

/* The values stand in the team until its next call together, which nobody can end before all have
 * read them. */
const Values &exchange(const char *call, unsigned mask, uint32_t mine)
{
    struct Operand {
        uint32_t mine;
        Values *all;
    };
    if (mask != ~0u)
        misuse("%s with mask %08x: the model knows full masks alone", call, mask);
    std::vector<Team> &warps = self().block->warps;
    Operand operand = {mine, &warps[self().rank / 32].values};
    together(warps, call, &operand, [](void *const *operands) {
        Values &all = *((Operand *)operands[0])->all;
        for (int n = 0; n < 32; n++)
            all.of[n] = ((Operand *)operands[n])->mine;
    });
    return *operand.all;
}

int lane() { return (int)(current->rank % 32); }

namespace {
unsigned meet(int id, const char *call, unsigned expected, bool reduces, bool yes, bool waits)
{
    Block &block = *current->block;
    Barrier &b = block.barriers[id];
    if (b.arrived && (b.reduces != reduces || (id && b.expected != expected)))
        misuse("%s(%d, %u) while others wait there for %u threads or in another kind of call", call,
               id, expected, b.expected);
    b.expected = expected;
    b.reduces = reduces;
    b.yes += yes;
    b.arrived++;
    if (waits)
        mark(&b, call);
    if (b.arrived == b.expected)
        complete(b, block);
    if (waits)
        leave();
    return current->result;
}

unsigned meet_named(int id, const char *call, int threads, bool reduces, bool yes, bool waits)
{
    const int all = (int)current->block->threads.size();
    if (id < 1 || id > 15 || threads < 32 || threads % 32 || threads > all)
        misuse("%s(%d, %d): ids are 1 to 15, threads a multiple of 32 up to %d", call, id, threads,
               all);
    return meet(id, call, (unsigned)threads, reduces, yes, waits);
}
} // namespace

int meet_block(const char *call, bool yes)
{
    return (int)meet(0, call, current->block->alive, strcmp(call, "__syncthreads") != 0, yes, true);
}

uint32_t shared_range(const char *call, const void *p, size_t bytes, size_t alignment)
{
    const Block &b = *current->block;
    const uintptr_t at = (uintptr_t)p - (uintptr_t)b.shared;
    if (at >= b.shared_bytes || bytes > b.shared_bytes - at)
        misuse("%s: %zu bytes at shared memory + %td of %zu", call, bytes, (ptrdiff_t)at,
               b.shared_bytes);
    if (at % alignment)
        misuse("%s: shared memory + %zu is not aligned to %zu", call, (size_t)at, alignment);
    return (uint32_t)at;
}

} // namespace cuda_model

using namespace cuda_model;

void named_sync(int id, int threads) { meet_named(id, "named_sync", threads, false, false, true); }
void named_arrive(int id, int threads)
{
    meet_named(id, "named_arrive", threads, false, false, false);
}
bool named_any(int id, int threads, bool yes)
{
    return meet_named(id, "named_any", threads, true, yes, true);
}

uint8_t *shared_memory() { return self().block->shared; }

void cuda_model_threads() { fprintf(stderr, "cuda_model:%s\n", waiting_threads(1000).c_str()); }
