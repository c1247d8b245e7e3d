//! The document itself: typed, bounded, and strict about what it does not know.

use crate::measure::guest::{GuestDigest, Technology};
use crate::measure::id_block::IdKeyDigest;
use crate::measure::vcpu::{CpuSignature, VcpuCount};
use crate::measure::vmsa::{Profile, SevFeatures};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt;
use std::time::{Duration, SystemTime};

/// Launch digests with their inputs, and when they hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceDocument {
    version: u32,
    /// They do not hold before.
    pub not_before: Timestamp,
    /// They do not hold from then on.
    pub expires: Timestamp,
    /// The guests, each name once.
    pub guest: Vec<ReferenceGuest>,
}

/// One guest, in as many sizes as it may be launched in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceGuest {
    /// 1 to 64 letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// What must protect it.
    pub technology: Technology,
    /// The key that must have signed its ID block; SNP only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id_key_digest: Option<IdKeyDigest>,
    /// The key that must have signed the ID key; SNP only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author_key_digest: Option<IdKeyDigest>,
    /// What all its digests were computed from.
    pub inputs: Inputs,
    /// Its digests.
    pub launch: Vec<Launch>,
}

/// What a guest's digests were computed from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// Whose VMM.
    pub vmsa_profile: Profile,
    /// The features its VMSAs carry; none in SEV.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_features: Option<SevFeatures>,
    /// The command line with its terminating zero byte; none without a kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline_sha256: Option<Hash256>,
    /// The firmware.
    pub firmware: FileReference,
    /// The kernel, where it is measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<FileReference>,
    /// The initrd, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<FileReference>,
}

/// A file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileReference {
    /// Of its content.
    pub sha256: Hash256,
    /// In bytes.
    pub size: u64,
}

/// One digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// The launch digest.
    pub digest: GuestDigest,
    /// With so many vCPUs; none in SEV, where they are not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<VcpuCount>,
    /// Of this type, where one was named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_type: Option<String>,
    /// Of this signature; none in SEV.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_signature: Option<CpuSignature>,
}

/// A SHA-256 hash, shown and serialised as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hash256(pub [u8; 32]);

/// A moment from 1970 to 9999, to the second, written as in RFC 3339, in UTC:
/// `2026-01-01T00:00:00Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp(SystemTime);

/// Why a document is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// Not this kind of document.
    #[error("not a reference value document: {0}")]
    Syntax(String),
    /// A version that is not known.
    #[error("reference value documents of version {0} are not known; 1 is")]
    Version(u32),
    /// It never holds.
    #[error("`expires` is not later than `not_before`")]
    Validity,
    /// Nothing in it, or too much.
    #[error("{what} has {found} entries; 1 to {max} are taken")]
    Count {
        /// Which list.
        what: String,
        /// Its entries.
        found: usize,
        /// The most.
        max: usize,
    },
    /// A name that is none.
    #[error("`{0}` is no guest name: 1 to {MAX_NAME_LEN} letters, digits, `.`, `_` and `-` are")]
    Name(String),
    /// Two guests of one name.
    #[error("two guests are named `{0}`")]
    Duplicate(String),
    /// Digest or key digest of another technology.
    #[error("guest `{name}`: {what} does not go with {technology}")]
    Technology {
        /// The guest.
        name: String,
        /// What does not fit.
        what: &'static str,
        /// Its technology.
        technology: Technology,
    },
}

/// Why a text is not what its field asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is not {wanted}")]
pub struct FieldError {
    found: String,
    wanted: &'static str,
}

impl ReferenceDocument {
    /// A new document. Refused where [`ReferenceDocument::parse`] would.
    pub fn new(
        not_before: Timestamp,
        expires: Timestamp,
        guest: Vec<ReferenceGuest>,
    ) -> Result<Self, DocumentError> {
        let document = Self {
            version: VERSION,
            not_before,
            expires,
            guest,
        };
        document.check()?;
        Ok(document)
    }

