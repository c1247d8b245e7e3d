//! What somebody wants to do.

use serde::{Deserialize, Serialize};

use crate::document::guest::ReplicaSeal;
use crate::types::{Identity, Technology};

/// What somebody wants to do. What comes from a peer here has been parsed, but is not yet believed.
///
/// In records, cases and claims an action is written as its name, or as an object of one key that is its name:
/// `"list"`, `{"migrate-out": {"technology": "sev", "emulated": false, "peer_name": "site-b"}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
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
    /// Make another guest of a snapshot: memory, state and disks of its own, and another identity.
    Clone {
        /// Its technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// Its vCPUs.
        vcpus: u16,
        /// Its memory in MiB.
        memory_mib: u64,
    },
    /// Send a guest to a peer while it runs.
    MigrateOut {
        /// Its technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// The peer's name in the policy.
        peer_name: String,
    },
    /// Go on with the sending of a guest over the session that was agreed on, which is among the claims.
    MigrateSession {
        /// Its technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// The peer's name in the policy.
        peer_name: String,
    },
    /// Receive a running guest from a peer.
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
    /// Put an owner's secret into a guest, after its evidence was verified here.
    ReleaseSecret {
        /// The guest's technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// Whether the launch measurement was verified to be the expected one.
        measurement_matches: bool,
    },
    /// Hand an owner's sealed packet to the firmware, which opens it only for the launch that the owner measured.
    InjectSecret {
        /// The guest's technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
    },
    /// Accept a guest's evidence.
    Attest {
        /// The guest's technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// Whether signature, chain, dates and report itself were verified.
        verified: bool,
    },
    /// Keep a replica of a guest at a peer.
    Replicate {
        /// The guest's technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// The peer's name in the policy.
        peer_name: String,
        /// How it is kept there.
        seal: ReplicaSeal,
    },
    /// Go on here from a replica: an attested relaunch for a confidential guest.
    Failover {
        /// The guest's technology.
        technology: Technology,
        /// Whether the secure processor is the software one.
        emulated: bool,
        /// Without the other site's word that it has stopped.
        forced: bool,
    },
    /// Try, from inside a jail, what the jail must refuse.
    SandboxProbe,
    /// See the state of a guest's cells.
    SandboxReport,
    /// See all guests.
    List,
    /// See one guest.
    Status,
    /// See the launch measurement of a guest.
    Measurement,
    /// End a guest.
    Stop,
    /// Stop a guest's vCPUs.
    Pause,
    /// Let a paused guest go on.
    Resume,
    /// Give a guest a non-maskable interrupt.
    Nmi,
    /// Change a device of a guest: its limits, its size.
    Resize,
    /// Types at a guest's console.
    Console,
    /// Puts a disk or network card into a running guest.
    Attach,
    /// Takes one out again.
    Detach,
    /// Give a running guest the program that is now installed.
    Upgrade,
    /// Write a guest's memory and state to a sealed file.
    Snapshot,
    /// Destroy the key of a snapshot, whose file nobody opens then.
    SnapshotErase,
    /// Cancel a move.
    Cancel,
    /// See the secure processor's status and certificates.
    PlatformShow,
    /// Change the secure processor.
    PlatformAdmin {
        /// What is done to it.
        command: PlatformCommand,
    },
    /// Put another policy in force.
    PolicyLoad {
        /// The new document's version; 0 if it has none.
        version: u64,
        /// The version in force; 0 if there is none.
        in_force: u64,
        /// Whether the new document is, byte for byte, the one in force.
        same: bool,
        /// How many trusted signers signed it.
        signers: u32,
        /// How many must have; 0 where the host trusts unsigned policies.
        threshold: u32,
    },
    /// Be the second person for somebody else's action.
    Approve {
        /// The action.
        action: ActionKind,
    },
    /// Read or export evidence.
    EvidenceRead,
    /// Replace the key that signs the evidence.
    EvidenceKeyRotate,
    /// Remove records whose time is over.
    EvidenceRetain {
        /// The first record that must stay.
        keep_from: u64,
    },
}

