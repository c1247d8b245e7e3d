//! Landlock with no rule at all: every file, TCP port, device ioctl, foreign abstract socket and foreign process
//! that the kernel's ABI can deny is denied; and a self-check that it is so.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, UnixAddr, bind, connect, listen, socket,
};

use super::report::ProbeAttempt;
use super::sys;

/// What Landlock enforces in this process, and the proof of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restricted {
    /// ABI in force.
    pub abi: u32,
    /// One line each: what is denied, and what this kernel cannot deny.
    pub lines: Vec<String>,
    /// What the self-check tried between Landlock and seccomp.
    pub proof: Vec<ProbeAttempt>,
}

impl Restricted {
    /// SHA-256 of the lines, each with a line end, hexadecimal.
    pub fn sha256(&self) -> String {
        let text: String = self.lines.iter().map(|line| format!("{line}\n")).collect();
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        hex::encode(digest.as_ref())
    }
}

/// Denies everything for this thread and all it creates. The process must be single-threaded.
///
/// Refuses below `minimum`, and when the self-check finds that something is not denied.
pub fn restrict(minimum: u32) -> Result<Restricted, LandlockError> {
    let kernel = sys::landlock_abi();
    let (abi, level) = known(kernel);
    if level < minimum || level == 0 {
        return Err(LandlockError::TooOld {
            found: level,
            minimum: minimum.max(1),
        });
    }
    let check = SelfCheck::before(level)?;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(abi))?;
    if level >= 4 {
        ruleset = ruleset.handle_access(AccessNet::from_all(abi))?;
    }
    if level >= 6 {
        ruleset = ruleset.scope(Scope::from_all(abi))?;
    }
    let status = ruleset.create()?.restrict_self()?;
    if status.ruleset != RulesetStatus::FullyEnforced || !status.no_new_privs {
        return Err(LandlockError::NotEnforced(format!("{status:?}")));
    }
    let proof = check.after()?;
    Ok(Restricted {
        abi: level,
        lines: lines(level, kernel),
        proof,
    })
}

/// Why Landlock is not in force.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// The kernel offers less than the policy wants.
    #[error(
        "Landlock ABI {found} is older than the policy's minimum {minimum}; use a newer kernel (6.12 has ABI 6), boot with lsm=landlock,…, or lower `landlock_min`"
    )]
    TooOld {
        /// What the kernel has, 0 for none.
        found: u32,
        /// What the policy wants.
        minimum: u32,
    },
    /// The kernel refused the rule set.
    #[error("Landlock rule set refused: {0}")]
    Ruleset(#[from] RulesetError),
    /// The kernel took it but does not enforce all of it.
    #[error("Landlock is not fully enforced: {0}")]
    NotEnforced(String),
    /// The self-check could not be prepared: what must work before Landlock did not.
    #[error("Landlock self-check, before: {what}: {errno}")]
    CheckNotReady {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// Something that must be refused was not, or not by Landlock.
    #[error("Landlock self-check: {what} was not refused by Landlock: {answer}")]
    NotRefused {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        answer: String,
    },
    /// Landlock restricts only this thread and its descendants.
    #[error("Landlock must come before the second thread, but there are {0}")]
    Threads(u32),
}

/// What works before Landlock and must not work after: only so does a refusal prove anything.
struct SelfCheck {
    level: u32,
    /// An abstract socket from outside the domain, listening.
    abstract_socket: OwnedFd,
    abstract_address: UnixAddr,
}

impl SelfCheck {
    fn before(level: u32) -> Result<Self, LandlockError> {
        let not_ready = |what| move |errno| LandlockError::CheckNotReady { what, errno };
        super::open_errno(ROOT).map_err(not_ready(OPEN))?;
        if level >= 4 {
            bind_tcp().map_err(not_ready(BIND))?;
        }
        let name = format!("casemate-{}", std::process::id());
        let address = UnixAddr::new_abstract(name.as_bytes()).map_err(not_ready(ABSTRACT))?;
        let listener = unix_socket().map_err(not_ready(ABSTRACT))?;
        bind(listener.as_raw_fd(), &address).map_err(not_ready(ABSTRACT))?;
        listen(&listener, Backlog::new(4).map_err(not_ready(ABSTRACT))?)
            .map_err(not_ready(ABSTRACT))?;
        connect_unix(&address).map_err(not_ready(ABSTRACT))?;
        Ok(Self {
            level,
            abstract_socket: listener,
            abstract_address: address,
        })
    }

    fn after(self) -> Result<Vec<ProbeAttempt>, LandlockError> {
        let mut proof = vec![refused(OPEN, super::open_errno(ROOT), Errno::EACCES)?];
        if self.level >= 4 {
            proof.push(refused(BIND, bind_tcp(), Errno::EACCES)?);
        }
        if self.level >= 6 {
            let answer = connect_unix(&self.abstract_address);
            proof.push(refused(ABSTRACT, answer, Errno::EPERM)?);
        }
        drop(self.abstract_socket);
        Ok(proof)
    }
}

fn refused(
    what: &'static str,
    answer: Result<(), Errno>,
    expected: Errno,
) -> Result<ProbeAttempt, LandlockError> {
    match answer {
        Err(errno) if errno == expected => Ok(ProbeAttempt {
            what: format!("{what} (at start, without seccomp)"),
            refused: true,
            by: format!("landlock {errno:?}"),
        }),
        Err(errno) => Err(LandlockError::NotRefused {
            what,
            answer: errno.to_string(),
        }),
        Ok(()) => Err(LandlockError::NotRefused {
            what,
            answer: "it succeeded".to_owned(),
        }),
    }
}

fn bind_tcp() -> Result<(), Errno> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let tcp = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    bind(tcp.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, 0))
}

