use std::time::{Duration, UNIX_EPOCH};

use super::*;
use crate::ledger::{Entry, Stamp};

fn record(entry: Entry) -> Record {
    entry.stamped(
        7,
        Stamp {
            wall: UNIX_EPOCH + Duration::from_nanos(1_500_000_000_123_456_789),
            monotonic_ns: 9,
        },
    )
}

#[test]
fn a_syslog_message_is_spelled_as_rfc_5424_wants() {
    let entry = Entry::new("operator", "launch", "va\"u]\\lt\n", Outcome::Refused)
        .code("too-big")
        .emulated(true);
    let message = syslog(&record(entry), "site a");
    assert_eq!(
        message,
        "<108>1 2017-07-14T02:40:00.123456Z sitea casemate - launch [casemate@32473 seq=\"7\" actor=\"operator\" \
         action=\"launch\" object=\"va\\\"u\\]\\\\lt \" outcome=\"refused\" code=\"too-big\" emulated=\"true\"] \
         \u{feff}launch va\"u]\\lt refused by operator [too-big] (emulated)"
    );
    let done = Entry::new("a", "", "c", Outcome::Done);
    assert!(
        syslog(&record(done), "")
            .starts_with("<109>1 2017-07-14T02:40:00.123456Z - casemate - - [")
    );
}

#[test]
fn otlp_has_integers_as_strings_and_every_detail() {
    let entry = Entry::new("operator", "launch", "vault", Outcome::Failed)
        .with("n", 5u64)
        .with("list", vec!["x".to_owned()]);
    let request = otlp(&[record(entry)], "site-a");
    let log = &request["resourceLogs"][0]["scopeLogs"][0]["logRecords"][0];
    assert_eq!(log["timeUnixNano"], "1500000000123456789");
    assert_eq!(
        (&log["severityNumber"], &log["severityText"]),
        (&13.into(), &"WARN".into())
    );
    let find = |name: &str| {
        let attributes = log["attributes"].as_array().unwrap();
        attributes.iter().find(|a| a["key"] == name).unwrap()["value"].clone()
    };
    assert_eq!(find("casemate.seq")["intValue"], "7");
    assert_eq!(find("casemate.detail.n")["intValue"], "5");
    assert_eq!(
        find("casemate.detail.list")["arrayValue"]["values"][0]["stringValue"],
        "x"
    );
}

#[test]
fn only_a_launch_with_digests_has_a_statement() {
    let launch = |outcome| {
        Entry::new("operator", "launch", "vault", outcome)
            .with("measurement", "ab".repeat(48))
            .with("input.kernel", "cd".repeat(32))
            .with("other", "cd".repeat(32))
    };
    let done = record(launch(Outcome::Done));
    let made = statement(&done, "site-a/casemate").unwrap();
    assert_eq!(made["_type"], IN_TOTO);
    assert_eq!(made["subject"].as_array().unwrap().len(), 2);
    assert_eq!(made["subject"][0]["digest"]["sha256"], "cd".repeat(32));
    assert_eq!(made["predicate"]["verificationResult"], "PASSED");
    let leaf = hex::encode(merkle::leaf_hash(done.canonical().as_bytes()));
    assert_eq!(
        made["predicate"]["inputAttestations"][0]["digest"]["sha256"],
        leaf
    );
    let failed = statement(&record(launch(Outcome::Failed)), "x").unwrap();
    assert_eq!(failed["predicate"]["verificationResult"], "FAILED");
    assert_eq!(statement(&record(launch(Outcome::Allowed)), "x"), None);
    assert_eq!(
        statement(&record(Entry::new("a", "launch", "c", Outcome::Done)), "x"),
        None
    );
}

use crate::ledger::merkle;
