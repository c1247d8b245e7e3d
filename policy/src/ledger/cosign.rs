//! Witnesses: other people's keys that co-sign a log's checkpoints, <https://c2sp.org/tlog-cosignature>.
//!
//! A witness promises that every checkpoint it signs extends those it signed before. With enough of them, a log cannot
//! show one history to one auditor and another to the next.

use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;
use std::{fmt, fs, io};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};

use super::note::{self, Checkpoint, DASH, Note, NoteError, VerifyingKey};
use super::{LedgerError, files};

/// The public key of a witness: `name+hash+base64`, type 4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WitnessKey {
    name: String,
    id: [u8; 4],
    public: [u8; 32],
}

impl WitnessKey {
    /// The witness of this name with these 32 bytes (RFC 8032).
    pub fn new(name: &str, public: [u8; 32]) -> Result<Self, NoteError> {
        note::check_name(name)?;
        Ok(Self {
            name: name.to_owned(),
            id: note::key_id(name, TYPE_COSIGNATURE, &public),
            public,
        })
    }

    /// The witness's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// When (seconds since 1970, UTC) this witness co-signed the note, if it did. A bad signature of its is an error.
    pub fn cosigned(&self, note: &str) -> Result<Option<u64>, NoteError> {
        let note = Note::parse(note)?;
        let mut time = None;
        let ours = |s: &&note::Signature<'_>| s.name == self.name && s.id == self.id;
        for signature in note.signatures.iter().filter(ours) {
            let Some((stamp, bytes)) = signature.bytes.split_first_chunk::<8>() else {
                return Err(NoteError::BadSignature);
            };
            let stamp = u64::from_be_bytes(*stamp);
            UnparsedPublicKey::new(&ED25519, &self.public)
                .verify(message(stamp, note.text).as_bytes(), bytes)
                .map_err(|_| NoteError::BadSignature)?;
            time = time.max(Some(stamp));
        }
        Ok(time)
    }
}

impl fmt::Display for WitnessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&note::key_text(
            &self.name,
            self.id,
            TYPE_COSIGNATURE,
            &self.public,
        ))
    }
}

impl FromStr for WitnessKey {
    type Err = NoteError;

    fn from_str(text: &str) -> Result<Self, NoteError> {
        let (name, public) = note::key_parts(text, TYPE_COSIGNATURE)?;
        let key = Self::new(name, public)?;
        if key.to_string() == text {
            Ok(key)
        } else {
            Err(NoteError::BadKey)
        }
    }
}

/// The witnesses somebody trusts, and how many of them must have co-signed.
#[derive(Clone, Debug, Default)]
pub struct Witnesses {
    keys: Vec<WitnessKey>,
    threshold: usize,
}

impl Witnesses {
    /// `threshold` of `keys`. One key under two names is one witness, so that it is refused.
    pub fn new(keys: Vec<WitnessKey>, threshold: usize) -> Result<Self, NoteError> {
        let different: BTreeSet<_> = keys.iter().map(|key| key.public).collect();
        if different.len() != keys.len() || threshold > keys.len() {
            return Err(NoteError::BadKey);
        }
        Ok(Self { keys, threshold })
    }

    /// How many must have co-signed.
    pub fn threshold(&self) -> usize {
        self.threshold
    }

    /// Those who co-signed a note and when, if they are enough.
    pub fn check(&self, note: &str) -> Result<Vec<(&str, u64)>, NoteError> {
        let mut found = Vec::new();
        for key in &self.keys {
            if let Some(time) = key.cosigned(note)? {
                found.push((key.name(), time));
            }
        }
        if found.len() < self.threshold {
            return Err(NoteError::TooFewWitnesses {
                found: found.len(),
                wanted: self.threshold,
            });
        }
        Ok(found)
    }
}

/// The key of a witness. It signs what it is given: whoever holds it compares with what it signed before.
pub struct Cosigner {
    key: WitnessKey,
    pair: Ed25519KeyPair,
}

