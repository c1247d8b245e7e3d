//! `casemate evidence export`.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use casemate_policy::bundle::{self, BundleError, Exported, Selection};
use casemate_policy::export::{otlp, statement, syslog};
use casemate_policy::ledger::{self, Record, cosign};

use super::source::{self, Source, steady};
use super::{ExportArgs, ExportFormat};
use crate::agent::api::Failure;
use crate::cli::{output_failed, print_bytes, print_json};

/// Exports a ledger, or of a bundle the records.
pub fn run(args: ExportArgs, json: bool) -> Result<u8, Failure> {
    let exported = match args.format {
        ExportFormat::Bundle => bundle(args),
        ExportFormat::Tiles => tiles(&args),
        _ => text(args),
    }?;
    if json {
        return print_json(&exported);
    }
    print_bytes(
        format!(
            "{} records of {} exported, up to record {} under its checkpoint; {} are not signed yet\n",
            exported.records, exported.origin, exported.size, exported.uncovered
        )
        .as_bytes(),
    )
}

fn bundle(args: ExportArgs) -> Result<Exported, Failure> {
    let source = Source::ledger(&args.source)?;
    let filter = source::filter(args.filter)?;
    let mut since = source::notes(&args.checkpoint)?;
    since.extend(steady(|| Ok(cosign::stored(source.path())?))?);
    let only = |record: &Record| filter.matches(record);
    let selection = Selection {
        only: (!filter.is_empty()).then_some(&only),
        since,
    };
    steady(|| bundle::export(source.path(), source.trusted(), &selection, &args.out))
}

/// The log as anybody can serve it: tiles, entry bundles and checkpoint.
fn tiles(args: &ExportArgs) -> Result<Exported, Failure> {
    let source = Source::ledger(&args.source)?;
    fs::create_dir(&args.out)
        .map_err(|e| output_failed(&format!("{}: {e}", args.out.display())))?;
    steady(|| {
        let mut leaves = Vec::new();
        let each = &mut |_: Record, leaf: &str| leaves.push(leaf.to_owned());
        let (audited, tree) = ledger::audit_with_tree(source.path(), source.trusted(), &[], each)?;
        let note = audited
            .last_note
            .as_ref()
            .ok_or(BundleError::NothingSigned)?;
        tree.export(&args.out)?;
        ledger::tiles::export_entries(&args.out, audited.base.size(), &leaves)?;
        fs::write(args.out.join("checkpoint"), note)?;
        let checkpoint = audited.last_checkpoint.as_ref();
        Ok(Exported {
            origin: checkpoint.map(|c| c.origin.clone()).unwrap_or_default(),
            records: leaves.len() as u64,
            size: checkpoint.map_or(0, |c| c.size),
            uncovered: audited.uncovered(),
        })
    })
}

fn text(args: ExportArgs) -> Result<Exported, Failure> {
    let source = Source::open(&args.source)?;
    let (verified, records) = source.records(&source::filter(args.filter)?)?;
    let origin = &verified.origin;
    let host = origin.split('/').next().unwrap_or(origin);
    let lines: Vec<String> = match args.format {
        ExportFormat::Syslog => records.iter().map(|record| syslog(record, host)).collect(),
        ExportFormat::InToto => {
            let statements = records
                .iter()
                .filter_map(|record| statement(record, origin));
            statements.map(|statement| statement.to_string()).collect()
        }
        _ => records
            .chunks(BATCH)
            .map(|batch| otlp(batch, host).to_string())
            .collect(),
    };
    write_new(&args.out, &lines)?;
    let records = match args.format {
        ExportFormat::InToto => lines.len(),
        _ => records.len(),
    };
    Ok(Exported {
        origin: verified.origin,
        records: records as u64,
        size: verified.size,
        uncovered: verified.uncovered,
    })
}

fn write_new(path: &Path, lines: &[String]) -> Result<(), Failure> {
    let failed = |e: std::io::Error| output_failed(&format!("{}: {e}", path.display()));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let mut text = lines.join("\n");
    if !text.is_empty() {
        text.push('\n');
    }
    file.write_all(text.as_bytes()).map_err(failed)
}

/// Records in one OTLP request.
const BATCH: usize = 500;
