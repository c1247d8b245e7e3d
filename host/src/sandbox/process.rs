//! The stages of a cell behind one value, for role code that is handed function pointers or a trait object and so
//! cannot hold the typestates itself. Out of order is an error, and after an error there is no cell.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::report::{ProbeReport, SandboxReport};
use super::seccomp::{ThreadKind, install};
use super::{Enforced, Jailed, SandboxError, Sealed};

/// A cell at whatever stage it is.
#[derive(Debug, Default)]
pub struct RoleCell {
    stage: Stage,
}

impl RoleCell {
    /// A cell just entered.
    pub fn new(jailed: Jailed) -> Self {
        Self {
            stage: Stage::Jailed(jailed),
        }
    }

    /// See [`Jailed::reopen_read_only`].
    pub fn reopen_read_only(&self, file: impl AsFd) -> Result<OwnedFd, SandboxError> {
        match &self.stage {
            Stage::Jailed(jailed) => jailed.reopen_read_only(file),
            other => Err(other.but_needed("jailed")),
        }
    }

    /// Landlock: see [`Jailed::enforce`].
    pub fn confine_process(&mut self) -> Result<(), SandboxError> {
        match std::mem::take(&mut self.stage) {
            Stage::Jailed(jailed) => {
                self.stage = Stage::Enforced(jailed.enforce()?);
                Ok(())
            }
            other => Err(other.but_needed("jailed")),
        }
    }

    /// The control thread's filter, after all others: see [`Enforced::seal`].
    pub fn seal(&mut self) -> Result<(), SandboxError> {
        match std::mem::take(&mut self.stage) {
            Stage::Enforced(enforced) => {
                self.stage = Stage::Sealed(enforced.seal()?);
                Ok(())
            }
            other => Err(other.but_needed("enforced")),
        }
    }

    /// Both, for a role whose other threads come later and inherit.
    pub fn close(&mut self) -> Result<(), SandboxError> {
        self.confine_process()?;
        self.seal()
    }

    /// See [`Sealed::report`].
    pub fn report(&self) -> Result<SandboxReport, SandboxError> {
        self.sealed()?.report()
    }

    /// See [`Sealed::probe`].
    pub fn probe(&self) -> Result<ProbeReport, SandboxError> {
        self.sealed()?.probe()
    }

    fn sealed(&self) -> Result<&Sealed, SandboxError> {
        match &self.stage {
            Stage::Sealed(sealed) => Ok(sealed),
            other => Err(other.but_needed("sealed")),
        }
    }
}

/// The one cell of this process, for plain function pointers.
pub mod this_process {
    use super::*;

    /// Hands over the cell this process has just entered.
    pub fn adopt(jailed: Jailed) {
        *cell() = RoleCell::new(jailed);
    }

    /// See [`RoleCell::reopen_read_only`].
    pub fn reopen_read_only(file: impl AsFd) -> Result<OwnedFd, SandboxError> {
        cell().reopen_read_only(file)
    }

    /// See [`RoleCell::confine_process`].
    pub fn confine_process() -> Result<(), SandboxError> {
        cell().confine_process()
    }

    /// Installs the calling thread's filter; the control thread's seals the process.
    pub fn confine_thread(kind: ThreadKind) -> Result<(), SandboxError> {
        if matches!(
            kind,
            ThreadKind::VmmControl | ThreadKind::Mover | ThreadKind::Psp
        ) {
            return cell().seal();
        }
        // Without the lock: the sealing thread holds it while it waits for this one.
        install(kind)?;
        Ok(())
    }

    /// See [`RoleCell::report`].
    pub fn report() -> Result<SandboxReport, SandboxError> {
        cell().report()
    }

    /// See [`RoleCell::probe`].
    pub fn probe() -> Result<ProbeReport, SandboxError> {
        cell().probe()
    }

    fn cell() -> MutexGuard<'static, RoleCell> {
        CELL.lock().unwrap_or_else(PoisonError::into_inner)
    }

    static CELL: Mutex<RoleCell> = Mutex::new(RoleCell { stage: Stage::Open });
}

#[derive(Debug, Default)]
enum Stage {
    /// No cell, or one that failed to close.
    #[default]
    Open,
    Jailed(Jailed),
    Enforced(Enforced),
    Sealed(Sealed),
}

impl Stage {
    fn but_needed(&self, needed: &'static str) -> SandboxError {
        let found = match self {
            Self::Open => "open",
            Self::Jailed(_) => "jailed",
            Self::Enforced(_) => "enforced",
            Self::Sealed(_) => "sealed",
        };
        SandboxError::Stage { found, needed }
    }
}
