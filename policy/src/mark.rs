//! Which policy a host may put in force: signed by enough, in its time, and never older than the one before.
//!
//! The newest version that a host has had in force is its *high-water mark*. It is kept outside of the policy, in the
//! host's state, and only rises.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::document::{HostPolicy, PolicyError};
use crate::sign::{SignError, Signatures, SignerKey, Trust};
use crate::types::{Fingerprint, Timestamp};

/// A policy document with its file of signatures, both as bytes of somebody else.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The file's name, for errors.
    pub file: &'a str,
    /// The document.
    pub text: &'a str,
    /// The file of signatures, if there is one.
    pub signatures: Option<&'a [u8]>,
}

impl Candidate<'_> {
    /// Parses the document and looks who signed it; decides nothing yet.
    pub fn read(&self, trust: Option<&Trust>) -> Result<ReadPolicy, AdmitError> {
        let policy = HostPolicy::parse(self.file, self.text)?;
        let signatures = self.signatures.map(Signatures::parse).transpose()?;
        let signers = match (trust, &signatures) {
            (Some(trust), Some(signatures)) => trust.signers(self.text.as_bytes(), signatures)?,
            _ => BTreeSet::new(),
        };
        Ok(ReadPolicy { policy, signers })
    }

    /// The policy, if this host may put it in force now.
    pub fn admit(
        &self,
        trust: Option<&Trust>,
        mark: Option<&HighWater>,
        now: Timestamp,
    ) -> Result<Admitted, AdmitError> {
        let ReadPolicy { policy, signers } = self.read(trust)?;
        let file = || self.file.to_owned();
        match trust {
            Some(trust) if signers.len() < trust.threshold() => {
                return Err(AdmitError::UnderThreshold {
                    file: file(),
                    found: signers.len(),
                    wanted: trust.threshold(),
                });
            }
            Some(_) if policy.version == 0 => {
                return Err(AdmitError::NoVersion { file: file() });
            }
            None if mark.is_some_and(|mark| mark.signed) => {
                return Err(AdmitError::TrustGone { file: file() });
            }
            _ => {}
        }
        if !policy.validity.holds(now) {
            return Err(AdmitError::NotValid {
                file: file(),
                now,
                begin: policy.validity.not_before,
                end: policy.validity.not_after,
            });
        }
        let next = HighWater {
            version: policy.version,
            digest: policy.digest(),
            signed: trust.is_some(),
        };
        if let Some(mark) = mark {
            mark.allows(&next, self.file)?;
        }
        Ok(Admitted {
            policy,
            signers,
            mark: next,
        })
    }
}

/// A document that parsed, and who of the trusted signed it.
#[derive(Debug)]
pub struct ReadPolicy {
    /// The policy.
    pub policy: HostPolicy,
    /// Who signed it.
    pub signers: BTreeSet<SignerKey>,
}

/// A policy that may be put in force. Raise the mark first.
#[derive(Debug)]
pub struct Admitted {
    /// The policy.
    pub policy: HostPolicy,
    /// Who signed it.
    pub signers: BTreeSet<SignerKey>,
    /// The mark that it leaves.
    pub mark: HighWater,
}

/// The newest policy that a host has had in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HighWater {
    /// Its version; 0 for a document without.
    pub version: u64,
    /// SHA-256 of its text.
    pub digest: Fingerprint,
    /// Whether signatures were demanded.
    pub signed: bool,
}

impl HighWater {
    /// A version is one text; without versions, which only a host has that demands no signatures, texts may change.
    fn allows(&self, next: &Self, file: &str) -> Result<(), AdmitError> {
        if next.version < self.version {
            return Err(AdmitError::Older {
                file: file.to_owned(),
                found: next.version,
                in_force: self.version,
            });
        }
        if next.version == self.version && next.version > 0 && next.digest != self.digest {
            return Err(AdmitError::SameVersion {
                file: file.to_owned(),
                version: next.version,
            });
        }
        Ok(())
    }
}

/// Where a host keeps its mark: a small JSON file, replaced as a whole, on the disk before [`MarkStore::raise`] returns.
#[derive(Clone, Debug)]
pub struct MarkStore(PathBuf);

impl MarkStore {
    /// In this file.
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// The mark; none on a host that has had no policy. A file that cannot be read is an error, never no mark.
    pub fn read(&self) -> Result<Option<HighWater>, AdmitError> {
        let mut text = String::new();
        match File::open(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened
                .and_then(|file| file.take(MAX_MARK).read_to_string(&mut text))
                .map_err(|e| self.failed(e))?,
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|e| self.failed(e.into()))
    }