    /// Reads a document that is believed already, or that is about to be signed.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        let syntax = |error: &dyn fmt::Display| DocumentError::Syntax(error.to_string());
        if bytes.len() > super::MAX_DOCUMENT_LEN {
            return Err(syntax(&format_args!("{} bytes", bytes.len())));
        }
        let text = std::str::from_utf8(bytes).map_err(|e| syntax(&e))?;
        let document: Self = toml::from_str(text).map_err(|e| syntax(&e))?;
        document.check()?;
        Ok(document)
    }

    /// The document's text.
    pub fn to_toml(&self) -> Result<String, DocumentError> {
        toml::to_string(self).map_err(|error| DocumentError::Syntax(error.to_string()))
    }

    fn check(&self) -> Result<(), DocumentError> {
        if self.version != VERSION {
            return Err(DocumentError::Version(self.version));
        }
        if self.expires <= self.not_before {
            return Err(DocumentError::Validity);
        }
        counted("the document", self.guest.len(), MAX_GUESTS)?;
        let mut names = HashSet::new();
        for guest in &self.guest {
            guest.check()?;
            if !names.insert(guest.name.as_str()) {
                return Err(DocumentError::Duplicate(guest.name.clone()));
            }
        }
        Ok(())
    }
}

impl ReferenceGuest {
    fn check(&self) -> Result<(), DocumentError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let length = 1..=MAX_NAME_LEN;
        if !length.contains(&self.name.len()) || !self.name.chars().all(plain) {
            return Err(DocumentError::Name(self.name.clone()));
        }
        counted(&self.name, self.launch.len(), MAX_LAUNCHES)?;
        let is_snp = self.technology == Technology::Snp;
        let refuse = |what| DocumentError::Technology {
            name: self.name.clone(),
            what,
            technology: self.technology,
        };
        let keys = self.id_key_digest.or(self.author_key_digest);
        if !is_snp && keys.is_some() {
            return Err(refuse("an ID or author key"));
        }
        for launch in &self.launch {
            if matches!(launch.digest, GuestDigest::Snp(_)) != is_snp {
                return Err(refuse("a digest of that length"));
            }
        }
        Ok(())
    }
}

impl std::str::FromStr for Timestamp {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for Hash256 {
    type Error = FieldError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut bytes = [0; 32];
        match hex::decode_to_slice(&text, &mut bytes) {
            Ok(()) => Ok(Self(bytes)),
            Err(_) => Err(FieldError {
                found: text,
                wanted: "a SHA-256 hash of 64 hex digits",
            }),
        }
    }
}

impl From<Hash256> for String {
    fn from(hash: Hash256) -> Self {
        hash.to_string()
    }
}

impl fmt::Display for Hash256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Hash256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash256({self})")
    }
}

impl Timestamp {
    /// A moment, its fraction of a second cut off; `None` outside of the years that can be
    /// written.
    pub fn new(time: SystemTime) -> Option<Self> {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let whole = Duration::from_secs(since.as_secs());
        let writable = whole.as_secs() <= END_OF_9999;
        writable.then(|| Self(SystemTime::UNIX_EPOCH + whole))
    }

    /// The moment.
    pub const fn time(self) -> SystemTime {
        self.0
    }
}

impl TryFrom<String> for Timestamp {
    type Error = FieldError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let time = humantime::parse_rfc3339(&text).ok();
        time.and_then(Self::new).ok_or(FieldError {
            found: text,
            wanted: "a moment like 2026-01-01T00:00:00Z",
        })
    }
}

impl From<Timestamp> for String {
    fn from(timestamp: Timestamp) -> Self {
        timestamp.to_string()
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No `Timestamp` is outside of what the writer takes.
        write!(f, "{}", humantime::format_rfc3339_seconds(self.0))
    }
}

fn counted(what: &str, found: usize, max: usize) -> Result<(), DocumentError> {
    if (1..=max).contains(&found) {
        return Ok(());
    }
    Err(DocumentError::Count {
        what: what.to_owned(),
        found,
        max,
    })
}

const VERSION: u32 = 1;
const END_OF_9999: u64 = 253_402_300_799;
const MAX_GUESTS: usize = 1024;
const MAX_LAUNCHES: usize = 8192;
const MAX_NAME_LEN: usize = 64;
