//! The real certificates, at real clocks.

use super::*;
use crate::product::Product;
use crate::report::{Report, SigningKey};
use std::path::PathBuf;
use std::time::SystemTime;

fn vector(path: &str) -> Vec<u8> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    std::fs::read(root.join("tests/vectors").join(path)).unwrap()
}

fn at(rfc3339: &str) -> SystemTime {
    humantime::parse_rfc3339(rfc3339).unwrap()
}

const LEAVES: [(&str, Product, SigningKey, &str); 7] = [
    (
        "reports/milan-v2-debug/vcek.der",
        Product::Milan,
        SigningKey::Vcek,
        "2026-06-01T00:00:00Z",
    ),
    (
        "reports/milan-v2/vcek.der",
        Product::Milan,
        SigningKey::Vcek,
        "2026-06-01T00:00:00Z",
    ),
    (
        "reports/milan-v2-b/vcek.der",
        Product::Milan,
        SigningKey::Vcek,
        "2026-06-01T00:00:00Z",
    ),
    (
        "reports/milan-v3-vlek/vlek.der",
        Product::Milan,
        SigningKey::Vlek,
        "2025-06-01T00:00:00Z",
    ),
    (
        "reports/genoa-v3/vcek.pem",
        Product::Genoa,
        SigningKey::Vcek,
        "2026-06-01T00:00:00Z",
    ),
    (
        "reports/genoa-v5/vcek.der",
        Product::Genoa,
        SigningKey::Vcek,
        "2026-06-01T00:00:00Z",
    ),
    (
        "certs-only/vcek-turin.der",
        Product::Turin,
        SigningKey::Vcek,
        "2026-06-01T00:00:00Z",
    ),
];

const NO_LIST: Revocation<'_> = Revocation {
    mode: CrlMode::IfPresent,
    crl: None,
    max_age: None,
};

fn amd(product: Product, kind: SigningKey, clock: SystemTime) -> TrustedIntermediate {
    let intermediate = Intermediate::amd(product, kind).unwrap();
    SnpTrust::amd()
        .trust_intermediate(&intermediate, clock)
        .unwrap()
}

#[test]
fn every_real_leaf_is_valid_under_its_own_chain_and_no_other() {
    for (path, product, kind, clock) in LEAVES {
        let clock = at(clock);
        let leaf = Leaf::parse(&vector(path)).unwrap();
        let verified = verify(&leaf, &amd(product, kind, clock), &NO_LIST, clock).unwrap();
        assert_eq!((verified.product(), verified.kind()), (product, kind));
        assert!(!verified.emulated());
        let report = path.rsplit_once('/').unwrap().0;
        if report.starts_with("reports") {
            let report = Report::parse(&vector(&format!("{report}/report.bin"))).unwrap();
            let signature = report.signature().unwrap();
            assert!(verified.verify_signature(report.signed_bytes(), &signature));
        }
        for other in Product::ALL {
            for other_kind in [SigningKey::Vcek, SigningKey::Vlek] {
                let result = verify(&leaf, &amd(other, other_kind, clock), &NO_LIST, clock);
                assert_eq!(result.is_ok(), (other, other_kind) == (product, kind));
            }
        }
    }
}
