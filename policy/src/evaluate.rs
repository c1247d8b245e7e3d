//! From policy and action to a decision: a pure function, with a reason for every rule it looked at.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::document::HostPolicy;
use crate::floor;
use crate::types::{Identity, Technology};

/// Decides whether `policy` allows `action`. Every rule that applies is listed, kept or broken, the floor first; the
/// code is that of the first broken rule.
pub fn evaluate(policy: &HostPolicy, action: &Action) -> Decision {
    let mut reasons = floor::check(policy, action);
    match action {
        Action::Launch {
            technology,
            vcpus,
            memory_mib,
            ..
        } => {
            reasons.push(technology_rule(policy, *technology));
            reasons.extend(size_rules(policy, *vcpus, *memory_mib));
        }
        Action::MigrateOut {
            technology,
            peer_name,
            ..
        } => {
            reasons.push(technology_rule(policy, *technology));
            reasons.push(direction_rule(
                "migration.outgoing",
                policy.migration.outgoing,
                Code::OutgoingNotAllowed,
            ));
            reasons.push(known_rule(
                format!("{:?}", short(peer_name)),
                policy.peer_named(peer_name).is_some(),
            ));
        }
        Action::MigrateIn {
            peer,
            tls,
            technology,
            vcpus,
            memory_mib,
            disks,
            nets,
            ..
        } => {
            reasons.push(technology_rule(policy, *technology));
            reasons.push(direction_rule(
                "migration.incoming",
                policy.migration.incoming,
                Code::IncomingNotAllowed,
            ));
            reasons.extend(peer_rules(policy, peer, tls));
            reasons.extend(size_rules(policy, *vcpus, *memory_mib));
            reasons.extend(resource_rules(policy, disks, nets));
        }
        Action::ReleaseSecret { technology, .. } => {
            reasons.push(technology_rule(policy, *technology))
        }
        Action::SandboxProbe => {}
    }
    let code = reasons
        .iter()
        .find(|reason| !reason.allows)
        .map_or(Code::Allowed, |reason| reason.code);
    Decision {
        allowed: code == Code::Allowed,
        code,
        reasons,
    }
}

/// What somebody wants to do. What comes from a peer here has been parsed, but is not yet believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Launch a guest here.
    Launch {
        /// Its technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// Its vCPUs.
        vcpus: u16,
        /// Its memory in MiB.
        memory_mib: u64,
        /// The guest policy given to the firmware (SEV: 32 bits, SNP: 64); 0 for a plain guest.
        policy_bits: u64,
    },
    /// Send a guest to a peer.
    MigrateOut {
        /// Its technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// The peer's name in the policy.
        peer_name: String,
    },
    /// Receive a guest from a peer.
    MigrateIn {
        /// The end-to-end identity that signed the offer.
        peer: Identity,
        /// The identity that terminated the TLS connection; the peer's own on a direct path.
        tls: Identity,
        /// The guest's technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// The guest's vCPUs.
        vcpus: u16,
        /// The guest's memory in MiB.
        memory_mib: u64,
        /// The ids of the disks it wants.
        disks: Vec<String>,
        /// The ids of the networks it wants.
        nets: Vec<String>,
    },
    /// Put an owner's secret into a guest.
    ReleaseSecret {
        /// The guest's technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// Whether the launch measurement was verified to be the expected one.
        measurement_matches: bool,
    },
    /// Try, from inside a jail, what the jail must refuse.
    SandboxProbe,
}

impl Action {
    /// The action's stable name, as in the ledger.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Launch { .. } => "launch",
            Self::MigrateOut { .. } => "migrate-out",
            Self::MigrateIn { .. } => "migrate-in",
            Self::ReleaseSecret { .. } => "release-secret",
            Self::SandboxProbe => "sandbox-probe",
        }
    }
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

