//! The agent's API: what may be asked, and what is answered.
//!
//! The same types serve the agent, the command line and the published description; nothing is written twice.
//! [`routes`] says how each is asked for over HTTP. A request that takes long is a task: it is accepted at once, and
//! its [`Line`]s are read from the task until the last one.

pub mod attach;
pub mod moves;
pub mod openapi;
pub mod problem;
pub mod routes;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::attach::{Attach, AttachedInfo, DiskAttach, NetAttach};
pub use crate::agent::platform_api::{
    OrderedBytes, PlatformInfo, PlatformOrderText, ProcessorKind, SnpCertificatesText, SnpInfo,
    TcbInfo,
};
pub use crate::agent::restore::MemoryMode;
pub use crate::agent::snapshot::SnapshotInfo;
pub use crate::agent::upgrade::UpgradeInfo;
use crate::machine::cpu::CpuModel;
pub use crate::machine::plan::devices::{
    ConsolePlan, DeviceChange, DeviceName, DeviceStatus, Limits, Rate,
};
use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::vmm::protocol::{DiskService, MachineState};

/// What may be asked.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Launches a guest from its description.
    Run {
        /// Absolute path of the description.
        description: PathBuf,
        /// The owner's session, base64; for a guest that gets a secret.
        session: Option<SessionText>,
    },
    /// Keeps a description, so that its guest can be started by name.
    Create {
        /// Absolute path of the description.
        description: PathBuf,
    },
    /// The descriptions kept here.
    Definitions {},
    /// Launches a guest whose description is kept.
    Start {
        /// Its name.
        name: String,
        /// The owner's session, base64; for a guest that gets a secret.
        session: Option<SessionText>,
    },
    /// Forgets the description of a guest that does not run.
    Delete {
        /// Its name.
        name: String,
    },
    /// What a guest takes of the host.
    Stats {
        /// Its name.
        name: String,
    },
    /// What a guest has written to its serial console.
    Console {
        /// Its name.
        name: String,
        /// From which byte on; 0 for the beginning.
        from: u64,
    },
    /// Opens a guest's serial console, to be looked at and typed at; for users of this host.
    ConsoleOpen {
        /// Its name.
        name: String,
    },
    /// All guests.
    List {},
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
    /// Presses the guest's power button, and ends it when it has switched itself off.
    Shutdown {
        /// Its name.
        name: String,
        /// How many seconds it has; 60 by default, at most a day.
        timeout_s: Option<u32>,
        /// Whether it is ended where it has not gone by then.
        force: bool,
    },
    /// Changes a device of a guest, running or not; or only asks what it says of itself.
    Device {
        /// The guest's name.
        name: String,
        /// Which device.
        device: DeviceName,
        /// How it is changed.
        change: Option<DeviceChange>,
    },
    /// Puts a disk or a network card into a guest, running or paused.
    Attach {
        /// The guest's name.
        name: String,
        /// What, and what it is on this host.
        device: Attach,
    },
    /// Asks a running guest to let go of a device that was attached, and takes it out.
    Detach {
        /// The guest's name.
        name: String,
        /// Which.
        device: DeviceName,
        /// How many seconds the guest has; 15 by default, at most an hour. What it has not let go of then it keeps.
        #[serde(default)]
        timeout_s: Option<u32>,
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
        /// Longest time for the whole move in seconds; it is given up then, and the guest runs on.
        #[serde(default)]
        time_limit_s: Option<u32>,
        /// MiB a second that may be sent while the guest runs.
        #[serde(default)]
        bandwidth_mib: Option<u32>,
        /// Whether its vCPUs may not be throttled if it writes more than can be sent.
        #[serde(default)]
        unthrottled: bool,
        /// Whether both ends read all memory anew, the guest paused, and compare it; for a plain guest.
        #[serde(default)]
        read_back: bool,
        /// Connections to carry memory over, 1 to 16; one if absent. The peer may grant fewer.
        #[serde(default)]
        streams: Option<u16>,
        /// Disks that move along, by their names in the description; the others are the same storage at both hosts.
        #[serde(default)]
        copy_disks: Vec<String>,
    },
    /// Finds out whether a guest could move to a peer, and what that would be like. Nothing moves.
    Assess {
        /// Its name.
        name: String,
        /// A peer of the policy.
        to: String,
        /// Longest acceptable pause in milliseconds.
        #[serde(default)]
        downtime_limit_ms: Option<u32>,
        /// MiB a second that might be sent while the guest runs.
        #[serde(default)]
        bandwidth_mib: Option<u32>,
        /// Whether its vCPUs might not be throttled.
        #[serde(default)]
        unthrottled: bool,
        /// Connections to carry memory over, 1 to 16; one if absent. The peer may grant fewer.
        #[serde(default)]
        streams: Option<u16>,
        /// Disks that would move along.
        #[serde(default)]
        copy_disks: Vec<String>,
    },
    /// Pauses a guest that is being moved and switches now, however long that takes.
    Proceed {
        /// Its name.
        name: String,
    },
    /// Asks the peer who has a guest whose commit was not answered, and acts on what it says.
    Settle {
        /// Its name.
        name: String,
    },
    /// Changes what the move of a guest may take, while it runs.
    MigrateSet {
        /// Its name.
        name: String,
        /// MiB a second that may be sent while the guest runs; 0 for all there is.
        bandwidth_mib: u32,
    },
    /// Gives a running guest a VMM of the program that is installed now. No page is copied.
    Upgrade {
        /// Its name.
        name: String,
    },
    /// Writes a guest's memory and state to a sealed file.
    Snapshot {
        /// Its name.
        name: String,
        /// Absolute path of the file; it must not exist.
        file: PathBuf,
        /// Whether the guest ends with it.
        stop: bool,
        /// Whether it is a template: cloned as often as one likes, never restored itself.
        #[serde(default)]
        template: bool,
    },
    /// Destroys the key of a snapshot: its file cannot be opened any more.
    SnapshotErase {
        /// The snapshot's id, 32 hex digits.
        id: String,
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
    /// Makes another guest of a sealed file: identity, addresses and disks of its own.
    Clone {
        /// Absolute path of the file.
        file: PathBuf,
        /// The new guest's name.
        name: String,
        /// When its memory comes.
        memory: MemoryMode,
        /// Absolute path of the folder that its disks are put in; the agent's own for this guest if absent.
        disks: Option<PathBuf>,
        /// Whether the snapshot's disks may have changed since.
        #[serde(default)]
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
    /// Gives the ledger another key.
    EvidenceRotate {},
    /// Removes full files of the ledger, whose records nobody needs any more.
    EvidenceRetain {
        /// The first record that must stay.
        keep_from: u64,
    },
    /// The tasks under way, and the last that ended.
    Tasks {},
    /// One task.
    Task {
        /// Its id.
        id: String,
    },
    /// What a task says, from its beginning to its end.
    TaskEvents {
        /// Its id.
        id: String,
    },
    /// Cancels a task.
    TaskCancel {
        /// Its id.
        id: String,
    },
    /// Numbers for Prometheus.
    Metrics {},
}

/// The owner's half of a SEV session, base64.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SessionText {
    /// Diffie-Hellman certificate, 2084 bytes.
    pub certificate: String,
    /// Session blob, 128 bytes.
    pub blob: String,
}

