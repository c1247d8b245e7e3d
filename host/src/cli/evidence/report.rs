//! `casemate evidence report`.

use std::path::Path;
use std::time::SystemTime;

use casemate_policy::report::{self, Report, ReportError};

use super::source::Source;
use super::{ReportFormat, SourceArgs};
use crate::agent::api::Failure;
use crate::cli::attest::files;
use crate::cli::print_bytes;

/// Verifies, and sets the records beside controls.
pub fn run(args: &SourceArgs, format: ReportFormat, out: Option<&Path>) -> Result<u8, Failure> {
    let failed = |error: ReportError| Failure::new("REPORT", error.to_string());
    let empty = Report::new().map_err(failed)?;
    let (verified, mut report) =
        Source::open(args)?.fold(|| empty.clone(), |report, record| report.add(&record))?;
    report.source = Some(report::Source {
        origin: verified.origin,
        size: verified.size,
        root: verified.root,
        key: verified.key,
        key_trusted: verified.key_trusted,
        time: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
    });
    let text = match format {
        ReportFormat::Html => report::html(&report).map_err(failed)?,
        ReportFormat::Oscal => format!("{:#}\n", report::oscal(&report).map_err(failed)?),
    };
    match out {
        Some(path) => files::write(path, text.as_bytes()).map(|()| 0),
        None => print_bytes(text.as_bytes()),
    }
}
