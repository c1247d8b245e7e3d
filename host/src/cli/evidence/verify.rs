//! `casemate evidence verify|checkpoint|cosign`.

use std::path::{Path, PathBuf};

use casemate_policy::bundle::BundleError;
use casemate_policy::ledger::{self, Witnesses, cosign as store};

use super::SourceArgs;
use super::source::{self, Source, Verified, steady};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};

/// Verifies a ledger or a bundle.
pub fn run(
    args: &SourceArgs,
    held: &[PathBuf],
    witnesses: &[PathBuf],
    threshold: Option<usize>,
    json: bool,
) -> Result<u8, Failure> {
    let witnesses = source::witnesses(witnesses, threshold)?;
    let mut held = source::notes(held)?;
    if held.is_empty() {
        held = source::notes(&source::kept_beside(args)?)?;
    }
    let source = Source::open(args)?.expecting(held, witnesses);
    let (verified, ()) = source.fold(|| (), |(), _| {})?;
    if json {
        return print_json(&verified);
    }
    print_bytes(rendered(&verified).as_bytes())
}

/// Prints the newest checkpoint.
pub fn checkpoint(args: &SourceArgs) -> Result<u8, Failure> {
    let source = Source::ledger(args)?;
    let note = steady(source.path(), || {
        let audited = ledger::audit(source.path(), source.trusted(), &[], &mut |_, _| {})?;
        audited.last_note.ok_or(BundleError::NothingSigned)
    })?;
    print_bytes(note.as_bytes())
}

/// Keeps a co-signed checkpoint.
pub fn cosign(
    args: &SourceArgs,
    note: &Path,
    witnesses: &[PathBuf],
    json: bool,
) -> Result<u8, Failure> {
    let source = Source::ledger(args)?;
    let witnesses: Witnesses = source::witnesses(witnesses, None)?;
    let note = source::text(note)?;
    let signed = steady(source.path(), || {
        Ok(store::store(
            source.path(),
            source.trusted(),
            &witnesses,
            &note,
        )?)
    })?;
    if json {
        let list: Vec<_> = signed
            .iter()
            .map(|(name, time)| serde_json::json!({ "witness": name, "time": time }))
            .collect();
        return print_json(&serde_json::json!({ "cosigned": list }));
    }
    let names: Vec<&str> = signed.iter().map(|(name, _)| *name).collect();
    print_bytes(format!("kept; co-signed by {}\n", names.join(", ")).as_bytes())
}

fn rendered(verified: &Verified) -> String {
    let mut text = format!(
        "{} of {} verified: {} records ({} emulated), root {}, {} not yet under a checkpoint\n",
        verified.what,
        verified.origin,
        verified.records,
        verified.emulated,
        verified.root,
        verified.uncovered
    );
    if verified.first > 0 {
        text.push_str(&format!(
            "records before {} were removed by retention\n",
            verified.first
        ));
    }
    if verified.extends > 0 {
        text.push_str(&format!(
            "extends {} checkpoints kept from before\n",
            verified.extends
        ));
    }
    if let Some(size) = verified.witnessed {
        text.push_str(&format!(
            "the first {size} records are co-signed by enough witnesses\n"
        ));
    }
    if verified.key_trusted {
        text.push_str(&format!("key {}\n", verified.key));
    } else {
        text.push_str(&format!(
            "key {} — NOT compared with one that was named; give it with --key\n",
            verified.key
        ));
    }
    text
}
