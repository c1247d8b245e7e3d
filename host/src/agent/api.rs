//! The agent's API: one JSON object a line over a Unix socket. A request, then progress lines, then one answer.
//!
//! The same types serve the agent and the command line; nothing is written twice.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::agent::platform_api::{
    OrderedBytes, PlatformInfo, PlatformOrderText, ProcessorKind, SnpCertificatesText, SnpInfo,
    TcbInfo,
};
pub use crate::agent::snapshot::{MemoryMode, SnapshotInfo};
use crate::machine::cpu::CpuModel;
use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::vmm::protocol::MachineState;

/// What may be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Launches a guest from its description.
    Run {
        /// Absolute path of the description.
        description: PathBuf,
        /// The owner's session, base64; for a guest that gets a secret.
        session: Option<SessionText>,
    },
    /// All guests.
    List,
    /// One guest.
    Status {
        /// Its name.
        name: String,
    },
    /// Ends a guest.
    Stop {
        /// Its name.
        name: String,
    },
    /// Stops its vCPUs.
    Pause {
        /// Its name.
        name: String,
    },
    /// Lets a paused guest go on.
    Resume {
        /// Its name.
        name: String,
    },
    /// A non-maskable interrupt: the guest says what it does, or dumps and panics, as it is set up.
    Nmi {
        /// Its name.
        name: String,
    },
    /// The measurement of a guest that waits for its owner.
    Measurement {
        /// Its name.
        name: String,
    },
    /// The owner's secret packet; the guest then starts.
    InjectSecret {
        /// Its name.
        name: String,
        /// Packet header, base64 of 52 bytes.
        header: String,
        /// Ciphertext, base64.
        ciphertext: String,
    },
    /// Moves a guest to a peer while it runs.
    Migrate {
        /// Its name.
        name: String,
        /// A peer of the policy.
        to: String,
        /// Longest acceptable pause in milliseconds.
        downtime_limit_ms: Option<u32>,
    },
    /// Writes a guest's memory and state to a sealed file.
    Snapshot {
        /// Its name.
        name: String,
        /// Absolute path of the file; it must not exist.
        file: PathBuf,
        /// Whether the guest ends with it.
        stop: bool,
    },
    /// Makes a guest from a sealed file.
    Restore {
        /// Absolute path of the file.
        file: PathBuf,
        /// Another name for the guest.
        name: Option<String>,
        /// When its memory comes.
        memory: MemoryMode,
        /// Whether a snapshot may be older than the guest's newest.
        allow_older: bool,
        /// Whether its disks may have changed since.
        allow_changed_disks: bool,
    },
    /// Cancels the migration of a guest.
    Cancel {
        /// Its name.
        name: String,
    },
    /// Certificates and status of the secure processor.
    Platform {
        /// Which one; by default the one by which guests are launched.
        processor: Option<ProcessorKind>,
    },
    /// What its SNP reports are signed under.
    SnpCertificates {
        /// Which one; by default the one by which guests are launched.
        processor: Option<ProcessorKind>,
    },
    /// An order of the platform's operator.
    PlatformOrder {
        /// Which one; by default the one by which guests are launched.
        processor: Option<ProcessorKind>,
        /// The order.
        order: PlatformOrderText,
    },
    /// Tries from inside the guest's processes what must be refused.
    SandboxProbe {
        /// Its name.
        name: String,
    },
    /// State of the sandboxes of a guest's processes.
    SandboxReport {
        /// Its name.
        name: String,
    },
    /// Puts another policy in force.
    PolicyLoad {
        /// Absolute path of the document; its signatures are read from beside it.
        policy: PathBuf,
    },
    /// Agrees, as the second person, to what somebody else asked for.
    Approve {
        /// The id that the refusal named.
        id: String,
    },
}

/// The owner's half of a SEV session, base64.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionText {
    /// Diffie-Hellman certificate, 2084 bytes.
    pub certificate: String,
    /// Session blob, 128 bytes.
    pub blob: String,
}

/// One line back.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub enum Line {
    /// Work goes on.
    Progress {
        /// What the mover or the launch says.
        event: serde_json::Value,
    },
    /// It worked; the last line.
    Answer {
        /// The answer.
        answer: Box<Answer>,
    },
    /// It did not; the last line.
    Failed(Failure),
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error} [{code}]")]
pub struct Failure {
    /// Stable code.
    pub code: String,
    /// Object, reason and remedy.
    pub error: String,
}

impl Failure {
    /// A failure with its stable code.
    pub fn new(code: &str, error: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            error: error.into(),
        }
    }
}

impl From<crate::vmm::protocol::RoleError> for Failure {
    fn from(error: crate::vmm::protocol::RoleError) -> Self {
        Self {
            code: error.code,
            error: error.text,
        }
    }
}

/// An answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Answer {
    /// One guest.
    Guest(GuestInfo),
    /// All guests.
    Guests {
        /// By name.
        guests: Vec<GuestInfo>,
    },
    /// A measurement.
    Measurement(MeasurementInfo),
    /// The secure processor.
    Platform(Box<PlatformInfo>),
    /// What its SNP reports are signed under.
    SnpCertificates(SnpCertificatesText),
    /// What an order gave.
    Ordered(OrderedBytes),
    /// A migration that ended well: the mover's outcome.
    Migrated {
        /// Totals.
        outcome: serde_json::Value,
    },
    /// A snapshot was written.
    Snapshotted(SnapshotInfo),
    /// Results of a probe, a process each.
    Probe {
        /// By role.
        reports: Vec<ProbeReport>,
    },
    /// Sandboxes, a process each.
    Sandbox {
        /// By role.
        reports: Vec<SandboxReport>,
    },
    /// The policy that is now in force.
    Policy {
        /// Its version; 0 if it has none.
        version: u64,
        /// SHA-256 of its text.
        digest: String,
        /// Who of the trusted signed it.
        signers: Vec<String>,
    },
    /// Nothing more to say.
    Done,
}

/// What is known of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestInfo {
    /// Name.
    pub name: String,
    /// Identity, hex.
    pub vm_id: String,
    /// What it is doing.
    pub state: MachineState,
    /// `none` or `sev`.
    pub technology: String,
    /// Whether the software secure processor stands in for AMD's.
    pub emulated: bool,
    /// vCPUs.
    pub vcpus: u8,
    /// The processor model that they are.
    pub cpu: CpuModel,
    /// Why the guest stopped itself: `shutdown`, `reset`, `panic`, `triple-fault`, or what KVM said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Ownership epoch: raised by one with each move.
    pub epoch: u64,
    /// Process id of the VMM as this host sees it.
    pub pid: u32,
    /// The serial console's output.
    pub console: PathBuf,
    /// Unix socket to the guest's vsock ports.
    pub vsock: Option<PathBuf>,
    /// Time from the request to the running (or measured) guest, microseconds; for a guest that arrived, none.
    pub launch_us: Option<u64>,
}

/// A launch measurement and what it was made by.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MeasurementInfo {
    /// Measure and nonce, base64 of 48 bytes.
    pub blob: String,
    /// API major.
    pub api_major: u8,
    /// API minor.
    pub api_minor: u8,
    /// Firmware build.
    pub build: u8,
    /// Guest policy the firmware holds.
    pub policy: u32,
    /// From LAUNCH_START to LAUNCH_MEASURE, microseconds.
    pub elapsed_us: u64,
    /// Whether the software secure processor measured.
    pub emulated: bool,
}

/// Longest request or answer line in bytes.
pub const MAX_LINE: usize = 1 << 20;
