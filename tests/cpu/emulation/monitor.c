/* SPDX-License-Identifier: Apache-2.0 */
/* monitor.c: loads one static Linux program and answers the system calls that glibc's start,
   malloc, stdio and exit make. Program and monitor both run in ring 0, on one CPU without
   interrupts. */
#include <elf.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

enum { MIB = 1 << 20, PAGE = 4096, LARGE_PAGE = 2 * MIB };
/* 0 to 4 MiB is not mapped; the program and its heap; mmap; the stack; at 192 MiB the monitor
 * (link.ld). */
enum { HEAP_END = 96 * MIB, MMAP_END = 180 * MIB, STACK_END = 184 * MIB, STACK_TOP = 192 * MIB };
enum {
    STDOUT = 0x3F8,
    STDERR = 0x2F8,
    STATUS = 0x3E8
}; /* COM1, COM2, COM3: run.sh gives each a file */
enum { UART_LINE_CONTROL = 3, UART_8N1 = 0x03, UART_DIVISOR = 0x80 };
enum { UART_LINE_STATUS = 5, UART_MAY_SEND = 0x20, UART_ALL_SENT = 0x40 };
enum { SHUTDOWN_PORT = 0x8900 }; /* Bochs: the word "Shutdown" ends the emulator */
enum { CODE64 = 0x10, GATE_INTERRUPT = 0x8E00, FAULTS = 32, RFLAGS_TF_IF_DF = 0x700 };
enum { ARCH_SET_FS = 0x1002, EXIT_FAULT = 139, EXIT_NOT_LOADED = 126, EXIT_SIGNAL = 128 };
enum { ARGUMENTS = 64, AUXILIARIES = 8 };
#define MSR_STAR    0xC0000081u
#define MSR_LSTAR   0xC0000082u
#define MSR_FMASK   0xC0000084u
#define MSR_FS_BASE 0xC0000100u

struct call {
    uint64_t number, a, b, c, d, e, f;
};
struct fault {
    uint64_t vector, error, rip;
};
struct gate {
    uint16_t low, selector, type, middle;
    uint32_t high, zero;
};
struct __attribute__((packed)) gates_pointer {
    uint16_t limit;
    const struct gate *base;
};

extern unsigned char program_start[], fault_entries[], system_call_entry[];
extern char arguments_start[], arguments_end[];
extern uint64_t page_directory[];
_Noreturn void enter_program(uint64_t entry, uint64_t *stack);

static struct gate gates[FAULTS];
static uint64_t heap_start, heap, mapped = HEAP_END;

static void out(unsigned port, unsigned char byte)
{
    __asm__ volatile("outb %0, %w1" : : "a"(byte), "Nd"(port));
}

static unsigned char in(unsigned port)
{
    unsigned char byte;
    __asm__ volatile("inb %w1, %0" : "=a"(byte) : "Nd"(port));
    return byte;
}

static void write_msr(uint32_t msr, uint64_t value)
{
    __asm__ volatile("wrmsr" : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
}

/* gcc calls these two wherever it likes. */
void *memcpy(void *to, const void *from, size_t bytes)
{
    void *end = to;
    __asm__ volatile("rep movsb" : "+D"(end), "+S"(from), "+c"(bytes) : : "memory");
    return to;
}

void *memset(void *to, int byte, size_t bytes)
{
    void *end = to;
    __asm__ volatile("rep stosb" : "+D"(end), "+c"(bytes) : "a"(byte) : "memory");
    return to;
}

static void send(unsigned port, const char *text, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        while (!(in(port + UART_LINE_STATUS) & UART_MAY_SEND))
            ;
        out(port, (unsigned char)text[i]);
    }
}

static void say(const char *text)
{
    uint64_t length = 0;
    while (text[length])
        length++;
    send(STDERR, text, length);
}

static void say_number(uint64_t number, unsigned base)
{
    char digits[20];
    unsigned at = sizeof digits;
    do
        digits[--at] = "0123456789abcdef"[number % base];
    while (number /= base);
    send(STDERR, digits + at, sizeof digits - at);
}

