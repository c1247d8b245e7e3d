//! Signed notes, keys, cosignatures and records: any bytes are one or a refusal; what is read is spelled in one way, and
//! nothing is signed that was not.
#![no_main]

use casemate_policy::ledger::{Checkpoint, Record, VerifyingKey, WitnessKey, cosign};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let key: VerifyingKey = KEY.trim().parse().unwrap();
    if let Ok(signed) = key.open(text) {
        let known = [HELD, NEWEST].iter().any(|note| note.starts_with(signed));
        assert!(known, "signed by nobody: {signed}");
        assert_eq!(Checkpoint::open(text, &key).unwrap().to_text(), signed);
    }
    if let Ok(merged) = cosign::merge(text, HELD) {
        assert!(key.open(&merged).is_ok() || key.open(text).is_err());
    }
    if let Ok(key) = text.parse::<VerifyingKey>() {
        assert_eq!(key.to_string(), text);
    }
    if let Ok(key) = text.parse::<WitnessKey>() {
        assert_eq!(key.to_string(), text);
        assert_eq!(key.cosigned(HELD), Ok(None));
    }
    if let Some(record) = Record::from_canonical(text) {
        assert_eq!(record.canonical(), text);
    }
});

const KEY: &str = include_str!("../fixtures/ledger.pub");
const NEWEST: &str = include_str!("../fixtures/ledger.newest");
const HELD: &str = include_str!("../fixtures/ledger.checkpoint");
