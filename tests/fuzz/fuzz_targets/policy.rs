//! Owners' policies: any bytes are one or a refusal, and no policy accepts a guest that can be debugged, or an emulated
//! platform that it does not name and allow.
#![no_main]

use std::time::{Duration, SystemTime};

use casemate_attest::verify::policy::{Fingerprint, OwnerPolicy};
use casemate_attest::verify::{Expectation, SnpEvidence, SnpVerifier, Verdict};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(policy) = OwnerPolicy::parse(bytes) else {
        return;
    };
    let root = Fingerprint(*ROOT);
    let rules = policy.rules();
    let named = rules.allow_emulated && policy.emulated_roots().any(|named| *named == root);
    let measured = rules
        .measurements
        .as_ref()
        .is_none_or(|all| all.iter().any(|one| one.0 == LAUNCH));

    let verifier = SnpVerifier::new(policy.clone());
    assert!(!judged(&verifier, REAL_DEBUG, REAL_DEBUG_LEAF, &[]).accepted());
    assert!(!judged(&verifier, DEBUG, LEAF, &ABOVE).accepted());
    let verdict = judged(&verifier, GOOD, LEAF, &ABOVE);
    assert!(!verdict.accepted() || named && measured && verdict.emulated);
    // Every check that was made is there, whatever the policy says.
    assert!(
        verdict
            .checks
            .iter()
            .any(|check| check.name == "debug_forbidden")
    );

    // A root that somebody adds does not allow anything.
    let added = SnpVerifier::new(policy.clone().with_emulated_root(root));
    assert!(!judged(&added, DEBUG, LEAF, &ABOVE).accepted());
    let verdict = judged(&added, GOOD, LEAF, &ABOVE);
    assert!(!verdict.accepted() || policy.rules().allow_emulated && measured && verdict.emulated);
});

fn judged(verifier: &SnpVerifier, report: &[u8], leaf: &[u8], above: &[&[u8]]) -> Verdict {
    let certificates: Vec<_> = above.iter().map(|der| der.to_vec()).collect();
    let evidence = SnpEvidence {
        report,
        leaf,
        certificates: &certificates,
        crl: None,
    };
    let expectation = Expectation {
        nonce: None,
        references: &[],
        clock: SystemTime::UNIX_EPOCH + CLOCK,
    };
    verifier.verify(&evidence, &expectation)
}

/// December 2026: every certificate here is in force.
const CLOCK: Duration = Duration::from_secs(1_796_100_000);
const REAL_DEBUG: &[u8] =
    include_bytes!("../../../attest/tests/vectors/reports/milan-v2-debug/report.bin");
const REAL_DEBUG_LEAF: &[u8] =
    include_bytes!("../../../attest/tests/vectors/reports/milan-v2-debug/vcek.der");
/// An emulated platform's: NOT AMD.
const GOOD: &[u8] = include_bytes!("../fixtures/turin-v5-vcek.report");
const DEBUG: &[u8] = include_bytes!("../fixtures/turin-v5-vcek.debug-report");
const LEAF: &[u8] = include_bytes!("../fixtures/turin-v5-vcek.leaf");
const ABOVE: [&[u8]; 2] = [
    include_bytes!("../fixtures/ark"),
    include_bytes!("../fixtures/ask"),
];
const ROOT: &[u8; 32] = include_bytes!("../fixtures/root");
const LAUNCH: [u8; 48] = [0x4d; 48];
