//! Evidence to hand over: a ledger, or some of its records, that verifies offline with nothing but public keys.
//!
//! A bundle is a tar file (or the folder it unpacks to) with these members, in this order:
//!
//! | member | what it holds |
//! | --- | --- |
//! | `manifest.json` | [`Manifest`]: format, origin, kind, counts, the SHA-256 of every other member, the policies seen |
//! | `README.txt` | how to verify it |
//! | `keys.json` | [`Keys`]: the log's first key and the proofs by which each key named the next |
//! | `checkpoint` | the newest checkpoint: a C2SP signed note by the last of these keys, perhaps co-signed |
//! | `consistency.jsonl` | [`Consistency`], one a line: earlier checkpoints, each with the proof that the newest extends it |
//! | `base.json` | [`Base`], kind `range`: the right edge of the tree before the first record |
//! | `proofs.jsonl` | [`Proof`], kind `selection`: an inclusion proof for each record |
//! | `records.jsonl` | the records, one a line, in canonical JSON; a line without its line feed is a leaf of the tree |
//!
//! Of kind `range`, the records are all from the base to the checkpoint, and the tree's root is computed from them. Of kind
//! `selection`, they are some, each with its proof; that no other record would have matched is not proven.

mod error;
mod export;
mod members;
mod verify;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use error::BundleError;
pub use export::{Exported, Selection, export};
pub use verify::{Expectations, Found, verify};

use crate::ledger::{Detail, Hash, Record, Rotation, hashes};

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// SHA-256 of each other member, hex.
    pub files: BTreeMap<String, String>,
    /// The first record, or where the records that are left begin.
    pub first: u64,
    /// [`FORMAT`].
    pub format: String,
    /// What the records are.
    pub kind: Kind,
    /// The log.
    pub origin: String,
    /// The policies that the records say were in force.
    pub policies: Vec<PolicySeen>,
    /// How many records are in it.
    pub records: u64,
    /// The size of the tree in the checkpoint.
    pub size: u64,
    /// When it was made, RFC 3339.
    pub time: String,
}

/// What the records of a bundle are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// All from the base to the checkpoint.
    Range,
    /// Some, each with a proof.
    Selection,
}

/// A policy that a record says was loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicySeen {
    /// Its digest.
    pub digest: String,
    /// The record.
    pub seq: u64,
}

impl PolicySeen {
    /// The policy that a record says was put in force, if it says so.
    pub fn in_record(record: &Record) -> Option<Self> {
        let name = match record.action.as_str() {
            "start" => "policy",
            "policy-load" => "digest",
            _ => return None,
        };
        match record.detail.get(name)? {
            Detail::Text(digest) => Some(Self {
                digest: digest.clone(),
                seq: record.seq,
            }),
            _ => None,
        }
    }
}

/// `keys.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keys {
    /// The newest key, which signed the checkpoint.
    pub key: String,
    /// How it came to be that, from the log's first key on.
    pub rotations: Vec<Rotation>,
}

/// A line of `consistency.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Consistency {
    /// An earlier checkpoint: a signed note, perhaps co-signed.
    pub checkpoint: String,
    /// RFC 6962 consistency proof from it to the bundle's checkpoint, hex.
    #[serde(with = "hashes")]
    pub proof: Vec<Hash>,
}

/// `base.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Roots of the complete subtrees before the first record, largest first, hex.
    #[serde(with = "hashes")]
    pub peaks: Vec<Hash>,
    /// How many records lie before.
    pub size: u64,
}

/// A line of `proofs.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    /// RFC 6962 inclusion proof in the checkpoint's tree, hex.
    #[serde(with = "hashes")]
    pub proof: Vec<Hash>,
    /// The record.
    pub seq: u64,
}

/// What `format` says.
pub const FORMAT: &str = "casemate-evidence-bundle 1";

const MANIFEST: &str = "manifest.json";
const README: &str = "README.txt";
const KEYS: &str = "keys.json";
const CHECKPOINT: &str = "checkpoint";
const CONSISTENCY: &str = "consistency.jsonl";
const BASE: &str = "base.json";
const PROOFS: &str = "proofs.jsonl";
const RECORDS: &str = "records.jsonl";

#[cfg(test)]
mod tests;
