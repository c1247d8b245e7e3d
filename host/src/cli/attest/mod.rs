//! `casemate attest`: evidence, certificates, measurements.

mod get;
mod platform;
mod report;

use std::path::Path;

use clap::Subcommand;

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
}

/// Runs one of them.
pub fn run(command: AttestCommand, json: bool) -> Result<u8, Failure> {
    match command {
        AttestCommand::Report(args) => report::run(&args, json),
        AttestCommand::Platform(args) => platform::run(&args, json),
        AttestCommand::Get(args) => get::run(&args, json),
    }
}

/// A file's bytes, at most `most` and one more, so that whoever parses it sees that it is too long.
fn read(path: &Path, most: usize) -> Result<Vec<u8>, Failure> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    std::fs::File::open(path)
        .and_then(|file| file.take(limit).read_to_end(&mut bytes))
        .map_err(|e| usage(format!("{} cannot be read: {e}", path.display())))?;
    Ok(bytes)
}

/// Exactly `N` bytes of hex, as an argument gives them.
fn fixed<const N: usize>(text: &str) -> Result<[u8; N], String> {
    hex::decode(text)
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("{} hex digits are wanted", N.saturating_mul(2)))
}

/// An argument that cannot be used.
fn usage(text: String) -> Failure {
    Failure::new("USAGE", text)
}
