//! Real chains, judged by somebody else's code as well: the `sev` crate checks signatures and
//! nothing else, so it has to agree on those.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use casemate_attest::chain::{CrlMode, Intermediate, Leaf, Revocation, SnpTrust, verify};
use casemate_attest::product::Product;
use casemate_attest::report::SigningKey;
use sev::certs::snp::{Certificate, Chain, Verifiable, ca};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

const LEAVES: [&str; 7] = [
    "reports/milan-v2/vcek.der",
    "reports/milan-v2-debug/vcek.der",
    "reports/milan-v3-vlek/vlek.der",
    "reports/genoa-v5/vcek.der",
    "certs-only/vcek-turin.der",
    "certs-only/vcek-invalid-legacy.der",
    "certs-only/vcek-invalid-new.der",
];

fn vector(path: &str) -> Vec<u8> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    std::fs::read(root.join("tests/vectors").join(path)).unwrap()
}

#[test]
fn the_sev_crate_agrees_on_every_signature() {
    let mut valid = 0;
    for path in LEAVES {
        for product in Product::ALL {
            for kind in [SigningKey::Vcek, SigningKey::Vlek] {
                let der = vector(path);
                let signed = theirs(&der, product, kind);
                assert_eq!(
                    ours(&der, product, kind),
                    signed,
                    "{path} {product} {kind:?}"
                );
                valid += usize::from(signed);
            }
        }
    }
    assert_eq!(valid, 5);
}

fn ours(der: &[u8], product: Product, kind: SigningKey) -> bool {
    // 2025-06-01, when all of them were valid, but for the newest.
    let mut clock = SystemTime::UNIX_EPOCH + Duration::from_secs(1_748_736_000);
    let leaf = Leaf::parse(der).unwrap();
    if leaf.validity().not_before > clock {
        clock = leaf.validity().not_before;
    }
    let intermediate = Intermediate::amd(product, kind).unwrap();
    let trusted = SnpTrust::amd().trust_intermediate(&intermediate, clock);
    let list = Revocation {
        mode: CrlMode::IfPresent,
        ..Revocation::default()
    };
    verify(&leaf, &trusted.unwrap(), &list, clock).is_ok()
}

fn theirs(der: &[u8], product: Product, kind: SigningKey) -> bool {
    let name = match kind {
        SigningKey::Vcek => "ask",
        SigningKey::Vlek => "asvk",
    };
    let ark = vector(&format!("chains/{product}/ark.pem"));
    let ask = vector(&format!("chains/{product}/{name}.pem"));
    let chain = Chain {
        ca: ca::Chain::from_pem(&ark, &ask).unwrap(),
        vek: Certificate::from_der(der).unwrap(),
    };
    (&chain).verify().is_ok()
}
