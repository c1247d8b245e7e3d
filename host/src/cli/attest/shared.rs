//! Arguments that several commands have.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use casemate_attest::chain::SnpTrust;
use clap::Args;

use crate::agent::api::Failure;

/// Which roots count, and at which time.
#[derive(Debug, Args)]
pub struct TrustArgs {
    /// Verify at this time instead of now.
    #[arg(long, value_name = "RFC3339", value_parser = time)]
    at: Option<SystemTime>,
    /// Also trust this emulated root (a certificate), which protects nothing from its host.
    #[arg(long, value_name = "FILE", requires = "allow_emulated")]
    emulated_root: Option<PathBuf>,
    /// The emulated root's fingerprint (sha256:…), as its owner gave it.
    #[arg(long, value_name = "SHA256", requires = "emulated_root")]
    allow_emulated: Option<String>,
}

impl TrustArgs {
    /// AMD's roots, and the emulated one if it is the one that was named.
    pub fn trust(&self) -> Result<SnpTrust, Failure> {
        let (Some(file), Some(named)) = (&self.emulated_root, &self.allow_emulated) else {
            return Ok(SnpTrust::amd());
        };
        let mut fingerprint = [0; 32];
        hex::decode_to_slice(
            named.strip_prefix("sha256:").unwrap_or(named),
            &mut fingerprint,
        )
        .map_err(|e| {
            usage(format!(
                "--allow-emulated {named} is no SHA-256 fingerprint: {e}"
            ))
        })?;
        SnpTrust::amd()
            .with_emulated_root(&read(file, MAX_INPUT_LEN)?, &[fingerprint])
            .map_err(|e| Failure::new(e.code(), format!("{}: {e}", file.display())))
    }

    /// The time to verify at.
    pub fn clock(&self) -> SystemTime {
        self.at.unwrap_or_else(SystemTime::now)
    }
}

/// Reads a file that the caller named, of at most `max` bytes.
pub fn read(file: &Path, max: usize) -> Result<Vec<u8>, Failure> {
    let bytes = read_evidence(file, max)?;
    if bytes.len() > max {
        let text = format!("{} is longer than {max} bytes", file.display());
        return Err(usage(text));
    }
    Ok(bytes)
}

/// A file's bytes, at most `most` and one more, so that whoever parses it sees that it is too long.
pub fn read_evidence(path: &Path, most: usize) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    File::open(path)
        .and_then(|file| file.take(limit).read_to_end(&mut bytes))
        .map_err(|e| usage(format!("{} cannot be read: {e}", path.display())))?;
    Ok(bytes)
}

/// Exactly `N` bytes of hex, as an argument gives them.
pub fn fixed<const N: usize>(text: &str) -> Result<[u8; N], String> {
    hex::decode(text)
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("{} hex digits are wanted", N.saturating_mul(2)))
}

/// The command line does not make sense.
pub fn usage(text: impl Into<String>) -> Failure {
    Failure::new("USAGE", text)
}

fn time(text: &str) -> Result<SystemTime, humantime::TimestampError> {
    humantime::parse_rfc3339(text)
}

/// More than any certificate, report or revocation list.
pub const MAX_INPUT_LEN: usize = 1 << 20;
