//! Verifying a bundle, of which nothing is believed.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::members::{self, Digest};
use super::{
    BASE, Base, BundleError, CHECKPOINT, CONSISTENCY, Consistency, FORMAT, KEYS, Keys, Kind,
    MANIFEST, Manifest, PROOFS, PolicySeen, Proof, README, RECORDS,
};
use crate::ledger::merkle::{self, Frontier};
use crate::ledger::{Chain, Checkpoint, Record, VerifyingKey, Witnesses};

/// What the auditor knows.
#[derive(Default)]
pub struct Expectations {
    /// Keys of which one must be among the log's. Without any, the bundle is only shown to be whole in itself.
    pub trusted: Vec<VerifyingKey>,
    /// Checkpoints (signed notes) kept from before, each of which the bundle must extend.
    pub held: Vec<String>,
    /// Witnesses, of which enough must have co-signed one of the bundle's checkpoints.
    pub witnesses: Witnesses,
}

/// What a bundle that verified says.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Its manifest.
    pub manifest: Manifest,
    /// The root in its checkpoint, hex.
    pub root: String,
    /// The log's keys, oldest first.
    pub keys: Vec<String>,
    /// Whether one of these is trusted; if not, the bundle proves only that it is whole.
    pub key_trusted: bool,
    /// Up to which record enough witnesses have co-signed, if that was asked for.
    pub witnessed: Option<u64>,
}

/// Verifies a bundle and gives each of its records to `each` as it is read. Believe them only when this returns.
pub fn verify(
    path: &Path,
    expectations: &Expectations,
    each: &mut dyn FnMut(Record),
) -> Result<Found, BundleError> {
    let state = std::cell::RefCell::new(None);
    let digest = members::read(
        path,
        &mut |small| {
            *state.borrow_mut() = Some(State::new(small, expectations)?);
            Ok(())
        },
        &mut |line| match state.borrow_mut().as_mut() {
            Some(state) => state.record(line).map(&mut *each),
            None => Err(BundleError::malformed(RECORDS, "out of place")),
        },
    )?;
    let state = state.into_inner();
    let state = state.ok_or_else(|| BundleError::malformed(MANIFEST, "missing"))?;
    state.finish(&digest, expectations)
}

/// A checkpoint that somebody kept.
struct Held {
    checkpoint: Checkpoint,
    found: bool,
}

/// Everything but the records.
struct State {
    manifest: Manifest,
    chain: Chain,
    checkpoint: Checkpoint,
    note: String,
    earlier: Vec<(String, Checkpoint)>,
    held: Vec<Held>,
    /// Of a range, the tree so far.
    frontier: Frontier,
    /// Of a selection, the proofs of the records to come.
    proofs: VecDeque<Proof>,
    records: u64,
    policies: Vec<PolicySeen>,
}

impl State {
    fn new(
        small: BTreeMap<String, Vec<u8>>,
        expectations: &Expectations,
    ) -> Result<Self, BundleError> {
        let manifest: Manifest = parse(&small, MANIFEST)?;
        check_members(&small, &manifest)?;
        let keys: Keys = parse(&small, KEYS)?;
        let wrong = |what| move |source| BundleError::Signature { what, source };
        let key: VerifyingKey = keys.key.parse().map_err(wrong("key"))?;
        let chain = Chain::from_rotations(&keys.rotations, &key, &expectations.trusted)
            .map_err(wrong("chain of keys"))?;
        if !expectations.trusted.is_empty() && !chain.anchored() {
            return Err(BundleError::UntrustedKey);
        }
        let note = text(&small, CHECKPOINT)?;
        let checkpoint = Checkpoint::open(note, &chain.current).map_err(wrong("checkpoint"))?;
        if checkpoint.size != manifest.size || checkpoint.origin != manifest.origin {
            return Err(BundleError::malformed(MANIFEST, "of another checkpoint"));
        }
        let mut state = Self {
            note: note.to_owned(),
            earlier: Vec::new(),
            held: Vec::new(),
            frontier: Frontier::new(),
            proofs: VecDeque::new(),
            records: 0,
            policies: Vec::new(),
            manifest,
            chain,
            checkpoint,
        };
        state.kind(&small)?;
        for line in lines::<Consistency>(&small, CONSISTENCY)? {
            state.earlier(line)?;
        }
        for note in &expectations.held {
            let checkpoint = state.signed(note)?;
            let found = state.extends(&checkpoint)?;
            state.held.push(Held { checkpoint, found });
        }
        state.compare_held();
        Ok(state)
    }

