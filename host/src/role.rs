//! What every internal role (`psp`, `mover`) needs of the process it runs in.

use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::sandbox::{Enforced, Jailed, Sealed};
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

impl RoleError {
    /// An error with a stable code.
    pub fn new(code: &str, text: impl std::fmt::Display) -> Self {
        Self {
            code: code.to_owned(),
            text: text.to_string(),
        }
    }
}

/// The cell as the sandbox builds it.
pub struct RoleCell {
    stage: Option<Stage>,
}

enum Stage {
    Jailed(Jailed),
    Sealed(Sealed),
}

impl RoleCell {
    /// The cell of a process that is in its jail already.
    pub fn new(jailed: Jailed) -> Self {
        Self { stage: Some(Stage::Jailed(jailed)) }
    }

    fn sealed(&self) -> Result<&Sealed, RoleError> {
        match &self.stage {
            Some(Stage::Sealed(sealed)) => Ok(sealed),
            _ => Err(RoleError::new("SANDBOX", "the cell is not closed")),
        }
    }
}

impl Cell for RoleCell {
    fn close(&mut self) -> Result<(), RoleError> {
        let Some(Stage::Jailed(jailed)) = self.stage.take() else {
            return Err(RoleError::new("SANDBOX", "the cell was closed before"));
        };
        let sealed = jailed.enforce().and_then(Enforced::seal);
        self.stage = Some(Stage::Sealed(sealed.map_err(|e| RoleError::new("SANDBOX", e))?));
        Ok(())
    }

    fn report(&self) -> Result<SandboxReport, RoleError> {
        self.sealed()?.report().map_err(|e| RoleError::new("SANDBOX", e))
    }

    fn probe(&self) -> Result<ProbeReport, RoleError> {
        self.sealed()?.probe().map_err(|e| RoleError::new("SANDBOX", e))
    }
}

/// No cell at all: for tests, and for nothing else.
#[cfg(test)]
pub(crate) struct OpenCell;

#[cfg(test)]
impl Cell for OpenCell {
    fn close(&mut self) -> Result<(), RoleError> {
        Ok(())
    }
    fn report(&self) -> Result<SandboxReport, RoleError> {
        Err(RoleError::new("TEST", "no cell"))
    }
    fn probe(&self) -> Result<ProbeReport, RoleError> {
        Err(RoleError::new("TEST", "no cell"))
    }
}
