//! `[[guest]]`: what an owner demands of the guests it names.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::parse;
use crate::claims::{Product, Tcb};
use crate::floor;
use crate::types::{LaunchDigest, LaunchSigner, Technology, TypeError, shorten};

/// One owner's rules for the guests whose names fit. A list that is absent demands nothing; an empty one allows nothing.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestRules {
    /// Whose rules these are.
    #[serde(deserialize_with = "parse::label")]
    pub owner: String,
    /// The guests they are for.
    pub names: BTreeSet<NamePattern>,
    /// Which technologies these guests may have, among the host's.
    pub technologies: Option<BTreeSet<Technology>>,
    /// What they may have been launched from.
    pub launch_digests: Option<BTreeSet<LaunchDigest>>,
    /// Who may vouch for a launch whose digest is not listed.
    pub launch_signers: Option<BTreeSet<LaunchSigner>>,
    /// Bits of the guest policy that must be set.
    #[serde(default)]
    pub required_policy_bits: u64,
    /// Bits of the guest policy that must be clear.
    #[serde(default)]
    pub forbidden_policy_bits: u64,
    /// The least TCB by product; a product that is not named is refused, if any is.
    #[serde(default)]
    pub tcb: BTreeMap<Product, Tcb>,
    /// The highest (least privileged) VMPL that evidence may come from.
    pub max_vmpl: Option<u8>,
    /// Whether evidence must answer a nonce (default: no).
    #[serde(default)]
    pub nonce: bool,
    /// The oldest evidence, in seconds.
    pub max_evidence_age_s: Option<u64>,
    /// The sites where these guests and their replicas may be.
    pub sites: Option<BTreeSet<String>>,
    /// The peers they may come from and go to.
    pub peers: Option<BTreeSet<String>>,
    /// How they may move (default: not at all).
    #[serde(default)]
    pub migration: BTreeSet<MoveMode>,
    /// Whether they may move on direct paths only (default: no).
    #[serde(default)]
    pub direct_only: bool,
    /// How a replica must at least be sealed (default: there may be none).
    pub replicas: Option<ReplicaSeal>,
}

impl GuestRules {
    /// What makes no sense, whatever the guest.
    pub(super) fn check(&self, peers: &BTreeSet<&str>) -> Result<(), String> {
        let owner = &self.owner;
        if self.names.is_empty() {
            return Err(format!(
                "the rules of `{owner}` name no guest; write names = [\"NAME\", \"BEGINNING*\"]"
            ));
        }
        let both = self.required_policy_bits & self.forbidden_policy_bits;
        if both != 0 {
            return Err(format!(
                "`{owner}` requires and forbids guest policy bits {both:#x}; no guest has such a policy"
            ));
        }
        if self.max_vmpl.is_some_and(|level| level > 3) {
            return Err(format!("max_vmpl of `{owner}`: there are levels 0 to 3"));
        }
        if let Some((product, _)) = self
            .tcb
            .iter()
            .find(|(product, tcb)| tcb.fmc.is_some() && **product != Product::Turin)
        {
            return Err(format!(
                "tcb.{product} of `{owner}`: only turin has an `fmc`; remove it"
            ));
        }
        for name in self.peers.iter().flatten() {
            if !peers.contains(name.as_str()) {
                return Err(format!(
                    "`{owner}` allows peer `{name}`, which no [[peer]] describes"
                ));
            }
        }
        self.against_floor()
    }