static _Noreturn void leave(uint64_t status)
{
    const char byte = (char)status;
    send(STATUS, &byte, 1);
    for (unsigned i = 0; i < 3; i++)
        while (!(in((unsigned[]){STDOUT, STDERR, STATUS}[i] + UART_LINE_STATUS) & UART_ALL_SENT))
            ;
    for (const char *word = "Shutdown"; *word; word++)
        out(SHUTDOWN_PORT, (unsigned char)*word);
    for (;;)
        __asm__ volatile("hlt");
}

_Noreturn void fault(const struct fault *f)
{
    uint64_t address;
    __asm__("mov %%cr2, %0" : "=r"(address));
    say("fault: vector ");
    say_number(f->vector, 10);
    say(f->vector == 6 ? " (invalid opcode)" : f->vector == 14 ? " (page fault)" : "");
    say(" at 0x");
    say_number(f->rip, 16);
    say(", error code ");
    say_number(f->error, 10);
    say(", last address 0x");
    say_number(address, 16);
    say("\n");
    leave(EXIT_FAULT);
}

static int64_t write_to(uint64_t file, const char *text, uint64_t bytes)
{
    if (file != 1 && file != 2)
        return -EBADF;
    send(file == 1 ? STDOUT : STDERR, text, bytes);
    return (int64_t)bytes;
}

static int64_t write_vector(uint64_t file, const struct iovec *part, uint64_t parts)
{
    int64_t sum = 0;
    for (uint64_t i = 0; i < parts; i++) {
        const int64_t written = write_to(file, part[i].iov_base, part[i].iov_len);
        if (written < 0)
            return written;
        sum += written;
    }
    return sum;
}

/* Anonymous memory only; what was mapped last can be given back, the rest stays. */
static int64_t map(uint64_t bytes, int64_t file)
{
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    if (file >= 0 || bytes > MMAP_END - mapped)
        return -ENOMEM;
    const uint64_t address = mapped;
    mapped += bytes;
    memset((void *)address, 0, bytes);
    return (int64_t)address;
}

static int64_t unmap(uint64_t address, uint64_t bytes)
{
    if (address + (bytes + PAGE - 1) / PAGE * PAGE == mapped)
        mapped = address;
    return 0;
}

static int64_t move_heap_end(uint64_t end)
{
    if (end >= heap_start && end <= HEAP_END) {
        if (end > heap)
            memset((void *)heap, 0, end - heap);
        heap = end;
    }
    return (int64_t)heap;
}

static int64_t describe_terminal(struct stat *file)
{
    *file = (struct stat){.st_mode = S_IFCHR | S_IRUSR | S_IWUSR, .st_blksize = PAGE};
    return 0;
}

static int64_t not_so_random(unsigned char *bytes, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        bytes[i] = (unsigned char)(i * 37 + 11);
    return (int64_t)count;
}

int64_t system_call(const struct call *call)
{
    switch (call->number) {
    case SYS_write: return write_to(call->a, (const char *)call->b, call->c);
    case SYS_writev: return write_vector(call->a, (const struct iovec *)call->b, call->c);
    case SYS_mmap: return map(call->b, (int32_t)call->e);
    case SYS_munmap: return unmap(call->a, call->b);
    case SYS_brk: return move_heap_end(call->a);
    case SYS_newfstatat: return describe_terminal((struct stat *)call->c);
    case SYS_getrandom: return not_so_random((unsigned char *)call->a, call->b);
    case SYS_tgkill: leave(EXIT_SIGNAL + call->c); /* abort */
    case SYS_exit:
    case SYS_exit_group: leave(call->a);
    case SYS_arch_prctl:
        if (call->a != ARCH_SET_FS)
            return -EINVAL;
        write_msr(MSR_FS_BASE, call->b);
        return 0;
    case SYS_getpid:
    case SYS_gettid:
    case SYS_set_tid_address: return 1;
    case SYS_mprotect:
    case SYS_madvise:
    case SYS_rt_sigaction:
    case SYS_rt_sigprocmask:
    case SYS_set_robust_list: return 0;
    case SYS_ioctl: return -ENOTTY;
    case SYS_readlink:
    case SYS_readlinkat: return -ENOENT;
    case SYS_mremap:
    case SYS_prlimit64:
    case SYS_rseq: return -ENOSYS; /* glibc does without */
    }
    say("monitor: no answer to system call ");
    say_number(call->number, 10);
    say("\n");
    return -ENOSYS;
}

