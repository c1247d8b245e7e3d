//! What a decision is about: who asks, for what, what is claimed of guest and host, and when.
//!
//! Whoever asks for a decision has verified the claims, or leaves them out; a rule that needs what is missing refuses.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::action::{Action, ActionKind};
use crate::types::{DnsName, Fingerprint, Identity, LaunchDigest, LaunchSigner, Timestamp};

/// Everything a decision depends on, besides the policy. Recorded with the decision, so that it can be made again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inquiry {
    /// When it is asked.
    pub clock: Timestamp,
    /// Who asks.
    pub actor: Actor,
    /// Who else agreed to this very action.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approvals: Vec<Actor>,
    /// What it is to be done to: a guest's name, or what the action is about.
    pub object: String,
    /// What is to be done.
    pub action: Action,
    /// What was verified of the guest.
    #[serde(default, skip_serializing_if = "GuestClaims::is_empty")]
    pub guest: GuestClaims,
    /// What holds on this host.
    #[serde(default, skip_serializing_if = "HostClaims::is_empty")]
    pub host: HostClaims,
    /// What two hosts have agreed on for a move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionClaims>,
    /// Files of this host that somebody named, where they really are: no link is left to follow.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

impl Inquiry {
    /// A question without approvals and claims.
    pub fn new(actor: Actor, object: &str, action: Action, clock: Timestamp) -> Self {
        Self {
            clock,
            actor,
            approvals: Vec::new(),
            object: object.to_owned(),
            action,
            guest: GuestClaims::default(),
            host: HostClaims::default(),
            session: None,
            files: Vec::new(),
        }
    }

    /// One spelling for the ledger: JSON without spaces, keys in the order of the fields.
    pub fn canonical(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() // strings, integers and structures of them: cannot fail
    }

    /// Reads what [`Inquiry::canonical`] wrote.
    pub fn from_canonical(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

/// The question before anything that somebody named is looked at: whether they may ask for this at all
/// ([`may_ask`](crate::may_ask)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asking {
    /// Who asks.
    pub actor: Actor,
    /// For what.
    pub kind: ActionKind,
    /// To do it to this, where that is known before looking.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Files of this host that the request names, as in [`Inquiry::files`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

impl Asking {
    /// As records hold it: JSON without spaces, fields in the order above.
    pub fn canonical(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() // strings, integers and structures of them: cannot fail
    }

    /// Reads what [`Asking::canonical`] wrote.
    pub fn from_canonical(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

/// Who asks. Whoever fills this in has authenticated it: the kernel said the uid, TLS the certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Actor {
    /// The host's own agent, on its own account: at its start, by its schedule, for a peer that the action names.
    Host,
    /// A user of this machine, at the agent's Unix socket.
    Local {
        /// The user id that the kernel reports (`SO_PEERCRED`).
        uid: u32,
    },
    /// Whoever holds the key of this client certificate.
    Certificate {
        /// The DNS subject alternative name.
        san: DnsName,
        /// SHA-256 of the DER SubjectPublicKeyInfo.
        spki: Fingerprint,
    },
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host itself"),
            Self::Local { uid } => write!(f, "user {uid} of this machine"),
            Self::Certificate { san, spki } => write!(f, "{san} with key {spki}"),
        }
    }
}

/// What was verified of a guest and the platform under it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestClaims {
    /// The launch digest, computed here or reported and verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launch_digest: Option<LaunchDigest>,
    /// Who signed reference values or the ID block that this launch fits.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub launch_signers: Vec<LaunchSigner>,
    /// The processor's generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product: Option<Product>,
    /// The reported TCB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcb: Option<Tcb>,
    /// The guest policy in the report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_bits: Option<u64>,
    /// The privilege level that asked for the report, 0 to 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmpl: Option<u8>,
    /// Whether the evidence answers a nonce of ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nonce_matches: Option<bool>,
    /// How old the evidence is, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence_age_s: Option<u64>,
}

impl GuestClaims {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What holds on the deciding host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostClaims {
    /// The Landlock ABI of its kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub landlock_abi: Option<u32>,
    /// How much of the sandbox is in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxLevel>,
    /// The secure processor's firmware.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
}

impl HostClaims {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The session of a move, as it was negotiated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionClaims {
    /// The end-to-end identity that signed the agreement.
    pub peer: Identity,
    /// The identity that terminates the TLS connection.
    pub tls: Identity,
    /// `direct` or `gateway`.
    pub path: String,
    /// TLS cipher suite, by its IANA-like name in rustls: `TLS13_AES_256_GCM_SHA384`.
    pub suite: String,
    /// Key agreement group: `X25519`.
    pub group: String,
    /// Who does the bulk cryptography at this end: `ring` or `aws-lc`.
    pub provider: String,
}

/// A generation of processors with SEV-SNP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Product {
    /// EPYC 7003.
    Milan,
    /// EPYC 9004.
    Genoa,
    /// EPYC 9005.
    Turin,
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Milan => "milan",
            Self::Genoa => "genoa",
            Self::Turin => "turin",
        })
    }
}

