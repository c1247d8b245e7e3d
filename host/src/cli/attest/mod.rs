//! `casemate attest`: evidence, certificates, measurements.

mod certificate;
mod fetch;
mod shared;

use clap::Subcommand;

use crate::agent::api::Failure;

/// What is done with evidence.
#[derive(Debug, Subcommand)]
pub enum AttestCommand {
    /// Verify and show VCEK or VLEK certificates; exit status 0 valid, 1 invalid, 2 cannot verify.
    Certificate(certificate::CertificateArgs),
    /// Fetch what the verification of reports needs from AMD's key service into a cache or a bundle; exit status 0
    /// done, 1 something did not verify, 2 something could not be had.
    Fetch(fetch::FetchArgs),
}

/// Runs one of them.
pub fn run(command: AttestCommand, json: bool) -> Result<u8, Failure> {
    match command {
        AttestCommand::Certificate(args) => certificate::run(&args, json),
        AttestCommand::Fetch(args) => fetch::run(&args, json),
    }
}
