//! What AMD's key service answers, and bundles of it: any bytes are taken or refused, what was taken is what was there,
//! and a bundle that is written is read as the same.
#![no_main]

use casemate_attest::kds::{Bundle, parse_chain, parse_crl, parse_leaf};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for found in [parse_leaf(bytes), parse_crl(bytes)].into_iter().flatten() {
        assert_eq!(found, bytes);
        assert_eq!(bytes[0], SEQUENCE);
    }
    if let Ok(chain) = parse_chain(bytes) {
        let text = chain.to_pem();
        assert_eq!(parse_chain(text.as_bytes()), Ok(chain));
    }
    if let Ok(bundle) = Bundle::parse(bytes) {
        for (request, body) in bundle.items() {
            assert!(!body.is_empty() && body.len() <= request.max_len());
            assert!(request.path().is_ascii());
        }
        let text = bundle.to_json().unwrap();
        assert_eq!(Bundle::parse(&text).unwrap(), bundle);
    }
});

const SEQUENCE: u8 = 0x30;
