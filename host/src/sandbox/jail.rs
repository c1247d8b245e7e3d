//! The jail of a role process: what is left when everything that can be taken away before Landlock is gone.
//!
//! [`enter`] is the first thing a role does, single-threaded, before it reads a byte from anybody. What comes by
//! environment from the agent is believed: it is the agent who builds the jail.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::sys::stat::{Mode, stat};
use nix::unistd::{
    Gid, Pid, Uid, chdir, chroot, dup2_raw, fchdir, geteuid, getpid, pivot_root, setgroups,
    sethostname, setresgid, setresuid,
};
use serde::{Deserialize, Serialize};

use super::io_limit::IoShare;
use super::status::{ProcSelf, Status, StatusFile};
use super::{Role, sys};
use crate::ipc::Channel;

pub use super::cgroup::{end as end_cgroup, sweep as sweep_cgroups};
pub use super::spawn::{RoleProcess, Spawn, SpawnError, spawn_role};

/// What a role's jail is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailSpec {
    /// Name of the cgroup, unique on the host, `[A-Za-z0-9_.-]`.
    pub name: String,
    /// User id that nobody else has; never root. By convention [`FIRST_UID`] + n.
    pub uid: u32,
    /// Group id, the same.
    pub gid: u32,
    /// Limit of `memory.max` in bytes. Shared memory is charged to whoever touches a page first, so the mover at
    /// a destination needs room for all of the guest's memory too.
    pub memory_max: Option<u64>,
    /// Most threads and processes.
    pub pids_max: u32,
    /// Most open descriptors (`RLIMIT_NOFILE`).
    pub nofile: u32,
    /// Largest file offset the role may write (`RLIMIT_FSIZE`), memfds included: at least guest memory and the
    /// largest disk. `None` is unlimited.
    pub fsize_max: Option<u64>,
    /// Most locked memory (`RLIMIT_MEMLOCK`); real SEV pins all of the guest's memory, else 0 does.
    pub memlock_max: u64,
    /// Oldest Landlock ABI the policy accepts.
    pub landlock_min: u32,
    /// Processors.
    pub cpu: CpuShare,
    /// Block devices.
    pub io: Option<IoShare>,
}

/// What a role may take of the host's processors; the default is what its threads get.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuShare {
    /// Most processor time, in percent of one processor (`cpu.max`).
    pub percent: Option<u32>,
    /// Share where processors are short, 1 to 10000, others have 100 (`cpu.weight`).
    pub weight: Option<u32>,
    /// The processors it runs on (affinity); empty for all.
    pub cpus: BTreeSet<u16>,
}

impl JailSpec {
    /// A jail named `name` for user and group `uid`, with bounds that suit a role without guest memory.
    pub fn new(name: impl Into<String>, uid: u32) -> Self {
        Self {
            name: name.into(),
            uid,
            gid: uid,
            memory_max: None,
            pids_max: 64,
            nofile: 256,
            fsize_max: None,
            memlock_max: 0,
            landlock_min: DEFAULT_LANDLOCK_MIN,
            cpu: CpuShare::default(),
            io: None,
        }
    }

    /// Whether the description can be a jail at all.
    pub fn check(&self) -> Result<(), JailError> {
        let sane = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if self.name.is_empty()
            || self.name.len() > 128
            || self.name.starts_with('.')
            || !self.name.chars().all(sane)
        {
            return Err(JailError::Spec("name must be 1 to 128 of [A-Za-z0-9_.-]"));
        }
        if self.uid < FIRST_UID || self.gid < FIRST_UID {
            return Err(JailError::Spec("uid and gid must be 200000 or above"));
        }
        if self.nofile < 16 || self.pids_max < 2 {
            return Err(JailError::Spec(
                "nofile must be at least 16, pids_max at least 2",
            ));
        }
        Ok(())
    }
}

/// A process in its jail. Descriptors 0 and 1 are `/dev/null`, 2 is the log, 3 the channel, 4 its own status.
#[derive(Debug)]
pub(super) struct Cell {
    pub(super) role: Role,
    pub(super) spec: JailSpec,
    /// Until the role has taken it.
    pub(super) channel: Option<Channel>,
    pub(super) status: StatusFile,
    /// Only until Landlock closes.
    pub(super) proc: Option<ProcSelf>,
    pub(super) namespaces: Vec<String>,
    pub(super) notes: Vec<String>,
    /// What the empty root answered to an open of `/etc/passwd`.
    pub(super) passwd: Result<(), Errno>,
}

/// What the agent tells the child about its jail, in the environment.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Handover {
    pub(super) role: Role,
    pub(super) spec: JailSpec,
    pub(super) notes: Vec<String>,
}

impl Handover {
    pub(super) fn encode(&self) -> Result<String, JailError> {
        serde_json::to_string(self).map_err(JailError::Handover)
    }
}

