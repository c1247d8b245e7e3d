//! `casemate attest`: evidence, certificates, measurements.

use clap::Subcommand;

use crate::agent::api::Failure;

/// What is done with evidence.
#[derive(Debug, Subcommand)]
pub enum AttestCommand {}

/// Runs one of them.
pub fn run(command: AttestCommand, _json: bool) -> Result<u8, Failure> {
    match command {}
}
