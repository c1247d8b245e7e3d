//! The seccomp program of a child: what goes to the double, what goes to ptrace, and all else to the kernel.

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
    SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_TRACE, SECCOMP_RET_USER_NOTIF, sock_filter,
};

/// Numbers of the ioctls that the double answers or counts.
pub(crate) mod ioctl {
    pub(crate) const KVM_CREATE_VM: u32 = 0xae01;
    pub(crate) const KVM_CHECK_EXTENSION: u32 = 0xae03;
    pub(crate) const KVM_GET_SUPPORTED_CPUID: u32 = 0xc008_ae05;
    pub(crate) const KVM_SET_SREGS: u32 = 0x4138_ae84;
    pub(crate) const KVM_CREATE_VCPU: u32 = 0xae41;
    pub(crate) const KVM_MEMORY_ENCRYPT_OP: u32 = 0xc008_aeba;
    pub(crate) const KVM_MEMORY_ENCRYPT_REG_REGION: u32 = 0x8010_aebb;
    pub(crate) const KVM_MEMORY_ENCRYPT_UNREG_REGION: u32 = 0x8010_aebc;
    pub(crate) const SEV_ISSUE_CMD: u32 = 0xc010_5300;
    pub(crate) const KVM_CREATE_GUEST_MEMFD: u32 = 0xc040_aed4;
    pub(crate) const KVM_SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;
    pub(crate) const KVM_SET_MEMORY_ATTRIBUTES: u32 = 0x4020_aed2;

    /// Those that go to the double.
    pub(super) const NOTIFIED: [u32; 10] = [
        KVM_GET_SUPPORTED_CPUID,
        KVM_CREATE_GUEST_MEMFD,
        KVM_SET_USER_MEMORY_REGION2,
        KVM_SET_MEMORY_ATTRIBUTES,
        KVM_CHECK_EXTENSION,
        KVM_CREATE_VCPU,
        KVM_MEMORY_ENCRYPT_OP,
        KVM_MEMORY_ENCRYPT_REG_REGION,
        KVM_MEMORY_ENCRYPT_UNREG_REGION,
        SEV_ISSUE_CMD,
    ];
}

/// The program.
pub(crate) fn program() -> Vec<sock_filter> {
    let mut program = vec![
        load(ARCH),
        // Another architecture's numbers mean other calls: none of them is expected.
        skip_if(AUDIT_ARCH_X86_64, 1, 0),
        give(SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
    ];
    for call in [libc::SYS_openat, libc::SYS_open, libc::SYS_close] {
        program.push(skip_if(number(call), 0, 1));
        program.push(give(SECCOMP_RET_USER_NOTIF));
    }
    // Only where RLIMIT_MEMLOCK is set, which the double counts against.
    program.extend([
        skip_if(number(libc::SYS_prlimit64), 0, 6),
        load(argument(1)),
        skip_if(libc::RLIMIT_MEMLOCK, 0, 3),
        load(argument(2)),
        skip_if(0, 1, 0),
        give(SECCOMP_RET_USER_NOTIF),
        give(SECCOMP_RET_ALLOW),
    ]);
    program.push(skip_if(number(libc::SYS_ioctl), 1, 0));
    program.push(give(SECCOMP_RET_ALLOW));
    program.push(load(argument(1)));
    for command in ioctl::NOTIFIED {
        program.push(skip_if(command, 0, 1));
        program.push(give(SECCOMP_RET_USER_NOTIF));
    }
    // A thread that waits for a notification's answer can be interrupted by a signal, as vCPU threads are by their VMM's
    // kicks; one that ptrace holds cannot.
    program.extend([
        skip_if(ioctl::KVM_SET_SREGS, 0, 1),
        give(SECCOMP_RET_TRACE),
        skip_if(ioctl::KVM_CREATE_VM, 1, 0),
        give(SECCOMP_RET_ALLOW),
        load(argument(2)),
        skip_if(0, 0, 1),
        give(SECCOMP_RET_ALLOW),
        give(SECCOMP_RET_TRACE),
    ]);
    program
}

fn number(call: libc::c_long) -> u32 {
    // System call numbers are small and positive.
    u32::try_from(call).unwrap_or(u32::MAX)
}

fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn give(action: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, action)
}

fn skip_if(value: u32, equal: u8, other: u8) -> sock_filter {
    sock_filter {
        jt: equal,
        jf: other,
        ..statement(BPF_JMP | BPF_JEQ | BPF_K, value)
    }
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Lower half of an argument in `struct seccomp_data`.
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// `seccomp_data.nr`.
const NUMBER: u32 = 0;
/// `seccomp_data.arch`.
const ARCH: u32 = 4;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