/// Builds the jail around the calling process and verifies it. Only for a process that [`Spawn`] started.
pub(super) fn enter(role: Role) -> Result<Cell, JailError> {
    let handover = handover(role)?;
    let spec = handover.spec;
    let mut notes = handover.notes;
    if !geteuid().is_root() {
        return Err(JailError::NeedsRoot);
    }
    let status = keep_status()?;
    let before = status.read().map_err(step("read /proc/self/status"))?;
    if before.threads != 1 {
        return Err(JailError::Threads(before.threads));
    }
    // The proc file system is still the host's, so it shows the process id in both namespaces.
    if getpid().as_raw() != 1 || before.pids.len() < 2 {
        return Err(JailError::NotInit);
    }
    let channel = take_channel()?;
    let mut namespaces = unshare_namespaces()?;
    namespaces.push("pid".to_owned());
    sethostname(format!("casemate-{role}")).map_err(step("sethostname"))?;
    let proc = ProcSelf(File::open("/proc/self").map_err(|e| io_step("open /proc/self", &e))?);
    empty_root(&mut notes)?;
    let mounts = proc.mounts().map_err(step("count mounts"))?;
    if mounts != 1 {
        return Err(JailError::NotEffective(format!("{mounts} mounts")));
    }
    limit_resources(&spec)?;
    pin(&spec.cpu, &mut notes)?;
    if let Err(errno) = sys::new_session_keyring()
        && errno != Errno::ENOSYS
    {
        return Err(step("join a new session keyring")(errno));
    }
    drop_privileges(&spec)?;
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64).map_err(step("PR_SET_PDEATHSIG"))?;
    agent_is_alive(&channel)?;
    let now = status.read().map_err(step("read /proc/self/status"))?;
    verify(&now, &spec)?;
    Ok(Cell {
        role,
        passwd: super::open_errno(c"/etc/passwd"),
        spec,
        channel: Some(channel),
        status,
        proc: Some(proc),
        namespaces,
        notes,
    })
}

/// What kept a process from entering its jail. It must end then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The description is impossible.
    #[error("jail description: {0}")]
    Spec(&'static str),
    /// Not started by the agent.
    #[error("an internal role is started by the agent only ({JAIL_VARIABLE} is not set)")]
    NotSpawned,
    /// The agent and the role disagree.
    #[error("started as role {found}, but the agent meant {meant}")]
    WrongRole {
        /// What the command line says.
        found: Role,
        /// What the hand-over says.
        meant: Role,
    },
    /// The hand-over cannot be read or written.
    #[error("jail description cannot be handed over")]
    Handover(#[source] serde_json::Error),
    /// No root.
    #[error("building a jail needs root; run the agent as root")]
    NeedsRoot,
    /// Another thread is running.
    #[error("a jail is entered single-threaded, but there are {0} threads")]
    Threads(u32),
    /// No PID namespace of its own.
    #[error(
        "not the first process of a PID namespace; an internal role is started by the agent only"
    )]
    NotInit,
    /// Descriptor 3 is no channel.
    #[error("descriptor {CHANNEL_FD} is not a channel: {0}")]
    Channel(Errno),
    /// The agent ended meanwhile.
    #[error("the agent has ended")]
    AgentGone,
    /// One step of building failed.
    #[error("jail: {step}: {errno}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// A step succeeded but its effect is not there.
    #[error("jail does not hold: {0}")]
    NotEffective(String),
}

fn handover(role: Role) -> Result<Handover, JailError> {
    let text = std::env::var(JAIL_VARIABLE).map_err(|_| JailError::NotSpawned)?;
    let handover: Handover = serde_json::from_str(&text).map_err(JailError::Handover)?;
    if handover.role != role {
        return Err(JailError::WrongRole {
            found: role,
            meant: handover.role,
        });
    }
    handover.spec.check()?;
    Ok(handover)
}

fn step(step: &'static str) -> impl Fn(Errno) -> JailError {
    move |errno| JailError::Step { step, errno }
}

fn io_step(step: &'static str, error: &std::io::Error) -> JailError {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    JailError::Step { step, errno }
}

/// Opens the status file at its number, and closes every descriptor above.
fn keep_status() -> Result<StatusFile, JailError> {
    let file =
        File::open("/proc/self/status").map_err(|e| io_step("open /proc/self/status", &e))?;
    if file.as_raw_fd() == STATUS_FD {
        let owned = OwnedFd::from(file);
        sys::close_from(STATUS_FD + 1).map_err(step("close_range"))?;
        return Ok(StatusFile(owned));
    }
    dup_to_status_number(file)?;
    sys::close_from(STATUS_FD + 1).map_err(step("close_range"))?;
    sys::adopt(STATUS_FD)
        .map(StatusFile)
        .map_err(step("keep /proc/self/status"))
}

