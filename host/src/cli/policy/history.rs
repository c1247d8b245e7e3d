//! `casemate policy explain|diff`: decisions of a ledger, made again.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use casemate_policy::history::{self, Difference, Explained, Recorded};
use casemate_policy::ledger::{self, VerifyingKey};
use casemate_policy::{Fingerprint, HostPolicy, Timestamp};
use clap::Args;

use super::{files, load, view};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};

/// A ledger, and the key that it must be signed with.
#[derive(Debug, Args)]
pub struct LedgerArgs {
    /// The ledger file.
    #[arg(long, value_name = "FILE")]
    ledger: PathBuf,
    /// The ledger's public key, a C2SP verifier key in a file.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
}

/// Which decision.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The record's number in the ledger.
    seq: u64,
    #[command(flatten)]
    ledger: LedgerArgs,
    /// A policy, or a folder of them such as an agent's `policies`; once for each.
    #[arg(long, value_name = "PATH", required = true)]
    policy: Vec<PathBuf>,
}

/// Which decisions, and by which policies.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The new policy.
    new: PathBuf,
    /// The old policy (default: what is recorded).
    #[arg(long, value_name = "FILE")]
    old: Option<PathBuf>,
    #[command(flatten)]
    ledger: LedgerArgs,
    /// Only decisions of the last so many days (default: all).
    #[arg(long, value_name = "N")]
    days: Option<u64>,
}

/// Shows why.
pub fn explain(args: &ExplainArgs, json: bool) -> Result<u8, Failure> {
    let recorded = args.ledger.read()?;
    let one = recorded.into_iter().find(|r| r.seq == args.seq);
    let one = one.ok_or_else(|| {
        let text = format!(
            "record {} of {} is no decision",
            args.seq,
            args.ledger.ledger.display()
        );
        Failure::new("NO_DECISION", text)
    })?;
    let policies = known(&args.policy)?;
    // The exit status is that of what cannot be told.
    let explained = one
        .explain(|digest| policies.get(&digest).cloned())
        .map_err(|e| Failure::new("EVIDENCE_UNAVAILABLE", e.to_string()))?;
    if json {
        print_json(&explained)?;
    } else {
        print_bytes(explained_text(&one, &explained).as_bytes())?;
    }
    Ok(u8::from(!explained.agrees))
}

/// Shows what changes.
pub fn diff(args: &DiffArgs, json: bool) -> Result<u8, Failure> {
    let new = load(&args.new)?;
    let old = args.old.as_deref().map(load).transpose()?;
    let now = Timestamp::of(SystemTime::now()).unix();
    let since = args
        .days
        .map_or(0, |days| now.saturating_sub(days.saturating_mul(DAY)));
    let recorded = args.ledger.read()?;
    let difference = history::diff(recorded, Timestamp::from_unix(since), old.as_ref(), &new);
    if json {
        print_json(&difference)?;
    } else {
        print_bytes(difference_text(&difference).as_bytes())?;
    }
    Ok(u8::from(!difference.changed.is_empty()))
}

impl LedgerArgs {
    /// The decisions of a ledger that verifies; others tell nothing.
    fn read(&self) -> Result<Vec<Recorded>, Failure> {
        let failed = |file: &Path, e: &dyn std::fmt::Display| {
            Failure::new("EVIDENCE", format!("{}: {e}", file.display()))
        };
        let text = String::from_utf8(files::read(&self.key, files::MAX_KEY_FILE)?)
            .map_err(|e| failed(&self.key, &e))?;
        let key: VerifyingKey = text.trim().parse().map_err(|e| failed(&self.key, &e))?;
        let verified = ledger::verify(&self.ledger, &key).map_err(|e| failed(&self.ledger, &e))?;
        let records = verified.records().iter();
        Ok(records.filter_map(Recorded::of).collect())
    }
}

/// The policies of files and folders by their digest. In a folder, what is no policy is passed over.
fn known(paths: &[PathBuf]) -> Result<BTreeMap<Fingerprint, HostPolicy>, Failure> {
    let mut all = BTreeMap::new();
    for path in paths {
        if !path.is_dir() {
            let policy = load(path)?;
            all.insert(policy.digest(), policy);
            continue;
        }
        let failed = |e| Failure::new("FILE", format!("{}: {e}", path.display()));
        for entry in fs::read_dir(path).map_err(failed)? {
            let file = entry.map_err(failed)?.path();
            let toml = file.extension() == Some(OsStr::new("toml"));
            if let Some(policy) = toml.then(|| HostPolicy::load(&file).ok()).flatten() {
                all.insert(policy.digest(), policy);
            }
        }
    }
    Ok(all)
}

fn explained_text(recorded: &Recorded, explained: &Explained) -> String {
    let mut text = format!(
        "record {}: {} {:?} at {} by {}\n{}, by policy {}\n{}",
        explained.seq,
        recorded.action,
        recorded.object,
        recorded.time,
        explained.question.actor(),
        view::answer(&explained.decision),
        explained.policy,
        view::reasons(&explained.decision),
    );
    if !explained.agrees {
        text.push_str(&format!(
            "recorded was {}: another version, or a Rego policy, decided then\n",
            explained.recorded
        ));
    }
    text
}

fn difference_text(difference: &Difference) -> String {
    let mut text = String::new();
    for one in &difference.changed {
        let was = if one.was_allowed {
            "allowed"
        } else {
            "refused"
        };
        text.push_str(&format!(
            "record {}: {} {:?} at {}: was {was} ({}), would be {}\n",
            one.seq,
            one.action,
            one.object,
            one.time,
            one.was,
            view::answer(&one.now),
        ));
        text.push_str(&view::reasons(&one.now));
    }
    text.push_str(&format!(
        "{} of {} decisions would change; {} do not say what was asked\n",
        difference.changed.len(),
        difference.compared,
        difference.not_comparable
    ));
    text
}

/// Seconds.
const DAY: u64 = 86_400;
