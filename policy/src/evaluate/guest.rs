//! What the owners of a guest demand. Every section that names the guest must be satisfied: where they contradict each
//! other, the stricter wins.

use super::{Code, Reason, listing, short};
use crate::action::Action;
use crate::claims::Inquiry;
use crate::document::guest::{GuestRules, MoveMode};
use crate::document::{HostPolicy, Peer, PeerPath};
use crate::types::Technology;

/// Every rule of every `[[guest]]` that names the guest; none without such sections, and none for actions that neither
/// bring a guest here, nor give it anything, nor send it anywhere.
pub(super) fn rules(policy: &HostPolicy, inquiry: &Inquiry) -> Vec<Reason> {
    let Some(book) = policy.guests() else {
        return Vec::new();
    };
    let Some((technology, _)) = inquiry.action.technology() else {
        return Vec::new();
    };
    let sections = book.of(&inquiry.object);
    let mut reasons = vec![listed_rule(&sections, &inquiry.object)];
    reasons.extend(stricter_note(&sections));
    for rules in sections {
        let asked = Asked {
            policy,
            inquiry,
            rules,
            technology,
        };
        asked.rules(&mut reasons);
    }
    reasons
}

struct Asked<'a> {
    policy: &'a HostPolicy,
    inquiry: &'a Inquiry,
    rules: &'a GuestRules,
    technology: Technology,
}

