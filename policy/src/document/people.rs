//! `[people]` and `[[person]]`: who may do what, to which guests, and what takes two.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::guest::NamePattern;
use super::parse;
use crate::action::ActionKind;
use crate::claims::Actor;
use crate::types::{DnsName, Fingerprint};

/// The people of a policy. A policy without them leaves it to the agent's socket who may ask: whoever it lets in is an
/// operator and everything else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct People {
    persons: Vec<Person>,
    two_person: BTreeSet<ActionKind>,
}

impl People {
    pub(super) fn new(
        persons: Vec<Person>,
        two_person: BTreeSet<ActionKind>,
    ) -> Result<Self, String> {
        if !two_person.is_empty() && persons.len() < 2 {
            return Err(
                "two_person needs two: add a second [[person]], or nobody can ever do it"
                    .to_owned(),
            );
        }
        Ok(Self {
            persons,
            two_person,
        })
    }

    /// Everybody.
    pub fn persons(&self) -> &[Person] {
        &self.persons
    }

    /// The one whom an actor's identity names; nobody if it names two, as a certificate with one's name and another's
    /// key does.
    pub fn find(&self, actor: &Actor) -> Option<&Person> {
        let mut fitting = self.persons.iter().filter(|person| person.is(actor));
        let first = fitting.next()?;
        fitting.next().is_none().then_some(first)
    }

    /// Whether an action takes a second person.
    pub fn takes_two(&self, kind: ActionKind) -> bool {
        self.two_person.contains(&kind)
    }

    /// The user ids of this machine that the policy names.
    pub fn uids(&self) -> impl Iterator<Item = u32> {
        self.persons.iter().filter_map(|person| person.uid)
    }
}

/// `[[person]]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Person {
    /// The name in records.
    #[serde(deserialize_with = "parse::label")]
    pub name: String,
    /// What the person is here for.
    pub role: Role,
    /// The user id at this machine's Unix socket.
    pub uid: Option<u32>,
    /// The DNS subject alternative name of the client certificate.
    pub san: Option<DnsName>,
    /// SHA-256 of the DER SubjectPublicKeyInfo of the client certificate.
    pub spki: Option<Fingerprint>,
    /// The guests that the person may act on (default: all).
    pub guests: Option<BTreeSet<NamePattern>>,
    /// What the person may do, among what the role may (default: all of it).
    pub actions: Option<BTreeSet<ActionKind>>,
}

impl Person {
    /// Whether role and narrowing let the person do this.
    pub fn may(&self, kind: ActionKind) -> bool {
        self.role.may(kind) && self.actions.as_ref().is_none_or(|all| all.contains(&kind))
    }

    /// Whether the person may act on this guest.
    pub fn may_touch(&self, guest: &str) -> bool {
        self.guests
            .as_ref()
            .is_none_or(|all| all.iter().any(|pattern| pattern.fits(guest)))
    }

    fn is(&self, actor: &Actor) -> bool {
        match actor {
            Actor::Host => false,
            Actor::Local { uid } => self.uid == Some(*uid),
            // What is named must fit, and something must be named.
            Actor::Certificate { san, spki } => {
                (self.san.is_some() || self.spki.is_some())
                    && self.san.as_ref().is_none_or(|own| own == san)
                    && self.spki.is_none_or(|own| own == *spki)
            }
        }
    }

    pub(super) fn check(&self, others: &[Self]) -> Result<(), String> {
        let name = &self.name;
        if self.uid.is_none() && self.san.is_none() && self.spki.is_none() {
            return Err(format!(
                "nothing tells who `{name}` is; add uid = N, san = \"…\" or spki = \"sha256:…\""
            ));
        }
        if let Some(kind) = self
            .actions
            .iter()
            .flatten()
            .find(|kind| !self.role.may(**kind))
        {
            return Err(format!(
                "`{name}`: a {} may not {}; take it out of `actions`, or give another role",
                self.role,
                kind.as_str()
            ));
        }
        // One san with two keys is one person with two: nobody is two persons.
        let same = |other: &&Self| {
            other.name == *name
                || self.uid.is_some() && other.uid == self.uid
                || self.san.is_some() && other.san == self.san
                || self.spki.is_some() && other.spki == self.spki
        };
        match others.iter().find(same) {
            Some(other) => Err(format!(
                "`{name}` repeats the name, uid, san or spki of `{}`",
                other.name
            )),
            None => Ok(()),
        }
    }
}

/// What a person is here for. What a role may do is fixed: a file narrows it, none widens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Looks.
    Viewer,
    /// Looks, runs and moves guests.
    Operator,
    /// Looks, changes policy, keys and platform, and is the second person; runs no guests.
    SecurityOfficer,
    /// Looks, reads evidence, and tries the sandbox.
    Auditor,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Viewer,
        Self::Operator,
        Self::SecurityOfficer,
        Self::Auditor,
    ];

    /// Whether the role may do this at all.
    pub const fn may(self, kind: ActionKind) -> bool {
        use ActionKind as Kind;
        match kind {
            Kind::List
            | Kind::Status
            | Kind::Measurement
            | Kind::SandboxReport
            | Kind::PlatformShow => true,
            Kind::EvidenceRead => !matches!(self, Self::Viewer),
            Kind::SandboxProbe => !matches!(self, Self::Viewer),
            Kind::Launch
            | Kind::Clone
            | Kind::Stop
            | Kind::Pause
            | Kind::Resume
            | Kind::Nmi
            | Kind::Resize
            | Kind::Console
            | Kind::Attach
            | Kind::Detach
            | Kind::Upgrade
            | Kind::Snapshot
            | Kind::SnapshotErase
            | Kind::MigrateOut
            | Kind::Cancel
            | Kind::Replicate
            | Kind::Failover
            | Kind::FailoverForced
            | Kind::Attest
            | Kind::ReleaseSecret
            | Kind::InjectSecret => matches!(self, Self::Operator),
            Kind::PolicyLoad
            | Kind::PlatformAdmin
            | Kind::EvidenceKeyRotate
            | Kind::EvidenceRetain => matches!(self, Self::SecurityOfficer),
            Kind::Approve => matches!(self, Self::Operator | Self::SecurityOfficer),
            // A host's own and a peer's business, never a person's.
            Kind::MigrateIn | Kind::MigrateSession => false,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::SecurityOfficer => "security-officer",
            Self::Auditor => "auditor",
        })
    }
}
