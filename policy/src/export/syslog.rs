//! RFC 5424.

use super::{outcome, summary};
use crate::ledger::{Outcome, Record};

/// A record as one syslog message, without its frame or line feed. `host` is the HOSTNAME.
///
/// The facility is *log audit* (13); refusals and failures are warnings, the rest notices. The record's fields are in the
/// element `casemate@32473` (the private enterprise number that RFC 5612 keeps for documentation).
pub fn syslog(record: &Record, host: &str) -> String {
    let severity = match record.outcome {
        Outcome::Refused | Outcome::Failed => WARNING,
        Outcome::Allowed | Outcome::Done => NOTICE,
    };
    let priority = AUDIT * 8 + severity;
    let parameters = [
        ("seq", record.seq.to_string()),
        ("actor", record.actor.clone()),
        ("action", record.action.clone()),
        ("object", record.object.clone()),
        ("outcome", outcome(record.outcome).to_owned()),
        ("code", record.code.clone()),
        ("emulated", record.emulated.to_string()),
    ];
    let mut element = String::from("[casemate@32473");
    for (name, value) in parameters {
        element.push_str(&format!(" {name}=\"{}\"", escaped(&value)));
    }
    element.push(']');
    // RFC 5424 has microseconds at most: 1970-01-01T00:00:00.000000Z
    let time = record.time.get(..26).unwrap_or("-");
    let name = printable(&record.action, 32);
    let host = printable(host, 255);
    let text: String = summary(record)
        .chars()
        .filter(|c| !c.is_control())
        .collect();
    format!("<{priority}>1 {time}Z {host} casemate - {name} {element} \u{feff}{text}")
}

fn escaped(value: &str) -> String {
    let mut text = String::new();
    for c in value.chars() {
        if matches!(c, '"' | '\\' | ']') {
            text.push('\\');
        }
        text.push(if c.is_control() { ' ' } else { c });
    }
    text
}

/// PRINTUSASCII of at most so many characters; NILVALUE if nothing is left.
fn printable(value: &str, most: usize) -> String {
    let text: String = value
        .chars()
        .filter(char::is_ascii_graphic)
        .take(most)
        .collect();
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

const AUDIT: u8 = 13;
const WARNING: u8 = 4;
const NOTICE: u8 = 5;
