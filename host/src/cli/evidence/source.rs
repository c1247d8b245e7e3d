//! A ledger or a bundle, read and verified in the same way.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_policy::bundle::{self, BundleError, Expectations};
use casemate_policy::ledger::{
    self, Filter, LedgerError, Outcome, Record, VerifyingKey, WitnessKey, Witnesses, cosign,
};
use serde::Serialize;

use super::{FilterArgs, OutcomeArg, SourceArgs};
use crate::agent::api::Failure;
use crate::cli::attest::files;

/// What a verification found.
#[derive(Debug, Serialize)]
pub struct Verified {
    /// `ledger` or `bundle`.
    pub what: &'static str,
    /// The log.
    pub origin: String,
    /// Records in it.
    pub records: u64,
    /// The first of them.
    pub first: u64,
    /// The size of the tree in the newest checkpoint.
    pub size: u64,
    /// Root of the tree, hex.
    pub root: String,
    /// Records behind the newest checkpoint, which nothing signs yet.
    pub uncovered: u64,
    /// How many records say that an emulated technology was involved.
    pub emulated: u64,
    /// The newest key.
    pub key: String,
    /// Whether the key was given, and not taken from where the records are.
    pub key_trusted: bool,
    /// How many checkpoints kept from before the log extends.
    pub extends: usize,
    /// Up to which record enough witnesses have co-signed, if asked for.
    pub witnessed: Option<u64>,
}

/// Where the records are, and what is known about them.
pub struct Source {
    path: PathBuf,
    is_ledger: bool,
    expectations: Expectations,
    key_given: bool,
}

impl Source {
    /// Looks what is at the path, and reads the keys.
    pub fn open(args: &SourceArgs) -> Result<Self, Failure> {
        let path = args.path.clone();
        let is_ledger = is_ledger(&path)?;
        let key = match &args.key {
            Some(key) => Some(key.clone()),
            None => Some(beside(&path, "pub")).filter(|key| is_ledger || key.exists()),
        };
        let trusted = key.as_deref().map(read_key).transpose()?;
        Ok(Self {
            path,
            is_ledger,
            expectations: Expectations {
                trusted: trusted.into_iter().collect(),
                ..Expectations::default()
            },
            key_given: args.key.is_some(),
        })
    }

    /// The same, and it must be a ledger.
    pub fn ledger(args: &SourceArgs) -> Result<Self, Failure> {
        let source = Self::open(args)?;
        if source.is_ledger {
            return Ok(source);
        }
        let text = format!(
            "{} is no ledger; give the agent's `ledger` file",
            source.path.display()
        );
        Err(Failure::new("USAGE", text))
    }

