//! `casemate attest get`: a live report, inside the guest that it is about.

use std::fs;
use std::path::{Path, PathBuf};

use casemate_attest::evidence::{CertificateKind, Evidence, TsmError, TsmReports};
use serde_json::json;

use super::shared::usage;
use crate::agent::api::Failure;
use crate::cli::{output_failed, print_bytes, print_json};

/// Arguments of `casemate attest get`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the report is to carry: at most 64 bytes of hex, filled with zeros behind.
    #[arg(long, value_name = "HEX", value_parser = nonce)]
    nonce: [u8; 64],
    /// Privilege level of the report: 0, the highest, to 3 (default: the guest's own).
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=3))]
    vmpl: Option<u8>,
    /// Write the 1184 raw bytes here instead of hex to the standard output.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Folder for the certificates that the host supplied with the report.
    #[arg(long, value_name = "DIR")]
    certificates: Option<PathBuf>,
    /// A configfs-tsm entry that was made for this process; by default it makes its own.
    #[arg(long, value_name = "DIR")]
    entry: Option<PathBuf>,
}

/// Asks for a report.
pub fn run(args: &Args, json: bool) -> Result<u8, Failure> {
    let evidence = match &args.entry {
        Some(entry) => from_tsm(&TsmReports::entry(entry), args)?,
        None => match TsmReports::system().report(&args.nonce, args.vmpl) {
            Err(TsmError::Unavailable(_)) => from_device(args)?,
            other => other.map_err(|e| no_report(&e))?,
        },
    };
    let mut written = Vec::new();
    if let Some(dir) = &args.certificates {
        written = write_certificates(dir, &evidence)?;
    }
    if let Some(out) = &args.out {
        fs::write(out, evidence.report).map_err(|e| output_failed(&e))?;
    }
    let report = hex::encode(evidence.report);
    let source = evidence.source_format.to_string();
    if json {
        return print_json(&json!({
            "verified": false,
            "source": source,
            "report": report,
            "certificates": written,
        }));
    }
    let text = match &args.out {
        Some(out) => format!(
            "report from {source} in {}, with {} certificates; nothing is verified\n",
            out.display(),
            written.len()
        ),
        None => format!("{report}\n"),
    };
    print_bytes(text.as_bytes())
}

fn from_tsm(reports: &TsmReports, args: &Args) -> Result<Evidence, Failure> {
    reports
        .report(&args.nonce, args.vmpl)
        .map_err(|e| no_report(&e))
}

#[cfg(feature = "sev-guest")]
fn from_device(args: &Args) -> Result<Evidence, Failure> {
    casemate_attest::evidence::sev_guest::report(&args.nonce, args.vmpl).map_err(|e| {
        let text = format!("neither configfs-tsm nor /dev/sev-guest gives a report: {e}");
        Failure::new("NO_REPORT", text)
    })
}

#[cfg(not(feature = "sev-guest"))]
fn from_device(args: &Args) -> Result<Evidence, Failure> {
    from_tsm(&TsmReports::system(), args)
}

/// One file a certificate, named by its kind; what has no name here is left out.
fn write_certificates(dir: &Path, evidence: &Evidence) -> Result<Vec<String>, Failure> {
    fs::create_dir_all(dir).map_err(|e| usage(format!("{}: {e}", dir.display())))?;
    let mut written = Vec::new();
    for certificate in &evidence.certificates {
        let name = match certificate.kind {
            CertificateKind::Vcek => "vcek.der",
            CertificateKind::Vlek => "vlek.der",
            CertificateKind::Ask => "ask.der",
            CertificateKind::Ark => "ark.der",
            CertificateKind::Crl => "crl.der",
            CertificateKind::Other(_) => continue,
        };
        fs::write(dir.join(name), &certificate.bytes).map_err(|e| output_failed(&e))?;
        written.push(name.to_owned());
    }
    Ok(written)
}

fn no_report(error: &TsmError) -> Failure {
    Failure::new("NO_REPORT", error.to_string())
}

fn nonce(text: &str) -> Result<[u8; 64], String> {
    let bytes = hex::decode(text).map_err(|e| e.to_string())?;
    let mut data = [0; 64];
    match data.get_mut(..bytes.len()) {
        Some(start) if !bytes.is_empty() => start.copy_from_slice(&bytes),
        _ => return Err("1 to 64 bytes are wanted".to_owned()),
    }
    Ok(data)
}
