//! The probe: a dormant thread in every role that, on request, tries what must be refused.
//!
//! A forbidden call kills the process, so the probe's filter has exactly the control thread's rules but answers
//! with [`PROBE_ERRNO`]. Only that answer, or a plain denial by the kernel behind it, counts as refused: a call
//! that reached the kernel and failed for another reason (EBADF, EFAULT, ENOENT) counts as *not* refused.

use std::ffi::CStr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use super::report::ProbeAttempt;
use super::seccomp::kvm::CREATE_VM;
use super::seccomp::{PROBE_ERRNO, SeccompError, ThreadKind, install};
use super::sys;

/// The dormant thread. It sleeps until asked and ends with the process.
#[derive(Debug)]
pub struct ProbeThread {
    requests: mpsc::Sender<mpsc::Sender<Vec<ProbeAttempt>>>,
}

impl ProbeThread {
    /// Starts it; returns when its filter is in force. Before the calling thread's own filter.
    pub fn start(kind: ThreadKind) -> Result<Self, ProbeError> {
        let (requests, inbox) = mpsc::channel::<mpsc::Sender<Vec<ProbeAttempt>>>();
        let (ready_tx, ready_rx) = mpsc::channel();
        let body = move || {
            let installed = install(kind);
            let failed = installed.is_err();
            let _ = ready_tx.send(installed.map(drop));
            if failed {
                return;
            }
            while let Ok(reply) = inbox.recv() {
                let _ = reply.send(try_all());
            }
        };
        thread::Builder::new()
            .name("probe".to_owned())
            .spawn(body)
            .map_err(SeccompError::Thread)?;
        ready_rx.recv().map_err(|_| ProbeError::Gone)??;
        Ok(Self { requests })
    }

    /// Tries everything once.
    pub fn run(&self) -> Result<Vec<ProbeAttempt>, ProbeError> {
        let (reply, answers) = mpsc::channel();
        self.requests.send(reply).map_err(|_| ProbeError::Gone)?;
        answers.recv_timeout(DEADLINE).map_err(|_| ProbeError::Gone)
    }
}

/// Why there is no answer from a probe.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Its filter is not in force.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// It ended, or does not answer.
    #[error("the probe thread does not answer")]
    Gone,
}

/// One thing to try: a system call with arguments that would be harmless if it went through.
struct Attempt {
    what: &'static str,
    call: i64,
    args: &'static [Arg],
}

