//! One seccomp filter for each kind of thread: reviewed data, each rule with its reason, everything else kills.
//!
//! The rules are tables, one file a role, over the common base. A filter is installed by the thread itself
//! as its first act; it is never taken off again. `clone3` alone is answered ENOSYS, so that glibc uses `clone`.

mod common;
pub(super) mod kvm;
mod mover;
mod psp;
mod rule;
mod vmm;

use std::cell::RefCell;
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};
use std::thread;

use nix::errno::Errno;
use seccompiler::SeccompAction;

use super::report::ThreadReport;
use super::sys;

pub use rule::{Cond, Program, Rule};

/// Which filter a thread has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// The VMM's control thread: requests, save and restore.
    VmmControl,
    /// A vCPU.
    VmmVcpu,
    /// The devices' thread.
    VmmDevice,
    /// The VMM's probe: the control thread's rules, refusing instead of killing.
    VmmProbe,
    /// Every thread of the mover.
    Mover,
    /// The mover's probe.
    MoverProbe,
    /// The software secure processor.
    Psp,
    /// Its probe.
    PspProbe,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::VmmControl,
        Self::VmmVcpu,
        Self::VmmDevice,
        Self::VmmProbe,
        Self::Mover,
        Self::MoverProbe,
        Self::Psp,
        Self::PspProbe,
    ];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::VmmControl => "vmm-control",
            Self::VmmVcpu => "vmm-vcpu",
            Self::VmmDevice => "vmm-device",
            Self::VmmProbe => "vmm-probe",
            Self::Mover => "mover",
            Self::MoverProbe => "mover-probe",
            Self::Psp => "psp",
            Self::PspProbe => "psp-probe",
        }
    }

    /// Its allow rules, in the order of the tables.
    pub fn rules(self) -> Vec<&'static Rule> {
        use common::{BASE, CHANNEL, STAT, THREAD_START};
        let tables: &[&'static [Rule]] = match self {
            Self::VmmControl | Self::VmmProbe => {
                &[BASE, STAT, CHANNEL, vmm::DEVICE_IO, vmm::CONTROL]
            }
            Self::VmmVcpu => &[BASE, vmm::VCPU],
            Self::VmmDevice => &[BASE, STAT, vmm::DEVICE_IO, vmm::DEVICE],
            Self::Mover | Self::MoverProbe => &[BASE, STAT, CHANNEL, THREAD_START, mover::MOVER],
            Self::Psp | Self::PspProbe => &[BASE, STAT, CHANNEL, psp::PSP],
        };
        tables.iter().flat_map(|table| table.iter()).collect()
    }

    /// Whether a call that no rule allows is refused with [`PROBE_ERRNO`] instead of ending the process.
    pub fn is_probe(self) -> bool {
        matches!(self, Self::VmmProbe | Self::MoverProbe | Self::PspProbe)
    }

    /// The compiled filter.
    pub fn program(self) -> Result<Program, SeccompError> {
        self.compile(&self.rules())
    }

    /// The filter without its `index`-th rule; tests show by it that the rule matters.
    #[doc(hidden)]
    pub fn program_without(self, index: usize) -> Result<Program, SeccompError> {
        let mut rules = self.rules();
        if index < rules.len() {
            rules.remove(index);
        }
        self.compile(&rules)
    }

    fn compile(self, rules: &[&Rule]) -> Result<Program, SeccompError> {
        let otherwise = match (self.is_probe(), log_only()) {
            (true, _) => SeccompAction::Errno(PROBE_ERRNO as u32),
            (false, true) => SeccompAction::Log,
            (false, false) => SeccompAction::KillProcess,
        };
        rule::compile(rules, otherwise).map_err(SeccompError::Compile)
    }
}

/// A filter in force on the calling thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Which one.
    pub kind: ThreadKind,
    /// SHA-256 of the BPF program, hexadecimal.
    pub sha256: String,
    /// `Seccomp:` mode, as the kernel says; 2 is filter mode.
    pub mode: u32,
}

/// Lets filters installed from now on enter this io_uring, which must be restricted already: what goes through a ring
/// passes no filter.
pub fn allow_ring(ring: RawFd) {
    rule::allow_ring(ring);
}

/// The rings that filters let threads enter.
pub fn rings() -> Vec<u64> {
    rule::rings()
}

/// Installs the filter on the calling thread, for ever. Every thread's first act.
pub fn install(kind: ThreadKind) -> Result<Installed, SeccompError> {
    install_program(kind, &kind.program()?)
}

/// The same with a program already compiled.
pub fn install_program(kind: ThreadKind, program: &Program) -> Result<Installed, SeccompError> {
    if let Some(already) = current() {
        return Err(SeccompError::Twice(already.kind));
    }
    seccompiler::apply_filter(&program.bpf).map_err(SeccompError::Install)?;
    register(kind, program.sha256.clone())
}

/// Starts a thread that inherits the calling thread's filter (which must allow it: the mover's does).
pub fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<thread::JoinHandle<T>, SeccompError> {
    let parent = current().ok_or(SeccompError::NoFilter)?;
    let body = move || {
        // A thread that cannot say what filters it must not run; the panic ends the process.
        #[expect(clippy::expect_used, reason = "ends the process, as it must")]
        register(parent.kind, parent.sha256).expect("the parent's filter is inherited");
        body()
    };
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(SeccompError::Thread)
}

