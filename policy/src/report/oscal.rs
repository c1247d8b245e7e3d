//! OSCAL assessment results, JSON, version 1.2.3 (<https://pages.nist.gov/OSCAL/>).
//!
//! Observations only: no findings and no risks, for these would say whether a control is met.

use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use super::{Control, DISCLAIMER, Framework, Report, ReportError, Source};

/// The report as an `assessment-results` document. The same report gives the same document, with the same identifiers.
pub fn oscal(report: &Report) -> Result<Value, ReportError> {
    let source = report.source.as_ref().ok_or(ReportError::Unverified)?;
    let results: Vec<Value> = report
        .frameworks
        .iter()
        .map(|framework| result(framework, report, source))
        .collect();
    Ok(json!({ "assessment-results": {
        "uuid": uuid(source, "assessment-results"),
        "metadata": {
            "title": format!("Recorded evidence of {}", source.origin),
            "last-modified": source.time,
            "version": source.size.to_string(),
            "oscal-version": "1.2.3",
            "props": [
                property("checkpoint-root", &source.root),
                property("checkpoint-size", &source.size.to_string()),
                property("log-key", &source.key),
                property("log-key-trusted", &source.key_trusted.to_string()),
            ],
            "remarks": DISCLAIMER,
        },
        "import-ap": { "href": format!("#{}", uuid(source, "plan")) },
        "results": results,
        "back-matter": { "resources": [{
            "uuid": uuid(source, "plan"),
            "title": "No assessment plan",
            "description": "The records were collected continuously by the host; no plan was imported.",
        }, {
            "uuid": uuid(source, "ledger"),
            "title": "Evidence ledger",
            "description": format!(
                "The Merkle log {} of {} records with root {}. `casemate evidence verify` verifies it, or a bundle of \
                 it, offline.",
                source.origin, source.size, source.root
            ),
        }] },
    }}))
}

fn result(framework: &Framework, report: &Report, source: &Source) -> Value {
    let controls: Vec<Value> = framework
        .control
        .iter()
        .map(|control| json!({ "control-id": control.id }))
        .collect();
    let observations: Vec<Value> = framework
        .control
        .iter()
        .map(|control| observation(control, source))
        .collect();
    let mut result = json!({
        "uuid": uuid(source, &framework.id),
        "title": framework.title,
        "description": format!("What the records show for controls of {}. {DISCLAIMER}", framework.title),
        "start": seconds(report.all.since.as_deref().unwrap_or(&source.time)),
        "reviewed-controls": { "control-selections": [{ "include-controls": controls }] },
        "observations": observations,
    });
    if let (Some(until), Some(object)) = (&report.all.until, result.as_object_mut()) {
        object.insert("end".to_owned(), json!(seconds(until)));
    }
    result
}

fn observation(control: &Control, source: &Source) -> Value {
    let observed = &control.observed;
    let collected = observed.until.as_deref().unwrap_or(&source.time);
    let mut value = json!({
        "uuid": uuid(source, &control.id),
        "title": format!("{}: {}", control.id, control.title),
        "description": format!("{} {}", control.shows, observed.sentence()),
        "methods": ["EXAMINE"],
        "types": ["control-objective"],
        "collected": seconds(collected),
        "props": [
            property("control-id", &control.id),
            property("records", &observed.records.to_string()),
            property("refused", &observed.refused.to_string()),
            property("failed", &observed.failed.to_string()),
            property("emulated", &observed.emulated.to_string()),
        ],
        "remarks": format!("Not covered: {}", control.not_covered),
    });
    if observed.records > 0 {
        let evidence: Vec<Value> = observed
            .first
            .iter()
            .map(|seq| {
                json!({
                    "href": format!("#{}", uuid(source, "ledger")),
                    "description": format!("record {seq}"),
                    "props": [property("record", &seq.to_string())],
                })
            })
            .collect();
        if let Some(object) = value.as_object_mut() {
            object.insert("relevant-evidence".to_owned(), evidence.into());
        }
    }
    value
}

fn property(name: &str, value: &str) -> Value {
    json!({ "name": name, "ns": NAMESPACE, "value": value })
}

/// OSCAL's dates have a zone; seconds are enough.
fn seconds(time: &str) -> String {
    let parsed = humantime::parse_rfc3339(time).unwrap_or(std::time::UNIX_EPOCH);
    humantime::format_rfc3339_seconds(parsed).to_string()
}

/// A version 5 identifier (RFC 9562, 5.5, with SHA-256) of a part of this report.
fn uuid(source: &Source, part: &str) -> String {
    let hash = digest(
        &SHA256,
        format!("{}\n{}\n{part}", source.origin, source.root).as_bytes(),
    );
    let hex = hex::encode(hash);
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!(
        "{}-{}-5{}-a{}-{}",
        part(0, 8),
        part(8, 12),
        part(13, 16),
        part(17, 20),
        part(20, 32)
    )
}

const NAMESPACE: &str = "https://casemate.example/ns/oscal";