    /// What the floor refuses anyway must not look allowed.
    fn against_floor(&self) -> Result<(), String> {
        let owner = &self.owner;
        let only = |technology| {
            self.technologies
                .as_ref()
                .is_some_and(|all| !all.is_empty() && all.iter().all(|t| *t == technology))
        };
        let snp = only(Technology::SevSnp) && self.required_policy_bits & floor::SNP_DEBUG != 0;
        let sev = (only(Technology::Sev) || only(Technology::SevEs))
            && self.forbidden_policy_bits & floor::SEV_NODBG != 0;
        if snp || sev {
            return Err(format!(
                "`{owner}` asks for guests that can be debugged; no policy can allow that"
            ));
        }
        let movable = |t: &Technology| matches!(t, Technology::None | Technology::Sev);
        let none_moves = self
            .technologies
            .as_ref()
            .is_some_and(|all| !all.is_empty() && !all.iter().any(movable));
        if none_moves && self.migration.contains(&MoveMode::Live) {
            return Err(format!(
                "`{owner}` lets sev-es or sev-snp guests move live, which no Linux does; write migration = [\"relaunch\"]"
            ));
        }
        Ok(())
    }
}

/// All `[[guest]]` sections, found by a guest's name in time that does not grow with their number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestBook {
    rules: Vec<GuestRules>,
    exact: HashMap<String, Vec<usize>>,
    prefixes: HashMap<String, Vec<usize>>,
    prefix_lengths: BTreeSet<usize>,
}

impl GuestBook {
    pub(super) fn new(rules: Vec<GuestRules>) -> Self {
        let mut book = Self::default();
        for (index, rule) in rules.iter().enumerate() {
            for name in &rule.names {
                let (map, key) = match name {
                    NamePattern::Exact(name) => (&mut book.exact, name),
                    NamePattern::Prefix(start) => {
                        book.prefix_lengths.insert(start.len());
                        (&mut book.prefixes, start)
                    }
                };
                map.entry(key.clone()).or_default().push(index);
            }
        }
        book.rules = rules;
        book
    }

    /// All sections, in the order of the document.
    pub fn rules(&self) -> &[GuestRules] {
        &self.rules
    }

    /// The sections that name this guest, in the order of the document.
    pub fn of(&self, guest: &str) -> Vec<&GuestRules> {
        let starts = self
            .prefix_lengths
            .iter()
            .map_while(|length| guest.get(..*length))
            .filter_map(|start| self.prefixes.get(start));
        let found: BTreeSet<usize> = starts
            .chain(self.exact.get(guest))
            .flatten()
            .copied()
            .collect();
        found
            .into_iter()
            .filter_map(|index| self.rules.get(index))
            .collect()
    }
}

/// A guest's name, or how it begins (`bank-*`; `*` is every name).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NamePattern {
    /// This name.
    Exact(String),
    /// Every name that begins so.
    Prefix(String),
}

impl NamePattern {
    /// Whether a name fits.
    pub fn fits(&self, name: &str) -> bool {
        match self {
            Self::Exact(whole) => name == whole,
            Self::Prefix(start) => name.starts_with(start.as_str()),
        }
    }
}

impl FromStr for NamePattern {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        let wrong = || TypeError::NamePattern {
            found: shorten(text),
        };
        match text.strip_suffix('*') {
            Some("") => Ok(Self::Prefix(String::new())),
            Some(start) if is_name(start) => Ok(Self::Prefix(start.to_owned())),
            None if is_name(text) => Ok(Self::Exact(text.to_owned())),
            _ => Err(wrong()),
        }
    }
}

/// A guest's name, or the path of a broker's resource: up to three labels.
fn is_name(text: &str) -> bool {
    text.split('/').count() <= 3 && text.split('/').all(parse::is_label)
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Prefix(start) => write!(f, "{start}*"),
        }
    }
}

/// How a guest comes to another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveMode {
    /// While it runs.
    Live,
    /// Launched again there from its replicated disks, and attested.
    Relaunch,
}

impl fmt::Display for MoveMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "live",
            Self::Relaunch => "relaunch",
        })
    }
}

/// How a replica is kept at rest, the stronger the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaSeal {
    /// Sealed by keys of the two hosts.
    Sealed,
    /// Sealed by a key to which the owner contributes.
    OwnerSealed,
}

impl fmt::Display for ReplicaSeal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sealed => "sealed",
            Self::OwnerSealed => "owner-sealed",
        })
    }
}