/// What every living thread of this process has said of its filter.
pub fn threads() -> Vec<ThreadReport> {
    registry().iter().map(|entry| entry.1.clone()).collect()
}

/// Why a thread has no filter. The process must end then.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The rules are no filter.
    #[error("seccomp filter cannot be compiled: {0}")]
    Compile(#[source] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("seccomp filter refused: {0}; the kernel needs CONFIG_SECCOMP_FILTER")]
    Install(#[source] seccompiler::Error),
    /// It was taken but is not there.
    #[error("seccomp filter is not in force: mode {0}")]
    NotInForce(i32),
    /// The kernel does not say whether it is there.
    #[error("seccomp mode unknown: {0}")]
    Mode(Errno),
    /// This thread has one already.
    #[error("this thread already has the filter {}", .0.name())]
    Twice(ThreadKind),
    /// Nothing to inherit.
    #[error("the calling thread has no filter that a new thread could inherit")]
    NoFilter,
    /// No thread.
    #[error("thread could not be started: {0}")]
    Thread(#[source] std::io::Error),
}

/// The thread's entry in the registry; its end takes it out again.
struct Registration {
    id: thread::ThreadId,
    installed: Installed,
}

impl Drop for Registration {
    fn drop(&mut self) {
        registry().retain(|(id, _)| *id != self.id);
    }
}

type Entry = (thread::ThreadId, ThreadReport);

fn current() -> Option<Installed> {
    CURRENT.with_borrow(|current| current.as_ref().map(|r| r.installed.clone()))
}

/// Asks the kernel for the thread's mode and enters it in the registry.
fn register(kind: ThreadKind, sha256: String) -> Result<Installed, SeccompError> {
    let mode = sys::prctl(libc::PR_GET_SECCOMP, 0).map_err(SeccompError::Mode)?;
    if mode != MODE_FILTER {
        return Err(SeccompError::NotInForce(mode));
    }
    let thread = thread::current();
    let installed = Installed {
        kind,
        sha256,
        mode: mode.unsigned_abs(),
    };
    let report = ThreadReport {
        name: thread.name().unwrap_or("unnamed").to_owned(),
        filter: kind.name().to_owned(),
        filter_sha256: installed.sha256.clone(),
        mode: installed.mode,
    };
    registry().push((thread.id(), report));
    CURRENT.set(Some(Registration {
        id: thread.id(),
        installed: installed.clone(),
    }));
    Ok(installed)
}

fn registry() -> std::sync::MutexGuard<'static, Vec<Entry>> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Development only: `CASEMATE_SECCOMP=log` lets everything through and has the kernel log it.
pub(super) fn log_only() -> bool {
    cfg!(debug_assertions) && std::env::var_os(MODE_VARIABLE).is_some_and(|mode| mode == "log")
}

static REGISTRY: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
thread_local! {
    static CURRENT: RefCell<Option<Registration>> = const { RefCell::new(None) };
}
pub(super) const MODE_VARIABLE: &str = "CASEMATE_SECCOMP";
/// What a probe's filter answers. Nothing that a probe tries gives this errno by itself, so a probe knows that it
/// was seccomp (EPERM could be anybody).
pub const PROBE_ERRNO: i32 = libc::ENOANO;
const MODE_FILTER: i32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_filter_compiles_and_every_rule_has_a_reason() {
        for kind in ThreadKind::ALL {
            assert!(kind.program().unwrap().bpf.len() < 4096, "{kind:?}");
            for rule in kind.rules() {
                assert!(
                    rule.why.len() > 3 && rule.name.starts_with("SYS_"),
                    "{rule:?}"
                );
            }
        }
    }

    #[test]
    fn a_probe_has_the_rules_of_its_twin_and_another_program() {
        for (probe, twin) in [
            (ThreadKind::VmmProbe, ThreadKind::VmmControl),
            (ThreadKind::MoverProbe, ThreadKind::Mover),
            (ThreadKind::PspProbe, ThreadKind::Psp),
        ] {
            let calls = |kind: ThreadKind| kind.rules().iter().map(|r| r.call).collect::<Vec<_>>();
            assert_eq!(calls(probe), calls(twin));
            assert_ne!(
                probe.program().unwrap().sha256,
                twin.program().unwrap().sha256
            );
        }
    }

    #[test]
    fn no_filter_opens_executes_or_maps_code() {
        let never = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_ptrace,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_kill,
            libc::SYS_memfd_create,
            libc::SYS_seccomp,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
        ];
        for rule in ThreadKind::ALL.iter().flat_map(|kind| kind.rules()) {
            assert!(!never.contains(&rule.call), "{}", rule.name);
            let constrained = [
                libc::SYS_mmap,
                libc::SYS_mprotect,
                libc::SYS_ioctl,
                libc::SYS_fcntl,
                libc::SYS_prctl,
                libc::SYS_clone,
                libc::SYS_madvise,
                libc::SYS_tgkill,
                libc::SYS_futex,
                libc::SYS_setsockopt,
                libc::SYS_getsockopt,
                libc::SYS_io_uring_enter,
            ];
            assert!(
                !constrained.contains(&rule.call) || !rule.when.is_empty(),
                "{}",
                rule.name
            );
        }
    }
}
