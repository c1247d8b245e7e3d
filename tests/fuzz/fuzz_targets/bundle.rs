//! Evidence bundles: any bytes are one or a refusal, and one that verifies under the log's key has only the log's records.
#![no_main]

use std::collections::BTreeSet;
use std::sync::LazyLock;

use casemate_policy::bundle::{Expectations, verify_archive};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut records = Vec::new();
    let mut expectations = Expectations {
        trusted: vec![KEY.trim().parse().unwrap()],
        ..Expectations::default()
    };
    let verified = verify_archive(bytes, &expectations, &mut |record| {
        records.push(record.canonical());
    });
    if verified.is_ok() {
        assert!(records.iter().all(|record| TRUE.contains(record.as_str())));
        // A checkpoint of the log is in the past of each of its bundles, or it cannot be told.
        expectations.held = vec![HELD.to_owned()];
        if let Err(error) = verify_archive(bytes, &expectations, &mut |_| {}) {
            assert!(error.cannot_tell(), "{error}");
        }
    }
});

static TRUE: LazyLock<BTreeSet<&str>> = LazyLock::new(|| RECORDS.lines().collect());

const KEY: &str = include_str!("../fixtures/ledger.pub");
const HELD: &str = include_str!("../fixtures/ledger.checkpoint");
const RECORDS: &str = include_str!("../fixtures/ledger.records");
