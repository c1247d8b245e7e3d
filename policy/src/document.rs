//! The host's policy as a typed TOML document.
//!
//! The file is written by an administrator and believed only after it has parsed whole: an unknown key, a value of the
//! wrong kind or a contradiction refuses the document, with file, line, key and what would be right.

pub mod guest;
mod parse;
pub mod people;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::num::{NonZeroU16, NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::claims::{Firmware, SandboxLevel};
use crate::types::{Fingerprint, Identity, Technology, Timestamp};
use guest::GuestBook;
use people::People;

/// A host's policy: what may run here, with whom it may migrate, and which local resources an arriving guest may get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPolicy {
    /// Counts up with every change; 0 if the document has none.
    pub version: u64,
    /// When the policy holds.
    pub validity: Validity,
    /// The host this policy is for.
    pub host: Host,
    /// Which confidential technologies may run.
    pub technologies: Technologies,
    /// What the sandbox must at least be able to enforce.
    pub sandbox: Sandbox,
    /// The largest guest.
    pub limits: Limits,
    /// Which files of the host requests may name.
    pub files: Files,
    /// Whether and how guests may move.
    pub migration: Migration,
    peers: Vec<Peer>,
    incoming_disks: Vec<IncomingDisk>,
    incoming_nets: Vec<IncomingNet>,
    firmware: Vec<FirmwareMinimum>,
    guests: Option<GuestBook>,
    people: Option<People>,
    digest: Fingerprint,
}

impl HostPolicy {
    /// Reads and parses a policy file of at most [`MAX_DOCUMENT`] bytes.
    pub fn load(path: &Path) -> Result<Self, PolicyError> {
        let file = path.display().to_string();
        let unreadable = |source| PolicyError::Unreadable {
            file: file.clone(),
            source,
        };
        let mut text = String::new();
        let opened = File::open(path).map_err(unreadable)?;
        opened
            .take(MAX_DOCUMENT + 1)
            .read_to_string(&mut text)
            .map_err(unreadable)?;
        Self::parse(&file, &text)
    }

    /// Parses a policy; `file` only names it in errors.
    pub fn parse(file: &str, text: &str) -> Result<Self, PolicyError> {
        if text.len() as u64 > MAX_DOCUMENT {
            return Err(PolicyError::TooLarge {
                file: file.to_owned(),
            });
        }
        parse::document(file, text)
    }

    /// SHA-256 of the document's text, for the ledger.
    pub fn digest(&self) -> Fingerprint {
        self.digest
    }

    /// The hosts this one may exchange guests with.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// The peer with this local name.
    pub fn peer_named(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name == name)
    }

    /// The peer with this end-to-end identity: name and key must both match the same entry.
    pub fn peer_with(&self, identity: &Identity) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.identity == *identity)
    }

    /// The disks an arriving guest may be given.
    pub fn incoming_disks(&self) -> &[IncomingDisk] {
        &self.incoming_disks
    }

    /// The local path behind a disk id that an arriving description asks for.
    pub fn incoming_disk(&self, id: &str) -> Option<&IncomingDisk> {
        self.incoming_disks.iter().find(|disk| disk.id == id)
    }

    /// The networks an arriving guest may be joined to.
    pub fn incoming_nets(&self) -> &[IncomingNet] {
        &self.incoming_nets
    }

    /// The local network behind a net id that an arriving description asks for.
    pub fn incoming_net(&self, id: &str) -> Option<&IncomingNet> {
        self.incoming_nets.iter().find(|net| net.id == id)
    }

    /// The least firmware of the secure processor for a technology.
    pub fn firmware(&self, technology: Technology) -> Option<&FirmwareMinimum> {
        self.firmware.iter().find(|m| m.technology == technology)
    }

    /// The owners' rules; none if the document has no `[[guest]]` at all, and then every guest may be here.
    pub fn guests(&self) -> Option<&GuestBook> {
        self.guests.as_ref()
    }

    /// The people; none if the document has neither `[people]` nor `[[person]]`.
    pub fn people(&self) -> Option<&People> {
        self.people.as_ref()
    }
}

/// When a policy holds: from its beginning up to, and without, its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Validity {
    /// The beginning; without it, always.
    pub not_before: Option<Timestamp>,
    /// The end; without it, never.
    pub not_after: Option<Timestamp>,
}

impl Validity {
    /// Whether it holds at a moment.
    pub fn holds(&self, now: Timestamp) -> bool {
        self.not_before.is_none_or(|begin| begin <= now)
            && self.not_after.is_none_or(|end| now < end)
    }
}

/// `[host]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// The name by which this host appears in records.
    #[serde(deserialize_with = "parse::label")]
    pub name: String,
    /// The site where it stands.
    #[serde(default, deserialize_with = "parse::optional_label")]
    pub site: Option<String>,
}

/// `[technologies]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Technologies {
    /// What may be launched, received and sent.
    pub allowed: BTreeSet<Technology>,
    /// Whether the software secure processor counts (default: no).
    #[serde(default)]
    pub allow_emulated: bool,
}