/// One line of a task's events.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error, JsonSchema)]
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
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
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
    /// What a migration would be like.
    Assessed(moves::MovePlan),
    /// What became of a migration whose commit was not answered.
    Settled(moves::Settled),
    /// A guest has another VMM.
    Upgraded(UpgradeInfo),
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
    /// The ledger's new key.
    EvidenceKey {
        /// C2SP verifier key.
        key: String,
        /// The one before.
        old_key: String,
    },
    /// What is left of the ledger.
    EvidenceRetained {
        /// The first record that is left; 0 if nothing could be removed.
        removed_to: u64,
    },
    /// A description that is kept.
    Definition(DefinitionInfo),
    /// Descriptions that are kept.
    Definitions {
        /// By name.
        definitions: Vec<DefinitionInfo>,
    },
    /// What a guest takes of the host.
    Stats(StatsInfo),
    /// What a device says of itself.
    Device(DeviceStatus),
    /// A part of a console's output.
    Console {
        /// The bytes, base64; at most 64 KiB.
        bytes: String,
        /// From where to go on.
        next: u64,
        /// Whether the guest writes no more.
        ended: bool,
    },
    /// A console that waits for its user.
    ConsoleOpened {
        /// Unix socket that belongs to who asked, and takes one connection within ten seconds. The guest's last
        /// output comes first; what is written to it is typed.
        socket: PathBuf,
    },
    /// A task.
    Task(TaskInfo),
    /// Tasks.
    Tasks {
        /// The newest first.
        tasks: Vec<TaskInfo>,
    },
    /// Numbers for Prometheus.
    Metrics {
        /// In Prometheus' text format.
        text: String,
    },
    /// Nothing more to say.
    Done,
}

