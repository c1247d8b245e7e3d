//! Starts the agent and the internal roles.

use std::path::Path;

use tracing_subscriber::EnvFilter;

use crate::agent::api::Failure;
use crate::cli::args::Role;
use crate::role::RoleCell;
use crate::sandbox::{self, enter_jail};

/// `casemate agent`.
pub fn agent(config: &Path) -> Result<u8, Failure> {
    log();
    crate::agent::run(config).map(|()| 0)
}

/// `casemate internal ROLE`: into the jail first, then the role's own work.
pub fn internal(role: Role) -> Result<u8, Failure> {
    log();
    let failed = |error: &dyn std::fmt::Display| Failure::new("ROLE_FAILED", format!("{role:?}: {error}"));
    let (jailed, channel) = enter_jail(role.into()).map_err(|e| failed(&e))?;
    match role {
        Role::Vmm => crate::vmm::role::run(channel, jailed),
        Role::Mover => crate::mover::run(channel, Box::new(RoleCell::new(jailed))),
        Role::Psp => crate::confidential::processor_role::run(channel, Box::new(RoleCell::new(jailed))),
    }
    .map_err(|e| failed(&e))?;
    Ok(0)
}

impl From<Role> for sandbox::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Vmm => Self::Vmm,
            Role::Mover => Self::Mover,
            Role::Psp => Self::Psp,
        }
    }
}

fn log() {
    let filter = EnvFilter::try_from_env("CASEMATE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A second initialisation cannot happen in a process of one role.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).try_init();
}
