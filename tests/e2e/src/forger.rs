//! Somebody who can write to an evidence bundle, and to the host that it came from.
//!
//! Each forgery is as good as its forger can make it: the manifest fits what was put in, and where the forger holds the
//! host's key, the signature is good.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Cursor, Read as _};
use std::path::Path;

use casemate_policy::bundle::{self, Keys, Manifest, PolicySeen, Selection};
use casemate_policy::ledger::{Checkpoint, Entry, Ledger, Outcome, Record, Signer};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;

use crate::error::{E2eError, OnFile, Result};

/// What is done to a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgery {
    /// A refusal becomes an act.
    Edit,
    /// A record in the middle is gone.
    Delete,
    /// Two records change places.
    Reorder,
    /// The last record is gone.
    Truncate,
    /// The file ends early.
    Cut,
    /// Another history, signed with the host's own key.
    Fork,
    /// What the host signed earlier, in the place of what it signed since.
    RollBack,
    /// The same records under another key of the same name.
    ReSign,
}

impl Forgery {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Edit,
        Self::Delete,
        Self::Reorder,
        Self::Truncate,
        Self::Cut,
        Self::Fork,
        Self::RollBack,
        Self::ReSign,
    ];

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Edit => "a record was edited",
            Self::Delete => "a record was deleted",
            Self::Reorder => "two records were swapped",
            Self::Truncate => "the last record was removed",
            Self::Cut => "the file was cut off",
            Self::Fork => "another history was signed with the host's key",
            Self::RollBack => "an older bundle was put in its place",
            Self::ReSign => "it was signed with another key",
        }
    }
}

/// What a forger has.
pub struct Forger<'a> {
    /// The true bundle.
    pub bundle: &'a Path,
    /// An older one of the same log.
    pub older: &'a Path,
    /// The host's secret key, PKCS#8.
    pub key: &'a Path,
    /// A folder to work in.
    pub folder: &'a Path,
}

impl Forger<'_> {
    /// Writes the forged bundle `to`.
    pub fn forge(&self, forgery: Forgery, to: &Path) -> Result<()> {
        // A forgery before this one is in the way.
        let _ = fs::remove_file(to);
        match forgery {
            Forgery::Edit => self.rewritten(to, |lines| edit(lines)),
            Forgery::Delete => self.rewritten(to, |lines| drop(lines.remove(lines.len() / 2))),
            Forgery::Reorder => self.rewritten(to, |lines| {
                let middle = lines.len() / 2;
                lines.swap(middle - 1, middle);
            }),
            Forgery::Truncate => self.rewritten(to, |lines| drop(lines.pop())),
            Forgery::Cut => {
                let bytes = fs::read(self.bundle).on("read", self.bundle)?;
                let half = bytes.get(..bytes.len() / 2).unwrap_or_default();
                fs::write(to, half).on("write", to)
            }
            Forgery::Fork => self.fork(to),
            Forgery::RollBack => fs::copy(self.older, to).map(drop).on("copy", self.older),
            Forgery::ReSign => self.re_sign(to),
        }
    }

    fn rewritten(&self, to: &Path, change: impl FnOnce(&mut Vec<String>)) -> Result<()> {
        let mut members = Members::unpack(self.bundle)?;
        let mut lines: Vec<String> = members.text(RECORDS)?.lines().map(str::to_owned).collect();
        if lines.len() < 4 {
            return Err(wrong("too few records to forge"));
        }
        change(&mut lines);
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        members.put(RECORDS, text);
        members.mend()?;
        members.pack(to)
    }

    /// All records again, made now, and one refusal left out.
    fn fork(&self, to: &Path) -> Result<()> {
        let members = Members::unpack(self.bundle)?;
        let path = self.folder.join("forked");
        let mut ledger = Ledger::open(&path, self.signer(&members)?).map_err(|e| wrong(&e))?;
        let trusted = [ledger.verifying_key()];
        for line in members.text(RECORDS)?.lines() {
            let record = Record::from_canonical(line).ok_or_else(|| wrong("no record"))?;
            let outcome = match record.outcome {
                Outcome::Refused => Outcome::Allowed,
                other => other,
            };
            let entry = Entry::new(&record.actor, &record.action, &record.object, outcome);
            ledger
                .append_signed(entry.emulated(record.emulated))
                .map_err(|e| wrong(&e))?;
        }
        drop(ledger);
        let exported = bundle::export(&path, &trusted, &Selection::default(), to);
        fs::remove_file(&path).on("remove", &path)?;
        fs::remove_dir_all(self.folder.join("forked.tiles")).or_else(absent)?;
        exported.map(drop).map_err(|e| wrong(&e))
    }

    fn re_sign(&self, to: &Path) -> Result<()> {
        let mut members = Members::unpack(self.bundle)?;
        let secret = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|e| wrong(&e))?;
        let checkpoint =
            Checkpoint::unverified(members.text(CHECKPOINT)?).map_err(|e| wrong(&e))?;
        let signer =
            Signer::from_pkcs8(&checkpoint.origin, secret.as_ref()).map_err(|e| wrong(&e))?;
        let keys = Keys {
            key: signer.verifying_key().to_string(),
            rotations: Vec::new(),
        };
        members.put(KEYS, json(&keys)?);
        let note = signer.sign(&checkpoint.to_text()).map_err(|e| wrong(&e))?;
        members.put(CHECKPOINT, note);
        members.put(CONSISTENCY, String::new());
        members.mend()?;
        members.pack(to)
    }

    fn signer(&self, members: &Members) -> Result<Signer> {
        let manifest: Manifest = members.manifest()?;
        let secret = fs::read(self.key).on("read", self.key)?;
        Signer::from_pkcs8(&manifest.origin, &secret).map_err(|e| wrong(&e))
    }
}