impl Action {
    /// The action without its particulars.
    pub fn kind(&self) -> ActionKind {
        match self {
            Self::Launch { .. } => ActionKind::Launch,
            Self::Clone { .. } => ActionKind::Clone,
            Self::MigrateOut { .. } => ActionKind::MigrateOut,
            Self::MigrateSession { .. } => ActionKind::MigrateSession,
            Self::MigrateIn { .. } => ActionKind::MigrateIn,
            Self::ReleaseSecret { .. } => ActionKind::ReleaseSecret,
            Self::InjectSecret { .. } => ActionKind::InjectSecret,
            Self::Attest { .. } => ActionKind::Attest,
            Self::Replicate { .. } => ActionKind::Replicate,
            Self::Failover { forced: false, .. } => ActionKind::Failover,
            Self::Failover { forced: true, .. } => ActionKind::FailoverForced,
            Self::SandboxProbe => ActionKind::SandboxProbe,
            Self::SandboxReport => ActionKind::SandboxReport,
            Self::List => ActionKind::List,
            Self::Status => ActionKind::Status,
            Self::Measurement => ActionKind::Measurement,
            Self::Stop => ActionKind::Stop,
            Self::Pause => ActionKind::Pause,
            Self::Resume => ActionKind::Resume,
            Self::Nmi => ActionKind::Nmi,
            Self::Resize => ActionKind::Resize,
            Self::Console => ActionKind::Console,
            Self::Attach => ActionKind::Attach,
            Self::Detach => ActionKind::Detach,
            Self::Upgrade => ActionKind::Upgrade,
            Self::Snapshot => ActionKind::Snapshot,
            Self::SnapshotErase => ActionKind::SnapshotErase,
            Self::Cancel => ActionKind::Cancel,
            Self::PlatformShow => ActionKind::PlatformShow,
            Self::PlatformAdmin { .. } => ActionKind::PlatformAdmin,
            Self::PolicyLoad { .. } => ActionKind::PolicyLoad,
            Self::Approve { .. } => ActionKind::Approve,
            Self::EvidenceRead => ActionKind::EvidenceRead,
            Self::EvidenceKeyRotate => ActionKind::EvidenceKeyRotate,
            Self::EvidenceRetain { .. } => ActionKind::EvidenceRetain,
        }
    }

    /// The action's stable name, as in the ledger.
    pub fn name(&self) -> &'static str {
        self.kind().as_str()
    }

    /// Technology and whether it is emulated, of actions that have one.
    pub fn technology(&self) -> Option<(Technology, bool)> {
        match self {
            Self::Launch {
                technology,
                emulated,
                ..
            }
            | Self::Clone {
                technology,
                emulated,
                ..
            }
            | Self::MigrateOut {
                technology,
                emulated,
                ..
            }
            | Self::MigrateSession {
                technology,
                emulated,
                ..
            }
            | Self::MigrateIn {
                technology,
                emulated,
                ..
            }
            | Self::ReleaseSecret {
                technology,
                emulated,
                ..
            }
            | Self::InjectSecret {
                technology,
                emulated,
            }
            | Self::Attest {
                technology,
                emulated,
                ..
            }
            | Self::Replicate {
                technology,
                emulated,
                ..
            }
            | Self::Failover {
                technology,
                emulated,
                ..
            } => Some((*technology, *emulated)),
            _ => None,
        }
    }
}

/// What is done to a secure processor; SEV API specification (publication 55766), SNP ABI specification (56860).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlatformCommand {
    /// PEK_CSR: a signing request for the owner's authority.
    Csr,
    /// PEK_CERT_IMPORT: the owner's authority signs this platform.
    Import,
    /// PEK_GEN: new keys, signed by nobody but the platform itself.
    PekGen,
    /// PDH_GEN: a new Diffie-Hellman key.
    PdhGen,
    /// PLATFORM_RESET: its identity is gone.
    Reset,
    /// SNP_CONFIG: the TCB it reports.
    Config,
    /// SNP_COMMIT: no way back to older firmware.
    Commit,
    /// SNP_VLEK_LOAD: the provider's key signs reports.
    Vlek,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// An [`Action`] without its particulars: what roles, two-person rules and records name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum ActionKind {
            $($(#[$doc])* #[serde(rename = $name)] $kind,)*
        }

        impl ActionKind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// The stable name.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
        }
    };
}

