//! How the agent starts a role process: its own PID namespace, its own cgroup, one channel, nothing else.
#![expect(unsafe_code, reason = "Command::pre_exec runs between fork and exec")]

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CloneFlags, unshare};

use super::Role;
use super::cgroup::{Cgroup, CgroupError};
use super::jail::{CHANNEL_FD, Handover, JAIL_VARIABLE, JailSpec};
use super::sys;
use crate::ipc::Channel;

/// Starts `casemate internal <role>` from this very binary, with `channel` as its descriptor 3.
pub fn spawn_role(role: Role, channel: Channel, spec: JailSpec) -> Result<RoleProcess, SpawnError> {
    Spawn::new(role, spec).start(channel)
}

/// A role process about to be started.
#[derive(Debug)]
pub struct Spawn {
    role: Role,
    spec: JailSpec,
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    stderr: Stdio,
}

impl Spawn {
    /// The defaults: this binary, `internal <role>`, standard error shared with the caller, no environment
    /// but `CASEMATE_LOG`.
    pub fn new(role: Role, spec: JailSpec) -> Self {
        Self {
            role,
            spec,
            program: "/proc/self/exe".into(),
            arguments: vec!["internal".into(), role.name().into()],
            environment: Vec::new(),
            stderr: Stdio::inherit(),
        }
    }

    /// Another program than this one; a path that the new process finds.
    pub fn program(mut self, program: impl Into<OsString>) -> Self {
        self.program = program.into();
        self
    }

    /// Other arguments than `internal <role>`.
    pub fn arguments<I: IntoIterator<Item = S>, S: Into<OsString>>(mut self, arguments: I) -> Self {
        self.arguments = arguments.into_iter().map(Into::into).collect();
        self
    }

    /// One variable of the otherwise empty environment.
    pub fn variable(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Where the role's standard error goes.
    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.stderr = stderr.into();
        self
    }

    /// Starts it. The process lives at most as long as this one: it is killed when this process ends, however
    /// it ends.
    pub fn start(self, channel: Channel) -> Result<RoleProcess, SpawnError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(SpawnError::NeedsRoot);
        }
        self.spec.check()?;
        let JailSpec {
            name,
            memory_max,
            pids_max,
            cpu,
            io,
            ..
        } = &self.spec;
        let (cgroup, notes) = Cgroup::create(name, *memory_max, *pids_max, cpu, io.as_ref())?;
        let procs = cgroup.as_ref().map(Cgroup::procs).transpose()?;
        let handover = Handover {
            role: self.role,
            spec: self.spec,
            notes,
        };
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .envs(self.environment)
            .env(JAIL_VARIABLE, handover.encode()?)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(self.stderr);
        if let Some(level) = std::env::var_os(LOG_VARIABLE) {
            command.env(LOG_VARIABLE, level);
        }
        if cfg!(debug_assertions)
            && let Some(mode) = std::env::var_os(super::seccomp::MODE_VARIABLE)
        {
            command.env(super::seccomp::MODE_VARIABLE, mode);
        }
        let (started, exit) = start_on_own_thread(command, channel, procs, self.role)?;
        Ok(RoleProcess {
            pid: started.pid,
            pidfd: started.pidfd,
            exit: Mutex::new(Exit::Running(exit)),
            _cgroup: cgroup,
        })
    }
}

/// A running role. Dropping it kills the process and removes its cgroup.
#[derive(Debug)]
pub struct RoleProcess {
    pid: u32,
    pidfd: OwnedFd,
    exit: Mutex<Exit>,
    _cgroup: Option<Cgroup>,
}

impl RoleProcess {
    /// Process id as the host sees it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Becomes readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits for the end.
    pub fn wait(&self) -> io::Result<ExitStatus> {
        let mut exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        match &*exit {
            Exit::Ended(status) => Ok(*status),
            Exit::Running(waiter) => {
                let status = waiter.recv().map_err(|_| waiter_gone())??;
                *exit = Exit::Ended(status);
                Ok(status)
            }
        }
    }

    /// The exit status, if it has ended. Waits for another thread that is in [`Self::wait`].
    pub fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        let mut exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        match &*exit {
            Exit::Ended(status) => Ok(Some(*status)),
            Exit::Running(waiter) => match waiter.try_recv() {
                Ok(status) => {
                    let status = status?;
                    *exit = Exit::Ended(status);
                    Ok(Some(status))
                }
                Err(mpsc::TryRecvError::Empty) => Ok(None),
                Err(mpsc::TryRecvError::Disconnected) => Err(waiter_gone()),
            },
        }
    }

    /// SIGKILL. As the process is init of its PID namespace, everything in it ends.
    pub fn kill(&self) -> io::Result<()> {
        match sys::pidfd_kill(self.pidfd()) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl Drop for RoleProcess {
    fn drop(&mut self) {
        let _ = self.kill();
        let _ = self.wait();
    }
}

/// Why a role process was not started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// Namespaces, uids and cgroups need root.
    #[error(
        "starting a jailed role needs root; run the agent as root (it drops every privilege in the roles it starts)"
    )]
    NeedsRoot,
    /// The jail's description is impossible.
    #[error(transparent)]
    Spec(#[from] super::jail::JailError),
    /// The cgroup could not be made.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// No PID namespace.
    #[error(
        "no PID namespace for role {role}: {errno}; the kernel needs CONFIG_PID_NS and a free slot in /proc/sys/user/max_pid_namespaces"
    )]
    Namespace {
        /// Which role.
        role: Role,
        /// What the kernel said.
        errno: Errno,
    },
    /// fork or exec failed.
    #[error("role {role} could not be started: {source}")]
    Start {
        /// Which role.
        role: Role,
        /// Why.
        source: io::Error,
    },
}