/// The security patch level of each part of a platform's firmware: claimed, or the least that is wanted.
///
/// A TCB has no order: each part is compared with its own minimum. SNP ABI specification (56860), TCB_VERSION.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tcb {
    /// Firmware of the FMC; Turin only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fmc: Option<u8>,
    /// The secure processor's boot loader.
    pub boot_loader: u8,
    /// The secure processor's operating system.
    pub tee: u8,
    /// The SNP firmware.
    pub snp: u8,
    /// The lowest microcode patch level of all cores.
    pub microcode: u8,
}

impl Tcb {
    /// Whether every part is at least what `minimum` says; a part that is wanted and not there is not.
    pub fn reaches(&self, minimum: &Self) -> bool {
        let fmc = match (minimum.fmc, self.fmc) {
            (None, _) => true,
            (Some(wanted), Some(found)) => found >= wanted,
            (Some(_), None) => false,
        };
        fmc && self.boot_loader >= minimum.boot_loader
            && self.tee >= minimum.tee
            && self.snp >= minimum.snp
            && self.microcode >= minimum.microcode
    }
}

impl fmt::Display for Tcb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(fmc) = self.fmc {
            write!(f, "fmc {fmc}, ")?;
        }
        let Self {
            boot_loader,
            tee,
            snp,
            microcode,
            ..
        } = self;
        write!(
            f,
            "boot loader {boot_loader}, tee {tee}, snp {snp}, microcode {microcode}"
        )
    }
}

/// Version of a secure processor's firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Firmware {
    /// API major.
    pub major: u8,
    /// API minor.
    pub minor: u8,
    /// Build.
    pub build: u8,
}

impl fmt::Display for Firmware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} build {}", self.major, self.minor, self.build)
    }
}

/// How much of a role's sandbox is in force, from nothing to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SandboxLevel {
    /// Not known, or nothing.
    None,
    /// Some of namespaces, Landlock and seccomp.
    Partial,
    /// Namespaces, Landlock and seccomp on every thread.
    Full,
}

impl fmt::Display for SandboxLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Partial => "partial",
            Self::Full => "full",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tcb_is_compared_part_by_part() {
        let minimum = Tcb {
            boot_loader: 4,
            snp: 22,
            microcode: 200,
            ..Tcb::default()
        };
        assert!(minimum.reaches(&minimum));
        let newer_elsewhere = Tcb {
            boot_loader: 3,
            snp: 255,
            microcode: 255,
            tee: 255,
            fmc: Some(255),
        };
        assert!(!newer_elsewhere.reaches(&minimum));
        for part in 0..5 {
            let mut wanted = minimum;
            match part {
                0 => wanted.fmc = Some(1),
                1 => wanted.boot_loader += 1,
                2 => wanted.tee += 1,
                3 => wanted.snp += 1,
                _ => wanted.microcode += 1,
            }
            assert!(!minimum.reaches(&wanted), "{wanted}");
        }
    }

    #[test]
    fn an_inquiry_has_one_spelling() {
        let actor = Actor::Local { uid: 7 };
        let mut inquiry = Inquiry::new(actor, "vm", Action::Stop, Timestamp::from_unix(0));
        let text = inquiry.canonical();
        assert_eq!(
            text,
            r#"{"clock":"1970-01-01T00:00:00Z","actor":{"local":{"uid":7}},"object":"vm","action":"stop"}"#
        );
        assert_eq!(Inquiry::from_canonical(&text), Some(inquiry.clone()));
        inquiry.guest.vmpl = Some(3);
        inquiry.host.sandbox = Some(SandboxLevel::Full);
        assert_eq!(
            Inquiry::from_canonical(&inquiry.canonical()),
            Some(inquiry.clone())
        );
        for (from, to) in [
            ("\"object\"", "\"objekt\""),
            ("\"vmpl\":3", "\"vmpl\":300"),
            ("\"vmpl\":3", "\"vmpl\":3,\"x\":1"),
        ] {
            let bad = inquiry.canonical().replace(from, to);
            assert_ne!(bad, inquiry.canonical());
            assert_eq!(Inquiry::from_canonical(&bad), None, "{bad}");
        }
    }
}