fn edit(lines: &mut [String]) {
    let refused = lines
        .iter()
        .position(|line| line.contains("\"outcome\":\"refused\""));
    let at = refused.unwrap_or(lines.len() / 2);
    if let Some(line) = lines.get_mut(at) {
        *line = match refused {
            Some(_) => line.replace("\"outcome\":\"refused\"", "\"outcome\":\"allowed\""),
            None => line.replacen("\"actor\":\"", "\"actor\":\"x", 1),
        };
    }
}

/// The files in a bundle.
struct Members {
    order: Vec<String>,
    files: BTreeMap<String, Vec<u8>>,
}

impl Members {
    fn unpack(bundle: &Path) -> Result<Self> {
        let mut archive = tar::Archive::new(File::open(bundle).on("open", bundle)?);
        let (mut order, mut files) = (Vec::new(), BTreeMap::new());
        for entry in archive.entries().on("read", bundle)? {
            let mut entry = entry.on("read", bundle)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).on("read", bundle)?;
            order.push(name.clone());
            files.insert(name, bytes);
        }
        Ok(Self { order, files })
    }

    fn pack(&self, to: &Path) -> Result<()> {
        let mut archive = tar::Builder::new(File::create(to).on("create", to)?);
        for name in &self.order {
            let bytes = self.files.get(name).map_or(&[][..], Vec::as_slice);
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_entry_type(tar::EntryType::Regular);
            archive
                .append_data(&mut header, name, Cursor::new(bytes))
                .on("write", to)?;
        }
        archive.finish().on("write", to)
    }

    fn text(&self, name: &str) -> Result<&str> {
        let bytes = self.files.get(name).ok_or_else(|| wrong(name))?;
        std::str::from_utf8(bytes).map_err(|e| wrong(&e))
    }

    fn put(&mut self, name: &str, text: String) {
        self.files.insert(name.to_owned(), text.into_bytes());
    }

    fn manifest(&self) -> Result<Manifest> {
        serde_json::from_str(self.text(MANIFEST)?).map_err(|e| wrong(&e))
    }

    /// The manifest, made to fit the other members.
    fn mend(&mut self) -> Result<()> {
        let mut manifest = self.manifest()?;
        for (name, bytes) in self.files.iter().filter(|(name, _)| *name != MANIFEST) {
            let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
            manifest.files.insert(name.clone(), hex::encode(digest));
        }
        let records: Vec<Record> = self
            .text(RECORDS)?
            .lines()
            .filter_map(Record::from_canonical)
            .collect();
        manifest.records = records.len() as u64;
        manifest.policies = records.iter().filter_map(PolicySeen::in_record).collect();
        self.put(MANIFEST, json(&manifest)?);
        Ok(())
    }
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| wrong(&e))
}