kinds! {
    /// [`Action::Launch`]
    Launch = "launch",
    /// [`Action::Clone`]
    Clone = "clone",
    /// [`Action::MigrateOut`]
    MigrateOut = "migrate-out",
    /// [`Action::MigrateSession`]
    MigrateSession = "migrate-session",
    /// [`Action::MigrateIn`]
    MigrateIn = "migrate-in",
    /// [`Action::ReleaseSecret`]
    ReleaseSecret = "release-secret",
    /// [`Action::InjectSecret`]
    InjectSecret = "inject-secret",
    /// [`Action::Attest`]
    Attest = "attest",
    /// [`Action::Replicate`]
    Replicate = "replicate",
    /// [`Action::Failover`] with the other site's word
    Failover = "failover",
    /// [`Action::Failover`] without it
    FailoverForced = "failover-forced",
    /// [`Action::SandboxProbe`]
    SandboxProbe = "sandbox-probe",
    /// [`Action::SandboxReport`]
    SandboxReport = "sandbox-report",
    /// [`Action::List`]
    List = "list",
    /// [`Action::Status`]
    Status = "status",
    /// [`Action::Measurement`]
    Measurement = "measurement",
    /// [`Action::Stop`]
    Stop = "stop",
    /// [`Action::Pause`]
    Pause = "pause",
    /// [`Action::Resume`]
    Resume = "resume",
    /// [`Action::Nmi`]
    Nmi = "nmi",
    /// [`Action::Resize`]
    Resize = "resize",
    /// [`Action::Console`]
    Console = "console",
    /// [`Action::Attach`]
    Attach = "attach",
    /// [`Action::Detach`]
    Detach = "detach",
    /// [`Action::Upgrade`]
    Upgrade = "upgrade",
    /// [`Action::Snapshot`]
    Snapshot = "snapshot",
    /// [`Action::SnapshotErase`]
    SnapshotErase = "snapshot-erase",
    /// [`Action::Cancel`]
    Cancel = "cancel",
    /// [`Action::PlatformShow`]
    PlatformShow = "platform-show",
    /// [`Action::PlatformAdmin`]
    PlatformAdmin = "platform-admin",
    /// [`Action::PolicyLoad`]
    PolicyLoad = "policy-load",
    /// [`Action::Approve`]
    Approve = "approve",
    /// [`Action::EvidenceRead`]
    EvidenceRead = "evidence-read",
    /// [`Action::EvidenceKeyRotate`]
    EvidenceKeyRotate = "evidence-key-rotate",
    /// [`Action::EvidenceRetain`]
    EvidenceRetain = "evidence-retain",
}

impl ActionKind {
    /// Whether it only looks.
    pub const fn reads(self) -> bool {
        matches!(
            self,
            Self::List
                | Self::Status
                | Self::Measurement
                | Self::SandboxReport
                | Self::PlatformShow
                | Self::EvidenceRead
        )
    }

    /// Whether it is done to a guest, whose name is then the object.
    pub const fn of_a_guest(self) -> bool {
        !matches!(
            self,
            Self::List
                | Self::PlatformShow
                | Self::PlatformAdmin
                | Self::PolicyLoad
                | Self::Approve
                | Self::EvidenceRead
                | Self::EvidenceKeyRotate
                | Self::EvidenceRetain
        )
    }

    /// Whether it goes on under a policy that is not valid now: what only looks, what ends things, and the way to a
    /// policy that is valid.
    pub const fn outlives_the_policy(self) -> bool {
        self.reads()
            || matches!(
                self,
                Self::Stop | Self::Cancel | Self::PolicyLoad | Self::Approve
            )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_written_alike_everywhere() {
        for kind in ActionKind::ALL {
            let written = serde_json::to_string(kind).unwrap();
            assert_eq!(written, format!("\"{}\"", kind.as_str()));
        }
        let action = Action::Approve {
            action: ActionKind::PolicyLoad,
        };
        let text = serde_json::to_string(&action).unwrap();
        assert_eq!(text, r#"{"approve":{"action":"policy-load"}}"#);
        assert_eq!(serde_json::from_str::<Action>(&text).unwrap(), action);
        // The name in the ledger is the name it is written by.
        let name = |action: &Action| serde_json::to_value(action).unwrap();
        assert_eq!(name(&Action::List), "list");
        for bad in [
            r#"{"list":{"x":1}}"#,
            r#"{"approve":{"action":"policy-load","x":1}}"#,
            r#"{"approve":{}}"#,
            r#""lunch""#,
        ] {
            assert!(serde_json::from_str::<Action>(bad).is_err(), "{bad}");
        }
    }
}