    /// The base of a range, or the proofs of a selection.
    fn kind(&mut self, small: &BTreeMap<String, Vec<u8>>) -> Result<(), BundleError> {
        match self.manifest.kind {
            Kind::Range => {
                let base: Base = parse(small, BASE)?;
                let edge = Frontier::from_peaks(base.size, base.peaks);
                let edge = edge.filter(|edge| edge.size() == self.manifest.first);
                self.frontier =
                    edge.ok_or_else(|| BundleError::malformed(BASE, "not a tree's edge"))?;
            }
            Kind::Selection => self.proofs = lines::<Proof>(small, PROOFS)?.into(),
        }
        Ok(())
    }

    fn earlier(&mut self, line: Consistency) -> Result<(), BundleError> {
        let earlier = self.signed(&line.checkpoint)?;
        let (old, new) = (&earlier, &self.checkpoint);
        if !merkle::verify_consistency(old.size, &old.root, new.size, &new.root, &line.proof) {
            return Err(BundleError::Forked { size: old.size });
        }
        self.earlier.push((line.checkpoint, earlier));
        Ok(())
    }

    /// A checkpoint by any of the log's keys.
    fn signed(&self, note: &str) -> Result<Checkpoint, BundleError> {
        let mut failed = crate::ledger::NoteError::NotSigned;
        for key in &self.chain.keys {
            match Checkpoint::open(note, key) {
                Ok(checkpoint) => return Ok(checkpoint),
                Err(error) => failed = error,
            }
        }
        Err(BundleError::Signature {
            what: "checkpoint that was kept",
            source: failed,
        })
    }

    /// Whether the bundle shows, without its records, that it extends a checkpoint.
    fn extends(&self, held: &Checkpoint) -> Result<bool, BundleError> {
        if held.size > self.checkpoint.size {
            return Err(BundleError::RolledBack {
                held: held.size,
                now: self.checkpoint.size,
            });
        }
        let mut known = self.earlier.iter().map(|(_, earlier)| earlier);
        let same = known
            .find(|earlier| earlier.size == held.size)
            .or_else(|| (held.size == self.checkpoint.size).then_some(&self.checkpoint));
        match same {
            Some(known) if known.root != held.root => Err(BundleError::Forked { size: held.size }),
            known => Ok(known.is_some()),
        }
    }

    fn record(&mut self, line: &[u8]) -> Result<Record, BundleError> {
        let malformed = || BundleError::malformed(RECORDS, "not a record in canonical form");
        let text = std::str::from_utf8(line).map_err(|_| malformed())?;
        let record = Record::from_canonical(text).ok_or_else(malformed)?;
        let leaf = merkle::leaf_hash(line);
        match self.manifest.kind {
            Kind::Range => {
                if record.seq != self.frontier.size() {
                    return Err(BundleError::WrongRecord { seq: record.seq });
                }
                self.frontier.push(leaf);
                self.compare_held();
            }
            Kind::Selection => {
                let proof = self
                    .proofs
                    .pop_front()
                    .filter(|proof| proof.seq == record.seq);
                let Checkpoint { size, root, .. } = &self.checkpoint;
                let proven = proof.is_some_and(|proof| {
                    merkle::verify_inclusion(&leaf, record.seq, *size, &proof.proof, root)
                });
                if !proven {
                    return Err(BundleError::WrongRecord { seq: record.seq });
                }
            }
        }
        self.records += 1;
        self.policies.extend(PolicySeen::in_record(&record));
        Ok(record)
    }

    fn compare_held(&mut self) {
        let size = self.frontier.size();
        if self.manifest.kind == Kind::Range
            && self.held.iter().any(|held| held.checkpoint.size == size)
        {
            let root = self.frontier.root();
            for held in &mut self.held {
                held.found |= held.checkpoint.size == size && held.checkpoint.root == root;
            }
        }
    }

