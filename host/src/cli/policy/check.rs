//! `casemate policy check`.

use std::path::PathBuf;
use std::time::SystemTime;

use casemate_policy::document::MAX_DOCUMENT;
use casemate_policy::mark::{Candidate, MarkStore};
use casemate_policy::sign::{MAX_SIGNATURES_LEN, SignerKey, Trust};
use casemate_policy::{Fingerprint, HostPolicy, Timestamp};
use clap::Args;
use serde::Serialize;

use super::{files, read_text};
use crate::agent::api::Failure;
use crate::agent::authority::beside;
use crate::cli::{print_bytes, print_json};

/// What is checked, and who is trusted.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The policy.
    policy: PathBuf,
    /// Its file of signatures (default: the policy's name with .sig behind it, if it is there).
    #[arg(long, value_name = "FILE")]
    signatures: Option<PathBuf>,
    /// A signer's key (ed25519:…); once for each. Without any, signatures are not checked.
    #[arg(long, value_name = "KEY")]
    trust: Vec<SignerKey>,
    /// How many of them must have signed (default: all).
    #[arg(long, value_name = "N", requires = "trust")]
    threshold: Option<usize>,
    /// Check as of this moment (default: now).
    #[arg(long, value_name = "TIME")]
    at: Option<Timestamp>,
    /// A host's mark of the newest policy it had in force (policy.mark in its state folder).
    #[arg(long, value_name = "FILE")]
    mark: Option<PathBuf>,
}

#[derive(Serialize)]
struct Checked<'a> {
    policy: String,
    host: &'a str,
    version: u64,
    digest: Fingerprint,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_before: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_after: Option<Timestamp>,
    signatures_checked: bool,
    signers: Vec<SignerKey>,
    owners: Vec<&'a str>,
    people: Option<usize>,
    notes: Vec<String>,
}

/// Checks a policy.
pub fn run(args: &CheckArgs, json: bool) -> Result<u8, Failure> {
    let name = args.policy.display().to_string();
    let text = read_text(&args.policy, MAX_DOCUMENT as usize)?;
    let beside = beside(&args.policy);
    let file = args
        .signatures
        .as_ref()
        .or(beside.exists().then_some(&beside));
    let signatures = file
        .map(|f| files::read(f, MAX_SIGNATURES_LEN))
        .transpose()?;
    let trust = (!args.trust.is_empty()).then(|| {
        let threshold = args.threshold.unwrap_or(args.trust.len());
        Trust::new(args.trust.iter().copied(), threshold)
    });
    let trust = trust
        .transpose()
        .map_err(|e| Failure::new("USAGE", e.to_string()))?;
    let failed = |e: casemate_policy::mark::AdmitError| Failure::new(e.code(), e.to_string());
    let mark = match &args.mark {
        Some(path) if !path.exists() => {
            return Err(Failure::new("FILE", format!("no {}", path.display())));
        }
        Some(path) => MarkStore::new(path).read().map_err(failed)?,
        None => None,
    };
    let candidate = Candidate {
        file: &name,
        text: &text,
        signatures: signatures.as_deref(),
    };
    let now = args.at.unwrap_or_else(|| Timestamp::of(SystemTime::now()));
    // Without keys nothing is said of signatures, so a mark that knows them must not refuse that.
    let mark = mark.map(|mut mark| {
        mark.signed &= trust.is_some();
        mark
    });
    let admitted = candidate
        .admit(trust.as_ref(), mark.as_ref(), now)
        .map_err(failed)?;
    let policy = &admitted.policy;
    let owners = policy.guests().map_or_else(Vec::new, |book| {
        book.rules()
            .iter()
            .map(|rules| rules.owner.as_str())
            .collect()
    });
    let checked = Checked {
        policy: name,
        host: &policy.host.name,
        version: policy.version,
        digest: policy.digest(),
        not_before: policy.validity.not_before,
        not_after: policy.validity.not_after,
        signatures_checked: trust.is_some(),
        signers: admitted.signers.iter().copied().collect(),
        owners,
        people: policy.people().map(|people| people.persons().len()),
        notes: notes(policy, trust.is_some()),
    };
    if json {
        return print_json(&checked);
    }
    print_bytes(table(&checked).as_bytes())
}

/// What is no error, and what its author should have meant.
fn notes(policy: &HostPolicy, signatures_checked: bool) -> Vec<String> {
    let mut notes = Vec::new();
    if !signatures_checked {
        notes.push("signatures were not checked; name the signers with --trust".to_owned());
    }
    if policy.version == 0 {
        notes.push("no version: a host cannot tell this text from an older one".to_owned());
    }
    if policy.validity.not_after.is_none() {
        notes.push("no not_after: it holds for ever".to_owned());
    }
    if policy.technologies.allow_emulated {
        notes.push("emulated technology counts: it protects nothing from its host".to_owned());
    }
    if policy.technologies.allowed.is_empty() {
        notes.push("technologies.allowed is empty: nothing starts here".to_owned());
    }
    match policy.guests() {
        None => notes.push("no [[guest]]: every guest may be here".to_owned()),
        Some(book) if book.rules().is_empty() => {
            notes.push("guest = []: no guest may be here".to_owned());
        }
        Some(_) => {}
    }
    if policy.people().is_none() {
        notes.push(
            "no [[person]]: whoever may open the agent's socket may do everything".to_owned(),
        );
    }
    notes
}

fn table(checked: &Checked<'_>) -> String {
    let moment = |time: Option<Timestamp>| time.map_or_else(|| "-".to_owned(), |t| t.to_string());
    let signers: Vec<String> = checked.signers.iter().map(SignerKey::to_string).collect();
    let mut text = format!(
        "{} is a policy for {}\n  version   {}\n  sha256    {}\n  valid     {} to {}\n  signers   {}\n  owners    {}\n",
        checked.policy,
        checked.host,
        checked.version,
        checked.digest,
        moment(checked.not_before),
        moment(checked.not_after),
        signers.join(", "),
        checked.owners.join(", "),
    );
    for note in &checked.notes {
        text.push_str(&format!("  note      {note}\n"));
    }
    text
}