#[expect(unsafe_code, reason = "dup2 to a fixed number")]
fn dup_to_status_number(file: File) -> Result<(), JailError> {
    // SAFETY: the first thing in the process, which was handed no descriptor at this number by contract.
    let copy = unsafe { dup2_raw(&file, STATUS_FD) }.map_err(step("dup2"))?;
    let _number: RawFd = std::os::fd::IntoRawFd::into_raw_fd(copy);
    drop(file);
    Ok(())
}

fn take_channel() -> Result<Channel, JailError> {
    let fd = sys::adopt(CHANNEL_FD).map_err(JailError::Channel)?;
    match getsockopt(&fd, sockopt::SockType) {
        Ok(SockType::SeqPacket) => Ok(Channel::from_fd(fd)),
        Ok(_) => Err(JailError::Channel(Errno::EPROTOTYPE)),
        Err(errno) => Err(JailError::Channel(errno)),
    }
}

/// New namespaces; returns the names of those whose identity really changed.
fn unshare_namespaces() -> Result<Vec<String>, JailError> {
    let identity = |name: &str| {
        let found = stat(Path::new("/proc/self/ns").join(name).as_path());
        found.map(|s| (s.st_dev, s.st_ino))
    };
    let before: Vec<_> = NAMESPACES.map(identity).into();
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .map_err(step("unshare namespaces"))?;
    let mut own = Vec::new();
    for (name, before) in NAMESPACES.iter().zip(before) {
        let (Ok(before), Ok(now)) = (before, identity(name)) else {
            return Err(JailError::NotEffective(format!("no namespace {name}")));
        };
        if before == now {
            return Err(JailError::NotEffective(format!(
                "namespace {name} is shared"
            )));
        }
        own.push((*name).to_owned());
    }
    Ok(own)
}

/// Replaces the root by an empty, read-only tmpfs.
fn empty_root(notes: &mut Vec<String>) -> Result<(), JailError> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(step("make mounts private"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // Over /proc, because that directory is known to exist: the status file came from there.
    let options = Some("size=4k,nr_inodes=1,mode=0555");
    mount(Some("casemate"), "/proc", Some("tmpfs"), flags, options)
        .map_err(step("mount the empty root"))?;
    chdir("/proc").map_err(step("enter the empty root"))?;
    match pivot_root(".", ".") {
        Ok(()) => {
            umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the old root"))?;
        }
        // The root is the initramfs itself, which cannot be pivoted away from; without any capability nothing
        // leads back from a chroot either.
        Err(Errno::EINVAL) => {
            let root = File::open(".").map_err(|e| io_step("open the empty root", &e))?;
            mount(Some("."), "/", none, MsFlags::MS_MOVE, none).map_err(step("move the root"))?;
            fchdir(root.as_fd()).map_err(step("enter the moved root"))?;
            chroot(".").map_err(step("chroot"))?;
            notes.push(
                "root: moved mount and chroot (the host runs from an initramfs, pivot_root cannot)"
                    .into(),
            );
        }
        Err(errno) => return Err(step("pivot_root")(errno)),
    }
    chdir("/").map_err(step("chdir"))?;
    let read_only = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, "/", none, read_only, none).map_err(step("make the root read-only"))?;
    let entries = std::fs::read_dir("/").map_err(|e| io_step("list the empty root", &e))?;
    match entries.count() {
        0 => Ok(()),
        n => Err(JailError::NotEffective(format!("{n} entries in the root"))),
    }
}

fn limit_resources(spec: &JailSpec) -> Result<(), JailError> {
    let nofile = u64::from(spec.nofile);
    let limits = [
        (Resource::RLIMIT_NOFILE, nofile),
        (Resource::RLIMIT_CORE, 0),
        (
            Resource::RLIMIT_FSIZE,
            spec.fsize_max.unwrap_or(libc::RLIM_INFINITY),
        ),
        (Resource::RLIMIT_MEMLOCK, spec.memlock_max),
        // Counted over the uid, which is the guest's own: bounds tasks where no pids controller does.
        (Resource::RLIMIT_NPROC, u64::from(spec.pids_max)),
        (Resource::RLIMIT_MSGQUEUE, 0),
    ];
    for (resource, value) in limits {
        let what = match resource {
            Resource::RLIMIT_MEMLOCK => {
                "setrlimit RLIMIT_MEMLOCK (to raise it for a SEV guest, the agent needs CAP_SYS_RESOURCE)"
            }
            _ => "setrlimit",
        };
        setrlimit(resource, value, value).map_err(step(what))?;
    }
    Ok(())
}

