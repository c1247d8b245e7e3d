//! Certificates, DER or PEM, as leaf, as intermediate and as a key service's chain.
#![no_main]

use casemate_attest::chain::{Intermediate, Leaf, SnpTrust, split_pem};
use libfuzzer_sys::fuzz_target;
use std::time::{Duration, SystemTime};

fuzz_target!(|bytes: &[u8]| {
    let clock = SystemTime::UNIX_EPOCH + Duration::from_secs(1_780_000_000);
    if let Ok(leaf) = Leaf::parse(bytes) {
        // What was read reads the same again, whatever it was wrapped in.
        assert_eq!(
            Leaf::parse(leaf.as_der()).map(|again| again.tcb()),
            Ok(leaf.tcb())
        );
        assert!(leaf.product_name().len() < bytes.len());
    }
    if let Ok(intermediate) = Intermediate::parse(bytes) {
        // Only what AMD's key signed is trusted, and the fuzzer cannot sign.
        let trusted = SnpTrust::amd()
            .trust_intermediate(&intermediate, clock)
            .is_ok();
        assert!(!trusted || is_amds(&intermediate));
    }
    if let Ok(certificates) = split_pem(bytes) {
        assert!((1..=4).contains(&certificates.len()));
    }
});

fn is_amds(found: &Intermediate) -> bool {
    use casemate_attest::product::Product;
    use casemate_attest::report::SigningKey;
    let kinds = [SigningKey::Vcek, SigningKey::Vlek];
    Product::ALL.into_iter().any(|product| {
        kinds.iter().any(|kind| {
            Intermediate::amd(product, *kind)
                .is_ok_and(|amds| amds.fingerprint() == found.fingerprint())
        })
    })
}
