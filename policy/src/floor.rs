//! What no policy file can loosen.
//!
//! These rules come first in every [`Decision`](crate::Decision). Two kinds: what would make the protection a lie (a
//! guest that can be debugged, an emulated processor passed off as a real one, a secret without proof), and what the
//! hardware and Linux cannot do (moving SEV-ES and SEV-SNP guests), which is refused with the alternative.

use crate::action::Action;
use crate::document::HostPolicy;
use crate::evaluate::{Code, Reason};
use crate::types::Technology;

/// Every floor rule that applies to `action`, kept or broken.
pub fn check(policy: &HostPolicy, action: &Action) -> Vec<Reason> {
    match action {
        Action::Launch {
            technology,
            emulated,
            policy_bits,
            ..
        } => {
            vec![
                emulated_rule(policy, *emulated),
                debug_rule(*technology, *policy_bits),
                bits_rule(*technology, *policy_bits),
            ]
        }
        Action::Clone {
            technology,
            emulated,
            ..
        } => vec![emulated_rule(policy, *emulated), copy_rule(*technology)],
        Action::MigrateOut {
            technology,
            emulated,
            ..
        }
        | Action::MigrateSession {
            technology,
            emulated,
            ..
        }
        | Action::MigrateIn {
            technology,
            emulated,
            ..
        } => {
            vec![emulated_rule(policy, *emulated), movable_rule(*technology)]
        }
        Action::ReleaseSecret {
            technology,
            emulated,
            measurement_matches,
        } => {
            vec![
                emulated_rule(policy, *emulated),
                proof_rule(*technology, *measurement_matches),
            ]
        }
        Action::InjectSecret {
            technology,
            emulated,
        } => vec![
            emulated_rule(policy, *emulated),
            confidential_rule(*technology),
        ],
        Action::Attest {
            emulated, verified, ..
        } => vec![emulated_rule(policy, *emulated), verified_rule(*verified)],
        Action::Replicate { emulated, .. } | Action::Failover { emulated, .. } => {
            vec![emulated_rule(policy, *emulated)]
        }
        Action::PolicyLoad {
            version,
            in_force,
            same,
            signers,
            threshold,
        } => vec![
            signed_rule(*signers, *threshold),
            newer_rule(*version, *in_force, *same),
        ],
        Action::SandboxProbe
        | Action::SandboxReport
        | Action::List
        | Action::Status
        | Action::Measurement
        | Action::Stop
        | Action::Pause
        | Action::Resume
        | Action::Nmi
        | Action::Resize
        | Action::Console
        | Action::Attach
        | Action::Detach
        | Action::Upgrade
        | Action::Snapshot
        | Action::SnapshotErase
        | Action::Cancel
        | Action::PlatformShow
        | Action::PlatformAdmin { .. }
        | Action::Approve { .. }
        | Action::EvidenceRead
        | Action::EvidenceKeyRotate
        | Action::EvidenceRetain { .. } => Vec::new(),
    }
}

fn emulated_rule(policy: &HostPolicy, emulated: bool) -> Reason {
    Reason {
        rule: "floor.emulated",
        wanted: "a real secure processor, unless the policy says allow_emulated = true".to_owned(),
        found: match (emulated, policy.technologies.allow_emulated) {
            (false, _) => "not emulated",
            (true, true) => "emulated, and the policy says allow_emulated = true",
            (true, false) => "emulated",
        }
        .to_owned(),
        allows: !emulated || policy.technologies.allow_emulated,
        code: Code::EmulatedNotAllowed,
        remedy: "run on a host with /dev/sev, or set technologies.allow_emulated = true for tests",
    }
}

fn debug_rule(technology: Technology, bits: u64) -> Reason {
    let (wanted, allows) = match technology {
        Technology::None => ("no rule for a plain guest", true),
        Technology::Sev | Technology::SevEs => {
            ("guest policy bit 0 (NODBG) set", bits & SEV_NODBG != 0)
        }
        Technology::SevSnp => ("guest policy bit 19 (DEBUG) clear", bits & SNP_DEBUG == 0),
    };
    Reason {
        rule: "floor.debug",
        wanted: wanted.to_owned(),
        found: format!("guest policy {bits:#x}"),
        allows,
        code: Code::DebugAllowed,
        remedy: "launch with a guest policy that forbids debugging: the firmware would decrypt any page for the host",
    }
}

