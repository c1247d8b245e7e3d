//! `casemate attest`: evidence, certificates, measurements.

mod report;
mod verify;

use clap::Subcommand;

use crate::agent::api::Failure;

/// What is done with evidence.
#[derive(Debug, Subcommand)]
pub enum AttestCommand {
    Verify(Box<verify::VerifyArgs>),
}

/// Runs one of them.
pub fn run(command: AttestCommand, json: bool) -> Result<u8, Failure> {
    match command {
        AttestCommand::Verify(args) => verify::run(&args, json),
    }
}
