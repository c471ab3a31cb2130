/* SPDX-License-Identifier: Apache-2.0 */
/* boot.S: a ROM for an x86-64 machine: from the reset vector to monitor_main, and from there into the
   program and back at every system call and fault. The ROM is the whole machine's software: no BIOS, no
   disk. */

#define CR0_PE (1 << 0)          /* protected mode */
#define CR0_MP (1 << 1)          /* without EM, as SSE wants it */
#define CR0_NE (1 << 5)
#define CR0_PG (1 << 31)         /* paging */
#define CR4_PAE (1 << 5)
#define CR4_OSFXSR (1 << 9)      /* SSE */
#define CR4_OSXMMEXCPT (1 << 10)
#define CR4_OSXSAVE (1 << 18)    /* xsetbv, and the bit by which programs see that AVX may be used */
#define MSR_EFER 0xC0000080
#define EFER_SCE (1 << 0)        /* the syscall instruction */
#define EFER_LME (1 << 8)        /* long mode */
#define CPUID_XSAVE 0xD
#define XCR0_WANTED 0xE7         /* x87, SSE, AVX, masks, both halves of AVX-512 */
#define PAGE_PRESENT 1
#define PAGE_WRITABLE 2
#define PAGE_2M 0x80
#define RESET_PAGE 0xFFFF0000   /* the last 64 KiB below 4 GiB, where CS points after reset */
#define CODE32 0x08
#define CODE64 0x10
#define DATA 0x18

    .section .reset, "ax"
    .code16
reset_page:
real_mode:
    lgdtl %cs:gdt_pointer - reset_page
    mov $CR0_PE, %eax            /* and with it the caches on */
    mov %eax, %cr0
    ljmpl $CODE32, $RESET_PAGE + (protected_mode - reset_page)
    .code32
protected_mode:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $rom, %esi               /* everything is linked for RAM: the ROM copies itself there */
    mov $image, %edi
    mov $rom_size, %ecx
    rep movsb
    mov $bss, %edi
    mov $bss_size, %ecx
    xor %eax, %eax
    rep stosb
    mov $enable_long_mode, %eax
    jmp *%eax
    .balign 8
gdt:
    .quad 0
    .quad 0x00CF9B000000FFFF     /* CODE32 */
    .quad 0x00AF9B000000FFFF     /* CODE64; syscall takes DATA from the entry behind it */
    .quad 0x00CF93000000FFFF     /* DATA */
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long RESET_PAGE + (gdt - reset_page)
    .org 0xFFF0
    .code16
    jmp real_mode
    .org 0x10000

    .text
    .code32
enable_long_mode:
    movl $gdt, gdt_pointer + 2   /* the copy in RAM: the ROM is not mapped below */
    lgdt gdt_pointer
    movl $page_directory + (PAGE_PRESENT | PAGE_WRITABLE), page_pointers
    movl $page_pointers + (PAGE_PRESENT | PAGE_WRITABLE), page_root
    xor %ecx, %ecx
1:  mov %ecx, %eax               /* the first GiB, every address onto itself */
    shl $21, %eax
    or $(PAGE_PRESENT | PAGE_WRITABLE | PAGE_2M), %eax
    mov %eax, page_directory(, %ecx, 8)
    inc %ecx
    cmp $512, %ecx
    jne 1b
    mov $page_root, %eax
    mov %eax, %cr3
    mov $(CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE), %eax
    mov %eax, %cr4
    mov $MSR_EFER, %ecx
    xor %edx, %edx
    mov $(EFER_LME | EFER_SCE), %eax
    wrmsr
    mov $(CR0_PG | CR0_NE | CR0_MP | CR0_PE), %eax
    mov %eax, %cr0
    ljmp $CODE64, $long_mode
    .code64
long_mode:
    fninit
    mov $CPUID_XSAVE, %eax
    xor %ecx, %ecx
    cpuid
    and $XCR0_WANTED, %eax       /* what this model has of it */
    xor %edx, %edx
    xor %ecx, %ecx
    xsetbv
    mov $monitor_stack_top, %esp
    jmp monitor_main

    .globl enter_program         /* void enter_program(entry, stack) */
enter_program:
    mov %rsi, %rsp
    xor %edx, %edx               /* the ABI's "no function to call at exit" */
    xor %ebp, %ebp
    jmp *%rdi

    .globl system_call_entry     /* rcx: where to return to; rsp: left alone, it has a red zone */
system_call_entry:
    mov %rsp, program_stack
    mov $monitor_stack_top, %esp
    push %rcx
    push %r9                     /* struct call, backwards */
    push %r8
    push %r10
    push %rdx
    push %rsi
    push %rdi
    push %rax
    mov %rsp, %rdi
    call system_call
    add $8, %rsp
    pop %rdi
    pop %rsi
    pop %rdx
    pop %r10
    pop %r8
    pop %r9
    pop %rcx
    mov program_stack, %rsp
    jmp *%rcx

    .globl fault_entries         /* 32 entries of 16 bytes: error code or 0, vector, then the common part */
    .balign 16
fault_entries:
    .set vector, 0
    .rept 32
    .balign 16
    .if !((0x60227D00 >> vector) & 1) /* 8, 10 to 14, 17, 21, 29 and 30 bring an error code */
    push $0
    .endif
    push $vector
    jmp fault_common
    .set vector, vector + 1
    .endr
fault_common:
    mov %rsp, %rdi
    and $-16, %rsp
    call fault

    .section .payload, "a"
    .globl program_start, arguments_start, arguments_end
    .balign 4096
program_start:
    .incbin "program"
arguments_start:                 /* each ends with a zero byte */
    .incbin "arguments"
arguments_end:

    .bss
    .globl page_directory
    .balign 4096
page_root:
    .skip 4096
page_pointers:
    .skip 4096
page_directory:
    .skip 4096
    .skip 65536
monitor_stack_top:
program_stack:
    .skip 8