/// Keeps the process, and every thread that it starts, on the processors of its description.
fn pin(share: &CpuShare, notes: &mut Vec<String>) -> Result<(), JailError> {
    if share.cpus.is_empty() {
        return Ok(());
    }
    let mut wanted = CpuSet::new();
    for cpu in &share.cpus {
        wanted
            .set((*cpu).into())
            .map_err(step("name a processor"))?;
    }
    let what = "pin to the processors of `resources.cpus`";
    let this = Pid::from_raw(0);
    sched_setaffinity(this, &wanted).map_err(step(what))?;
    // The kernel leaves out, without a word, what the machine has not.
    if sched_getaffinity(this).map_err(step(what))? != wanted {
        let text = "not all of the processors of `resources.cpus` can be used on this host";
        return Err(JailError::NotEffective(text.to_owned()));
    }
    let all: Vec<String> = share.cpus.iter().map(ToString::to_string).collect();
    notes.push(format!("processors: {}", all.join(",")));
    Ok(())
}

fn drop_privileges(spec: &JailSpec) -> Result<(), JailError> {
    nix::sys::stat::umask(Mode::from_bits_truncate(0o077));
    for capability in 0..64 {
        match sys::prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(_) => {}
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(step("drop the bounding set")(errno)),
        }
    }
    sys::clear_ambient().map_err(step("drop the ambient set"))?;
    let (uid, gid) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.gid));
    setgroups(&[]).map_err(step("setgroups"))?;
    setresgid(gid, gid, gid).map_err(step("setresgid"))?;
    setresuid(uid, uid, uid).map_err(step("setresuid"))?;
    sys::capset_empty().map_err(step("capset"))?;
    sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(step("PR_SET_NO_NEW_PRIVS"))?;
    sys::prctl(libc::PR_SET_DUMPABLE, 0).map_err(step("PR_SET_DUMPABLE"))?;
    Ok(())
}

/// The parent-death signal does not fire for a parent that died before it was set; the channel shows that.
fn agent_is_alive(channel: &Channel) -> Result<(), JailError> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(channel.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).map_err(step("poll the channel"))?;
    let [fd] = fds;
    if fd.revents().is_some_and(|r| r.contains(PollFlags::POLLHUP)) {
        return Err(JailError::AgentGone);
    }
    Ok(())
}

/// Believes the kernel, not the return codes above.
fn verify(now: &Status, spec: &JailSpec) -> Result<(), JailError> {
    let all = |ids: &[u32], id: u32| ids.len() == 4 && ids.iter().all(|&x| x == id);
    let wrong = |what: String| Err(JailError::NotEffective(what));
    if !all(&now.uids, spec.uid) || !all(&now.gids, spec.gid) || !now.groups.is_empty() {
        return wrong(format!(
            "ids are {:?} {:?} {:?}",
            now.uids, now.gids, now.groups
        ));
    }
    let left = now.capability_names();
    if !left.is_empty() || now.capabilities.len() < 5 {
        return wrong(format!("capabilities left: {left:?}"));
    }
    if !now.no_new_privs {
        return wrong("no_new_privs is not set".to_owned());
    }
    if sys::prctl(libc::PR_GET_DUMPABLE, 0) != Ok(0) {
        return wrong("the process is dumpable".to_owned());
    }
    Ok(())
}

/// Lowest uid and gid of a role.
pub const FIRST_UID: u32 = 200_000;
/// ABI 2 is what Debian 12's kernel has.
pub const DEFAULT_LANDLOCK_MIN: u32 = 2;
/// The descriptor a role finds its channel at.
pub const CHANNEL_FD: RawFd = 3;
pub(super) const JAIL_VARIABLE: &str = "CASEMATE_JAIL";
const STATUS_FD: RawFd = 4;
const NAMESPACES: [&str; 5] = ["mnt", "net", "ipc", "uts", "cgroup"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jail_for_root_or_with_a_path_for_a_name_is_refused() {
        assert!(JailSpec::new("vmm-1", FIRST_UID).check().is_ok());
        assert!(JailSpec::new("vmm-1", 0).check().is_err());
        for name in ["", "..", "a/b", "../x"] {
            assert!(JailSpec::new(name, FIRST_UID).check().is_err(), "{name}");
        }
    }

    #[test]
    fn capabilities_left_do_not_pass() {
        let spec = JailSpec::new("x", FIRST_UID);
        let mut status = Status {
            uids: vec![FIRST_UID; 4],
            gids: vec![FIRST_UID; 4],
            no_new_privs: true,
            capabilities: vec![("CapEff".to_owned(), 0); 5],
            ..Status::default()
        };
        // Dumpable in a test process: that check comes last.
        let error = verify(&status, &spec).unwrap_err().to_string();
        assert!(error.contains("dumpable"), "{error}");
        status.capabilities.push(("CapBnd".to_owned(), 1));
        let error = verify(&status, &spec).unwrap_err().to_string();
        assert!(error.contains("CapBnd:0"), "{error}");
    }
}
