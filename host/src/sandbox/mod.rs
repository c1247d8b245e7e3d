//! The cell of each role: jail, Landlock, seccomp; and the proof that it holds.
//!
//! The agent starts a role with [`jail::spawn_role`]. The role then goes through four stages, each a type, each
//! reached only if the one before is really in force:
//!
//! | Stage | What is gone |
//! | --- | --- |
//! | [`Jailed`] | every file path, network, other process, privilege and descriptor; own uid, cgroup, rlimits |
//! | [`Enforced`] | beneath that, by Landlock: files, TCP, device ioctls, foreign sockets and signals |
//! | [`seccomp::install`] | on each thread: every system call but those on the thread's list |
//! | [`Sealed`] | the same on the control thread; no thread is left without a filter |
//!
//! ```no_run
//! use casemate::sandbox::{self, Role, seccomp::{self, ThreadKind}};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // First of all, single-threaded: nobody's bytes have been read yet.
//!     let (jailed, channel) = sandbox::enter_jail(Role::Vmm)?;
//!     // Receive descriptors on `channel`, create the VM and every memfd (`memfd_create` is refused later),
//!     // `jailed.reopen_read_only(&memory)` for whoever may only read it. Still no second thread.
//!     let enforced = jailed.enforce()?;
//!     let vcpu = std::thread::Builder::new().name("vcpu0".into()).spawn(|| {
//!         seccomp::install(ThreadKind::VmmVcpu)?; // first act
//!         Ok::<_, seccomp::SeccompError>(()) // … KVM_RUN …
//!     })?;
//!     // Waits for the other threads' filters, starts the probe thread, installs this thread's filter.
//!     let sealed = enforced.seal()?;
//!     println!("{:?} {:?}", sealed.report()?, sealed.probe()?);
//!     # drop((vcpu, channel));
//!     Ok(())
//! }
//! ```
//!
//! A panic in any thread of a jailed process ends the process.

mod cgroup;
pub mod io_limit;
pub mod jail;
pub mod landlock;
pub mod probe;
mod process;
pub mod report;
pub mod seccomp;
mod spawn;
mod status;
mod sys;

use std::ffi::CStr;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::ipc::Channel;
use jail::{Cell, JailError};
use landlock::{LandlockError, Restricted};
use probe::{ProbeError, ProbeThread};
use report::{ProbeAttempt, ProbeReport, SandboxReport, ThreadReport};
use seccomp::{Installed, SeccompError, ThreadKind};

pub use cgroup::{CgroupError, hierarchy as cgroup_hierarchy};
pub use process::{RoleCell, this_process};
pub use sys::{forget_program_pages, quiet_allocator};

/// A role that runs in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Virtual machine monitor, one per guest.
    Vmm,
    /// Migration, one per move.
    Mover,
    /// Software secure processor, one per host.
    Psp,
}

