//! A guest that knows hot-plug: it polls the registers of its slots, drives a disk that is put into one (without
//! interrupts), prints the first eight bytes of its first sector, and lets go of what it is asked for. Slot n is device
//! n + 1: it has no other.
#![allow(
    unsafe_code,
    reason = "the guest's code is assembled into this program"
)]

use casemate::vmm::layout::HOTPLUG;

/// Prints a disk's first bytes, `n` for anything else that comes, `g` when what it let go of is gone.
pub fn code() -> &'static [u8] {
    unsafe extern "C" {
        static plugged_code: u8;
        static plugged_code_end: u8;
    }
    // SAFETY: both symbols are defined below, in this order and in one section; what is between them is never written.
    unsafe {
        let start = &raw const plugged_code;
        let length = (&raw const plugged_code_end).offset_from_unsigned(start);
        std::slice::from_raw_parts(start, length)
    }
}

// r12: slot; r13: the function's registers; r14: rings and buffers; r15: slots that something happened to.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.plugged, "a", @progbits
    .globl plugged_code
    .globl plugged_code_end
plugged_code:
    mov     rsp, 0x2f00000
    mov     r14d, 0x2000000
.Lp_loop:
    mov     edx, {up}
    in      eax, dx
    mov     r15d, eax
.Lp_up:
    test    r15d, r15d
    jz      .Lp_down
    bsf     r12d, r15d
    btr     r15d, r12d
    call    .Lp_came
    jmp     .Lp_up
.Lp_down:
    mov     edx, {down}
    in      eax, dx
    test    eax, eax
    jz      .Lp_loop
    bsf     r12d, eax
    mov     edx, {eject}
    out     dx, eax
    xor     ecx, ecx
    call    .Lp_select
    in      eax, dx
    cmp     eax, -1
    mov     al, 'g'
    je      1f
    mov     al, 'G'
1:  call    .Lp_line
    jmp     .Lp_loop

    // ecx: a register of the slot's configuration; edx: the data port
.Lp_select:
    mov     eax, r12d
    inc     eax
    shl     eax, 11
    or      eax, ecx
    or      eax, 0x80000000
    mov     edx, 0xcf8
    out     dx, eax
    mov     edx, 0xcfc
    ret

    // al and a new line
.Lp_line:
    mov     edx, 0x3f8
    out     dx, al
    mov     al, 10
    out     dx, al
    ret

.Lp_came:
    xor     ecx, ecx
    call    .Lp_select
    in      eax, dx
    mov     r10d, eax
    mov     ecx, 0x10
    call    .Lp_select
    mov     eax, r12d
    shl     eax, 15
    add     eax, 0xd8000000
    mov     r13d, eax
    out     dx, eax
    mov     ecx, 4
    call    .Lp_select
    mov     ax, 6
    out     dx, ax
    cmp     r10d, 0x10421af4
    mov     al, 'n'
    jne     .Lp_line

    mov     byte ptr [r13 + 0x14], 0
1:  cmp     byte ptr [r13 + 0x14], 0
    jne     1b
    mov     byte ptr [r13 + 0x14], 3
    mov     dword ptr [r13 + 8], 1
    mov     dword ptr [r13 + 0xc], 1
    mov     byte ptr [r13 + 0x14], 11
    mov     word ptr [r13 + 0x16], 0
    mov     word ptr [r13 + 0x18], 16
    mov     word ptr [r13 + 0x1a], -1
    mov     [r13 + 0x20], r14
    lea     rax, [r14 + 0x1000]
    mov     [r13 + 0x28], rax
    mov     dword ptr [rax], 0
    lea     rax, [r14 + 0x2000]
    mov     [r13 + 0x30], rax
    mov     dword ptr [rax], 0
    mov     word ptr [r13 + 0x1c], 1
    mov     byte ptr [r13 + 0x14], 15
    // Read sector 0: header, data, status.
    lea     rax, [r14 + 0x3000]
    mov     qword ptr [rax], 0
    mov     qword ptr [rax + 8], 0
    mov     [r14], rax
    mov     dword ptr [r14 + 8], 16
    mov     dword ptr [r14 + 12], 0x10001
    add     rax, 0x100
    mov     [r14 + 16], rax
    mov     dword ptr [r14 + 24], 512
    mov     dword ptr [r14 + 28], 0x20003
    add     rax, 0x300
    mov     [r14 + 32], rax
    mov     dword ptr [r14 + 40], 1
    mov     dword ptr [r14 + 44], 2
    mov     word ptr [r14 + 0x1004], 0
    mov     word ptr [r14 + 0x1002], 1
    mov     word ptr [r13 + 0x3000], 0
2:  pause
    cmp     word ptr [r14 + 0x2002], 1
    jne     2b
    xor     ecx, ecx
    mov     edx, 0x3f8
3:  mov     al, [r14 + rcx + 0x3100]
    out     dx, al
    inc     ecx
    cmp     ecx, 8
    jb      3b
    mov     al, 10
    out     dx, al
    ret
plugged_code_end:
    .popsection
"#,
    up = const HOTPLUG,
    down = const HOTPLUG + 4,
    eject = const HOTPLUG + 8,
);
