//! Which key signs a log, from its first on: a record signed by the old key names the new one.

use serde::{Deserialize, Serialize};

use super::merkle::{self, Hash};
use super::note::{Checkpoint, NoteError, VerifyingKey};
use super::record::{Detail, Entry, Outcome, Record};

/// The proof of one rotation, verifiable without the rest of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotation {
    /// The checkpoint by the old key whose newest record names the new key.
    pub checkpoint: String,
    /// Inclusion proof of that record.
    #[serde(with = "hashes")]
    pub proof: Vec<Hash>,
    /// The record, canonical.
    pub record: String,
}

impl Rotation {
    /// The new key, if the old one signed that it is.
    pub fn verify(&self, old: &VerifyingKey) -> Result<VerifyingKey, NoteError> {
        let checkpoint = Checkpoint::open(&self.checkpoint, old)?;
        let record = Record::from_canonical(&self.record)
            .filter(|record| Some(record.seq) == checkpoint.size.checked_sub(1))
            .ok_or(NoteError::WrongTree)?;
        let leaf = merkle::leaf_hash(self.record.as_bytes());
        let Checkpoint { size, root, .. } = checkpoint;
        if !merkle::verify_inclusion(&leaf, record.seq, size, &self.proof, &root) {
            return Err(NoteError::WrongTree);
        }
        new_key(&record)
            .filter(|key| key.name() == old.name())
            .ok_or(NoteError::BadKey)
    }

    /// The key that the record says signed before; not believed before [`Rotation::verify`].
    pub(crate) fn claimed_old_key(&self) -> Option<VerifyingKey> {
        old_key(&Record::from_canonical(&self.record)?)
    }
}

/// The keys of a log in their order, and whether one of them is trusted.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    pub(crate) keys: Vec<VerifyingKey>,
    pub(crate) current: VerifyingKey,
    pub(super) rotations: Vec<Rotation>,
    anchored: bool,
}

impl Chain {
    pub(super) fn new(first: VerifyingKey, trusted: &[VerifyingKey]) -> Self {
        Self {
            anchored: trusted.contains(&first),
            keys: vec![first.clone()],
            current: first,
            rotations: Vec::new(),
        }
    }

    /// The chain that these rotations prove, from the key that the first of them claims, or else from `key`.
    pub(crate) fn from_rotations(
        rotations: &[Rotation],
        key: &VerifyingKey,
        trusted: &[VerifyingKey],
    ) -> Result<Self, NoteError> {
        let claimed = rotations.first().map(Rotation::claimed_old_key);
        let first = claimed.unwrap_or_else(|| Some(key.clone()));
        let mut chain = Self::new(first.ok_or(NoteError::BadKey)?, trusted);
        for rotation in rotations {
            chain.rotate(rotation.clone(), trusted)?;
        }
        if chain.current == *key {
            Ok(chain)
        } else {
            Err(NoteError::NotSigned)
        }
    }

    pub(super) fn rotate(
        &mut self,
        rotation: Rotation,
        trusted: &[VerifyingKey],
    ) -> Result<(), NoteError> {
        self.current = rotation.verify(&self.current)?;
        self.keys.push(self.current.clone());
        self.anchored |= trusted.contains(&self.current);
        self.rotations.push(rotation);
        Ok(())
    }

    /// Whether a trusted key is among them.
    pub(crate) fn anchored(&self) -> bool {
        self.anchored
    }
}

/// The record that hands the log from one key to the next.
pub(super) fn rotation_entry(old: &VerifyingKey, new: &VerifyingKey) -> Entry {
    Entry::new(LEDGER, ROTATE, old.name(), Outcome::Done)
        .with("old_key", old.to_string())
        .with("new_key", new.to_string())
}

/// The key that a record names as the next, if it is a rotation.
pub(super) fn new_key(record: &Record) -> Option<VerifyingKey> {
    named_key(record, "new_key")
}

/// The key that a record names as the one before, if it is a rotation.
pub(super) fn old_key(record: &Record) -> Option<VerifyingKey> {
    named_key(record, "old_key")
}

fn named_key(record: &Record, name: &str) -> Option<VerifyingKey> {
    if record.action != ROTATE || record.actor != LEDGER {
        return None;
    }
    match record.detail.get(name)? {
        Detail::Text(text) => text.parse().ok(),
        _ => None,
    }
}

/// Hashes as lower-case hex.
pub(crate) mod hashes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    use super::Hash;

    pub(crate) fn serialize<S: Serializer>(
        hashes: &[Hash],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(hashes.iter().map(hex::encode))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Hash>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        let parse = |text: &String| {
            let mut hash = [0; 32];
            hex::decode_to_slice(text, &mut hash).map_err(D::Error::custom)?;
            Ok(hash)
        };
        texts.iter().map(parse).collect()
    }
}

/// The actor of records that the ledger makes about itself.
pub(super) const LEDGER: &str = "ledger";
/// The action of a rotation.
pub(super) const ROTATE: &str = "rotate-key";
