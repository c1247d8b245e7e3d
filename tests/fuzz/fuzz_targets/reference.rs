//! Reference values, signature files and ID blocks: any bytes are one or a typed refusal, and what was read is written
//! and read again as the same.
#![no_main]

use casemate_attest::measure::id_block::{IdAuth, IdBlock};
use casemate_attest::reference::{ReferenceDocument, Signatures};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(document) = ReferenceDocument::parse(bytes) {
        let text = document.to_toml().unwrap();
        assert_eq!(ReferenceDocument::parse(text.as_bytes()), Ok(document));
    }
    if let Ok(signatures) = Signatures::parse(bytes) {
        let text = signatures.to_toml().unwrap();
        assert_eq!(Signatures::parse(text.as_bytes()), Ok(signatures));
    }
    if let Ok(block) = IdBlock::parse(bytes) {
        assert_eq!(block.to_bytes().as_slice(), bytes);
    }
    if let Ok(auth) = IdAuth::parse(bytes) {
        assert_eq!(auth.as_bytes().as_slice(), bytes);
    }
});
