//! The real certificates, at real clocks.

mod crl;
mod faults;
mod forge;

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

fn amd_intermediate(product: Product, kind: SigningKey, clock: SystemTime) -> TrustedIntermediate {
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
        let verified = verify(
            &leaf,
            &amd_intermediate(product, kind, clock),
            &NO_LIST,
            clock,
        )
        .unwrap();
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
                let result = verify(
                    &leaf,
                    &amd_intermediate(other, other_kind, clock),
                    &NO_LIST,
                    clock,
                );
                assert_eq!(result.is_ok(), (other, other_kind) == (product, kind));
            }
        }
    }
}

#[test]
fn an_expired_or_swapped_or_made_up_leaf_is_refused() {
    let vlek = Leaf::parse(&vector("reports/milan-v3-vlek/vlek.der")).unwrap();
    let code = |leaf: &Leaf, product, kind, clock: &str| {
        let refused = verify(
            leaf,
            &amd_intermediate(product, kind, at(clock)),
            &NO_LIST,
            at(clock),
        );
        refused.unwrap_err().code()
    };
    let (milan, genoa) = (Product::Milan, Product::Genoa);
    let (ask, asvk) = (SigningKey::Vcek, SigningKey::Vlek);
    assert_eq!(
        code(&vlek, milan, asvk, "2026-06-01T00:00:00Z"),
        "LEAF_EXPIRED"
    );
    assert_eq!(
        code(&vlek, milan, asvk, "2024-06-01T00:00:00Z"),
        "LEAF_NOT_YET_VALID"
    );
    assert_eq!(
        code(&vlek, milan, ask, "2025-06-01T00:00:00Z"),
        "WRONG_INTERMEDIATE"
    );
    assert_eq!(
        code(&vlek, genoa, asvk, "2025-06-01T00:00:00Z"),
        "PRODUCT_MISMATCH"
    );
    for path in [
        "certs-only/vcek-invalid-legacy.der",
        "certs-only/vcek-invalid-new.der",
    ] {
        let leaf = Leaf::parse(&vector(path)).unwrap();
        assert_eq!(leaf.hwid().map(<[u8]>::len), Some(64));
        assert_eq!(
            code(&leaf, milan, ask, "2026-06-01T00:00:00Z"),
            "LEAF_SIGNATURE"
        );
    }
}

#[test]
fn what_comes_with_the_crate_is_what_amd_published() {
    let now = at("2026-06-01T00:00:00Z");
    assert_eq!(SnpTrust::amd().roots().len(), 3);
    for product in Product::ALL {
        let file = |name| vector(&format!("chains/{product}/{name}.pem"));
        let root = SnpTrust::amd().recognise(&file("ark")).unwrap();
        assert_eq!(root, SnpRoot::Amd(product));
        for (name, kind) in [("ask", SigningKey::Vcek), ("asvk", SigningKey::Vlek)] {
            let published = Intermediate::parse(&file(name)).unwrap();
            assert_eq!(published, Intermediate::amd(product, kind).unwrap());
            let trusted = amd_intermediate(product, kind, now);
            assert_eq!((trusted.kind(), trusted.product()), (kind, Some(product)));
            assert_eq!(trusted.root(), SnpRoot::Amd(product));
        }
        // As the key service sends it.
        let sent = split_pem(&[file("ask"), file("ark")].concat()).unwrap();
        assert_eq!(sent.len(), 2);
        assert!(SnpTrust::amd().recognise(&sent[1]).is_ok());
    }
}

#[test]
fn amds_roots_are_signed_by_themselves_and_are_no_intermediates() {
    let now = at("2026-06-01T00:00:00Z");
    for root in SnpTrust::amd().roots() {
        let der = &root.outline.der;
        assert!(root.signed(der));
        let as_intermediate = Intermediate::parse(der).unwrap();
        let refused = SnpTrust::amd().trust_intermediate(&as_intermediate, now);
        assert_eq!(refused.unwrap_err().code(), "CHAIN_NAME");
        assert!(Leaf::parse(der).is_err());
    }
}

#[test]
fn the_leaves_say_what_the_vectors_expect() {
    let expected: Vec<serde_json::Value> =
        serde_json::from_slice(&vector("expected.json")).unwrap();
    assert_eq!(expected.len(), 6);
    for vector_of in expected {
        let leaf = Leaf::parse(&vector(vector_of["leaf"].as_str().unwrap())).unwrap();
        let rfc3339 = |time| format!("{}", humantime::format_rfc3339_seconds(time));
        let date = |name: &str| vector_of[name].as_str().unwrap().replace("+00:00", "Z");
        assert_eq!(rfc3339(leaf.validity().not_before), date("leaf_not_before"));
        assert_eq!(rfc3339(leaf.validity().not_after), date("leaf_not_after"));
        assert_eq!(leaf.product().to_string(), vector_of["product"]);
        assert_eq!(
            format!("{:?}", leaf.kind()).to_uppercase(),
            vector_of["leaf_kind"]
        );
        let fields = &vector_of["fields"];
        assert_eq!(
            serde_json::to_value(leaf.tcb()).unwrap(),
            fields["reported_tcb"]
        );
        if let Some(hwid) = leaf.hwid() {
            assert_eq!(hex::encode(hwid), fields["chip_id"]);
        }
        assert!(leaf.serial().is_zero());
    }
}
