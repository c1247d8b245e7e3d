//! in-toto statements with SLSA verification summaries for what was launched.
//!
//! Formats: <https://in-toto.io/Statement/v1>, <https://slsa.dev/verification_summary/v1>. The statement is not signed by
//! itself: the record it names is, in the ledger or the bundle it was made from.

use serde_json::{Value, json};

use crate::ledger::{Detail, Outcome, Record, merkle};

/// The statement of a launch, or nothing if the record is none or names no digest.
///
/// Subjects are the launch digest and the inputs whose digests the record has (details `measurement` or `launch_digest`,
/// and `input.<name>`, hex). It says PASSED for a launch that was done and FAILED for one that was not; and it claims no
/// SLSA level, for how an image was built is not known here.
pub fn statement(record: &Record, origin: &str) -> Option<Value> {
    if record.action != "launch" || !matches!(record.outcome, Outcome::Done | Outcome::Failed) {
        return None;
    }
    let subjects = subjects(record);
    if subjects.is_empty() {
        return None;
    }
    let passed = record.outcome == Outcome::Done;
    let leaf = hex::encode(merkle::leaf_hash(record.canonical().as_bytes()));
    let policy = match record.detail.get("policy") {
        Some(Detail::Text(digest)) => json!({
            "uri": format!("casemate:{origin}/policy"),
            "digest": { "sha256": digest.trim_start_matches("sha256:") },
        }),
        _ => json!({ "uri": format!("casemate:{origin}/policy") }),
    };
    Some(json!({
        "_type": IN_TOTO,
        "subject": subjects,
        "predicateType": "https://slsa.dev/verification_summary/v1",
        "predicate": {
            "verifier": { "id": format!("casemate:{origin}") },
            "timeVerified": record.time,
            "resourceUri": format!("casemate:{origin}/guest/{}", record.object),
            "policy": policy,
            "inputAttestations": [{
                "uri": format!("casemate:{origin}/record/{}", record.seq),
                "digest": { "sha256": leaf },
            }],
            "verificationResult": if passed { "PASSED" } else { "FAILED" },
            "verifiedLevels": if passed { json!(["SLSA_BUILD_LEVEL_UNEVALUATED"]) } else { json!([]) },
            "casemate_emulated": record.emulated,
        },
    }))
}

fn subjects(record: &Record) -> Vec<Value> {
    let mut subjects = Vec::new();
    for (name, value) in &record.detail {
        let Detail::Text(digest) = value else {
            continue;
        };
        let launch = name == "measurement" || name == "launch_digest";
        let input = name.strip_prefix("input.");
        // A SEV measurement is an HMAC with its nonce (48 bytes), an SNP launch digest is SHA-384 (48 bytes as well).
        let algorithm = match (digest.len(), name.as_str()) {
            (64, _) => "sha256",
            (96, "measurement") => "sevMeasurement",
            (96, _) => "sha384",
            _ => continue,
        };
        if launch || input.is_some() {
            let name = input.unwrap_or(&record.object);
            subjects.push(json!({ "name": name, "digest": { algorithm: digest } }));
        }
    }
    subjects
}

/// The type of every statement.
pub const IN_TOTO: &str = "https://in-toto.io/Statement/v1";
