/* SPDX-License-Identifier: Apache-2.0 */
/* stacks.cc: a fiber's registers and stack, left and taken up again. */
#include "tests/cuda_model/threads.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__x86_64__) && defined(__ELF__) && !defined(CUDA_MODEL_UCONTEXT)
#define CUDA_MODEL_ASSEMBLY
#else
#include <ucontext.h> /* slower: a system call for each switch */
#endif

namespace cuda_model {

enum : size_t { stack_bytes = 256 << 10, guard_bytes = 4096 };

static std::vector<char *> spare_stacks;

void take_stack(Context &c)
{
    c.size = stack_bytes;
    if (!spare_stacks.empty()) {
        c.stack = spare_stacks.back();
        spare_stacks.pop_back();
        return;
    }
    void *map = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect(map, guard_bytes, PROT_NONE)) {
        perror("cuda_model: the stack of a thread");
        abort();
    }
    c.stack = (char *)map + guard_bytes;
}

void give_stack(Context &c) { spare_stacks.push_back((char *)const_cast<void *>(c.stack)); }

#ifdef CUDA_MODEL_ASSEMBLY

/* The registers that a function must keep (System V ABI) go to the stack, and the stack's pointer
 * to *from.
 */
asm(R"(
    .text
    .type cuda_model_switch, @function
cuda_model_switch:
    .cfi_startproc
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
    .cfi_endproc
    .size cuda_model_switch, . - cuda_model_switch
)");
extern "C" void cuda_model_switch(void **from, void *to);

static void change(Context &from, Context &to) { cuda_model_switch(&from.state, to.state); }

/* As if main had been called, by nobody, and had switched away in its first instruction. */
void prepare(Context &c, void (*main)())
{
    void **top = (void **)((char *)const_cast<void *>(c.stack) + stack_bytes);
    *--top = nullptr;
    *--top = (void *)main;
    for (int n = 0; n < 6; n++)
        *--top = nullptr;
    c.state = top;
}

void release(Context &) {}

#else

static void change(Context &from, Context &to)
{
    if (!from.state)
        from.state = new ucontext_t;
    swapcontext((ucontext_t *)from.state, (ucontext_t *)to.state);
}

void prepare(Context &c, void (*main)())
{
    ucontext_t *u = new ucontext_t;
    getcontext(u);
    u->uc_stack.ss_sp = const_cast<void *>(c.stack);
    u->uc_stack.ss_size = stack_bytes;
    u->uc_link = nullptr;
    makecontext(u, main, 0);
    c.state = u;
}

void release(Context &c) { delete (ucontext_t *)c.state; }

#endif

void switch_stack(Context &from, Context &to, bool for_ever)
{
#ifdef CUDA_MODEL_ASAN
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
    change(from, to);
#ifdef CUDA_MODEL_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
    (void)for_ever;
}

} // namespace cuda_model
