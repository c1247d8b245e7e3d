//! What every internal role (`psp`, `mover`) needs of the process it runs in.

use crate::ipc::Channel;
use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::sandbox::{Jailed, Role, SandboxError, Sealed};
use crate::vmm::protocol::RoleError;

/// The cell of a role, as the sandbox builds it. The role decides when it closes: before it reads a byte of
/// a guest or a peer.
pub trait Cell {
    /// Closes the cell for this thread and every one it starts. A cell that is not fully in force is an error.
    fn close(&mut self) -> Result<(), RoleError>;
    /// State of the cell, thread by thread.
    fn report(&self) -> Result<SandboxReport, RoleError>;
    /// Tries from inside what must be refused.
    fn probe(&self) -> Result<ProbeReport, RoleError>;
}

/// Enters the jail that the agent meant for this process; the first thing a role's `main` does. Gives the
/// channel to the agent, and the cell for the role to close.
pub fn enter(role: Role) -> Result<(Channel, Box<dyn Cell + Send>), RoleError> {
    let (jailed, channel) = crate::sandbox::enter_jail(role)?;
    Ok((channel, Box::new(Stage::Jailed(jailed))))
}

/// How far a cell is closed.
enum Stage {
    Jailed(Jailed),
    Sealed(Sealed),
    Failed,
}

impl Stage {
    fn sealed(&self) -> Result<&Sealed, RoleError> {
        match self {
            Self::Sealed(sealed) => Ok(sealed),
            _ => Err(RoleError::new(
                "SANDBOX_NOT_IN_FORCE",
                "the cell is not closed",
            )),
        }
    }
}

impl Cell for Stage {
    fn close(&mut self) -> Result<(), RoleError> {
        match std::mem::replace(self, Self::Failed) {
            Self::Jailed(jailed) => {
                *self = Self::Sealed(jailed.enforce()?.seal()?);
                Ok(())
            }
            Self::Sealed(sealed) => {
                *self = Self::Sealed(sealed);
                Ok(())
            }
            Self::Failed => Err(RoleError::new(
                "SANDBOX_NOT_IN_FORCE",
                "the cell did not close",
            )),
        }
    }

    fn report(&self) -> Result<SandboxReport, RoleError> {
        Ok(self.sealed()?.report()?)
    }

    fn probe(&self) -> Result<ProbeReport, RoleError> {
        Ok(self.sealed()?.probe()?)
    }
}

impl From<SandboxError> for RoleError {
    fn from(error: SandboxError) -> Self {
        Self::new("SANDBOX_NOT_IN_FORCE", error)
    }
}

impl RoleError {
    /// An error with a stable code.
    pub fn new(code: &str, text: impl std::fmt::Display) -> Self {
        Self {
            code: code.to_owned(),
            text: text.to_string(),
        }
    }
}

/// Only the role's own filter, on the thread that closes it: for tests. A system call that the filter has not
/// ends the whole test process with SIGSYS.
#[cfg(test)]
pub(crate) struct FilterOnly(pub crate::sandbox::seccomp::ThreadKind);

#[cfg(test)]
impl Cell for FilterOnly {
    fn close(&mut self) -> Result<(), RoleError> {
        crate::sandbox::quiet_allocator();
        let installed = crate::sandbox::seccomp::install(self.0);
        installed.map(drop).map_err(|e| RoleError::new("TEST", e))
    }
    fn report(&self) -> Result<SandboxReport, RoleError> {
        Err(RoleError::new("TEST", "no cell"))
    }
    fn probe(&self) -> Result<ProbeReport, RoleError> {
        Err(RoleError::new("TEST", "no cell"))
    }
}