impl Role {
    /// `vmm`, `mover`, `psp`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::Mover => "mover",
            Self::Psp => "psp",
        }
    }

    /// Filter of the thread that seals the process.
    pub fn control(self) -> ThreadKind {
        match self {
            Self::Vmm => ThreadKind::VmmControl,
            Self::Mover => ThreadKind::Mover,
            Self::Psp => ThreadKind::Psp,
        }
    }

    /// The same rules for the probe.
    pub fn probe(self) -> ThreadKind {
        match self {
            Self::Vmm => ThreadKind::VmmProbe,
            Self::Mover => ThreadKind::MoverProbe,
            Self::Psp => ThreadKind::PspProbe,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Enters the jail that the agent meant for this process; also gives the channel to the agent. The first thing
/// a role does.
pub fn enter_jail(role: Role) -> Result<(Jailed, Channel), SandboxError> {
    end_on_panic();
    quiet_allocator();
    let mut cell = jail::enter(role)?;
    let channel = cell.channel.take().ok_or(SandboxError::NoChannel)?;
    Ok((Jailed { cell }, channel))
}

/// A process in its jail, before Landlock and seccomp.
#[derive(Debug)]
pub struct Jailed {
    cell: Cell,
}

impl Jailed {
    /// A second, read-only handle of memory or a file: to be given to a role that may not write it.
    pub fn reopen_read_only(&self, file: impl AsFd) -> Result<OwnedFd, SandboxError> {
        let proc = self.cell.proc.as_ref();
        let proc = proc.ok_or(SandboxError::Reopen(Errno::EBADF))?;
        proc.reopen_read_only(file.as_fd())
            .map_err(SandboxError::Reopen)
    }

    /// Puts Landlock in force. There must be no second thread yet.
    pub fn enforce(self) -> Result<Enforced, SandboxError> {
        let mut cell = self.cell;
        let proc = cell.proc.take().ok_or(SandboxError::Status(Errno::EBADF))?;
        let threads = proc.threads().map_err(SandboxError::Status)?;
        if threads.own != 1 {
            return Err(LandlockError::Threads(threads.own).into());
        }
        drop(proc);
        let restricted = landlock::restrict(cell.spec.landlock_min)?;
        Ok(Enforced {
            cell,
            restricted,
            kernel_threads: threads.kernel,
            probe: None,
        })
    }
}

/// A process in its jail with Landlock in force; its threads may start and install their filters.
#[derive(Debug)]
pub struct Enforced {
    cell: Cell,
    restricted: Restricted,
    /// Threads in this process that are the kernel's.
    kernel_threads: u32,
    probe: Option<ProbeThread>,
}

impl Enforced {
    /// Starts the probe thread, if it does not run yet.
    pub fn start_probe_thread(&mut self) -> Result<(), SandboxError> {
        if self.probe.is_none() {
            self.probe = Some(ProbeThread::start(self.cell.role.probe())?);
        }
        Ok(())
    }

    /// Installs the calling thread's filter, the last one. Waits for the filters of the threads already
    /// started, and refuses if one does not come.
    pub fn seal(mut self) -> Result<Sealed, SandboxError> {
        self.start_probe_thread()?;
        let control = seccomp::install(self.cell.role.control())?;
        let probe = self.probe.take().ok_or(ProbeError::Gone)?;
        let sealed = Sealed {
            cell: self.cell,
            restricted: self.restricted,
            kernel_threads: self.kernel_threads,
            control,
            probe,
        };
        let start = Instant::now();
        while sealed.unaccounted()? != 0 {
            if start.elapsed() > FILTER_DEADLINE {
                return Err(SandboxError::Unfiltered(sealed.unaccounted()?));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(sealed)
    }
}

/// A process that is fully enforced.
#[derive(Debug)]
pub struct Sealed {
    cell: Cell,
    restricted: Restricted,
    kernel_threads: u32,
    control: Installed,
    probe: ProbeThread,
}

impl Sealed {
    /// State of the sandbox, asked of the kernel now.
    pub fn report(&self) -> Result<SandboxReport, SandboxError> {
        let status = self.cell.status.read().map_err(SandboxError::Status)?;
        let mut threads = seccomp::threads();
        let mut notes = self.cell.notes.clone();
        let known = u32::try_from(threads.len()).unwrap_or(u32::MAX);
        let others = status.threads.saturating_sub(known);
        if self.cell.role == Role::Vmm {
            // No filter of a VMM lets a thread be made, and at the seal each had its filter.
            if others != 0 {
                notes.push(format!(
                    "threads: {others} of the kernel's (KVM, io_uring), which run no code of this process"
                ));
            }
        } else {
            // Made since the seal, by a thread with this filter, which is inherited.
            threads.extend((0..others).map(|_| ThreadReport {
                name: "(unnamed)".to_owned(),
                filter: format!("{} (inherited)", self.control.kind.name()),
                filter_sha256: self.control.sha256.clone(),
                mode: self.control.mode,
            }));
        }
        let nofile = i32::try_from(self.cell.spec.nofile).unwrap_or(i32::MAX);
        if !seccomp::rings().is_empty() {
            notes.push(format!(
                "io_uring: {} ring(s), each bound by the kernel to READV, WRITEV, FSYNC and FALLOCATE on one disk's image",
                seccomp::rings().len()
            ));
        }
        if seccomp::log_only() {
            notes.push("seccomp: LOG MODE, nothing is refused".to_owned());
        }
        Ok(SandboxReport {
            role: self.cell.role.name().to_owned(),
            uid: status.uids.first().copied().unwrap_or(0),
            gid: status.gids.first().copied().unwrap_or(0),
            landlock_abi: self.restricted.abi,
            landlock: self.restricted.lines.clone(),
            landlock_sha256: self.restricted.sha256(),
            capabilities: status.capability_names(),
            no_new_privs: status.no_new_privs,
            dumpable: sys::prctl(libc::PR_GET_DUMPABLE, 0) != Ok(0),
            namespaces: self.cell.namespaces.clone(),
            descriptors: sys::count_descriptors(nofile),
            threads,
            notes,
        })
    }

    /// Tries from inside what must be refused: now under seccomp, and what was tried at start beneath it.
    pub fn probe(&self) -> Result<ProbeReport, SandboxError> {
        let mut attempts = self.probe.run()?;
        attempts.extend(self.restricted.proof.iter().cloned());
        attempts.push(match self.cell.passwd {
            Err(errno) => ProbeAttempt {
                what: "open /etc/passwd (at start, without Landlock)".to_owned(),
                refused: true,
                by: format!("namespace {errno:?}: the root is empty"),
            },
            Ok(()) => ProbeAttempt {
                what: "open /etc/passwd (at start, without Landlock)".to_owned(),
                refused: false,
                by: "nobody: it succeeded".to_owned(),
            },
        });
        Ok(ProbeReport {
            role: self.cell.role.name().to_owned(),
            attempts,
        })
    }

    /// Threads the kernel counts beyond those that have said what filters them.
    fn unaccounted(&self) -> Result<u32, SandboxError> {
        let status = self.cell.status.read().map_err(SandboxError::Status)?;
        let known = u32::try_from(seccomp::threads().len()).unwrap_or(u32::MAX);
        Ok(status
            .threads
            .saturating_sub(known.saturating_add(self.kernel_threads)))
    }
}

/// Why a role is not in its cell. It must end then.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// Landlock.
    #[error(transparent)]
    Landlock(#[from] LandlockError),
    /// A filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The probe.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// No channel was handed over.
    #[error("no channel to the agent")]
    NoChannel,
    /// The kernel does not say what this process is.
    #[error("state of this process cannot be read: {0}")]
    Status(Errno),
    /// No second handle.
    #[error("descriptor cannot be reopened read-only: {0}")]
    Reopen(Errno),
    /// A stage was asked for out of order.
    #[error("the sandbox is {found}, but this needs it {needed}")]
    Stage {
        /// Where it is.
        found: &'static str,
        /// Where it should be.
        needed: &'static str,
    },
    /// Threads without a filter.
    #[error("{0} thread(s) have not installed a filter")]
    Unfiltered(u32),
}

/// The kernel's Landlock ABI, 0 without Landlock.
pub fn landlock_abi() -> u32 {
    sys::landlock_abi()
}

/// A panic anywhere ends the process: half a VMM is no VMM, and a thread that is gone would leave others waiting.
fn end_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        let text = format!("casemate: {info}\n");
        let _ = nix::unistd::write(std::io::stderr(), text.as_bytes());
        sys::exit_now(PANIC_STATUS);
    }));
}

/// Whether the kernel lets this process open `path` for reading.
fn open_errno(path: &CStr) -> Result<(), Errno> {
    open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map(drop)
}

const FILTER_DEADLINE: Duration = Duration::from_secs(5);
/// What Rust itself uses.
const PANIC_STATUS: i32 = 101;
