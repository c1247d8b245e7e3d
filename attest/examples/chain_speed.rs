//! How long the X.509 side of a verdict takes on one core, with real certificates and a real
//! report from `tests/vectors`.
//!
//! ```text
//! cargo run --release -p casemate-attest --example chain_speed
//! ```

use casemate_attest::chain::{
    CrlMode, Intermediate, Leaf, Revocation, SnpTrust, TrustedIntermediate, verify,
};
use casemate_attest::product::Product;
use casemate_attest::report::{Report, SigningKey};
use std::error::Error;
use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

const LIST: Revocation<'_> = Revocation {
    mode: CrlMode::IfPresent,
    crl: None,
    max_age: None,
};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/reports/genoa-v5");
    let report = std::fs::read(folder.join("report.bin"))?;
    let leaf = std::fs::read(folder.join("vcek.der"))?;
    let clock = SystemTime::UNIX_EPOCH + Duration::from_secs(1_785_542_400); // 2026-08-01

    let issuer = trusted(clock)?;
    let verified = verify(&Leaf::parse(&leaf)?, &issuer, &LIST, clock)?;
    let report_signature = |report: &[u8]| {
        let report = Report::parse(report).ok()?;
        let signature = report.signature()?;
        verified
            .verify_signature(report.signed_bytes(), &signature)
            .then_some(())
    };

    measure("parse a leaf", || Leaf::parse(&leaf).ok().map(drop));
    measure("trust an intermediate (RSA-4096)", || {
        trusted(clock).ok().map(drop)
    });
    measure("leaf under a kept intermediate (parse, RSA-4096)", || {
        let leaf = Leaf::parse(&leaf).ok()?;
        verify(&leaf, &issuer, &LIST, clock).ok().map(drop)
    });
    measure("recheck a kept leaf", || {
        verified.recheck(&LIST, clock).ok().map(drop)
    });
    measure("report signature (parse, P-384)", || {
        report_signature(&report)
    });
    measure("whole, intermediate kept", || {
        let leaf = Leaf::parse(&leaf).ok()?;
        verify(&leaf, &issuer, &LIST, clock).ok()?;
        report_signature(&report)
    });
    measure("whole, leaf kept", || {
        verified.recheck(&LIST, clock).ok()?;
        report_signature(&report)
    });
    Ok(())
}

fn trusted(clock: SystemTime) -> Result<TrustedIntermediate, Box<dyn Error>> {
    let intermediate = Intermediate::amd(Product::Genoa, SigningKey::Vcek)?;
    Ok(SnpTrust::amd().trust_intermediate(&intermediate, clock)?)
}

fn measure(what: &str, mut once: impl FnMut() -> Option<()>) {
    let (start, cpu) = (Instant::now(), on_cpu());
    let mut rounds = 0u32;
    while start.elapsed() < Duration::from_secs(1) {
        if black_box(once()).is_none() {
            println!("{what}: refused");
            return;
        }
        rounds += 1;
    }
    let each = (on_cpu() - cpu) / rounds;
    println!(
        "{what:<52} {:>8.1} µs {:>8.0}/s",
        each.as_secs_f64() * 1e6,
        1.0 / each.as_secs_f64()
    );
}

/// The time this thread has been running, without the time that others had its core.
fn on_cpu() -> Duration {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = schedstat
        .split(' ')
        .next()
        .and_then(|first| first.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or_default())
}