impl Asked<'_> {
    fn rules(&self, reasons: &mut Vec<Reason>) {
        reasons.extend(self.technology_rule());
        match &self.inquiry.action {
            Action::Launch { policy_bits, .. } => {
                reasons.extend(self.bits_rule(Some(*policy_bits)));
                reasons.extend(self.launch_rule());
                reasons.extend(self.site_rule(self.policy.host.site.as_deref()));
            }
            // Of what it was launched from nobody can tell any more: where that is laid down, it is not cloned.
            Action::Clone { .. } => {
                reasons.extend(self.bits_rule(Some(0)));
                reasons.extend(self.launch_rule());
                reasons.extend(self.site_rule(self.policy.host.site.as_deref()));
            }
            Action::Attest { .. } | Action::ReleaseSecret { .. } => self.proof_rules(reasons),
            Action::Failover { .. } => {
                self.proof_rules(reasons);
                reasons.push(self.move_rule(MoveMode::Relaunch));
            }
            Action::InjectSecret { .. } => {
                reasons.extend(self.site_rule(self.policy.host.site.as_deref()));
            }
            Action::MigrateOut { peer_name, .. } | Action::MigrateSession { peer_name, .. } => {
                let peer = self.policy.peer_named(peer_name);
                reasons.push(self.move_rule(MoveMode::Live));
                reasons.extend(self.peer_rules(peer));
                reasons.extend(self.site_rule(peer.and_then(|p| p.site.as_deref())));
            }
            Action::MigrateIn { peer, .. } => {
                reasons.push(self.move_rule(MoveMode::Live));
                reasons.extend(self.peer_rules(self.policy.peer_with(peer)));
                reasons.extend(self.site_rule(self.policy.host.site.as_deref()));
            }
            Action::Replicate { peer_name, .. } => {
                let peer = self.policy.peer_named(peer_name);
                reasons.push(self.replica_rule());
                reasons.extend(self.peer_rules(peer));
                reasons.extend(self.site_rule(peer.and_then(|p| p.site.as_deref())));
            }
            _ => {}
        }
    }

    fn proof_rules(&self, reasons: &mut Vec<Reason>) {
        reasons.extend(self.bits_rule(self.inquiry.guest.policy_bits));
        reasons.extend(self.launch_rule());
        reasons.extend(self.tcb_rule());
        reasons.extend(self.vmpl_rule());
        reasons.extend(self.nonce_rule());
        reasons.extend(self.age_rule());
        reasons.extend(self.site_rule(self.policy.host.site.as_deref()));
    }

    fn technology_rule(&self) -> Option<Reason> {
        let allowed = self.rules.technologies.as_ref()?;
        Some(self.reason(
            "guest.technologies",
            listing("one of", allowed.iter()),
            Some(self.technology.to_string()),
            allowed.contains(&self.technology),
            Code::TechnologyNotAllowed,
        ))
    }

    fn bits_rule(&self, bits: Option<u64>) -> Option<Reason> {
        let (required, forbidden) = (
            self.rules.required_policy_bits,
            self.rules.forbidden_policy_bits,
        );
        if required | forbidden == 0 {
            return None;
        }
        Some(self.reason(
            "guest.policy_bits",
            format!("{required:#x} set, {forbidden:#x} clear"),
            bits.map(|bits| format!("guest policy {bits:#x}")),
            bits.is_some_and(|bits| bits & required == required && bits & forbidden == 0),
            Code::GuestPolicyNotAllowed,
        ))
    }

    fn launch_rule(&self) -> Option<Reason> {
        let (digests, signers) = (&self.rules.launch_digests, &self.rules.launch_signers);
        if digests.is_none() && signers.is_none() {
            return None;
        }
        let mut wanted = Vec::new();
        if let Some(digests) = digests {
            wanted.push(listing("digest", digests.iter()));
        }
        if let Some(signers) = signers {
            wanted.push(listing("signed by", signers.iter()));
        }
        let claimed = &self.inquiry.guest;
        let known = claimed.launch_digest.as_ref();
        let by_digest = known.is_some_and(|d| digests.iter().any(|all| all.contains(d)));
        let by_signer = claimed
            .launch_signers
            .iter()
            .any(|s| signers.iter().any(|all| all.contains(s)));
        // A plain guest has no measurement that its host could not make up.
        let confidential = self.technology != Technology::None;
        Some(self.reason(
            "guest.launch",
            wanted.join(", or "),
            known.filter(|_| confidential).map(|digest| {
                let signers = claimed.launch_signers.len();
                format!("digest {digest}, {signers} known signers")
            }),
            confidential && known.is_some() && (by_digest || by_signer),
            Code::LaunchNotAllowed,
        ))
    }

    fn tcb_rule(&self) -> Option<Reason> {
        if self.rules.tcb.is_empty() {
            return None;
        }
        let claimed = &self.inquiry.guest;
        let minimum = claimed.product.and_then(|p| self.rules.tcb.get(&p));
        let found = claimed.product.zip(claimed.tcb);
        let allows = minimum
            .zip(claimed.tcb)
            .is_some_and(|(minimum, tcb)| tcb.reaches(minimum));
        let wanted = match (claimed.product, minimum) {
            (Some(product), Some(minimum)) => format!("{product} with at least {minimum}"),
            _ => listing("a product among", self.rules.tcb.keys()),
        };
        Some(self.reason(
            "guest.tcb",
            wanted,
            found.map(|(product, tcb)| format!("{product} with {tcb}")),
            allows,
            Code::TcbTooOld,
        ))
    }

    fn vmpl_rule(&self) -> Option<Reason> {
        let highest = self.rules.max_vmpl?;
        let found = self.inquiry.guest.vmpl;
        Some(self.reason(
            "guest.max_vmpl",
            format!("VMPL 0 to {highest}"),
            found.map(|level| format!("VMPL {level}")),
            found.is_some_and(|level| level <= highest),
            Code::VmplNotAllowed,
        ))
    }

    fn nonce_rule(&self) -> Option<Reason> {
        let found = self.inquiry.guest.nonce_matches;
        self.rules.nonce.then(|| {
            self.reason(
                "guest.nonce",
                "evidence that answers a nonce of ours".to_owned(),
                found.map(|f| if f { "it does" } else { "it does not" }.to_owned()),
                found == Some(true),
                Code::EvidenceStale,
            )
        })
    }

    fn age_rule(&self) -> Option<Reason> {
        let oldest = self.rules.max_evidence_age_s?;
        let found = self.inquiry.guest.evidence_age_s;
        Some(self.reason(
            "guest.max_evidence_age_s",
            format!("at most {oldest} s old"),
            found.map(|age| format!("{age} s")),
            found.is_some_and(|age| age <= oldest),
            Code::EvidenceStale,
        ))
    }

    fn site_rule(&self, site: Option<&str>) -> Option<Reason> {
        let allowed = self.rules.sites.as_ref()?;
        Some(self.reason(
            "guest.sites",
            listing("one of", allowed.iter()),
            site.map(str::to_owned),
            site.is_some_and(|site| allowed.contains(site)),
            Code::SiteNotAllowed,
        ))
    }

    fn peer_rules(&self, peer: Option<&Peer>) -> Vec<Reason> {
        let mut reasons = Vec::new();
        if let Some(allowed) = &self.rules.peers {
            reasons.push(self.reason(
                "guest.peers",
                listing("one of", allowed.iter()),
                Some(peer.map_or_else(|| "an unknown peer".to_owned(), |p| p.name.clone())),
                peer.is_some_and(|p| allowed.contains(&p.name)),
                Code::PeerNotAllowed,
            ));
        }
        if self.rules.direct_only {
            let direct = peer.is_some_and(|p| p.path == PeerPath::Direct);
            let found = if direct { "direct" } else { "a gateway" };
            reasons.push(self.reason(
                "guest.direct_only",
                "a direct path".to_owned(),
                Some(found.to_owned()),
                direct,
                Code::MoveNotAllowed,
            ));
        }
        reasons
    }

    fn move_rule(&self, mode: MoveMode) -> Reason {
        let allowed = &self.rules.migration;
        self.reason(
            "guest.migration",
            match allowed.is_empty() {
                true => "it stays where it is".to_owned(),
                false => listing("one of", allowed.iter()),
            },
            Some(mode.to_string()),
            allowed.contains(&mode),
            Code::MoveNotAllowed,
        )
    }

    fn replica_rule(&self) -> Reason {
        let found = match &self.inquiry.action {
            Action::Replicate { seal, .. } => Some(*seal),
            _ => None,
        };
        let least = self.rules.replicas;
        self.reason(
            "guest.replicas",
            least.map_or_else(|| "no replica".to_owned(), |l| format!("at least {l}")),
            found.map(|seal| seal.to_string()),
            least
                .zip(found)
                .is_some_and(|(least, found)| found >= least),
            Code::ReplicaNotAllowed,
        )
    }

    /// A reason of this owner; what is not claimed is not found, and refuses as that.
    fn reason(
        &self,
        rule: &'static str,
        wanted: String,
        found: Option<String>,
        allows: bool,
        code: Code,
    ) -> Reason {
        let owner = &self.rules.owner;
        let missing = found.is_none();
        Reason {
            rule,
            wanted: format!("{owner}: {wanted}"),
            found: found.unwrap_or_else(|| "not known".to_owned()),
            allows,
            code: if missing { Code::ClaimMissing } else { code },
            remedy: match missing {
                true => "verify the guest's evidence first, or describe what is missing",
                false => "see the owner's [[guest]] section",
            },
        }
    }
}

