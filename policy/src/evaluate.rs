//! From policy and claims to a decision: a pure function, with a reason for every rule it looked at.

mod code;
mod guest;
mod people;
mod session;

use std::collections::BTreeSet;
use std::fmt::{Display, Write as _};
use std::path::{Component, Path};

use serde::Serialize;

pub use crate::action::{Action, ActionKind};
pub use code::Code;

use crate::claims::{Actor, Asking, HostClaims, Inquiry, SandboxLevel};
use crate::document::HostPolicy;
use crate::floor;
use crate::types::{Identity, Technology, Timestamp};

/// Decides whether `policy` allows what is asked. Every rule that applies is listed, kept or broken: the floor first,
/// then who asks, then the host's rules, then the owners' of the guest. The code is that of the first broken rule.
pub fn decide(policy: &HostPolicy, inquiry: &Inquiry) -> Decision {
    let mut reasons = floor::check(policy, &inquiry.action);
    reasons.extend(people::rules(policy, inquiry));
    reasons.extend(validity_rule(policy, inquiry));
    reasons.extend(host_rules(policy, &inquiry.action));
    reasons.extend(file_rule(policy, &inquiry.files));
    reasons.extend(ground_rules(policy, inquiry));
    reasons.extend(session::rules(policy, inquiry));
    reasons.extend(guest::rules(policy, inquiry));
    Decision::of(reasons)
}

/// Whether somebody may ask for a kind of action at all, before anything they named is opened: the rules of `[people]`
/// without those for two. What passes here is still to be [`decide`]d.
pub fn may_ask(policy: &HostPolicy, asking: &Asking) -> Decision {
    let object = asking.object.as_deref();
    let mut reasons = people::asking(policy, &asking.actor, asking.kind, object);
    reasons.extend(file_rule(policy, &asking.files));
    Decision::of(reasons)
}

/// [`decide`] for the host itself, of a guest without name, with no claims and no clock: what a policy without owners,
/// people and validity says of an action. A policy that has them refuses.
pub fn evaluate(policy: &HostPolicy, action: &Action) -> Decision {
    let clock = Timestamp::from_unix(0);
    decide(
        policy,
        &Inquiry::new(Actor::Host, "", action.clone(), clock),
    )
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[must_use]
pub struct Decision {
    /// Whether every rule allows it.
    pub allowed: bool,
    /// The code of the first broken rule, or [`Code::Allowed`].
    pub code: Code,
    /// Every rule that applied, the floor first.
    pub reasons: Vec<Reason>,
}

impl Decision {
    pub(crate) fn of(reasons: Vec<Reason>) -> Self {
        let code = reasons
            .iter()
            .find(|reason| !reason.allows)
            .map_or(Code::Allowed, |reason| reason.code);
        Self {
            allowed: code == Code::Allowed,
            code,
            reasons,
        }
    }

    /// The rules that refuse.
    pub fn refusals(&self) -> impl Iterator<Item = &Reason> {
        self.reasons.iter().filter(|reason| !reason.allows)
    }
}

/// One rule, and how the action stands to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The rule's stable name: a key of the document, or `floor.…`.
    pub rule: &'static str,
    /// What the rule asks for.
    pub wanted: String,
    /// What the action brings.
    pub found: String,
    /// Whether that is enough.
    pub allows: bool,
    /// The code of a decision that this rule refuses.
    #[serde(skip)]
    pub code: Code,
    /// What to do, or to do instead, if it is not; may be empty.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub remedy: &'static str,
}

fn host_rules(policy: &HostPolicy, action: &Action) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if let Some((technology, _)) = action.technology() {
        reasons.push(technology_rule(policy, technology));
    }
    match action {
        Action::Launch {
            vcpus, memory_mib, ..
        }
        | Action::Clone {
            vcpus, memory_mib, ..
        } => reasons.extend(size_rules(policy, *vcpus, *memory_mib)),
        Action::MigrateOut { peer_name, .. } | Action::MigrateSession { peer_name, .. } => {
            reasons.push(direction_rule(
                "migration.outgoing",
                policy.migration.outgoing,
                Code::OutgoingNotAllowed,
            ));
            reasons.push(named_rule(policy, peer_name));
        }
        Action::Replicate { peer_name, .. } => reasons.push(named_rule(policy, peer_name)),
        Action::MigrateIn {
            peer,
            tls,
            vcpus,
            memory_mib,
            disks,
            nets,
            ..
        } => {
            reasons.push(direction_rule(
                "migration.incoming",
                policy.migration.incoming,
                Code::IncomingNotAllowed,
            ));
            reasons.extend(peer_rules(policy, peer, tls));
            reasons.extend(size_rules(policy, *vcpus, *memory_mib));
            reasons.extend(resource_rules(policy, disks, nets));
        }
        _ => {}
    }
    reasons
}

