//! OpenTelemetry logs in the OTLP/JSON file format (opentelemetry-proto 1.x, `ExportLogsServiceRequest`).

use serde_json::{Value, json};

use super::{outcome, summary};
use crate::ledger::{Detail, Outcome, Record};

/// Records as one `ExportLogsServiceRequest`; the file format has one such object a line.
pub fn otlp(records: &[Record], host: &str) -> Value {
    let records: Vec<Value> = records.iter().map(log_record).collect();
    json!({ "resourceLogs": [{
        "resource": { "attributes": [text("service.name", "casemate"), text("host.name", host)] },
        "scopeLogs": [{
            "scope": { "name": "casemate.evidence", "version": env!("CARGO_PKG_VERSION") },
            "logRecords": records,
        }],
    }]})
}

fn log_record(record: &Record) -> Value {
    let (number, severity) = match record.outcome {
        Outcome::Refused | Outcome::Failed => (13, "WARN"),
        Outcome::Allowed | Outcome::Done => (9, "INFO"),
    };
    let mut attributes = vec![
        integer("casemate.seq", record.seq),
        text("casemate.actor", &record.actor),
        text("casemate.action", &record.action),
        text("casemate.object", &record.object),
        text("casemate.outcome", outcome(record.outcome)),
        text("casemate.code", &record.code),
        flag("casemate.emulated", record.emulated),
        integer("casemate.monotonic_ns", record.monotonic_ns),
    ];
    for (name, value) in &record.detail {
        let name = format!("casemate.detail.{name}");
        attributes.push(match value {
            Detail::Flag(value) => flag(&name, *value),
            Detail::Number(value) => integer(&name, *value),
            Detail::Text(value) => text(&name, value),
            Detail::List(values) => {
                let values: Vec<Value> =
                    values.iter().map(|v| json!({ "stringValue": v })).collect();
                json!({ "key": name, "value": { "arrayValue": { "values": values } } })
            }
        });
    }
    json!({
        "timeUnixNano": unix_nanoseconds(&record.time),
        "severityNumber": number,
        "severityText": severity,
        "eventName": format!("casemate.{}", record.action),
        "body": { "stringValue": summary(record) },
        "attributes": attributes,
    })
}

/// 64-bit integers are decimal strings in OTLP/JSON.
fn unix_nanoseconds(time: &str) -> String {
    let since = humantime::parse_rfc3339(time)
        .ok()
        .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_nanos()).to_string()
}

fn text(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

fn integer(key: &str, value: u64) -> Value {
    json!({ "key": key, "value": { "intValue": value.to_string() } })
}

fn flag(key: &str, value: bool) -> Value {
    json!({ "key": key, "value": { "boolValue": value } })
}
