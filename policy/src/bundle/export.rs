//! Making a bundle from a ledger.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

use serde::Serialize;

use super::members::{self, Packer};
use super::{
    BASE, Base, BundleError, CHECKPOINT, CONSISTENCY, Consistency, FORMAT, KEYS, Keys, Kind,
    MANIFEST, Manifest, PROOFS, PolicySeen, Proof, README, RECORDS,
};
use crate::ledger::{
    self, Audited, Checkpoint, LedgerError, Nodes, Record, TileTree, VerifyingKey, cosign,
};

/// Which records go into a bundle, and what it proves besides.
#[derive(Default)]
pub struct Selection<'a> {
    /// Only records for which this is true; without it, all.
    pub only: Option<&'a dyn Fn(&Record) -> bool>,
    /// Checkpoints (signed notes) that somebody keeps: the bundle will prove that it extends them. Also those that
    /// witnesses have co-signed.
    pub since: Vec<String>,
}

/// What was exported.
#[derive(Clone, Debug, Serialize)]
pub struct Exported {
    /// The log.
    pub origin: String,
    /// Records in the bundle.
    pub records: u64,
    /// The size of the tree in its checkpoint.
    pub size: u64,
    /// Records that are not signed yet, and therefore not in it.
    pub uncovered: u64,
}

/// Verifies the ledger, and writes the bundle `to`, which must not be there yet.
pub fn export(
    path: &Path,
    trusted: &[VerifyingKey],
    selection: &Selection<'_>,
    to: &Path,
) -> Result<Exported, BundleError> {
    let spool_path = to.with_extension("records");
    let spool = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&spool_path)?;
    // The name goes at once, so that nothing is left behind.
    fs::remove_file(&spool_path)?;
    let mut collected = Collected {
        spool: BufWriter::new(spool),
        chosen: Vec::new(),
        records: 0,
        failed: None,
    };
    let only = selection.only;
    let (audited, tree) =
        ledger::audit_with_tree(path, trusted, &selection.since, &mut |record, leaf| {
            if only.is_none_or(|only| only(&record)) {
                collected.take(&record, leaf, only.is_some());
            }
        })?;
    let checkpoint = audited.last_checkpoint.as_ref();
    let size = checkpoint.ok_or(BundleError::NothingSigned)?.size;
    let plan = Plan {
        audited: &audited,
        tree: &tree,
        size,
        kind: if only.is_some() {
            Kind::Selection
        } else {
            Kind::Range
        },
    };
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    let written = plan.write(collected, &selection.since, file);
    if written.is_err() {
        // Half a bundle is of no use to anybody.
        let _ = fs::remove_file(to);
    }
    written
}

/// Records on their way into the bundle.
struct Collected {
    spool: BufWriter<File>,
    /// Of a selection, the place of each record.
    chosen: Vec<u64>,
    records: u64,
    failed: Option<io::Error>,
}

impl Collected {
    fn take(&mut self, record: &Record, leaf: &str, selected: bool) {
        if self.failed.is_none() {
            self.failed = writeln!(self.spool, "{leaf}").err();
            self.records += 1;
            if selected {
                self.chosen.push(record.seq);
            }
        }
    }

    /// The file of the records that are signed, their number and the policies in them.
    fn signed(self, keep: u64) -> Result<(File, Vec<PolicySeen>), BundleError> {
        if let Some(error) = self.failed {
            return Err(error.into());
        }
        let mut file = self
            .spool
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        let mut reader = BufReader::new(file);
        let (mut length, mut policies, mut line) = (0, Vec::new(), String::new());
        for _ in 0..keep {
            line.clear();
            length += reader.read_line(&mut line)? as u64;
            let record = Record::from_canonical(line.trim_end());
            policies.extend(record.as_ref().and_then(PolicySeen::in_record));
        }
        let mut file = reader.into_inner();
        file.set_len(length)?;
        file.rewind()?;
        Ok((file, policies))
    }
}

/// What the members are made from.
struct Plan<'a> {
    audited: &'a Audited,
    tree: &'a TileTree,
    size: u64,
    kind: Kind,
}