/// The stable code of a decision; peers and records carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Code {
    /// Every rule allows it.
    Allowed,
    /// The secure processor is emulated, and the policy does not say `allow_emulated = true`.
    EmulatedNotAllowed,
    /// The guest policy lets the host debug the guest.
    DebugAllowed,
    /// The guest policy does not fit the technology.
    GuestPolicyMismatch,
    /// Guests of this technology cannot be moved by any Linux.
    TechnologyCannotMigrate,
    /// The guest has not proven what it is.
    NotProven,
    /// The technology is not in `technologies.allowed`.
    TechnologyNotAllowed,
    /// More vCPUs than `limits.max_vcpus`, or none.
    TooManyVcpus,
    /// More memory than `limits.max_memory_mib`, or none.
    TooMuchMemory,
    /// `migration.outgoing` is not true.
    OutgoingNotAllowed,
    /// `migration.incoming` is not true.
    IncomingNotAllowed,
    /// No `[[peer]]` has this name or identity.
    PeerUnknown,
    /// The TLS connection was not terminated by whom the peer's path says.
    PeerPathMismatch,
    /// A disk is not among `[[incoming_disk]]`, or is asked for twice.
    DiskNotAllowed,
    /// A network is not among `[[incoming_net]]`.
    NetNotAllowed,
}

impl Code {
    /// The code as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::EmulatedNotAllowed => "emulated-not-allowed",
            Self::DebugAllowed => "debug-allowed",
            Self::GuestPolicyMismatch => "guest-policy-mismatch",
            Self::TechnologyCannotMigrate => "technology-cannot-migrate",
            Self::NotProven => "not-proven",
            Self::TechnologyNotAllowed => "technology-not-allowed",
            Self::TooManyVcpus => "too-many-vcpus",
            Self::TooMuchMemory => "too-much-memory",
            Self::OutgoingNotAllowed => "outgoing-not-allowed",
            Self::IncomingNotAllowed => "incoming-not-allowed",
            Self::PeerUnknown => "peer-unknown",
            Self::PeerPathMismatch => "peer-path-mismatch",
            Self::DiskNotAllowed => "disk-not-allowed",
            Self::NetNotAllowed => "net-not-allowed",
        }
    }
}