impl Cosigner {
    /// A key from an Ed25519 PKCS#8 document.
    pub fn from_pkcs8(name: &str, pkcs8: &[u8]) -> Result<Self, NoteError> {
        let pair =
            Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8).map_err(|_| NoteError::BadKey)?;
        let public = pair.public_key().as_ref().try_into();
        Ok(Self {
            key: WitnessKey::new(name, public.map_err(|_| NoteError::BadKey)?)?,
            pair,
        })
    }

    /// The public half.
    pub fn witness_key(&self) -> WitnessKey {
        self.key.clone()
    }

    /// The note with this witness's line added; `time` in seconds since 1970.
    pub fn cosign(&self, note: &str, time: u64) -> Result<String, NoteError> {
        let text = Note::parse(note)?.text;
        let signature = self.pair.sign(message(time, text).as_bytes());
        let blob = [&self.key.id[..], &time.to_be_bytes(), signature.as_ref()].concat();
        let line = format!("{DASH}{} {}\n", self.key.name, BASE64.encode(blob));
        Ok(format!("{note}{line}"))
    }
}

/// The signature lines of both notes, if their text is the same; a line that both have stands once.
pub fn merge(note: &str, other: &str) -> Result<String, NoteError> {
    let (ours, theirs) = (Note::parse(note)?, Note::parse(other)?);
    if ours.text != theirs.text {
        return Err(NoteError::WrongTree);
    }
    let mut merged = note.to_owned();
    let known: BTreeSet<&str> = ours.signatures.iter().map(|s| s.line).collect();
    for signature in theirs.signatures.iter().filter(|s| !known.contains(s.line)) {
        merged.push_str(signature.line);
        merged.push('\n');
    }
    Note::parse(&merged)?;
    Ok(merged)
}

/// Keeps a co-signed checkpoint beside the ledger, once it has been shown to be one of its own and enough witnesses have
/// signed it; returns who did and when.
pub fn store<'w>(
    path: &Path,
    trusted: &[VerifyingKey],
    witnesses: &'w Witnesses,
    note: &str,
) -> Result<Vec<(&'w str, u64)>, LedgerError> {
    super::audit(path, trusted, &[note.to_owned()], &mut |_, _| {})?;
    let found = witnesses.check(note).map_err(LedgerError::Note)?;
    let size = Checkpoint::unverified(note)
        .map_err(LedgerError::Note)?
        .size;
    let folder = files::cosigned(path);
    let file = folder.join(format!("{size:020}"));
    let merged = match fs::read_to_string(&file) {
        Ok(there) => merge(&there, note).map_err(LedgerError::Note)?,
        Err(_) => note.to_owned(),
    };
    let fresh = file.with_extension("new");
    fs::create_dir_all(&folder)
        .and_then(|()| fs::write(&fresh, merged))
        .and_then(|()| fs::rename(&fresh, &file))
        .map_err(LedgerError::Io)?;
    Ok(found)
}