/// What a host must be, where a guest starts.
fn ground_rules(policy: &HostPolicy, inquiry: &Inquiry) -> Vec<Reason> {
    let technology = match &inquiry.action {
        Action::Launch { technology, .. }
        | Action::Clone { technology, .. }
        | Action::MigrateIn { technology, .. }
        | Action::Failover { technology, .. } => *technology,
        _ => return Vec::new(),
    };
    let HostClaims {
        landlock_abi,
        sandbox,
        firmware,
    } = inquiry.host;
    let mut reasons = Vec::new();
    if let Some(level) = policy.sandbox.level {
        let oldest = policy.sandbox.landlock_min_abi.get();
        // Roles that find an older ABI refuse to start; this tells beforehand.
        let weak = landlock_abi.is_some_and(|abi| abi < oldest);
        reasons.push(claimed_rule(
            "sandbox.level",
            format!("{level} with Landlock ABI {oldest}"),
            sandbox.map(|found| match landlock_abi {
                Some(abi) => format!("{found} with Landlock ABI {abi}"),
                None => found.to_string(),
            }),
            sandbox.unwrap_or(SandboxLevel::None) >= level && !weak,
            Code::SandboxTooWeak,
            "see `casemate doctor`, or lower sandbox.level",
        ));
    }
    if let Some(minimum) = policy.firmware(technology) {
        let wanted = minimum.version();
        reasons.push(claimed_rule(
            "firmware",
            format!("at least {wanted}"),
            firmware.map(|found| found.to_string()),
            firmware.is_some_and(|found| found >= wanted),
            Code::FirmwareTooOld,
            "update the platform's firmware, or lower the [[firmware]] minimum",
        ));
    }
    reasons
}

/// What is not claimed is not found, and refuses as that.
fn claimed_rule(
    rule: &'static str,
    wanted: String,
    found: Option<String>,
    allows: bool,
    code: Code,
    remedy: &'static str,
) -> Reason {
    Reason {
        rule,
        wanted,
        code: match found {
            Some(_) => code,
            None => Code::ClaimMissing,
        },
        found: found.unwrap_or_else(|| "not known".to_owned()),
        allows,
        remedy,
    }
}

fn validity_rule(policy: &HostPolicy, inquiry: &Inquiry) -> Option<Reason> {
    let validity = policy.validity;
    let bound = validity.not_before.is_some() || validity.not_after.is_some();
    if !bound || inquiry.action.kind().outlives_the_policy() {
        return None;
    }
    let moment =
        |time: Option<Timestamp>| time.map_or_else(|| "ever".to_owned(), |t| t.to_string());
    Some(Reason {
        rule: "policy.validity",
        wanted: format!(
            "from {} up to {}",
            moment(validity.not_before),
            moment(validity.not_after)
        ),
        found: inquiry.clock.to_string(),
        allows: validity.holds(inquiry.clock),
        code: Code::PolicyNotValid,
        remedy: "load a policy that is valid now",
    })
}

fn technology_rule(policy: &HostPolicy, technology: Technology) -> Reason {
    Reason {
        rule: "technologies.allowed",
        wanted: listing("one of", policy.technologies.allowed.iter()),
        found: technology.to_string(),
        allows: policy.technologies.allowed.contains(&technology),
        code: Code::TechnologyNotAllowed,
        remedy: "choose an allowed technology, or add it to technologies.allowed",
    }
}

fn size_rules(policy: &HostPolicy, vcpus: u16, memory_mib: u64) -> [Reason; 2] {
    let (max_vcpus, max_memory) = (
        policy.limits.max_vcpus.get(),
        policy.limits.max_memory_mib.get(),
    );
    [
        Reason {
            rule: "limits.max_vcpus",
            wanted: format!("1 to {max_vcpus} vCPUs"),
            found: vcpus.to_string(),
            allows: (1..=max_vcpus).contains(&vcpus),
            code: Code::TooManyVcpus,
            remedy: "describe a smaller guest, or raise limits.max_vcpus",
        },
        Reason {
            rule: "limits.max_memory_mib",
            wanted: format!("1 to {max_memory} MiB"),
            found: format!("{memory_mib} MiB"),
            allows: (1..=max_memory).contains(&memory_mib),
            code: Code::TooMuchMemory,
            remedy: "describe a smaller guest, or raise limits.max_memory_mib",
        },
    ]
}