fn technology_rule(policy: &HostPolicy, technology: Technology) -> Reason {
    let allowed: Vec<_> = policy
        .technologies
        .allowed
        .iter()
        .map(ToString::to_string)
        .collect();
    Reason {
        rule: "technologies.allowed",
        wanted: if allowed.is_empty() {
            "nothing is allowed".to_owned()
        } else {
            format!("one of {}", allowed.join(", "))
        },
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

/// The start of a text that somebody else chose, for a reason.
fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::Fingerprint;

    fn identity(san: &str, key: u8) -> Identity {
        Identity {
            san: san.parse().unwrap(),
            spki: Fingerprint::from_bytes([key; 32]),
        }
    }

    fn policy(technologies: &str, migration: &str) -> HostPolicy {
        let (peer, far, gateway) = (
            Fingerprint::from_bytes([1; 32]),
            Fingerprint::from_bytes([2; 32]),
            Fingerprint::from_bytes([3; 32]),
        );
        let text = format!(
            r#"
            host = {{ name = "h" }}
            technologies = {{ {technologies} }}
            limits = {{ max_vcpus = 4, max_memory_mib = 1024 }}
            migration = {{ {migration} }}
            peer = [
              {{ name = "near", san = "near.test", spki = "{peer}", path = "direct" }},
              {{ name = "far", san = "far.test", spki = "{far}", path = "gateway", gateway = {{ san = "gw.test", spki = "{gateway}" }} }},
            ]
            incoming_disk = [{{ id = "data", path = "/d" }}]
            incoming_net = [{{ id = "net0", bridge = "br0" }}]
            "#
        );
        HostPolicy::parse("test", &text).unwrap()
    }

    fn open() -> HostPolicy {
        policy(
            r#"allowed = ["none", "sev", "sev-es", "sev-snp"], allow_emulated = true"#,
            "outgoing = true, incoming = true",
        )
    }

    fn launch(technology: Technology, policy_bits: u64) -> Action {
        Action::Launch {
            technology,
            emulated: false,
            vcpus: 2,
            memory_mib: 512,
            policy_bits,
        }
    }

    fn arrival(peer: Identity, tls: Identity) -> Action {
        Action::MigrateIn {
            peer,
            tls,
            technology: Technology::Sev,
            emulated: true,
            vcpus: 2,
            memory_mib: 512,
            disks: vec!["data".to_owned()],
            nets: vec!["net0".to_owned()],
        }
    }

    #[test]
    fn launches() {
        let policy = policy(r#"allowed = ["none", "sev"]"#, "");
        assert!(evaluate(&policy, &launch(Technology::Sev, 1)).allowed);
        assert!(evaluate(&policy, &launch(Technology::None, 0)).allowed);
        let cases = [
            (launch(Technology::Sev, 0), Code::DebugAllowed),
            (launch(Technology::Sev, 5), Code::GuestPolicyMismatch),
            (
                launch(Technology::Sev, 1 << 32 | 1),
                Code::GuestPolicyMismatch,
            ),
            (launch(Technology::None, 1), Code::GuestPolicyMismatch),
            (launch(Technology::SevEs, 5), Code::TechnologyNotAllowed),
            (
                launch(Technology::SevSnp, 1 << 17 | 1 << 19),
                Code::DebugAllowed,
            ),
            (
                launch(Technology::SevSnp, 1 << 17),
                Code::TechnologyNotAllowed,
            ),
        ];
        for (action, code) in cases {
            assert_eq!(evaluate(&policy, &action).code, code, "{action:?}");
        }
        for (vcpus, memory_mib, code) in [
            (5, 512, Code::TooManyVcpus),
            (0, 512, Code::TooManyVcpus),
            (1, 1025, Code::TooMuchMemory),
            (1, 0, Code::TooMuchMemory),
        ] {
            let action = Action::Launch {
                technology: Technology::Sev,
                emulated: false,
                vcpus,
                memory_mib,
                policy_bits: 1,
            };
            assert_eq!(evaluate(&policy, &action).code, code);
        }
    }

    #[test]
    fn a_refusal_tells_every_broken_rule_and_the_alternative() {
        let policy = policy(r#"allowed = ["sev"]"#, "");
        let action = Action::MigrateOut {
            technology: Technology::SevSnp,
            emulated: true,
            peer_name: "nobody".to_owned(),
        };
        let decision = evaluate(&policy, &action);
        let rules: Vec<_> = decision.refusals().map(|reason| reason.rule).collect();
        assert_eq!(
            rules,
            [
                "floor.emulated",
                "floor.movable",
                "technologies.allowed",
                "migration.outgoing",
                "peer"
            ]
        );
        assert!(
            decision
                .refusals()
                .any(|reason| reason.remedy.contains("relaunch"))
        );
    }

    #[test]
    fn arrivals_need_the_right_peer_on_the_right_path() {
        let (near, far, gateway) = (
            identity("near.test", 1),
            identity("far.test", 2),
            identity("gw.test", 3),
        );
        let cases = [
            (&near, &near, Code::Allowed),
            (&far, &gateway, Code::Allowed),
            (&near, &gateway, Code::PeerPathMismatch),
            (&far, &far, Code::PeerPathMismatch),
            (&gateway, &gateway, Code::PeerUnknown),
            (&identity("near.test", 2), &near, Code::PeerUnknown),
            (&identity("far.test", 1), &near, Code::PeerUnknown),
        ];
        for (peer, tls, code) in cases {
            assert_eq!(
                evaluate(&open(), &arrival(peer.clone(), tls.clone())).code,
                code,
                "{peer} by {tls}"
            );
        }
    }

    #[test]
    fn arrivals_get_only_local_resources() {
        let ask = |want_disks: &[&str], want_nets: &[&str]| {
            let mut action = arrival(identity("near.test", 1), identity("near.test", 1));
            if let Action::MigrateIn { disks, nets, .. } = &mut action {
                *disks = want_disks.iter().map(ToString::to_string).collect();
                *nets = want_nets.iter().map(ToString::to_string).collect();
            }
            evaluate(&open(), &action).code
        };
        assert_eq!(ask(&["data"], &["net0"]), Code::Allowed);
        assert_eq!(ask(&["/etc/passwd"], &[]), Code::DiskNotAllowed);
        assert_eq!(ask(&["data", "data"], &[]), Code::DiskNotAllowed);
        assert_eq!(ask(&[], &["net1"]), Code::NetNotAllowed);
    }

    #[test]
    fn secrets_need_proof() {
        let ask = |technology, measurement_matches| {
            evaluate(
                &open(),
                &Action::ReleaseSecret {
                    technology,
                    emulated: true,
                    measurement_matches,
                },
            )
            .code
        };
        assert_eq!(ask(Technology::Sev, true), Code::Allowed);
        assert_eq!(ask(Technology::Sev, false), Code::NotProven);
        assert_eq!(ask(Technology::None, true), Code::NotProven);
    }

    #[test]
    fn codes_are_written_alike_everywhere() {
        for code in [
            Code::Allowed,
            Code::TechnologyCannotMigrate,
            Code::PeerPathMismatch,
            Code::TooManyVcpus,
        ] {
            assert_eq!(
                serde_json::to_string(&code).unwrap(),
                format!("\"{}\"", code.as_str())
            );
        }
    }

    fn any_technology() -> impl Strategy<Value = Technology> {
        prop_oneof![
            Just(Technology::None),
            Just(Technology::Sev),
            Just(Technology::SevEs),
            Just(Technology::SevSnp)
        ]
    }

    proptest! {
        /// However open the file: no debuggable guest, nothing emulated unannounced, no SEV-ES or SNP on the move.
        #[test]
        fn the_floor_holds(technology in any_technology(), emulated: bool, bits: u64, out: bool) {
            let open = open();
            let closed = policy(r#"allowed = ["none", "sev", "sev-es", "sev-snp"]"#, "outgoing = true, incoming = true");
            let launch = Action::Launch { technology, emulated, vcpus: 1, memory_mib: 1, policy_bits: bits };
            let decision = evaluate(&open, &launch);
            let debuggable = match technology {
                Technology::None => false,
                Technology::Sev | Technology::SevEs => bits % 2 == 0,
                Technology::SevSnp => (bits >> 19) % 2 == 1,
            };
            prop_assert!(!(decision.allowed && debuggable));
            prop_assert!(!(emulated && evaluate(&closed, &launch).allowed));
            let moved = if out {
                Action::MigrateOut { technology, emulated, peer_name: "near".to_owned() }
            } else {
                let Action::MigrateIn { peer, tls, vcpus, memory_mib, disks, nets, .. } =
                    arrival(identity("near.test", 1), identity("near.test", 1)) else { unreachable!() };
                Action::MigrateIn { peer, tls, technology, emulated, vcpus, memory_mib, disks, nets }
            };
            let movable = matches!(technology, Technology::None | Technology::Sev);
            prop_assert_eq!(evaluate(&open, &moved).allowed, movable);
            prop_assert!(!(emulated && evaluate(&closed, &moved).allowed));
        }

        /// A decision is allowed exactly when no reason refuses, and its code says so.
        #[test]
        fn decisions_are_consistent(technology in any_technology(), emulated: bool, vcpus in 0u16..8, memory_mib in 0u64..2048, bits in 0u64..8) {
            let policy = policy(r#"allowed = ["sev"]"#, "");
            let decision = evaluate(&policy, &Action::Launch { technology, emulated, vcpus, memory_mib, policy_bits: bits });
            prop_assert_eq!(decision.allowed, decision.reasons.iter().all(|reason| reason.allows));
            prop_assert_eq!(decision.allowed, decision.code == Code::Allowed);
        }
    }
}
