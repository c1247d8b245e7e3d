//! `casemate evidence tail|query`.

use std::path::Path;
use std::time::Duration;

use casemate_policy::export::summary;
use casemate_policy::ledger::{Follower, LedgerError, Record};

use super::source::{self, Source};
use super::{FilterArgs, SourceArgs};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};

/// Prints the newest records, and those that come.
pub fn tail(ledger: &Path, lines: usize, follow: bool, json: bool) -> Result<u8, Failure> {
    let unreadable = |error: LedgerError| {
        let text = format!("{}: {error}", ledger.display());
        Failure::new("EVIDENCE_UNAVAILABLE", text)
    };
    let mut follower = Follower::open(ledger).map_err(unreadable)?;
    let records = follower.poll().map_err(unreadable)?;
    let newest = records.len().saturating_sub(lines);
    let newest = records.get(newest..).unwrap_or_default();
    if json && !follow {
        return print_json(&serde_json::json!({ "records": newest, "verified": false }));
    }
    print(newest, json)?;
    if !follow {
        return Ok(0);
    }
    loop {
        std::thread::sleep(Duration::from_millis(200));
        print(&follower.poll().map_err(unreadable)?, json)?;
    }
}

/// Verifies, and prints what matches.
pub fn query(source: &SourceArgs, filter: FilterArgs, json: bool) -> Result<u8, Failure> {
    let (verified, records) = Source::open(source)?.records(&source::filter(filter)?)?;
    if json {
        return print_json(&serde_json::json!({ "verified": verified, "records": records }));
    }
    print(&records, false)?;
    let trusted = if verified.key_trusted {
        "verified"
    } else {
        "verified by the key beside them only; give --key"
    };
    print_bytes(
        format!(
            "{} of {} records, {trusted}\n",
            records.len(),
            verified.records
        )
        .as_bytes(),
    )
}

fn print(records: &[Record], json: bool) -> Result<(), Failure> {
    let mut text = String::new();
    for record in records {
        if json {
            text.push_str(&record.canonical());
        } else {
            // Names come from descriptions and peers; a terminal must not obey them.
            let line: String = summary(record)
                .chars()
                .filter(|c| !c.is_control())
                .collect();
            text.push_str(&format!("{:>8}  {}  {line}", record.seq, record.time));
        }
        text.push('\n');
    }
    print_bytes(text.as_bytes()).map(drop)
}
