//! `casemate attest platform`: a platform's SEV certificates, each signature a check.

use std::path::{Path, PathBuf};

use casemate_attest::legacy::report::SEV_REPORT_LEN;
use casemate_attest::legacy::{CaCertificate, SevCertificate, SevReport, TrustAnchors};
use casemate_attest::measure::LaunchDigest;
use casemate_attest::verify::{Place, SevPlatform, SevReportExpected, verify_sev_platform};

use super::shared::{fixed, read_evidence, usage};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json, verdict};

/// Arguments of `casemate attest platform`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder made by `casemate platform export`, or with ark, ask, cek, oca, pek and pdh.cert; what is missing cannot
    /// be verified.
    dir: PathBuf,
    /// A 208-byte SEV attestation report of a guest on that platform.
    #[arg(long, requires_all = ["nonce", "digest"])]
    report: Option<PathBuf>,
    /// The report's nonce: 32 hex digits.
    #[arg(long, value_name = "HEX", requires = "report", value_parser = fixed::<16>)]
    nonce: Option<[u8; 16]>,
    /// The launch digest the guest must have: 64 hex digits.
    #[arg(long, value_name = "HEX", requires = "report")]
    digest: Option<LaunchDigest>,
    /// Accept this emulated root (sha256:…); emulated platforms are refused without it.
    #[arg(long, value_name = "SHA256")]
    allow_emulated: Option<String>,
}

/// Verifies them.
pub fn run(args: &Args, json: bool) -> Result<u8, Failure> {
    let mut trust = TrustAnchors::amd();
    if let Some(text) = &args.allow_emulated {
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        trust = fixed(digits)
            .and_then(|root| trust.with_emulated_root(root).map_err(|e| e.to_string()))
            .map_err(|e| usage(format!("--allow-emulated {text:?}: {e}")))?;
    }
    let report = report(args)?;
    let platform = platform(&args.dir)?;
    let judged = report.as_ref().map(|(report, expected)| (report, expected));
    let verdict = verify_sev_platform(&platform, &trust, judged);
    if json {
        print_json(&verdict)?;
    } else {
        let text = verdict::table(&verdict) + &verdict::outcome(&verdict);
        print_bytes(text.as_bytes())?;
    }
    Ok(verdict::exit_status(&verdict))
}

/// A report that cannot be parsed is rejected as a whole: there is nothing to check in it.
fn report(args: &Args) -> Result<Option<(SevReport, SevReportExpected)>, Failure> {
    let (Some(path), Some(nonce), Some(digest)) = (&args.report, args.nonce, args.digest) else {
        return Ok(None);
    };
    let report = SevReport::parse(&read_evidence(path, SEV_REPORT_LEN)?)
        .map_err(|e| Failure::new(e.code(), format!("{}: {e}", path.display())))?;
    let expected = SevReportExpected {
        nonce,
        digest,
        policy: None,
        allow_emulated: args.allow_emulated.is_some(),
    };
    Ok(Some((report, expected)))
}

/// Either layout; `platform.cert` and `amd.cert` tell the exported one.
fn platform(dir: &Path) -> Result<SevPlatform, Failure> {
    if !dir.is_dir() {
        return Err(usage(format!("{} is no folder", dir.display())));
    }
    let there = |name: &str| match dir.join(name) {
        path if path.exists() => read_evidence(&path, MAX_FILE).map(Some),
        _ => Ok(None),
    };
    let exported = [
        there("pdh.cert")?,
        there("platform.cert")?,
        there("amd.cert")?,
    ];
    if let [Some(pdh), Some(platform), Some(amd)] = &exported {
        return SevPlatform::exported(pdh, platform, amd)
            .map_err(|e| Failure::new("PLATFORM_MALFORMED", format!("{}: {e}", dir.display())));
    }
    let ca = |name| {
        let found: Option<Vec<u8>> = there(name)?;
        Ok::<_, Failure>(found.map_or(Place::Missing, |raw| {
            Place::parsed(CaCertificate::parse(&raw))
        }))
    };
    let sev = |name| {
        let found: Option<Vec<u8>> = there(name)?;
        Ok::<_, Failure>(found.map_or(Place::Missing, |raw| {
            Place::parsed(SevCertificate::parse(&raw))
        }))
    };
    Ok(SevPlatform {
        ark: ca("ark.cert")?,
        ask: ca("ask.cert")?,
        cek: sev("cek.cert")?,
        oca: sev("oca.cert")?,
        pek: sev("pek.cert")?,
        pdh: sev("pdh.cert")?,
    })
}

/// The longest set, PEK ‖ OCA ‖ CEK, has 6252 bytes.
const MAX_FILE: usize = 16 << 10;