fn unix_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

fn connect_unix(address: &UnixAddr) -> Result<(), Errno> {
    connect(unix_socket()?.as_raw_fd(), address)
}

/// The newest ABI that both the kernel and this program know.
fn known(kernel: u32) -> (ABI, u32) {
    let abi = match kernel {
        0 => ABI::Unsupported,
        1 => ABI::V1,
        2 => ABI::V2,
        3 => ABI::V3,
        4 => ABI::V4,
        5 => ABI::V5,
        6 => ABI::V6,
        7 => ABI::V7,
        8 => ABI::V8,
        _ => ABI::V9,
    };
    (abi, kernel.min(NEWEST))
}

fn lines(level: u32, kernel: u32) -> Vec<String> {
    let mut lines: Vec<String> = ADDED
        .iter()
        .map(|&(since, what)| {
            if level >= since {
                format!("denied: {what}")
            } else {
                format!("not deniable by this kernel (needs ABI {since}): {what}")
            }
        })
        .collect();
    lines.push("allowed: nothing".to_owned());
    if kernel > level {
        lines.push(format!(
            "the kernel has ABI {kernel}; {level} is the newest used"
        ));
    }
    lines
}

/// What each ABI added, as far as it can be denied.
const ADDED: &[(u32, &str)] = &[
    (
        1,
        "opening, executing, making, removing files and directories",
    ),
    (2, "linking and renaming across directories"),
    (3, "truncating files"),
    (4, "TCP bind and connect"),
    (5, "ioctl on device files opened from here on"),
    (6, "abstract Unix sockets and signals beyond this process"),
    (9, "connecting to path-named Unix sockets"),
];
const NEWEST: u32 = 9;
const ROOT: &CStr = c"/";
const OPEN: &str = "open / for reading";
const BIND: &str = "bind a TCP port";
const ABSTRACT: &str = "connect to an abstract socket from outside";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_old_kernel_cannot_deny_is_said() {
        let old = lines(2, 2);
        assert!(
            old.iter()
                .any(|l| l.starts_with("not deniable") && l.contains("TCP"))
        );
        assert!(lines(9, 11).iter().any(|l| l.contains("ABI 11")));
        assert!(lines(9, 9).iter().all(|l| !l.starts_with("not deniable")));
    }

    #[test]
    fn a_self_check_that_finds_an_open_door_fails() {
        let open = refused(OPEN, Ok(()), Errno::EACCES).unwrap_err();
        assert!(matches!(open, LandlockError::NotRefused { .. }));
        // Refused by something else than Landlock proves nothing about Landlock.
        assert!(refused(OPEN, Err(Errno::ENOENT), Errno::EACCES).is_err());
        assert!(
            refused(OPEN, Err(Errno::EACCES), Errno::EACCES)
                .unwrap()
                .refused
        );
    }
}