/// What is known of a guest.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
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
    /// Version of the program that this is a process of.
    #[serde(default)]
    pub vmm_version: String,
    /// The serial console's output.
    pub console: PathBuf,
    /// Unix socket to the guest's vsock ports.
    pub vsock: Option<PathBuf>,
    /// Context id of its vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_cid: Option<u32>,
    /// Its network cards.
    #[serde(default)]
    pub nets: Vec<CardInfo>,
    /// How often the guest broke a rule of its devices, where the VMM was asked.
    #[serde(default)]
    pub device_faults: u64,
    /// Who does the requests of each disk, where the VMM was asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskService>,
    /// Unix socket of the guest's virtio console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<PathBuf>,
    /// Devices that were attached while it ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attached: Vec<AttachedInfo>,
    /// How many slots are free for others.
    #[serde(default)]
    pub free_slots: u8,
    /// Time from the request to the running (or measured) guest, microseconds; for a guest that arrived, none.
    pub launch_us: Option<u64>,
    /// CPU time of the VMM from the start of its process to the guest's first instruction, microseconds; only of a
    /// guest that was launched here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_cpu_us: Option<u64>,
}

/// A guest's network card.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct CardInfo {
    /// Its name in the description.
    pub id: String,
    /// Its address, `52:54:00:00:00:01`; the guest can send from no other.
    pub mac: String,
    /// Pairs of queues that the guest can use.
    pub queues: u8,
}

/// A description that is kept.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct DefinitionInfo {
    /// The guest's name.
    pub name: String,
    /// The file that it was read from; relative paths in it are still relative to that file's folder.
    pub description: PathBuf,
    /// Whether a guest of that name is on this host.
    pub present: bool,
}

/// What a guest takes of the host.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct StatsInfo {
    /// Its name.
    pub name: String,
    /// Processor time of its VMM, milliseconds.
    pub cpu_ms: u64,
    /// Resident memory of its VMM in bytes, guest memory included.
    pub resident_bytes: u64,
    /// Threads of its VMM.
    pub threads: u32,
    /// Bytes of console output that are kept.
    pub console_bytes: u64,
}

/// What is known of a task.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct TaskInfo {
    /// Its id.
    pub id: String,
    /// What was asked for: the name of the operation.
    pub operation: String,
    /// The guest that it concerns, as soon as that is known.
    pub guest: Option<String>,
    /// Who asked, as in records.
    pub asked_by: String,
    /// When it was asked for (RFC 3339).
    pub begun: String,
    /// Whether it goes on, and how it ended.
    pub state: TaskState,
    /// How many progress events there were.
    pub events: u64,
    /// The last of them.
    pub last_event: Option<serde_json::Value>,
    /// Of a task that is done.
    pub answer: Option<Box<Answer>>,
    /// Of a task that failed.
    pub failure: Option<Failure>,
}

/// Where a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// It goes on.
    Running,
    /// It did what was asked for.
    Done,
    /// It did not.
    Failed,
}

/// A launch measurement and what it was made by.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
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

/// Longest request, answer or line of events in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;
