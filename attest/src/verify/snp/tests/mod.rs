//! Verdicts over reports from real hardware, over emulated ones that say anything, and the table
//! of checks.

mod emulated;
mod policies;
mod table;
mod vectors;

use super::*;
use crate::verify::{CheckResult, Outcome};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Everything that comes with a report, owned.
#[derive(Clone)]
struct Given {
    report: Vec<u8>,
    leaf: Vec<u8>,
    certificates: Vec<Vec<u8>>,
    crl: Option<Vec<u8>>,
}

/// What it is held against, owned.
struct Against {
    policy: OwnerPolicy,
    nonce: Option<Nonce>,
    references: Vec<ReferenceValues>,
    clock: SystemTime,
}

impl Given {
    fn evidence(&self) -> SnpEvidence<'_> {
        SnpEvidence {
            report: &self.report,
            leaf: &self.leaf,
            certificates: &self.certificates,
            crl: self.crl.as_deref(),
        }
    }

    fn verdict(&self, against: &Against) -> Verdict {
        let expectation = Expectation {
            nonce: against.nonce.as_ref(),
            references: &against.references,
            clock: against.clock,
        };
        verify_snp(&self.evidence(), &against.policy, &expectation)
    }

    fn codes(&self, against: &Against) -> Vec<String> {
        codes(&self.verdict(against))
    }
}

impl Against {
    fn policy(text: &str) -> Self {
        Self::owner(OwnerPolicy::parse(text.as_bytes()).unwrap())
    }

    fn owner(policy: OwnerPolicy) -> Self {
        Self {
            policy,
            nonce: None,
            references: Vec::new(),
            clock: at("2026-11-22T00:00:00Z"),
        }
    }

    fn with_clock(self, clock: SystemTime) -> Self {
        Self { clock, ..self }
    }

    fn with_nonce(self, nonce: &[u8]) -> Self {
        let nonce = Some(Nonce::new(nonce).unwrap());
        Self { nonce, ..self }
    }
}

impl Default for Against {
    fn default() -> Self {
        Self::owner(OwnerPolicy::default())
    }
}

fn codes(verdict: &Verdict) -> Vec<String> {
    let mut codes: Vec<_> = verdict.failures().filter_map(|c| c.code.clone()).collect();
    codes.sort();
    codes
}

fn check<'a>(verdict: &'a Verdict, name: &str) -> &'a Check {
    verdict.checks.iter().find(|c| c.name == name).unwrap()
}

fn at(rfc3339: &str) -> SystemTime {
    humantime::parse_rfc3339(rfc3339).unwrap()
}

fn read(path: &str) -> Vec<u8> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    fs::read(root.join(path)).unwrap()
}

/// One of the reports from hardware with the chain that belongs to it.
fn vector(id: &str) -> Given {
    let (product, leaf, issuer) = match id {
        "genoa-v3" => ("genoa", "vcek.pem", "ask"),
        "genoa-v5" => ("genoa", "vcek.der", "ask"),
        "milan-v3-vlek" => ("milan", "vlek.der", "asvk"),
        _ => ("milan", "vcek.der", "ask"),
    };
    Given {
        report: read(&format!("reports/{id}/report.bin")),
        leaf: read(&format!("reports/{id}/{leaf}")),
        certificates: vec![
            read(&format!("chains/{product}/{issuer}.pem")),
            read(&format!("chains/{product}/ark.pem")),
        ],
        crl: None,
    }
}