/// `[files]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Files {
    /// Folders: what a request names of this host, and what a description names, lies in one of them (default: no rule).
    #[serde(default, deserialize_with = "parse::optional_folders")]
    pub folders: Option<Vec<PathBuf>>,
}

/// `[sandbox]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// The oldest Landlock ABI with which a role may start (default 1).
    #[serde(default = "landlock_default")]
    pub landlock_min_abi: NonZeroU32,
    /// How much of the sandbox must be in force where a guest starts (default: no rule).
    pub level: Option<SandboxLevel>,
}

/// `[[firmware]]`: the least firmware of the secure processor.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirmwareMinimum {
    /// For guests of this technology.
    pub technology: Technology,
    /// API major.
    pub major: u8,
    /// API minor.
    pub minor: u8,
    /// Build of that very API version (default 0); a newer API has newer builds.
    #[serde(default)]
    pub build: u8,
}

impl FirmwareMinimum {
    /// The version that is at least wanted.
    pub fn version(&self) -> Firmware {
        Firmware {
            major: self.major,
            minor: self.minor,
            build: self.build,
        }
    }
}

/// `[limits]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// The most vCPUs a guest may have.
    pub max_vcpus: NonZeroU16,
    /// The most memory a guest may have, in MiB.
    pub max_memory_mib: NonZeroU64,
}

/// `[migration]`; without the section nothing moves.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migration {
    /// Whether guests may be sent.
    #[serde(default)]
    pub outgoing: bool,
    /// Whether guests may be received.
    #[serde(default)]
    pub incoming: bool,
    /// The longest pause of a guest that is planned for, in milliseconds (default 500).
    #[serde(default = "downtime_default")]
    pub downtime_limit_ms: NonZeroU32,
    /// Fingerprints of the emulated roots whose platforms a guest may be sent to; AMD's own roots are built in.
    #[serde(default)]
    pub trusted_emulated_roots: Vec<Fingerprint>,
    /// TLS cipher suites over which guests may move (default: those of the program).
    pub suites: Option<BTreeSet<String>>,
    /// Key agreement groups with which guests may move (default: those of the program).
    pub groups: Option<BTreeSet<String>>,
    /// Who does this host's bulk cryptography of a move (default: the program's own choice, AWS-LC where it is built in).
    pub provider: Option<CryptoProvider>,
}

/// An implementation of TLS and of page seals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CryptoProvider {
    /// AWS-LC, not its FIPS build.
    AwsLc,
    /// ring.
    Ring,
}

impl CryptoProvider {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AwsLc => "aws-lc",
            Self::Ring => "ring",
        }
    }
}

/// `[[peer]]`: another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name here.
    pub name: String,
    /// Its end-to-end identity, whatever the path.
    pub identity: Identity,
    /// How it is reached.
    pub path: PeerPath,
    /// The site where it stands.
    pub site: Option<String>,
}

impl Peer {
    /// Who must terminate the TLS connection: the peer itself, or the gateway that policy names.
    pub fn tls_identity(&self) -> &Identity {
        match &self.path {
            PeerPath::Direct => &self.identity,
            PeerPath::Gateway(gateway) => gateway,
        }
    }
}

/// How a peer is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerPath {
    /// The TLS connection ends at the peer; keys are bound to it.
    Direct,
    /// A gateway with this identity terminates the TLS; it sees sealed pages only.
    Gateway(Identity),
}

/// `[[incoming_disk]]`: a local disk for arriving guests. The peer names the id, never the path.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IncomingDisk {
    /// The id in the arriving description.
    #[serde(deserialize_with = "parse::label")]
    pub id: String,
    /// The local file or block device.
    #[serde(deserialize_with = "parse::absolute_path")]
    pub path: PathBuf,
}

/// `[[incoming_net]]`: a local network for arriving guests.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IncomingNet {
    /// The id in the arriving description.
    #[serde(deserialize_with = "parse::label")]
    pub id: String,
    /// The local bridge that the guest's tap joins.
    #[serde(deserialize_with = "parse::interface")]
    pub bridge: String,
}

/// Why a policy document was not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The file could not be read.
    #[error("policy {file} cannot be read: {source}; check the path and that it is UTF-8 text")]
    Unreadable {
        /// The file.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than any sensible policy.
    #[error(
        "policy {file} is larger than {MAX_DOCUMENT} bytes; split off what does not belong there"
    )]
    TooLarge {
        /// The file.
        file: String,
    },
    /// The text is not a policy.
    #[error("{file}:{line}: {key}: {problem}")]
    Invalid {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// The key, with its section.
        key: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

/// The largest policy document, in bytes.
pub const MAX_DOCUMENT: u64 = 1 << 20;

impl Default for Sandbox {
    fn default() -> Self {
        Self {
            landlock_min_abi: landlock_default(),
            level: None,
        }
    }
}

impl Default for Migration {
    fn default() -> Self {
        Self {
            outgoing: false,
            incoming: false,
            downtime_limit_ms: downtime_default(),
            trusted_emulated_roots: Vec::new(),
            suites: None,
            groups: None,
            provider: None,
        }
    }
}

const fn landlock_default() -> NonZeroU32 {
    NonZeroU32::MIN
}

const fn downtime_default() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(499)
}