fn listed_rule(sections: &[&GuestRules], guest: &str) -> Reason {
    Reason {
        rule: "guest",
        wanted: "a [[guest]] section that names it".to_owned(),
        found: match sections {
            [] => format!("{:?}, which none names", short(guest)),
            all => listing("rules of", all.iter().map(|rules| &rules.owner)),
        },
        allows: !sections.is_empty(),
        code: Code::GuestUnlisted,
        remedy: "add a [[guest]] with this name",
    }
}

/// Says where owners of one guest demand different things. It refuses nothing by itself: each of their rules does.
fn stricter_note(sections: &[&GuestRules]) -> Option<Reason> {
    let (first, others) = sections.split_first()?;
    let mut differing = Vec::new();
    for other in others {
        let pairs = [
            (
                "technologies",
                differ(&first.technologies, &other.technologies),
            ),
            (
                "launch_digests",
                differ(&first.launch_digests, &other.launch_digests),
            ),
            (
                "launch_signers",
                differ(&first.launch_signers, &other.launch_signers),
            ),
            (
                "policy_bits",
                first.required_policy_bits & other.forbidden_policy_bits != 0
                    || first.forbidden_policy_bits & other.required_policy_bits != 0,
            ),
            ("sites", differ(&first.sites, &other.sites)),
            ("peers", differ(&first.peers, &other.peers)),
            ("migration", first.migration != other.migration),
            ("replicas", first.replicas != other.replicas),
            ("direct_only", first.direct_only != other.direct_only),
        ];
        let keys: Vec<&str> = pairs.iter().filter(|p| p.1).map(|p| p.0).collect();
        if !keys.is_empty() {
            differing.push(format!(
                "{} and {} differ in {}",
                first.owner,
                other.owner,
                keys.join(", ")
            ));
        }
    }
    (!differing.is_empty()).then(|| Reason {
        rule: "guest.stricter",
        wanted: "every owner's rules: the stricter wins".to_owned(),
        found: differing.join("; "),
        allows: true,
        code: Code::Allowed,
        remedy: "",
    })
}

fn differ<T: PartialEq>(one: &Option<T>, other: &Option<T>) -> bool {
    one.is_some() && other.is_some() && one != other
}
