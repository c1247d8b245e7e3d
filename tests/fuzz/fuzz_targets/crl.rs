//! Revocation lists: any bytes are a list or a typed refusal, and none is AMD's unless AMD signed it.
#![no_main]

use casemate_attest::chain::{Crl, SnpTrust};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(list) = Crl::parse(bytes) {
        assert!(list.this_update() <= list.next_update());
        assert!(!list.is_signed_under(&SnpTrust::amd()));
    }
});
