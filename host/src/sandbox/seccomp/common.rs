//! What every thread of a static glibc Rust program needs, whatever its role.

use super::rule::{Cond, Rule, permit};

/// Memory, locks, clocks, and an orderly or disorderly end.
pub(super) const BASE: &[Rule] = &[
    permit!(SYS_brk, "malloc: main arena"),
    permit!(
        SYS_mmap,
        [NOT_EXECUTABLE_2],
        "malloc, mappings of memory handed in; never executable"
    ),
    permit!(SYS_munmap, "malloc, unmapping"),
    permit!(SYS_mremap, "realloc of large blocks"),
    permit!(
        SYS_mprotect,
        [NOT_EXECUTABLE_2],
        "malloc: arenas of threads grow; never executable"
    ),
    permit!(
        SYS_madvise,
        [Cond::Among(2, &[DONTNEED, FREE, DONTDUMP])],
        "malloc trims, ended threads give their stacks back, secrets stay out of dumps"
    ),
    permit!(
        SYS_futex,
        // WAIT, WAKE, WAIT_BITSET, WAKE_BITSET; private or not, either clock
        [Cond::Masked(1, !0x180 & 0xffff_ffff, &[0, 1, 9, 10])],
        "std's locks, channels, parking; glibc's join"
    ),
    permit!(SYS_sched_yield, "std's spinning before it parks"),
    permit!(
        SYS_clock_gettime,
        "clocks where the vDSO has no fast one (nested and emulated machines)"
    ),
    permit!(SYS_gettimeofday, "the same"),
    permit!(SYS_clock_nanosleep, "sleep"),
    permit!(SYS_nanosleep, "sleep"),
    permit!(
        SYS_restart_syscall,
        "the kernel resumes an interrupted sleep by it"
    ),
    permit!(SYS_getrandom, "seeds of hash maps, keys, nonces"),
    permit!(SYS_gettid, "glibc: recursive locks; panic messages"),
    permit!(SYS_read, "descriptors handed in; std's and our eventfds"),
    permit!(SYS_write, "eventfds, the log, a panic's last words"),
    permit!(SYS_close, "descriptors end"),
    permit!(
        SYS_fcntl,
        [Cond::Among(1, &[F_GETFD])],
        "std checks, the report counts descriptors"
    ),
    permit!(SYS_rt_sigreturn, "return from a signal handler"),
    permit!(
        SYS_rt_sigprocmask,
        "glibc: around thread start and end, abort"
    ),
    permit!(
        SYS_sigaltstack,
        "std takes the overflow stack of an ending thread away"
    ),
    permit!(
        SYS_tgkill,
        [Cond::OwnPid(0)],
        "kick a vCPU thread, abort; threads of this process only"
    ),
    permit!(
        SYS_prctl,
        [Cond::Among(0, &[PR_GET_SECCOMP, PR_GET_DUMPABLE])],
        "the sandbox report"
    ),
    permit!(SYS_exit, "a thread ends"),
    permit!(SYS_exit_group, "the process ends"),
];

/// Sizes of descriptors, as glibc asks for them; the empty path makes it a question about a descriptor.
pub(super) const STAT: &[Rule] = &[
    permit!(SYS_fstat, "size and kind of a descriptor"),
    permit!(
        SYS_newfstatat,
        [Cond::Among(3, &[AT_EMPTY_PATH])],
        "glibc 2.36's fstat"
    ),
    permit!(
        SYS_statx,
        [Cond::Among(2, &[AT_EMPTY_PATH])],
        "std's File::metadata"
    ),
    permit!(SYS_lseek, "size of a descriptor; holes and data of a memfd"),
];

/// Channels between our roles, and waiting on them.
pub(super) const CHANNEL: &[Rule] = &[
    permit!(SYS_recvmsg, "messages with descriptors from our own roles"),
    permit!(SYS_sendmsg, "messages to our own roles"),
    permit!(SYS_poll, "deadlines on channels"),
    permit!(SYS_ppoll, "the same, as std does it"),
];

/// A thread that starts after the filter (it inherits it). Flags exactly as glibc's pthread_create has them: same
/// memory, same files, same process; nothing that makes a new process or namespace.
pub(super) const THREAD_START: &[Rule] = &[
    permit!(
        SYS_clone,
        [Cond::Among(0, &[PTHREAD_CLONE_FLAGS])],
        "a thread of this process, nothing else"
    ),
    permit!(SYS_set_robust_list, "glibc: first act of a thread"),
    permit!(SYS_rseq, "glibc: first act of a thread"),
    permit!(
        SYS_sched_getaffinity,
        "glibc: pthread_getattr_np, which std calls for the stack guard"
    ),
    permit!(
        SYS_prctl,
        [Cond::Among(0, &[PR_SET_NAME])],
        "name of a thread"
    ),
];

pub(super) const NOT_EXECUTABLE_2: Cond = Cond::Masked(2, libc::PROT_EXEC as u64, &[0]);
pub(super) const F_GETFD: u64 = libc::F_GETFD as u64;
pub(super) const F_GETFL: u64 = libc::F_GETFL as u64;
pub(super) const F_SETFL: u64 = libc::F_SETFL as u64;
pub(super) const F_DUPFD_CLOEXEC: u64 = libc::F_DUPFD_CLOEXEC as u64;
pub(super) const F_GET_SEALS: u64 = libc::F_GET_SEALS as u64;
pub(super) const F_OFD_GETLK: u64 = libc::F_OFD_GETLK as u64;
pub(super) const F_OFD_SETLK: u64 = libc::F_OFD_SETLK as u64;
pub(super) const FIONBIO: u64 = libc::FIONBIO;
pub(super) const SOL_SOCKET: u64 = libc::SOL_SOCKET as u64;
const DONTNEED: u64 = libc::MADV_DONTNEED as u64;
const FREE: u64 = libc::MADV_FREE as u64;
const DONTDUMP: u64 = libc::MADV_DONTDUMP as u64;
const AT_EMPTY_PATH: u64 = libc::AT_EMPTY_PATH as u64;
const PR_GET_SECCOMP: u64 = libc::PR_GET_SECCOMP as u64;
const PR_GET_DUMPABLE: u64 = libc::PR_GET_DUMPABLE as u64;
const PR_SET_NAME: u64 = libc::PR_SET_NAME as u64;
/// VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID.
pub(super) const PTHREAD_CLONE_FLAGS: u64 = 0x003d_0f00;