static void catch_faults(void)
{
    for (unsigned i = 0; i < FAULTS; i++) {
        const uint64_t entry = (uint64_t)fault_entries + 16 * i;
        gates[i] = (struct gate){.low = (uint16_t)entry,
                                 .selector = CODE64,
                                 .type = GATE_INTERRUPT,
                                 .middle = (uint16_t)(entry >> 16)};
    }
    const struct gates_pointer pointer = {sizeof gates - 1, gates};
    __asm__ volatile("lidt %0" : : "m"(pointer));
    page_directory[0] = 0; /* so that null pointers fault */
    page_directory[1] = 0;
    page_directory[STACK_END / LARGE_PAGE - 1] = 0; /* and a stack that overflows stops at once */
}

/* Where the program header table lies once the program is loaded. */
static uint64_t load(const Elf64_Ehdr *elf)
{
    const Elf64_Phdr *part = (const Elf64_Phdr *)(program_start + elf->e_phoff);
    uint64_t headers = 0;
    for (unsigned i = 0; i < elf->e_phnum; i++) {
        if (elf->e_type != ET_EXEC || part[i].p_type == PT_INTERP) {
            say("monitor: only programs linked with -static -no-pie\n");
            leave(EXIT_NOT_LOADED);
        }
        if (part[i].p_type != PT_LOAD)
            continue;
        memcpy((void *)part[i].p_vaddr, program_start + part[i].p_offset, part[i].p_filesz);
        memset((void *)(part[i].p_vaddr + part[i].p_filesz), 0, part[i].p_memsz - part[i].p_filesz);
        if (part[i].p_offset == 0)
            headers = part[i].p_vaddr + elf->e_phoff;
        heap_start = (part[i].p_vaddr + part[i].p_memsz + PAGE - 1) / PAGE * PAGE;
    }
    heap = heap_start;
    return headers;
}

_Noreturn void monitor_main(void)
{
    for (unsigned i = 0; i < 3; i++) {
        const unsigned port = (unsigned[]){STDOUT, STDERR, STATUS}[i];
        out(port + UART_LINE_CONTROL, UART_DIVISOR);
        out(port, 1);
        out(port + 1, 0);
        out(port + UART_LINE_CONTROL, UART_8N1);
    }
    catch_faults();
    write_msr(MSR_STAR, (uint64_t)CODE64 << 32);
    write_msr(MSR_LSTAR, (uint64_t)system_call_entry);
    write_msr(MSR_FMASK, RFLAGS_TF_IF_DF);

    const Elf64_Ehdr *elf = (const Elf64_Ehdr *)program_start;
    const uint64_t headers = load(elf);

    /* What the ABI puts on a new stack: argc, argv, 0, no environment, 0, pairs of auxiliary
     * values. */
    uint64_t *stack = (uint64_t *)(STACK_TOP - LARGE_PAGE), count = 0, words = 1;
    for (char *text = arguments_start; text < arguments_end && count < ARGUMENTS; count++) {
        stack[words++] = (uint64_t)text;
        while (*text++)
            ;
    }
    stack[0] = count;
    stack[words++] = 0;
    stack[words++] = 0;
    const uint64_t auxiliary[AUXILIARIES][2] = {{AT_PHDR, headers},
                                                {AT_PHENT, sizeof(Elf64_Phdr)},
                                                {AT_PHNUM, elf->e_phnum},
                                                {AT_PAGESZ, PAGE},
                                                {AT_ENTRY, elf->e_entry},
                                                {AT_SECURE, 0},
                                                {AT_RANDOM, (uint64_t)program_start},
                                                {AT_NULL, 0}};
    memcpy(stack + words, auxiliary, sizeof auxiliary);
    enter_program(elf->e_entry, stack);
}
