//! `casemate attest report`: what a report says, before anybody believes it.

use std::fmt::Write as _;
use std::path::PathBuf;

use casemate_attest::evidence::{Evidence, MAX_INPUT, decode};
use casemate_attest::product::Product;
use casemate_attest::report::Report;
use casemate_attest::tcb::RawTcb;
use casemate_attest::verify::{Check, CheckResult};
use serde_json::{Value, json};

use super::report_view::ReportView;
use super::shared::read_evidence;
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};

/// Arguments of `casemate attest report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The report: raw, hex, base64, an Azure HCL blob or a MSG_REPORT_RSP.
    file: PathBuf,
}

/// Shows every field.
pub fn run(args: &Args, json: bool) -> Result<u8, Failure> {
    let name = args.file.display();
    let evidence = decode(&read_evidence(&args.file, MAX_INPUT)?)
        .map_err(|e| Failure::new(e.code(), format!("{name}: {e}")))?;
    let report = Report::parse(&evidence.report)
        .map_err(|e| Failure::new("REPORT_INVALID", format!("{name}: {e}")))?;
    if json {
        print_json(&json!({
            "verified": false,
            "note": NOTE,
            "source": evidence.source_format.to_string(),
            "report": ReportView::of(&report, None),
            "azure": azure(&evidence, &report),
        }))
    } else {
        print_bytes(table(&evidence, &report).as_bytes())
    }
}

/// Every field in the order of AMD's specification, for the table.
fn fields(report: &Report) -> Vec<(String, Value)> {
    let product = report.product();
    let text = |value: &dyn std::fmt::Display| Value::from(value.to_string());
    let hexed = |bytes: &[u8]| Value::from(hex::encode(bytes));
    let mut fields = Vec::new();
    let mut put = |name: &str, value| fields.push((name.to_owned(), value));
    put("version", text(&report.version()));
    put("guest_svn", report.guest_svn().into());
    put("guest_policy", text(&report.policy()));
    put("family_id", hexed(&report.family_id()));
    put("image_id", hexed(&report.image_id()));
    put("vmpl", report.vmpl().into());
    put("current_tcb", tcb(report.current_tcb(), product));
    put("platform_info", text(&report.platform_info()));
    put("signing_key", text(&report.signing_key()));
    put("author_key", report.has_author_key().into());
    put("chip_key_masked", report.masks_chip_key().into());
    put("report_data", hexed(&report.report_data()));
    put("measurement", hexed(&report.measurement()));
    put("host_data", hexed(&report.host_data()));
    put("id_key_digest", hexed(&report.id_key_digest()));
    put("author_key_digest", hexed(&report.author_key_digest()));
    put("report_id", hexed(&report.report_id()));
    put("report_id_ma", hexed(&report.report_id_ma()));
    put("migration_agent", report.has_migration_agent().into());
    put("reported_tcb", tcb(report.reported_tcb(), product));
    put(
        "product",
        report.product().map_or(Value::Null, |p| text(&p)),
    );
    put("cpuid", report.cpuid().map_or(Value::Null, |c| text(&c)));
    put("chip_id", hexed(&report.chip_id()));
    put("committed_tcb", tcb(report.committed_tcb(), product));
    put("current_firmware", text(&report.current_firmware()));
    put("committed_firmware", text(&report.committed_firmware()));
    put("launch_tcb", tcb(report.launch_tcb(), product));
    put(
        "launch_mitigations",
        mitigations(report.launch_mitigations()),
    );
    put(
        "current_mitigations",
        mitigations(report.current_mitigations()),
    );
    let signature = report.signature();
    put("signature", signature.map_or(Value::Null, |s| hexed(&s)));
    fields
}

/// Parts where the report names its product; V2 does not, and the byte order is the product's.
fn tcb(raw: RawTcb, product: Option<Product>) -> Value {
    match product {
        Some(product) => raw.of(product).to_string().into(),
        None => format!("raw {}", hex::encode(raw.0)).into(),
    }
}

fn mitigations(vector: Option<u64>) -> Value {
    vector.map_or(Value::Null, |vector| format!("{vector:#x}").into())
}

fn azure(evidence: &Evidence, report: &Report) -> Value {
    match &evidence.azure {
        Some(runtime) => json!({ "claims": runtime.claims(), "check": runtime.check(report) }),
        None => Value::Null,
    }
}

fn table(evidence: &Evidence, report: &Report) -> String {
    let mut text = format!("{NOTE}\nsource: {}\n", evidence.source_format);
    for (name, value) in fields(report) {
        let value = match value {
            Value::String(value) => value,
            Value::Null => "-".to_owned(),
            other => other.to_string(),
        };
        let _ = writeln!(text, "  {name:<20} {value}");
    }
    if let Some(runtime) = &evidence.azure {
        let Check { result, code, .. } = runtime.check(report);
        let bound = match result {
            CheckResult::Accepted => "its SHA-256 is in report_data".to_owned(),
            _ => format!("NOT what report_data binds [{}]", code.unwrap_or_default()),
        };
        let _ = writeln!(text, "Azure runtime data: {bound}");
        let _ = writeln!(text, "  {}", runtime.claims());
    }
    text
}

const NOTE: &str =
    "claims, nothing verified: casemate attest verify decides whether to believe them";