#[derive(Debug)]
enum Exit {
    Running(mpsc::Receiver<io::Result<ExitStatus>>),
    Ended(ExitStatus),
}

struct Started {
    pid: u32,
    pidfd: OwnedFd,
}

type Outcome = (Started, mpsc::Receiver<io::Result<ExitStatus>>);

/// One thread per role process, for three reasons: `unshare(CLONE_NEWPID)` changes where *this thread's* children
/// go and nothing else; the parent-death signal follows the thread that forked, so it must not end before the
/// child (a thread of tokio's pool may); and it waits for the child, so that no zombie is left.
fn start_on_own_thread(
    command: Command,
    channel: Channel,
    procs: Option<OwnedFd>,
    role: Role,
) -> Result<Outcome, SpawnError> {
    let (started_tx, started_rx) = mpsc::channel();
    let (exit_tx, exit_rx) = mpsc::channel();
    let body = move || {
        let mut child = match fork_into_namespace(command, channel, procs, role) {
            Ok(child) => child,
            Err(error) => {
                let _ = started_tx.send(Err(error));
                return;
            }
        };
        let started = match sys::pidfd_open(child.id()) {
            Ok(pidfd) => Ok(Started {
                pid: child.id(),
                pidfd,
            }),
            Err(errno) => {
                let _ = child.kill();
                let source = errno.into();
                Err(SpawnError::Start { role, source })
            }
        };
        let _ = started_tx.send(started);
        let _ = exit_tx.send(child.wait());
    };
    thread::Builder::new()
        .name(format!("role-{role}"))
        .spawn(body)
        .map_err(|source| SpawnError::Start { role, source })?;
    let started = started_rx.recv().map_err(|_| SpawnError::Start {
        role,
        source: waiter_gone(),
    })??;
    Ok((started, exit_rx))
}

fn fork_into_namespace(
    mut command: Command,
    channel: Channel,
    procs: Option<OwnedFd>,
    role: Role,
) -> Result<std::process::Child, SpawnError> {
    let start = |source: io::Error| SpawnError::Start { role, source };
    unshare(CloneFlags::CLONE_NEWPID).map_err(|errno| SpawnError::Namespace { role, errno })?;
    let _reserved = occupy_channel_number().map_err(start)?;
    let channel = channel.into_fd();
    let (channel_fd, procs_fd) = (channel.as_raw_fd(), procs.as_ref().map(AsRawFd::as_raw_fd));
    let prepare = move || between_fork_and_exec(channel_fd, procs_fd);
    // SAFETY: the closure makes direct system calls on descriptors that are open until `spawn` returns, and
    // neither allocates nor takes a lock.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn().map_err(start);
    drop((channel, procs));
    child
}

/// Keeps the number [`CHANNEL_FD`] taken, so that std's own pipe to the child cannot sit there and be overwritten.
fn occupy_channel_number() -> io::Result<Option<OwnedFd>> {
    let null = OpenOptions::new().read(true).open("/dev/null")?;
    let fd = fcntl(null.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(CHANNEL_FD))?;
    let owned = sys::adopt(fd)?;
    Ok((fd == CHANNEL_FD).then_some(owned))
}

fn between_fork_and_exec(channel: RawFd, procs: Option<RawFd>) -> io::Result<()> {
    if let Some(procs) = procs {
        // SAFETY: one byte from a constant to an open descriptor; "0" stands for the writer itself.
        Errno::result(unsafe { libc::write(procs, c"0".as_ptr().cast(), 1) })?;
    }
    if channel == CHANNEL_FD {
        // SAFETY: numbers only; clears FD_CLOEXEC.
        Errno::result(unsafe { libc::fcntl(channel, libc::F_SETFD, 0) })?;
    } else {
        // SAFETY: numbers only; the target number is reserved or unused.
        Errno::result(unsafe { libc::dup2(channel, CHANNEL_FD) })?;
    }
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64)?;
    Ok(())
}

fn waiter_gone() -> io::Error {
    io::Error::other("the thread that waits for the role is gone")
}

/// How much a role logs; the only variable that is passed on.
const LOG_VARIABLE: &str = "CASEMATE_LOG";