/// The co-signed checkpoints that are kept beside a ledger, oldest first. Not believed: verify them.
pub fn stored(path: &Path) -> Result<Vec<String>, LedgerError> {
    let mut notes = Vec::new();
    let entries = match fs::read_dir(files::cosigned(path)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(notes),
        Err(error) => return Err(LedgerError::Io(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(LedgerError::Io)?.path());
    }
    names.sort();
    for name in names.iter().filter(|name| name.extension().is_none()) {
        notes.push(fs::read_to_string(name).map_err(LedgerError::Io)?);
    }
    Ok(notes)
}

fn message(time: u64, text: &str) -> String {
    format!("cosignature/v1\ntime {time}\n{text}")
}

const TYPE_COSIGNATURE: u8 = 4;

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;

    use super::*;
    use crate::ledger::{Checkpoint, Entry, Ledger, Outcome, Signer};

    fn witness(name: &str) -> Cosigner {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Cosigner::from_pkcs8(name, pkcs8.as_ref()).unwrap()
    }

    #[test]
    fn a_witness_s_key_is_no_log_s_key_nor_the_other_way() {
        let of_witness = witness("w.test").witness_key().to_string();
        assert!(of_witness.parse::<WitnessKey>().is_ok());
        assert!(of_witness.parse::<VerifyingKey>().is_err());
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let signer = Signer::from_pkcs8("l.test", pkcs8.as_ref()).unwrap();
        let of_log = signer.verifying_key().to_string();
        assert!(of_log.parse::<VerifyingKey>().is_ok());
        assert!(of_log.parse::<WitnessKey>().is_err());
    }

    fn note() -> String {
        let checkpoint = Checkpoint {
            origin: "log.test".to_owned(),
            size: 3,
            root: [9; 32],
        };
        let signer = Signer::from_seed("log.test", &[1; 32]).unwrap();
        signer.sign(&checkpoint.to_text()).unwrap()
    }

    /// The message is spelled as in the specification's example.
    #[test]
    fn the_message_is_the_specified_one() {
        assert_eq!(
            message(1_679_315_147, "example.com/behind-the-sofa\n1\nroot\n"),
            "cosignature/v1\ntime 1679315147\nexample.com/behind-the-sofa\n1\nroot\n"
        );
    }

    #[test]
    fn enough_witnesses_are_enough_and_no_others_count() {
        let (a, b, c) = (
            witness("w.test/a"),
            witness("w.test/b"),
            witness("w.test/c"),
        );
        let keys = vec![a.witness_key(), b.witness_key()];
        let two = Witnesses::new(keys.clone(), 2).unwrap();
        let by_a = a.cosign(&note(), 10).unwrap();
        let by_a_and_c = c.cosign(&by_a, 11).unwrap();
        assert_eq!(
            two.check(&by_a_and_c),
            Err(NoteError::TooFewWitnesses {
                found: 1,
                wanted: 2
            })
        );
        let twice = a.cosign(&by_a, 12).unwrap();
        assert!(two.check(&twice).is_err(), "one witness counts once");
        let merged = merge(&by_a_and_c, &b.cosign(&note(), 13).unwrap()).unwrap();
        assert_eq!(
            two.check(&merged),
            Ok(vec![("w.test/a", 10), ("w.test/b", 13)])
        );
        assert_eq!(merge(&merged, &by_a), Ok(merged.clone()));
        let log = Signer::from_seed("log.test", &[1; 32]).unwrap();
        assert!(Checkpoint::open(&merged, &log.verifying_key()).is_ok());
        let other = merged.replace("\n3\n", "\n4\n");
        assert_eq!(two.check(&other), Err(NoteError::BadSignature));
        assert!(merge(&merged, &other).is_err());
        assert!(Witnesses::new(keys, 3).is_err());
    }

    #[test]
    fn only_checkpoints_of_the_log_are_kept_and_lines_are_gathered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        let signer = || Signer::from_seed("log.test", &[1; 32]).unwrap();
        let mut ledger = Ledger::open(&path, signer()).unwrap();
        let entry = Entry::new("a", "b", "c", Outcome::Done);
        let ours = ledger.append_signed(entry).unwrap().1;
        let (a, b) = (witness("w.test/a"), witness("w.test/b"));
        let any = Witnesses::new(vec![a.witness_key(), b.witness_key()], 1).unwrap();
        let trusted = [signer().verifying_key()];
        let foreign = a.cosign(&note(), 5).unwrap();
        assert!(store(&path, &trusted, &any, &foreign).is_err());
        assert!(store(&path, &trusted, &any, &ours).is_err());
        for witness in [&a, &b] {
            store(&path, &trusted, &any, &witness.cosign(&ours, 5).unwrap()).unwrap();
        }
        let kept = stored(&path).unwrap();
        assert_eq!((kept.len(), any.check(&kept[0]).unwrap().len()), (1, 2));
    }

    #[test]
    fn a_key_under_two_names_is_no_second_witness() {
        let a = witness("w.test/a").witness_key();
        let again = WitnessKey::new("w.test/b", a.public).unwrap();
        assert!(Witnesses::new(vec![a.clone(), again], 1).is_err());
        let text = a.to_string();
        assert_eq!(text.parse(), Ok(a));
        assert!(text.replace("+B", "+A").parse::<WitnessKey>().is_err());
    }
}