    /// Writes the mark: a new file, its bytes, its name, the folder, each on the disk before the next.
    pub fn raise(&self, mark: &HighWater) -> Result<(), AdmitError> {
        self.replace(mark).map_err(|e| self.failed(e))
    }

    fn replace(&self, mark: &HighWater) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(mark)?;
        bytes.push(b'\n');
        let fresh = self.0.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.0)?;
        let folder = self.0.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn failed(&self, source: io::Error) -> AdmitError {
        AdmitError::Mark {
            file: self.0.display().to_string(),
            source,
        }
    }
}

/// Why a host does not put a policy in force.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdmitError {
    /// The document is none.
    #[error(transparent)]
    Document(#[from] PolicyError),
    /// The signatures are none.
    #[error("{0}")]
    Signatures(#[from] SignError),
    /// Too few signers.
    #[error(
        "policy {file} has {found} trusted signatures, this host wants {wanted}; have it signed with `casemate policy sign`"
    )]
    UnderThreshold {
        /// The file.
        file: String,
        /// How many trusted signers signed.
        found: usize,
        /// How many must.
        wanted: usize,
    },
    /// A signed policy without version.
    #[error(
        "policy {file} has no version; a signed one needs `version = N`, or nobody could tell old from new"
    )]
    NoVersion {
        /// The file.
        file: String,
    },
    /// The host demanded signatures before, and is now told not to.
    #[error(
        "policy {file}: this host has had a signed policy in force and is no longer told whose signatures to demand; \
         put `policy_trust` back into its configuration"
    )]
    TrustGone {
        /// The file.
        file: String,
    },
    /// Not now.
    #[error("policy {file} is not valid at {now}: not before {}, not after {}; load one that is", moment(.begin), moment(.end))]
    NotValid {
        /// The file.
        file: String,
        /// The moment.
        now: Timestamp,
        /// The beginning.
        begin: Option<Timestamp>,
        /// The end.
        end: Option<Timestamp>,
    },
    /// Older than the one in force.
    #[error(
        "policy {file} is version {found}, and version {in_force} has been in force; raise its version above that"
    )]
    Older {
        /// The file.
        file: String,
        /// Its version.
        found: u64,
        /// The version of the mark.
        in_force: u64,
    },
    /// Another text under the same version.
    #[error(
        "policy {file} is another text than the version {version} that has been in force; raise its version"
    )]
    SameVersion {
        /// The file.
        file: String,
        /// The version.
        version: u64,
    },
    /// The mark cannot be read or written.
    #[error(
        "the mark of the newest policy, {file}: {source}; without it no policy is put in force"
    )]
    Mark {
        /// The file.
        file: String,
        /// What the system said.
        source: io::Error,
    },
}

impl AdmitError {
    /// The stable code.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Document(_) => "DOCUMENT_INVALID",
            Self::Signatures(_) => "SIGNATURES_INVALID",
            Self::UnderThreshold { .. } => "UNDER_THRESHOLD",
            Self::NoVersion { .. } => "NO_VERSION",
            Self::TrustGone { .. } => "TRUST_GONE",
            Self::NotValid { .. } => "NOT_VALID_NOW",
            Self::Older { .. } => "OLDER_POLICY",
            Self::SameVersion { .. } => "SAME_VERSION",
            Self::Mark { .. } => "MARK_UNUSABLE",
        }
    }
}

fn moment(time: &Option<Timestamp>) -> String {
    time.map_or_else(|| "said".to_owned(), |time| time.to_string())
}