impl Plan<'_> {
    fn write(
        &self,
        collected: Collected,
        since: &[String],
        to: File,
    ) -> Result<Exported, BundleError> {
        let chosen: Vec<u64> = collected
            .chosen
            .iter()
            .copied()
            .filter(|s| *s < self.size)
            .collect();
        let records = match self.kind {
            Kind::Range => self.size - self.audited.base.size(),
            Kind::Selection => chosen.len() as u64,
        };
        let (mut spool, policies) = collected.signed(records)?;
        let mut members = self.small_members(&chosen, since)?;
        let mut files: BTreeMap<String, String> = members
            .iter()
            .map(|(name, text)| ((*name).to_owned(), members::sha256(text.as_bytes())))
            .collect();
        files.insert(RECORDS.to_owned(), members::sha256_of(&spool)?);
        spool.rewind()?;
        let manifest = Manifest {
            files,
            first: self.audited.base.size(),
            format: FORMAT.to_owned(),
            kind: self.kind,
            origin: self.origin(),
            policies,
            records,
            size: self.size,
            time: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        };
        members.insert(0, (MANIFEST, json(&manifest)));
        let mut packer = Packer::new(BufWriter::new(to));
        for (name, text) in &members {
            packer.member(name, text.len() as u64, text.as_bytes())?;
        }
        packer.member(RECORDS, spool.metadata()?.len(), &spool)?;
        let file = packer.finish()?.into_inner();
        file.map_err(io::IntoInnerError::into_error)?.sync_all()?;
        Ok(Exported {
            origin: manifest.origin,
            records,
            size: self.size,
            uncovered: self.audited.uncovered(),
        })
    }

    fn origin(&self) -> String {
        let checkpoint = self.audited.last_checkpoint.as_ref();
        checkpoint.map(|c| c.origin.clone()).unwrap_or_default()
    }

    fn small_members(
        &self,
        chosen: &[u64],
        since: &[String],
    ) -> Result<Vec<(&'static str, String)>, BundleError> {
        let newest = self.audited.keys.last().ok_or(BundleError::NothingSigned)?;
        let keys = Keys {
            key: newest.to_string(),
            rotations: self.audited.rotations.clone(),
        };
        let mut note = self.audited.last_note.clone().unwrap_or_default();
        let mut consistency = String::new();
        for held in since {
            // Cosignatures on the newest checkpoint belong to it.
            if let Ok(merged) = cosign::merge(&note, held) {
                note = merged;
            } else if Checkpoint::unverified(held).is_ok_and(|held| held.size <= self.size) {
                consistency.push_str(&self.consistency(held)?);
            }
        }
        let mut members = vec![
            (README, EXPLANATION.to_owned()),
            (KEYS, json(&keys)),
            (CHECKPOINT, note),
            (CONSISTENCY, consistency),
        ];
        match self.kind {
            Kind::Range => {
                let base = Base {
                    peaks: self.audited.base.peaks().to_vec(),
                    size: self.audited.base.size(),
                };
                members.push((BASE, json(&base)));
            }
            Kind::Selection => {
                let mut proofs = String::new();
                for seq in chosen {
                    let proof = self.tree.inclusion_proof(*seq, self.size)?;
                    let proof = proof.unwrap_or_default();
                    proofs.push_str(&json(&Proof { proof, seq: *seq }));
                }
                members.push((PROOFS, proofs));
            }
        }
        Ok(members)
    }

    fn consistency(&self, held: &str) -> Result<String, BundleError> {
        let size = Checkpoint::unverified(held)
            .map_err(LedgerError::Held)?
            .size;
        let proof = self.tree.consistency_proof(size, self.size)?;
        Ok(json(&Consistency {
            checkpoint: held.to_owned(),
            proof: proof.unwrap_or_default(),
        }))
    }
}

fn json(value: &impl Serialize) -> String {
    let text = serde_json::to_string(value).unwrap_or_default(); // strings, numbers and maps of them: cannot fail
    format!("{text}\n")
}

const EXPLANATION: &str = "\
Evidence of a Casemate host.

  casemate evidence verify BUNDLE --key KEY

verifies it offline. KEY is the log's public key (C2SP verifier key), had from the host's operator by another way than
this bundle; without --key the bundle is only shown to be whole in itself. Add --checkpoint NOTE with a checkpoint kept
from before, and --witness KEY with those of witnesses.

By hand: the leaf of a record is SHA-256(0x00 || its line in records.jsonl); RFC 6962 makes of base.json and the leaves,
or of a leaf and its line in proofs.jsonl, the root in `checkpoint`, a signed note (c2sp.org/signed-note) by the key in
keys.json. This is evidence of what a host recorded. It is no statement that a host complies with anything.
";
