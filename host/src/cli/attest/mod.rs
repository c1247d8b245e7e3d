//! `casemate attest`: evidence, certificates, measurements.

mod certificate;
mod fetch;
pub(super) mod files;
mod get;
mod guest;
mod id_block;
mod measure;
mod platform;
mod reference;
mod report;
mod report_view;
mod shared;
mod verify;

use clap::Subcommand;
pub(super) use fetch::tcb;

use crate::agent::api::Failure;

/// What is done with evidence.
#[derive(Debug, Subcommand)]
pub enum AttestCommand {
    /// Show every field of an SNP report, of whatever encoding. Claims: nothing is verified.
    Report(report::Args),
    /// Verify a platform's SEV certificates, signature by signature, and a report of a guest there.
    Platform(platform::Args),
    /// Ask for a report inside an SNP guest, from configfs-tsm or /dev/sev-guest.
    Get(get::Args),
    /// Verify and show VCEK or VLEK certificates; exit status 0 valid, 1 invalid, 2 cannot verify.
    Certificate(certificate::CertificateArgs),
    /// Fetch what the verification of reports needs from AMD's key service into a cache or a bundle; exit status 0
    /// done, 1 something did not verify, 2 something could not be had.
    Fetch(fetch::FetchArgs),
    /// Verify an SNP report: who signed it, on which platform, running what, against the owner's policy.
    Verify(Box<verify::VerifyArgs>),
    /// Compute the launch digest that a guest will have, from its description.
    Measure(measure::MeasureArgs),
    /// Make and check ID blocks: the owner's signed word on what a guest must be.
    IdBlock {
        /// What to do.
        #[command(subcommand)]
        command: id_block::IdBlockCommand,
    },
    /// Make, sign and check files of reference values.
    Reference {
        /// What to do.
        #[command(subcommand)]
        command: reference::ReferenceCommand,
    },
}

/// Runs one of them.
pub fn run(command: AttestCommand, json: bool) -> Result<u8, Failure> {
    match command {
        AttestCommand::Report(args) => report::run(&args, json),
        AttestCommand::Platform(args) => platform::run(&args, json),
        AttestCommand::Get(args) => get::run(&args, json),
        AttestCommand::Certificate(args) => certificate::run(&args, json),
        AttestCommand::Fetch(args) => fetch::run(&args, json),
        AttestCommand::Verify(args) => verify::run(&args, json),
        AttestCommand::Measure(args) => measure::run(&args, json),
        AttestCommand::IdBlock { command } => id_block::run(command, json),
        AttestCommand::Reference { command } => reference::run(command, json),
    }
}
