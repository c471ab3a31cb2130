/* SPDX-License-Identifier: Apache-2.0 */
/* threads.h: what the files of the model share: a grid that runs, its blocks and threads, how they
 * wait. */
#ifndef CUDA_MODEL_THREADS_H
#define CUDA_MODEL_THREADS_H

#include <cuda_model.h>
#include <cuda_model_hopper.h>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_MODEL_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define CUDA_MODEL_ASAN
#endif
#ifdef CUDA_MODEL_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_model {

/* Registers and stack of something that can be left and taken up again. */
struct Context {
    void *state = nullptr;       /* the stack pointer, or a ucontext_t */
    const void *stack = nullptr; /* its lowest byte, */
    size_t size = 0;             /* both for the address sanitizer, */
    void *fake_stack = nullptr;  /* as is this */
};

struct Copy {
    void *to;
    const void *from;
    uint32_t bytes;
    uint64_t *barrier;
};

struct Block;

struct Thread {
    Block *block;
    unsigned rank; /* in the block; x runs fastest */
    uint3 index;
    Context context;
    enum { ready, waiting, returned } state;
    const char *waits_for;    /* the name of the call, */
    const void *waits_on;     /* and the thing that will wake it */
    void *operand;            /* what it brings to a collective */
    unsigned result;          /* what it was woken with */
    std::vector<Copy> copies; /* cp.async since the last commit, in late modes */
    std::deque<std::vector<Copy>> copy_groups;
};

/* The threads of a warp or a warpgroup, who make some calls together. */
struct Team {
    unsigned first, size, arrived, gone;
    Values values; /* of a warp's last exchange */
};

/* PTX ISA, barrier.cta: 16 of them, and __syncthreads is number 0. */
struct Barrier {
    unsigned expected, arrived, yes;
    bool reduces;
};

/* Accumulators of a warpgroup while products on them are in flight: their values, row by row. */
struct Accumulators {
    void *registers[128];
    int columns, products;
    std::vector<uint32_t> values;
};

struct Product {
    Element element;
    bool add;
    uint64_t a_descriptor, b_descriptor;
    bool a_in_registers, done;
    std::vector<float> a, b; /* [64][k] and [k][columns]; b is empty until it is read */
    std::shared_ptr<Accumulators> d;
};

struct Products {
    std::vector<std::shared_ptr<Accumulators>> busy;
    std::vector<Product> open; /* since the last commit */
    std::deque<std::vector<Product>> groups;
};

struct Block {
    uint3 index;
    uint8_t *shared;
    size_t shared_bytes;
    unsigned alive;
    std::vector<Thread> threads;
    std::vector<Team> warps, warpgroups;
    std::vector<Products> products; /* of each warpgroup */
    std::vector<Copy> copies;       /* cp.async.bulk that have not landed */
    Barrier barriers[16];
};

/* ---- threads.cc --------------------------------------------------------------------------- */

struct Grid {
    dim3 blocks, threads;
    size_t shared_bytes;
    std::function<void()> thread;
};
/* False when it went wrong: `report` says how. */
bool run(const Grid &grid);
extern std::string report;

Thread &self();
/* Ends the launch. */
[[noreturn]] void misuse(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint32_t random_below(size_t n);

void wait_on(const void *thing, const char *call);
void wake(const void *thing, unsigned first, unsigned count, unsigned result);

/* Returns when every thread of the team has called it. The last one does the work for all:
 * operands[n] is what thread n of the team brought. */
typedef void (*Work)(void *const *operands);
void together(std::vector<Team> &teams, const char *call, void *operand, Work work);

/* Where p points in shared memory; misuse if `bytes` from there are not in it or p is not aligned.
 */
uint32_t shared_range(const char *call, const void *p, size_t bytes, size_t alignment);

inline bool late() { return cuda_model_settings.late != 0; }

/* ---- stacks.cc ---------------------------------------------------------------------------- */

void take_stack(Context &c); /* where a thread runs */
void give_stack(Context &c);
void prepare(Context &c, void (*main)()); /* switching to c enters main */
void release(Context &c);
void switch_stack(Context &from, Context &to, bool for_ever);

/* ---- copies.cc ---------------------------------------------------------------------------- */

std::string describe_barrier(const void *mbarrier); /* for the report of a deadlock */

/* ---- model.cc ----------------------------------------------------------------------------- */

bool is_device_memory(const void *p, size_t bytes);

} // namespace cuda_model

#endif
