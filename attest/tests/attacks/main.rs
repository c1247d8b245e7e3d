//! Attacks on the SNP verifier, by a host that makes up everything that reaches it: reports,
//! certificates, lists, and where the policy names an emulated root, anything that root would sign.
//!
//! In each test one thing is wrong, the refusal is that thing's alone, and the same evidence
//! without it is accepted.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests, and helpers of tests, may panic when they fail"
)]

mod chain;
mod input;
mod policy;
mod report;
mod revocation;

use casemate_attest::processor::snp::ReportFields;
use casemate_attest::processor::snp::forge::{self, Authority, LeafSpec};
use casemate_attest::product::Product;
use casemate_attest::report::{ReportVersion, SigningKey};
use casemate_attest::tcb::{RawTcb, TcbVersion};
use casemate_attest::verify::{
    Check, Expectation, Nonce, Outcome, OwnerPolicy, SnpEvidence, SnpVerifier, Verdict, verify_snp,
};
use std::time::SystemTime;

const VCEK: SigningKey = SigningKey::Vcek;
const VLEK: SigningKey = SigningKey::Vlek;

/// What the host hands over.
#[derive(Clone)]
struct Evidence {
    report: Vec<u8>,
    leaf: Vec<u8>,
    certificates: Vec<Vec<u8>>,
    crl: Option<Vec<u8>>,
}

impl Evidence {
    fn verdict(&self, policy: &OwnerPolicy, nonce: Option<&[u8]>) -> Verdict {
        let nonce = nonce.map(|bytes| Nonce::new(bytes).unwrap());
        verify_snp(
            &self.evidence(),
            policy,
            &Expectation {
                nonce: nonce.as_ref(),
                references: &[],
                clock: SystemTime::now(),
            },
        )
    }

    fn evidence(&self) -> SnpEvidence<'_> {
        SnpEvidence {
            report: &self.report,
            leaf: &self.leaf,
            certificates: &self.certificates,
            crl: self.crl.as_deref(),
        }
    }

    #[track_caller]
    fn accepted(&self, policy: &str) {
        let verdict = self.verdict(&allowing(policy), None);
        assert!(verdict.accepted(), "{:?}", codes(&verdict));
        assert!(verdict.emulated);
    }

    /// Rejected, for these reasons and no other.
    #[track_caller]
    fn refused(&self, policy: &str, expected: &[&str]) {
        let verdict = self.verdict(&allowing(policy), None);
        assert_eq!(codes(&verdict), expected);
        assert_eq!(verdict.overall, Outcome::Rejected);
    }
}

/// Evidence of the emulated platform: its report and its leaf, changed before they are signed.
fn evidence_of(
    product: Product,
    version: ReportVersion,
    leaf: impl FnOnce(LeafSpec) -> LeafSpec,
    change: impl FnOnce(&mut ReportFields),
) -> Evidence {
    let chip = chip(product);
    let spec = LeafSpec::vcek(product, forge::tcb(product), &chip[..product.hwid_len()]);
    let key = Authority::shared().leaf(&leaf(spec));
    let mut fields = fields(product, version, VCEK);
    change(&mut fields);
    Evidence {
        report: key.sign_report(&fields).unwrap().to_vec(),
        leaf: key.certificate().to_vec(),
        certificates: chain_of(Authority::shared()),
        crl: None,
    }
}

fn milan(change: impl FnOnce(&mut ReportFields)) -> Evidence {
    evidence_of(Product::Milan, ReportVersion::V5, |leaf| leaf, change)
}

fn milan_leaf(leaf: impl FnOnce(LeafSpec) -> LeafSpec) -> Evidence {
    evidence_of(Product::Milan, ReportVersion::V5, leaf, |_| {})
}

/// The platform's VLEK, of its provider `cloud`.
fn milan_vlek(change: impl FnOnce(LeafSpec) -> LeafSpec) -> Evidence {
    let product = Product::Milan;
    let spec = LeafSpec::vlek(product, forge::tcb(product), "cloud");
    let key = Authority::shared().leaf(&change(spec));
    let fields = fields(product, ReportVersion::V5, VLEK);
    Evidence {
        report: key.sign_report(&fields).unwrap().to_vec(),
        leaf: key.certificate().to_vec(),
        certificates: chain_of(Authority::shared()),
        crl: None,
    }
}

fn fields(product: Product, version: ReportVersion, key: SigningKey) -> ReportFields {
    let identity = Authority::shared().identity();
    forge::report_fields(identity, product, version, key, forge::tcb(product))
}

fn chip(product: Product) -> [u8; 64] {
    Authority::shared().identity().chip_id(product).unwrap()
}

fn chain_of(authority: &Authority) -> Vec<Vec<u8>> {
    [authority.ark(), authority.ask(), authority.asvk()]
        .map(<[u8]>::to_vec)
        .to_vec()
}

/// A policy that names the emulated root, allows it, and says `text` besides.
fn allowing(text: &str) -> OwnerPolicy {
    let root = hex::encode(Authority::shared().identity().root_fingerprint());
    let text = format!("allow_emulated = true\nemulated_roots = [\"sha256:{root}\"]\n{text}");
    OwnerPolicy::parse(text.as_bytes()).unwrap()
}

fn codes(verdict: &Verdict) -> Vec<String> {
    let mut codes: Vec<_> = verdict.failures().filter_map(|c| c.code.clone()).collect();
    codes.sort();
    codes
}

fn check<'a>(verdict: &'a Verdict, name: &str) -> &'a Check {
    verdict.checks.iter().find(|c| c.name == name).unwrap()
}

/// A report from AMD's hardware with the chain that belongs to it.
fn hardware(id: &str, product: &str) -> Evidence {
    let read = |path: String| {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/");
        std::fs::read(format!("{root}{path}")).unwrap()
    };
    Evidence {
        report: read(format!("reports/{id}/report.bin")),
        leaf: read(format!("reports/{id}/vcek.der")),
        certificates: ["ask", "ark"]
            .map(|name| read(format!("chains/{product}/{name}.pem")))
            .to_vec(),
        crl: None,
    }
}