fn absent(error: std::io::Error) -> Result<()> {
    match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(crate::error::io("remove the forged tiles")(error)),
    }
}

fn wrong(what: &(impl std::fmt::Display + ?Sized)) -> E2eError {
    E2eError::Answer(format!("forging a bundle: {what}"))
}

const MANIFEST: &str = "manifest.json";
const KEYS: &str = "keys.json";
const CHECKPOINT: &str = "checkpoint";
const CONSISTENCY: &str = "consistency.jsonl";
const RECORDS: &str = "records.jsonl";

#[cfg(test)]
mod tests {
    use casemate_policy::bundle::{BundleError, Expectations};

    use super::*;

    /// Each forgery is refused for what it is, and not for a slip of the forger's.
    #[test]
    fn each_forgery_is_found_out_by_what_it_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let secret = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        fs::write(path("key"), secret.as_ref()).unwrap();
        let signer = Signer::from_pkcs8("site-a/casemate", secret.as_ref()).unwrap();
        let mut ledger = Ledger::open(&path("ledger"), signer).unwrap();
        let trusted = vec![ledger.verifying_key()];
        let mut kept = String::new();
        for n in 0..20 {
            let outcome = [Outcome::Done, Outcome::Refused][usize::from(n == 15)];
            let entry = Entry::new("operator", "start", &format!("vm-{n}"), outcome);
            let (_, note) = ledger
                .append_signed(entry.with("policy", "sha256:00"))
                .unwrap();
            if n == 5 {
                bundle::export(
                    &path("ledger"),
                    &trusted,
                    &Selection::default(),
                    &path("old"),
                )
                .unwrap();
            }
            if n == 10 {
                kept = note;
            }
        }
        bundle::export(
            &path("ledger"),
            &trusted,
            &Selection::default(),
            &path("all"),
        )
        .unwrap();
        let verify = |name: &str, held: &[String]| {
            let expected = Expectations {
                trusted: trusted.clone(),
                held: held.to_vec(),
                ..Expectations::default()
            };
            bundle::verify(&path(name), &expected, &mut |_| {})
        };
        let kept = [kept];
        verify("all", &kept).unwrap();
        let (bundle, older, key) = (path("all"), path("old"), path("key"));
        let forger = Forger {
            bundle: &bundle,
            older: &older,
            key: &key,
            folder: folder.path(),
        };
        for forgery in Forgery::ALL {
            forger.forge(forgery, &path("forged")).unwrap();
            let error = verify("forged", &kept).unwrap_err();
            let right = match forgery {
                Forgery::Edit => matches!(error, BundleError::WrongRecords),
                Forgery::Delete | Forgery::Reorder => {
                    matches!(error, BundleError::WrongRecord { .. })
                }
                Forgery::Truncate => matches!(error, BundleError::WrongRecords),
                Forgery::Cut => true,
                Forgery::Fork => matches!(error, BundleError::Forked { .. }),
                Forgery::RollBack => matches!(error, BundleError::RolledBack { .. }),
                Forgery::ReSign => matches!(error, BundleError::UntrustedKey),
            };
            assert!(right, "{forgery:?}: {error}");
            // The forger's own work is without a fault: only what an auditor knows gives it away.
            let known = matches!(forgery, Forgery::Fork | Forgery::RollBack);
            assert_eq!(verify("forged", &[]).is_ok(), known, "{forgery:?}");
        }
    }
}