enum Arg {
    Number(u64),
    Text(&'static CStr),
}

fn try_all() -> Vec<ProbeAttempt> {
    ATTEMPTS.iter().map(try_one).collect()
}

#[expect(unsafe_code, reason = "a probe makes calls that must be refused")]
fn try_one(attempt: &Attempt) -> ProbeAttempt {
    let mut args = [0u64; 6];
    for (slot, arg) in args.iter_mut().zip(attempt.args) {
        *slot = match arg {
            Arg::Number(number) => *number,
            Arg::Text(text) => text.as_ptr() as u64,
        };
    }
    // SAFETY: pointers are null or constant strings, lengths zero, descriptors invalid; what would go through makes
    // at most a descriptor, a mapping or a child (which ends below) that nobody uses.
    let answer = unsafe { sys::raw(attempt.call, args) };
    if answer == Ok(0) && attempt.call == libc::SYS_clone {
        sys::exit_now(0);
    }
    let (refused, by) = judge(attempt.call, answer);
    ProbeAttempt {
        what: attempt.what.to_owned(),
        refused,
        by,
    }
}

fn judge(call: i64, answer: Result<i64, Errno>) -> (bool, String) {
    match answer {
        Err(errno) if errno as i32 == PROBE_ERRNO => {
            (true, "seccomp (kills outside the probe)".to_owned())
        }
        // Every kernel that runs us has clone3, so this answer is the filter's.
        Err(Errno::ENOSYS) if call == libc::SYS_clone3 => (true, "seccomp ENOSYS".to_owned()),
        Err(errno @ (Errno::EPERM | Errno::EACCES)) => (true, format!("kernel {errno:?}")),
        Err(errno) => (
            false,
            format!("nobody: the call reached the kernel, {errno:?}"),
        ),
        Ok(_) => (false, "nobody: it succeeded".to_owned()),
    }
}

const fn n(number: u64) -> Arg {
    Arg::Number(number)
}

const fn text(text: &'static CStr) -> Arg {
    Arg::Text(text)
}

const fn attempt(what: &'static str, call: i64, args: &'static [Arg]) -> Attempt {
    Attempt { what, call, args }
}

/// No descriptor.
const NONE: u64 = u64::MAX;
/// `AT_FDCWD`.
const CWD: u64 = libc::AT_FDCWD as u64;
const STREAM: u64 = libc::SOCK_STREAM as u64;
const RWX: u64 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const DEADLINE: Duration = Duration::from_secs(10);

#[rustfmt::skip]
const ATTEMPTS: &[Attempt] = &[
    attempt("open /etc/passwd", libc::SYS_openat, &[n(CWD), text(c"/etc/passwd")]),
    attempt("open / (open)", libc::SYS_open, &[text(c"/")]),
    attempt("open /dev/kvm", libc::SYS_openat, &[n(CWD), text(c"/dev/kvm"), n(2)]),
    attempt("open /dev/mem", libc::SYS_openat, &[n(CWD), text(c"/dev/mem"), n(2)]),
    attempt("open /proc/self/mem", libc::SYS_openat, &[n(CWD), text(c"/proc/self/mem"), n(2)]),
    attempt("openat2", libc::SYS_openat2, &[n(CWD), text(c"/")]),
    attempt("open_by_handle_at", libc::SYS_open_by_handle_at, &[n(CWD)]),
    attempt("creat", libc::SYS_creat, &[text(c"/x")]),
    attempt("mkdir", libc::SYS_mkdir, &[text(c"/x")]),
    attempt("unlink", libc::SYS_unlink, &[text(c"/x")]),
    attempt("rename", libc::SYS_rename, &[text(c"/x"), text(c"/y")]),
    attempt("chmod", libc::SYS_chmod, &[text(c"/x"), n(0o777)]),
    attempt("stat by path", libc::SYS_newfstatat, &[n(CWD), text(c"/")]),
    attempt("getdents64", libc::SYS_getdents64, &[n(NONE)]),
    attempt("execve", libc::SYS_execve, &[text(c"/proc/self/exe")]),
    attempt("execveat", libc::SYS_execveat, &[n(NONE), text(c""), n(0), n(0), n(0x1000)]),
    attempt("socket AF_INET", libc::SYS_socket, &[n(libc::AF_INET as u64), n(STREAM)]),
    attempt("socket AF_INET6", libc::SYS_socket, &[n(libc::AF_INET6 as u64), n(STREAM)]),
    attempt("socket AF_UNIX", libc::SYS_socket, &[n(libc::AF_UNIX as u64), n(STREAM)]),
    attempt("socket AF_NETLINK", libc::SYS_socket, &[n(libc::AF_NETLINK as u64), n(3)]),
    attempt("socket AF_PACKET", libc::SYS_socket, &[n(libc::AF_PACKET as u64), n(3)]),
    attempt("socket AF_VSOCK", libc::SYS_socket, &[n(libc::AF_VSOCK as u64), n(STREAM)]),
    attempt("socketpair", libc::SYS_socketpair, &[n(libc::AF_UNIX as u64), n(STREAM)]),
    attempt("connect", libc::SYS_connect, &[n(NONE)]),
    attempt("bind", libc::SYS_bind, &[n(NONE)]),
    attempt("listen", libc::SYS_listen, &[n(NONE)]),
    attempt("setsockopt SO_ATTACH_FILTER", libc::SYS_setsockopt, &[n(NONE), n(1), n(26)]),
    attempt("ptrace", libc::SYS_ptrace, &[n(16), n(1)]),
    attempt("process_vm_readv", libc::SYS_process_vm_readv, &[n(1)]),
    attempt("process_vm_writev", libc::SYS_process_vm_writev, &[n(1)]),
    attempt("pidfd_open", libc::SYS_pidfd_open, &[n(1)]),
    attempt("pidfd_getfd", libc::SYS_pidfd_getfd, &[n(NONE)]),
    attempt("kcmp", libc::SYS_kcmp, &[n(1), n(1)]),
    attempt("kill every process", libc::SYS_kill, &[n(NONE), n(0)]),
    attempt("kill process 1", libc::SYS_kill, &[n(1), n(0)]),
    attempt("tgkill into another process", libc::SYS_tgkill, &[n(2), n(2), n(0)]),
    attempt("tkill", libc::SYS_tkill, &[n(2), n(0)]),
    attempt("fork (clone)", libc::SYS_clone, &[n(libc::SIGCHLD as u64)]),
    attempt("clone into new namespaces", libc::SYS_clone, &[n(libc::CLONE_NEWUSER as u64 | libc::SIGCHLD as u64)]),
    attempt("clone3", libc::SYS_clone3, &[]),
    attempt("unshare", libc::SYS_unshare, &[n(libc::CLONE_NEWUSER as u64)]),
    attempt("setns", libc::SYS_setns, &[n(NONE)]),
    attempt("mount", libc::SYS_mount, &[text(c"none"), text(c"/"), text(c"tmpfs")]),
    attempt("umount2", libc::SYS_umount2, &[text(c"/")]),
    attempt("open_tree", libc::SYS_open_tree, &[n(CWD), text(c"/")]),
    attempt("fsopen", libc::SYS_fsopen, &[text(c"proc")]),
    attempt("move_mount", libc::SYS_move_mount, &[n(NONE)]),
    attempt("pivot_root", libc::SYS_pivot_root, &[text(c"/"), text(c"/")]),
    attempt("chroot", libc::SYS_chroot, &[text(c"/")]),
    attempt("chdir", libc::SYS_chdir, &[text(c"/")]),
    attempt("setuid 0", libc::SYS_setuid, &[n(0)]),
    attempt("setresgid 0", libc::SYS_setresgid, &[n(0), n(0), n(0)]),
    attempt("capset", libc::SYS_capset, &[]),
    attempt("prctl PR_SET_DUMPABLE", libc::SYS_prctl, &[n(libc::PR_SET_DUMPABLE as u64)]),
    attempt("prctl PR_SET_PDEATHSIG", libc::SYS_prctl, &[n(libc::PR_SET_PDEATHSIG as u64), n(libc::SIGKILL as u64)]),
    attempt("prctl PR_SET_MM", libc::SYS_prctl, &[n(libc::PR_SET_MM as u64)]),
    attempt("arch_prctl", libc::SYS_arch_prctl, &[n(0x1003)]),
    attempt("personality", libc::SYS_personality, &[n(0xffff_ffff)]),
    attempt("prlimit64", libc::SYS_prlimit64, &[n(0), n(7)]),
    attempt("seccomp", libc::SYS_seccomp, &[n(1)]),
    attempt("landlock_create_ruleset", libc::SYS_landlock_create_ruleset, &[n(0), n(0), n(1)]),
    attempt("bpf", libc::SYS_bpf, &[]),
    attempt("perf_event_open", libc::SYS_perf_event_open, &[]),
    attempt("userfaultfd", libc::SYS_userfaultfd, &[n(1)]),
    attempt("io_uring_setup", libc::SYS_io_uring_setup, &[n(1)]),
    attempt("io_setup", libc::SYS_io_setup, &[n(1)]),
    attempt("keyctl", libc::SYS_keyctl, &[n(0), n(0xffff_fffd)]),
    attempt("add_key", libc::SYS_add_key, &[]),
    attempt("init_module", libc::SYS_init_module, &[]),
    attempt("finit_module", libc::SYS_finit_module, &[n(NONE)]),
    attempt("delete_module", libc::SYS_delete_module, &[]),
    attempt("kexec_load", libc::SYS_kexec_load, &[]),
    attempt("kexec_file_load", libc::SYS_kexec_file_load, &[n(NONE), n(NONE)]),
    attempt("reboot", libc::SYS_reboot, &[]),
    attempt("swapon", libc::SYS_swapon, &[]),
    attempt("syslog", libc::SYS_syslog, &[n(10)]),
    attempt("iopl", libc::SYS_iopl, &[n(0)]),
    attempt("ioperm", libc::SYS_ioperm, &[n(0x80), n(1), n(0)]),
    attempt("modify_ldt", libc::SYS_modify_ldt, &[]),
    attempt("clock_settime", libc::SYS_clock_settime, &[]),
    attempt("memfd_create", libc::SYS_memfd_create, &[text(c"probe")]),
    attempt("mmap executable", libc::SYS_mmap, &[n(0), n(4096), n(RWX), n(PRIVATE), n(NONE)]),
    attempt("mprotect executable", libc::SYS_mprotect, &[n(0), n(0), n(RWX)]),
    attempt("pkey_mprotect", libc::SYS_pkey_mprotect, &[n(0), n(0), n(RWX)]),
    attempt("madvise MADV_HWPOISON", libc::SYS_madvise, &[n(0), n(0), n(100)]),
    attempt("remap_file_pages", libc::SYS_remap_file_pages, &[]),
    attempt("shmget", libc::SYS_shmget, &[]),
    attempt("msgget", libc::SYS_msgget, &[]),
    attempt("ioctl TIOCSTI", libc::SYS_ioctl, &[n(NONE), n(libc::TIOCSTI)]),
    attempt("ioctl TUNSETIFF", libc::SYS_ioctl, &[n(NONE), n(0x4004_54ca)]),
    attempt("ioctl KVM_CREATE_VM", libc::SYS_ioctl, &[n(NONE), n(CREATE_VM)]),
    attempt("fcntl F_SETOWN", libc::SYS_fcntl, &[n(NONE), n(libc::F_SETOWN as u64)]),
    attempt("futex FUTEX_LOCK_PI", libc::SYS_futex, &[n(0), n(6)]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_denial_counts_as_refused() {
        let open = libc::SYS_openat;
        assert!(judge(open, Err(Errno::from_raw(PROBE_ERRNO))).0);
        assert!(judge(open, Err(Errno::EPERM)).0);
        for answer in [
            Ok(3),
            Err(Errno::EBADF),
            Err(Errno::ENOENT),
            Err(Errno::ENOSYS),
        ] {
            assert!(!judge(open, answer).0, "{answer:?}");
        }
        assert!(judge(libc::SYS_clone3, Err(Errno::ENOSYS)).0);
    }

    #[test]
    fn without_a_filter_the_probe_finds_open_doors() {
        // What cannot hurt a test process.
        let harmless = ["open / (open)", "socketpair", "mmap executable", "connect"];
        for attempt in ATTEMPTS.iter().filter(|a| harmless.contains(&a.what)) {
            assert!(!try_one(attempt).refused, "{}", attempt.what);
        }
    }
}