fn bits_rule(technology: Technology, bits: u64) -> Reason {
    let (wanted, allows) = match technology {
        Technology::None => ("guest policy 0: a plain guest has none", bits == 0),
        Technology::Sev => (
            "32 bits, bit 2 (ES) clear",
            bits & SEV_ES == 0 && bits <= u64::from(u32::MAX),
        ),
        Technology::SevEs => (
            "32 bits, bit 2 (ES) set",
            bits & SEV_ES != 0 && bits <= u64::from(u32::MAX),
        ),
        Technology::SevSnp => ("bit 17 (reserved, one) set", bits & SNP_RESERVED_ONE != 0),
    };
    Reason {
        rule: "floor.guest-policy",
        wanted: wanted.to_owned(),
        found: format!("guest policy {bits:#x}"),
        allows,
        code: Code::GuestPolicyMismatch,
        remedy: "make the guest policy agree with the technology",
    }
}

fn movable_rule(technology: Technology) -> Reason {
    let (allows, remedy) = match technology {
        Technology::None | Technology::Sev => (true, ""),
        Technology::SevEs => (
            false,
            "Linux has no SEND/RECEIVE_UPDATE_VMSA; replicate the disks and relaunch at the other site with attestation",
        ),
        Technology::SevSnp => (
            false,
            "no Linux kernel migrates SEV-SNP; replicate the disks, relaunch the same measurement at the other site, and \
             release the disk key after its attestation",
        ),
    };
    Reason {
        rule: "floor.movable",
        wanted: "a technology whose guests Linux can move: none or sev".to_owned(),
        found: technology.to_string(),
        allows,
        code: Code::TechnologyCannotMigrate,
        remedy,
    }
}

/// No firmware gives the state of a guest to two.
fn copy_rule(technology: Technology) -> Reason {
    Reason {
        rule: "floor.copyable",
        wanted: "a technology whose guests can be copied: none".to_owned(),
        found: technology.to_string(),
        allows: technology == Technology::None,
        code: Code::TechnologyCannotClone,
        remedy: "launch each guest anew: its owner attests it by itself",
    }
}

fn proof_rule(technology: Technology, measurement_matches: bool) -> Reason {
    let confidential = technology != Technology::None;
    Reason {
        rule: "floor.proof",
        wanted: "a confidential guest whose launch measurement is the expected one".to_owned(),
        found: match (confidential, measurement_matches) {
            (false, _) => "a plain guest, which proves nothing",
            (true, true) => "the expected measurement",
            (true, false) => "another measurement, or none",
        }
        .to_owned(),
        allows: confidential && measurement_matches,
        code: Code::NotProven,
        remedy: "compare the kernel, initramfs and command line with the owner's description, and launch again",
    }
}

fn confidential_rule(technology: Technology) -> Reason {
    Reason {
        rule: "floor.confidential",
        wanted: "a guest whose memory its host cannot read".to_owned(),
        found: technology.to_string(),
        allows: technology != Technology::None,
        code: Code::NotProven,
        remedy: "launch the guest with a confidential technology",
    }
}

fn verified_rule(verified: bool) -> Reason {
    Reason {
        rule: "floor.verified",
        wanted: "evidence whose signature, chain and dates were verified".to_owned(),
        found: if verified { "verified" } else { "not verified" }.to_owned(),
        allows: verified,
        code: Code::NotProven,
        remedy: "see the verdict's checks",
    }
}

fn signed_rule(signers: u32, threshold: u32) -> Reason {
    Reason {
        rule: "floor.policy-signed",
        wanted: format!("{threshold} trusted signatures"),
        found: signers.to_string(),
        allows: signers >= threshold,
        code: Code::PolicyUnsigned,
        remedy: "have it signed with `casemate policy sign`",
    }
}

fn newer_rule(version: u64, in_force: u64, same: bool) -> Reason {
    Reason {
        rule: "floor.policy-version",
        wanted: match in_force {
            0 => "any version".to_owned(),
            _ => format!("above {in_force}, or the very policy in force"),
        },
        found: match same {
            true => format!("{version}, the very policy in force"),
            false => version.to_string(),
        },
        allows: version > in_force || same && version == in_force || in_force == 0,
        code: Code::PolicyOlder,
        remedy: "raise `version`; a host never goes back",
    }
}

/// SEV guest policy: debugging forbidden.
pub(crate) const SEV_NODBG: u64 = 1 << 0;
/// SEV guest policy: encrypted state (SEV-ES) required.
const SEV_ES: u64 = 1 << 2;
/// SNP guest policy: reserved, must be one.
const SNP_RESERVED_ONE: u64 = 1 << 17;
/// SNP guest policy: debugging allowed.
pub(crate) const SNP_DEBUG: u64 = 1 << 19;