/// The largest mark, in bytes.
const MAX_MARK: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sign::SigningKey;

    fn text(version: u64, more: &str) -> String {
        format!(
            "version = {version}\n{more}\nhost = {{ name = 'h' }}\ntechnologies = {{ allowed = [] }}\n\
             limits = {{ max_vcpus = 1, max_memory_mib = 1 }}\n"
        )
    }

    fn key() -> SigningKey {
        SigningKey::read(&SigningKey::generate().unwrap()).unwrap()
    }

    fn signed(text: &str, keys: &[&SigningKey]) -> Vec<u8> {
        let mut all = Signatures::default();
        for key in keys {
            all.add(key.sign(text.as_bytes())).unwrap();
        }
        all.to_toml().unwrap().into_bytes()
    }

    fn admit(
        text: &str,
        signatures: Option<&[u8]>,
        trust: Option<&Trust>,
        mark: Option<&HighWater>,
    ) -> Result<HighWater, &'static str> {
        let candidate = Candidate {
            file: "p",
            text,
            signatures,
        };
        let now = "2026-06-01T00:00:00Z".parse().unwrap();
        let admitted = candidate.admit(trust, mark, now);
        admitted.map(|a| a.mark).map_err(|e| e.code())
    }

    #[test]
    fn signatures_threshold_version_and_time_are_all_wanted() {
        let (a, b, stranger) = (key(), key(), key());
        let trust = Trust::new([a.public(), b.public()], 2).unwrap();
        let good = text(3, "");
        let both = signed(&good, &[&a, &b]);
        let mark = admit(&good, Some(&both), Some(&trust), None).unwrap();
        assert_eq!((mark.version, mark.signed), (3, true));
        let refused = |text: &str, keys: &[&SigningKey]| {
            admit(text, Some(&signed(text, keys)), Some(&trust), None).unwrap_err()
        };
        assert_eq!(refused(&good, &[&a]), "UNDER_THRESHOLD");
        assert_eq!(refused(&good, &[&a, &stranger]), "UNDER_THRESHOLD");
        assert_eq!(refused(&text(0, ""), &[&a, &b]), "NO_VERSION");
        assert_eq!(
            admit(&good, None, Some(&trust), None),
            Err("UNDER_THRESHOLD")
        );
        // Signed is the text, not the version.
        assert_eq!(
            admit(&text(4, ""), Some(&both), Some(&trust), None),
            Err("SIGNATURES_INVALID")
        );
        for (when, held) in [
            ("not_before = '2026-06-01T00:00:00Z'", true),
            ("not_before = '2026-06-01T00:00:01Z'", false),
            ("not_after = '2026-06-01T00:00:00Z'", false),
            ("not_after = '2026-06-01T00:00:01Z'", true),
        ] {
            let found = admit(&text(3, when), None, None, None);
            let wanted = if held { None } else { Some("NOT_VALID_NOW") };
            assert_eq!(found.err(), wanted, "{when}");
        }
    }

    #[test]
    fn a_host_never_goes_back() {
        let a = key();
        let trust = Trust::new([a.public()], 1).unwrap();
        let load = |text: &str, mark: Option<&HighWater>| {
            admit(text, Some(&signed(text, &[&a])), Some(&trust), mark)
        };
        let mark = load(&text(7, ""), None).unwrap();
        assert_eq!(load(&text(7, ""), Some(&mark)), Ok(mark.clone()));
        assert_eq!(load(&text(6, ""), Some(&mark)), Err("OLDER_POLICY"));
        assert_eq!(load(&text(7, "# other"), Some(&mark)), Err("SAME_VERSION"));
        assert_eq!(load(&text(8, ""), Some(&mark)).unwrap().version, 8);
        // Nor back to unsigned ones, however new.
        assert_eq!(
            admit(&text(9, ""), None, None, Some(&mark)),
            Err("TRUST_GONE")
        );
        // A host that demands nothing may edit a policy without version, and not drop a version it has had.
        let loose = admit(&text(0, ""), None, None, None).unwrap();
        assert!(admit(&text(0, "# other"), None, None, Some(&loose)).is_ok());
        let counted = admit(&text(1, ""), None, None, Some(&loose)).unwrap();
        assert_eq!(
            admit(&text(0, ""), None, None, Some(&counted)),
            Err("OLDER_POLICY")
        );
    }

    #[test]
    fn the_mark_is_kept_and_a_damaged_one_refuses() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.mark");
        let store = MarkStore::new(&path);
        assert_eq!(store.read().unwrap(), None);
        let mut mark = admit(&text(7, ""), None, None, None).unwrap();
        store.raise(&mark).unwrap();
        mark.version = 8;
        store.raise(&mark).unwrap();
        assert_eq!(store.read().unwrap(), Some(mark));
        // What a crash leaves behind beside it does not matter.
        fs::write(path.with_extension("new"), "half").unwrap();
        assert_eq!(store.read().unwrap().unwrap().version, 8);
        for damaged in ["", "{}", "{\"version\":8"] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(store.read().unwrap_err().code(), "MARK_UNUSABLE");
        }
    }
}
