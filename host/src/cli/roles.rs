//! Starts the agent and the internal roles.

use std::path::Path;

use tracing_subscriber::EnvFilter;

use crate::agent::api::Failure;
use crate::cli::args::Role;
use crate::formats::FORMATS;
use crate::sandbox;

/// `casemate agent`.
pub fn agent(config: &Path) -> Result<u8, Failure> {
    log();
    crate::agent::run(config).map(|()| 0)
}

/// `casemate internal ROLE`: into the jail first, then the role's own work.
pub fn internal(role: Role) -> Result<u8, Failure> {
    log();
    match role {
        Role::Vmm => vmm().map_err(|e| Failure::new("ROLE_FAILED", format!("vmm: {e}")))?,
        Role::Mover => crate::mover::main()?,
        Role::Psp => crate::confidential::processor_role::main()?,
        Role::Formats => return super::print_bytes(format!("{FORMATS}\n").as_bytes()),
    }
    Ok(0)
}

fn vmm() -> Result<(), Box<dyn std::error::Error>> {
    let (jailed, channel) = sandbox::enter_jail(sandbox::Role::Vmm)?;
    sandbox::this_process::adopt(jailed);
    crate::vmm::role::run(channel, crate::vmm::wiring::hooks())?;
    Ok(())
}

/// Sends the log to standard error.
pub(super) fn log() {
    let filter = EnvFilter::try_from_env("CASEMATE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A second initialisation cannot happen in a process of one role.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Complaining about a log without a reader would go to that very reader, and end the process.
        .log_internal_errors(false)
        .with_ansi(false)
        .try_init();
}