    fn finish(self, digest: &Digest, expectations: &Expectations) -> Result<Found, BundleError> {
        if self.manifest.files.get(RECORDS) != Some(digest) {
            let member = RECORDS.to_owned();
            return Err(BundleError::WrongDigest { member });
        }
        let whole = match self.manifest.kind {
            Kind::Range => {
                self.frontier.size() == self.checkpoint.size
                    && self.frontier.root() == self.checkpoint.root
            }
            Kind::Selection => self.proofs.is_empty(),
        };
        if !whole || self.records != self.manifest.records {
            return Err(BundleError::WrongRecords);
        }
        if self.policies != self.manifest.policies {
            return Err(BundleError::malformed(
                MANIFEST,
                "other policies than the records name",
            ));
        }
        if let Some(held) = self.held.iter().find(|held| !held.found) {
            let size = held.checkpoint.size;
            let in_records = self.manifest.kind == Kind::Range && size >= self.manifest.first;
            return Err(if in_records {
                BundleError::Forked { size }
            } else {
                BundleError::Unproven { size }
            });
        }
        Ok(Found {
            root: hex::encode(self.checkpoint.root),
            keys: self.chain.keys.iter().map(ToString::to_string).collect(),
            key_trusted: self.chain.anchored(),
            witnessed: self.witnessed(&expectations.witnesses)?,
            manifest: self.manifest,
        })
    }

    /// The size of the newest checkpoint that enough witnesses have co-signed.
    fn witnessed(&self, witnesses: &Witnesses) -> Result<Option<u64>, BundleError> {
        if witnesses.threshold() == 0 {
            return Ok(None);
        }
        let newest = witnesses.check(&self.note).map(|_| self.checkpoint.size);
        let earlier = self.earlier.iter().map(|(note, earlier)| {
            let checked = witnesses.check(note);
            checked.map(|_| earlier.size)
        });
        let mut found = None;
        let mut failed = None;
        for result in std::iter::once(newest).chain(earlier) {
            match result {
                Ok(size) => found = found.max(Some(size)),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match (found, failed) {
            (None, Some(error)) => Err(BundleError::Witnesses(error)),
            (found, _) => Ok(found),
        }
    }
}

/// The members must be those of the format and of the manifest, none more.
fn check_members(
    small: &BTreeMap<String, Vec<u8>>,
    manifest: &Manifest,
) -> Result<(), BundleError> {
    if manifest.format != FORMAT {
        return Err(BundleError::malformed(
            MANIFEST,
            "of another format than this version reads",
        ));
    }
    let kind = match manifest.kind {
        Kind::Range => BASE,
        Kind::Selection => PROOFS,
    };
    let names = [README, KEYS, CHECKPOINT, CONSISTENCY, kind, RECORDS];
    if let Some(other) = manifest
        .files
        .keys()
        .find(|name| !names.contains(&name.as_str()))
    {
        return Err(BundleError::malformed(other, "no member of this format"));
    }
    let unlisted = |name: &&String| *name != MANIFEST && !manifest.files.contains_key(*name);
    if let Some(other) = small.keys().find(unlisted) {
        return Err(BundleError::malformed(other, "not in the manifest"));
    }
    for name in names.into_iter().filter(|name| *name != RECORDS) {
        let bytes = small
            .get(name)
            .ok_or_else(|| BundleError::malformed(name, "missing"))?;
        if manifest.files.get(name) != Some(&members::sha256(bytes)) {
            let member = name.to_owned();
            return Err(BundleError::WrongDigest { member });
        }
    }
    Ok(())
}

fn text<'a>(small: &'a BTreeMap<String, Vec<u8>>, name: &str) -> Result<&'a str, BundleError> {
    let bytes = small
        .get(name)
        .ok_or_else(|| BundleError::malformed(name, "missing"))?;
    std::str::from_utf8(bytes).map_err(|_| BundleError::malformed(name, "not text"))
}

fn parse<T: DeserializeOwned>(
    small: &BTreeMap<String, Vec<u8>>,
    name: &str,
) -> Result<T, BundleError> {
    serde_json::from_str(text(small, name)?)
        .map_err(|_| BundleError::malformed(name, "not as the format says"))
}

fn lines<T: DeserializeOwned>(
    small: &BTreeMap<String, Vec<u8>>,
    name: &str,
) -> Result<Vec<T>, BundleError> {
    let parse = |line| {
        serde_json::from_str(line)
            .map_err(|_| BundleError::malformed(name, "not as the format says"))
    };
    text(small, name)?.lines().map(parse).collect()
}
