use std::collections::BTreeSet;

use super::*;
use crate::ledger::{Clock as _, Entry, SystemClock};

fn report() -> Report {
    let mut report = Report::new().unwrap();
    let entries = [
        Entry::new("agent", "start", "site-a", Outcome::Done).with("policy", "sha256:00"),
        Entry::new("operator", "launch", "<b>&vault", Outcome::Refused).emulated(true),
        Entry::new("operator", "<script>", "x", Outcome::Done),
    ];
    for (seq, entry) in (0..).zip(entries) {
        report.add(&entry.stamped(seq, SystemClock.now()));
    }
    report
}

fn source() -> Source {
    Source {
        origin: "site-a/<casemate>".to_owned(),
        size: 3,
        root: "00".repeat(32),
        key: "site-a+00+xx".to_owned(),
        key_trusted: false,
        time: "2026-01-01T00:00:00Z".to_owned(),
    }
}

#[test]
fn records_count_where_the_mapping_says() {
    let report = report();
    let find = |id: &str| {
        let mut controls = report.frameworks.iter().flat_map(|f| &f.control);
        controls
            .find(|control| control.id == id)
            .unwrap()
            .observed
            .clone()
    };
    assert_eq!(
        (
            find("au-2").records,
            find("au-2").refused,
            find("au-2").emulated
        ),
        (3, 1, 1)
    );
    assert_eq!((find("cm-3").records, find("cm-3").first), (1, vec![0]));
    assert_eq!((find("ac-3").records, find("pci-7.2.5").records), (1, 1));
    assert_eq!(find("cp-10"), Observed::default());
    assert_eq!(report.policies.len(), 1);
}

#[test]
fn the_mapping_names_each_control_once_and_what_it_does_not_cover() {
    let report = Report::new().unwrap();
    let controls: Vec<&Control> = report.frameworks.iter().flat_map(|f| &f.control).collect();
    let ids: BTreeSet<_> = controls.iter().map(|control| &control.id).collect();
    assert_eq!(ids.len(), controls.len());
    assert!(
        controls
            .iter()
            .all(|c| !c.not_covered.is_empty() && !c.actions.is_empty())
    );
    for id in [
        "nist-800-53-r5",
        "pci-dss-4.0",
        "iso-27001-2022",
        "fips-140-3",
    ] {
        assert!(
            report.frameworks.iter().any(|framework| framework.id == id),
            "{id}"
        );
    }
}

#[test]
fn nothing_is_reported_before_it_has_verified() {
    assert!(matches!(oscal(&report()), Err(ReportError::Unverified)));
    assert!(matches!(html(&report()), Err(ReportError::Unverified)));
}

#[test]
fn what_records_say_cannot_become_markup() {
    let mut report = report();
    report.source = Some(source());
    let page = html(&report).unwrap();
    assert!(page.contains("&lt;script&gt;") && page.contains("site-a/&lt;casemate&gt;"));
    assert!(!page.contains("<script") && !page.contains("<casemate"));
    assert!(page.contains("emulated") && page.contains("compare it"));
}

#[test]
fn the_same_report_has_the_same_identifiers_and_claims_nothing() {
    let mut report = report();
    report.source = Some(source());
    let document = oscal(&report).unwrap();
    assert_eq!(document, oscal(&report).unwrap());
    let text = document.to_string();
    assert!(!text.contains("\"findings\"") && !text.contains("satisfied"));
    assert!(text.contains("Not covered"));
}