    /// With checkpoints kept from before, and witnesses.
    pub fn expecting(mut self, held: Vec<String>, witnesses: Witnesses) -> Self {
        self.expectations.held = held;
        self.expectations.witnesses = witnesses;
        self
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The keys that are trusted.
    pub fn trusted(&self) -> &[VerifyingKey] {
        &self.expectations.trusted
    }

    /// Verifies everything, and keeps the records that match. They are believed only if this returns.
    pub fn records(&self, filter: &Filter) -> Result<(Verified, Vec<Record>), Failure> {
        steady(&self.path, || {
            let mut records = Vec::new();
            let verified = self.read(&mut |record| {
                if filter.matches(&record) {
                    records.push(record);
                }
            })?;
            Ok((verified, records))
        })
    }

    /// Verifies everything, with each record given to what `fresh` made.
    pub fn fold<T>(
        &self,
        fresh: impl Fn() -> T,
        mut each: impl FnMut(&mut T, Record),
    ) -> Result<(Verified, T), Failure> {
        steady(&self.path, || {
            let mut state = fresh();
            let verified = self.read(&mut |record| each(&mut state, record))?;
            Ok((verified, state))
        })
    }

    fn read(&self, each: &mut dyn FnMut(Record)) -> Result<Verified, BundleError> {
        let mut emulated = 0;
        let mut counted = |record: Record| {
            emulated += u64::from(record.emulated);
            each(record);
        };
        let mut verified = if self.is_ledger {
            self.read_ledger(&mut counted)?
        } else {
            self.read_bundle(&mut counted)?
        };
        verified.emulated = emulated;
        Ok(verified)
    }

    fn read_ledger(&self, each: &mut dyn FnMut(Record)) -> Result<Verified, BundleError> {
        let Expectations {
            trusted,
            held,
            witnesses,
        } = &self.expectations;
        let mut notes = held.clone();
        if witnesses.threshold() > 0 {
            notes.extend(cosign::stored(&self.path)?);
        }
        let audited = ledger::audit(&self.path, trusted, &notes, &mut |record, _| each(record))?;
        let checkpoint = audited.last_checkpoint.as_ref();
        Ok(Verified {
            what: "ledger",
            origin: checkpoint.map(|c| c.origin.clone()).unwrap_or_default(),
            records: audited.frontier.size() - audited.base.size(),
            first: audited.base.size(),
            size: checkpoint.map_or(0, |c| c.size),
            root: hex::encode(audited.frontier.root()),
            uncovered: audited.uncovered(),
            emulated: 0,
            key: audited
                .keys
                .last()
                .map(ToString::to_string)
                .unwrap_or_default(),
            key_trusted: self.key_given,
            extends: held.len(),
            witnessed: witnessed(witnesses, &notes, audited.last_note.as_deref())?,
        })
    }

    fn read_bundle(&self, each: &mut dyn FnMut(Record)) -> Result<Verified, BundleError> {
        let found = bundle::verify(&self.path, &self.expectations, each)?;
        Ok(Verified {
            what: "bundle",
            origin: found.manifest.origin,
            records: found.manifest.records,
            first: found.manifest.first,
            size: found.manifest.size,
            root: found.root,
            uncovered: 0,
            emulated: 0,
            key: found.keys.last().cloned().unwrap_or_default(),
            key_trusted: found.key_trusted && self.key_given,
            extends: self.expectations.held.len(),
            witnessed: found.witnessed,
        })
    }
}

/// A running agent may be in the middle of a line: then once more.
pub fn steady<T>(
    path: &Path,
    mut read: impl FnMut() -> Result<T, BundleError>,
) -> Result<T, Failure> {
    for _ in 0..RETRIES {
        match read() {
            Err(BundleError::Ledger(LedgerError::TornTail { .. })) => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other.map_err(|error| failed(path, &error)),
        }
    }
    read().map_err(|error| failed(path, &error))
}

/// A refusal, or that it cannot be told.
pub fn failed(path: &Path, error: &BundleError) -> Failure {
    if error.cannot_tell() {
        return Failure::new(
            "EVIDENCE_UNAVAILABLE",
            format!("evidence: {}: {error}", path.display()),
        );
    }
    let code = format!("EVIDENCE_{}", error.code());
    Failure {
        code,
        error: format!("evidence: {}: {error}", path.display()),
    }
}

/// The conditions of the command line.
pub fn filter(args: FilterArgs) -> Result<Filter, Failure> {
    let time = |text: Option<String>| {
        let parse = |text: String| {
            let error = || {
                Failure::new(
                    "USAGE",
                    format!("{text} is no time; write 2026-01-31 or 2026-01-31T10:00:00Z"),
                )
            };
            Filter::time(&text).ok_or_else(error)
        };
        text.map(parse).transpose()
    };
    Ok(Filter {
        since: time(args.since)?,
        until: time(args.until)?,
        actor: args.actor,
        action: args.action,
        object: args.object,
        code: args.code,
        emulated: args.emulated,
        outcome: args.outcome.map(|outcome| match outcome {
            OutcomeArg::Allowed => Outcome::Allowed,
            OutcomeArg::Refused => Outcome::Refused,
            OutcomeArg::Done => Outcome::Done,
            OutcomeArg::Failed => Outcome::Failed,
        }),
    })
}

/// Signed notes in files.
pub fn notes(paths: &[PathBuf]) -> Result<Vec<String>, Failure> {
    paths.iter().map(|path| text(path)).collect()
}

/// The witnesses in files, of which `threshold` (or all) must have signed.
pub fn witnesses(paths: &[PathBuf], threshold: Option<usize>) -> Result<Witnesses, Failure> {
    let mut keys = Vec::new();
    for path in paths {
        let key: Result<WitnessKey, _> = text(path)?.trim().parse();
        keys.push(key.map_err(|e| unusable(path, &e))?);
    }
    let threshold = threshold.unwrap_or(keys.len());
    Witnesses::new(keys, threshold).map_err(|_| {
        let text = "the witnesses must be different keys, and at least as many as --threshold";
        Failure::new("USAGE", text)
    })
}

/// The checkpoint that somebody keeps beside a bundle, where none is named.
pub fn kept_beside(args: &SourceArgs) -> Result<Vec<PathBuf>, Failure> {
    let kept = beside(&args.path, "note");
    let of_bundle = kept.exists() && !is_ledger(&args.path)?;
    Ok(of_bundle.then_some(kept).into_iter().collect())
}

/// A text file of moderate size.
pub fn text(path: &Path) -> Result<String, Failure> {
    let unavailable = |failure: Failure| Failure::new("EVIDENCE_UNAVAILABLE", failure.error);
    let bytes = files::read(path, files::MAX_KEY_FILE).map_err(unavailable)?;
    String::from_utf8(bytes).map_err(|e| unusable(path, &e))
}

fn read_key(path: &Path) -> Result<VerifyingKey, Failure> {
    text(path)?.trim().parse().map_err(|e| unusable(path, &e))
}

fn witnessed(
    witnesses: &Witnesses,
    notes: &[String],
    newest: Option<&str>,
) -> Result<Option<u64>, BundleError> {
    if witnesses.threshold() == 0 {
        return Ok(None);
    }
    let mut sizes = Vec::new();
    let mut failed = ledger::NoteError::NotSigned;
    for note in notes.iter().map(String::as_str).chain(newest) {
        match witnesses.check(note) {
            Ok(_) => sizes.extend(ledger::Checkpoint::unverified(note).map(|c| c.size)),
            Err(error) => failed = error,
        }
    }
    let largest = sizes.into_iter().max();
    largest.map(Some).ok_or(BundleError::Witnesses(failed))
}

/// `all.tar` and what stands beside it: `all.tar.pub`, `all.tar.note`.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    PathBuf::from(name)
}

fn is_ledger(path: &Path) -> Result<bool, Failure> {
    if path.is_dir() {
        return Ok(false);
    }
    let mut head = [0; 15];
    let read = File::open(path).and_then(|mut file| file.read(&mut head));
    let read = read.map_err(|e| {
        let text = format!("{} cannot be read: {e}", path.display());
        Failure::new("EVIDENCE_UNAVAILABLE", text)
    })?;
    Ok(head
        .get(..read)
        .is_some_and(|head| head.starts_with(b"casemate-ledger")))
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new("EVIDENCE", format!("{}: {error}", path.display()))
}

const RETRIES: usize = 10;