fn direction_rule(rule: &'static str, open: bool, code: Code) -> Reason {
    Reason {
        rule,
        wanted: "true".to_owned(),
        found: open.to_string(),
        allows: open,
        code,
        remedy: "set it to true in [migration]",
    }
}

fn known_rule(found: String, allows: bool) -> Reason {
    Reason {
        rule: "peer",
        wanted: "a peer of this policy".to_owned(),
        found,
        allows,
        code: Code::PeerUnknown,
        remedy: "add a [[peer]] with its name, san and spki",
    }
}

fn named_rule(policy: &HostPolicy, name: &str) -> Reason {
    known_rule(
        format!("{:?}", short(name)),
        policy.peer_named(name).is_some(),
    )
}

fn peer_rules(policy: &HostPolicy, peer: &Identity, tls: &Identity) -> Vec<Reason> {
    let known = policy.peer_with(peer);
    let mut reasons = vec![known_rule(peer.to_string(), known.is_some())];
    if let Some(known) = known {
        let expected = known.tls_identity();
        reasons.push(Reason {
            rule: "peer.path",
            wanted: format!("TLS terminated by {expected}"),
            found: tls.to_string(),
            allows: expected == tls,
            code: Code::PeerPathMismatch,
            remedy: "a relay must be named: path = \"gateway\" and its identity in the [[peer]]",
        });
    }
    reasons
}

fn resource_rules(policy: &HostPolicy, disks: &[String], nets: &[String]) -> Vec<Reason> {
    let mut seen = BTreeSet::new();
    let disk_rules = disks.iter().map(|id| {
        let first = seen.insert(id);
        Reason {
            rule: "incoming_disk",
            wanted: "a disk of this policy, once".to_owned(),
            found: format!("{:?}{}", short(id), if first { "" } else { ", again" }),
            allows: first && policy.incoming_disk(id).is_some(),
            code: Code::DiskNotAllowed,
            remedy: "add an [[incoming_disk]] with this id and a local path",
        }
    });
    let mut reasons: Vec<_> = disk_rules.collect();
    reasons.extend(nets.iter().map(|id| Reason {
        rule: "incoming_net",
        wanted: "a network of this policy".to_owned(),
        found: format!("{:?}", short(id)),
        allows: policy.incoming_net(id).is_some(),
        code: Code::NetNotAllowed,
        remedy: "add an [[incoming_net]] with this id and a local bridge",
    }));
    reasons
}

/// Files outside every folder of the policy; what climbs (`..`) is nowhere.
fn file_rule(policy: &HostPolicy, files: &[String]) -> Option<Reason> {
    let folders = policy.files.folders.as_ref()?;
    if files.is_empty() {
        return None;
    }
    let lies_in = |file: &str, folder: &Path| {
        let path = Path::new(file);
        let climbs = path.components().any(|c| c == Component::ParentDir);
        path.starts_with(folder) && path != folder && !climbs
    };
    let inside = |file: &str| folders.iter().any(|folder| lies_in(file, folder));
    let outside: Vec<&str> = files
        .iter()
        .map(String::as_str)
        .filter(|file| !inside(file))
        .collect();
    Some(Reason {
        rule: "files.folders",
        wanted: listing("files in", folders.iter().map(|folder| folder.display())),
        found: if outside.is_empty() {
            "all are".to_owned()
        } else {
            listing("outside:", outside.iter().map(|file| short(file)))
        },
        allows: outside.is_empty(),
        code: Code::FileNotAllowed,
        remedy: "move the file, or add its folder to files.folders",
    })
}

/// A list for a reason; a long one is cut.
fn listing<T: Display>(kind: &str, all: impl ExactSizeIterator<Item = T>) -> String {
    let count = all.len();
    if count == 0 {
        return "nothing is allowed".to_owned();
    }
    let mut text = kind.to_owned();
    for (index, one) in all.take(LISTED).enumerate() {
        text.push_str(if index == 0 { " " } else { ", " });
        let _ = write!(text, "{one}");
    }
    if count > LISTED {
        let _ = write!(text, " and {} more", count - LISTED);
    }
    text
}

/// The start of a text that somebody else chose, for a reason.
fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

/// How many entries of a list a reason shows.
const LISTED: usize = 4;

#[cfg(test)]
mod tests;
